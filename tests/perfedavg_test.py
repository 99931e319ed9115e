"""Per-FedAvg: its gradient against finite differences, its orders, its steps against a plain loop."""

import functools

import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same

from fedjax_peft import adapters, bilevel, local, tasks, trees
from fedjax_peft.algorithms import fedavg, perfedavg

MODEL, TASK, SGD = toy.model(), tasks.classification(), optax.sgd(0.5)
RATE = 0.3


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    known = {"rank": 2, "alpha": 4.0, "targets": "query"}
    return functools.partial(adapters.init, shapes=shapes, **known | settings)


def make(optimizer=SGD, model=MODEL, **settings):
    return perfedavg.perfedavg(model, TASK, init_adapters(), optimizer, **{"inner_rate": RATE} | settings)


def batches(size: int = 6, real: int | None = None, steps: int = 2):
    """The batches of one client, `[S, B, ..]`, each with `real` examples."""
    made = jax.tree.map(lambda leaf: leaf[0], toy.batches(3, 1, steps=steps, size=size))
    weights = np.broadcast_to(np.arange(size) < (size if real is None else real), (steps, size))
    return made.replace(weights=weights.astype(np.float32), width=np.ones(steps, np.int32))


def one(batches, step=0):
    """One step, without what has no axis of steps."""
    return jax.tree.map(lambda leaf: leaf[step], batches.replace(constants={}))


def problem(dropout: float = 0.0):
    """(loss, x, batch) in float64 at a generic point; the first and the third minibatch are the same."""
    base = MODEL.init(jax.random.key(7))
    start = init_adapters(dropout=dropout)(jax.random.key(1))
    noise = iter(jax.random.split(jax.random.key(2), 100))
    x = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(noise), leaf.shape, jnp.float64), start)
    loss, fixed = local.objective(MODEL, TASK, base), trees.select(start, lambda leaf: leaf == "scale")
    rows = np.array([0, 1, 0, 3, 4, 3, 6, 7, 6])
    batch = jax.tree.map(lambda leaf: leaf[rows], one(batches(9)).replace(width=()))
    return (
        lambda trained, batch, key: loss(trees.join(trained, fixed), batch, key),
        trees.select(x, lambda leaf: leaf != "scale"),
        batch,
    )


def gradients(loss, x, batch, **settings):
    """(inner rate) -> g."""

    @jax.jit
    def gradient(rate):
        return perfedavg.meta_gradient(loss, x, batch, jax.random.key(5), inner_rate=rate, **settings)[0]

    return gradient


def test_exact_is_the_derivative_through_the_inner_step():
    with jax.enable_x64(True):
        loss, x, batch = problem()
        first, second, _ = bilevel.parts(batch, 3)

        @jax.jit
        def through(x):
            inner = jax.grad(lambda x: loss(x, first, None)[0])(x)
            return loss(trees.subtract(x, trees.scale(inner, RATE)), second, None)[0]

        g = gradients(loss, x, batch)(RATE)
        noise = iter(jax.random.split(jax.random.key(9), 100))
        v = jax.tree.map(lambda leaf: jax.random.normal(next(noise), leaf.shape), x)
        d = 2e-6
        ahead, behind = through(trees.add(x, trees.scale(v, d))), through(trees.subtract(x, trees.scale(v, d)))
        np.testing.assert_allclose(optax.tree.vdot(g, v), (ahead - behind) / (2 * d), rtol=1e-8)


def test_orders_differ_by_the_product_with_the_hessian():
    with jax.enable_x64(True):
        loss, x, batch = problem(dropout=0.3)
        exact, first_order = gradients(loss, x, batch), gradients(loss, x, batch, order="fo")
        free = gradients(loss, x, batch, order="hf", fd_eps=1e-4)(RATE)

        def norm(x, y):
            return float(trees.squared_norm(trees.subtract(x, y))) ** 0.5

        gap = norm(exact(RATE), first_order(RATE))
        # With another mask of dropout on either side the differences would be off by far more.
        assert norm(exact(RATE), free) < 1e-6 * gap
        assert gap > 0.01 * norm(exact(RATE), trees.zeros_like(x))
        gaps = [norm(exact(rate), first_order(rate)) for rate in (2e-4, 1e-4)]
        np.testing.assert_allclose(gaps[0] / gaps[1], 2.0, rtol=1e-2)


def test_first_order_is_the_gradient_after_the_inner_step():
    with jax.enable_x64(True):
        loss, x, batch = problem()
        first, second, _ = bilevel.parts(batch, 3)
        slope = jax.jit(jax.grad(lambda x, batch: loss(x, batch, None)[0]))
        expected = slope(trees.subtract(x, trees.scale(slope(x, first), RATE)), second)
        assert_close(gradients(loss, x, batch, order="fo")(RATE), expected, 1e-12)


def test_without_an_inner_step_it_is_homlora_on_the_second_minibatch():
    optimizer = optax.sgd(0.5, momentum=0.9)
    own, method = batches(), make(optimizer, inner_rate=0.0)
    homlora = fedavg.fedit(MODEL, TASK, init_adapters(), optimizer, weighting="uniform", keep_optimizer=True)
    server = method.init(jax.random.key(1))
    assert_same(server, homlora.init(jax.random.key(1)))
    client = method.init_client(server, 0, jax.random.key(0))
    update = [jax.jit(functools.partial(m.client_update, federation.base())) for m in (method, homlora)]
    theirs = bilevel.parts(own.replace(constants={}), 3)[1]
    for index in range(2):
        key = jax.random.key(index)
        mine, upload, _ = update[0](server, client, own, key)
        other, expected, _ = update[1](server, client, theirs, key)
        assert_close((mine, upload), (other, expected), 1e-6)
        cohort = toy.cohort([0])
        sums = method.fold(jax.tree.map(lambda leaf: leaf[None], upload), cohort)
        server, client = method.server_update(server, sums)[0], mine


def test_outer_steps_build_on_each_other():
    optimizer = optax.adam(0.02)
    method, own, key = make(optimizer), batches(), jax.random.key(4)
    server = method.init(jax.random.key(1))
    client = method.init_client(server, 0, key)
    loss = local.objective(MODEL, TASK, federation.base())
    fixed = trees.select(server.adapters, lambda leaf: leaf == "scale")
    start = trees.select(server.adapters, lambda leaf: leaf != "scale")

    def objective(x, batch, key):
        return loss(trees.join(x, fixed), batch, key)

    x, moments = start, client.optimizer
    for step in range(2):
        g, _ = jax.jit(functools.partial(perfedavg.meta_gradient, objective, inner_rate=RATE))(
            x, one(own, step), jax.random.fold_in(key, step)
        )
        updates, moments = optimizer.update(g, moments, x)
        x = optax.apply_updates(x, updates)
    new, upload, metrics = jax.jit(functools.partial(method.client_update, federation.base()))(server, client, own, key)
    assert_close(upload, trees.subtract(x, start), 1e-5)
    assert_close(new.optimizer, moments, 1e-5)
    assert metrics["loss"] > 0 and metrics["adapted_loss"] > 0


def test_clients_personalize_by_a_step_of_the_inner_rate_on_all_examples():
    method, own = make(personal_rate=2.0), batches(size=4, steps=1)
    server = method.init(jax.random.key(1))
    client = method.init_client(server, 0, jax.random.key(0))
    personalize = jax.jit(functools.partial(method.personalize, federation.base()))
    loss = local.objective(MODEL, TASK, federation.base())
    slope = jax.jit(jax.grad(lambda x: loss(x, one(own), None)[0]))(server.adapters)
    expected = trees.subtract(server.adapters, trees.scale(slope, 2 * RATE))
    found = personalize(server, client, own, jax.random.key(0))
    assert_close(*(trees.select(tree, lambda leaf: leaf != "scale") for tree in (found, expected)), 1e-6)
    assert_same(*(trees.select(tree, lambda leaf: leaf == "scale") for tree in (found, server.adapters)))
    none = jax.tree.map(lambda leaf: leaf[:0], own.replace(constants={}))
    assert_same(personalize(server, client, none, jax.random.key(0)), server.adapters)


@pytest.mark.parametrize(("order", "calls"), [("fo", 2), ("exact", 3), ("hf", 4)])
def test_gradients_a_step_costs(order, calls):
    # Three for `exact`, one of them with its derivative along a vector, which costs about another.
    seen = []

    def apply(*arguments):
        seen.append(arguments)
        return MODEL.apply(*arguments)

    method, own = make(model=MODEL._replace(apply=apply), order=order), batches().replace(widths=())
    server = method.init(jax.random.key(1))
    client = method.init_client(server, 0, jax.random.key(0))
    jax.eval_shape(method.client_update, federation.base(), server, client, own, jax.random.key(0))
    assert len(seen) == calls


def test_an_example_alone_is_in_all_three_minibatches():
    method, own = make(), batches(real=1)
    server = method.init(jax.random.key(1))
    client = method.init_client(server, 0, jax.random.key(0))
    update = jax.jit(functools.partial(method.client_update, federation.base()))
    _, upload, metrics = update(server, client, own, jax.random.key(0))
    assert metrics["loss"] > metrics["adapted_loss"] > 0  # the same example before and after the inner step
    assert any(np.any(leaf) for leaf in jax.tree.leaves(upload)) and trees.all_finite(upload)


def test_a_batch_of_fewer_than_three_is_refused_when_traced():
    method = make()
    server = method.init(jax.random.key(1))
    client = method.init_client(server, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="train.batch is 2, expected 3 or more"):
        jax.eval_shape(method.client_update, federation.base(), server, client, batches(2), jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_rate": -0.1}, "inner_rate is -0.1"),
        ({"inner_rate": float("nan")}, "inner_rate is nan"),
        ({"order": "second"}, "order is 'second', expected one of exact, hf, fo"),
        ({"fd_eps": 0.0}, "fd_eps is 0.0"),
        ({"weighting": "size"}, "weighting is 'size'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)

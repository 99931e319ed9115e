import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from fedjax_peft import adapters, implicit, local, ranks, tasks, trees
from fedjax_peft.algorithms import fedl2p, lora
from fedjax_peft.types import Batches

KEY = jax.random.key(0)
MODEL, TASK = toy.model(), tasks.classification()
BASE = MODEL.init(jax.random.key(7))
SHAPES = jax.eval_shape(MODEL.init, KEY)
LORA = functools.partial(adapters.init, shapes=SHAPES, rank=4, alpha=8.0, targets="all-linear", head="lora")
WITH_HEAD = functools.partial(adapters.init, shapes=SHAPES, rank=4, alpha=8.0, targets="query")
TAPS = np.linspace(-1, 2, 6).astype(np.float32)


def client(steps=5, seed=0, size=4, **constants):
    batches = jax.tree.map(lambda leaf: leaf[0], toy.batches(seed, 1, steps, size))
    known = {"examples": np.float32(steps * size), "taps": TAPS + np.float32(seed)} | constants
    return batches.replace(constants=known, widths=(6,), width=np.zeros(steps, np.int32))


def build(init=LORA, **settings):
    given = {"inner_rate": 0.02} | settings
    return fedl2p.fedl2p(MODEL, TASK, init, optax.identity(), **given)


def update(method, batches, server=None):
    server = method.init(KEY) if server is None else server
    return jax.jit(method.client_update)(BASE, server, (), batches, KEY)[1:]


def personal(method, batches, server=None):
    return jax.jit(method.personalize)(BASE, method.init(KEY) if server is None else server, (), batches, KEY)


def assert_close(x, y, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), x, y)


# Fine-tuning


def test_a_network_that_says_one_is_adamw():
    method, batches = build(init=WITH_HEAD), client()
    server = method.init(KEY)
    network = server.meta.network
    server = server.replace(meta=server.meta._replace(network=network.replace(w3=jnp.zeros_like(network.w3))))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, weight_decay=0.0))
    expected, _ = lora.fine_tune(MODEL, TASK, BASE, server.adapters, optimizer, batches, KEY)
    assert_close(personal(method, batches, server), expected)


def test_outer_rates_of_zero_are_fine_tuning_at_the_initial_rates():
    method, batches = build(network_rate=0.0, rates_rate=0.0), client()
    server = method.init(KEY)
    upload, _ = update(method, batches)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(upload))

    # A, B of the layers 0 and 1, A, B of the classifier.
    rates = np.asarray(fedl2p.generate(server.meta, TAPS))
    assert np.ptp(rates) > 1e-3

    def per_tensor(updates, state, params=None):
        query, head = updates["encoder"]["layer"]["query"]["delta"], updates["classifier"]["delta"]
        query = query.replace(a=query.a * rates[[0, 2], None, None], b=query.b * rates[[1, 3], None, None])
        head = head.replace(a=head.a * rates[4], b=head.b * rates[5])
        return {"encoder": {"layer": {"query": {"delta": query}}}, "classifier": {"delta": head}}, state

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.GradientTransformation(lambda params: (), per_tensor),
        optax.scale(-1.0),
    )
    expected, _ = lora.fine_tune(MODEL, TASK, BASE, server.adapters, optimizer, batches, KEY)
    assert_close(personal(method, batches), expected)


def slopes(values, weights=None):
    """Steps of one example with its own slope: the loss is slope x parameter."""
    count = len(values)
    tokens = np.zeros((count, 1, 1), np.int32)
    weights = np.ones((count, 1), np.float32) if weights is None else np.asarray(weights, np.float32)[:, None]
    labels = np.asarray(values, np.float32)[:, None]
    constants = {"examples": np.float32(2)}
    return Batches({"tokens": tokens, "mask": tokens == 0}, labels, weights, np.zeros(count, np.int32), (), constants)


def linear(params, batch, key):
    value = jnp.sum(batch.labels) * params
    return value, {"loss": value}


def by_hand(steps, correction, rate=0.1, b1=0.9, b2=0.999):
    p, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate(steps, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        power = t if correction == "step" else 1
        p -= rate * (m / (1 - b1**power)) / (np.sqrt(v / (1 - b2**power)) + 1e-8)
    return p


@pytest.mark.parametrize("correction", ["step", "constant"])
def test_bias_correction_by_hand(correction):
    settings = fedl2p.make_adamw(clip=None, bias_correction=correction)
    run = lambda batches: fedl2p.adapt(linear, jnp.float32(1), jnp.float32(0.1), settings, batches, KEY)[0]  # noqa: E731
    np.testing.assert_allclose(run(slopes([3.0, -1.0, 2.0])), by_hand([3.0, -1.0, 2.0], correction), rtol=1e-5)
    # Steps without examples leave the moments and their count alone.
    padded = slopes([9.0, 3.0, 9.0, -1.0, 2.0], [0, 1, 0, 1, 1])
    np.testing.assert_allclose(run(padded), by_hand([3.0, -1.0, 2.0], correction), rtol=1e-5)


def test_the_first_gradient_of_an_epoch_waits_for_the_second():
    settings = fedl2p.make_adamw(clip=None, first_microbatch="skip")
    # Two epochs of two examples in blocks of three steps, one of them padding.
    batches = slopes([9.0, 1.0, 2.0, 4.0, 9.0, 8.0], [0, 1, 1, 1, 0, 1])
    waits = fedl2p.waiting(batches, batches)
    assert list(waits[:4]) == [True, False, True, False]
    trained, _ = fedl2p.adapt(linear, jnp.float32(1), jnp.float32(0.1), settings, batches, KEY, waits)
    np.testing.assert_allclose(trained, by_hand([3.0, 12.0], "step"), rtol=1e-5)


def test_weight_decay_is_times_the_rate():
    settings = fedl2p.make_adamw(weight_decay=0.5)
    trained, _ = fedl2p.adapt(linear, jnp.float32(2), jnp.float32(0.1), settings, slopes([0.0]), KEY)
    np.testing.assert_allclose(trained, 2 - 0.1 * 0.5 * 2, rtol=1e-6)


def test_budgets_are_data_and_the_setting_is_where_there_is_none():
    init = functools.partial(adapters.init, shapes=SHAPES, rank=3, alpha=6.0, targets="all-linear", head="lora")
    method = build(init=init, budget=1)
    layout = ranks.layout(ranks.concrete(init))
    run, server = jax.jit(method.personalize), method.init(KEY)
    for budget in (1, 2, 3):
        tree = run(BASE, server, (), client(budget=np.int32(budget)), KEY)
        assert list(np.count_nonzero(ranks.table(layout, tree), axis=1)) == [budget] * 3
        unused = np.asarray(tree["classifier"]["delta"].b)[budget:]
        assert not unused.any() and np.asarray(tree["classifier"]["delta"].b)[:budget].any()
    assert run._cache_size() == 1
    assert np.count_nonzero(ranks.table(layout, personal(method, client()))) == 3


def test_without_steps_logits_are_those_of_the_base():
    batches = client()
    none = jax.tree.map(lambda leaf: leaf[:0], batches.replace(constants={})).replace(constants=batches.constants)
    inputs = {name: value[0] for name, value in batches.inputs.items()}
    for method in (build(init=WITH_HEAD), build(test_fraction=0.8)):
        tree = personal(method, none)
        np.testing.assert_array_equal(MODEL.apply(BASE, tree, inputs), MODEL.apply(BASE, {}, inputs))


# Validation examples


def examples_of(batches):
    """The first tokens of examples that count."""
    return sorted(map(tuple, np.where(batches.inputs["mask"], batches.inputs["tokens"], -1)[batches.weights > 0]))


@pytest.mark.parametrize("count, held", [(20, 4), (11, 3), (5, 1), (3, 1), (2, 1), (1, 0)])
def test_a_fifth_is_held_back_and_one_example_stays(count, held):
    batches = client()
    batches.weights.reshape(-1)[count:] = 0
    train, rest = fedl2p.split(batches, 0.8)
    assert not ((train.weights > 0) & (rest.weights > 0)).any()
    np.testing.assert_array_equal(train.weights + rest.weights, batches.weights)
    assert int((rest.weights > 0).sum()) == held


def test_an_example_is_on_the_same_side_in_every_epoch_and_round():
    batches, rng = client(), np.random.default_rng(1)
    sides = None
    for _ in range(3):
        epochs = [rng.permutation(20) for _ in range(2)]
        order = np.concatenate(epochs)
        flat = jax.tree.map(
            lambda leaf: np.asarray(leaf).reshape(20, *leaf.shape[2:]), (batches.inputs, batches.labels)
        )
        inputs, labels = jax.tree.map(lambda leaf, at=order: leaf[at].reshape(10, 4, *leaf.shape[1:]), flat)
        # Another padding must not matter.
        inputs = inputs | {"tokens": np.where(inputs["mask"], inputs["tokens"], rng.integers(9))}
        two = batches.replace(inputs=inputs, labels=labels, weights=np.ones((10, 4), np.float32))
        train, held = map(examples_of, fedl2p.split(two, 0.8))
        assert not set(train) & set(held) and len(held) == 8
        assert sides is None or (train, held) == sides
        sides = train, held


def test_held_examples_never_train():
    batches = client()
    held = np.asarray(fedl2p.split(batches, 0.8)[1].weights) > 0
    other = batches.replace(labels=np.where(held, (batches.labels + 1) % 3, batches.labels))
    wrong = batches.replace(labels=np.where(held, batches.labels, (batches.labels + 1) % 3))
    method = build(test_fraction=0.8)
    first = personal(method, batches)
    jax.tree.map(np.testing.assert_array_equal, personal(method, other), first)
    assert np.any(personal(method, wrong)["classifier"]["delta"].b != first["classifier"]["delta"].b)
    everything = build()
    assert np.any(personal(everything, other)["classifier"]["delta"].b != first["classifier"]["delta"].b)
    (_, plain), (_, changed) = update(method, batches), update(method, other)
    assert plain["loss"] == changed["loss"] and plain["validation_loss"] != changed["validation_loss"]


# Hypergradient

H, B, GOAL = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([1.0, -0.5]), np.array([-0.3, 0.4])
END, RATES = np.array([0.9, -0.2]), np.array([0.3, 0.05])


def quadratic(params, batch, key):
    """Label 0 is a training example of 1/2 w'Hw - B w, label 1 a validation example of 1/2 |w - GOAL|^2."""
    w = jnp.stack([params["first"], params["second"]])
    training = 0.5 * w @ jnp.asarray(H, jnp.float32) @ w - jnp.asarray(B, jnp.float32) @ w
    value = jnp.where(batch.labels[0] == 0, training, 0.5 * jnp.sum((w - jnp.asarray(GOAL, jnp.float32)) ** 2))
    return value, {"loss": value}


def approximate(terms, rate=0.1):
    train, held = slopes([0.0]), slopes([1.0])
    tree = lambda values: dict(zip(("first", "second"), map(jnp.float32, values), strict=True))  # noqa: E731
    value, p, slope = implicit.solve(quadratic, tree(END), train, held, terms, rate)
    np.testing.assert_allclose(value, 0.5 * np.sum((END - GOAL) ** 2), rtol=1e-6)
    # The rates themselves are what is learnt, through a logarithm, so that the chain rule has something to do.
    meta = tree(np.log(RATES))
    found = implicit.hypergradient(lambda meta: jax.tree.map(jnp.exp, meta), meta, p, slope)
    return np.array([found["first"], found["second"]])


def differences(step=1e-5):
    """Of the validation loss where r_i g_i(w) stays what it is at END, in the logarithms of the rates."""
    constant = RATES * (H @ END - B)

    def loss(logarithms):
        w = np.linalg.solve(H, B + constant / np.exp(logarithms))
        return 0.5 * np.sum((w - GOAL) ** 2)

    start = np.log(RATES)
    np.testing.assert_allclose(np.linalg.solve(H, B + constant / RATES), END)
    return np.array([(loss(start + step * e) - loss(start - step * e)) / (2 * step) for e in np.eye(2)])


def test_the_hypergradient_converges_to_finite_differences():
    expected = differences()
    errors = [np.linalg.norm(approximate(terms) - expected) for terms in (0, 3, 10, 30, 200)]
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_allclose(approximate(200), expected, rtol=1e-3)
    # Three terms are the partial sum.
    v, series = END - GOAL, sum(0.1 * np.linalg.matrix_power(np.eye(2) - 0.1 * H, k) for k in range(4))
    np.testing.assert_allclose(approximate(3), -(series @ v) * (H @ END - B), rtol=1e-5)


def test_batches_count_by_their_examples():
    batches = client(3)
    batches.weights[0, 2:], batches.weights[1] = 0, 0
    train, held = fedl2p.split(batches, 0.7)
    start = trees.select(adapters.init(KEY, SHAPES, rank=2, targets="query"), lambda leaf: leaf != "scale")
    fixed = trees.select(adapters.init(KEY, SHAPES, rank=2, targets="query"), lambda leaf: leaf == "scale")
    loss = local.objective(MODEL, TASK, BASE)
    objective = lambda trained, batch, key: loss(trees.join(trained, fixed), batch, key)  # noqa: E731
    value, _, slope = implicit.solve(objective, start, train, held, 1, 0.1)

    def whole(part):
        one = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), (part.inputs, part.labels))
        return part.replace(inputs=one[0], labels=one[1], weights=np.asarray(part.weights).reshape(-1), constants={})

    np.testing.assert_allclose(value, objective(start, whole(held), None)[0], rtol=1e-5)
    assert_close(slope, jax.grad(lambda tree: objective(tree, whole(train), None)[0])(start))


def test_the_federation_learns_rates_that_fit_the_held_examples():
    method = build(inner_rate=1e-3, network_rate=0.0, rates_rate=1e-3)
    server, batches = method.init(KEY), client(6)
    step, losses = jax.jit(method.client_update), []
    for _ in range(6):
        _, upload, metrics = step(BASE, server, (), batches, KEY)
        server = server.replace(meta=trees.add(server.meta, upload))
        losses.append(float(metrics["validation_loss"]))
    # A planted answer: faster is better.
    assert losses[-1] < losses[0] - 0.02, losses
    assert np.mean(server.meta.rates) > 2e-3


def test_rates_stop_at_zero_and_can_leave_it():
    method, batches = build(inner_rate=1e-3, network_rate=0.0, rates_rate=0.01), client(6)
    held = np.asarray(fedl2p.split(batches, 0.8)[1].weights) > 0
    liar = batches.replace(labels=np.where(held, (batches.labels + 1) % 3, batches.labels))
    server, step, seen = method.init(KEY), jax.jit(method.client_update), []
    for own in (liar, liar, batches, batches):
        _, upload, metrics = step(BASE, server, (), own, KEY)
        server = server.replace(meta=trees.add(server.meta, upload))
        seen.append(np.asarray(server.meta.rates))
        assert all(np.isfinite(value) for value in metrics.values())
    assert (np.array(seen) >= -1e-9).all() and np.isfinite(seen).all()
    still = np.array(seen[1]) < 1e-9
    assert still.any() and (seen[3][still] > 1e-3).any()


def test_a_client_of_one_example_learns_no_rates():
    batches = client()
    batches.weights.reshape(-1)[1:] = 0
    upload, metrics = update(build(), batches)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(upload))
    assert all(np.isfinite(value) for value in metrics.values())


# Meta-parameters


def test_rates_are_those_of_the_network_in_numpy():
    meta = build().init(KEY).meta
    n, x = jax.tree.map(np.asarray, meta.network), TAPS
    hidden = np.maximum(np.maximum(x @ n.w1 + n.b1, 0) @ n.w2 + n.b2, 0)
    np.testing.assert_allclose(fedl2p.generate(meta, x), (hidden @ n.w3 + n.b3) * 0.02, rtol=1e-5)
    assert abs(n.w2.std() - 0.01) < 5e-4 and (n.b1 == 1).all() and (n.b2 == 1).all() and (n.b3 == 1).all()
    # Held at the bounds, with a slope that passes.
    low = meta._replace(network=meta.network.replace(b3=jnp.full(6, -9.0, jnp.float32)))
    assert not np.asarray(fedl2p.generate(low, x)).any()
    slope = jax.grad(lambda meta: jnp.sum(fedl2p.generate(meta, x)))(low)
    np.testing.assert_allclose(slope.network.b3, np.full(6, 0.02), rtol=1e-6)


@pytest.mark.parametrize("inputs, sites, count", [(148, 74, 40_096), (6, 3, 600 + 10_200 + 606 + 6)])
def test_number_of_parameters(inputs, sites, count):
    network = jax.eval_shape(lambda: fedl2p.make_network(KEY, inputs, 2 * sites))
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) + 2 * sites == count
    if sites == 3:
        method = build()
        assert method.traffic(method.init(KEY)) == (count, count)


def test_clients_side_by_side_are_those_one_after_the_other():
    method, own = build(), [client(5, seed) for seed in range(3)]
    own[1].weights[3:], own[2].weights.reshape(-1)[2:] = 0, 0
    server = method.init(KEY)
    run = lambda batches: method.client_update(BASE, server, (), batches, KEY)[1:]  # noqa: E731
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *own)
    together = jax.jit(jax.vmap(run))(stacked.replace(widths=()))
    alone = jax.jit(run)
    for index, batches in enumerate(own):
        one = alone(batches.replace(widths=()))
        jax.tree.map(lambda a, b, at=index: np.testing.assert_allclose(a[at], b, rtol=1e-3, atol=1e-5), together, one)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bias_correction": "none"}, "algorithm.bias_correction is 'none', expected 'step' or 'constant'"),
        ({"first_microbatch": "drop"}, "algorithm.first_microbatch is 'drop', expected 'keep' or 'skip'"),
        ({"validation": 0.0}, "algorithm.validation is 0.0, expected a share between 0 and 1"),
        ({"test_fraction": 1.5}, "algorithm.test_fraction is 1.5, expected a share above 0, at most 1"),
        ({"neumann_rate": 0.0}, "algorithm.neumann_rate is 0.0, expected more than 0"),
        ({"meta_clip": -1.0}, "algorithm.meta_clip is -1.0, expected more than 0"),
        ({"network_rate": -1e-4}, "algorithm.network_rate is -0.0001, expected 0 or more"),
        ({"outer_steps": 0}, "algorithm.outer_steps is 0, expected 1 or more"),
        ({"budget": 5}, "a budget is 5 ranks a site, expected 1 to adapter.rank, which is 4"),
    ],
)
def test_mistakes_are_named_in_one_sentence(settings, message):
    init = functools.partial(adapters.init, shapes=SHAPES, rank=4, targets="query")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(init=init, **settings)


def test_an_unknown_setting_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        build(beta=1)

"""PF2LoRA: hypergradients against differences and closed forms, the golden run, a local step, cost."""

import functools

import encoder
import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same
from jax.flatten_util import ravel_pytree

from fedjax_peft import adapters, bilevel, local, tasks, trees
from fedjax_peft.algorithms import fedavg, pf2lora
from fedjax_peft.models import bert
from fedjax_peft.types import Batches

MODEL, TASK, SGD = toy.model(), tasks.classification(), optax.sgd(0.5)
ORDERS = pytest.mark.parametrize("order", pf2lora.ORDERS)


def init_adapters(model=MODEL, **settings):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"rank": 3, "alpha": 6.0, "targets": "query"} | settings)


def make(optimizer=SGD, **settings):
    return pf2lora.pf2lora(MODEL, TASK, init_adapters(), optimizer, **{"client_rate": 0.3} | settings)


@pytest.fixture
def double():
    with jax.enable_x64():
        yield


class Regression:
    """1/2N |X (s1 B A + s2 D C)^T - Y|^2 at a generic point, with the closed form of its hypergradients."""

    def __init__(self, seed=0, s1=1.0, s2=1.0):
        rng = np.random.default_rng(seed)
        n, m, r, q, self.s1, self.s2 = 5, 4, 3, 2, s1, s2
        self.x = {"a": rng.normal(size=(r, n)), "b": rng.normal(size=(m, r))}
        self.y = {"c": rng.normal(size=(q, n)), "d": rng.normal(size=(m, q))}
        self.pi, self.xi = ((rng.normal(size=(20, n)), rng.normal(size=(20, m))) for _ in range(2))

    def weight(self, x, y):
        return self.s1 * x["b"] @ x["a"] + self.s2 * y["d"] @ y["c"]

    def loss(self, batch):
        inputs, outputs = batch
        return lambda x, y: 0.5 * jnp.sum((inputs @ self.weight(x, y).T - outputs) ** 2) / len(inputs)

    def two_level(self, rate, **settings):
        return pf2lora.two_level(self.loss(self.pi), self.loss(self.xi), self.x, self.y, rate, **settings)

    def closed(self, rate, order):
        (s, z), (s_outer, z_outer) = (
            (inputs.T @ inputs / len(inputs), outputs.T @ inputs / len(inputs))
            for inputs, outputs in (self.pi, self.xi)
        )
        a, b, c, d = self.x["a"], self.x["b"], self.y["c"], self.y["d"]
        g = self.weight(self.x, self.y) @ s - z
        stepped = {"c": c - rate * self.s2 * d.T @ g, "d": d - rate * self.s2 * g @ c.T}
        e = self.weight(self.x, self.y if order == "joint" else stepped) @ s_outer - z_outer
        if order == "so":
            e = e - rate * self.s2**2 * (e @ stepped["c"].T @ c + d @ stepped["d"].T @ e) @ s
        return stepped, {"a": self.s1 * b.T @ e, "b": self.s1 * e @ a.T}


@ORDERS
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 0.5)])
def test_the_hypergradient_of_a_regression_has_its_closed_form(double, order, scales):
    problem = Regression(3, *scales)
    found = problem.two_level(0.07, hypergradient=order)
    stepped, gradient = problem.closed(0.07, order)
    for name in gradient:
        np.testing.assert_allclose(found.gradient[name], gradient[name], rtol=0, atol=1e-12)
    for name in stepped:
        np.testing.assert_allclose(found.personal[name], stepped[name], rtol=0, atol=1e-12)


def test_second_order_is_the_derivative_of_the_unrolled_step(double):
    problem, rate = Regression(1), 0.07
    inner, outer = problem.loss(problem.pi), problem.loss(problem.xi)
    flat, back = ravel_pytree(problem.x)

    def unrolled(flat):
        x = back(flat)
        return outer(x, trees.subtract(problem.y, trees.scale(jax.grad(inner, 1)(x, problem.y), rate)))

    eye, h = np.eye(len(flat)), 1e-5
    differences = np.array([(unrolled(flat + h * e) - unrolled(flat - h * e)) / (2 * h) for e in eye])
    exact = ravel_pytree(problem.two_level(rate).gradient)[0]
    assert np.linalg.norm(exact - differences) < 1e-8 * np.linalg.norm(exact)


def test_all_ways_to_the_mixed_product_agree(double):
    problem = Regression(2)
    exact = ravel_pytree(problem.two_level(0.07).gradient)[0]
    reverse = ravel_pytree(problem.two_level(0.07, hvp="revrev").gradient)[0]
    np.testing.assert_allclose(reverse, exact, rtol=0, atol=1e-12)
    for eps in (1e-2, 1e-3, 1e-4):
        differences = ravel_pytree(problem.two_level(0.07, hvp="fd", fd_eps=eps).gradient)[0]
        assert np.linalg.norm(differences - exact) < 1e-8 * np.linalg.norm(exact)


def test_central_differences_do_in_single_precision():
    problem = Regression(2)
    exact, differences = (ravel_pytree(problem.two_level(0.07, hvp=hvp).gradient)[0] for hvp in ("jvp", "fd"))
    assert np.linalg.norm(differences - exact) < 1e-3 * np.linalg.norm(exact)


def test_first_order_is_the_gradient_beside_the_stepped_adapter(double):
    problem = Regression(4)
    first = problem.two_level(0.07, hypergradient="fo")
    expected = jax.grad(problem.loss(problem.xi))(problem.x, first.personal)
    assert_same(jax.device_get(first.gradient), jax.device_get(expected))


def test_second_and_first_order_differ_by_the_rate(double):
    problem = Regression(5)

    def gap(rate):
        so, fo = (ravel_pytree(problem.two_level(rate, hypergradient=order).gradient)[0] for order in ("so", "fo"))
        return np.linalg.norm(so - fo) / np.linalg.norm(fo)

    assert gap(0.07) > 0.01
    np.testing.assert_allclose(gap(1e-4) / gap(5e-5), 2.0, rtol=1e-2)


def test_at_the_start_only_the_outputs_side_moves(double):
    problem = Regression(6)
    problem.x["b"], problem.y["d"] = np.zeros_like(problem.x["b"]), np.zeros_like(problem.y["d"])
    found = problem.two_level(0.07)
    assert not np.any(found.gradient["a"]) and np.any(found.gradient["b"])
    assert_same(np.asarray(found.personal["c"]), problem.y["c"])


GOLDEN = {  # local steps: losses of both clients, after averaging
    "so": {
        1: (9.4670219611e-01, 1.8716505259e00),
        2: (9.0286478328e-01, 1.7768572185e00),
        5: (8.1786875528e-01, 1.6718495805e00),
        10: (6.8468160068e-01, 1.5123843355e00),
        50: (8.5146321412e-02, 6.5342447960e-01),
        100: (3.7515514603e-02, 5.2454640634e-01),
        500: (2.190152e-04, 5.000654833e-01),
    },
    "fo": {
        1: (9.4629108102e-01, 1.8685784253e00),
        2: (9.0219857548e-01, 1.7724786635e00),
        5: (8.1707124265e-01, 1.6692101946e00),
        10: (6.8455066103e-01, 1.5115694391e00),
        50: (8.6418610806e-02, 6.4186106656e-01),
        100: (3.4734798008e-02, 5.2291737882e-01),
        500: (2.505665e-04, 5.000603373e-01),
    },
    "joint": {
        1: (9.4585901411e-01, 1.8653735777e00),
        2: (9.0150389620e-01, 1.7679823124e00),
        5: (8.1631902851e-01, 1.6665549620e00),
        10: (6.8449961692e-01, 1.5106982375e00),
        500: (2.785510e-04, 5.000581173e-01),
    },
}


@ORDERS
def test_golden_run(double, order):
    grid = np.add.outer(6 * np.arange(3), np.arange(6))
    x = {"a": jnp.asarray(np.cos(1 + grid) / 6**0.5), "b": jnp.zeros((6, 3))}
    c = np.sin(1 + np.add.outer(7 * np.arange(2), np.arange(6)))[:, None] / 6**0.5
    targets = jnp.stack([jnp.diag(jnp.arange(6) < rank).astype(float) for rank in (2, 4)])

    def loss(target):
        return lambda x, y: 0.5 * jnp.sum((x["b"] @ x["a"] + y["d"] @ y["c"] - target) ** 2)

    def step(x, y, target):
        f = loss(target)
        found = pf2lora.two_level(f, f, x, y, 0.1, hypergradient=order)
        return trees.subtract(x, trees.scale(found.gradient, 0.1)), found.personal

    def body(carry, index):
        x, y = jax.vmap(step)(*carry, targets)
        mean = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf.mean(0), leaf.shape), x)
        x = trees.where((index + 1) % 5 == 0, mean, x)
        return (x, y), jax.vmap(lambda x, y, target: loss(target)(x, y))(x, y, targets)

    start = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), x), {"c": jnp.asarray(c), "d": jnp.zeros((2, 6, 1))}
    (x, y), losses = jax.jit(lambda start: jax.lax.scan(body, start, jnp.arange(2000)))(start)
    for steps, expected in GOLDEN[order].items():
        tolerance = 1e-9 if steps <= 10 else 1e-6 if steps <= 100 else 1e-5
        np.testing.assert_allclose(losses[steps - 1], expected, rtol=tolerance, err_msg=f"after {steps} steps")
    assert np.all(losses[-1] < 1e-12)
    weights = x["b"] @ x["a"] + y["d"] @ y["c"]
    assert [int(np.linalg.matrix_rank(weight, tol=1e-2)) for weight in weights] == [2, 4]
    assert np.linalg.matrix_rank(x["b"][0] @ x["a"][0], tol=1e-2) == 3


def test_a_local_step_has_half_of_a_batch_for_each_level():
    method = make(schedule=lambda index: 0.25)
    noise = iter(jax.random.split(jax.random.key(2), 100))

    def generic(tree):
        trained, fixed = (
            trees.select(tree, lambda leaf, own=own: adapters.is_trained(leaf) == own) for own in (True, False)
        )
        return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(noise), leaf.shape), trained), fixed

    server = method.init(jax.random.key(0))
    client = method.init_client(server, 0, jax.random.key(1))
    (x, fixed), (y, own_fixed) = generic(server.common), generic(client.personal)
    server, client = server.replace(common=trees.join(x, fixed)), client.replace(personal=trees.join(y, own_fixed))
    one = jax.tree.map(lambda leaf: leaf[0], federation.data(0, [0]))
    one = one.replace(weights=one.weights * np.array([[1.0], [0.0], [0.0]], np.float32))

    def loss(x, y, rows):
        both = adapters.concat(trees.join(x, fixed), trees.join(y, own_fixed))
        inputs = jax.tree.map(lambda leaf: leaf[0, rows], one.inputs)
        return jnp.mean(TASK.loss(MODEL.apply(federation.base(), both, inputs), one.labels[0, rows]))

    def stepped(x):
        return trees.subtract(y, trees.scale(jax.grad(loss, 1)(x, y, np.array([0, 2])), 0.3))

    gradient = jax.grad(lambda x: loss(x, stepped(x), np.array([1, 3])))(x)
    client, upload, _ = method.client_update(federation.base(), server, client, one, jax.random.key(3))
    assert_close(upload, trees.scale(gradient, -0.5 * 0.25), 1e-6)
    assert_close(trees.select(client.personal, adapters.is_trained), stepped(x), 1e-6)


def test_counts_are_those_of_roberta():
    shapes = {}
    for name in ("query", "value"):
        shapes[name] = {"kernel": jax.ShapeDtypeStruct((12, 768, 768), jnp.float32)}
    tree = {"roberta": {"encoder": {"layer": shapes}}}
    made = [
        jax.eval_shape(functools.partial(adapters.init, shapes=tree, rank=rank), jax.random.key(0)) for rank in (8, 2)
    ]
    assert [adapters.count(one) for one in made] == [294_912, 73_728]


def test_rotating_ranks_changes_no_trajectory_of_sgd(double):
    problem, rng = Regression(7), np.random.default_rng(0)
    q, p = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (3, 2))
    x, y = problem.x, problem.y
    turned = {"a": q.T @ x["a"], "b": x["b"] @ q}, {"c": p.T @ y["c"], "d": y["d"] @ p}
    inner, outer = problem.loss(problem.pi), problem.loss(problem.xi)
    states = [(x, y), turned]
    for _ in range(20):
        for place, (x, y) in enumerate(states):
            found = pf2lora.two_level(inner, outer, x, y, 0.02)
            states[place] = trees.subtract(x, trees.scale(found.gradient, 0.02)), found.personal
    np.testing.assert_allclose(*(problem.weight(*state) for state in states), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [(None, 1), ({"hypergradient": "fo"}, 2), ({"hvp": "fd"}, 4), ({"hvp": "jvp"}, 3)],
    ids=["homlora", "fo", "so by differences", "so"],
)
def test_gradients_a_step_costs(settings, calls):
    # Three for the exact product, one of them with its derivative along a vector, which costs about another.
    seen = []

    def apply(*arguments):
        seen.append(arguments)
        return MODEL.apply(*arguments)

    parts = MODEL._replace(apply=apply), TASK, init_adapters(), SGD
    method = fedavg.fedit(*parts) if settings is None else pf2lora.pf2lora(*parts, **settings)
    server = method.init(jax.random.key(0))
    client = method.init_client(server, 0, jax.random.key(1))
    own = jax.tree.map(lambda leaf: leaf[0], federation.data(0, [0])).replace(widths=())
    jax.eval_shape(method.client_update, federation.base(), server, client, own, jax.random.key(0))
    assert len(seen) == calls


FIRST, SECOND, DIFFERENCES = {"hypergradient": "fo"}, {}, {"hvp": "fd"}


def programs(*ways, scan: bool):
    """Compiled steps of both levels on a small BERT, with these settings; None is HOMLoRA's plain gradient."""
    config = encoder.config() | {"hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 64}
    model = bert.bert(config, labels=2, scan=scan)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    common, personal = (init_adapters(model, rank=rank, head="frozen")(jax.random.key(rank)) for rank in (4, 2))
    texts = {"tokens": jnp.zeros((16, 64), jnp.int32), "mask": jnp.ones((16, 64), bool)}
    batch = Batches(texts, jnp.zeros(16, jnp.int32), jnp.ones(16), jnp.int32(0))

    def program(settings):
        def run(base, x, y, batch):
            loss = local.objective(model, TASK, base)
            inner, outer = (
                lambda x, y, part=part: loss(adapters.concat(x, y), part, jax.random.key(0))[0]
                for part in bilevel.parts(batch, 2)
            )
            return jax.grad(outer)(x, y) if settings is None else pf2lora.two_level(inner, outer, x, y, 0.1, **settings)

        return jax.jit(run).lower(shapes, common, personal, batch).compile()

    return map(program, ways)


def test_a_step_costs_as_many_gradients_as_its_order_says():
    compiled = programs(None, FIRST, SECOND, DIFFERENCES, scan=False)
    plain, *others = (one.cost_analysis()["flops"] for one in compiled)
    fo, so, differences = (flops / plain for flops in others)
    # The forward pass of the exact product is that of the personal step, so the compiler does it once.
    assert 1.9 < fo <= 2.2 and 3.2 < so <= 4.5 and 3.8 < differences <= 4.5


def test_second_order_needs_twice_the_memory_of_first_order():
    # As a loop over layers, as accelerators run them; unrolled on a CPU the compiler reuses less (2.7).
    compiled = programs(FIRST, SECOND, DIFFERENCES, scan=True)
    fo, so, differences = (one.memory_analysis().temp_size_in_bytes for one in compiled)
    assert so <= 2 * fo and differences <= 2 * fo

"""FDLoRA: its clock and outer steps against plain loops, its snapshots, its search and fusion by brute force."""

import functools

import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import CLIENTS, assert_close, assert_same, snapshot

from fedjax_peft import adapters, local, tasks, trees
from fedjax_peft.algorithms import fdlora, fedavg

MODEL, TASK, SGD, KEY = toy.model(), tasks.classification(), optax.sgd(0.5), jax.random.key(5)
EVERYBODY, SOME = list(range(CLIENTS)), [4, 0, 3, 2]
SITE = ("encoder", "layer", "query")


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"rank": 2, "alpha": 4.0, "targets": "query"} | settings)


@functools.cache
def make(**settings):
    return fdlora.fdlora(MODEL, TASK, init_adapters(), SGD, **{"sync_every": 2} | settings)


def trained(tree):
    return trees.select(tree, lambda leaf: leaf != "scale")


@functools.cache
def played(method, rounds=4):
    """The states before and after each round; clients 1 and 5 stay out."""
    state, states = federation.begin(method), []
    for index in range(rounds):
        states.append(snapshot(state))
        state, _ = federation.play(method, state, index, SOME)
    return [*states, snapshot(state)]


def client_of(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state.population.states)


def data(client, index=0):
    return jax.tree.map(lambda leaf: leaf[0], federation.data(index, [client]))


def after_inner_steps(server, client, index):
    """What a client trains in a round, by a loop over its batches."""
    base, batches, theta = federation.base(), data(client, index).replace(constants={}), server.adapters
    fixed = trees.select(theta, lambda leaf: leaf == "scale")
    gradient = jax.jit(
        jax.grad(
            lambda theta, batch: local.objective(MODEL, TASK, base)(trees.join(theta, fixed), batch, KEY)[1]["loss"]
        )
    )
    theta = trained(theta)
    for step in range(len(batches.weights)):
        batch = jax.tree.map(lambda leaf: leaf[step], batches)  # noqa: B023
        if batch.weights.any():
            theta = trees.subtract(theta, trees.scale(gradient(theta, batch), 0.5))
    return theta


def test_a_constant_gradient_has_the_published_steps():
    optimizer = fdlora.outer(1.0, 0.5)
    theta, g = jnp.float32(10.0), jnp.float32(1.0)
    state, moved = optimizer.init(theta), []
    for _ in range(4):
        updates, state = optimizer.update(g, state, theta)
        moved.append(float(updates))
    assert moved == [-1.0, -1.5, -1.75, -1.875]  # the warm-up takes the mean and leaves the momentum alone


def test_outer_steps_are_those_of_a_plain_loop():
    states = played(make())
    momentum = trees.zeros_like(trained(states[0].server.adapters))
    for index, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        theta = trained(before.server.adapters)
        changes = [trees.subtract(theta, after_inner_steps(before.server, client, index)) for client in SOME]
        g = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *changes)
        if index == 0:
            step = g
        else:
            momentum = trees.add(trees.scale(momentum, 0.5), g)
            step = trees.add(g, trees.scale(momentum, 0.5))
        assert_close(trained(after.server.adapters), trees.subtract(theta, step), 1e-5)


def test_snapshots_are_of_every_other_round_after_the_warm_up():
    states = played(make())
    for client in SOME:
        # Round 1 is t = 0, round 3 is t = 2.
        taken = [after_inner_steps(states[index].server, client, index) for index in (1, 3)]
        for index, expected in ((2, taken[0]), (3, taken[0]), (4, taken[1])):
            assert_close(client_of(states[index], client).private, expected, 1e-5)
        # The warm-up stores none: the client has what it received.
        assert_same(client_of(states[1], client).private, trained(states[0].server.adapters))
    assert not states[4].population.known[[1, 5]].any()


def test_a_clients_snapshot_is_its_own():
    method, other = make(), federation.data(1, SOME)
    state = federation.play(method, federation.begin(method), 0, SOME)[0]
    other.inputs["tokens"][1] = (other.inputs["tokens"][1] + 5) % toy.VOCABULARY
    one, two = (
        federation.play(method, snapshot(state), 1, SOME, batches=batches)[0]
        for batches in (federation.data(1, SOME), other)
    )
    changed = jax.tree.map(lambda a, b: (a != b).reshape(CLIENTS, -1).any(1), one.population, two.population)
    for leaf in jax.tree.leaves(changed.states.private):
        np.testing.assert_array_equal(leaf, np.arange(CLIENTS) == SOME[1])


def test_without_momentum_it_is_uniform_fedit():
    ours = federation.run(make(outer_momentum=0.0), EVERYBODY)[0].server
    fedit = fedavg.fedit(MODEL, TASK, init_adapters(), SGD, weighting="uniform")
    theirs = federation.run(fedit, EVERYBODY)[0].server
    assert_same(ours.adapters, theirs.adapters)


def test_the_warm_up_may_count_for_the_schedule():
    def factors(warmup_ticks):
        """The rate of each round, relative to the first, by the length of a client's step."""
        method = make(schedule=lambda index: 0.5**index, warmup_ticks=warmup_ticks)
        server = played(make())[0].server
        batches = jax.tree.map(lambda leaf: leaf[:1], data(4).replace(constants={})).replace(width=np.zeros(1, int))
        client = method.init_client(server, 4, KEY)
        update = jax.jit(method.client_update)
        norms = [
            update(federation.base(), server.replace(round=np.int32(index)), client, batches, KEY)[2]["update_norm"]
            for index in range(4)
        ]
        return np.array(norms) / norms[0]

    np.testing.assert_allclose(factors(False), [1, 1, 0.5, 0.25], rtol=1e-5)
    np.testing.assert_allclose(factors(True), [1, 0.5, 0.25, 0.125], rtol=1e-5)


def by_hand(value):
    """The rule of the search, in numpy: (probes, the best)."""

    def slope(points, values, before):
        matrix = np.c_[points, np.ones(3)]
        return before if abs(np.linalg.det(matrix)) < 1e-6 else np.linalg.solve(matrix, values)[:2]

    def down(g):
        return -g / np.linalg.norm(g) if g.any() else 0 * g

    points = [np.zeros(2), np.array([0.5, 0.0])]
    values = [value(point) for point in points]
    for _ in range(3):
        best = points[int(np.argmin(values))]
        if len(points) == 2:
            move = np.array([0.0, 0.5])
        elif len(points) == 3:
            g = slope(points, values, np.zeros(2))
            move = 0.5 * down(g)
        else:
            kept = [index for index in range(3) if index != int(np.argmax(values[:3]))] + [3]
            g = slope([points[index] for index in kept], [values[index] for index in kept], g)
            move = (0.5 if values[3] < min(values[:3]) else 0.25) * down(g)
        points.append(np.clip(best + move, -1.5, 1.5))
        values.append(value(points[-1]))
    return np.array(points), points[int(np.argmin(values))]


def searched(value):
    """(probes, the best) of the search."""
    probes = []

    def recorded(weights, probe):
        jax.debug.callback(lambda weights, probe: probes.append((int(probe), np.array(weights))), weights, probe)
        return value(weights)

    best = jax.jit(lambda: fdlora.search(recorded))()
    jax.effects_barrier()
    return np.array([weights for _, weights in sorted(probes, key=lambda one: one[0])]), best


def test_the_search_goes_down_a_plane():
    probes, best = searched(lambda w: -jnp.sum(w))
    np.testing.assert_allclose(probes, [[0, 0], [0.5, 0], [0.5, 0.5], [0.853553] * 2, [1.207107] * 2], atol=1e-5)
    np.testing.assert_allclose(best, [1.207107] * 2, atol=1e-5)


VALUES = {
    "bowl": lambda w: (w[0] - 0.3) ** 2 + 2 * (w[1] + 0.4) ** 2,
    "away": lambda w: w[0] + 2 * w[1] ** 2,
    "steep": lambda w: -3 * w[0] + abs(w[1] - 0.2),
    "corner": lambda w: -w[0] + 0.01 * w[1],
    "hill": lambda w: -((w[0] - 0.4) ** 2) - (w[1] - 0.6) ** 2,
    "valley": lambda w: 3 * abs(w[0] - 0.5) + 3 * abs(w[1] - 0.1),  # the fourth probe is worse
    "flat": lambda w: 0 * w[0],
}


@pytest.mark.parametrize("name", VALUES)
def test_the_search_follows_its_rule(name):
    expected, best = by_hand(VALUES[name])
    probes, found = searched(VALUES[name])
    np.testing.assert_allclose(probes, expected, atol=1e-5)
    np.testing.assert_allclose(found, best, atol=1e-5)
    assert np.abs(probes).max() <= 1.5


def test_a_probe_that_is_no_number_is_never_the_best():
    bowl = VALUES["bowl"]
    found = fdlora.search(lambda w, index: jnp.where(index >= 3, jnp.nan, bowl(w)))
    assert_close(found, by_hand(bowl)[0][np.argmin([bowl(w) for w in by_hand(bowl)[0][:3]])], 1e-6)


def test_a_plane_through_a_line_is_the_one_before():
    values, before = jnp.array([1.0, 2.0, 4.0]), jnp.array([3.0, -1.0])
    assert_same(fdlora._slope(jnp.array([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]), values, before), before)
    assert_close(fdlora._slope(jnp.array([[0.0, 0.0], [0.5, 0.0], [0.5, 0.5]]), values, before), [2.0, 4.0], 1e-6)


@functools.cache
def pair():
    """Two adapters at generic points."""
    start, noise = init_adapters()(jax.random.key(1)), iter(jax.random.split(jax.random.key(2), 100))

    def moved():
        trained_part = jax.tree.map(lambda leaf: leaf + jax.random.normal(next(noise), leaf.shape), trained(start))
        return trees.join(trained_part, trees.select(start, lambda leaf: leaf == "scale"))

    return moved(), moved()


def test_fusion_weighs_factors_or_what_they_add():
    w, (common, private) = jnp.array([0.7, -0.4]), pair()
    x = jax.random.normal(KEY, (5, toy.WIDTH))

    def layer(tree, at=1):
        return jax.tree.map(lambda leaf: leaf[at], adapters.nodes(tree)[SITE])

    one, two = layer(common), layer(private)
    factors = layer(fdlora.fusion(common, private, w, "factors"))
    expected = (x @ (0.7 * one.a - 0.4 * two.a)) @ (0.7 * one.b - 0.4 * two.b) * 2.0
    np.testing.assert_allclose(factors(x), expected, rtol=1e-4, atol=1e-4)
    updates = layer(fdlora.fusion(common, private, w, "updates"))
    np.testing.assert_allclose(updates(x), 0.7 * one(x) - 0.4 * two(x), rtol=1e-4, atol=1e-4)
    for fuse in fdlora.FUSIONS:
        head = adapters.nodes(fdlora.fusion(common, private, w, fuse))[("classifier",)]
        heads = [adapters.nodes(tree)[("classifier",)].kernel for tree in (common, private)]
        np.testing.assert_allclose(head.kernel, 0.7 * heads[0] - 0.4 * heads[1], rtol=1e-5, atol=1e-5)


def aux(client, empty=0):
    """Seven held-out batches, of which the last are empty."""
    texts = jax.tree.map(lambda leaf: leaf[client], toy.batches(9, CLIENTS, steps=7))
    weights = np.where(np.arange(7)[:, None] < 7 - empty, texts.weights, 0)
    return {"inputs": texts.inputs, "labels": texts.labels, "weights": weights.astype(np.float32)}


def with_aux(client, held):
    batches = data(client)
    return batches.replace(constants=batches.constants | {"aux": held})


@pytest.mark.parametrize(("fuse", "empty"), [("factors", 0), ("updates", 2)])
def test_clients_have_the_best_of_five_probes_of_the_next_batches(fuse, empty):
    method, state = make(fuse=fuse, fuse_batches=2), played(make())[-1]
    server, client, held = state.server, client_of(state, 4), aux(4, empty)
    found = jax.jit(method.personalize)(federation.base(), server, client, with_aux(4, held), KEY)
    theta = server.adapters
    private = trees.join(client.private, trees.select(theta, lambda leaf: leaf == "scale"))

    @jax.jit
    def mean_loss(weights, inputs, labels):
        return jnp.mean(TASK.loss(MODEL.apply(federation.base(), fuse_both(weights), inputs), labels))

    def fuse_both(weights):
        return fdlora.fusion(theta, private, weights, fuse)

    calls = []

    def value(weights):
        # Probe i takes the batches 2 i and 2 i + 1 of those that have examples, around and around.
        batches = [(2 * len(calls) + extra) % (7 - empty) for extra in range(2)]
        calls.append(weights)
        losses = [
            mean_loss(
                jnp.asarray(weights, jnp.float32),
                jax.tree.map(lambda leaf: leaf[index], held["inputs"]),  # noqa: B023
                held["labels"][index],
            )
            for index in batches
        ]
        return float(np.mean(losses)) + 0.05 * np.abs(weights).mean()

    _, best = by_hand(value)
    assert_close(found, fuse_both(jnp.asarray(best, jnp.float32)), 1e-4)


def test_a_client_without_examples_has_the_servers_adapters():
    method, state = make(), played(make())[-1]
    server, client = state.server, client_of(state, 4)
    found = jax.jit(method.personalize)(federation.base(), server, client, with_aux(4, aux(4, empty=7)), KEY)
    assert_same(found, server.adapters)
    none = jax.tree.map(lambda leaf: leaf[:0], data(4).replace(constants={}))
    assert_same(make(fuse_on="train").personalize(federation.base(), server, client, none, KEY), server.adapters)


def test_probes_take_the_batches_that_have_examples_wherever_they_are():
    """A small client's only full step may be any of a chunk's: steps are permuted alike for all clients."""
    state = played(make())[-1]
    server, client = state.server, client_of(state, 4)
    whole = data(4).replace(constants={})
    weights = jnp.zeros_like(whole.weights).at[0].set(whole.weights[0])
    first = whole.replace(weights=weights)
    last = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), first)
    assert len(whole.weights) > 1 and not last.weights[0].any()
    found = [
        jax.jit(make(fuse_on="train").personalize)(federation.base(), server, client, own, KEY) for own in (first, last)
    ]
    assert_same(*found)
    # Where nothing is scored, no adapters at all are best.
    assert all(
        np.asarray(node.a).any() for node in adapters.nodes(found[0]).values() if isinstance(node, adapters.LoRA)
    )


def test_nothing_is_dropped_while_probes_are_scored():
    state, some = played(make())[-1], with_aux(4, aux(4))
    methods = [fdlora.fdlora(MODEL, TASK, init_adapters(dropout=rate), SGD) for rate in (0.0, 0.5)]
    kept = []
    for method, rate in zip(methods, (0.0, 0.5), strict=True):
        nodes = {
            path: node.replace(dropout=rate) if isinstance(node, adapters.LoRA) else node
            for path, node in adapters.nodes(state.server.adapters).items()
        }
        server = state.server.replace(adapters=adapters.nest(nodes))
        client = jax.tree.unflatten(
            jax.tree.structure(method.init_client(server, 4, KEY)), jax.tree.leaves(client_of(state, 4))
        )
        kept.append(jax.tree.leaves(jax.jit(method.personalize)(federation.base(), server, client, some, KEY)))
    assert_same(*kept)


def test_what_is_sent_is_one_adapter_each_way():
    method = make()
    server = jax.eval_shape(method.init, jax.random.key(0))
    assert method.traffic(server) == (adapters.count(init_adapters()(KEY)),) * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sync_every": 0}, "algorithm.sync_every is 0, expected 1 or more"),
        ({"fuse_batches": 0}, "algorithm.fuse_batches is 0"),
        ({"outer_rate": 0.0}, "algorithm.outer_rate is 0.0, expected a positive number"),
        ({"outer_momentum": 1.0}, "algorithm.outer_momentum is 1.0"),
        ({"penalty": -1.0}, "algorithm.penalty is -1.0, expected 0 or more"),
        ({"fuse": "both"}, "algorithm.fuse is 'both', expected one of factors, updates"),
        ({"fuse_on": "test"}, "algorithm.fuse_on is 'test', expected one of aux, train"),
        ({"weighting": "size"}, "algorithm.weighting is 'size'"),
    ],
)
def test_mistakes(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**changes)


def test_held_out_examples_are_asked_for():
    method, state = make(), played(make())[0]
    client = method.init_client(state.server, 4, KEY)
    with pytest.raises(ValueError, match="fuse_on is 'aux', but clients have no constant 'aux'"):
        method.personalize(federation.base(), state.server, client, data(4), KEY)
    unlabelled = {name: value for name, value in aux(4).items() if name != "labels"}
    with pytest.raises(ValueError, match="the clients' constant 'aux' has no labels"):
        method.personalize(federation.base(), state.server, client, with_aux(4, unlabelled), KEY)

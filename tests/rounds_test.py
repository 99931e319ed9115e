"""The round against a plain reference, and the identities that tie the methods of the FedAvg family together."""

import functools
import re

import algorithms_test as contract
import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from algorithms_test import COHORT, LORA, MODEL, SGD, TASK, algorithm
from federation import EXAMPLES, PADDING, assert_close, assert_same, begin, play, snapshot

from fedjax_peft import adapters, local, rounds, trees
from fedjax_peft.algorithms import fedavg
from fedjax_peft.types import Batches, Model, Task

RATE, SCALE = 0.5, 2.0  # of SGD; alpha / rank of LORA


def lora(tree):
    """(A, B) of the one LoRA site of the toy."""
    delta = tree["encoder"]["layer"]["query"]["delta"]
    return delta.a, delta.b


def alone(method, state, client):
    """The adapters of one client after a round from `state`, as the mean over nobody else."""
    others = tuple(id_ for id_ in COHORT if id_ != client)
    return snapshot(play(method, snapshot(state), 2, COHORT, absent=others)[0].server.adapters)


@functools.cache
def shares():
    return {client: EXAMPLES[client] / EXAMPLES[COHORT].sum() for client in COHORT}


# The reference


def test_round_equals_a_plain_loop_over_ragged_clients():
    gradient = reference.make_gradient(MODEL, TASK)
    state = begin(algorithm("fedit"))
    expected = state.server.adapters
    for index, absent in enumerate([(), (3,), (0, 2)]):
        batches = federation.data(index, COHORT)
        state, played = play(algorithm("fedit"), state, index, COHORT, absent=absent)
        here = [slot for slot, client in enumerate(COHORT) if client not in absent]
        clients = [reference.examples_of(batches, slot) for slot in here]
        examples = [EXAMPLES[COHORT[slot]] for slot in here]
        expected, losses = reference.fedavg_round(gradient, federation.base(), expected, clients, examples, RATE)
        assert_close(state.server.adapters, expected, 1e-5)
        np.testing.assert_allclose(played.metrics["clients"]["loss"][here], losses, rtol=1e-5)
        assert not played.metrics["clients"]["loss"][[slot for slot in range(4) if slot not in here]].any()


def test_uniform_weighting_is_the_plain_mean():
    method = fedavg.fedit(MODEL, TASK, LORA, SGD, weighting="uniform")
    before = begin(method)
    after, _ = play(method, snapshot(before), 2, COHORT)
    singles = [alone(method, before, client) for client in COHORT]
    assert_close(after.server.adapters, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *singles), 1e-6)


# Identities of the methods


@pytest.mark.parametrize("name", ["fedprox", "momentum"])
def test_limits_are_fedit(name):
    limit = {
        "fedprox": lambda: fedavg.fedprox(MODEL, TASK, LORA, SGD, proximal=0.0),
        "momentum": lambda: contract.fedopt("momentum", momentum=0.0),
    }[name]()
    state, _ = federation.run(limit, COHORT)
    assert_close(state.server.adapters, contract.two_rounds("fedit")[0].server.adapters, 1e-6)


def test_first_step_of_fedprox_is_that_of_fedit():
    # Client 3 has one example, so one step: at the server's adapters the proximal gradient is zero.
    state, _ = contract.two_rounds("fedit")
    assert_same(alone(algorithm("fedprox"), state, 3), alone(algorithm("fedit"), state, 3))
    changed = [alone(algorithm(name), state, 0) for name in ("fedprox", "fedit")]
    assert not np.array_equal(*(lora(tree)[1] for tree in changed))


def test_fedprox_settles_at_the_closed_form_of_a_quadratic():
    rng = np.random.default_rng(0)
    square = rng.normal(size=(3, 3))
    q, goal, start, mu = square @ square.T + np.eye(3), rng.normal(size=3), rng.normal(size=3), 0.7
    q, goal = np.asarray(q, np.float32), np.asarray(goal, np.float32)

    def loss(outputs, labels):
        del labels
        gap = outputs - goal
        return 0.5 * jnp.sum((gap @ q) * gap)[None]

    def adapters_at_start(key):
        del key
        return {"site": {"delta": adapters.Full(kernel=jnp.asarray(start, jnp.float32), bias=None)}}

    model = Model(init=None, apply=lambda base, tree, inputs, key=None: tree["site"]["delta"].kernel, taps=None)
    task = Task(loss, lambda outputs, labels: {})
    method = fedavg.fedprox(model, task, adapters_at_start, optax.sgd(0.1), proximal=mu)
    server = method.init(jax.random.key(0))
    steps = 300
    batches = Batches({}, np.zeros((steps, 1)), np.ones((steps, 1), np.float32), np.zeros(steps, np.int32), widths=())
    client = method.init_client(server, 0, jax.random.key(0))
    _, upload, _ = jax.jit(method.client_update)({}, server, client, batches, jax.random.key(0))
    fixed_point = np.linalg.solve(q + mu * np.eye(3), q @ goal + mu * start)
    np.testing.assert_allclose(start + upload["site"]["delta"].kernel, fixed_point, rtol=1e-5, atol=1e-5)


def test_averaging_factors_errs_by_a_covariance():
    # D - s Bm Am = s sum p (B - Bm)(A - Am), and the left side is what the round made of the clients' factors.
    before, _ = contract.two_rounds("fedit")
    after, _ = play(algorithm("fedit"), snapshot(before), 2, COHORT)
    a_mean, b_mean = lora(after.server.adapters)
    exact, covariance = 0.0, 0.0
    for client, share in shares().items():
        a, b = lora(alone(algorithm("fedit"), before, client))
        exact += share * SCALE * a @ b
        covariance += share * SCALE * (a - a_mean) @ (b - b_mean)
    error = exact - SCALE * np.asarray(a_mean) @ np.asarray(b_mean)
    np.testing.assert_allclose(error, covariance, atol=1e-5)
    assert np.abs(covariance).max() > 1e-3


def test_ffa_lora_averages_exactly_and_never_moves_a():
    method = algorithm("ffa_lora")
    initial = lora(begin(method).server.adapters)[0]
    before, _ = contract.two_rounds("ffa_lora")
    after, _ = play(method, snapshot(before), 2, COHORT)
    a, b_mean = snapshot(lora(after.server.adapters))
    np.testing.assert_array_equal(a, initial)
    exact = sum(share * SCALE * np.matmul(*lora(alone(method, before, client))) for client, share in shares().items())
    np.testing.assert_allclose(SCALE * a @ b_mean, exact, atol=1e-5)


def test_fedsa_lora_moves_b_only_where_a_client_trains():
    method = algorithm("fedsa_lora")
    state, _ = contract.two_rounds("fedsa_lora")
    after, _ = play(method, snapshot(state), 2, [1, 0, PADDING, PADDING])
    old, new = (lora(tree.population.states.private)[1] for tree in (state, after))
    moved = [bool(np.any(x != y)) for x, y in zip(old, new, strict=True)]
    assert moved == [True, True, False, False, False, False]
    assert not lora(after.server.adapters)[1].any()


def test_fedsa_lora_can_share_the_head():
    method = fedavg.fedsa_lora(MODEL, TASK, LORA, SGD, private_head=False)
    server = begin(method).server
    client = method.init_client(server, 0, jax.random.key(0))
    assert client.private["classifier"]["delta"].kernel is None
    assert method.traffic(server) == (2 * 12 * 2 + 12 * 3 + 3,) * 2


def test_local_training_does_not_depend_on_others():
    method = algorithm("local_only")
    together, _ = contract.two_rounds("local_only")
    lonely, _ = federation.run(method, [COHORT[0], PADDING, PADDING, PADDING])
    own = [jax.tree.map(lambda leaf: leaf[COHORT[0]], s.population.states) for s in (lonely, together)]
    assert_same(*own)


def test_local_training_is_a_federation_of_one():
    one = [COHORT[0], PADDING, PADDING, PADDING]
    federated, _ = federation.run(algorithm("centralized"), one)
    lonely, _ = federation.run(algorithm("local_only"), one)
    private = jax.tree.map(lambda leaf: leaf[COHORT[0]], lonely.population.states.private)
    shared = trees.select(federated.server.adapters, lambda leaf: leaf != "scale")
    assert_close(private, shared, 1e-4)


def test_no_steps_of_personalization_evaluate_what_the_server_has():
    state, _ = contract.two_rounds("fedit")
    batches = jax.tree.map(lambda leaf: leaf[0, :0], federation.data(0, [0]).replace(constants={}))
    method, key = algorithm("fedit"), jax.random.key(0)
    own = method.personalize(federation.base(), state.server, method.init_client(state.server, 0, key), batches, key)
    assert_same(own, state.server.adapters)


def test_a_schedule_that_has_ended_does_not_end_personalization():
    method = fedavg.fedit(MODEL, TASK, LORA, SGD, schedule=local.make_schedule("linear", rounds=2))
    plain, _ = contract.two_rounds("fedit")
    state = plain._replace(server=plain.server.replace(round=np.int32(2)))  # the rate is 0 from here on
    stopped, _ = play(method, snapshot(state), 2, COHORT)
    assert_same(stopped.server.adapters, state.server.adapters)
    key, client = jax.random.key(0), method.init_client(state.server, 0, jax.random.key(0))
    batches = jax.tree.map(lambda leaf: leaf[0], federation.data(0, [0]))
    personal = [
        other.personalize(federation.base(), state.server, client, batches, key)
        for other in (method, algorithm("fedit"))
    ]
    assert_same(*personal)
    assert np.any(lora(personal[0])[1] != lora(state.server.adapters)[1])


# What a round is made of


@pytest.mark.parametrize("mesh, chunk", [((4, 1), 1), ((1, 4), 4), ((1, 1), 1)])
def test_other_meshes_and_chunks_do_not_matter(mesh, chunk):
    state, _ = contract.two_rounds("fedsa_lora")
    other, _ = federation.run(algorithm("fedsa_lora"), COHORT, mesh=mesh, chunk=chunk)
    assert_close(other, state, 1e-6)


def test_sums_over_chunks_and_devices_are_sums():
    plain = algorithm("fedit")
    method = plain._replace(server_update=lambda server, sums: (server, {"examples": sums.weight}))
    for mesh in ((1, 1), (2, 2)):
        _, played = play(method, begin(method), 0, COHORT, mesh=mesh, chunk=1)
        assert played.metrics["server"]["examples"] == EXAMPLES[COHORT].sum()


@pytest.mark.parametrize("name", ["fedit", "fedsa_lora"])
def test_more_slots_of_padding_change_no_bit(name):
    state, _ = contract.two_rounds(name)
    other, _ = federation.run(algorithm(name), [*COHORT, PADDING, PADDING])
    assert_same(other, state)


def test_clients_of_different_widths_may_share_a_chunk():
    # The widest of a chunk decides how far its batches are cut; dropout has to drop the same in any company.
    method, outcomes = contract.TABLE["fedit_dropout"].build(), []
    for chunk, ids in ((1, COHORT), (4, COHORT[::-1])):
        batches = federation.data(0, ids)
        narrow = np.isin(ids, COHORT[1:3])
        batches.inputs["mask"][narrow, ..., 3:] = False
        width = np.where(narrow, 0, 1)[:, None] * np.ones_like(batches.width)
        batches = batches.replace(width=width, widths=(3, 6))
        outcomes.append(play(method, begin(method), 0, ids, batches=batches, chunk=chunk)[0])
    assert_close(*outcomes, 1e-6)


def test_randomness_follows_the_client_and_the_round():
    method, state = algorithm("fedit_dropout"), contract.two_rounds("fedit_dropout")[0]
    batches = federation.data(2, [0, 0, PADDING, PADDING])

    def update_norms(index, ids):
        _, played = play(method, snapshot(state), index, ids, batches=batches)
        return played.metrics["clients"]["update_norm"]

    same = update_norms(2, [0, 0, PADDING, PADDING])
    assert same[0] == same[1]  # the slot does not matter
    other_client = update_norms(2, [0, 4, PADDING, PADDING])
    assert other_client[0] == same[0] != other_client[1]
    assert update_norms(3, [0, 0, PADDING, PADDING])[0] != same[0]


@pytest.mark.parametrize("of_host", [np.array, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)])
def test_a_server_from_the_host_or_only_its_shapes_will_do(of_host):
    method = algorithm("fedit")
    devices, step = federation.compiled(method, (2, 2), 1, len(COHORT))
    arguments = list(federation.arguments_of(begin(method), 0, COHORT, devices))
    arguments[1:4] = jax.tree.map(of_host, arguments[1:4])
    shardings = step.lower(*arguments).compile().input_shardings[0]
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings[1]))


def test_leaves_that_alias_one_buffer_can_be_donated():
    plain = algorithm("fedit")

    def init(key):
        server = plain.init(key)
        same = server.adapters["classifier"]["delta"]
        return server.replace(optimizer=(same.kernel, same.kernel))

    def server_update(server, sums):
        new, metrics = plain.server_update(server.replace(optimizer=plain.init(jax.random.key(0)).optimizer), sums)
        return new.replace(optimizer=server.optimizer), metrics

    method = plain._replace(init=init, server_update=server_update)
    devices, step = federation.compiled(method, (1, 1), 2, 4)
    server = rounds.make_init(method, devices)(jax.random.key(0))
    for index in range(2):
        state = federation.State(server, begin(plain).population)
        server = step(*federation.arguments_of(state, index, COHORT, devices))[0]
    assert np.isfinite(lora(server.adapters)[0]).all()


def _lowered(method, mesh):
    devices, step = federation.compiled(method, mesh, 1, 4)
    return step.lower(*federation.arguments_of(begin(method), 0, COHORT, devices))


def _largest_constant(text):
    """Elements of the largest constant that is not one repeated number."""
    shapes = re.findall(r"constant dense<(?:\"|\[).*?> : tensor<([\dx]+)x\w+>", text)
    return max((int(np.prod([int(n) for n in shape.split("x")])) for shape in shapes), default=0)


def test_the_base_is_an_argument_and_not_a_constant():
    method, base = algorithm("fedit"), federation.base()
    closed = method._replace(client_update=lambda _, *rest: method.client_update(base, *rest))
    smallest = min(leaf.size for leaf in jax.tree.leaves(base) if leaf.ndim > 1)
    assert _largest_constant(_lowered(closed, (1, 1)).as_text()) >= smallest
    assert _largest_constant(_lowered(method, (1, 1)).as_text()) < smallest


def test_clients_meet_in_one_reduction_of_adapter_size():
    method = algorithm("fedit")
    text = _lowered(method, (4, 1)).compile().as_text()
    operations = re.findall(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    sizes = [
        (kind, sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shape)))
        for shape, kind in operations
    ]
    large = [(kind, size) for kind, size in sizes if size > len(COHORT)]
    sent = method.traffic(begin(method).server)[1]
    assert large == [("all-reduce", sent + 1)]  # and the sum of weights


# Mistakes


@pytest.mark.parametrize(
    "mesh, message",
    [
        ((0, 1), "run.mesh is clients=0, model=1, expected positive numbers"),
        ((None, 3), "run.mesh.model is 3, which does not divide the 4 devices"),
        ((4, 2), "run.mesh asks for 4 x 2 devices, but there are 4"),
    ],
)
def test_impossible_meshes_are_refused(mesh, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rounds.make_mesh(*mesh)


def test_slots_fill_whole_chunks_on_every_device():
    mesh = rounds.make_mesh(2, 2)
    assert [rounds.slots_for(clients, mesh, 3) for clients in (1, 6, 7)] == [6, 6, 12]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weighting": "size"}, "algorithm.weighting is 'size', expected one of examples, uniform"),
        ({"proximal": -1.0}, "algorithm.proximal is -1.0, expected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fedavg.fedit(MODEL, TASK, LORA, SGD, **settings)

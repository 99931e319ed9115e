"""The contract that every algorithm passes. A new method is one line in the table."""

import functools
import json
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import NamedTuple

import federation
import jax
import numpy as np
import optax
import processes_job
import pytest
import started
import toy
from federation import PADDING, assert_close, assert_same, begin, play, snapshot

from fedjax_peft import adapters, aggregate, algorithms, checkpoint, loop, rounds, tasks, trees
from fedjax_peft.algorithms import (
    adalora,
    bayestune,
    fdlora,
    fedamole,
    fedavg,
    feddpa,
    fedl2p,
    fedp2eft,
    fedprompt,
    hetlora,
    lora,
    mutual,
    perfedavg,
    pf2lora,
)
from fedjax_peft.types import Algorithm, Model

MODEL, MERGED = toy.model(), adapters.merged(toy.model())
PROMPTED, ENSEMBLED = fedprompt.prompted(MODEL, 3), mutual.ensembled(MODEL)
TASK = tasks.classification()
SGD, ADAM = optax.sgd(0.5), optax.adam(0.02)


def _adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"rank": 2, "alpha": 4.0, "targets": "query"} | settings)


LORA = _adapters()
DROPOUT, FULL, LAYER, ALL = (
    _adapters(dropout=0.3),
    _adapters(kind="full"),
    _adapters(targets=r".*layer\.1\.query"),
    _adapters(targets="all-linear", head="lora"),
)


class Row(NamedTuple):
    """A method on the toy."""

    build: Callable[[], Algorithm]
    tolerance: float = 1e-6  # of another order of summation; adaptive client optimizers amplify rounding
    private: frozenset[str] = frozenset()  # names of leaves that never leave a client
    model: Model = MODEL
    random: bool = True  # whether the method draws anything itself
    falls: bool = True  # whether clients go on from where the last round ended
    neutral: bool = True  # whether it starts as the base; words in front of a text change it


def fedopt(name, **settings):
    return fedavg.fedit(MODEL, TASK, LORA, SGD, server_optimizer=aggregate.server_optimizer(name, **settings))


HEAD, AB = frozenset({"kernel", "bias"}), frozenset({"a", "b"})
TABLE = {
    "fedit": Row(lambda: fedavg.fedit(MODEL, TASK, LORA, SGD)),
    "fedit_adam": Row(lambda: fedavg.fedit(MODEL, TASK, LORA, ADAM), 1e-4),
    "fedit_dropout": Row(lambda: fedavg.fedit(MODEL, TASK, DROPOUT, SGD)),
    "fedit_one_layer": Row(lambda: fedavg.fedit(MODEL, TASK, LAYER, SGD)),
    "fedit_all_linear": Row(lambda: fedavg.fedit(MODEL, TASK, ALL, SGD)),
    "fedavg_momentum": Row(lambda: fedopt("momentum", momentum=0.5)),
    "fedadagrad": Row(lambda: fedopt("adagrad", learning_rate=0.03)),
    "fedadam": Row(lambda: fedopt("adam", learning_rate=0.03)),
    "fedyogi": Row(lambda: fedopt("yogi", learning_rate=0.03)),
    "fedprox": Row(lambda: fedavg.fedprox(MODEL, TASK, LORA, SGD, proximal=0.1)),
    "ffa_lora": Row(lambda: fedavg.ffa_lora(MODEL, TASK, LORA, SGD), private=frozenset("a")),
    "fedsa_lora": Row(lambda: fedavg.fedsa_lora(MODEL, TASK, LORA, SGD), private=HEAD | {"b"}),
    "local_only": Row(lambda: fedavg.local_only(MODEL, TASK, LORA, ADAM), 1e-4, HEAD | {"a", "b"}),
    "centralized": Row(lambda: fedavg.centralized(MODEL, TASK, LORA, ADAM), 1e-4),
    "lora": Row(lambda: lora.lora(MODEL, TASK, ALL, SGD), falls=False),
    "bayestune": Row(lambda: bayestune.bayestune(MODEL, TASK, ALL, ADAM), 1e-4, falls=False),
    "fedp2eft": Row(lambda: fedp2eft.fedp2eft(MODEL, TASK, ALL, SGD, rate=0.1, psg_rate=0.03), 1e-4, AB, falls=False),
    "fedp2eft_reference": Row(
        lambda: fedp2eft.fedp2eft(MODEL, TASK, ALL, SGD, profile="reference", sample_budget=True),
        1e-2,  # bfloat16 turns rounding into whole steps
        AB,
        falls=False,
    ),
    "adalora": Row(lambda: adalora.adalora(MODEL, TASK, ALL, ADAM), 1e-4, falls=False),
    "fedl2p": Row(lambda: fedl2p.fedl2p(MODEL, TASK, ALL, ADAM, budget=1), 1e-4, AB, falls=False),
    "dept": Row(
        lambda: fedavg.dept(MERGED, TASK, FULL, SGD), private=frozenset({"embedding"}), model=MERGED, random=False
    ),
    "feddpa": Row(lambda: feddpa.feddpa(MODEL, TASK, LORA, SGD, local_rank=3)),
    "feddpa_dropout": Row(lambda: feddpa.feddpa(MODEL, TASK, DROPOUT, ADAM, local_rank=3, keep_optimizer=True), 1e-4),
    "fdlora": Row(lambda: fdlora.fdlora(MODEL, TASK, LORA, SGD, sync_every=1, fuse_on="train")),
    "fedprompt": Row(
        lambda: fedprompt.fedprompt(PROMPTED, TASK, LORA, optax.sgd(3.0), prompt=(3, 7, 4)),
        model=PROMPTED,
        random=False,
        neutral=False,
    ),
    "fedptuning": Row(
        lambda: fedprompt.fedptuning(PROMPTED, TASK, LORA, optax.adam(0.1), virtual_tokens=1, hidden=4),
        1e-4,
        model=PROMPTED,
        neutral=False,
    ),
    "fedmutual": Row(lambda: mutual.fedmutual(ENSEMBLED, TASK, LORA, SGD), model=ENSEMBLED),
    "fedapen": Row(
        lambda: mutual.fedapen(ENSEMBLED, TASK, DROPOUT, ADAM, fit_on="train", fit_epochs=2), 1e-4, model=ENSEMBLED
    ),
    # Two to four experts of nine, so that there are empty slots and tokens choose.
    "fedamole": Row(
        lambda: fedamole.fedamole(
            MODEL, TASK, LORA, SGD, clients=6, experts=9, max_experts=4, balance=0.1, embed_on="train"
        ),
        1e-5,
    ),
    "hetlora": Row(lambda: hetlora.hetlora(MODEL, TASK, LORA, SGD, clients=federation.CLIENTS, rank_min=1)),
    # One of its three minibatches has the outer examples, too few on the toy for the others' loss to fall.
    "perfedavg": Row(lambda: perfedavg.perfedavg(MODEL, TASK, LORA, SGD, inner_rate=0.1), falls=False),
    "pf2lora": Row(lambda: pf2lora.pf2lora(MODEL, TASK, LORA, SGD, client_rank=1)),
    "pf2lora_adam": Row(lambda: pf2lora.pf2lora(MODEL, TASK, DROPOUT, ADAM, client_rate=0.1), 1e-4),
    "full_beside": Row(lambda: fedavg.fedit(MODEL, TASK, FULL, SGD), random=False),
    "full_merged": Row(lambda: fedavg.fedit(MERGED, TASK, FULL, SGD), model=MERGED, random=False),
}

COHORT = [4, 0, 3, 2]  # clients 1 and 5 stay out
every = pytest.mark.parametrize("name", TABLE)


@functools.cache
def algorithm(name: str) -> Algorithm:
    return TABLE[name].build()


@functools.cache
def two_rounds(name: str):
    """The run that others are compared with, on one device in chunks of two: (state, last round)."""
    return federation.run(algorithm(name), COHORT)


def _types(tree):
    """Path, shape, dtype and weakness of every leaf: what decides whether a function compiles again."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(jax.typeof, tree))
    return [(trees.path_name(path), leaf.shape, leaf.dtype, leaf.weak_type) for path, leaf in leaves]


@every
def test_states_keep_their_types_and_rounds_compile_once(name):
    method = algorithm(name)
    assert isinstance(method, Algorithm)
    mesh, step = federation.compiled(method, (1, 1), 2, len(COHORT))
    server = federation.initial(method)(jax.random.key(0))
    population = begin(method).population
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(server))
    before = _types(server)
    stored = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(rounds.client_states(method, server))]
    for index in range(3):
        arguments = federation.arguments_of(federation.State(server, population), index, COHORT, mesh)
        server, states, _, _ = step(*arguments)
        assert _types(server) == before
        assert [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(states)] == stored
    assert step._cache_size() == 1


@every
def test_cohort_order_does_not_matter(name):
    state, _ = two_rounds(name)
    other, _ = federation.run(algorithm(name), COHORT[::-1])
    assert_close(other, state, TABLE[name].tolerance)


@every
def test_padding_changes_no_bit(name):
    # A chunk of padding before or after; rounds_test has more and fewer slots, which cost compilations.
    after, last = federation.run(algorithm(name), [4, 0, PADDING, PADDING])
    before, first = federation.run(algorithm(name), [PADDING, PADDING, 4, 0])
    assert_same(before, after)
    assert_same(first.metrics["server"], last.metrics["server"])
    for metric, values in last.metrics["clients"].items():
        assert_same(np.roll(values, 2), first.metrics["clients"][metric])
        assert not values[2:].any()


@every
def test_mesh_and_chunk_do_not_matter(name):
    # One device in chunks of two against four in chunks of one; rounds_test has other meshes, which cost compilations.
    state, _ = two_rounds(name)
    other, _ = federation.run(algorithm(name), COHORT, mesh=(2, 2), chunk=1)
    assert_close(other, state, TABLE[name].tolerance)
    assert federation.compiled(algorithm(name), (2, 2), 1, len(COHORT))[1]._cache_size() == 1


@every
def test_clients_outside_the_cohort_are_untouched(name):
    state, _ = two_rounds(name)
    first = snapshot(state.population.states)
    state, _ = play(algorithm(name), snapshot(state), 2, [1, 0, 3, PADDING])
    others = [2, 4, 5]
    assert_same(*(jax.tree.map(lambda leaf: leaf[others], tree) for tree in (state.population.states, first)))
    assert list(np.flatnonzero(~state.population.known)) == [5]


@every
def test_an_empty_cohort_leaves_everything_as_it_was(name):
    before, _ = two_rounds(name)
    after, played = play(algorithm(name), snapshot(before), 2, [PADDING] * 4)
    assert_same(after, before)
    assert not played.cohort.reported.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(played.metrics))


@every
def test_a_client_that_drops_out_is_as_if_absent(name):
    before, _ = two_rounds(name)
    dropped, _ = play(algorithm(name), snapshot(before), 2, COHORT, absent=(3,))
    absent, _ = play(algorithm(name), snapshot(before), 2, [4, 0, PADDING, 2])
    assert_same(dropped, absent)
    assert_same(*(jax.tree.map(lambda leaf: leaf[3], s.population.states) for s in (dropped, before)))


@every
def test_a_client_with_nan_is_left_out_and_flagged(name):
    before, _ = two_rounds(name)
    batches = federation.data(2, COHORT)
    batches.weights[2, 0, 0], batches.weights[2, 0, 1] = np.nan, 1.0
    poisoned, played = play(algorithm(name), snapshot(before), 2, COHORT, batches=batches)
    absent, _ = play(algorithm(name), snapshot(before), 2, COHORT, absent=(3,))
    assert_same(poisoned, absent)
    stored = jax.tree.map(lambda leaf: leaf[3], before.population.states)
    assert_same(jax.tree.map(lambda leaf: leaf[2], played.states), stored)
    assert list(played.metrics["finite"]) == [True, True, False, True]
    assert list(played.cohort.reported) == [True, True, False, True]


@every
def test_three_rounds_are_two_and_a_restored_one(name):
    state, _ = two_rounds(name)
    restored, after = play(algorithm(name), snapshot(state), 2, COHORT)
    straight = begin(algorithm(name))
    for index in range(3):
        straight, played = play(algorithm(name), straight, index, COHORT)
    assert_same(restored, straight)
    assert_same(after, played)


@every
def test_without_training_clients_have_the_base(name):
    method, model = algorithm(name), TABLE[name].model
    state, ids = begin(method), np.arange(4, dtype=np.int32)
    batches = federation.data(0, list(ids))
    none = jax.tree.map(lambda leaf: leaf[:, :0], batches.replace(constants={})).replace(constants=batches.constants)
    mesh = rounds.make_mesh(1, 1)
    states = jax.tree.map(lambda leaf: leaf[:4], state.population.states)
    personal = rounds.make_personalize(method, mesh, 4)(
        federation.base(), state.server, states, np.ones(4, bool), none, ids, 0, jax.random.key(0)
    )
    inputs = jax.tree.map(lambda leaf: leaf[0, 0], batches.inputs)
    logits = jax.vmap(model.apply, (None, 0, None))(federation.base(), personal, inputs)
    expected = np.broadcast_to(MODEL.apply(federation.base(), {}, inputs), logits.shape)
    if TABLE[name].neutral:
        np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)
    adapters.check_sites(personal, federation.base())


@every
def test_loss_falls_and_metrics_are_finite(name):
    state, losses = begin(algorithm(name)), []
    for index in range(10):
        state, played = play(algorithm(name), state, index, COHORT, batches=federation.data(0, COHORT))
        losses.append(np.mean(played.metrics["clients"]["loss"]))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((played.metrics, state)))
    assert losses[-1] < 0.8 * losses[0] or not TABLE[name].falls, losses


@every
def test_a_seed_repeats_and_another_differs(name):
    state, _ = two_rounds(name)
    assert_same(federation.run(algorithm(name), COHORT)[0], state)
    other, _ = federation.run(algorithm(name), COHORT, seed=1)
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), state, other)
    assert any(jax.tree.leaves(changed)) == TABLE[name].random


@every
def test_private_arrays_are_not_uploaded(name):
    method, private = algorithm(name), TABLE[name].private
    server = begin(method).server
    client = method.init_client(server, 0, jax.random.key(0))
    batches = jax.tree.map(lambda leaf: leaf[0], federation.data(0, [0]))
    _, upload, _ = jax.eval_shape(method.client_update, federation.base(), server, client, batches, jax.random.key(0))
    sent = {trees.path_name(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(upload)}
    assert not sent & (private | {"scale"})
    # One sends the rows of its untouched layer as zeros, and does not count them; the other counts the average client.
    if name not in ("fedit_one_layer", "fedamole"):
        assert method.traffic(server)[1] == sum(leaf.size for leaf in jax.tree.leaves(upload))


# Rows that are methods as they are, without further settings: enough for several processes.
METHODS = [name for name in TABLE if name in algorithms.ALL]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(folder, results) of two processes with two devices each."""
    folder = tmp_path_factory.mktemp("pair")
    state, _ = two_rounds(processes_job.STATEFUL)
    people = state.population._replace(changed=state.population.known.copy(), written=state.population.written.copy())
    loop.save(checkpoint.manager(folder / "one"), folder / "one", 2, state.server, people._replace(segments={}))
    place, rest = started.address(), (str(folder), ",".join(METHODS))
    started.finish([started.start("processes_job.py", place, "2", index, *rest) for index in "01"])
    return folder, pickle.loads((folder / "results.pickle").read_bytes())


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_as_one(name, pair):
    state, _ = two_rounds(name)
    server, states, known = pair[1][name]
    assert known.tolist() == state.population.known.tolist()
    tolerance = TABLE[name].tolerance
    assert_close(server, state.server, tolerance)
    assert_close(states, state.population.states, tolerance)


def test_one_process_reads_what_two_wrote(pair):
    folder, results = pair
    method = algorithm(processes_job.STATEFUL)
    server, people = loop.final(method, rounds.make_mesh(4), federation.CLIENTS, folder / "several")
    assert_same((server, people.states, people.known), results[processes_job.STATEFUL])


def test_two_processes_read_what_one_wrote(pair):
    state, _ = two_rounds(processes_job.STATEFUL)
    assert_same(pair[1]["read"], (state.server, state.population.states, state.population.known))


GOLDEN = pathlib.Path(__file__).parent / "golden" / "algorithms.json"
REWRITE = "FEDJAX_PEFT_REWRITE_GOLDEN=1 python -m pytest tests/algorithms_test.py -k golden"


@every
def test_golden_metrics(name):
    _, played = two_rounds(name)
    found = {
        "clients": {key: values.tolist() for key, values in played.metrics["clients"].items()},
        "server": {key: float(value) for key, value in played.metrics["server"].items()},
    }
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("FEDJAX_PEFT_REWRITE_GOLDEN"):
        kept = {key: value for key, value in golden.items() if key in TABLE}
        GOLDEN.write_text(json.dumps(kept | {name: found}, indent=1, sort_keys=True) + "\n")
        return
    help_text = (
        f"The second round of {name} gives other numbers than it did. If the method, the toy or a random stream\n"
        f"was changed on purpose, say so in the commit and rewrite the numbers with\n    {REWRITE}\n"
        "If not, this is a bug: refactoring, faster code and newer libraries leave them as they are."
    )
    assert name in golden, f"no golden numbers yet for {name}: {REWRITE}"
    for expected, value in zip(jax.tree.leaves(golden[name]), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=help_text)

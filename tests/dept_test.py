"""DEPT: embeddings that stay with their clients under a body that is averaged, and the bases that come of it."""

import functools

import federation
import jax
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same

from fedjax_peft import adapters, tasks, trees
from fedjax_peft.algorithms import fedavg

MODEL, TASK, SGD = adapters.merged(toy.model()), tasks.classification(), optax.sgd(0.5)
COHORT = [4, 0, 3, 2]  # clients 1 and 5 stay out
WORDS = ("embeddings", "word")


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"kind": "full"} | settings)


def zeroed(name):
    """Updates of 0 for leaves of that name."""

    def update(updates, params=None):
        del params
        return trees.join(trees.select(updates, lambda leaf: leaf != name), trees.zeros_like(_only(updates, name)))

    return optax.stateless(update)


def _only(tree, name):
    return trees.select(tree, lambda leaf: leaf == name)


@functools.cache
def played():
    """Two rounds: (method, state)."""
    method = fedavg.dept(MODEL, TASK, init_adapters(), SGD)
    return method, federation.run(method, COHORT)[0]


def client_of(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state.population.states)


def batches_of(index):
    batches = federation.data(0, [index]).replace(constants={}, widths=())
    return jax.tree.map(lambda leaf: leaf[0], batches)


def personalized(index):
    """The adapters that a client has before it trains any further."""
    method, state = played()
    nothing = jax.tree.map(lambda leaf: leaf[:0], batches_of(index))
    arguments = (state.server, client_of(state, index), nothing, jax.random.key(0))
    return method.personalize(federation.base(), *arguments)


def test_with_frozen_embeddings_it_is_fedavg_on_the_body():
    still = fedavg.dept(MODEL, TASK, init_adapters(), optax.chain(SGD, zeroed("embedding")))
    body = fedavg.fedavg(MODEL, TASK, init_adapters(), SGD, frozen=lambda leaf: leaf == "embedding")
    found, expected = (federation.run(method, COHORT)[0].server.adapters for method in (still, body))
    assert_close(found, expected, 1e-6)
    trained = played()[1].server.adapters
    kernels = [tree["encoder"]["layer"]["query"]["delta"].kernel for tree in (expected, trained)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3, "trained embeddings would leave the body the same"


def test_embeddings_stay_with_the_clients_that_trained():
    method, state = played()
    tables = adapters.nodes(method.part(state.population.states))[WORDS].embedding
    moved = np.abs(tables).max(axis=(1, 2))
    assert list(np.flatnonzero(moved == 0)) == [1, 5]
    assert len(np.unique(moved[COHORT])) == 4
    assert not state.server.adapters["embeddings"]["word"]["delta"].embedding.any()
    before = federation.snapshot(state.population.states)
    later, _ = federation.play(method, federation.snapshot(state), 2, [1, 0])
    for index in (2, 3, 4, 5):
        assert_same(client_of(later, index), jax.tree.map(lambda leaf, at=index: leaf[at], before))
    size = adapters.count(state.server.adapters) - tables[0].size
    assert method.traffic(state.server) == (size, size)


@pytest.mark.parametrize("index", [4, 5])
def test_a_further_stage_trains_lora_on_what_the_client_had(index):
    method, state = played()
    part, personal = method.part(client_of(state, index)), personalized(index)
    merged = adapters.merge(federation.base(), method.shared(state.server))
    adapters.check_sites(part, merged)
    assert list(adapters.nodes(part)) == [WORDS]
    lora = adapters.init(jax.random.key(1), merged, rank=2, targets="query")
    filled = jax.tree.map(lambda leaf: leaf + 0.02, lora)
    inputs = jax.tree.map(lambda leaf: leaf[0], batches_of(index).inputs)
    for own in (lora, filled):
        found = toy.model().apply(merged, adapters.concat(part, own), inputs)
        expected = toy.model().apply(adapters.merge(federation.base(), personal), own, inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    alone = toy.model().apply(merged, filled, inputs)
    assert (np.abs(alone - found).max() > 1e-3) == (index == 4), "only a client that trained has a part of its own"


def test_methods_that_keep_nothing_have_no_part():
    lora = functools.partial(
        adapters.init, shapes=jax.eval_shape(MODEL.init, jax.random.key(0)), rank=2, targets="query"
    )
    for factory, expected in ((fedavg.fedit, {}), (fedavg.fedsa_lora, None)):
        method = factory(toy.model(), TASK, lora, SGD)
        server = method.init(jax.random.key(0))
        assert method.part is None
        assert_same(method.shared(server), server.adapters)
        client = method.init_client(server, 0, jax.random.key(0))
        if expected is not None:
            assert fedavg.part(client) == expected
            continue
        with pytest.raises(ValueError, match="only embedding tables .* not what it keeps at classifier"):
            fedavg.part(client)


def test_adapters_without_an_embedding_table_are_refused():
    with pytest.raises(ValueError, match="adapter.kind must be 'full'"):
        fedavg.dept(MODEL, TASK, init_adapters(kind="lora", rank=2, targets="query"), SGD)

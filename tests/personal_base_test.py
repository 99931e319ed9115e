"""Algorithms on bases that differ from client to client."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close

from fedjax_peft import adapters, rounds, tasks
from fedjax_peft.algorithms import fedavg, fedp2eft, lora, personal_base

MODEL, TASK = toy.model(), tasks.classification()
BASE = MODEL.init(jax.random.key(1))
INIT = functools.partial(
    adapters.init, shapes=jax.eval_shape(lambda: BASE), rank=3, alpha=6.0, targets="all-linear", head="lora"
)
PART = jax.tree.map(lambda leaf: leaf + 0.1, INIT(jax.random.key(5), rank=2, targets="query", head="frozen"))
OWN = jax.tree.map(lambda leaf: leaf[0], toy.batches(0, 1)).replace(widths=())
ADAM = optax.adam(1e-2)


@pytest.mark.parametrize("factory", [lora.lora, fedavg.fedit, fedp2eft.fedp2eft])
def test_it_is_as_if_the_part_had_been_merged_into_the_base(factory):
    beside = personal_base.personal_base(factory(personal_base.beside(MODEL), TASK, INIT, ADAM))
    merged = factory(MODEL, TASK, INIT, ADAM)
    whole, key = adapters.merge(BASE, PART), jax.random.key(2)
    with_part = OWN.replace(constants=OWN.constants | {"part": PART})
    server = merged.init(jax.random.key(0))
    client = merged.init_client(server, 0, key)
    expected = jax.jit(merged.client_update)(whole, server, client, OWN, key)
    found = jax.jit(beside.client_update)(BASE, server, client, with_part, key)
    assert_close(found, expected, 2e-4)
    inputs = jax.tree.map(lambda leaf: leaf[0], OWN.inputs)
    tuned = jax.jit(beside.personalize)(BASE, server, client, with_part, key)
    alone = jax.jit(merged.personalize)(whole, server, client, OWN, key)
    adapters.check_sites(tuned, BASE)
    np.testing.assert_allclose(
        MODEL.apply(BASE, tuned, inputs), MODEL.apply(whole, alone, inputs), rtol=1e-3, atol=1e-4
    )


def test_dropout_is_that_of_what_is_trained():
    """The part of the base is frozen and whole; what a client trains at the same sites is dropped."""
    inputs = jax.tree.map(lambda leaf: leaf[0], OWN.inputs)
    tuned = jax.tree.map(lambda leaf: leaf + 0.1, INIT(jax.random.key(6), dropout=0.5))
    model, key = personal_base.beside(MODEL), jax.random.key(3)
    alone = jax.tree.map(lambda leaf: leaf + 0.1, INIT(jax.random.key(6)))
    part_alone = model.apply((BASE, PART), {}, inputs, key)
    np.testing.assert_allclose(part_alone, model.apply((BASE, PART), {}, inputs), rtol=1e-6)
    np.testing.assert_allclose(model.apply((BASE, PART), tuned, inputs), model.apply((BASE, PART), alone, inputs))
    assert np.abs(model.apply((BASE, PART), tuned, inputs, key) - model.apply((BASE, PART), tuned, inputs)).max() > 1e-3


def test_without_steps_a_client_has_its_own_base():
    method = personal_base.personal_base(lora.lora(personal_base.beside(MODEL), TASK, INIT, ADAM))
    none = jax.tree.map(lambda leaf: leaf[:0], OWN.replace(constants={}))
    none = none.replace(constants=OWN.constants | {"part": PART})
    tuned = method.personalize(BASE, method.init(jax.random.key(0)), (), none, jax.random.key(1))
    inputs = jax.tree.map(lambda leaf: leaf[0], OWN.inputs)
    np.testing.assert_allclose(
        MODEL.apply(BASE, tuned, inputs), MODEL.apply(adapters.merge(BASE, PART), {}, inputs), rtol=1e-5, atol=1e-5
    )


def test_clients_that_never_took_part_have_the_initial_part():
    kept = jnp.arange(6.0).reshape(3, 2)
    method = lora.lora(MODEL, TASK, INIT, ADAM)._replace(
        init_client=lambda server, client_id, key: server + client_id, part=lambda client: {"own": client}
    )
    found = rounds.make_parts(method)(jnp.full(2, 10.0), kept, np.array([True, False, True]))
    np.testing.assert_array_equal(found["own"], [[0, 1], [11, 11], [4, 5]])

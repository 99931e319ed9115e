import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import population

SHAPES = {"b": jax.ShapeDtypeStruct((2,), jnp.float32), "count": jax.ShapeDtypeStruct((), jnp.int32)}


def test_only_clients_that_reported_are_written():
    people = population.create(SHAPES, 4)
    new = {"b": jnp.arange(6.0).reshape(3, 2) + 1, "count": jnp.array([1, 2, 3])}
    population.scatter(people, np.array([3, 1, 4]), new, np.array([True, False, False]))
    assert people.known.tolist() == [False, False, False, True]
    assert people.states["b"][3].tolist() == [1.0, 2.0] and people.states["count"].tolist() == [0, 0, 0, 1]


def test_strangers_and_padding_are_fresh():
    people = population.create(SHAPES, 4)
    people.known[2] = True
    states, fresh = population.gather(people, np.array([2, 0, 4]))
    assert fresh.tolist() == [False, True, True]
    assert states["b"].shape == (3, 2) and states["count"].dtype == np.int32


def test_clients_may_keep_nothing():
    people = population.create((), 3)
    states, fresh = population.gather(people, np.array([0, 3]))
    assert states == () and fresh.tolist() == [True, True]
    population.scatter(people, np.array([0, 3]), (), np.array([True, False]))
    assert people.known.tolist() == [True, False, False]


def test_a_cohort_is_a_copy():
    people = population.create(SHAPES, 2)
    states, _ = population.gather(people, np.array([0, 1]))
    states["b"][:] = 7
    assert (people.states["b"] == 0).all()

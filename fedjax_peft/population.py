"""The states of all N clients, on the host: only those of a cohort visit the device."""

from typing import NamedTuple

import jax
import numpy as np

from fedjax_peft.types import PyTree


class Population(NamedTuple):
    """Written in place by `scatter`, so that a round costs what its cohort costs, not what the population costs."""

    states: PyTree  # numpy arrays [N, ..]
    known: np.ndarray  # [N] bool: clients that have a state; the others get theirs from `init_client` when they are met


def create(shapes: PyTree, clients: int) -> Population:
    """A population in which nobody has a state yet. `shapes` are those of one client's state."""
    # np.zeros maps memory without touching it: clients that never take part cost nothing.
    states = jax.tree.map(lambda leaf: np.zeros((clients, *leaf.shape), leaf.dtype), shapes)
    return Population(states, np.zeros(clients, bool))


def gather(population: Population, ids: np.ndarray) -> tuple[PyTree, np.ndarray]:
    """States `[C, ..]` of the clients `ids` `[C]`, and `fresh` `[C]`: who has none yet. Padding ids N are fresh."""
    clients = len(population.known)
    rows = np.minimum(ids, clients - 1)
    fresh = (ids >= clients) | ~population.known[rows]
    return jax.tree.map(lambda leaf: leaf[rows], population.states), fresh


def scatter(population: Population, ids: np.ndarray, states: PyTree, reported: np.ndarray) -> None:
    """Writes back the states `[C, ..]` of the clients that reported."""
    kept = np.flatnonzero(reported)
    for stored, new in zip(jax.tree.leaves(population.states), jax.tree.leaves(states), strict=True):
        stored[ids[kept]] = np.asarray(new)[kept]
    population.known[ids[kept]] = True

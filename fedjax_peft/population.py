"""The states of all N clients, on hosts or on their disks: only those of a cohort visit the devices.

With P processes, process p owns the clients with id % P == p. A cohort's states go from their owners to the processes
that train them and back. `segments.py` writes them down.
"""

import math
import mmap
import os
import tempfile
import weakref
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from fedjax_peft import processes
from fedjax_peft.types import PyTree


class Population(NamedTuple):
    """Written in place by `scatter`, so that a round costs what its cohort costs, not what the population costs."""

    states: (
        PyTree  # numpy arrays [n, ..] of the clients that this process owns, ascending: all N of them in one process
    )
    known: np.ndarray  # [N] bool: clients that have a state; the others get theirs from `init_client` when they are met
    written: np.ndarray  # [N] int32: the round in whose segment a state is; -1 for those in none
    changed: np.ndarray  # [N] bool: states that are newer than their segment
    segments: dict[int, int]  # round -> states in its segment when it was written
    scratch: "Scratch | None"  # where states lie that are not in memory


class Scratch(NamedTuple):
    """A file without a name, which the system removes with the process, however that ends."""

    file: int  # its descriptor, open as long as `states` are
    starts: tuple[int, ...]  # byte at which the array of each leaf of states begins


def create(shapes: PyTree, clients: int, folder: epath.PathLike | None = None) -> Population:
    """A population in which nobody has a state yet.

    Args:
      shapes: of one client's state.
      clients: N.
      folder: of a local disk with room for all states of this process, which then take no memory; they are gone when
        the process ends. None keeps them in memory.

    Raises:
      ValueError: a folder in an object store.
    """
    if "://" in str(folder):
        raise ValueError(f"run.population is {folder!r}, expected a folder of a local disk")
    own = max(1, len(range(jax.process_index(), clients, jax.process_count())))
    sizes = [own * math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes)]
    scratch = mapped = None
    if folder and any(sizes):
        *starts, end = np.cumsum([0, *(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)]).tolist()
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            scratch = Scratch(os.dup(file.fileno()), tuple(starts))
        os.truncate(scratch.file, end)
        mapped = mmap.mmap(scratch.file, end)
        weakref.finalize(mapped, os.close, scratch.file)

    def empty(place, leaf):
        if scratch is None:
            # np.zeros maps memory without touching it: clients that never take part cost nothing.
            return np.zeros((own, *leaf.shape), leaf.dtype)
        return np.ndarray((own, *leaf.shape), leaf.dtype, mapped, scratch.starts[place])

    leaves, structure = jax.tree.flatten(shapes)
    states = jax.tree.unflatten(structure, [empty(place, leaf) for place, leaf in enumerate(leaves)])
    nobody, written = np.zeros(clients, bool), np.full(clients, -1, np.int32)
    return Population(states, nobody, written, nobody.copy(), {}, scratch)


def gather(population: Population, ids: np.ndarray) -> tuple[PyTree, np.ndarray]:
    """States of the clients `ids` `[C]`, and who has none yet: `[C]` of both, or of this process's own slots.

    Padding ids N are fresh. With several processes all must call it, with the same ids.
    """
    return arrange(population, ids, prepare(population, ids)), fresh(population, ids)


def prepare(population: Population, ids: np.ndarray) -> PyTree:
    """The part of `gather` that waits for nobody: states of the clients among `ids` that this process owns."""
    return take(population, ids[_owned(population, ids)])


def renew(population: Population, ids: np.ndarray, rows: PyTree, since: np.ndarray) -> PyTree:
    """What `prepare` returned, once the states of the clients `since` have been written."""
    own = ids[_owned(population, ids)]
    stale = np.flatnonzero(np.isin(own, since))
    for old, new in zip(jax.tree.leaves(rows), jax.tree.leaves(take(population, own[stale])), strict=True):
        old[stale] = new
    return rows


def fresh(population: Population, ids: np.ndarray) -> np.ndarray:
    """Which clients in this process's own slots have no state yet."""
    count, clients = jax.process_count(), len(population.known)
    own = ids.reshape(count, -1)[jax.process_index()]
    return (own >= clients) | ~population.known[np.minimum(own, clients - 1)]


def scatter(population: Population, ids: np.ndarray, states: PyTree, reported: np.ndarray) -> None:
    """Writes back states of the clients that reported.

    Args:
      ids: [C], the same in all processes.
      states: [C, ..], or those of this process's own slots.
      reported: [C], the same in all processes.
    """
    if jax.process_count() == 1:
        kept = np.flatnonzero(reported)
        put(population, ids[kept], jax.tree.map(lambda leaf: np.asarray(leaf)[kept], states))
    else:
        owned = np.flatnonzero(_owned(population, ids))
        rows = _return(population, ids, states)
        kept = reported[owned]
        put(population, ids[owned[kept]], jax.tree.map(lambda leaf: leaf[kept], rows))
    population.known[ids[reported]] = True
    population.changed[ids[reported]] = True


def take(population: Population, ids: np.ndarray) -> PyTree:
    """A copy of the states `[k, ..]` of clients that this process owns; anything of those who have none."""
    rows = np.minimum(ids, len(population.known) - 1) // jax.process_count()
    if population.scratch is None:
        return jax.tree.map(lambda leaf: leaf[rows], population.states)
    leaves, structure = jax.tree.flatten(population.states)
    known = np.append(population.known, False)[ids]
    # Read and not mapped: pages that were mapped would count as memory of this process.
    out = [np.zeros((len(rows), *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    for start, states in zip(population.scratch.starts, out, strict=True):
        for place in np.flatnonzero(known).tolist():
            state = states[place : place + 1].view(np.uint8).reshape(-1)
            os.preadv(population.scratch.file, [state], start + int(rows[place]) * state.size)
    return jax.tree.unflatten(structure, out)


def everyone(population: Population) -> PyTree:
    """The states `[N, ..]` of all clients, whoever owns them. All processes must call it."""
    if jax.process_count() == 1:
        return population.states
    parts = processes.gather(population.states)

    def whole(*leaves):
        out = np.zeros((len(population.known), *leaves[0].shape[1:]), leaves[0].dtype)
        for process, leaf in enumerate(leaves):
            rows = out[process :: len(leaves)]
            rows[:] = leaf[: len(rows)]
        return out

    return jax.tree.map(whole, *parts)


def arrange(population: Population, ids: np.ndarray, rows: PyTree) -> PyTree:
    """The rest of `gather`: what `prepare` returned -> states of the clients in this process's own slots."""
    count, me = jax.process_count(), jax.process_index()
    if count == 1 or not jax.tree.leaves(rows):
        return rows
    owner, trainer, owned = _places(population, ids)
    packed, going = pack(rows), trainer[owned]
    received = _exchange(owner, trainer, [packed[going == other] for other in range(count)], trainer == me)
    own = owner[trainer == me]
    slots = np.zeros((len(own), packed.shape[1]), np.uint8)
    for other, part in enumerate(received):
        slots[own == other] = part
    return unpack(slots, rows)


def _return(population, ids, states):
    """States of this process's own slots -> those of the clients that it owns, in the order of their slots."""
    if not jax.tree.leaves(states):
        return states
    count, me = jax.process_count(), jax.process_index()
    owner, trainer, owned = _places(population, ids)
    packed, going = pack(states), owner[trainer == me]
    received = _exchange(trainer, owner, [packed[going == other] for other in range(count)], owner == me)
    back = np.zeros((owned.sum(), packed.shape[1]), np.uint8)
    for other, part in enumerate(received):
        back[trainer[owned] == other] = part
    return unpack(back, states)


def _exchange(sender, receiver, outgoing, mine):
    """Sends rows; `sender` and `receiver` `[C]` say between whom each slot's row goes, -1 for none."""
    count, moving = jax.process_count(), (sender >= 0) & (receiver >= 0)
    largest = np.bincount(sender[moving] * count + receiver[moving], minlength=1).max()
    incoming = np.bincount(sender[mine & moving], minlength=count)
    return processes.exchange(outgoing, incoming, int(largest), -(-len(sender) // count**2))


def _places(population, ids):
    """(owner [C], trainer [C], whether this process owns it [C]) of each slot.

    Nobody, -1, owns padding, but one process alone sees no difference.
    """
    count = jax.process_count()
    owner = np.where((ids < len(population.known)) | (count == 1), ids % count, -1)
    return owner, np.arange(len(ids)) // (len(ids) // count), owner == jax.process_index()


def _owned(population, ids):
    return _places(population, ids)[2]


def put(population: Population, ids: np.ndarray, states: PyTree) -> None:
    """Replaces the states `[k, ..]` of clients that this process owns."""
    rows, leaves = ids // jax.process_count(), [np.asarray(leaf) for leaf in jax.tree.leaves(states)]
    if population.scratch is None:
        for stored, new in zip(jax.tree.leaves(population.states), leaves, strict=True):
            stored[rows] = new
        return
    for start, new in zip(population.scratch.starts, leaves, strict=True):
        for place, row in enumerate(rows.tolist()):
            state = new[place].tobytes()
            if os.pwrite(population.scratch.file, state, start + row * len(state)) != len(state):
                raise OSError("the disk of run.population has no room left for the states of clients")


def pack(tree: PyTree) -> np.ndarray:
    """Arrays `[k, ..]` -> their bytes, [k, W] uint8."""
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(tree)]
    flat = [leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) for leaf in leaves]
    return np.concatenate([leaf.view(np.uint8) for leaf in flat], axis=1)


def unpack(rows: np.ndarray, like: PyTree) -> PyTree:
    """Bytes [k, W] -> arrays `[k, ..]` of the types and shapes of `like` `[.., ..]`."""
    leaves, at = [], 0
    for leaf in jax.tree.leaves(like):
        width = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
        part = np.ascontiguousarray(rows[:, at : at + width])
        leaves.append(part.view(leaf.dtype).reshape(len(rows), *leaf.shape[1:]))
        at += width
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

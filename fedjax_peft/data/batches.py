"""Padded batches out of a store: what a cohort trains on in a round, and every example once for evaluation.

    N clients   M examples   C cohort slots   S local steps   B examples of a batch   T tokens   I items
    P tokens of the longest answer of a store, or of all answers to a prompt, a multiple of COARSE above it; T at most

What a client trains on in a round is a pure function of (seed, round, client id). It never depends on the
slot that the client sits in or on who else is in the cohort.

Where examples are a prompt and an answer, inputs say which tokens' logits are wanted, those that predict the answer:
`chosen` [.., P] int32. Labels hold the answer itself, `targets` [.., P] int32, -1 behind its end. Both are filled from
the left, so that inputs may be cut to a width that holds the example. Where a prompt has several answers, one after the
other, inputs tell them apart by `branch` [.., T] int32, 0 in the prompt, and labels by `choice` [.., P] int32, 0 behind
their end.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft.data import federated
from fedjax_peft.types import Batches

COARSE = 16  # longer answers share lengths, so that other draws of the data need no other programs


class Items(NamedTuple):
    """Batches for evaluation, each of one client. Padding items have weight 0 and slot 0."""

    inputs: dict[str, np.ndarray]  # [I, B, T] each; T is one of the run's widths
    labels: Any  # [I, B, ..]
    weights: np.ndarray  # [I, B] float32: 1 for an example, 0 for padding
    slots: np.ndarray  # [I] int32: whose batch it is, as a position in `ids`
    rows: np.ndarray  # [I, B] int64: which example of the store it is; M for padding


def num_steps(store: federated.Store, steps: int | None, epochs: int | None, batch: int) -> int:
    """S, the local steps of any client in any round: `steps`, or what `epochs` take the largest client."""
    if (steps is None) == (epochs is None):
        raise ValueError(f"local training needs either steps or epochs, got {steps=} and {epochs=}")
    if batch < 1 or (epochs if steps is None else steps) < 0:
        raise ValueError(f"local training needs batch >= 1 and a length >= 0: {batch=}, {steps=}, {epochs=}")
    largest = int(federated.sizes(store).max(initial=0))
    return steps if epochs is None else epochs * -(-largest // batch)


def cohort(
    store: federated.Store,
    ids: np.ndarray,
    *,
    seed: int,
    round: int,
    batch: int,
    widths: Sequence[int],
    steps: int | None = None,
    epochs: int | None = None,
    pad: int = 0,
    group_by_length: bool = False,
) -> Batches:
    """The training batches of a round, [C, S, B, T] with T = widths[-1]; shapes are the same in all rounds.

    With `steps`, a client walks without replacement through epochs that are reshuffled each time. In round r
    it stands at example r S B of that walk, so no position needs to be stored, and all its batches are full.
    With `epochs`, every epoch of every round is a fresh permutation; its last batch may be partial, and
    steps beyond the client's weigh 0.

    Args:
      store: training examples.
      ids: [C] client ids; N marks a padding slot, whose weights are 0.
      seed: seed of the run.
      round: number of the round.
      batch: B, examples of a batch.
      widths: the run's token widths, ascending. A client's step s may be cut to widths[width[s]].
      steps: local steps of a round; or
      epochs: local epochs of a round.
      pad: token id of padding.
      group_by_length: puts examples of one width into the same batch and the wide batches of all clients
        into the same step, then permutes the steps alike for all clients.

    Raises:
      ValueError: an unknown client id, or an example longer than the last width.
    """
    ids = federated.known(store, ids, padding=True)
    count = num_steps(store, steps, epochs, batch)
    rows = (
        _steps(store, ids, seed, round * count * batch, count * batch)
        if epochs is None
        else (_epochs(store, ids, seed, round * epochs, epochs, count * batch))
    )
    width = _widths(store, rows, widths)
    if group_by_length and count:
        order = _grouped(width, batch, federated.rng(seed, federated.ORDER, round))
        rows, width = np.take_along_axis(rows, order, -1), np.take_along_axis(width, order, -1)
    shape = (len(ids), count, batch)
    inputs, labels, weights = _gather(store, rows.reshape(shape), widths[-1], pad)
    width = width.reshape(shape).max(axis=2, initial=0).astype(np.int32)
    constants = {"examples": np.append(federated.sizes(store), 0)[ids].astype(np.float32)}
    return Batches(inputs, labels, weights, width, tuple(widths), constants)


def items(
    store: federated.Store,
    ids: np.ndarray,
    *,
    batch: int,
    pack: int,
    widths: Sequence[int],
    pad: int = 0,
    in_order: bool = False,
    left: bool = False,
) -> Iterator[Items]:
    """Every example of the clients `ids` exactly once, as packs of I = `pack` batches of one client each.

    Examples are sorted by length within a client, unless they are to stay `in_order`, and batches by width over all
    clients, so that there is little padding and at most len(widths) shapes occur, the widest first. Padding ids (N) are
    skipped. Texts that are to be continued are padded on the `left`.

    Raises:
      ValueError: an unknown client id, or an example longer than the last width.
    """
    tokens = federated.lengths(store)
    batches, slots = [np.zeros((0, batch), np.int64)], [np.zeros(0, np.int64)]
    for slot, client in enumerate(federated.known(store, ids, padding=True)):
        if client < len(federated.sizes(store)):
            rows = federated.rows(store, client)
            # Longest first, so that the partial batch at the end is the cheapest one.
            rows = rows if in_order else rows[np.argsort(-tokens[rows], kind="stable")]
            batches.append(_padded(rows, -(-len(rows) // batch) * batch, len(tokens)).reshape(-1, batch))
            slots.append(np.full(len(batches[-1]), slot))
    rows, slot = np.concatenate(batches), np.concatenate(slots)
    width = _widths(store, rows, widths).max(axis=1, initial=0)
    for i in reversed(range(len(widths))):
        (here,) = np.nonzero(width == i)
        for some in np.split(here, range(pack, len(here), pack)) if len(here) else ():
            packed = _padded(rows[some], pack, len(tokens))
            inputs, labels, weights = _gather(store, packed, widths[i], pad, left)
            yield Items(inputs, labels, weights, _padded(slot[some], pack, 0).astype(np.int32), packed)


def whole(store: federated.Store, *, batch: int, width: int, pad: int = 0) -> dict[str, Any]:
    """Every example of every client in one array, for what all clients know at all times, e.g. held-out examples.

    Args:
      width: T; examples must fit.

    Returns:
      `inputs` {name: [N, A, B, ..]}, `labels` [N, A, B, ..] and `weights` [N, A, B], A batches for the largest client.

    Raises:
      ValueError: an example longer than `width`.
    """
    held = federated.sizes(store)
    count, none = -(-int(held.max(initial=0)) // batch), len(federated.lengths(store))
    own = [federated.rows(store, client) for client in range(len(held))]
    rows = np.stack([_padded(rows, count * batch, none) for rows in own]).reshape(len(held), count, batch)
    _widths(store, rows, (width,))
    inputs, labels, weights = _gather(store, rows, width, pad)
    return {"inputs": inputs, "labels": labels, "weights": weights}


def waste(batches: Batches | Items, chunk: int = 1) -> tuple[int, int]:
    """(tokens of examples, tokens computed): their ratio is the useful share.

    Clients of a chunk work side by side, so each of their steps is as wide as the widest of them needs.
    """
    real = int((batches.inputs["mask"] & (batches.weights > 0)[..., None]).sum())
    if isinstance(batches, Items):
        return real, batches.inputs["tokens"].size
    shared = batches.width.reshape(-1, chunk, batches.width.shape[-1]).max(axis=1)
    return real, int(np.asarray(batches.widths, np.int64)[shared].sum()) * chunk * batches.weights.shape[-1]


def _steps(store: federated.Store, ids: np.ndarray, seed: int, start: int, count: int) -> np.ndarray:
    """[C, count] examples start, start + 1, .. of each client's endless walk; M for padding."""
    out = np.full((len(ids), count), len(federated.lengths(store)), np.int64)
    held = np.append(federated.sizes(store), 0)
    for slot, client in enumerate(ids):
        size = int(held[client])
        if size and count:
            passes = range(start // size, (start + count - 1) // size + 1)
            walk = np.concatenate([_shuffled(seed, client, e, size) for e in passes])[start % size :]
            out[slot] = store.client_offsets[client] + walk[:count]
    return out


def _epochs(store: federated.Store, ids: np.ndarray, seed: int, start: int, epochs: int, count: int) -> np.ndarray:
    """[C, epochs, count / epochs] examples of the shuffles start, start + 1, ..; M for padding."""
    out = np.full((len(ids), epochs, count // max(epochs, 1)), len(federated.lengths(store)), np.int64)
    held = np.append(federated.sizes(store), 0)
    for slot, client in enumerate(ids):
        for e in range(epochs if held[client] else 0):
            shuffled = _shuffled(seed, client, start + e, int(held[client]))
            out[slot, e, : len(shuffled)] = store.client_offsets[client] + shuffled
    return out


def _shuffled(seed: int, client: int, epoch: int, size: int) -> np.ndarray:
    return federated.rng(seed, federated.SHUFFLE, int(client), epoch).permutation(size)


def _grouped(width: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Order along the last axis of `width` [C, .., K]: by width, then steps permuted alike for all C.

    Sorting by width and not by length gives equally tight steps and keeps the shuffle within a width, so
    that copies of a small client's examples do not meet in one batch.
    """
    order = np.argsort(-width, axis=-1, kind="stable")
    steps = np.arange(width.shape[-1]).reshape(-1, batch)
    passes = [steps[rng.permutation(len(steps))].reshape(-1) for _ in range(int(np.prod(width.shape[1:-1])))]
    common = np.reshape(passes, (1, *width.shape[1:]))
    return np.take_along_axis(order, np.broadcast_to(common, order.shape), -1)


def _widths(store: federated.Store, rows: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Index of the smallest width that holds each example, in the shape of `rows`; -1 for padding."""
    tokens = np.append(federated.lengths(store), 0)[rows]
    if tokens.max(initial=0) > widths[-1]:
        row = rows.reshape(-1)[tokens.argmax()]
        raise ValueError(f"example {row} has {tokens.max()} tokens, more than the largest width {widths[-1]}")
    return np.where(tokens == 0, -1, np.searchsorted(np.asarray(widths), tokens))


def _gather(
    store: federated.Store, rows: np.ndarray, width: int, pad: int, left: bool = False
) -> tuple[dict[str, np.ndarray], Any, np.ndarray]:
    """Inputs [.., width], labels and weights of the examples `rows`, where M stands for padding."""
    counts = federated.lengths(store)
    real = rows < len(counts)
    column = np.arange(width)
    ends = np.append(counts, 0)[rows][..., None]
    place = column - (width - ends if left else 0)
    mask = (place >= 0) & (place < ends)
    where = store.token_offsets[rows][..., None] + place
    inputs = {"tokens": np.where(mask, store.tokens.take(where, mode="clip"), np.int32(pad))}
    if store.types is not None:
        inputs["types"] = np.where(mask, store.types.take(where, mode="clip"), np.int32(0))
    # A padding example keeps one visible token: attention over nothing is NaN, and weight 0 would not undo
    # that.
    inputs["mask"] = mask | ((column == 0) & ~real[..., None])

    def select(x: np.ndarray) -> np.ndarray:
        x = x[np.where(real, rows, 0)]
        return np.where(real.reshape(real.shape + (1,) * (x.ndim - real.ndim)), x, np.zeros((), x.dtype))

    labels = federated.map_labels(select, store.labels)
    if store.prompts is not None:
        first = np.append(store.prompts, 0)[rows][..., None]
        longest = int((counts - store.prompts).max(initial=0))
        at = np.arange(min(longest if longest <= COARSE else -(-longest // COARSE) * COARSE, width))
        answer = at < ends - first
        spot = store.token_offsets[rows][..., None] + first + at
        labels = {**labels, "targets": np.where(answer, store.tokens.take(spot, mode="clip"), np.int32(-1))}
        before = at
        if store.branches is not None:
            inputs["branch"] = np.where(mask, store.branches.take(where, mode="clip"), 0).astype(np.int32)
            branch = store.branches.take(spot, mode="clip")
            labels["choice"] = np.where(answer, branch, 0).astype(np.int32)
            # The first token of each answer follows the prompt.
            before = np.where(branch == store.branches.take(spot - 1, mode="clip"), at, 0)
        inputs["chosen"] = np.where(answer, first - 1 + before, 0).astype(np.int32)
    return inputs, labels, real.astype(np.float32)


def _padded(x: np.ndarray, length: int, value: int) -> np.ndarray:
    """`x` continued with `value` to `length` along its first axis."""
    return np.concatenate([x, np.full((length - len(x), *x.shape[1:]), value, x.dtype)])

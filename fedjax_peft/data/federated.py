"""One flat store for the examples of any number of clients, and who takes part in a round.

    N clients   M examples   V token ids

Nothing here has state: cohorts and dropouts are pure functions of the seed, the round and the client's id.
"""

import collections
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Streams of random numbers. A new one is appended; a number is never used again.
SHUFFLE, ORDER, SAMPLE, DROP = range(4)


class Encoded(NamedTuple):
    """Ragged token sequences, one after the other."""

    tokens: np.ndarray  # [total] int32
    types: np.ndarray | None  # [total] int8: 0 in the first text, 1 in the second; None for single texts
    offsets: np.ndarray  # [M + 1] int64: example m is tokens[offsets[m] : offsets[m + 1]]
    sources: np.ndarray | None = None  # [M] int64, ascending: which pair example m is a window of; None without windows
    spans: np.ndarray | None = None  # [total, 2] int32: characters of the second text that a token is; -1 for others
    prompts: np.ndarray | None = None  # [M] int64: tokens before the answer, which is the rest; None without answers
    cut: np.ndarray | None = None  # [M] bool: whether the text was longer; None where none is cut
    branches: np.ndarray | None = None  # [total] int8: 0 in prompts, k in a k-th answer; None where all have one


class Store(NamedTuple):
    """Tokenized examples, those of one client next to each other."""

    tokens: np.ndarray  # [total] int32
    types: np.ndarray | None  # [total] int8
    token_offsets: np.ndarray  # [M + 1] int64: as in `Encoded`
    labels: Any  # [M] int32, or a dict of arrays [M, ..]
    client_offsets: np.ndarray  # [N + 1] int64: client n holds client_offsets[n] : client_offsets[n + 1]
    prompts: np.ndarray | None = None  # [M] int64: as in `Encoded`
    branches: np.ndarray | None = None  # [total] int8: as in `Encoded`


class Federation(NamedTuple):
    """N clients with their data."""

    train: Store
    test: Store
    names: tuple[str, ...]  # [N]
    groups: tuple[str, ...]  # [N] language or task that results are broken down by
    pools: dict[str, np.ndarray]  # `seen` clients train; `unseen` ones, if any, are only evaluated
    classes: tuple[str, ...]  # names of the labels
    task: str = "classification"  # a function of tasks.py
    score: Callable[..., dict[str, np.ndarray]] | None = None  # of a task that judges the test store on the host
    aux: Store | None = None  # held out of training, and none of the test: what a method may fit or embed clients by
    validation: Store | None = None  # held out as well, for a study to choose settings by
    references: tuple[tuple[str, ...], ...] | None = None  # of each test example: the texts that would be right
    majority: np.ndarray | None = None  # [N] of choices: test accuracy of the right one that training has most often
    lost: Mapping[str, int] = {}  # by split: examples in `train_cut`, rows that clients lack in `train_left_out`, ..


def build(
    encoded: Encoded,
    labels: Any,
    clients: Sequence[np.ndarray],
    *,
    classes: int | None = None,
    allow_empty: bool = False,
) -> Store:
    """Groups encoded examples by client.

    Args:
      encoded: token sequences of M examples.
      labels: [M] integers, or a dict of arrays [M, ..] for tasks with richer targets.
      clients: indices of each client's examples. An example may be left out, or be held by several clients.
      classes: number of classes, to check labels against. None does not check.
      allow_empty: accepts clients without examples (a test split may leave a small client none).

    Raises:
      ValueError: an empty client, an example without tokens, without a prompt or an answer to it, or a label out of
        range.
    """
    held = np.array([len(client) for client in clients], np.int64)
    if not allow_empty and (held == 0).any():
        raise ValueError(f"client {np.argmin(held)} of {len(held)} has no examples; every client needs one")
    if classes is not None:
        _check_labels(labels, classes)
    rows = np.concatenate([np.zeros(0, np.int64), *clients]).astype(np.int64)
    counts = np.diff(encoded.offsets)[rows]
    if (counts == 0).any():
        raise ValueError(f"example {rows[np.argmin(counts)]} has no tokens; drop empty texts before encoding")
    prompts = None if encoded.prompts is None else encoded.prompts[rows].astype(np.int64)
    if prompts is not None and ((prompts < 1) | (prompts >= counts)).any():
        row = int(np.argmax((prompts < 1) | (prompts >= counts)))
        raise ValueError(
            f"{prompts[row]} of the {counts[row]} tokens of example {rows[row]} are its prompt; leave some"
        )
    offsets = _offsets(counts)
    where = np.arange(offsets[-1]) + np.repeat(encoded.offsets[rows] - offsets[:-1], counts)
    return Store(
        tokens=encoded.tokens[where].astype(np.int32),
        types=None if encoded.types is None else encoded.types[where].astype(np.int8),
        token_offsets=offsets,
        labels=map_labels(lambda x: _narrow(x[rows]), labels),
        client_offsets=_offsets(held),
        prompts=prompts,
        branches=None if encoded.branches is None else encoded.branches[where].astype(np.int8),
    )


def cut(encoded: Encoded, clients: Sequence[np.ndarray]) -> int:
    """How many of the clients' examples lost the end of their texts."""
    return 0 if encoded.cut is None else int(encoded.cut[np.concatenate(clients)].sum())


def majority(train: np.ndarray, test: np.ndarray) -> float:
    """Share of a client's test labels that are the most frequent one of its training labels; NaN without either."""
    return float(np.mean(test == np.bincount(train).argmax())) if len(train) and len(test) else np.nan


def sizes(store: Store) -> np.ndarray:
    """[N] int64: how many examples each client holds."""
    return np.diff(store.client_offsets)


def lengths(store: Store) -> np.ndarray:
    """[M] int64: tokens of each example, special tokens included."""
    return np.diff(store.token_offsets)


def longest(store: Store) -> int:
    """Tokens of the longest example; where examples fork, with the longest of its answers alone."""
    if store.branches is None:
        return int(lengths(store).max(initial=0))
    example = np.repeat(np.arange(len(lengths(store))), lengths(store))
    tokens = np.zeros((len(lengths(store)), int(store.branches.max(initial=0)) + 1), np.int64)
    np.add.at(tokens, (example, store.branches), 1)
    return int((tokens[:, 0] + tokens[:, 1:].max(1, initial=0)).max(initial=0))


def rows(store: Store, client: int) -> np.ndarray:
    """[n] int64: the examples of one client, as positions in the store."""
    return np.arange(store.client_offsets[client], store.client_offsets[client + 1])


def subset(store: Store, ids: np.ndarray) -> Store:
    """The clients `ids` alone, renumbered 0, 1, .. as given. Their random streams follow the new numbers."""
    clients = [rows(store, i) for i in known(store, ids, padding=False)]
    return build(encoded(store), store.labels, clients, allow_empty=True)


def encoded(store: Store) -> Encoded:
    """The examples of a store, without their clients."""
    return Encoded(store.tokens, store.types, store.token_offsets, prompts=store.prompts, branches=store.branches)


def prompts_alone(store: Store) -> Store:
    """The store with all answers cut off: what texts are generated from. Rows keep their numbers.

    A store without answers is returned as it is.
    """
    if store.prompts is None:
        return store
    offsets = _offsets(store.prompts)
    where = np.arange(offsets[-1]) + np.repeat(store.token_offsets[:-1] - offsets[:-1], store.prompts)
    return store._replace(tokens=store.tokens[where], token_offsets=offsets, labels={}, prompts=None, branches=None)


def groups(table: dict[str, np.ndarray], column: str | None, clients: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The value of a column that most rows of each client have; `all` without a column.

    Raises:
      ValueError: there is no such column.
    """
    if column is None:
        return ("all",) * len(clients)
    if column not in table:
        raise ValueError(f"data.group is {column!r}, but the columns are {', '.join(table)}")
    return tuple(str(collections.Counter(table[column][own].tolist()).most_common(1)[0][0]) for own in clients)


def names(groups: Sequence[str]) -> tuple[str, ...]:
    """A name for each client that has none of its own: its group, and its number among the clients of this group."""
    numbers = {value: itertools.count() for value in groups}
    return tuple(f"{value}/{next(numbers[value])}" for value in groups)


def digest(store: Store) -> str:
    """SHA-256 of everything in the store, in hexadecimal; the same on every machine."""
    labels = store.labels if isinstance(store.labels, dict) else {"": store.labels}
    parts = {f"labels/{name}": x for name, x in labels.items()}
    parts |= {name: x for name, x in store._asdict().items() if name != "labels" and x is not None}
    sha = hashlib.sha256()
    for name, x in sorted(parts.items()):
        x = x.astype(x.dtype.newbyteorder("<"))
        sha.update(f"{name} {x.dtype.str} {x.shape};".encode() + x.tobytes())
    return sha.hexdigest()


def vocabulary(stores: Store | Sequence[Store], special_ids: Sequence[int]) -> np.ndarray:
    """[V] int32, ascending: the ids that occur in the stores or are special. Other embedding rows can go."""
    used = [np.unique(store.tokens) for store in _several(stores)]
    return np.unique(np.concatenate([*used, np.asarray(special_ids, np.int32)])).astype(np.int32)


def remap(store: Store, kept: np.ndarray) -> Store:
    """The store with each token id replaced by its position in `kept` (from `vocabulary`).

    Raises:
      ValueError: a token that is not in `kept`.
    """
    position = np.minimum(np.searchsorted(kept, store.tokens), len(kept) - 1)
    lost = kept[position] != store.tokens
    if lost.any():
        raise ValueError(f"token {store.tokens[np.argmax(lost)]} is not among the {len(kept)} tokens kept")
    return store._replace(tokens=position.astype(np.int32))


def widths_for(stores: Store | Sequence[Store], max_length: int, multiple: int = 8, count: int = 3) -> tuple[int, ...]:
    """Token widths, ascending, that batches are cut to: at most `count`; the last one holds every example.

    They make the sum over examples of the smallest width that holds them least. All are multiples of
    `multiple` tokens, but never above `max_length`.

    Raises:
      ValueError: an example with more than `max_length` tokens.
    """
    tokens = np.sort(np.concatenate([lengths(store) for store in _several(stores)]))
    if tokens[-1] > max_length:
        raise ValueError(f"an example has {tokens[-1]} tokens; encode with {max_length=} to cut it")
    grid = np.minimum(np.arange(1, -(-tokens[-1] // multiple) + 1) * multiple, max_length)
    below = np.searchsorted(tokens, grid, side="right")
    # cost[j]: least total over the examples up to grid[j], where grid[j] is the last width so far.
    cost, chosen = grid * below, [(int(width),) for width in grid]
    later = np.triu(np.ones((len(grid), len(grid)), bool), 1)
    for _ in range(count - 1):
        step = cost[:, None] + grid * (below - below[:, None])
        step = np.where(later, step, np.iinfo(np.int64).max)
        last, best = step.argmin(0), step.min(0)
        chosen = [chosen[last[j]] + (int(grid[j]),) if best[j] < cost[j] else chosen[j] for j in range(len(grid))]
        cost = np.minimum(best, cost)
    return chosen[-1]


def pools(clients: int, unseen: int | Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """{'seen', 'unseen'}: ids of clients that train and of those that are only evaluated, ascending int32.

    Args:
      clients: number of clients.
      unseen: how many of them to draw, or which.
      seed: of the draw.

    Raises:
      ValueError: an unknown id or a negative number, or nobody left to train.
    """
    ids = np.arange(clients, dtype=np.int32)
    if np.ndim(unseen) == 0:
        if unseen < 0:
            raise ValueError(f"data.unseen is {unseen} clients, expected 0 or more")
        unseen = np.random.default_rng(seed).permutation(clients)[:unseen] if unseen < clients else ids
    held_out = np.isin(ids, unseen)
    if held_out.sum() != len(set(map(int, unseen))) or held_out.all():
        raise ValueError(f"of {clients} clients some must train: the unseen pool cannot be {list(map(int, unseen))}")
    return {"seen": ids[~held_out], "unseen": ids[held_out]}


def sample(seed: int, round: int, clients: int | np.ndarray, size: int) -> np.ndarray:
    """[size] int32, ascending: the cohort of a round, drawn without replacement; pure in (seed, round).

    Args:
      seed: seed of the run.
      round: number of the round.
      clients: the pool, as a number of clients or as an array of ids.
      size: cohort size.

    Raises:
      ValueError: a cohort larger than the pool.
    """
    pool = np.arange(clients) if np.ndim(clients) == 0 else np.asarray(clients)
    if size > len(pool):
        raise ValueError(f"a cohort of {size} clients cannot be drawn from a pool of {len(pool)}")
    return np.sort(rng(seed, SAMPLE, round).choice(pool, size, replace=False)).astype(np.int32)


def dropped(seed: int, round: int, ids: np.ndarray, rate: float) -> np.ndarray:
    """[C] bool: clients that fail to report, each with probability `rate`; pure in (seed, round, id)."""
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout rate {rate} is not a probability in [0, 1]")
    return np.array([rng(seed, DROP, round, int(i)).random() < rate for i in ids], bool)


def rng(seed: int, stream: int, *identity: int) -> np.random.Generator:
    """Random numbers of a stream, named by up to two non-negative integers.

    Philox is counter-based: with the identity in the high words of the counter, no two generators overlap.
    """
    first, second = (*identity, 0, 0)[:2]
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, first, second, stream]))


def known(store: Store, ids: np.ndarray, *, padding: bool) -> np.ndarray:
    """`ids` as an array. ValueError for one that is not in the store; N is legal where `padding` is."""
    ids, clients = np.asarray(ids, np.int64).reshape(-1), len(sizes(store))
    wrong = (ids < 0) | (ids >= clients + padding)
    if wrong.any():
        raise ValueError(f"client id {ids[np.argmax(wrong)]} is not one of the store's {clients} clients")
    return ids


def map_labels(function: Callable[[np.ndarray], np.ndarray], labels: Any) -> Any:
    """Applies `function` to the label array, or to each array of a dict of them."""
    if isinstance(labels, dict):
        return {name: function(np.asarray(x)) for name, x in labels.items()}
    return function(np.asarray(labels))


def _check_labels(labels: np.ndarray, classes: int) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"label {labels[row]} of example {row} is not in [0, {classes})")


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _narrow(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32) if np.issubdtype(x.dtype, np.integer) else x


def _several(stores: Store | Sequence[Store]) -> Sequence[Store]:
    # A Store is itself a tuple, so only its type tells one from several.
    return [stores] if isinstance(stores, Store) else stores

"""Who holds what: partitions of a data set into clients, under the names that the field uses.

All partitioners have one form. They take the columns of every split, `{split: {column: [M]}}`, the first split being
the training set, and return for every split the row indices of each client, `{split: [rows of client 0, ..]}`. A client
gets the same proportions in all splits. Rows are in random order within a client; no row is dealt out twice.

Arguments that they share: `clients` is the number of clients and `label` the column of classes.
`seed` is the partition's own, independent of the seed of training, and the training rows of a client do not depend on
the other splits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_peft import settings as settings_lib
from fedjax_peft.data import dealing, federated
from fedjax_peft.data.dealing import Partition, Splits


def iid(splits: Splits, *, clients: int, seed: int) -> Partition:
    """One shuffle, then equal parts."""
    return dealing.by_shares(splits, np.full(dealing.at_least_one(clients), 1 / clients), seed)


def quantity_skew(splits: Splits, *, clients: int, seed: int, law: str = "lognormal", sigma: float = 1.0) -> Partition:
    """IID labels, unequal sizes.

    Args:
      law: of the sizes: 'linear' (1, 2, .. C), 'exponential' (e^(sigma c / C)) or 'lognormal' (deviation sigma).
      sigma: strength of the skew; not used by 'linear'.
    """
    position = np.arange(1, dealing.at_least_one(clients) + 1)
    laws = {
        "linear": lambda: position.astype(float),
        "exponential": lambda: np.exp(sigma * position / clients),
        "lognormal": lambda: np.random.default_rng(seed).lognormal(0.0, sigma, clients),
    }
    if law not in laws:
        raise ValueError(f"quantity_skew knows the laws {', '.join(laws)}, not {law!r}")
    weights = laws[law]()
    return dealing.by_shares(splits, weights / weights.sum(), seed)


def dirichlet(
    splits: Splits,
    *,
    clients: int,
    seed: int,
    alpha: float,
    label: str = "label",
    min_size: int = 10,
    balanced: bool = True,
    redraws: int = 1000,
    published: bool = False,
) -> Partition:
    """Each class is spread over the clients by its own draw from Dirichlet(alpha) (Hsu et al., 2019, arXiv 1909.06335).

    Args:
      alpha: concentration; small values give clients of few classes.
      min_size: the whole partition is redrawn until every client has as many training rows.
      balanced: a client that holds the average number of training rows gets nothing of the classes that follow.
      redraws: draws before giving up.
      published: deal a single split out as the code of FedAMoLE does, see `dealing.by_legacy_draws`.

    Raises:
      ValueError: `min_size` was not reached.
    """
    labels = dealing.column_of(splits, label)
    train, total = next(iter(labels)), len(next(iter(labels.values())))
    dealing.at_least_one(clients)
    failed = f"{alpha=} gave no partition of {total} rows with {min_size=} for each of {clients} clients"
    if clients * min_size > total:
        raise ValueError(f"{failed}: there are too few rows")
    if published:
        return dealing.by_legacy_draws(labels, clients, alpha, seed=seed, min_size=min_size, redraws=redraws)
    classes = np.unique(np.concatenate(list(labels.values())))
    rng = np.random.default_rng(seed)
    for _ in range(redraws):
        held, cuts = np.zeros(clients), []
        for c in classes:
            # Zeroing the shares of full clients and normalising the rest is a Dirichlet draw over the rest.
            takes = held < total / clients if balanced and (held < total / clients).any() else np.ones(clients, bool)
            shares = np.zeros(clients)
            shares[takes] = rng.dirichlet(np.full(takes.sum(), dealing.positive("alpha", alpha)))
            cuts.append(np.cumsum(shares)[:-1])
            held += np.diff(dealing.bounds(cuts[-1], (labels[train] == c).sum()))
        if held.min() >= min_size:
            return dealing.by_class(labels, classes, cuts, seed)
    raise ValueError(f"{failed} in {redraws} draws: raise alpha or lower min_size")


def pathological(splits: Splits, *, clients: int, seed: int, k: int, label: str = "label") -> Partition:
    """Each client has exactly k classes; a class is divided equally among the clients that have it.

    Args:
      k: classes of a client.

    Raises:
      ValueError: more classes than there are, or a class that no client would have.
    """
    labels = dealing.column_of(splits, label)
    classes = np.unique(np.concatenate(list(labels.values())))
    if not 1 <= k <= len(classes) or clients * k < len(classes):
        raise ValueError(f"{clients} clients of {k=} classes each cannot share {len(classes)} classes")
    rng = np.random.default_rng(seed)
    order, turns = rng.permutation(len(classes)), rng.permutation(clients)
    has = np.zeros((len(classes), clients))
    for turn, client in enumerate(turns):
        has[order[(turn * k + np.arange(k)) % len(classes)], client] = 1
    cuts = np.cumsum(has / has.sum(1, keepdims=True), 1)[:, :-1]
    return dealing.by_class(labels, classes, list(cuts), seed)


def shard(splits: Splits, *, clients: int, seed: int, shards: int = 2, label: str = "label") -> Partition:
    """Rows sorted by class are cut into equal shards, `shards` a client (McMahan et al., 2017, arXiv 1602.05629)."""
    labels = dealing.column_of(splits, label)
    train = next(iter(labels.values()))
    classes = np.unique(np.concatenate(list(labels.values())))
    counts = np.array([(train == c).sum() for c in classes])
    # A bound between shards lies at some fraction of a class; the other splits are cut there too.
    bounds = np.arange(1, dealing.at_least_one(clients) * shards) * len(train) / (clients * shards)
    before = np.cumsum(counts) - counts
    cuts = ((bounds - before[:, None]) / np.maximum(counts, 1)[:, None]).clip(0, 1)
    parts = dealing.by_class(labels, classes, list(cuts), seed)
    dealt = np.random.default_rng(seed).permutation(clients * shards).reshape(clients, shards)
    out = {}
    for i, (split, rows) in enumerate(parts.items()):
        rng = dealing.generator(seed, i, 1)
        out[split] = [rng.permutation(np.concatenate([rows[j] for j in mine])) for mine in dealt]
    return out


def label_sort(
    splits: Splits,
    *,
    clients: int,
    h: float,
    seed: int = 1234,
    label: str = "label",
    iid_splits: Sequence[str] = (),
) -> Partition:
    """A share 1 - h of every class is dealt out evenly, the rest sorted by class (SCAFFOLD, arXiv 1910.06378).

    Args:
      clients: number of clients; remainders of an equal division are left out.
      h: heterogeneity in [0, 1]; 0 is IID, 1 fully sorted. A similarity of s % is h = 1 - s / 100.
      iid_splits: splits that are dealt out with h = 0 instead.
    """
    if not 0 <= h <= 1:
        raise ValueError(f"label_sort needs h in [0, 1], got {h}")
    dealing.at_least_one(clients)
    out = {}
    for i, (split, labels) in enumerate(dealing.column_of(splits, label).items()):
        rng = dealing.generator(seed, i)
        even, ordered = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for c in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == c))
            size = round((1 - (0 if split in iid_splits else h)) * len(rows))
            even.append(rows[:size])
            ordered.append(rows[size:])
        pools = [rng.permutation(np.concatenate(even)), np.concatenate(ordered)]
        slices = [pool[: len(pool) // clients * clients].reshape(clients, -1) for pool in pools]
        out[split] = [rng.permutation(rows) for rows in np.concatenate(slices, 1)]
    return out


def by_column(splits: Splits, *, column: str, seed: int = 0, clients_per_value: int = 1) -> Partition:
    """Clients by the values of a column in ascending order: `clients_per_value` each, IID within a value."""
    values = dealing.column_of(splits, column)
    names = np.unique(values[next(iter(values))])
    shares = np.full(dealing.at_least_one(clients_per_value), 1 / clients_per_value)
    return dealing.by_value(values, names, shares, seed)


def natural_id(
    splits: Splits, *, column: str, seed: int = 0, min_size: int = 1, clients: int | None = None
) -> Partition:
    """A client an id, in ascending order.

    Args:
      column: of ids.
      seed: of the order of rows within a client.
      min_size: ids with fewer training rows are left out.
      clients: keeps the first so many ids.

    Raises:
      ValueError: fewer ids than `clients`.
    """
    values = dealing.column_of(splits, column)
    names, counts = np.unique(values[next(iter(values))], return_counts=True)
    names = names[counts >= min_size]
    wanted = len(names) if clients is None else clients
    if not 1 <= wanted <= len(names):
        raise ValueError(f"column {column!r} has {len(names)} ids with {min_size=} or more rows, not {max(wanted, 1)}")
    return dealing.by_value(values, names[:wanted], np.ones(1), seed)


def blocks(splits: Splits, *, clients: int, column: str, seed: int = 0) -> Partition:
    """Contiguous blocks of whole groups, e.g. articles in alphabetical order, with near-equal numbers of rows.

    A split whose groups all occur in the first one follows its blocks; another, e.g. of new articles, is cut by itself.

    Args:
      clients: number of clients, a block each.
      column: of groups, taken in ascending order.
      seed: of the order of rows within a client.

    Raises:
      ValueError: a split has fewer groups than clients.
    """
    values = dealing.column_of(splits, column)
    first, out = next(iter(values.values())), {}
    for i, (split, x) in enumerate(values.items()):
        names, counts = np.unique(first if np.isin(x, first).all() else x, return_counts=True)
        if not 1 <= clients <= len(names):
            raise ValueError(f"column {column!r} has {len(names)} groups in {split}, too few for {clients} clients")
        targets = np.arange(1, clients) * counts.sum() / clients
        nearest = np.abs(np.cumsum(counts) - targets[:, None]).argmin(1) + 1
        # A large group may be nearest to several targets, but every client needs a group of its own.
        turn = np.arange(clients - 1)
        bounds = np.minimum(np.maximum.accumulate(nearest - turn) + turn, len(names) - clients + turn + 1)
        owner = np.searchsorted(bounds, np.searchsorted(names, x), side="right")
        rng = dealing.generator(seed, i)
        out[split] = [rng.permutation(np.flatnonzero(owner == client)) for client in range(clients)]
    return out


def inner_dirichlet(splits: Splits, *, clients: int, seed: int, alpha: float, label: str = "label") -> Partition:
    """Clients of equal size, each with its own class mix drawn from Dirichlet(alpha).

    The clients draw one after another, without replacement; a class that is used up is drawn no more, so the last
    clients get what is left.

    Args:
      clients: number of clients; their sizes differ by one at most.
      alpha: concentration over classes.
    """
    return dealing.by_mixes(dealing.column_of(splits, label), clients, alpha, mix_seed=seed, row_seed=seed)


def by_column_dirichlet(
    splits: Splits,
    *,
    column: str,
    clients_per_value: int,
    seed: int,
    alpha: float,
    label: str = "label",
    pools: int = 1,
    rows_per_pool: dict[str, int] | None = None,
    parallel: bool = False,
    reuse_first_pool: bool = False,
    same_mixes: bool = False,
) -> Partition:
    """`inner_dirichlet` within each value of a column, e.g. a language, and within each pool (as FedP2EFT does).

    The rows of a value are shuffled and cut into as many parts as there are pools; each pool draws clients from its own
    part. Clients are ordered by pool, then value, then number: with two pools of 15 languages x 20 clients, ids 0..299
    are the first pool and 300..599 the second.

    Args:
      column: of values, taken in ascending order.
      clients_per_value: clients of each value in each pool.
      alpha: concentration over classes.
      pools: number of disjoint pools, e.g. 2 for seen and unseen clients.
      rows_per_pool: rows of a value that a pool takes, by split; without it, equal parts of all rows.
      parallel: the same draw for all values, so that client k has the same examples of a parallel corpus in all of
        them. Otherwise values have draws of their own.
      reuse_first_pool: later pools take the positions that were drawn on the first pool's labels. This repeats an
        inconsistency of the published code, which makes the later pools nearly IID; needs pools of equal size.
      same_mixes: all values and pools with as many classes draw their rows, each by itself, by one and the same set of
        mixes. This repeats an accident of the published code: unseen clients then have the mixes of seen ones.

    Raises:
      ValueError: a value has too few rows for its pools.
    """
    values, labels = dealing.column_of(splits, column), dealing.column_of(splits, label)
    out: Partition = {split: [] for split in splits}
    names = np.unique(values[next(iter(values))])
    for pool in range(dealing.at_least_one(pools)):
        for j, name in enumerate(names):
            stream = 0 if parallel else j
            here = {}
            for i, (split, x) in enumerate(values.items()):
                shuffled = dealing.generator(seed, i, stream).permutation(np.flatnonzero(x == name))
                size = (rows_per_pool or {}).get(split, len(shuffled) // pools)
                if size * pools > len(shuffled):
                    raise ValueError(f"{column} {name} has {len(shuffled)} {split} rows, not {pools} x {size}")
                here[split] = np.split(shuffled[: size * pools], pools)
            drawn = 0 if reuse_first_pool else pool
            chosen = dealing.by_mixes(
                {split: labels[split][parts[drawn]] for split, parts in here.items()},
                clients_per_value,
                alpha,
                mix_seed=[seed, 2, 0, 0] if same_mixes else [seed, 2, drawn, stream],
                row_seed=[seed, 2, drawn, stream],
            )
            for split, parts in here.items():
                out[split] += [parts[pool][rows] for rows in chosen[split]]
    return out


_BY_LABEL = (dirichlet, inner_dirichlet, pathological, shard, label_sort)
_BY_COLUMN = (by_column, by_column_dirichlet, natural_id, blocks)
ALL = {partitioner.__name__: partitioner for partitioner in (iid, quantity_skew, *_BY_LABEL, *_BY_COLUMN)}


def named(partition: Mapping[str, Any]) -> tuple[Callable[..., Partition], dict[str, Any]]:
    """The partitioner of that `name`, and its settings.

    Raises:
      ValueError: there is none of that name, or it cannot be called with these settings.
    """
    settings = dict(partition)
    name = settings.pop("name", None)
    if name not in ALL:
        raise ValueError(f"data.partition.name is {name!r}, which is no function of data/partition.py")
    settings_lib.check("data.partition", ALL[name], settings, positional=1)
    return ALL[name], settings


def client_names(
    partition: Mapping[str, Any], table: Mapping[str, np.ndarray], groups: Sequence[str], clients: Sequence[np.ndarray]
) -> tuple[str, ...]:
    """Names of clients: their ids, if `natural_id` made them, else those of `federated.names`.

    Args:
      partition: `name` of the partitioner and its settings.
      table: columns of the training rows.
      groups: of each client.
      clients: training rows of each client.
    """
    if partition["name"] == natural_id.__name__:
        return federated.groups(table, partition["column"], clients)
    return federated.names(groups)

"""Dealing out rows: shuffled, then cut at fractions. What partitioners share.

All splits are cut at the same fractions, so that a client gets its share of each, and every split has random numbers of
its own, so that its rows do not depend on other splits.
"""

from typing import Any

import numpy as np

Splits = dict[str, dict[str, np.ndarray]]
"""{split: {column: [M]}}, the training set first."""
Partition = dict[str, list[np.ndarray]]
"""{split: [rows of client 0, ..]}."""


def by_shares(splits: Splits, shares: np.ndarray, seed: int) -> Partition:
    """All rows at random, client c getting the share `shares[c]`; shares add up to 1."""
    cuts = np.cumsum(shares)[:-1]
    return {
        split: _parts(generator(seed, i), np.arange(len(next(iter(columns.values())))), cuts)
        for i, (split, columns) in enumerate(splits.items())
    }


def by_value(values: dict[str, np.ndarray], names: np.ndarray, shares: np.ndarray, seed: int) -> Partition:
    """The rows of each of the values in `names` by `shares`: clients of the first value, of the second .."""
    cuts = np.cumsum(shares)[:-1]
    return {
        split: [
            rows
            for j, name in enumerate(names)
            for rows in _parts(generator(seed, i, j), np.flatnonzero(x == name), cuts)
        ]
        for i, (split, x) in enumerate(values.items())
    }


def by_class(labels: dict[str, np.ndarray], classes: np.ndarray, cuts: list[np.ndarray], seed: int) -> Partition:
    """Cuts the rows of class c at the same fractions `cuts[c]` in every split."""
    out = {}
    for i, (split, x) in enumerate(labels.items()):
        rng = generator(seed, i)
        parts = [_parts(rng, np.flatnonzero(x == c), cut) for c, cut in zip(classes, cuts, strict=True)]
        out[split] = [rng.permutation(np.concatenate(rows)) for rows in zip(*parts, strict=True)]
    return out


def by_legacy_draws(
    labels: dict[str, np.ndarray], clients: int, alpha: float, *, seed: int, min_size: int, redraws: int
) -> Partition:
    """What the code of FedAMoLE (arXiv 2411.19128) deals out by Dirichlet(alpha), from numpy's legacy generator.

    Raises:
      ValueError: several splits, whose rows that code does not know, or clients with fewer rows than `min_size`.
    """
    if len(labels) > 1:
        raise ValueError(f"published draws deal out a single split, not {', '.join(labels)}")
    ((split, x),) = labels.items()
    rng = np.random.RandomState(seed)
    for _ in range(redraws):
        held = [np.zeros(0, np.int64)] * clients
        for c in np.unique(x):
            rows = rng.permutation(np.flatnonzero(x == c))
            shares = rng.dirichlet(np.full(clients, positive("alpha", alpha)))
            shares *= [len(own) < len(x) / clients for own in held]
            parts = np.split(rows, (np.cumsum(shares / shares.sum())[:-1] * len(rows)).astype(np.int64))
            held = [np.concatenate(pair) for pair in zip(held, parts, strict=True)]
        if min(map(len, held)) >= min_size:
            return {split: [rng.permutation(own) for own in held]}
    raise ValueError(f"{redraws} published draws left clients with fewer rows than {min_size=}: raise alpha")


def by_mixes(labels: dict[str, np.ndarray], clients: int, alpha: float, *, mix_seed: Any, row_seed: Any) -> Partition:
    """Clients of equal size that draw rows one after another, each by a mix of classes from Dirichlet(alpha)."""
    classes = np.unique(np.concatenate(list(labels.values())))
    concentration = np.full(len(classes), positive("alpha", alpha))
    mixes = np.random.default_rng(mix_seed).dirichlet(concentration, at_least_one(clients))
    return {split: _drawn(generator(row_seed, i), x, classes, mixes) for i, (split, x) in enumerate(labels.items())}


def bounds(cuts: np.ndarray, size: int) -> np.ndarray:
    """Bounds of the parts of `size` rows that are cut at the given fractions."""
    # 1/3 of 3 rows is 1 row, also where the fraction was rounded down a little.
    return np.concatenate([[0], np.floor(cuts * size + 1e-9).astype(np.int64).clip(0, size), [size]])


def generator(seed: Any, *stream: int) -> np.random.Generator:
    """Numbers for one split, so that its rows do not depend on other splits; 1 parts them from shared draws."""
    return np.random.default_rng([*np.atleast_1d(seed), 1, *stream])


def column_of(splits: Splits, column: str) -> dict[str, np.ndarray]:
    """A column of every split: {split: [M]}."""
    for split, columns in splits.items():
        if column not in columns:
            raise ValueError(f"split {split!r} has no column {column!r}, only {', '.join(columns)}")
    return {split: np.asarray(columns[column]) for split, columns in splits.items()}


def at_least_one(count: int) -> int:
    if count < 1:
        raise ValueError(f"a partition needs 1 client or more, got {count}")
    return count


def positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def _parts(rng: np.random.Generator, rows: np.ndarray, cuts: np.ndarray) -> list[np.ndarray]:
    return np.split(rng.permutation(rows), bounds(cuts, len(rows))[1:-1])


def _drawn(rng: np.random.Generator, labels: np.ndarray, classes: np.ndarray, mixes: np.ndarray) -> list[np.ndarray]:
    """Rows of each client: equal sizes, classes by `mixes` [C, K] as far as they last."""
    stacks = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    left = np.array([len(stack) for stack in stacks])
    sizes = len(labels) // len(mixes) + (np.arange(len(mixes)) < len(labels) % len(mixes))
    out = []
    for mix, size in zip(mixes, sizes, strict=True):
        taken = np.zeros_like(left)
        while taken.sum() < size:
            # The small constant lets a client whose own classes are used up take others.
            chance = np.where(left > taken, mix + 1e-5, 0.0)
            taken += rng.multinomial(size - taken.sum(), chance / chance.sum())
            taken = np.minimum(taken, left)
        rows = [stack[n - t : n] for stack, n, t in zip(stacks, left, taken, strict=True)]
        out.append(rng.permutation(np.concatenate(rows)))
        left = left - taken
    return out

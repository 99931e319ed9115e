"""What the loop writes down: a line a round, rows of clients at each point of evaluation, and their summary."""

import resource
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft import evaluate, summaries
from fedjax_peft.runs import Clients
from fedjax_peft.types import Cohort, PyTree

TRAVELLED = ("received", "sent")
"""Metrics of a client where not all have as much traffic: numbers of four bytes."""


class Pending(NamedTuple):
    """A round that is on the device."""

    round: int
    traffic: tuple[int, int]  # bytes that one client receives and sends
    cohort: Cohort
    metrics: PyTree
    told: Any  # [P, 3] of each process: tokens of examples, tokens computed, whether it was asked to stop


def line(pending: Pending, clients: Clients, since: float) -> dict[str, Any]:
    """What rounds.jsonl says of a round; waits for the device."""
    cohort, outcome, told = jax.device_get((pending.cohort, pending.metrics, pending.told))
    index, real = pending.round, cohort.ids < len(clients.names)
    tokens, computed = told.astype(np.int64)[:, :2].sum(axis=0).tolist()
    broken = [clients.names[i] for i in cohort.ids[real & ~outcome["finite"]]]
    if broken and not cohort.reported.any():
        raise ValueError(
            f"round {index}: the numbers of all {len(broken)} clients that trained are not finite "
            f"({', '.join(broken[:5])}{' ..' * (len(broken) > 5)}); "
            f"a smaller learning rate or clipping may help"
        )
    weights = cohort.examples * cohort.reported
    means = {
        name: float(np.average(np.where(cohort.reported, values, 0.0), weights=weights)) if weights.any() else None
        for name, values in outcome["clients"].items()
        if name not in TRAVELLED
    }
    seconds = time.monotonic() - since
    down, up = _traffic(pending, cohort, outcome["clients"], real)
    return {
        "round": index,
        "tokens": tokens,
        "tokens_computed": computed,
        **means,
        **{name: float(value) for name, value in outcome["server"].items()},
        "clients": int(real.sum()),
        "reported": int(cohort.reported.sum()),
        "not_finite": broken,
        "bytes_down": down,
        "bytes_up": up,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "padding_waste": 1 - tokens / max(computed, 1),
        "peak_bytes": _peak_bytes(),
    }


def _traffic(pending, cohort, told, real) -> tuple[int, int]:
    """Bytes that all clients of a round received and sent; those that dropped out received as much as any may."""
    reported = int(cohort.reported.sum())
    if not told.keys() >= set(TRAVELLED):
        return pending.traffic[0] * int(real.sum()), pending.traffic[1] * reported
    down, up = (4 * int(np.sum(told[name], where=cohort.reported, dtype=np.float64)) for name in TRAVELLED)
    return down + pending.traffic[0] * (int(real.sum()) - reported), up


def _peak_bytes() -> int:
    """Most memory held so far: of the accelerator where it says, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _identity(clients, client, index, pool, point) -> dict[str, Any]:
    """The columns that say what a row is about."""
    return {
        "round": index,
        "client": int(client),
        "name": clients.names[client],
        "group": clients.groups[client],
        "pool": pool,
        "point": point,
    }


def strategies(
    scores: evaluate.Scores, clients: Clients, index: int, pool: str, point: str, sites: Sequence[str]
) -> list[dict[str, Any]]:
    """Those of strategies.parquet, one a client and site."""
    return [
        {
            **_identity(clients, client, index, pool, point),
            "site": site,
            **{name: values[place, row].tolist() for name, values in scores.described.items()},
        }
        for place, client in enumerate(scores.ids)
        for row, site in enumerate(sites)
    ]


def rows(
    scores: evaluate.Scores, clients: Clients, index: int, pool: str, point: str, averaged: Sequence[str]
) -> list[dict[str, Any]]:
    """Those of clients.parquet, one a client; `averaged` is of what is described of each site."""
    return [
        {
            **_identity(clients, client, index, pool, point),
            "train_examples": int(clients.examples[client]),
            "examples": int(scores.examples[place]),
            "majority": float(clients.majority[client]),
            **{name: float(values[place]) for name, values in scores.metrics.items()},
            **{name: float(scores.described[name][place].mean()) for name in averaged},
        }
        for place, client in enumerate(scores.ids)
    ]


def summary(
    rows: list[dict[str, Any]], pooled: list[dict[str, Any]], points: Sequence[str], total: int
) -> dict[str, Any]:
    """pool -> point -> statistics, of the untrained model (`base`) and of the points after the `total` rounds."""
    fixed = ("round", "client", "name", "group", "pool", "point", "train_examples", "examples", "majority")
    names = [name for name in rows[0] if name not in fixed] if rows else []
    pools: dict[str, Any] = {}
    for pool in dict.fromkeys(row["pool"] for row in rows):
        wanted = {"base": (0, "global")} | {point: (total, point) for point in points}

        def chosen(table, key, pool=pool):
            return [row for row in table if (row["pool"], row["round"], row["point"]) == (pool, *key)]

        pools[pool] = {
            point: summaries.summarize(own, names, chosen(pooled, key))
            for point, key in wanted.items()
            if (own := chosen(rows, key))
        }
    return {"rounds": total, "pools": pools}

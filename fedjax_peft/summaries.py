"""Statistics over clients, on the host."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LESS_IS_BETTER = ("loss", "ter")


def summarize(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], pooled: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Statistics over clients of one pool at one point.

    Args:
      rows: one mapping a client, with `examples`, `group` and the metrics.
      metrics: names to summarize.
      pooled: what `evaluate.pooled` returned, for metrics whose value over all examples is not the average of clients'
        values.

    Returns:
      For each metric the mean over clients, their standard deviation, the mean of the worst tenth (the highest, where
      less is better), the value over all examples, and that over the examples of each group; beside them the numbers of
      clients and examples.
    """
    rows = [row for row in rows if row["examples"]]
    if not rows:
        return {"clients": 0, "examples": 0}
    examples = np.array([row["examples"] for row in rows], np.float64)
    groups = sorted({row["group"] for row in rows})
    known = {row["group"]: row for row in pooled}

    def whole(name, values, group=None):
        if name in known.get(group, ()):
            return float(known[group][name])
        members = [group in (None, row["group"]) for row in rows]
        return float(np.average(values[members], weights=examples[members]))

    summary: dict[str, Any] = {"clients": len(rows), "examples": int(examples.sum())}
    for name in metrics:
        values = np.array([row[name] for row in rows], np.float64)
        worst_first = np.sort(values)[:: -1 if name in LESS_IS_BETTER else 1]
        summary[name] = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "worst_10_percent": float(worst_first[: -(-len(values) // 10)].mean()),
            "pooled": whole(name, values),
            "groups": {group: whole(name, values, group) for group in groups},
        }
    return summary


def headline(point: Mapping[str, Any]) -> str:
    """The metric that a point of `summarize` is known by: the first that is no loss, if there is one."""
    names = [name for name, value in point.items() if isinstance(value, Mapping)]
    return next((name for name in names if name != "loss"), "loss")

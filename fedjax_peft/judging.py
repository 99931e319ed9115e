"""Evaluations of a run: all clients at one point after another, and the rows that this leaves."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from fedjax_peft import evaluate, metrics, records
from fedjax_peft.runs import Clients, Point, Problem
from fedjax_peft.types import Algorithm, Array, PyTree

NAMED = 5  # most clients that a warning names

logger = logging.getLogger(__name__)


def make_judge(
    problem: Problem,
    clients: Clients,
    workdir: epath.Path,
    fresh: Callable[[Algorithm], tuple[PyTree, Any]],
    *,
    chunk: int,
    root: Array,
) -> Callable[[PyTree, Any, int, Mapping[str, Point]], None]:
    """What evaluates all pools and writes their rows: (server, population, round, {name: point}) -> None.

    Args:
      problem, clients: of the run.
      workdir: the run directory.
      fresh: (algorithm) -> (server, population), for points that do not read those of the run.
      chunk: clients that a device works on at once.
      root: key of everything random.
    """
    judges, starts = {}, {}
    averaged = problem.strategy.averaged if problem.strategy else ()

    def make(algorithm):
        return evaluate.make_evaluate(
            algorithm,
            problem.model,
            problem.task,
            problem.mesh,
            chunk=chunk,
            items=clients.tests,
            describe=problem.strategy.describe if problem.strategy else lambda adapters: (),
            answers=problem.answers,
        )

    def judge(server, people, index, points):
        for name, (algorithm, support, trained) in points.items():
            since = time.monotonic()
            if algorithm not in judges:
                judges[algorithm] = make(algorithm)
            if not trained and algorithm not in starts:
                starts[algorithm] = fresh(algorithm)
            own = (server, people) if trained else starts[algorithm]
            rows, strategies, pooled = [], [], []
            for pool, ids in clients.pools.items():
                scores = judges[algorithm](problem.base, *own, ids, support, index, root)
                rows += records.rows(scores, clients, index, pool, name, averaged)
                groups = [clients.groups[client] for client in scores.ids]
                about = {"round": index, "pool": pool, "point": name}
                pooled += [about | row for row in evaluate.pooled(scores, groups, problem.task)]
                # What is described of each site says nothing of clients that share one model, but spectra do.
                if problem.strategy and (averaged or name != "global"):
                    strategies += records.strategies(scores, clients, index, pool, name, problem.strategy.sites)
            if strategies:
                metrics.merge_rows(workdir / "strategies.parquet", strategies, index)
            if pooled:
                metrics.merge_rows(workdir / "pooled.parquet", pooled, index)
            metrics.merge_rows(workdir / "clients.parquet", rows, index)
            _warn(rows, name, index)
            logger.info("evaluated %s at round %d in %.0f s", name, index, time.monotonic() - since)

    return judge


def _warn(rows: Sequence[Mapping[str, Any]], point: str, index: int) -> None:
    """Names the clients whose loss is no number: statistics of many do not show that."""
    broken = [row["name"] for row in rows if row["examples"] and not math.isfinite(row["loss"])]
    if broken:
        names = ", ".join(broken[:NAMED]) + " .." * (len(broken) > NAMED)
        logger.warning("%s at round %d: the loss of %d clients is not finite (%s)", point, index, len(broken), names)

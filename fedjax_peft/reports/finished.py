"""Finished runs, read back from their directories, and the names of the points that clients were evaluated at."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from fedjax_peft import manifest, metrics, summaries

SHOWN = ("evaluate.every", "evaluate.base", "evaluate.end", "evaluate.points")


class Run(NamedTuple):
    """A finished run directory."""

    workdir: epath.Path
    name: str  # of its method: `run.title`, or the algorithm's
    base: epath.Path  # the directory of stage 1, if there was one
    experiment: dict[str, Any]  # its `settings`
    sha256: dict[str, str]
    rounds: int
    pools: dict[str, Any]  # of summary.json: pool -> point -> statistics
    metric: str  # the headline
    points: tuple[str, ...]  # in which clients are personalized, the headline first

    def statistics(self, pool: str, point: str) -> dict[str, Any]:
        """Statistics of the headline metric, with the unweighted mean over groups beside the mean over clients."""
        found = self.pools[pool][point][self.metric]
        return found | {"over_groups": float(np.mean(list(found["groups"].values())))}

    def before(self) -> tuple[str, ...]:
        """Points before personalization that there are. Without rounds the global model is the base."""
        known = next(iter(self.pools.values()))
        return tuple(point for point in ("base", "global")[: 2 if self.rounds else 1] if point in known)


def read(workdir: epath.PathLike) -> Run:
    """The run of a directory.

    Raises:
      ValueError: the directory holds no finished run, or one that personalized nobody.
    """
    workdir = epath.Path(workdir)
    for name in ("manifest.json", "clients.parquet", "summary.json"):
        if not (workdir / name).exists():
            raise ValueError(f"workdir {workdir} has no finished run: {name} is missing")
    found, summary = manifest.read(workdir), metrics.read_json(workdir / "summary.json")
    first = next(iter(summary["pools"].values()), {})
    points = tuple(point for point in first if point not in ("base", "global"))
    if not points:
        raise ValueError(
            f"workdir {workdir} has no personalized clients: summary.json has no point but base and global"
        )
    metric = summaries.headline(first[points[0]])
    experiment = settings(found)
    base = epath.Path(found["run"].get("base_workdir") or workdir / "base")
    return Run(
        workdir, name_of(found), base, experiment, found["sha256"], summary["rounds"], summary["pools"], metric, points
    )


def check_once(runs: Sequence[Any], key: Callable[[Any], Any]) -> None:
    """Raises ValueError for two of the `runs`, each with a `workdir`, that are the same by `key`."""
    for place, run in enumerate(runs):
        for other in runs[:place]:
            if key(run) == key(other):
                raise ValueError(f"workdirs {other.workdir} and {run.workdir} hold the same run: give one of them")


def ended(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of clients.parquet or strategies.parquet without those of the run's points on the way."""
    return [row for row in rows if row["round"] == run.rounds or row["point"] not in run.points]


def name_of(written: Mapping[str, Any]) -> str:
    """What tables call the method of a run with this manifest."""
    return written["run"].get("title") or written["experiment"]["algorithm"]["name"]


def settings(written: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment of a manifest with dotted keys, but for what is evaluated when, which changes no result."""
    flat = traverse_util.flatten_dict(written["experiment"], sep=".")
    return {key: value for key, value in flat.items() if key not in SHOWN}


def seeds(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is one of several by: its own seed, and that of the division of its data."""
    return {key: value for key, value in experiment.items() if key == "seed" or re.fullmatch(r"data\.(.*\.)?seed", key)}


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds and their sample deviation, n - 1 below, which one alone does not have."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def split(point: str) -> tuple[str, int | None]:
    """(method, budget) of a point's name: `lora r4` is `lora` at 4 ranks a site; other names have no budget."""
    found = re.fullmatch(r"(.+) r(\d+)", point)
    return (found[1], int(found[2])) if found else (point, None)


def side_by_side(points: Sequence[str], most: int) -> list[Sequence[str]]:
    """Points that share a table: all of them if they fit, else those of each budget."""
    if len(points) <= most:
        return [points]
    parts: dict[int | None, list[str]] = {}
    for point in points:
        parts.setdefault(split(point)[1], []).append(point)
    return [part[start : start + most] for part in parts.values() for start in range(0, len(part), most)]

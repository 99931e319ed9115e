"""What finished runs came to: a table and pictures of one, a table of several."""

import collections
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from fedjax_peft import console, evaluate, metrics

ROWS = 60  # most rows of groups that `show` prints


class _Run(NamedTuple):
    """A finished run directory."""

    workdir: epath.Path
    experiment: dict[str, Any]  # config with dotted keys
    sha256: dict[str, str]
    rounds: int
    pools: dict[str, Any]  # of summary.json: pool -> point -> statistics
    metric: str  # the headline


def show(workdir: epath.PathLike) -> None:
    """Prints the table of a finished run, a row a group, and writes its pictures.

    Raises:
      ValueError: the directory holds no finished run.
    """
    run = _read(workdir)
    name, rows = run.experiment["algorithm.name"], metrics.read_rows(run.workdir / "clients.parquet")
    columns, table = _table(run, rows)
    console.table(f"{_title(run.metric)} after {run.rounds} rounds of {name}", columns, table)
    # Late, so that the table does not wait for matplotlib.
    from fedjax_peft import plots

    lines = metrics.read_lines(run.workdir / "rounds.jsonl")
    plots.write(run.workdir / "plots", lines, rows, algorithm=name, metric=run.metric, total=run.rounds)
    print(f"all results are in {run.workdir}, pictures in {run.workdir / 'plots'}")


def compare(workdirs: Sequence[epath.PathLike]) -> None:
    """Prints one table of finished runs, a row a method and pool; runs that differ only in their seed are averaged.

    Raises:
      ValueError: a directory holds no finished run, two hold the same run, or the runs have different metrics.
    """
    runs = [_read(workdir) for workdir in workdirs]
    for run in runs[1:]:
        if run.metric != runs[0].metric:
            a, b = (f"{one.workdir} has {one.metric}" for one in (runs[0], run))
            raise ValueError(f"runs to compare need the same metric, but {a} and {b}")
    methods = _methods(runs)
    table = [
        [method, pool, len(members), members[0].pools[pool]["personal"]["clients"], *_over_seeds(members, pool)]
        for pool in dict.fromkeys(pool for run in runs for pool in run.pools)
        for method, members in methods.items()
        if pool in members[0].pools
    ]
    several = any(len(members) > 1 for members in methods.values())
    over = "; mean ± standard deviation over seeds" if several else ""
    columns = ["method", "pool", "seeds", "clients", "before", "mean", "std", "pooled", "worst 10 %"]
    console.table(f"{_title(runs[0].metric)} of clients, personalized and (mean) before{over}", columns, table)
    for part in ("base", "test"):
        if len({run.sha256.get(part) for run in runs}) > 1:
            print(f"these runs are hard to compare: they differ in the SHA-256 of {part}")


def _title(metric: str) -> str:
    return metric.replace("_", " ").capitalize()


def _read(workdir: epath.PathLike) -> _Run:
    workdir = epath.Path(workdir)
    for name in ("manifest.json", "clients.parquet", "summary.json"):
        if not (workdir / name).exists():
            raise ValueError(f"workdir {workdir} has no finished run: {name} is missing")
    manifest, summary = (metrics.read_json(workdir / name) for name in ("manifest.json", "summary.json"))
    statistics = next(iter(summary["pools"].values()))["personal"]
    names = [name for name, value in statistics.items() if isinstance(value, Mapping)]
    metric = next((name for name in names if name != "loss"), "loss")
    experiment = traverse_util.flatten_dict(manifest["experiment"], sep=".")
    return _Run(workdir, experiment, manifest["sha256"], summary["rounds"], summary["pools"], metric)


def _table(run: _Run, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each group pooled over its examples, then statistics over the clients of each pool."""
    last = [row for row in rows if (row["round"], row["point"]) == (run.rounds, "personal")]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in last:
        groups.setdefault((row["pool"], row["group"]), []).append(row)
    columns = {"base": "base", "global": run.experiment["algorithm.name"], "personal": "personalized"}
    if run.metric == "accuracy":
        columns = {"majority": "majority"} | columns
    table = []
    for pool, points in run.pools.items():
        members = [row for row in last if row["pool"] == pool]
        of = {"majority": _majority(members)} | {point: values[run.metric] for point, values in points.items()}
        found = [of[point] for point in columns]
        parts = {group: part for (of_pool, group), part in groups.items() if of_pool == pool}
        if len(groups) <= ROWS:
            for group, part in parts.items():
                table.append([group, pool, *_counts(part), *(values["groups"].get(group, "–") for values in found)])
        name = f"mean over {points['personal']['clients']} clients"
        table.append([name, pool, *_counts(members), *(values["mean"] for values in found)])
        table.append(["standard deviation", pool, "", "", *(values["std"] for values in found)])
        table.append(["worst 10 %", pool, "", "", *(values["worst_10_percent"] for values in found)])
    return ["group", "pool", "train", "test", *columns.values()], table


def _counts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [sum(row[name] for row in rows) for name in ("train_examples", "examples")]


def _majority(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of always answering the most frequent training label, where that is known."""
    known = [row for row in rows if row["examples"] and not math.isnan(row["majority"])]
    unknown = {"mean": "–", "std": "–", "worst_10_percent": "–", "groups": {}}
    return evaluate.summarize(known, ["majority"])["majority"] if known else unknown


def _methods(runs: Sequence[_Run]) -> dict[str, list[_Run]]:
    """Runs of the same experiment but for the seed, under the algorithm's name and what else sets them apart."""
    same: dict[str, list[_Run]] = {}
    for run in runs:
        key = json.dumps({**run.experiment, "seed": None}, sort_keys=True)
        for other in same.setdefault(key, []):
            if other.experiment["seed"] == run.experiment["seed"]:
                raise ValueError(f"workdirs {other.workdir} and {run.workdir} hold the same run: give one of them")
        same[key].append(run)
    experiments = [members[0].experiment for members in same.values()]
    return {_label(members[0].experiment, experiments): members for members in same.values()}


def _label(experiment: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The algorithm's name, and the settings in which experiments with the same algorithm differ."""
    name = experiment["algorithm.name"]
    rivals = [other for other in others if other["algorithm.name"] == name]
    keys = sorted(set().union(*rivals) - {"seed"})
    endings = collections.Counter(key.split(".")[-1] for key in keys)
    for key in keys:
        if any(rival.get(key) != experiment.get(key) for rival in rivals):
            ending = key.split(".")[-1]
            name += f" {ending if endings[ending] == 1 else key}={experiment.get(key)}"
    return name


def _over_seeds(runs: Sequence[_Run], pool: str) -> list[str]:
    """Statistics of a pool: the mean before personalization; mean, deviation, pooled and worst tenth after it."""
    wanted = [("global", "mean"), *(("personal", name) for name in ("mean", "std", "pooled", "worst_10_percent"))]
    values = np.array([[run.pools[pool][point][run.metric][name] for point, name in wanted] for run in runs])
    if len(runs) == 1:
        return [f"{value:.3f}" for value in values[0]]
    pairs = zip(values.mean(axis=0), values.std(axis=0, ddof=1), strict=True)
    return [f"{mean:.3f}±{deviation:.3f}" for mean, deviation in pairs]

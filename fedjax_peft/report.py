"""What finished runs came to: a table and pictures of one, a table of several."""

import collections
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from fedjax_peft import console, evaluate, metrics

ROWS = 60  # most rows of groups that `show` prints
COLUMNS = {"one": 8, "seeds": 6}  # most points side by side, with one number a cell and with a deviation over seeds
ROOM = 3  # most points beside which examples and the majority label have room
GROUPS = 20  # most rows of groups that `compare` prints


class _Run(NamedTuple):
    """A finished run directory."""

    workdir: epath.Path
    base: epath.Path  # the directory of stage 1, if there was one
    experiment: dict[str, Any]  # config with dotted keys
    sha256: dict[str, str]
    rounds: int
    pools: dict[str, Any]  # of summary.json: pool -> point -> statistics
    metric: str  # the headline
    points: tuple[str, ...]  # in which clients are personalized, the headline first

    def statistics(self, pool: str, point: str) -> dict[str, Any]:
        """Statistics of the headline metric, with the unweighted mean over groups beside the mean over clients."""
        found = self.pools[pool][point][self.metric]
        return found | {"over_groups": float(np.mean(list(found["groups"].values())))}


def show(workdir: epath.PathLike) -> None:
    """Prints the tables of a finished run, a row a group, and writes its pictures.

    Raises:
      ValueError: the directory holds no finished run.
    """
    summary = metrics.read_json(epath.Path(workdir) / "summary.json")
    if summary is not None and "methods" in summary:
        return _show_recovery(epath.Path(workdir), summary["methods"])
    run = _read(workdir)
    name, rows = run.experiment["algorithm.name"], metrics.read_rows(run.workdir / "clients.parquet")
    title = _title(run.metric) + (f" after {run.rounds} rounds" if run.rounds else "") + f" of {name}"
    if len(run.points) == 1:
        console.table(title, *_table(run, rows))
    else:
        for pool in run.pools:
            for points in _side_by_side(run.points, COLUMNS["one"]):
                console.table(f"{title}: {pool} clients", *_table_of_points(run, rows, pool, points))
        if any(split(point)[1] for point in run.points):
            console.table(f"{_title(run.metric)}, mean over groups", *_table_of_budgets(run))
    _draw(run, rows)
    print(f"all results are in {run.workdir}, pictures in {run.workdir / 'plots'}")


def _show_recovery(workdir: epath.Path, methods: Mapping[str, Any]) -> None:
    """The table and pictures of a synthetic study (`rank_recovery`): learnt against true ranks."""
    from fedjax_peft import plots  # late, because matplotlib takes a second

    true_ranks, rows = next(iter(methods.values()))["true_ranks"][0], []
    for name, found in methods.items():
        loss, ranks, true = (np.array(found[key]) for key in ("loss", "ranks", "true_ranks"))
        hits = int((ranks == true).all(axis=1).sum())
        often = [collections.Counter(column).most_common(1)[0][0] for column in ranks.T.tolist()]
        losses = [f"{value:.1e}" for value in np.median(loss, axis=0)]
        rows.append([name, *often, f"{hits} of {len(ranks)}", *losses])
    clients = range(1, len(true_ranks) + 1)
    columns = ["method", *(f"rank {client}" for client in clients), "both right"]
    columns += [f"loss {client}" for client in clients]
    title = f"most frequent learnt ranks (true: {', '.join(map(str, true_ranks))}) and median losses of the clients"
    console.table(title, columns, rows)
    with (workdir / "curves.npz").open("rb") as file:
        plots.write_recovery(workdir / "plots", dict(np.load(file)), true_ranks, tuple(methods))
    print(f"all results are in {workdir}, pictures in {workdir / 'plots'}")


def compare(workdirs: Sequence[epath.PathLike]) -> None:
    """Prints one table of finished runs, a row a method and pool; runs that differ only in their seed are averaged.

    Where clients are personalized in several ways, a row is one of them, and tables of groups follow if they are few.

    Raises:
      ValueError: a directory holds no finished run, two hold the same run, or the runs have different metrics.
    """
    runs = [_read(workdir) for workdir in workdirs]
    for run in runs[1:]:
        if run.metric != runs[0].metric:
            a, b = (f"{one.workdir} has {one.metric}" for one in (runs[0], run))
            raise ValueError(f"runs to compare need the same metric, but {a} and {b}")
    methods = _methods(runs)
    several = any(len(members) > 1 for members in methods.values())
    over = "; mean ± standard deviation over seeds" if several else ""
    if all(run.points == ("personal",) for run in runs):
        title = f"{_title(runs[0].metric)} of clients, personalized and (mean) before{over}"
        console.table(title, *_table_of_methods(methods))
    else:
        _compare_points(methods, f"{_title(runs[0].metric)}{over}", COLUMNS["seeds" if several else "one"])
    for part in ("base", "test"):
        if len({run.sha256.get(part) for run in runs}) > 1:
            print(f"these runs are hard to compare: they differ in the SHA-256 of {part}")


def split(point: str) -> tuple[str, int | None]:
    """(method, budget) of a point's name: `lora r4` is `lora` at 4 ranks a site; other names have no budget."""
    found = re.fullmatch(r"(.+) r(\d+)", point)
    return (found[1], int(found[2])) if found else (point, None)


def _title(metric: str) -> str:
    return metric.replace("_", " ").capitalize()


def _read(workdir: epath.PathLike) -> _Run:
    workdir = epath.Path(workdir)
    for name in ("manifest.json", "clients.parquet", "summary.json"):
        if not (workdir / name).exists():
            raise ValueError(f"workdir {workdir} has no finished run: {name} is missing")
    manifest, summary = (metrics.read_json(workdir / name) for name in ("manifest.json", "summary.json"))
    first = next(iter(summary["pools"].values()), {})
    points = tuple(point for point in first if point not in ("base", "global"))
    if not points:
        raise ValueError(
            f"workdir {workdir} has no personalized clients: summary.json has no point but base and global"
        )
    metric = evaluate.headline(first[points[0]])
    experiment = traverse_util.flatten_dict(manifest["experiment"], sep=".")
    base = epath.Path(manifest.get("run", {}).get("base_workdir") or workdir / "base")
    return _Run(workdir, base, experiment, manifest["sha256"], summary["rounds"], summary["pools"], metric, points)


def _draw(run: _Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the pictures of a run, and those of its budgets where it has some."""
    # Late, so that the table does not wait for matplotlib.
    from fedjax_peft import plots

    name, lines = run.experiment["algorithm.name"], metrics.read_lines(run.workdir / "rounds.jsonl")
    folder, headline = run.workdir / "plots", run.points[0]
    plots.write(folder, lines, rows, algorithm=name, metric=run.metric, total=run.rounds, point=headline)
    path = run.workdir / "strategies.parquet"
    strategies = metrics.read_rows(path) if path.exists() else []
    if rows and "rank_sum" in rows[0]:
        plots.write_spectra(folder, rows, strategies, algorithm=name, point=headline)
    if strategies and "experts" in strategies[0]:
        plots.write_experts(folder, strategies, algorithm=name, point=headline)
    method = split(headline)[0]
    budgets = [budget for other, budget in map(split, run.points) if budget and other == method]
    if not budgets:
        return
    scores = {
        pool: {split(point): run.statistics(pool, point)["over_groups"] for point in _before(run)[:1] + run.points}
        for pool in run.pools
    }
    # The smallest budget shows most: ranks that it keeps are kept at every larger one too.
    plots.write_budgets(folder, strategies, scores, method=method, budget=min(budgets), metric=run.metric)


def _before(run: _Run) -> tuple[str, ...]:
    """Points before personalization. Without rounds the global model is the base, and some methods have none."""
    has_global = run.rounds and "global" in next(iter(run.pools.values()))
    return ("base", "global") if has_global else ("base",)


def _side_by_side(points: Sequence[str], most: int) -> list[Sequence[str]]:
    """Points that share a table: all of them if they fit, else those of each budget."""
    if len(points) <= most:
        return [points]
    parts: dict[int | None, list[str]] = {}
    for point in points:
        parts.setdefault(split(point)[1], []).append(point)
    return [part[start : start + most] for part in parts.values() for start in range(0, len(part), most)]


def _table_of_points(
    run: _Run, rows: Sequence[Mapping[str, Any]], pool: str, points: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: a row a group, then statistics over clients and over groups; a column a point.

    Few points leave room for what groups are: examples, majority label and what stage 1 began with.
    """
    members = [row for row in rows if (row["pool"], row["point"]) == (pool, points[0])]
    columns = {point: run.statistics(pool, point) for point in (*_before(run), *points)}
    groups = list(columns["base"]["groups"])
    counts: list[str] = []
    if len(points) <= ROOM:
        counts = ["train", "test"]
        columns = _untrained(run, pool) | columns
        if run.metric == "accuracy":
            majority = _majority(members)
            known = list(majority["groups"].values())
            columns = {"majority": majority | {"over_groups": float(np.mean(known)) if known else "–"}} | columns
    found = list(columns.values())
    statistics = {
        f"mean over {run.pools[pool][points[0]]['clients']} clients": "mean",
        f"mean over {len(groups)} groups": "over_groups",
        "standard deviation": "std",
        "worst 10 %": "worst_10_percent",
    }
    table = []
    for group in groups if len(groups) <= ROWS else ():
        own = _counts([row for row in members if row["group"] == group])[: len(counts)]
        table.append([group, *own, *(values["groups"].get(group, "–") for values in found)])
    for name, key in statistics.items():
        own = (_counts(members) if key == "mean" else ["", ""])[: len(counts)]
        table.append([name, *own, *(values[key] for values in found)])
    return ["group", *counts, *columns], table


def _untrained(run: _Run, pool: str) -> dict[str, Any]:
    """Statistics of the model before stage 1, if that evaluated it."""
    first = metrics.read_json(run.base / "summary.json") or {"pools": {}}
    statistics = first["pools"].get(pool, {}).get("base", {}).get(run.metric)
    if statistics is None:
        return {}
    return {"untrained": statistics | {"over_groups": float(np.mean(list(statistics["groups"].values())))}}


def _table_of_budgets(run: _Run) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: a row a pool and method, a column a budget; means over groups."""
    ways = [split(point) for point in run.points]
    budgets = sorted({budget for _, budget in ways if budget}) + [None] * any(budget is None for _, budget in ways)
    table = []
    for pool in run.pools:
        of = {split(point): run.statistics(pool, point)["over_groups"] for point in ("base", *run.points)}
        for method in dict.fromkeys(method for method, _ in ways):
            table.append([method, pool, of["base", None], *(of.get((method, budget), "–") for budget in budgets)])
    return ["method", "pool", "base", *(f"r{budget}" if budget else "no budget" for budget in budgets)], table


def _table(run: _Run, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each group pooled over its examples, then statistics over the clients of each pool."""
    headline = run.points[0]
    last = [row for row in rows if (row["round"], row["point"]) == (run.rounds, headline)]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in last:
        groups.setdefault((row["pool"], row["group"]), []).append(row)
    titles = {"global": run.experiment["algorithm.name"], "personal": "personalized"}
    columns = {point: titles.get(point, point) for point in (*_before(run), headline)}
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
        name = f"mean over {points[headline]['clients']} clients"
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
        # How answers are decoded is named only where it is not the default.
        if key in experiment and any(rival.get(key) != experiment[key] for rival in rivals):
            ending = key.split(".")[-1]
            name += f" {ending if endings[ending] == 1 else key}={experiment.get(key)}"
    return name


def _table_of_methods(methods: Mapping[str, list[_Run]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of runs that personalize in one way each: a row a pool and method."""
    table = [
        [method, pool, len(members), members[0].pools[pool]["personal"]["clients"], *_over_seeds(members, pool)]
        for pool in dict.fromkeys(pool for members in methods.values() for run in members for pool in run.pools)
        for method, members in methods.items()
        if pool in members[0].pools
    ]
    return ["method", "pool", "seeds", "clients", "before", "mean", "std", "pooled", "worst 10 %"], table


def _over_seeds(runs: Sequence[_Run], pool: str) -> list[str]:
    """Statistics of a pool: the mean before personalization; mean, deviation, pooled and worst tenth after it."""
    wanted = [
        (_before(runs[0])[-1], "mean"),
        *(("personal", name) for name in ("mean", "std", "pooled", "worst_10_percent")),
    ]
    return [_cell(run.pools[pool][point][run.metric][name] for run in runs) for point, name in wanted]


def _cell(values: Iterable[float]) -> str:
    """One number, or the mean of several and their standard deviation."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f}±{np.std(values, ddof=1):.3f}"


def _compare_points(methods: Mapping[str, list[_Run]], title: str, most: int) -> None:
    """Prints a row a pool and point, then a table of groups where all runs have the same few."""
    ways = _ways(methods)
    pools = list(dict.fromkeys(pool for members, _ in ways.values() for run in members for pool in run.pools))
    of = {pool: {way: entry for way, entry in ways.items() if pool in entry[0][0].pools} for pool in pools}
    table = []
    for pool, entries in of.items():
        for way, (members, point) in entries.items():
            found = [run.statistics(pool, point) for run in members]
            clients = members[0].pools[pool][point]["clients"]
            wanted = ("mean", "over_groups", "worst_10_percent")
            cells = [_cell(values[name] for values in found) for name in wanted]
            table.append([way, pool, len(members), clients, *cells])
    columns = ["way", "pool", "seeds", "clients", "mean over clients", "mean over groups", "worst 10 %"]
    console.table(title, columns, table)
    for pool, entries in of.items():
        found = {
            way: [run.statistics(pool, point)["groups"] for run in members] for way, (members, point) in entries.items()
        }
        groups = next(iter(found.values()))[0]
        if len(groups) > GROUPS or any(other.keys() != groups.keys() for seeds in found.values() for other in seeds):
            continue
        before = [way for way, (_, point) in entries.items() if point == "base"]
        after = [way for way, (_, point) in entries.items() if point not in ("base", "global")]
        for part in _side_by_side(after, most):
            table = [
                [group, *(_cell(seed[group] for seed in found[way]) for way in (*before, *part))] for group in groups
            ]
            console.table(f"{title}: groups of {pool} clients", ["group", *before, *part], table)


def _ways(methods: Mapping[str, list[_Run]]) -> dict[str, tuple[list[_Run], str]]:
    """Name -> (runs, point) of all that is compared; several experiments on the same base show it once."""
    found: list[tuple[str, str, list[_Run]]] = []
    bases: list[dict[str, Any]] = []
    for label, members in methods.items():
        # Rounded, because another chunk of clients may change the last digits.
        groups = {pool: members[0].statistics(pool, "base")["groups"] for pool in members[0].pools}
        base = {pool: {group: round(value, 4) for group, value in of.items()} for pool, of in groups.items()}
        for point in (*_before(members[0]), *members[0].points):
            if point != "base" or base not in bases:
                found.append((label, point, members))
        bases.append(base)
    short = [label if point == "personal" else point for label, point, _ in found]
    times = collections.Counter(short)
    return {
        name if times[name] == 1 else f"{label}: {point}": (members, point)
        for name, (label, point, members) in zip(short, found, strict=True)
    }

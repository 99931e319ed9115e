"""What finished runs came to: a table and pictures of one, a table of several."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from fedjax_peft import console, metrics, summaries
from fedjax_peft.reports import comparison, finished

ROWS = 60  # most rows of groups that `show` prints
COLUMNS = {"one": 8, "seeds": 6}  # most points side by side, with one number a cell and with a deviation over seeds
ROOM = 3  # most points beside which examples and the majority label have room


def show(workdir: epath.PathLike) -> None:
    """Prints the tables of a finished run, a row a group, and writes its pictures.

    Raises:
      ValueError: the directory holds no finished run.
    """
    summary = metrics.read_json(epath.Path(workdir) / "summary.json")
    if summary is not None and "methods" in summary:
        return _show_recovery(epath.Path(workdir), summary["methods"])
    run = finished.read(workdir)
    name, rows = run.name, metrics.read_rows(run.workdir / "clients.parquet")
    last = finished.ended(run, rows)
    title = _title(run.metric) + (f" after {run.rounds} rounds" if run.rounds else "") + f" of {name}"
    if len(run.points) == 1:
        console.table(title, *_table(run, last))
    else:
        for pool in run.pools:
            for points in finished.side_by_side(run.points, COLUMNS["one"]):
                console.table(f"{title}: {pool} clients", *_table_of_points(run, last, pool, points))
        if any(finished.split(point)[1] for point in run.points):
            console.table(f"{_title(run.metric)}, mean over groups", *_table_of_budgets(run))
    _draw(run, rows)
    print(f"all results are in {run.workdir}, pictures in {run.workdir / 'plots'}")


def _show_recovery(workdir: epath.Path, methods: Mapping[str, Any]) -> None:
    """The table and pictures of a synthetic study (`rank_recovery`): learnt against true ranks."""
    from fedjax_peft.reports import plots  # late, because matplotlib takes a second

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


def compare(workdirs: Sequence[epath.PathLike], pictures: epath.PathLike | None = None) -> None:
    """Prints one table of finished runs, a row a method and pool; runs that differ only in seeds are averaged.

    Where clients are personalized in several ways, a row is one of them, and tables of groups follow if they are few.

    Args:
      workdirs: of the runs.
      pictures: folder for pictures of the same; None draws none.

    Raises:
      ValueError: a directory holds no finished run, two hold the same run, or the runs have different metrics.
    """
    runs = [finished.read(workdir) for workdir in workdirs]
    for run in runs[1:]:
        if run.metric != runs[0].metric:
            a, b = (f"{one.workdir} has {one.metric}" for one in (runs[0], run))
            raise ValueError(f"runs to compare need the same metric, but {a} and {b}")
    methods = comparison.methods(runs)
    several = any(len(members) > 1 for members in methods.values())
    over = "; mean ± sample deviation over seeds" if several else ""
    if all(run.points == ("personal",) for run in runs):
        title = f"{_title(runs[0].metric)} of clients, personalized and (mean) before{over}"
        console.table(title, *comparison.of_methods(methods))
    else:
        title = f"{_title(runs[0].metric)}{over}"
        console.table(title, *comparison.of_points(methods))
        for pool, *table in comparison.of_groups(methods, COLUMNS["seeds" if several else "one"]):
            console.table(f"{title}: groups of {pool} clients", *table)
    for part in ("base", "test"):
        # Another seed of the division is meant to make other data.
        drawn = collections.defaultdict(set)
        for run in runs:
            drawn[str({**finished.seeds(run.experiment), "seed": None})].add(run.sha256.get(part))
        if max(map(len, drawn.values())) > 1:
            print(f"these runs are hard to compare: they differ in the SHA-256 of {part}")
    if pictures is not None:
        from fedjax_peft.reports import plots  # late, because matplotlib takes a second

        plots.write_comparison(pictures, comparison.of_pools(methods), runs[0].metric)
        print(f"pictures are in {pictures}")


def _title(metric: str) -> str:
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def _draw(run: finished.Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the pictures of a run, and those of its budgets where it has some."""
    # Late, so that the table does not wait for matplotlib.
    from fedjax_peft.reports import plots

    name, lines = run.name, metrics.read_lines(run.workdir / "rounds.jsonl")
    folder, headline = run.workdir / "plots", run.points[0]
    plots.write(folder, lines, rows, algorithm=name, metric=run.metric, total=run.rounds, point=headline)
    path = run.workdir / "strategies.parquet"
    strategies = finished.ended(run, metrics.read_rows(path)) if path.exists() else []
    if rows and "rank_sum" in rows[0]:
        plots.write_spectra(folder, rows, strategies, algorithm=name, point=headline)
    if strategies and "experts" in strategies[0]:
        plots.write_experts(folder, strategies, algorithm=name, point=headline)
    method = finished.split(headline)[0]
    budgets = [budget for other, budget in map(finished.split, run.points) if budget and other == method]
    if not budgets:
        return
    scores = {pool: _over_groups(run, pool) for pool in run.pools}
    # The smallest budget shows most: ranks that it keeps are kept at every larger one too.
    plots.write_budgets(folder, strategies, scores, method=method, budget=min(budgets), metric=run.metric)


def _table_of_points(
    run: finished.Run, rows: Sequence[Mapping[str, Any]], pool: str, points: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: a row a group, then statistics over clients and over groups; a column a point.

    Few points leave room for what groups are: examples, majority label and what stage 1 began with.
    """
    members = [row for row in rows if (row["pool"], row["point"]) == (pool, points[0])]
    columns = {point: run.statistics(pool, point) for point in (*run.before(), *points)}
    groups = list(run.statistics(pool, points[0])["groups"])
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


def _untrained(run: finished.Run, pool: str) -> dict[str, Any]:
    """Statistics of the model before stage 1, if that evaluated it."""
    first = metrics.read_json(run.base / "summary.json") or {"pools": {}}
    statistics = first["pools"].get(pool, {}).get("base", {}).get(run.metric)
    if statistics is None:
        return {}
    return {"untrained": statistics | {"over_groups": float(np.mean(list(statistics["groups"].values())))}}


def _over_groups(run: finished.Run, pool: str) -> dict[tuple[str, int | None], float]:
    """{(method, budget): mean over groups} of all points, and of the base where it was evaluated."""
    points = [point for point in (*run.before(), *run.points) if point != "global"]
    return {finished.split(point): run.statistics(pool, point)["over_groups"] for point in points}


def _table_of_budgets(run: finished.Run) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: a row a pool and method, a column a budget; means over groups."""
    ways = [finished.split(point) for point in run.points]
    budgets = sorted({budget for _, budget in ways if budget}) + [None] * any(budget is None for _, budget in ways)
    table = []
    for pool in run.pools:
        of = _over_groups(run, pool)
        for method in dict.fromkeys(method for method, _ in ways):
            table.append(
                [method, pool, of.get(("base", None), "–"), *(of.get((method, budget), "–") for budget in budgets)]
            )
    return ["method", "pool", "base", *(f"r{budget}" if budget else "no budget" for budget in budgets)], table


def _table(run: finished.Run, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each group pooled over its examples, then statistics over the clients of each pool."""
    headline = run.points[0]
    last = [row for row in rows if row["point"] == headline]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in last:
        groups.setdefault((row["pool"], row["group"]), []).append(row)
    titles = {"global": run.name, "personal": "personalized"}
    columns = {point: titles.get(point, point) for point in (*run.before(), headline)}
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
    return summaries.summarize(known, ["majority"])["majority"] if known else unknown

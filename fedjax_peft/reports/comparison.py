"""Tables of several finished runs: those that differ only in seeds are one row, a method's."""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedjax_peft.reports import finished

GROUPS = 20  # most rows of groups in a table


def methods(runs: Sequence[finished.Run]) -> dict[str, list[finished.Run]]:
    """Runs of the same experiment but for seeds, under their method's name and what else sets them apart."""
    finished.check_once(runs, lambda run: run.experiment)
    same: dict[str, list[finished.Run]] = {}
    for run in runs:
        own = finished.seeds(run.experiment)
        key = json.dumps({key: value for key, value in run.experiment.items() if key not in own}, sort_keys=True)
        same.setdefault(key, []).append(run)
    rivals = collections.defaultdict(list)
    for first, *_ in same.values():
        rivals[first.name].append(first.experiment)
    labels = [label(first.name, first.experiment, differing(rivals[first.name])) for first, *_ in same.values()]
    return dict(zip(labels, same.values(), strict=True))


def differing(experiments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys, seeds left out, of which experiments have different values."""
    keys = set().union(*experiments) - set().union(*map(finished.seeds, experiments))
    first = experiments[0]
    return sorted(key for key in keys if any(other.get(key) != first.get(key) for other in experiments))


def label(name: str, experiment: Mapping[str, Any], keys: Iterable[str]) -> str:
    """A method's name, and an experiment's values of the keys that set it apart from others with the same."""
    endings = collections.Counter(key.split(".")[-1] for key in {*experiment, *keys})
    # A run does not differ in arguments that it leaves to the function.
    for key in (key for key in keys if key in experiment):
        ending = key.split(".")[-1]
        name += f" {ending if endings[ending] == 1 else key}={experiment[key]}"
    return name


def of_methods(methods: Mapping[str, list[finished.Run]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of runs that personalize in one way each: a row a pool and method."""
    table = [
        [method, pool, len(members), members[0].pools[pool]["personal"]["clients"], *_over_seeds(members, pool)]
        for pool in dict.fromkeys(pool for members in methods.values() for run in members for pool in run.pools)
        for method, members in methods.items()
        if pool in members[0].pools
    ]
    return ["method", "pool", "seeds", "clients", "before", "mean", "std", "pooled", "worst 10 %"], table


def _over_seeds(runs: Sequence[finished.Run], pool: str) -> list[str]:
    """Statistics of a pool: the mean before personalization; mean, deviation, pooled and worst tenth after it."""
    before = _before(runs)
    wanted = [(point, "mean") for point in before[-1:]]
    wanted += [("personal", name) for name in ("mean", "std", "pooled", "worst_10_percent")]
    cells = [_cell(run.pools[pool][point][run.metric][name] for run in runs) for point, name in wanted]
    return cells if before else ["–", *cells]


def _cell(values: Iterable[float]) -> str:
    """One number, or the mean of several and their sample deviation."""
    mean, deviation = finished.over_seeds(list(values))
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f}±{deviation:.3f}"


def _before(runs: Sequence[finished.Run]) -> list[str]:
    """Points before personalization that all runs have."""
    return [point for point in runs[0].before() if all(point in run.before() for run in runs)]


def _base(runs: Sequence[finished.Run]) -> dict[str, dict[str, float]]:
    """{pool: {group: score of the base}}, rounded: another chunk of clients may change the last digits."""
    if "base" not in _before(runs):
        return {}
    groups = {pool: runs[0].statistics(pool, "base")["groups"] for pool in runs[0].pools}
    return {pool: {group: round(value, 4) for group, value in of.items()} for pool, of in groups.items()}


def of_points(methods: Mapping[str, list[finished.Run]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of runs that personalize in several ways: a row a pool and way."""
    table = []
    for pool, ways in _ways_of_pools(methods).items():
        for way, (members, point) in ways.items():
            found = [run.statistics(pool, point) for run in members]
            clients = members[0].pools[pool][point]["clients"]
            wanted = ("mean", "over_groups", "worst_10_percent")
            cells = [_cell(values[name] for values in found) for name in wanted]
            table.append([way, pool, len(members), clients, *cells])
    return ["way", "pool", "seeds", "clients", "mean over clients", "mean over groups", "worst 10 %"], table


def of_groups(methods: Mapping[str, list[finished.Run]], most: int) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """Pool, columns and rows, a row a group and up to `most` ways side by side, where all runs have the same few."""
    for pool, ways in _ways_of_pools(methods).items():
        found = {
            way: [run.statistics(pool, point)["groups"] for run in members] for way, (members, point) in ways.items()
        }
        groups = next(iter(found.values()))[0]
        if len(groups) > GROUPS or any(other.keys() != groups.keys() for seeds in found.values() for other in seeds):
            continue
        before = [way for way, (_, point) in ways.items() if point == "base"]
        after = [way for way, (_, point) in ways.items() if point not in ("base", "global")]
        for part in finished.side_by_side(after, most):
            columns = [*before, *part]
            rows = [[group, *(_cell(seed[group] for seed in found[way]) for way in columns)] for group in groups]
            yield pool, ["group", *columns], rows


def of_pools(methods: Mapping[str, list[finished.Run]]) -> dict[str, dict[str, list[float]]]:
    """{pool: {way: mean over groups of each seed}}; what several experiments begin with is `base`."""
    return {
        pool: {way: [run.statistics(pool, point)["over_groups"] for run in runs] for way, (runs, point) in ways.items()}
        for pool, ways in _ways_of_pools(methods).items()
    }


def _ways_of_pools(methods: Mapping[str, list[finished.Run]]) -> dict[str, dict[str, tuple[list[finished.Run], str]]]:
    ways = _ways(methods)
    pools = dict.fromkeys(pool for members, _ in ways.values() for run in members for pool in run.pools)
    return {pool: {way: entry for way, entry in ways.items() if pool in entry[0][0].pools} for pool in pools}


def _ways(methods: Mapping[str, list[finished.Run]]) -> dict[str, tuple[list[finished.Run], str]]:
    """Name -> (runs, point) of all that is compared; several experiments on the same base show it once."""
    found: list[tuple[str, str, list[finished.Run]]] = []
    bases: list[dict[str, Any]] = []
    for label, members in methods.items():
        base = _base(members)
        for point in (*_before(members), *members[0].points):
            if point != "base" or base not in bases:
                found.append((label, point, members))
        bases.append(base)
    short = [label if point == "personal" else point for label, point, _ in found]
    times = collections.Counter(short)
    return {
        name if times[name] == 1 else f"{label}: {point}": (members, point)
        for name, (label, point, members) in zip(short, found, strict=True)
    }

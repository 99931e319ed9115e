"""How much better one method is than the best of the others: the three averages that published tables choose among.

A scenario is what data are and how they are divided; a gain is relative, (ours - best) / best, in percent, never a
difference of percentage points. Zhang et al., FedAMoLE, arXiv 2411.19128, give an average over scenarios without saying
of which kind, so all are printed. Scenarios may have metrics of their own, such as accuracies and ROUGE, which the
averages then mix.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fedjax_peft import console, manifest, metrics, summaries
from fedjax_peft.reports import comparison, finished

Scores = dict[str, dict[str, float]]
"""{scenario: {method: mean over seeds of the mean over seen clients}}."""


class Found(NamedTuple):
    """What finished runs came to."""

    scores: Scores
    runs: dict[str, dict[str, int]]  # {scenario: {method: how many were averaged}}
    sets: dict[str, str]  # {scenario: data set}
    metrics: dict[str, str]  # {scenario: metric}


class _Run(NamedTuple):
    workdir: epath.Path
    name: str  # of its method
    scenario: str  # all that is said of its data
    data: str  # set
    settings: dict[str, Any]  # the rest of its experiment, with dotted keys
    experiment: dict[str, Any]  # all of it, seeds too
    metric: str
    points: dict[str, float]  # mean over seen clients


class Gain(NamedTuple):
    """Ours against the best other method."""

    of: str  # a scenario, a data set or everything
    ours: float
    best: float
    rival: str  # whose that is
    percent: float


def show(ours: str, workdirs: Sequence[epath.PathLike]) -> None:
    """Prints gains by scenario, by data set and over all, of the clients that took part in training.

    Args:
      ours: name of a method: `run.title` or the algorithm's, and the settings that set it apart from others with that.
      workdirs: finished runs of it and of others. A method's model before its last local steps is another one,
        `NAME (global)`.

    Raises:
      ValueError: what `read` and `gains` raise.
    """
    scores, averaged, sets, metric_of = read(workdirs)
    found = gains(ours, scores, sets)
    # Four decimals, as published averages are printed.
    rows = [[gain.of, gain.ours, gain.best, gain.rival, f"{gain.percent:+.4f}"] for gain in found]
    console.table(f"gain of {ours} over the best other method", ["", ours, "best", "which", "gain, %"], rows)
    mean = np.mean([gain.percent for gain in found[: len(scores)]])
    print(f"mean of the scenarios' gains: {mean:+.4f} %; gain of the means over scenarios: {found[-1].percent:+.4f} %")
    if partly := sorted(set().union(*scores.values()) - _of_all(scores.values())):
        print("not in every scenario:", ", ".join(partly))
    for scenario, counts in averaged.items():
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} of {method}" for method, count in sorted(counts.items()))
            print(f"means over runs of {scenario}, not as many of each: {said}")
    print("everything is of the metrics", ", ".join(sorted(set(metric_of.values()))))


def read(workdirs: Sequence[epath.PathLike]) -> Found:
    """What the clients of finished runs came to that took part in training.

    How rows were drawn and what is held out beside tests make no scenario of their own. Runs with the same name that
    differ in more than seeds within a scenario, such as ablations, are methods of their own in all scenarios.

    Raises:
      ValueError: a directory without a finished run, two of the same run, a scenario of several metrics, or a metric
        of which less is better.
    """
    runs = [_read(epath.Path(workdir)) for workdir in workdirs]
    finished.check_once(runs, lambda run: (run.experiment, run.name))
    rivals = collections.defaultdict(list)
    for run in runs:
        rivals[run.name, run.scenario].append(run.settings)
    apart = collections.defaultdict(set)
    for (name, _), settings in rivals.items():
        apart[name].update(comparison.differing(settings))
    short, first = _short(list(dict.fromkeys(run.scenario for run in runs))), {}
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        other = first.setdefault(run.scenario, run)
        if run.metric != other.metric:
            told = " and ".join(f"{one.metric} in {one.workdir}" for one in (other, run))
            raise ValueError(f"gains are of one metric a scenario, but those of {short[run.scenario]} are {told}")
        label = comparison.label(run.name, run.settings, sorted(apart[run.name]))
        for point, value in run.points.items():
            title = {"personal": label, "global": f"{label} (global)"}.get(point, point)
            found.setdefault(short[run.scenario], {}).setdefault(title, []).append(value)
    scores = {name: {method: float(np.mean(values)) for method, values in of.items()} for name, of in found.items()}
    averaged = {name: {method: len(values) for method, values in own.items()} for name, own in found.items()}
    sets, of = ({short[scenario]: getattr(run, name) for scenario, run in first.items()} for name in ("data", "metric"))
    return Found(scores, averaged, sets, of)


def _read(workdir: epath.Path) -> _Run:
    written, summary = manifest.read(workdir), metrics.read_json(workdir / "summary.json") or {}
    points = {name: of for name, of in summary.get("pools", {}).get("seen", {}).items() if name != "base"}
    if written is None or not points:
        raise ValueError(f"workdir {workdir} has no finished run whose clients could be compared")
    metric = summaries.headline(next(iter(points.values())))
    if metric in summaries.LESS_IS_BETTER:
        raise ValueError(f"gains are of a metric of which more is better, but that of {workdir} is {metric}")
    settings = finished.settings(written)
    experiment = dict(settings)
    data = {key: settings.pop(key) for key in sorted(settings) if key.startswith("data.")}
    kept = [key for key in data if key != "data.aux" and key not in finished.seeds(data)]
    scenario = ", ".join(f"{key.removeprefix('data.')}={data[key]}" for key in kept)
    means = {name: of[metric]["mean"] for name, of in points.items()}
    name = finished.name_of(written)
    return _Run(workdir, name, scenario, data["data.name"], settings, experiment, metric, means)


def gains(ours: str, scores: Scores, sets: Mapping[str, str]) -> list[Gain]:
    """A gain for each scenario, then for each data set, then over all scenarios.

    Over several scenarios the best other method is the one whose mean over them is highest, of those that all have.

    Raises:
      ValueError: a scenario without our method or without another, or whose best other method has 0 or less.
    """
    groups = collections.defaultdict(list)
    for scenario, data in sets.items():
        groups[data].append(scenario)
    wanted = [(scenario, [scenario]) for scenario in scores]
    wanted += [(f"{data}, all", own) for data, own in groups.items() if len(own) > 1]
    wanted += [("everything", list(scores))]
    found = []
    for name, own in wanted:
        methods = sorted(_of_all([scores[scenario] for scenario in own]))
        if ours not in methods:
            raise ValueError(f"{name}: {ours!r} is not one of the methods, which are {', '.join(methods) or 'none'}")
        means = {method: float(np.mean([scores[scenario][method] for scenario in own])) for method in methods}
        mine = means.pop(ours)
        # Our own model before its last local steps is no rival.
        means.pop(f"{ours} (global)", None)
        if not means:
            raise ValueError(f"{name}: there is no method beside {ours}")
        rival = max(means, key=means.__getitem__)
        if means[rival] <= 0:
            raise ValueError(
                f"{name}: the best other method, {rival}, has {means[rival]:.4g}, of which nothing is a share"
            )
        found.append(Gain(name, mine, means[rival], rival, 100 * (mine - means[rival]) / means[rival]))
    return found


def _short(scenarios: Sequence[str]) -> dict[str, str]:
    """Names of scenarios: the settings in which they differ."""
    parts = {scenario: scenario.split(", ") for scenario in scenarios}
    common = set.intersection(*(set(part) for part in parts.values())) if len(parts) > 1 else set()
    keep = {scenario: [part for part in own if part not in common] for scenario, own in parts.items()}
    return {
        scenario: ", ".join(own) if len(parts) > 1 else next(part for part in own if part.startswith("name="))
        for scenario, own in keep.items()
    }


def _of_all(scenarios: Iterable[Mapping[str, float]]) -> set[str]:
    return set.intersection(*map(set, scenarios))

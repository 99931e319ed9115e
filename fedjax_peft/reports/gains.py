"""How much better one method is than the best of the others: the three averages that published tables choose among.

A scenario is what data are and how they are divided; a gain is relative, (ours - best) / best, in percent, never a
difference of percentage points. Zhang et al., FedAMoLE, arXiv 2411.19128, give an average over scenarios without saying
of which kind, so all are printed.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from fedjax_peft import console, manifest, metrics, summaries
from fedjax_peft.reports import finished

Scores = dict[str, dict[str, float]]
"""{scenario: {method: mean over seeds of the mean over seen clients}}."""


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
      ours: name of a method, as `algorithm.name` has it.
      workdirs: finished runs of it and of others. A method's model before its last local steps is another one,
        `NAME (global)`.

    Raises:
      ValueError: a directory without a finished run, or scenarios that not all methods have.
    """
    scores, sets = read(workdirs)
    found = gains(ours, scores, sets)
    rows = [[gain.of, gain.ours, gain.best, gain.rival, f"{gain.percent:+.2f}"] for gain in found]
    console.table(f"gain of {ours} over the best other method", ["", ours, "best", "which", "gain, %"], rows)
    mean = np.mean([gain.percent for gain in found[: len(scores)]])
    print(f"mean of the scenarios' gains: {mean:+.4f} %; gain of the means over scenarios: {found[-1].percent:+.4f} %")


def read(workdirs: Sequence[epath.PathLike]) -> tuple[Scores, dict[str, str]]:
    """(scores, {scenario: data set}) of finished runs.

    How rows were drawn and what is held out beside tests make no scenario of their own.

    Raises:
      ValueError: a directory without a finished run, runs of several metrics or of one of which less is better, or runs
        of a method that differ in more than that within a scenario, such as ablations, which must not be averaged.
    """
    found: dict[str, dict[str, list[float]]] = {}
    sets, first, metrics_of = {}, {}, {}
    for workdir in map(epath.Path, workdirs):
        written, summary = manifest.read(workdir), metrics.read_json(workdir / "summary.json")
        if written is None or summary is None or "pools" not in summary:
            raise ValueError(f"workdir {workdir} has no finished run whose clients could be compared")
        settings = traverse_util.flatten_dict(written["experiment"], sep=".")
        data = {key: settings.pop(key) for key in sorted(settings) if key.startswith("data.")}
        kept = [key for key in data if key != "data.aux" and key not in finished.seeds(data)]
        scenario = ", ".join(f"{key.removeprefix('data.')}={data[key]}" for key in kept)
        sets[scenario] = data["data.name"]
        name = settings["algorithm.name"]
        other, same = first.setdefault((scenario, name), (workdir, settings))
        differ = [key for key in sorted({*settings, *same} - {"seed"}) if settings.get(key) != same.get(key)]
        if differ:
            raise ValueError(
                f"workdirs {other} and {workdir} both hold {name} but differ in {differ[0]}: give one of them"
            )
        for point, statistics in summary["pools"]["seen"].items():
            title = {"personal": name, "global": f"{name} (global)"}.get(point, point)
            if point != "base":
                metric = summaries.headline(statistics)
                metrics_of.setdefault(metric, workdir)
                found.setdefault(scenario, {}).setdefault(title, []).append(statistics[metric]["mean"])
    if len(metrics_of) > 1 or set(metrics_of) & set(summaries.LESS_IS_BETTER):
        told = ", ".join(f"{metric} in {workdir}" for metric, workdir in metrics_of.items())
        raise ValueError(f"gains are of one metric of which more is better, but found is {told}")
    short = _short(list(found))
    scores = {
        short[scenario]: {name: float(np.mean(values)) for name, values in of.items()} for scenario, of in found.items()
    }
    return scores, {short[scenario]: data for scenario, data in sets.items()}


def gains(ours: str, scores: Scores, sets: Mapping[str, str]) -> list[Gain]:
    """A gain for each scenario, then for each data set, then over all scenarios.

    Over several scenarios the best other method is the one whose mean over them is highest, the same in all.
    """
    methods = set.intersection(*(set(of) for of in scores.values()))
    if ours not in methods:
        raise ValueError(f"{ours!r} is not a method of all {len(scores)} scenarios, which {_names(methods)} are")
    if len(methods) < 2:
        raise ValueError(f"there is no method beside {ours} that all {len(scores)} scenarios have")
    groups = collections.defaultdict(list)
    for scenario, data in sets.items():
        groups[data].append(scenario)
    wanted = [(scenario, [scenario]) for scenario in scores]
    wanted += [(f"{data}, all", own) for data, own in groups.items() if len(own) > 1]
    wanted += [("everything", list(scores))]
    found = []
    for name, own in wanted:
        means = {method: float(np.mean([scores[scenario][method] for scenario in own])) for method in sorted(methods)}
        mine = means.pop(ours)
        # Our own model before its last local steps is no rival.
        means.pop(f"{ours} (global)", None)
        rival = max(means, key=means.__getitem__)
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


def _names(methods: set[str]) -> str:
    return ", ".join(sorted(methods)) or "none"

"""Picture of several runs: where each way to personalize ends, and how much seeds differ."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import figure

from fedjax_peft.reports import client_plots, finished


def ways(scores: Mapping[str, Mapping[str, Sequence[float]]], metric: str) -> figure.Figure:
    """A row a way to personalize, in the order given: every seed, their mean, and their sample deviation as a bar.

    Args:
      scores: {pool: {way: mean over groups of each seed}}.
      metric: name for the axis.
    """
    names = list(dict.fromkeys(way for of in scores.values() for way in of))
    picture = figure.Figure(figsize=(2.4 + 3.2 * len(scores), 1.2 + 0.24 * len(names)))
    panels = picture.subplots(1, len(scores), squeeze=False, sharex=True, sharey=True)[0]
    styles = itertools.cycle(client_plots.POOLS)
    for panel, (pool, of), (color, marker) in zip(panels, scores.items(), styles, strict=False):
        for way, values in of.items():
            height = names.index(way)
            panel.plot(values, np.full(len(values), height), ".", color=color, alpha=0.4, markersize=5, mew=0)
            mean, deviation = finished.over_seeds(values)
            panel.errorbar(mean, height, xerr=deviation, color=color, marker=marker, markersize=5, capsize=2)
        panel.set(title=f"{pool} clients", xlabel=f"{client_plots.axis_label(metric)}, mean over groups")
        panel.grid(axis="both", color="0.92")
    panels[0].set_yticks(range(len(names)), [client_plots.drawable(name, 40) for name in names])
    panels[0].invert_yaxis()
    return picture

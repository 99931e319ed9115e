"""Pictures of the synthetic study: losses, learnt ranks and singular values."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, ticker

from fedjax_peft.reports import rank_plots, spectrum_plots

LINES = ("-", "--", ":", "-.")


def losses(rounds: np.ndarray, loss: Mapping[str, np.ndarray], true_ranks: Sequence[int]) -> figure.Figure:
    """Median over seeds of each client's loss, with the middle half of them.

    Args:
      rounds: [K].
      loss: {method: [G, K, C]}.
      true_ranks: [C].
    """
    picture, panels = _panels("loss of each client: median and middle half of the seeds", len(true_ranks))
    for client, panel in enumerate(panels):
        for (name, values), style in zip(loss.items(), _styles(), strict=False):
            low, middle, high = np.quantile(values[:, :, client], (0.25, 0.5, 0.75), axis=0)
            panel.plot(rounds, middle, label=name, **style)
            panel.fill_between(rounds, low, high, color=style["color"], alpha=0.12, linewidth=0)
        panel.set(yscale="log", xlabel="round", title=f"client {client + 1}, true rank {true_ranks[client]}")
    panels[0].set_ylabel("loss")
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def learnt(rounds: np.ndarray, ranks: Mapping[str, np.ndarray], true_ranks: Sequence[int]) -> figure.Figure:
    """Mean over seeds of each client's numerical rank; arguments as in `losses`."""
    picture, panels = _panels("learnt rank of each client: mean over seeds", len(true_ranks))
    for client, panel in enumerate(panels):
        for (name, values), style in zip(ranks.items(), _styles(), strict=False):
            panel.plot(rounds, values[:, :, client].mean(axis=0), label=name, **style)
        panel.axhline(true_ranks[client], color="0.1", linestyle="--", linewidth=1)
        panel.set(xlabel="round", title=f"client {client + 1}, true rank {true_ranks[client]} (dashed)")
        panel.set_ylim(bottom=-0.2)
    panels[0].set_ylabel("numerical rank")
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def spectrum(singular: Mapping[str, np.ndarray], true_ranks: Sequence[int], method: str) -> figure.Figure:
    """Singular values at the end of the common, the personal and the summed adapter, a line a seed.

    Args:
      singular: {common, personal, sum: [G, C, ..]}.
    """
    picture, panels = _panels(f"{method}: singular values in the end, a line a seed", len(true_ranks))
    for client, panel in enumerate(panels):
        for name, (color, marker) in spectrum_plots.LEVELS.items():
            values = singular[name][:, client]
            index = np.arange(1, values.shape[-1] + 1)
            style = {"color": color, "marker": marker, "markersize": 3, "linewidth": 0.8, "alpha": 0.6}
            for line, one in enumerate(values):
                panel.plot(index, one, label=None if line else name, **style)
        panel.axvline(true_ranks[client] + 0.5, color="0.1", linestyle="--", linewidth=1)
        panel.set(xlabel="index", title=f"client {client + 1}, true rank {true_ranks[client]} (dashed)")
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("singular value")
    panels[-1].legend(fontsize=8)
    return picture


def _panels(title: str, count: int) -> tuple[figure.Figure, Sequence[axes.Axes]]:
    picture = figure.Figure(figsize=(3.6 * count + 1.6, 3.6))
    picture.suptitle(title)
    panels = picture.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel in panels:
        panel.grid(axis="y", color="0.92")
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    return picture, panels


def _styles() -> Iterator[dict[str, Any]]:
    """One for each method: those of other pictures first, then with broken lines."""
    for line, (color, marker) in itertools.cycle(itertools.product(LINES, rank_plots.METHODS)):
        style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1}
        yield style | {"markevery": 0.1, "markersize": 3}

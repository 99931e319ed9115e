"""Pictures of the ranks that clients' weights have: numerical ranks and singular values, over rounds and in the end."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker

LEVELS = {"sum": ("0.15", "o"), "common": ("#0072B2", "s"), "personal": ("#D55E00", "^")}
SHOWN = 24  # most singular values of a site that are drawn
DRAWN = (1e-4, 2.0)  # relative ones: a step of SGD moves a personal adapter a hundredth of a common one


def over_rounds(rows: Iterable[Mapping[str, Any]], title: str) -> figure.Figure:
    """Numerical rank of the common, the personal and the summed adapter of each seen client, mean over sites.

    Args:
      rows: of clients.parquet, with the columns `rank_common`, `rank_personal` and `rank_sum`.
    """
    seen: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["pool"] == "seen" and row["point"] == "global":
            seen.setdefault(row["name"], {})[row["round"]] = [row[f"rank_{level}"] for level in LEVELS]
    picture = figure.Figure(figsize=(9, 3))
    picture.suptitle(f"{title}: numerical ranks, mean over sites; a thin line a client")
    panels = picture.subplots(1, len(LEVELS), sharex=True)
    for place, (level, (color, marker)) in enumerate(LEVELS.items()):
        curves = [(sorted(of), [of[index][place] for index in sorted(of)]) for of in seen.values()]
        for index, values in curves:
            panels[place].plot(index, values, color=color, alpha=0.35, linewidth=0.8)
        index = sorted({at for of in seen.values() for at in of})
        mean = [np.mean([of[at][place] for of in seen.values() if at in of]) for at in index]
        panels[place].plot(index, mean, color=color, marker=marker, markersize=4, linewidth=1.8)
        panels[place].set(title=level, xlabel="round")
        panels[place].set_ylim(bottom=0)
        panels[place].xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        panels[place].grid(axis="y", color="0.92")
    panels[0].set_ylabel("numerical rank")
    return picture


def values(rows: Iterable[Mapping[str, Any]], title: str) -> figure.Figure:
    """Singular values of all sites and clients, relative to the largest of the sum: median and middle 80 %.

    Args:
      rows: of strategies.parquet at one point, with the columns `singular_common`, `_personal` and `_sum`.
    """
    rows = list(rows)
    picture = figure.Figure(figsize=(5, 3.4))
    picture.suptitle(f"{title}: singular values over sites and clients\nmedian and middle 80 %, largest of the sum = 1")
    panel = picture.subplots()
    for level, (color, marker) in LEVELS.items():
        found = _relative(rows, level)
        index = np.arange(1, found.shape[1] + 1)
        low, middle, high = np.quantile(found, (0.1, 0.5, 0.9), axis=0)
        panel.plot(index, middle, color=color, marker=marker, markersize=4, linewidth=1.2, label=level)
        panel.fill_between(index, low, high, color=color, alpha=0.15, linewidth=0)
    panel.set(xlabel="index", ylabel="relative singular value", yscale="log", ylim=DRAWN)
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    panel.grid(axis="y", color="0.92")
    panel.legend(fontsize=8)
    return picture


def values_over_rounds(rows: Iterable[Mapping[str, Any]], title: str) -> figure.Figure:
    """Singular values of all sites and clients at each evaluation, relative to the largest of the sum: a line an index.

    Args:
      rows: of strategies.parquet at one point, with the columns of `values`, of one round or more.
    """
    of: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["round"], []).append(row)
    picture = figure.Figure(figsize=(9, 3))
    picture.suptitle(f"{title}: singular values, medians over sites and clients, largest of the sum = 1")
    panels = picture.subplots(1, len(LEVELS), sharex=True, sharey=True)
    for panel, (level, (color, marker)) in zip(panels, LEVELS.items(), strict=True):
        medians = np.array([np.median(_relative(of[at], level), axis=0) for at in sorted(of)])
        for index, line in enumerate(medians.T):
            # Later ones are paler: which line is which shows without a legend of two dozen.
            alpha = 1 - 0.75 * index / len(medians.T)
            panel.plot(sorted(of), line, color=color, marker=marker, markersize=3, linewidth=1, alpha=alpha)
        panel.set(title=level, xlabel="round")
        panel.set_yscale("log", nonpositive="mask")  # adapters start at zero
        panel.set_ylim(DRAWN)
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(axis="y", color="0.92")
    panels[0].set_ylabel("relative singular value")
    return picture


def _relative(rows: Sequence[Mapping[str, Any]], level: str) -> np.ndarray:
    """[n, ..] the first singular values of a level over the largest of the sum; 0 where nothing is added."""
    whole = np.array([max(row["singular_sum"][0], np.finfo(np.float32).tiny) for row in rows])
    return np.array([row[f"singular_{level}"] for row in rows])[:, :SHOWN] / whole[:, None]

"""Pictures of a mixture of experts: who holds which of them, and how many."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib import axes, figure, ticker

from fedjax_peft.reports import client_plots

ROWS = 60  # most clients with a row of their own; beyond, a row is the mean of a group
COLORS = "GnBu"


class Held(NamedTuple):
    """What clients hold, a row a client, those of one group together."""

    names: tuple[str, ...]  # [C]
    groups: tuple[str, ...]  # [C]
    sites: np.ndarray  # [C, E] at how many sites a client holds the expert
    experts: np.ndarray  # [C, J] how many experts a client holds at the site


def held(rows: Iterable[Mapping[str, Any]]) -> Held:
    """From the rows of strategies.parquet at one point, whose column `experts` has -1 in empty slots."""
    found: dict[tuple[str, int], list[list[int]]] = {}
    names = {}
    for row in rows:
        key = (row["group"], row["client"])
        found.setdefault(key, []).append([expert for expert in row["experts"] if expert >= 0])
        names[key] = row["name"]
    order = sorted(found)
    count = 1 + max((expert for own in found.values() for site in own for expert in site), default=0)
    sites = [np.bincount(np.concatenate(found[key]).astype(np.int64), minlength=count) for key in order]
    experts = [[len(site) for site in found[key]] for key in order]
    return Held(tuple(names[key] for key in order), tuple(key[0] for key in order), np.array(sites), np.array(experts))


def heat_map(found: Held, algorithm: str) -> figure.Figure:
    """Clients by experts, summed over sites, and beside it how many experts each client holds at a site.

    Experts of one number at two sites are two experts, so a row says how often a client is chosen rather than by whom.
    """
    clients, (count, sites) = len(found.names), (found.sites.shape[1], found.experts.shape[1])
    shown = found if clients <= ROWS else _by_group(found)
    rows = len(shown.names)
    inches = float(np.clip(0.17 * rows, 1.2, 10.0)), float(np.clip(0.15 * count, 2.4, 7.0))
    picture = figure.Figure(figsize=(inches[1] + 4.6, inches[0] + 1.7))
    picture.suptitle(f"{algorithm}: who holds which of {count} experts a site, {clients} clients, {sites} sites")
    left, right = picture.subplots(1, 2, sharey=True, width_ratios=(inches[1], 1.8))
    edges = np.arange(count + 1) - 0.5, np.arange(rows + 1) - 0.5
    style = {"cmap": COLORS, "vmin": 0, "edgecolors": "white", "linewidth": 0.3}
    mesh = left.pcolormesh(*edges, shown.sites, **style)
    bar = picture.colorbar(mesh, ax=left, shrink=0.8, aspect=25, label="sites at which it is held", location="left")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(ticker.MaxNLocator(integer=clients <= ROWS))
    left.set(xlabel="expert", xlim=(-0.5, count - 0.5), ylim=(rows - 0.5, -0.5))
    left.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    size = float(np.clip(0.75 * 72 * inches[0] / rows, 3, 8))
    left.set_yticks(range(rows), [client_plots.drawable(name) for name in shown.names], fontsize=size)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    _numbers(right, shown.experts)
    ends = [row for row in range(1, rows) if shown.groups[row] != shown.groups[row - 1]]
    # Where each row is a group there is nothing to tell apart.
    for row in ends if len(ends) < rows - 1 else ():
        left.axhline(row - 0.5, color="0.3", linewidth=0.6)
        right.axhline(row - 0.5, color="0.3", linewidth=0.6)
    return picture


def _numbers(panel: axes.Axes, experts: np.ndarray) -> None:
    """Experts at a site: the mean over sites, between the least and the most."""
    rows, mean = np.arange(len(experts)), experts.mean(axis=1)
    panel.hlines(rows, experts.min(axis=1), experts.max(axis=1), color="0.7", linewidth=1.5)
    panel.plot(mean, rows, "o", color="#0072B2", markersize=4)
    panel.axvline(experts.mean(), color="0.3", linestyle=":", linewidth=0.8)
    panel.set(xlabel="experts at a site:\nmean, least and most", xlim=(0, experts.max() + 0.5))
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="0.92")


def _by_group(found: Held) -> Held:
    """A row a group: the means of its clients."""
    groups = np.array(found.groups, object)
    names = list(dict.fromkeys(found.groups))
    parts = [[values[groups == name].mean(axis=0) for name in names] for values in (found.sites, found.experts)]
    labels = tuple(f"{name} ({(groups == name).sum()})" for name in names)
    return Held(labels, tuple(names), *map(np.array, parts))

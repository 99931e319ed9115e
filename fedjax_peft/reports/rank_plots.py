"""Pictures of rank selection: which sites keep ranks, how groups differ in them, and what a budget buys."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import axes, cm, colors, figure, ticker

from fedjax_peft.reports import client_plots, finished

STACKED = re.compile(r".*\b(?:layer|layers|h)\.(\d+)\.(.+)")  # a site of a layer stack: its layer and its kind
KINDS = {  # in the order of the forward pass; kinds that are not here come last under the end of their own name
    r"query|query_proj|q_proj": "query",
    r"key|key_proj|k_proj": "key",
    r"value|value_proj|v_proj": "value",
    r"c_attn": "query, key, value",
    r"attention\.output\.dense|o_proj|attn\.c_proj": "attention output",
    r"gate_proj": "gate",
    r"intermediate\.dense|up_proj|c_fc": "intermediate",
    r"output\.dense|down_proj|mlp\.c_proj": "output",
}
PANELS = 35  # most groups that `heat_map` draws beside their mean
NUMBERS = 16  # most groups whose distances are written into their cells
COLORS = "GnBu"  # nothing is almost white, in print too
# Colours of Okabe and Ito that pools do not use come first; shapes help.
METHODS = (
    ("#882255", "D"), ("#D55E00", "^"), ("#56B4E9", "o"), ("0.3", "s"),
    ("#009E73", "v"), ("#E69F00", "P"), ("#0072B2", "X"), ("#CC79A7", "<"),
)  # fmt: skip


class Kept(NamedTuple):
    """Ranks that clients keep, means over the clients of each group."""

    groups: tuple[str, ...]  # [G]
    clients: tuple[int, ...]  # [G]
    sites: tuple[str, ...]  # [J] dotted Hugging Face names
    ranks: np.ndarray  # [G, J]


class Curve(NamedTuple):
    """A method at several budgets."""

    budgets: np.ndarray  # [K] ranks a site
    mean: np.ndarray  # [K]
    deviation: np.ndarray | None = None  # [K] over seeds, where there are several


def kept(rows: Iterable[Mapping[str, Any]]) -> Kept:
    """Means over clients, from the rows of strategies.parquet of one pool and point."""
    counts: dict[str, dict[str, dict[int, int]]] = {}
    for row in rows:
        counts.setdefault(row["group"], {}).setdefault(row["site"], {})[row["client"]] = row["ranks"]
    groups = tuple(sorted(counts))
    sites = tuple(dict.fromkeys(site for group in groups for site in counts[group]))
    ranks = [[np.mean(list(counts[group][site].values())) for site in sites] for group in groups]
    return Kept(groups, tuple(len(counts[group][sites[0]]) for group in groups), sites, np.array(ranks))


def curves(scores: Mapping[tuple[str, int | None], float | Sequence[float]]) -> dict[str, Curve]:
    """A curve a method, from {(method, budget): score, or one a seed}; what has no budget has none."""
    found: dict[str, dict[int, tuple[float, float | None]]] = {}
    for (method, budget), values in scores.items():
        if budget:
            found.setdefault(method, {})[budget] = finished.over_seeds(np.atleast_1d(values))
    return {method: _curve(dict(sorted(of.items()))) for method, of in found.items()}


def _curve(scores: Mapping[int, tuple[float, float | None]]) -> Curve:
    means, deviations = zip(*scores.values(), strict=True)
    return Curve(np.array(list(scores)), np.array(means), None if None in deviations else np.array(deviations))


def heat_map(found: Kept, title: str) -> figure.Figure:
    """Ranks of each layer and kind of site: a panel for the mean over groups and one a group, in common colours."""
    mean, single = found.ranks.mean(axis=0), len(found.groups) == 1
    panels = {} if single else {"mean of groups": mean}
    if len(found.groups) <= PANELS:
        names = [
            f"{client_plots.drawable(group, 12)} ({n})" for group, n in zip(found.groups, found.clients, strict=True)
        ]
        panels |= dict(zip(names, found.ranks, strict=True))
    layers, kinds, outside = _places(found.sites)
    rows = -(-len(panels) // 6)
    columns = -(-len(panels) // rows)
    inches = 0.35 + 0.14 * max(len(kinds), 5), 0.35 + 0.085 * max(len(layers), 6) + 0.12 * len(outside)
    size = max(1.6 + columns * inches[0], 4.5), 1.7 + rows * inches[1]
    picture = figure.Figure(figsize=size)
    picture.suptitle(f"ranks kept at each site: {title}\nmeans over clients, whose number stands in brackets")
    grid = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    scale = colors.Normalize(0, max(1.0, *(ranks.max() for ranks in panels.values())))
    for panel, (name, ranks) in zip(grid.flat, panels.items(), strict=False):
        _sites(panel, found.sites, ranks, scale)
        panel.set_title(name, fontsize=8, fontweight="bold" if name == "mean of groups" else "normal")
    for panel in list(grid.flat)[len(panels) :]:
        # Only the labels of its column, which belong to the panels above as well.
        panel.tick_params(length=0, labelsize=7, pad=2)
        panel.tick_params(axis="x", labelrotation=90)
        panel.spines[:].set_visible(False)
    if layers:
        picture.supylabel("layer", fontsize=9)
    mappable = cm.ScalarMappable(scale, COLORS)
    picture.colorbar(mappable, ax=grid, shrink=0.6, aspect=30, label="ranks kept").outline.set_visible(False)
    return picture


def distances(found: Kept, budget: int, title: str) -> figure.Figure:
    """How much the strategies of each two groups differ: mean over sites of |difference of ranks|, over the budget."""
    apart = np.abs(found.ranks[:, None] - found.ranks[None]).mean(axis=-1) / budget
    count = len(found.groups)
    shown = np.where(np.eye(count, dtype=bool), np.nan, apart)
    inches = np.clip(0.38 * count, 2.5, 9.0)
    picture = figure.Figure(figsize=(inches + 2.2, inches + 1.2))
    picture.suptitle(f"distance of strategies: {title}\nmean |difference of ranks| per site / budget of {budget}")
    panel = picture.subplots()
    image = panel.imshow(shown, cmap=COLORS, vmin=0)
    names = [client_plots.drawable(group) for group in found.groups]
    panel.set_xticks(range(count), names, rotation=90)
    panel.set_yticks(range(count), names)
    panel.tick_params(length=0, labelsize=np.clip(0.75 * 72 * inches / count, 3, 8))
    panel.spines[:].set_visible(False)
    if count <= NUMBERS:
        for (row, column), value in np.ndenumerate(shown):
            if row != column:
                ink = "white" if image.norm(value) > 0.7 else "0.1"
                panel.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=ink)
    bar = picture.colorbar(image, ax=panel, shrink=0.6, aspect=30, label="0: the same, 2: no site in common")
    bar.outline.set_visible(False)
    return picture


def against_budget(panels: Mapping[str, Mapping[str, Curve]], bases: Mapping[str, float], metric: str) -> figure.Figure:
    """The mean over groups against the budget: a panel a pool, a line a method, the base across.

    Args:
      panels: {pool: {method: curve}}.
      bases: {pool: mean over groups before personalization}, NaN where that is not known.
      metric: name for the axis.
    """
    picture = figure.Figure(figsize=(1.4 + 3.0 * len(panels), 3.5))
    grid = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(method for of in panels.values() for method in of))
    budgets = sorted({int(budget) for of in panels.values() for curve in of.values() for budget in curve.budgets})
    for panel, (pool, of) in zip(grid, panels.items(), strict=True):
        if np.isfinite(bases[pool]):
            panel.axhline(bases[pool], color="0.45", linestyle="--", linewidth=1, label="base")
        for method, curve in of.items():
            place = methods.index(method)
            color, marker = METHODS[place % len(METHODS)]
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.5, "zorder": 3 - place / 100}
            # Side by side, so that bars do not cover one another.
            shift = 2.0 ** (0.05 * (place - (len(methods) - 1) / 2)) if curve.deviation is not None else 1.0
            panel.errorbar(curve.budgets * shift, curve.mean, curve.deviation, label=method, capsize=2, **style)
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [str(budget) for budget in budgets])
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.set(title=f"{pool} clients", xlabel="budget (ranks a site)")
        panel.grid(axis="y", color="0.92")
    grid[0].set_ylabel(f"{client_plots.axis_label(metric)}, mean over groups")
    found = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in grid]
    handles = {label: handle for part in found for handle, label in part}
    picture.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=min(len(handles), 1 + 2 * len(panels)),
        columnspacing=1.2,
    )
    return picture


def _sites(panel: axes.Axes, sites: Sequence[str], ranks: np.ndarray, scale: colors.Normalize) -> None:
    """One panel of the heat map: the stack, and below it a bar a site outside of it."""
    layers, kinds, outside = _places(sites)
    at = dict(zip(sites, ranks, strict=True))
    table = np.full((len(layers), len(kinds)), np.nan)
    for site, value in at.items():
        if found := STACKED.fullmatch(site):
            table[layers.index(int(found[1])), kinds.index(_kind(found[2]))] = value
    style = {"cmap": COLORS, "norm": scale, "edgecolors": "0.85", "linewidth": 0.3}
    if table.size:
        panel.pcolormesh(np.arange(len(kinds) + 1), np.arange(len(layers) + 1), np.ma.masked_invalid(table), **style)
    width, top = max(len(kinds), 1), len(layers) + 0.6 * bool(layers)
    for index, site in enumerate(outside):
        panel.pcolormesh([0, width], [top + 1.4 * index, top + 1.4 * (index + 1)], [[at[site]]], **style)
    panel.set(xlim=(0, width), ylim=(top + 1.4 * len(outside), 0))
    panel.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=90)
    every = -(-len(layers) // 6)
    ticks = [(place + 0.5, str(layer)) for place, layer in enumerate(layers) if place % every == 0]
    ticks += [(top + 1.4 * (index + 0.5), _ending(site)) for index, site in enumerate(outside)]
    panel.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    panel.tick_params(length=0, labelsize=7, pad=2)
    panel.spines[:].set_visible(False)


def _places(sites: Sequence[str]) -> tuple[list[int], list[str], list[str]]:
    """Layers and kinds of the sites of a stack, and the sites outside of it."""
    inside = [found for site in sites if (found := STACKED.fullmatch(site))]
    present = list(dict.fromkeys(_kind(found[2]) for found in inside))
    order = list(KINDS.values())
    kinds = sorted(present, key=lambda kind: order.index(kind) if kind in order else len(order))
    return sorted({int(found[1]) for found in inside}), kinds, [site for site in sites if not STACKED.fullmatch(site)]


def _kind(name: str) -> str:
    for pattern, kind in KINDS.items():
        if re.fullmatch(rf"(.+\.)?({pattern})", name):
            return kind
    return name


def _ending(site: str) -> str:
    """`pooler` for bert.pooler.dense."""
    parts = [part for part in site.split(".") if part not in ("dense", "out_proj")]
    return parts[-1] if parts else site


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")

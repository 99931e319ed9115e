"""Pictures of the clients of a finished run: each before and after, and what personalization gains."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import axes, figure, font_manager, lines, ticker

FONT = "DejaVu Sans"  # comes with matplotlib
# Okabe and Ito's colours for pools, two of Tol's for stages: colour-blind readers tell them apart, shapes help.
POOLS = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "v"))
STAGES = {  # stage: colour, marker, its size; where they coincide the smaller, later one leaves the others' rims
    "majority": ("0.1", "|", 11),
    "base": ("0.45", "o", 8),
    "global": ("#2E9C8B", "s", 5.5),
    "personal": ("#882255", "D", 4),
}
ROWS = {"client": 40, "group": 100}  # most rows of clients.png by clients, and by groups; beyond, a row a pool


class Outcome(NamedTuple):
    """How a client that has test examples ended."""

    client: int
    name: str
    group: str
    pool: str
    train: int  # examples
    test: int  # examples
    stages: dict[str, float]  # headline metric: `majority`, `base` and `global` where there are such, `personal`


def outcomes(rows: Iterable[Mapping[str, Any]], metric: str, total: int, personal: str = "personal") -> list[Outcome]:
    """One outcome a client that has test examples, from rows of clients.parquet; `personal` names the point to show."""
    # Without rounds the global model is the base.
    wanted = {(total, "global"): "global", (0, "global"): "base", (total, personal): "personal"}
    found: dict[int, Outcome] = {}
    for row in rows:
        stage = wanted.get((row["round"], row["point"]))
        if stage is None or not row["examples"]:
            continue
        new = Outcome(*(row[key] for key in ("client", "name", "group", "pool", "train_examples", "examples")), {})
        stages = found.setdefault(row["client"], new).stages
        # The share of the most frequent label is an accuracy; beside another metric it says nothing.
        if metric == "accuracy" and np.isfinite(row["majority"]):
            stages["majority"] = row["majority"]
        stages[stage] = row[metric]
    return list(found.values())


def dots(
    clients: Sequence[Outcome], algorithm: str, metric: str, title: str, personal: str = "personalized"
) -> figure.Figure:
    """A row a client, or a group where clients are many: majority label, base, federated and personalized."""
    counts = {key: len({(client.pool, getattr(client, key)) for client in clients}) for key in ROWS}
    key = next((key for key, most in ROWS.items() if counts[key] <= most), "pool")
    pools = {pool: list(_by(key, members).values()) for pool, members in _by("pool", clients).items()}
    single = all(len(row) == 1 for rows in pools.values() for row in rows)
    heights = [len(rows) + 0.4 for rows in pools.values()]
    inches = 1.1 + 0.35 * len(pools) + (0.2 if single else 0.34) * sum(heights)
    picture = figure.Figure(figsize=(7, inches))
    picture.suptitle(f"{title} (in brackets: test examples)")
    panels = picture.subplots(len(pools), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    shown = [stage for stage in STAGES if _values(clients, stage).size]
    for panel, (pool, rows) in zip(panels, pools.items(), strict=True):
        _panel(panel, rows, key, shown, single)
        panel.set_title(f"{pool}: {sum(map(len, rows))} clients, their means dotted")
    panels[-1].set_xlabel(axis_label(metric) + ("" if single else "; marks: median of clients, bars: middle half"))
    labels = {"majority": "majority label", "base": "base", "global": algorithm, "personal": personal}
    marks = [lines.Line2D([], [], label=labels[stage], **_mark(stage)) for stage in shown]
    picture.legend(handles=marks, loc="outside lower center", ncols=len(marks))
    return picture


def before(client: Outcome) -> str | None:
    """The stage that a client was personalized from; where no model is shared, that is the base. None if not known."""
    return next((stage for stage in ("global", "base") if stage in client.stages), None)


def gain(clients: Sequence[Outcome], metric: str, title: str) -> figure.Figure:
    """What personalization changes for each client, against how much it has to learn from."""
    picture = figure.Figure(figsize=(6.5, 4.2))
    panel = picture.subplots()
    panel.axhline(0, color="0.3", linewidth=0.8)
    largest, handles = max(client.test for client in clients), []
    place = _across(panel, clients)
    for (color, marker), (pool, members) in zip(itertools.cycle(POOLS), _by("pool", clients).items(), strict=False):
        change = _values(members, "personal") - _values(members, before(members[0]))
        area = [12 + 188 * client.test / largest for client in members]
        panel.scatter(
            [place(client) for client in members], change, area, color=color, marker=marker, alpha=0.6, linewidth=0
        )
        label = f"{pool}: mean {change.mean():+.3f}"
        handles.append(lines.Line2D([], [], linestyle="", color=color, marker=marker, label=label))
    panel.set_ylabel(f"change of {axis_label(metric)} by personalization")
    panel.set_title(f"{title}; area: the client's test examples, {largest:,} at most")
    panel.grid(axis="y", color="0.92")
    panel.legend(handles=handles)
    return picture


def _across(panel: axes.Axes, clients: Sequence[Outcome]) -> Callable[[Outcome], float]:
    """Where a client stands: at the number of its training examples or, where all have as many, at its group."""
    sizes, groups = {client.train for client in clients}, sorted({client.group for client in clients})
    if len(sizes) == 1 < len(groups) and sizes != {0}:
        pools = sorted({client.pool for client in clients})
        beside = dict(zip(pools, np.linspace(-0.2, 0.2, len(pools)) if len(pools) > 1 else [0.0], strict=True))
        names = [drawable(group, 10) for group in groups]
        panel.set_xticks(range(len(groups)), names, rotation=90 if len(names) > 12 or max(map(len, names)) > 4 else 0)
        panel.set_xlabel(f"group; each client has {sizes.pop():,} training examples")
        return lambda client: groups.index(client.group) + beside[client.pool]
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    none = " (none: 0.5)" if 0 in sizes else ""
    panel.set_xlabel(f"training examples of the client{none}")
    return lambda client: max(client.train, 0.5)  # a logarithmic axis has no zero


def axis_label(metric: str) -> str:
    """Name of a metric on an axis."""
    return metric.replace("_", " ") + (" (nats, lower is better)" if metric == "loss" else "")


def _panel(panel: axes.Axes, rows: list[list[Outcome]], key: str, shown: Sequence[str], single: bool) -> None:
    """The rows of a pool, those that end best on top."""
    rows.sort(key=lambda members: np.median(_values(members, "personal")))
    lanes = np.linspace(0.27, -0.27, len(shown)) * (not single)
    for height, members in enumerate(rows):
        if single:
            path = [value for stage, value in members[0].stages.items() if stage != "majority"]
            panel.plot([min(path), max(path)], [height, height], color="0.8", linewidth=1.5, zorder=1)
        elif height % 2:
            panel.axhspan(height - 0.5, height + 0.5, color="0.96", zorder=0)
        for lane, stage in zip(height + lanes, shown, strict=True):
            values, style = _values(members, stage), {"color": STAGES[stage][0], "zorder": 2}
            if values.size and stage != "majority" and not single:
                panel.plot(values, np.full(len(values), lane), ".", alpha=0.25, markersize=4, mew=0, **style)
                panel.plot(np.quantile(values, (0.25, 0.75)), [lane, lane], linewidth=1.5, **style)
            if values.size:
                panel.plot(np.median(values), lane, zorder=3, **_mark(stage))
    for stage in shown:
        if (values := _values(itertools.chain(*rows), stage)).size:
            panel.axvline(values.mean(), color=STAGES[stage][0], linestyle=":", linewidth=0.8, zorder=1)
    panel.set(ylim=(-0.7, len(rows) - 0.3), yticks=range(len(rows)), yticklabels=[_name(row, key) for row in rows])
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="0.92")


def _by(key: str, clients: Iterable[Outcome]) -> dict[Any, list[Outcome]]:
    parts: dict[Any, list[Outcome]] = {}
    for client in clients:
        parts.setdefault(getattr(client, key), []).append(client)
    return parts


def drawable(name: str, most: int = 24) -> str:
    """A name of at most `most` letters, with what the font cannot draw written as escapes."""
    known = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    name = name if len(name) <= most else name[: most - 1] + "…"
    return "".join(letter if ord(letter) in known else ascii(letter)[1:-1] for letter in name).replace("$", r"\$")


def _name(members: Sequence[Outcome], key: str) -> str:
    """Name and test examples of a row."""
    name = drawable(getattr(members[0], key) if len(members) > 1 else members[0].name)
    clients = f"{len(members)} clients, " if len(members) > 1 else ""
    return f"{name}  ({clients}{sum(client.test for client in members):,})"


def _mark(stage: str) -> dict[str, Any]:
    color, marker, size = STAGES[stage]
    fill = "none" if stage == "base" else "full"
    return {"color": color, "marker": marker, "markersize": size, "fillstyle": fill, "linestyle": ""}


def _values(clients: Iterable[Outcome], stage: str) -> np.ndarray:
    return np.array([client.stages[stage] for client in clients if stage in client.stages])

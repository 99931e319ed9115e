"""Pictures of a finished run for people to look at."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib import axes, figure, ticker

from fedjax_peft.reports import (
    client_plots,
    expert_plots,
    finished,
    method_plots,
    rank_plots,
    recovery_plots,
    spectrum_plots,
)

STYLE = {
    "font.family": client_plots.FONT,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.titlesize": 10,
    "figure.constrained_layout.use": True,
}


def write(
    folder: epath.PathLike,
    rounds: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    *,
    algorithm: str,
    metric: str,
    total: int,
    point: str = "personal",
) -> None:
    """Writes clients.png, gain.png where clients were evaluated before too, and, of a run of rounds, curves.png.

    Args:
      folder: made if it does not exist.
      rounds: lines of rounds.jsonl.
      rows: of clients.parquet.
      algorithm: name for titles.
      metric: column of rows to show.
      total: rounds of the run.
      point: at which clients are personalized.
    """
    clients = client_plots.outcomes(rows, metric, total, point)
    personal = "personalized" if point == "personal" else point
    title = f"{algorithm} after {total} rounds" if total or point == "personal" else algorithm
    with matplotlib.rc_context(STYLE):
        pictures = {
            "clients": client_plots.dots(clients, algorithm, metric, title, personal),
        }
        if any(client_plots.before(client) for client in clients):
            pictures["gain"] = client_plots.gain(clients, metric, title if point == "personal" else point)
        # A method that never trains in rounds has no curves.
        if total or point == "personal":
            pictures["curves"] = curves(rounds, rows, metric, title, total, point)
        _save(folder, pictures)


def write_budgets(
    folder: epath.PathLike,
    strategies: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[tuple[str, int | None], float]],
    *,
    method: str,
    budget: int,
    metric: str,
) -> None:
    """Writes ranks.png and distances.png of one method at one budget, and budgets.png of all methods.

    A picture with nothing to compare is left out: one group has no distances, one budget makes no curve.

    Args:
      folder: made if it does not exist.
      strategies: rows of strategies.parquet.
      scores: {pool: {(method, budget): mean over groups}}; what has no budget is not drawn but for `base`.
      method, budget: whose ranks to show, of the clients of the first pool.
      metric: of the scores.
    """
    pool, point = next(iter(scores)), f"{method} r{budget}"
    rows = [row for row in strategies if (row["pool"], row["point"]) == (pool, point)]
    pictures = {}
    with matplotlib.rc_context(STYLE):
        if rows:
            kept, title = rank_plots.kept(rows), f"{point}, {pool} clients"
            pictures["ranks"] = rank_plots.heat_map(kept, title)
            if len(kept.groups) > 1:
                pictures["distances"] = rank_plots.distances(kept, budget, title)
        if len({at for of in scores.values() for _, at in of if at}) > 1:
            panels = {pool: rank_plots.curves(of) for pool, of in scores.items()}
            bases = {pool: of.get(("base", None), np.nan) for pool, of in scores.items()}
            pictures["budgets"] = rank_plots.against_budget(panels, bases, metric)
        _save(folder, pictures)


def write_comparison(folder: epath.PathLike, scores: Mapping[str, Mapping[str, Sequence[float]]], metric: str) -> None:
    """Writes methods.png of several runs and, where methods were evaluated at several budgets, budgets.png.

    Args:
      folder: made if it does not exist.
      scores: {pool: {way to personalize, `base` first: mean over groups of each seed}}.
      metric: of the scores.
    """
    panels = {
        pool: rank_plots.curves({finished.split(way): values for way, values in of.items()})
        for pool, of in scores.items()
    }
    with matplotlib.rc_context(STYLE):
        pictures = {"methods": method_plots.ways(scores, metric)}
        if any(len(curve.budgets) > 1 for of in panels.values() for curve in of.values()):
            bases = {pool: float(np.mean(of.get("base", np.nan))) for pool, of in scores.items()}
            pictures["budgets"] = rank_plots.against_budget(panels, bases, metric)
        _save(folder, pictures)


def write_spectra(
    folder: epath.PathLike,
    rows: Sequence[Mapping[str, Any]],
    strategies: Iterable[Mapping[str, Any]],
    *,
    algorithm: str,
    point: str,
) -> None:
    """Writes numerical_ranks.png, singular_values.png and, of a run evaluated between rounds, spectra.png.

    Args:
      folder: made if it does not exist.
      rows: of clients.parquet.
      strategies: rows of strategies.parquet, of which those of seen clients are shown: at `point`, where clients are in
        the end, and between rounds.
      algorithm: name for titles.
    """
    seen = [row for row in strategies if row["pool"] == "seen"]
    own, between = ([row for row in seen if row["point"] == name] for name in (point, "global"))
    with matplotlib.rc_context(STYLE):
        pictures = {"numerical_ranks": spectrum_plots.over_rounds(rows, algorithm)}
        if own:
            pictures["singular_values"] = spectrum_plots.values(own, algorithm)
        if len({row["round"] for row in between}) > 1:
            pictures["spectra"] = spectrum_plots.values_over_rounds(between, algorithm)
        _save(folder, pictures)


def write_experts(
    folder: epath.PathLike, strategies: Iterable[Mapping[str, Any]], *, algorithm: str, point: str
) -> None:
    """Writes experts.png.

    Args:
      folder: made if it does not exist.
      strategies: rows of strategies.parquet, of which those at `point` are shown.
      algorithm: name for the title.
    """
    held = expert_plots.held(row for row in strategies if row["point"] == point)
    with matplotlib.rc_context(STYLE):
        _save(folder, {"experts": expert_plots.heat_map(held, algorithm)})


def write_recovery(
    folder: epath.PathLike, curves: Mapping[str, np.ndarray], true_ranks: Sequence[int], methods: Sequence[str]
) -> None:
    """Writes losses.png and learnt_ranks.png of all methods, and singular_values.png of the first.

    Args:
      folder: made if it does not exist.
      curves: arrays `METHOD/NAME` of curves.npz of a `rank_recovery.study`.
    """
    rounds, first = curves[f"{methods[0]}/rounds"], methods[0]
    singular = {name: curves[f"{first}/{name}"] for name in spectrum_plots.LEVELS}
    with matplotlib.rc_context(STYLE):
        pictures = {
            name: draw(rounds, {method: curves[f"{method}/{key}"] for method in methods}, true_ranks)
            for name, key, draw in (
                ("losses", "loss", recovery_plots.losses),
                ("learnt_ranks", "ranks", recovery_plots.learnt),
            )
        }
        _save(folder, pictures | {"singular_values": recovery_plots.spectrum(singular, true_ranks, first)})


def _save(folder: epath.PathLike, pictures: Mapping[str, figure.Figure]) -> None:
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with (folder / f"{name}.png").open("wb") as file:
            picture.savefig(file, dpi=160)


def curves(
    rounds: Sequence[Mapping], rows: Iterable[Mapping], metric: str, title: str, total: int, point: str = "personal"
) -> figure.Figure:
    """Training loss, the metric of each pool, throughput and padding over rounds."""
    picture = figure.Figure(figsize=(8, 5))
    picture.suptitle(title)
    (loss, scores), (speed, waste) = picture.subplots(2, 2, height_ratios=(2.6, 1), sharex=True)
    # A round in which nobody reported has no loss, whatever its line says.
    _trend(loss, rounds, [line["loss"] if line["reported"] else np.nan for line in rounds])
    loss.set(title="training: mean over the cohort's examples", ylabel="loss (nats)")
    _evaluations(scores, rows, metric, total, point)
    _trend(speed, rounds, [line["tokens_per_second"] for line in rounds], from_zero=True)
    speed.set(ylabel="tokens / s", xlabel="round")
    speed.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    _trend(waste, rounds, [100 * line["padding_waste"] for line in rounds], from_zero=True)
    waste.set(ylabel="padding\n(% of tokens)", xlabel="round")
    waste.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    return picture


def _trend(panel: axes.Axes, rounds: Sequence[Mapping], values: Sequence[float], from_zero: bool = False) -> None:
    """Values of rounds, and their running median where rounds are many."""
    index, width = np.array([line["round"] + 1 for line in rounds]), len(values) // 20
    panel.plot(index, values, color="0.25" if width < 2 else "0.75", linewidth=1, marker="." if width < 2 else "")
    if from_zero:
        panel.set_ylim(0, 1.1 * max(values, default=0.0) or 1.0)
    index, values = index[np.isfinite(values)], np.array(values)[np.isfinite(values)]
    if 1 < width <= len(values):
        windows = np.lib.stride_tricks.sliding_window_view(values, width)
        panel.plot(index[width // 2 :][: len(windows)], np.median(windows, axis=1), color="0.1", linewidth=1.5)
    panel.grid(axis="y", color="0.92")


def _evaluations(panel: axes.Axes, rows: Iterable[Mapping], metric: str, total: int, point: str) -> None:
    """Mean and standard deviation over the clients of each pool at each evaluation, and of those that personalized."""
    scores: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in rows:
        if row["examples"]:
            scores.setdefault(row["pool"], {}).setdefault((row["point"], row["round"]), []).append(row[metric])
    styles = zip(itertools.cycle(client_plots.POOLS), scores.items(), strict=False)
    for shift, ((color, marker), (pool, of)) in enumerate(styles, 1):
        index = sorted(at for name, at in of if name == "global")
        low, mean, high = np.reshape([_spread(of["global", at]) for at in index], (-1, 3)).T
        style = {"color": color, "marker": marker}
        label = pool if len(index) > 1 else f"{pool}, base"
        panel.plot(index, mean, markersize=3.5, label=label if index else None, **style)
        panel.fill_between(index, low, high, color=color, alpha=0.15, linewidth=0)
        if len(early := sorted(at for name, at in of if name == point)) > 1:
            panel.plot(early, [np.mean(of[point, at]) for at in early], color=color, linestyle="--", linewidth=1)
        low, mean, high = _spread(of[point, total])
        style |= {"markersize": 6, "markeredgecolor": "0.1", "linestyle": "", "capsize": 2}
        # Beside the last round, so that the bars of pools do not cover one another.
        at, name = (total or 1) * (1 + 0.035 * shift), "personalized" if point == "personal" else point
        panel.errorbar(at, mean, [[mean - low], [high - mean]], label=f"{pool}, {name}", **style)
    panel.set(title="test: mean over clients ± standard deviation", ylabel=client_plots.axis_label(metric))
    panel.grid(axis="y", color="0.92")
    panel.legend(fontsize=8)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean between one standard deviation less and more, but no further than the values go."""
    mean, deviation = np.mean(values), np.std(values)
    return max(mean - deviation, np.min(values)), mean, min(mean + deviation, np.max(values))

"""Tables of one and of several run directories, from numbers that can be computed by hand."""

import itertools
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from fedjax_peft import metrics, summaries
from fedjax_peft.reports import comparison, finished, report

NAN = math.nan
# client: group, pool, training examples, test examples, majority, then the metric of base, global and personal
CLIENTS = {
    "a0": ("A", "seen", 8, 4, 0.5, (0.25, 0.5, 0.75)),
    "a1": ("A", "seen", 2, 1, 0.0, (0.0, 0.0, 1.0)),
    "b0": ("B", "seen", 5, 5, 0.2, (0.2, 0.4, 0.2)),
    "c0": ("C", "seen", 3, 0, NAN, (NAN, NAN, NAN)),
    "d0": ("D", "unseen", 0, 2, NAN, (0.5, 0.5, 0.5)),
}


def write_run(
    workdir: pathlib.Path,
    clients: dict[str, Any] = CLIENTS,
    metric: str = "accuracy",
    algorithm: str = "fedit",
    seed: int = 0,
    sha256: str = "one",
    rounds: int = 2,
    personal: Sequence[str] = ("personal",),
    shared: bool = True,
    base: bool = True,
    early: bool = False,
    **settings: Any,
) -> pathlib.Path:
    """A finished run of two rounds, written as `loop.run` writes it.

    Clients hold a number for base, global and each of the `personal` points; without `shared` there is no global one,
    without `base` that was not evaluated. With `early`, points were evaluated before round 1 too, to other numbers.
    """
    workdir.mkdir()
    names = ["loss"] if metric == "loss" else ["loss", metric]
    points = {"base": (0, "global"), "global": (rounds, "global")} | {name: (rounds, name) for name in personal}
    rows = [
        {
            "round": index, "client": client, "name": name, "group": group, "pool": pool, "point": point,
            "train_examples": train, "examples": test, "majority": majority,
        }
        | dict.fromkeys(names, 1.0 if test else NAN)
        | {metric: values[stage]}
        for stage, (name_of, (index, point)) in enumerate(points.items())
        if (name_of != "global" or (shared and rounds)) and (name_of != "base" or base)
        for client, (name, (group, pool, train, test, majority, values)) in enumerate(clients.items())
    ]  # fmt: skip
    summary: dict[str, Any] = {"rounds": rounds, "pools": {}}
    for pool in dict.fromkeys(row["pool"] for row in rows):
        summary["pools"][pool] = {
            name: summaries.summarize(
                [row for row in rows if (row["pool"], row["round"], row["point"]) == (pool, *key)], names
            )
            for name, key in points.items()
            if (shared or name != "global") and (base or name != "base")
        }
    if early:
        rows += [row | {"round": 1, metric: 0.125} for row in rows if row["point"] in personal]
    for index in range(rounds):
        line = {"round": index, "loss": 2.0 - index, "reported": 3, "tokens_per_second": 100.0, "padding_waste": 0.25}
        metrics.append_lines(workdir / "rounds.jsonl", [line])
    metrics.merge_rows(workdir / "clients.parquet", rows, 3)
    if personal != ("personal",):
        metrics.merge_rows(workdir / "strategies.parquet", strategies(clients, personal), rounds)
    metrics.write_json(workdir / "summary.json", summary)
    experiment = {"algorithm": {"name": algorithm}, "seed": seed, "adapter": {"rank": 8, "alpha": 16.0}, **settings}
    metrics.write_json(
        workdir / "manifest.json", {"experiment": experiment, "sha256": {"base": "base", "test": sha256}}
    )
    return workdir


def strategies(clients: dict[str, Any], personal: Sequence[str]) -> list[dict[str, Any]]:
    """Strategies of two sites: the first keeps all ranks."""
    return [
        {
            "round": 2, "client": client, "name": name, "group": group, "pool": pool, "point": point,
            "site": f"encoder.layer.{layer}.attention.self.query", "ranks": (1 - layer) * 2 * budget, "scale": 1.0,
        }
        for point in personal
        if (budget := finished.split(point)[1])
        for client, (name, (group, pool, *_)) in enumerate(clients.items())
        for layer in range(2)
    ]  # fmt: skip


def cells(printed: str) -> list[list[str]]:
    """The header and the rows of a printed table."""
    lines = [line for line in printed.splitlines() if line[:1] in "┃│" and line]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]


def several_of(clients: dict[str, Any], personal: Sequence[str]) -> dict[str, Any]:
    """Clients that end alike at every point."""
    return {name: (*client, (*of[:2], *of[2:] * len(personal))) for name, (*client, of) in clients.items()}


def shifted(change: float) -> dict[str, Any]:
    """Clients that end better or worse than `CLIENTS` after personalization."""
    return {
        name: (*client, (before, after, personal + change))
        for name, (*client, (before, after, personal)) in CLIENTS.items()
    }


def test_one_run_is_pooled_by_group_and_averaged_over_clients(tmp_path, capsys):
    report.show(write_run(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert printed.startswith("Accuracy after 2 rounds of fedit")
    assert cells(printed) == [
        ["group", "pool", "train", "test", "majority", "base", "fedit", "personalized"],
        ["A", "seen", "10", "5", "0.400", "0.200", "0.400", "0.800"],
        ["B", "seen", "5", "5", "0.200", "0.200", "0.400", "0.200"],
        ["C", "seen", "3", "0", "–", "–", "–", "–"],
        ["mean over 3 clients", "seen", "18", "10", "0.233", "0.150", "0.300", "0.650"],
        ["standard deviation", "seen", "", "", "0.205", "0.108", "0.216", "0.334"],
        ["worst 10 %", "seen", "", "", "0.000", "0.000", "0.000", "0.200"],
        ["D", "unseen", "0", "2", "–", "0.500", "0.500", "0.500"],
        ["mean over 1 clients", "unseen", "0", "2", "–", "0.500", "0.500", "0.500"],
        ["standard deviation", "unseen", "", "", "–", "0.000", "0.000", "0.000"],
        ["worst 10 %", "unseen", "", "", "–", "0.500", "0.500", "0.500"],
    ]
    assert str(tmp_path / "run" / "plots") in printed.replace("\n", "")


def test_a_single_pool_is_enough(tmp_path, capsys):
    seen = {name: client for name, client in CLIENTS.items() if client[1] == "seen"}
    report.show(write_run(tmp_path / "run", seen))
    table = cells(capsys.readouterr().out)
    assert {row[1] for row in table[1:]} == {"seen"}
    assert len(table) == 1 + 3 + 3


@pytest.mark.parametrize("metric", ["exact_match", "mcc", "loss"])
def test_the_headline_is_the_first_metric_that_is_no_loss(tmp_path, capsys, metric):
    report.show(write_run(tmp_path / "run", metric=metric))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{metric.replace('_', ' ').capitalize()} after")
    table = cells(printed)
    # The majority label's share is an accuracy and stands beside no other metric.
    assert table[0] == ["group", "pool", "train", "test", "base", "fedit", "personalized"]
    assert table[1] == ["A", "seen", "10", "5", "0.200", "0.400", "0.800"]
    assert table[6][-1] == ("1.000" if metric == "loss" else "0.200")


def test_very_many_groups_leave_only_the_pools(tmp_path, capsys):
    many = {f"c{i}": (f"g{i}", "seen", 10, 10, 0.5, (0.0, 0.5, 1.0)) for i in range(report.ROWS + 1)}
    report.show(write_run(tmp_path / "run", many))
    assert [row[0] for row in cells(capsys.readouterr().out)[1:]] == [
        f"mean over {report.ROWS + 1} clients",
        "standard deviation",
        "worst 10 %",
    ]


def test_seeds_of_an_experiment_are_averaged(tmp_path, capsys):
    runs = [write_run(tmp_path / str(seed), shifted(0.1 * seed), seed=seed) for seed in range(3)]
    report.compare([*runs, write_run(tmp_path / "other", algorithm="ffa_lora")])
    printed = capsys.readouterr().out
    assert "mean ± sample deviation over seeds" in " ".join(printed.split())
    # Personalized means .65, .75, .85: mean .75, deviation (over two degrees of freedom) .1.
    assert cells(printed) == [
        ["method", "pool", "seeds", "clients", "before", "mean", "std", "pooled", "worst 10 %"],
        ["fedit", "seen", "3", "3", "0.300±0.000", "0.750±0.100", "0.334±0.000", "0.600±0.100", "0.300±0.100"],
        ["ffa_lora", "seen", "1", "3", "0.300", "0.650", "0.334", "0.500", "0.200"],
        ["fedit", "unseen", "3", "1", "0.500±0.000", "0.600±0.100", "0.000±0.000", "0.600±0.100", "0.600±0.100"],
        ["ffa_lora", "unseen", "1", "1", "0.500", "0.500", "0.000", "0.500", "0.500"],
    ]


def test_what_is_evaluated_when_sets_no_runs_apart(tmp_path, capsys):
    fewer = {"seed": 1, "base": False, "shared": False, "evaluate": {"base": False, "end": False, "every": 1}}
    report.compare([write_run(tmp_path / "0"), write_run(tmp_path / "1", **fewer)])
    rows = cells(capsys.readouterr().out)[1:]
    assert [row[:5] for row in rows] == [["fedit", "seen", "2", "3", "–"], ["fedit", "unseen", "2", "1", "–"]]
    report.compare(
        [write_run(tmp_path / f"{seed}", SEVERAL, personal=WAYS, **more) for seed, more in ((2, {}), (3, fewer))]
    )
    assert [row[0] for row in cells(capsys.readouterr().out)[1:5]] == list(WAYS)


def test_seeds_of_the_data_are_seeds(tmp_path, capsys):
    runs = [
        write_run(tmp_path / str(seed), seed=seed, sha256=str(seed), data={"name": "a", "partition": {"seed": seed}})
        for seed in (42, 62)
    ]
    report.compare(runs)
    printed = capsys.readouterr().out
    assert [row[:3] for row in cells(printed)[1:]] == [["fedit", "seen", "2"], ["fedit", "unseen", "2"]]
    assert "hard to compare" not in printed


def test_experiments_of_one_algorithm_are_told_apart_by_what_differs(tmp_path, capsys):
    ranks = [write_run(tmp_path / f"r{rank}", adapter={"rank": rank, "alpha": 16.0}, seed=rank) for rank in (4, 8)]
    report.compare([*ranks, write_run(tmp_path / "ffa", algorithm="ffa_lora", train={"steps": 3})])
    printed = capsys.readouterr().out
    assert [row[0] for row in cells(printed)[1:4]] == ["fedit rank=4", "fedit rank=8", "ffa_lora"]
    assert "over seeds" not in printed


def test_an_argument_that_a_run_leaves_to_the_function_is_not_in_its_label(tmp_path, capsys):
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "named")]
    content = metrics.read_json(runs[1] / "manifest.json")
    content["experiment"]["algorithm"]["proximal"] = 0.5
    metrics.write_json(runs[1] / "manifest.json", content)
    report.compare(runs)
    assert [row[0] for row in cells(capsys.readouterr().out)[1:3]] == ["fedit", "fedit proximal=0.5"]


def test_settings_with_the_same_last_name_keep_their_section(tmp_path, capsys):
    steps = list(itertools.product((1, 2), repeat=2))
    report.compare([write_run(tmp_path / f"{a}{b}", train={"steps": a}, personalize={"steps": b}) for a, b in steps])
    first = "".join(row[0] for row in cells(capsys.readouterr().out)[1:3]).replace(" ", "")
    assert first.startswith("feditpersonalize.steps=1train.steps=1")


def test_pools_that_only_some_runs_have(tmp_path, capsys):
    seen = {name: client for name, client in CLIENTS.items() if client[1] == "seen"}
    report.compare([write_run(tmp_path / "one", seen), write_run(tmp_path / "two", algorithm="ffa_lora")])
    assert [row[:2] for row in cells(capsys.readouterr().out)[1:]] == [
        ["fedit", "seen"],
        ["ffa_lora", "seen"],
        ["ffa_lora", "unseen"],
    ]


def test_runs_on_other_data_are_marked(tmp_path, capsys):
    report.compare([write_run(tmp_path / "one"), write_run(tmp_path / "two", algorithm="ffa_lora", sha256="two")])
    printed = capsys.readouterr().out
    assert "differ in the SHA-256 of test" in printed
    assert "SHA-256 of base" not in printed


# Groups differ in size, so that means over clients, over groups and over examples differ.
WAYS = ("fedp2eft r2", "fedp2eft r4", "lora r2", "lora")
SEVERAL = {
    "a0": ("A", "seen", 8, 3, 0.5, (0.0, 0.1, 0.9, 1.0, 0.3, 0.0)),
    "a1": ("A", "seen", 8, 1, 0.5, (0.4, 0.3, 0.1, 1.0, 0.3, 0.4)),
    "b0": ("B", "seen", 8, 9, 0.5, (0.2, 0.2, 0.5, 0.5, 0.4, 0.2)),
    "a2": ("A", "unseen", 8, 1, 0.5, (0.1, 0.1, 0.2, 0.3, 0.1, 0.1)),
}


def several(change: float = 0.0) -> dict[str, Any]:
    return {name: (*rest, tuple(value + change for value in values)) for name, (*rest, values) in SEVERAL.items()}


def tables(printed: str) -> list[list[list[str]]]:
    """The cells of each printed table."""
    return [cells("┃" + part) for part in printed.split("┏")[1:]]


def test_several_ways_to_personalize_stand_side_by_side_in_a_table_a_pool(tmp_path, capsys):
    report.show(write_run(tmp_path / "run", SEVERAL, algorithm="fedp2eft", personal=WAYS))
    printed = capsys.readouterr().out
    assert "Accuracy after 2 rounds of fedp2eft: seen clients" in printed
    seen, unseen, budgets = tables(printed)
    assert seen[1:] == [
        ["group", "base", "global", "fedp2eft r2", "fedp2eft r4", "lora r2", "lora"],
        ["A", "0.100", "0.150", "0.700", "1.000", "0.300", "0.100"],
        ["B", "0.200", "0.200", "0.500", "0.500", "0.400", "0.200"],
        ["mean over 3 clients", "0.200", "0.200", "0.500", "0.833", "0.333", "0.200"],
        ["mean over 2 groups", "0.150", "0.175", "0.600", "0.750", "0.350", "0.150"],
        ["standard deviation", "0.163", "0.082", "0.327", "0.236", "0.047", "0.163"],
        ["worst 10 %", "0.000", "0.100", "0.100", "0.500", "0.300", "0.000"],
    ]
    assert [row[0] for row in unseen[1:4]] == ["group", "A", "mean over 1 clients"]
    assert budgets[1:] == [
        ["method", "pool", "base", "r2", "r4", "no budget"],
        ["fedp2eft", "seen", "0.150", "0.600", "0.750", "–"],
        ["lora", "seen", "0.150", "0.350", "–", "0.150"],
        ["fedp2eft", "unseen", "0.100", "0.200", "0.300", "–"],
        ["lora", "unseen", "0.100", "0.100", "–", "0.100"],
    ]
    pictures = {path.stem for path in (tmp_path / "run" / "plots").iterdir()}
    assert pictures == {"curves", "clients", "gain", "ranks", "distances", "budgets"}


def test_few_ways_leave_room_for_what_groups_are_and_what_stage_one_began_with(tmp_path, capsys):
    run = write_run(tmp_path / "run", SEVERAL, algorithm="fedp2eft", personal=WAYS[:2])
    first = write_run(run / "base", {name: (*rest, (0.0, 0.0, 0.0)) for name, (*rest, _) in SEVERAL.items()})
    assert first == run / "base"
    report.show(run)
    seen = tables(capsys.readouterr().out)[0]
    assert seen[1:4] == [
        ["group", "train", "test", "majority", "untrained", "base", "global", "fedp2eft r2", "fedp2eft r4"],
        ["A", "16", "4", "0.500", "0.000", "0.100", "0.150", "0.700", "1.000"],
        ["B", "8", "9", "0.500", "0.000", "0.200", "0.200", "0.500", "0.500"],
    ]
    assert seen[4][:5] == ["mean over 3 clients", "24", "13", "0.500", "0.000"]


def test_many_ways_have_a_table_a_budget_within_160_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "_draw", lambda run, rows: None)
    ways = [
        f"{method} r{budget}" for budget in (2, 16) for method in ("fedp2eft", "lora", "adalora", "bayes", "random")
    ]
    clients = {"a": ("A", "seen", 8, 4, 0.5, tuple(index / 100 for index in range(12)))}
    report.show(write_run(tmp_path / "run", clients, personal=ways))
    printed = capsys.readouterr().out
    two, sixteen, budgets = tables(printed)
    assert two[1] == ["group", "base", "global", *ways[:5]]
    assert sixteen[1] == ["group", "base", "global", *ways[5:]]
    assert sixteen[2] == ["A", "0.000", "0.010", "0.070", "0.080", "0.090", "0.100", "0.110"]
    assert len(budgets) == 2 + 5
    assert max(len(line) for line in printed.splitlines() if line[:1] in "┏│") <= 160


@pytest.mark.parametrize("personal", [("personal",), ("lora r2", "lora r4")])
def test_without_a_base_there_is_no_column_of_it(tmp_path, capsys, personal):
    values = several_of(CLIENTS, personal)
    for shared in (True, False):
        report.show(write_run(tmp_path / f"{shared}", values, personal=personal, shared=shared, base=False))
        header = cells(capsys.readouterr().out)[0]
        assert "base" not in header and bool({"global", "fedit"} & set(header)) == shared
        drawn = {path.stem for path in (tmp_path / f"{shared}" / "plots").iterdir()}
        assert "clients" in drawn and ("gain" in drawn) == shared
    runs = [write_run(tmp_path / str(seed), values, seed=seed, personal=personal, base=False) for seed in (1, 2)]
    report.compare(runs)
    assert not any(row[0] == "base" for row in cells(capsys.readouterr().out))
    report.compare([tmp_path / "False"], tmp_path / "pictures")
    header, first, *_ = cells(capsys.readouterr().out)
    assert "before" not in header or first[header.index("before")] == "–"


@pytest.mark.parametrize("personal", [("personal",), ("lora r2", "lora r4")])
def test_points_on_the_way_are_in_no_table(tmp_path, capsys, personal):
    printed = []
    for early in (False, True):
        run = write_run(tmp_path / f"{early}", several_of(CLIENTS, personal), personal=personal, early=early)
        report.show(run)
        printed.append(cells(capsys.readouterr().out))
    assert printed[0] == printed[1]


@pytest.mark.parametrize("rounds, shared", [(0, True), (2, False)])
def test_without_a_trained_global_model_there_is_no_column_of_it(tmp_path, capsys, rounds, shared):
    run = write_run(tmp_path / "run", SEVERAL, algorithm="lora", personal=WAYS, rounds=rounds, shared=shared)
    report.show(run)
    printed = capsys.readouterr().out
    assert printed.startswith("Accuracy of lora:" if rounds == 0 else "Accuracy after 2 rounds of lora:")
    assert tables(printed)[0][1] == ["group", "base", *WAYS]
    assert (run / "plots" / "curves.png").exists() == bool(rounds)
    report.compare([run])
    assert not any(row[0] == "global" for row in cells(capsys.readouterr().out))


def test_a_single_way_keeps_the_table_of_one_under_its_name(tmp_path, capsys):
    report.show(write_run(tmp_path / "run", personal=("fedp2eft r2",)))
    table = cells(capsys.readouterr().out)
    assert table[0] == ["group", "pool", "train", "test", "majority", "base", "fedit", "fedp2eft r2"]
    assert table[1][-1] == "0.800"


def test_ways_are_averaged_over_seeds_and_shown_for_each_group(tmp_path, capsys):
    runs = [write_run(tmp_path / str(seed), several(0.1 * seed), personal=WAYS, seed=seed) for seed in range(3)]
    report.compare(runs)
    ways, seen, unseen = tables(capsys.readouterr().out)
    assert ways[1] == ["way", "pool", "seeds", "clients", "mean over clients", "mean over groups", "worst 10 %"]
    assert [row[0] for row in ways[2:8]] == ["base", "global", *WAYS]
    # Seeds add 0, .1 and .2: mean .1 more, deviation (over two degrees of freedom) .1.
    assert ways[4] == ["fedp2eft r2", "seen", "3", "3", "0.600±0.100", "0.700±0.100", "0.200±0.100"]
    assert len(ways) == 2 + 2 * 6
    assert seen[1:3] == [["group", "base", *WAYS], ["A", *(f"{x:.3f}±0.100" for x in (0.2, 0.8, 1.1, 0.4, 0.2))]]
    assert [row[0] for row in unseen[2:]] == ["A"]


def test_pictures_of_several_runs_show_every_seed_and_their_deviation(tmp_path):
    runs = [write_run(tmp_path / str(seed), several(0.1 * seed), personal=WAYS, seed=seed) for seed in range(3)]
    report.compare(runs, tmp_path / "plots")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"methods.png", "budgets.png"}
    scores = comparison.of_pools(comparison.methods([finished.read(run) for run in runs]))
    assert list(scores["seen"]) == ["base", "global", *WAYS]
    assert scores["seen"]["fedp2eft r2"] == pytest.approx([0.6, 0.7, 0.8])


def test_without_budgets_methods_are_the_only_picture(tmp_path):
    report.compare([write_run(tmp_path / "one"), write_run(tmp_path / "two", algorithm="ffa_lora")], tmp_path / "plots")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["methods.png"]


def test_runs_on_one_base_show_it_once_and_points_of_one_name_keep_their_run(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "one", SEVERAL, algorithm="fedp2eft", personal=WAYS),
        write_run(tmp_path / "two", SEVERAL, algorithm="lora", personal=("lora r2", "lora r4"), rounds=0),
        write_run(tmp_path / "three", SEVERAL, algorithm="fedit"),
    ]
    report.compare(runs)
    names = [row[0] for row in tables(capsys.readouterr().out)[0][2:] if row[1] == "seen"]
    first = ["base", "fedp2eft: global", "fedp2eft r2", "fedp2eft r4", "fedp2eft: lora r2", "lora"]
    assert names == [*first, "lora: lora r2", "lora r4", "fedit: global", "fedit"]


def test_a_point_named_like_a_run_is_not_mistaken_for_it(tmp_path, capsys):
    ways = write_run(tmp_path / "one", SEVERAL, algorithm="fedp2eft", personal=WAYS)
    report.compare([ways, write_run(tmp_path / "two", SEVERAL, algorithm="lora")])
    names = [row[0] for row in tables(capsys.readouterr().out)[0][2:] if row[1] == "seen"]
    assert names[-4:] == ["lora r2", "fedp2eft: lora", "lora: global", "lora: personal"]


@pytest.mark.parametrize("other", ["group", "many"])
def test_groups_are_left_out_where_they_differ_or_are_many(tmp_path, capsys, other):
    clients = {f"c{i}": (f"g{i}", "seen", 8, 4, 0.5, (0.1,) * 6) for i in range(comparison.GROUPS + (other == "many"))}
    changed = clients | ({"c0": ("h", *clients["c0"][1:])} if other == "group" else {})
    report.compare([write_run(tmp_path / str(s), c, personal=WAYS, seed=s) for s, c in enumerate((clients, changed))])
    assert len(tables(capsys.readouterr().out)) == 1
    if other == "group":
        report.compare([tmp_path / "0"])
        assert len(tables(capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    "point, method, budget",
    [("lora r2", "lora", 2), ("fedp2eft random r16", "fedp2eft random", 16), ("personal", "personal", None)],
)
def test_points_are_named_by_method_and_budget(point, method, budget):
    assert finished.split(point) == (method, budget)


def test_a_run_that_personalizes_nobody_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    metrics.write_json(run / "summary.json", {"rounds": 2, "pools": {}})
    with pytest.raises(ValueError, match=rf"workdir {run} has no personalized clients"):
        report.show(run)


@pytest.mark.parametrize("missing", ["manifest.json", "clients.parquet", "summary.json"])
@pytest.mark.parametrize("function", [report.show, lambda workdir: report.compare([workdir])])
def test_a_run_that_is_not_finished_is_named(tmp_path, missing, function):
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(ValueError, match=rf"workdir {run} has no finished run: {missing} is missing"):
        function(run)


def test_the_same_run_twice_is_a_mistake(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(ValueError, match=rf"{runs[0]} and {runs[1]} hold the same run"):
        report.compare(runs)


def test_runs_with_other_metrics_are_a_mistake(tmp_path):
    runs = [write_run(tmp_path / metric, metric=metric, algorithm=metric) for metric in ("accuracy", "mcc")]
    with pytest.raises(ValueError, match=r"accuracy has accuracy and \S+mcc has mcc"):
        report.compare(runs)


def test_tables_do_not_wait_for_matplotlib():
    code = "import sys, fedjax_peft.reports.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Tables of one and of several run directories, from numbers that can be computed by hand."""

import itertools
import math
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from fedjax_peft import evaluate, metrics, report

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
    **settings: Any,
) -> pathlib.Path:
    """A finished run of two rounds, written as `loop.run` writes it."""
    workdir.mkdir()
    names = ["loss"] if metric == "loss" else ["loss", metric]
    points = {"base": (0, "global"), "global": (2, "global"), "personal": (2, "personal")}
    rows = [
        {
            "round": index, "client": client, "name": name, "group": group, "pool": pool, "point": point,
            "train_examples": train, "examples": test, "majority": majority,
        }
        | dict.fromkeys(names, 1.0 if test else NAN)
        | {metric: values[stage]}
        for stage, (index, point) in enumerate(points.values())
        for client, (name, (group, pool, train, test, majority, values)) in enumerate(clients.items())
    ]  # fmt: skip
    summary: dict[str, Any] = {"rounds": 2, "pools": {}}
    for pool in dict.fromkeys(row["pool"] for row in rows):
        summary["pools"][pool] = {
            name: evaluate.summarize(
                [row for row in rows if (row["pool"], row["round"], row["point"]) == (pool, *key)], names
            )
            for name, key in points.items()
        }
    for index in range(2):
        line = {"round": index, "loss": 2.0 - index, "reported": 3, "tokens_per_second": 100.0, "padding_waste": 0.25}
        metrics.append_line(workdir / "rounds.jsonl", line)
    metrics.merge_rows(workdir / "clients.parquet", rows, 3)
    metrics.write_json(workdir / "summary.json", summary)
    experiment = {"algorithm": {"name": algorithm}, "seed": seed, "adapter": {"rank": 8, "alpha": 16.0}, **settings}
    metrics.write_json(
        workdir / "manifest.json", {"experiment": experiment, "sha256": {"base": "base", "test": sha256}}
    )
    return workdir


def cells(printed: str) -> list[list[str]]:
    """The header and the rows of a printed table."""
    lines = [line for line in printed.splitlines() if line[:1] in "┃│" and line]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]


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
    assert "over seeds" in printed
    # Personalized means .65, .75, .85: mean .75, deviation (over two degrees of freedom) .1.
    assert cells(printed) == [
        ["method", "pool", "seeds", "clients", "before", "mean", "std", "pooled", "worst 10 %"],
        ["fedit", "seen", "3", "3", "0.300±0.000", "0.750±0.100", "0.334±0.000", "0.600±0.100", "0.300±0.100"],
        ["ffa_lora", "seen", "1", "3", "0.300", "0.650", "0.334", "0.500", "0.200"],
        ["fedit", "unseen", "3", "1", "0.500±0.000", "0.600±0.100", "0.000±0.000", "0.600±0.100", "0.600±0.100"],
        ["ffa_lora", "unseen", "1", "1", "0.500", "0.500", "0.000", "0.500", "0.500"],
    ]


def test_experiments_of_one_algorithm_are_told_apart_by_what_differs(tmp_path, capsys):
    ranks = [write_run(tmp_path / f"r{rank}", adapter={"rank": rank, "alpha": 16.0}, seed=rank) for rank in (4, 8)]
    report.compare([*ranks, write_run(tmp_path / "ffa", algorithm="ffa_lora", train={"steps": 3})])
    printed = capsys.readouterr().out
    assert [row[0] for row in cells(printed)[1:4]] == ["fedit rank=4", "fedit rank=8", "ffa_lora"]
    assert "over seeds" not in printed


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
    code = "import sys, fedjax_peft.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

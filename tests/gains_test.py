"""Gains over the best other method: which average is which."""

import pytest

from fedjax_peft import metrics
from fedjax_peft.reports import gains

SCORES = {
    "a 1": {"ours": 0.9, "x": 0.8, "y": 0.6},
    "a 2": {"ours": 0.6, "x": 0.4, "y": 0.5},
    "b": {"ours": 0.5, "x": 0.2, "y": 0.5},
}
SETS = {"a 1": "a", "a 2": "a", "b": "b"}


def test_gains_are_relative_and_the_rival_of_several_scenarios_is_one_method():
    found = {gain.of: gain for gain in gains.gains("ours", SCORES, SETS)}
    assert {name: gain.rival for name, gain in found.items()} == {
        "a 1": "x",
        "a 2": "y",
        "b": "y",
        "a, all": "x",
        "everything": "y",
    }
    assert found["a 1"].percent == pytest.approx(12.5)
    assert found["a 2"].percent == pytest.approx(20)
    assert found["a, all"].percent == pytest.approx(100 * (0.75 - 0.6) / 0.6)
    assert found["everything"].percent == pytest.approx(100 * (2.0 - 1.6) / 1.6)


def test_rivals_are_methods_of_all_scenarios_of_an_average():
    scores = SCORES | {"b": SCORES["b"] | {"z": 0.9}}
    found = {gain.of: gain.rival for gain in gains.gains("ours", scores, SETS)}
    assert found["b"] == "z" and found["everything"] == "y"
    with pytest.raises(ValueError, match="a 1: 'z' is not one of the methods, which are ours, x, y"):
        gains.gains("z", scores, SETS)
    with pytest.raises(ValueError, match="a: there is no method beside ours"):
        gains.gains("ours", {"a": {"ours": 1.0, "ours (global)": 0.5}}, {"a": "a"})


def write(folder, alpha, algorithm, seed, personal, before, *, rank=8, metric="accuracy", title=None, **data):
    folder.mkdir()
    experiment = {"data": {"name": "snli", "alpha": alpha} | data, "adapter": {"rank": rank}}
    experiment |= {"algorithm": {"name": algorithm}, "seed": seed}
    metrics.write_json(folder / "manifest.json", {"experiment": experiment, "run": {"title": title}})
    points = {
        name: {"clients": 2, "loss": {"mean": 1.0}, metric: {"mean": value}}
        for name, value in (("personal", personal), ("global", before))
    }
    metrics.write_json(folder / "summary.json", {"pools": {"seen": points}})


def test_runs_are_averaged_over_seeds_and_models_before_local_steps_are_others(tmp_path, capsys):
    for alpha in (0.1, 1.0):
        for seed in (0, 1):
            write(tmp_path / f"ours{alpha}{seed}", alpha, "fedamole", seed, 0.6 + 0.1 * seed, 0.9)
            write(tmp_path / f"fedit{alpha}{seed}", alpha, "fedit", seed, 0.4, 0.5)
    folders = sorted(tmp_path.iterdir())
    scores, _, sets, _ = gains.read(folders)
    assert set(scores) == set(sets) == {"alpha=0.1", "alpha=1.0"}
    assert scores["alpha=0.1"] == pytest.approx(
        {"fedamole": 0.65, "fedamole (global)": 0.9, "fedit": 0.4, "fedit (global)": 0.5}
    )
    gains.show("fedamole", folders)
    said = capsys.readouterr().out
    assert "+30.0000 %" in said and "fedit (global)" in said and "everything is of the metrics accuracy" in said
    with pytest.raises(ValueError, match="has no finished run"):
        gains.read([tmp_path / "nothing"])


def test_methods_of_one_run_are_its_points(tmp_path):
    write(tmp_path / "run", 0.1, "fedp2eft", 0, 0.6, 0.5)
    content = metrics.read_json(tmp_path / "run" / "summary.json")
    seen = content["pools"]["seen"]
    seen |= {"base": seen["global"], "fedp2eft r2": seen.pop("personal"), "lora r2": seen.pop("global")}
    metrics.write_json(tmp_path / "run" / "summary.json", content)
    scores, *_ = gains.read([tmp_path / "run"])
    assert scores == {"name=snli": {"fedp2eft r2": 0.6, "lora r2": 0.5}}


def test_how_rows_were_drawn_is_no_scenario(tmp_path):
    for run, partition in enumerate(({"partition": {"seed": 42}}, {"partition": {"seed": 62}})):
        write(tmp_path / f"ours{run}", 0.1, "fedamole", run, 0.6, 0.9, **partition)
        write(tmp_path / f"fedit{run}", 0.1, "fedit", run, 0.4, 0.5, aux=0.0, **partition)
    scores, *_ = gains.read(sorted(tmp_path.iterdir()))
    assert list(scores) == ["name=snli"] and scores["name=snli"]["fedit"] == 0.4


def test_runs_of_one_algorithm_are_told_apart_by_what_differs_within_a_scenario(tmp_path):
    for alpha in (0.1, 1.0):
        write(tmp_path / f"ours{alpha}", alpha, "fedamole", 0, 0.8, 0.9, rank=round(10 * alpha))
        for seed in (0, 1):
            write(tmp_path / f"a{alpha}{seed}", alpha, "fedit", seed, 0.4 + 0.2 * seed, 0.9)
    write(tmp_path / "b", 0.1, "fedit", 0, 0.3, 0.5, rank=61)
    scores, *_ = gains.read(sorted(tmp_path.iterdir()))
    points = ["fedamole", "fedit rank=8", "fedit rank=61"]
    assert set(scores["alpha=0.1"]) == {name + end for name in points for end in ("", " (global)")}
    assert scores["alpha=0.1"]["fedit rank=8"] == scores["alpha=1.0"]["fedit rank=8"] == pytest.approx(0.5)
    assert "fedit rank=61" not in scores["alpha=1.0"]


def test_titles_are_names_whatever_else_differs_between_scenarios(tmp_path, capsys):
    for alpha in (0.1, 1.0):
        write(tmp_path / f"ours{alpha}", alpha, "fedamole", 0, 0.8, 0.9)
        write(tmp_path / f"a{alpha}", alpha, "fedit", 0, 0.4, 0.5)
        write(tmp_path / f"b{alpha}", alpha, "fedit", 0, 0.6, 0.5, rank=round(60 * alpha), title="matched")
    write(tmp_path / "c", 0.1, "fdlora", 0, 0.1, 0.1)
    scores, *_ = gains.read(sorted(tmp_path.iterdir()))
    names = {name + end for name in ("fedamole", "fedit", "matched") for end in ("", " (global)")}
    assert set(scores["alpha=1.0"]) == names
    gains.show("fedamole", sorted(tmp_path.iterdir()))
    said = capsys.readouterr().out
    assert "+33.3333" in said and "not in every scenario: fdlora, fdlora (global)" in said


def test_scenarios_may_have_metrics_of_their_own(tmp_path, capsys):
    for name, metric, ours, theirs in (("snli", "accuracy", 0.9, 0.6), ("ni", "rougeL", 0.5, 0.4)):
        write(tmp_path / f"{name}-ours", 1.0, "fedamole", 0, ours, 0.1, metric=metric, name=name)
        write(tmp_path / f"{name}-fedit", 1.0, "fedit", 0, theirs, 0.1, metric=metric, name=name)
    gains.show("fedamole", sorted(tmp_path.iterdir()))
    said = capsys.readouterr().out
    assert "mean of the scenarios' gains: +37.5000 %; gain of the means over scenarios: +40.0000 %" in said
    assert "everything is of the metrics accuracy, rougeL" in said
    assert "+50.0000" in said and "+25.0000" in said


def test_means_of_fewer_runs_are_said_and_a_run_counts_once(tmp_path, capsys):
    for seed in (0, 1):
        write(tmp_path / f"ours{seed}", 0.1, "fedamole", seed, 0.6, 0.9)
    write(tmp_path / "fedit", 0.1, "fedit", 0, 0.4, 0.5)
    gains.show("fedamole", sorted(tmp_path.iterdir()))
    assert "means over runs of name=snli, not as many of each: 2 of fedamole" in capsys.readouterr().out
    write(tmp_path / "again", 0.1, "fedit", 0, 0.4, 0.5)
    with pytest.raises(ValueError, match="again and .*fedit hold the same run"):
        gains.read(sorted(tmp_path.iterdir()))


def test_nothing_is_a_share_of_nothing():
    with pytest.raises(ValueError, match="a: the best other method, x, has 0, of which nothing is a share"):
        gains.gains("ours", {"a": {"ours": 0.5, "x": 0.0}}, {"a": "a"})


def test_a_scenario_is_of_one_metric_of_which_more_is_better(tmp_path):
    write(tmp_path / "a", 0.1, "fedit", 0, 0.6, 0.9)
    write(tmp_path / "b", 0.1, "fedamole", 0, 0.4, 0.5, metric="rougeL")
    write(tmp_path / "c", 1.0, "fedamole", 0, 0.4, 0.5, metric="ter")
    with pytest.raises(ValueError, match="one metric a scenario, but .* are accuracy in .*a and rougeL in .*b"):
        gains.read([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="of a metric of which more is better, but that of .*c is ter"):
        gains.read([tmp_path / "a", tmp_path / "c"])

import json

import numpy as np

from fedjax_peft import metrics


def test_lines_survive_a_kill_in_the_middle_of_one(tmp_path):
    path = tmp_path / "rounds.jsonl"
    for index in range(3):
        metrics.append_lines(path, [{"round": index, "loss": np.float32(0.5)}])
    with open(path, "a") as file:
        file.write('{"round": 3, "lo')
    assert [line["round"] for line in metrics.read_lines(path)] == [0, 1, 2]
    metrics.rewind(path, 2)
    assert path.read_text() == '{"round": 0, "loss": 0.5}\n{"round": 1, "loss": 0.5}\n'


def test_nothing_yet(tmp_path):
    assert metrics.read_json(tmp_path / "manifest.json") is None
    assert metrics.read_lines(tmp_path / "rounds.jsonl") == []
    metrics.rewind(tmp_path / "rounds.jsonl", 0)
    assert metrics.read_lines(tmp_path / "rounds.jsonl") == []


def test_json_is_replaced_whole(tmp_path):
    metrics.write_json(tmp_path / "summary.json", {"a": np.int64(1)})
    metrics.write_json(tmp_path / "summary.json", {"b": np.float32(0.25), "c": [1, 2]})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"b": 0.25, "c": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_what_is_no_number_is_null_and_comes_back_in_statistics(tmp_path):
    def refused(name):
        raise AssertionError(f"{name} is no JSON")

    summary = {"rounds": 2, "pools": {"seen": {"base": {"clients": 1, "loss": {"mean": np.nan, "groups": {"a": 0.5}}}}}}
    metrics.write_json(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=refused)["rounds"] == 2
    loss = metrics.read_json(tmp_path / "summary.json")["pools"]["seen"]["base"]["loss"]
    assert np.isnan(loss["mean"]) and loss["groups"] == {"a": 0.5}
    metrics.write_json(tmp_path / "manifest.json", {"run": {"chunk": None, "rate": np.float32("inf"), "names": ("a",)}})
    assert metrics.read_json(tmp_path / "manifest.json") == {"run": {"chunk": None, "rate": None, "names": ["a"]}}
    metrics.append_lines(tmp_path / "rounds.jsonl", [{"round": 0, "loss": np.float32("nan")}])
    assert (tmp_path / "rounds.jsonl").read_text() == '{"round": 0, "loss": null}\n'


def test_rows_of_rounds_that_are_done_again_are_replaced(tmp_path):
    path = tmp_path / "clients.parquet"
    metrics.merge_rows(path, [{"round": 0, "point": "global", "loss": loss} for loss in (3.0, 2.0)], 0)
    metrics.merge_rows(path, [{"round": 5, "point": "global", "loss": 1.0}], 5)
    metrics.merge_rows(path, [{"round": 5, "point": "personal", "loss": 0.5}], 5)
    metrics.merge_rows(path, [{"round": 5, "point": "global", "loss": np.float64(1.5)}], 5)
    assert [(row["round"], row["loss"]) for row in metrics.read_rows(path)] == [(0, 3.0), (0, 2.0), (5, 0.5), (5, 1.5)]

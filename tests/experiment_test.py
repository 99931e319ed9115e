"""Whole experiments on a tiny model: what a config can ask for, runs, and leaves a run directory."""

import importlib.util

import numpy as np
import pytest
import tiny

from fedjax_peft import experiment, metrics


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(changes) -> config of one short run."""
    path = tiny.write_config(tmp_path_factory.mktemp("experiment"))
    spec = importlib.util.spec_from_file_location("tiny_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def config(changes):
        config = module.get_config()
        short = {"rounds": 1, "evaluate.every": 1, "algorithm.name": "fedit", "widths": 1, "dropout_rate": 0.0}
        config.update_from_flattened_dict(short | changes)
        return config

    return config


VARIANTS = {
    "full fine-tuning": {"adapter.kind": "full", "run.chunk": 1},
    "bfloat16, loop over layers, remat": {"model.dtype": "bfloat16", "run.scan": True, "run.remat": True},
    "a split base": {"run.mesh.clients": 2, "run.mesh.model": 2, "run.chunk": 2, "train.group_by_length": False},
    "epochs, clipping, schedule, server optimizer": {
        "train.steps": None,
        "train.epochs": 1,
        "train.batch": 64,
        "optimizer.clip": 1.0,
        "optimizer.weight_decay": 0.01,
        "schedule.name": "cosine",
        "server.name": "adam",
        "model.dropout": 0.1,
        "adapter.dropout": 0.1,
        "model.trim_vocabulary": False,
    },
}
# What these two need of the data is not in the contract that all algorithms pass.
VARIANTS |= {name: {"algorithm.name": name} for name in ("centralized", "local_only")}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_runs_and_leaves_a_run_directory(name, load, tmp_path):
    summary = experiment.run(load(VARIANTS[name]), str(tmp_path / "run"))
    assert np.isfinite(summary["pools"]["seen"]["personal"]["loss"]["mean"])
    assert summary["pools"]["seen"]["personal"]["examples"] == 1147
    assert summary == metrics.read_json(tmp_path / "run" / "summary.json")
    manifest = metrics.read_json(tmp_path / "run" / "manifest.json")
    assert set(manifest["sha256"]) == {"base", "train", "test"}
    (line,) = metrics.read_lines(tmp_path / "run" / "rounds.jsonl")
    assert np.isfinite(line["loss"]) and line["not_finite"] == []


def test_trimming_the_vocabulary_changes_nothing(load, tmp_path):
    losses = []
    for trim in (True, False):
        experiment.run(load({"model.trim_vocabulary": trim}), str(tmp_path / str(trim)))
        losses.append([row["loss"] for row in metrics.read_rows(tmp_path / str(trim) / "clients.parquet")])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_ffa_sends_half(load, tmp_path):
    sent = {}
    for name in ("ffa_lora", "fedit"):
        run = tmp_path / name
        experiment.run(load({"algorithm.name": name, "adapter.head": "frozen"}), str(run))
        sent[name] = metrics.read_lines(run / "rounds.jsonl")[0]["bytes_up"]
    assert 2 * sent["ffa_lora"] == sent["fedit"] > 0

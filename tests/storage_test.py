"""Run directories, data and models in object stores, where nothing can be added to a file and no disk is local."""

import io
import json

import buckets
import loop_test
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from fedjax_peft import checkpoint, loop, metrics, population, segments
from fedjax_peft.data import text, tokenizers
from fedjax_peft.models import hf
from fedjax_peft.reports import report


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    folder, manager = tmp_path_factory.mktemp("checkpoints"), checkpoint.manager
    with buckets.in_memory() as name, pytest.MonkeyPatch.context() as patch:
        # TensorStore, which writes checkpoints, has no bucket in memory.
        patch.setattr(checkpoint, "manager", lambda workdir, keep=2: manager(folder / epath.Path(workdir).name, keep))
        yield epath.Path(name)


def test_checkpoints_stand_in_the_bucket(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", lambda folder, options: str(folder))
    monkeypatch.chdir(tmp_path)
    assert checkpoint.manager("gs://bucket/run") == "gs://bucket/run/checkpoints"
    assert checkpoint.manager("run") == f"{tmp_path}/run/checkpoints"


def test_states_of_clients_lie_on_a_local_disk():
    with pytest.raises(ValueError, match="run.population is 'gs://bucket/states', expected a folder of a local disk"):
        population.create({"a": np.zeros(2, np.float32)}, 3, "gs://bucket/states")


def test_lines_are_added_to_what_is_there(bucket):
    path = bucket / "lines.jsonl"
    metrics.append_lines(path, [{"round": 0}])
    metrics.append_lines(path, [{"round": 1}, {"round": np.int64(2)}])
    assert path.read_text() == '{"round": 0}\n{"round": 1}\n{"round": 2}\n'
    metrics.rewind(path, 1)
    assert metrics.read_lines(path) == [{"round": 0}]


@pytest.fixture(scope="module")
def whole(bucket):
    loop_test.run(bucket / "whole")
    return bucket / "whole"


def test_a_run_goes_on_where_it_was_stopped(bucket, whole):
    workdir = bucket / "stopped"
    loop_test.run(workdir, total=2, chunk=None)
    summary = loop_test.run(workdir, total=4, chunk=None)
    assert summary == metrics.read_json(workdir / "summary.json")
    assert [line["round"] for line in metrics.read_lines(workdir / "rounds.jsonl")] == [0, 1, 2, 3]
    losses = [metrics.read_lines(folder / "rounds.jsonl")[3]["loss"] for folder in (workdir, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    given = loop_test.problem()
    _, people = loop.final(given.algorithm, given.mesh, loop_test.CLIENTS, workdir)
    met = np.flatnonzero(people.known)
    assert len(met) and (people.states["id"][met] == met).all()
    assert not list(workdir.glob("*.tmp")) and not list((workdir / "population").glob("*.tmp"))


def test_its_report_and_pictures_stand_beside_it(whole, capsys):
    experiment = {"algorithm": {"name": "fedit"}, "seed": 0, "adapter": {"rank": 2, "alpha": 16.0}}
    metrics.write_json(whole / "manifest.json", {"experiment": experiment, "sha256": {"base": "", "test": ""}})
    report.show(whole)
    assert "after 4 rounds of fedit" in capsys.readouterr().out
    pictures = list((whole / "plots").iterdir())
    assert pictures and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_tables_are_read_from_buckets(bucket):
    rows = [{"text": "eins", "label": 1}, {"text": "zwö, drei", "label": 0}]
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    folder = bucket / "data"
    (folder / "de" / "train-00000-of-00001.parquet").write_bytes(content.getvalue())
    (folder / "de" / "test.csv").write_bytes('text,label\neins,1\n"zwö, drei",0\n'.encode())
    (folder / "test.tsv").write_bytes("text\tlabel\neins\t1\nzwö, drei\t0\n".encode())
    (folder / "train.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    for source, split, config in (
        (f"{folder}", "train", "de"),
        (f"{folder}", "test", "de"),
        (f"{folder}", "test", None),
        (f"{folder}/train.jsonl", "train", None),
    ):
        table = text.read(source, split=split, config=config)
        assert table["text"].tolist() == ["eins", "zwö, drei"] and table["label"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="gs://bucket/nothing is neither a folder nor a file of a known kind"):
        text.read(f"{bucket}/nothing", split="train")


@pytest.mark.parametrize("load", [tokenizers.load, lambda source: hf.load(source, labels=2, key=None)])
def test_models_lie_on_disks(load):
    with pytest.raises(ValueError, match="model 'gs://bucket/model' is in an object store: copy it to a disk"):
        load("gs://bucket/model")


def test_a_workdir_may_have_brackets_in_its_name(tmp_path):
    people = population.create({"a": np.zeros(2, np.float32)}, 3)
    population.scatter(people, np.arange(3), {"a": np.ones((3, 2), np.float32)}, np.ones(3, bool))
    for index in (1, 2):
        segments.write(people, tmp_path / "lr[1]", index)
        people.changed[:] = True
    again = population.create({"a": np.zeros(2, np.float32)}, 3)
    segments.read(again, tmp_path / "lr[1]", 2, people.written, people.known)
    np.testing.assert_array_equal(again.states["a"], np.ones((3, 2)))
    segments.prune(tmp_path / "lr[1]", [2])
    assert {path.name[:8] for path in (tmp_path / "lr[1]").iterdir()} == {"00000002"}

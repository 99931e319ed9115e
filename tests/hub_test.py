"""Models and data by their names on the hub, as far as that goes without a network."""

import sys
import types

import huggingface_hub
import jax
import numpy as np
import pyarrow
import pytest
import tiny
from federation import assert_same

from fedjax_peft.data import text
from fedjax_peft.models import hf


def test_a_model_is_fetched_with_what_belongs_to_it(tmp_path, monkeypatch):
    folder, asked = tiny.write_model(tmp_path / "model"), []

    def fetch(name, *, allow_patterns, ignore_patterns):
        asked.append(name)
        # Folders of a repository hold the same weights in other forms.
        assert {"config.json", "*.safetensors", "tokenizer*"} <= set(allow_patterns)
        assert list(ignore_patterns) == ["*/*"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    ours, theirs = (hf.load(source, labels=3, key=jax.random.key(0)) for source in (str(folder), "some-body/a.model"))
    assert_same(theirs.base, ours.base)
    assert theirs.sha256 == ours.sha256 and asked == ["some-body/a.model"]


def test_rows_of_a_data_set_are_read_by_subset_and_split(monkeypatch):
    asked = []

    class Rows:
        def with_format(self, form):
            assert form == "arrow"
            return self

        def __getitem__(self, rows):
            assert rows == slice(None)
            return pyarrow.table({"text": ["a", "b"], "label": [1, 0]})

    def load(name, config, *, split):
        asked.append((name, config, split))
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    found = text.read_configs("some/data", ("xho", "yor"), split="train")
    assert asked == [("some/data", "xho", "train"), ("some/data", "yor", "train")]
    assert found["language"].tolist() == ["xho", "xho", "yor", "yor"]
    np.testing.assert_array_equal(found["label"], [1, 0, 1, 0])


def test_where_a_data_set_has_only_a_script_its_parquet_files_are_named(monkeypatch):
    def load(name, config, *, split):
        raise RuntimeError("Dataset scripts are no longer supported, but found data.py")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    with pytest.raises(ValueError, match="hf download .*refs/convert/parquet --local-dir=FOLDER some/data"):
        text.read("some/data", split="train")

"""Readers of text tables."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedjax_peft.data import text

ROWS = [
    {"text": 'He said "no', "label": 1},
    {"text": "zwei, drei", "label": 0},
    {"text": "quatre", "label": -1},
]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".tsv":
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    else:
        quoted = (row["text"].replace('"', '""') for row in rows)
        path.write_text("text,label\n" + "".join(f'"{q}",{r["label"]}\n' for q, r in zip(quoted, rows, strict=True)))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_all_kinds_of_files_hold_the_same_table(tmp_path, suffix):
    file = write(tmp_path / f"train{suffix}")
    for table in (text.read(file, split="train"), text.read(tmp_path, split="train", columns=["text", "label"])):
        assert table["text"].tolist() == [row["text"] for row in ROWS] and table["text"].dtype == object
        assert table["label"].tolist() == [1, 0, -1] and table["label"].dtype == np.int64
    assert list(text.read(file, split="train", columns=["label"])) == ["label"]


def test_folders_may_have_configs_and_numbered_parts(tmp_path):
    write(tmp_path / "de" / "test.parquet", ROWS[:1])
    write(tmp_path / "fr" / "test-00000-of-00002.parquet", ROWS[1:2])
    write(tmp_path / "fr" / "test-00001-of-00002.parquet", ROWS[2:])
    write(tmp_path / "it" / "test" / "0000.parquet", ROWS[:2])
    write(tmp_path / "it" / "test" / "0001.parquet", ROWS[2:])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS)
    assert text.read(tmp_path, split="test", config="fr")["label"].tolist() == [0, -1]
    assert text.read(tmp_path, split="test", config="it")["label"].tolist() == [1, 0, -1]
    assert text.read(tmp_path, split="test")["label"].tolist() == [1, 0, -1]
    both = text.read_configs(tmp_path, ["fr", "de"], split="test")
    assert both["language"].tolist() == ["fr", "fr", "de"] and both["label"].tolist() == [0, -1, 1]


def test_splits_are_joined_in_the_order_given(tmp_path):
    write(tmp_path / "train.parquet", ROWS[:1])
    write(tmp_path / "validation.jsonl", ROWS[1:])
    for config in ("de", "fr"):
        write(tmp_path / config / "train-00000-of-00001.parquet", ROWS[:2])
        write(tmp_path / config / "validation.parquet", ROWS[2:])
    assert text.read(tmp_path, split="train+validation")["label"].tolist() == [1, 0, -1]
    assert text.read(tmp_path, split="validation + train", columns=["label"])["label"].tolist() == [0, -1, 1]
    both = text.read_configs(tmp_path, ["fr", "de"], split="train+validation")
    assert both["label"].tolist() == [1, 0, -1, 1, 0, -1] and both["language"].tolist() == ["fr"] * 3 + ["de"] * 3
    for config in (None, "de"):
        with pytest.raises(ValueError, match="no test split .as test.parquet"):
            text.read(tmp_path, split="train+test", config=config)
    with pytest.raises(ValueError, match=r"\(validation\) has no column 'premise', only text, label"):
        write(tmp_path / "train.parquet", [row | {"premise": "so"} for row in ROWS])
        text.read(tmp_path, split="train+validation", columns=["premise"])
    assert set(text.read(tmp_path, split="train+validation")) == {"text", "label"}  # the columns of both
    assert text.read(tmp_path / "train.parquet", split="train+validation")["label"].tolist() == [1, 0, -1]


def test_every_file_of_a_folder(tmp_path):
    write(tmp_path / "zoe.jsonl", ROWS[:1])
    write(tmp_path / "ann.csv", ROWS[1:])
    (tmp_path / "notes.txt").write_text("no table")
    table = text.read(tmp_path, split="*", columns=["label"])
    assert table["file"].tolist() == ["ann", "ann", "zoe"] and table["label"].tolist() == [0, -1, 1]
    write(tmp_path / "bob.jsonl", [{"text": "x"}])
    (tmp_path / "nobody.jsonl").write_text("")
    assert text.read(tmp_path, split="*")["file"].tolist() == ["ann", "ann", "bob", "zoe"]
    write(tmp_path / "cay.jsonl", [{"other": "x"}])
    with pytest.raises(ValueError, match="ann.csv, bob.jsonl, cay.jsonl, zoe.jsonl have no column in common"):
        text.read(tmp_path, split="*")
    with pytest.raises(ValueError, match="has no file of a known kind"):
        text.read(tmp_path, split="*", config="fr")


def test_where_tests_come_from(tmp_path):
    file = str(write(tmp_path / "rows.csv"))
    for test in (None, "auto"):
        assert text.splits(file, "train", test) == {"train": "train"}
        assert text.splits(str(tmp_path), "*", test) == {"train": "*"}
    assert text.splits(str(tmp_path), "train", "auto", "dev") == {"train": "train", "test": "dev"}
    assert text.splits("someone/data", "train", "test") == {"train": "train", "test": "test"}


def test_unlabelled_rows_are_left_out(tmp_path):
    table = text.labelled(text.read(write(tmp_path / "a.parquet"), split="train"))
    assert table["text"].tolist() == ['He said "no', "zwei, drei"]
    assert text.labelled({"label": np.array(["x", "-", "", None], object)})["label"].tolist() == ["x"]
    holes = pyarrow.table({"label": [1, None, 0]})
    pyarrow.parquet.write_table(holes, tmp_path / "holes.parquet")
    table = text.labelled(text.read(tmp_path / "holes.parquet", split="train"))
    splits, names = text.with_labels({"train": table})
    assert splits["train"]["label"].tolist() == [1, 0] and names == ("0", "1")


def test_names_of_classes_become_numbers_that_all_splits_share():
    train, test = ({"topic": np.array(x, object)} for x in (["food", "ai"], ["money", "ai"]))
    splits, names = text.with_labels({"train": train, "test": test}, "topic")
    assert names == ("ai", "food", "money") and splits["train"]["topic"].dtype == np.int32
    assert splits["train"]["topic"].tolist() == [1, 0] and splits["test"]["topic"].tolist() == [2, 0]
    splits, names = text.with_labels({"train": train}, "topic", names=["food", "ai"])
    assert splits["train"]["topic"].tolist() == [0, 1] and names == ("food", "ai")
    assert train["topic"].tolist() == ["food", "ai"], "the table given is not changed"


def test_texts_and_pairs():
    table = {"a": np.array(["x", "y"], object), "b": np.array(["u", "v"], object)}
    assert text.texts(table, "a") == (["x", "y"], None)
    assert text.texts(table, ("b", "a")) == (["u", "v"], ["x", "y"])


def test_mistakes_are_named(tmp_path):
    write(tmp_path / "test.parquet")
    mistakes = {
        r"no train split .* in .*, only test.parquet": lambda: text.read(tmp_path, split="train"),
        r"no test split .*sw, which does not exist": lambda: text.read(tmp_path, split="test", config="sw"),
        r"nothing.csv is neither a folder nor a file": lambda: text.read(tmp_path / "nothing.csv", split="test"),
        r"\(test\) has no column 'premise', only text, label": lambda: text.read(
            tmp_path, split="test", columns=["premise"]
        ),
        r"no data set 'someone/nothing' .* on this machine": lambda: text.read("someone/nothing", split="test"),
        r"row 1 of train has label 2, not one of the 2 classes": lambda: text.with_labels(
            {"train": {"label": np.array([0, 2])}}, names=["no", "yes"]
        ),
        r"row 0 of dev has label 'c', not one of the 1": lambda: text.with_labels(
            {"dev": {"label": np.array(["c"], object)}}, names=["a"]
        ),
        r"no text column 'sentence', only label": lambda: text.texts({"label": np.zeros(2)}, "sentence"),
        r"row 1 of column 'a' holds None": lambda: text.texts({"a": np.array(["x", None], object)}, "a"),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(ValueError, match=message):
            mistake()


def test_benchmark_files(benchmarks):
    news = {
        split: text.read_configs(benchmarks / "masakhanews", ["lin", "yor"], split=split) for split in ("train", "test")
    }
    splits, names = text.with_labels(
        news, names=["business", "entertainment", "health", "politics", "religion", "sports", "technology"]
    )
    assert len(names) == 7 and len(splits["test"]["label"]) == 175 + 411
    assert len(text.texts(splits["test"], "headline_text")[0]) == 586
    snli = text.read(benchmarks / "snli", split="validation")
    assert set(text.labelled(snli)["label"].tolist()) == {0, 1, 2}

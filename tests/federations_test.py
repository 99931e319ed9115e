"""Data sets as federations: who the clients are and what they hold."""

import functools
import json

import numpy as np
import pytest
import tiny

from fedjax_peft.data import federated, federations, tokenizers


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    return functools.partial(tokenizers.load(str(folder)).encode, max_length=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of JSON lines in two languages, with one row that nobody labelled."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for language in ("bem", "en"):
        (folder / language).mkdir()
        for split, size in (("train", 60), ("test", 20)):
            rows = [{"text": f"{language} {i}", "label": int(rng.integers(3))} for i in range(size)]
            rows.append({"text": "nobody knows", "label": -1})
            path = folder / language / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_chatterbot_is_sixteen_languages_and_a_small_unseen_pool(encode):
    federation = federations.chatterbot(encode)
    seen = federation.pools["seen"]
    assert [federation.names[i] for i in seen[:3]] == ["en", "fa", "ja"] and len(seen) == 16
    rows = federated.sizes(federation.train) + federated.sizes(federation.test)
    assert rows[:3].tolist() == [792, 773, 568] and rows[seen].sum() == 5779
    assert len(federation.classes) == 19
    assert federated.sizes(federation.test).min() > 0


def test_a_table_by_language_and_dirichlet_with_two_pools(encode, source, tmp_path):
    settings = {"name": "by_column_dirichlet", "column": "language", "clients_per_value": 3, "alpha": 0.5}
    federation = federations.table(
        encode,
        source=source,
        configs=("bem", "en"),
        text="text",
        partition=settings | {"seed": 1, "pools": 2},
        cache=str(tmp_path),
    )
    assert federation.pools["seen"].tolist() == list(range(6))
    assert federation.pools["unseen"].tolist() == list(range(6, 12))
    assert federation.groups[:4] == ("bem", "bem", "bem", "en")
    assert federation.names[3] == "en/0" and len(set(federation.names)) == 12
    assert federated.sizes(federation.train).tolist() == [10] * 12
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_a_table_without_a_test_split_and_with_unseen_clients(encode, source, tmp_path):
    federation = federations.table(
        encode,
        source=f"{source}/en/train.jsonl",
        text="text",
        test=None,
        test_fraction=0.25,
        partition={"name": "iid", "clients": 5, "seed": 0},
        unseen=2,
        cache=str(tmp_path),
    )
    assert [len(ids) for ids in federation.pools.values()] == [3, 2]
    assert federated.sizes(federation.train).sum() == 45 and federated.sizes(federation.test).sum() == 15
    assert set(federation.groups) == {"all"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": "body"}, "no text column 'body', only text, label"),
        ({"label": "topic"}, "no label column 'topic', only text, label"),
        ({"classes": ["yes", "no"]}, "has label 2, not one of the 2 classes"),
        ({"group": "country"}, "data.group is 'country'"),
        ({"partition": {"name": "halves"}}, "data.partition.name is 'halves'"),
        ({"source": "/nowhere/data.csv"}, "/nowhere/data.csv"),
    ],
)
def test_mistakes(change, sentence, encode, source, tmp_path):
    good = {"source": f"{source}/en", "text": "text", "partition": {"name": "iid", "clients": 2, "seed": 0}}
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        federations.table(encode, **(good | {"cache": str(tmp_path)} | change))


def test_everybody_is_one_more_client_with_the_examples_of_the_seen(encode):
    federation = federations.chatterbot(encode)
    store = federations.with_everybody(federation)
    sizes = federated.sizes(store)
    assert sizes[-1] == sizes[federation.pools["seen"]].sum()
    assert (sizes[:-1] == federated.sizes(federation.train)).all()


def test_majority_answers_the_most_frequent_training_label(encode, source, tmp_path):
    federation = federations.chatterbot(encode)
    german = federation.names.index("de")
    train, test = (store.labels[federated.rows(store, german)] for store in (federation.train, federation.test))
    expected = np.mean(test == np.bincount(train).argmax())
    assert federations.majority(federation)[german] == expected

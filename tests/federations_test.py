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


@pytest.fixture
def people(tmp_path):
    """Rows of 50 users, two each, but one of `u48` and ten of `u49`; and their files in a folder."""
    sizes = [2] * 48 + [1, 10]
    rows = [{"text": f"{i} {k}", "label": (i + k) % 2, "user": f"u{i:02}"} for i in range(50) for k in range(sizes[i])]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "files").mkdir()
    for user in {row["user"] for row in rows}:
        own = [json.dumps(row) for row in rows if row["user"] == user]
        (tmp_path / "files" / f"{user}.jsonl").write_text("\n".join(own))
    return tmp_path


def of_people(encode, folder, **changes):
    partition = {"name": "natural_id", "column": "user", "seed": 0}
    own = {"source": str(folder / "all.jsonl"), "text": "text", "partition": partition, "cache": str(folder / "cache")}
    return federations.table(encode, **own | changes)


def test_people_hold_their_own_rows_out_and_keep_their_names(encode, people):
    made = of_people(encode, people)
    assert made.names == tuple(f"u{i:02}" for i in range(50))
    held = np.stack([federated.sizes(store) for store in (made.train, made.test)])
    assert held[:, :48].tolist() == [[1] * 48] * 2 and held[:, 48:].tolist() == [[1, 8], [0, 2]]
    for client in range(50):
        own = texts_of(made.train, client) + texts_of(made.test, client)
        assert len(set(own)) == len(own)
        # Letters of the user's number.
        assert {text[1:3] if client > 9 else text[1:2] for text in own} == {own[0][1:3] if client > 9 else own[0][1:2]}
    assert texts_of(made.test, 49) == texts_of(of_people(encode, people).test, 49)
    other = {"name": "natural_id", "column": "user", "seed": 1, "min_size": 2}
    other = of_people(encode, people, partition=other)
    assert len(other.names) == 49 and other.names[48] == "u49" and federated.sizes(other.test).min() == 1
    assert [texts_of(other.test, i) for i in range(48)] != [texts_of(made.test, i) for i in range(48)]
    with pytest.raises(ValueError, match="data.test_fraction is 1, expected between 0 and 1"):
        of_people(encode, people, test_fraction=1)
    with pytest.raises(ValueError, match="data.unseen is -2 clients, expected 0 or more"):
        of_people(encode, people, unseen=-2)


def test_another_column_may_divide_the_rows(encode, people):
    """`label` of a partition is one of its own; without it the classes divide, whatever their column is called."""
    sorted_by = {"name": "pathological", "clients": 2, "k": 1, "seed": 0}
    by_user = of_people(encode, people, test=None, partition=sorted_by | {"k": 25, "label": "user"})
    # Letters of the user's number, of those that have two.
    owners = [{text[1:3] for text in texts_of(by_user.train, client) if text[2] != " "} for client in range(2)]
    assert all(owners) and not owners[0] & owners[1]
    assert len(of_people(encode, people, test=None, label="user", partition=sorted_by | {"k": 25}).classes) == 50


def test_a_folder_with_a_file_for_each_client(encode, people):
    by_file = {"name": "natural_id", "column": "file", "seed": 0}
    made = of_people(encode, people, source=str(people / "files"), train="*", partition=by_file)
    whole = of_people(encode, people)
    assert made.names == whole.names and federated.digest(made.train) == federated.digest(whole.train)
    assert federated.digest(made.test) == federated.digest(whole.test)


def test_a_file_has_no_splits(encode, people):
    partition = {"name": "iid", "clients": 3, "seed": 0}
    made = of_people(encode, people, partition=partition)
    held = [text for client in range(3) for store in (made.train, made.test) for text in texts_of(store, client)]
    assert len(held) == 107 and federated.sizes(made.test).sum() == 21
    same = of_people(encode, people, partition=partition, test=None)
    assert federated.digest(made.test) == federated.digest(same.test)
    for test in ("test", "validation"):
        with pytest.raises(ValueError, match=f"data.test is '{test}', but .*all.jsonl has no splits: set data.test to"):
            of_people(encode, people, partition=partition, test=test)
    with pytest.raises(ValueError, match="all.jsonl is one file, but data.configs asks for its subset 'en'"):
        of_people(encode, people, partition=partition, configs=("en",))


def test_texts_that_are_cut_are_counted(encode, people):
    made = of_people(encode, people)
    assert made.lost == {"train_cut": 0, "test_cut": 0}
    path = people / "all.jsonl"
    # With two special tokens 14 letters fit into 16 tokens.
    path.write_text(path.read_text().replace('"48 0"', '"123456789 1234"').replace('"49 3"', '"123456789 12345"'))
    made = of_people(encode, people)
    assert sum(made.lost.values()) == 1
    path.write_text(path.read_text().replace('"123456789 1234"', '"123456789 123456789 123456789"'))
    assert sum(of_people(encode, people).lost.values()) == 2
    pairs = of_people(encode, people, text=("text", "text"))
    assert sum(pairs.lost.values()) == 2


def texts_of(store, client):
    """The token sequences of a client's examples, in their order."""
    return [tuple(np.split(store.tokens, store.token_offsets[1:-1])[row]) for row in federated.rows(store, client)]


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """The same texts with the same labels in three languages, in files of two splits."""
    folder = tmp_path_factory.mktemp("parallel")
    labels = np.random.default_rng(0).integers(0, 3, 120).tolist()
    for language in ("ar", "bg", "zh"):
        (folder / language).mkdir()
        for split, rows in (("train", range(80)), ("validation", range(80, 120))):
            lines = [json.dumps({"text": f"number {i}", "label": labels[i]}) for i in rows]
            (folder / language / f"{split}.jsonl").write_text("\n".join(lines))
    partition = {"name": "by_column_dirichlet", "column": "language", "clients_per_value": 3, "pools": 2, "seed": 0}
    return {
        "source": str(folder),
        "configs": ("ar", "bg", "zh"),
        "text": "text",
        "train": "train+validation",
        "test": None,
        "partition": partition | {"alpha": 0.5, "parallel": True},
        "cache": str(folder / "cache"),
    }


def test_a_parallel_corpus_stays_parallel_without_a_test_split(encode, parallel):
    federation = federations.table(encode, **parallel)
    assert federated.sizes(federation.train).tolist() == [16] * 18
    assert federated.sizes(federation.test).tolist() == [4] * 18
    for store in (federation.train, federation.test):
        texts = [texts_of(store, client) for client in range(18)]
        for pool in (texts[:9], texts[9:]):
            assert pool[:3] == pool[3:6] == pool[6:]
    one_language = [
        text for store in (federation.train, federation.test) for k in (0, 1, 2) for text in texts_of(store, k)
    ]
    unseen = [text for store in (federation.train, federation.test) for k in (9, 10, 11) for text in texts_of(store, k)]
    assert len(set(one_language + unseen)) == 120
    other = federations.table(encode, **parallel | {"seed": 1})
    assert texts_of(other.test, 0) != texts_of(federation.test, 0)


def test_subsets_of_other_sizes_hold_out_their_own_share():
    rows = {"language": np.array(["a"] * 10 + ["b"] * 30, object), "n": np.arange(40)}
    split = federations._held_out(rows, 0.2, 0, "language")
    assert split["test"]["language"].tolist() == ["a"] * 2 + ["b"] * 6
    assert np.sort(np.concatenate([split["train"]["n"], split["test"]["n"]])).tolist() == list(range(40))
    assert (np.diff(split["train"]["n"]) > 0).all()


def test_limits_keep_the_first_rows_of_a_client_and_tokenize_no_others(encode, parallel):
    asked = []

    def counted(texts, pairs):
        asked.append(len(texts))
        return encode(texts, pairs)

    whole = federations.table(encode, **parallel)
    small = federations.table(counted, **parallel, train_limit=5, test_limit=9)
    assert federated.sizes(small.train).tolist() == [5] * 18 and federated.sizes(small.test).tolist() == [4] * 18
    assert asked == [5 * 18, 4 * 18]
    for client in range(18):
        assert texts_of(small.train, client) == texts_of(whole.train, client)[:5]
        assert texts_of(small.test, client) == texts_of(whole.test, client)
    assert small.names == whole.names and small.groups == whole.groups
    for limits, sentence in (
        ({"train_limit": 0}, "data.train_limit is 0 examples of a client, expected 1 or more"),
        ({"test_limit": -1}, "data.test_limit is -1 examples of a client, expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=sentence):
            federations.table(encode, **parallel, **limits)


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


def test_histograms_count_the_labels_that_clients_train_on(encode):
    federation = federations.chatterbot(encode)
    counts, german = federations.histograms(federation), federation.names.index("de")
    assert counts.shape == (len(federation.names), 19)
    assert counts.sum(1).tolist() == federated.sizes(federation.train).tolist()
    own = federation.train.labels[federated.rows(federation.train, german)]
    assert counts[german].tolist() == np.bincount(own, minlength=19).tolist()
    assert federations.histograms(federation._replace(task="causal")) is None


def one_token(texts, pairs):
    """Encodes nothing of the texts: for tests of who holds which rows."""
    return federated.Encoded(np.ones(len(texts), np.int32), None, np.arange(len(texts) + 1))


def first_class(store):
    return [np.mean(store.labels[federated.rows(store, client)] == 0) for client in range(8)]


@pytest.mark.parametrize("h", [0.3, 0.9])
@pytest.mark.parametrize(("task", "counts"), [("cola", (2528, 6023)), ("sst2", (29780, 37569))])
def test_glue_in_eight_clients_of_sorted_labels(task, counts, h, benchmarks, tmp_path):
    """The shares of class 0 that PF2LoRA's partition comes to, and test shards with and without the skew."""
    settings = {"source": str(benchmarks / "glue"), "configs": (task,), "text": "sentence", "test": "validation"}
    partition = {"name": "label_sort", "clients": 8, "h": h}
    skewed, even = (
        federations.table(one_token, **settings, partition=partition | own, cache=str(tmp_path))
        for own in ({}, {"iid_splits": ("test",)})
    )
    size = {"cola": 1068, "sst2": 8418 if h == 0.3 else 8417}[task]
    assert federated.sizes(skewed.train).tolist() == [size] * 8 and skewed.names[7] == f"{task}/7"
    expected = expected_shares(counts[0] / sum(counts), h)
    np.testing.assert_allclose(first_class(skewed.train), expected, atol=0.02)
    for client in range(8):
        assert (rows_of(skewed.train, client) == rows_of(even.train, client)).all()
    # A shard of about 100 examples: its even part alone strays by up to three deviations of 0.035.
    assert len(set(federated.sizes(skewed.test))) == 1 and federated.sizes(skewed.test)[0] > 100
    share = np.mean(even.test.labels == 0)
    np.testing.assert_allclose(first_class(skewed.test), expected_shares(share, h), atol=0.1)
    np.testing.assert_allclose(first_class(even.test), share, atol=0.15)
    assert np.ptp(first_class(even.test)) < np.ptp(first_class(skewed.test))


def expected_shares(share, h, clients=8):
    """Share of class 0 in each of the equal slices of sorted labels, beside an even part 1 - h."""
    ends = np.clip(share * clients - np.arange(clients), 0, 1)
    return (1 - h) * share + h * ends


def rows_of(store, client):
    return store.labels[federated.rows(store, client)]


def test_glue_pairs_with_and_without_a_test_split(benchmarks, tmp_path):
    common = {"partition": {"name": "label_sort", "clients": 8, "h": 0.9}, "cache": str(tmp_path)}
    for task, text, rows, held in (
        ("mnli", ("premise", "hypothesis"), 3000, 7469),
        ("qqp", ("question1", "question2"), 2000, 7600),
    ):
        made = federations.table(
            one_token, source=str(benchmarks / "glue"), configs=(task,), text=text, test="validation", **common
        )
        for store, total in ((made.train, rows), (made.test, held)):
            # Either part of the rows leaves a remainder of fewer than eight.
            assert total - 16 < len(store.labels) <= total and len(set(federated.sizes(store))) == 1
    made = federations.table(
        one_token,
        source=str(benchmarks / "glue"),
        configs=("qnli",),
        text=("question", "sentence"),
        train="validation",
        test=None,
        **common,
    )
    assert len(made.classes) == 2 and 4355 < len(made.train.labels) <= 4370 and 1077 < len(made.test.labels) <= 1093
    share = np.mean(made.train.labels == 0)
    np.testing.assert_allclose(first_class(made.train), expected_shares(share, 0.9), atol=0.02)

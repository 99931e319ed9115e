"""Span extraction: windows, labels, partitions, scores of answers and the task on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from fedjax_peft import adapters, loop, metrics, rounds, runs, tasks
from fedjax_peft.algorithms import fedavg
from fedjax_peft.data import batches, federated, federations, partition, squad, tokenizers
from fedjax_peft.models import hf

WORDS = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def minilm():
    return tokenizers.load("minilm")


def windows_of(encoded):
    tokens, spans = (np.split(column, encoded.offsets[1:-1]) for column in (encoded.tokens, encoded.spans))
    return list(zip(tokens, spans, strict=True))


def test_windows_overlap_and_know_their_characters(minilm):
    encoded = minilm.encode(["who is it", "x"], [WORDS, "one"], max_length=12, stride=3)
    assert encoded.sources.tolist() == [0, 0, 0, 1] and encoded.sources.dtype == np.int64
    assert np.diff(encoded.offsets).tolist() == [12, 12, 12, 5] and encoded.spans.dtype == np.int32
    texts = [[WORDS[a:b] for a, b in spans if a >= 0] for _, spans in windows_of(encoded)[:3]]
    words = WORDS.split()
    assert texts == [words[:6], words[3:9], words[6:12]]
    question = minilm.encode(["who is it"], max_length=12).tokens
    for tokens, spans in windows_of(encoded)[:3]:
        np.testing.assert_array_equal(tokens[:5], question)
        assert (spans[:5] == -1).all() and (spans[-1] == -1).all()
    assert encoded.types[:12].tolist() == [0] * 5 + [1] * 7
    # Windows leave no trace in the tokenizer.
    plain = minilm.encode(["who is it"], [WORDS], max_length=12)
    assert plain.spans is None and len(plain.tokens) == 12


def test_questions_that_leave_no_room_are_refused(minilm):
    with pytest.raises(ValueError, match="stride is 3, but a first text of 6 tokens leaves 3 of max_length=12"):
        minilm.encode(["who is it", "one two three four five six"], [WORDS, WORDS], max_length=12, stride=3)


QUESTION, CONTEXT = "who wrote it", "The play, by Anne Clark, was first shown in the old town of Ely in 1911."
TABLE = {"text": ["Anne Clark"], "answer_start": [13]}


def test_labels_are_the_tokens_of_the_answer_in_windows_that_hold_it(minilm):
    answers = [TABLE, {"text": [], "answer_start": []}]
    windows = minilm.encode([QUESTION] * 2, [CONTEXT] * 2, max_length=14, stride=3)
    labels = squad.labels(windows, answers)
    assert labels["span"].dtype == labels["context"].dtype == np.int32
    held = []
    for window, (_, spans) in enumerate(windows_of(windows)):
        (inside,) = np.nonzero(spans[:, 0] >= 0)
        assert labels["context"][window].tolist() == [inside[0], inside[-1] + 1]
        first, last = labels["span"][window]
        if windows.sources[window] or not (spans[inside[0], 0] <= 13 and spans[inside[-1], 1] >= 23):
            assert first == last == 0
        else:
            held.append(window)
            assert CONTEXT[spans[first, 0] : spans[last, 1]] == "Anne Clark"
    assert held and len(held) < (windows.sources == 0).sum()


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "exact"),
    [
        ("the Cat!", ["cat"], 1, 1),  # case, articles and punctuation do not count
        ("a cat sat", ["the cat"], 2 / 3, 0),  # precision 1/2, recall 1
        ("Denver Broncos", ["Broncos", "The Denver Broncos", "Denver"], 1, 1),  # the best of several
        ("in 1911 and 1911", ["1911 1911 1911"], 4 / 7, 0),  # a word counts as often as it is common: 2 of 4, 2 of 3
        ("another theory", ["other theory"], 1 / 2, 0),  # no article within a word
        ("U.S.A.", ["USA"], 1, 1),
        ("well-known\n fact", ["wellknown  fact"], 1, 1),
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either
    ],
)
def test_answers_are_compared_as_the_official_scripts_do(answer, gold, f1, exact):
    assert squad.compare(answer, gold) == (pytest.approx(f1), exact)


def best_span(start, end, first, last, most):
    """(score, first, last token) of the best span by trying all."""
    spans = [(start[i] + end[j], i, j) for i in range(first, last) for j in range(i, min(i + most, last))]
    return max(spans, key=lambda span: span[0])


def test_spans_stay_within_the_context_and_the_longest_answer():
    rng = np.random.default_rng(0)
    outputs = rng.normal(0, 3, (40, 12, 2)).astype(np.float32)
    context = np.stack([rng.integers(1, 6, 40), rng.integers(7, 13, 40)], 1).astype(np.int32)
    labels = {"span": np.stack([context[:, 0], context[:, 1] - 1], 1), "context": context}
    task = tasks.span(score=lambda rows, predictions: {}, max_answer=3)
    said = task.predict(jnp.array(outputs), labels)
    lengths = set()
    for row in range(40):
        score, first, last = best_span(*outputs[row].T, *context[row], 3)
        assert (said["start"][row], said["end"][row]) == (first, last)
        assert said["score"][row] == pytest.approx(score) and said["null"][row] == pytest.approx(outputs[row, 0].sum())
        lengths.add(last - first)
    assert lengths == {0, 1, 2}
    # Cross-entropy over the first token and the context, of start and end, averaged.
    losses = task.loss(jnp.array(outputs), labels)
    for row in range(40):
        allowed = [0, *range(*context[row])]
        expected = [
            np.log(np.exp(outputs[row, allowed, k]).sum()) - outputs[row, labels["span"][row, k], k] for k in (0, 1)
        ]
        assert losses[row] == pytest.approx(np.mean(expected), rel=1e-5)
    wider = np.concatenate([outputs, rng.normal(9, 1, (40, 5, 2)).astype(np.float32)], 1)
    np.testing.assert_array_equal(task.loss(jnp.array(wider), labels), losses)
    jax.tree.map(np.testing.assert_array_equal, task.predict(jnp.array(wider), labels), said)


def test_a_question_takes_the_best_of_its_windows(minilm):
    windows = minilm.encode(["who is it", "who is it"], [WORDS, "one"], max_length=12, stride=3)
    answers = [{"text": ["seven eight"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    start, end = np.array([5, 8, 5, 5]), np.array([6, 9, 6, 5])  # "one two", "seven eight", "seven eight", "one"
    rows, best = np.array([2, 0, 3, 1]), np.array([1.0, 3.0, 2.0, 4.0])
    null = np.array([9.0, 5.0, 2.5, 9.0])

    def score(threshold=None, best=best):
        predictions = {"start": start[rows], "end": end[rows], "score": best[rows], "null": null[rows]}
        found = squad.scorer(windows, [WORDS, "one"], answers, threshold)(rows, predictions)
        assert found["questions"].sum() == 2
        return found["exact_match"].sum(), found["f1"].sum()

    assert score() == (1, 1)  # "seven eight" of row 1; "one" answers what has no answer
    assert score(best=np.array([9.0, 3.0, 2.0, 4.0])) == (0, 0)
    # Row 2 knows the least about no answer: 2.5 against 3. The other question has 9 against 4.
    assert score(0.0) == (2, 2) and score(-1.0) == (1, 1) and score(6.0) == (1, 1)


def parquet(folder, rows, split="train"):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return str(folder)


def articles(counts, start=0):
    """Rows of articles `A00`, `A01`, .. with so many questions, two to a context."""
    words = WORDS.split()
    return [
        {
            "title": f"A{article:02}",
            "context": f"{article} {k // 2} {WORDS}",
            "question": f"{'What' if k % 2 else 'And who'} is {k} in {article}?",
            "answers": {"text": [words[k % 12]], "answer_start": [f"{article} {k // 2} {WORDS}".index(words[k % 12])]},
        }
        for article, count in enumerate(counts, start)
        for k in range(count)
    ]


def test_blocks_are_whole_groups_in_order_of_near_equal_size():
    titles = np.repeat([f"A{i:02}" for i in range(9)], [4, 9, 2, 3, 8, 1, 6, 2, 5])[::-1].astype(object)
    splits = {"train": {"title": titles}, "test": {"title": np.repeat(["B", "A", "C"], [4, 1, 1]).astype(object)}}
    parts = partition.blocks(splits, clients=3, column="title")
    held = [set(titles[rows]) for rows in parts["train"]]
    assert held == [{"A00", "A01"}, {"A02", "A03", "A04", "A05"}, {"A06", "A07", "A08"}]
    assert [set(splits["test"]["title"][rows]) for rows in parts["test"]] == [{"A"}, {"B"}, {"C"}]
    known = partition.blocks(splits | {"test": {"title": titles[:9]}}, clients=3, column="title")["test"]
    assert [set(titles[rows]) for rows in known] == [set(), set(), {"A06", "A07", "A08"}]
    huge = {"train": {"title": np.repeat(["A", "B", "C"], [1, 98, 1])}}
    assert [len(rows) for rows in partition.blocks(huge, clients=3, column="title")["train"]] == [1, 98, 1]
    with pytest.raises(ValueError, match="column 'title' has 3 groups in train, too few for 4 clients"):
        partition.blocks(huge, clients=4, column="title")


def test_a_federation_of_titles(minilm, tmp_path):
    source = parquet(tmp_path / "squad", articles([6, 4, 8, 2, 5, 5]))
    parquet(tmp_path / "squad", articles([4, 4], start=50), "validation")
    encode = functools.partial(minilm.encode, max_length=20)
    made = federations.squad(encode, source=source, clients=2, stride=4)
    assert (made.task, made.classes, made.names) == ("span", (), ("all/0", "all/1"))
    assert np.isnan(federations.majority(made)).all()
    for store, expected in ((made.train, [18, 12]), (made.test, [4, 4])):
        window = np.diff(store.token_offsets).max()
        assert window == 20 and store.labels["span"].shape == (len(federated.lengths(store)), 2)
        held = [len(federated.rows(store, client)) for client in (0, 1)]
        assert held[0] > expected[0] and held[1] > expected[1], "some questions have several windows"
    # With perfect predictions, every question of a client is answered.
    for client in (0, 1):
        rows = federated.rows(made.test, client)
        start, end = made.test.labels["span"][rows].T
        perfect = {"start": start, "end": end, "score": (start > 0).astype(float), "null": np.zeros(len(rows))}
        assert {name: values.sum() for name, values in made.score(rows, perfect).items()} == pytest.approx(
            {"f1": 4, "exact_match": 4, "questions": 4}
        )
    by_type = federations.squad(encode, source=source, clients=2, group="question_type", test=None, stride=4)
    assert minilm.decode(by_type.train.tokens[: by_type.train.token_offsets[1]]).startswith("what")
    few = federations.squad(encode, source=source, clients=2, stride=4, train_limit=3, test_limit=1)
    assert len(federated.lengths(few.test)) == 4 and len(federated.lengths(few.train)) == 12  # two windows each


def test_contexts_are_held_out_as_a_whole(minilm, tmp_path):
    source = parquet(tmp_path / "squad", articles([8, 8, 8, 8]))
    encode = functools.partial(minilm.encode, max_length=32)
    made = federations.squad(encode, source=source, clients=2, stride=4, test=None, test_fraction=0.25)
    for client in (0, 1):
        texts = []
        for store in (made.train, made.test):
            rows = federated.rows(store, client)
            texts.append({minilm.decode(tokens).split("?")[1] for tokens in split(store, rows)})
        assert len(texts[0]) == 6 and len(texts[1]) == 2 and not texts[0] & texts[1]
        assert {text.split()[0] for text in texts[0] | texts[1]} == {str(2 * client), str(2 * client + 1)}


def split(store, rows):
    return [store.tokens[store.token_offsets[row] : store.token_offsets[row + 1]] for row in rows]


def test_questions_without_an_answer_need_a_threshold(minilm, tmp_path):
    rows = articles([4, 4])
    rows[0]["answers"] = {"text": [], "answer_start": []}
    source = parquet(tmp_path / "squad", rows)
    encode = functools.partial(minilm.encode, max_length=32)
    settings = {"source": source, "clients": 2, "stride": 4, "test": None, "test_fraction": 0.5}
    with pytest.raises(ValueError, match=r"'And who is 0 in 0\?' has no answer: set data.no_answer_threshold"):
        federations.squad(encode, **settings)
    made = federations.squad(encode, **settings, no_answer_threshold=0.0)
    assert len(federated.lengths(made.train)) == len(federated.lengths(made.test)) == 4


def test_real_contexts(benchmarks, minilm):
    """Most answers of real questions lie in a window, and labels lead back to them."""
    encode = functools.partial(minilm.encode, max_length=384)
    settings = {"source": str(benchmarks / "squad"), "group": "context_id", "test": None, "test_limit": 40}
    made = federations.squad(encode, **settings, train_limit=40)
    rows = np.arange(len(federated.lengths(made.test)))
    start, end = made.test.labels["span"].T
    perfect = {"start": start, "end": end, "score": (start > 0).astype(float), "null": np.zeros(len(rows))}
    values = made.score(rows, perfect)
    assert values["questions"].sum() == 160 and values["exact_match"].sum() >= 157 and values["f1"].sum() >= 158


def hidden_letters(clients, questions):
    """Contexts of dots with one x each: the answer is where the x is."""
    rng = np.random.default_rng(0)
    rows = []
    for client in range(clients):
        for _ in range(questions):
            dots = ["."] * 20
            at = int(rng.integers(20))
            dots[at] = "x"
            answers = {"text": ["x"], "answer_start": [at]}
            rows.append({"title": f"t{client}", "context": "".join(dots), "question": "?", "answers": answers})
    return rows


def test_a_run_learns_to_find_answers_and_pools_questions(tmp_path):
    """Data, model, task, evaluation and tables together: windows of two, of which one holds the answer."""
    folder = tiny.write_model(tmp_path / "model")
    encode = functools.partial(tokenizers.load(str(folder)).encode, max_length=16)
    source = parquet(tmp_path / "squad", hidden_letters(3, 12))
    data = federations.squad(encode, source=source, clients=3, stride=4, test="train")
    loaded = hf.load(str(folder), labels=0, head="span", key=jax.random.key(0))
    task = tasks.span(score=data.score, max_answer=4)
    init = functools.partial(adapters.init, shapes=loaded.base, rank=4, targets="query,value")
    method = fedavg.fedit(loaded.model, task, init, optax.adam(0.02))
    pure = {"seed": 0, "widths": (16,), "batch": 8}
    nothing = functools.partial(batches.cohort, data.train, round=0, steps=0, **pure)
    clients = runs.Clients(
        names=data.names,
        groups=("a", "a", "b"),
        examples=federated.sizes(data.train),
        majority=federations.majority(data),
        pools=data.pools,
        sample=lambda index: np.arange(3, dtype=np.int32),
        dropped=lambda index, ids: np.zeros(len(ids), bool),
        training=lambda index, ids: batches.cohort(data.train, ids, round=index, steps=10, **pure),
        nothing=nothing,
        tests=lambda ids: batches.items(data.test, ids, batch=8, pack=2, widths=(16,)),
        tokens=batches.waste,
    )
    mesh = rounds.make_mesh(1)
    problem = runs.Problem(mesh, method, loaded.model, task, rounds.shard_base(loaded.base, mesh))
    settings = {
        "seed": 0,
        "total": 6,
        "chunk": 3,
        "evaluations": runs.Evaluations(6),
        "checkpoint_every": 6,
        "keep_checkpoints": 1,
    }
    summary = loop.run(problem, clients, {"personal": runs.Point(method, nothing)}, tmp_path / "run", **settings)
    before, after = (summary["pools"]["seen"][point] for point in ("base", "personal"))
    assert after["loss"]["mean"] < before["loss"]["mean"] / 2
    assert after["exact_match"]["mean"] > 0.9 > 0.5 > before["exact_match"]["mean"]
    rows = metrics.read_rows(tmp_path / "run" / "clients.parquet")
    assert [name for name in rows[0] if name in ("loss", "f1", "exact_match", "questions")] == [
        "loss",
        "f1",
        "exact_match",
    ]
    # Every client has as many questions, though not windows that hold an answer.
    values = {row["client"]: row["f1"] for row in rows if row["round"] == 0}
    assert before["f1"]["pooled"] == pytest.approx(np.mean(list(values.values())))
    assert before["f1"]["groups"] == pytest.approx({"a": (values[0] + values[1]) / 2, "b": values[2]})
    (tmp_path / "run" / "summary.json").unlink()
    again = loop.run(problem, clients, {"personal": runs.Point(method, nothing)}, tmp_path / "run", **settings)
    assert again == summary, "tables hold all that a resumed run needs"

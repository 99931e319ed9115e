"""Federations of prompts and answers: who holds what, what is held out, and that nothing is tested that was trained."""

import collections
import json
import pathlib

import numpy as np
import pytest

from fedjax_peft import config
from fedjax_peft.data import data_to_text, federated, federations, instruction_sets, prompted
from fedjax_peft.data.federated import Encoded
from fedjax_peft.data.tokenizers import Tokenizer

END = 1


def _encode(texts, pairs=None, *, max_length, special=True):
    del pairs
    tokens = [np.array([ord(letter) + 2 for letter in text][:max_length], np.int32) for text in texts]
    offsets = np.append(0, np.cumsum([len(text) for text in tokens])).astype(np.int64)
    return Encoded(np.concatenate([np.zeros(0, np.int32), *tokens]), None, offsets)


def _decode(ids):
    return "".join(chr(i - 2) for i in ids if i > END)


LETTERS = Tokenizer(_encode, _decode, pad=0, eos=END, special=(0, END), size=1 << 16, sha256="")
"""A token a letter."""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(store, client):
    """(prompt, answer) of each example of a client; end tokens, one for each of several answers, are left out."""
    out = []
    for row in federated.rows(store, client):
        own = slice(store.token_offsets[row], store.token_offsets[row + 1])
        tokens, answers = store.tokens[own], 1 if store.branches is None else store.branches[own].max()
        assert tokens[-1] == END and (tokens == END).sum() == answers
        out.append((_decode(tokens[: store.prompts[row]]), _decode(tokens[store.prompts[row] :])))
    return out


def stores(federation):
    return {part: getattr(federation, part) for part in prompted.PARTS if getattr(federation, part) is not None}


@pytest.fixture
def table(tmp_path):
    """120 rows of three kinds, one of them with a prompt of 60 letters."""
    rows = [{"instruction": f"do {i}", "output": f"done {i}", "kind": "abc"[i % 3]} for i in range(120)]
    rows[7]["instruction"] = "x" * 60
    return write(tmp_path / "rows.jsonl", rows)


def make(source, **settings):
    partition = {"name": "natural_id", "column": "kind"}
    own = {"source": source, "max_length": 40, "template": "plain", "partition": partition, "group": "kind"} | settings
    return prompted.from_columns(LETTERS, **own)


def test_shares_of_a_client_as_published():
    """Numbers of rows that the code of FedAMoLE's authors came to with 1,501 rows."""
    rows = np.arange(1501)
    for share, aux, sizes in (
        (0.1, 0.05, [1140, 60, 150, 151]),
        (0.1, 0.0, [1200, 0, 150, 151]),
        (10_000 / 570_152, 0.05, [1375, 73, 26, 27]),
        (10_000 / 570_152, 0.0, [1448, 0, 26, 27]),
    ):
        parts = prompted.divided(rows, aux=aux, validation=share, test=share)
        assert [len(part) for part in parts.values()] == sizes and list(parts) == list(prompted.PARTS)
        np.testing.assert_array_equal(np.concatenate(list(parts.values())), rows)
    assert len(prompted.divided(np.arange(50), aux=0.05, validation=0.1, test=0.1)["train"]) == 38
    with pytest.raises(ValueError, match="leave nothing to train on"):
        prompted.divided(rows, aux=0.05, validation=0.5, test=0.5)


def test_rows_are_divided_and_long_prompts_left_out(table):
    federation = make(table)
    assert federation.task == "causal" and federation.names == ("a", "b", "c") and federation.score is None
    parts = [[texts(store, client) for store in stores(federation).values()] for client in range(3)]
    assert [sum(map(len, own)) for own in parts] == [40, 39, 40]
    assert [len(part) for part in parts[0]] == [30, 2, 4, 4]
    for client, own in enumerate(parts):
        seen = [int(prompt.split()[1]) for part in own for prompt, _ in part]
        assert sorted(seen) == [i for i in range(120) if i % 3 == client and i != 7]
        assert all(prompt == f"do {answer.split()[1]}\n" for part in own for prompt, answer in part)
    flat = [answer for own in parts for _, answer in own[3]]
    assert [own for (own,) in federation.references] == flat
    none = make(table, aux=0.0, validation=0.0)
    assert none.aux is None and none.validation is None and list(stores(none)) == ["train", "test"]
    assert texts(none.test, 0) == parts[0][3] and len(texts(none.train, 0)) == 36


def test_what_is_left_out_and_cut_is_counted(table, tmp_path):
    rows = [json.loads(line) for line in pathlib.Path(table).read_text().splitlines()]
    for i in range(1, 120, 3):
        rows[i]["output"] = "y" * (
            40 - len(f"do {i}\n") - 1 + (i in (1, 4))
        )  # one letter too long, beside the end token
    made = make(write(tmp_path / "long.jsonl", rows), aux=0.0, validation=0.0)
    assert sum(made.lost[f"{part}_left_out"] for part in prompted.PARTS) == 1
    assert made.lost["train_cut"] + made.lost["test_cut"] == 2
    whole = make(table, train_limit=5)
    assert not sum(whole.lost[f"{part}_cut"] for part in prompted.PARTS)
    assert {name for name in whole.lost} == {
        f"{part}_{kind}" for part in prompted.PARTS for kind in ("cut", "left_out")
    }


def test_a_file_has_no_split_of_tests(table, tmp_path):
    with pytest.raises(ValueError, match="data.test is 'test', but .*rows.jsonl has no splits: set data.test to None"):
        make(table, test="test")
    rows = [{"meaning_representation": f"name[{i}], food[Thai]", "human_reference": f"{i}"} for i in range(40)]
    made = data_to_text.e2e(LETTERS, source=write(tmp_path / "e2e.jsonl", rows), max_length=60, clients=1)
    held = [prompt for store in stores(made).values() for prompt, _ in texts(store, 0)]
    assert len(set(held)) == len(held) == 40 and len(texts(made.test, 0)) == 4


def test_limits_keep_the_first_rows_of_a_client(table):
    whole, few = make(table), make(table, train_limit=5, test_limit=2, validation_limit=1, aux_limit=1)
    for part, limit in (("train", 5), ("aux", 1), ("validation", 1), ("test", 2)):
        for client in (0, 2):
            assert texts(stores(few)[part], client) == texts(stores(whole)[part], client)[:limit]
    with pytest.raises(ValueError, match="data.test_limit is 0 rows of a client, expected 1 or more"):
        make(table, test_limit=0)


def test_settings_are_chosen_by_rows_that_are_neither_trained_nor_tested_on(table):
    whole, choosing = make(table), make(table, evaluated="validation")
    assert choosing.validation is None
    for client in range(3):
        assert texts(choosing.train, client) == texts(whole.train, client)
        assert texts(choosing.test, client) == texts(whole.validation, client)
    assert choosing.references[0] == (texts(whole.validation, 0)[0][1],)
    few = make(table, evaluated="validation", validation_limit=2, test_limit=1)
    assert texts(few.test, 1) == texts(whole.validation, 1)[:2]
    with pytest.raises(ValueError, match="data.evaluated is 'train', expected 'test' or 'validation'"):
        make(table, evaluated="train")
    with pytest.raises(ValueError, match="data.evaluated is 'validation', but data.validation is 0"):
        make(table, evaluated="validation", validation=0.0)


def test_a_tiny_client_gives_training_rows_to_what_would_be_empty(tmp_path):
    rows = [{"instruction": f"do {i}", "output": "done", "kind": "ab"[i < 4]} for i in range(44)]
    small = make(write(tmp_path / "small.jsonl", rows))
    assert [len(texts(store, 1)) for store in stores(small).values()] == [1, 1, 1, 1]
    assert sorted(prompt for store in stores(small).values() for prompt, _ in texts(store, 1)) == [
        f"do {i}\n" for i in range(4)
    ]
    with pytest.raises(ValueError, match="client b has too few rows .* one each for train, aux, validation, test"):
        make(write(tmp_path / "tiny.jsonl", rows[1:]))


def test_a_split_of_tests_and_clients_that_never_train(table, tmp_path):
    folder = tmp_path / "both"
    rows = [json.loads(line) for line in pathlib.Path(table).read_text().splitlines()]
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", [{"instruction": "t", "output": kind, "kind": kind} for kind in "cab"])
    federation = make(str(folder), test="test", unseen=[1], template="alpaca_turn", max_length=300)
    assert [texts(federation.test, client)[0][1] for client in range(3)] == [" a", " b", " c"]
    assert [sum(len(texts(store, n)) for store in stores(federation).values()) for n in range(3)] == [41] * 3
    assert {pool: ids.tolist() for pool, ids in federation.pools.items()} == {"seen": [0, 2], "unseen": [1]}


def test_mistakes_are_named(table):
    with pytest.raises(ValueError, match="data.partition.name is 'iidd'"):
        make(table, partition={"name": "iidd"})
    with pytest.raises(ValueError, match="there is no column 'language', only instruction, output, kind"):
        make(table, keep={"language": ["en"]})
    with pytest.raises(ValueError, match="data.context is 'input', but the columns are instruction, output, kind"):
        make(table, context="input")
    with pytest.raises(ValueError, match="no row has one of the values of 'kind'"):
        make(table, keep={"kind": ["d"]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'auxx'"):
        make(table, auxx=1)


def test_tests_ask_each_question_once_with_all_choices(tmp_path):
    rows = [{"premise": f"{i}", "hypothesis": "h", "label": i % 4 - 1} for i in range(400)]
    source = write(tmp_path / "snli.jsonl", rows)
    federation = instruction_sets.snli(
        LETTERS, source=source, max_length=120, clients=3, alpha=100.0, test_fraction=0.2
    )
    assert federation.task == "choice" and federation.classes == ("Yes", "Maybe", "No") and federation.score is None
    for client in range(3):
        for prompt, answer in texts(federation.train, client) + texts(federation.aux, client):
            number = int(prompt.removeprefix("Suppose ").split()[0])
            assert answer == federation.classes[number % 4 - 1]
        assert {answer for _, answer in texts(federation.test, client)} == {"YesMaybeNo"}
    assert federation.train.branches is None and federation.test.branches.max() == 3
    asked = [[prompt for prompt, _ in texts(federation.test, client)] for client in range(3)]
    gold = [np.array([int(prompt.removeprefix("Suppose ").split()[0]) % 4 - 1 for prompt in own]) for own in asked]
    np.testing.assert_array_equal(federation.test.labels["right"], np.concatenate(gold))
    usual = [collections.Counter(answer for _, answer in texts(federation.train, client)) for client in range(3)]
    expected = [
        np.mean(own == max(range(3), key=lambda choice: counts[federation.classes[choice]]))
        for own, counts in zip(gold, usual, strict=True)
    ]
    np.testing.assert_allclose(federations.majority(federation), expected)


def test_natural_instructions_are_the_first_of_the_largest_tasks(tmp_path):
    def row(task, number, answer="x"):
        return {
            "task_name": task,
            "definition": f"of {task}",
            "inputs": "in",
            "targets": answer,
            "id": f"{task}{number}",
        }

    sizes = {"task10_d": 20, "task9_c": 30, "task1_b": 20, "task100_a": 20, "task2_e": 5}
    rows = [row(task, i) for task, size in sizes.items() for i in range(size)]
    rows.insert(1, row("task10_d", 0, "second reference"))
    settings = {"max_length": 300, "split": "train"}
    source = write(tmp_path / "all.jsonl", rows)
    made = instruction_sets.natural_instructions(LETTERS, source=source, clients=2, largest=3, **settings)
    # By size task9, then task1, task10 and task100, which are as large; as texts task1 < task10 < task9.
    assert made.groups == ("task1_b", "task10_d")
    assert sum(len(texts(store, 1)) for store in stores(made).values()) == 20
    assert all(answer == "x" for store in stores(made).values() for _, answer in texts(store, 1))
    assert "### Instruction:\nof task1_b\n\n### Input:\nin\n\n### Response:\n" in texts(made.train, 0)[0][0]
    for task, size in sizes.items():
        write(tmp_path / "folders" / task / "train.jsonl", [row(task, i) for i in range(size)])
    apart = instruction_sets.natural_instructions(
        LETTERS, source=str(tmp_path / "folders"), clients=2, largest=3, **settings
    )
    assert apart.groups == made.groups
    some = {"tasks": ["task10_d", "task2_e"], "clients": 2}
    named = instruction_sets.natural_instructions(LETTERS, source=str(tmp_path / "folders"), **some, **settings)
    assert named.groups == ("task10_d", "task2_e")
    with pytest.raises(ValueError, match="data.clients is 4, but .* has 3 tasks"):
        instruction_sets.natural_instructions(LETTERS, source=source, clients=4, largest=3, **settings)


def test_tasks_may_count_their_rows_from_0_each(tmp_path):
    row = {"definition": "d", "inputs": "i", "targets": "t"}
    sizes = {"task1_a": 60, "task2_b": 80, "task3_c": 100}
    rows = [row | {"task_name": task, "id": number} for task, size in sizes.items() for number in range(size)]
    source = write(tmp_path / "all.jsonl", rows + rows[:10])
    settings = {"max_length": 300, "split": "train", "test_limit": None}
    made = instruction_sets.natural_instructions(LETTERS, source=source, clients=3, **settings)
    assert [sum(len(texts(store, n)) for store in stores(made).values()) for n in range(3)] == [60, 80, 100]


def test_columns_and_labels_that_data_sets_lack_are_named(tmp_path):
    def snli(**row):
        source = write(tmp_path / "snli.jsonl", [{"premise": "p", "hypothesis": "h", "label": 0}] * 20 + [row])
        return instruction_sets.snli(LETTERS, source=source, max_length=120, clients=2, alpha=100.0)

    with pytest.raises(ValueError, match="row 20 of column 'hypothesis' holds None instead of a text"):
        snli(premise="p", hypothesis=None, label=1)
    with pytest.raises(ValueError, match="has label 3, not one of the 3 classes"):
        snli(premise="p", hypothesis="h", label=3)
    said = [{"premise": "p", "hypothesis": "h", "label": label} for label in instruction_sets.LABELS] * 20
    source = write(tmp_path / "words.jsonl", said)
    made = instruction_sets.snli(LETTERS, source=source, max_length=120, clients=2, alpha=100.0)
    answers = {answer for client in range(2) for _, answer in texts(made.train, client)}
    assert answers == {"Yes", "Maybe", "No"}
    for name, row, missing in (
        ("snli", {"sentence1": "p", "sentence2": "h", "label": 0}, "premise"),
        ("natural_instructions", {"definition": "d", "inputs": "i", "targets": "t"}, "task_name"),
        ("fed_aya", {"instruction": "i", "response": "r", "language": "en"}, "client"),
    ):
        source = write(tmp_path / f"{name}.jsonl", [row] * 20)
        with pytest.raises(ValueError, match=f"has no column '{missing}'"):
            getattr(instruction_sets, name)(LETTERS, source=source, max_length=120)


def test_settings_that_a_data_set_makes_itself_are_refused(tmp_path):
    row = {"instruction": "i", "context": "", "response": "r", "category": "a"}
    settings = {"source": write(tmp_path / "dolly.jsonl", [row] * 60), "max_length": 300, "clients": 2}
    with pytest.raises(ValueError, match="^data.partition is given, but dolly sets partition itself$"):
        config.called("data", instruction_sets.dolly, LETTERS, **settings, partition={"min_size": 5})


def test_lists_of_texts_are_no_texts(tmp_path):
    row = {"category": "Food", "triples": "a | b | c", "references": ["c is b"]}
    source = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=r"the column 'triples' has the text 'a \| b \| c', expected lists of texts"):
        data_to_text.webnlg(LETTERS, source=source, max_length=60, clients=1)


def test_whole_groups_go_to_the_client_with_fewest_rows():
    train = np.repeat(np.array(list("abcde"), object), [10, 7, 6, 4, 1])
    test = np.array(list("aabbz"), object)
    dealt = data_to_text.whole_groups({"train": train, "test": test}, clients=3, seed=0)
    # a; b; c; then d to c's client is 10 and e to b's is 8.
    assert ["".join(sorted(set(train[rows]))) for rows in dealt["train"]] == ["a", "be", "cd"]
    assert [test[rows].tolist() for rows in dealt["test"][:2]] == [["a", "a"], ["b", "b"]]
    assert len(dealt["test"][2]) == 2
    with pytest.raises(ValueError, match="data.clients is 6, but there are 5 groups"):
        data_to_text.whole_groups({"train": train}, clients=6, seed=0)


@pytest.mark.parametrize(
    ("name", "row", "missing"),
    [
        ("webnlg", {"category": "Food", "input": ["a | b | c"], "references": ["c is b"]}, "triples"),
        ("e2e", {"meaning_representation": "name[a]", "target": "a"}, "human_reference"),
    ],
)
def test_a_copy_with_other_columns_is_refused_by_name(name, row, missing, tmp_path):
    source = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=f"has no column '{missing}', only {', '.join(row)}"):
        getattr(data_to_text, name)(LETTERS, source=source, max_length=60, clients=1)


def test_meanings_are_trained_on_with_all_references_and_tested_once(tmp_path):
    rows = [
        {
            "meaning_representation": f"name[{i}], food[{'Thai, Lao' if i % 2 else 'Irish'}]",
            "human_reference": f"{i} {k}",
        }
        for k in range(3)
        for i in range(40)
    ]
    made = data_to_text.e2e(
        LETTERS, source=write(tmp_path / "e2e.jsonl", rows), max_length=60, clients=2, test=None, test_fraction=0.25
    )
    assert sorted(made.groups) == ["Irish", "Thai, Lao"] and made.aux is None
    for client, group in enumerate(made.groups):
        train, test = texts(made.train, client), texts(made.test, client)
        assert len(train) == 45 and len(test) == 5
        assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in test}
        assert all(prompt == f"name : {answer.split()[0]} | food : {group}\n" for prompt, answer in train + test)
    assert all(len(own) == 3 for own in made.references)


@pytest.mark.parametrize("kind", [int, str])
def test_clients_of_aya_keep_their_numbers(kind, tmp_path):
    rows = [
        {
            "client": kind(client),
            "language": "xx" if client == 3 else ["en", "te"][client % 2],
            "instruction": "i",
            "response": "r",
        }
        for client in (2, 3, 21, 34)
        for _ in range(10)
    ]
    made = instruction_sets.fed_aya(LETTERS, source=write(tmp_path / "aya.jsonl", rows), max_length=300)
    assert made.names == ("2", "21", "34") and made.groups == ("en", "te", "en")
    assert made.pools["seen"].tolist() == [0] and made.pools["unseen"].tolist() == [1, 2]
    assert [len(texts(store, 0)) for store in (made.train, made.test)] == [8, 2]
    assert texts(made.train, 0)[0][0].endswith("### Instruction:\ni \n\n### Response:")


def test_every_factory_has_its_name():
    assert set(federations.CAUSAL) == {
        "instructions", "dolly", "fed_aya", "fed_flan", "natural_instructions", "snli", "webnlg", "e2e"
    }  # fmt: skip
    assert set(federations.CAUSAL) < set(federations.ALL)


def test_benchmark_files(benchmarks):
    """Sizes of the real files, with 64 training rows a client."""
    small = {"max_length": 3000, "train_limit": 64}
    snli = instruction_sets.snli(LETTERS, source=str(benchmarks / "snli"), split="validation+test", alpha=0.1, **small)
    assert len(snli.names) == 10 and federated.sizes(snli.test).sum() == 350 and snli.test.branches.max() == 3
    natural = instruction_sets.natural_instructions(
        LETTERS, source=str(benchmarks / "natural_instructions"), **small | {"max_length": 9000}
    )
    assert natural.groups[0] == "task002_quoref_answer_generation" and natural.names[9].startswith("task591")
    assert federated.sizes(natural.train).tolist() == [64] * 10 and federated.sizes(natural.test).max() == 50
    flan = instruction_sets.fed_flan(LETTERS, source=str(benchmarks / "fed_flan" / "set2"), **small)
    assert flan.groups[:2] == ("arc_easy", "bool_q") and federated.sizes(flan.test).tolist() == [50] * 8
    webnlg = data_to_text.webnlg(LETTERS, source=str(benchmarks / "webnlg"), test="validation", **small)
    # Ten categories: the two smallest join the next ones.
    assert webnlg.groups[:3] == ("Food", "Airport", "Building") and federated.sizes(webnlg.test).sum() == 870
    e2e = data_to_text.e2e(
        LETTERS, source=str(benchmarks / "e2e_nlg" / "validation.parquet"), clients=3, test=None, **small
    )
    assert sorted(e2e.groups) == ["Chinese", "English", "none"]
    assert len(e2e.references) == federated.sizes(e2e.test).sum() > 50

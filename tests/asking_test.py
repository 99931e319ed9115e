"""Clients of finished runs, asked from Python and from the command line, read texts as they did in training."""

import json
import sys

import numpy as np
import optax
import pytest
import tiny

from fedjax_peft import experiment, ground, main, metrics, one_client
from fedjax_peft.data import federated, tokenizers, trimmed
from fedjax_peft.data.federated import Encoded

WORDS = ("zebra", "quick", "apple", "house")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of a classifier whose vocabulary is trimmed, with four people as clients."""
    folder = tmp_path_factory.mktemp("people")
    rows = [{"text": f"{WORDS[i % 4]} {i // 4}", "label": i // 4 % 2, "who": f"p{i % 4}"} for i in range(40)]
    rows[-1]["text"] = "h" * 60
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = experiment.default_config()
    config.data = {
        "name": "table",
        "source": str(folder / "rows.jsonl"),
        "text": "text",
        "cache": str(folder / "cache"),
    }
    config.data.partition = {"name": "natural_id", "column": "who", "seed": 0}
    config.model.source, config.model.pool = str(tiny.write_model(folder / "model")), "mean"
    config.max_length, config.widths, config.rounds, config.cohort = 16, 1, 1, 4
    config.adapter.rank = 2
    config.train.steps = config.personalize.steps = 2
    config.evaluate.every, config.run.chunk = 1000, 4
    experiment.run(config, str(folder / "run"))
    return folder / "run"


def test_a_trimmed_classifier_reads_texts_as_its_evaluation_did(workdir):
    rows = {row["name"]: row for row in metrics.read_rows(workdir / "clients.parquet")}
    assert list(rows) == ["p0", "p1", "p2", "p3"] and rows["p2"]["client"] == 2
    whole = tokenizers.load(str(workdir.parent / "model"))
    asked, tests = experiment.personalized(workdir, 2), experiment.rebuilt(workdir).ground.federation.test
    assert asked.tokenizer.size < whole.size
    held = [tests.tokens[slice(*tests.token_offsets[row : row + 2])].tolist() for row in federated.rows(tests, 2)]
    losses = {}
    for number in range(10):
        # What p2 says.
        text = f"apple {number}"
        tokens = asked.tokenizer.encode([text], max_length=16).tokens
        assert asked.tokenizer.decode(tokens) == whole.decode(whole.encode([text], max_length=16).tokens)
        inputs = {"tokens": tokens[None], "mask": tokens[None] >= 0}
        outputs = asked.model.apply(asked.base, asked.adapters, inputs)[0]
        losses[tuple(tokens.tolist())] = float(optax.softmax_cross_entropy_with_integer_labels(outputs, number % 2))
    assert rows["p2"]["examples"] == len(held) == 2 and len(losses) == 10
    assert np.mean([losses[tuple(tokens)] for tokens in held]) == pytest.approx(rows["p2"]["loss"], abs=1e-6)


def test_what_was_cut_is_told_and_in_the_manifest(workdir, caplog):
    sizes = metrics.read_json(workdir / "manifest.json")["sizes"]
    assert sizes["train_cut"] + sizes["test_cut"] == 1 and sizes["clients_without_tests"] == 0
    store = federated.build(Encoded(np.ones(8, np.int32), None, np.arange(9)), np.zeros(8), [np.arange(8)])
    nobody = federated.build(federated.encoded(store), np.zeros(8), [np.arange(8), np.arange(0)], allow_empty=True)
    federation = federated.Federation(store, nobody, ("a", "b"), ("a", "b"), {}, ())
    ground._tell(federation._replace(test=store, lost={"train_cut": 0, "test_left_out": 0}), 16)
    assert not caplog.messages
    ground._tell(federation._replace(lost={"train_cut": 1, "test_cut": 8, "test_left_out": 3}), 16)
    assert caplog.messages == [
        "texts longer than max_length = 16 tokens were cut: 12.5 % of train, 100 % of test",
        "rows whose prompts leave no room for an answer in max_length = 16 tokens were left out: 3 of test",
        "1 of 2 clients have no test examples",
    ]


def test_a_classifier_writes_nothing(workdir, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["fedjax-peft", "generate", f"--workdir={workdir}", "--client=p2", "--prompt=hello"]
    )
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2 and "classifies texts, it writes none" in capsys.readouterr().err


def _letters(texts, pairs=None, *, max_length, special=True):
    del pairs, special
    tokens = [[ord(letter) for letter in text][:max_length] for text in texts]
    offsets = np.append(0, np.cumsum([len(text) for text in tokens]))
    flat = np.array([letter for text in tokens for letter in text], np.int32)
    return Encoded(flat, np.arange(len(flat), dtype=np.int8), offsets)


def test_tokens_that_were_trimmed_are_unknown_or_left_out():
    letters = tokenizers.Tokenizer(
        _letters, lambda ids: "".join(map(chr, ids)), pad=ord("_"), eos=None, special=(ord("_"),), size=128, sha256=""
    )
    kept = np.array(sorted(map(ord, "_abc?")), np.int32)
    own = trimmed.tokenizer(letters, kept)
    assert (own.size, own.pad, own.eos, own.unk, own.special) == (5, 1, None, None, (1,))
    encoded = own.encode(["axb", "zz", "c"], max_length=9)
    assert own.decode(encoded.tokens) == "abc" and encoded.offsets.tolist() == [0, 2, 2, 3]
    assert encoded.types.tolist() == [0, 2, 5]
    own = trimmed.tokenizer(letters._replace(unk=ord("?")), kept)
    encoded = own.encode(["axb", "zz", "c"], max_length=9)
    assert own.decode(encoded.tokens) == "a?b??c" and encoded.offsets.tolist() == [0, 3, 5, 6]


def test_clients_by_number_and_by_name():
    names = ("21", "ann", "0")
    assert one_client.number(names, 1) == one_client.number(names, "1") == one_client.number(names, "ann") == 1
    assert one_client.number(names, "name:0") == 2 and one_client.number(names, "name:21") == 0
    assert one_client.number(names, 0) == 0  # in Python a number is a number
    with pytest.raises(ValueError, match="--client=0 is the number of one client and the name of another: say name:0"):
        one_client.number(names, "0")
    for unknown in ("bob", "name:1"):
        with pytest.raises(ValueError, match="expected 0 to 2 or a name as in clients.parquet"):
            one_client.number(names, unknown)

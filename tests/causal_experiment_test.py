"""Whole experiments with a tiny causal model: written answers, mixtures of experts, and a client that answers."""

import json
import sys
import types

import decoder
import encoder
import jax
import numpy as np
import pytest
import tokenizers

from fedjax_peft import evaluate, experiment, ground, main, metrics, report, text_metrics
from fedjax_peft.models import llama

PIECES = ["<pad>", "</s>", *map(chr, range(32, 80))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a Llama and a token a letter, and rows of four clients whose answers repeat a letter."""
    folder = tmp_path_factory.mktemp("causal")
    settings = decoder.config() | {"vocab_size": len(PIECES), "eos_token_id": 1, "pad_token_id": 0}
    settings |= {"max_position_embeddings": 64}
    model = llama.llama(settings, head="lm")
    base = encoder.weights(jax.eval_shape(model.init, jax.random.key(0)))
    encoder.save(folder / "model", settings, decoder.published(base))
    spelling = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({p: i for i, p in enumerate(PIECES)}, unk_token="<pad>")
    )
    spelling.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    spelling.decoder = tokenizers.decoders.Fuse()
    spelling.save(str(folder / "model" / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(special))
    rows = [
        {"instruction": f"SAY {'ABCD'[i % 4]} {i % 9}", "output": "ABCD"[i % 4] * 2, "who": i % 4} for i in range(96)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configured(source, **algorithm):
    config = experiment.default_config()
    config.data = {
        "name": "instructions",
        "source": str(source / "rows.jsonl"),
        "template": "plain",
        "partition": {"name": "natural_id", "column": "who"},
        "aux": 0.2,
    }
    config.model.source = str(source / "model")
    config.max_length, config.widths, config.rounds, config.cohort = 24, 1, 2, 4
    config.adapter.targets, config.adapter.rank = "q_proj,v_proj", 2
    config.algorithm = {"name": "fedit"} | algorithm
    config.optimizer.learning_rate = 0.03
    config.train.steps, config.train.batch = 4, 4
    config.personalize.steps, config.personalize.batch = 8, 4
    config.evaluate.every = 2
    config.evaluate.generate = 3
    config.run.chunk, config.run.scan = 4, True
    return config


MIXTURE = {"name": "fedamole", "experts": 4, "expert_choices": 2, "max_experts": 2, "embed_on": "aux"}


METHODS = [{}, MIXTURE, {"name": "fdlora"}, {"name": "fedprompt", "prompt": "SAY IT"}, {"name": "fedapen"}]


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda settings: settings.get("name", "fedit"))
def test_answers_are_written_and_judged(source, tmp_path, monkeypatch, capsys, algorithm):
    summary = experiment.run(configured(source, **algorithm), str(tmp_path))
    found = summary["pools"]["seen"]["personal"]
    assert list(found)[2:] == ["loss", "rougeL", "rougeL_ref", "exact", "token_accuracy"]
    before = summary["pools"]["seen"]["base"]
    # A prompt in front of a text is no base to begin with.
    assert found["loss"]["mean"] < before["loss"]["mean"] or algorithm.get("name") == "fedprompt"
    assert all(0 <= found[name]["mean"] <= 1 for name in ("rougeL", "exact", "token_accuracy"))
    rows = metrics.read_rows(tmp_path / "clients.parquet")
    assert len({row["name"] for row in rows}) == 4
    command = ["fedjax-peft", "generate", f"--workdir={tmp_path}", "--client=1", "--prompt=SAY B 3", "--tokens=4"]
    monkeypatch.setattr(sys, "argv", command)
    main.main()
    answer = capsys.readouterr().out
    assert answer.endswith("\n") and len(answer) <= 5
    if algorithm == MIXTURE:
        check_assignment(tmp_path)


def check_assignment(folder):
    """What clients hold is recorded and drawn."""
    rows = metrics.read_rows(folder / "strategies.parquet")
    sites = {row["site"] for row in rows}
    assert len(rows) == 4 * len(sites) and {row["point"] for row in rows} == {"personal"}
    for site in sites:
        held = [expert for row in rows if row["site"] == site for expert in row["experts"]]
        # Each of four experts has two clients, each of four clients two experts.
        assert sorted(held) == [0, 0, 1, 1, 2, 2, 3, 3]
    report.show(folder)
    assert (folder / "plots" / "experts.png").stat().st_size > 10_000


def test_greedy_answers_agree_with_exact_matches(source, tmp_path):
    """An answer that greedy generation gives word for word is one all of whose tokens are chosen."""
    config = configured(source)
    config.evaluate.measures = ("exact_match",)
    config.personalize.steps = 40
    summary = experiment.run(config, str(tmp_path))
    for row in metrics.read_rows(tmp_path / "clients.parquet"):
        np.testing.assert_allclose(row["exact_match"], row["exact"], atol=1e-6)
    assert summary["pools"]["seen"]["personal"]["exact"]["mean"] > 0.2


@pytest.fixture
def judged(monkeypatch):
    """Texts and references of every call of `scored`."""
    calls = []

    def kept(names, texts, references):
        calls.append((texts, references))
        return text_metrics.scored(names, texts, references)

    monkeypatch.setattr(ground, "text_metrics", types.SimpleNamespace(METRICS=text_metrics.METRICS, scored=kept))
    return calls


def test_scores_of_a_corpus_are_those_of_each_client_and_of_the_pool(source, tmp_path, judged):
    config = configured(source)
    config.rounds = 0
    names = ("chrf_corpus", "ter", "bleu", "rougeL", "nist", "cider")
    config.evaluate.measures = names
    config.evaluate.decoding.update({"method": "beam", "beams": 3, "length_penalty": 0.5, "no_repeat": 3})
    summary = experiment.run(config, str(tmp_path))
    found = summary["pools"]["seen"]["personal"]
    assert list(found)[2:] == ["loss", *names, "exact", "token_accuracy"] and evaluate.headline(found) == names[0]
    # The last calls are those of the pool after personalization, then of its four groups.
    whole = [part for part in judged if len(part[0]) == found["examples"]][-1]
    expected = text_metrics.scored(names, *whole)
    rows = metrics.read_rows(tmp_path / "pooled.parquet")
    (pool,) = (row for row in rows if row["point"] == "personal" and row["group"] is None)
    for name in names:
        assert pool[name] == pytest.approx(expected[name]) == found[name]["pooled"]
    clients = [row for row in metrics.read_rows(tmp_path / "clients.parquet") if row["point"] == "personal"]
    assert abs(np.average([row["chrf_corpus"] for row in clients], weights=[row["examples"] for row in clients])
               - pool["chrf_corpus"]) > 1e-6  # fmt: skip
    manifest = metrics.read_json(tmp_path / "manifest.json")
    assert manifest["experiment"]["evaluate"]["decoding"]["beams"] == 3


def test_sampled_answers_repeat_with_the_seed_alone(source, tmp_path, judged):
    def run(name, seed):
        config = configured(source)
        # Nothing is trained, so seeds differ in what is drawn alone.
        config.seed, config.rounds, config.personalize.steps = seed, 0, 0
        config.evaluate.decoding.update({"method": "sampled", "temperature": 2.0})
        judged.clear()
        experiment.run(config, str(tmp_path / name))
        return [texts for texts, _ in judged]

    first = run("first", 0)
    assert run("again", 0) == first != run("other", 1)


MISTAKES = [
    ({"measures": ("bleu", "blue")}, "evaluate.measures has 'blue', expected some of exact_match"),
    ({"decoding.method": "best"}, "method is 'best', expected one of greedy, sampled, beam"),
    ({"decoding.beams": 4}, "evaluate.decoding.beams is 4, but evaluate.decoding.method is 'greedy', expected 'beam'"),
    ({"decoding.method": "sampled", "decoding.top_p": 0.0}, "top_p is 0.0, expected above 0"),
    ({"decoding": {"method": "greedy", "beam": 2}}, "evaluate.decoding.beam is not a setting of make_generate"),
]


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES)
def test_mistakes_in_how_answers_are_judged_get_a_sentence(source, tmp_path, changes, sentence):
    config = configured(source)
    with config.unlocked():
        for key, value in changes.items():
            config.update_from_flattened_dict({f"evaluate.{key}": value})
    with pytest.raises(ValueError, match=sentence):
        experiment.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_noticed_before_the_rounds(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    config = configured(source)
    config.evaluate.measures = ("bleu",)
    with pytest.raises(ValueError, match="needs the package 'sacrebleu'"):
        experiment.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

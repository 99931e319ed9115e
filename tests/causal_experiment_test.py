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

from fedjax_peft import asking, experiment, ground, main, metrics, summaries, text_metrics
from fedjax_peft.data import federated, instructions
from fedjax_peft.models import llama
from fedjax_peft.reports import report

PIECES = ["<pad>", "</s>", *map(chr, range(32, 80))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a Llama and a token a letter, and rows of four clients whose answers repeat a letter."""
    folder = tmp_path_factory.mktemp("causal")
    settings = decoder.config() | {"vocab_size": len(PIECES), "eos_token_id": 1, "pad_token_id": 0}
    settings |= {"max_position_embeddings": 256}
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


MIXTURE = {"name": "fedamole", "experts": 6, "max_experts": 4}  # two to four a client, of which a token takes two


METHODS = [
    MIXTURE,
    {"name": "fdlora"},
    {"name": "fedprompt", "prompt": "SAY IT"},
    {"name": "fedapen"},
    {"name": "fedp2eft"},
    {"name": "pf2lora"},
]


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda settings: settings["name"])
def test_answers_are_written_and_judged(source, tmp_path, monkeypatch, capsys, algorithm):
    summary = experiment.run(configured(source, **algorithm), str(tmp_path))
    found = summary["pools"]["seen"]["personal"]
    assert list(found)[2:] == ["loss", "rougeL", "rougeL_ref", "exact", "token_accuracy"]
    before = summary["pools"]["seen"]["base"]
    # A prompt in front of a text is no base to begin with.
    assert found["loss"]["mean"] < before["loss"]["mean"] or algorithm["name"] == "fedprompt"
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
        # Each of six experts has two clients, the rest of four times four slots are empty.
        assert sorted(held) == [-1] * 4 + [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    report.show(folder)
    assert (folder / "plots" / "experts.png").stat().st_size > 10_000


def test_greedy_answers_of_a_client_alone_agree_with_exact_matches(source, tmp_path):
    """An answer that greedy generation gives word for word is one all of whose tokens are chosen.

    The client holds every expert, and its tokens choose two of three.
    """
    config = configured(source, **MIXTURE | {"experts": 3, "expert_choices": 1})
    config.data.partition = {"name": "iid", "clients": 1, "seed": 0}
    config.cohort = config.run.chunk = 1
    config.evaluate.measures = ("exact_match",)
    config.personalize.steps = 40
    summary = experiment.run(config, str(tmp_path))
    for row in metrics.read_rows(tmp_path / "clients.parquet"):
        np.testing.assert_allclose(row["exact_match"], row["exact"], atol=1e-6)
    found = summary["pools"]["seen"]["personal"]
    assert found["clients"] == 1 and found["exact"]["mean"] > 0.2
    assert {tuple(row["experts"]) for row in metrics.read_rows(tmp_path / "strategies.parquet")} == {(0, 1, 2)}


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
    assert list(found)[2:] == ["loss", *names, "exact", "token_accuracy"] and summaries.headline(found) == names[0]
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


def prompts_of(federation, client):
    """Tokens of the prompts of a client's tests."""
    store = federated.prompts_alone(federation.test)
    return [store.tokens[slice(*store.token_offsets[row : row + 2])] for row in federated.rows(store, client)]


def test_a_client_answers_as_it_was_judged(source, tmp_path, judged, caplog):
    """By name or number, on one device whatever the run had, and even where no round was trained."""
    config = configured(source)
    config.rounds, config.data.template, config.evaluate.every = 0, "alpaca", 1000
    config.max_length, config.evaluate.generate = 200, 5
    config.data.test_limit = 3
    experiment.run(config, str(tmp_path))
    expected = [texts for texts, references in judged if {one for own in references for one in own} == {"BB"}][-1]
    manifest = metrics.read_json(tmp_path / "manifest.json")
    manifest["run"]["mesh"] = {"clients": 64, "model": 4}
    metrics.write_json(tmp_path / "manifest.json", manifest)
    run = experiment.rebuilt(tmp_path)
    assert run.ground.federation.names == ("0", "1", "2", "3")
    spelling = instructions.asking(ground.make_tokenizer(config.model.source), "alpaca")
    asked = {tuple(spelling.encode([f"SAY B {i}"], max_length=200).tokens): f"SAY B {i}" for i in range(9)}
    prompt = asked[tuple(prompts_of(run.ground.federation, 1)[0])]
    with caplog.at_level("INFO"):
        answer = asking.answer(tmp_path, 1, prompt, new_tokens=5)
    assert answer.strip() == expected[0]
    assert "asked client 1, 1, in the template alpaca" in caplog.text


def test_unfinished_runs_are_not_asked(source, tmp_path, monkeypatch, capsys):
    config = configured(source)
    config.rounds, config.evaluate.every, config.evaluate.generate = 0, 1000, 0
    config.base = {"name": "fedit", "rounds": 1, "cohort": 4, "train": {"steps": 1, "batch": 4}}
    config.base.adapter = {"targets": "q_proj,v_proj", "rank": 2}
    experiment.run(config, str(tmp_path))

    def asked(*more):
        command = ["fedjax-peft", "generate", f"--workdir={tmp_path}", "--prompt=SAY B 3", "--tokens=2", *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "--client is 4, expected 0 to 3" in asked("--client=4")
    assert "--client is 'ann', expected 0 to 3 or a name as in clients.parquet" in asked("--client=ann")
    assert "data.template is 'letter', expected one of plain, alpaca" in asked("--client=1", "--template=letter")
    before = (tmp_path / "base" / "manifest.json").read_bytes()
    for folder in (tmp_path / "base", tmp_path):
        (folder / "summary.json").unlink()
        assert f"workdir {folder} has no finished run: summary.json is missing" in asked("--client=1")
        metrics.write_json(folder / "summary.json", {})
    assert (tmp_path / "base" / "manifest.json").read_bytes() == before
    rows = (source / "rows.jsonl").read_text()
    try:
        (source / "rows.jsonl").write_text(rows.replace("SAY A 0", "SAY A 7"))
        assert "was made with other files: the SHA-256 of train has changed" in asked("--client=1")
    finally:
        (source / "rows.jsonl").write_text(rows)


MISTAKES = [
    ({"measures": ("bleu", "blue")}, "evaluate.measures has 'blue', expected some of exact_match"),
    ({"decoding.method": "best"}, "method is 'best', expected one of greedy, sampled, beam"),
    ({"decoding.beams": 4}, "evaluate.decoding.beams is 4, but evaluate.decoding.method is 'greedy', expected 'beam'"),
    ({"decoding.method": "sampled", "decoding.top_p": 0.0}, "top_p is 0.0, expected above 0"),
    ({"decoding": {"method": "greedy", "beam": 2}}, "evaluate.decoding.beam is no key of a config; is beams meant"),
]


FEDDPA = {"name": "feddpa", "cohort": 4, "train": {"steps": 1}, "adapter": {"targets": "q_proj,v_proj", "rank": 2}}
MIXED = [
    ({"data": {"aux": 0.0}}, "reads examples held out of training, but data.name 'instructions' holds none out"),
    ({"evaluate": {"spectra": True}}, "evaluate.spectra is of LoRAs, expected False with algorithm fedamole"),
    ({"base": FEDDPA}, "fedamole cannot go on from a base of feddpa"),
]


@pytest.mark.parametrize(("changes", "sentence"), MIXED)
def test_what_mixtures_do_not_go_with_gets_a_sentence(source, tmp_path, changes, sentence):
    config = configured(source, **MIXTURE)
    with config.unlocked():
        config.update(changes)
    with pytest.raises(ValueError, match=sentence):
        experiment.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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

"""Exported adapters and models do in peft and transformers what they do here."""

import functools
import json
import sys
import types

import decoder
import encoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath

from fedjax_peft import adapters, experiment, export, main, metrics, mixture, one_client, published, ranks
from fedjax_peft.algorithms import fedprompt
from fedjax_peft.models import hf, tables

LABELS = 3
ARCHITECTURES = {"bert": ["BertForMaskedLM"], "gpt2": ["GPT2LMHeadModel"], "llama": ["LlamaForCausalLM"]}


def base_folder(tmp_path, kind):
    """A Hugging Face folder of a tiny random model without a task head."""
    family = decoder if kind in ("gpt2", *decoder.LLAMAS) else encoder
    settings = family.config(kind)
    settings |= {"architectures": ARCHITECTURES.get(kind), "pad_token_id": settings.get("pad_token_id", 0)}
    head = {"head": "lm"} if family is decoder else {"head": "features"}
    model = hf.FAMILIES[settings["model_type"]].build(settings, labels=0, **head)
    base = encoder.weights(jax.eval_shape(model.init, jax.random.key(0)))
    return str(encoder.save(tmp_path / "base", settings, family.published(base)))


def rebuilt(source, *, reads="classification", pool=None, kept=None, shared=True, **settings):
    """What `experiment.rebuilt` knows of a run, as far as it matters here, and adapters of one client."""
    config = experiment.default_config()
    config.model.source, config.model.pool = source, pool
    config.adapter.update({"rank": 4, "dropout": 0.1} | settings)
    labels = LABELS if reads == "classification" else 0
    key = jax.random.key(1)
    pretrained = hf.load(source, labels=labels, head=reads, pool=pool, vocabulary=kept, key=key)
    tasks = {"classification": "classification", "span": "span", "lm": "causal"}
    federation = types.SimpleNamespace(task=tasks[reads], classes=("x", "y", "z")[:labels])
    ground = types.SimpleNamespace(pretrained=pretrained, federation=federation, kept=kept)
    before = filled(adapters.init(key, pretrained.base, **{**config.adapter, "rank": 2}), 1) if shared else None
    base = adapters.merge(pretrained.base, before) if shared else pretrained.base
    own = filled(adapters.init(key, base, **config.adapter), 2)
    return types.SimpleNamespace(config=config, ground=ground, base=base, shared=before), own


def filled(tree, seed):
    """Random leaves; scales stay."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = path[-1].name == "scale"
        return leaf if scale else jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def uneven(tree):
    """Learnt scales: 0 at all ranks of one layer, at some of another, and no two alike in a third."""
    rng = np.random.default_rng(3)

    def scaled(node):
        if not isinstance(node, adapters.LoRA) or node.scale.ndim == 1:
            return node
        scale = np.array(node.scale)
        scale[0], scale[1, 2:], scale[2] = 0, 0, rng.uniform(-1, 2, scale.shape[1])
        return node.replace(scale=jnp.asarray(scale))

    return adapters.nest({path: scaled(node) for path, node in adapters.nodes(tree).items()})


def ranks_kept(*trees):
    """{name of a module: ranks whose scale is not 0 in any of the adapters, if there are any}."""
    found = {}
    for tree in trees:
        for path, node in adapters.nodes(tree or {}).items():
            if isinstance(node, adapters.LoRA) and not published.is_head(".".join(path)):
                rows = np.atleast_2d(np.asarray(node.scale))
                for name, row in zip(adapters.names(path, len(rows)), rows, strict=True):
                    found[name] = found.get(name, 0) + np.count_nonzero(row)
    return {name: int(count) for name, count in found.items() if count}


def read(folder):
    return (
        json.loads((folder / "adapter_config.json").read_text()),
        safetensors.numpy.load_file(folder / "adapter_model.safetensors"),
    )


def test_uneven_ranks_are_patterns_by_full_names(tmp_path):
    run, own = rebuilt(base_folder(tmp_path, "bert"), shared=False)
    own = uneven(own)
    said = export.write(run, own, tmp_path / "out", merged=False)
    assert said.startswith(
        f'peft.AutoPeftModelForSequenceClassification.from_pretrained("{tmp_path}/out", num_labels=3'
    )
    config, tensors = read(tmp_path / "out")
    at = "bert.encoder.layer.{}.attention.self.{}".format
    assert config["base_model_name_or_path"] == run.config.model.source
    assert (config["peft_type"], config["task_type"], config["modules_to_save"]) == ("LORA", "SEQ_CLS", ["classifier"])
    # Layer 0 has no rank left, so endings would name too much.
    assert sorted(config["target_modules"]) == [at(i, part) for i in (1, 2) for part in ("query", "value")]
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in config["target_modules"]}
    alphas = {name: config["alpha_pattern"].get(name, config["lora_alpha"]) for name in config["target_modules"]}
    assert ranks == {at(i, part): 2 * i for i in (1, 2) for part in ("query", "value")}
    # alpha / r is 16 / 4 where scales are as they began, and 1 where they went into B.
    assert alphas == {at(1, part): 8 for part in ("query", "value")} | {at(2, part): 4 for part in ("query", "value")}
    node = own["encoder"]["layer"]["attention"]["self"]["query"]["delta"]
    for layer, scale in ((1, 4.0), (2, 1.0)):
        a, b = (tensors[f"base_model.model.{at(layer, 'query')}.lora_{name}.weight"] for name in "AB")
        assert a.shape == (2 * layer, encoder.WIDTH) and b.shape == (encoder.WIDTH, 2 * layer)
        expected = node.a[layer] @ (node.scale[layer][:, None] * node.b[layer])
        np.testing.assert_allclose(scale * (b @ a).T, expected, rtol=1e-5, atol=1e-6)
    assert tensors["base_model.model.classifier.weight"].shape == (3, encoder.WIDTH)


def test_even_ranks_need_no_patterns(tmp_path):
    source = base_folder(tmp_path, "llama")
    for name, settings, expected in (
        ("plain", {}, (16, False)),
        ("stabilized", {"rank_stabilized": True, "alpha": 6.0}, (6, True)),
    ):
        run, own = rebuilt(source, reads="lm", shared=False, targets="q_proj,v_proj", **settings)
        export.write(run, own, tmp_path / name, merged=False)
        config, tensors = read(tmp_path / name)
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, *expected)
        assert config["target_modules"] == ["q_proj", "v_proj"] and config["modules_to_save"] is None
        assert not config.get("rank_pattern") and not config.get("alpha_pattern")
        assert len(tensors) == 2 * 2 * decoder.LAYERS and all(".lora_" in name for name in tensors)


FAMILIES = [(kind, "features" if kind in ("bert", "roberta", "xlm-roberta") else "lm") for kind in
            ("bert", "roberta", "xlm-roberta", "llama", "tied", "qwen2", "gpt2")]  # fmt: skip


@pytest.mark.parametrize(("kind", "head"), FAMILIES)
def test_published_names_are_those_that_weights_are_read_from(tmp_path, kind, head):
    loaded = hf.load(base_folder(tmp_path, kind), labels=0, head=head, key=jax.random.key(0))
    target = published.target(loaded.base, loaded.config["model_type"])
    found = published.tensors(target, loaded.base)
    table = hf.FAMILIES[loaded.config["model_type"]].table
    lazy = {name: tables.Tensor(value.shape, lambda rows, value=value: value) for name, value in found.items()}
    plan = tables.plan(table, loaded.base, lazy, None)
    assert plan.fresh == () and plan.unused == ()
    again = tables.fill(table, loaded.base, lazy, plan, None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.base):
        np.testing.assert_array_equal(again["/".join(key.key for key in path)], leaf)


# What the forms cannot hold


def refused(run, own, sentence, merged=False):
    shapes = jax.eval_shape(lambda: own)
    with pytest.raises(ValueError, match=sentence) as error:
        export.check(run, merged, shapes)
    assert "\n" not in str(error.value)


def test_adapters_that_are_no_lora_are_refused_before_they_are_computed(tmp_path):
    run, own = rebuilt(base_folder(tmp_path, "bert"), shared=False)
    export.check(run, False, jax.eval_shape(lambda: own))
    full = adapters.init(jax.random.key(0), run.base, kind="full")
    refused(run, full, "all of .* is trained, which is no LoRA: --merged writes the whole model")
    export.check(run, True, jax.eval_shape(lambda: full))
    run.shared = full
    refused(run, own, "--merged writes the whole model")
    run.shared = None
    prompt = fedprompt.Prompt(jnp.arange(2), jnp.zeros((2, encoder.WIDTH)))
    words = {"embeddings": {"word_embeddings": {"delta": prompt}}}
    for merged in (False, True):
        refused(run, own | words, "virtual tokens make texts longer", merged)


def test_experts_and_servers_without_adapters_are_refused(tmp_path, monkeypatch):
    run, own = rebuilt(base_folder(tmp_path, "bert"), shared=False)
    path = ("encoder", "layer", "attention", "self", "query")
    lora = adapters.nodes(own)[path]
    bank = mixture.bank(lora, jnp.ones((5, *lora.a.shape)), 4, top_k=2, linear=False)
    for merged in (False, True):
        refused(run, adapters.nest({path: bank}), "a mixture of experts depends on its input", merged)
    manifest_of(tmp_path / "run")
    monkeypatch.setattr(experiment, "rebuilt", lambda workdir: run)
    # B and the head are as they began, A is not.
    begun = jax.tree_util.tree_map_with_path(lambda at, leaf: leaf * (at[-1].name in ("a", "scale")), own)
    alone = "the server of fedit has no adapters that answer by themselves$"
    for server, shared, sentence in (
        ((), None, alone),
        ([bank], own, alone),
        (begun, begun, "fedit add nothing: what"),
    ):
        monkeypatch.setattr(one_client, "shared", lambda *_, found=(server, shared): found)
        with pytest.raises(ValueError, match=sentence):
            export.export(tmp_path / "run", "global", tmp_path / "out")
    monkeypatch.setattr(one_client, "shared", lambda *_: (own, own))
    export.export(tmp_path / "run", "global", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_nothing_kept_is_nothing_to_write(tmp_path):
    run, own = rebuilt(base_folder(tmp_path, "bert"), shared=False)
    layout = ranks.layout(own)
    own = ranks.scaled(layout, own, jnp.zeros((layout.sites, layout.rank)))
    with pytest.raises(ValueError, match="no rank is kept at any site"):
        export.write(run, own, tmp_path / "out", merged=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> what `fedjax-peft export` says; one line on stderr and exit code 2 where it refuses."""

    def call(*arguments, refused=False):
        monkeypatch.setattr(sys, "argv", ["fedjax-peft", "export", *map(str, arguments)])
        if not refused:
            main.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            main.main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        return said

    return call


def manifest_of(folder, **model):
    config = experiment.default_config()
    config.model.update(model)
    folder.mkdir()
    run = config.run.to_dict()
    settings = {name: value for name, value in config.to_dict().items() if name != "run"}
    (folder / "manifest.json").write_text(json.dumps({"experiment": settings, "run": run}))


def test_mistakes_are_answered_before_anything_is_loaded(command, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    manifest_of(tmp_path / "run", source=str(tmp_path / "model.gguf"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run, out = f"--workdir={tmp_path}/run", f"--output={tmp_path}/out"
    assert "--client is missing" in command(run, out, refused=True)
    assert "has no run" in command(f"--workdir={tmp_path}/no", "--client=0", out, refused=True)
    assert "a folder that is new or empty" in command(run, "--client=0", f"--output={tmp_path}/full", refused=True)
    assert "which peft cannot load: --merged writes" in command(run, "--client=0", out, refused=True)
    assert "points are those of clients" in command(run, "--client=global", "--point=x", "--merged", out, refused=True)


# A whole run


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """The directory of a run in two stages: FedIT, then FedP2EFT at two budgets, and a uniform LoRA."""
    folder = tmp_path_factory.mktemp("staged")
    config = experiment.default_config()
    config.model.source = str(tiny.write_model(folder / "model"))
    config.max_length, config.widths, config.rounds, config.cohort = 16, 1, 1, 4
    config.adapter.rank, config.adapter.targets, config.adapter.head = 4, "query,value,classifier", "lora"
    config.algorithm = {"name": "fedp2eft"}
    config.optimizer.learning_rate = 0.03
    config.train.steps, config.train.batch = 1, 4
    config.personalize.steps, config.personalize.batch, config.personalize.budgets = 2, 4, (1, 2)
    config.points.lora = {"algorithm": {"name": "lora"}, "personalize": {"budgets": (1,)}}
    config.base = {"name": "fedit", "rounds": 1, "cohort": 4, "train": {"steps": 2, "batch": 4}}
    config.base.adapter = {"rank": 2}
    config.base.optimizer = {"learning_rate": 0.03}
    config.data.test_fraction = 0.05
    config.evaluate.every, config.run.chunk = 1, 4
    experiment.run(config, str(folder / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "rebuilt", functools.cache(experiment.rebuilt))  # for many commands but once
        yield folder / "run"


def test_clients_points_and_servers_of_a_run(staged, command, tmp_path):
    run = f"--workdir={staged}"
    for name, point, kept in (
        ("first", (), 1),
        ("second", ("--point=fedp2eft r2",), 2),
        ("lora", ("--point=lora r1",), 1),
    ):
        command(run, "--client=1", f"--output={tmp_path}/{name}", *point)
        config, tensors = read(tmp_path / name)
        downs = [value for tensor, value in tensors.items() if "lora_A" in tensor]
        # Of five sites the head is none here; stage 1 has two ranks at each of the four others.
        total = sum(len(value) for value in downs) - 2 * 4
        assert total == 4 if name == "lora" else max(1, 5 * kept - 4) <= total <= 5 * kept
        assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    for arguments, sentence in (
        (("--client=1", "--point=lora r7"), "--point is 'lora r7', expected one of: fedp2eft r1, fedp2eft r2, lora r1"),
        (("--client=99",), "--client is 99, expected 0 to"),
        (("--client=nobody",), "--client is 'nobody', expected 0 to"),
        (("--client=global",), "the server of fedp2eft has no adapters that answer by themselves; those of stage 1"),
    ):
        assert sentence in command(run, *arguments, f"--output={tmp_path}/no", refused=True)
        assert not (tmp_path / "no").exists()
    said = command(f"--workdir={staged}/base", "--client=global", f"--output={tmp_path}/global")
    assert "AutoPeftModelForSequenceClassification" in said
    config, tensors = read(tmp_path / "global")
    assert (config["r"], config["target_modules"]) == (2, ["query", "value"])


# Against peft and transformers


def inputs_for(run, family, seed=0):
    """Inputs with the base's own token ids, and torch's with those of the source."""
    torch = pytest.importorskip("torch")
    pad = run.ground.pretrained.config.get("pad_token_id") or 0
    given = encoder.inputs(pad=pad, seed=seed) if family is encoder else decoder.inputs(seed=seed)
    kept = run.ground.kept
    theirs = np.asarray(given["tokens"])
    if kept is not None:  # the first three are special
        theirs = np.where(given["mask"], kept[3 + theirs % (len(kept) - 3)], pad)
    ours = theirs if kept is None else np.searchsorted(kept, theirs)
    tensors = {"input_ids": theirs, "attention_mask": given["mask"]}
    tensors = {name: torch.tensor(np.asarray(value, int)) for name, value in tensors.items()}
    return given | {"tokens": jnp.asarray(ours, jnp.int32)}, tensors


# peft asks transformers by a name that is on its way out.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TRIMMED = np.array([0, 1, 2, *range(7, encoder.VOCABULARY, 3)])
CASES = {
    "bert": {},
    "bert, all linear, trimmed": {"targets": "all-linear", "kept": TRIMMED},
    "bert, its head a LoRA": {"targets": "all-linear", "head": "lora"},
    "bert, one stage": {"shared": False},
    "bert, mean over tokens": {"pool": "mean", "kept": TRIMMED},
    "bert, spans": {"reads": "span"},
    "xlm-roberta": {"targets": "query,dense", "kept": TRIMMED},
    "llama": {"reads": "lm", "targets": "q_proj,v_proj,down_proj"},
    "llama, classes": {"targets": "all-linear"},
    "tied": {"reads": "lm", "targets": "all-linear", "shared": False},
    "gpt2": {"reads": "lm", "targets": "c_attn,c_proj"},
}


@pytest.mark.parity
@OLD_NAME
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_peft_and_transformers(tmp_path, case):
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    kind = case.split(",")[0]
    family = decoder if kind in ("gpt2", *decoder.LLAMAS) else encoder
    run, own = rebuilt(base_folder(tmp_path, kind), **CASES[case])
    own = uneven(own)
    ours, theirs = inputs_for(run, family)
    expected = run.ground.pretrained.model.apply(run.base, own, ours)
    plain = run.ground.pretrained.model.apply(run.ground.pretrained.base, {}, ours)
    assert np.abs(np.asarray(expected - plain)).max() > 0.1
    modules = {"peft": peft, "transformers": transformers}
    for merged in (False, True):
        said = export.write(run, own, tmp_path / str(merged), merged=merged)
        model = eval(said.splitlines()[0], modules).eval()
        if not merged:
            layers = [part for part in model.modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
            kept = ranks_kept(run.shared, own)
            assert len(layers) == len(kept) and sum(one.r["default"] for one in layers) == sum(kept.values())
        with torch.no_grad():
            found = outputs(model, theirs, tmp_path / str(merged))
        real = np.asarray(ours["mask"]) if expected.ndim == 3 else slice(None)
        assert np.abs(found - np.asarray(expected))[real].max() < 1e-4
    if kind in ARCHITECTURES and not CASES[case].get("pool"):
        assert model.config.architectures == [type(model).__name__]


def outputs(model, inputs, folder):
    said = model(**inputs)
    if hasattr(said, "start_logits"):
        return np.stack([said.start_logits.numpy(), said.end_logits.numpy()], -1)
    if hasattr(said, "logits"):
        return said.logits.numpy()
    head = safetensors.numpy.load_file(folder / "classifier.safetensors")
    mask = inputs["attention_mask"][..., None].numpy()
    mean = (said.last_hidden_state.numpy() * mask).sum(1) / mask.sum(1)
    return mean @ head["classifier.weight"].T + head["classifier.bias"]


@pytest.mark.parity
@OLD_NAME
@pytest.mark.parametrize("form", [(), ("--merged",)])
def test_an_exported_client_has_the_loss_and_accuracy_of_its_run(staged, command, tmp_path, form):
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    said = command(f"--workdir={staged}", "--client=1", "--point=fedp2eft r2", f"--output={tmp_path}/out", *form)
    model = eval(said.splitlines()[0], {"peft": peft, "transformers": transformers}).eval()
    run = experiment.rebuilt(epath.Path(staged))
    assert model.config.vocab_size > len(run.ground.kept) and model.config.num_labels == 19
    sums = np.zeros(3)
    for pack in run.stage.clients.tests(np.array([1], np.int32)):
        flat = lambda array: torch.tensor(np.asarray(array).reshape(-1, *array.shape[2:]).astype(int))  # noqa: E731
        tokens = flat(run.ground.kept[pack.inputs["tokens"]])
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=flat(pack.inputs["mask"])).logits
        labels, real = flat(pack.labels), flat(pack.weights) > 0
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        sums += [float(part[real].sum()) for part in (losses, logits.argmax(-1) == labels, real)]
    (row,) = (
        row
        for row in metrics.read_rows(staged / "clients.parquet")
        if (row["client"], row["point"]) == (1, "fedp2eft r2")
    )
    assert sums[2] == row["examples"]
    np.testing.assert_allclose(sums[:2] / sums[2], [row["loss"], row["accuracy"]], atol=1e-4)

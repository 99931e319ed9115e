"""GPT-2: structure, invariances, the cache, adapters; and equality with transformers."""

import functools

import decoder
import encoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fedjax_peft import adapters
from fedjax_peft.models import causal, gpt2, hf

KEY = jax.random.key(0)
CONFIG = decoder.config("gpt2")


@functools.cache
def build(**keywords):
    model = gpt2.gpt2(CONFIG | {"tie_word_embeddings": keywords.pop("tied", True)}, **keywords)
    base = encoder.weights(jax.eval_shape(model.init, KEY))
    return model._replace(apply=jax.jit(model.apply), decode=model.decode and jax.jit(model.decode)), base


def trained(base, **keywords):
    """Adapters that do something."""
    nodes = adapters.init(KEY, base, **keywords)
    return jax.tree.map(lambda leaf: leaf + 0.05 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), nodes)


def real(x, inputs):
    """[tokens, ..] of all rows, padding left out."""
    return np.asarray(x)[np.asarray(inputs["mask"])]


def test_sites_have_the_names_of_hugging_face():
    _, base = build()
    sites = {name: site for site in adapters.sites(base) for name in site.names}
    linears = {f"transformer.h.{i}.{name}" for i in range(3) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")}
    linears |= {f"transformer.h.{i}.mlp.c_proj" for i in range(3)}
    assert {name for name, site in sites.items() if site.is_dense} == linears
    assert {"transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.h.2.ln_1"} <= set(sites)
    assert sites["transformer.h.1.attn.c_attn"].params["kernel"].shape == (3, decoder.WIDTH, 3 * decoder.WIDTH)


def test_adapters_beside_the_base_do_what_merged_ones_do():
    model, base = build()
    nodes = trained(base, kind="full")
    beside = model.apply(base, nodes, decoder.inputs())
    merged = model.apply(adapters.merge(base, nodes), {}, decoder.inputs())
    np.testing.assert_allclose(beside, merged, atol=2e-4)
    assert np.abs(beside - model.apply(base, {}, decoder.inputs())).max() > 0.1


def test_a_branch_of_a_text_is_that_text_alone():
    model, base = build()
    nodes = trained(base, rank=4, targets="all-linear")
    decoder.check_forks(functools.partial(model.apply, base, nodes))


def test_padding_on_either_side_changes_nothing():
    model, base = build()
    right, left = decoder.inputs(lengths=(6, 5, 2)), decoder.inputs(lengths=(6, 5, 2), left=True)
    expected = real(model.apply(base, {}, right), right)
    np.testing.assert_allclose(real(model.apply(base, {}, left), left), expected, atol=1e-4)
    for inputs in (right, left):
        noisy = inputs | {"tokens": jnp.where(inputs["mask"], inputs["tokens"], 17)}
        one, two = (real(model.apply(base, {}, these), inputs) for these in (inputs, noisy))
        np.testing.assert_array_equal(one, two)


def test_bfloat16_with_empty_rows_is_finite_and_logits_are_float32():
    model, base = build(dtype=jnp.bfloat16, remat=True)
    inputs = decoder.inputs(lengths=(4, 0, 1), left=True)
    nodes = trained(base, targets="c_attn", rank=2)
    value, slopes = jax.jit(jax.value_and_grad(lambda nodes: jnp.sum(model.apply(base, nodes, inputs))))(nodes)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert model.apply(base, {}, inputs).dtype == jnp.float32


def test_dropout_needs_a_key_and_does_not_depend_on_the_width_of_a_batch():
    (model, base), (still, _) = build(dropout=0.5), build()
    wide = decoder.inputs(lengths=(6, 5, 2))
    narrow = jax.tree.map(lambda leaf: leaf[:, :6], wide)
    np.testing.assert_array_equal(model.apply(base, {}, wide), still.apply(base, {}, wide))
    one, two = (real(model.apply(base, {}, these, KEY), these) for these in (wide, narrow))
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert not np.allclose(one, real(still.apply(base, {}, wide), wide), atol=0.1)


@pytest.mark.parametrize(("left", "keywords"), [(True, {}), (False, {"scan": False, "tied": False})])
def test_decoding_step_by_step_is_the_whole_text_at_once(left, keywords):
    model, base = build(**keywords)
    inputs = decoder.inputs(left=left)
    nodes = trained(base, rank=2, targets="all-linear")
    cache, found = model.init_cache(3, 12), []
    for start, stop in [(0, 5)] + [(t, t + 1) for t in range(5, 10)]:
        part = {name: leaf[:, start:stop] for name, leaf in inputs.items()}
        logits, cache = model.decode(base, nodes, cache, part)
        found.append(logits)
    whole = model.apply(base, nodes, inputs)
    np.testing.assert_allclose(real(jnp.concatenate(found, 1), inputs), real(whole, inputs), atol=1e-4)


def test_taps_come_with_the_outputs():
    model, base = build()
    logits, taps = jax.jit(model.taps)(base, {}, decoder.inputs())
    np.testing.assert_allclose(logits, model.apply(base, {}, decoder.inputs()), atol=1e-5)
    sites = {site.path for site in adapters.sites(base) if site.is_dense}
    # The table of words is the head, too.
    assert {path[:-1] for path in traverse_util.flatten_dict(taps)} == sites | {("transformer", "wte")}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_published_weights_find_their_places_and_a_trimmed_vocabulary_is_exact(tmp_path, prefix):
    model, base = build()
    tensors = {prefix + name.removeprefix("transformer."): leaf for name, leaf in decoder.published(base).items()}
    extra = {f"{prefix}h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for i in range(3)}
    place = encoder.save(tmp_path, CONFIG, tensors | extra)
    inputs = decoder.inputs()
    kept = np.unique(inputs["tokens"])
    small = hf.load(place, labels=0, head="lm", key=KEY, vocabulary=kept)
    assert small.fresh == () and set(small.unused) == set(extra)
    jax.tree.map(np.testing.assert_array_equal, small.base["transformer"]["h"], base["transformer"]["h"])
    remapped = inputs | {"tokens": jnp.asarray(np.searchsorted(kept, inputs["tokens"]))}
    logits = small.model.apply(small.base, {}, remapped)
    np.testing.assert_allclose(logits, model.apply(base, {}, inputs)[..., kept], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "keywords", "sentence"),
    [
        ({"activation_function": "relu"}, {}, "activation_function is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, {}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, {}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, {}, "add_cross_attention is True"),
        ({"n_head": 5}, {}, "n_embd is 24"),
        ({"n_layer": 0}, {}, "n_layer is 0"),
        ({}, {"pool": "mean"}, "pool is 'mean'"),
    ],
)
def test_mistakes_get_a_sentence(change, keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        gpt2.gpt2(CONFIG | change, **keywords)


def test_texts_longer_than_the_model_get_a_sentence():
    model, base = build()
    with pytest.raises(ValueError, match="33 tokens, but the model has positions for 32"):
        model.apply(base, {}, decoder.inputs(width=33))


def torch_pair(tmp_path, model_class, **keywords):
    """The same random weights in transformers and here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.GPT2Config(**CONFIG, num_labels=keywords.get("labels", 2), pad_token_id=0)
    theirs = getattr(transformers, model_class)(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return torch, theirs, hf.load(tmp_path, key=KEY, **({"labels": 0, "head": "lm"} | keywords))


@pytest.mark.parity
@pytest.mark.parametrize("left", [False, True])
def test_logits_and_hidden_states_equal_transformers(tmp_path, left):
    torch, theirs, ours = torch_pair(tmp_path, "GPT2LMHeadModel")
    assert ours.fresh == ours.unused == ()
    inputs = decoder.inputs(lengths=(30, 20, 2), left=left, width=30)
    mask = np.asarray(inputs["mask"], int)
    given = {"input_ids": inputs["tokens"], "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    states = []
    for layer in theirs.transformer.h:
        layer.register_forward_hook(lambda *call: states.append(call[2][0] if type(call[2]) is tuple else call[2]))
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(np.asarray(leaf, int)) for name, leaf in given.items()}).logits
    assert expected.abs().max() > 1
    np.testing.assert_allclose(real(ours.model.apply(ours.base, {}, inputs), inputs), real(expected, inputs), atol=1e-4)
    settings = gpt2.settings(ours.config, 0.0, jnp.float32, True, False)
    network = causal.Network(settings, 0, "lm", gpt2.Decoder, "transformer")
    _, state = network.apply({"params": ours.base}, inputs, capture_intermediates=True, mutable=["intermediates"])
    found = state["intermediates"]["transformer"]["h"]["__call__"][0][0]
    for layer, (a, b) in enumerate(zip(found, states, strict=True)):
        np.testing.assert_allclose(real(a, inputs), real(b, inputs), atol=1e-4, err_msg=f"layer {layer}")


@pytest.mark.parity
def test_classifiers_equal_transformers(tmp_path):
    torch, theirs, ours = torch_pair(tmp_path, "GPT2ForSequenceClassification", labels=5, head="classification")
    assert ours.fresh == ()
    inputs = decoder.inputs()
    with torch.no_grad():
        tokens, mask = (torch.tensor(np.asarray(inputs[name], int)) for name in ("tokens", "mask"))
        expected = theirs(input_ids=tokens, attention_mask=mask).logits
    np.testing.assert_allclose(ours.model.apply(ours.base, {}, inputs), expected.numpy(), atol=1e-4)


@pytest.mark.parity
def test_every_linear_of_transformers_is_a_site(tmp_path):
    torch, theirs, ours = torch_pair(tmp_path, "GPT2LMHeadModel")
    conv = {name for name, part in theirs.named_modules() if type(part).__name__ == "Conv1D"}
    assert {name for site in adapters.sites(ours.base) if site.is_dense for name in site.names} == conv

"""Activation statistics against the same numbers from whole arrays."""

import functools

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_peft import adapters, ranks, taps
from fedjax_peft.algorithms import fedp2eft
from fedjax_peft.models import bert, gpt2, llama

CONFIG = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 24, "max_position_embeddings": 12}
MODEL = bert.bert(CONFIG, labels=3)
BASE = MODEL.init(jax.random.key(0))
LENGTHS = np.array([9, 3, 5, 1, 7, 2])


def texts(rows):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (6, 9))[rows]
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(np.arange(9) < LENGTHS[rows, None])}


def parts_of(splits, **settings):
    return [
        np.asarray(taps.moments(MODEL, BASE, texts(np.array(rows)), jnp.ones(len(rows)), **settings)) for rows in splits
    ]


def inputs_of(name):
    """The input of a Dense of layer 0, or behind it, as Flax hands it over."""
    seen = {}

    def watch(next_function, arguments, keywords, context):
        if context.module.name == name and context.method_name == "__call__" and name not in seen:
            seen[name] = np.asarray(arguments[0], np.float64)
        return next_function(*arguments, **keywords)

    from flax import linen as nn

    network = bert.Bert(bert.settings(CONFIG, 0.0, jnp.float32, False, False), 3, "pooler", "classification")
    with nn.intercept_methods(watch):
        network.apply({"params": BASE}, texts(np.arange(6)))
    return seen[name]


def test_a_linear_gives_two_numbers_in_the_order_of_layers():
    assert taps.size(MODEL) == 28  # 14 Linears: six in each of two layers, pooler, classifier
    assert parts_of([range(6)])[0].shape == (14, 3)


MBERT = {"model_type": "bert", "vocab_size": 119_547, "hidden_size": 768, "num_hidden_layers": 12}
MBERT |= {"num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512}
MOBILE = {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048, "num_hidden_layers": 24}
MOBILE |= {"num_attention_heads": 16, "intermediate_size": 5632, "max_position_embeddings": 2048}
LLAMA = {"model_type": "llama", "vocab_size": 128_256, "hidden_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
LLAMA |= {"num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 8192}
LLAMA |= {"max_position_embeddings": 131_072, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024}
EVERY = {"targets": "all-linear", "head": "lora"}
PUBLISHED = {  # model, its adapters, sites J, Linears, LoRA parameters of a rank, those of a generator of 32 ranks
    "mBERT, 3 classes": (lambda: bert.bert(MBERT, labels=3, pool="pooler"), EVERY, 74, 74, 168_195, 747_401),
    "mBERT, 7 classes": (lambda: bert.bert(MBERT, labels=7, pool="pooler"), EVERY, 74, 74, 168_199, 747_401),
    "MobileLLaMA-1.4B": (lambda: llama.llama(MOBILE), EVERY, 168, 169, 946_176, 3_868_717),
    "Llama-3.2-3B": (lambda: llama.llama(LLAMA), EVERY, 196, 197, 1_519_616, 5_259_869),
    "GPT-2 Medium": (lambda: gpt2.gpt2(GPT2), {"targets": "c_attn"}, 24, 97, 98_304, 374_413),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_sites(name):
    build, targets, sites, linears, parameters, generator = PUBLISHED[name]
    model = build()
    init = functools.partial(adapters.init, shapes=jax.eval_shape(model.init, jax.random.key(0)), rank=1, **targets)
    assert ranks.layout(ranks.concrete(init)).sites == sites
    assert adapters.count(jax.eval_shape(init, jax.random.key(0))) == parameters
    assert taps.size(model) == 2 * linears
    psg = jax.eval_shape(
        lambda: fedp2eft.make_psg(jax.random.key(0), taps.size(model), 2 * taps.size(model), sites * 32)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(psg)) == generator


def test_a_head_that_gives_tokens_is_read_but_has_no_adapter():
    model = llama.llama(decoder.config())
    base, inputs = model.init(jax.random.key(0)), decoder.inputs()
    found = np.asarray(taps.moments(model, base, inputs, jnp.ones(3)))
    assert found.shape == (7 * decoder.LAYERS + 1, 3)
    tokens, sizes = int(inputs["mask"].sum()), sorted(set(found[:, 0].tolist()))
    assert sizes == [tokens * decoder.WIDTH, tokens * decoder.INNER] and found[-1, 0] == sizes[0]
    init = functools.partial(adapters.init, shapes=base, rank=2, **EVERY)
    assert ranks.layout(ranks.concrete(init)).sites == 7 * decoder.LAYERS


@pytest.mark.parametrize(("make", "config"), [(llama.llama, decoder.config()), (gpt2.gpt2, decoder.config("gpt2"))])
def test_a_tied_head_is_read_like_one_of_its_own(make, config):
    tied, loose = (make(config | {"tie_word_embeddings": tie}) for tie in (True, False))
    base = loose.init(jax.random.key(0))
    own = {name: part for name, part in base.items() if name != "lm_head"}
    assert taps.size(tied) == taps.size(loose) and make(config, head="classification", labels=2).tied == ()
    found = [
        taps.moments(model, params, decoder.inputs(), jnp.ones(3)) for model, params in ((tied, own), (loose, base))
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_statistics_are_those_of_the_whole_input():
    x = taps.vector(parts_of([range(6)]))
    hidden = inputs_of("classifier")
    np.testing.assert_allclose(x[-4:-2], [hidden.mean(), np.sqrt(hidden.var(ddof=1) + 1e-5)], rtol=1e-5, atol=1e-7)


def test_padding_is_left_out_unless_asked_for():
    mask = np.asarray(texts(np.arange(6))["mask"])
    first = np.asarray(
        bert.Embeddings(bert.settings(CONFIG, 0.0, jnp.float32, False, False)).apply(
            {"params": BASE["embeddings"]}, texts(np.arange(6))
        ),
        np.float64,
    )
    names = [site.path for site in adapters.sites(BASE) if site.is_dense]
    row = sorted(path for path in names if "layer" in path).index(("encoder", "layer", "attention", "self", "query"))
    for masked, elements in ((True, first[mask]), (False, first.reshape(-1, 16))):
        x = taps.vector(parts_of([range(6)], mask_padding=masked)).reshape(-1, 2)
        expected = [elements.mean(), np.sqrt(elements.var(ddof=1) + 1e-5)]
        np.testing.assert_allclose(x[row], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("splits", [[[0, 1, 2], [3, 4, 5]], [[5], [4, 3], [2, 1, 0]], [[i] for i in range(6)]])
@pytest.mark.parametrize("masked", [True, False])
def test_it_does_not_matter_how_texts_are_batched(splits, masked):
    whole = taps.vector(parts_of([range(6)], mask_padding=masked))
    np.testing.assert_allclose(taps.vector(parts_of(splits, mask_padding=masked)), whole, rtol=2e-6, atol=1e-7)


def test_examples_that_are_padding_do_not_count():
    rows = np.array([0, 1, 2, 3])
    weights = jnp.array([1.0, 1.0, 0.0, 0.0])
    for masked in (True, False):
        part = taps.moments(MODEL, BASE, texts(rows), weights, mask_padding=masked)
        alone = taps.moments(MODEL, BASE, texts(rows[:2]), jnp.ones(2), mask_padding=masked)
        np.testing.assert_allclose(part, alone, rtol=1e-5, atol=1e-6)
    assert not np.asarray(taps.moments(MODEL, BASE, texts(rows), 0 * weights))[:, 0].any()


def test_merging_is_exact_for_numbers_far_from_zero():
    rng = np.random.default_rng(1)
    x = 100 + 1e-3 * rng.standard_normal(600)
    parts = [np.array([[len(p), p.mean(), ((p - p.mean()) ** 2).sum()]]) for p in np.split(x, 6)]
    np.testing.assert_allclose(taps.vector(parts), [x.mean(), np.sqrt(x.var(ddof=1) + 1e-5)], rtol=1e-7)


def test_bfloat16_rounds_at_each_merge_and_quantity_is_one_more_entry():
    parts = parts_of([[0, 1], [2, 3], [4, 5]])
    rounded, exact = taps.vector(parts, dtype="bfloat16"), taps.vector(parts)
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, rtol=0.02, atol=2e-3)
    np.testing.assert_allclose(taps.vector(parts, quantity=6)[-1], np.log(6), rtol=1e-6)
    with pytest.raises(ValueError, match="tap_dtype is 'int8'"):
        taps.vector(parts, dtype="int8")

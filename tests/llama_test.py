"""The Llama family: structure, invariances, the cache, adapters; and equality with transformers."""

import functools

import decoder
import encoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fedjax_peft import adapters
from fedjax_peft.models import causal, hf, llama

KEY = jax.random.key(0)


@functools.cache
def build(kind="llama", **keywords):
    model = llama.llama(decoder.config(kind), **keywords)
    base = encoder.weights(jax.eval_shape(model.init, KEY))
    return model._replace(apply=jax.jit(model.apply), decode=model.decode and jax.jit(model.decode)), base


def trained(base, **keywords):
    """Adapters that do something."""
    nodes = adapters.init(KEY, base, **keywords)
    return jax.tree.map(lambda leaf: leaf + 0.05 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), nodes)


def real(x, inputs):
    """[tokens, ..] of all rows, padding left out."""
    return np.asarray(x)[np.asarray(inputs["mask"])]


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2"])
def test_sites_have_the_names_of_hugging_face(kind):
    _, base = build(kind)
    sites = {name: site for site in adapters.sites(base) for name in site.names}
    parts = {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    linears = {f"model.layers.{i}.{part}.{name}" for i in range(3) for part, names in parts.items() for name in names}
    linears |= set() if kind == "tied" else {"lm_head"}
    assert {name for name, site in sites.items() if site.is_dense} == linears
    biased = {name.split(".")[-1] for name, site in sites.items() if "bias" in site.params}
    assert biased == ({"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set())
    assert {"model.embed_tokens", "model.norm", "model.layers.2.post_attention_layernorm"} <= set(sites)


@pytest.mark.parametrize(
    ("kind", "keywords"), [("llama", {"targets": "all-linear", "rank": 4}), ("tied", {"kind": "full"})]
)
def test_adapters_beside_the_base_do_what_merged_ones_do(kind, keywords):
    model, base = build(kind)
    nodes = trained(base, **keywords)
    beside = model.apply(base, nodes, decoder.inputs())
    merged = model.apply(adapters.merge(base, nodes), {}, decoder.inputs())
    np.testing.assert_allclose(beside, merged, atol=2e-4)
    assert np.abs(beside - model.apply(base, {}, decoder.inputs())).max() > 0.1


def test_every_parameter_matters():
    model, base = build("qwen2")
    nodes = trained(base, kind="full")
    slopes = jax.jit(jax.grad(lambda nodes: jnp.sum(jnp.sin(model.apply(base, nodes, decoder.inputs())))))(nodes)
    for path, node in adapters.nodes(slopes).items():
        for leaf in jax.tree.leaves(node):
            by_layer = leaf.reshape(decoder.LAYERS, -1) if adapters.is_stacked(path) else leaf.reshape(1, -1)
            # A bias of keys moves all scores of a query alike.
            assert (np.abs(by_layer).max(1) > 1e-5).all() or path[-1] == "k_proj", path


def test_loop_and_unrolled_layers_are_the_same_model():
    values, gradients = [], []
    for settings in ({"scan": True}, {"scan": False}, {"scan": True, "remat": True}):
        model, base = build(dropout=0.3, **settings)
        nodes = trained(base, rank=2, targets="q_proj,down_proj")

        def total(nodes, model=model, base=base):
            return jnp.sum(jnp.square(model.apply(base, nodes, decoder.inputs(), jax.random.key(7))))

        value, gradient = jax.jit(jax.value_and_grad(total))(nodes)
        values.append(value)
        gradients.append(gradient)
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        np.testing.assert_allclose(value, values[0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradient, gradients[0])


@pytest.mark.parametrize("kind", ["tied", "llama3"])
def test_a_branch_of_a_text_is_that_text_alone(kind):
    model, base = build(kind)
    nodes = trained(base, rank=4, targets="all-linear")
    decoder.check_forks(functools.partial(model.apply, base, nodes))


def test_padding_on_either_side_changes_nothing():
    model, base = build("llama3")
    right, left = decoder.inputs(lengths=(6, 5, 2)), decoder.inputs(lengths=(6, 5, 2), left=True)
    expected = real(model.apply(base, {}, right), right)
    short = jax.tree.map(lambda leaf: leaf[:, :6], right)
    for inputs in (left, short):
        np.testing.assert_allclose(real(model.apply(base, {}, inputs), inputs), expected, atol=1e-4)
    noisy = left | {"tokens": jnp.where(left["mask"], left["tokens"], 17)}
    np.testing.assert_array_equal(real(model.apply(base, {}, noisy), left), real(model.apply(base, {}, left), left))


def test_no_token_sees_a_later_one():
    model, base = build()
    inputs = decoder.inputs(lengths=(10, 10, 10))
    other = inputs | {"tokens": inputs["tokens"].at[:, 6:].set(7)}
    one, two = (np.asarray(model.apply(base, {}, these)) for these in (inputs, other))
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert np.abs(one[:, 6:] - two[:, 6:]).max() > 0.1


@pytest.mark.parametrize(("dtype", "left"), [(jnp.float32, False), (jnp.bfloat16, True)])
def test_padding_and_empty_rows_are_finite(dtype, left):
    model, base = build(dtype=dtype)
    inputs = decoder.inputs(lengths=(4, 0, 1), left=left)
    nodes = trained(base, targets="all-linear", rank=2)
    value, slopes = jax.jit(jax.value_and_grad(lambda nodes: jnp.sum(model.apply(base, nodes, inputs))))(nodes)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_bfloat16_is_close_and_logits_are_float32(kind):
    (model, base), (narrow, cast) = build(kind), build(kind, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for path, leaf in traverse_util.flatten_dict(cast).items() if path[-1] != "scale"} == {
        "bfloat16"
    }
    exact, y = model.apply(base, {}, decoder.inputs()), narrow.apply(cast, {}, decoder.inputs())
    assert y.dtype == jnp.float32 and not np.array_equal(y, y.astype(jnp.bfloat16))
    np.testing.assert_allclose(y, exact, atol=0.1 * float(jnp.abs(exact).max()))


def test_dropout_needs_a_key_and_does_not_depend_on_the_width_of_a_batch():
    (model, base), (still, _) = build(dropout=0.5), build()
    wide = decoder.inputs(lengths=(6, 5, 2))
    narrow = jax.tree.map(lambda leaf: leaf[:, :6], wide)
    np.testing.assert_array_equal(model.apply(base, {}, wide), still.apply(base, {}, wide))
    one, two = (real(model.apply(base, {}, these, KEY), these) for these in (wide, narrow))
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert not np.allclose(one, real(still.apply(base, {}, wide), wide), atol=0.1)


@pytest.mark.parametrize(
    ("kind", "scan", "left"), [("llama3", True, True), ("tied", False, True), ("qwen2", True, False)]
)
def test_decoding_step_by_step_is_the_whole_text_at_once(kind, scan, left):
    model, base = build(kind, scan=scan)
    inputs = decoder.inputs(left=left)
    nodes = trained(base, rank=2, targets="all-linear")
    cache, found = model.init_cache(3, 12), []
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache)
    for start, stop in [(0, 5)] + [(t, t + 1) for t in range(5, 10)]:
        part = {name: leaf[:, start:stop] for name, leaf in inputs.items()}
        logits, cache = model.decode(base, nodes, cache, part)
        found.append(logits)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) == shapes and cache.filled == 10
    whole = model.apply(base, nodes, inputs)
    np.testing.assert_allclose(real(jnp.concatenate(found, 1), inputs), real(whole, inputs), atol=1e-4)


def test_clients_decode_side_by_side_under_one_base():
    model, base = build()
    inputs = decoder.inputs(left=True)
    nodes = [adapters.init(KEY, base, rank=2, targets="all-linear"), trained(base, rank=2, targets="all-linear")]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes)

    def two_steps(nodes):
        first = {name: leaf[:, :9] for name, leaf in inputs.items()}
        second = {name: leaf[:, 9:] for name, leaf in inputs.items()}
        _, cache = model.decode(base, nodes, model.init_cache(3, 10), first)
        logits, cache = model.decode(base, nodes, cache, second)
        return logits, cache.filled

    # An axis None of the result is an error where the position has gained an axis of clients.
    side_by_side, filled = jax.jit(jax.vmap(two_steps, out_axes=(0, None)))(both)
    assert filled == 10
    for client in range(2):
        np.testing.assert_allclose(side_by_side[client], two_steps(nodes[client])[0], atol=1e-4)


def test_logits_of_chosen_tokens_alone():
    model, base = build("tied")
    inputs = decoder.inputs()
    chosen = jnp.asarray([[9, 0], [6, 2], [1, 1]], jnp.int32)
    expected = jnp.take_along_axis(model.apply(base, {}, inputs), chosen[..., None], 1)
    np.testing.assert_allclose(model.apply(base, {}, inputs | {"chosen": chosen}), expected, atol=1e-5)


def test_a_classifier_reads_the_last_real_token():
    model, base = build(head="classification", labels=4)
    right, left = decoder.inputs(), decoder.inputs(left=True)
    y = model.apply(base, {}, right)
    assert y.shape == (3, 4) and y.dtype == jnp.float32 and model.decode is None
    np.testing.assert_allclose(model.apply(base, {}, left), y, atol=1e-4)
    noisy = right | {"tokens": jnp.where(right["mask"], right["tokens"], 17)}
    np.testing.assert_array_equal(model.apply(base, {}, noisy), y)
    last = jnp.asarray([9, 6, 1])
    other = model.apply(base, {}, right | {"tokens": right["tokens"].at[jnp.arange(3), last].set(2)})
    assert (np.abs(other - y).max(1) > 0.01).all()


def test_taps_come_with_the_outputs():
    model, base = build()
    logits, taps = jax.jit(model.taps)(base, {}, decoder.inputs())
    np.testing.assert_allclose(logits, model.apply(base, {}, decoder.inputs()), atol=1e-5)
    sites = {site.path for site in adapters.sites(base) if site.is_dense}
    assert {path[:-1] for path in traverse_util.flatten_dict(taps)} == sites
    assert taps["model"]["layers"]["mlp"]["down_proj"]["mean"].shape == (decoder.LAYERS, 3, 10)


@pytest.mark.parametrize("kind", decoder.LLAMAS)
def test_published_weights_find_their_places(tmp_path, kind):
    _, base = build(kind)
    place = encoder.save(tmp_path, decoder.config(kind), decoder.published(base))
    found = hf.load(place, labels=0, head="lm", key=KEY)
    assert found.fresh == found.unused == ()
    jax.tree.map(np.testing.assert_array_equal, found.base, base)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_trimmed_vocabulary_is_exact(tmp_path, kind):
    model, base = build(kind)
    inputs = decoder.inputs()
    kept = np.unique(inputs["tokens"])
    place = encoder.save(tmp_path, decoder.config(kind), decoder.published(base))
    small = hf.load(place, labels=0, head="lm", key=KEY, vocabulary=kept)
    remapped = inputs | {"tokens": jnp.asarray(np.searchsorted(kept, inputs["tokens"]))}
    logits = jax.jit(small.model.apply)(small.base, {}, remapped)
    np.testing.assert_allclose(logits, model.apply(base, {}, inputs)[..., kept], atol=1e-5)


def test_a_headless_checkpoint_gets_a_drawn_classifier(tmp_path):
    _, base = build("qwen2")
    tensors = {name.removeprefix("model."): leaf for name, leaf in decoder.published(base).items()}
    place = encoder.save(tmp_path, decoder.config("qwen2"), tensors)
    found = hf.load(place, labels=4, key=KEY)
    assert found.fresh == ("score/kernel",) and found.unused == ("lm_head.weight",)
    jax.tree.map(np.testing.assert_array_equal, found.base["model"], base["model"])
    del tensors["layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    place = encoder.save(tmp_path / "cut", decoder.config("qwen2"), tensors)
    with pytest.raises(ValueError, match="missing: lm_head/kernel, model/layers/1/mlp/up_proj/kernel"):
        hf.load(place, labels=0, head="lm", key=KEY)


@pytest.mark.parametrize(
    ("change", "keywords", "sentence"),
    [
        ({"model_type": "mistral"}, {}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, {}, "attention_bias is True"),
        ({"mlp_bias": True}, {}, "mlp_bias is True"),
        ({"num_attention_heads": 5}, {}, "hidden_size is 24"),
        ({"num_key_value_heads": 3}, {}, "num_key_value_heads is 3"),
        ({"head_dim": 7}, {}, "head_dim is 7"),
        ({"vocab_size": None}, {}, "vocab_size is None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "rope_scaling has the type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, {}, "'llama3' lacks low_freq_factor, high_freq"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, {}, "partial_rotary_factor 0.5"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, {}, "sliding_window is 8"),
        ({}, {"pool": "mean"}, "pool is 'mean'"),
        ({}, {"head": "span"}, "head is 'span'"),
        ({}, {"head": "classification"}, "labels is 0"),
        ({}, {"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_mistakes_get_a_sentence(change, keywords, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        llama.llama(decoder.config() | change, **keywords)
    assert "\n" not in str(caught.value)


def test_windows_that_no_layer_uses_are_fine():
    for change in ({"max_window_layers": 3, "sliding_window": 8}, {"max_window_layers": 0, "sliding_window": 32}):
        llama.llama(decoder.config("qwen2") | {"use_sliding_window": True} | change)


def test_texts_longer_than_the_model_or_the_cache_get_a_sentence():
    model, base = build()
    with pytest.raises(ValueError, match="33 tokens, but the model has positions for 32"):
        model.apply(base, {}, decoder.inputs(width=33))
    with pytest.raises(ValueError, match="40 tokens, but the model has positions for 32"):
        model.init_cache(3, 40)
    with pytest.raises(ValueError, match="10 tokens do not fit into a cache of 4 slots"):
        model.decode(base, {}, model.init_cache(3, 4), decoder.inputs())


def torch_pair(tmp_path, kind, model_class, **keywords):
    """The same random weights in transformers and here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    family = "Qwen2" if kind == "qwen2" else "Llama"
    extra = {"num_labels": keywords["labels"], "pad_token_id": 0} if "labels" in keywords else {}
    theirs = getattr(transformers, family + model_class)(
        getattr(transformers, family + "Config")(**decoder.config(kind), **extra)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return torch, theirs, hf.load(tmp_path, key=KEY, **({"labels": 0, "head": "lm"} | keywords))


@pytest.mark.parity
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", decoder.LLAMAS)
def test_logits_and_hidden_states_equal_transformers(tmp_path, kind, left):
    torch, theirs, ours = torch_pair(tmp_path, kind, "ForCausalLM")
    assert ours.fresh == () and ours.unused == ()
    inputs = decoder.inputs(lengths=(30, 20, 2), left=left, width=30)
    mask = np.asarray(inputs["mask"], int)
    given = {"input_ids": inputs["tokens"], "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    states = {}

    def keep(i):
        return lambda module, arguments, output: states.__setitem__(i, output[0] if type(output) is tuple else output)

    for i, layer in enumerate(theirs.model.layers):
        layer.register_forward_hook(keep(i))
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(np.asarray(leaf, int)) for name, leaf in given.items()}).logits
    assert expected.abs().max() > 1
    logits = ours.model.apply(ours.base, {}, inputs)
    np.testing.assert_allclose(real(logits, inputs), real(expected, inputs), atol=1e-4)
    settings = llama.settings(ours.config, 0.0, jnp.float32, True, False)
    network = causal.Network(settings, 0, "lm", llama.Decoder, "model")
    _, state = network.apply({"params": ours.base}, inputs, capture_intermediates=True, mutable=["intermediates"])
    found = state["intermediates"]["model"]["layers"]["__call__"][0][0]
    for i, layer in enumerate(found):
        np.testing.assert_allclose(real(layer, inputs), real(states[i], inputs), atol=1e-4, err_msg=f"layer {i}")


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_classifiers_equal_transformers(tmp_path, kind):
    torch, theirs, ours = torch_pair(tmp_path, kind, "ForSequenceClassification", labels=5, head="classification")
    assert ours.fresh == ()
    inputs = decoder.inputs()
    with torch.no_grad():
        tokens, mask = (torch.tensor(np.asarray(inputs[name], int)) for name in ("tokens", "mask"))
        expected = theirs(input_ids=tokens, attention_mask=mask).logits
    np.testing.assert_allclose(ours.model.apply(ours.base, {}, inputs), expected.numpy(), atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_linear_of_transformers_is_a_site(tmp_path, kind):
    torch, theirs, ours = torch_pair(tmp_path, kind, "ForCausalLM")
    linears = {name for name, part in theirs.named_modules() if isinstance(part, torch.nn.Linear)}
    assert {name for site in adapters.sites(ours.base) if site.is_dense for name in site.names} == linears

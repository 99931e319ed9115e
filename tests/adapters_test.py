import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import traverse_util

from fedjax_peft import adapters, ranks, trees

MODEL = toy.model()
BASE = MODEL.init(jax.random.key(0))
KEY = jax.random.key(1)
INPUTS = jax.tree.map(lambda leaf: leaf[0, 0], toy.batches(0, 1).inputs)


def build(**settings):
    return adapters.init(KEY, BASE, **{"rank": 2, "alpha": 4.0, "targets": "query"} | settings)


def filled(tree, seed=2):
    """The adapters with random numbers in place of zeros, ranks that a mask removes excepted."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, new: leaf if path[-1].name == "scale" else new, tree, structure.unflatten(noise)
    )


def deep():
    """Shapes of an encoder of 12 layers with the names and sizes of RoBERTa-base; no arrays."""
    sizes = {
        ("attention", "self", "query"): (768, 768),
        ("attention", "self", "key"): (768, 768),
        ("attention", "self", "value"): (768, 768),
        ("attention", "output", "dense"): (768, 768),
        ("intermediate", "dense"): (768, 3072),
        ("output", "dense"): (3072, 768),
    }
    flat = {("encoder", "layer", *path, "kernel"): (12, *shape) for path, shape in sizes.items()}
    flat |= {("encoder", "layer", "output", "LayerNorm", "scale"): (12, 768)}
    flat |= {("classifier", "dense", "kernel"): (768, 768), ("classifier", "out_proj", "kernel"): (768, 2)}
    flat |= {("lm_head", "kernel"): (768, 50265)}
    return traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in flat.items()})


def built(**settings):
    return jax.eval_shape(functools.partial(adapters.init, shapes=deep(), **settings), KEY)


# What is adapted


def test_targets_are_endings_of_names():
    sites = {path[-1] for path in adapters.nodes(built(targets="query, value", head="frozen"))}
    assert sites == {"query", "value"}


def test_all_linear_is_every_linear_but_the_output_head():
    found = {".".join(path) for path in adapters.nodes(built(targets="all-linear", head="frozen"))}
    layer = ["attention.self.key", "attention.self.query", "attention.self.value", "attention.output.dense"]
    assert found == {f"encoder.layer.{name}" for name in [*layer, "intermediate.dense", "output.dense"]}


def test_a_regular_expression_chooses_layers():
    tree = adapters.init(KEY, BASE, rank=2, alpha=4.0, targets=r"encoder\.layer\.1\.query", head="frozen")
    delta = tree["encoder"]["layer"]["query"]["delta"]
    np.testing.assert_array_equal(delta.scale, [[0, 0], [2, 2]])
    assert not delta.a[0].any() and delta.a[1].any()


@pytest.mark.parametrize("head, kind", [("full", adapters.Full), ("lora", adapters.LoRA), ("frozen", None)])
def test_the_head_is_dense_low_rank_or_frozen(head, kind):
    tree = build(targets="all-linear", head=head)
    assert isinstance(tree["classifier"]["delta"], kind) if kind else "classifier" not in tree


def test_every_parameter_of_the_base_has_a_place_in_full_adapters():
    tree = build(kind="full")
    assert adapters.count(tree) == sum(leaf.size for leaf in jax.tree.leaves(BASE))
    ones = jax.tree.map(jnp.ones_like, tree)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x + 1), BASE, adapters.merge(BASE, ones))


def test_low_rank_scale():
    assert float(build(rank=4)["encoder"]["layer"]["query"]["delta"].scale[0, 0]) == 1.0
    assert float(build(rank=4, rank_stabilized=True)["encoder"]["layer"]["query"]["delta"].scale[0, 0]) == 2.0


def test_new_factors_are_uniform_within_the_fan_in():
    a = build(rank=8)["encoder"]["layer"]["query"]["delta"].a
    assert 0.9 * 12**-0.5 < jnp.abs(a).max() <= 12**-0.5
    assert not np.array_equal(a[0], a[1])


def test_a_head_may_have_fewer_classes_than_ranks():
    tree = build(targets="all-linear", head="lora", rank=8)
    assert tree["classifier"]["delta"].b.shape == (8, 3)


# Counts


def test_counts_are_those_of_the_formulas():
    pair = built(targets="query,value", rank=8, head="frozen")
    assert adapters.count(pair) == 294_912
    assert adapters.count(pair, lambda leaf: leaf == "a") == 147_456
    with_head = built(targets="query,value", rank=8, head="full")
    assert adapters.count(with_head) == 294_912 + 768 * 768 + 768 * 2


def test_removed_ranks_do_not_count():
    tree = build(rank=4, head="frozen")
    mask = jnp.array([[1, 1, 0, 1], [0, 0, 0, 0]])
    assert adapters.count(tree) == 2 * 4 * 24
    assert adapters.count(ranks.scaled(ranks.layout(tree), tree, mask)) == 3 * 24


# What adapters do


def test_new_adapters_do_nothing():
    for settings in ({}, {"targets": "all-linear", "head": "lora"}, {"kind": "full"}):
        logits = MODEL.apply(BASE, build(**settings), INPUTS)
        np.testing.assert_array_equal(logits, MODEL.apply(BASE, {}, INPUTS))


@pytest.mark.parametrize("settings", [{}, {"targets": "all-linear", "head": "lora"}, {"kind": "full"}])
def test_merged_weights_do_what_adapters_do_beside_them(settings):
    tree = filled(build(**settings))
    beside = MODEL.apply(BASE, tree, INPUTS)
    np.testing.assert_allclose(adapters.merged(MODEL).apply(BASE, tree, INPUTS), beside, rtol=1e-4, atol=1e-5)
    assert not np.allclose(beside, MODEL.apply(BASE, {}, INPUTS))


def test_an_adapted_layer_norm_merges_too():
    x = jax.random.normal(KEY, (5, 4))
    delta = adapters.Affine(gain=jnp.arange(4.0), shift=jnp.ones(4))
    params = {"scale": jnp.full(4, 2.0), "bias": jnp.full(4, 3.0)}
    merged = delta.merged(params)
    beside = x * params["scale"][None] + params["bias"][None] + delta(x)
    np.testing.assert_allclose(x * merged["scale"][None] + merged["bias"][None], beside, rtol=1e-6)


def test_merged_weights_keep_their_precision():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.model().init(KEY))
    merged = adapters.merge(half, filled(build(targets="all-linear", head="full")))
    assert jax.tree.map(lambda leaf: leaf.dtype, merged) == jax.tree.map(lambda leaf: leaf.dtype, half)


def test_merging_leaves_other_weights_alone():
    merged = adapters.merge(BASE, filled(build(head="frozen")))
    np.testing.assert_array_equal(merged["classifier"]["kernel"], BASE["classifier"]["kernel"])
    old, new = (tree["encoder"]["layer"]["query"]["kernel"] for tree in (BASE, merged))
    assert not np.array_equal(old, new)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)


def test_concatenated_adapters_do_what_both_do():
    first, second = filled(build()), filled(build(rank=3, alpha=1.5), seed=3)
    both = adapters.concat(first, second)
    assert both["encoder"]["layer"]["query"]["delta"].a.shape == (2, 12, 5)
    twice = adapters.merge(adapters.merge(BASE, first), second)
    np.testing.assert_allclose(MODEL.apply(BASE, both, INPUTS), MODEL.apply(twice, {}, INPUTS), rtol=1e-4, atol=1e-5)


def test_concatenation_keeps_what_only_one_has():
    with_head, without = filled(build()), filled(build(head="frozen"), seed=3)
    both = adapters.concat(with_head, without)
    np.testing.assert_array_equal(both["classifier"]["delta"].kernel, with_head["classifier"]["delta"].kernel)


def test_removed_ranks_add_nothing_and_receive_no_gradient():
    full = filled(build(rank=4, head="frozen"))
    mask = jnp.array([[1, 0, 0, 1], [0, 1, 0, 0]])
    masked = ranks.scaled(ranks.layout(full), full, mask)
    delta = full["encoder"]["layer"]["query"]["delta"]
    a, b, scale = np.array(delta.a), np.array(delta.b), float(delta.scale[0, 0])
    trimmed = [scale * a[layer][:, kept] @ b[layer][kept] for layer, kept in enumerate([[0, 3], [1]])]
    kernel = BASE["encoder"]["layer"]["query"]["kernel"] + np.stack(trimmed)
    layer = BASE["encoder"]["layer"]["query"] | {"kernel": kernel}
    by_hand = MODEL.apply(BASE | {"encoder": {"layer": {"query": layer}}}, {}, INPUTS)
    np.testing.assert_allclose(MODEL.apply(BASE, masked, INPUTS), by_hand, rtol=1e-4, atol=1e-5)

    slope = jax.grad(lambda tree: jnp.sum(MODEL.apply(BASE, tree, INPUTS)[:, 0]))(masked)
    slope = jax.tree.map(np.array, slope["encoder"]["layer"]["query"]["delta"])
    removed = np.asarray(mask) == 0
    assert not slope.b[removed].any() and not slope.a.swapaxes(1, 2)[removed].any()
    assert slope.b[~removed].any(-1).all() and slope.a.swapaxes(1, 2)[~removed].any(-1).all()


def test_dropout_keeps_the_expectation_and_needs_a_key():
    node = adapters.LoRA(jnp.eye(4), jnp.eye(4), jnp.ones(4), dropout=0.25)
    x = jnp.ones((20_000, 4))
    np.testing.assert_array_equal(node(x), x)
    dropped = np.asarray(node(x, KEY))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    np.testing.assert_allclose(dropped.mean(0), 1.0, atol=0.03)  # about seven standard errors


def test_dropout_does_not_depend_on_the_width_that_a_batch_is_cut_to():
    # Who shares a chunk decides about the width, so results would depend on chunk, mesh and order of the cohort.
    node = adapters.LoRA(jnp.eye(4), jnp.eye(4), jnp.ones(4), dropout=0.5)
    x = jax.random.normal(KEY, (3, 8, 4))
    np.testing.assert_array_equal(node(x[:, :5], KEY), node(x, KEY)[:, :5])


def test_half_precision_inputs_stay_half_precision():
    node = adapters.LoRA(jnp.eye(4), jnp.eye(4), jnp.ones(4))
    assert node(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


# Mistakes


def test_adapters_that_no_module_reads_are_refused():
    tree = build()
    adapters.check_sites(tree, BASE)
    lost = {"encoder": {"layer": {"qeury": tree["encoder"]["layer"]["query"]}}}
    with pytest.raises(ValueError, match=re.escape("no module of the model reads the adapters at encoder.layer.qeury")):
        adapters.check_sites(lost, BASE)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "lore"}, "adapter.kind is 'lore', expected 'lora' or 'full'"),
        ({"head": "dense"}, "adapter.head is 'dense', expected 'full', 'lora' or 'frozen'"),
        ({"dropout": 1.0}, "adapter.dropout is 1.0, expected at least 0 and below 1"),
        ({"rank": 0}, "adapter.rank is 0, expected 1 to 12 at encoder.layer.0.query (12 x 12)"),
        ({"rank": 13}, "adapter.rank is 13, expected 1 to 12 at encoder.layer.0.query (12 x 12)"),
        (
            {"targets": "query,vlaue"},
            "adapter.targets 'vlaue' matches no site of the model; sites are encoder.",
        ),
        ({"targets": "(query"}, "adapter.targets '(query' is no regular expression: "),
    ],
)
def test_mistakes_are_named_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build(**settings)
    assert "\n" not in str(error.value)


# Against peft


@pytest.mark.parity
def test_logits_and_gradients_equal_those_of_peft():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = torch.nn.ModuleList([torch.nn.Linear(12, 12) for _ in range(2)])
            self.classifier = torch.nn.Linear(12, 3)

        def forward(self, x, mask):
            for layer in self.query:
                x = torch.tanh(layer(x))
            return self.classifier((x * mask).sum(1) / mask.sum(1))

    network = Network()
    own = filled(build(rank=3, alpha=6.0, head="frozen"))
    delta = own["encoder"]["layer"]["query"]["delta"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query.0", "query.1"], lora_dropout=0.0)
    theirs = peft.get_peft_model(network, settings)
    tensor = lambda x: torch.tensor(np.array(x))  # noqa: E731
    stack = BASE["encoder"]["layer"]["query"]
    with torch.no_grad():
        for layer, module in enumerate(network.query):
            module.base_layer.weight.copy_(tensor(stack["kernel"][layer].T))
            module.base_layer.bias.copy_(tensor(stack["bias"][layer]))
            module.lora_A["default"].weight.copy_(tensor(delta.a[layer].T))
            module.lora_B["default"].weight.copy_(tensor(delta.b[layer].T))
        network.classifier.weight.copy_(tensor(BASE["classifier"]["kernel"].T))
        network.classifier.bias.copy_(tensor(BASE["classifier"]["bias"]))

    rows = BASE["embeddings"]["word"]["embedding"][INPUTS["tokens"]]
    expected = theirs(tensor(rows), tensor(INPUTS["mask"][..., None]).float())
    logits = MODEL.apply(BASE, own, INPUTS)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-5, atol=1e-5)

    expected[:, 0].sum().backward()
    slope = jax.grad(lambda tree: jnp.sum(MODEL.apply(BASE, tree, INPUTS)[:, 0]))(own)
    slope = slope["encoder"]["layer"]["query"]["delta"]
    for layer, module in enumerate(network.query):
        for ours, weight in ((slope.a, module.lora_A), (slope.b, module.lora_B)):
            np.testing.assert_allclose(ours[layer].T, weight["default"].weight.grad.numpy(), rtol=1e-4, atol=1e-5)
    assert adapters.count(own) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


# Sites of real encoders


def test_names_of_stacked_layers_are_those_of_hugging_face():
    (site,) = [site for site in adapters.sites(deep()) if site.path[-1] == "query"]
    assert site.names[3] == "encoder.layer.3.attention.self.query" and len(site.names) == 12
    assert trees.path_name(jax.tree_util.tree_leaves_with_path({"a": {"b": 1}})[0][0]) == "a/b"

"""How scales of ranks are learnt: the loss, its fixed point, and the published accidents behind their switches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_same

from fedjax_peft import adapters, ranks, tasks, trees
from fedjax_peft.algorithms import bayestune, lora

MODEL, TASK = toy.model(), tasks.classification()
BASE = MODEL.init(jax.random.key(1))
INIT = functools.partial(
    adapters.init, shapes=jax.eval_shape(lambda: BASE), rank=4, alpha=8.0, targets="all-linear", head="lora"
)
LAYOUT = ranks.layout(ranks.concrete(INIT))
SHAPE = (LAYOUT.sites, LAYOUT.rank)
START = jnp.full(SHAPE, 1e-4, jnp.float32)
ADAM = optax.adam(1e-3)
ONE = jax.tree.map(lambda leaf: leaf[0], toy.batches(3, 1, steps=8)).replace(widths=())


def learn(scales=START, optimizer=ADAM, batches=ONE, mask=None, adapters=None, **settings):
    start = INIT(jax.random.key(0)) if adapters is None else adapters
    settings = bayestune.make_scales(**settings)
    return bayestune.learn_scales(
        MODEL, TASK, BASE, start, scales, optimizer, batches, jax.random.key(2), LAYOUT, settings, mask=mask
    )


def steps(count):
    return jax.tree.map(lambda leaf: leaf[:count], ONE.replace(constants={})).replace(constants=ONE.constants)


def logits(adapted):
    return MODEL.apply(BASE, adapted, jax.tree.map(lambda leaf: leaf[0], ONE.inputs))


def random_b(tree):
    return jax.tree.map(
        lambda node: node.replace(b=jax.random.normal(jax.random.key(5), node.b.shape)),
        tree,
        is_leaf=lambda node: isinstance(node, adapters.LoRA),
    )


FULL = random_b(INIT(jax.random.key(0)))


def test_scales_of_one_are_plain_lora_and_of_zero_the_base():
    np.testing.assert_array_equal(logits(ranks.scaled(LAYOUT, FULL, jnp.ones(SHAPE))), logits(FULL))
    np.testing.assert_allclose(logits(ranks.scaled(LAYOUT, FULL, jnp.zeros(SHAPE))), logits({}), atol=1e-6)


def test_only_the_product_of_scale_and_b_counts():
    def thinner(node):
        return node.replace(b=node.b / 4)

    less = jax.tree.map(thinner, FULL, is_leaf=lambda node: isinstance(node, adapters.LoRA))
    np.testing.assert_allclose(logits(ranks.scaled(LAYOUT, less, jnp.full(SHAPE, 4.0))), logits(FULL), atol=1e-5)
    thick, thin = (ranks.magnitudes(LAYOUT, tree) for tree in (FULL, less))
    ratio = ranks.significance(thin, jnp.full(SHAPE, 4.0)) / ranks.significance(thick, jnp.ones(SHAPE))
    assert ratio == pytest.approx(1 / 16, rel=1e-5)


def test_without_b_the_loss_sees_neither_scales_nor_a():
    def loss(parts):
        tree = trees.join(trees.select(INIT(jax.random.key(0)), lambda leaf: leaf != "a"), parts["a"])
        adapted = ranks.scaled(LAYOUT, tree, parts["scales"])
        return jnp.mean(TASK.loss(logits(adapted), ONE.labels[0]))

    a = trees.select(INIT(jax.random.key(0)), lambda leaf: leaf == "a")
    gradient = jax.grad(loss)({"a": a, "scales": jnp.ones(SHAPE)})
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_the_loss_sees_b_through_its_scale():
    def gradient(scales):
        adapted = lambda tree: ranks.scaled(LAYOUT, tree, scales)  # noqa: E731
        loss = jax.grad(lambda tree: jnp.mean(TASK.loss(logits(adapted(tree)), ONE.labels[0])))
        return adapters.nodes(loss(INIT(jax.random.key(0))))["classifier",].b

    once, scales = gradient(jnp.ones(SHAPE)), jnp.arange(1.0, 13.0).reshape(SHAPE)
    assert once.any()
    np.testing.assert_allclose(gradient(scales), scales[2][:, None] * once, rtol=1e-5)


def test_masked_ranks_are_as_if_cut_off_and_get_no_gradient():
    mask = ranks.top(jax.random.uniform(jax.random.key(3), SHAPE), 5)

    def loss(tree):
        return jnp.mean(TASK.loss(logits(ranks.scaled(LAYOUT, tree, mask)), ONE.labels[0]))

    gradient = adapters.nodes(jax.grad(loss)(FULL))
    for path, rows in ((("encoder", "layer", "query"), mask[:2]), (("classifier",), mask[2])):
        assert not (gradient[path].b * (1 - rows)[..., None]).any()
        assert not (gradient[path].a * (1 - rows)[..., None, :]).any()
    kept = np.flatnonzero(mask[2])
    node = adapters.nodes(FULL)["classifier",]
    cut = node.replace(a=node.a[:, kept], b=node.b[kept], scale=node.scale[kept])
    trimmed = adapters.nest(adapters.nodes(ranks.scaled(LAYOUT, FULL, mask)) | {("classifier",): cut})
    np.testing.assert_allclose(logits(trimmed), logits(ranks.scaled(LAYOUT, FULL, mask)), atol=1e-5)


def test_masked_ranks_stay_where_they_are():
    mask = ranks.first(SHAPE, 2)
    tuned, _ = lora.fine_tune(
        MODEL, TASK, BASE, ranks.scaled(LAYOUT, FULL, mask), optax.adamw(1e-2, weight_decay=0.0), ONE, jax.random.key(0)
    )
    before, after = (adapters.nodes(tree)["encoder", "layer", "query"] for tree in (FULL, tuned))
    np.testing.assert_array_equal(after.a[..., 2:], before.a[..., 2:])
    np.testing.assert_array_equal(after.b[:, 2:], before.b[:, 2:])
    assert np.all(after.b[:, :2] != before.b[:, :2])


@pytest.mark.parametrize("settings", [{}, bayestune.REFERENCE], ids=["default", "reference"])
def test_masked_scales_stay_where_they_are(settings):
    mask = ranks.first(SHAPE, 2)
    start = START.astype(settings.get("dtype", "float32"))
    scales, _ = learn(start, mask=mask, **settings)
    np.testing.assert_array_equal(scales[:, 2:], start[:, 2:])
    assert np.all(scales[:, :2] != start[:, :2])


def test_merged_weights_give_the_same_logits():
    adapted = ranks.scaled(LAYOUT, FULL, jax.random.uniform(jax.random.key(1), SHAPE))
    merged = MODEL.apply(adapters.merge(BASE, adapted), {}, jax.tree.map(lambda leaf: leaf[0], ONE.inputs))
    np.testing.assert_allclose(merged, logits(adapted), atol=1e-5)


def test_the_first_step_is_the_sparsity_priors():
    # B = 0, so that nothing else speaks, and Adam steps by its rate: the stored scale turns negative.
    scales, metrics = learn(batches=steps(1))
    np.testing.assert_allclose(scales, 1e-4 - 1e-2, rtol=1e-4)
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_loss_adds_both_priors_over_the_number_of_examples():
    # One SGD step of rate 1e-6 on the scales: what moves them is the gradient by hand.
    settings = bayestune.Scales(rate=1e-6)
    tree, scales = FULL, jnp.full(SHAPE, 0.5)
    examples = ONE.constants["examples"]

    def by_hand(scales):
        adapted = ranks.scaled(LAYOUT, tree, scales)
        nodes = adapters.nodes(tree)
        magnitude = jnp.stack(
            [*jnp.abs(nodes["encoder", "layer", "query"].b).sum(-1), jnp.abs(nodes["classifier",].b).sum(-1)]
        )
        prior = 100 / examples * jnp.sum(magnitude / scales) + 0.01 / examples * jnp.sum(100 * scales + jnp.log(scales))
        return jnp.mean(TASK.loss(logits(adapted), ONE.labels[0])) + prior

    seen = []

    def watch(updates, state, params=None):
        seen.append(updates)
        return updates, state

    def joint(optimizer, settings, rate):
        return optax.GradientTransformation(lambda params: (), watch)

    original, bayestune.joint = bayestune.joint, joint
    try:
        with jax.disable_jit():
            learn(scales, batches=steps(1), adapters=tree, rate=settings.rate)
    finally:
        bayestune.joint = original
    np.testing.assert_allclose(seen[0]["scales"], jax.grad(by_hand)(scales), rtol=1e-4)


@pytest.mark.parametrize(("use", "expected"), [(0.01, 0.99501), (1e-4, 0.0951)])
def test_fixed_point_of_the_priors(use, expected):
    # Gradient descent with significance 100 and sparsity .01 on a frozen B; a root of 100 a l^2 + a l - s u = 0.
    def loss(log_scale):
        scale = jnp.exp(log_scale)[None, None]
        return 100 * ranks.significance(jnp.full((1, 1), use), scale) + 0.01 * ranks.sparsity(scale)

    found = jnp.log(jnp.float32(0.3))
    step = jax.jit(lambda x: x - 0.3 * jax.grad(loss)(x))
    for _ in range(300):
        found = step(found)
    assert np.exp(found) == pytest.approx((-1 + np.sqrt(1 + 4e6 * use)) / 200, rel=1e-3)
    assert np.exp(found) == pytest.approx(expected, rel=1e-3)


def frozen(**settings):
    """Scales after training under a frozen B, from .1."""
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (20,) + (1,) * (leaf.ndim - 1)), ONE.replace(constants={}))
    return learn(jnp.full(SHAPE, 0.1), optax.set_to_zero(), many.replace(constants=ONE.constants), **settings)[0]


def test_without_significance_scales_fall_and_with_it_they_grow_with_b():
    def used(factor):
        return jax.tree.map(
            lambda node: node.replace(b=node.b * factor), FULL, is_leaf=lambda node: isinstance(node, adapters.LoRA)
        )

    assert np.all(frozen(adapters=used(1e-4), significance=0.0) < 0.0)
    little, some, much = (frozen(adapters=used(factor)) for factor in (1e-6, 1e-4, 1e-2))
    assert np.all(little < some) and np.all(some < much)
    assert np.all(little < 0.1) and np.all(much > 0.5)


def test_a_wider_site_ends_with_larger_scales():
    # Adam moves every entry of B alike, so |B| adds up over outputs: 12 of them beat 3, whatever the data say.
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (40,) + (1,) * (leaf.ndim - 1)), ONE.replace(constants={}))
    scales, _ = learn(jnp.full(SHAPE, 0.1), batches=many.replace(constants=ONE.constants))
    assert scales[:2].mean() > 1.3 * scales[2].mean() > 0
    assert ranks.top(scales, 4)[2].sum() == 0


def test_accumulated_gradients_are_sums_of_all_steps():
    transform = bayestune.joint(ADAM, bayestune.Scales(gradient="accumulate"), 1.0)
    fresh = bayestune.joint(ADAM, bayestune.Scales(), 1.0)
    params = {"adapters": jnp.zeros(2), "scales": jnp.zeros(3)}
    states = transform.init(params), fresh.init(params)
    for step in range(1, 4):
        gradient = {"adapters": jnp.ones(2), "scales": jnp.array([1.0, -2.0, 0.5])}
        updates, first = transform.update(gradient, states[0], params)
        summed, second = fresh.update(gradient | {"scales": step * gradient["scales"]}, states[1], params)
        states = first, second
        assert_same(updates, summed)


def test_the_clip_is_of_adapters_alone():
    clipped = optax.chain(optax.clip_by_global_norm(1e-6), optax.sgd(1.0))
    transform = bayestune.joint(clipped, bayestune.Scales(), 1.0)
    params = {"adapters": jnp.zeros(2), "scales": jnp.zeros(3)}
    gradient = {"adapters": jnp.array([3.0, 4.0]), "scales": jnp.array([5e5, -2.0, 0.5])}
    updates, _ = transform.update(gradient, transform.init(params), params)
    np.testing.assert_allclose(updates["scales"], [-1e-2, 1e-2, -1e-2], rtol=1e-4)
    np.testing.assert_allclose(updates["adapters"], [-0.6e-6, -0.8e-6], rtol=1e-4)


def test_raw_scales_reach_the_model_and_clamped_ones_do_not():
    negative = jnp.full(SHAPE, -0.5)
    losses = {
        forward: learn(negative, batches=steps(1), adapters=FULL, forward=forward)[1]["loss"]
        for forward in ("raw", "clamped")
    }
    expected = TASK.loss(logits(ranks.scaled(LAYOUT, FULL, negative)), ONE.labels[0]).mean()
    assert losses["raw"] == pytest.approx(float(expected), rel=1e-5)
    base = TASK.loss(logits(ranks.scaled(LAYOUT, FULL, jnp.full(SHAPE, 1e-4))), ONE.labels[0]).mean()
    assert losses["clamped"] == pytest.approx(float(base), rel=1e-5)


def test_bfloat16_scales_stay_bfloat16_and_tie():
    scales, _ = learn(START.astype(jnp.bfloat16), dtype="bfloat16", gradient="accumulate", forward="raw")
    assert scales.dtype == jnp.bfloat16 and len(np.unique(np.asarray(scales, np.float32))) < scales.size


def test_alone_a_client_keeps_its_budget_and_starts_again():
    method = bayestune.bayestune(MODEL, TASK, INIT, ADAM)
    server = method.init(jax.random.key(0))
    tuned = method.personalize(BASE, server, (), ONE, jax.random.key(1))
    assert ranks.strategy(LAYOUT, tuned)["ranks"].sum() == LAYOUT.sites  # budget 1
    nodes = adapters.nodes(tuned)
    gone = np.asarray(nodes["classifier",].scale == 0)
    np.testing.assert_array_equal(nodes["classifier",].a[:, gone], adapters.nodes(server)["classifier",].a[:, gone])
    one = bayestune.bayestune(MODEL, TASK, INIT, ADAM, mode="one").personalize(BASE, server, (), ONE, jax.random.key(1))
    assert set(np.unique(ranks.table(LAYOUT, one))) == {0.0, 2.0}  # alpha / R, whatever is kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "old"}, "algorithm.gradient is 'old', expected fresh or accumulate"),
        ({"low": 0.0}, "algorithm.low is 0.0"),
        ({"mode": "two"}, "algorithm.mode is 'two', expected 'value' or 'one'"),
        ({"rate": -1.0}, "algorithm.rate is -1.0, expected more than 0"),
        ({"significance": -1.0}, "algorithm.significance is -1.0, expected 0 or more"),
        ({"sparsity": -0.1}, "algorithm.sparsity is -0.1, expected 0 or more"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        bayestune.bayestune(MODEL, TASK, INIT, ADAM, **settings)


def test_more_ranks_fit_a_client_better():
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (10,) + (1,) * (leaf.ndim - 1)), ONE.replace(constants={}))
    method = lora.lora(MODEL, TASK, INIT, optax.adam(1e-2))
    server, losses = method.init(jax.random.key(0)), []
    for budget in (1, 4):
        own = many.replace(constants=ONE.constants | {"budget": np.int32(budget)})
        tuned = jax.jit(method.personalize)(BASE, server, (), own, jax.random.key(1))
        losses.append(
            np.mean([TASK.loss(MODEL.apply(BASE, tuned, x), y).mean() for x, y in zip(*_steps(ONE), strict=True)])
        )
    assert losses[1] < losses[0]


def _steps(batches):
    count = batches.labels.shape[0]
    inputs = [jax.tree.map(lambda leaf, step=step: leaf[step], batches.inputs) for step in range(count)]
    return inputs, [batches.labels[step] for step in range(count)]


@pytest.mark.parametrize("taught", [0, 1])
def test_the_site_that_a_teacher_changed_has_the_largest_scales(taught):
    init = functools.partial(INIT, targets="query", head="frozen")
    layout = ranks.layout(ranks.concrete(init))
    only = jnp.zeros((2, 4)).at[taught, 0].set(3.0)
    teacher = ranks.scaled(layout, random_b(init(jax.random.key(9))), only)
    many = jax.tree.map(lambda leaf: leaf[0], toy.batches(3, 1, steps=60, size=32)).replace(widths=())
    answers = jax.vmap(lambda inputs: jnp.argmax(MODEL.apply(BASE, teacher, inputs), -1))(many.inputs)
    many = many.replace(labels=answers.astype(jnp.int32), constants={"examples": np.float32(60 * 32)})
    # With the published weight of the prior all sites learn the same scale from so few examples.
    settings = bayestune.make_scales(significance=0.01)
    scales, _ = bayestune.learn_scales(
        MODEL, TASK, BASE, init(jax.random.key(0)), START[:2], ADAM, many, jax.random.key(2), layout, settings
    )
    assert int(jnp.argmax(jnp.mean(scales, axis=1))) == taught
    assert int(jnp.argmax(jnp.max(scales, axis=1))) == taught

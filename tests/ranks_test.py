"""Scores, masks and priors of ranks against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedjax_peft import adapters, ranks

BASE = toy.model().init(jax.random.key(1))
INIT = functools.partial(
    adapters.init, shapes=jax.eval_shape(lambda: BASE), rank=4, alpha=8.0, targets="all-linear", head="lora"
)
LAYOUT = ranks.layout(ranks.concrete(INIT))
SHAPE = (LAYOUT.sites, LAYOUT.rank)


def test_sites_stand_by_layer_and_the_head_last():
    assert LAYOUT.names == ("encoder.layer.0.query", "encoder.layer.1.query", "classifier")
    assert SHAPE == (3, 4) and list(LAYOUT.widths) == [toy.WIDTH, toy.WIDTH, toy.CLASSES]


def test_layers_that_targets_leave_out_have_no_row():
    layout = ranks.layout(ranks.concrete(functools.partial(INIT, targets=r".*layer\.1\.query")))
    assert layout.names == ("encoder.layer.1.query",)
    adapted = ranks.scaled(layout, INIT(jax.random.key(0)), jnp.full((1, 4), 3.0))
    np.testing.assert_array_equal(adapters.nodes(adapted)["encoder", "layer", "query"].scale, [[0] * 4, [6.0] * 4])


def test_without_lora_there_are_no_ranks():
    with pytest.raises(ValueError, match="ranks need LoRA adapters"):
        ranks.layout(ranks.concrete(functools.partial(INIT, kind="full")))


def test_scores_reach_their_sites_and_come_back():
    scores = jnp.arange(1.0, 13.0).reshape(SHAPE)
    adapted = ranks.scaled(LAYOUT, INIT(jax.random.key(0)), scores)
    np.testing.assert_array_equal(ranks.table(LAYOUT, adapted), 2.0 * scores)
    nodes = adapters.nodes(adapted)
    np.testing.assert_array_equal(nodes["encoder", "layer", "query"].scale, 2.0 * scores[:2])
    np.testing.assert_array_equal(nodes["classifier",].scale, 2.0 * scores[2])
    behind = adapters.concat(INIT(jax.random.key(1), rank=3), adapted)
    np.testing.assert_array_equal(ranks.table(LAYOUT, behind), 2.0 * scores)


def test_magnitudes_are_sums_over_outputs():
    nodes = adapters.nodes(INIT(jax.random.key(0)))
    b = jnp.arange(4 * toy.CLASSES, dtype=jnp.float32).reshape(4, -1) - 5
    nodes["classifier",] = nodes["classifier",].replace(b=b)
    found = ranks.magnitudes(LAYOUT, adapters.nest(nodes))
    np.testing.assert_array_equal(found[2], np.abs(b).sum(1))
    assert not found[:2].any()


TABLES = arrays.arrays(np.float32, (5, 6), elements=st.integers(0, 8).map(float))


@settings(max_examples=30, deadline=None)
@given(TABLES, st.integers(0, 30))
def test_top_is_what_sorting_by_score_and_index_keeps(scores, count):
    best = sorted(range(30), key=lambda index: (-scores.reshape(-1)[index], index))[:count]
    expected = np.isin(np.arange(30), best).reshape(5, 6)
    np.testing.assert_array_equal(ranks.top(jnp.asarray(scores), count), expected)


@settings(max_examples=30, deadline=None)
@given(TABLES)
def test_budgets_are_nested_exact_and_blind_to_scale(scores):
    masks = [np.asarray(ranks.top(jnp.asarray(scores), budget * 5)) for budget in (1, 2, 4, 6)]
    assert [mask.sum() for mask in masks] == [5, 10, 20, 30]
    assert all((small <= large).all() for small, large in zip(masks[:-1], masks[1:], strict=True))
    np.testing.assert_array_equal(ranks.top(jnp.asarray(scores) * 4, 10), masks[1])


def test_a_site_may_lose_all_ranks_or_keep_them():
    mask = ranks.top(jnp.array([[1.0, 1, 1], [3, 3, 3], [2, 0, 0]]), 3)
    np.testing.assert_array_equal(mask.sum(1), [0, 3, 0])


def test_the_order_of_sites_does_not_matter_without_ties():
    scores = jax.random.permutation(jax.random.key(0), jnp.arange(12.0)).reshape(SHAPE)
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(ranks.top(scores[order], 5), ranks.top(scores, 5)[order])


def test_a_budget_is_data_so_one_program_serves_all():
    top = jax.jit(ranks.top)
    for count in (1, 5, 12):
        assert top(jnp.arange(12.0).reshape(SHAPE), count).sum() == count
    assert top._cache_size() == 1


def test_published_sizes():
    sites = {"mBERT": 74, "MobileLLaMA": 168, "Llama-3.2-3B": 196}
    kept = {name: [int(ranks.top(jnp.ones((j, 32)), r * j).sum()) for r in (2, 4, 8, 16)] for name, j in sites.items()}
    assert kept["mBERT"] == [148, 296, 592, 1184]
    assert kept["MobileLLaMA"] == [336, 672, 1344, 2688]
    assert kept["Llama-3.2-3B"] == [392, 784, 1568, 3136]


def test_clamp_lets_gradients_through_outside_of_its_bounds():
    x = jnp.array([-1.0, 0.5, 2000.0])
    value, pull = jax.vjp(lambda x: ranks.clamp(x, 1e-4, 1000.0), x)
    np.testing.assert_array_equal(value, np.float32([1e-4, 0.5, 1000.0]))
    np.testing.assert_array_equal(pull(jnp.array([3.0, 4.0, 5.0]))[0], [3.0, 4.0, 5.0])


def test_priors_have_their_published_values():
    assert ranks.sparsity(jnp.array([1e-4, 0.5, 2.0])) == pytest.approx(240.79966, rel=1e-6)
    magnitude = jnp.sum(jnp.abs(jnp.array([[1.0, -2.0], [0.5, 0.0]])), 0)  # over outputs: B is written [F, R] there
    assert ranks.significance(magnitude, jnp.array([0.5, 2.0])) == pytest.approx(4.0)


def test_a_strategy_counts_ranks_and_averages_their_scales():
    scores = jnp.array([[1.0, 3, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]])
    found = ranks.strategy(LAYOUT, ranks.scaled(LAYOUT, INIT(jax.random.key(0)), scores))
    np.testing.assert_array_equal(found["ranks"], [2, 0, 4])
    np.testing.assert_allclose(found["scale"], [4.0, 0.0, 4.0])


def test_a_site_with_another_kind_of_adapter_keeps_no_ranks():
    whole = adapters.nodes(INIT(jax.random.key(0)))
    path = next(path for path in whole if not adapters.is_stacked(path))
    other = adapters.Full(jnp.zeros(()), None)
    for nodes in (whole | {path: other}, {key: node for key, node in whole.items() if key != path}):
        found = ranks.strategy(LAYOUT, adapters.nest(nodes))
        np.testing.assert_array_equal(found["ranks"], [4, 4, 0])
        assert found["scale"][2] == 0


@pytest.mark.parametrize("budget", [0, 5])
def test_a_budget_beyond_the_ranks_is_a_mistake(budget):
    with pytest.raises(ValueError, match=f"a budget is {budget} ranks a site, expected 1 to adapter.rank, which is 4"):
        ranks.check_budgets((2, budget), 4)

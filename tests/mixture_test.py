"""The mixture against numbers worked out by hand, a plain gather-and-scatter loop, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_peft import adapters, mixture
from fedjax_peft.mixture import Mixture

T, D, F, R, EXPERTS = 3, 6, 5, 2, 4
i, j, o, t = np.arange(D), np.arange(R), np.arange(F), np.arange(T)
X = np.sin(1 + 0.7 * t[:, None] + 0.3 * i).astype(np.float32)
W0 = np.cos(0.2 * o - 0.5 * i[:, None]).astype(np.float32)
A = np.stack([0.5 * np.sin(0.9 * e + 0.4 * j + 0.25 * i[:, None]) for e in range(EXPERTS + 1)]).astype(np.float32)
B = np.stack([0.3 * np.cos(0.6 * e + 0.35 * o - 0.8 * j[:, None]) for e in range(EXPERTS + 1)]).astype(np.float32)
W = 0.5 * np.cos(0.3 * j + 0.2 * i[:, None]).astype(np.float32)
SCALE = jnp.full((R,), 2.0, jnp.float32)


def known(experts=range(EXPERTS), empty=0, **changes):
    """The experts with these numbers in slots, `empty` slots behind them with garbage, and the shared one."""
    rows = [*experts, *[1] * empty]
    held = np.arange(len(rows)) < len(experts)
    return Mixture(
        shared=adapters.LoRA(jnp.asarray(A[-1]), jnp.asarray(B[-1]), SCALE),
        a=jnp.asarray(A[rows]),
        b=jnp.asarray(B[rows]),
        router=jnp.asarray(W),
        rows=None,
        scale=SCALE,
        held=jnp.asarray(held, jnp.float32),
    ).replace(**changes)


@jax.jit
def call(node, x, key=None):
    return node(x, key)


@jax.jit
def tapped(node, x):
    return node.tap(x)


@jax.jit
def loss(node, x, weights):
    return mixture.balance(node.tap(x[None]), node.held, weights)


def balance(node, x=X, weights=None):
    return float(loss(node, x, np.ones((1, len(x)), np.float32) if weights is None else weights))


def test_the_published_equations_on_known_numbers():
    node = known()
    tap = tapped(node, X)
    query = [[2.187073, 1.764529], [1.565143, 1.364526], [0.207101, 0.322766]]
    probabilities = [
        [0.113875, 0.840062, 0.045896, 0.000168],
        [0.124653, 0.602506, 0.254764, 0.018077],
        [0.200620, 0.239466, 0.278472, 0.281442],
    ]
    logits = [
        [4.483660, 6.482035, 3.574935, -2.037604],
        [1.643766, 3.219329, 2.358567, -0.287111],
        [-0.142519, 0.034481, 0.185386, 0.195995],
    ]
    outputs = [
        [4.821468, 5.896263, 6.428027, 6.397038, 5.843177],
        [4.134549, 4.613283, 4.734684, 4.500908, 3.948451],
        [1.957738, 1.569013, 1.127192, 0.666906, 0.220309],
    ]
    np.testing.assert_allclose(tap["query"], query, atol=1e-5)
    np.testing.assert_allclose(np.einsum("tur,tr->tu", tap["keys"], tap["query"]) / 2**0.5, logits, atol=1e-5)
    np.testing.assert_allclose(tap["probabilities"], probabilities, atol=1e-5)
    np.testing.assert_array_equal(tap["chosen"], [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_allclose(X @ W0 + call(node, X), outputs, atol=1e-5)
    np.testing.assert_allclose(balance(node), 1.169148, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_masks_do_what_gathering_does(top_k):
    node = known(empty=2, top_k=top_k)
    tap = tapped(node, X)
    expected = np.zeros((T, F))
    for token, x in enumerate(X):
        p = np.asarray(tap["probabilities"][token], np.float64)
        chosen = np.argsort(-p)[:top_k]
        expected[token] = 2 * x @ A[-1] @ B[-1]
        for slot in chosen:
            expected[token] += p[slot] / p[chosen].sum() * 2 * (x @ A[slot] @ B[slot])
    np.testing.assert_allclose(call(node, X), expected, rtol=1e-5, atol=1e-6)


def test_slots_may_be_permuted_and_left_empty():
    node = known()
    for other in (known([2, 0, 3, 1]), known(empty=3)):
        np.testing.assert_allclose(call(other, X), call(node, X), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(balance(other), balance(node), rtol=1e-6)
    empty = known([], empty=4)
    np.testing.assert_array_equal(call(empty, X), call(empty.shared, X))
    assert balance(empty) == 0.0


def test_experts_that_add_nothing_leave_the_base_bit_for_bit():
    node = known()
    node = node.replace(b=0 * node.b, shared=node.shared.replace(b=0 * node.shared.b))
    np.testing.assert_array_equal(X @ W0 + call(node, X), X @ W0)


def test_gradients_go_where_tokens_go():
    node, x = known(empty=1), jnp.asarray(X[:2])  # expert 3 is in nobody's top two
    trained = jax.jit(jax.grad(lambda node: jnp.sum(jnp.sin(node(x)))))(node)
    assert not trained.b[3].any() and not trained.a[3].any()
    assert all(trained.b[slot].any() and trained.a[slot].any() for slot in range(3)) and trained.router.any()
    balanced = jax.jit(jax.grad(loss))(node, x, jnp.ones((1, 2)))
    assert all(np.abs(balanced.a[slot]).max() > 1e-4 for slot in range(4)) and not balanced.b.any()
    assert not any(gradient.a[4].any() or gradient.b[4].any() for gradient in (trained, balanced))
    assert not balanced.shared.a.any() and not balanced.shared.b.any()


def test_balance_is_one_where_there_is_nothing_to_balance():
    two = known([1, 3])
    assert balance(two) == 1.0
    gradient = jax.jit(jax.grad(loss))(two, X, np.ones((1, T), np.float32))
    assert not gradient.a.any() and not gradient.router.any()
    same = known()
    same = same.replace(a=jnp.broadcast_to(same.a[:1], same.a.shape))
    tap = tapped(same, X)
    np.testing.assert_allclose(tap["probabilities"], np.full((T, EXPERTS), 0.25), rtol=1e-6)
    np.testing.assert_allclose(balance(same), 1.0, rtol=1e-6)
    np.testing.assert_allclose(balance(known(), np.concatenate([X, X])), balance(known()), rtol=1e-6)


def test_padding_does_not_count():
    node = known()
    padded = np.concatenate([X, np.full((2, D), np.nan, np.float32)])
    np.testing.assert_allclose(balance(node, padded, jnp.asarray([[1.0, 1, 1, 0, 0]])), balance(node), rtol=1e-6)
    assert balance(node, padded, jnp.zeros((1, 5))) == 0.0
    # Two examples behind pooling, of which one is padding, in a stack of two layers.
    pooled = {name: jnp.stack([value] * 2) for name, value in tapped(node, X[:2]).items()}
    stacked = mixture.balance(pooled, jnp.stack([node.held] * 2), jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(stacked, [balance(node, X[:1])] * 2, rtol=1e-6)


def test_mean_of_products_is_the_product_of_the_mean():
    node, weights = known(), jnp.asarray([[1.0, 0.0, 1.0]])
    tap = tapped(node, X[None])
    mean = X[[0, 2]].mean(0)
    np.testing.assert_allclose(mixture.token_mean(tap["query"], weights), mean @ W, rtol=1e-5, atol=1e-6)
    keys = mixture.token_mean(tap["keys"], weights, features=2)
    np.testing.assert_allclose(keys, np.einsum("d,edr->er", mean, A[:-1]), rtol=1e-5, atol=1e-6)


def test_taps_of_a_base_of_sixteen_bits_are_not_rounded_to_it():
    node, x = known(), jnp.asarray(X, jnp.bfloat16)
    tap, wide = tapped(node, x), np.asarray(x, np.float32)

    def rounded(leaf):
        return np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32)

    np.testing.assert_allclose(tap["query"], wide @ rounded(W), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tap["keys"], np.einsum("td,edr->ter", wide, rounded(A[:-1])), rtol=1e-5, atol=1e-6)
    linear = known(router=None, rows=jnp.asarray(A[:-1, :, 0]))
    logits = wide @ rounded(A[:-1, :, 0]).T
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(tapped(linear, x)["probabilities"], expected, rtol=1e-5)
    assert call(node, x).dtype == jnp.bfloat16
    by_node, by_x = jax.eval_shape(jax.grad(lambda node, x: jnp.sum(node(x).astype(jnp.float32)), (0, 1)), node, x)
    assert (by_node.a.dtype, by_node.router.dtype, by_x.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)


def test_a_linear_router_has_a_row_for_each_expert():
    rows = np.random.default_rng(0).normal(size=(EXPERTS, D)).astype(np.float32)
    node = known(router=None, rows=jnp.asarray(rows))
    logits = X @ rows.T
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    tap = tapped(node, X)
    np.testing.assert_allclose(tap["probabilities"], expected, rtol=1e-5)
    assert "keys" not in tap
    np.testing.assert_array_equal(tap["query"], X)
    first = np.argsort(-expected[0])[:2]
    routed = sum(expected[0, e] / expected[0, first].sum() * 2 * X[0] @ A[e] @ B[e] for e in first)
    np.testing.assert_allclose(call(node, X)[0], 2 * X[0] @ A[-1] @ B[-1] + routed, rtol=1e-5)


def test_dropout_spares_routing_and_differs_between_experts():
    x = jnp.asarray(np.broadcast_to(X[0], (4, 500, D)))
    apart = known(experts=[1, 1], shared=None, dropout=0.5)  # the same expert twice: gates are a half each
    np.testing.assert_array_equal(call(apart, x), call(apart.replace(dropout=0.0), x))  # none without a key
    y, full = (np.asarray(call(apart, x, key)) for key in (jax.random.key(0), None))
    np.testing.assert_allclose(y.mean((0, 1)), full[0, 0], rtol=0.05, atol=0.02)
    alone = np.asarray(call(known(experts=[1], shared=None, dropout=0.5, top_k=1), x, jax.random.key(0)))
    # Two draws that do not depend on each other halve the variance.
    np.testing.assert_allclose(y.var((0, 1)) / alone.var((0, 1)), np.full(F, 0.5), rtol=0.1)


def test_the_shared_expert_draws_as_lora_does():
    x, key = jnp.asarray(X)[None], jax.random.key(1)
    shared = known().shared.replace(dropout=0.4)
    node = known([], empty=2, shared=shared, dropout=0.4)
    np.testing.assert_array_equal(call(node, x, key), call(shared, x, key))


def test_it_sits_where_lora_does_and_cannot_be_merged():
    model = toy.model()
    base = jax.jit(model.init)(jax.random.key(0))
    made = jax.jit(lambda key: adapters.init(key, base, rank=R, targets="query", head="frozen"))(jax.random.key(1))
    node = made["encoder"]["layer"]["query"]["delta"]
    held = jnp.asarray([[1, 1, 0], [1, 1, 1]], jnp.float32)
    mixed = Mixture(node, jnp.stack([node.a] * 3, 1), jnp.stack([node.b] * 3, 1), node.a, None, node.scale, held)
    tree = adapters.nest({("encoder", "layer", "query"): mixed})
    adapters.check_sites(tree, base)
    inputs = jax.tree.map(lambda leaf: leaf[0, 0], toy.batches(0, 1).inputs)
    outputs, taps = jax.jit(model.taps)(base, tree, inputs)
    np.testing.assert_allclose(outputs, jax.jit(model.apply)(base, {}, inputs), rtol=1e-6)
    tap = taps["encoder"]["layer"]["query"]
    assert tap["probabilities"].shape == (toy.LAYERS, 4, 6, 3) and tap["mean"].shape == (toy.LAYERS, 4, 6)
    with pytest.raises(ValueError, match="cannot be merged"):
        adapters.merge(base, tree)

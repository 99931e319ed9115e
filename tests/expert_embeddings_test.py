"""Embeddings against products with whole inputs, and noise against the numbers that it should have."""

import functools

import federation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from federation import assert_close

from fedjax_peft import adapters, mixture
from fedjax_peft.algorithms import expert_embeddings
from fedjax_peft.algorithms.expert_embeddings import Noise

# Outside of what is compiled, where it would stay as a tracer.
BASE = federation.base()
MODEL, KEY, SITE, RANK = toy.model(), jax.random.key(5), ("encoder", "layer", "query"), 3
BATCHES = jax.tree.map(lambda leaf: leaf[0], federation.data(0, [4])).replace(constants={})


def mixed():
    """A client's mixture of four experts, of which the second adds something."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(5, toy.LAYERS, toy.WIDTH, RANK)).astype(np.float32)
    b, scale = np.zeros((toy.LAYERS, RANK, toy.WIDTH), np.float32), np.ones((toy.LAYERS, RANK), np.float32)
    node = mixture.bank(adapters.LoRA(draws[0], b, scale), jnp.asarray(draws), 4, top_k=2, linear=False)
    return node.replace(b=node.b.at[:, 1].set(0.1))


NODE = mixed()


@functools.partial(jax.jit, static_argnames="mask_padding")
def embedded(batches, mask_padding=True):
    settings = {"mask_padding": mask_padding, "noise": Noise()}
    return expert_embeddings.embed(MODEL, BASE, adapters.nest({SITE: NODE}), batches, KEY, **settings)


def test_embeddings_are_products_with_the_mean_input_however_texts_are_batched():
    batches, found = BATCHES, embedded(BATCHES)
    word = np.asarray(BASE["embeddings"]["word"]["embedding"])
    real = batches.inputs["mask"] & (batches.weights > 0)[..., None]
    mean = word[batches.inputs["tokens"]][real].mean(0)
    node = NODE
    client, experts = adapters.nodes(found.client)[SITE], adapters.nodes(found.experts)[SITE]
    np.testing.assert_allclose(client[0], mean @ node.router[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(experts[0], np.einsum("d,udr->ur", mean, node.a[0]), rtol=1e-4, atol=1e-6)

    def single(leaf):
        return leaf.reshape(-1, 1, *leaf.shape[2:])

    split = batches.replace(
        inputs=jax.tree.map(single, batches.inputs),
        labels=single(batches.labels),
        weights=single(batches.weights),
        width=np.zeros(batches.weights.size, np.int32),
    )
    assert_close(embedded(split), found, 1e-5)
    padded = embedded(batches, mask_padding=False)
    assert np.abs(adapters.nodes(padded.client)[SITE] - client).max() > 1e-3
    # Padding is what fills a batch up to its longest example: one example has none, whatever width it is cut to.
    assert_close(embedded(split, mask_padding=False), found, 1e-5)


def test_padding_that_counts_ends_with_the_longest_example():
    # The last example of a batch is padding, and it alone is longer than three tokens.
    shown = BATCHES.inputs["mask"] & (np.arange(6) < np.array([3, 2, 3, 6])[:, None])
    weights = BATCHES.weights * np.array([1, 1, 1, 0], np.float32)
    wide = BATCHES.replace(inputs=BATCHES.inputs | {"mask": shown}, weights=weights)
    assert shown[..., 3:].any()
    narrow = wide.replace(inputs=jax.tree.map(lambda leaf: leaf[..., :3], wide.inputs), widths=(3,))
    assert_close(embedded(wide, mask_padding=False), embedded(narrow, mask_padding=False), 1e-6)


SAMPLES = jnp.broadcast_to(jnp.arange(1.0, 9.0)[None] / 10, (4000, 8))


@functools.partial(jax.jit, static_argnames="noise")
def noisy(noise):
    return expert_embeddings.noised(SAMPLES, KEY, noise, jnp.full(4000, 1e9))


@pytest.mark.parametrize(("kind", "deviation", "length"), [("corrected", 3.0, 8.0), ("reference", 4.8990, 13.5)])
def test_noise_has_the_size_that_it_should(kind, deviation, length):
    noise = np.asarray(noisy(Noise(kind, 10.0)) - SAMPLES)
    np.testing.assert_allclose(noise.std(), deviation / 10, rtol=0.03)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=-1).mean(), length / 10, rtol=0.03)
    np.testing.assert_allclose(noise.mean(0), np.zeros(8), atol=0.03)


def test_norms_are_cut_before_and_after_the_noise():
    capped = noisy(Noise("corrected", 1.0, cap=0.5))
    assert np.linalg.norm(capped, axis=-1).max() <= 0.5 * (1 + 1e-6)
    clipped = np.asarray(noisy(Noise("corrected", 1e6, clip=0.25)))
    np.testing.assert_allclose(clipped, SAMPLES * 0.25 / np.linalg.norm(SAMPLES[0]), atol=1e-3)
    # Of the published mechanism: the mean of the first batch, the sums over tokens of the others.
    tap = {"query": jnp.ones((2, 1, 2, 3)), "keys": jnp.ones((2, 1, 2, 4, 3)), "probabilities": jnp.ones((2, 1, 2, 4))}
    batch = toy.batches(0, 1, 1, 1, 2)
    batch = jax.tree.map(lambda leaf: leaf[0, 0], batch.replace(constants={})).replace(inputs={"mask": np.ones((1, 2))})
    state = expert_embeddings._nothing(NODE)
    for longest in (3**0.5, 2 * 3**0.5):
        state = expert_embeddings._added(state, NODE, tap, batch, True)
        np.testing.assert_allclose(state[1].longest, np.full(2, longest), rtol=1e-6)

"""Minibatches of a step, and products with Hessians against the Hessians themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.flatten_util import ravel_pytree

from fedjax_peft import bilevel, trees


def batch(size: int, real: int):
    """One step of a client with `real` examples, as local.scan hands it on."""
    first = toy.batches(0, 1, steps=1, size=size).replace(constants={})
    first = jax.tree.map(lambda leaf: leaf[0, 0], first)
    return first.replace(weights=(np.arange(size) < real).astype(np.float32))


def test_parts_deal_out_examples_and_padding():
    whole = batch(6, 4)
    parts = bilevel.parts(whole, 3)
    assert [part.weights.tolist() for part in parts] == [[1, 1], [1, 0], [1, 0]]
    back = jax.tree.map(
        lambda *leaves: np.stack(leaves, 1).reshape(6, *leaves[0].shape[1:]),
        *((part.inputs, part.labels, part.weights) for part in parts),
    )
    jax.tree.map(np.testing.assert_array_equal, back, (whole.inputs, whole.labels, whole.weights))
    assert all(part.widths == whole.widths and part.width == whole.width for part in parts)


def test_parts_keep_an_axis_of_steps():
    batches = jax.tree.map(lambda leaf: leaf[0], toy.batches(0, 1, steps=2, size=4).replace(constants={}))
    for index, part in enumerate(bilevel.parts(batches, 2)):
        assert part.weights.shape == (2, 2)
        np.testing.assert_array_equal(part.inputs["tokens"], batches.inputs["tokens"][:, index::2])


def test_a_batch_smaller_than_its_parts_is_refused_with_its_size():
    with pytest.raises(ValueError, match="train.batch is 2, expected 3 or more"):
        jax.eval_shape(lambda batch: bilevel.parts(batch, 3), batch(2, 2))


@pytest.mark.parametrize(("size", "count", "real"), [(4, 2, 1), (3, 2, 1), (5, 3, 2), (3, 3, 1)])
def test_a_part_without_examples_is_the_first_one_again(size, count, real):
    first, *further = bilevel.parts(batch(size, real), count)
    assert first.weights.tolist() == [1] + [0] * (len(first.weights) - 1)
    for part in further[real - 1 :]:
        rows = len(part.weights)
        pairs = ((part.inputs, first.inputs), (part.labels, first.labels), (part.weights, first.weights))
        for found, expected in pairs:
            jax.tree.map(lambda x, y, rows=rows: np.testing.assert_array_equal(x, y[:rows]), found, expected)
    for index, part in enumerate(further[: real - 1], 1):
        np.testing.assert_array_equal(part.inputs["tokens"], batch(size, real).inputs["tokens"][index::count])


def test_each_step_is_dealt_out_by_its_own_examples():
    batches = jax.tree.map(lambda leaf: leaf[0], toy.batches(0, 1, steps=3, size=4).replace(constants={}))
    batches = batches.replace(weights=(np.arange(4) < np.array([[4], [1], [0]])).astype(np.float32))
    first, second = bilevel.parts(batches, 2)
    assert first.weights.tolist() == second.weights.tolist() == [[1, 1], [1, 0], [0, 0]]
    np.testing.assert_array_equal(second.labels[1], first.labels[1])
    np.testing.assert_array_equal(second.labels[0], batches.labels[0, 1::2])


def test_differences_are_taken_of_products_in_full_precision():
    def gradient(x):
        return jax.grad(lambda x: jnp.sum((x @ x.T) ** 2))(x)

    x = jnp.ones((2, 3))
    program = jax.jit(lambda x: bilevel.hessian_vector(gradient, x, x, how="fd")).lower(x).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST, HIGHEST" in line for line in products)


def energy(x, y):
    """Not symmetric in its arguments, and of fourth order."""
    return jnp.sum(jnp.sin(x["w"]) * (y["a"] @ y["b"])) + jnp.sum(x["w"] ** 2) * jnp.sum(y["a"] ** 2)


def drawn(seed: int):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = {"w": jax.random.normal(keys[0], (3, 2)), "none": None}
    y = {"a": jax.random.normal(keys[1], (3, 1)), "b": jax.random.normal(keys[2], (1, 2))}
    return x, y


@pytest.mark.parametrize("how", bilevel.PRODUCTS)
def test_products_are_those_with_the_whole_hessian(how):
    with jax.enable_x64(True):
        x, y = drawn(0)
        _, v = drawn(1)
        flat, unravel = ravel_pytree(y)
        direction, _ = ravel_pytree(v)
        hessian = jax.hessian(lambda flat: energy(x, unravel(flat)))(flat)
        jacobian = jax.jacobian(lambda flat: jax.grad(energy)(x, unravel(flat))["w"])(flat)
        # In y the energy is of second order, so that differences are exact but for rounding.
        for eps in (1e-2, 1e-3, 1e-4):
            plain = bilevel.hessian_vector(lambda y: jax.grad(energy, 1)(x, y), y, v, how=how, eps=eps)
            mixed = bilevel.hessian_vector(lambda y: jax.grad(energy)(x, y), y, v, how=how, eps=eps)
            assert mixed["none"] is None
            for found, expected in ((ravel_pytree(plain)[0], hessian), (mixed["w"], jacobian)):
                gap = np.linalg.norm(found - expected @ direction)
                assert gap < {"jvp": 1e-12, "fd": 1e-8}[how] * np.linalg.norm(expected @ direction)


def test_central_differences_do_not_depend_on_the_length_of_the_direction():
    x, y = drawn(0)
    _, v = drawn(1)

    def gradient(y):
        return jax.grad(energy, 1)(x, y)

    def product(length):
        return bilevel.hessian_vector(gradient, y, trees.scale(v, length), how="fd")

    exact = bilevel.hessian_vector(gradient, y, v)
    for length in (1e-12, 1.0, 1e6):
        jax.tree.map(
            lambda a, b, length=length: np.testing.assert_allclose(a, length * b, rtol=1e-3, atol=1e-3 * length),
            product(length),
            exact,
        )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(product(0.0)))


def test_differences_need_no_second_derivative():
    """A kernel whose backward pass is a kernel too, as in fused attention, which has no derivative of its own."""

    @jax.custom_vjp
    def kernel(x):
        return jnp.sin(x)

    @jax.custom_vjp
    def backward(x):
        return jnp.cos(x)

    kernel.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * backward(x),))
    backward.defvjp(lambda x: (jnp.cos(x), None), lambda kept, g: (jnp.zeros_like(g),))
    x, v = jnp.arange(3.0), jnp.array([1.0, -2.0, 0.5])

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(kernel(x) ** 2))(x)

    with pytest.raises(TypeError, match="custom_vjp"):
        bilevel.hessian_vector(gradient, x, v)
    found = bilevel.hessian_vector(gradient, x, v, how="fd")
    np.testing.assert_allclose(found, 2 * jnp.cos(2 * x) * v, rtol=1e-3, atol=1e-4)


def test_another_product_is_refused():
    with pytest.raises(ValueError, match="by 'revrev', expected one of jvp, fd"):
        bilevel.hessian_vector(lambda x: x, jnp.ones(2), jnp.ones(2), how="revrev")

"""How rates of fine-tuning change what it leads to, without going back through its steps.

Lorraine et al., Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020, arXiv 1911.02590,
Alg. 3. The end theta of a fine-tuning with a rate r_i for each tensor is taken for a solution of

    r_i g_i(theta) = c_i   for all i,     g the gradient of the training loss, c constant.

Differentiated, with H the Hessian of the training loss and v the gradient of the validation loss at theta,

    dL_val / dr_i = -<p_i, g_i> / r_i,     p = H^-1 v,     p ~ a sum_{k=0..K} (I - a H)^k v
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import bilevel, local, trees
from fedjax_peft.types import Array, Batches, PyTree

SMALLEST = 1e-6  # rate that a hypergradient is divided by


def solve(
    objective: local.Loss, end: PyTree, train: Batches, held: Batches, terms: int, rate: float
) -> tuple[Array, PyTree, PyTree]:
    """What a hypergradient is made of at the end of a fine-tuning, over all examples and without dropout.

    Args:
      objective: (params, batch, key) -> (loss, metrics); the key is None.
      end: theta.
      train, held: `[S, B, ..]` batches of the training and of the validation loss.
      terms, rate: K and a.

    Returns:
      (validation loss, p, g), the latter two in the tree of theta.
    """

    def slope(params, batch):
        return jax.grad(objective, has_aux=True)(params, batch, None)[0]

    def curvature(vector):
        def product(batch):
            return bilevel.hessian_vector(lambda params: slope(params, batch), end, vector)

        return _average(product, end, train)

    def term(carry, _):
        total, last = carry
        last = trees.subtract(last, trees.scale(curvature(last), rate))
        return (trees.add(total, last), last), None

    def validation(batch):
        (value, _), gradient = jax.value_and_grad(objective, has_aux=True)(end, batch, None)
        return value, gradient

    value, v = _average(validation, (jnp.float32(0), end), held)
    (total, _), _ = jax.lax.scan(term, (v, v), None, length=terms)
    return value, trees.scale(total, rate), _average(lambda batch: slope(end, batch), end, train)


def hypergradient(rates: Callable[[PyTree], PyTree], meta: PyTree, p: PyTree, slope: PyTree) -> PyTree:
    """dL_val / dmeta = sum_i dL_val / dr_i dr_i / dmeta.

    Args:
      rates: (meta) -> r, to be broadcast to the leaves of theta.
      meta: where.
      p, slope: of `solve`; the slope is g.
    """
    here = rates(meta)

    def product(meta):
        shares = jax.tree.map(lambda rate, now: rate / jnp.maximum(now, SMALLEST), rates(meta), here)
        return optax.tree.vdot(p, jax.tree.map(jnp.multiply, shares, slope))

    return trees.scale(jax.grad(product)(meta), -1.0)


def _average(function: Callable[[Batches], PyTree], like: PyTree, batches: Batches) -> PyTree:
    """The mean over all examples of a function that is a mean over the examples of a batch."""

    def step(carry, batch, key):
        total, weight = carry
        here = jnp.sum(batch.weights)
        return (trees.add(total, trees.scale(function(batch), here)), weight + here), {}

    key = jax.random.key(0)  # not used
    (total, weight), _ = local.scan(step, (trees.zeros_like(like), jnp.float32(0)), batches, key)
    return trees.scale(total, 1.0 / jnp.maximum(weight, 1.0))

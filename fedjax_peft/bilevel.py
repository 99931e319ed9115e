"""What methods with a step inside of a step need: independent minibatches of one batch, and second derivatives."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_peft import trees
from fedjax_peft.types import Array, Batches, PyTree

PRODUCTS = ("jvp", "fd")


def parts(batches: Batches, count: int) -> tuple[Batches, ...]:
    """Minibatches for the parts of one local step, as equal as can be: part i holds the examples i, i + count, ..

    Padding stands behind the examples of a batch, and examples of one width together, so that dealing out instead of
    cutting shares both out evenly. A part that would be without any example is the first part once more, so that each
    part of a step has a gradient; without any example in the batch all parts are padding.

    Args:
      batches: `[B, ..]` of one step, or `[S, B, ..]`.
      count: parts.

    Raises:
      ValueError: when traced, if B is smaller than that.
    """
    axis, size = batches.weights.ndim - 1, batches.weights.shape[-1]
    if size < count:
        raise ValueError(f"train.batch is {size}, expected {count} or more: a step has {count} minibatches")

    def dealt(index):
        own = (slice(None),) * axis + (slice(index, None, count),)
        return jax.tree.map(lambda leaf: leaf[own], (batches.inputs, batches.labels, batches.weights))

    def part(index):
        own = dealt(index)
        # Where a part has none, the first one has a single example, which shorter parts have room for too.
        rows = (slice(None),) * axis + (slice(own[-1].shape[-1]),)
        first = jax.tree.map(lambda leaf: leaf[rows], dealt(0))
        inputs, labels, weights = trees.where(jnp.any(own[-1] > 0, axis=-1), own, first)
        return batches.replace(inputs=inputs, labels=labels, weights=weights)

    return tuple(part(index) for index in range(count))


def hessian_vector(
    gradient: Callable[[PyTree], PyTree],
    point: PyTree,
    direction: PyTree,
    *,
    how: str = "jvp",
    eps: Array | float = 1e-2,
) -> PyTree:
    """The derivative of a gradient along a direction, a product with a Hessian that is never formed.

    With `gradient` x -> grad_x F(x) this is H v; with y -> grad_x F(x, y) it is the mixed product grad^2_xy F v, which
    has the tree of x. (Reverse over reverse would give the transpose of a mixed product: differentiate the step that
    contains the inner gradient instead.)

    Args:
      gradient: (point) -> any tree. All that it draws must be fixed: one key for all calls.
      point: where.
      direction: v, in the tree and types of `point`; not necessarily of length 1.
      how: `jvp`, forward over reverse, exact; or `fd`, central differences, for kernels without a second derivative.
      eps: of `fd`, the length of the step to both sides, d = eps / |v| in [g(y + d v) - g(y - d v)] / 2 d.

    Raises:
      ValueError: when traced, for another `how`.
    """
    if how == "jvp":
        return jax.jvp(gradient, (point,), (direction,))[1]
    if how != "fd":
        raise ValueError(f"a Hessian-vector product is asked for by {how!r}, expected one of {', '.join(PRODUCTS)}")
    # The smallest normal number, so that no direction gives no product.
    d = eps / jnp.sqrt(jnp.maximum(trees.squared_norm(direction), jnp.finfo(jnp.float32).tiny))
    step = trees.scale(direction, d)
    # Products of fewer bits, an accelerator's default, would leave little of so small a difference.
    with jax.default_matmul_precision("highest"):
        difference = trees.subtract(gradient(trees.add(point, step)), gradient(trees.subtract(point, step)))
    # Divided by d, not multiplied by its inverse, which would be rounded to float32 once more.
    return jax.tree.map(lambda leaf: leaf / (2 * d), difference)

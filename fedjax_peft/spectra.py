"""Which rank the weights of a client have, read off the factors of its adapters.

For a sum of LoRAs at one site, x -> x A diag(s) B, the singular values are those of an R x R core: with A = Q_a R_a and
B^T = Q_b R_b they are those of R_a diag(s) R_b^T. The D x F product is never formed.
"""

import jax.numpy as jnp

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import ranks
from fedjax_peft.types import Array, PyTree

RANKS = ("rank_common", "rank_personal", "rank_sum")  # columns of `describe`, one number a site


def singular_values(node: adapters_lib.LoRA) -> Array:
    """[.., R] of what a LoRA `[.., R]` adds to a kernel, largest first; one value, 0, without a rank."""
    if not node.scale.shape[-1]:
        return jnp.zeros((*node.scale.shape[:-1], 1))
    left = jnp.linalg.qr(node.a * node.scale[..., None, :], mode="r")
    right = jnp.linalg.qr(jnp.swapaxes(node.b, -1, -2), mode="r")
    # In float32 on accelerators too, whose rounding would count as further ranks.
    core = jnp.matmul(left, jnp.swapaxes(right, -1, -2), precision="highest")
    return jnp.linalg.svd(core, compute_uv=False)


def numerical_rank(values: Array, tolerance: float) -> Array:
    """[..] how many of the singular values `[.., R]` exceed `tolerance` times the largest; 0 if all are 0."""
    largest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.sum((values > tolerance * largest) & (values > 0), axis=-1, dtype=jnp.int32)


def describe(layout: ranks.Layout, adapters: PyTree, tolerance: float) -> dict[str, Array]:
    """Numerical ranks and singular values at each site.

    Args:
      layout: of the common adapters, R ranks a site.
      adapters: of one client: the common ones alone, or `adapters.concat` of them and personal ones.
      tolerance: see `numerical_rank`.

    Returns:
      `rank_common`, `rank_personal`, `rank_sum` int32 [J] and `singular_common`, `singular_personal`, `singular_sum`
      float32 [J, ..]; without a personal adapter its rank is 0 and it has one singular value, 0.
    """
    nodes = adapters_lib.nodes(adapters)
    found: dict[str, list[Array]] = {}
    for path in layout.paths:
        for name, part in levels(nodes[path], layout.rank).items():
            values = singular_values(part)
            found.setdefault(name, []).append(values.reshape(-1, values.shape[-1]))
    described = {}
    for name, rows in found.items():
        width = max(row.shape[-1] for row in rows)
        values = jnp.concatenate([_padded(row, width) for row in rows])[layout.order]
        described |= {f"rank_{name}": numerical_rank(values, tolerance), f"singular_{name}": values}
    return described


def levels(node: adapters_lib.LoRA, rank: int) -> dict[str, adapters_lib.LoRA]:
    """{common, personal, sum}: a LoRA taken apart into its first `rank` ranks and the others."""

    def only(own):
        return node.replace(a=node.a[..., own], b=node.b[..., own, :], scale=node.scale[..., own])

    return {"common": only(slice(rank)), "personal": only(slice(rank, None)), "sum": node}


def _padded(values: Array, width: int) -> Array:
    # A site with fewer inputs or outputs than ranks has fewer singular values.
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])

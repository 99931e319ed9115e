"""Activation statistics of a client's texts: mean and deviation of the input of every Linear of the base.

FedP2EFT (Lee et al., arXiv 2502.04387) describes a client by them. They are pooled over all elements of an input,
examples x tokens x features, so a Linear gives two numbers. A head of next tokens is one, whether it has weights of its
own or is tied to the embedding.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fedjax_peft import adapters
from fedjax_peft.types import Array, Model, PyTree


def moments(model: Model, base: PyTree, inputs: PyTree, weights: Array, *, mask_padding: bool = True) -> Array:
    """What one batch has to say.

    Args:
      inputs: of the model, `[B, T]` each.
      weights: [B] 0 for padding examples, which never count.
      mask_padding: leave padding tokens out; otherwise they count like others, as in the published code.

    Returns:
      [I, 3] number of elements, mean and sum of squared deviations of the input of each of I Linears.
    """
    taps = traverse_util.flatten_dict(model.taps(base, {}, inputs)[1])
    kernels = _kernels(model)
    real = (weights > 0).astype(jnp.float32)
    tokens = real[:, None] * (inputs["mask"] if mask_padding else jnp.ones_like(inputs["mask"]))
    rows = []
    for path, kernel in kernels:
        mean, square = (taps[(*path, name)] for name in ("mean", "square"))
        # Behind pooling an example counts as one.
        stacked = len(kernel.shape) - 2
        counted = tokens if mean.ndim - stacked == 2 else real
        axes = tuple(range(stacked, mean.ndim))
        count = jnp.broadcast_to(jnp.sum(counted), mean.shape[:stacked])
        mean = jnp.where(counted > 0, mean, 0.0)
        average = jnp.sum(mean, axes) / jnp.maximum(count, 1.0)
        centre = average.reshape(average.shape + (1,) * len(axes))
        spread = jnp.sum(jnp.where(counted > 0, square - 2 * centre * mean + centre**2, 0.0), axes)
        features = kernel.shape[-2]
        rows.append(jnp.stack([count * features, average, spread * features], -1).reshape(-1, 3))
    return jnp.concatenate(rows)[_order(kernels)]


def vector(parts: Sequence[np.ndarray], *, dtype: str = "float32", quantity: float | None = None) -> np.ndarray:
    """[2 I] mean_1, sqrt(variance_1 + 1e-5), mean_2, .. over all elements, whatever batches they came in.

    Args:
      parts: `moments` of each batch.
      dtype: numbers are rounded to after each merge; `float32` merges in float64 and rounds once.
      quantity: number of examples, whose logarithm becomes one more entry; None leaves it out.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"algorithm.tap_dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
    kept = jnp.dtype("float64") if dtype == "float32" else jnp.dtype(dtype)
    count, mean, variance = (np.zeros(len(parts[0])) for _ in range(3))
    for part in parts:
        more, other, spread = np.asarray(part, np.float64).T
        if not more.any():
            continue
        total, difference = count + more, other - mean
        m2 = variance * np.maximum(count - 1, 0) + spread + difference**2 * count * more / total
        mean = (mean + difference * more / total).astype(kept).astype(np.float64)
        variance = (m2 / np.maximum(total - 1, 1)).astype(kept).astype(np.float64)
        count = total
    x = np.stack([mean, np.sqrt(variance + 1e-5)], -1).reshape(-1)
    x = x if quantity is None else np.append(x, np.log(quantity))
    return x.astype(kept).astype(np.float32)


def size(model: Model) -> int:
    """2 I: entries of `vector` without the quantity."""
    return 2 * len(_order(_kernels(model)))


def _kernels(model: Model) -> list:
    sites = adapters.sites(jax.eval_shape(model.init, jax.random.key(0)))
    kernels = [(site.path, site.params["kernel"]) for site in sites if site.is_dense]
    tables = [(site.path, site.params["embedding"]) for site in sites if site.path == model.tied]
    return kernels + [(path, jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)) for path, table in tables]


def _order(kernels: list) -> np.ndarray:
    """Layers one after the other, what lies behind them last, as ranks.layout has it."""
    rows = []
    for path, kernel in kernels:
        layers = kernel.shape[0] if adapters.is_stacked(path) else 1
        rows += [(not adapters.is_stacked(path), layer, path) for layer in range(layers)]
    return np.array(sorted(range(len(rows)), key=rows.__getitem__))

"""Layers that know of adapters. Everything that is trained reaches a model through these four.

A layer looks into the variable collection `adapters` at its own path for a callable pytree named `delta` and adds what
it returns: `y + delta(x, key)`. Which method put it there, and what it computes, no model knows. `key` is None where no
randomness was asked for.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_peft.types import Array

Dtype = Any


class Dense(nn.Module):
    """`y = x W + b + delta(x)`, or without `b`, the only site of adapters for linears: [.., D] -> [.., F].

    If the collection `taps` is mutable, the moments of the input are left there: `mean` and `square`, each averaged
    over features, float32 with the shape [..] of the input without features; and beside them the arrays that an
    adapter with a method `tap` makes of the input, {name: [.., ..]}.
    """

    features: int
    dtype: Dtype = jnp.float32
    """Of the computation."""
    param_dtype: Dtype = jnp.float32
    """Of the stored kernel and bias."""
    stddev: float = 0.02
    """Of the kernel's normal initialisation."""
    biased: bool = True
    out_dtype: Dtype | None = None
    """Of the result and its sums; None is `dtype`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.stddev), shape, self.param_dtype)
        if self.is_mutable_collection("taps"):
            _put_moments(self, x)
            delta = self.get_variable("adapters", "delta") if self.has_variable("adapters", "delta") else None
            for name, value in delta.tap(x.astype(self.dtype)).items() if hasattr(delta, "tap") else ():
                self.put_variable("taps", name, value)
        x = x.astype(self.dtype)
        y = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=self.out_dtype)
        if self.biased:
            y += _along_last(self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype), y)
        return _with_delta(self, x, y)


class Embed(nn.Module):
    """Rows of a table, plus `delta(ids)`: [..] integers -> [.., D]. An id outside of the table gives NaN."""

    rows: int
    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    stddev: float = 0.02

    def setup(self) -> None:
        shape = (self.rows, self.features)
        self.embedding = self.param("embedding", nn.initializers.normal(self.stddev), shape, self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        return _with_delta(self, ids, jnp.take(self.embedding, ids, axis=0).astype(self.dtype))

    def attend(self, x: Array) -> Array:
        """Products with every row, deltas of rows included, as a head that is tied to the table: [.., D] -> [.., V]
        float32. It leaves the taps of a Dense."""
        if self.is_mutable_collection("taps"):
            _put_moments(self, x)
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        table = self.embedding.astype(self.dtype)
        y = jax.lax.dot_general(x.astype(self.dtype), table, contract, preferred_element_type=jnp.float32)
        if self.has_variable("adapters", "delta"):
            rows = self.get_variable("adapters", "delta")(jnp.arange(self.rows, dtype=jnp.int32))
            y += jax.lax.dot_general(x.astype(rows.dtype), rows, contract, preferred_element_type=jnp.float32)
        return y


class LayerNorm(nn.Module):
    """Normalisation over features in float32, plus `delta` of the normalised input: [.., D] -> [.., D]."""

    epsilon: float
    dtype: Dtype = jnp.float32
    """Of the result; parameters are float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        y = x * _along_last(scale, x) + _along_last(bias, x)
        return _with_delta(self, x, y).astype(self.dtype)


class RMSNorm(nn.Module):
    """Division by the root of the mean square over features in float32, plus `delta` of the result before it is
    scaled: [.., D] -> [.., D]."""

    epsilon: float
    dtype: Dtype = jnp.float32
    """Of the result; parameters are float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        return _with_delta(self, x, x * _along_last(scale, x)).astype(self.dtype)


def dropped(module: nn.Module, rate: float, x: Array, *token_axes: int) -> Array:
    """Dropout of `x` if the module was given a `dropout` key.

    Token axes lead in the draw, so that a batch cut to fewer tokens drops the same of those that it keeps: results must
    not depend on the width that a batch is padded to. Of two token axes each row of the first has a key of its own.
    """
    if not rate or not module.has_rng("dropout"):
        return x
    key = module.make_rng("dropout")
    shape = jnp.moveaxis(x, token_axes, range(len(token_axes))).shape
    if len(token_axes) == 2:
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(shape[0]))
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape[1:]))(keys)
    else:
        kept = jax.random.bernoulli(key, 1 - rate, shape)
    kept = jnp.moveaxis(kept, range(len(token_axes)), token_axes)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def check_head(head: str, known: Collection[str], labels: int, dropout: float) -> None:
    """Raises ValueError for a head that a model does not have, or numbers that no model can have."""
    if head not in known:
        raise ValueError(f"head is {head!r}, expected one of {', '.join(known)}")
    if head == "classification" and labels < 1:
        raise ValueError(f"labels is {labels}, expected at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected at least 0 and below 1")


def _put_moments(module: nn.Module, x: Array) -> None:
    wide = x.astype(jnp.float32)
    module.put_variable("taps", "mean", jnp.mean(wide, -1))
    module.put_variable("taps", "square", jnp.mean(jnp.square(wide), -1))


def _with_delta(module: nn.Module, x: Array, y: Array) -> Array:
    if not module.has_variable("adapters", "delta"):
        return y
    key = module.make_rng("dropout") if module.has_rng("dropout") else None
    return y + module.get_variable("adapters", "delta")(x, key).astype(y.dtype)


def _along_last(vector: Array, like: Array) -> Array:
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))

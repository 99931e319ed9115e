"""What decoders share: who attends to whom, the cache of keys and values, heads, and the functions of a model.

Texts may be padded on either side. Positions count the real tokens that a token sees, so padding moves nothing. A row
of padding attends to whatever there is, evenly: its output means nothing, but it is finite. A text may fork: tokens of
a `branch` see those of the text before it, branch 0, and of their own branch, as if no other were there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from fedjax_peft.models import layers, network
from fedjax_peft.types import Array, Model, PyTree

HEADS = ("lm", "classification")
POOLS = ("last",)


@struct.dataclass
class Cache:
    """Keys and values of the tokens so far, in slots whose number never changes."""

    keys: Array  # [L, B, H, slots, D]
    values: Array  # [L, B, H, slots, D]
    mask: Array  # [B, slots] bool: slots that hold a real token
    filled: Array  # [] int32: slots in use, the same for all rows


class View(NamedTuple):
    """What tokens see of each other and of the cache, the same in every layer."""

    positions: Array  # [B, T] int32
    bias: Array  # [B, 1, 1, T, T] float32 for scores of these tokens
    past: Array | None  # [B, 1, 1, 1, slots] float32 for scores of cached ones


def view(inputs: Mapping[str, Array], cache: Cache | None) -> View:
    """Args: inputs with the `mask` [B, T] of tokens that come after those of the cache, and `branch` if some fork."""
    mask = inputs["mask"]
    tokens = mask.shape[1]
    before = 0 if cache is None else jnp.sum(cache.mask, 1, keepdims=True, dtype=jnp.int32)
    seen = mask[:, None, :] & jnp.tril(jnp.ones((tokens, tokens), bool))[None]
    if "branch" in inputs:
        branch = inputs["branch"]
        seen &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    positions = jnp.maximum(jnp.sum(seen, 2, dtype=jnp.int32) + before - 1, 0)
    past = None if cache is None else _bias(cache.mask)[:, None, None, None, :]
    return View(positions, _bias(seen)[:, None, None], past)


def attend(module: nn.Module, rate: float, query: Array, key: Array, value: Array, seen: View, past: Any) -> Array:
    """Attention in which H heads of keys and values are shared by groups of query heads.

    Args:
      module: whose dropout key is used.
      rate: probability with which a weight is dropped.
      query: [B, T, H * G, D].
      key, value: [B, H, T, D].
      seen: of these tokens.
      past: cached keys and values [B, H, slots, D], or None.

    Returns:
      [B, T, H * G * D].
    """
    batch, heads, tokens, size = key.shape
    # A group is more rows of one plain batched product: keys and values are never repeated.
    query = query.reshape(batch, tokens, heads, -1, size).transpose(0, 2, 3, 1, 4)
    groups = query.shape[2]
    rows = query.reshape(batch, heads, groups * tokens, size)

    def scores(key, bias):
        found = jnp.matmul(rows, key.swapaxes(2, 3), preferred_element_type=jnp.float32) * size**-0.5
        return found.reshape(batch, heads, groups, tokens, -1) + bias

    def mixed(weights, value):
        return weights.reshape(batch, heads, groups * tokens, -1) @ value

    if past is None:
        weights = jax.nn.softmax(scores(key, seen.bias)).astype(query.dtype)
        result = mixed(layers.dropped(module, rate, weights, 3, 4), value)
    else:
        # Two products and no joined copy of the cache.
        slots = past[0].shape[2]
        joined = jnp.concatenate([scores(past[0], seen.past), scores(key, seen.bias)], -1)
        weights = jax.nn.softmax(joined).astype(query.dtype)
        result = mixed(weights[..., :slots], past[1]) + mixed(weights[..., slots:], value)
    return result.reshape(batch, heads, groups, tokens, size).transpose(0, 3, 1, 2, 4).reshape(batch, tokens, -1)


class Network(nn.Module):
    """Token ids to the output of one head; with a cache to (logits, longer cache)."""

    settings: Any
    labels: int
    head: str
    decoder: type[nn.Module]
    trunk: str
    """The decoder's name."""

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array], cache: Cache | None = None) -> PyTree:
        s = self.settings
        decoder = self.decoder(s, name=self.trunk)
        x, fresh = decoder(inputs, cache)
        if self.head == "classification":
            x = last(x, inputs["mask"]).astype(jnp.float32)
            return layers.Dense(self.labels, stddev=s.stddev, biased=False, name="score")(x)
        x = chosen(x, inputs)
        if s.tied:
            logits = decoder.attend(x)
        else:
            head = layers.Dense(s.vocabulary, s.dtype, s.dtype, s.stddev, False, jnp.float32, name="lm_head")
            logits = head(x)
        return logits if cache is None else (logits, extended(cache, fresh, inputs["mask"]))


def stack(layer: type[nn.Module], settings: Any) -> nn.Module:
    """All layers as one module: (x [B, T, D], past of each layer or None, view) -> (x, keys and values of each)."""
    return network.stack(layer, settings, in_axes=(0, nn.broadcast))(settings)


def extended(cache: Cache, fresh: tuple[Array, Array], mask: Array) -> Cache:
    """The cache with the keys and values [L, B, H, T, D] of further tokens."""
    if mask.shape[1] > cache.mask.shape[1]:
        raise ValueError(f"{mask.shape[1]} tokens do not fit into a cache of {cache.mask.shape[1]} slots")
    start = cache.filled
    keys, values = (
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, 0, start, 0))
        for old, new in zip((cache.keys, cache.values), fresh, strict=True)
    )
    return Cache(keys, values, jax.lax.dynamic_update_slice(cache.mask, mask, (0, start)), start + mask.shape[1])


def chosen(x: Array, inputs: Mapping[str, Array]) -> Array:
    """States [B, P, D] of the tokens whose logits are wanted."""
    return jnp.take_along_axis(x, inputs["chosen"][..., None], 1) if "chosen" in inputs else x


def last(x: Array, mask: Array) -> Array:
    """State [B, D] of each row's last real token."""
    place = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1)
    return jnp.take_along_axis(x, place[:, None, None], 1)[:, 0]


def check(labels: int, pool: str, head: str, dropout: float) -> None:
    """Raises ValueError for what no decoder has."""
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}, expected 'last', the state of the last token, for a causal model")
    layers.check_head(head, HEADS, labels, dropout)


def model(whole: Network, cache: tuple[int, int, int], words: str) -> Model:
    """The functions of a network; a classifier has none of decoding.

    Args:
      whole: the network.
      cache: L, heads of keys, D.
      words: name of the decoder's table of words.
    """
    settings = whole.settings

    def init_cache(batch, slots):
        network.check_length(slots, settings.positions)
        depth, heads, size = cache
        empty = jnp.zeros((depth, batch, heads, slots, size), settings.dtype)
        return Cache(empty, empty, jnp.zeros((batch, slots), bool), jnp.int32(0))

    def decode(base, adapters, cache: PyTree, inputs):
        return whole.apply({"params": base, "adapters": adapters}, inputs, cache)

    functions = network.functions(whole, settings.positions)
    if whole.head != "lm":
        return Model(*functions)
    return Model(*functions, init_cache, decode, tied=(whole.trunk, words) if settings.tied else ())


def _bias(seen: Array) -> Array:
    # Large but finite: a row of padding may see nothing, and its softmax must not be NaN.
    return jnp.where(seen, jnp.float32(0), jnp.float32(-1e30))

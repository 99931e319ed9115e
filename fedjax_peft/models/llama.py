"""Llama 2 and 3, MobileLLaMA, SmolLM2, Qwen 2 and 2.5: one decoder; parameter paths are Hugging Face's module names.

Touvron et al., "Llama 2", 2023, arXiv 2307.09288. Grattafiori et al., "The Llama 3 Herd of Models", 2024,
arXiv 2407.21783. Yang et al., "Qwen2 Technical Report", 2024, arXiv 2407.10671.

All layers are one module whose parameters carry a leading axis: `model/layers/self_attn/q_proj/kernel` [L, D, F] stands
for the L modules `model.layers.{i}.self_attn.q_proj`. A head that is tied to the embedding has no parameters and so is
no site.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedjax_peft.models import causal, layers, network, tables
from fedjax_peft.types import Array, Model, PyTree

TYPES = ("llama", "qwen2")
"""Values of `model_type` in a `config.json` that are read here."""
ROPES = ("default", "linear", "llama3")

TABLE = tables.Table(
    prefixes=(),
    rules=(
        (r"(?:model/)?embed_tokens/weight", "model/embed_tokens/embedding", tables.as_is),
        (r"(?:model/)?(norm|layers/.*layernorm)/weight", r"model/\1/scale", tables.as_is),
        (r"(?:model/)?(layers/.*)/weight", r"model/\1/kernel", tables.transposed),
        (r"(?:model/)?(layers/.*)/bias", r"model/\1/bias", tables.as_is),
        (r"(lm_head|score)/weight", r"\1/kernel", tables.transposed),
    ),
    stack="(?:model/)?layers",
    words="model/embed_tokens/embedding|lm_head/kernel",
    optional=("lm_head/.*", "score/.*"),
    ignored=(r".*rotary_emb/inv_freq",),
    fresh=("score/.*",),
)
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_COUNTS += ("max_position_embeddings",)


class Settings(NamedTuple):
    """A `config.json` in this file's words; L, heads and sizes of the axes."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    shared: int
    """Heads of keys and values, each of which serves heads / shared queries."""
    size: int
    """Of a head."""
    inner: int
    positions: int
    frequencies: tuple[float, ...]
    """[size / 2] radians a position."""
    biased: bool
    """Whether queries, keys and values have biases; nothing else has."""
    tied: bool
    epsilon: float
    stddev: float
    dropout: float
    dtype: Any
    scan: bool
    remat: bool


def llama(
    config: Mapping[str, Any],
    *,
    labels: int = 0,
    pool: str = "last",
    head: str = "lm",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    scan: bool = True,
    remat: bool = False,
) -> Model:
    """Decoder with a head.

    Args:
      config: fields of a Hugging Face `config.json` whose `model_type` is one of `TYPES`.
      labels: K, the classes of a classifier; not read by other heads.
      pool: `last`, the state of the last token, is all that a classifier reads.
      head: `lm` gives logits [B, T, V] of the next token, or [B, P, V] of the tokens at `chosen` [B, P] if the inputs
        have that; `classification` gives logits [B, K] (`score`). All float32.
      dropout: probability for attention weights, the only ones that this family drops, where `apply` is given a key.
      dtype: of storage and computation; norms, rotations, softmax and the classifier stay float32, logits are summed
        in float32.
      scan: run layers in a loop (compile time does not grow with L) or unrolled (faster on CPU). Same parameters.
      remat: compute each layer again in the backward pass instead of keeping its activations.

    Raises:
      ValueError: for a config that this decoder cannot follow, or an unknown `pool` or `head`.
    """
    causal.check(labels, pool, head, dropout)
    s = settings(config, dropout, dtype, scan, remat)
    return causal.model(causal.Network(s, labels, head, Decoder, "model"), (s.layers, s.shared, s.size), "embed_tokens")


def settings(config: Mapping[str, Any], dropout: float, dtype: Any, scan: bool, remat: bool) -> Settings:
    """Checks a `config.json`; fields that it does not name have Hugging Face's defaults.

    Raises:
      ValueError: for the first field that this decoder cannot follow.
    """
    expected = {"model_type": TYPES, "hidden_act": ("silu",), "mlp_bias": (False,), "attention_bias": (False,)}
    expected |= {"partial_rotary_factor": (1.0,)}
    network.check_config(config, expected, _COUNTS)
    _check_windows(config)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    shared = config.get("num_key_value_heads") or heads
    if width % heads and not config.get("head_dim"):
        raise ValueError(f"config field hidden_size is {width}, expected a multiple of {heads} attention heads")
    if heads % shared:
        raise ValueError(f"config field num_key_value_heads is {shared}, expected a divisor of {heads} attention heads")
    size = config.get("head_dim") or width // heads
    if size % 2:
        raise ValueError(f"config field head_dim is {size}, expected an even number, as rotations turn pairs")
    return Settings(
        vocabulary=config["vocab_size"],
        width=width,
        layers=config["num_hidden_layers"],
        heads=heads,
        shared=shared,
        size=size,
        inner=config["intermediate_size"],
        positions=config["max_position_embeddings"],
        frequencies=frequencies(config, size),
        biased=config.get("model_type") == "qwen2",
        tied=bool(config.get("tie_word_embeddings")),
        epsilon=config.get("rms_norm_eps", 1e-6),
        stddev=config.get("initializer_range", 0.02),
        dropout=dropout,
        dtype=jnp.dtype(dtype),
        scan=scan,
        remat=remat,
    )


def frequencies(config: Mapping[str, Any], size: int) -> tuple[float, ...]:
    """Radians a position of each pair of features (Su et al., arXiv 2104.09864), scaled for longer texts.

    `linear` divides all by `factor`; `llama3` divides slow ones by it, keeps fast ones and blends between, by how many
    turns they make in the `original_max_position_embeddings`.

    Args:
      config: with `rope_parameters`, or `rope_scaling` and `rope_theta`.
      size: of a head.

    Raises:
      ValueError: for another scaling, or one without its numbers.
    """
    place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(place) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise ValueError(f"config field {place} has the type {kind!r}, expected {', '.join(ROPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config field {place} has partial_rotary_factor {rope['partial_rotary_factor']}, expected 1")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    plain = float(theta) ** -(np.arange(0, size, 2) / size)
    needed = {"default": (), "linear": ("factor",)}.get(kind, ("factor", "low_freq_factor", "high_freq_factor"))
    needed += ("original_max_position_embeddings",) if kind == "llama3" else ()
    lost = [name for name in needed if not isinstance(rope.get(name), int | float)]
    if lost:
        raise ValueError(f"config field {place} of the type {kind!r} lacks {', '.join(lost)}")
    kept = np.float64(kind == "default")
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    kept = np.clip(kept, 0, 1)
    return tuple((plain * (kept + (1 - kept) / rope.get("factor", 1.0))).tolist())


class Decoder(nn.Module):
    """({tokens [B, T], ..}, cache) -> states [B, T, D], and keys and values [L, B, H, T, D] if there is a cache."""

    settings: Settings

    def setup(self) -> None:
        s = self.settings
        self.embed_tokens = layers.Embed(s.vocabulary, s.width, s.dtype, s.dtype, s.stddev)
        self.layers = causal.stack(Layer, s)
        self.norm = layers.RMSNorm(s.epsilon, s.dtype)

    def __call__(self, inputs: Mapping[str, Array], cache: causal.Cache | None) -> tuple[Array, PyTree]:
        seen = causal.view(inputs, cache)
        angles = seen.positions[..., None].astype(jnp.float32) * jnp.asarray(self.settings.frequencies)[None, None]
        turn = (jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None])
        past = None if cache is None else (cache.keys, cache.values)
        x, fresh = self.layers(self.embed_tokens(inputs["tokens"]), past, (seen, turn))
        return self.norm(x), fresh

    def attend(self, x: Array) -> Array:
        return self.embed_tokens.attend(x)


class Layer(nn.Module):
    """One transformer layer with norms before its two parts; the pair is what `nn.scan` carries and stacks."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, past: PyTree, shared: tuple) -> tuple[Array, PyTree]:
        s = self.settings
        mixed, fresh = Attention(s, name="self_attn")(_norm(s, "input_layernorm")(x), past, *shared)
        x = x + mixed
        return x + MLP(s, name="mlp")(_norm(s, "post_attention_layernorm")(x)), fresh


class Attention(nn.Module):
    """[B, T, D] -> [B, T, D], and keys and values [B, H, T, D] where there is a cache."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, past: PyTree, seen: causal.View, turn: tuple[Array, Array]) -> tuple[Array, PyTree]:
        s = self.settings
        query, key, value = (
            _dense(s, heads * s.size, name, biased=s.biased)(x).reshape(*x.shape[:2], heads, s.size)
            for name, heads in (("q_proj", s.heads), ("k_proj", s.shared), ("v_proj", s.shared))
        )
        key, value = _turned(key, turn).swapaxes(1, 2), value.swapaxes(1, 2)
        mixed = causal.attend(self, s.dropout, _turned(query, turn), key, value, seen, past)
        return _dense(s, s.width, "o_proj")(mixed), None if past is None else (key, value)


class MLP(nn.Module):
    settings: Settings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.settings
        gate = jax.nn.silu(_dense(s, s.inner, "gate_proj")(x))
        return _dense(s, s.width, "down_proj")(gate * _dense(s, s.inner, "up_proj")(x))


def _turned(x: Array, turn: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + D / 2) of each head: x [B, T, H, D], cosines and sines [B, T, 1, D / 2]."""
    cosine, sine = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)


def _check_windows(config: Mapping[str, Any]) -> None:
    """Sliding windows are fine where no text is longer or no layer has one."""
    kinds = config.get("layer_types")
    slides = config.get("max_window_layers", 28) < config["num_hidden_layers"]
    slides = any(kind != "full_attention" for kind in kinds) if kinds else slides
    window = config.get("sliding_window") or config["max_position_embeddings"]
    if config.get("use_sliding_window") and slides and window < config["max_position_embeddings"]:
        raise ValueError(f"config field sliding_window is {window}, expected no layer with sliding attention")


def _dense(s: Settings, features: int, name: str, biased: bool = False, **keywords) -> layers.Dense:
    return layers.Dense(features, s.dtype, s.dtype, s.stddev, biased, name=name, **keywords)


def _norm(s: Settings, name: str) -> layers.RMSNorm:
    return layers.RMSNorm(s.epsilon, s.dtype, name=name)

"""GPT-2: a decoder whose parameter paths are Hugging Face's module names; the fused `c_attn` stays one site.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

All layers are one module whose parameters carry a leading axis: `transformer/h/attn/c_attn/kernel` [L, D, 3 D] stands
for the L modules `transformer.h.{i}.attn.c_attn`. A head that is tied to the embedding has no parameters and so is no
site.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_peft.models import causal, layers, network, tables
from fedjax_peft.types import Array, Model, PyTree

TYPES = ("gpt2",)
"""Values of `model_type` in a `config.json` that are read here."""

TABLE = tables.Table(
    prefixes=(),
    rules=(
        (r"(?:transformer/)?(w[tp]e)/weight", r"transformer/\1/embedding", tables.as_is),
        (r"(?:transformer/)?(ln_f|h/ln_[12])/weight", r"transformer/\1/scale", tables.as_is),
        # Conv1D keeps [in, out], as we do.
        (r"(?:transformer/)?(h/.*)/weight", r"transformer/\1/kernel", tables.as_is),
        (r"(?:transformer/)?(ln_f|h/.*)/bias", r"transformer/\1/bias", tables.as_is),
        (r"(lm_head|score)/weight", r"\1/kernel", tables.transposed),
    ),
    stack="(?:transformer/)?h",
    words="transformer/wte/embedding|lm_head/kernel",
    optional=("lm_head/.*", "score/.*"),
    ignored=(r".*/attn/(?:masked_)?bias",),
    fresh=("score/.*",),
)


class Settings(NamedTuple):
    """A `config.json` in this file's words; L, heads and sizes of the axes."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    positions: int
    tied: bool
    epsilon: float
    stddev: float
    dropout: float
    dtype: Any
    scan: bool
    remat: bool


def gpt2(
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
      config: fields of a Hugging Face `config.json` of the `model_type` gpt2.
      labels, pool, head, dtype, scan, remat: as in `llama.llama`.
      dropout: probability for embeddings, attention weights and what each part adds, used where `apply` is given a key.

    Raises:
      ValueError: for a config that this decoder cannot follow, or an unknown `pool` or `head`.
    """
    causal.check(labels, pool, head, dropout)
    s = settings(config, dropout, dtype, scan, remat)
    cache = (s.layers, s.heads, s.width // s.heads)
    return causal.model(causal.Network(s, labels, head, Decoder, "transformer"), cache, "wte")


def settings(config: Mapping[str, Any], dropout: float, dtype: Any, scan: bool, remat: bool) -> Settings:
    """Checks a `config.json`; fields that it does not name have Hugging Face's defaults.

    Raises:
      ValueError: for the first field that this decoder cannot follow.
    """
    # Two names of one function: the approximation of gelu by tanh.
    expected = {"model_type": TYPES, "activation_function": ("gelu_new", "gelu_pytorch_tanh")}
    expected |= {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
    expected |= {"add_cross_attention": (False,)}
    network.check_config(config, expected, ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"))
    width, heads = config["n_embd"], config["n_head"]
    if width % heads:
        raise ValueError(f"config field n_embd is {width}, expected a multiple of {heads} attention heads")
    return Settings(
        vocabulary=config["vocab_size"],
        width=width,
        layers=config["n_layer"],
        heads=heads,
        inner=config.get("n_inner") or 4 * width,
        positions=config["n_positions"],
        tied=config.get("tie_word_embeddings", True),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        stddev=config.get("initializer_range", 0.02),
        dropout=dropout,
        dtype=jnp.dtype(dtype),
        scan=scan,
        remat=remat,
    )


class Decoder(nn.Module):
    """({tokens [B, T], ..}, cache) -> states [B, T, D], and keys and values [L, B, H, T, D] if there is a cache."""

    settings: Settings

    def setup(self) -> None:
        s = self.settings
        self.wte = layers.Embed(s.vocabulary, s.width, s.dtype, s.dtype, s.stddev)
        self.wpe = layers.Embed(s.positions, s.width, s.dtype, s.dtype, s.stddev)
        self.h = causal.stack(Layer, s)
        self.ln_f = layers.LayerNorm(s.epsilon, s.dtype)

    def __call__(self, inputs: Mapping[str, Array], cache: causal.Cache | None) -> tuple[Array, PyTree]:
        seen = causal.view(inputs, cache)
        x = layers.dropped(self, self.settings.dropout, self.wte(inputs["tokens"]) + self.wpe(seen.positions), 1)
        x, fresh = self.h(x, None if cache is None else (cache.keys, cache.values), seen)
        return self.ln_f(x), fresh

    def attend(self, x: Array) -> Array:
        return self.wte.attend(x)


class Layer(nn.Module):
    """One transformer layer with norms before its two parts; the pair is what `nn.scan` carries and stacks."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, past: PyTree, seen: causal.View) -> tuple[Array, PyTree]:
        s = self.settings
        mixed, fresh = Attention(s, name="attn")(layers.LayerNorm(s.epsilon, s.dtype, name="ln_1")(x), past, seen)
        x = x + layers.dropped(self, s.dropout, mixed, 1)
        inner = MLP(s, name="mlp")(layers.LayerNorm(s.epsilon, s.dtype, name="ln_2")(x))
        return x + layers.dropped(self, s.dropout, inner, 1), fresh


class Attention(nn.Module):
    """[B, T, D] -> [B, T, D], and keys and values [B, H, T, D] where there is a cache."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, past: PyTree, seen: causal.View) -> tuple[Array, PyTree]:
        s = self.settings
        query, key, value = (
            part.reshape(*x.shape[:2], s.heads, -1) for part in jnp.split(_dense(s, 3 * s.width, "c_attn")(x), 3, -1)
        )
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        mixed = causal.attend(self, s.dropout, query, key, value, seen, past)
        return _dense(s, s.width, "c_proj")(mixed), None if past is None else (key, value)


class MLP(nn.Module):
    settings: Settings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.settings
        return _dense(s, s.width, "c_proj")(jax.nn.gelu(_dense(s, s.inner, "c_fc")(x)))


def _dense(s: Settings, features: int, name: str) -> layers.Dense:
    return layers.Dense(features, s.dtype, s.dtype, s.stddev, name=name)

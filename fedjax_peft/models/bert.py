"""BERT, multilingual BERT, RoBERTa and XLM-R: one encoder, whose parameter paths are Hugging Face's module names.

Devlin et al., "BERT", 2018, arXiv 1810.04805. Liu et al., "RoBERTa", 2019, arXiv 1907.11692. Conneau et al.,
"Unsupervised Cross-lingual Representation Learning at Scale", 2019, arXiv 1911.02116.

All layers are one module whose parameters carry a leading axis: `encoder/layer/attention/self/query/kernel` [L, D, F]
stands for the L modules `encoder.layer.{i}.attention.self.query`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_peft.models import layers, network, tables
from fedjax_peft.types import Array, Model

ROBERTA = ("roberta", "xlm-roberta")
TYPES = ("bert", *ROBERTA)
"""Values of `model_type` in a `config.json` that are read here."""
POOLS = ("pooler", "mean")
HEADS = ("classification", "span", "features")
ACTIVATIONS = {
    # Exact; jax.nn.gelu writes it with erfc, which takes twice as long on a CPU.
    "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

TABLE = tables.Table(
    prefixes=("bert.", "roberta."),
    rules=(
        (r"(embeddings/\w+_embeddings)/weight", r"\1/embedding", tables.as_is),
        (r"(.*LayerNorm)/(?:weight|gamma)", r"\1/scale", tables.as_is),
        (r"(.*LayerNorm)/(?:bias|beta)", r"\1/bias", tables.as_is),
        (r"(.*)/weight", r"\1/kernel", tables.transposed),
        (r"(.*)/bias", r"\1/bias", tables.as_is),
    ),
    stack="encoder/layer",
    words="embeddings/word_embeddings/embedding",
    optional=(r"pooler/.*", r"classifier/.*", r"qa_outputs/.*"),
    ignored=(r".*position_ids", r"embeddings/token_type_ids", r"cls/.*", r"lm_head/.*"),
    fresh=(r"classifier/.*", r"qa_outputs/.*"),
)
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_COUNTS += ("max_position_embeddings",)


class Settings(NamedTuple):
    """A `config.json` in this file's words; L, heads and sizes of the axes."""

    roberta: bool
    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    positions: int
    types: int
    padding: int
    """Where the positions of RoBERTa begin: one after this token's id. Not read for BERT."""
    epsilon: float
    activation: str
    stddev: float
    dropout: float
    dtype: Any
    scan: bool
    remat: bool


def bert(
    config: Mapping[str, Any],
    *,
    labels: int,
    pool: str = "pooler",
    head: str = "classification",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    scan: bool = True,
    remat: bool = False,
) -> Model:
    """Encoder with a task head.

    Args:
      config: fields of a Hugging Face `config.json` whose `model_type` is one of `TYPES`.
      labels: K, the classes of a classifier; not read by other heads.
      pool: `pooler`, as Hugging Face's sequence classifiers do (first token; BERT: `pooler/dense`, tanh, `classifier`;
        RoBERTa: `classifier/dense`, tanh, `classifier/out_proj`), or `mean` over unmasked tokens, then `classifier`.
      head: `classification` gives logits [B, K]; `span` gives logits of start and end [B, T, 2]; `features` gives the
        pooled text [B, D] without a classifier. All float32.
      dropout: probability for hidden states and attention, used where `apply` is given a key.
      dtype: of storage and computation; norms, softmax, pooling and heads stay float32.
      scan: run layers in a loop (compile time does not grow with L) or unrolled (faster on CPU). Same parameters.
      remat: compute each layer again in the backward pass instead of keeping its activations.

    Raises:
      ValueError: for a config that this encoder cannot follow, or an unknown `pool` or `head`.
    """
    _check(labels, pool, head, dropout)
    s = settings(config, dropout, dtype, scan, remat)
    # RoBERTa counts positions from behind the padding's.
    longest = s.positions - (s.padding + 1 if s.roberta else 0)
    return Model(*network.functions(Bert(s, labels, pool, head), longest))


def settings(config: Mapping[str, Any], dropout: float, dtype: Any, scan: bool, remat: bool) -> Settings:
    """Checks a `config.json`; fields that it does not name have Hugging Face's defaults.

    Raises:
      ValueError: for the first field that this encoder cannot follow.
    """
    expected = {"model_type": TYPES, "hidden_act": tuple(ACTIVATIONS), "position_embedding_type": ("absolute",)}
    expected |= {"is_decoder": (False,), "add_cross_attention": (False,)}
    network.check_config(config, expected, _COUNTS)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(f"config field hidden_size is {width}, expected a multiple of {heads} attention heads")
    roberta = config.get("model_type") in ROBERTA
    return Settings(
        roberta=roberta,
        vocabulary=config["vocab_size"],
        width=width,
        layers=config["num_hidden_layers"],
        heads=heads,
        inner=config["intermediate_size"],
        positions=config["max_position_embeddings"],
        types=config.get("type_vocab_size", 2),
        padding=1 if config.get("pad_token_id") is None else config["pad_token_id"],
        epsilon=config.get("layer_norm_eps", 1e-12),
        activation=config.get("hidden_act") or "gelu",
        stddev=config.get("initializer_range", 0.02),
        dropout=dropout,
        dtype=jnp.dtype(dtype),
        scan=scan,
        remat=remat,
    )


class Bert(nn.Module):
    """Token ids to the output of one head."""

    settings: Settings
    labels: int
    pool: str
    head: str

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        s = self.settings
        x = Embeddings(s, name="embeddings")(inputs)
        x = Encoder(s, name="encoder")(x, inputs["mask"]).astype(jnp.float32)
        if self.head == "span":
            return layers.Dense(2, stddev=s.stddev, name="qa_outputs")(x)
        if self.pool == "mean":
            pooled = _mean(x, inputs["mask"])
        elif s.roberta:
            pooled = x[:, 0]
        else:
            pooled = Pooler(s, name="pooler")(x[:, 0])
        if self.head == "features":
            return pooled
        pooled = layers.dropped(self, self.settings.dropout, pooled)
        if s.roberta and self.pool == "pooler":
            return RobertaHead(s, self.labels, name="classifier")(pooled)
        return layers.Dense(self.labels, stddev=s.stddev, name="classifier")(pooled)


class Embeddings(nn.Module):
    """{tokens [B, T], ..} -> [B, T, D]."""

    settings: Settings

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        s, tokens = self.settings, inputs["tokens"]
        # RoBERTa has one type and no ids for it; texts in pairs arrive with types all the same.
        types = inputs.get("types") if s.types > 1 else None
        if s.roberta:
            mask = inputs["mask"].astype(jnp.int32)
            positions = jnp.cumsum(mask, 1) * mask + s.padding
        else:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = self._embed("word_embeddings", s.vocabulary, tokens)
        x += self._embed("token_type_embeddings", s.types, jnp.zeros_like(tokens) if types is None else types)
        x += self._embed("position_embeddings", s.positions, positions)
        x = layers.LayerNorm(s.epsilon, s.dtype, name="LayerNorm")(x)
        return layers.dropped(self, s.dropout, x, 1)

    def _embed(self, name: str, rows: int, ids: Array) -> Array:
        s = self.settings
        return layers.Embed(rows, s.width, s.dtype, s.dtype, s.stddev, name=name)(ids)


class Encoder(nn.Module):
    """[B, T, D], mask [B, T] -> [B, T, D]."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        s = self.settings
        # Large but finite: a padding example has no unmasked token, and its softmax must not be NaN.
        bias = jnp.where(mask, jnp.float32(0), jnp.float32(-1e30))[:, None, None, :]
        return network.stack(Layer, s, in_axes=nn.broadcast)(s, name="layer")(x, bias)[0]


class Layer(nn.Module):
    """One transformer layer with norms after the residual sums; the pair is what `nn.scan` carries and stacks."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> tuple[Array, None]:
        x = Attention(self.settings, name="attention")(x, bias)
        inner = Intermediate(self.settings, name="intermediate")(x)
        return Output(self.settings, name="output")(inner, x), None


class Attention(nn.Module):
    settings: Settings

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> Array:
        mixed = SelfAttention(self.settings, name="self")(x, bias)
        return Output(self.settings, name="output")(mixed, x)


class SelfAttention(nn.Module):
    """[B, T, D], bias [B, 1, 1, T] -> [B, T, D]."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> Array:
        s = self.settings
        query, key, value = (
            _dense(s, s.width, name)(x).reshape(*x.shape[:2], s.heads, -1) for name in ("query", "key", "value")
        )
        # Transposed by hand: clients and heads are leading axes of plain batched products, which a CPU runs faster than
        # the einsum over [B, T, H, D].
        query, value = query.swapaxes(1, 2), value.swapaxes(1, 2)
        scores = jnp.matmul(query, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5 + bias)
        mixed = layers.dropped(self, s.dropout, weights.astype(s.dtype), 2, 3) @ value
        return mixed.swapaxes(1, 2).reshape(x.shape)


class Intermediate(nn.Module):
    settings: Settings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.settings.activation](_dense(self.settings, self.settings.inner)(x))


class Output(nn.Module):
    settings: Settings

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        s = self.settings
        x = layers.dropped(self, s.dropout, _dense(s, s.width)(x), 1)
        return layers.LayerNorm(s.epsilon, s.dtype, name="LayerNorm")(x + residual)


class Pooler(nn.Module):
    settings: Settings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jnp.tanh(layers.Dense(x.shape[-1], stddev=self.settings.stddev, name="dense")(x))


class RobertaHead(nn.Module):
    settings: Settings
    labels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = jnp.tanh(layers.Dense(x.shape[-1], stddev=self.settings.stddev, name="dense")(x))
        x = layers.dropped(self, self.settings.dropout, x)
        return layers.Dense(self.labels, stddev=self.settings.stddev, name="out_proj")(x)


def _check(labels: int, pool: str, head: str, dropout: float) -> None:
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}, expected one of {', '.join(POOLS)}")
    layers.check_head(head, HEADS, labels, dropout)


def _dense(s: Settings, features: int, name: str = "dense") -> layers.Dense:
    return layers.Dense(features, s.dtype, s.dtype, s.stddev, name=name)


def _mean(x: Array, mask: Array) -> Array:
    weights = mask.astype(x.dtype)[..., None]
    return jnp.sum(x * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)

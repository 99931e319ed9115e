"""Texts from a causal model: greedy, sampled or beam search, with one cache of keys and values of fixed size.

Written for one client and its adapters. Under `vmap` clients run side by side until the last row of the last one has
ended, and the cache's position keeps no axis of clients, so that writing a token stays a slice and no scatter.

Beam search is that of transformers 5 (Wolf et al., 2020, arXiv 1910.03771), whose other methods agree as well: a text
counts sum log p / tokens ** length_penalty, its end token included; of the candidates of a step, those that end among
the best `beams` are kept aside, the best that do not end go on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedjax_peft.types import Array, Model, PyTree

METHODS = ("greedy", "sampled", "beam")
_NEVER = -1e9  # score of a text that no other one loses to


class Settings(NamedTuple):
    """How texts are chosen; fields as in `make_generate`."""

    new_tokens: int
    end: tuple[int, ...]
    pad: int
    method: str
    temperature: float
    top_p: float
    top_k: int
    beams: int
    length_penalty: float
    early_stopping: bool
    no_repeat: int
    repeat_prompt: bool


@struct.dataclass
class Texts:
    """One text of each row so far."""

    tokens: Array  # [B, new_tokens] int32
    open: Array  # [B] bool: rows that go on


@struct.dataclass
class Beams:
    """The texts of each row that go on, R = B * beams of them, and the best that have ended."""

    tokens: Array  # [R, new_tokens] int32
    open: Array  # [B] bool: rows whose ended texts may still be beaten
    parents: Array  # [R] int32: text of the step before that each one continues
    scores: Array  # [B, beams] float32: sum of log probabilities, the best first
    ended: Array  # [B, beams, new_tokens] int32
    merits: Array  # [B, beams] float32 of ended texts, the best first


def make_generate(
    model: Model,
    *,
    new_tokens: int,
    end: int | Sequence[int],
    pad: int,
    method: str = "greedy",
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    no_repeat: int = 0,
    repeat_prompt: bool = False,
) -> Callable[..., tuple[Array, Array]]:
    """A function that continues texts, to be jitted, and to be vmapped over clients.

    Args:
      model: causal, with `init_cache` and `decode`.
      new_tokens: most tokens to add; they and the prompts must fit into the model's positions, padding included.
      end: ids of tokens that end a text; there may be none.
      pad: id behind a text's end.
      method: `greedy`, `sampled` or `beam`.
      temperature: by which log probabilities are divided; read by `sampled` alone, as are the next two.
      top_p: only the fewest most likely tokens that have at least this probability together are drawn from
        (Holtzman et al., 2020, arXiv 1904.09751), once `top_k` has left out others.
      top_k: only so many most likely tokens are drawn from (Fan et al., 2018, arXiv 1805.04833); 0 for all.
      beams: texts side by side; read by `beam` alone, as are the next two.
      length_penalty: above 0 prefers longer texts.
      early_stopping: a row stops with its first `beams` ended texts; else when the best open one, were it to end now,
        would be no better than the worst of them. transformers' default is False, too.
      no_repeat: no n-gram of so many tokens occurs twice; 0 for no such rule.
      repeat_prompt: whether n-grams of the prompt do not count for that; in transformers they do, in the scripts of
        LoRA (Hu et al., 2021, arXiv 2106.09685) they do not.

    Returns:
      (base, adapters, inputs, key=None) -> (tokens [B, new_tokens] int32, lengths [B] int32). Inputs are `tokens` and
      `mask` [B, T], padded on either side; rows do not depend on each other. A text has its first `lengths` tokens,
      then comes its end token, if it ended at all, then padding. An empty prompt stays empty and keeps nobody waiting.
      `sampled` needs the key.

    Raises:
      ValueError: for a setting out of its range, or a model without `decode`.
    """
    ends = (end,) if isinstance(end, int) else tuple(end)
    s = Settings(new_tokens, ends, pad, method, temperature, top_p, top_k, beams if method == "beam" else 1,
                 length_penalty, early_stopping, no_repeat, repeat_prompt)  # fmt: skip
    _check(s, beams)
    if model.decode is None:
        raise ValueError("the model has no function `decode`, expected a causal one with the head 'lm'")

    def generate(base: PyTree, adapters: PyTree, inputs: Mapping[str, Array], key: Array | None = None):
        if method == "sampled" and key is None:
            raise ValueError("method is 'sampled', which needs a key")
        prompt = _left_padded(inputs)
        batch, width = prompt["tokens"].shape
        cache = model.init_cache(batch, width + new_tokens - 1)
        last = jnp.full((batch, 1), width - 1, jnp.int32)
        logits, cache = model.decode(base, adapters, cache, prompt | {"chosen": last})
        axes = _row_axes(model, batch, width + new_tokens - 1)
        rows = jnp.repeat(jnp.arange(batch), s.beams)
        cache, logits, prompt = _taken(cache, axes, rows), logits[rows], jax.tree.map(lambda leaf: leaf[rows], prompt)

        def chosen(state, logits, count):
            scores = jax.nn.log_softmax(logits[:, 0])
            scores = _without_repeats(s, scores, prompt, state.tokens, count) if no_repeat else scores
            return _searched(s, state, scores, count) if method == "beam" else _chosen(s, state, scores, count, key)

        def step(carry):
            state, cache, count = carry
            cache = _taken(cache, axes, state.parents) if method == "beam" else cache
            fed = jax.lax.dynamic_slice_in_dim(state.tokens, count - 1, 1, 1)
            logits, cache = model.decode(base, adapters, cache, {"tokens": fed, "mask": jnp.ones_like(fed, bool)})
            return chosen(state, logits, count), cache, count + 1

        def unfinished(carry):
            return (carry[2] < new_tokens) & _any(carry[0].open)

        real = jnp.any(inputs["mask"], 1)
        first = (chosen(_begun(s, real), logits, jnp.int32(0)), cache, jnp.int32(1))
        state, _, _ = jax.lax.while_loop(unfinished, step, first)
        return _measured(s, state.ended[:, 0] if method == "beam" else state.tokens, real)

    return generate


def chat(
    model: Model,
    base: PyTree,
    adapters: PyTree,
    tokenizer: Any,
    prompt: str,
    *,
    template: Callable[[str], str] | None = None,
    key: Array | None = None,
    new_tokens: int = 128,
    **settings: Any,
) -> str:
    """One answer, as text without special tokens.

    Args:
      model: causal.
      base, adapters: of one client.
      tokenizer: as `data.tokenizers` gives it.
      prompt: what the user says.
      template: (prompt) -> text that the model goes on from, special tokens written out. Without one the tokenizer's
        chat template is used, if it has one, else the prompt is the text.
      key: for `method='sampled'`.
      new_tokens: most tokens of the answer.
      **settings: more for `make_generate`.

    Raises:
      ValueError: for a prompt without tokens, one too long for the model, or faulty settings.
    """
    if template is None and tokenizer.chat is not None:

        def template(prompt):
            return tokenizer.chat([{"role": "user", "content": prompt}], generate=True)

    text = prompt if template is None else template(prompt)
    # Never cut: the end of a prompt is what asks for the answer.
    tokens = tokenizer.encode([text], max_length=2**30, special=template is None).tokens[None]
    if not tokens.size:
        raise ValueError(f"prompt is {prompt!r}, expected at least one token")
    end = () if tokenizer.eos is None else tokenizer.eos
    generate = jax.jit(make_generate(model, new_tokens=new_tokens, end=end, pad=tokenizer.pad, **settings))
    inputs = {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.ones(tokens.shape, bool)}
    answer, lengths = generate(base, adapters, inputs, key)
    return tokenizer.decode(answer[0, : int(lengths[0])].tolist())


def _begun(s: Settings, real: Array) -> Texts | Beams:
    batch = len(real)
    tokens = jnp.full((batch * s.beams, s.new_tokens), s.pad, jnp.int32)
    if s.method != "beam":
        return Texts(tokens, real)
    none = jnp.full((batch, s.beams), _NEVER, jnp.float32)
    # All beams of a row are the same prompt: only the first one counts.
    scores = none.at[:, 0].set(0)
    parents = jnp.zeros(batch * s.beams, jnp.int32)
    return Beams(tokens, real, parents, scores, tokens.reshape(batch, s.beams, -1), none)


def _chosen(s: Settings, state: Texts, scores: Array, count: Array, key: Array | None) -> Texts:
    """Args: scores, log probabilities [B, V] of the token at `count`."""
    if s.method == "greedy":
        token = jnp.argmax(scores, -1).astype(jnp.int32)
    else:
        token = _drawn(s, scores, jax.random.fold_in(key, count))
    return Texts(_written(state.tokens, token, count), state.open & ~_ends(s, token))


def _drawn(s: Settings, scores: Array, key: Array) -> Array:
    scores = scores / s.temperature
    vocabulary = scores.shape[-1]
    if s.top_p == 1 and not s.top_k:
        return jax.random.categorical(key, scores).astype(jnp.int32)
    scores, order = jax.lax.top_k(scores, min(s.top_k or vocabulary, vocabulary))
    likely = jax.nn.softmax(scores)
    kept = jnp.cumsum(likely, -1) - likely < s.top_p
    place = jax.random.categorical(key, jnp.where(kept, scores, -jnp.inf))
    return jnp.take_along_axis(order, place[:, None], -1)[:, 0].astype(jnp.int32)


def _searched(s: Settings, state: Beams, scores: Array, count: Array) -> Beams:
    """Args: scores, log probabilities [R, V] of the token at `count`."""
    (batch, beams), vocabulary = state.scores.shape, scores.shape[-1]
    total = state.scores[..., None] + scores.reshape(batch, beams, vocabulary)
    # So many that enough do not end.
    best, found = jax.lax.top_k(total.reshape(batch, -1), max(2, 1 + len(s.end)) * beams)
    beam, token = found // vocabulary, (found % vocabulary).astype(jnp.int32)
    tokens = jnp.take_along_axis(state.tokens.reshape(batch, beams, -1), beam[..., None], 1)
    tokens = _written(tokens, token, count)
    ends = _ends(s, token) | (count + 1 == s.new_tokens)

    length = (count + 1).astype(jnp.float32) ** s.length_penalty
    eligible = ends & (jnp.arange(best.shape[1]) < beams)[None] & state.open[:, None]
    merits = jnp.concatenate([state.merits, jnp.where(eligible, best / length, _NEVER)], 1)
    merits, kept = jax.lax.top_k(merits, beams)
    ended = jnp.take_along_axis(jnp.concatenate([state.ended, tokens], 1), kept[..., None], 1)

    running, kept = jax.lax.top_k(jnp.where(ends, _NEVER, best), beams)
    tokens = jnp.take_along_axis(tokens, kept[..., None], 1).reshape(batch * beams, -1)
    parents = jnp.take_along_axis(beam, kept, 1) + beams * jnp.arange(batch)[:, None]
    worst = merits[:, -1]
    stays_open = state.open & (running[:, 0] / length > worst)
    if s.early_stopping:
        stays_open &= worst <= _NEVER
    return Beams(tokens, stays_open, parents.reshape(-1).astype(jnp.int32), running, ended, merits)


def _without_repeats(s: Settings, scores: Array, prompt: Mapping[str, Array], tokens: Array, count: Array) -> Array:
    """Scores [R, V] in which a token that would complete an n-gram a second time has minus infinity."""
    size, width = s.no_repeat - 1, prompt["tokens"].shape[1]
    seen = prompt["mask"] & (not s.repeat_prompt)
    real = jnp.concatenate([seen, jnp.broadcast_to((jnp.arange(s.new_tokens) < count)[None], tokens.shape)], 1)
    texts = jnp.concatenate([prompt["tokens"], tokens], 1)
    windows = texts.shape[1] - size
    if windows < 1:
        return scores
    # No id is -1, so that padding is the same as nothing.
    texts = jnp.where(real, texts, -1)
    padded = jnp.pad(texts, ((0, 0), (size, 0)), constant_values=-1)
    last = jax.lax.dynamic_slice_in_dim(padded, width + count, size, 1)
    same = (texts[:, size:] >= 0) & jnp.all(last >= 0, 1, keepdims=True)
    for i in range(size):
        same &= texts[:, i : i + windows] == last[:, i : i + 1]
    rows = jnp.arange(len(texts))[:, None]
    banned = jnp.zeros(scores.shape, bool).at[rows, jnp.maximum(texts[:, size:], 0)].max(same)
    return jnp.where(banned, -jnp.inf, scores)


def _left_padded(inputs: Mapping[str, Array]) -> dict[str, Array]:
    order = jnp.argsort(inputs["mask"], axis=1, stable=True)
    return {name: jnp.take_along_axis(inputs[name], order, 1) for name in ("tokens", "mask")}


def _written(tokens: Array, token: Array, count: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None], count, tokens.ndim - 1)


def _ends(s: Settings, tokens: Array) -> Array:
    return jnp.isin(tokens, jnp.asarray(s.end, jnp.int32))


def _measured(s: Settings, tokens: Array, real: Array) -> tuple[Array, Array]:
    """[B, new_tokens] with padding behind the end, and where that is; nothing where there was no prompt."""
    ends = _ends(s, tokens)
    lengths = jnp.where(jnp.any(ends, 1), jnp.argmax(ends, 1), s.new_tokens).astype(jnp.int32)
    kept = (jnp.arange(s.new_tokens)[None] <= lengths[:, None]) & real[:, None]
    return jnp.where(kept, tokens, s.pad), jnp.where(real, lengths, 0)


def _row_axes(model: Model, batch: int, slots: int) -> PyTree:
    """Which axis of each leaf of a cache is that of rows, or -1: where a cache for one row more is longer."""
    one, more = (jax.eval_shape(lambda rows=rows: model.init_cache(rows, slots)) for rows in (batch, batch + 1))

    def axis(leaf, other):
        return next((i for i, size in enumerate(leaf.shape) if other.shape[i] != size), -1)

    return jax.tree.map(axis, one, more)


def _taken(cache: PyTree, axes: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda leaf, axis: leaf if axis < 0 else jnp.take(leaf, rows, axis), cache, axes)


@jax.custom_batching.custom_vmap
def _any(rows: Array) -> Array:
    """Whether any row of any client is true: one loop for all, so that its counters need no axis of clients."""
    return jnp.any(rows)


@_any.def_vmap
def _any_of_clients(axis_size: int, batched: Sequence[bool], rows: Array) -> tuple[Array, bool]:
    return _any(rows), False


def _check(s: Settings, beams: int) -> None:
    if s.method not in METHODS:
        raise ValueError(f"method is {s.method!r}, expected one of {', '.join(METHODS)}")
    least_of = {
        "new_tokens": (s.new_tokens, 1),
        "beams": (beams, 1),
        "no_repeat": (s.no_repeat, 0),
        "top_k": (s.top_k, 0),
    }
    for name, (value, least) in least_of.items():
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if not s.temperature > 0:
        raise ValueError(f"temperature is {s.temperature}, expected above 0")
    if not 0 < s.top_p <= 1:
        raise ValueError(f"top_p is {s.top_p}, expected above 0 and at most 1")

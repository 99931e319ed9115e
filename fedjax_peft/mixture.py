"""A mixture of LoRA experts at a site, whose router fits any number of them, and the statistics of its routing.

Zhang et al., Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model Architectures, arXiv
2411.19128 (FedAMoLE's HMoLE). Beside the axis letters of types.py:

    E domain experts of a site   U slots of a client, the most experts that it can hold   Q entries of a query

A client holds some of the E experts in its U slots; slots that hold none are masked. Everything is computed for all
slots and masked: at ranks of 8 that is cheaper than sending tokens to experts, and shapes do not depend on routing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedjax_peft.adapters import LoRA, dropped
from fedjax_peft.types import Array

MASKED = -1e30  # a logit that no softmax sees, and finite, so that its gradient is


@struct.dataclass
class Mixture:
    """x -> shared(x) + sum over the top k of U slots of g_i B_i diag(scale) A_i x.

    The gates g are the softmax over the chosen slots of the logits z_i = <A_i x, W x> / sqrt R. The router W is all
    that routing adds, and its shape does not depend on how many experts there are. With `rows` in place of a router it
    is an ordinary linear one, z_i = <w_i, x>.
    """

    shared: LoRA | None  # not routed; None leaves it out
    a: Array  # [.., U, D, R]
    b: Array  # [.., U, R, F]
    router: Array | None  # [.., D, R] W
    rows: Array | None  # [.., U, D] w_i
    scale: Array  # [.., R] alpha / r
    held: Array  # [.., U] 1 where the slot holds an expert, else 0
    top_k: int = struct.field(pytree_node=False, default=2)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    ids: Array | None = None  # [.., U] int32 which of the E experts these are, known of a client's mixture

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        tokens = x.reshape(-1, x.shape[-1])
        route = self._route(tokens)
        gates = jax.nn.softmax(jnp.where(route.chosen > 0, route.logits, MASKED)) * route.chosen
        if self.dropout and key is not None:
            hidden = self._hidden_of_dropped(x, gates, route.order, key)
        else:
            hidden = gates[..., None] * route.keys
        hidden = (hidden * self.scale[None, None]).astype(x.dtype)
        b = self.b.astype(x.dtype)
        routed = hidden.reshape(len(tokens), -1) @ b.reshape(-1, b.shape[-1])
        routed = routed.reshape(*x.shape[:-1], -1)
        return routed if self.shared is None else self.shared(x, key) + routed

    def tap(self, x: Array) -> dict[str, Array]:
        """What the router makes of each token, float32.

        Returns:
          `probabilities` and `chosen` [.., U], the softmax over held slots and the top k of it as 0 and 1;
          `query` [.., Q] and, unless the router is linear, `keys` [.., U, Q]: z is their product. Q is R, or D if the
          router is linear: then the query is x, and the keys are `rows`.
        """
        tokens = x.reshape(-1, x.shape[-1])
        route = self._route(tokens)
        held = self.held[None]
        found = {
            "probabilities": jax.nn.softmax(route.logits) * held,
            "chosen": route.chosen,
            "query": tokens.astype(jnp.float32) if self.router is None else route.query,
        }
        if self.router is not None:
            found["keys"] = route.keys
        return {name: value.reshape(*x.shape[:-1], *value.shape[1:]) for name, value in found.items()}

    def merged(self, params: dict) -> dict:
        raise ValueError("a mixture of experts depends on its input: it cannot be merged into the weights of a site")

    def _route(self, tokens: Array) -> "_Route":
        # Factors have the base's type, sums are float32 and never rounded to it: gates are close to each other, and
        # embeddings are means of queries and keys.
        keys = self._keys(tokens)
        if self.router is None:
            query, logits = None, _product("nd,ud->nu", tokens, self.rows)
        else:
            query = _product("nd,dr->nr", tokens, self.router)
            logits = jnp.einsum("nur,nr->nu", keys, query) / keys.shape[-1] ** 0.5
        logits = jnp.where(self.held[None] > 0, logits, MASKED)
        order = jax.lax.top_k(jax.lax.stop_gradient(logits), self.top_k)[1]
        chosen = jnp.sum(jax.nn.one_hot(order, logits.shape[-1], dtype=jnp.float32), axis=-2) * self.held[None]
        return _Route(logits, order, chosen, query, keys)

    def _keys(self, tokens: Array) -> Array:
        return _product("nd,udr->nur", tokens, self.a)

    def _hidden_of_dropped(self, x: Array, gates: Array, order: Array, key: Array) -> Array:
        # Each expert of a token drops inputs of its own, and routing sees all of them. Of the U slots k are in use, so
        # the j-th choice of every token has the j-th draw. The shared expert draws with the key itself, as LoRA does.
        hidden = jnp.zeros((), jnp.float32)
        for place in range(self.top_k):
            tokens = dropped(x, self.dropout, jax.random.fold_in(key, place)).reshape(-1, x.shape[-1])
            own = gates * jax.nn.one_hot(order[:, place], gates.shape[-1], dtype=jnp.float32)
            hidden = hidden + own[..., None] * self._keys(tokens)
        return hidden


def _product(axes: str, tokens: Array, weights: Array) -> Array:
    return jnp.einsum(axes, tokens, weights.astype(tokens.dtype), preferred_element_type=jnp.float32)


class _Route(NamedTuple):
    """Routing of n tokens, float32."""

    logits: Array  # [n, U]
    order: Array  # [n, k] slots, the best first
    chosen: Array  # [n, U] 0 or 1
    query: Array | None  # [n, R]
    keys: Array  # [n, U, R] A_i x


def balance(tap: dict[str, Array], held: Array, weights: Array) -> Array:
    """The load-balance loss n sum_i P_i f_i of a site: 1 if all n experts are used alike, n / k if only k are.

    P_i is the mean probability of expert i and f_i its share of choices, a constant.

    Args:
      tap: of the mixture, `probabilities` and `chosen` [.., B, T, U], or [.., B, U] of a site behind pooling.
      held: [.., U].
      weights: [B, T] or [B] 0 for what does not count, such as padding.

    Returns:
      [..] float32; 0 where no expert is held.
    """
    probability, share = (token_mean(tap[name], weights) for name in ("probabilities", "chosen"))
    share = jax.lax.stop_gradient(share / jnp.maximum(jnp.sum(share, -1, keepdims=True), 1e-30))
    count = jnp.sum(held, -1)
    # P sums to 1, so f may be centred. The gradient of what is even is then 0, not a rounding error that Adam turns
    # into a step of full size.
    even = held / jnp.maximum(count, 1.0)[..., None]
    uneven = count * jnp.sum(probability * (share - even), -1)
    return (jnp.sum(probability, -1) > 0) + uneven


def token_sum(values: Array, weights: Array, features: int = 1) -> Array:
    """The weighted sum over tokens: [.., B, T, f1, ..] and [B, T] -> [.., f1, ..], or without T in both.

    Args:
      features: number of axes behind the tokens'.
    """
    last = values.ndim - features
    axes = tuple(range(last - weights.ndim, last))
    weights = weights.reshape((1,) * axes[0] + weights.shape + (1,) * features)
    return jnp.sum(jnp.where(weights > 0, values * weights, 0.0), axes)


def token_mean(values: Array, weights: Array, features: int = 1) -> Array:
    """The weighted mean over tokens, 0 if none counts."""
    return token_sum(values, weights, features) / jnp.maximum(jnp.sum(weights), 1e-30)


def bank(lora: LoRA, draws: Array, experts: int, *, top_k: int, linear: bool) -> Mixture:
    """All E experts of a site as one mixture that adds nothing yet.

    Args:
      lora: the shared expert; the others have its shapes and B = 0.
      draws: [1 + E, .., D, R] further draws of its A, [1 + 2 E, ..] for a linear router: the router, experts, rows.
    """
    held = jnp.ones((*lora.a.shape[:-2], experts), jnp.float32)
    return Mixture(
        shared=lora,
        a=jnp.moveaxis(draws[1 : experts + 1], 0, -3),
        b=jnp.zeros((*held.shape, *lora.b.shape[-2:]), jnp.float32),
        router=None if linear else draws[0],
        rows=jnp.moveaxis(draws[experts + 1 :, ..., 0], 0, -2) if linear else None,
        scale=lora.scale,
        held=held,
        top_k=top_k,
        dropout=lora.dropout,
    )


class Sizes(NamedTuple):
    """Numbers at one site, a layer of a stack counting by itself."""

    expert: int  # parameters of one expert
    common: int  # those of the shared expert and the router
    query: int  # Q


def sizes(whole: Mixture) -> Sizes:
    """What a mixture consists of, also if there is nothing but its shapes."""
    experts, layers = whole.held.size, whole.held.size // whole.held.shape[-1]
    shared = () if whole.shared is None else (whole.shared.a, whole.shared.b)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(own)) for own in ((whole.a, whole.b, whole.rows), shared)]
    inputs, rank = whole.a.shape[-2:]
    query, router = (inputs, 0) if whole.router is None else (rank, inputs * rank)
    return Sizes(counts[0] // experts, counts[1] // layers + router, query)


def gather(whole: Mixture, ids: Array) -> Mixture:
    """A client's mixture: the experts `ids` [.., U] of a bank of E; the slots with id E are empty, all zeros."""
    experts = whole.held.shape[-1]
    held = ids < experts

    def own(leaf):
        wide = ids.shape + (1,) * (leaf.ndim - ids.ndim)
        taken = jnp.take_along_axis(leaf, ids.reshape(wide), axis=ids.ndim - 1, mode="clip")
        return jnp.where(held.reshape(wide), taken, jnp.zeros((), leaf.dtype))

    a, b, rows = jax.tree.map(own, (whole.a, whole.b, whole.rows))
    return whole.replace(a=a, b=b, rows=rows, held=held.astype(jnp.float32), ids=ids)


def scatter(values: Array, ids: Array, weights: Array, experts: int) -> Array:
    """The weighted sums by expert of what clients hold in their slots: [C, .., U, f1, ..] -> [.., E, f1, ..].

    Args:
      ids: [C, .., U] int32, E for empty slots, whose values count nowhere.
      weights: [C].
      experts: E.
    """
    # A product with zeros and ones, because accelerators add up scattered rows in no fixed order.
    clients, *layers, slots = ids.shape
    features = values.shape[ids.ndim :]
    holds = jax.nn.one_hot(ids, experts, dtype=jnp.float32) * weights.reshape(clients, *(1,) * ids.ndim)
    holds, values = holds.reshape(clients, -1, slots, experts), values.reshape(clients, ids[0].size // slots, slots, -1)
    # Accelerators would round float32 factors to fewer bits, and with them the number of examples behind an expert.
    return jnp.einsum("clue,cluf->lef", holds, values, precision="highest").reshape(*layers, experts, *features)


def over_holders(total: Array, holders: Array) -> Array:
    """The mean over those that hold an expert, 0 if nobody does: [.., E, ..] and [.., E]."""
    holders = holders.reshape(holders.shape + (1,) * (total.ndim - holders.ndim))
    return jnp.where(holders > 0, total / jnp.where(holders > 0, holders, 1.0), 0.0)

"""What FedAMoLE's server knows of clients and experts: mean queries and keys of a client's texts, noised if asked.

And tables of them, a row a site.

Zhang et al., arXiv 2411.19128. At each site a client is the mean over its tokens of W x, an expert that it holds the
mean of A_i x, with x under the client's own tuned adapters and without dropout. The router's logits are products of the
same two, so the product of the means says how much an expert suits a client.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import local, mixture, ranks
from fedjax_peft.mixture import Mixture
from fedjax_peft.types import Array, Batches, Model, PyTree

NOISES = ("off", "corrected", "reference")


@struct.dataclass
class Known:
    """What clients have said of themselves and of experts so far; zeros where nothing was said."""

    clients: PyTree  # tree over sites of [.., N, Q]
    experts: PyTree  # [.., E, Q]; None where the router is linear
    embedded: Array  # [N] bool: clients that were


class _Sum(NamedTuple):
    """Embeddings of one kind at one site, on the way to their means."""

    total: Array  # [.., Q]
    longest: Array  # [..] the bound of the published noise


class Noise(NamedTuple):
    """Differential privacy of the embeddings; weights leave in clear, so a whole upload is not private.

    `corrected`: v + l u with a length l ~ Gamma(Q, rate eta) and a uniform direction u, which makes the release of one
    vector of Q entries eta-metric-private in the Euclidean distance. `reference`, as in the published code: noise
    Gamma(Q, rate eta) x Uniform(-1, 1) on each entry by itself, then the vector is scaled down to the longest of the
    mean over the first batch and the sums over tokens of the later ones, which no clean bound covers.
    """

    kind: str = "off"
    eta: float = 1.0
    clip: float | None = None
    """`corrected`: norm that vectors are cut to before the noise; releases are then (2 clip eta)-private."""
    cap: float | None = None
    """`corrected`: norm that noisy vectors are cut to, a public constant."""


class Embeddings(NamedTuple):
    """Trees over sites; zeros of a client without a single token to be embedded by."""

    client: PyTree  # [.., Q]
    experts: PyTree  # [.., U, Q]; None where the router is linear, whose rows are the embeddings


def check_noise(noise: Noise, assign: str) -> None:
    """Raises ValueError for a mechanism that there is not, or noise that nothing would have."""
    if noise.kind not in NOISES:
        raise ValueError(f"algorithm.dp is {noise.kind!r}, expected one of {', '.join(NOISES)}")
    for name in ("eta", "clip", "cap"):
        value = getattr(noise, name)
        if value is not None and not value > 0:
            raise ValueError(f"algorithm.dp_{name} is {value}, expected a positive number")
    if noise.kind != "off" and assign != "data":
        raise ValueError(f"algorithm.dp is {noise.kind!r}, but no embeddings are sent with algorithm.assign {assign!r}")
    if noise.kind == "off" and noise.eta != Noise().eta:
        raise ValueError(f"algorithm.dp_eta is {noise.eta}, but algorithm.dp is 'off', expected corrected or reference")
    if noise.kind != "corrected" and (noise.clip, noise.cap) != (None, None):
        raise ValueError(f"algorithm.dp_clip and dp_cap belong to dp 'corrected', not to {noise.kind!r}")


def embed(
    model: Model, base: PyTree, adapters: PyTree, batches: Batches, key: Array, *, mask_padding: bool, noise: Noise
) -> Embeddings:
    """The embeddings of one client and of the experts that it holds.

    They cost a forward pass: a token half as much, at most, as in a step of training.

    Args:
      adapters: of the client, tuned; sites with mixtures are embedded.
      batches: `[S, B, ..]` of its texts; labels are not read.
      key: of the noise.
      mask_padding: leave padding tokens out of the means; otherwise those up to the longest example of a batch count.
    """
    nodes = {path: node for path, node in adapters_lib.nodes(adapters).items() if isinstance(node, Mixture)}

    def step(carry, batch, key):
        del key
        taps = model.taps(base, adapters, batch.inputs)[1]
        return {path: _added(carry[path], nodes[path], at(taps, path), batch, mask_padding) for path in nodes}, {}

    sums, _ = local.scan(step, {path: _nothing(node) for path, node in nodes.items()}, batches, key)
    means = {}
    for index, (path, (tokens, *kinds)) in enumerate(sorted(sums.items())):
        keys = jax.random.split(jax.random.fold_in(key, index), 2)
        released = [_released(kind, tokens, own, noise) for kind, own in zip(kinds, keys, strict=False)]
        means[path] = [mean.astype(nodes[path].a.dtype) for mean in released]
    client = adapters_lib.nest({path: found[0] for path, found in means.items()})
    return Embeddings(client, adapters_lib.nest({path: (*found, None)[1] for path, found in means.items()}))


def at(taps: PyTree, path: tuple[str, ...]) -> dict[str, Array]:
    """What was tapped at a site."""
    return functools.reduce(lambda tree, part: tree[part], path, taps)


def token_weights(node: Mixture, tap: dict[str, Array], batch: Batches, mask_padding: bool) -> Array:
    """[B, T] which tokens count; [B] at a site behind pooling, where an example counts as one."""
    examples = (batch.weights > 0).astype(jnp.float32)
    if tap["probabilities"].ndim == node.held.ndim + 1:
        return examples
    mask = batch.inputs["mask"]
    if not mask_padding:
        # Batches of the published code are as wide as their longest example; what is behind it is padding of ours.
        longest = jnp.any(mask & (batch.weights > 0)[:, None], axis=0, keepdims=True)
        mask = jnp.broadcast_to(longest, mask.shape)
    return examples[:, None] * mask


def _nothing(node: Mixture) -> tuple:
    """(tokens so far, sums of queries, sums of keys)."""
    *layers, slots, inputs, rank = node.a.shape
    if node.router is None:
        return jnp.float32(0), _zeros(*layers, inputs)
    return jnp.float32(0), _zeros(*layers, rank), _zeros(*layers, slots, rank)


def _zeros(*shape: int) -> _Sum:
    return _Sum(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:-1], jnp.float32))


def _added(state: tuple, node: Mixture, tap: dict[str, Array], batch: Batches, mask_padding: bool) -> tuple:
    tokens, *kinds = state
    weights = token_weights(node, tap, batch, mask_padding)
    more, sums = jnp.sum(weights), []
    for features, (name, (total, longest)) in enumerate(zip(("query", "keys"), kinds, strict=False), start=1):
        own = mixture.token_sum(tap[name], weights, features)
        norm = jnp.linalg.norm(own, axis=-1)
        norm = jnp.where(tokens > 0, norm, norm / jnp.maximum(more, 1.0))
        sums.append(_Sum(total + own, jnp.maximum(longest, norm)))
    return tokens + more, *sums


def _released(kind: _Sum, tokens: Array, key: Array, noise: Noise) -> Array:
    """The mean that is sent."""
    mean = kind.total / jnp.maximum(tokens, 1.0)
    if noise.kind == "off":
        return mean
    return jnp.where(tokens > 0, noised(mean, key, noise, kind.longest), 0.0)


def spoke(found: Embeddings) -> Array:
    """[C] bool: clients that were embedded, of embeddings [C, ..]; nothing but zeros says nothing."""
    said = [jnp.any(leaf != 0, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(found.client)]
    return functools.reduce(jnp.logical_or, said)


def noised(vector: Array, key: Array, noise: Noise, longest: Array | None = None) -> Array:
    """Vectors [.., Q] with noise, drawn once; `longest` [..] is the bound of the published mechanism."""
    size = vector.shape[-1]
    first, second = jax.random.split(key)
    if noise.kind == "reference":
        length = jax.random.gamma(first, size, vector.shape) / noise.eta
        return _cut(vector + length * jax.random.uniform(second, vector.shape, minval=-1.0, maxval=1.0), longest)
    vector = vector if noise.clip is None else _cut(vector, noise.clip)
    length = jax.random.gamma(first, size, vector.shape[:-1]) / noise.eta
    direction = jax.random.normal(second, vector.shape)
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    vector = vector + length[..., None] * direction
    return vector if noise.cap is None else _cut(vector, noise.cap)


def _cut(vector: Array, norm: Array | float) -> Array:
    """Scaled down to a norm, where it is longer."""
    own = jnp.linalg.norm(vector, axis=-1)
    return vector * jnp.minimum(1.0, norm / jnp.maximum(own, 1e-30))[..., None]


def placed(values: Array, ids: Array, clients: int) -> Array:
    """[C, .., Q] -> [.., N, Q] with the rows of clients at their ids, and zeros elsewhere."""
    rows = jnp.moveaxis(values, 0, -2)
    return jnp.zeros((*rows.shape[:-2], clients, rows.shape[-1]), rows.dtype).at[..., ids, :].set(rows, mode="drop")


def unknown(adapters: PyTree, clients: int) -> Known:
    """Nothing yet, of N clients and the experts of a server's mixtures."""
    queries, keys = {}, {}
    for path, node in adapters_lib.nodes(adapters).items():
        if isinstance(node, Mixture):
            *layers, experts, inputs, rank = node.a.shape
            size = inputs if node.router is None else rank
            queries[path] = jnp.zeros((*layers, clients, size), jnp.float32)
            keys[path] = None if node.router is None else jnp.zeros((*layers, experts, size), jnp.float32)
    return Known(adapters_lib.nest(queries), adapters_lib.nest(keys), jnp.zeros(clients, bool))


def learnt(known: Known, clients: PyTree, seen: Array, keys: dict, holders: dict) -> Known:
    """What was known, with what a round says in its place.

    Args:
      clients: tree over sites of [.., N, Q].
      seen: [N] 1 for clients that were embedded in the round.
      keys: {path of a site: [.., E, Q] mean over holders}, None where the router is linear.
      holders: {path: [.., E]} 0 for experts of which nobody said anything.
    """
    rows = (seen > 0)[:, None]
    queries = jax.tree.map(
        lambda new, old: jnp.where(rows.reshape((1,) * (new.ndim - 2) + rows.shape), new, old), clients, known.clients
    )
    experts = adapters_lib.nodes(known.experts)
    for path, old in experts.items():
        if old is not None:
            experts[path] = jnp.where(holders[path][..., None] > 0, keys[path], old)
    return Known(queries, adapters_lib.nest(experts), known.embedded | rows[:, 0])


def scores(layout: ranks.Layout, known: Known, adapters: PyTree) -> Array:
    """[J, E, N] products of embeddings; a client that was never embedded has the mean of those that were."""
    keys, queries = adapters_lib.nodes(known.experts), adapters_lib.nodes(known.clients)
    parts, nodes = [], adapters_lib.nodes(adapters)
    for path in layout.paths:
        own = nodes[path].rows if keys[path] is None else keys[path] / keys[path].shape[-1] ** 0.5
        product = jnp.einsum("...eq,...nq->...en", own, queries[path], precision="highest")
        parts.append(product.reshape(-1, *product.shape[-2:]))
    found = jnp.concatenate(parts)[layout.order]
    embedded = known.embedded[None, None]
    mean = jnp.sum(jnp.where(embedded, found, 0.0), -1, keepdims=True) / jnp.maximum(jnp.sum(embedded), 1)
    return jnp.where(embedded, found, mean)


def strategy(layout: ranks.Layout, adapters: PyTree) -> dict[str, Array]:
    """Which experts a client holds: `experts` [J, U] int32, -1 in empty slots; no slots at sites without a mixture."""

    def slots(node):
        if not isinstance(node, Mixture):
            return jnp.zeros((node.scale.size // layout.rank, 0), jnp.int32)
        return jnp.where(node.held > 0, node.ids, -1).reshape(-1, node.ids.shape[-1])

    nodes = adapters_lib.nodes(adapters)
    return {"experts": jnp.concatenate([slots(nodes[path]) for path in layout.paths])[layout.order]}

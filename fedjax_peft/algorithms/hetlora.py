"""HETLoRA: clients have adapters of different ranks, prune them by themselves, and count for what they learnt.

Reference:
  Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, arXiv 2401.06432.

    client   take the first r_k ranks of the server's A and B
             train on  loss + lambda sum_sites |A[t:r_k]| |B[t:r_k]|,     t = floor(gamma r_k)
             if that tail became smaller:  r_k <- floor(gamma r_k), at least rank_min, and drop the rest
    server   sum_k p_k A_k  and  sum_k p_k B_k,  padded with zeros;  p_k ~ |B_k A_k|, the norm over all sites
    use      the client's own A_k and B_k, as they were sent

Every client holds arrays of the largest rank R whose ranks from r_k on are zero, in factors, gradients and moments.
The head is trained with the factors and averaged uniformly; a client is evaluated with the head it sent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import aggregate, local, ranks, trees
from fedjax_peft.types import Algorithm, Array, Model, PyTree, Task

RANK_AXES = {"a": -1, "b": -2, "scale": -1}  # of the leaves of a LoRA


@struct.dataclass
class Server:
    adapters: PyTree  # of rank R
    round: Array  # scalar int32, drives the schedule


@struct.dataclass
class Client:
    rank: Array  # scalar int32, r_k
    local: PyTree  # all that it trains, as it was sent last; ranks from r_k on are 0
    optimizer: PyTree  # moments, if they are kept; likewise


class Sums(NamedTuple):
    """Uploads on their way to two means."""

    uniform: aggregate.WeightedSum  # of everything
    by_norm: aggregate.WeightedSum  # of A and B


def hetlora(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    clients: int | Callable[[Array], Array],
    rank_min: int = 6,
    gamma: float = 0.99,
    penalty: float = 1e-2,
    prune: bool = True,
    norm_eps: float = 1e-8,
    evaluate_global: bool = False,
    keep_optimizer: bool = True,
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
) -> Algorithm:
    """HETLoRA.

    Scales are those of the largest rank, alpha / R, for all: ranks mean the same whoever holds them. A client without
    a state, also one that never takes part, has the server's adapters cut to its initial rank.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters of kind `lora` and of the largest rank R; 10 for the range that PF2LoRA with
        ranks 8 and 2 has.
      optimizer: of the client.
      clients: N, then client k starts at the rank round(linspace(rank_min, R, N))[k], which knows nothing of its
        data; or (id) -> initial rank.
      rank_min: the smallest rank.
      gamma: share of its ranks that a client keeps when it prunes. At 0.99 and R up to 100 that is all but one.
      penalty: lambda, on the tail of each client.
      prune: whether ranks fall at all.
      norm_eps: under the roots of the tail's norms, whose gradient at B = 0 would be no number.
      evaluate_global: clients are evaluated with the server's adapters cut to their rank, not with their own: as a
        point of an evaluation, the other model that they could use.
      keep_optimizer: clients keep their moments from round to round.
      schedule: round -> factor on the client's learning rate in training; None is 1.
      personal_rate: factor on it in personalization: further local steps, without pruning.

    Raises:
      ValueError: a setting out of its range, or a kind of adapter without ranks.
    """
    largest = ranks.layout(ranks.concrete(init_adapters)).rank
    _check(largest, clients, rank_min, gamma, penalty, norm_eps)
    initial_rank = spread(rank_min, largest, clients) if isinstance(clients, int) else clients
    tails = jnp.asarray(tail_starts(gamma, largest))
    sizes = rank_sizes(jax.eval_shape(init_adapters, jax.random.key(0)), largest)

    def init(key):
        return Server(init_adapters(key), jnp.int32(0))

    def init_client(server, client_id, key):
        del key
        rank = jnp.clip(jnp.asarray(initial_rank(client_id), jnp.int32), rank_min, largest)
        own = _received(server, rank)
        return Client(rank, own, optimizer.init(own) if keep_optimizer else ())

    def train(base, server, client, start, batches, key, rate):
        """(trained, moments, metrics) of a client that stays at its rank."""
        loss, tail = local.objective(model, task, base), tails[client.rank]
        fixed = adapters_lib.fixed(between(server.adapters, 0, client.rank))

        def objective(trained, batch, key):
            value, metrics = loss(trees.join(trained, fixed), batch, key)
            return value + penalty * tail_norm(trained, tail, client.rank, norm_eps), metrics

        moments = client.optimizer if keep_optimizer else optimizer.init(start)
        trained, moments, metrics = local.train(objective, optimizer, start, moments, batches, key, rate=rate)
        return trained, moments if keep_optimizer else (), metrics

    def client_update(base, server, client, batches, key):
        rate = 1.0 if schedule is None else schedule(server.round)
        start, tail = _received(server, client.rank), tails[client.rank]
        trained, moments, metrics = train(base, server, client, start, batches, key, rate)
        before, after = (tail_norm(factors, tail, client.rank, norm_eps) for factors in (start, trained))
        rank = pruned(client.rank, tail, before, after, rank_min) if prune else client.rank
        upload = between(trained, 0, rank)
        received, sent = (sizes[0] + sizes[1] * own.astype(jnp.float32) for own in (client.rank, rank))
        metrics = metrics | {"rank": rank.astype(jnp.float32), "tail": after, "received": received, "sent": sent}
        return Client(rank, upload, between(moments, 0, rank)), upload, metrics

    def fold(uploads, cohort):
        norms = product_norm(uploads)
        factors = trees.select(uploads, _is_factor)
        return Sums(
            aggregate.weighted_sum(uploads, cohort, "uniform"),
            aggregate.weighted_sum(factors, cohort.replace(examples=norms), "examples"),
        )

    def server_update(server, sums):
        uniform, factors = aggregate.mean(sums.uniform), aggregate.mean(sums.by_norm)
        # As long as all B are 0 nobody has learnt more than others.
        factors = trees.where(sums.by_norm.weight > 0, factors, trees.select(uniform, _is_factor))
        fixed = adapters_lib.fixed(server.adapters)
        adapters = trees.join(factors, uniform, fixed)
        change = jnp.sqrt(trees.squared_norm(trees.subtract(adapters, server.adapters)))
        norm = sums.by_norm.weight / sums.uniform.weight
        return Server(adapters, server.round + 1), {"server_update_norm": change, "mean_norm": norm}

    def personalize(base, server, client, batches, key):
        start = _received(server, client.rank) if evaluate_global else client.local
        trained = train(base, server, client, start, batches, key, personal_rate)[0]
        return trees.join(trained, between(server.adapters, 0, client.rank))

    def traffic(server):
        size = adapters_lib.count(server.adapters)
        return size, size

    return Algorithm(init, init_client, client_update, fold, server_update, personalize, traffic, shared=shared)


def shared(server: Server) -> PyTree:
    """Adapters to merge into the base for a further stage: the server's, of rank R."""
    return server.adapters


def spread(least: int, most: int, clients: int) -> Callable[[Array], Array]:
    """(id) -> initial rank, spread evenly from `least` to `most` over the ids; padding has that of the last client."""
    table = jnp.asarray(np.round(np.linspace(least, most, clients)), jnp.int32)
    return lambda client_id: table[jnp.minimum(client_id, clients - 1)]


def tail_starts(gamma: float, most: int) -> np.ndarray:
    """[R + 1] int32 floor(gamma r) for r from 0 to `most`, where 0.29 x 100 is 29."""
    return np.array([math.floor(gamma * rank + 1e-9) for rank in range(most + 1)], np.int32)


def rank_sizes(adapters: PyTree, rank: int) -> tuple[int, int]:
    """Numbers that travel whatever the rank, and with each of the `rank` ones."""
    factors = adapters_lib.count(adapters, _is_factor)
    return adapters_lib.count(adapters) - factors, factors // rank


def between(tree: PyTree, low: Array | int, high: Array | int) -> PyTree:
    """Adapters, or moments of adapters, with zeros in all ranks but `low` to `high` - 1; what has no rank stays."""

    def cut(path, leaf):
        axis = RANK_AXES.get(trees.path_name(path[-1:]))
        if axis is None:
            return leaf
        ranks = jnp.arange(leaf.shape[axis]).reshape((-1,) + (1,) * (-axis - 1))
        return jnp.where(jnp.broadcast_to((ranks >= low) & (ranks < high), leaf.shape), leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(cut, tree)


def tail_norm(adapters: PyTree, low: Array | int, high: Array | int, eps: float) -> Array:
    """sum over sites of |A| |B|, each over the ranks `low` to `high` - 1; layers of a stack are sites."""

    def norm(leaf):
        return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=(-2, -1)) + eps)

    return sum(jnp.sum(norm(node.a) * norm(node.b)) for node in _loras(between(adapters, low, high)))


def product_norm(adapters: PyTree) -> Array:
    """[C] |A B| over all sites of adapters `[C, ..]`: |A B|^2 = tr (A' A)(B B'), without the dense product.

    Scales do not count, they are the same for all clients.
    """

    def square(node):
        down = jnp.einsum("...dr,...ds->...rs", node.a, node.a, precision="highest")
        up = jnp.einsum("...rf,...sf->...rs", node.b, node.b, precision="highest")
        return jnp.sum(down * up, axis=tuple(range(1, down.ndim)))

    # Rounding may leave a product that is 0 a little below.
    return jnp.sqrt(jnp.maximum(sum(square(node) for node in _loras(adapters)), 0.0))


def pruned(rank: Array, tail: Array, before: Array, after: Array, least: int) -> Array:
    """The next rank of a client: where its tail begins, at least `least`, if that tail became strictly smaller."""
    return jnp.where(after < before, jnp.maximum(tail, least), rank)


def _received(server: Server, rank: Array) -> PyTree:
    """What a client trains, as it comes from the server: the first ranks of A and B, and the head."""
    return adapters_lib.trained(between(server.adapters, 0, rank))


def _loras(adapters: PyTree) -> list[adapters_lib.LoRA]:
    return [node for node in adapters_lib.nodes(adapters).values() if isinstance(node, adapters_lib.LoRA)]


def _is_factor(leaf: str) -> bool:
    return leaf in ("a", "b")


def _check(largest, clients, rank_min, gamma, penalty, norm_eps) -> None:
    if not 1 <= rank_min <= largest:
        raise ValueError(f"algorithm.rank_min is {rank_min}, expected 1 to adapter.rank, which is {largest}")
    if isinstance(clients, int) and clients < 1:
        raise ValueError(f"algorithm.clients is {clients}, expected the number of clients of the population")
    if not 0 < gamma < 1:
        raise ValueError(f"algorithm.gamma is {gamma}, expected a share between 0 and 1")
    if not penalty >= 0:
        raise ValueError(f"algorithm.penalty is {penalty}, expected 0 or more")
    if not norm_eps > 0:
        raise ValueError(f"algorithm.norm_eps is {norm_eps}, expected a positive number")

"""FedAMoLE: clients differ in architecture, and their data decide how.

Zhang et al., Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model Architectures, arXiv
2411.19128. At every site the server has a bank of E LoRA experts, one shared expert and a router:

    client   gather the experts that chose it (expert_banks.py); train them, the shared expert, the router and the head,
             on the loss plus load balance; send them, and mean queries and keys of its texts (expert_embeddings.py)
    server   mean over clients of router, shared expert and head; mean of each expert over its holders
    host     <expert, client> / sqrt R scores clients; each expert chooses k of them (assignment.py)
    use      gather, and train on the client's own examples

Clients keep nothing. Every client of the federation always has experts, sampled or not: one that was never embedded
scores with each expert as the embedded ones do on average. The published method has all clients in every round; the
last of its R rounds, which is not aggregated, is the personalization here, so that R - 1 rounds give its result.

By the compiler's count a local step costs 1.12 of one of FedIT on the same tokens (rank 8, eight slots, a quarter of
Llama-3.2-1B's width); to be embedded costs a client a forward pass, half of a step for as many texts as a step has.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import aggregate, assignment, local, mixture, ranks, trees
from fedjax_peft.algorithms import expert_banks, expert_embeddings
from fedjax_peft.algorithms.expert_embeddings import Embeddings, Known, Noise
from fedjax_peft.mixture import Mixture
from fedjax_peft.types import Algorithm, Array, Model, PyTree, Task

# Folded into a key for what FedIT does not draw; larger than any site, so that shared expert and head are as there.
EXPERTS, SCORES = expert_banks.EXPERTS, expert_banks.EXPERTS - 1
CHOICES = {
    "balance_reduce": ("sum", "mean"),
    "assign": ("data", "random", "static"),
    "router": ("invariant", "linear"),
    "embed_on": ("train", "aux"),
    "adapter_dtype": ("float32", "bfloat16"),
    "score_dtype": ("float64", "bfloat16"),
}


@struct.dataclass
class Server:
    adapters: PyTree  # the head, and at every site a Mixture of all E experts
    slots: Array  # [J, N, U] int32: experts of each client at each of J sites, E where a slot is empty
    scores: Array  # [J, E, N] that the next assignment follows
    known: Known | tuple[()]  # () where the assignment does not ask
    seed: Array  # [] uint32, of random assignments
    round: Array  # [] int32


@struct.dataclass
class NoisyServer(Server):
    """The server of clients that add noise."""

    spent: Array  # [N] budget of differential privacy that each client has spent


@struct.dataclass
class Client:
    id: Array  # [] int32


class Upload(NamedTuple):
    change: PyTree  # of the client's adapters
    slots: Array  # [J, U] which experts these are
    embeddings: Embeddings | tuple[()]
    spent: Array | tuple[()]  # [] budget that the embeddings cost


class Sums(NamedTuple):
    common: aggregate.WeightedSum  # of what all clients hold
    experts: dict  # {path of a site: {leaf, or `keys`: [.., E, ..]}}
    holders: Array  # [J, E] sum of the weights of those that hold an expert
    embedded: Array  # [J, E] likewise of those of them that were embedded, in whose `keys` it is
    clients: PyTree  # tree over sites of [.., N, Q]
    seen: Array  # [N] 1 for clients that were embedded
    spent: Array | tuple[()]  # [N]


def fedamole(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    clients: int,
    experts: int = 30,
    expert_choices: int = 2,
    max_experts: int = 8,
    min_experts: int | None = None,
    top_k: int = 2,
    balance: float = 1e-3,
    balance_reduce: str = "sum",
    assign: str = "data",
    homogeneous: bool = False,
    shared_expert: bool = True,
    router: str = "invariant",
    embed_on: str = "aux",
    mask_padding: bool = True,
    weighting: str = "uniform",
    dp: str = "off",
    dp_eta: float = 1.0,
    dp_clip: float | None = None,
    dp_cap: float | None = None,
    adapter_dtype: str = "float32",
    score_dtype: str = "float64",
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
) -> Algorithm:
    """FedAMoLE and its ablations.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters of kind `lora`: the shared expert, whose sites, rank and alpha all experts have,
        and the head.
      optimizer: of the client; it starts afresh each round.
      clients: N of the whole federation, unseen ones included.
      experts: E of each site, beside the shared one.
      expert_choices: clients that hold an expert at a time.
      max_experts, min_experts: bounds of the experts of a client at a site; by default no fewer than `top_k`.
      top_k: experts that a token is sent to.
      balance: factor on the load-balance loss, the `sum` or `mean` over sites by `balance_reduce`.
      assign: by `data`; anew at `random` after each round; or `static`, at random once and for all.
      homogeneous: all clients hold the same number of experts.
      shared_expert: whether there is one.
      router: `invariant` to the number of experts; or `linear`, a row for each expert, averaged over its holders.
        Then a client is embedded by its mean input, and an expert by its row.
      embed_on: examples that a client is embedded by: `aux`, held out for it and given as `constants["aux"]`, a dict of
        `inputs` {name: [A, B, T]} and `weights` [A, B], or the round's own batches, `train`.
      mask_padding: leave padding out of load balance and embeddings; otherwise what fills a batch up to its longest
        example counts, as in the published code. One example a batch has none.
      weighting: of means over clients and over holders, `uniform` or by `examples`.
      dp, dp_eta, dp_clip, dp_cap: noise on the embeddings, see `expert_embeddings.Noise`. The server's metric
        `dp_spent` is the largest budget of a client so far: the sum over all vectors that it has released.
      adapter_dtype, score_dtype: of all that is trained, moments, means and embeddings included; and what scores are
        rounded to. Both are `bfloat16` in the published code, where steps that are small beside a weight are lost.
      schedule, personal_rate: factor on the client's learning rate, by round in training and in personalization.

    Raises:
      ValueError: a setting that there is not, or experts that cannot be shared out as asked.
    """
    aggregate.check_weighting(weighting)
    noise = Noise(dp, dp_eta, dp_clip, dp_cap)
    expert_embeddings.check_noise(noise, assign)
    choices = {"balance_reduce": balance_reduce, "assign": assign, "router": router, "embed_on": embed_on}
    _check(balance, choices | {"adapter_dtype": adapter_dtype, "score_dtype": score_dtype})
    for name, count in (("top_k", top_k), ("min_experts", top_k if min_experts is None else min_experts)):
        if count < 1:
            raise ValueError(f"algorithm.{name} is {count}, expected 1 or more")
    least, most = assignment.bounds(
        experts=experts,
        clients=clients,
        choices=expert_choices,
        least=top_k if min_experts is None else min_experts,
        most=max_experts,
        homogeneous=homogeneous,
    )
    if top_k > least:
        raise ValueError(
            f"algorithm.top_k is {top_k}, expected 1 to {least}, the fewest experts that a client may hold"
        )
    layout = ranks.layout(ranks.concrete(init_adapters))
    share = balance / layout.sites if balance_reduce == "mean" else balance

    def init(key):
        linear = router == "linear"
        own = {"experts": experts, "shared_expert": shared_expert, "linear": linear, "top_k": top_k}
        adapters = expert_banks.made(key, init_adapters, layout, **own)
        trained, fixed = expert_banks.parted(adapters)
        adapters = trees.join(jax.tree.map(lambda leaf: leaf.astype(adapter_dtype), trained), fixed)
        scores = jax.random.uniform(jax.random.fold_in(key, SCORES), (layout.sites, experts, clients))
        server = Server(
            adapters=adapters,
            slots=jnp.full((layout.sites, clients, most), experts, jnp.int32),
            scores=scores,
            known=expert_embeddings.unknown(adapters, clients) if assign == "data" else (),
            seed=jax.random.bits(jax.random.fold_in(key, SCORES - 1), dtype=jnp.uint32),
            round=jnp.int32(0),
        )
        return NoisyServer(**vars(server), spent=jnp.zeros(clients)) if noise.kind == "corrected" else server

    def init_client(server, client_id, key):
        del server, key
        return Client(jnp.asarray(client_id, jnp.int32))

    def slots_of(server, client):
        return jnp.take(server.slots, client.id, axis=1, mode="clip")

    def train(base, server, client, batches, key, rate):
        ids = ranks.by_site(layout, slots_of(server, client), experts)
        nodes = adapters_lib.nodes(server.adapters)
        received = adapters_lib.nest(nodes | {path: mixture.gather(nodes[path], own) for path, own in ids.items()})
        start, fixed = expert_banks.parted(received)
        loss = _objective(model, task, base, fixed, layout, share, mask_padding)
        trained, _, metrics = local.train(loss, optimizer, start, optimizer.init(start), batches, key, rate=rate)
        return trees.join(trained, fixed), trees.subtract(trained, start), metrics

    def client_update(base, server, client, batches, key):
        rate = 1.0 if schedule is None else schedule(server.round)
        adapters, change, metrics = train(base, server, client, batches, key, rate)
        metrics = metrics | {"update_norm": jnp.sqrt(trees.squared_norm(change))}
        slots = slots_of(server, client)
        if assign != "data":
            return client, Upload(change, slots, (), ()), metrics
        texts = local.held_out(batches, "embed_on", labelled=False) if embed_on == "aux" else batches
        own = jax.random.fold_in(key, EXPERTS)
        found = expert_embeddings.embed(model, base, adapters, texts, own, mask_padding=mask_padding, noise=noise)
        if noise.kind != "corrected":
            return client, Upload(change, slots, found, ()), metrics
        vectors = layout.sites + (router != "linear") * jnp.sum(slots < experts, dtype=jnp.float32)
        spent = vectors * noise.eta * (1.0 if noise.clip is None else 2 * noise.clip)
        return client, Upload(change, slots, found, spent), metrics

    def fold(uploads, cohort):
        weights = cohort.examples if weighting == "examples" else jnp.ones_like(cohort.examples)
        weights = jnp.where(cohort.reported, weights, 0.0)
        spoke = cohort.reported & (expert_embeddings.spoke(uploads.embeddings) if assign == "data" else False)
        counted = {"keys": jnp.where(spoke, weights, 0.0)}
        ids, sums = ranks.by_site(layout, jnp.swapaxes(uploads.slots, 0, 1), experts), {}
        for path, leaves in expert_banks.of_holders(uploads.change, uploads.embeddings).items():
            own = jnp.moveaxis(ids[path], -2, 0)
            sums[path] = {x: mixture.scatter(leaf, own, counted.get(x, weights), experts) for x, leaf in leaves.items()}
        ones = jnp.ones(uploads.slots.shape, jnp.float32)
        holders, embedded = (mixture.scatter(ones, uploads.slots, of, experts) for of in (weights, counted["keys"]))
        common = aggregate.weighted_sum(expert_banks.common(uploads.change), cohort, weighting)
        seen = jnp.where(spoke, cohort.ids, clients)
        found = uploads.embeddings.client if assign == "data" else ()
        found = jax.tree.map(lambda leaf: expert_embeddings.placed(leaf, seen, clients), found)
        spent = jax.tree.map(lambda own: jnp.zeros(clients, jnp.float32).at[seen].set(own, mode="drop"), uploads.spent)
        seen = jnp.zeros(clients, jnp.float32).at[seen].set(1.0, mode="drop")
        return Sums(common, sums, holders, embedded, found, seen, spent)

    def server_update(server, sums):
        holders, embedded = (ranks.by_site(layout, of, 0.0) for of in (sums.holders, sums.embedded))
        counted = {"keys": embedded}
        means = {
            path: {leaf: mixture.over_holders(total, counted.get(leaf, holders)[path]) for leaf, total in of.items()}
            for path, of in sums.experts.items()
        }
        server = server.replace(adapters=expert_banks.moved(server.adapters, aggregate.mean(sums.common), means))
        server = server.replace(round=server.round + 1)
        if assign == "random":
            key = jax.random.fold_in(jax.random.key(server.seed), server.round)
            server = server.replace(scores=jax.random.uniform(key, server.scores.shape))
        if assign == "data":
            keys = {path: leaves.get("keys") for path, leaves in means.items()}
            known = expert_embeddings.learnt(server.known, sums.clients, sums.seen, keys, embedded)
            server = server.replace(known=known, scores=expert_embeddings.scores(layout, known, server.adapters))
        metrics = {"experts_updated": jnp.mean((sums.holders > 0).astype(jnp.float32))}
        if noise.kind == "corrected":
            server = server.replace(spent=server.spent + sums.spent)
            metrics["dp_spent"] = jnp.max(server.spent)
        return server, metrics

    def personalize(base, server, client, batches, key):
        return train(base, server, client, batches, key, personal_rate)[0]

    def host_step(server):
        if assign == "static" and int(server.round) > 0:
            return server
        chosen = assignment.solve(np.asarray(server.scores), expert_choices, least, most, score_dtype)
        return server.replace(slots=assignment.slots(chosen, most))

    held = experts * expert_choices / clients

    def traffic(server):
        return expert_banks.traffic(server.adapters, layout, held, assign == "data")

    parts = (init, init_client, client_update, fold, server_update, personalize, traffic)
    aux = "embed_on" if (assign, embed_on) == ("data", "aux") else None
    return Algorithm(*parts, shared=shared, host_step=host_step, aux=aux)


def shared(server: Server) -> PyTree:
    """Adapters to merge into the base for a further stage: the shared expert and the head."""
    nodes = adapters_lib.nodes(server.adapters)
    nodes = {path: node.shared if isinstance(node, Mixture) else node for path, node in nodes.items()}
    return adapters_lib.nest({path: node for path, node in nodes.items() if node is not None})


def _check(balance: float, choices: dict[str, str]) -> None:
    if balance < 0:
        raise ValueError(f"algorithm.balance is {balance}, expected 0 or more")
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"algorithm.{name} is {value!r}, expected one of {', '.join(CHOICES[name])}")


def _objective(model, task, base, fixed, layout, factor, mask_padding) -> local.Loss:
    """The task's loss as in `local.objective`, plus the load balance of all sites."""

    def loss(trained, batch, key):
        adapters = trees.join(trained, fixed)
        outputs, taps = model.taps(base, adapters, batch.inputs, key)
        mean = local.mean_loss(task, outputs, batch)
        nodes, uneven = adapters_lib.nodes(adapters), jnp.float32(0)
        for path in layout.paths:
            tap = expert_embeddings.at(taps, path)
            weights = expert_embeddings.token_weights(nodes[path], tap, batch, mask_padding)
            uneven = uneven + jnp.sum(mixture.balance(tap, nodes[path].held, weights))
        return mean + factor * uneven, {"loss": mean, "balance": uneven / layout.sites}

    return loss

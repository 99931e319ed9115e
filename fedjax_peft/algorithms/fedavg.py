"""The FedAvg family: clients train adapters, the server averages what they share.

References:
  McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv 1602.05629 (FedAvg).
  Zhang et al., Towards Building the Federated GPT, arXiv 2305.05644 (FedIT; HOMLoRA of arXiv 2401.06432 is the same).
  Li et al., Federated Optimization in Heterogeneous Networks, arXiv 1812.06127 (FedProx).
  Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295 (server optimizers).
  Sun et al., Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313 (FFA-LoRA).
  Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, arXiv 2410.01463 (FedSA-LoRA).
  Iacob et al., DEPT: Decoupled Embeddings for Pre-training Language Models, arXiv 2410.05021 (DEPT).

Every method is a choice of which leaves of the adapters are shared, which stay with the client and which are frozen.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import aggregate, local, trees
from fedjax_peft.types import Algorithm, Array, Model, PyTree, Task


@struct.dataclass
class Server:
    adapters: PyTree  # all leaves: shared ones as averaged, private and frozen ones as initialised
    optimizer: PyTree
    round: Array  # scalar int32, drives the schedule


@struct.dataclass
class Client:
    private: PyTree  # leaves that never leave the client
    optimizer: PyTree  # moments, if they are kept


def fedavg(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    frozen: Callable[[str], bool] = lambda leaf: leaf == "scale",
    private: Callable[[str], bool] = lambda leaf: False,
    server_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    keep_optimizer: bool = False,
    proximal: float = 0.0,
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
) -> Algorithm:
    """FedAvg over adapters.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters.
      optimizer: of the client.
      frozen: says of a leaf's name (`a`, `b`, `scale`, `kernel` ..) that it is never trained.
      private: likewise, that it is trained but neither sent nor averaged.
      server_optimizer: applied to minus the mean update; None replaces the server's leaves by the mean.
      weighting: `examples` (p_k = n_k / sum n) or `uniform`, over the clients that reported.
      keep_optimizer: clients keep their moments from round to round instead of starting afresh.
      proximal: FedProx' mu in mu/2 |theta - theta_g|^2 over the shared leaves.
      schedule: round -> factor on the client's learning rate in training; None is 1.
      personal_rate: factor on the client's learning rate in personalization.
    """
    aggregate.check_weighting(weighting)
    if proximal < 0:
        raise ValueError(f"algorithm.proximal is {proximal}, expected 0 or more")
    server_optimizer = server_optimizer or aggregate.server_optimizer("average")

    def is_shared(leaf):
        return not frozen(leaf) and not private(leaf)

    def init(key):
        adapters = init_adapters(key)
        return Server(adapters, server_optimizer.init(trees.select(adapters, is_shared)), jnp.int32(0))

    def init_client(server, client_id, key):
        del client_id, key
        trained = trees.select(server.adapters, lambda leaf: not frozen(leaf))
        return Client(trees.select(server.adapters, private), optimizer.init(trained) if keep_optimizer else ())

    def train(base, server, client, batches, key, rate):
        fixed = trees.select(server.adapters, frozen)
        shared = trees.select(server.adapters, is_shared)
        loss = local.objective(model, task, base)

        def objective(trained, batch, key):
            value, metrics = loss(trees.join(trained, fixed), batch, key)
            if proximal:
                drift = trees.subtract(trees.select(trained, is_shared), shared)
                value = value + proximal / 2 * trees.squared_norm(drift)
            return value, metrics

        start = trees.join(shared, client.private)
        moments = client.optimizer if keep_optimizer else optimizer.init(start)
        trained, moments, metrics = local.train(objective, optimizer, start, moments, batches, key, rate=rate)
        client = Client(trees.select(trained, private), moments if keep_optimizer else ())
        return trees.join(trained, fixed), client, metrics

    def client_update(base, server, client, batches, key):
        rate = 1.0 if schedule is None else schedule(server.round)
        adapters, client, metrics = train(base, server, client, batches, key, rate)
        upload = trees.subtract(trees.select(adapters, is_shared), trees.select(server.adapters, is_shared))
        return client, upload, metrics | {"update_norm": jnp.sqrt(trees.squared_norm(upload))}

    def fold(uploads, cohort):
        return aggregate.weighted_sum(uploads, cohort, weighting)

    def server_update(server, sums):
        pseudo_gradient = trees.scale(aggregate.mean(sums), -1.0)
        shared = trees.select(server.adapters, is_shared)
        updates, state = server_optimizer.update(pseudo_gradient, server.optimizer, shared)
        rest = trees.select(server.adapters, lambda leaf: not is_shared(leaf))
        adapters = trees.join(optax.apply_updates(shared, updates), rest)
        return Server(adapters, state, server.round + 1), {"server_update_norm": jnp.sqrt(trees.squared_norm(updates))}

    def personalize(base, server, client, batches, key):
        # Not the schedule's: after the last round one that falls to 0 would leave nothing to personalize with.
        return train(base, server, client, batches, key, personal_rate)[0]

    def traffic(server):
        shared = adapters_lib.count(server.adapters, is_shared)
        return shared, shared

    return Algorithm(init, init_client, client_update, fold, server_update, personalize, traffic, shared=shared)


def shared(server: Server) -> PyTree:
    """Adapters to merge into the base for a further stage.

    Private leaves are as initialised, where they add nothing: dense updates are 0, and B is.
    """
    return server.adapters


def part(client: Client) -> PyTree:
    """Adapters that belong to this client's own base in a further stage: its embedding tables; {} without any.

    Raises:
      ValueError: a client that keeps something else, such as one half of a LoRA, which is no adapter by itself.
    """
    own = {path: node for path, node in adapters_lib.nodes(client.private).items() if jax.tree.leaves(node)}
    others = [".".join(path) for path, node in own.items() if not isinstance(node, adapters_lib.Table)]
    if others:
        raise ValueError(f"only embedding tables can be a client's part of a base, not what it keeps at {others[0]}")
    return adapters_lib.nest(own)


def fedit(model, task, init_adapters, optimizer, **settings) -> Algorithm:
    """FedIT, also known as HOMLoRA: A, B and the head are averaged factor by factor.

    With steps of personalization in the evaluation this is FedIT followed by local fine-tuning.
    """
    return fedavg(model, task, init_adapters, optimizer, **settings)


def fedprox(model, task, init_adapters, optimizer, *, proximal: float = 0.01, **settings) -> Algorithm:
    """FedIT with a proximal term; mu = 0.01 as in public federated instruction tuning."""
    return fedavg(model, task, init_adapters, optimizer, proximal=proximal, **settings)


def ffa_lora(model, task, init_adapters, optimizer, **settings) -> Algorithm:
    """FFA-LoRA: A stays as it was drawn, common to all clients, so that averaging B is exact."""
    return fedavg(model, task, init_adapters, optimizer, frozen=lambda leaf: leaf in ("a", "scale"), **settings)


def fedsa_lora(model, task, init_adapters, optimizer, *, private_head: bool = True, **settings) -> Algorithm:
    """FedSA-LoRA: only A is shared; B stays with the client, and so does the head, as in the reference code."""

    def private(leaf):
        return leaf == "b" or (private_head and leaf not in ("a", "scale"))

    return fedavg(model, task, init_adapters, optimizer, private=private, **settings)


def dept(model, task, init_adapters, optimizer, **settings) -> Algorithm:
    """DEPT in its SPEC variant: everything is trained, embedding tables stay with the client, the body is averaged.

    Tables are those of words, positions and types, not the LayerNorm behind them. A client that was never sampled has
    the pretrained ones. The vocabulary is common to all, as in FedP2EFT (arXiv 2502.04387), whose base this can be;
    the paper's own variant has one for each client.

    Raises:
      ValueError: adapters without an embedding table.
    """
    made = jax.eval_shape(init_adapters, jax.random.key(0))
    if not any(isinstance(node, adapters_lib.Table) for node in adapters_lib.nodes(made).values()):
        raise ValueError("dept keeps embedding tables with the clients, so adapter.kind must be 'full'")
    method = fedavg(model, task, init_adapters, optimizer, private=lambda leaf: leaf == "embedding", **settings)
    return method._replace(part=part)


def local_only(model, task, init_adapters, optimizer, *, keep_optimizer: bool = True, **settings) -> Algorithm:
    """Every client trains by itself and nothing is sent."""
    return fedavg(
        model,
        task,
        init_adapters,
        optimizer,
        private=lambda leaf: leaf != "scale",
        keep_optimizer=keep_optimizer,
        **settings,
    )


def centralized(model, task, init_adapters, optimizer, *, keep_optimizer: bool = True, **settings) -> Algorithm:
    """One client that holds everybody's examples: the federation's upper bound. The data must be pooled."""
    return fedavg(model, task, init_adapters, optimizer, keep_optimizer=keep_optimizer, **settings)

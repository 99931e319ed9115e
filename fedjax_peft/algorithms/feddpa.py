"""FedDPA-T: a global adapter for everybody and a local one that never leaves its client.

References:
  Yang et al., Dual-Personalizing Adapter for Federated Foundation Models, arXiv 2403.19211 (FedDPA).
  Lee et al., FedP2EFT, arXiv 2502.04387, whose variant this is: it makes the base of a further stage.

    client   train the global adapter from the server's; send its change
             freeze it as trained, train the local adapter beside it on the same batches; keep that one
    server   mean of the global adapters
    use      W x + global + w local, after training the local adapter a little further

The original trains the local adapter first, beside the global one as received, mixes (1 - w) global + w local with a w
that may depend on the instance, and averages uniformly; FedP2EFT adds the two up and weighs by examples.
"""

from collections.abc import Callable

import jax
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import local, trees
from fedjax_peft.algorithms import fedavg
from fedjax_peft.types import Algorithm, Model, PyTree, Task

# Folded into a key for what the local adapter draws; larger than any site or step, so that the global one goes on
# drawing exactly what it does in FedIT.
LOCAL = 2**31 - 1


@struct.dataclass
class Server:
    common: fedavg.Server
    local: PyTree  # what every client's own adapter starts from: A drawn once for all, B = 0


@struct.dataclass
class Client:
    local: PyTree  # its own adapter, with scales: they hold the weight w
    common: fedavg.Client  # moments of the global adapter, if they are kept
    optimizer: PyTree  # moments of the local one, likewise


def feddpa(
    model: Model,
    task: Task,
    init_adapters: Callable[..., PyTree],
    optimizer: optax.GradientTransformation,
    *,
    local_rank: int = 8,
    local_weight: float = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    keep_optimizer: bool = False,
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
) -> Algorithm:
    """FedDPA-T; clients evaluate the server's adapter plus their own.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key, **changed settings) -> adapters of kind `lora`, head included: the global ones.
      optimizer: of both adapters, each by itself.
      local_rank: R of local adapters. They have the targets of the global ones, but no head, and the scale alpha / R.
      local_weight: w on what local adapters add, in training and evaluation; 0 leaves the global model.
      server_optimizer, weighting, schedule: as in `fedavg.fedavg`; the original has `uniform` weighting.
      keep_optimizer: clients keep the moments of both adapters from round to round.
      personal_rate: factor on the learning rate in personalization, which trains the local adapter only.

    Raises:
      ValueError: a rank, a weight or a kind of adapter that does not fit.
    """
    _check(init_adapters, local_rank, local_weight)
    federated = fedavg.fedit(
        model,
        task,
        init_adapters,
        optimizer,
        server_optimizer=server_optimizer,
        weighting=weighting,
        keep_optimizer=keep_optimizer,
        schedule=schedule,
    )

    def init(key):
        own = init_adapters(jax.random.fold_in(key, LOCAL), rank=local_rank, head="frozen")
        return Server(federated.init(key), _each(own, lambda node: node.replace(scale=node.scale * local_weight)))

    def init_client(server, client_id, key):
        moments = optimizer.init(adapters_lib.trained(server.local)) if keep_optimizer else ()
        return Client(server.local, federated.init_client(server.common, client_id, key), moments)

    def train_local(base, frozen, client, batches, key, rate):
        loss = local.objective(model, task, base)
        fixed = adapters_lib.fixed(client.local)

        def objective(trained, batch, key):
            return loss(adapters_lib.beside(frozen, trees.join(trained, fixed)), batch, key)

        start = adapters_lib.trained(client.local)
        moments = client.optimizer if keep_optimizer else optimizer.init(start)
        trained, moments, metrics = local.train(objective, optimizer, start, moments, batches, key, rate=rate)
        client = client.replace(local=trees.join(trained, fixed), optimizer=moments if keep_optimizer else ())
        return client, metrics["loss"]

    def client_update(base, server, client, batches, key):
        received = server.common.adapters
        common, upload, metrics = federated.client_update(base, server.common, client.common, batches, key)
        trained = trees.add(adapters_lib.trained(received), upload)
        trained = trees.join(trained, adapters_lib.fixed(received))
        rate = 1.0 if schedule is None else schedule(server.common.round)
        key = jax.random.fold_in(key, LOCAL)
        client, loss = train_local(base, trained, client.replace(common=common), batches, key, rate)
        return client, upload, metrics | {"local_loss": loss}

    def server_update(server, sums):
        common, metrics = federated.server_update(server.common, sums)
        return server.replace(common=common), metrics

    def personalize(base, server, client, batches, key):
        client, _ = train_local(base, server.common.adapters, client, batches, key, personal_rate)
        return adapters_lib.concat(server.common.adapters, client.local)

    return Algorithm(
        init,
        init_client,
        client_update,
        federated.fold,
        server_update,
        personalize,
        lambda server: federated.traffic(server.common),
        shared=shared,
        part=part,
    )


def shared(server: Server) -> PyTree:
    """Adapters to merge into the base for a further stage: the global LoRA and the head that was trained with it."""
    return server.common.adapters


def part(client: Client) -> PyTree:
    """Adapters that belong to this client's own base in a further stage: its local LoRA, weighted.

    They have no dropout, as weights have none. Clients that were never sampled have B = 0 there, which adds nothing.
    """
    return _each(client.local, lambda node: node.replace(dropout=0.0))


def _each(adapters: PyTree, change: Callable[[PyTree], PyTree]) -> PyTree:
    return adapters_lib.nest({path: change(node) for path, node in adapters_lib.nodes(adapters).items()})


def _check(init_adapters: Callable[..., PyTree], local_rank: int, local_weight: float) -> None:
    if local_rank < 1:
        raise ValueError(f"algorithm.local_rank is {local_rank}, expected 1 or more")
    if not local_weight >= 0:
        raise ValueError(f"algorithm.local_weight is {local_weight}, expected 0 or more")
    own = jax.eval_shape(lambda key: init_adapters(key, rank=local_rank, head="frozen"), jax.random.key(0))
    if not all(isinstance(node, adapters_lib.LoRA) for node in adapters_lib.nodes(own).values()):
        raise ValueError("feddpa adds a LoRA of each client to a common one, so adapter.kind must be 'lora'")

"""PF2LoRA: a common adapter learnt for the personal ones that clients add to it.

Reference:
  Hao et al., Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach via
  Two-Level LoRA, arXiv 2503.03920.

    W_k = W_0 + B A + D_k C_k        common x = (A, B), personal y_k = (C_k, D_k), at every site

    min_x  mean_k f_k(x, y_k*(x))    s.t.  y_k*(x) in argmin_y f_k(x, y)

    a local step   y+ = y - alpha grad_y F(x, y; pi)                        SGD (Algorithm 1, line 5)
                   g  = d/dx F(x, y+(x); xi), y held                        hypergradient
                   x  = AdamW(x, g),  y = y+                                (line 6)
    server         mean of the x; the y never leave their clients

The rank of a client adapts by itself: D C cancels directions of B A or adds new ones. The paper's exact form of the
hypergradient is not public; here it is the derivative through one step of SGD from the personal adapter of the step
before, which is what the algorithm's two lines say.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import aggregate, bilevel, local, trees
from fedjax_peft.types import Algorithm, Array, Model, PyTree, Task

ORDERS = ("so", "fo", "joint")
PRODUCTS = (*bilevel.PRODUCTS, "revrev")
# Folded into a key for what personal adapters draw; larger than any site or step, so that the common ones go on drawing
# exactly what they do in FedIT.
PERSONAL = 2**31 - 1


@struct.dataclass
class Server:
    common: PyTree  # adapters that all clients share
    personal: PyTree  # what the adapters of a client that has none yet start from, unless each draws its own
    round: Array  # scalar int32, drives the schedule


@struct.dataclass
class Client:
    personal: PyTree  # adapters that never leave the client, warm from its last local step
    optimizer: PyTree  # moments of the common adapters, if they are kept
    rounds: Array  # scalar int32, in how many it took part


class Hypergradient(NamedTuple):
    """Both levels of a local step."""

    personal: PyTree  # y+
    gradient: PyTree  # of x
    loss: Array  # scalar, on the outer minibatch


def pf2lora(
    model: Model,
    task: Task,
    init_adapters: Callable[..., PyTree],
    optimizer: optax.GradientTransformation,
    *,
    client_rank: int = 2,
    client_rate: float = 5e-2,
    hypergradient: str = "so",
    hvp: str = "jvp",
    fd_eps: float = 1e-2,
    shared_batch: bool = False,
    personal_alpha: float | None = None,
    personal_head: bool = False,
    identical: bool = False,
    reset: bool = False,
    adapt_known: bool = False,
    weighting: str = "uniform",
    keep_optimizer: bool = True,
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
) -> Algorithm:
    """PF2LoRA; clients evaluate the common adapters plus their own.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key, **changed settings) -> adapters of kind `lora`: the common ones, of rank r.
      optimizer: of the common adapters.
      client_rank: r~ of the personal ones, at the same sites but for the task head's; 0 leaves HOMLoRA.
      client_rate: alpha, the step of SGD on them, which has neither momentum nor decay.
      hypergradient: `so`, second order: through the step of SGD; `fo` leaves the mixed second derivative out; `joint`
        takes both steps from the same point, the paper's ablation without bilevel optimization.
      hvp: how `so` multiplies the mixed second derivative with a vector: `jvp` (forward over reverse), `revrev` (one
        reverse pass through the step) or `fd` (central differences, for kernels without a second derivative).
      fd_eps: length of the step of `fd` along the vector.
      shared_batch: both levels see the whole batch; otherwise each has half of its examples, or both have the only one.
      personal_alpha: LoRA's numerator of personal adapters; by default their scale is that of the common ones.
      personal_head: the task head, dense, belongs to the personal level, not to the common one.
      identical: all clients draw the same C.
      reset: personal adapters start afresh in every round.
      adapt_known: clients that took part adapt once more in personalization, as new ones always do.
      weighting: of the mean over clients, `uniform` as in the objective, or `examples`.
      keep_optimizer: clients keep the moments of the common adapters from round to round.
      schedule: round -> factor on the learning rate of the common adapters.
      personal_rate: factor on `client_rate` in personalization, SGD on personal adapters beside frozen common ones.

    Raises:
      ValueError: a setting that does not exist or fit, a kind of adapter that does not, or, with `personal_head`, no
        dense head.
    """
    aggregate.check_weighting(weighting)
    _check_steps(client_rate, personal_alpha, personal_rate, hypergradient, hvp, fd_eps)
    _check_adapters(init_adapters, client_rank, personal_head)

    def init(key):
        common = init_adapters(key, head="frozen") if personal_head else init_adapters(key)
        return Server(common, _personal(jax.random.fold_in(key, PERSONAL), common), jnp.int32(0))

    def _personal(key, common):
        """Adapters of rank r~ at the sites of the common ones: C drawn, D = 0."""
        own = {}
        if client_rank:
            alpha = {} if personal_alpha is None else {"alpha": personal_alpha}
            own = adapters_lib.nodes(init_adapters(key, rank=client_rank, head="frozen", **alpha))
        if personal_alpha is None:
            shared = adapters_lib.nodes(common)
            own = {path: node.replace(scale=_like(shared[path].scale, client_rank)) for path, node in own.items()}
        if personal_head:
            made = adapters_lib.nodes(init_adapters(key))
            own |= {path: node for path, node in made.items() if not isinstance(node, adapters_lib.LoRA)}
        return adapters_lib.nest(own)

    def fresh(server, key):
        return server.personal if identical else _personal(key, server.common)

    def init_client(server, client_id, key):
        del client_id
        moments = optimizer.init(adapters_lib.trained(server.common)) if keep_optimizer else ()
        return Client(fresh(server, key), moments, jnp.int32(0))

    def losses(base, server, client):
        """(x, y, batch, key) -> loss."""
        loss = local.objective(model, task, base)

        def objective(x, y, batch, key):
            common = trees.join(x, adapters_lib.fixed(server.common))
            return loss(adapters_lib.concat(common, trees.join(y, adapters_lib.fixed(client.personal))), batch, key)[0]

        return objective

    def client_update(base, server, client, batches, key):
        rate = 1.0 if schedule is None else schedule(server.round)
        start = adapters_lib.trained(server.common)
        # Not the key of `init_client`, which this client might never have used.
        personal = fresh(server, jax.random.fold_in(key, PERSONAL)) if reset else client.personal
        loss = losses(base, server, client)

        def step(carry, batch, key):
            x, y, moments = carry
            pi, xi = (batch, batch) if shared_batch else bilevel.parts(batch, 2)
            inner_key, outer_key = jax.random.split(key)
            both = two_level(
                lambda x, y: loss(x, y, pi, inner_key),
                lambda x, y: loss(x, y, xi, outer_key),
                x,
                y,
                client_rate,
                hypergradient=hypergradient,
                hvp=hvp,
                fd_eps=fd_eps,
            )
            updates, moments = optimizer.update(both.gradient, moments, x)
            x = optax.apply_updates(x, trees.scale(updates, rate))
            return (x, both.personal, moments), {"loss": both.loss}

        moments = client.optimizer if keep_optimizer else optimizer.init(start)
        carry = (start, adapters_lib.trained(personal), moments)
        (x, y, moments), metrics = local.scan(step, carry, batches, key)
        upload = trees.subtract(x, start)
        personal = trees.join(y, adapters_lib.fixed(personal))
        client = Client(personal, moments if keep_optimizer else (), client.rounds + 1)
        return client, upload, metrics | {"update_norm": jnp.sqrt(trees.squared_norm(upload))}

    def fold(uploads, cohort):
        return aggregate.weighted_sum(uploads, cohort, weighting)

    def server_update(server, sums):
        mean = aggregate.mean(sums)
        common = trees.join(trees.add(adapters_lib.trained(server.common), mean), adapters_lib.fixed(server.common))
        metrics = {"server_update_norm": jnp.sqrt(trees.squared_norm(mean))}
        return Server(common, server.personal, server.round + 1), metrics

    def personalize(base, server, client, batches, key):
        loss, x = losses(base, server, client), adapters_lib.trained(server.common)

        def step(y, batch, key):
            value, gradient = jax.value_and_grad(lambda y: loss(x, y, batch, key))(y)
            return trees.subtract(y, trees.scale(gradient, personal_rate * client_rate)), {"loss": value}

        start = adapters_lib.trained(client.personal)
        adapted, _ = local.scan(step, start, batches, key)
        y = adapted if adapt_known else trees.where(client.rounds > 0, start, adapted)
        return adapters_lib.concat(server.common, trees.join(y, adapters_lib.fixed(client.personal)))

    def traffic(server):
        sent = adapters_lib.count(server.common)
        return sent, sent

    return Algorithm(init, init_client, client_update, fold, server_update, personalize, traffic, shared=shared)


def shared(server: Server) -> PyTree:
    """Adapters to merge into the base for a further stage: the common ones."""
    return server.common


def two_level(
    inner: Callable[[PyTree, PyTree], Array],
    outer: Callable[[PyTree, PyTree], Array],
    x: PyTree,
    y: PyTree,
    rate: float,
    *,
    hypergradient: str = "so",
    hvp: str = "jvp",
    fd_eps: float = 1e-2,
) -> Hypergradient:
    """The step of the personal level and the gradient of the common one.

    Args:
      inner, outer: (x, y) -> loss on the minibatches pi and xi.
      x, y: common and personal parameters; y is held where the hypergradient is taken.
      rate: alpha.
      hypergradient, hvp, fd_eps: as in `pf2lora`.
    """

    def lower(x):
        return trees.subtract(y, trees.scale(jax.grad(inner, 1)(x, y), rate))

    if hypergradient == "so" and hvp == "revrev":

        def unrolled(x):
            stepped = lower(x)
            return outer(x, stepped), stepped

        (loss, stepped), gradient = jax.value_and_grad(unrolled, has_aux=True)(x)
        return Hypergradient(stepped, gradient, loss)
    stepped = lower(x)
    if hypergradient != "so" or not jax.tree.leaves(y):
        loss, gradient = jax.value_and_grad(outer)(x, y if hypergradient == "joint" else stepped)
        return Hypergradient(stepped, gradient, loss)
    loss, (gradient, direction) = jax.value_and_grad(outer, (0, 1))(x, stepped)
    mixed = bilevel.hessian_vector(lambda y: jax.grad(inner)(x, y), y, direction, how=hvp, eps=fd_eps)
    return Hypergradient(stepped, trees.subtract(gradient, trees.scale(mixed, rate)), loss)


def _like(scale: Array, rank: int) -> Array:
    """The scale of a site, which all of its ranks share, for another number of them."""
    return jnp.broadcast_to(scale[..., :1], (*scale.shape[:-1], rank))


def _check_steps(client_rate, personal_alpha, personal_rate, hypergradient, hvp, fd_eps) -> None:
    for name, rate in (("algorithm.client_rate", client_rate), ("algorithm.personal_rate", personal_rate)):
        if not rate >= 0:
            raise ValueError(f"{name} is {rate}, expected 0 or more")
    if personal_alpha is not None and not personal_alpha > 0:
        raise ValueError(f"algorithm.personal_alpha is {personal_alpha}, expected more than 0, or None for that of r")
    if hypergradient not in ORDERS:
        raise ValueError(f"algorithm.hypergradient is {hypergradient!r}, expected one of {', '.join(ORDERS)}")
    if hvp not in PRODUCTS:
        raise ValueError(f"algorithm.hvp is {hvp!r}, expected one of {', '.join(PRODUCTS)}")
    if not fd_eps > 0:
        raise ValueError(f"algorithm.fd_eps is {fd_eps}, expected a positive length")


def _check_adapters(init_adapters, client_rank, personal_head) -> None:
    common, whole = (
        adapters_lib.nodes(jax.eval_shape(lambda key, own=own: init_adapters(key, **own), jax.random.key(0)))
        for own in ({"head": "frozen"}, {})
    )
    if not all(isinstance(node, adapters_lib.LoRA) for node in common.values()):
        raise ValueError("pf2lora adds a LoRA of each client to a common one, so adapter.kind must be 'lora'")
    most = min(min(node.a.shape[-2], node.b.shape[-1]) for node in common.values())
    if not 0 <= client_rank <= most:
        raise ValueError(f"algorithm.client_rank is {client_rank}, expected 0 to {most}, the smallest side of a site")
    if personal_head and all(isinstance(node, adapters_lib.LoRA) for node in whole.values()):
        raise ValueError("algorithm.personal_head is True, which expects a dense head: adapter.head must be 'full'")

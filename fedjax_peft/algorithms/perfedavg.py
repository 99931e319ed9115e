"""Per-FedAvg over LoRA: adapters from which one step of SGD on a client's own examples leads far.

Fallah, Mokhtari and Ozdaglar, Personalized Federated Learning: A Meta-Learning Approach, arXiv 2002.07948, applied to
(A, B) and the head as in the comparison of Hao et al., PF2LoRA, arXiv 2503.03920.

    min_x  mean_k f_k(x - a grad f_k(x))

    a local step   x~ = x - a grad f(x; b1)
                   g  = (I - a H(x; b3)) grad f(x~; b2)          three independent minibatches
                   x  = optimizer(x, g)                          the paper's is SGD of step b
    server         mean of the x
    use            x - a grad f(x)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import bilevel, local, trees
from fedjax_peft.algorithms import fedavg
from fedjax_peft.types import Algorithm, Array, Batches, Model, PyTree, Task

ORDERS = {"exact": "jvp", "hf": "fd", "fo": None}
"""How the Hessian is multiplied with a vector."""


def perfedavg(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    inner_rate: float = 1e-2,
    order: str = "exact",
    fd_eps: float = 1e-2,
    weighting: str = "uniform",
    keep_optimizer: bool = True,
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
) -> Algorithm:
    """Per-FedAvg. Each of the three minibatches of a local step is about a third of the step's batch (`bilevel.parts`).

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters.
      optimizer: of the outer step. It takes g for a gradient; SGD is the paper's, AdamW that of PF2LoRA's comparison.
      inner_rate: a, the step of SGD inside of the objective and in personalization.
      order: `exact`; `hf`, Hessian-free: H v by central differences; or `fo`, first-order: without H.
      fd_eps: of `hf`, the length of the step to both sides. The paper's is that of v times a constant.
      weighting: `uniform`, as in the objective, or `examples`.
      keep_optimizer: clients keep their moments from round to round.
      schedule: round -> factor on the learning rate of the outer step.
      personal_rate: factor on `inner_rate` in personalization, which is one step of SGD for each batch.

    Raises:
      ValueError: a setting that does not exist; when traced, a batch of fewer than three examples.
    """
    _check(inner_rate, order, fd_eps)
    federated = fedavg.fedit(model, task, init_adapters, optimizer, weighting=weighting, keep_optimizer=keep_optimizer)

    def objective(base, server):
        """The loss as a function of what is trained, the received value of that, and what is not trained."""
        loss = local.objective(model, task, base)
        fixed = adapters_lib.fixed(server.adapters)
        start = adapters_lib.trained(server.adapters)
        return lambda trained, batch, key: loss(trees.join(trained, fixed), batch, key), start, fixed

    def client_update(base, server, client, batches, key):
        loss, start, _ = objective(base, server)
        rate = 1.0 if schedule is None else schedule(server.round)

        def step(carry, batch, key):
            x, moments = carry
            g, metrics = meta_gradient(loss, x, batch, key, inner_rate=inner_rate, order=order, fd_eps=fd_eps)
            updates, moments = optimizer.update(g, moments, x)
            return (optax.apply_updates(x, trees.scale(updates, rate)), moments), metrics

        moments = client.optimizer if keep_optimizer else optimizer.init(start)
        (x, moments), metrics = local.scan(step, (start, moments), batches, key)
        client = client.replace(optimizer=moments if keep_optimizer else ())
        upload = trees.subtract(x, start)
        return client, upload, metrics | {"update_norm": jnp.sqrt(trees.squared_norm(upload))}

    def personalize(base, server, client, batches, key):
        loss, start, fixed = objective(base, server)
        sgd = optax.sgd(inner_rate)
        x, _, _ = local.train(loss, sgd, start, sgd.init(start), batches, key, rate=personal_rate)
        return trees.join(x, fixed)

    return federated._replace(client_update=client_update, personalize=personalize)


def meta_gradient(
    loss: local.Loss,
    x: PyTree,
    batch: Batches,
    key: Array,
    *,
    inner_rate: float,
    order: str = "exact",
    fd_eps: float = 1e-2,
) -> tuple[PyTree, dict[str, Array]]:
    """g of one local step on the thirds of a batch; the metrics are the losses before and after the inner step.

    Each third has a key of its own, common to all that is computed on it.
    """
    first, second, third = zip(
        bilevel.parts(batch, 3), (jax.random.fold_in(key, index) for index in range(3)), strict=True
    )
    (before, _), gradient = jax.value_and_grad(loss, has_aux=True)(x, *first)
    inner = trees.subtract(x, trees.scale(gradient, inner_rate))
    (after, _), outer = jax.value_and_grad(loss, has_aux=True)(inner, *second)
    metrics = {"loss": before, "adapted_loss": after}
    if ORDERS[order] is None:
        return outer, metrics

    def slope(x):
        return jax.grad(loss, has_aux=True)(x, *third)[0]

    product = bilevel.hessian_vector(slope, x, outer, how=ORDERS[order], eps=fd_eps)
    return trees.subtract(outer, trees.scale(product, inner_rate)), metrics


def _check(inner_rate: float, order: str, fd_eps: float) -> None:
    if not inner_rate >= 0:
        raise ValueError(f"algorithm.inner_rate is {inner_rate}, expected 0 or more")
    if order not in ORDERS:
        raise ValueError(f"algorithm.order is {order!r}, expected one of {', '.join(ORDERS)}")
    if not fd_eps > 0:
        raise ValueError(f"algorithm.fd_eps is {fd_eps}, expected a positive length")

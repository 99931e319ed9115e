"""Training on the batches of one client: a scan over steps in which padding changes nothing."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import trees
from fedjax_peft.types import Array, Batches, Model, PyTree, Task

Step = Callable[[PyTree, Batches, Array], tuple[PyTree, dict[str, Array]]]
Loss = Callable[[PyTree, Batches, Array], tuple[Array, dict[str, Array]]]


def scan(step: Step, carry: PyTree, batches: Batches, key: Array) -> tuple[PyTree, dict[str, Array]]:
    """Runs `step` over the S batches of one client.

    Args:
      step: (carry, batch, key) -> (carry, metrics); the batch has no step axis and is cut to its width.
      carry: what steps hand on.
      batches: `[S, B, ..]`; a step without a single example leaves the carry as it is.
      key: step s uses `fold_in(key, s)`.

    Returns:
      The last carry, and the mean of each metric over the steps that had examples (0 if there were none).
    """

    def body(carry, step_input):
        index, batch = step_input
        step_key = jax.random.fold_in(key, index)
        branches = [_at_width(step, width, step_key) for width in batches.widths] or [
            lambda carry, batch: step(carry, batch, step_key)
        ]
        if len(branches) == 1:
            new, metrics = branches[0](carry, batch)
        else:
            # The index has no client axis, so it stays a branch under vmap and only one width is computed.
            new, metrics = jax.lax.switch(batch.width, branches, carry, batch)
        real = jnp.any(batch.weights > 0)
        return trees.where(real, new, carry), (trees.where(real, metrics, trees.zeros_like(metrics)), real)

    batches = batches.replace(constants={})  # they have no axis of steps
    steps = jnp.arange(batches.weights.shape[0], dtype=jnp.int32)
    carry, (metrics, real) = jax.lax.scan(body, carry, (steps, batches))
    count = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1.0)
    return carry, jax.tree.map(lambda values: jnp.sum(values, axis=0) / count, metrics)


def objective(model: Model, task: Task, base: PyTree) -> Loss:
    """The weighted mean loss over a batch as a function of the adapters: (adapters, batch, key) -> (loss, metrics)."""

    def loss(adapters, batch, key):
        mean = mean_loss(task, model.apply(base, adapters, batch.inputs, key), batch)
        return mean, {"loss": mean}

    return loss


def mean_loss(task: Task, outputs: PyTree, batch: Batches) -> Array:
    """The weighted mean over the examples of a batch `[B, ..]`, 0 if there are none; padding may be anything."""
    losses = jnp.where(batch.weights > 0, task.loss(outputs, batch.labels) * batch.weights, 0.0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(batch.weights), 1.0)


def reweighted(batches: Batches, weights: Array) -> Batches:
    """The batches with other weights of their examples; answers that weigh nothing are no targets of any mean."""
    labels = batches.labels
    if isinstance(labels, Mapping) and "targets" in labels:
        labels = {**labels, "targets": jnp.where(weights[..., None] > 0, labels["targets"], -1)}
    return batches.replace(weights=weights, labels=labels)


def train(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    batches: Batches,
    key: Array,
    *,
    rate: Array | float = 1.0,
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Optimizer steps on `params` over the batches of one client.

    Args:
      loss: (params, batch, key) -> (loss, metrics).
      optimizer: its updates are multiplied by `rate`, the value of a schedule over rounds.

    Returns:
      (params, optimizer state, mean metrics).
    """

    def step(carry, batch, key):
        params, state = carry
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, trees.scale(updates, rate)), state), metrics

    (params, state), metrics = scan(step, (params, state), batches, key)
    return params, state, metrics


def held_out(batches: Batches, setting: str, *, labelled: bool = True) -> Batches:
    """The examples that a client has not trained on, `constants["aux"]`, as batches `[A, B, ..]`.

    Args:
      setting: of the algorithm, that asks for them with the value `aux`.
      labelled: whether their labels are needed; otherwise they are left out.

    Raises:
      ValueError: when traced, if clients have none, or none with labels.
    """
    if "aux" not in batches.constants:
        raise ValueError(f"algorithm.{setting} is 'aux', but clients have no constant 'aux' of held-out examples")
    aux = batches.constants["aux"]
    if labelled and "labels" not in aux:
        raise ValueError(f"algorithm.{setting} is 'aux', but the clients' constant 'aux' has no labels")
    return batches.replace(
        inputs=aux["inputs"],
        labels=aux["labels"] if labelled else (),
        weights=aux["weights"],
        width=jnp.zeros(aux["weights"].shape[:1], jnp.int32),
        widths=(),
        constants={},
    )


def make_optimizer(
    name: str = "adamw",
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    clip: float | None = None,
    momentum: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """A client's optimizer with nothing implicit.

    Args:
      name: `adamw` or `sgd`.
      learning_rate: in front of the whole update.
      weight_decay: decoupled, multiplied by the learning rate.
      clip: largest global norm of the gradient over all that the client trains; None does not clip.
      momentum: of `sgd`.
      b1, b2, eps: of `adamw`.

    Raises:
      ValueError: a number that no optimizer can have.
    """
    for key, value in {"learning_rate": learning_rate, "clip": clip}.items():
        if value is not None and not value > 0:
            raise ValueError(f"optimizer.{key} is {value}, expected a positive number")
    for key, value in {"momentum": momentum, "b1": b1, "b2": b2}.items():
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{key} is {value}, expected at least 0 and below 1")
    for key, value in {"weight_decay": weight_decay, "eps": eps}.items():
        if not value >= 0:
            raise ValueError(f"optimizer.{key} is {value}, expected 0 or more")
    if name == "adamw":
        direction = optax.scale_by_adam(b1, b2, eps)
    elif name == "sgd":
        direction = optax.trace(momentum) if momentum else optax.identity()
    else:
        raise ValueError(f"optimizer.name is {name!r}, expected 'adamw' or 'sgd'")
    clipping = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    return optax.chain(clipping, direction, decay, optax.scale(-learning_rate))


def make_schedule(name: str = "constant", *, rounds: int, warmup: int = 0, end: float = 0.0) -> optax.Schedule:
    """Factor on the client's learning rate as a function of the round.

    Args:
      name: `constant`; `linear` or `cosine` decay, from 1 to what would be `end` one round after the last;
        `annealed`, the cosine one round ahead, which has `end` in the last; or `exponential`, by the same factor each
        round to `end` in the last one.
      warmup: rounds over which the factor first rises linearly from 1 / warmup to 1; the decay has those after it.
    """
    steps = max(rounds - warmup, 1)
    shapes = {
        "constant": lambda: optax.constant_schedule(1.0),
        "linear": lambda: optax.linear_schedule(1.0, end, steps),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, steps, end),
        "annealed": lambda: lambda index: optax.cosine_decay_schedule(1.0, steps, end)(index + 1),
        "exponential": lambda: optax.exponential_decay(1.0, max(steps - 1, 1), end),
    }
    if name not in shapes:
        raise ValueError(f"schedule.name is {name!r}, expected one of {', '.join(shapes)}")
    if not 0 <= warmup < max(rounds, 1):
        raise ValueError(f"schedule.warmup is {warmup} rounds, expected 0 to {rounds - 1}")
    # optax takes 0 for a rate that stays as it is.
    if name == "exponential" and not end > 0:
        raise ValueError(f"schedule.end is {end}, expected a positive number for an exponential decay")
    decay = shapes[name]()
    if not warmup:
        return decay
    rise = optax.linear_schedule(1.0 / warmup, 1.0, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def _at_width(step, width, key):
    def run(carry, batch):
        inputs = {name: value[..., :width] for name, value in batch.inputs.items()}
        return step(carry, batch.replace(inputs=inputs, widths=()), key)

    return run

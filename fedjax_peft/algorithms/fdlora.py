"""FDLoRA: a common LoRA with momentum on the server, and snapshots of it that each client fuses with what it receives.

Qi et al., FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA Tuning, arXiv 2406.07925, as
in the comparison of Zhang et al., FedAMoLE, arXiv 2411.19128:

    warm-up      one round of FedIT, theta = mean of the theta_k; no snapshots
    client       round t = 0, 1, ..: theta_k = optimizer steps from theta; every H rounds private_k = theta_k
    server       g = mean of theta - theta_k; Nesterov's SGD on theta
    use          w1 theta + w2 private_k, w by five probes of the loss on held-out examples; never written back

A run has R + 1 rounds, the first of which is the warm-up: clients train once more than with other methods. The paper
describes a private LoRA that is trained by itself; the comparison has copies, and so has this. Its search is COBYLA,
which differs from version to version; `search` is a fixed rule that takes the same first steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import local, trees
from fedjax_peft.algorithms import fedavg
from fedjax_peft.types import Algorithm, Array, Batches, Model, PyTree, Task

BOX, STEP = 1.5, 0.5  # of the search: weights lie in [-BOX, BOX], the first probes STEP apart
FUSIONS, SOURCES = ("factors", "updates"), ("aux", "train")


@struct.dataclass
class Client:
    private: PyTree  # snapshot of what the client trained; what it first received until there is one
    common: fedavg.Client


def fdlora(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    sync_every: int = 5,
    outer_rate: float = 1.0,
    outer_momentum: float = 0.5,
    fuse: str = "factors",
    fuse_on: str = "aux",
    fuse_batches: int = 5,
    penalty: float = 0.05,
    warmup_ticks: bool = False,
    weighting: str = "uniform",
    schedule: optax.Schedule | None = None,
) -> Algorithm:
    """FDLoRA.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters.
      optimizer: of the inner steps; it starts afresh each round.
      sync_every: H, rounds from snapshot to snapshot.
      outer_rate, outer_momentum: of the server's SGD; 1 and 0 average, as FedIT does.
      fuse: `factors` weighs A and B each, so that what a LoRA adds is quadratic in w; `updates` weighs what it adds.
      fuse_on: `aux`, examples held out for the client and given as `constants["aux"]`, a dict of `inputs`
        {name: [A, B, T]}, `labels` [A, B, ..] and `weights` [A, B]; or the batches to personalize on, `train`. Nothing
        is trained on either. A client without any example has w = (1, 0).
      fuse_batches: batches that a probe's loss is the mean of. Each probe takes the next ones, around and around.
      penalty: factor on mean |w|, which is added to that.
      warmup_ticks: whether the warm-up counts for the schedule, as in the published code; else the round after it has
        the rate of the warm-up again.
      weighting: `uniform`, or by `examples`.
      schedule: round -> factor on the client's learning rate in training.

    Raises:
      ValueError: a setting that there is not; when traced, no held-out examples where they are asked for.
    """
    _check(sync_every=sync_every, fuse_batches=fuse_batches, outer_rate=outer_rate, fuse=fuse, fuse_on=fuse_on)
    if not 0 <= outer_momentum < 1:
        raise ValueError(f"algorithm.outer_momentum is {outer_momentum}, expected at least 0 and below 1")
    if not penalty >= 0:
        raise ValueError(f"algorithm.penalty is {penalty}, expected 0 or more")
    federated = fedavg.fedit(
        model,
        task,
        init_adapters,
        optimizer,
        server_optimizer=outer(outer_rate, outer_momentum),
        weighting=weighting,
        schedule=schedule and (lambda index: schedule(jnp.maximum(index - (not warmup_ticks), 0))),
    )

    def init_client(server, client_id, key):
        return Client(adapters_lib.trained(server.adapters), federated.init_client(server, client_id, key))

    def client_update(base, server, client, batches, key):
        common, upload, metrics = federated.client_update(base, server, client.common, batches, key)
        index = server.round - 1  # of the warm-up it is -1
        synced = (index >= 0) & (index % sync_every == 0)
        private = trees.where(synced, trees.add(adapters_lib.trained(server.adapters), upload), client.private)
        return Client(private, common), upload, metrics

    def personalize(base, server, client, batches, key):
        fixed = adapters_lib.fixed(server.adapters)
        pair = server.adapters, trees.join(client.private, fixed)
        texts = local.held_out(batches, "fuse_on") if fuse_on == "aux" else batches.replace(constants={})
        loss = local.objective(model, task, base)

        def value(weights, probe):
            fused = fusion(*pair, weights, fuse)
            some = _following(texts, probe * fuse_batches, fuse_batches)
            _, metrics = local.scan(lambda carry, batch, _: (carry, loss(fused, batch, None)[1]), (), some, key)
            return metrics["loss"] + penalty * jnp.mean(jnp.abs(weights))

        first = jnp.array([1.0, 0.0], jnp.float32)
        if not texts.weights.size:
            return fusion(*pair, first, fuse)
        return fusion(*pair, jnp.where(jnp.any(texts.weights > 0), search(value), first), fuse)

    own = {"init_client": init_client, "client_update": client_update, "personalize": personalize}
    return federated._replace(**own, aux="fuse_on" if fuse_on == "aux" else None)


def outer(rate: float, momentum: float) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum after a first step that is a plain mean and leaves the momentum alone."""
    sgd = optax.sgd(rate, momentum, nesterov=True)

    def init(params):
        return sgd.init(params), jnp.int32(0)

    def update(gradients, state, params=None):
        state, count = state
        updates, new = sgd.update(gradients, state, params)
        warm = count > 0
        updates = trees.where(warm, updates, trees.scale(gradients, -1.0))
        return updates, (trees.where(warm, new, state), count + 1)

    return optax.GradientTransformation(init, update)


def fusion(common: PyTree, private: PyTree, weights: Array, fuse: str) -> PyTree:
    """Adapters w1 common + w2 private, weights [2]; see `fdlora` for what that means of a LoRA."""
    if fuse == "factors":
        return trees.join(
            trees.add(
                trees.scale(adapters_lib.trained(common), weights[0]),
                trees.scale(adapters_lib.trained(private), weights[1]),
            ),
            adapters_lib.fixed(common),
        )

    def weighed(node, weight):
        is_lora = isinstance(node, adapters_lib.LoRA)
        return node.replace(scale=node.scale * weight) if is_lora else trees.scale(node, weight)

    parts = (
        adapters_lib.nest({path: weighed(node, weight) for path, node in adapters_lib.nodes(tree).items()})
        for tree, weight in zip((common, private), weights, strict=True)
    )
    return adapters_lib.concat(*parts)


def search(value: Callable[[Array, int], Array]) -> Array:
    """The best of five probes of a function of two numbers in a box.

    (0, 0); (s, 0); the better of them + (0, s); the best so far, s down the plane through the three; the best so far, s
    down the plane through these with the fourth in place of the worst, or s / 2 if the fourth was not the best. Where
    three points are on a line, the plane before is kept. Of equal values the earlier counts as better.

    Args:
      value: (weights [2], number of the probe, from 0 to 4 and traced) -> scalar; what is not a number is the worst.

    Returns:
      [2] weights.
    """

    def best(points, values):
        return points[jnp.argmin(values)]

    def fourth(points, values):
        slope = _slope(points[:3], values[:3], jnp.zeros(2, jnp.float32))
        return best(points, values) - STEP * _direction(slope)

    def fifth(points, values):
        worst = jnp.argmax(values[:3])
        slope = _slope(points[:3], values[:3], jnp.zeros(2, jnp.float32))
        slope = _slope(points[:3].at[worst].set(points[3]), values[:3].at[worst].set(values[3]), slope)
        step = jnp.where(values[3] < jnp.min(values[:3]), STEP, STEP / 2)
        return best(points, values) - step * _direction(slope)

    rules = (
        lambda points, values: jnp.zeros(2, jnp.float32),
        lambda points, values: jnp.array([STEP, 0.0], jnp.float32),
        lambda points, values: best(points, values) + jnp.array([0.0, STEP], jnp.float32),
        fourth,
        fifth,
    )

    def probe(index, state):
        points, values = state
        point = jnp.clip(jax.lax.switch(index, rules, points, values), -BOX, BOX)
        found = value(point, index)
        # No comparison finds a number that is none.
        return points.at[index].set(point), values.at[index].set(jnp.where(jnp.isnan(found), jnp.inf, found))

    # A loop, so that the model is compiled once for all probes.
    count = len(rules)
    nothing = jnp.zeros((count, 2), jnp.float32), jnp.full(count, jnp.inf, jnp.float32)
    return best(*jax.lax.fori_loop(0, count, probe, nothing))


def _following(texts: Batches, start: Array, count: int) -> Batches:
    """So many of the batches that have an example, wherever they are, beginning anew after the last one."""
    real = jnp.any(texts.weights > 0, axis=-1)
    turn = (start + jnp.arange(count, dtype=jnp.int32)) % jnp.maximum(jnp.sum(real, dtype=jnp.int32), 1)
    index = jnp.argsort(~real, stable=True)[turn]
    return jax.tree.map(lambda leaf: leaf[index], texts)


def _slope(points: Array, values: Array, before: Array) -> Array:
    """Gradient [2] of the plane through three points [3, 2], or the one `before` if they are on a line."""
    (a, b), (c, d) = points[1:] - points[:1]
    rise, other = values[1:] - values[:1]
    area = a * d - b * c
    flat = jnp.abs(area) < 1e-6
    area = jnp.where(flat, 1.0, area)
    return jnp.where(flat, before, jnp.stack([d * rise - b * other, a * other - c * rise]) / area)


def _direction(slope: Array) -> Array:
    length = jnp.sqrt(jnp.sum(jnp.square(slope)))
    return jnp.where(length > 0, slope / jnp.where(length > 0, length, 1.0), 0.0)


def _check(sync_every: int, fuse_batches: int, outer_rate: float, fuse: str, fuse_on: str) -> None:
    for name, value in (("sync_every", sync_every), ("fuse_batches", fuse_batches)):
        if value < 1:
            raise ValueError(f"algorithm.{name} is {value}, expected 1 or more")
    if not outer_rate > 0:
        raise ValueError(f"algorithm.outer_rate is {outer_rate}, expected a positive number")
    for name, value, known in (("fuse", fuse, FUSIONS), ("fuse_on", fuse_on, SOURCES)):
        if value not in known:
            raise ValueError(f"algorithm.{name} is {value!r}, expected one of {', '.join(known)}")

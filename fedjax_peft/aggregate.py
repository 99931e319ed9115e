"""How a server turns what clients send into its next state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import trees
from fedjax_peft.types import Array, Cohort, PyTree

WEIGHTINGS = ("examples", "uniform")


class WeightedSum(NamedTuple):
    """A weighted mean on its way: additive over clients."""

    total: PyTree  # sum of weight x upload
    weight: Array  # scalar float32


def weighted_sum(uploads: PyTree, cohort: Cohort, weighting: str) -> WeightedSum:
    """Sums uploads `[C, ..]` weighted by the clients' examples or by 1; slots that did not report weigh nothing."""
    weights = cohort.examples if weighting == "examples" else jnp.ones_like(cohort.examples)
    weights = jnp.where(cohort.reported, weights, 0.0)
    # Accelerators would round float32 factors to fewer bits.
    total = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1, precision="highest"), uploads)
    return WeightedSum(total, jnp.sum(weights))


def mean(sums: WeightedSum) -> PyTree:
    """The weighted mean; 0 where nobody weighs anything."""
    return trees.scale(sums.total, 1.0 / jnp.where(sums.weight > 0, sums.weight, 1.0))


def check_weighting(weighting: str) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"algorithm.weighting is {weighting!r}, expected one of {', '.join(WEIGHTINGS)}")


def server_optimizer(
    name: str = "average",
    *,
    learning_rate: float | None = None,
    momentum: float = 0.9,
    second_momentum: float = 0.99,
    adaptivity: float = 1e-3,
) -> optax.GradientTransformation:
    """Server optimizers of Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295, Algorithm 2, as optax
    transformations of the pseudo-gradient -Delta.

    Args:
      name: `average` (FedAvg), `momentum` (FedAvgM: m = b1 m + (1 - b1) Delta), `adagrad`, `adam` or `yogi`.
      learning_rate: eta; by default 1 for `average` and `momentum`, 1e-3 for the adaptive ones.
      momentum: b1. Adagrad has none.
      second_momentum: b2.
      adaptivity: tau; the second moment starts at tau^2.

    Raises:
      ValueError: a number that no optimizer can have.
    """
    for key, value in {"learning_rate": learning_rate, "adaptivity": adaptivity}.items():
        if value is not None and not value > 0:
            raise ValueError(f"server.{key} is {value}, expected a positive number")
    for key, value in {"momentum": momentum, "second_momentum": second_momentum}.items():
        if not 0 <= value < 1:
            raise ValueError(f"server.{key} is {value}, expected at least 0 and below 1")
    rate = learning_rate if learning_rate is not None else {"average": 1.0, "momentum": 1.0}.get(name, 1e-3)
    if name == "average":
        return optax.sgd(rate)
    if name == "momentum":
        return optax.chain(optax.ema(momentum, debias=False), optax.sgd(rate))
    if name not in _SECOND_MOMENTS:
        names = ", ".join(["average", "momentum", *_SECOND_MOMENTS])
        raise ValueError(f"server.name is {name!r}, expected one of {names}")
    first = 0.0 if name == "adagrad" else momentum
    return optax.chain(_adaptive(_SECOND_MOMENTS[name], first, second_momentum, adaptivity), optax.sgd(rate))


_SECOND_MOMENTS = {
    "adagrad": lambda v, square, decay: v + square,
    "adam": lambda v, square, decay: decay * v + (1 - decay) * square,
    "yogi": lambda v, square, decay: v - (1 - decay) * square * jnp.sign(v - square),
}


class _AdaptiveState(NamedTuple):
    m: PyTree
    v: PyTree


def _adaptive(second_moment, momentum, second_momentum, adaptivity) -> optax.GradientTransformation:
    # Neither optax.adam nor optax.yogi: the paper corrects no bias and starts v at tau^2.
    def init(params):
        start = jax.tree.map(lambda leaf: jnp.full_like(leaf, adaptivity**2), params)
        return _AdaptiveState(trees.zeros_like(params), start)

    def update(gradients, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.m, gradients)
        v = jax.tree.map(lambda v, g: second_moment(v, jnp.square(g), second_momentum), state.v, gradients)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + adaptivity), m, v)
        return updates, _AdaptiveState(m, v)

    return optax.GradientTransformation(init, update)

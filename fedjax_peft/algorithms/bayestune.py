"""BayesTune-LoRA: a positive scale for each rank, learnt under sparse priors, says which ranks a client keeps.

Lee et al., FedP2EFT: Federated Learning to Personalize PEFT for Multilingual LLMs, arXiv 2502.04387, where this is both
the adapter of the method and, without a federation, one of its baselines. With scales l [J, R] an update is
B diag(l) A, and a client's loss is

    L = CE + (significance / n) sum_jk |B_jk| / l_jk + (sparsity / n) sum_jk (100 l_jk + ln l_jk)

over its n training examples: a Laplace prior on B whose width is the scale, and a Gamma prior on the scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import local, ranks, trees
from fedjax_peft.algorithms import lora
from fedjax_peft.types import Algorithm, Array, Batches, Model, PyTree, Task


class Scales(NamedTuple):
    """How scales are learnt. Defaults are the method without the accidents of its published code; `REFERENCE` has them.

    The stored scale is never projected: a clamp with a straight-through gradient stands wherever it is read.
    """

    rate: float = 1e-2  # AdamW's, of scales only
    significance: float = 100.0
    sparsity: float = 0.01
    low: float = 1e-4
    high: float = 1000.0
    gradient: str = "fresh"  # or `accumulate`: gradients of scales are never cleared within a local run
    forward: str = "clamped"  # or `raw`: the model sees the stored scale, which may be negative
    target: str = "clamped"  # or `raw`: so is what the generator learns from
    dtype: str = "float32"  # or `bfloat16`: of scales and their optimizer


REFERENCE = {"gradient": "accumulate", "forward": "raw", "target": "raw", "dtype": "bfloat16"}


def bayestune(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    mode: str = "value",
    personal_rate: float = 1.0,
    **scales,
) -> Algorithm:
    """BayesTune-LoRA of every client alone: it learns its scales, then starts the adapter again under the top ranks.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters.
      optimizer: of A and B.
      mode: `value` keeps the learnt scales, `one` puts 1 in their place.
      personal_rate: factor on the learning rate of A and B.
      scales: fields of `Scales`.
    """
    check_mode(mode)
    layout = ranks.layout(ranks.concrete(init_adapters))
    settings = make_scales(**scales)

    def train(base, adapters, batches, key):
        start = jnp.full((layout.sites, layout.rank), settings.low, jnp.dtype(settings.dtype))
        learn, tune = jax.random.split(key)
        learnt, _ = learn_scales(model, task, base, adapters, start, optimizer, batches, learn, layout, settings)
        scores = ranks.clamp(learnt.astype(jnp.float32), settings.low, settings.high)
        mask = ranks.top(scores, batches.constants.get("budget", layout.rank) * layout.sites)
        adapters = ranks.scaled(layout, adapters, mask * (scores if mode == "value" else 1.0))
        return lora.fine_tune(model, task, base, adapters, optimizer, batches, tune, rate=personal_rate)

    return lora.alone(init_adapters, train)


def learn_scales(
    model: Model,
    task: Task,
    base: PyTree,
    adapters: PyTree,
    scales: Array,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    key: Array,
    layout: ranks.Layout,
    settings: Scales,
    *,
    mask: Array | None = None,
    rate: Array | float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Trains A, B and the scales together on the batches of one client; A and B are thrown away.

    Args:
      adapters: what A and B start from, with B = 0.
      scales: [J, R] start of the scales, stored ones.
      mask: [J, R] of 0 and 1: ranks that take part; None is all.
      rate: factor on the learning rate of A and B.

    Returns:
      (stored scales [J, R], mean metrics over steps).
    """
    examples = jnp.maximum(batches.constants["examples"], 1.0)
    loss = local.objective(model, task, base)
    fixed = adapters_lib.fixed(adapters)
    start = {"adapters": adapters_lib.trained(adapters), "scales": scales}

    def objective(trained, batch, key):
        held = ranks.clamp(trained["scales"].astype(jnp.float32), settings.low, settings.high)
        # Masked after the clamp, or a rank that is left out would come back with the lowest scale.
        prior = held if mask is None else held * mask + 1e-9
        read = held if settings.forward == "clamped" else trained["scales"].astype(jnp.float32)
        own = trees.join(trained["adapters"], fixed)
        value, metrics = loss(ranks.scaled(layout, own, read if mask is None else read * mask), batch, key)
        significance = ranks.significance(ranks.magnitudes(layout, own), prior) / examples
        sparsity = ranks.sparsity(prior) / examples
        value = value + settings.significance * significance + settings.sparsity * sparsity
        return value, metrics | {"significance": significance, "sparsity": sparsity}

    both = joint(optimizer, settings, rate)
    trained, _, metrics = local.train(objective, both, start, both.init(start), batches, key)
    return trained["scales"], metrics


def make_scales(**settings) -> Scales:
    """`Scales`, checked; a name that is none of its fields is a TypeError."""
    unknown = next((name for name in settings if name not in Scales._fields), None)
    if unknown is not None:
        raise TypeError(f"bayestune() got an unexpected keyword argument '{unknown}'")
    scales = Scales(**settings)
    choices = {
        "gradient": ("fresh", "accumulate"),
        "forward": ("clamped", "raw"),
        "target": ("clamped", "raw"),
        "dtype": ("float32", "bfloat16"),
    }
    for name, known in choices.items():
        if getattr(scales, name) not in known:
            raise ValueError(f"algorithm.{name} is {getattr(scales, name)!r}, expected {' or '.join(known)}")
    if not scales.rate > 0:
        raise ValueError(f"algorithm.rate is {scales.rate}, expected more than 0")
    for name in ("significance", "sparsity"):
        if not getattr(scales, name) >= 0:
            raise ValueError(f"algorithm.{name} is {getattr(scales, name)}, expected 0 or more")
    if not 0 < scales.low < scales.high:
        raise ValueError(f"algorithm.low is {scales.low} and high {scales.high}, expected 0 < low < high")
    return scales


def check_mode(mode: str) -> None:
    if mode not in ("value", "one"):
        raise ValueError(f"algorithm.mode is {mode!r}, expected 'value' or 'one'")


def joint(optimizer: optax.GradientTransformation, settings: Scales, rate: Array | float):
    """One optimizer for A, B and scales: the configured one for the former, AdamW at its own rate for the latter."""
    scales = optax.adam(settings.rate)
    if settings.gradient == "accumulate":
        scales = optax.chain(optax.trace(1.0), scales)
    adapters = optax.chain(optimizer, optax.scale(rate))
    return optax.partition({"adapters": adapters, "scales": scales}, {"adapters": "adapters", "scales": "scales"})

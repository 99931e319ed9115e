"""FedAvg as its paper writes it: one client after the other, ragged batches, numpy, no vmap, no scan, no padding."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft.types import Batches, Model, PyTree, Task


def examples_of(batches: Batches, slot: int) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The steps of one client as (inputs [n, T], labels [n]), without padding and without empty steps."""
    steps = []
    for step, weights in enumerate(batches.weights[slot]):
        real = np.flatnonzero(weights)
        if len(real):
            inputs = {name: value[slot, step, real] for name, value in batches.inputs.items()}
            steps.append((inputs, batches.labels[slot, step, real]))
    return steps


def make_gradient(model: Model, task: Task):
    """(base, adapters, inputs, labels) -> (mean loss, gradient); the scale of a LoRA is no parameter and has none."""

    def loss(adapters, base, inputs, labels):
        return jnp.mean(task.loss(model.apply(base, adapters, inputs), labels))

    value_and_gradient = jax.jit(jax.value_and_grad(loss))

    def gradient(base, adapters, inputs, labels):
        value, slope = value_and_gradient(adapters, base, inputs, labels)
        return float(value), _numpy(slope)

    return gradient


def train(gradient, base: PyTree, adapters: PyTree, steps: list, rate: float) -> tuple[PyTree, float]:
    """SGD over the steps of one client: (adapters, mean loss of the steps)."""
    losses = []
    for inputs, labels in steps:
        loss, slope = gradient(base, adapters, inputs, labels)
        losses.append(loss)
        adapters = _by_name(lambda name, x, g: x if name == "scale" else x - rate * g, adapters, slope)
    return adapters, float(np.mean(losses))


def fedavg_round(
    gradient, base: PyTree, adapters: PyTree, clients: list[list], examples: list[float], rate: float
) -> tuple[PyTree, list[float]]:
    """One round: every client trains from the server's adapters, the server averages by examples."""
    trained, losses = [], []
    for steps in clients:
        own, loss = train(gradient, base, adapters, steps, rate)
        trained.append(own)
        losses.append(loss)
    shares = np.asarray(examples) / np.sum(examples)
    mean = jax.tree.map(lambda *leaves: sum(p * leaf for p, leaf in zip(shares, leaves, strict=True)), *trained)
    return mean, losses


def _numpy(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _by_name(function, *trees):
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path[-1].name, *leaves), *trees)

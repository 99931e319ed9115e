"""AdaLoRA without a federation: every client prunes its own ranks while it fine-tunes.

Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512. An update is
P diag(E) Q, a pruned singular value decomposition whose orthogonality is only asked for by a penalty. After each step
the triplets (column of P, entry of E, row of Q) are scored by smoothed sensitivity |w dL/dw| times its uncertainty, and
the entries of E outside of the b(t) best of all sites are set to zero; gradients may bring them back until b(t) has
fallen from the initial to the target budget. The rule is that of peft's RankAllocator, with two departures: importance
reads the gradient before the optimizer clips it, and a client of so few steps that peft never reaches its last
allocation has it in its last step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import local, ranks, trees
from fedjax_peft.algorithms import lora
from fedjax_peft.types import Algorithm, Array, Model, PyTree, Task


class Importance(NamedTuple):
    """Two moving averages for every trained number, in the tree of what is trained."""

    sensitivity: PyTree  # of |w dL/dw|
    uncertainty: PyTree  # of its deviation from its average


class State(NamedTuple):
    """What one step hands to the next."""

    trained: PyTree  # `adapters`: Q in a, P in b, heads; `values`: E [J, R]
    optimizer: PyTree
    importance: Importance
    mask: Array  # [J, R] of the last allocation
    step: Array  # scalar int32, steps with examples so far


class Plan(NamedTuple):
    """When and how much a client prunes; int32 scalars, which may be traced."""

    first: Array  # triplets of all sites before the first allocation
    target: Array  # after the last one
    begin: Array  # first step after which ranks are pruned, less 1
    end: Array  # total - final: importance is frozen from this step on
    last: Array  # step of the last allocation


def adalora(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    initial: float = 1.5,
    warmup: float = 0.1,
    final: float = 0.3,
    beta1: float = 0.85,
    beta2: float = 0.85,
    penalty: float = 0.1,
    scale: str = "fixed",
    personal_rate: float = 1.0,
) -> Algorithm:
    """AdaLoRA. Without a budget among the constants of a client it starts with R ranks a site and prunes none.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters, whose sites, largest rank R, scale and head count; A and B are drawn anew.
      optimizer: of P, E, Q and the head; published experiments give it ten times LoRA's learning rate.
      initial: ranks a site to start with, over the budget, rounded down; R where R is less than that.
      warmup, final: shares of the client's steps before the first allocation and after the last one.
      beta1, beta2: decay of the averages of sensitivity and of uncertainty.
      penalty: factor of the mean of |P'P - I| and |QQ' - I| (Frobenius) over all matrices. A peft model whose config
        names no task type does without, whatever its config says; that is 0 here.
      scale: `fixed` is alpha / R, as of the LoRA that this is compared with; `published` is 8 / initial ranks.
      personal_rate: factor on the learning rate.
    """
    _check(initial, warmup, final, penalty, scale, beta1=beta1, beta2=beta2)
    start = ranks.concrete(init_adapters)
    layout = ranks.layout(start)
    shape, own = (layout.sites, layout.rank), np.asarray(ranks.table(layout, start))

    def init(key):
        drawn, factors = jax.random.split(key)
        return normal_factors(factors, init_adapters(drawn))

    def train(base, adapters, batches, key):
        budget = jnp.asarray(batches.constants.get("budget", layout.rank), jnp.int32)
        first = jnp.minimum(jnp.floor(initial * budget).astype(jnp.int32), layout.rank)
        active = ranks.first(shape, first)
        factor = active if scale == "fixed" else active * 8.0 / jnp.maximum(first, 1) / own
        plan = make_plan(batches.weights, first * layout.sites, budget * layout.sites, warmup, final)
        fixed = adapters_lib.fixed(adapters)
        loss = local.objective(model, task, base)

        def assembled(trained):
            return ranks.scaled(layout, trees.join(trained["adapters"], fixed), trained["values"] * factor)

        def objective(trained, batch, key):
            value, metrics = loss(assembled(trained), batch, key)
            distance = orthogonality(layout, trained["adapters"], active)
            return value + penalty * distance, metrics | {"orthogonality": distance}

        def step(state, batch, key):
            (_, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.trained, batch, key)
            updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, trees.scale(updates, personal_rate))
            # peft allocates after the optimizer's step, so weights are the new ones and gradients the old ones.
            seen = smoothed(state.importance, trained, gradients, beta1, beta2)
            importance = trees.where(state.step < plan.end, seen, state.importance)
            scores = jnp.where(active > 0, triplets(layout, importance), -1.0)
            prunes = ((state.step > plan.begin) & (state.step < plan.last)) | (state.step == plan.last)
            mask = jnp.where(prunes, ranks.top(scores, remaining(plan, state.step)), state.mask)
            trained = trained | {"values": jnp.where(mask > 0, trained["values"], 0.0)}
            return State(trained, moments, importance, mask, state.step + 1), metrics

        trained = {
            "adapters": adapters_lib.trained(adapters),
            "values": jnp.zeros(shape, jnp.float32),
        }
        nothing = Importance(trees.zeros_like(trained), trees.zeros_like(trained))
        state = State(trained, optimizer.init(trained), nothing, active, jnp.int32(0))
        state, metrics = local.scan(step, state, batches, key)
        return assembled(state.trained), metrics

    return lora.alone(init, train)


def normal_factors(key: Array, adapters: PyTree, deviation: float = 0.02) -> PyTree:
    """The adapters with A and B of every LoRA drawn from N(0, deviation^2); layers without a scale stay empty."""
    flat = adapters_lib.nodes(adapters)
    loras = sorted(path for path, node in flat.items() if isinstance(node, adapters_lib.LoRA))
    for index, path in enumerate(loras):
        node = flat[path]
        down, up = jax.random.split(jax.random.fold_in(key, index))
        used = (node.scale != 0).astype(jnp.float32)
        flat[path] = node.replace(
            a=deviation * jax.random.normal(down, node.a.shape, jnp.float32) * used[..., None, :],
            b=deviation * jax.random.normal(up, node.b.shape, jnp.float32) * used[..., None],
        )
    return adapters_lib.nest(flat)


def make_plan(weights: Array, first: Array, target: Array, warmup: float, final: float) -> Plan:
    """The plan of a client whose batches have these weights `[S, B]`; steps without examples do not count."""
    total = jnp.sum(jnp.any(weights > 0, axis=-1), dtype=jnp.int32)
    # Tables, because a product in float32 may fall on the other side of a whole number.
    begin, closing = (_share(part, weights.shape[0])[total] for part in (warmup, final))
    return Plan(first, target, begin, total - closing, total - jnp.maximum(closing, 1))


def remaining(plan: Plan, step: Array) -> Array:
    """b(t): triplets of all sites that an allocation after this step keeps, from `first` down to `target`."""
    spare, left, span = plan.first - plan.target, plan.end - step, plan.end - plan.begin
    span = jnp.maximum(span, 1)
    whole = jnp.floor(spare * (left / span).astype(jnp.float32) ** 3).astype(jnp.int32)
    # The remainder says where float32 was one off; products may wrap, their difference is small.
    rest = spare * left**3 - whole * span**3
    whole = whole + (rest >= span**3) - (rest < 0)
    return jnp.where(step >= plan.last, plan.target, plan.target + whole)


def smoothed(importance: Importance, weights: PyTree, gradients: PyTree, beta1: float, beta2: float) -> Importance:
    """Eqs. (9) and (10): one step of both averages, of the uncertainty about the new average of sensitivity."""
    sensitivity = jax.tree.map(lambda w, g: jnp.abs(w * g), weights, gradients)
    average = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, importance.sensitivity, sensitivity)
    deviation = jax.tree.map(lambda new, mean: jnp.abs(new - mean), sensitivity, average)
    uncertainty = jax.tree.map(lambda old, new: beta2 * old + (1 - beta2) * new, importance.uncertainty, deviation)
    return Importance(average, uncertainty)


def triplets(layout: ranks.Layout, importance: Importance) -> Array:
    """[J, R] score of each triplet: that of its entry of E, and the means over its column of P and its row of Q."""
    scores = jax.tree.map(jnp.multiply, *importance)
    nodes = adapters_lib.nodes(scores["adapters"])
    flat = {path: nodes[path].replace(scale=nodes[path].a.mean(-2) + nodes[path].b.mean(-1)) for path in layout.paths}
    return scores["values"] + ranks.table(layout, adapters_lib.nest(flat))


def orthogonality(layout: ranks.Layout, adapters: PyTree, active: Array) -> Array:
    """Mean over all P and Q of the Frobenius norm of P'P - I or QQ' - I; ranks beyond the initial ones do not count."""
    nodes = adapters_lib.nodes(adapters)
    identity = active[:, :, None] * jnp.eye(layout.rank, dtype=jnp.float32)[None]
    within = active[:, :, None] * active[:, None, :]

    def norms(grams):
        gram = jnp.concatenate([gram.reshape(-1, layout.rank, layout.rank) for gram in grams])[layout.order]
        square = jnp.sum(jnp.square(within * gram - identity), axis=(1, 2))
        # The root has no slope at zero.
        return jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)

    q = norms([jnp.einsum("...dr,...ds->...rs", nodes[path].a, nodes[path].a) for path in layout.paths])
    p = norms([jnp.einsum("...rf,...sf->...rs", nodes[path].b, nodes[path].b) for path in layout.paths])
    return jnp.mean(jnp.concatenate([q, p]))


def _share(part: float, steps: int) -> Array:
    """[steps + 1] int(part x total) for each total."""
    return jnp.asarray([int(part * total) for total in range(steps + 1)], jnp.int32)


def _check(initial, warmup, final, penalty, scale, **decays):
    if not initial >= 1:
        raise ValueError(f"algorithm.initial is {initial}, expected 1 or more times the budget")
    if not (warmup >= 0 and final >= 0 and warmup + final < 1):
        raise ValueError(
            f"algorithm.warmup is {warmup} and final {final}, expected shares that leave steps between them"
        )
    if not penalty >= 0:
        raise ValueError(f"algorithm.penalty is {penalty}, expected 0 or more")
    if scale not in ("fixed", "published"):
        raise ValueError(f"algorithm.scale is {scale!r}, expected 'fixed' or 'published'")
    for name, decay in decays.items():
        if not 0 < decay < 1:
            raise ValueError(f"algorithm.{name} is {decay}, expected a number between 0 and 1")

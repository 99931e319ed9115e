"""FedL2P for LoRA: a federation learns at which rate each client should fine-tune each tensor.

Lee et al., FedL2P: Federated Learning to Personalize, NeurIPS 2023, arXiv 2310.02420, in the form in which Lee et al.,
FedP2EFT, arXiv 2502.04387, have it as a baseline. The learning rate of tensor i, an A or a B of one site, is

    r_i = LRNet(x)_i s_i

for activation statistics x of the client's texts; only the network and the scalars s travel. A client improves both on
examples that it holds back. Its fine-tuning is not differentiated; its end theta is taken for a solution of

    r_i g_i(theta) = c_i   for all i,     g the gradient of the training loss, c constant,

that is, the longer its steps, the less slope they leave; a fixed diagonal preconditioner, such as AdamW's, cancels.
implicit.py differentiates that, by a Neumann series of K + 1 terms and rate a. Ours: scalars are held at zero or above,
and examples are held back by what they say.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import aggregate, implicit, local, ranks, taps, trees
from fedjax_peft.types import Algorithm, Array, Batches, Model, PyTree, Task

HIDDEN = 100
NETWORK = 2**31 - 1  # folded into the server's key; adapters draw with the numbers of their sites


@struct.dataclass
class LRNet:
    """Linear, ReLU, linear, ReLU, linear, clamp: [I] -> [2 J]."""

    w1: Array  # [I, 100]
    b1: Array  # [100]
    w2: Array  # [100, 100]
    b2: Array  # [100]
    w3: Array  # [100, 2 J]
    b3: Array  # [2 J]


class Meta(NamedTuple):
    """What the federation learns. Also stands for its gradient and its update."""

    network: LRNet
    rates: Array  # [2 J] inner rates


@struct.dataclass
class Server:
    meta: Meta
    adapters: PyTree  # what every fine-tuning starts from


class AdamW(NamedTuple):
    """How a client fine-tunes; the rates are learnt."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # times the rate
    clip: float | None = 1.0  # global norm of the gradient
    bias_correction: str = "step"  # or `constant`: 1 - b in place of 1 - b^t, as in the published code
    first_microbatch: str = "keep"  # or `skip`: an epoch's first gradient waits for the second, as published


def fedl2p(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    budget: int | None = None,
    inner_rate: float = 1e-4,
    network_rate: float = 1e-4,
    rates_rate: float = 1e-6,
    meta_clip: float = 1.0,
    outer_steps: int = 3,
    neumann_terms: int = 3,
    neumann_rate: float = 0.1,
    validation: float = 0.2,
    test_fraction: float = 1.0,
    tap_dtype: str = "float32",
    tap_mask_padding: bool = True,
    weighting: str = "examples",
    personal_rate: float = 1.0,
    **inner,
) -> Algorithm:
    """FedL2P. The statistics x are `constants["taps"]` of a client's batches.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters of the largest rank R.
      optimizer: not read: a client's AdamW takes its rates from the network.
      budget: ranks a site to learn at, the first ones; None is R. Clients personalize at their own if they have one.
      inner_rate: start of the scalars, and the rate of what is no LoRA.
      network_rate, rates_rate: of the Adams of network and scalars, which start afresh each round.
      meta_clip: largest global norm of a hypergradient.
      outer_steps: hypergradient steps of a round, each after a fine-tuning of its own.
      neumann_terms, neumann_rate: K and a of the series.
      validation: share of a client's examples to hold back in rounds.
      test_fraction: share of its examples that a client personalizes on; 0.8 in the published code.
      tap_dtype, tap_mask_padding: of the statistics, as in fedp2eft.
      weighting: of the mean of updates, `examples` or `uniform`.
      personal_rate: factor on all rates in personalization.
      inner: fields of `AdamW`.
    """
    del optimizer
    settings = make_adamw(**inner)
    aggregate.check_weighting(weighting)
    _check(validation, test_fraction, outer_steps, neumann_terms)
    _check_rates({"network_rate": network_rate, "rates_rate": rates_rate}, zero=True)
    _check_rates({"inner_rate": inner_rate, "meta_clip": meta_clip, "neumann_rate": neumann_rate}, zero=False)
    layout = ranks.layout(ranks.concrete(init_adapters))
    ranks.check_budgets(() if budget is None else (budget,), layout.rank)
    shape = (layout.sites, layout.rank)
    inputs = taps.size(model)

    def init(key):
        rates = jnp.full(2 * layout.sites, inner_rate, jnp.float32)
        meta = Meta(make_network(jax.random.fold_in(key, NETWORK), inputs, 2 * layout.sites), rates)
        return Server(meta, init_adapters(key))

    def init_client(server, client_id, key):
        return ()

    def masked(adapters, own):
        return ranks.scaled(layout, adapters, ranks.first(shape, own))

    def generated(meta, x, adapters):
        return per_tensor(layout, adapters, generate(meta, x), inner_rate)

    def wait(batches, whole):
        return waiting(batches, whole) if settings.first_microbatch == "skip" else None

    def client_update(base, server, client, batches, key):
        x = batches.constants["taps"]
        adapters = masked(server.adapters, layout.rank if budget is None else budget)
        train, held = split(batches, 1 - validation)
        objective, start = _objective(model, task, base, adapters)
        clipping, adam = optax.clip_by_global_norm(meta_clip), optax.scale_by_adam()

        def step(carry, index):
            meta, moments = carry
            rates = generated(meta, x, adapters)
            own = jax.random.fold_in(key, index)
            end, metrics = adapt(objective, start, rates, settings, train, own, wait(train, batches))
            value, p, slope = implicit.solve(objective, end, train, held, neumann_terms, neumann_rate)
            gradient = implicit.hypergradient(lambda meta: generated(meta, x, adapters), meta, p, slope)
            updates, moments = adam.update(clipping.update(gradient, ())[0], moments)
            updates = Meta(trees.scale(updates.network, -network_rate), updates.rates * -rates_rate)
            said = metrics | {"validation_loss": value, "mean_rate": jnp.mean(generate(meta, x))}
            meta = optax.apply_updates(meta, updates)
            # Below zero a client would climb.
            return (meta._replace(rates=jnp.maximum(meta.rates, 0.0)), moments), said

        start_moments = adam.init(server.meta)
        (meta, _), metrics = jax.lax.scan(step, (server.meta, start_moments), jnp.arange(outer_steps))
        # Those of the first step are of the network as it was received.
        return client, trees.subtract(meta, server.meta), jax.tree.map(lambda values: values[0], metrics)

    def fold(uploads, cohort):
        return aggregate.weighted_sum(uploads, cohort, weighting)

    def server_update(server, sums):
        return server.replace(meta=trees.add(server.meta, aggregate.mean(sums))), {}

    def personalize(base, server, client, batches, key):
        own = batches.constants.get("budget", layout.rank if budget is None else budget)
        adapters = masked(server.adapters, own)
        rates = trees.scale(generated(server.meta, batches.constants["taps"], adapters), personal_rate)
        objective, start = _objective(model, task, base, adapters)
        used = batches if test_fraction == 1 else split(batches, test_fraction)[0]
        end, _ = adapt(objective, start, rates, settings, used, key, wait(used, batches))
        return trees.join(end, adapters_lib.fixed(adapters))

    def observe(base, inputs, weights, constants):
        return taps.moments(model, base, inputs, weights, mask_padding=tap_mask_padding)

    def observed(parts, examples):
        return {"taps": taps.vector(parts, dtype=tap_dtype)}

    def traffic(server):
        size = sum(leaf.size for leaf in jax.tree.leaves(server.meta))
        return size, size

    whole = init, init_client, client_update, fold, server_update, personalize, traffic
    return Algorithm(*whole, observe=observe, observed=observed, budgets=True)


def make_network(key: Array, inputs: int, outputs: int) -> LRNet:
    """Xavier-normal weights with gain 0.1 and biases 1, so that every client starts with factors near 1."""

    def linear(index, rows, columns):
        deviation = 0.1 * (2 / (rows + columns)) ** 0.5
        weights = jax.random.normal(jax.random.fold_in(key, index), (rows, columns), jnp.float32)
        return deviation * weights, jnp.ones(columns, jnp.float32)

    return LRNet(*linear(0, inputs, HIDDEN), *linear(1, HIDDEN, HIDDEN), *linear(2, HIDDEN, outputs))


def generate(meta: Meta, x: Array) -> Array:
    """[2 J] the rates for activation statistics x [I]: A and B of the first site, A and B of the second .."""
    network = meta.network
    # Accelerators would round float32 factors to fewer bits, in which steps of 1e-4 and what clients differ by vanish.
    with jax.default_matmul_precision("highest"):
        hidden = jax.nn.relu(x @ network.w1 + network.b1)
        hidden = jax.nn.relu(hidden @ network.w2 + network.b2)
        return ranks.clamp(hidden @ network.w3 + network.b3, 0.0, 1000.0) * meta.rates


def per_tensor(layout: ranks.Layout, adapters: PyTree, rates: Array, other: float) -> PyTree:
    """Rates [2 J] in the tree of what is trained, to be broadcast: [.., 1, 1] for an A or a B, `other` elsewhere."""
    flat = adapters_lib.nodes(adapters)
    ones = adapters_lib.nest({path: flat[path].replace(scale=jnp.ones_like(flat[path].scale)) for path in layout.paths})
    pairs = jnp.broadcast_to(rates.reshape(-1, 2, 1), (layout.sites, 2, layout.rank))
    down, up = (adapters_lib.nodes(ranks.scaled(layout, ones, pairs[:, side])) for side in (0, 1))
    for path, node in flat.items():
        flat[path] = jax.tree.map(lambda leaf: jnp.full((1,) * leaf.ndim, other, jnp.float32), node)
        if path in down:
            a, b = (side[path].scale[..., :1, None] for side in (down, up))
            flat[path] = node.replace(a=a, b=b, scale=None)
    return adapters_lib.nest(flat)


def split(batches: Batches, share: float) -> tuple[Batches, Batches]:
    """The batches with only a share of the client's examples, and with only the others.

    Examples are put in order by a number made of their tokens and the last ones are held back: an example has another
    place in each epoch and round, but must always be on the same side. At least one stays on the first.
    """
    weights = batches.weights
    if not weights.size:
        return batches, batches
    real = weights > 0
    tokens = jnp.where(batches.inputs["mask"], batches.inputs["tokens"] + 1, 0).astype(jnp.uint32)
    places = jnp.arange(tokens.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    numbers = _mixed(jnp.sum(_mixed(tokens + jnp.broadcast_to(places, tokens.shape)), -1))
    order = jnp.sort(jnp.where(real, numbers, jnp.uint32(0xFFFFFFFF)).reshape(-1))
    count = jnp.maximum(jnp.floor(share * jnp.sum(real)).astype(jnp.int32), 1)
    held = real & (numbers > order[count - 1])
    first, second = jnp.where(held, 0.0, weights), jnp.where(held, weights, 0.0)
    return local.reweighted(batches, first), local.reweighted(batches, second)


def adapt(
    objective: local.Loss, start: PyTree, rates: PyTree, settings: AdamW, batches: Batches, key: Array, waits=None
) -> tuple[PyTree, dict[str, Array]]:
    """AdamW whose step of each tensor is multiplied by its rate: (trained, mean metrics).

    `rates` broadcast to the leaves of `start`. `waits` [S] is `waiting`; None lets no step wait.
    """
    b1, b2, eps, decay, clip = settings[:5]
    clipping = optax.identity() if clip is None else optax.clip_by_global_norm(clip)

    def step(carry, batch, key):
        params, m, v, kept, taken, seen = carry
        (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params, batch, key)
        gradient = trees.add(gradient, kept)
        clipped, _ = clipping.update(gradient, ())
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, clipped)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, clipped)
        power = (taken + 1).astype(jnp.float32) if settings.bias_correction == "step" else 1.0
        first, second = 1 - b1**power, 1 - b2**power
        moved = jax.tree.map(
            lambda p, rate, m, v: p - rate * (m / first / (jnp.sqrt(v / second) + eps) + decay * p), params, rates, m, v
        )
        new = (moved, m, v, trees.zeros_like(kept), taken + 1, seen + 1)
        if waits is not None:
            new = trees.where(waits[seen], (*carry[:3], gradient, taken, seen + 1), new)
        return new, metrics

    zeros = trees.zeros_like(start)
    (trained, *_), metrics = local.scan(step, (start, zeros, zeros, zeros, jnp.int32(0), jnp.int32(0)), batches, key)
    return trained, metrics


def waiting(batches: Batches, whole: Batches) -> Array:
    """[S] bool, whether the k-th step with examples is the first of an epoch; `whole`, unsplit, tells their number."""
    steps = batches.weights.shape[0]
    real = jnp.any(batches.weights > 0, axis=-1)
    passes = jnp.sum(whole.weights > 0) / jnp.maximum(whole.constants["examples"], 1.0)
    length = jnp.maximum(steps // jnp.maximum(jnp.round(passes).astype(jnp.int32), 1), 1)
    index = jnp.arange(steps)
    epoch = index // length
    before = (index[:, None] > index[None]) & (epoch[:, None] == epoch[None]) & real[None]
    place = jnp.where(real, jnp.cumsum(real) - 1, steps)
    return jnp.zeros(steps, bool).at[place].set(~jnp.any(before, axis=1), mode="drop")


def make_adamw(**settings) -> AdamW:
    """`AdamW`, checked; a name that is none of its fields is a TypeError."""
    unknown = next((name for name in settings if name not in AdamW._fields), None)
    if unknown is not None:
        raise TypeError(f"fedl2p() got an unexpected keyword argument '{unknown}'")
    adamw = AdamW(**settings)
    for name, known in {"bias_correction": ("step", "constant"), "first_microbatch": ("keep", "skip")}.items():
        if getattr(adamw, name) not in known:
            raise ValueError(f"algorithm.{name} is {getattr(adamw, name)!r}, expected {known[0]!r} or {known[1]!r}")
    return adamw


def _objective(model: Model, task: Task, base: PyTree, adapters: PyTree) -> tuple[local.Loss, PyTree]:
    """The loss as a function of all leaves but the scales, and those leaves."""
    loss = local.objective(model, task, base)
    fixed = adapters_lib.fixed(adapters)
    start = adapters_lib.trained(adapters)
    return lambda trained, batch, key: loss(trees.join(trained, fixed), batch, key), start


def _mixed(numbers: Array) -> Array:
    """A bijection of uint32 that leaves no pattern."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = (numbers ^ (numbers >> shift)) * jnp.uint32(factor)
    return numbers ^ (numbers >> 16)


def _check(validation, test_fraction, outer_steps, neumann_terms):
    if not 0 < validation < 1:
        raise ValueError(f"algorithm.validation is {validation}, expected a share between 0 and 1")
    if not 0 < test_fraction <= 1:
        raise ValueError(f"algorithm.test_fraction is {test_fraction}, expected a share above 0, at most 1")
    for name, count, least in (("outer_steps", outer_steps, 1), ("neumann_terms", neumann_terms, 0)):
        if count < least:
            raise ValueError(f"algorithm.{name} is {count}, expected {least} or more")


def _check_rates(rates, *, zero):
    for name, rate in rates.items():
        if not (rate > 0 or zero and rate == 0):
            raise ValueError(f"algorithm.{name} is {rate}, expected {'0 or more' if zero else 'more than 0'}")

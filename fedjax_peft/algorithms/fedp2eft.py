"""FedP2EFT: a federation learns to say which ranks of which sites a client should fine-tune, and at what scale.

Lee et al., FedP2EFT: Federated Learning to Personalize PEFT for Multilingual LLMs, AAAI 2026, arXiv 2502.04387.

A strategy is one positive scale for each rank of each site. The personalization-strategy generator (PSG), a small
network, makes it from the activation statistics x of the client's texts in the frozen base. Only the PSG travels:

    client   l = PSG(x); train A, B and l (bayestune.py); fit the PSG to the trained l; forget A and B; send the PSG
    server   mean of the PSGs, weighted by examples
    use      keep the r J largest of PSG(x), their values too, and fine-tune A and B from the start

Departures from the published code are switches: the defaults are the method without its accidents,
`profile="reference"` sets them all as published.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import aggregate, local, ranks, taps, trees
from fedjax_peft.algorithms import bayestune, lora
from fedjax_peft.types import Algorithm, Array, Model, PyTree, Task

PROFILES = {
    "default": {},
    "reference": bayestune.REFERENCE | {"tap_dtype": "bfloat16", "tap_mask_padding": False, "tap_standardize": "none"},
}

# Folded into keys, the server's and a client's; larger than any number of a site or of a step, which have theirs.
PSG_START, BUDGET = 2**31 - 2, 2**31 - 1


@struct.dataclass
class PSG:
    """Linear, PReLU with one slope, linear, clamp: [I] -> [J, R]. Also stands for its gradient and its update."""

    w1: Array  # [I, H]
    b1: Array  # [H]
    slope: Array  # []
    w2: Array  # [H, J R]
    b2: Array  # [J R]


class Statistics(NamedTuple):
    """Mean and spread of all x that were uploaded so far."""

    count: Array  # []
    mean: Array  # [I]
    m2: Array  # [I] sum of squared deviations


@struct.dataclass
class Server:
    psg: PSG
    adapters: PyTree  # A0 and B = 0: a scale belongs to a row of A0, so all clients and rounds share it
    statistics: Statistics | tuple[()]  # () where nobody keeps them
    round: Array  # scalar int32


class Upload(NamedTuple):
    psg: PSG  # update
    x: Array | tuple[()]  # [I] less the server's mean


class Sums(NamedTuple):
    """Additive over clients."""

    psg: aggregate.WeightedSum
    count: Array  # []
    x: Array | tuple[()]  # [I]
    square: Array | tuple[()]  # [I]


def fedp2eft(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    profile: str = "default",
    psg_rate: float = 1e-4,
    psg_steps: int = 10,
    psg_width: int = 2,
    mode: str = "value",
    choice: str = "generated",
    features: str = "own",
    tap_dtype: str | None = None,
    tap_mask_padding: bool | None = None,
    tap_standardize: str | None = None,
    include_quantity: bool = False,
    sample_budget: bool = False,
    sample_budget_after: int = 20,
    train_scales_at_eval: bool = False,
    weighting: str = "examples",
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
    **scales,
) -> Algorithm:
    """FedP2EFT. Budgets come as `constants["budget"]` of the batches that a client personalizes on.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters of the largest rank R.
      optimizer: of A and B.
      profile: `default` or `reference`; any switch below may be set beside it.
      psg_rate, psg_steps: of the Adam that fits the PSG to a client's scales, afresh each round.
      psg_width: hidden units over inputs.
      mode: `value` personalizes with the generated scales, `one` with 1 in their place.
      choice: which ranks a budget keeps. `generated`: the largest scales. Controls: `random` and `uniform` put the same
        values at random ranks or at the first of every site; `width` takes the sites with most outputs first.
      features: what the PSG reads: the client's `own` statistics or, as a control, a `constant`.
      tap_dtype: `float32` or `bfloat16`, in which statistics of batches are merged.
      tap_mask_padding: leave padding tokens out of the statistics.
      tap_standardize: `running` gives the PSG standardized statistics, by the mean and deviation of all that clients
        uploaded so far; `none` gives them raw.
      include_quantity: the logarithm of the number of examples is one more statistic.
      sample_budget, sample_budget_after: draw a budget R, R/2 .. 1 for each client in training, after so many rounds.
      train_scales_at_eval: go on training the kept scales in personalization.
      weighting: of the mean of PSGs, `examples` or `uniform`.
      schedule: round -> factor on the learning rate of A and B in training; None is 1.
      personal_rate: factor on that learning rate in personalization.
      scales: fields of `bayestune.Scales`; `dtype` also holds for the PSG.
    """
    if profile not in PROFILES:
        raise ValueError(f"algorithm.profile is {profile!r}, expected {' or '.join(PROFILES)}")
    given = {"tap_dtype": tap_dtype, "tap_mask_padding": tap_mask_padding, "tap_standardize": tap_standardize}
    sound = {"tap_dtype": "float32", "tap_mask_padding": True, "tap_standardize": "running"}
    switches = sound | PROFILES[profile] | {name: value for name, value in given.items() if value is not None} | scales
    tap_dtype, tap_mask_padding, tap_standardize = (switches.pop(name) for name in sound)
    settings = bayestune.make_scales(**switches)
    bayestune.check_mode(mode)
    aggregate.check_weighting(weighting)
    _check(choice=choice, features=features, tap_standardize=tap_standardize, tap_dtype=tap_dtype)
    _check_numbers(psg_rate, psg_steps=psg_steps, psg_width=psg_width, sample_budget_after=sample_budget_after)
    if mode == "one" and train_scales_at_eval:
        raise ValueError("algorithm.mode is 'one', but algorithm.train_scales_at_eval trains the scales themselves")
    layout = ranks.layout(ranks.concrete(init_adapters))
    shape = (layout.sites, layout.rank)
    inputs = taps.size(model) + include_quantity
    running = tap_standardize == "running"
    dtype = jnp.dtype(settings.dtype)

    def init(key):
        psg = make_psg(jax.random.fold_in(key, PSG_START), inputs, psg_width * inputs, shape[0] * shape[1])
        nothing = Statistics(jnp.float32(0), jnp.zeros(inputs, jnp.float32), jnp.zeros(inputs, jnp.float32))
        # The key itself, as in the methods that this one is compared with: all start from the same A.
        return Server(psg, init_adapters(key), nothing if running else (), jnp.int32(0))

    def init_client(server, client_id, key):
        return ()

    def observe(base, inputs, weights, constants):
        return taps.moments(model, base, inputs, weights, mask_padding=tap_mask_padding)

    def observed(parts, examples):
        return {"taps": taps.vector(parts, dtype=tap_dtype, quantity=examples if include_quantity else None)}

    def read(server, batches):
        x = batches.constants["taps"]
        if features == "constant":
            return jnp.ones_like(x)
        return standardized(x, server.statistics) if running else x

    def client_update(base, server, client, batches, key):
        x = read(server, batches).astype(dtype)
        psg = jax.tree.map(lambda leaf: leaf.astype(dtype), server.psg)
        start = generate(psg, x, shape, settings)
        mask = sampled(start, server.round, jax.random.fold_in(key, BUDGET)) if sample_budget else None
        rate = 1.0 if schedule is None else schedule(server.round)
        learnt, metrics = bayestune.learn_scales(
            model, task, base, server.adapters, start, optimizer, batches, key, layout, settings, mask=mask, rate=rate
        )
        target = ranks.clamp(learnt, settings.low, settings.high) if settings.target == "clamped" else learnt
        target = jax.lax.stop_gradient(target)
        psg, before, after = regress(psg, x, target, settings, rate=psg_rate, steps=psg_steps, mask=mask)
        update = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old, psg, server.psg)
        metrics |= {"psg_error": before, "psg_error_after": after, "mean_scale": jnp.mean(target.astype(jnp.float32))}
        x = batches.constants["taps"] - server.statistics.mean if running else ()
        return client, Upload(update, x), metrics

    def sampled(scores, index, key):
        halvings = jnp.array([layout.rank >> power for power in range(layout.rank.bit_length())])
        budget = jnp.where(index < sample_budget_after, layout.rank, jax.random.choice(key, halvings))
        return ranks.top(scores, budget * layout.sites)

    def fold(uploads, cohort):
        here = cohort.reported.astype(jnp.float32)
        psg = aggregate.weighted_sum(uploads.psg, cohort, weighting)
        # As in the generator: what clients differ by is little beside what they share.
        with jax.default_matmul_precision("highest"):
            moments = (here @ uploads.x, here @ uploads.x**2) if running else ((), ())
        return Sums(psg, jnp.sum(here), *moments)

    def server_update(server, sums):
        psg = trees.add(server.psg, aggregate.mean(sums.psg))
        statistics = merged(server.statistics, sums) if running else ()
        return server.replace(psg=psg, statistics=statistics, round=server.round + 1), {}

    def personalize(base, server, client, batches, key):
        psg = jax.tree.map(lambda leaf: leaf.astype(dtype), server.psg)
        scores = generate(psg, read(server, batches).astype(dtype), shape, settings).astype(jnp.float32)
        count = batches.constants.get("budget", layout.rank) * layout.sites
        choose, tune = jax.random.split(key)
        kept = chosen(scores, count, choose)
        if train_scales_at_eval:
            both = bayestune.joint(optimizer, settings._replace(gradient="fresh"), personal_rate)
            return _with_scales(model, task, base, server.adapters, kept, both, batches, tune, layout, settings)
        adapters = ranks.scaled(layout, server.adapters, kept if mode == "value" else jnp.sign(kept))
        return lora.fine_tune(model, task, base, adapters, optimizer, batches, tune, rate=personal_rate)[0]

    def chosen(scores, count, key):
        """[J, R] the scales that are kept, 0 elsewhere."""
        if choice == "generated":
            return scores * ranks.top(scores, count)
        rivals = {
            "random": lambda: jax.random.uniform(key, shape),
            "uniform": lambda: jnp.broadcast_to(-jnp.arange(shape[1], dtype=jnp.float32), shape),
            "width": lambda: jnp.broadcast_to(jnp.asarray(layout.widths, jnp.float32)[:, None], shape),
        }
        # The k-th largest value goes to the k-th best rank of the rival, so that only the places differ.
        preferred, values = rivals[choice](), -jnp.sort(-scores.reshape(-1))
        order = jnp.argsort(-preferred.reshape(-1), stable=True)
        moved = jnp.zeros_like(values).at[order].set(values).reshape(shape)
        return moved * ranks.top(preferred, count)

    def traffic(server):
        size = sum(leaf.size for leaf in jax.tree.leaves(server.psg))
        return size + running * (2 * inputs + 1), size + running * inputs

    whole = init, init_client, client_update, fold, server_update, personalize, traffic
    return Algorithm(*whole, observe=observe, observed=observed, budgets=True)


def make_psg(key: Array, inputs: int, hidden: int, outputs: int) -> PSG:
    """Xavier-normal weights with gain 1e-6 and biases 1e-4, so that every client starts with scales of 1e-4."""
    first, second = jax.random.split(key)

    def xavier(key, rows, columns):
        return 1e-6 * (2 / (rows + columns)) ** 0.5 * jax.random.normal(key, (rows, columns), jnp.float32)

    return PSG(
        w1=xavier(first, inputs, hidden),
        b1=jnp.full(hidden, 1e-4, jnp.float32),
        slope=jnp.float32(0.25),
        w2=xavier(second, hidden, outputs),
        b2=jnp.full(outputs, 1e-4, jnp.float32),
    )


def generate(psg: PSG, x: Array, shape: tuple[int, int], settings: bayestune.Scales) -> Array:
    """Scales [J, R] for activation statistics x [I]."""
    # Accelerators would round float32 factors to fewer bits, in which steps of 1e-4 and what clients differ by vanish.
    with jax.default_matmul_precision("highest"):
        hidden = x @ psg.w1 + psg.b1
        hidden = jnp.where(hidden >= 0, hidden, psg.slope * hidden)
        return ranks.clamp((hidden @ psg.w2 + psg.b2).reshape(shape), settings.low, settings.high)


def regress(
    psg: PSG, x: Array, target: Array, settings: bayestune.Scales, *, rate: float, steps: int, mask: Array | None = None
) -> tuple[PSG, Array, Array]:
    """Fits the PSG of a client to its scales by steps of Adam on the summed distance.

    Args:
      x: [I] what it reads.
      target: [J, R] what it should say.
      mask: [J, R] of 0 and 1, what counts; None is all.

    Returns:
      (PSG, mean distance before, and after).
    """
    fit = optax.adam(rate)

    def error(psg):
        distance = jnp.abs(generate(psg, x, target.shape, settings) - target)
        return jnp.sum((distance if mask is None else distance * mask).astype(jnp.float32))

    def step(carry, _):
        psg, state = carry
        value, gradient = jax.value_and_grad(error)(psg)
        updates, state = fit.update(gradient, state, psg)
        return (optax.apply_updates(psg, updates), state), value

    (psg, _), errors = jax.lax.scan(step, (psg, fit.init(psg)), None, length=steps)
    return psg, errors[0] / target.size, error(psg) / target.size


def standardized(x: Array, statistics: Statistics) -> Array:
    """1 + x in deviations from its mean over earlier uploads; ones until two uploads tell of a spread.

    The one is what clients have in common. With deviations alone they pull the PSG in unrelated directions and its mean
    hardly moves; with raw statistics, which differ little between clients, it moves but does not tell them apart.
    """
    count, mean, m2 = statistics
    deviation = jnp.sqrt(m2 / jnp.maximum(count - 1, 1))
    return 1.0 + jnp.where(count > 1, (x - mean) / jnp.maximum(deviation, 1e-6 + 1e-5 * jnp.abs(mean)), 0.0)


def merged(statistics: Statistics, sums: Sums) -> Statistics:
    """The statistics with those of one more round, whose x are counted from the old mean."""
    count, mean, m2 = statistics
    total = jnp.maximum(count + sums.count, 1.0)
    shift = sums.x / jnp.maximum(sums.count, 1.0)
    # Squares of the first round are counted from 0, and float32 does not tell a smaller spread from none.
    spread = jnp.maximum(sums.square - sums.count * shift**2, sums.count * (1e-3 * shift) ** 2 * (count == 0))
    return Statistics(
        count + sums.count, mean + shift * sums.count / total, m2 + spread + shift**2 * count * sums.count / total
    )


def _with_scales(model, task, base, adapters, kept, both, batches, key, layout, settings):
    """Personalization that goes on training the kept scales, on the loss alone; `both` is a `bayestune.joint`."""
    mask = (kept > 0).astype(jnp.float32)
    loss = local.objective(model, task, base)
    fixed = adapters_lib.fixed(adapters)
    start = {"adapters": adapters_lib.trained(adapters), "scales": kept}

    def assembled(trained):
        scales = mask * ranks.clamp(trained["scales"], settings.low, settings.high)
        return ranks.scaled(layout, trees.join(trained["adapters"], fixed), scales)

    trained, _, _ = local.train(
        lambda trained, batch, key: loss(assembled(trained), batch, key), both, start, both.init(start), batches, key
    )
    return assembled(trained)


def _check(**switches):
    known = {
        "choice": ("generated", "random", "uniform", "width"),
        "features": ("own", "constant"),
        "tap_standardize": ("running", "none"),
        "tap_dtype": ("float32", "bfloat16"),
    }
    for name, value in switches.items():
        if value not in known[name]:
            raise ValueError(f"algorithm.{name} is {value!r}, expected one of {', '.join(known[name])}")


def _check_numbers(psg_rate, **counts):
    if not psg_rate > 0:
        raise ValueError(f"algorithm.psg_rate is {psg_rate}, expected more than 0")
    for name, count in counts.items():
        if count < (least := int(name != "sample_budget_after")):
            raise ValueError(f"algorithm.{name} is {count}, expected {least} or more")

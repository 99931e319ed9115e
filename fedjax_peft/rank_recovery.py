"""Do methods find the rank that each client's problem has? A synthetic study with known answers.

Two clients have linear maps of ranks r - r~ and r + r~ that share their leading directions, and examples of them
without noise; a method sees the examples and is judged by the rank of the map that each client ends with. After the
linear-regression example of Hao et al., PF2LoRA, arXiv 2503.03920, whose constants are not public.

The whole study of a method, rounds and seeds, is one compiled program around the round that every experiment uses.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from fedjax_peft import adapters, metrics, rounds, spectra, trees
from fedjax_peft.algorithms import fedavg, hetlora, perfedavg, pf2lora
from fedjax_peft.types import Algorithm, Array, Batches, Cohort, Model, PyTree, Task

WIDTH, EXAMPLES = 10, 100

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """One row of the study."""

    build: Callable[..., Algorithm]  # (model, task, init_adapters, optimizer) -> Algorithm
    rank: int  # of the adapters that are shared
    rate: float  # of the client's optimizer, SGD
    steps: int = 0  # of personalization, on all of a client's examples, before it is judged
    client_rank: int = 0  # r~, of a method whose clients keep `personal` adapters
    minibatches: int = 1  # that a local step asks for; each is all examples
    pooled: bool = False  # rounds of one step, whose mean is a step on all clients' examples together


class Curves(NamedTuple):
    """What is recorded of one method: `[G, K, ..]` for G seeds and K records."""

    rounds: np.ndarray  # [K]
    loss: np.ndarray  # [G, K, C]
    ranks: np.ndarray  # [G, K, C]
    singular: dict[str, np.ndarray]  # {common, personal, sum: [G, C, ..]} in the end


def methods(
    rank: int = 4,
    client_rank: int = 1,
    *,
    lr_common: float = 0.03,
    lr_personal: float = 0.3,
    lr_meta: float = 0.01,
    lr_inner: float = 0.1,
    interval: int = 10,
    gamma: float = 0.99,
    penalty: float = 1e-3,
) -> dict[str, Method]:
    """All rows of the study; arguments as in `study`.

    Those named `tuned` have one more round of local steps on their own examples in the end. HETLoRA starts with the
    ranks r - r~ and r + r~ (`spread`), or with one rank for both clients that is one too low for either, the first's or
    the second's; it prunes in the row that says so, and is judged with the server's adapters in the one `truncated`,
    with the clients' own in the others.
    """
    low, high = rank - client_rank, rank + client_rank

    def ours(hypergradient):
        build = functools.partial(
            pf2lora.pf2lora,
            client_rank=client_rank,
            client_rate=lr_personal,
            hypergradient=hypergradient,
            shared_batch=True,
        )
        return Method(build, rank, lr_common, client_rank=client_rank)

    def averaged(rank, steps=0):
        return Method(functools.partial(fedavg.fedit, weighting="uniform"), rank, lr_common, steps)

    def meta(order):
        build = functools.partial(perfedavg.perfedavg, inner_rate=lr_inner, order=order)
        return Method(build, rank, lr_meta, steps=1, minibatches=3)

    def pruning(ranks, prune=False, **settings):
        def first(client_id):
            return jnp.asarray(ranks, jnp.int32)[client_id]

        settings |= {"clients": first, "rank_min": 1, "gamma": gamma, "penalty": penalty, "prune": prune}
        return Method(functools.partial(hetlora.hetlora, norm_eps=1e-24, **settings), max(ranks), lr_common)

    return {
        "pf2lora": ours("so"),
        "pf2lora_fo": ours("fo"),
        "pf2lora_joint": ours("joint"),
        "centralized": averaged(rank)._replace(pooled=True),
        "homlora": averaged(rank),
        "homlora_wide": averaged(high),
        "homlora_tuned": averaged(rank, interval),
        "homlora_wide_tuned": averaged(high, interval),
        "perfedavg": meta("exact"),
        "perfedavg_fo": meta("fo"),
        "hetlora_pruning": pruning((low, high), prune=True),
        "hetlora_spread": pruning((low, high)),
        "hetlora_below": pruning((max(low - 1, 1),) * 2),
        "hetlora_low": pruning((low, low)),
        "hetlora_high": pruning((high, high)),
        "hetlora_truncated": pruning((high, high), evaluate_global=True),
    }


def study(
    workdir: epath.PathLike,
    *,
    rank: int = 4,
    client_rank: int = 1,
    lr_personal: float = 0.3,
    lr_common: float = 0.03,
    lr_meta: float = 0.01,
    lr_inner: float = 0.1,
    interval: int = 10,
    gamma: float = 0.99,
    penalty: float = 1e-3,
    steps: int = 6000,
    seeds: int = 10,
    rank_tolerance: float = 1e-2,
    records: int = 100,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the methods one after the other and leaves summary.json and curves.npz in the run directory.

    Args:
      rank, client_rank: r and r~; clients have the true ranks r - r~ and r + r~.
      lr_personal: alpha, step of SGD on personal adapters.
      lr_common: eta, step of SGD on common ones, and on those of HOMLoRA and HETLoRA.
      lr_meta, lr_inner: steps of SGD of Per-FedAvg, outside and inside of its objective; the second personalizes too.
      interval: local steps of a round.
      gamma, penalty: of HETLoRA.
      steps: local steps in all, a multiple of `interval`.
      seeds: problems, 0 to seeds - 1, side by side.
      rank_tolerance: singular values count that exceed it times the largest.
      records: points of each curve after its start, at most, as equally far apart as whole rounds can be.
      only: names of `methods`; by default all.

    Returns:
      The content of summary.json: `methods.NAME.{loss, ranks, true_ranks}`, each a list over seeds of a list over
      clients, at the end.

    Raises:
      ValueError: a number that does not fit, or an unknown method.
    """
    rates = {"lr_common": lr_common, "lr_personal": lr_personal, "lr_meta": lr_meta, "lr_inner": lr_inner}
    _check(rank, client_rank, interval, steps, {"seeds": seeds, "records": records}, rates, rank_tolerance)
    table = methods(rank, client_rank, **rates, interval=interval, gamma=gamma, penalty=penalty)
    unknown = [name for name in only if name not in table]
    if unknown:
        raise ValueError(f"only names {unknown[0]!r}, expected some of {', '.join(table)}")
    true_ranks = (rank - client_rank, rank + client_rank)
    summary: dict[str, Any] = {"study": "rank_recovery", "methods": {}}
    arrays: dict[str, np.ndarray] = {}
    for name in only or table:
        since = time.monotonic()
        local = 1 if table[name].pooled else interval
        settings = {"interval": local, "total": steps // local, "records": records, "tolerance": rank_tolerance}
        curves = play(table[name], range(seeds), true_ranks, **settings)
        summary["methods"][name] = {
            "loss": curves.loss[:, -1].tolist(),
            "ranks": curves.ranks[:, -1].tolist(),
            "true_ranks": [list(true_ranks)] * seeds,
        }
        own = {
            "rounds": curves.rounds * local / interval,
            "loss": curves.loss,
            "ranks": curves.ranks,
            **curves.singular,
        }
        arrays |= {f"{name}/{key}": value for key, value in own.items()}
        logger.info("%s: %.1f s", name, time.monotonic() - since)
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    with (epath.Path(workdir) / "curves.npz").open("wb") as file:
        np.savez(file, **arrays)
    metrics.write_json(epath.Path(workdir) / "summary.json", summary)
    return summary


def model() -> Model:
    """y = W x: one site, `linear`, whose frozen weight is 0."""

    def init(key):
        del key
        return {"linear": {"kernel": jnp.zeros((WIDTH, WIDTH))}}

    def apply(base, adapters, inputs, key=None):
        y = inputs["x"] @ base["linear"]["kernel"]
        delta = adapters.get("linear", {}).get("delta")
        return y if delta is None else y + delta(inputs["x"], key)

    def taps(base, adapters, inputs, key=None):
        return apply(base, adapters, inputs, key), {}

    return Model(init, apply, taps)


def squared_error() -> Task:
    """Half of the squared distance of outputs [B, F] and labels [B, F]."""

    def loss(outputs, labels):
        return 0.5 * jnp.sum(jnp.square(outputs - labels), -1)

    return Task(loss, lambda outputs, labels: {"loss": loss(outputs, labels)})


def problem(seed: int, true_ranks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Examples x and y `[C, N, WIDTH]` of clients whose maps have the leading directions of one orthogonal pair."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0] for _ in range(2))
    x = np.stack([rng.standard_normal((EXAMPLES, WIDTH)) for _ in true_ranks])
    maps = np.stack([u[:, :rank] @ v[:, :rank].T for rank in true_ranks])
    return x, np.einsum("cni,coi->cno", x, maps)


def draws(seed: int, rank: int, client_rank: int, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """A `[rank, WIDTH]` of the adapters that are shared and C `[C, client_rank, WIDTH]` of personal ones."""
    rng = np.random.default_rng(1000 + seed)
    a = rng.standard_normal((rank, WIDTH)) / WIDTH**0.5
    return a, rng.standard_normal((clients, client_rank, WIDTH)) / WIDTH**0.5


def lora(a: Array) -> PyTree:
    """The adapter W = B A of the one site with this A `[R, WIDTH]` and B = 0."""
    rank = len(a)
    return adapters.nest({("linear",): adapters.LoRA(a.T, jnp.zeros((rank, WIDTH), a.dtype), jnp.ones(rank, a.dtype))})


def play(
    method: Method,
    seeds: Sequence[int],
    true_ranks: Sequence[int],
    *,
    interval: int,
    total: int,
    records: int,
    tolerance: float,
) -> Curves:
    """Runs one method on all seeds at once.

    Args:
      seeds: G.
      true_ranks: C.
      interval: local steps of a round, each on all examples of a client.
      total: rounds.
      records: after the start, at most.
      tolerance: singular values count that exceed it times the largest.
    """
    task, network, mesh = squared_error(), model(), rounds.make_mesh(1, 1)
    base, clients = network.init(jax.random.key(0)), len(true_ranks)
    ids = jnp.arange(clients, dtype=jnp.int32)
    cohort = Cohort(ids, jnp.full(clients, float(EXAMPLES)), jnp.ones(clients, bool))
    recorded = np.rint(np.linspace(0, total, min(records, total) + 1)).astype(np.int32)

    def init_adapters(key, *, rank=method.rank, head="full"):
        del head  # there is none
        return lora(jax.random.normal(key, (rank, WIDTH)))

    drawn = method.build(network, task, init_adapters, optax.sgd(method.rate))

    def one_seed(seed, x, y, a, c):
        root, algorithm = jax.random.key(seed), _starting_at(drawn, a, c)
        step = rounds.make_round(algorithm, mesh, clients)
        personalize = rounds.make_personalize(algorithm, mesh, clients)
        train, support = _batches(x, y, interval, method.minibatches), _batches(x, y, method.steps)
        server = algorithm.init(jax.random.fold_in(root, rounds.SERVER))
        shapes = rounds.client_states(algorithm, server)
        states = jax.tree.map(lambda leaf: jnp.zeros((clients, *leaf.shape), leaf.dtype), shapes)

        def judge(server, states, fresh):
            tree = personalize(base, server, states, jnp.full(clients, fresh), support, ids, 0, root)
            outputs = jax.vmap(network.apply, (None, 0, 0))(base, tree, {"x": x})
            node = adapters.nodes(tree)["linear",]
            values = {name: spectra.singular_values(part) for name, part in spectra.levels(node, method.rank).items()}
            return jnp.mean(task.loss(outputs, y), -1), spectra.numerical_rank(values["sum"], tolerance), values

        def play_round(index, carry):
            server, states = carry
            server, states, _, _ = step(base, server, states, jnp.full(clients, index == 0), train, cohort, index, root)
            return server, states

        def record(carry, between):
            carry = jax.lax.fori_loop(*between, play_round, carry)
            return carry, judge(*carry, False)[:2]

        first = judge(server, states, True)[:2]
        carry, further = jax.lax.scan(record, (server, states), (recorded[:-1], recorded[1:]))
        losses, ranks = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, further)
        return losses, ranks, judge(*carry, False)[2]

    data = [problem(seed, true_ranks) + draws(seed, method.rank, method.client_rank, clients) for seed in seeds]
    arrays = (jnp.asarray(np.stack(arrays), jnp.zeros(0).dtype) for arrays in zip(*data, strict=True))
    curves = jax.device_get(jax.jit(jax.vmap(one_seed))(jnp.asarray(seeds, jnp.int32), *arrays))
    return Curves(recorded, *curves)


def _starting_at(method: Algorithm, a: Array, c: Array) -> Algorithm:
    """The method, but with A `[R, WIDTH]` on the server and C `[C, r~, WIDTH]` at clients that have personal adapters.

    Every method starts from the same draws, and from those that published trajectories of this problem have.
    """

    def init(key):
        def given(path, leaf):
            return a.T if trees.path_name(path[-1:]) == "a" and leaf.shape == a.T.shape else leaf

        return jax.tree_util.tree_map_with_path(given, method.init(key))

    def init_client(server, client_id, key):
        client = method.init_client(server, client_id, key)
        return client.replace(personal=lora(c[client_id])) if c.shape[1] else client

    return method._replace(init=init, init_client=init_client)


def _batches(x: Array, y: Array, steps: int, copies: int = 1) -> Batches:
    """All examples of each client in each of `steps` steps: `[C, S, copies N, WIDTH]`, copies side by side."""

    def repeat(leaf):
        leaf = jnp.repeat(leaf, copies, axis=1)
        return jnp.broadcast_to(leaf[:, None], (len(leaf), steps, *leaf.shape[1:]))

    weights = jnp.ones((len(x), steps, copies * x.shape[1]))
    return Batches({"x": repeat(x)}, repeat(y), weights, jnp.zeros((len(x), steps), jnp.int32))


def _check(rank, client_rank, interval, steps, counts, rates, tolerance) -> None:
    if not 1 <= client_rank < rank:
        raise ValueError(f"client_rank is {client_rank}, expected 1 to rank - 1, which is {rank - 1}")
    if rank + client_rank > WIDTH:
        raise ValueError(f"rank + client_rank is {rank + client_rank}, expected at most {WIDTH}, the problem's width")
    if interval < 1 or steps < interval or steps % interval:
        raise ValueError(f"steps is {steps}, expected a positive multiple of interval, which is {interval}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, expected 1 or more")
    for name, rate in rates.items():
        if not rate > 0:
            raise ValueError(f"{name} is {rate}, expected more than 0")
    if not 0 < tolerance < 1:
        raise ValueError(f"rank_tolerance is {tolerance}, expected between 0 and 1")

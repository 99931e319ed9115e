"""The rounds of a run, one after the other: sample, train, record, evaluate, checkpoint, and go on after a kill."""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from fedjax_peft import (
    checkpoint,
    chunking,
    console,
    evaluate,
    metrics,
    population,
    processes,
    records,
    rounds,
    segments,
)
from fedjax_peft.types import Algorithm, Array, Batches, Cohort, Model, PyTree, Task

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """What is trained, where."""

    mesh: Mesh
    algorithm: Algorithm
    model: Model
    task: Task
    base: PyTree  # on the mesh
    strategy: "Strategy | None" = None  # recorded of what clients personalize; None records nothing
    answers: Callable[..., Iterable] = lambda *_: ()  # `evaluate.make_answers`, if texts are judged


class Strategy(NamedTuple):
    """What strategies.parquet says of each client and point, a row a site."""

    sites: tuple[str, ...]  # [J]
    describe: Callable[[PyTree], dict[str, Array]]  # adapters of one client -> {column: [J] or [J, ..]}
    averaged: tuple[str, ...] = ()  # columns whose mean over sites stands in clients.parquet as well


class Point(NamedTuple):
    """One way of personalizing that clients are evaluated with after the last round."""

    algorithm: Algorithm
    support: Callable[[np.ndarray], Batches]  # ids -> batches to personalize on
    trained: bool = True  # whether it reads the run's server and clients; otherwise fresh ones of its own


class Clients(NamedTuple):
    """Who takes part, and with which data. All functions are pure; ids are padded with N."""

    names: tuple[str, ...]  # [N]
    groups: tuple[str, ...]  # [N] language or task
    examples: np.ndarray  # [N] training examples
    majority: np.ndarray  # [N] accuracy of each client's most frequent training label
    pools: dict[str, np.ndarray]  # ids of the clients of each pool; rounds sample from `seen`
    sample: Callable[[int], np.ndarray]  # round -> ids of the cohort
    dropped: Callable[[int, np.ndarray], np.ndarray]  # (round, ids) -> [C] bool
    training: Callable[[int, np.ndarray], Batches]  # (round, ids) -> batches
    nothing: Callable[[np.ndarray], Batches]  # ids -> batches of no steps
    tests: Callable[[np.ndarray], Iterable[Any]]  # ids -> packs of test batches
    tokens: Callable[[Batches, int], tuple[int, int]]  # (batches, chunk) -> (tokens of examples, tokens computed)


class Interrupted(Exception):
    """The process was asked to stop; everything is checkpointed."""


class _Inputs(NamedTuple):
    """What a round begins with, made before it while the device is busy."""

    ids: np.ndarray  # [C], padded with N
    data: Batches  # on the mesh, like the cohort
    cohort: Cohort
    tokens: tuple[int, int]  # of this process's own slots
    states: PyTree  # of the clients among ids that this process owns, from before the round that was under way


def run(
    problem: Problem,
    clients: Clients,
    points: Mapping[str, Point],
    workdir: epath.PathLike,
    *,
    seed: int,
    total: int,
    chunk: int | None,
    evaluate_every: int | None,
    evaluate_end: bool = True,
    checkpoint_every: int,
    keep_checkpoints: int,
    population_folder: str | None = None,
    begin: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Runs the rounds that a run directory still lacks.

    Args:
      points: how clients are evaluated in the end, by name; those that a killed run has finished are not done again.
      seed: of everything random that happens on the device.
      total: rounds of the whole run.
      chunk: clients that a device works on at once; None measures a few and takes the fastest.
      evaluate_every, checkpoint_every: rounds between two of them; the last round has both. None evaluates only the
        points.
      evaluate_end: whether the last round is evaluated too, beside its points.
      keep_checkpoints: how many of the newest checkpoints stay.
      population_folder: of a local disk, where the states of clients lie while the run goes on; None is in memory.
      begin: told of each stage as it begins, see `processes.watchdog`.

    Returns:
      The content of summary.json.

    Raises:
      ValueError: all clients of a round came to numbers that are not finite.
      Interrupted: after SIGTERM or SIGINT.
    """
    workdir = epath.Path(workdir)
    mesh, algorithm, base = problem.mesh, problem.algorithm, problem.base
    root = jax.random.key(seed)
    begin("the checkpoint to go on from")
    server, people = _begin(algorithm, mesh, root, len(clients.names), population_folder)
    traffic = tuple(4 * parameters for parameters in algorithm.traffic(server))
    checkpoints = checkpoint.manager(workdir, keep_checkpoints)
    start, server = _restore(checkpoints, workdir, server, people)
    if start == total and (done := processes.gather(metrics.read_json(workdir / "summary.json"))[0]) is not None:
        return done
    metrics.rewind(workdir / "rounds.jsonl", start)
    begin("the choice of a chunk")
    chunk = chunk or _fastest_chunk(problem, clients, workdir, server, people, root)
    step = rounds.make_round(algorithm, mesh, chunk)
    judge, now = _make_judge(problem, clients, chunk, workdir, root), {"global": Point(algorithm, clients.nothing)}
    slots = rounds.slots_for(len(clients.sample(0)), mesh, chunk)

    pending, finished, asked = None, time.monotonic(), False
    with (
        processes.stop_signals() as stop,
        console.progress(total, start) as show,
        concurrent.futures.ThreadPoolExecutor(1, "prefetch") as aside,
    ):

        def record(pending):
            # One round late, so that the device is never idle while the host writes.
            nonlocal finished, asked
            if pending is not None:
                line = records.line(pending, clients, finished)
                finished = time.monotonic()
                metrics.append_line(workdir / "rounds.jsonl", line)
                show(line)
                asked |= bool(np.asarray(pending.told)[:, 2].any())

        def prepare(index):
            return _prepare(clients, people, mesh, index, slots, chunk)

        ahead, before = aside.submit(prepare, start) if start < total else None, np.zeros(0, np.int32)
        for index in range(start, total):
            if evaluate_every and index % evaluate_every == 0 and (index == 0 or algorithm.shared):
                record(pending)
                pending = None
                begin(f"the evaluation before round {index}")
                judge(server, people, index, now)
                finished = time.monotonic()
            begin(f"round {index}")
            inputs = ahead.result()
            arguments = _arguments(inputs, people, mesh, before)
            server, states, cohort, outcome = step(base, server, *arguments, index, root)
            told = processes.tell(np.array([*inputs.tokens, bool(stop)]))
            ahead = aside.submit(prepare, index + 1) if index + 1 < total else None
            if algorithm.host_step is not None:
                server = rounds.replicate(algorithm.host_step(server), mesh)
            record(pending)
            pending = records.Pending(index, traffic, cohort, outcome, told)
            before = inputs.ids
            if jax.tree.leaves(states):
                own = jax.device_get(rounds.local(states, mesh))
                population.scatter(people, inputs.ids, own, np.asarray(cohort.reported))
            # Of several processes one alone may have been asked, which the others learn with its round.
            asked |= jax.process_count() == 1 and bool(stop)
            if (index + 1) % checkpoint_every == 0 or index + 1 == total or asked:
                record(pending)
                pending = None
                begin(f"the checkpoint after round {index}")
                save(checkpoints, workdir, index + 1, server, people)
                finished = time.monotonic()
            if asked and index + 1 < total:
                said = f"stopped by {processes.named(stop)} after round {index + 1} of {total}"
                raise Interrupted(f"{said}; the same command goes on from here")

        rows = metrics.read_rows(workdir / "clients.parquet") if processes.first() else []
        done = processes.gather({row["point"] for row in rows if row["round"] == total})[0]
        # A method that trains no model of its own has nothing to show beside the base of round 0 and its points.
        shows = evaluate_every and evaluate_end and (algorithm.shared or total == 0)
        ends = (now if shows else {}) | dict(points)
        for name, point in ends.items():
            begin(f"the evaluation of {name}")
            if name not in done:
                judge(server, people, total, {name: point})
            if any(processes.gather(bool(stop))):
                said = processes.named(stop)
                raise Interrupted(f"stopped by {said} after the evaluation of {name}; the same command goes on")
    begin("the summary")
    summary = None
    if processes.first():
        tables = [metrics.read_rows(workdir / f"{table}.parquet") for table in ("clients", "pooled")]
        summary = records.summary(*tables, list(ends))
        metrics.write_json(workdir / "summary.json", summary)
    return processes.gather(summary)[0]


def final(
    algorithm: Algorithm, mesh: Mesh, clients: int, workdir: epath.PathLike
) -> tuple[PyTree, population.Population]:
    """(server, population) that the finished run of a directory ended with.

    Raises:
      ValueError: the directory holds no checkpoint that can be read.
    """
    server, people = _begin(algorithm, mesh, jax.random.key(0), clients)
    workdir = epath.Path(workdir)
    at, server = _restore(checkpoint.manager(workdir, 1), workdir, server, people)
    if not at:
        raise ValueError(f"{workdir} has no finished rounds to go on from")
    return server, people


def save(checkpoints: Any, workdir: epath.Path, done: int, server: PyTree, people: population.Population) -> None:
    """Writes a checkpoint after `done` rounds; all processes must call it."""
    if jax.tree.leaves(people.states):
        segments.write(people, workdir / "population", done)
    checkpoint.save(checkpoints, done, _state(server, people))
    segments.prune(workdir / "population", checkpoints.all_steps())


def _begin(algorithm, mesh, root, clients, folder=None):
    server = rounds.make_init(algorithm, mesh)(root)
    return server, population.create(rounds.client_states(algorithm, server), clients, folder)


def _state(server, people):
    # States themselves are in segments.
    states = {"written": people.written} if jax.tree.leaves(people.states) else ()
    return {"server": server, "states": states, "known": people.known}


def _restore(checkpoints, workdir, server, people) -> tuple[int, PyTree]:
    """(rounds that are finished, server); the population is filled."""

    def fill(restored):
        written = restored.state["states"]["written"] if jax.tree.leaves(people.states) else people.written
        segments.read(people, workdir / "population", restored.round, np.array(written), restored.state["known"])

    restored = checkpoint.restore(checkpoints, _state(server, people), fill)
    if restored is None:
        return 0, server
    logger.info("going on after round %d", restored.round)
    return restored.round, restored.state["server"]


def _prepare(clients, people, mesh, index, slots, chunk) -> _Inputs:
    """What needs nothing of the round before, and waits for no other process."""
    padding = len(clients.names)
    drawn = clients.sample(index)
    ids = np.concatenate([drawn, np.full(slots - len(drawn), padding)]).astype(np.int32)
    own = ids[rounds.here(slots)]
    examples = np.append(clients.examples, 0)[own].astype(np.float32)
    cohort = Cohort(own, examples, (own < padding) & ~clients.dropped(index, own))
    data = clients.training(index, own)
    placed = rounds.place(data, mesh), rounds.place(cohort, mesh)
    return _Inputs(ids, *placed, clients.tokens(data, chunk), population.prepare(people, ids))


def _arguments(inputs, people, mesh, before) -> tuple:
    """What the step takes of its own; `before` are the clients whose states changed since `inputs` were prepared."""
    states = population.renew(people, inputs.ids, inputs.states, before)
    states = population.arrange(people, inputs.ids, states), population.fresh(people, inputs.ids)
    return *rounds.place(states, mesh), inputs.data, inputs.cohort


def _fastest_chunk(problem, clients, workdir, server, people, root) -> int:
    mesh, algorithm, base = problem.mesh, problem.algorithm, problem.base
    drawn = len(clients.sample(0))

    def prepare(chunk):
        slots = rounds.slots_for(drawn, mesh, chunk)

        def arguments():
            copy = jax.tree.map(jnp.copy, server)
            inputs = _prepare(clients, people, mesh, 0, slots, chunk)
            return base, copy, *_arguments(inputs, people, mesh, np.zeros(0, np.int32)), 0, root

        return rounds.make_round(algorithm, mesh, chunk), arguments

    return chunking.choose(workdir, chunking.candidates(-(-drawn // mesh.shape["clients"])), prepare)


def _make_judge(problem, clients, chunk, workdir, root):
    """(server, population, round, {name: Point}) -> None: evaluates all pools and writes their rows."""
    judges, starts = {}, {}
    averaged = problem.strategy.averaged if problem.strategy else ()

    def make(algorithm):
        return evaluate.make_evaluate(
            algorithm,
            problem.model,
            problem.task,
            problem.mesh,
            chunk=chunk,
            items=clients.tests,
            describe=problem.strategy.describe if problem.strategy else lambda adapters: (),
            answers=problem.answers,
        )

    def judge(server, people, index, points):
        for name, (algorithm, support, trained) in points.items():
            since = time.monotonic()
            if algorithm not in judges:
                judges[algorithm] = make(algorithm)
            if not trained and algorithm not in starts:
                starts[algorithm] = _begin(algorithm, problem.mesh, root, len(clients.names))
            own = (server, people) if trained else starts[algorithm]
            rows, strategies, pooled = [], [], []
            for pool, ids in clients.pools.items():
                scores = judges[algorithm](problem.base, *own, ids, support, index, root)
                rows += records.rows(scores, clients, index, pool, name, averaged)
                groups = [clients.groups[client] for client in scores.ids]
                about = {"round": index, "pool": pool, "point": name}
                pooled += [about | row for row in evaluate.pooled(scores, groups, problem.task)]
                if problem.strategy and name != "global":
                    strategies += records.strategies(scores, clients, index, pool, name, problem.strategy.sites)
            if strategies:
                metrics.merge_rows(workdir / "strategies.parquet", strategies, index)
            if pooled:
                metrics.merge_rows(workdir / "pooled.parquet", pooled, index)
            metrics.merge_rows(workdir / "clients.parquet", rows, index)
            logger.info("evaluated %s at round %d in %.0f s", name, index, time.monotonic() - since)

    return judge

"""The rounds of a run, one after the other: sample, train, record, evaluate, checkpoint, and go on after a kill."""

import concurrent.futures
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
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
    judging,
    metrics,
    population,
    processes,
    records,
    rounds,
    segments,
)
from fedjax_peft.runs import Clients, Evaluations, Point, Problem
from fedjax_peft.types import Algorithm, Array, Batches, Cohort, PyTree

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The process was asked to stop; everything is checkpointed."""


class _Going(NamedTuple):
    """A run that is under way: what its rounds have in common."""

    problem: Problem
    clients: Clients
    people: population.Population
    workdir: epath.Path
    checkpoints: Any  # of `checkpoint.manager`
    judge: Callable[..., None]  # of `judging.make_judge`
    root: Array  # key of everything random that happens on the device
    total: int  # rounds
    chunk: int
    traffic: tuple[int, int]  # bytes that one client receives and sends in a round
    begin: Callable[[str], None]
    stop: Any  # of `processes.stop_signals`


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
    evaluations: Evaluations,
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
      checkpoint_every: rounds between two checkpoints; there is one after the last round.
      keep_checkpoints: how many of the newest checkpoints stay.
      population_folder: of a local disk, where the states of clients lie while the run goes on; None is in memory.
      begin: told of each stage as it begins, see `processes.watchdog`.

    Returns:
      The content of summary.json.

    Raises:
      ValueError: all clients of a round came to numbers that are not finite.
      Interrupted: after SIGTERM or SIGINT.
    """
    workdir, root = epath.Path(workdir), jax.random.key(seed)
    mesh, algorithm = problem.mesh, problem.algorithm
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
    fresh = functools.partial(_begin, mesh=mesh, root=root, clients=len(clients.names))
    most = max(len(ids) for ids in clients.pools.values())
    judge = judging.make_judge(problem, clients, workdir, fresh, chunk=rounds.fitting(chunk, most, mesh), root=root)
    chunk = rounds.fitting(chunk, len(clients.sample(0)), mesh)
    early = {name: point for name, point in points.items() if evaluations.points and point.trained}

    def shown(index):
        """The server's model, of a method that trains one of its own, or in round 0 the base."""
        wanted = evaluations.base if index == 0 else algorithm.shared and (index < total or evaluations.end)
        return {"global": Point(algorithm, clients.nothing)} if evaluations.every and wanted else {}

    def due(index):
        return {} if not evaluations.every or index % evaluations.every else shown(index) | early

    ends = shown(total) | dict(points)
    with processes.stop_signals() as stop:
        going = _Going(problem, clients, people, workdir, checkpoints, judge, root, total, chunk, traffic, begin, stop)
        server = _play(going, server, start, due, checkpoint_every)
        _end(going, server, ends)
    begin("the summary")
    return _summarize(workdir, list(ends), total)


def _play(
    going: _Going, server: PyTree, start: int, due: Callable[[int], Mapping[str, Point]], checkpoint_every: int
) -> PyTree:
    """Plays the rounds from `start` on, with evaluations of what is `due` before them: the last server."""
    (mesh, algorithm, *_), clients, people, total = going.problem, going.clients, going.people, going.total
    step = rounds.make_round(algorithm, mesh, going.chunk)
    slots = rounds.slots_for(len(clients.sample(0)), mesh, going.chunk)
    pending, finished, asked = None, time.monotonic(), False
    path, unwritten = going.workdir / "rounds.jsonl", []
    with console.progress(total, start) as show, concurrent.futures.ThreadPoolExecutor(1, "prefetch") as aside:

        def record(following=None):
            # One round late, so that the device is never idle while the host writes.
            nonlocal pending, finished, asked
            if pending is not None:
                line = records.line(pending, clients, finished)
                finished = time.monotonic()
                unwritten.append(line)
                show(line)
                asked |= bool(np.asarray(pending.told)[:, 2].any())
            # Where each addition replaces the whole file, lines are added when a checkpoint needs them.
            if unwritten and (following is None or metrics.appends(path)):
                metrics.append_lines(path, unwritten)
                unwritten.clear()
            pending = following

        @contextlib.contextmanager
        def between_rounds(stage):
            nonlocal finished
            record()
            going.begin(stage)
            yield
            finished = time.monotonic()

        def prepare(index):
            return aside.submit(_prepare, clients, people, mesh, index, slots, going.chunk) if index < total else None

        ahead, before = prepare(start), np.zeros(0, np.int32)
        for index in range(start, total):
            if points := due(index):
                with between_rounds(f"the evaluation before round {index}"):
                    going.judge(server, people, index, points)
            going.begin(f"round {index}")
            inputs = ahead.result()
            arguments = _arguments(inputs, people, mesh, before)
            server, states, cohort, outcome = step(going.problem.base, server, *arguments, index, going.root)
            told = processes.tell(np.array([*inputs.tokens, bool(going.stop)]))
            ahead, before = prepare(index + 1), inputs.ids
            # Before a step on the host, which waits for this round: it is not part of the one before.
            record(records.Pending(index, going.traffic, cohort, outcome, told))
            if algorithm.host_step is not None:
                server = rounds.replicate(algorithm.host_step(server), mesh)
            if jax.tree.leaves(states):
                own = jax.device_get(rounds.local(states, mesh))
                population.scatter(people, inputs.ids, own, np.asarray(cohort.reported))
            # Of several processes one alone may have been asked, which the others learn with its round.
            asked |= jax.process_count() == 1 and bool(going.stop)
            if (index + 1) % checkpoint_every == 0 or index + 1 == total or asked:
                with between_rounds(f"the checkpoint after round {index}"):
                    save(going.checkpoints, going.workdir, index + 1, server, people)
            if asked and index + 1 < total:
                said = f"stopped by {processes.named(going.stop)} after round {index + 1} of {total}"
                raise Interrupted(f"{said}; the same command goes on from here")
    return server


def _end(going: _Going, server: PyTree, points: Mapping[str, Point]) -> None:
    """Evaluates those points after the last round that a killed run has not finished."""
    rows = metrics.read_rows(going.workdir / "clients.parquet") if processes.first() else []
    done = processes.gather({row["point"] for row in rows if row["round"] == going.total})[0]
    for name, point in points.items():
        going.begin(f"the evaluation of {name}")
        if name not in done:
            going.judge(server, going.people, going.total, {name: point})
        if any(processes.gather(bool(going.stop))):
            said = processes.named(going.stop)
            raise Interrupted(f"stopped by {said} after the evaluation of {name}; the same command goes on")


def _summarize(workdir: epath.Path, points: list[str], total: int) -> dict[str, Any]:
    summary = None
    if processes.first():
        tables = [metrics.read_rows(workdir / f"{table}.parquet") for table in ("clients", "pooled")]
        summary = records.summary(*tables, points, total)
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

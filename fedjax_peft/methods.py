"""What a config trains: model, task, method, and what is recorded of it."""

import functools
import hashlib
import inspect
import pathlib
import runpy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_peft import adapters, aggregate, algorithms, local, ranks, runs, spectra, tasks
from fedjax_peft import settings as settings_lib
from fedjax_peft.algorithms import bayestune, expert_embeddings, fedavg, fedl2p, fedprompt, mutual, personal_base
from fedjax_peft.config import call, called, check_choices, check_keys, default_config, named, stage_one, update
from fedjax_peft.data import federations
from fedjax_peft.ground import prompt
from fedjax_peft.types import Algorithm, Model, PyTree, Task

PASSED_ON = (fedavg.fedavg, bayestune.Scales, fedl2p.AdamW)
"""What methods make of settings that they do not name themselves."""
_PAIRS = "its pair of models has no place for a part of each client"
_WORDS = "its virtual tokens have no place beside a part of each client"
_POOLED = "clients have bases of their own there, and it trains for all of them at once"
APART = {
    "feddpa": {
        "centralized": _POOLED,
        "fedamole": "mixtures do not join clients' LoRAs",
        "fedapen": _PAIRS,
        "fedmutual": _PAIRS,
    },
    "dept": {
        "centralized": _POOLED,
        "fedapen": _PAIRS,
        "fedmutual": _PAIRS,
        "fedprompt": _WORDS,
        "fedptuning": _WORDS,
    },
}
"""Methods that cannot go on from a base with a part of each client, and why."""
WITHOUT_SPECTRA = {
    "fedamole": "mixtures of them",
    "fedapen": "pairs of them",
    "fedmutual": "pairs of them",
    "fedprompt": "virtual tokens",
    "fedptuning": "virtual tokens",
}
"""Methods whose adapters are no LoRAs at sites, and what they are."""
DIFFERENCES = {"hvp": "fd", "order": "hf"}
"""Settings of methods that then take differences of gradients over small steps."""


def find(name: str) -> Callable[..., Algorithm]:
    """The function of a method: one of `algorithms.ALL` by its name, or one of your own as FILE.py:FUNCTION."""
    path, own, function = name.rpartition(":")
    if not own:
        return named("algorithm", name, algorithms.ALL)
    found = _read(path)
    if function not in found:
        raise ValueError(f"algorithm.name is {name!r}, but {path} has no function {function}")
    return found[function]


@functools.lru_cache  # one reading, so that all stages and points of a run have the same function
def _read(path: str) -> dict[str, Any]:
    _bytes(path)
    return runpy.run_path(path)


def _bytes(path: str) -> bytes:
    if not pathlib.Path(path).is_file():
        raise ValueError(f"algorithm.name asks for the file {path}, which does not exist")
    return pathlib.Path(path).read_bytes()


def sources(config: ConfigDict) -> dict[str, str]:
    """SHA-256 of the files of methods of your own, which identify a run as its config does."""
    points = {f"points.{name}": sections for name, sections in config.points.items()}
    names = {key: own.algorithm.name for key, own in points.items() if "name" in own.get("algorithm", {})}
    paths = {key: name.rpartition(":")[0] for key, name in ({"algorithm": config.algorithm.name} | names).items()}
    return {key: hashlib.sha256(_bytes(path)).hexdigest() for key, path in paths.items() if path}


def abstract(
    config: ConfigDict, model: Model, base: PyTree, task: Task | None = None
) -> tuple[Model, Algorithm, PyTree]:
    """What a config trains on a model of which only the shapes of its base are known; classification by default.

    Returns:
      The model as clients call it, the method, and shapes of one client's adapters.
    """
    model = folded(config, model)
    own = jax.eval_shape(initializer(config, base), jax.random.key(0))
    # There are no data to count the clients of.
    clients = config.algorithm.get("clients", config.cohort)
    return model, make(config, model, task or tasks.classification(), base, clients), own


def initializer(config: ConfigDict, base: PyTree) -> Callable[..., PyTree]:
    """(key, **changed settings) -> adapters, at sites that the model has."""
    shapes = jax.eval_shape(lambda tree: tree, base)
    init_adapters = functools.partial(adapters.init, shapes=shapes, **config.adapter)
    adapters.check_sites(jax.eval_shape(init_adapters, jax.random.key(0)), shapes)
    return init_adapters


def make(
    config: ConfigDict,
    model: Model,
    task: Task,
    base: PyTree,
    clients: int,
    *,
    parts: bool = False,
    kept: np.ndarray | None = None,
) -> Algorithm:
    """The method of a config.

    Args:
      base: or its shapes.
      clients: N.
      parts: whether each client has a base of its own.
      kept: ids of the tokenizer that the base has left, ascending; None: all.
    """
    init_adapters = initializer(config, base)
    settings = _settings(config, kept)
    factory = find(settings.pop("name"))
    _check_settings(config, factory, settings)
    elsewhere = {}
    if "clients" in inspect.signature(factory).parameters:
        if settings.setdefault("clients", clients) != clients:
            raise ValueError(f"algorithm.clients is {settings['clients']}, but the data have {clients}: leave it out")
    if config.server.name != "average" or config.server.learning_rate is not None:
        settings["server_optimizer"] = called("server", aggregate.server_optimizer, **config.server)
        key = "learning_rate" if config.server.name == "average" else "name"
        elsewhere["server_optimizer"] = f"server.{key} is {config.server[key]!r}"
    # What would change nothing is given to methods that name it, and spared to those that have no use for it.
    changing = config.schedule.name != "constant" or config.schedule.warmup
    if config.rounds and (changing or "schedule" in inspect.signature(factory).parameters):
        settings["schedule"] = called("schedule", local.make_schedule, rounds=config.rounds, **config.schedule)
        key = "warmup" if config.schedule.name == "constant" else "name"
        elsewhere["schedule"] = f"schedule.{key} is {config.schedule[key]!r}"
    optimizer = called("optimizer", local.make_optimizer, **config.optimizer)
    own = personal_base.beside(model) if parts else model
    method = call("algorithm", factory, (own, task, init_adapters, optimizer), settings, elsewhere)
    return personal_base.personal_base(method) if parts else method


def _check_settings(config: ConfigDict, factory: Callable, settings: dict[str, Any]) -> None:
    """Raises ValueError for what the method itself does not see."""
    name, base = config.algorithm.name, None if config.base.name == "pretrained" else stage_one(config).algorithm.name
    if (reason := APART.get(base, {}).get(name)) is not None:
        raise ValueError(f"algorithm {name} cannot go on from a base of {base}: {reason}")
    if base == "feddpa" and config.adapter.kind == "full":
        raise ValueError(
            "adapter.kind 'full' cannot go on from a base of feddpa, whose clients have LoRAs of their own"
        )
    if factory in algorithms.ALL.values():
        further = {key: value for key, value in settings.items() if key not in inspect.signature(factory).parameters}
        for function in PASSED_ON:
            settings_lib.check_types("algorithm", function, further)
    given = {**_defaults(find(config.algorithm.name)), **settings}
    for key, how in DIFFERENCES.items():
        for section in ("model", "task"):
            dtype = config[section].dtype
            if given.get(key) == how and dtype != "float32":
                said = f"{section}.dtype is {dtype!r}, in which the differences of algorithm.{key} {how!r} are lost"
                raise ValueError(f"{said}, expected 'float32'")


def check_budgets(config: ConfigDict, method: Algorithm, prefix: str = "") -> None:
    """Raises ValueError for budgets that a method does not read or that R ranks cannot fill; `prefix` says whose."""
    budgets = tuple(config.personalize.budgets)
    if budgets and not method.budgets:
        name = config.algorithm.name
        raise ValueError(f"{prefix}personalize.budgets is {budgets}, but {name} selects no ranks, expected ()")
    ranks.check_budgets(budgets, config.adapter.rank, prefix)


def folded(config: ConfigDict, model: Model) -> Model:
    """The model as the method's adapters want it called."""
    name = config.algorithm.name
    if name in ("fedmutual", "fedapen"):
        return mutual.ensembled(model)
    if name in ("fedprompt", "fedptuning"):
        settings = {**_defaults(find(config.algorithm.name)), **_settings(config)}
        if settings.get("prompt") is inspect.Parameter.empty:
            raise ValueError("algorithm fedprompt needs 'prompt'")
        return fedprompt.prompted(model, len(settings["prompt"]) if name == "fedprompt" else settings["virtual_tokens"])
    return adapters.merged(model) if config.adapter.kind == "full" else model


def unset(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Arguments of the method and of the data that the config leaves at their defaults, as far as a file can say them.

    The learning rates and other fields that a method hands on to a function of its own are not among them.
    """
    factories = {"algorithm": find(config.algorithm.name), "data": named("data", config.data.name, federations.ALL)}
    return {
        section: {
            name: default
            for name, default in _defaults(factory).items()
            if name not in config[section] and isinstance(default, bool | int | float | str | tuple | None)
        }
        for section, factory in factories.items()
    }


def _defaults(factory: Callable) -> dict[str, Any]:
    return {name: of.default for name, of in inspect.signature(factory).parameters.items()}


def _settings(config: ConfigDict, kept: np.ndarray | None = None) -> dict[str, Any]:
    """What the config says of the method; a prompt as tokens, with ids as the base has them."""
    settings = config.algorithm.to_dict()
    if (tokens := prompt(config)) is not None:
        if kept is not None and not np.isin(tokens, kept).all():
            raise ValueError("algorithm.prompt has tokens that neither the data nor the prompt of the run have")
        settings["prompt"] = tuple((tokens if kept is None else np.searchsorted(kept, tokens)).tolist())
    return settings


def task(config: ConfigDict, federation: federations.Federation, judge: Callable | None = None) -> Task:
    """What clients learn, as their data ask for; `judge` is of what they write."""
    if federation.task == "span":
        return tasks.span(score=federation.score, max_answer=config.task.max_answer)
    if federation.task == "choice":
        return tasks.choice(len(federation.classes))
    if federation.task == "causal":
        return tasks.causal(judge=judge, average=config.task.average, smoothing=config.task.smoothing)
    return tasks.classification(mcc=config.task.mcc, dtype=config.task.dtype)


def rivals(
    config: ConfigDict, model: Model, task: Task, base: PyTree, clients: int, *, parts: bool, kept: np.ndarray | None
) -> list[tuple[str, Algorithm, ConfigDict]]:
    """The further ways to personalize of `config.points`: name, algorithm, config."""
    rivals, usual = [], default_config()
    for name, sections in config.points.items():
        check_keys(sections.to_dict(), f"points.{name}.")
        settings = ConfigDict(config.to_dict())
        for section, values in sections.items():
            if section not in ("algorithm", "optimizer", "personalize"):
                raise ValueError(f"points.{name}.{section} cannot differ, only algorithm, optimizer and personalize")
            if section == "algorithm" and values.get("name", config.algorithm.name) != config.algorithm.name:
                settings.algorithm = {}
            update(settings[section], values.to_dict(), f"points.{name}.{section}")
        trained = settings.algorithm.name == config.algorithm.name
        if not trained:
            # It trains in no rounds, for which these are.
            settings.server, settings.schedule = usual.server, usual.schedule
        own = {f"{section}.{key}" for section, values in sections.items() for key in values}
        check_choices(settings, f"points.{name}.", own)
        try:
            method = make(settings, model, task, base, clients, parts=parts, kept=kept)
        except ValueError as error:
            raise ValueError(f"points.{name}: {error}") from error
        if not trained and any(method.traffic(jax.eval_shape(method.init, jax.random.key(0)))):
            raise ValueError(f"points.{name}: {settings.algorithm.name} learns in rounds, so it needs a run of its own")
        check_budgets(settings, method, f"points.{name}: ")
        rivals.append((name, method, settings))
    return rivals


def strategy(config: ConfigDict, base: PyTree, rivals: Sequence[tuple] = ()) -> runs.Strategy | None:
    """What is recorded of a client at each site: ranks that a budget leaves or its weights have, or experts held.

    A budget of one point, of the run's own or of those of `rivals`, is enough.
    """
    budgets = any(settings.personalize.budgets for settings in (config, *(settings for *_, settings in rivals)))
    spectral, mixed = config.evaluate.spectra, config.algorithm.name == "fedamole"
    if spectral and config.algorithm.name in WITHOUT_SPECTRA:
        name, have = config.algorithm.name, WITHOUT_SPECTRA[config.algorithm.name]
        raise ValueError(
            f"evaluate.spectra is of LoRAs, expected False with algorithm {name}, whose clients have {have}"
        )
    if not budgets and not spectral and not mixed:
        return None
    layout = ranks.layout(ranks.concrete(initializer(config, base)))
    if mixed:
        return runs.Strategy(layout.names, functools.partial(expert_embeddings.strategy, layout))
    describe = functools.partial(ranks.strategy, layout)
    if not spectral:
        return runs.Strategy(layout.names, describe)
    spectrum = functools.partial(spectra.describe, layout, tolerance=config.evaluate.rank_tolerance)
    if not budgets:
        return runs.Strategy(layout.names, spectrum, spectra.RANKS)
    return runs.Strategy(layout.names, lambda adapters: describe(adapters) | spectrum(adapters), spectra.RANKS)

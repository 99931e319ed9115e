"""Data sets as federations: who the clients are, and what each of them trains and is tested on.

A config names one of these functions in `data.name`; the other keys of `data` are its arguments.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_peft.data import chatterbot as corpus
from fedjax_peft.data import federated

Encode = Callable[[Sequence[str], Sequence[str] | None], federated.Encoded]


class Federation(NamedTuple):
    """N clients with their data."""

    train: federated.Store
    test: federated.Store
    names: tuple[str, ...]  # [N]
    groups: tuple[str, ...]  # [N] language or task that results are broken down by
    pools: dict[str, np.ndarray]  # `seen` clients train; `unseen` ones, if any, are only evaluated
    classes: tuple[str, ...]  # names of the labels


def chatterbot(encode: Encode, *, seed: int = 0, test_fraction: float = 0.2, min_rows: int = 80) -> Federation:
    """Topics of dialogues in 16 languages, a client a language; smaller languages are the unseen pool.

    Args:
      encode: (texts, None) -> token sequences.
      seed: of the split into train and test.
      test_fraction: share of each language's rows that is held out.
      min_rows: languages with fewer rows are unseen.
    """
    data = corpus.load(seed=seed, test_fraction=test_fraction, min_rows=min_rows)
    names = data.languages + data.unseen_languages
    stores = {}
    for split in ("train", "test"):
        table = {
            key: np.concatenate([data.seen[split][key], data.unseen[split][key]])
            for key in ("language", "text", "label")
        }
        clients = [np.flatnonzero(table["language"] == name) for name in names]
        encoded = encode(list(table["text"]), None)
        stores[split] = federated.build(encoded, table["label"], clients, classes=len(data.topics))
    seen = np.arange(len(data.languages), dtype=np.int32)
    pools = {"seen": seen}
    if data.unseen_languages:
        pools["unseen"] = np.arange(len(seen), len(names), dtype=np.int32)
    return Federation(stores["train"], stores["test"], names, names, pools, data.topics)


def majority(federation: Federation) -> np.ndarray:
    """[N] accuracy on a client's test examples of always answering its most frequent training label (NaN without tests)."""
    shares = []
    for client in range(len(federation.names)):
        train = federation.train.labels[federated.rows(federation.train, client)]
        test = federation.test.labels[federated.rows(federation.test, client)]
        shares.append(np.mean(test == np.bincount(train).argmax()) if len(test) and len(train) else np.nan)
    return np.array(shares)


def with_everybody(federation: Federation) -> federated.Store:
    """The training store with one more client, number N, that holds the examples of all seen clients."""
    train = federation.train
    clients = [federated.rows(train, client) for client in range(len(federation.names))]
    everybody = np.concatenate([clients[client] for client in federation.pools["seen"]])
    encoded = federated.Encoded(train.tokens, train.types, train.token_offsets)
    return federated.build(encoded, train.labels, [*clients, everybody], allow_empty=True)


ALL = {factory.__name__: factory for factory in (chatterbot,)}

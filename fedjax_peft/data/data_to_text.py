"""Texts that say what a table holds, WebNLG and E2E, as federations for causal language models.

PF2LoRA (arXiv 2503.03920) uses both; which client holds what is a choice of this library. Clients
train on every reference, tests have them all. Further settings, `division`, are fields of `prompted.Division`;
`max_length` is the number of tokens of an example. Unless told otherwise nothing is held out of training but tests.
"""

import logging
import re
from typing import Any

import numpy as np

from fedjax_peft.data import federated, prompted
from fedjax_peft.data import partition as partitions
from fedjax_peft.data import text as text_data
from fedjax_peft.data.federated import Federation
from fedjax_peft.data.tokenizers import Tokenizer

_ALL = {"aux": 0.0, "validation": 0.0, "test_limit": None}


def webnlg(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_length: int,
    clients: int = 8,
    train: str = "train",
    test: str | None = text_data.AUTO,
    seed: int = 1234,
    **division: Any,
) -> Federation:
    """WebNLG (Gardent et al., 2017): texts that say sets of triples, whole categories a client.

    Args:
      source: file or folder, columns `category`, `triples` and `references`, both lists of texts.
      test: split of tests; without one, as in a file, they are held out of each client's rows.
      seed: of the order of rows.

    Raises:
      ValueError: a column is missing, or there are fewer categories than clients.
    """
    columns = ("category", "triples", "references")
    splits = text_data.splits(source, train, test)
    tables = {name: text_data.read(source, split=split, columns=columns) for name, split in splits.items()}
    for column in columns[1:]:
        # A csv file has no lists, and a text would be read letter by letter.
        if alone := [one for table in tables.values() for one in table[column] if isinstance(one, str)]:
            raise ValueError(f"the column {column!r} has the text {alone[0]!r}, expected lists of texts in every row")
    dealt = whole_groups({name: table["category"] for name, table in tables.items()}, clients=clients, seed=seed)
    groups = federated.groups(tables["train"], "category", dealt["train"])
    rows, dealt = prompted.stacked(tables, dealt)
    prompts = [" | ".join(triple.replace(" | ", " : ") for triple in triples) + "\n" for triples in rows["triples"]]
    questions = prompted.Questions(prompts, [tuple(texts) for texts in rows["references"]], every=True)
    return prompted.federation(tokenizer, questions, dealt, groups, max_length=max_length, **_ALL | division)


def e2e(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_length: int,
    clients: int = 8,
    slot: str = "food",
    train: str = "train",
    test: str | None = text_data.AUTO,
    seed: int = 1234,
    **division: Any,
) -> Federation:
    """E2E (Novikova et al., 2017): texts that say the slots of a restaurant, whole values of one slot a client.

    Args:
      source: file, folder or hub name, columns `meaning_representation` and `human_reference`.
      slot: `food`, `near` or `name`; to be without it is a value as well.
      test: split of tests; without one, as in a file, they are held out of each client's meanings.
      seed: of the order of rows.

    Raises:
      ValueError: a column is missing, or there are fewer values than clients.
    """
    columns = ("meaning_representation", "human_reference")
    splits = text_data.splits(source, train, test)
    read = {name: text_data.read(source, split=split, columns=columns) for name, split in splits.items()}
    tables = {name: _meanings(table, slot) for name, table in read.items()}
    dealt = whole_groups({name: table["value"] for name, table in tables.items()}, clients=clients, seed=seed)
    groups = federated.groups(tables["train"], "value", dealt["train"])
    rows, dealt = prompted.stacked(tables, dealt)
    prompts = [" | ".join(f"{name} : {value}" for name, value in _slots(meaning)) + "\n" for meaning in rows["meaning"]]
    questions = prompted.Questions(prompts, [tuple(texts) for texts in rows["references"]], every=True)
    return prompted.federation(tokenizer, questions, dealt, groups, max_length=max_length, **_ALL | division)


def whole_groups(splits: dict[str, np.ndarray], *, clients: int, seed: int) -> partitions.Partition:
    """Whole groups of rows, the largest first to the client that has fewest training rows.

    A client whose groups do not occur in a further split gets a random share of it, which others hold as well; rows of
    groups that training does not have are left out.

    Args:
      splits: {split: [M] group of each row}, the training split first.
      clients: number of clients; each gets a group.
      seed: of the order of rows within a client.

    Raises:
      ValueError: fewer groups than clients.
    """
    (_, first), *_ = splits.items()
    names, counts = np.unique(first, return_counts=True)
    if not 1 <= clients <= len(names):
        raise ValueError(f"data.clients is {clients}, but there are {len(names)} groups, expected one or more for each")
    held, owner = np.zeros(clients, np.int64), {}
    for name in np.argsort(-counts, kind="stable"):
        owner[names[name]] = int(held.argmin())
        held[held.argmin()] += counts[name]
    out = {}
    for i, (split, values) in enumerate(splits.items()):
        rng = np.random.default_rng([seed, i])
        owners = np.array([owner.get(value, -1) for value in values])
        out[split] = [rng.permutation(np.flatnonzero(owners == client)) for client in range(clients)]
        for client in [client for client, rows in enumerate(out[split]) if not len(rows)]:
            logging.info("client %d has no groups of its own in %s and gets a random share", client, split)
            out[split][client] = rng.permutation(len(values))[: -(-len(values) // clients)]
    return out


def _slots(meaning: str) -> list[tuple[str, str]]:
    return [(name.strip(), value) for name, value in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", meaning)]


def _meanings(table: text_data.Table, slot: str) -> text_data.Table:
    """A row for each meaning with all that people said of it, so that no meaning is trained on and tested."""
    said: dict[str, list[str]] = {}
    for meaning, reference in zip(table["meaning_representation"], table["human_reference"], strict=True):
        said.setdefault(meaning, []).append(reference)
    out = {name: np.empty(len(said), object) for name in ("meaning", "references", "value")}
    out["meaning"][:], out["references"][:] = list(said), list(said.values())
    out["value"][:] = [dict(_slots(meaning)).get(slot, "none") for meaning in said]
    return out

"""Data sets of prompts and answers as federations: what causal language models train and are judged on.

Every function takes the tokenizer itself, because prompt and answer are tokenized apart and answers end with its end
token. The rows of a client are divided as in FedAMoLE (Zhang et al., 2024, arXiv 2411.19128): `Division` has its
numbers, and every function takes its fields as further settings.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft.data import federated, instructions
from fedjax_peft.data import partition as partitions
from fedjax_peft.data import text as text_data
from fedjax_peft.data.federated import Federation
from fedjax_peft.data.tokenizers import Tokenizer

PARTS = ("train", "aux", "validation", "test")


class Division(NamedTuple):
    """How the rows of each client are divided and how many are kept; None keeps all."""

    aux: float = 0.05  # share of what would be training rows that is held out for methods that fit or embed clients
    validation: float = 0.1  # share of all rows
    test_fraction: float = 0.1  # share of all rows; data with a split of their own for tests do not need it
    train_limit: int | None = None
    aux_limit: int | None = 200
    validation_limit: int | None = 200
    test_limit: int | None = 50
    evaluated: str = "test"  # the part that clients are judged on; or `validation`, to choose settings by


class Questions(NamedTuple):
    """Rows of a data set as prompts and what answers them."""

    prompts: Sequence[str]  # [M]
    answers: Sequence[tuple[str, ...]]  # [M]: right ones; in tests the first is the one whose loss is taken
    choices: tuple[str, ...] = ()  # if the answer is to be chosen among these
    every: bool = False  # whether clients train on all right answers, or on the first one only
    begin: bool = True  # whether prompts begin as the tokenizer begins its texts, or do that themselves


def from_columns(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_length: int,
    partition: Mapping[str, Any],
    instruction: str = "instruction",
    context: str | None = None,
    answer: str = "output",
    template: str = "alpaca",
    configs: Sequence[str] = (),
    group: str | None = None,
    train: str = "train",
    test: str | None = text_data.AUTO,
    keep: Mapping[str, Sequence] | None = None,
    unseen: int | Sequence = 0,
    seed: int = 0,
    **division: Any,
) -> Federation:
    """Instructions and answers in columns of files or of a data set of the hub.

    Args:
      source: file, folder or hub name; see `text.read`.
      max_length: tokens of an example; longer answers are cut, rows with prompts as long are left out.
      partition: `name` of a function of data/partition.py and its settings, its own `seed` among them.
      instruction, context, answer: columns of texts; without a `context` instructions stand alone.
      template: `plain`, `alpaca`, `alpaca_turn` or `chat`, see `instructions.template`.
      configs: subsets to read one after the other; the new column `language` tells them apart.
      group: column that results are broken down by.
      train, test: splits, also several as in `train+validation`, or `*` for all files of a folder, which the column
        `file` tells apart; `auto` is the split `test`, or none where there are no splits. Without one, rows of each
        client are held out.
      keep: {column: values}: rows with other values are left out.
      unseen: clients that never train: how many, drawn at random, or which.
      seed: of that draw.
      division: fields of `Division`.
    """
    splits = text_data.splits(source, train, test)
    tables = {name: text_data.read_configs(source, configs, split=split) for name, split in splits.items()}
    for column, values in (keep or {}).items():
        tables = {name: having(table, column, values) for name, table in tables.items()}
    partitioner, settings = partitions.named(partition)
    clients = partitioner(tables, **settings)
    groups = federated.groups(tables["train"], group, clients["train"])
    names = partitions.client_names(partition, tables["train"], groups, clients["train"])
    form = instructions.template(template, tokenizer)
    rows, clients = stacked(tables, clients)
    asked, answers = text_data.texts(rows, (instruction, answer))
    contexts = [""] * len(asked)
    if context:
        if context not in rows:
            raise ValueError(f"data.context is {context!r}, but the columns are {', '.join(rows)}")
        contexts = [text or "" for text in rows[context]]
    questions = Questions(
        [form.prompt(*pair) for pair in zip(asked, contexts, strict=True)],
        [(form.before + text,) for text in answers],
        begin=template != "chat",
    )
    made = federation(tokenizer, questions, clients, groups, names, max_length=max_length, **division)
    return made._replace(pools=federated.pools(len(groups), unseen, seed)) if unseen else made


def divided(rows: np.ndarray, *, aux: float, validation: float, test: float) -> dict[str, np.ndarray]:
    """The rows of a client, which are in random order, cut into the four `PARTS`.

    Of what validation and test leave, a share `aux` is held out.
    """
    if min(aux, validation, test) < 0 or aux >= 1 or validation + test >= 1:
        raise ValueError(f"shares {aux=}, {validation=} and {test=} of a client's rows leave nothing to train on")
    left = 1 - validation - test
    ends = np.cumsum([left * (1 - aux), left * aux, validation])
    # The small constant undoes rounding: 0.76 of 50 rows are 38.
    return dict(zip(PARTS, np.split(rows, np.floor(ends * len(rows) + 1e-9).astype(np.int64)), strict=True))


def federation(
    tokenizer: Tokenizer,
    questions: Questions,
    clients: partitions.Partition,
    groups: Sequence[str],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
    **division: Any,
) -> Federation:
    """Divides the rows of each client and makes examples of them.

    After division, rows whose prompt leaves no room for an answer are left out; a part that is then empty gets a row
    from training. Limits count what is left.

    Args:
      questions: of all splits, one after the other.
      clients: rows of each client in `train` and, unless tests are held out of these, in `test`.
      groups: of each client, for tables.
      names: of each client; those of `federated.names` by default.
      max_length: tokens of an example.
      division: fields of `Division`.

    Raises:
      ValueError: a client has too few rows, or shares or limits make no sense.
    """
    division = Division(**division)
    names, parts = tuple(names or federated.names(groups)), _parts(clients, division)
    if division.evaluated == "validation":
        parts = [own | {"test": own["validation"], "validation": own["validation"][:0]} for own in parts]
        division = division._replace(validation=0.0, test_limit=division.validation_limit)
    held = np.unique(np.concatenate([rows for own in parts for rows in own.values()]))
    prompts = instructions.encode_prompts(
        tokenizer, [questions.prompts[row] for row in held], max_length=max_length, begin=questions.begin
    )
    fits = held[np.diff(prompts.offsets) < max_length]
    lost = {f"{part}_left_out": sum(int((~np.isin(own[part], fits)).sum()) for own in parts) for part in PARTS}
    parts = [_repaired(name, own, division, fits) for name, own in zip(names, parts, strict=True)]
    stores, rows_of = {}, {}
    for part in (part for part in PARTS if part in ("train", "test") or getattr(division, part)):
        rows, texts, own = _examples(questions, [client[part] for client in parts], part)
        rows_of[part] = rows
        asked, labels = np.searchsorted(held, rows), {}
        if questions.choices and part == "test":
            encoded = instructions.encode_choices(tokenizer, prompts, asked, questions.choices, max_length=max_length)
            labels = {"right": np.array([questions.choices.index(text) for text in texts], np.int32)}
        else:
            encoded = instructions.encode(tokenizer, prompts, asked, texts, max_length=max_length)
        stores[part] = federated.build(encoded, labels, own, allow_empty=part != "train")
        lost[f"{part}_cut"] = federated.cut(encoded, own)
    return Federation(
        **stores,
        names=names,
        groups=tuple(groups),
        pools={"seen": np.arange(len(names), dtype=np.int32)},
        classes=questions.choices,
        task="choice" if questions.choices else "causal",
        references=None if questions.choices else tuple(questions.answers[row] for row in rows_of["test"]),
        majority=_majority(questions, parts) if questions.choices else None,
        lost=lost,
    )


def having(table: text_data.Table, column: str, values: Sequence) -> text_data.Table:
    """The rows whose value of a column is one of `values`. ValueError if there is none."""
    if column not in table:
        raise ValueError(f"there is no column {column!r}, only {', '.join(table)}")
    rows = np.isin(table[column], list(values))
    if not rows.any():
        raise ValueError(f"no row has one of the values of {column!r} that are to be kept")
    return {name: own[rows] for name, own in table.items()}


def stacked(
    tables: dict[str, text_data.Table], clients: partitions.Partition
) -> tuple[text_data.Table, partitions.Partition]:
    """One table of all splits, with the columns that all have, and the clients' rows as it numbers them."""
    common = [name for name in tables["train"] if all(name in table for table in tables.values())]
    sizes = [len(table[common[0]]) for table in tables.values()]
    before = dict(zip(tables, np.cumsum([0, *sizes[:-1]]), strict=True))
    moved = {split: [rows + before[split] for rows in own] for split, own in clients.items()}
    return {name: np.concatenate([table[name] for table in tables.values()]) for name in common}, moved


def _parts(clients, division: Division) -> list[dict[str, np.ndarray]]:
    """The parts of each client."""
    for part, limit in ((part, getattr(division, f"{part}_limit")) for part in PARTS):
        if limit is not None and limit < 1:
            raise ValueError(f"data.{part}_limit is {limit} rows of a client, expected 1 or more")
    if division.evaluated not in ("test", "validation"):
        raise ValueError(f"data.evaluated is {division.evaluated!r}, expected 'test' or 'validation'")
    if division.evaluated == "validation" and not division.validation:
        raise ValueError(
            "data.evaluated is 'validation', but data.validation is 0, expected a share of a client's rows"
        )
    own_tests = "test" in clients
    out = []
    for client, rows in enumerate(clients["train"]):
        share = 0.0 if own_tests else division.test_fraction
        parts = divided(rows, aux=division.aux, validation=division.validation, test=share)
        out.append(parts | ({"test": clients["test"][client]} if own_tests else {}))
    return out


def _repaired(name: str, parts: dict[str, np.ndarray], division: Division, fits: np.ndarray) -> dict[str, np.ndarray]:
    """Rows whose prompts fit, as many as are to be kept; a part that has none gets one from the training rows."""
    parts = {part: rows[np.isin(rows, fits)] for part, rows in parts.items()}
    wanted = [part for part in ("aux", "validation") if getattr(division, part)] + ["test"]
    for part in wanted:
        if not len(parts[part]):
            parts["train"], parts[part] = parts["train"][:-1], parts["train"][-1:]
    if not len(parts["train"]):
        needed = ", ".join(["train", *wanted])
        raise ValueError(
            f"client {name} has too few rows whose prompts fit into max_length, expected one each for {needed}; "
            f"where data have a partition to choose, its min_size leaves out who has fewer"
        )
    return {part: rows[: getattr(division, f"{part}_limit")] for part, rows in parts.items()}


def _majority(questions: Questions, clients: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """[N] test accuracy of the choice that is right most often in a client's training rows."""
    right = np.array([questions.choices.index(own[0]) for own in questions.answers])
    return np.array([federated.majority(right[own["train"]], right[own["test"]]) for own in clients])


def _examples(questions: Questions, clients: Sequence[np.ndarray], part: str):
    """(row of each example, its answer, examples of each client) of one part."""
    every = questions.every and part in ("train", "aux")
    rows, texts, own = [], [], []
    for client in clients:
        start = len(rows)
        for row in client:
            known = questions.answers[row] if every else questions.answers[row][:1]
            rows += [row] * len(known)
            texts += known
        own.append(np.arange(start, len(rows)))
    return np.array(rows, np.int64), texts, own

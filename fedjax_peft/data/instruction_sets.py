"""Data sets of instructions and of questions, each as a federation for causal language models.

Further settings of all of them, `division`, are fields of `prompted.Division`; `max_length` is the number of tokens of
an example, and `template` is one of `instructions.template`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from fedjax_peft.data import federated, instructions, prompted
from fedjax_peft.data import partition as partitions
from fedjax_peft.data import text as text_data
from fedjax_peft.data.federated import Federation
from fedjax_peft.data.tokenizers import Tokenizer

LABELS = ("entailment", "neutral", "contradiction")
"""Classes of SNLI in the order of their numbers, as of `instructions.INFERENCES`."""


def dolly(
    tokenizer: Tokenizer,
    *,
    source: str = "databricks/databricks-dolly-15k",
    max_length: int,
    clients: int = 10,
    alpha: float = 1.0,
    seed: int = 42,
    published_draws: bool = False,
    template: str = "alpaca",
    **division: Any,
) -> Federation:
    """Dolly-15K, its eight categories spread over clients by Dirichlet(alpha), drawn by `seed`.

    Args:
      published_draws: let clients hold the rows that they have in the code of FedAMoLE, see `partition.dirichlet`.
    """
    partition = {"name": "dirichlet", "label": "category", "clients": clients, "alpha": alpha, "seed": seed}
    partition |= {"published": published_draws}
    columns = {"instruction": "instruction", "context": "context", "answer": "response", "group": "category"}
    own = {"source": source, "max_length": max_length, "template": template, "partition": partition, "test": None}
    return prompted.from_columns(tokenizer, **own, **columns, **division)


def fed_flan(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_length: int,
    template: str = "alpaca",
    seed: int = 0,
    **division: Any,
) -> Federation:
    """A set of eight clients with a FLAN task each (FedDPA, arXiv 2403.19211), in the order of the tasks' names.

    Args:
      source: folder with `client0` to `client7` and `test`, columns `instruction`, `output`, `task` and `category`.
      seed: of the order of rows.
    """
    return prompted.from_columns(
        tokenizer,
        source=source,
        max_length=max_length,
        template=template,
        partition={"name": "natural_id", "column": "task", "seed": seed},
        group="task",
        train="+".join(f"client{client}" for client in range(8)),
        test="test",
        **division,
    )


def fed_aya(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_length: int,
    languages: Sequence[str] = ("ar", "en", "es", "fr", "pt", "ru", "te", "zh"),
    unseen: Sequence = (21, 22, 23, 24, 25, 26, 27, 34),
    template: str = "alpaca_turn",
    seed: int = 42,
    **division: Any,
) -> Federation:
    """Annotators of Aya as clients, who write in one language or several (Ye et al., 2024, arXiv 2406.04845).

    As in FedP2EFT (Lee et al., 2025, arXiv 2502.04387): a random fifth of each client's rows is its test, and some
    clients are unseen. Unlike there, test rows with prompts of `max_length` tokens are left out too.

    Args:
      source: file or folder with columns `client`, `language`, `instruction` and `response`.
      languages: others are left out.
      unseen: values of `client`.
      seed: of the order of rows, and so of the test rows.
    """
    split = "train"
    ids = text_data.read(source, split=split, columns=("client", "language"))
    ids = np.unique(prompted.having(ids, "language", languages)["client"])
    return prompted.from_columns(
        tokenizer,
        source=source,
        max_length=max_length,
        template=template,
        answer="response",
        partition={"name": "natural_id", "column": "client", "seed": seed},
        keep={"language": languages},
        group="language",
        train=split,
        test=None,
        # Ids may be read as texts.
        unseen=np.flatnonzero(np.isin(ids.astype(str), np.array(list(unseen), str))).tolist() or 0,
        **{"aux": 0.0, "validation": 0.0, "test_fraction": 0.2, "test_limit": None} | division,
    )


def natural_instructions(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_length: int,
    tasks: Sequence[str] = (),
    clients: int = 10,
    largest: int = 100,
    split: str = "train+validation+test",
    template: str = "alpaca",
    seed: int = 42,
    **division: Any,
) -> Federation:
    """Natural Instructions (Wang et al., 2022, arXiv 2204.07705), one task a client, with the first reference alone.

    Args:
      source: folder or hub name, columns `task_name`, `definition`, `inputs`, `targets` and `id`.
      tasks: subsets of a folder with one for each task, all of them by default.
      clients: the first so many in the order of task numbers as texts, of
      largest: so many tasks with most rows, of equal ones the first by name.
      seed: of the order of rows.
    """
    columns = ("task_name", "definition", "inputs", "targets", "id")
    table = text_data.read_configs(source, tasks or _folders(source, split), split=split, columns=columns)
    # A further reference repeats the id; so do rows that several splits share. Tasks may count from 0 each.
    keys: dict[tuple, int] = {}
    for row, key in enumerate(zip(table["task_name"], table["id"], strict=True)):
        keys.setdefault(key, row)
    first = list(keys.values())
    table = {name: column[first] for name, column in table.items()}
    table["task"] = np.array([name.split("_")[0] for name in table["task_name"]], object)
    names, counts = np.unique(table["task"], return_counts=True)
    kept = np.sort(names[np.argsort(-counts, kind="stable")[:largest]])[:clients]
    if len(kept) < clients:
        raise ValueError(f"data.clients is {clients}, but {source} has {len(kept)} tasks")
    table = prompted.having(table, "task", kept)
    dealt = partitions.natural_id({"train": table}, column="task", seed=seed)
    form = instructions.template(template, tokenizer)
    inputs, targets = text_data.texts(table, ("inputs", "targets"))
    definitions = [text if isinstance(text, str) else text[0] for text in table["definition"]]
    questions = prompted.Questions(
        [form.prompt(*pair) for pair in zip(definitions, inputs, strict=True)],
        [(form.before + text,) for text in targets],
        begin=template != "chat",
    )
    groups = federated.groups(table, "task_name", dealt["train"])
    return prompted.federation(tokenizer, questions, dealt, groups, max_length=max_length, **division)


def _folders(source: str, split: str) -> list[str]:
    """Names of the folders in a folder; none where it has the splits itself."""
    path = epath.Path(source).expanduser()
    inside = sorted(path.iterdir()) if path.is_dir() else []
    own = any(one.name == "data" or one.name.startswith(tuple(split.split("+"))) for one in inside)
    return [] if own else [one.name for one in inside if one.is_dir()]


def snli(
    tokenizer: Tokenizer,
    *,
    source: str = "stanfordnlp/snli",
    max_length: int,
    clients: int = 10,
    alpha: float = 1.0,
    split: str = "train+validation+test",
    seed: int = 42,
    published_draws: bool = False,
    **division: Any,
) -> Federation:
    """SNLI as a choice among the answers Yes, Maybe and No, its classes spread over clients by Dirichlet(alpha).

    Args:
      source: file, folder or hub name, columns `premise`, `hypothesis` and `label`; rows without a label are left out.
      split: all splits together; clients hold rows out by themselves, as many as the published splits would.
      seed: of the partition.
      published_draws: draw it as the code of FedAMoLE does, see `partition.dirichlet`.
    """
    table = text_data.labelled(text_data.read(source, split=split, columns=("premise", "hypothesis", "label")))
    splits, _ = text_data.with_labels({split: table}, names=LABELS)
    table = splits[split]
    premises, hypotheses = text_data.texts(table, ("premise", "hypothesis"))
    drawn = {"clients": clients, "alpha": alpha, "seed": seed, "published": published_draws}
    dealt = partitions.dirichlet({"train": table}, **drawn)
    choices = instructions.INFERENCES
    questions = prompted.Questions(
        [instructions.infer(*pair) for pair in zip(premises, hypotheses, strict=True)],
        [(choices[label],) for label in table["label"]],
        choices,
    )
    share = 10_000 / 570_152
    own = {"validation": share, "test_fraction": share, "test_limit": 200} | division
    return prompted.federation(tokenizer, questions, dealt, ("all",) * clients, max_length=max_length, **own)

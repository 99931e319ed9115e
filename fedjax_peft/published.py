"""What Hugging Face calls our parameters, and which of its classes reads them.

Names and layouts are those of the models' own tables of weights, read backwards.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_peft import adapters as adapters_lib
from fedjax_peft.models import hf, tables
from fedjax_peft.types import PyTree


class Kind(NamedTuple):
    """What reads a model."""

    task_type: str  # as peft calls it
    suffix: str  # of the names of transformers' classes


KINDS = {
    "classifier": Kind("SEQ_CLS", "ForSequenceClassification"),
    "score": Kind("SEQ_CLS", "ForSequenceClassification"),
    "qa_outputs": Kind("QUESTION_ANS", "ForQuestionAnswering"),
}
"""By the head of the model."""
TEXTS = Kind("CAUSAL_LM", "ForCausalLM")
BARE = Kind("FEATURE_EXTRACTION", "Model")
"""An encoder whose classifier reads the mean over tokens, which no class of transformers does."""


class Target(NamedTuple):
    """Who reads what is exported, and how its names begin."""

    kind: Kind
    table: tables.Table
    prefix: str  # of the names of all modules but the head's
    head: str | None  # name of the head

    @property
    def beside(self) -> bool:
        """Whether the head is a file of its own."""
        return self.kind == BARE


def target(base: PyTree, model_type: str) -> Target:
    """Who reads a base of this `model_type`, told by its head."""
    head = next((name for name in KINDS if name in base), None)
    table = hf.FAMILIES[model_type].table
    prefix = next((prefix for prefix in table.prefixes if f"{model_type}.".endswith(prefix)), "")
    # Sequence classifiers of transformers have a dense layer before the last one, in the trunk or in the head.
    if head == "classifier" and "pooler" not in base and "dense" not in base[head]:
        return Target(BARE, table, "", head)
    return Target(KINDS.get(head, TEXTS), table, prefix, head)


def tensors(target: Target, tree: PyTree) -> dict[str, np.ndarray]:
    """Parameters of a base, or of a part of it, under their published names and in published layouts, float32."""
    found = {}
    for site in adapters_lib.sites(tree):
        for leaf, value in site.params.items():
            name, change = parameter(target.table, site.path, leaf)
            rows = value if adapters_lib.is_stacked(site.path) else [value]
            for module, row in zip(site.names, rows, strict=True):
                prefix = "" if is_head(module) else target.prefix
                found[f"{prefix}{module}.{name}"] = np.ascontiguousarray(change(np.asarray(row, np.float32)))
    return found


def parameter(table: tables.Table, path: tuple[str, ...], leaf: str) -> tuple[str, Callable]:
    """(`weight` or `bias`, change of layout) of a parameter: what the table reads it from.

    Args:
      table: of the family.
      path: of the module.
      leaf: `kernel`, `embedding`, `scale` or `bias`.
    """
    for name in ("weight", "bias"):
        short = "/".join((*path, name))
        pattern, place, change = next(rule for rule in table.rules if re.fullmatch(rule[0], short))
        if re.sub(pattern, place, short) == "/".join((*path, leaf)):
            return name, change
    raise ValueError(f"the table of weights has no name for {'.'.join((*path, leaf))}")


def is_head(name: str) -> bool:
    """Whether a module, by its dotted name, is the task head or a part of it."""
    return re.fullmatch(adapters_lib.HEAD, name) is not None


def endings(names: list[str], base: PyTree, prefix: str) -> list[str]:
    """Last parts of dotted names if they mean these modules and no others of the base, else full names."""
    ends = {name.rpartition(".")[2] for name in names}
    every = [name for site in adapters_lib.sites(base) for name in site.names]
    meant = {name for name in every if name.rpartition(".")[2] in ends}
    return sorted(ends) if meant == set(names) else [prefix + name for name in names]

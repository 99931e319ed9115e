"""What clients' models write to the prompts of their test examples, and what a task's `judge` says of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_peft.types import PyTree, Task


class Written(NamedTuple):
    """What the model of one client wrote."""

    rows: np.ndarray  # [n] positions of the examples in the test store
    answers: PyTree  # [n, ..]
    metrics: dict[str, float]  # what the task's `judge` says of them; none without examples


def by_client(task: Task, answered: Iterable[tuple[Any, PyTree]], clients: int) -> list[Written]:
    """What the clients in the first slots wrote, and how good it is.

    Args:
      answered: pairs of a pack of prompts, as in `evaluate.make_answers`, and its answers [I, B, ..].
      clients: number of slots.
    """
    answered = list(answered)
    if not answered:
        return [Written(np.zeros(0, np.int64), (), {})] * clients
    owners, rows, answers = joined(answered)
    found = []
    for slot in range(clients):
        own = rows[owners == slot], jax.tree.map(lambda leaf: leaf[owners == slot], answers)  # noqa: B023
        found.append(Written(*own, task.judge(*own) if len(own[0]) else {}))
    return found


def judged(task: Task, several: Sequence[Written]) -> dict[str, float]:
    """What the task's `judge` says of all that several clients wrote, as if one had written it; nothing of nothing."""
    known = [one for one in several if len(one.rows)]
    if not known:
        return {}
    answers = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(one.answers for one in known))
    return task.judge(np.concatenate([one.rows for one in known]), answers)


def columns(found: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """{name: [n]} of n mappings, NaN where one of them lacks the name."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: np.array([one.get(name, np.nan) for one in found], np.float64) for name in names}


def joined(said: Sequence[tuple[Any, PyTree]]) -> tuple[np.ndarray, np.ndarray, PyTree]:
    """(slots [n], rows [n], predictions [n, ..]) of the examples of all packs, without padding."""
    real = [item.weights > 0 for item, _ in said]

    def flat(*leaves):
        return np.concatenate([np.asarray(leaf)[own] for leaf, own in zip(leaves, real, strict=True)])

    slots = flat(*(np.broadcast_to(item.slots[:, None], item.weights.shape) for item, _ in said))
    return slots, flat(*(item.rows for item, _ in said)), jax.tree.map(flat, *(predicted for _, predicted in said))

"""Judges any algorithm from the adapters that it personalizes: one code for all, so that comparisons cannot drift."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_peft import population as populations
from fedjax_peft import processes, rounds, written
from fedjax_peft.types import Algorithm, Array, Model, PyTree, Task


class Scores(NamedTuple):
    """How each client of a group did."""

    ids: np.ndarray  # [n] int32
    examples: np.ndarray  # [n] test examples
    metrics: dict[str, np.ndarray]  # {name: [n]} what the task reports; NaN without examples
    means: dict[str, np.ndarray]  # {name: [n, ..]} over the client's test examples, which `metrics` comes from
    described: PyTree  # [n, ..] what `describe` says of each client's adapters; () without it
    texts: Sequence[written.Written] = ()  # [n] of each client, for a task that judges what is written


def make_evaluate(
    algorithm: Algorithm,
    model: Model,
    task: Task,
    mesh: Mesh,
    *,
    chunk: int,
    items: Callable[[np.ndarray], Iterable[Any]],
    describe: Callable[[PyTree], PyTree] = lambda adapters: (),
    answers: Callable[..., Iterable[tuple[Any, PyTree]]] = lambda *_: (),
) -> Callable[..., Scores]:
    """Builds the evaluation of a list of clients.

    Args:
      chunk: clients that a device personalizes at once.
      items: ids `[C]` -> packs of test batches: `inputs`, `labels`, `weights` `[I, B, ..]` and `slots` `[I]`, the
        position in ids whose client each batch belongs to; and, for a task that predicts, `rows` `[I, B]`, the
        examples' positions in their store.
      describe: adapters of one client -> arrays to be recorded.
      answers: see `make_answers`; for a task that judges what is written.

    Returns:
      (base, server, population, ids, support, round, root) -> Scores. `support` (ids `[C]`, padded with N) -> the
      batches that clients personalize on; no steps evaluates what they have. Every client's test examples count once.
    """
    personalize = rounds.make_personalize(algorithm, mesh, chunk)
    score = make_score(model, task)
    described = jax.jit(jax.vmap(describe))
    group = rounds.slots_for(1, mesh, chunk)

    def evaluate(base, server, population, ids, support, round_index, root):
        clients, mine = len(population.known), rounds.here(group)
        key = jax.random.fold_in(jax.random.fold_in(root, rounds.ANSWERS), round_index)
        judged = []
        for start in range(0, len(ids), group):
            own = ids[start : start + group]
            slots = np.concatenate([own, np.full(group - len(own), clients)]).astype(np.int32)
            here = slots[mine]
            adapters = personalize(
                base,
                server,
                *rounds.place(populations.gather(population, slots), mesh),
                rounds.place(support(here), mesh),
                rounds.place(here, mesh),
                round_index,
                root,
            )
            # Each process judges the clients in its own slots, on its own devices.
            adapters, real = rounds.local(adapters, mesh), int((here < clients).sum())
            mind = rounds.local(base, mesh), adapters
            part = _score_group(score, task, *mind, items(here), real)
            said = jax.tree.map(lambda leaf: np.asarray(leaf)[:real], described(adapters))  # noqa: B023
            texts = written.by_client(task, answers(*mind, here, key), real) if task.judge else []
            judged.append((real, part, said, texts))
        # Slots of one group over all processes, then those of the next.
        judged = [one for part in zip(*processes.gather(judged), strict=True) for one in part]
        known = [part for _, part, _, _ in judged if part is not None]
        if not known:
            raise ValueError(f"none of the {len(ids)} clients to evaluate has a test example")
        said = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(said for _, _, said, _ in judged))
        whole = [_nothing(known[0], real) if part is None else part for real, part, _, _ in judged]
        texts = [one for _, _, _, texts in judged for one in texts]
        examples, sums = jax.tree.map(lambda *leaves: np.concatenate(leaves), *whole)
        means = _means(sums, examples)
        told = means | written.columns([one.metrics for one in texts])
        reported = task.derived(told) if task.derived else told
        return Scores(np.asarray(ids, np.int32), examples, reported, means, said, texts)

    return evaluate


def make_score(model: Model, task: Task) -> Callable[..., tuple[Array, dict[str, Array], PyTree]]:
    """Builds what judges a pack of test batches.

    Returns:
      (base, adapters `[C, ..]`, inputs, labels, weights, slots) -> (examples `[C]`, sums of metrics `[C, ..]`,
      predictions `[I, B, ..]` of a task that has some).
    """

    def one_batch(base, adapters, slot, inputs, labels):
        own = jax.tree.map(lambda leaf: leaf[slot], adapters)
        outputs = model.apply(base, own, inputs)
        return task.metrics(outputs, labels), task.predict(outputs, labels) if task.predict else ()

    @jax.jit
    def score(base, adapters, inputs, labels, weights, slots):
        values, predictions = jax.vmap(one_batch, in_axes=(None, None, 0, 0, 0))(base, adapters, slots, inputs, labels)
        clients = jax.tree.leaves(adapters)[0].shape[0]

        def by_client(values):
            weight = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
            total = jnp.sum(jnp.where(weight > 0, values * weight, 0.0), axis=1)
            return jax.ops.segment_sum(total, slots, clients)

        return by_client(jnp.ones_like(weights)), jax.tree.map(by_client, values), predictions

    return score


def make_answers(
    generate: Callable[..., tuple[Array, Array]], items: Callable[[np.ndarray], Iterable[Any]]
) -> Callable[..., Iterable[tuple[Any, PyTree]]]:
    """Builds what answers the prompts of some clients.

    Args:
      generate: (base, adapters, inputs `[B, T]`, key) -> (tokens [B, P], lengths [B]) of one client.
      items: ids `[C]` -> packs of prompts, padded on the left, with the `rows` of their examples.

    Returns:
      (base, adapters `[C, ..]`, ids, key) -> pairs of a pack and its {`tokens` [I, B, P], `lengths` [I, B]}. A batch is
      given the key of its client and of its first example.
    """

    @jax.jit
    def side_by_side(base, adapters, inputs, slots, clients, rows, key):
        own = jax.tree.map(lambda leaf: leaf[slots], adapters)
        # Neither packs nor groups of clients may change what is drawn.
        fold = jax.vmap(lambda client, row: jax.random.fold_in(jax.random.fold_in(key, client), row))
        return jax.vmap(generate, in_axes=(None, 0, 0, 0))(base, own, inputs, fold(clients, rows))

    def answers(base, adapters, ids, key):
        for item in items(ids):
            # What fills a pack up has no prompt to answer.
            inputs = item.inputs | {"mask": item.inputs["mask"] & (item.weights > 0)[..., None]}
            own = np.asarray(ids)[item.slots], item.rows[:, 0].astype(np.int32)
            pack = rounds.spread((inputs, item.slots, *own), base)
            tokens, lengths = side_by_side(base, adapters, *pack, key)
            yield item, {"tokens": tokens, "lengths": lengths}

    return answers


def observe(
    algorithm: Algorithm,
    base: PyTree,
    ids: np.ndarray,
    *,
    padding: int,
    group: int,
    items: Callable[[np.ndarray], Iterable[Any]],
    constants: Callable[[np.ndarray], dict[str, PyTree]],
) -> dict[str, np.ndarray]:
    """What the algorithm wants to know of each client's training examples before any training.

    Args:
      ids: of clients.
      padding: N, the id of an empty slot.
      group: clients whose constants are on the device at once.
      items: ids `[group]`, padded with N -> packs of training batches, as in `make_evaluate`.
      constants: ids `[group]` -> what is known of the clients so far, `examples` among it.

    Returns:
      {name: [n, ..]}.
    """

    @jax.jit
    def look(base, inputs, weights, slots, known):
        own = jax.tree.map(lambda leaf: leaf[slots], known)
        return jax.vmap(algorithm.observe, in_axes=(None, 0, 0, 0))(base, inputs, weights, own)

    results = []
    for start in range(0, len(ids), group):
        own = ids[start : start + group]
        slots = np.concatenate([own, np.full(group - len(own), padding)]).astype(np.int32)
        known = constants(slots)
        parts: list[list[PyTree]] = [[] for _ in own]
        for item in items(slots):
            pack = rounds.spread((item.inputs, item.weights, item.slots), base)
            seen = jax.device_get(look(base, *pack, known))
            for place in np.flatnonzero(item.weights.any(axis=1)):
                parts[item.slots[place]].append(jax.tree.map(lambda leaf: leaf[place], seen))  # noqa: B023
        results += [algorithm.observed(parts[slot], int(known["examples"][slot])) for slot in range(len(own))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def pooled(scores: Scores, groups: Sequence[str], task: Task) -> list[dict[str, Any]]:
    """What the task reports of all test examples of a pool, and of those of each group, as if one client held them.

    Args:
      scores: of the clients of a pool.
      groups: [n] group of each of them.

    Returns:
      One mapping each with `group`, which is None for the whole pool, and the metrics; none without a `task.derived`,
      because averages of the whole follow from those of its parts.
    """
    held = scores.examples > 0
    if task.derived is None or not held.any():
        return []
    groups = np.asarray(groups, object)
    names = [None, *sorted(set(groups[held]))]
    members = [held if name is None else held & (groups == name) for name in names]
    means = {
        name: np.stack([np.average(values[own], axis=0, weights=scores.examples[own]) for own in members])
        for name, values in scores.means.items()
    }
    if scores.texts:
        parts = [[one for one, its in zip(scores.texts, own, strict=True) if its] for own in members]
        means |= written.columns([written.judged(task, part) for part in parts])
    reported = task.derived(means)
    return [
        {"group": name, **{metric: float(values[row]) for metric, values in reported.items()}}
        for row, name in enumerate(names)
    ]


def _score_group(score, task, base, adapters, items, real) -> tuple[np.ndarray, PyTree] | None:
    """(examples, sums) of the clients in the first `real` slots; None if none of them has a test example."""
    total, said = None, []
    for item in items:
        pack = rounds.spread((item.inputs, item.labels, item.weights, item.slots), base)
        *sums, predictions = score(base, adapters, *pack)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        if task.predict is not None:
            said.append((item, predictions))
    if total is None:
        return None
    examples, sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), total)
    if said:
        sums |= _scored(task, said, len(examples))
    return jax.tree.map(lambda leaf: leaf[:real], (examples, sums))


def _nothing(like, real) -> tuple[np.ndarray, PyTree]:
    """What `_score_group` would say of `real` clients without a test example."""
    return jax.tree.map(lambda leaf: np.zeros((real, *leaf.shape[1:]), leaf.dtype), like)


def _scored(task, said, slots) -> dict[str, np.ndarray]:
    """Sums `[C, ..]` of what the task's `score` says of all examples of some clients, predicted pack by pack."""
    owners, rows, predictions = written.joined(said)
    values = task.score(rows, predictions)

    def by_client(values):
        sums = np.zeros((slots, *values.shape[1:]))
        np.add.at(sums, owners, values)
        return sums

    return jax.tree.map(by_client, values)


def _means(sums, examples):
    def mean(values):
        own = examples.reshape(examples.shape + (1,) * (values.ndim - 1))
        return np.where(own > 0, values / np.maximum(own, 1), np.nan)

    return {name: mean(values) for name, values in sums.items()}

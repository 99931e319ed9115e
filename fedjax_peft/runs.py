"""What a run is told: what is trained, who takes part with which data, and how clients are evaluated when."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from fedjax_peft.types import Algorithm, Array, Batches, Model, PyTree, Task


class Strategy(NamedTuple):
    """What strategies.parquet says of each client and point, a row a site."""

    sites: tuple[str, ...]  # [J]
    describe: Callable[[PyTree], dict[str, Array]]  # adapters of one client -> {column: [J] or [J, ..]}
    averaged: tuple[str, ...] = ()  # columns whose mean over sites stands in clients.parquet as well


class Problem(NamedTuple):
    """What is trained, where."""

    mesh: Mesh
    algorithm: Algorithm
    model: Model
    task: Task
    base: PyTree  # on the mesh
    strategy: Strategy | None = None  # recorded of what clients personalize; None records nothing
    answers: Callable[..., Iterable] = lambda *_: ()  # `evaluate.make_answers`, if texts are judged


class Clients(NamedTuple):
    """Who takes part, and with which data. All functions are pure; ids are padded with N."""

    names: tuple[str, ...]  # [N]
    groups: tuple[str, ...]  # [N] language or task
    examples: np.ndarray  # [N] training examples
    majority: np.ndarray  # [N] accuracy of each client's most frequent training label
    pools: dict[str, np.ndarray]  # ids of the clients of each pool; rounds sample from `seen`
    sample: Callable[[int], np.ndarray]  # round -> ids of the cohort
    dropped: Callable[[int, np.ndarray], np.ndarray]  # (round, ids) -> [C] bool
    training: Callable[[int, np.ndarray], Batches]  # (round, ids) -> batches
    nothing: Callable[[np.ndarray], Batches]  # ids -> batches of no steps
    tests: Callable[[np.ndarray], Iterable[Any]]  # ids -> packs of test batches
    tokens: Callable[[Batches, int], tuple[int, int]]  # (batches, chunk) -> (tokens of examples, tokens computed)


class Point(NamedTuple):
    """One way of personalizing that clients are evaluated with after the last round."""

    algorithm: Algorithm
    support: Callable[[np.ndarray], Batches]  # ids -> batches to personalize on
    trained: bool = True  # whether it reads the run's server and clients; otherwise fresh ones of its own


class Evaluations(NamedTuple):
    """What is evaluated when; points in the end always are."""

    every: int | None  # rounds between two evaluations of the server's model; None: it is never evaluated
    base: bool = True  # whether the model before round 0 is
    end: bool = True  # whether the model after the last round is, beside the points
    points: bool = False  # whether points are on the way too, as if the run ended there; only those that are trained

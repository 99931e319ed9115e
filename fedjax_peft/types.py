"""The vocabulary of the library: what a model, a task and an algorithm are, and the arrays that pass between them.

Axis letters, used in every docstring:

    N clients of the population   C cohort slots   S local steps   B examples   T tokens
    D inputs of a site            F outputs        R rank          L layers     K classes

`adapters` is a nested dict that mirrors the module paths of the model and holds a callable pytree under the key
`delta` of each site. `base` is the nested dict of frozen parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

Array = jax.Array
PyTree = Any


class Model(NamedTuple):
    """A language model as two pure functions. `models/` makes them."""

    init: Callable[[Array], PyTree]
    """(key) -> base. Shapes without weights: `jax.eval_shape(model.init, key)`."""
    apply: Callable[..., PyTree]
    """(base, adapters, inputs, key=None) -> outputs. `inputs` holds `tokens` [B, T] int32, `mask` [B, T] bool and, for
    pairs of texts, `types` [B, T] int32. Outputs of a classifier are logits [B, K] float32, those of a causal model
    logits [B, T, V] float32 of the next token, or [B, P, V] if the inputs have `chosen` [B, P] int32, the tokens whose
    logits are wanted. Texts of a causal model fork where the inputs have `branch` [B, T] int32: tokens see those of
    branch 0, which come before, and of their own. Without a key there is no dropout."""
    taps: Callable[..., PyTree]
    """(base, adapters, inputs, key=None) -> (outputs, tree over sites). A Dense leaves the moments of its input, `mean`
    and `square`, both [.., B, T], averaged over features, and what its adapter's `tap` says, if it has one; a table
    that is also the head leaves those of the head's input."""
    init_cache: Callable[[int, int], PyTree] | None = None
    """(B, slots) -> an empty cache for texts of up to that many tokens, padding included. Causal models have one."""
    decode: Callable[..., tuple[PyTree, PyTree]] | None = None
    """(base, adapters, cache, inputs) -> (logits [B, T, V], cache): `apply` to T further tokens of each row. The cache
    does not know when it is full: the caller counts."""
    tied: tuple[str, ...] = ()
    """Path of the table of words whose rows are also the columns of the head; () where a head has its own or none."""


class Task(NamedTuple):
    """What is learnt and how it is judged, example by example, so that padding can be left out."""

    loss: Callable[[PyTree, PyTree], Array]
    """(outputs, labels) -> [B]."""
    metrics: Callable[[PyTree, PyTree], dict[str, Array]]
    """(outputs, labels) -> {name: [B, ..]}, to be averaged over examples."""
    predict: Callable[[PyTree, PyTree], PyTree] | None = None
    """(outputs, labels) -> [B, ..] each: what `score` wants to know of an example, if anything."""
    score: Callable[[np.ndarray, PyTree], dict[str, np.ndarray]] | None = None
    """(rows [n], predictions [n, ..]) -> {name: [n, ..]}: more metrics to be averaged, computed on the host from what
    `predict` said of all test examples of some clients at once; `rows` are their positions in the test store."""
    derived: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    """({name: [n, ..]} averages over the examples of n clients or pools, and what `judge` says of them) -> {name: [n]}:
    what is reported, the headline right after the loss, computed on the host. NaN stays NaN. Without it all of that is
    reported."""
    judge: Callable[[np.ndarray, PyTree], dict[str, float]] | None = None
    """(rows [n], answers [n, ..]) -> {name: value}: metrics of what was written to some test examples, those of one
    client or of a whole pool, computed on the host from all of them together: averages of parts need not give them."""


@struct.dataclass
class Batches:
    """Minibatches of one client, `[S, B, ..]`, or of a cohort, `[C, S, B, ..]`."""

    inputs: dict[str, Array]  # [.., S, B, T] each
    labels: PyTree  # [.., S, B] for a classifier
    weights: Array  # [.., S, B] float32: 1 for an example, 0 for padding; a step of zeros is skipped
    width: Array  # [.., S] int32: step s may be cut to widths[width[s]] tokens; clients side by side share the largest
    widths: tuple[int, ...] = struct.field(pytree_node=False, default=())  # ascending, T last
    constants: dict[str, PyTree] = struct.field(default_factory=dict)
    """What is known of the client and never changes, `[..]` without axes of steps: `examples` float32, the number of
    its training examples; `budget` int32, ranks a site, where personalization has one; and what an algorithm's
    `observe` needs to have seen."""


@struct.dataclass
class Cohort:
    """The clients of one round. A padding slot has id N, no examples and does not report."""

    ids: Array  # [C] int32
    examples: Array  # [C] float32: training examples that the client holds
    reported: Array  # [C] bool: finished the round with finite numbers, so its upload counts


class Algorithm(NamedTuple):
    """A federated method. The functions of one client never see a client axis; `rounds.py` batches them."""

    init: Callable[[Array], PyTree]
    """(key) -> server."""
    init_client: Callable[[PyTree, Array, Array], PyTree]
    """(server, id, key) -> client: the state of a client that has not taken part yet; `()` if clients keep nothing."""
    client_update: Callable[..., tuple[PyTree, PyTree, dict[str, Array]]]
    """(base, server, client, batches, key) -> (client, upload, metrics). Metrics are scalars, `loss` among them."""
    fold: Callable[[PyTree, Cohort], PyTree]
    """(uploads [C, ..], cohort) -> sums: an additive digest of uploads. A round adds it up over chunks and devices and
    so never holds all uploads at once. The uploads of slots that did not report are zeros."""
    server_update: Callable[[PyTree, PyTree], tuple[PyTree, dict[str, Array]]]
    """(server, sums) -> (server, metrics). A round in which nobody reported keeps the server as it was."""
    personalize: Callable[..., PyTree]
    """(base, server, client, batches, key) -> adapters that the client is evaluated with. Zero steps are legal."""
    traffic: Callable[[PyTree], tuple[int, int]]
    """(server) -> numbers of four bytes that one client receives and sends in a round, on the host; the most, where
    clients differ, and each says its own in the metrics `received` and `sent`."""
    observe: Callable[..., PyTree] | None = None
    """(base, inputs, weights [B], constants) -> what there is to know of one batch of a client's training examples
    before any training. With `observed` it becomes a constant of the client, computed once a run."""
    observed: Callable[[Sequence[PyTree], int], dict[str, PyTree]] | None = None
    """(what `observe` said of each batch of one client, its number of examples; on the host) -> constants."""
    shared: Callable[[PyTree], PyTree] | None = None
    """(server) -> adapters to merge into the base that a further stage starts from."""
    part: Callable[[PyTree], PyTree] | None = None
    """(client) -> adapters that belong to this client's own base in a further stage; None if bases do not differ."""
    host_step: Callable[[PyTree], PyTree] | None = None
    """(server) -> server, on the host before the first round and after each."""
    aux: str | None = None
    """The setting by which clients need `constants["aux"]`, examples held out of their training; None: they do not."""
    budgets: bool = False
    """Whether `personalize` reads `constants["budget"]`: a config that gives budgets to another method is refused."""

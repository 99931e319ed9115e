"""What `fedjax-peft bench` measures: one round of FedIT on random texts, and the least work that it takes.

The least work of a frozen base is 4 FLOPs per weight and token, 2 forward and 2 backward, since it needs no weight
gradients; `minimum_flops` adds attention and the adapters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import adapters, local, rounds, tasks
from fedjax_peft.algorithms import fedavg
from fedjax_peft.data import batches as batching
from fedjax_peft.data import federated
from fedjax_peft.models import hf
from fedjax_peft.types import Batches, Cohort, PyTree

CLASSES = 16
ALPHA, LEARNING_RATE, TARGETS = 16.0, 1e-3, "query,value"
LENGTHS = ("full", "natural")
MEDIAN, SPREAD, SHORTEST = 22, 0.45, 5
"""Natural lengths are log-normal around so many tokens, as in the quickstart's dialogues."""


class Setting(NamedTuple):
    """What is measured: one row of the table."""

    model: str  # as `models.hf.load` takes it
    clients: int
    batch: int
    steps: int
    tokens: int  # of the longest text
    lengths: str  # one of LENGTHS
    chunk: int
    rank: int
    scan: bool
    dtype: str


class Job(NamedTuple):
    """A round that is ready to run: `step(base, server(), *arguments, round, root key)`."""

    config: dict[str, Any]  # the model's config.json
    base: PyTree
    server: Callable[[], PyTree]  # () -> the initial server; a round donates it, so each needs a new one
    arguments: tuple  # on the device: states, fresh, batches, cohort; clients are stateless, so all can be used again
    batches: Batches  # [C, S, B, ..] on the host
    step: Callable


def make_job(setting: Setting) -> Job:
    """Loads the model and prepares one round on one device.

    Raises:
      ValueError: a model that cannot be loaded, or a chunk that does not divide the clients.
    """
    if setting.clients % setting.chunk:
        raise ValueError(f"chunk is {setting.chunk}, which does not divide the {setting.clients} clients")
    key, mesh = jax.random.key(0), rounds.make_mesh(clients=1)
    # The pooler, because it is what Hugging Face's own classifiers have.
    keywords = {"labels": CLASSES, "pool": "pooler", "dtype": jnp.dtype(setting.dtype), "scan": setting.scan}
    loaded = hf.load(setting.model, key=key, **keywords)
    base = rounds.shard_base(loaded.base, mesh)
    shapes = jax.eval_shape(lambda: base)

    def init_adapters(key):
        return adapters.init(key, shapes, rank=setting.rank, alpha=ALPHA, targets=TARGETS)

    optimizer = local.make_optimizer(learning_rate=LEARNING_RATE)
    algorithm = fedavg.fedit(loaded.model, tasks.classification(), init_adapters, optimizer)
    data = make_batches(setting, loaded.config["vocab_size"])
    everybody = np.ones(setting.clients, bool)
    cohort = Cohort(np.arange(setting.clients, dtype=np.int32), everybody.astype(np.float32), everybody)
    server = rounds.make_init(algorithm, mesh)(key)
    states = rounds.client_states(algorithm, server)
    if jax.tree.leaves(states):
        raise AssertionError("the round would donate the states of its clients")
    return Job(
        config=loaded.config,
        base=base,
        server=lambda: jax.tree.map(jnp.copy, server),
        arguments=rounds.place((states, everybody, data, cohort), mesh),
        batches=data,
        step=rounds.make_round(algorithm, mesh, setting.chunk),
    )


def make_batches(setting: Setting, vocabulary: int) -> Batches:
    """Random texts and labels [C, S, B, T], all as long as possible or of natural lengths in up to four widths."""
    if setting.lengths not in LENGTHS:
        raise ValueError(f"lengths is {setting.lengths!r}, expected one of {', '.join(LENGTHS)}")
    rng = np.random.default_rng(0)
    count = setting.clients * setting.steps * setting.batch
    lengths = np.full(count, setting.tokens)
    if setting.lengths == "natural":
        drawn = np.exp(rng.normal(np.log(MEDIAN), SPREAD, count))
        lengths = np.clip(np.round(drawn), SHORTEST, setting.tokens).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # Padding is 0 everywhere, and low ids are special tokens.
    tokens = rng.integers(vocabulary // 2, vocabulary, offsets[-1])
    clients = np.split(np.arange(count), setting.clients)
    labels = rng.integers(0, CLASSES, count)
    store = federated.build(federated.Encoded(tokens, None, offsets), labels, clients, classes=CLASSES)
    widths = federated.widths_for(store, setting.tokens, count=4)
    keywords = {"steps": setting.steps, "batch": setting.batch, "widths": widths, "group_by_length": True}
    return batching.cohort(store, np.arange(setting.clients), seed=0, round=0, **keywords)


def minimum_flops(base: PyTree, trained: PyTree, data: Batches) -> float:
    """The least FLOPs of a round on the texts of `data`, padding left out.

    A matrix [D, F] of the base costs 4 D F per token, the two of a LoRA 6 R (D + F), a dense update 6 D F; what is not
    in a layer (pooler, head) counts once per text. The two products of attention cost 12 D per layer and pair of
    tokens. Embeddings, norms, activations and optimizers are no matrix products.
    """
    real = data.weights > 0
    lengths = np.sum(data.inputs["mask"] & real[..., None], axis=-1, dtype=np.float64)

    def places(path):
        return float(np.sum(lengths) if any(part in adapters.STACKS for part in path) else np.sum(real))

    total = 0.0
    for site in adapters.sites(base):
        if site.is_dense:
            total += 4.0 * site.params["kernel"].size * places(site.path)
        if site.path[-1] == "query":
            layers, _, width = site.params["kernel"].shape
            total += 12.0 * layers * width * float(np.sum(lengths**2))
    for path, node in adapters.nodes(trained).items():
        matrices = [node.a, node.b] if isinstance(node, adapters.LoRA) else [node.kernel]
        total += 6.0 * sum(matrix.size for matrix in matrices) * places(path)
    return total


def flops_over_minimum(setting: Setting) -> float:
    """FLOPs that the compiler counts for one step of one chunk over the least, on texts of full length.

    A loop's body is counted once however often it runs, so the counted program has none: one step, one chunk, unrolled
    layers.
    """
    job = make_job(setting._replace(clients=setting.chunk, steps=1, lengths="full", scan=False))
    compiled = job.step.lower(job.base, job.server(), *job.arguments, 0, jax.random.key(0)).compile()
    return compiled.cost_analysis()["flops"] / minimum_flops(job.base, job.server().adapters, job.batches)


def named_weights(base: PyTree, trained: PyTree) -> dict[str, np.ndarray]:
    """Base and initial LoRAs by Hugging Face's names and in torch's layout, float32.

    The LoRA at a site `x` is `x.lora_A.weight` [R, D] and `x.lora_B.weight` [F, R]. Dense updates start at zero and are
    left out.
    """
    named, sites = {}, adapters.sites(base)

    def add(site, leaf, value):
        value = np.asarray(value, np.float32)
        if leaf in ("kernel", "a", "b"):
            value = value.swapaxes(-1, -2)
        ending = {"bias": "bias", "a": "lora_A.weight", "b": "lora_B.weight"}.get(leaf, "weight")
        stacked = any(part in adapters.STACKS for part in site.path)
        for name, part in zip(site.names, value if stacked else [value], strict=True):
            named[f"{name}.{ending}"] = np.ascontiguousarray(part)

    nodes = adapters.nodes(trained)
    for site in sites:
        for leaf, value in site.params.items():
            add(site, leaf, value)
        if isinstance(node := nodes.get(site.path), adapters.LoRA):
            add(site, "a", node.a)
            add(site, "b", node.b)
    return named

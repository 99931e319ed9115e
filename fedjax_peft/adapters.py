"""What clients train: callable pytrees that sit at the sites of a model.

A site is a module of the base that owns parameters: Dense (`kernel`), Embed (`embedding`) or LayerNorm (`scale`). An
adapter is called with the site's input and returns what the site adds to its output. Sites of a layer stack carry a
leading axis `[L]`; a client axis in front is just one more batch axis. Names of sites are those of Hugging Face, so the
target lists of published configurations carry over: `encoder.layer.3.attention.self.query`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from fedjax_peft import trees
from fedjax_peft.types import Array, Model, PyTree

STACKS = ("layer", "layers", "h")  # modules whose parameters carry a leading layer axis
HEAD = r"(.*\.)?(classifier|qa_outputs|score)(\..*)?"
ALL_LINEAR = r"(?!(.*\.)?lm_head$).*"  # as in peft, where the output layer is none of them


@struct.dataclass
class LoRA:
    """Low-rank update of a Dense: x -> x A diag(scale) B. Hu et al., LoRA, arXiv 2106.09685."""

    a: Array  # [.., D, R]
    b: Array  # [.., R, F]
    scale: Array  # [.., R] alpha / r times the rank mask
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        x = dropped(x, self.dropout, key)
        b = self.scale[..., None] * self.b
        # One axis of rows: beside a client axis the gradients of A and B are then plain batched products. For two axes
        # the compiler transposes copies first, which costs a CPU 6 % of a round.
        rows = x.reshape(-1, x.shape[-1])
        return ((rows @ self.a.astype(x.dtype)) @ b.astype(x.dtype)).reshape(*x.shape[:-1], -1)

    def merged(self, params: dict) -> dict:
        return _added(params, kernel=(self.a * self.scale[..., None, :]) @ self.b)


@struct.dataclass
class Full:
    """Dense update of a Dense: every weight is trained."""

    kernel: Array  # [.., D, F]
    bias: Array | None  # [.., F]

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        y = x @ self.kernel.astype(x.dtype)
        return y if self.bias is None else y + _along_last(self.bias, y)

    def merged(self, params: dict) -> dict:
        return _added(params, kernel=self.kernel, bias=self.bias)


@struct.dataclass
class Table:
    """Dense update of an Embed."""

    embedding: Array  # [V, D]

    def __call__(self, ids: Array, key: Array | None = None) -> Array:
        return self.embedding[ids]

    def merged(self, params: dict) -> dict:
        return _added(params, embedding=self.embedding)


@struct.dataclass
class Affine:
    """Dense update of a LayerNorm; called with the normalised input."""

    gain: Array  # [.., D]
    shift: Array | None  # [.., D]

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        y = x * _along_last(self.gain, x)
        return y if self.shift is None else y + _along_last(self.shift, y)

    def merged(self, params: dict) -> dict:
        return _added(params, scale=self.gain, bias=self.shift)


@struct.dataclass
class Beside:
    """What a trained adapter adds at a site beside a frozen one, which has no dropout."""

    frozen: PyTree
    trained: PyTree  # None at sites, such as the head, where there is none

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        y = self.frozen(x)
        return y if self.trained is None else y + self.trained(x, key)

    def merged(self, params: dict) -> dict:
        params = self.frozen.merged(params)
        return params if self.trained is None else self.trained.merged(params)


class Site(NamedTuple):
    """One module that an adapter can sit at."""

    path: tuple[str, ...]
    names: tuple[str, ...]  # dotted Hugging Face names, one a layer
    params: dict  # shapes of the module's own parameters

    @property
    def is_dense(self) -> bool:
        return "kernel" in self.params


def dropped(x: Array, rate: float, key: Array | None) -> Array:
    """Dropout of an adapter's input [.., T, D]; none without a key."""
    if not rate or key is None:
        return x
    # Tokens lead in the draw: a batch cut to fewer of them drops the same, whoever shares a chunk and a width.
    *leading, tokens, inputs = x.shape
    kept = jax.random.bernoulli(key, 1 - rate, (tokens, *leading, inputs))
    return jnp.where(jnp.moveaxis(kept, 0, -2), x / (1 - rate), jnp.zeros((), x.dtype))


def sites(shapes: PyTree) -> list[Site]:
    """All sites of a base, given its parameters or their shapes."""
    modules: dict[tuple[str, ...], dict] = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        modules.setdefault(path[:-1], {})[path[-1]] = leaf
    layers = {path: next(iter(params.values())).shape[0] for path, params in modules.items()}
    return [Site(path, names(path, layers[path]), params) for path, params in sorted(modules.items())]


def init(
    key: Array,
    shapes: PyTree,
    *,
    kind: str = "lora",
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "query,value",
    head: str = "full",
    dropout: float = 0.0,
    rank_stabilized: bool = False,
) -> PyTree:
    """Adapters that leave the base as it is: A ~ U(-1/sqrt D, 1/sqrt D), B = 0, dense updates 0.

    Args:
      key: consumed.
      shapes: the base or its shapes.
      kind: `lora`, or `full` for a dense update of every parameter of the base, whatever rank, targets and head say.
      rank: R, from 1 to the smaller side of each targeted site; a head may have fewer classes than that.
      alpha: LoRA's numerator: scale = alpha / rank, or alpha / sqrt(rank) if `rank_stabilized`.
      targets: `all-linear`, a comma list of name endings (`query,value`), or a regular expression for whole names.
      head: the task head's sites are trained densely (`full`), are sites like others (`lora`), or stay `frozen`.
      dropout: probability with which an input of A is dropped in training.

    Raises:
      ValueError: for a target that matches nothing, or a rank that does not fit.
    """
    if kind not in ("lora", "full"):
        raise ValueError(f"adapter.kind is {kind!r}, expected 'lora' or 'full'")
    if head not in ("full", "lora", "frozen"):
        raise ValueError(f"adapter.head is {head!r}, expected 'full', 'lora' or 'frozen'")
    if kind == "full":
        return nest({site.path: _dense(site) for site in sites(shapes)})
    if not 0 <= dropout < 1:
        raise ValueError(f"adapter.dropout is {dropout}, expected at least 0 and below 1")
    dense = [site for site in sites(shapes) if site.is_dense]
    heads = [site for site in dense if re.fullmatch(HEAD, site.names[0])] if head != "lora" else []
    body = [site for site in dense if site not in heads]
    masks = _match(targets, body)
    scale = alpha / rank**0.5 if rank_stabilized else alpha / max(rank, 1)
    nodes = {site.path: _dense(site) for site in heads if head == "full"}
    for index, site in enumerate(body):
        if any(masks[site.path]):
            nodes[site.path] = _lora(jax.random.fold_in(key, index), site, rank, scale, masks[site.path], dropout)
    return nest(nodes)


def nest(flat: dict[tuple[str, ...], PyTree]) -> PyTree:
    """The inverse of `nodes`."""
    return traverse_util.unflatten_dict({(*path, "delta"): node for path, node in flat.items()})


def is_stacked(path: tuple[str, ...]) -> bool:
    """Whether the parameters at a path carry a leading axis of layers."""
    return any(part in STACKS for part in path)


def names(path: tuple[str, ...], layers: int | None) -> tuple[str, ...]:
    """The dotted Hugging Face names of a module, one a layer of its stack."""
    if not is_stacked(path):
        return (".".join(path),)
    cut = next(position for position, part in enumerate(path) if part in STACKS) + 1
    return tuple(".".join((*path[:cut], str(layer), *path[cut:])) for layer in range(layers))


def check_sites(adapters: PyTree, shapes: PyTree) -> None:
    """Raises ValueError with the names of adapters at paths that no module reads: `apply` would ignore them."""
    known = {site.path for site in sites(shapes)}
    lost = [".".join(path) for path in nodes(adapters) if path not in known]
    if lost:
        raise ValueError(f"no module of the model reads the adapters at {', '.join(lost)}")


def nodes(adapters: PyTree) -> dict[tuple[str, ...], PyTree]:
    """{path of the site: adapter}."""
    return {path[:-1]: node for path, node in traverse_util.flatten_dict(adapters).items()}


def beside(frozen: PyTree, trained: PyTree) -> PyTree:
    """Trained adapters next to frozen ones: what both add, with the dropout of the trained ones alone."""
    own = nodes(trained)
    return nest(own | {path: Beside(node, own.get(path)) for path, node in nodes(frozen).items()})


def merge(base: PyTree, adapters: PyTree) -> PyTree:
    """The base with every adapter added into its weights."""
    flat = traverse_util.flatten_dict(base)
    for path, node in nodes(adapters).items():
        own = {key[-1]: leaf for key, leaf in flat.items() if key[:-1] == path}
        flat |= {(*path, name): leaf for name, leaf in node.merged(own).items()}
    return traverse_util.unflatten_dict(flat)


def merged(model: Model) -> Model:
    """The model with adapters added into the weights before each call.

    Cheaper than calling dense updates beside the base once every parameter is trained.
    """

    def apply(base, adapters, inputs, key=None):
        return model.apply(merge(base, adapters), {}, inputs, key)

    return model._replace(apply=apply)


def concat(first: PyTree, second: PyTree) -> PyTree:
    """Adapters that do what both do: ranks of LoRAs at the same site are joined, dense updates are added.

    Dropout is that of the first, see `beside`.
    """
    left, right = nodes(first), nodes(second)
    both = {path: _joined(left[path], right[path]) for path in left.keys() & right.keys()}
    return nest(left | right | both)


def is_trained(leaf: str) -> bool:
    """Whether clients train and send leaves of this name: all but scales, which hold alpha / r and masks."""
    return leaf != "scale"


def trained(adapters: PyTree) -> PyTree:
    """What clients train, None in place of the rest; `trees.join` with `fixed` is the whole again."""
    return trees.select(adapters, is_trained)


def fixed(adapters: PyTree) -> PyTree:
    """What training leaves as it is, None in place of what it moves."""
    return trees.select(adapters, lambda leaf: not is_trained(leaf))


def count(adapters: PyTree, keep: Callable[[str], bool] = is_trained) -> int:
    """Parameters that are trained or sent; ranks that a mask removes do not count.

    `keep` says of a leaf's name (`a`, `b`, `scale`, `kernel` ..) whether it counts. Shapes of adapters count in full.
    """
    total = 0
    for node in nodes(adapters).values():
        masked = isinstance(node, LoRA) and not isinstance(node.scale, jax.ShapeDtypeStruct)
        share = np.count_nonzero(node.scale) / node.scale.size if masked else 1.0
        leaves = jax.tree.leaves(trees.select(node, keep))
        total += sum(round(share * leaf.size) for leaf in leaves)
    return total


def _match(targets: str, candidates: list[Site]) -> dict[tuple[str, ...], np.ndarray]:
    """{path: [L] bool, the layers that the targets name}."""
    if targets == "all-linear":
        patterns = [ALL_LINEAR]
    elif re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", targets):
        patterns = [r"(.*\.)?" + re.escape(ending.strip()) for ending in targets.split(",")]
    else:
        patterns = [targets]
    hits = {site.path: np.zeros(len(site.names), bool) for site in candidates}
    for pattern, word in zip(patterns, targets.split(",") if len(patterns) > 1 else [targets], strict=True):
        try:
            found = [[bool(re.fullmatch(pattern, name)) for name in site.names] for site in candidates]
        except re.error as error:
            raise ValueError(f"adapter.targets {word!r} is no regular expression: {error}") from None
        if not any(map(any, found)):
            some = ", ".join(sorted({site.names[0] for site in candidates})[:12])
            raise ValueError(f"adapter.targets {word.strip()!r} matches no site of the model; sites are {some}")
        for site, mask in zip(candidates, found, strict=True):
            hits[site.path] |= np.asarray(mask)
    return hits


def _lora(key, site, rank, scale, mask, dropout) -> LoRA:
    *layers, inputs, outputs = site.params["kernel"].shape
    # FedP2EFT has ranks of 32 on a head of three classes; elsewhere so many ranks are a slip.
    most = inputs if re.fullmatch(HEAD, site.names[0]) else min(inputs, outputs)
    if not 1 <= rank <= most:
        raise ValueError(f"adapter.rank is {rank}, expected 1 to {most} at {site.names[0]} ({inputs} x {outputs})")
    bound = inputs**-0.5
    active = jnp.asarray(mask.reshape(*layers, 1), jnp.float32)
    return LoRA(
        a=jax.random.uniform(key, (*layers, inputs, rank), jnp.float32, -bound, bound) * active[..., None],
        b=jnp.zeros((*layers, rank, outputs), jnp.float32),
        scale=jnp.full((*layers, rank), scale, jnp.float32) * active,
        dropout=dropout,
    )


def _dense(site: Site) -> PyTree:
    zeros = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in site.params.items()}
    if "kernel" in zeros:
        return Full(zeros["kernel"], zeros.get("bias"))
    if "embedding" in zeros:
        return Table(zeros["embedding"])
    return Affine(zeros["scale"], zeros.get("bias"))


def _joined(left, right):
    if isinstance(left, LoRA) and isinstance(right, LoRA):
        return left.replace(
            a=jnp.concatenate([left.a, right.a], -1),
            b=jnp.concatenate([left.b, right.b], -2),
            scale=jnp.concatenate([left.scale, right.scale], -1),
        )
    return trees.add(left, right)


def _added(params, **updates):
    added = {name: params[name] + update for name, update in updates.items() if update is not None}
    return params | {name: value.astype(params[name].dtype) for name, value in added.items()}


def _along_last(vector, like):
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))

"""The experts of FedAMoLE's server: how banks begin, what of an upload belongs to experts, how they move and travel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import mixture, ranks, trees
from fedjax_peft.algorithms.expert_embeddings import Embeddings
from fedjax_peft.mixture import Mixture
from fedjax_peft.types import Array, PyTree

EXPERTS = 2**31 - 1  # folded into keys of what FedIT does not draw, larger than any site
OF_HOLDERS = ("a", "b", "rows")  # leaves of a mixture that belong to its experts


def made(
    key: Array,
    init_adapters: Callable[[Array], PyTree],
    layout: ranks.Layout,
    *,
    experts: int,
    shared_expert: bool,
    linear: bool,
    top_k: int,
) -> PyTree:
    """The adapters of the server: what FedIT would start from as shared experts, and experts drawn likewise."""
    nodes = adapters_lib.nodes(init_adapters(key))
    keys = jax.random.split(jax.random.fold_in(key, EXPERTS), 1 + experts * (2 if linear else 1))
    draws = adapters_lib.nodes(jax.lax.map(init_adapters, keys))
    for path in layout.paths:
        bank = mixture.bank(nodes[path], draws[path].a, experts, top_k=top_k, linear=linear)
        nodes[path] = bank if shared_expert else bank.replace(shared=None)
    return adapters_lib.nest(nodes)


def parted(adapters: PyTree) -> tuple[PyTree, PyTree]:
    """(what clients train, what is fixed or the server's)."""
    return trees.select(adapters, _is_trained), trees.select(adapters, lambda leaf: not _is_trained(leaf))


def of_holders(change: PyTree, embeddings: Embeddings | tuple[()]) -> dict[tuple[str, ...], dict[str, Array]]:
    """What belongs to experts: changes of their leaves, and embeddings."""
    found = {}
    for path, node in adapters_lib.nodes(change).items():
        if isinstance(node, Mixture):
            leaves = {name: getattr(node, name) for name in OF_HOLDERS}
            found[path] = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    if embeddings:
        for path, keys in adapters_lib.nodes(embeddings.experts).items():
            found[path] |= {"keys": keys} if keys is not None else {}
    return found


def common(change: PyTree) -> PyTree:
    """The rest of a change: what all clients hold."""
    none = dict.fromkeys(OF_HOLDERS)
    nodes = adapters_lib.nodes(change).items()
    return adapters_lib.nest({path: x.replace(**none) if isinstance(x, Mixture) else x for path, x in nodes})


def moved(adapters: PyTree, change: PyTree, means: dict) -> PyTree:
    """The server's adapters after mean changes: of what all hold, and {path: {leaf: [.., E, ..]}} of experts."""
    nodes = adapters_lib.nodes(change)
    for path, leaves in means.items():
        nodes[path] = nodes[path].replace(**{leaf: value for leaf, value in leaves.items() if leaf in OF_HOLDERS})
    trained, fixed = parted(adapters)
    # Sums over clients are float32, whatever the adapters are.
    new = jax.tree.map(lambda old, mean: (old + mean).astype(old.dtype), trained, adapters_lib.nest(nodes))
    return trees.join(new, fixed)


def traffic(adapters: PyTree, layout: ranks.Layout, held: float, embeds: bool) -> tuple[int, int]:
    """Down and up of a client with as many experts as clients hold on average, in numbers of four bytes."""
    nodes = adapters_lib.nodes(adapters)
    heads = {path: node for path, node in nodes.items() if path not in layout.paths}
    down, more = adapters_lib.count(adapters_lib.nest(heads)), 0.0
    for path in layout.paths:
        node, own = nodes[path], mixture.sizes(nodes[path])
        # Layers of a stack without an adapter travel with nobody.
        layers = sum(name in layout.names for name in adapters_lib.names(path, node.held.size // node.held.shape[-1]))
        down += layers * (held * own.expert + own.common)
        more += layers * own.query * (1 + held * (node.router is not None))
    # Ids of experts are such numbers; of parameters in bfloat16 two make one.
    ids, share = held * layout.sites, jnp.dtype(node.a.dtype).itemsize / 4
    return round(ids + share * down), round(ids + share * (down + more * embeds))


def _is_trained(leaf: str) -> bool:
    return leaf not in ("scale", "held", "ids")

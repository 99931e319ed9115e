"""Ranks of LoRA adapters as rows of one table: scored, chosen under a budget, counted.

    J sites with a LoRA, a layer of a stack counting by itself   R ranks of each

Scores are `[J, R]`. Sites stand in the order in which a text passes them: by layer, then by name; what lies behind the
stacks comes last.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import trees
from fedjax_peft.types import Array, PyTree


class Layout(NamedTuple):
    """Which row of `[J, R]` belongs to which LoRA."""

    names: tuple[str, ...]  # [J] dotted names of the sites
    rank: int  # R
    paths: tuple[tuple[str, ...], ...]  # of the LoRAs
    shapes: tuple[tuple[int, ...], ...]  # of their scales, [.., R]
    order: np.ndarray  # [J] rows of all LoRAs' scales, one below the other
    widths: np.ndarray  # [J] outputs F

    @property
    def sites(self) -> int:
        return len(self.names)


def layout(adapters: PyTree) -> Layout:
    """The layout of concrete adapters; layers that the targets leave out, whose scale is 0, have no row.

    Raises:
      ValueError: there is no LoRA.
    """
    loras = {path: node for path, node in adapters_lib.nodes(adapters).items() if isinstance(node, adapters_lib.LoRA)}
    if not loras:
        raise ValueError("ranks need LoRA adapters: adapter.kind 'lora' and targets that name a site")
    rows = []
    for path, node in sorted(loras.items()):
        active = np.asarray(node.scale).any(axis=-1).reshape(-1)
        names = adapters_lib.names(path, len(active) if node.scale.ndim > 1 else None)
        for layer, name in enumerate(names):
            rows.append((not adapters_lib.is_stacked(path), layer, path, name, node.b.shape[-1], active[layer]))
    order = sorted((row[:3], index) for index, row in enumerate(rows) if row[-1])
    chosen = [index for _, index in order]
    paths = tuple(sorted(loras))
    return Layout(
        names=tuple(rows[index][3] for index in chosen),
        rank=loras[paths[0]].scale.shape[-1],
        paths=paths,
        shapes=tuple(loras[path].scale.shape for path in paths),
        order=np.array(chosen),
        widths=np.array([rows[index][4] for index in chosen]),
    )


def concrete(init_adapters: Callable[[Array], PyTree]) -> PyTree:
    """The adapters that `init_adapters` makes, of which only the scales are computed; all else are shapes."""

    def scales():
        return adapters_lib.fixed(init_adapters(jax.random.key(0)))

    shapes = jax.eval_shape(init_adapters, jax.random.key(0))
    return trees.join(jax.jit(scales)(), adapters_lib.trained(shapes))


def table(layout: Layout, adapters: PyTree) -> Array:
    """The scales of all LoRAs as one table `[J, R]`, 0 at sites that have an adapter of another kind.

    Ranks that `adapters.concat` put before these do not count.
    """
    nodes = adapters_lib.nodes(adapters)

    def scale(path, shape):
        node = nodes.get(path)
        own = node.scale[..., -layout.rank :] if isinstance(node, adapters_lib.LoRA) else jnp.zeros(shape, jnp.float32)
        return own.reshape(-1, layout.rank)

    return jnp.concatenate([scale(*one) for one in zip(layout.paths, layout.shapes, strict=True)])[layout.order]


def by_site(layout: Layout, rows: Array, empty: float) -> dict[tuple[str, ...], Array]:
    """Rows of a table [J, ..] where they belong: {path: [.., ..]}; layers without an adapter have `empty`."""
    sizes = [int(np.prod(shape[:-1])) for shape in layout.shapes]
    flat = jnp.full((sum(sizes), *rows.shape[1:]), empty, rows.dtype).at[layout.order].set(rows)
    starts = np.cumsum([0, *sizes])
    return {
        path: flat[start : start + size].reshape(*shape[:-1], *rows.shape[1:])
        for path, shape, start, size in zip(layout.paths, layout.shapes, starts, sizes, strict=False)
    }


def scaled(layout: Layout, adapters: PyTree, scores: Array) -> PyTree:
    """The adapters with their scales multiplied by `[J, R]` scores."""
    flat = adapters_lib.nodes(adapters)
    for path, own in by_site(layout, scores, 0.0).items():
        flat[path] = flat[path].replace(scale=flat[path].scale * own)
    return adapters_lib.nest(flat)


def magnitudes(layout: Layout, adapters: PyTree) -> Array:
    """[J, R] sum over outputs of |B|, how much of each rank is in use."""
    nodes = adapters_lib.nodes(adapters)
    sums = [jnp.sum(jnp.abs(nodes[path].b), -1).reshape(-1, layout.rank) for path in layout.paths]
    return jnp.concatenate(sums)[layout.order]


def top(scores: Array, count: Array | int) -> Array:
    """The `count` largest of all scores `[J, R]` as a mask of 0 and 1; equal scores go to the lower index.

    `count` may be traced, so one compiled program serves all budgets. Masks of smaller counts are parts of larger ones.
    """
    flat = scores.reshape(-1)
    order = jnp.argsort(-flat, stable=True)
    place = jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    return (place < count).astype(jnp.float32).reshape(scores.shape)


def first(shape: tuple[int, int], budget: Array | int) -> Array:
    """The first `budget` ranks of every site, as a mask `[J, R]`: LoRA of a uniform rank."""
    return jnp.broadcast_to(jnp.arange(shape[1]) < budget, shape).astype(jnp.float32)


def strategy(layout: Layout, adapters: PyTree) -> dict[str, Array]:
    """What a client keeps at each site: `ranks` [J], how many have a scale that is not 0, and `scale` [J], its mean."""
    scales = table(layout, adapters)
    kept = jnp.sum(scales != 0, axis=-1, dtype=jnp.int32)
    return {"ranks": kept, "scale": jnp.sum(scales, axis=-1) / jnp.maximum(kept, 1)}


def check_budgets(budgets: tuple[int, ...], rank: int, prefix: str = "") -> None:
    """Raises ValueError for a budget that ranks of `rank` a site cannot fill; `prefix` says whose it is."""
    for budget in budgets:
        if not isinstance(budget, int) or not 1 <= budget <= rank:
            said = f"{prefix}a budget is {budget!r} ranks a site"
            raise ValueError(f"{said}, expected 1 to adapter.rank, which is {rank}")


@jax.custom_jvp
def clamp(x: Array, low: float, high: float) -> Array:
    """`x` held within [low, high]; its gradient passes as if it were not, outside of the bounds too."""
    return jnp.clip(x, low, high)


@clamp.defjvp
def _clamp_jvp(primals, tangents):
    return clamp(*primals), tangents[0]


def significance(magnitude: Array, scales: Array) -> Array:
    """Sum of |B| / scale over all ranks: the Laplace prior on B of BayesTune-LoRA, whose width is the scale.

    Args:
      magnitude: [J, R] `magnitudes`.
      scales: [J, R] positive.
    """
    return jnp.sum(magnitude / scales)


def sparsity(scales: Array) -> Array:
    """Sum of 100 scale + ln scale: minus the logarithm of the Gamma prior on scales of BayesTune-LoRA."""
    scales = scales.astype(jnp.float32)
    return jnp.sum(100.0 * scales + jnp.log(scales))

"""Small operations on pytrees that JAX does not ship."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_peft.types import Array, PyTree


def where(condition: Array, x: PyTree, y: PyTree) -> PyTree:
    """Leaf by leaf `x` where `condition` holds, else `y`; leading axes of the leaves line up with the condition's."""

    def select(a, b):
        return jnp.where(condition.reshape(condition.shape + (1,) * (jnp.ndim(a) - condition.ndim)), a, b)

    return jax.tree.map(select, x, y)


def add(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, y)


def subtract(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, x, y)


def scale(x: PyTree, factor: Array | float) -> PyTree:
    return jax.tree.map(lambda leaf: leaf * factor, x)


def zeros_like(x: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, x)


def squared_norm(x: PyTree) -> Array:
    """Sum of squares over all leaves, in float32."""
    return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(x)), jnp.float32(0))


def all_finite(x: PyTree) -> Array:
    """Scalar bool: no leaf holds a NaN or an infinity."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(x)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)


def select(tree: PyTree, keep: Callable[[str], bool]) -> PyTree:
    """The tree with None in place of every leaf whose last path name does not satisfy `keep`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if keep(_name(path[-1])) else None, tree)


def join(*trees: PyTree) -> PyTree:
    """The inverse of `select`: for each leaf the one tree that holds it."""
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
        *trees,
        is_leaf=lambda leaf: leaf is None,
    )


def path_name(path: tuple) -> str:
    """`a/b/c` for a key path of `jax.tree_util`."""
    return "/".join(_name(entry) for entry in path)


def _name(entry) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))

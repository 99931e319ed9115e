import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import trees


def test_where_lines_up_leading_axes():
    x, y = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    chosen = trees.where(jnp.array([True, False]), x, y)
    np.testing.assert_array_equal(chosen["a"], [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(chosen["b"], [1, 0])


def test_where_selects_not_a_number_away():
    chosen = trees.where(jnp.bool_(False), jnp.full(2, jnp.nan, jnp.float32), jnp.zeros(2))
    np.testing.assert_array_equal(chosen, [0, 0])


def test_selected_parts_join_to_the_whole():
    tree = {"one": {"a": jnp.ones(2), "b": None}, "two": {"a": jnp.zeros(1), "c": jnp.ones(3)}}
    parts = [trees.select(tree, lambda name, kept=kept: name == kept) for kept in "ac"]
    assert [len(jax.tree.leaves(part)) for part in parts] == [2, 1]
    joined = trees.join(*parts)
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, joined, tree)


def test_arithmetic():
    x, y = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([1.0, 1.0])}
    np.testing.assert_array_equal(trees.add(x, y)["a"], [4, 5])
    np.testing.assert_array_equal(trees.subtract(x, y)["a"], [2, 3])
    np.testing.assert_array_equal(trees.scale(x, 2)["a"], [6, 8])
    np.testing.assert_array_equal(trees.zeros_like(x)["a"], [0, 0])
    assert trees.squared_norm(x) == 25 and trees.squared_norm({}) == 0


def test_half_precision_norms_are_summed_in_float32():
    assert trees.squared_norm(jnp.ones(1000, jnp.bfloat16)) == 1000


def test_all_finite():
    assert trees.all_finite({"a": jnp.ones(2), "id": jnp.int32(1)}) and trees.all_finite(())
    assert not trees.all_finite((jnp.ones(2), jnp.array([1.0, jnp.inf])))
    assert not trees.all_finite(jnp.array(jnp.nan))

"""Layers: what a delta is given, what a tap holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from fedjax_peft.models import layers
from fedjax_peft.types import Array

FEATURES = 6
CASES = {
    "dense": (layers.Dense(FEATURES), (2, 3, 4)),
    "embed": (layers.Embed(9, FEATURES), None),
    "norm": (layers.LayerNorm(1e-5), (2, 3, FEATURES)),
}


@struct.dataclass
class Spy:
    """Adds a number for the input and the noise of the key."""

    gain: Array

    def __call__(self, x, key=None):
        level = x[..., None] if jnp.issubdtype(x.dtype, jnp.integer) else jnp.sum(jnp.square(x), -1, keepdims=True)
        noise = 0.0 if key is None else jax.random.uniform(key, (*level.shape[:-1], FEATURES), minval=1, maxval=2)
        return jnp.broadcast_to(self.gain * level, (*level.shape[:-1], FEATURES)) + noise


def case(name):
    layer, shape = CASES[name]
    key = jax.random.key(3)
    x = jnp.arange(6, dtype=jnp.int32).reshape(2, 3) if shape is None else 2 + jax.random.normal(key, shape)
    return layer, layer.init(key, x, mutable=["params"])["params"], x


@pytest.mark.parametrize("name", CASES)
def test_delta_is_added_and_sees_the_input_of_its_site(name):
    layer, params, x = case(name)
    plain = layer.apply({"params": params}, x)
    y = layer.apply({"params": params, "adapters": {"delta": Spy(jnp.float32(2))}}, x)
    seen = x
    if name == "norm":
        seen = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    level = seen[..., None] if name == "embed" else jnp.sum(seen * seen, -1, keepdims=True)
    np.testing.assert_allclose(y - plain, np.broadcast_to(2 * level, y.shape), rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_delta_gets_a_key_only_where_randomness_was_asked_for(name):
    layer, params, x = case(name)
    variables = {"params": params, "adapters": {"delta": Spy(jnp.float32(0))}}
    quiet = layer.apply(variables, x)
    loud = layer.apply(variables, x, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(quiet, layer.apply({"params": params}, x))
    assert float((loud - quiet).min()) >= 1 - 1e-4
    other = layer.apply(variables, x, rngs={"dropout": jax.random.key(1)})
    assert not np.array_equal(loud, other)


def test_taps_hold_moments_over_features_and_only_on_request():
    layer, params, x = case("dense")
    assert set(params) == {"kernel", "bias"}
    _, state = layer.apply({"params": params}, x, mutable=["taps"])
    np.testing.assert_allclose(state["taps"]["mean"], np.mean(x, -1), rtol=1e-6)
    np.testing.assert_allclose(state["taps"]["square"], np.mean(np.square(x), -1), rtol=1e-6)
    plain = jax.make_jaxpr(lambda: layer.apply({"params": params}, x))()
    assert "reduce_sum" not in str(plain)


def test_a_table_as_a_head_holds_moments_of_what_the_head_reads():
    layer, params, ids = case("embed")
    x = jax.random.normal(jax.random.key(4), (2, 3, FEATURES))
    y, state = layer.apply({"params": params}, x, method="attend", mutable=["taps"])
    np.testing.assert_allclose(state["taps"]["mean"], np.mean(x, -1), rtol=1e-6)
    np.testing.assert_allclose(state["taps"]["square"], np.mean(np.square(x), -1), rtol=1e-6)
    np.testing.assert_array_equal(y, layer.apply({"params": params}, x, method="attend"))
    assert not layer.apply({"params": params}, ids, mutable=["taps"])[1]


@struct.dataclass
class Tapped:
    """An adapter that has something to say of its input."""

    gain: jax.Array

    def __call__(self, x, key=None):
        return jnp.zeros((), x.dtype)

    def tap(self, x):
        return {"gained": self.gain * x}


def test_taps_hold_what_an_adapter_says_of_its_input():
    layer, params, x = case("dense")
    variables = {"params": params, "adapters": {"delta": Tapped(jnp.float32(2.0))}}
    y, state = layer.apply(variables, x, mutable=["taps"])
    np.testing.assert_array_equal(state["taps"]["gained"], 2 * x)
    np.testing.assert_array_equal(y, layer.apply({"params": params}, x))


def test_norms_do_not_lose_precision_in_bfloat16():
    x = 100 + jax.random.normal(jax.random.key(0), (4, 256))
    x = x.astype(jnp.bfloat16)
    layer = layers.LayerNorm(1e-5, jnp.bfloat16)
    params = layer.init(jax.random.key(0), x, mutable=["params"])["params"]
    y = layer.apply({"params": params}, x)
    wide = np.asarray(x, np.float64)
    exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    assert y.dtype == jnp.bfloat16 and params["scale"].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=0.01)


def test_an_id_outside_of_the_table_is_loud():
    layer, params, _ = case("embed")
    assert np.isnan(layer.apply({"params": params}, jnp.array([[9]]))).all()

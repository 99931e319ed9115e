import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_peft import aggregate, trees

UPLOADS = {"w": jnp.array([[1.0, 2.0], [5.0, 6.0], [0.0, 0.0]])}
COHORT = toy.cohort([4, 1, 2], examples=[1, 3, 100], reported=[True, True, False])


@pytest.mark.parametrize("weighting, expected", [("examples", [4.0, 5.0]), ("uniform", [3.0, 4.0])])
def test_mean_over_those_that_reported(weighting, expected):
    np.testing.assert_allclose(aggregate.mean(aggregate.weighted_sum(UPLOADS, COHORT, weighting))["w"], expected)


def test_nobody_with_examples_moves_nothing():
    nothing = aggregate.WeightedSum({"a": jnp.zeros(3)}, jnp.float32(0))
    np.testing.assert_array_equal(aggregate.mean(nothing)["a"], np.zeros(3))


def test_sums_are_additive_over_clients():
    whole = aggregate.weighted_sum(UPLOADS, COHORT, "examples")
    parts = [
        aggregate.weighted_sum(*jax.tree.map(lambda leaf, part=part: leaf[part], (UPLOADS, COHORT)), "examples")
        for part in (slice(0, 1), slice(1, 3))
    ]
    jax.tree.map(np.testing.assert_allclose, trees.add(*parts), whole)


def test_accelerators_sum_in_full_precision():
    lowered = jax.jit(lambda uploads: aggregate.weighted_sum(uploads, COHORT, "examples").total).lower(UPLOADS)
    assert products(lowered.as_text()) == [True]


def products(text):
    """Of each product of a program, whether it asks an accelerator for float32."""
    return ["HIGHEST, HIGHEST" in line for line in text.splitlines() if "dot_general" in line]


# Two steps by hand from Algorithm 2 of the paper. Delta = 0.5, then -0.25; b1 = 0.9, b2 = 0.99, tau = 0.1, eta = 2.
M1, M2 = 0.05, 0.9 * 0.05 - 0.1 * 0.25
V0, S1, S2 = 0.01, 0.25, 0.0625
ADAM_V1 = 0.99 * V0 + 0.01 * S1
YOGI_V1 = V0 + 0.01 * S1
BY_HAND = {
    "average": (1.0, -0.5),
    "momentum": (2 * M1, 2 * M2),
    "adagrad": (2 * 0.5 / ((V0 + S1) ** 0.5 + 0.1), 2 * -0.25 / ((V0 + S1 + S2) ** 0.5 + 0.1)),
    "adam": (2 * M1 / (ADAM_V1**0.5 + 0.1), 2 * M2 / ((0.99 * ADAM_V1 + 0.01 * S2) ** 0.5 + 0.1)),
    "yogi": (2 * M1 / (YOGI_V1**0.5 + 0.1), 2 * M2 / ((YOGI_V1 + 0.01 * S2) ** 0.5 + 0.1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_server_optimizers_by_hand(name):
    optimizer = aggregate.server_optimizer(name, learning_rate=2.0, momentum=0.9, second_momentum=0.99, adaptivity=0.1)
    state = optimizer.init(jnp.zeros(1))
    for delta, expected in zip((0.5, -0.25), BY_HAND[name], strict=True):
        update, state = optimizer.update(jnp.array([-delta]), state)
        np.testing.assert_allclose(update, [expected], rtol=1e-6)


def test_yogi_forgets_more_slowly_than_adam():
    # After one large Delta and many small ones v of Yogi falls by (1 - b2) Delta^2, that of Adam by a share of itself.
    steps = {}
    for name in ("adam", "yogi"):
        optimizer = aggregate.server_optimizer(name, learning_rate=1.0, momentum=0.0)
        state = optimizer.init(jnp.zeros(1))
        for delta in [10.0] + 300 * [0.1]:
            update, state = optimizer.update(jnp.array([-delta]), state)
        steps[name] = float(update[0])
    assert steps["yogi"] < 0.5 * steps["adam"]


@pytest.mark.parametrize("name, expected", [("average", 1.0), ("momentum", 0.1), ("adam", 1e-3)])
def test_default_learning_rates(name, expected):
    optimizer = aggregate.server_optimizer(name, second_momentum=0.99, adaptivity=1e-9)
    update, _ = optimizer.update(jnp.array([-1.0]), optimizer.init(jnp.zeros(1)))
    # m = 0.1 Delta and, of Adam, sqrt v = 0.1 Delta.
    np.testing.assert_allclose(update, [expected], rtol=1e-5)


def test_unknown_server_optimizers_are_refused():
    with pytest.raises(ValueError, match="server.* is 'sgdm', expected one of average, "):
        aggregate.server_optimizer("sgdm")

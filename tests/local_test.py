import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from fedjax_peft import local, tasks
from fedjax_peft.types import Batches

KEY = jax.random.key(0)


def batches(values, weights, widths=(), width=None, tokens=2):
    """Steps of one example whose tokens are all `value`."""
    tokens = np.full((len(values), 1, tokens), 1, np.int32) * np.asarray(values, np.int32)[:, None, None]
    width = np.zeros(len(values), np.int32) if width is None else np.asarray(width, np.int32)
    weights = np.asarray(weights, np.float32)[:, None]
    return Batches({"tokens": tokens, "mask": tokens >= 0}, tokens[..., 0], weights, width, widths)


def record(carry, batch, key):
    """Appends the first token to a number in base ten and reports the width that it was given."""
    del key
    tokens = batch.inputs["tokens"]
    return carry * 10 + tokens[0, 0], {"width": jnp.float32(tokens.shape[1])}


def test_steps_without_examples_change_nothing_and_do_not_count():
    carry, metrics = local.scan(record, jnp.int32(0), batches([1, 2, 3, 4], [1, 0, 0, 1]), KEY)
    assert int(carry) == 14 and metrics == {"width": 2.0}


def test_no_examples_at_all():
    carry, metrics = local.scan(record, jnp.int32(7), batches([1, 2], [0, 0]), KEY)
    assert int(carry) == 7 and metrics == {"width": 0.0}
    carry, metrics = local.scan(record, jnp.int32(7), batches([], []), KEY)
    assert int(carry) == 7 and metrics == {"width": 0.0}


def test_steps_are_cut_to_their_widths():
    given = batches([1, 2, 3], [1, 1, 1], widths=(2, 4), width=[0, 1, 0], tokens=4)
    carry, metrics = local.scan(record, jnp.int32(0), given, KEY)
    assert int(carry) == 123
    np.testing.assert_allclose(metrics["width"], (2 + 4 + 2) / 3)


def test_the_width_stays_a_branch_when_clients_are_batched():
    given = batches([1, 2, 3], [1, 1, 1], widths=(2, 4), width=[0, 1, 0], tokens=4)
    cohort = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), given.replace(width=None)).replace(width=given.width)
    axes = Batches(inputs=0, labels=0, weights=0, width=None, widths=(2, 4))
    run = jax.vmap(lambda own: local.scan(record, jnp.int32(0), own, KEY), in_axes=(axes,))
    assert list(run(cohort)[0]) == [123, 123]
    assert " cond[" in str(jax.make_jaxpr(run)(cohort))


@pytest.mark.parametrize("widths, width", [((6,), [0, 0, 0]), ((3, 6), [1, 0, 1])])
def test_narrow_steps_train_like_wide_ones(widths, width):
    model, base = toy.model(), toy.model().init(KEY)
    given = toy.batches(0, 1)
    given = jax.tree.map(lambda leaf: leaf[0], given)
    given.inputs["mask"][1, :, 3:] = False  # nothing is lost when the second step is cut to three tokens
    start = {"classifier": {"delta": {"kernel": jnp.zeros((12, 3))}}}

    def loss(params, batch, key):
        node = lambda x, key: x @ params["classifier"]["delta"]["kernel"]  # noqa: E731
        objective = local.objective(model, tasks.classification(), base)
        return objective({"classifier": {"delta": node}}, batch, key)

    def trained(widths, width):
        own = given.replace(widths=widths, width=np.asarray(width, np.int32))
        return local.train(loss, optax.sgd(0.5), start, optax.sgd(0.5).init(start), own, KEY)[0]

    kernels = [tree["classifier"]["delta"]["kernel"] for tree in (trained(widths, width), trained((), [0, 0, 0]))]
    np.testing.assert_allclose(*kernels, rtol=1e-6)


def test_each_step_has_its_own_key():
    def draw(carry, batch, key):
        del batch
        return carry, {"drawn": jax.random.uniform(key)}

    _, metrics = local.scan(draw, (), batches([1, 2], [1, 1]), KEY)
    expected = np.mean([jax.random.uniform(jax.random.fold_in(KEY, step)) for step in range(2)])
    np.testing.assert_allclose(metrics["drawn"], expected)


def test_the_loss_is_the_mean_over_examples_and_padding_may_be_anything():
    model, base = toy.model(), toy.model().init(KEY)
    batch = jax.tree.map(lambda leaf: leaf[0, 0], toy.batches(0, 1).replace(constants={}))
    loss = local.objective(model, tasks.classification(), base)
    whole = [loss({}, batch.replace(weights=np.eye(4, dtype=np.float32)[i]), KEY)[0] for i in range(3)]
    batch.weights[3], batch.inputs["mask"][3], batch.labels[3] = 0, False, 10**6
    value, metrics = loss({}, batch, KEY)
    np.testing.assert_allclose(value, np.mean(whole), rtol=1e-6)
    assert metrics["loss"] == value
    assert loss({}, batch.replace(weights=np.zeros(4, np.float32)), KEY)[0] == 0


@pytest.mark.parametrize("average", ["tokens", "examples"])
def test_answers_that_weigh_nothing_count_in_no_mean(average):
    task = tasks.causal(average=average)
    outputs = jax.random.normal(jax.random.key(0), (2, 4, 7))
    both = Batches({}, {"targets": jnp.array([[1, 2, -1, -1], [3, 4, 5, 6]])}, jnp.ones(2), None, ())
    for kept in (0, 1):
        alone = both.replace(labels={"targets": both.labels["targets"][kept : kept + 1]}, weights=jnp.ones(1))
        found = local.mean_loss(task, outputs, local.reweighted(both, jnp.arange(2) == kept))
        np.testing.assert_allclose(found, local.mean_loss(task, outputs[kept : kept + 1], alone), rtol=1e-6)


def test_the_rate_multiplies_updates_and_moments_are_handed_on():
    def loss(params, batch, key):
        del batch, key
        return 3.0 * params, {"loss": params}

    optimizer = optax.sgd(0.1, momentum=0.5)
    params, state, metrics = local.train(
        loss, optimizer, jnp.float32(1), optimizer.init(jnp.float32(1)), batches([1, 1], [1, 1]), KEY, rate=0.5
    )
    # Traces 3 and 4.5, each times 0.1 times 0.5.
    np.testing.assert_allclose(params, 1 - 0.15 - 0.225)
    np.testing.assert_allclose(state[0].trace, 4.5)
    np.testing.assert_allclose(metrics["loss"], (1 + 0.85) / 2)


def test_adamw_by_hand():
    optimizer = local.make_optimizer("adamw", learning_rate=0.1, weight_decay=0.5, eps=0.0)
    updates, _ = optimizer.update(jnp.array([4.0]), optimizer.init(jnp.array([2.0])), jnp.array([2.0]))
    np.testing.assert_allclose(updates, [-0.1 * (1 + 0.5 * 2)], rtol=1e-5)


def test_sgd_clips_the_whole_gradient_and_has_momentum():
    optimizer = local.make_optimizer("sgd", learning_rate=0.1, clip=1.0, momentum=0.5)
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, state = optimizer.update(gradient, optimizer.init(gradient))
    np.testing.assert_allclose(updates["a"], [-0.06], rtol=1e-6)
    updates, _ = optimizer.update(gradient, state)
    np.testing.assert_allclose(updates["b"], [-0.12], rtol=1e-6)


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("constant", {}, [1, 1, 1, 1, 1]),
        ("linear", {}, [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", {"end": 0.5}, [1, 0.9522542, 0.8272542, 0.6727457, 0.5477458]),
        ("annealed", {"end": 0.5}, [0.9522542, 0.8272542, 0.6727457, 0.5477458, 0.5]),
        ("linear", {"warmup": 2, "end": 0.1}, [0.5, 1, 1, 0.7, 0.4]),
        ("exponential", {"end": 0.0625}, [1, 0.5, 0.25, 0.125, 0.0625]),
        ("exponential", {"warmup": 2, "end": 0.25}, [0.5, 1, 1, 0.5, 0.25]),
    ],
)
def test_schedules_over_rounds(name, settings, expected):
    schedule = local.make_schedule(name, rounds=5, **settings)
    np.testing.assert_allclose([schedule(jnp.int32(index)) for index in range(5)], expected, rtol=1e-5)


def test_the_published_rates_of_fed_aya():
    # 1e-6 + (2e-5 - 1e-6)(1 + cos(pi t / 200)) / 2 in the rounds t = 1 .. 200
    schedule = local.make_schedule("annealed", rounds=200, end=0.05)
    rates = [2e-5 * float(schedule(jnp.int32(t - 1))) for t in (1, 100, 200)]
    np.testing.assert_allclose(rates, [1.99988280e-5, 1.05e-5, 1e-6], rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: local.make_optimizer(learning_rate=0.0), "optimizer.learning_rate is 0.0, expected a positive"),
        (
            lambda: local.make_optimizer("adam", learning_rate=1.0),
            "optimizer.name is 'adam', expected 'adamw' or ",
        ),
        (
            lambda: local.make_schedule("step", rounds=5),
            "schedule.name is 'step', expected one of constant, linear, ",
        ),
        (lambda: local.make_schedule(rounds=5, warmup=5), "schedule.warmup is 5 rounds, expected 0 to 4"),
        (lambda: local.make_schedule("exponential", rounds=5), "schedule.end is 0.0, expected a positive number for"),
    ],
)
def test_mistakes_are_named_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()

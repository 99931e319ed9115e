"""The generator of strategies: its size, what it learns, and that it alone travels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same

from fedjax_peft import adapters, ranks, taps, tasks, trees
from fedjax_peft.algorithms import bayestune, fedp2eft
from fedjax_peft.types import Cohort

MODEL, TASK = toy.model(), tasks.classification()
BASE = MODEL.init(jax.random.key(1))
INIT = functools.partial(
    adapters.init, shapes=jax.eval_shape(lambda: BASE), rank=4, alpha=8.0, targets="all-linear", head="lora"
)
LAYOUT = ranks.layout(ranks.concrete(INIT))
SHAPE = (LAYOUT.sites, LAYOUT.rank)
SCALES = bayestune.Scales()
FEDERATION = toy.batches(0, 4).replace(widths=())


def method(**settings):
    return fedp2eft.fedp2eft(MODEL, TASK, INIT, optax.adam(1e-3), **settings)


def client(index, budget=1):
    own = jax.tree.map(lambda leaf: leaf[index], FEDERATION)
    return own.replace(constants=own.constants | {"budget": np.int32(budget)})


def trained(algorithm, server, scores):
    """A server whose generator answers `scores` to everybody."""
    psg = server.psg
    silent = trees.zeros_like(psg).replace(slope=psg.slope, b2=jnp.asarray(scores).reshape(-1))
    return server.replace(psg=silent)


def test_everybody_starts_with_the_lowest_scale():
    psg = fedp2eft.make_psg(jax.random.key(0), 148, 296, 74 * 32)
    x = jax.random.normal(jax.random.key(1), (5, 148)) * 5
    for row in x:
        np.testing.assert_allclose(fedp2eft.generate(psg, row, (74, 32), SCALES), 1e-4, atol=1e-9)


def test_a_client_leaves_nothing_but_the_generator():
    algorithm = method()
    server = algorithm.init(jax.random.key(0))
    before = jax.tree.map(np.array, (BASE, server.adapters))
    state, upload, metrics = algorithm.client_update(BASE, server, (), client(0), jax.random.key(1))
    assert state == ()
    assert_same((BASE, server.adapters), before)
    assert jax.tree.structure(upload.psg) == jax.tree.structure(server.psg)
    assert upload.psg.b2.size == 12 and any(leaf.any() for leaf in jax.tree.leaves(upload.psg))
    assert metrics["psg_error_after"] < metrics["psg_error"]


def test_clients_side_by_side_are_those_one_after_the_other():
    """Updates and personalizations of clients with all, some and one of their examples."""
    algorithm, own = method(rate=0.1), [client(index, budget=index + 1) for index in range(3)]
    weights = [np.array(batches.weights) for batches in own]
    weights[1][1:], weights[2].reshape(-1)[1:] = 0, 0
    own = [batches.replace(weights=each) for batches, each in zip(own, weights, strict=True)]
    server = trained(algorithm, algorithm.init(jax.random.key(0)), np.linspace(0.1, 1.0, 12))

    def both(batches, key):
        _, upload, metrics = algorithm.client_update(BASE, server, (), batches, key)
        return upload, metrics, algorithm.personalize(BASE, server, (), batches, key)

    keys = jax.random.split(jax.random.key(2), 3)
    together = jax.jit(jax.vmap(both))(jax.tree.map(lambda *leaves: np.stack(leaves), *own), keys)
    alone = jax.jit(both)
    for index, batches in enumerate(own):
        # The generator's Adam makes a step of full size of whatever rounding leaves of a gradient.
        mine = jax.tree.map(lambda leaf, at=index: leaf[at], together)
        assert_close(mine, alone(batches, keys[index]), 1e-4)


def test_adam_steps_of_the_generator_move_a_bias_by_its_rate():
    server = method().init(jax.random.key(0))
    for steps in (1, 10):
        _, upload, _ = method(psg_steps=steps, rate=0.1).client_update(BASE, server, (), client(0), jax.random.key(1))
        moved = np.abs(upload.psg.b2)
        assert moved.max() <= steps * 1e-4 * 1.001
        if steps == 1:
            np.testing.assert_allclose(moved, 1e-4, rtol=1e-3)


def test_accelerators_generate_and_keep_statistics_in_full_precision():
    # In bfloat16 a step of 1e-4 leaves a weight of 0.03 where it was.
    algorithm = method()
    server = jax.eval_shape(algorithm.init, jax.random.key(0))
    inputs = jnp.zeros(server.psg.w1.shape[0])
    slope = jax.grad(lambda psg: fedp2eft.generate(psg, inputs, SHAPE, SCALES).sum())
    uploads = jax.eval_shape(
        lambda psg: fedp2eft.Upload(*jax.tree.map(lambda leaf: leaf[None], (psg, inputs))), server.psg
    )
    cohort = Cohort(jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.ones(1, bool))
    for function, argument in ((slope, server.psg), (lambda uploads: algorithm.fold(uploads, cohort), uploads)):
        products = [line for line in jax.jit(function).lower(argument).as_text().splitlines() if "dot_general" in line]
        assert products and all("HIGHEST, HIGHEST" in line for line in products)


def test_one_client_with_fixed_scales_is_learnt_to_a_hundredth():
    psg = fedp2eft.make_psg(jax.random.key(0), 6, 12, 12)
    x, wanted = jax.random.normal(jax.random.key(1), (6,)), jax.random.uniform(jax.random.key(2), SHAPE, minval=0.2)
    fit = jax.jit(functools.partial(fedp2eft.regress, settings=SCALES, rate=1e-3, steps=2000))
    fitted, before, after = fit(psg, x, wanted)
    assert after < 0.01 * before
    np.testing.assert_allclose(
        after, jnp.mean(jnp.abs(fedp2eft.generate(fitted, x, SHAPE, SCALES) - wanted)), rtol=1e-5
    )


def test_two_clients_with_their_own_scales_are_told_apart():
    # The same Adam on the same distance as in a round, many rounds on.
    psg = fedp2eft.make_psg(jax.random.key(0), 6, 12, 12)
    x = jax.random.normal(jax.random.key(1), (2, 6))
    wanted = jax.random.uniform(jax.random.key(2), (2, *SHAPE), minval=0.2, maxval=2.0)
    optimizer = optax.adam(3e-3)

    def error(psg):
        made = [fedp2eft.generate(psg, own, SHAPE, SCALES) for own in x]
        return jnp.sum(jnp.abs(jnp.stack(made) - wanted))

    @jax.jit
    def step(psg, state):
        updates, state = optimizer.update(jax.grad(error)(psg), state)
        return optax.apply_updates(psg, updates), state

    state, start = optimizer.init(psg), error(psg)
    for _ in range(3000):
        psg, state = step(psg, state)
    assert error(psg) < 0.02 * start


def climbed(shift):
    """How far the scales of 40 clients come in 40 rounds of 5 clients, in whose hands they climb by .04."""
    x = shift + jax.random.normal(jax.random.key(0), (40, 40))
    fit, psg = optax.adam(1e-4), fedp2eft.make_psg(jax.random.key(1), 40, 80, 60)

    def one(psg, x):
        wanted = fedp2eft.generate(psg, x, (15, 4), SCALES) + 0.04

        def step(carry, _):
            own, state = carry
            error = jax.grad(lambda own: jnp.sum(jnp.abs(fedp2eft.generate(own, x, (15, 4), SCALES) - wanted)))
            updates, state = fit.update(error(own), state)
            return (optax.apply_updates(own, updates), state), None

        return jax.lax.scan(step, (psg, fit.init(psg)), None, length=10)[0][0]

    @jax.jit
    def play(psg, cohort):
        return jax.tree.map(lambda leaf: jnp.mean(leaf, 0), jax.vmap(one, (None, 0))(psg, x[cohort]))

    for index in range(40):
        psg = play(psg, 5 * (index % 8) + np.arange(5))
    return jnp.mean(jax.vmap(lambda own: fedp2eft.generate(psg, own, (15, 4), SCALES))(x))


def test_the_mean_of_generators_needs_what_clients_share():
    alone, shared = climbed(0.0), climbed(1.0)
    assert shared > 3 * alone and shared > 0.3, (alone, shared)


def test_a_federation_of_one_learns_its_scales():
    algorithm = method(psg_rate=1e-2, tap_standardize="none")
    server = algorithm.init(jax.random.key(0))
    cohort = Cohort(jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.ones(1, bool))

    @jax.jit
    def play(server, key):
        _, upload, metrics = algorithm.client_update(BASE, server, (), client(0), key)
        sums = algorithm.fold(jax.tree.map(lambda leaf: leaf[None], upload), cohort)
        return algorithm.server_update(server, sums)[0], metrics

    before = jax.tree.map(np.array, server.adapters)
    for index in range(40):
        server, metrics = play(server, jax.random.key(index))
    assert_same(server.adapters, before)
    assert metrics["mean_scale"] > 0.05
    assert metrics["psg_error_after"] < 0.1 * metrics["mean_scale"]


def test_the_server_averages_generators_by_examples_and_keeps_statistics():
    algorithm = method()
    server = algorithm.init(jax.random.key(0))
    uploads = [algorithm.client_update(BASE, server, (), client(index), jax.random.key(index))[1] for index in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *uploads)
    cohort = Cohort(jnp.arange(3), jnp.array([1.0, 3.0, 5.0]), jnp.array([True, True, False]))
    masked = jax.tree.map(lambda leaf: leaf.at[2].set(0), stacked)
    new, _ = algorithm.server_update(server, algorithm.fold(masked, cohort))
    expected = jax.tree.map(lambda old, a, b: old + 0.25 * a + 0.75 * b, server.psg, uploads[0].psg, uploads[1].psg)
    assert_close(new.psg, expected, 1e-6)
    x = FEDERATION.constants["taps"]
    assert new.statistics.count == 2
    np.testing.assert_allclose(new.statistics.mean, x[:2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(new.statistics.m2, ((x[:2] - x[:2].mean(0)) ** 2).sum(0), rtol=1e-3, atol=1e-6)
    again, _ = algorithm.server_update(
        new,
        algorithm.fold(
            jax.tree.map(lambda leaf: leaf[None], uploads[2]._replace(x=x[2] - new.statistics.mean)),
            Cohort(jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.ones(1, bool)),
        ),
    )
    np.testing.assert_allclose(again.statistics.m2, ((x[:3] - x[:3].mean(0)) ** 2).sum(0), rtol=1e-3, atol=1e-6)
    deviations = fedp2eft.standardized(x[0], again.statistics)
    np.testing.assert_allclose(deviations, 1 + (x[0] - x[:3].mean(0)) / x[:3].std(0, ddof=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("relative", [1e-2, 3e-4, 1e-6, 0.0])
def test_clients_that_hardly_differ_are_not_blown_up_by_the_first_round(relative):
    rng = np.random.default_rng(0)
    x = np.float32(5 * (1 + relative * rng.standard_normal((10, 50))))
    start = fedp2eft.Statistics(jnp.float32(0), jnp.zeros(50), jnp.zeros(50))
    first = fedp2eft.merged(start, fedp2eft.Sums((), jnp.float32(10), x.sum(0), (x**2).sum(0)))
    read = jax.vmap(fedp2eft.standardized, (0, None))(x, first)
    assert jnp.abs(read - 1).max() < 4
    # Later rounds are counted from a mean, and tell small spreads.
    later = first
    for _ in range(400):
        change = x - np.asarray(later.mean)
        later = fedp2eft.merged(later, fedp2eft.Sums((), jnp.float32(10), change.sum(0), (change**2).sum(0)))
    if relative >= 3e-4:
        np.testing.assert_allclose(jnp.sqrt(later.m2 / later.count), np.asarray(x).std(0), rtol=0.1)


def test_before_any_upload_all_clients_look_alike():
    statistics = method().init(jax.random.key(0)).statistics
    np.testing.assert_array_equal(fedp2eft.standardized(jnp.arange(6.0), statistics), 1.0)


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_a_client_keeps_its_budget_of_the_largest_scales_and_their_values(budget):
    algorithm = method()
    scores = jax.random.uniform(jax.random.key(4), SHAPE, minval=0.1)
    server = trained(algorithm, algorithm.init(jax.random.key(0)), scores)
    adapted = algorithm.personalize(BASE, server, (), client(0, budget), jax.random.key(1))
    expected = 2.0 * scores * ranks.top(scores, budget * LAYOUT.sites)  # 2 is alpha / R, whatever is kept
    np.testing.assert_allclose(ranks.table(LAYOUT, adapted), expected, rtol=1e-6)


def test_all_budgets_are_one_program():
    algorithm = method()
    server = algorithm.init(jax.random.key(0))
    personalize = jax.jit(algorithm.personalize)
    for budget in (1, 2, 4):
        adapted = personalize(BASE, server, (), client(0, budget), jax.random.key(1))
        assert ranks.strategy(LAYOUT, adapted)["ranks"].sum() == budget * LAYOUT.sites
    assert personalize._cache_size() == 1


CONTROLS = {
    "random": lambda mask: mask.sum() == 3,
    "uniform": lambda mask: (mask[:, 0] == 1).all(),
    "width": lambda mask: mask[2].sum() == 0,  # the head has the fewest outputs
}


@pytest.mark.parametrize("choice", CONTROLS)
def test_controls_put_the_same_scales_elsewhere(choice):
    scores = jax.random.uniform(jax.random.key(4), SHAPE, minval=0.1).at[2].add(1.0)  # the head would win
    own, other = method(), method(choice=choice)
    server = trained(own, own.init(jax.random.key(0)), scores)
    tables = [
        np.asarray(ranks.table(LAYOUT, kind.personalize(BASE, server, (), client(0), jax.random.key(1))))
        for kind in (own, other)
    ]
    np.testing.assert_allclose(*(np.sort(table.reshape(-1)) for table in tables), rtol=1e-6)
    assert CONTROLS[choice]((tables[1] > 0).astype(int))
    assert (tables[0] != tables[1]).any()


def test_mode_one_keeps_ranks_but_not_scales():
    algorithm = method(mode="one")
    scores = jax.random.uniform(jax.random.key(4), SHAPE, minval=0.1)
    server = trained(algorithm, algorithm.init(jax.random.key(0)), scores)
    found = ranks.table(LAYOUT, algorithm.personalize(BASE, server, (), client(0), jax.random.key(1)))
    np.testing.assert_array_equal(found, 2.0 * ranks.top(scores, LAYOUT.sites))


def test_a_constant_feature_tells_no_clients_apart():
    algorithm = method(features="constant", tap_standardize="none")
    server = algorithm.init(jax.random.key(0))
    server = server.replace(psg=jax.tree.map(lambda leaf: leaf + 0.3, server.psg))
    tables = [
        ranks.table(LAYOUT, algorithm.personalize(BASE, server, (), client(i), jax.random.key(1))) for i in (0, 1)
    ]
    np.testing.assert_array_equal(*tables)


def test_scales_may_go_on_training_under_their_mask():
    algorithm = method(train_scales_at_eval=True)
    scores = jax.random.uniform(jax.random.key(4), SHAPE, minval=0.1)
    server = trained(algorithm, algorithm.init(jax.random.key(0)), scores)
    found = ranks.table(LAYOUT, algorithm.personalize(BASE, server, (), client(0), jax.random.key(1)))
    mask = np.asarray(ranks.top(scores, LAYOUT.sites))
    assert not (found * (1 - mask)).any() and np.any(found != 2.0 * scores * mask)


def test_a_client_fits_its_examples_better_under_its_strategy():
    algorithm = fedp2eft.fedp2eft(MODEL, TASK, INIT, optax.adam(1e-2))
    server = trained(algorithm, algorithm.init(jax.random.key(0)), jnp.ones(SHAPE))
    own = client(0, budget=2)
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (10,) + (1,) * (leaf.ndim - 1)), own.replace(constants={}))

    def loss(adapters):
        outputs = jax.vmap(lambda inputs: MODEL.apply(BASE, adapters, inputs))(own.inputs)
        return TASK.loss(outputs.reshape(-1, toy.CLASSES), own.labels.reshape(-1)).mean()

    given = BASE, server, (), many.replace(constants=own.constants), jax.random.key(1)
    assert loss(jax.jit(algorithm.personalize)(*given)) < 0.8 * loss({})


@pytest.mark.parametrize("scales_too", [False, True])
def test_the_personal_rate_multiplies_the_steps_of_a_and_b(scales_too):
    given = client(0)
    one_step = given.replace(weights=given.weights * (np.arange(len(given.weights)) == 0)[:, None])
    scores = jax.random.uniform(jax.random.key(4), SHAPE, minval=0.1)

    def trained_b(rate):
        algorithm = method(train_scales_at_eval=scales_too, personal_rate=rate)
        server = trained(algorithm, algorithm.init(jax.random.key(0)), scores)
        found = algorithm.personalize(BASE, server, (), one_step, jax.random.key(1))
        return {path: node.b for path, node in adapters.nodes(found).items() if hasattr(node, "b")}

    once, thrice = trained_b(1.0), trained_b(3.0)
    assert any(leaf.any() for leaf in once.values())
    assert_close(thrice, trees.scale(once, 3.0), 1e-6)


def test_sampled_budgets_leave_masked_scales_alone():
    algorithm = method(sample_budget=True, sample_budget_after=0, tap_standardize="none", psg_rate=1e-3)
    server = algorithm.init(jax.random.key(0))
    moved = [
        algorithm.client_update(BASE, server, (), client(0), jax.random.key(key))[1].psg.b2 != 0 for key in range(8)
    ]
    # A key of its own: those of local steps are their numbers folded into the same one.
    own = [jax.random.fold_in(jax.random.key(key), fedp2eft.BUDGET) for key in range(8)]
    drawn = [3 * int(jax.random.choice(one, jnp.array([4, 2, 1]))) for one in own]
    assert [int(np.sum(one)) for one in moved] == drawn and len(set(drawn)) > 1


def test_stage_two_costs_little_more_than_training_lora():
    from fedjax_peft.algorithms import fedavg

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    def of_round(algorithm, steps=4):
        server = jax.eval_shape(algorithm.init, jax.random.key(0))
        state = jax.eval_shape(algorithm.init_client, server, 0, jax.random.key(0))
        own = jax.tree.map(lambda leaf: leaf[:steps], big.replace(constants={})).replace(constants=big.constants)
        return flops(algorithm.client_update, BIG_BASE, server, state, own, jax.random.key(0))

    # Wide enough that products dominate, as they do in a language model.
    width, key = 256, jax.random.key(0)
    big_base = MODEL.init(key)
    big_base["embeddings"]["word"]["embedding"] = jnp.ones((toy.VOCABULARY, width))
    layer = {"kernel": jnp.ones((toy.LAYERS, width, width)), "bias": jnp.zeros((toy.LAYERS, width))}
    big_base["encoder"]["layer"]["query"] = layer
    big_base["classifier"] = {"kernel": jnp.ones((width, toy.CLASSES)), "bias": jnp.zeros(toy.CLASSES)}
    BIG_BASE = jax.eval_shape(lambda: big_base)
    big = jax.tree.map(lambda leaf: leaf[0], toy.batches(0, 1, steps=4, size=16, tokens=32)).replace(widths=())
    init = functools.partial(INIT, shapes=BIG_BASE, rank=32)
    plain, ours = (build(MODEL, TASK, init, optax.adam(1e-4)) for build in (fedavg.fedit, fedp2eft.fedp2eft))
    server, shape = jax.eval_shape(ours.init, jax.random.key(0)), (LAYOUT.sites, 32)
    fit = functools.partial(fedp2eft.regress, settings=SCALES, rate=1e-4, steps=1)
    # The body of a loop is counted once, however often it runs.
    step_of_psg = flops(fit, server.psg, jnp.zeros(toy.TAPS), jnp.zeros(shape))
    theirs, local = of_round(plain), of_round(ours) - step_of_psg
    assert theirs == pytest.approx(of_round(plain, steps=2), rel=1e-3)
    assert 1.0 <= local / theirs <= 1.15
    assert 4 * local + 10 * step_of_psg <= 1.15 * 4 * theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "old"}, "algorithm.profile is 'old', expected default or reference"),
        ({"choice": "best"}, "algorithm.choice is 'best', expected one of generated, random, uniform, width"),
        ({"mode": "two"}, "algorithm.mode is 'two'"),
        ({"tap_standardize": "yes"}, "algorithm.tap_standardize is 'yes'"),
        ({"mode": "one", "train_scales_at_eval": True}, "algorithm.mode is 'one', but algorithm.train_scales_at_eval"),
        ({"psg_rate": 0.0}, "algorithm.psg_rate is 0.0, expected more than 0"),
        ({"psg_steps": 0}, "algorithm.psg_steps is 0, expected 1 or more"),
        ({"psg_width": 0}, "algorithm.psg_width is 0, expected 1 or more"),
        ({"sample_budget_after": -1}, "algorithm.sample_budget_after is -1, expected 0 or more"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)


def test_the_reference_profile_sets_every_switch_and_each_can_be_set_alone(monkeypatch):
    made, make = [], bayestune.make_scales
    monkeypatch.setattr(bayestune, "make_scales", lambda **settings: made.append(make(**settings)) or made[-1])
    published = method(profile="reference")
    as_published = {"gradient": "accumulate", "forward": "raw", "target": "raw", "dtype": "bfloat16"}
    assert {name: getattr(made[-1], name) for name in as_published} == as_published
    assert made[-1]._replace(**{name: getattr(SCALES, name) for name in as_published}) == SCALES
    server = published.init(jax.random.key(0))
    assert server.statistics == ()
    state, upload, _ = published.client_update(BASE, server, (), client(0), jax.random.key(1))
    assert upload.x == ()
    sound = method(profile="reference", tap_standardize="running", forward="clamped")
    assert sound.init(jax.random.key(0)).statistics.mean.size == toy.TAPS
    assert made[-1] == make(**as_published | {"forward": "clamped"})


def test_profiles_look_at_padded_texts_in_their_own_way():
    batches = [jax.tree.map(lambda leaf, step=step: leaf[0, step], FEDERATION.inputs) for step in range(3)]
    assert not all(inputs["mask"].all() for inputs in batches)
    weights = jnp.ones(4)

    def seen(**settings):
        algorithm = method(**settings)
        return algorithm.observed([algorithm.observe(BASE, inputs, weights, {}) for inputs in batches], 12)["taps"]

    def expected(masked, dtype):
        return taps.vector(
            [taps.moments(MODEL, BASE, own, weights, mask_padding=masked) for own in batches], dtype=dtype
        )

    cases = [
        ({}, True, "float32"),
        ({"profile": "reference"}, False, "bfloat16"),
        ({"profile": "reference", "tap_mask_padding": True}, True, "bfloat16"),
        ({"profile": "reference", "tap_dtype": "float32"}, False, "float32"),
    ]
    found = [seen(**settings) for settings, *_ in cases]
    for x, (_, masked, dtype) in zip(found, cases, strict=True):
        np.testing.assert_array_equal(x, expected(masked, dtype))
    assert len({x.tobytes() for x in found}) == 4

"""FedMutual and FedAPEN: divergences in numpy, steps against loops over the two losses, reductions, w, ensembles."""

import functools

import decoder
import encoder
import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import CLIENTS, assert_close, assert_same, snapshot
from scipy import special

from fedjax_peft import adapters, generate, tasks, trees
from fedjax_peft.algorithms import fedavg, mutual
from fedjax_peft.models import llama
from fedjax_peft.types import Batches

MODEL, TASK, SGD, KEY = mutual.ensembled(toy.model()), tasks.classification(), optax.sgd(0.5), jax.random.key(5)
SOME = [4, 0, 3, 2]
METHODS = {"fedmutual": {}, "fedapen": {"fit_on": "train", "fit_rate": 0.02, "fit_epochs": 3}}
both = pytest.mark.parametrize("name", METHODS)


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"rank": 2, "alpha": 4.0, "targets": "query"} | settings)


@functools.cache
def make(name, **settings):
    return getattr(mutual, name)(MODEL, TASK, init_adapters(), SGD, **METHODS[name] | settings)


@functools.cache
def updated(method):
    return jax.jit(method.client_update)


@functools.cache
def played(name):
    return federation.run(make(name), SOME)[0]


def client_of(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state.population.states)


def data(client, index=0):
    return jax.tree.map(lambda leaf: leaf[0], federation.data(index, [client]))


def none(client):
    """No steps."""
    return jax.tree.map(lambda leaf: leaf[:0], data(client).replace(constants={}))


def trained(tree):
    return trees.select(tree, lambda leaf: leaf != "scale")


def fixed(tree):
    return trees.select(tree, lambda leaf: leaf == "scale")


def kl(teacher, student):
    """[..] of logits [.., V]."""
    teacher, student = special.log_softmax(teacher, -1), special.log_softmax(student, -1)
    return np.sum(np.exp(teacher) * (teacher - student), -1)


@pytest.mark.parametrize("reduce", mutual.REDUCTIONS)
def test_divergence_is_from_the_teacher_to_the_student(reduce):
    rng = np.random.default_rng(0)
    teacher, student, counted = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5)), np.array([[1, 1, 0], [2, 0, 1]])
    expected = np.sum(kl(teacher, student) * counted) / 5
    expected = expected / 5 if reduce == "elements" else expected
    arguments = [jnp.asarray(value, jnp.float32) for value in (teacher, student, counted)]
    assert float(mutual.divergence(*arguments, reduce)) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(np.sum(kl(student, teacher) * counted) / 5, rel=1e-2)
    by_teacher, by_student = jax.grad(mutual.divergence, (0, 1))(*arguments, reduce)
    assert not by_teacher.any() and by_student.any()
    slope = (special.softmax(student, -1) - special.softmax(teacher, -1)) * counted[..., None] / 5
    np.testing.assert_allclose(by_student, slope / (5 if reduce == "elements" else 1), rtol=1e-4, atol=1e-6)


def causal_batch():
    """Two texts, of which the first has a padded token and the second a padded target, and an example of padding."""
    inputs = decoder.inputs(lengths=(6, 5, 2), width=6)
    chosen = jnp.array([[3, 4], [2, 3], [0, 0]], jnp.int32)
    targets = jnp.array([[7, 8], [9, -1], [-1, -1]], jnp.int32)
    weights = jnp.array([1.0, 1.0, 0.0])
    return Batches(inputs | {"chosen": chosen}, {"targets": targets}, weights, jnp.int32(0))


@functools.cache
def causal():
    """(model, base, two adapters at generic points)."""
    model = llama.llama(decoder.config("tied") | {"num_hidden_layers": 1}, scan=False)
    base = encoder.weights(jax.eval_shape(model.init, KEY))
    start = adapters.init(KEY, base, rank=2, targets="all-linear")

    def moved(seed):
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        noise = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(next(keys), leaf.shape), trained(start))
        return trees.join(trees.add(trained(start), noise), fixed(start))

    return model, base, (moved(1), moved(2))


@pytest.mark.parametrize("reduce", mutual.REDUCTIONS)
def test_next_tokens_are_compared_where_answers_are_or_everywhere(reduce):
    model, base, pair = causal()
    task, batch = tasks.causal(), causal_batch()
    loss = jax.jit(mutual.objective(model, task, base, ensemble=jnp.float32(0.3), kl_reduce=reduce, kl_weight=2.0))
    total, metrics = loss(pair, batch, KEY)
    bare = {name: batch.inputs[name] for name in ("tokens", "mask")}
    whole = [np.asarray(jax.jit(model.apply)(base, own, bare)) for own in pair]
    own = [np.take_along_axis(logits, np.asarray(batch.inputs["chosen"])[..., None], 1) for logits in whole]
    if reduce == "tokens":
        rows = [(logits[0, 0], logits[0, 1], logits[1, 0]) for logits in own]
    else:
        rows = [np.concatenate([logits[0], logits[1, :5]]) for logits in whole]
    apart = [np.mean(kl(np.stack(rows[teacher]), np.stack(rows[1 - teacher]))) for teacher in (0, 1)]
    apart = [value / (decoder.VOCABULARY if reduce == "elements" else 1) for value in apart]
    np.testing.assert_allclose(metrics["kl"], np.mean(apart), rtol=1e-4)

    def entropy(logits):
        picked = special.log_softmax(logits, -1)
        return -np.mean([picked[0, 0, 7], picked[0, 1, 8], picked[1, 0, 9]])

    expected = {"private_loss": entropy(own[0]), "loss": entropy(own[1])}
    expected["ensemble_loss"] = entropy(0.3 * own[0] + 0.7 * own[1])
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
    np.testing.assert_allclose(total, sum(expected.values()) + 2 * sum(apart), rtol=1e-4)


def test_other_tasks_are_refused():
    model = MODEL._replace(apply=lambda base, adapters, inputs, key=None: jnp.zeros((4, 6, 2)))
    method = mutual.fedmutual(model, tasks.span(), init_adapters(), SGD)
    server = method.init(KEY)
    labels = {"span": np.zeros((3, 4, 2), np.int32), "context": np.ones((3, 4, 2), np.int32)}
    with pytest.raises(ValueError, match="mutual learning compares classes or next tokens"):
        method.client_update({}, server, method.init_client(server, 0, KEY), data(0).replace(labels=labels), KEY)


@both
def test_a_round_is_a_loop_over_the_two_losses(name):
    """Each model by itself, on the loss of the paper, with the other's logits computed beforehand."""
    method, base, state = make(name), federation.base(), played(name)
    server, client = state.server, client_of(state, 4)
    after, upload, metrics = updated(method)(base, server, client, data(4, 2), KEY)
    weight, apen = after.weight, name == "fedapen"
    scale = fixed(server.adapters)

    @jax.jit
    def step(own, other, share, batch):
        answer = MODEL.apply(base, trees.join(other, scale), batch.inputs)

        def loss(own):
            logits = MODEL.apply(base, trees.join(own, scale), batch.inputs)
            p, q = jax.nn.softmax(answer), jax.nn.softmax(logits)
            losses = TASK.loss(logits, batch.labels) + jnp.sum(p * (jnp.log(p) - jnp.log(q)), -1)
            if apen:
                losses += TASK.loss(share * logits + (1 - share) * answer, batch.labels)
            return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

        return trees.subtract(own, trees.scale(jax.grad(loss)(own), 0.5))

    private, shared = client.private, trained(server.adapters)
    batches = data(4, 2).replace(constants={})
    for index in np.flatnonzero(batches.weights.any(-1)):
        batch = jax.tree.map(lambda leaf: leaf[index], batches)  # noqa: B023
        private, shared = step(private, shared, weight, batch), step(shared, private, 1 - weight, batch)
    assert_close(after.private, private, 1e-5)
    assert_close(trees.add(trained(server.adapters), upload), shared, 1e-5)
    assert ("weight" in metrics) == apen
    assert (float(weight) != 0.5) == apen


def test_without_divergence_the_shared_model_is_fedits_and_the_private_one_local():
    init = init_adapters(dropout=0.3)
    method = mutual.fedmutual(MODEL, TASK, init, SGD, kl_weight=0.0)
    fedit = fedavg.fedit(MODEL, TASK, init, SGD, weighting="uniform")
    ours, theirs = (federation.run(one, SOME)[0] for one in (method, fedit))
    assert_close(ours.server.adapters, theirs.server.adapters, 1e-6)
    private = client_of(ours, 4).private
    # What another client does is nothing to it.
    other = federation.begin(method)
    for index in range(2):
        other, _ = federation.play(method, other, index, [4, 1, 5, 0])
    assert_close(client_of(other, 4).private, private, 1e-6)


@both
def test_a_client_keeps_its_own_and_sends_the_shared(name):
    method, state = make(name), played(name)
    _, upload, _ = jax.eval_shape(
        method.client_update, federation.base(), state.server, client_of(state, 4), data(4), KEY
    )
    assert jax.tree.structure(upload) == jax.tree.structure(trained(state.server.adapters))
    size = adapters.count(init_adapters()(KEY))
    assert method.traffic(state.server) == (size, size)
    first, second = (adapters.nodes(client_of(state, client).private) for client in (4, 0))
    site = ("encoder", "layer", "query")
    assert (first[site].a != second[site].a).all()
    # A client that took no part has its own start.
    starts = [method.init_client(state.server, client, jax.random.fold_in(KEY, client)) for client in (1, 5)]
    nodes = [adapters.nodes(start.private)[site] for start in starts]
    assert (nodes[0].a != nodes[1].a).all() and not nodes[0].b.any()
    assert float(starts[0].weight) == 0.5


def test_optimizers_do_not_see_each_other():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    each = mutual._each(clipped)
    pair, gradients = (jnp.ones(3), jnp.ones(3)), (jnp.full(3, 100.0), jnp.array([0.1, 0.0, -0.1]))
    updates, states = each.update(gradients, each.init(pair), pair)
    for own, gradient, update, state in zip(pair, gradients, updates, states, strict=True):
        assert_same((update, state), clipped.update(gradient, clipped.init(own), own))


@both
def test_clients_are_evaluated_with_both(name):
    method, base, state = make(name), federation.base(), played(name)
    client, inputs = client_of(state, 4), jax.tree.map(lambda leaf: leaf[0], data(1).inputs)
    personalize = jax.jit(method.personalize)
    received = personalize(base, state.server, client, none(4), KEY)
    adapters.check_sites(received, base)
    scale = fixed(state.server.adapters)
    private, shared = (
        toy.model().apply(base, own, inputs) for own in (trees.join(client.private, scale), state.server.adapters)
    )
    weight = float(client.weight)
    assert (weight == 0.5) == (name == "fedmutual")
    assert_close(MODEL.apply(base, received, inputs), weight * private + (1 - weight) * shared, 1e-5)
    assert np.abs(private - shared).max() > 1e-2
    before = snapshot((state.server, client))
    tuned = personalize(base, state.server, client, data(4, 2), KEY)
    assert np.abs(MODEL.apply(base, tuned, inputs) - MODEL.apply(base, received, inputs)).max() > 1e-3
    assert_same((state.server, client), before)
    # Both halves are those of the client's own round, and w is fitted anew to them.
    after, upload, _ = updated(make(name, **({"fit_epochs": 0} if name == "fedapen" else {})))(
        base, state.server, client, data(4, 2), KEY
    )
    nodes = adapters.nodes(tuned).values()
    for half, expected in (("private", after.private), ("shared", trees.add(trained(state.server.adapters), upload))):
        found = adapters.nest({path: getattr(node, half) for path, node in adapters.nodes(tuned).items()})
        assert_close(trained(found), expected, 1e-5)
    weights = {float(node.weight) for node in nodes}
    assert len(weights) == 1 and (weights != {weight}) == (name == "fedapen")


def aux(client, steps=4):
    texts = jax.tree.map(lambda leaf: leaf[client], toy.batches(9, CLIENTS, steps=steps))
    return {"inputs": texts.inputs, "labels": texts.labels, "weights": texts.weights}


def with_aux(client, **changes):
    batches = data(client)
    return batches.replace(constants=batches.constants | {"aux": aux(client) | changes})


def test_w_takes_clipped_steps_of_adam_on_held_out_examples():
    state, base = played("fedmutual"), federation.base()
    client, held = client_of(state, 4), aux(4)
    pair = [trees.join(client.private, fixed(state.server.adapters)), state.server.adapters]
    answers = [
        [
            np.asarray(MODEL.apply(base, own, jax.tree.map(lambda leaf: leaf[index], held["inputs"])))  # noqa: B023
            for index in range(4)
        ]
        for own in pair
    ]
    weight, m, v, count = 0.5, 0.0, 0.0, 0
    for _ in range(5):
        for private, shared, labels in zip(*answers, held["labels"], strict=True):
            right = np.eye(toy.CLASSES)[labels]
            off = special.softmax(weight * private + (1 - weight) * shared, -1) - right
            slope = np.mean(np.sum(off * (private - shared), -1))
            m, v, count = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2, count + 1
            move = 0.05 * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)) ** 0.5 + 1e-6)
            weight = min(max(weight - move, 0.0), 1.0)
    method = make("fedapen", fit_on="aux", fit_epochs=5, fit_rate=0.05)
    found = jax.jit(method.personalize)(base, state.server, client, none(4).replace(constants={"aux": held}), KEY)
    assert 0.01 < weight < 0.99 and abs(weight - 0.5) > 0.05
    for node in adapters.nodes(found).values():
        assert float(node.weight) == pytest.approx(weight, abs=1e-4)
    # It is fitted to what is received before training, and kept.
    after = updated(method)(base, state.server, client, with_aux(4), KEY)[0]
    assert float(after.weight) == pytest.approx(weight, abs=1e-4)
    unmoved = updated(method)(base, state.server, client, with_aux(4, weights=0 * held["weights"]), KEY)[0]
    assert float(unmoved.weight) == 0.5


def test_w_stays_in_its_interval():
    state, base = played("fedmutual"), federation.base()
    good, bad = state.server.adapters, trees.scale(trained(state.server.adapters), -3.0)
    bad = trees.join(bad, fixed(good))
    texts = jax.tree.map(lambda leaf: leaf[:3], data(4).replace(constants={}, width=np.zeros(3, np.int32)))
    fit = jax.jit(lambda pair: mutual.fit_weight(MODEL, TASK, base, pair, jnp.float32(0.5), texts, epochs=6, rate=0.3))
    assert float(fit((good, bad))) == 1.0 and float(fit((bad, good))) == 0.0


def test_ensembles_generate_from_their_mixed_logits():
    model, base, pair = causal()
    mixed, inputs = mutual.ensembled(model), decoder.inputs(lengths=(4, 2), width=4)
    nodes = [adapters.nodes(own) for own in pair]
    node = adapters.nest({path: mutual.Pair(nodes[0][path], nodes[1][path], jnp.float32(0.3)) for path in nodes[0]})
    settings = {"new_tokens": 3, "end": (), "pad": 0}
    found, _ = jax.jit(generate.make_generate(mixed, **settings))(base, node, inputs)
    apply = jax.jit(model.apply)
    for row, length in enumerate((4, 2)):
        text = np.asarray(inputs["tokens"])[row, :length].tolist()
        for step in range(3):
            padded = {"tokens": jnp.asarray([text + [0] * (7 - len(text))]), "mask": jnp.arange(7)[None] < len(text)}
            private, shared = (apply(base, own, padded)[0, len(text) - 1] for own in pair)
            text.append(int(jnp.argmax(0.3 * private + 0.7 * shared)))
            assert text[-1] == found[row, step]
    # Plain adapters are the model's own affair.
    cache = mixed.init_cache(2, 4)
    logits, cache = mixed.decode(base, pair[0], cache, inputs)
    expected, own = model.decode(base, pair[0], model.init_cache(2, 4), inputs)
    assert_same((logits, cache[0]), (expected, own))
    assert_same(mixed.apply(base, pair[0], inputs), model.apply(base, pair[0], inputs))


def test_models_that_are_not_ensembled_say_so():
    state = played("fedmutual")
    node = make("fedmutual").personalize(federation.base(), state.server, client_of(state, 4), none(4), KEY)
    with pytest.raises(ValueError, match="taken apart by `mutual.ensembled`"):
        adapters.nodes(node)[("classifier",)](jnp.zeros((1, toy.WIDTH)))
    with pytest.raises(ValueError, match="cannot be merged into the weights of one"):
        adapters.merge(federation.base(), node)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("fedmutual", {"kl_reduce": "batch"}, "algorithm.kl_reduce is 'batch', expected one of tokens, elements"),
        ("fedmutual", {"kl_weight": -1.0}, "algorithm.kl_weight is -1.0, expected 0 or more"),
        ("fedmutual", {"weighting": "size"}, "algorithm.weighting is 'size'"),
        ("fedapen", {"fit_on": "test"}, "algorithm.fit_on is 'test', expected one of aux, train"),
        ("fedapen", {"fit_epochs": -1}, "algorithm.fit_epochs is -1, expected 0 or more"),
        ("fedapen", {"fit_rate": 0.0}, "algorithm.fit_rate is 0.0, expected a positive number"),
    ],
)
def test_mistakes(name, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(name, **changes)

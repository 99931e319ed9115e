"""PF2LoRA's settings: what it is without one of its parts, what stays with clients, and what is refused."""

import functools

import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same, play, snapshot

from fedjax_peft import adapters, local, ranks, spectra, tasks, trees
from fedjax_peft.algorithms import fedavg, pf2lora

MODEL, TASK, SGD, ADAM = toy.model(), tasks.classification(), optax.sgd(0.5), optax.adam(0.02)
SITE = ("encoder", "layer", "query")


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"rank": 3, "alpha": 6.0, "targets": "query"} | settings)


def make(optimizer=SGD, **settings):
    return pf2lora.pf2lora(MODEL, TASK, init_adapters(), optimizer, **{"client_rate": 0.3} | settings)


def rounds_of(method, count=3):
    state = federation.begin(method)
    for index in range(count):
        state, _ = play(method, state, index, [4, 0, 3, 2])
    return state


@functools.cache
def ordinary():
    """The method as it comes, and its state after three rounds."""
    method = make()
    return method, snapshot(rounds_of(method))


def one_client(steps=slice(None), client=0):
    """The batches of one client in the first round."""
    data = jax.tree.map(lambda leaf: leaf[0], federation.data(0, [client]))
    return jax.tree.map(lambda leaf: leaf[steps], data.replace(constants={}))


def updating(method, base=None):
    return jax.jit(functools.partial(method.client_update, federation.base() if base is None else base))


def doubled(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def begun(method):
    """(server, client) in double precision."""
    server = doubled(method.init(jax.random.key(0)))
    return server, doubled(method.init_client(server, 0, jax.random.key(1)))


@pytest.fixture
def double():
    federation.base()  # in single precision, for the tests to come
    with jax.enable_x64():
        yield doubled(federation.base())


def test_a_client_alone_is_the_mean():
    method = make()
    before = federation.begin(method)
    received = snapshot(before.server.common)
    client = method.init_client(before.server, 0, jax.random.key(1))
    _, upload, _ = method.client_update(
        federation.base(),
        before.server,
        client,
        jax.tree.map(lambda leaf: leaf[0], federation.data(0, [0])),
        jax.random.key(3),
    )
    sums = method.fold(jax.tree.map(lambda leaf: leaf[None], upload), toy.cohort([0]))
    server, _ = method.server_update(before.server, sums)
    assert_close(
        trees.select(server.common, adapters.is_trained),
        trees.add(trees.select(received, adapters.is_trained), upload),
        0,
    )
    # What the loop evaluates between rounds.
    assert_same(method.shared(server), server.common)


def trained_twice(method, base):
    """(what the server shares, moments of both clients) after two rounds of clients with 12 and 5 examples."""
    (server, first), update = begun(method), updating(method, base)
    clients = [first, first]
    for index in range(2):
        told = [
            update(server, client, one_client(client=at), jax.random.key(index))
            for at, client in zip((0, 2), clients, strict=True)
        ]
        clients = [client for client, *_ in told]
        uploads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(upload for _, upload, _ in told))
        server = method.server_update(server, method.fold(uploads, toy.cohort([0, 2], examples=[12, 5])))[0]
    return method.shared(server), [client.optimizer for client in clients]


@functools.cache
def homlora(**settings):
    with jax.enable_x64():
        return jax.device_get(
            trained_twice(fedavg.fedit(MODEL, TASK, init_adapters(), ADAM, **settings), doubled(federation.base()))
        )


@pytest.mark.parametrize(
    ("settings", "common"),
    [
        ({"client_rank": 0}, {"keep_optimizer": True, "weighting": "uniform"}),
        ({"client_rate": 0.0}, {"keep_optimizer": True, "weighting": "uniform"}),
        ({"client_rank": 0}, {"keep_optimizer": False, "weighting": "examples"}),
    ],
    ids=["no ranks", "no step", "moments afresh, by examples"],
)
def test_without_a_personal_adapter_it_is_homlora(double, settings, common):
    found = trained_twice(make(ADAM, shared_batch=True, **settings, **common), double)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), jax.device_get(found), homlora(**common)
    )
    counts = [moments[0].count for moments in found[1] if moments]
    assert counts == ([6, 4] if common["keep_optimizer"] else [])


@pytest.mark.parametrize("order", ["fo", "joint"])
def test_equal_clients_that_average_after_each_step_are_one_machine(double, order):
    method = make(hypergradient=order, identical=True)
    (server, client), update = begun(method), updating(method, double)
    alone, path, _ = update(server, client, one_client(), jax.random.key(0))
    expected = trees.add(adapters.trained(server.common), path)
    assert trees.squared_norm(path) > 0.01
    for step in range(3):
        client, upload, _ = update(server, client, one_client(slice(step, step + 1)), jax.random.key(0))
        uploads = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), upload)
        server, _ = method.server_update(server, method.fold(uploads, toy.cohort([0, 1])))
    for x, y in ((adapters.trained(server.common), expected), (client.personal, alone.personal)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), x, y)


def test_a_client_without_a_personal_step_keeps_its_adapter():
    method = make(client_rate=0.0)
    state = rounds_of(method, 1)
    after, _ = play(method, snapshot(state), 1, [4, 0, 3, 2])
    assert_same(after.population.states.personal, state.population.states.personal)


def test_with_a_frozen_common_adapter_clients_are_alone():
    method = make(optax.sgd(0.0))
    together = rounds_of(method)
    alone = federation.begin(method)
    for index in range(3):
        alone, _ = play(method, alone, index, [federation.PADDING, 0, federation.PADDING, federation.PADDING])
    assert_same(together.server.common, federation.begin(method).server.common)
    assert_close(*(jax.tree.map(lambda leaf: leaf[0], s.population.states.personal) for s in (together, alone)), 1e-6)


def test_personal_adapters_differ_and_never_leave():
    method, state = ordinary()
    personal = adapters.nodes(state.population.states.personal)[SITE]
    assert len({client.tobytes() for client in personal.a[[0, 2, 3, 4]]}) == 4
    assert method.traffic(state.server) == (adapters.count(state.server.common),) * 2
    same = make(identical=True)
    server = same.init(jax.random.key(0))
    drawn = [same.init_client(server, client, jax.random.key(client)).personal for client in range(2)]
    assert_same(*drawn)


@pytest.mark.parametrize("identical", [False, True])
def test_adapters_that_start_afresh_forget_the_last_round(identical):
    method = make(reset=True, identical=identical, client_rate=0.0)
    server, update = method.init(jax.random.key(0)), updating(method)
    client = method.init_client(server, 0, jax.random.key(1))
    moved = trees.scale(adapters.trained(client.personal), 2.0)
    other = client.replace(personal=trees.join(moved, adapters.fixed(client.personal)))
    results = [update(server, own, one_client(), jax.random.key(2))[:2] for own in (client, other)]
    assert_same(*results)
    begun = [adapters.nodes(own.personal)[SITE].a for own in (results[0][0], server, client)]
    equal = [np.array_equal(begun[0], a) for a in begun[1:]]
    assert equal == [identical, identical]  # without a step they are as they were drawn


def test_new_clients_adapt_at_a_rate_of_their_own():
    method, batch = make(personal_rate=2.0), one_client(slice(1))
    server = method.init(jax.random.key(0))
    client = method.init_client(server, 0, jax.random.key(1))
    loss, fixed = local.objective(MODEL, TASK, federation.base()), adapters.fixed(client.personal)

    def objective(y):
        first = jax.tree.map(lambda leaf: leaf[0], batch)
        return loss(adapters.concat(server.common, trees.join(y, fixed)), first, None)[0]

    y = adapters.trained(client.personal)
    expected = trees.subtract(y, trees.scale(jax.grad(objective)(y), 2.0 * 0.3))
    found = method.personalize(federation.base(), server, client, batch, jax.random.key(2))
    assert_close(found, adapters.concat(server.common, trees.join(expected, fixed)), 1e-6)
    assert trees.squared_norm(trees.subtract(expected, y)) > 1e-4


def test_known_clients_keep_what_they_have_and_new_ones_adapt():
    method, state = ordinary()
    support = federation.data(5, [0])
    one = jax.tree.map(lambda leaf: leaf[0], support)
    known = jax.tree.map(lambda leaf: leaf[0], state.population.states)
    own = method.personalize(federation.base(), state.server, known, one, jax.random.key(0))
    assert_same(jax.device_get(own), jax.device_get(adapters.concat(state.server.common, known.personal)))
    fresh = method.init_client(state.server, 1, jax.random.key(3))
    tuned = method.personalize(federation.base(), state.server, fresh, one, jax.random.key(0))
    before, after = (adapters.nodes(tree)["encoder", "layer", "query"] for tree in (fresh.personal, tuned))
    assert not before.b.any() and after.b[..., 3:, :].any()
    assert_same(
        *(
            jax.device_get(tree)
            for tree in (_common(after), _common(adapters.nodes(state.server.common)["encoder", "layer", "query"]))
        )
    )
    eager = make(adapt_known=True).personalize(federation.base(), state.server, known, one, jax.random.key(0))
    assert np.any(
        adapters.nodes(eager)["encoder", "layer", "query"].b != adapters.nodes(own)["encoder", "layer", "query"].b
    )


def _common(node):
    return node.a[..., :3], node.b[..., :3, :]


def test_a_personal_head_stays_with_its_client():
    state = rounds_of(make(personal_head=True))
    assert set(adapters.nodes(state.server.common)) == {("encoder", "layer", "query")}
    heads = adapters.nodes(state.population.states.personal)["classifier",].kernel
    assert heads[0].any() and not np.array_equal(heads[0], heads[3])


def test_scales_are_shared_or_own():
    for settings, expected in (({}, 2.0), ({"personal_alpha": 5.0}, 2.5)):
        client = make(**settings).init_client(make().init(jax.random.key(0)), 0, jax.random.key(1))
        np.testing.assert_allclose(adapters.nodes(client.personal)["encoder", "layer", "query"].scale, expected)


def test_merging_gives_the_same_logits_and_the_rank_is_bounded():
    _, state = ordinary()
    client = jax.tree.map(lambda leaf: leaf[4], state.population.states)
    both = adapters.concat(state.server.common, client.personal)
    inputs = jax.tree.map(lambda leaf: leaf[0, 0], federation.data(0, [4]).inputs)
    merged = adapters.merge(federation.base(), both)
    logits = MODEL.apply(merged, {}, inputs)
    np.testing.assert_allclose(logits, MODEL.apply(federation.base(), both, inputs), atol=1e-5)
    kernels = [tree["encoder"]["layer"]["query"]["kernel"] for tree in (merged, federation.base())]
    # Of 12 x 12 matrices, which could have any rank: 3 - 2 to 3 + 2.
    dense = np.linalg.svd(np.subtract(*kernels), compute_uv=False)
    found = spectra.describe(ranks.layout(state.server.common), both, 1e-4)
    assert dense.shape == (toy.LAYERS, toy.WIDTH)
    np.testing.assert_array_equal((dense > 1e-4 * dense[:, :1]).sum(-1), found["rank_sum"])
    np.testing.assert_allclose(dense[:, :5], found["singular_sum"], rtol=1e-3, atol=1e-6)
    assert np.all(found["rank_sum"] <= 5) and np.all(found["rank_sum"] >= 1)
    assert np.all(found["rank_common"] == 3) and np.all(found["rank_personal"] == 2)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"client_rank": -1}, "algorithm.client_rank is -1, expected 0 to 12"),
        ({"client_rank": 13}, "algorithm.client_rank is 13, expected 0 to 12, the smallest side of a site"),
        ({"client_rate": -0.1}, "algorithm.client_rate is -0.1"),
        ({"hypergradient": "third"}, "algorithm.hypergradient is 'third', expected one of so, fo, joint"),
        ({"hvp": "guess"}, "algorithm.hvp is 'guess', expected one of jvp, fd, revrev"),
        ({"fd_eps": 0.0}, "algorithm.fd_eps is 0.0, expected a positive length"),
        ({"weighting": "size"}, "algorithm.weighting is 'size'"),
    ],
)
def test_mistakes_get_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**settings)


@pytest.mark.parametrize("head", ["lora", "frozen"])
def test_a_personal_head_must_be_dense(head):
    with pytest.raises(ValueError, match="algorithm.personal_head is True, which expects a dense head: adapter.head"):
        pf2lora.pf2lora(MODEL, TASK, init_adapters(head=head), SGD, personal_head=True)


def test_other_kinds_of_adapters_get_a_sentence():
    with pytest.raises(ValueError, match="adapter.kind must be 'lora'"):
        pf2lora.pf2lora(MODEL, TASK, init_adapters(kind="full"), SGD)

"""HETLoRA: ranks that only fall, arrays that are zero beyond them, and means that count what clients learnt."""

import functools

import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same

from fedjax_peft import adapters, tasks, trees
from fedjax_peft.algorithms import fedavg, hetlora

MODEL, TASK, SGD, ADAM = toy.model(), tasks.classification(), optax.sgd(0.5), optax.adam(0.02)
RANK, LEAST = 6, 2


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    known = {"rank": RANK, "alpha": 4.0, "targets": "query"}
    return functools.partial(adapters.init, shapes=shapes, **known | settings)


def make(optimizer=SGD, init=None, **settings):
    known = {"clients": federation.CLIENTS, "rank_min": LEAST, "gamma": 0.7}
    return hetlora.hetlora(MODEL, TASK, init or init_adapters(), optimizer, **known | settings)


def lora(tree):
    return tree["encoder"]["layer"]["query"]["delta"]


def generic(seed: int, clients: int | None = None):
    """Adapters with noise in every array; `[C, ..]` with `clients`."""
    start = init_adapters()(jax.random.key(seed))
    noise = iter(jax.random.split(jax.random.key(seed + 100), 100))
    leading = () if clients is None else (clients,)
    return jax.tree.map(lambda leaf: jax.random.normal(next(noise), (*leading, *leaf.shape)), start)


def trained(tree):
    return trees.select(tree, lambda leaf: leaf != "scale")


def merged(method, server, uploads, **settings):
    """The server's adapters after a round with these uploads."""
    clients = jax.tree.leaves(uploads)[0].shape[0]
    sums = method.fold(uploads, toy.cohort(list(range(clients)), **settings))
    return method.server_update(server, sums)[0].adapters


def test_initial_ranks_are_spread_over_the_ids():
    ranks = hetlora.spread(6, 10, 8)
    assert [int(ranks(jnp.int32(client))) for client in range(8)] == [6, 7, 7, 8, 8, 9, 9, 10]
    assert int(ranks(jnp.int32(8))) == 10  # an empty slot
    method = make(clients=lambda client_id: 100 * client_id)
    server = method.init(jax.random.key(0))
    assert [int(method.init_client(server, jnp.int32(i), jax.random.key(0)).rank) for i in (0, 1)] == [LEAST, RANK]


def test_tails_begin_at_the_floor():
    assert hetlora.tail_starts(0.99, 100).tolist() == [0, *range(100)]
    assert hetlora.tail_starts(0.29, 100)[100] == 29  # 28.999999999999996 in floating point
    assert hetlora.tail_starts(0.85, 8).tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6]


def test_cutting_what_was_padded_gives_it_back():
    small = init_adapters(rank=4)(jax.random.key(0))
    padded = adapters.nest(
        {
            path: node.replace(**{name: _pad(getattr(node, name), axis) for name, axis in hetlora.RANK_AXES.items()})
            if isinstance(node, adapters.LoRA)
            else node
            for path, node in adapters.nodes(small).items()
        }
    )
    assert_same(hetlora.between(padded, 0, 4), padded)
    nan = jax.tree.map(lambda leaf: jnp.where(leaf == 0, jnp.nan, leaf), padded)
    cut = hetlora.between(nan, 0, 4)
    assert not np.any(lora(cut).a[..., 4:]) and not np.any(lora(cut).b[..., 4:, :])  # selected, not multiplied
    moments = ADAM.init(trained(generic(0)))
    cut = hetlora.between(jax.tree.map(jnp.ones_like, moments), 0, 4)
    assert [np.sum(lora(tree).a[0, 0]) for tree in (cut[0].mu, cut[0].nu)] == [4, 4] and cut[0].count == 1


def _pad(leaf, axis):
    widths = [(0, 0)] * leaf.ndim
    widths[axis] = (0, RANK - leaf.shape[axis])
    return jnp.pad(leaf, widths)


def test_norm_of_products_is_the_dense_one():
    tree = generic(0, clients=3)
    dense = np.einsum("cldr,clrf->cldf", lora(tree).a, lora(tree).b)
    np.testing.assert_allclose(hetlora.product_norm(tree), np.sqrt((dense**2).sum((1, 2, 3))), rtol=1e-5)


def test_tail_is_a_sum_over_layers_with_a_gradient_where_b_is_zero():
    tree, start = generic(0), init_adapters()(jax.random.key(0))
    a, b = np.asarray(lora(tree).a)[..., 3:5], np.asarray(lora(tree).b)[..., 3:5, :]
    expected = sum(np.linalg.norm(a[layer]) * np.linalg.norm(b[layer]) for layer in range(toy.LAYERS))
    np.testing.assert_allclose(hetlora.tail_norm(tree, 3, 5, 1e-8), expected, rtol=1e-5)
    slope = jax.grad(lambda tree: hetlora.tail_norm(tree, 3, 5, 1e-8))(start)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope)) and np.any(lora(slope).a[..., 3:5])
    assert not np.any(lora(slope).a[..., :3]) and not np.any(lora(slope).a[..., 5:])


def test_ranks_fall_only_if_the_tail_does():
    fall = functools.partial(hetlora.pruned, jnp.int32(5), jnp.int32(3))
    one, less = jnp.float32(1.0), jnp.float32(0.9)
    assert [int(fall(before, after, 2)) for before, after in ((one, less), (one, one), (less, one))] == [3, 5, 5]
    assert int(fall(one, less, 4)) == 4
    assert int(fall(one, jnp.float32(np.nan), 2)) == 5


def test_factors_count_by_their_norm_and_heads_alike():
    method, uploads = make(), trained(generic(0, clients=3))
    server = method.init(jax.random.key(0))
    found = merged(method, server, uploads, examples=[1, 10, 100])
    norms = hetlora.product_norm(uploads)
    for name in ("a", "b"):
        weighted = np.average(getattr(lora(uploads), name), axis=0, weights=norms)
        np.testing.assert_allclose(getattr(lora(found), name), weighted, rtol=1e-4, atol=1e-6)
    kernel = uploads["classifier"]["delta"].kernel
    np.testing.assert_allclose(found["classifier"]["delta"].kernel, kernel.mean(0), rtol=1e-4, atol=1e-6)
    assert_same(lora(found).scale, lora(server.adapters).scale)
    # Weights sum to one: what all clients have is what comes out.
    alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), uploads)
    assert_close(trained(merged(method, server, alike)), jax.tree.map(lambda leaf: leaf[0], alike), 1e-5)


def test_without_any_norm_all_count_alike():
    method, uploads = make(), trained(generic(0, clients=3))
    path = uploads["encoder"]["layer"]["query"]
    path["delta"] = path["delta"].replace(b=jnp.zeros_like(path["delta"].b))
    found = merged(method, method.init(jax.random.key(0)), uploads)
    assert_close(trained(found), jax.tree.map(lambda leaf: leaf.mean(0), uploads), 1e-6)


def test_traffic_is_that_of_a_clients_ranks():
    method, client = make(), 1
    server = method.init(jax.random.key(0))
    start = method.init_client(server, client, jax.random.key(1))
    batches = jax.tree.map(lambda leaf: leaf[0], federation.data(0, [client]))
    after, upload, metrics = method.client_update(federation.base(), server, start, batches, jax.random.key(2))
    head = sum(leaf.size for leaf in jax.tree.leaves(upload)) - lora(upload).a.size - lora(upload).b.size
    # As many numbers as are not cut away: A is nowhere zero by itself, and B has as many ranks.
    kept = np.count_nonzero(lora(upload).a) * (1 + lora(upload).b.shape[-1] / lora(upload).a.shape[-2])
    assert metrics["sent"] == head + kept and metrics["received"] > metrics["sent"] * (after.rank < start.rank)
    most = method.traffic(server)
    assert metrics["received"] == most[0] - (most[0] - head) * (RANK - int(start.rank)) // RANK


def test_who_did_not_report_does_not_count():
    method, uploads = make(), trained(generic(0, clients=3))
    server = method.init(jax.random.key(0))
    gone = jax.tree.map(lambda leaf: leaf.at[2].set(0), uploads)
    found = merged(method, server, gone, reported=[True, True, False])
    assert_close(found, merged(method, server, jax.tree.map(lambda leaf: leaf[:2], uploads)), 1e-5)


@functools.cache
def played(optimizer=ADAM):
    """States after each of five rounds of all clients."""
    method, states = make(optimizer), []
    state = federation.begin(method)
    for index in range(5):
        state, _ = federation.play(method, state, index, list(range(federation.CLIENTS)))
        states.append(federation.snapshot(state))
    return method, states


def test_ranks_never_grow_and_stop_at_the_least():
    _, states = played()
    ranks = np.stack([state.population.states.rank for state in states])
    start = [2, 3, 4, 4, 5, 6]
    assert np.all(np.diff(np.concatenate([[start], ranks]), axis=0) <= 0) and ranks.min() >= LEAST
    assert ranks[-1].sum() < sum(start)


def test_beyond_its_rank_a_client_has_zeros():
    _, states = played()
    for state in states:
        clients = state.population.states
        beyond = np.arange(RANK) >= clients.rank[:, None]
        for tree in (clients.local, clients.optimizer[0].mu, clients.optimizer[0].nu):
            a, b = np.moveaxis(lora(tree).a, -1, 1), np.moveaxis(lora(tree).b, -2, 1)
            assert not a[beyond].any() and not b[beyond].any()
            assert np.abs(a).sum((0, 2, 3))[:LEAST].all() and np.abs(b).sum((0, 2, 3))[:LEAST].all()


def test_ranks_stay_without_pruning():
    method = make(prune=False)
    state, played = federation.run(method, list(range(federation.CLIENTS)))
    assert state.population.states.rank.tolist() == [2, 3, 4, 4, 5, 6]
    assert played.metrics["clients"]["rank"].tolist() == [2, 3, 4, 4, 5, 6]


def one_client():
    return jax.tree.map(lambda leaf: leaf[0], federation.data(0, [0]))


def update(method, server, client, key):
    return jax.jit(functools.partial(method.client_update, federation.base()))(server, client, one_client(), key)


def test_equal_ranks_and_norms_without_tails_are_homlora():
    method = make(ADAM, clients=lambda client_id: RANK, penalty=0.0, prune=False)
    homlora = fedavg.fedit(MODEL, TASK, init_adapters(), ADAM, weighting="uniform", keep_optimizer=True)
    server, other = (m.init(jax.random.key(0)) for m in (method, homlora))
    client, theirs = (m.init_client(s, 0, jax.random.key(0)) for m, s in ((method, server), (homlora, other)))
    for index in range(2):
        key = jax.random.key(index)
        client, upload, _ = update(method, server, client, key)
        theirs, change, _ = update(homlora, other, theirs, key)
        expected = trees.add(trained(other.adapters), change)
        assert_close(upload, expected, 1e-5)
        assert_close(client.optimizer, theirs.optimizer, 1e-5)
        # A rotation of the outputs makes another client whose product has the same norm.
        turn = jnp.linalg.qr(jax.random.normal(key, (toy.WIDTH, toy.WIDTH)))[0]
        uploads = _beside(upload, turn)
        sent = _beside(expected, turn)
        changes = jax.tree.map(lambda leaf, start: leaf - start[None], sent, trained(other.adapters))
        server = server.replace(adapters=merged(method, server, uploads))
        other = homlora.server_update(other, homlora.fold(changes, toy.cohort([0, 1])))[0]
        assert_close(server.adapters, other.adapters, 1e-5)


def _beside(upload, turn):
    node = lora(upload)
    turned = adapters.nodes(upload) | {("encoder", "layer", "query"): node.replace(b=node.b @ turn)}
    return jax.tree.map(lambda x, y: jnp.stack([x, y]), upload, adapters.nest(turned))


def test_clients_are_evaluated_with_what_they_sent():
    method, states = played()
    state = states[-1]
    server, client = state.server, jax.tree.map(lambda leaf: leaf[4], state.population.states)
    none = jax.tree.map(lambda leaf: leaf[:0], one_client().replace(constants={}))
    arguments = (federation.base(), server, client, none, jax.random.key(0))
    own = method.personalize(*arguments)
    assert_same(trained(own), client.local)
    assert np.count_nonzero(lora(own).scale[0]) == client.rank < RANK
    common = make(ADAM, evaluate_global=True).personalize(*arguments)
    assert_same(common, hetlora.between(server.adapters, 0, client.rank))
    new = method.init_client(server, jnp.int32(1), jax.random.key(0))
    assert_same(method.personalize(*arguments[:2], new, *arguments[3:]), hetlora.between(server.adapters, 0, 3))


def test_the_penalty_holds_the_tail_down():
    tails = []
    for penalty in (0.0, 0.1):
        method = make(clients=lambda client_id: RANK, penalty=penalty, prune=False)
        server = method.init(jax.random.key(0))
        client = method.init_client(server, 0, jax.random.key(0))
        tails.append(update(method, server, client, jax.random.key(0))[2]["tail"])
    assert tails[1] < tails[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_min": 0}, "rank_min is 0, expected 1 to adapter.rank, which is 6"),
        ({"rank_min": 7}, "rank_min is 7, expected 1 to adapter.rank, which is 6"),
        ({"clients": 0}, "clients is 0"),
        ({"gamma": 1.0}, "gamma is 1.0"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"init": init_adapters(kind="full")}, "adapter.kind 'lora'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)

"""FedAMoLE against numpy on whole arrays, FedIT, the published sizes, and the invariants of its assignment."""

import functools

import federation
import jax
import numpy as np
import optax
import pytest
import toy
from federation import CLIENTS, assert_close, assert_same, snapshot

from fedjax_peft import adapters, mixture, ranks, tasks, trees
from fedjax_peft.algorithms import expert_banks, expert_embeddings, fedamole, fedavg
from fedjax_peft.models import llama
from fedjax_peft.types import Batches

MODEL, TASK, SGD, KEY = toy.model(), tasks.classification(), optax.sgd(0.5), jax.random.key(5)
SITE = ("encoder", "layer", "query")
SOME = [4, 0, 3, 2]
NUMBERS = {"clients": CLIENTS, "experts": 7, "expert_choices": 2, "max_experts": 4, "embed_on": "train"}


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"rank": 3, "alpha": 6.0, "targets": "query"} | settings)


@functools.cache
def make(**settings):
    return fedamole.fedamole(MODEL, TASK, init_adapters(), SGD, **NUMBERS | settings)


@functools.cache
def start(method):
    """The server before the first round; the engine's part in it is tested in algorithms_test."""
    server = jax.jit(method.init)(jax.random.key(0))
    return snapshot(method.host_step(server) if method.host_step else server)


@functools.cache
def update(method):
    return jax.jit(method.client_update)


@functools.cache
def finish(method):
    return jax.jit(lambda server, uploads, cohort: method.server_update(server, method.fold(uploads, cohort)))


def uploaded(method, server, client, batches=None, index=0):
    """(upload, metrics) of a client."""
    own = method.init_client(server, client, KEY)
    batches = data(client, index) if batches is None else batches
    return snapshot(update(method)(federation.base(), server, own, batches, jax.random.fold_in(KEY, client))[1:])


def play(method, server, ids, index=0, changed=None, absent=()):
    """The server after a round of some clients, of which `absent` do not report."""
    changed = changed or {}
    uploads = [uploaded(method, server, client, changed.get(client), index)[0] for client in ids]
    reported = ~np.isin(ids, absent)
    uploads = jax.tree.map(
        lambda *leaves: np.stack([leaf * one for leaf, one in zip(leaves, reported, strict=True)]), *uploads
    )
    server, _ = finish(method)(server, uploads, toy.cohort(ids, federation.EXAMPLES[ids], reported))
    return snapshot(method.host_step(server) if method.host_step else server)


@functools.cache
def after_one(method):
    return play(method, start(method), SOME)


def data(client, index=0):
    return jax.tree.map(lambda leaf: leaf[0], federation.data(index, [client]))


def node_of(tree):
    return adapters.nodes(tree)[SITE]


def holders(slots):
    """[J, E] how many clients hold each expert, [J, N] how many experts each client holds."""
    held = np.asarray(slots)[..., None] == np.arange(NUMBERS["experts"])
    return held.sum((1, 2)), held.sum((2, 3))


@pytest.mark.parametrize("assign", ["data", "random", "static"])
def test_every_expert_has_its_clients_in_every_round(assign):
    method = make(assign=assign)
    server, tables = start(method), []
    for index in range(3):
        per_expert, per_client = holders(server.slots)
        assert (per_expert == 2).all()
        assert per_client.min() >= 2 and per_client.max() <= 4 and (per_client.sum(-1) == 14).all()
        tables.append(server.slots)
        server = play(method, server, SOME, index)
    for table in tables[1:]:
        assert np.array_equal(table, tables[0]) == (assign == "static")


def test_clients_of_a_homogeneous_federation_hold_equally_many():
    scores = np.random.default_rng(0).uniform(size=(toy.LAYERS, 9, CLIENTS))
    server = make(homogeneous=True, experts=9).host_step(start(make()).replace(scores=scores))
    np.testing.assert_array_equal(np.sum(server.slots < 9, -1), np.full((toy.LAYERS, CLIENTS), 3))
    np.testing.assert_array_equal(np.bincount(server.slots[0].ravel(), minlength=9), [2] * 9)


@pytest.mark.parametrize("settings", [{}, {"expert_choices": CLIENTS, "max_experts": 7, "weighting": "examples"}])
def test_means_are_over_those_that_hold(settings):
    method, ids = make(**settings), [4, 0, 3]
    before = start(method)
    after = play(method, before, [1, *ids], absent=(1,))
    weights = federation.EXAMPLES[ids] if settings else np.ones(len(ids))
    changes = [node_of(uploaded(method, before, client)[0].change) for client in ids]
    old, new = node_of(before.adapters), node_of(after.adapters)
    for layer, expert in np.ndindex(before.scores.shape[:2]):
        total, count = 0.0, 0.0
        for client, weight, change in zip(ids, weights, changes, strict=True):
            for slot in np.flatnonzero(before.slots[layer, client] == expert):
                total, count = total + weight * change.b[layer, slot], count + weight
        expected = old.b[layer, expert] + (total / count if count else 0)
        np.testing.assert_allclose(new.b[layer, expert], expected, rtol=1e-4, atol=1e-6)
    for leaf in (lambda node: node.router, lambda node: node.shared.b):
        mean = np.average([leaf(change) for change in changes], axis=0, weights=weights)
        np.testing.assert_allclose(leaf(new), leaf(old) + mean, rtol=1e-4, atol=1e-6)
    assert_same((new.scale, new.held), (old.scale, old.held))


def test_without_domain_experts_it_is_fedit():
    method = make(balance=0.0, assign="static")
    fedit = fedavg.fedit(MODEL, TASK, init_adapters(), SGD, weighting="uniform")
    ours, theirs = start(method), start(fedit)
    ours = ours.replace(slots=np.full_like(ours.slots, NUMBERS["experts"]), round=np.int32(1))
    for index in range(3):
        ours, theirs = play(method, ours, SOME, index), play(fedit, theirs, SOME, index)
    assert_same(method.shared(ours), theirs.adapters)
    assert np.abs(node_of(theirs.adapters).b).max() > 0.01
    assert_same(node_of(ours.adapters).b, np.zeros_like(node_of(ours.adapters).b))


def test_clients_that_change_nothing_leave_the_bank():
    method = make()
    before = after_one(method)
    nothing = {client: data(client) for client in SOME}
    nothing = {client: batches.replace(weights=0 * batches.weights) for client, batches in nothing.items()}
    assert_same(play(method, before, SOME, changed=nothing).adapters, before.adapters)


def test_equal_clients_that_hold_everything_are_one():
    method = make(expert_choices=CLIENTS, max_experts=7, assign="static", balance=0.1)
    before, alike = start(method), {client: data(4) for client in SOME}
    change = node_of(uploaded(method, before, 4)[0].change)
    after, old = node_of(play(method, before, SOME, changed=alike).adapters), node_of(before.adapters)
    # Slots stand in the order of the bank.
    for leaf in ("a", "b", "router"):
        assert_close(getattr(after, leaf), getattr(old, leaf) + getattr(change, leaf), 1e-6)
    assert_close(after.shared.b, old.shared.b + change.shared.b, 1e-6)
    assert (change.b != 0).any() and (change.router != 0).any()


def test_scores_are_products_of_mean_embeddings():
    method = make()
    slots, scores = start(method).slots, after_one(method).scores
    embeddings = [uploaded(method, start(method), client)[0].embeddings for client in SOME]
    for layer, expert in np.ndindex(scores.shape[:2]):
        keys = [
            adapters.nodes(own.experts)[SITE][layer, slot]
            for client, own in zip(SOME, embeddings, strict=True)
            for slot in np.flatnonzero(slots[layer, client] == expert)
        ]
        key = np.mean(keys, axis=0) if keys else np.zeros(3)
        expected = np.stack([adapters.nodes(own.client)[SITE][layer] for own in embeddings]) @ key / 3**0.5
        np.testing.assert_allclose(scores[layer, expert, SOME], expected, rtol=1e-4, atol=1e-6)
        # Clients 1 and 5 were never embedded.
        np.testing.assert_allclose(scores[layer, expert, [1, 5]], [expected.mean()] * 2, rtol=1e-4, atol=1e-6)


def test_a_client_that_stays_out_keeps_its_embedding():
    method = make()
    before, after = after_one(method).known, play(method, after_one(method), [1, 0, 2, 3], 1, absent=(2, 3)).known
    rows, old = (adapters.nodes(known.clients)[SITE] for known in (after, before))
    np.testing.assert_array_equal(rows[:, [2, 3, 4, 5]], old[:, [2, 3, 4, 5]])
    assert (rows[:, 0] != old[:, 0]).any() and (rows[:, 1] != old[:, 1]).any()
    np.testing.assert_array_equal(after.embedded, [True, True, True, True, True, False])


def test_a_client_without_a_token_says_nothing():
    """Its training counts; it is as if it had not been embedded, and experts are known from other holders."""
    method, server = make(), start(make())
    silent = data(3)
    silent.inputs["mask"][:] = False
    after = play(method, server, SOME, changed={3: silent})
    np.testing.assert_array_equal(after.known.embedded, np.isin(np.arange(CLIENTS), [4, 0, 2]))
    assert not adapters.nodes(after.known.clients)[SITE][:, 3].any()
    others = play(method, server, SOME, absent=(3,))
    assert_same(after.known, others.known)
    assert (node_of(after.adapters).shared.a != node_of(others.adapters).shared.a).any()
    noisy = uploaded(make(dp="corrected", dp_eta=50.0), server, 3, silent)[0].embeddings
    assert not any(leaf.any() for leaf in jax.tree.leaves(noisy))


def test_a_clients_data_speak_of_it_and_of_what_it_holds():
    method = make()
    server, other = start(method), data(3)
    other.inputs["tokens"][:] = (other.inputs["tokens"] + 5) % toy.VOCABULARY
    first, second = after_one(method).known, play(method, server, SOME, changed={3: other}).known
    rows = adapters.nodes(first.clients)[SITE] != adapters.nodes(second.clients)[SITE]
    np.testing.assert_array_equal(rows.any((0, 2)), np.arange(CLIENTS) == 3)
    keys = (adapters.nodes(first.experts)[SITE] != adapters.nodes(second.experts)[SITE]).any(-1)
    for layer in range(toy.LAYERS):
        assert set(np.flatnonzero(keys[layer])) == set(server.slots[layer, 3]) - {NUMBERS["experts"]}


def test_held_out_texts_embed_a_client():
    method, server = make(embed_on="aux"), start(make())

    def held_out(texts):
        aux = {"aux": {"inputs": texts.inputs, "weights": texts.weights}}
        return uploaded(method, server, 4, data(4).replace(constants=data(4).constants | aux))[0]

    own, other, trained = held_out(data(4)), held_out(data(2)), uploaded(make(), server, 4)[0]
    assert_close(own.embeddings, trained.embeddings, 1e-6)
    assert_same(own.change, other.change)
    gap = adapters.nodes(own.embeddings.client)[SITE] - adapters.nodes(other.embeddings.client)[SITE]
    assert np.abs(gap).max() > 1e-2
    with pytest.raises(ValueError, match="embed_on is 'aux', but clients have no constant 'aux'"):
        uploaded(method, server, 4)


def test_balance_is_summed_or_averaged_over_sites():
    summed, averaged = make(balance=0.5, assign="static"), make(balance=1.0, balance_reduce="mean", assign="static")
    plain = make(balance=0.0, assign="static")
    server = start(plain)
    # With as many experts as a token is sent to there is nothing to balance.
    held = np.sum(server.slots < NUMBERS["experts"], -1)
    many, few = int(np.argmax(held.min(0))), int(np.argmin(held.max(0)))
    assert held[:, many].min() > 2 and held[:, few].max() == 2
    uploads = [uploaded(method, server, many) for method in (summed, averaged, plain)]
    assert_close(uploads[0], uploads[1], 1e-6)
    assert np.abs(node_of(uploads[0][0].change).a - node_of(uploads[2][0].change).a).max() > 1e-5
    assert 0.5 < uploads[2][1]["balance"] < 2
    alike = [uploaded(method, server, few) for method in (summed, plain)]
    assert_same(*alike)
    assert alike[0][1]["balance"] == 1.0


@pytest.mark.parametrize("mask_padding", [True, False])
def test_load_balance_is_of_tokens_that_count(mask_padding):
    layout, server = ranks.layout(ranks.concrete(init_adapters())), start(make())
    own = mixture.gather(node_of(server.adapters), server.slots[:, 4])
    batch = jax.tree.map(lambda leaf: leaf[0], data(4).replace(constants={}))
    # The third text is shorter than the longest; the fourth, a padding example, is longer.
    batch.inputs["mask"][:] = np.arange(6) < np.array([5, 4, 2, 6])[:, None]
    batch = batch.replace(weights=np.array([1, 1, 1, 0], np.float32))
    trained, fixed = expert_banks.parted(adapters.nest({SITE: own}))
    loss = jax.jit(fedamole._objective(MODEL, TASK, federation.base(), fixed, layout, 0.25, mask_padding))
    total, metrics = loss(trained, batch, None)
    outputs, taps = jax.jit(MODEL.taps)(federation.base(), adapters.nest({SITE: own}), batch.inputs)
    counted = batch.inputs["mask"] if mask_padding else np.broadcast_to(np.arange(6) < 5, (4, 6))
    tap = expert_embeddings.at(taps, SITE)
    p, f = (np.asarray(tap[name])[:, :3][:, counted[:3]] for name in ("probabilities", "chosen"))
    uneven = np.sum(own.held.sum(-1) * np.sum(p.mean(1) * f.mean(1) / 2, -1))
    np.testing.assert_allclose(metrics["balance"], uneven / toy.LAYERS, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(TASK.loss(outputs, batch.labels)[:3]), rtol=1e-5)
    np.testing.assert_allclose(total, metrics["loss"] + 0.25 * uneven, rtol=1e-6)


def test_ablations_train_what_they_have():
    method = make(router="linear", shared_expert=False)
    before, after = start(method), after_one(method)
    node, old = node_of(after.adapters), node_of(before.adapters)
    assert node.router is None and node.shared is None
    held = holders(before.slots[:, SOME])[0] > 0
    np.testing.assert_array_equal((node.b != old.b).any((2, 3)), held)
    assert (node.rows != old.rows).any()
    rows = adapters.nodes(after.known.clients)[SITE]
    scores = np.einsum("led,lnd->len", node.rows, rows)[..., SOME]
    np.testing.assert_allclose(after.scores[..., SOME], scores, rtol=1e-4, atol=1e-5)
    assert set(adapters.nodes(method.shared(after))) == {("classifier",)}


def test_sizes_are_those_of_the_published_model():
    kernels = {"q_proj": (16, 2048, 2048), "v_proj": (16, 2048, 512)}
    shapes = {
        "layers": {
            "self_attn": {name: {"kernel": jax.ShapeDtypeStruct(size, "float32")} for name, size in kernels.items()}
        }
    }
    init = functools.partial(adapters.init, shapes=shapes, targets="q_proj,v_proj")
    shared = jax.eval_shape(init, jax.random.key(0))
    assert adapters.count(shared) == 851_968
    method = fedamole.fedamole(MODEL, TASK, init, SGD, clients=10)
    server = jax.eval_shape(method.init, jax.random.key(0))
    assert server.slots.shape == (32, 10, 8) and server.scores.shape == (32, 30, 10)
    ids, embeddings = 192, 32 * (6 + 1) * 8
    assert method.traffic(server) == (6_488_064 + ids, 6_488_064 + ids + embeddings)
    # In bfloat16 12.375 MiB and the ids, which stay as they are.
    halved = fedamole.fedamole(MODEL, TASK, init, SGD, clients=10, adapter_dtype="bfloat16")
    sent = [4 * words for words in halved.traffic(jax.eval_shape(halved.init, jax.random.key(0)))]
    assert sent == [6_488_064 * 2 + 4 * ids, (6_488_064 + embeddings) * 2 + 4 * ids]
    trained = trees.select(server.adapters, lambda leaf: leaf not in ("scale", "held"))
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 26_935_296


def test_a_step_costs_little_more_than_one_of_plain_lora():
    """With dropout, of a decoder with a quarter of the published width; embedding as many texts costs half a step."""
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 512, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 2048}
    model, task = llama.llama(config | {"max_position_embeddings": 32}), tasks.causal()
    base = jax.eval_shape(model.init, jax.random.key(0))
    init = functools.partial(adapters.init, shapes=base, rank=8, targets="q_proj,v_proj", dropout=0.05)
    inputs = {"tokens": np.zeros((1, 8, 32), np.int32), "mask": np.ones((1, 8, 32), bool)}
    inputs["chosen"] = np.zeros((1, 8, 16), np.int32)
    weights, aux = np.ones((1, 8), np.float32), {"aux": {"inputs": inputs, "weights": np.ones((1, 8), np.float32)}}
    batches = Batches(inputs, {"targets": inputs["chosen"]}, weights, np.zeros(1, np.int32), (32,), aux)

    def flops(method):
        server = jax.eval_shape(method.init, jax.random.key(0))
        client = jax.eval_shape(lambda server: method.init_client(server, 0, KEY), server)
        lowered = jax.jit(method.client_update).lower(base, server, client, batches, KEY)
        # Of a loop over layers one turn is counted, of all programs alike.
        return lowered.compile().cost_analysis()["flops"]

    plain = flops(fedavg.fedit(model, task, init, SGD))
    mixed, embedded = (
        flops(fedamole.fedamole(model, task, init, SGD, clients=10, **settings))
        for settings in ({"assign": "static"}, {"embed_on": "aux"})
    )
    assert 1.0 < mixed / plain <= 1.15
    # A forward pass on as many held-out texts as are trained on, which is what there is to embed a client by.
    assert 1.0 < embedded / plain <= 1.65


def test_adapters_of_sixteen_bits_stay_so_and_lose_small_steps():
    method = make(adapter_dtype="bfloat16", score_dtype="bfloat16")
    server = start(method)
    after = after_one(method)
    types = jax.tree.map(lambda leaf: leaf.dtype, (server, after))
    assert types[0] == types[1]
    node, plain = node_of(after.adapters), node_of(after_one(make()).adapters)
    assert {leaf.dtype.name for leaf in (node.a, node.b, node.router, node.shared.a)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in (node.scale, node.held)} == {"float32"}
    upload = uploaded(method, server, 4)[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(upload.embeddings)} == {"bfloat16"}
    np.testing.assert_allclose(node.b.astype(np.float32), plain.b, atol=0.02)
    moved, exact = (
        np.mean(node_of(later.adapters).shared.a != node_of(first.adapters).shared.a)
        for later, first in ((after, server), (after_one(make()), start(make())))
    )
    assert moved < exact


def test_what_a_client_holds_is_read_off_its_adapters():
    method, server = make(), start(make())
    layout = ranks.layout(ranks.concrete(init_adapters()))
    own = method.init_client(server, 4, KEY)
    tuned = jax.jit(method.personalize)(federation.base(), server, own, data(4), KEY)
    found = expert_embeddings.strategy(layout, tuned)["experts"]
    empty = NUMBERS["experts"]
    np.testing.assert_array_equal(found, np.where(server.slots[:, 4] == empty, -1, server.slots[:, 4]))
    # A rival of the same run holds no experts.
    plain = expert_embeddings.strategy(layout, init_adapters()(KEY))["experts"]
    assert plain.shape == (toy.LAYERS, 0)


def test_what_is_sent_is_noised_once_and_counted():
    server = start(make())
    plain, private = uploaded(make(), server, 4), uploaded(make(dp="corrected", dp_eta=50.0), server, 4)
    assert_same(plain[0].change, private[0].change)
    gap = adapters.nodes(plain[0].embeddings.client)[SITE] - adapters.nodes(private[0].embeddings.client)[SITE]
    assert 0 < np.abs(gap).max() < 1
    held = np.sum(server.slots[:, 4] < NUMBERS["experts"])
    np.testing.assert_allclose(private[0].spent, 50.0 * (toy.LAYERS + held))
    assert plain[0].spent == ()


def test_the_budget_of_privacy_adds_up_over_rounds():
    method = make(dp="corrected", dp_eta=50.0, assign="data")
    server = play(method, start(method), SOME)
    once = np.asarray(server.spent)
    assert once[4] > 0 and set(np.flatnonzero(once)) == set(SOME)
    again = play(method, server, SOME[:2], absent=SOME[:1])
    assert set(np.flatnonzero(again.spent > once)) == {SOME[1]} and (again.spent >= once).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"experts": 3}, "but 6 clients with at least 2 need 12: raise experts"),
        ({"top_k": 3, "min_experts": 2}, "algorithm.top_k is 3, expected 1 to 2"),
        ({"top_k": 0}, "algorithm.top_k is 0, expected 1 or more"),
        ({"top_k": 1, "min_experts": 0}, "algorithm.min_experts is 0, expected 1 or more"),
        ({"balance": -1.0}, "algorithm.balance is -1.0, expected 0 or more"),
        ({"assign": "best"}, "algorithm.assign is 'best', expected one of data, random, static"),
        ({"router": "none"}, "algorithm.router is 'none'"),
        ({"embed_on": "test"}, "algorithm.embed_on is 'test'"),
        ({"weighting": "size"}, "algorithm.weighting is 'size'"),
        ({"adapter_dtype": "float16"}, "algorithm.adapter_dtype is 'float16', expected one of float32, bfloat16"),
        ({"score_dtype": "int8"}, "algorithm.score_dtype is 'int8', expected one of float64, bfloat16"),
        ({"dp": "on"}, "algorithm.dp is 'on', expected one of off, corrected, reference"),
        ({"dp": "corrected", "dp_eta": 0.0}, "algorithm.dp_eta is 0.0, expected a positive number"),
        ({"dp_eta": 50.0}, "algorithm.dp_eta is 50.0, but algorithm.dp is 'off', expected corrected or reference"),
        ({"dp": "corrected", "assign": "random"}, "algorithm.dp is 'corrected', but no embeddings are sent with"),
        ({"dp": "reference", "dp_cap": 1.0}, "dp_clip and dp_cap belong to dp 'corrected', not to 'reference'"),
    ],
)
def test_mistakes(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**changes)


def test_dense_adapters_have_no_experts():
    with pytest.raises(ValueError, match="adapter.kind 'lora'"):
        fedamole.fedamole(MODEL, TASK, init_adapters(kind="full"), SGD, **NUMBERS)

"""Evaluation: every test example counts once, whatever the grouping, and statistics are what their names say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from fedjax_peft import adapters, evaluate, population, rounds, summaries, tasks
from fedjax_peft.algorithms import fedavg
from fedjax_peft.data import batches, federated
from fedjax_peft.types import Model

CLIENTS = 5


@pytest.fixture(scope="module")
def store():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, 40)
    encoded = federated.Encoded(
        rng.integers(0, toy.VOCABULARY, lengths.sum()).astype(np.int32),
        None,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    sizes = (3, 9, 0, 20, 8)
    parts = np.split(np.arange(40), np.cumsum(sizes)[:-1])
    return federated.build(encoded, rng.integers(0, toy.CLASSES, 40), parts, allow_empty=True)


def scores(store, chunk, pack, ids, steps=0, devices=1, task=None, index=0, seed=0, **settings):
    model, task, key = toy.model(), task or tasks.classification(), jax.random.key(0)
    base = model.init(key)
    init = functools.partial(adapters.init, shapes=base, rank=2, targets="query")
    algorithm = fedavg.fedit(model, task, init, optax.sgd(0.5))
    mesh = rounds.make_mesh(devices)
    server = rounds.make_init(algorithm, mesh)(key)
    people = population.create(rounds.client_states(algorithm, server), CLIENTS)
    judge = evaluate.make_evaluate(
        algorithm,
        model,
        task,
        mesh,
        chunk=chunk,
        items=lambda ids: batches.items(store, ids, batch=4, pack=pack, widths=(3, 6)),
        **settings,
    )

    def support(ids):
        return batches.cohort(store, ids, seed=0, round=0, batch=4, steps=steps, widths=(3, 6))

    placed, root = rounds.shard_base(base, mesh), jax.random.key(seed)
    return judge(placed, server, people, np.asarray(ids), support, index, root), model, base


def test_means_over_examples_equal_a_plain_loop(store):
    result, model, base = scores(store, chunk=2, pack=3, ids=range(CLIENTS))
    assert result.examples.tolist() == [3, 9, 0, 20, 8]
    for client in (0, 1, 3, 4):
        right = []
        for row in federated.rows(store, client):
            tokens = store.tokens[store.token_offsets[row] : store.token_offsets[row + 1]][None]
            logits = model.apply(base, {}, {"tokens": tokens, "mask": np.ones_like(tokens, bool)})
            right.append(int(np.argmax(logits)) == store.labels[row])
        np.testing.assert_allclose(result.metrics["accuracy"][client], np.mean(right), rtol=1e-6)
    assert np.isnan(result.metrics["accuracy"][2])


def test_what_is_derived_is_pooled_over_predictions_not_over_clients(store):
    task = tasks.classification(mcc=True)
    plain = scores(store, chunk=2, pack=3, ids=range(CLIENTS))[0]
    result, model, base = scores(store, chunk=2, pack=3, ids=range(CLIENTS), task=task)
    assert list(result.metrics) == ["loss", "mcc", "accuracy"] and result.means["confusion"].shape == (CLIENTS, 4, 4)
    for name, values in plain.metrics.items():
        np.testing.assert_array_equal(result.metrics[name], values)

    counts = np.zeros((CLIENTS, 3, 3))
    for client in range(CLIENTS):
        for row in federated.rows(store, client):
            tokens = store.tokens[store.token_offsets[row] : store.token_offsets[row + 1]][None]
            logits = model.apply(base, {}, {"tokens": tokens, "mask": np.ones_like(tokens, bool)})
            counts[client, store.labels[row], int(np.argmax(logits))] += 1
    assert np.isnan(result.metrics["mcc"][2])
    with_tests = [0, 1, 3, 4]
    np.testing.assert_allclose(result.metrics["mcc"][with_tests], tasks.matthews(counts)[with_tests], atol=1e-12)

    groups = ("a", "a", "a", "b", "b")
    whole = evaluate.pooled(result, groups, task)
    assert [row["group"] for row in whole] == [None, "a", "b"]
    assert set(whole[0]) == {"group", "loss", "mcc", "accuracy"}
    expected = [float(tasks.matthews(counts[own].sum(0))) for own in (slice(None), slice(3), slice(3, None))]
    np.testing.assert_allclose([row["mcc"] for row in whole], expected, atol=1e-12)

    rows = [
        {"examples": result.examples[i], "group": groups[i], **{name: v[i] for name, v in result.metrics.items()}}
        for i in range(CLIENTS)
    ]
    summary = summaries.summarize(rows, ["loss", "mcc", "accuracy"], whole)
    assert summary["mcc"]["mean"] == pytest.approx(tasks.matthews(counts)[with_tests].mean())
    assert summary["mcc"]["pooled"] == pytest.approx(expected[0]) != summary["mcc"]["mean"]
    assert summary["mcc"]["groups"] == pytest.approx({"a": expected[1], "b": expected[2]})
    # Averages come out bit for bit as they do without anything derived.
    assert summary["accuracy"] == summaries.summarize(rows, ["accuracy"])["accuracy"]
    assert evaluate.pooled(plain, groups, tasks.classification()) == []


def test_predictions_of_all_examples_of_a_client_are_scored_together(store):
    """Examples come in pairs, of which one is counted, as windows of a question are."""
    base = toy.model().init(jax.random.key(0))
    model = Model(
        lambda key: base,
        lambda base, adapters, inputs: base["embeddings"]["word"]["embedding"][inputs["tokens"], :2],
        None,
    )
    count = len(federated.lengths(store))
    context = np.stack([np.zeros(count), federated.lengths(store)], 1).astype(np.int32)
    spans = store._replace(labels={"span": context * 0, "context": context})
    task, calls = tasks.span(), []

    def score(rows, predictions):
        calls.append(np.sort(rows))
        counted = rows % 2 == 0
        return {"f1": predictions["start"] * rows * counted, "exact_match": rows * 0, "questions": counted}

    def judge(chunk, pack):
        calls.clear()
        scored = tasks.span(score=score)
        evaluation = evaluate.make_evaluate(
            fedit(),
            model,
            scored,
            rounds.make_mesh(1),
            chunk=chunk,
            items=lambda ids: batches.items(spans, ids, batch=4, pack=pack, widths=(3, 6)),
        )
        server = fedit().init(jax.random.key(0))
        people = population.create(rounds.client_states(fedit(), server), CLIENTS)

        def support(ids):
            return batches.cohort(store, ids, seed=0, round=0, batch=4, steps=0, widths=(3, 6))

        return evaluation(base, server, people, np.arange(CLIENTS), support, 0, jax.random.key(0)), scored

    result, scored = judge(chunk=2, pack=3)
    assert [len(rows) for rows in calls] == [12, 20, 8]  # clients 0 and 1, 2 and 3, 4
    assert np.concatenate(calls).tolist() == list(range(40))
    starts = []
    for row in range(count):
        tokens = store.tokens[store.token_offsets[row] : store.token_offsets[row + 1]][None]
        labels = {name: values[row : row + 1] for name, values in spans.labels.items()}
        outputs = model.apply(base, {}, {"tokens": tokens})
        starts.append(int(tasks.span(score=score).predict(outputs, labels)["start"][0]))
    expected = np.array(starts) * np.arange(count)
    even = [[row for row in federated.rows(store, client) if row % 2 == 0] for client in range(CLIENTS)]
    assert list(result.metrics) == ["loss", "f1", "exact_match"] and np.isnan(result.metrics["f1"][2])
    for client in (0, 1, 3, 4):
        np.testing.assert_allclose(result.metrics["f1"][client], expected[even[client]].mean(), rtol=1e-12)
    whole = evaluate.pooled(result, ("a",) * CLIENTS, scored)[0]
    # All questions count alike, however many windows they have.
    np.testing.assert_allclose(whole["f1"], expected[::2].mean(), rtol=1e-12)
    other = judge(chunk=3, pack=1)[0]
    np.testing.assert_array_equal(other.metrics["f1"], result.metrics["f1"])
    assert task.predict is None


@pytest.mark.parametrize("steps", [0, 3])
def test_grouping_changes_nothing(store, steps):
    one = scores(store, chunk=1, pack=1, ids=[4, 3, 1], steps=steps)[0]
    other = scores(store, chunk=2, pack=5, ids=[4, 3, 1], steps=steps, devices=2)[0]
    assert one.examples.tolist() == other.examples.tolist() == [8, 20, 9]
    for name in one.metrics:
        np.testing.assert_allclose(one.metrics[name], other.metrics[name], rtol=1e-5)


def test_personalization_is_the_clients_own(store):
    alone = scores(store, chunk=1, pack=4, ids=[3], steps=3)[0].metrics["loss"]
    together = scores(store, chunk=4, pack=4, ids=[0, 1, 3, 4], steps=3)[0].metrics["loss"]
    np.testing.assert_allclose(alone[0], together[2], rtol=1e-5)


def test_what_is_known_before_training_is_said_of_each_client(store):
    """Clients in groups, batches of them side by side: everybody's examples once, and nobody else's."""

    def observe(base, inputs, weights, constants):
        return jnp.stack([jnp.sum(weights), jnp.sum(inputs["tokens"] * inputs["mask"]), constants["own"]])

    def observed(parts, examples):
        count, total, own = np.sum(parts, axis=0) if parts else np.zeros(3)
        assert count == examples
        return {"total": np.float32(total), "own": np.float32(own / max(len(parts), 1))}

    method = fedit()._replace(observe=observe, observed=observed)
    ids = np.arange(CLIENTS, dtype=np.int32)
    found = evaluate.observe(
        method,
        {},
        ids,
        padding=CLIENTS,
        group=2,
        items=lambda ids: batches.items(store, ids, batch=4, pack=3, widths=(3, 6)),
        constants=lambda ids: {
            "examples": np.append(federated.sizes(store), 0)[ids],
            "own": np.asarray(ids, np.float32),
        },
    )
    totals = []
    for client in ids:
        rows = federated.rows(store, client)
        totals.append(sum(store.tokens[store.token_offsets[row] : store.token_offsets[row + 1]].sum() for row in rows))
    np.testing.assert_array_equal(found["total"], totals)
    np.testing.assert_array_equal(found["own"], [0, 1, 0, 3, 4])  # client 2 has no examples


def test_packs_are_split_over_the_devices_of_the_base():
    base = rounds.shard_base({"w": jnp.zeros(3)}, rounds.make_mesh(4, 1))
    split, whole = rounds.spread(np.zeros((8, 3)), base), rounds.spread((np.zeros((6, 3)), np.zeros(6)), base)[0]
    assert split.sharding.shard_shape(split.shape) == (2, 3) and whole.sharding.is_fully_replicated


def fedit():
    model = toy.model()
    init = functools.partial(adapters.init, shapes=model.init(jax.random.key(0)), rank=2, targets="query")
    return fedavg.fedit(model, tasks.classification(), init, optax.sgd(0.5))


PROMPTS = {"batch": 4, "widths": (3, 6), "left": True}


def test_what_is_written_is_judged_by_client_and_by_pool(store):
    """Scores of a corpus: here the share of answers that are long, squared, which no average of clients gives."""
    calls = []

    def judge(rows, answers):
        calls.append(sorted(rows.tolist()))
        np.testing.assert_array_equal(answers["tokens"][:, 0], rows)
        return {"long": float(np.mean(answers["lengths"] > 2)) ** 2}

    def answers(base, adapters, ids, key):
        for item in batches.items(store, ids, pack=3, **PROMPTS):
            yield item, {"tokens": item.rows[..., None], "lengths": item.inputs["mask"].sum(-1)}

    task = tasks.classification()
    task = task._replace(judge=judge, derived=lambda means: {name: means[name] for name in ("loss", "long")})
    result = scores(store, chunk=2, pack=3, ids=range(CLIENTS), task=task, answers=answers)[0]
    own = [federated.rows(store, client) for client in range(CLIENTS)]
    assert calls == [rows.tolist() for rows in own if len(rows)]
    share = [np.mean(federated.lengths(store)[rows] > 2) if len(rows) else np.nan for rows in own]
    np.testing.assert_allclose(result.metrics["long"], np.square(share))
    whole = evaluate.pooled(result, ("a", "a", "a", "b", "b"), task)
    expected = [np.mean(federated.lengths(store)[np.concatenate(own[some])] > 2) for some in
                (slice(None), slice(3), slice(3, None))]  # fmt: skip
    np.testing.assert_allclose([row["long"] for row in whole], np.square(expected))
    assert whole[0]["loss"] == evaluate.pooled(scores(store, 1, 5, range(CLIENTS), task=task, answers=answers)[0],
                                               ("a",) * CLIENTS, task)[0]["loss"]  # fmt: skip


def test_what_is_drawn_depends_on_seed_round_and_client_alone(store):
    def generate(base, adapters, inputs, key):
        drawn = jax.random.bits(key, inputs["mask"].shape[:1], jnp.uint16)
        return drawn[:, None], jnp.any(inputs["mask"], 1).astype(jnp.int32)

    def drawn(ids, pack, key):
        ids = np.asarray(ids, np.int32)
        write = evaluate.make_answers(generate, lambda ids: batches.items(store, ids, pack=pack, **PROMPTS))
        found = {}
        for item, said in write({}, {"a": jnp.zeros(len(ids))}, ids, key):
            real = item.weights > 0
            np.testing.assert_array_equal(said["lengths"], real)  # what fills a pack up has no prompt to answer
            found |= dict(zip(item.rows[real].tolist(), np.asarray(said["tokens"])[real].ravel().tolist(), strict=True))
        return found

    one = drawn([0, 1, 3, 4, CLIENTS], 3, jax.random.key(0))
    assert len(one) == 40 and len(set(one.values())) > 38
    assert drawn([4, 3], 1, jax.random.key(0)) == {row: one[row] for row in range(12, 40)}
    assert drawn([4], 2, jax.random.key(1)) != {row: one[row] for row in range(32, 40)}

    keys = []
    task = tasks.classification()._replace(judge=lambda rows, answers: {})

    def answers(base, adapters, ids, key):
        keys.append(jax.random.key_data(key).tolist())
        return ()

    for index, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        scores(store, chunk=CLIENTS, pack=3, ids=[0], task=task, answers=answers, index=index, seed=seed)
    assert keys[0] == keys[3] and len({str(key) for key in keys}) == 3


def test_of_some_metrics_less_is_better():
    rows = [{"examples": 1, "group": "a", "ter": value, "bleu": value} for value in (0.1, 0.5, 0.9)]
    summary = summaries.summarize(rows, ["ter", "bleu"])
    assert (summary["ter"]["worst_10_percent"], summary["bleu"]["worst_10_percent"]) == (0.9, 0.1)


def test_statistics():
    rows = [
        {"examples": n, "group": group, "loss": loss, "accuracy": accuracy}
        for n, group, loss, accuracy in [
            (10, "a", 1.0, 0.5),
            (30, "a", 2.0, 0.9),
            (10, "b", 4.0, 0.1),
            (0, "b", 9.0, 0.0),
        ]
    ]
    summary = summaries.summarize(rows, ["loss", "accuracy"])
    assert (summary["clients"], summary["examples"]) == (3, 50)
    assert summary["accuracy"]["mean"] == pytest.approx(0.5)
    assert summary["accuracy"]["std"] == pytest.approx(np.std([0.5, 0.9, 0.1]))
    assert summary["accuracy"]["pooled"] == pytest.approx((5 + 27 + 1) / 50)
    assert summary["accuracy"]["worst_10_percent"] == 0.1 and summary["loss"]["worst_10_percent"] == 4.0
    assert summary["accuracy"]["groups"] == pytest.approx({"a": 0.8, "b": 0.1})

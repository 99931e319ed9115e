"""Losses and metrics of tasks against their definitions."""

import functools

import decoder
import encoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from fedjax_peft import adapters, evaluate, local, population, rounds, tasks
from fedjax_peft.algorithms import fedavg
from fedjax_peft.data import batches, federated
from fedjax_peft.models import llama


def of_counts(true, predicted, classes):
    """Correlation by its definition: of one-hot columns, covariances summed over classes."""
    x, y = (np.eye(classes)[column] - np.eye(classes)[column].mean(0) for column in (true, predicted))
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return (x * y).sum() / scale if scale else 0.0


def test_losses_of_classes_may_be_as_coarse_as_published():
    logits, labels = jnp.array([[0.1, -1.3, 0.77]]), jnp.array([1])
    fine, coarse = (tasks.classification(dtype=dtype).loss(logits, labels) for dtype in ("float32", "bfloat16"))
    exact = np.log(np.exp(np.float64(logits)).sum()) + 1.3
    assert fine == pytest.approx(exact, rel=1e-6) and coarse.dtype == jnp.float32
    assert coarse == coarse.astype(jnp.bfloat16) and 1e-4 < abs(float(coarse[0]) - exact) < 2**-6
    with pytest.raises(ValueError, match="task.dtype is 'int8'"):
        tasks.classification(dtype="int8")


def test_matthews_of_two_classes_by_hand():
    # (6 x 3 - 2 x 1) / sqrt(8 x 4 x 7 x 5)
    assert tasks.matthews(np.array([[6.0, 2.0], [1.0, 3.0]])) == pytest.approx(16 / 1120**0.5, rel=1e-12)
    assert tasks.matthews(np.array([[0.0, 5.0], [4.0, 0.0]])) == pytest.approx(-1)


def test_matthews_of_shares_where_classes_are_missing():
    rng = np.random.default_rng(0)
    for classes in (2, 3, 5):
        true, predicted = rng.integers(0, classes, (2, 49))
        for labels, answers in ((true, predicted), (true, true), (true * 0, predicted), (true, predicted * 0)):
            confusion = np.zeros((classes, classes))
            np.add.at(confusion, (labels, answers), 1 / 49)
            expected = of_counts(labels, answers, classes)
            assert tasks.matthews(confusion) == pytest.approx(expected, abs=1e-12)
            if 0 in (labels.any(), answers.any()):
                assert tasks.matthews(confusion) == 0.0
    assert np.isnan(tasks.matthews(np.full((2, 2), np.nan)))


def test_classification_reports_what_is_asked_for():
    logits, labels = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), jnp.array([0, 1, 1])
    plain, task = tasks.classification(), tasks.classification(mcc=True)
    values = task.metrics(logits, labels)
    assert list(plain.metrics(logits, labels)) == ["loss", "accuracy"] and plain.derived is None
    np.testing.assert_array_equal(values["confusion"].sum(0), [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    reported = task.derived({name: np.asarray(value).mean(0) for name, value in values.items()})
    assert list(reported) == ["loss", "mcc", "accuracy"]
    assert reported["mcc"] == pytest.approx(0.5) and reported["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_no_number_chooses_nothing(broken):
    """Class 0 and token 0 are what an argmax over NaN would say."""
    logits = jnp.array([[2.0, 0.0], [broken, 0.0], [0.0, 3.0], [0.0, broken]])
    labels = jnp.array([0, 0, 1, 1])
    task = tasks.classification(mcc=True)
    means = {name: np.asarray(value).mean(0) for name, value in task.metrics(logits, labels).items()}
    assert means["accuracy"] == 0.5 and means["confusion"].sum() == 1
    # Half of each class is right, the rest is a class of its own.
    expected = of_counts(np.array([0, 0, 1, 1]), np.array([0, 2, 1, 2]), 3)
    assert task.derived(means)["mcc"] == pytest.approx(expected)
    nothing = tasks.classification(mcc=True).metrics(jnp.full((3, 2), broken), jnp.zeros(3, jnp.int32))
    assert nothing["accuracy"].sum() == 0 and tasks.matthews(np.asarray(nothing["confusion"]).mean(0)) == 0
    outputs = jnp.array([[[2.0, 0.0], [broken, 0.0]]])
    found = tasks.causal().metrics(outputs, {"targets": jnp.array([[0, 0]])})
    assert found["token_accuracy"].tolist() == [0.5] and found["exact"].tolist() == [0.0]


def test_a_minus_infinity_is_a_class_that_is_ruled_out():
    logits = jnp.array([[2.0, -jnp.inf], [-jnp.inf, 1.0]])
    assert tasks.classification().metrics(logits, jnp.array([0, 1]))["accuracy"].tolist() == [1.0, 1.0]


def test_a_question_with_an_answer_whose_loss_is_no_number_is_wrong():
    outputs = jnp.tile(jnp.array([[[2.0, 0.0], [1.0, 0.0]]]), (4, 1, 1))
    outputs = outputs.at[1].set(jnp.nan).at[2, 1, 0].set(jnp.nan).at[3, 0, 1].set(-jnp.inf)
    labels = {"targets": jnp.array([[0, 1]] * 4), "choice": jnp.array([[1, 2]] * 4), "right": jnp.zeros(4, jnp.int32)}
    found = tasks.choice(2).metrics(outputs, labels)
    assert found["accuracy"].tolist() == [1.0, 0.0, 0.0, 1.0]
    # A broken answer leaves the loss of another as it is.
    assert np.isnan(found["loss"][1]) and found["loss"][2] == found["loss"][0]


def test_a_span_that_is_no_number_is_wrong():
    def score(rows, predictions):
        return {name: np.ones(len(rows)) for name in ("f1", "exact_match", "questions")}

    task = tasks.span(score=score)
    outputs = jnp.zeros((3, 4, 2)).at[1, 2, 0].set(jnp.nan).at[2, 0, 1].set(jnp.nan)
    labels = {"context": jnp.array([[1, 4]] * 3), "span": jnp.array([[1, 1]] * 3)}
    values = task.score(np.arange(3), jax.tree.map(np.asarray, task.predict(outputs, labels)))
    assert values["f1"].tolist() == values["exact_match"].tolist() == [1, 0, 0]
    assert values["questions"].tolist() == [1, 1, 1]


def answers(counts=(3, 1, 4, 2), longest=6, vocabulary=11, seed=0):
    """Logits [B, P, V] and targets [B, P] of answers of so many tokens."""
    rng = np.random.default_rng(seed)
    targets = np.full((len(counts), longest), -1, np.int32)
    for row, count in enumerate(counts):
        targets[row, :count] = rng.integers(0, vocabulary, count)
    return rng.normal(0, 2, (len(counts), longest, vocabulary)).astype(np.float32), targets


def token_losses(outputs, targets):
    """Cross-entropy of each target token, one list an example."""
    shifted = outputs.astype(np.float64)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return [[-logs[b, p, t] for p, t in enumerate(row) if t >= 0] for b, row in enumerate(targets)]


def test_the_loss_of_answers_is_the_mean_over_target_tokens():
    outputs, targets = answers()
    each = token_losses(outputs, targets)
    for average, expected in (("tokens", np.mean(sum(each, []))), ("examples", np.mean([np.mean(x) for x in each]))):
        loss = tasks.causal(average=average).loss(jnp.array(outputs), {"targets": jnp.array(targets)})
        assert loss.shape == (4,) and float(loss.mean()) == pytest.approx(expected, rel=1e-6)
    metrics = tasks.causal().metrics(jnp.array(outputs), {"targets": jnp.array(targets)})
    np.testing.assert_allclose(metrics["loss"], [np.mean(x) for x in each], rtol=1e-5)


def test_padding_does_not_enter_the_loss_of_a_batch():
    """The weighted mean that training takes is the same with an example of padding and with outputs cut to a width."""
    outputs, targets = answers()
    whole = tasks.causal().loss(jnp.array(outputs), {"targets": jnp.array(targets)}).mean()
    more, nothing = answers((*(3, 1, 4, 2), 0))
    more[:4], nothing[:4] = outputs, targets
    weights = np.array([1, 1, 1, 1, 0], np.float32)
    padded = tasks.causal().loss(jnp.array(more), {"targets": jnp.array(nothing)})
    assert float((padded * weights).sum() / 4) == pytest.approx(float(whole), rel=1e-6)
    cut = tasks.causal().loss(jnp.array(outputs[:, :4]), {"targets": jnp.array(targets)})
    assert float(cut.mean()) == pytest.approx(float(whole), rel=1e-6)
    none = tasks.causal().loss(jnp.array(more[4:]), {"targets": jnp.array(nothing[4:])})
    assert float(none[0]) == 0.0


def test_smoothed_labels_are_a_mixture_with_all_tokens():
    outputs, targets = answers((3, 2))
    logs = np.array(jax.nn.log_softmax(jnp.array(outputs)), np.float64)
    soft = [
        0.9 * -logs[b, p, t] + 0.1 * -logs[b, p].mean()
        for b, row in enumerate(targets)
        for p, t in enumerate(row)
        if t >= 0
    ]
    task = tasks.causal(smoothing=0.1)
    loss = task.loss(jnp.array(outputs), {"targets": jnp.array(targets)})
    assert float(loss.mean()) == pytest.approx(np.mean(soft), rel=1e-5)
    plain = tasks.causal().metrics(jnp.array(outputs), {"targets": jnp.array(targets)})["loss"]
    np.testing.assert_allclose(task.metrics(jnp.array(outputs), {"targets": jnp.array(targets)})["loss"], plain)


def test_tokens_and_whole_answers_that_greedy_decoding_would_give():
    outputs, targets = answers((3, 2))
    outputs[0, np.arange(3), targets[0, :3]] = 50.0
    outputs[1, 0, targets[1, 0]] = 50.0
    outputs[1, 1, targets[1, 1]] = -50.0
    metrics = tasks.causal().metrics(jnp.array(outputs), {"targets": jnp.array(targets)})
    assert metrics["exact"].tolist() == [1.0, 0.0] and metrics["token_accuracy"].tolist() == [1.0, 0.5]
    assert list(metrics) == ["loss", "token_accuracy", "exact"]
    means = {name: np.zeros(1) for name in ("loss", "token_accuracy", "exact", "rouge_l")}
    assert list(tasks.causal(judge=lambda *_: {}).derived(means)) == ["loss", "rouge_l", "exact", "token_accuracy"]


def test_a_choice_is_the_answer_of_least_mean_loss():
    """Numbers from the specification of FedAMoLE's test: three answers to a prompt of two tokens."""
    b, t, v = np.meshgrid(np.arange(3), np.arange(4), np.arange(7), indexing="ij")
    logits = ((7 * b + 5 * t + 3 * v) % 11 / 3).astype(np.float32)
    # The tokens before the answer and before its end predict them; the last place is of a longer question.
    outputs = np.pad(logits[:, 1:3].reshape(1, 6, 7), ((0, 0), (0, 1), (0, 0)))
    targets = np.array([[3, 1, 4, 1, 5, 1, -1]])
    labels = {"targets": targets, "choice": np.array([[1, 1, 2, 2, 3, 3, 0]])}
    for right, loss in enumerate([3.198498, 2.400070, 2.947204]):
        found = tasks.choice(3).metrics(jnp.array(outputs), labels | {"right": jnp.array([right])})
        np.testing.assert_allclose(found["loss"], loss, atol=1e-6)
        assert found["accuracy"].tolist() == [float(right == 1)]


def test_of_equally_likely_answers_the_first_one_counts():
    labels = {"targets": jnp.array([[0, 1]]), "choice": jnp.array([[1, 2]])}
    for right in range(2):
        found = tasks.choice(2).metrics(jnp.zeros((1, 2, 2)), labels | {"right": jnp.array([right])})
        assert found["accuracy"].tolist() == [float(right == 0)]


def test_choices_are_judged_question_by_question():
    """Through the evaluation of clients: a model of pairs of tokens, three choices a question, a client without any."""
    rng, choices = np.random.default_rng(0), 3
    prompts = [rng.integers(0, toy.VOCABULARY, 2) for _ in range(8)]
    answers = [[rng.integers(0, toy.VOCABULARY, size) for size in rng.integers(1, 4, choices)] for _ in prompts]
    tokens = [np.concatenate([prompt, *own]) for prompt, own in zip(prompts, answers, strict=True)]
    branches = [np.repeat(np.arange(4), [2, *map(len, own)]) for own in answers]
    offsets, right = np.append(0, np.cumsum([len(text) for text in tokens])), rng.integers(0, choices, 8)
    encoded = federated.Encoded(
        np.concatenate(tokens), None, offsets, prompts=np.full(8, 2), branches=np.concatenate(branches)
    )
    held = [np.arange(3), np.zeros(0, int), np.arange(3, 8)]
    store = federated.build(encoded, {"right": right}, held, allow_empty=True)

    def apply(base, adapters, inputs, key=None):
        del adapters, key
        table = base["embeddings"]["word"]["embedding"]
        before = jnp.take_along_axis(inputs["tokens"], inputs["chosen"], 1)
        return table[before] @ table.T

    model, key = toy.model()._replace(apply=apply), jax.random.key(0)
    base, task = model.init(key), tasks.choice(choices)
    init = functools.partial(adapters.init, shapes=base, rank=2, targets="query")
    algorithm, mesh = fedavg.fedit(model, task, init, optax.sgd(0.5)), rounds.make_mesh(1)
    server = rounds.make_init(algorithm, mesh)(key)
    people = population.create(rounds.client_states(algorithm, server), 3)
    pure = {"batch": 4, "widths": (8, 11)}
    judge = evaluate.make_evaluate(
        algorithm, model, task, mesh, chunk=2, items=lambda ids: batches.items(store, ids, pack=2, **pure)
    )
    found = judge(
        rounds.shard_base(base, mesh), server, people, np.arange(3),
        lambda ids: batches.cohort(store, ids, seed=0, round=0, steps=0, **pure), 0, key,
    )  # fmt: skip
    table = np.array(base["embeddings"]["word"]["embedding"])

    def loss(prompt, answer):
        text = np.append(prompt[-1:], answer)
        return np.mean(token_losses((table[text[:-1]] @ table.T)[None], text[None, 1:])[0])

    losses = np.array([[loss(prompt, answer) for answer in own] for prompt, own in zip(prompts, answers, strict=True)])
    for client, own in ((0, slice(0, 3)), (2, slice(3, 8))):
        assert found.metrics["accuracy"][client] == pytest.approx(np.mean(losses[own].argmin(1) == right[own]))
        asked = np.take_along_axis(losses[own], right[own, None], 1)
        assert found.metrics["loss"][client] == pytest.approx(asked.mean(), rel=1e-5)
    assert np.isnan(found.metrics["accuracy"][1]) and set(found.metrics) == {"loss", "accuracy"}
    assert found.examples.tolist() == [3, 0, 5]


def test_a_model_learns_answers_alone_whatever_the_padding():
    """Loss of chosen tokens in a padded batch against logits of all tokens, and a gradient without NaN."""
    model = llama.llama(decoder.config())
    base = encoder.weights(jax.eval_shape(model.init, jax.random.key(0)))
    prompts, lengths, rng = np.array([4, 2, 3]), np.array([7, 3, 9]), np.random.default_rng(0)
    texts = [rng.integers(3, decoder.VOCABULARY, length).astype(np.int32) for length in lengths]
    encoded = federated.Encoded(np.concatenate(texts), None, np.append(0, np.cumsum(lengths)), prompts=prompts)
    store = federated.build(encoded, {}, [np.arange(3)])
    tokens = np.stack([np.pad(text, (0, 9 - len(text))) for text in texts])
    logits = np.array(jax.jit(model.apply)(base, {}, {"tokens": tokens, "mask": np.arange(9) < lengths[:, None]}))
    rows = zip(logits, texts, prompts, strict=True)
    losses = [token_losses(row[None, n - 1 : len(text) - 1], text[None, n:])[0] for row, text, n in rows]

    @jax.jit
    @jax.value_and_grad
    def loss(base, batch):
        return local.objective(model, tasks.causal(), base)({}, batch, None)[0]

    batch = batches.cohort(store, np.zeros(1, int), seed=0, round=0, batch=5, widths=(16,), epochs=1)
    found, gradient = loss(base, jax.tree.map(lambda leaf: leaf[0, 0], batch.replace(constants={})))
    assert float(found) == pytest.approx(np.mean(sum(losses, [])), rel=1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="task.average is 'token', expected 'tokens' or 'examples'"):
        tasks.causal(average="token")
    with pytest.raises(ValueError, match=r"task.smoothing is 1.0, expected at least 0 and below 1"):
        tasks.causal(smoothing=1.0)

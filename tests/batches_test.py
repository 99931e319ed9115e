"""What a cohort trains on: every example when it is due, nothing that depends on slots, shapes that never change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_peft.data import batches, federated

WIDTHS = (8, 16, 32)


def make(sizes=(5, 40, 17, 3), seed=0, types=False):
    """Example m is the token m + 1, repeated; its label is m."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 33, sum(sizes))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.repeat(np.arange(1, sum(sizes) + 1, dtype=np.int32), counts)
    encoded = federated.Encoded(tokens, tokens % 2 if types else None, offsets)
    return federated.build(
        encoded, np.arange(sum(sizes)), np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]), allow_empty=True
    )


def draw(store, ids, round=0, **overrides):
    settings = {"seed": 1, "batch": 4, "widths": WIDTHS, "steps": 3} | overrides
    return batches.cohort(store, np.array(ids), round=round, **settings)


def examples(batch, slot):
    """Labels of the real examples of one slot, in training order."""
    return batch.labels[slot][batch.weights[slot] > 0]


def test_inputs_labels_and_padding_agree():
    store = make(types=True)
    batch = draw(store, [2, 4, 0])
    assert batch.inputs["tokens"].shape == (3, 3, 4, 32) and batch.inputs["tokens"].dtype == np.int32
    assert batch.inputs["mask"].dtype == bool and batch.inputs["types"].dtype == np.int32
    assert batch.weights.dtype == np.float32 and batch.width.dtype == np.int32 and batch.width.shape == (3, 3)
    lengths = federated.lengths(store)
    for slot in (0, 2):
        assert batch.weights[slot].all()
        np.testing.assert_array_equal(batch.inputs["mask"][slot].sum(-1), lengths[batch.labels[slot]])
        expected = np.where(batch.inputs["mask"][slot], batch.labels[slot][..., None] + 1, 0)
        np.testing.assert_array_equal(batch.inputs["tokens"][slot], expected)
        np.testing.assert_array_equal(batch.inputs["types"][slot], expected % 2)
    assert not batch.weights[1].any() and not batch.inputs["tokens"][1].any() and not batch.labels[1].any()


def test_padding_examples_show_one_token_so_that_attention_is_finite():
    batch = draw(make(), [4], pad=7)
    assert (batch.inputs["mask"].sum(-1) == 1).all() and (batch.inputs["tokens"] == 7).all()


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("length", [{"steps": 3}, {"steps": None, "epochs": 2}])
def test_a_client_is_independent_of_slot_and_cohort(length, group):
    store = make()
    big = draw(store, [3, 1, 4, 2, 0], round=5, group_by_length=group, **length)
    for slot, client in enumerate([3, 1, 4, 2, 0]):
        alone = draw(store, [client], round=5, group_by_length=group, **length)
        for a, b in ((alone.inputs["tokens"], big.inputs["tokens"]), (alone.labels, big.labels)):
            np.testing.assert_array_equal(np.sort(a[0], 0), np.sort(b[slot], 0))
        if not group:
            np.testing.assert_array_equal(alone.labels[0], big.labels[slot])


def test_grouping_by_length_does_not_depend_on_the_cohort():
    store = make((64, 64, 64))
    alone, together = (draw(store, ids, batch=8, steps=8, group_by_length=True) for ids in ([1], [0, 1, 2]))
    np.testing.assert_array_equal(alone.labels[0], together.labels[1])


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 50), batch=st.integers(1, 7), steps=st.integers(1, 6), seed=st.integers(0, 9))
def test_steps_walk_through_shuffled_epochs_without_replacement(size, batch, steps, seed):
    store = make((size, 3))
    rounds = -(-2 * size // (batch * steps)) + 1
    walk = np.concatenate(
        [examples(draw(store, [0], r, seed=seed, batch=batch, steps=steps), 0) for r in range(rounds)]
    )
    assert len(walk) == rounds * batch * steps
    for epoch in range(len(walk) // size):
        np.testing.assert_array_equal(np.sort(walk[epoch * size : (epoch + 1) * size]), np.arange(size))


@pytest.mark.parametrize("group", [False, True])
def test_epochs_visit_every_example_once_and_pad_the_rest(group):
    store = make()
    batch = draw(store, [0, 1, 2, 3, 4], steps=None, epochs=2, group_by_length=group)
    assert batch.weights.shape == (5, 2 * 10, 4)
    for client, size in enumerate((5, 40, 17, 3)):
        first = store.client_offsets[client]
        for e in range(2):
            part = slice(10 * e, 10 * e + 10)
            seen = batch.labels[client, part][batch.weights[client, part] > 0]
            np.testing.assert_array_equal(np.sort(seen), first + np.arange(size))
            assert (batch.weights[client, part].any(-1)).sum() == -(-size // 4)


def test_shuffles_differ_between_rounds_clients_and_seeds():
    store = make((40, 40))
    first = examples(draw(store, [0], steps=10), 0)
    others = [
        examples(draw(store, [0], round=1, steps=10), 0),
        examples(draw(store, [1], steps=10), 0) - 40,
        examples(draw(store, [0], seed=2, steps=10), 0),
    ]
    assert all((first != other).mean() > 0.8 for other in others)
    np.testing.assert_array_equal(first, examples(draw(store, [0], steps=10), 0))


@pytest.mark.parametrize("group", [False, True])
def test_width_is_the_smallest_that_holds_the_step(group):
    batch = draw(make((40, 40, 40), seed=3), [0, 1, 2], batch=8, steps=5, group_by_length=group)
    longest = batch.inputs["mask"].sum(-1).max(-1)
    assert batch.widths == WIDTHS
    np.testing.assert_array_equal(np.array(WIDTHS)[batch.width] >= longest, True)
    np.testing.assert_array_equal(np.concatenate([[0], WIDTHS])[batch.width] < longest, True)


def test_grouping_by_length_computes_fewer_tokens_on_the_same_examples():
    store = make((40, 40, 40))
    plain, grouped = (draw(store, [0, 1, 2], batch=8, steps=5, group_by_length=g) for g in (False, True))
    for slot in range(3):
        np.testing.assert_array_equal(np.sort(examples(plain, slot)), np.sort(examples(grouped, slot)))
    real, computed = batches.waste(plain, chunk=3)
    real_grouped, computed_grouped = batches.waste(grouped, chunk=3)
    assert real == real_grouped == federated.lengths(store).sum()
    assert real < computed_grouped < 0.9 * computed
    assert computed_grouped == sum(WIDTHS[w] for w in grouped.width.max(0)) * 3 * 8
    alone = batches.waste(grouped, chunk=1)[1]
    assert alone == sum(WIDTHS[w] for w in grouped.width.reshape(-1)) * 8 <= computed_grouped


def test_grouping_keeps_copies_of_an_example_apart():
    store = make((8,), seed=5)
    store = store._replace(token_offsets=np.arange(9) * 4, tokens=np.repeat(np.arange(1, 9, dtype=np.int32), 4))
    batch = draw(store, [0], batch=8, steps=10, group_by_length=True)
    for step in batch.labels[0]:
        assert len(set(step)) == 8


def test_empty_clients_and_zero_steps_are_legal():
    store = make()
    empty = store._replace(client_offsets=np.array([0, 0, 65]))
    batch = draw(empty, [0, 1])
    assert not batch.weights[0].any() and batch.weights[1].all()
    for length in ({"steps": 0}, {"steps": None, "epochs": 0}):
        nothing = draw(store, [0, 1], group_by_length=True, **length)
        assert nothing.inputs["tokens"].shape == (2, 0, 4, 32) and nothing.width.shape == (2, 0)


def test_labels_may_be_a_dict():
    store = make()
    store = store._replace(labels={"start": store.labels, "span": np.stack([store.labels, store.labels + 1], 1)})
    batch = draw(store, [0, 4])
    np.testing.assert_array_equal(batch.labels["span"][0, ..., 1], batch.labels["start"][0] + 1)
    assert batch.labels["span"].shape == (2, 3, 4, 2) and not batch.labels["span"][1].any()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), batch=st.integers(1, 6), pack=st.integers(1, 5))
def test_items_hold_every_example_once(sizes, batch, pack):
    store = make(tuple(sizes) + (4,))
    ids = np.array([len(sizes), len(sizes) + 1, *range(len(sizes))])  # one padding slot
    seen, shapes, widths = {slot: [] for slot in range(len(ids))}, set(), []
    for item in batches.items(store, ids, batch=batch, pack=pack, widths=WIDTHS):
        assert item.weights.shape == item.rows.shape == (pack, batch) and item.slots.dtype == np.int32
        real = item.weights > 0
        np.testing.assert_array_equal(item.labels[real], item.rows[real])
        np.testing.assert_array_equal(item.inputs["tokens"][real][:, 0], item.rows[real] + 1)
        np.testing.assert_array_equal(item.inputs["mask"][real].sum(-1), federated.lengths(store)[item.rows[real]])
        assert not item.slots[~real.any(-1)].any()
        for slot, rows, keep in zip(item.slots, item.rows, real, strict=True):
            seen[int(slot)] += rows[keep].tolist()
        shapes.add(item.inputs["tokens"].shape)
        widths.append(item.inputs["tokens"].shape[-1])
    for slot, client in enumerate(ids):
        expected = [] if client == len(sizes) + 1 else federated.rows(store, client).tolist()
        assert sorted(seen[slot]) == expected
    assert len(shapes) <= len(WIDTHS) and widths == sorted(widths, reverse=True)


def test_mistakes_are_named():
    store = make()
    with pytest.raises(ValueError, match="client id 5 is not one of the store's 4 clients"):
        draw(store, [0, 5])
    with pytest.raises(ValueError, match="tokens, more than the largest width 16"):
        draw(store, [0, 1, 2, 3], widths=(8, 16))
    for length in ({"steps": 2, "epochs": 1}, {"steps": None}):
        with pytest.raises(ValueError, match="needs either steps or epochs"):
            draw(store, [0], **length)
    with pytest.raises(ValueError, match="batch=0"):
        draw(store, [0], batch=0)


def prompted(sizes=(5, 3), seed=0):
    """Example m is m + 1 repeated for its prompt, then 100, 101, .. for its answer; the last client holds nothing."""
    rng = np.random.default_rng(seed)
    prompts, answers = rng.integers(1, 12, (2, sum(sizes)))
    texts = [[m + 1] * n + list(range(100, 100 + k)) for m, (n, k) in enumerate(zip(prompts, answers, strict=True))]
    tokens, offsets = np.concatenate(texts).astype(np.int32), np.append(0, np.cumsum(prompts + answers))
    clients = [*np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]), np.zeros(0, np.int64)]
    encoded = federated.Encoded(tokens, None, offsets, prompts=prompts)
    return federated.build(encoded, {"number": np.arange(sum(sizes))}, clients, allow_empty=True), prompts, answers


def check_answers(inputs, labels, weights, answers):
    """Targets are exactly the answer, each chosen token is the one before its target, and padding has neither."""
    assert inputs["chosen"].dtype == labels["targets"].dtype == np.int32
    for place in np.ndindex(weights.shape):
        targets, chosen = labels["targets"][place], inputs["chosen"][place]
        count = answers[labels["number"][place]] if weights[place] else 0
        np.testing.assert_array_equal(targets[: len(chosen)], [*range(100, 100 + count), *[-1] * (len(chosen) - count)])
        following = inputs["tokens"][place][chosen[:count] + 1]
        np.testing.assert_array_equal(following, targets[:count])
        assert (chosen[count:] == 0).all() and inputs["mask"][place][chosen[:count] + 1].all()


def test_targets_are_the_answer_and_inputs_choose_what_predicts_it():
    store, prompts, answers = prompted()
    batch = draw(store, [0, 1, 2, 3], batch=3, steps=None, epochs=1, widths=(8, 16, 24))
    assert batch.inputs["chosen"].shape == (4, 2, 3, answers.max()) == batch.labels["targets"].shape
    check_answers(batch.inputs, batch.labels, batch.weights, answers)
    assert batch.weights.sum(axis=(1, 2)).tolist() == [5, 3, 0, 0]
    for item in batches.items(store, np.arange(3), batch=2, pack=2, widths=(8, 16, 24)):
        assert item.inputs["chosen"].shape[-1] == min(answers.max(), item.inputs["tokens"].shape[-1])
        check_answers(item.inputs, item.labels, item.weights, answers)


@pytest.mark.parametrize("longest, width, length", [(3, 40, 3), (16, 40, 16), (17, 40, 32), (33, 40, 40)])
def test_long_answers_share_lengths(longest, width, length):
    ends = np.array([0, longest + 2, longest + 5])
    tokens = np.arange(ends[-1], dtype=np.int32)
    store = federated.build(federated.Encoded(tokens, None, ends, prompts=np.array([2, 2])), {}, [np.array([0, 1])])
    batch = draw(store, [0], batch=2, steps=1, widths=(width,))
    assert batch.labels["targets"].shape[-1] == batch.inputs["chosen"].shape[-1] == length
    assert sorted((batch.labels["targets"][0, 0] >= 0).sum(-1)) == [1, longest]


def test_cutting_inputs_to_a_width_keeps_all_targets():
    store, _, answers = prompted((40, 3), seed=1)
    batch = draw(store, [0], batch=4, steps=10, widths=(8, 12, 24), group_by_length=True)
    assert set(batch.width[0]) == {0, 1, 2} and answers.max() > 8
    for step, width in enumerate(np.array(batch.widths)[batch.width[0]]):
        cut = {name: values[0, step, :, :width] for name, values in batch.inputs.items()}
        labels = {name: values[0, step] for name, values in batch.labels.items()}
        check_answers(cut, labels, batch.weights[0, step], answers)


def test_prompts_alone_are_padded_on_the_left():
    store, prompts, _ = prompted()
    alone = federated.prompts_alone(store)
    np.testing.assert_array_equal(federated.lengths(alone), prompts)
    rows = []
    for item in batches.items(alone, np.arange(3), batch=2, pack=2, widths=(4, 12), pad=7, left=True):
        width = item.inputs["tokens"].shape[-1]
        assert set(item.inputs) == {"tokens", "mask"} and item.labels == {}
        for place in np.argwhere(item.weights > 0):
            row, mask = item.rows[tuple(place)], item.inputs["mask"][tuple(place)]
            np.testing.assert_array_equal(mask, np.arange(width) >= width - prompts[row])
            np.testing.assert_array_equal(item.inputs["tokens"][tuple(place)], np.where(mask, row + 1, 7))
            rows.append(row)
        assert (item.inputs["mask"][item.weights == 0].sum(-1) == 1).all()
    assert sorted(rows) == list(range(8))


def test_all_clients_at_once():
    store, _, answers = prompted()
    held = batches.whole(store, batch=2, width=24)
    assert held["weights"].shape == (3, 3, 2) and held["inputs"]["tokens"].shape == (3, 3, 2, 24)
    assert held["weights"].sum(axis=(1, 2)).tolist() == [5, 3, 0]
    check_answers(held["inputs"], held["labels"], held["weights"], answers)
    for client in range(3):
        seen = held["labels"]["number"][client][held["weights"][client] > 0]
        np.testing.assert_array_equal(seen, federated.rows(store, client))
    with pytest.raises(ValueError, match="tokens, more than the largest width 8"):
        batches.whole(store, batch=2, width=8)


def test_prompts_and_answers_survive_other_stores():
    store, prompts, answers = prompted()
    other = federated.subset(store, np.array([1, 0]))
    np.testing.assert_array_equal(other.prompts, np.append(prompts[5:], prompts[:5]))
    assert federated.digest(store) != federated.digest(store._replace(prompts=prompts + 1))
    encoded = federated.encoded(store)
    for wrong in (0 * prompts, prompts + answers):
        with pytest.raises(ValueError, match=r"tokens of example \d are its prompt; leave some"):
            federated.build(encoded._replace(prompts=wrong), {}, [np.arange(8)])

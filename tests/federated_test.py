"""The flat store, and draws of clients."""

import numpy as np
import pytest

from fedjax_peft.data import federated


def make(labels=(0, 1, 2, 1), clients=((2, 0), (3, 1))):
    encoded = federated.Encoded(
        tokens=np.array([10, 11, 20, 30, 31, 32, 40], np.int32),
        types=np.array([0, 1, 0, 0, 0, 1, 0], np.int8),
        offsets=np.array([0, 2, 3, 6, 7]),
    )
    return federated.build(encoded, np.array(labels), [np.array(c) for c in clients], classes=3)


def test_examples_are_grouped_by_client():
    store = make()
    assert store.tokens.tolist() == [30, 31, 32, 10, 11, 40, 20]
    assert store.types.tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert store.token_offsets.tolist() == [0, 3, 5, 6, 7] and store.client_offsets.tolist() == [0, 2, 4]
    assert store.labels.tolist() == [2, 0, 1, 1] and store.labels.dtype == np.int32
    assert federated.sizes(store).tolist() == [2, 2] and federated.lengths(store).tolist() == [3, 2, 1, 1]


def test_subset():
    store = make()
    second = federated.subset(store, np.array([1]))
    assert second.tokens.tolist() == [40, 20] and second.labels.tolist() == [1, 1]
    swapped = federated.subset(store, np.array([1, 0]))
    assert swapped.labels.tolist() == [1, 1, 2, 0] and swapped.client_offsets.tolist() == [0, 2, 4]


def test_digest_sees_every_part():
    store = make()
    assert federated.digest(store) == federated.digest(make())
    assert federated.digest(store) == "7e5e665a0a45af05c0f9e30d69ef681e60547ed2f88d117f78fc03487c97a0f9", (
        "the digest names data in manifests: it must never change"
    )
    changed = [
        store._replace(tokens=store.tokens + 1),
        store._replace(types=None),
        store._replace(labels=store.labels[::-1]),
        store._replace(labels={"label": store.labels}),
        store._replace(client_offsets=store.client_offsets[[0, -1]]),
    ]
    assert len({federated.digest(s) for s in [store, *changed]}) == 6


def test_vocabulary_is_trimmed_and_remapped():
    store = make()
    kept = federated.vocabulary([store, store], special_ids=[0, 11, 99])
    assert kept.tolist() == [0, 10, 11, 20, 30, 31, 32, 40, 99] and kept.dtype == np.int32
    small = federated.remap(store, kept)
    np.testing.assert_array_equal(kept[small.tokens], store.tokens)
    with pytest.raises(ValueError, match="token 32 is not among the 2 tokens kept"):
        federated.remap(store._replace(tokens=np.array([5, 32])), np.array([5, 31]))


def of_lengths(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoded = federated.Encoded(np.ones(offsets[-1], np.int32), None, offsets)
    return federated.build(encoded, np.zeros(len(lengths)), [np.arange(len(lengths))])


def test_widths_minimise_the_padded_total():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.5, 0.7, 300).astype(int), 2, 60)
    store = of_lengths(lengths)
    widths = federated.widths_for(store, 64)
    grid = range(8, 65, 8)
    totals = {
        (a, b, c): sum(min(w for w in (a, b, c) if w >= n) for n in lengths)
        for a in grid
        for b in grid
        for c in [-(-lengths.max() // 8) * 8]
        if a < b < c
    }
    assert totals[widths] == min(totals.values())


def test_widths_hold_every_example_of_every_store():
    short, long = of_lengths([3, 5, 5]), of_lengths([3, 61])
    assert federated.widths_for(short, 64) == (8,)
    assert federated.widths_for([short, long], 64, count=2) == (8, 64)
    assert federated.widths_for(long, 62, count=1) == (62,)
    with pytest.raises(ValueError, match="an example has 61 tokens; encode with max_length=60"):
        federated.widths_for(long, 60)


def test_cohorts_are_pure_in_seed_and_round():
    pool = np.array([3, 8, 9, 20, 21, 40])
    drawn = [federated.sample(0, r, pool, 3) for r in range(200)]
    np.testing.assert_array_equal(drawn[7], federated.sample(0, 7, pool, 3))
    for ids in drawn:
        assert ids.dtype == np.int32 and len(set(ids.tolist()) & set(pool.tolist())) == 3
    counts = np.bincount(np.concatenate(drawn), minlength=41)[pool]
    np.testing.assert_allclose(counts, 100, atol=30)
    assert any((federated.sample(1, r, pool, 3) != drawn[r]).any() for r in range(5))
    with pytest.raises(ValueError, match="a cohort of 7 clients cannot be drawn from a pool of 6"):
        federated.sample(0, 0, pool, 7)


def test_dropout_follows_the_client():
    ids = np.arange(1000)
    gone = federated.dropped(0, 3, ids, 0.3)
    np.testing.assert_array_equal(federated.dropped(0, 3, ids[::-1], 0.3), gone[::-1])
    assert abs(gone.mean() - 0.3) < 0.05
    assert (federated.dropped(0, 4, ids, 0.3) != gone).any()
    assert not federated.dropped(0, 3, ids, 0.0).any() and federated.dropped(0, 3, ids, 1.0).all()
    with pytest.raises(ValueError, match="dropout rate 30 is not a probability"):
        federated.dropped(0, 0, ids, 30)


def test_random_streams_do_not_overlap():
    names = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1, 5), (2, 5, 1)]
    numbers = [federated.rng(9, *name).integers(0, 2**62, 50) for name in names]
    assert len(set(np.concatenate(numbers).tolist())) == 50 * len(names)


def test_pools_of_seen_and_unseen_clients():
    drawn = federated.pools(10, 3, seed=0)
    assert len(drawn["unseen"]) == 3 and sorted(np.concatenate(list(drawn.values())).tolist()) == list(range(10))
    chosen = federated.pools(38, (21, 22, 34), seed=0)
    assert chosen["unseen"].tolist() == [21, 22, 34] and len(chosen["seen"]) == 35
    assert federated.pools(4, 0, seed=0)["unseen"].tolist() == []
    for wrong in (4, 5, (9,), (0, 1, 2, 3)):
        with pytest.raises(ValueError, match="of 4 clients some must train"):
            federated.pools(4, wrong, seed=0)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="client 1 of 2 has no examples"):
        make(clients=((0, 1), ()))
    with pytest.raises(ValueError, match=r"label 3 of example 2 is not in \[0, 3\)"):
        make(labels=(0, 1, 3, 1))
    with pytest.raises(ValueError, match="client id 2 is not one of the store's 2 clients"):
        federated.subset(make(), np.array([2]))
    encoded = federated.Encoded(np.array([1, 2]), None, np.array([0, 2, 2]))
    with pytest.raises(ValueError, match="example 1 has no tokens"):
        federated.build(encoded, np.zeros(2), [np.array([0, 1])])
    empty = federated.build(encoded, np.zeros(2), [np.array([0]), np.array([], int)], allow_empty=True)
    assert federated.sizes(empty).tolist() == [1, 0]


def test_the_longest_text_of_a_fork_has_one_answer():
    tokens, branches = np.arange(9, dtype=np.int32), np.array([0, 0, 1, 2, 2, 0, 1, 1, 2])
    encoded = federated.Encoded(tokens, None, np.array([0, 5, 9]), prompts=np.array([2, 1]), branches=branches)
    store = federated.build(encoded, {}, [np.array([1, 0])])
    assert federated.longest(store) == 4 and store.branches.tolist() == [0, 1, 1, 2, 0, 0, 1, 2, 2]
    assert federated.longest(store._replace(branches=None)) == 5
    assert federated.longest(federated.subset(store, np.array([0]))) == 4

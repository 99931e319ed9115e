"""Partitions: every row at most once, the published rules, and independence of what must not matter."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_peft.data import cache, partition

SETTINGS = {
    "iid": {},
    "quantity_skew": {"law": "exponential", "sigma": 0.5},
    "dirichlet": {"alpha": 0.5, "min_size": 1},
    "pathological": {"k": 2},
    "shard": {"shards": 2},
    "label_sort": {"h": 0.6},
    "inner_dirichlet": {"alpha": 0.5},
}
COMPLETE = set(SETTINGS) - {"label_sort"}  # deals out every row; label sorting leaves remainders


def make(train=400, test=100, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return {s: {"label": rng.integers(0, classes, n)} for s, n in (("train", train), ("test", test))}


def histograms(splits, parts, split="train", classes=4):
    return np.array([np.bincount(splits[split]["label"][rows], minlength=classes) for rows in parts[split]])


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=25, deadline=None)
@given(train=st.integers(60, 300), test=st.integers(0, 80), clients=st.integers(2, 9), seed=st.integers(0, 99))
def test_rows_are_dealt_out_once(name, train, test, clients, seed):
    splits = make(train, test, seed=seed)
    parts = getattr(partition, name)(splits, clients=clients, seed=seed, **SETTINGS[name])
    for split, size in (("train", train), ("test", test)):
        assert len(parts[split]) == clients
        rows = np.concatenate(parts[split])
        assert len(np.unique(rows)) == len(rows)
        if name in COMPLETE:
            np.testing.assert_array_equal(np.sort(rows), np.arange(size))


@pytest.mark.parametrize("name", SETTINGS)
def test_training_rows_depend_on_the_seed_and_not_on_the_test_split(name):
    def draw(seed, test=100):
        splits = make()
        splits["test"] = {"label": splits["test"]["label"][:test]}
        return getattr(partition, name)(splits, clients=5, seed=seed, **SETTINGS[name])["train"]

    first = draw(0)
    for again in (draw(0), draw(0, test=7)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, draw(1), strict=True))


@pytest.mark.parametrize("name", ["dirichlet", "pathological", "shard", "inner_dirichlet", "label_sort"])
def test_splits_of_a_client_have_the_same_proportions(name):
    splits = make(8000, 4000)
    parts = getattr(partition, name)(splits, clients=8, seed=3, **SETTINGS[name])
    shares = [h / h.sum(1, keepdims=True) for h in (histograms(splits, parts, s) for s in ("train", "test"))]
    # The last clients of inner_dirichlet get what is left, which differs between splits.
    np.testing.assert_allclose(shares[0][:6], shares[1][:6], atol=0.08)
    assert np.abs(shares[0] - 0.25).max() > 0.2, "the partition is not skewed at all"


def test_dirichlet_redraws_until_every_client_has_enough():
    splits = make(300, 100)
    for seed in range(20):
        sizes = [len(rows) for rows in partition.dirichlet(splits, clients=10, seed=seed, alpha=0.3)["train"]]
        assert min(sizes) >= 10
    with pytest.raises(ValueError, match="alpha=0.5 .* min_size=10 .* 31 clients: there are too few rows"):
        partition.dirichlet(splits, clients=31, seed=0, alpha=0.5)
    with pytest.raises(ValueError, match="alpha=0.001 gave no partition of 300 rows with min_size=29 .* in 5 draws"):
        partition.dirichlet(splits, clients=10, seed=0, alpha=0.001, min_size=29, redraws=5)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        partition.dirichlet(splits, clients=3, seed=0, alpha=0)


@pytest.mark.parametrize(("alpha", "sizes"), [(0.1, [197, 419, 86, 298]), (1.0, [342, 154, 245, 259])])
def test_dirichlet_can_draw_the_published_rows(alpha, sizes):
    splits = {"train": {"label": np.arange(1000) % 5}}
    settings = {"clients": 4, "seed": 42, "alpha": alpha, "published": True}
    rows = partition.dirichlet(splits, **settings)["train"]
    assert list(map(len, rows)) == sizes
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(1000))
    if alpha == 1:
        assert np.bincount(rows[0] % 5).tolist() == [10, 48, 107, 18, 159]
        assert [own[0] for own in rows] == [271, 93, 896, 945]
    with pytest.raises(ValueError, match="published draws deal out a single split, not train, test"):
        partition.dirichlet(splits | {"test": splits["train"]}, **settings)
    with pytest.raises(ValueError, match="2 published draws left clients with fewer rows than min_size=249"):
        partition.dirichlet(splits, **settings, min_size=249, redraws=2)


def test_dirichlet_gives_full_clients_no_further_class():
    splits = {"train": {"label": np.repeat([0, 1, 2], 100)}}
    for seed in range(20):
        parts = partition.dirichlet(splits, clients=3, seed=seed, alpha=0.1, min_size=1)
        held = np.cumsum(histograms(splits, parts, classes=3), axis=1)
        for client in held:
            full = np.flatnonzero(client >= 100)
            assert len(full) == 0 or client[-1] == client[full[0]]


def test_dirichlet_shares_follow_alpha():
    splits = make(20_000, 0)
    spread = [
        np.var(histograms(splits, partition.dirichlet(splits, clients=10, seed=0, alpha=a, balanced=False)) / 5000)
        for a in (0.2, 1.0, 100.0)
    ]
    expected = [0.1 * 0.9 / (10 * a + 1) for a in (0.2, 1.0, 100.0)]  # variance of a Dirichlet share
    np.testing.assert_allclose(spread, expected, rtol=0.6)


def test_pathological_clients_have_k_classes_in_equal_parts():
    splits = {"train": {"label": np.repeat(np.arange(10), 60)}}
    for k in (1, 2, 3):
        counts = histograms(splits, partition.pathological(splits, clients=20, seed=1, k=k), classes=10)
        np.testing.assert_array_equal((counts > 0).sum(1), k)
        np.testing.assert_array_equal(np.unique(counts[counts > 0]), 60 // (20 * k // 10))
    with pytest.raises(ValueError, match="4 clients of k=2 classes each cannot share 10 classes"):
        partition.pathological(splits, clients=4, seed=0, k=2)


def test_shards_hold_few_classes():
    splits = {"train": {"label": np.repeat(np.arange(10), 60)}}
    counts = histograms(splits, partition.shard(splits, clients=10, seed=0), classes=10)
    assert (counts.sum(1) == 60).all() and ((counts > 0).sum(1) <= 2).all()


COLA, SST2, QNLI, MNLI = (2528, 6023), (29780, 37569), (52366, 52377), (130899, 130900, 130903)


@pytest.mark.parametrize(
    "counts, h, size, expected",
    [
        (COLA, 0.9, 1068, [0.93, 0.93, 0.36, 0.03, 0.02, 0.04, 0.03, 0.03]),
        (SST2, 0.3, 8418, [0.61, 0.61, 0.61, 0.47, 0.31, 0.31, 0.31, 0.32]),
        (SST2, 0.9, 8417, [0.95, 0.95, 0.94, 0.53, 0.04, 0.05, 0.05, 0.05]),
        (QNLI, 0.3, 13092, [0.65] * 4 + [0.35] * 4),
        (QNLI, 0.9, 13092, [0.95] * 4 + [0.05] * 4),
        (MNLI, 0.3, 49087, [0.53, 0.53, 0.44, 0.23, 0.23, 0.23, 0.23, 0.23]),
        (MNLI, 0.9, 49087, [0.93, 0.93, 0.63, 0.03, 0.03, 0.03, 0.03, 0.03]),
    ],
)
def test_label_sorting_of_glue(counts, h, size, expected):
    found = sorted_shares(counts, h)
    assert found[1] == size
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=0.02)


def test_label_sorting_goes_from_even_to_contiguous():
    splits = make(6000, 600, classes=3)
    even, ordered = (partition.label_sort(splits, clients=8, seed=0, h=h) for h in (0.0, 1.0))
    shares = histograms(splits, even, classes=3) / 750
    np.testing.assert_allclose(shares, np.tile(np.bincount(splits["train"]["label"]) / 6000, (8, 1)), atol=0.06)
    for split in ("train", "test"):
        held = [splits[split]["label"][rows] for rows in ordered[split]]
        # Classes never go back from one client to the next, and one that is cut is held by neighbours.
        assert all(one.max() <= other.min() for one, other in zip(held, held[1:], strict=False))
    with pytest.raises(ValueError, match="a partition needs 1 client or more, got 0"):
        partition.label_sort(splits, clients=0, h=0.5)


def test_label_sorting_of_few_rows_has_these_shares_on_average():
    # A single client's share of CoLA at 0.3 has a standard deviation of 0.011.
    shares, size = zip(*(sorted_shares(COLA, 0.3, seed) for seed in range(20)), strict=True)
    assert set(size) == {1068}
    even, block = 748 * 2528 / sum(COLA), 320  # rows of class 0 in what is dealt out evenly; sorted rows of a client
    expected = (even + np.array([block, block, 758 - 2 * block, 0, 0, 0, 0, 0])) / 1068
    np.testing.assert_allclose(np.mean(shares, axis=0), expected, rtol=0, atol=0.01)
    np.testing.assert_allclose(expected, [0.52, 0.50, 0.31, 0.21, 0.20, 0.19, 0.21, 0.23], rtol=0, atol=0.025)


def sorted_shares(counts, h, seed=1234):
    """(share of the first class of each of eight clients, how many rows all of them have)."""
    splits = {"train": {"label": np.repeat(np.arange(len(counts)), counts)}}
    parts = partition.label_sort(splits, clients=8, h=h, seed=seed)
    found = histograms(splits, parts, classes=len(counts))
    (size,) = set(found.sum(1).tolist())
    return found[:, 0] / size, size


def test_label_sorting_can_leave_the_test_split_unskewed():
    splits = make(8000, 8000)
    parts = partition.label_sort(splits, clients=4, h=1.0, iid_splits=("test",))
    assert (histograms(splits, parts).max(1) > 1900).all()
    assert (histograms(splits, parts, "test").max(1) < 600).all()
    with pytest.raises(ValueError, match=r"h in \[0, 1\], got 70"):
        partition.label_sort(splits, clients=4, h=70)


def test_columns_become_clients_in_ascending_order():
    language = np.array(["sw", "de", "en", "de", "sw", "de"], object)
    splits = {"train": {"language": language}, "test": {"language": language[:2]}}
    parts = partition.by_column(splits, column="language")
    assert [sorted(rows) for rows in parts["train"]] == [[1, 3, 5], [2], [0, 4]]
    assert [sorted(rows) for rows in parts["test"]] == [[1], [], [0]]
    halves = partition.by_column(splits, column="language", clients_per_value=2)["train"]
    assert [len(rows) for rows in halves] == [1, 2, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="split 'train' has no column 'task', only language"):
        partition.by_column(splits, column="task")


def test_natural_ids_can_be_limited():
    splits = {"train": {"user": np.array([7, 3, 3, 5, 5, 5, 7])}}

    def ids(**limits):
        return [set(splits["train"]["user"][r]) for r in partition.natural_id(splits, column="user", **limits)["train"]]

    assert ids() == [{3}, {5}, {7}] and ids(min_size=3) == [{5}] and ids(clients=2) == [{3}, {5}]
    with pytest.raises(ValueError, match="column 'user' has 1 ids with min_size=3 or more rows, not 2"):
        ids(min_size=3, clients=2)


def languages(parallel=True, train=400, test=100):
    rng = np.random.default_rng(0)
    out = {}
    for split, size in (("train", train), ("test", test)):
        labels = [rng.integers(0, 3, size) for _ in range(3)]
        out[split] = {
            "language": np.repeat(["ar", "bg", "zh"], size),
            "label": np.concatenate([labels[0] if parallel else x for x in labels]),
        }
    return out


XNLI = {"column": "language", "clients_per_value": 5, "seed": 0, "alpha": 0.5, "pools": 2}


def test_languages_by_dirichlet_in_two_pools():
    splits = languages()
    parts = partition.by_column_dirichlet(splits, **XNLI, parallel=True, rows_per_pool={"train": 150, "test": 50})
    for split, size, per_client in (("train", 400, 30), ("test", 100, 10)):
        rows = np.array(parts[split])
        assert rows.shape == (2 * 3 * 5, per_client) and len(np.unique(rows)) == rows.size
        np.testing.assert_array_equal(
            splits[split]["language"][rows[:, 0]], np.tile(np.repeat(["ar", "bg", "zh"], 5), 2)
        )
        np.testing.assert_array_equal(rows[:5] + size, rows[5:10])  # the same examples in the next language
    with pytest.raises(ValueError, match="language ar has 400 train rows, not 2 x 201"):
        partition.by_column_dirichlet(splits, **XNLI, rows_per_pool={"train": 201})


def test_unseen_pools_are_drawn_on_their_own_labels():
    splits = languages(train=4000)
    entropy = {}
    for reuse in (False, True):
        h = histograms(splits, partition.by_column_dirichlet(splits, **XNLI, reuse_first_pool=reuse), classes=3)
        p = h / h.sum(1, keepdims=True)
        entropy[reuse] = -(p * np.log(p + 1e-12)).sum(1).reshape(2, -1).mean(1)
    assert (entropy[False] < 0.9).all()
    assert entropy[True][0] == entropy[False][0] and entropy[True][1] > 1.05


XNLI_LANGUAGES = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"]


def test_the_rule_of_xnli():
    # FedP2EFT, arXiv 2502.04387: 15 parallel languages, 2 pools, 20 clients of 100 train and 25 test examples in each.
    rng, splits, sizes = np.random.default_rng(1), {}, {"train": 4500, "test": 1100}
    for split, size in sizes.items():
        columns = {"language": np.repeat(XNLI_LANGUAGES, size), "label": np.tile(rng.integers(0, 3, size), 15)}
        splits[split] = columns
    settings = XNLI | {"clients_per_value": 20, "parallel": True, "rows_per_pool": {"train": 2000, "test": 500}}
    entropy = {False: [], True: []}
    for reuse in entropy:
        for seed in range(4):
            parts = partition.by_column_dirichlet(splits, **settings | {"seed": seed}, reuse_first_pool=reuse)
            for split, held in (("train", 100), ("test", 25)):
                rows = np.array(parts[split]).reshape(2, 15, 20, held)
                examples = rows - np.arange(15)[:, None, None] * sizes[split]
                assert (examples >= 0).all() and (examples < sizes[split]).all(), "clients are ordered by language"
                assert (examples == examples[:, :1]).all(), "client k has the same examples in all languages"
                seen, unseen = examples[0, 0].ravel(), examples[1, 0].ravel()
                assert len(np.unique(np.concatenate([seen, unseen]))) == 2 * 20 * held
            entropy[reuse].append(entropies(splits, parts).reshape(2, -1).mean(1))
    # Over draws, 0.59 is what Dirichlet(0.5) gives in parts of 100; the published draw had 0.55 and, unseen, 1.09.
    np.testing.assert_allclose(np.mean(entropy[False], 0), 0.59, atol=0.1)
    np.testing.assert_allclose(np.mean(entropy[True], 0), [0.59, 1.09], atol=0.1)
    assert np.abs(np.diff(entropy[False])).min() > 0, "pools have draws of their own"


def entropies(splits, parts, split="train", classes=3):
    shares = histograms(splits, parts, split, classes)
    shares = shares / shares.sum(1, keepdims=True)
    return -(shares * np.log(np.maximum(shares, 1e-12))).sum(1)


@pytest.mark.parametrize("same_mixes", [False, True])
def test_the_rule_of_masakhanews(same_mixes):
    # 16 languages of unequal size, one of them without one of the 7 topics and one with a topic that tests lack.
    rng, sizes = np.random.default_rng(2), {"train": 120 + 37 * np.arange(16), "test": 40 + 9 * np.arange(16)}
    splits = {}
    for split, counts in sizes.items():
        language, label = np.repeat(np.arange(16), counts), rng.integers(0, 7, counts.sum())
        label[(language == 3) & (label == 6)] = 0
        label[(language == 5) & (label == 2) & (split == "test")] = 1
        splits[split] = {"language": language, "label": label}
    settings = {"column": "language", "clients_per_value": 10, "seed": 42, "alpha": 0.5, "pools": 2}
    parts = partition.by_column_dirichlet(splits, **settings, same_mixes=same_mixes)
    for split, counts in sizes.items():
        assert len(parts[split]) == 320
        dealt = np.concatenate(parts[split])
        assert len(np.unique(dealt)) == len(dealt)
        held = np.array([len(rows) for rows in parts[split]]).reshape(2, 16, 10)
        assert np.ptp(held, axis=-1).max() <= 1
        np.testing.assert_array_equal(held.sum(-1), np.tile(counts // 2, (2, 1)))
        for client, rows in enumerate(parts[split]):
            assert (splits[split]["language"][rows] == client // 10 % 16).all()


def test_values_and_pools_may_share_their_mixes():
    splits = languages(parallel=False, train=8000)
    for same in (False, True):
        parts = partition.by_column_dirichlet(splits, **XNLI, same_mixes=same)
        counts = histograms(splits, parts, classes=3).reshape(2, 3, 5, 3)
        shares = (counts / counts.sum(-1, keepdims=True))[..., :3, :]  # the last clients get what is left
        assert (np.ptp(shares, axis=(0, 1)).max() < 0.1) == same
    positions = [np.sort(parts["train"][5 * value] - 8000 * value) for value in range(3)]
    overlap = np.intersect1d(positions[0], positions[1])
    assert len(overlap) < len(positions[0]) / 2, "rows would be drawn together"


def test_rows_of_a_client_are_in_random_order():
    splits = {"train": {"label": np.repeat(np.arange(6), 100)}}
    for name, extra in SETTINGS.items():
        for rows in getattr(partition, name)(splits, clients=3, seed=0, **extra)["train"]:
            labels = splits["train"]["label"][rows]
            half = len(rows) // 2
            assert set(labels[:half]) == set(labels) or np.bincount(labels)[np.unique(labels)].min() < 6, name


def test_draws_of_languages_are_independent_unless_parallel():
    splits = languages()
    rows = partition.by_column_dirichlet(splits, **XNLI)["train"]
    assert not any(np.array_equal(np.sort(rows[k]) + 400, np.sort(rows[5 + k])) for k in range(5))


def test_cache_knows_data_settings_and_seed(tmp_path):
    calls = []

    def dirichlet(splits, **settings):
        calls.append(settings)
        return partition.dirichlet(splits, **settings)

    splits, base = make(), {"clients": 4, "seed": 0, "alpha": 0.5}
    first = cache.cached(tmp_path, dirichlet, splits, **base)
    again = cache.cached(tmp_path, dirichlet, splits, **base)
    assert len(calls) == 1
    for split in splits:
        assert all(np.array_equal(a, b) for a, b in zip(first[split], again[split], strict=True))
    cache.cached(tmp_path, dirichlet, splits, **base | {"seed": 1})
    cache.cached(tmp_path, dirichlet, splits, **base | {"alpha": 1.0})
    cache.cached(tmp_path, dirichlet, make(seed=1), **base)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 4


def test_partitioners_are_known_by_name():
    rule, settings = partition.named({"name": "iid", "clients": 2, "seed": 0})
    assert rule is partition.iid and settings == {"clients": 2, "seed": 0}
    for name in (None, "named", "Splits", "_BY_LABEL"):
        with pytest.raises(ValueError, match=f"^data.partition.name is {name!r}, which is no function of"):
            partition.named({"name": name})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alhpa": 0.5}, "data.partition.alhpa is not a setting of dirichlet; is alpha meant?"),
        ({"splits": 0.5}, "data.partition.splits is not a setting of dirichlet; is clients meant?"),
        ({}, "data.partition dirichlet needs 'alpha'"),
        ({"alpha": "half"}, "data.partition.alpha is 'half', expected a number"),
        ({"alpha": 1, "clients": 2.5}, "data.partition.clients is 2.5, expected a whole number"),
    ],
)
def test_settings_that_a_partitioner_cannot_take(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        partition.named({"name": "dirichlet", "clients": 4, "seed": 0} | settings)

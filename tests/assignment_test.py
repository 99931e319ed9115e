"""The assignment against worked examples and brute force, and the sentences about numbers that do not fit."""

import itertools

import numpy as np
import pytest

from fedjax_peft import assignment

e, c = np.arange(6)[:, None], np.arange(4)
WAVES = np.sin(1.3 * e + 2.1 * c + 0.4 * e * c)
TILTED = 2 * np.cos(c) + 0.3 * np.sin(1.7 * c * e + e)


def preferences(scores):
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def solved(scores, choices=2, least=2, most=4):
    return assignment.solve(scores[None], choices, least, most)[0]


def sets(chosen):
    return [set(np.flatnonzero(row)) for row in chosen]


@pytest.mark.parametrize(
    ("scores", "least", "most", "expected", "objective"),
    [
        (WAVES, 2, 4, [{1, 3}, {0, 3}, {0, 2}, {1, 3}, {1, 2}, {0, 2}], 4.560827),
        (WAVES, 3, 3, [{1, 3}, {0, 3}, {0, 2}, {1, 3}, {1, 2}, {0, 2}], 4.560827),
        (TILTED, 2, 4, [{0, 1}, {0, 3}, {0, 3}, {1, 2}, {0, 1}, {1, 2}], 4.183162),
        (TILTED, 2, 3, [{1, 3}, {0, 3}, {0, 2}, {1, 2}, {0, 3}, {1, 2}], 3.305261),
    ],
)
def test_worked_examples(scores, least, most, expected, objective):
    chosen = solved(scores, least=least, most=most)
    assert sets(chosen) == expected
    np.testing.assert_allclose(preferences(scores)[chosen].sum(), objective, atol=1e-5)


def brute_force(scores, choices, least, most):
    """The largest sum of preferences over all assignments."""
    experts, clients = scores.shape
    rows = [np.isin(np.arange(clients), who) for who in itertools.combinations(range(clients), choices)]
    best = -np.inf
    for picks in itertools.product(rows, repeat=experts):
        chosen = np.stack(picks)
        counts = chosen.sum(0)
        if counts.min() >= least and counts.max() <= most:
            best = max(best, preferences(scores)[chosen].sum())
    return best


@pytest.mark.parametrize(("experts", "clients", "choices", "least", "most"), [(4, 4, 2, 1, 3), (5, 3, 1, 1, 2)])
def test_it_is_the_best_there_is(experts, clients, choices, least, most):
    scores = 3 * np.random.default_rng(0).normal(size=(5, experts, clients))
    chosen = assignment.solve(scores, choices, least, most)
    for own, z in zip(chosen, scores, strict=True):
        np.testing.assert_allclose(preferences(z)[own].sum(), brute_force(z, choices, least, most), rtol=1e-9)


def test_constraints_hold_at_every_site():
    scores = 5 * np.random.default_rng(1).normal(size=(4, 30, 10))
    chosen = assignment.solve(scores, 2, 2, 8)
    np.testing.assert_array_equal(chosen.sum(-1), 2)
    counts = chosen.sum(1)
    assert counts.min() >= 2 and counts.max() <= 8 and (counts.sum(-1) == 60).all()
    np.testing.assert_array_equal(assignment.solve(scores[2:3], 2, 2, 8)[0], chosen[2])  # sites do not see each other


def improvable(preference, chosen, least, most):
    """[M] whether some experts could exchange clients and gain by it: a cycle of negative cost in what is left to move.

    Experts lead to clients that they may choose, clients to experts that may leave them, and through one more node
    clients with room for an expert to those that can spare one.
    """
    sites, experts, clients = chosen.shape
    nodes, counts = experts + clients + 1, chosen.sum(1)
    cost = np.full((sites, nodes, nodes), np.inf)
    cost[:, :experts, experts:-1] = np.where(chosen, np.inf, -preference)
    cost[:, experts:-1, :experts] = np.where(chosen, preference, np.inf).swapaxes(1, 2)
    cost[:, experts:-1, -1] = np.where(counts < most, 0, np.inf)
    cost[:, -1, experts:-1] = np.where(counts > least, 0, np.inf)
    for node in range(nodes):
        cost = np.minimum(cost, cost[:, :, node, None] + cost[:, node, None])
    return np.einsum("mnn->mn", cost).min(-1) < -1e-6


def test_the_largest_published_federation_is_solved_exactly():
    """32 sites of 30 experts, each held by four of 50 clients."""
    scores = 3 * np.random.default_rng(3).normal(size=(32, 30, 50))
    # Clients that everybody wants and that nobody wants, so that both bounds bind.
    scores += np.linspace(-3, 3, 50)
    bounds = assignment.bounds(experts=30, clients=50, choices=4, least=2, most=8)
    chosen = assignment.solve(scores, 4, *bounds)
    np.testing.assert_array_equal(chosen.sum(-1), 4)
    assert (chosen.sum(1).min(), chosen.sum(1).max()) == bounds == (2, 8)
    assert not improvable(preferences(scores), chosen, *bounds).any()
    assert improvable(preferences(scores), np.roll(chosen, 1, axis=2), *bounds).all()


def test_shifted_rows_and_permuted_clients():
    shifted = TILTED + np.array([3.0, -50.0, 700.0, 0.0, 1.0, -2.0])[:, None]
    np.testing.assert_array_equal(solved(shifted), solved(TILTED))
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(solved(TILTED[:, order]), solved(TILTED)[:, order])


def test_rounded_scores_cost_little_and_may_be_equal():
    scores = 3 * np.random.default_rng(2).normal(size=(4, 30, 10))
    exact, rounded = (assignment.solve(scores, 2, 2, 8, dtype) for dtype in ("float64", "bfloat16"))
    np.testing.assert_array_equal(rounded.sum(-1), 2)
    best, found = (preferences(scores)[chosen].sum() for chosen in (exact, rounded))
    assert best * (1 - 2**-8) < found <= best
    # A difference beyond eight bits decides, unless it is rounded away.
    close = np.array([[1.0, 1.001, 0.0], [1.001, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert sets(solved(close, 1, 1, 1)) == [{1}, {0}, {2}]
    np.testing.assert_array_equal(
        solved(np.round(close), 1, 1, 1), assignment.solve(close[None], 1, 1, 1, "bfloat16")[0]
    )


def test_slots_name_experts_and_mark_what_is_empty():
    chosen = solved(TILTED)[None]
    table = assignment.slots(chosen, 5)
    assert table.dtype == np.int32 and table.shape == (1, 4, 5)
    for client in range(4):
        own = np.flatnonzero(chosen[0, :, client])
        np.testing.assert_array_equal(table[0, client], np.append(own, [6] * (5 - len(own))))


def test_bounds_that_fit():
    numbers = {"experts": 30, "clients": 10, "choices": 2, "least": 2, "most": 8}
    assert assignment.bounds(**numbers) == (2, 8)
    assert assignment.bounds(**numbers, homogeneous=True) == (6, 6)
    assert assignment.bounds(experts=3, clients=1, choices=1, least=2, most=8) == (2, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clients": 50}, r"30 x 2 = 60 .* but 50 clients with at least 2 need 100: raise experts"),
        ({"choices": 4}, r"30 x 4 = 120 .* but 10 clients with at most 8 hold 80: lower experts"),
        ({"experts": 15, "choices": 3, "homogeneous": True}, r"15 x 3 = 45 .* which 10 clients cannot share equally"),
        ({"homogeneous": True, "most": 5}, r"10 clients with at most 5 hold 50"),
        ({"homogeneous": True, "choices": 1, "least": 4}, r"10 clients with at least 4 need 40"),
        ({"choices": 11}, r"expert_choices is 11, expected 1 to 10"),
        ({"choices": 0}, r"expert_choices is 0, expected 1 to 10"),
        ({"experts": 1, "choices": 10}, r"1 x 10 = 10 .* at least 2 need 20"),
    ],
)
def test_numbers_that_do_not_fit(changes, sentence):
    numbers = {"experts": 30, "clients": 10, "choices": 2, "least": 2, "most": 8} | changes
    with pytest.raises(ValueError, match=sentence):
        assignment.bounds(**numbers)

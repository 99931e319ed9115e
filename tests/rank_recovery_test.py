"""The synthetic study: its problem, the trajectory that others got, and what a run leaves."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from fedjax_peft import experiment, metrics, rank_recovery
from fedjax_peft.reports import recovery_plots, report

SMALL = {"study": "rank_recovery", "seeds": 2, "steps": 200, "only": ("pf2lora", "homlora")}
ORDERS = pytest.mark.parametrize("name", ["pf2lora", "pf2lora_fo", "pf2lora_joint"])


def test_clients_have_the_ranks_of_the_problem_and_share_directions():
    x, y = rank_recovery.problem(3, (2, 6))
    maps = [np.linalg.lstsq(inputs, outputs, rcond=None)[0] for inputs, outputs in zip(x, y, strict=True)]
    assert [int(np.linalg.matrix_rank(one, tol=1e-6)) for one in maps] == [2, 6]
    assert np.linalg.matrix_rank(maps[1] - maps[0], tol=1e-6) == 4
    np.testing.assert_allclose(np.linalg.svd(maps[1], compute_uv=False)[:6], 1.0, rtol=1e-9)


TRAJECTORY = {  # round: losses of both clients of the first problem, second order
    0: (1.329, 2.670),
    10: (2.517e-1, 4.739e-1),
    50: (6.353e-3, 8.092e-4),
    100: (3.712e-5, 4.064e-6),
}


@ORDERS
def test_pf2lora_finds_the_ranks_along_the_known_trajectory(name):
    method = rank_recovery.methods()[name]
    curves = rank_recovery.play(method, range(10), (3, 5), interval=10, total=300, records=30, tolerance=1e-2)
    assert (curves.ranks[:, -1] == [3, 5]).all() and np.all(curves.loss[:, -1] < 1e-6)
    assert curves.singular["common"].shape == (10, 2, 4) and curves.singular["personal"].shape == (10, 2, 1)
    if name == "pf2lora":
        for at, losses in TRAJECTORY.items():
            np.testing.assert_allclose(curves.loss[0, list(curves.rounds).index(at)], losses, rtol=2e-3)
        assert curves.ranks[0, [0, 1, 5, 10]].tolist() == [[0, 0], [5, 5], [3, 5], [3, 5]]


@ORDERS
def test_two_personal_ranks_reach_further_to_both_sides(name):
    method = rank_recovery.methods(4, 2, lr_common=0.3, interval=1)[name]
    curves = rank_recovery.play(method, range(10), (2, 6), interval=1, total=601, records=5, tolerance=1e-2)
    assert curves.rounds.tolist() == [0, 120, 240, 361, 481, 601]
    assert (curves.ranks[:, -1] == [2, 6]).all() and np.all(curves.loss[:, -1].mean(-1) < 1e-6)


@pytest.mark.parametrize(
    "name, total, loss, ranks, tolerance",
    [
        ("homlora", 600, (0.118, 0.556), (4, 4), 5e-3),
        ("homlora_wide", 600, (0.249, 0.242), (5, 5), 5e-3),
        ("perfedavg", 300, (0.040, 0.468), (4, 4), 1e-3),  # after the one step that adapts
        ("hetlora_pruning", 600, (0.958, 1.916), (1, 1), 5e-3),
        ("hetlora_spread", 600, (0.005, 0.954), (3, 3), 1e-3),  # zeros pad away what only the second client owns
        ("hetlora_truncated", 600, (0.315, 0.186), (5, 5), 1e-3),
    ],
)
def test_baselines_end_where_others_had_them(name, total, loss, ranks, tolerance):
    method = rank_recovery.methods()[name]
    curves = rank_recovery.play(method, range(5), (3, 5), interval=10, total=total, records=1, tolerance=1e-2)
    found = curves.loss[:, -1].mean(axis=0)
    np.testing.assert_allclose(found, loss, rtol=0, atol=tolerance)
    assert found.mean() > 0.2
    assert (curves.ranks[:, -1] == ranks).all()


def test_centralized_ends_at_the_best_matrix_of_its_rank():
    """Reduced-rank regression on both clients' examples has a closed form (Izenman, 1975)."""
    method = rank_recovery.methods()["centralized"]
    assert method.pooled
    curves = rank_recovery.play(method, range(2), (3, 5), interval=1, total=6000, records=1, tolerance=1e-2)
    for seed in range(2):
        x, y = (part.reshape(-1, rank_recovery.WIDTH) for part in rank_recovery.problem(seed, (3, 5)))
        fit = np.linalg.lstsq(x, y, rcond=None)[0]
        directions = np.linalg.svd(x @ fit, full_matrices=False)[2][: method.rank]
        least = 0.5 * np.square(x @ fit @ directions.T @ directions - y).sum() / len(x)
        np.testing.assert_allclose(curves.loss[seed, -1].mean(), least, rtol=1e-3)
    assert (curves.ranks[:, -1] == 4).all()


def test_step_sizes_of_baselines_are_their_own():
    table = rank_recovery.methods(lr_meta=0.5, lr_inner=0.25, lr_common=0.125, gamma=0.75, penalty=0.0625)
    meta, cutting = table["perfedavg"], table["hetlora_truncated"].build.keywords
    assert (meta.rate, meta.build.keywords["inner_rate"], table["homlora"].rate) == (0.5, 0.25, 0.125)
    assert (cutting["gamma"], cutting["penalty"], cutting["evaluate_global"]) == (0.75, 0.0625, True)


def test_every_method_has_a_style_of_its_own():
    names = list(rank_recovery.methods())
    rounds, values = np.arange(3), {name: np.ones((2, 3, 2)) for name in names}
    for draw in (recovery_plots.losses, recovery_plots.learnt):
        for panel in draw(rounds, values, (3, 5)).axes:
            lines = [line for line in panel.get_lines() if line.get_label() in names]
            styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
            assert len(styles) == len(lines) == len(names)


def test_a_run_leaves_its_summary_and_pictures(tmp_path, capsys):
    config = ConfigDict(SMALL)
    summary = experiment.run(config, str(tmp_path))
    assert summary == metrics.read_json(tmp_path / "summary.json")
    assert list(summary["methods"]) == list(SMALL["only"])
    for found in summary["methods"].values():
        assert np.shape(found["loss"]) == np.shape(found["ranks"]) == (2, 2)
        assert found["true_ranks"] == [[3, 5], [3, 5]]
    report.show(tmp_path)
    assert "both right" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"losses", "learnt_ranks", "singular_values"}
    with pytest.raises(ValueError, match="steps was 200 and is 100"):
        experiment.run(ConfigDict(SMALL | {"steps": 100}), str(tmp_path))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"client_rank": 4}, "client_rank is 4, expected 1 to rank - 1, which is 3"),
        ({"rank": 9, "client_rank": 3}, "rank \\+ client_rank is 12, expected at most 10"),
        ({"steps": 15}, "steps is 15, expected a positive multiple of interval, which is 10"),
        ({"seeds": 0}, "seeds is 0, expected 1 or more"),
        ({"records": 0}, "records is 0, expected 1 or more"),
        ({"lr_meta": -0.1}, "lr_meta is -0.1, expected more than 0"),
        ({"rank_tolerance": 1.0}, "rank_tolerance is 1.0, expected between 0 and 1"),
        ({"only": ("lora",)}, "only names 'lora', expected some of pf2lora"),
        ({"ranks": 3}, "config.ranks is not a setting of study"),
        ({"study": "other"}, "study is 'other', expected rank_recovery"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_nothing(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        experiment.run(ConfigDict(SMALL | changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

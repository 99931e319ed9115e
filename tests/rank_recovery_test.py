"""The synthetic study: its problem, the trajectory that others got, and what a run leaves."""

import functools

import numpy as np
import pytest
from ml_collections import ConfigDict

from fedjax_peft import experiment, metrics, rank_recovery
from fedjax_peft.reports import report

SMALL = {"study": "rank_recovery", "seeds": 2, "steps": 200, "only": ("pf2lora", "homlora", "hetlora_pruning")}


def test_clients_have_the_ranks_of_the_problem_and_share_directions():
    x, y = rank_recovery.problem(3, (2, 6))
    maps = [np.linalg.lstsq(inputs, outputs, rcond=None)[0] for inputs, outputs in zip(x, y, strict=True)]
    assert [int(np.linalg.matrix_rank(one, tol=1e-6)) for one in maps] == [2, 6]
    assert np.linalg.matrix_rank(maps[1] - maps[0], tol=1e-6) == 4
    np.testing.assert_allclose(np.linalg.svd(maps[1], compute_uv=False)[:6], 1.0, rtol=1e-9)


def test_pf2lora_finds_the_ranks_along_the_known_trajectory():
    method = rank_recovery.methods(4, 1, 0.03, 0.3, 10)["pf2lora"]
    curves = rank_recovery.play(method, range(3), (3, 5), interval=10, total=600, every=10, tolerance=1e-2)
    expected = {
        0: (1.329, 2.670),
        10: (2.517e-1, 4.739e-1),
        50: (6.353e-3, 8.092e-4),
        100: (3.712e-5, 4.064e-6),
    }
    for at, losses in expected.items():
        np.testing.assert_allclose(curves.loss[0, list(curves.rounds).index(at)], losses, rtol=2e-3)
    assert curves.ranks[0, [0, 1, 5, 10]].tolist() == [[0, 0], [5, 5], [3, 5], [3, 5]]
    assert (curves.ranks[:, -1] == [3, 5]).all() and np.all(curves.loss[:, -1] < 1e-6)
    assert curves.singular["common"].shape == (3, 2, 4) and curves.singular["personal"].shape == (3, 2, 1)


@pytest.mark.parametrize("name, loss", [("homlora", (0.118, 0.556)), ("homlora_wide", (0.249, 0.242))])
def test_one_matrix_fits_neither_client(name, loss):
    method = rank_recovery.methods(4, 1, 0.03, 0.3, 10)[name]
    curves = rank_recovery.play(method, range(5), (3, 5), interval=10, total=600, every=600, tolerance=1e-2)
    np.testing.assert_allclose(curves.loss[:, -1].mean(axis=0), loss, atol=5e-3)


@pytest.mark.parametrize(
    "name, settings, total, loss",
    [
        ("perfedavg", {}, 300, (0.040, 0.468)),  # after the one step that adapts
        ("hetlora_spread", {}, 600, (0.005, 0.954)),  # zeros pad away what only the second client owns
        ("hetlora_high", {"evaluate_global": True}, 600, (0.315, 0.186)),
    ],
)
def test_baselines_end_where_others_had_them(name, settings, total, loss):
    method = rank_recovery.methods(4, 1, 0.03, 0.3, 10)[name]
    method = method._replace(build=functools.partial(method.build, **settings))
    curves = rank_recovery.play(method, range(5), (3, 5), interval=10, total=total, every=total, tolerance=1e-2)
    np.testing.assert_allclose(curves.loss[:, -1].mean(axis=0), loss, atol=1e-3)


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
        ({"only": ("lora",)}, "only names 'lora', expected some of pf2lora"),
        ({"ranks": 3}, "config.ranks is not a setting of study"),
        ({"study": "other"}, "study is 'other', expected rank_recovery"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_nothing(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        experiment.run(ConfigDict(SMALL | changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

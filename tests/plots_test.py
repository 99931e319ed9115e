"""Pictures of a run: what their marks stand for, and that any run can be drawn without a warning."""

import math
import subprocess
import sys
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from fedjax_peft.reports import client_plots, plots

NAN = math.nan


def make_rows(clients: int, groups: int, total: int = 4, unseen: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Rows of clients.parquet. Client i has i + 1 training and 2 i + 2 test examples and an accuracy of .01 i at first,
    .1 more after two rounds, .2 more after four, and .3 + .01 i more when personalized."""
    points = [(index, "global", 0.05 * index) for index in range(0, total + 1, 2)] + [(total, "personal", None)]
    return [
        {
            "round": index,
            "client": client,
            "name": f"client {client}",
            "group": f"group {client % groups}",
            "pool": "unseen" if client >= clients - unseen else "seen",
            "point": point,
            "train_examples": client + 1,
            "examples": 2 * client + 2,
            "majority": 0.25,
            "accuracy": 0.01 * client + (0.3 + 0.01 * client if change is None else change),
        }
        | changes
        for index, point, change in points
        for client in range(clients)
    ]


def make_rounds(count: int) -> list[dict[str, Any]]:
    return [
        {"round": index, "loss": 3.0 - index, "reported": 2, "tokens_per_second": 100.0 * index, "padding_waste": 0.25}
        for index in range(count)
    ]


def draw(folder, rounds, rows, total=4, metric="accuracy") -> dict[str, np.ndarray]:
    plots.write(folder, rounds, rows, algorithm="fedit", metric=metric, total=total)
    return {path.stem: matplotlib.image.imread(path) for path in folder.iterdir()}


def lines_of(panel) -> dict[str, Any]:
    return {line.get_label(): line for line in panel.get_lines()}


@pytest.mark.parametrize(
    "rounds, rows",
    [
        (4, make_rows(25, 25, unseen=9)),
        (4, make_rows(300, 15, unseen=60)),
        (60, make_rows(150, 150)),
        (1, make_rows(1, 1)),
        (4, make_rows(3, 1, unseen=3)),
        (4, make_rows(5, 2, majority=NAN)),
        (4, make_rows(5, 2, train_examples=0)),
        (4, make_rows(2, 2, name="语 $a_b$ " + "long " * 10)),
        (4, make_rows(60, 2, group="$x 语")),
    ],
    ids=["25 groups", "300 clients", "150 groups", "one", "unseen only", "no majority", "no training", "name", "group"],
)
def test_any_run_can_be_drawn(tmp_path, rounds, rows):
    settings = [matplotlib.rcParams[name] for name in plots.STYLE]
    pictures = draw(tmp_path / "plots", make_rounds(rounds), rows)
    assert set(pictures) == {"curves", "clients", "gain"}
    for picture in pictures.values():
        assert min(picture.shape[:2]) > 250
        assert picture[..., :3].std() > 0.02
    assert [matplotlib.rcParams[name] for name in plots.STYLE] == settings


def test_pyplot_and_its_backends_are_never_loaded(tmp_path):
    code = f"""if True:
        import sys
        from fedjax_peft.reports import plots
        plots.write({str(tmp_path)!r}, {make_rounds(4)}, {make_rows(5, 5)}, algorithm="a", metric="accuracy", total=4)
        sys.exit("matplotlib.pyplot" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_of_no_rounds_can_be_drawn(tmp_path):
    rows = [row for row in make_rows(3, 3, total=0) if row["round"] == 0]
    assert set(draw(tmp_path / "plots", [], rows, total=0)) == {"curves", "clients", "gain"}


def test_clients_without_test_examples_are_left_out(tmp_path):
    rows = make_rows(3, 3) + [
        row | {"client": 9, "name": "empty", "examples": 0, "majority": NAN, "accuracy": NAN} for row in make_rows(1, 1)
    ]
    outcomes = client_plots.outcomes(rows, "accuracy", 4)
    assert [outcome.client for outcome in outcomes] == [0, 1, 2]
    assert outcomes[2][:6] == (2, "client 2", "group 2", "seen", 3, 6)
    assert outcomes[2].stages == pytest.approx({"majority": 0.25, "base": 0.02, "global": 0.22, "personal": 0.34})
    np.testing.assert_allclose(lines_of(scores_of(rows))["seen"].get_ydata(), [0.01, 0.11, 0.21])
    draw(tmp_path / "plots", make_rounds(4), rows)


def scores_of(rows):
    return plots.curves(make_rounds(4), rows, "accuracy", "title", 4).axes[1]


def test_another_metric_has_no_majority():
    rows = [row | {"mcc": -0.5} for row in make_rows(1, 1)]
    (outcome,) = client_plots.outcomes(rows, "mcc", 4)
    assert outcome.stages == {"base": -0.5, "global": -0.5, "personal": -0.5}


def test_curves_show_the_mean_of_each_pool_and_its_deviation():
    panel = scores_of(make_rows(5, 5, unseen=2))
    drawn = lines_of(panel)
    np.testing.assert_allclose(drawn["seen"].get_xdata(), [0, 2, 4])
    np.testing.assert_allclose(drawn["seen"].get_ydata(), [0.01, 0.11, 0.21])
    np.testing.assert_allclose(drawn["unseen"].get_ydata(), [0.035, 0.135, 0.235])
    band = panel.collections[0].get_paths()[0].vertices
    deviation = 0.01 * math.sqrt(2 / 3)
    assert band[:, 1].max() == pytest.approx(0.21 + deviation)
    assert band[:, 1].min() == pytest.approx(0.01 - deviation)
    personalized = {bars.get_label(): bars.lines[0].get_ydata()[0] for bars in panel.containers}
    assert personalized == pytest.approx({"seen, personalized": 0.32, "unseen, personalized": 0.37})


def test_points_on_the_way_have_a_curve():
    rows = make_rows(5, 5)
    early = [row | {"point": "personal", "accuracy": row["accuracy"] + 0.1} for row in rows if row["round"] < 4]
    (dashed,) = [line for line in scores_of(rows + early).get_lines() if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed.get_xdata(), [0, 2, 4])
    np.testing.assert_allclose(dashed.get_ydata(), [0.12, 0.22, 0.34])
    assert not [line for line in scores_of(rows).get_lines() if line.get_linestyle() == "--"]


def test_the_deviation_never_leaves_the_range_of_the_clients():
    rows = [row | {"accuracy": 1.0 if row["client"] else 0.0} for row in make_rows(10, 10)]
    band = scores_of(rows).collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 1.0
    assert band[:, 1].min() == pytest.approx(0.9 - 0.3)


def test_training_starts_at_round_one_and_skips_rounds_without_reports():
    rounds = make_rounds(4)
    rounds[2] |= {"reported": 0, "loss": 0.0}
    loss, _, speed, waste = plots.curves(rounds, make_rows(2, 2), "accuracy", "title", 4).axes
    np.testing.assert_allclose(loss.get_lines()[0].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), [3, 2, NAN, 0])
    np.testing.assert_allclose(speed.get_lines()[0].get_ydata(), [0, 100, 200, 300])
    np.testing.assert_allclose(waste.get_lines()[0].get_ydata(), [25, 25, 25, 25])


def test_many_rounds_have_a_running_median():
    raw, median = plots.curves(make_rounds(60), make_rows(2, 2), "accuracy", "title", 4).axes[0].get_lines()
    assert len(raw.get_xdata()) == 60
    # Of a straight line the median of each window lies on the line: round r has loss 4 - r.
    np.testing.assert_allclose(median.get_ydata(), 4 - median.get_xdata())
    assert len(median.get_xdata()) == 60 - 3 + 1


def labels_of(panel) -> list[str]:
    """From top to bottom."""
    return [label.get_text() for label in panel.get_yticklabels()][::-1]


def dots(rows):
    return client_plots.dots(client_plots.outcomes(rows, "accuracy", 4), "fedit", "accuracy", "title")


def test_clients_stand_apart_by_pool_and_the_best_is_on_top():
    seen, unseen = dots(make_rows(5, 5, unseen=2)).axes
    assert labels_of(seen) == ["client 2  (6)", "client 1  (4)", "client 0  (2)"]
    assert labels_of(unseen) == ["client 4  (10)", "client 3  (8)"]
    assert seen.get_title().startswith("seen: 3 clients")
    marks = {line.get_marker(): line.get_xdata()[0] for line in seen.get_lines() if line.get_ydata()[0] == 2}
    expected = {"|": 0.25, "o": 0.02, "s": 0.22, "D": 0.34}
    assert {marker: marks[marker] for marker in expected} == pytest.approx(expected)


def test_many_clients_share_a_row_a_group():
    (panel,) = dots(make_rows(60, 3)).axes
    assert labels_of(panel) == [f"group {i}  (20 clients, 1,{180 + 40 * i})" for i in (2, 1, 0)]
    diamonds = [line.get_xdata()[0] for line in panel.get_lines() if line.get_marker() == "D"]
    np.testing.assert_allclose(sorted(diamonds), [0.3 + 0.02 * (28.5 + i) for i in range(3)])


def test_many_groups_share_a_row_a_pool():
    assert [labels_of(panel) for panel in dots(make_rows(130, 130, unseen=10)).axes] == [
        ["seen  (120 clients, 14,520)"],
        ["unseen  (10 clients, 2,510)"],
    ]


def test_what_the_font_cannot_draw_is_escaped():
    (panel,) = dots(make_rows(1, 1, name="语$ü")).axes
    assert labels_of(panel) == [r"\u8bed\$ü  (2)"]


def test_gain_is_personalized_less_federated():
    outcomes = client_plots.outcomes(make_rows(5, 5, unseen=2), "accuracy", 4)
    seen, unseen = client_plots.gain(outcomes, "accuracy", "title").axes[0].collections
    np.testing.assert_allclose(seen.get_offsets(), [[1, 0.1], [2, 0.11], [3, 0.12]])
    np.testing.assert_allclose(unseen.get_offsets(), [[4, 0.13], [5, 0.14]])
    assert np.all(np.diff([*seen.get_sizes(), *unseen.get_sizes()]) > 0)


def test_clients_without_training_examples_stand_left_of_one():
    rows = make_rows(2, 2, train_examples=0)
    panel = client_plots.gain(client_plots.outcomes(rows, "accuracy", 4), "accuracy", "title").axes[0]
    np.testing.assert_allclose(panel.collections[0].get_offsets()[:, 0], 0.5)
    assert panel.get_xlabel().endswith("(none: 0.5)")


def test_clients_with_as_many_examples_stand_at_their_groups():
    rows = [row | {"train_examples": 100, "group": "ab"[row["client"] % 2]} for row in make_rows(4, 4, unseen=2)]
    panel = client_plots.gain(client_plots.outcomes(rows, "accuracy", 4), "accuracy", "title").axes[0]
    seen, unseen = (part.get_offsets()[:, 0] for part in panel.collections)
    np.testing.assert_allclose([seen, unseen], [[-0.2, 0.8], [0.2, 1.2]])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["a", "b"]
    assert panel.get_xlabel() == "group; each client has 100 training examples"


def named(rows: list[dict[str, Any]], total: int = 4) -> list[dict[str, Any]]:
    """The rows with `lora r2` for `personal`, and no model that all clients share but at round 0."""
    return [
        row | {"point": {"personal": "lora r2"}.get(row["point"], row["point"])}
        for row in rows
        if row["round"] == 0 or row["point"] == "personal"
    ]


def test_a_point_of_another_name_is_compared_with_the_base():
    rows = named(make_rows(5, 5, unseen=2))
    outcomes = client_plots.outcomes(rows, "accuracy", 4, "lora r2")
    assert outcomes[2].stages == pytest.approx({"majority": 0.25, "base": 0.02, "personal": 0.34})
    seen, _ = client_plots.gain(outcomes, "accuracy", "title").axes[0].collections
    np.testing.assert_allclose(seen.get_offsets()[:, 1], [0.3, 0.31, 0.32])
    picture = client_plots.dots(outcomes, "fedp2eft", "accuracy", "title", "lora r2")
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["majority label", "base", "lora r2"]


def test_a_point_of_another_name_stands_behind_the_last_round():
    panel = plots.curves(make_rounds(4), named(make_rows(5, 5)), "accuracy", "title", 4, "lora r2").axes[1]
    assert lines_of(panel)["seen, base"].get_xdata() == [0]
    (bars,) = panel.containers
    assert bars.get_label() == "seen, lora r2"
    assert bars.lines[0].get_xdata()[0] > 4


def test_no_rounds_have_no_curves_beside_named_points(tmp_path):
    rows = named(make_rows(3, 3, total=0), total=0)
    plots.write(tmp_path / "plots", [], rows, algorithm="lora", metric="accuracy", total=0, point="lora r2")
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"clients", "gain"}


def test_without_rounds_the_global_model_is_the_base():
    (outcome,) = client_plots.outcomes(make_rows(1, 1, total=0), "accuracy", 0)
    assert set(outcome.stages) == {"majority", "base", "personal"}


def strategies(groups: int) -> list[dict[str, Any]]:
    return [
        {"client": i, "group": f"g{i}", "pool": pool, "point": point, "site": "classifier", "ranks": i}
        for i in range(groups)
        for pool in ("seen", "unseen")
        for point in ("lora r2", "lora r4")
    ]


@pytest.mark.parametrize(
    "groups, budgets, pictures",
    [
        (3, (2, 4), {"ranks", "distances", "budgets"}),
        (1, (2, 4), {"ranks", "budgets"}),
        (3, (2,), {"ranks", "distances"}),
        (0, (2,), set()),
    ],
)
def test_pictures_of_budgets_need_something_to_compare(tmp_path, groups, budgets, pictures):
    scores = {
        pool: {("base", None): 0.1} | {("lora", budget): 0.5 for budget in budgets} for pool in ("seen", "unseen")
    }
    plots.write_budgets(tmp_path, strategies(groups), scores, method="lora", budget=2, metric="accuracy")
    assert {path.stem for path in tmp_path.iterdir()} == pictures

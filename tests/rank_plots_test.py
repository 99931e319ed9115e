"""Pictures of rank selection: which numbers their cells, lines and bars stand for."""

import math
import warnings

import matplotlib
import numpy as np
import pytest

from fedjax_peft.reports import plots, rank_plots

LAYERS = [f"encoder.layer.{layer}" for layer in range(2)]
KINDS = {  # in the order of strategies.parquet, which is that of the names
    "attention.output.dense": "attention output",
    "attention.self.key": "key",
    "attention.self.query": "query",
    "attention.self.value": "value",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}
BERT = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in KINDS) + ("classifier", "pooler.dense")
LLAMA = tuple(
    f"model.layers.{layer}.{kind}"
    for layer in range(3)
    for kind in (
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
    )
)


def make_kept(groups: int, sites: tuple[str, ...] = BERT) -> rank_plots.Kept:
    """Group g keeps g + j ranks at site j."""
    ranks = np.arange(groups)[:, None] + np.arange(len(sites), dtype=float)
    return rank_plots.Kept(tuple(f"g{i}" for i in range(groups)), (4,) * groups, sites, ranks)


def panels_of(picture) -> dict:
    return {panel.get_title(): panel for panel in picture.axes if panel.get_title()}


def meshes_of(panel) -> list[np.ndarray]:
    return [np.asarray(mesh.get_array()) for mesh in panel.collections]


def test_ranks_are_means_over_the_clients_of_a_group():
    rows = [
        {"client": client, "group": group, "site": site, "ranks": ranks}
        for client, group, counts in ((7, "b", (1, 3)), (2, "a", (4, 0)), (5, "b", (2, 6)))
        for site, ranks in zip(("s", "t"), counts, strict=True)
    ]
    kept = rank_plots.kept(rows)
    assert kept[:3] == (("a", "b"), (1, 2), ("s", "t"))
    np.testing.assert_allclose(kept.ranks, [[4, 0], [1.5, 4.5]])


def test_a_panel_has_layers_as_rows_kinds_as_columns_and_a_strip_for_what_lies_outside():
    picture = rank_plots.heat_map(make_kept(3), "title")
    panels = panels_of(picture)
    assert list(panels) == ["mean of groups", "g0 (4)", "g1 (4)", "g2 (4)"]
    panel = panels["g1 (4)"]
    stack, classifier, pooler = meshes_of(panel)
    # Columns are in the order of the forward pass; group 1 keeps 1 + j.
    order = [list(KINDS.values()).index(kind) for kind in ("query", "key", "value", "attention output")] + [4, 5]
    np.testing.assert_allclose(stack, [1 + np.array(order), 7 + np.array(order)])
    assert (classifier.item(), pooler.item()) == (13, 14)
    np.testing.assert_allclose(meshes_of(panels["mean of groups"])[0], stack)
    names = [label.get_text() for label in panel.get_xticklabels()]
    assert names == ["query", "key", "value", "attention output", "intermediate", "output"]
    left = panels["mean of groups"].get_yticklabels()
    assert [label.get_text() for label in left] == ["0", "1", "classifier", "pooler"]
    # Layer 0 is on top, and what lies behind the stack below it.
    assert panel.get_ylim()[0] > panel.get_ylim()[1] == 0


def test_all_panels_share_their_colours():
    picture = rank_plots.heat_map(make_kept(3), "title")
    limits = {mesh.get_clim() for panel in panels_of(picture).values() for mesh in panel.collections}
    assert limits == {(0.0, 2.0 + len(BERT) - 1)}


def test_llama_and_unknown_sites_have_their_columns():
    picture = rank_plots.heat_map(make_kept(1, (*LLAMA, "model.layers.0.mystery")), "title")
    (panel,) = panels_of(picture).values()
    names = [label.get_text() for label in panel.get_xticklabels()]
    assert names == ["query", "key", "attention output", "gate", "intermediate", "output", "mystery"]
    (stack,) = meshes_of(panel)
    assert stack[0, -1] == len(LLAMA)
    assert np.ma.is_masked(panel.collections[0].get_array()[1, -1])  # no such site in layer 1


def test_very_many_groups_leave_their_mean():
    picture = rank_plots.heat_map(make_kept(rank_plots.PANELS + 1), "title")
    assert list(panels_of(picture)) == ["mean of groups"]


def test_distances_are_mean_differences_over_the_budget():
    ranks = np.array([[4.0, 0.0], [0.0, 4.0], [3.0, 1.0]])
    kept = rank_plots.Kept(("a", "b", "c"), (1, 1, 1), ("s", "t"), ranks)
    picture = rank_plots.distances(kept, 2, "title")
    panel = picture.axes[0]
    drawn = np.asarray(panel.images[0].get_array().filled(math.nan))
    np.testing.assert_allclose(drawn, [[math.nan, 2, 0.5], [2, math.nan, 1.5], [0.5, 1.5, math.nan]])
    assert [text.get_text() for text in panel.texts] == ["2.00", ".50", "2.00", "1.50", ".50", "1.50"]
    assert "per site / budget of 2" in picture.get_suptitle()


@pytest.mark.parametrize("groups, numbers", [(16, 16 * 15), (17, 0)])
def test_distances_of_many_groups_are_not_written_out(groups, numbers):
    kept = make_kept(groups)
    assert len(rank_plots.distances(kept, 2, "title").axes[0].texts) == numbers


def test_curves_are_sorted_by_budget_and_leave_out_what_has_none():
    curves = rank_plots.curves({("base", None): 0.1, ("lora", 4): 0.4, ("lora", 2): 0.3, ("p", 2): 0.5})
    assert list(curves) == ["lora", "p"]
    np.testing.assert_allclose(curves["lora"].budgets, [2, 4])
    np.testing.assert_allclose(curves["lora"].mean, [0.3, 0.4])
    assert curves["lora"].deviation is None


def test_curves_over_seeds_have_their_sample_deviation():
    (curve,) = rank_plots.curves({("lora", 2): [0.1, 0.3], ("lora", 4): [0.2, 0.6]}).values()
    np.testing.assert_allclose(curve.mean, [0.2, 0.4])
    np.testing.assert_allclose(curve.deviation, [0.02**0.5, 0.08**0.5])


def make_curve(mean: float, deviation: float | None = None) -> rank_plots.Curve:
    bars = None if deviation is None else np.full(3, deviation)
    return rank_plots.Curve(np.array([2, 4, 16]), mean + np.arange(3.0), bars)


def test_a_panel_a_pool_has_a_line_a_method_and_the_base():
    panels = {"seen": {"p": make_curve(5.0), "lora": make_curve(3.0)}, "unseen": {"p": make_curve(4.0)}}
    picture = rank_plots.against_budget(panels, {"seen": 1.0, "unseen": 2.0}, "accuracy")
    seen, unseen = picture.axes
    drawn = {bars.get_label(): bars.lines[0] for bars in seen.containers}
    np.testing.assert_allclose(drawn["p"].get_xdata(), [2, 4, 16])
    np.testing.assert_allclose(drawn["lora"].get_ydata(), [3, 4, 5])
    assert [bars.lines[2] for bars in seen.containers] == [(), ()]  # no bars
    for panel, base in ((seen, 1.0), (unseen, 2.0)):
        (line,) = (line for line in panel.get_lines() if line.get_label() == "base")
        assert list(line.get_ydata()) == [base, base]
    assert [label.get_text() for label in seen.get_xticklabels()] == ["2", "4", "16"]
    # A method looks the same in every panel.
    assert drawn["p"].get_color() == unseen.containers[0].lines[0].get_color() != drawn["lora"].get_color()
    assert seen.get_ylabel() == "accuracy, mean over groups"


def test_methods_that_some_pool_lacks_are_in_the_legend():
    panels = {"seen": {"p": make_curve(5.0)}, "unseen": {"lora": make_curve(4.0)}}
    picture = rank_plots.against_budget(panels, {"seen": 1.0, "unseen": 2.0}, "accuracy")
    assert {text.get_text() for text in picture.legends[0].get_texts()} == {"base", "p", "lora"}


def test_bars_stand_for_the_deviation_and_beside_one_another():
    panels = {"seen": {"p": make_curve(5.0, 0.5), "lora": make_curve(5.0, 0.25)}}
    (panel,) = rank_plots.against_budget(panels, {"seen": 1.0}, "accuracy").axes
    heights = [bars.lines[2][0].get_segments()[0][:, 1] for bars in panel.containers]
    np.testing.assert_allclose(heights, [[4.5, 5.5], [4.75, 5.25]])
    left, right = (bars.lines[0].get_xdata() for bars in panel.containers)
    assert np.all(left < right)
    np.testing.assert_allclose(np.sqrt(left * right), [2, 4, 16])


@pytest.mark.parametrize(
    "kept",
    [
        make_kept(16),
        make_kept(40),
        make_kept(1),
        make_kept(2, ("classifier",)),
        make_kept(2)._replace(groups=("语 $x", "long " * 9)),
        make_kept(2)._replace(ranks=np.zeros((2, len(BERT)))),
    ],
    ids=["16 groups", "40 groups", "one group", "no stack", "names", "nothing kept"],
)
def test_any_ranks_can_be_drawn(tmp_path, kept):
    with matplotlib.rc_context(plots.STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_plots.heat_map(kept, "title").savefig(tmp_path / "ranks.png", dpi=40)
        if len(kept.groups) > 1:
            rank_plots.distances(kept, 2, "title").savefig(tmp_path / "distances.png", dpi=40)

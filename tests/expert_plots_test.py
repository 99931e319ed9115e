"""Pictures of experts: which numbers their cells, marks and lines stand for."""

import math
import warnings

import matplotlib
import numpy as np
import pytest

from fedjax_peft.reports import expert_plots, plots


def make_rows(clients: int, groups: int, experts: int = 6, sites: int = 4) -> list[dict]:
    """Client c holds expert (c + j) % E at site j, and one more where j is even."""
    return [
        {
            "client": client,
            "name": f"client {client}",
            "group": f"group {client % groups}",
            "site": f"layers.{site}",
            "experts": [(client + site) % experts, (client + site + 1) % experts if site % 2 == 0 else -1],
        }
        for client in range(clients)
        for site in range(sites)
    ]


def test_clients_stand_by_group_and_experts_are_counted_over_sites():
    found = expert_plots.held(make_rows(4, 2))
    assert found.names == ("client 0", "client 2", "client 1", "client 3")
    assert found.groups == ("group 0", "group 0", "group 1", "group 1")
    np.testing.assert_array_equal(found.experts, [[2, 1, 2, 1]] * 4)
    # Client 0 holds 0 and 1 at site 0, 1 at site 1, 2 and 3 at site 2, 3 at site 3.
    np.testing.assert_array_equal(found.sites[0], [1, 2, 1, 2, 0, 0])
    np.testing.assert_array_equal(found.sites[1], [0, 0, 1, 2, 1, 2])


def test_cells_marks_and_lines_stand_for_these_numbers():
    found = expert_plots.held(make_rows(4, 2))
    picture = expert_plots.heat_map(found, "fedamole")
    cells, numbers = picture.axes[:2]
    np.testing.assert_array_equal(np.asarray(cells.collections[0].get_array()), found.sites)
    assert [label.get_text() for label in cells.get_yticklabels()] == list(found.names)
    assert cells.get_ylim()[0] > cells.get_ylim()[1], "the first client is on top"
    (bars,) = numbers.collections
    np.testing.assert_array_equal([part[:, 0] for part in bars.get_segments()], [[1, 2]] * 4)
    mean = numbers.get_lines()[0]
    np.testing.assert_array_equal(mean.get_xdata(), [1.5] * 4)
    between = [[line for line in panel.get_lines() if np.ptp(line.get_ydata()) == 0] for panel in (cells, numbers)]
    assert [[line.get_ydata()[0] for line in lines] for lines in between] == [[1.5], [1.5]]
    assert "6 experts a site, 4 clients, 4 sites" in picture.get_suptitle()


def test_many_clients_are_means_of_groups():
    found = expert_plots.held(make_rows(expert_plots.ROWS + 4, 2))
    cells = expert_plots.heat_map(found, "fedamole").axes[0]
    assert [label.get_text() for label in cells.get_yticklabels()] == ["group 0 (32)", "group 1 (32)"]
    even = np.array([name.endswith(tuple("02468")) for name in found.names])
    drawn = np.asarray(cells.collections[0].get_array())
    np.testing.assert_allclose(drawn, [found.sites[even].mean(0), found.sites[~even].mean(0)])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (10, 10, 30, 32), (60, 1, 8, 3), (300, 80, 64, 2)])
def test_any_assignment_can_be_drawn(tmp_path, sizes):
    rows = [row | {"point": "personal", "group": "语 $x" + row["group"]} for row in make_rows(*sizes)]
    other = [row | {"point": "lora r2", "experts": []} for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.write_experts(tmp_path, rows + other, algorithm="fedamole", point="personal")
    picture = matplotlib.image.imread(tmp_path / "experts.png")
    assert min(picture.shape[:2]) > 250 and picture[..., :3].std() > 0.02
    assert math.isfinite(picture.sum())

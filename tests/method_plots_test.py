"""Picture of several runs: a row a way, every seed, their mean and deviation."""

import numpy as np
import pytest

from fedjax_peft.reports import method_plots

SCORES = {
    "seen": {"base": [0.2, 0.2], "lora": [0.4, 0.6]},
    "unseen": {"base": [0.1], "fedit": [0.3]},
}


def test_a_panel_a_pool_has_a_row_a_way():
    seen, unseen = method_plots.ways(SCORES, "accuracy").axes
    assert [label.get_text() for label in seen.get_yticklabels()] == ["base", "lora", "fedit"]
    assert (seen.get_title(loc="left") or seen.get_title()) == "seen clients"
    dots = {line.get_ydata()[0]: line.get_xdata() for line in seen.lines if line.get_marker() == "."}
    np.testing.assert_allclose(dots[1], [0.4, 0.6])
    means = [container.lines[0] for container in seen.containers]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in means] == [(0.2, 0), (0.5, 1)]
    low, high = seen.containers[1].lines[2][0].get_segments()[0][:, 0]
    assert (high - low) / 2 == pytest.approx(0.02**0.5)
    # One seed has no deviation.
    assert not any(container.has_xerr for container in unseen.containers)

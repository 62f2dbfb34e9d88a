"""Statistics, tables and figures of studies."""

import math
import statistics

import numpy as np
import pytest

from studies import report
from studies.report import paired


def test_paired_interval_by_hand():
    """Differences 1, 2, 3, -1: mean 1.25, deviation sqrt(8.75 / 3), t of 3 degrees of freedom 3.182."""
    found = paired([2.0, 4.0, 6.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    half = 3.182 * math.sqrt(8.75 / 3) / 2
    assert (found.differences, found.mean, found.lower) == ([1, 2, 3, -1], 1.25, 1)
    assert (found.low, found.high) == pytest.approx((1.25 - half, 1.25 + half))
    assert found.deviation == pytest.approx(math.sqrt(8.75 / 3))
    assert paired([1.0], [2.0]) == report.Paired([-1.0], -1.0, None, None, None, 1)


def test_t_quantiles_enclose_95_percent():
    """By the density of Student's t, summed in steps."""
    for df in (1, 2, 5, 10, 30):
        t = np.linspace(0, report.T975[df - 1], 200_001)
        density = (1 + t**2 / df) ** (-(df + 1) / 2)
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        inside = 2 * scale * float(np.sum((density[1:] + density[:-1]) / 2)) * (t[1] - t[0])
        assert inside == pytest.approx(0.95, abs=2e-4), df
    assert len(report.T975) == 30


def test_table_has_spread_pruned_loss_and_paired_differences_sorted_by_mean():
    losses = {"dense": [2.0, 4.0], "fst": [1.5, 3.9]}
    panels = {"minus dense": {"fst": paired(losses["fst"], losses["dense"])}}
    lines = report.loss_table(losses, {"fst": [2.5, 4.5]}, {}, {"dense": 1.0, "fst": 0.766}, panels)
    assert lines[0] == "| method | FLOPs | validation loss | pruned to 2:4 | minus dense | 95 % interval | lower in |"
    deviation = statistics.stdev([-0.5, -0.1])
    half = 12.706 * deviation / math.sqrt(2)
    assert lines[2] == (
        f"| fst | 0.77 | 2.7000 +- 1.6971 | 3.5000 | -0.3000 +- {deviation:.4f} "
        f"| [{-0.3 - half:.4f}, {-0.3 + half:.4f}] | 2 of 2 |"
    )
    assert lines[3] == "| dense | 1.00 | 3.0000 +- 1.4142 |  |  |  |  |"
    lines = report.loss_table(losses, {}, {"fst": [0.5, 0.9]}, {"dense": 1.0}, panels)
    assert lines[0].startswith("| method | FLOPs | validation loss | pruned to 2:4 | early mu | minus dense |")
    assert lines[2].startswith("| fst |  | 2.7000 +- 1.6971 |  | 0.70 | -0.3000")
    assert lines[3] == "| dense | 1.00 | 3.0000 +- 1.4142 |  |  |  |  |  |"


def test_figure_draws_every_seed_and_tells_better_from_worse(tmp_path):
    from matplotlib.figure import Figure

    panel = {"worse": paired([1.0, 1.1, 1.2], [0.0, 0.0, 0.0]), "better": paired([-1.0, -1.1], [0.0, 0.0])}
    panel["unsure"] = paired([-1.0, 1.1], [0.0, 0.0])
    assert report.colour_of(paired([-1.0], [0.0])) == "0.35"  # one seed shows nothing
    assert [report.colour_of(d) for d in panel.values()] == [*report.COLOURS[1::-1], "0.35"]
    axes = Figure().subplots()
    report.draw_panel(axes, "minus dense", panel, ["better", "absent", "worse", "unsure"])
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [
        d.differences for d in (panel["better"], panel["worse"], panel["unsure"])
    ]
    bars = [tuple(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2.2]
    assert (panel["worse"].low, panel["worse"].high) in bars
    assert [text.get_text() for text in axes.texts] == ["-1.0500", "+1.1000", "+0.0500"]
    report.draw({"minus dense": panel, "minus ste": {"worse": panel["worse"]}}, tmp_path / "x.png", "methods")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

"""Tables and figures of compare.py: paired differences with their intervals."""

import math
import statistics
from dataclasses import dataclass

from runtime.plot import COLOURS

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom. More degrees use the last one, slightly too wide
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Paired:
    """Differences within each seed, their mean and sample standard deviation, the paired 95 % t-interval (None for one
    seed), and the number of seeds with a difference below zero."""

    differences: list[float]
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    lower: int

    @property
    def lower_in(self) -> str:
        return f"{self.lower} of {len(self.differences)}"


def paired(values: list[float], reference: list[float]) -> Paired:
    """values minus reference, seed by seed."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    mean, n, lower = statistics.fmean(differences), len(differences), sum(d < 0 for d in differences)
    if n == 1:
        return Paired(differences, mean, None, None, None, lower)
    deviation = statistics.stdev(differences)
    half = T975[min(n - 1, len(T975)) - 1] * deviation / math.sqrt(n)
    return Paired(differences, mean, deviation, mean - half, mean + half, lower)


def differences_from(references: tuple[str, ...], losses: dict[str, list[float]]) -> dict[str, dict[str, Paired]]:
    """{"minus <reference>": {label: difference}} of the references that have losses."""
    panels = {}
    for name in references:
        if name in losses:
            others = {label: values for label, values in losses.items() if label != name}
            panels[f"minus {name}"] = {label: paired(values, losses[name]) for label, values in others.items()}
    return panels


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def spread(values: list[float]) -> str:
    """Mean +- sample standard deviation; for one seed only the value."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} +- {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def interval(difference: Paired) -> str:
    return "" if difference.low is None else f"[{difference.low:.4f}, {difference.high:.4f}]"


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def by_mean(losses: dict[str, list[float]]) -> list[str]:
    """Labels, the lowest mean first."""
    return sorted(losses, key=lambda label: statistics.fmean(losses[label]))


def loss_table(
    losses: dict, pruned: dict, mus: dict, flops: dict[str, float], panels: dict[str, dict[str, Paired]]
) -> list[str]:
    """losses, pruned, mus: {label: one value per seed}. flops: {label: FLOPs of a step over dense}. panels: {title:
    {label: difference}}, three columns each."""
    heads = ["method", "FLOPs", "validation loss", "pruned to 2:4", *(["early mu"] if mus else [])]
    for title in panels:
        heads += [title, "95 % interval", "lower in"]
    rows = []
    for label in by_mean(losses):
        row = [label, f"{flops[label]:.2f}" if label in flops else "", spread(losses[label])]
        row += [f"{statistics.fmean(pruned[label]):.4f}" if label in pruned else ""]
        if mus:
            row.append(f"{statistics.fmean(mus[label]):.2f}" if label in mus else "")
        for panel in panels.values():
            d = panel.get(label)
            row += [spread(d.differences), interval(d), d.lower_in] if d else [""] * 3
        rows.append(row)
    return markdown(heads, rows)


def tuning_table(curves: dict[str, dict[str, list[float]]], left_out: dict, rates: list[str]) -> list[str]:
    """curves: {label: {learning rate: one loss per seed}}; the lowest mean of a label is bold. left_out: {label: loss
    of each seed at the rate that is best for the others}."""
    rows = []
    for label, losses in curves.items():
        cells = {rate: spread(of_rate) for rate, of_rate in losses.items()}
        cells[by_mean(losses)[0]] = f"**{cells[by_mean(losses)[0]]}**"
        rows.append([label, *(cells.get(rate, "") for rate in rates), spread(left_out[label])])
    return markdown(["method", *rates, "chosen by the others"], rows)


def equal_cost_table(costs: dict, steps: dict, losses: dict, references: tuple[str, ...]) -> list[str]:
    """costs (of a step over dense), steps, losses: {criterion: {label: value}}."""
    heads, panels = ["method"], {name: differences_from(references, losses[name]) for name in costs}
    for name, panel in panels.items():
        heads += [f"{name} of a step", "steps", f"loss at equal {name}", *panel]
    rows = []
    for label in dict.fromkeys(by_mean(losses["time"]) + by_mean(losses["FLOPs"])):
        row = [label]
        for name in costs:
            values = losses[name].get(label)
            row += [f"{costs[name][label]:.3f}", str(steps[name][label]), spread(values) if values else ""]
            differences = [panel.get(label) for panel in panels[name].values()]
            row += [f"{spread(d.differences)} {interval(d)}".strip() if d else "" for d in differences]
        rows.append(row)
    return markdown(heads, rows)


def flip_table(rates: dict[str, list[list[float]]], windows: tuple[int, ...]) -> list[str]:
    """rates: {variant: [means of the windows] per seed}. mu compares with the dense run of the same seed."""
    dense = list(zip(*rates["dense"], strict=True))
    rows = [["dense, r", *(f"{statistics.fmean(r):.5f}" for r in dense)]]
    for variant in (label for label in rates if label != "dense"):
        rows.append([f"{variant}, mu"])
        for sparse, base in zip(zip(*rates[variant], strict=True), dense, strict=True):
            mu = [a / b for a, b in zip(sparse, base, strict=True)]
            rows[-1].append(f"{statistics.fmean(mu):.2f} ({min(mu):.2f} to {max(mu):.2f})")
    note = f"Means over {len(rates['dense'])} seeds (smallest to largest); "
    note += "each mu is against the dense run of its own seed."
    return [*markdown(["run", *(f"t0 = {t0}" for t0 in windows)], rows), "", note]


# ---------------------------------------------------------------------------------------------------------------------
# Figure


def colour_of(difference: Paired) -> str:
    """Blue if the interval is below zero, vermilion if it is above, grey if it contains zero."""
    if difference.low is None or difference.low <= 0 <= difference.high:
        return "0.35"
    return COLOURS[0] if difference.high < 0 else COLOURS[1]


def draw_panel(axes, title: str, panel: dict[str, Paired], labels: list[str]) -> None:
    """One row per label, the first on top: a bar for the interval, its mean as a tick and a number, a dot per seed."""
    axes.axvline(0, color="0.2", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    for y, d in ((y, panel[label]) for y, label in enumerate(labels) if label in panel):
        colour = colour_of(d)
        axes.plot(d.differences, [y + 0.22] * len(d.differences), "o", color=colour, alpha=0.5, markersize=4, mew=0)
        if d.low is not None:
            axes.plot([d.low, d.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([d.mean], [y], "|", color=colour, markersize=13, markeredgewidth=2.2)
        axes.annotate(f"{d.mean:+.4f}", (1, y), fontsize=8.5, color=colour, **place)
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.locator_params(axis="x", nbins=5)


def draw(panels: dict[str, dict[str, Paired]], path, title: str) -> None:
    """A figure of one panel per reference or criterion, side by side, rows sorted by the first panel's means."""
    from matplotlib.figure import Figure  # not pyplot, which needs a display and has global state

    means = {label: d.mean for panel in reversed(panels.values()) for label, d in panel.items()}
    labels = sorted(means, key=means.get)
    figure = Figure(figsize=(4.2 + 3.6 * len(panels), 1.5 + 0.34 * len(labels)), dpi=130, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        draw_panel(axes, name, panel, labels)
    grid[0].set_yticks(range(len(labels)), labels, fontsize=9)
    grid[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    meaning = "validation loss, difference within each seed: tick = mean, bar = its 95 % interval, dot = one seed"
    figure.supxlabel(meaning, fontsize=8.5)
    figure.savefig(path)

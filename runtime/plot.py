"""Plot the losses and flip rates of runs: loss.png and flip_rate.png. Runs of act24 also get activations.png.

    python -m runtime.plot out-dense out-fst [--out=plots]

Each folder holds metrics.jsonl and config.json, as train.py writes them; the run may still be going on. The flip rates
(Definition 4.1) of all runs share one axis, so that a sparse run's curve can be compared with the dense run's. The
counts of 2:4 activations (methods/act24.py) have one line per block.
"""

import argparse
import itertools
import math
import os

from runtime.metrics import read_config, read_metrics, smooth

# Okabe and Ito's palette for the colour-blind, without its yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SKIP = 0.1  # the range of the loss axis ignores the first tenth of a run, whose high losses would hide the end


def switches(rows):
    """{first iteration: phase} of every phase but the first one."""
    return {b["iter"]: b["phase"] for a, b in itertools.pairwise(rows) if a["phase"] != b["phase"]}


def curve(rows, key):
    """(iterations, values) of the rows where `key` was measured and is finite."""
    points = [(row["iter"], row[key]) for row in rows if row[key] is not None and math.isfinite(row[key])]
    return [iteration for iteration, _ in points], [value for _, value in points]


def label_of(name, config):
    """The name of a run and its recipe, such as "out-fst (fst, decay 6e-05)"."""
    recipe = "dense" if config.get("sparse") == "none" else config.get("sparse")
    decay = config.get("masked_decay") if recipe != "dense" else None
    words = ([recipe] if recipe else []) + ([f"decay {decay:g}"] if decay else [])
    return f"{name} ({', '.join(words)})" if words else name


def load_runs(folders):
    """[{label, style, rows, switches}] of the runs in these folders. Raises ValueError for a run without rows."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    runs = []
    for i, (folder, name) in enumerate(zip(folders, names, strict=True)):
        rows = read_metrics(folder)
        if not rows:
            raise ValueError(f"{os.path.join(folder, 'metrics.jsonl')} has no complete line yet; try again later")
        name = (name if names.count(name) == 1 else folder).replace("$", r"\$")  # matplotlib would read formulas
        label = label_of(f"./{name}" if name.startswith("_") else name, read_config(folder))  # it hides _names
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", ":")[i // len(COLOURS) % 2]}
        runs.append({"label": label, "style": style, "rows": rows, "switches": switches(rows)})
    return runs


def new_figure(title, ylabel):
    from matplotlib.figure import Figure  # without pyplot there is no global state, and no display is needed

    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel="iteration", ylabel=ylabel)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def mark_switches(axes, runs):
    """A dashed line at each change of phase, in the colour of its run, or in grey if several runs share it."""
    colours_of = {}
    for run in runs:
        for switch in run["switches"].items():
            colours_of.setdefault(switch, []).append(run["style"]["color"])
    for (iteration, phase), colours in colours_of.items():
        colour = colours[0] if len(colours) == 1 else "0.35"
        axes.axvline(iteration, color=colour, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
        place = {"xy": (iteration, 0.98), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        font = {"rotation": 90, "ha": "right", "va": "top", "fontsize": 8, "color": colour}
        axes.annotate(f"{phase} from {iteration:,}", **place, xytext=(-3, 0), **font)


def finish(figure, path):
    """Add the legend below the axes and write the file."""
    figure.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path)


def mark_and_finish(figure, runs, path):
    """Mark the changes of phase, and `finish`. Returns False, without a file, if there are no runs."""
    if runs:
        mark_switches(figure.axes[0], runs)
        finish(figure, path)
    return bool(runs)


def plot_loss(runs, path):
    """Training losses as thin lines, validation losses with markers. The legend has the last validation losses."""
    figure, axes = new_figure("loss: thin = train, marked = validation", "cross-entropy (nats per token)")
    settled, drawn = [], []
    for run in runs:
        train, val = curve(run["rows"], "train_loss"), curve(run["rows"], "val_loss")
        drawn += [run] if train[1] or val[1] else []
        axes.plot(*train, **run["style"], linewidth=0.7, alpha=0.45)
        label = run["label"] + (f", val {val[1][-1]:.4f}" if val[1] else "")
        axes.plot(*val, **run["style"], linewidth=1.6, marker="o", markersize=3.5, label=label)
        first = run["rows"][-1]["iter"] * SKIP
        settled += [y for xs, ys in (train, val) for x, y in zip(xs, ys, strict=True) if x >= first]
    if settled and max(settled) > min(settled):
        margin = 0.04 * (max(settled) - min(settled))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    return mark_and_finish(figure, drawn, path)


def plot_flip_rate(runs, path):
    """Flip rates above 0 as faint points, with a running mean, on a log axis."""
    figure, axes = new_figure("flip rate", "fraction of mask entries changed per step")
    axes.set_yscale("log")
    drawn = []
    for run in runs:
        rows = [row for row in run["rows"] if 0 < (row["flip_rate"] or 0) < math.inf]
        label, half = run["label"], len(rows) // 60
        for _, phase_rows in itertools.groupby(rows, lambda row: row["phase"]):  # no mean across a change of phase
            xs, ys = curve(phase_rows, "flip_rate")
            axes.plot(xs, ys, ".", color=run["style"]["color"], markersize=3.5, alpha=0.3, markeredgewidth=0)
            axes.plot(xs, smooth(ys, half), **run["style"], linewidth=1.6, label=label)
            label = None
        drawn += [run] if rows else []
    return mark_and_finish(figure, drawn, path)


SHARES = {  # columns with one number per block -> title of their axes
    "zeros": "share of the hidden activations that are zero",
    "over_two": "share of the groups of four with more than two non-zeros",
    "energy_dropped": "share of the energy that 2:4 drops, or would drop in dense blocks",
}


def plot_activations(runs, path):
    """The counts of each block, dark for the first one and light for the last. Runs differ in their lines' style."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = [run for run in runs if any(row["zeros"] for row in run["rows"])]
    figure = Figure(figsize=(8, 9), dpi=130, layout="constrained")
    panels = dict(zip(SHARES, figure.subplots(len(SHARES), sharex=True), strict=True))
    for number, run in enumerate(drawn):
        rows = [row for row in run["rows"] if row["zeros"]]
        blocks = len(rows[0]["zeros"])
        for column, axes in panels.items():
            for block in range(blocks):
                style = {"color": colormaps["viridis"](0.9 * block / max(1, blocks - 1)), "linewidth": 1.4}
                style["linestyle"] = ("-", "--", ":", "-.")[number % 4]
                named = column == "zeros" and (blocks <= 6 or block in (0, blocks // 2, blocks - 1))
                label = f"{run['label']}, block {block}" if named else None
                axes.plot([row["iter"] for row in rows], [row[column][block] for row in rows], **style, label=label)
    for column, axes in panels.items():
        axes.set_title(SHARES[column], loc="left", fontsize=10.5)
        axes.set_yscale("linear" if column == "zeros" else "log")
        axes.grid(which="major", color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if drawn:
        finish(figure, path)
    return bool(drawn)


def main(argv=None):
    parser = argparse.ArgumentParser("plot.py", description=__doc__, usage=argparse.SUPPRESS)  # one-line errors
    parser.add_argument("folders", nargs="+", metavar="out-dir", type=os.path.expanduser, help="folder of a run")
    parser.add_argument("--out", type=os.path.expanduser, help="folder for the PNGs (default: the first run's folder)")
    args = parser.parse_args(argv)
    out = args.out or args.folders[0]
    plots = (("loss", plot_loss, "finite loss"), ("flip_rate", plot_flip_rate, "flip rate above zero"))
    try:
        runs = load_runs(args.folders)
        os.makedirs(out, exist_ok=True)
        for name, draw, missing in plots:
            path = os.path.join(out, f"{name}.png")
            print(f"wrote {path}" if draw(runs, path) else f"no run has a {missing}; {path} not written")
        if plot_activations(runs, path := os.path.join(out, "activations.png")):
            print(f"wrote {path}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}; pip install matplotlib")


if __name__ == "__main__":
    main()

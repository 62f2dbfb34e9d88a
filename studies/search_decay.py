"""Find the decay factor lambda on the warm-up stage (section 4.3, "Fast Decay Factor Determination").

    python -m studies.search_decay config/train_gpt2_sparse.py --launcher="torchrun --standalone --nproc_per_node=8"

Give it the arguments of the training command; the search's own settings follow them. It trains the dense model in
search_dir/dense, and one sparse run per candidate lambda in search_dir/decay-<lambda>. Then it computes mu(lambda) =
mean r' / mean r over the window, writes search.json and search.png, and prints the training command with the lambda
whose mu lies in [0.60, 0.95], nearest to the middle on a log scale. If there is none, give more --candidates: the same
command does not repeat finished runs.

r' and r are the flip rates (Definition 4.1, fraction of mask entries per step) of the candidate and of the dense run at
the same steps. Seed, initial weights and batches are equal, so only the method differs.

A run has 1.5 * warmup_iters steps, all sparse, of the training run's schedule (lr_decay_iters stays). The window is the
last fifth, 1.2 to 1.5 warm-ups. Before the end of the warm-up lambda has little effect on the masks; later steps cost
more and tell little. mu keeps falling slowly (for the small model at lambda 2e-3: 0.59, 0.51, 0.46, 0.42 after 1.5, 2,
2.5, 3 warm-ups, results/flip_rate.md), so check it again in the training run (flip_reference).

The same command resumes a search that was stopped or killed. The checkpoint of a finished run is deleted.
"""

import argparse
import json
import math
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from configurator import configure, expand, setting_names, without_removed, write_json
from runtime.health import HEALTHY, TARGET
from runtime.loader import DATA_FOLDER, Tokens, load_meta
from runtime.metrics import read_config, read_metrics, smooth
from runtime.plot import curve, finish, new_figure
from sparse24 import SETTINGS, Recipe, get_recipe, recipe_of
from studies import runs

HARMLESS = ("log_interval", "wandb_project", "wandb_run_name")  # these may change between two calls


@dataclass
class Search:
    """A search: its settings, and its results so far."""

    args: argparse.Namespace
    words: list[str]  # the user's arguments for train.py
    search_settings: dict  # settings of the search, which follow the user's
    settings: dict  # all settings of a candidate without out_dir and masked_decay
    real_steps: int  # steps of the training run
    results: dict[float, dict] = field(default_factory=dict)  # {lambda: what `compare` returns}

    def __post_init__(self):
        self.folder, self.steps = Path(self.args.search_dir), self.settings["max_iters"]
        self.candidates = parse_candidates(self.args.candidates)
        self.first = self.steps - window_size(self.steps)  # first step of the window
        python = self.args.launcher == "python"
        self.launcher = [sys.executable] if python else shlex.split(self.args.launcher)

    @property
    def mus(self) -> dict[float, float]:
        return {decay: result["mu"] for decay, result in self.results.items()}

    @property
    def best(self) -> float | None:
        return recommend(self.mus)


def window_size(steps: int) -> int:
    return max(1, steps // 5)


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: finds all mistakes before anything is written


def train_defaults() -> dict:
    """The default settings of train.py for `configure`, from its source, without importing the script."""
    source = runs.TRAIN.read_text(encoding="utf-8")
    defaults = {"__file__": str(runs.TRAIN)}
    exec(source.partition("# ---- the run ----")[2].partition("# ---- end of settings ----")[0], defaults)
    return defaults


def parse_candidates(text: str) -> list[float]:
    try:
        values = sorted({float(f"{float(word):g}") for word in text.split(",")})  # rounded as in folder names
    except ValueError:
        raise ValueError(f"--candidates={text}, need numbers with commas between them, like 0,6e-5,2e-4") from None
    if not (values[0] >= 0 and 0 < values[-1] < math.inf):
        raise ValueError(f"--candidates={text}, need finite factors of at least 0, and one above 0")
    return values


def settings_of_search(recipe: Recipe, steps: int, flip_mask: str) -> dict:
    """The settings that the search adds after the user's."""
    settings = {"sparse": recipe.name, "max_iters": steps, "dense_start": steps, "dense_pretrain": 0.0}
    settings["flip_mask"] = recipe.virtual_mask if flip_mask == "auto" else flip_mask  # also in the dense run
    settings["flip_interval"] = max(1, window_size(steps) // 50)  # at least 50 samples in a long window
    settings |= {"flip_reference": "", "init_from": "auto", "wandb_log": False, "eval_interval": 0, "eval_iters": 1}
    return settings | {"always_save_checkpoint": True, "checkpoint_interval": max(1, steps // 10)}


def prepare(args: argparse.Namespace, words: list[str]) -> Search:
    """The search for these options and arguments of train.py. Raises ValueError, or OSError for unreadable data."""
    defaults = train_defaults()
    overrides = configure(defaults, words)
    settings = {name: defaults[name] for name in setting_names(defaults)} | overrides
    if settings["init_from"] not in ("auto", "scratch"):
        raise ValueError(f"init_from={settings['init_from']}: a search starts from scratch; give --init_from=auto")
    if settings["eval_only"]:
        raise ValueError("eval_only=True: a search has to train; give --eval_only=False")
    usual = min(max(round(1.5 * settings["warmup_iters"]), 100), max(settings["max_iters"], 10))
    steps = usual if args.steps is None else args.steps
    if steps < 10:
        raise ValueError(f"--steps={steps}, need at least 10 steps ({usual} is usual)")
    sparse = "fst" if settings["sparse"] == "none" else settings["sparse"]  # the config file may be for a dense run
    if get_recipe(sparse).dense_pretrain:
        raise ValueError(f"sparse={sparse}: its dense start fills the warm-up that a search measures; use another")
    recipe = recipe_of({**overrides, "sparse": sparse})
    added = settings_of_search(recipe, steps, settings["flip_mask"])
    data = DATA_FOLDER / settings["dataset"]
    for split in ("train", "val"):
        Tokens(data, split, settings["block_size"], load_meta(data)["vocab_size"])
    full = settings | {name: getattr(recipe, name) for name in SETTINGS} | added
    del full["out_dir"], full["masked_decay"]
    search = Search(args, words, added, full, settings["max_iters"])
    if not args.launcher.strip() or not shutil.which(search.launcher[0]):
        raise ValueError(f"--launcher={args.launcher}: there is no such program; give its path, or activate .venv")
    check_folder(search)
    return search


def check_folder(search: Search) -> None:
    """Raise ValueError if search_dir holds something else than this search."""
    folder, path = search.folder, search.folder / "search.json"
    if folder.exists() and not path.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a search; use another --search_dir")
    if not any(folder.glob("*/metrics.jsonl")):
        return  # no run has begun, so the settings may change
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is broken; delete {folder}, or use another --search_dir") from None
    saved = without_removed(saved, path)
    compared = [name for name in search.settings if name in saved and name not in HARMLESS]
    differing = [f"{k}={search.settings[k]} (there {saved[k]})" for k in compared if search.settings[k] != saved[k]]
    if differing:
        raise ValueError(
            f"{folder} holds a search with other settings: {', '.join(differing)}; use those (max_iters is --steps), "
            "or another --search_dir"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The runs, and the choice of lambda


def run_folder(search: Search, decay: float | None) -> Path:
    """The folder of a candidate's run; None: of the dense run."""
    return search.folder / ("dense" if decay is None else f"decay-{decay:g}")


def run_words(search: Search, decay: float | None) -> list[str]:
    added = search.search_settings | ({"sparse": "none"} if decay is None else {"masked_decay": decay})
    return [*search.words, *(f"--{name}={value}" for name, value in added.items())]


def run(search: Search, decay: float | None) -> dict[int, float]:
    """Start or resume one run, and return the flip rates of its window. Raises RuntimeError if it fails."""
    folder = run_folder(search, decay)
    runs.train(folder, run_words(search, decay), search.steps, search.launcher)
    for name in ("ckpt.pt", "ckpt_prev.pt"):  # gigabytes that are not needed any more
        (folder / name).unlink(missing_ok=True)
    return runs.flip_rates(folder, search.first)


def run_search(search: Search) -> None:
    """Train the runs that are not finished, and compare all candidates with the dense run."""
    write_results(search)
    dense = run(search, None)
    seconds = runs.last_row(run_folder(search, None))["elapsed_s"]
    print(f"dense run done, after {seconds / 60:.1f} minutes of training", flush=True)
    for decay in search.candidates:
        search.results[decay] = compare(run(search, decay), dense)
        write_results(search)
        print(f"lambda = {decay:g}: mu = {search.results[decay]['mu']:.3f}", flush=True)


def compare(sparse: dict[int, float], dense: dict[int, float]) -> dict:
    """mu = mean r' / mean r over the same steps, and the smallest and largest r'/r of a single step."""
    if not dense or sparse.keys() != dense.keys():
        raise ValueError(f"{len(sparse)} and {len(dense)} flip rates in the window, need one or more of the same steps")
    rate, dense_rate = statistics.fmean(sparse.values()), statistics.fmean(dense.values())
    if dense_rate == 0:
        raise ValueError("no mask of the dense run flips in the window, so there is no mu; raise --steps")
    single = [sparse[step] / dense[step] for step in dense if dense[step]]
    mus = {"mu": rate / dense_rate, "mu_smallest": min(single), "mu_largest": max(single)}
    return {"flip_rate": rate, "dense_flip_rate": dense_rate} | mus


def distance(mu: float) -> float:
    """Distance of mu from the middle of the band, on a log scale."""
    return abs(math.log(max(mu, 1e-9) / TARGET))


def recommend(mus: dict[float, float]) -> float | None:
    """The lambda whose mu is in the band and nearest to its middle; None if no mu is in the band."""
    inside = [decay for decay, mu in mus.items() if HEALTHY[0] <= mu <= HEALTHY[1]]
    return min(inside, key=lambda decay: distance(mus[decay]), default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Output


def describe_cost(search: Search) -> str:
    settings, folders = search.settings, [run_folder(search, decay) for decay in (None, *search.candidates)]
    tokens = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
    total, done = len(folders) * search.steps, sum(runs.is_finished(folder, search.steps) for folder in folders)
    text = (
        f"{len(folders)} runs x {search.steps:,} steps = {total:,} steps of {tokens:,} tokens, {total * tokens:,} "
        f"tokens, {100 * total / max(1, search.real_steps):.3g} % of the training run's {search.real_steps:,} steps; "
        f"{done} of them done\nrecipe {settings['sparse']}, seed {settings['seed']}; mu is sampled at steps "
        f"{search.first:,} to {search.steps - 1:,}, every {settings['flip_interval']}"
    )
    warmup = settings["warmup_iters"]
    if search.first < warmup:
        text += f"\nnote: that begins before the warm-up's end, {warmup:,}; --steps={round(1.5 * warmup)} would not"
    return text


def training_command(search: Search, decay: float) -> str:
    recipe = f"--sparse={search.settings['sparse']}"  # the config file may be for a dense run
    start = [*shlex.split(search.args.launcher), "train.py"]
    return shlex.join([*start, *search.words, recipe, f"--masked_decay={decay:g}"])


def write_results(search: Search) -> None:
    nothing = {"flip_rate": None, "dense_flip_rate": None, "mu": None}
    results = {
        "settings": search.settings,
        "window": [search.first, search.steps],
        "healthy": HEALTHY,
        "candidates": [{"masked_decay": decay} | search.results.get(decay, nothing) for decay in search.candidates],
        "masked_decay": search.best,
        "command": None if search.best is None else training_command(search, search.best),
        "environment": read_config(run_folder(search, None)).get("environment"),
    }
    search.folder.mkdir(parents=True, exist_ok=True)
    write_json(search.folder / "search.json", results)


def draw(search: Search, path: Path) -> None:
    """Draw the flip rates of all runs over the steps (the paper's Figure 1), the healthy band and the window."""
    from matplotlib import colormaps

    figure, axes = new_figure("flip rate over the decay factor λ; μ in the window", "fraction of mask entries per step")
    half, best = window_size(search.steps) // search.settings["flip_interval"] // 8, search.best

    def smoothed(decay):
        steps, rates = curve(read_metrics(run_folder(search, decay)), "flip_rate")
        return steps, [rate or math.nan for rate in smooth(rates, half)]  # zero has no logarithm

    steps, dense = smoothed(None)
    band = ([factor * rate for rate in dense] for factor in HEALTHY)
    healthy = "healthy: {:.2f} to {:.2f} of dense".format(*HEALTHY)
    axes.fill_between(steps, *band, color="0.85", linewidth=0, label=healthy)
    axes.plot(steps, dense, color="black", linewidth=2.6, label="dense")
    for i, (decay, mu) in enumerate(search.mus.items()):
        colour = colormaps["plasma"](0.88 * i / max(1, len(search.mus) - 1))
        label = f"λ = {decay:g}, μ = {mu:.2f}" + (" (recommended)" if decay == best else "")
        axes.plot(*smoothed(decay), color=colour, linewidth=2.2 if decay == best else 1.2, label=label)
    axes.axvspan(search.first, search.steps, color="#56B4E9", alpha=0.13, linewidth=0, label="window")
    axes.set_yscale("log")
    finish(figure, path)


def report(search: Search) -> str:
    """The table of mu and the advice."""
    best, mus = search.best, search.mus
    lines = [f"{'lambda':>10}  {'flip rate':>10}  {'mu':>6}  smallest to largest"]
    for decay, r in search.results.items():
        mark = "  <- recommended" if decay == best else ""
        spread = f"{r['mu_smallest']:.2f} to {r['mu_largest']:.2f}"
        lines.append(f"{decay:>10g}  {r['flip_rate']:>10.6f}  {r['mu']:>6.3f}  {spread}{mark}")
    if best is not None:
        lines += [f"mu is healthy at lambda = {best:g}. Train with", f"    {training_command(search, best)}"]
        lines.append(f"and, to watch mu in that run too, --flip_reference={run_folder(search, None)}")
        return "\n".join(lines)
    nearest = min(mus, key=lambda decay: distance(mus[decay]))
    band = "mu from {:.2f} to {:.2f}".format(*HEALTHY)
    lines.append(f"no lambda has {band}; nearest is {nearest:g} with {mus[nearest]:.3f}")
    if mus[nearest] > HEALTHY[1]:
        lines.append(f"add a lambda above {nearest:g} to --candidates; finished runs are not repeated")
    elif nearest > 0:
        lines.append(f"add a lambda below {nearest:g} to --candidates; finished runs are not repeated")
    else:
        lines.append("no lambda will help: measure later, with more --steps and another --search_dir")
    return "\n".join(lines)


def parse(argv: list[str] | None):
    parser = argparse.ArgumentParser(
        prog="studies.search_decay",
        usage="python -m studies.search_decay [config/file.py ...] [--any_setting_of_train.py=value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--candidates", default="0,2e-5,6e-5,2e-4,6e-4,2e-3,6e-3", help="decay factors, with commas")
    parser.add_argument("--steps", type=int, help="steps of each run; default: 1.5 * warmup_iters, at least 100")
    parser.add_argument("--launcher", default="python", help="program that starts train.py, with its options")
    parser.add_argument("--search_dir", type=expand, default="out-search", help="folder of the runs and the results")
    parser.add_argument("--dry_run", action="store_true", help="print the cost and the commands, and stop")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 if it recommends a decay factor, 1 if none fits."""
    try:
        search = prepare(*parse(argv))
        print(describe_cost(search), flush=True)
        if search.args.dry_run:
            for decay in (None, *search.candidates):
                command = runs.train_command(run_folder(search, decay), run_words(search, decay), search.launcher)
                print(shlex.join(command))
            return 0
        run_search(search)
        print(report(search))
        picture = search.folder / "search.png"
        draw(search, picture)
        print(f"wrote {picture.with_suffix('.json')} and {picture}")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"studies.search_decay: error: {error}")
    except ImportError as error:
        print(f"wrote {picture.with_suffix('.json')}, but no figure: {error}; pip install matplotlib")
    return 0 if search.best is not None else 1


if __name__ == "__main__":
    sys.exit(main())

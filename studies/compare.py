"""Compare methods: run a grid of recipes and seeds through train.py, and write a table and a figure under results/.

    python -m studies.compare methods                     losses after equal steps: dense, half and every recipe
    python -m studies.compare equal_cost --seeds=6        losses at equal FLOPs and at equal predicted time
    python -m studies.compare equal_cost --seeds=6 --step_ms=ms.json      losses at equal measured time
    python -m studies.compare quality --only fst s_ste    a part of a grid; the table has all finished variants
    python -m studies.compare flip_rate                   flip rates for several decay factors
    python -m studies.compare act24 --dataset=books_char --lr 3e-3 6e-3 1.2e-2     each variant at its best rate

Every run is `python train.py NAME=VALUE...` in a folder below --out_dir that is named by its settings, so studies share
runs. The same command resumes a stopped study and does not repeat finished runs. All variants of a seed run before the
next seed, so a stopped study gives a complete table with fewer --seeds. Runs of one seed share batches and, if their
shapes are equal, initial weights.

With --lr every seed, from 0 on, runs every variant at each of these learning rates. The table has each variant at the
rate of its lowest mean loss. Beside it stand the losses if the other seeds choose a seed's rate.

Presets: cpu is a smaller version of nanoGPT's recipe for a CPU. gpu is GPT-2 124M on a BPE dataset, one run at a time;
its number of iterations is an estimate for two minutes on one card. --calibrate=N times the steps of a study's variants
in runs of N iterations, and writes the file that --step_ms reads.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from configurator import check_ranges, configure, expand, write_json
from runtime.loader import DATA_FOLDER, load_meta
from runtime.metrics import read_config
from studies import report, runs
from studies.cost import (
    ACCUMULATION,
    GPU,
    MICRO_BATCH,
    SIZE,
    flops_of,
    has_known_flops,
    measured_ms,
    predicted_ms,
    switches_by_itself,
)
from studies.grids import DECAY, FLIP_COMMON, PRESETS, STUDIES, WINDOWS, Study, with_decay, words
from studies.report import Paired, by_mean, differences_from, interval, markdown, paired, spread

# Defaults, which a result's command leaves out
USUAL = {"preset": "cpu", "ratio": 1.5, "step_ms": None, "name": None, "lr": None}

# ---------------------------------------------------------------------------------------------------------------------
# Runs


def is_finished(folder: Path, wanted: dict[str, str]) -> bool:
    """True if the run in `folder` is finished. Raises ValueError if it has other settings."""
    config = read_config(folder)
    if not config:
        return False
    parsed = wanted | configure(config, [f"--{name}={value}" for name, value in wanted.items() if name in config])
    differing = [name for name in wanted if parsed[name] != config.get(name)]
    if differing:
        text = ", ".join(f"{name}={wanted[name]} (there {config.get(name, 'missing')})" for name in differing)
        raise ValueError(f"{folder} holds another run: {text}; delete it, or use another --out_dir")
    return runs.is_finished(folder, int(wanted["max_iters"]))


def run(folder: Path, settings: dict[str, str]) -> None:
    """Train in `folder` unless the run there is finished."""
    if not is_finished(folder, settings):
        threads = {"OMP_NUM_THREADS": "1"} if settings.get("device") == "cpu" else {}
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        runs.train(folder, arguments, int(settings["max_iters"]), **threads)


def common_of(args) -> tuple[str, str]:
    """The name and the shared settings of this study's runs."""
    return ("flip_rate", FLIP_COMMON) if args.study == "flip_rate" else (args.preset, PRESETS[args.preset])


def planned(settings: str, seed: int, args) -> tuple[Path, dict[str, str]]:
    """The folder, which is named by the variant's own settings, and all settings of a run."""
    study, common = common_of(args)
    differing = sorted(words(settings).items() - words(common).items())
    name = "_".join(f"{name}={value}" for name, value in differing).replace("/", ":")
    folder = Path(args.out_dir) / f"{study}-{Path(args.dataset).name}" / f"{name}-seed{seed}"
    return folder, words(f"{common} {settings} seed={seed} dataset={args.dataset}")


def run_all(variants: list[str], args, seeds: Iterable[int]) -> None:
    """Finish every variant for every seed, `args.jobs` at a time. All variants of a seed run before the next seed."""
    in_order = dict(planned(settings, seed, args) for seed in seeds for settings in variants)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for future in as_completed([pool.submit(run, *one) for one in in_order.items()]):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # active runs finish, or save after Ctrl-C
            raise


def run_and_read(variants: dict[str, str], args, seeds: Iterable[int] = ()) -> dict[str, list[Path]]:
    """Run the variants, or those in --only. Returns {label: run folders, one per seed} of all finished variants. seeds:
    by default 1 to --seeds."""
    seeds, folders = seeds or range(1, args.seeds + 1), {}
    chosen = [text for label, text in variants.items() if not args.only or label.split(" @ ")[0] in args.only]
    run_all(chosen, args, seeds)
    for label, settings in variants.items():
        runs_of_label = [planned(settings, seed, args) for seed in seeds]
        if all(is_finished(*one) for one in runs_of_label):
            folders[label] = [folder for folder, _ in runs_of_label]
        else:
            print(f"not in the table because seeds are missing: {label}")
    return folders


def final_losses(folders: list[Path], name: str = "val_loss") -> list[float | None]:
    return [runs.last_row(folder).get(name) for folder in folders]


def complete(values: dict[str, list]) -> dict[str, list]:
    """The labels that have a value for every seed."""
    return {label: by_seed for label, by_seed in values.items() if None not in by_seed}


def tune(study: Study, args) -> tuple[dict[str, list[Path]], dict[str, dict[str, list[float]]]]:
    """Run every variant at each of --lr. Returns (its run folders, {variant: {rate: its loss for each seed}})."""
    grid = {f"{label} @ {rate}": at_rate(v, rate) for label, v in study.variants.items() for rate in args.lr}
    folders = run_and_read(grid, args, range(args.seeds))
    curves: dict[str, dict[str, list[float]]] = {}
    for label, of_label in folders.items():
        variant, rate = label.split(" @ ")
        curves.setdefault(variant, {})[rate] = final_losses(of_label)
    return folders, curves


def rate_without(losses: dict[str, list[float]], seed: int) -> str:
    """The rate with the lowest mean loss over all seeds but this one. losses: {rate: loss of each seed}."""
    return min(losses, key=lambda rate: statistics.fmean(x for k, x in enumerate(losses[rate]) if k != seed))


def at_rate(settings: str, rate: str) -> str:
    """The settings with this learning rate. It decays to a tenth, as in the presets."""
    return f"{settings} learning_rate={rate} min_lr={float(rate) / 10:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Studies


def compare(args) -> tuple[dict, list[str]]:
    """Final validation losses of a grid, and differences from its references within each seed."""
    study = study_of(args)
    folders = run_and_read(study.variants, args)
    losses = {label: final_losses(of_label) for label, of_label in folders.items()}
    pruned = complete({label: final_losses(of_label, "val_loss_24") for label, of_label in folders.items()})
    panels = differences_from(study.references, losses)
    mus = mus_of(folders, 1.5, 5)
    flops = relative_flops({k: v for k, v in study.variants.items() if not switches_by_itself(v)}, args)
    note = f"Mean +- sample standard deviation over {args.seeds} seeds; differences are taken within each seed. FLOPs: "
    note += "of a step's matrix multiplications, mean over the phases, over dense; a 2:4 one counts as half."
    if mus:
        note += " Early mu: flip rate over the dense run's, between 1.5 and 5 warm-ups (section 4.3)."
    data = {"variants": study.variants, "val_loss": losses, "val_loss_24": pruned, "early_mu": mus, "panels": panels}
    data |= {"flops": flops}
    # mu just after the warm-up, as studies/search_decay.py takes it, and later
    data["mu"] = {f"{first} to {end}": mus_of(folders, first, end) for first, end in ((1.5, 2.5), (4, 5))}
    return data | environment(folders), [*report.loss_table(losses, pruned, mus, flops, panels), "", note]


def compare_tuned(args) -> tuple[dict, list[str]]:
    """As `compare`, with each variant at its best learning rate of --lr. Raises ValueError for fewer than two seeds."""
    if args.seeds < 2:
        raise ValueError(f"--seeds={args.seeds} with --lr, need at least 2: a seed's rate is chosen by the others")
    study = study_of(args)
    folders, curves = tune(study, args)
    best = {label: by_mean(of_label)[0] for label, of_label in curves.items()}
    losses = {label: curves[label][rate] for label, rate in best.items()}
    left_out = {
        label: [of_label[rate_without(of_label, seed)][seed] for seed in range(args.seeds)]
        for label, of_label in curves.items()
    }
    panels = differences_from(study.references, losses)
    flops = relative_flops({k: study.variants[k] for k in losses if has_known_flops(study.variants[k])}, args)
    note = f"Mean +- sample standard deviation over {args.seeds} seeds, at the learning rate of the lowest mean loss, "
    note += "which these seeds have chosen; differences are taken within each seed. FLOPs: of a step's matrix "
    note += "multiplications, mean over the phases, over dense; a 2:4 one counts as half."
    at_edge = [label for label, rate in best.items() if rate in (args.lr[0], args.lr[-1])]
    edges = f"Best at the edge of the grid, so that a better rate may lie outside: {', '.join(at_edge) or 'none'}."
    rates = "Losses by learning rate. Last column: each seed at the rate that is best for the other seeds."
    table = report.tuning_table(curves, left_out, args.lr)
    data = {"variants": study.variants, "lr": best, "val_loss": losses, "curves": curves, "left_out": left_out}
    lines = [*report.loss_table(losses, {}, {}, flops, panels), "", note, "", edges, "", rates, "", *table]
    return data | {"panels": panels, "flops": flops} | environment(folders), lines


def mus_of(folders: dict[str, list[Path]], first: float, end: float) -> dict[str, list[float]]:
    """{label: mu of each seed} between `first` and `end` warm-ups, for labels with the dense run's kind of mask."""
    if "dense" not in folders:
        return {}
    sparse = {label: of_label for label, of_label in folders.items() if label != "dense"}
    return complete({label: early_mus(runs_of, folders["dense"], first, end) for label, runs_of in sparse.items()})


def early_mus(folders: list[Path], dense: list[Path], first: float, end: float) -> list[float | None]:
    """mu = mean r' / mean r of each seed between `first` and `end` warm-ups. None if the kinds of mask differ."""
    mus = []
    for folder, reference in zip(folders, dense, strict=True):
        config = read_config(folder)
        window = (first * config["warmup_iters"], end * config["warmup_iters"])
        rates, dense_rates = runs.flip_rates(folder, *window), runs.flip_rates(reference, *window)
        steps = rates.keys() & dense_rates.keys()
        comparable = steps and config["flip_mask"] == read_config(reference)["flip_mask"]
        mus.append(sum(rates[i] for i in steps) / sum(dense_rates[i] for i in steps) if comparable else None)
    return mus


def environment(folders: dict[str, list[Path]]) -> dict:
    """The environment of the first run, and the commits of each label's runs."""
    environments = {label: [read_config(run)["environment"] for run in of_label] for label, of_label in folders.items()}
    commits = {label: sorted({str(one.get("commit")) for one in every}) for label, every in environments.items()}
    return {"environment": next((every[0] for every in environments.values()), None), "commits": commits}


def study_of(args) -> Study:
    """The study, with the preset's decay factor."""
    return with_decay(STUDIES[args.study], DECAY[args.preset])


def relative_flops(variants: dict[str, str], args) -> dict[str, float]:
    """{label: matmul FLOPs of a step over the dense model's}."""
    common, vocab_size = PRESETS[args.preset], load_meta(DATA_FOLDER / args.dataset)["vocab_size"]
    dense = flops_of(f"{common} sparse=none", vocab_size)
    return {label: flops_of(f"{common} {settings}", vocab_size) / dense for label, settings in variants.items()}


def step_costs(variants: dict[str, str], args) -> dict[str, dict[str, float]]:
    """{"FLOPs" or "time": {label: cost of a step over the dense one's}}."""
    if args.step_ms:
        ms = json.loads(Path(args.step_ms).read_text(encoding="utf-8"))
        if missing := sorted(variants.keys() - ms.keys()):
            raise ValueError(f"{args.step_ms} lacks {', '.join(missing)}; measure them with --calibrate")
    else:
        ms = {label: predicted_ms(settings, args.ratio) for label, settings in variants.items()}
    return {"FLOPs": relative_flops(variants, args), "time": {label: ms[label] / ms["dense"] for label in variants}}


def equal_cost(args) -> tuple[dict, list[str]]:
    """Losses if every variant costs as much as the dense run, in FLOPs and in time."""
    study, iters = study_of(args), int(words(PRESETS[args.preset])["max_iters"])
    costs = step_costs(study.variants, args)
    steps = {name: {v: max(1, round(iters / cost)) for v, cost in ratios.items()} for name, ratios in costs.items()}
    for name, counts in steps.items():
        print(f"steps at equal {name}: {', '.join(f'{label} {n}' for label, n in counts.items())}", flush=True)
    grid = {
        f"{label} @ {name}": f"{settings} max_iters={steps[name][label]} lr_decay_iters={steps[name][label]}"
        for label, settings in study.variants.items()
        for name in steps
    }
    folders = run_and_read(grid, args)
    losses = {name: {} for name in steps}
    for label, of_label in folders.items():
        variant, name = label.split(" @ ")
        losses[name][variant] = final_losses(of_label)
    panels = {}
    for name, by_label in losses.items():
        differences = differences_from(study.references, by_label)
        panels |= {f"at equal {name}, {title}": panel for title, panel in differences.items()}
    data = {"variants": study.variants, "cost": costs, "steps": steps, "val_loss": losses, "panels": panels}
    table = report.equal_cost_table(costs, steps, losses, study.references)
    return data | environment(folders), [*table, "", equal_cost_note(args)]


def equal_cost_note(args) -> str:
    if args.step_ms:
        time = f"Time: step times measured in {Path(args.step_ms).name}."
    else:
        time = (
            f"Time: a prediction, not a measurement: predicted step-time ratios of GPT-2 {SIZE} on "
            f"{GPU.upper()}, 2:4 GEMMs {args.ratio:g} x dense, steps of {ACCUMULATION} x {MICRO_BATCH} sequences "
            "(studies/cost.py), are taken for this model's."
        )
    return (
        "Every run has a schedule of its own length and costs what the dense run does. FLOPs: those of this model's "
        f"matrix multiplications, 2:4 ones counted as half; a step's costs are means over the phases. {time} Mean +- "
        f"sample standard deviation over {args.seeds} seeds; differences are taken within each seed, in brackets their "
        "95 % t-interval."
    )


def calibrate(args) -> None:
    """Time the steps of a study's variants in runs of --calibrate iterations, and write the file for --step_ms."""
    variants, n = study_of(args).variants, args.calibrate
    short = {
        label: f"{v} max_iters={n} lr_decay_iters={n} warmup_iters=0 log_interval=10" for label, v in variants.items()
    }
    args.seeds, args.jobs = 1, 1
    folders = run_and_read(short, args)
    ms = {label: measured_ms(of_label[0], variants[label]) for label, of_label in folders.items()}
    path = Path(args.results) / f"{result_name(args)}-step_ms.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, ms)
    print(f"wrote {path}: {json.dumps(ms)}")


def window_means(folder: Path) -> list[float]:
    """The run's flip rate, in windows of 20 iterations around WINDOWS."""
    return [statistics.fmean(runs.flip_rates(folder, t0 - 10, t0 + 10).values()) for t0 in WINDOWS]


def flip_rate(args) -> tuple[dict, list[str]]:
    """mu = r' / r (section 4.3): the flip rate of each decay factor over that of the dense run of the same seed."""
    variants = STUDIES["flip_rate"].variants
    folders = run_and_read(variants, args)
    rates = {label: [window_means(folder) for folder in of_label] for label, of_label in folders.items()}
    if "dense" not in rates:
        raise ValueError("flip_rate: the dense runs are not finished, and mu needs them; run them too")
    data = {"variants": variants, "t0": WINDOWS, "flip_rate": rates}
    return data | environment(folders), report.flip_table(rates, WINDOWS)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def pooled(args) -> None:
    """Write one table and one figure of a study on several texts, from the study's files for each text.
    Raises ValueError if a file is missing, or if the texts have different numbers of seeds."""
    tables, commits = [], {}
    for text in args.texts:
        path = Path(args.results) / f"{result_name(args, text)}.json"
        if not path.exists():
            raise ValueError(f"no {path} yet; run: python -m studies.compare {args.study} --dataset={text}")
        results = json.loads(path.read_text(encoding="utf-8"))
        tables.append(results["val_loss"])
        for label, more in results.get("commits", {}).items():
            commits[label] = sorted({*commits.get(label, []), *more})
    if len({len(table["dense"]) for table in tables}) > 1:
        raise ValueError(f"{', '.join(args.texts)} have unequal numbers of seeds; run them with equal --seeds")
    labels = [label for label in tables[0] if all(label in table for table in tables)]
    means = [{label: f"{paired(table[label], table['dense']).mean:.4f}" for label in labels} for table in tables]
    losses = {label: [x for table in tables for x in table[label]] for label in labels}
    panels = differences_from(("dense", "half"), losses)
    names = [Path(text).name for text in args.texts]
    heads = ["method", *(f"minus dense: {name.removesuffix('_char')}" for name in names)]
    for title in panels:
        heads += [title, "95 % interval", "by seed", "lower in"]
    rows = []
    for label in by_mean(losses):
        row = [label, *("" if label == "dense" else mean[label] for mean in means)]
        for panel in panels.values():
            d = panel.get(label)
            seeds = interval(by_seed(d, len(names))) if d else ""
            row += [spread(d.differences), interval(d), seeds, d.lower_in] if d else [""] * 4
        rows.append(row)
    command = f"python -m studies.compare {args.study} --texts {' '.join(names)}"
    command += f" --name={args.name}" if args.name else ""
    note = "Differences within each seed and text; mean +- sample standard deviation over all of these pairs. The "
    note += "first interval takes them for independent; the one by seed takes one mean over the texts of each seed."
    path = Path(args.results) / (args.name or f"{args.study}-texts")
    write(path, command, [*markdown(heads, rows), "", note], panels, {"val_loss": losses, "commits": commits})


def by_seed(difference: Paired, texts: int) -> Paired:
    """One mean over the texts for each seed, since the texts of a seed are not independent. `difference` has all seeds
    of a text before the next text."""
    seeds = len(difference.differences) // texts
    means = [statistics.fmean(difference.differences[seed::seeds]) for seed in range(seeds)]
    return paired(means, [0.0] * seeds)


def result_name(args, text: str | None = None) -> str:
    """The name of the files below --results: --name, or the study with its dataset and preset unless these are the
    defaults. text: a dataset that replaces --dataset and --name."""
    if args.name and text is None:
        return args.name
    dataset = Path(text or args.dataset).name
    parts = [args.study, *([dataset] if dataset != "shakespeare_char" else [])]
    return "-".join([*parts, *([args.preset] if args.preset != "cpu" else [])])


def command_of(args) -> str:
    """The command that reproduces the table."""
    start = f"python -m studies.compare {args.study} --dataset={Path(args.dataset).name} --seeds={args.seeds}"
    options = vars(args)
    words = [start, *(f"--{name}={options[name]}" for name, usual in USUAL.items() if options[name] != usual)]
    return " ".join(words).replace(f"--lr={args.lr}", f"--lr {' '.join(args.lr or ())}")


def write_study(args) -> None:
    """Run the study and write its table, its numbers and its figure."""
    usual = compare_tuned if args.lr else compare
    data, lines = {"flip_rate": flip_rate, "equal_cost": equal_cost}.get(args.study, usual)(args)
    panels = data.pop("panels", {})
    head = {"dataset": Path(args.dataset).name, "seeds": args.seeds, "common": common_of(args)[1]}
    write(Path(args.results) / result_name(args), command_of(args), lines, panels, head | data)


def write(path: Path, command: str, lines: list[str], panels: dict[str, dict[str, Paired]], data: dict) -> None:
    """Write path.md and path.json, and path.png if there are differences to draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"command": command} | data
    if panels:
        data["differences"] = {title: {k: asdict(v) for k, v in panel.items()} for title, panel in panels.items()}
        report.draw(panels, path.with_name(f"{path.name}.png"), path.name)
    write_json(path.with_name(f"{path.name}.json"), data)
    table = "\n".join([f"# {path.name}", "", f"`{command}`", "", *lines])
    path.with_name(f"{path.name}.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _rate(text: str) -> str:
    """A learning rate, as it was written: it names folders."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}, need a learning rate above 0")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**USUAL)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--dataset", type=expand, default="shakespeare_char", help="folder under data/, or a path")
    parser.add_argument("--preset", choices=PRESETS, help="the settings that all runs share")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", nargs="+", type=_rate, metavar="RATE", help="tune each variant first, see above")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="variants to run; the table has all finished ones")
    parser.add_argument("--texts", nargs="+", metavar="DATASET", help="one table of finished studies of these datasets")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: 2, on a GPU 1")
    parser.add_argument("--out_dir", type=expand, default="out-study", help="folder of the runs")
    parser.add_argument("--results", type=expand, default="results", help="folder of the table and the figure")
    parser.add_argument("--name", help="name of the files below --results; default: study, dataset and preset")
    parser.add_argument("--ratio", type=float, help="equal_cost: dense over 2:4 time of a GEMM, for predictions")
    parser.add_argument("--step_ms", type=expand, help="equal_cost: JSON of {label: ms of a step}, not predictions")
    parser.add_argument("--calibrate", type=int, metavar="N", help="only measure step times, in runs of N iterations")
    args = parser.parse_args(argv)
    args.jobs = args.jobs or (1 if args.preset == "gpu" else 2)
    args.lr = args.lr and sorted(args.lr, key=float)
    known = STUDIES[args.study].variants
    if unknown := [label for label in args.only or () if label not in known]:
        parser.error(f"--only: {args.study} has no {', '.join(map(repr, unknown))}, need some of {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        check_ranges(vars(args), dict.fromkeys(("seeds", "jobs", "calibrate"), (1, math.inf)) | {"ratio": (0.01, 100)})
        (calibrate if args.calibrate else pooled if args.texts else write_study)(args)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"studies.compare: error: {error}")
    except KeyboardInterrupt:
        sys.exit("studies.compare: stopped; the same command resumes it")


if __name__ == "__main__":
    main()

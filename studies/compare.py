"""Compare methods: run a grid of recipes and seeds through train.py, and write a table and a figure under results/.

    python -m studies.compare methods                     losses after equal steps: dense, half and every recipe
    python -m studies.compare equal_cost --seeds=6        losses at equal FLOPs and at equal predicted time
    python -m studies.compare equal_cost --seeds=6 --step_ms=ms.json      and at equal measured time
    python -m studies.compare quality --only fst s_ste    a part of a grid; the table has whatever is finished
    python -m studies.compare flip_rate                   flip rates over the decay factor

Every run is `python train.py NAME=VALUE...` in a folder of its own below --out_dir, named by its settings, so studies
share runs. A study that was stopped goes on where it stood; what is finished is not run again. Seeds come one after
the other: after a stop, fewer --seeds give a whole table. Runs of one seed share batches and, where their shapes are
equal, initial weights.

Presets: cpu, nanoGPT's recipe for a CPU made smaller. gpu, GPT-2 124M on a BPE dataset, one run at a time: the number
of iterations is a guess at what one card does in two minutes, and no card has run it: twelve runs, such as methods
--only dense half fst s_ste, would take half an hour. --calibrate=N times the steps of a study's variants by runs of N
iterations and writes what --step_ms reads.
"""

import argparse
import fcntl
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from benchmarks import roofline
from benchmarks.suites import PAPER_BATCH
from configurator import ConfigError, configure
from runtime.loader import DATA_FOLDER, load_meta
from runtime.metrics import read_config, read_metrics
from studies.cost import ACCUMULATION, MICRO_BATCH, flops_of, measured_ms, predicted_ms, switches_by_itself
from studies.grids import DECAY, FLIP_COMMON, FLIP_RATE, PRESETS, STUDIES, WINDOWS, Study, with_decay, words
from studies.report import (
    Paired,
    by_mean,
    draw,
    equal_cost_table,
    flip_table,
    interval,
    loss_table,
    markdown,
    paired,
    spread,
)

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# Runs


def folder_of(root: Path, common: str, settings: str, seed: int) -> Path:
    """A run's folder, named by the settings in which it differs from `common`, whatever a study calls it."""
    own = sorted(words(settings).items() - words(common).items())
    return root / ("_".join(f"{name}={value}" for name, value in own).replace("/", ":") + f"-seed{seed}")


def is_finished(folder: Path, wanted: dict[str, str]) -> bool:
    """Whether the run in `folder` has its last validation loss. ValueError where it was made with other settings."""
    config = read_config(folder)
    if not config:
        return False
    differing = []
    for name, value in wanted.items():
        try:
            found = configure(config, [f"--{name}={value}"])[name]
        except ConfigError:
            found = value
        if name not in config or found != config[name]:
            differing.append(f"{name}={value} (there {config.get(name, 'missing')})")
    if differing:
        raise ValueError(f"{folder} holds another run: {', '.join(differing)}; delete it, or use another --out_dir")
    if not (folder / "metrics.jsonl").exists():
        return False
    last = (read_metrics(folder) or [{"iter": -1}])[-1]
    return last["iter"] >= int(wanted["max_iters"]) and last.get("val_loss") is not None


def run(folder: Path, settings: dict[str, str]) -> None:
    """One run of train.py in `folder`, resumed or skipped as its state there asks. Raises RuntimeError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # train.py inherits it: a second study waits, even where the first was killed
        if is_finished(folder, settings):
            return
        command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in settings.items())]
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run(
                [*command, f"--out_dir={folder.resolve()}"],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
                env=os.environ | ({"OMP_NUM_THREADS": "1"} if settings.get("device") == "cpu" else {}),
            )
        if done.returncode or not is_finished(folder, settings):
            how = "failed" if done.returncode else "was stopped"
            raise RuntimeError(f"{shlex.join(command)} {how}; see {folder / 'log.txt'}")
    print(f"done: {folder}", flush=True)


def planned(root: Path, common: str, settings: str, args) -> dict[Path, dict[str, str]]:
    """{folder: settings} of a variant's runs, one per seed."""
    runs = {}
    for seed in range(1, args.seeds + 1):
        wanted = words(f"{common} {settings} seed={seed} dataset={args.dataset}")
        runs[folder_of(root, common, settings, seed)] = wanted
    return runs


def run_all(root: Path, common: str, variants: list[str], args) -> None:
    """Every variant for every seed, finished, `args.jobs` at a time; all variants of a seed before the next seed."""
    columns = zip(*(planned(root, common, settings, args).items() for settings in variants), strict=True)
    runs = dict(run for column in columns for run in column)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for future in as_completed([pool.submit(run, folder, wanted) for folder, wanted in runs.items()]):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those under way finish, or save where Ctrl-C reached them
            raise


def run_and_read(variants: dict[str, str], args) -> dict[str, list[Path]]:
    """Run what --only names; {label: run folders, one per seed} of all `variants` that are finished."""
    root, common = Path(args.out_dir) / f"{args.preset}-{Path(args.dataset).name}", PRESETS[args.preset]
    chosen = [settings for label, settings in variants.items() if not args.only or label.split(" @ ")[0] in args.only]
    if not args.table_only:
        run_all(root, common, chosen, args)
    found = {}
    for label, settings in variants.items():
        runs = planned(root, common, settings, args)
        if all(is_finished(folder, wanted) for folder, wanted in runs.items()):
            found[label] = list(runs)
        else:
            print(f"not in the table, as seeds are missing: {label}")
    return found


def last_row(folder: Path) -> dict:
    return read_metrics(folder)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Studies


def compare(args) -> tuple[dict, list[str]]:
    """Final validation losses of a grid, and differences to its references within each seed."""
    study = study_of(args)
    runs = run_and_read(study.variants, args)
    rows = {label: [last_row(folder) for folder in found] for label, found in runs.items()}
    losses = {label: [row["val_loss"] for row in found] for label, found in rows.items()}
    pruned = {label: [row.get("val_loss_24") for row in found] for label, found in rows.items()}
    pruned = {label: values for label, values in pruned.items() if None not in values}
    references = [label for label in study.references if label in losses]
    panels = {f"minus {reference}": paired_to(losses, reference) for reference in references}
    note = f"Mean +- sample standard deviation over {args.seeds} seeds; differences are taken within each seed. FLOPs: "
    note += "of a step's matrix multiplications, mean over the phases, over dense; a 2:4 one counts as half."
    mus = {label: early_mus(found, runs["dense"]) for label, found in runs.items()} if "dense" in runs else {}
    mus = {label: values for label, values in mus.items() if label != "dense" and None not in values}
    if mus:
        note += " Early mu: flip rate over the dense run's, between 1.5 and 5 warm-ups (section 4.3)."
    flops = relative_flops({k: v for k, v in study.variants.items() if not switches_by_itself(v)}, args)
    data = {"variants": study.variants, "val_loss": losses, "val_loss_24": pruned, "early_mu": mus, "panels": panels}
    data |= {"flops": flops}
    if "dense" in runs:  # just after the warm-up, where search_decay.py looks, and late
        windows = {f"{first} to {last}": (first, last) for first, last in ((1.5, 2.5), (4, 5))}
        data["mu"] = {
            name: {label: early_mus(found, runs["dense"], window) for label, found in runs.items() if label in mus}
            for name, window in windows.items()
        }
    return data | environment(runs), [*loss_table(losses, pruned, mus, flops, panels), "", note]


def early_mus(folders: list[Path], dense: list[Path], warmups: tuple[float, float] = (1.5, 5)) -> list[float | None]:
    """mu = mean r' / mean r of each seed over so many warm-ups; None where masks of different kinds were counted."""
    mus = []
    for run, reference in zip(folders, dense, strict=True):
        config = read_config(run)
        first, last = (factor * config["warmup_iters"] for factor in warmups)
        rates = [
            {row["iter"]: row["flip_rate"] for row in read_metrics(folder) if row.get("flip_rate") is not None}
            for folder in (run, reference)
        ]
        steps = [i for i in rates[0].keys() & rates[1].keys() if first <= i < last]
        alike = steps and config["flip_mask"] == read_config(reference)["flip_mask"]
        mus.append(sum(rates[0][i] for i in steps) / sum(rates[1][i] for i in steps) if alike else None)
    return mus


def paired_to(losses: dict[str, list[float]], reference: str) -> dict:
    return {label: paired(v, losses[reference]) for label, v in losses.items() if label != reference}


def environment(runs: dict[str, list[Path]]) -> dict:
    """That of the first run there is, and the commits that the runs of each label were made at."""
    found = {label: [read_config(folder)["environment"] for folder in folders] for label, folders in runs.items()}
    commits = {label: sorted({str(one.get("commit")) for one in ones}) for label, ones in found.items()}
    return {"environment": next((ones[0] for ones in found.values()), None), "commits": commits}


def study_of(args) -> Study:
    """The study, with the preset's decay factor, or --decay."""
    return with_decay(STUDIES[args.study], args.decay or DECAY[args.preset])


def relative_flops(variants: dict[str, str], args) -> dict[str, float]:
    """{label: matmul FLOPs of a step over the dense model's}."""
    common, vocab_size = PRESETS[args.preset], load_meta(DATA_FOLDER / args.dataset)["vocab_size"]
    dense = flops_of(f"{common} sparse=none", vocab_size)
    return {label: flops_of(f"{common} {settings}", vocab_size) / dense for label, settings in variants.items()}


def step_costs(variants: dict[str, str], args) -> dict[str, dict[str, float]]:
    """{"FLOPs" or "time": {label: cost of a step over the dense one's}}."""
    flops = relative_flops(variants, args)
    if args.step_ms:
        ms = json.loads(Path(args.step_ms).read_text())
        if missing := sorted(variants.keys() - ms.keys()):
            raise ValueError(f"{args.step_ms} lacks {', '.join(missing)}; measure them with --calibrate")
    else:
        ms = {label: predicted_ms(v, args.gpu, args.size, args.ratio) for label, v in variants.items()}
    return {
        name: {label: costs[label] / costs["dense"] for label in variants}
        for name, costs in (("FLOPs", flops), ("time", ms))
    }


def equal_cost(args) -> tuple[dict, list[str]]:
    """Losses where each variant takes as many steps as cost what the dense run's do, in FLOPs and in time."""
    study, iters = study_of(args), int(words(PRESETS[args.preset])["max_iters"])
    variants = study.variants
    costs = step_costs(variants, args)
    steps = {name: {v: max(1, round(iters / cost)) for v, cost in ratios.items()} for name, ratios in costs.items()}
    for name, counts in steps.items():
        print(f"steps at equal {name}: {', '.join(f'{label} {n}' for label, n in counts.items())}", flush=True)
    grid = {
        f"{label} @ {name}": f"{settings} max_iters={steps[name][label]} lr_decay_iters={steps[name][label]}"
        for label, settings in variants.items()
        for name in steps
    }
    runs = run_and_read(grid, args)
    losses = {name: {} for name in steps}
    for label, found in runs.items():
        variant, name = label.split(" @ ")
        losses[name][variant] = [last_row(folder)["val_loss"] for folder in found]
    differences = {
        name: {reference: paired_to(found, reference) for reference in study.references if reference in found}
        for name, found in losses.items()
    }
    panels = {f"at equal {name}, minus {k}": v for name, found in differences.items() for k, v in found.items()}
    data = {"variants": variants, "cost": costs, "steps": steps, "val_loss": losses, "panels": panels}
    return data | environment(runs), [*equal_cost_table(costs, steps, losses, differences), "", equal_cost_note(args)]


def equal_cost_note(args) -> str:
    if args.step_ms:
        time = f"Time: step times measured in {Path(args.step_ms).name}."
    else:
        time = (
            f"Time: a prediction, not a measurement: predicted step-time ratios of GPT-2 {args.size} on "
            f"{args.gpu.upper()}, 2:4 GEMMs {args.ratio:g} x dense, steps of {ACCUMULATION} x {MICRO_BATCH} sequences "
            "(studies/cost.py), are taken for this model's."
        )
    return (
        "Every run has a schedule of its own length and costs what the dense run does. FLOPs: those of this model's "
        f"matrix multiplications, 2:4 ones counted as half; a step's costs are means over the phases. {time} Mean +- "
        f"sample standard deviation over {args.seeds} seeds; differences are taken within each seed, in brackets their "
        "95 % t-interval."
    )


def calibrate(args) -> None:
    """Time the steps of a study's variants by runs of --calibrate iterations, and write what --step_ms reads."""
    variants, n = study_of(args).variants, args.calibrate
    short = {label: f"{v} max_iters={n} lr_decay_iters={n} log_interval=10" for label, v in variants.items()}
    args.seeds, args.jobs = 1, 1
    ms = {label: measured_ms(found[0], variants[label]) for label, found in run_and_read(short, args).items()}
    path = Path(args.results) / f"{result_name(args)}-step_ms.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ms, indent=1) + "\n")
    print(f"wrote {path}: {json.dumps(ms)}")


def window_means(folder: Path) -> list[float]:
    """The run's flip rate, in windows of 20 iterations around WINDOWS."""
    rates = {row["iter"]: row["flip_rate"] for row in read_metrics(folder) if row["flip_rate"] is not None}
    return [statistics.fmean(rates[i] for i in range(t0 - 10, t0 + 10)) for t0 in WINDOWS]


def flip_rate(args) -> tuple[dict, list[str]]:
    """mu = r' / r (section 4.3): the flip rate of each decay factor over that of the dense run of the same seed."""
    root = Path(args.out_dir) / f"flip_rate-{Path(args.dataset).name}"
    run_all(root, FLIP_COMMON, list(FLIP_RATE.values()), args)
    runs = {variant: list(planned(root, FLIP_COMMON, settings, args)) for variant, settings in FLIP_RATE.items()}
    rates = {variant: [window_means(folder) for folder in found] for variant, found in runs.items()}
    return {"variants": FLIP_RATE, "t0": WINDOWS, "flip_rate": rates} | environment(runs), flip_table(rates, WINDOWS)


# ---------------------------------------------------------------------------------------------------------------------


def pooled(args) -> None:
    """Write a table and a figure of a study on several texts together, from the files that it has written for each.
    Raises ValueError where one is missing, or texts have unequal numbers of seeds."""
    tables, merged = [], {}
    for text in args.texts:
        named = argparse.Namespace(**{**vars(args), "dataset": text, "name": None})
        path = Path(args.results) / f"{result_name(named)}.json"
        if not path.exists():
            raise ValueError(f"no {path} yet; run: python -m studies.compare {args.study} --dataset={text}")
        found = json.loads(path.read_text())
        tables.append(found["val_loss"])
        for label, commits in found.get("commits", {}).items():
            merged[label] = sorted({*merged.get(label, []), *commits})
    if len({len(table["dense"]) for table in tables}) > 1:
        raise ValueError(f"{', '.join(args.texts)} have unequal numbers of seeds; run them with equal --seeds")
    labels = [label for label in tables[0] if all(label in table for table in tables)]
    means = [{label: f"{paired(table[label], table['dense']).mean:.4f}" for label in labels} for table in tables]
    every = {label: [x for table in tables for x in table[label]] for label in labels}
    panels = {f"minus {name}": {k: paired(every[k], every[name]) for k in labels if k != name} for name in POOLED}
    seeds = {title: {k: by_seed(d, len(args.texts)) for k, d in panel.items()} for title, panel in panels.items()}
    heads, rows = ["method", *(f"minus dense: {Path(text).name.removesuffix('_char')}" for text in args.texts)], []
    for label in by_mean(every):
        row = [label, *("" if label == "dense" else mean[label] for mean in means)]
        for title, panel in panels.items():
            d = panel.get(label)
            row += [spread(d.differences), interval(d), interval(seeds[title][label])] if d else [""] * 3
            row += [f"{d.lower} of {len(d.differences)}"] if d else [""]
        rows.append(row)
    for title in panels:
        heads += [title, "95 % interval", "by seed", "lower in"]
    command = f"python -m studies.compare {args.study} --texts {' '.join(Path(text).name for text in args.texts)}"
    command += f" --name={args.name}" if args.name else ""
    note = "Differences within each seed and text; mean +- sample standard deviation over all of these pairs. The "
    note += "first interval takes them for independent; the one by seed takes one mean over the texts of each seed."
    path = Path(args.results) / (args.name or f"{args.study}-texts")
    write(path, command, [*markdown(heads, rows), "", note], panels, {"val_loss": every, "commits": merged})


def by_seed(difference: Paired, texts: int) -> Paired:
    """Of differences that go through the seeds text by text: each seed's mean over the texts, which need not be
    independent."""
    seeds = len(difference.differences) // texts
    means = [statistics.fmean(difference.differences[seed::seeds]) for seed in range(seeds)]
    return paired(means, [0.0] * seeds)


def result_name(args) -> str:
    """Of the files below --results: --name, or the study's, with dataset and preset where they are not the usual."""
    if args.name:
        return args.name
    dataset = Path(args.dataset).name
    parts = [args.study, *([dataset] if dataset != "shakespeare_char" else [])]
    return "-".join([*parts, *([args.preset] if args.preset != "cpu" else [])])


def command_of(args) -> str:
    """The command that writes the table again."""
    parts = [f"python -m studies.compare {args.study} --dataset={Path(args.dataset).name} --seeds={args.seeds}"]
    named = ("preset", "gpu", "size", "ratio", "step_ms", "decay", "name")
    return " ".join(
        [*parts, *(f"--{name}={getattr(args, name)}" for name in named if getattr(args, name) != USUAL[name])]
    )


POOLED = ("dense", "half")  # what `pooled` compares with
USUAL = {"preset": "cpu", "gpu": "h200", "size": "774M", "ratio": 1.5, "step_ms": None, "decay": None, "name": None}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "flip_rate"])
    parser.add_argument("--dataset", default="shakespeare_char", help="folder under data/, or a path")
    parser.add_argument("--preset", choices=PRESETS, help="the settings that all runs share", default=USUAL["preset"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", metavar="LABEL", help="variants to run; the table has all that are finished"
    )
    parser.add_argument("--texts", nargs="+", metavar="DATASET", help="one table of what is there for these, no runs")
    parser.add_argument("--table_only", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: 2, on a GPU 1")
    parser.add_argument("--out_dir", default="out-study", help="where the runs are kept")
    parser.add_argument("--results", default="results", help="where table and figure are written")
    parser.add_argument("--name", help="of the files below --results; default: of the study, dataset and preset")
    parser.add_argument("--decay", help=f"fst's masked_decay; default: {DECAY['cpu']}, on a GPU {DECAY['gpu']}")
    parser.add_argument(
        "--gpu", choices=roofline.GPUS, default=USUAL["gpu"], help="equal_cost: predicted step times of"
    )
    parser.add_argument("--size", choices=PAPER_BATCH, default=USUAL["size"], help="equal_cost: of which GPT-2")
    parser.add_argument("--ratio", type=float, default=USUAL["ratio"], help="equal_cost: dense over 2:4 GEMM time")
    parser.add_argument("--step_ms", help="equal_cost: JSON of {label: measured ms of a step}, instead of predictions")
    parser.add_argument("--calibrate", type=int, metavar="N", help="measure steps in runs of N iterations, no table")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds={args.seeds}, need at least 1")
    args.jobs = args.jobs or (1 if args.preset == "gpu" else 2)
    known = [] if args.study == "flip_rate" else STUDIES[args.study].variants
    if unknown := [label for label in args.only or () if label not in known]:
        parser.error(
            f"--only: {args.study} has no {', '.join(map(repr, unknown))}; it has {', '.join(map(repr, known))}"
        )
    return args


def report(args) -> None:
    """Run the study and write its table, its numbers and its figure."""
    data, lines = {"flip_rate": flip_rate, "equal_cost": equal_cost}.get(args.study, compare)(args)
    common = FLIP_COMMON if args.study == "flip_rate" else PRESETS[args.preset]
    panels = data.pop("panels", {})
    head = {"dataset": Path(args.dataset).name, "seeds": args.seeds, "common": common}
    write(Path(args.results) / result_name(args), command_of(args), lines, panels, head | data)


def write(path: Path, command: str, lines: list[str], panels: dict[str, dict[str, Paired]], data: dict) -> None:
    """path.md, path.json, and, where there are differences, path.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    differences = {title: {k: asdict(v) for k, v in panel.items()} for title, panel in panels.items()}
    path.with_name(f"{path.name}.json").write_text(
        json.dumps({"command": command} | data | ({"differences": differences} if panels else {}), indent=1) + "\n"
    )
    table = [f"# {path.name}", "", f"`{command}`", "", *lines]
    path.with_name(f"{path.name}.md").write_text("\n".join(table) + "\n")
    if panels:
        draw(panels, path.with_name(f"{path.name}.png"), path.name)
    print("\n".join(table))


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        if args.calibrate:
            calibrate(args)
        elif args.texts:
            pooled(args)
        else:
            report(args)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"studies.compare: error: {error}")
    except KeyboardInterrupt:
        sys.exit("studies.compare: stopped; the same command goes on")


if __name__ == "__main__":
    main()

"""How much faster 2:4 training is than compiled dense training on this machine, and how fast it could be.

    python bench.py                              layers, blocks, steps; a GPU writes results/<gpu>/bench.{json,md}
    python bench.py --suite ffn --quick          one suite on a smaller grid; --full runs the paper's full grids
    python bench.py --suite ffn --method act24   another method than fst: 2:4 activations of squared ReLU
    python bench.py --predict [h200]             the prediction S_model, on any machine: benchmarks/roofline.py
    python bench.py --suite kernels [--predict]  time the Triton kernels, or count their code: results/kernels.{json,md}
    python bench.py --evidence OUT --minutes 4 [STAGE ...]     on a GPU that is lent for minutes: benchmarks/evidence.py

Suites. gemm: the six GEMMs of a feed-forward layer, dense and by the fastest sound 2:4 backend. ffn, block: forward and
backward of one layer (the paper's Figure 6). e2e: whole optimizer steps of GPT-2 (Table 8), see benchmarks/steps.py.
kernels: benchmarks/kernel_times.py.

S is dense time over 2:4 time. Dense and 2:4 take turns within a run, and each number is the median, smallest and
largest of the repetitions. A layer's 2:4 time includes one packing and 1/mask_interval of the mask search; a step of
e2e packs within the step. S_model is the roofline with this card's measured rates: its dense GEMMs and sparse ratios at
that shape, and its copy bandwidth. The file is written after every row.

On a CPU everything runs at toy sizes to show that it works. Its ratios mean nothing, and it writes files only if
--json or --out_dir is given.
"""

import argparse
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import evidence, kernel_times, roofline, steps, suites
from benchmarks.machine import attempt, gpu_state, machine, read_json, release
from benchmarks.machine import device as this_device
from benchmarks.report import table, with_spread
from benchmarks.steps import PAPER_BATCH, gpt2
from benchmarks.suites import MASK_INTERVAL, WIDTHS, Settings
from configurator import expand, write_json
from model import PRESETS, GPTConfig
from runtime.ranks import environment
from sparse24 import use_kernels

# ---------------------------------------------------------------------------------------------------------------------
# Measurement

# suite -> (its cases, the rows of one case)
SUITES: dict[str, tuple[Callable, Callable[..., list[dict]]]] = {
    "gemm": (suites.gemm_grid, suites.gemm_rows),
    "ffn": (partial(suites.layer_grid, "ffn"), lambda *case: [suites.layer_row("ffn", *case)]),
    "block": (partial(suites.layer_grid, "block"), lambda *case: [suites.layer_row("block", *case)]),
    "e2e": (steps.cases, lambda *case: [steps.row_of(*case)]),
}


def suite_rows(suite: str, settings: Settings) -> Iterator[dict]:
    """All rows of a suite. A case that fails, or that the budget leaves out, gives a row with the reason."""
    grid, rows_of = SUITES[suite]
    start = time.perf_counter()
    for case in grid(settings):
        if time.perf_counter() - start > settings.budget * (4 if suite == "e2e" else 1):
            yield {"case": list(case), "reason": "left out: the suite's time was up"}
            continue
        release(settings.device)
        rows = attempt(partial(rows_of, case, settings))  # `failures` reports a failed case at the end
        yield from rows if isinstance(rows, list) else [{"case": list(case), **rows}]


def run_suite(suite: str, settings: Settings, data: dict, path: Path | None) -> None:
    """Measure one suite into `data`, {"suites": {name: {environment, settings, before, rows, after}}}.

    Writes `data` to `path` after every row. A suite without "after" was killed."""
    names = ("scale", "repetitions", "graph", "budget", "method")
    options = {name: getattr(settings, name) for name in names} | {"mask_interval": settings.recipe.mask_interval}
    results = {"environment": machine(settings.device), "settings": options, "before": gpu_state(), "rows": []}
    data["suites"][suite] = results

    def save():
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, data)

    for row in suite_rows(suite, settings):
        results["rows"].append(row)
        print("\n".join("  ".join(filter(None, line)) for line in cells(suite, row)), flush=True)
        save()
    results["after"] = gpu_state()
    save()


HEAD = ["suite", "shape", "dense ms", "2:4 ms", "S (spread)", "S_model", "S / S_model", "memory, 2:4 over dense"]


def ways_of(row: dict) -> dict[str, tuple[dict, dict, dict]]:
    """{way: (dense, 2:4, S)} of a measured row of ffn, block or e2e; {} for all other rows."""
    if "variants" in row:
        return {"auto": (row["variants"]["dense"], row["variants"]["auto"], row["s"]["auto"])}
    ways = [way for way in ("compiled", "graphs") if way in row]
    return {way: (row[way]["dense"], row[way]["sparse"], row[way]["s"]) for way in ways}


def cells(suite: str, row: dict) -> list[list[str]]:
    """The lines of the table for one row of a suite: one for each way that it was timed."""
    if "case" in row:
        return [[suite, str(row["case"]), "", "", row["reason"]]]
    if suite == "gemm":
        shape = f"d {row['d']}, {row['tokens']} tokens, {row['name']}"
        if row.get("ratio"):
            return [[suite, shape, *(f"{row[k] / 1000:.3f}" for k in ("dense_us", "best_us")), f"{row['ratio']:.2f}"]]
        return [[suite, shape, "", "", row["reason"]]]
    if "variants" in row:
        shape = f"{row['activation']}, d {row['d']}, n {row['n']}, batch {row['batch']}"
    else:
        shape = f"{row['size']}, batch {row['batch']} x {row['micro_steps']}"
    peaks = [row[name]["peak_gib"] for name in ("sparse", "dense") if "peak_gib" in row.get(name, {})]
    model, lines = row.get("s_model"), []
    for way, (dense, sparse, s) in ways_of(row).items():
        ms = [f"{one['ms']['median']:.3f}" for one in (dense, sparse)]
        lines.append([suite, f"{shape}, {way}", *ms, with_spread(s)])
        lines[-1] += [f"{model:.2f}", f"{s['median'] / model:.2f}"] if model else ["", ""]
        lines[-1] += [f"{peaks[0] / peaks[1]:.3f}"] if peaks else []
    return lines


def answer(data: dict) -> str:
    """One sentence: the range of S of each suite."""
    texts = []
    names = {"ffn": "feed-forward layers", "block": "transformer blocks", "e2e": "optimizer steps"}
    for suite, name in names.items():
        rows = data["suites"].get(suite, {"rows": []})["rows"]
        medians = [s["median"] for row in rows for _, _, s in ways_of(row).values()]
        if medians:
            texts.append(f"{name} {min(medians):.2f} to {max(medians):.2f} times as fast")
    return f"2:4 against compiled dense: {', '.join(texts) or 'not measured'}."


def summary(data: dict) -> str:
    """The answer of a bench.json and the table of its rows."""
    by_suite = data["suites"].items()
    rows = [line for suite, results in by_suite for row in results["rows"] for line in cells(suite, row)]
    return answer(data) + "\n\n" + table(HEAD, [line + [""] * (len(HEAD) - len(line)) for line in rows])


def failures(data: dict, suites) -> list[str]:
    """The failed cases of these suites as "suite: reason". Running out of memory or time is no failure."""
    failed = [(suite, row["reason"]) for suite in suites for row in data["suites"][suite]["rows"] if "case" in row]
    return [f"{suite}: {why}" for suite, why in failed if not re.search("(?i)out ?of ?memory|^left out", why)]


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


def prediction(name: str) -> str:
    """S_model of layers, blocks and training steps on one GPU of roofline.GPUS, at three ratios of sparse GEMMs."""
    gpu, ratios = roofline.GPUS[name], (1.25, 1.5, 2.0)
    heads = [f"s = {s:g}" for s in ratios]
    sparse = [{"ratio": s, "mask_interval": MASK_INTERVAL} for s in ratios]
    layers, blocks, step_rows = [], [], []
    for activation, d in itertools.product(("gelu", "geglu"), WIDTHS):
        d_ff = GPTConfig(n_embd=d, n_head=1, activation=activation).d_ff
        s = (roofline.s_model(gpu, d, d_ff, 16384, activation, **one) for one in sparse)
        layers.append([activation, str(d), *map("{:.2f}".format, s)])
    for n, d in itertools.product((512, 1024, 2048), WIDTHS):
        s = (roofline.block_s_model(gpu, d, 4 * d, 16384, n, **one) for one in sparse)
        blocks.append([str(n), str(d), *map("{:.2f}".format, s)])
    for size, batch in PAPER_BATCH.items():
        dense, *predicted = (roofline.predict_step(gpu, gpt2(size), batch, one) for one in (None, *sparse))
        speeds = [f"{dense['ms'] / one['ms']:.2f}: {one['tokens_per_s']:,.0f}" for one in predicted]
        step_rows.append([size, str(batch), f"{dense['ms']:.1f}", f"{dense['tokens_per_s']:,.0f}", *speeds])
    head = (
        f"S_model on {name.upper()}, predicted and not measured: dense GEMMs at {gpu.flops / 1e12:.0f} TFLOP/s, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s (roofline.py says what is counted and what is assumed). s is dense over "
        "sparse time of a GEMM."
    )
    tables = {
        "Feed-forward layer, 16384 tokens, forward and backward:": table(["activation", "d", *heads], layers),
        "Transformer block, 16384 tokens, GELU:": table(["n", "d", *heads], blocks),
        "Whole training step, block_size 1024; S and tokens/s:": table(
            ["size", "batch", "dense ms", "dense tokens/s", *heads], step_rows
        ),
    }
    return "\n\n".join([head, *itertools.chain(*tables.items())])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def slug(device_name: str) -> str:
    """The name of a GPU's folder in results/: "NVIDIA H200" is h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-").removeprefix("nvidia-")


def run_suites(args, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    folder = args.out_dir or (Path("results") / slug(torch.cuda.get_device_name(device)) if on_gpu else None)
    path = args.json or (Path(folder) / "bench.json" if folder else None)
    if not on_gpu:
        print("bench.py: torch sees no CUDA GPU, so it runs toy sizes on the CPU. Its ratios mean nothing.")
    data = (read_json(path) if path else None) or {"suites": {}}  # suites of an earlier run stay until they run again
    names = [args.suite] if args.suite else list(SUITES)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as verdicts:  # every run measures its GEMMs anew
        settings = settings_of(args, device, Path(verdicts) / "gemms.json")
        for suite in names:
            run_suite(suite, settings, data, path)
    print(summary(data))
    if path:
        path.with_suffix(".md").write_text(summary(data) + "\n", encoding="utf-8")
        print(f"wrote {path} and {path.with_suffix('.md')}")
    if failed := failures(data, names):
        sys.exit("bench.py: these failed:\n" + "\n".join(failed))


def run_kernels(args, device: torch.device) -> None:
    """Time or count the Triton kernels, and write kernels.json and kernels.md."""
    if not find_spec("triton"):
        sys.exit("bench.py: triton is not installed, need it to compile the kernels; `make test` installs it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.py: TRITON_INTERPRET=1 runs kernels on the CPU, need the compiler; unset it")
    if not args.predict and device.type != "cuda":
        sys.exit("bench.py: torch sees no CUDA GPU to measure on; use --predict to compile and predict only")
    where = environment(torch.device("cpu") if args.predict else device, 1)
    options = {"tables": args.tables, "counting": not args.measured_only}
    results = kernel_times.run(Path(args.out_dir or "results"), where, not args.predict, args.repetitions, **options)
    if failed := kernel_times.failures(results):
        sys.exit("bench.py: these failed:\n" + "\n".join(failed))


def run_evidence(args) -> None:
    """Run stages of benchmarks/evidence.py. This process does not use the GPU."""
    name = gpu_state().get("name")
    held = Path("results") / slug(name) / "evidence" / "evidence.json" if name else None
    try:
        if not evidence.run(args.evidence, args.minutes, args.stages, evidence.STAGES, held):
            sys.exit(1)
    except ValueError as error:
        sys.exit(f"bench.py: {error}")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, need at least 1")
    return int(text)


def _path(text: str) -> Path:
    return Path(expand(text))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", help="with --evidence: the stages to run, in this order; default: all")
    add("--evidence", type=_path, metavar="OUT", help="run stages of benchmarks/evidence.py into OUT")
    add("--minutes", type=float, default=10.0, help="with --evidence: minutes that all stages may take")
    add("--suite", choices=(*SUITES, "kernels"), help="default: all but kernels")
    add("--json", type=_path, help="file for the numbers; default: bench.json in --out_dir")
    add("--predict", nargs="?", const="all", choices=("all", *roofline.GPUS), help="print S_model without measuring")
    add("--out_dir", type=_path, help="default: results/<gpu> on a GPU, none on a CPU; kernels: results")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller grids, 60 s a suite")
    size.add_argument("--full", action="store_true", help="the paper's full grids, without a time limit")
    add("--budget", type=float, help="seconds per suite after which no case is started (e2e: four times as many)")
    add("--sizes", nargs="+", choices=PRESETS, default=(), help="e2e: sizes of GPT-2; default: all")
    add("--method", choices=("fst", "act24", "act24_soft"), default="fst", help="the recipe of the 2:4 layers")
    add("--widths", nargs="+", type=_positive, default=(), help="gemm, ffn, block: widths of the layers")
    add("--verdicts", type=_path, help="cache the choices of GEMMs in this file; default: measure anew")
    add("--repetitions", type=_positive, default=10)
    add("--graph", action="store_true", help="ffn, block: time replays of CUDA graphs; gemm always does")
    add("--tables", type=_positive, default=7, help="kernels: number of shapes from each of Tables 2 and 3")
    add("--measured_only", action="store_true", help="kernels: read the counts from results/kernels.json")
    args = parser.parse_args(argv)
    if args.stages and not args.evidence:
        sys.exit(f"bench.py: {args.stages[0]} is no option; stages need --evidence OUT, suites --suite NAME")
    return args


def settings_of(args, device: torch.device, cache: Path) -> Settings:
    scale = "toy" if device.type != "cuda" else "quick" if args.quick else "full" if args.full else "default"
    budget = {"quick": 60.0, "full": float("inf")}.get(scale, 150.0) if args.budget is None else args.budget
    grid = {"sizes": tuple(args.sizes), "widths": tuple(args.widths), "cache": args.verdicts or cache}
    return Settings(device, scale, args.repetitions, budget, args.graph, method=args.method, **grid)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.evidence:
        run_evidence(args)
    elif args.predict and args.suite != "kernels":
        print("\n\n".join(prediction(name) for name in roofline.GPUS if args.predict in ("all", name)))
    else:
        device = this_device()
        if not args.predict:
            use_kernels(device)
        (run_kernels if args.suite == "kernels" else run_suites)(args, device)


if __name__ == "__main__":
    main()

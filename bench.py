"""How fast 2:4 training is on this machine, measured beside dense training in the same run, and what it could be.

    python bench.py                              every suite; a GPU's go to results/<gpu>/bench.{json,md}
    python bench.py --suite ffn --quick          one suite, a smaller grid; --full for the whole one
    python bench.py --predict [h200]             S_model alone, on any machine: benchmarks/roofline.py
    python bench.py --suite kernels --predict    compile the Triton kernels and count: results/kernels.{json,md}
    python bench.py --evidence OUT --minutes 4 [STAGE ...]     on a GPU that is lent for minutes: benchmarks/evidence.py

Suites. gemm: the six GEMMs of a feed-forward layer, dense and by the fastest sound 2:4 backend. ffn, block: forward and
backward of one layer (the paper's Figure 6). e2e: whole optimizer steps of GPT-2 (Table 8), see benchmarks/steps.py.
kernels: benchmarks/kernel_times.py.

S is dense time over sparse time; what is due once per optimizer step (packing) or once per mask_interval steps (the
mask search) is timed apart and its share added to the sparse time. Variants take turns within a run; each number is the
median, smallest and largest of the repetitions. S_model takes this card's own rates: its dense GEMMs and sparse ratios
at that shape, and its copy bandwidth. A row that could not be measured says why. Every row is saved as it comes, and
the command ends with a table of all of them. A step of e2e packs the weights in its own time.

On a CPU everything runs at toy sizes to show that it works: ratios mean nothing there and nothing is written unasked.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import evidence, kernel_times, roofline, steps, suites
from benchmarks.report import table, with_spread
from benchmarks.suites import MASK_INTERVAL, PAPER_BATCH, WIDTHS, Settings, gpt2, predict_step, release
from configurator import write_json
from gemm24 import choose
from model import PRESETS, GPTConfig
from runtime.ranks import environment
from sparse24 import use_kernels

# ---------------------------------------------------------------------------------------------------------------------
# Suites

# suite -> (its cases, the rows of one case)
SUITES: dict[str, tuple[Callable, Callable[..., Iterator[dict]]]] = {
    "gemm": (suites.gemm_grid, suites.gemm_rows),
    "ffn": (partial(suites.layer_grid, "ffn"), partial(suites.layer_rows, "ffn")),
    "block": (partial(suites.layer_grid, "block"), partial(suites.layer_rows, "block")),
    "e2e": (steps.cases, steps.rows),
}


def suite_rows(suite: str, settings: Settings) -> Iterator[dict]:
    """All rows of a suite within its budget. A case that fails, or is left out, is a row that says why."""
    grid, rows_of = SUITES[suite]
    start = time.perf_counter()
    for case in grid(settings):
        if time.perf_counter() - start > settings.budget * (4 if suite == "e2e" else 1):
            yield {"case": list(case), "reason": "left out: the suite's time was up"}
            continue
        release(settings.device)
        try:
            yield from rows_of(case, settings)
        except Exception as error:  # the cases after it are worth having; bench.py ends with an error for it
            traceback.print_exc()
            yield {"case": list(case), "reason": choose.reason(error)}


# ---------------------------------------------------------------------------------------------------------------------
# Results


def machine(device: torch.device) -> dict:
    """The environment of a suite: versions, commit, and the GPU's name, size and driver."""
    found = environment(device, 1) | {"python": platform.python_version()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"sms": card.multi_processor_count, "cusparselt": torch.backends.cusparselt.version()}
        found |= {"memory_bytes": card.total_memory, "l2_bytes": card.L2_cache_size}
        found |= {"driver": gpu_state().get("driver_version")}
    return found


def gpu_state() -> dict:
    """Clocks (MHz), power (W) and temperature (C) of the GPU as nvidia-smi says now; {"reason": why not}."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    keys = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits", f"--id={card}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"reason": str(error)}
    return dict(zip(keys, (value.strip() for value in done.stdout.split(",")), strict=True))


class Results:
    """One JSON file of all suites, or None for none: {"suites": {name: {environment, before, rows, after}}}.

    Saved after every row; suites of an earlier run stay until the same suite is run again.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.data = json.loads(path.read_text()) if path and path.exists() else {"suites": {}}

    def begin(self, suite: str, settings: Settings) -> None:
        how = {"scale": settings.scale, "repetitions": settings.repetitions, "accumulation": settings.accumulation}
        how |= {"graph": settings.graph, "spmm": settings.spmm, "compile_mode": settings.compile_mode}
        how |= {"budget_s": settings.budget, "mask_interval": MASK_INTERVAL}
        start = {"environment": machine(settings.device), "settings": how, "before": gpu_state(), "rows": []}
        self.data["suites"][suite] = start
        self.save()

    def add(self, suite: str, row: dict) -> None:
        self.data["suites"][suite]["rows"].append(row)
        print("\n".join("  ".join(filter(None, line)) for line in cells(suite, row)), flush=True)
        self.save()

    def end(self, suite: str) -> None:
        self.data["suites"][suite]["after"] = gpu_state()
        self.save()

    def run(self, suite: str, settings: Settings) -> None:
        self.begin(suite, settings)
        for row in suite_rows(suite, settings):
            self.add(suite, row)
        self.end(suite)

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.data)


HEAD = ["suite", "shape", "dense ms", "2:4 ms", "S (spread)", "S_model", "S / S_model", "memory, 2:4 over dense"]


def cells(suite: str, row: dict) -> list[list[str]]:
    """The lines of the table for one row of a suite, one for each way that is compared with dense."""
    if suite == "gemm" and "name" in row:
        shape = f"d {row['d']}, {row['tokens']} tokens, {row['name']}"
        if row.get("ratio"):
            return [[suite, shape, *(f"{row[k] / 1000:.3f}" for k in ("dense_us", "best_us")), f"{row['ratio']:.2f}"]]
        return [[suite, shape, "", "", row["reason"]]]
    if "variants" in row:
        shape = f"{row['activation']}, d {row['d']}, n {row['n']}, batch {row['batch']}"
        dense, found = row["variants"]["dense"], row["variants"].items()
        ways = [(name, dense, one, row["s"].get(name)) for name, one in found if name != "dense"]
    elif "compiled" in row:
        shape = f"{row['size']}, batch {row['batch']} x {row['micro_steps']}"
        found = [(way, row[way]) for way in ("compiled", "graphs") if way in row]
        ways = [(way, one["dense"], one["sparse"], one["s"]) for way, one in found]
    else:
        return [[suite, str(row["case"]), "", "", row["reason"]]]
    peaks = [row[name]["peak_gib"] for name in ("sparse", "dense") if "peak_gib" in row.get(name, {})]
    lines = []
    for way, dense, sparse, s in ways:
        model = row.get("s_model") if s and way in ("auto", "compiled", "graphs") else None  # it counts our own kernels
        ms = [f"{one['ms']['median']:.3f}" if "ms" in one else "" for one in (dense, sparse)]
        reached = with_spread(s) if s else sparse.get("reason") or dense["reason"]
        lines.append([suite, f"{shape}, {way}", *ms, reached])
        lines[-1] += [f"{model:.2f}", f"{s['median'] / model:.2f}"] if model else ["", ""]
        lines[-1] += [f"{peaks[0] / peaks[1]:.3f}"] if peaks else []
    return lines


def summary(data: dict) -> str:
    """The table of a bench.json: what was measured beside compiled dense, its spread, and the model."""
    rows = [line for suite, found in data["suites"].items() for row in found["rows"] for line in cells(suite, row)]
    return table(HEAD, [line + [""] * (len(HEAD) - len(line)) for line in rows])


def failures(data: dict, suites) -> list[str]:
    """What of this repo's own could not be measured in these suites, memory and time apart: suite and reason."""
    found = []
    for suite in suites:
        for row in data["suites"][suite]["rows"]:
            why = row.get("variants", {}).get("auto", {}).get("reason") or ("case" in row and row["reason"])
            if why and not re.search("OutOfMemoryError|out of memory|^left out", why):
                found.append(f"{suite}: {why}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


def prediction(name: str) -> str:
    """S_model of layers, blocks and whole steps on one GPU of roofline.GPUS, at three ratios of its sparse GEMMs."""
    gpu, ratios = roofline.GPUS[name], (1.25, 1.5, 2.0)
    heads = [f"s = {s:g}" for s in ratios]
    sparse = [{"ratio": s, "mask_interval": MASK_INTERVAL} for s in ratios]
    layers, blocks, steps = [], [], []
    for activation, d in itertools.product(("gelu", "geglu"), WIDTHS):
        d_ff = GPTConfig(n_embd=d, n_head=1, activation=activation).d_ff
        found = [roofline.s_model(gpu, d, d_ff, 16384, activation, **one) for one in sparse]
        layers.append([activation, str(d), *(f"{s:.2f}" for s in found)])
    for n, d in itertools.product((512, 1024, 2048), WIDTHS):
        found = [roofline.block_s_model(gpu, d, 4 * d, 16384, n, **one) for one in sparse]
        blocks.append([str(n), str(d), *(f"{s:.2f}" for s in found)])
    for size, batch in PAPER_BATCH.items():
        dense, *found = (predict_step(gpu, gpt2(size), batch, one) for one in (None, *sparse))
        speeds = [f"{dense['ms'] / one['ms']:.2f}: {one['tokens_per_s']:,.0f}" for one in found]
        steps.append([size, str(batch), f"{dense['ms']:.1f}", f"{dense['tokens_per_s']:,.0f}", *speeds])
    return "\n\n".join(
        [
            f"S_model on {name.upper()}, predicted and not measured: dense GEMMs at {gpu.flops / 1e12:.0f} TFLOP/s, "
            f"{gpu.bandwidth / 1e12:.2f} TB/s (roofline.py says what is counted and what is assumed). s is dense over "
            "sparse time of a GEMM.",
            "Feed-forward layer, 16384 tokens, forward and backward:",
            table(["activation", "d", *heads], layers),
            "Transformer block, 16384 tokens, GELU:",
            table(["n", "d", *heads], blocks),
            "Whole training step, block_size 1024; S and tokens/s:",
            table(["size", "batch", "dense ms", "dense tokens/s", *heads], steps),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------


def slug(device_name: str) -> str:
    """The folder of a GPU: "NVIDIA H200" is h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-").removeprefix("nvidia-")


def run_kernels(args, device: torch.device) -> None:
    """The kernels' suite: a file of its own, which README's table and a test read."""
    if not find_spec("triton"):
        sys.exit(
            "bench.py: triton is not installed, need it to compile the kernels; `make test` installs it into .venv"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.py: TRITON_INTERPRET=1 runs kernels on the CPU, need the compiler; unset it")
    if not args.predict and device.type != "cuda":
        sys.exit("bench.py: torch sees no CUDA GPU to measure on; use --predict to compile and predict only")
    where = torch.device("cpu") if args.predict else device
    out = Path(args.out_dir or "results")
    how = (not args.predict, args.shape, args.repetitions, args.tables, not args.measured_only)
    results = kernel_times.run(out, environment(where, 1), *how)
    if failed := kernel_times.failures(results):
        sys.exit("bench.py: these failed:\n" + "\n".join(failed))


def run_evidence(args) -> None:
    """Stages of benchmarks/evidence.py; this process leaves the GPU to them."""
    name = evidence.device_name()
    held = Path("results") / slug(name) / "evidence" / "evidence.json" if name else None
    try:
        ended_well = evidence.run(args.evidence, args.minutes, args.stages, evidence.STAGES, held)
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
    if not ended_well:
        sys.exit(1)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, need at least 1")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="with --evidence: what to run, in this order; default: everything")
    parser.add_argument("--evidence", type=Path, metavar="OUT", help="run stages of benchmarks/evidence.py into OUT")
    parser.add_argument("--minutes", type=float, default=10.0, help="with --evidence: when to end")
    parser.add_argument("--suite", choices=(*SUITES, "kernels", "all"), help="default: all")
    parser.add_argument("--json", type=Path, help="where to write the numbers; default: bench.json in --out_dir")
    parser.add_argument(
        "--predict", nargs="?", const="all", choices=("all", *roofline.GPUS), help="S_model alone, measures none"
    )
    parser.add_argument("--out_dir", help="default: results/<gpu> on a GPU, nowhere on a CPU; kernels: results")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller grids, and 60 s a suite")
    size.add_argument("--full", action="store_true", help="the whole grids, however long they take")
    parser.add_argument("--budget", type=float, help="seconds per suite after which no row is begun (e2e: four times)")
    parser.add_argument("--sizes", nargs="+", choices=PRESETS, default=(), help="e2e: of GPT-2; default: all")
    parser.add_argument("--widths", nargs="+", type=_positive, default=(), help="gemm, ffn, block: of the layers")
    parser.add_argument("--verdicts", type=Path, help="keep the verdicts on GEMMs in this file; default: measure anew")
    parser.add_argument("--repetitions", type=_positive, default=10)
    parser.add_argument(
        "--accumulation", type=_positive, default=1, help="ffn, block: micro-steps that share a packing"
    )
    parser.add_argument("--graph", action="store_true", help="ffn, block: time CUDA graphs' replays; gemm always does")
    modes = ("default", "reduce-overhead", "max-autotune")
    parser.add_argument("--compile_mode", default="default", choices=modes, help="torch.compile's")
    parser.add_argument("--spmm", choices=choose.MODES, help="default: auto; on a CPU emulated")
    parser.add_argument("--shape", type=int, nargs=2, default=(16384, 4096), help="kernels: of the table, measured")
    parser.add_argument("--tables", type=_positive, default=7, help="kernels: number of shapes of Tables 2 and 3")
    parser.add_argument("--measured_only", action="store_true", help="kernels: take the counts of results/kernels.json")
    return parser.parse_args(argv)


def settings_of(args, device: torch.device, cache: Path) -> Settings:
    on_gpu = device.type == "cuda"
    scale = "toy" if not on_gpu else "quick" if args.quick else "full" if args.full else "default"
    return Settings(
        device=device,
        scale=scale,
        repetitions=args.repetitions,
        budget={"quick": 60.0, "full": float("inf")}.get(scale, 150.0) if args.budget is None else args.budget,
        accumulation=args.accumulation,
        graph=args.graph,
        compile_mode=args.compile_mode,
        spmm=args.spmm or ("auto" if on_gpu else "emulated"),
        sizes=tuple(args.sizes),
        widths=tuple(args.widths),
        cache=args.verdicts or cache,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.evidence:
        run_evidence(args)
        return
    if args.stages:
        sys.exit(f"bench.py: {args.stages[0]} is no option; stages need --evidence OUT, suites --suite NAME")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if not args.predict:
        use_kernels(device)
    if args.suite == "kernels":
        run_kernels(args, device)
        return
    if args.predict:
        print("\n\n".join(prediction(name) for name in roofline.GPUS if args.predict in ("all", name)))
        return
    on_gpu = device.type == "cuda"
    folder = args.out_dir or (Path("results") / slug(torch.cuda.get_device_name(device)) if on_gpu else None)
    path = args.json or (Path(folder) / "bench.json" if folder else None)
    if not on_gpu:
        print("bench.py: torch sees no CUDA GPU; toy sizes on the CPU, to show that it runs. Its ratios mean nothing.")
    results = Results(path)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as verdicts:  # of this run alone: another is to measure for itself
        settings = settings_of(args, device, Path(verdicts) / "gemms.json")
        suites = SUITES if args.suite in (None, "all") else (args.suite,)
        for suite in suites:
            results.run(suite, settings)
    print(summary(results.data))
    if path:
        path.with_suffix(".md").write_text(summary(results.data) + "\n")
        print(f"wrote {path} and {path.with_suffix('.md')}")
    failed = failures(results.data, suites)
    if failed:
        print("bench.py: these failed:\n" + "\n".join(failed), file=sys.stderr)
    if on_gpu and args.suite in (None, "all"):
        run_kernels(args, device)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

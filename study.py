"""Compare methods: run a grid of settings and seeds through train.py, and write tables under results/.

    python study.py convergence --dataset=shakespeare_char         losses of dense, half, ste, fst; 15 runs
    python study.py flip_rate --dataset=shakespeare_char           flip rates over the decay factor; 15 runs

Every run is `python train.py NAME=VALUE...` in a folder of its own below --out_dir, so a study that was stopped goes on
where it stood, and a finished one only writes its table again. Runs of one seed share initial weights and batches.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plot import read_config, read_metrics

ROOT = Path(__file__).resolve().parent

# nanoGPT's CPU recipe, but at width 64, learning rate 3e-3 and 2500 iterations, where methods separate, and evaluated
# on the whole validation split, so that no evaluation noise is left.
COMMON = (
    "n_layer=4 n_head=4 n_embd=64 block_size=64 batch_size=12 gradient_accumulation_steps=1 dropout=0.0 bias=False "
    "learning_rate=3e-3 min_lr=3e-4 warmup_iters=100 max_iters=2500 lr_decay_iters=2500 beta2=0.99 "
    "eval_interval=500 eval_iters=0 flip_interval=50 checkpoint_interval=500 log_interval=100 device=cpu dtype=float32"
)
CONVERGENCE = {
    "dense": "sparse=none",
    "half": "sparse=none ffn_ratio=2",
    "ste": "sparse=ste mask_interval=40",
    "fst": "sparse=fst masked_decay=2e-4 mask_interval=40",
    "fst, no MVUE, no dense phase": "sparse=fst masked_decay=2e-4 mask_interval=40 mvue=False dense_finetune=0",
}
FLIP_COMMON = (  # the first 311 iterations of nanoGPT's CPU recipe, whose schedule is laid out for 1000
    f"{COMMON} n_embd=128 learning_rate=1e-3 min_lr=1e-4 lr_decay_iters=1000 max_iters=311 "
    "flip_interval=1 eval_interval=0 eval_iters=20"
)
FLIP_RATE = {"dense": "sparse=none"} | {
    f"lambda {decay}": f"sparse=fst masked_decay={decay} mask_interval=1 mvue=False dense_finetune=0"
    for decay in ("0", "2e-4", "2e-3", "2e-2")
}
WINDOWS = (150, 200, 250, 300)  # centres t0 of windows of 20 iterations


def run(folder: Path, settings: str) -> Path:
    """One run of train.py in `folder`, resumed or skipped as its state there asks. Raises RuntimeError if it fails."""
    command = [sys.executable, "train.py", *(f"--{word}" for word in settings.split())]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run(
            [*command, f"--out_dir={folder.resolve()}"],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed; see {folder / 'log.txt'}")
    print(f"done: {folder}", flush=True)
    return folder


def run_all(name: str, variants: dict[str, str], common: str, args) -> dict[str, list[Path]]:
    """{variant: run folders, one per seed}, all finished, `args.jobs` at a time on one thread each."""
    root, dataset = Path(args.out_dir) / name, f"dataset={args.dataset}"

    def start(pool, variant: str, seed: int):
        folder = root / f"{variant.replace(', ', '-').replace(' ', '_')}-seed{seed}"
        return pool.submit(run, folder, f"{common} {variants[variant]} seed={seed} {dataset}")

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {(v, seed): start(pool, v, seed) for seed in range(1, args.seeds + 1) for v in variants}
    return {v: [futures[v, seed].result() for seed in range(1, args.seeds + 1)] for v in variants}


def spread(values: list[float]) -> str:
    """Mean +- sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.4f} +- {deviation:.4f}"


def last_val_loss(folder: Path) -> float:
    return [row["val_loss"] for row in read_metrics(folder) if row["val_loss"] is not None][-1]


def convergence(args) -> tuple[dict, list[str]]:
    """Final validation losses, and differences to dense and to ste within each seed."""
    folders = run_all("convergence", CONVERGENCE, COMMON, args)
    losses = {variant: [last_val_loss(folder) for folder in runs] for variant, runs in folders.items()}
    lines = ["| method | validation loss | minus dense | minus ste |", "|---|---|---|---|"]
    for variant, values in sorted(losses.items(), key=lambda item: statistics.fmean(item[1])):
        cells = [spread(values)]
        for reference in ("dense", "ste"):
            differences = [a - b for a, b in zip(values, losses[reference], strict=True)]
            cells.append("" if variant == reference else spread(differences))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    note = f"Mean +- sample standard deviation over {args.seeds} seeds; differences are taken within each seed."
    return {"val_loss": losses, "environment": read_config(folders["dense"][0])["environment"]}, [*lines, "", note]


def window_means(folder: Path) -> list[float]:
    """The run's flip rate, in windows of 20 iterations around WINDOWS."""
    rates = {row["iter"]: row["flip_rate"] for row in read_metrics(folder) if row["flip_rate"] is not None}
    return [statistics.fmean(rates[i] for i in range(t0 - 10, t0 + 10)) for t0 in WINDOWS]


def flip_rate(args) -> tuple[dict, list[str]]:
    """mu = r' / r (section 4.3): the flip rate of each decay factor over that of the dense run of the same seed."""
    folders = run_all("flip_rate", FLIP_RATE, FLIP_COMMON, args)
    rates = {variant: [window_means(folder) for folder in runs] for variant, runs in folders.items()}
    lines = [f"| run | {' | '.join(f't0 = {t0}' for t0 in WINDOWS)} |", "|---|" + "---|" * len(WINDOWS)]
    lines.append(
        "| dense, r | " + " | ".join(f"{statistics.fmean(r):.5f}" for r in zip(*rates["dense"], strict=True)) + " |"
    )
    for variant in list(rates)[1:]:
        cells = []
        for sparse, dense in zip(zip(*rates[variant], strict=True), zip(*rates["dense"], strict=True), strict=True):
            mu = [a / b for a, b in zip(sparse, dense, strict=True)]
            cells.append(f"{statistics.fmean(mu):.2f} ({min(mu):.2f} to {max(mu):.2f})")
        lines.append(f"| {variant}, mu | {' | '.join(cells)} |")
    note = f"Means over {args.seeds} seeds (smallest to largest); each mu is against the dense run of its own seed."
    environment = read_config(folders["dense"][0])["environment"]
    return {"t0": WINDOWS, "flip_rate": rates, "environment": environment}, [*lines, "", note]


STUDIES = {"convergence": (convergence, COMMON, CONVERGENCE), "flip_rate": (flip_rate, FLIP_COMMON, FLIP_RATE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--dataset", default="shakespeare_char", help="folder under data/, or a path")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="runs side by side")
    parser.add_argument("--out_dir", default="out-study", help="where the runs are kept")
    parser.add_argument("--results", default="results", help="where the table is written")
    args = parser.parse_args()
    study, common, variants = STUDIES[args.study]
    data, lines = study(args)
    dataset = Path(args.dataset).name
    command = f"python study.py {args.study} --dataset={dataset} --seeds={args.seeds}"
    data = {"command": command, "dataset": dataset, "common": common, "variants": variants, **data}
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.study}.json").write_text(json.dumps(data, indent=1) + "\n")
    table = [f"# {args.study}", "", f"`{command}`", "", *lines]
    (folder / f"{args.study}.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()

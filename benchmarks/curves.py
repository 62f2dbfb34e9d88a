"""Short runs of train.py from one seed, dense beside the 2:4 methods: python -m benchmarks.curves OUT.json [GROUP]

GROUP is one of RUNS: weights (the default) or activations, 2:4 activations of squared ReLU.
Every run trains GPT-2 124M on 16 x 1,024 tokens a step, with the same data in the same order. OUT.json has the losses
of all runs. They show that the fast path trains; the runs are too short to rank methods by their loss. All runs share
the GPU at the same time, so their step times say nothing about speed.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import read_json
from configurator import write_json
from runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ROOT / ".evidence" / "books"
RUNS = {  # group -> name -> what differs from SETTINGS
    "weights": {
        "dense": {"sparse": "none"},
        "fst": {"sparse": "fst"},
        "fst from CUDA graphs": {"sparse": "fst", "compile_mode": "reduce-overhead"},
        "s_ste": {"sparse": "s_ste"},
    },
    "activations": {
        "dense relu2": {"sparse": "none", "activation": "relu2"},
        "act24": {"sparse": "act24", "activation": "relu2"},
        # Measures no products, which would take longer than the run.
        "act24_soft": {"sparse": "act24_soft", "activation": "relu2", "spmm": "masked"},
    },
}
STEPS = 300
WRITE_S = 5  # seconds between two writes of the results
SETTINGS = {
    "batch_size": 16, "block_size": 1024, "gradient_accumulation_steps": 1, "max_iters": STEPS,
    "learning_rate": 6e-4, "warmup_iters": 50, "lr_decay_iters": STEPS, "min_lr": 6e-5,
    "eval_interval": 0, "eval_iters": 20, "log_interval": 10, "flip_interval": 50, "checkpoint_interval": 10**6,
}  # fmt: skip


def dataset() -> str:
    """The dataset for train.py: .evidence/books if it exists, else Python's standard library by characters."""
    if (BOOKS / "train.bin").exists():
        return str(BOOKS)
    subprocess.run([sys.executable, "data/pystdlib_char/prepare.py"], cwd=ROOT, check=True)
    return "pystdlib_char"


def begin(changes: dict, data: str, folder: Path) -> subprocess.Popen:
    """Start one run. Its output goes to FOLDER.log."""
    settings = {**SETTINGS, **changes, "dataset": data, "out_dir": folder}
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in settings.items())]
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def read(folder: Path, process: subprocess.Popen) -> dict:
    """The results of a run, finished or not: its metrics, its settings and its choice of GEMMs."""
    rows = read_metrics(str(folder)) if (folder / "metrics.jsonl").exists() else []
    output = Path(f"{folder}.log").read_text(encoding="utf-8").splitlines()[-25:]
    result = {"exit": process.poll(), "rows": rows, "output": output}
    return result | {name: read_json(folder / name) for name in ("config.json", "spmm.json")}


def main(argv: list[str]) -> int:
    path, runs = Path(argv[0]), RUNS[argv[1] if argv[1:] else "weights"]
    results = {"settings": SETTINGS, "dataset": dataset(), "runs": {}}
    with tempfile.TemporaryDirectory(prefix="out-curves-", dir=ROOT) as folder:
        folders = {name: Path(folder) / name.replace(" ", "_") for name in runs}
        processes = {name: begin(runs[name], results["dataset"], folders[name]) for name in runs}
        try:
            ended = False
            while not ended:  # write the results every few seconds, since this stage may be killed
                ended = all(process.poll() is not None for process in processes.values())
                results["runs"] = {name: read(folders[name], process) for name, process in processes.items()}
                write_json(path, results)
                time.sleep(0 if ended else WRITE_S)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    for name, run in results["runs"].items():
        losses = [(row["iter"], round(row["train_loss"], 3)) for row in run["rows"] if row.get("train_loss")][::5]
        print("\n".join(run["output"]), f"\n{name}: exit {run['exit']}, losses {losses}", flush=True)
    return int(any(run["exit"] != 0 for run in results["runs"].values()))  # -9 is a failure too


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

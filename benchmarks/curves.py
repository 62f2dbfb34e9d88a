"""Short runs of train.py from one seed, dense beside the 2:4 methods: python -m benchmarks.curves OUT.json

GPT-2 124M with 16 x 1,024 tokens a step; the same data in the same order for every method. The losses stand side by
side in OUT.json with the measured seconds per step. They show that the fast path trains; they are too short to rank
methods by their loss.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime import write_json

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ROOT / ".evidence" / "books"
METHODS = ("none", "fst", "s_ste")
STEPS = 300
SETTINGS = {
    "batch_size": 16,
    "block_size": 1024,
    "gradient_accumulation_steps": 1,
    "max_iters": STEPS,
    "learning_rate": 6e-4,
    "warmup_iters": 50,
    "lr_decay_iters": STEPS,
    "min_lr": 6e-5,
    "eval_interval": 0,
    "eval_iters": 20,
    "log_interval": 10,
    "flip_interval": 50,
    "checkpoint_interval": 10**6,
}


def dataset() -> str:
    """The dataset for train.py, a name or a path: Python's standard library by characters if no other was brought."""
    if (BOOKS / "train.bin").exists():
        return str(BOOKS)
    subprocess.run([sys.executable, "data/pystdlib_char/prepare.py"], cwd=ROOT, check=True)
    return "pystdlib_char"


def run(method: str, data: str, folder: str) -> dict:
    """One run: its rows of metrics.jsonl, its choice of GEMMs, and what went wrong, if anything did."""
    words = {**SETTINGS, "sparse": method, "dataset": data, "out_dir": folder}
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in words.items())]
    done = subprocess.run(command, cwd=ROOT)
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    result = {"exit": done.returncode, "command": " ".join(command[1:]), "rows": rows}
    for name in ("config.json", "spmm.json"):
        path = Path(folder) / name
        result[name] = json.loads(path.read_text()) if path.exists() else None
    return result


def main(argv: list[str]) -> int:
    path, results = Path(argv[0]), {"settings": SETTINGS, "runs": {}}
    results["dataset"] = data = dataset()
    for method in METHODS:
        with tempfile.TemporaryDirectory(prefix="out-curves-", dir=ROOT) as folder:
            results["runs"][method] = run(method, data, folder)
        write_json(path, results)
    for method, found in results["runs"].items():
        steady = [row["s_per_iter"] for row in found["rows"] if row.get("s_per_iter")][-10:]
        losses = [(row["iter"], row["train_loss"]) for row in found["rows"] if row.get("train_loss")][::5]
        print(method, "exit", found["exit"], "seconds per step", steady, "losses", losses, flush=True)
    return max(found["exit"] for found in results["runs"].values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

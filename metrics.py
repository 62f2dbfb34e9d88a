"""metrics.jsonl, the numbers of a run, one object a line: writing it, and reading it and config.json back."""

import json
import math
import os
from pathlib import Path


class Metrics:
    """metrics.jsonl (one object a line, null = not measured at that iteration or not finite), the console and wandb."""

    KEYS = (
        *("iter", "phase", "train_loss", "val_loss", "val_loss_24", "lr", "grad_norm", "flip_rate"),
        *("masked_decay", "decay_ratio", "skipped", "tokens_per_s", "mfu", "elapsed_s"),
    )
    FORMATS = {  # noqa: RUF012
        "train_loss": "loss {:.4f}",
        "val_loss": "val {:.4f}",
        "lr": "lr {:.2e}",
        "grad_norm": "|g| {:.2f}",
        "flip_rate": "flip {:.5f}",
        "tokens_per_s": "{:,.0f} tok/s",
        "mfu": "mfu {:.1%}",
    }

    def __init__(self, folder: Path, first_iter: int, settings: dict):
        self.max_iters = settings["max_iters"]
        path = folder / "metrics.jsonl"
        kept = []
        if first_iter and path.exists():  # steps after the checkpoint will be done, and logged, again
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["iter"] < first_iter:
                        kept.append(line + "\n")
                except json.JSONDecodeError:  # a kill cut it short
                    print(f"{path}: dropped an unfinished line, {line[:40]!r}")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  open as long as the run
        self.wandb = None
        if settings["wandb_log"]:
            import wandb

            where = {"project": settings["wandb_project"], "name": settings["wandb_run_name"], "dir": str(folder)}
            self.wandb = wandb.init(**where, config=settings)

    def write(self, row: dict) -> None:
        numbers = {key: row.get(key) for key in self.KEYS}
        odd = {key: None for key, v in numbers.items() if isinstance(v, float) and not math.isfinite(v)}  # are no JSON
        self.file.write(json.dumps(numbers | odd) + "\n")
        if self.wandb:
            step = {key: value for key, value in row.items() if value is not None and key != "iter"}
            self.wandb.log(step, step=row["iter"])

    def show(self, row: dict) -> None:
        """One readable line; row["s_per_iter"] gives the time left."""
        texts = [f"iter {row['iter']:>6}/{self.max_iters}", f"{row['phase']:<6}"]
        texts += [form.format(row[key]) for key, form in self.FORMATS.items() if row.get(key) is not None]
        if "s_per_iter" in row:
            eta = int((self.max_iters - row["iter"]) * row["s_per_iter"])
            texts.append(f"eta {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}")
        print("  ".join(texts), flush=True)

    def sync(self) -> None:
        """Bring what was written to disk: before a checkpoint, which must not outlive its rows."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(folder):
    """The rows of `folder`/metrics.jsonl as dicts, in file order; null becomes None.

    Only the last line may be broken (a running job is writing it) and is then left out. Raises FileNotFoundError
    where there is no folder or no file yet, ValueError with file:line for a broken line elsewhere.
    """
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no such run folder: {folder!r}; give the out_dir of a run")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {path} yet; train.py writes it at its first measured iteration")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().rstrip().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if "iter" not in row or "phase" not in row:
                raise ValueError("no 'iter' or no 'phase'")
            rows.append(row)
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: {error}; delete that line") from None
    return rows


def read_config(folder):
    """The run's settings from `folder`/config.json; {} where there is none. Raises ValueError if it is broken."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; delete it to go without the run's settings") from None


def smooth(values: list[float], half: int) -> list[float]:
    """Mean of each value with up to `half` neighbours on each side."""
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]

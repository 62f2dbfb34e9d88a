"""metrics.jsonl, the numbers of a run, one object a line: writing it, and reading it and config.json back."""

import json
import math
import os
import time
from pathlib import Path

from configurator import write_small_file


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
        write_small_file(path, "".join(kept))
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


class Log:
    """Times the steps, and writes a row where it is due: to metrics.jsonl, to wandb, and to the console."""

    def __init__(self, s, model, ranks, peak: float | None, metrics: Metrics | None, elapsed: float):
        """peak: FLOP/s of all GPUs together, for the MFU; None where it is not known. metrics: None on all ranks but
        the first, and with eval_only. elapsed: seconds of training so far."""
        self.s, self.model, self.ranks, self.metrics, self.elapsed = s, model, ranks, metrics, elapsed
        self.tokens_per_step, self.peak = s.gradient_accumulation_steps * s.batch_size * s.block_size, peak
        self.steps, self.seconds, self.started = 0, 0.0, 0.0  # steps since the last row, what they took

    def start_step(self) -> None:
        self.started = time.perf_counter()

    def end_step(self, row: dict, losses: list[float], log_now: bool) -> None:
        """losses: of this rank's micro-batches. The row is written with log_now, or where it has a flip rate."""
        writing = log_now or "flip_rate" in row
        if writing:
            row["train_loss"] = self.ranks.total([sum(losses)])[0] / self.s.gradient_accumulation_steps
        seconds = time.perf_counter() - self.started
        self.elapsed, self.seconds, self.steps = self.elapsed + seconds, self.seconds + seconds, self.steps + 1
        if not writing:
            return
        row["s_per_iter"] = self.seconds / self.steps
        row["tokens_per_s"] = round(self.tokens_per_step / row["s_per_iter"], 1)
        row["mfu"] = self.model.estimate_mfu(row["tokens_per_s"], self.peak)
        self.steps, self.seconds = 0, 0.0
        self.write(row)
        if self.metrics and log_now:
            self.metrics.show(row)

    def write(self, row: dict) -> None:
        if self.metrics:
            self.metrics.write(row)

    def sync(self) -> None:
        """Bring the rows to disk: before a checkpoint, which must not outlive them."""
        if self.metrics:
            self.metrics.sync()

    def close(self, row: dict, stopping: bool, best_val_loss: float) -> None:
        """Say how the run ended. row: the last one."""
        s, folder, iter_num = self.s, Path(self.s.out_dir), row["iter"]
        if self.ranks.master and "val_loss" in row:
            pruned = f", hard-pruned to 2:4 {row['val_loss_24']:.4f}" if "val_loss_24" in row else ""
            print(f"iter {iter_num:>6}/{s.max_iters}  {row['phase']:<6}  val {row['val_loss']:.4f}{pruned}", flush=True)
        if not self.metrics:
            return
        self.metrics.close()
        command = "run the same command again"
        command += "" if s.init_from in ("auto", "resume") else " with --init_from=resume"
        if stopping:
            print(f"stopped after iteration {iter_num}, saved in {folder / 'ckpt.pt'}; to go on, {command}")
        else:
            print(f"done: {iter_num} iterations, best validation loss {best_val_loss:.4f}, saved in {folder}")


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

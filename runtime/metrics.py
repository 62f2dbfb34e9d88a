"""Writes a run's measurements to metrics.jsonl, the console and wandb, and reads them back."""

import contextlib
import json
import math
import os
import sys
import time
import uuid
from pathlib import Path

from configurator import sync, write_small_file
from gemm24.choose import reason

COLUMNS = {  # the columns of metrics.jsonl and their formats on the console; "" = not shown there
    "iter": "", "phase": "", "train_loss": "loss {:.4f}", "val_loss": "val {:.4f}", "val_loss_24": "",
    "lr": "lr {:.2e}", "grad_norm": "|g| {:.2f}", "flip_rate": "flip {:.5f}", "masked_decay": "", "decay_ratio": "",
    "skipped": "", "tokens_per_s": "{:,.0f} tok/s", "mfu": "mfu {:.1%}", "elapsed_s": "",
    "zeros": "", "over_two": "", "energy_dropped": "", "joined": "",
}  # fmt: skip
# Lists with one number per block, of methods/act24.py. Shares: zeros, groups of four features with more than two
# non-zeros, and the energy that 2:4 drops, or would drop. joined: 1 for a block that computes 2:4, else 0.
PER_BLOCK = ("zeros", "over_two", "energy_dropped", "joined")


class Log:
    """Times the steps, and reports them in metrics.jsonl, to wandb and on the console.

    A row of metrics.jsonl is a JSON object with all of COLUMNS. null means not measured at that iteration, or not
    finite. Only the rank that called `open` writes and prints.
    """

    def __init__(self, s, model, ranks, peak: float | None, elapsed: float):
        """peak: FLOP/s of all GPUs together, for the MFU; None if unknown. elapsed: seconds of training so far."""
        self.s, self.model, self.ranks, self.peak, self.elapsed = s, model, ranks, peak, elapsed
        self.tokens_per_step = s.gradient_accumulation_steps * s.batch_size * s.block_size
        self.steps, self.seconds, self.started = 0, 0.0, 0.0  # steps since the last row, and their duration
        self.file = self.wandb = self.wandb_id = None  # wandb_id: names the run there, and is in checkpoints

    def open_wandb(self) -> None:
        """Begin a run in wandb, or continue run `wandb_id` there. Raises ValueError if wandb fails."""
        self.wandb_id = os.environ.get("WANDB_RUN_ID") or self.wandb_id or uuid.uuid4().hex[:12]
        names = {"project": self.s.wandb_project, "name": self.s.wandb_run_name, "dir": self.s.out_dir}
        os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "60")  # a prompt must not hold up a batch job
        try:
            import wandb

            self.wandb = wandb.init(**names, config=vars(self.s), id=self.wandb_id, resume="allow")
        except Exception as error:  # wandb raises many types of exceptions
            remedy = "`wandb login`, WANDB_MODE=offline in the environment, or --wandb_log=False"
            raise ValueError(f"wandb_log=True: wandb cannot start ({reason(error)}); use {remedy}") from error

    def _tell_wandb(self, method: str, *args, **options) -> None:
        try:
            if self.wandb:
                getattr(self.wandb, method)(*args, **options)
        except Exception as error:  # as above
            self.wandb = None
            print(f"warning: wandb.{method} failed ({reason(error)}); the run goes on without wandb", flush=True)

    def open(self, first_iter: int) -> None:
        """Open metrics.jsonl. Its rows from `first_iter` on are deleted, because a resumed run repeats those steps."""
        path, rows = Path(self.s.out_dir) / "metrics.jsonl", []
        if first_iter and path.exists():
            rows, damaged = _parse(path.read_bytes())
            for line in damaged:  # a kill interrupted the write, or the file system lost it
                print(f"{path}: deleted a damaged line, {line[:40]!r}")
        rows = {row["iter"]: json.dumps(row) + "\n" for row in rows if row["iter"] < first_iter}  # without duplicates
        write_small_file(path, "".join(rows.values()))
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  open as long as the run

    def start_step(self) -> None:
        self.started = time.perf_counter()

    def end_step(self, row: dict, losses: list[float], log_now: bool) -> None:
        """Write the row if log_now, or if it has a flip rate or zeros. losses: those of this rank's micro-batches."""
        writing = log_now or "flip_rate" in row or "zeros" in row
        if writing:
            row["train_loss"] = self.ranks.total([sum(losses)])[0] / self.s.gradient_accumulation_steps
        seconds = time.perf_counter() - self.started
        self.elapsed, self.seconds, self.steps = self.elapsed + seconds, self.seconds + seconds, self.steps + 1
        if not writing:
            return
        s_per_iter = self.seconds / self.steps
        row["tokens_per_s"] = round(self.tokens_per_step / s_per_iter, 1)
        row["mfu"] = self.model.estimate_mfu(row["tokens_per_s"], self.peak)
        self.steps, self.seconds = 0, 0.0
        self.write(row)
        if self.file and log_now:
            self.show(row, s_per_iter)

    def write(self, row: dict) -> None:
        """Add the row to metrics.jsonl and to wandb."""
        if not self.file:
            return
        numbers = {key: row.get(key) for key in COLUMNS}
        numbers = {k: [*map(_or_null, v)] if isinstance(v, list) else _or_null(v) for k, v in numbers.items()}
        self.file.write(json.dumps(numbers) + "\n")
        measured = {key: value for key, value in row.items() if value is not None and key not in ("iter", *PER_BLOCK)}
        measured |= {f"{k}/{block}": one for k in PER_BLOCK for block, one in enumerate(row.get(k) or ())}
        self._tell_wandb("log", measured, step=row["iter"])

    def show(self, row: dict, s_per_iter: float) -> None:
        """Print the row as one line, with the remaining time."""
        texts = [f"iter {row['iter']:>6}/{self.s.max_iters}", f"{row['phase']:<6}"]
        texts += [text.format(row[key]) for key, text in COLUMNS.items() if text and row.get(key) is not None]
        eta = int((self.s.max_iters - row["iter"]) * s_per_iter)
        print("  ".join([*texts, f"eta {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"]), flush=True)

    def sync(self) -> None:
        """Flush the rows to disk. Call it before saving a checkpoint: all rows before it must survive with it."""
        if self.file:
            self.file.flush()
            sync(self.file.fileno())

    def close(self, row: dict, stopping: bool, saved: bool, best_val_loss: float) -> None:
        """Print how the run ended. row: the last one. saved: whether its weights are in ckpt.pt."""
        s, iter_num = self.s, row["iter"]
        if self.ranks.master and "val_loss" in row:
            pruned = f", hard-pruned to 2:4 {row['val_loss_24']:.4f}" if "val_loss_24" in row else ""
            print(f"iter {iter_num:>6}/{s.max_iters}  {row['phase']:<6}  val {row['val_loss']:.4f}{pruned}", flush=True)
        if not self.file:
            return
        self.file.close()
        self._tell_wandb("finish")
        if stopping:
            resume = "" if s.init_from in ("auto", "resume") else " with --init_from=resume"
            place = f"saved in {Path(s.out_dir) / 'ckpt.pt'}" if saved else "not saved"
            print(f"stopped after iteration {iter_num}, {place}; to continue, run the same command again{resume}")
        else:
            print(f"done: {iter_num} iterations, best validation loss {best_val_loss:.4f}, saved in {Path(s.out_dir)}")


def _or_null(value):
    """The value, or None for a number that is not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(text: bytes) -> tuple[list[dict], list[bytes]]:
    """(rows of a metrics.jsonl, with all of COLUMNS and in the order of their iterations; damaged lines)."""
    rows, damaged = [], []
    for line in filter(None, text.split(b"\n")):
        is_row = False
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            row = dict.fromkeys(COLUMNS) | json.loads(line.decode().strip("\0"))  # a lost block reads as zeros
            numbers = [row[name] for name in COLUMNS if name not in ("phase", *PER_BLOCK)]
            lists = [row[name] or [] for name in PER_BLOCK]
            numbers += [number for one in lists for number in one]
            is_row = type(row["iter"]) is int and row["phase"] in ("sparse", "dense")
            is_row &= all(isinstance(number, int | float | None) for number in numbers) and len({*map(len, lists)}) == 1
        if is_row:
            rows.append(row)
        else:
            damaged.append(line)
    return sorted(rows, key=lambda row: row["iter"]), damaged


def read_metrics(folder):
    """The rows of `folder`/metrics.jsonl as dicts with all of COLUMNS, in the order of their iterations.

    Damaged lines are skipped with a warning, an incomplete last one in silence. Raises FileNotFoundError if there is no
    folder or no file yet.
    """
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no such run folder: {folder!r}; give the out_dir of a run")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {path} yet; train.py writes it at its first measured iteration")
    text = Path(path).read_bytes()
    rows, damaged = _parse(text)
    incomplete = text.rpartition(b"\n")[2]  # the run may be writing this line
    damaged = [line for line in damaged if line != incomplete]
    if damaged:
        print(f"warning: {path}: damaged lines are ignored, {len(damaged)} of them", file=sys.stderr)
    return rows


def read_config(folder):
    """The run's settings from `folder`/config.json; {} if there is none. Raises ValueError if it is broken."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        try:
            return dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}; delete it to continue without the run's settings") from None


def smooth(values: list[float], half: int) -> list[float]:
    """Mean of each value with up to `half` neighbours on each side."""
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]

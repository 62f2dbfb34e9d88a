"""Runs of train.py, each in its own folder: start them, resume them, and read their metrics."""

import fcntl
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from runtime.metrics import read_metrics

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def last_row(folder: Path) -> dict | None:
    """The last row of a run's metrics, or None before the first one."""
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return rows[-1] if rows else None


def is_finished(folder: Path, max_iters: int) -> bool:
    """True if the run has its last validation loss. train.py writes that row after it has saved the checkpoint."""
    row = last_row(folder)
    return row is not None and row["iter"] >= max_iters and row.get("val_loss") is not None


def flip_rates(folder: Path, first: float = 0, end: float = math.inf) -> dict[int, float]:
    """{step: flip rate} of the measured steps with first <= step < end."""
    rows = [row for row in read_metrics(folder) if first <= row["iter"] < end]
    return {row["iter"]: row["flip_rate"] for row in rows if row.get("flip_rate") is not None}


def train_command(folder: Path, words: Sequence[str], launcher: Sequence[str] = (sys.executable,)) -> list[str]:
    """The command that trains in `folder`. words: config files and settings for train.py without out_dir."""
    return [*launcher, str(TRAIN), *words, f"--out_dir={folder.resolve()}"]


def train(folder: Path, words, max_iters: int, launcher=(sys.executable,), **environment: str) -> None:
    """Train in `folder` up to step `max_iters`, or resume the run there. Does nothing if it is finished.

    words, launcher: see train_command. Raises RuntimeError if the run fails or if a signal stops it. A lock keeps two
    processes from the same run. train.py inherits it, so the lock holds even if the parent is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with open(folder / "lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_finished(folder, max_iters):
            return
        print(f"{folder}: running, log in {log}", flush=True)
        options = {"pass_fds": (lock.fileno(),), "env": os.environ | environment}
        try:
            status = run_child(train_command(folder, words, launcher), log, **options)
        except InterruptedError:
            raise RuntimeError(f"stopped; the same command resumes {folder}") from None
    if status or not is_finished(folder, max_iters):
        end = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise RuntimeError(f"{folder} ended with status {status}, unfinished; the end of {log}:\n    {end}")


def run_child(command: list[str], log_path: Path, **options) -> int:
    """Run `command` and return its exit status. After SIGTERM or SIGINT it waits for the child, so that train.py can
    save, and raises InterruptedError.

    Passes SIGTERM on to the child, but not SIGINT: the terminal sends Ctrl-C to train.py too, and a second SIGINT would
    end it before it saves. Only the main thread handles signals, as Python demands; other threads just wait.
    """
    with open(log_path, "a", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
        received = []

        def receive(number, frame):
            received.append(number)
            if number == signal.SIGTERM:
                child.terminate()

        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        before = {number: signal.signal(number, receive) for number in numbers}
        try:
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise InterruptedError
    return status

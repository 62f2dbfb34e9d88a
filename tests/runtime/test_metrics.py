"""runtime/metrics.py: the console, metrics.jsonl, wandb, and reading metrics back during a run."""

import importlib.util
import io
import json
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest
from harness import DENSE_START, SETTINGS, launch, read_rows, run_differences, start

from runtime.metrics import Console, Log, keep_console, read_metrics, smooth


def test_the_console_shows_phase_loss_and_time_left(reference):
    text = reference[1]
    line = r"^iter +{}/32  {} +loss \d\.\d{{4}}  .*lr \d\.\d\de-\d\d  \|g\| \d\.\d\d  .*tok/s  eta \d:\d\d:\d\d$"
    sparse = r"sparse: fst, 4 linears .* masks every 5 steps, decay 0.01, mvue=True; dense from .* 27$"
    for expected in (
        line.format(0, "sparse"),
        line.format(DENSE_START, "dense"),
        r"^iter +32/32  dense +val \d\.\d{4}, hard-pruned to 2:4 \d\.\d{4}$",
        sparse,
        r"^done: 32 iterations, best validation loss \d\.\d{4}, saved in ",
    ):
        assert re.search(expected, text, re.M), expected


@pytest.mark.parametrize("error", [BrokenPipeError(32, "x"), OSError(5, "x"), OSError(28, "x"), ValueError("closed")])
def test_a_console_that_fails_loses_text_and_prints_again_later(error):
    class Stream(io.StringIO):
        failing = True

        def write(self, text):
            if self.failing:
                raise error
            return super().write(text)

        def flush(self):
            if self.failing:
                raise error

    stream = Stream()
    console = Console(stream)
    print("lost", file=console, flush=True)
    stream.failing = False
    print("printed", file=console, flush=True)
    assert stream.getvalue() == "printed\n"
    assert console.isatty() is False


def test_keep_console_takes_closed_streams_and_characters_that_a_terminal_lacks(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", None)
    keep_console()
    print("λ and \udcff", flush=True)
    print("lost", file=sys.stderr, flush=True)
    assert terminal.buffer.getvalue() == rb"\u03bb and \udcff" + b"\n"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["full", "closed", "pipe"])
def test_a_run_survives_its_console(data, tmp_path, place):
    if place == "pipe":
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    close = {"preexec_fn": lambda: os.closerange(0, 3)} if place == "closed" else {}
    settings = {**SETTINGS, "dataset": data, "max_iters": 3, "dense_start": 3}
    process = start(tmp_path / "out", settings, stdout=output, stderr=output, **close)
    os.close(output)
    assert process.wait(120) == 0
    assert [row["iter"] for row in read_rows(tmp_path / "out")] == [0, 1, 2, 3]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    settings = {name: SETTINGS[name] for name in ("gradient_accumulation_steps", "batch_size", "block_size")}
    log = Log(SimpleNamespace(**settings, out_dir=str(tmp_path), wandb_log=False), None, None, None, 0.0)
    log.open(0)
    log.write({"iter": 0, "phase": "dense", "train_loss": float("nan"), "lr": float("inf"), "val_loss": 1.5})
    log.file.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["train_loss"], row["lr"], row["val_loss"]) == (None, None, 1.5)


def test_metrics_are_on_disk_before_the_checkpoint(run, tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(f"-> {b}") or replace(a, b))
    run(tmp_path / "out", max_iters=3, checkpoint_interval=100)
    names = [event.removeprefix(f"{tmp_path}/out/").replace(f"-> {tmp_path}/out/", "-> ") for event in events]
    assert names.index("metrics.jsonl") < names.index("-> ckpt.pt")


def test_a_disk_that_is_full_for_metrics_is_an_error_without_a_traceback(attempt, tmp_path, monkeypatch):
    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Log, "write", full)
    done = attempt(tmp_path / "out")
    assert (done.returncode, done.stderr) == (1, "train.py: error: [Errno 28] No space left on device\n")


@pytest.mark.slow
def test_clocks_that_jump_change_no_number(run, tmp_path, monkeypatch):
    run(tmp_path / "undisturbed", max_iters=8)
    clock, wall, calls = time.perf_counter, time.time, []
    monkeypatch.setattr(time, "perf_counter", lambda: calls.append(1) or clock() + 3600 * (len(calls) // 5))
    monkeypatch.setattr(time, "time", lambda: wall() - 3600 * (len(calls) // 5))
    run(tmp_path / "jumps", max_iters=8)
    assert len(calls) > 10
    assert run_differences(tmp_path / "jumps", tmp_path / "undisturbed") == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_gets_the_same_numbers(data, tmp_path, monkeypatch):
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = launch(tmp_path / "out", {**SETTINGS, "dataset": data, "max_iters": 3, "wandb_log": True})
    assert done.returncode == 0, done.stderr
    assert [row["iter"] for row in read_rows(tmp_path / "out")] == [0, 1, 2, 3]
    (log,) = [*tmp_path.rglob("offline-run-*/run-*.wandb")]
    written = log.read_bytes()
    for name in ("train_loss", "val_loss", "flip_rate", "grad_norm", "mask_interval"):
        assert name.encode() in written


# ---------------------------------------------------------------------------------------------------------------------
# Reading


ROWS = [{"iter": 0, "phase": "sparse", "val_loss": None}, {"iter": 1, "phase": "dense", "val_loss": 4.0}]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("tail", ["", '{"iter": 9, "pha', "{", '{"iter": 9}', "\n", '{"iter": 9, "x": "\udcc3'])
def test_every_row_is_read_but_an_incomplete_last_one(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes((TEXT + tail).encode("utf-8", "surrogateescape"))
    assert read_metrics(tmp_path) == ROWS


@pytest.mark.parametrize("broken", ['{"iter": 9, "pha', "", "3", '{"iter": 9}'])
def test_broken_line_elsewhere_is_refused_with_its_number(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text(f"{broken}\n{TEXT}")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: .*; delete that line"):
        read_metrics(tmp_path)


def test_smooth_keeps_a_constant_and_averages_neighbours():
    assert smooth([2.0] * 5, 2) == [2.0] * 5
    assert smooth([0.0, 3.0, 6.0, 3.0], 1) == [1.5, 3.0, 4.0, 4.5]
    assert smooth([1.0, 5.0], 0) == [1.0, 5.0]

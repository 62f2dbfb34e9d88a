"""runtime/metrics.py: lines on the console, metrics.jsonl, wandb, and reading metrics back during a run."""

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
from harness import DENSE_START, SETTINGS, launch, read_rows, run_differences, start, stop_at

from runtime.metrics import COLUMNS, Log, read_config, read_metrics, smooth

TOKENS = {name: SETTINGS[name] for name in ("gradient_accumulation_steps", "batch_size", "block_size")}


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
    log = Log(SimpleNamespace(**TOKENS, out_dir=str(tmp_path), wandb_log=False), None, None, None, 0.0)
    log.open(0)
    numbers = {"train_loss": float("nan"), "lr": float("inf"), "val_loss": 1.5, "zeros": [0.5, float("nan")]}
    log.write({"iter": 0, "phase": "dense", **numbers})
    log.file.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["train_loss"], row["lr"], row["val_loss"], row["zeros"]) == (None, None, 1.5, [0.5, None])


def test_wandb_gets_one_number_per_block(tmp_path):
    log, sent = Log(SimpleNamespace(**TOKENS, out_dir=str(tmp_path), wandb_log=False), None, None, None, 0.0), []
    log.open(0)
    log.wandb = SimpleNamespace(log=lambda numbers, step: sent.append((step, numbers)))
    log.write({"iter": 100, "phase": "sparse", "lr": 0.1, "zeros": [0.5, 0.9], "joined": [0.0, 1.0]})
    log.file.close()
    per_block = {"zeros/0": 0.5, "zeros/1": 0.9, "joined/0": 0.0, "joined/1": 1.0}
    assert sent == [(100, {"phase": "sparse", "lr": 0.1} | per_block)]


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


class Wandb:
    """Stands in for the module and its runs. `runs` has what each init was given; `failing` names what raises."""

    __spec__ = importlib.util.spec_from_loader("wandb", None)

    def __init__(self, failing=None):
        self.failing, self.runs, self.rows, self.finished = failing, [], [], 0

    def _fail_at(self, method):
        if self.failing == method:
            raise RuntimeError(f"no {method}\nmore")

    def init(self, **options):
        self._fail_at("init")
        self.runs.append(options)
        return self

    def log(self, row, step):
        self._fail_at("log")
        self.rows.append((step, row))

    def finish(self):
        self._fail_at("finish")
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """wandb(failing=None) installs a Wandb and returns it."""

    def install(failing=None):
        monkeypatch.setitem(sys.modules, "wandb", module := Wandb(failing))
        return module

    monkeypatch.setenv("WANDB_LOGIN_TIMEOUT", "1")
    return install


def test_a_resumed_run_goes_on_in_its_wandb_run_and_a_fresh_one_begins_another(run, tmp_path, wandb):
    module, out = wandb(), tmp_path / "out"
    run(out, stop_at(1), wandb_log=True, max_iters=4, dense_start=4)
    run(out, wandb_log=False, max_iters=3, dense_start=4)  # the id stays in the checkpoint
    run(out, wandb_log=True, max_iters=4, dense_start=4)
    run(out, wandb_log=True, max_iters=1, init_from="scratch", overwrite=True)
    shutil.copytree(out, tmp_path / "copy")
    run(tmp_path / "copy", wandb_log=True, max_iters=2, dense_start=2, dense_finetune=0.0)
    first, resumed, fresh, copy = module.runs
    assert first["id"] == resumed["id"] != fresh["id"] != copy["id"]
    assert {options["resume"] for options in module.runs} == {"allow"}
    assert first["dir"] == str(out)
    assert first["config"]["max_iters"] == 4
    assert [step for step, _ in module.rows] == [0, 1, 3, 4, 0, 1, 1, 2]
    assert "train_loss" in module.rows[0][1]
    assert module.finished == 4


def test_a_wandb_that_cannot_start_is_refused_before_a_run_is_deleted(refused, stopped, wandb):
    wandb("init")
    remedy = "use `wandb login`, WANDB_MODE=offline in the environment, or --wandb_log=False"
    for changes in ({}, {"init_from": "scratch", "overwrite": True}):
        said = refused(stopped, wandb_log=True, **changes)
        assert f"wandb_log=True: wandb cannot start (RuntimeError: no init); {remedy}" in said


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_wandb_that_fails_later_costs_one_warning(run, tmp_path, wandb, failing):
    module = wandb(failing)
    text = run(tmp_path / "out", wandb_log=True, max_iters=3)
    warning = f"warning: wandb.{failing} failed (RuntimeError: no {failing}); the run goes on without wandb"
    assert text.count("warning") == text.count(warning) == 1
    assert [row["iter"] for row in read_rows(tmp_path / "out")] == [0, 1, 2, 3]
    assert (len(module.rows), module.finished) == (0 if failing == "log" else 4, 0)


@pytest.mark.slow
def test_in_a_locale_without_utf8_a_run_on_other_letters_trains(data, tmp_path, monkeypatch):
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(name, value)
    folder = shutil.copytree(data, tmp_path / "d\u00e4ta")
    meta = json.loads((folder / "meta.json").read_text())
    chars = meta["chars"].replace("(", "\u00e9")
    (folder / "meta.json").write_text(json.dumps(meta | {"chars": chars}, ensure_ascii=False), encoding="utf-8")
    done = launch(tmp_path / "out", {**SETTINGS, "dataset": folder, "max_iters": 1})
    assert done.returncode == 0, done.stderr
    assert [row["iter"] for row in read_rows(tmp_path / "out")] == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


ROWS = [{**dict.fromkeys(COLUMNS), "iter": i, "phase": "sparse", "val_loss": 4.0} for i in range(3)]
LINES = [json.dumps(row).encode() for row in ROWS]
DAMAGED = {  # a line of metrics.jsonl: whether its row can be read
    b'{"iter": 9, "pha': False,
    b"{": False,
    b"3": False,
    b"null": False,
    b'["iter", "phase"]': False,
    b'{"iter": 9}': False,
    b'{"iter": null, "phase": "sparse"}': False,
    b'{"iter": 9, "phase": "spbrse"}': False,
    b"[" * 10**5: False,
    b'{"iter": 9, "phase": "sparse", "zeros": 3}': False,
    b'{"iter": 9, "phase": "sparse", "zeros": ["3"], "over_two": [3], "energy_dropped": [3], "joined": [1]}': False,
    b'{"iter": 9, "phase": "sparse", "zeros": [3], "over_two": [3, 4], "energy_dropped": [3], "joined": [1]}': False,
    b'{"iter": 9, "phase": "sparse", "train_loss": [3.0]}': False,
    b'{"iter": 9, "x": "\xc3': False,
    b"\xff\xfe\x00\x85\x0b garbage": False,
    b"\0" * 4096: False,
    b"\0" * 512 + LINES[1]: True,
    LINES[1] + b"\r": True,
    LINES[1] + b"\n": True,
    b"": True,
}
damaged_lines = pytest.mark.parametrize(("line", "is_row"), DAMAGED.items(), ids=lambda v: repr(v)[:30])


@damaged_lines
def test_a_damaged_line_costs_a_warning_and_no_other_row(tmp_path, capsys, line, is_row):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([LINES[0], line or LINES[1], LINES[2]]) + b"\n")
    assert read_metrics(tmp_path) == [row for row in ROWS if is_row or row["iter"] != 1]
    warning = f"warning: {tmp_path}/metrics.jsonl: damaged lines are ignored, 1 of them\n"
    assert capsys.readouterr().err == ("" if is_row else warning)


@damaged_lines
def test_an_incomplete_last_line_is_ignored_in_silence(tmp_path, capsys, line, is_row):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*LINES, b"" if is_row else line]))
    assert read_metrics(tmp_path) == ROWS
    assert capsys.readouterr().err == ""


@damaged_lines
def test_a_resumed_run_deletes_damaged_lines_with_a_word(tmp_path, capsys, line, is_row):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0], line or LINES[1], LINES[2], b'{"iter": 2, "pha']))
    log = Log(SimpleNamespace(**TOKENS, out_dir=str(tmp_path), wandb_log=False), None, None, None, 0.0)
    log.open(2)
    log.file.close()
    assert path.read_bytes() == b"".join(row + b"\n" for row in LINES[: 1 + is_row])
    assert len(re.findall("metrics.jsonl: deleted a damaged line, b'.*'\n", capsys.readouterr().out)) == 2 - is_row


def test_rows_of_all_iterations_are_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([b'{"iter": 0, "phase": "dense"}', *LINES, LINES[0], LINES[1]]))
    assert [row["iter"] for row in read_metrics(tmp_path)] == [0, 0, 0, 1, 1, 2]
    log = Log(SimpleNamespace(**TOKENS, out_dir=str(tmp_path), wandb_log=False), None, None, None, 0.0)
    log.open(2)  # the last row of an iteration counts
    log.file.close()
    assert read_metrics(tmp_path) == ROWS[:2]
    path.write_bytes(b"")
    assert read_metrics(tmp_path) == []


def test_a_rewrite_that_fails_leaves_the_rows(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0] + b"\n{")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    log = Log(SimpleNamespace(**TOKENS, out_dir=str(tmp_path), wandb_log=False), None, None, None, 0.0)
    with pytest.raises(OSError, match="No space left"):
        log.open(5)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(path.name, LINES[0] + b"\n{")]


@pytest.mark.parametrize("text", [b"{", b"[1]", b"3", b"\xff", b"\0\0", b""])
def test_a_damaged_config_json_is_refused_with_the_remedy(tmp_path, text):
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json: .*; delete it to continue without the run's settings"):
        read_config(tmp_path)


def test_smooth_keeps_a_constant_and_averages_neighbours():
    assert smooth([2.0] * 5, 2) == [2.0] * 5
    assert smooth([0.0, 3.0, 6.0, 3.0], 1) == [1.5, 3.0, 4.0, 4.5]
    assert smooth([1.0, 5.0], 0) == [1.0, 5.0]

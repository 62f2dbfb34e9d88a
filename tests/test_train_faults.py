"""What goes wrong while a run goes on: gradients that are not finite, losses that stand out, data that vanishes, two
runs in one folder; which checkpoints are kept; and sampling without replacement. Kills are in test_faults.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from harness import (
    ROOT,
    SETTINGS,
    contents,
    launch,
    make_dataset,
    pristine_train,
    read_rows,
    read_state,
    row_differences,
    run_here,
    state_differences,
    to_words,
)
from test_train import data  # noqa: F401 (a fixture)

from runtime import loader, ranks, setup
from runtime.health import LossWatch, StepGuard
from runtime.metrics import Metrics

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(data):
    def run(out, fault=None, status=0, **changes):
        done = run_here(out, {**SETTINGS, "dataset": data, **changes}, fault)
        assert done.returncode == status, done.stderr
        return done

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


def nan_at(*iter_nums):
    return {"kind": "nan", "iter_nums": list(iter_nums)}


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(run, tmp_path):
    done = run(tmp_path / "out", nan_at(5), max_iters=7, dense_start=7, checkpoint_interval=1)
    run(tmp_path / "before", max_iters=5, dense_start=7, checkpoint_interval=1)
    # the last save is that of iteration 7, the one before it that of 6: after the step that was skipped
    before, after = read_state(tmp_path / "before"), read_state(tmp_path / "out", "ckpt_prev.pt")
    assert (before["iter_num"], after["iter_num"]) == (5, 6)
    assert state_differences(after["model"], before["model"]) == []
    assert state_differences(after["optimizer"]["state"], before["optimizer"]["state"]) == []
    rows = read_rows(tmp_path / "out")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 0, 1, 1, None]
    assert rows[5]["train_loss"] is rows[5]["grad_norm"] is rows[5]["decay_ratio"] is None
    assert rows[6]["train_loss"] > 0
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "warning, iteration 5: gradient norm nan, step skipped" in done.stdout
    assert re.search(
        r"warning, rank 0: loss nan; iteration 5, micro-batch 0, whose windows begin at tokens \d+", done.stdout
    )
    assert all(torch.isfinite(t).all() for t in read_state(tmp_path / "out")["model"].values() if torch.is_tensor(t))


@pytest.mark.slow
def test_the_count_goes_over_a_stop(run, tmp_path):
    fault = nan_at(3, 5)
    run(tmp_path / "whole", fault, max_iters=8)
    run(tmp_path / "parts", fault, max_iters=5, dense_start=7)
    run(tmp_path / "parts", fault, max_iters=8, dense_start=7)
    assert [row["skipped"] for row in read_rows(tmp_path / "parts")][-2] == 2
    assert read_state(tmp_path / "parts")["skipped"] == [2, 0]
    assert read_state(tmp_path / "whole")["skipped"] == [2, 0]


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_with_the_last_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(StepGuard, "MAX_SKIPPED", 5)
    done = run(tmp_path / "out", nan_at(*range(9, 40)), status=1)
    assert "train.py: error: the last 6 gradients were not finite" in done.stderr
    assert "lower learning_rate" in done.stderr
    assert "Traceback" not in done.stderr
    state = read_state(tmp_path / "out")
    assert state["iter_num"] == 12
    assert state["skipped"] == [3, 3]
    assert all(torch.isfinite(t).all() for t in state["model"].values() if torch.is_tensor(t))
    run(tmp_path / "out")  # and without what was wrong the run goes on
    assert read_rows(tmp_path / "out")[-2]["skipped"] == 3


@pytest.mark.slow
def test_a_restart_does_not_begin_the_count_anew(run, tmp_path, monkeypatch):
    """Saves go on meanwhile, so a job that is started again and again must not creep on."""
    monkeypatch.setattr(StepGuard, "MAX_SKIPPED", 5)
    fault = nan_at(*range(9, 40))
    run(tmp_path / "out", fault, status=1)
    done = run(tmp_path / "out", fault, status=1)
    assert "the last 6 gradients" in done.stderr
    assert read_state(tmp_path / "out")["iter_num"] == 12


def test_just_enough_in_a_row_do_not(run, tmp_path, monkeypatch):
    monkeypatch.setattr(StepGuard, "MAX_SKIPPED", 3)
    run(tmp_path / "out", nan_at(4, 5, 6, 8, 9, 10), max_iters=12)
    assert read_state(tmp_path / "out")["skipped"] == [6, 0]


@pytest.mark.slow
def test_all_ranks_pass_over_what_one_of_them_met(data, tmp_path):
    settings = {**SETTINGS, "dataset": data, "max_iters": 5}
    done = launch(tmp_path / "out", settings, nan_at(2), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "warning, rank 1: loss nan; iteration 2, micro-batch 1" in done.stdout
    assert read_state(tmp_path / "out")["skipped"] == [1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Losses that stand out


def test_a_loss_that_stands_out_is_found_and_not_learned():
    watch, noise = LossWatch(), np.random.default_rng(0).normal(3, 0.1, 500)
    assert [watch.add(float(x)) for x in noise] == [None] * 500
    assert re.match(r"loss 4\.5000, where the last 200 were \d\.\d+ \+- 0\.\d+", watch.add(4.5))
    assert watch.add(4.5) is not None
    assert watch.add(1.0) is None  # a low loss is no trouble
    assert watch.add(float("nan")) == "loss nan"
    assert watch.add(float("inf")) == "loss inf"


def test_a_level_that_stays_is_reported_for_a_while_alone():
    watch = LossWatch()
    for x in np.random.default_rng(0).normal(3, 0.1, 100):
        watch.add(float(x))
    found = [watch.add(float(x)) is not None for x in np.random.default_rng(1).normal(6, 0.1, 150)]
    assert found == [True] * LossWatch.LEAST + [False] * (150 - LossWatch.LEAST)


def test_few_losses_are_no_measure():
    watch = LossWatch()
    assert [watch.add(x) for x in [3.0] * (LossWatch.LEAST - 1) + [50.0]] == [None] * LossWatch.LEAST


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.slow
def test_data_that_vanishes_or_shrinks_ends_the_run_by_name(run, tmp_path, monkeypatch):
    for name, spoil in (("gone", os.unlink), ("short", lambda path: os.truncate(path, 100))):
        data, windows, calls = make_dataset(tmp_path / name), loader.Tokens.windows, []

        def spoiled(self, starts, device, data=data, windows=windows, calls=calls, spoil=spoil):
            calls.append(0)
            if len(calls) == 40:
                spoil(data / "train.bin")
            return windows(self, starts, device)

        with monkeypatch.context() as patch:
            patch.setattr(loader.Tokens, "windows", spoiled)
            done = run_here(tmp_path / f"out_{name}", {**SETTINGS, "dataset": data, "eval_interval": 0})
        assert done.returncode == 1
        assert re.match(r"train\.py: error: dataset: \S+train\.bin (vanished while|had \d+ tokens when)", done.stderr)
        assert read_state(tmp_path / f"out_{name}")["iter_num"] == 8


def tokens(folder, count, block_size=8):
    np.arange(count, dtype="<u2").tofile(folder / "train.bin")
    return loader.Tokens(folder, "train", block_size, count)


@pytest.mark.parametrize("count", [41, 45, 48, 49, 9])
def test_an_epoch_has_every_window_once_in_an_order_of_its_own(tmp_path, count):
    split = tokens(tmp_path, count)
    windows = (count - 1) // 8
    epochs = [split.epoch_starts(windows, epoch * windows, seed=3) for epoch in range(40)]
    for starts in epochs:
        offset = starts.min()
        assert sorted(starts) == [offset + 8 * i for i in range(windows)]
        assert 0 <= offset <= (count - 1) % 8
        split.windows(starts, CPU)
    if windows > 1:
        assert len({tuple(starts - starts.min()) for starts in epochs}) > 10
    assert {starts.min() for starts in epochs} == set(range((count - 1) % 8 + 1))
    if windows > 1:
        assert any((split.epoch_starts(windows, e * windows, 4) != epochs[e]).any() for e in range(40))


def test_where_a_window_lies_depends_on_its_number_alone(tmp_path):
    split = tokens(tmp_path, 100)
    whole = split.epoch_starts(60, 0, 7)
    parts = [tokens(tmp_path, 100).epoch_starts(n, first, 7) for first, n in ((0, 7), (7, 20), (27, 1), (28, 32))]
    assert (np.concatenate(parts) == whole).all()
    assert (split.epoch_starts(5, 3, 7) == whole[3:8]).all()  # going back, too


@pytest.mark.slow
def test_epochs_train_the_same_whatever_the_ranks_and_after_a_stop(run, data, tmp_path):
    changes = {"sampling": "epoch", "mvue": False, "dropout": 0.0, "max_iters": 10, "mask_interval": 20}
    run(tmp_path / "one", **changes)
    run(tmp_path / "parts", {"kind": "signal", "signal": "SIGTERM", "iter_num": 5, "micro_batch": 0}, **changes)
    run(tmp_path / "parts", **changes)
    assert state_differences(read_state(tmp_path / "parts"), read_state(tmp_path / "one")) == []
    done = launch(tmp_path / "two", {**SETTINGS, "dataset": data, **changes}, ranks=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True):
        assert b["train_loss"] == (pytest.approx(a["train_loss"], rel=1e-5) if a["train_loss"] else None)


@pytest.mark.slow
def test_every_window_of_an_epoch_is_trained_on(run, data, tmp_path, monkeypatch):
    seen, windows = [], loader.Tokens.windows

    def spy(self, starts, device):
        if self.path.name == "train.bin":
            seen.extend(int(start) for start in starts)
        return windows(self, starts, device)

    monkeypatch.setattr(loader.Tokens, "windows", spy)
    run(tmp_path / "out", sampling="epoch", max_iters=20)
    each = 16  # windows in a step
    split = loader.Tokens(data, "train", SETTINGS["block_size"], 100)
    count = (len(split.data) - 1) // SETTINGS["block_size"]
    assert len(seen) == 20 * each
    assert len(seen) > count
    assert len(set(seen[:count])) == count


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and folders


def test_chosen_checkpoints_are_kept(run, tmp_path):
    run(tmp_path / "out", max_iters=14, checkpoint_interval=2, eval_interval=0, keep_last=3, keep_every=4)
    kept = sorted(path.name for path in (tmp_path / "out").glob("ckpt*"))
    numbered = [f"ckpt_{i:08d}.pt" for i in (4, 8, 10, 12, 14)]
    assert kept == ["ckpt.pt", *numbered, "ckpt_prev.pt"]
    for name in numbered:
        assert read_state(tmp_path / "out", name)["iter_num"] == int(name[5:13])


def test_checkpoints_that_were_kept_are_not_deleted_unasked(run, tmp_path):
    out = tmp_path / "out"
    changes = {"max_iters": 6, "checkpoint_interval": 2, "keep_every": 4}
    run(out, **changes)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (out / name).unlink()
    before = contents(out)
    done = run(out, status=1, **changes)
    assert "has no ckpt.pt, but ckpt_00000004.pt: mv one of these to ckpt.pt" in done.stderr
    assert contents(out) == before
    (out / "ckpt_00000004.pt").rename(out / "ckpt.pt")
    assert "at iteration 4" in run(out, **changes).stdout


@pytest.mark.slow
def test_saving_in_a_thread_changes_nothing(run, tmp_path, monkeypatch):
    run(tmp_path / "thread", max_iters=14)
    save = setup.Writer.save
    monkeypatch.setattr(setup.Writer, "save", lambda writer, *args: (save(writer, *args), writer.wait()))
    run(tmp_path / "at once", max_iters=14)
    assert state_differences(read_state(tmp_path / "thread"), read_state(tmp_path / "at once")) == []
    assert row_differences(read_rows(tmp_path / "thread"), read_rows(tmp_path / "at once")) == []


def test_a_second_run_in_the_folder_is_refused(run, tmp_path):
    run(tmp_path / "out", max_iters=4)
    state = read_state(tmp_path / "out")
    held = ranks.hold(tmp_path / "out")
    done = run(tmp_path / "out", status=1, max_iters=8, dense_start=3)
    assert f"is in use by process {os.getpid()} on" in done.stderr
    assert "set another out_dir" in done.stderr
    assert state_differences(read_state(tmp_path / "out"), state) == []
    held.close()
    run(tmp_path / "out", max_iters=8, dense_start=3)


@pytest.mark.slow
def test_a_folder_is_free_again_when_its_process_is_killed(data, tmp_path):
    settings = {**SETTINGS, "dataset": data, "max_iters": 12}
    done = launch(tmp_path / "out", settings, {"kind": "signal", "signal": "SIGKILL", "iter_num": 9, "micro_batch": 0})
    assert done.returncode == -9
    assert (tmp_path / "out" / "run.lock").read_text().startswith("process ")
    done = run_here(tmp_path / "out", settings)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_settings_and_logs_hold_no_secret(tmp_path, data):
    """What a user keeps in the environment does not get into the files of a run."""
    secret = "a-key-that-nobody-may-see"
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    command = [sys.executable, "train.py", *to_words(tmp_path / "out", {**SETTINGS, "dataset": data, "max_iters": 2})]
    env = {**os.environ, **dict.fromkeys(names, secret), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, done.stderr] + [path.read_bytes().decode("latin1") for path in (tmp_path / "out").iterdir()]
    assert len(texts) >= 5
    assert not any(secret in text for text in texts)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize(
    ("sums", "wrong"),
    [
        ([(0, 5), (0, 5), (0, 6)], [2]),
        ([(0, 6), (0, 5), (0, 5)], [0]),
        ([(0, 5), (0, 5), (0, 5)], []),
        ([(0, 5), (1, 9), (0, 5), (1, 8), (0, 5), (1, 9)], [3]),  # two shards, three copies of each
        ([(0, 5), (1, 9)], []),  # shards are not compared with one another
        ([(0, 5), (0, 6)], [0, 1]),  # of two, who is to say
        ([(0, 5), (0, 6), (0, 6), (0, 5)], [0, 1, 2, 3]),
        ([(0, 5), (0, 6), (1, 9), (1, 9)], [0, 1]),
        ([(0, 5), (0, 6), (0, 7), (0, 5)], [1, 2]),
    ],
)
def test_the_rank_that_differs_is_named(sums, wrong):
    assert ranks.outvoted(sums) == wrong


@pytest.mark.slow
def test_more_ranks_than_micro_batches_share_them_out(data, tmp_path):
    """Three ranks, four micro-batches: two rounds, in the second of which two ranks train on nothing."""
    changes = {"mvue": False, "dropout": 0.0, "max_iters": 6, "mask_interval": 20}
    one = run_here(tmp_path / "one", {**SETTINGS, "dataset": data, **changes})
    three = launch(tmp_path / "three", {**SETTINGS, "dataset": data, **changes}, ranks=3)
    assert one.returncode == three.returncode == 0, one.stderr + three.stderr
    for a, b in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "three"), strict=True):
        for key in ("train_loss", "grad_norm", "val_loss"):
            assert b[key] == (pytest.approx(a[key], rel=1e-5) if a[key] else None)


def test_metrics_are_on_disk_before_the_checkpoint_that_counts_on_them(run, tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(f"-> {b}") or replace(a, b))
    run(tmp_path / "out", max_iters=3, checkpoint_interval=100)
    names = [event.removeprefix(f"{tmp_path}/out/").replace(f"-> {tmp_path}/out/", "-> ") for event in events]
    assert names.index("metrics.jsonl") < names.index("-> ckpt.pt")


def test_no_row_holds_what_json_has_no_word_for(tmp_path):
    with pristine_train():
        rows = [{"iter": 0, "phase": "dense", "train_loss": float("nan"), "lr": float("inf"), "val_loss": 1.5}]
        metrics = Metrics(tmp_path, 0, {"max_iters": 1, "wandb_log": False})
        metrics.write(rows[0])
        metrics.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["train_loss"], row["lr"], row["val_loss"]) == (None, None, 1.5)


# ---------------------------------------------------------------------------------------------------------------------
# Starts that torchrun repeats, and starts from elsewhere


@pytest.mark.parametrize("init_from", ["scratch", "gpt2"])
def test_a_start_that_a_restart_would_undo_is_refused(run, tmp_path, monkeypatch, init_from):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    done = run(tmp_path / "out", status=1, init_from=init_from, overwrite=True)
    assert f"init_from={init_from} would begin anew at each restart by torchrun; use init_from=auto" in done.stderr
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", max_iters=1)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    run(tmp_path / "out", init_from="scratch", overwrite=True, max_iters=1)


def test_a_stop_is_no_success_where_torchrun_restarts(run, tmp_path, monkeypatch):
    """Else the loss of one node would end the run on all others."""
    fault = {"kind": "signal", "signal": "SIGTERM", "iter_num": 2, "micro_batch": 0}
    run(tmp_path / "alone", fault)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    run(tmp_path / "out", fault, status=128 + signal.SIGTERM)
    assert read_state(tmp_path / "out")["iter_num"] == read_state(tmp_path / "alone")["iter_num"] == 3


def test_a_best_checkpoint_alone_is_not_deleted_by_a_start(run, tmp_path):
    run(tmp_path / "out", max_iters=9, always_save_checkpoint=False)
    (tmp_path / "out" / "ckpt.pt").unlink()
    (tmp_path / "out" / "ckpt_prev.pt").unlink(missing_ok=True)
    before = contents(tmp_path / "out")
    assert "has no ckpt.pt, but ckpt_best.pt" in run(tmp_path / "out", status=1, max_iters=9).stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_a_kill_after_the_last_save_loses_no_evaluation(data, tmp_path):
    """The third save is the last one."""
    settings = {**SETTINGS, "dataset": data, "max_iters": 12, "dense_start": 12, "eval_interval": 0}
    fault = {"kind": "kill_in_save", "point": "the new one is ckpt.pt", "count": 3}
    assert launch(tmp_path / "out", settings, fault).returncode == -signal.SIGKILL
    assert "are done" in run_here(tmp_path / "out", settings).stdout
    assert read_rows(tmp_path / "out")[-1]["val_loss_24"] is not None


def test_float16_goes_on_from_float32(run, tmp_path):
    run(tmp_path / "out", max_iters=3, dense_start=9)
    assert "at iteration 3" in run(tmp_path / "out", max_iters=6, dense_start=9, dtype="float16").stdout


def test_ranks_that_read_different_checkpoints_are_refused(run, tmp_path, monkeypatch):
    """As of a rank whose disk holds an older copy: what rank 0 says is another iteration."""
    run(tmp_path / "out", max_iters=3, dense_start=9)
    says = iter([tmp_path / "out" / "ckpt.pt", (2, 0.5)])
    monkeypatch.setattr(ranks.Ranks, "decide", lambda self, value: next(says))
    done = run(tmp_path / "out", status=1, max_iters=6, dense_start=9)
    assert "ckpt.pt is another checkpoint here than on rank 0; put out_dir on a shared file system" in done.stderr


@pytest.mark.slow
def test_clocks_that_jump_change_no_number(run, tmp_path, monkeypatch):
    """As of a machine that slept, and one whose time was set back."""
    run(tmp_path / "whole", max_iters=8)
    clock, wall, calls = time.perf_counter, time.time, []
    monkeypatch.setattr(time, "perf_counter", lambda: calls.append(1) or clock() + 3600 * (len(calls) // 5))
    monkeypatch.setattr(time, "time", lambda: wall() - 3600 * (len(calls) // 5))
    run(tmp_path / "jumps", max_iters=8)
    assert len(calls) > 10
    assert state_differences(read_state(tmp_path / "jumps"), read_state(tmp_path / "whole")) == []
    assert row_differences(read_rows(tmp_path / "jumps"), read_rows(tmp_path / "whole")) == []


def test_a_disk_that_is_full_for_metrics_is_an_error_without_a_traceback(run, tmp_path, monkeypatch):
    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Metrics, "write", full)
    assert run(tmp_path / "out", status=1).stderr == "train.py: error: [Errno 28] No space left on device\n"

"""The runner: it starts train.py once per run, waits for it to save, and holds a lock meanwhile."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from studies import runs


def test_finished_means_at_the_end_with_a_loss(tmp_path, write_run):
    assert not runs.is_finished(tmp_path / "none", 4)
    assert not runs.is_finished(write_run(tmp_path / "empty"), 4)
    for row in ({"iter": 4, "val_loss": 1.5}, {"iter": 3, "val_loss": 1.5}, {"iter": 4, "val_loss": None}, {"iter": 4}):
        folder = write_run(tmp_path / "run", [{"iter": 0, "val_loss": 9.0}, row])
        assert runs.last_row(folder).items() >= ({"phase": "sparse"} | row).items()
        assert runs.is_finished(folder, 4) == (row == {"iter": 4, "val_loss": 1.5})


def test_flip_rates_are_those_of_the_measured_steps(tmp_path, write_run):
    rows = [{"iter": i, "flip_rate": rate} for i, rate in ((7, 1.0), (8, 0.002), (9, None), (10, 0.004), (11, 1.0))]
    folder = write_run(tmp_path, [*rows, {"iter": 10}])
    assert runs.flip_rates(folder, 8, 11) == {8: 0.002, 10: 0.004}
    assert runs.flip_rates(folder).keys() == {7, 8, 10, 11}


def test_a_run_is_started_once_and_goes_on_after_a_stop(tmp_path, write_run, monkeypatch):
    """A fake train.py is stopped at step 2, ends at step 3 with status 0, and then finishes."""
    folder, calls, outcomes = tmp_path / "run", [], [2, 3, 4]

    def run_child(command, log, **options):
        calls.append((command, options["env"]["EXTRA"]))
        log.write_text("its last line\n")
        write_run(folder, [{"iter": outcomes.pop(0), "val_loss": 1.0}])
        if len(calls) == 1:
            raise InterruptedError
        return 0

    monkeypatch.setattr(runs, "run_child", run_child)
    arguments = (folder, ["config.py", "--a=1"], 4, ["torchrun", "--standalone"])
    with pytest.raises(RuntimeError, match=f"stopped; the same command resumes {folder}"):
        runs.train(*arguments, EXTRA="x")
    with pytest.raises(RuntimeError, match=r"run ended with status 0, unfinished; the end of .*\n    its last line"):
        runs.train(*arguments, EXTRA="x")
    for _ in range(2):
        runs.train(*arguments, EXTRA="x")
    command = ["torchrun", "--standalone", str(runs.TRAIN), "config.py", "--a=1", f"--out_dir={folder}"]
    assert calls == [(command, "x")] * 3


@pytest.mark.slow
def test_a_failing_run_shows_its_last_lines_and_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with status 2, .*log\.txt:\n.*did you mean 'learning_rate'"):
        runs.train(tmp_path, ["--learning_rat=1"], 4)
    assert "did you mean 'learning_rate'" in (tmp_path / "log.txt").read_text()


def test_a_run_is_locked_for_other_processes_as_long_as_train_lives(tmp_path, monkeypatch):
    """train.py inherits the lock, which therefore outlives a killed study."""
    take = f"import fcntl; fcntl.flock(open({str(tmp_path / 'lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    (tmp_path / "train.py").write_text(
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {take!r}])\n"
        "print([os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')])\n"
    )
    monkeypatch.setattr(runs, "TRAIN", tmp_path / "train.py")
    with pytest.raises(RuntimeError, match="unfinished"):
        runs.train(tmp_path, [], 1)
    log = (tmp_path / "log.txt").read_text()
    assert "BlockingIOError" in log
    assert f"'{tmp_path / 'lock'}'" in log.splitlines()[-1]
    subprocess.run([sys.executable, "-c", take], check=True)  # the lock is free now


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, "saved"), (signal.SIGINT, "ended by itself")])
def test_a_signal_waits_for_train_to_save(tmp_path, number, end):
    """SIGTERM is passed on. Ctrl-C is not, since the terminal sends it to train.py too."""
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(print('interrupted')))\n"
        "print('ready', flush=True)\ntime.sleep(1)\nprint('ended by itself')"
    )
    log, main, before = tmp_path / "log.txt", threading.main_thread().ident, signal.getsignal(number)

    def stop_it_when_it_runs():
        for _ in range(400):
            time.sleep(0.02)
            if log.exists() and "ready" in log.read_text():
                return signal.pthread_kill(main, number)
        return None

    thread = threading.Thread(target=stop_it_when_it_runs)
    thread.start()
    with pytest.raises(InterruptedError):
        runs.run_child([sys.executable, "-c", code], log)
    thread.join()
    assert log.read_text() == f"ready\n{end}\n"
    assert signal.getsignal(number) is before


def test_other_threads_run_children_too(tmp_path):
    """Only the main thread may set signal handlers; studies run in threads."""
    status = []
    command = ["sh", "-c", "echo hello; exit 3"]
    thread = threading.Thread(target=lambda: status.append(runs.run_child(command, tmp_path / "log.txt")))
    thread.start()
    thread.join()
    assert status == [3]
    assert (tmp_path / "log.txt").read_text() == "hello\n"

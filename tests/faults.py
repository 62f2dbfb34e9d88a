"""Stop and kill training at many points. Every resumed run must end in the same bits as an undisturbed run.

    python tests/faults.py --kills 20 --out results/faults.json

stop       a signal at five points on one process and on two, and in evaluations: no step is lost
torchrun   SIGTERM to torchrun itself, SIGUSR1 and kill -9 to one of its two ranks, a rank that stalls
survive    the console goes away or is full, folders cannot be synced: the run does not notice
kill       kill -9 at random moments of the training loop
save       kill -9 at each named point of a save
flip       a flipped bit in a random byte of a checkpoint: refused, or harmless
data       a run that is resumed on other tokens: refused, and unharmed
ranks      two ranks that differ in settings, data, or two rows of a weight: refused by name
folder     another run finished in out_dir meanwhile, a damaged line of metrics, a damaged checkpoint
nodes      two torchrun agents, as on two nodes, connected by c10d: one is killed with its rank, the other continues
           alone, the lost one comes back and gets SIGTERM. Compared with one process in float64, because sums over
           ranks differ in rounding.
in a row   one long run, killed many times, on one process and in FSDP shards on two ranks: at random moments, and in
           every third life at a random point of a save
In all cases but `nodes`, a run that the fault has ended is resumed by the plain command. Then weights, masks, optimizer
and all metrics but times are compared bit for bit with an undisturbed run. The exit status is 1 if anything differs.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import (
    DENSE_START,
    ROOT,
    SAVE_POINTS,
    SETTINGS,
    children_of,
    differences,
    finish,
    free_port,
    kill_with_ranks,
    launch,
    make_dataset,
    read_rows,
    read_state,
    row_differences,
    start,
    start_by_hand,
    state_differences,
    to_words,
)

from configurator import write_json
from runtime import checkpoint
from runtime.ranks import environment

# name -> (fault, saved iteration); the step in which the signal arrives is finished first, an evaluation is abandoned
STOP_POINTS = {
    "during accumulation": ({"kind": "signal", "iter_num": 12, "micro_batch": 2}, 13),
    "between mask refreshes": ({"kind": "signal", "iter_num": 7, "micro_batch": 0}, 8),
    "at a mask refresh": ({"kind": "signal_at_refresh", "count": 2}, 10),
    "at the dense switch": ({"kind": "signal", "iter_num": DENSE_START - 1, "micro_batch": 3}, DENSE_START),
    "after the dense switch": ({"kind": "signal", "iter_num": DENSE_START + 2, "micro_batch": 1}, DENSE_START + 3),
    "SIGINT": ({"kind": "signal", "signal": "SIGINT", "iter_num": 9, "micro_batch": 1}, 10),
    "SIGHUP": ({"kind": "signal", "signal": "SIGHUP", "iter_num": 9, "micro_batch": 1}, 10),
    "SIGUSR1": ({"kind": "signal", "signal": "SIGUSR1", "iter_num": 9, "micro_batch": 1}, 10),
    "in an evaluation": ({"kind": "signal_in_evaluation", "count": 5}, 16),
    "in the last evaluation": ({"kind": "signal_in_evaluation", "count": 9}, 32),
}
INTERVAL = SETTINGS["checkpoint_interval"]


class Bench:
    """A temporary folder with the dataset, the runs' settings, and an undisturbed run for each number of ranks.

    run, resume: harness.launch or run_here, for runs with and without a fault.
    """

    def __init__(self, folder, run=launch, resume=launch):
        self.folder, self.run, self.resume = Path(folder), run, resume
        self.settings = {**SETTINGS, "dataset": make_dataset(self.folder / "data")}
        self._references, self._numbers = {}, itertools.count(1)

    def new_folder(self) -> Path:
        return self.folder / f"run{next(self._numbers)}"

    def reference(self, ranks: int):
        """(final checkpoint, metrics) of an undisturbed run."""
        if ranks not in self._references:
            out = self.new_folder()
            done = self.resume(out, self.settings, ranks=ranks)
            if done.returncode:
                raise RuntimeError(f"the undisturbed run failed: {done.stderr}")
            self._references[ranks] = read_state(out), read_rows(out)
        return self._references[ranks]

    def resume_and_compare(self, out: Path, ranks: int) -> dict:
        """Resume after a fault, and describe what was saved, what was lost, and what differs at the end."""
        saved, steps_done = saved_iteration(out), rows_written(out)
        leftovers = (out / (checkpoint.NAME + ".tmp")).exists()
        done = self.resume(out, self.settings, ranks=ranks)
        problems = [] if done.returncode == 0 else [f"resuming exited with {done.returncode}: {done.stderr}"]
        said = re.search(r"resuming .* at iteration (\d+)", done.stdout)
        resumed = int(said[1]) if said else 0
        if resumed != saved:
            problems.append(f"resumed at iteration {resumed}, but iteration {saved} was saved")
        outcome = self.compare(out, ranks, problems)
        return outcome | {"resumed_at": resumed, "steps_lost": max(0, steps_done - resumed), "in_a_save": leftovers}

    def compare(self, out: Path, ranks: int, problems: list[str]) -> dict:
        """The outcome of a finished run: what differs from the undisturbed run, if there are no other problems."""
        if not problems:
            state, rows = self.reference(ranks)
            problems = [f"differs: {path}" for path in state_differences(read_state(out), state)]
            problems += [f"metrics differ: {path}" for path in row_differences(read_rows(out), rows)]
        problems = [text.replace(str(self.folder), "").replace(f"{ROOT}/", "") for text in problems]
        return {"resumed_at": 0, "steps_lost": 0, "in_a_save": False, "problems": problems}


def saved_iteration(out: Path) -> int:
    found = checkpoint.find(out)
    return read_state(out, found.name)["iter_num"] if found else 0


def rows_written(out: Path) -> int:
    """Number of complete lines in metrics.jsonl, one per step."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _case(kind: str, at: str, ranks: int, outcome: dict, *checks) -> dict:
    """A row of the report. checks: (condition, message if it does not hold)."""
    outcome["problems"] += [text for holds, text in checks if not holds]
    return {"kind": kind, "at": at, "ranks": ranks, **outcome}


def stop_case(bench: Bench, at: str, ranks: int) -> dict:
    """A signal at a key of STOP_POINTS: the step is finished and saved, and the command to continue is printed."""
    fault, saved = STOP_POINTS[at]
    out, fault = bench.new_folder(), {"signal": "SIGTERM", **fault}
    done = bench.run(out, bench.settings, fault, ranks)
    outcome = bench.resume_and_compare(out, ranks)
    status = 128 + getattr(signal, fault["signal"]) if ranks == 1 else 1  # torchrun has a status of its own
    return _case(
        *("stop", at, ranks, outcome),
        (done.returncode == status, f"exit status {done.returncode}, need {status}: {done.stderr}"),
        ("run the same command again" in done.stdout, "the command to continue was not printed"),
        (outcome["resumed_at"] == saved, f"resumed at {outcome['resumed_at']}, need {saved}"),
        (outcome["steps_lost"] == 0, f"{outcome['steps_lost']} steps lost"),
    )


def _start_and_wait(bench: Bench, out: Path, rows: int, delay: float = 0.0, ranks: int = 1, stale: float = 0.0):
    """Start a run, and return its process `delay` seconds after it wrote `rows` lines of metrics.

    stale: the time of the config.json of an earlier start; a start rewrites it before it changes metrics.jsonl.
    """
    process, deadline = start(out, bench.settings, ranks=ranks), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if rows_written(out) >= rows and modified(out / "config.json") > stale:
            break
        time.sleep(0.0005)
    time.sleep(delay)
    return process


def modified(path: Path) -> int:
    """Time of the last write in nanoseconds; 0 if there is no file."""
    return path.stat().st_mtime_ns if path.exists() else 0


def stop_torchrun_case(bench: Bench) -> dict:
    """SIGTERM to torchrun, as from a scheduler: torchrun passes it on, and the ranks stop."""
    out = bench.new_folder()
    process = _start_and_wait(bench, out, 3, ranks=2)
    process.terminate()
    finish(process)
    outcome = bench.resume_and_compare(out, ranks=2)
    return _case(
        *("torchrun", "SIGTERM to torchrun", 2, outcome),
        (outcome["steps_lost"] == 0, "it did not save before it ended"),
    )


def kill_rank_case(bench: Bench) -> dict:
    """kill -9 of one of two ranks: torchrun ends the other one, and the run continues from the last save."""
    out = bench.new_folder()
    done = bench.run(out, bench.settings, {"kind": "signal", "signal": "SIGKILL", "iter_num": 14, "micro_batch": 1}, 2)
    outcome = bench.resume_and_compare(out, ranks=2)
    return _case(
        *("torchrun", "kill -9 of rank 1", 2, outcome),
        (done.returncode != 0, "torchrun hid the death of a rank"),
        (outcome["resumed_at"] == 12, f"resumed at {outcome['resumed_at']}, need 12"),
    )


def stop_rank_case(bench: Bench) -> dict:
    """SIGUSR1 to one of two ranks, where torchrun would restart them: both stop, and torchrun ends."""
    out = bench.new_folder()
    fault = {"kind": "signal", "signal": "SIGUSR1", "iter_num": 14, "micro_batch": 1}
    done = finish(start(out, bench.settings, fault, ranks=2, max_restarts=3))
    outcome = bench.resume_and_compare(out, ranks=2)
    return _case(
        *("torchrun", "SIGUSR1 to rank 1, restarts allowed", 2, outcome),
        (done.returncode != 0, "torchrun says that the run is finished"),
        (outcome["resumed_at"] == 15, f"resumed at {outcome['resumed_at']}, need 15"),
        (outcome["steps_lost"] == 0, f"{outcome['steps_lost']} steps lost"),
    )


def stall_case(bench: Bench) -> dict:
    """SIGSTOP to one of two ranks: the other one names it after rank_timeout, and both end."""
    out = bench.new_folder()
    fault = {"kind": "signal", "signal": "SIGSTOP", "iter_num": 14, "micro_batch": 1}
    done = finish(start(out, bench.settings | {"rank_timeout": 5}, fault, ranks=2), timeout=120)
    outcome = bench.resume_and_compare(out, ranks=2)
    return _case(
        *("torchrun", "rank 1 stalls", 2, outcome),
        (done.returncode != 0, "torchrun hid the death of a rank"),
        ("train.py: error: rank 1 " in done.stderr, f"rank 1 was not named: {done.stderr}"),
        (outcome["resumed_at"] == 12, f"resumed at {outcome['resumed_at']}, need 12"),
    )


def survive_case(bench: Bench, at: str) -> dict:
    """Something fails that training does not need: the run ends as if nothing had happened."""
    out = bench.new_folder()
    if at == "the console goes away":
        process = start(out, bench.settings)
        process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read()
        status = process.wait(300)
    elif at == "the console's disk is full":
        with open("/dev/full", "w") as full:
            process = start(out, bench.settings, stdout=full)
            stderr, status = process.communicate(timeout=300)[1], process.returncode
    else:
        done = bench.run(out, bench.settings, {"kind": "no_fsync_of_folders"})
        stderr, status = done.stderr, done.returncode
    outcome = bench.compare(out, 1, [])
    return _case("survive", at, 1, outcome, (status == 0, f"exit status {status}: {stderr}"))


SURVIVED = ("the console goes away", "the console's disk is full", "folders cannot be synced")


def other_data_case(bench: Bench, at: str) -> dict:
    """A run is stopped, its dataset changes, and the same command is refused. With the old dataset it continues."""
    out, folder = bench.new_folder(), bench.settings["dataset"]
    done = bench.run(out, bench.settings, {"kind": "signal", "signal": "SIGTERM", "iter_num": 12, "micro_batch": 2})
    path, saved = folder / OTHER_DATA[at], {path: path.read_bytes() for path in folder.iterdir()}
    run = {path.name: path.read_bytes() for path in out.iterdir()}
    if at == "other characters":
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"chars": meta["chars"].upper()}))
    else:
        path.write_bytes(saved[path] + saved[path][:20] if at == "a longer file" else saved[path][::-1][1:] + b"\0")
    refused = bench.resume(out, bench.settings)
    for name, content in saved.items():
        name.write_bytes(content)
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    outcome = bench.resume_and_compare(out, 1)
    return _case(
        *("data", at, 1, outcome),
        (done.returncode == 143, f"exit status {done.returncode}, need 143: {done.stderr}"),
        (refused.returncode != 0, "the run continued on other data"),
        (
            bool(re.fullmatch(r"train.py: error: .*dataset.*\n", refused.stderr)),
            f"need one line that names the dataset: {refused.stderr}",
        ),
        (run.keys() == left.keys() and all(run[k] == left[k] for k in run if k != "run.lock"), "the run was changed"),
    )


OTHER_DATA = {
    "other tokens": "train.bin", "other tokens for validation": "val.bin", "a longer file": "train.bin",
    "other characters": "meta.json",
}  # fmt: skip


def differing_ranks_case(bench: Bench, at: str) -> dict:
    """Two ranks that do not agree: both end with one line that names rank 1 before the first step, or at a save."""
    out, other, began = bench.new_folder(), {}, time.monotonic()
    if at in DIFFERENT:
        other = DIFFERENT[at]
    elif at == "another dataset":
        other = {"dataset": make_dataset(bench.folder / "other", sentences=271)}
    ends = start_by_hand(out, bench.settings, other, {"kind": "swap_rows", "iter_num": 14} if not other else None)
    outcome = bench.resume_and_compare(out, 2)
    need, named = (0, "rank 1 has") if other else (12, r"ranks \[0, 1\]")  # two ranks have no majority
    return _case(
        *("ranks", at, 2, outcome),
        (all(end.returncode for end in ends), f"exit statuses {[end.returncode for end in ends]}"),
        (time.monotonic() - began < 60, "the ranks waited for each other"),
        (outcome["resumed_at"] == need, f"resumed at {outcome['resumed_at']}, need {need}"),
        (bool(re.fullmatch(rf"train.py: error: .*{named}.*\n", ends[0].stderr)), f"need {named!r}: {ends[0].stderr}"),
    )


DIFFERENT = {
    "another seed": {"seed": 7}, "another learning rate": {"learning_rate": 2e-3}, "another length": {"max_iters": 40},
    "other intervals": {"eval_interval": 4},
}  # fmt: skip


def run_in_between_case(bench: Bench) -> dict:
    """While a slow start prepares, another process finishes a run in the same folder: the start leaves it alone."""
    out, theirs = bench.new_folder(), bench.new_folder()
    bench.resume(theirs, bench.settings)
    done = bench.run(out, bench.settings, {"kind": "run_in_between", "folder": str(theirs)})
    return _case(
        *("folder", "another run finished meanwhile", 1, bench.compare(out, 1, [])),
        (done.returncode == 1 and "train.py: error: " in done.stderr, f"{done.returncode}: {done.stderr}"),
    )


def damaged_metrics_case(bench: Bench, rng: random.Random) -> dict:
    """A line of garbage in metrics.jsonl costs that line alone."""
    out = bench.new_folder()
    bench.run(out, bench.settings, {"kind": "signal", "signal": "SIGTERM", "iter_num": 12, "micro_batch": 2})
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(5, rng.randbytes(40).replace(b"\n", b"") + b"\n")
    path.write_bytes(b"".join(lines))
    outcome = bench.resume_and_compare(out, 1)
    outcome["steps_lost"] = 0  # the garbage was counted as a step
    return _case("folder", "a damaged line of metrics", 1, outcome)


def damaged_checkpoint_case(bench: Bench, rng: random.Random) -> dict:
    """A damaged ckpt.pt is refused with a command that restores the checkpoint before it."""
    out = bench.new_folder()
    bench.run(out, bench.settings, {"kind": "signal", "signal": "SIGTERM", "iter_num": 14, "micro_batch": 2})
    path = out / checkpoint.NAME
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    refused = bench.resume(out, bench.settings)
    command = re.search(r"mv .*", refused.stderr)
    if command:
        subprocess.run(command[0], shell=True, check=True)
    outcome = bench.resume_and_compare(out, 1)
    return _case(
        *("folder", "a damaged checkpoint", 1, outcome),
        (refused.returncode == 1 and command is not None, f"no command was offered: {refused.stderr}"),
        (outcome["resumed_at"] == 12, f"resumed at {outcome['resumed_at']}, need 12"),
    )


def kill_case(bench: Bench, rng: random.Random) -> dict:
    """kill -9 at a random moment between the first line of metrics and the end."""
    for _ in range(10):
        rows, delay = rng.randrange(1, SETTINGS["max_iters"]), rng.uniform(0, 0.04)
        out = bench.new_folder()
        process = _start_and_wait(bench, out, rows, delay)
        process.kill()
        if finish(process).returncode == -signal.SIGKILL:  # otherwise the run ended first: draw again
            break
    else:
        raise RuntimeError("kill_case: ten runs ended before they were killed; is this machine overloaded?")
    outcome = bench.resume_and_compare(out, ranks=1)
    lost, limit = outcome["steps_lost"], INTERVAL * (2 if outcome["in_a_save"] else 1)  # the save before it counts
    return _case(
        *("kill", f"step {rows} + {1000 * delay:.0f} ms", 1, outcome),
        (lost <= limit, f"{lost} steps lost, need at most {limit} with a save every {INTERVAL}"),
    )


def save_case(bench: Bench, at: str) -> dict:
    """kill -9 at a key of SAVE_POINTS, in the third save, of iteration 12. The save before it is of iteration 8."""
    need = 12 if SAVE_POINTS[at][0] else 8
    out = bench.new_folder()
    done = bench.run(out, bench.settings, {"kind": "kill_in_save", "point": at, "count": 3})
    outcome = bench.resume_and_compare(out, ranks=1)
    return _case(
        *("save", at, 1, outcome),
        (done.returncode == -signal.SIGKILL, f"the run was not killed: exit status {done.returncode} {done.stderr}"),
        (outcome["resumed_at"] == need, f"resumed at {outcome['resumed_at']}, need {need}"),
    )


def kills_in_a_row_case(bench: Bench, rng: random.Random, kills: int, ranks: int) -> dict:
    """One run that is killed `kills` times and then finished."""
    long = Bench(bench.folder / f"row{ranks}", bench.run, bench.resume)
    length = max(100, 10 * kills)  # a life goes on by about 4 steps, so the last one has many left
    long.settings |= {"max_iters": length, "lr_decay_iters": length, "parallel": "fsdp" if ranks > 1 else "ddp"}
    out, struck, lost, in_saves, lives, problems = long.new_folder(), 0, 0, 0, 0, []
    while struck < kills:
        lives += 1
        if lives > 3 * kills:
            raise RuntimeError(f"kills_in_a_row_case: {lives} lives for {struck} kills; is this machine overloaded?")
        (out / (checkpoint.NAME + ".tmp")).unlink(missing_ok=True)  # of an earlier life
        rows, killed = saved_iteration(out) + rng.randrange(1, 12), True
        if lives % 3 == 0:
            fault = {"kind": "kill_in_save", "point": rng.choice([*SAVE_POINTS]), "count": rng.randrange(1, 3)}
            done = long.run(out, long.settings, fault, ranks)
        else:
            process = _start_and_wait(long, out, rows, rng.uniform(0, 0.04), ranks, modified(out / "config.json"))
            try:
                os.kill(rng.choice(children_of(process) if ranks > 1 else [process.pid]), signal.SIGKILL)
            except (ProcessLookupError, IndexError):  # the run ended first
                killed = False
            done = finish(process)
        foreign = "train.py: error" in done.stdout + done.stderr
        if foreign or (done.returncode and not killed) or (ranks == 1 and done.returncode not in (0, -signal.SIGKILL)):
            problems.append(f"life {lives} ended with {done.returncode}: {done.stderr}")
        struck += done.returncode != 0
        in_saves += (out / (checkpoint.NAME + ".tmp")).exists()
        lost += max(0, rows_written(out) - saved_iteration(out))
        if done.returncode == 0:
            break  # the run ended before the kill
    outcome = long.resume_and_compare(out, ranks)
    outcome["steps_lost"] = lost
    outcome["problems"] += problems + ([] if struck == kills else [f"killed {struck} times, need {kills}"])
    return _case("in a row", f"{kills} kills, {in_saves} of them in a save", ranks, outcome)


def flip_case(bench: Bench, rng: random.Random, flips: int) -> dict:
    """One flipped bit at a time, in a random byte of a checkpoint."""
    out = bench.new_folder()
    done = bench.run(out, {**bench.settings, "max_iters": 12, "dense_start": 12})
    path, state, wrong, refused = out / checkpoint.NAME, read_state(out), [], 0
    for _ in range(flips):
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        _flip(path, place, bit)
        try:
            if differences(read_state(out), state):
                wrong.append(f"byte {place}, bit {bit}: loaded as another state")
        except checkpoint.CheckpointError:
            refused += 1
        _flip(path, place, bit)
    outcome = {"resumed_at": 12, "steps_lost": 0, "in_a_save": False, "problems": wrong}
    return _case(
        *("flip", f"{flips} bits, {refused} refused, {flips - refused} harmless", 1, outcome),
        (done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"),
        (refused > 0, "no flip was refused"),
        (differences(read_state(out), state) == [], "the flips were not reverted"),
    )


def _flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def _agent(out: Path, settings: dict, port: int, hosts: bool, log: Path) -> subprocess.Popen:
    """A node: torchrun with one rank, which prints to `log`. hosts: whether it hosts the rendezvous."""
    meet = {"rdzv_backend": "c10d", "rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_id": "nano24", "nnodes": "1:2"}
    meet |= {"nproc_per_node": 1, "max_restarts": 9, "local_addr": "127.0.0.1"}
    meet |= {"rdzv_conf": f"last_call_timeout=2,is_host={hosts}"}
    script = ["tests/harness.py", json.dumps({"kind": "double"}), *to_words(out, settings)]
    command = [sys.executable, "-m", "torch.distributed.run", *(f"--{key}={meet[key]}" for key in meet), *script]
    # without this variable, an agent of torch 2.13 waits for a key that the returning agent does not write
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "w") as file:  # an unread pipe would fill up
        output = {"stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **output)


def nodes_case(bench: Bench) -> dict:
    """One of two nodes is lost, comes back and gets SIGTERM. The other one continues alone both times."""
    settings = bench.settings | {"mvue": False, "dropout": 0.0, "log_interval": 1, "eval_interval": 0}
    settings |= dict.fromkeys(("max_iters", "lr_decay_iters", "dense_start"), 10**6)
    out, alone, port = bench.new_folder(), bench.new_folder(), free_port()

    def wait_for(world_size: int, steps: int) -> None:
        """Wait until a run on `world_size` ranks has begun and done `steps` steps."""
        deadline, first = time.monotonic() + 120, None
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # the file is being written
                ranks = json.loads((out / "config.json").read_text())["environment"]["world_size"]
                if ranks == world_size:
                    first = rows_written(out) if first is None else first
                    if rows_written(out) >= first + steps:
                        return
            time.sleep(0.01)
        for process in agents:
            kill_with_ranks(process)
        raise RuntimeError(f"nodes_case: no run on {world_size} ranks began: {[log.read_text() for log in logs]}")

    logs = [bench.folder / f"agent{k}" for k in range(3)]
    agents = [_agent(out, settings, port, k == 0, logs[k]) for k in range(2)]
    wait_for(2, 30)
    kill_with_ranks(agents[1])
    agents[1].wait()
    at_loss = rows_written(out)
    wait_for(1, 20)
    agents[1] = _agent(out, settings, port, False, logs[2])
    wait_for(2, 30)
    agents[1].terminate()
    finish(agents[1])
    wait_for(1, 20)
    agents[0].terminate()
    finish(agents[0])
    texts = [log.read_text() for log in logs]
    state = read_state(out)
    steps = state["iter_num"]
    done = bench.run(alone, {**settings, "max_iters": steps}, {"kind": "double"})
    other = read_state(alone)["model"]
    problems = [
        f"differs: {name}"
        for name, tensor in state["model"].items()
        if torch.is_tensor(tensor) and not torch.allclose(tensor.double(), other[name].double(), rtol=0, atol=1e-6)
    ]
    resumed = [int(text) for text in re.findall(r"resuming .* at iteration (\d+); (?:1|2) x", "".join(texts))]
    lost = max(0, at_loss - min(resumed, default=0))
    outcome = {"resumed_at": max(resumed, default=0), "steps_lost": lost, "in_a_save": False, "problems": problems}
    return _case(
        *("nodes", f"one of two lost at step {at_loss}, back, preempted, {steps} steps", 2, outcome),
        (done.returncode == 0, f"the run on one process failed: {done.stderr}"),
        (len(resumed) == 3, f"resumed {len(resumed)} times, need 3: {texts}"),
        (lost <= INTERVAL, f"{lost} steps lost, with a save every {INTERVAL}"),
        (len(read_rows(out)) == steps, f"{len(read_rows(out))} rows of {steps} steps"),
    )


def summary(cases: list[dict]) -> dict:
    """{kind: numbers of cases and of failed cases, steps lost}."""
    kinds = {}
    for kind in dict.fromkeys(case["kind"] for case in cases):
        chosen = [case for case in cases if case["kind"] == kind]
        lost = [case["steps_lost"] for case in chosen]
        kinds[kind] = {
            "cases": len(chosen),
            "failed": sum(bool(case["problems"]) for case in chosen),
            "steps_lost_max": max(lost),
            "steps_lost_median": statistics.median(lost),
            "in_a_save": sum(case["in_a_save"] for case in chosen),
        }
    return kinds


def show(case: dict) -> None:
    verdict = "same bits" if not case["problems"] else "FAILED: " + "; ".join(case["problems"][:3])
    where = f"{case['kind']:<9}{case['ranks']} rank{'s' * (case['ranks'] > 1):<2} {case['at']:<50}"
    print(f"{where} resumed at {case['resumed_at']:>2}, lost {case['steps_lost']}  {verdict}", flush=True)


def all_cases(bench: Bench, kills: int, in_a_row: int, flips: int, seed: int) -> list[tuple[str, Callable]]:
    """(kind, call that runs the case and returns its row of the report) of all cases."""
    rng = random.Random(seed)
    # on two ranks the evaluations have one batch, which is finished
    cases = [("stop", stop_case, at, n) for n in (1, 2) for at in STOP_POINTS if n == 1 or "evaluation" not in at]
    cases += [("torchrun", case) for case in (stop_torchrun_case, kill_rank_case, stop_rank_case, stall_case)]
    cases += [("survive", survive_case, at) for at in SURVIVED]
    cases += [("data", other_data_case, at) for at in OTHER_DATA]
    cases += [("ranks", differing_ranks_case, at) for at in (*DIFFERENT, "another dataset", "two rows swapped")]
    cases += [("folder", run_in_between_case)]
    cases += [("folder", case, rng) for case in (damaged_metrics_case, damaged_checkpoint_case)]
    cases += [("kill", kill_case, rng)] * kills
    cases += [("save", save_case, at) for at in SAVE_POINTS]
    cases += [("flip", flip_case, rng, flips), ("nodes", nodes_case)]
    cases += [("in a row", kills_in_a_row_case, rng, in_a_row, ranks) for ranks in (1, 2)]
    return [(kind, functools.partial(case, bench, *arguments)) for kind, case, *arguments in cases]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kill -9 at this many random moments")
    parser.add_argument("--in_a_row", type=int, default=100, help="kill one run this many times, on one and two ranks")
    parser.add_argument("--flips", type=int, default=200, help="flip this many bits of a checkpoint, one at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--only", help="only the cases of this kind, such as 'in a row'")
    parser.add_argument("--out", type=Path, help="file for the report, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in the runs
    began, cases = time.time(), []
    with tempfile.TemporaryDirectory(prefix="nano24_faults_") as folder:
        bench = Bench(folder)
        for kind, run_case in all_cases(bench, options.kills, options.in_a_row, options.flips, options.seed):
            if options.only not in (None, kind):
                continue
            cases.append(run_case())
            show(cases[-1])
            if options.out:
                write(options, cases, time.time() - began)
            for path in (*bench.folder.glob("run*"), *bench.folder.glob("row*")):
                shutil.rmtree(path)
    if not cases:
        parser.error(f"--only {options.only}: there is no such kind of case")
    failed = sum(bool(case["problems"]) for case in cases)
    print(f"{len(cases)} cases, {failed} failed" + (f", {options.out}" if options.out else ""))
    return 1 if failed else 0


@functools.cache  # asked before the first report is written, which makes the working tree dirty
def machine() -> dict:
    return {**environment(torch.device("cpu"), 1), "platform": sys.platform, "cpus": os.cpu_count()}


def write(options, cases: list[dict], seconds: float) -> None:
    """Write the report of the cases so far."""
    report = {
        "command": "python tests/faults.py "
        f"--kills {options.kills} --in_a_row {options.in_a_row} --flips {options.flips} --seed {options.seed}"
        + (f" --only '{options.only}'" if options.only else ""),
        "environment": machine(),
        "settings": SETTINGS,
        "seconds": round(seconds),
        "failed": sum(bool(case["problems"]) for case in cases),
        "summary": summary(cases),
        "cases": cases,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, report)


if __name__ == "__main__":
    sys.exit(main())

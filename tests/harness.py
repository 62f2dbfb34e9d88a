"""Tools for tests of train.py: a tiny dataset, ways to run train.py, injected faults, comparing runs.

    launch(out, settings)               a process `python train.py`; with ranks=2 through torchrun
    launch(out, settings, fault)        the same through this file, which patches train.py and runs its main
    run_here(out, settings)             train.main() in this process, which is faster
    Crew(2).run(out, settings)          the same in two processes that are started once for many runs

A fault is a dict, passed as JSON on this file's command line. It happens at a given iteration and micro-batch, or at a
given point of a save, never after a given time.
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file also runs as a script

import numpy as np
import torch

import train
from configurator import setting_names
from methods import act24
from model import GPT
from runtime import checkpoint, ranks, setup
from sparse24 import PATTERNS_HASH, MaskedDecayAdamW

ROOT = Path(train.__file__).resolve().parent

# A run of 32 steps of 4 micro-batches: refreshes after steps 4, 9, 14, 19, 24, saves at 4, 8, ..., dense from step 27.
SETTINGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 4,
    "max_iters": 32, "lr_decay_iters": 32, "warmup_iters": 3, "learning_rate": 3e-3, "min_lr": 3e-4, "dropout": 0.1,
    "sparse": "fst", "mask_interval": 5, "masked_decay": 1e-2, "mvue": True,
    "log_interval": 1, "flip_interval": 6, "eval_interval": 8, "eval_iters": 2, "checkpoint_interval": 4,
    "device": "cpu",
}  # fmt: skip
DENSE_START = round(32 * 5 / 6)
TIMED = {"tokens_per_s", "mfu", "elapsed_s"}  # metrics that depend on the clock


def stop_at(iter_num: int, micro_batch: int = 1, signal: str = "SIGTERM") -> dict:
    """The fault of sending a signal to a rank as it begins this micro-batch."""
    return {"kind": "signal", "signal": signal, "iter_num": iter_num, "micro_batch": micro_batch}


def all_settings() -> SimpleNamespace:
    """The current settings of train.py."""
    return SimpleNamespace(**{name: vars(train)[name] for name in setting_names(vars(train))})


def make_dataset(folder: Path, sentences: int = 270) -> Path:
    """A character dataset of short sentences in random order, with nine tenths in the training split."""
    rng = random.Random(0)
    choices = ("the cat sat on the mat. ", "a dog ran far! ", "we saw six (6) birds, ")
    text = "".join(rng.choice(choices) for _ in range(sentences))
    chars = "".join(sorted(set(text)))
    ids = np.array([chars.index(char) for char in text], dtype="<u2")
    folder.mkdir(parents=True, exist_ok=True)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "char", "vocab_size": len(chars), "chars": chars}))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Running train.py


def to_words(out_dir, settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in {**settings, "out_dir": out_dir}.items()]


def status_of(fault: dict | None) -> int:
    """The exit status of a run with this fault: 0, or that of a stop."""
    return 128 + getattr(signal, fault["signal"]) if fault and fault["kind"].startswith("signal") else 0


def start(
    out_dir, settings: dict, fault: dict | None = None, ranks: int = 1, max_restarts: int = 0, place=(), **options
) -> subprocess.Popen:
    """A process that runs train.py, by torchrun if ranks > 1, with pipes for its output.

    place: what torchrun would add to the environment.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    torchrun += [f"--max_restarts={max_restarts}"] if max_restarts else []
    script = ["train.py"] if fault is None else ["tests/harness.py", json.dumps(fault)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **dict(place)}
    command = [sys.executable, *torchrun, *script, *to_words(out_dir, settings)]
    hang_up = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # nohup would leave it ignored
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": hang_up, **options}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **options)


def children_of(process: subprocess.Popen) -> list[int]:
    """The ids of a process's children, such as torchrun's ranks, which have their own sessions."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            if int(status.read_text().rpartition(")")[2].split()[1]) == process.pid:
                children.append(int(status.parent.name))
    return sorted(children)


def kill_with_ranks(process: subprocess.Popen) -> None:
    for victim in (process.pid, *children_of(process)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def finish(process: subprocess.Popen, timeout: float = 900) -> subprocess.CompletedProcess:
    """Wait for a started run. After `timeout` seconds, kill it with all its ranks and raise TimeoutExpired."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_with_ranks(process)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def launch(out_dir, settings: dict, fault: dict | None = None, ranks: int = 1) -> subprocess.CompletedProcess:
    return finish(start(out_dir, settings, fault, ranks))


def strike(data, out, number, victim, rows=3, max_restarts=2, **changes):
    """The end of a run by torchrun after a signal to one of its two ranks, when `rows` lines of metrics are there."""
    settings = {**SETTINGS, "max_iters": 10**6, "lr_decay_iters": 10**6, "dense_start": 10**6, "eval_interval": 0}
    process = start(out, {**settings, "dataset": data, **changes}, ranks=2, max_restarts=max_restarts)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (rows <= rows_written(out)):
        time.sleep(0.05)
    os.kill(children_of(process)[victim], number)
    return finish(process)


def rows_written(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else -1


def start_by_hand(out_dir, settings: dict, other: dict, fault: dict | None = None) -> list[subprocess.CompletedProcess]:
    """Run train.py on two ranks without torchrun. other: settings in which rank 1 differs from rank 0."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start(out_dir, settings | changes, fault, place=place | {"RANK": str(k), "LOCAL_RANK": str(k)})
        for k, changes in enumerate(({}, other))
    ]
    return [finish(process, timeout=120) for process in ranks]


@contextlib.contextmanager
def pristine_train():
    """Restore what train.main() changes in its process: globals, signal handlers, torch's global state."""
    before, argv = dict(vars(train)), sys.argv
    handlers = {number: signal.getsignal(number) for number in ranks.StopSignal.NUMBERS}
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would leave it ignored
    try:
        with torch.random.fork_rng(devices=[]):
            yield train
    finally:
        vars(train).clear()
        vars(train).update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
        sys.argv = argv


def run_here(out_dir, settings: dict, fault: dict | None = None, ranks: int = 1, first: tuple[str, ...] = ()):
    """train.main() in this process, about 2 s faster than `launch`. It raises what train.py does not catch.

    first: arguments before the settings, such as a config file.
    """
    assert ranks == 1, "use launch"
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with pristine_train(), contextlib.ExitStack() as undo:
        if fault is not None:
            install(fault, undo)
        sys.argv = ["train.py", *first, *to_words(out_dir, settings)]
        undo.enter_context(contextlib.redirect_stdout(stdout))
        undo.enter_context(contextlib.redirect_stderr(stderr))
        try:
            train.main()
        except SystemExit as end:  # as in Python, a string goes to stderr and gives status 1
            status = end.code if isinstance(end.code, int) else 1
            stderr.write("" if isinstance(end.code, int) else f"{end.code}\n")
    return subprocess.CompletedProcess(sys.argv, status, stdout.getvalue(), stderr.getvalue())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Crew:
    """`ranks` processes that do one run after the other, so that a run does not wait for Python to start."""

    def __init__(self, ranks: int):
        self.ranks, self.pool = ranks, torch.multiprocessing.get_context("spawn").Pool(ranks)

    def run(self, out_dir, settings: dict, fault: dict | None = None) -> subprocess.CompletedProcess:
        """Like run_here. Returns rank 0's result, or the first error, which ends the crew."""
        common = (self.ranks, free_port(), out_dir, settings, fault)
        results = self.pool.imap_unordered(_run_as_rank, [(rank, *common) for rank in range(self.ranks)])
        done = {}
        for _ in range(self.ranks):
            rank, done[rank] = results.next(timeout=300)
            if done[rank].returncode not in (0, status_of(fault)):
                self.pool.terminate()
                return done[rank]
        return done[0]

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.pool.terminate()


def _run_as_rank(arguments: tuple):
    rank, world_size, port, *run = arguments
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()}
    torch.set_num_threads(1)
    return rank, run_here(*run)


# ---------------------------------------------------------------------------------------------------------------------
# Faults: each `_fault(undo, **arguments)` patches train.py's modules, until the ExitStack `undo` is closed.


def _wrap(undo: contextlib.ExitStack, module, name: str, wrapper):
    """Until `undo` is closed, module.name(...) calls wrapper(original function, ...)."""
    real = getattr(module, name)
    undo.callback(setattr, module, name, real)
    setattr(module, name, lambda *args, **options: wrapper(real, *args, **options))


def _strike(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def _place() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _at_micro_batches(undo, act) -> None:
    """Call act(model, iter_num, micro_batch) at the start of each micro-batch."""

    def wrapper(seed_draws, model, seed, i, m):
        act(model, i, m)
        seed_draws(model, seed, i, m)

    _wrap(undo, train, "seed_draws", wrapper)


def _signal(undo, signal: str, iter_num: int, micro_batch: int) -> None:
    """Send the signal to the rank that is about to begin this micro-batch (numbered over all ranks)."""
    _at_micro_batches(undo, lambda model, i, m: _strike(signal) if (i, m) == (iter_num, micro_batch) else None)


def _signal_at_refresh(undo, signal: str, count: int) -> None:
    """Send the signal to the last rank as it begins its `count`-th refresh of the masks."""
    calls = itertools.count(1)
    rank, world_size = _place()

    def wrapper(refresh_masks, *args, **options):
        if next(calls) == count and rank == world_size - 1:
            _strike(signal)
        return refresh_masks(*args, **options)

    _wrap(undo, train, "refresh_masks", wrapper)


def _signal_in_evaluation(undo, signal: str, count: int) -> None:
    """Send the signal to the last rank as it begins its `count`-th batch of an evaluation."""
    calls = itertools.count(1)
    rank, world_size = _place()

    def wrapper(forward, self, *args, **options):
        if not self.training and next(calls) == count and rank == world_size - 1:
            _strike(signal)
        return forward(self, *args, **options)

    _wrap(undo, GPT, "forward", wrapper)


SAVE_POINTS = {  # points of a kill in a save: (is the new checkpoint valid, hard links, module, function, when, target)
    "half of the bytes written": (False, True, torch, "save", "during", None),
    "written, before fsync": (False, True, os, "fsync", "before", None),
    "synced, before the old one is linked": (False, True, os, "link", "before", None),
    "old one linked, before that becomes ckpt_prev.pt": (False, True, os, "link", "after", None),
    "ckpt_prev.pt replaced": (False, True, os, "replace", "after", checkpoint.PREVIOUS),
    "before the new one becomes ckpt.pt": (False, True, os, "replace", "before", checkpoint.NAME),
    "the new one is ckpt.pt": (True, True, os, "replace", "after", checkpoint.NAME),
    "no hard links: between the two renames": (False, False, os, "replace", "before", checkpoint.NAME),
    "no hard links: the new one is ckpt.pt": (True, False, os, "replace", "after", checkpoint.NAME),
}


def _kill_in_save(undo, point: str, count: int) -> None:
    """kill -9 at `point`, a key of SAVE_POINTS, in the `count`-th save of ckpt.pt."""
    _, links, module, name, when, target = SAVE_POINTS[point]
    calls = itertools.count(1)

    def deadly(real, *args):
        here = target is None or Path(args[1]).name == target
        if here and when == "during":
            buffer = io.BytesIO()
            real(args[0], buffer)
            args[1].write(buffer.getvalue()[: buffer.tell() // 2])
            args[1].flush()
        if here and when != "after":
            _strike("SIGKILL")
        real(*args)
        if here:
            _strike("SIGKILL")

    def refuse(*_):
        raise OSError("no hard links here")

    def wrapper(save, folder, state, file=checkpoint.NAME, **keep):
        if file == checkpoint.NAME and next(calls) == count:
            if not links:
                _wrap(undo, os, "link", refuse)
            _wrap(undo, module, name, deadly)
        return save(folder, state, file, **keep)

    _wrap(undo, checkpoint, "save", wrapper)


def _dump(undo, folder: str) -> None:
    """On each rank, save the gradients of the first optimizer step, and the model at each save."""
    rank, _ = _place()

    def step_wrapper(step, self, closure=None):
        path = Path(folder) / f"grads_{rank}.pt"
        if not path.exists():
            torch.save([p.grad.clone() for group in self.param_groups for p in group["params"]], path)
        return step(self, closure)

    def check_wrapper(check_equal, self, model):
        torch.save(model.state_dict(), Path(folder) / f"model_{rank}.pt")
        check_equal(self, model)

    _wrap(undo, MaskedDecayAdamW, "step", step_wrapper)
    _wrap(undo, ranks.Ranks, "check_equal", check_wrapper)


def _alter(undo, iter_num: int) -> None:
    """Change a high bit of one weight of the last rank before its first micro-batch of a step.

    A low bit would not do: ranks add the same updates, so rounding makes the two weights equal again.
    """
    rank, world_size = _place()

    @torch.no_grad()
    def act(model, i, m):
        if (i, m) == (iter_num, rank) and rank == world_size - 1:
            model.transformer.h[1].mlp.c_proj.weight.view(torch.int32)[0, 0] ^= 1 << 20

    _at_micro_batches(undo, act)


def _swap_rows(undo, iter_num: int) -> None:
    """Swap two rows of a weight of the last rank before its first micro-batch of a step."""
    rank, world_size = _place()

    @torch.no_grad()
    def act(model, i, m):
        if (i, m) == (iter_num, rank) and rank == world_size - 1:
            w = model.transformer.h[1].mlp.c_proj.weight
            w[:2] = w[:2].flip(0).clone()

    _at_micro_batches(undo, act)


def _no_fsync_of_folders(undo) -> None:
    """A file system that can sync files but not folders, such as CIFS or vboxsf."""

    def wrapper(fsync, number):
        if Path(f"/proc/self/fd/{number}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    _wrap(undo, os, "fsync", wrapper)


def _run_in_between(undo, folder: str) -> None:
    """Another process finishes a run in out_dir after this one has looked there for a checkpoint. folder: its files."""

    def wrapper(place_model, s, *args):
        shutil.copytree(folder, s.out_dir, dirs_exist_ok=True)
        return place_model(s, *args)

    _wrap(undo, setup, "place_model", wrapper)


def _double(undo) -> None:
    """Train in float64."""
    torch.set_default_dtype(torch.float64)
    undo.callback(torch.set_default_dtype, torch.float32)


def _decide_often(undo) -> None:
    """Train in float64. act24 counts every 4 steps, and its layers join and leave at a share of 0.4."""
    _double(undo)
    for name, value in (("INTERVAL", 4), ("JOIN", 0.4), ("LEAVE", 0.4)):
        undo.callback(setattr, act24, name, getattr(act24, name))
        setattr(act24, name, value)


def _nan(undo, iter_nums: list[int]) -> None:
    """The loss of the last rank's first micro-batch in these steps is NaN."""
    rank, world_size = _place()
    strike = False

    def act(model, i, m):
        nonlocal strike
        strike = i in iter_nums and m == rank == world_size - 1

    def wrapper(forward, self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        return logits, loss * float("nan") if strike and self.training else loss

    _at_micro_batches(undo, act)
    _wrap(undo, GPT, "forward", wrapper)


def install(fault: dict, undo: contextlib.ExitStack) -> None:
    """fault: {"kind": the name of a function above without its underscore, **its arguments}."""
    functions = (_signal, _signal_at_refresh, _signal_in_evaluation, _kill_in_save, _dump, _alter, _swap_rows)
    functions += (_no_fsync_of_folders, _run_in_between, _double, _decide_often, _nan)
    kinds = {function.__name__[1:]: function for function in functions}
    kinds[fault["kind"]](undo, **{name: value for name, value in fault.items() if name != "kind"})


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs


def read_state(out_dir, name: str = checkpoint.NAME) -> dict:
    return checkpoint.load(Path(out_dir) / name, PATTERNS_HASH)


def read_rows(out_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def leaves(value, path: str = "") -> dict:
    """{path: leaf} of nested dicts, lists and tuples, with tensors as (dtype, shape, bytes)."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in leaves(value[key], f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}/{i}").items()}
    if torch.is_tensor(value):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {path: (value.dtype, tuple(value.shape), bits)}
    return {path: repr(value)}


def differences(one, other) -> list[str]:
    """The paths at which two nested values differ in any bit, or that only one of them has."""
    one, other = leaves(one), leaves(other)
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def state_differences(one: dict, other: dict) -> list[str]:
    """`differences` of two checkpoints, without the settings, times and starts."""
    ignored = ("config", "elapsed_s", "starts")
    return differences(*({key: state[key] for key in state if key not in ignored} for state in (one, other)))


def row_differences(one: list[dict], other: list[dict]) -> list[str]:
    """`differences` of two metrics files, without the columns that depend on the clock."""
    return differences(*([{k: v for k, v in row.items() if k not in TIMED} for row in rows] for rows in (one, other)))


def run_differences(one: Path, other: Path) -> list[str]:
    """`differences` of the last checkpoints and the metrics in two runs' folders."""
    states = state_differences(read_state(one), read_state(other))
    return states + row_differences(read_rows(one), read_rows(other))


@contextlib.contextmanager
def photographs(folder: Path, album: Path):
    """Copy `folder` into the new folder `album` before and after every file operation of this process.

    The copies are what a kill at these points would leave.
    """
    album.mkdir()
    copying = False

    def take():
        nonlocal copying
        copying = True
        shutil.copytree(folder, album / f"{len(list(album.iterdir())):03d}")
        copying = False

    def wrapper(real, *args, **options):
        if copying:
            return real(*args, **options)
        take()
        try:
            return real(*args, **options)
        finally:
            take()

    with contextlib.ExitStack() as undo:
        for name in ("link", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            _wrap(undo, os, name, wrapper)
        yield


def contents(folder: Path) -> dict | None:
    """{file name: bytes} of a folder; None if it does not exist."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    with contextlib.ExitStack() as never_undone:
        install(json.loads(sys.argv[1]), never_undone)
        del sys.argv[1]
        train.main()

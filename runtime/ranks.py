"""The ranks of a run, the watch over them, the lock on its folder, the signals that stop it, and its machine."""

import contextlib
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

import sparse24
from sparse24 import kernel_status, sparse_linears


class RanksDiffer(RuntimeError):
    """Ranks that must hold the same numbers do not."""


@dataclass
class Ranks:
    """This process among the processes of the run.

    control: a gloo group for everything but gradients. It never waits for a GPU, and `leave` can destroy it while DDP
    still holds the default group.
    count, place, moved: how often this rank went on, the last place, and the time. Watchdog compares the ranks by them.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: object = None
    count: int = 0
    place: str = "the start"
    moved: float = 0.0

    @property
    def master(self) -> bool:
        return self.rank == 0

    def go_on(self, place: str | None = None) -> None:
        """Call it before every point at which ranks wait for each other."""
        self.count, self.place, self.moved = self.count + 1, place or self.place, time.monotonic()

    def maximum(self, value: int) -> int:
        """The largest `value` over all ranks."""
        self.go_on()
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        self.go_on()
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def decide(self, value):
        """Rank 0's `value`, on every rank."""
        self.go_on()
        objects = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(objects, src=0, group=self.control)
        return objects[0]

    def leave(self) -> None:
        """Wait for the other ranks and leave the process group.

        Dropping the last reference to the control group joins its gloo threads. A thread that freed a Python tensor
        while the interpreter shuts down would abort the process ("terminate called without an active exception").
        """
        self.go_on("the end")
        if self.control is not None:
            dist.barrier(group=self.control)
            self.control = None
            dist.destroy_process_group()

    def check_equal(self, model: torch.nn.Module) -> None:
        """Raise RanksDiffer unless all holders of a shard have the same weights, and all ranks the same masks.

        Compares the sums of their bits, and names the ranks that are in the minority.
        """
        self.go_on()
        if self.world_size == 1:
            return
        this_rank = torch.tensor([sparse24.piece(next(model.parameters())), *fingerprint(model)])
        all_ranks = [torch.zeros_like(this_rank) for _ in range(self.world_size)]
        dist.all_gather(all_ranks, this_rank, group=self.control)
        shards, weights, masks = zip(*(row.tolist() for row in all_ranks), strict=True)
        wrong = {*outvoted([*zip(shards, weights, strict=True)]), *outvoted([(0, m) for m in masks])}
        if wrong:
            raise RanksDiffer(
                f"weights or masks of ranks {sorted(wrong)} differ from the others', or from each other's; resume from "
                "the last checkpoint"
            )


def fingerprint(model: torch.nn.Module) -> tuple[int, int]:
    """(sum of the bits of this rank's weights, sum of the bits of the sparse layers' buffers). Waits for the GPU.

    Non-persistent buffers are left out: `seed` differs between ranks, and packed operands are copies of the weights.
    """
    weights = _sum_of_bits([sparse24.local(p.detach()) for p in model.parameters()])
    buffers = []
    for layer in sparse_linears(model):
        # Every permutation has the same sum, but Bi-Mask's index_t depends on the permutation.
        buffers += [b for name, b in layer.named_buffers() if name not in layer._non_persistent_buffers_set]
    return weights, _sum_of_bits(buffers)


def _sum_of_bits(tensors: list[torch.Tensor]) -> int:
    """The sum of the tensors' bits, read as integers. The sum wraps around."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.view(integers[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return int(torch.stack(sums).sum()) if sums else 0


def outvoted(sums: list[tuple[int, int]]) -> list[int]:
    """The ranks whose sum is not the most common one of their shard; all holders of a shard if there is a tie.

    sums: (number of the shard, sum of its bits) for each rank.
    """
    majority = {}
    for shard in {shard for shard, _ in sums}:
        (first, count), *others = Counter(pair for pair in sums if pair[0] == shard).most_common(2)
        majority[shard] = first if not others or others[0][1] < count else None
    return [rank for rank, pair in enumerate(sums) if pair != majority[pair[0]]]


def start_ranks(device_name: str, rank_timeout: int = 600) -> Ranks:
    """Join torchrun's process group, with nccl on GPUs and gloo on CPUs. Without torchrun the world has one rank."""
    if int(os.environ.get("RANK", -1)) < 0:
        return Ranks()
    on_gpu = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"device={device_name!r}, but torch {torch.__version__} sees no CUDA GPU; use --device=cpu")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=rank_timeout + 300)  # Watchdog acts before it
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"ranks cannot connect by {backend}: {error}; start train.py with torchrun") from error
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout))


class Watchdog:
    """Ends this process if it waits for a rank that has stalled: one that is stopped, or whose file system hangs.

    One thread tells the other ranks, through torch's store, how far this rank is. The other thread asks how far they
    are, if this rank has not gone on for half of `timeout`, and again at its end. Then it judges by `stalled`.
    """

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.timeout, self.interval = ranks, timeout, min(10, timeout / 20)
        self.over, self.asked = threading.Event(), None
        ranks.go_on()
        store, works = dist.distributed_c10d._get_default_store(), (self._tell, self._watch)
        self.threads = [threading.Thread(target=work, args=(store.clone(),), daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(1)  # an answer may never come

    def _tell(self, store) -> None:
        with contextlib.suppress(dist.DistError):  # the store ends with rank 0; then every collective raises an error
            while not self.over.wait(self.interval):
                waited = time.monotonic() - self.ranks.moved
                store.set(f"rank {self.ranks.rank}", json.dumps([self.ranks.count, waited, self.ranks.place]))
                if waited > self.timeout and self.asked and time.monotonic() > self.asked + self.timeout / 2:
                    self._end([0], "its last answer")  # rank 0's process may hold the store

    def _watch(self, store) -> None:
        names, before = [f"rank {rank}" for rank in range(self.ranks.world_size)], None
        with contextlib.suppress(dist.DistError):
            while not self.over.wait(self.interval):
                waited = time.monotonic() - self.ranks.moved
                if waited < self.timeout / 2:
                    before = None
                elif before is None or waited > self.timeout:
                    self.asked = time.monotonic()
                    now = [json.loads(store.get(name)) if store.check([name]) else None for name in names]
                    self.asked = None
                    found = stalled(before, now, self.timeout) if before else []
                    if found and self.ranks.rank not in found:
                        self._end(found, (now[found[0]] or [0, 0, Ranks.place])[2])
                    before = before or now

    def _end(self, found: list[int], place: str) -> None:
        print(
            f"train.py: error: rank {', '.join(map(str, found))} did not go on from {place} for {self.timeout} s, so "
            f"rank {self.ranks.rank} stopped waiting; look for a stopped process, a hung file system or a lost network "
            "there, then run the same command again; if a step may take that long, raise rank_timeout",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        time.sleep(2 * self.interval)  # the other ranks see an error if this one ends before they have found it too
        os._exit(1)


def stalled(before: list, now: list, timeout: float) -> list[int]:
    """The ranks that told nothing between `before` and `now`, or else those that are behind the others for `timeout`.

    before, now: [count, seconds since it changed, place] of each rank; None if it has told nothing yet. A rank that is
    behind during the start, which includes the first step, may be compiling.
    """
    if silent := [rank for rank, answer in enumerate(now) if answer == before[rank]]:
        return silent
    counts = [count for count, *_ in now]
    behind = [rank for rank, count in enumerate(counts) if count == min(counts) < max(counts)]
    return [rank for rank in behind if now[rank][1] > timeout and now[rank][2] != Ranks.place]


class FolderInUse(RuntimeError):
    """Another run writes into the folder."""


def hold(folder: Path):
    """Lock `folder`/run.lock until the returned file is closed or this process ends. `sign` writes who holds the lock.

    Raises FolderInUse if another run holds it.
    """
    file = open(folder / "run.lock", "a+")  # noqa: SIM115  open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise FolderInUse(f"out_dir={folder} is in use by {holder}; stop that run, or set another out_dir") from error
    except OSError as error:  # some network file systems
        print(f"{folder} cannot be locked ({error}); make sure that no other run writes there", flush=True)
    return file


def sign(file) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()


class StopSignal:
    """Records a signal to stop, so that all ranks finish the step, save and leave. SIGUSR1 is Slurm's warning.

    A signal that was ignored when the process began stays ignored, such as SIGHUP under nohup. A second
    SIGINT ends the process at once. A second SIGTERM does not, because a scheduler that signals all processes reaches
    each rank twice: directly, and through torchrun.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, ranks: Ranks):
        self.ranks, self.parent = ranks, os.getppid()
        self.received = self.number = 0  # of the signals to this rank, and the one that all ranks have agreed on
        for number in self.NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> int:
        """The number of a signal that any rank has received, 0 before there is one. A collective."""
        self.number = self.number or self.ranks.maximum(self.received)
        return self.number

    def tell_torchrun(self) -> None:
        """End torchrun on this node, which would restart the ranks, if ranks of this node got a signal. A collective.

        If all of them got one, it came from torchrun, which ends them or restarts them because a node comes or goes.
        torchrun does not send SIGUSR1. One rank of the node does it.
        """
        rank, first = self.ranks.rank, self.ranks.rank - self.ranks.local_rank
        received = self.ranks.total([float(self.received * (r == rank)) for r in range(self.ranks.world_size)])
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
            return
        node = received[first : first + int(os.environ["LOCAL_WORLD_SIZE"])]
        by_torchrun = all(node) and signal.SIGUSR1 not in node
        if self.received and not by_torchrun and not any(received[first:rank]) and os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGTERM)


def environment(device: torch.device, world_size: int) -> dict:
    """The versions and the machine, on which a run's numbers depend besides its settings."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = None
    commit = os.environ.get("NANO24_COMMIT", commit)  # for a copy of the tree without its git history
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = {"device_name": name, "kernels": kernel_status(device), "world_size": world_size}
    software = {"commit": commit, "torch": torch.__version__, "triton": triton}
    return software | machine | {"threads": torch.get_num_threads()}

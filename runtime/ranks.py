"""The ranks of a run, the lock on its folder, the signals that stop it, and the machine it runs on."""

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
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
    """Ranks that must hold the same numbers, settings, data or code do not."""


@dataclass
class Ranks:
    """This process among the processes of the run.

    control: a gloo group for everything but gradients. It never waits for a GPU, and `leave` can destroy it while DDP
    still holds the default group.
    count: the number of calls of `go_on`. place: the last place that it was told. moved: the time of the last call.
    Watchdog compares the ranks by these three.
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
        return int(self._reduced(torch.tensor(int(value)), dist.ReduceOp.MAX))

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def _reduced(self, tensor: torch.Tensor, operation) -> torch.Tensor:
        self.go_on()
        if self.world_size > 1:
            dist.all_reduce(tensor, operation, group=self.control)
        return tensor

    def decide(self, value):
        """Rank 0's `value`, on every rank."""
        self.go_on()
        objects = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(objects, src=0, group=self.control)
        return objects[0]

    def agree(self, facts: dict | None, error: Exception | None = None) -> None:
        """Raise on all ranks if their `facts` differ or if one has an `error`. That rank raises it, others RanksDiffer.
        Call it before any other communication, in which ranks that differ may wait for each other."""
        self.go_on()
        everyone = [{"error": str(error)} if error else facts] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, everyone[self.rank], group=self.control)
        message = disagreement(everyone)
        if message:
            self.leave()
            raise error or RanksDiffer(message)

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

        Compares a hash of their bits, and names the ranks that are in the minority.
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


def disagreement(everyone: list[dict]) -> str:
    """Name the first rank that has an "error" or other facts than rank 0; "" if there is none."""
    for rank, facts in enumerate(everyone):
        if "error" in facts:
            return f"rank {rank} cannot start: {facts['error']}"
        differing = [name for name, value in everyone[0].items() if facts.get(name) != value]
        if differing:
            values = [f"{name}={facts.get(name)!r:.200} (on rank 0 {everyone[0][name]!r:.200})" for name in differing]
            return f"rank {rank} has {', '.join(values)}; start all ranks alike, with one shared out_dir"
    return ""


def source_hash() -> str:
    """A hash of the source files of a run."""
    root = Path(__file__).resolve().parents[1]
    files = [
        path for name in (".", "gemm24", "methods", "runtime") for path in sorted((root / name).glob("[a-z_]*.py"))
    ]
    files = [path for path in files if path.is_file()]  # editors make links and folders of such names
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def fingerprint(model: torch.nn.Module) -> tuple[int, int]:
    """(hash of this rank's weights, hash of the sparse layers' buffers). Waits for the GPU.

    Non-persistent buffers are left out: `seed` differs between ranks, and packed operands are copies of the weights.
    """
    weights = _hash_of_bits([sparse24.local(p.detach()) for p in model.parameters()])
    buffers = []
    for layer in sparse_linears(model):
        buffers += [b for name, b in layer.named_buffers() if name not in layer._non_persistent_buffers_set]
    return weights, _hash_of_bits(buffers)


def _hash_of_bits(tensors: list[torch.Tensor]) -> int:
    """The sum of all elements, read as integers, times random odd factors, which depend on their places. int64 wraps
    around, so any one bit changes the sum."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    factors = 2 * torch.randint(2**62, (2**20,), generator=torch.Generator().manual_seed(0)) + 1
    total = torch.tensor(0)
    for tensor in tensors:
        factors, total = factors.to(tensor.device), total.to(tensor.device)
        bits = tensor.flatten().view(integers[tensor.element_size()])
        for part in bits.split(len(factors)):
            total = 6364136223846793005 * total + (part * factors[: len(part)]).sum()  # an odd number below 2**63
    return int(total)


def outvoted(sums: list[tuple[int, int]]) -> list[int]:
    """The ranks whose sum is not the most common one of their shard; all holders of a shard if there is a tie.

    sums: (number of the shard, sum of its bits) for each rank.
    """
    counts = Counter(sums)

    def is_outvoted(shard: int, value: int) -> bool:
        return any(counts[other] >= counts[shard, value] for other in counts if other[0] == shard and other[1] != value)

    return [rank for rank, pair in enumerate(sums) if is_outvoted(*pair)]


def torchrun_rank() -> int | None:
    """The local rank that torchrun gave this process, or None. Raises ValueError if its variables do not fit."""
    texts = [os.environ.get(name, "not set") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    rank, local_rank, world_size = texts
    if world_size in ("not set", "1") and {rank, local_rank} <= {"not set", "-1"}:
        return None
    if not all(text.isdecimal() for text in texts) or max(int(rank), int(local_rank)) >= int(world_size):
        remedy = "start train.py with torchrun, or unset these variables to run alone"
        values = f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world_size}"
        raise ValueError(f"the environment has {values}, which torchrun does not set; {remedy}")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise ValueError(
            f"--max_restarts={restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment: without "
            "it torch's restarts do not reconnect reliably; export it, or use --max_restarts=0"
        )
    return int(local_rank)


def start_ranks(device_name: str, rank_timeout: int = 600) -> Ranks:
    """Join torchrun's process group, with nccl on GPUs and gloo on CPUs. Without torchrun the world has one rank."""
    if (local_rank := torchrun_rank()) is None:
        return Ranks()
    on_gpu = device_name.startswith(("cuda", "auto")) and torch.cuda.is_available()
    if on_gpu:
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"LOCAL_RANK={local_rank} needs {local_rank + 1} GPUs; use --nproc_per_node={gpus}")
        torch.cuda.set_device(local_rank)
    backend = "nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=max(1800, rank_timeout + 300))  # Watchdog acts earlier
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"ranks cannot connect by {backend}: {error}; start train.py with torchrun") from error
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout))


class FolderInUse(RuntimeError):
    """Another run writes into the folder."""


def hold(folder: Path):
    """Lock `folder`/run.lock until the returned file is closed or this process ends. `sign` writes who holds the lock.

    Raises FolderInUse if another run holds it, or if the file cannot be opened. Symbolic links are not followed.
    """
    path = folder / "run.lock"
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise FolderInUse(f"{path} cannot be opened: {error.strerror}; delete it, or set another out_dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = file.read().strip() or "another process"
        file.close()
        raise FolderInUse(f"out_dir={folder} is in use by {holder}; stop that run, or set another out_dir") from error
    except OSError as error:  # some network file systems
        print(f"{folder} cannot be locked ({error}); make sure that no other run writes there", flush=True)
    return file


def sign(file) -> None:
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)


class StopSignal:
    """Records a signal to stop, so that all ranks finish the step, save and leave. SIGUSR1 is Slurm's warning.

    SIGHUP stays ignored under nohup. A second SIGINT ends the process at once. A second SIGTERM does not, because a
    scheduler that signals all processes reaches each rank twice: directly, and through torchrun.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, ranks: Ranks):
        self.ranks, self.parent = ranks, os.getppid()
        self.received = 0  # number of the last signal to this rank; 0 = none
        self.number = 0  # number of the signal for which all ranks have agreed to stop; 0 = none
        for number in self.NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # shells ignore SIGINT after &
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
        torchrun does not send SIGUSR1. The first rank that got a signal does it.
        """
        ranks = self.ranks
        received = ranks.total([float(self.received * (rank == ranks.rank)) for rank in range(ranks.world_size)])
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
            return
        first = ranks.rank - ranks.local_rank
        node = range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))
        signaled = [rank for rank in node if received[rank]]
        by_torchrun = len(signaled) == len(node) and all(received[rank] != signal.SIGUSR1 for rank in node)
        if signaled[:1] == [ranks.rank] and not by_torchrun and os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGTERM)


def environment(device: torch.device, world_size: int) -> dict:
    """The versions and the machine, on which a run's numbers depend besides its settings."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = os.environ.get("NANO24_COMMIT")  # for a copy of the tree without its git history
    if commit is None and shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = {"device_name": name, "kernels": kernel_status(device), "world_size": world_size}
    software = {"commit": commit, "torch": str(torch.__version__), "triton": triton}
    return software | machine | {"threads": torch.get_num_threads()}

"""What surrounds a run: the ranks it is spread over, the signals that stop it, and the numbers it writes."""

import os
import platform
import signal
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from sparse24 import kernel_status, sparse_linears


@dataclass
class Ranks:
    """This process among the processes of the run. `control` is a group of our own for what is not a gradient: its
    reductions never wait for a GPU, and it can be ended while the world's, which DDP holds, cannot (see `leave`)."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: object = None

    @property
    def master(self) -> bool:
        return self.rank == 0

    def maximum(self, value: int) -> int:
        """The largest `value` over all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def decide(self, value):
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def leave(self) -> None:
        """Wait for the other ranks and leave the process group.

        A thread of gloo that lets go of a tensor of Python's after the interpreter began to shut down aborts the
        process ("terminate called without an active exception"). Only the control group is handed such tensors, and
        with the last reference to it, dropped here, its threads are joined."""
        if self.world_size > 1:
            dist.barrier(group=self.control)
            self.control = None
            dist.destroy_process_group()

    def check_equal(self, model: torch.nn.Module) -> None:
        """Raises RuntimeError unless every rank holds the same weights and masks (a sum of their bits)."""
        if self.world_size == 1:
            return
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        names = ("index", "index_t", "beta")  # an order of rows has the sum of any other, but index_t is made by it
        buffers = [getattr(layer, name, None) for layer in sparse_linears(model) for name in names]
        tensors = [p.detach() for p in model.parameters()] + [b for b in buffers if b is not None]
        mine = sum(t.view(integers[t.element_size()]).sum(dtype=torch.int64) for t in tensors).reshape(1).cpu()
        sums = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(sums, mine, group=self.control)
        wrong = [rank for rank, other in enumerate(sums) if int(other) != int(sums[0])]
        if wrong:
            raise RuntimeError(
                f"weights or masks of ranks {wrong} differ from rank 0's; resume from the last checkpoint"
            )


def start_ranks(device_name: str, backend_name: str) -> Ranks:
    """Join torchrun's process group, or be a world of one."""
    if int(os.environ.get("RANK", -1)) < 0:
        return Ranks()
    on_gpu = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"device={device_name!r}, but torch {torch.__version__} sees no CUDA GPU; use --device=cpu")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    name = ("nccl" if on_gpu else "gloo") if backend_name == "auto" else backend_name
    try:
        dist.init_process_group(name)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"backend={name!r} cannot be used: {error}; use --backend=auto") from error
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), dist.new_group(backend="gloo"))


class StopSignal:
    """SIGTERM or SIGINT asks for a stop at the end of the step. A second SIGINT is obeyed at once; a second
    SIGTERM is not, since a scheduler that signals all processes reaches a rank twice: itself, and through torchrun."""

    def __init__(self):
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def environment(device: torch.device, world_size: int) -> dict:
    """What a number of this run depends on beside its settings."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = None
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton,
        "device_name": name,
        "kernels": kernel_status(device),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
    }

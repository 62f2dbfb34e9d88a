"""Tasks of ranks for tests/runtime/test_fsdp.py. `start(world_size, folder, *tasks)` runs them on gloo ranks.

Each rank writes its result to folder/<task><world_size>/seen_<rank>.pt.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from runtime import checkpoint, setup
from runtime.checkpoint_writer import Writer
from runtime.ranks import Ranks

HASH = "hash"
SETTINGS = SimpleNamespace(weight_decay=0.01, learning_rate=0.1, beta1=0.9, beta2=0.999, device="cpu")


class Net(torch.nn.Module):
    """A tied embedding of 7 rows (uneven shards), a layer norm, an output of 1 row (empty shards), and two things that
    are not sharded: an index and an extra state."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight
        self.norm = torch.nn.LayerNorm(4)
        self.one = torch.nn.Linear(4, 1)
        self.register_buffer("index", torch.arange(6, dtype=torch.uint8))

    def forward(self, x):
        x = self.norm(self.wte(x))
        return self.head(x).square().mean() + self.one(x).mean()

    def get_extra_state(self):
        return {"sparse": True}

    def set_extra_state(self, state):
        self.loaded = state

    def configure_optimizers(self, weight_decay, learning_rate, betas, device):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay, fused=False)


def train(model, optimizer, steps):
    for _ in range(steps):
        model(torch.tensor([1, 2, 5])).backward()
        optimizer.step()
        optimizer.zero_grad()


def make(mesh, steps=2, state=None):
    """(model, optimizer) after `steps` steps from `state`, or from the start. Equal on all meshes but for rounding."""
    torch.manual_seed(0)
    model = Net()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    if state:
        setup.load_weights(model, state["model"])
    optimizer = setup.build_optimizer(SETTINGS, model, None, state)
    train(model, optimizer, steps)
    return model, optimizer


def state_of(model, optimizer):
    state = {**dict.fromkeys(sorted(checkpoint.KEYS)), "patterns_hash": HASH, "iter_num": 1200, "best_val_loss": 0.5}
    return {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def flat_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def save(folder, ranks):
    """Count the gathered tensors, and how many of them are in memory at the same time."""
    model, optimizer = make(flat_mesh())
    gathered, most, full_tensor = [], 0, DTensor.full_tensor

    def alive():
        """Gloo's thread frees a result slightly later, so this waits for up to 0.3 s."""
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline and not all(reference.expired() for reference in gathered):
            time.sleep(0.001)
        return sum(not reference.expired() for reference in gathered)

    def spy(tensor):
        nonlocal most
        most = max(most, alive() + 1)
        full = full_tensor(tensor)
        gathered.append(StorageWeakRef(full.untyped_storage()))
        return full

    writer = Writer(folder, ranks=ranks)
    with mock.patch.object(DTensor, "full_tensor", spy):
        writer.save(state_of(model, optimizer))
    seen = {"gathered": len(gathered), "most": most, "alive": alive(), "copies": len(writer.to_host.buffers)}
    with torch.no_grad():  # as training does while the thread is writing
        for parameter in model.parameters():
            parameter.to_local().add_(1)
    writer.wait()
    return seen


def resume(folder, ranks):
    """Continue, on any number of ranks, from the checkpoint of two ranks."""
    path, maps = folder.parent / "save2" / "ckpt.pt", Path("/proc/self/maps")
    state = checkpoint.load(path, HASH, mmap=True)
    mapped = [str(path) in maps.read_text()]
    model, optimizer = make(flat_mesh(), 0, state)
    del state
    mapped.append(str(path) in maps.read_text())
    shards = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2)
    after = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return {"mapped": mapped, "shards": shards, "extra": model.loaded, "index": model.index, "after": after}


def _work(rank, world_size, folder, tasks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
    ranks = Ranks(rank, rank, world_size, dist.new_group(backend="gloo"))
    for name in tasks:
        place = Path(folder) / f"{name}{world_size}"
        if ranks.master:
            place.mkdir()
        ranks.maximum(0)
        torch.save(globals()[name](place, ranks), place / f"seen_{rank}.pt")
    ranks.leave()


def start(world_size, folder, *tasks):
    arguments = (world_size, str(folder), tasks)
    torch.multiprocessing.start_processes(_work, arguments, nprocs=world_size, start_method="spawn")

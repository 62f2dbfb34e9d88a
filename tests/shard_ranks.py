"""What the ranks of tests/test_checkpoint_shards.py do. `start(world_size, folder, *tasks)` runs the tasks below, one
after the other, on so many gloo ranks; every rank leaves what it saw in folder/<task>/seen_<rank>.pt."""

import contextlib
import errno
import os
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from harness import photographs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from runtime import checkpoint
from runtime.checkpoint_writer import Writer
from runtime.ranks import Ranks

HASH = "hash"


class Net(torch.nn.Module):
    """A tied embedding of 7 rows (uneven on 2 ranks, and on 3), a layer norm, an output of 1 row (empty shards), and
    what is whole on every rank: an index and an extra state."""

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
        pass


def make(mesh, steps=2):
    """(model, optimizer) after `steps` steps; equal for all meshes up to how they are cut."""
    torch.manual_seed(0)
    model = Net()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.tensor([1, 2, 5])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model, optimizer, iter_num=1200):
    state = {**dict.fromkeys(checkpoint.KEYS), "patterns_hash": HASH, "iter_num": iter_num, "best_val_loss": 0.5}
    return {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def finish(writer):
    """As a training loop does it, which has something else to do between two polls."""
    while writer.busy:
        writer.poll()


def raised(call, *args):
    try:
        call(*args)
    except (checkpoint.CheckpointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def flat_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def save_fsdp(folder, ranks):
    """Saves of FSDP2's model in the background and at once, at one iteration twice, and of a state without DTensors."""
    model, optimizer = make(flat_mesh())
    state = state_of(model, optimizer)
    writer = Writer(folder / "background", ranks=ranks)
    writer.save(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(1)
    finish(writer)
    model, optimizer = make(flat_mesh())
    state = state_of(model, optimizer)
    at_once = Writer(folder / "at_once", background=False, ranks=ranks)
    for _ in range(2):
        at_once.save(state)
        assert not at_once.busy
    plain = Writer(folder / "plain", ranks=ranks)
    plain.save(state_of(*make(None)))
    plain.wait()
    return {"weight": model.wte.weight.to_local().detach()}


def save_hsdp(folder, ranks):
    """A mesh of 2 replicas of 1 shard: rank 1 writes nothing."""
    model, optimizer = make(init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    written, done = [], []

    def record(name):
        real = getattr(os, name)
        return mock.patch(f"os.{name}", lambda *args: (done.append(name), real(*args))[1])

    real = torch.save
    with contextlib.ExitStack() as patches:
        for name in ("fsync", "replace", "mkdir"):
            patches.enter_context(record(name))
        patches.enter_context(
            mock.patch("torch.save", lambda what, file: (written.append(sorted(what)), real(what, file)))
        )
        writer = Writer(folder, ranks=ranks)
        writer.save(state_of(model, optimizer))
        writer.wait()
    return {"written": written, "done": done}


def resume(folder, ranks):
    """What was saved on 2 ranks is read on these: as `Sharded`, each rank its own rows."""
    path = folder.parent / "save_fsdp" / "background" / "ckpt.pt"
    model, optimizer = make(flat_mesh(), steps=0)
    state = checkpoint.load(path, HASH, whole=False, ranks=ranks)
    of_sharded = {name: checkpoint.like(state["model"][name], p) for name, p in model.named_parameters()}
    whole = checkpoint.load(path, HASH)
    of_whole = {name: checkpoint.like(whole["model"][name], p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert isinstance(state["model"][name], checkpoint.Sharded)
        for made in (of_sharded[name], of_whole[name]):
            assert isinstance(made, DTensor)
            assert (made.device_mesh, made.placements) == (p.device_mesh, p.placements)
            assert (made.shape, made.stride(), made.dtype) == (p.shape, p.stride(), p.dtype)
    moments = {}
    for k, p in enumerate(model.parameters()):
        saved = state["optimizer"]["state"][k]
        moments[k] = {name: checkpoint.like(v, p) if v.shape else v for name, v in saved.items()}
    extra = {name: value for name, value in state["model"].items() if name not in of_sharded}
    extra["head.weight"] = of_sharded["wte.weight"]
    model.load_state_dict(extra | of_sharded)
    optimizer.load_state_dict({**state["optimizer"], "state": moments})
    seen = {f"sharded {name}": value.to_local() for name, value in of_sharded.items()}
    seen |= {f"whole {name}": value.to_local() for name, value in of_whole.items()}
    kept = distribute_tensor(torch.zeros(7, 4), flat_mesh(), [Replicate()])
    seen["replicated"] = checkpoint.like(state["model"]["wte.weight"], kept).to_local()
    seen["scalar"] = checkpoint.like(torch.tensor(3.0), torch.tensor(0.0))
    seen["wrong shape"] = raised(checkpoint.like, state["model"]["wte.weight"], torch.zeros(7, 5))
    columns = distribute_tensor(torch.zeros(7, 4), flat_mesh(), [Shard(1)])
    seen["columns"] = raised(checkpoint.like, state["model"]["wte.weight"], columns)
    for _ in range(2):
        model(torch.tensor([1, 2, 5])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**seen, "after": {name: p.full_tensor() for name, p in model.named_parameters()}}


def refuse(folder, ranks):
    """States that cannot be saved, and a checkpoint of which one rank finds a shard damaged."""
    state = state_of(*make(None))
    columns = distribute_tensor(torch.zeros(4, 4), flat_mesh(), [Shard(1)])
    line = init_device_mesh("cpu", (1, 2))
    other = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (2, 1)), [Replicate(), Shard(0)])
    rows = distribute_tensor(torch.zeros(4, 4), line, [Replicate(), Shard(0)])
    seen = {
        "columns": raised(Writer(folder, ranks=ranks).save, {**state, "model": {"w": columns}}),
        "two meshes": raised(Writer(folder, ranks=ranks).save, {**state, "model": {"w": rows, "v": other}}),
        "no ranks": raised(Writer(folder).save, {**state, "model": {"w": rows}}),
        "no ranks, replicas": raised(Writer(folder).save, {**state, "model": {"w": other}}),
    }
    writer = Writer(folder, ranks=ranks)
    writer.save({**state, "model": {"w": rows}})
    writer.wait()
    if ranks.master:
        shard = folder / "ckpt_00001200.shards" / "1.pt"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    ranks.maximum(0)
    return {**seen, "load": raised(checkpoint.load, folder / "ckpt.pt", HASH, "cpu", False, ranks)}


FULL = OSError(errno.ENOSPC, "No space left on device")


def disk_full(folder, ranks):
    """torch.save fails on one rank, in its shard or in ckpt.pt, or a folder cannot be made."""
    model, optimizer = make(flat_mesh())
    seen, real = {}, torch.save
    for background in (True, False):
        writer = Writer(folder, background, ranks=ranks)
        writer.save(state_of(model, optimizer, 1))
        writer.wait()
        for where in ("shard of rank 1", "ckpt.pt", "folder"):

            def fail(content, file, where=where):
                if ("shards" in content) == (where == "ckpt.pt"):
                    file.write(b"half")
                    raise FULL
                real(content, file)

            strikes = ranks.rank == (1 if where == "shard of rank 1" else 0)
            patch = mock.patch("os.mkdir", side_effect=FULL) if where == "folder" else mock.patch("torch.save", fail)
            errors = []
            with patch if strikes else contextlib.nullcontext():
                errors.append(raised(writer.save, state_of(model, optimizer, 2)))
                errors.append(raised(writer.wait))
            errors.append(raised(writer.wait))
            seen[where, background] = [error for error in errors if error]
            if ranks.master:
                seen[where, background, "left"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.pt*"))
                seen[where, background, "iteration"] = checkpoint.load(folder / "ckpt.pt", HASH)["iter_num"]
                (folder / "ckpt_prev.pt").unlink(missing_ok=True)
            ranks.maximum(0)
    return seen


def kill(folder, ranks):
    """Rank 0 copies the folder around each change of a name or folder: what a kill of all ranks there would leave."""
    model, optimizer = make(flat_mesh())
    run, album = folder / "run", folder / "album"
    (run if ranks.master else folder).mkdir(exist_ok=True)
    ranks.maximum(0)
    writer = Writer(run, keep_last=3, ranks=ranks)
    for iter_num in (1, 2, 3):
        writer.save(state_of(model, optimizer, iter_num))
    writer.wait()

    with photographs(run, album) if ranks.master else contextlib.nullcontext():
        writer.save(state_of(model, optimizer, 4))
        finish(writer)
    return {}


def _work(rank, world_size, folder, tasks):
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
    ranks = Ranks(rank, rank, world_size, dist.new_group(backend="gloo"))
    for name in tasks:
        place = folder / (name if world_size == 2 else f"{name}{world_size}")
        if ranks.master:
            for part in ("", "background", "at_once", "plain"):
                (place / part).mkdir(parents=True, exist_ok=True)
        ranks.maximum(0)
        seen = globals()[name](place, ranks)
        torch.save(seen, place / f"seen_{rank}.pt")
    ranks.leave()


def start(world_size, folder, *tasks):
    arguments = (world_size, str(folder), tasks)
    torch.multiprocessing.start_processes(_work, arguments, nprocs=world_size, start_method="spawn")

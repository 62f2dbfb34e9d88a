"""The parts that a sharded checkpoint is written in and read from; which of them make a checkpoint, checkpoint.py says.

    save   state -> `take_apart` -> a state with a marker for each sharded tensor, and the rows that this rank holds
    load   a state with markers -> `put_together` -> a `Sharded` for each marker, which reads the rows it is asked for

    ckpt.pt                         the state, with markers; under "shards" the folder, and size and CRC-32 of its files
    ckpt_00001200.shards/3.pt       {"model": {"wte.weight": rows}, "optimizer": {"state.0.exp_avg": rows}} of shard 3

torch.distributed.checkpoint is not used: its .metadata is a pickle that runs code, and nothing in it has a checksum.
Rows are cut as FSDP2 cuts them (sparse24.cut), and cut anew for another number of ranks.
"""

import copy
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sparse24 import cut, is_dtensor

MARKER = "nano24.sharded"  # the key that makes a dict the marker of a sharded tensor


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is damaged, is no checkpoint of nano24, or does not fit."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


class _Summed:
    """A file that knows the size and CRC-32 of what was written to it, so that nothing is read again."""

    def __init__(self, file):
        self.file, self.bytes, self.crc32 = file, 0, 0

    def write(self, data) -> int:
        self.bytes, self.crc32 = self.bytes + len(data), zlib.crc32(data, self.crc32)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, content, summed: bool = False):
    """torch.save, and wait until the bytes are on disk. With `summed`, what is returned has `.bytes` and `.crc32`."""
    with open(path, "wb") as file:
        target = _Summed(file) if summed else file
        torch.save(content, target)
        target.flush()
        os.fsync(file.fileno())
    return target


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage_of(path: Path) -> str | None:
    """What is wrong with the file, or None: a zip archive whose every record has the CRC-32 it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch neither compresses nor sets attributes; where a flipped bit says so, its reader returns garbage
            odd = [info.filename for info in archive.infolist() if info.compress_type or info.external_attr]
            bad = odd[0] if odd else archive.testzip()
    except Exception as error:  # zipfile meets a damaged table of contents with exceptions of many types
        return f"it is truncated or was not written by torch.save ({error})"
    return f"its record {bad} is corrupted" if bad else None


# ---------------------------------------------------------------------------------------------------------------------
# Taking a state apart


def rebuild(value, change, path: tuple = ()):
    """`value` with change(path, item) in place of every item of its dicts, lists and tuples that this changes."""
    new = change(path, value)
    if new is not value:
        return new
    if isinstance(value, dict):
        new = copy.copy(value)  # a state_dict keeps its _metadata
        for key, item in value.items():
            new[key] = rebuild(item, change, (*path, key))
    elif type(value) in (list, tuple):  # not torch.Size, which is one too
        new = type(value)(rebuild(item, change, (*path, k)) for k, item in enumerate(value))
    return new


class Place(NamedTuple):
    """Of this rank: which of how many shards it holds, and whether it writes it (one of the replicas does)."""

    shard: int
    shards: int
    writes: bool
    ranks: int  # of the mesh


def _is_sharded(tensor) -> bool:
    """Whether the DTensor is cut by rows. Raises ValueError for what is neither that nor whole on every rank."""
    *others, last = tensor.placements
    if not all(p.is_replicate() for p in others) or not (last.is_replicate() or last.is_shard(0)):
        raise ValueError(
            f"a DTensor with placements {tensor.placements}, need Replicate, or Shard(0) in the last place"
        )
    return last.is_shard()


def take_apart(state: dict) -> tuple[dict, dict, Place | None]:
    """(state with a marker for each sharded tensor, {"model": {name: rows of this rank}, ...}, this rank's place).

    The place is None where nothing is sharded. Raises ValueError for a sharding other than FSDP2's, see `_is_sharded`,
    and where two tensors are cut differently.
    """
    parts, places = {}, set()

    def change(path, value):
        if not is_dtensor(value):
            return value
        if not _is_sharded(value):
            return value.to_local()
        mesh, local = value.device_mesh, value.to_local()
        *replica, shard = mesh.get_coordinate()
        place = Place(shard, mesh.size(mesh.ndim - 1), not any(replica), mesh.size())
        rows, name = cut(value.shape[0], place.shards), ".".join(map(str, path[1:]))
        if rows[place.shard] != len(local):
            raise ValueError(f"{name}: shard {place.shard} has {len(local)} rows, need {rows[place.shard]} of {rows}")
        places.add(place)
        parts.setdefault(path[0], {})[name] = local
        return {MARKER: [path[0], name], "shape": list(value.shape), "dtype": value.dtype, "rows": rows}

    with torch.no_grad():
        main = rebuild(state, change)
    if len(places) > 1:
        raise ValueError(f"tensors of one state are sharded over different meshes: {sorted(places)}; use one mesh")
    return main, parts, places.pop() if places else None


# ---------------------------------------------------------------------------------------------------------------------
# Putting it together


class _Folder:
    """The shard files of one checkpoint, each opened when it is first asked for, and then mapped, not read."""

    def __init__(self, path: Path, entry: dict):
        self.folder, self.files, self.opened = path.with_name(entry["folder"]), entry["files"], {}

    def path(self, k: int) -> Path:
        return self.folder / f"{k}.pt"

    def damage(self, k: int) -> str | None:
        """What is wrong with shard k's file, or None. The CRC-32 is of all its bytes, the archive's tables included."""
        path, need = self.path(k), self.files[k]
        try:
            size, crc32 = path.stat().st_size, 0
            if size != need["bytes"]:
                return f"has {size} bytes, not the {need['bytes']} of this checkpoint: truncated, or of another save"
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    crc32 = zlib.crc32(chunk, crc32)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error})"
        return None if crc32 == need["crc32"] else "is corrupted, or of another save: it has another CRC-32"

    def tensor(self, k: int, part: str, name: str) -> torch.Tensor:
        path = self.path(k)
        try:
            if k not in self.opened:
                self.opened[k] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return self.opened[k][part][name]
        except Exception as error:  # unpickling reports foreign content by many types
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} cannot be used: no {part} {name} can be read ({reason})") from error


@dataclass(frozen=True)
class Sharded:
    """A tensor whose rows lie in several shard files. Nothing is read before `rows` or `whole`."""

    folder: _Folder
    part: str
    name: str
    shape: torch.Size
    dtype: torch.dtype
    counts: tuple[int, ...]  # rows in each file

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A copy of rows start to stop - 1, (stop - start, ...); of the files only their pages are read.

        Raises ValueError for rows that are not there, CheckpointError for a file that is gone or foreign.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"Sharded.rows: {start} to {stop} of {self.name}, need 0 to {self.shape[0]}, in order")
        result, first = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype), 0
        for k, count in enumerate(self.counts):
            begin, end = max(start, first), min(stop, first + count)
            if begin < end:
                part = self.folder.tensor(k, self.part, self.name)
                shape = (count, *self.shape[1:])
                if part.shape != shape or part.dtype != self.dtype:
                    raise CheckpointError(
                        f"{self.folder.path(k)} cannot be used: its {self.part} {self.name} is {part.dtype} "
                        f"{tuple(part.shape)}, need {self.dtype} {shape}"
                    )
                result[begin - start : end - start] = part[begin - first : end - first]
            first += count
        return result

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.shape[0])

    def memory(self) -> tuple:
        """Equal for tensors that are tied: they were saved once, and so are mapped to the same bytes."""
        parts = [self.folder.tensor(k, self.part, self.name) for k, count in enumerate(self.counts) if count]
        return (self.shape, self.dtype, *(part.data_ptr() for part in parts))


def put_together(state: dict, path: Path, entry: dict, rank: int = 0, world_size: int = 1) -> dict:
    """`state` with a `Sharded` for each marker. Of the files every world_size-th one is checked, beginning at `rank`.

    Raises CheckpointError for a file that is missing, truncated, corrupted or of another save.
    """

    def change(_, value):
        if not isinstance(value, dict) or MARKER not in value:
            return value
        return Sharded(folder, *value[MARKER], torch.Size(value["shape"]), value["dtype"], tuple(value["rows"]))

    try:
        folder = _Folder(path, entry)
        for k in range(rank, len(folder.files), world_size):
            damage = folder.damage(k)
            if damage:
                raise CheckpointError(f"{path} cannot be used: its shard {folder.path(k)} {damage}")
        return rebuild(state, change)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used: what it says of its shards is foreign ({error!r})") from error


def make_whole(state: dict, map_location) -> dict:
    """`state` with a whole tensor for each `Sharded`; tied ones stay tied. map_location: a device."""
    made = {}

    def change(_, value):
        if not isinstance(value, Sharded):
            return value
        key = value.memory()
        if key not in made:
            made[key] = value.whole().to(map_location)
        return made[key]

    return rebuild(state, change)


def like(source: torch.Tensor | Sharded, target: torch.Tensor) -> torch.Tensor:
    """The value of `source` as this rank needs it in place of `target`: of its shape, on its device, sharded as it is.

    target: a tensor, or a DTensor (whole on every rank, or Shard(0) in the last place), whose mesh, placements and
    stride the result has; it reads no rows of other ranks. The dtype stays the source's. Nothing is communicated.
    Raises ValueError where shapes or shardings do not fit.
    """
    if tuple(source.shape) != tuple(target.shape):
        raise ValueError(f"like: a source of shape {tuple(source.shape)}, need the target's, {tuple(target.shape)}")
    if not is_dtensor(target):
        return (source.whole() if isinstance(source, Sharded) else source).to(target.device)
    from torch.distributed.tensor import DTensor

    mesh, local = target.device_mesh, target.to_local()
    begin, end = 0, target.shape[0] if target.ndim else None
    if _is_sharded(target):
        counts, shard = cut(end, mesh.size(mesh.ndim - 1)), mesh.get_coordinate()[-1]
        begin, end = sum(counts[:shard]), sum(counts[: shard + 1])
    if isinstance(source, Sharded):
        value = source.rows(begin, end)
    else:
        value = source[begin:end].clone() if source.ndim else source.clone()
    if value.shape != local.shape:
        raise ValueError(f"like: the target holds {tuple(local.shape)} here, need {tuple(value.shape)}, torch.chunk's")
    kind = {"run_check": False, "shape": target.shape, "stride": target.stride()}
    return DTensor.from_local(value.to(local.device), mesh, target.placements, **kind)

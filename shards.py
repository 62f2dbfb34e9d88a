"""Matrices cut by rows over the ranks, as FSDP2 leaves a model's weights between steps (DTensors, Shard(0)).

A weight W (out, in) lies on n ranks in pieces of ceil(out / n) rows (`cut`). Masks are decided in 4x4 blocks or in
groups of four along a row, so where a piece has a multiple of four rows (`fits`) every rank decides the masks of its
own, and no weight travels: only masks do, a byte for 16 weights. Layers keep their masks whole; masked decay takes its
rows of them. Everything here also takes plain tensors, of which this rank holds all rows.
"""

from collections.abc import Callable

import torch


def is_dtensor(t: torch.Tensor) -> bool:
    return hasattr(t, "placements")  # to import DTensor, to ask, takes most of a second


def local(t: torch.Tensor) -> torch.Tensor:
    """This rank's rows; shares memory with t."""
    return t.to_local() if is_dtensor(t) else t


def whole(t: torch.Tensor) -> torch.Tensor:
    """All rows, on every rank: a collective where t is sharded."""
    return t.full_tensor() if is_dtensor(t) else t


def piece(w: torch.Tensor) -> int:
    """Number of this rank's piece."""
    return w.device_mesh.get_local_rank(w.device_mesh.ndim - 1) if is_dtensor(w) else 0  # before it come copies


def cut(rows: int, ranks: int) -> list[int]:
    """How many of `rows` each rank holds, as torch.chunk cuts them: the last ones may have fewer, or none."""
    step = -(-rows // ranks)
    return [max(0, min(step, rows - k * step)) for k in range(ranks)]


def rows_of(w: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows of `mask`, whole and with a row for each of w's, or an index matrix with one for every four, that belong
    to this rank's rows of w."""
    if not is_dtensor(w):
        return mask
    per_row = w.shape[0] // mask.shape[0]
    first = sum(cut(w.shape[0], w.device_mesh.size(w.device_mesh.ndim - 1))[: piece(w)])
    return mask[first // per_row : (first + local(w).shape[0]) // per_row]


def by_rows(function: Callable, w: torch.Tensor, per_row: int) -> torch.Tensor:
    """function(w), whose result (out / per_row, n) has a row for every `per_row` rows of w; sharded where w is."""
    part = function(local(w))
    if not is_dtensor(w):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((w.shape[0] // per_row, *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, w.device_mesh, w.placements, run_check=False, shape=shape, stride=stride)


def total(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sum of `part` over the ranks that share `like`: a collective where it is sharded."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [*[Replicate()] * (like.device_mesh.ndim - 1), Partial()]
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False).full_tensor()


def fits(rows: int, ranks: int) -> bool:
    """Whether no 4x4 block of a matrix of so many rows lies on two ranks."""
    return cut(rows, ranks)[0] % 4 == 0 or ranks == 1

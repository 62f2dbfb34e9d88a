"""The memory of the PTX interpreter: bytes at addresses, with every access checked."""

import ctypes
import gc

import numpy as np
import torch


class Fault(RuntimeError):
    """A launch that a GPU would refuse, or whose result is undefined."""


class Memory:
    """A copy of disjoint regions of bytes, each given as (address, bytes). Every access is checked."""

    def __init__(self, regions: list[tuple[int, np.ndarray]]):
        regions = [(0, np.empty(0, np.uint8)), *sorted(regions, key=lambda region: region[0])]
        self.starts = np.array([start for start, _ in regions], np.uint64)
        self.sizes = np.array([len(content) for _, content in regions], np.uint64)
        # Modulo 16, a region's offset in `data` is its address, so an aligned access is one element of a wider view.
        offsets, end = [], 0
        for start, content in regions:
            offsets.append(end + start % 16)
            end += (start % 16 + len(content) + 15) // 16 * 16
        self.offsets = np.array(offsets, np.uint64)
        self.data = np.zeros(end, np.uint8)
        self.writer = np.full(end, -1, np.int32)  # the last thread that wrote a byte
        for offset, (_, content) in zip(offsets, regions, strict=True):
            self.data[offset : offset + len(content)] = content

    def contents(self, start: int) -> np.ndarray:
        """The region that starts at this address."""
        region = np.searchsorted(self.starts, np.uint64(start), side="right") - 1
        return self.data[int(self.offsets[region]) :][: int(self.sizes[region])]

    def offset(self, address: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Offsets in `data` for accesses of `size` bytes by these threads. Raises Fault if one is not allowed."""
        misaligned = address % np.uint64(size) != 0
        if misaligned.any():
            raise Fault(f"misaligned: thread {threads[misaligned][0]} needs an address that is a multiple of {size}")
        region = np.searchsorted(self.starts, address, side="right") - 1
        inside = address - self.starts[region]
        outside = inside + np.uint64(size) > self.sizes[region]
        if outside.any():
            first = np.flatnonzero(outside)[0]
            place = f"at byte {inside[first]} of {self.sizes[region[first]]}"
            raise Fault(f"out of bounds: {outside.sum()} threads, first thread {threads[first]}, {place}")
        return (self.offsets[region] + inside).astype(np.int64)

    def load(self, address: np.ndarray, dtype: np.dtype, count: int, threads: np.ndarray) -> list[np.ndarray]:
        """Load `count` consecutive elements per thread. Returns an array over the threads for each."""
        element = self.offset(address, dtype.itemsize * count, threads) // dtype.itemsize
        return [self.data.view(dtype)[element + i] for i in range(count)]

    def store(self, address: np.ndarray, elements: list[np.ndarray], threads: np.ndarray) -> None:
        """Store consecutive elements per thread, given as an array over the threads for each."""
        size = elements[0].dtype.itemsize
        offset, view = self.offset(address, size * len(elements), threads), self.data.view(elements[0].dtype)
        for i, values in enumerate(elements):
            element, byte = offset // size + i, (offset + i * size)[:, None] + np.arange(size)
            earlier = self.writer[byte]
            overwrites = ((earlier >= 0) & (earlier != threads[:, None])).any(1) & (view[element] != values)
            view[element], self.writer[byte] = values, threads[:, None]
            conflict = overwrites | (view[element] != values)  # with an earlier instruction, or within this one
            if conflict.any():
                raise Fault(f"two threads write different values to one address, one of them {threads[conflict][0]}")

    def barrier(self) -> None:
        """After a barrier, threads may overwrite the values of other threads."""
        self.writer.fill(-1)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte of a (strided) tensor, and the address after its last byte."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.itemsize * (tensor.numel() > 0)


def _pointed_to(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose addresses are listed in one of the int64 tensors, as kernels.adamw_ passes its operands."""
    tables = [tensor for tensor in tensors if tensor.dtype == torch.int64 and tensor.dim() > 0]
    addresses = {address for table in tables for address in table.flatten().tolist()}
    if not addresses:
        return []
    live = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return [t for t in live if t.layout == torch.strided and t.device.type == "cpu" and t.data_ptr() in addresses]


def regions_of(tensors: list[torch.Tensor]) -> list[tuple[int, np.ndarray]]:
    """The memory of the tensors, and of tensors that they point to, as disjoint (address, bytes), without a copy."""
    merged: list[list[int]] = []
    for start, end in sorted(_span(tensor) for tensor in tensors + _pointed_to(tensors)):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        elif end > start:
            merged.append([start, end])
    return [
        (start, np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))) for start, end in merged
    ]

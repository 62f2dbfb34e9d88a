"""The memory layout of a packed 2:4 operand.

The operand of a (rows, columns) matrix keeps two elements of every group of four along the columns. It is one buffer of
9/16 of the dense size, in the layout that cuSPARSELt reads for 16-bit types:
    values     (rows, columns/2) row-major: the two kept elements of each group, in order
    metadata   rows * columns / 8 bytes: a nibble for each group, low index | high index << 2

The order of the nibbles depends on the GPU: `sm80` is cuSPARSELt's order on Ampere (compute capability 8.x), `sm90` the
one on Hopper. NVIDIA does not document them. Our formulas come from open-source code, and choose.py compares them with
the library's bytes before a run uses one. There are two more orders:
    library    packed by cuSPARSELt's own converter, in an order that we need not know
    masked     not packed: the dense (rows, columns) matrix with zeros
"""

import functools

import torch
from torch.utils._python_dispatch import _disable_current_modes

ORDERS = {"sm80": (128, 64), "sm90": (64, 64)}  # rows and columns must be multiples of these


def check_packable(function: str, rows: int, columns: int, order: str) -> None:
    """Raises ValueError unless a (rows, columns) matrix can be packed in this metadata order."""
    if order not in ORDERS:
        raise ValueError(f"{function}: metadata order {order!r} is unknown, need one of {', '.join(ORDERS)}")
    if rows % ORDERS[order][0] or columns % ORDERS[order][1]:
        raise ValueError(
            f"{function}: shape ({rows}, {columns}), order {order} needs multiples of {ORDERS[order]}; "
            "change the width or multiply masked dense matrices"
        )


def nibble_positions(rows: int, columns: int, order: str, device=None) -> torch.Tensor:
    """The position of each group's metadata, in nibbles from the start of the metadata: int64 (rows, columns/4).

    sm90  Panels of 64 rows, 8*columns bytes each. A panel has 256 B per 32 columns, in them 64 B per 16 rows, in them
          8 B per pair of rows p and p+8. Group q of the eight is in byte 2(q%4) + q/4; row p is the low nibble.
    sm80  Tiles of 128x64 elements, 512 words of 16 bits each, down the columns first. A word holds 16 columns of one
          row. Inside a 32x32 sub-tile, words are in the order 8(r%8) + 4(r/16) + 2(c16%2) + r/8%2.
    """
    check_packable("nibble_positions", rows, columns, order)
    r, q = torch.arange(rows, device=device)[:, None], torch.arange(columns // 4, device=device)[None, :]
    if order == "sm90":
        byte = 8 * columns * (r // 64) + 256 * (q // 8) + 64 * (r % 64 // 16) + 8 * (r % 8) + 2 * (q % 4) + q % 8 // 4
        return 2 * byte + r // 8 % 2
    tile = 512 * (r // 128) + 512 * (rows // 128) * (q // 16) + 64 * (r % 128 // 32) + 256 * (q % 16 // 8)
    word = tile + 8 * (r % 8) + 4 * (r // 16 % 2) + 2 * (q // 4 % 2) + r // 8 % 2
    return 4 * word + q % 4


def packed_parts(packed: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a packed operand: values (rows, columns/2) in its 16-bit dtype, and metadata uint8 (rows*columns/8,)."""
    if packed.dim() != 1 or packed.numel() != rows * columns * 9 // 16 or packed.element_size() != 2:
        raise ValueError(
            f"packed_parts: {packed.dtype} {tuple(packed.shape)}, need a 1-D 16-bit tensor of 9/16 of {rows}x{columns}"
        )
    values = packed[: rows * columns // 2].view(rows, columns // 2)
    return values, packed[rows * columns // 2 :].view(torch.uint8)


@torch.library.custom_op("nano24::pack24", mutates_args=())
def pack24(x: torch.Tensor, mask: torch.Tensor, order: str) -> torch.Tensor:
    """Pack x (rows, columns), 16-bit, under a mask with two True in every group of four. Returns 1-D, of x's dtype.

    Raises ValueError if the shape does not fit the order, or if a group does not keep two.
    """
    rows, columns = x.shape
    check_packable("pack24", rows, columns, order)
    groups = mask.view(rows, columns // 4, 4)
    if not (groups.sum(-1) == 2).all():
        raise ValueError("pack24: need a mask that keeps exactly two of every four along the columns")
    low, high = groups.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :2].unbind(-1)
    nibbles = torch.empty(rows * columns // 4, dtype=torch.uint8, device=x.device)
    nibbles[nibble_positions(rows, columns, order, x.device).flatten()] = (low | high << 2).to(torch.uint8).flatten()
    packed = torch.empty(rows * columns * 9 // 16, dtype=x.dtype, device=x.device)
    values, metadata = packed_parts(packed, rows, columns)
    values.copy_(x[mask].view(rows, columns // 2))
    metadata.copy_(nibbles[0::2] | nibbles[1::2] << 4)
    return packed


@pack24.register_fake
def _(x, mask, order):
    return x.new_empty(x.numel() * 9 // 16)


def unpack24(packed: torch.Tensor, rows: int, columns: int, order: str) -> torch.Tensor:
    """The dense (rows, columns) matrix of a packed operand, zero where an element was pruned.

    Raises ValueError if the shape does not fit, or if a nibble is none of the six pairs.
    """
    check_packable("unpack24", rows, columns, order)
    values, metadata = packed_parts(packed, rows, columns)
    nibbles = torch.stack((metadata & 15, metadata >> 4), dim=-1).flatten()
    nibbles = nibbles[nibble_positions(rows, columns, order, packed.device)]
    pair = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()  # (rows, columns/4, 2)
    if not (pair[..., 0] < pair[..., 1]).all():
        raise ValueError(f"unpack24: the metadata is no {order} order: a group's two kept columns do not ascend")
    dense = torch.zeros(rows, columns // 4, 4, dtype=packed.dtype, device=packed.device)
    return dense.scatter_(-1, pair, values.view(rows, columns // 4, 2)).view(rows, columns)


@torch.library.custom_op("nano24::compress24", mutates_args=())
def compress24(x: torch.Tensor) -> torch.Tensor:
    """Pack a pruned matrix x (rows, columns), 16-bit and contiguous, by cuSPARSELt's own converter.

    Returns 1-D, of x's dtype. The converter may add padding, so the operand may exceed 9/16 of x's elements.
    """
    if not x.is_contiguous() or x.dim() != 2:
        raise ValueError(f"compress24: {tuple(x.shape)} with strides {tuple(x.stride())}, need a contiguous matrix")
    return torch._cslt_compress(x).flatten()


@compress24.register_fake
def _(x):
    return x.new_empty(operand_shape(*x.shape, "library", x.dtype, x.device))


def operand_shape(rows: int, columns: int, order: str, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    """The shape of the operand of a (rows, columns) matrix in any order."""
    if order == "masked":
        return rows, columns
    return (_library_size(rows, columns, dtype, device) if order == "library" else rows * columns * 9 // 16,)


def _library_size(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    return _ask_library(rows, columns, dtype, device)


# As torch.compiler.assume_constant_result does, but without importing the compiler and Triton.
_library_size._dynamo_marked_constant = True


@functools.cache
def _ask_library(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    with _disable_current_modes():  # makes a real call while a compiler traces, too
        return torch._cslt_compress(torch.zeros(rows, columns, dtype=dtype, device=device)).numel()

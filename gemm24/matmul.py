"""2:4 GEMMs: how a sparse left operand lies in memory, and the backends that multiply it.

A packed operand of a (rows, columns) matrix with two kept elements in every group of four along its columns is one
buffer of 9/16 of the dense size, as cuSPARSELt takes it for 16-bit types:
    values     (rows, columns/2) row-major: the two kept elements of each group, in order
    metadata   rows * columns / 8 bytes: of each group a nibble, low index | high index << 2, in an order of the GPU's
`sm80` is cuSPARSELt's order on Ampere (compute capability 8.x), `sm90` the one on Hopper, `cutlass` that of PyTorch's
CUTLASS kernels. NVIDIA calls its two internal. They are here as they were read in open code; choose.py asks
the library before any is used.

`matmul24` computes D = A B (+ bias) with A that operand, by the backend that choose.py chose for the shape.
Whatever was chosen multiplies the same numbers.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from gemm24 import cusparselt

# ---------------------------------------------------------------------------------------------------------------------
# Packed layouts

ORDERS = {"sm80": (128, 64), "sm90": (64, 64), "cutlass": (32, 64)}  # what rows and columns must be multiples of
CONVERTED = ("library", "cutlass")  # what a library's converter writes, from the pruned matrix: compress24


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
    """Where the metadata of each group of four lies: int64 (rows, columns/4), in nibbles from the metadata's start.

    sm90  64-row panels of 8*columns bytes; in them 256 B for 32 columns, 64 B for 16 rows, 8 B for the rows p and p+8;
          group q of the eight is byte 2(q%4) + q/4, row p its low nibble and row p+8 its high one.
    sm80  128x64 tiles of 512 words of 16 bits, down the columns first; a word is 16 columns of one row, and 32x32
          sub-tiles hold theirs in the order 8(r%8) + 4(r/16) + 2(c16%2) + r/8%2.
    cutlass  the same sub-tiles, all those of 32 columns one after the other.
    """
    check_packable("nibble_positions", rows, columns, order)
    r, q = torch.arange(rows, device=device)[:, None], torch.arange(columns // 4, device=device)[None, :]
    if order == "sm90":
        byte = 8 * columns * (r // 64) + 256 * (q // 8) + 64 * (r % 64 // 16) + 8 * (r % 8) + 2 * (q % 4) + q % 8 // 4
        return 2 * byte + r // 8 % 2
    if order == "sm80":
        tile = 512 * (r // 128) + 512 * (rows // 128) * (q // 16) + 64 * (r % 128 // 32) + 256 * (q % 16 // 8)
    else:
        tile = 64 * (r // 32) + 2 * rows * (q // 8)
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
def pack_ref(x: torch.Tensor, kept: torch.Tensor, order: str) -> torch.Tensor:
    """Pack x (rows, columns), 16-bit, with the mask `kept`, two True in every group of four: 1-D, x.dtype.

    Raises ValueError where the shape does not fit the order, or where a group does not keep two.
    """
    rows, columns = x.shape
    check_packable("pack", rows, columns, order)
    groups = kept.view(rows, columns // 4, 4)
    if not (groups.sum(-1) == 2).all():
        raise ValueError("pack: need a mask that keeps exactly two of every four along the columns")
    low, high = groups.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :2].unbind(-1)
    nibbles = torch.empty(rows * columns // 4, dtype=torch.uint8, device=x.device)
    nibbles[nibble_positions(rows, columns, order, x.device).flatten()] = (low | high << 2).to(torch.uint8).flatten()
    packed = torch.empty(rows * columns * 9 // 16, dtype=x.dtype, device=x.device)
    values, metadata = packed_parts(packed, rows, columns)
    values.copy_(x[kept].view(rows, columns // 2))
    metadata.copy_(nibbles[0::2] | nibbles[1::2] << 4)
    return packed


@pack_ref.register_fake
def _(x, kept, order):
    return x.new_empty(x.numel() * 9 // 16)


def unpack_ref(packed: torch.Tensor, rows: int, columns: int, order: str) -> torch.Tensor:
    """The dense (rows, columns) matrix of a packed operand, zero where nothing was kept.

    Raises ValueError where the shape does not fit, or where a nibble is none of the six that name two of four.
    """
    check_packable("unpack", rows, columns, order)
    values, metadata = packed_parts(packed, rows, columns)
    nibbles = torch.stack((metadata & 15, metadata >> 4), dim=-1).flatten()
    nibbles = nibbles[nibble_positions(rows, columns, order, packed.device)]
    pair = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()  # (rows, columns/4, 2)
    if not (pair[..., 0] < pair[..., 1]).all():
        raise ValueError(f"unpack: the metadata is no {order} order: a group's two kept columns do not ascend")
    dense = torch.zeros(rows, columns // 4, 4, dtype=packed.dtype, device=packed.device)
    return dense.scatter_(-1, pair, values.view(rows, columns // 4, 2)).view(rows, columns)


# ---------------------------------------------------------------------------------------------------------------------
# matmul24: one call for all backends. Each vendor call is a custom op with a fake, so that torch.compile sees through.


class Gemm(NamedTuple):
    """A GEMM of a run: D = A B with a 2:4 A (m, k) and B (k, n). `b_column_major`: B is the transpose of a contiguous
    (n, k); `transposed`: what is returned is the contiguous (n, m) of D^T; `bias`: one number per row of A is added;
    `fresh`: A is a gradient, made anew for each call, where a weight is packed once per step."""

    name: str
    m: int
    n: int
    k: int
    b_column_major: bool
    transposed: bool
    bias: bool
    fresh: bool = False


MATMULS = ("masked", "cusparselt", "cutlass", "emulated")  # backends of matmul24


class Choice(NamedTuple):
    """How one GEMM is multiplied. The default is a dense GEMM on the pruned matrix."""

    backend: str = "masked"  # one of MATMULS
    order: str = "masked"  # how A lies: masked (dense, with zeros), a key of ORDERS, or library (cuSPARSELt's own)
    alg_id: int = 0
    split_k: int = 1


def _check_b(function: str, b: torch.Tensor, bias: torch.Tensor | None, rows: int) -> None:
    """Raises ValueError on a dense operand that a vendor's call would misread: they look at shapes, not at strides."""
    k, n = b.shape if b.dim() == 2 else (0, 0)
    if b.dim() != 2 or tuple(b.stride()) not in ((n, 1), (1, k)):
        raise ValueError(
            f"{function}: B {tuple(b.shape)} with strides {tuple(b.stride())}, need a contiguous (k, n) or the "
            "transpose of a contiguous (n, k); call .contiguous()"
        )
    if k % 64 or n % 8:
        raise ValueError(f"{function}: B {tuple(b.shape)}, need k a multiple of 64 and n one of 8; pad the tokens")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != b.dtype or not bias.is_contiguous()):
        raise ValueError(
            f"{function}: bias {bias.dtype} {tuple(bias.shape)}, need a contiguous {b.dtype} ({rows},), one per row"
        )


def _check_blob(function: str, a: torch.Tensor, b: torch.Tensor, rows: int, padded: bool = False) -> None:
    """padded: the library's own converter may have made `a` longer than 9/16 of the matrix."""
    size = rows * b.shape[0] * 9 // 16
    fits = a.dim() == 1 and (a.numel() == size or (padded and a.numel() > size and a.numel() % rows == 0))
    if a.dtype != b.dtype or a.element_size() != 2 or not fits or not a.is_contiguous():
        raise ValueError(
            f"{function}: packed A {a.dtype} {tuple(a.shape)}, need a contiguous {b.dtype} ({size},): 9/16 of "
            f"{rows}x{b.shape[0]}, of a 16-bit dtype"
        )


def _empty_result(b: torch.Tensor, rows: int, transposed: bool) -> torch.Tensor:
    return b.new_empty((b.shape[1], rows) if transposed else (rows, b.shape[1]))


@torch.library.custom_op("nano24::matmul24_cusparselt", mutates_args=())
def matmul24_cusparselt(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    transposed: bool,
    alg_id: int,
    split_k: int,
) -> torch.Tensor:
    """D = A B + bias by cuSPARSELt. a: what its compress gives, or our packers in the order that it accepts.

    Without a bias the library is called directly, with plans that are kept. PyTorch's op builds and destroys a plan in
    each call, which takes the host longer than most of these GEMMs take the GPU; it serves where the library cannot be
    called, and for biases."""
    _check_b("matmul24_cusparselt", b, bias, rows)
    _check_blob("matmul24_cusparselt", a, b, rows, padded=True)
    if bias is None and cusparselt.available() is None:
        return cusparselt.matmul(a, b, rows, transposed, alg_id, split_k)
    options = {"bias": bias, "transpose_result": transposed, "alg_id": alg_id}
    if split_k > 1:
        options["split_k"] = split_k
    return torch._cslt_sparse_mm(a.view(rows, -1), b, **options)  # 2-D is what new releases need, old ones take it


@matmul24_cusparselt.register_fake
def _(a, b, bias, rows, transposed, alg_id, split_k):
    return _empty_result(b, rows, transposed)


@torch.library.custom_op("nano24::matmul24_cutlass", mutates_args=())
def matmul24_cutlass(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, rows: int, transposed: bool
) -> torch.Tensor:
    """D = A B + bias by PyTorch's CUTLASS kernels: compute capability 8.x alone."""
    _check_b("matmul24_cutlass", b, bias, rows)
    _check_blob("matmul24_cutlass", a, b, rows)
    values, metadata = packed_parts(a, rows, b.shape[0])
    metadata = metadata.view(torch.int16).view(rows, b.shape[0] // 16)
    if bias is None:
        d = torch._sparse_semi_structured_mm(values, metadata, b)
    else:
        d = torch._sparse_semi_structured_addmm(bias, values, metadata, b)
    return (d.t() if transposed else d).contiguous()


@matmul24_cutlass.register_fake
def _(a, b, bias, rows, transposed):
    return _empty_result(b, rows, transposed)


@torch.library.custom_op("nano24::matmul24_emulated", mutates_args=())
def matmul24_emulated(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, rows: int, transposed: bool, order: str
) -> torch.Tensor:
    """D = A B + bias on any machine, from the very bytes that a GPU's library would read: unpacked, then multiplied."""
    _check_b("matmul24_emulated", b, bias, rows)
    _check_blob("matmul24_emulated", a, b, rows)
    return _matmul_masked(unpack_ref(a, rows, b.shape[0], order), b, bias, transposed)


@matmul24_emulated.register_fake
def _(a, b, bias, rows, transposed, order):
    return _empty_result(b, rows, transposed)


def _matmul_masked(a, b, bias, transposed: bool) -> torch.Tensor:
    if transposed:
        return F.linear(b.t(), a, bias)
    return a @ b if bias is None else torch.addmm(bias[:, None], a, b)


def matmul24(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, rows: int, transposed: bool, choice: Choice
) -> torch.Tensor:
    """D = A B (+ bias per row of A): (rows, n), or with `transposed` the contiguous (n, rows) of D^T.

    a: a packed operand in choice.order, or for "masked" the pruned matrix (rows, k) itself, any strides. b: (k, n),
    contiguous or the transpose of a contiguous (n, k). bias: (rows,) of b's dtype. The three forms of FST: the output
    with `transposed`, or feature-major without; the input's gradient, from the packed W^T; the weight's, from a packed
    MVUE(dZ^T). Raises ValueError on what a backend would misread.
    """
    if choice.backend == "masked":
        return _matmul_masked(a, b, bias, transposed)
    if choice.backend == "cusparselt":
        return matmul24_cusparselt(a, b, bias, rows, transposed, choice.alg_id, choice.split_k)
    if choice.backend == "cutlass":
        return matmul24_cutlass(a, b, bias, rows, transposed)
    if choice.backend == "emulated":
        return matmul24_emulated(a, b, bias, rows, transposed, choice.order)
    raise ValueError(f"matmul24: backend {choice.backend!r} is unknown, need one of {', '.join(MATMULS)}")


@torch.library.custom_op("nano24::compress24", mutates_args=())
def compress24(x: torch.Tensor, order: str) -> torch.Tensor:
    """The packed operand of a pruned matrix x (rows, columns), 16-bit, contiguous, by a library's own converter: order
    "library" is cuSPARSELt's, "cutlass" PyTorch's. Returns 1-D, `compressed_size` elements of x's dtype."""
    if not x.is_contiguous() or x.dim() != 2:
        raise ValueError(f"compress24: {tuple(x.shape)} with strides {tuple(x.stride())}, need a contiguous matrix")
    if order == "cutlass":
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        values, metadata = sparse_semi_structured_from_dense_cutlass(x)
        return torch.cat((values.flatten(), metadata.flatten().view(x.dtype)))
    return torch._cslt_compress(x).flatten()


@compress24.register_fake
def _(x, order):
    return x.new_empty(compressed_size(*x.shape, order, x.dtype, x.device))


def compressed_size(rows: int, columns: int, order: str, dtype: torch.dtype, device: torch.device) -> int:
    """Number of elements of a packed (rows, columns) matrix: 9/16 of the dense one in an order of ours. cuSPARSELt's
    own converter may add padding, so the library is asked."""
    return _library_size(rows, columns, dtype, device) if order == "library" else rows * columns * 9 // 16


def _library_size(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    return _ask_library(rows, columns, dtype, device)


# This is torch.compiler.assume_constant_result, which would import the compiler, and Triton with it.
_library_size._dynamo_marked_constant = True


@functools.cache
def _ask_library(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    with _disable_current_modes():  # a real call, also while a compiler traces
        return torch._cslt_compress(torch.zeros(rows, columns, dtype=dtype, device=device)).numel()

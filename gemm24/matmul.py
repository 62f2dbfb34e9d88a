"""2:4 matrix products: D = A B (+ bias) with a packed A (layout.py), by the backend that choose.py chose for the shape.

All backends multiply the same numbers. Each vendor call is a custom op with its fake beside it, for torch.compile.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from gemm24 import cusparselt
from gemm24.layout import unpack24


class Gemm(NamedTuple):
    """A GEMM of a run, D = A B with a 2:4 A (m, k) and B (k, n).

    b_column_major: B is the transpose of a contiguous (n, k). transposed: the result is D^T, a contiguous (n, m). bias:
    one number per row of A is added. fresh: A is a gradient or an activation, which the kernel that computes it packs
    in each call; a weight is packed once per step. repacked: A is a weight that is packed in each call by itself.
    """

    name: str
    m: int
    n: int
    k: int
    b_column_major: bool
    transposed: bool
    bias: bool
    fresh: bool = False
    repacked: bool = False


MATMULS = ("masked", "cusparselt", "emulated")  # backends of matmul24


class Choice(NamedTuple):
    """How one GEMM is multiplied. The default is a dense GEMM on the pruned matrix."""

    backend: str = "masked"  # one of MATMULS
    order: str = "masked"  # the layout of A: masked, library, or a key of ORDERS (layout.py)
    alg_id: int = 0
    split_k: int = 1


def _check(function: str, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, rows: int, padded=False) -> None:
    """Raises ValueError for operands that a vendor's call would misread, since it ignores strides.

    padded: allow an `a` of more than 9/16 of the matrix, which the library's own converter may make."""
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
    size = rows * k * 9 // 16
    fits = a.dim() == 1 and (a.numel() == size or (padded and a.numel() > size and a.numel() % rows == 0))
    if a.dtype != b.dtype or a.device != b.device or a.element_size() != 2 or not fits or not a.is_contiguous():
        raise ValueError(
            f"{function}: packed A {a.dtype} {tuple(a.shape)} on {a.device}, need a contiguous {b.dtype} ({size},) on "
            f"{b.device}: 9/16 of {rows}x{k}, of a 16-bit dtype"
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
    """D = A B + bias by cuSPARSELt. a: packed by its compress, or by our packers in an order that it accepts.

    Without a bias the library is called directly, with cached plans. PyTorch's op serves for biases, and where the
    library cannot be called. It builds a plan in each call, which takes longer than most of these GEMMs."""
    _check("matmul24_cusparselt", a, b, bias, rows, padded=True)
    if bias is None and cusparselt.available() is None:
        return cusparselt.matmul(a, b, rows, transposed, alg_id, split_k)
    options = {"bias": bias, "transpose_result": transposed, "alg_id": alg_id}
    if split_k > 1:
        options["split_k"] = split_k
    return torch._cslt_sparse_mm(a.view(rows, -1), b, **options)  # new releases of PyTorch need a 2-D A


@matmul24_cusparselt.register_fake
def _(a, b, bias, rows, transposed, alg_id, split_k):
    return _empty_result(b, rows, transposed)


@torch.library.custom_op("nano24::matmul24_emulated", mutates_args=())
def matmul24_emulated(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, rows: int, transposed: bool, order: str
) -> torch.Tensor:
    """D = A B + bias on any machine. It unpacks the bytes that a GPU's library would read, and multiplies."""
    _check("matmul24_emulated", a, b, bias, rows)
    return _matmul_masked(unpack24(a, rows, b.shape[0], order), b, bias, transposed)


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
    """D = A B (+ bias per row of A): (rows, n), or with `transposed` D^T as a contiguous (n, rows).

    a: packed operand in choice.order, or for "masked" the pruned matrix (rows, k), any strides. b: (k, n), contiguous
    or the transpose of a contiguous (n, k). bias: (rows,) of b's dtype. Raises ValueError for operands that a backend
    would misread.
    """
    if choice.backend == "masked":
        return _matmul_masked(a, b, bias, transposed)
    if choice.backend == "cusparselt":
        return matmul24_cusparselt(a, b, bias, rows, transposed, choice.alg_id, choice.split_k)
    if choice.backend == "emulated":
        return matmul24_emulated(a, b, bias, rows, transposed, choice.order)
    raise ValueError(f"matmul24: backend {choice.backend!r} is unknown, need one of {', '.join(MATMULS)}")

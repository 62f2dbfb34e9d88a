"""The paper: fully sparse training of transformers with 2:4 weights, FST (Hu et al., ICML 2024), and its successors.

W is (out, in), X (BT, in), Z = X W^T, and M is a transposable 2:4 mask: two of four along rows and along columns.
    forward    Z  = X (W*M)^T                         2:4 along in                                     Eq. 2
    backward   dX = dZ (W*M)                          2:4 along out, because M^T is a 2:4 mask too     Eq. 3, 5
               dW = MVUE(dZ^T) X                      2:4 along tokens; reaches every entry of W       Eq. 4, 6, 7
               db = sum over tokens of the unpruned dZ
    step       g <- clipped dW + decay * ~M * W       masked decay, before Adam's moments              Eq. 10
    refresh    M <- argmax over the 90 patterns of |W*M|_1 in each 4x4 block, every `mask_interval`    Algorithm 1

Order of this file: dispatch to the Triton kernels; patterns, masks and the flip rate; MVUE; soft threshold and masked
decay; recipes, with the equations of the ablations; sharded weights; the sparse linear layer; `sparsify` and `densify`;
the optimizer. Masks are bool, True = kept. A mask is stored as its index matrix, one uint8 per 4x4 block. The layer in
this file multiplies pruned operands as dense matrices; gemm24/ multiplies them as 2:4 matrices.

To use 2:4 layers in another project, copy this file and kernels.py. Without kernels.py, or without Triton, everything
runs in plain PyTorch.
"""

import difflib
import functools
import hashlib
import importlib.util
import math
import os
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------------
# Operators and their kernels. An operator is written once in plain PyTorch. This is its specification. It may have a
# Triton kernel of the same name and arguments in kernels.py. NANO24_KERNELS=0 turns the kernels off.

_kernels = None  # the module kernels, after use_kernels has loaded it
_STATUS: dict[torch.device, str] = {}  # "on" or "off: reason", for each device that use_kernels was called for
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each function returns {operator: True if its kernel equals its specification}. gemm24/operands.py appends another.
# Import such a file before calling use_kernels.
SELF_TESTS: list[Callable[[torch.device], dict[str, bool]]] = []


def kernel(name: str, takes: Callable | None = None, otherwise: Callable | None = None):
    """Decorator that makes an operator of its specification. The operator runs kernels.`name` if the kernel supports
    the call, else the specification. `operator.torch` is always the specification.

    takes: a predicate on the arguments, checked in addition to `_runs_kernels`. Calls that it refuses go to the
    specification, which raises an error if the arguments are wrong. otherwise: a function to run in place of the
    specification, for an operator that is a combination of other operators.
    """

    def attach(specification: Callable) -> Callable:
        @functools.wraps(specification)
        def operator(*args, **kwargs):
            if _runs_kernels(*args, *kwargs.values()) and (takes is None or takes(*args, **kwargs)):
                return getattr(_kernels, name)(*args, **kwargs)
            return (otherwise or specification)(*args, **kwargs)

        operator.torch = specification
        return operator

    return attach


def _runs_kernels(*arguments) -> bool:
    """Returns whether a kernel may take the floating-point tensors among the arguments: none may need a gradient."""
    tensors = [t for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return len(tensors) > 0 and all(  # torch 2.11's compiler cannot trace bool() of a list
        _STATUS.get(t.device) == "on"
        and t.dtype in _KERNEL_DTYPES
        and t.numel() > 0
        and not (t.requires_grad and torch.is_grad_enabled())
        for t in tensors
    )


def use_kernels(device: torch.device | str) -> str:
    """Use the Triton kernels on this CUDA device from now on. Returns "on", or "off: " and the reason.

    Call it once, before building a model. Otherwise everything runs in plain PyTorch. The first call compares every
    kernel with its specification, which takes seconds. If one differs, a warning names it and no kernel is used.
    Raises ValueError if NANO24_KERNELS is neither 0 nor 1.
    """
    device = _with_number(torch.device(device))
    if device.type == "cuda" and device not in _STATUS:
        _STATUS[device] = "off: being tested"
        _STATUS[device] = _try_kernels(device)
        if _STATUS[device].startswith("off: failed"):
            warnings.warn(f"nano24 kernels on {device} {_STATUS[device]}; using PyTorch instead", stacklevel=2)
    return kernel_status(device)


def kernel_status(device: torch.device) -> str:
    """Returns "on" if tensors of this device go to the Triton kernels, else "off: " and the reason. Runs no test."""
    if device.type != "cuda":
        return f"off: the kernels need CUDA, this is {device.type}"
    return _STATUS.get(_with_number(device), "off: use_kernels was not called for this device")


def _with_number(device: torch.device) -> torch.device:
    """Replace "cuda" by "cuda:N", N the current device. Other devices are returned unchanged."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _try_kernels(device: torch.device) -> str:
    global _kernels
    switch = os.environ.get("NANO24_KERNELS", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"NANO24_KERNELS={switch!r}, need 0 (plain PyTorch) or 1 (Triton kernels where possible)")
    if switch == "0":
        return "off: NANO24_KERNELS=0"
    if torch.version.hip or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return "off: the kernels need an NVIDIA GPU of compute capability 8.0 or more"
    try:
        module = _import_kernels()
        with torch.device("cpu"):  # the caller may have set another default device
            mismatches = kernel_mismatches(device)
    except ImportError as error:
        return f"off: {error}"
    except Exception as error:  # Triton or the driver failed: run without kernels
        torch.cuda.synchronize(device)  # raises if the GPU itself is lost
        return f"off: failed the self-test with {type(error).__name__}: {error}"
    if mismatches:
        return f"off: failed the self-test, results differ from PyTorch: {', '.join(mismatches)}"
    _kernels = module
    return "on"


def _import_kernels():
    import kernels  # here, because Triton takes long to import and may not be installed

    kernels.use_patterns(PATTERNS)
    return kernels


def kernel_mismatches(device: torch.device) -> list[str]:
    """Names of the operators whose kernel and specification differ on small test inputs. Empty on a sound machine."""
    _import_kernels()
    return [name for compare in SELF_TESTS for name, equal in compare(device).items() if not equal]


# ---------------------------------------------------------------------------------------------------------------------
# The 90 transposable patterns. Their order is a disk format, because checkpoints store indices. The order follows a
# rule, so that the search below needs no table. a, b, c, d are the rows of a block. A pair is the two columns that a
# row keeps, and ~ is its complement.
#   A  0 + p                a, b keep pair p; c, d keep ~p                                                         6
#   C  6 + 6 p + q          a keeps p, b keeps ~p; c keeps q, d keeps ~q                                          36
#   B  42 + 8 jk + 4e+2x+y  a and b keep (l if e else i), c and d the other one; (i, l) is the complement of (j, k);
#                           a keeps (k if x else j), b the other one; c keeps (k if y else j), d the other one    48

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def _all_patterns() -> torch.Tensor:
    def rows(*pairs: tuple[int, int]) -> list[list[bool]]:
        return [[column in pair for column in range(4)] for pair in pairs]

    a = [rows(p, p, q, q) for p, q in zip(PAIRS, PAIRS[::-1], strict=True)]  # PAIRS reversed are the complements
    c = [rows(p, PAIRS[5 - i], q, PAIRS[5 - j]) for i, p in enumerate(PAIRS) for j, q in enumerate(PAIRS)]
    b = []
    for jk, (j, k) in enumerate(PAIRS):
        i, l = PAIRS[5 - jk]
        for ab, cd in ((i, l), (l, i)):
            for xa, xb in ((j, k), (k, j)):
                for yc, yd in ((j, k), (k, j)):
                    b.append(rows((ab, xa), (ab, xb), (cd, yc), (cd, yd)))
    return torch.tensor(a + c + b)


PATTERNS = _all_patterns()  # bool (90, 4, 4), True = kept
PATTERNS_HASH = hashlib.sha256(PATTERNS.numpy().tobytes()).hexdigest()[:16]
_CPU = torch.device("cpu")
_TABLES = {  # name -> {device: table}; copied to a device on first use
    "flat": {_CPU: PATTERNS.flatten(1)},  # bool (90, 16)
    "hamming": {_CPU: (PATTERNS.flatten(1)[:, None] != PATTERNS.flatten(1)[None]).sum(-1)},  # int64 (90, 90)
    "pairs": {_CPU: torch.tensor([[column in pair for column in range(4)] for pair in PAIRS])},  # bool (6, 4)
}


def _table(name: str, device: torch.device) -> torch.Tensor:
    tables = _TABLES[name]
    if device in tables:
        return tables[device]
    table = tables[_CPU].to(device)
    if not torch.compiler.is_compiling():  # a tensor of a traced graph must not outlive it
        tables[device] = table
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def _in_groups(x: torch.Tensor) -> bool:
    """Returns whether the last dimension of x divides into groups of four."""
    return x.dim() >= 2 and x.shape[-1] % 4 == 0


def _in_blocks(w: torch.Tensor) -> bool:
    """Returns whether w divides into 4x4 blocks."""
    return w.dim() == 2 and w.shape[0] % 4 == 0 and w.shape[1] % 4 == 0


def _check_groups(function: str, x: torch.Tensor) -> None:
    if not _in_groups(x):
        need = "at least two dimensions and a last one divisible by 4; pad with zeros or reshape"
        raise ValueError(f"{function}: shape {tuple(x.shape)}, need {need}")


def _check_blocks(function: str, w: torch.Tensor) -> None:
    if not _in_blocks(w):
        need = "(out, in) with both divisible by 4; change the layer"
        raise ValueError(f"{function}: shape {tuple(w.shape)}, need {need}")


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    """|x| in the dtype to compute in: float64 for float64, float32 for all others."""
    return x.abs().to(torch.promote_types(x.dtype, torch.float32))


def _top2(x: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest sum of two of four tensors, and which pair of PAIRS it is (0..5)."""
    best = torch.maximum(x[0], x[1]) + torch.maximum(x[2], x[3])
    pair = 1 + 2 * (x[1] > x[0]).to(torch.uint8) + (x[3] > x[2]).to(torch.uint8)  # 02, 03, 12, 13 are 1, 2, 3, 4
    for candidate, number in ((x[0] + x[1], 0), (x[2] + x[3], 5)):
        pair = torch.where(candidate > best, number, pair)
        best = torch.maximum(candidate, best)
    return best, pair


@torch.no_grad()
@kernel("transposable_index", takes=_in_blocks)
def transposable_index(w: torch.Tensor) -> torch.Tensor:
    """Algorithm 1: the pattern that keeps the largest L1 norm in each 4x4 block.

    The paper compares 90 sums; 8 candidates are enough. Per column of |w| let x = a-b, y = c-d, f = b-c, e = x+y+2f.
    The score of every pattern, minus the constant sum(c+d), is one of A = top2(e), C = sum(f) + top2(x) + top2(y), and
    B_jk = f_j+f_k + max(x_j,x_k) + max(y_j,y_k) + max(e_i,e_l).

    w: (out, in), any float dtype and strides. Returns uint8 (out/4, in/4), entries 0..89, also where w is not finite.
    The norm is the optimum within float32 rounding (1e-6 relative). Raises ValueError for other shapes.
    """
    _check_blocks("transposable_index", w)
    blocks = _magnitude(w.detach()).unflatten(0, (-1, 4)).unflatten(2, (-1, 4))  # (out/4, 4, in/4, 4)
    a, b, c, d = blocks.unbind(1)
    x, y, f = a - b, c - d, b - c
    e = x + y + 2 * f
    x, y, f, e = (t.unbind(-1) for t in (x, y, f, e))
    best, index = _top2(e)
    top_x, pair_x = _top2(x)
    top_y, pair_y = _top2(y)
    score = (f[0] + f[1]) + (f[2] + f[3]) + top_x + top_y
    index = torch.where(score > best, 6 + 6 * pair_x + pair_y, index)
    best = torch.maximum(score, best)
    for jk, (j, k) in enumerate(PAIRS):
        i, l = PAIRS[5 - jk]
        score = f[j] + f[k] + torch.maximum(x[j], x[k]) + torch.maximum(y[j], y[k]) + torch.maximum(e[i], e[l])
        bits = 4 * (e[l] > e[i]).to(torch.uint8) + 2 * (x[k] > x[j]).to(torch.uint8) + (y[k] > y[j]).to(torch.uint8)
        index = torch.where(score > best, 42 + 8 * jk + bits, index)
        best = torch.maximum(score, best)
    return index.to(torch.uint8)


def expand_index(index: torch.Tensor) -> torch.Tensor:
    """The mask, bool (out, in), of an index matrix of `transposable_index`, uint8 (out/4, in/4)."""
    if index.dtype != torch.uint8 or index.dim() != 2:
        need = "the uint8 (out/4, in/4) of transposable_index"
        raise ValueError(f"expand_index: {index.dtype} {tuple(index.shape)}, need {need}")
    blocks = _table("flat", index.device)[index.long()].unflatten(-1, (4, 4))  # (out/4, in/4, 4, 4)
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def transposable_mask(w: torch.Tensor) -> torch.Tensor:
    """The mask of `transposable_index`, bool (out, in): two kept in every row and column of each 4x4 block."""
    return expand_index(transposable_index(w))


def transposable_mask_2approx(w: torch.Tensor) -> torch.Tensor:
    """Sort-and-pick 2-approximation of Hubara et al. (2021), the baseline of the paper's Table 2.

    It visits the 16 entries of a block by decreasing magnitude and keeps an entry if its row and column have fewer than
    two. Some blocks end with 7 entries. w: (out, in). Returns bool (out, in). Raises ValueError for other shapes.
    """
    _check_blocks("transposable_mask_2approx", w)
    blocks = w.detach().abs().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)  # (R, C, 16)
    order = blocks.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    in_row, in_column = (torch.zeros(*blocks.shape[:2], 4, dtype=torch.int8, device=w.device) for _ in range(2))
    for entry in order.unbind(-1):
        entry = entry.unsqueeze(-1)
        free = (in_row.gather(-1, entry // 4) < 2) & (in_column.gather(-1, entry % 4) < 2)
        mask.scatter_(-1, entry, free)
        in_row.scatter_add_(-1, entry // 4, free.to(torch.int8))
        in_column.scatter_add_(-1, entry % 4, free.to(torch.int8))
    return mask.unflatten(-1, (4, 4)).transpose(1, 2).flatten(2).flatten(0, 1)


@torch.no_grad()
@kernel("pair_index", takes=_in_groups)
def pair_index(x: torch.Tensor) -> torch.Tensor:
    """Row-wise 2:4 mask (section 3.1): each group of four along the last dimension keeps its two largest magnitudes.

    x: (..., n), n divisible by 4. Returns the number of the pair in PAIRS, uint8 (..., n/4), entries 0..5. Ties keep
    the lower index; NaN counts as the largest. Raises ValueError for other shapes.
    """
    _check_groups("pair_index", x)
    a = _magnitude(x.detach())
    # The bits of magnitudes, read as integers, have the same order. All NaNs become one value, above inf.
    a = a.view(torch.int64 if a.dtype == torch.float64 else torch.int32)
    nan = 0x7FF0000000000001 if a.dtype == torch.int64 else 0x7F800001
    a0, a1, a2, a3 = a.clamp(max=nan).unflatten(-1, (-1, 4)).unbind(-1)
    # An element is kept if at most one other is larger, or equal and before it.
    ge01, ge02, ge03, ge12, ge13, ge23 = a0 >= a1, a0 >= a2, a0 >= a3, a1 >= a2, a1 >= a3, a2 >= a3
    keeps0 = (ge01 & (ge02 | ge03)) | (ge02 & ge03)
    keeps1 = (ge12 & ge13) | (~ge01 & (ge12 | ge13))
    keeps3 = (~ge03 & ~ge13) | (~ge23 & ~(ge03 & ge13))
    low = torch.where(keeps0, 0, torch.where(keeps1, 1, 2))
    high = torch.where(keeps3, 3, torch.where(keeps0 & keeps1, 1, 2))
    return (low + high - (low == 0).long()).to(torch.uint8)


def expand_pairs(index: torch.Tensor) -> torch.Tensor:
    """The mask, bool (..., n), of an index matrix of `pair_index`, uint8 (..., n/4)."""
    if index.dtype != torch.uint8:
        raise ValueError(f"expand_pairs: {index.dtype}, need the uint8 of pair_index")
    return _table("pairs", index.device)[index.long()].flatten(-2)


def _expand(index: torch.Tensor, kind: str) -> torch.Tensor:
    return (expand_index if kind == "transposable" else expand_pairs)(index)


def mask24(w: torch.Tensor) -> torch.Tensor:
    """The mask of `pair_index`, bool of w's shape. Raises ValueError for other shapes."""
    return expand_pairs(pair_index(w))


def flip_rate(before, after) -> float:
    """Definition 4.1: the share of mask entries that differ, ||m(w_t) - m(w_{t-1})||_1 / D, a fraction per step.

    before, after: two bool masks, two uint8 index matrices, or two lists of them, one for each layer, weighted
    by its number of entries. Row-wise indices (0..5) work too: pattern p < 6 keeps pair p in two rows and its
    complement in the other two, so the rate is the same. If masks are sharded, each rank counts its own rows and the
    counts are summed. Raises ValueError where shapes or dtypes differ.
    """
    if torch.is_tensor(before):
        before, after = [before], [after]
    flips, entries = [], 0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype or old.dtype not in (torch.bool, torch.uint8):
            need = "need two bool masks or two uint8 index matrices of one shape"
            given = f"{old.dtype} {tuple(old.shape)} against {new.dtype} {tuple(new.shape)}"
            raise ValueError(f"flip_rate: {given}, {need}")
        old_rows, new_rows, is_mask = local(old), local(new), old.dtype == torch.bool
        distance = old_rows != new_rows
        if not is_mask:
            distance = _table("hamming", old_rows.device)[old_rows.long(), new_rows.long()]
        flips.append(total(distance.sum(), old))
        entries += old.numel() * (1 if is_mask else 16)
    return int(torch.stack(flips).sum()) / entries if entries else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# MVUE: the minimum-variance unbiased 2:4 estimator of a gradient (Eq. 6; Chmiel et al., 2023)
#
# Let a = |x| and S = sum a. Element i is kept with probability pi_i, with the value x_i/pi_i. The variance
# sum a_i^2/pi_i, under sum pi = 2 and pi <= 1, is smallest for pi_i = min(a_i/h, 1) with h = min(S/2, S - max a); so
# kept magnitudes are max(a_i, h). Systematic sampling draws two elements with one uniform u per group. Let
# b_i = min(a_i, h), whose sum is 2h, and C_i its running sums. The elements are kept whose interval [C_{i-1}, C_i)
# contains u h or u h + h. These are always two distinct elements.
#
# Randomness is stateless. The uniform of (row, group of four columns) is one word of Philox4x32-10 (Salmon et al.,
# 2011), a function of the seed and the position alone. One counter gives four words: to rows r and r+8 of a 16-row tile
# and to column groups q and q+4 of a 32-column tile, because one GPU thread owns exactly these four.

_MASK32 = 0xFFFFFFFF


def philox4x32(counter: Sequence[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four words from four counter words and two key words, all int64 tensors that hold uint32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # may overflow int64, but the bits are right
        high0, high1 = (product0 >> 32) & _MASK32, (product1 >> 32) & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK32, high0 ^ c3 ^ k1, product0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _seed_tensor(seed, device) -> torch.Tensor:
    if torch.is_tensor(seed):
        return seed.to(device or seed.device, torch.int64)
    return torch.tensor((int(seed) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def group_uniforms(rows: int, groups: int, seed, device=None, stream: int = 0) -> torch.Tensor:
    """One uniform in [0, 1) per (row, group of four), float32 (rows, groups), multiples of 2^-23.

    seed: the Philox key, an int (taken modulo 2^64) or an int64 0-d tensor. Streams give independent draws.
    Counter of (r, q): (8 (r//16) + r%8) * 4 ceil(groups/8) + 4 (q//8) + q%4; word: 2 (r//8 % 2) + (q//4 % 2).
    """
    tiles, panels = -(-rows // 16), -(-groups // 8)
    seed = _seed_tensor(seed, device)
    counter = torch.arange(tiles * 8 * panels * 4, dtype=torch.int64, device=seed.device)
    zero, key = torch.zeros_like(counter), (seed & _MASK32, (seed >> 32) & _MASK32)
    words = philox4x32((counter & _MASK32, counter >> 32, zero + stream, zero), key)
    words = torch.stack(words).view(2, 2, tiles, 8, panels, 4)  # (row half, column half, tile, row, panel, column)
    words = words.permute(2, 0, 3, 4, 1, 5).reshape(tiles * 16, panels * 8)[:rows, :groups]
    return (words & 0x7FFFFF).float() * 2.0**-23


def mvue24_with_mask(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `mvue24`, and the mask of the kept elements: bool of x's shape, two True in every group."""
    _check_groups("mvue24", x)
    groups, shape = x.unflatten(-1, (-1, 4)), (*x.shape[:-1], x.shape[-1] // 4)
    a0, a1, a2, a3 = _magnitude(groups).unbind(-1)
    if u is None:
        u = group_uniforms(math.prod(shape[:-1]), shape[-1], seed, x.device).to(x.device).view(shape)
    if u.shape != shape:
        raise ValueError(f"mvue24: u has shape {tuple(u.shape)}, need {shape}, one uniform per group of four")
    u = u.to(a0.dtype)
    # S - max a, computed as the sum of the three smallest, so that nothing cancels.
    max01, max23 = torch.maximum(a0, a1), torch.maximum(a2, a3)
    rest = torch.minimum(a0, a1) + torch.minimum(a2, a3) + torch.minimum(max01, max23)
    h = torch.minimum(rest, ((a0 + a1) + (a2 + a3)) / 2)
    t = u * h
    t = torch.where(t < h, t, 0)  # u * h can round up to a subnormal h, and t = h would keep a zero
    s = h - t
    # The first element is the first i with C_i > t. The second is the last i whose suffix sum of b is at least s. In
    # exact arithmetic the other conditions are always true. They guard against rounding: the two elements are distinct,
    # a zero never replaces a non-zero element, and an inner element above h, whose pi is 1, is always kept.
    past0 = a0 <= t
    past1 = a0 + a1 <= t
    from3 = ((a3 >= s) & (a2 <= h) & (past0 | (a1 <= h))) | past1 | (past0 & (a2 == 0))
    from2 = ((a2 + a3 >= s) & (a1 <= h)) | past0
    low = torch.where(past1, 2, past0.to(torch.int8))
    high = torch.where(from3, 3, 1 + from2.to(torch.int8))
    position = torch.arange(4, device=x.device, dtype=torch.int8)
    mask = (position == low.unsqueeze(-1)) | (position == high.unsqueeze(-1))
    # Copy the sign instead of multiplying by it: beside infinities a kept zero would become 0 * inf = NaN.
    values = torch.copysign(torch.maximum(_magnitude(groups), h.unsqueeze(-1)), groups)
    return torch.where(mask, values, 0).flatten(-2).to(x.dtype), mask.flatten(-2)


@kernel("mvue24", takes=lambda x, seed, u=None: u is None and _in_groups(x))
def mvue24(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> torch.Tensor:
    """Exact MVUE: the unbiased 2:4 sample of x along its last dimension with the smallest variance (Eq. 6).

    x: (..., n), n divisible by 4, any strides. float64 is computed in float64, all other dtypes in float32, rounded
    once. seed: int or int64 0-d tensor. u: uniforms (..., n/4) in [0, 1) that replace the seeded draw.
    Returns x's shape and dtype. Each group keeps two non-zero elements if it has two; a group with a non-finite element
    stays non-finite. Raises ValueError for a 1-D x, n % 4 != 0 or another shape of u.
    """
    return mvue24_with_mask(x, seed, u)[0]


def mvue24_sequential(x: torch.Tensor, seed) -> torch.Tensor:
    """The predecessors' estimator, as a baseline: two draws without replacement, unbiased but with a larger variance.

    It draws i, then j != i, with probability proportional to magnitude, and divides by the exact inclusion probability
    a_i/S + a_i * sum_{j != i} a_j / (S (S - a_j)). Arguments, dtypes and errors are those of `mvue24`.
    """
    _check_groups("mvue24_sequential", x)
    shape = (*x.shape[:-1], x.shape[-1] // 4, 1)
    u, v = (
        group_uniforms(math.prod(shape[:-2]), shape[-2], seed, x.device, stream).to(x.device).view(shape)
        for stream in (0, 1)
    )
    groups = x.unflatten(-1, (-1, 4))
    a = _magnitude(groups)
    sums = a.sum(-1, keepdim=True)
    inclusion = a / sums
    for j in range(4):  # j first, then i
        others = [i for i in range(4) if i != j]
        rest = a[..., others].sum(-1, keepdim=True)  # S - a_j, without cancellation
        inclusion[..., others] += torch.where(rest > 0, a[..., j : j + 1] / sums * (a[..., others] / rest), 0)

    def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        running = weights.cumsum(-1)
        return (running <= uniform * running[..., -1:]).sum(-1, keepdim=True).clamp(max=3)

    first = draw(a, u)
    second = draw(a.scatter(-1, first, 0), v)
    mask = torch.zeros_like(a, dtype=torch.bool).scatter_(-1, first, True).scatter_(-1, second, True)
    values = torch.where(groups == 0, 0, groups / inclusion)
    finite = torch.isfinite(sums)
    return torch.where(mask | ~finite, values, 0).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Soft threshold (S-STE; Hu et al., NeurIPS 2024), simulated FP8, and masked decay (Eq. 10)


@kernel("soft_threshold24", takes=_in_groups)
def soft_threshold24(w: torch.Tensor) -> torch.Tensor:
    """S-STE's continuous pruning: S(w) = sign(w) * max(|w| - t, 0), t the second-smallest magnitude of the group.

    w: (..., n), n divisible by 4, groups of four along the last dimension, any strides. Returns w's shape and dtype, at
    most two non-zeros per group. Raises ValueError for other shapes.
    """
    _check_groups("soft_threshold24", w)
    groups = w.unflatten(-1, (-1, 4))
    a = _magnitude(groups)
    threshold = a.sort(dim=-1).values[..., 1:2]
    return (torch.sign(groups) * (a - threshold).clamp(min=0)).flatten(-2).to(w.dtype)


def soft_threshold24_backward(ds: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The true gradient of S-STE's soft threshold. ds (..., n) is the gradient of S(w). Returns dw of the same shape
    and dtype.

    Elements above the threshold t = |w_k| have S_i = w_i - sign(w_i) t. So dw_i = ds_i for these, element k gets
    -sign(w_k) times the sum of their sign(w_i) ds_i, and the smallest element gets 0. If several magnitudes equal t,
    k is one of them.
    """
    _check_groups("soft_threshold24_backward", w)
    groups, ds = w.unflatten(-1, (-1, 4)), ds.unflatten(-1, (-1, 4))
    a = _magnitude(groups)
    each, other = a.unsqueeze(-1), a.unsqueeze(-2)  # comparisons: a sort is slow on a GPU and cannot be fused
    before = torch.ones(4, 4, dtype=torch.bool, device=a.device).tril(-1)  # a tie counts the first element as smaller
    is_k = ((other < each) | ((other == each) & before)).sum(-1) == 1
    above = a > torch.where(is_k, a, 0).sum(-1, keepdim=True)
    signs = torch.sign(groups)
    through = torch.where(above, ds, 0)
    share = -signs * (signs * through).sum(-1, keepdim=True)
    return torch.where(is_k, share.to(ds.dtype), through).flatten(-2)


@kernel("sste_scale", takes=_in_groups)
def sste_scale(w: torch.Tensor) -> torch.Tensor:
    """S-STE's least-squares scale beta = <w, S(w)> / <S(w), S(w)>, or 1 if S(w) is 0. w: (..., n), n divisible by 4.
    Returns a float32 0-d tensor on w's device (float64 for float64 w). Raises ValueError for other shapes."""
    soft = soft_threshold24.torch(w).to(torch.promote_types(w.dtype, torch.float32))
    square = soft.square().sum()
    return torch.where(square > 0, (w.to(soft.dtype) * soft).sum() / square, 1)


def simulate_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round x to an FP8 type (torch.float8_e4m3fn or torch.float8_e5m2) and back. One scale maps x's largest magnitude
    to the type's largest. Zeros stay zeros; one non-finite element makes all elements non-finite."""
    amax = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    largest = torch.finfo(dtype).max
    scale = torch.where(amax == 0, 1.0, (largest / amax).clamp(max=torch.finfo(torch.float32).max))
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


@torch.no_grad()
def masked_decay_(grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
    """Eq. 10, in place: grad += decay * ~mask * w. Returns grad. grad, w: one shape. mask: bool of that shape, or its
    uint8 index matrix. Raises ValueError for anything else. (kernels.adamw_ adds the decay itself.)"""
    if mask.dtype == torch.uint8 and w.dim() == 2 and mask.shape == (w.shape[0] // 4, w.shape[1] // 4):
        mask = expand_index(mask)
    if not grad.shape == w.shape == mask.shape or mask.dtype != torch.bool:
        given = f"grad {tuple(grad.shape)}, w {tuple(w.shape)}, mask {mask.dtype} {tuple(mask.shape)}"
        need = "need one shape and a bool mask, or the uint8 index matrix of one"
        raise ValueError(f"masked_decay_: {given}; {need}")
    return grad.add_(torch.where(mask, 0, w).to(grad.dtype), alpha=decay)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: every choice in which one method of 2:4 training differs from another. FST and its ablations are here; every
# other method is a file in methods/. C is the pruning, Z = X C(W)^T, and S is the soft threshold.
#
# fst      Hu et al., ICML 2024: the equations at the top of this file. New masks every 40 steps; the last 1/6 of the
#          steps is dense (section 4.4); dW is used as the gradient of W (straight through).
# ste      fst without decay, MVUE and dense phase: the flip-rate explosion of Figure 1.
# sr_ste   Zhou et al., ICLR 2021. M is row-wise by magnitude, new every step; dX uses the same W*M as a dense matrix.
#              W <- W - lr * decay * ~M * W, beside Adam's update and not through its moments           Eq. 8
# s_ste    Hu et al., NeurIPS 2024. C(W) = beta S(W), which is continuous in W. beta = <W, S(W)> / <S(W), S(W)> is set
#          when the layer becomes sparse, then fixed. dX uses the same C(W) as a dense matrix. The gradient of W is the
#          true one, beta J^T dC, J the Jacobian of S and dC = MVUE(dZ^T) X. At learning rate 3e-3 its loss was lower
#          than that of s_ste_straight (results/quality-6seeds.md). At better rates the difference is not known.
# s_ste_straight  s_ste as published: dC is used as the gradient of W.

# Fields that are also settings of train.py. To change other fields, edit RECIPES or the method's file.
SETTINGS = ("mask_interval", "masked_decay", "mvue", "dense_finetune", "dense_pretrain")


@dataclass(frozen=True)
class Recipe:
    """One method of 2:4 training. Shares are fractions of max_iters, intervals are in optimizer steps. Raises
    ValueError if a field is out of range or does not go with the others."""

    name: str
    # "transposable", "row" (row-wise by magnitude), "soft" (soft threshold, row-wise) or "none" (weights stay dense)
    mask: str = "transposable"
    mvue: bool = False  # 2:4 weight-gradient GEMM through MVUE, else a dense one
    masked_decay: float = 0.0  # the decay factor lambda itself; 0 = none
    decay_on: str = "grad"  # "grad": Eq. 10; "weight": SR-STE's Eq. 8
    mask_interval: int = 40  # steps between mask refreshes
    dense_finetune: float = 0.0  # share of the steps that are dense, at the end
    dense_pretrain: float = 0.0  # share of the steps that are dense, at the start
    dense_pretrain_latest: float = 0.0  # if above 0, the optimizer ends the dense start, at this share at the latest
    weight_gradient: str = "straight"  # soft masks: "straight" through, or "true" (times beta and the Jacobian)
    fp8: bool = False  # simulate FP8 GEMMs: W and X in E4M3, dZ in E5M2, one scale per tensor
    # Subclass of Sparse24Linear that computes the method, or one for each name that a linear has in its module, such as
    # {"c_fc": ..., "c_proj": ...}. None = Sparse24Linear
    layer: type | dict[str, type] | None = None
    ffn: Callable | None = None  # ffn(x, c_fc, c_proj, plan) computes whole feed-forward layers, see methods/act24.py
    # `ffn` follows a plan (gemm24/plan.py) in which the hidden activations are 2:4, and soft weights too
    activations24: bool = False
    activation: str = ""  # the activation that the method needs; "" = any
    check: Callable | None = None  # check(settings) raises ValueError if the method cannot run with these settings
    optimizer: type | None = None  # subclass of MaskedDecayAdamW that the method trains with; None = MaskedDecayAdamW

    def __post_init__(self):
        def extends(value, base: str) -> bool:
            if isinstance(value, dict):
                return all(extends(one, base) for one in value.values())
            return value is None or (isinstance(value, type) and issubclass(value, globals()[base]))  # defined below

        soft, share = self.mask == "soft", "a fraction of max_iters from 0 to 1"
        first, last, latest = self.dense_pretrain, self.dense_finetune, self.dense_pretrain_latest
        start = f"dense_pretrain above 0 and at most dense_pretrain_latest={latest}"
        needs = [  # (field, whether its value is right, the need)
            ("mask", self.mask in ("transposable", "row", "soft", "none"), "transposable, row, soft or none"),
            ("decay_on", self.decay_on in ("grad", "weight"), "grad or weight"),
            ("weight_gradient", self.weight_gradient in ("straight", "true"), "straight or true"),
            ("weight_gradient", soft or self.weight_gradient == "straight", "mask='soft' for weight_gradient='true'"),
            ("masked_decay", 0 <= self.masked_decay < math.inf, "a finite factor of at least 0"),
            ("masked_decay", not self.masked_decay or self.mask != "none", "0 for mask='none'"),
            ("masked_decay", not self.masked_decay or self.ffn is None, "0 for a method that prunes activations"),
            ("mask_interval", self.mask_interval >= 1, "at least 1 step"),
            ("mask_interval", not soft or self.mask_interval == 1, "mask_interval=1 for mask='soft'"),
            ("dense_finetune", 0 <= last <= 1, share),
            ("dense_pretrain", 0 <= first <= 1, share),
            ("dense_pretrain_latest", 0 <= latest <= 1, share),
            ("dense_pretrain", first + last <= 1, "dense_pretrain + dense_finetune <= 1"),
            ("dense_pretrain", not latest or 0 < first <= latest, start),
            ("layer", extends(self.layer, "Sparse24Linear"), "a subclass of Sparse24Linear, or None"),
            ("optimizer", extends(self.optimizer, "MaskedDecayAdamW"), "a subclass of MaskedDecayAdamW, or None"),
        ]
        for field, met, need in needs:
            if not met:
                raise ValueError(f"Recipe {self.name!r}: {field}={getattr(self, field)!r}, need {need}")

    @property
    def virtual_mask(self) -> str:
        """The kind of mask that the flip rate counts: "transposable", or "row" for row-wise and soft masks."""
        return "transposable" if self.mask == "transposable" else "row"

    @property
    def fused(self) -> bool:
        """Returns whether one function that follows a plan computes a whole FFN: gemm24/ffn.py's, or `ffn`."""
        return self.activations24 or (self.ffn is None and self.layer is None and not self.fp8)

    def layer_class(self, name: str) -> type:
        """The class of a sparse linear. name: its own name in its module. Raises ValueError for a name without class.

        (The name of the linear "transformer.h.0.mlp.c_fc" in its module is "c_fc".)"""
        layers = self.layer if isinstance(self.layer, dict) else {name: self.layer}
        if name not in layers:
            need = f"need linears named {', '.join(layers)}"
            raise ValueError(f"recipe {self.name!r} has no class for the linear {name!r}, {need}")
        return layers[name] or Sparse24Linear


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fst", mvue=True, masked_decay=6e-5, dense_finetune=1 / 6),
        Recipe("ste"),
        Recipe("sr_ste", mask="row", masked_decay=2e-4, decay_on="weight", mask_interval=1),
        Recipe("s_ste", mask="soft", mvue=True, mask_interval=1, weight_gradient="true"),
        Recipe("s_ste_straight", mask="soft", mvue=True, mask_interval=1),
    )
}


def recipe_names() -> list[str]:
    """All names that `get_recipe` takes: the names in RECIPES, and of the files in the folder methods if it exists."""
    folder = importlib.util.find_spec("methods")
    files = pkgutil.iter_modules(folder.submodule_search_locations or ()) if folder else ()
    return [*RECIPES, *sorted(file.name for file in files)]


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself. A name that is not in RECIPES names a file: "mine" is RECIPE in
    methods/mine.py. Raises ValueError if there is no such name or file, if the file cannot be imported, or if its
    RECIPE has another name."""
    if isinstance(recipe, Recipe):
        return recipe
    names = recipe_names()
    if names.count(recipe) > 1:
        raise ValueError(f"methods/{recipe}.py has the name of a recipe in sparse24.py; rename the file and its RECIPE")
    if recipe in RECIPES:
        return RECIPES[recipe]
    if recipe not in names:
        likely = difflib.get_close_matches(recipe, names, 1)
        advice = f"did you mean {likely[0]!r}?" if likely else "a new one is a file in methods/, see its README.md"
        raise ValueError(f"recipe {recipe!r} is unknown, need one of {', '.join(names)}; {advice}")
    try:
        module = importlib.import_module(f"methods.{recipe}")
    except Exception as error:  # the file is the user's, and so are its mistakes
        raise ValueError(f"methods/{recipe}.py cannot be imported: {type(error).__name__}: {error}") from error
    file_recipe = getattr(module, "RECIPE", None)
    if not isinstance(file_recipe, Recipe) or file_recipe.name != recipe:
        name = getattr(file_recipe, "name", file_recipe)
        need = f"need RECIPE = Recipe({recipe!r}, ...)"
        raise ValueError(f"methods/{recipe}.py has no RECIPE of the file's name, {need}; there it is {name!r}")
    return file_recipe


def recipe_of(settings: dict) -> Recipe | None:
    """The recipe that settings["sparse"] names, with the fields of SETTINGS that `settings` has. None for "none".
    Other keys are ignored."""
    if settings["sparse"] == "none":
        return None
    return replace(get_recipe(settings["sparse"]), **{name: settings[name] for name in SETTINGS if name in settings})


# ---------------------------------------------------------------------------------------------------------------------
# Sharded weights. Between steps FSDP2 holds a weight W (out, in) as a DTensor, Shard(0): each of n ranks has a shard
# of ceil(out / n) rows. A mask is searched in 4x4 blocks, or in groups of four along a row. So if a shard has a
# multiple of four rows (`fits`), every rank searches the masks of its own rows, and only masks are gathered, one byte
# per 16 weights. Layers hold unsharded masks. The functions here also take plain tensors, which hold all rows.


def is_dtensor(t: torch.Tensor) -> bool:
    return hasattr(t, "placements")  # isinstance would need DTensor, whose import takes most of a second


def local(t: torch.Tensor) -> torch.Tensor:
    """This rank's rows. Shares memory with t."""
    return t.to_local() if is_dtensor(t) else t


def whole(t: torch.Tensor) -> torch.Tensor:
    """All rows, on every rank. A collective if t is sharded."""
    return t.full_tensor() if is_dtensor(t) else t


def piece(w: torch.Tensor) -> int:
    """The number of this rank's shard. The mesh has a last dimension of shards, and for HSDP a first of replicas."""
    return w.device_mesh.get_local_rank(w.device_mesh.ndim - 1) if is_dtensor(w) else 0


def cut(rows: int, ranks: int) -> list[int]:
    """The number of rows on each rank, as torch.chunk splits them: the last ranks may have fewer rows, or none."""
    step = -(-rows // ranks)
    return [max(0, min(step, rows - k * step)) for k in range(ranks)]


def fits(rows: int, ranks: int) -> bool:
    """Returns whether every 4x4 block of a matrix with this number of rows lies on one rank."""
    return cut(rows, ranks)[0] % 4 == 0 or ranks == 1


def rows_of(w: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows of an unsharded mask that belong to this rank's rows of w. `mask` may also be an index matrix, which has
    one row per four rows of w."""
    if not is_dtensor(w):
        return mask
    per_row = w.shape[0] // mask.shape[0]
    first = sum(cut(w.shape[0], w.device_mesh.size(w.device_mesh.ndim - 1))[: piece(w)])
    return mask[first // per_row : (first + local(w).shape[0]) // per_row]


def by_rows(function: Callable, w: torch.Tensor, per_row: int) -> torch.Tensor:
    """function(w), sharded as w is. The result (out / per_row, n) has one row per `per_row` rows of w."""
    part = function(local(w))
    if not is_dtensor(w):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((w.shape[0] // per_row, *part.shape[1:]))
    layout = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    return DTensor.from_local(part, w.device_mesh, w.placements, run_check=False, **layout)


def total(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum `part`, in place, over the ranks that hold shards of `like`. A collective if `like` is sharded."""
    if is_dtensor(like):
        torch.distributed.all_reduce(part, group=like.device_mesh.get_group(like.device_mesh.ndim - 1))
    return part


# ---------------------------------------------------------------------------------------------------------------------
# The layer

# Device types that have autocast. A constant, because torch.compile before torch 2.13 cannot trace the call.
AUTOCAST = frozenset(t for t in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(t))


def mask_index(w: torch.Tensor, kind: str) -> torch.Tensor:
    """The index matrix of w's mask of kind "transposable" or "row". w: (out, in). The result is sharded as w is, unless
    the shards of w split 4x4 blocks (possible in dense runs): then it is unsharded."""
    if kind != "transposable":
        return by_rows(pair_index, w, 1)
    if is_dtensor(w) and not fits(w.shape[0], w.device_mesh.size(-1)):
        return transposable_index(whole(w))
    return by_rows(transposable_index, w, 4)


def prune(w: torch.Tensor, index: torch.Tensor | None, beta: torch.Tensor | None, mask: str) -> torch.Tensor:
    """W*M, or beta S(W) for soft masks: 2:4 along the rows. W itself for mask "none"."""
    if mask == "none":
        return w
    if mask == "soft":
        return soft_threshold24(w) * beta
    return torch.where(_expand(index, mask), w, 0)


def through_soft(dw: torch.Tensor, w: torch.Tensor, beta: torch.Tensor | None, kind: str) -> torch.Tensor:
    """The gradient of W from dw, that of beta S(W): dw itself ("straight"), or times beta and S's Jacobian ("true")."""
    return soft_threshold24_backward(dw, w) * beta if kind == "true" else dw


@torch.library.custom_op("nano24::prune_again", mutates_args=())
def prune_again_op(
    w: torch.Tensor, index: torch.Tensor | None, beta: torch.Tensor | None, mask: str, dz: torch.Tensor
) -> torch.Tensor:
    """`prune` in the backward. Opaque to torch.compile, which would otherwise keep the pruned weight of the forward.
    `dz` is unused: it only makes the op run in the backward."""
    return prune(w, index, beta, mask)


@prune_again_op.register_fake
def _(w, index, beta, mask, dz):
    return torch.empty_like(w)


class _LayerMode(NamedTuple):
    """The fields of the recipe and the layer that _MaskedLinear reads."""

    mask: str
    mvue: bool
    weight_gradient: str
    fp8: bool
    prune_again: bool  # prune the weights a second time in the backward, instead of saving the pruned ones


class _MaskedLinear(torch.autograd.Function):
    """Eq. 2-7: Z = X w_24^T + b; dX = dZ (w_24 * backward_mask); dW = MVUE(dZ^T) X, then `through_soft`; db from the
    unpruned dZ. master: the weight to prune. For soft masks it is the weight before autocast. backward_mask: bool, or
    None to use w_24 in the backward too."""

    @staticmethod
    def operands(master, index, backward_mask, beta, dtype, mode, dz=None):
        """The weight operands of Z and of dX. dz: only in the backward."""
        pruning = (master, index, beta, mode.mask)
        w_24 = (prune(*pruning) if dz is None else prune_again_op(*pruning, dz)).to(dtype)
        w_back = w_24 if backward_mask is None else torch.where(backward_mask, w_24, 0)
        if mode.fp8:
            w_24 = simulate_fp8(w_24, torch.float8_e4m3fn)
            w_back = w_24 if backward_mask is None else simulate_fp8(w_back, torch.float8_e4m3fn)
        return w_24, w_back

    @staticmethod
    def forward(ctx, x, weight, master, index, backward_mask, bias, seed, beta, mode):
        # `weight` only receives the gradient. Copy the seed, because the next micro-step may overwrite it.
        w_24, w_back = _MaskedLinear.operands(master, index, backward_mask, beta, weight.dtype, mode)
        x = simulate_fp8(x, torch.float8_e4m3fn) if mode.fp8 else x
        masks = (index, backward_mask) if mode.prune_again else (None, None)
        master = master if mode.prune_again or mode.weight_gradient == "true" else None
        seed = seed.clone() if mode.mvue else None
        ctx.save_for_backward(x, None if mode.prune_again else w_back, master, *masks, seed, beta)
        ctx.mode, ctx.dtype = mode, weight.dtype
        return F.linear(x, w_24, bias)

    @staticmethod
    @once_differentiable  # a second derivative would be silently wrong: it would miss the weight's part
    def backward(ctx, dz):
        x, w_back, master, index, backward_mask, seed, beta = ctx.saved_tensors
        mode, dx, dw, db = ctx.mode, None, None, None
        if ctx.needs_input_grad[0]:
            if mode.prune_again:
                _, w_back = _MaskedLinear.operands(master, index, backward_mask, beta, ctx.dtype, mode, dz)
            dx = (simulate_fp8(dz, torch.float8_e5m2) if mode.fp8 else dz) @ w_back
        dz = dz.reshape(-1, dz.shape[-1])  # (BT, out)
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])  # (BT, in)
            dz_t = dz.t()
            if mode.mvue:
                padding = -dz.shape[0] % 4
                if padding:  # exact: MVUE never keeps a zero in place of a non-zero element, and zeros add nothing
                    x, dz_t = F.pad(x, (0, 0, 0, padding)), F.pad(dz_t, (0, padding))
                dz_t = mvue24(dz_t, seed)
            dw = (simulate_fp8(dz_t, torch.float8_e5m2) if mode.fp8 else dz_t) @ x
            dw = through_soft(dw, master, beta, mode.weight_gradient)
        if ctx.needs_input_grad[5]:
            db = dz.sum(0)
        return dx, dw, None, None, None, db, None, None, None


_NEED_FOURS = "need both divisible by 4; change the width or leave this layer dense"
_NEED_WEIGHT = "has no weight Parameter; undo weight_norm, spectral_norm, prune or parametrize by its remove function"
_warn_once = functools.cache(warnings.warn)  # once per process and message


class Sparse24Linear(nn.Linear):
    """An nn.Linear whose weight is 2:4 sparse in the forward pass, and in the backward pass where its recipe says so.

    `.weight` (out, in) stays dense: the optimizer updates it. The state_dict also has
    `.index`   the mask, set by `refresh_masks`; `.mask` is its bool (out, in) form. Transposable: uint8 (out/4, in/4)
               of transposable_index. Row-wise and soft: uint8 (out, in/4) of pair_index.
    `.beta`    0-d, the scale of soft weights.
    `.sparse`  bool; False = the dense phase, in which this is a plain nn.Linear. Saved as extra state, a bool tensor.
    The state_dict does not have
    `.seed`    int64 0-d tensor that MVUE reads. `seed_draws` sets it, as a function of the step.
    `.prune_again`  True = prune a second time in the backward. FSDP needs this: it frees the weight after the forward.
    The mask of a new or reset layer matches its weights. So does that of a layer which loads the state_dict of a dense
    linear, also with strict=True. Call `refresh_masks` after setting only the weights. Between steps of FSDP2 `.weight`
    is sharded, and `pruned_weight` and `densify(prune=True)` cannot be used.
    x: (..., in), any number of tokens. Under autocast all GEMMs run in its dtype, as in nn.Linear.
    Raises ValueError if in or out is not divisible by 4, or if the recipe needs a subclass.

    A method in methods/ subclasses this and overrides some of `new_index`, `refresh`, `begin_step`,
    `begin_micro_batch`, `backward_mask`, `make_state` and `forward`.
    """

    def __init__(self, in_features, out_features, bias=True, recipe="fst", device=None, dtype=None):
        if in_features % 4 or out_features % 4:
            raise ValueError(f"Sparse24Linear: {in_features} in, {out_features} out, {_NEED_FOURS}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        recipe = get_recipe(recipe)
        classes = recipe.layer.values() if isinstance(recipe.layer, dict) else [recipe.layer or Sparse24Linear]
        if not isinstance(self, tuple(classes)):
            need = f"needs {' or '.join(one.__name__ for one in classes)}; use that class, or sparsify"
            raise ValueError(f"Sparse24Linear: recipe {recipe.name!r} {need}")
        self._begin_sparse(recipe)

    def _begin_sparse(self, recipe: Recipe) -> None:
        """Give this linear, whose class is a sparse one now, its attributes and buffers."""
        before = {*dir(self)}
        self.recipe, self.sparse, self.seeded, self.prune_again = recipe, True, False, False
        self.make_state()
        self.added = {*dir(self), "added"} - before  # densify removes them

    def make_state(self) -> None:
        """Create the buffers, for the present weight."""
        self.register_buffer("index", self.new_index())
        if self.recipe.mask == "soft":
            self.register_buffer("beta", sste_scale(self.weight.detach()))
        self._seed = torch.zeros((), dtype=torch.int64, device=self.weight.device)

    @property
    def seed(self) -> torch.Tensor:
        # It is no buffer, because DDP overwrites buffers with those of rank 0. So it moves after the weight here.
        device = self.weight.device
        if self._seed.device != device:
            self._seed = torch.zeros_like(self._seed, device=device) if self._seed.is_meta else self._seed.to(device)
        return self._seed

    def forward_seed(self) -> torch.Tensor:
        """`.seed`, for a forward pass. Warns, once per process, of a training pass that no `seed_draws` preceded."""
        if torch.is_grad_enabled() and self.weight.requires_grad and not torch.compiler.is_compiling():
            self.warn_without_seeds()
        return self.seed

    def warn_without_seeds(self) -> None:
        if self.training and self.recipe.mvue and not self.seeded:
            need = "need seed_draws(model, seed, iter_num, micro_batch) before each training forward pass"
            _warn_once(f"Sparse24Linear: without seeds MVUE draws the same numbers in every step, {need}")

    def new_index(self) -> torch.Tensor:
        """The index matrix of the mask for the present weight, unsharded. It is empty for mask "none"."""
        if self.recipe.mask == "none":
            return torch.empty(0, dtype=torch.uint8, device=self.weight.device)
        return whole(mask_index(self.weight, self.recipe.virtual_mask))

    def begin_micro_batch(self, iter_num: int, micro_batch: int) -> None:
        """Called by `seed_draws`, before every forward pass of a training step."""
        self.seeded = True

    def begin_step(self, seed: int, iter_num: int, number: int, begin: bool = False) -> None:
        """Called before every step in the sparse phase, and before its evaluation; does nothing. number: the layer's
        number in the model. begin: True in the first step of a sparse phase. A resumed run repeats the call of its
        first step, so a method must derive its random numbers from seed, iter_num and number."""

    @torch.no_grad()
    def refresh(self, begin: bool = False) -> None:
        """Recompute the mask from the weights, in place, without waiting for the GPU. begin: True at the start of a
        sparse phase, to recompute beta too. A collective if the weights are sharded."""
        self.index.copy_(self.new_index())
        if begin and self.recipe.mask == "soft":
            self.beta.copy_(sste_scale(whole(self.weight.detach())))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "index" in self._buffers:  # nn.Linear's __init__ calls this before the buffers exist
            self.make_state()

    def _apply(self, fn, recurse=True):
        was_meta = self.index.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.index.is_meta:  # to_empty: the index is arbitrary memory
            self.make_state()
        for name in ("flat", "pairs"):
            _table(name, self.index.device)  # copy the table now, so that no forward has to
        return self

    @property
    def mask(self) -> torch.Tensor:
        """The current mask, bool (out, in), True = kept."""
        if self.recipe.mask == "none":
            return torch.ones_like(self.weight, dtype=torch.bool)
        return _expand(self.index, self.recipe.mask)

    def mask_rows(self) -> torch.Tensor:
        """The rows of `.mask` that belong to this rank's rows of the weight."""
        return _expand(rows_of(self.weight, self.index), self.recipe.mask)

    @property
    def backward_mask(self) -> torch.Tensor | None:
        """A second mask for dX, bool (out, in), applied to the pruned weight; None if dX uses the pruned weight."""
        return None

    def pruned_weight(self) -> torch.Tensor:
        """The weight operand of the sparse phase, (out, in), 2:4 along in: W*M with the current mask, or beta S(W)."""
        return prune(self.weight.detach(), self.index, self.scale, self.recipe.mask)

    @property
    def scale(self) -> torch.Tensor | None:
        """beta of soft weights; None for other masks."""
        return self.beta if self.recipe.mask == "soft" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sparse:
            return super().forward(x)
        if self.recipe.ffn:
            need = "the module that holds this linear must call recipe.ffn, as model.MLP does"
            raise RuntimeError(f"recipe {self.recipe.name!r} computes a whole feed-forward layer, {need}")
        weight, bias = self.weight, self.bias
        device_type = x.device.type
        if device_type in AUTOCAST and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)  # autocast leaves float64 alone
            x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
        recipe = self.recipe
        mode = _LayerMode(recipe.mask, recipe.mvue, recipe.weight_gradient, recipe.fp8, self.prune_again)
        master = (self.weight if recipe.mask == "soft" else weight).detach()
        if not torch.is_grad_enabled():
            w_24, _ = _MaskedLinear.operands(master, self.index, None, self.scale, weight.dtype, mode)
            return F.linear(simulate_fp8(x, torch.float8_e4m3fn) if recipe.fp8 else x, w_24, bias)
        masks = (self.index, self.backward_mask)
        return _MaskedLinear.apply(x, weight, master, *masks, bias, self.forward_seed(), self.scale, mode)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.sparse, device="cpu")

    def set_extra_state(self, state: torch.Tensor | dict) -> None:
        self.sparse = bool(state["sparse"] if isinstance(state, dict) else state)  # earlier releases saved a dict

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        index, missing = state_dict.get(prefix + "index"), []
        patterns = 90 if self.recipe.mask == "transposable" else 6
        if index is not None and (index.dtype != torch.uint8 or (not index.is_meta and (index >= patterns).any())):
            need = (
                f"need uint8 below {patterns}; masks cannot be averaged: without this key it is made from the weights"
            )
            error_msgs.append(f"{prefix}index is {index.dtype} or too large, {need}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected_keys, error_msgs)
        if index is None and prefix + "weight" in state_dict:  # this is the state_dict of a dense linear
            missing = [key for key in missing if key == prefix + "bias"]
            if self.index.device != self.weight.device:  # the weight was assigned to a layer on the meta device
                self.make_state()
            self.refresh(begin=prefix + "beta" not in state_dict)
        missing_keys += missing

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}, sparse={self.sparse}"


# ---------------------------------------------------------------------------------------------------------------------
# The layers of a model


def sparse_linears(model: nn.Module) -> list[Sparse24Linear]:
    """The Sparse24Linear layers of `model`, in module order. `seed_draws` numbers them in this order. Raises ValueError
    if the weight of one is no Parameter any more, because of weight_norm or the like."""
    layers = {module: name for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}
    if computed := [name for layer, name in layers.items() if "weight" not in layer._parameters]:
        raise ValueError(f"sparse layers: {', '.join(computed) or 'the model'} {_NEED_WEIGHT}")
    return [*layers]


def _disable_encoder_fast_path(model: nn.Module) -> None:
    """In eval under no_grad nn.TransformerEncoder(Layer) read linear1.weight directly: they would run dense."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and sparse_linears(module):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and sparse_linears(module):
            module.activation_relu_or_gelu = 0


def _obstacle(linear: nn.Linear, reserved: set[str]) -> str | None:
    """The reason why this linear cannot become sparse, or None. reserved: attributes that sparse layers add."""
    if type(linear) is not nn.Linear or "weight" not in linear._parameters:
        return _NEED_WEIGHT
    if is_dtensor(linear.weight):
        return "has a sharded weight; call sparsify before it is sharded"
    if linear.in_features % 4 or linear.out_features % 4:
        return f"has {linear.in_features} in, {linear.out_features} out, {_NEED_FOURS}"
    if "forward" in vars(linear):  # accelerate's hooks set one; it would bypass the sparse class
        return "has a forward beside that of its class; remove the hook or wrapper that set it"
    taken = reserved & {*dir(linear)}
    return (
        f"has attributes that a sparse layer needs itself, {', '.join(sorted(taken))}; rename them" if taken else None
    )


def sparsify(
    model: nn.Module, recipe: str | Recipe, layers: Sequence[str] | Callable[[str, nn.Module], bool]
) -> list[str]:
    """Make chosen nn.Linear layers of any model sparse, in place. They stay the same objects, with their parameters,
    hooks and attributes; their class changes.

    layers: names as in named_modules(), or a predicate (name, module). Only modules of type nn.Linear become sparse, no
    subclasses: nn.MultiheadAttention never calls its out_proj, for example. Sparse layers are left as they are. Returns
    the names of the new ones. Pass an nn.TransformerEncoderLayer as a whole, because its fast path, which would leave
    out the masks, is turned off. Raises ValueError, before changing anything, if nothing matches, or if a chosen layer
    is no nn.Linear, has a shape that is not divisible by 4, or has a weight that is sharded or no Parameter.
    """
    recipe, linears = get_recipe(recipe), {}
    if not callable(layers):
        layers = [layers] if isinstance(layers, str) else [*map(str, layers)]
    for name, m in model.named_modules(remove_duplicate=False):
        if type(m) is nn.Linear or type(m).__name__ == "ParametrizedLinear" or isinstance(m, Sparse24Linear):
            linears[name] = m
    chosen = [n for n, m in linears.items() if (layers(n, m) if callable(layers) else n in layers)]
    unknown = [] if callable(layers) else [name for name in layers if name not in linears]
    if unknown or not chosen:
        problem = f"no nn.Linear named {', '.join(unknown)}" if unknown else "no nn.Linear matches"
        raise ValueError(f"sparsify: {problem}; the model has {', '.join(linears) or 'none'}")
    dense = {linears[name]: name for name in chosen if not isinstance(linears[name], Sparse24Linear)}
    classes = {linear: recipe.layer_class(name.rpartition(".")[2]) for linear, name in dense.items()}
    reserved = {}
    for layer_class in {*classes.values()}:
        example = layer_class(4, 4, recipe=recipe, device="meta")  # on this device nothing is drawn
        reserved[layer_class] = {*dir(example)} - {*dir(nn.Linear(4, 4, device="meta"))}
    for linear, name in dense.items():
        if obstacle := _obstacle(linear, reserved[classes[linear]]):
            raise ValueError(f"sparsify: {name or 'the model'} {obstacle}")
    for linear, layer_class in classes.items():
        linear.__class__ = layer_class
        linear._begin_sparse(recipe)
    _disable_encoder_fast_path(model)
    return [name for name, m in linears.items() if m in dense]  # a shared layer has several names


@torch.no_grad()
def densify(model: nn.Module, prune: bool = False) -> list[str]:
    """Make every Sparse24Linear an nn.Linear, in place, for export. The layers stay the same objects, as in sparsify.

    prune: also prune the weights of layers in their sparse phase, so that the model computes the same as before.
    Returns the names of the layers. Raises ValueError, before changing anything, if a module shares such a weight, but
    does not prune it in the same way, or with `prune` if the recipe prunes activations, which nn.Linear cannot.
    """
    names = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Sparse24Linear)]
    layers = sparse_linears(model)
    if methods := {layer.recipe.name for layer in layers if prune and layer.recipe.ffn}:
        raise ValueError(f"densify: prune=True, but {', '.join(sorted(methods))} prunes activations; use prune=False")
    layer_of = {layer.weight: layer for layer in layers if prune and layer.sparse}  # a shared weight is pruned once
    for name, module in model.named_modules():
        for layer in [layer_of[p] for p in layer_of.keys() & {*module._parameters.values()}]:
            same = module in layers and module.sparse and torch.equal(module.pruned_weight(), layer.pruned_weight())
            if module is not layer and not same:
                raise ValueError(f"densify: {name} shares a weight that is pruned in another module; untie it")
    for weight, layer in layer_of.items():
        weight.copy_(layer.pruned_weight())
    for layer in layers:
        for name in layer.added & {*dir(layer)}:
            delattr(layer, name)
        layer.__class__ = nn.Linear
    return names


@torch.no_grad()
def refresh_masks(model: nn.Module, measure: bool = True, begin: bool = False) -> float | None:
    """Recompute the mask of every layer in its sparse phase from its weights (Algorithm 1). Returns the flip rate
    against the old masks over all these layers, 0.0 without layers. measure=False returns None and never waits for the
    GPU. begin: also recompute the beta of soft weights.

    A model of averaged weights (AveragedModel, EMA) needs this call after its last average, with begin=True: numbers of
    patterns cannot be averaged. Set `.sparse` of its layers too if the phase of the model has changed."""
    layers = [layer for layer in sparse_linears(model) if layer.sparse]
    before = [layer.index.clamp(max=89) for layer in layers] if measure else []  # an average may be above 89
    for layer in layers:
        layer.refresh(begin)
    return flip_rate(before, [layer.index for layer in layers]) if measure else None


@torch.no_grad()
def weight_indices(linears: Sequence[nn.Linear], kind: str = "transposable") -> list[torch.Tensor]:
    """The masks for the present weights, as index matrices. Also for dense layers: to measure their flip rate."""
    return [mask_index(linear.weight, kind) for linear in linears]


@contextmanager
@torch.no_grad()
def hard_pruned(linears: Sequence[nn.Linear]):
    """Context in which these layers compute as deployed for 2:4 inference. The weights of dense layers are pruned by
    magnitude (mask24) and restored at the end. Layers in their sparse phase are not changed."""
    dense = dict.fromkeys(local(m.weight) for m in linears if not getattr(m, "sparse", False))
    saved = [w.detach().clone() for w in dense]
    try:
        for w in dense:
            w.copy_(torch.where(mask24(w), w, 0))
        yield
    finally:
        for w, before in zip(dense, saved, strict=True):
            w.copy_(before)


def seed_words(count: int, *key: int) -> np.ndarray:
    """`count` uint64 words that are a function of the non-negative ints `key` alone (numpy's SeedSequence)."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64)


@torch.no_grad()
def seed_draws(model: nn.Module, seed: int, iter_num: int, micro_batch: int) -> None:
    """Set every layer's `.seed` from (seed, iteration, global micro-batch, layer number). Call it every micro-step."""
    layers = sparse_linears(model)
    if not layers:
        return
    words = torch.from_numpy(seed_words(len(layers), seed, iter_num, micro_batch).view(np.int64))
    words = words.to(layers[0].seed.device, non_blocking=True)  # one copy and one launch for all layers
    torch._foreach_copy_([layer.seed for layer in layers], list(words.unbind()))
    for layer in layers:
        layer.begin_micro_batch(iter_num, micro_batch)


@torch.no_grad()
def begin_step(model: nn.Module, seed: int, iter_num: int, begin: bool = False) -> None:
    """Call `begin_step` of every layer in its sparse phase. Call this once per step, before the first `seed_draws`.
    begin: whether this is the first step of a sparse phase."""
    for number, layer in enumerate(sparse_linears(model)):
        if layer.sparse:
            layer.begin_step(seed, iter_num, number, begin)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def adamw_scalars(step: int, lr, betas, eps, weight_decay, masked_decay) -> tuple[float, ...]:
    """The scalars of kernels.adamw_ for one tensor at its step number `step`, counted from 1."""
    beta1, beta2 = betas
    corrected_lr, root_bias2 = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, corrected_lr, root_bias2, masked_decay


def adamw_fits(tensors: Sequence[torch.Tensor]) -> bool:
    """Returns whether kernels.adamw_ takes all of these: one CUDA device, float32, contiguous, aligned, by fours."""
    first = tensors[0].detach()
    return _runs_kernels(first) and all(
        type(t) in (torch.Tensor, nn.Parameter)  # no fake tensors
        and t.device == first.device
        and t.dtype == torch.float32
        and t.is_contiguous()
        and t.numel() % 4 == 0 < t.numel()
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


class MaskedDecayAdamW(torch.optim.AdamW):
    """AdamW with masked decay on the weights of `model`'s sparse layers, by the current masks.

    decay_on="grad" is Eq. 10, grad += masked_decay * ~mask * w, in place, once per step. Unscale and clip the gradients
    before. decay_on="weight" is SR-STE's Eq. 8, w -= lr * masked_decay * ~mask * w, before the Adam update. Layers
    whose `.sparse` is False get plain AdamW. All other arguments are those of torch.optim.AdamW. `masked_decay` may be
    changed between steps. Raises ValueError for a negative factor or an unknown decay_on.

    On CUDA a step of float32 parameters is one kernel launch, which does not write the gradients. torch's own step runs
    instead if row-wise masks decay, or if an option such as fused or foreach is set. The state is torch's either way.

    A method in methods/ subclasses this and overrides `update` or `dense_start_done`.
    """

    def __init__(self, params, model: nn.Module, *args, masked_decay: float, decay_on: str = "grad", **kwargs):
        if not 0 <= masked_decay < math.inf or decay_on not in ("grad", "weight"):
            need = "need a finite factor of at least 0 and 'grad' or 'weight'"
            raise ValueError(f"MaskedDecayAdamW: masked_decay={masked_decay}, decay_on={decay_on!r}; {need}")
        super().__init__(params, *args, **kwargs)
        self.masked_decay = masked_decay
        self.decay_on = decay_on
        self.model = model
        self.dense_start_log: list[float] | None = None  # for dense_start_done; saved in checkpoints
        # Make GradScaler unscale the gradients before the step. torch's fused kernel would do it after the decay.
        self._step_supports_amp_scaling = False

    def __getstate__(self) -> dict:
        """For copies and pickles. torch's optimizers give them the parameters and the state alone."""
        names = ("model", "masked_decay", "decay_on", "dense_start_log")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def _decayed(self) -> dict[torch.Tensor, Sparse24Linear]:
        """{weight: layer} of the layers that decay. A weight that two layers share decays once."""
        if not self.masked_decay:
            return {}
        return {layer.weight: layer for layer in sparse_linears(self.model) if layer.sparse}

    @torch.no_grad()
    def _apply_masked_decay(self) -> None:
        layers = self._decayed()
        for group in self.param_groups:
            for w in group["params"]:
                if w not in layers or w.grad is None:
                    continue
                rows, mask = local(w), layers[w].mask_rows()
                if self.decay_on == "grad":
                    sign = -1 if group["maximize"] else 1  # AdamW will negate the gradient
                    masked_decay_(local(w.grad), rows, mask, sign * self.masked_decay)
                else:
                    rows.sub_(torch.where(mask, 0, rows) * (group["lr"] * self.masked_decay))

    @torch.no_grad()
    def _kernel_step(self) -> bool:
        """Do the whole step in one launch of kernels.adamw_. Returns False, and does nothing, if it cannot. Its
        specification is `masked_decay_`, then torch.optim.AdamW."""
        groups = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        unsupported = ("amsgrad", "maximize", "capturable", "differentiable", "fused", "foreach")
        if not groups or any(group[key] for group, _ in groups for key in unsupported):
            return False
        layers = self._decayed()
        if any(layer.recipe.mask != "transposable" for layer in layers.values()):
            return False
        if not adamw_fits([local(t) for _, p in groups for t in (p, p.grad)]):
            return False
        indices, scalars, moments = {w: rows_of(w, layer.index) for w, layer in layers.items()}, [], []
        for _, p in groups:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")  # read without waiting for the GPU
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if state["step"].is_cuda:  # loaded from a fused optimizer
                state["step"] = state["step"].cpu()
            moments.append((local(state["exp_avg"]), local(state["exp_avg_sq"])))
        if not adamw_fits([t for pair in moments for t in pair]):
            return False
        for group, p in groups:
            step = self.state[p]["step"]
            step += 1
            lr, decay = float(group["lr"]), self.masked_decay * (float(group["lr"]) if self.decay_on == "weight" else 1)
            scalars.append(adamw_scalars(int(step), lr, group["betas"], group["eps"], group["weight_decay"], decay))
        _kernels.adamw_(
            [local(p) for _, p in groups],
            [local(p.grad) for _, p in groups],
            *(list(column) for column in zip(*moments, strict=True)),
            [indices.get(p) for _, p in groups],
            scalars,
            self.decay_on == "weight",
        )
        return True

    def update(self) -> None:
        """Adam's update, without masked decay. If a subclass overrides it and not `_kernel_step`, no kernel is used."""
        # torch wraps the step of every optimizer class to run hooks. Call the unwrapped one: our step ran the hooks.
        step = torch.optim.AdamW.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    def dense_start_done(self) -> bool:
        """Returns whether the sparse phase may begin with the next step. train.py calls this at every step, after
        clipping, if the recipe has dense_pretrain_latest."""
        return False

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for layer in sparse_linears(self.model):
            if layer.sparse and layer.weight.grad is not None:
                layer.warn_without_seeds()  # a compiled forward pass cannot warn
            layer.seeded = False  # the next step needs other seeds
        base = MaskedDecayAdamW  # the kernel does base's update; a subclass with another one may say when it applies
        other_update = type(self).update is not base.update and type(self)._kernel_step is base._kernel_step
        if other_update or not self._kernel_step():
            self._apply_masked_decay()
            self.update()
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# The self-test of the kernels. use_kernels runs it once for each device.


def awkward_matrix(device: torch.device) -> torch.Tensor:
    """float32 (64, 136) with ties, zeros and a subnormal."""
    w = torch.randn(64, 136, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    w[:4, :8] = w.new_tensor([0.0, 1.0, -1.0, 1e-40]).repeat(2)
    return w.to(device)


def same_numbers(got: torch.Tensor, expected: torch.Tensor, **tolerance) -> bool:
    """Returns whether two tensors are equal, NaN counting as equal to NaN. With a tolerance: if they are allclose."""
    if tolerance:
        return torch.allclose(got.double(), expected.double(), **tolerance)
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def _compare_kernels(device: torch.device) -> dict[str, bool]:
    kernels = _import_kernels()
    w, seed = awkward_matrix(device), torch.tensor(-(2**40) - 1, dtype=torch.int64, device=device)
    x = w.to(torch.bfloat16)
    x[0, :3] = x.new_tensor([math.inf, -math.inf, math.nan])
    tiles = x[:, :128].contiguous()
    samples = {"mvue24 (float32)": w, "mvue24": x, "mvue24 (whole tiles)": tiles}
    samples |= {"mvue24 (token-major)": tiles.t().contiguous().t(), "mvue24 (transposed)": x.t()}
    mvue_equal = {name: same_numbers(kernels.mvue24(t, seed), mvue24.torch(t, seed)) for name, t in samples.items()}
    index = transposable_index.torch(w)
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs, moments = w.clone(), nn.Parameter(w.clone()), [torch.zeros_like(w), torch.zeros_like(w)]
    adamw = torch.optim.AdamW([theirs], **options)
    for step in (1, 2):
        theirs.grad = masked_decay_(w.clone(), theirs.detach(), index, 0.5)
        adamw.step()
        scalars = [adamw_scalars(step, **options, masked_decay=0.5)]
        kernels.adamw_([ours], [w], *([m] for m in moments), [index], scalars)
    return {
        "transposable_index": same_numbers(kernels.transposable_index(w), index),
        **mvue_equal,
        "pair_index": same_numbers(kernels.pair_index(x), pair_index.torch(x)),
        "soft_threshold24": same_numbers(kernels.soft_threshold24(w), soft_threshold24.torch(w)),
        "sste_scale": same_numbers(kernels.sste_scale(w), sste_scale.torch(w), rtol=1e-5),
        "adamw_": same_numbers(ours, theirs.detach(), rtol=1e-5, atol=1e-6),
    }


SELF_TESTS.append(_compare_kernels)

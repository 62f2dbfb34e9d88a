"""The paper: fully sparse training of transformers with 2:4 weights, FST (Hu et al., ICML 2024), and its successors.

W is (out, in), X (BT, in), Z = X W^T, and M is a transposable 2:4 mask: two of four along rows and along columns.
    forward    Z  = X (W*M)^T                         2:4 along in                                     Eq. 2
    backward   dX = dZ (W*M)                          2:4 along out, because M^T is a 2:4 mask too     Eq. 3, 5
               dW = MVUE(dZ^T) X                      2:4 along tokens; reaches every entry of W       Eq. 4, 6, 7
               db = sum over tokens of the unpruned dZ
    step       g <- clipped dW + decay * ~M * W       masked decay, before Adam's moments              Eq. 10
    refresh    M <- argmax over the 90 patterns of |W*M|_1 in each 4x4 block, every `mask_interval`    Algorithm 1

The file goes from the parts to the whole: which calls run a Triton kernel; patterns, masks and the flip rate; MVUE;
soft threshold and masked decay; the recipes, with the equations of the ablations; weights that are sharded over
ranks; the sparse linear layer, `sparsify` and `densify`; the optimizer. Masks are bool, True = kept. A mask is stored
as its index matrix, one uint8 for each 4x4 block. The layer here multiplies pruned operands as dense matrices; gemm24/
multiplies 2:4 ones.

This file and kernels.py are all that 2:4 layers need in another project. Without kernels.py, or without Triton,
everything runs in plain PyTorch.
"""

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
# Operators and their kernels. An operator is written once in plain PyTorch, its specification, and may have a Triton
# kernel of the same name and arguments in kernels.py. NANO24_KERNELS=0 turns the kernels off.

_kernels = None  # the module kernels, once a device uses it
_STATUS: dict[torch.device, str] = {}  # "on", or why not; only of devices that use_kernels was called for
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each returns {operator: whether its kernel is equal}. A file that appends one, as gemm24/operands.py does, must be
# imported before use_kernels is called.
SELF_TESTS: list[Callable[[torch.device], dict[str, bool]]] = []


def kernel(name: str, takes: Callable | None = None, otherwise: Callable | None = None):
    """Decorator of a specification, which `operator.torch` then is: the operator runs kernels.`name` where that can
    take the call.

    takes: whether the kernel takes these arguments, in addition to `_runs_kernels`. Calls that it refuses go to the
    specification, which raises the error if they are wrong. otherwise: runs in place of the specification, for an
    operator whose parts have kernels of their own.
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
    """Whether the floating-point tensors among the arguments may go to a kernel: none may need a gradient."""
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

    Call it once, before a model is built; without it everything runs in plain PyTorch. The first call compares every
    kernel with its specification, which takes seconds. If one differs, a warning names it and no kernel is used.
    Raises ValueError for a value of NANO24_KERNELS other than 0 and 1.
    """
    device = _with_number(torch.device(device))
    if device.type == "cuda" and device not in _STATUS:
        _STATUS[device] = "off: being tested"
        _STATUS[device] = _try_kernels(device)
        if _STATUS[device].startswith("off: failed"):
            warnings.warn(f"nano24 kernels on {device} {_STATUS[device]}; PyTorch twins serve", stacklevel=2)
    return kernel_status(device)


def kernel_status(device: torch.device) -> str:
    """ "on" where tensors of this device go to the Triton kernels, else "off: " and the reason. Tests nothing."""
    if device.type != "cuda":
        return f"off: the kernels need CUDA, this is {device.type}"
    return _STATUS.get(_with_number(device), "off: use_kernels was not called for this device")


def _with_number(device: torch.device) -> torch.device:
    """ "cuda" as the number of the current device; other devices as they are."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _try_kernels(device: torch.device) -> str:
    global _kernels
    wanted = os.environ.get("NANO24_KERNELS", "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"NANO24_KERNELS={wanted!r}, need 0 (PyTorch twins) or 1 (Triton kernels where they can)")
    if wanted == "0":
        return "off: NANO24_KERNELS=0"
    if torch.version.hip or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return "off: the kernels need an NVIDIA GPU of compute capability 8.0 or more"
    try:
        module = _import_kernels()
        with torch.device("cpu"):  # a model may be under construction under another default device
            wrong = kernel_mismatches(device)
    except ImportError as error:
        return f"off: {error}"
    except Exception as error:  # of Triton or the driver: report it and run without kernels,
        torch.cuda.synchronize(device)  # unless the GPU itself is lost: then this line raises
        return f"off: failed the self-test with {type(error).__name__}: {error}"
    if wrong:
        return f"off: failed the self-test, unlike their twins: {', '.join(wrong)}"
    _kernels = module
    return "on"


def _import_kernels():
    import kernels  # imports Triton, which takes time and may not be installed

    kernels.use_patterns(PATTERNS)
    return kernels


def kernel_mismatches(device: torch.device) -> list[str]:
    """The operators whose kernel and specification differ on small awkward inputs: an empty list on a sound machine."""
    _import_kernels()
    return [name for compare in SELF_TESTS for name, equal in compare(device).items() if not equal]


# ---------------------------------------------------------------------------------------------------------------------
# The 90 transposable patterns. Their order is a disk format, because checkpoints store indices. It follows a rule, so
# that the search below needs no table. Let a, b, c, d be the rows of a block, a pair the two columns that a row keeps,
# and ~ the complement of a pair:
#   A  0 + p                a, b keep pair p; c, d keep ~p                                                         6
#   C  6 + 6 p + q          a keeps p, b keeps ~p; c keeps q, d keeps ~q                                          36
#   B  42 + 8 jk + 4e+2x+y  of the complement (i, l) of jk, a and b keep column (l if e else i), c and d the other;
#                           of (j, k), a keeps (k if x else j) and b the other, c keeps (k if y else j), d ...    48

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
_TABLES = {  # name -> {device: table}; a device gets its copy when it is first asked for
    "flat": {_CPU: PATTERNS.flatten(1)},  # bool (90, 16)
    "hamming": {_CPU: (PATTERNS.flatten(1)[:, None] != PATTERNS.flatten(1)[None]).sum(-1)},  # entries that differ
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
    """Whether x is cut into groups of four along its last dimension."""
    return x.dim() >= 2 and x.shape[-1] % 4 == 0


def _in_blocks(w: torch.Tensor) -> bool:
    """Whether w is cut into 4x4 blocks."""
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
    """|x| in the dtype of the arithmetic: float64 for float64, float32 for all others."""
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
    """The pattern with the largest L1 norm of what it keeps, in each 4x4 block: Algorithm 1.

    The paper compares 90 sums; 8 candidates are enough. With x = a-b, y = c-d, f = b-c, e = x+y+2f for each column of
    |w|, every score less the constant sum(c+d) is A = top2(e), C = sum(f) + top2(x) + top2(y), or
    B_jk = f_j+f_k + max(x_j,x_k) + max(y_j,y_k) + max(e_i,e_l).

    w: (out, in), any float dtype and strides. Returns uint8 (out/4, in/4), entries 0..89, also where w is not finite.
    Exact: the norm is the optimum within float32 rounding (1e-6 relative). Raises ValueError for other shapes.
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
    """Mask bool (out, in) with two kept in every row and column of each 4x4 block, of largest L1 norm (5.1)."""
    return expand_index(transposable_index(w))


def transposable_mask_2approx(w: torch.Tensor) -> torch.Tensor:
    """Sort-and-pick 2-approximation of Hubara et al. (2021), the baseline of the paper's Table 2.

    It takes the 16 entries of a block in order of magnitude while their row and column hold fewer than two. Some blocks
    end with 7 entries. w: (out, in), both divisible by 4. Returns bool (out, in). Raises ValueError for other shapes.
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
    """Row-wise 2:4 mask (section 3.1): which pair of PAIRS, the two largest magnitudes, each group of four along the
    last dimension keeps.

    Ties keep the lower index; NaN counts as the largest. x: (..., n), n divisible by 4. Returns uint8 (..., n/4),
    entries 0..5. Raises ValueError for other shapes.
    """
    _check_groups("pair_index", x)
    groups = x.detach().abs().unflatten(-1, (-1, 4))
    low, high = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(dim=-1).values.unbind(-1)
    return (low + high - (low == 0).long()).to(torch.uint8)


def expand_pairs(index: torch.Tensor) -> torch.Tensor:
    """The mask, bool (..., n), of an index matrix of `pair_index`, uint8 (..., n/4)."""
    if index.dtype != torch.uint8:
        raise ValueError(f"expand_pairs: {index.dtype}, need the uint8 of pair_index")
    return _table("pairs", index.device)[index.long()].flatten(-2)


def mask24(w: torch.Tensor) -> torch.Tensor:
    """The mask of `pair_index`, bool of w's shape. Raises ValueError for other shapes."""
    _check_groups("mask24", w)
    return expand_pairs(pair_index(w))


def flip_count(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The number of mask entries that differ between two uint8 index matrices, an int64 0-d tensor. Raises ValueError
    where their shapes differ."""
    if before.shape != after.shape or not before.dtype == after.dtype == torch.uint8:
        raise ValueError(
            f"flip_count: {before.dtype} {tuple(before.shape)} against {after.dtype} {tuple(after.shape)}, "
            "need two uint8 index matrices of one shape"
        )
    return _table("hamming", before.device)[before.long(), after.long()].sum()


def flip_rate(before, after) -> float:
    """Definition 4.1: the share of mask entries that differ, ||m(w_t) - m(w_{t-1})||_1 / D, a fraction per step.

    before, after: two bool masks, or two uint8 index matrices, or two equally long lists of them (one for each layer,
    weighed by their entries). Row-wise indices (0..5) work too: pattern p < 6 keeps pair p in two rows and its
    complement in the other two, so the rate is the same. Each rank counts its own rows of sharded masks, and the counts
    are added up. Raises ValueError where shapes or dtypes differ.
    """
    if torch.is_tensor(before):
        before, after = [before], [after]
    flips, entries = [], 0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype or old.dtype not in (torch.bool, torch.uint8):
            raise ValueError(
                f"flip_rate: {old.dtype} {tuple(old.shape)} against {new.dtype} {tuple(new.shape)}, "
                "need two bool masks or two uint8 index matrices of one shape"
            )
        old_rows, new_rows, is_mask = local(old), local(new), old.dtype == torch.bool
        flips.append(total((old_rows != new_rows).sum() if is_mask else flip_count(old_rows, new_rows), old))
        entries += old.numel() * (1 if is_mask else 16)
    return int(torch.stack(flips).sum()) / entries if entries else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# MVUE: the minimum-variance unbiased 2:4 estimator of a gradient (Eq. 6; Chmiel et al., 2023)
#
# Let a = |x| and S = sum a, and keep element i with probability pi_i as the value x_i/pi_i. To minimise the variance
# sum a_i^2/pi_i under sum pi = 2 and pi <= 1, take pi_i = min(a_i/h, 1), hence magnitude max(a_i, h), with
# h = min(S/2, S - max a). Systematic sampling draws the two with one uniform u per group: let b_i = min(a_i, h), whose
# sum is 2h, with running sums C_i, and keep the elements in whose [C_{i-1}, C_i) the points u h and u h + h fall. They
# are always two distinct elements.
#
# Randomness is stateless: the uniform of (row, group of four columns) is one word of Philox4x32-10 (Salmon et al.,
# 2011), a function of the seed and the position alone. Rows r and r+8 of a 16-row tile and column groups q and q+4 of
# a 32-column tile share a counter and take its four words, because a GPU thread owns exactly these four.

_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(x: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of x * constant; x is int64 and holds uint32. A product that wraps has the right bits."""
    product = x * constant
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(counter: Sequence[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four words from four counter words and two key words, all int64 tensors that hold uint32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _seed_tensor(seed, device) -> torch.Tensor:
    if torch.is_tensor(seed):
        return seed.to(device or seed.device, torch.int64)
    return torch.tensor((int(seed) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def group_uniforms(rows: int, groups: int, seed, device=None, stream: int = 0) -> torch.Tensor:
    """One uniform in [0, 1) per (row, group of four), float32 (rows, groups), multiples of 2^-23.

    seed: an int (taken modulo 2^64) or an int64 0-d tensor, the Philox key. Another `stream` gives independent draws.
    Counter of (r, q): (8 (r//16) + r%8) * 4 ceil(groups/8) + 4 (q//8) + q%4; word: 2 (r//8 % 2) + (q//4 % 2).
    """
    tiles, panels = -(-rows // 16), -(-groups // 8)
    seed = _seed_tensor(seed, device)
    counter = torch.arange(tiles * 8 * panels * 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(counter)
    words = philox4x32(
        (counter & _MASK32, counter >> 32, zero + stream, zero), (seed & _MASK32, (seed >> 32) & _MASK32)
    )
    words = torch.stack(words).view(2, 2, tiles, 8, panels, 4)  # (row half, column half, tile, row, panel, column)
    words = words.permute(2, 0, 3, 4, 1, 5).reshape(tiles * 16, panels * 8)[:rows, :groups]
    return (words & 0x7FFFFF).float() * 2.0**-23


def mvue24_with_mask(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `mvue24`, and the mask of what it keeps: bool of x's shape, two True in every group."""
    _check_groups("mvue24", x)
    groups, shape = x.unflatten(-1, (-1, 4)), (*x.shape[:-1], x.shape[-1] // 4)
    a0, a1, a2, a3 = _magnitude(groups).unbind(-1)
    if u is None:
        u = group_uniforms(math.prod(shape[:-1]), shape[-1], seed, x.device).to(x.device).view(shape)
    if u.shape != shape:
        raise ValueError(f"mvue24: u has shape {tuple(u.shape)}, need {shape}, one uniform per group of four")
    u = u.to(a0.dtype)
    # The sum of the three smallest, rather than S - max a: nothing cancels.
    max01, max23 = torch.maximum(a0, a1), torch.maximum(a2, a3)
    rest = torch.minimum(a0, a1) + torch.minimum(a2, a3) + torch.minimum(max01, max23)
    h = torch.minimum(rest, ((a0 + a1) + (a2 + a3)) / 2)
    t = u * h
    t = torch.where(t < h, t, 0)  # the product of a subnormal h may round up to h, and t = h would keep a zero
    s = h - t
    # The first element is the first i with C_i > t; the second is the last i whose suffix sum of b is at least s. The
    # other conditions hold by themselves in exact arithmetic. They guard against rounding: the two are distinct, no
    # zero displaces a non-zero element, and an inner element above h, whose pi is 1, is always one of them.
    past0 = a0 <= t
    past1 = a0 + a1 <= t
    from3 = ((a3 >= s) & (a2 <= h) & (past0 | (a1 <= h))) | past1 | (past0 & (a2 == 0))
    from2 = ((a2 + a3 >= s) & (a1 <= h)) | past0
    low = torch.where(past1, 2, past0.to(torch.int8))
    high = torch.where(from3, 3, 1 + from2.to(torch.int8))
    position = torch.arange(4, device=x.device, dtype=torch.int8)
    mask = (position == low.unsqueeze(-1)) | (position == high.unsqueeze(-1))
    # The sign is copied, not multiplied: 0 * inf would make a NaN of a zero that is kept beside infinities.
    values = torch.copysign(torch.maximum(_magnitude(groups), h.unsqueeze(-1)), groups)
    return torch.where(mask, values, 0).flatten(-2).to(x.dtype), mask.flatten(-2)


@kernel("mvue24", takes=lambda x, seed, u=None: u is None and _in_groups(x))
def mvue24(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> torch.Tensor:
    """Exact MVUE: an unbiased 2:4 sample of x along its last dimension, of the smallest possible variance (Eq. 6).

    x: (..., n), n divisible by 4, any strides; float64 is computed in float64, all else in float32, rounded once to
    x's dtype. seed: int or int64 0-d tensor. u: uniforms (..., n/4) in [0, 1) that replace the seeded draw.
    Keeps two elements of each group, two non-zero ones where there are two; a zero group gives zeros; a group with a
    non-finite element stays non-finite. Raises ValueError for a 1-D x, n % 4 != 0 or another shape of u.
    """
    return mvue24_with_mask(x, seed, u)[0]


def mvue24_sequential(x: torch.Tensor, seed) -> torch.Tensor:
    """The predecessors' estimator, as a baseline: two draws without replacement, unbiased but of larger variance.

    Draws i, then j != i, with probability proportional to magnitude, and divides by the exact inclusion probability
    a_i/S + a_i * sum_{j != i} a_j / (S (S - a_j)). Arguments, dtypes and errors as `mvue24`; two uniforms a group.
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
    """S-STE's continuous pruning: subtract the second-smallest magnitude t of the group, keep what stays positive.

    sign(w) * max(|w| - t, 0) per group of four along the last dimension. w: (..., n), n divisible by 4; any strides.
    Returns w's shape and dtype, at most two non-zeros a group. Raises ValueError for other shapes.
    """
    _check_groups("soft_threshold24", w)
    groups = w.unflatten(-1, (-1, 4))
    a = _magnitude(groups)
    threshold = a.sort(dim=-1).values[..., 1:2]
    return (torch.sign(groups) * (a - threshold).clamp(min=0)).flatten(-2).to(w.dtype)


def soft_threshold24_backward(ds: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The true gradient of S-STE's soft threshold: from ds (..., n), the gradient of S(w), to dw of the same shape and
    dtype.

    S_i = w_i - sign(w_i) t for the elements above t = |w_k|. So dw_i = ds_i there, the element k that sets the
    threshold gets -sign(w_k) times the sum of their sign(w_i) ds_i, and the smallest gets nothing. If several
    magnitudes equal t, one of them sets it.
    """
    _check_groups("soft_threshold24_backward", w)
    groups, ds = w.unflatten(-1, (-1, 4)), ds.unflatten(-1, (-1, 4))
    a = _magnitude(groups)
    mine, other = a.unsqueeze(-1), a.unsqueeze(-2)  # comparisons, since a sort is slow on a GPU and never fused
    before = torch.ones(4, 4, dtype=torch.bool, device=a.device).tril(-1)  # of equals the first one counts as lower
    is_k = ((other < mine) | ((other == mine) & before)).sum(-1) == 1
    above = a > torch.where(is_k, a, 0).sum(-1, keepdim=True)
    signs = torch.sign(groups)
    through = torch.where(above, ds, 0)
    share = -signs * (signs * through).sum(-1, keepdim=True)
    return torch.where(is_k, share.to(ds.dtype), through).flatten(-2)


@kernel("sste_scale", takes=_in_groups)
def sste_scale(w: torch.Tensor) -> torch.Tensor:
    """S-STE's beta = <w, S(w)> / <S(w), S(w)>, the least-squares scale of the soft-thresholded w; 1 where S(w) is 0.

    w: (..., n), n divisible by 4. Returns a float32 (float64 for float64 w) 0-d tensor on w's device.
    """
    _check_groups("sste_scale", w)
    soft = soft_threshold24.torch(w).to(torch.promote_types(w.dtype, torch.float32))
    square = soft.square().sum()
    return torch.where(square > 0, (w.to(soft.dtype) * soft).sum() / square, 1)


def simulate_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to an FP8 type (torch.float8_e4m3fn or torch.float8_e5m2) and back, scaled so that its largest
    magnitude is the type's largest. Zeros stay zeros; a non-finite element makes all elements non-finite."""
    amax = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    largest = torch.finfo(dtype).max
    scale = torch.where(amax == 0, 1.0, (largest / amax).clamp(max=torch.finfo(torch.float32).max))
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


@torch.no_grad()
def masked_decay_(grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
    """Eq. 10, in place: grad += decay * ~mask * w. Returns grad. AdamW's kernel adds the decay by itself.

    grad, w: one shape. mask: bool of that shape, or its uint8 index matrix. Raises ValueError for anything else.
    """
    if mask.dtype == torch.uint8 and w.dim() == 2 and mask.shape == (w.shape[0] // 4, w.shape[1] // 4):
        mask = expand_index(mask)
    if not grad.shape == w.shape == mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masked_decay_: grad {tuple(grad.shape)}, w {tuple(w.shape)}, mask {mask.dtype} {tuple(mask.shape)}; "
            "need one shape and a bool mask, or the uint8 index matrix of one"
        )
    return grad.add_(torch.where(mask, 0, w).to(grad.dtype), alpha=decay)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: every choice in which one method of 2:4 training differs from another. FST and its ablations stand here; each
# other method is a file in methods/.
#
# C is the pruning, Z = X C(W)^T, S the soft threshold.
#
# fst      Hu et al., ICML 2024, as at the top of this file. The masks are searched every 40 steps; the last 1/6 of the
#          steps is dense (section 4.4); dW reaches W straight through.
# ste      fst without decay, MVUE and dense phase: the flip-rate explosion of Figure 1.
# sr_ste   Zhou et al., ICLR 2021. M row-wise by magnitude, every step; dX multiplies the same W*M as a dense matrix.
#              W <- W - lr * decay * ~M * W, beside Adam's update and not through its moments           Eq. 8
# s_ste    Hu et al., NeurIPS 2024. C(W) = beta S(W), S(w) = sign(w) max(|w| - t, 0), t the second-smallest magnitude of
#          the group: continuous in w. beta = <W, S(W)> / <S(W), S(W)> when the layer becomes sparse, then fixed. dX
#          multiplies the same C(W) as a dense matrix. W gets its true gradient beta J^T dC, J the Jacobian of S and
#          dC = MVUE(dZ^T) X. It had a lower loss than straight through at learning rate 3e-3
#          (results/quality-6seeds.md); nothing is known at better rates.
# s_ste_straight  s_ste as published: dC reaches W as it is, without beta and without J.

# The fields that are settings of train.py too. All other fields are edited here, or in the method's file.
SETTINGS = ("mask_interval", "masked_decay", "mvue", "dense_finetune", "dense_pretrain")


@dataclass(frozen=True)
class Recipe:
    """One method of 2:4 training. Shares are of max_iters, intervals in optimizer steps. Raises ValueError where
    a field is out of range, or where fields exclude one another."""

    name: str
    mask: str = "transposable"  # "transposable", "row" (row-wise by magnitude) or "soft" (soft threshold, row-wise)
    mvue: bool = False  # 2:4 weight-gradient GEMM through MVUE, else a dense one
    masked_decay: float = 0.0  # the decay factor lambda itself; 0 = none
    decay_on: str = "grad"  # "grad": Eq. 10; "weight": SR-STE's Eq. 8
    mask_interval: int = 40  # steps between mask refreshes
    dense_finetune: float = 0.0  # share of the steps that are dense, at the end
    dense_pretrain: float = 0.0  # share of the steps that are dense, at the start
    dense_pretrain_latest: float = 0.0  # share by which a dense start ends that the optimizer ends; 0 = it does not
    weight_gradient: str = "straight"  # dW of soft weights: "straight" through, or "true" (beta times the Jacobian)
    fp8: bool = False  # simulate FP8 GEMMs: W and X in E4M3, dZ in E5M2, one scale per tensor
    layer: type | None = None  # subclass of Sparse24Linear that computes the method; None = Sparse24Linear
    optimizer: type | None = None  # subclass of MaskedDecayAdamW that the method trains with; None = MaskedDecayAdamW

    def __post_init__(self):
        kinds = {"mask": ("transposable", "row", "soft"), "decay_on": ("grad", "weight")}
        for field, values in (kinds | {"weight_gradient": ("straight", "true")}).items():
            if getattr(self, field) not in values:
                raise ValueError(f"Recipe: {field}={getattr(self, field)!r}, need one of {', '.join(values)}")
        if not self.masked_decay >= 0 or math.isinf(self.masked_decay):
            raise ValueError(f"Recipe: masked_decay={self.masked_decay}, need a finite factor of at least 0")
        if self.mask_interval < 1:
            raise ValueError(f"Recipe: mask_interval={self.mask_interval}, need at least 1 step")
        for field in ("dense_finetune", "dense_pretrain", "dense_pretrain_latest"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"Recipe: {field}={getattr(self, field)}, need a fraction of max_iters from 0 to 1")
        for field, base in (("layer", "Sparse24Linear"), ("optimizer", "MaskedDecayAdamW")):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, type) and issubclass(value, globals()[base])):
                raise ValueError(f"Recipe: {field}={value!r}, need a subclass of {base}, or None")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse fields that would be ignored, or make no sense, beside others."""
        soft, first, latest = self.mask == "soft", self.dense_pretrain, self.dense_pretrain_latest
        needs = {
            "dense_pretrain + dense_finetune <= 1": first + self.dense_finetune <= 1,
            "mask='soft' for weight_gradient": soft or self.weight_gradient == "straight",
            "mask_interval=1 for mask='soft', which follows every step": not soft or self.mask_interval == 1,
            f"dense_pretrain above 0 and at most dense_pretrain_latest={latest}": not latest or 0 < first <= latest,
        }
        wrong = [need for need, met in needs.items() if not met]
        if wrong:
            raise ValueError(f"Recipe {self.name!r}: need {'; '.join(wrong)}")

    @property
    def virtual_mask(self) -> str:
        """The kind of masks whose flips count: "transposable", or "row" for row-wise and soft ones."""
        return "transposable" if self.mask == "transposable" else "row"

    @property
    def fused(self) -> bool:
        """Whether gemm24/ffn.py's one function computes what two layers do: those of this file, and without FP8."""
        return self.layer is None and not self.fp8


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
    """The names that `get_recipe` knows: those of RECIPES, and of the files in the folder methods, if there is one."""
    folder = importlib.util.find_spec("methods")
    files = pkgutil.iter_modules(folder.submodule_search_locations or ()) if folder else ()
    return [*RECIPES, *sorted(file.name for file in files)]


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself. A name that is not in RECIPES is that of a file: "mine" is RECIPE of
    methods/mine.py. Raises ValueError with the names there are, or where the file has no RECIPE of its name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe in RECIPES:
        return RECIPES[recipe]
    if recipe not in recipe_names():
        raise ValueError(
            f"recipe {recipe!r} is unknown, need one of {', '.join(recipe_names())}; "
            "a new one is a file in methods/, see its README.md"
        )
    found = getattr(importlib.import_module(f"methods.{recipe}"), "RECIPE", None)
    if not isinstance(found, Recipe) or found.name != recipe:
        raise ValueError(
            f"methods/{recipe}.py has RECIPE={found!r}, need a recipe of the file's name: "
            f"RECIPE = Recipe({recipe!r}, ...)"
        )
    return found


def recipe_of(settings: dict) -> Recipe | None:
    """The recipe of {"sparse": name, field: value...}: the named one, with the fields of SETTINGS that are given; None
    for "none". Other keys are ignored."""
    if settings["sparse"] == "none":
        return None
    return replace(get_recipe(settings["sparse"]), **{name: settings[name] for name in SETTINGS if name in settings})


# ---------------------------------------------------------------------------------------------------------------------
# Sharded weights. FSDP2 leaves a weight W (out, in) between steps as a DTensor, Shard(0): n ranks hold pieces of
# ceil(out / n) rows. Masks are decided in 4x4 blocks, or in groups of four along a row. So where a piece has a multiple
# of four rows (`fits`), every rank decides the masks of its own rows, and only masks are gathered, a byte for 16
# weights. Layers hold their masks unsharded. The functions here also take plain tensors, whose rows are all here.


def is_dtensor(t: torch.Tensor) -> bool:
    return hasattr(t, "placements")  # isinstance would need DTensor, whose import takes most of a second


def local(t: torch.Tensor) -> torch.Tensor:
    """This rank's rows; shares memory with t."""
    return t.to_local() if is_dtensor(t) else t


def whole(t: torch.Tensor) -> torch.Tensor:
    """All rows, on every rank: a collective where t is sharded."""
    return t.full_tensor() if is_dtensor(t) else t


def piece(w: torch.Tensor) -> int:
    """The number of this rank's piece. The last dimension of the mesh is the one of pieces; one of replicas may precede
    it."""
    return w.device_mesh.get_local_rank(w.device_mesh.ndim - 1) if is_dtensor(w) else 0


def cut(rows: int, ranks: int) -> list[int]:
    """The number of rows on each rank, as torch.chunk cuts them: the last ranks may have fewer, or none."""
    step = -(-rows // ranks)
    return [max(0, min(step, rows - k * step)) for k in range(ranks)]


def fits(rows: int, ranks: int) -> bool:
    """Whether no 4x4 block of a matrix with this number of rows lies on two ranks."""
    return cut(rows, ranks)[0] % 4 == 0 or ranks == 1


def rows_of(w: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows of an unsharded mask that belong to this rank's rows of w. An index matrix, with a row for every four of
    w, may be given too."""
    if not is_dtensor(w):
        return mask
    per_row = w.shape[0] // mask.shape[0]
    first = sum(cut(w.shape[0], w.device_mesh.size(w.device_mesh.ndim - 1))[: piece(w)])
    return mask[first // per_row : (first + local(w).shape[0]) // per_row]


def by_rows(function: Callable, w: torch.Tensor, per_row: int) -> torch.Tensor:
    """function(w), sharded where w is. Its result (out / per_row, n) has a row for every `per_row` rows of w."""
    part = function(local(w))
    if not is_dtensor(w):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((w.shape[0] // per_row, *part.shape[1:]))
    layout = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    return DTensor.from_local(part, w.device_mesh, w.placements, run_check=False, **layout)


def total(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sum of `part` over the ranks that share `like`: a collective where it is sharded."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [*[Replicate()] * (like.device_mesh.ndim - 1), Partial()]
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False).full_tensor()


# ---------------------------------------------------------------------------------------------------------------------
# The layer

# Device types that have autocast. Asked once, because torch.compile before torch 2.13 cannot trace the question.
AUTOCAST = frozenset(t for t in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(t))


def mask_index(w: torch.Tensor, kind: str) -> torch.Tensor:
    """The index matrix of the mask that w (out, in) would have now, of kind "transposable" or "row". It is sharded
    where w is, but unsharded where the pieces of w cut through 4x4 blocks, as those of a dense run may."""
    if kind != "transposable":
        return by_rows(pair_index, w, 1)
    if is_dtensor(w) and not fits(w.shape[0], w.device_mesh.size(-1)):
        return transposable_index(whole(w))
    return by_rows(transposable_index, w, 4)


def prune(w: torch.Tensor, index: torch.Tensor, beta: torch.Tensor | None, mask: str) -> torch.Tensor:
    """W*M, or beta S(W): 2:4 along the rows."""
    if mask == "soft":
        return soft_threshold24(w) * beta
    return torch.where((expand_index if mask == "transposable" else expand_pairs)(index), w, 0)


def through_soft(dw: torch.Tensor, w: torch.Tensor, beta: torch.Tensor | None, kind: str) -> torch.Tensor:
    """From the gradient of beta S(W) to that of W: as it is ("straight"), or by beta and the Jacobian of S ("true")."""
    return soft_threshold24_backward(dw, w) * beta if kind == "true" else dw


@torch.library.custom_op("nano24::prune_again", mutates_args=())
def _prune_again(
    w: torch.Tensor, index: torch.Tensor, beta: torch.Tensor | None, mask: str, dz: torch.Tensor
) -> torch.Tensor:
    """prune, in the backward. Opaque to torch.compile, which would otherwise keep the pruned weight of the forward.
    `dz` is unused: it only makes the op wait for the backward."""
    return prune(w, index, beta, mask)


@_prune_again.register_fake
def _(w, index, beta, mask, dz):
    return torch.empty_like(w)


class _LayerMode(NamedTuple):
    """The part of the recipe and of the layer's state that _MaskedLinear reads."""

    mask: str
    mvue: bool
    weight_gradient: str
    fp8: bool
    prune_again: bool  # prune the weights again in the backward, instead of keeping the pruned ones


class _MaskedLinear(torch.autograd.Function):
    """Z = X w_24^T + b; dX = dZ (w_24 * backward_mask); dW = MVUE(dZ^T) X, which reaches W as the mode says; db from
    the unpruned dZ (Eq. 2-7). master: the weight that is pruned, before autocast where the mask is soft. backward_mask:
    bool, or None for the same as in the forward."""

    @staticmethod
    def operands(master, index, backward_mask, beta, dtype, mode, dz=None):
        """The operand of the forward, and that of the input's gradient. dz is given in the backward."""
        if dz is None:
            w_24 = prune(master, index, beta, mode.mask).to(dtype)
        else:
            w_24 = _prune_again(master, index, beta, mode.mask, dz).to(dtype)
        w_back = w_24 if backward_mask is None else torch.where(backward_mask, w_24, 0)
        if mode.fp8:
            w_24 = simulate_fp8(w_24, torch.float8_e4m3fn)
            w_back = w_24 if backward_mask is None else simulate_fp8(w_back, torch.float8_e4m3fn)
        return w_24, w_back

    @staticmethod
    def forward(ctx, x, weight, master, index, backward_mask, bias, seed, beta, mode):
        # `weight` only receives the gradient. The seed is copied: the next micro-step may overwrite it already.
        w_24, w_back = _MaskedLinear.operands(master, index, backward_mask, beta, weight.dtype, mode)
        x = simulate_fp8(x, torch.float8_e4m3fn) if mode.fp8 else x
        masks = (index, backward_mask) if mode.prune_again else (None, None)
        master = master if mode.prune_again or mode.weight_gradient == "true" else None
        seed = seed.clone() if mode.mvue else None
        ctx.save_for_backward(x, None if mode.prune_again else w_back, master, *masks, seed, beta)
        ctx.mode, ctx.dtype = mode, weight.dtype
        return F.linear(x, w_24, bias)

    @staticmethod
    @once_differentiable  # a second derivative would silently lack the weight's share
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
                if padding:  # exact: MVUE never prefers a zero token to a non-zero one, and zeros add nothing
                    x, dz_t = F.pad(x, (0, 0, 0, padding)), F.pad(dz_t, (0, padding))
                dz_t = mvue24(dz_t, seed)
            dw = (simulate_fp8(dz_t, torch.float8_e5m2) if mode.fp8 else dz_t) @ x
            dw = through_soft(dw, master, beta, mode.weight_gradient)
        if ctx.needs_input_grad[5]:
            db = dz.sum(0)
        return dx, dw, None, None, None, db, None, None, None


class Sparse24Linear(nn.Linear):
    """An nn.Linear whose weight is 2:4 sparse in the forward pass, and in the backward pass where its recipe says so.

    `.weight` (out, in) stays dense: it is what the optimizer updates. The state_dict holds these too:
    `.index`   the mask, set by `refresh_masks`; `.mask` is its bool (out, in) form. Transposable: uint8 (out/4, in/4)
               of transposable_index. Row-wise: uint8 (out, in/4) of pair_index. Soft: the pairs that S keeps.
    `.beta`    0-d, scale of soft weights.
    `.sparse`  bool; False = the dense phase, where this is a plain nn.Linear. Saved as extra state.
    And these are not saved:
    `.seed`    int64 0-d tensor that MVUE reads; `seed_draws` sets it, as a function of the step.
    `.prune_again`  prune once more in the backward. FSDP needs it, because it frees the weight in between.
    The mask of a fresh or reset layer matches its weights; call `refresh_masks` after setting or loading weights alone.
    Between steps of FSDP2 `.weight` is sharded, and `pruned_weight` and `densify(prune=True)` cannot be used.
    x: (..., in), any number of tokens. Under autocast all GEMMs run in its dtype, as nn.Linear's do.
    Raises ValueError when in or out is not divisible by 4, and for the recipe of a subclass.

    A method in methods/ subclasses it and overrides what it does differently: `new_index`, `refresh`, `begin_step`,
    `backward_mask`, `make_state` or `forward`.
    """

    def __init__(self, in_features, out_features, bias=True, recipe="fst", device=None, dtype=None):
        if in_features % 4 or out_features % 4:
            raise ValueError(
                f"Sparse24Linear: {in_features} in, {out_features} out, need both divisible by 4; "
                "change the width or leave this layer dense"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = get_recipe(recipe)
        layer_class = self.recipe.layer or Sparse24Linear
        if not isinstance(self, layer_class):
            need = f"needs {layer_class.__name__}; use that class, or sparsify"
            raise ValueError(f"Sparse24Linear: recipe {self.recipe.name!r} {need}")
        self.sparse = True
        self.prune_again = False
        self.make_state()

    def make_state(self) -> None:
        """Make buffers that match the weight."""
        self.register_buffer("index", self.new_index())
        if self.recipe.mask == "soft":
            self.register_buffer("beta", sste_scale(self.weight.detach()))
        seed = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        self.register_buffer("seed", seed, persistent=False)

    def new_index(self) -> torch.Tensor:
        """The index matrix of the mask that the weight would have now, unsharded."""
        return whole(mask_index(self.weight, self.recipe.virtual_mask))

    def begin_step(self, seed: int, iter_num: int, number: int) -> None:
        """Before every step in the sparse phase; number: the layer's among those of the model. Here it does nothing. A
        method that draws random numbers draws them from these three, so that a resumed run is the same run."""

    @torch.no_grad()
    def refresh(self, begin: bool = False) -> None:
        """Recompute the mask from the weights, and with `begin`, at the start of a sparse phase, beta too. In place;
        waits for no GPU. Sharded weights: masks are gathered, and for beta the weights."""
        self.index.copy_(self.new_index())
        if begin and self.recipe.mask == "soft":
            self.beta.copy_(sste_scale(whole(self.weight.detach())))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "index" in self._buffers:  # nn.Linear's __init__ calls this before there are buffers
            self.make_state()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | Recipe) -> "Sparse24Linear":
        """A sparse layer with the same Parameters as `linear`, so that an optimizer goes on. Draws no numbers."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, recipe, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.make_state()
        return layer.train(linear.training)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in ("flat", "pairs"):
            _table(name, self.index.device)  # copied now, so that no forward waits for it
        return self

    def _expand(self, index: torch.Tensor) -> torch.Tensor:
        return (expand_index if self.recipe.mask == "transposable" else expand_pairs)(index)

    @property
    def mask(self) -> torch.Tensor:
        """The current mask, bool (out, in), True = kept."""
        return self._expand(self.index)

    def mask_rows(self) -> torch.Tensor:
        """The rows of `.mask` that belong to this rank's rows of the weight."""
        return self._expand(rows_of(self.weight, self.index))

    @property
    def backward_mask(self) -> torch.Tensor | None:
        """A second mask, bool (out, in), of the weights that compute dX; None: dX multiplies the forward's weights."""
        return None

    def pruned_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight that multiplies X in the sparse phase, (out, in), 2:4 along in: W*M with the current mask, or
        beta S(W)."""
        weight, dtype = self.weight.detach(), dtype or self.weight.dtype
        weight = weight if self.recipe.mask == "soft" else weight.to(dtype)  # S depends on more than the order
        return prune(weight, self.index, self.scale, self.recipe.mask).to(dtype)

    @property
    def scale(self) -> torch.Tensor | None:
        """beta of soft weights; None for other masks."""
        return self.beta if self.recipe.mask == "soft" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sparse:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        device_type = x.device.type
        if device_type in AUTOCAST and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)  # for all but float64, as autocast itself does
            x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
        recipe = self.recipe
        mode = _LayerMode(recipe.mask, recipe.mvue, recipe.weight_gradient, recipe.fp8, self.prune_again)
        master = (self.weight if recipe.mask == "soft" else weight).detach()
        if not torch.is_grad_enabled():
            w_24, _ = _MaskedLinear.operands(master, self.index, None, self.scale, weight.dtype, mode)
            return F.linear(simulate_fp8(x, torch.float8_e4m3fn) if recipe.fp8 else x, w_24, bias)
        masks = (self.index, self.backward_mask)
        return _MaskedLinear.apply(x, weight, master, *masks, bias, self.seed, self.scale, mode)

    def get_extra_state(self) -> dict:
        return {"sparse": self.sparse}

    def set_extra_state(self, state: dict) -> None:
        self.sparse = bool(state["sparse"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}, sparse={self.sparse}"


# ---------------------------------------------------------------------------------------------------------------------
# The layers of a model


def sparse_linears(model: nn.Module) -> list[Sparse24Linear]:
    """The Sparse24Linear layers of `model`, in module order: the order in which `seed_draws` numbers them."""
    return [module for module in model.modules() if isinstance(module, Sparse24Linear)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _disable_encoder_fast_path(model: nn.Module) -> None:
    """nn.TransformerEncoder(Layer) in eval under no_grad read linear1.weight itself and would silently go dense."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and sparse_linears(module):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and sparse_linears(module):
            module.activation_relu_or_gelu = 0


def sparsify(
    model: nn.Module, recipe: str | Recipe, layers: Sequence[str] | Callable[[str, nn.Module], bool]
) -> list[str]:
    """Swap chosen nn.Linear layers of any model for sparse ones, in place; their Parameters stay the same objects.

    layers: names as in named_modules(), or a predicate (name, module). Only plain nn.Linear is swapped (a predicate
    ignores everything else; attention's out_proj, for example, is never called as a module). Layers that are sparse
    already stay as they are. Returns the names swapped. Raises ValueError, before anything is changed, when nothing
    matches, when a name is no nn.Linear of the model, or when a shape is not divisible by 4.
    """
    recipe = get_recipe(recipe)
    modules = model.named_modules(remove_duplicate=False)
    linears = {n: m for n, m in modules if type(m) is nn.Linear or isinstance(m, Sparse24Linear)}
    linears.pop("", None)  # the model itself cannot be swapped in place
    chosen = [n for n, m in linears.items() if (layers(n, m) if callable(layers) else n in layers)]
    unknown = [] if callable(layers) else [name for name in layers if name not in linears]
    if unknown or not chosen:
        raise ValueError(
            f"sparsify: {'no nn.Linear named ' + ', '.join(unknown) if unknown else 'no nn.Linear matches'}; "
            f"the model has {', '.join(linears) or 'none'}"
        )
    dense = dict.fromkeys(linears[name] for name in chosen if type(linears[name]) is nn.Linear)
    layer_class = recipe.layer or Sparse24Linear
    layer_of = {linear: layer_class.from_linear(linear, recipe) for linear in dense}
    swapped = [name for name, m in linears.items() if m in layer_of]  # a layer that has several names, under all
    for name in swapped:
        _replace(model, name, layer_of[linears[name]])
    _disable_encoder_fast_path(model)
    return swapped


@torch.no_grad()
def densify(model: nn.Module, prune: bool = False) -> list[str]:
    """Swap every Sparse24Linear back for an nn.Linear, in place, for export; Parameters stay the same objects.

    prune: also prune the weights of the layers that are in their sparse phase, so that the dense model computes what
    the sparse one did. Returns the names swapped. Raises ValueError when the model itself is one such layer.
    """
    if isinstance(model, Sparse24Linear):
        raise ValueError("densify: the model itself is a Sparse24Linear, need a model that contains it; wrap it")
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Sparse24Linear)}
    linear_of = {}
    for layer in dict.fromkeys(layers.values()):
        if prune and layer.sparse:
            layer.weight.copy_(layer.pruned_weight())
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        linear_of[layer] = linear.train(layer.training)
    for name, layer in layers.items():
        _replace(model, name, linear_of[layer])
    return list(layers)


@torch.no_grad()
def refresh_masks(model: nn.Module, measure: bool = True) -> float | None:
    """Recompute the mask of every layer in its sparse phase from its weights (Algorithm 1).

    Returns the flip rate against the masks replaced, over all these layers, weighed by their weights; 0.0 with none.
    measure=False returns None, and never waits for the GPU.
    """
    layers = [layer for layer in sparse_linears(model) if layer.sparse]
    before = [layer.index.clone() for layer in layers] if measure else []
    for layer in layers:
        layer.refresh()
    return flip_rate(before, [layer.index for layer in layers]) if measure else None


@torch.no_grad()
def weight_indices(linears: Sequence[nn.Linear], kind: str = "transposable") -> list[torch.Tensor]:
    """The masks that these weights would have now, as index matrices: for the flip rate of sparse and dense runs."""
    return [mask_index(linear.weight, kind) for linear in linears]


@contextmanager
@torch.no_grad()
def hard_pruned(linears: Sequence[nn.Linear]):
    """Inside, these layers compute what they would once deployed, 2:4 sparse along their inputs: those in their sparse
    phase do so already; the weights of all others are pruned by magnitude (mask24), and restored at the end."""
    dense = dict.fromkeys(local(m.weight) for m in linears if not getattr(m, "sparse", False))
    saved = [w.detach().clone() for w in dense]
    try:
        for w in dense:
            w.copy_(torch.where(expand_pairs(pair_index(w)), w, 0))
        yield
    finally:
        for w, before in zip(dense, saved, strict=True):
            w.copy_(before)


def seed_words(count: int, *key: int) -> np.ndarray:
    """`count` uint64 words that are a function of the non-negative ints `key` alone (numpy's SeedSequence)."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64)


@torch.no_grad()
def seed_draws(model: nn.Module, seed: int, iter_num: int, micro_batch: int) -> None:
    """Fill every layer's `.seed` from (seed, iteration, global micro-batch, layer number): call it per micro-step."""
    layers = sparse_linears(model)
    if not layers:
        return
    words = torch.from_numpy(seed_words(len(layers), seed, iter_num, micro_batch).view(np.int64))
    words = words.to(layers[0].seed.device, non_blocking=True)  # one copy and one launch, however many layers
    torch._foreach_copy_([layer.seed for layer in layers], list(words.unbind()))


def begin_step(model: nn.Module, seed: int, iter_num: int) -> None:
    """`begin_step` of every layer in its sparse phase: call it once per step, before the first `seed_draws`."""
    for number, layer in enumerate(sparse_linears(model)):
        if layer.sparse:
            layer.begin_step(seed, iter_num, number)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def adamw_scalars(step: int, lr, betas, eps, weight_decay, masked_decay) -> tuple[float, ...]:
    """One tensor's hyperparameters at its step number `step`, counted from 1, in the form that kernels.adamw_ takes."""
    beta1, beta2 = betas
    corrected_lr, root_bias2 = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, corrected_lr, root_bias2, masked_decay


def adamw_fits(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether kernels.adamw_ takes all of these: one CUDA device, float32, contiguous, aligned, elements by fours."""
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


def adamw_(params, grads, exp_avgs, exp_avg_sqs, indices, scalars, decay_on_weight: bool) -> None:
    """kernels.adamw_, for tensors that `adamw_fits`; scalars are `adamw_scalars`. The specification is
    `masked_decay_`, then torch.optim.AdamW."""
    _kernels.adamw_(params, grads, exp_avgs, exp_avg_sqs, indices, scalars, decay_on_weight)


class MaskedDecayAdamW(torch.optim.AdamW):
    """AdamW with masked decay on the weights of `model`'s sparse layers, with the masks that the layers have now.

    decay_on="grad" is Eq. 10, grad += masked_decay * ~mask * w, in place, once per step. The gradients must be unscaled
    and clipped already. "weight" is SR-STE's Eq. 8, w -= lr * masked_decay * ~mask * w, before the Adam update. Layers
    whose `.sparse` is False get plain AdamW. Other arguments are torch.optim.AdamW's. `masked_decay` may be changed
    between steps. Raises ValueError for a negative factor or another decay_on.

    float32 parameters on CUDA take a step in one kernel launch, which only reads the gradients. Row-wise masks that
    decay do not, nor do steps with an option of torch's such as fused or foreach, also when a loaded state dict sets
    it. State and checkpoints are torch's either way.

    A method in methods/ subclasses it and overrides `update` or `dense_start_done`.
    """

    def __init__(self, params, model: nn.Module, *args, masked_decay: float, decay_on: str = "grad", **kwargs):
        if not masked_decay >= 0 or decay_on not in ("grad", "weight"):
            raise ValueError(
                f"MaskedDecayAdamW: masked_decay={masked_decay}, decay_on={decay_on!r}; need a factor of at least 0 "
                "and 'grad' or 'weight'"
            )
        super().__init__(params, *args, **kwargs)
        self.masked_decay = masked_decay
        self.decay_on = decay_on
        self.model = model
        self.dense_start_log: list[float] | None = None  # what dense_start_done has seen; checkpoints hold it
        # torch's fused kernel would unscale by itself, after the decay was added. So GradScaler unscales before.
        self._step_supports_amp_scaling = False

    def _decayed(self) -> dict[torch.Tensor, Sparse24Linear]:
        """{weight: layer} of the layers that decay. A weight that layers share decays once."""
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
                layer, rows = layers[w], local(w)
                if self.decay_on == "grad":
                    mask = rows_of(w, layer.index) if layer.recipe.mask == "transposable" else layer.mask_rows()
                    masked_decay_(local(w.grad), rows, mask, self.masked_decay)
                else:
                    rows.sub_(torch.where(layer.mask_rows(), 0, rows) * (group["lr"] * self.masked_decay))

    @torch.no_grad()
    def _kernel_step(self) -> bool:
        """Do the whole step in one launch of kernels.adamw_. Returns False, and does nothing, where it cannot."""
        groups = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        special = ("amsgrad", "maximize", "capturable", "differentiable", "fused", "foreach")
        if not groups or any(group[key] for group, _ in groups for key in special):
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
                # on the CPU, so that reading it does not wait for the GPU
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if state["step"].is_cuda:  # from the state of a fused optimizer
                state["step"] = state["step"].cpu()
            moments.append((local(state["exp_avg"]), local(state["exp_avg_sq"])))
        if not adamw_fits([t for pair in moments for t in pair]):
            return False
        for group, p in groups:
            step = self.state[p]["step"]
            step += 1
            lr, decay = float(group["lr"]), self.masked_decay * (float(group["lr"]) if self.decay_on == "weight" else 1)
            scalars.append(adamw_scalars(int(step), lr, group["betas"], group["eps"], group["weight_decay"], decay))
        adamw_(
            [local(p) for _, p in groups],
            [local(p.grad) for _, p in groups],
            *(list(column) for column in zip(*moments, strict=True)),
            [indices.get(p) for _, p in groups],
            scalars,
            self.decay_on == "weight",
        )
        return True

    def update(self) -> None:
        """Adam's update, without masked decay. A subclass that overrides it steps without the kernel."""
        # torch wraps the step of an optimizer class when it is first used, to run the hooks. Ours is wrapped already.
        step = torch.optim.AdamW.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    def dense_start_done(self) -> bool:
        """Whether the sparse phase may begin with the next step. train.py asks it between clipping and the step, from
        the first iteration on, where the recipe has dense_pretrain_latest."""
        return False

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own_update = type(self).update is not MaskedDecayAdamW.update
        if own_update or not self._kernel_step():
            self._apply_masked_decay()
            self.update()
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# The self-test of the operators above: use_kernels runs it once for each device


def awkward_matrix(device: torch.device) -> torch.Tensor:
    """float32 (64, 136) with ties, zeros and a subnormal."""
    w = torch.randn(64, 136, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    w[:4, :8] = w.new_tensor([0.0, 1.0, -1.0, 1e-40]).repeat(2)
    return w.to(device)


def same_numbers(got: torch.Tensor, expected: torch.Tensor, **tolerance) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN; or allclose within the tolerance."""
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

# Names of the last release for the specifications.
transposable_index_ref, pair_index_ref = transposable_index.torch, pair_index.torch
mvue24_ref, mvue24_kept_ref = mvue24.torch, mvue24_with_mask
soft_threshold24_ref, sste_scale_ref = soft_threshold24.torch, sste_scale.torch
flip_count_ref, masked_decay_ref_ = flip_count, masked_decay_


def mask24_ref(w: torch.Tensor) -> torch.Tensor:
    return expand_pairs(pair_index.torch(w))

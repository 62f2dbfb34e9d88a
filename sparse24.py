"""2:4 sparse training of transformers: the papers' operators, layer and optimizer, in plain PyTorch.

Fully sparse training, FST (Hu et al., ICML 2024). W is (out, in), X (BT, in), Z = X W^T, M a transposable 2:4 mask:
    forward    Z  = X (W*M)^T                         2:4 along in                                     Eq. 2
    backward   dX = dZ (W*M)                          2:4 along out: M^T is a 2:4 mask too             Eq. 3, 5
               dW = MVUE(dZ^T) X                      2:4 along tokens; reaches every entry of W       Eq. 4, 6, 7
               db = sum over tokens of the unpruned dZ
    step       g <- clipped dW + decay * ~M * W       masked decay, before Adam's moments              Eq. 10
    refresh    M <- argmax over the 90 patterns of |W*M|_1 in each 4x4 block, every `mask_interval`    Algorithm 1
Here the GEMMs are dense ones on pruned operands. A mask is kept as its index matrix, one uint8 per 4x4 block.

Every operator is a plain-PyTorch twin `name_ref`, the specification; `name` is what the rest of the code calls.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------------
# The 90 transposable patterns. Their order is a disk format (checkpoints store indices) and is arithmetic, so that the
# search below needs no table. Rows a, b, c, d of a block; a pair is the two kept columns; ~ is the complement:
#   A  0 + p                a, b keep pair p; c, d keep ~p                                                         6
#   C  6 + 6 p + q          a keeps p, b keeps ~p; c keeps q, d keeps ~q                                          36
#   B  42 + 8 jk + 4e+2x+y  of the complement (i, l) of jk, a, b keep column (l if e else i), c, d the other one;
#                           of (j, k), a keeps (k if x else j) and b the other, c keeps (k if y else j), d ...    48

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def _all_patterns() -> torch.Tensor:
    def rows(*kept: tuple[int, int]) -> list[list[bool]]:
        return [[column in pair for column in range(4)] for pair in kept]

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
_TABLES = {  # per device, copied there once
    "flat": {_CPU: PATTERNS.flatten(1)},  # bool (90, 16)
    "hamming": {_CPU: (PATTERNS.flatten(1)[:, None] != PATTERNS.flatten(1)[None]).sum(-1)},  # entries that differ
}


def _table(name: str, device: torch.device) -> torch.Tensor:
    tables = _TABLES[name]
    if device in tables:
        return tables[device]
    table = tables[_CPU].to(device)
    if not torch.compiler.is_compiling():  # what is traced must not outlive its graph
        tables[device] = table
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def _check_groups(function: str, x: torch.Tensor) -> None:
    if x.dim() < 2 or x.shape[-1] % 4:
        raise ValueError(
            f"{function}: shape {tuple(x.shape)}, need at least two dimensions and a last one divisible by 4; "
            "pad with zeros or reshape"
        )


def _check_blocks(function: str, w: torch.Tensor) -> None:
    if w.dim() != 2 or w.shape[0] % 4 or w.shape[1] % 4:
        raise ValueError(
            f"{function}: shape {tuple(w.shape)}, need (out, in) with both divisible by 4; change the layer"
        )


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    """|x| in the dtype the arithmetic is done in: float64 stays, all others become float32."""
    return x.abs().to(torch.promote_types(x.dtype, torch.float32))


def _top2(x: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest sum of two of four tensors, and which pair it is (0..5, as in PAIRS)."""
    best = torch.maximum(x[0], x[1]) + torch.maximum(x[2], x[3])
    pair = 1 + 2 * (x[1] > x[0]).to(torch.uint8) + (x[3] > x[2]).to(torch.uint8)  # 02, 03, 12, 13 are 1, 2, 3, 4
    for candidate, number in ((x[0] + x[1], 0), (x[2] + x[3], 5)):
        pair = torch.where(candidate > best, number, pair)
        best = torch.maximum(candidate, best)
    return best, pair


def transposable_index_ref(w: torch.Tensor) -> torch.Tensor:
    """The pattern of largest kept L1 norm in each 4x4 block: Algorithm 1's argmax over 90, by 8 candidates.

    With x = a-b, y = c-d, f = b-c, e = x+y+2f per column of |w|, every score less the constant sum(c+d) is
    A = top2(e), C = sum(f) + top2(x) + top2(y), or B_jk = f_j+f_k + max(x_j,x_k) + max(y_j,y_k) + max(e_i,e_l).

    w: (out, in), any float dtype and strides. Returns uint8 (out/4, in/4), entries 0..89, also where w is not finite.
    Exact: the kept norm is the optimum within float32 rounding (1e-6 relative). Raises ValueError on other shapes.
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
    """Index matrix uint8 (out/4, in/4) of `transposable_index` to mask bool (out, in), True = kept."""
    if index.dtype != torch.uint8 or index.dim() != 2:
        raise ValueError(
            f"expand_index: {index.dtype} {tuple(index.shape)}, need the uint8 (out/4, in/4) of transposable_index"
        )
    blocks = _table("flat", index.device)[index.long()].unflatten(-1, (4, 4))  # (out/4, in/4, 4, 4)
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def transposable_mask(w: torch.Tensor) -> torch.Tensor:
    """Mask bool (out, in) with two kept in every row and column of each 4x4 block, of largest kept L1 norm (5.1)."""
    return expand_index(transposable_index(w))


def transposable_mask_2approx(w: torch.Tensor) -> torch.Tensor:
    """Sort-and-pick 2-approximation of Hubara et al. (2021), the baseline of the paper's Table 2.

    Takes the 16 entries of a block in order of magnitude while their row and column hold fewer than two. Some blocks
    end with 7 kept. w: (out, in), both divisible by 4. Returns bool (out, in). Raises ValueError on other shapes.
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


def mask24_ref(w: torch.Tensor) -> torch.Tensor:
    """Row-wise 2:4 mask: the two largest magnitudes of each group of four along the last dimension (section 3.1).

    Ties keep the lower index. w: (..., n), n divisible by 4. Returns bool of w's shape. Raises ValueError otherwise.
    """
    _check_groups("mask24", w)
    groups = w.detach().abs().unflatten(-1, (-1, 4))
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)


def flip_rate(before, after) -> float:
    """Definition 4.1: the share of mask entries that differ, ||m(w_t) - m(w_{t-1})||_1 / D, a fraction per step.

    before, after: two bool masks, or two uint8 index matrices, or two equally long lists of them (layers, weighed by
    their entries). Row-wise indices (0..5) may be given too: pattern p < 6 differs from q in four times the entries
    in which pair p differs from q, of four times as many. Raises ValueError where shapes or dtypes differ.
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
        if old.dtype == torch.bool:
            flips.append((old != new).sum())
            entries += old.numel()
        else:
            flips.append(_table("hamming", old.device)[old.long(), new.long()].sum())
            entries += 16 * old.numel()
    return int(torch.stack(flips).sum()) / entries if entries else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# MVUE: the minimum-variance unbiased 2:4 estimator of a gradient (Eq. 6; Chmiel et al., 2023)
#
# With a = |x|, S = sum a, keep i with probability pi_i and value x_i/pi_i. Minimising sum a_i^2/pi_i under sum pi = 2,
# pi <= 1 gives pi_i = min(a_i/h, 1) and magnitude max(a_i, h), where h = min(S/2, S - max a). Systematic sampling
# needs one uniform u per group: with b_i = min(a_i, h), whose sum is 2h, and its running sums C_i, keep the elements
# in whose [C_{i-1}, C_i) the points u h and u h + h fall. Two distinct elements, always.
#
# Randomness is stateless: the uniform of (row, group of four columns) is one word of Philox4x32-10 (Salmon et al.,
# 2011), a function of the seed and the position alone. Rows r and r+8 of a 16-row tile and column groups q and q+4 of
# a 32-column tile share a counter and take its four words, since a GPU thread owns just these four.

_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(x: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of x * constant; x is int64 holding uint32. The product may wrap, its bits are right."""
    product = x * constant
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(counter: Sequence[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four words from four counter words and two key words, all int64 tensors holding uint32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def group_uniforms(rows: int, groups: int, seed, device=None, stream: int = 0) -> torch.Tensor:
    """One uniform in [0, 1) per (row, group of four), float32 (rows, groups), multiples of 2^-23.

    seed: an int (taken modulo 2^64) or an int64 0-d tensor, the Philox key. `stream` gives independent draws.
    Counter of (r, q): (8 (r//16) + r%8) * 4 ceil(groups/8) + 4 (q//8) + q%4; word: 2 (r//8 % 2) + (q//4 % 2).
    """
    tiles, panels = -(-rows // 16), -(-groups // 8)
    if not torch.is_tensor(seed):
        seed = torch.tensor((int(seed) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    counter = torch.arange(tiles * 8 * panels * 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(counter)
    words = philox4x32(
        (counter & _MASK32, counter >> 32, zero + stream, zero), (seed & _MASK32, (seed >> 32) & _MASK32)
    )
    words = torch.stack(words).view(2, 2, tiles, 8, panels, 4)  # (row half, column half, tile, row, panel, column)
    words = words.permute(2, 0, 3, 4, 1, 5).reshape(tiles * 16, panels * 8)[:rows, :groups]
    return (words & 0x7FFFFF).float() * 2.0**-23


def _uniforms_like(function: str, x: torch.Tensor, seed, u: torch.Tensor | None) -> torch.Tensor:
    shape = (*x.shape[:-1], x.shape[-1] // 4)
    if u is None:
        u = group_uniforms(math.prod(shape[:-1]), shape[-1], seed, x.device).to(x.device).view(shape)
    elif u.shape != shape:
        raise ValueError(f"{function}: u has shape {tuple(u.shape)}, need {shape}, one uniform per group of four")
    return u


def mvue24_ref(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> torch.Tensor:
    """Exact MVUE: an unbiased 2:4 sample of x along its last dimension, of the smallest possible variance (Eq. 6).

    x: (..., n), n divisible by 4, any strides; float64 is computed in itself, all else in float32, rounded once to
    x's dtype. seed: int or int64 0-d tensor. u: uniforms (..., n/4) in [0, 1) that replace the seeded draw.
    Keeps two elements of each group, two non-zero ones where there are two; a zero group gives zeros; a group with a
    non-finite element stays non-finite. Raises ValueError for a 1-D x, n % 4 != 0 or another shape of u.
    """
    _check_groups("mvue24", x)
    groups = x.unflatten(-1, (-1, 4))
    a0, a1, a2, a3 = _magnitude(groups).unbind(-1)
    u = _uniforms_like("mvue24", x, seed, u).to(a0.dtype)
    # The three smallest are summed, rather than S - max taken, so that nothing cancels.
    max01, max23 = torch.maximum(a0, a1), torch.maximum(a2, a3)
    rest = torch.minimum(a0, a1) + torch.minimum(a2, a3) + torch.minimum(max01, max23)
    h = torch.minimum(rest, ((a0 + a1) + (a2 + a3)) / 2)
    t = u * h
    t = torch.where(t < h, t, 0)  # the product of a subnormal h rounds up to h: t = h would keep a zero
    s = h - t
    # First kept: the first i with C_i > t. Second: the last i whose suffix sum of b is at least s. What stands beside
    # these comparisons holds by itself but for rounding: the two are distinct, no zero displaces a non-zero element,
    # and an inner element above h, whose pi is 1, is always one of them.
    past0 = a0 <= t
    past1 = a0 + a1 <= t
    from3 = ((a3 >= s) & (a2 <= h) & (past0 | (a1 <= h))) | past1 | (past0 & (a2 == 0))
    from2 = ((a2 + a3 >= s) & (a1 <= h)) | past0
    low = torch.where(past1, 2, past0.to(torch.int8))
    high = torch.where(from3, 3, 1 + from2.to(torch.int8))
    position = torch.arange(4, device=x.device, dtype=torch.int8)
    kept = (position == low.unsqueeze(-1)) | (position == high.unsqueeze(-1))
    values = torch.sign(groups) * torch.maximum(_magnitude(groups), h.unsqueeze(-1))
    return torch.where(kept, values, 0).flatten(-2).to(x.dtype)


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
    total = a.sum(-1, keepdim=True)
    inclusion = a / total
    for j in range(4):  # j first, then i
        others = [i for i in range(4) if i != j]
        rest = a[..., others].sum(-1, keepdim=True)  # S - a_j, without cancellation
        inclusion[..., others] += torch.where(rest > 0, a[..., j : j + 1] / total * (a[..., others] / rest), 0)

    def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        sums = weights.cumsum(-1)
        return (sums <= uniform * sums[..., -1:]).sum(-1, keepdim=True).clamp(max=3)

    first = draw(a, u)
    second = draw(a.scatter(-1, first, 0), v)
    kept = torch.zeros_like(a, dtype=torch.bool).scatter_(-1, first, True).scatter_(-1, second, True)
    values = torch.where(groups == 0, 0, groups / inclusion)
    finite = torch.isfinite(total)
    return torch.where(kept | ~finite, values, 0).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Soft threshold (S-STE; Hu et al., NeurIPS 2024) and masked decay (Eq. 10)


def soft_threshold24_ref(w: torch.Tensor) -> torch.Tensor:
    """S-STE's continuous pruning: subtract the second-smallest magnitude t of the group, keep what stays positive.

    sign(w) * max(|w| - t, 0) per group of four along the last dimension. w: (..., n), n divisible by 4; any strides.
    Returns w's shape and dtype, at most two non-zeros a group. Raises ValueError on other shapes.
    """
    _check_groups("soft_threshold24", w)
    groups = w.unflatten(-1, (-1, 4))
    a = _magnitude(groups)
    threshold = a.sort(dim=-1).values[..., 1:2]
    return (torch.sign(groups) * (a - threshold).clamp(min=0)).flatten(-2).to(w.dtype)


def sste_scale(w: torch.Tensor) -> torch.Tensor:
    """S-STE's beta = <w, S(w)> / <S(w), S(w)>, the least-squares scale of the soft-thresholded w; 1 where S(w) is 0.

    w: (..., n), n divisible by 4. Returns a float32 (float64 for float64 w) 0-d tensor on w's device.
    """
    soft = soft_threshold24(w).to(torch.promote_types(w.dtype, torch.float32))
    square = soft.square().sum()
    return torch.where(square > 0, (w.to(soft.dtype) * soft).sum() / square, 1)


@torch.no_grad()
def masked_decay_ref_(grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
    """Eq. 10, in place: grad += decay * ~mask * w. All of one shape, mask bool; decay per step. Returns grad."""
    if not grad.shape == w.shape == mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masked_decay_: grad {tuple(grad.shape)}, w {tuple(w.shape)}, mask {mask.dtype} {tuple(mask.shape)}; "
            "need one shape and a bool mask"
        )
    return grad.add_(torch.where(mask, 0, w).to(grad.dtype), alpha=decay)


# What everything else calls. The Triton kernels of kernels.py will be chosen here on CUDA.
transposable_index = transposable_index_ref
mask24 = mask24_ref
mvue24 = mvue24_ref
soft_threshold24 = soft_threshold24_ref
masked_decay_ = masked_decay_ref_


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: every choice that makes one method differ from another


@dataclass(frozen=True)
class Recipe:
    """One method of 2:4 training. Fractions are of max_iters, intervals in optimizer steps."""

    name: str
    mask: str = "transposable"  # "transposable", "row" (row-wise by magnitude) or "soft" (soft threshold, row-wise)
    backward_mask: str = "same"  # dX multiplies the forward's masked W ("same") or one with its own mask ("own")
    mvue: bool = False  # 2:4 weight-gradient GEMM through MVUE, else a dense one
    masked_decay: float = 0.0  # the decay factor lambda itself; 0 = none
    decay_on: str = "grad"  # "grad": Eq. 10, before Adam's moments; "weight": SR-STE's Eq. 8
    mask_interval: int = 40  # steps between mask refreshes
    dense_finetune: float = 0.0  # share of the steps that are dense, at the end
    dense_pretrain: float = 0.0  # share of the steps that are dense, at the start
    precondition: bool = False  # STEP: Adam's second moments are frozen after the dense start
    beta: str = "none"  # scale of the pruned weights in the forward: "none", or "init" (least squares, fixed at start)

    def __post_init__(self):
        allowed = {
            "mask": ("transposable", "row", "soft"),
            "backward_mask": ("same", "own"),
            "decay_on": ("grad", "weight"),
            "beta": ("none", "init"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"Recipe: {field}={getattr(self, field)!r}, need one of {', '.join(values)}")
        if not self.masked_decay >= 0 or math.isinf(self.masked_decay):
            raise ValueError(f"Recipe: masked_decay={self.masked_decay}, need a finite factor of at least 0")
        if self.mask_interval < 1:
            raise ValueError(f"Recipe: mask_interval={self.mask_interval}, need at least 1 step")
        for field in ("dense_finetune", "dense_pretrain"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"Recipe: {field}={getattr(self, field)}, need a fraction of max_iters from 0 to 1")

    def check_trainable(self) -> None:
        """Raises NotImplementedError for a method whose layer or schedule is not built yet."""
        missing = [
            f"{field}={getattr(self, field)!r}"
            for field, built in (
                ("mask", "transposable"),
                ("backward_mask", "same"),
                ("dense_pretrain", 0.0),
                ("precondition", False),
                ("beta", "none"),
            )
            if getattr(self, field) != built
        ]
        if missing:
            raise NotImplementedError(
                f"recipe {self.name!r}: training with {', '.join(missing)} is not built yet; use 'fst' or 'ste'"
            )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fst", mvue=True, masked_decay=6e-5, dense_finetune=1 / 6),
        Recipe("ste"),  # FST without masked decay, MVUE and dense fine-tuning: the paper's flip-rate explosion
        Recipe("sr_ste", mask="row", masked_decay=2e-4, decay_on="weight", mask_interval=1),
        Recipe("s_ste", mask="soft", mvue=True, mask_interval=1, beta="init"),
        Recipe("step", mask="row", mask_interval=1, dense_pretrain=0.1, precondition=True),
        Recipe("bi_mask", mask="row", backward_mask="own", mask_interval=1),
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself. Raises ValueError with the names there are."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown, need one of {', '.join(RECIPES)}")
    return RECIPES[recipe]


# ---------------------------------------------------------------------------------------------------------------------
# The layer


class _MaskedLinear(torch.autograd.Function):
    """Z = X w_24^T + b; dX = dZ w_24; dW = MVUE(dZ^T) X straight through to W; db from the unpruned dZ (Eq. 2-7)."""

    @staticmethod
    def forward(ctx, x, weight, w_24, bias, seed, mvue):
        # weight only receives the gradient. The seed is copied, so that the next micro-step may fill it already.
        ctx.save_for_backward(x, w_24, seed.clone() if mvue else None)
        ctx.mvue = mvue
        return F.linear(x, w_24, bias)

    @staticmethod
    @once_differentiable  # a second derivative would silently lack the weight's share
    def backward(ctx, dz):
        x, w_24, seed = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dz @ w_24
        dz = dz.reshape(-1, dz.shape[-1])  # (BT, out)
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])  # (BT, in)
            dz_t = dz.t()
            if ctx.mvue:
                padding = -dz.shape[0] % 4
                if padding:  # zero tokens are never drawn over others and contribute nothing: exact
                    x, dz_t = F.pad(x, (0, 0, 0, padding)), F.pad(dz_t, (0, padding))
                dz_t = mvue24(dz_t, seed)
            dw = dz_t @ x
        if ctx.needs_input_grad[3]:
            db = dz.sum(0)
        return dx, dw, None, db, None, None


class Sparse24Linear(nn.Linear):
    """An nn.Linear whose weight is 2:4 sparse in the forward and the backward pass, trained straight through.

    `.weight` (out, in) stays dense: it is what the optimizer updates. State, all of it in state_dict:
    `.index`   uint8 (out/4, in/4), the transposable mask, set by `refresh_masks`; `.mask` is its bool (out, in) form.
    `.sparse`  bool; False = the dense phase, where this is a plain nn.Linear. Saved as extra state.
    `.seed`    int64 0-d tensor that MVUE reads, set by `seed_draws`; not saved, since it is a function of the step.
    A fresh or reset layer's mask matches its weights; call `refresh_masks` after setting or loading weights alone.
    x: (..., in), any number of tokens. Under autocast all GEMMs run in its dtype, as nn.Linear's do.
    Raises ValueError when in or out is not divisible by 4, NotImplementedError for a recipe not built yet.
    """

    def __init__(self, in_features, out_features, bias=True, recipe="fst", device=None, dtype=None):
        recipe = get_recipe(recipe)
        recipe.check_trainable()
        if in_features % 4 or out_features % 4:
            raise ValueError(
                f"Sparse24Linear: {in_features} in, {out_features} out, need both divisible by 4; "
                "change the width or leave this layer dense"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = recipe
        self.sparse = True
        self.register_buffer("index", transposable_index(self.weight))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "index" in self._buffers:  # not yet there when nn.Linear's __init__ comes by
            self.index.copy_(transposable_index(self.weight))
            self.seed.zero_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | Recipe) -> "Sparse24Linear":
        """A sparse layer with the very Parameters of `linear`, so an optimizer goes on; draws no random numbers."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, recipe, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.index = transposable_index(linear.weight)
        layer.seed = torch.zeros((), dtype=torch.int64, device=linear.weight.device)
        return layer.train(linear.training)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        _table("flat", self.index.device)  # copied now, so that no forward waits for it
        return self

    @property
    def mask(self) -> torch.Tensor:
        """The current mask, bool (out, in), True = kept."""
        return expand_index(self.index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sparse:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        device_type = x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)  # for all but float64, as autocast itself does
            x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
        w_24 = torch.where(self.mask, weight.detach(), 0)
        if not torch.is_grad_enabled():
            return F.linear(x, w_24, bias)
        return _MaskedLinear.apply(x, weight, w_24, bias, self.seed, self.recipe.mvue)

    def get_extra_state(self) -> dict:
        return {"sparse": self.sparse}

    def set_extra_state(self, state: dict) -> None:
        self.sparse = bool(state["sparse"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}, sparse={self.sparse}"


def sparse_linears(model: nn.Module) -> list[Sparse24Linear]:
    """The Sparse24Linear layers of `model`, in module order: the order that `seed_draws` numbers them in."""
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
    """Swap chosen nn.Linear layers of any model for Sparse24Linear, in place; their Parameters stay the same objects.

    layers: names as in named_modules(), or a predicate (name, module). Only plain nn.Linear is swapped (a predicate
    passes over everything else; attention's out_proj, say, is never called as a module). Layers that are sparse
    already stay as they are. Returns the names swapped. Raises ValueError, before anything is changed, when nothing
    matches, when a name is no nn.Linear of the model, or when a shape is not divisible by 4.
    """
    recipe = get_recipe(recipe)
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) in (nn.Linear, Sparse24Linear)}
    linears.pop("", None)  # the model itself cannot be swapped in place
    chosen = [n for n, m in linears.items() if (layers(n, m) if callable(layers) else n in layers)]
    unknown = [] if callable(layers) else [name for name in layers if name not in linears]
    if unknown or not chosen:
        raise ValueError(
            f"sparsify: {'no nn.Linear named ' + ', '.join(unknown) if unknown else 'no nn.Linear matches'}; "
            f"the model has {', '.join(linears) or 'none'}"
        )
    dense = dict.fromkeys(linears[name] for name in chosen if type(linears[name]) is nn.Linear)
    layer_of = {linear: Sparse24Linear.from_linear(linear, recipe) for linear in dense}
    swapped = [name for name, m in linears.items() if m in layer_of]  # under all of its names, where it has several
    for name in swapped:
        _replace(model, name, layer_of[linears[name]])
    _disable_encoder_fast_path(model)
    return swapped


@torch.no_grad()
def densify(model: nn.Module, prune: bool = False) -> list[str]:
    """Swap every Sparse24Linear back for an nn.Linear, in place, for export; Parameters stay the same objects.

    prune: also zero the masked weights of the layers that are in their sparse phase, so that the dense model computes
    what the sparse one did. Returns the names swapped. Raises ValueError when the model itself is one such layer.
    """
    if isinstance(model, Sparse24Linear):
        raise ValueError("densify: the model itself is a Sparse24Linear, need a model that contains it; wrap it")
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Sparse24Linear)}
    linear_of = {}
    for layer in dict.fromkeys(layers.values()):
        if prune and layer.sparse:
            layer.weight.masked_fill_(~layer.mask, 0)
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        linear_of[layer] = linear.train(layer.training)
    for name, layer in layers.items():
        _replace(model, name, linear_of[layer])
    return list(layers)


@torch.no_grad()
def refresh_masks(model: nn.Module) -> float:
    """Recompute the mask of every layer in its sparse phase from its weights (Algorithm 1).

    Returns the flip rate against the masks replaced, over all these layers, weighed by their weights; 0.0 with none.
    """
    before, after = [], []
    for layer in sparse_linears(model):
        if layer.sparse:
            before.append(layer.index.clone())
            after.append(layer.index.copy_(transposable_index(layer.weight)))
    return flip_rate(before, after)


@torch.no_grad()
def weight_indices(linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
    """The masks that these weights would have now, as index matrices: for the flip rate of sparse and dense runs."""
    return [transposable_index(linear.weight) for linear in linears]


def seed_words(count: int, *key: int) -> np.ndarray:
    """`count` uint64 words that are a function of the non-negative ints `key` alone (numpy's SeedSequence)."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64)


@torch.no_grad()
def seed_draws(model: nn.Module, seed: int, iter_num: int, micro_batch: int) -> None:
    """Fill every layer's `.seed` from (seed, iteration, global micro-batch, layer number): call it per micro-step."""
    layers = sparse_linears(model)
    words = seed_words(len(layers), seed, iter_num, micro_batch).view(np.int64)
    for layer, word in zip(layers, words.tolist(), strict=True):
        layer.seed.fill_(word)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def decay_ratio(model: nn.Module, decay: float) -> float | None:
    """RMS(decay * ~mask * w) / RMS(grad) over the sparse weights: how strong masked decay is beside the gradient.

    Call it between clipping and the optimizer's step. None where no layer is sparse or has a gradient.
    """
    layers = [m for m in sparse_linears(model) if m.sparse and m.weight.grad is not None]
    if not layers:
        return None
    decayed = sum(torch.where(m.mask, 0, m.weight.detach()).float().square().sum() for m in layers)
    gradient = sum(m.weight.grad.float().square().sum() for m in layers)
    return float(decay * (decayed / gradient).sqrt()) if float(gradient) > 0 else None


class MaskedDecayAdamW(torch.optim.AdamW):
    """AdamW with masked decay on the weights of `model`'s sparse layers, with their current (maybe stale) masks.

    decay_on="grad" adds Eq. 10, grad += masked_decay * ~mask * w, in place, once per step, to the gradients as they
    are then: unscaled and already clipped. "weight" is SR-STE's Eq. 8, w -= lr * masked_decay * ~mask * w, before the
    Adam update. Layers whose `.sparse` is False are plain AdamW. Other arguments are torch.optim.AdamW's.
    `masked_decay` may be changed between steps. Raises ValueError for a negative factor or another decay_on.
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
        self._model = model
        # The fused kernel would unscale by itself, after the decay was added. So GradScaler unscales before step().
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def _apply_masked_decay(self) -> None:
        lr_of = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        layers = {id(layer.weight): layer for layer in sparse_linears(self._model)}  # a shared weight decays once
        for layer in layers.values():
            weight = layer.weight
            if not layer.sparse or weight.grad is None or id(weight) not in lr_of:
                continue
            if self.decay_on == "grad":
                masked_decay_(weight.grad, weight, layer.mask, self.masked_decay)
            else:
                weight.mul_(torch.where(layer.mask, 1.0, 1.0 - lr_of[id(weight)] * self.masked_decay))

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.masked_decay:
            self._apply_masked_decay()
        # torch wraps the step of every optimizer class once it is used, to run the hooks. Ours is wrapped already.
        step = torch.optim.AdamW.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)
        return loss

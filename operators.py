"""The papers' operators: masks, MVUE, soft threshold, masked decay, flip rate; and activations for them.

Every operator is a plain-PyTorch twin `name_ref`, the specification. `name` is what the rest of the code calls: the
Triton kernel for CUDA tensors, the twin elsewhere (see the end of this file). sparse24.py, which makes layers of them,
passes these names on.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from shards import local, total
from spmm import pack_ref

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
    "pairs": {_CPU: torch.tensor([[column in pair for column in range(4)] for pair in PAIRS])},  # bool (6, 4)
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


def pair_index_ref(x: torch.Tensor) -> torch.Tensor:
    """Row-wise 2:4 mask: which pair of PAIRS, the two largest magnitudes, each group of four along the last dimension
    keeps (section 3.1).

    Ties keep the lower index; NaN counts as the largest. x: (..., n), n divisible by 4. Returns uint8 (..., n/4),
    entries 0..5. Raises ValueError on other shapes.
    """
    _check_groups("pair_index", x)
    groups = x.detach().abs().unflatten(-1, (-1, 4))
    low, high = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(dim=-1).values.unbind(-1)
    return (low + high - (low == 0).long()).to(torch.uint8)


def expand_pairs(index: torch.Tensor) -> torch.Tensor:
    """Index uint8 (..., n/4) of `pair_index` to mask bool (..., n), True = kept."""
    if index.dtype != torch.uint8:
        raise ValueError(f"expand_pairs: {index.dtype}, need the uint8 of pair_index")
    return _table("pairs", index.device)[index.long()].flatten(-2)


def mask24_ref(w: torch.Tensor) -> torch.Tensor:
    """`pair_index_ref` as its mask, bool of w's shape, True = kept. Raises ValueError on other shapes."""
    _check_groups("mask24", w)
    return expand_pairs(pair_index_ref(w))


def flip_count(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Mask entries that differ between two uint8 index matrices, an int64 0-d tensor. ValueError for unlike ones."""
    if before.shape != after.shape or not before.dtype == after.dtype == torch.uint8:
        raise ValueError(
            f"flip_count: {before.dtype} {tuple(before.shape)} against {after.dtype} {tuple(after.shape)}, "
            "need two uint8 index matrices of one shape"
        )
    return _table("hamming", before.device)[before.long(), after.long()].sum()


flip_count_ref = flip_count  # no kernel: it is wanted every hundred steps, and reads 2 bytes per 16 weights


def flip_rate(before, after) -> float:
    """Definition 4.1: the share of mask entries that differ, ||m(w_t) - m(w_{t-1})||_1 / D, a fraction per step.

    before, after: two bool masks, or two uint8 index matrices, or two equally long lists of them (layers, weighed by
    their entries). Row-wise indices (0..5) may be given too: pattern p < 6 differs from q in four times the entries
    in which pair p differs from q, of four times as many. Sharded masks (shards.py) are counted where they are, and the
    counts added up. Raises ValueError where shapes or dtypes differ.
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
        old_rows, new_rows = local(old), local(new)
        flipped = (old_rows != new_rows).sum() if old.dtype == torch.bool else flip_count(old_rows, new_rows)
        flips.append(total(flipped, old))
        entries += old.numel() * (1 if old.dtype == torch.bool else 16)
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
# Device types that have autocast. Asked once, because torch.compile before torch 2.13 cannot trace the question.
AUTOCAST = frozenset(t for t in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(t))


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


def _seed_tensor(seed, device) -> torch.Tensor:
    if torch.is_tensor(seed):
        return seed.to(device or seed.device, torch.int64)
    return torch.tensor((int(seed) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def group_uniforms(rows: int, groups: int, seed, device=None, stream: int = 0) -> torch.Tensor:
    """One uniform in [0, 1) per (row, group of four), float32 (rows, groups), multiples of 2^-23.

    seed: an int (taken modulo 2^64) or an int64 0-d tensor, the Philox key. `stream` gives independent draws.
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


def _uniforms_like(function: str, x: torch.Tensor, seed, u: torch.Tensor | None) -> torch.Tensor:
    shape = (*x.shape[:-1], x.shape[-1] // 4)
    if u is None:
        u = group_uniforms(math.prod(shape[:-1]), shape[-1], seed, x.device).to(x.device).view(shape)
    elif u.shape != shape:
        raise ValueError(f"{function}: u has shape {tuple(u.shape)}, need {shape}, one uniform per group of four")
    return u


def mvue24_kept_ref(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`mvue24_ref`, and which elements it kept: a bool mask of x's shape with two True in every group."""
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
    # The sign is copied, not multiplied: a zero that is kept beside infinities becomes no NaN of 0 * inf.
    values = torch.copysign(torch.maximum(_magnitude(groups), h.unsqueeze(-1)), groups)
    return torch.where(kept, values, 0).flatten(-2).to(x.dtype), kept.flatten(-2)


def mvue24_ref(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> torch.Tensor:
    """Exact MVUE: an unbiased 2:4 sample of x along its last dimension, of the smallest possible variance (Eq. 6).

    x: (..., n), n divisible by 4, any strides; float64 is computed in itself, all else in float32, rounded once to
    x's dtype. seed: int or int64 0-d tensor. u: uniforms (..., n/4) in [0, 1) that replace the seeded draw.
    Keeps two elements of each group, two non-zero ones where there are two; a zero group gives zeros; a group with a
    non-finite element stays non-finite. Raises ValueError for a 1-D x, n % 4 != 0 or another shape of u.
    """
    return mvue24_kept_ref(x, seed, u)[0]


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


def soft_threshold24_backward(ds: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The true gradient of S-STE's soft threshold: ds (..., n), of S(w), to dw of the same shape and dtype.

    S_i = w_i - sign(w_i) t for the elements above t = |w_k|: dw_i = ds_i, and the element k that sets the threshold
    gets -sign(w_k) times the sum of their sign(w_i) ds_i. The smallest gets nothing. Of equal magnitudes at t, one
    sets it.
    """
    _check_groups("soft_threshold24_backward", w)
    groups, ds = w.unflatten(-1, (-1, 4)), ds.unflatten(-1, (-1, 4))
    a = _magnitude(groups)
    mine, other = a.unsqueeze(-1), a.unsqueeze(-2)  # compared, not sorted: that is slow on a GPU, and never fused
    before = torch.ones(4, 4, dtype=torch.bool, device=a.device).tril(-1)  # of equals the first one counts as lower
    is_k = ((other < mine) | ((other == mine) & before)).sum(-1) == 1
    kept = a > torch.where(is_k, a, 0).sum(-1, keepdim=True)
    signs = torch.sign(groups)
    through = torch.where(kept, ds, 0)
    share = -signs * (signs * through).sum(-1, keepdim=True)
    return torch.where(is_k, share.to(ds.dtype), through).flatten(-2)


def simulate_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to an FP8 type (torch.float8_e4m3fn or torch.float8_e5m2) and back, scaled so that its largest
    magnitude is the type's largest. Zeros stay zeros, also all of them; a non-finite element makes all non-finite."""
    amax = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    largest = torch.finfo(dtype).max
    scale = torch.where(amax == 0, 1.0, (largest / amax).clamp(max=torch.finfo(torch.float32).max))
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


def sste_scale_ref(w: torch.Tensor) -> torch.Tensor:
    """S-STE's beta = <w, S(w)> / <S(w), S(w)>, the least-squares scale of the soft-thresholded w; 1 where S(w) is 0.

    w: (..., n), n divisible by 4. Returns a float32 (float64 for float64 w) 0-d tensor on w's device.
    """
    soft = soft_threshold24_ref(w).to(torch.promote_types(w.dtype, torch.float32))
    square = soft.square().sum()
    return torch.where(square > 0, (w.to(soft.dtype) * soft).sum() / square, 1)


@torch.no_grad()
def masked_decay_(grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
    """Eq. 10, in place: grad += decay * ~mask * w. Returns grad; decay per step.

    grad, w: one shape. mask: bool of that shape, or its uint8 index matrix. Raises ValueError on anything else.
    """
    if mask.dtype == torch.uint8 and w.dim() == 2 and mask.shape == (w.shape[0] // 4, w.shape[1] // 4):
        mask = expand_index(mask)
    if not grad.shape == w.shape == mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masked_decay_: grad {tuple(grad.shape)}, w {tuple(w.shape)}, mask {mask.dtype} {tuple(mask.shape)}; "
            "need one shape and a bool mask, or the uint8 index matrix of one"
        )
    return grad.add_(torch.where(mask, 0, w).to(grad.dtype), alpha=decay)


masked_decay_ref_ = masked_decay_  # no kernel of its own: AdamW's kernel adds the decay while it reads the weights


# ---------------------------------------------------------------------------------------------------------------------
# Activations on feature-major tensors, (d_ff, tokens), as the hidden layer of a sparse FFN lies in memory (section 5.2)


GATED = ("geglu", "swiglu")
ACTIVATIONS = ("gelu", "relu2", *GATED)


def _check_activation(function: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{function}: activation {activation!r} is unknown, need one of {', '.join(ACTIVATIONS)}")


def _gate_and_up(function: str, z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nonlinearity's argument and, of gated activations, the other factor, in the arithmetic's dtype."""
    _check_activation(function, activation)
    if activation in GATED and (z.dim() == 0 or z.shape[0] % 2):
        raise ValueError(f"{function}: z {tuple(z.shape)}, {activation} needs (2 d_ff, tokens): gate and up, stacked")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z.chunk(2) if activation in GATED else (z, None)


def _nonlinearity(z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """f(z) and f'(z)."""
    if activation == "relu2":
        return F.relu(z).square(), 2 * F.relu(z)
    if activation == "swiglu":
        s = torch.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    phi = 0.5 * torch.erfc(z * -(0.5**0.5))  # erf would cancel in the left tail
    return z * phi, phi + z * torch.exp(-0.5 * z * z) * (2 * math.pi) ** -0.5


def activation_ref(z: torch.Tensor, activation: str, recompute: bool = False) -> torch.Tensor:
    """A = f(Z), or f(gate) * up where Z holds the rows of gate and up one after the other.

    z: (d_ff, tokens), gated (2 d_ff, tokens). activation: gelu (exact, by erf), relu2, geglu, swiglu. Computed in
    float32 (float64 for float64) and rounded once. Returns (d_ff, tokens). Raises ValueError for another activation
    or, gated, an odd number of rows. recompute changes nothing here; see kernels.activation.
    """
    gate, up = _gate_and_up("activation", z, activation)
    value, _ = _nonlinearity(gate, activation)
    return (value if up is None else value * up).to(z.dtype)


def activation_backward_ref(z: torch.Tensor, da: torch.Tensor, activation: str) -> torch.Tensor:
    """dZ of `activation_ref`, in z's shape and dtype. da: (d_ff, tokens); another shape raises ValueError too."""
    gate, up = _gate_and_up("activation_backward", z, activation)
    if da.shape != gate.shape:
        raise ValueError(f"activation_backward: da {tuple(da.shape)}, need {tuple(gate.shape)} for z {tuple(z.shape)}")
    value, slope = _nonlinearity(gate, activation)
    da = da.to(gate.dtype)
    dz = da * slope if up is None else torch.cat((da * up * slope, da * value))
    return dz.to(z.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Straight to packed operands of a 2:4 GEMM (spmm.py has the orders). Order "masked" is the dense matrix with zeros.


def mvue24_pack_ref(
    x: torch.Tensor, seed, order: str, token_major: bool = False, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """MVUE of x (rows, tokens), or with token_major of the transpose of x (tokens, rows), packed in `order`.

    Returns (the packed operand, 1-D, 16-bit, or for "masked" (rows, tokens); with `bias` the float32 sums (rows,) of x
    over tokens before the pruning, else an empty tensor). Raises ValueError where the shape does not fit the order.
    """
    x = x.t() if token_major else x
    values, kept = mvue24_kept_ref(x, seed)
    return (values if order == "masked" else pack_ref(values, kept, order)), _token_sums(x, bias)


def _token_sums(x: torch.Tensor, bias: bool) -> torch.Tensor:
    """The bias gradient of dz = x (rows, tokens), in float32 (float64 for float64); empty where none is asked for."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.sum(1, dtype=dtype) if bias else x.new_empty(0, dtype=dtype)


def activation_backward_mvue24_pack_ref(
    z: torch.Tensor, da: torch.Tensor, seed, activation: str, order: str, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dz of `activation_backward_ref`, and `mvue24_pack_ref` of that dz)."""
    dz = activation_backward_ref(z, da, activation)
    return dz, *mvue24_pack_ref(dz, seed, order, False, bias)


@torch.no_grad()
def pack_weight_ref_(packed, packed_t, w, index, order: str, metadata: bool = True) -> None:
    """Write the packed operands of w (out, in) under its mask, and of the transpose, into two 16-bit buffers of 9/16 of
    w's elements; one may be None and is not written. index: uint8 (out/4, in/4). metadata=False: as long as the index
    is the one of the last call, the values alone need writing; here both are written all the same. Raises ValueError
    where a shape does not fit."""
    mask = expand_index(index)
    for buffer, x, kept in ((packed, w, mask), (packed_t, w.t(), mask.t())):
        if buffer is None:
            continue
        buffer.copy_(pack_ref(x.to(buffer.dtype).contiguous(), kept.contiguous(), order))


# ---------------------------------------------------------------------------------------------------------------------
# What everything else calls: the kernels of kernels.py for CUDA tensors, the twins for all else
# (other devices, float64, empty tensors, given uniforms, tensors that a gradient flows back through, layouts that no
# kernel takes). NANO24_KERNELS=0 turns the kernels off. Whether a device can use them is decided once: each is run
# beside its twin.

_kernels = None  # the module kernels, once a device uses it
_STATUS: dict[torch.device, str] = {}  # "on", or why not
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_status(device: torch.device) -> str:
    """ "on" where CUDA tensors of this device go to the Triton kernels, else the reason why they go to the twins."""
    if device.type != "cuda":
        return f"off: the kernels need CUDA, this is {device.type}"
    if device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _STATUS:
        _STATUS[device] = "off: being tested"
        _STATUS[device] = _try_kernels(device)
        if _STATUS[device].startswith("off: failed"):
            warnings.warn(f"nano24 kernels on {device} {_STATUS[device]}; PyTorch twins serve", stacklevel=2)
    return _STATUS[device]


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
        kernels = _import_kernels()
        with torch.device("cpu"):  # whatever default device a model is being built under
            wrong = kernel_mismatches(device)
    except ImportError as error:
        return f"off: {error}"
    except Exception as error:  # whatever Triton or the driver says: named, and the run goes on without kernels,
        torch.cuda.synchronize(device)  # unless the GPU itself is lost, which this raises
        return f"off: failed the self-test with {type(error).__name__}: {error}"
    if wrong:
        return f"off: failed the self-test, unlike their twins: {', '.join(wrong)}"
    _kernels = kernels
    return "on"


def _import_kernels():
    import kernels

    kernels.use_patterns(PATTERNS)
    return kernels


def kernel_mismatches(device: torch.device) -> list[str]:
    """The operators whose kernel and twin differ on a small awkward input: an empty list on a sound machine."""
    kernels = _import_kernels()
    w = torch.randn(64, 136, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    w[:4, :8] = w.new_tensor([0.0, 1.0, -1.0, 1e-40]).repeat(2)  # ties, zeros, a subnormal
    w = w.to(device)
    x = w.to(torch.bfloat16)
    x[0, :3] = x.new_tensor([math.inf, -math.inf, math.nan])
    seed = torch.tensor(-(2**40) - 1, dtype=torch.int64, device=device)
    index = transposable_index_ref(w)

    def same(got: torch.Tensor, expected: torch.Tensor, **tolerance) -> bool:
        if tolerance:
            return torch.allclose(got.double(), expected.double(), **tolerance)
        return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(7), expected.nan_to_num(7))

    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs, moments = w.clone(), nn.Parameter(w.clone()), [torch.zeros_like(w), torch.zeros_like(w)]
    adamw = torch.optim.AdamW([theirs], **options)
    for step in (1, 2):
        theirs.grad = masked_decay_(w.clone(), theirs.detach(), index, 0.5)
        adamw.step()
        scalars = [adamw_scalars(step, **options, masked_decay=0.5)]
        kernels.adamw_([ours], [w], *([m] for m in moments), [index], scalars)
    z = w.to(torch.bfloat16)
    equal = {
        "transposable_index": same(kernels.transposable_index(w), index),
        "mvue24 (float32)": same(kernels.mvue24(w, seed), mvue24_ref(w, seed)),
        "mvue24": same(kernels.mvue24(x, seed), mvue24_ref(x, seed)),
        "mvue24 (whole tiles)": same(*(f(x[:, :128].contiguous(), seed) for f in (kernels.mvue24, mvue24_ref))),
        "mvue24 (token-major)": same(*(f(x[:, :128].contiguous().t(), seed) for f in (kernels.mvue24, mvue24_ref))),
        "mvue24 (transposed)": same(kernels.mvue24(x.t(), seed), mvue24_ref(x.t(), seed)),
        "pair_index": same(kernels.pair_index(x), pair_index_ref(x)),
        "soft_threshold24": same(kernels.soft_threshold24(w), soft_threshold24_ref(w)),
        "sste_scale": same(kernels.sste_scale(w), sste_scale_ref(w), rtol=1e-5),
        "adamw_": same(ours, theirs.detach(), rtol=1e-5, atol=1e-6),
    }
    whole = w[:, :128].contiguous()
    packs = [whole.new_zeros(2, whole.numel() * 9 // 16, dtype=torch.bfloat16) for _ in range(2)]
    for pack, into in ((kernels.pack_weight_, packs[0]), (pack_weight_ref_, packs[1])):
        pack(*into, whole, index[:, :32].contiguous(), "sm90")
    equal["pack_weight_"] = torch.equal(*packs)
    whole = z[:, :128].contiguous()
    for name, x in (("mvue24_pack", whole), ("mvue24_pack (token-major)", whole.t().contiguous())):
        ours, theirs = (f(x, seed, "sm90", x is not whole, True) for f in (kernels.mvue24_pack, mvue24_pack_ref))
        equal[name] = torch.equal(ours[0], theirs[0]) and same(ours[1], theirs[1], rtol=1e-5, atol=1e-4)
    for name in ACTIVATIONS:
        da = whole[: len(whole) // 2] if name in GATED else whole
        dz, packed, _ = kernels.activation_backward_mvue24_pack(whole, da, seed, name, "sm90", False)
        expected = activation_backward_ref(whole, da, name)
        packs_alike = torch.equal(packed, mvue24_pack_ref(dz, seed, "sm90")[0])
        equal[f"{name} backward, packed"] = packs_alike and same(dz, expected, rtol=2**-7, atol=1e-5)
        da = z[: len(z) // 2] if name in GATED else z
        # one unit of bfloat16, where the two round apart; and 1e-6 for GELU's polynomial
        equal[name] = same(kernels.activation(z, name), activation_ref(z, name), rtol=2**-7, atol=1e-6)
        got, expected = kernels.activation_backward(z, da, name), activation_backward_ref(z, da, name)
        equal[f"{name} backward"] = same(got, expected, rtol=2**-7, atol=1e-5)
    return [name for name, ok in equal.items() if not ok]


def adamw_scalars(step: int, lr, betas, eps, weight_decay, masked_decay) -> tuple[float, ...]:
    """What kernels.adamw_ needs of one tensor's hyperparameters at its step number `step`, counted from 1."""
    beta1, beta2 = betas
    corrected_lr, root_bias2 = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, corrected_lr, root_bias2, masked_decay


def _on_kernels(x: torch.Tensor) -> bool:
    """Whether x goes to a kernel. Where a gradient is to flow back it does not: the twins are differentiable."""
    if x.device.type == "cuda" and x.device not in _STATUS and not torch.compiler.is_compiling():
        kernel_status(x.device)  # a traced function finds it decided: layers call transposable_index when they are made
    plain = x.dtype in _KERNEL_DTYPES and x.numel() > 0 and not (x.requires_grad and torch.is_grad_enabled())
    return _STATUS.get(x.device) == "on" and plain


def transposable_index(w: torch.Tensor) -> torch.Tensor:
    """transposable_index_ref, by a kernel where it can."""
    _check_blocks("transposable_index", w)
    w = w.detach()
    return _kernels.transposable_index(w) if _on_kernels(w) else transposable_index_ref(w)


def pair_index(x: torch.Tensor) -> torch.Tensor:
    """pair_index_ref, by a kernel where it can."""
    _check_groups("pair_index", x)
    x = x.detach()
    return _kernels.pair_index(x) if _on_kernels(x) else pair_index_ref(x)


def mask24(w: torch.Tensor) -> torch.Tensor:
    """mask24_ref, its search by a kernel where it can."""
    _check_groups("mask24", w)
    return expand_pairs(pair_index(w))


def mvue24(x: torch.Tensor, seed, u: torch.Tensor | None = None) -> torch.Tensor:
    """mvue24_ref, by a kernel where it can."""
    _check_groups("mvue24", x)
    return _kernels.mvue24(x, seed) if u is None and _on_kernels(x) else mvue24_ref(x, seed, u)


def soft_threshold24(w: torch.Tensor) -> torch.Tensor:
    """soft_threshold24_ref, by a kernel where it can."""
    _check_groups("soft_threshold24", w)
    return _kernels.soft_threshold24(w) if _on_kernels(w) else soft_threshold24_ref(w)


def sste_scale(w: torch.Tensor) -> torch.Tensor:
    """sste_scale_ref, by a kernel where it can."""
    _check_groups("sste_scale", w)
    return _kernels.sste_scale(w) if _on_kernels(w) else sste_scale_ref(w)


def activation(z: torch.Tensor, activation: str, recompute: bool = False) -> torch.Tensor:
    """activation_ref, by a kernel where it can. recompute: this call is the backward's; see kernels.activation."""
    _check_activation("activation", activation)
    kernel = _on_kernels(z) and z.dim() == 2 and z.is_contiguous()
    return (_kernels.activation if kernel else activation_ref)(z, activation, recompute)


def activation_backward(z: torch.Tensor, da: torch.Tensor, activation: str) -> torch.Tensor:
    """activation_backward_ref, by a kernel where it can."""
    _check_activation("activation_backward", activation)
    kernel = _on_kernels(z) and _on_kernels(da) and z.dim() == 2 and z.is_contiguous() and da.is_contiguous()
    return (_kernels.activation_backward if kernel else activation_backward_ref)(z, da, activation)


def mvue24_pack(x, seed, order: str, token_major: bool = False, bias: bool = False):
    """mvue24_pack_ref, by a kernel where it can."""
    rows, tokens = x.shape[::-1] if token_major else x.shape
    if _packs(x, rows, tokens, order, token_major):
        return _kernels.mvue24_pack(x, seed, order, token_major, bias)
    if order != "masked":
        return mvue24_pack_ref(x, seed, order, token_major, bias)
    x = x.t() if token_major else x
    return mvue24(x, seed), _token_sums(x, bias)


def activation_backward_mvue24_pack(z, da, seed, activation: str, order: str, bias: bool = False):
    """activation_backward_mvue24_pack_ref, by one kernel where it can."""
    _check_activation("activation_backward_mvue24_pack", activation)
    halves = 2 if activation in GATED else 1
    contiguous = z.is_contiguous() and da.is_contiguous() and da.dtype == torch.bfloat16
    if contiguous and _packs(z, *z.shape, order, False, halves):
        return _kernels.activation_backward_mvue24_pack(z, da, seed, activation, order, bias)
    dz = activation_backward(z, da, activation)
    return dz, *mvue24_pack(dz, seed, order, False, bias)


def _packs(x: torch.Tensor, rows: int, tokens: int, order: str, token_major: bool, halves: int = 1) -> bool:
    """Whether a kernel draws x and writes it in this order."""
    if not _on_kernels(x) or x.dtype != torch.bfloat16 or order == "cutlass":
        return False
    row_multiple, token_multiple = _kernels.multiples(order, token_major, halves)
    return rows % row_multiple == 0 and tokens % token_multiple == 0


@torch.no_grad()
def pack_weight_(packed, packed_t, w, index, order: str, metadata: bool = True) -> None:
    """pack_weight_ref_, by one kernel where it can."""
    dtypes = {buffer.dtype for buffer in (packed, packed_t) if buffer is not None}
    kernel = order in ("sm80", "sm90") and dtypes == {torch.bfloat16} and w.stride(1) == 1 and _on_kernels(w.detach())
    (_kernels.pack_weight_ if kernel else pack_weight_ref_)(packed, packed_t, w.detach(), index, order, metadata)


def adamw_fits(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether kernels.adamw_ takes all of these: one CUDA device, float32, contiguous, aligned, elements by fours."""
    first = tensors[0].detach()
    return _on_kernels(first) and all(
        type(t) in (torch.Tensor, nn.Parameter)  # no fakes
        and t.device == first.device
        and t.dtype == torch.float32
        and t.is_contiguous()
        and t.numel() % 4 == 0 < t.numel()
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def adamw_(params, grads, exp_avgs, exp_avg_sqs, indices, scalars, decay_on_weight: bool) -> None:
    """kernels.adamw_, for tensors that `adamw_fits`; scalars are `adamw_scalars`. Its twin is torch.optim.AdamW."""
    _kernels.adamw_(params, grads, exp_avgs, exp_avg_sqs, indices, scalars, decay_on_weight)

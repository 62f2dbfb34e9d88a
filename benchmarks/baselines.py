"""The baselines of the paper's Tables 2 and 3: Triton kernels that no training step uses.

Table 2, mask search: these read w once and write their result once, as kernels.transposable_index does. Table 3, GEGLU:
these walk along the features of a token, across the memory layout; kernels.activation walks along tokens.
"""

import torch
import triton
import triton.language as tl

from kernels import _activation, _backward, _float32, _gated, _launch, _load_block, _round


@triton.jit
def _transposable_index_dot_kernel(
    w_ptr, table_ptr, index_ptr, columns, blocks, stride_row, stride_column, BLOCKS: tl.constexpr
):
    n = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    entry, pattern = tl.arange(0, 16), tl.arange(0, 128)
    row = (n // columns)[:, None] * 4 + (entry // 4)[None, :]
    column = (n % columns)[:, None] * 4 + (entry % 4)[None, :]
    x = tl.load(w_ptr + row.to(tl.int64) * stride_row + column * stride_column, mask=(n < blocks)[:, None], other=0.0)
    table = tl.load(table_ptr + entry[:, None] * 128 + pattern[None, :])
    scores = tl.dot(tl.abs(_float32(x)), table)  # (BLOCKS, 128), in TF32
    index = tl.argmax(tl.where(pattern[None, :] < 90, scores, -1.0), 1)
    tl.store(index_ptr + n, index.to(tl.uint8), mask=n < blocks)


def pattern_table(patterns: torch.Tensor) -> torch.Tensor:
    """`patterns`, bool (90, 4, 4), for `transposable_index_dot`: float32 (16, 128), columns from 90 on zero."""
    table = torch.zeros(16, 128, device=patterns.device)
    table[:, :90] = patterns.flatten(1).t()
    return table


def transposable_index_dot(w: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Baseline: the paper's search (Figure 4), which computes all 90 scores by matrix products and takes the argmax.

    table: `pattern_table`. Masks are optimal within TF32's rounding of |w| (2^-11). Returns what
    kernels.transposable_index returns.
    """
    index = torch.empty((w.shape[0] // 4, w.shape[1] // 4), dtype=torch.uint8, device=w.device)
    sizes, grid = (index.shape[1], index.numel(), *w.stride()), triton.cdiv(index.numel(), 128)
    _launch(_transposable_index_dot_kernel, grid, w, table, index, *sizes, BLOCKS=128, num_warps=4)
    return index


def _sorting_network(n: int) -> tuple[tuple[int, int], ...]:
    """The comparators of Batcher's odd-even merge sort for n = 2^k elements, in order. n = 16 needs 63."""
    comparators = []
    p = 1
    while p < n:
        k = p
        while k:
            for j in range(k % p, n - k, 2 * k):
                for i in range(k):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        comparators.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(comparators)


_COMPARATORS = tl.constexpr(_sorting_network(16))
_COMPARATOR_COUNT = tl.constexpr(len(_sorting_network(16)))


@triton.jit
def _exchange(keys, A: tl.constexpr, B: tl.constexpr):
    """The keys with the larger of entries A < B moved to A."""
    larger, smaller = tl.maximum(keys[A], keys[B]), tl.minimum(keys[A], keys[B])
    return keys[:A] + (larger,) + keys[A + 1 : B] + (smaller,) + keys[B + 1 :]  # noqa: RUF005 (nor unpacking)


@triton.jit
def _sort_keys(x, ROW: tl.constexpr):
    """Keys that sort by |x|, NaN first, ties by position: the bits of |x|, then 15 - position."""
    bits = tl.where(x == x, tl.abs(x).to(tl.int32, bitcast=True), 0x7FC00000).to(tl.int64)
    return bits * 16 + (15 - 4 * ROW)


@triton.jit
def _transposable_mask_2approx_kernel(
    w_ptr, mask_ptr, columns, blocks, stride_row, stride_column, BLOCKS: tl.constexpr
):
    n = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    live = n < blocks
    rows = _load_block(w_ptr, n, columns, stride_row, stride_column, live)
    keys = ()
    for r in tl.static_range(4):
        for c in tl.static_range(4):
            keys = keys + (_sort_keys(rows[r][c], r) - c,)  # noqa: RUF005 (Triton knows no list)
    for i in tl.static_range(_COMPARATOR_COUNT):
        keys = _exchange(keys, _COMPARATORS[i][0], _COMPARATORS[i][1])
    # in_row and in_column hold four 2-bit counters each: the entries taken so far in every row or column.
    picked, in_row, in_column = tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n)
    for i in tl.static_range(16):
        entry = 15 - (keys[i] & 15).to(tl.int32)
        r, c = 2 * (entry // 4), 2 * (entry % 4)
        free = ((((in_row >> r) | (in_column >> c)) & 2) == 0).to(tl.int32)
        picked |= free << entry
        in_row += free << r
        in_column += free << c
    for r in tl.static_range(4):
        row = (n // columns).to(tl.int64) * 4 + r
        spread = ((picked >> (4 * r)) & 15)[:, None] >> tl.arange(0, 4)[None, :]
        out = mask_ptr + (row * columns + n % columns)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out, (spread & 1).to(tl.uint8), mask=live[:, None])


def transposable_mask_2approx(w: torch.Tensor) -> torch.Tensor:
    """Baseline: sort-and-pick, one thread per 4x4 block. Specification: tests/by_hand.py."""
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    sizes, grid = (w.shape[1] // 4, w.numel() // 16, *w.stride()), triton.cdiv(w.numel() // 16, 128)
    _launch(_transposable_mask_2approx_kernel, grid, w, mask.view(torch.uint8), *sizes, BLOCKS=128, num_warps=4)
    return mask


@triton.jit
def _feature_block(features, tokens, BLOCK: tl.constexpr):
    """Offsets (BLOCK,) of one token's features in a feature-major (features, tokens) tensor, and their mask."""
    blocks = tl.cdiv(features, BLOCK)
    feature = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return feature.to(tl.int64) * tokens + tl.program_id(0) // blocks, feature < features


@triton.jit
def _activation_by_token_kernel(
    z_ptr, a_ptr, features, tokens, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    n, live = _feature_block(features, tokens, BLOCK)
    a, _ = _activation(_float32(tl.load(z_ptr + n, mask=live, other=0.0)), ACTIVATION)
    if GATED:
        a *= _float32(tl.load(z_ptr + features.to(tl.int64) * tokens + n, mask=live, other=0.0))
    tl.store(a_ptr + n, _round(a, a_ptr.dtype.element_ty), mask=live)


def activation_by_token(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Baseline: kernels.activation along the features of a token."""
    gated, tokens = _gated("activation_by_token", z, activation), z.shape[1]
    a = z.new_empty((z.shape[0] // (1 + gated), tokens))
    options = {"ACTIVATION": activation, "GATED": gated, "BLOCK": 1024, "num_warps": 4}
    _launch(_activation_by_token_kernel, tokens * triton.cdiv(len(a), 1024), z, a, len(a), tokens, **options)
    return a


@triton.jit
def _activation_backward_by_token_kernel(
    z_ptr, da_ptr, dz_ptr, features, tokens, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    n, live = _feature_block(features, tokens, BLOCK)
    size = features.to(tl.int64) * tokens
    z = _float32(tl.load(z_ptr + n, mask=live, other=0.0))
    da = _float32(tl.load(da_ptr + n, mask=live, other=0.0))
    up = _float32(tl.load(z_ptr + size + n, mask=live, other=0.0)) if GATED else z
    dz, dup = _backward(z, up, da, ACTIVATION, GATED)
    tl.store(dz_ptr + n, _round(dz, dz_ptr.dtype.element_ty), mask=live)
    if GATED:
        tl.store(dz_ptr + size + n, _round(dup, dz_ptr.dtype.element_ty), mask=live)


def activation_backward_by_token(z: torch.Tensor, da: torch.Tensor, activation: str) -> torch.Tensor:
    """Baseline: kernels.activation_backward along the features of a token."""
    gated, dz = _gated("activation_backward_by_token", z, activation, da), torch.empty_like(z)
    programs = da.shape[1] * triton.cdiv(len(da), 1024)
    options = {"ACTIVATION": activation, "GATED": gated, "BLOCK": 1024, "num_warps": 4}
    _launch(_activation_backward_by_token_kernel, programs, z, da, dz, *da.shape, **options)
    return dz

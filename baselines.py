"""What the mask search is measured against (the paper's Table 2): Triton kernels that no training step uses.

They read w once and write their result once, as kernels.transposable_index does. The baseline of Table 3 is
kernels_ffn.activation(..., rowwise=True).
"""

import torch
import triton
import triton.language as tl

from kernels import _float32, _launch, _load_block


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
    """Baseline: the paper's own search, all 90 scores by matrix products, then the argmax (Figure 4).

    table: `pattern_table`. Masks are the optimum within TF32's rounding of |w| (2^-11). Otherwise as
    `transposable_index`.
    """
    index = torch.empty((w.shape[0] // 4, w.shape[1] // 4), dtype=torch.uint8, device=w.device)
    _launch(
        _transposable_index_dot_kernel,
        triton.cdiv(index.numel(), 128),
        w,
        table,
        index,
        index.shape[1],
        index.numel(),
        w.stride(0),
        w.stride(1),
        BLOCKS=128,
        num_warps=4,
    )
    return index


def _sorting_network(n: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort: the comparators, in order, that sort n = 2^k elements. 63 for 16."""
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
    """The tuple with the larger of keys A < B put first."""
    larger, smaller = tl.maximum(keys[A], keys[B]), tl.minimum(keys[A], keys[B])
    return keys[:A] + (larger,) + keys[A + 1 : B] + (smaller,) + keys[B + 1 :]  # noqa: RUF005 (nor unpacking)


@triton.jit
def _sort_keys(x, ROW: tl.constexpr):
    """Keys that sort by |x|, NaN first, equal ones by position: the bits of |x|, then 15 - position."""
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
    # How many a row or column holds: four counters of two bits each, in one integer for rows and one for columns.
    kept, in_row, in_column = tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n)
    for i in tl.static_range(16):
        entry = 15 - (keys[i] & 15).to(tl.int32)
        r, c = 2 * (entry // 4), 2 * (entry % 4)
        free = ((((in_row >> r) | (in_column >> c)) & 2) == 0).to(tl.int32)
        kept |= free << entry
        in_row += free << r
        in_column += free << c
    for r in tl.static_range(4):
        row = (n // columns).to(tl.int64) * 4 + r
        spread = ((kept >> (4 * r)) & 15)[:, None] >> tl.arange(0, 4)[None, :]
        out = mask_ptr + (row * columns + n % columns)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out, (spread & 1).to(tl.uint8), mask=live[:, None])


def transposable_mask_2approx(w: torch.Tensor) -> torch.Tensor:
    """Baseline: sort-and-pick, one read of w, one thread a block. Twin: operators.transposable_mask_2approx."""
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    blocks = w.numel() // 16
    _launch(
        _transposable_mask_2approx_kernel,
        triton.cdiv(blocks, 128),
        w,
        mask.view(torch.uint8),
        w.shape[1] // 4,
        blocks,
        w.stride(0),
        w.stride(1),
        BLOCKS=128,
        num_warps=4,
    )
    return mask

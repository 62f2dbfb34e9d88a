"""Triton kernels for weights, with their launchers: mask search, packing, soft threshold, AdamW. Those
for activations and their gradients are in kernels_ffn.py. The specification is operators' `name_ref`, for packed
operands spmm's `pack_ref`.

One rule keeps shared memory out of the way: one thread owns one row of an (N, 4) tile, N = 32 * num_warps, and all the
rest is 1-D, (N,). A (N, 4) load of contiguous memory is one 16-byte load per thread, and split twice it is four
registers. What a thread owns is arithmetic on n = 0..N-1, not a 2-D tile. Arithmetic is float32 throughout.

Launchers take CUDA tensors, and CPU tensors under TRITON_INTERPRET=1, which is how the tests prove them without a GPU.
Those on the path of a compiled model are torch custom ops with a fake beside them. Each docstring sums up the bytes (B)
that must move and what they allow: an H200 at an assumed 1.75 GHz issues 132 SMs x 4 x 32 lanes x 1.75e9 = 2.96e13
lane-instructions/s beside a copy, taken to reach 4.3 TB/s (0.9 of the data sheet's), so a kernel stays memory-bound
below 6.8 instructions (I) per byte. What each compiles to is counted by bench.py, in results/kernels.md;
tests/test_bench.py keeps it below its ceiling.
"""

import functools

import torch
import triton
import triton.language as tl

# TRITON_INTERPRET=1: the kernels run on the CPU, in numpy, which knows no PTX and truncates to bfloat16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _launch(kernel, programs: int, *args, written=(), **options) -> None:
    """Run `programs` programs of a kernel, on the device of its first argument, which need not be the current one.

    written: the caller's tensors that it writes to. Autograd then refuses a backward pass that needs the old values.
    """
    torch.autograd.graph.increment_version(written)
    with torch.cuda.device_of(args[0]):
        # Without contraction to FMA a kernel draws and rounds as its twin does: h - u*h is two roundings, not one.
        kernel[(programs,)](*args, **options, enable_fp_fusion=False)


# ---------------------------------------------------------------------------------------------------------------------
# Shared maths


@triton.jit
def _max(a, b):
    """Maximum that keeps NaN, as torch.maximum does."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _split4(x):
    """The four columns of an (N, 4) tile, each (N,), as a tuple."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))  # columns 0, 2 and 1, 3
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join4(x):
    """The (N, 4) tile of four columns, each (N,)."""
    return tl.reshape(tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])), (x[0].shape[0], 4))


@triton.jit
def _abs4(x):
    return tl.abs(x[0]), tl.abs(x[1]), tl.abs(x[2]), tl.abs(x[3])


@triton.jit
def _sub4(x, y):
    return x[0] - y[0], x[1] - y[1], x[2] - y[2], x[3] - y[3]


@triton.jit
def _float32(x):
    """x widened to float32; the interpreter's own conversion gets subnormal bfloat16 wrong."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """x (float32) rounded to nearest even, once."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _bits16(x):
    """x (float32) rounded to bfloat16, as its 16 bits in an int32."""
    return _round(x, tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _copysign(magnitude, x):
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


# ---------------------------------------------------------------------------------------------------------------------
# transposable_index: Algorithm 1 by 8 candidates


@triton.jit
def _top2(x):
    """Largest sum of two of four, and which pair it is (0..5, pairs 01, 02, 03, 12, 13, 23)."""
    best = _max(x[0], x[1]) + _max(x[2], x[3])
    pair = 1 + 2 * (x[1] > x[0]).to(tl.int32) + (x[3] > x[2]).to(tl.int32)
    pair = tl.where(x[0] + x[1] > best, 0, pair)
    best = _max(x[0] + x[1], best)
    pair = tl.where(x[2] + x[3] > best, 5, pair)
    return _max(x[2] + x[3], best), pair


@triton.jit
def _try_pair(best, jk, NUMBER: tl.constexpr, J: tl.constexpr, K: tl.constexpr, f, x, y, e):
    """Candidate B_jk, jk = PAIRS[NUMBER]. Of the winner only its number is kept; it is decoded once, at the end."""
    I: tl.constexpr = 0 if J > 0 else (1 if K > 1 else 2)
    L: tl.constexpr = 6 - I - J - K
    score = f[J] + f[K] + _max(x[J], x[K]) + _max(y[J], y[K]) + _max(e[I], e[L])
    return _max(score, best), tl.where(score > best, NUMBER, jk)


@triton.jit
def _second_greater(jk, x):
    """x_k > x_j for the pair number jk."""
    first = tl.where(jk < 3, x[0], tl.where(jk < 5, x[1], x[2]))
    second = tl.where(jk == 0, x[1], tl.where((jk == 1) | (jk == 3), x[2], x[3]))
    return (second > first).to(tl.int32)


@triton.jit
def _best_pattern(a, b, c, d):
    """Index of the best of the 90 patterns for the rows a, b, c, d of |w|: as operators.transposable_index_ref."""
    x, y, f = _sub4(a, b), _sub4(c, d), _sub4(b, c)
    e = (x[0] + y[0] + 2 * f[0], x[1] + y[1] + 2 * f[1], x[2] + y[2] + 2 * f[2], x[3] + y[3] + 2 * f[3])
    best, index = _top2(e)
    top_x, pair_x = _top2(x)
    top_y, pair_y = _top2(y)
    score = (f[0] + f[1]) + (f[2] + f[3]) + top_x + top_y
    index = tl.where(score > best, 6 + 6 * pair_x + pair_y, index)
    best = _max(score, best)
    jk = tl.full(index.shape, -1, tl.int32)
    best, jk = _try_pair(best, jk, 0, 0, 1, f, x, y, e)
    best, jk = _try_pair(best, jk, 1, 0, 2, f, x, y, e)
    best, jk = _try_pair(best, jk, 2, 0, 3, f, x, y, e)
    best, jk = _try_pair(best, jk, 3, 1, 2, f, x, y, e)
    best, jk = _try_pair(best, jk, 4, 1, 3, f, x, y, e)
    best, jk = _try_pair(best, jk, 5, 2, 3, f, x, y, e)
    bits = 4 * _second_greater(5 - jk, e)  # the pairs in reverse order are the complements
    bits += 2 * _second_greater(jk, x) + _second_greater(jk, y)
    return tl.where(jk >= 0, 42 + 8 * jk + bits, index)


@triton.jit
def _load4(ptr, stride, live):
    """Four columns from ptr (N,) on, as float32, each (N,)."""
    x = tl.load(ptr[:, None] + tl.arange(0, 4)[None, :] * stride, mask=live[:, None], other=0.0)
    return _split4(_float32(x))


@triton.jit
def _load_block(w_ptr, block, columns, stride_row, stride_column, live):
    """The rows of the 4x4 blocks number `block` (N,) of w, `columns` blocks to a row."""
    ptr = w_ptr + (block // columns).to(tl.int64) * (4 * stride_row)
    ptr += (block % columns).to(tl.int64) * (4 * stride_column)
    a = _load4(ptr, stride_column, live)
    b = _load4(ptr + stride_row, stride_column, live)
    c = _load4(ptr + 2 * stride_row, stride_column, live)
    d = _load4(ptr + 3 * stride_row, stride_column, live)
    return a, b, c, d


@triton.jit
def _transposable_index_kernel(w_ptr, index_ptr, columns, blocks, stride_row, stride_column, BLOCKS: tl.constexpr):
    n = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # int32 reaches 2^35 weights, and int64 divides slowly
    live = n < blocks
    a, b, c, d = _load_block(w_ptr, n, columns, stride_row, stride_column, live)
    index = _best_pattern(_abs4(a), _abs4(b), _abs4(c), _abs4(d))
    tl.store(index_ptr + n, index.to(tl.uint8), mask=live)


def transposable_index(w: torch.Tensor) -> torch.Tensor:
    """The best of 90 patterns per 4x4 block. Twin: operators.transposable_index_ref, bit for bit.

    w: (out, in), float32 or 16-bit, any strides (16-byte loads where the rows are contiguous). uint8 (out/4, in/4).
    Its shape is not checked here; operators.transposable_index does. Per block: 64 B of fp32 w, 1 B of index, at most
    440 I.
    """
    index = torch.empty((w.shape[0] // 4, w.shape[1] // 4), dtype=torch.uint8, device=w.device)
    _launch(
        _transposable_index_kernel,
        triton.cdiv(index.numel(), 128),
        w,
        index,
        index.shape[1],
        index.numel(),
        w.stride(0),
        w.stride(1),
        BLOCKS=128,
        num_warps=4,
    )
    return index


# ---------------------------------------------------------------------------------------------------------------------
# The weight pack. `tables` is int32 (2, 90), from operators: [0] a pattern's 16 bits, bit 4*row + column;
# [1] its metadata, the nibble of row r at bit 4r and that of column c at bit 16 + 4c (low index | high index << 2).


@triton.jit
def _pack_pair(x, bits, BIT: tl.constexpr, STEP: tl.constexpr):
    """The two kept of four as bfloat16, the first in the low half of an int32. Entry i is kept where bit BIT+STEP*i is
    set: the compiler shares the tests of the 16 bits between a block's rows and columns."""
    low = tl.where((bits & (1 << BIT)) != 0, x[0], tl.where((bits & (1 << (BIT + STEP))) != 0, x[1], x[2]))
    high = tl.where((bits & (1 << (BIT + 2 * STEP))) != 0, x[2], x[1])
    high = tl.where((bits & (1 << (BIT + 3 * STEP))) != 0, x[3], high)
    return _bits16(low) | (_bits16(high) << 16)


@triton.jit
def _transpose_tile(x, SIDE: tl.constexpr):
    """x (SIDE*SIDE,) by (row, column) to the same by (column, row), through shared memory."""
    return tl.reshape(tl.trans(tl.reshape(x, (SIDE, SIDE))), (SIDE * SIDE,))


@triton.jit
def _store_metadata(metadata_ptr, nibbles, tile_row, tile_column, rows, columns, ORDER: tl.constexpr):
    """Metadata of a tile of 16x16 blocks, nibbles (256,) by (block row, block column): spmm.nibble_positions."""
    n = tl.arange(0, 64)
    r = tl.arange(0, 4)[None, :]  # row in its block
    if ORDER == 90:  # a word holds row halves hi and group halves qh: axes (16-row group, hi, p/4, 32 columns, qh, q%4)
        x = tl.permute(tl.reshape(nibbles, (4, 2, 2, 2, 2, 4)), (0, 2, 3, 5, 1, 4))
        first, second = tl.split(tl.reshape(x, (64, 2, 2)))  # qh
        x0, x1 = tl.split(first)  # hi
        x2, x3 = tl.split(second)
        p = (n // 8 % 2)[:, None] * 4 + r
        word = (tile_row.to(tl.int64) * columns + (2 * tile_column + n // 4 % 2)[:, None] * 32) * 4
        word += (n // 16)[:, None] * 32 + 4 * p + (n % 4)[:, None]
    else:  # a word holds four groups of a row: axes (block row, 16 columns, group)
        x0, x1, x2, x3 = _split4(tl.reshape(nibbles, (64, 4)))
        row = tile_row * 64 + (n // 4)[:, None] * 4 + r
        c16 = n % 4
        word = ((rows // 128).to(tl.int64) * tile_column + row // 128) * 512 + 64 * (row % 128 // 32)
        word += (256 * (c16 // 2) + 2 * (c16 % 2))[:, None] + 8 * (row % 8) + 4 * (row // 16 % 2) + row // 8 % 2
    r = 4 * r
    bits = ((x0[:, None] >> r) & 15) | (((x1[:, None] >> r) & 15) << 4)
    bits |= (((x2[:, None] >> r) & 15) << 8) | (((x3[:, None] >> r) & 15) << 12)
    tl.store(metadata_ptr + word, bits.to(tl.int16))


@triton.jit
def _pack_weight_kernel(
    w_ptr,
    index_ptr,
    tables_ptr,
    values_ptr,
    metadata_ptr,
    values_t_ptr,
    metadata_t_ptr,
    rows,
    columns,
    stride_row,
    METADATA: tl.constexpr,
    ORDER: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_T: tl.constexpr,
):
    tile_row, tile_column = tl.program_id(0) // (columns // 64), tl.program_id(0) % (columns // 64)
    n = tl.arange(0, 256)
    i, j = tile_row * 16 + n // 16, tile_column * 16 + n % 16  # this thread's block
    ptr = w_ptr + i.to(tl.int64) * (4 * stride_row) + 4 * j
    live = n < 256
    a, b, c, d = (
        _load4(ptr, 1, live),
        _load4(ptr + stride_row, 1, live),
        _load4(ptr + 2 * stride_row, 1, live),
        _load4(ptr + 3 * stride_row, 1, live),
    )
    index = tl.load(index_ptr + i.to(tl.int64) * (columns // 4) + j).to(tl.int32)
    bits = tl.load(tables_ptr + index)
    if WRITE:
        x = (a, b, c, d)
        for r in tl.static_range(4):
            out = values_ptr + (4 * i + r).to(tl.int64) * (columns // 4) + j
            tl.store(out, _pack_pair(x[r], bits, 4 * r, 1))
    if WRITE_T:
        i_t, j_t = tile_row * 16 + n % 16, tile_column * 16 + n // 16  # its block after the transposition
        for r in tl.static_range(4):
            word = _pack_pair((a[r], b[r], c[r], d[r]), bits, r, 4)
            out = values_t_ptr + (4 * j_t + r).to(tl.int64) * (rows // 4) + i_t
            tl.store(out, _transpose_tile(word, 16))
    if METADATA:
        nibbles = tl.load(tables_ptr + 90 + index)
        if WRITE:
            _store_metadata(metadata_ptr, nibbles, tile_row, tile_column, rows, columns, ORDER)
        if WRITE_T:
            nibbles_t = _transpose_tile(nibbles >> 16, 16)
            _store_metadata(metadata_t_ptr, nibbles_t, tile_column, tile_row, columns, rows, ORDER)


def _packed_pointers(packed: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values as int32 pairs and metadata as int16 words: views of a packed operand."""
    words = packed.view(torch.int32)
    return words[: rows * columns // 4], packed[rows * columns // 2 :].view(torch.int16)


def _row_multiple(function: str, order: str) -> int:
    """What the rows of an operand that is packed in this metadata order are a multiple of."""
    if order not in ("sm80", "sm90"):
        raise ValueError(f"{function}: metadata order {order!r} is unknown, need sm80 or sm90")
    return 128 if order == "sm80" else 64


def pack_weight_(packed, packed_t, w, index, tables, order, metadata=True) -> None:
    """Write the packed operands of w and of w^T, from w and its index, in one pass. Twin: spmm.pack_ref on both.

    packed, packed_t: 1-D bfloat16 buffers of 9/16 of w's elements; one may be None and is not written. w: (out, in),
    rows contiguous, float32 or bfloat16; index: uint8 (out/4, in/4). order: "sm80" (out and in multiples of 128) or
    "sm90" (of 64).
    metadata: it depends on the index alone, so between refreshes only the values need writing. Raises ValueError on
    input it would misread.
    """
    (rows, columns), multiple = w.shape, _row_multiple("pack_weight_", order)
    size = rows * columns * 9 // 16
    if rows % multiple or columns % multiple or w.stride(1) != 1:
        raise ValueError(
            f"pack_weight_: w {tuple(w.shape)} with strides {w.stride()}, order {order} needs multiples of {multiple} "
            "and contiguous rows; multiply masked dense matrices instead"
        )
    written = [buffer for buffer in (packed, packed_t) if buffer is not None]
    if not written:
        raise ValueError("pack_weight_: packed and packed_t are both None; give the one that is to be written")
    for buffer in written:
        if buffer.dtype != torch.bfloat16 or buffer.shape != (size,) or not buffer.is_contiguous():
            raise ValueError(f"pack_weight_: {buffer.dtype} {tuple(buffer.shape)}, need a bfloat16 buffer of ({size},)")
    if index.dtype != torch.uint8 or index.shape != (rows // 4, columns // 4) or not index.is_contiguous():
        raise ValueError(
            f"pack_weight_: index {index.dtype} {tuple(index.shape)}, need the contiguous uint8 "
            f"{(rows // 4, columns // 4)} of transposable_index"
        )
    _launch(
        _pack_weight_kernel,
        rows * columns // 4096,
        w,
        index,
        tables,
        *_packed_pointers(written[0], rows, columns),
        *_packed_pointers(written[-1], columns, rows),
        rows,
        columns,
        w.stride(0),
        METADATA=metadata,
        ORDER=int(order[2:]),
        WRITE=packed is not None,
        WRITE_T=packed_t is not None,
        written=written,
        num_warps=8,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Row-wise masks, and the soft threshold (S-STE)


@triton.jit
def _bits_split(x):
    """|x| (N, 4) as int32 bits, which order as the magnitudes do, NaN above inf."""
    return _split4(tl.abs(x).to(tl.int32, bitcast=True))


@triton.jit
def _load_groups(w_ptr, n, columns, stride_row, stride_column, live):
    """float32 (N, 4): groups number n of a matrix with `columns` groups a row."""
    ptr = w_ptr + (n // columns).to(tl.int64) * stride_row + (n % columns).to(tl.int64) * (4 * stride_column)
    return _float32(tl.load(ptr[:, None] + tl.arange(0, 4)[None, :] * stride_column, mask=live[:, None], other=0.0))


@triton.jit
def _pair_index_kernel(w_ptr, index_ptr, columns, groups, stride_row, stride_column, GROUPS: tl.constexpr):
    n = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = n < groups
    a0, a1, a2, a3 = _bits_split(_load_groups(w_ptr, n, columns, stride_row, stride_column, live))
    NAN: tl.constexpr = 0x7F800001  # all NaNs are one, above inf
    a0, a1, a2, a3 = tl.minimum(a0, NAN), tl.minimum(a1, NAN), tl.minimum(a2, NAN), tl.minimum(a3, NAN)
    # An element is kept that loses to one other at most. Ties keep the lower index.
    c01, c02, c03 = (a0 >= a1).to(tl.int32), (a0 >= a2).to(tl.int32), (a0 >= a3).to(tl.int32)
    c12, c13, c23 = (a1 >= a2).to(tl.int32), (a1 >= a3).to(tl.int32), (a2 >= a3).to(tl.int32)
    low = tl.where(c01 + c02 + c03 >= 2, 0, tl.where(c12 + c13 - c01 >= 1, 1, 2))
    high = tl.where(c03 + c13 + c23 <= 1, 3, tl.where(c23 - c02 - c12 >= 0, 2, 1))
    pair = tl.where(low == 0, high - 1, low + high)
    tl.store(index_ptr + n.to(tl.int64), pair.to(tl.uint8), mask=live)


@torch.library.custom_op("nano24::pair_index", mutates_args=())
def pair_index(w: torch.Tensor) -> torch.Tensor:
    """Row-wise 2:4 mask by magnitude, as the number of the pair that each group keeps. Twin: operators.pair_index_ref.

    w: (rows, n), n divisible by 4, float32 or 16-bit, any strides. Returns uint8 (rows, n/4). Per group of fp32: 16 B
    read, 1 B written, at most 90 I.
    """
    index = torch.empty((w.shape[0], w.shape[1] // 4), dtype=torch.uint8, device=w.device)
    groups = index.numel()
    grid, how = triton.cdiv(groups, 256), {"GROUPS": 256, "num_warps": 8}
    _launch(_pair_index_kernel, grid, w, index, w.shape[1] // 4, groups, *w.stride(), **how)
    return index


@pair_index.register_fake
def _(w):
    return w.new_empty((w.shape[0], w.shape[1] // 4), dtype=torch.uint8)


@triton.jit
def _soft_threshold24_kernel(
    w_ptr, out_ptr, sums_ptr, columns, groups, stride_row, stride_column, SCALE: tl.constexpr, GROUPS: tl.constexpr
):
    n = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = n < groups
    x = _load_groups(w_ptr, n, columns, stride_row, stride_column, live)
    a = _bits_split(x)
    low01, low23 = tl.minimum(a[0], a[1]), tl.minimum(a[2], a[3])
    high01, high23 = tl.maximum(a[0], a[1]), tl.maximum(a[2], a[3])
    threshold = tl.minimum(tl.maximum(low01, low23), tl.minimum(high01, high23)).to(tl.float32, bitcast=True)
    soft = _copysign(_max(tl.abs(x) - threshold[:, None], 0.0), x)
    rounded = _round(soft, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], rounded, mask=live[:, None])
    if SCALE:
        soft = _float32(rounded)
        tl.store(sums_ptr + 2 * tl.program_id(0), tl.sum(tl.sum(x * soft, 1)))
        tl.store(sums_ptr + 2 * tl.program_id(0) + 1, tl.sum(tl.sum(soft * soft, 1)))


@torch.library.custom_op("nano24::soft_threshold24", mutates_args=())
def soft_threshold24(w: torch.Tensor, scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """S-STE's pruning and, with `scale`, its least-squares scale in the same read.

    Twins: operators.soft_threshold24_ref, equal to it, and operators.sste_scale_ref, to the rounding of the sums.

    w: (rows, n), n divisible by 4, float32 or 16-bit, any strides. Returns the pruned w, contiguous, and beta, float32
    0-d (empty without `scale`). The partial sums are added in a fixed order: deterministic. Per group of fp32: 16 B
    read, 16 B written, at most 218 I.
    """
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    groups, per_program = w.numel() // 4, 256
    programs = triton.cdiv(groups, per_program)
    sums = torch.empty((programs, 2) if scale else (0,), dtype=torch.float32, device=w.device)
    _launch(
        _soft_threshold24_kernel,
        programs,
        w,
        out,
        sums,
        w.shape[1] // 4,
        groups,
        *w.stride(),
        SCALE=scale,
        GROUPS=per_program,
        num_warps=8,
    )
    if not scale:
        return out, sums
    product, square = sums.double().sum(0)
    return out, torch.where(square > 0, product / square, 1).float()


@soft_threshold24.register_fake
def _(w, scale=False):
    return w.new_empty(w.shape), w.new_empty(() if scale else (0,), dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW with masked decay (Eq. 10), over quads: four neighbours of a row of a weight, a thread each


@triton.jit
def _kept_quad(index_ptr, tables_ptr, quad, columns, live):
    """Four mask bits (N,) of quad number `quad` of a weight with `columns` quads a row, from its index matrix."""
    row, column = quad // columns, quad % columns
    index = tl.load(index_ptr + (row // 4).to(tl.int64) * columns + column, mask=live, other=0).to(tl.int32)
    return (tl.load(tables_ptr + index) >> (4 * (row % 4))) & 15


@triton.jit
def _masked(x, kept):
    """x (N, 4) with zeros where `kept` (N,) has its bit set."""
    return tl.where(((kept[:, None] >> tl.arange(0, 4)[None, :]) & 1) != 0, 0.0, x)


@triton.jit
def _aligned(address_ptr):
    """The float32 pointer that lies at address_ptr; what it points to is 16-byte aligned."""
    return tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _adamw_kernel(
    pointers_ptr, sizes_ptr, scalars_ptr, programs_ptr, tables_ptr, DECAY_ON_WEIGHT: tl.constexpr, QUADS: tl.constexpr
):
    # Of this program's tensor: the addresses of p, g, m, v and the index (0 = none), its quads, its quads a row.
    tensor = tl.load(programs_ptr + 2 * tl.program_id(0))
    chunk = tl.load(programs_ptr + 2 * tl.program_id(0) + 1)
    pointers = pointers_ptr + 5 * tensor.to(tl.int64)
    p_ptr = _aligned(pointers)
    g_ptr = _aligned(pointers + 1)
    m_ptr = _aligned(pointers + 2)
    v_ptr = _aligned(pointers + 3)
    index_address = tl.load(pointers + 4)
    index_ptr = index_address.to(tl.pointer_type(tl.uint8))
    quads, columns = tl.load(sizes_ptr + 2 * tensor), tl.load(sizes_ptr + 2 * tensor + 1)
    scalars = scalars_ptr + 8 * tensor
    one_minus_beta1, beta2, one_minus_beta2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    eps, shrink = tl.load(scalars + 3), tl.load(scalars + 4)  # shrink = 1 - lr * weight_decay
    step_size, root_bias2 = tl.load(scalars + 5), tl.load(scalars + 6)  # lr / (1 - beta1^t), sqrt(1 - beta2^t)
    decay = tl.load(scalars + 7)  # lambda; on weights, lr * lambda
    n = chunk * QUADS + tl.arange(0, QUADS)
    live = n < quads
    at = n.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    p = tl.load(p_ptr + at, mask=live[:, None], other=0.0)
    g = tl.load(g_ptr + at, mask=live[:, None], other=0.0)
    m = tl.load(m_ptr + at, mask=live[:, None], other=0.0)
    v = tl.load(v_ptr + at, mask=live[:, None], other=0.0)
    if index_address != 0:
        kept = _kept_quad(index_ptr, tables_ptr, n, columns, live)
        if DECAY_ON_WEIGHT:
            p -= decay * _masked(p, kept)
        else:
            g += decay * _masked(p, kept)
    p *= shrink
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_bias2) + eps)
    tl.store(p_ptr + at, p, mask=live[:, None])
    tl.store(m_ptr + at, m, mask=live[:, None])
    tl.store(v_ptr + at, v, mask=live[:, None])


_ADAMW_QUADS = 256  # a chunk of 1024 elements to a program


@functools.lru_cache(maxsize=16)
def _chunks(quads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 (programs, 2): of each program, which tensor and which of its chunks."""
    chunks = [(i, c) for i, n in enumerate(quads) for c in range(triton.cdiv(n, _ADAMW_QUADS))]
    return torch.tensor(chunks, dtype=torch.int32, device=device)


def adamw_(params, grads, exp_avgs, exp_avg_sqs, indices, scalars, tables, decay_on_weight=False) -> None:
    """AdamW with masked decay on many tensors in one launch, in place. Twin: operators.masked_decay_ref_ on the
    gradients (or Eq. 8 on the weights), then torch.optim.AdamW; as there, divisions and roots are rounded ones.

    Equally long lists of contiguous, 16-byte aligned float32 tensors of a multiple of 4 elements on one device;
    `indices` holds None where no mask is. scalars: of each tensor (1 - beta1, beta2, 1 - beta2, eps,
    1 - lr * weight_decay, lr / (1 - beta1^t), sqrt(1 - beta2^t), masked decay), the last one lr * lambda with
    decay_on_weight. Gradients are read only. Per element: 16 B of p, g, m and v, 12 B written, 1/16 B of index, at
    most 192 I. Raises ValueError for tensors that it would misread.
    """
    device = params[0].device
    for t in (*params, *grads, *exp_avgs, *exp_avg_sqs):  # the kernel sees addresses alone
        odd = t.numel() % 4 or t.data_ptr() % 16
        if t.dtype != torch.float32 or not t.is_contiguous() or t.device != device or odd:
            raise ValueError(
                f"adamw_: {t.dtype} {tuple(t.shape)} on {t.device}, need contiguous float32 on {device}, aligned to 16 "
                "bytes, a multiple of 4 elements; use torch.optim.AdamW"
            )
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, indices, strict=True)
    pointers = [[0 if t is None else t.data_ptr() for t in row] for row in tensors]
    quads = [p.numel() // 4 for p in params]
    sizes = [(n, p.shape[-1] // 4 if i is not None else 1) for n, p, i in zip(quads, params, indices, strict=True)]
    chunks = _chunks(tuple(quads), device)
    _launch(
        _adamw_kernel,
        len(chunks),
        torch.tensor(pointers, dtype=torch.int64).to(device, non_blocking=True),
        torch.tensor(sizes, dtype=torch.int32).to(device, non_blocking=True),
        torch.tensor(scalars, dtype=torch.float32).to(device, non_blocking=True),
        chunks,
        tables,
        DECAY_ON_WEIGHT=decay_on_weight,
        QUADS=_ADAMW_QUADS,
        num_warps=8,
        written=(*params, *exp_avgs, *exp_avg_sqs),
    )

"""Every Triton kernel of a training step, with its launcher. A launcher has the name, the arguments and, unless its
docstring says otherwise, the result of a specification in plain PyTorch. The specification documents shapes and dtypes.
It is name.torch in sparse24.py or, for activations and packing, in gemm24/operands.py.

Launchers take CUDA tensors. Under TRITON_INTERPRET=1 they take CPU tensors, so that tests run without a GPU. They are
not differentiable. Most are torch custom ops, so that torch.compile does not trace them. The fake is beside the op.
Launchers raise ValueError for tensors that a kernel would misread.

To avoid shared memory, one thread owns one row of an (N, 4) tile, N = 32 * num_warps, and all other arithmetic is 1-D,
(N,). An (N, 4) load of contiguous memory is one 16-byte load per thread; two splits make four registers of it.
Arithmetic is float32, and a result is rounded once. Offsets are int64.

benchmarks/kernel_times.py lists the bytes that each kernel must move and the number of instructions that it may compile
to, and measures both. The launch constants were chosen on an H200 with 16384 x 4096 elements: results/h200.
"""

import functools

import torch
import triton
import triton.language as tl

# With TRITON_INTERPRET=1 the kernels run on the CPU, in numpy. It has no PTX and truncates when it casts to bfloat16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _launch(kernel, programs: int, *args, written=(), **options) -> None:
    """Run `programs` programs of a kernel on the device of its first argument. written: tensors that the kernel
    overwrites. autograd then refuses a backward pass that needs their old values."""
    torch.autograd.graph.increment_version(written)
    with torch.cuda.device_of(args[0]):
        # Do not contract to FMA, so that a kernel rounds as its specification does: twice in h - u*h, not once.
        kernel[(programs,)](*args, **options, enable_fp_fusion=False)


# ---------------------------------------------------------------------------------------------------------------------
# Shared maths


@triton.jit
def _max(a, b):
    """Maximum that returns NaN if an operand is NaN, as torch.maximum does."""
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
    """x cast to float32. (The interpreter casts subnormal bfloat16 wrongly.)"""
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
def _low(word):
    """The bfloat16 in the low half of an int32, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _copysign(magnitude, x):
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _load_quads(ptr, stride, live):
    """float32 (N, 4): four columns, the first one at ptr (N,)."""
    return _float32(tl.load(ptr[:, None] + tl.arange(0, 4)[None, :] * stride, mask=live[:, None], other=0.0))


@triton.jit
def _load_groups(ptr, n, columns, stride_row, stride_column, live):
    """float32 (N, 4): the groups of number n (N,) of a matrix with `columns` groups per row."""
    ptr += (n // columns).to(tl.int64) * stride_row + (n % columns).to(tl.int64) * (4 * stride_column)
    return _load_quads(ptr, stride_column, live)


# ---------------------------------------------------------------------------------------------------------------------
# The 90 patterns. Two kernels read a table of them, int32 (2, 90). [0]: the pattern's 16 bits, bit 4*row + column.
# [1]: eight nibbles, low | high << 2. The nibble at bit 4r has the two columns that row r keeps; the nibble at bit
# 16 + 4c has the two rows that column c keeps.

_TABLES: dict[torch.device, torch.Tensor] = {}


def use_patterns(patterns: torch.Tensor) -> None:
    """Set the pattern of each index, bool (90, 4, 4). Raises ValueError if the process already has other patterns."""
    bits = (patterns.flatten(1).long() << torch.arange(16, device=patterns.device)).sum(-1)
    both = torch.cat((patterns, patterns.transpose(1, 2)), dim=1).to(torch.uint8)  # (90, 8, 4)
    low, high = both.sort(dim=-1, descending=True, stable=True).indices[..., :2].unbind(-1)
    nibbles = ((low | high << 2) << 4 * torch.arange(8, device=patterns.device)).sum(-1)
    table = torch.stack((bits, nibbles)).to(torch.int32)
    if not torch.equal(_TABLES.setdefault(table.device, table), table):  # captured CUDA graphs use the first table
        raise ValueError("use_patterns: a process has one order of patterns, and this is another; start a new process")


def _table(device: torch.device) -> torch.Tensor:
    """The table of patterns on this device."""
    if not _TABLES:
        raise RuntimeError("kernels: the patterns are not set; call kernels.use_patterns(sparse24.PATTERNS) first")
    table = _TABLES[device] if device in _TABLES else next(iter(_TABLES.values())).to(device)
    if not torch.compiler.is_compiling():  # a tensor of a traced graph must not outlive it
        _TABLES[device] = table
    return table


# ---------------------------------------------------------------------------------------------------------------------
# transposable_index: Algorithm 1's argmax over 90 patterns, by 8 candidates


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
    """Candidate B_jk, jk = PAIRS[NUMBER]. Returns the best score and the pair number of the best candidate. Its index
    is computed once, at the end."""
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
    """The best of the 90 patterns for the rows a, b, c, d of |w|, as in sparse24.transposable_index.torch."""
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
    bits = 4 * _second_greater(5 - jk, e)  # pair 5 - jk is the complement of pair jk
    bits += 2 * _second_greater(jk, x) + _second_greater(jk, y)
    return tl.where(jk >= 0, 42 + 8 * jk + bits, index)


@triton.jit
def _load_rows(ptr, stride_row, stride_column, live):
    """The four rows of the 4x4 blocks that begin at ptr (N,)."""
    a = _split4(_load_quads(ptr, stride_column, live))
    b = _split4(_load_quads(ptr + stride_row, stride_column, live))
    c = _split4(_load_quads(ptr + 2 * stride_row, stride_column, live))
    d = _split4(_load_quads(ptr + 3 * stride_row, stride_column, live))
    return a, b, c, d


@triton.jit
def _load_block(w_ptr, block, columns, stride_row, stride_column, live):
    """The four rows of the 4x4 blocks of number `block` (N,) of w, which has `columns` blocks per row."""
    ptr = w_ptr + (block // columns).to(tl.int64) * (4 * stride_row)
    return _load_rows(ptr + (block % columns).to(tl.int64) * (4 * stride_column), stride_row, stride_column, live)


@triton.jit
def _transposable_index_kernel(w_ptr, index_ptr, columns, blocks, stride_row, stride_column, BLOCKS: tl.constexpr):
    n = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # int32 is enough for 2^35 weights, and int64 division is slow
    live = n < blocks
    a, b, c, d = _load_block(w_ptr, n, columns, stride_row, stride_column, live)
    index = _best_pattern(_abs4(a), _abs4(b), _abs4(c), _abs4(d))
    tl.store(index_ptr + n, index.to(tl.uint8), mask=live)


def transposable_index(w: torch.Tensor) -> torch.Tensor:
    """The pattern with the largest L1 norm in each 4x4 block."""
    index = torch.empty((w.shape[0] // 4, w.shape[1] // 4), dtype=torch.uint8, device=w.device)
    sizes, grid = (index.shape[1], index.numel(), *w.stride()), triton.cdiv(index.numel(), 128)
    _launch(_transposable_index_kernel, grid, w, index, *sizes, BLOCKS=128, num_warps=4)
    return index


# ---------------------------------------------------------------------------------------------------------------------
# pack_weight_: the packed operands of w and of its transpose, from w and its index. A program packs 16x16 blocks. For a
# row-wise mask the kernel looks up pair p in the table entry of pattern p < 6, whose first row keeps pair p.


def _row_multiple(function: str, order: str) -> int:
    """The number that must divide the rows of an operand packed in this metadata order."""
    if order not in ("sm80", "sm90"):
        raise ValueError(f"{function}: metadata order {order!r} is unknown, need sm80 or sm90")
    return 128 if order == "sm80" else 64


@triton.jit
def _pack_pair(x, bits, BIT: tl.constexpr, STEP: tl.constexpr):
    """The two kept entries of four as bfloat16, the first one in the low half of an int32. Entry i is kept if bit
    BIT+STEP*i is set. The rows and the columns of a block use the same bits, so the compiler tests each bit once."""
    low = tl.where((bits & (1 << BIT)) != 0, x[0], tl.where((bits & (1 << (BIT + STEP))) != 0, x[1], x[2]))
    high = tl.where((bits & (1 << (BIT + 2 * STEP))) != 0, x[2], x[1])
    high = tl.where((bits & (1 << (BIT + 3 * STEP))) != 0, x[3], high)
    return _bits16(low) | (_bits16(high) << 16)


@triton.jit
def _transpose_tile(x, SIDE: tl.constexpr):
    """Transpose x (SIDE*SIDE,), ordered by (row, column), through shared memory."""
    return tl.reshape(tl.trans(tl.reshape(x, (SIDE, SIDE))), (SIDE * SIDE,))


@triton.jit
def _store_metadata(metadata_ptr, nibbles, tile_row, tile_column, rows, columns, ORDER: tl.constexpr):
    """Store the metadata of a tile of 16x16 blocks. nibbles (256,) are ordered by (block row, block column). The layout
    is that of `nibble_positions` in gemm24/layout.py."""
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
    w_ptr, index_ptr, table_ptr, values_ptr, metadata_ptr, values_t_ptr, metadata_t_ptr, rows, columns, stride_row,
    PAIRS: tl.constexpr, METADATA: tl.constexpr, ORDER: tl.constexpr, WRITE: tl.constexpr, WRITE_T: tl.constexpr,
):  # fmt: skip
    tile_row, tile_column = tl.program_id(0) // (columns // 64), tl.program_id(0) % (columns // 64)
    n = tl.arange(0, 256)
    i, j = tile_row * 16 + n // 16, tile_column * 16 + n % 16  # this thread's block
    ptr = w_ptr + i.to(tl.int64) * (4 * stride_row) + 4 * j
    a, b, c, d = _load_rows(ptr, stride_row, 1, n < 256)
    index_ptr += i.to(tl.int64) * (columns if PAIRS else columns // 4) + j
    if PAIRS:  # a row-wise mask has one pair for each of the block's rows
        bits, nibbles = tl.zeros_like(n), tl.zeros_like(n)
        for r in tl.static_range(4):
            pair = tl.load(index_ptr + r * (columns // 4)).to(tl.int32)
            bits |= (tl.load(table_ptr + pair) & 15) << (4 * r)
            nibbles |= (tl.load(table_ptr + 90 + pair) & 15) << (4 * r)
    else:
        index = tl.load(index_ptr).to(tl.int32)
        bits, nibbles = tl.load(table_ptr + index), tl.load(table_ptr + 90 + index)
    if WRITE:
        x = (a, b, c, d)
        for r in tl.static_range(4):
            out = values_ptr + (4 * i + r).to(tl.int64) * (columns // 4) + j
            tl.store(out, _pack_pair(x[r], bits, 4 * r, 1))
    if WRITE_T:
        i_t, j_t = tile_row * 16 + n % 16, tile_column * 16 + n // 16  # this thread's block in the transpose
        for r in tl.static_range(4):
            word = _pack_pair((a[r], b[r], c[r], d[r]), bits, r, 4)
            out = values_t_ptr + (4 * j_t + r).to(tl.int64) * (rows // 4) + i_t
            tl.store(out, _transpose_tile(word, 16))
    if METADATA:
        if WRITE:
            _store_metadata(metadata_ptr, nibbles, tile_row, tile_column, rows, columns, ORDER)
        if WRITE_T:
            nibbles_t = _transpose_tile(nibbles >> 16, 16)
            _store_metadata(metadata_t_ptr, nibbles_t, tile_column, tile_row, columns, rows, ORDER)


def pack_weight_(packed, packed_t, w, index, order: str, metadata: bool = True) -> None:
    """Write the packed operands of the masked w and of its transpose. The rows of w must be contiguous."""
    (rows, columns), multiple = w.shape, _row_multiple("pack_weight_", order)
    if rows % multiple or columns % (64 if packed_t is None else multiple) or w.stride(1) != 1:
        raise ValueError(
            f"pack_weight_: w {tuple(w.shape)} with strides {w.stride()}, order {order} needs multiples of {multiple} "
            "and contiguous rows; multiply masked dense matrices instead"
        )
    written, size = [buffer for buffer in (packed, packed_t) if buffer is not None], rows * columns * 9 // 16
    if not written:
        raise ValueError("pack_weight_: packed and packed_t are both None, need at least one buffer to write to")
    for buffer in written:
        if buffer.dtype != torch.bfloat16 or buffer.shape != (size,) or not buffer.is_contiguous():
            raise ValueError(f"pack_weight_: {buffer.dtype} {tuple(buffer.shape)}, need a bfloat16 buffer of ({size},)")
    blocks, pairs = (rows // 4, columns // 4), (rows, columns // 4)
    by_rows = index.shape == pairs and packed_t is None
    if index.dtype != torch.uint8 or not (by_rows or index.shape == blocks) or not index.is_contiguous():
        raise ValueError(
            f"pack_weight_: index {index.dtype} {tuple(index.shape)}, need the contiguous uint8 {blocks} of "
            f"transposable_index, or for packed alone {pairs} of pair_index"
        )
    half = rows * columns // 2  # values as int32 pairs, then metadata as int16 words
    buffers = [(t[:half].view(torch.int32), t[half:].view(torch.int16)) for t in (written[0], written[-1])]
    arguments = (w, index, _table(w.device), *buffers[0], *buffers[1], rows, columns, w.stride(0))
    forms = {"WRITE": packed is not None, "WRITE_T": packed_t is not None, "METADATA": metadata, "PAIRS": by_rows}
    grid = rows * columns // 4096
    _launch(_pack_weight_kernel, grid, *arguments, ORDER=int(order[2:]), **forms, written=written, num_warps=8)


# ---------------------------------------------------------------------------------------------------------------------
# pair_index: row-wise 2:4 masks. Each group of four keeps its two largest magnitudes.


@triton.jit
def _pair_index_kernel(w_ptr, index_ptr, columns, groups, stride_row, stride_column, GROUPS: tl.constexpr):
    n = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = n < groups
    bits = tl.abs(_load_groups(w_ptr, n, columns, stride_row, stride_column, live)).to(tl.int32, bitcast=True)
    a0, a1, a2, a3 = _split4(bits)  # ordered as the magnitudes are
    NAN: tl.constexpr = 0x7F800001  # clamp all NaNs to one value, above inf
    a0, a1, a2, a3 = tl.minimum(a0, NAN), tl.minimum(a1, NAN), tl.minimum(a2, NAN), tl.minimum(a3, NAN)
    # An element is kept if at most one other is larger. Ties keep the lower index.
    c01, c02, c03 = (a0 >= a1).to(tl.int32), (a0 >= a2).to(tl.int32), (a0 >= a3).to(tl.int32)
    c12, c13, c23 = (a1 >= a2).to(tl.int32), (a1 >= a3).to(tl.int32), (a2 >= a3).to(tl.int32)
    low = tl.where(c01 + c02 + c03 >= 2, 0, tl.where(c12 + c13 - c01 >= 1, 1, 2))
    high = tl.where(c03 + c13 + c23 <= 1, 3, tl.where(c23 - c02 - c12 >= 0, 2, 1))
    pair = tl.where(low == 0, high - 1, low + high)
    tl.store(index_ptr + n.to(tl.int64), pair.to(tl.uint8), mask=live)


@torch.library.custom_op("nano24::pair_index", mutates_args=())
def pair_index(x: torch.Tensor) -> torch.Tensor:
    """The number in PAIRS of the pair that each group of four keeps."""
    index = torch.empty((*x.shape[:-1], x.shape[-1] // 4), dtype=torch.uint8, device=x.device)
    x, groups = x.reshape(-1, x.shape[-1]), index.numel()
    sizes, grid = (x.shape[1] // 4, groups, *x.stride()), triton.cdiv(groups, 256)
    _launch(_pair_index_kernel, grid, x, index, *sizes, GROUPS=256, num_warps=8)
    return index


pair_index.register_fake(lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 4), dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# soft_threshold24 and sste_scale (S-STE): S(w) = sign(w) max(|w| - t, 0), t the second-smallest magnitude of a group of
# four, and beta = <w, S(w)> / <S(w), S(w)>. One kernel computes both.


@triton.jit
def _soft_threshold24_kernel(
    w_ptr, out_ptr, sums_ptr, columns, groups, stride_row, stride_column, SCALE: tl.constexpr, GROUPS: tl.constexpr
):
    n = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = n < groups
    x = _load_groups(w_ptr, n, columns, stride_row, stride_column, live)
    a = _split4(tl.abs(x).to(tl.int32, bitcast=True))  # ordered as the magnitudes are
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
def _soft_threshold_and_scale(w: torch.Tensor, scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, x = torch.empty(w.shape, dtype=w.dtype, device=w.device), w.reshape(-1, w.shape[-1])
    groups, grid = w.numel() // 4, triton.cdiv(w.numel(), 1024)
    sums = torch.empty((grid, 2) if scale else (0,), dtype=torch.float32, device=w.device)
    sizes = (x.shape[1] // 4, groups, *x.stride())
    _launch(_soft_threshold24_kernel, grid, x, out, sums, *sizes, SCALE=scale, GROUPS=256, num_warps=8)
    if not scale:
        return out, sums
    product, square = sums.double().sum(0)  # a fixed order of summation: deterministic
    return out, torch.where(square > 0, product / square, 1).float()


@_soft_threshold_and_scale.register_fake
def _(w, scale):
    return w.new_empty(w.shape), w.new_empty(() if scale else (0,), dtype=torch.float32)


def soft_threshold24(w: torch.Tensor) -> torch.Tensor:
    """S(w), contiguous."""
    return _soft_threshold_and_scale(w, False)[0]


def sste_scale(w: torch.Tensor) -> torch.Tensor:
    """beta of w. The order of summation is not that of the specification."""
    return _soft_threshold_and_scale(w, True)[1]


# ---------------------------------------------------------------------------------------------------------------------
# adamw_: masked decay (Eq. 10) and AdamW on many tensors in one launch. A thread has a quad: four neighbours of a row.

_ADAMW_QUADS = 256  # quads per program


@functools.lru_cache(maxsize=16)
def _chunks(quads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 (programs, 2): for each program the number of its tensor, and of the chunk in that tensor."""
    chunks = [(i, c) for i, n in enumerate(quads) for c in range(triton.cdiv(n, _ADAMW_QUADS))]
    return torch.tensor(chunks, dtype=torch.int32, device=device)


@triton.jit
def _aligned(address_ptr):
    """The float32 pointer stored at address_ptr. It is 16-byte aligned."""
    return tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _adamw_kernel(
    pointers_ptr, sizes_ptr, scalars_ptr, programs_ptr, table_ptr, DECAY_ON_WEIGHT: tl.constexpr, QUADS: tl.constexpr
):
    # Per tensor: the addresses of p, g, m, v and the index (0 = none), the number of quads, the quads per row.
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
    masked_decay = tl.load(scalars + 7)  # lambda, or lr * lambda with DECAY_ON_WEIGHT
    n = chunk * QUADS + tl.arange(0, QUADS)
    live = n < quads
    at = n.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    p = tl.load(p_ptr + at, mask=live[:, None], other=0.0)
    g = tl.load(g_ptr + at, mask=live[:, None], other=0.0)
    m = tl.load(m_ptr + at, mask=live[:, None], other=0.0)
    v = tl.load(v_ptr + at, mask=live[:, None], other=0.0)
    if index_address != 0:
        row, column = n // columns, n % columns  # the weight has `columns` quads per row
        index = tl.load(index_ptr + (row // 4).to(tl.int64) * columns + column, mask=live, other=0).to(tl.int32)
        bits = tl.load(table_ptr + index) >> (4 * (row % 4))
        pruned = tl.where(((bits[:, None] >> tl.arange(0, 4)[None, :]) & 1) != 0, 0.0, p)
        if DECAY_ON_WEIGHT:
            p -= masked_decay * pruned
        else:
            g += masked_decay * pruned
    p *= shrink
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_bias2) + eps)
    tl.store(p_ptr + at, p, mask=live[:, None])
    tl.store(m_ptr + at, m, mask=live[:, None])
    tl.store(v_ptr + at, v, mask=live[:, None])


def adamw_(params, grads, exp_avgs, exp_avg_sqs, indices, scalars, decay_on_weight: bool = False) -> None:
    """Masked decay of the gradients (Eq. 10), or with decay_on_weight of the weights (Eq. 8), then the step of
    torch.optim.AdamW. Gradients are not written.

    The arguments are lists with one entry per tensor. Tensors are float32, contiguous, 16-byte aligned, with a multiple
    of 4 elements, on one device. indices: None for a tensor without mask. scalars: sparse24.adamw_scalars, with
    lr * lambda in place of lambda if decay_on_weight. Raises ValueError for other tensors.
    """
    device = params[0].device
    for t in (*params, *grads, *exp_avgs, *exp_avg_sqs):  # the kernel gets only addresses
        misaligned = t.numel() % 4 or t.data_ptr() % 16
        if t.dtype != torch.float32 or not t.is_contiguous() or t.device != device or misaligned:
            raise ValueError(
                f"adamw_: {t.dtype} {tuple(t.shape)} on {t.device}, need contiguous float32 on {device}, aligned to 16 "
                "bytes, a multiple of 4 elements; use torch.optim.AdamW"
            )
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, indices, strict=True)
    pointers = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in tensors], dtype=torch.int64)
    quads = [p.numel() // 4 for p in params]
    sizes = [(n, p.shape[-1] // 4 if i is not None else 1) for n, p, i in zip(quads, params, indices, strict=True)]
    host = (pointers, torch.tensor(sizes, dtype=torch.int32), torch.tensor(scalars, dtype=torch.float32))
    chunks, written = _chunks(tuple(quads), device), (*params, *exp_avgs, *exp_avg_sqs)
    arguments = (*(t.to(device, non_blocking=True) for t in host), chunks, _table(device))
    options = {"DECAY_ON_WEIGHT": decay_on_weight, "QUADS": _ADAMW_QUADS, "num_warps": 8}
    _launch(_adamw_kernel, len(chunks), *arguments, **options, written=written)


# ---------------------------------------------------------------------------------------------------------------------
# activation, activation_backward: a = f(z), dz = da f'(z). Tensors are feature-major: z is (d_ff, tokens). A gated z is
# (2 d_ff, tokens), with the gate's rows first: a = f(gate) * up. The names of gated activations end with "glu".


@triton.jit
def _exp2(x):
    """2^x by one hardware instruction. Results below 2^-126 become 0."""
    if _INTERPRETED:
        return tl.exp2(x)
    asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        return 1.0 / x
    asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _activation(z, ACTIVATION: tl.constexpr):
    """f(z) and f'(z) in float32. A gated activation gets z of the gate.

    GELU: value and derivative share the exponential of the normal density. With k = 1/(1 + 0.2316419 |z|), Phi(-|z|) is
    density * poly5(k), with an error of 7.5e-8 (Abramowitz and Stegun 26.2.17), so that of f is 3e-7, and of f' 4e-7.
    FMAs are explicit, because `_launch` turns contraction off.
    """
    gated: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "swiglu"
    tl.static_assert(gated or (ACTIVATION == "gelu" or ACTIVATION == "relu2"))
    if ACTIVATION == "relu2":
        r = _max(z, 0.0)
        return r * r, 2 * r
    if ACTIVATION == "swiglu":
        s = _reciprocal(1 + _exp2(-1.4426950408889634 * z))
        return z * s, s * tl.fma(z, 1 - s, 1.0)
    e = _exp2(-0.7213475204444817 * z * z)  # exp(-z^2/2)
    k = _reciprocal(tl.fma(tl.abs(z), 0.2316419, 1.0))
    poly = tl.fma(k, 0.5307027145, -0.7265760135)  # the published coefficients times 1/sqrt(2 pi)
    poly = tl.fma(k, poly, 0.7107068705)
    poly = tl.fma(k, poly, -0.142248368)
    poly = tl.fma(k, poly, 0.127414796)
    tail = e * (k * poly)
    phi = tl.where(z > 0, 1 - tail, tail)
    return z * phi, tl.fma(0.3989422804014327 * z, e, phi)


@triton.jit
def _backward(z, up, da, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Gradients of a = f(z), or of a = f(z) * up: dZ and the gradient of up."""
    value, slope = _activation(z, ACTIVATION)
    if GATED:
        return da * up * slope, da * value
    return da * slope, da


@triton.jit
def _activation_kernel(z_ptr, a_ptr, size, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < size
    a, _ = _activation(_float32(tl.load(z_ptr + n, mask=live, other=0.0)), ACTIVATION)
    if GATED:
        a *= _float32(tl.load(z_ptr + size + n, mask=live, other=0.0))
    tl.store(a_ptr + n, _round(a, a_ptr.dtype.element_ty), mask=live)


def _gated(function: str, z: torch.Tensor, activation: str, da: torch.Tensor | None = None) -> bool:
    """Returns whether the activation is gated. Raises ValueError for tensors that the kernels would misread."""
    halves = 2 if activation.endswith("glu") else 1
    fits = z.dim() == 2 and z.shape[0] % halves == 0 and z.is_contiguous()
    if not fits or (da is not None and (da.shape != (z.shape[0] // halves, z.shape[1]) or not da.is_contiguous())):
        raise ValueError(
            f"{function}: z {tuple(z.shape)}{'' if da is None else f', da {tuple(da.shape)}'}; need contiguous "
            f"feature-major z ({'2 d_ff' if halves == 2 else 'd_ff'}, tokens) and da (d_ff, tokens); call .contiguous()"
        )
    return halves == 2


@torch.library.custom_op("nano24::activation", mutates_args=())
def activation(z: torch.Tensor, activation: str, recompute: bool = False) -> torch.Tensor:
    """a = f(z), or f(gate) * up, within rounding and 3e-7. z is contiguous.

    recompute: True in the backward, which computes `a` a second time to save memory. It does not change the result.
    torch.compile merges equal calls, so without it the forward's `a` would be kept for the backward.
    """
    gated = _gated("activation", z, activation)
    a = z.new_empty((z.shape[0] // (1 + gated), z.shape[1]))
    options = {"ACTIVATION": activation, "GATED": gated, "BLOCK": 1024, "num_warps": 4}
    _launch(_activation_kernel, triton.cdiv(a.numel(), 1024), z, a, a.numel(), **options)
    return a


@activation.register_fake
def _(z, activation, recompute=False):
    return z.new_empty((z.shape[0] // (1 + _gated("activation", z, activation)), z.shape[1]))


@triton.jit
def _activation_backward_kernel(
    z_ptr, da_ptr, dz_ptr, size, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < size
    z = _float32(tl.load(z_ptr + n, mask=live, other=0.0))
    da = _float32(tl.load(da_ptr + n, mask=live, other=0.0))
    up = _float32(tl.load(z_ptr + size + n, mask=live, other=0.0)) if GATED else z
    dz, dup = _backward(z, up, da, ACTIVATION, GATED)
    tl.store(dz_ptr + n, _round(dz, dz_ptr.dtype.element_ty), mask=live)
    if GATED:
        tl.store(dz_ptr + size + n, _round(dup, dz_ptr.dtype.element_ty), mask=live)


@torch.library.custom_op("nano24::activation_backward", mutates_args=())
def activation_backward(z: torch.Tensor, da: torch.Tensor, activation: str) -> torch.Tensor:
    """dz of `activation`, within rounding and 4e-7. z and da are contiguous."""
    gated, dz, size = _gated("activation_backward", z, activation, da), torch.empty_like(z), da.numel()
    options = {"ACTIVATION": activation, "GATED": gated, "BLOCK": 1024, "num_warps": 4}
    _launch(_activation_backward_kernel, triton.cdiv(size, 1024), z, da, dz, size, **options)
    return dz


activation_backward.register_fake(lambda z, da, activation: torch.empty_like(z))


# ---------------------------------------------------------------------------------------------------------------------
# mvue24 (Eq. 6) to masked dense, for any dtype and strides. A thread has one unit of eight groups: rows p and p+8 of a
# 16-row tile, and groups q, q+1, q+4, q+5 (q even) of a 32-column panel. A bfloat16 unit takes four 16-byte loads, and
# has complete metadata words in sm90's order. It takes two Philox calls. Each gives four words, one for each (row half,
# column half), as in sparse24.group_uniforms. A program's tile is 32 rows x 128 columns.


@triton.jit
def _philox(counter, seed):
    """Philox4x32-10 of the int64 counter (N,) and key, as four uint32 (N,)."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _unit_float(word):
    """The low 23 bits of a uint32 as a multiple of 2^-23 in [0, 1), exact."""
    if _INTERPRETED:
        bits = ((word & 0x7FFFFF) | 0x3F800000).to(tl.int32, bitcast=True)
    else:  # in one instruction, with the second constant in a register
        asm: tl.constexpr = "lop3.b32 $0, $1, 0x7fffff, $2, 0xea;"
        one = tl.full(word.shape, 0x3F800000, tl.int32)
        bits = tl.inline_asm_elementwise(asm, "=r,r,r", [word, one], tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _draw(
    a, word, K01: tl.constexpr, K02: tl.constexpr, K03: tl.constexpr, K12: tl.constexpr, K13: tl.constexpr,
    K23: tl.constexpr,
):  # fmt: skip
    """MVUE of the magnitudes a, four (N,), with a random word. Returns h, and the constant K of the kept pair. The
    comparisons are those of sparse24.mvue24_with_mask."""
    u = _unit_float(word)
    rest = _min(a[0], a[1]) + _min(a[2], a[3]) + _min(_max(a[0], a[1]), _max(a[2], a[3]))
    h = _min(rest, ((a[0] + a[1]) + (a[2] + a[3])) * 0.5)
    t = u * h
    t = tl.where(t < h, t, 0.0)
    s = h - t
    last = (a[3] >= s) & (a[2] <= h)
    first0 = tl.where(a[1] <= h, tl.where(last, K03, tl.where(a[2] + a[3] >= s, K02, K01)), K01)
    first1 = tl.where(last | (a[2] == 0), K13, K12)
    return h, tl.where(a[0] + a[1] <= t, K23, tl.where(a[0] <= t, first1, first0))


@triton.jit
def _unit(tile, tile_columns, TILE_GROUPS: tl.constexpr, PANELS: tl.constexpr, rows_first: tl.constexpr):
    """The first row (N,) and first column (N,) of each thread's unit in a tile of 16*TILE_GROUPS x 32*PANELS."""
    n = tl.arange(0, 16 * TILE_GROUPS * PANELS)
    if rows_first:  # neighbouring threads take neighbouring rows, which are adjacent in a transposed matrix
        p, rest = n % 8, n // 8
        group, part = rest % TILE_GROUPS, rest // TILE_GROUPS
    else:
        part, rest = n % (2 * PANELS), n // (2 * PANELS)
        p, group = rest % 8, rest // 8
    row = (tile // tile_columns) * (16 * TILE_GROUPS) + group * 16 + p
    return row, (tile % tile_columns) * (32 * PANELS) + part // 2 * 32 + part % 2 * 8


@triton.jit
def _counters(row, column, columns):
    """The Philox counter of a unit's groups q and q+4 in rows p and p+8, as in sparse24.group_uniforms. Groups q+1 and
    q+5 have the next counter."""
    counter = (row // 16 * 8 + row % 8).to(tl.int64) * (4 * ((columns + 31) // 32)) + column // 32 * 4
    return counter + column % 32 // 4


@triton.jit
def _mvue24_kernel(
    x_ptr, out_ptr, seed_ptr, rows, columns, x_stride_row, x_stride_column, out_stride_row, out_stride_column,
    ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    row, column = _unit(tl.program_id(0), (columns + 127) // 128, 2, 4, ROWS_FIRST)
    counter, seed = _counters(row, column, columns), tl.load(seed_ptr)
    random = _philox(counter, seed) + _philox(counter + 1, seed)
    for hi in tl.static_range(2):
        for qh in tl.static_range(2):
            for j in tl.static_range(2):
                r, c = (row + 8 * hi).to(tl.int64), (column + 16 * qh + 4 * j).to(tl.int64)
                live = (r < rows) & (c < columns)
                x = _split4(_load_quads(x_ptr + r * x_stride_row + c * x_stride_column, x_stride_column, live))
                a = _abs4(x)
                h, pair = _draw(a, random[4 * j + 2 * hi + qh], 3, 5, 9, 6, 10, 12)
                y0 = tl.where((pair & 1) != 0, _copysign(_max(a[0], h), x[0]), 0.0)
                y1 = tl.where((pair & 2) != 0, _copysign(_max(a[1], h), x[1]), 0.0)
                y2 = tl.where((pair & 4) != 0, _copysign(_max(a[2], h), x[2]), 0.0)
                y3 = tl.where((pair & 8) != 0, _copysign(_max(a[3], h), x[3]), 0.0)
                out = (out_ptr + r * out_stride_row + c * out_stride_column)[:, None]
                out += tl.arange(0, 4)[None, :] * out_stride_column
                tl.store(out, _round(_join4((y0, y1, y2, y3)), out_ptr.dtype.element_ty), mask=live[:, None])


def _mvue24_empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if _takes_words(x, True) else torch.empty_like(x)


@torch.library.custom_op("nano24::mvue24", mutates_args=())
def _mvue24(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    (rows, columns), out = x.shape, _mvue24_empty(x)
    for token_major in (False, True):
        if _takes_words(x, token_major):
            stored = x.t() if token_major else x
            _launch_words(stored, stored, stored, seed, out, out, None, rows, columns, "none", "masked", token_major)
            return out
    arguments = (x, out, seed, rows, columns, *x.stride(), *out.stride())
    grid = triton.cdiv(rows, 32) * triton.cdiv(columns, 128)
    _launch(_mvue24_kernel, grid, *arguments, ROWS_FIRST=x.stride(1) != 1, num_warps=4)
    return out


_mvue24.register_fake(lambda x, seed: _mvue24_empty(x))


def _seed_tensor(seed, device: torch.device) -> torch.Tensor:
    """A seed as int64 0-d on the device; an int is taken modulo 2^64."""
    if torch.is_tensor(seed):
        return seed.to(device, torch.int64)
    return torch.tensor((int(seed) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def mvue24(x: torch.Tensor, seed) -> torch.Tensor:
    """MVUE along the last dimension to masked dense. There are fast paths for bfloat16 if n is a multiple of 8, for
    contiguous matrices with a multiple of 32 rows and transposed ones with a multiple of 64 rows."""
    return _mvue24(x.reshape(-1, x.shape[-1]), _seed_tensor(seed, x.device)).view(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# mvue24_pack, activation_backward_mvue24_pack: MVUE of bfloat16, two elements per word, written as an operand of a 2:4
# GEMM or masked dense. The second one first computes the activation's backward. A thread has one unit, as above.


@triton.jit
def _byte_perm(x, y, selector):
    """Four of the eight bytes of (x, y), x being the low four. The selector's four low nibbles choose them. Nibble b
    gives byte b (0..7), nibble b + 8 gives 0xFF if bit 7 of byte b is set, else 0."""
    if _INTERPRETED:
        out = tl.zeros_like(x)
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (tl.where((nibble & 4) == 0, x, y) >> (8 * (nibble & 3))) & 0xFF
            out |= tl.where(nibble < 8, byte, (byte >> 7) * 0xFF) << (8 * i)
        return out
    asm: tl.constexpr = "prmt.b32 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [x, y, selector], tl.int32, is_pure=True, pack=1)


_RAISE = tl.constexpr("""{
    .reg .b32 magnitude, both;
    cvt.rn.bf16x2.f32 both, $2, $2;
    and.b32 magnitude, $1, 0x7fff7fff;
    max.NaN.bf16x2 magnitude, magnitude, both;
    and.b32 both, $1, 0x80008000;
    or.b32 $0, magnitude, both;
}""")


@triton.jit
def _raise(word, h):
    """sign(x) * max(|x|, h) for both bfloat16 in an int32, with h rounded to bfloat16."""
    if _INTERPRETED:  # non-negative floats compare as integers, with NaN above inf
        bits = _bits16(h)
        low, high = tl.maximum(word & 0x7FFF, bits), tl.maximum(word & 0x7FFF0000, bits << 16)
        return low | high | (word & -2147450880)  # 0x80008000
    return tl.inline_asm_elementwise(_RAISE, "=r,r,f", [word, h], tl.int32, is_pure=True, pack=1)


@triton.jit
def _load_words(ptr, live, EVEN: tl.constexpr):
    """Eight bfloat16, the first one at ptr (N,), as four int32. EVEN: all threads are live."""
    ptr = ptr[:, None] + tl.arange(0, 4)[None, :]
    return _split4(tl.load(ptr) if EVEN else tl.load(ptr, mask=live[:, None], other=0))


@triton.jit
def _store_words(ptr, words, live, EVEN: tl.constexpr):
    """Store a tile (N, width) of int32, the first column at ptr (N,)."""
    tl.store(ptr[:, None] + tl.arange(0, words.shape[1])[None, :], words, mask=None if EVEN else live[:, None])


@triton.jit
def _load_token_major(
    x_ptr, tile, tile_columns, rows, columns, EVEN: tl.constexpr, TILE_GROUPS: tl.constexpr, PANELS: tl.constexpr
):
    """A tile of x^T from x (columns, rows) bfloat16, through shared memory, as int32: words[2*hi + qh][0..3] of each
    unit."""
    t = (tile % tile_columns) * (32 * PANELS) + 2 * tl.arange(0, 16 * PANELS)
    pair = (tile // tile_columns) * (8 * TILE_GROUPS) + tl.arange(0, 8 * TILE_GROUPS)  # neighbours in memory
    ptr = x_ptr + t.to(tl.int64)[:, None] * (rows // 2) + pair[None, :]
    live = (t < columns)[:, None]
    even = tl.load(ptr) if EVEN else tl.load(ptr, mask=live, other=0)
    odd = tl.load(ptr + rows // 2) if EVEN else tl.load(ptr + rows // 2, mask=live, other=0)
    return _transpose_units(even, odd, TILE_GROUPS, PANELS)


@triton.jit
def _transpose_units(even, odd, TILE_GROUPS: tl.constexpr, PANELS: tl.constexpr):
    """As `_load_token_major`, from the words (pair of tokens, pair of rows) of the even and the odd tokens."""
    words = tl.join(_byte_perm(even, odd, 0x5410), _byte_perm(even, odd, 0x7632))  # the pair's first and second row
    # columns are (panel, qh, c, word), rows (group, hi, p/2, p%2); c = 0, 1 are the two units of a panel
    words = tl.permute(tl.reshape(words, (PANELS, 2, 2, 4, TILE_GROUPS, 2, 4, 2)), (4, 6, 7, 0, 2, 3, 5, 1))
    qh0, qh1 = tl.split(tl.reshape(words, (16 * TILE_GROUPS * PANELS, 4, 2, 2)))
    w00, w10 = tl.split(qh0)
    w01, w11 = tl.split(qh1)
    return _split4(w00), _split4(w01), _split4(w10), _split4(w11)


@triton.jit
def _activation_words(z, up, da, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """`_backward` for the two bfloat16 in each int32. Returns rounded words of dZ and of the gradient of up."""
    low, low_up = _backward(_low(z), _low(up), _low(da), ACTIVATION, GATED)
    high, high_up = _backward(_high(z), _high(up), _high(da), ACTIVATION, GATED)
    return _bits16(low) | (_bits16(high) << 16), _bits16(low_up) | (_bits16(high_up) << 16)


@triton.jit
def _magnitudes(w0, w1):
    """|x| in float32 for the four bfloat16 in two int32."""
    if _INTERPRETED:
        return tl.abs(_low(w0)), tl.abs(_high(w0)), tl.abs(_low(w1)), tl.abs(_high(w1))
    # Hide the shift from LLVM: then the next float instructions take |x| at no cost.
    asm: tl.constexpr = "shl.b32 $0, $1, 16;"
    low0 = tl.inline_asm_elementwise(asm, "=f,r", [w0], tl.float32, is_pure=True, pack=1)
    low1 = tl.inline_asm_elementwise(asm, "=f,r", [w1], tl.float32, is_pure=True, pack=1)
    return tl.abs(low0), tl.abs(_high(w0)), tl.abs(low1), tl.abs(_high(w1))


@triton.jit
def _word_sum(w):
    """The sum of the eight bfloat16 in four int32."""
    first, second = (_low(w[0]) + _high(w[0])) + (_low(w[1]) + _high(w[1])), _low(w[2]) + _high(w[2])
    return first + (second + (_low(w[3]) + _high(w[3])))


@triton.jit
def _mvue24_masked(w0, w1, random):
    """The two int32 words of a group after MVUE, with zeros for pruned entries. The constants are byte masks."""
    h, pair = _draw(_magnitudes(w0, w1), random, 0xFFFF, 0xFF00FF, -0xFFFF01, 0xFFFF00, -0xFF0100, -0x10000)
    return _raise(w0, h) & _byte_perm(pair, pair, 0x1100), _raise(w1, h) & _byte_perm(pair, pair, 0x3322)


@triton.jit
def _mvue24_pair(w0, w1, random):
    """The two kept elements of a group after MVUE as an int32, and their nibble at bit 16. Each constant is the nibble
    at bit 16 and a byte selector in the low 16 bits, which are all that `_byte_perm` reads."""
    h, pair = _draw(_magnitudes(w0, w1), random, 0x43210, 0x85410, 0xC7610, 0x95432, 0xD7632, 0xE7654)
    return _raise(_byte_perm(w0, w1, pair), h), pair


@triton.jit
def _mvue24_words(out_ptr, x, random0, random1, live, EVEN: tl.constexpr, PACK: tl.constexpr):
    """Write MVUE of two groups, four words x, to out_ptr, packed or masked. Returns the nibbles at bits 0 and 16."""
    if not PACK:
        w0, w1 = _mvue24_masked(x[0], x[1], random0)
        w2, w3 = _mvue24_masked(x[2], x[3], random1)
        _store_words(out_ptr, _join4((w0, w1, w2, w3)), live, EVEN)
        return w0
    word0, nibble0 = _mvue24_pair(x[0], x[1], random0)
    word1, nibble1 = _mvue24_pair(x[2], x[3], random1)
    _store_words(out_ptr, tl.join(word0, word1), live, EVEN)
    return _byte_perm(nibble0, nibble1, 0x7632)


@triton.jit
def _store_unit_metadata(metadata_ptr, metadata, row, column, rows, columns, ORDER: tl.constexpr):
    """Store a unit's metadata (N,): the nibble of group q + j, row half hi, column half qh at bit 16j + 8qh + 4hi."""
    live = column < columns
    if ORDER == 90:
        word = (row // 64).to(tl.int64) * (2 * columns) + column // 32 * 64 + row % 64 // 16 * 16 + row % 8 * 2
        tl.store(metadata_ptr + word + column // 8 % 2, metadata, mask=live)
    else:  # a 16-bit word is four groups of a row: this unit has one byte of each of four words
        byte = (rows // 128).to(tl.int64) * (column // 64 * 1024) + row // 128 * 1024 + row % 128 // 32 * 128
        byte += column % 64 // 32 * 512 + row % 8 * 16 + row // 16 % 2 * 8 + column // 8 % 2
        byte_ptr = metadata_ptr.to(tl.pointer_type(tl.int8)) + byte
        for hi in tl.static_range(2):
            for qh in tl.static_range(2):
                bits = metadata >> (8 * qh + 4 * hi)
                tl.store(byte_ptr + 4 * qh + 2 * hi, ((bits & 15) | ((bits >> 12) & 0xF0)).to(tl.int8), mask=live)


@triton.jit
def _replace(pair, PART: tl.constexpr, value):
    return pair[:PART] + (value,) + pair[PART + 1 :]  # noqa: RUF005 (Triton knows no unpacking)


@triton.jit
def _mvue24_words_kernel(
    x_ptr, z_ptr, dz_ptr, seed_ptr, out_ptr, metadata_ptr, bias_ptr, rows, columns,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ORDER: tl.constexpr, TOKEN_MAJOR: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, TILE_GROUPS: tl.constexpr, PANELS: tl.constexpr,
):  # fmt: skip
    # Without an activation, x (rows, columns) is pruned. With one, x is dA (rows, columns), and dz is computed and
    # pruned. z and dz are then (rows, columns), or (2 rows, columns) if gated.
    parts: tl.constexpr = 2 if GATED else 1
    tile, tile_columns = tl.program_id(0), (columns + 32 * PANELS - 1) // (32 * PANELS)
    row, column = _unit(tile, tile_columns, TILE_GROUPS, PANELS, False)
    counter, seed = _counters(row, column, columns), tl.load(seed_ptr)
    random = _philox(counter, seed) + _philox(counter + 1, seed)
    if GATED:  # the second half begins at row `rows`, a multiple of 16
        counter = _counters(row + rows, column, columns)
        random = random + _philox(counter, seed) + _philox(counter + 1, seed)
    words_of_row = columns.to(tl.int64) >> 1
    at = row * words_of_row + column // 2
    if TOKEN_MAJOR:
        x = _load_token_major(x_ptr, tile, tile_columns, rows, columns, EVEN, TILE_GROUPS, PANELS)
    metadata = (tl.zeros_like(row), tl.zeros_like(row))
    for hi in tl.static_range(2):
        sums = (tl.zeros(row.shape, tl.float32), tl.zeros(row.shape, tl.float32))
        for qh in tl.static_range(2):
            here = at + (8 * hi * words_of_row + 8 * qh)
            live = column + 16 * qh < columns
            dz = x[2 * hi + qh] if TOKEN_MAJOR else _load_words(x_ptr + here, live, EVEN)
            dz_both = (dz, dz)
            if ACTIVATION != "none":
                z = _load_words(z_ptr + here, live, EVEN)
                up = _load_words(z_ptr + rows * words_of_row + here, live, EVEN) if GATED else z
                w0, v0 = _activation_words(z[0], up[0], dz[0], ACTIVATION, GATED)
                w1, v1 = _activation_words(z[1], up[1], dz[1], ACTIVATION, GATED)
                w2, v2 = _activation_words(z[2], up[2], dz[2], ACTIVATION, GATED)
                w3, v3 = _activation_words(z[3], up[3], dz[3], ACTIVATION, GATED)
                dz_both = ((w0, w1, w2, w3), (v0, v1, v2, v3))
            for part in tl.static_range(parts):
                there = here + part * (rows * words_of_row)
                if ACTIVATION != "none":
                    _store_words(dz_ptr + there, _join4(dz_both[part]), live, EVEN)
                if BIAS:
                    sums = _replace(sums, part, sums[part] + _word_sum(dz_both[part]))
                out = out_ptr + (there >> 1 if ORDER else there)
                random0, random1 = random[8 * part + 2 * hi + qh], random[8 * part + 4 + 2 * hi + qh]
                nibbles = _mvue24_words(out, dz_both[part], random0, random1, live, EVEN, ORDER != 0)
                metadata = _replace(metadata, part, metadata[part] + (nibbles << (8 * qh + 4 * hi)))
        if BIAS:
            for part in tl.static_range(parts):
                total = tl.sum(tl.reshape(sums[part], (8 * TILE_GROUPS, 2 * PANELS)), 1)
                m = tl.arange(0, 8 * TILE_GROUPS)
                bias_row = (tile // tile_columns) * (16 * TILE_GROUPS) + m // 8 * 16 + m % 8 + 8 * hi + part * rows
                tl.store(bias_ptr + bias_row.to(tl.int64) * tile_columns + tile % tile_columns, total)
    if ORDER:
        for part in tl.static_range(parts):
            at, all_rows = row + part * rows, rows * parts
            _store_unit_metadata(metadata_ptr, metadata[part], at, column, all_rows, columns, ORDER)


_TILES = {False: (32, 128), True: (64, 64)}  # token_major: (rows, columns) of a program
_ORDERS = {"masked": 0, "sm80": 80, "sm90": 90}  # how MVUE is written: masked dense, or packed


def _takes_words(x: torch.Tensor, token_major: bool) -> bool:
    """Returns whether `_launch_words` can read x (rows, columns), or with token_major its transpose, in words."""
    words = x.dtype == torch.bfloat16 and x.storage_offset() % 2 == 0 and (x.t() if token_major else x).is_contiguous()
    return words and x.shape[0] % _TILES[token_major][0] == 0 and x.shape[1] % 8 == 0


def _launch_words(x, z, dz, seed, out, metadata, bias, rows, columns, activation, order, token_major) -> None:
    tile_rows, tile_columns = _TILES[token_major]
    words = [t.view(torch.int32) for t in (x, z, dz, out, metadata)]
    arguments = (*words[:3], seed, *words[3:], seed if bias is None else bias, rows, columns)
    forms = {"ACTIVATION": activation, "GATED": activation.endswith("glu"), "ORDER": _ORDERS[order]}
    forms |= {"TOKEN_MAJOR": token_major, "BIAS": bias is not None, "EVEN": columns % tile_columns == 0}
    forms |= {"TILE_GROUPS": tile_rows // 16, "PANELS": tile_columns // 32}
    grid = rows // tile_rows * triton.cdiv(columns, tile_columns)
    _launch(_mvue24_words_kernel, grid, *arguments, **forms, num_warps=4)


def multiples(order: str, token_major: bool = False, halves: int = 1) -> tuple[int, int]:
    """The numbers that must divide the rows (of all `halves`) and the tokens, for MVUE written in this order."""
    return (_TILES[token_major][0] * halves, 8) if order == "masked" else (_row_multiple("mvue24_pack", order), 64)


def _mvue24_outputs(like: torch.Tensor, rows: int, columns: int, order: str, bias: bool, token_major=False, halves=1):
    """Empty tensors for `_launch_words`: out (masked or packed), its metadata part, partial bias gradients. `rows`
    counts the rows of all `halves`."""
    multiple = multiples(order, token_major, halves)
    if like.dtype != torch.bfloat16 or rows % multiple[0] or columns % multiple[1]:
        raise ValueError(
            f"mvue24 ({order}): {like.dtype}, {rows} rows of {columns} tokens, need bfloat16, multiples of {multiple}; "
            "change d_ff or the tokens per micro-batch, or use mvue24"
        )
    out = like.new_empty((rows, columns) if order == "masked" else (rows * columns * 9 // 16,))
    metadata = out if order == "masked" else out[rows * columns // 2 :]
    tiles = triton.cdiv(columns, _TILES[token_major][1])
    return out, metadata, like.new_empty((rows, tiles), dtype=torch.float32) if bias else None


@torch.library.custom_op("nano24::mvue24_pack", mutates_args=())
def _mvue24_pack(
    x: torch.Tensor, seed: torch.Tensor, order: str, token_major: bool, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, columns), x = (x.shape[::-1] if token_major else x.shape), x.contiguous()
    out, metadata, partial = _mvue24_outputs(x, rows, columns, order, bias, token_major)
    _launch_words(x, x, x, seed, out, metadata, partial, rows, columns, "none", order, token_major)
    return out, x.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(1)


@_mvue24_pack.register_fake
def _(x, seed, order, token_major, bias):
    rows, columns = x.shape[::-1] if token_major else x.shape
    out, _, _ = _mvue24_outputs(x, rows, columns, order, False, token_major)
    return out, x.new_empty(rows if bias else 0, dtype=torch.float32)


def mvue24_pack(x: torch.Tensor, seed, order: str, token_major: bool = False, bias: bool = False):
    """MVUE to a packed operand. x is bfloat16, and its rows and tokens are `multiples`. Deterministic."""
    return _mvue24_pack(x, _seed_tensor(seed, x.device), order, token_major, bias)


@torch.library.custom_op("nano24::activation_backward_mvue24_pack", mutates_args=())
def _activation_backward_mvue24_pack(
    z: torch.Tensor, da: torch.Tensor, seed: torch.Tensor, activation: str, order: str, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    halves = 1 + _gated("activation_backward_mvue24_pack", z, activation, da)
    (rows, tokens), dz = z.shape, torch.empty_like(z)
    out, metadata, partial = _mvue24_outputs(z, rows, tokens, order, bias, halves=halves)
    _launch_words(da, z, dz, seed, out, metadata, partial, rows // halves, tokens, activation, order, False)
    return dz, out, z.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(1)


@_activation_backward_mvue24_pack.register_fake
def _(z, da, seed, activation, order, bias):
    halves = 1 + _gated("activation_backward_mvue24_pack", z, activation, da)
    out, _, _ = _mvue24_outputs(z, *z.shape, order, False, halves=halves)
    return torch.empty_like(z), out, z.new_empty(z.shape[0] if bias else 0, dtype=torch.float32)


def activation_backward_mvue24_pack(z, da, seed, activation: str, order: str, bias: bool = False):
    """dz of `activation_backward`, and `mvue24_pack` of this dz, in one pass over memory. z and da are contiguous."""
    return _activation_backward_mvue24_pack(z, da, _seed_tensor(seed, z.device), activation, order, bias)


# ---------------------------------------------------------------------------------------------------------------------
# relu2_pack, relu2_backward_pack: for token-major Z, A = top2(relu(Z)^2) or dZ packed along features, and its MVUE
# along tokens, in one pass. A program's tile is 64 tokens x 64 features. A tensor of words has one int32, two adjacent
# features, for each (pair of tokens, pair of features).


@triton.jit
def _relu_words(word):
    """relu of both bfloat16 in an int32, without -0 and with one NaN, so that the results compare as integers."""
    if _INTERPRETED:
        return (_bits16(_max(_low(word), 0.0)) | (_bits16(_max(_high(word), 0.0)) << 16)) & 0x7FFF7FFF
    asm: tl.constexpr = "max.NaN.bf16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [word, 0], tl.int32, is_pure=True, pack=1)


@triton.jit
def _multiply_words(x, y):
    """The products of both bfloat16 in int32. A product is exact in float32, or rounds to 0, so this rounds once."""
    if _INTERPRETED:
        return _bits16(_low(x) * _low(y)) | (_bits16(_high(x) * _high(y)) << 16)
    asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"  # plus -0, which changes nothing
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [x, y, -2147450880], tl.int32, is_pure=True, pack=1)


@triton.jit
def _majority(x, y, z):
    return (x & y) | (z & (x | y))


@triton.jit
def _minority(x, y, z):
    """~_majority, in one instruction."""
    if _INTERPRETED:
        return ~_majority(x, y, z)
    asm: tl.constexpr = "lop3.b32 $0, $1, $2, $3, 0x17;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [x, y, z], tl.int32, is_pure=True, pack=1)


@triton.jit
def _choose(inner, outer, INNER: tl.constexpr, NEITHER: tl.constexpr, OUTER: tl.constexpr):
    """OUTER where outer has ones, else INNER where inner has ones, else NEITHER, in two instructions."""
    if _INTERPRETED:
        return (outer & OUTER) | (~outer & ((inner & INNER) | (~inner & NEITHER)))
    asm: tl.constexpr = "{ .reg .b32 t; lop3.b32 t, $1, $3, $4, 0xca; lop3.b32 $0, $2, $5, t, 0xca; }"
    operands = [inner, outer, INNER, NEITHER, OUTER]
    return tl.inline_asm_elementwise(asm, "=r,r,r,r,r,r", operands, tl.int32, is_pure=True, pack=1)


@triton.jit
def _top2_flags(x, y):
    """The two largest of x0, x1, y0, y1, words of `_relu_words`, as bits 15 and 31 of two words. Ties keep the lower
    index. An element is kept if it wins two of three comparisons. Bit 15 of a + 0x8000 - b says a >= b, that of
    a + 0x7FFF - b says a > b, and no half carries into the other one."""
    high = x - 2147450880  # + 0x80008000. All but one of the sums have two operands, which run on either integer pipe
    y_swapped, high_swapped = _byte_perm(y, y, 0x1032), _byte_perm(high, high, 0x1032)
    x_y = high - y  # x0 >= y0, x1 >= y1
    x_other_y = high - y_swapped  # x0 >= y1, x1 >= y0
    other_x_y = high_swapped - y  # x1 >= y0, x0 >= y1
    x_x = x - high_swapped  # x0 >= x1, x1 > x0
    y_y = y_swapped - y - 2147450881  # + 0x80007FFF: y1 > y0, y0 >= y1
    return _majority(x_y, x_other_y, x_x), _minority(x_y, other_x_y, y_y)


@triton.jit
def _top2_words(z, da, BACKWARD: tl.constexpr):
    """A, or with BACKWARD dZ, of words (.., 2 n): the pruned words, and (.., n) the kept pairs and their nibbles, each
    of which is the OR of bytes 2 and 3."""
    groups: tl.constexpr = (z.shape[0], z.shape[1] // 2, 2)
    x, y = tl.split(tl.reshape(z, groups))
    x, y = _relu_words(x), _relu_words(y)
    x_flags, y_flags = _top2_flags(x, y)
    if BACKWARD:
        da_x, da_y = tl.split(tl.reshape(da, groups))
        twos = tl.full(x.shape, 0x40004000, tl.int32)
        x, y = _multiply_words(_multiply_words(x, twos), da_x), _multiply_words(_multiply_words(y, twos), da_y)
    else:
        x, y = _multiply_words(x, x), _multiply_words(y, y)
    pruned = tl.join(x & _byte_perm(x_flags, x_flags, 0xBB99), y & _byte_perm(y_flags, y_flags, 0xBB99))
    pruned = tl.reshape(pruned, z.shape)
    # Bytes 0 and 2 say which element is the first one: number 0, or 1, or 2, by the flags of 0 and 1. Bytes 1 and 3 say
    # the second one: number 3, or 2, or 1, by the flags of 3 and 2. The low bytes are a byte selector.
    outer, inner = _byte_perm(x_flags, y_flags, 0xF9F9), _byte_perm(x_flags, y_flags, 0xDBDB)
    choice = _choose(inner, outer, 0x08015432, 0x04023254, 0x0C007610)
    return pruned, _byte_perm(x, y, choice), choice


@triton.jit
def _store_top2_metadata(metadata_ptr, even, odd, tile_row, tile_column, rows, columns, ORDER: tl.constexpr):
    """Store the metadata of a 64x64 tile from the nibbles (pair of rows, group) of `_top2_words`, as `nibble_positions`
    in gemm24/layout.py says. One int32 has words that are neighbours in memory."""
    even, next_even = tl.split(tl.reshape(even, (32, 8, 2)))
    odd, next_odd = tl.split(tl.reshape(odd, (32, 8, 2)))
    even, odd = _byte_perm(even, next_even, 0x7632), _byte_perm(odd, next_odd, 0x7632)
    x = _byte_perm(even, odd, 0x6420) | _byte_perm(even, odd, 0x7531)  # a byte for each of the four nibbles
    n = tl.arange(0, 64)
    row16, p, c32 = n // 16, n // 4 % 4 * 2, n // 2 % 2
    x = tl.reshape(x, (4, 2, 4, 2, 2, 2))  # rows (row16, hi, p/2), groups (c32, qh, q%4/2)
    if ORDER == 90:
        first, second = tl.split(tl.reshape(tl.permute(x, (0, 2, 3, 5, 4, 1)), (64, 2, 2)))  # by hi
        x0, x1 = tl.split(first | (second << 4))  # by qh
        even, odd = _byte_perm(x0, x1, 0x5140), _byte_perm(x0, x1, 0x7362)
        word = tile_row.to(tl.int64) * (2 * columns) + (2 * tile_column + c32) * 64 + row16 * 16 + 2 * p + n % 2
    else:
        x = (x | (x >> 4)) & 0xFF00FF
        first, second = tl.split(tl.reshape(tl.permute(x, (0, 2, 3, 4, 1, 5)), (64, 2, 2)))  # by q%4/2
        x0, x1 = tl.split(first | (second << 8))  # by hi
        even, odd = _byte_perm(x0, x1, 0x5410), _byte_perm(x0, x1, 0x7632)
        word = ((rows // 128).to(tl.int64) * tile_column + tile_row // 2) * 256 + tile_row % 2 * 64 + row16 // 2 * 32
        word += c32 * 128 + 4 * p + row16 % 2 * 2 + n % 2
    tl.store(metadata_ptr + word, even)
    tl.store(metadata_ptr + word + (2 if ORDER == 90 else 4), odd)


@triton.jit
def _relu2_pack_kernel(
    z_ptr, da_ptr, seed_ptr, out_ptr, metadata_ptr, out_t_ptr, metadata_t_ptr, bias_ptr, d_ff, tokens,
    BACKWARD: tl.constexpr, ORDER: tl.constexpr, ORDER_T: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    tile, tile_columns = tl.program_id(0), tokens // 64
    tile_row, tile_column = tile // tile_columns, tile % tile_columns  # rows are features, as in the transpose
    words_of_row, words_of_row_t = d_ff.to(tl.int64) >> 1, tokens.to(tl.int64) >> 1
    first = tile_column * 64 * words_of_row + tile_row * 32  # this tile's first word
    at = tl.arange(0, 32)[:, None] * d_ff + tl.arange(0, 32)[None, :]
    even, odd = tl.load(z_ptr + first + at), tl.load(z_ptr + (first + words_of_row) + at)
    da_even, da_odd = even, odd
    if BACKWARD:
        da_even, da_odd = tl.load(da_ptr + first + at), tl.load(da_ptr + (first + words_of_row) + at)
    even, pair_even, choice_even = _top2_words(even, da_even, BACKWARD)
    odd, pair_odd, choice_odd = _top2_words(odd, da_odd, BACKWARD)
    if ORDER:
        n = tl.arange(0, 256)  # two groups of a token, as a thread loads them
        out_ptr, there = out_ptr + (first >> 1), n // 8 * (d_ff >> 1) + n % 8 * 2
        _store_words(out_ptr + there, tl.reshape(pair_even, (256, 2)), n, True)
        _store_words(out_ptr + (words_of_row >> 1) + there, tl.reshape(pair_odd, (256, 2)), n, True)
        _store_top2_metadata(metadata_ptr, choice_even, choice_odd, tile_column, tile_row, tokens, d_ff, ORDER)
    else:
        tl.store(out_ptr + first + at, even)
        tl.store(out_ptr + (first + words_of_row) + at, odd)
    x = _transpose_units(even, odd, 4, 2)
    row, column = _unit(tile, tile_columns, 4, 2, False)
    counter, seed = _counters(row, column, tokens), tl.load(seed_ptr)
    random = _philox(counter, seed) + _philox(counter + 1, seed)
    at_t, metadata = row * words_of_row_t + column // 2, tl.zeros_like(row)
    for hi in tl.static_range(2):
        for qh in tl.static_range(2):
            there = at_t + (8 * hi * words_of_row_t + 8 * qh)
            out = out_t_ptr + (there >> 1 if ORDER_T else there)
            random0, random1 = random[2 * hi + qh], random[4 + 2 * hi + qh]
            nibbles = _mvue24_words(out, x[2 * hi + qh], random0, random1, row, True, ORDER_T != 0)
            metadata |= nibbles << (8 * qh + 4 * hi)
        if BIAS:
            sums = tl.sum(tl.reshape(_word_sum(x[2 * hi]) + _word_sum(x[2 * hi + 1]), (32, 4)), 1)
            m = tl.arange(0, 32)
            bias_row = tile_row * 64 + m // 8 * 16 + m % 8 + 8 * hi
            tl.store(bias_ptr + bias_row.to(tl.int64) * tile_columns + tile_column, sums)
    if ORDER_T:
        _store_unit_metadata(metadata_t_ptr, metadata, row, column, d_ff, tokens, ORDER_T)


def relu2_multiples(order: str, order_t: str) -> tuple[int, int]:
    """The numbers that must divide the tokens and d_ff, for operands of A and A^T written in these orders."""
    tokens, d_ff = (64 if name == "masked" else _row_multiple("relu2_pack", name) for name in (order, order_t))
    return tokens, d_ff


def _relu2_outputs(z: torch.Tensor, da: torch.Tensor, order: str, order_t: str) -> list[torch.Tensor]:
    """Empty tensors for the operands of A and A^T."""
    (tokens, d_ff), multiples = z.shape, relu2_multiples(order, order_t)
    if {z.dtype, da.dtype} != {torch.bfloat16} or da.shape != z.shape or tokens % multiples[0] or d_ff % multiples[1]:
        raise ValueError(
            f"relu2_pack ({order}, {order_t}): {z.dtype} z {tuple(z.shape)}, {da.dtype} da {tuple(da.shape)}, need "
            f"bfloat16 (tokens, d_ff), multiples of {multiples}; change the tokens per micro-batch or d_ff"
        )
    shapes = ((tokens, d_ff, order), (d_ff, tokens, order_t))
    return [z.new_empty((m, n) if name == "masked" else (m * n * 9 // 16,)) for m, n, name in shapes]


@torch.library.custom_op("nano24::relu2_pack", mutates_args=())
def _relu2_pack(
    z: torch.Tensor, da: torch.Tensor | None, seed: torch.Tensor, order: str, order_t: str, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backward, z, da = da is not None, z.contiguous(), (z if da is None else da).contiguous()
    out, out_t = _relu2_outputs(z, da, order, order_t)
    tokens, d_ff = z.shape
    partial = z.new_empty((d_ff, tokens // 64), dtype=torch.float32) if bias else None
    words = [t.view(torch.int32) for t in (z, da)]
    for t in (out, out_t):  # metadata follow the values
        words += [t.view(torch.int32), t[-1:] if t.dim() == 2 else t[z.numel() // 2 :].view(torch.int32)]
    arguments = (*words[:2], seed, *words[2:], seed if partial is None else partial, d_ff, tokens)
    forms = {"BACKWARD": backward, "ORDER": _ORDERS[order], "ORDER_T": _ORDERS[order_t], "BIAS": bias}
    _launch(_relu2_pack_kernel, z.numel() // 4096, *arguments, **forms, num_warps=4)
    return out, out_t, z.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(1)


@_relu2_pack.register_fake
def _(z, da, seed, order, order_t, bias):
    outputs = _relu2_outputs(z, z if da is None else da, order, order_t)
    return *outputs, z.new_empty(z.shape[1] if bias else 0, dtype=torch.float32)


def relu2_pack(z, seed, order: str, order_t: str):
    """The operands of A and MVUE(A^T). z is bfloat16, and its tokens and d_ff are `relu2_multiples`. Deterministic."""
    return _relu2_pack(z, None, _seed_tensor(seed, z.device), order, order_t, False)[:2]


def relu2_backward_pack(z, da, seed, order: str, order_t: str, bias: bool = False):
    """The operands of dZ and MVUE(dZ^T), and the bias gradient, as `relu2_pack`."""
    return _relu2_pack(z, da, _seed_tensor(seed, z.device), order, order_t, bias)

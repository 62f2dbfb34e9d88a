"""Triton kernels for the hidden layer of a sparse FFN, with their launchers: activations, MVUE, and both fused.

Rules, bytes and instruction counts as in kernels.py, which also has the shared maths. The specification is operators'
`name_ref`, for packed operands spmm's `pack_ref`.
"""

import torch
import triton
import triton.language as tl

from kernels import (
    _INTERPRETED,
    _abs4,
    _bits16,
    _copysign,
    _float32,
    _join4,
    _launch,
    _load4,
    _max,
    _min,
    _round,
    _row_multiple,
    _split4,
)

# ---------------------------------------------------------------------------------------------------------------------
# Activations on feature-major tensors: z (d_ff, tokens), gated (2 d_ff, tokens) with the gate's rows first


@triton.jit
def _exp2(x):
    """2^x, by one hardware instruction; results below 2^-126 become 0."""
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
    """f(z) and f'(z) of the nonlinearity, float32; of a gated one, the gate's.

    GELU: erf's exponential is the normal density, so value and derivative share it. With k = 1/(1 + 0.2316419 |z|),
    Phi(-|z|) = density * poly5(k) to 7.5e-8 (Abramowitz and Stegun 26.2.17): within 3e-7 of z Phi(z), 4e-7 of f'.
    Contraction to FMA is off in every launch, so it is asked for here.
    """
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
def _backward(z, up, da, ACTIVATION: tl.constexpr):
    """dZ of the (gate's) pre-activation and, gated, of the linear half: a = f(z) or f(z) * up."""
    value, slope = _activation(z, ACTIVATION)
    if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
        return da * up * slope, da * value
    return da * slope, da


@triton.jit
def _element(size, features, tokens, BLOCK: tl.constexpr, ROWWISE: tl.constexpr):
    """Offsets (BLOCK,) of this program in a feature-major (features, tokens) tensor, int64, and which are in it."""
    n = tl.arange(0, BLOCK)
    if ROWWISE:  # a block of one token's features
        blocks = tl.cdiv(features, BLOCK)
        feature = tl.program_id(0) % blocks * BLOCK + n
        return feature.to(tl.int64) * tokens + tl.program_id(0) // blocks, feature < features
    n += tl.program_id(0).to(tl.int64) * BLOCK
    return n, n < size


def _element_programs(d_ff: int, tokens: int, rowwise: bool) -> int:
    return tokens * triton.cdiv(d_ff, 1024) if rowwise else triton.cdiv(d_ff * tokens, 1024)


@triton.jit
def _activation_kernel(
    z_ptr, a_ptr, size, features, tokens, ACTIVATION: tl.constexpr, ROWWISE: tl.constexpr, BLOCK: tl.constexpr
):
    n, live = _element(size, features, tokens, BLOCK, ROWWISE)
    a, _ = _activation(_float32(tl.load(z_ptr + n, mask=live, other=0.0)), ACTIVATION)
    if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
        a *= _float32(tl.load(z_ptr + size + n, mask=live, other=0.0))
    tl.store(a_ptr + n, _round(a, a_ptr.dtype.element_ty), mask=live)


@triton.jit
def _activation_backward_kernel(
    z_ptr, da_ptr, dz_ptr, size, features, tokens, ACTIVATION: tl.constexpr, ROWWISE: tl.constexpr, BLOCK: tl.constexpr
):
    n, live = _element(size, features, tokens, BLOCK, ROWWISE)
    z = _float32(tl.load(z_ptr + n, mask=live, other=0.0))
    da = _float32(tl.load(da_ptr + n, mask=live, other=0.0))
    gated: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "swiglu"
    up = _float32(tl.load(z_ptr + size + n, mask=live, other=0.0)) if gated else z
    dz, dup = _backward(z, up, da, ACTIVATION)
    tl.store(dz_ptr + n, _round(dz, dz_ptr.dtype.element_ty), mask=live)
    if gated:
        tl.store(dz_ptr + size + n, _round(dup, dz_ptr.dtype.element_ty), mask=live)


GATED = ("geglu", "swiglu")
ACTIVATIONS = ("gelu", "relu2", *GATED)


def _check_activation(
    function: str, z: torch.Tensor, activation: str, da: torch.Tensor | None = None
) -> tuple[int, int]:
    """(d_ff, tokens) of a pre-activation. Raises ValueError on what the kernels would misread."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{function}: activation {activation!r} is unknown, need one of {', '.join(ACTIVATIONS)}")
    halves = 2 if activation in GATED else 1
    shape = (z.shape[0] // halves, z.shape[1]) if z.dim() == 2 else ()
    contiguous = z.is_contiguous() and (da is None or da.is_contiguous())
    if z.dim() != 2 or z.shape[0] % halves or not contiguous or (da is not None and da.shape != shape):
        raise ValueError(
            f"{function}: z {tuple(z.shape)}{'' if da is None else f', da {tuple(da.shape)}'}; need contiguous "
            f"feature-major z ({'2 d_ff' if halves == 2 else 'd_ff'}, tokens) and da (d_ff, tokens); call .contiguous()"
        )
    return shape


@torch.library.custom_op("nano24::activation", mutates_args=())
def activation(z: torch.Tensor, activation: str, rowwise: bool = False, again: bool = False) -> torch.Tensor:
    """a = f(z), or f(gate) * up of a gated z. Twin: operators.activation_ref.

    z: (d_ff, tokens), gated (2 d_ff, tokens), contiguous. Returns (d_ff, tokens) in z's dtype. Per element in bfloat16:
    2 B of z, gated 4, and 2 B of a, at most 27 I, gated 41.
    rowwise: the baseline of the paper's Table 3, which walks along a token's features, across the memory layout.
    again: changes nothing here. torch.compile merges equal calls, and would keep A rather than compute it again.
    """
    d_ff, tokens = _check_activation("activation", z, activation)
    a = torch.empty((d_ff, tokens), dtype=z.dtype, device=z.device)
    _launch(
        _activation_kernel,
        _element_programs(d_ff, tokens, rowwise),
        z,
        a,
        a.numel(),
        d_ff,
        tokens,
        ACTIVATION=activation,
        ROWWISE=rowwise,
        BLOCK=1024,
        num_warps=4,
    )
    return a


@activation.register_fake
def _(z, activation, rowwise=False, again=False):
    return z.new_empty(_check_activation("activation", z, activation))


@torch.library.custom_op("nano24::activation_backward", mutates_args=())
def activation_backward(z: torch.Tensor, da: torch.Tensor, activation: str, rowwise: bool = False) -> torch.Tensor:
    """dz of `activation`. Twin: operators.activation_backward_ref.

    z as in `activation`, da (d_ff, tokens). Returns dz in z's shape and dtype. Per element of da in bfloat16: 2 B each
    of da, z and dz, at most 41 I; gated 2, 4 and 4 B, at most 68 I.
    """
    d_ff, tokens = _check_activation("activation_backward", z, activation, da)
    dz = torch.empty_like(z)
    _launch(
        _activation_backward_kernel,
        _element_programs(d_ff, tokens, rowwise),
        z,
        da,
        dz,
        da.numel(),
        d_ff,
        tokens,
        ACTIVATION=activation,
        ROWWISE=rowwise,
        BLOCK=1024,
        num_warps=4,
    )
    return dz


@activation_backward.register_fake
def _(z, da, activation, rowwise=False):
    return torch.empty_like(z)


# ---------------------------------------------------------------------------------------------------------------------
# MVUE. A thread owns the rows p and p+8 of a 16-row tile, and of a 32-column panel the groups q, q+1, q+4, q+5, q even:
# eight groups. Those are four 16-byte loads of bfloat16, whole metadata words in sm90's order, and two Philox calls,
# whose four words serve (row half, column half): operators.group_uniforms. A program's tile is 32 rows x 128 columns.


@triton.jit
def _low(word):
    """The bfloat16 in the low half of an int32, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


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
    a,
    word,
    K01: tl.constexpr,
    K02: tl.constexpr,
    K03: tl.constexpr,
    K12: tl.constexpr,
    K13: tl.constexpr,
    K23: tl.constexpr,
):
    """MVUE of magnitudes a (four (N,)) with a random word: h, and the constant of the pair that is kept.

    As operators.mvue24_ref, comparison by comparison, its `past1`, `past0`, `from3` and `from2` in one chain.
    """
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
def _byte_perm(x, y, selector):
    """Four bytes of the eight in (x, y), x the low four, as the selector's four low nibbles say (0..7)."""
    if _INTERPRETED:
        out = tl.zeros_like(x)
        for i in tl.static_range(4):
            byte = (selector >> (4 * i)) & 7
            out |= ((tl.where(byte < 4, x, y) >> (8 * (byte & 3))) & 0xFF) << (8 * i)
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
    """sign(x) * max(|x|, h) of both bfloat16 in an int32, h rounded to bfloat16."""
    if _INTERPRETED:  # non-negative floats order as integers, NaN above inf
        bits = _bits16(h)
        low, high = tl.maximum(word & 0x7FFF, bits), tl.maximum(word & 0x7FFF0000, bits << 16)
        return low | high | (word & -2147450880)  # 0x80008000
    return tl.inline_asm_elementwise(_RAISE, "=r,r,f", [word, h], tl.int32, is_pure=True, pack=1)


@triton.jit
def _unit(tile, tile_columns, TILE_GROUPS: tl.constexpr, PANELS: tl.constexpr, rows_first: tl.constexpr):
    """First row (N,) and first column (N,) of each thread's unit; tiles are 16*TILE_GROUPS x 32*PANELS."""
    n = tl.arange(0, 16 * TILE_GROUPS * PANELS)
    if rows_first:  # neighbouring threads take neighbouring rows, for a matrix that lies transposed
        p, rest = n % 8, n // 8
        group, part = rest % TILE_GROUPS, rest // TILE_GROUPS
    else:
        part, rest = n % (2 * PANELS), n // (2 * PANELS)
        p, group = rest % 8, rest // 8
    row = (tile // tile_columns) * (16 * TILE_GROUPS) + group * 16 + p
    return row, (tile % tile_columns) * (32 * PANELS) + part // 2 * 32 + part % 2 * 8


@triton.jit
def _counters(row, column, columns):
    """Philox counters of the unit's groups (q, q+4) and (q+1, q+5), rows p and p+8: operators.group_uniforms."""
    counter = (row // 16 * 8 + row % 8).to(tl.int64) * (4 * ((columns + 31) // 32)) + column // 32 * 4
    return counter + column % 32 // 4


@triton.jit
def _mvue24_kernel(
    x_ptr,
    out_ptr,
    seed_ptr,
    rows,
    columns,
    x_stride_row,
    x_stride_column,
    out_stride_row,
    out_stride_column,
    ROWS_FIRST: tl.constexpr,
):
    row, column = _unit(tl.program_id(0), (columns + 127) // 128, 2, 4, ROWS_FIRST)
    counter, seed = _counters(row, column, columns), tl.load(seed_ptr)
    random = _philox(counter, seed) + _philox(counter + 1, seed)
    for hi in tl.static_range(2):
        for qh in tl.static_range(2):
            for j in tl.static_range(2):
                r, c = (row + 8 * hi).to(tl.int64), (column + 16 * qh + 4 * j).to(tl.int64)
                live = (r < rows) & (c < columns)
                x = _load4(x_ptr + r * x_stride_row + c * x_stride_column, x_stride_column, live)
                a = _abs4(x)
                h, kept = _draw(a, random[4 * j + 2 * hi + qh], 3, 5, 9, 6, 10, 12)
                y = _join4(
                    (
                        tl.where((kept & 1) != 0, _copysign(_max(a[0], h), x[0]), 0.0),
                        tl.where((kept & 2) != 0, _copysign(_max(a[1], h), x[1]), 0.0),
                        tl.where((kept & 4) != 0, _copysign(_max(a[2], h), x[2]), 0.0),
                        tl.where((kept & 8) != 0, _copysign(_max(a[3], h), x[3]), 0.0),
                    )
                )
                out = (out_ptr + r * out_stride_row + c * out_stride_column)[:, None]
                out += tl.arange(0, 4)[None, :] * out_stride_column
                tl.store(out, _round(y, out_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def _load_words(ptr, live, EVEN: tl.constexpr):
    """Eight bfloat16 from ptr (N,) on, as four int32; EVEN: all threads are live."""
    ptr = ptr[:, None] + tl.arange(0, 4)[None, :]
    if EVEN:
        words = tl.load(ptr)
    else:
        words = tl.load(ptr, mask=live[:, None], other=0)
    return _split4(words)


@triton.jit
def _store_words(ptr, words, live, EVEN: tl.constexpr):
    """A tile (N, width) of int32 from ptr (N,) on."""
    ptr = ptr[:, None] + tl.arange(0, words.shape[1])[None, :]
    if EVEN:
        tl.store(ptr, words)
    else:
        tl.store(ptr, words, mask=live[:, None])


@triton.jit
def _load_token_major(
    x_ptr, tile, tile_columns, rows, columns, EVEN: tl.constexpr, TILE_GROUPS: tl.constexpr, PANELS: tl.constexpr
):
    """A tile of x^T from x (columns, rows) bfloat16, as int32: the units' words[2*hi + qh][0..3], by shared memory."""
    t = (tile % tile_columns) * (32 * PANELS) + 2 * tl.arange(0, 16 * PANELS)
    pair = (tile // tile_columns) * (8 * TILE_GROUPS) + tl.arange(0, 8 * TILE_GROUPS)  # of rows, neighbours in memory
    ptr = x_ptr + t.to(tl.int64)[:, None] * (rows // 2) + pair[None, :]
    if EVEN:
        even, odd = tl.load(ptr), tl.load(ptr + rows // 2)
    else:
        live = (t < columns)[:, None]
        even, odd = tl.load(ptr, mask=live, other=0), tl.load(ptr + rows // 2, mask=live, other=0)
    words = tl.join(_byte_perm(even, odd, 0x5410), _byte_perm(even, odd, 0x7632))  # of the pair's first and second row
    # columns are (panel, qh, c, word), rows (group, hi, p/2, p%2); c = 0, 1 are the two units of a panel
    words = tl.permute(tl.reshape(words, (PANELS, 2, 2, 4, TILE_GROUPS, 2, 4, 2)), (4, 6, 7, 0, 2, 3, 5, 1))
    qh0, qh1 = tl.split(tl.reshape(words, (16 * TILE_GROUPS * PANELS, 4, 2, 2)))
    w00, w10 = tl.split(qh0)
    w01, w11 = tl.split(qh1)
    return _split4(w00), _split4(w01), _split4(w10), _split4(w11)


@triton.jit
def _activation_words(z, up, da, ACTIVATION: tl.constexpr):
    """_backward on two bfloat16 in an int32 each: words of dZ, rounded."""
    low, low_up = _backward(_low(z), _low(up), _low(da), ACTIVATION)
    high, high_up = _backward(_high(z), _high(up), _high(da), ACTIVATION)
    return _bits16(low) | (_bits16(high) << 16), _bits16(low_up) | (_bits16(high_up) << 16)


@triton.jit
def _magnitudes(w0, w1):
    """|x| of the four bfloat16 in two int32, float32."""
    if _INTERPRETED:
        return tl.abs(_low(w0)), tl.abs(_high(w0)), tl.abs(_low(w1)), tl.abs(_high(w1))
    # The shift hidden from LLVM, the sign bit is dropped by the float instructions that follow, at no cost.
    asm: tl.constexpr = "shl.b32 $0, $1, 16;"
    low0 = tl.inline_asm_elementwise(asm, "=f,r", [w0], tl.float32, is_pure=True, pack=1)
    low1 = tl.inline_asm_elementwise(asm, "=f,r", [w1], tl.float32, is_pure=True, pack=1)
    return tl.abs(low0), tl.abs(_high(w0)), tl.abs(low1), tl.abs(_high(w1))


@triton.jit
def _word_sum(w):
    return ((_low(w[0]) + _high(w[0])) + (_low(w[1]) + _high(w[1]))) + (
        (_low(w[2]) + _high(w[2])) + (_low(w[3]) + _high(w[3]))
    )


@triton.jit
def _mvue24_masked(w0, w1, random):
    """The two int32 words of a group after MVUE, zeros where nothing is kept. The constants are byte masks."""
    h, kept = _draw(_magnitudes(w0, w1), random, 0xFFFF, 0xFF00FF, -0xFFFF01, 0xFFFF00, -0xFF0100, -0x10000)
    return _raise(w0, h) & _byte_perm(kept, kept, 0x1100), _raise(w1, h) & _byte_perm(kept, kept, 0x3322)


@triton.jit
def _mvue24_pair(w0, w1, random):
    """The two kept of a group after MVUE as an int32, and their nibble at bit 16. The constants: a byte selector in the
    low 16 bits, which is all that the selection reads, and the nibble."""
    h, kept = _draw(_magnitudes(w0, w1), random, 0x43210, 0x85410, 0xC7610, 0x95432, 0xD7632, 0xE7654)
    return _raise(_byte_perm(w0, w1, kept), h), kept


@triton.jit
def _mvue24_words(out_ptr, x, random0, random1, live, EVEN: tl.constexpr, PACK: tl.constexpr):
    """MVUE of two groups, x four words, written packed or masked at out_ptr. Returns the nibbles, at bits 0 and 16."""
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
def _store_unit_metadata(metadata_ptr, metadata, row, column, rows, columns, live, ORDER: tl.constexpr):
    """metadata (N,): the nibble of group q + j, row half hi, column half qh at bit 16j + 8qh + 4hi."""
    if ORDER == 90:
        word = (row // 64).to(tl.int64) * (2 * columns) + column // 32 * 64 + row % 64 // 16 * 16 + row % 8 * 2
        tl.store(metadata_ptr + word + column // 8 % 2, metadata, mask=live)
    else:  # a 16-bit word is four groups of a row: this unit has half of four words, a byte each
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
    x_ptr,
    z_ptr,
    dz_ptr,
    seed_ptr,
    out_ptr,
    metadata_ptr,
    bias_ptr,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    ORDER: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    PANELS: tl.constexpr,
):
    # x is dA, (rows, columns). With an activation, z and dz are (rows, columns) too, or gated (2 rows, columns), and so
    # is what is pruned and written: dZ. Without one dZ is x.
    gated: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "swiglu"
    parts: tl.constexpr = 2 if gated else 1
    tile_columns = (columns + 32 * PANELS - 1) // (32 * PANELS)
    tile = tl.program_id(0)
    row, column = _unit(tile, tile_columns, TILE_GROUPS, PANELS, False)
    counter, seed = _counters(row, column, columns), tl.load(seed_ptr)
    random = _philox(counter, seed) + _philox(counter + 1, seed)
    if gated:  # the second half's rows begin at `rows`, a multiple of 16
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
                up = _load_words(z_ptr + rows * words_of_row + here, live, EVEN) if gated else z
                w0, v0 = _activation_words(z[0], up[0], dz[0], ACTIVATION)
                w1, v1 = _activation_words(z[1], up[1], dz[1], ACTIVATION)
                w2, v2 = _activation_words(z[2], up[2], dz[2], ACTIVATION)
                w3, v3 = _activation_words(z[3], up[3], dz[3], ACTIVATION)
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
            _store_unit_metadata(
                metadata_ptr, metadata[part], row + part * rows, column, rows * parts, columns, column < columns, ORDER
            )


_TILES = {False: (32, 128), True: (64, 64)}  # rows and columns that a program takes; token-major


def _takes_words(x: torch.Tensor, token_major: bool) -> bool:
    """Whether `_launch_words` can read x (rows, columns), or with token_major its transpose, in words of two."""
    rows, columns = x.shape
    stored = x.t() if token_major else x
    words = x.dtype == torch.bfloat16 and stored.is_contiguous() and x.storage_offset() % 2 == 0
    return words and rows % _TILES[token_major][0] == 0 and columns % 8 == 0


def _mvue24_empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if _takes_words(x, True) else torch.empty_like(x)


@torch.library.custom_op("nano24::mvue24", mutates_args=())
def mvue24(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """MVUE to masked dense. Twin: operators.mvue24_ref, equal to it.

    x: (rows, n), n divisible by 4, float32 or 16-bit, any strides; the fast paths take bfloat16 with 8 dividing n, and
    32 the rows where rows are contiguous, 64 where columns are. seed: int64 0-d. Returns x's shape and dtype; laid out
    as x is, but contiguous from the fast paths. Per group of bfloat16: 8 B read, 8 B written, at most 109 I.
    """
    rows, columns = x.shape
    out = _mvue24_empty(x)
    for token_major in (False, True):
        if _takes_words(x, token_major):
            stored = x.t() if token_major else x
            _launch_words(stored, stored, stored, seed, out, out, None, rows, columns, "none", "masked", token_major)
            return out
    _launch(
        _mvue24_kernel,
        triton.cdiv(rows, 32) * triton.cdiv(columns, 128),
        x,
        out,
        seed,
        rows,
        columns,
        *x.stride(),
        *out.stride(),
        ROWS_FIRST=x.stride(1) != 1,
        num_warps=4,
    )
    return out


@mvue24.register_fake
def _(x, seed):
    return _mvue24_empty(x)


def _launch_words(x, z, dz, seed, out, metadata, bias, rows, columns, activation, order, token_major) -> None:
    tile_rows, tile_columns = _TILES[token_major]
    tiles = rows // tile_rows * triton.cdiv(columns, tile_columns)
    _launch(
        _mvue24_words_kernel,
        tiles,
        *(t.view(torch.int32) for t in (x, z, dz)),
        seed,
        out.view(torch.int32),
        metadata.view(torch.int32),
        seed if bias is None else bias,
        rows,
        columns,
        ACTIVATION=activation,
        ORDER=_ORDERS[order],
        TOKEN_MAJOR=token_major,
        BIAS=bias is not None,
        EVEN=columns % tile_columns == 0,
        TILE_GROUPS=tile_rows // 16,
        PANELS=tile_columns // 32,
        num_warps=4,
    )


_ORDERS = {"masked": 0, "sm80": 80, "sm90": 90}  # how MVUE is written: masked dense, or packed


def multiples(order: str, token_major: bool = False, halves: int = 1) -> tuple[int, int]:
    """What rows and tokens must be multiples of, to be drawn and written in this order; rows of all `halves`."""
    return (_TILES[token_major][0] * halves, 8) if order == "masked" else (_row_multiple("mvue24_pack", order), 64)


def _mvue24_outputs(like: torch.Tensor, rows: int, columns: int, order: str, bias: bool, token_major=False, halves=1):
    """Empty tensors for `_launch_words`: out (masked or packed), its metadata part, partial bias gradients.

    rows: of all that is drawn; of gated activations, both `halves`.
    """
    tile_columns = _TILES[token_major][1]
    multiple = multiples(order, token_major, halves)
    if like.dtype != torch.bfloat16 or rows % multiple[0] or columns % multiple[1]:
        raise ValueError(
            f"mvue24 ({order}): {like.dtype}, {rows} rows of {columns} tokens, need bfloat16, multiples of {multiple}; "
            "change d_ff or the tokens per micro-batch, or use mvue24"
        )
    shape = (rows, columns) if order == "masked" else (rows * columns * 9 // 16,)
    out = like.new_empty(shape)
    metadata = out if order == "masked" else out[rows * columns // 2 :]
    tiles = triton.cdiv(columns, tile_columns)
    return out, metadata, like.new_empty((rows, tiles), dtype=torch.float32) if bias else None


@torch.library.custom_op("nano24::mvue24_pack", mutates_args=())
def mvue24_pack(
    x: torch.Tensor, seed: torch.Tensor, order: str, token_major: bool, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """MVUE straight to a packed operand. Twins: operators.mvue24_kept_ref, then spmm.pack_ref.

    x: bfloat16, contiguous, (rows, tokens), or with token_major (tokens, rows), transposed on the way. order: "sm80"
    (rows a multiple of 128, tokens of 64), "sm90" (64 and 64), or "masked" for the masked dense (rows, tokens). Returns
    it, and with `bias` x's sums over tokens before the pruning, float32 (rows,), else an empty tensor. Deterministic.
    Per group: 8 B of x, 4 B of values, 0.5 B of metadata, at most 85 I; token-major needs a few more, for its exchange
    through shared memory. Raises ValueError for a shape or dtype that does not fit.
    """
    rows, columns = x.shape[::-1] if token_major else x.shape
    x = x.contiguous()
    out, metadata, partial = _mvue24_outputs(x, rows, columns, order, bias, token_major)
    _launch_words(x, x, x, seed, out, metadata, partial, rows, columns, "none", order, token_major)
    return out, x.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(1)


@mvue24_pack.register_fake
def _(x, seed, order, token_major, bias):
    rows, columns = x.shape[::-1] if token_major else x.shape
    out, _, _ = _mvue24_outputs(x, rows, columns, order, False, token_major)
    return out, x.new_empty(rows if bias else 0, dtype=torch.float32)


@torch.library.custom_op("nano24::activation_backward_mvue24_pack", mutates_args=())
def activation_backward_mvue24_pack(
    z: torch.Tensor, da: torch.Tensor, seed: torch.Tensor, activation: str, order: str, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The activation's backward, dZ written, and its MVUE packed, in one pass. Twins: activation_backward_ref, rounded
    to bfloat16, then mvue24_ref and spmm.pack_ref of that.

    z: (d_ff, tokens), gated (2 d_ff, tokens), da (d_ff, tokens), bfloat16, contiguous. order, bias, and what is
    returned after dz: as `mvue24_pack`, of dz's rows. Per group of da: 8 B each of da, z and dz, 4.5 B packed, at most
    195 I; gated 8 B of da, 16 B each of z and dz, 9 B packed, at most 335 I.
    """
    d_ff, tokens = _check_activation("activation_backward_mvue24_pack", z, activation, da)
    dz = torch.empty_like(z)
    out, metadata, partial = _mvue24_outputs(z, z.shape[0], tokens, order, bias, halves=z.shape[0] // d_ff)
    _launch_words(da, z, dz, seed, out, metadata, partial, d_ff, tokens, activation, order, False)
    return dz, out, z.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(1)


@activation_backward_mvue24_pack.register_fake
def _(z, da, seed, activation, order, bias):
    d_ff, tokens = _check_activation("activation_backward_mvue24_pack", z, activation, da)
    out, _, _ = _mvue24_outputs(z, z.shape[0], tokens, order, False, halves=z.shape[0] // d_ff)
    return torch.empty_like(z), out, z.new_empty(z.shape[0] if bias else 0, dtype=torch.float32)

"""The operators of the fused feed-forward layer between its GEMMs: activations and the packing of 2:4 operands.

Each operator is a specification in plain PyTorch and has a Triton kernel of the same name in kernels.py. The hidden
layer is feature-major, (d_ff, tokens), as ffn.py's GEMMs write it (section 5.2). `order` names a layout of layout.py.
"""

import math

import torch
import torch.nn.functional as F

from gemm24.layout import ORDERS, compress24, operand_shape, pack24
from sparse24 import (
    SELF_TESTS,
    awkward_matrix,
    expand_index,
    expand_pairs,
    kernel,
    mask24,
    mvue24,
    mvue24_with_mask,
    pair_index,
    prune,
    same_numbers,
    transposable_index,
)

# ---------------------------------------------------------------------------------------------------------------------
# Activations


def _glu(h: torch.Tensor, nonlinearity) -> torch.Tensor:
    """nonlinearity(gate) * up; gate is the first half of h's features, up the second."""
    gate, up = h.chunk(2, dim=-1)  # (B, T, d_ff) each
    return nonlinearity(gate) * up


ACTIVATIONS = {  # name -> function of token-major h, (B, T, d_ff), gated (B, T, 2 d_ff)
    "gelu": F.gelu,  # exact, by erf; not the tanh approximation
    "relu2": lambda h: F.relu(h).square(),
    "geglu": lambda h: _glu(h, F.gelu),
    "swiglu": lambda h: _glu(h, F.silu),
}
GATED = ("geglu", "swiglu")


def _check_activation(function: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{function}: activation {activation!r} is unknown, need one of {', '.join(ACTIVATIONS)}")


def _gate_and_up(function: str, z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(argument of the nonlinearity, other factor or None if not gated), in the dtype of the arithmetic."""
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


def _takes_activation(z, activation: str, recompute: bool = False) -> bool:
    return activation in ACTIVATIONS and z.dim() == 2 and z.is_contiguous()


@kernel("activation", takes=_takes_activation)
def activation(z: torch.Tensor, activation: str, recompute: bool = False) -> torch.Tensor:
    """A = f(Z), or f(gate) * up where the rows of Z are those of gate and then those of up.

    z: (d_ff, tokens), gated (2 d_ff, tokens). activation: gelu (exact, by erf), relu2, geglu, swiglu. Computed in
    float32 (float64 for float64) and rounded once. recompute: True in the backward; the result is the same, but
    torch.compile does not merge the two calls (see kernels.activation). Returns (d_ff, tokens). Raises ValueError for
    another activation, or for an odd number of rows if gated.
    """
    gate, up = _gate_and_up("activation", z, activation)
    value, _ = _nonlinearity(gate, activation)
    return (value if up is None else value * up).to(z.dtype)


def _takes_activation_backward(z, da, activation: str) -> bool:
    return _takes_activation(z, activation) and da.is_contiguous()


@kernel("activation_backward", takes=_takes_activation_backward)
def activation_backward(z: torch.Tensor, da: torch.Tensor, activation: str) -> torch.Tensor:
    """dZ of `activation`, in z's shape and dtype. da: (d_ff, tokens). Raises ValueError as `activation` does."""
    gate, up = _gate_and_up("activation_backward", z, activation)
    if da.shape != gate.shape:
        raise ValueError(f"activation_backward: da {tuple(da.shape)}, need {tuple(gate.shape)} for z {tuple(z.shape)}")
    value, slope = _nonlinearity(gate, activation)
    da = da.to(gate.dtype)
    dz = da * slope if up is None else torch.cat((da * up * slope, da * value))
    return dz.to(z.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients: drawn by MVUE and packed, in one pass with the activation's backward


def _fits_kernel(x: torch.Tensor, rows: int, tokens: int, order: str, token_major: bool, halves: int = 1) -> bool:
    """Returns whether a kernel can draw x and write it in this order."""
    if x.dtype != torch.bfloat16 or order not in ("masked", *ORDERS):
        return False
    import kernels  # Triton is installed: `kernel` asks only where the kernels are on

    row_multiple, token_multiple = kernels.multiples(order, token_major, halves)
    return rows % row_multiple == 0 and tokens % token_multiple == 0


def _token_sums(x: torch.Tensor, bias: bool) -> torch.Tensor:
    """The bias gradient of dz = x (rows, tokens), in float32 (float64 for float64); empty without bias."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.sum(1, dtype=dtype) if bias else x.new_empty(0, dtype=dtype)


def _takes_pack(x, seed, order: str, token_major: bool = False, bias: bool = False) -> bool:
    return x.dim() == 2 and _fits_kernel(x, *(x.shape[::-1] if token_major else x.shape), order, token_major)


def _mvue24_then_pack(x, seed, order: str, token_major: bool = False, bias: bool = False):
    """`mvue24_pack` in two steps, drawing and packing, each by a kernel if possible."""
    if order == "library":
        masked, sums = mvue24_pack(x, seed, "masked", token_major, bias)
        return compress24(masked.contiguous()), sums
    if order != "masked":
        return mvue24_pack.torch(x, seed, order, token_major, bias)
    x = x.t() if token_major else x
    return mvue24(x, seed), _token_sums(x, bias)


@kernel("mvue24_pack", takes=_takes_pack, otherwise=_mvue24_then_pack)
def mvue24_pack(
    x: torch.Tensor, seed, order: str, token_major: bool = False, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """MVUE of x (rows, tokens), or with token_major of the transpose of x (tokens, rows), packed in `order`.

    Returns (operand, sums). operand: 1-D and 16-bit, or (rows, tokens) for "masked". sums: with `bias` the float32 sums
    (rows,) of the unpruned x over tokens, else empty. Raises ValueError if the shape does not fit the order.
    """
    x = x.t() if token_major else x
    values, mask = mvue24_with_mask(x, seed)
    return (values if order == "masked" else pack24(values, mask, order)), _token_sums(x, bias)


def _takes_backward_pack(z, da, seed, activation: str, order: str, bias: bool = False) -> bool:
    halves = 2 if activation in GATED else 1
    takes = _takes_activation_backward(z, da, activation) and da.dtype == torch.bfloat16
    return takes and _fits_kernel(z, *z.shape, order, False, halves)


def _backward_then_pack(z, da, seed, activation: str, order: str, bias: bool = False):
    """`activation_backward_mvue24_pack` in two steps, each by its kernel if possible."""
    if order == "library":
        dz, masked, sums = activation_backward_mvue24_pack(z, da, seed, activation, "masked", bias)
        return dz, compress24(masked.contiguous()), sums
    _check_activation("activation_backward_mvue24_pack", activation)
    dz = activation_backward(z, da, activation)
    return dz, *mvue24_pack(dz, seed, order, False, bias)


@kernel("activation_backward_mvue24_pack", takes=_takes_backward_pack, otherwise=_backward_then_pack)
def activation_backward_mvue24_pack(
    z: torch.Tensor, da: torch.Tensor, seed, activation: str, order: str, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dz of `activation_backward`, and operand and sums of `mvue24_pack` for that dz)."""
    _check_activation("activation_backward_mvue24_pack", activation)
    dz = activation_backward.torch(z, da, activation)
    return dz, *mvue24_pack.torch(dz, seed, order, False, bias)


# ---------------------------------------------------------------------------------------------------------------------
# 2:4 activations of squared ReLU (methods/act24.py). Here Z, dA (tokens, d_ff) are token-major: the operands of Y and
# dX are 2:4 along features, those of the weight gradients along tokens.


def _top2_operands(x, mask, seed, order: str, order_t: str):
    """The operand of x (tokens, d_ff), pruned by `mask`, in `order`, and that of MVUE(x^T) in `order_t`. Without a seed
    the second one is x^T itself."""
    x = torch.where(mask, x, 0)
    x_t = x.t() if seed is None else mvue24_pack(x, seed, order_t, token_major=True)[0]
    if order == "masked":
        return x, x_t
    return (compress24(x.contiguous()) if order == "library" else pack24(x.contiguous(), mask, order)), x_t


def _takes_relu2_backward(z, da, seed, order: str, order_t: str, bias: bool = False) -> bool:
    known = {order, order_t} <= {"masked", *ORDERS} and seed is not None
    if not known or z.dim() != 2 or {z.dtype, da.dtype} != {torch.bfloat16}:
        return False
    import kernels

    tokens, d_ff = kernels.relu2_multiples(order, order_t)
    return z.shape[0] % tokens == z.shape[1] % d_ff == 0


def _takes_relu2(z, seed, order: str, order_t: str) -> bool:
    return _takes_relu2_backward(z, z, seed, order, order_t)


def _written(*orders: str) -> list[str]:
    """The orders in which a kernel writes operands, of which the library converts some later."""
    return ["masked" if order == "library" else order for order in orders]


def _converted(operands, *orders: str) -> list[torch.Tensor]:
    pairs = zip(operands, orders, strict=True)
    return [compress24(x.contiguous()) if order == "library" else x for x, order in pairs]


def _relu2_then_pack(z, seed, order: str, order_t: str):
    """`relu2_pack` in two steps where the library packs, else the specification, whose parts have kernels."""
    if seed is None or "library" not in (order, order_t):
        return relu2_pack.torch(z, seed, order, order_t)
    return tuple(_converted(relu2_pack(z, seed, *_written(order, order_t)), order, order_t))


def _relu2_backward_then_pack(z, da, seed, order: str, order_t: str, bias: bool = False):
    """`relu2_backward_pack`, as `_relu2_then_pack`."""
    if seed is None or "library" not in (order, order_t):
        return relu2_backward_pack.torch(z, da, seed, order, order_t, bias)
    *operands, sums = relu2_backward_pack(z, da, seed, *_written(order, order_t), bias)
    return *_converted(operands, order, order_t), sums


@kernel("relu2_pack", takes=_takes_relu2, otherwise=_relu2_then_pack)
def relu2_pack(z, seed, order: str, order_t: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A = top2(relu(Z)^2) and MVUE(A^T), packed. top2 keeps the two largest of each four features; ties keep the lower
    index, and NaN counts as the largest.

    z: (tokens, d_ff). seed: of MVUE along tokens, as in `mvue24`; None: do not sample. Returns (operand of A in
    `order`, operand of MVUE(A^T) in `order_t`), for "masked" (tokens, d_ff) and (d_ff, tokens). A is computed in
    float32 (float64 for float64) and rounded once, before MVUE. Raises ValueError if a shape does not fit its order.
    """
    r = F.relu(z.to(torch.promote_types(z.dtype, torch.float32)))
    return _top2_operands(r.square().to(z.dtype), mask24(r), seed, order, order_t)


@kernel("relu2_backward_pack", takes=_takes_relu2_backward, otherwise=_relu2_backward_then_pack)
def relu2_backward_pack(
    z, da, seed, order: str, order_t: str, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dZ = 2 relu(Z) dA where `relu2_pack` keeps A, else 0, and MVUE(dZ^T), packed.

    z, da: (tokens, d_ff). The other arguments, the first two results and the errors are those of `relu2_pack`. The
    third result: with `bias` the float32 sums (d_ff,) of dZ over tokens, else empty.
    """
    r = F.relu(z.to(torch.promote_types(z.dtype, torch.float32)))
    dz, mask = (2 * r * da.to(r.dtype)).to(z.dtype), mask24(r)
    return *_top2_operands(dz, mask, seed, order, order_t), _token_sums(torch.where(mask, dz, 0).t(), bias)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _takes_weight(packed, packed_t, w, index, order: str, metadata: bool = True) -> bool:
    dtypes = {buffer.dtype for buffer in (packed, packed_t) if buffer is not None}
    multiple = {"sm80": 128, "sm90": 64}.get(order)  # must divide the rows of w and of its transpose
    fits = multiple and w.shape[0] % multiple == w.shape[1] % (64 if packed_t is None else multiple) == 0
    return bool(fits) and dtypes == {torch.bfloat16} and w.stride(1) == 1


@torch.no_grad()
@kernel("pack_weight_", takes=_takes_weight)
def pack_weight_(packed, packed_t, w, index, order: str, metadata: bool = True) -> None:
    """Write the operands of w (out, in) and of its transpose, pruned by the mask of `index`, into two buffers.

    packed, packed_t: 16-bit, 9/16 of w's elements. One of them may be None. index: uint8 (out/4, in/4) of
    transposable_index, or (out, in/4) of pair_index with packed_t=None, since a row-wise mask is not 2:4 along the
    outputs. metadata=False: the mask has not changed since the last call, so the kernel writes values only; the
    specification writes both. Raises ValueError if a shape does not fit.
    """
    mask = (expand_pairs if index.shape[0] == w.shape[0] else expand_index)(index)
    for buffer, x, x_mask in ((packed, w, mask), (packed_t, w.t(), mask.t())):
        if buffer is not None:
            buffer.copy_(pack24(x.to(buffer.dtype).contiguous(), x_mask.contiguous(), order))


def pack_matrix(x: torch.Tensor, order: str) -> torch.Tensor:
    """The operand in `order` of a pruned matrix x (rows, columns), two non-zeros in each group of four."""
    if order == "masked":
        return x
    if order == "library":
        return compress24(x.contiguous())
    packed = x.new_empty(x.numel() * 9 // 16)
    pack_weight_(packed, None, x, pair_index(x), order)
    return packed


def empty_operands(w: torch.Tensor, mask: str, orders, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """Memory for `write_operands`: (w_24, packed, packed_t), the pruned weight (out, in), its operand, and the operand
    of its transpose. A buffer that no GEMM reads is None.

    w: (out, in). mask: as Recipe.mask. orders: (order in the forward, order in the input gradient), each may be None.
    """
    order, order_t = orders
    rows, columns = w.shape
    # Dense GEMMs read w_24, and so do all packers except ours for transposable masks.
    needs_w_24 = mask != "transposable" or not {*orders} <= {None, *ORDERS}
    needed = (needs_w_24, order not in (None, "masked"), order_t not in (None, "masked"))
    shapes = ((rows, columns, "masked"), (rows, columns, order), (columns, rows, order_t))
    return tuple(
        w.new_empty(operand_shape(*shape, dtype, w.device), dtype=dtype) if need else None
        for need, shape in zip(needed, shapes, strict=True)
    )


def write_operands(buffers, w, index, beta, mask: str, orders, metadata: bool = True) -> None:
    """Write the operands of a layer's weight w (out, in) into the three buffers of `empty_operands`.

    index, beta: as the layer holds them. metadata=False: the mask has not changed since the last call, so that only the
    values are written.
    """
    (w_24, packed, packed_t), (order, order_t) = buffers, orders
    if w_24 is not None:
        w_24.copy_(prune(w, index, beta, mask))
    our_order = {*orders} & {*ORDERS}  # at most one, since a GPU reads one order
    if our_order and mask == "transposable":
        by_kernel = (packed if order in ORDERS else None, packed_t if order_t in ORDERS else None)
        pack_weight_(*by_kernel, w, index, *our_order, metadata=metadata)
    elif our_order:
        pairs = index if mask == "row" else pair_index(w_24)
        pack_weight_(packed, None, w_24, pairs, *our_order, metadata=metadata or mask != "row")
    if order == "library":
        packed.copy_(compress24(w_24))
    if order_t == "library":
        packed_t.copy_(compress24(w_24.t().contiguous()))


# ---------------------------------------------------------------------------------------------------------------------
# The self-test of the operators above, which sparse24.use_kernels runs


def _compare_relu2(z: torch.Tensor, seed: torch.Tensor) -> dict[str, bool]:
    """z: bfloat16 (128, 64)."""
    import kernels

    z, da, equal = z.clone(), z.roll(1, 0), {}
    z[:2, :8] = z.new_tensor([math.nan, 1, math.inf, math.inf, 2, 2, 2, 0])
    for orders in (("sm90", "masked"), ("sm80", "sm90")):
        forward, backward = (z, seed, *orders), (z, da, seed, *orders, True)
        ours, theirs = kernels.relu2_pack(*forward), relu2_pack.torch(*forward)
        equal[f"relu2_pack {orders}"] = all(map(same_numbers, ours, theirs))
        *ours, sums = kernels.relu2_backward_pack(*backward)
        *theirs, expected = relu2_backward_pack.torch(*backward)
        sums_alike = same_numbers(sums[4:], expected[4:], rtol=1e-5, atol=1e-4)  # not those of NaN and inf
        equal[f"relu2_backward_pack {orders}"] = all(map(same_numbers, ours, theirs)) and sums_alike
    return equal


def _compare_kernels(device: torch.device) -> dict[str, bool]:
    import kernels

    w, seed, equal = awkward_matrix(device), torch.tensor(-(2**40) - 1, dtype=torch.int64, device=device), {}
    z, whole_tiles = w.to(torch.bfloat16), w[:, :128].contiguous()
    index = transposable_index.torch(whole_tiles)
    packs = [w.new_zeros(2, whole_tiles.numel() * 9 // 16, dtype=torch.bfloat16) for _ in range(2)]
    for pack, into in ((kernels.pack_weight_, packs[0]), (pack_weight_.torch, packs[1])):
        pack(*into, whole_tiles, index, "sm90")
    equal["pack_weight_"] = torch.equal(*packs)
    whole_tiles = whole_tiles.to(torch.bfloat16)
    for name, x in (("mvue24_pack", whole_tiles), ("mvue24_pack (token-major)", whole_tiles.t().contiguous())):
        arguments = (x, seed, "sm90", x is not whole_tiles, True)
        ours, theirs = kernels.mvue24_pack(*arguments), mvue24_pack.torch(*arguments)
        equal[name] = torch.equal(ours[0], theirs[0]) and same_numbers(ours[1], theirs[1], rtol=1e-5, atol=1e-4)
    for name in ACTIVATIONS:
        da = whole_tiles[: len(whole_tiles) // 2] if name in GATED else whole_tiles
        dz, packed, _ = kernels.activation_backward_mvue24_pack(whole_tiles, da, seed, name, "sm90", False)
        expected = activation_backward.torch(whole_tiles, da, name)
        packs_alike = torch.equal(packed, mvue24_pack.torch(dz, seed, "sm90")[0])
        equal[f"{name} backward, packed"] = packs_alike and same_numbers(dz, expected, rtol=2**-7, atol=1e-5)
        da = z[: len(z) // 2] if name in GATED else z
        # The two may differ by one rounding to bfloat16; 1e-6 is for the polynomial of GELU.
        equal[name] = same_numbers(kernels.activation(z, name), activation.torch(z, name), rtol=2**-7, atol=1e-6)
        got, expected = kernels.activation_backward(z, da, name), activation_backward.torch(z, da, name)
        equal[f"{name} backward"] = same_numbers(got, expected, rtol=2**-7, atol=1e-5)
    return equal | _compare_relu2(whole_tiles.t().contiguous(), seed)


SELF_TESTS.append(_compare_kernels)

# Former names of two specifications
activation_ref, activation_backward_ref = activation.torch, activation_backward.torch

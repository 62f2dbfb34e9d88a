"""The feed-forward layer of a 2:4 model as one autograd function.

Its hidden layer is feature-major, which takes the paper's section 5.2 further: each GEMM reads and writes its tensors
in the layout that they have, so that no tensor of size d_ff is transposed. X, Y (T, d) are token-major. Z, A (d_ff, T)
are feature-major; gated Z is (2 d_ff, T). C() is a packed 2:4 operand.

    forward    Z  = C(W1) X^T + b1        A = f(Z)        Y = (C(W2) A)^T + b2                              Eq. 2
    backward   A is recomputed from Z, which saves 2 * d_ff * tokens bytes per layer
               dA = C(W2^T) dY^T          dZ = dA f'(Z), drawn and packed in the same pass                  Eq. 3, 7
               dX = (C(W1^T) dZ)^T        dW1 = C(MVUE(dZ)) X        dW2 = C(MVUE(dY^T)) A^T                Eq. 4-6
               db1, db2: sums over tokens of the unpruned dZ, dY

A plan (plan.py) says for each GEMM whether a 2:4 kernel multiplies it, or a dense GEMM on the same pruned matrix. It
holds for one number of tokens. Other inputs, the dense phase and modules without a plan go layer by layer.
`pack_weights` packs the weights once per optimizer step. Under FSDP a weight is freed after use (`prune_again`), so it
is packed in the forward and again in the backward.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gemm24 import operands
from gemm24.layout import operand_shape
from gemm24.matmul import Choice, matmul24
from sparse24 import AUTOCAST, Sparse24Linear, through_soft


class FFNPlan(NamedTuple):
    """How the FFNs of a model multiply, for `tokens` tokens per call, in `dtype`."""

    activation: str
    tokens: int
    dtype: torch.dtype
    mvue: bool
    z: Choice
    y: Choice
    da: Choice
    dx: Choice
    dw1: Choice
    dw2: Choice

    @property
    def padding(self) -> int:
        """Number of zero tokens to append: packed operands need a multiple of 64 columns, MVUE one of four."""
        packed = any(choice.order != "masked" for choice in self[4:])
        return -self.tokens % (64 if packed else 4)

    @property
    def orders(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """(order in the forward, order in the input gradient) of W1 and of W2."""
        return (self.z.order, self.dx.order), (self.y.order, self.da.order)


class _SparseFFN(torch.autograd.Function):
    """The equations at the top of this file. w1 and w2 only receive gradients; their operands w1_24, ... multiply.

    mask: None if the weights are packed already. Else the kind of their masks, and w1_24 and w2_24 hold the index
    matrices. gradient: the recipe's weight_gradient, by which through_soft maps the gradient of beta S(W) to W."""

    @staticmethod
    def forward(
        ctx, x, w1, b1, w2, b2, w1_24, w1_t_24, w2_24, w2_t_24, seed1, seed2, beta1, beta2, plan, mask, gradient
    ):
        if mask:
            for_backward = (w1, w1_24, beta1, w2, w2_24, beta2)
            w1_24 = _operand(w1, w1_24, beta1, mask, (plan.z.order, None), plan.dtype)
            w2_24 = _operand(w2, w2_24, beta2, mask, (plan.y.order, None), plan.dtype)
        else:
            for_backward = (w1_t_24, w2_t_24)
        d_model, ctx.d_ff = w2.shape
        z = matmul24(w1_24, x.t(), b1, w1.shape[0], False, plan.z)
        a = operands.activation(z, plan.activation)
        y = matmul24(w2_24, a, b2, d_model, True, plan.y)
        ctx.plan, ctx.mask, ctx.gradient, ctx.w1_dtype, ctx.w2_dtype = plan, mask, gradient, w1.dtype, w2.dtype
        # Save copies of the seeds: the next micro-step may overwrite them before this one's backward.
        seeds = (seed1.clone(), seed2.clone()) if plan.mvue else (None, None)
        soft_weights = (w1, w2, beta1, beta2) if gradient != "straight" else (None,) * 4
        ctx.save_for_backward(x, z, *seeds, *soft_weights, *for_backward)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, seed1, seed2, w1, w2, beta1, beta2, *weights = ctx.saved_tensors
        plan, dy = ctx.plan, dy.contiguous()
        if ctx.mask:
            w1_t_24 = _pack_in_backward(*weights[:3], ctx.mask, plan.dx.order, plan.dtype, dy)
            w2_t_24 = _pack_in_backward(*weights[3:], ctx.mask, plan.da.order, plan.dtype, dy)
            w1_t_24 = w1_t_24.t() if plan.dx.order == "masked" else w1_t_24
            w2_t_24 = w2_t_24.t() if plan.da.order == "masked" else w2_t_24
        else:
            w1_t_24, w2_t_24 = weights
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        dx = dw1 = db1 = dw2 = db2 = None
        if needs_w2 or needs_b2:
            if plan.mvue and needs_w2:
                dy_24, db2 = operands.mvue24_pack(dy, seed2, plan.dw2.order, True, needs_b2)
            else:
                dy_24, db2 = dy.t(), dy.sum(0) if needs_b2 else None
            if needs_w2:
                a = operands.activation(z, plan.activation, recompute=True)
                dw2 = matmul24(dy_24, a.t(), None, dy.shape[1], False, plan.dw2).to(ctx.w2_dtype)
                dw2 = through_soft(dw2, w2, beta2, ctx.gradient)
            a = dy_24 = None  # frees them before the other half allocates its large tensors
        if needs_x or needs_w1 or needs_b1:
            da = matmul24(w2_t_24, dy.t(), None, ctx.d_ff, False, plan.da)
            if plan.mvue and needs_w1:
                options = (seed1, plan.activation, plan.dw1.order, needs_b1)
                dz, dz_24, db1 = operands.activation_backward_mvue24_pack(z, da, *options)
            else:
                dz = dz_24 = operands.activation_backward(z, da, plan.activation)
                db1 = dz.sum(1) if needs_b1 else None
            da = None
            if needs_w1:
                dw1 = matmul24(dz_24, x, None, z.shape[0], False, plan.dw1).to(ctx.w1_dtype)
                dw1 = through_soft(dw1, w1, beta1, ctx.gradient)
            dz_24 = None
            if needs_x:
                dx = matmul24(w1_t_24, dz, None, x.shape[1], True, plan.dx)
        db1 = db1.to(x.dtype) if needs_b1 else None
        db2 = db2.to(x.dtype) if needs_b2 else None
        return dx, dw1, db1, dw2, db2, *(None,) * 11


def takes_plan(plan: FFNPlan | None, x: torch.Tensor, c_fc: nn.Module, c_proj: nn.Module) -> bool:
    """Returns whether sparse_ffn follows the plan in this call: both layers are in their sparse phase, tokens and dtype
    match. A method that computes the whole layer (`Recipe.ffn`) gets the plan itself."""
    if plan is None or not getattr(c_fc, "sparse", False) or not getattr(c_proj, "sparse", False):
        return False
    if c_fc.recipe.ffn:
        return False
    return x.numel() == plan.tokens * x.shape[-1] and compute_dtype(x) == plan.dtype


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes under the current autocast."""
    enabled = x.device.type in AUTOCAST and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if enabled and x.dtype != torch.float64 else x.dtype


def sparse_ffn(x: torch.Tensor, c_fc: Sparse24Linear, c_proj: Sparse24Linear, plan: FFNPlan) -> torch.Tensor:
    """c_proj(activation(c_fc(x))) by the plan. x: (..., d) with plan.tokens tokens; returns (..., d) in plan.dtype.

    Raises RuntimeError if weights or masks changed since `pack_weights`. Code compiled by torch.compile cannot check.
    """
    mask = c_fc.recipe.mask if c_fc.prune_again else None
    compiling, weights = torch.compiler.is_compiling(), []
    for layer, orders in zip((c_fc, c_proj), plan.orders, strict=True):
        if mask:
            weights += [layer.index, None]
            continue
        if not compiling and getattr(layer, "packed_from", None) != _source(layer, orders, plan.dtype):
            raise RuntimeError("sparse_ffn: weights or masks changed since they were packed; call pack_weights(model)")
        weights.append(layer.w_24 if orders[0] == "masked" else layer.packed)
        weights.append(layer.w_24.t() if orders[1] == "masked" else layer.packed_t)
    shape = x.shape
    x = x.reshape(-1, shape[-1]).to(plan.dtype)
    x = F.pad(x, (0, 0, 0, plan.padding)) if plan.padding else x
    b1, b2 = (None if layer.bias is None else layer.bias.to(plan.dtype) for layer in (c_fc, c_proj))
    state = (c_fc.forward_seed(), c_proj.forward_seed(), c_fc.scale, c_proj.scale)
    constants = (plan, mask, c_fc.recipe.weight_gradient)
    y = _SparseFFN.apply(x, c_fc.weight, b1, c_proj.weight, b2, *weights, *state, *constants)
    return (y[: plan.tokens] if plan.padding else y).view(shape)  # a needless slice makes the backward copy dY


# ---------------------------------------------------------------------------------------------------------------------
# The weights' operands. They are buffers of the layers, written in place so that compiled code and CUDA graphs see them


_BUFFERS = ("w_24", "packed", "packed_t")  # as operands.empty_operands returns them


def _source(layer: Sparse24Linear, orders: tuple[str, str], dtype: torch.dtype) -> tuple:
    """Identifies (the memory, the mask, the weight) of a layer's operands, to find stale ones. Each in-place change of
    the weight or the mask changes it."""
    w, index = layer.weight, layer.index
    versions = (0 if t.is_inference() else t._version for t in (index, w))  # inference tensors have no version
    return (orders, dtype, w.device, w.dtype, id(w)), *zip((id(index), id(w)), versions, strict=True)


def planned_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that can follow a plan: with `plan`, `activation`, and 2:4 layers `c_fc` and `c_proj`."""
    modules = [m for m in model.modules() if hasattr(m, "plan") and hasattr(m, "activation")]
    linears = ("c_fc", "c_proj")
    return [m for m in modules if all(isinstance(getattr(m, name, None), Sparse24Linear) for name in linears)]


@torch.no_grad()
def pack_weights(model: nn.Module) -> None:
    """Write the operands of all planned FFNs from their weights and masks: once per optimizer step, after the refresh
    of the masks. In the dense phase and without a plan, free them. Recipes with 2:4 activations have none. Does not
    synchronise."""
    for ffn in planned_modules(model):
        plan, orders = ffn.plan, (None, None)
        packs = not (ffn.c_fc.prune_again or ffn.c_fc.recipe.activations24)
        if plan is not None and ffn.c_fc.sparse and ffn.c_proj.sparse and packs:
            orders = plan.orders
        for layer, order in zip((ffn.c_fc, ffn.c_proj), orders, strict=True):
            _pack_layer(layer, order, plan and plan.dtype)


def _pack_layer(layer: Sparse24Linear, orders: tuple[str, str] | None, dtype: torch.dtype | None) -> None:
    """Write the layer's buffers that GEMMs in these orders read. Without orders, free them."""
    layer.added.update((*_BUFFERS, "packed_from"))  # densify removes them
    if orders is None:
        for name in _BUFFERS:
            layer._buffers.pop(name, None)
        layer.packed_from = None
        return
    mask, source = layer.recipe.mask, _source(layer, orders, dtype)
    before = getattr(layer, "packed_from", None) or (None, None, None)
    if before[0] != source[0]:
        for name, buffer in zip(_BUFFERS, operands.empty_operands(layer.weight, mask, orders, dtype), strict=True):
            layer.register_buffer(name, buffer, persistent=False)
    buffers = [layer._buffers[name] for name in _BUFFERS]
    same_mask = before[:2] == source[:2]
    operands.write_operands(buffers, layer.weight, layer.index, layer.scale, mask, orders, metadata=not same_mask)
    layer.packed_from = source


def _operand(w, index, beta, mask: str, orders: tuple[str | None, str | None], dtype: torch.dtype) -> torch.Tensor:
    """One operand in new memory, for weights that are packed in each pass. orders: (order, None) for the forward,
    (None, order) for the input gradient. Order "masked" gives the pruned weight (out, in) for both."""
    w_24, packed, packed_t = buffers = operands.empty_operands(w, mask, orders, dtype)
    operands.write_operands(buffers, w.detach(), index, beta, mask, orders)
    return w_24 if "masked" in orders else packed if orders[1] is None else packed_t


@torch.library.custom_op("nano24::pack_in_backward", mutates_args=())
def _pack_in_backward(
    w: torch.Tensor,
    index: torch.Tensor,
    beta: torch.Tensor | None,
    mask: str,
    order: str,
    dtype: torch.dtype,
    dy: torch.Tensor,
) -> torch.Tensor:
    """The input gradient's operand, packed in the backward. It is opaque to torch.compile, which would otherwise pack
    it in the forward and keep it. `dy` is unused; it only makes the op run in the backward."""
    return _operand(w, index, beta, mask, (None, order), dtype)


@_pack_in_backward.register_fake
def _(w, index, beta, mask, order, dtype, dy):
    shape = w.shape if order == "masked" else w.shape[::-1]
    return w.new_empty(operand_shape(*shape, order, dtype, w.device), dtype=dtype)

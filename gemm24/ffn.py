"""The feed-forward layer of a 2:4 model as one autograd function, its hidden layer feature-major (the paper's section
5.2, taken further): the six GEMMs read and write each tensor as it lies, so that nothing of size d_ff is ever
transposed. X, Y (T, d) token-major; Z, A (d_ff, T) feature-major, gated Z (2 d_ff, T); C() a 2:4 operand.

    forward    Z  = C(W1) X^T + b1        A = f(Z)        Y = (C(W2) A)^T + b2                              Eq. 2
    backward   A is recomputed from Z: keeping it would take 2 bytes of d_ff * tokens a layer
               dA = C(W2^T) dY^T          dZ = dA f'(Z), drawn and packed in the same pass                  Eq. 3, 7
               dX = (C(W1^T) dZ)^T        dW1 = C(MVUE(dZ)) X        dW2 = C(MVUE(dY^T)) A^T                Eq. 4-6
               db1, db2: sums over tokens of the unpruned dZ, dY

How each GEMM is multiplied is the plan's: a 2:4 kernel, or a dense one on the same pruned matrix (matmul.py). The
weights' operands are made once per optimizer step by `pack_weights`, not per micro-step; but of weights that FSDP frees
in between (`prune_again`), where they multiply, in the forward and again in the backward. A plan is for one number of
tokens; other inputs, the dense phase and modules without a plan take the layers one by one, as nn.Linear would.
"""

import copy
import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gemm24 import operands
from gemm24.choose import Report, choose, enqueue_us, reason, time_interleaved, wins
from gemm24.matmul import ORDERS, Choice, Gemm, matmul24
from sparse24 import AUTOCAST, Sparse24Linear, expand_index, through_soft, transposable_index

GEMMS = ("z", "y", "da", "dx", "dw1", "dw2")


class FFNPlan(NamedTuple):
    """How the FFNs of a model multiply: for `tokens` tokens per call, in `dtype`."""

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
        """Tokens of zeros that are added: packed operands come in 64 columns, groups of MVUE in four."""
        packed = any(choice.order != "masked" for choice in self[4:])
        return -self.tokens % (64 if packed else 4)


def ffn_gemms(
    d_model: int, d_ff: int, tokens: int, activation: str, bias: bool, mvue: bool, transposable: bool = True
) -> dict[str, Gemm]:
    """The GEMMs of an FFN that may be sparse, by name: the forward's z and y; with transposable masks da and dx; with
    MVUE dw1 and dw2."""
    hidden, t = d_ff * (2 if activation in operands.GATED else 1), tokens + -tokens % 64
    gemms = [
        Gemm("z", hidden, t, d_model, True, False, bias),
        Gemm("y", d_model, t, d_ff, False, True, bias),
        Gemm("da", d_ff, t, d_model, True, False, False),
        Gemm("dx", d_model, t, hidden, False, True, False),
        Gemm("dw1", hidden, d_model, t, False, False, False, fresh=True),
        Gemm("dw2", d_model, d_ff, t, True, False, False, fresh=True),
    ]
    sparse = {"z", "y"} | ({"da", "dx"} if transposable else set()) | ({"dw1", "dw2"} if mvue else set())
    return {gemm.name: gemm for gemm in gemms if gemm.name in sparse}


def plan_ffn(
    config,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    spmm: str = "auto",
    mvue: bool = True,
    graph: bool = False,
    cache: Path | None = None,
    known: Sequence[dict] = (),
    transposable: bool = True,
) -> tuple[FFNPlan | None, Report]:
    """Choose how the FFNs of a model multiply. config: a GPTConfig (n_embd, d_ff, activation, bias). graph, cache,
    known: as choose.choose's. transposable: whether the masks are; else the pruned weights are 2:4 in the forward
    alone, and da and dx multiply them as dense matrices.

    Returns (None, report) where the layers had better be taken one by one: with spmm="dense", and with "auto" where no
    2:4 GEMM wins. Raises ValueError for a mode that is unknown, or asked for and impossible.
    """
    gemms = ffn_gemms(config.n_embd, config.d_ff, tokens, config.activation, config.bias, mvue, transposable)
    options = {"dtype": dtype, "graph": graph, "cache": cache, "known": known}
    report = choose(gemms, device, spmm, **options, samples=kernel_samples, packer=operands.pack_matrix)
    report.choices = {name: _packable(gemms[name], choice) for name, choice in report.choices.items()}
    if spmm == "dense" or (spmm == "auto" and all(choice.backend == "masked" for choice in report.choices.values())):
        return None, report
    choices = [report.choices.get(name, Choice()) for name in GEMMS]
    return FFNPlan(config.activation, tokens, dtype, mvue, *choices), report


def time_ways(mlp: nn.Module, plan: FFNPlan, compile_mode: str | None, micro_steps: int = 1) -> dict:
    """The time of an FFN, forward and backward, taking turns: "dense"; "layers", the 2:4 layers one by one; "plan".

    Each GEMM was timed alone; this is the sum, with all that lies between, and for the plan its share of one packing
    per `micro_steps` calls. mlp: one of the model's, which is copied. compile_mode: torch.compile's, or None for none.
    Returns {"us": {way: [median, smallest, largest]}, "host_us": {way: what the host takes to enqueue it}, "taken": the
    way that sparse steps should go}: the plan, unless it is not faster than the layers by more than the noise.
    """
    if mlp not in _planned(mlp):
        raise ValueError("time_ways: this layer has no 2:4 linears c_fc and c_proj; give one that has")
    device, calls = mlp.c_fc.weight.device, {}
    x, dy = (torch.randn(plan.tokens, mlp.c_fc.in_features, device=device, dtype=plan.dtype) for _ in range(2))
    for way in ("dense", "layers", "plan"):
        ours = copy.deepcopy(mlp).train()
        ours.c_fc.sparse = ours.c_proj.sparse = way != "dense"
        set_plan(ours, plan if way == "plan" else None)
        net = torch.compile(ours, mode=compile_mode) if compile_mode else ours
        calls[way] = forward_backward(net, ours, x.requires_grad_(), dy, plan.dtype)
    # Time the GPU alone, by CUDA graphs, because in training the host runs ahead of it. What reduce-overhead compiles
    # replays graphs already.
    graph = device.type == "cuda" and compile_mode in (None, "default")
    timed = [*calls.values(), functools.partial(pack_weights, ours)]
    *samples, packing = _times(timed, graph, device)
    host_us = {way: enqueue_us(call, device) for way, call in calls.items()}
    times = dict(zip(calls, samples, strict=True))
    times["plan"] = [us + statistics.median(packing) / micro_steps for us in times["plan"]]
    taken = "plan" if wins(times["plan"], times["layers"]) else "layers"
    del calls, ours, net  # three layers and their code are no part of the run
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    us = {way: [statistics.median(samples), min(samples), max(samples)] for way, samples in times.items()}
    return {"us": us, "host_us": host_us, "taken": taken}


def _times(calls: list[Callable], graph: bool, device: torch.device) -> list[list[float]]:
    """Microseconds of each call, from CUDA graphs if asked and if they can be captured."""
    try:
        return time_interleaved(calls, 9, graph, device)
    except RuntimeError as error:
        if not graph:
            raise
        print(f"a layer cannot be captured in a CUDA graph ({reason(error)}): the host's time counts in the choice")
        return time_interleaved(calls, 9, False, device)


def forward_backward(net, module: nn.Module, x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> Callable:
    """One forward and backward of `net`, which is `module` or its compiled form, under autocast; to be timed."""

    def call() -> None:
        with torch.autocast(x.device.type, dtype):
            y = net(x)
        y.backward(dy)
        module.zero_grad(set_to_none=True)
        x.grad = None

    return call


def _packable(gemm: Gemm, choice: Choice) -> Choice:
    """The choice, or the dense GEMM where an emulated operand does not fit its order (others were tried out)."""
    rows, columns = ORDERS.get(choice.order, (1, 1))
    fits = gemm.m % rows == gemm.k % columns == gemm.n % 8 == 0
    if not gemm.fresh:  # a weight is packed together with its transpose
        fits = fits and gemm.k % rows == gemm.m % columns == 0
    return choice if fits or choice.backend == "masked" else Choice()


def kernel_samples(order: str, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pruned matrices and their operands as each of our packers writes them: of a weight, its transpose, a gradient.

    Multiples of 128 alone: whether an odd shape is packed alike is decided for each GEMM at its own shape."""
    pairs = []
    for seed, shape in enumerate([(256, 512), (512, 256), (384, 128)]):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=generator)
        w = torch.where(w.abs() < 0.01, 0.01, w).to(device)  # libraries keep what is `!= 0`: no kept entry may be 0
        index = transposable_index(w)
        blobs = [torch.empty(w.numel() * 9 // 16, dtype=torch.bfloat16, device=device) for _ in range(2)]
        operands.pack_weight_(*blobs, w, index, order)
        w_24 = torch.where(expand_index(index), w, 0).to(torch.bfloat16)
        w_24_t = w_24.t().contiguous()
        pairs += [(w_24, blobs[0]), (w_24_t, blobs[1]), (w_24, operands.pack_matrix(w_24, order))]
        pairs += [(w_24, operands.mvue24_pack(w_24_t, 0, order, token_major=True)[0])]
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# The function


class _SparseFFN(torch.autograd.Function):
    """See the top of this file. w1, w2 receive gradients only; their operands multiply. gradient: a
    recipe's weight_gradient, which takes that of beta S(W) to W."""

    @staticmethod
    def forward(
        ctx, x, w1, b1, w2, b2, w1_24, w1_t_24, w2_24, w2_t_24, seed1, seed2, beta1, beta2, plan, mask, gradient
    ):
        # mask: of weights that are packed here and now the kind of their masks; then index and beta come as operands
        made = (w1, w1_24, w1_t_24, w2, w2_24, w2_t_24) if mask else None
        if mask:
            w1_24 = _operand(*made[:3], mask, (plan.z.order, None), plan.dtype)
            w2_24 = _operand(*made[3:], mask, (plan.y.order, None), plan.dtype)
            w1_t_24 = w2_t_24 = None
        d_model, d_ff = w2.shape
        z = matmul24(w1_24, x.t(), b1, w1.shape[0], False, plan.z)
        a = operands.activation(z, plan.activation)
        y = matmul24(w2_24, a, b2, d_model, True, plan.y)
        ctx.plan, ctx.mask, ctx.d_ff, ctx.w1_dtype, ctx.w2_dtype = plan, mask, d_ff, w1.dtype, w2.dtype
        # copied: the next micro-step may fill them already
        seeds = (seed1.clone(), seed2.clone()) if plan.mvue else (None, None)
        through = (w1, w2, beta1, beta2) if gradient != "straight" else (None,) * 4
        ctx.gradient = gradient
        ctx.save_for_backward(x, z, *seeds, *through, *(made or (w1_t_24, w2_t_24)))
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
            a = dy_24 = None  # freed before the large tensors of the other half are made
        if needs_x or needs_w1 or needs_b1:
            da = matmul24(w2_t_24, dy.t(), None, ctx.d_ff, False, plan.da)
            if plan.mvue and needs_w1:
                how = (seed1, plan.activation, plan.dw1.order, needs_b1)
                dz, dz_24, db1 = operands.activation_backward_mvue24_pack(z, da, *how)
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
    """Whether this call goes by the plan: both layers in their sparse phase, as many tokens, computed in its dtype."""
    if plan is None or not getattr(c_fc, "sparse", False) or not getattr(c_proj, "sparse", False):
        return False
    return x.numel() == plan.tokens * x.shape[-1] and _dtype(x) == plan.dtype


def _dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes here."""
    on = x.device.type in AUTOCAST and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on and x.dtype != torch.float64 else x.dtype


def sparse_ffn(x: torch.Tensor, c_fc: Sparse24Linear, c_proj: Sparse24Linear, plan: FFNPlan) -> torch.Tensor:
    """c_proj(activation(c_fc(x))) by the plan. x: (..., d) with plan.tokens tokens; returns (..., d) in plan.dtype.

    Needs `pack_weights` since the weights or masks last changed: RuntimeError otherwise, except inside torch.compile.
    """
    orders = (plan.z.order, plan.dx.order), (plan.y.order, plan.da.order)
    mask = c_fc.recipe.mask if c_fc.prune_again else None
    for layer, order in zip((c_fc, c_proj), orders, strict=True):
        known = mask or torch.compiler.is_compiling()
        if not known and getattr(layer, "packed_from", None) != _source(layer, order, plan.dtype):
            raise RuntimeError("sparse_ffn: weights or masks changed since they were packed; call pack_weights(model)")
    shape = x.shape
    x = x.reshape(-1, shape[-1]).to(plan.dtype)
    x = F.pad(x, (0, 0, 0, plan.padding)) if plan.padding else x
    b1, b2 = (None if layer.bias is None else layer.bias.to(plan.dtype) for layer in (c_fc, c_proj))
    if mask:
        weights = (t for layer in (c_fc, c_proj) for t in (layer.index, layer.scale))
    else:
        weights = (*_operands(c_fc, *orders[0]), *_operands(c_proj, *orders[1]))
    state = (c_fc.seed, c_proj.seed, c_fc.scale, c_proj.scale)
    how = (plan, mask, c_fc.recipe.weight_gradient)
    y = _SparseFFN.apply(x, c_fc.weight, b1, c_proj.weight, b2, *weights, *state, *how)
    return (y[: plan.tokens] if plan.padding else y).view(shape)  # a slice would cost the backward a copy of dY


# ---------------------------------------------------------------------------------------------------------------------
# The weights' operands: buffers of the layers, written in place, so that compiled code and CUDA graphs stay valid


_BUFFERS = ("w_24", "packed", "packed_t")  # those of operands.empty_operands


def _operands(layer: Sparse24Linear, order: str, order_t: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands of the forward and of the input's gradient."""
    return layer.w_24 if order == "masked" else layer.packed, layer.w_24.t() if order_t == "masked" else layer.packed_t


def _source(layer: Sparse24Linear, orders: tuple[str, str], dtype: torch.dtype) -> tuple:
    """(the kind of memory, the mask, the weight) that the operands are made from. It changes with every in-place change
    of the weight or the mask."""
    w, index = layer.weight, layer.index
    versions = (0 if t.is_inference() else t._version for t in (index, w))  # inference never writes
    return (orders, dtype, w.device, w.dtype, id(w)), *zip((id(index), id(w)), versions, strict=True)


def set_plan(model: nn.Module, plan: FFNPlan | None) -> None:
    """Give every FFN of the model the plan, and pack their weights; None takes it back, and frees what was packed.

    Raises ValueError where the plan is for another activation, draws MVUE where the layers' recipe does not, or is for
    masks that are 2:4 where theirs are not; and for a recipe that one function cannot compute (`Recipe.fused`).
    """
    for ffn in _planned(model):
        mvue = (ffn.c_fc.recipe.mvue, ffn.c_proj.recipe.mvue)
        if plan is not None and (ffn.activation, *mvue) != (plan.activation, plan.mvue, plan.mvue):
            raise ValueError(
                f"set_plan: the plan is for {plan.activation} and mvue={plan.mvue}, need this model's {ffn.activation} "
                f"and mvue={mvue[0]}; make it with plan_ffn(model.config, ..., mvue=recipe.mvue)"
            )
        recipe = ffn.c_fc.recipe
        if plan is not None and not recipe.fused:
            raise ValueError(f"set_plan: recipe {recipe.name!r} with these fields goes layer by layer; use no plan")
        if plan is not None and recipe.mask != "transposable" and {plan.da.order, plan.dx.order} != {"masked"}:
            raise ValueError(
                f"set_plan: the plan has 2:4 input gradients, which mask={recipe.mask!r} does not; make it with "
                "plan_ffn(..., transposable=False)"
            )
    for ffn in _planned(model):
        ffn.plan = plan
    pack_weights(model)


def _planned(model: nn.Module) -> list[nn.Module]:
    """The modules that can follow a plan: those with `plan`, `activation`, and 2:4 layers `c_fc` and `c_proj`."""
    modules = (m for m in model.modules() if hasattr(m, "plan") and hasattr(m, "activation"))
    return [
        m for m in modules if all(isinstance(getattr(m, name, None), Sparse24Linear) for name in ("c_fc", "c_proj"))
    ]


@torch.no_grad()
def pack_weights(model: nn.Module) -> None:
    """Make the operands of all planned FFNs from their weights and masks: once per optimizer step, after the masks'
    refresh. In the dense phase, and without a plan, free them. No synchronisation."""
    for ffn in _planned(model):
        plan, orders = ffn.plan, (None, None)
        if plan is not None and ffn.c_fc.sparse and ffn.c_proj.sparse and not ffn.c_fc.prune_again:
            orders = (plan.z.order, plan.dx.order), (plan.y.order, plan.da.order)
        for layer, order in zip((ffn.c_fc, ffn.c_proj), orders, strict=True):
            _pack_layer(layer, order, plan and plan.dtype)


def _pack_layer(layer: Sparse24Linear, orders: tuple[str, str] | None, dtype: torch.dtype | None) -> None:
    """Fill the layer's buffers that GEMMs in these orders read; without orders free them."""
    if orders is None:
        for name in _BUFFERS:
            layer._buffers.pop(name, None)
        layer.packed_from = None
        return
    mask, source = layer.recipe.mask, _source(layer, orders, dtype)
    before = layer.packed_from if getattr(layer, "packed_from", None) else (None, None, None)
    if before[0] != source[0]:
        for name, buffer in zip(_BUFFERS, operands.empty_operands(layer.weight, mask, orders, dtype), strict=True):
            layer.register_buffer(name, buffer, persistent=False)
    buffers = [layer._buffers[name] for name in _BUFFERS]
    same_mask = before[:2] == source[:2]
    operands.write_operands(buffers, layer.weight, layer.index, layer.scale, mask, orders, metadata=not same_mask)
    layer.packed_from = source


def _operand(w, index, beta, mask: str, orders: tuple[str | None, str | None], dtype: torch.dtype) -> torch.Tensor:
    """One operand in new memory, for weights that are packed where they multiply: orders (order, None) asks for the
    forward's, (None, order) for the input gradient's. "masked" is the pruned weight (out, in) in both cases."""
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
    """The input gradient's operand, packed in the backward. Opaque to torch.compile, which would otherwise pack it in
    the forward and keep it. `dy` is unused: it only makes the op run in the backward."""
    return _operand(w, index, beta, mask, (None, order), dtype)


@_pack_in_backward.register_fake
def _(w, index, beta, mask, order, dtype, dy):
    shape = w.shape if order == "masked" else w.shape[::-1]
    return w.new_empty(operands.operand_shape(*shape, order, dtype, w.device), dtype=dtype)

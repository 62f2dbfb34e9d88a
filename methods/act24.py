"""2:4 activations of squared ReLU instead of 2:4 weights (Haziza et al., 2025), with unbiased weight gradients.

The hidden activations of squared ReLU are mostly zero by themselves. So four of the six products of a feed-forward
layer can be 2:4 while the weights stay dense. There are no masks, no masked decay and no dense end. X, Y (T, d),
Z, A (T, d_ff), W1 (d_ff, d), W2 (d, d_ff). C() is a packed 2:4 operand. top2 keeps the two largest of each four
features; ties keep the lower index. TOK is exact MVUE along tokens, which changes nothing in a group with at most two
non-zeros.

    forward    Z  = X W1^T  dense     A  = top2(relu(Z)^2)                        Y     = C(A) W2^T
    backward   dA = dY W2   dense     dZ = 2 relu(Z) dA where top2 kept A         dX    = C(dZ) W1
                                      dW1 = C(TOK(dZ^T)) X                        dW2^T = C(TOK(A^T)) dY

This is the gradient of the model with top2, plus unbiased noise. dZ is 2:4 along features, because A is.

Training starts dense. In the first micro-batch of every INTERVAL-th step each layer counts its groups of four features
with more than two non-zeros. A layer joins, that is, it computes the equations above, once their share is at most JOIN.
It leaves if the share rises above LEAVE. The first layer of a model usually has too many and stays dense.

methods/act24_soft.py adds soft thresholds of the weights (S-STE), which make all six products 2:4.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gemm24 import operands
from gemm24.ffn import FFNPlan, compute_dtype
from gemm24.matmul import Choice, matmul24
from sparse24 import (
    Recipe,
    Sparse24Linear,
    by_rows,
    expand_pairs,
    mask24,
    pair_index,
    prune,
    prune_again_op,
    sste_scale,
    through_soft,
    whole,
)

INTERVAL = 100  # steps between two counts of a layer's zeros
JOIN, LEAVE = 0.05, 0.10  # shares of groups with more than two non-zeros
# How the operands of dW1 and dW2 are made 2:4 along tokens. "mvue": unbiased. "top2": the two largest of each four
# tokens after a fixed permutation of the tokens, which has no noise but a bias.
TOKENS = "mvue"


def count(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts for A = relu(Z)^2, z (..., d_ff). Returns int64 (3,): zeros, groups of four features with more than two
    non-zeros, groups; and float32 (2,): the energy (sum of squares) of A, and the part of it that top2 drops."""
    z = z.detach().float()
    groups, a = (z > 0).unflatten(-1, (-1, 4)), F.relu(z).square()
    crowded, numbers = groups.sum(-1) > 2, groups.new_tensor(groups.shape[:-1].numel(), dtype=torch.int64)
    counts = torch.stack([(~groups).sum(), crowded.sum(), numbers])
    return counts, torch.stack([a.square().sum(), torch.where(mask24(a), 0, a).square().sum()])


class Act24Linear(Sparse24Linear):
    """The second linear of a feed-forward layer, which also decides when the layer joins. The extra state in the
    state_dict holds `.joined`, and `.counts` and `.energy`, the results of `count` in the last counted step. Rank 0
    counts; the other ranks get its counts before they are used."""

    def make_state(self) -> None:
        super().make_state()
        # Not persistent, because persistent buffers must be equal on all ranks at every save.
        for name, size, dtype in (("counts", 3, torch.int64), ("energy", 2, torch.float32)):
            zeros = torch.zeros(size, dtype=dtype, device=self.weight.device)
            self.register_buffer(name, zeros, persistent=False)
        self.joined = self.counting = False
        if self.recipe.mask == "soft":
            self.beta.copy_(self.new_scale())

    def new_index(self) -> torch.Tensor:
        """For soft weights the pairs of W2^T, whose groups of four lie along out: uint8 (out/4, in)."""
        if self.recipe.mask != "soft":
            return super().new_index()
        return whole(by_rows(lambda w: pair_index(w.t()).t().contiguous(), self.weight.detach(), 4))

    @property
    def mask(self) -> torch.Tensor:
        return expand_pairs(self.index.t()).t() if self.recipe.mask == "soft" else super().mask

    def new_scale(self) -> torch.Tensor:
        """beta of S(W2^T)."""
        return sste_scale(whole(self.weight.detach()).t())

    def refresh(self, begin: bool = False) -> None:
        super().refresh(begin)
        if begin and self.recipe.mask == "soft":
            self.beta.copy_(self.new_scale())

    def pruned_weight(self) -> torch.Tensor:
        """W2 as it multiplies: for soft weights beta S(W2^T)^T, 2:4 along out."""
        return prune(self.weight.detach().t(), self.index, self.scale, self.recipe.mask).t()

    def begin_micro_batch(self, iter_num: int, micro_batch: int) -> None:
        super().begin_micro_batch(iter_num, micro_batch)
        self.counting = micro_batch == 0 and iter_num % INTERVAL == 0  # on rank 0 alone

    @torch.no_grad()
    def record(self, z: torch.Tensor) -> None:
        for buffer, value in zip((self.counts, self.energy), count(z), strict=True):
            buffer.copy_(value)

    def begin_step(self, seed: int, iter_num: int, number: int, begin: bool = False) -> None:
        """Decide whether the layer computes 2:4, in the step after a count. Waits for the GPU."""
        if not begin and (iter_num - 1) % INTERVAL:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for buffer in (self.counts, self.energy):
                torch.distributed.broadcast(buffer, 0)
        self.joined = self.crowded() <= (LEAVE if self.joined else JOIN)

    def measured(self, iter_num: int) -> dict[str, float] | None:
        """Columns of metrics.jsonl for step iter_num, or None if the step did not count. Waits for the GPU."""
        if iter_num % INTERVAL:
            return None
        zeros, _, groups = self.counts.tolist()
        energy, dropped = self.energy.tolist()
        shares = {"zeros": zeros / (4 * groups), "over_two": self.crowded()} if groups else {}
        return shares | {"energy_dropped": dropped / energy if energy else 0.0, "joined": float(self.joined)}

    def crowded(self) -> float:
        """The share of groups with more than two non-zeros in the last counted step; 1.0 before the first."""
        _, over, groups = self.counts.tolist()
        return over / groups if groups else 1.0

    def get_extra_state(self) -> torch.Tensor:
        measured = [0] * 5 if self.counts.is_meta else [*self.counts.tolist(), *self.energy.tolist()]
        numbers = [self.sparse, self.joined, *measured]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")  # exact for counts below 2^53

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.sparse, self.joined = (bool(number) for number in state[:2])
        self.counts = state[2:5].long().to(self.weight.device)
        self.energy = state[5:].float().to(self.weight.device)


class _Act24(torch.autograd.Function):
    """The equations at the top of this file. x: (T, d), T a multiple of 4, zeros from row `tokens` on. w1, w2: the
    weights before autocast. Returns Y and Z, of which Y alone has a gradient."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, seed1, seed2, beta1, beta2, plan, mode, tokens):
        w1_24, w2_t_24 = weight_operands(w1, w2, beta1, beta2, mode, x.dtype)
        z = matmul24(operands.pack_matrix(w1_24, plan.z.order), x.t(), b1, w1.shape[0], True, plan.z)
        z[tokens:] = 0  # not the bias: nothing of the padding may enter the sums over tokens
        a_24, a_t_24 = operands.relu2_pack(z, seed2, plan.y.order, plan.dw2.order)
        a_t_24 = top2_of_tokens(a_t_24) if mode.tokens == "top2" else a_t_24
        y = matmul24(a_24, w2_t_24, None, len(x), False, plan.y)
        again = (w1, w2, beta1, beta2) if mode.soft or mode.prune_again else (None,) * 4
        ctx.save_for_backward(x, z, a_t_24, seed1, *((None, None) if mode.prune_again else (w1_24, w2_t_24)), *again)
        ctx.plan, ctx.mode, ctx.dtypes = plan, mode, (w1.dtype, w2.dtype)
        ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, z, a_t_24, seed1, w1_24, w2_t_24, w1, w2, beta1, beta2 = ctx.saved_tensors
        plan, mode, dy, d_ff = ctx.plan, ctx.mode, dy.contiguous(), z.shape[1]
        if mode.prune_again:
            w1_24, w2_t_24 = weight_operands(w1, w2, beta1, beta2, mode, x.dtype, dy)
        needs_x, needs_w1, needs_b1, needs_w2 = ctx.needs_input_grad[:4]
        dx = dw1 = db1 = dw2 = None
        if needs_w2:
            dw2 = matmul24(a_t_24, dy, None, d_ff, True, plan.dw2).to(ctx.dtypes[1])
            dw2 = through_soft(dw2.t(), w2.t(), beta2, "true").t() if mode.soft else dw2
        if needs_x or needs_w1 or needs_b1:
            da = matmul24(operands.pack_matrix(w2_t_24, plan.da.order), dy.t(), None, d_ff, True, plan.da)
            options = (seed1, plan.dx.order, plan.dw1.order, needs_b1)
            dz_24, dz_t_24, db1 = operands.relu2_backward_pack(z, da, *options)
            dz_t_24 = top2_of_tokens(dz_t_24) if mode.tokens == "top2" else dz_t_24
            if needs_w1:
                dw1 = matmul24(dz_t_24, x, None, d_ff, False, plan.dw1).to(ctx.dtypes[0])
                dw1 = through_soft(dw1, w1, beta1, "true") if mode.soft else dw1
            dx = matmul24(dz_24, w1_24, None, len(x), False, plan.dx) if needs_x else None
            db1 = db1.to(x.dtype) if needs_b1 else None
        return dx, dw1, db1, dw2, *(None,) * 7


class _Mode(NamedTuple):
    soft: bool  # weights are soft-thresholded
    tokens: str  # "mvue", "top2", or "dense": the operands of dW are not sampled
    prune_again: bool  # threshold the weights a second time in the backward, instead of saving them (FSDP)


def weight_operands(
    w1, w2, beta1, beta2, mode: _Mode, dtype: torch.dtype, dy=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W1, W2^T) as they multiply, (d_ff, d) each. Soft: beta S(W), 2:4 along d. dy: given in the backward alone."""
    weights = (w1.detach(), w2.detach().t())
    if mode.soft:
        do = prune if dy is None else functools.partial(prune_again_op, dz=dy)
        weights = [do(w.contiguous(), None, beta, "soft") for w, beta in zip(weights, (beta1, beta2), strict=True)]
    return weights[0].to(dtype), weights[1].to(dtype)


def top2_of_tokens(x_t: torch.Tensor) -> torch.Tensor:
    """Keep the two largest magnitudes of each four tokens that lie a quarter of the batch apart. x_t: (d_ff, T)."""
    groups = x_t.unflatten(1, (4, -1)).transpose(1, 2)  # (d_ff, T/4, 4)
    return torch.where(mask24(groups), groups, 0).transpose(1, 2).flatten(1)


def act24_ffn(x: torch.Tensor, c_fc: Sparse24Linear, c_proj: Act24Linear, plan: FFNPlan | None) -> torch.Tensor:
    """c_proj(relu(c_fc(x))^2), by the equations if the layer has joined, else dense. x: (..., d)."""
    counting = torch.is_grad_enabled() and c_proj.training and c_proj.counting
    if not (c_proj.joined and c_proj.sparse):  # in this order compiled code does not depend on both
        z = nn.Linear.forward(c_fc, x)
        if counting:
            c_proj.record(z)
        return nn.Linear.forward(c_proj, F.relu(z).square())
    shape, dtype, recipe = x.shape, compute_dtype(x), c_fc.recipe
    x = x.reshape(-1, shape[-1]).to(dtype)
    if plan is None or (len(x), dtype, torch.is_grad_enabled()) != (plan.tokens, plan.dtype, True):
        plan = FFNPlan("relu2", len(x), dtype, recipe.mvue, *(Choice() for _ in range(6)))
    tokens = len(x)
    x = F.pad(x, (0, 0, 0, plan.padding)) if plan.padding else x
    mode = _Mode(recipe.mask == "soft", TOKENS if recipe.mvue else "dense", c_fc.prune_again)
    if mode.tokens != "mvue":
        plan = plan._replace(dw1=Choice(), dw2=Choice())
    seeds = (c_fc.forward_seed(), c_proj.forward_seed()) if mode.tokens == "mvue" else (None, None)
    seeds = [None if seed is None else seed.clone() for seed in seeds]  # the next micro-step may overwrite them
    b1, b2 = (None if layer.bias is None else layer.bias.to(dtype) for layer in (c_fc, c_proj))
    if torch.is_grad_enabled():
        weights = (c_fc.weight, b1, c_proj.weight, *seeds, c_fc.scale, c_proj.scale)
        y, z = _Act24.apply(x, *weights, plan, mode, tokens)
    else:
        w1_24, w2_t_24 = weight_operands(c_fc.weight, c_proj.weight, c_fc.scale, c_proj.scale, mode, dtype)
        z = F.linear(x, w1_24, b1)
        y = operands.relu2_pack(z, None, "masked", "masked")[0] @ w2_t_24
    if counting:
        c_proj.record(z[:tokens])
    y = y[:tokens] if plan.padding else y
    return (y if b2 is None else y + b2).view(shape)


def check(settings) -> None:
    """Raises ValueError if a run with these settings cannot use 2:4 activations."""
    if settings.flip_reference:
        given = f"flip_reference={settings.flip_reference} is for methods with masks of weights"
        raise ValueError(f"{given}; remove it for sparse={settings.sparse!r}")
    if not round(settings.max_iters * settings.dense_pretrain):
        steps = f"dense_pretrain={settings.dense_pretrain} of max_iters={settings.max_iters} is 0 steps"
        raise ValueError(f"sparse={settings.sparse!r} needs a dense start: {steps}; use --dense_pretrain=0.05")


RECIPE = Recipe(
    "act24",
    mask="none",
    mvue=True,
    dense_pretrain=0.05,
    layer={"c_fc": Sparse24Linear, "c_proj": Act24Linear},
    ffn=act24_ffn,
    activations24=True,
    activation="relu2",
    check=check,
)

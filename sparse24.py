"""2:4 sparse training of transformers: the layer and the optimizer. The papers' operators are in operators.py, their
recipes, and what the other methods do otherwise, in recipes.py.

Fully sparse training, FST (Hu et al., ICML 2024). W is (out, in), X (BT, in), Z = X W^T, M a transposable 2:4 mask:
    forward    Z  = X (W*M)^T                         2:4 along in                                     Eq. 2
    backward   dX = dZ (W*M)                          2:4 along out: M^T is a 2:4 mask too             Eq. 3, 5
               dW = MVUE(dZ^T) X                      2:4 along tokens; reaches every entry of W       Eq. 4, 6, 7
               db = sum over tokens of the unpruned dZ
    step       g <- clipped dW + decay * ~M * W       masked decay, before Adam's moments              Eq. 10
    refresh    M <- argmax over the 90 patterns of |W*M|_1 in each 4x4 block, every `mask_interval`    Algorithm 1
Here the GEMMs are dense ones on pruned operands; ffn.py multiplies 2:4 ones. A mask is kept as its index matrix, one
uint8 per 4x4 block.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from operators import (  # noqa: F401 (all of the operators are names of this module too)
    AUTOCAST,
    PAIRS,
    PATTERNS,
    PATTERNS_HASH,
    _table,
    activation,
    activation_backward,
    activation_backward_ref,
    activation_ref,
    adamw_,
    adamw_fits,
    adamw_scalars,
    expand_index,
    expand_pairs,
    flip_count,
    flip_count_ref,
    flip_rate,
    group_uniforms,
    kernel_status,
    mask24,
    mask24_ref,
    masked_decay_,
    masked_decay_ref_,
    mvue24,
    mvue24_kept_ref,
    mvue24_ref,
    mvue24_sequential,
    pair_index,
    philox4x32,
    simulate_fp8,
    soft_threshold24,
    soft_threshold24_backward,
    soft_threshold24_ref,
    sste_scale,
    sste_scale_ref,
    transposable_index,
    transposable_index_ref,
    transposable_mask,
    transposable_mask_2approx,
)
from recipes import PERMUTATIONS, RECIPES, Recipe, get_recipe  # noqa: F401
from shards import by_rows, fits, is_dtensor, local, rows_of, total, whole

_PERMUTE = 4  # tag that keeps the stream of seed_words for row orders apart from MVUE's and train.py's

# ---------------------------------------------------------------------------------------------------------------------
# The layer


def mask_index(w: torch.Tensor, kind: str) -> torch.Tensor:
    """The mask that w (out, in) would have now, as its index matrix: "transposable" or "row"; sharded where w is, but
    whole where w's pieces cut through 4x4 blocks, as those of a dense run may."""
    if kind != "transposable":
        return by_rows(pair_index, w, 1)
    if is_dtensor(w) and not fits(w.shape[0], w.device_mesh.size(-1)):
        return transposable_index(whole(w))
    return by_rows(transposable_index, w, 4)


class _How(NamedTuple):
    """What _MaskedLinear needs to know of a recipe, and of the layer."""

    mask: str
    mvue: bool
    weight_gradient: str
    fp8: bool
    again: bool  # prune the weights again in the backward, instead of keeping the pruned ones


def prune(w: torch.Tensor, index: torch.Tensor, beta: torch.Tensor | None, mask: str) -> torch.Tensor:
    """W*M, or beta S(W): 2:4 along the rows."""
    if mask == "soft":
        return soft_threshold24(w) * beta
    return torch.where((expand_index if mask == "transposable" else expand_pairs)(index), w, 0)


def through_soft(dw: torch.Tensor, w: torch.Tensor, beta: torch.Tensor | None, kind: str) -> torch.Tensor:
    """From the gradient of beta S(W) to that of W: as it is ("straight"), or by beta and the Jacobian of S ("true")."""
    return soft_threshold24_backward(dw, w) * beta if kind == "true" else dw


@torch.library.custom_op("nano24::prune_again", mutates_args=())
def _prune_again(
    w: torch.Tensor, index: torch.Tensor, beta: torch.Tensor | None, mask: str, dz: torch.Tensor
) -> torch.Tensor:
    """prune, in the backward. A compiler that saw it would do it once and keep the result; dz, which is not used, keeps
    it from being done early."""
    return prune(w, index, beta, mask)


@_prune_again.register_fake
def _(w, index, beta, mask, dz):
    return torch.empty_like(w)


class _MaskedLinear(torch.autograd.Function):
    """Z = X w_24^T + b; dX = dZ (w_24 * back); dW = MVUE(dZ^T) X to W as `how` says; db from the unpruned dZ (Eq. 2-7).
    master: what is pruned, the weight itself or, of soft weights, before it was cast. back: a bool mask, or None."""

    @staticmethod
    def operands(master, index, back, beta, dtype, how, dz=None):
        """What multiplies in the forward, and what in the input's gradient. dz: in the backward."""
        if dz is None:
            w_24 = prune(master, index, beta, how.mask).to(dtype)
        else:
            w_24 = _prune_again(master, index, beta, how.mask, dz).to(dtype)
        w_back = w_24 if back is None else torch.where(back, w_24, 0)
        if how.fp8:
            w_24 = simulate_fp8(w_24, torch.float8_e4m3fn)
            w_back = w_24 if back is None else simulate_fp8(w_back, torch.float8_e4m3fn)
        return w_24, w_back

    @staticmethod
    def forward(ctx, x, weight, master, index, back, bias, seed, beta, how):
        # weight only receives the gradient. The seed is copied, so that the next micro-step may fill it already.
        w_24, w_back = _MaskedLinear.operands(master, index, back, beta, weight.dtype, how)
        x = simulate_fp8(x, torch.float8_e4m3fn) if how.fp8 else x
        again = (index, back) if how.again else (None, None)
        master = master if how.again or how.weight_gradient == "true" else None
        seed = seed.clone() if how.mvue else None
        ctx.save_for_backward(x, None if how.again else w_back, master, *again, seed, beta)
        ctx.how, ctx.dtype = how, weight.dtype
        return F.linear(x, w_24, bias)

    @staticmethod
    @once_differentiable  # a second derivative would silently lack the weight's share
    def backward(ctx, dz):
        x, w_back, master, index, back, seed, beta = ctx.saved_tensors
        how, dx, dw, db = ctx.how, None, None, None
        if ctx.needs_input_grad[0]:
            if how.again:
                _, w_back = _MaskedLinear.operands(master, index, back, beta, ctx.dtype, how, dz)
            dx = (simulate_fp8(dz, torch.float8_e5m2) if how.fp8 else dz) @ w_back
        dz = dz.reshape(-1, dz.shape[-1])  # (BT, out)
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])  # (BT, in)
            dz_t = dz.t()
            if how.mvue:
                padding = -dz.shape[0] % 4
                if padding:  # zero tokens are never drawn over others and contribute nothing: exact
                    x, dz_t = F.pad(x, (0, 0, 0, padding)), F.pad(dz_t, (0, padding))
                dz_t = mvue24(dz_t, seed)
            dw = (simulate_fp8(dz_t, torch.float8_e5m2) if how.fp8 else dz_t) @ x
            dw = through_soft(dw, master, beta, how.weight_gradient)
        if ctx.needs_input_grad[5]:
            db = dz.sum(0)
        return dx, dw, None, None, None, db, None, None, None


class Sparse24Linear(nn.Linear):
    """An nn.Linear whose weight is 2:4 sparse in the forward pass, and in the backward pass where its recipe says so.

    `.weight` (out, in) stays dense: it is what the optimizer updates. State, all of it in state_dict:
    `.index`   the mask, set by `refresh_masks`; `.mask` is its bool (out, in) form. Transposable: uint8 (out/4, in/4)
               of transposable_index. Row-wise: uint8 (out, in/4) of pair_index; of soft weights, what S keeps.
    `.index_t`, `.permutation`  of an own backward mask: uint8 (in, out/4), pairs of rows, and the order that the rows
               are taken in, int64 (out,); `.backward_mask` is what dX multiplies, bool (out, in).
    `.beta`    0-d, scale of soft weights.
    `.sparse`  bool; False = the dense phase, where this is a plain nn.Linear. Saved as extra state.
    `.seed`    int64 0-d tensor that MVUE reads, set by `seed_draws`; not saved, since it is a function of the step.
    `.prune_again`  not saved: prune in the backward once more instead of keeping the pruned weight; for FSDP, which
               frees the weight in between.
    A fresh or reset layer's mask matches its weights; call `refresh_masks` after setting or loading weights alone.
    Between steps of FSDP2 `.weight` is sharded, and `pruned_weight` and `densify(prune=True)` cannot be used; all else
    here is whole on every rank.
    x: (..., in), any number of tokens. Under autocast all GEMMs run in its dtype, as nn.Linear's do.
    Raises ValueError when in or out is not divisible by 4.
    """

    def __init__(self, in_features, out_features, bias=True, recipe="fst", device=None, dtype=None):
        if in_features % 4 or out_features % 4:
            raise ValueError(
                f"Sparse24Linear: {in_features} in, {out_features} out, need both divisible by 4; "
                "change the width or leave this layer dense"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = get_recipe(recipe)
        self.sparse = True
        self.prune_again = False
        self._make_state()

    def _make_state(self) -> None:
        """Buffers that match the weight."""
        device = self.weight.device
        self.register_buffer("index", self._index())
        if self.recipe.backward_mask == "own":
            self.register_buffer("permutation", torch.arange(self.out_features, device=device))
            self.register_buffer("index_t", self._index_t())
        if self.recipe.mask == "soft":
            self.register_buffer("beta", sste_scale(self.weight.detach()))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def _index(self) -> torch.Tensor:
        return whole(mask_index(self.weight, self.recipe.virtual_mask))

    def _index_t(self) -> torch.Tensor:
        """Bi-Mask: of the masked weights, the two largest of four rows, taken in the permutation's order."""
        masked = torch.where(self.mask, whole(self.weight.detach()), 0)
        return pair_index(masked.t()[:, self.permutation])

    @torch.no_grad()
    def refresh(self, begin: bool = False) -> None:
        """Recompute the masks from the weights, and with `begin`, at the start of a sparse phase, beta too. In place;
        waits for no GPU. Of sharded weights masks are gathered; for an own backward mask, or beta, the weights are."""
        self.index.copy_(self._index())
        if self.recipe.backward_mask == "own":
            self.index_t.copy_(self._index_t())
        if begin and self.recipe.mask == "soft":
            self.beta.copy_(sste_scale(whole(self.weight.detach())))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "index" in self._buffers:  # not yet there when nn.Linear's __init__ comes by
            self._make_state()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | Recipe) -> "Sparse24Linear":
        """A sparse layer with the very Parameters of `linear`, so an optimizer goes on; draws no random numbers."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, recipe, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._make_state()
        return layer.train(linear.training)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in ("flat", "pairs"):
            _table(name, self.index.device)  # copied now, so that no forward waits for it,
        if type(self.index) is torch.Tensor:  # and tested now, since a compiled forward cannot; nor can a fake tensor
            kernel_status(self.index.device)
        return self

    @property
    def mask(self) -> torch.Tensor:
        """The current mask, bool (out, in), True = kept."""
        return (expand_index if self.recipe.mask == "transposable" else expand_pairs)(self.index)

    def mask_rows(self) -> torch.Tensor:
        """The rows of `.mask` that belong to this rank's rows of the weight."""
        return (expand_index if self.recipe.mask == "transposable" else expand_pairs)(rows_of(self.weight, self.index))

    @property
    def backward_mask(self) -> torch.Tensor:
        """What is kept of W in dX, bool (out, in)."""
        if self.recipe.backward_mask == "same":
            return self.mask
        return self.mask & expand_pairs(self.index_t).t()[torch.argsort(self.permutation)]

    def pruned_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What multiplies X in the sparse phase: (out, in), 2:4 along in; W masked as the current mask says, or
        beta S(W)."""
        weight, dtype = self.weight.detach(), dtype or self.weight.dtype
        weight = weight if self.recipe.mask == "soft" else weight.to(dtype)  # S depends on more than the order
        return prune(weight, self.index, self.scale, self.recipe.mask).to(dtype)

    @property
    def scale(self) -> torch.Tensor | None:
        """beta of soft weights; None for other masks."""
        return self.beta if self.recipe.mask == "soft" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sparse:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        device_type = x.device.type
        if device_type in AUTOCAST and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)  # for all but float64, as autocast itself does
            x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
        recipe = self.recipe
        how = _How(recipe.mask, recipe.mvue, recipe.weight_gradient, recipe.fp8, self.prune_again)
        master = (self.weight if recipe.mask == "soft" else weight).detach()
        if not torch.is_grad_enabled():
            w_24, _ = _MaskedLinear.operands(master, self.index, None, self.scale, weight.dtype, how)
            return F.linear(simulate_fp8(x, torch.float8_e4m3fn) if recipe.fp8 else x, w_24, bias)
        back = None if recipe.backward_mask == "same" else self.backward_mask
        return _MaskedLinear.apply(x, weight, master, self.index, back, bias, self.seed, self.scale, how)

    def get_extra_state(self) -> dict:
        return {"sparse": self.sparse}

    def set_extra_state(self, state: dict) -> None:
        self.sparse = bool(state["sparse"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}, sparse={self.sparse}"


def sparse_linears(model: nn.Module) -> list[Sparse24Linear]:
    """The Sparse24Linear layers of `model`, in module order: the order that `seed_draws` numbers them in."""
    return [module for module in model.modules() if isinstance(module, Sparse24Linear)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _disable_encoder_fast_path(model: nn.Module) -> None:
    """nn.TransformerEncoder(Layer) in eval under no_grad read linear1.weight itself and would silently go dense."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and sparse_linears(module):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and sparse_linears(module):
            module.activation_relu_or_gelu = 0


def sparsify(
    model: nn.Module, recipe: str | Recipe, layers: Sequence[str] | Callable[[str, nn.Module], bool]
) -> list[str]:
    """Swap chosen nn.Linear layers of any model for Sparse24Linear, in place; their Parameters stay the same objects.

    layers: names as in named_modules(), or a predicate (name, module). Only plain nn.Linear is swapped (a predicate
    passes over everything else; attention's out_proj, say, is never called as a module). Layers that are sparse
    already stay as they are. Returns the names swapped. Raises ValueError, before anything is changed, when nothing
    matches, when a name is no nn.Linear of the model, or when a shape is not divisible by 4.
    """
    recipe = get_recipe(recipe)
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) in (nn.Linear, Sparse24Linear)}
    linears.pop("", None)  # the model itself cannot be swapped in place
    chosen = [n for n, m in linears.items() if (layers(n, m) if callable(layers) else n in layers)]
    unknown = [] if callable(layers) else [name for name in layers if name not in linears]
    if unknown or not chosen:
        raise ValueError(
            f"sparsify: {'no nn.Linear named ' + ', '.join(unknown) if unknown else 'no nn.Linear matches'}; "
            f"the model has {', '.join(linears) or 'none'}"
        )
    dense = dict.fromkeys(linears[name] for name in chosen if type(linears[name]) is nn.Linear)
    layer_of = {linear: Sparse24Linear.from_linear(linear, recipe) for linear in dense}
    swapped = [name for name, m in linears.items() if m in layer_of]  # under all of its names, where it has several
    for name in swapped:
        _replace(model, name, layer_of[linears[name]])
    _disable_encoder_fast_path(model)
    return swapped


@torch.no_grad()
def densify(model: nn.Module, prune: bool = False) -> list[str]:
    """Swap every Sparse24Linear back for an nn.Linear, in place, for export; Parameters stay the same objects.

    prune: also prune the weights of the layers that are in their sparse phase, so that the dense model computes what
    the sparse one did. Returns the names swapped. Raises ValueError when the model itself is one such layer.
    """
    if isinstance(model, Sparse24Linear):
        raise ValueError("densify: the model itself is a Sparse24Linear, need a model that contains it; wrap it")
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Sparse24Linear)}
    linear_of = {}
    for layer in dict.fromkeys(layers.values()):
        if prune and layer.sparse:
            layer.weight.copy_(layer.pruned_weight())
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        linear_of[layer] = linear.train(layer.training)
    for name, layer in layers.items():
        _replace(model, name, linear_of[layer])
    return list(layers)


@torch.no_grad()
def refresh_masks(model: nn.Module, measure: bool = True) -> float | None:
    """Recompute the mask of every layer in its sparse phase from its weights (Algorithm 1).

    Returns the flip rate against the masks replaced, over all these layers, weighed by their weights; 0.0 with none.
    measure=False returns None, and never waits for the GPU.
    """
    layers = [layer for layer in sparse_linears(model) if layer.sparse]
    before = [layer.index.clone() for layer in layers] if measure else []
    for layer in layers:
        layer.refresh()
    return flip_rate(before, [layer.index for layer in layers]) if measure else None


@torch.no_grad()
def weight_indices(linears: Sequence[nn.Linear], kind: str = "transposable") -> list[torch.Tensor]:
    """The masks that these weights would have now, as index matrices: for the flip rate of sparse and dense runs."""
    return [mask_index(linear.weight, kind) for linear in linears]


@torch.no_grad()
def search_permutations(model: nn.Module, seed: int, iter_num: int) -> None:
    """Bi-Mask's search, for the layers in their sparse phase whose recipe asks for it: of PERMUTATIONS random row
    orders and the present one, that under which the backward mask keeps most of the forward's. A function of (seed,
    iteration, layer number)."""
    for number, layer in enumerate(sparse_linears(model)):
        if not (layer.sparse and layer.recipe.permutation_interval):
            continue
        words = seed_words(1, seed, iter_num, number, _PERMUTE)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        drawn = [torch.randperm(layer.out_features, generator=generator) for _ in range(PERMUTATIONS)]
        candidates = torch.stack([layer.permutation, *torch.stack(drawn).to(layer.permutation.device)])
        mask_t = layer.mask.t()
        kept = [mask_t[:, order].unflatten(1, (-1, 4)).sum(-1).clamp(max=2).sum() for order in candidates]
        layer.permutation.copy_(candidates[torch.stack(kept).argmax()])
        layer.index_t.copy_(layer._index_t())


@contextmanager
@torch.no_grad()
def hard_pruned(linears: Sequence[nn.Linear]):
    """Inside, these layers compute what they would once deployed, 2:4 sparse along their inputs: those in their sparse
    phase do so already, the weights of all others are pruned by magnitude (mask24), and put back at the end."""
    dense = dict.fromkeys(local(m.weight) for m in linears if not getattr(m, "sparse", False))
    kept = [w.detach().clone() for w in dense]
    try:
        for w in dense:
            w.copy_(torch.where(expand_pairs(pair_index(w)), w, 0))
        yield
    finally:
        for w, before in zip(dense, kept, strict=True):
            w.copy_(before)


def seed_words(count: int, *key: int) -> np.ndarray:
    """`count` uint64 words that are a function of the non-negative ints `key` alone (numpy's SeedSequence)."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64)


@torch.no_grad()
def seed_draws(model: nn.Module, seed: int, iter_num: int, micro_batch: int) -> None:
    """Fill every layer's `.seed` from (seed, iteration, global micro-batch, layer number): call it per micro-step."""
    layers = sparse_linears(model)
    if not layers:
        return
    words = torch.from_numpy(seed_words(len(layers), seed, iter_num, micro_batch).view(np.int64))
    words = words.to(layers[0].seed.device, non_blocking=True)  # one copy and one launch, however many layers
    torch._foreach_copy_([layer.seed for layer in layers], list(words.unbind()))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class MaskedDecayAdamW(torch.optim.AdamW):
    """AdamW with masked decay on the weights of `model`'s sparse layers, with their current (maybe stale) masks.

    decay_on="grad" adds Eq. 10, grad += masked_decay * ~mask * w, in place, once per step, to the gradients as they
    are then: unscaled and already clipped. "weight" is SR-STE's Eq. 8, w -= lr * masked_decay * ~mask * w, before the
    Adam update. Layers whose `.sparse` is False are plain AdamW. Other arguments are torch.optim.AdamW's.
    `masked_decay` may be changed between steps. Raises ValueError for a negative factor or another decay_on.

    Sparse layers whose recipe has `precondition` (STEP) keep the second moments that they had when they became sparse.
    Raises RuntimeError where there are none.

    float32 parameters on CUDA take one step in one kernel launch, unless an option of torch's (fused, foreach, amsgrad,
    maximize, capturable, differentiable) is asked for, also by the param_groups of a state dict that is loaded, or a
    method other than FST's; the gradients are then read only. State and checkpoints are torch's either way.
    """

    def __init__(self, params, model: nn.Module, *args, masked_decay: float, decay_on: str = "grad", **kwargs):
        if not masked_decay >= 0 or decay_on not in ("grad", "weight"):
            raise ValueError(
                f"MaskedDecayAdamW: masked_decay={masked_decay}, decay_on={decay_on!r}; need a factor of at least 0 "
                "and 'grad' or 'weight'"
            )
        super().__init__(params, *args, **kwargs)
        self.masked_decay = masked_decay
        self.decay_on = decay_on
        self._model = model
        # The fused kernel would unscale by itself, after the decay was added. So GradScaler unscales before step().
        self._step_supports_amp_scaling = False

    def _decayed(self) -> dict[torch.Tensor, Sparse24Linear]:
        """Weight to layer, for the layers that decay. A weight that layers share decays once."""
        if not self.masked_decay:
            return {}
        return {layer.weight: layer for layer in sparse_linears(self._model) if layer.sparse}

    @torch.no_grad()
    def _apply_masked_decay(self) -> None:
        layers = self._decayed()
        for group in self.param_groups:
            for w in group["params"]:
                if w not in layers or w.grad is None:
                    continue
                layer, rows = layers[w], local(w)
                if self.decay_on == "grad":
                    mask = rows_of(w, layer.index) if layer.recipe.mask == "transposable" else layer.mask_rows()
                    masked_decay_(local(w.grad), rows, mask, self.masked_decay)
                else:
                    rows.sub_(torch.where(layer.mask_rows(), 0, rows) * (group["lr"] * self.masked_decay))

    def _preconditioned(self) -> list[tuple[torch.Tensor, dict]]:
        """(weight, its group) of the layers whose second moments are frozen. RuntimeError where there are none yet."""
        layers = {m.weight: m for m in sparse_linears(self._model) if m.recipe.precondition}
        for weight in (w for w, layer in layers.items() if not layer.sparse and w in self.state):
            self.state[weight].pop("frozen_step", None)  # a dense phase moves them again
        frozen = {w for w, layer in layers.items() if layer.sparse and w.grad is not None}
        if any(not self.state.get(w) for w in frozen):
            raise RuntimeError("MaskedDecayAdamW: precondition needs dense steps first; raise dense_pretrain")
        return [(p, g) for g in self.param_groups for p in g["params"] if p in frozen]

    @torch.no_grad()
    def _preconditioned_step(self, p: torch.Tensor, grad: torch.Tensor, group: dict) -> None:
        """STEP's second phase: Adam with the second moments of the step at which they were frozen."""
        state, lr, (beta1, beta2) = self.state[p], group["lr"], group["betas"]
        if "frozen_step" not in state:
            state["frozen_step"] = int(state["step"])
        state["step"] += 1
        p, grad, m, v = (local(t) for t in (p, grad, state["exp_avg"], state["exp_avg_sq"]))
        m.lerp_(grad, 1 - beta1)
        denominator = (v / (1 - beta2 ** state["frozen_step"])).sqrt_().add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        bias = 1 - beta1 ** state["step"].double()  # a tensor, so that nothing waits for a GPU
        p.sub_(lr * m / (denominator * bias))

    @torch.no_grad()
    def _kernel_step(self) -> bool:
        """The whole step in one launch of kernels.adamw_; False where it cannot, with nothing done."""
        groups = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        special = ("amsgrad", "maximize", "capturable", "differentiable", "fused", "foreach")
        if not groups or any(group[key] for group, _ in groups for key in special):
            return False
        layers = self._decayed()
        if any(layer.recipe.mask != "transposable" for layer in layers.values()):
            return False
        if not adamw_fits([local(t) for _, p in groups for t in (p, p.grad)]):
            return False
        indices, scalars, moments = {w: rows_of(w, layer.index) for w, layer in layers.items()}, [], []
        for _, p in groups:
            state = self.state[p]
            if not state:
                # on the CPU, so that reading it waits for nothing
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if state["step"].is_cuda:  # it comes from a fused optimizer's state
                state["step"] = state["step"].cpu()
            moments.append((local(state["exp_avg"]), local(state["exp_avg_sq"])))
        if not adamw_fits([t for pair in moments for t in pair]):
            return False
        for group, p in groups:
            step = self.state[p]["step"]
            step += 1
            lr, decay = float(group["lr"]), self.masked_decay * (float(group["lr"]) if self.decay_on == "weight" else 1)
            scalars.append(adamw_scalars(int(step), lr, group["betas"], group["eps"], group["weight_decay"], decay))
        adamw_(
            [local(p) for _, p in groups],
            [local(p.grad) for _, p in groups],
            *(list(column) for column in zip(*moments, strict=True)),
            [indices.get(p) for _, p in groups],
            scalars,
            self.decay_on == "weight",
        )
        return True

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = self._preconditioned()
        if not frozen and self._kernel_step():
            return loss
        self._apply_masked_decay()
        gradients = [p.grad for p, _ in frozen]
        for p, _ in frozen:
            p.grad = None  # AdamW passes over it
        # torch wraps the step of every optimizer class once it is used, to run the hooks. Ours is wrapped already.
        step = torch.optim.AdamW.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)
        for (p, group), p.grad in zip(frozen, gradients, strict=True):
            self._preconditioned_step(p, p.grad, group)
        return loss


class AutoSwitch:
    """STEP's rule for the end of the dense start: have Adam's second moments settled?

    Z_t is the mean of |v_t - v_{t-1}| over the weights of the sparse layers, (1 - beta2) |g^2 - v_{t-1}|; they have
    when its mean over the last 1 / (1 - beta2) steps is below Adam's eps.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.layers, self.optimizer = sparse_linears(model), optimizer
        group = optimizer.param_groups[0]
        self.beta2, self.eps = group["betas"][1], group["eps"]
        self.length = max(1, round(1 / (1 - self.beta2)))
        self.changes: list[float] = []

    @torch.no_grad()
    def settled(self) -> bool:
        """Call it once a step, between clipping and the optimizer's step. Waits for the GPU."""
        weights, changes = [layer.weight for layer in self.layers], []
        for w in weights:
            v = self.optimizer.state[w].get("exp_avg_sq") if w in self.optimizer.state else None
            squares = local(w.grad).float().square()
            changes.append((squares if v is None else squares.sub_(local(v)).abs_()).sum(dtype=torch.float64))
        change = float(total(torch.stack(changes).sum(), weights[0]))
        change *= (1 - self.beta2) / sum(w.numel() for w in weights)
        if math.isfinite(change):  # else the step is passed over
            self.changes = [*self.changes, change][-self.length :]
        return len(self.changes) == self.length and sum(self.changes) / self.length < self.eps

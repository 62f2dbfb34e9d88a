"""2:4 sparse training of transformers: the papers' recipes, layer and optimizer. Their operators are in operators.py.

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
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from operators import (  # noqa: F401 (all of the operators are names of this module too)
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
    philox4x32,
    soft_threshold24,
    soft_threshold24_ref,
    sste_scale,
    sste_scale_ref,
    transposable_index,
    transposable_index_ref,
    transposable_mask,
    transposable_mask_2approx,
)

# ---------------------------------------------------------------------------------------------------------------------
# Recipes: every choice that makes one method differ from another


@dataclass(frozen=True)
class Recipe:
    """One method of 2:4 training. Fractions are of max_iters, intervals in optimizer steps."""

    name: str
    mask: str = "transposable"  # "transposable", "row" (row-wise by magnitude) or "soft" (soft threshold, row-wise)
    backward_mask: str = "same"  # dX multiplies the forward's masked W ("same") or one with its own mask ("own")
    mvue: bool = False  # 2:4 weight-gradient GEMM through MVUE, else a dense one
    masked_decay: float = 0.0  # the decay factor lambda itself; 0 = none
    decay_on: str = "grad"  # "grad": Eq. 10, before Adam's moments; "weight": SR-STE's Eq. 8
    mask_interval: int = 40  # steps between mask refreshes
    dense_finetune: float = 0.0  # share of the steps that are dense, at the end
    dense_pretrain: float = 0.0  # share of the steps that are dense, at the start
    precondition: bool = False  # STEP: Adam's second moments are frozen after the dense start
    beta: str = "none"  # scale of the pruned weights in the forward: "none", or "init" (least squares, fixed at start)

    def __post_init__(self):
        allowed = {
            "mask": ("transposable", "row", "soft"),
            "backward_mask": ("same", "own"),
            "decay_on": ("grad", "weight"),
            "beta": ("none", "init"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"Recipe: {field}={getattr(self, field)!r}, need one of {', '.join(values)}")
        if not self.masked_decay >= 0 or math.isinf(self.masked_decay):
            raise ValueError(f"Recipe: masked_decay={self.masked_decay}, need a finite factor of at least 0")
        if self.mask_interval < 1:
            raise ValueError(f"Recipe: mask_interval={self.mask_interval}, need at least 1 step")
        for field in ("dense_finetune", "dense_pretrain"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"Recipe: {field}={getattr(self, field)}, need a fraction of max_iters from 0 to 1")

    def check_trainable(self) -> None:
        """Raises NotImplementedError for a method whose layer or schedule is not built yet."""
        missing = [
            f"{field}={getattr(self, field)!r}"
            for field, built in (
                ("mask", "transposable"),
                ("backward_mask", "same"),
                ("dense_pretrain", 0.0),
                ("precondition", False),
                ("beta", "none"),
            )
            if getattr(self, field) != built
        ]
        if missing:
            raise NotImplementedError(
                f"recipe {self.name!r}: training with {', '.join(missing)} is not built yet; use 'fst' or 'ste'"
            )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fst", mvue=True, masked_decay=6e-5, dense_finetune=1 / 6),
        Recipe("ste"),  # FST without masked decay, MVUE and dense fine-tuning: the paper's flip-rate explosion
        Recipe("sr_ste", mask="row", masked_decay=2e-4, decay_on="weight", mask_interval=1),
        Recipe("s_ste", mask="soft", mvue=True, mask_interval=1, beta="init"),
        Recipe("step", mask="row", mask_interval=1, dense_pretrain=0.1, precondition=True),
        Recipe("bi_mask", mask="row", backward_mask="own", mask_interval=1),
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself. Raises ValueError with the names there are."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown, need one of {', '.join(RECIPES)}")
    return RECIPES[recipe]


# ---------------------------------------------------------------------------------------------------------------------
# The layer


class _MaskedLinear(torch.autograd.Function):
    """Z = X w_24^T + b; dX = dZ w_24; dW = MVUE(dZ^T) X straight through to W; db from the unpruned dZ (Eq. 2-7)."""

    @staticmethod
    def forward(ctx, x, weight, w_24, bias, seed, mvue):
        # weight only receives the gradient. The seed is copied, so that the next micro-step may fill it already.
        ctx.save_for_backward(x, w_24, seed.clone() if mvue else None)
        ctx.mvue = mvue
        return F.linear(x, w_24, bias)

    @staticmethod
    @once_differentiable  # a second derivative would silently lack the weight's share
    def backward(ctx, dz):
        x, w_24, seed = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dz @ w_24
        dz = dz.reshape(-1, dz.shape[-1])  # (BT, out)
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])  # (BT, in)
            dz_t = dz.t()
            if ctx.mvue:
                padding = -dz.shape[0] % 4
                if padding:  # zero tokens are never drawn over others and contribute nothing: exact
                    x, dz_t = F.pad(x, (0, 0, 0, padding)), F.pad(dz_t, (0, padding))
                dz_t = mvue24(dz_t, seed)
            dw = dz_t @ x
        if ctx.needs_input_grad[3]:
            db = dz.sum(0)
        return dx, dw, None, db, None, None


class Sparse24Linear(nn.Linear):
    """An nn.Linear whose weight is 2:4 sparse in the forward and the backward pass, trained straight through.

    `.weight` (out, in) stays dense: it is what the optimizer updates. State, all of it in state_dict:
    `.index`   uint8 (out/4, in/4), the transposable mask, set by `refresh_masks`; `.mask` is its bool (out, in) form.
    `.sparse`  bool; False = the dense phase, where this is a plain nn.Linear. Saved as extra state.
    `.seed`    int64 0-d tensor that MVUE reads, set by `seed_draws`; not saved, since it is a function of the step.
    A fresh or reset layer's mask matches its weights; call `refresh_masks` after setting or loading weights alone.
    x: (..., in), any number of tokens. Under autocast all GEMMs run in its dtype, as nn.Linear's do.
    Raises ValueError when in or out is not divisible by 4, NotImplementedError for a recipe not built yet.
    """

    def __init__(self, in_features, out_features, bias=True, recipe="fst", device=None, dtype=None):
        recipe = get_recipe(recipe)
        recipe.check_trainable()
        if in_features % 4 or out_features % 4:
            raise ValueError(
                f"Sparse24Linear: {in_features} in, {out_features} out, need both divisible by 4; "
                "change the width or leave this layer dense"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = recipe
        self.sparse = True
        self.register_buffer("index", transposable_index(self.weight))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "index" in self._buffers:  # not yet there when nn.Linear's __init__ comes by
            self.index.copy_(transposable_index(self.weight))
            self.seed.zero_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | Recipe) -> "Sparse24Linear":
        """A sparse layer with the very Parameters of `linear`, so an optimizer goes on; draws no random numbers."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, recipe, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.index = transposable_index(linear.weight)
        layer.seed = torch.zeros((), dtype=torch.int64, device=linear.weight.device)
        return layer.train(linear.training)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        _table("flat", self.index.device)  # copied now, so that no forward waits for it,
        if type(self.index) is torch.Tensor:  # and tested now, since a compiled forward cannot; nor can a fake tensor
            kernel_status(self.index.device)
        return self

    @property
    def mask(self) -> torch.Tensor:
        """The current mask, bool (out, in), True = kept."""
        return expand_index(self.index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sparse:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        device_type = x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)  # for all but float64, as autocast itself does
            x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
        w_24 = torch.where(self.mask, weight.detach(), 0)
        if not torch.is_grad_enabled():
            return F.linear(x, w_24, bias)
        return _MaskedLinear.apply(x, weight, w_24, bias, self.seed, self.recipe.mvue)

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

    prune: also zero the masked weights of the layers that are in their sparse phase, so that the dense model computes
    what the sparse one did. Returns the names swapped. Raises ValueError when the model itself is one such layer.
    """
    if isinstance(model, Sparse24Linear):
        raise ValueError("densify: the model itself is a Sparse24Linear, need a model that contains it; wrap it")
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Sparse24Linear)}
    linear_of = {}
    for layer in dict.fromkeys(layers.values()):
        if prune and layer.sparse:
            layer.weight.masked_fill_(~layer.mask, 0)
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
        layer.index.copy_(transposable_index(layer.weight))
    return flip_rate(before, [layer.index for layer in layers]) if measure else None


@torch.no_grad()
def weight_indices(linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
    """The masks that these weights would have now, as index matrices: for the flip rate of sparse and dense runs."""
    return [transposable_index(linear.weight) for linear in linears]


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


def decay_ratio(model: nn.Module, decay: float) -> float | None:
    """RMS(decay * ~mask * w) / RMS(grad) over the sparse weights: how strong masked decay is beside the gradient.

    Call it between clipping and the optimizer's step. None where no layer is sparse or has a gradient.
    """
    layers = [m for m in sparse_linears(model) if m.sparse and m.weight.grad is not None]
    if not layers:
        return None
    decayed = sum(torch.where(m.mask, 0, m.weight.detach()).float().square().sum() for m in layers)
    gradient = sum(m.weight.grad.float().square().sum() for m in layers)
    return float(decay * (decayed / gradient).sqrt()) if float(gradient) > 0 else None


class MaskedDecayAdamW(torch.optim.AdamW):
    """AdamW with masked decay on the weights of `model`'s sparse layers, with their current (maybe stale) masks.

    decay_on="grad" adds Eq. 10, grad += masked_decay * ~mask * w, in place, once per step, to the gradients as they
    are then: unscaled and already clipped. "weight" is SR-STE's Eq. 8, w -= lr * masked_decay * ~mask * w, before the
    Adam update. Layers whose `.sparse` is False are plain AdamW. Other arguments are torch.optim.AdamW's.
    `masked_decay` may be changed between steps. Raises ValueError for a negative factor or another decay_on.

    float32 parameters on CUDA take one step in one kernel launch, unless an option of torch's (fused, foreach, amsgrad,
    maximize, capturable, differentiable) is asked for, also by the param_groups of a state dict that is loaded; the
    gradients are then read only. State and checkpoints are torch's either way.
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

    def _decayed(self) -> dict[torch.Tensor, torch.Tensor]:
        """Weight to index matrix, for the layers that decay. A weight that layers share decays once."""
        if not self.masked_decay:
            return {}
        return {layer.weight: layer.index for layer in sparse_linears(self._model) if layer.sparse}

    @torch.no_grad()
    def _apply_masked_decay(self) -> None:
        indices = self._decayed()
        for group in self.param_groups:
            for w in group["params"]:
                if w not in indices or w.grad is None:
                    continue
                if self.decay_on == "grad":
                    masked_decay_(w.grad, w, indices[w], self.masked_decay)
                else:
                    w.mul_(torch.where(expand_index(indices[w]), 1.0, 1.0 - group["lr"] * self.masked_decay))

    @torch.no_grad()
    def _kernel_step(self) -> bool:
        """The whole step in one launch of kernels.adamw_; False where it cannot, with nothing done."""
        groups = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        special = ("amsgrad", "maximize", "capturable", "differentiable", "fused", "foreach")
        if not groups or any(group[key] for group, _ in groups for key in special):
            return False
        if not adamw_fits([t for _, p in groups for t in (p, p.grad)]):
            return False
        indices, scalars, moments = self._decayed(), [], []
        for _, p in groups:
            state = self.state[p]
            if not state:
                # on the CPU, so that reading it waits for nothing
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if state["step"].is_cuda:  # it comes from a fused optimizer's state
                state["step"] = state["step"].cpu()
            moments.append((state["exp_avg"], state["exp_avg_sq"]))
        if not adamw_fits([t for pair in moments for t in pair]):
            return False
        for group, p in groups:
            step = self.state[p]["step"]
            step += 1
            lr, decay = float(group["lr"]), self.masked_decay * (float(group["lr"]) if self.decay_on == "weight" else 1)
            scalars.append(adamw_scalars(int(step), lr, group["betas"], group["eps"], group["weight_decay"], decay))
        adamw_(
            [p for _, p in groups],
            [p.grad for _, p in groups],
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
        if self._kernel_step():
            return loss
        if self.masked_decay:
            self._apply_masked_decay()
        # torch wraps the step of every optimizer class once it is used, to run the hooks. Ours is wrapped already.
        step = torch.optim.AdamW.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)
        return loss

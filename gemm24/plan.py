"""Plans a model's feed-forward layers: their GEMMs, how each is multiplied, and whether a whole layer gets faster."""

import copy
import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from gemm24.choose import Report, choose, enqueue_us, reason, time_interleaved, wins
from gemm24.ffn import FFNPlan, pack_weights, planned_modules
from gemm24.matmul import Choice, Gemm
from gemm24.operands import GATED
from sparse24 import RECIPES, Recipe, seed_draws

GEMMS = ("z", "y", "da", "dx", "dw1", "dw2")


def sparse_gemms(recipe: Recipe) -> tuple[str, ...]:
    """The GEMMs of an FFN that have a 2:4 operand: by weights z and y, and da and dx if masks are transposable; by
    activations y and dx, and z and da if weights are soft; dw1 and dw2 by MVUE."""
    if recipe.activations24:
        names = ("y", "dx", "z", "da") if recipe.mask == "soft" else ("y", "dx")
    else:
        names = {"transposable": ("z", "y", "da", "dx"), "none": ()}.get(recipe.mask, ("z", "y"))
    return names + (("dw1", "dw2") if recipe.mvue else ())


def ffn_gemms(
    d_model: int, d_ff: int, tokens: int, activation: str, bias: bool, recipe: Recipe = RECIPES["fst"]
) -> dict[str, Gemm]:
    """The GEMMs of an FFN that may be 2:4, by name; see `sparse_gemms`. The hidden layer is feature-major, with 2:4
    activations token-major. The number of tokens is padded to a multiple of 64."""
    hidden, t, soft = d_ff * (2 if activation in GATED else 1), tokens + -tokens % 64, recipe.mask == "soft"
    if recipe.activations24:
        gemms = [
            Gemm("z", d_ff, t, d_model, True, True, bias, repacked=True),
            Gemm("y", t, d_model, d_ff, not soft, False, False, fresh=True),  # soft W2^T is contiguous
            Gemm("da", d_ff, t, d_model, True, True, False, repacked=True),
            Gemm("dx", t, d_model, d_ff, False, False, False, fresh=True),
            Gemm("dw1", d_ff, d_model, t, False, False, False, fresh=True),
            Gemm("dw2", d_ff, d_model, t, False, True, False, fresh=True),
        ]
    else:
        gemms = [
            Gemm("z", hidden, t, d_model, True, False, bias),
            Gemm("y", d_model, t, d_ff, False, True, bias),
            Gemm("da", d_ff, t, d_model, True, False, False),
            Gemm("dx", d_model, t, hidden, False, True, False),
            Gemm("dw1", hidden, d_model, t, False, False, False, fresh=True),
            Gemm("dw2", d_model, d_ff, t, True, False, False, fresh=True),
        ]
    return {gemm.name: gemm for gemm in gemms if gemm.name in sparse_gemms(recipe)}


def plan_ffn(
    config,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    spmm: str = "auto",
    recipe: Recipe = RECIPES["fst"],
    graph: bool = False,
    cache: Path | None = None,
    known: Sequence[dict] = (),
) -> tuple[FFNPlan | None, Report]:
    """Choose how the FFNs of a model multiply.

    config: a GPTConfig (n_embd, d_ff, activation, bias). recipe: says which operands are 2:4. graph, cache, known: as
    in `choose`.
    Returns (plan, report). The plan is None if the model goes layer by layer: with spmm="dense", and with "auto" if no
    2:4 GEMM wins. Raises ValueError for an unknown mode, or if "cusparselt" cannot multiply here.
    """
    gemms = ffn_gemms(config.n_embd, config.d_ff, tokens, config.activation, config.bias, recipe)
    report = choose(gemms, device, spmm, dtype=dtype, graph=graph, cache=cache, known=known)
    if spmm == "dense" or (spmm == "auto" and all(choice.backend == "masked" for choice in report.choices.values())):
        return None, report
    choices = [report.choices.get(name, Choice()) for name in GEMMS]
    return FFNPlan(config.activation, tokens, dtype, recipe.mvue, *choices), report


def set_plan(model: nn.Module, plan: FFNPlan | None) -> None:
    """Give every FFN of the model the plan and pack its weights. None removes the plan and frees the packed weights.

    Raises ValueError if the plan does not fit the layers' activation or recipe, or if no function that follows a plan
    can compute their recipe (`Recipe.fused`).
    """
    modules = planned_modules(model)
    for ffn in modules if plan is not None else ():
        recipe, mvue = ffn.c_fc.recipe, (ffn.c_fc.recipe.mvue, ffn.c_proj.recipe.mvue)
        if (ffn.activation, *mvue) != (plan.activation, plan.mvue, plan.mvue):
            raise ValueError(
                f"set_plan: the plan is for {plan.activation} and mvue={plan.mvue}, need this model's {ffn.activation} "
                f"and mvue={mvue[0]}; make it with plan_ffn(model.config, ..., recipe=recipe)"
            )
        if not recipe.fused:
            raise ValueError(f"set_plan: recipe {recipe.name!r} with these fields goes layer by layer; use no plan")
        planned = [name for name in GEMMS if getattr(plan, name).order != "masked"]
        if wrong := [name for name in planned if name not in sparse_gemms(recipe)]:
            raise ValueError(
                f"set_plan: the plan has a 2:4 {wrong[0]}, need {' '.join(sparse_gemms(recipe))} for recipe "
                f"{recipe.name!r}; make it with plan_ffn(..., recipe=recipe)"
            )
    for ffn in modules:
        ffn.plan = plan
    pack_weights(model)


# ---------------------------------------------------------------------------------------------------------------------
# Does it pay?


def set_phase(mlp: nn.Module, sparse: bool) -> None:
    """Put the 2:4 layers of an FFN into their sparse or their dense phase. A layer that decides by itself when it
    computes 2:4, as methods/act24.py's, has decided so."""
    for layer in (mlp.c_fc, mlp.c_proj):
        layer.sparse = sparse
        if hasattr(layer, "joined"):
            layer.joined = sparse


def time_ways(mlp: nn.Module, plan: FFNPlan, compile_mode: str | None, micro_steps: int = 1) -> dict:
    """Time an FFN, forward and backward, in three ways: "dense"; "layers", its 2:4 layers one by one; and "plan". With
    2:4 activations "layers" is the same function as "plan", with dense GEMMs on pruned matrices.

    `choose` has timed each GEMM alone. This times the whole layer; the plan also pays for one packing per `micro_steps`
    calls. mlp: an MLP of the model, which is copied. compile_mode: as in torch.compile, or None for eager.
    Returns {"us": {way: [median, smallest, largest]}, "host_us": {way: time of the host to enqueue it}, "taken": "plan"
    if that is faster than the layers by more than the noise, else "layers"}.
    """
    if mlp not in planned_modules(mlp):
        raise ValueError("time_ways: this layer has no 2:4 linears c_fc and c_proj; give one that has")
    device, calls = mlp.c_fc.weight.device, {}
    x, dy = (torch.randn(plan.tokens, mlp.c_fc.in_features, device=device, dtype=plan.dtype) for _ in range(2))
    for way in ("dense", "layers", "plan"):
        layer = copy.deepcopy(mlp).train()
        set_phase(layer, sparse=way != "dense")
        set_plan(layer, plan if way == "plan" else None)
        net = torch.compile(layer, mode=compile_mode) if compile_mode else layer
        calls[way] = forward_backward(net, layer, x.requires_grad_(), dy, plan.dtype)
    # In training the host runs ahead of the GPU, so time the GPU alone, by CUDA graphs. With reduce-overhead the
    # compiled layer replays graphs already.
    graph = device.type == "cuda" and compile_mode in (None, "default")
    packs = [] if mlp.c_fc.recipe.activations24 else [functools.partial(pack_weights, layer)]
    samples = _times([*calls.values(), *packs], graph, device)
    packing = samples.pop() if packs else [0.0]  # 2:4 activations, and soft weights with them, are packed in each call
    host_us = {way: enqueue_us(call, device) for way, call in calls.items()}
    times = dict(zip(calls, samples, strict=True))
    times["plan"] = [us + statistics.median(packing) / micro_steps for us in times["plan"]]
    taken = "plan" if wins(times["plan"], times["layers"]) else "layers"
    del calls, layer, net  # frees three layers and their compiled code, which the run does not need
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    us = {way: [statistics.median(samples), min(samples), max(samples)] for way, samples in times.items()}
    return {"us": us, "host_us": host_us, "taken": taken}


def _times(calls: list[Callable], graph: bool, device: torch.device) -> list[list[float]]:
    """Samples in microseconds of each call; with graph from CUDA graphs, unless a call cannot be captured."""
    try:
        return time_interleaved(calls, 9, graph, device)
    except RuntimeError as error:
        if not graph:
            raise
        print(f"a layer cannot be captured in a CUDA graph ({reason(error)}): the host's time counts in the choice")
        return time_interleaved(calls, 9, False, device)


def forward_backward(net, module: nn.Module, x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> Callable:
    """A function to time: one forward and backward under autocast of `net`, which is `module` or its compiled form."""
    seed_draws(module, 0, 0, 1)  # in a step's first micro-batch methods may measure

    def call() -> None:
        with torch.autocast(x.device.type, dtype):
            y = net(x)
        y.backward(dy)
        module.zero_grad(set_to_none=True)
        x.grad = None

    return call

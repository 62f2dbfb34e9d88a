"""The suites of bench.py for GEMMs, feed-forward layers and transformer blocks: compiled dense against 2:4.

A suite is a grid of cases and a function that measures the rows of one case, plain dicts for JSON. Times are in
milliseconds unless a name says otherwise. A spread is the median, smallest and largest of the repetitions. On a CPU
everything runs at toy sizes to show that it works; its times mean nothing.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import roofline
from benchmarks.machine import copy_bandwidth, spread
from gemm24 import choose
from gemm24 import plan as ffn_plan
from gemm24.ffn import pack_weights
from model import MLP, Block, GPTConfig
from sparse24 import RECIPES, Recipe, get_recipe, refresh_masks, sparsify

WIDTHS = (768, 1024, 1280, 1600, 2048, 3072, 4096, 6144, 8192)
MASK_INTERVAL = RECIPES["fst"].mask_interval


@dataclass(frozen=True)
class Settings:
    """Options of a suite."""

    device: torch.device
    scale: str = "default"  # toy (a CPU), quick, default, full
    repetitions: int = 10
    budget: float = 150.0  # seconds of a suite after which no case is started; e2e has four times as many
    graph: bool = False  # ffn, block: time replays of CUDA graphs, without the host's time
    sizes: tuple[str, ...] = ()  # sizes of GPT-2 for e2e; empty: the grid of `scale`
    widths: tuple[int, ...] = ()  # widths of gemm, ffn and block; empty: the grid of `scale`
    cache: Path | None = None  # file of cached choices of GEMMs, shared by all suites
    method: str = "fst"  # the recipe of 2:4 layers

    @property
    def toy(self) -> bool:
        return self.scale == "toy"

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.method)


# ---------------------------------------------------------------------------------------------------------------------
# Shared by the suites


def compiled(net, settings: Settings):
    """The compiled net. On a CPU, where compiling takes longer than everything else, the net itself."""
    return net if settings.toy else torch.compile(net, dynamic=False)


def time_ms(calls: list[Callable], settings: Settings, graph: bool = False) -> list[list[float]]:
    """Milliseconds of each call, one number per repetition. The calls take turns."""
    times = choose.time_interleaved(calls, settings.repetitions, graph, settings.device)
    return [[us / 1000 for us in one] for one in times]


def measured_card(report, bandwidth: float) -> tuple[roofline.GPU, dict[str, float]] | None:
    """(this card's rates, {GEMM: ratio}) for the roofline, from a report of `choose`; None if no GEMM was timed.

    The rate differs between shapes, so all GEMMs are pooled into one rate and one ratio. Dense times are of the pruned
    matrix, which a GPU at its power limit may multiply faster than a dense one."""
    if report is None or not report.rows:
        return None
    dense = sum(row["dense_us"] for row in report.rows)
    chosen = sum(row["best_us"] if row["chosen"] else row["dense_us"] for row in report.rows)
    flops = sum(2 * row["m"] * row["n"] * row["k"] for row in report.rows)
    names = [row["name"] for row in report.rows]
    return roofline.GPU(1e6 * flops / dense, bandwidth), dict.fromkeys(names, dense / chosen)


def plan(config: GPTConfig, tokens: int, settings: Settings):
    """(plan or None, report) of ffn_plan.plan_ffn for this many tokens."""
    on_gpu = settings.device.type == "cuda"  # graph=True: choose by GPU time, as train.py does
    options = {"spmm": "auto" if on_gpu else "emulated", "graph": on_gpu, "cache": settings.cache}
    options |= {"device": settings.device, "dtype": torch.bfloat16, "recipe": settings.recipe}
    return ffn_plan.plan_ffn(config, tokens=tokens, **options)


def describe(chosen, report) -> str:
    """The backend of each GEMM of a plan."""
    if chosen is None:
        return "layer by layer"
    texts = {name: f"{c.backend} {c.order} {c.alg_id}/{c.split_k}" for name, c in report.choices.items()}
    return ", ".join(f"{name} {'dense' if text.startswith('masked') else text}" for name, text in texts.items())


# ---------------------------------------------------------------------------------------------------------------------
# gemm


def gemm_grid(settings: Settings) -> list[tuple[int, int]]:
    """Cases (width, tokens), the most informative first."""
    if settings.toy:
        return [(64, 128)]
    widths, tokens = WIDTHS[:4], (16384, 65536, 8192)
    if settings.scale == "quick":
        widths, tokens = (768, 1600), (16384,)
    if settings.widths:
        widths, tokens = settings.widths, (16384,)
    return [(d, t) for t in tokens for d in widths]


def gemm_rows(case: tuple[int, int], settings: Settings) -> list[dict]:
    """The GEMMs of a layer that may be 2:4, for fst all six: the measurements behind plan_ffn's plan, with TFLOP/s."""
    d, tokens = case
    config = GPTConfig(n_embd=d, n_head=1, activation=settings.recipe.activation or "gelu", bias=False)
    _, report = plan(config, tokens, settings)
    print(report.text(), flush=True)
    measured, rows = {row["name"]: row for row in report.rows}, []
    for name, gemm in ffn_plan.ffn_gemms(d, config.d_ff, tokens, config.activation, False, settings.recipe).items():
        row = measured.get(name, gemm._asdict() | {"reason": "not timed here"})
        flops = 2e-6 * gemm.m * gemm.n * gemm.k  # over microseconds: TFLOP/s
        rates = {f"{key}_tflops": row.get(f"{key}_us") and flops / row[f"{key}_us"] for key in ("dense", "best")}
        rows.append({"d": d, "tokens": tokens} | row | rates)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# ffn and block


def layer_grid(kind: str, settings: Settings) -> list[tuple[str, int, int, int]]:
    """Cases (activation, width, sequence length, batch), the most informative first. The paper does not give the hidden
    width of its Figure 6; ours is GPTConfig.d_ff: 4 d, and 2/3 of that for GEGLU."""
    activation = settings.recipe.activation
    if settings.toy:
        return [(one, 192, 32, 2) for one in ((activation,) if activation else ("gelu", "geglu"))]
    if settings.scale == "full":
        grid = itertools.product(("geglu", "gelu"), WIDTHS, (2048, 1024, 512), (4, 8, 16, 32, 64))
        return [case for case in grid if case[1] * case[2] * case[3] <= 2**29]  # 1 GiB of bf16 input, 4 hidden
    widths = (1024, 4096) if settings.scale == "quick" else (768, 1024, 1600, 2048, 4096)
    widths = settings.widths or widths
    if activation:
        return [(activation, d, 1024, 16) for d in widths]
    if kind == "ffn":
        return [("gelu", d, 1024, 16) for d in widths] + [("geglu", d, 2048, 8) for d in widths]
    return [("gelu", d, n, 16384 // n) for n in (1024, 2048, 512) for d in widths]


def layer_row(kind: str, case: tuple[str, int, int, int], settings: Settings) -> dict:
    """Time one shape of ffn or block: the compiled dense layer and our 2:4 layer ("auto") in turns. Beside squared ReLU
    stands dense GELU ("gelu"), which is what most people train.

    The 2:4 layer runs the plan of plan_ffn. train.py uses that plan only if time_ways finds it faster than the 2:4
    linears one by one. The 2:4 time includes one packing and 1/mask_interval of the mask search."""
    activation, d, n, batch = case
    config = GPTConfig(n_embd=d, n_head=d // 64, block_size=n, activation=activation, bias=False)
    dtype = torch.bfloat16 if kind == "ffn" else torch.float32  # the output of a LayerNorm, or the residual stream
    torch.manual_seed(1)
    x, dy = (torch.randn(batch, n, d, device=settings.device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    calls, host_us = {}, {}
    for name in ("dense", "gelu", "auto") if activation == "relu2" else ("dense", "auto"):
        torch.manual_seed(0)
        config = replace(config, activation="gelu" if name == "gelu" else activation)
        module = (MLP if kind == "ffn" else Block)(config).to(settings.device)
        if name == "auto":
            sparsify(module, settings.recipe, lambda name, _: "attn" not in name)
            ffn_plan.set_phase(getattr(module, "mlp", module), sparse=True)
            chosen, report = plan(config, n * batch, settings)
            ffn_plan.set_plan(module, chosen)
        calls[name] = ffn_plan.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16)
        calls[name]()  # compiles
        host_us[name] = choose.enqueue_us(calls[name], settings.device)
    graph = settings.graph and settings.device.type == "cuda"
    times = dict(zip(calls, time_ms([*calls.values()], settings, graph), strict=True))
    costs = upkeep(module, settings, graph)
    intervals = {"pack_ms": 1, "refresh_ms": settings.recipe.mask_interval}
    times["auto"] = [ms + sum(cost["median"] / intervals[name] for name, cost in costs.items()) for ms in times["auto"]]
    variants = {name: {"ms": spread(ms), "host_us": host_us[name]} for name, ms in times.items()}
    variants["auto"] |= costs
    s = {"auto": over(times["dense"], times["auto"])}
    s |= {"gelu": over(times["gelu"], times["auto"])} if "gelu" in times else {}
    row = {"activation": activation, "d": d, "d_ff": config.d_ff, "n": n, "batch": batch, "tokens": n * batch}
    row |= {"variants": variants, "s": s, "plan": describe(chosen, report)}
    return row | layer_model(kind, row, measured_card(report, copy_bandwidth(settings.device)), settings.recipe)


def upkeep(module, settings: Settings, graph: bool) -> dict[str, dict]:
    """Spreads of the times that a 2:4 layer needs once per step and once per refresh."""
    recipe, calls = settings.recipe, {}
    if not recipe.activations24:  # else soft weights are packed in each call
        calls["pack_ms"] = partial(pack_weights, module)
    if recipe.mask != "none":
        calls["refresh_ms"] = partial(refresh_masks, module, measure=False)
    return {name: spread(time_ms([call], settings, graph)[0]) for name, call in calls.items()}


def over(dense_ms: list[float], sparse_ms: list[float]) -> dict:
    """The spread of S."""
    return spread([dense / sparse for dense, sparse in zip(dense_ms, sparse_ms, strict=True)])


def layer_model(kind: str, row: dict, card, recipe: Recipe) -> dict:
    """S_model of a row with this card's measured rates; {} if no GEMM was timed."""
    if card is None:
        return {}
    gpu, ratio = card
    shape, sparse = (gpu, row["d"], row["d_ff"], row["tokens"]), roofline.options_of(recipe, ratio)
    if kind == "ffn":
        s = roofline.s_model(*shape, row["activation"], **sparse)
    else:
        s = roofline.block_s_model(*shape, row["n"], row["activation"], **sparse)
    rates = {"gemm_tflops": gpu.flops / 1e12, "copy_tb_per_s": gpu.bandwidth / 1e12}
    return rates | {"gemm_ratio": max(ratio.values()), "s_model": s}

"""The suites of bench.py for GEMMs, feed-forward layers and transformer blocks, dense beside 2:4.

A suite is a grid of cases and a generator of rows, plain dicts for JSON, from one case. Milliseconds unless a name says
otherwise; a spread is the median, smallest and largest of the repetitions. What a variant fails with is its `reason`.
On a CPU everything runs at toy sizes, to show that it works: what is timed there means nothing.
"""

import functools
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import roofline
from gemm24 import choose
from gemm24 import plan as ffn_plan
from gemm24.ffn import pack_weights
from model import MLP, PRESETS, Block, GPTConfig
from sparse24 import RECIPES, refresh_masks, sparsify, transposable_mask

WIDTHS = (768, 1024, 1280, 1600, 2048, 3072, 4096, 6144, 8192)
PAPER_BATCH = {"124M": 16, "350M": 16, "774M": 5, "1558M": 4}  # Table 8's; it has no 1558M
MASK_INTERVAL = RECIPES["fst"].mask_interval
# What may go wrong with a variant and becomes its row's reason: memory, an unsupported operation, a package that is
# missing or has another interface. Where it is this repo's own, bench.py ends with an error for it.
FAILURES = (RuntimeError, ValueError, ImportError, AttributeError, TypeError, AssertionError)


@dataclass(frozen=True)
class Settings:
    """How a suite is run."""

    device: torch.device
    scale: str = "default"  # toy (a CPU), quick, default, full
    repetitions: int = 10
    budget: float = 150.0  # seconds of a suite, four times that for e2e, after which no case is begun
    accumulation: int = 1  # micro-steps that share a packing
    graph: bool = False  # layers: time replays of CUDA graphs, so that the host's time does not count
    compile_mode: str = "default"  # torch.compile's
    spmm: str = "auto"
    sizes: tuple[str, ...] = ()  # of e2e; none: what `scale` says
    widths: tuple[int, ...] = ()  # widths of gemm, ffn and block; empty: the grid of `scale`
    cache: Path | None = None  # verdicts on GEMMs that rows and suites share

    @property
    def toy(self) -> bool:
        return self.scale == "toy"


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16)


def compiled(net, settings: Settings):
    """torch.compile on a GPU; on a CPU, where it would take longer than all else, the net itself."""
    return net if settings.toy else torch.compile(net, dynamic=False, mode=settings.compile_mode)


def release(device: torch.device) -> None:
    """Forget what earlier rows compiled and allocated."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_ms(calls: list[Callable], settings: Settings, graph: bool = False) -> list[list[float]]:
    """Milliseconds of each call, one number per repetition; the calls take turns."""
    times = choose.time_interleaved(calls, settings.repetitions, graph, settings.device)
    return [[us / 1000 for us in one] for one in times]


def working_mib(call: Callable, device: torch.device) -> float | None:
    """MiB that one call needs at its peak beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def count_launches(call: Callable, device: torch.device) -> int | None:
    """CUDA kernels that one call launches, copies and fills left out; None on a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        synchronize(device)
    kernels = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s that a device-to-device copy moves, read and written."""
    size = 2**30 if device.type == "cuda" else 2**23
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2))
    (times,) = choose.time_interleaved([functools.partial(target.copy_, source)], 10, device=device)
    return 2e6 * size / statistics.median(times)


def measured_card(report, bandwidth: float) -> tuple[roofline.GPU, dict[str, float]] | None:
    """This card for the roofline, and the ratio of each GEMM, at the shapes of a report of `choose`; None without rows.

    The dense times of GEMMs of different shapes differ, so they are pooled: the times of all add up as measured. They
    are those of the pruned matrix, which a GPU at its power limit may multiply faster than a full one.
    """
    if report is None or not report.rows:
        return None
    dense = sum(row["dense_us"] for row in report.rows)
    chosen = sum(row["best_us"] if row["chosen"] else row["dense_us"] for row in report.rows)
    flops = sum(2 * row["m"] * row["n"] * row["k"] for row in report.rows)
    return roofline.GPU(1e6 * flops / dense, bandwidth), dict.fromkeys(roofline.GEMMS, dense / chosen)


def plan(config: GPTConfig, tokens: int, settings: Settings):
    """(plan or None, report) of ffn_plan.plan_ffn for this many tokens."""
    graph = settings.device.type == "cuda"  # by their time on the GPU, as train.py chooses them
    options = {"spmm": settings.spmm, "graph": graph, "cache": settings.cache}
    return ffn_plan.plan_ffn(config, tokens=tokens, device=settings.device, dtype=torch.bfloat16, mvue=True, **options)


def describe(chosen, report) -> str:
    """How the GEMMs of a plan are multiplied."""
    if chosen is None:
        return "layer by layer"
    how = {name: f"{c.backend} {c.order} {c.alg_id}/{c.split_k}" for name, c in report.choices.items()}
    return ", ".join(f"{name} {'dense' if how[name].startswith('masked') else how[name]}" for name in how)


# ---------------------------------------------------------------------------------------------------------------------
# gemm


def gemm_grid(settings: Settings) -> list[tuple[int, int]]:
    """(width, tokens), the most telling first."""
    if settings.toy:
        return [(64, 128)]
    widths, tokens = WIDTHS[:4], (16384, 65536, 8192)
    if settings.scale == "quick":
        widths, tokens = (768, 1600), (16384,)
    if settings.widths:
        widths, tokens = settings.widths, (16384,)
    return [(d, t) for t in tokens for d in widths]


def gemm_rows(case: tuple[int, int], settings: Settings):
    """The six GEMMs of a GELU layer of one width: the rows behind ffn_plan.plan_ffn's plan, with TFLOP/s."""
    d, tokens = case
    config = GPTConfig(n_embd=d, n_head=1, activation="gelu", bias=False)
    gemms = ffn_plan.ffn_gemms(d, config.d_ff, tokens, "gelu", False, True)
    _, report = plan(config, tokens, settings)
    print(report.text(), flush=True)
    for name, gemm in gemms.items():
        row = next((row for row in report.rows if row["name"] == name), gemm._asdict() | {"reason": "not timed here"})
        flops = 2e-6 * gemm.m * gemm.n * gemm.k  # over microseconds: TFLOP/s
        rates = {f"{key}_tflops": row.get(f"{key}_us") and flops / row[f"{key}_us"] for key in ("dense", "best")}
        yield {"d": d, "tokens": tokens} | row | rates


# ---------------------------------------------------------------------------------------------------------------------
# ffn and block


@dataclass
class Variant:
    """One way to compute a layer: its forward and backward, and what is due per optimizer step and per refresh."""

    call: Callable
    pack: Callable | None = None
    refresh: Callable | None = None
    report: object = None
    plan: str = ""


class _Forward24(torch.autograd.Function):
    """A 2:4 forward by PyTorch's own semi-structured tensors, and a dense backward: they have no other."""

    @staticmethod
    def forward(ctx, x, weight, packed, pruned):
        x = x.to(pruned.dtype)
        ctx.save_for_backward(x, pruned)
        return F.linear(x, packed)

    @staticmethod
    def backward(ctx, dy):
        x, pruned = ctx.saved_tensors
        return dy @ pruned, dy.flatten(0, -2).t() @ x.flatten(0, -2), None, None


class SemiStructuredLinear(torch.nn.Linear):
    """What a user would try first: torch.sparse.to_sparse_semi_structured of the pruned weight, after each step."""

    def repack(self, mask: torch.Tensor) -> None:
        self.pruned = torch.where(mask, self.weight.detach(), 0).bfloat16()
        self.packed = torch.sparse.to_sparse_semi_structured(self.pruned)

    @torch.compiler.disable
    def forward(self, x):
        return _Forward24.apply(x, self.weight, self.packed, self.pruned)


def _layer(kind: str, config: GPTConfig, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return (MLP if kind == "ffn" else Block)(config).to(device)


def _ffn_linears(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """(parent, attribute, linear) of the feed-forward layer's linears."""
    mlp = getattr(module, "mlp", module)
    return [(mlp, name, getattr(mlp, name)) for name in ("c_fc", "c_proj")]


def dense_variant(kind, config, x, dy, settings) -> Variant:
    module = _layer(kind, config, settings.device)
    return Variant(ffn_plan.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16))


def auto_variant(kind, config, x, dy, settings) -> Variant:
    """This repo's sparse layer, with the plan that ffn_plan.plan_ffn makes for the shape: train.py takes it only where
    ffn_plan.time_ways finds it faster than the 2:4 layers one by one."""
    module = _layer(kind, config, settings.device)
    sparsify(module, "fst", lambda name, _: "attn" not in name)
    chosen, report = plan(config, x.shape[0] * x.shape[1], settings)
    ffn_plan.set_plan(module, chosen)
    return Variant(
        ffn_plan.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16),
        functools.partial(pack_weights, module),
        functools.partial(refresh_masks, module, measure=False),
        report,
        describe(chosen, report),
    )


def semi_structured_variant(kind, config, x, dy, settings) -> Variant:
    module, masks = _layer(kind, config, settings.device), {}
    for parent, name, linear in _ffn_linears(module):
        swapped = SemiStructuredLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        swapped.weight = linear.weight
        masks[swapped] = transposable_mask(linear.weight)
        setattr(parent, name, swapped)

    def pack():
        for swapped, mask in masks.items():
            swapped.repack(mask)

    pack()
    return Variant(ffn_plan.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16), pack)


def torchao_variant(kind, config, x, dy, settings) -> Variant:
    """torchao's SemiSparseLinear on bf16 weights; it prunes and packs at every call."""
    from torchao.sparsity.training import SemiSparseLinear

    module = _layer(kind, config, settings.device)
    for parent, name, linear in _ffn_linears(module):
        setattr(parent, name, SemiSparseLinear.from_dense(linear.bfloat16()))
    return Variant(ffn_plan.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16))


VARIANTS = {
    "dense": dense_variant,
    "auto": auto_variant,
    "semi-structured": semi_structured_variant,
    "torchao": torchao_variant,
}


def layer_grid(kind: str, settings: Settings) -> list[tuple[str, int, int, int]]:
    """(activation, width, sequence, batch), the most telling first. The paper does not say which hidden width its
    Figure 6 has; ours is GPTConfig.d_ff: 4 d, and 2/3 of it for GEGLU."""
    if settings.toy:
        return [(activation, 192, 32, 2) for activation in ("gelu", "geglu")]
    if settings.scale == "full":
        grid = itertools.product(("geglu", "gelu"), WIDTHS, (2048, 1024, 512), (4, 8, 16, 32, 64))
        return [case for case in grid if case[1] * case[2] * case[3] <= 2**29]  # 1 GiB of bf16 input, 4 hidden
    widths = (1024, 4096) if settings.scale == "quick" else (768, 1024, 1600, 2048, 4096)
    widths = settings.widths or widths
    if kind == "ffn":
        return [("gelu", d, 1024, 16) for d in widths] + [("geglu", d, 2048, 8) for d in widths]
    return [("gelu", d, n, 16384 // n) for n in (1024, 2048, 512) for d in widths]


def layer_rows(kind: str, case: tuple[str, int, int, int], settings: Settings) -> Iterator[dict]:
    """The row of one shape of ffn or block: every variant, taking turns."""
    activation, d, n, batch = case
    config = GPTConfig(n_embd=d, n_head=d // 64, block_size=n, activation=activation, bias=False)
    row = {"activation": activation, "d": d, "d_ff": config.d_ff, "n": n, "batch": batch, "tokens": n * batch}
    dtype = torch.bfloat16 if kind == "ffn" else torch.float32  # what a LayerNorm hands on, and the residual stream
    torch.manual_seed(1)
    x, dy = (torch.randn(batch, n, d, device=settings.device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    variants, row["variants"] = {}, {}
    names = ("dense", "auto") if settings.graph else VARIANTS  # the others synchronise, which no graph can hold
    for name in names:
        try:
            variant = VARIANTS[name](kind, config, x, dy, settings)
            variant.call()  # compiles
            mib = working_mib(variant.call, settings.device)
            counts = {"launches": count_launches(variant.call, settings.device), "working_mib": mib}
            row["variants"][name] = {"host_us": choose.enqueue_us(variant.call, settings.device), **counts}
            variants[name] = variant
        except FAILURES as error:
            row["variants"][name] = {"reason": choose.reason(error)}
    row |= _measure_variants(variants, row["variants"], settings)
    if "auto" in variants:
        auto = variants["auto"]
        row["plan"] = auto.plan
        row |= layer_model(kind, row, measured_card(auto.report, copy_bandwidth(settings.device)), settings)
    yield row


def _measure_variants(variants: dict[str, Variant], rows: dict[str, dict], settings: Settings) -> dict:
    """Times of each variant into its row; returns S of each, {"s": {name: spread}}, against dense."""
    if not variants:
        return {"s": {}}
    graph = settings.graph and settings.device.type == "cuda"
    times = time_ms([v.call for v in variants.values()], settings, graph)
    totals = {}
    for (name, variant), ms in zip(variants.items(), times, strict=True):
        extra = {}
        for what, every in (("pack", 1), ("refresh", MASK_INTERVAL)):
            if call := getattr(variant, what):
                extra[what] = spread(time_ms([call], settings, graph)[0])
                ms = [t + extra[what]["median"] / (every * settings.accumulation) for t in ms]
        totals[name] = ms
        rows[name] |= {"ms": spread(ms)} | {f"{what}_ms": value for what, value in extra.items()}
    if "dense" not in totals:
        return {"s": {}}
    pairs = {name: zip(totals["dense"], ms, strict=True) for name, ms in totals.items() if name != "dense"}
    return {"s": {name: spread([dense / sparse for dense, sparse in both]) for name, both in pairs.items()}}


def layer_model(kind: str, row: dict, card, settings: Settings) -> dict:
    """S_model of a row with this card's own rates, and what was reached of it; nothing where no GEMM was timed."""
    if card is None:
        return {}
    gpu, ratio = card
    sparse = {"ratio": ratio, "accumulation": settings.accumulation, "mask_interval": MASK_INTERVAL}
    shape = (gpu, row["d"], row["d_ff"], row["tokens"])
    if kind == "ffn":
        s = roofline.s_model(*shape, row["activation"], **sparse)
    else:
        s = roofline.block_s_model(*shape, row["n"], row["activation"], **sparse)
    found = {"gemm_tflops": gpu.flops / 1e12, "gemm_ratio": ratio["z"], "copy_tb_per_s": gpu.bandwidth / 1e12}
    reached = {"measured_over_model": row["s"]["auto"]["median"] / s} if "auto" in row["s"] else {}
    return found | {"s_model": s} | reached


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


TOY = GPTConfig(vocab_size=128, block_size=32, n_layer=2, n_head=1, n_embd=64, bias=False)


def predict_step(gpu: roofline.GPU, config: GPTConfig, batch: int, sparse: dict | None, accumulation: int = 1) -> dict:
    shape = (config.n_layer, config.n_embd, config.d_ff, config.vocab_size, config.block_size)
    return roofline.train_step(gpu, *shape, batch, config.activation, accumulation, sparse)


def gpt2(size: str) -> GPTConfig:
    """GPT-2 of this size, or the model of a CPU's suites, "toy"."""
    if size == "toy":
        return TOY
    return GPTConfig(vocab_size=50304, block_size=1024, dropout=0.0, bias=False, **PRESETS[size])

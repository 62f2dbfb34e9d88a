"""The suites of bench.py: GEMMs, feed-forward layers, transformer blocks and whole training steps, dense beside 2:4.

A suite is a grid of cases and a generator of rows, plain dicts for JSON, from one case. Milliseconds unless a name says
otherwise; a spread is the median, smallest and largest of the repetitions. What a variant fails with is its `reason`.
On a CPU everything runs at toy sizes, to show that it works: what is timed there means nothing.
"""

import functools
import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import ffn
import roofline
import spmm_choice
from model import GPT, MLP, PRESETS, Block, GPTConfig, peak_flops
from sparse24 import RECIPES, refresh_masks, seed_draws, sparsify, transposable_mask

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
    times = spmm_choice.time_interleaved(calls, settings.repetitions, graph, settings.device)
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
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as recorded:
        call()
        synchronize(device)
    kernels = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels) if on_gpu else None


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s that a device-to-device copy moves, read and written."""
    size = 2**30 if device.type == "cuda" else 2**23
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2))
    (times,) = spmm_choice.time_interleaved([functools.partial(target.copy_, source)], 10, device=device)
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
    """(plan or None, report) of ffn.plan_ffn for this many tokens."""
    graph = settings.device.type == "cuda"  # by their time on the GPU, as train.py chooses them
    options = {"spmm": settings.spmm, "graph": graph, "cache": settings.cache}
    return ffn.plan_ffn(config, tokens=tokens, device=settings.device, dtype=torch.bfloat16, mvue=True, **options)


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
    """The six GEMMs of a GELU layer of one width: the rows behind ffn.plan_ffn's plan, with TFLOP/s."""
    d, tokens = case
    config = GPTConfig(n_embd=d, n_head=1, activation="gelu", bias=False)
    gemms = ffn.ffn_gemms(d, config.d_ff, tokens, "gelu", False, True)
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
    return Variant(ffn.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16))


def auto_variant(kind, config, x, dy, settings) -> Variant:
    """This repo's sparse layer, with the plan that ffn.plan_ffn makes for the shape: train.py takes it only where
    ffn.time_ways finds it faster than the 2:4 layers one by one."""
    module = _layer(kind, config, settings.device)
    sparsify(module, "fst", lambda name, _: "attn" not in name)
    chosen, report = plan(config, x.shape[0] * x.shape[1], settings)
    ffn.set_plan(module, chosen)
    return Variant(
        ffn.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16),
        functools.partial(ffn.pack_weights, module),
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
    return Variant(ffn.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16), pack)


def torchao_variant(kind, config, x, dy, settings) -> Variant:
    """torchao's SemiSparseLinear on bf16 weights; it prunes and packs at every call."""
    from torchao.sparsity.training import SemiSparseLinear

    module = _layer(kind, config, settings.device)
    for parent, name, linear in _ffn_linears(module):
        setattr(parent, name, SemiSparseLinear.from_dense(linear.bfloat16()))
    return Variant(ffn.forward_backward(compiled(module, settings), module, x, dy, torch.bfloat16))


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
            row["variants"][name] = {"host_us": spmm_choice.enqueue_us(variant.call, settings.device), **counts}
            variants[name] = variant
        except FAILURES as error:
            row["variants"][name] = {"reason": spmm_choice.reason(error)}
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
# e2e


class Run:
    """A GPT in training: `step` is one whole optimizer step on random tokens, all but the mask refresh.

    micro_steps: forward and backward passes per step. blocks: compile the blocks and the head one by one, which takes
    a deep model's time to compile from minutes to seconds."""

    def __init__(
        self,
        config: GPTConfig,
        sparse: bool,
        batch: int,
        settings: Settings,
        compile: bool = True,
        micro_steps: int = 1,
        blocks: bool = False,
    ):
        device = settings.device
        torch.manual_seed(0)
        with device:
            self.model = GPT(replace(config, sparse="fst" if sparse else "none"))
        decay = RECIPES["fst"].masked_decay if sparse else 0.0
        self.optimizer = self.model.configure_optimizers(0.1, 1.5e-4, (0.9, 0.95), device.type, decay)
        self.sparse, self.report, self.plan = sparse, None, None
        if sparse:
            self.plan, self.report = plan(config, batch * config.block_size, settings)
            ffn.set_plan(self.model, self.plan)
        self.net = compiled(self.model, settings) if compile and not blocks else self.model
        if compile and blocks:
            for block in self.model.transformer.h:
                block.compile(dynamic=False, mode=settings.compile_mode)
            self.model.head = compiled(self.model.head, settings)
        self.tokens = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
        self.iter_num, self.micro_steps = 0, micro_steps
        self.new_gradients = True
        if settings.compile_mode != "default":
            self.keep_gradients()

    def micro_step(self) -> None:
        """Forward and backward: gradients are added to what is there."""
        with autocast(self.tokens.device):
            _, loss = self.net(*self.tokens)
        (loss / self.micro_steps).backward()

    def capture(self) -> None:
        """From now on the micro-step is the replay of one CUDA graph, so that the host's time does not count."""
        self.keep_gradients()
        self.micro_step = spmm_choice._captured(self.micro_step)

    def keep_gradients(self) -> None:
        """A CUDA graph overwrites what it returned at its next replay, so gradients are summed in tensors of ours."""
        self.new_gradients = False
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def step(self) -> None:
        for micro_step in range(self.micro_steps):
            if self.sparse:
                seed_draws(self.model, 1, self.iter_num, micro_step)
            torch.compiler.cudagraph_mark_step_begin()
            self.micro_step()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.new_gradients)
        if self.sparse:
            ffn.pack_weights(self.model)
        self.iter_num += 1

    def refresh(self) -> None:
        """The mask search. The weights must be packed again before the next step."""
        refresh_masks(self.model, measure=False)


def measure_run(config: GPTConfig, sparse: bool, batch: int, settings: Settings) -> tuple[dict, object]:
    """Speed, memory and launches of one variant, and the report behind its plan."""
    device = settings.device
    release(device)
    run = Run(config, sparse, batch, settings)
    if device.type == "cuda":  # what the choice of GEMMs took is no memory of the run's
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        run.step()  # compiles
    (ms,) = time_ms([run.step], settings)
    row = {"variant": "sparse" if sparse else "dense"}
    if sparse:
        refresh = spread(time_ms([run.refresh], settings)[0])
        ffn.pack_weights(run.model)
        ms = [t + refresh["median"] / MASK_INTERVAL for t in ms]
        row |= {"refresh_ms": refresh, "plan": describe(run.plan, run.report)}
    speed = batch * config.block_size / statistics.median(ms) * 1000
    row |= {"ms": spread(ms), "tokens_per_s": speed, "mfu": run.model.estimate_mfu(speed, peak_flops(device))}
    row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    row["launches"] = count_launches(run.step, device)
    row["host_us"] = spmm_choice.enqueue_us(run.step, device)
    return row, run.report


def e2e_row(size: str, config: GPTConfig, batch: int, settings: Settings) -> dict:
    """Dense, sparse and dense again, one after the other: what dense changed by is the run's drift.

    Raises torch.cuda.OutOfMemoryError where the batch does not fit."""
    runs, report = [], None
    for sparse in (False, True, False):
        row, found = measure_run(config, sparse, batch, settings)
        report = found or report
        runs.append(row)
    before, sparse_ms, after = (row["ms"]["median"] for row in runs)
    row = {"size": size, "batch": batch, "d": config.n_embd, "runs": runs, "drift": after / before - 1}
    row["s_measured"] = (before + after) / 2 / sparse_ms
    card = measured_card(report, copy_bandwidth(settings.device))
    if card is not None:
        row["s_model"] = step_model(card[0], config, batch, card[1])
        row["measured_over_model"] = row["s_measured"] / row["s_model"]
    return row


def step_model(gpu: roofline.GPU, config: GPTConfig, batch: int, ratio) -> float:
    """S_model of a whole step."""
    dense, sparse = (predict_step(gpu, config, batch, one)["ms"] for one in (None, {"ratio": ratio}))
    return dense / sparse


def predict_step(gpu: roofline.GPU, config: GPTConfig, batch: int, sparse: dict | None, accumulation: int = 1) -> dict:
    shape = (config.n_layer, config.n_embd, config.d_ff, config.vocab_size, config.block_size)
    return roofline.train_step(gpu, *shape, batch, config.activation, accumulation, sparse)


def gpt2(size: str) -> GPTConfig:
    return GPTConfig(vocab_size=50304, block_size=1024, dropout=0.0, bias=False, **PRESETS[size])


TOY = GPTConfig(vocab_size=128, block_size=32, n_layer=2, n_head=1, n_embd=64, bias=False)


def largest_batch(fits: Callable[[int], bool], start: int = 4, limit: int = 4096) -> int:
    """The largest batch that fits, to an eighth: doubled from `start` until one does not, then bisected; 0 if none."""
    low, high = 0, start
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_in_memory(config: GPTConfig, settings: Settings, batch: int) -> bool:
    """Whether a dense step, not compiled, which needs at least what the compiled one does, has the memory it needs."""
    release(settings.device)
    try:
        run = Run(config, False, batch, settings, compile=False)
        run.step()
        run.step()  # the optimizer's state is there from the first on
        synchronize(settings.device)
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def e2e_grid(settings: Settings) -> list[tuple[str, GPTConfig, int | None]]:
    """(size, config, batch); batch None asks for the largest that fits."""
    if settings.toy:
        return [("toy", TOY, 2), ("toy", TOY, None)]
    sizes = settings.sizes or (("124M", "774M") if settings.scale == "quick" else tuple(PRESETS))
    cases = [(size, gpt2(size), PAPER_BATCH[size]) for size in sizes]
    largest = [] if settings.scale == "quick" else [(size, config, None) for size, config, _ in cases]
    return cases + largest


def e2e_rows(case, settings: Settings):
    """One row; where sparse needs more memory than the dense step that was tried, at a smaller batch."""
    size, config, wanted = case
    fits = functools.partial(fits_in_memory, config, settings)
    batch = wanted or largest_batch(fits, 2 if settings.toy else 8, 4 if settings.toy else 4096)
    while batch:
        try:
            yield e2e_row(size, config, batch, settings) | {"largest": wanted is None}
            return
        except RuntimeError as error:
            if "out of memory" not in str(error):  # compilers wrap it in errors of their own
                raise
            failed = {"size": size, "batch": batch, "largest": wanted is None, "reason": spmm_choice.reason(error)}
        batch = 0 if wanted else batch - max(1, batch // 8)
    yield failed if wanted else {"size": size, "largest": True, "reason": "no batch fits in memory"}


# ---------------------------------------------------------------------------------------------------------------------

# suite -> (its cases, the rows of one case)
SUITES: dict[str, tuple[Callable, Callable[..., Iterator[dict]]]] = {
    "gemm": (gemm_grid, gemm_rows),
    "ffn": (functools.partial(layer_grid, "ffn"), functools.partial(layer_rows, "ffn")),
    "block": (functools.partial(layer_grid, "block"), functools.partial(layer_rows, "block")),
    "e2e": (e2e_grid, e2e_rows),
}


def suite_rows(suite: str, settings: Settings) -> Iterator[dict]:
    """All rows of a suite within its budget. A case that fails, or is left out, is a row that says why."""
    grid, rows_of = SUITES[suite]
    start = time.perf_counter()
    for case in grid(settings):
        shown = {"case": [part for part in case if not isinstance(part, GPTConfig)]}
        if time.perf_counter() - start > settings.budget * (4 if suite == "e2e" else 1):
            yield shown | {"reason": "left out: the suite's time was up"}
            continue
        release(settings.device)
        try:
            yield from rows_of(case, settings)
        except Exception as error:  # the cases after it are worth having; bench.py ends with an error for it
            traceback.print_exc()
            yield shown | {"reason": spmm_choice.reason(error)}

"""Whole optimizer steps of GPT-2, dense and 2:4 taking turns: python -m benchmarks.steps OUT.json [--verdicts FILE]

The 2:4 model is fst's, or --method's. Both models have the activation that the method needs, else GELU. Both are in
memory, and each repetition runs one step of each, so that clocks and temperature are the same for both. A step consists
of the micro-steps, clipping, AdamW and packing. The mask search is timed alone, and its share of a step, 1/40 for fst,
is added to the sparse step. Blocks and head are compiled one by one. Steps are timed twice: with kernels launched one
by one, and with each micro-step replayed from a CUDA graph, so that the host's time does not count. Each row also has
tokens/s, MFU, peak memory, kernel launches, the host's time to enqueue a step, and the GPU's time by kernel.

`python bench.py --suite e2e` measures the same steps at the batches of the paper's Table 8. On a CPU there are no CUDA
graphs and no numbers about the GPU.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.machine import copy_bandwidth, spread
from benchmarks.roofline import options_of, predict_step
from benchmarks.suites import Settings, compiled, describe, measured_card, over, plan, time_ms
from gemm24 import choose
from gemm24 import plan as ffn_plan
from gemm24.ffn import pack_weights
from model import GPT, PRESETS, GPTConfig, peak_flops
from sparse24 import refresh_masks, seed_draws, use_kernels

PAPER_BATCH = {"124M": 16, "350M": 16, "774M": 5, "1558M": 4}  # Table 8, which has no 1558M
TOY = GPTConfig(vocab_size=128, block_size=32, n_layer=2, n_head=1, n_embd=64, bias=False)  # the model on a CPU
TOP = 30  # number of kernels that a row lists
NAME = 120  # characters of a kernel's name


class Case(NamedTuple):
    size: str
    batch: int  # sequences of 1,024 tokens per micro-step
    micro_steps: int


CASES = [Case("774M", 16, 2), Case("124M", 16, 4), Case("1558M", 8, 2)]


def cases(settings: Settings) -> list[Case]:
    """The cases of bench.py's suite e2e: the batches of the paper's Table 8, which are one micro-step each."""
    if settings.toy:
        return [Case("toy", 2, 1)]
    sizes = settings.sizes or (("124M", "774M") if settings.scale == "quick" else PAPER_BATCH)
    return [Case(size, PAPER_BATCH[size], 1) for size in sizes]


def gpt2(size: str) -> GPTConfig:
    """The configuration of GPT-2 of this size, or of "toy"."""
    if size == "toy":
        return TOY
    return GPTConfig(vocab_size=50304, block_size=1024, dropout=0.0, bias=False, **PRESETS[size])


class Run:
    """A GPT in training. `step` is one optimizer step on random tokens, without the mask refresh.

    micro_steps: forward and backward passes per step. Blocks and head are compiled one by one, which takes seconds;
    compiling a deep model as one graph takes minutes."""

    def __init__(self, config: GPTConfig, sparse: bool, batch: int, settings: Settings, micro_steps: int = 1):
        device = settings.device
        torch.manual_seed(0)
        with device:
            self.model = GPT(replace(config, sparse=settings.method if sparse else "none"))
        decay = settings.recipe.masked_decay if sparse else 0.0
        self.optimizer = self.model.configure_optimizers(0.1, 1.5e-4, (0.9, 0.95), device.type, decay)
        self.sparse, self.report, self.plan = sparse, None, None
        if sparse:
            for block in self.model.transformer.h:
                ffn_plan.set_phase(block.mlp, sparse=True)
            self.plan, self.report = plan(config, batch * config.block_size, settings)
            ffn_plan.set_plan(self.model, self.plan)
        if not settings.toy:
            for block in self.model.transformer.h:
                block.compile(dynamic=False)
            self.model.head = compiled(self.model.head, settings)
        self.tokens = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
        # In iteration 0 methods may measure.
        self.iter_num, self.micro_steps, self.new_gradients = 1, micro_steps, True

    def micro_step(self) -> None:
        """Forward and backward. Adds to the gradients."""
        with torch.autocast(self.tokens.device.type, torch.bfloat16):
            _, loss = self.model(*self.tokens)
        (loss / self.micro_steps).backward()

    def capture(self) -> None:
        """Replace the micro-step by replays of one CUDA graph. A replay writes to the same memory each time, so the
        gradient tensors are allocated before and never freed."""
        self.new_gradients = False
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.micro_step = choose._captured(self.micro_step)

    def step(self) -> None:
        for micro_step in range(self.micro_steps):
            if self.sparse:
                seed_draws(self.model, 1, self.iter_num, micro_step)
            self.micro_step()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.new_gradients)
        if self.sparse:
            pack_weights(self.model)
        self.iter_num += 1


def kernel_times(call) -> dict[str, list]:
    """{kernel name: [launches, microseconds]} of one call, longest first, including copies and fills."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum_by_name((e.name, e.device_time) for e in recorded.events() if e.device_type == DeviceType.CUDA)


def sum_by_name(events: Iterable[tuple[str, float]]) -> dict[str, list]:
    """events: (name, microseconds). Cuts names at NAME characters and adds up equal ones. Skips the optimizer's step,
    which the profiler reports as a kernel."""
    launches, us = Counter(), Counter()
    for name, microseconds in events:
        if not name.startswith("Optimizer."):
            launches[name[:NAME]] += 1
            us[name[:NAME]] += microseconds
    return {name: [launches[name], round(total, 1)] for name, total in us.most_common()}


def describe_step(run: Run, device: torch.device, others_bytes: int) -> dict:
    """Memory, launches and host time of one step. others_bytes: memory of the other model, which does not count."""
    row = {"host_us": choose.enqueue_us(run.step, device)}
    if device.type != "cuda":
        return row
    torch.cuda.reset_peak_memory_stats(device)
    run.step()
    torch.cuda.synchronize()
    row["peak_gib"] = (torch.cuda.max_memory_allocated(device) - others_bytes) / 2**30
    kernels = kernel_times(run.step)
    row["launches"] = sum(count for count, _ in kernels.values())
    row["gpu_us"] = sum(us for _, us in kernels.values())
    return row | {"kernels": dict(list(kernels.items())[:TOP])}


def timed(runs: dict[str, Run], tokens: int, refresh_ms: float, settings: Settings) -> dict:
    """Time the steps of both runs in turns. Returns {"dense", "sparse": ms, tokens/s and MFU; "s": spread of S}."""
    dense_ms, sparse_ms = time_ms([run.step for run in runs.values()], settings)
    sparse_ms = [ms + refresh_ms / settings.recipe.mask_interval for ms in sparse_ms]
    results = {"s": over(dense_ms, sparse_ms)}
    for (name, run), ms in zip(runs.items(), (dense_ms, sparse_ms), strict=True):
        speed = 1000 * tokens / statistics.median(ms)
        mfu = run.model.estimate_mfu(speed, peak_flops(settings.device))
        results[name] = {"ms": spread(ms), "tokens_per_s": speed, "mfu": mfu}
    return results


def row_of(case: Case, settings: Settings) -> dict:
    """Measure one case."""
    config, device, runs = gpt2(case.size), settings.device, {}
    config = replace(config, activation=settings.recipe.activation or config.activation)
    on_gpu = device.type == "cuda"
    row = case._asdict() | {"tokens": case.batch * case.micro_steps * config.block_size}
    for name in ("dense", "sparse"):
        start, before = time.perf_counter(), torch.cuda.memory_allocated(device) if on_gpu else 0
        run = Run(config, name == "sparse", case.batch, settings, case.micro_steps)
        run.step()
        run.step()
        row[name] = {"seconds to the second step": time.perf_counter() - start} | describe_step(run, device, before)
        runs[name] = run
    sparse = runs["sparse"]
    row["plan"] = describe(sparse.plan, sparse.report)
    row["refresh_ms"] = spread(time_ms([partial(refresh_masks, sparse.model, measure=False)], settings)[0])
    pack_weights(sparse.model)  # with the new masks
    time_steps = partial(timed, runs, row["tokens"], row["refresh_ms"]["median"], settings)
    row["compiled"] = time_steps()
    if on_gpu:
        for run in runs.values():
            run.capture()
        row["graphs"] = time_steps()
    if card := measured_card(sparse.report, copy_bandwidth(device)):
        gpu, ratio = card  # this card's measured rates
        ways = (None, options_of(settings.recipe, ratio))
        dense_ms, sparse_ms = (predict_step(gpu, config, case.batch, one, case.micro_steps)["ms"] for one in ways)
        row["s_model"] = dense_ms / sparse_ms
    return row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--verdicts", type=Path, help="file of cached choices of GEMMs")
    parser.add_argument("--method", default="fst")
    parser.add_argument("--sizes", nargs="+", choices=PRESETS)
    args = parser.parse_args(argv)
    settings = Settings(machine.device(), repetitions=5, cache=args.verdicts, method=args.method)
    use_kernels(settings.device)
    torch.set_float32_matmul_precision("high")
    cases = [case for case in CASES if not args.sizes or case.size in args.sizes]
    rows = ((case._asdict(), partial(row_of, case, settings)) for case in cases)
    return machine.write_rows(args.out, rows, ("dense", "sparse"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

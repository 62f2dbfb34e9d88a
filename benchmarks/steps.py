"""Whole optimizer steps of GPT-2, dense and fst taking turns: python -m benchmarks.steps OUT.json [--verdicts FILE]

Both models are in memory, and each repetition is one step of each, so that clocks and temperature are the same for
both. A step is the micro-steps, the clipping, AdamW and the packing of the weights; the mask search is timed alone, and
a fortieth of it is added to the sparse step. Blocks and head are compiled one by one. Steps are timed twice: as they
are, and with each micro-step replayed from one CUDA graph, so that the host's time does not count. Each row also has
tokens/s, MFU, peak memory, kernel launches, the host's time to enqueue a step, and where the GPU's time goes.

`python bench.py --suite e2e` measures the same steps at the batches of the paper's Table 8. On a CPU, steps are timed
once, and what only a GPU has is left out.
"""

import argparse
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import roofline
from benchmarks.suites import (
    MASK_INTERVAL,
    PAPER_BATCH,
    Settings,
    autocast,
    compiled,
    copy_bandwidth,
    describe,
    gpt2,
    measured_card,
    plan,
    predict_step,
    release,
    spread,
    time_ms,
)
from gemm24 import choose
from gemm24 import plan as ffn_plan
from gemm24.ffn import pack_weights
from model import GPT, GPTConfig, peak_flops
from runtime.ranks import environment, write_json
from sparse24 import RECIPES, refresh_masks, seed_draws, use_kernels

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


class Run:
    """A GPT in training: `step` is one whole optimizer step on random tokens, all but the mask refresh.

    micro_steps: forward and backward passes per step. Blocks and head are compiled one by one, which takes seconds
    where the whole of a deep model takes minutes."""

    def __init__(
        self,
        config: GPTConfig,
        sparse: bool,
        batch: int,
        settings: Settings,
        micro_steps: int = 1,
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
            ffn_plan.set_plan(self.model, self.plan)
        if not settings.toy:
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
            _, loss = self.model(*self.tokens)
        (loss / self.micro_steps).backward()

    def capture(self) -> None:
        """From now on the micro-step is the replay of one CUDA graph, so that the host's time does not count."""
        self.keep_gradients()
        self.micro_step = choose._captured(self.micro_step)

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
            pack_weights(self.model)
        self.iter_num += 1

    def refresh(self) -> None:
        """The mask search. The weights must be packed again before the next step."""
        refresh_masks(self.model, measure=False)


def kernel_times(call) -> dict[str, list]:
    """{kernel name: [launches, microseconds]} of one call, the longest first. Copies and fills count too."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum_by_name((e.name, e.device_time) for e in recorded.events() if e.device_type == DeviceType.CUDA)


def sum_by_name(events: Iterable[tuple[str, float]]) -> dict[str, list]:
    """events: (name, microseconds). Names are cut at NAME characters, and equal ones are added up. The profiler also
    marks the optimizer's step as if it were a kernel, which it is not."""
    launches, us = Counter(), Counter()
    for name, microseconds in events:
        if not name.startswith("Optimizer."):
            launches[name[:NAME]] += 1
            us[name[:NAME]] += microseconds
    return {name: [launches[name], round(total, 1)] for name, total in us.most_common()}


def describe_step(run: Run, device: torch.device, others_bytes: int) -> dict:
    """Memory, launches and host time of one step. others_bytes: what is allocated for another model."""
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
    """{"dense": ..., "sparse": ..., "s": ...}: milliseconds, tokens/s and MFU of a step of each, taking turns."""
    dense_ms, sparse_ms = time_ms([run.step for run in runs.values()], settings)
    sparse_ms = [ms + refresh_ms / MASK_INTERVAL for ms in sparse_ms]
    found = {"s": spread([dense / sparse for dense, sparse in zip(dense_ms, sparse_ms, strict=True)])}
    for (name, run), ms in zip(runs.items(), (dense_ms, sparse_ms), strict=True):
        speed = 1000 * tokens / statistics.median(ms)
        mfu = run.model.estimate_mfu(speed, peak_flops(settings.device))
        found[name] = {"ms": spread(ms), "tokens_per_s": speed, "mfu": mfu}
    return found


def row_of(case: Case, settings: Settings) -> dict:
    config, device, runs = gpt2(case.size), settings.device, {}
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
    row["refresh_ms"] = spread(time_ms([sparse.refresh], settings)[0])
    pack_weights(sparse.model)
    asked = (runs, row["tokens"], row["refresh_ms"]["median"], settings)
    row["compiled"] = timed(*asked)
    if on_gpu and settings.compile_mode == "default":  # the other modes capture graphs of their own
        for run in runs.values():
            run.capture()
        row["graphs"] = timed(*asked)
    if card := measured_card(sparse.report, copy_bandwidth(device)):
        row |= step_model(*card, config, case)
    return row


def step_model(gpu: roofline.GPU, ratio: dict[str, float], config: GPTConfig, case: Case) -> dict:
    """S_model of a step with this card's own rates."""
    both = (None, {"ratio": ratio, "mask_interval": MASK_INTERVAL})
    dense, sparse = (predict_step(gpu, config, case.batch, one, case.micro_steps)["ms"] for one in both)
    return {"s_model": dense / sparse}


def rows(case: Case, settings: Settings) -> Iterator[dict]:
    """The row of one case, as bench.py's suites give theirs."""
    yield row_of(case, settings)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--verdicts", type=Path, help="a file of verdicts on GEMMs, as bench.py writes it")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device())
    use_kernels(device)
    torch.set_float32_matmul_precision("high")
    results, failed = {"environment": environment(device, 1), "rows": []}, False
    for case in CASES:
        settings = Settings(device, repetitions=5, cache=args.verdicts)
        try:
            release(device)
            row = row_of(case, settings)
        except Exception as error:  # named in the results, and the cases after it are worth having
            traceback.print_exc()
            row, failed = case._asdict() | {"reason": choose.reason(error)}, True
        results["rows"].append(row)
        write_json(args.out, results)
        print({key: value for key, value in row.items() if key not in ("dense", "sparse")}, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whole optimizer steps of GPT-2, dense and fst taking turns: python -m benchmarks.steps OUT.json [--verdicts FILE]

Both models are in memory, and each repetition is one step of each, so that clocks and temperature are the same for
both. A step is the micro-steps, the clipping, AdamW and the packing of the weights; the mask search is timed alone, and
a fortieth of it is added to the sparse step. GEMMs are chosen by their time on the GPU. Each row has the times,
tokens/s, MFU, peak memory, kernel launches, the host's time to enqueue a step, and where the GPU's time goes.
"""

import argparse
import statistics
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import spmm_choice
from bench_suites import MASK_INTERVAL, Run, Settings, describe, gpt2, host_us, release, spread, time_ms
from ffn import pack_weights
from model import peak_flops
from runtime import environment, write_json

TOP = 30  # kernels by name that a row lists


class Case(NamedTuple):
    size: str
    batch: int  # sequences of 1,024 tokens per micro-step
    micro_steps: int
    compile_mode: str
    blocks: bool  # compile block by block


CASES = [
    Case("774M", 16, 4, "default", True),
    Case("124M", 16, 4, "default", True),
    Case("124M", 16, 4, "reduce-overhead", False),
]


def kernel_times(call) -> dict[str, list]:
    """{kernel name: [launches, microseconds]} of one call, the longest first."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    launches, us = Counter(), Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches[event.name] += 1
            us[event.name] += event.device_time
    return {name[:120]: [launches[name], round(us[name], 1)] for name, _ in us.most_common()}


def describe_step(run: Run, device: torch.device, others_bytes: int) -> dict:
    """Memory, launches and host time of one step. others_bytes: what is allocated for another model."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    run.step()
    torch.cuda.synchronize()
    row = {"peak_gib": (torch.cuda.max_memory_allocated(device) - others_bytes) / 2**30}
    row["host_us"] = host_us(run.step, device)
    kernels = kernel_times(run.step)
    row["launches"] = sum(count for count, _ in kernels.values())
    row["gpu_us"] = sum(us for _, us in kernels.values())
    return row | {"kernels": dict(list(kernels.items())[:TOP])}


def row_of(case: Case, settings: Settings, device: torch.device) -> dict:
    release(device)
    config = gpt2(case.size)
    row, runs = case._asdict() | {"tokens": case.batch * case.micro_steps * config.block_size}, {}
    for name in ("dense", "sparse"):
        before = torch.cuda.memory_allocated(device)
        how = {"micro_steps": case.micro_steps, "blocks": case.blocks}
        runs[name] = Run(config, name == "sparse", case.batch, settings, **how)
        for _ in range(3):
            runs[name].step()
        row[name] = describe_step(runs[name], device, before)
    sparse = runs["sparse"]
    row["plan"] = describe(sparse.plan, sparse.report)
    (refresh,) = time_ms([sparse.refresh], settings)
    pack_weights(sparse.model)
    dense_ms, sparse_ms = time_ms([runs["dense"].step, sparse.step], settings)
    sparse_ms = [ms + statistics.median(refresh) / MASK_INTERVAL for ms in sparse_ms]
    row["refresh_ms"] = spread(refresh)
    for name, ms in (("dense", dense_ms), ("sparse", sparse_ms)):
        speed = 1000 * row["tokens"] / statistics.median(ms)
        row[name] |= {"ms": spread(ms), "tokens_per_s": speed}
        row[name]["mfu"] = runs[name].model.estimate_mfu(speed, peak_flops(device))
    return row | {"s": spread([dense / one for dense, one in zip(dense_ms, sparse_ms, strict=True)])}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--verdicts", type=Path, help="a file of verdicts on GEMMs, as bench.py writes it")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("high")
    results, failed = {"environment": environment(device, 1), "rows": []}, False
    for case in CASES:
        settings = Settings(device, repetitions=7, graph=True, compile_mode=case.compile_mode, cache=args.verdicts)
        try:
            row = row_of(case, settings, device)
        except Exception as error:  # named in the results, and the cases after it are worth having
            traceback.print_exc()
            row, failed = case._asdict() | {"reason": spmm_choice.reason(error)}, True
        results["rows"].append(row)
        write_json(args.out, results)
        shown = {key: value for key, value in row.items() if key not in ("dense", "sparse")}
        for name in ("dense", "sparse"):
            shown |= {name: {key: value for key, value in row.get(name, {}).items() if key != "kernels"}}
        print(shown, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

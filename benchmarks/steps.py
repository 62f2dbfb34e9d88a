"""Whole optimizer steps of GPT-2, dense and fst taking turns: python -m benchmarks.steps OUT.json [--verdicts FILE]

Both models are in memory, and each repetition is one step of each, so that clocks and temperature are the same for
both. A step is the micro-steps, the clipping, AdamW and the packing of the weights; the mask search is timed alone, and
a fortieth of it is added to the sparse step. Blocks and head are compiled one by one. Steps are timed twice: as they
are, and with each micro-step replayed from one CUDA graph, so that the host's time does not count. Each row also has
tokens/s, MFU, peak memory, kernel launches, the host's time to enqueue a step, and where the GPU's time goes.
"""

import argparse
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import spmm_choice
from bench_suites import MASK_INTERVAL, Run, Settings, describe, gpt2, release, spread, time_ms
from ffn import pack_weights
from model import peak_flops
from runtime import environment, write_json

TOP = 30  # number of kernels that a row lists
NAME = 120  # characters of a kernel's name


class Case(NamedTuple):
    size: str
    batch: int  # sequences of 1,024 tokens per micro-step
    micro_steps: int


CASES = [Case("774M", 16, 2), Case("124M", 16, 4), Case("1558M", 8, 2)]


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
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    run.step()
    torch.cuda.synchronize()
    row = {"peak_gib": (torch.cuda.max_memory_allocated(device) - others_bytes) / 2**30}
    row["host_us"] = spmm_choice.enqueue_us(run.step, device)
    kernels = kernel_times(run.step)
    row["launches"] = sum(count for count, _ in kernels.values())
    row["gpu_us"] = sum(us for _, us in kernels.values())
    return row | {"kernels": dict(list(kernels.items())[:TOP])}


def timed(runs: dict[str, Run], tokens: int, refresh_ms: float, settings: Settings, device: torch.device) -> dict:
    """{"dense": ..., "sparse": ..., "s": ...}: milliseconds, tokens/s and MFU of a step of each, taking turns."""
    dense_ms, sparse_ms = time_ms([run.step for run in runs.values()], settings)
    sparse_ms = [ms + refresh_ms / MASK_INTERVAL for ms in sparse_ms]
    found = {"s": spread([dense / sparse for dense, sparse in zip(dense_ms, sparse_ms, strict=True)])}
    for (name, run), ms in zip(runs.items(), (dense_ms, sparse_ms), strict=True):
        speed = 1000 * tokens / statistics.median(ms)
        mfu = run.model.estimate_mfu(speed, peak_flops(device))
        found[name] = {"ms": spread(ms), "tokens_per_s": speed, "mfu": mfu}
    return found


def row_of(case: Case, settings: Settings, device: torch.device) -> dict:
    release(device)
    config, runs = gpt2(case.size), {}
    row = case._asdict() | {"tokens": case.batch * case.micro_steps * config.block_size}
    for name in ("dense", "sparse"):
        start, before = time.perf_counter(), torch.cuda.memory_allocated(device)
        run = Run(config, name == "sparse", case.batch, settings, micro_steps=case.micro_steps, blocks=True)
        run.step()
        run.step()
        row[name] = {"seconds to the second step": time.perf_counter() - start} | describe_step(run, device, before)
        print(case.size, name, {key: value for key, value in row[name].items() if key != "kernels"}, flush=True)
        runs[name] = run
    sparse = runs["sparse"]
    row["plan"] = describe(sparse.plan, sparse.report)
    row["refresh_ms"] = spread(time_ms([sparse.refresh], settings)[0])
    pack_weights(sparse.model)
    how = (runs, row["tokens"], row["refresh_ms"]["median"], settings, device)
    row["compiled"] = timed(*how)
    for run in runs.values():
        run.capture()
    return row | {"graphs": timed(*how)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--verdicts", type=Path, help="a file of verdicts on GEMMs, as bench.py writes it")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("high")
    results, failed = {"environment": environment(device, 1), "rows": []}, False
    for case in CASES:
        settings = Settings(device, repetitions=5, cache=args.verdicts)
        try:
            row = row_of(case, settings, device)
        except Exception as error:  # named in the results, and the cases after it are worth having
            traceback.print_exc()
            row, failed = case._asdict() | {"reason": spmm_choice.reason(error)}, True
        results["rows"].append(row)
        write_json(args.out, results)
        print({key: value for key, value in row.items() if key not in ("dense", "sparse")}, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

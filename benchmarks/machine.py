"""A description of the machine, and helpers that all measurements share."""

import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from configurator import write_json
from gemm24 import choose
from runtime.ranks import environment


def device() -> torch.device:
    """The current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> dict:
    """The environment of a measurement: versions, commit, and the GPU's name, size and driver."""
    description = environment(device, 1) | {"python": platform.python_version()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        description |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        description |= {"sms": card.multi_processor_count, "cusparselt": torch.backends.cusparselt.version()}
        description |= {"memory_bytes": card.total_memory, "l2_bytes": card.L2_cache_size}
        description |= {"driver": gpu_state().get("driver_version")}
    return description


def gpu_state() -> dict:
    """The GPU's name, driver, clocks (MHz), power (W) and temperature (C), from nvidia-smi; or {"reason": error}."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    keys = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits", f"--id={card}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"reason": str(error)}
    return dict(zip(keys, (value.strip() for value in done.stdout.split(",")), strict=True))


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a device-to-device copy, reads plus writes."""
    size = 2**30 if device.type == "cuda" else 2**23
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2))
    (times,) = choose.time_interleaved([functools.partial(target.copy_, source)], 10, device=device)
    return 2e6 * size / statistics.median(times)


def release(device: torch.device) -> None:
    """Free the compiled code and the memory of earlier rows."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def attempt(make: Callable[[], dict | list[dict]]) -> dict | list[dict]:
    """The rows that `make` measures, or {"reason": error}, so that a failure does not stop the rows after it."""
    try:
        return make()
    except Exception as error:  # the caller's command reports it at its end
        traceback.print_exc()
        return {"reason": choose.reason(error)}


def write_rows(path: Path, rows: Iterable[tuple[dict, Callable[[], dict]]], hidden: tuple[str, ...]) -> int:
    """Measure rows and write the JSON file after each of them. Returns the exit status: 1 if a row failed, else 0.

    rows: (keys that name the row, call that measures it). hidden: keys that are not printed. A failed row has its name
    and a "reason"."""
    results = {"environment": environment(device(), 1), "rows": []}
    for name, make in rows:
        release(device())
        row = attempt(make)
        results["rows"].append(row | name if "reason" in row else row)
        write_json(path, results)
        print({key: value for key, value in results["rows"][-1].items() if key not in hidden}, flush=True)
    return int(any("reason" in row for row in results["rows"]))

"""Probe a GPU, its 2:4 library and our kernels in about a minute: python -m benchmarks.probe OUT.json [part ...]

Parts, in this order:
    kernels   compare each kernel with its specification
    machine   card, versions, copy bandwidth, and the rate of a large GEMM
    order     compare our packed bytes with those of the library's compress
    host      microseconds that the host takes to enqueue a GEMM
    graph     capture a GEMM in a CUDA graph, and replay it with other inputs
Each part's result is written before the next part begins. A part that fails gives its reason.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sparse24
from benchmarks import machine as this_machine
from benchmarks.machine import attempt, copy_bandwidth, device
from configurator import write_json
from gemm24 import choose, cusparselt
from gemm24 import plan as ffn_plan
from gemm24.layout import compress24
from gemm24.matmul import Choice, Gemm, matmul24
from gemm24.operands import activation, mvue24_pack, pack_matrix

CUSPARSELT = Choice("cusparselt", "library")
SHAPES = [  # (rows, columns): small, odd multiples, the weights of GPT-2, a gradient
    *((64, 64), (64, 128), (128, 64), (128, 128), (192, 128), (320, 192), (192, 320), (256, 512), (384, 128)),
    *((768, 3072), (3072, 768), (1280, 5120), (1600, 6400), (6400, 1600), (4096, 16384), (768, 16384)),
]
WIDTH = 8192  # the GEMM that measures the card's rate has this width
PACKED = ((1280, 5120), (5120, 16384))  # matrices whose packing is timed


def median_us(call: Callable) -> float:
    return statistics.median(choose.time_interleaved([call], 7, False, device())[0])


def machine() -> dict:
    """Card, versions, and the rates of a copy and of a large GEMM."""
    a, b = (torch.randn(WIDTH, WIDTH, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return this_machine.machine(device()) | {
        "copy_tb_per_s": copy_bandwidth(device()) / 1e12,
        "product_tflops": 2e-6 * WIDTH**3 / median_us(lambda: a @ b),
        "schema": str(torch.ops.aten._cslt_sparse_mm.default._schema),
    }


def kernels() -> dict:
    """Compare the Triton kernels with their specifications."""
    return {"status": sparse24.use_kernels(device())}


def compare_order(rows: int, columns: int) -> dict:
    """Compare our packers' bytes at this shape with the library's."""
    x = choose.random_24(rows, columns, device())
    blob = torch._cslt_compress(x)
    row = {"shape": list(blob.shape), "padding": blob.numel() - x.numel() * 9 // 16}
    for order in ("sm90", "sm80"):
        try:
            row[order] = torch.equal(pack_matrix(x, order), blob.flatten()[: x.numel() * 9 // 16])
        except ValueError as error:
            row[order] = choose.reason(error)
    values = blob.flatten()[: x.numel() // 2].view(rows, -1)
    return row | {"values in row order": torch.equal(values, x[x != 0].view(rows, -1))}


def order() -> dict:
    results = {}
    for rows, columns in SHAPES:
        results[f"{rows}x{columns}"] = row = attempt(lambda shape=(rows, columns): compare_order(*shape))
        print("order", rows, columns, row, flush=True)
    trusted, why = choose.trusted_order(device())
    return results | {"trusted": trusted, "why": why}


def operands(gemm: Gemm, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pruned A, its packed operand by the library's compress, B) of a random GEMM."""
    a = choose.random_24(gemm.m, gemm.k, device(), dtype)
    b = torch.randn(*((gemm.n, gemm.k) if gemm.b_column_major else (gemm.k, gemm.n)), device=device()).to(dtype)
    return a, compress24(a), b.t() if gemm.b_column_major else b


def host() -> dict:
    gemm = ffn_plan.ffn_gemms(256, 1024, 1024, "gelu", False)["z"]
    a, packed, b = operands(gemm)
    times = {}
    shape, blob = (gemm.m, gemm.transposed), packed.view(gemm.m, -1)
    calls = {
        "2:4, as training calls it": lambda: matmul24(packed, b, None, *shape, CUSPARSELT),
        "2:4 by torch's op": lambda: torch._cslt_sparse_mm(blob, b),
        "dense": lambda: matmul24(a, b, None, *shape, Choice()),
    }
    if cusparselt.available() is None:
        calls["2:4 by cached plans"] = lambda: cusparselt.matmul(packed, b, *shape, 0)
    for name, call in calls.items():
        times[f"{name} us"] = choose.enqueue_us(call, device())
    times["kernel launch us"] = choose.enqueue_us(lambda: activation(a, "gelu"), device())
    for rows, columns in PACKED:
        x = choose.random_24(rows, columns, device())
        times[f"compress {rows}x{columns} us"] = median_us(lambda x=x: torch._cslt_compress(x))
        times[f"our MVUE and packing {rows}x{columns} us"] = median_us(lambda x=x: mvue24_pack(x, 0, "sm90"))
    return times


def replays(multiply: Callable) -> list[bool]:
    """Capture a GEMM and replay it five times. Before each replay its inputs change, and other GEMMs overwrite the host
    memory that held its plan. multiply: (packed, b, gemm, alg_id) -> D. Returns for each replay if it was correct."""
    gemm, other = (ffn_plan.ffn_gemms(d, 4 * d, t, "gelu", False)["y"] for d, t in ((768, 4096), (1024, 2048)))
    a, packed, b = operands(gemm)
    _, packed_other, b_other = operands(other)
    results = []

    def call():
        return multiply(packed, b, gemm, 0)

    call()
    replay = choose._captured(lambda: results.append(call()))
    correct = []
    for _ in range(5):
        for alg_id in (0, 1, 2):
            multiply(packed_other, b_other, other, alg_id)
        b.normal_()
        results[0].fill_(math.nan)
        replay()
        reference = matmul24(a.float(), b.float(), None, gemm.m, gemm.transposed, Choice())
        correct.append(choose.close_to(results[0], reference))
    return correct


def by_torch(packed, b, gemm: Gemm, alg_id: int) -> torch.Tensor:
    return torch._cslt_sparse_mm(packed.view(gemm.m, -1), b, transpose_result=gemm.transposed, alg_id=alg_id)


def as_training(packed, b, gemm: Gemm, alg_id: int) -> torch.Tensor:
    return matmul24(packed, b, None, gemm.m, gemm.transposed, CUSPARSELT._replace(alg_id=alg_id))


def graph() -> dict:
    return {"2:4 by torch's op": replays(by_torch), "2:4, as training calls it": replays(as_training)}


PARTS = {part.__name__: part for part in (kernels, machine, order, host, graph)}


def main(argv: list[str]) -> int:
    path, results = Path(argv[0]), {}
    names = argv[1:] or PARTS
    if "kernels" not in names:
        sparse24.use_kernels(device())
    for name in names:
        start = time.perf_counter()
        results[name] = attempt(PARTS[name])
        results[name]["seconds"] = round(time.perf_counter() - start, 2)
        write_json(path, results)
        shown = {key: value for key, value in results[name].items() if name != "order" or "x" not in key}
        print(name, shown, flush=True)
    return int(any("reason" in part for part in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Probe a GPU, its 2:4 library and our kernels in about a minute: python -m benchmarks.probe OUT.json [part ...]

Parts, in this order: kernels (each beside its specification), machine (card, versions, copy bandwidth, rate of a large
product), order (which bytes the library's compress writes, and whether they are ours), host (microseconds that
the host takes to enqueue a product), graph (a captured product, replayed with other inputs). Each part's result is
written before the next begins; a part that fails says why.
"""

import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import sparse24
from gemm24 import choose, cusparselt
from gemm24 import plan as ffn_plan
from gemm24.layout import compress24
from gemm24.matmul import Choice, Gemm, matmul24
from gemm24.operands import activation, mvue24_pack, pack_matrix
from runtime.ranks import environment, write_json

CUSPARSELT = Choice("cusparselt", "library")
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
SHAPES = [  # (rows, columns): small, odd multiples, the weights of GPT-2, a gradient
    *((64, 64), (64, 128), (128, 64), (128, 128), (192, 128), (320, 192), (192, 320), (256, 512), (384, 128)),
    *((768, 3072), (3072, 768), (1280, 5120), (1600, 6400), (6400, 1600), (4096, 16384), (768, 16384)),
]
COPY_BYTES, WIDTH = 2**30, 8192  # sizes of the copy and of the product that give the card's two rates
PACKED = ((1280, 5120), (5120, 16384))  # matrices whose packing is timed
CALLS = 100  # that the host enqueues while its time is taken


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def median_us(call: Callable, graph: bool = False, repetitions: int = 7) -> float:
    """Median microseconds of one call; graph: of a CUDA graph's replay, so that host time does not count."""
    (times,) = choose.time_interleaved([call], repetitions, graph, device())
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def machine() -> dict:
    """Card, versions, and the two rates of which everything else is a share."""
    card = torch.cuda.get_device_properties(device())
    found = environment(device(), 1) | {"cuda": torch.version.cuda, "cusparselt": torch.backends.cusparselt.version()}
    found |= {"sms": card.multi_processor_count, "memory_bytes": card.total_memory, "l2_bytes": card.L2_cache_size}
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device()).random_() for _ in range(2))
    found["copy_tb_per_s"] = 2 * COPY_BYTES / median_us(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(WIDTH, WIDTH, device=device(), dtype=torch.bfloat16) for _ in range(2))
    found["product_tflops"] = 2e-6 * WIDTH**3 / median_us(lambda: a @ b)
    found["schema"] = str(torch.ops.aten._cslt_sparse_mm.default._schema)
    return found


def kernels() -> dict:
    """Test the Triton kernels against their specifications, and time that test."""
    start = time.perf_counter()
    status = sparse24.use_kernels(device())
    return {"status": status, "seconds": time.perf_counter() - start}


# ---------------------------------------------------------------------------------------------------------------------
# The library's byte order


def with_digits(digit: torch.Tensor) -> torch.Tensor:
    """bf16 (rows, columns) of ones and zeros: group g of row r keeps the pair PAIRS[digit[r, g]]."""
    pairs = torch.tensor(PAIRS, device=digit.device)[digit]
    x = torch.zeros(*digit.shape, 4, device=digit.device).scatter_(-1, pairs, 1.0)
    return x.flatten(1).to(torch.bfloat16)


def learn_order(compress: Callable, rows: int, columns: int, device) -> torch.Tensor:
    """int64 (number of nibbles,): which group of four (row * columns/4 + column/4) each nibble of a library's metadata
    belongs to, in memory's order, low nibble first; -1 for a nibble that belongs to none.

    compress: bf16 (rows, columns) -> blob, of which the first rows * columns / 2 elements are the values. Each group
    is given a number; call i of compress has digit i of that number, in base 6, as the pair that the group keeps."""
    groups = torch.arange(rows * columns // 4, device=device).view(rows, columns // 4)
    digit_of = {low | high << 2: number for number, (low, high) in enumerate(PAIRS)}
    found = None
    for place in range(max(1, math.ceil(math.log(groups.numel(), 6)))):
        blob = compress(with_digits(groups // 6**place % 6)).flatten()
        raw = blob[rows * columns // 2 :].contiguous().view(torch.uint8).cpu()
        nibbles = torch.stack((raw & 15, raw >> 4), -1).flatten()
        digits = torch.full(nibbles.shape, -1, dtype=torch.int64)
        for nibble, number in digit_of.items():
            digits[nibbles == nibble] = number
        part = torch.where(digits < 0, -(10**12), digits * 6**place)
        found = part if found is None else found + part
    return torch.where((found >= 0) & (found < groups.numel()), found, -1)


def compare_order(rows: int, columns: int) -> dict:
    """Compare our packers' bytes at this shape with the library's. If no packer agrees, learn the library's order."""
    x = choose.random_24(rows, columns, device())
    blob = torch._cslt_compress(x)
    row = {"shape": list(blob.shape), "padding": blob.numel() - x.numel() * 9 // 16}
    for order in ("sm90", "sm80"):
        try:
            row[order] = torch.equal(pack_matrix(x, order), blob.flatten()[: x.numel() * 9 // 16])
        except ValueError as error:
            row[order] = choose.reason(error)
    values = blob.flatten()[: x.numel() // 2].view(rows, -1)
    row["values in row order"] = torch.equal(values, x[x != 0].view(rows, -1))
    if not any(row[order] is True for order in ("sm90", "sm80")) and rows * columns <= 2**16:
        row["learned"] = learn_order(torch._cslt_compress, rows, columns, device()).tolist()
    return row


def order() -> dict:
    found = {}
    for rows, columns in SHAPES:
        try:
            found[f"{rows}x{columns}"] = compare_order(rows, columns)
        except RuntimeError as error:
            found[f"{rows}x{columns}"] = {"reason": choose.reason(error)}
        shown = {key: value for key, value in found[f"{rows}x{columns}"].items() if key != "learned"}
        print("order", rows, columns, shown, flush=True)
    trusted, why = choose.trusted_order(device())
    return found | {"trusted": trusted, "why": why}


# ---------------------------------------------------------------------------------------------------------------------
# The host's time for a call; CUDA graphs


def operands(gemm: Gemm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pruned A, its packed operand by the library's compress, B) of a random GEMM."""
    a = choose.random_24(gemm.m, gemm.k, device())
    b = torch.randn(*((gemm.n, gemm.k) if gemm.b_column_major else (gemm.k, gemm.n)), device=device()).bfloat16()
    return a, compress24(a), b.t() if gemm.b_column_major else b


def enqueue_us(call: Callable) -> float:
    """Microseconds of the host per call, the GPU's work not waited for."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    us = 1e6 * (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return us


def host() -> dict:
    gemm = ffn_plan.ffn_gemms(256, 1024, 1024, "gelu", False, True)["z"]
    a, packed, b = operands(gemm)
    found = {}
    shape, blob = (gemm.m, gemm.transposed), packed.view(gemm.m, -1)
    calls = {
        "2:4, as training calls it": lambda: matmul24(packed, b, None, *shape, CUSPARSELT),
        "2:4 by torch's op": lambda: torch._cslt_sparse_mm(blob, b),
        "dense": lambda: matmul24(a, b, None, *shape, Choice()),
    }
    if cusparselt.available() is None:
        calls["2:4 by kept plans"] = lambda: cusparselt.matmul(packed, b, *shape, 0)
    for name, call in calls.items():
        found[f"{name} us"] = enqueue_us(call)
    found["kernel launch us"] = enqueue_us(lambda: activation(a, "gelu"))
    for rows, columns in PACKED:
        x = choose.random_24(rows, columns, device())
        found[f"compress {rows}x{columns} us"] = median_us(lambda x=x: torch._cslt_compress(x))
        ours = median_us(lambda x=x: mvue24_pack(x, 0, "sm90"))
        found[f"our MVUE and packing {rows}x{columns} us"] = ours
    return found


def replays(multiply: Callable) -> list[bool]:
    """Capture a product and replay it five times. Before each replay its inputs change, and other products overwrite
    the host's memory that held its plan. Returns if each result was right. multiply: (packed, b, gemm, alg_id) -> D."""
    gemm, other = (ffn_plan.ffn_gemms(d, 4 * d, t, "gelu", False, True)["y"] for d, t in ((768, 4096), (1024, 2048)))
    a, packed, b = operands(gemm)
    _, packed_other, b_other = operands(other)
    results = []

    def call():
        return multiply(packed, b, gemm, 0)

    call()
    replay = choose._captured(lambda: results.append(call()))
    right = []
    for _ in range(5):
        for alg_id in (0, 1, 2):
            multiply(packed_other, b_other, other, alg_id)
        b.normal_()
        results[0].fill_(math.nan)
        replay()
        reference = matmul24(a.float(), b.float(), None, gemm.m, gemm.transposed, Choice())
        right.append(choose.close_to(results[0], reference))
    return right


def by_torch(packed, b, gemm: Gemm, alg_id: int) -> torch.Tensor:
    return torch._cslt_sparse_mm(packed.view(gemm.m, -1), b, transpose_result=gemm.transposed, alg_id=alg_id)


def as_training(packed, b, gemm: Gemm, alg_id: int) -> torch.Tensor:
    return matmul24(packed, b, None, gemm.m, gemm.transposed, CUSPARSELT._replace(alg_id=alg_id))


def graph() -> dict:
    return {"2:4 by torch's op": replays(by_torch), "2:4, as training calls it": replays(as_training)}


# ---------------------------------------------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (kernels, machine, order, host, graph)}


def main(argv: list[str]) -> int:
    path, results, failed = Path(argv[0]), {}, False
    names = argv[1:] or PARTS
    if "kernels" not in names:
        sparse24.use_kernels(device())
    for name in names:
        start = time.perf_counter()
        try:
            results[name] = PARTS[name]()
        except Exception as error:  # named in the results, and the parts after it are worth having
            traceback.print_exc()
            results[name], failed = {"reason": choose.reason(error)}, True
        results[name]["seconds"] = round(time.perf_counter() - start, 2)
        write_json(path, results)
        shown = {key: value for key, value in results[name].items() if name != "order" or "x" not in key}
        print(name, shown, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""GEMMs that training does not use yet, by every algorithm of cuSPARSELt: python -m benchmarks.sweep OUT.json

Feed-forward layers of GPT-2's widths and 16,384 tokens. The library's own compress packs the operands. Times are from
CUDA graphs, without the host's time:
    float16      the six products of bench.py's suite gemm in float16, for which the library has more tile shapes
    activations  Y = H W2^T with the hidden activations H as the 2:4 operand, packed along its features
    float8       e4m3 operands and bf16 results: dense (torch._scaled_mm) and 2:4
Each row has the dense time in the same type, the best 2:4 time, and the times of all algorithms. Rows of float8 also
have the dense time in bf16.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.kernel_times import time_calls
from benchmarks.machine import device, write_rows
from benchmarks.probe import operands
from gemm24 import choose
from gemm24 import plan as ffn_plan
from gemm24.matmul import Gemm
from sparse24 import use_kernels

TOKENS = 16384
ALGORITHMS = 64
RAISED = 8  # after this many failing algorithm ids in a row, the library has no more


def quick_us(call: Callable, count: int, samples: int = 3) -> float:
    """Median microseconds per call, from `samples` replays of a graph of `count` calls."""
    return statistics.median(time_calls([call] * count, samples))


def sweep(multiply: Callable[[int], torch.Tensor], reference: torch.Tensor, slack: float, count: int) -> dict:
    """{algorithm id: microseconds, or the fault}. slack: allowed error as a share of the largest value."""
    results, raised = {}, 0
    for alg_id in range(ALGORITHMS):
        try:
            error = (multiply(alg_id).float() - reference).abs().max() / reference.abs().max()
            if not error <= slack:  # NaN too
                results[str(alg_id)] = f"wrong result, off by {error.item():.3g} of the largest value"
                continue
            results[str(alg_id)], raised = quick_us(lambda i=alg_id: multiply(i), count), 0
        except RuntimeError as error:
            results[str(alg_id)], raised = choose.reason(error), raised + 1
            if raised == RAISED:
                break
    return results


def summary(row: dict, times: dict, dense_us: float) -> dict:
    """The row with the dense time, the best 2:4 time and their ratio."""
    correct = {name: us for name, us in times.items() if isinstance(us, float)}
    best = min(correct, key=correct.get, default=None)
    row |= {"dense_us": dense_us, "best_us": correct.get(best), "alg_id": best, "algorithms": times}
    return row | {"ratio": dense_us / correct[best] if correct else None}


def calls_of(flops: float) -> int:
    """Calls per graph that take about 2 ms at 500 TFLOP/s."""
    return max(2, min(50, int(2e-3 * 5e14 / flops)))


def product_row(gemm: Gemm, dtype: torch.dtype) -> dict:
    """One GEMM D = A B in a 16-bit type, with A (m, k) 2:4."""
    a, packed, b = operands(gemm, dtype)
    packed, count = packed.view(gemm.m, -1), calls_of(2.0 * gemm.m * gemm.n * gemm.k)

    def dense(a=a, b=b):
        return b.t() @ a.t() if gemm.transposed else a @ b

    def multiply(alg_id):
        return torch._cslt_sparse_mm(packed, b, transpose_result=gemm.transposed, alg_id=alg_id)

    row = {name: getattr(gemm, name) for name in ("name", "m", "n", "k", "b_column_major", "transposed")}
    times = sweep(multiply, dense(a.float(), b.float()), 0.02, count)
    return summary(row | {"dtype": str(dtype)[6:]}, times, quick_us(dense, count, 7))


def float8_row(name: str, m: int, n: int, k: int) -> dict:
    """One GEMM with e4m3 operands, both contiguous along k, and bf16 results (n, m)."""
    e4m3 = torch.float8_e4m3fn
    a = choose.random_24(m, k, device()).to(e4m3)
    b = torch.randn(n, k, device=device()).to(e4m3)
    packed, count = torch._cslt_compress(a), calls_of(2.0 * m * n * k)
    one, alpha = torch.ones((), device=device()), torch.ones(m, device=device())
    reference = b.float() @ a.float().t()
    bf16 = (b.bfloat16(), a.bfloat16())

    def multiply(alg_id):
        options = {"alpha": alpha, "out_dtype": torch.bfloat16, "transpose_result": True, "alg_id": alg_id}
        return torch._cslt_sparse_mm(packed, b.t(), **options)

    def dense():
        return torch._scaled_mm(b, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    row = {"name": name, "m": m, "n": n, "k": k, "dtype": "float8_e4m3fn"}
    row["bf16_us"] = quick_us(lambda: bf16[0] @ bf16[1].t(), count, 7)
    return summary(row, sweep(multiply, reference, 0.02, count), quick_us(dense, count, 7))


def rows() -> Iterator[tuple[dict, Callable[[], dict]]]:
    """The GEMMs, the most informative first, for machine.write_rows."""
    for d in (1600, 4096):
        for name, m, n, k in (("z", 4 * d, TOKENS, d), ("y", d, TOKENS, 4 * d), ("dw1", 4 * d, d, TOKENS)):
            yield {"name": name}, partial(float8_row, name, m, n, k)
        for name, transposed in (("activations y", False), ("activations y, transposed", True)):
            gemm = Gemm(name, TOKENS, d, 4 * d, True, transposed, False)
            yield {"name": name}, partial(product_row, gemm, torch.bfloat16)
    for d in (1600, 768):
        for name, gemm in ffn_plan.ffn_gemms(d, 4 * d, TOKENS, "gelu", False).items():
            yield {"name": name}, partial(product_row, gemm, torch.float16)


def main(argv: list[str]) -> int:
    use_kernels(device())
    return write_rows(Path(argv[0]), rows(), ("algorithms",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Settings of the whole test run.

Without a GPU Triton's kernels run on the CPU in Triton's interpreter, in numpy. With NANO24_PTX=90 (or 80) they are
compiled for that architecture instead, and tests/ptx/ interprets the compiler's result: `make test-ptx`.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny and processes run side by side; also for what tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs; CUDA reads it once, at the start

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available() and "NANO24_PTX" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


@pytest.fixture(scope="session", autouse=True)
def kernels_where_they_can():
    """On a GPU the operators go to the kernels, as after a run's set-up."""
    if torch.cuda.is_available():
        import gemm24.operands  # noqa: F401 (so that its operators are compared too)
        from sparse24 import use_kernels

        use_kernels("cuda")

"""A stand-in on the CPU for PyTorch's cuSPARSELt ops."""

import pytest
import torch

from gemm24 import cusparselt, layout
from gemm24.layout import pack24, unpack24
from gemm24.matmul import Choice, matmul24
from sparse24 import mask24


def multiply(a, b, bias=None, transpose_result=False, alg_id=0, split_k=1):
    """As torch._cslt_sparse_mm, with operands in order sm90."""
    dense = unpack24(a.flatten(), len(a), len(b), "sm90")
    return matmul24(dense, b, bias, len(a), transpose_result, Choice())


@pytest.fixture
def cslt(monkeypatch):
    """Replace torch._cslt_compress and _cslt_sparse_mm. Yields the latter."""
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: pack24(x, mask24(x), "sm90").view(len(x), -1))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(cusparselt, "available", lambda: "not on a CPU")
    layout._ask_library.cache_clear()
    yield multiply
    layout._ask_library.cache_clear()

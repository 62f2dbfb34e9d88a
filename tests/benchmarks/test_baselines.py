"""The baselines compute what the paper describes. tests/test_kernels.py compares them with their specifications."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the baselines are Triton kernels")

import sparse24
from benchmarks import baselines

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_search_by_90_scores_is_the_optimum_within_tf32():
    table = baselines.pattern_table(sparse24.PATTERNS.to(DEVICE))
    generator = torch.Generator().manual_seed(0)
    wide, tall = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((36, 40), (64, 36)))
    for w in (wide, tall.t(), torch.zeros(4, 8, device=DEVICE)):
        index = baselines.transposable_index_dot(w, table)
        found, best = (
            (w.abs() * sparse24.expand_index(i)).double().view(w.shape[0] // 4, 4, -1, 4).sum((1, 3))
            for i in (index, sparse24.transposable_index.torch(w))
        )
        assert (found >= best * (1 - 2**-10)).all()  # TF32 has 10 bits: each |w| is off by at most 2^-11, both ways


def test_the_network_sorts():
    """A network that sorts every sequence of zeros and ones sorts everything."""
    network = baselines._sorting_network(16)
    assert len(network) == 63
    values = torch.tensor(list(itertools.product((0, 1), repeat=16)), dtype=torch.uint8).t().contiguous()
    for a, b in network:
        assert a < b
        values[a], values[b] = torch.maximum(values[a], values[b]), torch.minimum(values[a], values[b])
    assert (values[:-1] >= values[1:]).all()

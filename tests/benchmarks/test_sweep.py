"""The sweep over the library's algorithms."""

import json

import pytest
import torch

from benchmarks import sweep


def test_wrong_results_are_no_candidates_and_a_library_without_more_ends_the_sweep(monkeypatch):
    """Algorithm 0 is right, 1 is off, 2 gives NaN, 3 is right and faster; all others raise."""
    reference, tried = torch.tensor([1.0, -2.0]), []

    def multiply(alg_id):
        tried.append(alg_id)
        if alg_id > 3:
            raise RuntimeError("no such algorithm")
        return reference + {1: 0.1, 2: float("nan")}.get(alg_id, 0.001)

    def quick_us(call, count):
        call()
        return {0: 8.0, 3: 4.0}[tried[-1]]

    monkeypatch.setattr(sweep, "quick_us", quick_us)
    found = sweep.sweep(multiply, reference, 0.02, 5)
    assert (found["0"], found["3"]) == (8.0, 4.0)
    assert found["1"] == "wrong result, off by 0.05 of the largest value"
    assert found["2"].startswith("wrong result, off by nan")
    assert tried[-1] == 3 + sweep.RAISED
    assert all(found[str(alg_id)] == "RuntimeError: no such algorithm" for alg_id in range(4, 4 + sweep.RAISED))
    row = sweep.summary({"name": "z"}, found, 6.0)
    assert (row["best_us"], row["alg_id"], row["ratio"], row["dense_us"]) == (4.0, "3", 1.5, 6.0)
    assert sweep.summary({}, {"0": "wrong"}, 6.0)["ratio"] is None


def test_graphs_take_about_two_milliseconds():
    assert [sweep.calls_of(flops) for flops in (1e9, 1e11, 1e13)] == [50, 10, 2]


@pytest.mark.slow
def test_a_product_is_swept_on_the_fake_gpu(tmp_path, on_fake_gpu):
    on_fake_gpu("""
from functools import partial
import torch
from benchmarks import sweep

gemms = [sweep.Gemm("y", 64, 64, 128, True, transposed, False) for transposed in (False, True)]
sweep.rows = lambda: [({"name": "y"}, partial(sweep.product_row, gemm, torch.bfloat16)) for gemm in gemms]
assert sweep.main([f"{out}/sweep.json"]) == 0
""")
    found = json.loads((tmp_path / "sweep.json").read_text())
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(2.0)  # as the make-believe clock has it
        assert row["algorithms"].keys() >= {"0", "1", "2", "3"}
    assert found["environment"]["device_name"] == "NVIDIA H200"

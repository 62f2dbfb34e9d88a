"""The parts of the probe on the make-believe GPU, and a part that fails."""

import json

import pytest

from benchmarks import probe


def test_a_part_that_fails_says_why_and_the_parts_after_it_run(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no library\nlong text")

    monkeypatch.setattr(probe, "PARTS", {"kernels": broken, "graph": lambda: {"right": [True]}})
    assert probe.main([str(tmp_path / "probe.json")]) == 1
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["kernels"]["reason"] == "RuntimeError: no library"
    assert found["graph"].keys() == {"right", "seconds"}
    assert probe.main([str(tmp_path / "one.json"), "graph"]) == 0
    assert json.loads((tmp_path / "one.json").read_text()).keys() == {"graph"}


@pytest.mark.slow
def test_every_part_runs_on_the_fake_gpu(tmp_path, on_fake_gpu):
    on_fake_gpu("""
from benchmarks import probe
from gemm24 import choose
from gemm24 import plan as ffn_plan

choose._WARM_UP, real = 0, ffn_plan.ffn_gemms
probe.SHAPES, probe.WIDTH, probe.PACKED = [(64, 64), (128, 128)], 128, ((64, 128),)
probe.copy_bandwidth = lambda device: 4e12  # measured by copies of 1 GiB on a GPU
ffn_plan.ffn_gemms = lambda d, d_ff, tokens, *more: real(64, 256, 64, *more)
assert probe.main([f"{out}/probe.json"]) == 0
""")
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (found["machine"]["device_name"], found["kernels"]["status"]) == ("NVIDIA H200", "on")
    assert found["machine"]["copy_tb_per_s"] == 4
    assert [found["order"][shape]["sm90"] for shape in ("64x64", "128x128")] == [True, True]
    assert found["order"]["trusted"] == "sm90"
    assert found["graph"]["2:4 by torch's op"] == found["graph"]["2:4, as training calls it"] == [True] * 5
    assert {"dense us", "2:4, as training calls it us", "compress 64x128 us"} <= found["host"].keys()

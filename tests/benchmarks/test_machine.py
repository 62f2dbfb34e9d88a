"""The description of the machine, and rows that are saved one by one."""

import json

import pytest
import torch

from benchmarks import machine


def test_gpu_state_reads_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi" in machine.gpu_state()["reason"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1, 1980, 3201, 88.5, 700.00, 31'\n")
    tool.chmod(0o755)
    state = machine.gpu_state()
    assert list(state.values()) == ["NVIDIA H200", "580.1", "1980", "3201", "88.5", "700.00", "31"]
    assert (state["name"], state["driver_version"], state["power.limit"]) == ("NVIDIA H200", "580.1", "700.00")


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(machine.choose, "time_interleaved", lambda calls, *_, **__: [[2000.0]])
    assert machine.copy_bandwidth.__wrapped__(torch.device("cpu")) == pytest.approx(2 * 2**23 / 2e-3)


def test_rows_are_saved_one_by_one_and_a_failure_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "x.json"

    def broken():
        assert json.loads(path.read_text())["rows"] == [{"a": 1, "long": 2}]
        raise ValueError("no\nmore")

    rows = [({"name": "a"}, lambda: {"a": 1, "long": 2}), ({"name": "b"}, broken)]
    assert machine.write_rows(path, rows[:1], ("long",)) == 0
    assert machine.write_rows(path, [*rows, ({"name": "c"}, dict)], ("long",)) == 1
    found = json.loads(path.read_text())
    assert found["rows"] == [{"a": 1, "long": 2}, {"reason": "ValueError: no", "name": "b"}, {}]
    assert found["environment"].keys() >= {"commit", "torch", "triton", "device_name"}
    assert capsys.readouterr().out.startswith("{'a': 1}\n")

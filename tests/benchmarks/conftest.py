"""Fixtures of the benchmarks' tests: no GPU, or the make-believe GPU of tests/tools/fake_cuda.py."""

import os
import subprocess
import sys

import pytest
import torch
from harness import ROOT


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def on_fake_gpu(tmp_path):
    """on_fake_gpu(code, **names) runs Python code in a process that believes in one H200. The code has the variables
    `out`, the test's folder, and `names`. That takes seconds: kernels run in Triton's interpreter, and each measurement
    warms up for 0.2 s."""
    pytest.importorskip("triton", reason="Triton is not installed: the make-believe GPU runs its kernels")

    def run(code: str, **names) -> subprocess.CompletedProcess:
        script = tmp_path / "script.py"
        variables = [f"{name} = {value!r}" for name, value in {"out": str(tmp_path), **names}.items()]
        script.write_text("\n".join([*variables, code]))
        command = [sys.executable, "tests/tools/fake_cuda.py", str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run

"""What the tests of the benchmarks share: scripts on the make-believe GPU of tests/fake_cuda.py."""

import os
import subprocess
import sys

import pytest
from harness import ROOT


@pytest.fixture
def on_fake_gpu(tmp_path):
    """on_fake_gpu(code) runs Python code as if there were one H200, in a process of its own. That takes seconds, for
    Triton's interpreter and 0.2 s of warm-up a measurement. The code finds the test's folder as `out`."""
    pytest.importorskip("triton", reason="Triton is not installed: the make-believe GPU runs its kernels")

    def run(code: str) -> subprocess.CompletedProcess:
        script = tmp_path / "script.py"
        script.write_text(f"out = {str(tmp_path)!r}\n{code}")
        command = [sys.executable, "tests/fake_cuda.py", str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run

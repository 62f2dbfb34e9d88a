"""Settings of the whole test run, and shared fixtures.

Without a GPU, Triton's kernels run in Triton's interpreter. With NANO24_PTX=90 (or 80) they are compiled for that
architecture instead, and tests/ptx/ interprets the compiled code: `make test-ptx`.
"""

import os
import re
import shutil

os.environ["OMP_NUM_THREADS"] = "1"  # for small tensors, and for the processes that tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic runs; CUDA reads it once

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available() and "NANO24_PTX" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as harness does


@pytest.fixture(scope="session", autouse=True)
def kernels_where_they_can():
    """On a GPU, the operators run the kernels."""
    if torch.cuda.is_available():
        import gemm24.operands  # noqa: F401 (registers its operators, which are compared too)
        from sparse24 import use_kernels

        use_kernels("cuda")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of a small character dataset."""
    from harness import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def attempt(data):
    """attempt(out_dir, fault, max_iters=4, ...): a run of harness.SETTINGS with these changes, in this process."""
    from harness import SETTINGS, run_here

    return lambda out, fault=None, first=(), **changes: run_here(
        out, {**SETTINGS, "dataset": data, **changes}, fault, first=first
    )


@pytest.fixture(scope="session")
def run(attempt):
    """Like `attempt`, but the run must succeed, or stop after a signal. Returns its output."""
    from harness import status_of

    def run(*args, **changes):
        done = attempt(*args, **changes)
        assert done.returncode == status_of(args[1] if args[1:] else None), done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def refused(attempt):
    """Like `attempt`, but the run must be refused before it changes a file. Returns the error message."""
    from harness import contents

    def refused(out, status=1, **changes):
        before = contents(out)
        done = attempt(out, **changes)
        assert done.returncode == status
        assert re.fullmatch(r"train\.py: error: [^\n]+\n", done.stderr)
        assert "Traceback" not in done.stdout
        assert contents(out) == before
        return done.stderr

    return refused


@pytest.fixture(scope="session")
def reference(run, tmp_path_factory):
    """(folder, output) of a complete run of harness.SETTINGS. Tests must not change it."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, run(out)


@pytest.fixture(scope="session")
def _stopped(run, tmp_path_factory):
    from harness import stop_at

    out = tmp_path_factory.mktemp("stopped") / "out"
    run(out, stop_at(9))
    return out


@pytest.fixture
def stopped(_stopped, tmp_path):
    """A copy of the folder of a run that was stopped after 10 steps, with checkpoints of steps 10 and 8."""
    return shutil.copytree(_stopped, tmp_path / "stopped")


@pytest.fixture
def given():
    """given(max_iters=9, ...) sets train's globals for one test."""
    from harness import pristine_train

    import train

    with pristine_train():
        yield lambda **values: vars(train).update(values)

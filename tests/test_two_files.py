"""Another project can use 2:4 layers with copies of two files, sparse24.py and kernels.py."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from harness import ROOT

# Another project's script. It trains an MLP with 2:4 layers on one batch and prints the first and the last loss.
PROJECT = """
import torch
import sparse24

print(sparse24.use_kernels("cuda" if torch.cuda.is_available() else "cpu"))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
x, y = torch.randn(32, 16), torch.randn(32, 8)
sparse24.sparsify(model, "fst", ["0", "2"])
optimizer = sparse24.MaskedDecayAdamW(model.parameters(), model, lr=1e-2, masked_decay=1e-3)
losses = []
for iter_num in range(60):
    sparse24.seed_draws(model, 1, iter_num, 0)
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if (iter_num + 1) % 10 == 0:
        sparse24.refresh_masks(model)
    losses.append(loss.item())
pruned = model(x)
sparse24.densify(model, prune=True)
assert [type(module) for module in model] == [torch.nn.Linear, torch.nn.GELU, torch.nn.Linear]
torch.testing.assert_close(model(x), pruned)
print(losses[0], losses[-1])
"""
# Checks that this repository's modules cannot be imported
ALONE = f"import sys; assert {str(ROOT)!r} not in sys.path"
WITHOUT_TRITON = "sys.modules['triton'] = None"
COMPARE = "assert sparse24.kernel_mismatches(torch.device('cpu')) == []; assert 'gemm24' not in sys.modules"


def run_alone(folder, *code: str, **environment) -> list[str]:
    """Run the code in a folder with only the two files. Returns the lines that it prints."""
    for name in ("sparse24.py", "kernels.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "project.py").write_text("\n".join(code))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    command = [sys.executable, "project.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_losses(line: str) -> None:
    first, last = map(float, line.split())
    assert last < 0.5 * first


def test_another_project_trains_with_the_two_files_alone(tmp_path):
    status, losses = run_alone(tmp_path, ALONE, PROJECT)
    assert status == "on" or status.startswith("off: the kernels need")
    check_losses(losses)


def test_it_trains_without_triton(tmp_path):
    status, losses = run_alone(tmp_path, ALONE, WITHOUT_TRITON, PROJECT)
    assert status.startswith("off: ")
    check_losses(losses)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton backend: triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA backend: use_kernels compares them in the tests above")
def test_the_kernels_need_no_other_file(tmp_path):
    assert run_alone(tmp_path, ALONE, "import torch, sparse24", COMPARE, TRITON_INTERPRET="1") == []

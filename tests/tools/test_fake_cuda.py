"""train.py on the fake GPU of fake_cuda.py, and operations that it refuses as a real GPU does.

Each run is a separate process and takes seconds: it imports torch, interprets Triton kernels and times GEMMs.
"""

import json
import os
import subprocess
import sys

import pytest
from harness import ROOT, make_dataset, read_rows, read_state, run_here, to_words

pytest.importorskip("triton", reason="Triton is not installed, and the fake GPU needs it")

# Three sparse steps, with a mask refresh after the second, and one dense step; checkpoints at 2, 3 and 4.
SETTINGS = {
    "n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 2, "gradient_accumulation_steps": 1,
    "max_iters": 4, "lr_decay_iters": 4, "warmup_iters": 1, "learning_rate": 3e-3, "min_lr": 3e-4,
    "sparse": "fst", "mask_interval": 2, "masked_decay": 1e-2, "dense_start": 3, "dtype": "bfloat16",
    "log_interval": 1, "flip_interval": 2, "eval_interval": 2, "eval_iters": 2, "checkpoint_interval": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


def run_on_fake_gpu(cache, script, *words, **environment) -> subprocess.CompletedProcess:
    """Run a script on the fake GPU. cache: folder for measured GEMM choices, in place of the user's cache."""
    command = [sys.executable, "tests/tools/fake_cuda.py", str(script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_train_on_the_fake_gpu_has_the_losses_of_the_cpu(tmp_path, dataset):
    """Rounding logits of about 1 to bfloat16 changes them by 2^-9 = 2e-3 at most. A loss averages about independent
    errors over 64 tokens, so it changes by 2e-4; the tolerance 1e-3 is five times that. Without pruning the loss would
    change by 1e-2, without MVUE by 4e-3."""
    settings = SETTINGS | {"dataset": dataset}
    out = tmp_path / "gpu"
    done = run_on_fake_gpu(tmp_path, "train.py", *to_words(out, settings | {"device": "cuda"}))
    assert done.returncode == 0, done.stderr
    assert "Triton kernels: on" in done.stdout
    assert "cusparselt: packs in order sm90, byte for byte its own compress" in done.stdout
    assert "taken: plan" in done.stdout
    chosen = [row["backend"] for row in json.loads((out / "spmm.json").read_text())["rows"] if row["chosen"]]
    assert chosen == ["cusparselt"] * 6

    on_cpu = run_here(tmp_path / "cpu", settings | {"device": "cpu", "spmm": "emulated"})
    assert on_cpu.returncode == 0, on_cpu.stderr
    rows, expected = read_rows(out), read_rows(tmp_path / "cpu")
    assert [row["phase"] for row in rows] == ["sparse"] * 3 + ["dense"] * 2
    for name in ("train_loss", "val_loss", "val_loss_24"):
        assert [row.get(name) for row in rows] == [pytest.approx(row.get(name), abs=1e-3) for row in expected]
    assert read_state(out)["iter_num"] == 4
    assert read_state(out, "ckpt_prev.pt")["iter_num"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["reversed", "padded"])
def test_train_falls_back_if_the_library_packs_in_another_layout(tmp_path, dataset, layout):
    settings = SETTINGS | {"dataset": dataset, "device": "cuda", "max_iters": 2, "dense_start": 2}
    environment = {"FAKE_CUSPARSELT": layout, "NANO24_KERNELS": "0"}
    done = run_on_fake_gpu(tmp_path, "train.py", *to_words(tmp_path / "out", settings), **environment)
    assert done.returncode == 0, done.stderr
    assert "cusparselt: packs by its own compress" in done.stdout
    assert read_state(tmp_path / "out")["iter_num"] == 2


# name -> (code, the beginning of the error that it raises, or "" for none). x is a GPU tensor, graph a CUDA graph.
CHECKS = {
    "set_device needs an index": ("torch.cuda.set_device('cuda')", "ValueError: Expected a torch.device with a spec"),
    "set_device takes an index": ("torch.cuda.set_device(torch.device('cuda', 0))", ""),
    "there is one GPU": ("torch.empty(0, device='cuda:1')", "RuntimeError: CUDA error: invalid device ordinal"),
    "devices do not mix": ("x + torch.ones(4, 4)", "RuntimeError: Expected all tensors to be on the same device"),
    "nor in a gradient": ("x.requires_grad_().sum().backward(); x.grad += torch.ones(4, 4)", "RuntimeError: Expected"),
    "numbers may be the CPU's": ("assert (x + torch.tensor(2.0)).is_cuda", ""),
    "indices may be the CPU's": ("assert x[torch.tensor([0])].is_cuda", ""),
    "a copy keeps its device": ("assert copy.deepcopy(x).is_cuda and not x.cpu().is_cuda", ""),
    "a device context counts": ("with torch.device('cuda'): assert torch.nn.Linear(4, 4).weight.is_cuda", ""),
    "generators have a device": ("torch.rand(4, device='cuda', generator=torch.Generator())", "RuntimeError: Expected"),
    "numpy is the CPU's": ("x.numpy()", "TypeError: can't convert cuda:0 device type tensor to numpy"),
    "pinned memory is the CPU's": ("x.pin_memory()", "TypeError: cannot pin"),
    "no item in a capture": ("with torch.cuda.graph(graph): x.sum().item()", "RuntimeError: CUDA error: operation not"),
    "no copy in a capture": ("with torch.cuda.graph(graph): x.to('cpu')", "RuntimeError: CUDA error: operation not"),
    "no waiting in a capture": ("with torch.cuda.graph(graph): torch.cuda.synchronize()", "RuntimeError: CUDA error"),
    "a capture can be replayed": ("with torch.cuda.graph(graph): x + x\ngraph.replay()", ""),
    "nothing to replay": ("graph.replay()", "RuntimeError: Called CUDAGraph::replay without"),
    "no item": ("forbid_waiting(); x.sum().item()", "RuntimeError: called a synchronizing"),
    "no indexing by a mask": ("forbid_waiting(); x[x > 0]", "RuntimeError: called a synchronizing"),
    "no copy to the GPU": ("forbid_waiting(); torch.ones(4).cuda()", "RuntimeError: called a synchronizing"),
    "no copy to the CPU": ("forbid_waiting(); torch.ones(4, 4).copy_(x)", "RuntimeError: called a synchronizing"),
    "copies that do not wait": ("forbid_waiting(); torch.ones(4, 4).copy_(x, non_blocking=True)", ""),
    "kernels take GPU tensors": ("kernels.pair_index(torch.ones(4, 4))", "ValueError: Pointer arg"),
    "so does cuSPARSELt": ("torch._cslt_compress(torch.ones(64, 64))", "NotImplementedError: Could not run"),
}  # fmt: skip
CHECK = """
import copy, json, sys
import torch
import kernels


def forbid_waiting():
    torch.cuda.set_sync_debug_mode("error")


errors = {}
for name, code in json.load(open(sys.argv[1])).items():
    x, graph = torch.ones(4, 4, device="cuda"), torch.cuda.CUDAGraph()
    try:
        exec(code)
        errors[name] = ""
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
    torch.cuda.set_sync_debug_mode("default")
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The error that each of CHECKS raised. They run in one process."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "check.py").write_text(CHECK)
    (folder / "codes.json").write_text(json.dumps({name: code for name, (code, _) in CHECKS.items()}))
    done = run_on_fake_gpu(folder, folder / "check.py", folder / "codes.json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CHECKS)
def test_the_fake_gpu_refuses_what_a_real_one_does(errors, name):
    expected = CHECKS[name][1]
    assert errors[name].startswith(expected)
    assert expected or not errors[name]

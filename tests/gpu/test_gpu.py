"""Tests that need a CUDA GPU: `python -m pytest -m gpu`. Operators give the same numbers there as on the CPU.

If there is a GPU, tests/test_kernels.py is marked gpu too, and tests the compiled kernels instead of interpreted ones.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from harness import ROOT, SETTINGS, make_dataset, read_rows, read_state, run_here, state_differences, to_words

import sparse24
from methods import act24
from model import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA backend: torch sees no CUDA GPU on this machine"),
]


def run_script(*words, **environment):
    """Run Python in the repository. It must succeed. Returns its standard output."""
    command, environment = [sys.executable, *words], os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_are_on_if_the_gpu_supports_them():
    device = torch.device("cuda", torch.cuda.current_device())
    supported = torch.cuda.get_device_capability() >= (8, 0)
    status = sparse24.use_kernels(device)
    assert status == "on" if supported else status.startswith("off: the kernels")
    code = "import sparse24; print(sparse24.use_kernels('cuda:0'))"
    assert run_script("-c", code, NANO24_KERNELS="0") == "off: NANO24_KERNELS=0\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_equal_the_cpu_twins(dtype):
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    for operator, x, *more in (
        *((f, w) for f in (sparse24.transposable_index, sparse24.soft_threshold24, sparse24.pair_index)),
        (sparse24.mvue24, w, 7),
        (sparse24.mvue24, w.t(), 7),
    ):
        assert torch.equal(operator(x.cuda(), *more).cpu(), operator.torch(x, *more)), operator
    assert torch.equal(sparse24.mask24(w.cuda()).cpu(), sparse24.expand_pairs(sparse24.pair_index.torch(w)))
    uniforms = [sparse24.group_uniforms(64, 32, 2**63 + 5, device).cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*uniforms)
    old, new = (sparse24.transposable_index(torch.randn(64, 64, device="cuda")) for _ in range(2))
    assert sparse24.flip_rate(old, new) == sparse24.flip_rate(old.cpu(), new.cpu())


@pytest.mark.parametrize("tokens", [64, 61])
def test_layer_gradients_equal_the_cpus(tokens):
    torch.manual_seed(0)
    layer = sparse24.Sparse24Linear(32, 64).double()
    x, dz = torch.randn(tokens, 32, dtype=torch.float64), torch.randn(tokens, 64, dtype=torch.float64)
    layer(x).backward(dz)
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.cuda()
    layer(x.cuda()).backward(dz.cuda())
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.cpu(), grad)


def small_model(sparse, recipe=None):
    args = {"block_size": 64, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}
    activation = sparse24.get_recipe(sparse).activation or "gelu"
    return GPT(GPTConfig(**args, sparse=sparse, activation=activation), recipe).cuda()


VARIANTS = [*((name, {}) for name in sparse24.recipe_names()), ("s_ste", {"fp8": True})]


@pytest.mark.parametrize(("name", "change"), VARIANTS, ids=str)
def test_every_method_trains_compiled_in_bf16(name, change, monkeypatch):
    """The loss falls, and the masks at the end are the masks of the weights."""
    monkeypatch.setattr(act24, "JOIN", 1.0)  # all layers join
    torch.manual_seed(0)
    recipe = dataclasses.replace(sparse24.get_recipe(name), **change)
    model = small_model(name, recipe)
    net = torch.compile(model, fullgraph=True)
    method = {"masked_decay": recipe.masked_decay, "decay_on": recipe.decay_on, "optimizer": recipe.optimizer}
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cuda", **method)
    idx, losses, layers = torch.randint(64, (4, 64), device="cuda"), [], sparse24.sparse_linears(model)
    for step in range(40):
        for layer in layers:
            layer.sparse = step >= 5 or not recipe.dense_pretrain
        sparse24.begin_step(model, 1, step, begin=step == 5)
        sparse24.seed_draws(model, 1, step, 0)
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = net(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparse24.refresh_masks(model, measure=False)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for layer in layers:
        expected = copy.deepcopy(layer).cpu().new_index()
        assert sparse24.flip_rate(layer.index.cpu(), expected) == 0
        assert getattr(layer, "joined", True)


def test_compiled_model_trains_in_bf16_and_sees_new_seeds():
    torch.manual_seed(0)
    model = small_model("fst")
    net = torch.compile(model, fullgraph=True)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cuda", 1e-4)
    idx = torch.randint(64, (4, 64), device="cuda")
    losses, gradients, weight = [], [], model.transformer.h[0].mlp.c_fc.weight

    def backward(seed, step):
        model.zero_grad()
        sparse24.seed_draws(model, seed, step, 0)
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = net(idx, idx)
        loss.backward()
        return loss.item()

    for seed in (2, 1):
        backward(seed, 0)
        gradients.append(weight.grad.clone())
    assert not torch.equal(*gradients), "the weight gradient does not depend on the seed"
    for step in range(40):
        losses.append(backward(1, step))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_training_on_the_kernels_is_training_on_the_twins(monkeypatch):
    """Three steps of a small model with the same masks and MVUE draws. The weights differ by AdamW's rounding only."""
    device, runs = torch.device("cuda", torch.cuda.current_device()), []
    if sparse24.kernel_status(device) != "on":
        pytest.skip(f"CUDA backend: {sparse24.kernel_status(device)}")
    for status in ("on", "off"):
        monkeypatch.setitem(sparse24._STATUS, device, status)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).cuda()
        sparse24.sparsify(model, "fst", ["0", "2"])
        optimizer = sparse24.MaskedDecayAdamW(model.parameters(), model, lr=1e-3, masked_decay=0.1)
        for step in range(3):
            sparse24.seed_draws(model, 1, step, 0)
            model(torch.randn(96, 64, device="cuda")).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            sparse24.refresh_masks(model)
        runs.append(model)
    for p, q in zip(*(model.parameters() for model in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


BENCH_KERNELS = ("--suite=kernels", "--repetitions=2", "--tables=1")  # tests/test_bench.py parses both without a GPU
BENCH_LAYERS = ("--quick", "--budget=1", "--repetitions=3", "--sizes", "124M", "--widths", "256")


def test_bench_measures(tmp_path):
    run_script("bench.py", *BENCH_KERNELS, f"--out_dir={tmp_path}")
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert results["measured"].keys() == {row["name"] for row in results["kernels"]}
    assert all(row["us"] > 0 for row in results["table2"] + results["table3"])


def test_bench_compares_layers(tmp_path):
    """The first case of each suite is measured even if the budget is too small. A failure makes the exit status 1."""
    run_script("bench.py", *BENCH_LAYERS, f"--out_dir={tmp_path}")
    suites = json.loads((tmp_path / "bench.json").read_text())["suites"]
    assert all(suites[name]["rows"][0]["s"]["auto"]["median"] > 0 for name in ("ffn", "block"))
    assert suites["gemm"]["rows"][0]["dense_us"] > 0
    step = suites["e2e"]["rows"][0]
    assert all(step[way]["s"]["median"] > 0 for way in ("compiled", "graphs"))


@pytest.mark.parametrize("compile", [False, True])
def test_deterministic_run_resumes_bit_for_bit(tmp_path, compile):
    settings = {**SETTINGS, "dataset": make_dataset(tmp_path / "data"), "device": "cuda", "deterministic": True}
    settings |= {"compile": compile, "dense_start": 20, "spmm": "dense"}  # each run would measure and choose by itself
    at_once, in_parts = tmp_path / "at_once", tmp_path / "in_parts"
    for out, changes in ((at_once, {}), (in_parts, {"max_iters": 13}), (in_parts, {})):
        assert run_here(out, settings | changes).returncode == 0
    assert state_differences(read_state(at_once), read_state(in_parts)) == []


@pytest.mark.parametrize("name", ["none", "fst", "sr_ste", "s_ste"])
@pytest.mark.parametrize("compile", [True, False])
def test_shards_on_one_gpu_train_as_a_copy_does(tmp_path, name, compile):
    """FSDP2 over NCCL with one rank, stopped and resumed. FSDP gathers the weights in bf16 and frees them after the
    forward, so the backward packs or prunes them again. A thread saves from pinned memory."""
    data = make_dataset(tmp_path / "data")
    changes = {"sparse": name, "n_embd": 64, "dtype": "bfloat16", "device": "cuda", "compile": compile, "dropout": 0.0}
    changes |= {"masked_decay": 2e-3, "mask_interval": 1 if name in ("sr_ste", "s_ste") else 5, "dense_start": 20}
    settings = {**SETTINGS, **changes, "max_iters": 24, "dataset": data}
    rows = {}
    for parallel in ("ddp", "fsdp"):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py"]
        for length in (12, 24):
            run_settings = settings | {"parallel": parallel, "max_iters": length}
            run_script(*torchrun, *to_words(tmp_path / parallel, run_settings))
        rows[parallel] = read_rows(tmp_path / parallel)
        weights = [t for name, t in read_state(tmp_path / parallel)["model"].items() if name.endswith("weight")]
        assert all(t.dtype == torch.float32 for t in weights)
    losses = {name: [row["train_loss"] for row in run_rows if row["train_loss"]] for name, run_rows in rows.items()}
    assert len(losses["fsdp"]) == 24
    assert losses["fsdp"] == pytest.approx(losses["ddp"], abs=0.02)
    assert losses["fsdp"][-1] < losses["fsdp"][0] - 0.3

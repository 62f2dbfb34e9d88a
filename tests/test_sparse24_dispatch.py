"""Dispatch: which calls go to the kernels, and that training with them agrees with the PyTorch specifications.

Without a GPU the kernels run in the Triton interpreter, on CPU tensors.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton backend: triton is not installed")

import kernels
import sparse24
from gemm24 import operands
from gemm24.plan import plan_ffn, set_plan
from model import GPT, GPTConfig
from sparse24 import MaskedDecayAdamW, Sparse24Linear, refresh_masks, sparsify

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
LAUNCHERS = ["transposable_index", "pack_weight_", "pair_index", "soft_threshold24", "sste_scale", "adamw_", "mvue24"]
LAUNCHERS += ["mvue24_pack", "activation", "activation_backward", "activation_backward_mvue24_pack"]
LAUNCHERS += ["relu2_pack", "relu2_backward_pack"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy, for inf and NaN


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def default_switch(monkeypatch):
    monkeypatch.delenv("NANO24_KERNELS", raising=False)


@pytest.fixture
def on_kernels(monkeypatch):
    """CPU tensors go to the kernels."""
    if torch.cuda.is_available():
        pytest.skip("CUDA backend: here the kernels are compiled, not interpreted; tests/gpu/ goes through dispatch")
    kernels.use_patterns(sparse24.PATTERNS)
    monkeypatch.setattr(sparse24, "_kernels", kernels)
    monkeypatch.setattr(sparse24, "_STATUS", {CPU: "on"})


@pytest.fixture
def launched(on_kernels, monkeypatch):
    """As on_kernels. A list of the launchers that were called."""
    calls = []

    def counted(name, launch):
        return lambda *args, **kwargs: (calls.append(name), launch(*args, **kwargs))[1]

    for name in LAUNCHERS:
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# Switching the kernels on


@pytest.fixture
def untested_gpu(monkeypatch):
    """torch sees a GPU that can run the kernels, on which the self-test has not run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(sparse24, "_STATUS", {})
    monkeypatch.setattr(sparse24, "_kernels", None)


def test_cpu_tensors_go_to_the_specifications(monkeypatch):
    monkeypatch.setattr(sparse24, "_kernels", None)  # a launch would fail
    w = torch.randn(8, 16)
    assert torch.equal(sparse24.transposable_index(w), sparse24.transposable_index.torch(w))
    assert torch.equal(sparse24.mvue24(w, 1), sparse24.mvue24.torch(w, 1))
    assert sparse24.use_kernels(CPU) == sparse24.kernel_status(CPU) == "off: the kernels need CUDA, this is cpu"


@pytest.mark.slow
def test_importing_the_operators_imports_no_triton():
    code = "import sys, sparse24; assert not {'triton', 'kernels', 'torch._dynamo'} & {*sys.modules}; import model"
    code += "; assert not {'triton', 'kernels'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(sparse24.__file__), check=True)


@pytest.mark.parametrize(
    ("value", "capability", "hip", "status"),
    [
        ("0", (9, 0), None, "off: NANO24_KERNELS=0"),
        ("1", (7, 5), None, "off: the kernels need an NVIDIA GPU of compute capability 8.0 or more"),
        ("1", (9, 0), "6.2", "off: the kernels need an NVIDIA GPU of compute capability 8.0 or more"),
        ("1", (9, 0), None, "on"),
    ],
)
def test_the_status_gives_the_reason(untested_gpu, monkeypatch, value, capability, hip, status):
    monkeypatch.setenv("NANO24_KERNELS", value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    tested = []
    monkeypatch.setattr(sparse24, "kernel_mismatches", lambda device: tested.append(device) or [])
    assert sparse24.kernel_status(GPU) == "off: use_kernels was not called for this device"
    for _ in range(2):
        assert sparse24.use_kernels(GPU) == sparse24.kernel_status(GPU) == status
    assert tested == ([GPU] if status == "on" else [])  # the self-test runs once
    assert sparse24._kernels is (kernels if status == "on" else None)
    monkeypatch.setattr(sparse24, "_STATUS", {})
    monkeypatch.setenv("NANO24_KERNELS", "off")
    with pytest.raises(ValueError, match=r"NANO24_KERNELS='off', need 0 .* or 1"):
        sparse24.use_kernels(GPU)


@pytest.mark.parametrize(
    ("mismatches", "reason"),
    [
        (lambda device: ["mvue24"], "failed the self-test, results differ from PyTorch: mvue24"),
        (lambda device: 1 / 0, "failed the self-test with ZeroDivisionError: division by zero"),
    ],
)
def test_a_failed_self_test_warns_and_the_specifications_serve(untested_gpu, monkeypatch, mismatches, reason):
    monkeypatch.setattr(sparse24, "kernel_mismatches", mismatches)
    with pytest.warns(UserWarning, match=f"nano24 kernels on cuda:0 off: {reason}; using PyTorch instead"):
        assert sparse24.use_kernels(GPU) == f"off: {reason}"
    assert sparse24._kernels is None


def test_an_old_or_missing_triton_switches_the_kernels_off(untested_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert sparse24.use_kernels(GPU).startswith("off: import of kernels halted")
    monkeypatch.setattr(sparse24, "_STATUS", {})
    monkeypatch.delitem(sys.modules, "kernels")
    monkeypatch.delattr(kernels.triton, "knobs")
    with pytest.warns(UserWarning, match=r"AttributeError: .*knobs"):
        assert sparse24.use_kernels("cuda:0").startswith("off: failed")


def test_a_broken_cuda_context_stops_the_run(untested_gpu, monkeypatch):
    monkeypatch.setattr(sparse24, "kernel_mismatches", lambda device: 1 / 0)

    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        sparse24.use_kernels(GPU)
    assert sparse24._STATUS[GPU] == "off: being tested"


@pytest.mark.slow
def test_self_test_passes_and_names_wrong_kernels(monkeypatch):
    assert sparse24.kernel_mismatches(CPU) == []
    monkeypatch.setattr(kernels, "mvue24", lambda x, seed: sparse24.mvue24.torch(x, seed + 1))
    monkeypatch.setattr(kernels, "pair_index", lambda w: torch.zeros(()))
    monkeypatch.setattr(kernels, "adamw_", lambda *args: None)
    paths = ("(float32)", "", "(whole tiles)", "(token-major)", "(transposed)")
    mvue = [f"mvue24 {path}".strip() for path in paths]
    assert sparse24.kernel_mismatches(CPU) == [*mvue, "pair_index", "adamw_"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_self_test_ignores_torchs_defaults(dtype):
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), torch.device("cpu"):  # as _try_kernels calls it
            assert sparse24.kernel_mismatches(CPU) == []
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def test_operators_run_their_kernels_unless_a_gradient_is_needed(launched):
    w, x = torch.randn(8, 16), torch.randn(2, 6, 8)
    for operator, *args in (
        (sparse24.transposable_index, w),
        (sparse24.mvue24, x, 2**64 - 1),
        (sparse24.soft_threshold24, x),
        (sparse24.pair_index, x),
        (sparse24.sste_scale, x),
        (operands.activation, w, "gelu"),
        (operands.activation_backward, w, w, "gelu"),
    ):
        got, expected = operator(*args), operator.torch(*args)
        assert launched.pop() == operator.__name__
        exact = operator.__name__ not in ("sste_scale", "activation", "activation_backward")
        assert torch.equal(got, expected) if exact else torch.allclose(got, expected, atol=1e-5)
        leaf = args[0].clone().requires_grad_()
        if expected.is_floating_point():
            results = [function(leaf, *args[1:]).sum() for function in (operator, operator.torch)]
            assert torch.equal(*(torch.autograd.grad(result, leaf)[0] for result in results))
        launched.clear()
        with torch.no_grad():
            operator(leaf, *args[1:])
        assert launched.pop() == operator.__name__


def test_arguments_that_no_kernel_takes_go_to_the_specification(launched):
    w, u = torch.randn(8, 16), torch.rand(8, 4)
    assert torch.equal(sparse24.mvue24(w, 0, u=u), sparse24.mvue24.torch(w, 0, u=u))
    assert torch.equal(sparse24.mvue24(w.double(), 1), sparse24.mvue24.torch(w.double(), 1))
    assert sparse24.mvue24(torch.empty(0, 8), 1).shape == (0, 8)
    assert torch.equal(operands.activation(w.t(), "gelu"), operands.activation.torch(w.t(), "gelu"))  # not contiguous
    assert operands.activation(torch.ones(2, 2, 4), "geglu").shape == (1, 2, 4)
    backward, da = operands.activation_backward, torch.randn(16, 8).t()
    for args in ((w.t(), da.t()), (w, da)):
        assert torch.equal(backward(*args, "gelu"), backward.torch(*args, "gelu"))
    assert backward(w, torch.randn(8, 16, requires_grad=True), "gelu").requires_grad
    assert not sparse24.adamw_fits([torch.zeros(9)[1:]])  # 16-byte loads would be misaligned
    assert launched == []


def test_wrong_arguments_are_refused_before_a_launch(launched):
    z = randn(64, 64, dtype=BF16)
    for operator, *args in (
        (operands.activation, z, "selu"),
        (operands.activation_backward, z, z, "selu"),
        (operands.activation_backward_mvue24_pack, z, z, 0, "selu", "sm90"),
    ):
        message = f"{operator.__name__}: activation 'selu' is unknown, need one of gelu, relu"
        with pytest.raises(ValueError, match=message):
            operator(*args)
    for name in ("transposable_index", "mvue24", "soft_threshold24", "sste_scale", "pair_index"):
        args = (0,) if name == "mvue24" else ()
        with pytest.raises(ValueError, match=rf"{name.replace('sste_scale', 'sste_scale|soft_threshold24')}: shape"):
            getattr(sparse24, name)(torch.randn(4, 6), *args)
    assert launched == []


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def train(steps: int, **options) -> tuple[torch.nn.Module, list, MaskedDecayAdamW]:
    """Train a small FST model. Returns the model, the gradients of its first layer and the optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8, bias=False))
    sparsify(model, "fst", ["0", "2"])
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1},
        {"params": [model[0].bias], "weight_decay": 0.0},
    ]
    optimizer = MaskedDecayAdamW(groups, model, lr=1e-2, masked_decay=0.3, **options)
    gradients = []
    for step in range(steps):
        sparse24.seed_draws(model, 1, step, 0)
        model(torch.randn(24, 16)).square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        refresh_masks(model)
    return model, gradients, optimizer


@pytest.mark.parametrize("decay_on", ["grad", pytest.param("weight", marks=pytest.mark.slow)])
def test_training_agrees_with_the_specifications(launched, monkeypatch, decay_on):
    ours, gradients, optimizer = train(3, decay_on=decay_on)
    assert {"transposable_index", "mvue24", "adamw_"} <= set(launched)
    assert launched.count("adamw_") == 3  # one launch a step
    monkeypatch.undo()
    theirs, expected, reference = train(3, decay_on=decay_on)
    assert torch.equal(gradients[0], expected[0])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        for key, value in state.items():
            assert ours["state"][i][key].device == value.device
            torch.testing.assert_close(ours["state"][i][key], value, rtol=1e-5, atol=1e-6)


def test_step_runs_the_kernel_until_its_moments_are_frozen(launched):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    sparsify(model, "step", ["0", "1"])
    optimizer = model[0].recipe.optimizer(model.parameters(), model, lr=0.1, masked_decay=0.0)
    for is_sparse in (False, True):
        launched.clear()
        for layer in model:
            layer.sparse = is_sparse
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert ("adamw_" in launched) == (not is_sparse)


def test_options_and_tensors_that_the_kernel_does_not_take_go_to_torch(launched):
    train(1, fused=True)
    assert "adamw_" not in launched
    model, _, optimizer = train(1)
    launched.clear()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for key in ("foreach", "amsgrad", "maximize", "capturable", "differentiable"):
        before, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], True
        assert optimizer._kernel_step() is False, key
        optimizer.param_groups[0][key] = before
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(32, 32)[:, ::2]
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    p = torch.nn.Parameter(torch.ones(3))  # the kernel needs a multiple of four
    p.grad = torch.ones(3)
    MaskedDecayAdamW([p], torch.nn.Module(), lr=0.1, masked_decay=0.1).step()
    assert p[0] < 1
    assert launched == []


def test_a_backward_that_needs_overwritten_weights_is_refused(launched):
    p = torch.nn.Parameter(torch.ones(4, 4))
    loss = p.square().sum()
    p.grad = torch.ones(4, 4)
    MaskedDecayAdamW([p], torch.nn.Module(), lr=0.1, masked_decay=0.1).step()
    assert launched == ["adamw_"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_optimizer_resumes_without_the_kernel(launched, monkeypatch):
    model, _, optimizer = train(2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    monkeypatch.undo()
    other, _, reference = train(0)
    other.load_state_dict(weights)
    reference.load_state_dict(saved)
    other(torch.ones(4, 16)).sum().backward()
    reference.step()
    assert {int(state["step"]) for state in reference.state_dict()["state"].values()} == {3}


def test_parameters_without_gradient_do_not_change(launched):
    model, _, optimizer = train(1)
    before = model[2].weight.clone()
    model[0].weight.grad = torch.ones(32, 16)
    optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert int(optimizer.state[model[2].weight]["step"]) == 1
    assert int(optimizer.state[model[0].weight]["step"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Layers and packed operands


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [24, 22])
def test_a_compiled_layer_runs_the_kernels_and_reads_new_seeds(on_kernels, tokens):
    torch.manual_seed(0)
    layer = Sparse24Linear(16, 32, recipe="fst")
    x, dz = torch.randn(tokens, 16), torch.randn(tokens, 32)
    net = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (layer, net, net):
        layer.zero_grad()
        sparse24.seed_draws(layer, len(gradients) // 2, 0, 0)
        f(x).backward(dz)
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["masked", "sm80", "sm90"])
def test_packs_reach_the_kernels(launched, order):
    x = randn(128, 64, dtype=BF16)
    for token_major in (False, True):
        packed, db = operands.mvue24_pack(x.t().contiguous() if token_major else x, 5, order, token_major, True)
        assert launched.pop() == "mvue24_pack"
        assert torch.equal(packed, operands.mvue24_pack.torch(x, 5, order, False, True)[0])
        torch.testing.assert_close(db, x.float().sum(1), rtol=1e-5, atol=1e-4)
    assert operands.mvue24_pack(x, 5, order)[1].shape == (0,)
    dz, packed, db = operands.activation_backward_mvue24_pack(torch.cat((x, x.flip(0))), x, 5, "swiglu", order, True)
    assert launched.pop() == "activation_backward_mvue24_pack"
    assert torch.equal(packed, operands.mvue24_pack.torch(dz, 5, order)[0])
    torch.testing.assert_close(db, dz.float().sum(1), rtol=1e-5, atol=1e-4)
    if order == "masked":
        return
    w = randn(128, 128, seed=1)
    index = sparse24.transposable_index.torch(w)
    got, expected = torch.zeros(2, 2, w.numel() * 9 // 16, dtype=BF16)
    operands.pack_weight_(*got, w, index, order)
    assert launched.pop() == "pack_weight_"
    operands.pack_weight_.torch(*expected, w, index, order)
    assert torch.equal(got, expected)
    got = torch.zeros_like(got)
    operands.pack_weight_(*got, w, index, order, metadata=False)
    assert launched.pop() == "pack_weight_"
    assert torch.equal(got[:, : w.numel() // 2], expected[:, : w.numel() // 2])
    assert not got[:, w.numel() // 2 :].any()


@pytest.mark.slow
def test_packs_that_no_kernel_takes_go_to_the_specification(launched, monkeypatch):
    x = randn(128, 192, dtype=BF16)
    for y, order in ((x.half(), "sm90"), (x[:, :188].contiguous(), "masked"), (x.float(), "masked")):
        got, sums = operands.mvue24_pack(y, 5, order, False, True)
        assert torch.equal(got, operands.mvue24_pack.torch(y, 5, order)[0])
        assert torch.equal(sums, y.sum(1, dtype=torch.float32))
        got = operands.activation_backward_mvue24_pack(y, y, 5, "relu2", order)[1]
        assert torch.equal(got, operands.mvue24_pack.torch(operands.activation_backward(y, y, "relu2"), 5, order)[0])
    assert not {"mvue24_pack", "activation_backward_mvue24_pack"} & {*launched}
    masked = operands.mvue24_pack.torch(x, 5, "masked")[0]
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: x.view(len(x), -1)[:, :108] + 0)
    packed, _ = operands.mvue24_pack(x, 5, "library")  # a kernel draws, and the library's converter packs
    assert launched[-1] == "mvue24_pack"
    assert torch.equal(packed.view(128, 108), masked[:, :108])
    with pytest.raises(ValueError, match="order sm90 needs multiples"):
        operands.mvue24_pack(x[:32], 5, "sm90")
    w, launched[:] = torch.randn(64, 64), []
    buffers = torch.zeros(2, w.numel() * 9 // 16, dtype=torch.float16)
    operands.pack_weight_(*buffers, w, sparse24.transposable_index.torch(w), "sm90")
    assert buffers.any()
    operands.pack_weight_(*buffers.bfloat16(), w.t(), sparse24.transposable_index.torch(w), "sm90")
    assert launched == []
    z = randn(128, 128, dtype=BF16)
    strided = z.t().contiguous().t()
    for pre, da, activation, order in (
        (z, strided, "relu2", "sm90"),
        (strided, z, "relu2", "sm90"),
        (z[:96], z[:48], "geglu", "masked"),  # d_ff = 48, but the kernel draws 64 rows at a time
    ):
        dz, packed, _ = operands.activation_backward_mvue24_pack(pre, da, 5, activation, order)
        assert torch.equal(packed, operands.mvue24_pack.torch(dz, 5, order)[0])
    assert "activation_backward_mvue24_pack" not in launched
    launched.clear()
    token_major = z[:96].t().contiguous()  # here too the kernel draws 64 rows at a time
    assert torch.equal(operands.mvue24_pack(token_major, 5, "masked", True)[0], sparse24.mvue24.torch(z[:96], 5))
    assert "mvue24_pack" not in launched


@pytest.mark.slow
def test_activations_reach_the_kernels_that_can_write_them(launched, monkeypatch):
    z, da = randn(64, 128, dtype=BF16), randn(64, 128, seed=1, dtype=BF16)
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: x[:, :48] + 0)
    monkeypatch.setattr(operands, "compress24", torch._cslt_compress)
    forward, backward = operands.relu2_pack, operands.relu2_backward_pack
    for orders, seed, (pre, grad), by_kernels in (
        (("sm90", "masked"), 5, (z, da), True),
        (("masked", "sm80"), 5, (z, da), True),
        (("library", "sm90"), 5, (z, da), True),  # a kernel draws, and the library's converter packs
        (("library", "library"), 5, (z, da), True),
        (("sm90", "masked"), None, (z, da), False),
        (("library", "masked"), None, (z, da), False),
        (("masked", "masked"), 5, (z.float(), da.float()), False),
        (("masked", "masked"), 5, (z[:60], da[:60]), False),
    ):
        launched.clear()
        got = *forward(pre, seed, *orders), *backward(pre, grad, seed, *orders, True)
        assert ({"relu2_pack", "relu2_backward_pack"} <= {*launched}) == by_kernels
        expected = *forward.torch(pre, seed, *orders), *backward.torch(pre, grad, seed, *orders, True)
        for ours, theirs in zip(got[:-1], expected[:-1], strict=True):
            assert torch.equal(ours, theirs), orders
        torch.testing.assert_close(got[-1], expected[-1], rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="order sm80 needs multiples"):
        forward(z, 5, "sm80", "masked")


@pytest.mark.slow
@pytest.mark.parametrize("spmm", ["masked", "emulated"])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_a_planned_ffn_agrees_with_the_specifications(launched, monkeypatch, activation, spmm):
    """Equal bits with relu2. The other activations round differently, within the bounds of tests/test_kernels.py."""
    config = GPTConfig(n_embd=128, n_head=1, n_layer=1, activation=activation, bias=True, ffn_ratio=3.0, sparse="fst")
    torch.manual_seed(0)
    model = GPT(config).to(BF16).transformer.h[0].mlp
    model.c_fc.weight.data, model.c_proj.weight.data = (m.weight.data.float() for m in (model.c_fc, model.c_proj))
    x, dy = (randn(128, 128, seed=seed, dtype=BF16) for seed in (1, 2))
    plan, _ = plan_ffn(config, 128, CPU, BF16, spmm)

    def gradients():
        set_plan(model, plan)
        model.zero_grad()
        y = model(x)
        y.backward(dy)
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    by_kernels = gradients()
    assert {"activation", "mvue24_pack", "activation_backward_mvue24_pack"} <= {*launched}
    assert ("pack_weight_" in launched) == (spmm == "emulated")
    monkeypatch.setattr(sparse24, "_STATUS", {})
    model.c_fc.packed_from = model.c_proj.packed_from = None  # pack again, with metadata
    for got, expected in zip(by_kernels, gradients(), strict=True):
        if activation == "relu2" and got.dim() == 2:
            assert torch.equal(got, expected)
        else:
            assert (got - expected).float().norm() <= 0.02 * expected.float().norm()

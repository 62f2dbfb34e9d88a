"""What only a CUDA GPU can show: `python -m pytest -m gpu`. The twins give the same numbers there as on the CPU."""

import pytest
import torch
from harness import SETTINGS, make_dataset, read_state, run_here, state_differences

import sparse24
from model import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA backend: torch sees no CUDA GPU on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_equal_the_cpu_twins(dtype):
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(sparse24.transposable_index(w.cuda()).cpu(), sparse24.transposable_index_ref(w))
    assert torch.equal(sparse24.mask24(w.cuda()).cpu(), sparse24.mask24_ref(w))
    assert torch.equal(
        sparse24.group_uniforms(64, 32, 2**63 + 5, "cuda").cpu(), sparse24.group_uniforms(64, 32, 2**63 + 5)
    )
    assert torch.equal(sparse24.mvue24(w.cuda(), 7).cpu(), sparse24.mvue24_ref(w, 7))
    assert torch.equal(sparse24.soft_threshold24(w.cuda()).cpu(), sparse24.soft_threshold24_ref(w))
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


def test_compiled_model_trains_in_bf16_and_sees_new_seeds():
    torch.manual_seed(0)
    args = {"block_size": 64, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**args, sparse="fst")).cuda()
    net = torch.compile(model, fullgraph=True)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cuda", 1e-4)
    idx = torch.randint(64, (4, 64), device="cuda")
    losses, gradients = [], []
    for step in range(40):
        sparse24.seed_draws(model, 1, step, 0)
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = net(idx, idx)
        loss.backward()
        if step == 0:  # the same step again, with other draws: another weight gradient
            gradients.append(model.transformer.h[0].mlp.c_fc.weight.grad.clone())
            model.zero_grad()
            sparse24.seed_draws(model, 2, step, 0)
            with torch.autocast("cuda", torch.bfloat16):
                _, loss = net(idx, idx)
            loss.backward()
            gradients.append(model.transformer.h[0].mlp.c_fc.weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("compile", [False, True])
def test_deterministic_run_resumes_bit_for_bit(tmp_path, compile):
    settings = {**SETTINGS, "dataset": make_dataset(tmp_path / "data"), "device": "cuda", "deterministic": True}
    settings |= {"compile": compile, "dense_start": 20}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, changes in ((whole, {}), (parts, {"max_iters": 13}), (parts, {})):
        assert run_here(out, settings | changes).returncode == 0
    assert state_differences(read_state(whole), read_state(parts)) == []

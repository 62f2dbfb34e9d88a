"""Tests of the 2:4 GEMMs that need a CUDA GPU: `python -m pytest -m gpu tests/gemm24`.

The tests of cuSPARSELt skip with a reason if torch has no cuSPARSELt or this GPU cannot use it.
"""

import copy

import pytest
import torch

import sparse24
from gemm24 import cusparselt, operands
from gemm24.choose import (
    ALGORITHMS,
    choose,
    close_to,
    fault_in_graph,
    fault_of,
    packed_samples,
    random_24,
    time_interleaved,
    trusted_order,
    unavailable,
)
from gemm24.ffn import pack_weights
from gemm24.layout import pack24
from gemm24.matmul import Choice, matmul24
from gemm24.operands import pack_matrix
from gemm24.plan import GEMMS, ffn_gemms, plan_ffn, set_plan
from model import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA backend: torch sees no CUDA GPU on this machine"),
]
CONFIG = GPTConfig(block_size=128, vocab_size=128, n_layer=2, n_head=4, n_embd=256, sparse="fst", bias=True)
TOKENS = 8 * 128


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def order(device):
    """The order in which this GPU's cuSPARSELt operands are packed."""
    why = unavailable(device, torch.bfloat16)
    if why:
        pytest.skip(f"cusparselt: {why}")
    return trusted_order(device)[0]


def first_sound(name, order, device, bias=False):
    """(gemm, choice, operand, b, bias, reference): the first sound algorithm of an FFN's GEMM, on random operands."""
    gemm = ffn_gemms(256, 1024, TOKENS, "gelu", bias)[name]
    a = random_24(gemm.m, gemm.k, device)
    b = torch.randn(*((gemm.n, gemm.k) if gemm.b_column_major else (gemm.k, gemm.n)), device=device).bfloat16()
    b = b.t() if gemm.b_column_major else b
    bias = torch.randn(gemm.m, device=device).bfloat16() if gemm.bias else None
    wide = None if bias is None else bias.float()
    reference = matmul24(a.float(), b.float(), wide, gemm.m, gemm.transposed, Choice())
    operand = pack_matrix(a, order)
    for alg_id in range(ALGORITHMS):
        choice = Choice("cusparselt", order, alg_id)
        call = lambda choice=choice: matmul24(operand, b, bias, gemm.m, gemm.transposed, choice)  # noqa: E731
        if fault_of(call, reference) is None:
            return gemm, choice, operand, b, bias, reference
    return pytest.fail(f"no algorithm is sound for {gemm}")


def test_our_packers_write_the_layout(device):
    x = random_24(128, 192, device)
    for order in ("sm80", "sm90"):
        for w_24, packed in (*packed_samples(order, device), (x, pack_matrix(x, order))):
            assert torch.equal(packed.cpu(), pack24(w_24.cpu(), w_24.cpu() != 0, order))


def test_cusparselt_reads_the_order_of_this_gpu(device, order):
    """If this fails, results are right but packing is slower, since the library's own compress serves."""
    assert order == ("sm90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm80")


@pytest.mark.parametrize("name", GEMMS)
def test_each_gemm_of_the_ffn_is_right(device, order, name):
    gemm, choice, operand, b, bias, reference = first_sound(name, order, device, bias=True)
    assert close_to(matmul24(operand, b, bias, gemm.m, gemm.transposed, choice), reference)
    torch._dynamo.reset()  # one code object is compiled for each GEMM
    compiled = torch.compile(matmul24, fullgraph=True)
    assert close_to(compiled(operand, b, bias, gemm.m, gemm.transposed, choice), reference)


def test_a_gemm_can_be_captured(device, order):
    gemm, choice, operand, b, _, reference = first_sound("y", order, device)
    assert fault_in_graph(lambda: matmul24(operand, b, None, gemm.m, gemm.transposed, choice), reference) is None


# ---------------------------------------------------------------------------------------------------------------------
# cuSPARSELt with cached plans


@pytest.fixture(scope="module")
def planned_gemm(device, order):
    """(multiply, b, reference): multiply(b) is the gradient of W1 by a cached plan."""
    gemm, choice, operand, b, _, reference = first_sound("dw1", order, device)
    return lambda b: cusparselt.matmul(operand, b, gemm.m, False, choice.alg_id), b, reference


@pytest.mark.parametrize("name", GEMMS)
def test_a_cached_plan_gives_the_bits_of_pytorchs_op(device, order, name):
    gemm, choice, operand, b, _, _ = first_sound(name, order, device)
    d = cusparselt.matmul(operand, b, gemm.m, gemm.transposed, choice.alg_id)
    options = {"transpose_result": gemm.transposed, "alg_id": choice.alg_id}
    assert torch.equal(d, torch._cslt_sparse_mm(operand.view(gemm.m, -1), b, **options))


def test_streams_may_share_a_plan(planned_gemm, device):
    multiply, b, reference = planned_gemm
    streams, results = [torch.cuda.Stream(device) for _ in range(4)], []
    torch.cuda.synchronize()
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            results.append(multiply(b))
    torch.cuda.synchronize()
    assert all(close_to(d, reference) for d in results)


def test_a_graph_with_a_cached_plan_outlives_other_work(planned_gemm, device):
    """Between capture and replay, memory that was free is overwritten and B changes."""
    multiply, b, reference = planned_gemm
    b = b.clone()
    multiply(b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        d = multiply(b)
    b.neg_()
    filler = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(16)]
    assert filler[0].isnan().all()
    for _ in range(2):
        graph.replay()
        assert close_to(d, -reference)


def test_times_are_those_of_the_gpu(device):
    small, large = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for n in (256, 4096))
    for graph in (False, True):
        a, b = time_interleaved([lambda: small @ small, lambda: large @ large], 5, graph, device)
        assert len(a) == len(b) == 5
        assert 0 < min(a) < min(b)


def test_choosing_ends_with_a_table_and_right_results(device, tmp_path):
    gemms = ffn_gemms(1024, 4096, 4096, "gelu", False)
    report = choose(gemms, device, cache=tmp_path / "c")
    assert set(report.choices) == set(GEMMS)
    for row in report.rows:
        if row["chosen"]:
            assert row["best_us"] < row["dense_us"]
    assert len(report.text().splitlines()) == len(report.notes) + (1 + len(GEMMS) if report.rows else 0)
    assert choose(gemms, device, cache=tmp_path / "c").choices == report.choices


def best_spmm(device) -> str:
    return "masked" if unavailable(device, torch.bfloat16) else "cusparselt"


def planned(spmm, device):
    """(model, plan) for this spmm; skips if it is impossible here."""
    torch.manual_seed(0)
    model = GPT(CONFIG).to(device)
    try:
        plan, _ = plan_ffn(CONFIG, TOKENS, device, torch.bfloat16, spmm)
    except ValueError as error:
        pytest.skip(str(error))
    set_plan(model, plan)
    return model, plan


def backward(model, device, stride=1) -> torch.Tensor:
    """One forward and backward. Returns the loss."""
    idx = (torch.arange(TOKENS, device=device) * stride % 128).view(8, 128)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(idx, idx.roll(1, 1))[1]
    loss.backward()
    return loss.detach()


def train(model, steps, device):
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda", 1e-4)
    losses = []
    for step in range(steps):
        sparse24.seed_draws(model, 1, step, 0)
        losses.append(backward(model, device, step % 7 + 1))
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 39:
            sparse24.refresh_masks(model, measure=False)
        pack_weights(model)
    return torch.stack(losses).tolist()


@pytest.mark.parametrize("spmm", ["emulated", "cusparselt"])
def test_gradients_agree_with_dense_gemms_on_pruned_matrices(device, spmm):
    """The two round differently. A wrong operand would change a gradient by about its norm."""
    gradients = []
    for way in ("masked", spmm):
        model, _ = planned(way, device)
        sparse24.seed_draws(model, 1, 0, 0)
        backward(model, device)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        slack = 0.2 if ".mlp." in name else 0.02  # rounding can change single MVUE draws
        assert (grad - gradients[1][name]).norm() <= slack * grad.norm(), name


def test_200_steps_agree_with_dense_gemms_on_pruned_matrices(device):
    curves = [train(planned(way, device)[0], 200, device) for way in ("masked", "cusparselt")]
    assert curves[0][-1] < 0.5 * curves[0][0]
    means = [torch.tensor(curve).view(10, 20).mean(1) for curve in curves]
    torch.testing.assert_close(*means, rtol=0.05, atol=0.02)


def test_a_step_does_not_synchronise(device):
    model, _ = planned(best_spmm(device), device)
    train(model, 2, device)  # the first steps may wait, to compile and to plan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse24.seed_draws(model, 1, 5, 0)
        backward(model, device)
        sparse24.refresh_masks(model, measure=False)
        pack_weights(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_ffn_reads_new_weights_and_new_seeds(device):
    """Forward and backward are one CUDA graph. Its replay must follow an optimizer step and other seeds."""
    model, plan = planned(best_spmm(device), device)
    mlp = model.transformer.h[0].mlp.bfloat16()
    set_plan(mlp, plan)
    x, dy = (torch.randn(8, 128, 256, device=device).bfloat16() for _ in range(2))
    x.requires_grad_()

    def call():
        y = mlp(x)
        return (y, *torch.autograd.grad(y, [x, mlp.c_fc.weight, mlp.c_proj.weight], dy))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for step in range(2):
        with torch.no_grad():
            mlp.c_fc.weight.mul_(1 + step)
        sparse24.seed_draws(mlp, 1, step, 0)
        pack_weights(mlp)
        graph.replay()
        for got, expected in zip(captured, call(), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_planned_model_compiles(device, mode):
    model, _ = planned(best_spmm(device), device)
    eager, losses = copy.deepcopy(model), []
    set_plan(eager, model.transformer.h[0].mlp.plan)
    for net in (eager, torch.compile(model, mode=mode, fullgraph=True)):
        optimizer = (eager if net is eager else model).configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda", 1e-4)
        curve, module = [], eager if net is eager else model
        for p in module.parameters():  # as train.py does: the next replay overwrites what a CUDA graph returned
            p.grad = torch.zeros_like(p)
        for step in range(6):
            for micro_step in range(2):
                sparse24.seed_draws(module, 1, step, micro_step)
                idx = (torch.arange(TOKENS, device=device) * (micro_step + 1)).remainder(128).view(8, 128)
                torch.compiler.cudagraph_mark_step_begin()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = net(idx, idx.roll(1, 1))[1]
                loss.backward()
                curve.append(loss.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            pack_weights(module)
        losses.append(curve)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_recomputing_the_activation_saves_its_memory_when_compiled(device, monkeypatch):
    model, plan = planned("masked", device)
    needed, activation = [], operands.activation
    for recompute in (True, False):
        if not recompute:  # then the compiler merges the two calls and saves the result
            monkeypatch.setattr(operands, "activation", lambda z, name, recompute=False: activation(z, name))
        set_plan(model, plan)
        torch._dynamo.reset()
        mlp = torch.compile(model.transformer.h[0].mlp, fullgraph=True)
        x = torch.randn(8, 128, 256, device=device, requires_grad=True)
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(device)
            with torch.autocast("cuda", torch.bfloat16):
                y = mlp(x)
            held = torch.cuda.memory_allocated(device) - before
            y.float().sum().backward()
        needed.append(held)
        model.zero_grad(set_to_none=True)
    a = 2 * 4 * 256 * TOKENS
    assert 0.9 * a <= needed[1] - needed[0] <= 1.1 * a

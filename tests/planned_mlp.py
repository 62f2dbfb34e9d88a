"""Helpers of tests/gemm24/: matrices with 2:4 masks, and MLPs with two sparse layers and plans for them."""

import copy

import torch

from gemm24.ffn import FFNPlan
from gemm24.matmul import Choice
from gemm24.plan import GEMMS, set_plan
from model import GATED, MLP, GPTConfig
from sparse24 import RECIPES, mask24, seed_draws, sparse_linears, sparsify

D, D_FF = 128, 256
SHAPES = [("sm80", 128, 64), ("sm80", 256, 192), ("sm90", 64, 64), ("sm90", 192, 128), ("sm90", 64, 256)]
# The emulated backend unpacks the bytes that a GPU's library would read, and multiplies.
CHOICES = {order: Choice("emulated", order) for order in ("sm80", "sm90")}
CHOICES |= {"masked": Choice(), "library": Choice("cusparselt", "library")}


def matrix_and_mask(rows: int, columns: int, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """A random dense matrix, and a 2:4 mask that is independent of it."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)
    return x, mask24(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))


def make_mlp(activation="gelu", bias=True, recipe=RECIPES["fst"], dtype=torch.float32, d=D, d_ff=D_FF) -> MLP:
    """An MLP with both linears sparse and random biases."""
    torch.manual_seed(3)
    ratio = d_ff / d * (1.5 if activation in GATED else 1)
    mlp = MLP(GPTConfig(n_embd=d, n_head=1, n_layer=1, activation=activation, bias=bias, ffn_ratio=ratio))
    sparsify(mlp, recipe, lambda name, module: True)
    for layer in sparse_linears(mlp):
        if bias:
            torch.nn.init.normal_(layer.bias)
    seed_draws(mlp.to(dtype), 1, 2, 3)
    return mlp


def make_plan(mlp, tokens, dtype=torch.float32, order="masked", gemms=GEMMS, **fields) -> FFNPlan:
    """A plan in which `gemms` read operands in this order and the others are dense."""
    choices = {name: CHOICES[order] if name in gemms else Choice() for name in GEMMS}
    return FFNPlan(mlp.activation, tokens, dtype, mlp.c_fc.recipe.mvue, **choices)._replace(**fields)


def planned(mlp, *args, **options):
    """A copy of the MLP that follows make_plan(...)."""
    mlp = copy.deepcopy(mlp)
    set_plan(mlp, make_plan(mlp, *args, **options))
    return mlp


def run(mlp, x, dy, forward=None) -> dict[str, torch.Tensor]:
    """Output and all gradients of one call."""
    x = x.clone().requires_grad_()
    mlp.zero_grad()
    y = (mlp if forward is None else forward)(x)
    y.backward(dy)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in mlp.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


def make_data(tokens, dtype=torch.float32, batch=1):
    """(x, dy) with this number of tokens."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens // batch, D, generator=generator).to(dtype) for _ in range(2)]


def assert_equal(got: dict, expected: dict) -> None:
    """The same bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def assert_close(got: dict, expected: dict) -> None:
    """Equal within float64 rounding."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)

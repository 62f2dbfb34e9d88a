"""MLPs of two sparse layers and plans for them, which the tests of gemm24/ffn.py and gemm24/plan.py multiply by."""

import copy

import torch

from gemm24.ffn import FFNPlan
from gemm24.matmul import Choice
from gemm24.plan import GEMMS, set_plan
from model import GATED, MLP, GPTConfig
from sparse24 import RECIPES, seed_draws, sparse_linears, sparsify

D, D_FF = 128, 256
ORDERS = ("masked", "sm80", "sm90", "library")
# The emulated backend multiplies what it unpacks from the same bytes that a GPU's library would read.
CHOICES = {order: Choice("emulated", order) for order in ("sm80", "sm90")}
CHOICES |= {"masked": Choice(), "library": Choice("cusparselt", "library")}


def make_mlp(activation="gelu", bias=True, recipe=RECIPES["fst"], dtype=torch.float32, d=D, d_ff=D_FF) -> MLP:
    """An MLP of these widths with both linears sparse; biases away from zero."""
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
    """A plan whose `gemms` multiply operands in this order, and the others dense matrices."""
    choices = {name: CHOICES[order] if name in gemms else Choice() for name in GEMMS}
    return FFNPlan(mlp.activation, tokens, dtype, mlp.c_fc.recipe.mvue, **choices)._replace(**fields)


def planned(mlp, *args, **options):
    """A copy of the MLP that follows the plan of `make_plan`."""
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
    """(x, dy) of so many tokens."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens // batch, D, generator=generator).to(dtype) for _ in range(2)]


def assert_equal(got: dict, expected: dict) -> None:
    """The same bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def assert_close(got: dict, expected: dict) -> None:
    """The same numbers, of float64."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)

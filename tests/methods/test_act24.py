"""act24: the equations against autograd, and when a layer joins."""

import pytest
import torch
import torch.nn.functional as F

from methods import act24
from model import MLP, GPTConfig
from sparse24 import get_recipe, mask24, sparsify

D, D_FF, TOKENS = 16, 64, 24


def joined_mlp(name: str = "act24", bias: bool = True, dtype=torch.float64, **fields) -> MLP:
    """An MLP of a recipe that computes 2:4."""
    torch.manual_seed(0)
    mlp = MLP(GPTConfig(n_embd=D, n_head=1, activation="relu2", bias=bias)).to(dtype)
    for p in mlp.parameters():
        torch.nn.init.normal_(p, std=0.3)
    sparsify(mlp, get_recipe(name), ["c_fc", "c_proj"])
    mlp.c_proj.joined = True
    for number, layer in enumerate((mlp.c_fc, mlp.c_proj)):
        layer.seed.fill_(number + 5)
        layer.seeded = True
    return mlp


def gradients(y: torch.Tensor, mlp: MLP, x: torch.Tensor) -> list[torch.Tensor]:
    weights = (mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias)
    return torch.autograd.grad(y.square().sum(), [x, *(w for w in weights if w is not None)])


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS - 1])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_autograds_where_no_group_of_tokens_overflows(tokens, bias):
    mlp = joined_mlp(bias=bias)
    x = torch.randn(1, tokens, D, dtype=torch.float64)
    x[:, [t for t in range(tokens) if t % 4 > 1]] = -1  # at most two of each four tokens can be active
    mlp.c_fc.weight.data.abs_()
    if bias:
        mlp.c_fc.bias.data.zero_()
    x.requires_grad_()
    z = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    a = torch.where(mask24(F.relu(z)), F.relu(z).square(), 0)
    expected = F.linear(a, mlp.c_proj.weight, mlp.c_proj.bias)
    y = mlp(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(y, mlp, x), gradients(expected, mlp, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_layer_joins_and_leaves_with_hysteresis():
    layer = joined_mlp().c_proj
    layer.joined, decisions = False, []
    for crowded in (11, 6, 5, 10, 11, 6):  # percent
        layer.counts.copy_(torch.tensor([0, crowded, 100]))
        layer.begin_step(0, act24.INTERVAL + 1, 0)
        decisions.append(layer.joined)
    assert decisions == [False, False, True, True, False, False]

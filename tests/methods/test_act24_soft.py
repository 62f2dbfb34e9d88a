"""act24_soft: its model against autograd. test_act24.py has the tests of both methods."""

import torch
import torch.nn.functional as F

from sparse24 import mask24, soft_threshold24
from tests.methods.test_act24 import gradients, joined_mlp


def soft(w: torch.Tensor) -> torch.Tensor:
    """S(W), which autograd can differentiate."""
    groups = w.unflatten(-1, (-1, 4))
    threshold = groups.abs().sort(-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - threshold).clamp(min=0)).flatten(-2)


def test_forward_and_gradient_are_those_of_the_soft_thresholded_model():
    mlp = joined_mlp("act24_soft", bias=False)
    x, dy = torch.randn(2, 1, 24, 16, dtype=torch.float64)
    x[:, [t for t in range(24) if t % 4 > 1]] = 0  # at most two of each four tokens can be active
    x.requires_grad_()
    w1 = mlp.c_fc.beta * soft(mlp.c_fc.weight)
    w2 = (mlp.c_proj.beta * soft(mlp.c_proj.weight.t())).t()
    z = F.linear(x, w1)
    y = F.linear(torch.where(mask24(F.relu(z)), F.relu(z).square(), 0), w2)
    torch.testing.assert_close(soft(mlp.c_fc.weight), soft_threshold24(mlp.c_fc.weight))
    torch.testing.assert_close(mlp.c_proj.pruned_weight(), w2)
    wanted = (y, *torch.autograd.grad(y, (x, mlp.c_fc.weight, mlp.c_proj.weight), dy))
    for got, expected in zip(gradients(mlp, x.detach(), dy).values(), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

"""act24_soft: the equations against autograd."""

import torch
import torch.nn.functional as F

from sparse24 import mask24, soft_threshold24
from tests.methods.test_act24 import TOKENS, D, gradients, joined_mlp


def soft(w: torch.Tensor) -> torch.Tensor:
    """S(W), which autograd can differentiate."""
    groups = w.unflatten(-1, (-1, 4))
    threshold = groups.abs().sort(-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - threshold).clamp(min=0)).flatten(-2)


def test_forward_and_gradient_are_those_of_the_soft_thresholded_model():
    mlp = joined_mlp("act24_soft", bias=False)
    x = torch.randn(1, TOKENS, D, dtype=torch.float64)
    x[:, [t for t in range(TOKENS) if t % 4 > 1]] = 0
    x.requires_grad_()
    w1 = mlp.c_fc.beta * soft(mlp.c_fc.weight)
    w2 = (mlp.c_proj.beta * soft(mlp.c_proj.weight.t())).t()
    z = F.linear(x, w1)
    a = torch.where(mask24(F.relu(z)), F.relu(z).square(), 0)
    expected, y = F.linear(a, w2), mlp(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mlp.c_proj.pruned_weight(), w2)
    torch.testing.assert_close(soft(mlp.c_fc.weight), soft_threshold24(mlp.c_fc.weight))
    for got, want in zip(gradients(y, mlp, x), gradients(expected, mlp, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

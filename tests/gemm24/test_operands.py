"""gemm24/operands.py: the specifications, with which tests/test_kernels.py compares the kernels."""

import math

import pytest
import torch

from gemm24.layout import pack24, unpack24
from gemm24.operands import (
    ACTIVATIONS,
    GATED,
    activation,
    activation_backward,
    activation_backward_mvue24_pack,
    empty_operands,
    mvue24_pack,
    pack_matrix,
    relu2_backward_pack,
    relu2_pack,
    write_operands,
)
from sparse24 import expand_pairs, mvue24, pair_index, prune, sste_scale, transposable_index


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_are_autograds(name):
    z = randn(16, 6, dtype=torch.float64)
    leaf, da = z.t().contiguous().requires_grad_(), randn(8 if name in GATED else 16, 6, seed=1, dtype=torch.float64)
    expected = ACTIVATIONS[name](leaf)
    expected.backward(da.t())
    torch.testing.assert_close(activation(z, name), expected.t().detach())
    torch.testing.assert_close(activation_backward(z, da, name), leaf.grad.t())


def test_activations_refuse_wrong_names_and_shapes():
    message = "activation: activation 'selu' is unknown, need one of gelu, relu2, geglu, swi"
    with pytest.raises(ValueError, match=message):
        activation(randn(4, 4), "selu")
    with pytest.raises(ValueError, match=r"activation: z \(3, 8\), geglu needs \(2 d_ff, tokens\)"):
        activation(randn(3, 8), "geglu")
    with pytest.raises(ValueError, match=r"activation_backward: da \(1, 8\), need \(4, 8\) for z \(4, 8\)"):
        activation_backward(randn(4, 8), randn(1, 8), "gelu")


@pytest.mark.parametrize("token_major", [False, True])
def test_packed_gradients_hold_the_draws_and_the_sums(token_major):
    x = randn(64, 128, dtype=torch.bfloat16)
    packed, sums = mvue24_pack(x.t().contiguous() if token_major else x, 7, "sm90", token_major, True)
    assert torch.equal(unpack24(packed, 64, 128, "sm90"), mvue24(x, 7))
    torch.testing.assert_close(sums, x.float().sum(1))
    da = randn(64, 128, seed=1, dtype=torch.bfloat16)
    dz, packed, sums = activation_backward_mvue24_pack(x, da, 7, "gelu", "sm90", True)
    assert torch.equal(dz, activation_backward(x, da, "gelu"))
    assert torch.equal(unpack24(packed, 64, 128, "sm90"), mvue24(dz, 7))
    torch.testing.assert_close(sums, dz.float().sum(1))


def test_a_pruned_matrix_is_packed_in_the_layout():
    x = randn(64, 128, dtype=torch.bfloat16)
    mask = expand_pairs(pair_index(x))
    x = torch.where(mask, x, 0)
    assert torch.equal(pack_matrix(x, "sm90").view(torch.int16), pack24(x, mask, "sm90").view(torch.int16))
    assert pack_matrix(x, "masked") is x


@pytest.mark.parametrize("mask", ["transposable", "row", "soft"])
def test_operands_hold_the_pruned_weight(mask):
    w = randn(64, 128)
    index, beta = (transposable_index if mask == "transposable" else pair_index)(w), sste_scale(w)
    orders = ("sm90", "sm90" if mask == "transposable" else "masked")
    buffers = empty_operands(w, mask, orders, torch.bfloat16)
    write_operands(buffers, w, index, beta, mask, orders)
    w_24, packed, packed_t = buffers
    expected = prune(w, index, beta, mask).to(torch.bfloat16)
    assert torch.equal(unpack24(packed, 64, 128, "sm90"), expected)
    if mask == "transposable":
        assert w_24 is None
        assert torch.equal(unpack24(packed_t, 128, 64, "sm90"), expected.t())
    else:
        assert torch.equal(w_24, expected)
        assert packed_t is None


TOP2 = [  # four features of z, those of A; da is 3 everywhere
    ([-1.0, 2.0, 3.0, 1.0], [0.0, 4.0, 9.0, 0.0]),
    ([2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 0.0, 0.0]),  # ties keep the lower index
    ([1.0, 2.0, 2.0, 2.0], [0.0, 4.0, 4.0, 0.0]),
    ([2.0, 1.0, 1.0, 1.0], [4.0, 1.0, 0.0, 0.0]),
    ([-1.0, -2.0, -3.0, -4.0], [0.0] * 4),
    ([-1.0, -2.0, -3.0, 0.5], [0.0, 0.0, 0.0, 0.25]),
    ([math.inf, 1.0, math.nan, 2.0], [math.inf, 0.0, math.nan, 0.0]),  # NaN counts as the largest
    ([-math.nan, math.inf, math.nan, math.inf], [math.nan, 0.0, math.nan, 0.0]),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_top2_of_squared_relu_by_hand(dtype):
    z, expected = (torch.tensor(column, dtype=dtype) for column in zip(*TOP2, strict=True))
    a, a_t = relu2_pack(z, None, "masked", "masked")  # no seed: A^T itself
    torch.testing.assert_close(a, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a_t, expected.t(), rtol=0, atol=0, equal_nan=True)
    dz, dz_t, sums = relu2_backward_pack(z, torch.full_like(z, 3), None, "masked", "masked", True)
    torch.testing.assert_close(dz, 6 * expected.sqrt(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dz_t, dz.t(), rtol=0, atol=0, equal_nan=True)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums, dz.sum(0, dtype=sums.dtype), rtol=0, atol=0, equal_nan=True)
    assert relu2_backward_pack(z, z, None, "masked", "masked")[2].shape == (0,)


@pytest.mark.parametrize("orders", [("sm90", "sm80"), ("sm80", "sm90"), ("masked", "sm90")])
def test_packed_activations_hold_the_masked_ones(orders):
    z, da = randn(128, 256, dtype=torch.bfloat16), randn(128, 256, seed=1, dtype=torch.bfloat16)
    a, a_t = relu2_pack(z, 7, "masked", "masked")
    assert torch.equal(a_t, mvue24(a.t(), 7))  # drawn from the rounded A
    dz, dz_t, sums = relu2_backward_pack(z, da, 7, "masked", "masked", True)
    assert torch.equal(dz_t, mvue24(dz.t(), 7))
    assert torch.equal(dz != 0, (a != 0) & (da != 0))
    forward, backward = relu2_pack(z, 7, *orders), relu2_backward_pack(z, da, 7, *orders, True)
    for got, expected in ((forward, (a, a_t)), (backward, (dz, dz_t))):
        for operand, masked, order in zip(got, expected, orders, strict=False):
            assert torch.equal(operand if order == "masked" else unpack24(operand, *masked.shape, order), masked)
    assert torch.equal(backward[2], sums)
    torch.testing.assert_close(sums, dz.float().sum(0))


def test_activations_that_do_not_fit_an_order_are_refused():
    z = randn(64, 128, dtype=torch.bfloat16)
    for width, orders, message in (
        (128, ("sm80", "sm90"), r"shape \(64, 128\), order sm80 needs multiples of \(128, 64\)"),
        (128, ("sm90", "sm70"), "metadata order 'sm70' is unknown, need"),
        (126, ("masked", "masked"), r"pair_index: shape \(64, 126\)"),
    ):
        with pytest.raises(ValueError, match=message):
            relu2_pack(z[:, :width], 7, *orders)

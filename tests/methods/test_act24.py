"""act24 and act24_soft: the equations by hand and against autograd, packed products, state, and when a layer joins."""

import copy
import io
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import sparse24
from gemm24 import operands
from gemm24.ffn import FFNPlan
from gemm24.matmul import Choice
from methods import act24
from model import GPT, MLP, GPTConfig
from sparse24 import get_recipe, mask24, mvue24, seed_draws, soft_threshold24, sparsify

METHODS = ["act24", "act24_soft"]
EMULATED = Choice("emulated", "sm90")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def joined_mlp(name="act24", bias=True, dtype=torch.float64, d=16, d_ff=64, **changes) -> MLP:
    """An MLP that computes 2:4. changes: of the recipe."""
    torch.manual_seed(0)
    config = GPTConfig(n_embd=d, n_head=1, activation="relu2", bias=bias, ffn_ratio=d_ff / d)
    mlp = MLP(config).to(dtype)
    for p in mlp.parameters():
        nn.init.normal_(p, std=0.3)
    sparsify(mlp, replace(get_recipe(name), **changes), ["c_fc", "c_proj"])
    mlp.c_proj.joined = True
    seed_draws(mlp, 1, 2, 3)
    return mlp


def identity_mlp(name="act24", **changes) -> MLP:
    """One in which Z = X and Y = A: the weights are 1, and S(1) = 1."""
    mlp = joined_mlp(name, bias=False, d=4, d_ff=4, **changes)
    for layer in (mlp.c_fc, mlp.c_proj):
        nn.init.eye_(layer.weight)
        layer.refresh(begin=True)
    return mlp


def gradients(mlp: MLP, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Y, dX and the gradients of all parameters."""
    x = x.clone().requires_grad_()
    y = mlp(x)
    names, parameters = zip(*mlp.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), dy)
    return {"y": y.detach()} | dict(zip(("dx", *names), grads, strict=True))


def by_hand(mlp: MLP, x: torch.Tensor, dy: torch.Tensor, dtype, tokens="mvue") -> dict[str, torch.Tensor]:
    """`gradients` by the equations, for x, dy (1, T, d). tokens: as act24.TOKENS, or "dense"."""
    c_fc, c_proj = mlp.c_fc, mlp.c_proj
    x, dy, is_soft = x[0].to(dtype), dy[0].to(dtype), c_fc.recipe.mask == "soft"
    w1, w2_t = c_fc.weight.detach(), c_proj.weight.detach().t()
    s1, s2_t = (
        (soft_threshold24(w) * layer.beta if is_soft else w).to(dtype) for w, layer in ((w1, c_fc), (w2_t, c_proj))
    )
    b1, b2 = (layer.bias.detach().to(dtype) for layer in (c_fc, c_proj))
    z = F.linear(x, s1, b1)
    r = F.relu(z.to(torch.promote_types(dtype, torch.float32)))
    a = torch.where(mask24(r), r.square(), 0).to(dtype)
    y = a @ s2_t + b2
    dz = torch.where(mask24(r), 2 * r * F.linear(dy, s2_t).to(r.dtype), 0).to(dtype)

    def sampled(t, layer):
        """TOK(t^T), after zero tokens up to a multiple of four."""
        t = F.pad(t, (0, 0, 0, -len(t) % 4)).t()
        if tokens == "top2":
            groups = t.unflatten(1, (4, -1)).transpose(1, 2)
            return torch.where(mask24(groups), groups, 0).transpose(1, 2).flatten(1)
        return mvue24(t, layer.seed) if tokens == "mvue" else t

    padding = (0, 0, 0, -len(x) % 4)
    dw1 = (sampled(dz, c_fc) @ F.pad(x, padding)).to(w1.dtype)
    dw2_t = (sampled(a, c_proj) @ F.pad(dy, padding)).to(w1.dtype)
    if is_soft:
        dw1 = sparse24.soft_threshold24_backward(dw1, w1) * c_fc.beta
        dw2_t = sparse24.soft_threshold24_backward(dw2_t, w2_t) * c_proj.beta
    result = {"y": y[None], "dx": (dz @ s1)[None], "c_fc.weight": dw1, "c_fc.bias": dz.sum(0)}
    return result | {"c_proj.weight": dw2_t.t(), "c_proj.bias": dy.sum(0)}


def assert_close(got: dict, expected: dict, **tolerance) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        options = tolerance or EXACT
        torch.testing.assert_close(got[name], tensor.to(got[name].dtype), **options, msg=lambda t, n=name: f"{n}: {t}")


# ---------------------------------------------------------------------------------------------------------------------
# The equations


def test_a_hand_case():
    """Two of each four tokens are active in each feature, so nothing is drawn."""
    x = torch.tensor([[3.0, 1, 2, -5], [2, 2, 2, 2], [1, 3, 3, 3], [-1, -1, -1, 4]], dtype=torch.float64)
    a = torch.tensor([[9.0, 0, 4, 0], [4, 4, 0, 0], [0, 9, 9, 0], [0, 0, 0, 16]], dtype=torch.float64)
    dy = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64).expand(4, 4).contiguous()
    dz = torch.tensor([[6.0, 0, 12, 0], [4, 8, 0, 0], [0, 12, 18, 0], [0, 0, 0, 32]], dtype=torch.float64)
    got = gradients(identity_mlp(), x, dy)
    assert_close(got, {"y": a, "dx": dz, "c_fc.weight": dz.t() @ x, "c_proj.weight": dy.t() @ a})
    with torch.no_grad():
        assert torch.equal(identity_mlp()(x), a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_keep_the_lower_index_and_nan_and_inf_are_the_largest(dtype):
    nan, inf = math.nan, math.inf
    z = torch.tensor([[0.0, -0.0, 0, 0], [-1, 2, 2, 2], [nan, 1, 2, 3], [inf, 1, -inf, inf], [5, nan, inf, nan]])
    a = torch.tensor([[0.0, 0, 0, 0], [0, 4, 4, 0], [nan, 0, 0, 9], [inf, 0, 0, inf], [0, nan, 0, nan]])
    dz = torch.tensor([[0.0, 0, 0, 0], [0, 12, 12, 0], [nan, 0, 0, 18], [inf, 0, 0, inf], [0, nan, 0, nan]])
    da = torch.full_like(z, 3.0).to(dtype)
    got_a, got_a_t = operands.relu2_pack(z.to(dtype), None, "masked", "masked")
    got_dz, got_dz_t, sums = operands.relu2_backward_pack(z.to(dtype), da, None, "masked", "masked", True)
    torch.testing.assert_close(got_a, a.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got_dz, dz.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got_a_t, got_a.t(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got_dz_t, got_dz.t(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(sums, dz.sum(0).to(sums.dtype), equal_nan=True)


def test_squares_that_round_alike_are_no_tie():
    """3 + 2^-7 and 3 + 2^-6 have the same square in bfloat16."""
    z = torch.tensor([[3.0, 3 + 2**-6, 0, 3 + 2**-5]], dtype=torch.bfloat16)
    a, _ = operands.relu2_pack(z, None, "masked", "masked")
    assert (a != 0).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_that_is_not_finite_stays_so_and_leaves_the_others_alone(value):
    mlp, x, dy = joined_mlp(), *normal(1, 8, 16)
    clean = gradients(mlp, x, dy)
    x[0, 2, 3] = value
    got = gradients(mlp, x, dy)
    others = [t for t in range(8) if t != 2]
    for name in ("y", "dx"):
        assert not got[name][0, 2].isfinite().all()
        torch.testing.assert_close(got[name][:, others], clean[name][:, others], **EXACT)
    assert not got["c_fc.weight"].isfinite().all()


def normal(*shape, dtype=torch.float64, seed=1) -> list[torch.Tensor]:
    """(X, dY)"""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("tokens", [1, 23, 24, 61, 64])
@pytest.mark.parametrize("name", METHODS)
def test_the_equations_for_any_number_of_tokens(name, tokens):
    """The bias makes relu(Z)^2 of a zero token non-zero, which must not enter the sums over tokens."""
    mlp, (x, dy) = joined_mlp(name), normal(1, tokens, 16)
    nn.init.constant_(mlp.c_fc.bias, 0.5)
    assert_close(gradients(mlp, x, dy), by_hand(mlp, x, dy, torch.float64))
    expected = mlp(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(mlp(x), expected, **EXACT)
    torch.testing.assert_close(mlp(x[0]), expected[0], **EXACT)  # without a batch dimension


@pytest.mark.parametrize("name", METHODS)
def test_under_autocast_all_products_are_bfloat16_and_gradients_float32(name):
    mlp, (x, dy) = joined_mlp(name, dtype=torch.float32), normal(1, 23, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(mlp, x, dy.bfloat16())
        with torch.no_grad():
            torch.testing.assert_close(mlp(x), got["y"])
    assert {t.dtype for name, t in got.items() if name != "y"} == {torch.float32}
    assert got["y"].dtype == torch.bfloat16
    assert_close(got, by_hand(mlp, x, dy, torch.bfloat16), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", METHODS)
def test_weight_gradients_without_mvue_are_dense(name):
    mlp, (x, dy) = joined_mlp(name, mvue=False), normal(1, 23, 16)
    assert_close(gradients(mlp, x, dy), by_hand(mlp, x, dy, torch.float64, "dense"))


@pytest.mark.parametrize("name", METHODS)
def test_top2_along_tokens_is_an_option(name, monkeypatch):
    monkeypatch.setattr(act24, "TOKENS", "top2")
    mlp, (x, dy) = joined_mlp(name), normal(1, 22, 16)
    got = gradients(mlp, x, dy)
    assert_close(got, by_hand(mlp, x, dy, torch.float64, "top2"))
    seed_draws(mlp, 7, 8, 9)
    assert_close(gradients(mlp, x, dy), got)  # no draw enters


def test_frozen_weights_need_no_gradient():
    mlp, (x, dy) = joined_mlp(), normal(1, 8, 16)
    expected = gradients(mlp, x, dy)
    for frozen in ("c_fc", "c_proj"):
        for name, p in mlp.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
            p.grad = None
        mlp(x).backward(dy)
        for name, p in mlp.named_parameters():
            assert p.grad is None if name.startswith(frozen) else torch.allclose(p.grad, expected[name])


@pytest.mark.parametrize("mvue", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_gradcheck_where_no_group_of_tokens_overflows(name, mvue):
    """Without MVUE: everywhere. beta is constant."""
    mlp, (x, _) = joined_mlp(name, d=4, d_ff=8, mvue=mvue), normal(1, 7, 4)
    if mvue:
        x[:, [2, 3, 6]] = 0  # these tokens are not active
        nn.init.constant_(mlp.c_fc.bias, -0.05)
    with torch.no_grad():
        z = F.linear(x[0], mlp.c_fc.pruned_weight(), mlp.c_fc.bias)
        active = F.pad((z > 0).float(), (0, 0, 0, 1)).unflatten(0, (2, 4)).sum(1)
        overflows = ((z > 0).unflatten(1, (-1, 4)).sum(-1) > 2).any()
    assert overflows  # along features, which is exact
    assert (active <= 2).all() == mvue
    names, parameters = zip(*mlp.named_parameters(), strict=True)
    function = lambda x, *values: functional_call(mlp, dict(zip(names, values, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters))


@pytest.mark.parametrize("name", METHODS)
def test_weight_gradients_are_unbiased(name, monkeypatch):
    """The mean over a grid of uniforms is the gradient with dense weight gradients. Magnitudes are small integers, so
    each element is kept in a multiple of 1/180 of the grid."""
    tokens_0 = [1.0, 1, 2, 2, 1, 2, 2, 3]  # a: h = 5 and 9, dz: h = 6 and 8
    tokens_1 = [1.0, 1, 1, 3, 2, 1, 1, 2]  # a: h = 3 and 5, dz: h = 6 and 6
    x = torch.tensor([tokens_0, tokens_1, [-1] * 8, [-2] * 8], dtype=torch.float64).t().contiguous()
    dy = torch.tensor([1.0, -1, -1, 1, 1, 1, -1, 1], dtype=torch.float64)[:, None].expand(8, 4).contiguous()
    mlp, expected, drawn = identity_mlp(name), gradients(identity_mlp(name, mvue=False), x, dy), []
    for k in range(180):
        u = torch.tensor((k + 0.5) / 180, dtype=torch.float64)
        monkeypatch.setattr(sparse24, "group_uniforms", lambda rows, groups, *_, u=u: u.expand(rows, groups))
        drawn.append(gradients(mlp, x, dy))
    mean = {key: torch.stack([one[key] for one in drawn]).mean(0) for key in expected}
    assert_close(mean, expected)
    assert all(not torch.equal(drawn[0][key], expected[key]) for key in ("c_fc.weight", "c_proj.weight"))


# ---------------------------------------------------------------------------------------------------------------------
# Packed products


class PaddedPlan(FFNPlan):
    """A plan of dense products with the padding of packed ones."""

    padding = property(lambda self: -self.tokens % 64)


@pytest.mark.parametrize("tokens", [64, 128, 61])
@pytest.mark.parametrize("mode", [{}, {"mvue": False}, {"prune_again": True}], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_packed_products_equal_masked_ones_bit_for_bit(name, mode, tokens):
    changes = {key: value for key, value in mode.items() if key == "mvue"}
    mlp = joined_mlp(name, dtype=torch.float32, d=64, d_ff=128, **changes)
    mlp.c_fc.prune_again = mlp.c_proj.prune_again = mode.get("prune_again", False)
    x, dy = normal(1, tokens, 64, dtype=torch.float32)
    results, soft = [], name == "act24_soft"
    masked = dict.fromkeys(("z", "y", "da", "dx", "dw1", "dw2"), Choice())
    packed = masked | dict.fromkeys(("y", "dx", "dw1", "dw2", *(("z", "da") if soft else ())), EMULATED)
    for make, choices in ((PaddedPlan, masked), (FFNPlan, packed)):
        mlp.plan = make("relu2", tokens, torch.bfloat16, mlp.c_fc.recipe.mvue, **choices)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(mlp, x, dy.bfloat16()))
    for key, expected in results[0].items():
        assert torch.equal(results[1][key], expected), key
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # evaluation, and another number of tokens
        torch.testing.assert_close(mlp(x), results[0]["y"])
        assert mlp(x[:, :5]).shape == (1, 5, 64)


def test_the_packed_products_are_used(monkeypatch):
    mlp, (x, dy) = joined_mlp(dtype=torch.bfloat16, d=64, d_ff=128), normal(1, 64, 64, dtype=torch.bfloat16)
    choices = {name: EMULATED if name in ("y", "dx", "dw1", "dw2") else Choice() for name in FFNPlan._fields[4:]}
    mlp.plan, used = FFNPlan("relu2", 64, torch.bfloat16, True, **choices), []
    real = act24.matmul24
    monkeypatch.setattr(act24, "matmul24", lambda *args: used.append(args[-1].backend) or real(*args))
    gradients(mlp, x, dy)
    assert used == ["masked", "emulated", "emulated", "masked", "emulated", "emulated"]  # z y dw2 da dw1 dx


# ---------------------------------------------------------------------------------------------------------------------
# The layer: when it joins, what it counts, what it saves


def test_counts_by_hand():
    z = torch.tensor([[1.0, 2, 3, -1, 0, 0, 1, math.nan], [1, 1, 1, 1, -1, -2, 2, 2]])
    counts, energy = act24.count(z.view(1, 2, 8))
    assert counts.tolist() == [6, 2, 4]  # NaN is no non-zero
    finite_counts, energy = act24.count(z[1:])
    assert finite_counts.tolist() == [2, 1, 2]
    assert energy.tolist() == [4 * 1 + 2 * 16, 2 * 1]
    assert (counts.dtype, energy.dtype) == (torch.int64, torch.float32)


def test_a_layer_joins_and_leaves_with_hysteresis():
    layer = joined_mlp().c_proj
    layer.joined, decisions = False, []
    assert layer.crowded() == 1.0  # before the first count
    for crowded in (11, 6, 5, 10, 11, 6):  # percent
        layer.counts.copy_(torch.tensor([0, crowded, 100]))
        for _ in range(2):  # a resumed run decides once more
            layer.begin_step(0, act24.INTERVAL + 1, 0)
        decisions.append(layer.joined)
    assert decisions == [False, False, True, True, False, False]


@pytest.mark.parametrize("interval", [1, 2, 100])
def test_a_layer_decides_in_the_step_after_a_count_and_at_the_beginning(interval, monkeypatch):
    monkeypatch.setattr(act24, "INTERVAL", interval)
    layer = joined_mlp().c_proj
    for iter_num in range(2 * interval + 2):
        layer.begin_micro_batch(iter_num, 0)
        assert layer.counting == (iter_num % interval == 0)
        layer.begin_micro_batch(iter_num, 1)
        assert not layer.counting
        layer.joined = False
        layer.counts.copy_(torch.tensor([0, 0, 100]))
        layer.begin_step(0, iter_num, 0)
        assert layer.joined == ((iter_num - 1) % interval == 0)
        layer.begin_step(0, iter_num, 0, begin=True)
        assert layer.joined


@pytest.mark.parametrize("phase", ["dense", "not joined", "joined"])
def test_only_training_steps_count_and_evaluation_changes_no_state(phase):
    mlp, (x, dy) = joined_mlp(), normal(1, 23, 16)
    for layer in (mlp.c_fc, mlp.c_proj):
        layer.sparse = phase != "dense"
    mlp.c_proj.joined = phase == "joined"
    seed_draws(mlp, 1, 0, 0)
    before = copy.deepcopy(mlp.state_dict())
    with torch.no_grad():
        mlp(x)
    mlp.eval()
    mlp(x).backward(dy)
    assert_close(mlp.state_dict(), before)
    mlp.train()
    mlp(x)
    z = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    assert mlp.c_proj.counts.tolist() == act24.count(z)[0].tolist()
    assert mlp.c_proj.energy.tolist() == act24.count(z)[1].tolist()
    assert mlp.c_proj.counts[2] == 23 * 64 / 4  # the padding does not count


def test_a_layer_that_has_not_joined_is_the_dense_layer():
    mlp, (x, dy) = joined_mlp("act24_soft"), normal(1, 23, 16)
    dense = MLP(GPTConfig(n_embd=16, n_head=1, activation="relu2")).double()
    dense.load_state_dict({name: p for name, p in mlp.state_dict().items() if name.endswith(("weight", "bias"))})
    expected = gradients(dense, x, dy)
    for sparse, joined in ((True, False), (False, True)):
        mlp.c_fc.sparse = mlp.c_proj.sparse = sparse
        mlp.c_proj.joined = joined
        for key, value in gradients(mlp, x, dy).items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_state_dicts_copies_and_pickles_compute_the_same(name):
    mlp, (x, dy), file = joined_mlp(name), normal(1, 23, 16), io.BytesIO()
    seed_draws(mlp, 1, 0, 0)
    expected = gradients(mlp, x, dy)
    torch.save(mlp, file)
    file.seek(0)
    loaded = MLP(GPTConfig(n_embd=16, n_head=1, activation="relu2")).double()
    sparsify(loaded, name, ["c_fc", "c_proj"])
    loaded.load_state_dict(copy.deepcopy(mlp.state_dict()))
    assert loaded.c_proj.counts.tolist() == mlp.c_proj.counts.tolist() != [0, 0, 0]
    assert loaded.c_proj.energy.tolist() == mlp.c_proj.energy.tolist() != [0, 0]
    seed_draws(loaded, 1, 0, 0)
    for other in (loaded, copy.deepcopy(mlp), torch.load(file, weights_only=False)):
        assert (other.c_proj.joined, other.c_proj.sparse) == (True, True)
        assert_close(gradients(other, x, dy), expected)
    mlp.c_proj.joined = mlp.c_proj.sparse = False
    loaded.load_state_dict(mlp.state_dict())
    assert (loaded.c_proj.joined, loaded.c_proj.sparse, loaded.c_fc.sparse) == (False, False, True)


@pytest.mark.parametrize("name", METHODS)
def test_a_dense_state_dict_loads_and_dtypes_and_devices_change(name):
    dense = MLP(GPTConfig(n_embd=16, n_head=1, activation="relu2"))
    mlp = joined_mlp(name, dtype=torch.float32)
    mlp.load_state_dict(dense.state_dict())
    assert mlp.c_proj.joined
    if name == "act24_soft":
        assert mlp.c_proj.beta == sparse24.sste_scale(dense.c_proj.weight.detach().t())
    mlp.to(torch.float64)
    assert mlp(normal(1, 4, 16)[0]).dtype == torch.float64
    with torch.device("meta"):
        empty = MLP(GPTConfig(n_embd=16, n_head=1, activation="relu2"))
        sparsify(empty, name, ["c_fc", "c_proj"])
    assert empty.state_dict().keys() == mlp.state_dict().keys()
    empty.load_state_dict(mlp.state_dict(), assign=True)
    assert torch.equal(empty(normal(1, 4, 16)[0]), mlp(normal(1, 4, 16)[0]))


@pytest.mark.parametrize("name", METHODS)
def test_densify_gives_a_dense_layer_but_cannot_prune_activations(name):
    mlp, (x, _) = joined_mlp(name), normal(1, 4, 16)
    with pytest.raises(ValueError, match=f"densify: prune=True, but {name} prunes activations; use prune=False"):
        sparse24.densify(mlp, prune=True)
    assert mlp.c_proj.joined
    assert sparse24.densify(mlp) == ["c_fc", "c_proj"]
    assert type(mlp.c_fc) is type(mlp.c_proj) is nn.Linear
    assert mlp.state_dict().keys() == MLP(GPTConfig(n_embd=16, n_head=1)).state_dict().keys()
    assert vars(mlp.c_proj).keys() == vars(nn.Linear(4, 4)).keys()
    torch.testing.assert_close(mlp(x), mlp.c_proj(F.relu(mlp.c_fc(x)).square()), **EXACT)


def test_the_linears_of_another_model_are_refused():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    with pytest.raises(ValueError, match=r"'act24' has no class for the linear '0', need linears named c_fc, c_proj"):
        sparsify(model, "act24", lambda name, module: True)
    assert type(model[0]) is nn.Linear
    mlp, (x, _) = joined_mlp(), normal(1, 4, 16)
    with pytest.raises(RuntimeError, match=r"'act24' computes a whole feed-forward layer, the module .* must call"):
        mlp.c_fc(x)
    mlp.c_fc.sparse = False
    assert torch.equal(mlp.c_fc(x), F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias))


@pytest.mark.parametrize("name", METHODS)
def test_masks_of_weights(name):
    """act24 keeps all weights; S(W1) and S(W2^T) keep two of four along d."""
    mlp = joined_mlp(name)
    assert sparse24.refresh_masks(mlp) == 0
    pruned = [layer.pruned_weight() for layer in (mlp.c_fc, mlp.c_proj)]
    if name == "act24":
        assert mlp.c_fc.mask.all()
        assert mlp.c_proj.mask.all()
        assert torch.equal(pruned[1], mlp.c_proj.weight)
        return
    assert torch.equal(mlp.c_fc.mask, pruned[0] != 0)
    assert torch.equal(mlp.c_proj.mask, pruned[1] != 0)
    assert (mlp.c_proj.mask.unflatten(0, (-1, 4)).sum(1) == 2).all()
    with torch.no_grad():
        mlp.c_proj.weight.copy_(mlp.c_proj.weight.flip(0).clone())
    assert sparse24.refresh_masks(mlp) > 0.1
    assert torch.equal(mlp.c_proj.mask, mlp.c_proj.pruned_weight() != 0)


def test_one_layer_in_two_blocks_sums_its_gradients():
    mlp, (x, dy) = joined_mlp(mvue=False), normal(1, 8, 16)
    mlp(mlp(x)).backward(dy)
    expected = {name: p.grad.clone() for name, p in mlp.named_parameters()}
    first, second = copy.deepcopy(mlp), copy.deepcopy(mlp)
    first.zero_grad()
    second.zero_grad()
    second(first(x)).backward(dy)
    sums = zip(first.parameters(), second.parameters(), strict=True)
    assert_close(expected, {name: a.grad + b.grad for name, (a, b) in zip(expected, sums, strict=True)})


@pytest.mark.slow
@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_layer_computes_the_same(name, counting):
    torch._dynamo.reset()
    mlp, (x, dy) = joined_mlp(name), normal(1, 23, 16)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for step in range(2):
        seed_draws(mlp, 5, 0, step * (not counting))
        mlp.c_proj.counting = counting
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = gradients(compiled, x, dy)
        counts = mlp.c_proj.counts.tolist()
        mlp.c_proj.counts.zero_()
        assert_close({k.removeprefix("_orig_mod."): v for k, v in got.items()}, gradients(mlp, x, dy))
        assert counts == mlp.c_proj.counts.tolist()
        assert (counts[2] > 0) == counting
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp(x), **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and models


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe(name):
    recipe = get_recipe(name)
    assert (recipe.mvue, recipe.dense_pretrain, recipe.masked_decay, recipe.activation) == (True, 0.05, 0.0, "relu2")
    assert recipe.fused
    with pytest.raises(ValueError, match=r"masked_decay=0\.1, need 0 for"):
        replace(recipe, masked_decay=0.1)


def test_another_activation_is_refused_also_that_of_openais_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(GPT2LMHeadModel=None))
    message = re.escape("sparse='act24': activation='gelu', need 'relu2'; use it, or sparse='none'")
    with torch.device("meta"):
        with pytest.raises(ValueError, match=message):
            GPT(GPTConfig(n_layer=1, sparse="act24"))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained("gpt2", {"sparse": "act24"})

"""What each method does, against hand-computed steps and the property that its paper claims. Layers here are small and
in float64; nothing of the code under test makes an expected value."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparse24
from sparse24 import (
    RECIPES,
    AutoSwitch,
    MaskedDecayAdamW,
    Recipe,
    Sparse24Linear,
    densify,
    expand_pairs,
    flip_rate,
    hard_pruned,
    mask24,
    mvue24,
    pair_index,
    refresh_masks,
    search_permutations,
    simulate_fp8,
    soft_threshold24,
    soft_threshold24_backward,
    sste_scale,
    transposable_mask,
    weight_indices,
)

PAIRS = list(itertools.combinations(range(4), 2))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recipe(name, **changes):
    return dataclasses.replace(RECIPES[name], **changes)


def make(method, out=8, features=12, seed=0, bias=False):
    linear = nn.Linear(features, out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(normal(out, features, seed=seed))
    return Sparse24Linear.from_linear(linear, method)


def run(layer, seed=5, tokens=8):
    """x, dZ, Z and the gradients dX and dW that the layer gives."""
    x, dz = (
        normal(tokens, layer.in_features, seed=seed).requires_grad_(),
        normal(tokens, layer.out_features, seed=seed + 1),
    )
    layer.weight.grad = None
    z = layer(x)
    z.backward(dz)
    return x.detach(), dz, z.detach(), x.grad, layer.weight.grad


def top2(x):
    """Row-wise 2:4 mask, group by group in plain Python; the lower index wins a tie."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i, j in itertools.product(range(x.shape[0]), range(0, x.shape[1], 4)):
        order = sorted(range(4), key=lambda k: (-abs(float(x[i, j + k].detach())), k))
        for k in order[:2]:
            mask[i, j + k] = True
    return mask


def soft(w):
    """S(w), group by group in plain Python."""
    s = torch.zeros_like(w)
    for i, j in itertools.product(range(w.shape[0]), range(0, w.shape[1], 4)):
        t = sorted(abs(float(v)) for v in w[i, j : j + 4])[1]
        for k in range(4):
            v = float(w[i, j + k])
            s[i, j + k] = math.copysign(max(abs(v) - t, 0.0), v)
    return s


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def test_pair_index_is_the_pair_of_largest_magnitudes():
    for values in itertools.product([0.0, -1.0, 1.0, 2.0, -3.0], repeat=4):
        w = torch.tensor([values])
        mask = top2(w)
        index = pair_index(w)
        assert PAIRS[int(index)] == tuple(mask[0].nonzero().flatten().tolist()), values
        assert torch.equal(expand_pairs(index), mask)
        assert torch.equal(mask24(w), mask)


def test_pair_index_keeps_two_of_groups_that_are_not_finite():
    for values in itertools.product([0.0, math.inf, -math.inf, math.nan, 1.0], repeat=4):
        mask = expand_pairs(pair_index(torch.tensor([values])))
        assert mask.sum() == 2
        size = [3 if math.isnan(v) else 2 if math.isinf(v) else v for v in values]
        assert mask[0].nonzero().flatten().tolist() == sorted(sorted(range(4), key=lambda k: (-size[k], k))[:2])


def test_pair_index_takes_any_layout_and_refuses_others():
    x = normal(6, 12)
    assert torch.equal(pair_index(x.t()[:, :4]), pair_index(x.t()[:, :4].contiguous()))
    assert pair_index(normal(2, 3, 8)).shape == (2, 3, 2)
    with pytest.raises(ValueError, match=r"pair_index: shape \(2, 6\)"):
        pair_index(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="need the uint8 of pair_index"):
        expand_pairs(torch.zeros(2, 2, dtype=torch.int64))


def test_flip_rate_of_pairs_is_that_of_their_masks():
    before, after = normal(16, 32), normal(16, 32, seed=1)
    expected = (top2(before) != top2(after)).double().mean()
    assert flip_rate(pair_index(before), pair_index(after)) == pytest.approx(float(expected), abs=1e-12)
    assert [t.shape for t in weight_indices([make("ste")], "row")] == [(8, 3)]
    assert [t.shape for t in weight_indices([make("ste")])] == [(2, 3)]


# ---------------------------------------------------------------------------------------------------------------------
# The layer of each method


def test_row_masks_prune_the_forward_and_dx_multiplies_the_same_matrix():
    layer = make("sr_ste")
    x, dz, z, dx, dw = run(layer)
    w_24 = torch.where(top2(layer.weight), layer.weight, 0).detach()
    assert torch.equal(layer.mask, top2(layer.weight))
    torch.testing.assert_close(z, x @ w_24.t(), rtol=0, atol=1e-12)
    torch.testing.assert_close(dx, dz @ w_24, rtol=0, atol=1e-12)
    torch.testing.assert_close(dw, dz.t() @ x, rtol=0, atol=1e-12)


def test_bi_mask_is_2_4_along_inputs_forward_and_along_outputs_backward():
    layer = make("bi_mask", out=16, features=12)
    search_permutations(layer, 3, 0)
    order = layer.permutation
    assert sorted(order.tolist()) == list(range(16)) != order.tolist()
    forward = top2(layer.weight)
    masked = torch.where(forward, layer.weight, 0).detach()
    second = top2(masked.t()[:, order])  # (in, out), the outputs in the permutation's order
    backward = torch.zeros(16, 12, dtype=torch.bool)
    for position, row in enumerate(order.tolist()):
        backward[row] = second[:, position] & forward[row]
    assert torch.equal(layer.mask, forward)
    assert torch.equal(layer.backward_mask, backward)
    assert (forward.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert (backward[order].unflatten(0, (-1, 4)).sum(1) <= 2).all()
    x, dz, z, dx, dw = run(layer)
    torch.testing.assert_close(z, x @ masked.t(), rtol=0, atol=1e-12)
    torch.testing.assert_close(dx, dz @ torch.where(backward, layer.weight, 0), rtol=0, atol=1e-12)
    torch.testing.assert_close(dw, dz.t() @ x, rtol=0, atol=1e-12)


def kept(layer):
    return int((layer.backward_mask & layer.mask).sum())


def test_the_permutation_search_never_loses_and_is_a_function_of_its_key():
    layers = [make("bi_mask", out=32, features=16, seed=4) for _ in range(3)]
    before = kept(layers[0])
    for layer, key in zip(layers, ((7, 100), (7, 100), (7, 200)), strict=True):
        search_permutations(layer, *key)
    assert kept(layers[0]) > before
    assert torch.equal(layers[0].permutation, layers[1].permutation)
    assert not torch.equal(layers[0].permutation, layers[2].permutation)
    best = kept(layers[0])
    search_permutations(layers[0], 7, 300)
    assert kept(layers[0]) >= best
    model = nn.ModuleList([make("bi_mask", seed=4), make("bi_mask", seed=4)])
    search_permutations(model, 7, 100)
    assert not torch.equal(model[0].permutation, model[1].permutation)  # each layer has its own draws


def test_permutations_are_left_alone_in_the_dense_phase_and_without_an_interval():
    dense, fixed = make("bi_mask"), make(recipe("bi_mask", permutation_interval=0))
    dense.sparse = False
    search_permutations(nn.ModuleList([dense, fixed]), 1, 0)
    for layer in (dense, fixed):
        assert torch.equal(layer.permutation, torch.arange(8))


@pytest.mark.parametrize("gradient", ["straight", "true"])
def test_s_ste_forward_and_weight_gradient(gradient):
    layer = make(recipe("s_ste", mvue=False, weight_gradient=gradient), seed=2)
    w = layer.weight.detach()
    beta = float((w * soft(w)).sum() / soft(w).square().sum())
    assert float(layer.beta) == pytest.approx(beta, rel=1e-6)
    x, dz, z, dx, dw = run(layer)
    w_24 = soft(w) * layer.beta
    torch.testing.assert_close(z, x @ w_24.t(), rtol=0, atol=1e-12)
    torch.testing.assert_close(dx, dz @ w_24, rtol=0, atol=1e-12)
    if gradient == "true":  # by finite differences of the loss, with beta as a constant
        eps, expected = 1e-6, torch.zeros_like(w)
        for i, j in itertools.product(range(8), range(12)):
            values = []
            for sign in (1, -1):
                moved = w.clone()
                moved[i, j] += sign * eps
                values.append(float((x @ (soft(moved) * layer.beta).t() * dz).sum()))
            expected[i, j] = (values[0] - values[1]) / (2 * eps)
        torch.testing.assert_close(dw, expected, rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(dw, dz.t() @ x, rtol=0, atol=1e-12)


def test_s_ste_is_continuous_in_w_where_hard_masks_jump():
    """Along a line of weights S(w) never moves further than the weights do, times a constant; a hard mask does."""
    a, b = normal(4, 64, seed=1), normal(4, 64, seed=2)
    steps = [a + (b - a) * k / 4000 for k in range(4001)]
    w_step = (steps[1] - steps[0]).abs().max()
    soft_step = max(
        float((soft_threshold24(p) - soft_threshold24(q)).abs().max()) for p, q in itertools.pairwise(steps)
    )
    hard = [torch.where(mask24(w), w, 0) for w in steps]
    hard_step = max(float((p - q).abs().max()) for p, q in itertools.pairwise(hard))
    assert soft_step <= 2 * w_step + 1e-12
    assert hard_step > 100 * w_step


def test_beta_stays_as_it_was_at_the_start_of_the_sparse_phase():
    fixed = make("s_ste")
    start = float(fixed.beta)
    with torch.no_grad():
        fixed.weight.copy_(normal(8, 12, seed=9) ** 3)
        refresh_masks(fixed)
    assert float(fixed.beta) == start
    begun = copy.deepcopy(fixed)
    begun.refresh(begin=True)  # a sparse phase that follows dense steps
    assert float(begun.beta) == float(sste_scale(begun.weight.detach())) != start
    assert float(fixed.state_dict()["beta"]) == start
    other = make("s_ste", seed=3)
    other.load_state_dict(fixed.state_dict())
    assert float(other.beta) == start


def test_s_ste_follows_its_weights_every_step():
    layer = make("s_ste")
    x = normal(4, 12)
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), x @ (soft(layer.weight) * layer.beta).t(), rtol=0, atol=1e-12)


def test_a_true_gradient_is_that_of_the_weights_that_were_pruned_under_autocast_too():
    """bfloat16 moves the threshold of one group in 200: the gradient has to be of the float32 one."""
    layer = Sparse24Linear(64, 512, False, recipe("s_ste", mvue=False))
    with torch.no_grad():
        layer.weight.copy_(0.02 * normal(512, 64))
    x, dz = normal(16, 64).bfloat16(), normal(16, 512, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).backward(dz)
    expected = soft_threshold24_backward((dz.t() @ x).float(), layer.weight.detach()) * layer.beta
    missed = (layer.weight.grad == 0) != (expected == 0)
    assert missed.sum() == 0
    torch.testing.assert_close(layer.weight.grad, expected, rtol=2**-6, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The true gradient and FP8


def test_the_soft_thresholds_gradient_is_autograds():
    w, ds = normal(6, 20).requires_grad_(), normal(6, 20, seed=1)
    a = w.unflatten(-1, (-1, 4)).abs()
    t = a.sort(dim=-1).values[..., 1:2]
    s = (torch.sign(w.unflatten(-1, (-1, 4))) * (a - t).clamp(min=0)).flatten(-2)
    s.backward(ds)
    torch.testing.assert_close(soft_threshold24_backward(ds, w.detach()), w.grad, rtol=0, atol=1e-12)


def test_the_soft_thresholds_gradient_of_ties_and_zeros():
    ds = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert soft_threshold24_backward(ds, torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]
    # |w| = 3, 1, 1, 2: t = 1 is set by one of the two that tie; 3 and -2 pass
    got = soft_threshold24_backward(ds, torch.tensor([[3.0, 1.0, 1.0, -2.0]]))
    assert got[0, 0] == 1
    assert got[0, 3] == 8
    assert sorted(got[0, 1:3].tolist()) == [0, 7]  # -(1 * 1 + -1 * 8)


@pytest.mark.parametrize(
    ("dtype", "largest", "error"), [(torch.float8_e4m3fn, 448, 2**-4), (torch.float8_e5m2, 57344, 2**-3)]
)
def test_simulated_fp8_rounds_to_the_type_on_a_scale_of_the_tensor(dtype, largest, error):
    x = normal(64, 64).float() * 1e-3
    y = simulate_fp8(x, dtype)
    assert y.dtype == x.dtype
    scale = largest / float(x.abs().max())
    assert float(y.abs().max()) == pytest.approx(float(x.abs().max()), rel=1e-6)
    representable = (y * scale).to(dtype).float()
    torch.testing.assert_close(representable, y * scale, rtol=1e-6, atol=0)  # every value is one of the type's
    near = x.abs() > x.abs().max() / 100
    assert float(((y - x).abs() / x.abs())[near].max()) <= error
    assert float((y - x).abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_simulated_fp8_is_safe_at_zero_and_passes_on_what_is_not_finite(dtype):
    assert simulate_fp8(torch.zeros(3, 4), dtype).tolist() == [[0.0] * 4] * 3
    assert simulate_fp8(torch.zeros(0, 4), dtype).shape == (0, 4)
    tiny = torch.tensor([0.0, 1e-44, 3e-39])
    assert torch.isfinite(simulate_fp8(tiny, dtype)).all()
    for bad in (math.inf, -math.inf, math.nan):
        assert not torch.isfinite(simulate_fp8(torch.tensor([1.0, bad, 2.0]), dtype)).any()


def test_fp8_quantises_every_operand_of_the_three_gemms():
    layer = make(recipe("s_ste", fp8=True, mvue=False, weight_gradient="straight"))
    x, dz, z, dx, dw = run(layer)
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    w_24 = simulate_fp8(soft(layer.weight.detach()) * layer.beta, e4)
    torch.testing.assert_close(z, simulate_fp8(x, e4) @ w_24.t(), rtol=0, atol=1e-12)
    torch.testing.assert_close(dx, simulate_fp8(dz, e5) @ w_24, rtol=0, atol=1e-12)
    torch.testing.assert_close(dw, simulate_fp8(dz, e5).t() @ simulate_fp8(x, e4), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), z, rtol=0, atol=0)  # evaluation computes the same


def test_fp8_draws_before_it_rounds():
    layer = make(recipe("s_ste", fp8=True, weight_gradient="straight"))
    layer.seed.fill_(3)
    x, dz, _, _, dw = run(layer)
    drawn = simulate_fp8(mvue24(dz.t(), 3), torch.float8_e5m2)
    torch.testing.assert_close(dw, drawn @ simulate_fp8(x, torch.float8_e4m3fn), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def optimizer_for(model, **decay):
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.2, "foreach": False}
    return MaskedDecayAdamW(model.parameters(), model, **options, **({"masked_decay": 0.0} | decay))


def adam(w, grads, betas=(0.8, 0.9), lr=0.1, eps=1e-8, weight_decay=0.2, frozen_from=None):
    """AdamW by hand, yielding the weights after each step. frozen_from: step after which v stays."""
    m, v, frozen_v = torch.zeros_like(w), torch.zeros_like(w), None
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        if frozen_from is None or t <= frozen_from:
            v = betas[1] * v + (1 - betas[1]) * g * g
            frozen_v = v / (1 - betas[1] ** t)
        w = w * (1 - lr * weight_decay) - lr * (m / (1 - betas[0] ** t)) / (frozen_v.sqrt() + eps)
        yield w.clone()


def test_sr_ste_decays_pruned_weights_beside_adam():
    layer, g = make("sr_ste"), normal(8, 12, seed=8)
    optimizer = optimizer_for(layer, masked_decay=0.5, decay_on="weight")
    w = layer.weight.detach().clone()
    layer.weight.grad = g.clone()
    optimizer.step()
    decayed = torch.where(top2(w), w, w * (1 - 0.1 * 0.5))  # Eq. 8 with gamma = lr
    torch.testing.assert_close(layer.weight.detach(), next(adam(decayed, [g])), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sr_ste", "bi_mask"])
def test_decay_on_gradients_works_with_row_masks(name):
    layer, g = make(name), normal(8, 12, seed=8)
    optimizer = optimizer_for(layer, masked_decay=0.5, decay_on="grad")
    w = layer.weight.detach().clone()
    layer.weight.grad = g.clone()
    optimizer.step()
    expected = next(adam(w, [g + 0.5 * torch.where(top2(w), 0, w)]))
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-12)


def test_step_freezes_second_moments_once_the_layer_is_sparse():
    model = nn.ModuleList([make("step"), nn.Linear(4, 4, bias=False, dtype=torch.float64)])
    layer, plain = model
    optimizer = optimizer_for(model)
    grads = [normal(8, 12, seed=20 + t) for t in range(6)]
    others = [normal(4, 4, seed=40 + t) for t in range(6)]
    expected = adam(layer.weight.detach().clone(), grads, frozen_from=3)
    expected_plain = adam(plain.weight.detach().clone(), others)
    layer.sparse = False
    for t, (g, h) in enumerate(zip(grads, others, strict=True)):
        if t == 3:
            layer.sparse = True
            frozen = optimizer.state[layer.weight]["exp_avg_sq"].clone()
        layer.weight.grad, plain.weight.grad = g.clone(), h.clone()
        optimizer.step()
        assert torch.equal(layer.weight.grad, g)  # it is back
        torch.testing.assert_close(layer.weight.detach(), next(expected), rtol=0, atol=1e-12)
        torch.testing.assert_close(plain.weight.detach(), next(expected_plain), rtol=0, atol=1e-12)
    assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], frozen)


def test_step_goes_on_from_a_loaded_optimizer_as_if_it_had_never_stopped():
    grads = [normal(8, 12, seed=20 + t) for t in range(6)]

    def steps(layer, optimizer, numbers):
        for t in numbers:
            layer.sparse = t >= 2
            layer.weight.grad = grads[t].clone()
            optimizer.step()

    whole = make("step")
    steps(whole, optimizer_for(whole), range(6))
    first = make("step")
    optimizer = optimizer_for(first)
    steps(first, optimizer, range(4))
    second = make("step")
    second.load_state_dict(first.state_dict())
    resumed = optimizer_for(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(second, resumed, range(4, 6))
    assert torch.equal(second.weight, whole.weight)


def test_steps_second_moments_move_again_in_a_later_dense_phase():
    layer, grads = make("step"), [normal(8, 12, seed=20 + t) for t in range(6)]
    optimizer, expected = optimizer_for(layer), []
    for t, g in enumerate(grads):
        layer.sparse = t in (2, 5)
        layer.weight.grad = g.clone()
        optimizer.step()
        expected.append(optimizer.state[layer.weight].get("frozen_step"))
    assert expected == [None, None, 2, None, None, 5]


def test_step_without_dense_steps_says_so():
    layer = make("step")
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match="precondition needs dense steps first; raise dense_pretrain"):
        optimizer_for(layer).step()


def test_autoswitch_waits_for_second_moments_to_settle():
    """With a constant gradient |v_t - v_{t-1}| = (1 - b2) b2^(t-1) g^2: its mean crosses eps at a known step."""
    layer = make("step")
    layer.sparse = False
    optimizer = optimizer_for(layer)
    g = 0.01
    switch = AutoSwitch(layer, optimizer)
    assert switch.length == 10
    changes, settled = [], []
    for t in range(1, 140):
        layer.weight.grad = torch.full_like(layer.weight, g)
        settled.append(switch.settled())
        optimizer.step()
        changes = [*changes, 0.1 * 0.9 ** (t - 1) * g * g][-10:]
        assert settled[-1] == (t >= 10 and sum(changes) / 10 < 1e-8), t
    assert settled[0] is False
    assert settled[-1] is True
    layer.weight.grad = torch.full_like(layer.weight, math.inf)  # a step that GradScaler passes over
    assert switch.settled()


# ---------------------------------------------------------------------------------------------------------------------
# Settings that exclude one another; deployment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_pretrain": 0.6, "dense_finetune": 0.5}, "dense_pretrain \\+ dense_finetune <= 1"),
        ({"backward_mask": "own"}, "mask='row' for backward_mask='own'"),
        ({"permutation_interval": 10}, "backward_mask='own' for permutation_interval"),
        ({"weight_gradient": "true"}, "mask='soft' for weight_gradient"),
        ({"mask": "soft", "mask_interval": 40}, "mask_interval=1 for mask='soft'"),
        ({"precondition": True}, "dense_pretrain above 0 for precondition"),
        ({"autoswitch": True}, "dense_pretrain above 0 and at most 0.5 for autoswitch"),
        ({"autoswitch": True, "dense_pretrain": 0.6}, "dense_pretrain above 0 and at most 0.5 for autoswitch"),
        ({"permutation_interval": -1}, "permutation_interval=-1"),
        ({"weight_gradient": "full"}, "weight_gradient='full'"),
    ],
)
def test_recipes_refuse_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe("mine", **changes)


def test_recipes_say_which_masks_count_and_whether_a_plan_may_multiply_them():
    assert {name: r.virtual_mask for name, r in RECIPES.items()} == {
        "fst": "transposable", "ste": "transposable", "sr_ste": "row", "s_ste": "row",
        "s_ste_straight": "row", "step": "row", "bi_mask": "row",
    }  # fmt: skip
    assert {name for name, r in RECIPES.items() if not r.fused} == {"bi_mask"}
    assert not recipe("fst", fp8=True).fused


def test_hard_pruned_layers_compute_as_deployed_and_come_back():
    dense, plain, sparse = make("fst"), nn.Linear(12, 8, dtype=torch.float64), make("fst", seed=3)
    dense.sparse = False
    before = [m.weight.detach().clone() for m in (dense, plain, sparse)]
    x = normal(4, 12)
    with hard_pruned([dense, plain, sparse]), torch.no_grad():
        for module, w in ((dense, before[0]), (plain, before[1])):
            torch.testing.assert_close(
                module(x), F.linear(x, torch.where(top2(w), w, 0), module.bias), rtol=0, atol=1e-12
            )
        w_24 = torch.where(transposable_mask(before[2]), before[2], 0)
        torch.testing.assert_close(sparse(x), x @ w_24.t(), rtol=0, atol=1e-12)
    for module, w in zip((dense, plain, sparse), before, strict=True):
        assert torch.equal(module.weight, w)
    with pytest.raises(KeyError), hard_pruned([plain]):
        raise KeyError
    assert torch.equal(plain.weight, before[1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "s_ste" in name else name for name in RECIPES]
)
def test_every_method_survives_saving_autocast_compile_and_moves(name):
    layer = Sparse24Linear(16, 24, True, name)
    if name == "bi_mask":
        search_permutations(layer, 1, 0)
    other = Sparse24Linear(16, 24, True, name)
    other.load_state_dict(layer.state_dict())
    x = normal(8, 16).float()
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer.backward_mask, other.backward_mask)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert z.dtype == torch.bfloat16
    z.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.isfinite(layer.weight.grad).all()
    gradient, layer.weight.grad = layer.weight.grad, None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x).float().sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradient)
    assert copy.deepcopy(layer).to(torch.float64)(x.double()).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# Faults that were made by hand, and that nothing above had found


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("fst", {"mvue": True, "masked_decay": 6e-5, "dense_finetune": 1 / 6}),
        ("ste", {}),
        ("sr_ste", {"mask": "row", "masked_decay": 2e-4, "decay_on": "weight", "mask_interval": 1}),
        ("s_ste", {"mask": "soft", "mvue": True, "mask_interval": 1, "weight_gradient": "true"}),
        ("s_ste_straight", {"mask": "soft", "mvue": True, "mask_interval": 1}),
        (
            "step",
            {"mask": "row", "mask_interval": 1, "dense_pretrain": 0.1, "precondition": True, "autoswitch": True},
        ),
        (
            "bi_mask",
            {"mask": "row", "backward_mask": "own", "permutation_interval": 100, "masked_decay": 2e-4}
            | {"mask_interval": 1},
        ),
    ],
)
def test_recipes_differ_from_plain_straight_through_in_what_their_equations_say(name, fields):
    plain = dataclasses.asdict(Recipe(name))
    assert {k: v for k, v in dataclasses.asdict(RECIPES[name]).items() if v != plain[k]} == fields
    assert (plain["mask"], plain["decay_on"], plain["mask_interval"]) == ("transposable", "grad", 40)


def test_shares_may_reach_their_ends():
    for changes in (
        {"dense_finetune": 1.0},
        {"dense_pretrain": 0.5, "dense_finetune": 0.5},
        {"dense_pretrain": 0.5, "autoswitch": True},
    ):
        assert Recipe("mine", **changes).dense_finetune == changes.get("dense_finetune", 0.0)


def test_masks_of_bi_mask_follow_their_weights_both_ways():
    layer = make("bi_mask")
    with torch.no_grad():
        layer.weight.copy_(normal(8, 12, seed=77))
    refresh_masks(layer)
    masked = torch.where(top2(layer.weight), layer.weight, 0).detach()
    assert torch.equal(layer.backward_mask, top2(masked.t()).t() & top2(layer.weight))


def test_a_phase_may_begin_without_a_beta():
    layer = make("sr_ste")
    layer.refresh(begin=True)
    assert not hasattr(layer, "beta")


def test_soft_weights_are_thresholded_before_they_are_rounded():
    """To bfloat16 these three are equal, and nothing would be left of them."""
    layer = Sparse24Linear(4, 4, False, recipe("s_ste", mvue=False))
    with torch.no_grad():
        layer.beta.fill_(1)
        layer.weight.copy_(torch.tensor([0.0, 1.0, 1.0 + 2**-10, 1.0 + 2**-9]).expand(4, 4))
    assert layer.pruned_weight(torch.bfloat16).tolist() == [[0.0, 0.0, 2**-10, 2**-9]] * 4


def test_fp8_quantises_an_own_backward_mask_too():
    layer = make(recipe("bi_mask", fp8=True))
    _, dz, _, dx, _ = run(layer)
    w_back = torch.where(layer.backward_mask, layer.weight, 0).detach()
    expected = simulate_fp8(dz, torch.float8_e5m2) @ simulate_fp8(w_back, torch.float8_e4m3fn)
    torch.testing.assert_close(dx, expected, rtol=0, atol=1e-12)


def test_the_search_takes_the_best_of_a_hundred_orders_and_the_present_one(monkeypatch):
    layer, drawn, randperm = make("bi_mask", out=16), [], torch.randperm
    mask = top2(layer.weight)

    def keeps(order):
        return sum(mask[order[j : j + 4]].sum(0).clamp(max=2).sum().item() for j in range(0, 16, 4))

    def draw(n, generator):
        drawn.append(randperm(n, generator=generator))
        return drawn[-1]

    monkeypatch.setattr(torch, "randperm", draw)
    search_permutations(layer, 3, 0)
    assert len(drawn) == 100
    best = layer.permutation.clone()
    assert keeps(best) == max(keeps(order) for order in drawn) > keeps(torch.arange(16))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    search_permutations(layer, 3, 100)  # all that is drawn is worse
    assert torch.equal(layer.permutation, best)


def test_row_orders_are_drawn_from_the_runs_seed_and_the_layers_number():
    def orders(seed, phases=(True, True)):
        model = nn.ModuleList([make("bi_mask", seed=4), make("bi_mask", seed=4)])
        model[0].sparse, model[1].sparse = phases
        search_permutations(model, seed, 100)
        return [layer.permutation for layer in model]

    assert not torch.equal(orders(7)[1], orders(8)[1])
    assert torch.equal(orders(7)[1], orders(7, (False, True))[1])  # a layer in its dense phase keeps its number


def test_densified_soft_weights_are_what_multiplied():
    model = nn.Sequential(make("s_ste"))
    w_24 = soft(model[0].weight.detach()) * model[0].beta
    densify(model, prune=True)
    torch.testing.assert_close(model[0].weight.detach(), w_24, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay_on", ["grad", "weight"])
def test_frozen_second_moments_go_with_every_kind_of_decay(decay_on):
    layer, grads = make("step"), [normal(8, 12, seed=20 + t) for t in range(5)]
    optimizer = optimizer_for(layer, masked_decay=0.5, decay_on=decay_on)
    mask, w, m, v = layer.mask, layer.weight.detach().clone(), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        layer.sparse = t > 3
        layer.weight.grad = g.clone()
        optimizer.step()
        pruned = torch.where(mask, 0, w) * layer.sparse
        g = g + 0.5 * pruned * (decay_on == "grad")
        m = 0.8 * m + 0.2 * g
        v = v if t > 3 else 0.9 * v + 0.1 * g * g
        denominator = (v / (1 - 0.9 ** min(t, 3))).sqrt() + 1e-8
        w = w - 0.1 * 0.5 * pruned * (decay_on == "weight")
        w = w * (1 - 0.02) - 0.1 * m / (1 - 0.8**t) / denominator
        torch.testing.assert_close(layer.weight.detach(), w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "decay_on", "taken"),
    [
        ("fst", "grad", True),
        ("fst", "weight", True),
        ("sr_ste", "weight", False),
        ("bi_mask", "grad", False),
        ("s_ste", "grad", False),
        ("step", "grad", False),
    ],
)
def test_the_kernel_takes_a_step_of_fst_alone(monkeypatch, name, decay_on, taken):
    """As on a GPU, with a launch that does nothing in place of the kernel's."""
    layer, launched = make(name), []
    optimizer = optimizer_for(layer, masked_decay=0.0 if name == "step" else 0.5, decay_on=decay_on)
    layer.sparse = False
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    layer.sparse = True
    before = layer.weight.detach().clone()
    monkeypatch.setattr(sparse24, "adamw_fits", lambda tensors: True)
    monkeypatch.setattr(sparse24, "adamw_", lambda *args: launched.append(args))
    optimizer.step()
    assert bool(launched) == taken == torch.equal(layer.weight, before)


def test_autoswitch_looks_at_a_whole_window():
    layer = make("step")
    layer.sparse = False
    switch = AutoSwitch(layer, optimizer_for(layer))
    layer.weight.grad = torch.zeros_like(layer.weight)  # nothing moves from the start
    assert [switch.settled() for _ in range(12)] == [False] * 9 + [True] * 3
    moving = make("step", seed=1)
    moving.sparse = False
    optimizer = optimizer_for(moving)
    switch, found = AutoSwitch(moving, optimizer), []
    for t in range(14):  # one large gradient, and then moments that only fall
        moving.weight.grad = torch.full_like(moving.weight, float(t == 0))
        found.append(switch.settled())
        optimizer.step()
    assert found == [False] * 14
    usual = MaskedDecayAdamW(layer.parameters(), layer, betas=(0.9, 0.95), masked_decay=0.0)
    assert AutoSwitch(layer, usual).length == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_simulated_fp8_of_16_bits_is_scaled_in_float32(dtype):
    x = normal(64, 64).to(dtype)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert torch.equal(simulate_fp8(x, kind), simulate_fp8(x.float(), kind).to(dtype))

"""The recipes: their fields, their layers and their steps, compared with computations by hand."""

import copy
import dataclasses
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from by_hand import adamw, close, make, normal, optimizer_for, run, soft, top2

import sparse24
from sparse24 import RECIPES, MaskedDecayAdamW, Recipe, Sparse24Linear, get_recipe, recipe_of, sparsify

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2

# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("fst", {"mvue": True, "masked_decay": 6e-5, "dense_finetune": 1 / 6}),
        ("ste", {}),
        ("sr_ste", {"mask": "row", "masked_decay": 2e-4, "decay_on": "weight", "mask_interval": 1}),
        ("s_ste", {"mask": "soft", "mvue": True, "mask_interval": 1, "weight_gradient": "true"}),
        ("s_ste_straight", {"mask": "soft", "mvue": True, "mask_interval": 1}),
    ],
)
def test_recipes_differ_from_plain_straight_through_in_what_their_equations_say(name, fields):
    plain, recipe = Recipe(name), get_recipe(name)
    assert (plain.mask, plain.decay_on, plain.mask_interval) == ("transposable", "grad", 40)
    assert recipe == replace(plain, **fields)
    assert recipe is RECIPES[name] is get_recipe(recipe)
    assert recipe.virtual_mask == ("transposable" if recipe.mask == "transposable" else "row")
    assert recipe.fused
    assert not replace(recipe, fp8=True).fused
    assert recipe_of({"sparse": name, "mvue": False, "device": "cpu"}) == replace(recipe, mvue=False)
    assert recipe_of({"sparse": "none", "mvue": True}) is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.mvue = False


def test_there_are_five_recipes_here_and_the_others_are_files():
    assert list(RECIPES) == ["fst", "ste", "sr_ste", "s_ste", "s_ste_straight"]
    assert sparse24.recipe_names() == [*RECIPES, "act24", "act24_soft", "bi_mask", "step", "vnm", "vnm_quarter"]
    for make_one in (get_recipe, lambda name: Sparse24Linear(4, 4, True, name)):
        with pytest.raises(ValueError, match=r"'ftz' is unknown.*fst, ste, sr_ste, .* did you mean .fst.\?"):
            make_one("ftz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({field: value}, f"Recipe 'x': {field}=") for field, value in [
            ("mask", "rows"), ("decay_on", "weights"), ("weight_gradient", "scaled"),
            ("masked_decay", -1e-4), ("masked_decay", math.nan), ("masked_decay", math.inf), ("mask_interval", 0),
            ("dense_finetune", -0.1), ("dense_finetune", 1.1), ("dense_pretrain", math.nan),
            ("dense_pretrain_latest", 2.0),
        ]),
        ({"dense_pretrain": 0.6, "dense_finetune": 0.5}, "dense_pretrain \\+ dense_finetune <= 1"),
        ({"weight_gradient": "true"}, "mask='soft' for weight_gradient='true'"),
        ({"mask": "soft", "mask_interval": 40}, "mask_interval=1 for mask='soft'"),
        ({"dense_pretrain_latest": 0.5}, "dense_pretrain above 0 and at most dense_pretrain_latest=0.5"),
        ({"dense_pretrain_latest": 0.5, "dense_pretrain": 0.6}, "at most dense_pretrain_latest=0.5"),
        ({"layer": nn.Linear}, "Recipe 'x': layer=<class .*, need a subclass of Sparse24Linear, or None"),
        ({"layer": "MyLinear"}, "Recipe 'x': layer='MyLinear', need a subclass of Sparse24Linear"),
        ({"optimizer": torch.optim.AdamW}, "Recipe 'x': optimizer=<class .*, need a subclass of MaskedDecayAdamW"),
    ],
    ids=str,
)  # fmt: skip
def test_recipes_refuse_values_out_of_range_or_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe("x", **changes)
    Recipe("x", dense_pretrain=0.5, dense_finetune=0.5, dense_pretrain_latest=0.5)  # the limits are allowed


def test_a_recipe_may_have_a_layer_and_an_optimizer_class():
    layer, optimizer = type("Mine", (Sparse24Linear,), {}), type("MineAdamW", (MaskedDecayAdamW,), {})
    recipe = Recipe("mine", layer=layer, optimizer=optimizer)
    assert not recipe.fused
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert sparsify(model, recipe, ["0"]) == ["0"]
    assert type(model[0]) is layer
    assert sparsify(model, "ste", ["0", "1"]) == ["1"]  # a layer that is sparse already stays
    assert type(model[0]) is layer
    sparse24.densify(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


# ---------------------------------------------------------------------------------------------------------------------
# The layer of each method


def test_row_masks_prune_the_forward_and_dx_multiplies_the_same_matrix():
    layer = make("sr_ste")
    assert torch.equal(sparse24.weight_indices([layer], "row")[0], layer.index)
    assert torch.equal(sparse24.weight_indices([layer])[0], make("ste").index)
    x, dz, z, dx, dw = run(layer)
    w_24 = torch.where(top2(layer.weight), layer.weight, 0).detach()
    assert torch.equal(layer.mask, top2(layer.weight))
    close(z, x @ w_24.t())
    close(dx, dz @ w_24)
    close(dw, dz.t() @ x)
    layer.refresh(begin=True)
    assert not hasattr(layer, "beta")


@pytest.mark.parametrize("gradient", ["straight", "true"])
def test_s_ste_forward_and_weight_gradient(gradient):
    layer = make(replace(RECIPES["s_ste"], mvue=False, weight_gradient=gradient), seed=2)
    w = layer.weight.detach()
    beta = float((w * soft(w)).sum() / soft(w).square().sum())
    assert float(layer.beta) == pytest.approx(beta, rel=1e-6)
    x, dz, z, dx, dw = run(layer)
    w_24 = soft(w) * layer.beta
    close(z, x @ w_24.t())
    close(dx, dz @ w_24)
    if gradient == "straight":
        close(dw, dz.t() @ x)
        return
    eps, expected = 1e-6, torch.zeros_like(w)  # finite differences of the loss, with beta as a constant
    for i, j in itertools.product(range(8), range(12)):
        values = []
        for sign in (1, -1):
            moved = w.clone()
            moved[i, j] += sign * eps
            values.append(float((x @ (soft(moved) * layer.beta).t() * dz).sum()))
        expected[i, j] = (values[0] - values[1]) / (2 * eps)
    torch.testing.assert_close(dw, expected, rtol=0, atol=1e-6)


def test_s_ste_follows_its_weights_every_step_and_keeps_beta():
    layer, x = make("s_ste"), normal(4, 12)
    start = float(layer.beta)
    with torch.no_grad():
        layer.weight.copy_(normal(8, 12, seed=9) ** 3)
        close(layer(x), x @ (soft(layer.weight) * start).t())
        sparse24.refresh_masks(layer)
    assert float(layer.beta) == start
    begun, other = copy.deepcopy(layer), make("s_ste", seed=3)
    begun.refresh(begin=True)  # a sparse phase that follows dense steps
    assert float(begun.beta) == float(sparse24.sste_scale(begun.weight.detach())) != start
    other.load_state_dict(layer.state_dict())
    assert float(other.beta) == start
    model = nn.Sequential(layer)
    w_24 = soft(layer.weight.detach()) * start
    sparse24.densify(model, prune=True)
    close(model[0].weight.detach(), w_24)


def test_under_autocast_a_true_gradient_is_that_of_the_float32_weights():
    """Rounding to bfloat16 changes the threshold of one group in 200."""
    layer = Sparse24Linear(64, 512, False, replace(RECIPES["s_ste"], mvue=False))
    with torch.no_grad():
        layer.weight.copy_(0.02 * normal(512, 64))
    x, dz = normal(16, 64).bfloat16(), normal(16, 512, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).backward(dz)
    expected = sparse24.soft_threshold24_backward((dz.t() @ x).float(), layer.weight.detach()) * layer.beta
    assert torch.equal(layer.weight.grad == 0, expected == 0)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=2**-6, atol=0.05)


def test_soft_weights_are_thresholded_before_they_are_rounded():
    """Rounded to bfloat16 the last three are equal: S would make all of them 0."""
    layer = Sparse24Linear(4, 4, False, replace(RECIPES["s_ste"], mvue=False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.beta.fill_(1)
        layer.weight.copy_(torch.tensor([0.0, 1.0, 1.0 + 2**-10, 1.0 + 2**-9]).expand(4, 4))
        assert layer(torch.eye(4)).t().tolist() == [[0.0, 0.0, 2**-10, 2**-9]] * 4


# tests/methods/ has the same test for methods that compute whole feed-forward layers
LINEAR_METHODS = [name for name in sparse24.recipe_names() if get_recipe(name).ffn is None]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if "s_ste" in name else name for name in LINEAR_METHODS],
)
def test_every_method_of_linears_survives_saving_autocast_compile_and_moves(name):
    layer, other = (make(name, 24, 16, seed=seed).float() for seed in (0, 1))
    sparse24.begin_step(layer, 1, 0)
    other.load_state_dict(layer.state_dict())
    x = normal(8, 16).float()
    assert torch.equal(layer(x), other(x))
    masks = [m.mask if m.backward_mask is None else m.backward_mask for m in (layer, other)]
    assert torch.equal(*masks)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert z.dtype == torch.bfloat16
    z.float().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    assert gradient.dtype == torch.float32
    assert torch.isfinite(gradient).all()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x).float().sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradient)
    assert copy.deepcopy(layer).to(torch.float64)(x.double()).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# FP8


@pytest.mark.parametrize("mvue", [False, True])
def test_fp8_rounds_every_operand_of_the_three_gemms(mvue):
    layer = make(replace(RECIPES["s_ste"], fp8=True, mvue=mvue, weight_gradient="straight"))
    layer.seed.fill_(3)
    x, dz, z, dx, dw = run(layer)
    w_24 = sparse24.simulate_fp8(soft(layer.weight.detach()) * layer.beta, E4)
    close(z, sparse24.simulate_fp8(x, E4) @ w_24.t())
    close(dx, sparse24.simulate_fp8(dz, E5) @ w_24)
    drawn = sparse24.mvue24(dz.t(), 3) if mvue else dz.t()  # drawn before rounding
    close(dw, sparse24.simulate_fp8(drawn, E5) @ sparse24.simulate_fp8(x, E4))
    with torch.no_grad():
        assert torch.equal(layer(x), z)  # evaluation computes the same
    layer = make(replace(get_recipe("bi_mask"), fp8=True))
    _, dz, _, dx, _ = run(layer)
    w_back = torch.where(layer.backward_mask, layer.weight, 0).detach()
    close(dx, sparse24.simulate_fp8(dz, E5) @ sparse24.simulate_fp8(w_back, E4))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer, and layers as deployed


@pytest.mark.parametrize(("name", "decay_on"), [("sr_ste", "weight"), ("sr_ste", "grad"), ("bi_mask", "grad")])
def test_row_masks_decay_on_weights_or_gradients(name, decay_on):
    layer, g = make(name), normal(8, 12, seed=8)
    optimizer = optimizer_for(layer, masked_decay=0.5, decay_on=decay_on)
    w = layer.weight.detach().clone()
    pruned = torch.where(top2(w), 0, w)
    layer.weight.grad = g.clone()
    optimizer.step()
    if decay_on == "grad":
        close(layer.weight.detach(), *adamw(w, [g + 0.5 * pruned]))
    else:  # Eq. 8 with gamma = lr
        close(layer.weight.detach(), *adamw(w - 0.1 * 0.5 * pruned, [g]))


@pytest.mark.parametrize(
    ("name", "decay_on", "taken"),
    [
        *(("fst", "grad", True), ("fst", "weight", True), ("sr_ste", "weight", False)),
        *(("bi_mask", "grad", False), ("s_ste", "grad", False), ("step", "grad", False)),
    ],
)
def test_the_kernel_takes_a_step_of_fst_alone(monkeypatch, name, decay_on, taken):
    """As on a GPU, with a kernel that does nothing."""
    layer, launched = make(name), []
    optimizer = optimizer_for(layer, name, masked_decay=0.0 if name == "step" else 0.5, decay_on=decay_on)
    for layer.sparse in (False, True):
        if layer.sparse:
            before = layer.weight.detach().clone()
            monkeypatch.setattr(sparse24, "adamw_fits", lambda tensors: True)
            monkeypatch.setattr(sparse24, "_kernels", SimpleNamespace(adamw_=lambda *args: launched.append(args)))
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert bool(launched) == taken == torch.equal(layer.weight, before)


def test_hard_pruned_layers_compute_as_deployed_and_are_restored():
    dense, plain, sparse = make("fst"), nn.Linear(12, 8, dtype=torch.float64), make("fst", seed=3)
    dense.sparse = False
    before = [m.weight.detach().clone() for m in (dense, plain, sparse)]
    x = normal(4, 12)
    with sparse24.hard_pruned([dense, plain, sparse]), torch.no_grad():
        for module, w in ((dense, before[0]), (plain, before[1])):
            close(module(x), F.linear(x, torch.where(top2(w), w, 0), module.bias))
        close(sparse(x), x @ torch.where(sparse24.transposable_mask(before[2]), before[2], 0).t())
    for module, w in zip((dense, plain, sparse), before, strict=True):
        assert torch.equal(module.weight, w)
    with pytest.raises(KeyError), sparse24.hard_pruned([plain]):
        raise KeyError
    assert torch.equal(plain.weight, before[1])

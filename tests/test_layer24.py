"""The recipes, the sparse linear, its swap into any model, seeds, mask refresh and masked-decay AdamW of sparse24."""

import copy
import dataclasses
import io
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sparse24
from runtime.health import decay_ratio
from sparse24 import (
    RECIPES,
    MaskedDecayAdamW,
    Recipe,
    Sparse24Linear,
    densify,
    expand_index,
    flip_rate,
    get_recipe,
    mvue24,
    refresh_masks,
    seed_draws,
    sparsify,
    transposable_index,
    transposable_mask,
)

SEEDS = {"fst": 7, "ste": 0}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_layer(recipe="ste", out=12, features=8, bias=True, dtype=torch.float32, seed=0):
    """A layer with seeded weights; its MVUE seed is not the initial one."""
    layer = Sparse24Linear(features, out, bias, recipe, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(normal(out, features, seed=seed))
        if bias:
            layer.bias.copy_(normal(out, seed=seed + 1))
        layer.seed.fill_(SEEDS[layer.recipe.name])
    refresh_masks(layer)
    return layer


def make_mlp(recipe="fst", seed=0):
    """Linear, GELU, Linear, both sparse; the weights are seeded."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * normal(*p.shape, seed=seed + i))
    sparsify(model, recipe, lambda name, module: True)
    return model


def backward(module, x, dz):
    """Output and the gradients of x and of the module's parameters, for the output gradient dz."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    z = module(x)
    z.backward(dz)
    return z.detach(), x.grad, [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def mvue_product(dz, x, seed):
    """MVUE(dZ^T) X; token counts that are no multiple of 4 are filled up with zero tokens."""
    dz, x = dz.reshape(-1, dz.shape[-1]), x.reshape(-1, x.shape[-1])
    padding = -len(x) % 4
    return mvue24(F.pad(dz.t(), (0, padding)), seed) @ F.pad(x, (0, 0, 0, padding))


def snapshot(module):
    """Everything that the module keeps: what state_dict has, the seeds and the phases."""
    state = {k: copy.deepcopy(v) for k, v in module.state_dict().items()}
    return state, [(m.seed.clone(), m.sparse) for m in module.modules() if isinstance(m, Sparse24Linear)]


def assert_unchanged(module, before):
    state, seeds = snapshot(module)
    for key, value in before[0].items():
        assert torch.equal(state[key], value) if torch.is_tensor(value) else state[key] == value, key
    for (seed, sparse), (seed_before, sparse_before) in zip(seeds, before[1], strict=True):
        assert torch.equal(seed, seed_before)
        assert sparse == sparse_before


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def test_recipes_are_the_methods():
    assert list(RECIPES) == ["fst", "ste", "sr_ste", "s_ste", "s_ste_straight", "step", "bi_mask"]
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert get_recipe(name) is recipe
        assert get_recipe(recipe) is recipe
    fields = {f.name for f in dataclasses.fields(Recipe)}
    assert fields >= {
        "mask", "backward_mask", "mvue", "masked_decay", "decay_on", "mask_interval",
        "dense_finetune", "dense_pretrain", "precondition", "weight_gradient",
    }  # fmt: skip
    fst = RECIPES["fst"]
    assert (fst.mask, fst.mvue, fst.decay_on, fst.mask_interval) == ("transposable", True, "grad", 40)
    assert fst.dense_finetune == pytest.approx(1 / 6)
    assert fst.masked_decay > 0
    assert RECIPES["sr_ste"].decay_on == "weight"
    assert RECIPES["s_ste"].mask == "soft"
    assert not RECIPES["ste"].masked_decay


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["fst"].mvue = False
    assert dataclasses.replace(RECIPES["fst"], mvue=False).mvue is False


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask", "rows"),
        ("backward_mask", "other"),
        ("decay_on", "weights"),
        ("weight_gradient", "scaled"),
        ("masked_decay", -1e-4),
        ("masked_decay", math.nan),
        ("masked_decay", math.inf),
        ("mask_interval", 0),
        ("dense_finetune", -0.1),
        ("dense_finetune", 1.1),
        ("dense_pretrain", math.nan),
    ],
)
def test_recipe_refuses_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"Recipe: {field}="):
        Recipe("mine", **{field: value})


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match=r"'ftz' is unknown.*fst, ste, sr_ste"):
        get_recipe("ftz")
    with pytest.raises(ValueError, match="unknown"):
        Sparse24Linear(4, 4, True, "ftz")


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_makes_a_layer(name):
    model = nn.Sequential(nn.Linear(8, 8))
    assert sparsify(model, name, ["0"]) == ["0"]
    assert model[0].recipe is RECIPES[name]


# ---------------------------------------------------------------------------------------------------------------------
# The layer: its mathematics


LEADING = [
    (),
    (1,),
    (2,),
    (3,),
    (4,),
    (5,),
    (9,),
    (2, 6),
    (3, 7),
    (2, 3, 5),
    (32,),
    (2, 64),
    (5, 13),
    (0,),
    (2, 0),
    (0, 4),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", LEADING)
def test_layer_is_a_linear_on_masked_weights_trained_straight_through(leading, bias):
    """Without MVUE: autograd of the dense ops, with the masked weight as the leaf; its gradient reaches all of W."""
    layer = make_layer("ste", bias=bias, dtype=torch.float64)
    x, dz = normal(*leading, 8, dtype=torch.float64), normal(*leading, 12, seed=1, dtype=torch.float64)
    z, dx, gradients = backward(layer, x, dz)

    leaf = (layer.weight.detach() * layer.mask).requires_grad_()
    b = layer.bias.detach().clone().requires_grad_() if bias else None
    x = x.requires_grad_()
    expected = F.linear(x, leaf, b)
    expected.backward(dz)
    assert z.shape == (*leading, 12)
    for got, want in zip([z, dx, *gradients], [expected, x.grad, leaf.grad, *([b.grad] if bias else [])], strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leading", LEADING)
def test_weight_gradient_is_mvue_of_dz_times_x(leading):
    layer, dense = make_layer("fst", dtype=torch.float64), make_layer("ste", dtype=torch.float64)
    x, dz = normal(*leading, 8, dtype=torch.float64), normal(*leading, 12, seed=1, dtype=torch.float64)
    z, dx, (dw, db) = backward(layer, x, dz)
    z_dense, dx_dense, (dw_dense, db_dense) = backward(dense, x, dz)
    assert torch.allclose(dw, mvue_product(dz, x, layer.seed), rtol=1e-12, atol=1e-12)
    assert torch.equal(z, z_dense)
    assert torch.equal(dx, dx_dense)
    assert torch.equal(db, db_dense)  # from the unpruned dZ
    if math.prod(leading) > 3:
        assert not torch.allclose(dw, dw_dense)


def test_weight_gradient_follows_the_seed():
    layer, x, dz = make_layer("fst"), normal(16, 8), normal(16, 12, seed=1)
    _, _, (first, _) = backward(layer, x, dz)
    _, _, (again, _) = backward(layer, x, dz)
    assert torch.equal(first, again)  # a forward without new seeds is legal and draws the same
    layer.seed.fill_(8)
    _, _, (other, _) = backward(layer, x, dz)
    assert not torch.equal(first, other)
    assert torch.allclose(other, mvue_product(dz, x, 8), atol=1e-6)


def test_backward_uses_the_seed_and_the_weights_of_its_forward():
    """The next micro-step may set seeds, and the weights may move, before this one's backward pass runs."""
    layer, x, dz = make_layer("fst"), normal(16, 8), normal(16, 12, seed=1)
    _, dx, (dw, _) = backward(layer, x, dz)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    z = layer(x)
    layer.seed.fill_(99)
    with torch.no_grad():
        layer.weight.mul_(3)
    z.backward(dz)
    assert torch.equal(layer.weight.grad, dw)
    assert torch.equal(x.grad, dx)


def test_weight_gradient_is_unbiased(monkeypatch):
    """Averaged over a fine grid of u it is the dense gradient, within the grid step; 9 tokens, so padded ones too."""
    layer, dense = make_layer("fst", dtype=torch.float64), make_layer("ste", dtype=torch.float64)
    x, dz = normal(9, 8, dtype=torch.float64), normal(9, 12, seed=1, dtype=torch.float64)
    _, _, (exact, _) = backward(dense, x, dz)
    original, steps, total = sparse24.mvue24, 512, 0
    for k in range(steps):
        u = torch.full((12, 3), (k + 0.5) / steps)
        monkeypatch.setattr(sparse24, "mvue24", lambda t, seed, u=u: original(t, seed, u=u))
        total = total + backward(layer, x, dz)[2][0]
    worst = 2 * dz.abs().sum(0)[:, None] * x.abs().amax(0) / steps
    assert ((total / steps - exact).abs() <= worst).all()


def test_mvue_runs_only_where_a_weight_gradient_is_computed(monkeypatch):
    calls, original = [], sparse24.mvue24

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(sparse24, "mvue24", counted)
    layer, x, dz = make_layer("fst"), normal(5, 8), normal(5, 12, seed=1)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.train()
    _, dx, _ = backward(layer, x, dz)
    assert calls == [(12, 8)]
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    _, dx_frozen, gradients = backward(layer, x, dz)
    assert torch.equal(dx_frozen, dx)
    assert gradients == [None, None]
    layer.bias.requires_grad_(True)
    _, _, (dw, db) = backward(layer, x, dz)
    assert dw is None
    assert torch.allclose(db, dz.sum(0))
    layer.sparse = False
    layer.weight.requires_grad_(True)
    backward(layer, x, dz)
    assert len(calls) == 1


def test_only_the_weight_trains():
    layer, x, dz = make_layer("ste"), normal(5, 8), normal(5, 12, seed=1)
    layer.bias.requires_grad_(False)
    layer(x).backward(dz)  # x wants no gradient
    assert layer.bias.grad is None
    assert torch.allclose(layer.weight.grad, dz.t() @ x, atol=1e-6)


def test_expanded_output_gradients():
    """y.sum() hands back a gradient of strides 0; the predecessors replaced its value by one."""
    layer = make_layer("ste", dtype=torch.float64)
    x = normal(6, 8, dtype=torch.float64)
    (3 * layer(x).sum()).backward()
    assert torch.allclose(layer.weight.grad, 3 * x.sum(0).expand(12, 8))
    assert torch.allclose(layer.bias.grad, torch.full((12,), 18.0, dtype=torch.float64))


@pytest.mark.parametrize("recipe", ["fst", "ste"])
def test_strided_inputs_and_output_gradients(recipe):
    """A view of any strides gives what its contiguous copy gives: nothing is read in memory order by mistake."""
    layer = make_layer(recipe)
    for x, dz in (
        (normal(5, 3, 8).transpose(0, 1), normal(12, 5, 3, seed=1).permute(2, 1, 0)),
        (normal(6, 5, 16)[::2, :, 1::2], normal(6, 5, 24, seed=1)[1::2, :, ::2]),
        (normal(1, 1, 8).expand(4, 3, 8), normal(1, 3, 1).expand(4, 3, 12)),
    ):
        z, dx, gradients = backward(layer, x, dz)
        z_plain, dx_plain, gradients_plain = backward(layer, x.contiguous(), dz.contiguous())
        for a, b in zip([z, dx, *gradients], [z_plain, dx_plain, *gradients_plain], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_masked_weights_do_not_leak():
    layer = make_layer("ste")
    with torch.no_grad():
        layer.weight[~layer.mask] = math.nan
    z, dx, _ = backward(layer, normal(4, 8), normal(4, 12, seed=1))
    assert torch.isfinite(z).all()
    assert torch.isfinite(dx).all()


def test_gradients_accumulate_over_micro_steps():
    layer, parts = make_layer("fst"), []
    for step in range(3):
        layer.seed.fill_(step)
        parts.append(backward(layer, normal(8, 8, seed=step), normal(8, 12, seed=10 + step))[2][0])
    layer.zero_grad()
    for step in range(3):
        layer.seed.fill_(step)
        layer(normal(8, 8, seed=step)).backward(normal(8, 12, seed=10 + step))
    assert torch.allclose(layer.weight.grad, sum(parts), atol=1e-6)


def test_second_derivatives_are_right_or_refused():
    """A gradient penalty that silently lacks the weight's share would be worse than an error."""
    layer, x = make_layer("ste", dtype=torch.float64), normal(5, 8, dtype=torch.float64).requires_grad_()

    def penalty(z):
        (dx,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return dx.square().sum()

    leaf = (layer.weight.detach() * layer.mask).requires_grad_()
    penalty(F.linear(x, leaf, layer.bias)).backward()
    try:
        layer.zero_grad()
        penalty(layer(x)).backward()
    except RuntimeError:
        return
    assert torch.allclose(layer.weight.grad, leaf.grad)


# ---------------------------------------------------------------------------------------------------------------------
# The layer: its state and surroundings


def test_fresh_layer_has_the_mask_of_its_weights():
    torch.manual_seed(3)
    layer = Sparse24Linear(16, 8, True, "fst")
    assert torch.equal(layer.mask, transposable_mask(layer.weight))
    assert torch.equal(layer.index, transposable_index(layer.weight))
    assert layer.index.dtype == torch.uint8
    assert layer.index.shape == (2, 4)
    assert layer.mask.dtype == torch.bool
    assert layer.sparse is True
    assert layer.seed.dtype == torch.int64
    assert layer.seed.shape == ()
    torch.manual_seed(3)
    linear = nn.Linear(16, 8)
    assert torch.equal(layer.weight, linear.weight)  # the same initialisation
    assert torch.equal(layer.bias, linear.bias)
    assert Sparse24Linear(8, 8, False, "ste").bias is None


@pytest.mark.parametrize(("features", "out"), [(6, 8), (8, 6), (5, 5)])
def test_layer_needs_widths_divisible_by_four(features, out):
    with pytest.raises(ValueError, match=f"{features} in, {out} out"):
        Sparse24Linear(features, out, True, "fst")


def test_mask_stays_until_refresh():
    layer, x = make_layer("ste"), normal(4, 8)
    mask = layer.mask.clone()
    with torch.no_grad():
        layer.weight.copy_(normal(12, 8, seed=50))
    assert torch.equal(layer.mask, mask)
    assert torch.allclose(layer(x), F.linear(x, layer.weight * mask, layer.bias), atol=1e-6)
    refresh_masks(layer)
    assert torch.equal(layer.mask, transposable_mask(layer.weight))
    assert not torch.equal(layer.mask, mask)
    assert torch.allclose(layer(x), F.linear(x, layer.weight * layer.mask, layer.bias), atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 4, 7])
def test_eval_and_no_grad_take_any_tokens_and_change_no_state(tokens):
    model = make_mlp("fst")
    with torch.no_grad():
        model[0].weight.add_(1)  # a stale mask stays stale
    before, rng = snapshot(model), torch.get_rng_state()
    trained = model(normal(tokens, 8))
    with torch.no_grad():
        assert torch.equal(model(normal(tokens, 8)), trained)
    with torch.inference_mode():
        assert torch.equal(model(normal(tokens, 8)), trained)
    assert torch.equal(model.eval()(normal(tokens, 8)), trained)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_phase_is_a_linear_bit_for_bit(dtype):
    layer, linear = make_layer("fst", dtype=dtype), nn.Linear(8, 12, dtype=dtype)
    linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    layer.sparse = False
    x, dz = normal(3, 5, 8, dtype=dtype), normal(3, 5, 12, seed=1, dtype=dtype)
    for got, want in zip(backward(layer, x, dz), backward(linear, x, dz), strict=True):
        for a, b in zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]:
            assert torch.equal(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), linear(x))
    layer.sparse = True
    assert not torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_and_double_precision_modules(dtype):
    layer = make_layer("fst", dtype=dtype)
    x, dz = normal(8, 8, dtype=dtype), normal(8, 12, seed=1, dtype=dtype)
    z, dx, (dw, db) = backward(layer, x, dz)
    assert {t.dtype for t in (z, dx, dw, db)} == {dtype}
    w_24 = layer.weight.detach() * layer.mask
    assert torch.equal(z, F.linear(x, w_24, layer.bias))
    assert torch.equal(dx, dz @ w_24)
    assert torch.equal(dw, mvue24(dz.t(), layer.seed) @ x)


@pytest.mark.parametrize("recipe", ["fst", "ste"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_gemms_low_and_keeps_float32_gradients(recipe, dtype):
    layer = make_layer(recipe)
    x, dz = normal(8, 8).requires_grad_(), normal(8, 12, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        z = layer(x)
    z.backward(dz)
    assert z.dtype == dtype
    assert {t.dtype for t in (x.grad, layer.weight.grad, layer.bias.grad)} == {torch.float32}
    w_24, low = (layer.weight * layer.mask).to(dtype).detach(), x.detach().to(dtype)
    assert torch.equal(z, F.linear(low, w_24, layer.bias.to(dtype)))
    assert torch.equal(x.grad, (dz @ w_24).float())
    drawn = mvue24(dz.t(), layer.seed) if recipe == "fst" else dz.t()
    assert torch.equal(layer.weight.grad, (drawn @ low).float())
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        assert torch.equal(layer(x), z)
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_the_dtype_that_a_linear_gives(dtype):
    layer, x = make_layer("fst", dtype=dtype), normal(8, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == nn.Linear(8, 12, dtype=dtype)(x).dtype


def test_layer_on_the_meta_device():
    """Counting FLOPs or memory of a model too large for this machine."""
    model = nn.Sequential(nn.Linear(8, 16, device="meta"))
    assert sparsify(model, "fst", ["0"]) == ["0"]
    assert model(torch.zeros(3, 8, device="meta")).shape == (3, 16)


@pytest.mark.parametrize("sparse", [True, False])
def test_state_dict_round_trip_in_either_phase(sparse):
    layer = make_layer("fst")
    with torch.no_grad():
        layer.weight.copy_(normal(12, 8, seed=60))  # the saved mask is a stale one
    layer.sparse = sparse
    assert set(layer.state_dict()) == {"weight", "bias", "index", "_extra_state"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for phase in (True, False):
        file.seek(0)
        other = Sparse24Linear(8, 12, True, "fst")
        other.sparse = phase
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert other.sparse is sparse
        assert torch.equal(other.index, layer.index)
        assert torch.equal(other(normal(4, 8)), layer(normal(4, 8)))


def test_state_dict_of_a_model_loads_strictly_into_another():
    model, other = make_mlp("fst"), make_mlp("fst", seed=9)
    model[2].sparse = False
    other.load_state_dict(model.state_dict(), strict=True)
    assert [other[0].sparse, other[2].sparse] == [True, False]
    assert torch.equal(model(normal(3, 8)), other(normal(3, 8)))


def test_deepcopy_is_independent():
    model = make_mlp("fst")
    model[2].sparse = False
    seed_draws(model, 1, 2, 3)
    other = copy.deepcopy(model)
    assert torch.equal(model(normal(3, 8)), other(normal(3, 8)))
    assert torch.equal(model[0].seed, other[0].seed)
    before = snapshot(model)
    with torch.no_grad():
        other[0].weight.copy_(normal(16, 8, seed=70))
    refresh_masks(other)
    seed_draws(other, 4, 5, 6)
    other[2].sparse = True
    assert_unchanged(model, before)


def test_model_can_be_pickled_whole():
    model = make_mlp("fst")
    model[2].sparse = False
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(normal(3, 8)), model(normal(3, 8)))
    assert other[0].recipe == RECIPES["fst"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_moving_to_another_dtype_keeps_index_and_seed(dtype):
    layer = make_layer("fst")
    index = layer.index.clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.index.dtype == torch.uint8
    assert layer.seed.dtype == torch.int64
    assert torch.equal(layer.index, index)
    assert layer(normal(4, 8, dtype=dtype)).dtype == dtype


def test_gradient_checkpointing_draws_the_same():
    model, x, dz = make_mlp("fst"), normal(9, 8), normal(9, 8, seed=1)
    seed_draws(model, 1, 2, 3)
    plain = backward(model, x, dz)
    model.zero_grad()
    x = x.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).backward(dz)
    assert torch.equal(x.grad, plain[1])
    for p, gradient in zip(model.parameters(), plain[2], strict=True):
        assert torch.equal(p.grad, gradient)


@pytest.mark.slow
def test_compiled_layer_equals_eager_and_sees_new_seeds():
    torch._dynamo.reset()
    model, x, dz = make_mlp("fst"), normal(9, 8), normal(9, 8, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    draws = []
    for step in range(3):
        seed_draws(model, 5, step, 0)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            z, dx, gradients = backward(compiled, x, dz)
        z_eager, dx_eager, gradients_eager = backward(model, x, dz)
        assert torch.equal(z, z_eager)
        assert torch.equal(dx, dx_eager)
        for a, b in zip(gradients, gradients_eager, strict=True):
            assert torch.equal(a, b)
        draws.append(gradients[0])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    with torch.no_grad():
        model[0].weight.copy_(normal(16, 8, seed=80))
    assert refresh_masks(model) > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        new_mask = backward(compiled, x, dz)
    assert all(torch.equal(a, b) for a, b in zip(new_mask[2], backward(model, x, dz)[2], strict=True))
    model[0].sparse = model[2].sparse = False
    assert torch.equal(compiled(x), F.linear(F.gelu(F.linear(x, *model[0].parameters())), *model[2].parameters()))


def test_repr_tells_recipe_and_phase():
    assert "recipe=fst" in repr(make_layer("fst"))
    assert "sparse=True" in repr(make_layer("fst"))


# ---------------------------------------------------------------------------------------------------------------------
# sparsify and densify


class Nested(nn.Module):
    """Linears at three depths, in a Sequential, a ModuleList and a ModuleDict, and things that are none."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 8, bias=False)))
        self.listed = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])
        self.named = nn.ModuleDict({"up": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 10)  # 10 is not divisible by 4

    def forward(self, index):
        h = self.body(self.embed(index))
        return self.head(self.named["up"](self.listed[1](self.listed[0](h))))


ALL = ["body.0", "body.1.1", "listed.0", "named.up"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (ALL, ALL),
        (("named.up", "body.0"), ["body.0", "named.up"]),
        ({"listed.0"}, ["listed.0"]),
        (lambda name, module: name != "head", ALL),
        (lambda name, module: module.out_features == 8, ["body.1.1", "listed.0", "named.up"]),
    ],
)
def test_sparsify_swaps_the_chosen_layers_in_place(layers, expected):
    model = Nested()
    model.body.eval()
    parameters, order = dict(model.named_parameters()), [name for name, _ in model.named_modules()]
    rng = torch.get_rng_state()
    assert sorted(sparsify(model, "fst", layers)) == sorted(expected)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [name for name, _ in model.named_modules()] == order
    assert {n for n, m in model.named_modules() if isinstance(m, Sparse24Linear)} == set(expected)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is p for name, p in parameters.items())
    for name in expected:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert layer.recipe is RECIPES["fst"]
        assert torch.equal(layer.mask, transposable_mask(layer.weight))
        assert layer.training == (not name.startswith("body"))
        assert (layer.in_features, layer.out_features) == tuple(reversed(layer.weight.shape))
    assert model(torch.arange(3)).shape == (3, 10)


def test_sparsified_model_computes_with_masked_weights():
    model = Nested()
    masked = copy.deepcopy(model)
    sparsify(model, "ste", ALL)
    with torch.no_grad():
        for name in ALL:
            weight = masked.get_submodule(name).weight
            weight.mul_(transposable_mask(weight))
    assert torch.allclose(model(torch.arange(5)), masked(torch.arange(5)), atol=1e-6)


def test_an_optimizer_made_before_goes_on():
    model = Nested()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsify(model, "ste", ALL)
    before = model.body[0].weight.detach().clone()
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.body[0].weight, before)


def test_second_sparsify_changes_nothing():
    model = Nested()
    sparsify(model, "fst", ["body.0"])
    layer = model.body[0]
    layer.sparse = False
    layer.seed.fill_(5)
    with torch.no_grad():
        layer.weight.copy_(normal(16, 8, seed=90))
    before = snapshot(model)
    assert sparsify(model, "ste", ["body.0"]) == []
    assert model.body[0] is layer
    assert layer.recipe is RECIPES["fst"]
    assert_unchanged(model, before)
    assert sparsify(model, "fst", lambda name, module: name in ("body.0", "listed.0")) == ["listed.0"]
    assert model.body[0] is layer


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (["body.0", "body.9"], r"body\.9"),
        (["embed"], "embed"),
        (["body"], "body"),
        ([], "no nn.Linear"),
        (lambda name, module: False, "no nn.Linear"),
        (["body.0", "head"], "10 out"),
        (lambda name, module: True, "10 out"),
    ],
)
def test_sparsify_refuses_and_leaves_the_model_untouched(layers, match):
    model = Nested()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=match):
        sparsify(model, "fst", layers)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())


def test_sparsify_of_a_lone_linear_matches_nothing():
    """It cannot be swapped in place, there is nothing that holds it."""
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        sparsify(nn.Linear(8, 8), "fst", lambda name, module: True)


def test_a_layer_that_is_used_in_two_places_is_swapped_in_both():
    """Weight sharing by module (ALBERT): half of it left dense would go unnoticed."""
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sparsify(model, "fst", lambda name, module: True)
    assert isinstance(model[0], Sparse24Linear)
    assert model[2] is model[0]
    densify(model)
    assert type(model[0]) is nn.Linear
    assert model[2] is model[0]


@pytest.mark.parametrize("prune", [False, True])
def test_densify_swaps_back(prune):
    model = Nested()
    dense = copy.deepcopy(model)
    sparsify(model, "fst", ALL)
    model.named["up"].sparse = False  # in its dense phase: never pruned
    model.body[0].eval()
    expected = model(torch.arange(5))
    parameters = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    masks = {name: model.get_submodule(name).mask for name in ALL}
    rng = torch.get_rng_state()
    assert densify(model, prune=prune) == ALL
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in ALL)
    assert not model.body[0].training
    assert list(model.state_dict()) == list(dense.state_dict())
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    assert all(p.requires_grad for p in model.parameters())
    for name, before in weights.items():
        layer = name.removesuffix(".weight")
        if prune and layer in ALL and layer != "named.up":
            before = before * masks[layer]
        assert torch.equal(after[name], before)
    if prune:
        assert torch.allclose(model(torch.arange(5)), expected, atol=1e-6)
    else:
        assert torch.equal(model(torch.arange(5)), dense(torch.arange(5)))
    assert densify(model) == []


def test_densify_refuses_a_lone_layer():
    with pytest.raises(ValueError, match="densify"):
        densify(make_layer())


# ---------------------------------------------------------------------------------------------------------------------
# torch's own transformer layers read linear1.weight by themselves in eval under no_grad


def make_encoder(layers=2, **kwargs):
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, layers).eval() if layers else layer.eval()


TOKENS = normal(2, 5, 8, seed=3)
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("kwargs", [{}, {"activation": "gelu"}, {"norm_first": True}])
def test_encoders_fast_path_does_not_go_dense(layers, padding, kwargs):
    model = make_encoder(layers, **kwargs)
    dense = copy.deepcopy(model)
    names = sparsify(model, "fst", lambda name, module: name.endswith(("linear1", "linear2")))
    assert len(names) == 2 * max(layers, 1)
    slow = model(TOKENS, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = model(TOKENS, src_key_padding_mask=padding)
        unpruned = dense(TOKENS, src_key_padding_mask=padding)
    read = torch.ones(2, 5, dtype=torch.bool) if padding is None else ~padding
    assert torch.allclose(fast[read], slow[read], atol=1e-5)
    assert (fast - unpruned)[read].abs().max() > 0.05
    with torch.inference_mode():
        assert torch.allclose(model(TOKENS, src_key_padding_mask=padding)[read], slow[read], atol=1e-5)
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(TOKENS, src_key_padding_mask=padding), fast)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_one_sparse_layer():
    model = make_encoder(2)
    sparsify(model, "fst", ["layers.1.linear1"])
    slow = model(TOKENS, src_key_padding_mask=PADDING)
    with torch.no_grad():
        fast = model(TOKENS, src_key_padding_mask=PADDING)
    assert torch.allclose(fast[~PADDING], slow[~PADDING], atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_without_sparse_layers_are_left_alone():
    model = nn.ModuleDict({"encoder": make_encoder(2), "head": nn.Linear(8, 8)})
    with torch.no_grad():
        before = model["encoder"](TOKENS, src_key_padding_mask=PADDING)
        sparsify(model, "fst", ["head"])
        assert torch.equal(model["encoder"](TOKENS, src_key_padding_mask=PADDING), before)


def test_attentions_out_proj_is_not_swapped():
    """MultiheadAttention never calls it as a module, it only reads its weight: a swap would have no effect."""
    model = make_encoder(1)
    assert sparsify(model, "fst", lambda name, module: True) == ["layers.0.linear1", "layers.0.linear2"]
    assert not isinstance(model.layers[0].self_attn.out_proj, Sparse24Linear)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        sparsify(nn.MultiheadAttention(8, 2), "fst", lambda name, module: True)
    with pytest.raises(ValueError, match="out_proj"):
        sparsify(nn.MultiheadAttention(8, 2), "fst", ["out_proj"])


# ---------------------------------------------------------------------------------------------------------------------
# Refresh and seeds


def test_refresh_returns_the_flip_rate_weighed_by_weights():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(64, 32), nn.Linear(8, 8))
    sparsify(model, "fst", ["0", "1"])
    assert refresh_masks(model) == 0.0
    before = [model[0].mask, model[1].mask]
    with torch.no_grad():
        for layer in model:
            layer.weight.add_(0.5 * layer.weight.std() * normal(*layer.weight.shape, seed=5))
    index = model[0].index
    rate = refresh_masks(model)
    after = [model[0].mask, model[1].mask]
    flips = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    assert flips > 0
    assert rate == flips / (32 + 2048)
    assert rate == flip_rate(before, after)
    assert all(torch.equal(model[i].mask, transposable_mask(model[i].weight)) for i in range(2))
    assert model[0].index is index  # in place: captured graphs and compiled code go on reading it
    assert refresh_masks(model) == 0.0


def test_refresh_skips_the_dense_phase():
    model = make_mlp("fst")
    model[0].sparse = False
    before = [model[0].index.clone(), model[2].mask]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(*p.shape, seed=100))
    rate = refresh_masks(model)
    assert torch.equal(model[0].index, before[0])
    assert rate == flip_rate(before[1], model[2].mask) > 0
    model[2].sparse = False
    assert refresh_masks(model) == 0.0
    assert refresh_masks(nn.Linear(4, 4)) == 0.0


def seeds_of(model):
    return [int(m.seed) for m in model.modules() if isinstance(m, Sparse24Linear)]


def test_seeds_are_a_function_of_the_tuple_and_the_layer():
    model, other = Nested(), Nested()
    sparsify(model, "fst", ALL)
    sparsify(other, "ste", ALL[:2])
    seen, rng = [], torch.get_rng_state()
    for key in itertools.product((0, 1, 1337), (0, 1, 500_000), (0, 1, 63)):
        seed_draws(model, *key)
        seen += seeds_of(model)
    assert len(set(seen)) == len(seen) == 27 * 4
    assert min(seen) < 0 < max(seen)  # all 64 bits
    seed_draws(model, 1337, 500_000, 63)
    assert seeds_of(model) == seen[-4:]  # history does not matter
    seed_draws(other, 1337, 500_000, 63)
    assert seeds_of(other) == seen[-4:-2]  # nor do the layers after it
    assert torch.equal(torch.get_rng_state(), rng)


def test_seeds_are_numbered_in_module_order_and_written_in_place():
    model = make_mlp("fst")
    seed = model[0].seed
    model[2].sparse = False  # a layer in its dense phase keeps its number
    seed_draws(model, 1, 2, 3)
    assert model[0].seed is seed
    swapped = nn.Sequential(model[2], model[0])
    first, second = seeds_of(model)
    seed_draws(swapped, 1, 2, 3)
    assert [int(model[2].seed), int(model[0].seed)] == [first, second]
    seed_draws(nn.Linear(4, 4), 1, 2, 3)  # nothing sparse: nothing to do


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def adamw_by_hand(p, gradients, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, change=lambda p, g: (p, g)):
    """AdamW in float64 over a list of gradients. `change` makes (p, g) of (p, g) before each step: masked decay."""
    p, m, v = p.double(), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        p, g = change(p, g.double())
        p = p * (1 - lr * weight_decay)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


def set_gradients(model, step=0, scale=1.0):
    for i, p in enumerate(model.parameters()):
        p.grad = scale * normal(*p.shape, seed=1000 * (step + 1) + i)


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal_parameters(model, other, **tolerance):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b)


@pytest.mark.parametrize("implementation", [{}, {"fused": True}, {"foreach": True}])
def test_step_is_adamw_on_gradients_with_masked_decay(implementation):
    """Eq. 10 enters the gradient, hence both moments; pruned entries only, once per step, by the current mask."""
    model, decay, lr = make_mlp("fst"), 0.3, 0.01
    with torch.no_grad():
        model[0].weight.copy_(normal(16, 8, seed=40))  # its mask is stale: just that one counts
    mask, start = model[0].mask, parameters_of(model)
    optimizer = MaskedDecayAdamW(
        model.parameters(), model, lr=lr, weight_decay=0.1, masked_decay=decay, **implementation
    )
    gradients = []
    for step in range(3):
        set_gradients(model, step)
        gradients.append([p.grad.clone() for p in model.parameters()])
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert torch.allclose(model[0].weight.grad, gradients[-1][0] + decay * ~mask * before, atol=1e-6)
    assert torch.equal(model[0].mask, mask)
    masks = [mask, None, model[2].mask, None]
    for i, p in enumerate(model.parameters()):

        def change(w, g, mask=masks[i]):
            return (w, g) if mask is None else (w, g + decay * ~mask * w)

        expected = adamw_by_hand(start[i], [g[i] for g in gradients], lr, weight_decay=0.1, change=change)
        assert torch.allclose(p.double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "implementation",
    [
        {},
        {"fused": True},
        pytest.param({"foreach": True}, marks=pytest.mark.slow),
        pytest.param({"amsgrad": True}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", ["no decay", "no sparse layer", "dense phase"])
@pytest.mark.parametrize("decay_on", ["grad", "weight"])
def test_without_decay_it_is_torchs_adamw(case, implementation, decay_on):
    model, other = make_mlp("fst"), make_mlp("fst")
    if case == "no sparse layer":
        densify(model)
    if case == "dense phase":
        model[0].sparse = model[2].sparse = False
    ours = MaskedDecayAdamW(
        model.parameters(),
        model,
        lr=0.01,
        masked_decay=0.0 if case == "no decay" else 0.5,
        decay_on=decay_on,
        **implementation,
    )
    torchs = torch.optim.AdamW(other.parameters(), lr=0.01, **implementation)
    for step in range(3):
        set_gradients(model, step)
        set_gradients(other, step)
        ours.step()
        torchs.step()
    assert_equal_parameters(model, other)


def test_dense_phase_is_per_layer_and_ends_the_decay():
    model = make_mlp("fst")
    optimizer = MaskedDecayAdamW(model.parameters(), model, masked_decay=0.5)
    model[0].sparse = False
    set_gradients(model)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert torch.equal(model[0].weight.grad, before[0])
    assert not torch.equal(model[2].weight.grad, before[2])
    assert torch.equal(model[0].bias.grad, before[1])
    assert torch.equal(model[2].bias.grad, before[3])


def test_decay_on_weight_by_hand():
    """SR-STE's Eq. 8: w -= lr * decay * ~mask * w first, with each group's own lr, then Adam on the plain gradient."""
    model, decay, lrs = make_mlp("fst"), 0.3, (0.1, 0.02)
    start, masks = parameters_of(model), [model[0].mask, None, model[2].mask, None]
    optimizer = MaskedDecayAdamW(
        [{"params": model[0].parameters(), "lr": lrs[0]}, {"params": model[2].parameters(), "lr": lrs[1]}],
        model,
        masked_decay=decay,
        decay_on="weight",
    )
    gradients = []
    for step in range(2):
        set_gradients(model, step)
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients[-1], strict=True))
    for i, p in enumerate(model.parameters()):
        lr = lrs[i // 2]

        def change(w, g, mask=masks[i], lr=lr):
            return (w, g) if mask is None else (w - lr * decay * ~mask * w, g)

        assert torch.allclose(p.double(), adamw_by_hand(start[i], [g[i] for g in gradients], lr, change=change))


def test_decay_on_weight_shrinks_pruned_weights_only():
    model = make_mlp("fst")
    optimizer = MaskedDecayAdamW(
        model.parameters(), model, lr=0.1, weight_decay=0.0, masked_decay=0.5, decay_on="weight"
    )
    start = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # Adam's own update is then zero
    optimizer.step()
    mask = model[0].mask
    assert torch.equal(model[0].weight[mask], start[mask])
    assert torch.allclose(model[0].weight[~mask], start[~mask] * 0.95)


def test_decay_does_not_depend_on_the_groups_learning_rate_in_the_gradient():
    model = make_mlp("fst")
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.0}]
    optimizer = MaskedDecayAdamW(groups, model, masked_decay=0.5)
    start = parameters_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for i, layer in ((0, model[0]), (2, model[2])):
        assert torch.allclose(layer.weight.grad, 0.5 * ~layer.mask * start[i])
    assert torch.equal(model[2].weight, start[2])


def test_decay_factor_may_change_between_steps():
    model = make_mlp("fst")
    optimizer = MaskedDecayAdamW(model.parameters(), model, lr=0.0, masked_decay=0.0)
    for decay in (0.0, 0.25, 2.0):
        optimizer.masked_decay = decay
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.allclose(model[0].weight.grad, decay * ~model[0].mask * model[0].weight)


def test_weights_without_gradient_or_group_are_left_alone():
    model = make_mlp("fst")
    model[2].weight.requires_grad_(False)
    optimizer = MaskedDecayAdamW([model[2].weight, model[0].bias], model, masked_decay=0.5, decay_on="weight")
    start = parameters_of(model)
    set_gradients(model)
    model[2].weight.grad = None
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, start[0])
    assert torch.equal(model[0].weight.grad, gradient)
    assert torch.equal(model[2].weight, start[2])
    assert not torch.equal(model[0].bias, start[1])


def test_a_weight_that_two_layers_share_decays_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    sparsify(model, "fst", lambda name, module: True)
    assert model[1].weight is model[0].weight
    optimizer = MaskedDecayAdamW(model.parameters(), model, lr=0.0, masked_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(model[0].weight.grad, 0.5 * ~model[0].mask * model[0].weight)


@pytest.mark.parametrize("implementation", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("decay_on", ["grad", "weight"])
def test_decay_comes_after_grad_scalers_unscaling(implementation, unscale, decay_on):
    """Were it added to the scaled gradient it would be 2^16 times too weak: the predecessors, without clipping."""
    model, other = make_mlp("fst"), make_mlp("fst")
    arguments = {"lr": 0.01, "masked_decay": 0.3, "decay_on": decay_on, **implementation}
    ours = MaskedDecayAdamW(model.parameters(), model, **arguments)
    plain = MaskedDecayAdamW(other.parameters(), other, **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))  # the scale is made on first use
    for step in range(2):
        set_gradients(model, step, scale=2.0**16)
        set_gradients(other, step)
        if unscale:
            scaler.unscale_(ours)
            assert torch.equal(model[0].weight.grad, other[0].weight.grad)
            for m in (model, other):
                nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        scaler.step(ours)
        scaler.update()
        plain.step()
        assert_equal_parameters(model, other)
    before = parameters_of(model)
    set_gradients(model, 9, scale=math.inf)
    scaler.step(ours)  # an overflow: nothing moves
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(model), before, strict=True))


def test_closure_is_called_once_before_the_decay():
    model, calls = make_mlp("fst"), []
    optimizer = MaskedDecayAdamW(model.parameters(), model, lr=0.01, masked_decay=0.3)
    other = make_mlp("fst")
    plain = MaskedDecayAdamW(other.parameters(), other, lr=0.01, masked_decay=0.3)

    def loss_of(m):
        m.zero_grad()
        loss = m(normal(8, 8)).square().sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        loss = optimizer.step(lambda: loss_of(model))
    assert calls == [True]
    assert loss.detach() > 0
    loss_of(other)
    assert plain.step() is None
    assert_equal_parameters(model, other)


def test_step_hooks_run_once():
    """Also where a plain AdamW was made before in the same process: torch then wraps its step too."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    model, calls = make_mlp("fst"), []
    optimizer = MaskedDecayAdamW(model.parameters(), model, masked_decay=0.3)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    set_gradients(model)
    optimizer.step()
    assert calls == ["before", "after"]


def test_learning_rate_schedules_work():
    model = make_mlp("fst")
    optimizer = MaskedDecayAdamW(model.parameters(), model, lr=1.0, masked_decay=0.3, decay_on="weight")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * (step + 1))
    set_gradients(model)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_optimizer_state_round_trip():
    model = make_mlp("fst")
    optimizer = MaskedDecayAdamW(model.parameters(), model, lr=0.01, masked_decay=0.3)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make_mlp("fst", seed=30)
    other.load_state_dict(state["model"])
    resumed = MaskedDecayAdamW(other.parameters(), other, lr=0.5, masked_decay=0.3)
    resumed.load_state_dict(state["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.01
    for step in (2, 3):
        for m, o in ((model, optimizer), (other, resumed)):
            set_gradients(m, step)
            o.step()
            refresh_masks(m)
    assert_equal_parameters(model, other)


def test_optimizer_takes_torchs_arguments():
    model = make_mlp("fst")
    optimizer = MaskedDecayAdamW(model.parameters(), model, 0.02, (0.8, 0.95), masked_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    optimizer = MaskedDecayAdamW(model.parameters(), model, masked_decay=0.1, eps=1e-6)
    assert optimizer.param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize(
    "arguments", [{"masked_decay": -1.0}, {"masked_decay": math.nan}, {"masked_decay": 0.1, "decay_on": "moments"}]
)
def test_optimizer_refuses_arguments(arguments):
    model = make_mlp("fst")
    with pytest.raises(ValueError, match="MaskedDecayAdamW"):
        MaskedDecayAdamW(model.parameters(), model, **arguments)


def test_decay_ratio_by_hand():
    layer = make_layer("fst", out=4, features=4)
    with torch.no_grad():
        layer.index.zero_()  # pattern 0: rows 0 and 1 keep columns 0 and 1, rows 2 and 3 keep 2 and 3
        layer.weight.copy_(torch.arange(16.0).view(4, 4))
    layer.weight.grad = torch.full((4, 4), 2.0)
    pruned = [2, 3, 6, 7, 8, 9, 12, 13]
    expected = 0.1 * math.sqrt(sum(w * w for w in pruned) / 16) / 2.0
    assert torch.equal(expand_index(layer.index).flatten().logical_not().nonzero().flatten(), torch.tensor(pruned))
    assert decay_ratio(layer, 0.1) == pytest.approx(expected)
    assert decay_ratio(layer, 0.0) == 0.0


def test_decay_ratio_is_over_all_sparse_weights_and_no_others():
    model = make_mlp("fst")
    set_gradients(model)
    masks = [model[0].mask, model[2].mask]
    model.requires_grad_(False)
    decayed = torch.cat([(~m * layer.weight).flatten() for m, layer in zip(masks, (model[0], model[2]), strict=True)])
    gradient = torch.cat([model[0].weight.grad.flatten(), model[2].weight.grad.flatten()])
    assert decay_ratio(model, 0.2) == pytest.approx(float(0.2 * decayed.norm() / gradient.norm()), rel=1e-5)
    model[0].sparse = False
    decayed, gradient = ~masks[1] * model[2].weight, model[2].weight.grad
    assert decay_ratio(model, 0.2) == pytest.approx(float(0.2 * decayed.norm() / gradient.norm()), rel=1e-5)
    model[2].sparse = False
    assert decay_ratio(model, 0.2) is None
    assert decay_ratio(nn.Linear(4, 4), 0.2) is None


# ---------------------------------------------------------------------------------------------------------------------
# All of it together


def train(model, optimizer, steps, start=0, interval=4):
    losses = []
    for iter_num in range(start, start + steps):
        seed_draws(model, 1, iter_num, 0)
        optimizer.zero_grad()
        x = normal(32, 8, seed=2000 + iter_num)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (iter_num + 1) % interval == 0:
            refresh_masks(model)
        losses.append(float(loss.detach()))
    return losses


def test_training_lowers_the_loss_and_resumes_bit_for_bit():
    """Stopped between two mask refreshes and gone on from the state_dicts alone, it ends in the same weights."""
    model = make_mlp("fst")
    optimizer = MaskedDecayAdamW(model.parameters(), model, lr=0.02, masked_decay=1e-3)
    losses = train(model, optimizer, 30)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses += train(model, optimizer, 30, start=30)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    other = make_mlp("fst", seed=20)
    other.load_state_dict(saved[0])
    resumed = MaskedDecayAdamW(other.parameters(), other, lr=0.02, masked_decay=1e-3)
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, 30, start=30) == losses[30:]
    assert_equal_parameters(model, other)


def test_reset_parameters_refreshes_the_mask_also_after_the_meta_device():
    layer = sparse24.Sparse24Linear(8, 16, device="meta").to_empty(device="cpu")
    for _ in range(2):
        layer.reset_parameters()
        assert torch.equal(layer.index, sparse24.transposable_index(layer.weight))
    assert layer.seed == 0

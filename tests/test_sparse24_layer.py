"""The sparse linear of sparse24: its mathematics and state, its swap into any model, mask refresh and seeds."""

import copy
import io
import itertools
import math
import warnings
from functools import partial
from unittest.mock import patch

import by_hand
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from by_hand import make_mlp
from torch.nn.utils import parametrizations, prune, remove_weight_norm, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import RECIPES, Sparse24Linear, densify, mvue24, refresh_masks, seed_draws, sparsify

normal = partial(by_hand.normal, dtype=torch.float32)


def make_layer(recipe="ste", bias=True, dtype=torch.float32, seed=7):
    """8 inputs, 12 outputs; its MVUE seed is not the initial one."""
    layer = Sparse24Linear(8, 12, bias, recipe, dtype=dtype)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=i))
    refresh_masks(layer)
    seed_draws(layer, seed, 0, 0)
    return layer


def backward(module, x, dz):
    """Output and the gradients of x and of the module's parameters, for the output gradient dz."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    z = module(x)
    z.backward(dz)
    return z.detach(), x.grad, *(None if p.grad is None else p.grad.clone() for p in module.parameters())


def assert_same(results, others, **tolerance):
    for a, b in zip(results, others, strict=True):
        assert torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b)


def snapshot(module):
    """All state of the module: the state_dict, which has the phases, and the seeds."""
    state = {name: copy.deepcopy(value) for name, value in module.state_dict().items()}
    return state | {f"seed {i}": layer.seed.clone() for i, layer in enumerate(sparse24.sparse_linears(module))}


def assert_unchanged(module, before):
    for name, value in snapshot(module).items():
        assert torch.equal(before[name], value) if torch.is_tensor(value) else before[name] == value, name


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics

LEADING = [(), (1,), (2,), (3,), (5,), (9,), (2, 6), (3, 7), (2, 3, 5), (32,), (5, 13), (0,), (2, 0), (0, 4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", LEADING)
def test_layer_is_a_linear_on_masked_weights_with_mvue_in_the_weight_gradient(leading, bias):
    """Without MVUE (ste): autograd of the dense ops, with the masked weight as the leaf. Its gradient is that of W.
    With MVUE (fst) only dW differs. Tokens are then padded with zeros to a multiple of 4."""
    ste, fst = (make_layer(name, bias=bias, dtype=torch.float64) for name in ("ste", "fst"))
    x, dz = normal(*leading, 8, dtype=torch.float64), normal(*leading, 12, seed=1, dtype=torch.float64)
    (z, dx, dw, *db), (z_fst, dx_fst, dw_fst, *db_fst) = backward(ste, x, dz), backward(fst, x, dz)
    leaf = (ste.weight.detach() * ste.mask).requires_grad_()
    b = ste.bias.detach().clone().requires_grad_() if bias else None
    expected = F.linear(x.requires_grad_(), leaf, b)
    expected.backward(dz)
    assert z.shape == (*leading, 12)
    assert_same([z, dx, dw, *db], [expected, x.grad, leaf.grad, *([b.grad] if bias else [])], rtol=1e-12, atol=1e-12)
    assert_same([z_fst, dx_fst, *db_fst], [z, dx, *db])
    dz, x = dz.reshape(-1, 12), x.detach().reshape(-1, 8)
    padding = -len(x) % 4
    dw_mvue = mvue24(F.pad(dz.t(), (0, padding)), fst.seed) @ F.pad(x, (0, 0, 0, padding))
    assert torch.allclose(dw_fst, dw_mvue, rtol=1e-12, atol=1e-12)
    assert math.prod(leading) <= 3 or not torch.allclose(dw_fst, dw)


def test_backward_uses_the_seed_and_the_weights_of_its_forward():
    """The next micro-step may set seeds, and weights may change, before this backward pass runs."""
    layer, x, dz = make_layer("fst"), normal(16, 8), normal(16, 12, seed=1)
    expected = backward(layer, x, dz)
    assert_same(backward(layer, x, dz), expected)  # a forward without new seeds draws the same
    layer.zero_grad()
    x = x.clone().requires_grad_()
    z = layer(x)
    layer.seed.fill_(99)
    with torch.no_grad():
        layer.weight.mul_(3)
    z.backward(dz)
    assert_same([x.grad, layer.weight.grad], expected[1:3])


def test_weight_gradient_is_unbiased(monkeypatch):
    """The average over a fine grid of u is the dense gradient, within the grid step. 9 tokens are padded to 12."""
    layer, dense = make_layer("fst", dtype=torch.float64), make_layer("ste", dtype=torch.float64)
    x, dz = normal(9, 8, dtype=torch.float64), normal(9, 12, seed=1, dtype=torch.float64)
    exact, original, steps, total = backward(dense, x, dz)[2], sparse24.mvue24, 512, 0
    for k in range(steps):
        u = torch.full((12, 3), (k + 0.5) / steps)
        monkeypatch.setattr(sparse24, "mvue24", lambda t, seed, u=u: original(t, seed, u=u))
        total = total + backward(layer, x, dz)[2]
    worst = 2 * dz.abs().sum(0)[:, None] * x.abs().amax(0) / steps
    assert ((total / steps - exact).abs() <= worst).all()


@pytest.mark.parametrize("recipe", ["fst", "ste"])
def test_strided_inputs_and_output_gradients(recipe):
    layer = make_layer(recipe)
    for x, dz in (
        (normal(5, 3, 8).transpose(0, 1), normal(12, 5, 3, seed=1).permute(2, 1, 0)),
        (normal(6, 5, 16)[::2, :, 1::2], normal(6, 5, 24, seed=1)[1::2, :, ::2]),
        (normal(1, 1, 8).expand(4, 3, 8), normal(1, 3, 1).expand(4, 3, 12)),
        (normal(6, 8), torch.full((), 3.0).expand(6, 12)),  # as of y.sum()
    ):
        assert_same(backward(layer, x, dz), backward(layer, x.contiguous(), dz.contiguous()), atol=1e-5)


def test_second_derivatives_are_refused():
    """A gradient penalty would be silently wrong."""
    layer, x = make_layer("ste"), normal(5, 8).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_mvue_runs_only_where_a_weight_gradient_is_computed(monkeypatch):
    calls, original = [], sparse24.mvue24
    monkeypatch.setattr(sparse24, "mvue24", lambda t, seed: calls.append(t.shape) or original(t, seed))
    layer, x, dz = make_layer("fst"), normal(5, 8), normal(5, 12, seed=1)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.train()
    _, dx, *_ = backward(layer, x, dz)
    assert calls == [(12, 8)]
    layer.requires_grad_(False)
    _, dx_frozen, *gradients = backward(layer, x, dz)
    assert torch.equal(dx_frozen, dx)
    assert gradients == [None, None]
    layer.bias.requires_grad_(True)
    *_, dw, db = backward(layer, x, dz)
    assert dw is None
    assert torch.allclose(db, dz.sum(0))
    layer.requires_grad_(True)
    layer.sparse = False
    backward(layer, x, dz)
    assert len(calls) == 1


def test_pruned_weights_are_not_read_and_only_the_weight_may_train():
    layer, x, dz = make_layer("ste"), normal(5, 8), normal(5, 12, seed=1)
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight[~layer.mask] = math.nan
    z = layer(x)
    z.backward(dz)
    assert torch.isfinite(z).all()
    assert layer.bias.grad is None
    assert torch.allclose(layer.weight.grad, dz.t() @ x, atol=1e-6)
    assert torch.isfinite(backward(layer, x, dz)[1]).all()


# ---------------------------------------------------------------------------------------------------------------------
# State


def test_fresh_layer_has_the_mask_of_its_weights():
    torch.manual_seed(3)
    layer = Sparse24Linear(16, 8, True, "fst")
    assert torch.equal(layer.mask, sparse24.transposable_mask(layer.weight))
    assert torch.equal(layer.index, sparse24.transposable_index(layer.weight))
    assert (layer.index.dtype, layer.index.shape) == (torch.uint8, (2, 4))
    assert (layer.seed.dtype, layer.seed.shape, layer.mask.dtype) == (torch.int64, (), torch.bool)
    assert layer.sparse is True
    torch.manual_seed(3)
    assert_same(layer.parameters(), nn.Linear(16, 8).parameters())  # the same initialisation
    assert Sparse24Linear(8, 8, False, "ste").bias is None
    assert "recipe=fst, sparse=True" in repr(layer)
    for features, out in ((6, 8), (8, 6), (5, 5)):
        with pytest.raises(ValueError, match=f"{features} in, {out} out, need both divisible by 4"):
            Sparse24Linear(features, out, True, "fst")


RECIPE_KINDS = pytest.mark.parametrize("recipe", ["fst", "sr_ste", "s_ste", "bi_mask"])


def assert_fitting(model):
    """The masks, and beta of soft weights, are those of the weights."""
    for layer in sparse24.sparse_linears(model):
        assert torch.equal(layer.index, layer.new_index())
        assert layer.recipe.mask != "soft" or torch.equal(layer.beta, sparse24.sste_scale(layer.weight))
        assert not hasattr(layer, "index_t") or torch.equal(layer.index_t, layer._new_index_t())


@RECIPE_KINDS
@pytest.mark.parametrize("source", ["reset", "dense", "sparse", "dense, assigned", "sparse, assigned"])
def test_layers_on_the_meta_device(recipe, source):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        assert sparsify(model, recipe, ["0", "2"]) == ["0", "2"]
        assert model(torch.zeros(3, 8)).shape == (3, 8)
    assign, trained = source.endswith("assigned"), make_mlp(recipe)
    if not assign:
        with torch.no_grad():
            model.to_empty(device="cpu")
            model(normal(3, 8))  # the memory is arbitrary, but no index is out of range
    if source.startswith("dense"):
        densify(trained)
    if source == "reset":
        for layer in sparse24.sparse_linears(model):
            layer.reset_parameters()
    else:
        model.load_state_dict(trained.state_dict(), strict=True, assign=assign)
        assert torch.equal(model[0].weight, trained[0].weight)
    assert_fitting(model)
    assert model[0].seed == 0
    assert not model[0].seed.is_meta
    model(normal(3, 8)).sum().backward()


def test_a_state_dict_without_masks_keeps_its_beta():
    model, state = make_mlp("s_ste"), make_mlp("s_ste", seed=1).state_dict()
    state["0.beta"].fill_(7)
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith("index")})
    assert model[0].beta == 7
    assert torch.equal(model[0].index, model[0].new_index())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_phase_is_a_linear_bit_for_bit(dtype):
    layer, linear = make_layer("fst", dtype=dtype), nn.Linear(8, 12, dtype=dtype)
    linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    layer.sparse = False
    x, dz = normal(3, 5, 8, dtype=dtype), normal(3, 5, 12, seed=1, dtype=dtype)
    assert_same(backward(layer, x, dz), backward(linear, x, dz))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), linear(x))
        layer.sparse = True
        assert layer(x).dtype == linear(x).dtype
    assert not torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_another_dtype(dtype):
    layer = make_layer("fst")
    index = layer.index.clone()
    layer.to(dtype)
    assert (layer.weight.dtype, layer.index.dtype, layer.seed.dtype) == (dtype, torch.uint8, torch.int64)
    assert torch.equal(layer.index, index)
    x, dz = normal(8, 8, dtype=dtype), normal(8, 12, seed=1, dtype=dtype)
    w_24 = layer.weight.detach() * layer.mask
    z, dx, dw, db = backward(layer, x, dz)
    assert_same([z, dx, dw], [F.linear(x, w_24, layer.bias), dz @ w_24, mvue24(dz.t(), layer.seed) @ x])
    assert {t.dtype for t in (z, dx, dw, db)} == {dtype}


@pytest.mark.parametrize("sparse", [True, False])
def test_state_dict_round_trip_in_either_phase(sparse):
    layer, file = make_layer("fst"), io.BytesIO()
    with torch.no_grad():
        layer.weight.copy_(normal(12, 8, seed=60))  # the saved mask is a stale one
    layer.sparse = sparse
    assert set(layer.state_dict()) == {"weight", "bias", "index", "_extra_state"}
    torch.save(layer.state_dict(), file)
    for phase in (True, False):
        file.seek(0)
        other = Sparse24Linear(8, 12, True, "fst")
        other.sparse = phase
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert other.sparse is sparse
        assert_same([other.index, other(normal(4, 8))], [layer.index, layer(normal(4, 8))])
    other.sparse = not sparse
    other.load_state_dict({**layer.state_dict(), "_extra_state": {"sparse": sparse}})  # as in earlier releases
    assert other.sparse is sparse


@RECIPE_KINDS
@pytest.mark.parametrize("sparse", [True, False])
def test_state_dict_holds_plain_tensors_that_can_be_averaged(recipe, sparse):
    model, other = make_mlp(recipe), make_mlp(recipe, seed=5)
    for layer in (model[0], model[2], other[0], other[2]):
        layer.sparse = sparse
    one, two = model.state_dict(), other.state_dict()
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in one.values())
    assert len({value.untyped_storage().data_ptr() for value in one.values()}) == len(one)  # as safetensors needs it
    assert sum(value.numel() for value in one.values()) > 16 * 8 * 2
    floats = {key for key, value in one.items() if value.is_floating_point()}
    averaged = {key: 0.999 * two[key] + 0.001 * one[key] if key in floats else two[key] for key in one}
    averaged["0._extra_state"] = 0.999 * two["0._extra_state"] + 0.001 * one["0._extra_state"]
    model.load_state_dict(averaged, strict=True)
    assert model[0].sparse is model[2].sparse is sparse
    assert torch.equal(model[0].index, two["0.index"])


@RECIPE_KINDS
def test_dense_weights_bring_their_masks(recipe):
    model, dense = make_mlp(recipe), make_mlp(recipe, seed=5)
    densify(dense)
    before = copy.deepcopy(model.state_dict())
    index = model[0].index
    assert model.load_state_dict(dense.state_dict(), strict=True) == ([], [])
    assert_fitting(model)
    assert index is model[0].index  # in place
    assert not torch.equal(index, before["0.index"])
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"0\.{name}\""):
            model.load_state_dict({key: value for key, value in dense.state_dict().items() if key != f"0.{name}"})
    model.load_state_dict(before)
    assert torch.equal(index, before["0.index"])


@pytest.mark.parametrize(
    ("recipe", "change", "match"),
    [
        ("fst", lambda index: index.fill_(90), r"0\.index is torch.uint8 or too large, need uint8 below 90"),
        ("s_ste", lambda index: index.fill_(6), r"0\.index is .* need uint8 below 6"),
        ("fst", lambda index: index / 2, r"0\.index is torch.float32 .*masks cannot be averaged"),
        ("fst", lambda index: index.long(), r"0\.index is torch.int64"),
        ("fst", lambda index: index[1:], r"size mismatch for 0\.index"),
        ("sr_ste", lambda index: index[:4], r"size mismatch for 0\.index"),
    ],
)
def test_an_index_of_no_patterns_is_refused(recipe, change, match):
    model = make_mlp(recipe)
    before = model[0].index.clone()
    state = copy.deepcopy(model.state_dict())
    state["0.index"] = change(state["0.index"])
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state)
    assert torch.equal(model[0].index, before)


@RECIPE_KINDS
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_an_averaged_model_has_masks_of_its_weights_after_a_refresh(average, use_buffers, recipe):
    model = make_mlp(recipe)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(normal(*p.shape, seed=step))
        refresh_masks(model)
        averaged.update_parameters(model)
    assert 0 <= refresh_masks(averaged, begin=True) <= 1
    assert_fitting(averaged)
    assert not torch.equal(averaged.module[0].index, model[0].index)
    averaged(normal(3, 8)).sum().backward()


def test_copies_and_pickles_are_independent_and_equal():
    model, file = make_mlp(), io.BytesIO()
    model[2].sparse = False
    seed_draws(model, 1, 2, 3)
    torch.save(model, file)
    file.seek(0)
    copied, before = copy.deepcopy(model), snapshot(model)
    for other in (copied, torch.load(file, weights_only=False)):
        assert_same([other(normal(3, 8))], [model(normal(3, 8))])
        assert other[0].recipe == RECIPES["fst"]
    assert torch.equal(copied[0].seed, model[0].seed)
    with torch.no_grad():
        copied[0].weight.copy_(normal(16, 8, seed=70))
    refresh_masks(copied)
    seed_draws(copied, 4, 5, 6)
    copied[2].sparse = True
    assert_unchanged(model, before)


def test_mask_stays_until_refresh():
    layer, x = make_layer("ste"), normal(4, 8)
    mask = layer.mask.clone()
    with torch.no_grad():
        layer.weight.copy_(normal(12, 8, seed=50))
    assert torch.equal(layer.mask, mask)
    assert torch.allclose(layer(x), F.linear(x, layer.weight * mask, layer.bias), atol=1e-6)
    refresh_masks(layer)
    assert torch.equal(layer.mask, sparse24.transposable_mask(layer.weight))
    assert not torch.equal(layer.mask, mask)
    assert torch.allclose(layer(x), F.linear(x, layer.weight * layer.mask, layer.bias), atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 4, 7])
def test_eval_and_no_grad_take_any_tokens_and_change_no_state(tokens):
    model, x = make_mlp(), normal(tokens, 8)
    with torch.no_grad():
        model[0].weight.add_(1)  # a stale mask stays stale
    before, rng = snapshot(model), torch.get_rng_state()
    trained = model(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(x), trained)
    assert torch.equal(model.eval()(x), trained)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("recipe", ["fst", "ste"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_gemms_low_and_keeps_float32_gradients(recipe, dtype):
    layer = make_layer(recipe)
    x, dz = normal(8, 8).requires_grad_(), normal(8, 12, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        z = layer(x)
    z.backward(dz)
    assert z.dtype == dtype
    w_24, low = (layer.weight * layer.mask).to(dtype).detach(), x.detach().to(dtype)
    drawn = mvue24(dz.t(), layer.seed) if recipe == "fst" else dz.t()
    expected = [F.linear(low, w_24, layer.bias.to(dtype)), (dz @ w_24).float(), (drawn @ low).float()]
    assert_same([z, x.grad, layer.weight.grad], expected)
    assert {t.dtype for t in (x.grad, layer.weight.grad, layer.bias.grad)} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        assert torch.equal(layer(x), z)
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


def test_gradient_checkpointing_draws_the_same():
    model, x, dz = make_mlp(), normal(9, 8), normal(9, 8, seed=1)
    seed_draws(model, 1, 2, 3)
    plain = backward(model, x, dz)
    model.zero_grad()
    x = x.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).backward(dz)
    assert_same([x.grad, *(p.grad for p in model.parameters())], plain[1:])


@pytest.mark.slow
def test_compiled_layer_equals_eager_and_sees_new_seeds():
    torch._dynamo.reset()
    model, x, dz = make_mlp(), normal(9, 8), normal(9, 8, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    draws = []
    for step in range(3):
        seed_draws(model, 5, step, 0)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            results = backward(compiled, x, dz)
        assert_same(results, backward(model, x, dz))
        draws.append(results[2])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    with torch.no_grad():
        model[0].weight.copy_(normal(16, 8, seed=80))
    assert refresh_masks(model) > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        new_mask = backward(compiled, x, dz)
    assert_same(new_mask, backward(model, x, dz))
    model[0].sparse = model[2].sparse = False
    assert torch.equal(compiled(x), F.linear(F.gelu(F.linear(x, *model[0].parameters())), *model[2].parameters()))


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
        (lambda name, module: name != "head", ALL),
        (lambda name, module: module.out_features == 8, ["body.1.1", "listed.0", "named.up"]),
    ],
)
def test_sparsify_swaps_the_chosen_layers_in_place(layers, expected):
    model = Nested()
    model.body.eval()
    masked, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, order = dict(model.named_parameters()), [name for name, _ in model.named_modules()]
    rng = torch.get_rng_state()
    assert sparsify(model, "ste", layers) == expected
    assert torch.equal(torch.get_rng_state(), rng)
    assert [name for name, _ in model.named_modules()] == order
    assert [n for n, m in model.named_modules() if isinstance(m, Sparse24Linear)] == expected
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is p for name, p in parameters.items())
    for name in expected:
        layer = model.get_submodule(name)
        assert layer.recipe is RECIPES["ste"]
        assert torch.equal(layer.mask, sparse24.transposable_mask(layer.weight))
        assert layer.training == (not name.startswith("body"))
        with torch.no_grad():
            masked.get_submodule(name).weight.mul_(layer.mask)
    assert torch.allclose(model(torch.arange(5)), masked(torch.arange(5)), atol=1e-6)
    before = after[f"{expected[0]}.weight"].detach().clone()
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()  # an optimizer made before sparsify updates the sparse layers
    assert not torch.equal(after[f"{expected[0]}.weight"], before)


@RECIPE_KINDS
def test_hooks_attributes_and_references_survive_both_ways(recipe):
    model, calls = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), []
    linear, plain = model[0], copy.deepcopy(model)
    linear.lr_scale, linear.weight.requires_grad = 0.1, False
    linear.register_buffer("count", torch.zeros(()))
    linear.register_forward_pre_hook(lambda module, x: (0 * x[0],))
    linear.register_forward_hook(lambda *args: calls.append("forward"))
    linear.register_full_backward_hook(lambda *args: calls.append("backward"))
    linear.register_state_dict_post_hook(lambda module, state, *args: calls.append("state_dict"))
    linear.register_load_state_dict_post_hook(lambda *args: calls.append("load"))

    def check(expected_class):
        assert model[0] is linear
        assert type(linear) is expected_class
        assert (linear.lr_scale, linear.weight.requires_grad, linear.count.item()) == (0.1, False, 0)
        calls.clear()
        y = model[0](normal(4, 8).requires_grad_())
        assert torch.equal(y, linear.bias.expand(4, 16))  # the first hook makes the input 0
        y.sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls == ["forward", "backward", "state_dict", "load"]

    sparsify(model, recipe, ["0", "1"])
    linear.later = 5
    check(sparse24.get_recipe(recipe).layer or Sparse24Linear)
    densify(model)
    check(nn.Linear)
    assert linear.later == 5
    assert repr(model) == repr(plain)
    assert vars(model[1]).keys() == vars(plain[1]).keys()
    assert list(model[1].state_dict()) == ["weight", "bias"]
    assert model[1]._buffers == {}


def test_a_linear_alone_and_a_frozen_one_become_sparse():
    linear = nn.Linear(8, 8).requires_grad_(False)
    assert sparsify(linear, "fst", lambda name, module: True) == [""]
    assert torch.equal(linear(normal(3, 8)), F.linear(normal(3, 8), linear.pruned_weight(), linear.bias))
    assert densify(linear) == [""]
    assert type(linear) is nn.Linear
    assert not any(p.requires_grad for p in linear.parameters())


COMPUTED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_torch_computes_are_refused_before_and_after(compute):
    for layers in (["2", "0"], lambda name, module: True):
        model = make_mlp()
        densify(model)
        compute(model[0])
        with pytest.raises(ValueError, match="sparsify: 0 has no weight Parameter; undo weight_norm, spectral_norm"):
            sparsify(model, "fst", layers)
        assert sparse24.sparse_linears(model) == []
    model = make_mlp()
    optimizer = sparse24.MaskedDecayAdamW(model.parameters(), model, masked_decay=0.1)
    compute(model[0])
    for act in (densify, refresh_masks, lambda m: seed_draws(m, 1, 2, 3), lambda m: optimizer.step()):
        with pytest.raises(ValueError, match="sparse layers: 0 has no weight Parameter; undo"):
            act(model)
    if compute is weight_norm:
        remove_weight_norm(model[0])
        assert 0 <= refresh_masks(model) <= 1


def test_linears_that_cannot_become_sparse_are_refused(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].forward = model[1].forward  # as accelerate's hooks do
    with pytest.raises(ValueError, match="1 has a forward beside that of its class; remove the hook"):
        sparsify(model, "fst", ["0", "1"])
    del model[1].forward
    model[1].register_buffer("permutation", torch.zeros(3))
    with pytest.raises(ValueError, match="1 has attributes that a sparse layer needs itself, permutation; rename them"):
        sparsify(model, "bi_mask", ["0", "1"])
    monkeypatch.setattr(sparse24, "is_dtensor", lambda t: t is model[1].weight)
    with pytest.raises(ValueError, match="1 has a sharded weight; call sparsify before"):
        sparsify(model, "fst", ["0", "1"])
    assert [type(linear) for linear in model] == [nn.Linear] * 2


@pytest.mark.slow
def test_a_model_that_is_compiled_already_can_be_made_sparse():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), normal(4, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    dense = compiled(x)
    assert sparsify(compiled, "fst", lambda name, module: True) == ["_orig_mod.0", "_orig_mod.2"]
    assert torch.equal(compiled(x), model(x))
    assert not torch.allclose(compiled(x), dense)
    densify(compiled)
    assert torch.equal(compiled(x), dense)


def test_second_sparsify_changes_nothing():
    model = Nested()
    sparsify(model, "fst", ["body.0"])
    layer = model.body[0]
    layer.sparse = False
    layer.seed.fill_(5)
    before = snapshot(model)
    assert sparsify(model, "ste", ["body.0"]) == []
    assert layer.recipe is RECIPES["fst"]
    assert_unchanged(model, before)
    assert sparsify(model, "fst", ["body.0", "listed.0"]) == ["listed.0"]
    assert model.body[0] is layer


@pytest.mark.parametrize(
    ("make_model", "layers", "match"),
    [
        (Nested, ["body.0", "body.9"], r"body\.9"),
        (Nested, ["embed"], "embed"),
        (Nested, ["body"], "body"),
        (Nested, [], "no nn.Linear"),
        (Nested, ["body.0", "head"], "10 out"),
        (Nested, lambda name, module: True, "10 out"),
        # MultiheadAttention reads the weight of out_proj and never calls the module: a swap would have no effect
        (lambda: nn.MultiheadAttention(8, 2), lambda name, module: True, r"no nn\.Linear"),
        (lambda: nn.MultiheadAttention(8, 2), ["out_proj"], r"no nn\.Linear"),
    ],
)
def test_sparsify_refuses_and_leaves_the_model_untouched(make_model, layers, match):
    model = make_model()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=match):
        sparsify(model, "fst", layers)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())


def test_a_layer_that_is_used_in_two_places_is_swapped_in_both():
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
    expected = model(torch.arange(5)) if prune else dense(torch.arange(5))
    parameters = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    masks = {f"{name}.weight": model.get_submodule(name).mask for name in ALL[:-1]} if prune else {}
    rng = torch.get_rng_state()
    assert densify(model, prune=prune) == ALL
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in ALL)
    assert not model.body[0].training
    assert list(model.state_dict()) == list(dense.state_dict())
    for name, p in model.named_parameters():
        assert p is parameters[name]
        assert p.requires_grad
        assert torch.equal(p, weights[name] * masks.get(name, 1))
    assert torch.allclose(model(torch.arange(5)), expected, atol=1e-6)
    assert densify(model) == []


@pytest.mark.parametrize("recipe", ["fst", "s_ste"])
def test_densify_prunes_a_shared_weight_once_and_refuses_it_where_another_module_would_change(recipe):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    sparsify(model, recipe, lambda name, module: True)
    x = torch.randn(3, 8)
    expected = model[:3](x)
    model[3].weight.data[0, 0] = torch.nan  # a run that has diverged is exported all the same
    assert densify(model, prune=True) == ["0", "2", "3"]
    assert torch.allclose(model[:3](x), expected, atol=1e-6)
    tied = nn.ModuleDict({"embedding": nn.Embedding(8, 8), "head": nn.Linear(8, 8)})
    tied["head"].weight = tied["embedding"].weight
    sparsify(tied, recipe, "head")
    before = tied["head"].weight.detach().clone()
    with pytest.raises(ValueError, match="densify: embedding shares a weight that is pruned in another module; untie"):
        densify(tied, prune=True)
    assert torch.equal(tied["head"].weight, before)
    assert densify(tied) == ["head"]


@pytest.mark.parametrize("layers", ["10", ["10"], iter(["10"])], ids=str)
def test_layers_are_chosen_by_whole_names(layers):
    assert sparsify(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), "fst", layers) == ["10"]


PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("kwargs", [{}, {"activation": "gelu"}, {"norm_first": True}])
@pytest.mark.parametrize("sparse", ["all", "one", "none"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_encoders_fast_path_does_not_go_dense(layers, sparse, kwargs, padding):
    """torch's transformer layers read linear1.weight directly, in eval under no_grad."""
    torch.manual_seed(4)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)
    encoder = nn.TransformerEncoder(encoder, layers) if layers else encoder
    model = nn.ModuleDict({"encoder": encoder.eval(), "head": nn.Linear(8, 8)})
    x, read = normal(2, 5, 8, seed=3), torch.ones(2, 5).bool() if padding is None else ~padding
    with torch.no_grad():
        dense = encoder(x, src_key_padding_mask=padding)
    linears = [name for name, _ in model.named_modules() if name.endswith(("linear1", "linear2"))]
    assert len(linears) == 2 * max(layers, 1)
    sparsify(model, "fst", {"all": linears, "one": linears[-2:-1], "none": ["head"]}[sparse])
    slow = encoder(x, src_key_padding_mask=padding)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            fast = encoder(x, src_key_padding_mask=padding)
            assert torch.allclose(fast[read], slow[read], atol=1e-5)
    assert ((fast - dense)[read].abs().max() > 0.01) == (sparse != "none")
    assert torch.equal(fast, dense) == (sparse == "none")  # encoders without sparse layers keep the fast path


# ---------------------------------------------------------------------------------------------------------------------
# Refresh and seeds


def test_refresh_returns_the_flip_rate_and_skips_the_dense_phase():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(64, 32), nn.Linear(8, 8), nn.Linear(8, 8))
    sparsify(model, "fst", ["0", "1", "2"])
    assert refresh_masks(model) == 0.0
    model[2].sparse = False
    before, index = [layer.mask for layer in model[:3]], model[0].index
    with torch.no_grad():
        for layer in model:
            layer.weight.add_(0.5 * layer.weight.std() * normal(*layer.weight.shape, seed=5))
    rate, after = refresh_masks(model), [layer.mask for layer in model[:3]]
    flips = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    assert flips > 0
    assert rate == flips / (32 + 2048) == sparse24.flip_rate(before[:2], after[:2])
    assert torch.equal(after[2], before[2])
    assert all(torch.equal(model[i].mask, sparse24.transposable_mask(model[i].weight)) for i in range(2))
    assert model[0].index is index  # in place: captured graphs and compiled code read this tensor
    assert refresh_masks(nn.Linear(4, 4)) == 0.0


def seeds_of(model):
    return [int(layer.seed) for layer in sparse24.sparse_linears(model)]


def test_seeds_are_a_function_of_the_tuple_and_the_layer():
    model, other = Nested(), Nested()
    sparsify(model, "fst", ALL)
    sparsify(other, "ste", ALL[:2])
    seen, rng, first = [], torch.get_rng_state(), model.body[0].seed
    for key in itertools.product((0, 1, 1337), (0, 1, 500_000), (0, 1, 63)):
        seed_draws(model, *key)
        seen += seeds_of(model)
    assert len(set(seen)) == len(seen) == 27 * 4
    assert min(seen) < 0 < max(seen)  # all 64 bits
    model.body[0].sparse = False  # a layer in its dense phase keeps its number
    for each in (model, other):
        seed_draws(each, 1337, 500_000, 63)
    assert seeds_of(model) == seen[-4:]  # history does not matter
    assert seeds_of(other) == seen[-4:-2]  # nor do later layers
    assert model.body[0].seed is first  # in place
    assert torch.equal(torch.get_rng_state(), rng)
    seed_draws(nn.Linear(4, 4), 1, 2, 3)  # no sparse layer: nothing to do


def test_seeds_are_no_buffers_and_follow_the_weight():
    """DDP overwrites all buffers of all ranks with those of rank 0, by default in every forward pass."""
    model = nn.ModuleDict({"wrapped": make_mlp()})
    seed_draws(model, 1, 2, 3)
    seeds = seeds_of(model)
    for buffer in model.buffers():
        buffer.zero_()
    assert seeds_of(model) == seeds
    assert seeds_of(copy.deepcopy(model)) == seeds
    layer = model["wrapped"][0]
    assert layer.to("meta").seed.is_meta
    assert layer.to_empty(device="cpu").seed == 0


@pytest.fixture
def warned():
    """Warnings of missing seeds, as if none had been given before."""
    sparse24._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    sparse24._warn_once.cache_clear()


def test_training_without_seeds_warns_once(warned):
    model, x = nn.Sequential(Sparse24Linear(8, 8)), normal(4, 8)
    for _ in range(3):
        model(x)
    assert [str(w.message) for w in warned if "need seed_draws(model, seed, iter_num, micro_batch)" in str(w.message)]
    assert len(warned) == 1


def test_seeds_of_the_step_before_do_not_silence_the_warning(warned):
    """Also after a compiled forward pass, which cannot warn by itself."""
    model, x = nn.Sequential(Sparse24Linear(8, 8)), normal(4, 8)
    optimizer = sparse24.MaskedDecayAdamW(model.parameters(), model, masked_decay=0.1)
    for step, compiled in enumerate((False, True)):
        if step == 0:
            seed_draws(model, 1, 2, 3)
        with patch.object(torch.compiler, "is_compiling", lambda compiled=compiled: compiled):
            y = model(x)
        y.sum().backward()
        assert len(warned) == 0
        optimizer.step()
    assert len(warned) == 1


@pytest.mark.parametrize("case", ["eval", "no_grad", "dense phase", "no MVUE", "frozen", "seeded", "checkpointed"])
def test_no_warning_without_a_draw_or_with_seeds(warned, case):
    model, x = nn.Sequential(Sparse24Linear(8, 8, recipe="ste" if case == "no MVUE" else "fst")), normal(4, 8)
    model.train(case != "eval").requires_grad_(case != "frozen")
    model[0].sparse = case != "dense phase"
    if case in ("seeded", "checkpointed"):
        seed_draws(model, 1, 2, 3)
    for module in (model, copy.deepcopy(model)):
        with torch.set_grad_enabled(case != "no_grad"):
            y = checkpoint(module, x, use_reentrant=False) if case == "checkpointed" else module(x)
        if y.requires_grad:
            y.sum().backward()
    assert warned == []


def test_begin_step_numbers_the_layers_and_skips_the_dense_phase(monkeypatch):
    calls, model = [], make_mlp()
    monkeypatch.setattr(Sparse24Linear, "begin_step", lambda layer, *key: calls.append(key))
    sparse24.begin_step(model, 7, 3, begin=True)
    model[0].sparse = False
    sparse24.begin_step(model, 7, 4)
    assert calls == [(7, 3, 0, True), (7, 3, 1, True), (7, 4, 1, False)]

"""ffn.py: the sparse FFN as one function, against autograd on the pruned matrices and against the layers one by one.

The emulated backend multiplies what it unpacks from the very bytes that a GPU's library would read, so equal bits
between it and the dense GEMMs on pruned matrices mean that every operand, layout and transposition is right.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

import sparse24
from gemm24 import ffn, operands
from gemm24.choose import Report
from gemm24.ffn import (
    GEMMS,
    FFNPlan,
    _packable,
    ffn_gemms,
    kernel_samples,
    pack_weights,
    plan_ffn,
    set_plan,
    sparse_ffn,
    takes_plan,
)
from gemm24.matmul import ORDERS, Choice, unpack_ref
from model import ACTIVATIONS, GATED, GPT, MLP, GPTConfig
from sparse24 import (
    RECIPES,
    MaskedDecayAdamW,
    densify,
    refresh_masks,
    seed_draws,
    sparse_linears,
    sparsify,
)

CPU = torch.device("cpu")
FST, STE = RECIPES["fst"], RECIPES["ste"]
EVERY = [(name, bias) for name in ACTIVATIONS for bias in (True, False)]
D, D_FF = 128, 256


def make_mlp(activation="gelu", bias=True, recipe=FST, dtype=torch.float32, d=D, d_ff=D_FF) -> MLP:
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


def make_plan(mlp, tokens, dtype=torch.float32, mvue=True, **choices) -> FFNPlan:
    return FFNPlan(mlp.activation, tokens, dtype, mvue, *(choices.get(name, Choice()) for name in GEMMS))


def emulated(order: str) -> dict[str, Choice]:
    return dict.fromkeys(GEMMS, Choice("emulated", order))


def run(mlp, x, dy, forward=None) -> dict[str, torch.Tensor]:
    """Output and all gradients of one call."""
    x = x.clone().requires_grad_()
    mlp.zero_grad()
    y = (mlp if forward is None else forward)(x)
    y.backward(dy)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in mlp.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


def planned(mlp, plan):
    mlp = copy.deepcopy(mlp)
    set_plan(mlp, plan)
    return mlp


def data(tokens, dtype=torch.float32, d=D, batch=1):
    generator = torch.Generator().manual_seed(tokens)
    return (torch.randn(batch, tokens // batch, d, generator=generator).to(dtype) for _ in range(2))


# ---------------------------------------------------------------------------------------------------------------------
# The maths


@pytest.mark.parametrize(
    "tokens", [64, pytest.param(12, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow), 1]
)
@pytest.mark.parametrize(("activation", "bias"), EVERY)
def test_without_mvue_it_is_autograd_on_the_pruned_matrices(activation, bias, tokens):
    """In float64, and with nn.functional's own activations: an odd number of tokens is padded with zeros, exactly."""
    mlp = make_mlp(activation, bias, STE, torch.float64)
    x, dy = data(tokens, torch.float64)
    got = run(planned(mlp, make_plan(mlp, tokens, torch.float64, mvue=False)), x, dy)

    def reference(x):
        w1, w2 = (
            w * layer.mask + (w - w.detach()) * ~layer.mask for layer in (mlp.c_fc, mlp.c_proj) for w in [layer.weight]
        )
        return F.linear(ACTIVATIONS[activation](F.linear(x, w1, mlp.c_fc.bias)), w2, mlp.c_proj.bias)

    expected = run(mlp, x, dy, reference)
    assert len(expected) == (6 if bias else 4)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("gradient", ["straight", "true"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_soft_weights_get_the_gradient_that_the_layers_give(activation, gradient, again):
    recipe = dataclasses.replace(RECIPES["s_ste"], weight_gradient=gradient)
    mlp = make_mlp(activation, True, recipe, torch.float64)
    mlp.c_fc.prune_again = mlp.c_proj.prune_again = again
    x, dy = data(64, torch.float64)
    expected, got = run(mlp, x, dy), run(planned(mlp, make_plan(mlp, 64, torch.float64)), x, dy)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)
    straight = dataclasses.replace(recipe, weight_gradient="straight")
    straight = make_mlp(activation, True, straight, torch.float64)
    plain = run(straight, x, dy)["c_fc.weight"]
    assert torch.equal(plain, expected["c_fc.weight"]) == (gradient == "straight")


@pytest.mark.parametrize("order", ["masked", "sm80", "sm90"])
@pytest.mark.parametrize("recipe", ["fst", "sr_ste", "s_ste"])
def test_weights_packed_where_they_multiply_are_those_packed_before(recipe, order):
    """FSDP's way: nothing is kept, and two calls without pack_weights in between see the weights as they are."""
    kept = make_mlp("gelu", True, recipe)
    x, dy = data(64)
    transposable, mvue = recipe == "fst", kept.c_fc.recipe.mvue
    chosen = emulated(order) if order != "masked" else {}
    if not transposable:
        chosen = {name: choice for name, choice in chosen.items() if name not in ("da", "dx")}
    plan = make_plan(kept, 64, torch.bfloat16, mvue, **{k: v for k, v in chosen.items() if mvue or k[:2] != "dw"})
    again = copy.deepcopy(kept)
    again.c_fc.prune_again = again.c_proj.prune_again = True
    for mlp in (kept, again):
        set_plan(mlp, plan)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = run(kept, x, dy.bfloat16()), run(again, x, dy.bfloat16())
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name
        assert all(again.c_fc._buffers.get(name) is None for name in ("w_24", "packed", "packed_t"))
        for mlp in (kept, again):
            with torch.no_grad():
                mlp.c_fc.weight.mul_(0.5)
        pack_weights(kept)


@pytest.mark.parametrize("recipe", ["fst", "sr_ste", "s_ste", "bi_mask"])
def test_layers_that_prune_again_give_the_same_gradients(recipe):
    kept = make_mlp("gelu", True, recipe)
    again = copy.deepcopy(kept)
    again.c_fc.prune_again = again.c_proj.prune_again = True
    x, dy = data(64)
    expected, got = run(kept, x, dy), run(again, x, dy)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("activation", "bias"), EVERY)
def test_with_mvue_it_draws_what_the_layers_draw(activation, bias):
    mlp = make_mlp(activation, bias, dtype=torch.float64)
    x, dy = data(96, torch.float64, batch=3)
    expected = run(mlp, x, dy)
    got = run(planned(mlp, make_plan(mlp, 96, torch.float64)), x, dy)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12)
    without = make_mlp(activation, bias, STE, dtype=torch.float64)
    without = run(planned(without, make_plan(without, 96, torch.float64, mvue=False)), x, dy)
    assert not torch.allclose(without["c_fc.weight"], got["c_fc.weight"], rtol=1e-3)
    if bias:  # from the unpruned gradients
        torch.testing.assert_close(without["c_fc.bias"], got["c_fc.bias"])


FORWARD = {"z", "y", "dw1", "dw2"}  # what is 2:4 under row-wise masks


@pytest.mark.parametrize("name", ["sr_ste", "step", "s_ste"])
def test_row_wise_and_soft_methods_compute_by_a_plan_what_their_layers_do(name):
    mlp = make_mlp(recipe=RECIPES[name], dtype=torch.float64)
    x, dy = data(96, torch.float64, batch=3)
    got = run(planned(mlp, make_plan(mlp, 96, torch.float64, mvue=RECIPES[name].mvue)), x, dy)
    for key, tensor in run(mlp, x, dy).items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("name", ["sr_ste", "s_ste"])
def test_row_wise_and_soft_operands_are_packed_for_the_forward_and_follow_the_weights(name, order):
    mlp = make_mlp(recipe=RECIPES[name])
    x, dy = data(64, torch.bfloat16)
    choices = {gemm: Choice("emulated", order) for gemm in FORWARD if RECIPES[name].mvue or gemm in "zy"}
    packed = planned(mlp, make_plan(mlp, 64, torch.bfloat16, mvue=RECIPES[name].mvue, **choices))
    masked = planned(mlp, make_plan(mlp, 64, torch.bfloat16, mvue=RECIPES[name].mvue))
    for _ in range(2):
        results = []
        for mlp in (packed, masked):
            with torch.autocast("cpu", torch.bfloat16):
                results.append(run(mlp, x, dy))
            with torch.no_grad():
                for layer in (mlp.c_fc, mlp.c_proj):
                    layer.weight.add_(torch.roll(layer.weight, 1, 1))
            refresh_masks(mlp)
            pack_weights(mlp)
        assert all(torch.equal(results[0][key], tensor) for key, tensor in results[1].items())
    assert packed.c_fc.packed is not None
    assert packed.c_fc.packed_t is None


def test_plans_that_do_not_fit_a_method_are_refused():
    soft, transposable = make_mlp(recipe=RECIPES["s_ste"]), emulated("sm90")
    with pytest.raises(ValueError, match=r"2:4 input gradients, which mask='soft' does not; .*transposable=False"):
        set_plan(soft, make_plan(soft, 64, **transposable))
    for recipe in (RECIPES["bi_mask"], dataclasses.replace(RECIPES["fst"], fp8=True)):
        mlp = make_mlp(recipe=recipe)
        with pytest.raises(ValueError, match="goes layer by layer; use no plan"):
            set_plan(mlp, make_plan(mlp, 64, mvue=recipe.mvue))


def test_only_what_the_masks_allow_is_measured():
    config = GPTConfig(n_embd=D, n_head=1, n_layer=1)
    for transposable, mvue, expected in (
        *((True, True, set(GEMMS)), (True, False, {"z", "y", "da", "dx"})),
        *((False, True, FORWARD), (False, False, {"z", "y"})),
    ):
        assert set(ffn_gemms(D, D_FF, 64, "gelu", True, mvue, transposable)) == expected
        options = {"spmm": "emulated", "mvue": mvue, "transposable": transposable}
        plan, _ = plan_ffn(config, 64, CPU, torch.bfloat16, **options)
        assert {name for name in GEMMS if getattr(plan, name).backend == "emulated"} == expected


def test_another_seed_is_another_draw_and_the_seed_may_change_before_the_backward():
    mlp = make_mlp(dtype=torch.float64)
    set_plan(mlp, make_plan(mlp, 64, torch.float64))
    x, dy = data(64, torch.float64)
    first = run(mlp, x, dy)

    def forward(x):
        y = MLP.forward(mlp, x)
        seed_draws(mlp, 9, 9, 9)
        return y

    again = run(mlp, x, dy, forward)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = run(mlp, x, dy)
    assert torch.equal(other["dx"], first["dx"])
    assert not torch.equal(other["c_fc.weight"], first["c_fc.weight"])
    assert not torch.equal(other["c_proj.weight"], first["c_proj.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# The layouts, through the packed bytes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("activation", "bias"), EVERY)
def test_packed_operands_give_the_bits_of_the_pruned_matrices(activation, bias, order):
    mlp = make_mlp(activation, bias, dtype=torch.bfloat16)
    x, dy = data(128, torch.bfloat16)
    expected = run(planned(mlp, make_plan(mlp, 128, torch.bfloat16)), x, dy)
    packed = planned(mlp, make_plan(mlp, 128, torch.bfloat16, **emulated(order)))
    assert (packed.c_fc.w_24 is None) == (order != "cutlass")  # a converter reads the pruned matrix
    got = run(packed, x, dy)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("tokens", [100, 37, 1])
def test_packed_operands_of_an_odd_number_of_tokens(tokens):
    """Padded to 64, where MVUE draws other numbers than without: so against the unpacked plan, padded by hand."""
    mlp = make_mlp("geglu", dtype=torch.bfloat16)
    x, dy = data(tokens, torch.bfloat16)
    got = run(planned(mlp, make_plan(mlp, tokens, torch.bfloat16, **emulated("sm90"))), x, dy)
    padding = (0, 0, 0, -tokens % 64)
    whole = planned(mlp, make_plan(mlp, tokens + padding[3], torch.bfloat16))
    expected = run(whole, F.pad(x, padding), F.pad(dy, padding))
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor[:, :tokens] if name in ("y", "dx") else tensor), name


@pytest.mark.parametrize("sparse", [*GEMMS, "z+y", "dx+dw2", "z+dx", "y+da"])
def test_any_of_the_gemms_may_be_dense(sparse):
    """Forward and backward of a layer then need different operands of one weight."""
    mlp = make_mlp("swiglu", dtype=torch.bfloat16)
    x, dy = data(64, torch.bfloat16)
    expected = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16)), x, dy)
    choices = {name: Choice("emulated", "sm90") for name in sparse.split("+")}
    got = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16, **choices)), x, dy)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_two_converters_may_share_a_weight():
    mlp = make_mlp(dtype=torch.bfloat16)
    x, dy = data(64, torch.bfloat16)
    expected = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16)), x, dy)
    for z, dx in itertools.permutations(("sm80", "cutlass", "masked"), 2):
        choices = {
            name: Choice("masked" if order == "masked" else "emulated", order) for name, order in (("z", z), ("dx", dx))
        }
        got = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16, **choices)), x, dy)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items()), (z, dx)


def test_kernel_samples_are_what_the_layouts_say():
    for order in ("sm80", "sm90"):
        pairs = kernel_samples(order, CPU)
        assert len(pairs) == 12
        for x, blob in pairs:
            assert torch.equal(unpack_ref(blob, *x.shape, order), x)
            assert ((x != 0).view(-1, 4).sum(1) == 2).all()


# ---------------------------------------------------------------------------------------------------------------------
# Weights are packed once per step, and never stale


def change_weight(mlp):
    mlp.c_fc.weight.data.mul_(2)
    with torch.no_grad():
        mlp.c_fc.weight.mul_(2)


def load(mlp):
    mlp.load_state_dict(mlp.state_dict())


@pytest.mark.parametrize("change", [change_weight, load, refresh_masks])
@pytest.mark.parametrize("order", ["masked", "sm90", "cutlass"])
def test_stale_operands_are_refused_until_they_are_packed_again(order, change):
    mlp = make_mlp(dtype=torch.bfloat16)
    x, dy = data(64, torch.bfloat16)
    plan = make_plan(mlp, 64, torch.bfloat16, **(emulated(order) if order != "masked" else {}))
    set_plan(mlp, plan)
    change(mlp)
    with pytest.raises(RuntimeError, match=r"weights or masks changed .*; call pack_weights"):
        mlp(x)
    pack_weights(mlp)
    got, fresh = run(mlp, x, dy), copy.deepcopy(mlp)
    set_plan(fresh, plan)
    for name, tensor in run(fresh, x, dy).items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("first", ["sm90", pytest.param("sm80", marks=pytest.mark.slow), "cutlass", "masked"])
@pytest.mark.parametrize("then", ["sm90", pytest.param("sm80", marks=pytest.mark.slow), "cutlass", "masked"])
def test_a_plan_may_follow_another(first, then):
    """The metadata of one order must not be left in the buffers of the next."""
    mlp = make_mlp(dtype=torch.bfloat16)
    x, dy = data(64, torch.bfloat16)
    expected = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16)), x, dy)
    for order in (first, then):
        set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **(emulated(order) if order != "masked" else {})))
    assert all(torch.equal(run(mlp, x, dy)[name], tensor) for name, tensor in expected.items())


def test_values_alone_are_written_while_the_mask_stands(monkeypatch):
    calls = []
    real = operands.pack_weight_
    monkeypatch.setattr(operands, "pack_weight_", lambda *a, metadata: calls.append(metadata) or real(*a, metadata))
    mlp = make_mlp(dtype=torch.bfloat16)
    set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **emulated("sm90")))
    with torch.no_grad():
        mlp.c_fc.weight.mul_(2)
    pack_weights(mlp)
    refresh_masks(mlp)
    pack_weights(mlp)
    assert calls == [True, True, False, False, True, True]


def test_operands_stay_in_place_and_go_with_the_sparse_phase():
    mlp = make_mlp(dtype=torch.bfloat16)
    set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **emulated("sm90")))
    where = mlp.c_fc.packed.data_ptr()
    assert "packed" not in str(mlp.state_dict().keys())
    pack_weights(mlp)
    assert mlp.c_fc.packed.data_ptr() == where
    x, dy = data(64, torch.bfloat16)
    for layer in sparse_linears(mlp):
        layer.sparse = False
    assert not takes_plan(mlp.plan, x, mlp.c_fc, mlp.c_proj)
    dense = run(mlp, x, dy)
    pack_weights(mlp)
    assert not hasattr(mlp.c_fc, "packed")
    assert not hasattr(mlp.c_proj, "packed_t")
    assert all(torch.equal(run(mlp, x, dy)[name], tensor) for name, tensor in dense.items())
    for layer in sparse_linears(mlp):
        layer.sparse = True
    with pytest.raises(RuntimeError, match="call pack_weights"):
        mlp(x)
    set_plan(mlp, None)
    mlp(x)


# ---------------------------------------------------------------------------------------------------------------------
# Where it is used


def test_other_calls_than_the_plans_take_the_layers_one_by_one():
    mlp = make_mlp()
    plan = make_plan(mlp, 64)
    x = torch.randn(2, 32, D)
    assert takes_plan(plan, x, mlp.c_fc, mlp.c_proj)
    assert not takes_plan(None, x, mlp.c_fc, mlp.c_proj)
    assert not takes_plan(plan, x[:, :31], mlp.c_fc, mlp.c_proj)
    assert not takes_plan(plan, x.double(), mlp.c_fc, mlp.c_proj)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_plan(plan, x, mlp.c_fc, mlp.c_proj)
        assert takes_plan(plan._replace(dtype=torch.bfloat16), x, mlp.c_fc, mlp.c_proj)
    mlp.c_proj.sparse = False
    assert not takes_plan(plan, x, mlp.c_fc, mlp.c_proj)
    densify(mlp)
    assert not takes_plan(plan, x, mlp.c_fc, mlp.c_proj)


def test_autocast_multiplies_in_its_dtype_and_keeps_master_gradients():
    mlp = make_mlp("geglu")
    x, dy = data(64)
    low = planned(make_mlp("geglu", dtype=torch.bfloat16), make_plan(mlp, 64, torch.bfloat16, **emulated("sm90")))
    set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **emulated("sm90")))

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return mlp(x)

    got = run(mlp, x, dy.bfloat16(), forward)
    assert got["y"].dtype == torch.bfloat16
    assert {got[name].dtype for name in got if name != "y"} == {torch.float32}
    expected = run(low, x.bfloat16(), dy.bfloat16())
    assert all(torch.equal(got[name], tensor.to(got[name].dtype)) for name, tensor in expected.items())


def test_gradients_accumulate_and_only_those_asked_for_are_made():
    mlp = make_mlp()
    set_plan(mlp, make_plan(mlp, 64))
    x, dy = data(64)
    once = run(mlp, x, dy)
    mlp(x).backward(dy)
    torch.testing.assert_close(mlp.c_fc.weight.grad, 2 * once["c_fc.weight"])
    for frozen in (["c_fc.weight"], ["c_proj.weight"], ["c_fc.weight", "c_fc.bias"], ["c_proj.weight", "c_proj.bias"]):
        for name, p in mlp.named_parameters():
            p.requires_grad_(name not in frozen)
        got = run(mlp, x, dy)
        for name in once:
            assert got[name] is None if name in frozen else torch.equal(got[name], once[name]), (frozen, name)


def test_activation_checkpointing_gives_the_same_gradients():
    mlp = make_mlp("swiglu")
    set_plan(mlp, make_plan(mlp, 64))
    x, dy = data(64)
    expected = run(mlp, x, dy)
    got = run(mlp, x, dy, lambda x: checkpoint(mlp, x, use_reentrant=False))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_evaluation_draws_nothing_and_changes_nothing():
    mlp = make_mlp()
    set_plan(mlp, make_plan(mlp, 64))
    x, _ = data(64)
    state = copy.deepcopy(mlp.state_dict())
    with torch.no_grad():
        y = mlp(x)
    with torch.inference_mode():
        assert torch.equal(mlp(x), y)
    assert torch.equal(mlp(x), y)
    assert all(torch.equal(tensor, state[name]) for name, tensor in mlp.state_dict().items() if torch.is_tensor(tensor))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["masked", "sm90"])
def test_it_compiles_as_one_graph(order):
    dtype = torch.bfloat16
    mlp = make_mlp("geglu", dtype=dtype)
    x, dy = data(64, dtype)
    set_plan(mlp, make_plan(mlp, 64, dtype, **(emulated(order) if order != "masked" else {})))
    expected = run(mlp, x, dy)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = run(mlp, x, dy, compiled)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():  # an optimizer step: the code that was compiled reads the operands anew
        mlp.c_fc.weight.mul_(2)
        pack_weights(mlp)
    expected = run(mlp, x, dy)
    got = run(mlp, x, dy, compiled)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@torch.library.custom_op("nano24_tests::activation", mutates_args=())
def opaque_activation(z: torch.Tensor, activation: str, recompute: bool = False) -> torch.Tensor:
    """What the compiler sees of the activation's kernel: an op that it cannot look into."""
    return operands.activation_ref(z, activation)


@opaque_activation.register_fake
def _(z, activation, recompute=False):
    return torch.empty_like(z)


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_the_compiler_keeps_no_activation(monkeypatch, told):
    """Two equal calls of an op would be merged, and the first result kept for the backward. `recompute` differs."""
    equal_calls = lambda z, activation, recompute=False: opaque_activation(z, activation)  # noqa: E731
    monkeypatch.setattr(operands, "activation", opaque_activation if told else equal_calls)
    kept, calls = [], []

    def graph_of(into):
        def compiler(graph, inputs):
            nodes = list(graph.graph.nodes)
            into.append((nodes, sum("nano24_tests" in str(node.target) for node in nodes)))
            return make_boxed_func(graph.forward)

        return compiler

    mlp = make_mlp(bias=False)
    set_plan(mlp, make_plan(mlp, 64))
    options = {"fw_compiler": graph_of(kept), "bw_compiler": graph_of(calls)}
    backend = aot_autograd(**options, partition_fn=min_cut_rematerialization_partition)
    x, dy = data(64)
    expected = run(mlp, x, dy)
    got = run(mlp, x, dy, torch.compile(mlp, backend=backend, fullgraph=True))
    assert all(torch.allclose(got[name], tensor) for name, tensor in expected.items())
    ((nodes, in_forward),), ((_, in_backward),) = kept, calls
    shapes = [tuple(node.meta["val"].shape) for node in nodes[-1].args[0] if hasattr(node, "meta")]
    hidden = sum(shape in ((D_FF, 64), (64, D_FF)) for shape in shapes)
    assert (in_forward, in_backward, hidden) == ((1, 1, 1) if told else (1, 0, 2))


def test_a_gpt_trains_by_its_plan_as_without():
    """Ten steps with refreshes and the switch to dense: the losses of both ways are those of float64 arithmetic."""
    config = GPTConfig(block_size=32, vocab_size=17, n_layer=2, n_head=2, n_embd=64, sparse="fst")

    def losses(spmm):
        torch.manual_seed(0)
        model = GPT(config).double()
        plan, _ = plan_ffn(config, 2 * 32, CPU, torch.float64, spmm)
        set_plan(model, plan)
        assert (model.transformer.h[0].mlp.plan is None) == (spmm == "dense")
        optimizer = MaskedDecayAdamW(model.parameters(), model, lr=1e-2, masked_decay=1e-3)
        out = []
        for step in range(10):
            for layer in sparse_linears(model):
                layer.sparse = step < 7
            idx = torch.arange(step, step + 64).remainder(17).view(2, 32)
            seed_draws(model, 0, step, 0)
            loss = model(idx, idx.roll(1, 1))[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 3 == 2:
                refresh_masks(model, measure=False)
            pack_weights(model)
            out.append(loss.item())
        return out

    dense, masked = losses("dense"), losses("masked")
    assert dense[-1] < dense[0]
    assert masked == pytest.approx(dense, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_gemms_have_the_shapes_that_the_function_multiplies(monkeypatch):
    seen = []
    real = ffn.matmul24

    def spy(a, b, bias, rows, transposed, choice):
        column_major = b.stride(0) == 1 and b.shape[0] > 1
        seen.append((rows, b.shape[1], b.shape[0], column_major, transposed, bias is not None))
        return real(a, b, bias, rows, transposed, choice)

    monkeypatch.setattr(ffn, "matmul24", spy)
    for activation in ("gelu", "geglu"):
        mlp = make_mlp(activation)
        set_plan(mlp, make_plan(mlp, 192))
        x, dy = data(192)
        run(mlp, x, dy)
        gemms = ffn_gemms(D, mlp.c_proj.in_features, 192, activation, True, True)
        assert sorted(seen) == sorted(gemm[1:7] for gemm in gemms.values())
        assert [gemm.name for gemm in gemms.values() if gemm.fresh] == ["dw1", "dw2"]
        assert [*gemms] == list(GEMMS) == [gemm.name for gemm in gemms.values()]
        seen.clear()
    assert [*ffn_gemms(D, D_FF, 65, "gelu", True, False)] == ["z", "y", "da", "dx"]
    assert ffn_gemms(D, D_FF, 65, "gelu", True, True)["dw1"].k == 128


def test_plans_of_the_modes():
    config = GPTConfig(n_embd=D, n_head=1, n_layer=1, activation="relu2", bias=False)
    for spmm in ("auto", "dense"):  # nothing wins on a CPU
        plan, report = plan_ffn(config, 64, CPU, torch.bfloat16, spmm)
        assert plan is None
        assert set(report.choices.values()) == {Choice()}
    plan, report = plan_ffn(config, 64, CPU, torch.float32, "masked", mvue=False)
    assert plan == FFNPlan("relu2", 64, torch.float32, False, *[Choice()] * 6)
    plan, report = plan_ffn(config, 50, CPU, torch.bfloat16, "emulated")
    assert [plan.z, plan.dw2, plan.padding] == [Choice("emulated", "sm90")] * 2 + [14]
    for gemm, fits in (
        (ffn_gemms(192, 768, 64, "gelu", True, True)["z"], False),
        (ffn_gemms(256, 768, 64, "gelu", True, True)["z"], True),
    ):
        assert (_packable(gemm, Choice("emulated", "sm80")) != Choice()) == fits  # W1^T has 192 rows, sm80 needs 128
    assert _packable(ffn_gemms(192, 768, 64, "gelu", True, True)["dw1"], Choice("emulated", "sm80")) != Choice()
    odd = GPTConfig(n_embd=96, n_head=1, n_layer=1)  # 96 is no multiple of 64: nothing of it can be packed
    plan, report = plan_ffn(odd, 64, CPU, torch.bfloat16, "emulated")
    assert plan[4:] == (Choice(), Choice(), Choice(), Choice(), Choice("emulated", "sm90"), Choice())
    geglu = GPTConfig(n_embd=64, n_head=1, n_layer=1, activation="geglu")  # d_ff = 172
    plan, report = plan_ffn(geglu, 64, CPU, torch.bfloat16, "emulated")
    assert plan[4:] == tuple([Choice()] * 6)
    for spmm, message in (("cusparselt", "needs an NVIDIA GPU"), ("fast", "need one of auto, dense, masked")):
        with pytest.raises(ValueError, match=message):
            plan_ffn(config, 64, CPU, torch.bfloat16, spmm)


@pytest.mark.parametrize("fastest", ["dense", "layers", "plan"])
@pytest.mark.parametrize("micro_steps", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_whole_layer_is_timed_each_way(monkeypatch, fastest, micro_steps):
    """The fastest takes 1 us, the others 2; and packing 1.5 us, of which the plan pays its share."""
    mlp, ways = make_mlp(), []
    before = copy.deepcopy(mlp.state_dict())
    for way, function in (("plan", ffn._SparseFFN), ("layers", sparse24._MaskedLinear)):
        real = function.apply
        monkeypatch.setattr(function, "apply", lambda *args, way=way, real=real: ways.append(way) or real(*args))
    pack = ffn.pack_weights
    monkeypatch.setattr(ffn, "pack_weights", lambda model: ways.append("packing") or pack(model))

    def timer(calls, repetitions, graph, device):
        assert not graph  # on a CPU there is none
        out = []
        for call in calls:
            ways.clear()
            call()
            us = 1.5 if ways[:1] == ["packing"] else 1.0 if (ways or ["dense"])[0] == fastest else 2.0
            out.append([us + 0.01 * i for i in range(repetitions)])
        return out

    monkeypatch.setattr(ffn, "time_interleaved", timer)
    found = ffn.time_ways(mlp, make_plan(mlp, 64, torch.bfloat16), None, micro_steps)
    expected = {way: (1.04 if way == fastest else 2.04) + (1.54 / micro_steps) * (way == "plan") for way in found["us"]}
    assert list(found["us"]) == ["dense", "layers", "plan"]
    assert {way: us[0] for way, us in found["us"].items()} == pytest.approx(expected)
    assert found["us"][fastest][2] - found["us"][fastest][1] == pytest.approx(0.08)
    assert found["taken"] == ("plan" if fastest == "plan" and micro_steps == 10 else "layers")
    report = Report({}, [], [], found)
    assert report.pays() == (expected[found["taken"]] < expected["dense"])
    assert f"taken: {found['taken']}" in report.text()
    assert found["host_us"].keys() == found["us"].keys()
    assert min(found["host_us"].values()) > 0
    assert mlp.plan is None  # what was timed were copies
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items() if torch.is_tensor(tensor)
    )


def test_a_layer_that_cannot_be_captured_is_timed_without_a_graph(monkeypatch, capsys):
    def timer(calls, repetitions, graph, device):
        if graph or calls == ["broken"]:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return [[1.0] * repetitions for _ in calls]

    monkeypatch.setattr(ffn, "time_interleaved", timer)
    assert ffn._times(["a", "b"], True, CPU) == [[1.0] * 9] * 2
    assert "cannot be captured in a CUDA graph (RuntimeError: CUDA error: operation not" in capsys.readouterr().out
    assert ffn._times(["a"], False, CPU) == [[1.0] * 9]
    assert not capsys.readouterr().out
    for graph in (False, True):
        with pytest.raises(RuntimeError, match="not permitted"):
            ffn._times(["broken"], graph, CPU)


def test_plans_of_another_activation_or_recipe_are_refused():
    """They would compute something else, silently."""
    mlp = make_mlp("gelu", recipe=STE)
    for plan in (make_plan(mlp, 64)._replace(activation="relu2", mvue=False), make_plan(mlp, 64, mvue=True)):
        with pytest.raises(
            ValueError, match=r"set_plan: the plan is for .* need this model's gelu and mvue=False; make"
        ):
            set_plan(mlp, plan)
        assert mlp.plan is None
    set_plan(mlp, make_plan(mlp, 64, mvue=False))
    other = torch.nn.Module()
    other.plan, other.activation, other.mlp = "mine", "gelu", mlp  # not ours
    set_plan(other, None)
    assert (other.plan, mlp.plan) == ("mine", None)


def test_modules_that_are_not_two_sparse_layers_are_left_alone():
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, bias=True))
    set_plan(model, FFNPlan("gelu", 8, torch.float32, True, *[Choice()] * 6))
    assert model.transformer.h[0].mlp.plan is None
    mlp = make_mlp()
    with pytest.raises(RuntimeError, match="call pack_weights"):
        sparse_ffn(torch.randn(8, D), mlp.c_fc, mlp.c_proj, make_plan(mlp, 8))


def test_the_dense_phase_frees_what_was_packed():
    mlp = make_mlp(dtype=torch.bfloat16)
    for order in ("masked", "cutlass"):
        set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **(emulated(order) if order != "masked" else {})))
        assert mlp.c_fc.w_24 is not None
        set_plan(mlp, None)
        assert not {"w_24", "packed", "packed_t"} & {*mlp.c_fc._buffers, *mlp.c_proj._buffers}


def metadata_spy(monkeypatch) -> list:
    """Which calls write metadata; the others leave what was there, as the kernel does and the twin does not."""
    calls = []
    real = operands.pack_weight_

    def spy(packed, packed_t, w, index, order, metadata):
        calls.append(metadata)
        half = w.numel() // 2
        before = [blob[half:].clone() for blob in (packed, packed_t)]
        real(packed, packed_t, w, index, order)
        for blob, tail in zip((packed, packed_t), before, strict=True):
            if not metadata:
                blob[half:] = tail

    monkeypatch.setattr(operands, "pack_weight_", spy)
    return calls


def test_metadata_is_written_anew_for_another_order_or_buffer(monkeypatch):
    calls = metadata_spy(monkeypatch)
    mlp = make_mlp(dtype=torch.bfloat16)
    x, dy = data(64, torch.bfloat16)
    expected = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16)), x, dy)
    for order in ("sm90", "sm80", "sm90"):
        set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **emulated(order)))
        assert all(torch.equal(run(mlp, x, dy)[name], tensor) for name, tensor in expected.items()), order
    assert calls == [True] * 6
    set_plan(mlp, make_plan(mlp, 64, torch.float16, **emulated("sm90")))  # other buffers, nothing in them
    assert calls == [True] * 8


@pytest.mark.parametrize("name", ["dw1", "dw2"])
def test_gradients_alone_may_be_packed_with_an_odd_number_of_tokens(name):
    mlp = make_mlp(dtype=torch.bfloat16)
    plan = make_plan(mlp, 12, torch.bfloat16, **{name: Choice("emulated", "sm90")})
    assert plan.padding == 52
    x, dy = data(12, torch.bfloat16)
    got = run(planned(mlp, plan), x, dy)
    whole = planned(mlp, make_plan(mlp, 64, torch.bfloat16))
    expected = run(whole, F.pad(x, (0, 0, 0, 52)), F.pad(dy, (0, 0, 0, 52)))
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor[:, :12] if key in ("y", "dx") else tensor), key


@pytest.mark.parametrize("order", ["masked", "sm90"])
def test_gradients_may_come_in_any_strides(order):
    """y.sum() hands on one number, expanded; a transposed loss columns."""
    mlp = make_mlp(dtype=torch.bfloat16)
    set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **(emulated(order) if order != "masked" else {})))
    x, dy = data(64, torch.bfloat16)
    for strided in (torch.ones((), dtype=dy.dtype).expand_as(dy), dy.transpose(1, 2).contiguous().transpose(1, 2)):
        expected, got = run(mlp, x, strided.contiguous()), run(mlp, x, strided)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_model_that_is_cast_is_packed_anew():
    """A cast would change the metadata of a packed buffer as if it were numbers."""
    mlp = make_mlp(bias=False)
    set_plan(mlp, make_plan(mlp, 64, torch.bfloat16, **emulated("sm90")))
    mlp.to(torch.float64)
    x, _ = data(64, torch.bfloat16)
    with pytest.raises(RuntimeError, match="call pack_weights"):
        mlp(x)
    pack_weights(mlp)
    w_24 = (mlp.c_fc.weight * mlp.c_fc.mask).bfloat16()
    assert torch.equal(unpack_ref(mlp.c_fc.packed, *w_24.shape, "sm90"), w_24)
    assert torch.equal(unpack_ref(mlp.c_fc.packed_t, *w_24.t().shape, "sm90"), w_24.t())


@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
@pytest.mark.parametrize("part", ["weight", "index", "another weight"])
def test_stale_operands_of_either_layer_are_refused(name, part):
    mlp = make_mlp()
    set_plan(mlp, make_plan(mlp, 64))
    layer, kept = getattr(mlp, name), []
    if part == "another weight":  # of as many changes
        kept.append(layer.weight)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        layer.weight.data = -layer.weight.data
        while layer.weight._version < kept[0]._version:
            layer.weight.detach().add_(0)
    else:
        getattr(layer, part).detach().add_(0)
    with pytest.raises(RuntimeError, match="call pack_weights"):
        mlp(torch.randn(64, D))


def report_of(choices, seen=None):
    """A stand-in for choose.choose, with what it was asked in `seen`."""

    def choose(gemms, device, mode, **options):
        if seen is not None:
            seen.append((mode, options))
        return Report({name: choices.get(name, Choice()) for name in gemms}, [], [])

    return choose


def test_one_sparse_gemm_is_enough_for_a_plan_and_the_question_is_passed_on_whole(monkeypatch, tmp_path):
    from gemm24 import ffn

    seen, won = [], Choice("cusparselt", "sm90", 3)
    monkeypatch.setattr(ffn, "choose", report_of({"dx": won}, seen))
    config = GPTConfig(n_embd=D, n_head=1, n_layer=1)
    rows = [{"key": "k"}]
    plan, _ = plan_ffn(config, 64, CPU, torch.bfloat16, graph=True, cache=tmp_path, known=rows)
    assert plan[4:] == (Choice(), Choice(), Choice(), won, Choice(), Choice())
    ((mode, options),) = seen
    assert mode == "auto"
    assert options == {
        "dtype": torch.bfloat16,
        "graph": True,
        "cache": tmp_path,
        "known": rows,
        "samples": kernel_samples,
        "packer": operands.pack_matrix,
    }


@pytest.mark.parametrize("name", ["dw1", "dw2"])
def test_a_converter_may_pack_one_gradient_alone(name):
    mlp = make_mlp(dtype=torch.bfloat16)
    x, dy = data(64, torch.bfloat16)
    expected = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16)), x, dy)
    got = run(planned(mlp, make_plan(mlp, 64, torch.bfloat16, **{name: Choice("emulated", "cutlass")})), x, dy)
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_autocast_leaves_float64_as_it_is():
    mlp = make_mlp(dtype=torch.float64)
    x = torch.randn(64, D, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes_plan(make_plan(mlp, 64, torch.float64), x, mlp.c_fc, mlp.c_proj)
        assert not takes_plan(make_plan(mlp, 64, torch.bfloat16), x, mlp.c_fc, mlp.c_proj)


def test_a_layer_with_one_sparse_linear_gets_no_plan():
    for only in ("c_fc", "c_proj"):
        mlp = MLP(GPTConfig(n_embd=D, n_head=1, n_layer=1))
        sparsify(mlp, FST, [only])
        set_plan(mlp, make_plan(mlp, 64))
        assert mlp.plan is None
        assert mlp(torch.randn(64, D)).shape == (64, D)


def test_no_activation_is_kept_for_the_backward():
    mlp = make_mlp()
    set_plan(mlp, make_plan(mlp, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        mlp(torch.randn(64, D, requires_grad=True))
    assert kept.count((D_FF, 64)) == 1  # Z, not A


def test_one_dense_layer_frees_both():
    mlp = make_mlp()
    set_plan(mlp, make_plan(mlp, 64))
    mlp.c_proj.sparse = False
    pack_weights(mlp)
    assert not {"w_24", "packed", "packed_t"} & {*mlp.c_fc._buffers, *mlp.c_proj._buffers}


def test_dropout_falls_on_what_a_plan_gives():
    mlp = make_mlp()
    set_plan(mlp, make_plan(mlp, 64))
    mlp.dropout.p = 0.5
    x, _ = data(64)
    torch.manual_seed(0)
    y = mlp(x)
    torch.manual_seed(0)
    assert torch.equal(y, F.dropout(sparse_ffn(x, mlp.c_fc, mlp.c_proj, mlp.plan), 0.5))
    assert (y == 0).any()


@pytest.mark.parametrize("frozen", ["c_proj.weight", "c_fc.weight"])
def test_a_frozen_weight_leaves_its_bias_a_gradient(frozen):
    mlp = make_mlp(dtype=torch.float64)
    x, dy = data(64, torch.float64)
    set_plan(mlp, make_plan(mlp, 64, torch.float64))
    expected = run(mlp, x, dy)
    dict(mlp.named_parameters())[frozen].requires_grad_(False)
    got = run(mlp, x, dy)
    bias = frozen.replace("weight", "bias")
    torch.testing.assert_close(got[bias], expected[bias], rtol=1e-12, atol=1e-12)


def test_a_model_of_inference_tensors_follows_a_plan():
    with torch.inference_mode():
        mlp = make_mlp()
        set_plan(mlp, make_plan(mlp, 64))
        x, _ = data(64)
        y = mlp(x)
        set_plan(mlp, None)
        torch.testing.assert_close(y, mlp(x))


# ---------------------------------------------------------------------------------------------------------------------
# Faults that were made by hand, and that nothing above had found


@pytest.mark.parametrize("name", ["da", "dx"])
def test_one_2_4_input_gradient_is_one_too_many_for_row_wise_masks(name):
    mlp = make_mlp(recipe=RECIPES["sr_ste"])
    with pytest.raises(ValueError, match="2:4 input gradients, which mask='row' does not"):
        set_plan(mlp, make_plan(mlp, 64, mvue=False, **{name: Choice("emulated", "sm90")}))
    assert mlp.plan is None


def test_mvue_in_the_second_layer_alone_is_no_plan_without_it():
    mlp = make_mlp()
    mlp.c_fc.recipe = dataclasses.replace(FST, mvue=False)
    with pytest.raises(ValueError, match="set_plan: the plan is for gelu and mvue=False"):
        set_plan(mlp, make_plan(mlp, 64, mvue=False))


def test_a_dense_layer_is_not_timed():
    mlp = make_mlp()
    plan = make_plan(mlp, 64)
    densify(mlp)
    with pytest.raises(ValueError, match="time_ways: this layer has no 2:4 linears c_fc and c_proj"):
        ffn.time_ways(mlp, plan, None)

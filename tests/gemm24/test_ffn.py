"""gemm24/ffn.py: the FFN as one function, compared with autograd on the pruned matrices and with its separate layers.

If packed operands and dense GEMMs on pruned matrices give the same bits, every layout and transposition is right.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from planned_mlp import CHOICES, D_FF, D, assert_close, assert_equal, make_data, make_mlp, make_plan, planned, run
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from gemm24 import operands
from gemm24.ffn import pack_weights, sparse_ffn, takes_plan
from gemm24.layout import unpack24
from gemm24.plan import GEMMS, plan_ffn, set_plan
from model import ACTIVATIONS, GPT, MLP, GPTConfig
from sparse24 import RECIPES, MaskedDecayAdamW, densify, get_recipe, refresh_masks, seed_draws, sparse_linears

CPU, BF16 = torch.device("cpu"), torch.bfloat16
STE = RECIPES["ste"]
EVERY = [(name, bias) for name in ACTIVATIONS for bias in (True, False)]
PACKED = ("sm80", "sm90", "library")
FORWARD = ("z", "y", "dw1", "dw2")  # the 2:4 GEMMs under row-wise masks

pytestmark = pytest.mark.usefixtures("cslt")

# ---------------------------------------------------------------------------------------------------------------------
# The maths


@pytest.mark.parametrize(
    "tokens", [64, pytest.param(12, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow), 1]
)
@pytest.mark.parametrize(("activation", "bias"), EVERY)
def test_without_mvue_it_is_autograd_on_the_pruned_matrices(activation, bias, tokens):
    mlp = make_mlp(activation, bias, STE, torch.float64)
    x, dy = make_data(tokens, torch.float64)

    def reference(x):
        w1, w2 = (
            w * layer.mask + (w - w.detach()) * ~layer.mask for layer in (mlp.c_fc, mlp.c_proj) for w in [layer.weight]
        )
        return F.linear(ACTIVATIONS[activation](F.linear(x, w1, mlp.c_fc.bias)), w2, mlp.c_proj.bias)

    expected = run(mlp, x, dy, reference)
    assert len(expected) == (6 if bias else 4)
    assert_close(run(planned(mlp, tokens, torch.float64), x, dy), expected)


@pytest.mark.parametrize(("activation", "bias"), EVERY)
def test_with_mvue_it_draws_as_the_layers_do(activation, bias):
    mlp = make_mlp(activation, bias, dtype=torch.float64)
    x, dy = make_data(96, torch.float64, batch=3)
    got = run(planned(mlp, 96, torch.float64), x, dy)
    assert_close(got, run(mlp, x, dy))
    without = run(planned(make_mlp(activation, bias, STE, torch.float64), 96, torch.float64), x, dy)
    assert not torch.allclose(without["c_fc.weight"], got["c_fc.weight"], rtol=1e-3)
    if bias:  # bias gradients are sums of unpruned gradients
        torch.testing.assert_close(without["c_fc.bias"], got["c_fc.bias"])


@pytest.mark.parametrize("name", ["sr_ste", "step"])
def test_row_wise_methods_compute_as_their_layers_do(name):
    mlp = make_mlp(recipe=get_recipe(name), dtype=torch.float64)
    x, dy = make_data(96, torch.float64, batch=3)
    assert_close(run(planned(mlp, 96, torch.float64), x, dy), run(mlp, x, dy))


@pytest.mark.parametrize("prune_again", [False, True])
@pytest.mark.parametrize("gradient", ["straight", "true"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_soft_weights_get_the_gradient_of_their_layers(activation, gradient, prune_again):
    recipe = dataclasses.replace(RECIPES["s_ste"], weight_gradient=gradient)
    mlp = make_mlp(activation, True, recipe, torch.float64)
    mlp.c_fc.prune_again = mlp.c_proj.prune_again = prune_again
    x, dy = make_data(64, torch.float64)
    expected = run(mlp, x, dy)
    assert_close(run(planned(mlp, 64, torch.float64), x, dy), expected)
    straight = make_mlp(activation, True, dataclasses.replace(recipe, weight_gradient="straight"), torch.float64)
    plain = run(straight, x, dy)["c_fc.weight"]
    assert torch.equal(plain, expected["c_fc.weight"]) == (gradient == "straight")


@pytest.mark.parametrize("order", ["masked", "sm80", "sm90"])
@pytest.mark.parametrize("recipe", ["fst", "sr_ste", "s_ste"])
def test_weights_packed_in_each_pass_give_the_bits_of_weights_packed_once(recipe, order):
    """As under FSDP: nothing stays packed, and no pack_weights is needed after a change."""
    packed = make_mlp(recipe=recipe)
    gemms = GEMMS if recipe == "fst" else FORWARD if packed.c_fc.recipe.mvue else ("z", "y")
    repacked = copy.deepcopy(packed)
    repacked.c_fc.prune_again = repacked.c_proj.prune_again = True
    packed, repacked = (planned(mlp, 64, BF16, order, gemms) for mlp in (packed, repacked))
    x, dy = make_data(64)
    for _ in range(2):
        with torch.autocast("cpu", BF16):
            assert_equal(run(repacked, x, dy.to(BF16)), run(packed, x, dy.to(BF16)))
        assert all(repacked.c_fc._buffers.get(name) is None for name in ("w_24", "packed", "packed_t"))
        for mlp in (packed, repacked):
            step(mlp)
        pack_weights(packed)


@pytest.mark.parametrize("recipe", ["fst", "sr_ste", "s_ste", "bi_mask"])
def test_layers_that_prune_again_give_the_same_gradients(recipe):
    mlp = make_mlp(recipe=recipe)
    repacked = copy.deepcopy(mlp)
    repacked.c_fc.prune_again = repacked.c_proj.prune_again = True
    x, dy = make_data(64)
    assert_equal(run(repacked, x, dy), run(mlp, x, dy))


def test_the_seed_decides_the_draw_and_may_change_before_the_backward():
    mlp = planned(make_mlp(dtype=torch.float64), 64, torch.float64)
    x, dy = make_data(64, torch.float64)
    first = run(mlp, x, dy)

    def forward(x):
        y = MLP.forward(mlp, x)
        seed_draws(mlp, 9, 9, 9)
        return y

    assert_equal(run(mlp, x, dy, forward), first)
    other = run(mlp, x, dy)
    assert torch.equal(other["dx"], first["dx"])
    assert not torch.equal(other["c_fc.weight"], first["c_fc.weight"])
    assert not torch.equal(other["c_proj.weight"], first["c_proj.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# The layouts, through the packed bytes


def assert_bits_of_pruned_matrices(mlp, tokens, *args, **choices):
    """The plan of make_plan(mlp, tokens, BF16, ...) computes the same bits as dense GEMMs on pruned matrices."""
    x, dy = make_data(tokens, BF16)
    packed = planned(mlp, tokens, BF16, *args, **choices)
    assert_equal(run(packed, x, dy), run(planned(mlp, tokens, BF16), x, dy))
    return packed


@pytest.mark.parametrize("order", PACKED)
@pytest.mark.parametrize(("activation", "bias"), EVERY)
def test_packed_operands_give_the_bits_of_the_pruned_matrices(activation, bias, order):
    packed = assert_bits_of_pruned_matrices(make_mlp(activation, bias, dtype=BF16), 128, order)
    assert (packed.c_fc.w_24 is None) == (order != "library")  # the library's converter reads the pruned matrix


@pytest.mark.parametrize("order", PACKED)
@pytest.mark.parametrize("name", ["sr_ste", "s_ste"])
def test_row_wise_and_soft_operands_are_packed_for_the_forward_alone(name, order):
    mlp = make_mlp(recipe=get_recipe(name))
    x, dy = make_data(64, BF16)
    packed = planned(mlp, 64, BF16, order, FORWARD if get_recipe(name).mvue else ("z", "y"))
    masked = planned(mlp, 64, BF16)
    for _ in range(2):
        results = []
        for mlp in (packed, masked):
            with torch.autocast("cpu", BF16):
                results.append(run(mlp, x, dy))
            with torch.no_grad():
                for layer in (mlp.c_fc, mlp.c_proj):
                    layer.weight.add_(torch.roll(layer.weight, 1, 1))
            refresh_masks(mlp)
            pack_weights(mlp)
        assert_equal(*results)
    assert packed.c_fc.packed is not None
    assert packed.c_fc.packed_t is None


@pytest.mark.parametrize(
    ("tokens", "gemms"), [*((n, GEMMS) for n in (100, 37, 1)), (12, ("dw1",)), (12, ("dw2",))], ids=str
)
def test_packed_operands_of_an_odd_number_of_tokens(tokens, gemms):
    """They are padded to 64, which changes MVUE's draws, so compare with an unpacked plan that is padded by hand."""
    mlp = make_mlp("geglu", dtype=BF16)
    x, dy = make_data(tokens, BF16)
    packed = planned(mlp, tokens, BF16, "sm90", gemms)
    padding = -tokens % 64
    assert packed.plan.padding == padding
    expected = run(planned(mlp, tokens + padding, BF16), F.pad(x, (0, 0, 0, padding)), F.pad(dy, (0, 0, 0, padding)))
    assert_equal(run(packed, x, dy), expected | {name: expected[name][:, :tokens] for name in ("y", "dx")})


@pytest.mark.parametrize("gemms", [*GEMMS, "z+y", "dx+dw2", "z+dx", "y+da"])
@pytest.mark.parametrize("order", ["sm90", "library"])
def test_any_of_the_gemms_may_be_dense(gemms, order):
    assert_bits_of_pruned_matrices(make_mlp("swiglu", dtype=BF16), 64, order, gemms.split("+"))


@pytest.mark.parametrize(("z", "dx"), [("sm80", "library"), ("library", "sm80")])
def test_two_packers_may_share_a_weight(z, dx):
    assert_bits_of_pruned_matrices(make_mlp(dtype=BF16), 64, z=CHOICES[z], dx=CHOICES[dx])


@pytest.mark.parametrize("order", ["masked", "sm90"])
def test_gradients_may_come_in_any_strides(order):
    mlp = planned(make_mlp(dtype=BF16), 64, BF16, order)
    x, dy = make_data(64, BF16)
    for strided in (torch.ones((), dtype=dy.dtype).expand_as(dy), dy.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_equal(run(mlp, x, strided), run(mlp, x, strided.contiguous()))


# ---------------------------------------------------------------------------------------------------------------------
# Weights are packed once per step, and stale operands are refused


def step(mlp):
    """As an optimizer, change a weight in place."""
    with torch.no_grad():
        mlp.c_fc.weight.mul_(2)


@pytest.mark.parametrize("change", [step, lambda mlp: mlp.load_state_dict(mlp.state_dict()), refresh_masks])
@pytest.mark.parametrize("order", ["masked", "sm90", "library"])
def test_stale_operands_are_refused_until_they_are_packed_again(order, change):
    mlp = planned(make_mlp(dtype=BF16), 64, BF16, order)
    x, dy = make_data(64, BF16)
    change(mlp)
    with pytest.raises(RuntimeError, match=r"weights or masks changed .*; call pack_weights"):
        mlp(x)
    pack_weights(mlp)
    assert_equal(run(mlp, x, dy), run(planned(mlp, 64, BF16, order), x, dy))


@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
@pytest.mark.parametrize("part", ["weight", "index", "another weight"])
def test_stale_operands_of_either_layer_are_refused(name, part):
    mlp = planned(make_mlp(), 64)
    layer = getattr(mlp, name)
    before = layer.weight  # a reference, so that another weight gets another id
    if part == "another weight":  # with the same version
        layer.weight = torch.nn.Parameter(-before.detach())
        while layer.weight._version < before._version:
            layer.weight.detach().add_(0)
    else:
        getattr(layer, part).detach().add_(0)
    with pytest.raises(RuntimeError, match="call pack_weights"):
        mlp(torch.randn(64, D))
    unpacked = make_mlp()
    with pytest.raises(RuntimeError, match="call pack_weights"):
        sparse_ffn(torch.randn(8, D), unpacked.c_fc, unpacked.c_proj, make_plan(unpacked, 8))


@pytest.mark.parametrize("first", ["sm90", pytest.param("sm80", marks=pytest.mark.slow), "library", "masked"])
@pytest.mark.parametrize("then", ["sm90", pytest.param("sm80", marks=pytest.mark.slow), "library", "masked"])
def test_a_plan_may_follow_another(first, then):
    """The metadata of one order must not be left in the buffers of the next."""
    mlp = make_mlp(dtype=BF16)
    x, dy = make_data(64, BF16)
    expected = run(planned(mlp, 64, BF16), x, dy)
    for order in (first, then):
        set_plan(mlp, make_plan(mlp, 64, BF16, order))
    assert_equal(run(mlp, x, dy), expected)


def test_metadata_is_written_if_mask_order_or_buffer_changed(monkeypatch):
    calls, pack = [], operands.pack_weight_

    def spy(packed, packed_t, w, index, order, metadata):
        """With metadata=False, leaves metadata as the kernel does and the specification does not."""
        calls.append(metadata)
        before = [buffer[w.numel() // 2 :].clone() for buffer in (packed, packed_t)]
        pack(packed, packed_t, w, index, order)
        for buffer, old_metadata in zip((packed, packed_t), before, strict=True):
            if not metadata:
                buffer[w.numel() // 2 :] = old_metadata

    monkeypatch.setattr(operands, "pack_weight_", spy)
    mlp = make_mlp(dtype=BF16)
    x, dy = make_data(64, BF16)
    expected = run(planned(mlp, 64, BF16), x, dy)
    for order in ("sm90", "sm80", "sm90"):
        set_plan(mlp, make_plan(mlp, 64, BF16, order))
        assert_equal(run(mlp, x, dy), expected)
    assert calls == [True] * 6
    step(mlp)
    pack_weights(mlp)
    refresh_masks(mlp)
    pack_weights(mlp)
    assert calls[6:] == [False, False, True, True]
    set_plan(mlp, make_plan(mlp, 64, torch.float16, "sm90"))  # new, empty buffers
    assert calls[10:] == [True, True]


def buffers(mlp) -> set[str]:
    return {"w_24", "packed", "packed_t"} & {*mlp.c_fc._buffers, *mlp.c_proj._buffers}


def test_operands_stay_in_place_and_are_freed_after_the_sparse_phase():
    mlp = planned(make_mlp(dtype=BF16), 64, BF16, "sm90")
    address = mlp.c_fc.packed.data_ptr()
    assert "packed" not in str(mlp.state_dict().keys())
    pack_weights(mlp)
    assert mlp.c_fc.packed.data_ptr() == address
    x, dy = make_data(64, BF16)
    for layer in sparse_linears(mlp):
        layer.sparse = False
    assert not takes_plan(mlp.plan, x, mlp.c_fc, mlp.c_proj)
    dense = run(mlp, x, dy)
    pack_weights(mlp)
    assert not buffers(mlp)
    assert_equal(run(mlp, x, dy), dense)
    for layer in sparse_linears(mlp):
        layer.sparse = True
    with pytest.raises(RuntimeError, match="call pack_weights"):
        mlp(x)
    set_plan(mlp, None)
    mlp(x)


@pytest.mark.parametrize("order", ["masked", "sm90", "library"])
@pytest.mark.parametrize("one_dense_layer", [False, True])
def test_operands_are_freed_without_a_plan_or_with_one_dense_layer(order, one_dense_layer):
    mlp = planned(make_mlp(dtype=BF16), 64, BF16, order)
    assert len(buffers(mlp)) == 3
    if one_dense_layer:
        mlp.c_proj.sparse = False
        pack_weights(mlp)
    else:
        set_plan(mlp, None)
    assert not buffers(mlp)


def test_a_model_that_was_cast_is_packed_again():
    """A cast converts the metadata of a packed buffer as if it were numbers."""
    mlp = planned(make_mlp(bias=False), 64, BF16, "sm90")
    mlp.to(torch.float64)
    with pytest.raises(RuntimeError, match="call pack_weights"):
        mlp(make_data(64, BF16)[0])
    pack_weights(mlp)
    w_24 = (mlp.c_fc.weight * mlp.c_fc.mask).to(BF16)
    assert torch.equal(unpack24(mlp.c_fc.packed, *w_24.shape, "sm90"), w_24)
    assert torch.equal(unpack24(mlp.c_fc.packed_t, *w_24.t().shape, "sm90"), w_24.t())


# ---------------------------------------------------------------------------------------------------------------------
# Use in a model


def test_a_plan_holds_for_its_tokens_and_dtype_in_the_sparse_phase():
    mlp = make_mlp()
    plan, x = make_plan(mlp, 64), torch.randn(2, 32, D)
    takes = lambda plan, x: takes_plan(plan, x, mlp.c_fc, mlp.c_proj)  # noqa: E731
    assert takes(plan, x)
    assert not takes(None, x)
    assert not takes(plan, x[:, :31])
    assert not takes(plan, x.double())
    with torch.autocast("cpu", BF16):
        assert not takes(plan, x)
        assert takes(plan._replace(dtype=BF16), x)
        assert takes(plan._replace(dtype=torch.float64), x.double())  # autocast does not change float64
        assert not takes(plan._replace(dtype=BF16), x.double())
    mlp.c_proj.sparse = False
    assert not takes(plan, x)
    densify(mlp)
    assert not takes(plan, x)


def test_autocast_multiplies_in_its_dtype_and_keeps_master_gradients():
    mlp = planned(make_mlp("geglu"), 64, BF16, "sm90")
    low = planned(make_mlp("geglu", dtype=BF16), 64, BF16, "sm90")
    x, dy = make_data(64)
    with torch.autocast("cpu", BF16):
        got = run(mlp, x, dy.to(BF16))
    assert got["y"].dtype == BF16
    assert {got[name].dtype for name in got if name != "y"} == {torch.float32}
    expected = run(low, x.to(BF16), dy.to(BF16))
    assert_equal(got, {name: tensor.to(got[name].dtype) for name, tensor in expected.items()})


def test_gradients_accumulate_and_frozen_parameters_get_none():
    mlp = planned(make_mlp(dtype=torch.float64), 64, torch.float64)
    x, dy = make_data(64, torch.float64)
    once = run(mlp, x, dy)
    mlp(x).backward(dy)
    torch.testing.assert_close(mlp.c_fc.weight.grad, 2 * once["c_fc.weight"])
    for frozen in (["c_fc.weight"], ["c_proj.weight"], ["c_fc.weight", "c_fc.bias"], ["c_proj.weight", "c_proj.bias"]):
        for name, p in mlp.named_parameters():
            p.requires_grad_(name not in frozen)
        got = run(mlp, x, dy)
        assert [name for name in got if got[name] is None] == frozen
        got = {name: tensor for name, tensor in got.items() if tensor is not None}
        assert_close(got, {name: once[name] for name in got})


def test_activation_checkpointing_gives_the_same_gradients():
    mlp = planned(make_mlp("swiglu"), 64)
    x, dy = make_data(64)
    assert_equal(run(mlp, x, dy, lambda x: checkpoint(mlp, x, use_reentrant=False)), run(mlp, x, dy))


def test_evaluation_changes_no_state():
    mlp = planned(make_mlp(), 64)
    x, _ = make_data(64)
    state = copy.deepcopy(mlp.state_dict())
    with torch.no_grad():
        y = mlp(x)
    with torch.inference_mode():
        assert torch.equal(mlp(x), y)
    assert torch.equal(mlp(x), y)
    assert all(torch.equal(tensor, state[name]) for name, tensor in mlp.state_dict().items() if torch.is_tensor(tensor))
    with torch.inference_mode():  # a model of inference tensors follows a plan too
        mlp = planned(make_mlp(), 64)
        x, _ = make_data(64)
        y = mlp(x)
        set_plan(mlp, None)
        torch.testing.assert_close(y, mlp(x))


def test_dropout_is_applied_to_the_output():
    mlp = planned(make_mlp(), 64)
    mlp.dropout.p = 0.5
    x, _ = make_data(64)
    torch.manual_seed(0)
    y = mlp(x)
    torch.manual_seed(0)
    assert torch.equal(y, F.dropout(sparse_ffn(x, mlp.c_fc, mlp.c_proj, mlp.plan), 0.5))
    assert (y == 0).any()


def test_no_activation_is_saved_for_the_backward():
    mlp, saved = planned(make_mlp(), 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        mlp(torch.randn(64, D, requires_grad=True))
    assert saved.count((D_FF, 64)) == 1  # Z, not A


@pytest.mark.slow
@pytest.mark.parametrize("order", ["masked", "sm90"])
def test_it_compiles_as_one_graph(order):
    mlp = planned(make_mlp("geglu", dtype=BF16), 64, BF16, order)
    x, dy = make_data(64, BF16)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_equal(run(mlp, x, dy, compiled), run(mlp, x, dy))
    step(mlp)
    pack_weights(mlp)  # compiled code must read the new operands
    assert_equal(run(mlp, x, dy, compiled), run(mlp, x, dy))


specified_activation = operands.activation.torch  # the test below replaces operands.activation


@torch.library.custom_op("nano24_tests::activation", mutates_args=())
def opaque_activation(z: torch.Tensor, activation: str, recompute: bool = False) -> torch.Tensor:
    """As the activation's kernel, opaque to the compiler."""
    return specified_activation(z, activation)


@opaque_activation.register_fake
def _(z, activation, recompute=False):
    return torch.empty_like(z)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_the_compiler_saves_no_activation(monkeypatch, recompute):
    """It merges equal calls of an op and saves the result for the backward. The argument `recompute` prevents that."""
    equal_calls = lambda z, activation, recompute=False: opaque_activation(z, activation)  # noqa: E731
    mlp = planned(make_mlp(bias=False), 64)
    x, dy = make_data(64)
    monkeypatch.setattr(operands, "activation", opaque_activation if recompute else equal_calls)
    forwards, backwards = [], []

    def graph_of(into):
        def compiler(graph, inputs):
            nodes = list(graph.graph.nodes)
            into.append((nodes, sum("nano24_tests" in str(node.target) for node in nodes)))
            return make_boxed_func(graph.forward)

        return compiler

    options = {"fw_compiler": graph_of(forwards), "bw_compiler": graph_of(backwards)}
    backend = aot_autograd(**options, partition_fn=min_cut_rematerialization_partition)
    expected = run(mlp, x, dy)
    got = run(mlp, x, dy, torch.compile(mlp, backend=backend, fullgraph=True))
    assert all(torch.allclose(got[name], tensor) for name, tensor in expected.items())
    ((nodes, in_forward),), ((_, in_backward),) = forwards, backwards
    shapes = [tuple(node.meta["val"].shape) for node in nodes[-1].args[0] if hasattr(node, "meta")]
    hidden = sum(shape in ((D_FF, 64), (64, D_FF)) for shape in shapes)
    assert (in_forward, in_backward, hidden) == ((1, 1, 1) if recompute else (1, 0, 2))


def test_a_gpt_trains_alike_with_and_without_a_plan():
    """Ten steps in float64, with refreshes and the switch to dense."""
    config = GPTConfig(block_size=32, vocab_size=17, n_layer=2, n_head=2, n_embd=64, sparse="fst")

    def losses(spmm):
        torch.manual_seed(0)
        model = GPT(config).double()
        plan, _ = plan_ffn(config, 2 * 32, CPU, torch.float64, spmm)
        set_plan(model, plan)
        assert (model.transformer.h[0].mlp.plan is None) == (spmm == "dense")
        optimizer = MaskedDecayAdamW(model.parameters(), model, lr=1e-2, masked_decay=1e-3)
        curve = []
        for iter_num in range(10):
            for layer in sparse_linears(model):
                layer.sparse = iter_num < 7
            idx = torch.arange(iter_num, iter_num + 64).remainder(17).view(2, 32)
            seed_draws(model, 0, iter_num, 0)
            loss = model(idx, idx.roll(1, 1))[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if iter_num % 3 == 2:
                refresh_masks(model, measure=False)
            pack_weights(model)
            curve.append(loss.item())
        return curve

    dense, masked = losses("dense"), losses("masked")
    assert dense[-1] < dense[0]
    assert masked == pytest.approx(dense, rel=1e-9)

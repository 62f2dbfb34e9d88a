"""gemm24/plan.py: the GEMMs of a feed-forward layer, plans that fit a model, and the timing of a layer."""

import copy
import dataclasses

import pytest
import torch
from planned_mlp import D_FF, D, assert_equal, make_data, make_mlp, make_plan, planned, run

import sparse24
from gemm24 import ffn
from gemm24 import plan as planning
from gemm24.choose import Report
from gemm24.ffn import takes_plan
from gemm24.matmul import Choice
from gemm24.plan import GEMMS, FFNPlan, ffn_gemms, plan_ffn, set_phase, set_plan, time_ways
from methods import act24
from model import GPT, MLP, GPTConfig
from sparse24 import RECIPES, densify, get_recipe, sparsify

CPU, BF16 = torch.device("cpu"), torch.bfloat16
EMULATED = Choice("emulated", "sm90")


def make_config(n_embd=D, **options) -> GPTConfig:
    return GPTConfig(n_embd=n_embd, n_head=1, n_layer=1, **options)


def joined(mlp: MLP) -> MLP:
    set_phase(mlp, sparse=True)
    return mlp


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_gemms_have_the_shapes_that_the_function_multiplies(monkeypatch, activation):
    seen, multiply = [], ffn.matmul24

    def spy(a, b, bias, rows, transposed, choice):
        column_major = b.stride(0) == 1 and b.shape[0] > 1
        seen.append((rows, b.shape[1], b.shape[0], column_major, transposed, bias is not None))
        return multiply(a, b, bias, rows, transposed, choice)

    monkeypatch.setattr(ffn, "matmul24", spy)
    mlp = planned(make_mlp(activation), 192)
    run(mlp, *make_data(192))
    gemms = ffn_gemms(D, mlp.c_proj.in_features, 192, activation, True)
    assert sorted(seen) == sorted(gemm[1:7] for gemm in gemms.values())
    assert [gemm.name for gemm in gemms.values() if gemm.fresh] == ["dw1", "dw2"]
    assert [*gemms] == list(GEMMS) == [gemm.name for gemm in gemms.values()]
    assert ffn_gemms(D, D_FF, 65, "gelu", True)["dw1"].k == 128


@pytest.mark.parametrize("name", ["act24", "act24_soft"])
@pytest.mark.parametrize("mvue", [True, False])
def test_gemms_of_2_4_activations_have_the_shapes_that_the_function_multiplies(monkeypatch, name, mvue):
    """d = 128, d_ff = 256, 192 tokens. X, Y, dX are (192, d), Z and A (192, d_ff), W1 (d_ff, d), W2 (d, d_ff)."""
    seen, multiply = {}, act24.matmul24

    def spy(a, b, bias, rows, transposed, choice):
        assert choice.backend == ("emulated" if a.dim() == 1 else "masked")
        seen[len(seen)] = (rows, b.shape[1], b.shape[0], b.stride(0) == 1, transposed, bias is not None, a.dim())
        return multiply(a, b, bias, rows, transposed, choice)

    monkeypatch.setattr(act24, "matmul24", spy)
    recipe = dataclasses.replace(get_recipe(name), mvue=mvue)
    mlp = joined(make_mlp("relu2", recipe=recipe, dtype=BF16))
    plan, _ = plan_ffn(make_config(activation="relu2", ffn_ratio=2.0), 192, CPU, BF16, "emulated", recipe)
    set_plan(mlp, plan)
    run(mlp, *make_data(192, BF16))
    soft = name == "act24_soft"
    by_hand = {  # in the order of the calls: rows, columns, K, B column-major, result transposed, bias
        "z": (256, 192, 128, True, True, True), "y": (192, 128, 256, not soft, False, False),
        "dw2": (256, 128, 192, False, True, False), "da": (256, 192, 128, True, True, False),
        "dw1": (256, 128, 192, False, False, False), "dx": (192, 128, 256, False, False, False),
    }  # fmt: skip
    assert [multiplied[:6] for multiplied in seen.values()] == [*by_hand.values()]
    packed = [product for product, multiplied in zip(by_hand, seen.values(), strict=True) if multiplied[6] == 1]
    gemms = ffn_gemms(D, D_FF, 192, "relu2", True, recipe)
    assert {name: gemm[1:7] for name, gemm in gemms.items()} == {name: by_hand[name] for name in packed}
    assert set(packed) == {"y", "dx"} | ({"z", "da"} if soft else set()) | ({"dw1", "dw2"} if mvue else set())
    assert {name for name, gemm in gemms.items() if gemm.repacked} == {"z", "da"} & {*packed}
    assert all(gemm.fresh != gemm.repacked for gemm in gemms.values())


@pytest.mark.parametrize("name", ["act24", "act24_soft"])
@pytest.mark.parametrize("tokens", [128, 50])
def test_packed_activations_give_the_bits_of_pruned_ones(name, tokens):
    mlp = joined(make_mlp("relu2", recipe=get_recipe(name), dtype=BF16))
    results = []
    for spmm, sharded in (("emulated", False), ("masked", False), ("emulated", True), ("masked", True)):
        mlp.c_fc.prune_again = mlp.c_proj.prune_again = sharded  # FSDP frees the weights after the forward
        plan, _ = plan_ffn(make_config(activation="relu2", ffn_ratio=2.0), tokens, CPU, BF16, spmm, mlp.c_fc.recipe)
        set_plan(mlp, plan)
        assert mlp.plan.padding == (-tokens % (64 if spmm == "emulated" else 4))
        results.append(run(mlp, *make_data(tokens, BF16)))
        assert mlp.c_fc.packed_from is None
        assert "w_24" not in mlp.c_fc._buffers  # these weights are not packed for the model
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize(
    ("name", "mvue", "expected"),
    [("fst", True, set(GEMMS)), ("fst", False, {"z", "y", "da", "dx"}), ("s_ste", True, {"z", "y", "dw1", "dw2"}),
     ("sr_ste", False, {"z", "y"}), ("act24", True, {"y", "dx", "dw1", "dw2"}), ("act24", False, {"y", "dx"}),
     ("act24_soft", True, set(GEMMS)), ("act24_soft", False, {"z", "y", "da", "dx"})],
)  # fmt: skip
def test_only_gemms_that_the_recipe_makes_2_4_are_measured(name, mvue, expected):
    recipe = dataclasses.replace(get_recipe(name), mvue=mvue)
    assert set(ffn_gemms(D, D_FF, 64, "relu2", True, recipe)) == expected
    plan, _ = plan_ffn(make_config(), 64, CPU, BF16, "emulated", recipe)
    assert {name for name in GEMMS if getattr(plan, name).backend == "emulated"} == expected


def test_plans_of_the_modes():
    config = make_config(activation="relu2", bias=False)
    for spmm in ("auto", "dense"):  # on a CPU no 2:4 GEMM wins
        plan, report = plan_ffn(config, 64, CPU, BF16, spmm)
        assert plan is None
        assert set(report.choices.values()) == {Choice()}
    plan, _ = plan_ffn(config, 64, CPU, torch.float32, "masked", RECIPES["ste"])
    assert plan == FFNPlan("relu2", 64, torch.float32, False, *[Choice()] * 6)
    plan, _ = plan_ffn(config, 50, CPU, BF16, "emulated")
    assert (plan[4:], plan.padding) == ((EMULATED,) * 6, 14)
    plan, _ = plan_ffn(make_config(96), 64, CPU, BF16, "emulated")  # 96 is no multiple of 64
    assert plan[4:] == (Choice(),) * 4 + (EMULATED, Choice())
    plan, _ = plan_ffn(make_config(64, activation="geglu"), 64, CPU, BF16, "emulated")  # d_ff = 172
    assert plan[4:] == (Choice(),) * 6
    for spmm, message in (("cusparselt", "needs an NVIDIA GPU"), ("fast", "need one of auto, dense, masked")):
        with pytest.raises(ValueError, match=message):
            plan_ffn(config, 64, CPU, BF16, spmm)


def test_one_sparse_gemm_makes_a_plan_and_options_reach_choose(monkeypatch, tmp_path):
    calls, sparse = [], Choice("cusparselt", "sm90", 3)

    def choose(gemms, device, mode, **options):
        calls.append((mode, options))
        return Report({name: sparse if name == "dx" else Choice() for name in gemms}, [], [])

    monkeypatch.setattr(planning, "choose", choose)
    options = {"graph": True, "cache": tmp_path, "known": [{"key": "k"}]}
    plan, _ = plan_ffn(make_config(), 64, CPU, BF16, **options)
    assert plan[4:] == (Choice(), Choice(), Choice(), sparse, Choice(), Choice())
    assert calls == [("auto", {"dtype": BF16, **options})]


# ---------------------------------------------------------------------------------------------------------------------
# Plans that do not fit the model


def test_plans_of_another_activation_or_recipe_are_refused():
    mlp = make_mlp(recipe=RECIPES["ste"])
    for fields in ({"activation": "relu2"}, {"mvue": True}):
        message = r"set_plan: the plan is for .* need this model's gelu and mvue=False; make"
        with pytest.raises(ValueError, match=message):
            set_plan(mlp, make_plan(mlp, 64, **fields))
        assert mlp.plan is None
    mlp = make_mlp()
    mlp.c_fc.recipe = dataclasses.replace(RECIPES["fst"], mvue=False)  # the second layer keeps MVUE
    with pytest.raises(ValueError, match="set_plan: the plan is for gelu and mvue=False"):
        set_plan(mlp, make_plan(mlp, 64))


@pytest.mark.parametrize("recipe", [get_recipe("bi_mask"), dataclasses.replace(RECIPES["fst"], fp8=True)])
def test_recipes_that_one_function_cannot_compute_get_no_plan(recipe):
    mlp = make_mlp(recipe=recipe)
    with pytest.raises(ValueError, match="goes layer by layer; use no plan"):
        set_plan(mlp, make_plan(mlp, 64))


@pytest.mark.parametrize("name", ["sr_ste", "s_ste"])
@pytest.mark.parametrize("gemms", [GEMMS, ("da",), ("dx",)])
def test_2_4_input_gradients_need_transposable_masks(name, gemms):
    mlp = make_mlp(recipe=RECIPES[name])
    with pytest.raises(ValueError, match=f"the plan has a 2:4 d[ax], need z y.* for recipe '{name}'; .*recipe=recipe"):
        set_plan(mlp, make_plan(mlp, 64, order="sm90", gemms=gemms))
    assert mlp.plan is None


def test_dense_weights_have_no_packed_form():
    mlp = make_mlp("relu2", recipe=get_recipe("act24"))
    for gemm in ("z", "da"):
        message = f"the plan has a 2:4 {gemm}, need y dx dw1 dw2 for recipe 'act24'; make it with plan_ffn"
        with pytest.raises(ValueError, match=message):
            set_plan(mlp, make_plan(mlp, 64, order="sm90", gemms=(gemm,)))
    set_plan(mlp, make_plan(mlp, 64, order="sm90", gemms=("y", "dx", "dw1", "dw2")))
    assert not takes_plan(mlp.plan, torch.randn(64, D), mlp.c_fc, mlp.c_proj)  # act24_ffn follows it, not sparse_ffn
    mlp.c_fc.recipe = dataclasses.replace(mlp.c_fc.recipe, activations24=False)  # as vnm, which follows no plan
    with pytest.raises(ValueError, match="goes layer by layer; use no plan"):
        set_plan(mlp, make_plan(mlp, 64))


def test_modules_without_two_sparse_layers_get_no_plan():
    mlp, other = make_mlp(), torch.nn.Module()
    other.plan, other.activation, other.mlp = "mine", "gelu", mlp
    set_plan(other, make_plan(mlp, 64))
    assert other.plan == "mine"
    assert mlp.plan is not None
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, bias=True))
    set_plan(model, make_plan(mlp, 8))
    assert model.transformer.h[0].mlp.plan is None
    for only in ("c_fc", "c_proj"):
        dense = MLP(make_config())
        sparsify(dense, RECIPES["fst"], [only])
        set_plan(dense, make_plan(mlp, 64))
        assert dense.plan is None
        assert dense(torch.randn(64, D)).shape == (64, D)


# ---------------------------------------------------------------------------------------------------------------------
# Timing a layer


@pytest.mark.parametrize("fastest", ["dense", "layers", "plan"])
@pytest.mark.parametrize("micro_steps", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_layer_is_timed_each_way(monkeypatch, fastest, micro_steps):
    """The fastest way takes 1 us, the others 2 us. Packing takes 1.5 us, shared by the plan's micro-steps."""
    mlp, ways = make_mlp(), []
    before = copy.deepcopy(mlp.state_dict())
    for way, function in (("plan", ffn._SparseFFN), ("layers", sparse24._MaskedLinear)):
        real = function.apply
        monkeypatch.setattr(function, "apply", lambda *args, way=way, real=real: ways.append(way) or real(*args))
    pack = planning.pack_weights
    monkeypatch.setattr(planning, "pack_weights", lambda model: ways.append("packing") or pack(model))

    def clock(calls, repetitions, graph, device):
        assert not graph  # on a CPU there is none
        samples = []
        for call in calls:
            ways.clear()
            call()
            us = 1.5 if ways[:1] == ["packing"] else 1.0 if (ways or ["dense"])[0] == fastest else 2.0
            samples.append([us + 0.01 * i for i in range(repetitions)])
        return samples

    monkeypatch.setattr(planning, "time_interleaved", clock)
    times = time_ways(mlp, make_plan(mlp, 64, BF16), None, micro_steps)
    expected = {way: (1.04 if way == fastest else 2.04) + (1.54 / micro_steps) * (way == "plan") for way in times["us"]}
    assert list(times["us"]) == ["dense", "layers", "plan"]
    assert {way: us[0] for way, us in times["us"].items()} == pytest.approx(expected)
    assert times["us"][fastest][2] - times["us"][fastest][1] == pytest.approx(0.08)
    assert times["taken"] == ("plan" if fastest == "plan" and micro_steps == 10 else "layers")
    report = Report({}, [], [], times)
    assert report.pays() == (expected[times["taken"]] < expected["dense"])
    assert f"taken: {times['taken']}" in report.text()
    assert times["host_us"].keys() == times["us"].keys()
    assert min(times["host_us"].values()) > 0
    assert mlp.plan is None  # copies were timed
    state = mlp.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items() if torch.is_tensor(tensor))


@pytest.mark.parametrize("name", ["act24", "act24_soft"])
def test_a_layer_with_2_4_activations_is_timed_after_it_has_joined(monkeypatch, name):
    """A microsecond, one more for each packed product, and ten more if the layer is dense."""
    mlp, packed = make_mlp("relu2", recipe=get_recipe(name)), []
    multiply = act24.matmul24
    monkeypatch.setattr(act24, "matmul24", lambda a, *rest: packed.append(a.dim() == 1) or multiply(a, *rest))
    monkeypatch.setattr(act24.Act24Linear, "record", lambda *_: pytest.fail("counts are no part of the layer"))

    def clock(calls, repetitions, graph, device):
        samples = []
        for call in calls:
            packed.clear()
            call()
            samples.append([1.0 + sum(packed) + 10.0 * (len(packed) - 6 if packed else 1)] * repetitions)
        return samples

    monkeypatch.setattr(planning, "time_interleaved", clock)
    gemms = planning.sparse_gemms(mlp.c_fc.recipe)
    times = time_ways(mlp, make_plan(mlp, 64, BF16, "sm90", gemms), None)
    assert {way: us[0] for way, us in times["us"].items()} == {"dense": 11, "layers": 1, "plan": 1 + len(gemms)}
    assert times["taken"] == "layers"
    assert not mlp.c_proj.joined  # copies were timed


def test_a_layer_that_cannot_be_captured_is_timed_without_a_graph(monkeypatch, capsys):
    def clock(calls, repetitions, graph, device):
        if graph or calls == ["broken"]:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return [[1.0] * repetitions for _ in calls]

    monkeypatch.setattr(planning, "time_interleaved", clock)
    assert planning._times(["a", "b"], True, CPU) == [[1.0] * 9] * 2
    assert "cannot be captured in a CUDA graph (RuntimeError: CUDA error: operation not" in capsys.readouterr().out
    assert planning._times(["a"], False, CPU) == [[1.0] * 9]
    assert not capsys.readouterr().out
    for graph in (False, True):
        with pytest.raises(RuntimeError, match="not permitted"):
            planning._times(["broken"], graph, CPU)


def test_a_dense_layer_is_not_timed():
    mlp = make_mlp()
    plan = make_plan(mlp, 64)
    densify(mlp)
    with pytest.raises(ValueError, match="time_ways: this layer has no 2:4 linears c_fc and c_proj"):
        time_ways(mlp, plan, None)

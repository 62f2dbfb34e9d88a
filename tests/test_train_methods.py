"""Runs of train.py with each method: phases, resuming, validation loss after pruning, flip rates and their warnings."""

import json
import re
from dataclasses import replace

import pytest
import torch
from harness import SETTINGS, differences, read_rows, read_state, row_differences, state_differences, stop_at

import methods.act24
import methods.bi_mask
import methods.step
import sample
import sparse24
import train
from runtime import checkpoint, health, ranks, setup
from sparse24 import RECIPES, expand_pairs, flip_rate, get_recipe, mask24, sste_scale, transposable_index

MAX_ITERS = SETTINGS["max_iters"]


@pytest.fixture(scope="module")
def dense(run, tmp_path_factory):
    """The folder of a dense run with flip rates of every step."""
    out = tmp_path_factory.mktemp("dense") / "out"
    run(out, sparse="none", flip_interval=1)
    return out


def as_recipe(name, **changes):
    """Settings that leave this recipe unchanged. (The harness has settings for fst.)"""
    recipe = get_recipe(name)
    fields = ("mask_interval", "masked_decay", "mvue", "dense_finetune")
    return {"sparse": name, **{field: getattr(recipe, field) for field in fields}, "dense_start": -1, **changes}


def phases(out):
    return [row["phase"] for row in read_rows(out)]


FIRST_AND_LAST = as_recipe("fst", dense_pretrain=0.25, mask_interval=5, masked_decay=1e-2)


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        (as_recipe("sr_ste"), 5),
        (as_recipe("step"), 17),
        (as_recipe("bi_mask"), 28),
        (as_recipe("s_ste"), 5),
        pytest.param(as_recipe("s_ste"), 17, marks=pytest.mark.slow),  # simulated FP8
        pytest.param(FIRST_AND_LAST, 28, marks=pytest.mark.slow),
        pytest.param(as_recipe("step"), 5, marks=pytest.mark.slow),
    ],
    ids=lambda value: value["sparse"] if isinstance(value, dict) else str(value),
)
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(run, tmp_path, monkeypatch, settings, stop):
    monkeypatch.setattr(methods.bi_mask, "SEARCH_INTERVAL", 4)
    monkeypatch.setitem(RECIPES, "s_ste", replace(RECIPES["s_ste"], fp8=stop == 17))
    settings = settings | {"flip_interval": 3}
    run(tmp_path / "whole", **settings)
    run(tmp_path / "parts", stop_at(stop), **settings)
    assert read_state(tmp_path / "parts")["iter_num"] == stop + 1
    run(tmp_path / "parts", **settings)
    assert state_differences(read_state(tmp_path / "parts"), read_state(tmp_path / "whole")) == []
    assert row_differences(read_rows(tmp_path / "parts"), read_rows(tmp_path / "whole")) == []


def test_dense_start_and_dense_end_take_their_shares(run, tmp_path):
    run(tmp_path / "out", **FIRST_AND_LAST)
    assert phases(tmp_path / "out") == ["dense"] * 8 + ["sparse"] * 19 + ["dense"] * 6
    assert [row["masked_decay"] for row in read_rows(tmp_path / "out")] == [None] * 8 + [1e-2] * 19 + [None] * 6
    assert read_state(tmp_path / "out")["sparse_start"] == 8


@pytest.mark.slow
def test_the_dense_start_of_a_sparse_run_is_the_dense_run(run, dense, tmp_path):
    run(tmp_path / "out", **FIRST_AND_LAST, flip_interval=1)
    pairs = list(zip(read_rows(tmp_path / "out"), read_rows(dense), strict=True))
    assert all(a["train_loss"] == b["train_loss"] and a["flip_rate"] == b["flip_rate"] for a, b in pairs[:8])
    assert pairs[9][0]["train_loss"] != pairs[9][1]["train_loss"]


@pytest.mark.slow
def test_both_switches_are_saved(run, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    watched = lambda f, state, *rest, **keep: saved.append(state["iter_num"]) or save(f, state, *rest, **keep)  # noqa: E731
    monkeypatch.setattr(checkpoint, "save", watched)
    run(tmp_path / "out", **as_recipe("fst", dense_pretrain=0.25, checkpoint_interval=1000, eval_interval=0))
    assert saved == [8, 27, 32]


def test_a_resumed_run_keeps_the_masks_and_phases_that_it_began_with(refused, run, tmp_path):
    out = tmp_path / "out"
    run(out, stop_at(1))
    assert "sparse=sr_ste (there fst)" in refused(out, sparse="sr_ste")
    assert "dense_pretrain=0.1 (there 0.0)" in refused(out, dense_pretrain=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_pretrain": 0.5, "dense_start": 16}, "dense until iteration 16 and dense from 16: no sparse phase"),
        (as_recipe("step", dense_start=16), "dense until iteration 16 and dense from 16: no sparse phase"),
        (as_recipe("bi_mask", spmm="cusparselt"), "spmm='cusparselt' does not support sparse='bi_mask'"),
    ],
    ids=str,
)
def test_settings_that_a_method_cannot_have_are_refused(refused, tmp_path, changes, message):
    assert message in refused(tmp_path / "out", **changes)


def test_a_run_prints_how_its_settings_differ_from_the_recipe_and_measures_no_gemms_without_a_plan(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(setup, "plan_gemms", lambda *_: pytest.fail("measured"))
    text = run(tmp_path / "out", **as_recipe("bi_mask", masked_decay=6e-5, mask_interval=40, max_iters=1))
    assert "changed from the recipe's values: mask_interval=40 (1), masked_decay=6e-05 (0.0002)\n" in text
    assert "changed from the recipe" not in run(tmp_path / "own", **as_recipe("bi_mask", max_iters=1, spmm="dense"))
    assert (tmp_path / "own" / "ckpt.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# STEP, Bi-Mask and S-STE


@pytest.mark.slow
def test_step_switches_when_moments_settle_and_at_half_time_at_the_latest(run, tmp_path, monkeypatch):
    run(tmp_path / "late", **as_recipe("step"))  # moments do not settle
    assert phases(tmp_path / "late") == ["dense"] * 16 + ["sparse"] * 17
    calls = []
    monkeypatch.setattr(methods.step.StepAdamW, "dense_start_done", lambda self: calls.append(0) or len(calls) > 9)
    run(tmp_path / "settled", **as_recipe("step"))
    assert phases(tmp_path / "settled") == ["dense"] * 10 + ["sparse"] * 23
    calls += [0] * 9
    run(tmp_path / "early", **as_recipe("step", dense_pretrain=0.25))  # settled at once, but not before this share
    assert phases(tmp_path / "early") == ["dense"] * 8 + ["sparse"] * 25


def test_steps_second_moments_stay_from_the_switch_on(run, tmp_path):
    run(tmp_path / "out", **as_recipe("step"))
    state = read_state(tmp_path / "out")
    assert state["sparse_start"] == 16
    assert len(state["autoswitch"]) == 16
    frozen = [moments for moments in state["optimizer"]["state"].values() if "frozen_step" in moments]
    assert [(moments["frozen_step"], int(moments["step"])) for moments in frozen] == [(16, MAX_ITERS)] * 4


def test_all_ranks_switch_if_moments_settle_on_one(run, tmp_path, monkeypatch):
    """The patched reduction returns the other rank's yes. No other value that is reduced is a float."""
    monkeypatch.setattr(methods.step.StepAdamW, "dense_start_done", lambda self: 0.0)
    monkeypatch.setattr(ranks.Ranks, "maximum", lambda self, value: 1 if isinstance(value, float) else value)
    run(tmp_path / "out", **as_recipe("step"))
    assert read_state(tmp_path / "out")["sparse_start"] == 3


def test_bi_mask_searches_permutations_at_its_interval_with_the_runs_seed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(methods.bi_mask, "SEARCH_INTERVAL", 4)
    keys, words = [], methods.bi_mask.seed_words
    monkeypatch.setattr(methods.bi_mask, "seed_words", lambda n, *key: keys.append(key[:3]) or words(n, *key))
    run(tmp_path / "out", **as_recipe("bi_mask", seed=5, max_iters=8))  # no search after the last step
    assert keys == [(5, iter_num, number) for iter_num in (0, 4) for number in range(4)]
    state = read_state(tmp_path / "out")["model"]
    orders = [value for name, value in state.items() if name.endswith("permutation")]
    assert len(orders) == 4
    assert all(not torch.equal(order, torch.arange(len(order))) for order in orders)


@pytest.mark.slow
def test_after_a_dense_start_beta_of_s_ste_fits_the_weights(run, tmp_path, monkeypatch):
    begun, refresh = [], sparse24.Sparse24Linear.refresh

    def counted(layer, begin=False):
        refresh(layer, begin)
        if begin:
            begun.append((float(layer.beta), float(sste_scale(layer.weight.detach()))))

    monkeypatch.setattr(sparse24.Sparse24Linear, "refresh", counted)
    run(tmp_path / "out", **as_recipe("s_ste", dense_pretrain=0.25))
    state = read_state(tmp_path / "out")["model"]
    indices = {name: index for name, index in state.items() if name.endswith("index")}
    assert len(indices) == 4
    for name, index in indices.items():  # soft masks are new every step
        assert torch.equal(expand_pairs(index), mask24(state[name.replace("index", "weight")]))
    assert len(begun) == 4
    assert all(beta == fitted for beta, fitted in begun)
    assert [float(v) for name, v in state.items() if name.endswith("beta")] == [beta for beta, _ in begun]


# ---------------------------------------------------------------------------------------------------------------------
# act24


def act24_settings(name="act24", **changes):
    """A run that is sparse from iteration 6 on. With `decisions`, layers join at 6, 9 and 17, and one leaves at 9."""
    settings = {"activation": "relu2", "learning_rate": 3e-2, "max_iters": 18, "dense_pretrain": 1 / 3}
    return as_recipe(name, **{**settings, "flip_interval": 3, **changes})


@pytest.fixture
def decisions(monkeypatch):
    """act24 counts every 4 steps. Returns {iteration: whether the layers have joined}."""
    made, begin_step = {}, methods.act24.Act24Linear.begin_step

    def spy(layer, seed, iter_num, number, begin=False):
        begin_step(layer, seed, iter_num, number, begin)
        if begin or iter_num % 4 == 1:
            made.setdefault(iter_num, {})[number] = layer.joined

    for name, value in (("INTERVAL", 4), ("JOIN", 0.4), ("LEAVE", 0.4)):
        monkeypatch.setattr(methods.act24, name, value)
    monkeypatch.setattr(methods.act24.Act24Linear, "begin_step", spy)
    return made


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("act24", 8),  # after the count, and before the two decisions that follow from it are used
        *(pytest.param("act24", stop, marks=pytest.mark.slow) for stop in (3, 5, 7, 9, 16)),
        *(pytest.param("act24_soft", stop, marks=pytest.mark.slow) for stop in (5, 8, 16)),
    ],
)
def test_layers_join_and_leave_alike_in_a_stopped_and_resumed_run(run, tmp_path, decisions, name, stop):
    run(tmp_path / "whole", **act24_settings(name))
    expected = dict(decisions)
    assert [tuple(joined.values()) for joined in expected.values()] == [(1, 0), (0, 1), (0, 1), (1, 1)]
    assert [*expected] == [6, 9, 13, 17]
    decisions.clear()
    run(tmp_path / "parts", stop_at(stop), **act24_settings(name))
    run(tmp_path / "parts", **act24_settings(name))
    assert decisions == expected
    assert state_differences(read_state(tmp_path / "parts"), read_state(tmp_path / "whole")) == []
    assert row_differences(read_rows(tmp_path / "parts"), read_rows(tmp_path / "whole")) == []


def test_a_sample_computes_with_the_layers_that_have_joined(run, tmp_path, decisions, monkeypatch):
    monkeypatch.setattr(health.FlipWatch, "add", lambda *_: pytest.fail("there is no masked decay to raise"))
    run(tmp_path / "out", **act24_settings(max_iters=10, dense_pretrain=0.6, flip_interval=1))
    monkeypatch.setattr(sample, "out_dir", str(tmp_path / "out"))
    model, _ = sample.load_model()
    layers, idx = [block.mlp.c_proj for block in model.eval().transformer.h], torch.arange(16)[None]
    assert [layer.joined for layer in layers] == [*decisions[9].values()] == [False, True]
    assert model.generate(idx, 3).shape == (1, 19)
    logits = model(idx)[0].detach()
    layers[1].joined = False
    assert not torch.equal(model(idx)[0], logits)


@pytest.mark.slow
def test_evaluation_changes_nothing_in_a_run_of_act24(run, tmp_path, decisions):
    for interval in (0, 1):
        run(tmp_path / str(interval), **act24_settings(eval_interval=interval))
    states = [read_state(tmp_path / str(interval)) for interval in (0, 1)]
    assert differences(*([state["model"], state["optimizer"]] for state in states)) == []


@pytest.mark.slow
def test_act24_compiles_each_kind_of_block_once(run, tmp_path, decisions, monkeypatch):
    """A dense block that counts, one that does not, a joined one, and a joined one without gradients."""
    graphs, compile, aot_eager = [], torch.compile, torch._dynamo.lookup_backend("aot_eager")
    backend = lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda call, mode: compile(call, backend=backend, fullgraph=True))
    monkeypatch.setattr(methods.act24, "JOIN", 0.9)
    torch._dynamo.reset()
    settings = act24_settings(max_iters=4, dense_pretrain=0.5, eval_interval=0, dropout=0.0)
    run(tmp_path / "eager", **settings)
    run(tmp_path / "compiled", **settings, compile=True)
    assert decisions[2] == {1: True, 3: True}
    assert len(graphs) == 4 + 2  # the head, with and without gradients
    rows = [read_rows(tmp_path / name) for name in ("compiled", "eager")]
    assert rows[0][-1]["val_loss"] == pytest.approx(rows[1][-1]["val_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "sparse='act24': activation='gelu', need 'relu2'; use it, or sparse='none'"),
        ({"dense_pretrain": 0.0}, "needs a dense start: dense_pretrain=0.0 of max_iters=18 is 0 steps; use --dense_"),
        ({"dense_pretrain": 0.02}, "needs a dense start: dense_pretrain=0.02 of max_iters=18 is 0 steps; use --dense_"),
        ({"masked_decay": 6e-5}, "masked_decay=6e-05, need 0 for"),
        ({"flip_reference": "out"}, "flip_reference=out is for methods with masks of weights; remove it"),
        ({"dense_start": 6}, "dense until iteration 6 and dense from 6: no sparse phase"),
    ],
    ids=str,
)
def test_settings_that_act24_cannot_have_are_refused(refused, tmp_path, changes, message):
    assert message in refused(tmp_path / "out", **act24_settings(**changes))


# ---------------------------------------------------------------------------------------------------------------------
# Validation loss with pruned weights


def test_the_pruned_loss_is_that_of_pruned_weights_and_changes_none(run, tmp_path):
    out = tmp_path / "pruned"
    run(tmp_path / "out", sparse="none")
    row, state = read_rows(tmp_path / "out")[-1], read_state(tmp_path / "out")
    pruned = {
        name: torch.where(mask24(w), w, 0) if ".mlp." in name and name.endswith("weight") else w
        for name, w in state["model"].items()
    }
    assert row["val_loss_24"] != row["val_loss"]
    out.mkdir()
    checkpoint.save(out, state | {"model": pruned})
    text = run(out, sparse="none", eval_only=True)
    assert f"val {row['val_loss_24']:.4f}, hard-pruned to 2:4 {row['val_loss_24']:.4f}" in text


@pytest.mark.slow
def test_a_run_that_ends_sparse_is_not_pruned_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "hard_pruned", lambda linears: pytest.fail("nothing needs pruning"))
    run(tmp_path / "out", **as_recipe("s_ste"))
    row = read_rows(tmp_path / "out")[-1]
    assert row["val_loss_24"] == row["val_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Flip rates


def test_the_flip_rate_is_that_of_the_ffns(run, tmp_path):
    for steps in (0, 1):
        run(tmp_path / str(steps), max_iters=steps, dense_start=9, flip_interval=1)
    states = [read_state(tmp_path / str(steps))["model"] for steps in (0, 1)]
    names = [f"transformer.h.{i}.mlp.{linear}.weight" for i in (0, 1) for linear in ("c_fc", "c_proj")]
    expected = flip_rate(*([transposable_index(state[name]) for name in names] for state in states))
    assert read_rows(tmp_path / "1")[0]["flip_rate"] == expected > 0


@pytest.mark.parametrize("settings", [{"sparse": "none"}, {"dense_start": 3}], ids=["dense", "sparse"])
def test_flip_mask_chooses_the_masks_and_changes_no_weight(run, tmp_path, settings):
    for kind in ("auto", "row"):
        run(tmp_path / kind, flip_mask=kind, flip_interval=1, max_iters=3, **settings)
    auto, row = (read_rows(tmp_path / kind)[:-1] for kind in ("auto", "row"))
    assert all(0 < a["flip_rate"] != b["flip_rate"] > 0 for a, b in zip(auto, row, strict=True))
    assert all(a["train_loss"] == b["train_loss"] for a, b in zip(auto, row, strict=True))
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["flip_mask"] == "transposable"


def test_decay_on_weights_has_no_ratio_to_a_gradient(run, tmp_path):
    run(tmp_path / "out", **as_recipe("sr_ste", max_iters=2))
    assert [row["decay_ratio"] for row in read_rows(tmp_path / "out")] == [None] * 3


def warned(text):
    """The iterations of the flip-rate warnings in a run's output."""
    pattern = r"^warning, iteration (\d+): the flip rate is .* times the dense run's, .*masked_decay"
    return [int(i) for i in re.findall(pattern, text, re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 10, 14])
def test_warnings_count_only_sparse_steps_and_continue_after_a_stop(run, dense, tmp_path, monkeypatch, stop):
    """The run is sparse from step 8 on, so step 12 has the fifth flip rate to compare."""
    monkeypatch.setattr(health.FlipReference, "rate", lambda self, iter_num, lr: 1e-9)
    settings = as_recipe("fst", dense_pretrain=0.25, flip_reference=str(dense), flip_interval=1)
    first, second = run(tmp_path / "out", stop_at(stop), **settings), run(tmp_path / "out", **settings)
    assert (warned(first), warned(second)) == (([12], []) if stop > 12 else ([], [12]))


def test_a_reference_of_another_model_is_refused(refused, dense, tmp_path):
    message = refused(tmp_path / "out", flip_reference=str(dense), learning_rate=0.5)
    assert re.search(r"does not compare with this run: learning_rate=0.5 \(there ", message)
    message = refused(tmp_path / "out", flip_reference=str(dense), **as_recipe("sr_ste"))
    assert "flip_mask=row (there transposable)" in message


def test_the_flip_rate_must_fall_until_the_learning_rate_stops_decaying(run, tmp_path, monkeypatch):
    made, watch = [], health.FlipWatch
    monkeypatch.setattr(setup, "FlipWatch", lambda *args: made.append(args) or watch(*args))
    for changes in ({"lr_decay_iters": 99}, {"lr_decay_iters": 99, "decay_lr": False}):
        run(tmp_path / str(len(made)), max_iters=1, **changes)
    assert made == [(SETTINGS["warmup_iters"], 99, None), (SETTINGS["warmup_iters"], 1, None)]


def test_only_rank_0_prints_warnings_and_writes(run, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(health.FlipReference, "rate", lambda self, iter_num, lr: 1e-9)
    monkeypatch.setattr(setup, "start_ranks", lambda *_: ranks.Ranks(1, 0, 1))
    monkeypatch.setattr(setup, "plan_gemms", lambda *_: (None, None))  # there is no rank 0 to answer
    assert run(tmp_path / "out", flip_reference=str(dense), flip_interval=1, max_iters=12, dense_start=12) == ""
    assert not (tmp_path / "out").exists()

"""train.py as a user meets it: settings, phases, metrics, what changes a weight and what must not, refusals, resuming.

Stops and kills are in test_faults.py, several ranks in test_ranks.py. Most runs here are train.main() in this process;
test_faults.py shows that this trains to the same bits as `python train.py`.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import (
    DENSE_START,
    SETTINGS,
    all_settings,
    contents,
    differences,
    launch,
    make_dataset,
    pristine_train,
    read_rows,
    read_state,
    row_differences,
    run_here,
    state_differences,
)

import train
from configurator import setting_names
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.ranks import StopSignal
from runtime.settings import planned_dense_start, resolve_settings
from sparse24 import RECIPES, expand_index, transposable_index

MAX_ITERS = SETTINGS["max_iters"]
KEYS = [
    *("iter", "phase", "train_loss", "val_loss", "val_loss_24", "lr", "grad_norm", "flip_rate"),
    *("masked_decay", "decay_ratio", "skipped", "tokens_per_s", "mfu", "elapsed_s"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data):
    """run(out_dir, max_iters=4, ...): a run of SETTINGS with these changes, which must succeed; returns its output."""

    def run(out, fault=None, **changes):
        done = run_here(out, {**SETTINGS, "dataset": data, **changes}, fault)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def refused(data):
    """refused(out_dir, max_iter=4): the one line with which this is refused; nothing on disk changes."""

    def refused(out, status=1, first=(), **changes):
        before = contents(out)
        done = run_here(out, {**SETTINGS, "dataset": data, **changes}, first=first)
        assert done.returncode == status
        assert re.fullmatch(r"train\.py: error: [^\n]+\n", done.stderr)
        assert "Traceback" not in done.stdout
        assert contents(out) == before
        return done.stderr

    return refused


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory):
    """The folder and the output of one whole run of SETTINGS. Read it, never run in it."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, run(out)


@pytest.fixture(scope="module")
def _stopped(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped") / "out"
    run(out, {"kind": "signal", "signal": "SIGTERM", "iter_num": 9, "micro_batch": 1})
    return out


@pytest.fixture
def stopped(_stopped, tmp_path):
    """A copy of the folder of a run that was stopped after 10 steps, with the checkpoint of step 8 as its previous."""
    return shutil.copytree(_stopped, tmp_path / "stopped")


def flags(state):
    """The phase of each sparse layer in a checkpoint."""
    return [value["sparse"] for name, value in state["model"].items() if name.endswith("_extra_state")]


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.fixture
def given():
    """given(max_iters=9, ...) sets train's globals for one test."""
    with pristine_train():
        yield lambda **values: vars(train).update(values)


def test_lr_warms_up_decays_and_stays(given):
    given(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, decay_lr=True)
    lr = [train.get_lr(i) for i in range(150)]
    assert lr[0] == pytest.approx(1e-3 / 11)
    assert lr[10] == pytest.approx(1e-3)
    assert lr[60] == pytest.approx((1e-3 + 1e-4) / 2)  # half way down the cosine
    assert lr[35] == pytest.approx(1e-4 + 9e-4 * (0.5 + math.sqrt(0.125)))  # a quarter
    assert set(lr[110:]) == {1e-4}
    assert lr[:11] == sorted(lr[:11])
    assert lr[10:] == sorted(lr[10:], reverse=True)
    assert len(set(lr)) == 10 + 100 + 1  # up, down, and min_lr


def test_lr_without_warm_up_or_without_room_to_decay(given):
    given(learning_rate=1e-3, min_lr=1e-4, warmup_iters=0, lr_decay_iters=10, decay_lr=True)
    assert train.get_lr(0) == pytest.approx(1e-3)
    given(warmup_iters=10)
    assert [train.get_lr(i) for i in (9, 10)] == [pytest.approx(1e-3 * 10 / 11), 1e-4]
    given(decay_lr=False)
    assert {train.get_lr(i) for i in range(20)} == {1e-3}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_iters": 600000}, 500000),
        ({"max_iters": 32}, 27),
        ({"max_iters": 1}, 1),
        ({"max_iters": 100, "dense_finetune": 0.0}, 100),
        ({"max_iters": 100, "dense_finetune": 1.0}, 0),
        ({"max_iters": 100, "dense_start": 0}, 0),
        ({"max_iters": 100, "dense_start": 7}, 7),
        ({"max_iters": 100, "dense_start": 7, "sparse": "none"}, 0),
    ],
)
def test_dense_start(given, settings, expected):
    given(**{"sparse": "fst", "dense_start": -1, "dense_finetune": 1 / 6, **settings})
    assert planned_dense_start(all_settings()) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and settings


@pytest.mark.parametrize("name", ["fst", "ste"])
def test_a_recipe_brings_its_own_defaults(given, name):
    given(sparse=name)
    settings = all_settings()
    recipe = resolve_settings(settings, {"sparse": name})
    assert recipe == RECIPES[name]
    brought = {field: getattr(settings, field) for field in ("mask_interval", "masked_decay", "mvue", "dense_finetune")}
    expected = {"masked_decay": 6e-5, "mvue": True, "dense_finetune": 1 / 6} if name == "fst" else {}
    assert brought == {"mask_interval": 40, "masked_decay": 0.0, "mvue": False, "dense_finetune": 0.0} | expected


def test_what_the_user_sets_outdoes_the_recipe(given):
    overrides = {"sparse": "ste", "masked_decay": 2e-4, "mvue": True, "mask_interval": 1, "dense_finetune": 0.5}
    given(**overrides)
    settings = all_settings()
    recipe = resolve_settings(settings, overrides)
    for field, value in overrides.items():
        assert getattr(settings, field) == value
        assert field == "sparse" or getattr(recipe, field) == value


def test_the_script_shows_the_defaults_of_fst():
    for field in fields(RECIPES["fst"]):
        if field.name in setting_names(vars(train)):
            assert getattr(train, field.name) == getattr(RECIPES["fst"], field.name), field.name


def test_a_config_file_then_the_command_line(tmp_path, data):
    config = tmp_path / "c.py"
    config.write_text("sparse = 'ste'\nmax_iters = 5\nmasked_decay = 1e-3\n")
    settings = {name: SETTINGS[name] for name in SETTINGS if name not in ("sparse", "masked_decay", "mvue")}
    done = run_here(tmp_path / "out", {**settings, "dataset": data, "max_iters": 2}, first=(str(config),))
    assert done.returncode == 0
    saved = json.loads((tmp_path / "out/config.json").read_text())
    chosen = {"sparse": "ste", "max_iters": 2, "masked_decay": 1e-3, "mvue": False, "dense_start": 2}
    assert chosen.items() <= saved.items()


def test_config_json_is_complete(reference):
    saved = json.loads((reference[0] / "config.json").read_text())
    names = setting_names(vars(train))
    assert list(saved) == [*names, "environment"]
    resolved = {"device": "cpu", "dtype": "float32", "compile": False, "dense_start": DENSE_START}
    resolved["flip_mask"] = "transposable"
    for name in names:
        default = SETTINGS.get(name, getattr(train, name))
        assert name in ("out_dir", "dataset") or saved[name] == resolved.get(name, default), name
    environment = saved["environment"]
    assert environment.keys() == {"commit", "torch", "triton", "device_name", "kernels", "world_size", "threads"}
    assert (environment["torch"], environment["world_size"]) == (torch.__version__, 1)
    assert environment["kernels"] == "off: the kernels need CUDA, this is cpu"


def test_the_checkpoint_holds_the_settings_of_the_run(reference):
    state = read_state(reference[0])
    saved = json.loads((reference[0] / "config.json").read_text())
    del saved["environment"]
    assert state["config"] == saved
    assert (state["iter_num"], state["dense_start"]) == (MAX_ITERS, DENSE_START)
    assert GPTConfig(**state["model_args"]).n_embd == 32


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and console


def test_metrics_have_the_documented_keys_and_every_iteration_once(reference):
    rows = read_rows(reference[0])
    assert all(list(row) == KEYS for row in rows)
    assert [row["iter"] for row in rows] == [*range(MAX_ITERS + 1)]


def test_metrics_hold_what_is_measured_when_it_is_due(reference, given):
    rows = read_rows(reference[0])
    given(**SETTINGS)
    for i, row in enumerate(rows):
        last = i == MAX_ITERS
        assert row["phase"] == ("sparse" if i < DENSE_START else "dense")
        assert (row["val_loss"] is not None) == (i % 8 == 0 or last)
        assert (row["val_loss_24"] is not None) == last  # as it would be deployed
        assert (row["flip_rate"] is not None) == (i % 6 == 0 and not last)
        assert (row["decay_ratio"] is not None) == (row["phase"] == "sparse")
        assert row["masked_decay"] == (SETTINGS["masked_decay"] if row["phase"] == "sparse" else None)
        assert row["lr"] == (None if last else train.get_lr(i))
        assert row["mfu"] is None  # the peak of a CPU is not known
        for key in ("train_loss", "grad_norm", "tokens_per_s"):
            assert (row[key] is None) if last else (0 < row[key] < math.inf)
        assert row["flip_rate"] is None or 0 <= row["flip_rate"] < 0.5
    elapsed = [row["elapsed_s"] for row in rows]
    assert elapsed == sorted(elapsed)
    assert 0 == elapsed[0] < elapsed[-1]


def test_metrics_are_measured_in_the_steps_that_ask_for_it(run, tmp_path):
    run(tmp_path / "out", max_iters=12, log_interval=5, flip_interval=4, eval_interval=9, dense_start=7)
    rows = read_rows(tmp_path / "out")
    assert [row["iter"] for row in rows] == [0, 4, 5, 7, 8, 9, 10, 12]
    assert [row["iter"] for row in rows if row["val_loss"] is not None] == [0, 9, 12]
    assert [row["iter"] for row in rows if row["flip_rate"] is not None] == [0, 4, 8]
    assert [row["iter"] for row in rows if row["decay_ratio"] is not None] == [0, 4, 5]


def test_zero_switches_evaluation_and_flip_rate_off(run, tmp_path):
    run(tmp_path / "out", max_iters=3, eval_interval=0, flip_interval=0)
    rows = read_rows(tmp_path / "out")
    assert [row["iter"] for row in rows if row["val_loss"] is not None] == [3]
    assert all(row["flip_rate"] is None for row in rows)


def test_the_console_shows_phase_loss_and_time_left(reference):
    text = reference[1]
    line = r"^iter +{}/32  {} +loss \d\.\d{{4}}  .*lr \d\.\d\de-\d\d  \|g\| \d\.\d\d  .*tok/s  eta \d:\d\d:\d\d$"
    assert re.search(line.format(0, "sparse"), text, re.M)
    assert re.search(line.format(DENSE_START, "dense"), text, re.M)
    assert re.search(r"^iter +32/32  dense +val \d\.\d{4}, hard-pruned to 2:4 \d\.\d{4}$", text, re.M)
    assert re.search(
        r"sparse: fst, 4 linears .* masks every 5 steps, decay 0.01, mvue=True; dense from .* 27$", text, re.M
    )
    assert re.search(r"^done: 32 iterations, best validation loss \d\.\d{4}, saved in ", text, re.M)


def test_run_here_takes_a_deterministic_runs_setting_back(run, tmp_path):
    """It holds for the whole process, and would slow down or fail the tests after it."""
    assert not torch.are_deterministic_algorithms_enabled()
    run(tmp_path / "out", max_iters=1, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_the_loss_falls(run, tmp_path):
    run(tmp_path / "out", max_iters=60, lr_decay_iters=60, dropout=0.0, learning_rate=1e-2, masked_decay=1e-4)
    rows = read_rows(tmp_path / "out")
    train_loss = [row["train_loss"] for row in rows[:-1]]
    assert train_loss[0] == pytest.approx(math.log(len(set("the cat. a dog! we saw six (6) birds,"))), abs=0.3)
    assert sum(train_loss[-5:]) / 5 < train_loss[0] - 1
    val = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    assert val[-1] < val[0] - 1


def test_a_dense_run_measures_flips_alike(run, tmp_path):
    run(tmp_path / "out", max_iters=7, sparse="none")
    rows = read_rows(tmp_path / "out")
    assert {row["phase"] for row in rows} == {"dense"}
    assert all(row["decay_ratio"] is None for row in rows)
    assert [row["iter"] for row in rows if row["flip_rate"] is not None] == [0, 6]
    assert all(row["flip_rate"] > 0 for row in rows if row["flip_rate"] is not None)
    state = read_state(tmp_path / "out")
    assert state["dense_start"] == 0
    assert flags(state) == []


def test_a_dense_run_of_any_width_trains(run, tmp_path):
    """30 has no groups of four, so there is no flip rate; that is no reason to refuse a dense model."""
    run(tmp_path / "out", max_iters=2, sparse="none", n_embd=30, n_head=3)
    assert [row["flip_rate"] for row in read_rows(tmp_path / "out")] == [None] * 3


def test_exactly_max_iters_updates(reference):
    steps = [int(moments["step"]) for moments in read_state(reference[0])["optimizer"]["state"].values()]
    assert steps == [MAX_ITERS] * 15


def test_the_optimizer_gets_the_lr_and_decay_of_the_settings(reference, given):
    given(**SETTINGS)
    decay, no_decay = read_state(reference[0])["optimizer"]["param_groups"]
    assert decay["lr"] == no_decay["lr"] == train.get_lr(MAX_ITERS - 1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (train.weight_decay, 0.0)
    assert decay["betas"] == no_decay["betas"] == (train.beta1, train.beta2)


def test_every_micro_batch_has_draws_of_its_own(run, tmp_path, monkeypatch):
    drawn, seed_draws = [], train.seed_draws
    monkeypatch.setattr(train, "seed_draws", lambda *args: drawn.append(args[1:]) or seed_draws(*args))
    run(tmp_path / "out", max_iters=3, seed=5)
    assert drawn == [(5, i, m) for i in range(3) for m in range(4)]


# ---------------------------------------------------------------------------------------------------------------------
# What changes a weight and what must not


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"eval_interval": 3, "eval_iters": 1}, marks=pytest.mark.slow),
        pytest.param({"eval_interval": 0}, marks=pytest.mark.slow),
        pytest.param({"log_interval": 7}, marks=pytest.mark.slow),
        pytest.param({"flip_interval": 0}, marks=pytest.mark.slow),
        {"flip_interval": 1, "eval_interval": 1, "checkpoint_interval": 3},
        pytest.param({"checkpoint_interval": 1000, "always_save_checkpoint": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_watching_changes_no_weight(run, reference, tmp_path, changes):
    run(tmp_path / "out", **changes)
    one, other = read_state(reference[0]), read_state(tmp_path / "out")
    for part in ("model", "optimizer"):
        assert differences(one[part], other[part]) == []


@pytest.mark.parametrize("changes", [{"seed": 1}, {"dropout": 0.2}, {"mvue": False}, {"masked_decay": 0.0}], ids=str)
def test_what_should_change_a_weight_does(run, reference, tmp_path, changes):
    run(tmp_path / "out", max_iters=2, dense_start=DENSE_START, **changes)
    run(tmp_path / "same", max_iters=2, dense_start=DENSE_START)
    one, other = (read_state(tmp_path / name)["model"] for name in ("out", "same"))
    assert "/transformer.h.0.mlp.c_fc.weight" in differences(one, other)


def test_no_clipping_is_a_very_high_limit(run, tmp_path):
    states = []
    for grad_clip in (0.0, 1e9, 0.01):
        run(tmp_path / str(grad_clip), max_iters=3, grad_clip=grad_clip)
        states.append(read_state(tmp_path / str(grad_clip))["model"])
    assert differences(states[0], states[1]) == []
    assert differences(states[0], states[2])


def test_masks_follow_the_weights_at_each_refresh_and_rest_between(run, tmp_path):
    for steps in (5, 8):
        run(tmp_path / str(steps), max_iters=steps, dense_start=100)
    at_5, at_8 = (read_state(tmp_path / str(steps))["model"] for steps in (5, 8))
    layers = [name.removesuffix(".index") for name in at_5 if name.endswith(".index")]
    assert len(layers) == 4
    for name in layers:
        assert torch.equal(at_5[f"{name}.index"], transposable_index(at_5[f"{name}.weight"]))
        assert torch.equal(at_5[f"{name}.index"], at_8[f"{name}.index"])
    assert any(not torch.equal(at_8[f"{n}.index"], transposable_index(at_8[f"{n}.weight"])) for n in layers)


@pytest.mark.slow
def test_masks_rest_in_the_dense_phase(run, tmp_path):
    run(tmp_path / "sparse", max_iters=5, dense_start=100)
    run(tmp_path / "dense", max_iters=12, dense_start=5)
    one, other = (read_state(tmp_path / name) for name in ("sparse", "dense"))
    assert (flags(one), flags(other)) == ([True] * 4, [False] * 4)
    for name in one["model"]:
        assert not name.endswith(".index") or torch.equal(one["model"][name], other["model"][name])
    assert [row["phase"] for row in read_rows(tmp_path / "dense")] == ["sparse"] * 5 + ["dense"] * 8


def test_without_dense_finetuning_the_run_is_sparse_to_the_end(run, reference, tmp_path):
    run(tmp_path / "out", max_iters=6, dense_finetune=0.0)
    state = read_state(tmp_path / "out")
    assert flags(state) == [True] * 4
    assert state["dense_start"] == 6
    assert {row["phase"] for row in read_rows(tmp_path / "out")} == {"sparse"}
    assert flags(read_state(reference[0])) == [False] * 4  # with it, dense


def direct_loss(out, data, name=checkpoint.NAME):
    """Mean loss over the whole validation split, by a dense model with the pruned weights, window by window."""
    state = read_state(out, name)
    weights = {key: value for key, value in state["model"].items() if not key.endswith(("index", "_extra_state"))}
    for key, value in state["model"].items():
        if key.endswith("_extra_state") and value["sparse"]:
            layer = key.removesuffix("_extra_state")
            weights[f"{layer}weight"] = weights[f"{layer}weight"] * expand_index(state["model"][f"{layer}index"])
    model = GPT(GPTConfig(**{**state["model_args"], "sparse": "none"})).eval()
    model.load_state_dict(weights)
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", dtype="<u2").astype(np.int64))
    count = (len(tokens) - 1) // 32
    assert count % SETTINGS["batch_size"]  # the last batch is a short one
    x, y = tokens[: count * 32].view(count, 32), tokens[1 : count * 32 + 1].view(count, 32)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(row[None], target[None])[0][0], target) for row, target in zip(x, y, strict=True)
        ]
    return torch.stack(losses).double().mean().item()


@pytest.mark.parametrize("dense_start", [0, 100])
def test_evaluation_of_the_whole_split_is_its_mean_in_the_phase_of_the_run(run, data, tmp_path, dense_start):
    run(tmp_path / "out", max_iters=12, eval_iters=0, dense_start=dense_start, learning_rate=3e-2)
    rows = read_rows(tmp_path / "out")
    assert rows[-1]["val_loss"] == pytest.approx(direct_loss(tmp_path / "out", data), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, best and last; eval_only


def test_saves_come_at_the_interval_the_switch_and_the_end(run, tmp_path, monkeypatch):
    saved = []
    save = checkpoint.save
    watched = lambda f, state, *rest, **keep: saved.append(state["iter_num"]) or save(f, state, *rest, **keep)  # noqa: E731
    monkeypatch.setattr(checkpoint, "save", watched)
    run(tmp_path / "out", max_iters=14, dense_start=9, checkpoint_interval=5, eval_interval=7)
    assert saved == [5, 7, 9, 10, 14]


@pytest.mark.slow
def test_the_best_so_far_is_kept_on_request_and_over_a_stop(run, tmp_path):
    """With a learning rate that rises until it ruins the model, the best is not the last."""
    changes = {"learning_rate": 1e-2, "min_lr": 3.0, "lr_decay_iters": 40, "warmup_iters": 0, "max_iters": 20}
    changes |= {"always_save_checkpoint": False, "checkpoint_interval": 1000, "eval_interval": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, **changes)
    val = {row["iter"]: row["val_loss"] for row in read_rows(whole) if row["val_loss"] and row["iter"]}
    best = min(val, key=val.get)
    assert best < 18
    state = read_state(whole, "ckpt_best.pt")
    assert (state["iter_num"], state["best_val_loss"]) == (best, val[best])
    assert read_state(whole)["iter_num"] == 20
    assert read_state(whole)["best_val_loss"] == val[best]
    assert read_state(whole, "ckpt_prev.pt")["iter_num"] == 17  # the switch, not an evaluation

    run(parts, {"kind": "signal", "signal": "SIGTERM", "iter_num": 18, "micro_batch": 0}, **changes)
    run(parts, **changes)
    for name in (checkpoint.NAME, "ckpt_best.pt"):
        assert state_differences(read_state(parts, name), read_state(whole, name)) == []


def test_eval_only_prints_the_loss_and_writes_nothing(run, reference, tmp_path):
    out, _ = reference
    before = contents(out)
    text = run(out, eval_only=True)
    assert contents(out) == before
    last = read_rows(out)[-1]["val_loss"]
    assert re.search(rf"^iter +32/32  dense +val {last:.4f}, hard-pruned", text, re.M)
    run(tmp_path / "new", eval_only=True)
    assert not (tmp_path / "new").exists()


def test_a_finished_run_is_left_alone(run, reference):
    out, _ = reference
    before = contents(out)
    assert re.search(r"all of max_iters=32 iterations are done; raise max_iters", run(out))
    assert contents(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_stop_says_how_to_go_on(run, tmp_path):
    stop = {"kind": "signal", "signal": "SIGINT", "iter_num": 2, "micro_batch": 3}
    text = run(tmp_path / "auto", stop)
    assert re.search(
        r"^stopped after iteration 3, saved in .*ckpt\.pt; to go on, run the same command again$", text, re.M
    )
    text = run(tmp_path / "scratch", stop, init_from="scratch")
    assert re.search(r"to go on, run the same command again with --init_from=resume$", text, re.M)


def test_a_second_ctrl_c_is_obeyed_at_once():
    with pristine_train():
        stop = StopSignal()
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_second_sigterm_changes_nothing():
    """A scheduler that signals every process of a job reaches a rank twice: itself, and through torchrun."""
    with pristine_train():
        stop = StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"


@pytest.mark.slow
def test_a_stop_in_the_last_step_does_not_lose_the_last_evaluation(run, reference, tmp_path):
    out = tmp_path / "out"
    run(out, {"kind": "signal", "signal": "SIGTERM", "iter_num": MAX_ITERS - 1, "micro_batch": 2})
    run(out)
    assert row_differences(read_rows(out), read_rows(reference[0])) == []
    assert state_differences(read_state(out), read_state(reference[0])) == []


@pytest.mark.slow
def test_a_stop_before_the_first_step_is_resumed(run, reference, tmp_path):
    out = tmp_path / "out"
    run(out, {"kind": "signal", "signal": "SIGTERM", "iter_num": 0, "micro_batch": 0})
    assert "at iteration 1;" in run(out)
    assert state_differences(read_state(out), read_state(reference[0])) == []
    assert row_differences(read_rows(out), read_rows(reference[0])) == []


def test_metrics_after_the_checkpoint_are_written_again(run, reference, stopped):
    """Two steps beyond the checkpoint, and the line that a kill cut short."""
    kept = (stopped / "metrics.jsonl").read_text()
    assert [row["iter"] for row in read_rows(stopped)] == [*range(10)]
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"iter": 10, "phase": "sparse"}\n{"iter": 11, "phase": "sparse"}\n{"iter": 12, "pha')
    run(stopped)
    assert (stopped / "metrics.jsonl").read_text().startswith(kept)
    elapsed = [row["elapsed_s"] for row in read_rows(stopped)]
    assert elapsed == sorted(elapsed)  # the clock goes on, too
    assert row_differences(read_rows(stopped), read_rows(reference[0])) == []


@pytest.mark.slow
def test_only_the_previous_checkpoint_is_enough(run, reference, stopped):
    (stopped / "ckpt.pt").unlink()
    assert "at iteration 8;" in run(stopped)
    assert state_differences(read_state(stopped), read_state(reference[0])) == []
    assert row_differences(read_rows(stopped), read_rows(reference[0])) == []


def test_a_damaged_checkpoint_is_refused_and_the_previous_one_can_be_used(run, refused, reference, stopped):
    path = stopped / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    said = re.search(r"truncated.*saved before it is whole \(iteration 8\).* mv '(.*)' '(.*)'\n", refused(stopped))
    os.replace(said[1], said[2])
    assert "at iteration 8;" in run(stopped)
    assert state_differences(read_state(stopped), read_state(reference[0])) == []


def test_foreign_checkpoints_are_refused(refused, stopped):
    (stopped / "ckpt_prev.pt").unlink()
    state = read_state(stopped)
    torch.save({**state, "patterns_hash": "0" * 16}, stopped / "ckpt.pt")
    assert re.search("another pattern table", refused(stopped))
    torch.save({"model": state["model"], "optimizer": {}}, stopped / "ckpt.pt")
    assert re.search("is not a checkpoint of nano24: it lacks", refused(stopped))
    torch.save({**state, "config": contextlib.nullcontext()}, stopped / "ckpt.pt")
    assert re.search("torch.load refused it", refused(stopped))
    (stopped / "ckpt.pt").write_text("hello")
    assert re.search("was not written by torch.save", refused(stopped))


OLD = {  # what the checkpoint of a run says that was made before settings were removed
    "config": {
        "masked_decay_auto": False,
        "masked_decay_auto_interval": 100,
        "checkpoint_async": False,
        "wandb_mode": "offline",
        "max_skipped": 5,
        "check_interval": 1000,
        "backend": "auto",
        "flip_layers": True,
        "ffn_recompute": False,
        "sparse_layers": "ffn",
        "dense_blocks": 0,
        "rewarm_iters": 0,
        "decay_schedule": "constant",
        "decay_on": "grad",
        "mask": "transposable",
        "beta": "none",
    },
    "model_args": {"sparse_layers": "ffn", "dense_blocks": 0},
}


def make_old(path, **config):
    state = read_state(path)
    changed = {key: {**state[key], **names} for key, names in OLD.items()}
    changed["config"] |= config
    torch.save({**state, **changed, "controller": None}, path / "ckpt.pt")


@pytest.mark.slow
def test_a_checkpoint_that_names_removed_settings_goes_on(run, reference, stopped):
    make_old(stopped)
    text = run(stopped)
    assert "resuming" in text
    changed = re.search("changed since the checkpoint: (.*)", text)[1]
    assert re.fullmatch(r"out_dir \S+ -> \S+", changed)
    assert state_differences(read_state(stopped), read_state(reference[0])) == []


@pytest.mark.parametrize(
    ("name", "value"), [("masked_decay_auto", True), ("sparse_layers", "ffn+attn"), ("mask", "row")]
)
def test_a_checkpoint_that_needs_a_removed_setting_is_refused(refused, stopped, name, value):
    make_old(stopped, **{name: value})
    removed = "the setting was removed after commit 7ffc73d: .*; use that commit"
    said = refused(stopped)
    assert re.search(rf"ckpt\.pt has {name}={re.escape(repr(value))}, need .*: {removed}", said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_layer": 3},
            r"another model than these settings: n_layer=3 \(there 2\); use its settings, or another out_dir",
        ),
        ({"n_embd": 64, "n_head": 4}, r"n_head=4 \(there 2\), n_embd=64 \(there 32\)"),
        ({"block_size": 16}, r"block_size=16 \(there 32\)"),
        ({"bias": True}, r"bias=True \(there False\)"),
        ({"activation": "relu2"}, r"activation=relu2 \(there gelu\)"),
        ({"ffn_ratio": 2.0}, r"ffn_ratio=2.0 \(there 4.0\)"),
        ({"sparse": "none"}, r"sparse=none \(there fst\)"),
        ({"sparse": "ste"}, r"sparse=ste \(there fst\)"),
        ({"max_iters": 40}, r"dense at iteration 27 of 32, these settings at 33 of 40; say which with --dense_start="),
        ({"dense_finetune": 0.5}, r"dense at iteration 27 of 32, these settings at 16 of 32"),
        ({"init_from": "scratch"}, r"holds a run already; use --init_from=resume .*--overwrite=True to delete it"),
        ({"init_from": "gpt2"}, r"init_from=gpt2, but .* holds a run already"),
    ],
    ids=str,
)
def test_resuming_with_what_does_not_fit_is_refused(refused, stopped, changes, message):
    assert re.search(message, refused(stopped, **changes))


def test_a_checkpoint_of_another_vocabulary_is_refused(refused, stopped, tmp_path):
    other = make_dataset(tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"vocab_size": meta["vocab_size"] + 1}))
    assert re.search("use the dataset it was made for", refused(stopped, dataset=other))


@pytest.mark.slow
def test_another_max_iters_goes_on_when_the_switch_is_said(run, stopped):
    text = run(stopped, max_iters=40, dense_start=12)
    assert re.search(r"changed since the checkpoint: .*max_iters 32 -> 40", text)
    rows = read_rows(stopped)
    assert [row["phase"] for row in rows] == ["sparse"] * 12 + ["dense"] * 29
    assert (read_state(stopped)["iter_num"], read_state(stopped)["dense_start"]) == (40, 12)
    text = run(stopped, max_iters=42, dense_start=12)
    assert [row["iter"] for row in read_rows(stopped)] == [*range(43)]


def test_a_dense_run_may_go_on_longer(run, tmp_path):
    run(tmp_path / "out", sparse="none", max_iters=3)
    run(tmp_path / "out", sparse="none", max_iters=5)
    assert [row["iter"] for row in read_rows(tmp_path / "out")] == [*range(6)]


@pytest.mark.slow
def test_overwrite_starts_anew(run, reference, stopped):
    (stopped / "ckpt_best.pt").touch()
    (stopped / "notes.txt").write_text("mine")
    text = run(stopped, init_from="scratch", overwrite=True)
    assert "resuming" not in text
    assert state_differences(read_state(stopped), read_state(reference[0])) == []
    assert row_differences(read_rows(stopped), read_rows(reference[0])) == []
    assert not (stopped / "ckpt_best.pt").exists()
    assert (stopped / "notes.txt").read_text() == "mine"


def test_scratch_over_metrics_alone_is_refused(refused, stopped):
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (stopped / name).unlink()
    assert re.search("holds a run already", refused(stopped, init_from="scratch"))


def test_a_refused_overwrite_deletes_nothing(refused, stopped, tmp_path):
    wrong = {"init_from": "scratch", "overwrite": True}
    refused(stopped, **wrong, dataset=tmp_path / "nowhere")
    refused(stopped, **wrong, n_head=5)
    refused(stopped, **wrong, device="cuda" if not torch.cuda.is_available() else "nonsense")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one clear line, exit status 1 (2 for a word that is no setting), nothing written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_iter": 5}, "unknown setting 'max_iter' on the command line; did you mean 'max_iters'?"),
        ({"max_iters": "many"}, "setting 'max_iters' on the command line: got 'many', need an int"),
        ({"learning_rate": "fast"}, "setting 'learning_rate' on the command line: got 'fast', need a float"),
        ({"bias": 1}, "setting 'bias' on the command line: got '1', need True or False"),
        ({"masked_decay_auto": True}, "masked_decay_auto on the command line was removed after commit 7ffc73d"),
    ],
)
def test_a_word_that_is_no_setting_is_refused_with_status_2(refused, tmp_path, changes, message):
    assert message in refused(tmp_path / "out", status=2, **changes)


def test_a_config_file_with_a_mistake_is_refused_with_status_2(refused, tmp_path):
    config = tmp_path / "c.py"
    config.write_text("n_layers = 3\n")
    message = refused(tmp_path / "out", status=2, first=(str(config),))
    assert f"unknown setting 'n_layers' in {config}; did you mean 'n_layer'?" in message
    config.write_text("dropout = '0.1'\n")
    assert f"setting 'dropout' in {config}: got '0.1', need a float" in refused(
        tmp_path / "out", status=2, first=(str(config),)
    )


@pytest.mark.slow
def test_a_real_process_exits_with_status_2_and_no_traceback(tmp_path):
    done = launch(tmp_path / "out", {"max_iter": 5})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train\.py: error: unknown setting 'max_iter'[^\n]*\n", done.stderr)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_embd=32.*n_head=5"),
        ({"n_embd": 30, "n_head": 3}, "n_embd=30, need a multiple of 4 for sparse='fst'"),
        ({"ffn_ratio": 34 / 32}, "d_ff=34, need a multiple of 4 for sparse='fst'; change ffn_ratio"),
        ({"ffn_ratio": 0.33}, "ffn_ratio=0.33 times n_embd=32"),
        ({"activation": "tanh"}, "activation='tanh' is unknown, need one of gelu, relu2, geglu, swiglu"),
        ({"sparse": "fts"}, "'fts' is unknown, need one of fst, ste"),
        ({"sparse": "s_ste", "mask_interval": 5}, "Recipe 's_ste': need mask_interval=1 for mask='soft'"),
        ({"sparse": "step", "dense_pretrain": 0.0}, "Recipe 'step': need dense_pretrain above 0 for precondition"),
        ({"flip_mask": "soft"}, "flip_mask='soft', need one of auto, transposable, row"),
        ({"sparse": "none", "flip_reference": "x"}, "flip_reference=x is for sparse runs"),
        ({"flip_reference": "no/such"}, "no such run folder: 'no/such'; give the out_dir of a run"),
        ({"dense_pretrain": 0.5, "dense_start": 9}, "dense until iteration 16 and dense from 9: no sparse phase"),
        ({"sparse": "step", "max_iters": 1}, "is no step, sparse='step' needs some"),
        ({"seed": -1}, "seed=-1, need at least 0"),
        ({"seed": 2**32}, r"seed=4294967296, need a seed below 2\*\*32"),
        ({"batch_size": 0}, "batch_size=0, need at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0, need at least 1"),
        ({"log_interval": 0}, "log_interval=0, need at least 1"),
        ({"checkpoint_interval": 0}, "checkpoint_interval=0, need at least 1"),
        ({"eval_iters": -1}, "eval_iters=-1, need at least 0"),
        ({"max_iters": -1}, "max_iters=-1, need at least 0"),
        ({"mask_interval": 0}, "mask_interval=0, need at least 1"),
        ({"masked_decay": -1.0}, "masked_decay=-1.0, need a finite factor of at least 0"),
        ({"dense_finetune": 1.5}, "dense_finetune=1.5, need a fraction of max_iters from 0 to 1"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0, need at least 0"),
        ({"dropout": 1.5}, "dropout"),
        ({"beta1": 1.5}, "[Ii]nvalid beta|beta1=1.5"),
        ({"block_size": 100000}, "holds .* tokens, need more than block_size=100000"),
        ({"dtype": "int8"}, "dtype='int8', need one of auto, float32, bfloat16, float16"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"device": "hpu"}, "device='hpu'"),
        ({"init_from": "resume"}, "init_from=resume, but .* holds no ckpt.pt; use init_from=scratch or auto"),
        ({"init_from": "sctratch"}, "init_from='sctratch', need one of auto, scratch, resume, gpt2"),
        ({"dataset": "no_such_dataset"}, "train.bin does not exist; set dataset to one of .*shakespeare"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(refused, tmp_path, changes, message):
    assert re.search(message, refused(tmp_path / "out", **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(refused, tmp_path, device):
    assert re.search("sees no CUDA GPU; use --device=cpu", refused(tmp_path / "out", device=device))


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_that_cannot_meet_are_refused(refused, tmp_path, monkeypatch, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    for name in ("RANK", "LOCAL_RANK"):  # as torchrun sets them, which sets WORLD_SIZE too
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    expected = {
        "cpu": "ranks cannot meet by gloo: .*WORLD_SIZE.*; start train.py with torchrun",
        "cuda": "device='cuda'",
    }
    assert re.search(expected[device], refused(tmp_path / "out", device=device))


def test_openai_weights_without_transformers_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert re.search("pip install transformers", refused(tmp_path / "out", init_from="gpt2"))


def test_wandb_that_is_not_installed_is_refused(refused, stopped, tmp_path, monkeypatch):
    """Before the run that overwrite allows to delete is deleted."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert re.search("wandb", refused(tmp_path / "out", wandb_log=True))
    assert re.search("wandb", refused(stopped, wandb_log=True, init_from="scratch", overwrite=True))


def test_an_out_dir_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert re.search("out_dir|File exists|Not a directory", refused(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_data_with_a_token_out_of_range_is_refused(refused, tmp_path):
    folder = make_dataset(tmp_path / "data")
    ids = np.fromfile(folder / "train.bin", dtype="<u2")
    ids[-1] = 60000
    ids.tofile(folder / "train.bin")
    assert re.search(
        r"train\.bin holds token 60000, need tokens below vocab_size=", refused(tmp_path / "o", dataset=folder)
    )


@pytest.mark.parametrize(("name", "text"), [("train.bin", ""), ("val.bin", "x"), ("val.bin", "too few tokens")])
def test_data_that_is_too_short_is_refused(refused, tmp_path, name, text):
    folder = make_dataset(tmp_path / "data")
    (folder / name).write_text(text)
    assert re.search(rf"{name} holds {len(text) // 2} tokens, need more than", refused(tmp_path / "o", dataset=folder))


@pytest.mark.parametrize("text", ["{", "[]", '{"tokenizer": "char"}', '{"vocab_size": "5"}'])
def test_a_damaged_meta_json_is_refused_by_name(refused, tmp_path, text):
    folder = make_dataset(tmp_path / "data")
    (folder / "meta.json").write_text(text)
    assert re.search(r"meta\.json", refused(tmp_path / "o", dataset=folder))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_what_was_saved(data, reference, run, tmp_path, monkeypatch):
    out, save = tmp_path / "out", torch.save

    def fail_at_12(state, file):
        if state["iter_num"] == 12:
            file.write(b"half")
            raise OSError("No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_at_12)
        done = run_here(out, {**SETTINGS, "dataset": data})
    assert done.returncode == 1
    assert re.fullmatch(r"train\.py: error: cannot write .*: No space left on device; [^\n]+\n", done.stderr)
    assert read_state(out)["iter_num"] == 8
    run(out)
    assert state_differences(read_state(out), read_state(reference[0])) == []
    assert row_differences(read_rows(out), read_rows(reference[0])) == []


# ---------------------------------------------------------------------------------------------------------------------
# Other dtypes, torch.compile, wandb


def test_bfloat16_trains_with_float32_weights(run, tmp_path):
    run(tmp_path / "out", max_iters=8, dtype="bfloat16", learning_rate=1e-2)
    state = read_state(tmp_path / "out")
    assert state["config"]["dtype"] == "bfloat16"
    assert state["model"]["transformer.h.0.mlp.c_fc.weight"].dtype == torch.float32
    rows = read_rows(tmp_path / "out")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.2


@pytest.mark.slow
def test_float16_scales_the_loss_and_resumes_bit_for_bit(run, tmp_path):
    changes = {"max_iters": 6, "dtype": "float16"}
    run(tmp_path / "whole", **changes)
    whole = read_state(tmp_path / "whole")
    assert whole["scaler"]["scale"] > 1
    run(tmp_path / "parts", {"kind": "signal", "signal": "SIGTERM", "iter_num": 2, "micro_batch": 1}, **changes)
    assert read_state(tmp_path / "parts")["scaler"]["_growth_tracker"] == 3
    run(tmp_path / "parts", **changes)
    assert state_differences(read_state(tmp_path / "parts"), whole) == []
    assert read_state(tmp_path / "parts")["scaler"]["_growth_tracker"] == 6


def check_compiled(run, folder, **changes):
    """A compiled run goes through both phases and both kinds of evaluation with the numbers of one that is not."""
    changes = {"n_layer": 1, "max_iters": 2, "dense_start": 1, "gradient_accumulation_steps": 1, **changes}
    changes["dropout"] = 0.0  # compiled code draws other numbers from the same generator
    run(folder / "eager", **changes)
    run(folder / "compiled", **changes, compile=True)
    eager, compiled = (read_rows(folder / name) for name in ("eager", "compiled"))
    switch = changes["dense_start"]
    assert [row["phase"] for row in compiled] == ["sparse"] * switch + ["dense"] * (len(eager) - switch)
    for a, b in zip(eager, compiled, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert b[key] == (None if a[key] is None else pytest.approx(a[key], rel=1e-4))
    assert read_state(folder / "compiled")["config"]["compile"] is True
    assert read_state(folder / "compiled")["model"].keys() == read_state(folder / "eager")["model"].keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_graphs_are_captured_in_both_phases(run, tmp_path, monkeypatch):
    """torch.compile's front half, without generated code."""
    compile_model = torch.compile
    modes = []

    def compile_front(model, mode):
        modes.append(mode)
        return compile_model(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_front)
    check_compiled(run, tmp_path / "layers", max_iters=4, dense_start=1)
    graphs = {"compile_mode": "reduce-overhead", "gradient_accumulation_steps": 3}
    check_compiled(run, tmp_path / "plan", max_iters=4, dense_start=2, spmm="masked", **graphs)
    assert modes == ["default", "reduce-overhead"]


def test_where_graphs_are_replayed_gradients_are_added_up_in_tensors_that_stay(run, tmp_path, monkeypatch):
    """A CUDA graph's own results are gone at its next replay, so none may become a parameter's gradient."""
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *args):
            if torch.is_grad_enabled():
                seen.append([p.grad is not None and p.grad.data_ptr() for p in self.model.parameters()])
            return self.model(*args)

    monkeypatch.setattr(torch, "compile", lambda model, mode: Watched(model))
    options = {"max_iters": 3, "dense_start": 2, "compile": True}
    run(tmp_path / "default", **options)
    assert len(seen) == 3 * 4
    assert [any(grads) for grads in seen] == [False, True, True, True] * 3
    seen.clear()
    run(tmp_path / "graphs", **options, compile_mode="reduce-overhead")
    assert len(seen) == 3 * 4
    assert all(grads == seen[0] and all(grads) for grads in seen)
    default, graphs = (read_state(tmp_path / name)["model"] for name in ("default", "graphs"))
    assert all(torch.equal(graphs[name], tensor) for name, tensor in default.items() if torch.is_tensor(tensor))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which is not installed")
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile cannot link against a torch whose path has a space")
def test_torch_compile_trains_through_both_phases(run, tmp_path):
    """About 25 s, or 5 with inductor's cache filled."""
    check_compiled(run, tmp_path, eval_interval=0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_gets_the_same_numbers(data, tmp_path, monkeypatch):
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {**SETTINGS, "dataset": data, "max_iters": 3, "wandb_log": True}
    done = launch(tmp_path / "out", settings)
    assert done.returncode == 0, done.stderr
    assert [row["iter"] for row in read_rows(tmp_path / "out")] == [0, 1, 2, 3]
    (log,) = [*tmp_path.rglob("offline-run-*/run-*.wandb")]
    written = log.read_bytes()
    for name in ("train_loss", "val_loss", "flip_rate", "grad_norm", "mask_interval"):
        assert name.encode() in written

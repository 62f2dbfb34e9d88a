"""The loop of train.py: schedules, measurements, what changes a weight, saves, stops, dtypes, torch.compile.

Most runs call train.main() in this process; test_faults.py shows that this gives the same bits as `python train.py`.
"""

import contextlib
import math
import re
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import train_by_hand
from harness import (
    DENSE_START,
    SETTINGS,
    all_settings,
    contents,
    differences,
    install,
    launch,
    read_rows,
    read_state,
    run_differences,
    run_here,
    state_differences,
    stop_at,
)

import train
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.loader import Tokens
from sparse24 import expand_index, recipe_of, transposable_index

MAX_ITERS = SETTINGS["max_iters"]
KEYS = [
    *("iter", "phase", "train_loss", "val_loss", "val_loss_24", "lr", "grad_norm", "flip_rate"),
    *("masked_decay", "decay_ratio", "skipped", "tokens_per_s", "mfu", "elapsed_s"),
    *("zeros", "over_two", "energy_dropped", "joined"),
]


def flags(state):
    """The phase of each sparse layer in a checkpoint."""
    return [bool(value) for name, value in state["model"].items() if name.endswith("_extra_state")]


def measured(out, key):
    """The iterations at which `key` was measured."""
    return [row["iter"] for row in read_rows(out) if row[key] is not None]


def test_lr_warms_up_decays_and_stays(given):
    given(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, decay_lr=True)
    lr = [train.get_lr(i) for i in range(150)]
    quarter = 1e-4 + 9e-4 * (0.5 + math.sqrt(0.125))
    assert [lr[i] for i in (0, 10, 35, 60)] == pytest.approx([1e-3 / 11, 1e-3, quarter, (1e-3 + 1e-4) / 2])
    assert lr[:11] == sorted(lr[:11])
    assert lr[10:] == sorted(lr[10:], reverse=True)
    assert set(lr[110:]) == {1e-4}
    assert len(set(lr)) == 10 + 100 + 1  # up, down, and min_lr
    given(warmup_iters=0, lr_decay_iters=10)
    assert train.get_lr(0) == pytest.approx(1e-3)
    given(warmup_iters=10)
    assert [train.get_lr(i) for i in (9, 10)] == [pytest.approx(1e-3 * 10 / 11), 1e-4]
    given(decay_lr=False)
    assert {train.get_lr(i) for i in range(20)} == {1e-3}


# ---------------------------------------------------------------------------------------------------------------------
# A run by hand

# Every gradient is clipped, the decay is as strong as the gradient, and both phases have steps.
BY_HAND = {"max_iters": 7, "dense_start": 5, "mask_interval": 2, "flip_interval": 2, "eval_interval": 3}
BY_HAND |= {"grad_clip": 0.3, "masked_decay": 0.3, "gradient_accumulation_steps": 3, "learning_rate": 1e-2}


@pytest.mark.parametrize("name", ["one rank", "loss scaling", pytest.param("two ranks", marks=pytest.mark.slow)])
def test_a_run_is_its_steps_by_hand(data, tmp_path, monkeypatch, given, name):
    """In float64. Two ranks share three micro-batches, so that one of them has two."""
    settings, out, double = {**SETTINGS, **BY_HAND, "dataset": data}, tmp_path / "out", {"kind": "double"}
    if name == "loss scaling":
        scaler = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, growth_interval=2))
    done = launch(out, settings, double, ranks=2) if name == "two ranks" else run_here(out, settings, double)
    assert done.returncode == 0, done.stderr
    given(**settings)
    s, state = all_settings(), read_state(out)
    with contextlib.ExitStack() as undo:
        install(double, undo)
        torch.manual_seed(s.seed)
        model = GPT(GPTConfig(**state["model_args"]), recipe_of(vars(s)))
        splits = [
            torch.from_numpy(np.fromfile(data / f"{name}.bin", "<u2").astype(np.int64)) for name in ("train", "val")
        ]
        expected = train_by_hand(model, *splits, s, [train.get_lr(i) for i in range(s.max_iters)])
    for row, numbers in zip(read_rows(out), expected, strict=True):
        for key, number in numbers.items():
            tolerance = 1e-6 if key == "decay_ratio" else 1e-9  # decay_ratio is computed in float32
            assert row[key] == (None if number is None else pytest.approx(number, rel=tolerance)), (row["iter"], key)
    assert max(row["flip_rate"] or 0 for row in expected[:-1]) > 0
    assert min(row["grad_norm"] for row in expected[:-1]) > BY_HAND["grad_clip"]
    for key, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            torch.testing.assert_close(state["model"][key], tensor, rtol=0, atol=1e-9 * tensor.is_floating_point())
    if name == "loss scaling":  # 2^16, and doubled after every two steps
        assert (state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) == (2**19, 1)


def test_a_skipped_step_lowers_the_loss_scale(run, tmp_path, monkeypatch):
    """Otherwise a float16 run whose scale is too high would skip all further steps."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    run(tmp_path / "out", {"kind": "nan", "iter_nums": [1, 2]}, max_iters=4, dense_start=4)
    state = read_state(tmp_path / "out")
    assert (state["scaler"]["scale"], state["skipped"]) == (2.0**14, [2, 0])
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {2}


def test_weights_are_packed_once_a_step_and_after_the_masks_are_refreshed(run, tmp_path, monkeypatch):
    calls = []
    for name in ("refresh_masks", "pack_weights"):
        real = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *a, n=name, real=real, **k: calls.append(n) or real(*a, **k))
    run(tmp_path / "out", max_iters=4, dense_start=3, mask_interval=2)
    assert calls == ["pack_weights", "refresh_masks", "pack_weights", "pack_weights", "pack_weights"]


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def test_every_iteration_has_a_row_with_its_measurements(reference, given):
    rows = read_rows(reference[0])
    assert all(list(row) == KEYS for row in rows)
    assert [row["iter"] for row in rows] == [*range(MAX_ITERS + 1)]
    given(**SETTINGS)
    for i, row in enumerate(rows):
        last = i == MAX_ITERS
        assert row["phase"] == ("sparse" if i < DENSE_START else "dense")
        assert (row["val_loss"] is not None) == (i % 8 == 0 or last)
        assert (row["val_loss_24"] is not None) == last
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
    assert rows[0]["train_loss"] == pytest.approx(math.log(len(set("the cat. a dog! we saw six (6) birds,"))), abs=0.3)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3


def test_rows_and_saves_follow_the_intervals(run, tmp_path, monkeypatch):
    out, saved, save = tmp_path / "out", [], checkpoint.save
    watched = lambda f, state, *rest, **keep: saved.append(state["iter_num"]) or save(f, state, *rest, **keep)  # noqa: E731
    monkeypatch.setattr(checkpoint, "save", watched)
    run(out, max_iters=12, log_interval=5, flip_interval=4, eval_interval=9, dense_start=7, checkpoint_interval=5)
    assert [row["iter"] for row in read_rows(out)] == [0, 4, 5, 7, 8, 9, 10, 12]
    assert measured(out, "val_loss") == [0, 9, 12]
    assert measured(out, "flip_rate") == [0, 4, 8]
    assert measured(out, "decay_ratio") == [0, 4, 5]
    assert saved == [5, 7, 9, 10, 12]  # at the interval, the switch, evaluations and the end
    run(tmp_path / "off", max_iters=3, eval_interval=0, flip_interval=0)
    assert (measured(tmp_path / "off", "val_loss"), measured(tmp_path / "off", "flip_rate")) == ([3], [])


def test_a_dense_run_measures_flips_alike_and_may_go_on_longer(run, tmp_path):
    out = tmp_path / "out"
    run(out, max_iters=5, sparse="none")
    run(out, max_iters=7, sparse="none")
    rows, state = read_rows(out), read_state(out)
    assert [row["iter"] for row in rows] == [*range(8)]
    assert {row["phase"] for row in rows} == {"dense"}
    assert measured(out, "decay_ratio") == []
    assert measured(out, "flip_rate") == [0, 6]
    assert all(row["flip_rate"] > 0 for row in rows[::6][:2])
    assert (state["dense_start"], flags(state)) == (0, [])


def test_a_dense_run_of_any_width_trains(run, tmp_path):
    """30 is no multiple of four, so there is no flip rate."""
    run(tmp_path / "out", max_iters=2, sparse="none", n_embd=30, n_head=3)
    assert [row["flip_rate"] for row in read_rows(tmp_path / "out")] == [None] * 3


def test_the_optimizer_takes_max_iters_steps_with_the_lr_and_decay_of_the_settings(reference, given):
    given(**SETTINGS)
    optimizer = read_state(reference[0])["optimizer"]
    assert [int(moments["step"]) for moments in optimizer["state"].values()] == [MAX_ITERS] * 15
    decay, no_decay = optimizer["param_groups"]
    assert decay["lr"] == no_decay["lr"] == train.get_lr(MAX_ITERS - 1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (train.weight_decay, 0.0)
    assert decay["betas"] == no_decay["betas"] == (train.beta1, train.beta2)


def test_every_micro_batch_has_its_own_draws(run, tmp_path, monkeypatch):
    drawn, seed_draws = [], train.seed_draws
    monkeypatch.setattr(train, "seed_draws", lambda *args: drawn.append(args[1:]) or seed_draws(*args))
    run(tmp_path / "out", max_iters=3, seed=5)
    assert drawn == [(5, i, m) for i in range(3) for m in range(4)]


# ---------------------------------------------------------------------------------------------------------------------
# What changes a weight and what must not

RARELY = {"eval_interval": 0, "log_interval": 7, "flip_interval": 0, "checkpoint_interval": 1000}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"eval_interval": 3, "eval_iters": 1, "always_save_checkpoint": False}, marks=pytest.mark.slow),
        pytest.param(RARELY, marks=pytest.mark.slow),
        {"flip_interval": 1, "eval_interval": 1, "checkpoint_interval": 3},
    ],
    ids=str,
)
def test_measurements_and_saves_change_no_weight(run, reference, tmp_path, changes):
    run(tmp_path / "out", **changes)
    states = [read_state(out) for out in (reference[0], tmp_path / "out")]
    assert differences(*({part: state[part] for part in ("model", "optimizer")} for state in states)) == []


@pytest.fixture(scope="module")
def two_steps(run, tmp_path_factory):
    """The model after two steps."""
    out = tmp_path_factory.mktemp("two_steps")
    run(out, max_iters=2, dense_start=DENSE_START)
    return read_state(out)["model"]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"dropout": 0.2}, {"mvue": False}, {"masked_decay": 0.0}], ids=str)
def test_what_should_change_a_weight_does(run, two_steps, tmp_path, changes):
    run(tmp_path / "out", max_iters=2, dense_start=DENSE_START, **changes)
    changed = differences(read_state(tmp_path / "out")["model"], two_steps)
    assert "/transformer.h.0.mlp.c_fc.weight" in changed


def test_no_clipping_is_a_very_high_limit(run, two_steps, tmp_path):
    states = []
    for grad_clip in (0.0, 1e9, 0.01):
        run(tmp_path / str(grad_clip), max_iters=2, dense_start=DENSE_START, grad_clip=grad_clip)
        states.append(read_state(tmp_path / str(grad_clip))["model"])
    assert differences(states[0], states[1]) == []
    assert differences(states[0], states[2])


def test_masks_follow_the_weights_at_each_refresh_and_stay_in_between(run, tmp_path):
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
def test_masks_stay_in_the_dense_phase(run, tmp_path):
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
    assert (state["dense_start"], flags(state)) == (6, [True] * 4)
    assert {row["phase"] for row in read_rows(tmp_path / "out")} == {"sparse"}
    assert flags(read_state(reference[0])) == [False] * 4  # with it, dense


def direct_loss(out, data):
    """Mean loss over the validation split of a dense model with the pruned weights, window by window."""
    state = read_state(out)
    weights = {key: value for key, value in state["model"].items() if not key.endswith(("index", "_extra_state"))}
    for key, value in state["model"].items():
        if key.endswith("_extra_state") and value:
            layer = key.removesuffix("_extra_state")
            weights[f"{layer}weight"] = weights[f"{layer}weight"] * expand_index(state["model"][f"{layer}index"])
    model = GPT(GPTConfig(**{**state["model_args"], "sparse": "none"})).eval()
    model.load_state_dict(weights)
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", dtype="<u2").astype(np.int64))
    count = (len(tokens) - 1) // 32
    assert count % SETTINGS["batch_size"]  # the last batch is a short one
    x, y = tokens[: count * 32].view(count, 32), tokens[1 : count * 32 + 1].view(count, 32)
    with torch.no_grad():
        losses = [F.cross_entropy(model(a[None], b[None])[0][0], b) for a, b in zip(x, y, strict=True)]
    return torch.stack(losses).double().mean().item()


@pytest.mark.parametrize("dense_start", [0, 100])
def test_evaluation_of_the_whole_split_is_its_mean_in_the_phase_of_the_run(run, data, tmp_path, dense_start):
    run(tmp_path / "out", max_iters=12, eval_iters=0, dense_start=dense_start, learning_rate=3e-2)
    assert read_rows(tmp_path / "out")[-1]["val_loss"] == pytest.approx(direct_loss(tmp_path / "out", data), rel=1e-5)


@pytest.mark.parametrize("eval_iters", [0, 4])
def test_ranks_share_the_batches_of_an_evaluation(data, given, eval_iters):
    """The whole split is four batches and a short one. The ranks' sums make one rank's mean."""
    given(**{**SETTINGS, "eval_iters": eval_iters})
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=2, n_embd=8))
    val, size = Tokens(data, "val", 32, 64), SETTINGS["batch_size"]

    def shares(world_size):
        """[loss sum, number of sequences] of each rank."""
        totals = []
        for rank in range(world_size):
            ranks = SimpleNamespace(rank=rank, world_size=world_size, total=lambda v: totals.append(v) or [v[0], 1])
            t = SimpleNamespace(val_data=val, ranks=ranks, model=model, net=model, device=torch.device("cpu"))
            t.autocast, t.stop = contextlib.nullcontext, SimpleNamespace(agreed=lambda: 0, number=0)
            train.evaluate(t)
        return totals

    one = shares(1)[0]
    assert one[1] == (eval_iters * size or (len(val.data) - 1) // 32)
    assert one[1] % size == bool(not eval_iters)
    for world_size in (2, 3, 6):
        loss_sums, sequences = zip(*shares(world_size), strict=True)
        assert sum(sequences) == one[1]
        assert sum(loss_sums) == pytest.approx(one[0], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Saves, stops, the end


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_on_request_and_across_a_stop(run, tmp_path):
    """The learning rate rises until it ruins the model, so that the best checkpoint is not the last one."""
    changes = {"learning_rate": 3.0, "min_lr": 0.0, "lr_decay_iters": 40, "warmup_iters": 40, "max_iters": 20}
    changes |= {"always_save_checkpoint": False, "checkpoint_interval": 1000, "eval_interval": 2}
    undisturbed, parts = tmp_path / "undisturbed", tmp_path / "parts"
    run(undisturbed, **changes)
    val = {row["iter"]: row["val_loss"] for row in read_rows(undisturbed) if row["val_loss"] and row["iter"]}
    best = min(val, key=val.get)
    assert best < 18
    state = read_state(undisturbed, "ckpt_best.pt")
    assert (state["iter_num"], state["best_val_loss"]) == (best, val[best])
    assert (read_state(undisturbed)["iter_num"], read_state(undisturbed)["best_val_loss"]) == (20, val[best])
    assert read_state(undisturbed, "ckpt_prev.pt")["iter_num"] == 17  # the dense switch
    run(parts, stop_at(18, 0), **changes)
    run(parts, **changes)
    for name in (checkpoint.NAME, "ckpt_best.pt"):
        assert state_differences(read_state(parts, name), read_state(undisturbed, name)) == []


def test_a_finished_run_and_eval_only_change_no_file(run, reference, tmp_path):
    out, _ = reference
    before = contents(out)
    assert "all of max_iters=32 iterations are done; raise max_iters" in run(out)
    last = read_rows(out)[-1]["val_loss"]
    assert re.search(rf"^iter +32/32  dense +val {last:.4f}, hard-pruned", run(out, eval_only=True), re.M)
    assert contents(out) == before
    run(tmp_path / "new", eval_only=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "remedy"), [({}, ""), ({"init_from": "scratch"}, " with --init_from=resume")], ids=str
)
def test_a_stop_prints_how_to_continue(run, tmp_path, changes, remedy):
    text = run(tmp_path / "out", stop_at(2, 3, "SIGINT"), **changes)
    said = rf"^stopped after iteration 3, saved in .*ckpt\.pt; to continue, run the same command again{remedy}$"
    assert re.search(said, text, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "said"), [((0, 0), "at iteration 1;"), ((MAX_ITERS - 1, 2), "at iteration 32;")])
def test_a_stop_in_the_first_or_the_last_step_loses_nothing(run, reference, tmp_path, stop, said):
    run(tmp_path / "out", stop_at(*stop))
    assert said in run(tmp_path / "out")
    assert run_differences(tmp_path / "out", reference[0]) == []


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_the_exit_status_of_a_stop_names_the_signal(attempt, tmp_path, name, status):
    done = attempt(tmp_path / "out", stop_at(0, 0, name), eval_interval=0)
    assert (done.returncode, done.stderr) == (status, "")
    assert (read_state(tmp_path / "out")["iter_num"], read_state(tmp_path / "out")["finished"]) == (1, False)


def test_ctrl_c_during_the_start_ends_in_one_word(attempt, tmp_path, monkeypatch):
    monkeypatch.setattr(train.setup, "load_inputs", Mock(side_effect=KeyboardInterrupt))
    done = attempt(tmp_path / "out")
    assert (done.returncode, done.stderr) == (130, "train.py: stopped\n")
    assert not (tmp_path / "out").exists()


def in_evaluation(count):
    return {"kind": "signal_in_evaluation", "signal": "SIGUSR1", "count": count}


@pytest.mark.parametrize(
    ("count", "saved"),
    [
        (3, 8),  # the evaluations at 0, 8, 16, 24 and 32 have two batches each, and so has the pruned one
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (9, MAX_ITERS), (10, MAX_ITERS))],
        (11, MAX_ITERS),
    ],
)
def test_a_stop_in_an_evaluation_repeats_it(run, reference, tmp_path, count, saved):
    out = tmp_path / "out"
    assert f"stopped after iteration {saved}, saved in" in run(out, in_evaluation(count))
    state = read_state(out)
    assert (state["iter_num"], state["finished"]) == (saved, False)
    assert saved < MAX_ITERS or differences(state["model"], read_state(reference[0])["model"]) == []
    assert f"at iteration {saved};" in run(out)
    assert read_state(out)["finished"]
    assert run_differences(out, reference[0]) == []
    assert "are done" in run(out)


def test_a_stop_in_the_last_batch_is_too_late(attempt, tmp_path):
    done = attempt(tmp_path / "out", in_evaluation(4), max_iters=2, dense_start=2)  # two of them at iteration 0
    assert (done.returncode, read_state(tmp_path / "out")["finished"]) == (0, True)


def test_eval_only_stops_too(attempt, reference):
    before = contents(reference[0])
    assert attempt(reference[0], in_evaluation(1), eval_only=True).returncode == 138
    assert contents(reference[0]) == before


def test_a_checkpoint_of_an_earlier_release_is_finished(run, reference, tmp_path):
    state = read_state(reference[0])
    del state["finished"]
    (tmp_path / "out").mkdir()
    checkpoint.save(tmp_path / "out", state)
    assert "are done" in run(tmp_path / "out")


@pytest.mark.slow
def test_a_kill_after_the_last_save_loses_no_evaluation(run, data, tmp_path):
    changes = {"max_iters": 12, "dense_start": 12, "eval_interval": 0}
    fault = {"kind": "kill_in_save", "point": "the new one is ckpt.pt", "count": 3}
    assert launch(tmp_path / "out", {**SETTINGS, "dataset": data, **changes}, fault).returncode == -9
    assert "are done" in run(tmp_path / "out", **changes)
    assert read_rows(tmp_path / "out")[-1]["val_loss_24"] is not None


# ---------------------------------------------------------------------------------------------------------------------
# Other dtypes, torch.compile


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
    undisturbed, parts = tmp_path / "undisturbed", tmp_path / "parts"
    run(undisturbed, **changes)
    assert read_state(undisturbed)["scaler"]["scale"] > 1
    run(parts, stop_at(2), **changes)
    assert read_state(parts)["scaler"]["_growth_tracker"] == 3
    run(parts, **changes)
    assert run_differences(parts, undisturbed) == []
    assert read_state(parts)["scaler"]["_growth_tracker"] == 6


def check_compiled(run, folder, **changes):
    """A compiled run has the numbers of an eager run, through both phases and both kinds of evaluation."""
    changes = {"n_layer": 1, "max_iters": 2, "dense_start": 1, "gradient_accumulation_steps": 1, **changes}
    changes["dropout"] = 0.0  # compiled code draws other numbers
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
    """Only torch.compile's front end runs, without code generation."""
    compile_model, modes = torch.compile, []
    front_end = lambda model, mode: modes.append(mode) or compile_model(model, backend="aot_eager")  # noqa: E731
    monkeypatch.setattr(torch, "compile", front_end)
    check_compiled(run, tmp_path / "layers", max_iters=4, dense_start=1)
    graphs = {"compile_mode": "reduce-overhead", "gradient_accumulation_steps": 3}
    check_compiled(run, tmp_path / "plan", max_iters=4, dense_start=2, spmm="masked", **graphs)
    assert modes == ["default", "reduce-overhead"]


def test_cuda_graphs_accumulate_gradients_in_fixed_tensors(run, tmp_path, monkeypatch):
    """A CUDA graph overwrites its results at its next replay, so they must not become gradients."""
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
    assert [any(grads) for grads in seen] == [False, True, True, True] * 3
    seen.clear()
    run(tmp_path / "graphs", **options, compile_mode="reduce-overhead")
    assert len(seen) == 3 * 4
    assert all(grads == seen[0] and all(grads) for grads in seen)
    assert differences(*(read_state(tmp_path / name)["model"] for name in ("default", "graphs"))) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which is not installed")
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile cannot link against a torch whose path has a space")
def test_torch_compile_trains_through_both_phases(run, tmp_path):
    """Takes 25 s for inductor's code, or 5 s with its cache filled."""
    check_compiled(run, tmp_path, eval_interval=0)

"""runtime/health.py: the dense run's flip rate, warnings, outliers among the losses, and skipped steps."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import SETTINGS, launch, read_rows, read_state, state_differences

from methods import act24
from runtime import health
from runtime.health import HEALTHY, TARGET, FlipReference, FlipWatch, LossWatch, StepGuard
from sparse24 import sparsify

COMPARED = dict.fromkeys(health.COMPARABLE, 1) | {"flip_mask": "transposable"}


def record(folder, rates, lr=lambda i: 1e-3, **config):
    folder.mkdir()
    rows = [{"iter": i, "phase": "dense", "flip_rate": r, "lr": lr(i)} for i, r in rates]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({**COMPARED, "sparse": "none", **config}))
    return folder


def reference_of(*args, **options):
    return FlipReference(record(*args, **options), COMPARED)


def test_the_reference_is_the_smoothed_curve_and_then_proportional_to_the_learning_rate(tmp_path):
    assert HEALTHY == (0.60, 0.95)
    assert math.isclose(TARGET / HEALTHY[0], HEALTHY[1] / TARGET)
    rates = [(10 * i, 0.001 * i) for i in range(21)]
    reference = reference_of(tmp_path / "dense", rates, lr=lambda i: 1e-3 if i < 150 else 2e-3)
    assert reference.rate(100, 1e-3) == pytest.approx(0.010)
    assert reference.rate(105, 1e-3) == pytest.approx(0.0105)
    # The last five measurements have a mean of 0.018 at a learning rate of 2e-3.
    assert reference.rate(201, 1e-3) == pytest.approx(0.009)
    assert reference.rate(5000, 2e-4) == pytest.approx(0.0018)


def test_a_reference_is_continued_from_its_last_fifth_and_no_sooner(tmp_path):
    reference = reference_of(tmp_path / "dense", [(10 * i, 0.001 * i) for i in range(40)])
    assert reference.rate(391, 1e-3) == pytest.approx(0.0355)  # of 32 to 39
    assert reference.rate(390, 1e-3) == pytest.approx(0.038)  # the curve's end, of 37 to 39


def test_five_flip_rates_are_enough_and_steps_without_a_learning_rate_do_not_count(tmp_path):
    rates = [(i, 0.01) for i in range(10)]
    reference = reference_of(tmp_path / "five", rates, lr=lambda i: 1e-3 if i < 5 else 0.0)
    assert reference.rate(99, 2e-3) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="4 flip rates, need 5 or more"):
        reference_of(tmp_path / "four", rates, lr=lambda i: 1e-3 if i < 4 else 0.0)


class Block(torch.nn.Module):
    """A feed-forward layer of act24 with given counts."""

    def __init__(self, over_two: int, dropped: float, joined: bool):
        super().__init__()
        self.c_fc, self.c_proj = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        sparsify(self, "act24", ["c_fc", "c_proj"])
        self.c_proj.counts.copy_(torch.tensor([300, over_two, 100]))
        self.c_proj.energy.copy_(torch.tensor([1.0, dropped]))
        self.c_proj.joined = joined


def test_activations_are_reported_by_block_with_who_has_joined_and_one_warning(capsys):
    model = torch.nn.ModuleList([Block(20, 0.5, False), Block(2, 0.03, True), Block(1, 0.01, True)])
    meter = health.ActivationMeter(model, SimpleNamespace(master=True))
    row = {"iter": 2 * act24.INTERVAL}
    meter.after_step(row)
    assert row == {
        "iter": 2 * act24.INTERVAL,
        "zeros": [0.75] * 3,
        "over_two": [0.2, 0.02, 0.01],
        "energy_dropped": pytest.approx([0.5, 0.03, 0.01]),
        "joined": [0.0, 1.0, 1.0],
    }
    lines = capsys.readouterr().out.splitlines()
    many = "dense, because too many groups have more than two non-zeros: 0 (20.0%)"
    assert lines[0] == f"iteration 200: 2:4 activations in blocks 1, 2; {many}"
    assert lines[1].startswith(
        "warning, iteration 200: 2:4 drops 3.0% of the energy of block 1's activations, more than"
    )
    assert len(lines) == 2
    between, later = {"iter": 201}, {"iter": 300}
    meter.after_step(between)
    meter.after_step(later)
    assert between == {"iter": 201}
    assert later["joined"] == [0.0, 1.0, 1.0]
    assert capsys.readouterr().out == ""
    model[1].c_proj.joined = False
    meter.after_step({"iter": 301})
    assert "2:4 activations in blocks 2; dense" in capsys.readouterr().out


def test_a_model_without_act24_has_no_activations_to_report(capsys):
    row = {"iter": 0}
    health.ActivationMeter(torch.nn.Linear(4, 4), SimpleNamespace(master=True)).after_step(row)
    assert row == {"iter": 0}
    assert capsys.readouterr().out == ""


# Repeated here, so that COMPARABLE cannot lose one.
NAMES = "dataset n_layer n_head n_embd activation ffn_ratio block_size batch_size gradient_accumulation_steps "
NAMES += "learning_rate warmup_iters decay_lr lr_decay_iters min_lr grad_clip weight_decay beta1 beta2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *[({name: 2}, rf"does not compare with this run: {name}=1 \(there 2\);") for name in NAMES.split()],
        ({"sparse": "fst"}, r"sparse=none \(there fst\)"),
        ({"flip_mask": "row"}, r"flip_mask=transposable \(there row\)"),
        ({"sparse_layers": "ffn+attn"}, r"dense has sparse_layers='ffn\+attn', need 'ffn': the setting was removed"),
    ],
)
def test_a_reference_that_does_not_compare_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        reference_of(tmp_path / "dense", [(i, 0.01) for i in range(9)], **config)


# ---------------------------------------------------------------------------------------------------------------------
# Warnings of flip rates


class Constant:
    """A dense run whose flip rate never changes."""

    def __init__(self, flip_rate=0.01):
        self.flip_rate = flip_rate

    def rate(self, iter_num, lr):
        return self.flip_rate


def watched(rates, reference=None, first=0):
    """{step: warnings} of a run whose warm-up ends at 10, and whose schedule ends at 110."""
    watch = FlipWatch(10, 110, reference)
    return {i: texts for i, r in enumerate(rates, first) if (texts := watch.add(i, r, 1e-3))}


@pytest.mark.parametrize(
    ("rates", "reference", "steps"),
    [
        ([0.011] * 40, Constant(), [14]),  # five measurements past the warm-up
        ([0.01] * 20, Constant(), [14]),  # equal to the dense run's
        ([0.01] * 20, Constant(0.0), [14]),
        ([0.02] * 20 + [0.001] * 10 + [0.02] * 20, Constant(), [14]),  # it comes back
        ([0.0095] * 40, Constant(), []),
        ([0.05] * 10 + [0.009] * 30, Constant(), []),  # high only during the warm-up
        ([0.013 if i % 5 == 0 else 0.009 for i in range(40)], Constant(), []),  # one high measurement
        ([0.011] * 40, None, []),  # nothing to compare with
    ],
)
def test_an_explosion_is_reported_once(rates, reference, steps):
    found = watched(rates, reference)
    assert list(found) == steps
    assert all("times the dense run's" in texts[0] for texts in found.values())


@pytest.mark.parametrize(
    ("rates", "first", "steps"),
    [
        ([0.01 * min(1, i / 20) for i in range(110)], 0, [60]),
        ([0.01 * min(1, i / 20, (110 - i) / 60) for i in range(110)], 0, []),
        ([0.01] * 61, 50, [80]),  # the sparse phase begins late
        ([0.01 * (111 - i) / 61 for i in range(50, 111)], 50, []),
        ([0.01] * 40 + [0.0092] * 30, 0, [60]),
        ([0.01] * 40 + [0.0088] * 30, 0, []),  # more than a tenth below the peak
    ],
)
def test_a_flip_rate_that_does_not_fade_is_reported_once_half_way(rates, first, steps):
    assert list(watched(rates, first=first)) == steps


def test_the_peak_is_the_mean_of_five():
    spike = [0.012 if i == 30 else 0.01 for i in range(70)]
    assert "has not fallen from its peak of 0.01040" in watched(spike)[60][0]
    assert "1.10 times the dense run's" in watched([0.011] * 15, Constant())[14][0]


# ---------------------------------------------------------------------------------------------------------------------
# Outliers among the losses


def test_an_outlier_is_found_and_does_not_enter_the_mean():
    watch, noise = LossWatch(), np.random.default_rng(0).normal(3, 0.1, 500)
    assert [watch.add(float(x)) for x in noise] == [None] * 500
    assert re.match(r"loss 4\.5000, while the last 200 were \d\.\d+ \+- 0\.\d+", watch.add(4.5))
    assert watch.add(4.5) is not None
    assert watch.add(1.0) is None
    assert watch.add(float("nan")) == "loss nan"
    assert watch.add(float("inf")) == "loss inf"


def test_a_new_level_of_the_loss_is_reported_for_a_while():
    watch = LossWatch()
    for x in np.random.default_rng(0).normal(3, 0.1, 100):
        watch.add(float(x))
    found = [watch.add(float(x)) is not None for x in np.random.default_rng(1).normal(6, 0.1, 150)]
    assert found == [True] * LossWatch.LEAST + [False] * (150 - LossWatch.LEAST)
    watch = LossWatch()
    assert [watch.add(x) for x in [3.0] * (LossWatch.LEAST - 1) + [50.0]] == [None] * LossWatch.LEAST  # too few


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


def nan_at(*iter_nums):
    return {"kind": "nan", "iter_nums": list(iter_nums)}


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(run, tmp_path):
    text = run(tmp_path / "out", nan_at(5), max_iters=7, dense_start=7, checkpoint_interval=1, eval_interval=1)
    run(tmp_path / "before", max_iters=5, dense_start=7, checkpoint_interval=1)
    # the previous save, of iteration 6, is the first one after the skipped step
    before, after = read_state(tmp_path / "before"), read_state(tmp_path / "out", "ckpt_prev.pt")
    assert (before["iter_num"], after["iter_num"]) == (5, 6)
    assert state_differences(after["model"], before["model"]) == []
    assert state_differences(after["optimizer"]["state"], before["optimizer"]["state"]) == []
    rows = read_rows(tmp_path / "out")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 0, 1, 1, None]
    assert rows[5]["train_loss"] is rows[5]["grad_norm"] is rows[5]["decay_ratio"] is None
    assert rows[6]["train_loss"] > 0
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "warning, iteration 5: gradient norm nan, step skipped" in text
    assert re.search(r"warning, rank 0: loss nan; iteration 5, micro-batch 0, windows at tokens \d+", text)
    assert all(torch.isfinite(t).all() for t in read_state(tmp_path / "out")["model"].values() if torch.is_tensor(t))


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_with_the_last_checkpoint(attempt, run, tmp_path, monkeypatch):
    """A restart must not reset the count, because the checkpoint may be from within the row."""
    monkeypatch.setattr(StepGuard, "MAX_SKIPPED", 5)
    for _ in range(2):
        done = attempt(tmp_path / "out", nan_at(*range(9, 40)), eval_interval=4)
        assert done.returncode == 1
        assert "train.py: error: the last 6 gradients were not finite" in done.stderr
        assert "lower learning_rate" in done.stderr
        assert "Traceback" not in done.stderr
        state = read_state(tmp_path / "out")
        assert (state["iter_num"], state["skipped"]) == (12, [3, 3])
        assert all(torch.isfinite(t).all() for t in state["model"].values() if torch.is_tensor(t))
    run(tmp_path / "out")
    assert read_rows(tmp_path / "out")[-2]["skipped"] == 3


def is_finite(state):
    return all(torch.isfinite(tensor).all() for tensor in state["model"].values() if torch.is_tensor(tensor))


def test_weights_whose_loss_is_not_finite_are_not_saved(run, tmp_path):
    """Also at a stop. The validation loss at iteration 8 is finite, and later than the training losses."""
    out = tmp_path / "out"
    changes = {"checkpoint_interval": 1, "always_save_checkpoint": False, "dense_start": 9}
    text = run(out, nan_at(5, 7), max_iters=8, **changes)
    assert re.findall(r"^warning: the loss at iteration (\d+) is not finite, .*/ckpt.pt$", text, re.M) == ["6"]
    assert [read_state(out, name)["iter_num"] for name in ("ckpt.pt", "ckpt_prev.pt", "ckpt_best.pt")] == [8, 7, 8]


def test_a_stop_keeps_the_last_good_checkpoint(attempt, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(StepGuard, "check", lambda self, *_: setattr(self, "loss", math.nan))
    done = attempt(out, {"kind": "signal", "signal": "SIGTERM", "iter_num": 2, "micro_batch": 0})
    assert done.returncode == 143
    assert "the loss at iteration 3 is not finite, so it is not saved; the last checkpoint is none\n" in done.stdout
    assert "stopped after iteration 3, not saved; to continue, run the same command again" in done.stdout
    assert not (out / "ckpt.pt").exists()


def test_a_run_that_ends_in_nan_is_no_success(attempt, run, tmp_path):
    out = tmp_path / "out"
    changes = {"learning_rate": 1e30, "warmup_iters": 4, "checkpoint_interval": 1, "eval_interval": 0, "max_iters": 9}
    run(out, **{**changes, "learning_rate": 1e-3, "max_iters": 3, "dense_start": 9})
    for _ in range(2):
        done = attempt(out, **changes, dense_start=9)
        assert done.returncode == 1
        said = r"train\.py: error: the loss at iteration 9 is not finite, so it is not saved; the last checkpoint is "
        assert re.fullmatch(rf"{said}.*ckpt\.pt; lower learning_rate, or look at the data\n", done.stderr)
        assert read_state(out)["iter_num"] < 9
        assert is_finite(read_state(out))
        assert [row["iter"] for row in read_rows(out)] == [*range(10)]
        assert math.isfinite(read_state(out)["best_val_loss"])
    assert "done:" not in done.stdout


def test_just_enough_in_a_row_do_not(run, tmp_path, monkeypatch):
    monkeypatch.setattr(StepGuard, "MAX_SKIPPED", 3)
    run(tmp_path / "out", nan_at(4, 5, 6, 8, 9, 10), max_iters=12)
    assert read_state(tmp_path / "out")["skipped"] == [6, 0]


@pytest.mark.slow
def test_all_ranks_skip_the_step_if_one_has_a_nan(data, tmp_path):
    done = launch(tmp_path / "out", {**SETTINGS, "dataset": data, "max_iters": 5}, nan_at(2), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "warning, rank 1: loss nan; iteration 2, micro-batch 1" in done.stdout
    assert read_state(tmp_path / "out")["skipped"] == [1, 0]

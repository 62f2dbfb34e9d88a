"""runtime/health.py: the dense run's curve and warnings, on planted curves."""

import json
import math

import pytest

from runtime import health
from runtime.health import HEALTHY, TARGET, FlipReference, FlipWatch, smooth

SETTINGS = dict.fromkeys(health.COMPARABLE, 1)


def record(folder, rates, lr=lambda i: 1e-3, **config):
    folder.mkdir()
    rows = [{"iter": i, "phase": "dense", "flip_rate": r, "lr": lr(i)} for i, r in rates]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {**SETTINGS, "sparse": "none", "flip_mask": "transposable", **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Constant:
    """A dense run whose flip rate never changes."""

    def rate(self, iter_num, lr):
        return 0.01


def test_the_reference_is_the_smoothed_curve_and_goes_on_with_the_learning_rate(tmp_path):
    folder = record(
        tmp_path / "dense", [(10 * i, 0.001 * i) for i in range(21)], lr=lambda i: 1e-3 if i < 150 else 2e-3
    )
    reference = FlipReference(folder, SETTINGS, "transposable")
    assert reference.rate(100, 1e-3) == pytest.approx(0.010)
    assert reference.rate(105, 1e-3) == pytest.approx(0.0105)
    # The last five measurements have a mean of 0.018 at a learning rate of 2e-3.
    assert reference.rate(201, 1e-3) == pytest.approx(0.009)
    assert reference.rate(5000, 2e-4) == pytest.approx(0.0018)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparse": "fst"}, r"sparse=none \(there fst\)"),
        ({"learning_rate": 2}, r"does not compare with this run: learning_rate=1 \(there 2\)"),
        ({"sparse_layers": "ffn+attn"}, r"dense has sparse_layers='ffn\+attn', need 'ffn': the setting was removed"),
        ({"flip_mask": "row"}, r"flip_mask=transposable \(there row\)"),
    ],
)
def test_a_reference_that_does_not_compare_is_refused(tmp_path, config, message):
    folder = record(tmp_path / "dense", [(i, 0.01) for i in range(9)], **config)
    with pytest.raises(ValueError, match=message):
        FlipReference(folder, SETTINGS, "transposable")


def test_a_reference_needs_flip_rates(tmp_path):
    with pytest.raises(ValueError, match="4 flip rates, need 5 or more"):
        FlipReference(record(tmp_path / "dense", [(i, 0.01) for i in range(4)]), SETTINGS, "transposable")


def watched(rates, reference=None, warmup=10, end=110):
    watch = FlipWatch(warmup, end, reference)
    return {i: texts for i, r in enumerate(rates) if (texts := watch.add(i, r, 1e-3))}


def test_an_explosion_is_told_once_after_five_measurements_past_the_warm_up():
    found = watched([0.011] * 40, Constant())
    assert list(found) == [14]
    assert "1.10 times the dense run's" in found[14][0]
    assert watched([0.0095] * 40, Constant()) == {}
    assert watched([0.05] * 10 + [0.009] * 30, Constant()) == {}  # during the warm-up nothing counts
    assert watched([0.011] * 40) == {}  # nothing to compare with


def test_one_high_measurement_is_no_explosion():
    assert watched([0.013 if i % 5 == 0 else 0.009 for i in range(40)], Constant()) == {}


def test_a_flip_rate_that_does_not_fade_is_told_once_half_way():
    rises = [0.01 * min(1, i / 20) for i in range(110)]
    found = watched(rises)
    assert list(found) == [60]
    assert "has not come down from its peak of 0.01000" in found[60][0]
    assert watched([0.01 * min(1, i / 20, (110 - i) / 60) for i in range(110)]) == {}


def test_a_sparse_phase_that_begins_late_is_given_half_of_what_is_left():
    watch = FlipWatch(10, 110)
    rates = {i: 0.01 * (111 - i) / 61 for i in range(50, 111)}
    assert not any(watch.add(i, r, 1e-3) for i, r in rates.items())
    watch = FlipWatch(10, 110)
    assert [i for i in rates if watch.add(i, 0.01, 1e-3)] == [80]


def test_the_target_is_the_middle_of_the_papers_band():
    assert HEALTHY == (0.60, 0.95)
    assert math.isclose(TARGET / HEALTHY[0], HEALTHY[1] / TARGET)
    assert smooth([1.0, 4.0, 1.0], 1) == [2.5, 2.0, 2.5]


# ---------------------------------------------------------------------------------------------------------------------
# Faults that were made by hand, and that nothing above had found


class Never:
    """A dense run whose masks never flip."""

    def rate(self, iter_num, lr):
        return 0.0


@pytest.mark.parametrize(
    "name",
    [
        *("dataset", "n_layer", "n_head", "n_embd", "activation", "ffn_ratio"),
        *("block_size", "batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_iters", "decay_lr"),
        *("lr_decay_iters", "min_lr", "grad_clip", "weight_decay", "beta1", "beta2"),
    ],
)
def test_two_runs_compare_by_model_batch_and_schedule(tmp_path, name):
    folder = record(tmp_path / "dense", [(i, 0.01) for i in range(9)], **{name: 2})
    with pytest.raises(ValueError, match=rf" {name}=1 \(there 2\)"):
        FlipReference(folder, {**SETTINGS, name: 1}, "transposable")


def test_a_reference_is_continued_from_its_last_fifth_and_no_sooner(tmp_path):
    folder = record(tmp_path / "dense", [(10 * i, 0.001 * i) for i in range(40)])
    reference = FlipReference(folder, SETTINGS, "transposable")
    assert reference.rate(391, 1e-3) == pytest.approx(0.0355)  # of 32 to 39
    assert reference.rate(390, 1e-3) == pytest.approx(0.038)  # the curve's own end, of 37 to 39


def test_a_reference_of_five_flip_rates_is_enough_and_steps_without_a_learning_rate_do_not_count(tmp_path):
    folder = record(tmp_path / "dense", [(i, 0.01) for i in range(10)], lr=lambda i: 1e-3 if i < 5 else 0.0)
    assert FlipReference(folder, SETTINGS, "transposable").rate(99, 2e-3) == pytest.approx(0.02)


def test_a_flip_rate_as_high_as_the_dense_runs_is_an_explosion():
    assert list(watched([0.01] * 20, Constant())) == [14]


def test_an_explosion_that_comes_back_is_not_told_again():
    assert list(watched([0.02] * 20 + [0.001] * 10 + [0.02] * 20, Constant())) == [14]


def test_flips_beside_a_dense_run_that_has_none_are_an_explosion():
    assert list(watched([0.01] * 20, Never())) == [14]


def test_the_peak_is_that_of_five_and_a_tenth_below_it_is_enough():
    spike = [0.012 if i == 30 else 0.01 for i in range(70)]
    assert list(watched(spike)) == [60]
    assert "from its peak of 0.01040" in watched(spike)[60][0]
    assert list(watched([0.01] * 40 + [0.0092] * 30)) == [60]
    assert watched([0.01] * 40 + [0.0088] * 30) == {}

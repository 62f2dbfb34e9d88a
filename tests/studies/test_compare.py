"""studies.compare: its runs are real, a finished study is not run again, and its arithmetic is right."""

import json
import math
import statistics
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from harness import make_dataset

from benchmarks import roofline
from model import PRESETS, GPTConfig
from sparse24 import recipe_names
from studies import compare, cost, grids, report
from studies.grids import FST, STUDIES, Study
from studies.report import paired

CPU = grids.PRESETS["cpu"]
TINY = "n_layer=1 n_head=2 n_embd=16 block_size=8 batch_size=4 max_iters=4 lr_decay_iters=4 eval_interval=2"


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "tiny")


@pytest.fixture
def fake_training(monkeypatch):
    """train.py replaced: a run's loss is its position in `started` plus its seed. Returns the list of started runs."""
    started = []

    def fake(command, **options):
        settings = dict(word[2:].split("=", 1) for word in command[2:])
        out = settings.pop("out_dir")
        numbers = {
            name: compare.configure({name: 0.0}, [f"--{name}={v}"])[name]
            for name, v in settings.items()
            if is_number(v)
        }
        ints = ("max_iters", "batch_size", "block_size", "gradient_accumulation_steps", "seed")
        config = settings | numbers | {name: int(settings[name]) for name in ints if name in settings}
        write_run(out, config, 100 * int(settings["seed"]) + len(started))
        started.append(settings)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", fake)
    return started


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_run(folder, config, loss, pruned=None, iteration=None):
    """What a run of train.py leaves: its settings and a last row."""
    row = {"iter": config["max_iters"] if iteration is None else iteration, "phase": "dense", "val_loss": loss}
    row |= {} if pruned is None else {"val_loss_24": pruned}
    for name, text in (("metrics.jsonl", row), ("config.json", config | {"environment": {"torch": "x"}})):
        with open(f"{folder}/{name}", "w") as file:
            file.write(json.dumps(text) + "\n")


def arguments(tmp_path, *words):
    return compare.parse([*words, f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"])


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.slow
def test_real_runs_are_resumed_skipped_and_put_into_a_table_and_a_figure(tmp_path, data, monkeypatch, capsys):
    variants = {"dense": "sparse=none", "fst": "sparse=fst mask_interval=2"}
    monkeypatch.setitem(compare.STUDIES, "methods", Study(variants))
    monkeypatch.setitem(compare.PRESETS, "cpu", f"{CPU} {TINY}")
    words = [
        "methods",
        f"--dataset={data}",
        "--seeds=1",
        f"--out_dir={tmp_path / 'out'}",
        f"--results={tmp_path / 'r'}",
    ]
    compare.main(words)
    found = json.loads((tmp_path / "r" / "methods-tiny.json").read_text())
    root = tmp_path / "out" / "cpu-tiny"
    runs = [root / "sparse=none-seed1", root / "mask_interval=2_sparse=fst-seed1"]
    assert [compare.read_config(run)["sparse"] for run in runs] == ["none", "fst"]
    losses = [compare.last_row(run)["val_loss"] for run in runs]
    assert found["val_loss"] == {v: [loss] for v, loss in zip(variants, losses, strict=True)}
    assert all(0 < loss < 3.5 for loss in losses)
    assert found["environment"]["torch"]
    assert "`python -m studies.compare methods --dataset=tiny --seeds=1`" in capsys.readouterr().out
    assert (tmp_path / "r" / "methods-tiny.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started"))
    compare.main(words)
    assert json.loads((tmp_path / "r" / "methods-tiny.json").read_text()) == found


@pytest.mark.slow
def test_a_failing_run_stops_the_study_and_names_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"--learning_rat=1 --max_iters=4 failed; see .*log\.txt"):
        compare.run(tmp_path / "bad", {"learning_rat": "1", "max_iters": "4"})
    assert "did you mean 'learning_rate'" in (tmp_path / "bad" / "log.txt").read_text()


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    """train.py ends in peace on Ctrl-C, having saved."""

    def stopped(command, **_):
        write_run(tmp_path, {"max_iters": 4}, 1.0, iteration=2)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", stopped)
    with pytest.raises(RuntimeError, match=r"was stopped; see .*log\.txt"):
        compare.run(tmp_path, {"max_iters": "4"})


def test_finished_means_at_the_end_with_a_loss_and_the_same_settings(tmp_path):
    config = {"max_iters": 4, "masked_decay": 2e-4, "mvue": True, "dataset": "x"}
    wanted = {"max_iters": "4", "masked_decay": "0.0002", "mvue": "True", "dataset": "x"}
    assert not compare.is_finished(tmp_path, wanted)
    for loss, iteration, finished in ((1.5, 4, True), (1.5, 3, False), (None, 4, False)):
        write_run(tmp_path, config, loss, iteration=iteration)
        assert compare.is_finished(tmp_path, wanted) == finished
    with pytest.raises(ValueError, match=r"masked_decay=6e-5 \(there 0\.0002\), mvue=False \(there True\); delete it"):
        compare.is_finished(tmp_path, wanted | {"masked_decay": "6e-5", "mvue": "False"})
    with pytest.raises(ValueError, match=r"another run: fp8=True \(there missing\)"):
        compare.is_finished(tmp_path, wanted | {"fp8": "True"})


def test_runs_go_seed_by_seed_and_are_shared_between_labels_and_studies(tmp_path, fake_training):
    args = arguments(tmp_path, "phases", "--seeds=2", "--jobs=1")
    runs = compare.run_and_read({"a": FST, "the same": f"{FST} max_iters=2500", "b": "sparse=none"}, args)
    assert [run["seed"] + run["sparse"] for run in fake_training] == ["1fst", "1none", "2fst", "2none"]
    assert runs["a"] == runs["the same"] != runs["b"]
    assert compare.run_and_read({"c": "mask_interval=40 sparse=fst masked_decay=2e-3"}, args)["c"] == runs["a"]
    assert len(fake_training) == 4


def test_only_runs_a_part_and_the_table_has_all_that_is_finished(tmp_path, fake_training, capsys):
    variants = {"a": "sparse=none", "b": FST, "c": "sparse=ste"}
    assert list(compare.run_and_read(variants, arguments(tmp_path, "methods", "--only", "fst"))) == []
    args = arguments(tmp_path, "methods", "--seeds=1", "--jobs=1")
    args.only = ["a"]
    compare.run_and_read(variants, args)
    args.only = ["c"]
    assert list(compare.run_and_read(variants, args)) == ["a", "c"]
    assert "seeds are missing: b" in capsys.readouterr().out
    assert len(fake_training) == 2
    args.seeds, args.table_only = 2, True
    assert compare.run_and_read(variants, args) == {}
    assert len(fake_training) == 2
    with pytest.raises(SystemExit):
        arguments(tmp_path, "methods", "--only", "fts")
    assert "methods has no 'fts'; it has 'dense', 'half', 'fst'" in capsys.readouterr().err


def test_a_run_is_locked_for_other_studies_as_long_as_train_lives(tmp_path, monkeypatch):
    """train.py inherits the open file, so the lock outlives a study that was killed."""
    take = f"import fcntl; fcntl.flock(open({str(tmp_path / 'lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    (tmp_path / "train.py").write_text(
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {take!r}])\n"
        "print([os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')])\n"
    )
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="was stopped"):
        compare.run(tmp_path, {"max_iters": "1"})
    log = (tmp_path / "log.txt").read_text()
    assert "BlockingIOError" in log
    assert f"'{tmp_path / 'lock'}'" in log.splitlines()[-1]
    subprocess.run([sys.executable, "-c", take], check=True)  # and is free again


# ---------------------------------------------------------------------------------------------------------------------
# Grids


def test_every_grid_is_settings_of_train_and_has_its_references():
    import train

    for name, grid in STUDIES.items():
        assert set(grid.references) <= grid.variants.keys(), name
        for settings in grid.variants.values():
            compare.configure(vars(train), [f"--{word}" for word in settings.split()])
    for preset in grids.PRESETS.values():
        compare.configure(vars(train), [f"--{word}" for word in preset.split()])
    assert {grids.words(v)["sparse"] for v in STUDIES["methods"].variants.values()} == {"none", *recipe_names()}


def test_table7_is_the_papers_five_rows():
    rows = [cost.recipe_of(settings) for settings in list(STUDIES["table7"].variants.values())[1:]]
    found = [(row.masked_decay, row.mvue, round(row.dense_finetune, 4)) for row in rows]
    assert found == [(0, False, 0), (2e-3, False, 0), (2e-3, True, 0), (2e-3, False, 0.1667), (2e-3, True, 0.1667)]


# ---------------------------------------------------------------------------------------------------------------------
# Costs


def share(settings):
    return cost.flops_of(f"{CPU} {settings}", 65) / cost.flops_of(CPU, 65)


def test_flops_by_hand():
    """4 blocks of 12 d^2 weights, of which 8 d^2 are the feed-forward layer's, and lm_head; attention's products."""
    d, total = 64, 6 * (4 * 12 * 64**2 + 65 * 64) + 12 * 4 * 64 * 64
    ffn = 6 * 4 * 8 * d**2
    gemm = ffn / 6
    assert cost.flops_of(CPU, 65) == total
    assert share("sparse=none ffn_ratio=2") == pytest.approx(1 - ffn / 2 / total)
    assert share("sparse=fst dense_finetune=0") == pytest.approx(1 - ffn / 2 / total)
    assert share(FST) == pytest.approx(1 - 5 / 6 * ffn / 2 / total)
    assert share(f"{FST} dense_pretrain=0.5") == pytest.approx(1 - 1 / 3 * ffn / 2 / total)
    assert share("sparse=ste") == pytest.approx(1 - 4 * gemm / 2 / total)
    assert share("sparse=sr_ste") == pytest.approx(1 - 2 * gemm / 2 / total)
    assert share("sparse=bi_mask") == pytest.approx(1 - 4 * gemm / 2 / total)
    assert share("sparse=s_ste") == pytest.approx(1 - 4 * gemm / 2 / total)
    assert share("sparse=s_ste ffn_ratio=8") == pytest.approx((total + ffn - 8 * gemm / 2) / total)
    assert cost.flops_of(CPU, 50257) - total == 6 * 64 * (50304 - 65)  # the vocabulary is padded


def test_a_cost_that_is_not_known_before_is_refused():
    with pytest.raises(ValueError, match="equal cost needs a dense phase of known length"):
        cost.flops_of(f"{CPU} sparse=step", 65)


def test_predicted_times_are_rooflines():
    p = PRESETS["774M"]
    shape = (roofline.GPUS["h200"], p["n_layer"], 1280)
    batch = {"batch_size": 16, "accumulation": 32}
    dense = roofline.train_step(*shape, 5120, 50304, 1024, **batch)["ms"]
    wide = roofline.train_step(*shape, 10240, 50304, 1024, **batch)["ms"]
    assert cost.predicted_ms("sparse=none", "h200", "774M", 1.5) == dense
    assert cost.predicted_ms("sparse=none ffn_ratio=8", "h200", "774M", 1.5) == wide
    all_six = roofline.train_step(*shape, 10240, 50304, 1024, **batch, sparse={"ratio": 1.5, "mask_interval": 40})["ms"]
    found = cost.predicted_ms(f"{FST} ffn_ratio=8", "h200", "774M", 1.5)
    assert found == pytest.approx(wide / 6 + all_six * 5 / 6)
    four = {"ratio": dict.fromkeys(("z", "y", "dw1", "dw2"), 2.0), "mask_interval": 1, "mvue": True}
    soft = roofline.train_step(*shape, 5120, 50304, 1024, **batch, sparse=four)["ms"]
    assert cost.predicted_ms("sparse=s_ste_straight", "h200", "774M", 2.0) == pytest.approx(soft)
    jacobian = 32 * 36 * 2 * 1280 * 5120 * 12 / roofline.GPUS["h200"].bandwidth * 1e3  # two fp32 read, one written
    assert cost.predicted_ms("sparse=s_ste", "h200", "774M", 2.0) == pytest.approx(soft + jacobian)
    two = {"ratio": dict.fromkeys(("z", "y"), 2.0), "mask_interval": 1, "mvue": False}
    row = roofline.train_step(*shape, 5120, 50304, 1024, **batch, sparse=two)["ms"]
    assert cost.predicted_ms("sparse=sr_ste", "h200", "774M", 2.0) == pytest.approx(row)


def test_equal_cost_runs_as_many_steps_as_cost_the_same(tmp_path, data, fake_training):
    args = arguments(tmp_path, "equal_cost", f"--dataset={data}", "--seeds=2")
    found, lines = compare.equal_cost(args)
    for name in ("FLOPs", "time"):
        assert found["cost"][name]["dense"] == 1
        assert found["steps"][name]["dense"] == 2500
        for label, spent in found["cost"][name].items():
            assert abs(spent * found["steps"][name][label] - 2500) <= spent / 2, (name, label)
    assert found["cost"]["FLOPs"]["fst"] != found["cost"]["time"]["fst"]
    counts = {int(run["max_iters"]) for run in fake_training if run["sparse"] == "fst" and "ffn_ratio" not in run}
    assert counts == {found["steps"][name]["fst"] for name in ("FLOPs", "time")}
    assert all(run["max_iters"] == run["lr_decay_iters"] and run["warmup_iters"] == "100" for run in fake_training)
    assert len(fake_training) == 2 * (2 * 8 - 1)  # the dense run is one
    assert found["val_loss"]["time"]["dense"] == found["val_loss"]["FLOPs"]["dense"]
    text = "\n".join(lines)
    assert "predicted step-time ratios of GPT-2 774M on H200, 2:4 GEMMs 1.5 x dense" in text
    [row] = [line for line in lines if line.startswith("| fst |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == str(found["steps"]["FLOPs"]["fst"])
    assert cells[4] == report.spread(found["val_loss"]["FLOPs"]["fst"])


def test_measured_step_times_replace_predicted_ones(tmp_path, data):
    labels = list(STUDIES["equal_cost"].variants)
    (tmp_path / "ms.json").write_text(json.dumps(dict(zip(labels, (10, 8, 9, 11, 12, 13, 14, 15), strict=True))))
    args = arguments(tmp_path, "equal_cost", f"--dataset={data}", f"--step_ms={tmp_path / 'ms.json'}")
    costs = compare.step_costs(STUDIES["equal_cost"].variants, args)["time"]
    assert list(costs.values()) == [1, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5]
    assert "measured in ms.json" in compare.equal_cost_note(args)
    (tmp_path / "ms.json").write_text('{"dense": 10}')
    with pytest.raises(ValueError, match=r"lacks fst, .*; measure them with --calibrate"):
        compare.step_costs(STUDIES["equal_cost"].variants, args)


def test_step_times_are_read_from_a_run_by_phase(tmp_path):
    """8 tokens a step: 4000, 5000, 8000 tokens/s are 2, 1.6 and 1 ms; a phase's first row holds its compiling."""
    speeds = {"sparse": (1, 4000, 5000, 5000), "dense": (2, 8000, 8000)}
    rows = [{"iter": 0, "phase": phase, "tokens_per_s": v} for phase, values in speeds.items() for v in values]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text('{"batch_size": 2, "block_size": 2, "gradient_accumulation_steps": 2}')
    assert cost.measured_ms(tmp_path, FST) == pytest.approx(5 / 6 * 1.6 + 1 / 6)
    assert cost.measured_ms(tmp_path, "sparse=none") == pytest.approx(1)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    with pytest.raises(ValueError, match="too few sparse rows; give --calibrate more iterations"):
        cost.measured_ms(tmp_path, FST)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def test_paired_interval_by_hand():
    """Differences 1, 2, 3, -1: mean 1.25, deviation sqrt(8.75 / 3), t of 3 degrees of freedom 3.182."""
    found = paired([2.0, 4.0, 6.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    half = 3.182 * math.sqrt(8.75 / 3) / 2
    assert (found.differences, found.mean, found.lower) == ([1, 2, 3, -1], 1.25, 1)
    assert (found.low, found.high) == pytest.approx((1.25 - half, 1.25 + half))
    assert found.deviation == pytest.approx(math.sqrt(8.75 / 3))
    assert paired([1.0], [2.0]) == report.Paired([-1.0], -1.0, None, None, None, 1)


def test_t_quantiles_enclose_95_percent():
    """By the density of Student's t, summed in steps."""
    for df in (1, 2, 5, 10, 30):
        t = np.linspace(0, report.T975[df - 1], 200_001)
        density = (1 + t**2 / df) ** (-(df + 1) / 2)
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        inside = 2 * scale * float(np.sum((density[1:] + density[:-1]) / 2)) * (t[1] - t[0])
        assert inside == pytest.approx(0.95, abs=2e-4), df
    assert len(report.T975) == 30


def test_table_has_spread_pruned_loss_and_paired_differences_sorted_by_mean():
    losses = {"dense": [2.0, 4.0], "fst": [1.5, 3.9]}
    panels = {"minus dense": compare.paired_to(losses, "dense")}
    lines = report.loss_table(losses, {"fst": [2.5, 4.5]}, {}, {"dense": 1.0, "fst": 0.766}, panels)
    assert lines[0] == "| method | FLOPs | validation loss | pruned to 2:4 | minus dense | 95 % interval | lower in |"
    deviation = statistics.stdev([-0.5, -0.1])
    half = 12.706 * deviation / math.sqrt(2)
    assert lines[2] == (
        f"| fst | 0.77 | 2.7000 +- 1.6971 | 3.5000 | -0.3000 +- {deviation:.4f} "
        f"| [{-0.3 - half:.4f}, {-0.3 + half:.4f}] | 2 of 2 |"
    )
    assert lines[3] == "| dense | 1.00 | 3.0000 +- 1.4142 |  |  |  |  |"
    lines = report.loss_table(losses, {}, {"fst": [0.5, 0.9]}, {"dense": 1.0}, panels)
    assert lines[0].startswith("| method | FLOPs | validation loss | pruned to 2:4 | early mu | minus dense |")
    assert lines[2].startswith("| fst |  | 2.7000 +- 1.6971 |  | 0.70 | -0.3000")
    assert lines[3] == "| dense | 1.00 | 3.0000 +- 1.4142 |  |  |  |  |  |"


def test_early_mu_is_of_the_steps_after_the_warm_up_and_of_one_kind_of_masks(tmp_path):
    def folder(name, rates, flip_mask="transposable"):
        (tmp_path / name).mkdir()
        rows = [{"iter": i, "phase": "sparse", "flip_rate": rate} for i, rate in rates.items()]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / "config.json").write_text(json.dumps({"warmup_iters": 10, "flip_mask": flip_mask}))
        return tmp_path / name

    dense = folder("dense", {14: 9.0, 15: 1.0, 20: 2.0, 49: 3.0, 50: 9.0})
    sparse = folder("sparse", {14: 1.0, 15: 1.0, 20: 1.0, 30: 7.0, 49: 1.0, 50: 1.0})
    rows = folder("rows", {15: 1.0}, "row")
    assert compare.early_mus([sparse, rows], [dense, dense]) == [pytest.approx(0.5), None]
    assert compare.early_mus([sparse], [dense], (4, 5)) == [pytest.approx(1 / 3)]


def test_compare_reads_the_last_rows(tmp_path, fake_training, monkeypatch):
    monkeypatch.setitem(compare.STUDIES, "methods", Study({"dense": "sparse=none", "fst": FST}))
    args = arguments(tmp_path, "methods", "--seeds=2", "--jobs=1")
    found = compare.compare(args)[0]
    assert found["val_loss"] == {"dense": [100, 202], "fst": [101, 203]}
    assert found["val_loss_24"] == {}
    assert found["panels"]["minus dense"]["fst"].differences == [1, 1]
    for i, folder in enumerate((tmp_path / "out" / "cpu-shakespeare_char").glob("*fst*")):
        write_run(folder, json.loads((folder / "config.json").read_text()), 7.0, pruned=8.0 + i)
    assert sorted(compare.compare(args)[0]["val_loss_24"]["fst"]) == [8, 9]


def test_files_are_named_by_study_dataset_and_preset(tmp_path):
    assert compare.result_name(arguments(tmp_path, "methods")) == "methods"
    args = arguments(tmp_path, "equal_cost", "--dataset=/x/books", "--preset=gpu", "--ratio=1.7", "--seeds=5")
    assert compare.result_name(args) == "equal_cost-books-gpu"
    assert (
        compare.command_of(args)
        == "python -m studies.compare equal_cost --dataset=books --seeds=5 --preset=gpu --ratio=1.7"
    )
    assert (args.jobs, arguments(tmp_path, "methods").jobs) == (1, 2)


def test_figure_draws_every_seed_and_tells_better_from_worse(tmp_path):
    from matplotlib.figure import Figure

    panel = {"worse": paired([1.0, 1.1, 1.2], [0.0, 0.0, 0.0]), "better": paired([-1.0, -1.1], [0.0, 0.0])}
    panel["unsure"] = paired([-1.0, 1.1], [0.0, 0.0])
    assert report.colour_of(paired([-1.0], [0.0])) == "0.35"  # one seed shows nothing
    assert [report.colour_of(d) for d in panel.values()] == [*report.COLOURS[1::-1], "0.35"]
    axes = Figure().subplots()
    report.draw_panel(axes, "minus dense", panel, ["better", "absent", "worse", "unsure"])
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [
        d.differences for d in (panel["better"], panel["worse"], panel["unsure"])
    ]
    bars = [tuple(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2.2]
    assert (panel["worse"].low, panel["worse"].high) in bars
    assert [text.get_text() for text in axes.texts] == ["-1.0500", "+1.1000", "+0.0500"]
    report.draw({"minus dense": panel, "minus ste": {"worse": panel["worse"]}}, tmp_path / "x.png", "methods")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Flip rates


def test_flip_rates_are_means_over_windows_and_mu_is_paired_by_seed(tmp_path, monkeypatch):
    """Rate = iteration for dense, twice that and thrice that for the sparse run of seeds 1 and 2."""

    def fake(root, common, variants, args):
        for settings in variants:
            for seed, folder in enumerate(compare.planned(root, common, settings, args), start=1):
                factor = 1.0 if settings == "sparse=none" else 1.0 + seed
                folder.mkdir(parents=True)
                rows = [{"iter": i, "phase": "sparse", "flip_rate": factor * i * seed} for i in range(311)]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                (folder / "config.json").write_text('{"environment": {}}')

    monkeypatch.setattr(compare, "run_all", fake)
    found, lines = compare.flip_rate(arguments(tmp_path, "flip_rate", "--seeds=2"))
    assert found["flip_rate"]["dense"][0] == [t0 - 0.5 for t0 in compare.WINDOWS]
    assert "| lambda 0, mu | " + " | ".join(["2.50 (2.00 to 3.00)"] * len(compare.WINDOWS)) + " |" in lines
    assert math.isclose(float(lines[2].split("|")[2]), 1.5 * 149.5)


# ---------------------------------------------------------------------------------------------------------------------
# Faults that were made by hand, and that nothing above had found


def test_predicted_times_know_the_activation():
    p = PRESETS["774M"]
    width = GPTConfig(**p, activation="swiglu").d_ff
    shape = (roofline.GPUS["h200"], p["n_layer"], 1280, width, 50304, 1024, 16)
    gated = roofline.train_step(*shape, activation="swiglu", accumulation=32)["ms"]
    assert cost.predicted_ms("sparse=none activation=swiglu", "h200", "774M", 1.5) == gated


def test_texts_are_put_together_pair_by_pair(tmp_path, capsys):
    losses = {
        "a_char": {"dense": [1.0, 1.2], "half": [1.3, 1.3], "fst": [1.1, 1.2], "alone": [0.0, 0.0]},
        "b_char": {"dense": [2.0, 2.0], "half": [2.2, 2.4], "fst": [2.1, 2.2]},
    }
    for text, table in losses.items():
        (tmp_path / f"methods-{text}.json").write_text(json.dumps({"val_loss": table}))
    compare.main(["methods", "--texts", "a_char", "b_char", f"--results={tmp_path}"])
    rows = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert rows.keys() == {"method", "---", "dense", "fst", "half"}  # what only one text has is left out
    # fst minus dense: 0.1, 0.0, 0.1, 0.2; minus half: -0.2, -0.1, -0.1, -0.2
    assert "| fst | 0.0500 | 0.1500 | 0.1000 +- 0.0816 |" in rows["fst"]
    assert "| -0.1500 +- 0.0577 |" in rows["fst"]
    assert rows["fst"].endswith("| 4 of 4 |")
    data = json.loads((tmp_path / "methods-texts.json").read_text())
    assert data["differences"]["minus dense"]["fst"]["differences"] == pytest.approx([0.1, 0.0, 0.1, 0.2])
    assert (tmp_path / "methods-texts.png").stat().st_size > 1000


def test_the_interval_by_seed_is_of_each_seeds_mean_over_the_texts():
    """Differences 1, 2, 3 on one text and 3, 4, 8 on another: means 2, 3, 5.5."""
    assert compare.by_seed(paired([1.0, 2.0, 3.0, 3.0, 4.0, 8.0], [0.0] * 6), 2) == paired([2.0, 3.0, 5.5], [0.0] * 3)


def test_texts_with_unequal_seeds_are_refused(tmp_path):
    for text, seeds in (("a_char", 2), ("b_char", 3)):
        (tmp_path / f"methods-{text}.json").write_text(json.dumps({"val_loss": {"dense": [1.0] * seeds}}))
    with pytest.raises(SystemExit, match="a_char, b_char have unequal numbers of seeds; run them with equal --seeds"):
        compare.main(["methods", "--texts", "a_char", "b_char", f"--results={tmp_path}"])


def test_the_decay_factor_is_the_presets_or_the_users(tmp_path):
    for words, decay in ((["methods"], "2e-3"), (["methods", "--preset=gpu"], "6e-5"), (["table7", "--decay=1"], "1")):
        variants = compare.study_of(arguments(tmp_path, *words)).variants
        settings = variants["fst" if words[0] == "methods" else "decay yes, MVUE no, dense end no"]
        assert grids.words(settings)["masked_decay"] == decay
    args = arguments(tmp_path, "table7", "--decay=1", "--name=mine")
    assert compare.result_name(args) == "mine"
    assert compare.command_of(args).endswith("--seeds=3 --decay=1 --name=mine")


def test_the_commits_of_all_runs_are_named(tmp_path):
    for name, commit in (("a", "1"), ("b", "2-dirty"), ("c", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"environment": {"commit": commit}}))
    found = compare.environment({"dense": [tmp_path / "a"], "fst": [tmp_path / "b", tmp_path / "c"]})
    assert found == {"environment": {"commit": "1"}, "commits": {"dense": ["1"], "fst": ["1", "2-dirty"]}}


def test_a_text_without_a_result_is_named(tmp_path):
    with pytest.raises(
        SystemExit, match=r"no .*methods-a_char.json yet; run: python -m studies.compare methods --dataset=a_char"
    ):
        compare.main(["methods", "--texts", "a_char", f"--results={tmp_path}"])

"""studies.compare: it runs unfinished variants, shares runs between studies, and reads the last rows."""

import json
import math

import pytest

from configurator import configure
from studies import compare, grids, report
from studies.grids import FST, STUDIES, Study
from studies.report import paired

CPU = grids.PRESETS["cpu"]
TINY = "n_layer=1 n_head=2 n_embd=16 block_size=8 batch_size=4 max_iters=4 lr_decay_iters=4 warmup_iters=1"
TINY += " eval_interval=2"


@pytest.fixture
def fake_training(monkeypatch, write_run):
    """Replace train.py. A run's loss is its position in `started` plus 100 times its seed. Returns `started`."""
    started = []

    def train(folder, given, max_iters, **environment):
        settings = dict(word[2:].split("=", 1) for word in given)
        kinds = {name: int(v) if v.isdigit() else 0.0 if is_number(v) else v for name, v in settings.items()}
        loss = 100 * int(settings["seed"]) + len(started)
        write_run(folder, [{"iter": max_iters, "val_loss": loss}], **kinds | configure(kinds, given))
        started.append(settings)
        assert environment == {"OMP_NUM_THREADS": "1"}

    monkeypatch.setattr(compare.runs, "train", train)
    return started


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def arguments(tmp_path, *words):
    return compare.parse([*words, f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"])


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.slow
def test_real_runs_are_skipped_when_finished_and_put_into_a_table_and_a_figure(tmp_path, data, monkeypatch, capsys):
    variants = {"dense": "sparse=none", "fst": "sparse=fst mask_interval=2"}
    monkeypatch.setitem(compare.STUDIES, "methods", Study(variants))
    monkeypatch.setitem(compare.PRESETS, "cpu", f"{CPU} {TINY}")
    results = tmp_path / "r"
    words = ["methods", f"--dataset={data}", "--seeds=1", f"--out_dir={tmp_path / 'out'}", f"--results={results}"]
    compare.main(words)
    found = json.loads((results / "methods-tiny.json").read_text())
    folders = [
        tmp_path / "out" / "cpu-tiny" / name for name in ("sparse=none-seed1", "mask_interval=2_sparse=fst-seed1")
    ]
    assert [compare.read_config(folder)["sparse"] for folder in folders] == ["none", "fst"]
    losses = [compare.runs.last_row(folder)["val_loss"] for folder in folders]
    assert found["val_loss"] == {v: [loss] for v, loss in zip(variants, losses, strict=True)}
    assert found["environment"]["torch"]
    assert "`python -m studies.compare methods --dataset=tiny --seeds=1`" in capsys.readouterr().out
    assert (results / "methods-tiny.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(compare.runs, "run_child", lambda *_, **__: pytest.fail("a finished run was started"))
    compare.main(words)
    assert json.loads((results / "methods-tiny.json").read_text()) == found


def test_a_folder_with_other_settings_is_refused(tmp_path, write_run):
    wanted = {"max_iters": "4", "masked_decay": "0.0002", "mvue": "True", "dataset": "x"}
    assert not compare.is_finished(tmp_path, wanted)
    config = {"max_iters": 4, "masked_decay": 2e-4, "mvue": True, "dataset": "x"}
    for iteration, finished in ((4, True), (3, False)):
        folder = write_run(tmp_path, [{"iter": iteration, "val_loss": 1.5}], **config)
        assert compare.is_finished(folder, wanted) == finished
    with pytest.raises(ValueError, match=r"masked_decay=6e-5 \(there 0\.0002\), mvue=False \(there True\); delete it"):
        compare.run(folder, wanted | {"masked_decay": "6e-5", "mvue": "False"})
    with pytest.raises(ValueError, match=r"another run: fp8=True \(there missing\)"):
        compare.run(folder, wanted | {"fp8": "True"})


def test_runs_go_seed_by_seed_and_are_shared_between_labels_and_studies(tmp_path, fake_training):
    args = arguments(tmp_path, "phases", "--seeds=2", "--jobs=1")
    found = compare.run_and_read({"a": FST, "the same": f"{FST} max_iters=2500", "b": "sparse=none"}, args)
    assert [run["seed"] + run["sparse"] for run in fake_training] == ["1fst", "1none", "2fst", "2none"]
    assert found["a"] == found["the same"] != found["b"]
    assert compare.run_and_read({"c": "mask_interval=40 sparse=fst masked_decay=2e-3"}, args)["c"] == found["a"]
    assert len(fake_training) == 4


def test_only_runs_a_part_and_the_table_has_all_that_is_finished(tmp_path, fake_training, capsys):
    variants = {"a": "sparse=none", "b": FST, "c": "sparse=ste"}
    args = arguments(tmp_path, "methods", "--seeds=1", "--jobs=1")
    for args.only, finished in ((["fst"], []), (["a"], ["a"]), (["c"], ["a", "c"])):
        assert list(compare.run_and_read(variants, args)) == finished
    assert "seeds are missing: b" in capsys.readouterr().out
    assert len(fake_training) == 2
    with pytest.raises(SystemExit):
        arguments(tmp_path, "methods", "--only", "fts")
    assert "methods has no 'fts', need some of dense, half, fst" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Studies


def test_each_variant_is_shown_at_its_best_rate_and_at_the_one_that_the_other_seeds_choose(
    tmp_path, monkeypatch, write_run
):
    losses = {  # {(variant, rate): loss of each seed}
        ("none", "3e-3"): [2.0, 2.0, 2.0],
        ("none", "6e-3"): [1.0, 1.0, 1.0],
        ("none", "1.2e-2"): [3.0, 3.0, 3.0],
        ("fst", "3e-3"): [2.0, 2.0, 2.0],
        ("fst", "6e-3"): [1.5, 1.5, 1.5],
        ("fst", "1.2e-2"): [1.2, 1.2, 9.0],  # the last seed diverges, and the others must learn of it
    }
    started = []

    def train(folder, given, max_iters, **environment):
        settings = dict(word[2:].split("=", 1) for word in given)
        started.append((settings["seed"], settings["sparse"], settings["learning_rate"]))
        assert float(settings["min_lr"]) == pytest.approx(float(settings["learning_rate"]) / 10)
        loss = losses[settings["sparse"], settings["learning_rate"]][int(settings["seed"])]
        kinds = {name: int(v) if v.isdigit() else 0.0 if is_number(v) else v for name, v in settings.items()}
        write_run(folder, [{"iter": max_iters, "val_loss": loss}], **kinds | configure(kinds, given))

    monkeypatch.setattr(compare.runs, "train", train)
    monkeypatch.setattr(compare, "relative_flops", lambda variants, args: {})
    monkeypatch.setitem(compare.STUDIES, "methods", Study({"dense": "sparse=none", "fst": "sparse=fst"}))
    args = arguments(tmp_path, "methods", "--dataset=x", "--lr", "6e-3", "1.2e-2", "3e-3", "--seeds=3", "--jobs=1")
    data, lines = compare.compare_tuned(args)
    rates = ["3e-3", "6e-3", "1.2e-2"]
    assert started == [(seed, kind, rate) for seed in "012" for kind in ("none", "fst") for rate in rates]
    assert data["lr"] == {"dense": "6e-3", "fst": "6e-3"}
    assert data["val_loss"] == {"dense": [1.0] * 3, "fst": [1.5] * 3}
    assert data["left_out"] == {"dense": [1.0] * 3, "fst": [1.5, 1.5, 9.0]}
    assert data["curves"]["fst"]["1.2e-2"] == [1.2, 1.2, 9.0]
    assert data["panels"]["minus dense"]["fst"].differences == [0.5] * 3
    dense = ["2.0000 +- 0.0000", "**1.0000 +- 0.0000**", "3.0000 +- 0.0000", "1.0000 +- 0.0000"]
    assert f"| dense | {' | '.join(dense)} |" in lines
    assert "Best at the edge of the grid, so that a better rate may lie outside: none." in lines
    assert "--lr 3e-3 6e-3 1.2e-2" in compare.command_of(args)
    with pytest.raises(ValueError, match="need at least 2: a seed's rate is chosen by the others"):
        compare.compare_tuned(arguments(tmp_path, "methods", "--lr", "3e-3", "--seeds=1"))


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "fast"])
def test_a_rate_that_is_none_is_refused(tmp_path, capsys, rate):
    with pytest.raises(SystemExit):
        arguments(tmp_path, "methods", f"--lr={rate}")
    assert "--lr: " in capsys.readouterr().err


def test_compare_reads_the_last_rows(tmp_path, fake_training, write_run, monkeypatch):
    monkeypatch.setitem(compare.STUDIES, "methods", Study({"dense": "sparse=none", "fst": FST}))
    args = arguments(tmp_path, "methods", "--seeds=2", "--jobs=1")
    monkeypatch.setattr(compare, "mus_of", lambda *_: {})  # the fake runs have no flip rates
    found = compare.compare(args)[0]
    assert found["val_loss"] == {"dense": [100, 202], "fst": [101, 203]}
    assert found["val_loss_24"] == {}
    assert found["panels"]["minus dense"]["fst"].differences == [1, 1]
    for i, folder in enumerate((tmp_path / "out" / "cpu-shakespeare_char").glob("*fst*")):
        config = json.loads((folder / "config.json").read_text())
        write_run(folder, [{"iter": 2500, "val_loss": 7.0, "val_loss_24": 8.0 + i}], **config)
    assert sorted(compare.compare(args)[0]["val_loss_24"]["fst"]) == [8, 9]


def test_early_mu_is_of_the_steps_after_the_warm_up_and_of_one_kind_of_masks(tmp_path, write_run):
    def folder(name, rates, flip_mask="transposable"):
        rows = [{"iter": i, "flip_rate": rate} for i, rate in rates.items()]
        return write_run(tmp_path / name, rows, warmup_iters=10, flip_mask=flip_mask)

    dense = folder("dense", {14: 9.0, 15: 1.0, 20: 2.0, 49: 3.0, 50: 9.0})
    sparse = folder("sparse", {14: 1.0, 15: 1.0, 20: 1.0, 30: 7.0, 49: 1.0, 50: 1.0})
    rows = folder("rows", {15: 1.0}, "row")
    assert compare.early_mus([sparse, rows], [dense, dense], 1.5, 5) == [pytest.approx(0.5), None]
    found = {"dense": [dense], "sparse": [sparse], "rows": [rows]}
    assert compare.mus_of(found, 4, 5) == {"sparse": [pytest.approx(1 / 3)]}
    assert compare.mus_of({"sparse": [sparse]}, 4, 5) == {}


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
    assert len(fake_training) == 2 * (2 * 8 - 1)  # both criteria share the dense run
    assert "predicted step-time ratios of GPT-2 774M on H200, 2:4 GEMMs 1.5 x dense" in "\n".join(lines)
    [row] = [line for line in lines if line.startswith("| fst |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == str(found["steps"]["FLOPs"]["fst"])
    assert cells[4] == report.spread(found["val_loss"]["FLOPs"]["fst"])


def test_measured_step_times_replace_predicted_ones(tmp_path, data):
    labels, path = list(STUDIES["equal_cost"].variants), tmp_path / "ms.json"
    path.write_text(json.dumps(dict(zip(labels, (10, 8, 9, 11, 12, 13, 14, 15), strict=True))))
    args = arguments(tmp_path, "equal_cost", f"--dataset={data}", f"--step_ms={path}")
    costs = compare.step_costs(STUDIES["equal_cost"].variants, args)["time"]
    assert list(costs.values()) == [1, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5]
    assert "measured in ms.json" in compare.equal_cost_note(args)
    path.write_text('{"dense": 10}')
    with pytest.raises(ValueError, match=r"lacks fst, .*; measure them with --calibrate"):
        compare.step_costs(STUDIES["equal_cost"].variants, args)


def test_flip_rates_are_means_over_windows_and_mu_is_paired_by_seed(tmp_path, monkeypatch, write_run):
    """Rate = iteration for dense, twice that and thrice that for the sparse run of seeds 1 and 2."""

    def train(folder, given, max_iters, **_):
        settings = dict(word[2:].split("=", 1) for word in given)
        seed = int(settings["seed"])
        factor = 1.0 if settings["sparse"] == "none" else 1.0 + seed
        rows = [{"iter": i, "flip_rate": factor * i * seed} for i in range(311)]
        write_run(folder, [*rows, {"iter": 311, "val_loss": 1.0}], **settings)

    monkeypatch.setattr(compare.runs, "train", train)
    monkeypatch.setattr(compare, "is_finished", lambda folder, wanted: compare.runs.is_finished(folder, 311))
    found, lines = compare.flip_rate(arguments(tmp_path, "flip_rate", "--seeds=2"))
    assert found["flip_rate"]["dense"][0] == [t0 - 0.5 for t0 in compare.WINDOWS]
    assert "| lambda 0, mu | " + " | ".join(["2.50 (2.00 to 3.00)"] * 4) + " |" in lines
    assert math.isclose(float(lines[2].split("|")[2]), 1.5 * 149.5)
    with pytest.raises(ValueError, match="flip_rate: the dense runs are not finished"):
        compare.flip_rate(arguments(tmp_path / "other", "flip_rate", "--only", "lambda 0"))


# ---------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize(
    ("words", "name", "command"),
    [
        (["methods"], "methods", "methods --dataset=shakespeare_char --seeds=3"),
        (
            ["equal_cost", "--dataset=/x/books", "--preset=gpu", "--ratio=1.7", "--seeds=5"],
            "equal_cost-books-gpu",
            "equal_cost --dataset=books --seeds=5 --preset=gpu --ratio=1.7",
        ),
        (["table7", "--name=mine"], "mine", "table7 --dataset=shakespeare_char --seeds=3 --name=mine"),
    ],
)
def test_files_are_named_by_study_dataset_and_preset(tmp_path, words, name, command):
    args = arguments(tmp_path, *words)
    assert compare.result_name(args) == name
    assert compare.command_of(args) == f"python -m studies.compare {command}"
    decay = "6e-5" if args.preset == "gpu" else "2e-3"
    assert f"masked_decay={decay}" in next(v for v in compare.study_of(args).variants.values() if "masked_decay" in v)
    assert args.jobs == (1 if args.preset == "gpu" else 2)


def test_the_commits_of_all_runs_are_named(tmp_path, write_run):
    commits = (("a", "1"), ("b", "2-dirty"), ("c", "1"))
    a, b, c = (write_run(tmp_path / name, environment={"commit": commit}) for name, commit in commits)
    found = compare.environment({"dense": [a], "fst": [b, c]})
    assert found == {"environment": {"commit": "1"}, "commits": {"dense": ["1"], "fst": ["1", "2-dirty"]}}


def test_texts_are_pooled_pair_by_pair(tmp_path, capsys):
    losses = {
        "a_char": {"dense": [1.0, 1.2], "half": [1.3, 1.3], "fst": [1.1, 1.2], "alone": [0.0, 0.0]},
        "b_char": {"dense": [2.0, 2.0], "half": [2.2, 2.4], "fst": [2.1, 2.2]},
    }
    for text, table in losses.items():
        (tmp_path / f"methods-{text}.json").write_text(json.dumps({"val_loss": table}))
    compare.main(["methods", "--texts", "a_char", "b_char", f"--results={tmp_path}"])
    rows = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert rows.keys() == {"method", "---", "dense", "fst", "half"}  # labels that only one text has are left out
    # fst minus dense: 0.1, 0.0, 0.1, 0.2; minus half: -0.2, -0.1, -0.1, -0.2
    assert "| fst | 0.0500 | 0.1500 | 0.1000 +- 0.0816 |" in rows["fst"]
    assert "| -0.1500 +- 0.0577 |" in rows["fst"]
    assert rows["fst"].endswith("| 4 of 4 |")
    data = json.loads((tmp_path / "methods-texts.json").read_text())
    assert data["differences"]["minus dense"]["fst"]["differences"] == pytest.approx([0.1, 0.0, 0.1, 0.2])
    assert (tmp_path / "methods-texts.png").stat().st_size > 1000


def test_the_interval_by_seed_uses_means_over_the_texts():
    assert compare.by_seed(paired([1.0, 2.0, 3.0, 3.0, 4.0, 8.0], [0.0] * 6), 2) == paired([2.0, 3.0, 5.5], [0.0] * 3)


def test_texts_that_cannot_be_pooled_are_refused(tmp_path):
    words = ["methods", "--texts", "a_char", "b_char", f"--results={tmp_path}"]
    (tmp_path / "methods-b_char.json").write_text(json.dumps({"val_loss": {"dense": [1.0] * 3}}))
    with pytest.raises(
        SystemExit, match=r"no .*a_char.json yet; run: python -m studies.compare methods --dataset=a_char"
    ):
        compare.main(words)
    (tmp_path / "methods-a_char.json").write_text(json.dumps({"val_loss": {"dense": [1.0] * 2}}))
    with pytest.raises(SystemExit, match="a_char, b_char have unequal numbers of seeds; run them with equal --seeds"):
        compare.main(words)


@pytest.mark.parametrize("word", ["seeds=0", "jobs=-1", "calibrate=-3", "ratio=0.0", "ratio=nan"])
def test_a_number_out_of_range_is_refused_in_one_line(word):
    with pytest.raises(SystemExit, match=rf"^studies\.compare: error: {word}, need at least "):
        compare.main(["methods", f"--{word}"])


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = compare.parse(["methods", "--out_dir=~/runs", "--dataset=~/text"])
    assert (args.out_dir, args.dataset, args.results) == ("/home/me/runs", "/home/me/text", "results")

"""study.py: its runs are real, a finished study is not run again, and the arithmetic is right."""

import json
import math
import sys

import numpy as np
import pytest

import study
from plot import read_config


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    tokens = np.tile(np.arange(12, dtype="<u2"), 60)
    for split in ("train", "val"):
        tokens.tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "char", "vocab_size": 12, "chars": "abcdefghijkl"}))
    return folder


def test_convergence_study_runs_resumes_and_writes_its_table(tmp_path, data, monkeypatch, capsys):
    variants = {"dense": "sparse=none", "ste": "sparse=ste mask_interval=2"}
    monkeypatch.setattr(study, "CONVERGENCE", variants)
    tiny = "n_layer=1 n_head=2 n_embd=16 block_size=8 batch_size=4 max_iters=4 eval_iters=0 eval_interval=2"
    monkeypatch.setattr(study, "COMMON", f"{study.COMMON} {tiny}")
    words = ["study.py", "convergence", f"--dataset={data}", "--seeds=1", "--jobs=2"]
    monkeypatch.setattr(sys, "argv", [*words, f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"])
    study.main()
    first = json.loads((tmp_path / "results" / "convergence.json").read_text())
    runs = [tmp_path / "out" / "convergence" / f"{name}-seed1" for name in variants]
    assert [read_config(run)["sparse"] for run in runs] == ["none", "ste"]
    assert first["val_loss"] == {v: [study.last_val_loss(run)] for v, run in zip(variants, runs, strict=True)}
    assert all(0 < loss < 3 for [loss] in first["val_loss"].values())
    assert "`python study.py convergence --dataset=tiny --seeds=1`" in capsys.readouterr().out
    before = [(run / "ckpt.pt").stat().st_mtime_ns for run in runs]
    study.main()
    assert json.loads((tmp_path / "results" / "convergence.json").read_text()) == first
    assert [(run / "ckpt.pt").stat().st_mtime_ns for run in runs] == before
    assert "all of max_iters=4 iterations are done" in (runs[0] / "log.txt").read_text()


def test_a_failing_run_stops_the_study_and_names_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"--learning_rat=1 failed; see .*log\.txt"):
        study.run(tmp_path / "bad", "learning_rat=1")
    assert "did you mean 'learning_rate'" in (tmp_path / "bad" / "log.txt").read_text()


def test_spread_is_mean_and_sample_standard_deviation():
    assert study.spread([1.0, 2.0, 3.0]) == "2.0000 +- 1.0000"
    assert study.spread([1.5]).startswith("1.5000 +- nan")


def test_flip_rates_are_means_over_windows_and_mu_is_paired_by_seed(tmp_path, monkeypatch):
    """Rate = iteration for dense, twice that and thrice that for the sparse run of seeds 1 and 2."""

    def fake(name, variants, common, args):
        folders = {}
        for variant in variants:
            folders[variant] = []
            for seed in (1, 2):
                factor = 1.0 if variant == "dense" else 1.0 + seed
                folder = tmp_path / f"{variant}{seed}"
                folder.mkdir()
                rows = [{"iter": i, "phase": "sparse", "flip_rate": factor * i * seed} for i in range(311)]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                (folder / "config.json").write_text('{"environment": {}}')
                folders[variant].append(folder)
        return folders

    monkeypatch.setattr(study, "run_all", fake)
    args = type("Args", (), {"seeds": 2})
    data, lines = study.flip_rate(args)
    assert data["flip_rate"]["dense"][0] == [t0 - 0.5 for t0 in study.WINDOWS]
    assert "| lambda 0, mu | " + " | ".join(["2.50 (2.00 to 3.00)"] * len(study.WINDOWS)) + " |" in lines
    assert math.isclose(float(lines[2].split("|")[2]), 1.5 * 149.5)

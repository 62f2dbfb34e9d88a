"""Short runs of several methods, at toy size on a CPU."""

import json
import subprocess
from pathlib import Path

import pytest
from harness import SETTINGS, make_dataset

from benchmarks import curves, report


@pytest.fixture
def toy(tmp_path, monkeypatch):
    data = make_dataset(tmp_path / "data")
    changes = {"dataset": str(data), "max_iters": 4, "dense_start": 3, "log_interval": 1}
    monkeypatch.setattr(curves, "SETTINGS", SETTINGS | changes)
    monkeypatch.setattr(curves, "dataset", lambda: str(data))
    monkeypatch.setattr(curves, "WRITE_S", 0.2)
    few = {name: curves.RUNS["weights"][name] for name in ("dense", "fst from CUDA graphs")}
    monkeypatch.setitem(curves.RUNS, "weights", few)
    return tmp_path / "train.json"


@pytest.mark.slow
def test_losses_of_every_method_and_the_failure_of_one_come_back(toy, monkeypatch, capsys):
    monkeypatch.setitem(curves.RUNS["weights"], "broken", {"activation": "nosuch"})
    assert curves.main([str(toy)]) == 1
    runs = json.loads(toy.read_text())["runs"]
    broken = runs.pop("broken")
    assert broken["rows"] == []
    assert "activation='nosuch'" in broken["output"][-1]
    assert {name: run["exit"] for name, run in runs.items()} == {"dense": 0, "fst from CUDA graphs": 0}
    for run in runs.values():
        assert sum("train_loss" in row and row["train_loss"] is not None for row in run["rows"]) == 4
        assert run["rows"][-1]["val_loss"] > 0
        assert any("done: 4 iterations" in line for line in run["output"])
    assert [run["config.json"]["sparse"] for run in runs.values()] == ["none", "fst"]
    assert "fst from CUDA graphs: exit 0, losses [(0, " in capsys.readouterr().out


@pytest.mark.slow
def test_runs_with_2_4_activations(toy, monkeypatch):
    fst = ("sparse", "masked_decay", "mask_interval", "mvue")
    settings = {name: value for name, value in curves.SETTINGS.items() if name not in fst}
    monkeypatch.setattr(curves, "SETTINGS", settings | {"dense_pretrain": 0.25, "dense_start": 4})
    assert curves.main([str(toy), "activations"]) == 0
    runs = json.loads(toy.read_text())["runs"]
    assert [run["config.json"]["sparse"] for run in runs.values()] == ["none", "act24", "act24_soft"]
    assert {run["config.json"]["activation"] for run in runs.values()} == {"relu2"}
    assert all(run["rows"][-1]["val_loss"] > 0 for run in runs.values())
    assert {row["phase"] for row in runs["act24"]["rows"]} == {"dense", "sparse"}
    text = report.curves_text({"runs": runs})
    for name, run in runs.items():
        assert f"| {name} |  |  |  |  | {run['rows'][-1]['val_loss']:.3f} | 0 |" in text  # no step 50 in four steps


def test_a_run_that_is_killed_is_a_failure(toy, monkeypatch):
    def begin(changes, data, folder):
        Path(f"{folder}.log").touch()
        return subprocess.Popen(["sh", "-c", "kill -9 $$" if changes["sparse"] == "none" else "exit 0"])

    monkeypatch.setattr(curves, "begin", begin)
    assert curves.main([str(toy)]) == 1
    assert json.loads(toy.read_text())["runs"]["dense"]["exit"] == -9


def test_a_line_that_is_being_written_is_left_out_and_the_books_are_used(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "run.log").write_text("a\n")
    (folder / "metrics.jsonl").write_text('{"iter": 0, "phase": "sparse"}\n{"iter": 1, "ph')
    process = subprocess.Popen(["true"])
    process.wait()
    assert [(row["iter"], row["phase"]) for row in curves.read(folder, process)["rows"]] == [(0, "sparse")]
    monkeypatch.setattr(curves, "BOOKS", tmp_path)
    (tmp_path / "train.bin").touch()
    assert curves.dataset() == str(tmp_path)

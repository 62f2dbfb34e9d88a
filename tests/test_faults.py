"""tests/faults.py: one case of each kind. `make faults` runs them all."""

import json
import random

import faults
import pytest
from harness import launch, run_here, state_differences


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Every run is a new process, as in `make faults`."""
    return faults.Bench(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def bench_here(tmp_path_factory):
    return faults.Bench(tmp_path_factory.mktemp("here"), run=run_here, resume=run_here)


@pytest.fixture(scope="module")
def bench_kills(tmp_path_factory):
    """Runs with a fault are new processes; runs without one are in this process."""
    return faults.Bench(tmp_path_factory.mktemp("kills"), run=launch, resume=run_here)


def test_a_kill_at_a_random_moment_goes_on_from_the_last_save(bench_kills):
    assert faults.kill_case(bench_kills, random.Random(1))["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "case", "arguments"),
    [
        *(("bench_here", faults.stop_case, {"at": at, "ranks": 1}) for at in faults.STOP_POINTS),
        ("bench_kills", faults.stop_case, {"at": "at a mask refresh", "ranks": 1}),
        ("bench", faults.stop_case, {"at": "at the dense switch", "ranks": 2}),
        ("bench", faults.nodes_case, {}),
        ("bench_here", faults.flip_case, {"rng": random.Random(3), "flips": 20}),
        ("bench_kills", faults.kills_in_a_row_case, {"rng": random.Random(2), "kills": 3, "ranks": 1}),
        ("bench", faults.kills_in_a_row_case, {"rng": random.Random(2), "kills": 3, "ranks": 2}),
        ("bench_kills", faults.save_case, {"at": "half of the bytes written"}),
        ("bench_kills", faults.save_case, {"at": "no hard links: between the two renames"}),
    ],
)
def test_a_fault_loses_nothing_that_was_saved(request, where, case, arguments):
    assert case(request.getfixturevalue(where), **arguments)["problems"] == []


@pytest.mark.slow
def test_run_here_trains_to_the_same_bits_as_a_real_process(bench, bench_here):
    assert state_differences(bench.reference(1)[0], bench_here.reference(1)[0]) == []


def test_the_comparison_covers_weights_moments_and_masks_and_sees_one_bit(bench_here):
    state, _ = bench_here.reference(1)
    for part, name in (("model", "transformer.h.0.mlp.c_fc.weight"), ("model", "transformer.h.1.mlp.c_proj.index")):
        changed = {**state, part: {**state[part], name: state[part][name].clone()}}
        changed[part][name].view(-1).view(faults.torch.uint8)[0] ^= 1
        assert state_differences(state, changed) == [f"/{part}/{name}"]
    changed = {**state, "optimizer": {**state["optimizer"], "state": {**state["optimizer"]["state"]}}}
    del changed["optimizer"]["state"][3]
    gone = [f"/optimizer/state/3/{name}" for name in ("exp_avg", "exp_avg_sq", "step")]
    assert state_differences(state, changed) == gone


def outcome(**changes):
    return {"kind": "kill", "at": "x", "ranks": 1, "resumed_at": 8, "steps_lost": 3, "in_a_save": False} | changes


def test_report_counts_steps_and_fails_on_a_mismatch(monkeypatch, tmp_path, capsys):
    cases = [outcome(problems=[]), outcome(problems=["differs: /model/x"], steps_lost=1)]
    calls = [("kill", lambda case=case: case) for case in cases]
    monkeypatch.setattr(faults, "all_cases", lambda bench, kills, in_a_row, flips, seed: calls[: kills + 1])
    report = tmp_path / "new" / "faults.json"
    assert faults.main(["--kills", "0", "--out", str(report)]) == 0
    assert "same bits" in capsys.readouterr().out
    assert faults.main(["--kills", "1", "--out", str(report)]) == 1
    assert "FAILED: differs: /model/x" in capsys.readouterr().out
    saved = json.loads(report.read_text())
    expected = {"cases": 2, "failed": 1, "steps_lost_max": 3, "steps_lost_median": 2, "in_a_save": 0}
    assert saved["summary"]["kill"] == expected
    assert {"commit", "torch", "platform"} <= saved["environment"].keys()
    assert str(tmp_path) not in report.read_text()
    with pytest.raises(SystemExit, match="2"):
        faults.main(["--only", "kil"])
    assert "--only kil: there is no such kind of case" in capsys.readouterr().err


def test_launch_reports_how_a_real_process_ends(tmp_path):
    done = launch(tmp_path / "out", {**faults.SETTINGS, "dataset": tmp_path / "nowhere"})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("train.py: error: dataset: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()

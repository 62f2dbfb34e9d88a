"""Whole optimizer steps at a toy size on the CPU, and the profile of a step."""

import json
from dataclasses import replace

import pytest
import torch

import bench
from benchmarks import roofline, steps
from benchmarks.roofline import predict_step
from benchmarks.steps import TOY
from benchmarks.suites import Settings
from gemm24.ffn import pack_weights
from sparse24 import refresh_masks, sparse_linears

SETTINGS = Settings(torch.device("cpu"), scale="toy", repetitions=2)
pytestmark = pytest.mark.usefixtures("on_the_cpu")
CASE = steps.Case("toy", 2, 1)


def test_long_names_that_begin_alike_are_added_up():
    long = "void at::native::elementwise<" + "x" * steps.NAME
    events = [(long + "a", 30.0), ("short", 5.0), (long + "b", 2.0), ("short", 1.0)]
    events.append(("Optimizer.step#AdamW.step", 100.0))
    assert steps.sum_by_name(events) == {long[: steps.NAME]: [2, 32.0], "short": [2, 6.0]}


@pytest.mark.parametrize("sparse", [False, True])
def test_run_takes_whole_optimizer_steps(sparse):
    run = steps.Run(TOY, sparse, 2, SETTINGS)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.step()
    refresh_masks(run.model, measure=False)
    pack_weights(run.model)
    run.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, run.model.parameters(), strict=True))
    assert all(p.grad is None for p in run.model.parameters())
    for linear in sparse_linears(run.model):
        assert int(linear.mask.sum()) == linear.weight.numel() // 2
    assert len(sparse_linears(run.model)) == (4 if sparse else 0)
    assert all(group["fused"] for group in run.optimizer.param_groups)  # on a CPU, as configure_optimizers asks


def test_gradients_of_micro_steps_are_averaged():
    """On equal tokens and without draws, two micro-steps take the step of one."""
    runs = [steps.Run(TOY, False, 2, SETTINGS, micro_steps) for micro_steps in (1, 2)]
    runs[1].tokens = runs[0].tokens
    for run in runs:
        run.step()
    for p, q in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(p, q)


def test_row_of_a_step():
    row = steps.row_of(CASE, SETTINGS)
    assert (row["size"], row["batch"], row["tokens"]) == ("toy", 2, 64)
    dense, sparse = (row["compiled"][name] for name in ("dense", "sparse"))
    assert row["compiled"]["s"].keys() == sparse["ms"].keys() == {"median", "min", "max"}
    assert sparse["tokens_per_s"] == pytest.approx(64 * 1000 / sparse["ms"]["median"])
    assert dense["mfu"] is None
    assert row["dense"].keys() == {"seconds to the second step", "host_us"}  # all else is a GPU's
    assert row["plan"].startswith("z emulated sm90")
    assert "graphs" not in row
    assert "s_model" not in row  # no GEMM was timed
    assert json.loads(json.dumps(row)) == row
    (line,) = bench.cells("e2e", row)
    assert line[:2] == ["e2e", "toy, batch 2 x 1, compiled"]


def test_a_step_with_2_4_activations(monkeypatch):
    """Both models have squared ReLU, and the layers of the 2:4 one have joined."""
    runs, begin = [], steps.Run.__init__
    monkeypatch.setattr(steps.Run, "__init__", lambda self, *args: runs.append(self) or begin(self, *args))
    row = steps.row_of(CASE, replace(SETTINGS, method="act24"))
    assert row["plan"].startswith("y emulated sm90")
    assert row["compiled"]["s"]["median"] > 0
    dense, sparse = ([block.mlp for block in run.model.transformer.h] for run in runs)
    assert {mlp.activation for mlp in (*dense, *sparse)} == {"relu2"}
    assert all(mlp.c_proj.joined and mlp.plan is not None for mlp in sparse)


def test_a_step_pays_its_share_of_the_mask_search(monkeypatch):
    """Dense steps of 12 ms, sparse ones of 10 ms, and a search of 80 ms in one step of 40."""
    monkeypatch.setattr(steps, "time_ms", lambda calls, *_: [[12.0] * 2, [10.0] * 2])
    runs = {name: steps.Run(TOY, False, 2, SETTINGS) for name in ("dense", "sparse")}
    found = steps.timed(runs, 64, 80.0, SETTINGS)
    assert [found[name]["ms"]["median"] for name in runs] == [12.0, 12.0]
    assert found["s"]["median"] == 1.0


def test_the_model_of_a_step_has_this_cards_rates(monkeypatch):
    gpu, ratio = roofline.GPU(1e12, 1e9), dict.fromkeys(roofline.GEMMS, 1.5)
    monkeypatch.setattr(steps, "measured_card", lambda report, bandwidth: (gpu, ratio))
    case = CASE._replace(micro_steps=2)
    both = (None, {"ratio": ratio, "mask_interval": 40})
    dense, sparse = (predict_step(gpu, TOY, 2, one, 2)["ms"] for one in both)
    assert steps.row_of(case, SETTINGS)["s_model"] == dense / sparse


@pytest.mark.slow
def test_the_stage_runs_on_the_fake_gpu(tmp_path, on_fake_gpu):
    on_fake_gpu("""
from dataclasses import replace
from benchmarks import steps
from gemm24 import choose

choose._WARM_UP = 0
steps.TOY, steps.CASES = replace(steps.TOY, n_layer=1), [steps.Case("toy", 2, 1)]
steps.copy_bandwidth = lambda device: 4e12  # measured by copies of 1 GiB on a GPU
steps.kernel_times = lambda call: call() or {"a": [1, 2.0]}  # the profiler sees no kernel here
assert steps.main([f"{out}/step.json", "--verdicts", f"{out}/gemms.json"]) == 0
""")
    (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert row["plan"].count("cusparselt") == 6
    assert row["compiled"]["dense"]["ms"]["median"] > 0 < row["graphs"]["sparse"]["ms"]["median"]
    assert (row["sparse"]["launches"], row["dense"]["kernels"]) == (1, {"a": [1, 2.0]})

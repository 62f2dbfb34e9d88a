"""The suites at toy sizes on the CPU."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import roofline, steps, suites
from benchmarks.suites import Settings
from gemm24 import plan as ffn_plan
from gemm24.choose import Report
from gemm24.matmul import Choice
from model import GPTConfig
from sparse24 import sparse_linears

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, scale="toy", repetitions=2)
pytestmark = pytest.mark.usefixtures("on_the_cpu")
SPREAD = {"median", "min", "max"}


@pytest.fixture
def timed(monkeypatch):
    """Plans come with a report as on a GPU: each 2:4 GEMM at 2 TFLOP/s, dense at 1, and dw2 not chosen."""

    def plan_ffn(config, tokens, **options):
        plan, report = original(config, tokens, **options)
        gemms = ffn_plan.ffn_gemms(config.n_embd, config.d_ff, tokens, config.activation, config.bias)
        for gemm in gemms.values():
            us = 2e-6 * gemm.m * gemm.n * gemm.k
            row = {**gemm._asdict(), "dense_us": us, "dense_spread_us": [us, us], "best_us": us / 2, "ratio": 2.0}
            report.rows.append(row | Choice()._asdict() | {"chosen": gemm.name != "dw2", "reason": ""})
        return plan, Report(report.choices, report.rows, report.notes)

    original = ffn_plan.plan_ffn
    monkeypatch.setattr(ffn_plan, "plan_ffn", plan_ffn)


def layer(kind: str, settings=SETTINGS, case=("gelu", 64, 32, 2)) -> dict:
    return suites.layer_row(kind, case, settings)


@pytest.mark.parametrize(("kind", "activation"), [("ffn", "gelu"), ("ffn", "geglu"), ("block", "geglu")])
def test_layer_row_has_dense_and_sparse(kind, activation):
    row = layer(kind, case=next(case for case in suites.layer_grid("ffn", SETTINGS) if case[0] == activation))
    assert (row["d"], row["d_ff"], row["tokens"]) == (192, 768 if activation == "gelu" else 512, 64)
    assert row["variants"]["auto"].keys() == {"ms", "pack_ms", "refresh_ms", "host_us"}
    assert row["variants"]["dense"]["ms"].keys() == SPREAD == row["s"]["auto"].keys()
    assert row["variants"]["dense"]["ms"]["min"] > 0
    assert row["plan"].startswith("z emulated sm90")
    assert "s_model" not in row  # no GEMM was timed
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("method", ["act24", "act24_soft"])
def test_a_layer_with_2_4_activations_has_joined_and_stands_beside_dense_gelu(monkeypatch, method):
    """Dense squared ReLU 10 ms, dense GELU 12 ms, sparse 8 ms, of which 1 ms is the refresh of soft weights."""
    soft = method == "act24_soft"
    layers = [[10.0] * 2, [12.0] * 2, [7.0 if soft else 8.0] * 2]
    monkeypatch.setattr(suites, "time_ms", lambda calls, *_: layers if len(calls) == 3 else [[1.0] * 2])
    modules, original = [], ffn_plan.forward_backward
    monkeypatch.setattr(
        ffn_plan, "forward_backward", lambda net, module, *rest: modules.append(module) or original(net, module, *rest)
    )
    settings = replace(SETTINGS, method=method)
    row = layer("ffn", settings, suites.layer_grid("ffn", settings)[0])
    dense, gelu, sparse = modules
    assert (dense.activation, gelu.activation, sparse.activation) == ("relu2", "gelu", "relu2")
    assert sparse.c_proj.joined
    assert {name: s["median"] for name, s in row["s"].items()} == {"auto": 1.25, "gelu": 1.5}
    assert row["variants"].keys() == {"dense", "gelu", "auto"}
    assert row["variants"]["auto"].keys() == {"ms", "host_us"} | ({"refresh_ms"} if soft else set())
    gemms = ("z", "y", "da", "dx", "dw1", "dw2") if soft else ("y", "dx", "dw1", "dw2")
    assert row["plan"] == ", ".join(f"{name} emulated sm90 0/1" for name in gemms)


def test_gemms_of_2_4_activations_are_measured_in_their_orientations():
    d, tokens, d_ff = 64, 128, 256
    rows = suites.gemm_rows((d, tokens), replace(SETTINGS, method="act24"))
    shapes = {"y": (tokens, d, d_ff), "dx": (tokens, d, d_ff), "dw1": (d_ff, d, tokens), "dw2": (d_ff, d, tokens)}
    assert {row["name"]: (row["m"], row["n"], row["k"]) for row in rows} == shapes


def test_a_layer_pays_for_its_packing_and_its_share_of_the_mask_search(monkeypatch):
    """Dense 10 ms; sparse 4 ms, packing 2 ms, mask search 40 ms in one step of 40: S = 10 / (4 + 2 + 1)."""
    answers = iter([[[10.0] * 2, [4.0] * 2], [[2.0] * 2], [[40.0] * 2]])
    monkeypatch.setattr(suites, "time_ms", lambda *_: next(answers))
    row = layer("ffn")
    assert row["s"]["auto"]["median"] == pytest.approx(10 / 7)
    assert row["variants"]["auto"]["ms"]["median"] == pytest.approx(7)


@pytest.mark.parametrize("kind", ["ffn", "block"])
def test_s_model_takes_the_measured_rates(timed, monkeypatch, kind):
    monkeypatch.setattr(suites, "copy_bandwidth", lambda device: 1e30)
    row = layer(kind)
    ratio = 6 / 3.5  # five of six equal GEMMs take half the time
    assert row["gemm_tflops"] == pytest.approx(1)
    assert row["gemm_ratio"] == pytest.approx(ratio)
    gpu = roofline.GPU(1e12, 1e30)
    block = roofline.block_s_model(gpu, 64, 256, 64, 32, ratio=ratio)
    assert row["s_model"] == pytest.approx(ratio if kind == "ffn" else block)


def test_a_plan_without_rows_has_no_model():
    assert suites.measured_card(None, 1e12) is None
    assert suites.measured_card(Report({}, [], []), 1e12) is None
    assert suites.describe(None, None) == "layer by layer"


def test_gemm_rows_have_rates_or_a_reason(request):
    rows = suites.gemm_rows((64, 128), SETTINGS)
    assert {(row["reason"], row["dense_tflops"]) for row in rows} == {("not timed here", None)}
    request.getfixturevalue("timed")
    rows = suites.gemm_rows((64, 128), SETTINGS)
    assert [row["name"] for row in rows] == list(ffn_plan.GEMMS)
    assert all(row["dense_tflops"] == pytest.approx(1) and row["best_tflops"] == pytest.approx(2) for row in rows)


@pytest.mark.parametrize("scale", ["quick", "default", "full"])
def test_grids_have_the_papers_shapes(scale):
    settings = Settings(CPU, scale)
    layers = suites.layer_grid("ffn", settings) + suites.layer_grid("block", settings)
    assert {case[0] for case in suites.layer_grid("ffn", settings)} == {"gelu", "geglu"}
    assert len(set(layers)) >= {"quick": 6, "default": 20, "full": 200}[scale]
    for activation, d, n, batch in layers:
        config = GPTConfig(n_embd=d, n_head=d // 64, activation=activation, sparse="fst")
        assert config.d_ff % 64 == 0 == n * batch % 64
    if scale == "full":
        assert {case[1] for case in layers} == set(suites.WIDTHS)
        assert {case[2] for case in layers} == {512, 1024, 2048}
        assert {case[3] for case in layers} == {4, 8, 16, 32, 64}
    assert next(case.batch for case in steps.cases(settings) if case.size == "774M") == 5
    assert steps.cases(replace(settings, sizes=("350M",))) == [("350M", 16, 1)]
    assert len(suites.gemm_grid(settings)) == (2 if scale == "quick" else 12)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gemms_are_chosen_by_their_time_on_the_gpu(monkeypatch, device):
    monkeypatch.setattr(ffn_plan, "plan_ffn", lambda config, **options: options)
    options = suites.plan(steps.TOY, 64, replace(SETTINGS, device=torch.device(device)))
    expected = {"cpu": ("emulated", False), "cuda": ("auto", True)}[device]
    assert (options["spmm"], options["graph"]) == expected
    assert options["tokens"] == 64


def test_times_are_milliseconds(monkeypatch):
    monkeypatch.setattr(suites.choose, "time_interleaved", lambda calls, *_, **__: [[2000.0]] * len(calls))
    assert suites.time_ms([min, max], SETTINGS) == [[2.0], [2.0]]


def test_attention_of_a_block_stays_dense(monkeypatch):
    modules, original = [], ffn_plan.forward_backward
    monkeypatch.setattr(
        ffn_plan, "forward_backward", lambda net, module, *rest: modules.append(module) or original(net, module, *rest)
    )
    layer("block")
    dense, sparse = modules
    assert sparse_linears(dense) == []
    assert sparse_linears(sparse) == [sparse.mlp.c_fc, sparse.mlp.c_proj]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "packed"), [("fst", 6), ("act24", 4)])
def test_bench_measures_gemms_and_layers_on_the_fake_gpu(tmp_path, on_fake_gpu, method, packed):
    on_fake_gpu(
        """
import dataclasses
import bench
from benchmarks import suites

settings_of = bench.settings_of
bench.settings_of = lambda *args: dataclasses.replace(settings_of(*args), scale="toy")
suites.copy_bandwidth = lambda device: 4e12  # measured by copies of 1 GiB on a GPU
for suite in ("gemm", "ffn"):
    bench.main(["--suite", suite, "--repetitions", "2", "--budget", "0.1", "--out_dir", out, "--method", method])
""",
        method=method,
    )
    measured = json.loads((tmp_path / "bench.json").read_text())["suites"]
    assert [row["chosen"] for row in measured["gemm"]["rows"]] == [True] * packed
    row = measured["ffn"]["rows"][0]
    assert all("ms" in row["variants"][name] for name in ("dense", "auto")), row["variants"]
    assert row["plan"].count("cusparselt") == packed
    assert row["s_model"] > 0
    assert measured["ffn"]["environment"]["device_name"] == "NVIDIA H200"

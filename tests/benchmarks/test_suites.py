"""bench.py's suites at toy sizes: all that can run without a GPU does; what cannot is a reason in its row."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import roofline, steps, suites
from benchmarks.suites import TOY, Settings
from gemm24 import plan as ffn_plan
from gemm24.choose import Report
from gemm24.matmul import Choice
from model import GPTConfig
from sparse24 import sparse_linears, transposable_mask

ROOT = Path(bench.__file__).resolve().parent

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, scale="toy", repetitions=2, spmm="emulated")
SPREAD = {"median", "min", "max"}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def timed(monkeypatch):
    """Every plan comes with a report as a GPU makes it: each 2:4 GEMM at 2 TFLOP/s, dense at 1, the last not chosen."""

    def plan_ffn(config, tokens, **options):
        plan, report = original(config, tokens, **options)
        gemms = ffn_plan.ffn_gemms(config.n_embd, config.d_ff, tokens, config.activation, config.bias, True)
        for gemm in gemms.values():
            us = 2e-6 * gemm.m * gemm.n * gemm.k
            row = {**gemm._asdict(), "dense_us": us, "dense_spread_us": [us, us], "best_us": us / 2, "ratio": 2.0}
            report.rows.append(row | Choice()._asdict() | {"chosen": gemm.name != "dw2", "reason": ""})
        return plan, Report(report.choices, report.rows, report.notes)

    original = ffn_plan.plan_ffn
    monkeypatch.setattr(ffn_plan, "plan_ffn", plan_ffn)


def layer(kind: str, settings=SETTINGS, case=("gelu", 64, 32, 2)) -> dict:
    (row,) = suites.layer_rows(kind, case, settings)
    return row


@pytest.mark.parametrize("kind", ["ffn", "block"])
def test_layer_row_has_every_variant_or_its_reason(kind):
    row = layer(kind)
    assert (row["d"], row["d_ff"], row["tokens"]) == (64, 256, 64)
    assert row["variants"].keys() == suites.VARIANTS.keys()
    assert row["variants"]["auto"].keys() >= {"ms", "pack_ms", "refresh_ms", "host_us", "working_mib"}
    assert row["variants"]["dense"]["ms"].keys() == SPREAD == row["s"]["auto"].keys()
    assert row["variants"]["dense"]["ms"]["min"] > 0
    assert row["variants"]["semi-structured"]["reason"].startswith("RuntimeError: ")
    assert row["variants"]["torchao"].keys() & {"ms", "reason"}
    assert row["plan"].startswith("z emulated sm90")
    assert "s_model" not in row  # no GEMM was timed
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("kind", ["ffn", "block"])
def test_gated_layers_run(kind):
    case = next(case for case in suites.layer_grid(kind, SETTINGS) if case[0] == "geglu")
    assert "auto" in layer(kind, case=case)["s"]


def test_packing_is_shared_by_the_micro_steps(monkeypatch):
    """dense 10 ms; sparse 4 ms, its packing 2 ms and its mask search 40 ms, one step in 40: S = 10 / (4 + 3 / G)."""
    ms = {"dense": 10.0, "sparse": 4.0, "pack": 2.0, "refresh": 40.0}
    monkeypatch.setattr(suites, "time_ms", lambda calls, *_: [[ms[call]] * 2 for call in calls])
    variants = {"dense": suites.Variant("dense"), "auto": suites.Variant("sparse", "pack", "refresh")}
    for accumulation, expected in ((1, 10 / 7), (3, 2.0)):
        rows = {"dense": {}, "auto": {}}
        settings = replace(SETTINGS, accumulation=accumulation)
        found = suites._measure_variants(variants, rows, settings)
        assert found["s"]["auto"]["median"] == pytest.approx(expected)
        assert rows["auto"]["ms"]["median"] == pytest.approx(10 / expected)


@pytest.mark.parametrize("kind", ["ffn", "block"])
def test_s_model_takes_the_measured_rates(timed, monkeypatch, kind):
    monkeypatch.setattr(suites, "copy_bandwidth", lambda device: 1e30)
    row = layer(kind)
    ratio = 6 / 3.5  # five of six equal GEMMs take half the time
    assert row["gemm_tflops"] == pytest.approx(1)
    assert row["gemm_ratio"] == pytest.approx(ratio)
    assert row["measured_over_model"] == pytest.approx(row["s"]["auto"]["median"] / row["s_model"])
    gpu = roofline.GPU(1e12, 1e30)
    block = roofline.block_s_model(gpu, 64, 256, 64, 32, ratio=ratio)
    assert row["s_model"] == pytest.approx(ratio if kind == "ffn" else block)


def test_a_plan_without_rows_has_no_model():
    assert suites.measured_card(None, 1e12) is None
    assert suites.measured_card(Report({}, [], []), 1e12) is None
    assert suites.describe(None, None) == "layer by layer"


def test_gemm_rows(timed):
    rows = list(suites.gemm_rows((64, 128), SETTINGS))
    assert [row["name"] for row in rows] == list(ffn_plan.GEMMS)
    assert all(row["dense_tflops"] == pytest.approx(1) and row["best_tflops"] == pytest.approx(2) for row in rows)
    us = rows[0]["dense_us"]
    assert bench.cells("gemm", rows[0]) == [
        ["gemm", "d 64, 128 tokens, z", f"{us / 1000:.3f}", f"{us / 2000:.3f}", "2.00"]
    ]


def test_untimed_gemms_say_so():
    rows = list(suites.gemm_rows((64, 128), SETTINGS))
    assert {row["reason"] for row in rows} == {"not timed here"}
    assert rows[0]["dense_tflops"] is None


def test_semi_structured_forward_is_pruned_and_its_gradients_are_those_of_the_pruned_layer(monkeypatch):
    """With the conversion replaced, which needs a GPU, all else runs here."""
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: w)
    config = GPTConfig(n_embd=64, n_head=1, bias=False)
    x, dy = torch.randn(2, 32, 64).bfloat16().requires_grad_(), torch.randn(2, 32, 64).bfloat16()
    grads = {}

    def keep_gradients(net, module, x, dy, dtype):
        with suites.autocast(x.device):
            y = net(x)
        y.backward(dy)
        grads["found"] = [y.detach(), x.grad, *(p.grad for p in module.parameters())]

    monkeypatch.setattr(ffn_plan, "forward_backward", keep_gradients)
    variant = suites.semi_structured_variant("ffn", config, x, dy, SETTINGS)
    variant.pack()
    x.grad = None
    dense = suites._layer("ffn", config, CPU)
    for p in dense.parameters():
        p.data.mul_(transposable_mask(p.data))
    keep_gradients(dense, dense, x, dy, None)
    expected = grads["found"]
    x.grad = None
    suites.semi_structured_variant("ffn", config, x, dy, SETTINGS)
    for ours, theirs in zip(grads["found"], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_torchao_where_it_is_installed(monkeypatch):
    training = types.ModuleType("torchao.sparsity.training")
    training.SemiSparseLinear = types.SimpleNamespace(from_dense=lambda linear: linear)
    for name in ("torchao", "torchao.sparsity"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, training.__name__, training)
    assert "torchao" in layer("ffn")["s"]


@pytest.mark.parametrize("scale", ["quick", "default", "full"])
def test_grids_hold_what_they_promise(scale):
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


def test_a_budget_leaves_out_and_a_failure_is_a_row(monkeypatch):
    rows = list(bench.suite_rows("gemm", replace(SETTINGS, budget=-1.0)))
    assert rows == [{"case": [64, 128], "reason": "left out: the suite's time was up"}]

    def broken(*_, **__):
        raise ValueError("spmm='cusparselt': cannot")

    monkeypatch.setattr(ffn_plan, "plan_ffn", broken)
    (row,) = bench.suite_rows("gemm", SETTINGS)
    assert row["reason"] == "ValueError: spmm='cusparselt': cannot"
    rows = list(bench.suite_rows("ffn", SETTINGS))
    assert all(row["variants"]["auto"]["reason"] == "ValueError: spmm='cusparselt': cannot" for row in rows)
    assert all(row["s"] == {} for row in rows)
    data = {"suites": {"gemm": {"rows": [row]}, "ffn": {"rows": rows}}}
    assert len(bench.failures(data, ["gemm", "ffn"])) == 3
    assert len(bench.failures(data, ["gemm"])) == 1  # others are of earlier runs
    left_out = {"rows": [{"case": [1], "reason": "left out: x"}, {"case": [1], "reason": "OutOfMemoryError: x"}]}
    assert bench.failures({"suites": {"ffn": left_out}}, ["ffn"]) == []


def test_results_are_saved_row_by_row_and_other_suites_stay(tmp_path):
    path = tmp_path / "gpu" / "bench.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"suites": {"e2e": {"rows": [1]}, "gemm": {"rows": [2]}}}))
    results = bench.Results(path)
    results.begin("gemm", SETTINGS)
    results.add("gemm", {"case": [1], "reason": "x"})
    saved = json.loads(path.read_text())["suites"]
    assert saved["e2e"] == {"rows": [1]}
    assert saved["gemm"]["rows"] == [{"case": [1], "reason": "x"}]
    assert "after" not in saved["gemm"]  # a run that was killed shows as such
    assert saved["gemm"]["environment"].keys() >= {"commit", "torch", "triton", "python", "device_name"}
    results.end("gemm")
    assert "after" in json.loads(path.read_text())["suites"]["gemm"]


def test_gpu_state_reads_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi" in bench.gpu_state()["reason"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 1980, 3201, 88.5, 700.00, 31'\n")
    tool.chmod(0o755)
    assert bench.gpu_state() == {
        "driver_version": "580.1",
        "clocks.sm": "1980",
        "clocks.mem": "3201",
        "power.draw": "88.5",
        "power.limit": "700.00",
        "temperature.gpu": "31",
    }


def test_cli_on_a_cpu_runs_toys_and_writes_only_where_it_was_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(["--suite", "gemm"])
    assert list(tmp_path.iterdir()) == []
    assert "Its ratios mean nothing" in capsys.readouterr().out
    bench.main(["--suite", "ffn", "--repetitions", "2", "--out_dir", "here"])
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["bench.json", "bench.md"]
    assert json.loads(Path("here/bench.json").read_text())["suites"]["ffn"]["settings"]["scale"] == "toy"


def test_failures_end_the_command_with_an_error(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ffn_plan, "plan_ffn", broken)
    with pytest.raises(SystemExit) as ended:
        bench.main(["--suite", "gemm"])
    assert ended.value.code == 1
    assert "these failed:\ngemm: RuntimeError: no kernel image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--repetitions", "0"], ["--accumulation", "-1"], ["--compile_mode", "fast"]], ids=str
)
def test_settings_that_mean_nothing_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert "need at least 1" in (said := capsys.readouterr().err) or "invalid choice: 'fast'" in said


@pytest.mark.parametrize("gpu", list(roofline.GPUS))
def test_prediction_prints_all_tables(gpu, capsys):
    bench.main(["--predict", gpu])
    text = capsys.readouterr().out
    assert text.startswith(f"S_model on {gpu.upper()}, predicted and not measured")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 * 2 + 2 * len(bench.WIDTHS) + 3 * len(bench.WIDTHS) + 4
    assert all(name in text for name in ("124M", "350M", "774M", "1558M"))


@pytest.mark.parametrize(
    ("name", "folder"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("Tesla T4", "tesla-t4")]
)
def test_results_folder_is_the_gpus_name(name, folder):
    assert bench.slug(name) == folder


def test_readme_and_results_hold_what_the_roofline_predicts(capsys):
    bench.main(["--predict"])
    text = capsys.readouterr().out
    assert (ROOT / "results" / "roofline.md").read_text() == text, "python bench.py --predict > results/roofline.md"
    h200 = text[text.index("S_model on H200") : text.index("S_model on B200")]
    steps = h200[h200.index("| size |") :].strip()
    assert len(steps.splitlines()) == 6
    assert steps in (ROOT / "README.md").read_text(), f"README should hold:\n{steps}"


def test_readme_holds_the_table_of_every_gpu_that_was_measured():
    """And a bench.md is what its bench.json says."""
    files = [*(ROOT / "results").glob("*/bench.json")]
    for path in files:
        table = bench.summary(json.loads(path.read_text()))
        assert path.with_suffix(".md").read_text() == table + "\n"
        assert table in (ROOT / "README.md").read_text(), f"README should hold the table of {path}:\n{table}"
    measured = {"s": {"auto": {"median": 1.25, "min": 1.2, "max": 1.3}}, "s_model": 1.5}
    shape = {"activation": "gelu", "d": 768, "n": 1024, "batch": 4}
    torchao = {"reason": "ModuleNotFoundError: No module named 'torchao'"}
    layers = {"variants": {"dense": {"ms": {"median": 2.0}}, "auto": {"ms": {"median": 1.6}}, "torchao": torchao}}
    way = {
        "dense": {"ms": {"median": 20.0}},
        "sparse": {"ms": {"median": 10.0}},
        "s": {"median": 2, "min": 1, "max": 3},
    }
    step = {"size": "124M", "batch": 4, "micro_steps": 2, "compiled": way, "graphs": way}
    step |= {"dense": {"peak_gib": 8.0}, "sparse": {"peak_gib": 10.0}}
    suites = {"ffn": {"rows": [shape | measured | layers, {"case": [1], "reason": "OOM"}]}, "e2e": {"rows": [step]}}
    lines = bench.summary({"suites": suites}).splitlines()[2:]
    assert lines == [
        "| ffn | gelu, d 768, n 1024, batch 4, auto | 2.000 | 1.600 | 1.25 (1.20 to 1.30) | 1.50 | 0.83 |  |",
        f"| ffn | gelu, d 768, n 1024, batch 4, torchao | 2.000 |  | {torchao['reason']} |  |  |  |",
        "| ffn | [1] |  |  | OOM |  |  |  |",
        "| e2e | 124M, batch 4 x 2, compiled | 20.000 | 10.000 | 2.00 (1.00 to 3.00) |  |  | 1.250 |",
        "| e2e | 124M, batch 4 x 2, graphs | 20.000 | 10.000 | 2.00 (1.00 to 3.00) |  |  | 1.250 |",
    ]


@pytest.mark.parametrize("kind", ["ffn", "block"])
def test_the_model_shares_packing_as_the_measurement_does(kind):
    row = {"d": 64, "d_ff": 256, "tokens": 64, "n": 32, "activation": "gelu", "s": {}}
    gpu, ratio = roofline.GPU(1e12, 1e9), dict.fromkeys(roofline.GEMMS, 1.5)
    found = suites.layer_model(kind, row, (gpu, ratio), replace(SETTINGS, accumulation=8))["s_model"]
    sparse = {"ratio": 1.5, "accumulation": 8, "mask_interval": suites.MASK_INTERVAL}
    if kind == "ffn":
        assert found == roofline.s_model(gpu, 64, 256, 64, **sparse)
    else:
        assert found == roofline.block_s_model(gpu, 64, 256, 64, 32, **sparse)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gemms_are_chosen_by_their_time_on_the_gpu(monkeypatch, device):
    monkeypatch.setattr(ffn_plan, "plan_ffn", lambda config, **options: options)
    options = suites.plan(TOY, 64, replace(SETTINGS, device=torch.device(device)))
    asked = device == "cuda"
    assert (options["graph"], options["tokens"], options["spmm"]) == (asked, 64, "emulated")


def test_units(monkeypatch):
    monkeypatch.setattr(suites.choose, "time_interleaved", lambda calls, *_, **__: [[2000.0]] * len(calls))
    assert suites.time_ms([min, max], SETTINGS) == [[2.0], [2.0]]
    assert suites.copy_bandwidth.__wrapped__(CPU) == pytest.approx(2 * 2**23 / 2e-3)  # read and written


def test_attention_of_a_block_stays_dense(monkeypatch):
    modules = []
    monkeypatch.setattr(ffn_plan, "forward_backward", lambda net, module, *_: modules.append(module))
    config = GPTConfig(n_embd=64, n_head=1, block_size=32, bias=False)
    x = torch.zeros(2, 32, 64)
    suites.auto_variant("block", config, x, x, SETTINGS)
    assert sparse_linears(modules[0]) == [modules[0].mlp.c_fc, modules[0].mlp.c_proj]

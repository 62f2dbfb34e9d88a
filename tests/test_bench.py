"""bench.py: saving rows, the answer, the tables in docs, and refused arguments."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu.test_gpu import BENCH_KERNELS, BENCH_LAYERS

import bench
from benchmarks.evidence import STAGES
from benchmarks.suites import Settings
from gemm24 import plan

ROOT = Path(bench.__file__).resolve().parent
SETTINGS = Settings(torch.device("cpu"), scale="toy", repetitions=2)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def broken(*_, **__):
    raise RuntimeError("no kernel image")


def test_a_budget_leaves_out_and_a_failure_is_a_row(monkeypatch):
    rows = list(bench.suite_rows("gemm", replace(SETTINGS, budget=-1.0)))
    assert rows == [{"case": [64, 128], "reason": "left out: the suite's time was up"}]
    monkeypatch.setattr(plan, "plan_ffn", broken)
    found = {suite: {"rows": list(bench.suite_rows(suite, SETTINGS))} for suite in ("gemm", "ffn")}
    reasons = [row["reason"] for suite in found.values() for row in suite["rows"]]
    assert reasons == ["RuntimeError: no kernel image"] * 3
    assert len(bench.failures({"suites": found}, ["gemm", "ffn"])) == 3
    assert bench.failures({"suites": found}, ["gemm"]) == ["gemm: RuntimeError: no kernel image"]  # gemm alone ran


@pytest.mark.parametrize(
    "reason", ["left out: x", "OutOfMemoryError: x", "RuntimeError: CUDA out of memory. Tried to allocate"]
)
def test_memory_and_time_that_run_out_are_no_failures(reason):
    assert bench.failures({"suites": {"ffn": {"rows": [{"case": [1], "reason": reason}]}}}, ["ffn"]) == []


def test_results_are_saved_row_by_row_and_other_suites_stay(tmp_path, monkeypatch):
    path, data = tmp_path / "gpu" / "bench.json", {"suites": {"e2e": {"rows": [1]}, "gemm": {"rows": [2]}}}

    def rows(suite, settings):
        yield {"case": [1], "reason": "x"}
        saved = json.loads(path.read_text())["suites"]
        assert saved["e2e"] == {"rows": [1]}
        assert saved["gemm"]["rows"] == [{"case": [1], "reason": "x"}]
        assert "after" not in saved["gemm"]  # so a killed run can be recognised
        yield {"case": [2], "reason": "y"}

    monkeypatch.setattr(bench, "suite_rows", rows)
    bench.run_suite("gemm", SETTINGS, data, path)
    saved = json.loads(path.read_text())["suites"]["gemm"]
    assert len(saved["rows"]) == 2
    assert saved["environment"].keys() >= {"commit", "torch", "triton", "python", "device_name"}
    assert "after" in saved
    assert saved["settings"]["scale"] == "toy"


def test_a_cpu_runs_toys_and_writes_only_to_a_given_folder(tmp_path, monkeypatch, capsys):
    assert bench.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    monkeypatch.chdir(tmp_path)
    bench.main(["--suite", "gemm"])
    assert list(tmp_path.iterdir()) == []
    assert "Its ratios mean nothing" in capsys.readouterr().out
    for suite in ("ffn", "gemm"):
        bench.main(["--suite", suite, "--repetitions", "2", "--out_dir", "here"])
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["bench.json", "bench.md"]
    assert json.loads(Path("here/bench.json").read_text())["suites"].keys() == {"ffn", "gemm"}
    assert "2:4 against compiled dense: feed-forward layers " in capsys.readouterr().out


def test_failures_end_the_command_with_an_error(monkeypatch):
    monkeypatch.setattr(plan, "plan_ffn", broken)
    with pytest.raises(SystemExit, match="these failed:\ngemm: RuntimeError: no kernel image"):
        bench.main(["--suite", "gemm"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repetitions", "0"], "0, need at least 1"),
        (["--suite", "nosuch"], "invalid choice: 'nosuch'"),
        (["probe"], "probe is no option; stages need --evidence OUT, suites --suite NAME"),
        (["--evidence", "out", "nosuch"], "--evidence: no stage 'nosuch', need some of probe, gemm, tests,"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, words, message, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        bench.main(words)
    assert message in f"{ended.value} {capsys.readouterr().err}"
    assert list(tmp_path.iterdir()) == []


def test_docs_and_results_hold_what_the_roofline_predicts(capsys):
    bench.main(["--predict"])
    text = capsys.readouterr().out
    assert (ROOT / "results" / "roofline.md").read_text() == text, "python bench.py --predict > results/roofline.md"
    bench.main(["--predict", "h200"])
    h200 = capsys.readouterr().out
    assert h200 in text
    steps = h200[h200.index("| size |") :].strip()
    assert len(steps.splitlines()) == 6
    assert steps in (ROOT / "docs" / "bench.md").read_text(), f"docs/bench.md should hold:\n{steps}"


def test_the_docs_hold_the_table_of_every_gpu_that_was_measured():
    for path in (ROOT / "results").glob("*/bench.json"):
        text = bench.summary(json.loads(path.read_text()))
        assert path.with_suffix(".md").read_text() == text + "\n"
        assert text in (ROOT / "docs" / "bench.md").read_text(), f"docs/bench.md lacks the table of {path}:\n{text}"


def test_the_summary_answers_and_has_a_line_for_each_way():
    shape = {"activation": "gelu", "d": 768, "n": 1024, "batch": 4}
    layer = shape | {"s": {"auto": {"median": 1.25, "min": 1.2, "max": 1.3}}, "s_model": 1.5}
    layer["variants"] = {"dense": {"ms": {"median": 2.0}}, "auto": {"ms": {"median": 1.6}}}
    way = {"dense": {"ms": {"median": 20.0}}, "sparse": {"ms": {"median": 10.0}}}
    step = {"size": "124M", "batch": 4, "micro_steps": 2, "compiled": way | {"s": {"median": 2, "min": 1, "max": 3}}}
    step |= {"graphs": way | {"s": {"median": 0.9, "min": 0.8, "max": 1}}}
    step |= {"dense": {"peak_gib": 8.0}, "sparse": {"peak_gib": 10.0}}
    gemm = {"name": "z", "d": 64, "tokens": 128, "dense_us": 2000.0, "best_us": 1000.0, "ratio": 2.0}
    rows = {"ffn": [layer, {"case": [1], "reason": "OOM"}], "e2e": [step]}
    rows |= {"gemm": [gemm, gemm | {"ratio": None, "reason": "no"}]}
    suites = {name: {"rows": of_suite} for name, of_suite in rows.items()}
    answer, _, _, _, *lines = bench.summary({"suites": suites}).splitlines()
    assert answer == (
        "2:4 against compiled dense: feed-forward layers 1.25 to 1.25 times as fast, "
        "optimizer steps 0.90 to 2.00 times as fast."
    )
    assert lines == [
        "| ffn | gelu, d 768, n 1024, batch 4, auto | 2.000 | 1.600 | 1.25 (1.20 to 1.30) | 1.50 | 0.83 |  |",
        "| ffn | [1] |  |  | OOM |  |  |  |",
        "| e2e | 124M, batch 4 x 2, compiled | 20.000 | 10.000 | 2.00 (1.00 to 3.00) |  |  | 1.250 |",
        "| e2e | 124M, batch 4 x 2, graphs | 20.000 | 10.000 | 0.90 (0.80 to 1.00) |  |  | 1.250 |",
        "| gemm | d 64, 128 tokens, z | 2.000 | 1.000 | 2.00 |  |  |  |",
        "| gemm | d 64, 128 tokens, z |  |  | no |  |  |  |",
    ]
    assert bench.answer({"suites": {}}) == "2:4 against compiled dense: not measured."


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA backend: this machine has a GPU to measure on")
def test_the_kernels_suite_says_what_it_needs():
    code = "import sys; sys.modules['triton'] = None; import bench; bench.main(['--suite', 'kernels', '--predict'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "need it to compile the kernels; `make test` installs it" in done.stderr
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for extra, message in (({}, "use --predict"), ({"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 .* unset it")):
        command = [sys.executable, "bench.py", "--suite", "kernels", "--out_dir", "/nonexistent/results"]
        done = subprocess.run(command, cwd=ROOT, env=environment | extra, capture_output=True, text=True)
        assert done.returncode == 1
        assert re.search(message, done.stderr), done.stderr


def bench_commands() -> list[list[str]]:
    """The words of every bench.py command that only a GPU runs."""
    commands = [stage.command.format(python="python", out="out", verdicts="gemms.json") for stage in STAGES.values()]
    words = [command.partition("bench.py ")[2].split() for command in commands]
    return [*filter(None, words), [*BENCH_KERNELS, "--out_dir=out"], [*BENCH_LAYERS, "--out_dir=out"]]


@pytest.mark.parametrize("words", bench_commands(), ids=" ".join)
def test_commands_that_only_a_gpu_runs_have_options_that_are_there(words):
    assert bench.parse(words).repetitions > 0


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = bench.parse([f"--{name}=~/x" for name in ("out_dir", "json", "verdicts", "evidence")])
    assert {args.out_dir, args.json, args.verdicts, args.evidence} == {Path("/home/me/x")}

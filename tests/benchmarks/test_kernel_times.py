"""Every kernel compiled ahead of time for three GPUs, and the counts of results/kernels.json.

Counts are of Triton 3.6.0; another release compiles to other code.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_times as bench

triton = pytest.importorskip("triton", reason="Triton backend: triton is not installed")

ROOT = Path(bench.__file__).parents[1]
CASES = {case.name: case for case in bench.CASES}
ARCHS = [card.capability for card in bench.GPUS.values()]


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def compiled(request) -> tuple[int, dict]:
    """{case: counts} for one architecture, by the compiler: this process may be bound to the interpreter."""
    if triton.__version__ != "3.6.0":
        pytest.skip(f"ahead-of-time backend: Triton {triton.__version__}, the counts are of 3.6.0")
    counts = f"{{case.name: bench.predict(case, {request.param}) for case in bench.CASES}}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"import json; from benchmarks import kernel_times as bench; print(json.dumps({counts}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_code_keeps_what_decides_its_speed(compiled):
    """No spills, no local memory, wide loads and stores, instructions below the ceilings. Minima and maxima keep NaN,
    which the interpreter cannot tell."""
    for name, counts in compiled[1].items():
        assert (counts["local"], counts["stack"], counts["nan_dropping"]) == (0, 0, 0), name
        assert (counts["wide_loads"], counts["wide_stores"]) == CASES[name].wide, name
        assert counts["instructions"] <= CASES[name].ceiling, name


def test_memory_bound_on_an_h200():
    """The ceilings keep all kernels but three below the instructions that an H200 issues while it moves the bytes. (Two
    more would be limited by the ALU pipe, if it runs at half rate as NVIDIA's table says.)"""
    card = bench.GPUS["H200"]
    budget = card.lanes_per_ps / (card.tb_per_s * bench.COPY_SHARE)  # instructions per byte
    assert round(budget, 1) == 6.8
    over = [case.name for case in bench.CASES if case.ceiling > budget * case.bytes]
    assert over == [
        "mask search, bf16 weights",  # half the bytes for the same search; the master weights of training are float32
        "MVUE, transposed and packed",  # dY alone, a fifth of what is drawn; exchanges in shared memory come on top
        "relu2 and top2, MVUE, packed both ways",  # two selections in one pass, and the same exchanges
    ]


@pytest.mark.slow
def test_results_are_of_this_code(compiled):
    arch, counts = compiled
    rows = json.loads((ROOT / "results" / "kernels.json").read_text())["kernels"]
    assert {row["name"]: row["counts"][str(arch)] for row in rows} == counts, (
        "run python bench.py --suite kernels --predict again"
    )
    for row in rows:
        for gpu, card in bench.GPUS.items():
            share = bench.share_of_copy(CASES[row["name"]], row["counts"][str(card.capability)], gpu)
            assert row["predicted"][gpu] == share


@pytest.mark.slow
def test_every_kernel_has_a_case(compiled):
    source = (ROOT / "kernels.py").read_text()
    defined = set(re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE))
    assert {counts["kernel"] for counts in compiled[1].values()} == defined


def test_share_of_copy_falls_with_the_instructions():
    case = CASES["MVUE, packed"]
    light, heavy = (
        bench.share_of_copy(case, {"instructions": n, "alu": 0, "special": 0}, "H200") for n in (1, 20 * case.bytes)
    )
    assert light == 0.92
    assert heavy == pytest.approx(6.844 / 20, rel=1e-2)  # the budget over the instructions issued
    for pipe, lanes in (("alu", 2), ("special", 8)):  # half and an eighth of the lanes
        counts = {"instructions": 1, "alu": 0, "special": 0} | {pipe: 20 / lanes * case.bytes}
        assert bench.share_of_copy(case, counts, "H200") == heavy


def test_table_has_measured_shares_where_there_are_any():
    row = {"name": "a", "unit": "element", "bytes": 4, "predicted": {"A100": 0.9, "H200": 0.8, "B200": 0.7}}
    row["counts"] = {str(arch): {"instructions": 1234.5} for arch in ARCHS}
    results = {"kernels": [row], "measured": None, "measured_on": None}
    assert bench.markdown(results).splitlines()[-1] == (
        "| a | element | 4 | 1.23e+03, 1.23e+03, 1.23e+03 | 0.90, 0.80, 0.70 |"
    )
    results |= {"measured": {"a": {"share": 0.875, "share_range": [0.86, 0.89]}}, "measured_on": {"device_name": "X"}}
    assert bench.markdown(results).splitlines()[0].endswith("| measured share, X |")
    assert bench.markdown(results).splitlines()[-1].endswith("| 0.88 (0.86 to 0.89) |")


@pytest.fixture
def interpreted(monkeypatch):
    """`measure` runs a kernel twice in the interpreter. Returns the list of (bytes moved, both results)."""
    if torch.cuda.is_available():
        pytest.skip("CUDA backend: here bench.py measures, see tests/gpu/")
    runs = []

    def run_once(make, moved, repetitions, graph=True):
        call = make()
        runs.append((moved, call(), call()))
        return {"us": 1.0, "copy_us": 1.0, "gb_per_s": moved, "share": 1.0, "share_range": [1.0, 1.0]}

    monkeypatch.setattr(bench, "measure", run_once)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    return runs


@pytest.mark.slow
def test_table2_runs_every_search(interpreted, monkeypatch):
    monkeypatch.setattr(bench, "_torch_tile", lambda w: None)  # CUDA alone has it
    rows = bench.table2([(128, 128)], 1)
    searches = ["8 candidates (ours)", "90 scores", "2-approximation"]
    assert [row["search"] for row in rows] == [*searches, *searches, "torch's greedy tile"]
    assert [moved / 1024 for moved, *_ in interpreted] == [65, 65, 80, 33, 33, 48, 68]
    assert [tuple(result.shape) for _, result, _ in interpreted[:3]] == [(32, 32), (32, 32), (128, 128)]


@pytest.mark.slow
def test_table3_runs_every_order(interpreted):
    orders = ("along tokens (ours)", "along features (intuitive)", "torch.compile")
    expected = [(order, "activation") for order in orders] + [(order, "activation_backward") for order in orders[:2]]
    assert [(row["order"], row["pass"]) for row in bench.table3([8], 1)] == expected
    assert [tuple(result.shape) for _, result, _ in interpreted] == [(8, 64)] * 3 + [(16, 64)] * 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "MVUE, packed" in name else name for name in CASES]
)
def test_cases_give_the_same_result_twice(interpreted, name):
    bench.measure(lambda: CASES[name].launcher(64, 64, "sm90", "cpu"), 0, 1)
    ((_, *results),) = interpreted
    first, second = (result if isinstance(result, tuple) else (result,) for result in results)
    if name != "AdamW with masked decay":  # it updates its tensors in place
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_report_names_what_made_it():
    environment = {"triton": "3.6.0", "torch": "2.11", "commit": "abc", "device_name": "GPU X"}
    results = {"kernels": [], "measured": None, "measured_on": None, "environment": environment}
    assert "Compiled by Triton 3.6.0, torch 2.11, commit abc. All" in bench.report(results)
    row = {"gb_per_s": 3999.6, "us": 12.34, "share": 0.9, "share_range": [0.88, 0.91], "times_ours": 1}
    tables = {"table2": [row | dict.fromkeys(("dtype", "shape", "search"), "a")]}
    tables |= {"table3": [row | {"width": 768, "order": "ours", "pass": "activation"}]}
    text = bench.report(results | {"measured": {}, "measured_on": environment} | tables)
    assert "measured on GPU X" in text
    assert "| a | a | a | 4000 | 12.3 | 1.00 | 0.90 (0.88 to 0.91) |" in text
    assert "| 768 | ours | activation | 4000 | 12.3 | 1.00 | 0.90 (0.88 to 0.91) |" in text


def test_predicting_writes_the_table_and_keeps_what_was_measured(tmp_path, monkeypatch):
    counts = {"instructions": 10.0, "alu": 1, "special": 0}
    monkeypatch.setattr(bench, "predict", lambda case, arch: counts)
    environment = {"triton": "3.6.0", "torch": "2.11", "commit": "abc", "device_name": "GPU X"}
    written = bench.run(tmp_path / "new", environment, False)
    assert written == json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert len(written["kernels"]) == len(CASES)
    assert "measured share" not in (tmp_path / "new" / "kernels.md").read_text()
    share = {"share": 0.5, "share_range": [0.4, 0.6]}
    measured = {"measured": dict.fromkeys(CASES, share), "measured_on": environment, "table2": [], "table3": []}
    (tmp_path / "new" / "kernels.json").write_text(json.dumps(written | measured))
    assert bench.run(tmp_path / "new", environment, False)["measured"] == measured["measured"]
    assert "| 0.50 (0.40 to 0.60) |" in (tmp_path / "new" / "kernels.md").read_text()


def test_a_kernel_that_cannot_be_measured_has_a_reason_and_is_a_failure(monkeypatch):
    def measure(make, moved, repetitions, graph=True):
        raise RuntimeError("out of registers\nlong text")

    monkeypatch.setattr(bench, "measure", measure)
    [row] = bench.compared([({"name": "a"}, None, 1.0)], 1)
    assert row == {"name": "a", "reason": "RuntimeError: out of registers"}
    good = {"us": 1.0}
    results = {
        "measured": {"a": row, "b": good},
        "table2": [{"shape": (4, 4), "search": name} | row for name in ("90 scores", "torch's greedy tile")],
        "table3": [{"width": 8, "order": "torch.compile"} | row, {"width": 8, "order": "along tokens (ours)"} | row],
    }
    why = "RuntimeError: out of registers"
    assert bench.failures(results) == [f"a: {why}", f"(4, 4) 90 scores: {why}", f"8 along tokens (ours): {why}"]
    assert bench.failures(dict.fromkeys(results)) == []


def test_a_few_shapes_are_spread_over_all():
    assert [bench.spread_out((1, 2, 3, 4, 5, 6, 7), n) for n in (1, 2, 3)] == [[1], [1, 4], [1, 3, 5]]

"""A GPU's page, README and docs/bench.md have the numbers of its evidence files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = sorted(path.parent.parent for path in ROOT.glob("results/*/evidence/evidence.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_page_is_that_of_the_files(folder):
    assert (folder / "README.md").read_text() == report.page(folder), "run python -m benchmarks.report again"


@pytest.fixture(scope="module")
def docs() -> str:
    return (ROOT / "docs" / "bench.md").read_text()


def measured(stage: str) -> dict:
    return json.loads((ROOT / "results" / "h200" / "evidence" / f"{stage}.json").read_text())


def steps(way: str) -> list[str]:
    rows = sorted(measured("step")["rows"], key=lambda row: int(row["size"][:-1]))
    return [report.with_spread(row[way]["s"]) for row in rows]


def test_the_docs_steps_are_those_of_the_files(docs):
    small, medium, large = steps("graphs")
    for size, s in (("124M", small), ("774M", medium), ("1558M", large)):
        assert f"| optimizer step of {size}, from CUDA graphs | {s}," in docs
    assert f"{steps('compiled')[1]}, {steps('compiled')[2]}, {steps('compiled')[0]} |" in docs
    page = (ROOT / "results" / "h200" / "README.md").read_text()
    for first, second in re.findall(r"([\d,]+) tokens/s against ([\d,]+)", docs):
        assert f"{second} / {first}" in page
    (share, times), *_ = re.findall(r"replaces (\d+) % of dense's GPU time and makes that part ([\d.]+) times", docs)
    assert f"774M: 2:4 replaces {share}% of dense's GPU time and makes it {times} times as fast" in page


def test_the_readmes_steps_are_those_of_the_files():
    small, medium, large = (s.partition(" ")[0] for s in steps("graphs"))
    spread = steps("graphs")[1].partition("(")[2].rstrip(")")
    sentence = f"774M is {medium} times as fast as compiled dense ({spread}), of 1558M {large} times, of 124M {small}"
    assert f"{sentence} times" in " ".join((ROOT / "README.md").read_text().split())


def test_the_docs_layers_and_packing_are_those_of_the_files(docs):
    rows = {row["d"]: row for row in measured("ffn")["suites"]["ffn"]["rows"] if row.get("activation") == "gelu"}
    rows = [rows[d] for d in (1280, 1600, 4096)]
    fourth = " / ".join(f"{report.s_of_micro_steps(row, 4):.2f}" for row in rows)
    assert f"packed every 4th time (computed from the line above and the time of packing) | {fourth} |" in docs
    each = " / ".join(f"{row['s']['auto']['median']:.2f}" for row in rows)
    assert f"weights packed each time by a slow host, d = 1280 / 1600 / 4096 | {each} |" in docs
    host = measured("probe")["host"]
    ours, library = host["our MVUE and packing 5120x16384 us"], host["compress 5120x16384 us"]
    assert f"| {library / ours:.1f} ({ours:.0f} us against {library:.0f} us) |" in docs


def test_2_4_activations_have_sections_of_their_own(tmp_path):
    """A page shows the products, layers, steps and losses of act24 where their stages have written a file."""
    spread = {"median": 1.25, "min": 1.2, "max": 1.3}
    dense, sparse = ({"ms": {"median": ms}, "host_us": 500.0} for ms in (2.0, 1.6))
    layer = {"d": 1280, "s": {"auto": spread, "gelu": spread | {"median": 1.5}}, "plan": "y cusparselt sm90 3/1"}
    layer["variants"] = {"dense": dense, "gelu": {"ms": {"median": 2.4}}, "auto": sparse}
    product = {"d": 1280, "dense_us": 100.0, "best_us": 80.0, "ratio": 1.25, "faults": {}}
    product["algorithms_us"] = {"cusparselt sm90 0/1": 88.0, "cusparselt sm90 3/1": 80.0}
    rows = [{"iter": 50, "train_loss": 6.0}, {"iter": 100, "train_loss": 5.0, "val_loss": None}, {"val_loss": 4.5}]
    files = {
        "evidence": {"device": "NVIDIA X", "stages": {}},
        "gemm_act24": {"suites": {"gemm": {"rows": [product | {"name": name} for name in ("y", "dx", "dw1", "dw2")]}}},
        "ffn_act24": {"suites": {"ffn": {"rows": [layer, {"case": [], "reason": "left out"}]}}},
        "train_act24": {"runs": {"act24": {"rows": rows, "exit": 0}}},
    }
    (tmp_path / "evidence").mkdir()
    for name, data in files.items():
        (tmp_path / "evidence" / f"{name}.json").write_text(json.dumps(data))
    page = report.page(tmp_path)
    assert "| d | y | dx | dw1 | dw2 |" in page
    assert "| 1280 | " + " | ".join(["100 / 80 = 1.25"] * 4) + " |" in page
    assert "0, takes 1.10 to 1.10 times as long as the best" in page
    s = "1.25 (1.20 to 1.30) | 1.50 (1.20 to 1.30)"
    assert f"| 1280 | 2.000 | 2.400 | 1.600 | {s} | y cusparselt sm90 3/1 | 0.5 / 0.5 |" in page
    assert "| act24 | 6.000 | 5.000 |  |  | 4.500 | 0 |" in page
    assert page.count("\n## ") == 3


def test_packing_less_often_takes_less():
    spread = {"median": 1.0, "min": 1.0, "max": 1.0}
    auto = {"ms": {"median": 1.5}, "pack_ms": {"median": 0.5}, "refresh_ms": {"median": 4.0}}
    row = {"variants": {"dense": {"ms": spread | {"median": 2.0}}, "auto": auto}}
    assert report.s_of_micro_steps(row, 1) == pytest.approx(2 / 1.5)
    assert report.s_of_micro_steps(row, 2) == pytest.approx(2 / (0.9 + 0.3))  # a refresh is due every 40th time


def test_kernels_are_sorted_by_name_and_counted_once():
    kernels = {
        "sm90_xmma_sparse_gemm_bf16": [2, 300.0],
        "nvjet_sm90_tst": [1, 400.0],
        "_activation_kernel": [1, 50.0],
        "triton_poi_fused_gelu": [1, 60.0],
        "_adamw_kernel": [1, 70.0],
        "Optimizer.step#X.step": [1, 70.0],
        "triton_red_fused_native_layer_norm_0": [1, 20.0],
    }
    found = report.spent_ms({"kernels": kernels, "gpu_us": 1070.0})
    expected = {"2:4 products": 0.3, "dense products": 0.4, "activation, MVUE, packing (ours)": 0.05}
    expected |= {"gelu (the compiler's)": 0.06, "AdamW (ours)": 0.07, "everything else": 0.12}
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1.0)


def test_a_step_that_could_not_be_measured_is_left_out():
    step = json.loads((ROOT / "results" / "h200" / "evidence" / "step.json").read_text())
    failed = {"rows": [*step["rows"], {"size": "1558M", "reason": "OutOfMemoryError: CUDA"}]}
    assert report.step_text(failed) == report.step_text(step)
    assert report.kinds_text(failed) == report.kinds_text(step)

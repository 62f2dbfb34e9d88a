"""The checkpoint of a training run is bit for bit the recorded one.

tests/guard.json has a hash of every tensor in the checkpoint of a 32-step run, for one CPU model and one version of
torch. Another CPU or torch rounds differently, so the test is skipped there. `python tests/test_guard.py` records the
hashes of this machine. Do that only at a commit whose results are trusted.
"""

import hashlib
import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch
from harness import SETTINGS, leaves, make_dataset, read_state, run_here

RECORD = Path(__file__).with_suffix("").parent / "guard.json"
ROW = {"mask_interval": 1, "masked_decay": 2e-4, "mvue": False}
RUNS = {
    "none": {"sparse": "none"},
    "fst": {},
    "s_ste": {"sparse": "s_ste", "mask_interval": 1, "masked_decay": 0.0},
    "step": {"sparse": "step", **ROW, "masked_decay": 0.0, "dense_finetune": 0.0},
    "bi_mask": {"sparse": "bi_mask", **ROW, "dense_finetune": 0.0},
    "fst, stopped and resumed": {},
    "fst, fused FFN": {"spmm": "masked"},
    "s_ste, fused FFN": {"sparse": "s_ste", "mask_interval": 1, "masked_decay": 0.0, "spmm": "masked"},
    "fst, packed operands": {"spmm": "emulated", "dtype": "bfloat16", "n_embd": 128},
}


def machine() -> str:
    """CPU model, instruction set and torch version: the last bits depend on them."""
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def hashes(folder: Path, name: str) -> dict[str, str]:
    """Do the run `name` in `folder`. Returns for each tensor's path in the checkpoint the start of its SHA-256."""
    settings = {**SETTINGS, "dataset": make_dataset(folder / "data"), **RUNS[name]}
    out = folder / "out"
    if "resumed" in name:
        stopped = run_here(out, settings, {"kind": "signal", "signal": "SIGTERM", "iter_num": 17, "micro_batch": 1})
        assert "stopped after iteration 18" in stopped.stdout, stopped.stderr
    done = run_here(out, settings)
    assert "done: 32 iterations" in done.stdout, done.stderr
    tensors = {path: leaf for path, leaf in leaves(read_state(out)).items() if isinstance(leaf, tuple)}
    return {path: hashlib.sha256(repr(leaf).encode()).hexdigest()[:12] for path, leaf in tensors.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "packed" in name else name for name in RUNS]
)
def test_a_run_ends_in_the_recorded_bits(tmp_path, name):
    recorded = json.loads(RECORD.read_text())
    if machine() not in recorded:
        pytest.skip(f"no hashes were recorded for {machine()}")
    actual = hashes(tmp_path, name)
    assert len(actual) > 50
    assert actual == recorded[machine()][name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[machine()] = {}
    for run in RUNS:
        with tempfile.TemporaryDirectory() as temporary:
            record[machine()][run] = hashes(Path(temporary), run)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"recorded {machine()} in {RECORD.name}")

"""The guard of the rebuilding: a run's checkpoint is, bit for bit, what it was before the code was moved.

tests/guard.json holds a hash of every tensor of a 32-step run's checkpoint, for one kind of CPU and one torch. Another
CPU or torch rounds differently, so there the test is skipped. `python tests/test_guard.py` records this machine's
hashes; do that only on a commit whose results are trusted.
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
    """What the last bits depend on."""
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def hashes(folder: Path, name: str) -> dict[str, str]:
    """Run it in `folder`; the path in the checkpoint of each tensor, and the start of its SHA-256."""
    settings = {**SETTINGS, "dataset": make_dataset(folder / "data"), **RUNS[name]}
    out = folder / "out"
    if "resumed" in name:
        stopped = run_here(out, settings, {"kind": "signal", "signal": "SIGTERM", "iter_num": 17, "micro_batch": 1})
        assert "stopped after iteration 18" in stopped.stdout, stopped.stderr
    done = run_here(out, settings)
    assert "done: 32 iterations" in done.stdout, done.stderr
    tensors = {path: leaf for path, leaf in leaves(read_state(out)).items() if isinstance(leaf, tuple)}
    return {path: hashlib.sha256(repr(leaf).encode()).hexdigest()[:12] for path, leaf in tensors.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_in_the_recorded_bits(tmp_path, name):
    recorded = json.loads(RECORD.read_text())
    if machine() not in recorded:
        pytest.skip(f"no hashes were recorded for {machine()}")
    expected, found = recorded[machine()][name], hashes(tmp_path, name)
    assert len(found) > 50
    assert found == expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[machine()] = {}
    for run in RUNS:
        with tempfile.TemporaryDirectory() as temporary:
            record[machine()][run] = hashes(Path(temporary), run)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"recorded {machine()} in {RECORD.name}")

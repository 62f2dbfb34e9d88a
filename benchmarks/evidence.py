"""Evidence from a GPU that is available for minutes: a fixed list of stages, the most valuable first.

    python bench.py --evidence OUT --minutes 4                     every stage that fits into four minutes
    python bench.py --evidence OUT --minutes 3 probe gemm tests    these stages, in this order

Each stage runs in its own process group. It begins only if `least` seconds are left, and after `most` seconds it is
killed with all its children. Stages write every number as soon as it is measured, so a killed stage keeps its results.
OUT/evidence.json says how each stage ended, with the end of its output if it failed; log.txt has the full output. A
stage that succeeded for the same code, in OUT or in results/<gpu>/evidence, is skipped, so calls weeks apart add up.

The compile caches of Triton and Inductor come back as caches.tgz, the choices of GEMMs as gemms.json. To reuse them,
put these files into .evidence before a later call. The stage `train` reads the dataset .evidence/books if it exists
(train.bin, val.bin and meta.json), else Python's standard library. Set NANO24_COMMIT to name the commit in the results
if the copy has no git history.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import gpu_state, read_json
from configurator import write_json

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / ".evidence"  # caches and data brought along from an earlier call; git ignores it
MOST_FILES = 8  # lent machines return few files: more than this are packed into results.tgz
ARCHIVE_BYTES = 15 * 2**20  # larger archives of caches are not returned
VERDICTS = "xdg/nano24/spmm.json"  # path in the folder of caches where train.py looks for choices of GEMMs
KILL_S = 5  # seconds between SIGTERM and SIGKILL


class Stage(NamedTuple):
    """A shell command and its time limits in seconds."""

    least: float  # time that must be left for the stage to begin
    most: float  # time after which it is killed
    command: str  # {out}: folder of results, {python}: the interpreter, {verdicts}: file of choices of GEMMs


def _bench(suite: str, words: str, method: str = "") -> str:
    name, words = (f"{suite}_{method}", f"--method {method} {words}") if method else (suite, words)
    return f"{{python}} bench.py --suite {suite} --json {{out}}/{name}.json --verdicts {{verdicts}} {words}"


_GEMM, _FFN = "--widths 1600 4096 1280 --repetitions 7 --budget 55", "--graph --widths 1600 4096 1280 --repetitions 7"


STAGES = {
    "probe": Stage(25, 75, "{python} -m benchmarks.probe {out}/probe.json"),
    "gemm": Stage(30, 90, _bench("gemm", "--widths 1600 4096 768 1280 --repetitions 7 --budget 70")),
    "tests": Stage(
        40,
        140,
        "{python} -m pytest -q -n 14 -p no:cacheprovider -m gpu tests/test_kernels.py tests/gemm24/test_gpu.py "
        "--deselect tests/gemm24/test_gpu.py::test_times_are_those_of_the_gpu",
    ),
    "sweep": Stage(25, 90, "{python} -m benchmarks.sweep {out}/sweep.json"),
    "kernels": Stage(
        30, 80, "{python} bench.py --suite kernels --measured_only --repetitions 5 --tables 3 --out_dir {out}"
    ),
    "ffn": Stage(40, 120, _bench("ffn", "--graph --widths 1600 4096 1280 --repetitions 7 --budget 45")),
    "step": Stage(60, 150, "{python} -m benchmarks.steps {out}/step.json --verdicts {verdicts}"),
    "train": Stage(60, 130, "{python} -m benchmarks.curves {out}/train.json"),
    "resume": Stage(
        40, 90, "{python} -m pytest -q -n 4 -p no:cacheprovider -m gpu tests/gpu -k 'resumes or operators'"
    ),
    # 2:4 activations (methods/act24.py). The stage `kernels` measures their kernels.
    "gemm_act24": Stage(25, 75, _bench("gemm", _GEMM, "act24")),
    "ffn_act24": Stage(35, 100, _bench("ffn", f"{_FFN} --budget 60", "act24")),
    "train_act24": Stage(55, 85, "{python} -m benchmarks.curves {out}/train_act24.json activations"),
    "step_act24": Stage(
        45, 100, "{python} -m benchmarks.steps {out}/step_act24.json --verdicts {verdicts} --method act24 --sizes 774M"
    ),
    "gemm_act24_soft": Stage(20, 60, _bench("gemm", _GEMM, "act24_soft")),
    "ffn_act24_soft": Stage(35, 100, _bench("ffn", f"{_FFN} --budget 60", "act24_soft")),
}


def code_id(stage: Stage) -> str:
    """A hash of the source files that needs no git history. Stages that run tests also hash the tests."""
    folders = ["benchmarks", "gemm24", "methods", "runtime", *(["tests"] if "pytest" in stage.command else [])]
    files = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def run_stage(stage: Stage, out: Path, seconds: float, log) -> dict:
    """Run one stage for at most `seconds`. Returns its status, time and, unless it is "ok", the end of its output."""
    caches = out / "caches"
    command = stage.command.format(python=sys.executable, out=out, verdicts=caches / VERDICTS)
    folders = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "XDG_CACHE_HOME": "xdg"}
    environment = os.environ | {name: str(caches / folder) for name, folder in folders.items()}
    environment |= {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "4"}
    log.write(f"\n===== {command}\n")
    log.flush()
    begin, start = log.tell(), time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = "ok" if process.wait(seconds) == 0 else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        status = f"killed after {seconds:.0f} s"
    _end_group(process)
    result = {"status": status, "seconds": round(time.monotonic() - start, 1), "command": stage.command}
    if status != "ok":
        log.flush()
        text = Path(log.name).read_bytes()[begin:].decode(errors="replace")
        result["output"] = text.splitlines()[-40:]
    return result


def _end_group(process: subprocess.Popen) -> None:
    """End a process and its children: SIGTERM first, then SIGKILL."""
    with contextlib.suppress(ProcessLookupError):  # the group may be empty
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_S)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def unpack(archive: Path, into: Path) -> None:
    with tarfile.open(archive) as file:
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python before 3.11.4 has no filter
        file.extractall(into, **options)


def bring_back(out: Path) -> None:
    """Unpack the results of an earlier call into this folder, and its caches or those in .evidence."""
    if (out / "results.tgz").exists():
        unpack(out / "results.tgz", out)
        (out / "results.tgz").unlink()
    caches, verdicts = out / "caches", out / "caches" / VERDICTS
    for folder in (out, CARRIED):
        if (folder / "caches.tgz").exists() and not caches.exists():
            unpack(folder / "caches.tgz", out)
    verdicts.parent.mkdir(parents=True, exist_ok=True)
    for folder in (out, CARRIED):
        if (folder / "gemms.json").exists() and not verdicts.exists():
            shutil.copy(folder / "gemms.json", verdicts)


def pack_up(out: Path) -> None:
    """Pack the caches into one archive, and the results too if there are too many files."""
    caches = out / "caches"
    if (caches / VERDICTS).exists():
        shutil.move(caches / VERDICTS, out / "gemms.json")
    if caches.exists():
        with tarfile.open(out / "caches.tgz", "w:gz") as archive:
            archive.add(caches, "caches")
        size = (out / "caches.tgz").stat().st_size
        if size > ARCHIVE_BYTES:
            (out / "caches.tgz").unlink()
            print(f"caches left behind: {size / 2**20:.0f} MiB packed", flush=True)
        shutil.rmtree(caches)
    unpacked = ("evidence.json", "log.txt", "caches.tgz")
    others = [path for path in sorted(out.iterdir()) if path.name not in unpacked]
    if len(others) + len(unpacked) > MOST_FILES:
        with tarfile.open(out / "results.tgz", "w:gz") as archive:
            for path in others:
                archive.add(path, path.name)
        for path in others:
            path.unlink()


def run(out: Path, minutes: float, names: Sequence[str], stages: dict[str, Stage], held: Path | None = None) -> bool:
    """Run the named stages, or all, within `minutes`. held: the evidence.json of earlier calls. Returns True if every
    stage that began succeeded. Raises ValueError for an unknown stage."""
    if unknown := [name for name in names if name not in stages]:
        raise ValueError(f"--evidence: no stage {unknown[0]!r}, need some of {', '.join(stages)}")
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    device = gpu_state().get("name")
    bring_back(out)
    done, ran = {}, []
    for path in (held, out / "evidence.json"):
        if path and path.exists():
            done |= read_json(path)["stages"]
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        for name in names or stages:
            code = code_id(stages[name])
            if done.get(name, {}).get("status") == "ok" and done[name]["code"] == code:
                print(f"{name}: skipped, it succeeded for this code already", flush=True)
                continue
            left = end - time.monotonic() - 2 * KILL_S
            if left < stages[name].least:
                print(f"{name}: left out, {left:.0f} s are left and it needs {stages[name].least:.0f}", flush=True)
                continue
            done[name] = run_stage(stages[name], out, min(stages[name].most, left), log)
            done[name] |= {"code": code, "commit": os.environ.get("NANO24_COMMIT"), "device": device}
            ran.append(name)
            write_json(out / "evidence.json", {"device": device, "stages": done})
            print(f"{name}: {done[name]['status']}, {done[name]['seconds']} s", flush=True)
    write_json(out / "evidence.json", {"device": device, "stages": done})
    text = (out / "log.txt").read_text(encoding="utf-8", errors="replace")
    pack_up(out)
    print("\n".join(text.splitlines()[-90:]))
    return all(done[name]["status"] == "ok" for name in ran)

"""The runner of stages: stages that succeed, crash, hang, and leave processes behind."""

import json
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import evidence
from benchmarks.evidence import Stage
from gemm24.plan import ffn_gemms
from sparse24 import get_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
GOOD = Stage(0, 60, "echo fine; echo '{{}}' > {out}/good.json")


@pytest.fixture(autouse=True)
def nothing_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(evidence, "KILL_S", 0.5)
    monkeypatch.setenv("NANO24_COMMIT", "abc")


def outcome(out: Path) -> dict:
    return json.loads((out / "evidence.json").read_text())["stages"]


def test_a_crash_does_not_stop_the_other_stages_and_a_long_stage_is_left_out(tmp_path, capsys):
    stages = {
        "long": Stage(1000, 2000, "echo > {out}/long.json"),
        "good": GOOD,
        "crash": Stage(0, 60, "{python} -c 'print(1); raise SystemError(\"lost the GPU\")'"),
        "after": Stage(0, 60, "echo later > {out}/after.json"),
    }
    assert not evidence.run(tmp_path, 5, [], stages)
    found = outcome(tmp_path)
    assert [found[name]["status"] for name in stages if name != "long"] == ["ok", "exit status 1", "ok"]
    assert found["crash"]["output"][-1] == "SystemError: lost the GPU"
    assert "output" not in found["good"]
    assert {(stage["code"], stage["commit"]) for stage in found.values()} == {(evidence.code_id(GOOD), "abc")}
    assert "long: left out" in capsys.readouterr().out
    assert "long" not in found
    assert not (tmp_path / "long.json").exists()
    assert (tmp_path / "after.json").read_text() == "later\n"
    assert "SystemError: lost the GPU" in (tmp_path / "log.txt").read_text()


def test_a_stage_that_hangs_is_killed_with_all_it_started(tmp_path):
    beat = tmp_path / "beat"
    child = f"sh -c 'trap \"\" TERM; while :; do echo >> {beat}; sleep 0.05; done'"
    hang = f"{child} & echo begun > {{out}}/hang.json; sleep 600"
    assert not evidence.run(tmp_path / "out", 5, [], {"hang": Stage(0, 1, hang), "good": GOOD})
    found = outcome(tmp_path / "out")
    assert found["hang"]["status"] == "killed after 1 s"
    assert found["good"]["status"] == "ok"
    assert (tmp_path / "out" / "hang.json").read_text() == "begun\n"  # the results before the kill stay
    size = beat.stat().st_size
    time.sleep(0.5)
    assert beat.stat().st_size == size > 0  # the child that ignores SIGTERM is gone too


def test_a_stage_that_succeeded_for_the_same_code_is_skipped(tmp_path, monkeypatch, capsys):
    count = Stage(0, 60, "echo run >> {out}/count.json")
    fail = Stage(0, 60, "echo run >> {out}/fail.json; exit 3")
    stages, held = {"count": count, "fail": fail}, tmp_path / "held" / "evidence.json"
    evidence.run(tmp_path / "held", 5, [], stages)
    evidence.run(tmp_path / "out", 5, [], stages, held)
    assert "count: skipped" in capsys.readouterr().out
    assert not (tmp_path / "out" / "count.json").exists()
    assert (tmp_path / "out" / "fail.json").exists()
    assert outcome(tmp_path / "out").keys() == {"count", "fail"}  # calls add up
    monkeypatch.setattr(evidence, "code_id", lambda stage: "other code")
    evidence.run(tmp_path / "out", 5, ["count"], stages, held)
    assert (tmp_path / "out" / "count.json").read_text() == "run\n"


def test_caches_are_reused_and_large_ones_left_behind(tmp_path, monkeypatch, capsys):
    write = Stage(0, 60, "mkdir -p $TRITON_CACHE_DIR; echo kernel >> $TRITON_CACHE_DIR/k; echo 1 > {verdicts}")
    evidence.run(tmp_path / "out", 5, [], {"write": write})
    assert not (tmp_path / "out" / "caches").exists()
    carried = tmp_path / "carried"
    carried.mkdir()
    for name in ("caches.tgz", "gemms.json"):
        (carried / name).write_bytes((tmp_path / "out" / name).read_bytes())
    read = Stage(0, 60, "cat $TRITON_CACHE_DIR/k $XDG_CACHE_HOME/nano24/spmm.json > {out}/read.json")
    evidence.run(tmp_path / "later", 5, [], {"read": read})
    assert (tmp_path / "later" / "read.json").read_text() == "kernel\n1\n"
    monkeypatch.setattr(evidence, "ARCHIVE_BYTES", 10)
    evidence.run(tmp_path / "large", 5, [], {"write": write})
    assert "caches left behind" in capsys.readouterr().out
    assert not (tmp_path / "large" / "caches.tgz").exists()


def test_a_second_call_into_a_folder_keeps_the_results_of_the_first(tmp_path):
    many = Stage(0, 60, "for i in 1 2 3 4 5 6 7 8; do echo $i > {out}/$i.json; done; echo one > {verdicts}")
    more = Stage(0, 60, "cat {verdicts} > {out}/more.json; echo two >> {verdicts}")
    stages = {"many": many, "more": more}
    evidence.run(tmp_path, 5, ["many"], stages)
    assert {path.name for path in tmp_path.iterdir()} == {"evidence.json", "log.txt", "caches.tgz", "results.tgz"}
    evidence.run(tmp_path, 5, ["more"], stages)
    with tarfile.open(tmp_path / "results.tgz") as archive:
        assert set(archive.getnames()) == {*(f"{i}.json" for i in range(1, 9)), "more.json", "gemms.json"}
        assert archive.extractfile("more.json").read() == b"one\n"
        assert archive.extractfile("gemms.json").read() == b"one\ntwo\n"
    assert outcome(tmp_path).keys() == {"many", "more"}


def test_the_code_id_depends_on_the_files(monkeypatch, tmp_path):
    measures, tests = Stage(0, 1, "{python} bench.py"), Stage(0, 1, "{python} -m pytest tests")
    assert evidence.code_id(measures) == evidence.code_id(measures) != evidence.code_id(tests)
    for name in ("benchmarks", "gemm24", "tests/gemm24"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train.py").write_text("a = 1\n")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    ids = [(evidence.code_id(measures), evidence.code_id(tests))]
    for name in ("tests/gemm24/test_x.py", "gemm24/x.py"):
        (tmp_path / name).write_text("a = 1\n")
        ids.append((evidence.code_id(measures), evidence.code_id(tests)))
    assert ids[0][0] == ids[1][0] != ids[2][0]
    assert len({tests for _, tests in ids}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"{suite}_{method}" for method in ("act24", "act24_soft") for suite in ("gemm", "ffn")]
)
def test_stages_of_2_4_activations_run_at_toy_size_without_a_gpu(tmp_path, monkeypatch, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert evidence.run(tmp_path, 5, [name], evidence.STAGES), (tmp_path / "log.txt").read_text()
    (rows,) = [one["rows"] for one in json.loads((tmp_path / f"{name}.json").read_text())["suites"].values()]
    if name.startswith("gemm"):
        assert [row["name"] for row in rows] == [*ffn_gemms(64, 256, 128, "relu2", False, get_recipe(name[5:]))]
    else:
        assert [row["variants"].keys() for row in rows] == [{"dense", "gelu", "auto"}]
        assert rows[0]["plan"].count("emulated") == (4 if name == "ffn_act24" else 6)


@pytest.mark.parametrize("name", evidence.STAGES)
def test_the_program_and_the_files_of_a_stage_exist(name):
    stage = evidence.STAGES[name]
    words = stage.command.split()
    assert 0 < stage.least < stage.most
    assert words[0] == "{python}"
    module = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    paths = [word.partition("::")[0] for word in words if word.startswith("tests/")]
    for path in paths if module == "pytest.py" else [module, *paths]:
        assert (ROOT / path).exists(), path

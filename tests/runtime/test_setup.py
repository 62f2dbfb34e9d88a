"""runtime/setup.py: config.json, resuming, the lock on the folder, and the choice of 2:4 GEMMs."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import (
    DENSE_START,
    SETTINGS,
    all_settings,
    contents,
    launch,
    read_rows,
    read_state,
    run_differences,
    stop_at,
)

import train
from configurator import setting_names
from gemm24.choose import Report
from gemm24.matmul import Choice
from gemm24.plan import FFNPlan, plan_ffn, set_plan
from methods import act24
from model import GPT, GPTConfig
from runtime import ranks, setup
from runtime.ranks import Ranks
from sparse24 import get_recipe, recipe_of, sparse_linears

CPU = torch.device("cpu")
# A row of `choose` on a GPU
ROW = {"name": "z", "m": 1, "n": 2, "k": 3, "dense_us": 10.0, "best_us": 8.0, "ratio": 1.25, "chosen": True}
ROW |= {"backend": "cusparselt", "order": "sm90", "alg_id": 4, "split_k": 1, "reason": "", "faults": {}}
ROW["key"] = '[1, [1, 2, 3, true, true, false, false], "torch.bfloat16", "auto"]'


def test_config_json_and_the_checkpoint_hold_all_settings(reference):
    saved = json.loads((reference[0] / "config.json").read_text())
    names = setting_names(vars(train))
    assert list(saved) == [*names, "environment", "starts"]
    resolved = {"device": "cpu", "dtype": "float32", "compile": False, "dense_start": DENSE_START}
    resolved["flip_mask"] = "transposable"
    for name in names:
        default = SETTINGS.get(name, getattr(train, name))
        assert name in ("out_dir", "dataset") or saved[name] == resolved.get(name, default), name
    environment, starts = saved.pop("environment"), saved.pop("starts")
    assert environment.pop("iter_num") == 0
    assert environment.keys() == {"commit", "torch", "triton", "device_name", "kernels", "world_size", "threads"}
    assert (environment["torch"], environment["world_size"]) == (torch.__version__, 1)
    assert environment["kernels"] == "off: the kernels need CUDA, this is cpu"
    state = read_state(reference[0])
    assert state["config"] == saved
    assert state["starts"] == starts == [{"iter_num": 0, **environment}]
    assert (state["iter_num"], state["dense_start"]) == (SETTINGS["max_iters"], DENSE_START)
    assert GPTConfig(**state["model_args"]).n_embd == 32


def test_run_here_takes_a_deterministic_runs_setting_back(run, tmp_path, monkeypatch):
    """It would slow down or fail the tests after it."""
    seen, enabled = [], torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(train, "get_lr", lambda iter_num: seen.append(enabled()) or 1e-3)
    run(tmp_path / "out", max_iters=1, deterministic=True)
    assert (seen, enabled()) == ([True], False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_metrics_after_the_checkpoint_are_written_again(run, reference, stopped):
    before = (stopped / "metrics.jsonl").read_text()
    assert [row["iter"] for row in read_rows(stopped)] == [*range(10)]
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"iter": 10, "phase": "sparse"}\n{"iter": 11, "phase": "sparse"}\n{"iter": 12, "pha')
    run(stopped)
    assert (stopped / "metrics.jsonl").read_text().startswith(before)
    elapsed = [row["elapsed_s"] for row in read_rows(stopped)]
    assert elapsed == sorted(elapsed)
    assert run_differences(stopped, reference[0]) == []


def test_a_damaged_checkpoint_is_refused_and_the_one_before_can_be_used(run, refused, reference, stopped):
    path = stopped / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    said = re.search(r"truncated.*the checkpoint of iteration 8 is intact: to .*, mv (\S+) (\S+)\n", refused(stopped))
    assert said.groups() == (str(stopped / "ckpt_prev.pt"), str(path))
    path.unlink()
    assert "at iteration 8;" in run(stopped)
    assert run_differences(stopped, reference[0]) == []


def test_damaged_metrics_and_a_damaged_config_do_not_stop_a_resume(run, stopped):
    before = read_rows(stopped)
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines()
    lines[4:4] = [b"\xff\0{", b'{"iter": 3}', b"[]"]
    (stopped / "metrics.jsonl").write_bytes(b"\n".join([*lines, b"{"]))
    (stopped / "config.json").write_bytes(b"\0\0")
    assert run(stopped, max_iters=11, dense_start=9).count("metrics.jsonl: deleted a damaged line") == 4
    assert read_rows(stopped)[:10] == before
    assert json.loads((stopped / "config.json").read_text())["max_iters"] == 11


@pytest.mark.slow
def test_another_max_iters_continues_with_a_chosen_dense_start(run, stopped):
    text = run(stopped, max_iters=40, dense_start=12)
    assert re.search(r"changed since the checkpoint: .*max_iters 32 -> 40", text)
    assert [row["phase"] for row in read_rows(stopped)] == ["sparse"] * 12 + ["dense"] * 29
    assert (read_state(stopped)["iter_num"], read_state(stopped)["dense_start"]) == (40, 12)
    run(stopped, max_iters=42, dense_start=12)
    assert [row["iter"] for row in read_rows(stopped)] == [*range(43)]


def test_a_run_without_a_dense_end_is_extended(run, tmp_path):
    settings = {"sparse": "ste", "masked_decay": 0.0, "mvue": False}
    assert "no dense phase" in run(tmp_path / "out", **settings, max_iters=2, dense_start=-1)
    run(tmp_path / "out", **settings, max_iters=4, dense_start=-1)
    assert [row["phase"] for row in read_rows(tmp_path / "out")] == ["sparse"] * 5


@pytest.mark.slow
def test_overwrite_starts_anew(run, reference, stopped):
    (stopped / "ckpt_best.pt").touch()
    (stopped / "notes.txt").write_text("mine")
    assert "resuming" not in run(stopped, init_from="scratch", overwrite=True)
    assert run_differences(stopped, reference[0]) == []
    assert not (stopped / "ckpt_best.pt").exists()
    assert (stopped / "notes.txt").read_text() == "mine"


def test_float16_goes_on_from_float32(run, tmp_path):
    run(tmp_path / "out", max_iters=3, dense_start=9)
    assert "at iteration 3" in run(tmp_path / "out", max_iters=6, dense_start=9, dtype="float16")


def test_each_start_is_recorded_and_what_changed_since_the_last_one_is_printed(run, stopped, monkeypatch):
    assert "threads" not in run(stopped, stop_at(12))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    text = run(stopped, max_iters=15, dense_start=9)
    assert re.findall("changed since the checkpoint: .*(threads.*)", text) == ["threads 1 -> 2"]
    starts = read_state(stopped)["starts"]
    assert [(start["iter_num"], start["threads"]) for start in starts] == [(0, 1), (10, 1), (13, 2)]
    config = json.loads((stopped / "config.json").read_text())
    assert (config["starts"], config["environment"]) == (starts, starts[-1])


@pytest.fixture
def other_data(data, tmp_path):
    """other_data(change): a folder with the dataset of all runs, after a change of its tokens."""

    def other_data(change):
        folder = shutil.copytree(data, tmp_path / "other")
        train, val = (np.fromfile(folder / name, dtype="<u2") for name in ("train.bin", "val.bin"))
        changes = {"order": (train[::-1], val), "longer": (np.append(train, train[:1]), val), "swapped": (val, train)}
        changes |= {"val": (train, val[::-1]), "nothing": (train, val)}
        for name, tokens in zip(("train.bin", "val.bin"), changes[change], strict=True):
            tokens.tofile(folder / name)
        return folder

    return other_data


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("order", r"train_checksum \w{8} -> \w{8}"),
        ("longer", r"train_tokens (\d+) -> \d+, train_checksum .*"),
        ("swapped", r"train_tokens .* train_checksum .* val_tokens .* val_checksum .*"),
        ("val", r"val_checksum \w{8} -> \w{8}"),
    ],
)
def test_other_tokens_are_refused_unless_they_are_allowed(run, refused, stopped, other_data, change, named):
    changes = {"dataset": other_data(change), "max_iters": 11, "dense_start": 9}
    said = refused(stopped, **changes)
    assert re.search(
        f"ckpt.pt was trained on other data than those of dataset=.*: {named}; .* --allow_other_data=True", said
    )
    line = f"changed since the checkpoint: .*{named}$"
    assert re.search(line, run(stopped, **changes, eval_only=True), re.M)
    assert re.search(line, run(stopped, **changes, allow_other_data=True, eval_interval=0), re.M)
    assert "train_" not in run(stopped, **{**changes, "max_iters": 12})  # the checkpoint has the new tokens now


def test_a_dataset_that_was_moved_or_prepared_again_is_the_same(run, stopped, other_data, reference):
    text = run(stopped, dataset=other_data("nothing"))
    assert re.search(r"changed since the checkpoint: out_dir \S+ -> \S+, dataset \S+ -> \S+$", text, re.M)
    assert run_differences(stopped, reference[0]) == []


def test_a_checkpoint_of_an_earlier_release_has_no_data_and_no_starts(run, stopped):
    state = read_state(stopped)
    torch.save({key: value for key, value in state.items() if key not in ("data", "starts")}, stopped / "ckpt.pt")
    text = run(stopped, max_iters=11, dense_start=9)
    assert "checksum" not in text
    assert "threads" not in text
    after = read_state(stopped)
    assert after["data"] == state["data"]
    assert [start["iter_num"] for start in after["starts"]] == [10]


def test_the_best_loss_on_other_validation_tokens_is_forgotten(run, stopped, other_data):
    state = read_state(stopped)
    torch.save({**state, "best_val_loss": 0.0}, stopped / "ckpt.pt")
    run(stopped, max_iters=11, dense_start=9)
    assert read_state(stopped)["best_val_loss"] == 0.0
    run(stopped, max_iters=12, dense_start=9, dataset=other_data("val"), allow_other_data=True)
    assert 0 < read_state(stopped)["best_val_loss"] < 10


# ---------------------------------------------------------------------------------------------------------------------
# The folder, the disk, the ranks


def test_temporary_files_of_a_killed_run_are_deleted(run, stopped):
    for name in ("config.json.12.tmp", "metrics.jsonl.12.tmp", "ckpt_00000008.pt.tmp", "mine.tmp"):
        (stopped / name).touch()
    run(stopped, max_iters=11, dense_start=9)
    assert [path.name for path in stopped.glob("*.tmp")] == ["mine.tmp"]


def test_metrics_of_a_run_without_checkpoints_are_kept(run, stopped):
    old = (stopped / "metrics.jsonl").read_bytes()
    for path in stopped.glob("ckpt*"):
        path.unlink()
    assert "is of a run without checkpoints: added to metrics_old.jsonl" in run(stopped, max_iters=1, dense_start=1)
    assert (stopped / "metrics_old.jsonl").read_bytes() == old
    assert len(read_rows(stopped)) == 2  # one step, and the last evaluation


def test_a_second_run_in_the_folder_is_refused(run, refused, stopped):
    held = ranks.hold(stopped)
    said = refused(stopped)
    assert f"is in use by process {os.getpid()} on" in said
    assert "set another out_dir" in said
    held.close()
    run(stopped, max_iters=11, dense_start=3)


@pytest.mark.parametrize(
    ("was", "changes"),
    [("empty", {}), ("stopped", {}), ("stopped", {"init_from": "scratch", "overwrite": True})],
    ids=["new", "resume", "overwrite"],
)
def test_a_slow_start_never_clears_a_run_that_another_process_finished_meanwhile(
    run, attempt, stopped, tmp_path, monkeypatch, was, changes
):
    """The other run comes after this start has looked for a checkpoint, and is over before it locks the folder."""
    out, build, lives = tmp_path / "empty" if was == "empty" else stopped, setup.build_model, []
    (stopped / "run.lock").unlink()  # as in a copied folder

    def build_slowly(*args):
        if not lives:
            lives.append("another")
            run(out, max_iters=12, dense_start=12)
            lives.append(contents(out))
        return build(*args)

    monkeypatch.setattr(setup, "build_model", build_slowly)
    done = attempt(out, **changes)
    said = f"train.py: error: out_dir={out}: another run has written there during this start; start once more\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert contents(out) == lives[1]
    assert read_state(out)["iter_num"] == 12


def test_a_lock_file_that_is_a_symbolic_link_is_refused(refused, stopped, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for out in (stopped, tmp_path / "new"):
        out.mkdir(exist_ok=True)
        (out / "run.lock").unlink(missing_ok=True)
        (out / "run.lock").symlink_to(victim)
        assert f"{out}/run.lock cannot be opened: Too many levels of symbolic links; delete it, or set" in refused(out)
    (out / "run.lock").unlink()
    (out / "run.lock").mkdir()
    assert "run.lock cannot be opened: Is a directory" in refused(out)
    assert victim.read_text() == "precious"


def test_an_out_dir_that_cannot_be_one_is_refused_in_one_line(attempt, tmp_path):
    (tmp_path / "file").touch()
    for out, said in {"file": "is a file", "file/out": "Not a directory", "x" * 300: "File name too long"}.items():
        done = attempt(tmp_path / out)
        assert re.fullmatch(rf"train\.py: error: [^\n]*{said}[^\n]*\n", done.stderr)
        assert (done.returncode, os.listdir(tmp_path)) == (1, ["file"])


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(refused, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    monkeypatch.setattr(train, "run", lambda t: pytest.fail("the run began"))
    message = "cannot be used: it has 0.0001 GB free, need 0.00[0-9]+ GB for 3 more checkpoints; free space, or set"
    assert re.search(message, refused(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_the_space_that_is_asked_for_is_that_of_a_checkpoint(run, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(setup.checkpoint, "probe", lambda out, size: (sizes.append(size), os.mkdir(out)))
    run(tmp_path / "out", max_iters=2, n_embd=128, n_head=2)
    assert sizes == [pytest.approx((tmp_path / "out" / "ckpt.pt").stat().st_size, rel=0.1)]


def test_an_error_of_rank_0_in_the_folder_is_told_to_all_ranks(refused, tmp_path, monkeypatch):
    told, agree, full = [], Ranks.agree, OSError("the disk is full")

    def fail(*_):
        raise full

    monkeypatch.setattr(Ranks, "agree", lambda self, facts, error=None: told.append(error) or agree(self, facts, error))
    monkeypatch.setattr(setup, "open_folder", fail)
    assert refused(tmp_path / "out") == "train.py: error: the disk is full\n"
    assert told == [None, full]


@pytest.mark.slow
def test_settings_and_logs_hold_no_secret(data, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a-secret-key")
    done = launch(tmp_path / "out", {**SETTINGS, "dataset": data, "max_iters": 2})
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, done.stderr] + [path.read_bytes().decode("latin1") for path in (tmp_path / "out").iterdir()]
    assert len(texts) >= 5
    assert not any("a-secret-key" in text for text in texts)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_what_was_saved(attempt, run, reference, tmp_path, monkeypatch):
    out, save = tmp_path / "out", torch.save

    def fail_at_12(state, file):
        if state["iter_num"] == 12:
            file.write(b"half")
            raise OSError("No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_at_12)
        done = attempt(out)
    assert done.returncode == 1
    assert re.fullmatch(r"train\.py: error: cannot write .*: No space left on device; [^\n]+\n", done.stderr)
    assert read_state(out)["iter_num"] == 8
    run(out)
    assert run_differences(out, reference[0]) == []


def test_ranks_that_cannot_meet_are_refused(refused, tmp_path, monkeypatch):
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 99999}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    message = "ranks cannot connect by gloo: .*99999.*; start train.py with torchrun"
    assert re.search(message, refused(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------------------------
# 2:4 GEMMs: measured before a run, saved, and used

PACKED = {"n_embd": 64, "dtype": "bfloat16", "dropout": 0.0, "max_iters": 14, "lr_decay_iters": 14, "dense_start": 11}


@pytest.mark.slow
def test_planned_runs_train_as_the_layers_do_and_packed_ones_bit_for_bit(run, tmp_path):
    for spmm in ("dense", "masked", "emulated"):
        text = run(tmp_path / spmm, **PACKED, spmm=spmm)
        assert ("2:4 GEMMs are emulated" in text) == (spmm == "emulated")
    assert run_differences(tmp_path / "emulated", tmp_path / "masked") == []
    dense, masked = (read_rows(tmp_path / spmm) for spmm in ("dense", "masked"))
    for a, b in zip(dense, masked, strict=True):
        assert b["train_loss"] == (None if a["train_loss"] is None else pytest.approx(a["train_loss"], rel=2e-2))
    assert [row["train_loss"] for row in dense] != [row["train_loss"] for row in masked]  # by rounding


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mask_interval"), [("act24", 40), ("act24_soft", 1)])
def test_runs_with_packed_activations_train_as_pruned_ones_bit_for_bit(run, tmp_path, monkeypatch, name, mask_interval):
    monkeypatch.setattr(act24, "INTERVAL", 3)
    monkeypatch.setattr(act24, "JOIN", 1.0)
    method = {"sparse": name, "activation": "relu2", "dense_pretrain": 0.2, "dense_start": 14}
    method |= {"masked_decay": 0.0, "mask_interval": mask_interval}
    for spmm in ("masked", "emulated"):
        text = run(tmp_path / spmm, **PACKED | method, spmm=spmm)
        assert ("2:4 GEMMs are emulated" in text) == (spmm == "emulated")
    assert run_differences(tmp_path / "emulated", tmp_path / "masked") == []
    extra_state = read_state(tmp_path / "emulated")["model"]["transformer.h.1.mlp.c_proj._extra_state"]
    assert extra_state[:2].tolist() == [True, True]  # the layer is sparse and has joined


@pytest.mark.slow
@pytest.mark.parametrize("stop", [6, 10, 12])
def test_a_planned_run_that_was_stopped_ends_in_the_same_bits(run, tmp_path, stop):
    run(tmp_path / "undisturbed", **PACKED, spmm="emulated")
    run(tmp_path / "parts", stop_at(stop), **PACKED, spmm="emulated")
    run(tmp_path / "parts", **PACKED, spmm="emulated")
    assert run_differences(tmp_path / "parts", tmp_path / "undisturbed") == []


class Planner:
    """Stands in for plan_ffn and time_ways, with a GPU's answers. `asked` and `timed` record their arguments."""

    def __init__(self, rows=(), notes=(), plans=True, taken="plan"):
        self.rows, self.notes, self.plans, self.taken = [*rows], [*notes], plans, taken
        self.asked, self.timed, self.layers = [], [], []

    def plan_ffn(self, config, tokens, device, dtype, spmm, recipe, **options):
        options["known"] = [*options["known"]]
        self.asked.append(((config, tokens, str(device), dtype, spmm, recipe), options))
        plan = FFNPlan("gelu", tokens, dtype, recipe.mvue, *[Choice()] * 6) if self.plans else None
        return plan, Report({}, self.rows, self.notes)

    def time_ways(self, mlp, plan, **options):
        self.timed.append((plan.tokens, options["compile_mode"], options["micro_steps"]))
        self.layers.append(len(sparse_linears(mlp)))
        return {"us": {"dense": [2.0] * 3, "layers": [2.0] * 3, "plan": [1.0] * 3}, "taken": self.taken}


@pytest.fixture
def plan_by(monkeypatch):
    """plan_by(rows=...) installs a Planner and returns it."""

    def plan_by(**options):
        planner = Planner(**options)
        monkeypatch.setattr(setup, "plan_ffn", planner.plan_ffn)
        monkeypatch.setattr(setup, "time_ways", planner.time_ways)
        return planner

    return plan_by


def test_measurements_are_printed_and_saved_and_the_next_start_gets_them(run, tmp_path, plan_by):
    short = {**ROW, "name": "y", "faults": {"cusparselt sm90 0/1": "raises OutOfMemoryError: CUDA"}}  # not saved
    planner = plan_by(rows=[ROW, short], notes=["cusparselt: sound"], plans=False)
    out = tmp_path / "out"
    text = run(out, stop_at(3), spmm="masked")
    assert "cusparselt: sound\n2:4 GEMM " in text
    assert "1.25  cusparselt 4/1" in text
    assert json.loads((out / "spmm.json").read_text()) == {"notes": ["cusparselt: sound"], "rows": [ROW], "whole": None}
    run(out, spmm="masked", max_iters=7, dense_start=5)
    asked = [(question[1:], options["known"], options["graph"]) for question, options in planner.asked]
    recipe = recipe_of({"sparse": "fst", "mask_interval": 5, "masked_decay": 1e-2, "mvue": True})
    question = (4 * 32, "cpu", torch.float32, "masked", recipe)
    assert asked == [(question, [], False), (question, [ROW], False)]
    run(out, max_iters=8, dense_start=5)  # in the dense phase nothing is measured
    run(out, eval_only=True, max_iters=8, dense_start=5)
    assert len(planner.asked) == 2
    run(out, init_from="scratch", overwrite=True, sparse="none", max_iters=1)
    assert not (out / "spmm.json").exists()


@pytest.mark.parametrize("taken", ["plan", "layers"])
def test_auto_takes_the_plan_if_a_sparse_layer_is_faster_by_it(run, tmp_path, monkeypatch, plan_by, taken):
    """A resumed run measures again only if the question or the GEMMs have changed."""
    planner, plans = plan_by(rows=[ROW], taken=taken), []
    monkeypatch.setattr(setup, "set_plan", lambda model, plan: plans.append(plan is not None))
    monkeypatch.setattr(Report, "text", lambda self: "")
    out, options = tmp_path / "out", {"max_iters": 2, "dense_start": 2}
    run(out, max_iters=1, dense_start=2)
    run(out, **options)
    assert planner.timed == [(4 * 32, None, 4)]
    assert planner.layers == [2]
    assert plans == [taken == "plan"] * 2
    assert json.loads((out / "spmm.json").read_text())["whole"]["taken"] == taken
    run(out, init_from="scratch", overwrite=True, max_iters=1, dense_start=2)
    run(out, **options, gradient_accumulation_steps=2)  # another question
    assert len(planner.timed) == 3
    run(out, init_from="scratch", overwrite=True, max_iters=1, dense_start=2)
    planner.rows[0] = {**planner.rows[0], "alg_id": 7}  # another GEMM
    run(out, **options)
    assert len(planner.timed) == 5


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[1]", '{"rows": [{}], "whole": null}', '{"rows": 1}', "{}"])
def test_a_report_that_cannot_be_read_is_measured_anew(run, stopped, text):
    message = r"spmm.json cannot be read \(\w+: .*\): GEMMs are measured anew"
    (stopped / "spmm.json").write_text(text)
    assert len(re.findall(message, run(stopped, max_iters=11, dense_start=27))) == 1
    assert read_state(stopped)["iter_num"] == 11


@pytest.mark.parametrize(
    ("mode", "device", "name", "fsdp", "micro_steps"),
    [
        ("default", "cuda", "fst", False, None),
        (None, "cuda", "s_ste", False, None),
        ("reduce-overhead", "cpu", "sr_ste", False, 4),  # seven micro-batches on two ranks
        (None, "cpu", "fst", True, 1),  # shards are packed in each micro-step
    ],
)
def test_what_is_asked_before_a_run(given, tmp_path, monkeypatch, plan_by, mode, device, name, fsdp, micro_steps):
    planner = plan_by(plans=device == "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given(dtype="bfloat16", compile=mode is not None, compile_mode=mode or "default")
    given(batch_size=3, block_size=5, gradient_accumulation_steps=7, spmm="auto")
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse=name))
    setup._measure_gemms(all_settings(), model, None, 2, fsdp, torch.device(device))
    expected = {"graph": device == "cuda", "cache": tmp_path / "cache" / "nano24" / "spmm.json", "known": []}
    assert planner.asked == [((model.config, 15, device, torch.bfloat16, "auto", get_recipe(name)), expected)]
    assert planner.timed == ([(15, mode, micro_steps)] if device == "cpu" else [])


@pytest.mark.parametrize(
    ("home", "cache", "expected"),
    [
        ("/home/me", None, "/home/me/.cache"),
        ("/home/me", "", "/home/me/.cache"),
        ("/home/me", "relative", "/home/me/.cache"),
        ("/home/me", "/cache", "/cache"),
        ("", "/cache", "/cache"),
        ("", None, None),
        ("", "~/x", None),
    ],
)
def test_the_cache_of_measurements_is_in_a_home_folder_if_there_is_one(
    monkeypatch, capsys, plan_by, given, home, cache, expected
):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", cache) if cache is not None else monkeypatch.delenv("XDG_CACHE_HOME", False)
    planner = plan_by(plans=False)
    given(dtype="bfloat16")
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse="fst"))
    setup._measure_gemms(all_settings(), model, None, 1, False, torch.device("cuda"))
    assert planner.asked[0][1]["cache"] == (expected and Path(expected, "nano24/spmm.json"))
    assert ("there is no home folder for a cache, set XDG_CACHE_HOME" in capsys.readouterr().out) == (expected is None)


def test_rank_0_alone_measures_and_its_error_is_everyones(tmp_path, monkeypatch):
    answer = [("plan", "report")]
    monkeypatch.setattr(setup, "_measure_gemms", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(Ranks, "decide", lambda self, value: answer[0])
    assert setup.plan_gemms(None, "model", tmp_path, Ranks(1, 1, 2), False, CPU) == ("plan", "report")
    answer[0] = ValueError("spmm='cusparselt': cannot")
    with pytest.raises(ValueError, match="cannot"):
        setup.plan_gemms(None, "model", tmp_path, Ranks(1, 1, 2), False, CPU)


def test_a_phase_brings_its_operands_and_frees_them():
    config = GPTConfig(block_size=32, vocab_size=9, n_layer=1, n_head=1, n_embd=64, sparse="fst")
    model = GPT(config)
    plan, _ = plan_ffn(config, 64, CPU, torch.float32, "masked")
    set_plan(model, plan)
    mlp = model.transformer.h[0].mlp
    settings = SimpleNamespace(max_iters=9, dense_start=8, dense_pretrain=0.0)
    phase = setup.Phase(settings, get_recipe("fst"), 5, None, Ranks())
    assert phase.enter(model, 4) == (False, False)
    assert "w_24" not in mlp.c_fc._buffers
    with torch.no_grad():
        mlp.c_fc.weight.mul_(-1)
    assert phase.enter(model, 5) == (True, True)
    assert torch.equal(mlp.c_fc.w_24, mlp.c_fc.weight * mlp.c_fc.mask)
    model(torch.zeros(2, 32, dtype=torch.int64))


def test_a_run_that_goes_back_to_sparse_gets_a_plan(run, tmp_path):
    run(tmp_path / "out", max_iters=3, dense_start=1, spmm="masked")
    for max_iters, planned in ((5, True), (7, False)):  # the last two steps are dense
        text = run(tmp_path / "out", max_iters=max_iters, dense_start=4, spmm="masked")
        assert ("no 2:4 GEMMs: pruned matrices are multiplied" in text) == planned


def test_a_signal_during_the_start_ends_it_at_once(run, tmp_path, monkeypatch):
    """It must not be remembered until an earlier run has been deleted."""
    handlers, real = [], setup.place_model
    monkeypatch.setattr(
        setup, "place_model", lambda *args: handlers.append(signal.getsignal(signal.SIGTERM)) or real(*args)
    )
    run(tmp_path / "out", max_iters=1)
    assert handlers == [signal.SIG_DFL]

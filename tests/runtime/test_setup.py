"""runtime/setup.py: what a run writes at its start, resuming, the folder that it holds, and its 2:4 GEMMs."""

import contextlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import (
    DENSE_START,
    ROOT,
    SETTINGS,
    all_settings,
    launch,
    read_rows,
    read_state,
    run_differences,
    stop_at,
    to_words,
)

import train
from configurator import setting_names
from gemm24.choose import Report
from gemm24.matmul import Choice
from gemm24.plan import FFNPlan, plan_ffn, set_plan
from model import GPT, GPTConfig
from runtime import ranks, setup
from runtime.ranks import Ranks
from sparse24 import get_recipe, sparse_linears

CPU = torch.device("cpu")
# A row as `choose` makes it on a GPU.
ROW = {"name": "z", "m": 1, "n": 2, "k": 3, "dense_us": 10.0, "best_us": 8.0, "ratio": 1.25, "chosen": True}
ROW |= {"backend": "cusparselt", "order": "sm90", "alg_id": 4, "split_k": 1, "reason": "", "key": "k", "faults": {}}


def test_config_json_and_the_checkpoint_hold_all_settings(reference):
    saved = json.loads((reference[0] / "config.json").read_text())
    names = setting_names(vars(train))
    assert list(saved) == [*names, "environment"]
    resolved = {"device": "cpu", "dtype": "float32", "compile": False, "dense_start": DENSE_START}
    resolved["flip_mask"] = "transposable"
    for name in names:
        default = SETTINGS.get(name, getattr(train, name))
        assert name in ("out_dir", "dataset") or saved[name] == resolved.get(name, default), name
    environment = saved.pop("environment")
    assert environment.keys() == {"commit", "torch", "triton", "device_name", "kernels", "world_size", "threads"}
    assert (environment["torch"], environment["world_size"]) == (torch.__version__, 1)
    assert environment["kernels"] == "off: the kernels need CUDA, this is cpu"
    state = read_state(reference[0])
    assert state["config"] == saved
    assert (state["iter_num"], state["dense_start"]) == (SETTINGS["max_iters"], DENSE_START)
    assert GPTConfig(**state["model_args"]).n_embd == 32


def test_run_here_takes_a_deterministic_runs_setting_back(run, tmp_path, monkeypatch):
    """It holds for the whole process, and would slow down or fail the tests after it."""
    seen, enabled = [], torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(train, "get_lr", lambda iter_num: seen.append(enabled()) or 1e-3)
    run(tmp_path / "out", max_iters=1, deterministic=True)
    assert (seen, enabled()) == ([True], False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_metrics_after_the_checkpoint_are_written_again(run, reference, stopped):
    """Two steps beyond the checkpoint, and the line that a kill cut short."""
    before = (stopped / "metrics.jsonl").read_text()
    assert [row["iter"] for row in read_rows(stopped)] == [*range(10)]
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"iter": 10, "phase": "sparse"}\n{"iter": 11, "phase": "sparse"}\n{"iter": 12, "pha')
    run(stopped)
    assert (stopped / "metrics.jsonl").read_text().startswith(before)
    elapsed = [row["elapsed_s"] for row in read_rows(stopped)]
    assert elapsed == sorted(elapsed)  # the clock goes on, too
    assert run_differences(stopped, reference[0]) == []


def test_a_damaged_checkpoint_is_refused_and_the_previous_one_can_be_used(run, refused, reference, stopped):
    path = stopped / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    said = re.search(r"truncated.*saved before it is whole \(iteration 8\).* mv '(.*)' '(.*)'\n", refused(stopped))
    assert said.groups() == (str(stopped / "ckpt_prev.pt"), str(path))
    path.unlink()  # without it ckpt_prev.pt is enough
    assert "at iteration 8;" in run(stopped)
    assert run_differences(stopped, reference[0]) == []


def test_foreign_checkpoints_are_refused(refused, stopped):
    (stopped / "ckpt_prev.pt").unlink()
    state = read_state(stopped)
    for wrong, message in (
        ({**state, "patterns_hash": "0" * 16}, "another pattern table"),
        ({"model": state["model"], "optimizer": {}}, "is not a checkpoint of nano24: it lacks"),
        ({**state, "config": contextlib.nullcontext()}, "torch.load refused it"),
    ):
        torch.save(wrong, stopped / "ckpt.pt")
        assert message in refused(stopped)
    (stopped / "ckpt.pt").write_text("hello")
    assert "was not written by torch.save" in refused(stopped)


@pytest.mark.slow
def test_another_max_iters_goes_on_when_the_switch_is_said(run, stopped):
    text = run(stopped, max_iters=40, dense_start=12)
    assert re.search(r"changed since the checkpoint: .*max_iters 32 -> 40", text)
    assert [row["phase"] for row in read_rows(stopped)] == ["sparse"] * 12 + ["dense"] * 29
    assert (read_state(stopped)["iter_num"], read_state(stopped)["dense_start"]) == (40, 12)
    run(stopped, max_iters=42, dense_start=12)
    assert [row["iter"] for row in read_rows(stopped)] == [*range(43)]


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


def test_ranks_that_read_different_checkpoints_are_refused(refused, stopped, monkeypatch):
    """As of a rank whose disk holds an older copy: what rank 0 says is another iteration."""
    says = iter([stopped / "ckpt.pt", (2, 0.5)])
    monkeypatch.setattr(Ranks, "decide", lambda self, value: next(says))
    assert "ckpt.pt is another checkpoint here than on rank 0; put out_dir on a shared file system" in refused(stopped)


# ---------------------------------------------------------------------------------------------------------------------
# The folder, the disk, the ranks


def test_chosen_checkpoints_are_kept(run, tmp_path):
    run(tmp_path / "out", max_iters=14, checkpoint_interval=2, eval_interval=0, keep_last=3, keep_every=4)
    numbered = [f"ckpt_{i:08d}.pt" for i in (4, 8, 10, 12, 14)]
    assert sorted(path.name for path in (tmp_path / "out").glob("ckpt*")) == ["ckpt.pt", *numbered, "ckpt_prev.pt"]
    for name in numbered:
        assert read_state(tmp_path / "out", name)["iter_num"] == int(name[5:13])


@pytest.mark.slow
def test_saving_in_a_thread_changes_nothing(run, tmp_path, monkeypatch):
    run(tmp_path / "thread", max_iters=14)
    save = setup.Writer.save
    monkeypatch.setattr(setup.Writer, "save", lambda writer, *args: (save(writer, *args), writer.wait()))
    run(tmp_path / "at once", max_iters=14)
    assert run_differences(tmp_path / "thread", tmp_path / "at once") == []


def test_a_second_run_in_the_folder_is_refused(run, refused, stopped):
    held = ranks.hold(stopped)
    said = refused(stopped)
    assert f"is in use by process {os.getpid()} on" in said
    assert "set another out_dir" in said
    held.close()
    run(stopped, max_iters=11, dense_start=3)


@pytest.mark.slow
def test_a_folder_is_free_again_when_its_process_is_killed(run, data, tmp_path):
    settings = {**SETTINGS, "dataset": data, "max_iters": 12}
    assert launch(tmp_path / "out", settings, stop_at(9, 0, "SIGKILL")).returncode == -9
    assert (tmp_path / "out" / "run.lock").read_text().startswith("process ")
    run(tmp_path / "out", max_iters=12)


@pytest.mark.slow
def test_settings_and_logs_hold_no_secret(tmp_path, data):
    """What a user keeps in the environment does not get into the files of a run."""
    secret = "a-key-that-nobody-may-see"
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    command = [sys.executable, "train.py", *to_words(tmp_path / "out", {**SETTINGS, "dataset": data, "max_iters": 2})]
    env = {**os.environ, **dict.fromkeys(names, secret), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, done.stderr] + [path.read_bytes().decode("latin1") for path in (tmp_path / "out").iterdir()]
    assert len(texts) >= 5
    assert not any(secret in text for text in texts)


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


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "ranks cannot meet by gloo: .*WORLD_SIZE.*; start train.py with torchrun"),
        pytest.param("cuda", "device='cuda'", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
    ],
)
def test_ranks_that_cannot_meet_are_refused(refused, tmp_path, monkeypatch, device, message):
    for name in ("RANK", "LOCAL_RANK"):  # as torchrun sets them, which sets WORLD_SIZE too
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert re.search(message, refused(tmp_path / "out", device=device))


# ---------------------------------------------------------------------------------------------------------------------
# 2:4 GEMMs: what is asked before a run, what is kept, and that planned runs train as others do

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
    assert [row["train_loss"] for row in dense] != [row["train_loss"] for row in masked]  # bfloat16 rounds elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("stop", [6, 10, 12])
def test_a_planned_run_that_was_stopped_ends_in_the_same_bits(run, tmp_path, stop):
    run(tmp_path / "undisturbed", **PACKED, spmm="emulated")
    run(tmp_path / "parts", stop_at(stop), **PACKED, spmm="emulated")
    run(tmp_path / "parts", **PACKED, spmm="emulated")
    assert run_differences(tmp_path / "parts", tmp_path / "undisturbed") == []


class Planner:
    """Stands in for plan_ffn and time_ways, as a GPU would answer; `asked` and `timed` hold what they were asked."""

    def __init__(self, rows=(), notes=(), plans=True, taken="plan"):
        self.rows, self.notes, self.plans, self.taken = [*rows], [*notes], plans, taken
        self.asked, self.timed, self.layers = [], [], []

    def plan_ffn(self, config, tokens, device, dtype, spmm, mvue, **options):
        options["known"] = [*options["known"]]
        self.asked.append(((config, tokens, str(device), dtype, spmm, mvue), options))
        plan = FFNPlan("gelu", tokens, dtype, mvue, *[Choice()] * 6) if self.plans else None
        return plan, Report({}, self.rows, self.notes)

    def time_ways(self, mlp, plan, **options):
        self.timed.append((plan.tokens, options["compile_mode"], options["micro_steps"]))
        self.layers.append(len(sparse_linears(mlp)))
        return {"us": {way: [1.0] * 3 for way in ("dense", "layers", "plan")}, "taken": self.taken}


@pytest.fixture
def plan_by(monkeypatch):
    """plan_by(rows=...) lets set-up ask a Planner, which is returned."""

    def plan_by(**options):
        planner = Planner(**options)
        monkeypatch.setattr(setup, "plan_ffn", planner.plan_ffn)
        monkeypatch.setattr(setup, "time_ways", planner.time_ways)
        return planner

    return plan_by


def test_measurements_are_printed_and_saved_and_the_next_start_gets_them(run, tmp_path, plan_by):
    short = {**ROW, "name": "y", "faults": {"cusparselt sm90 0/1": "raises OutOfMemoryError: CUDA"}}  # is not saved
    planner = plan_by(rows=[ROW, short], notes=["cusparselt: sound"], plans=False)
    out = tmp_path / "out"
    text = run(out, stop_at(3), spmm="masked")
    assert "cusparselt: sound\n2:4 GEMM " in text
    assert "1.25  cusparselt 4/1" in text
    assert json.loads((out / "spmm.json").read_text()) == {"notes": ["cusparselt: sound"], "rows": [ROW], "whole": None}
    run(out, spmm="masked", max_iters=7, dense_start=5)
    asked = [(question[1:], options["known"], options["graph"]) for question, options in planner.asked]
    question = (4 * 32, "cpu", torch.float32, "masked", True)
    assert asked == [(question, [], False), (question, [ROW], False)]
    run(out, max_iters=8, dense_start=5)  # in the dense phase nothing is measured
    run(out, eval_only=True, max_iters=8, dense_start=5)
    assert len(planner.asked) == 2
    run(out, init_from="scratch", overwrite=True, sparse="none", max_iters=1)
    assert not (out / "spmm.json").exists()


@pytest.mark.parametrize("taken", ["plan", "layers"])
def test_auto_takes_the_plan_if_a_sparse_layer_is_faster_by_it(run, tmp_path, monkeypatch, plan_by, taken):
    """GEMMs that each win may not make a layer that does. A run that is resumed does not ask again."""
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
    run(out, init_from="scratch", overwrite=True, max_iters=1, dense_start=2)  # a new run
    run(out, **options, gradient_accumulation_steps=2)  # the question changed
    assert len(planner.timed) == 3
    run(out, init_from="scratch", overwrite=True, max_iters=1, dense_start=2)
    planner.rows[0] = {**planner.rows[0], "alg_id": 7}  # measured anew, with another outcome
    run(out, **options)
    assert len(planner.timed) == 5


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[1]", '{"rows": [{}], "whole": null}', '{"rows": 1}', "cutlass"])
def test_a_report_that_cannot_be_read_is_measured_anew(run, stopped, text):
    """A kill may have cut it short, on a disk that lost its end. Or it is of a run that chose cutlass."""
    message = r"spmm.json cannot be read \(\w+: .*\): GEMMs are measured anew"
    if text == "cutlass":
        text = json.dumps({"rows": [{**ROW, "backend": "cutlass", "key": '{"cutlass": "cutlass"}'}], "whole": None})
        message = "spmm.json has verdicts on the backend cutlass, which was removed after commit 8751ec3: those"
    (stopped / "spmm.json").write_text(text)
    assert len(re.findall(message, run(stopped, max_iters=11, dense_start=27))) == 1
    assert read_state(stopped)["iter_num"] == 11


@pytest.mark.parametrize(
    ("compiled", "mode", "device", "name"),
    [(True, "default", "cuda", "fst"), (True, "reduce-overhead", "cpu", "sr_ste"), (False, "default", "cuda", "s_ste")],
)
def test_what_is_asked_before_a_run(given, tmp_path, monkeypatch, plan_by, compiled, mode, device, name):
    planner = plan_by(plans=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given(dtype="bfloat16", compile=compiled, compile_mode=mode, mvue=False)
    given(batch_size=3, block_size=5, gradient_accumulation_steps=7, spmm="auto")
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse=name))
    setup._measure_gemms(all_settings(), model, None, 1, False, torch.device(device))
    expected = {"graph": device == "cuda", "cache": tmp_path / "cache" / "nano24" / "spmm.json", "known": []}
    expected["transposable"] = name == "fst"
    assert planner.asked == [((model.config, 15, device, torch.bfloat16, "auto", False), expected)]


@pytest.mark.parametrize(("fsdp", "uses"), [(False, 4), (True, 1)])
def test_packing_is_counted_as_often_as_it_is_done(given, plan_by, fsdp, uses):
    """Seven micro-batches on two ranks are four micro-steps; shards are packed in each of them."""
    planner = plan_by()
    given(gradient_accumulation_steps=7, batch_size=3, block_size=5, dtype="float32", compile=False)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse="fst"))
    setup._measure_gemms(all_settings(), model, None, 2, fsdp, CPU)
    assert planner.timed == [(15, None, uses)]


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
    """The switch that this start asks for counts, not the checkpoint's."""
    run(tmp_path / "out", max_iters=3, dense_start=1, spmm="masked")
    for max_iters, planned in ((5, True), (7, False)):  # the last two steps are dense
        text = run(tmp_path / "out", max_iters=max_iters, dense_start=4, spmm="masked")
        assert ("no 2:4 GEMMs: pruned matrices are multiplied" in text) == planned

"""train.py and the 2:4 GEMMs: what is asked before a run, what is kept, and that planned runs train as others do."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from harness import all_settings, read_rows, read_state, row_differences, state_differences
from test_train import _stopped, data, given, refused, run, stopped  # noqa: F401 (fixtures)

from gemm24.choose import Report
from gemm24.matmul import Choice
from gemm24.plan import FFNPlan, plan_ffn, set_plan
from model import GPT, GPTConfig
from runtime import setup
from runtime.ranks import Ranks
from sparse24 import sparse_linears

# A row as `choose` makes it on a GPU.
ROW = {"name": "z", "m": 1, "n": 2, "k": 3, "dense_us": 10.0, "best_us": 8.0, "ratio": 1.25, "chosen": True}
ROW |= {"backend": "cusparselt", "order": "sm90", "alg_id": 4, "split_k": 1, "reason": "", "key": "k", "faults": {}}
PACKED = {"n_embd": 64, "dtype": "bfloat16", "dropout": 0.0, "max_iters": 14, "lr_decay_iters": 14, "dense_start": 11}


@pytest.mark.slow
def test_planned_runs_train_as_the_layers_do_and_packed_ones_bit_for_bit(run, tmp_path):
    for spmm in ("dense", "masked", "emulated"):
        text = run(tmp_path / spmm, **PACKED, spmm=spmm)
        assert ("2:4 GEMMs are emulated" in text) == (spmm == "emulated")
    dense, masked, emulated = (read_rows(tmp_path / spmm) for spmm in ("dense", "masked", "emulated"))
    assert row_differences(emulated, masked) == []
    assert state_differences(read_state(tmp_path / "emulated"), read_state(tmp_path / "masked")) == []
    for a, b in zip(dense, masked, strict=True):
        assert b["train_loss"] == (None if a["train_loss"] is None else pytest.approx(a["train_loss"], rel=2e-2))
    assert [row["train_loss"] for row in dense] != [row["train_loss"] for row in masked]  # bfloat16 rounds elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("stop", [6, 10, 12])
def test_a_planned_run_that_was_stopped_ends_in_the_same_bits(run, tmp_path, stop):
    run(tmp_path / "whole", **PACKED, spmm="emulated")
    run(
        tmp_path / "parts",
        {"kind": "signal", "signal": "SIGTERM", "iter_num": stop, "micro_batch": 1},
        **PACKED,
        spmm="emulated",
    )
    run(tmp_path / "parts", **PACKED, spmm="emulated")
    assert state_differences(read_state(tmp_path / "parts"), read_state(tmp_path / "whole")) == []
    assert row_differences(read_rows(tmp_path / "parts"), read_rows(tmp_path / "whole")) == []


def test_measurements_are_printed_and_saved_and_the_next_start_gets_them(run, tmp_path, monkeypatch):
    short = {**ROW, "name": "y", "faults": {"cusparselt sm90 0/1": "raises OutOfMemoryError: CUDA"}}  # is not saved
    asked = []

    def plan(config, tokens, device, dtype, spmm, mvue, **options):
        asked.append((tokens, str(device), dtype, spmm, mvue, [*options["known"]], options["graph"]))
        return None, Report({}, [ROW, short], ["cusparselt: sound"])

    monkeypatch.setattr(setup, "plan_ffn", plan)
    out = tmp_path / "out"
    text = run(out, {"kind": "signal", "signal": "SIGTERM", "iter_num": 3, "micro_batch": 1}, spmm="masked")
    assert "cusparselt: sound\n2:4 GEMM " in text
    assert "1.25  cusparselt 4/1" in text
    assert json.loads((out / "spmm.json").read_text()) == {"notes": ["cusparselt: sound"], "rows": [ROW], "whole": None}
    run(out, spmm="masked")
    options = (4 * 32, "cpu", torch.float32, "masked", True)
    assert asked == [(*options, [], False), (*options, [ROW], False)]
    run(out, max_iters=33, dense_start=27)  # in the dense phase nothing is measured
    run(out, eval_only=True, max_iters=33, dense_start=27)
    assert len(asked) == 2
    run(out, init_from="scratch", overwrite=True, sparse="none")
    assert not (out / "spmm.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("taken", ["plan", "layers"])
def test_auto_takes_the_plan_where_the_whole_layer_is_faster_by_it(run, tmp_path, monkeypatch, taken):
    """GEMMs that each win may not make a layer that does. A run that is resumed does not ask again."""
    rows, timed = [ROW], []

    def plan(config, tokens, device, dtype, spmm, mvue, **options):
        return FFNPlan("gelu", tokens, dtype, mvue, *[Choice()] * 6), Report({}, rows, [])

    def time_ways(mlp, plan, compile_mode, micro_steps):
        timed.append((type(mlp).__name__, plan.tokens, compile_mode, micro_steps))
        return {"us": {"dense": [3.0, 3.0, 3.0], "layers": [4.0] * 3, "plan": [2.0] * 3}, "taken": taken}

    monkeypatch.setattr(setup, "plan_ffn", plan)
    monkeypatch.setattr(setup, "time_ways", time_ways)
    plans = []
    monkeypatch.setattr(setup, "set_plan", lambda model, plan: plans.append(plan is not None))
    monkeypatch.setattr(Report, "text", lambda self: "")
    out = tmp_path / "out"
    run(out, {"kind": "signal", "signal": "SIGTERM", "iter_num": 3, "micro_batch": 1})
    run(out)
    assert timed == [("MLP", 4 * 32, None, 4)]
    assert plans == [taken == "plan"] * 2
    assert json.loads((out / "spmm.json").read_text())["whole"]["taken"] == taken
    run(
        out,
        {"kind": "signal", "signal": "SIGTERM", "iter_num": 0, "micro_batch": 0},
        init_from="scratch",
        overwrite=True,
    )
    run(out, gradient_accumulation_steps=2)
    assert len(timed) == 3  # a new run, and the question changed
    run(
        out,
        {"kind": "signal", "signal": "SIGTERM", "iter_num": 0, "micro_batch": 0},
        init_from="scratch",
        overwrite=True,
    )
    rows[0] = {**rows[0], "alg_id": 7}  # measured anew, with another outcome
    run(out)
    assert len(timed) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spmm": "fast"}, "spmm='fast', need one of auto, dense, masked, cusparselt, emulated"),
        ({"spmm": "cusparselt"}, "spmm='cusparselt': needs an NVIDIA GPU; use spmm='auto'"),
        (
            {"spmm": "cutlass"},
            "spmm='cutlass' was removed after commit 8751ec3: Ampere has cuSPARSELt too; use spmm='auto'",
        ),
        ({"compile_mode": "fast"}, "compile_mode='fast', need default, reduce-overhead or max-autotune"),
    ],
    ids=str,
)
def test_gemms_that_cannot_be_had_are_refused(refused, tmp_path, changes, message):
    assert re.search(message, refused(tmp_path / "out", **changes))


@pytest.mark.slow
def test_a_report_that_cannot_be_read_is_measured_anew(run, stopped):
    """A kill may have cut it short, on a disk that lost its end. Or it is of a run that chose cutlass."""
    cutlass = json.dumps({"rows": [{**ROW, "backend": "cutlass", "key": '{"cutlass": "cutlass"}'}], "whole": None})
    damaged = r"spmm.json cannot be read \(\w+: .*\): GEMMs are measured anew"
    removed = "spmm.json has verdicts on the backend cutlass, which was removed after commit 8751ec3: those GEMMs are"
    cases = [("{", damaged), ("[1]", damaged), ('{"rows": [{}], "whole": null}', damaged), (cutlass, removed)]
    for iter_num, (text, message) in enumerate(cases, 11):
        (stopped / "spmm.json").write_text(text)
        assert len(re.findall(message, run(stopped, max_iters=iter_num, dense_start=27))) == 1
        assert read_state(stopped)["iter_num"] == iter_num


@pytest.mark.parametrize(
    ("compiled", "mode", "device", "name"),
    [
        (True, "default", "cuda", "fst"),
        (True, "reduce-overhead", "cpu", "sr_ste"),
        (False, "max-autotune", "cuda", "s_ste"),
    ],
)
def test_what_is_asked_before_a_run(given, tmp_path, monkeypatch, compiled, mode, device, name):
    asked = []

    def plan(*args, **options):
        asked.append((args, {**options, "known": [*options["known"]]}))
        return None, Report({}, [], [])

    monkeypatch.setattr(setup, "plan_ffn", plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given(dtype="bfloat16", compile=compiled, compile_mode=mode, mvue=False)
    given(batch_size=3, block_size=5, gradient_accumulation_steps=7, spmm="auto")
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse=name))
    device = torch.device(device)
    setup._measure_gemms(all_settings(), model, None, 1, False, device)
    expected = {"graph": device.type == "cuda", "cache": tmp_path / "cache" / "nano24" / "spmm.json", "known": []}
    expected["transposable"] = name == "fst"
    assert asked == [((model.config, 15, device, torch.bfloat16, "auto", False), expected)]


@pytest.mark.parametrize(("fsdp", "uses"), [(False, 4), (True, 1)])
def test_packing_is_counted_as_often_as_it_is_done(given, tmp_path, monkeypatch, fsdp, uses):
    """Seven micro-batches on two ranks are four micro-steps; shards are packed in each of them."""
    plan, timed = FFNPlan("gelu", 15, torch.float32, True, *[Choice()] * 6), []
    monkeypatch.setattr(setup, "plan_ffn", lambda *args, **options: (plan, Report({}, [], [])))
    monkeypatch.setattr(setup, "time_ways", lambda mlp, plan, **how: timed.append(how) or {"taken": "plan"})
    given(gradient_accumulation_steps=7, dtype="float32", compile=False)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse="fst"))
    setup._measure_gemms(all_settings(), model, None, 2, fsdp, torch.device("cpu"))
    assert timed == [{"compile_mode": None, "micro_steps": uses}]


def test_rank_0_alone_measures_and_its_error_is_everyones(tmp_path, monkeypatch):
    answer = [("plan", "report")]
    monkeypatch.setattr(setup, "_measure_gemms", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(Ranks, "decide", lambda self, value: answer[0])
    assert setup.plan_gemms(None, "model", tmp_path, Ranks(1, 1, 2), False, torch.device("cpu")) == ("plan", "report")
    answer[0] = ValueError("spmm='cusparselt': cannot")
    with pytest.raises(ValueError, match="cannot"):
        setup.plan_gemms(None, "model", tmp_path, Ranks(1, 1, 2), False, torch.device("cpu"))


def test_a_phase_brings_its_operands_and_frees_them():
    config = GPTConfig(block_size=32, vocab_size=9, n_layer=1, n_head=1, n_embd=64, sparse="fst")
    model = GPT(config)
    plan, _ = plan_ffn(config, 64, torch.device("cpu"), torch.float32, "masked")
    set_plan(model, plan)
    mlp = model.transformer.h[0].mlp
    settings = SimpleNamespace(max_iters=9, dense_start=8, dense_pretrain=0.0)
    phase = setup.Phase(settings, 5, None, Ranks())
    assert phase.enter(model, 4) is False
    assert "w_24" not in mlp.c_fc._buffers
    with torch.no_grad():
        mlp.c_fc.weight.mul_(-1)
    assert phase.enter(model, 5) is True
    assert torch.equal(mlp.c_fc.w_24, mlp.c_fc.weight * mlp.c_fc.mask)
    model(torch.zeros(2, 32, dtype=torch.int64))


def test_a_run_that_goes_back_to_sparse_gets_a_plan(run, tmp_path):
    """The switch that this start asks for counts, not the checkpoint's."""
    run(tmp_path / "out", max_iters=3, dense_start=1, spmm="masked")
    text = run(tmp_path / "out", max_iters=5, dense_start=4, spmm="masked")
    assert "no 2:4 GEMMs: pruned matrices are multiplied" in text
    text = run(tmp_path / "out", max_iters=7, dense_start=4, spmm="masked")  # dense from here on
    assert "pruned matrices are multiplied" not in text


def test_a_sparse_block_is_timed(run, tmp_path, monkeypatch):
    timed = []

    def plan(config, tokens, device, dtype, spmm, mvue, **options):
        return FFNPlan("gelu", tokens, dtype, mvue, *[Choice()] * 6), Report({}, [], [])

    def time_ways(mlp, plan, compile_mode, micro_steps):
        timed.append(len(sparse_linears(mlp)))
        return {"us": {way: [1.0] * 3 for way in ("dense", "layers", "plan")}, "taken": "layers"}

    monkeypatch.setattr(setup, "plan_ffn", plan)
    monkeypatch.setattr(setup, "time_ways", time_ways)
    run(tmp_path / "out", max_iters=1)
    assert timed == [2]

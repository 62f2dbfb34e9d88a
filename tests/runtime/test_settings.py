"""runtime/settings.py: the values of recipes and "auto", and refusals in one line."""

import json
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import SETTINGS, all_settings, make_dataset, read_state, run_differences, run_here

import train
from configurator import setting_names
from runtime.settings import RANGES, check_schedule, planned_dense_start, resolve_settings
from sparse24 import RECIPES, get_recipe


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_iters": 600000}, 500000),
        ({"max_iters": 32}, 27),
        ({"max_iters": 1}, 1),
        ({"dense_finetune": 0.0}, 100),
        ({"dense_finetune": 1.0}, 0),
        ({"dense_start": 0}, 0),
        ({"dense_start": 7}, 7),
        ({"dense_start": 7, "sparse": "none"}, 0),
    ],
)
def test_dense_start(given, settings, expected):
    given(**{"sparse": "fst", "max_iters": 100, "dense_start": -1, "dense_finetune": 1 / 6, **settings})
    assert planned_dense_start(all_settings()) == expected


STE = {"mask_interval": 40, "masked_decay": 0.0, "mvue": False, "dense_finetune": 0.0}
CHANGED = {"mask_interval": 1, "masked_decay": 2e-4, "mvue": True, "dense_finetune": 0.5}


@pytest.mark.parametrize(
    ("sparse", "overrides", "expected"),
    [
        ("fst", {}, STE | {"masked_decay": 6e-5, "mvue": True, "dense_finetune": 1 / 6}),
        ("ste", {}, STE),
        ("ste", CHANGED, CHANGED),
    ],
)
def test_a_recipe_sets_its_values_unless_the_user_does(given, sparse, overrides, expected):
    given(sparse=sparse, **overrides)
    settings = all_settings()
    recipe = resolve_settings(settings, {"sparse": sparse, **overrides})
    assert {name: getattr(settings, name) for name in expected} == expected
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert overrides or recipe == get_recipe(sparse)


def test_the_script_shows_the_defaults_of_fst():
    for field in fields(RECIPES["fst"]):
        if field.name in setting_names(vars(train)) and field.name != "activation":  # a need of the method
            assert getattr(train, field.name) == getattr(RECIPES["fst"], field.name), field.name


def test_a_config_file_then_the_command_line(tmp_path, data):
    config = tmp_path / "c.py"
    config.write_text("sparse = 'ste'\nmax_iters = 5\nmasked_decay = 1e-3\n")
    settings = {name: SETTINGS[name] for name in SETTINGS if name not in ("sparse", "masked_decay", "mvue")}
    done = run_here(tmp_path / "out", {**settings, "dataset": data, "max_iters": 2}, first=(str(config),))
    assert done.returncode == 0
    saved = json.loads((tmp_path / "out/config.json").read_text())
    chosen = {"sparse": "ste", "max_iters": 2, "masked_decay": 1e-3, "mvue": False, "dense_start": 2}
    assert chosen.items() <= saved.items()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one line, exit status 1 (2 for an unknown setting), and nothing is written


def test_a_word_or_a_file_with_a_mistake_is_refused_with_status_2(refused, tmp_path):
    said = refused(tmp_path / "out", status=2, max_iter=5)
    assert "unknown setting 'max_iter' on the command line; did you mean 'max_iters'?" in said
    said = refused(tmp_path / "out", status=2, masked_decay_auto=True)
    assert "masked_decay_auto on the command line was removed after commit 7ffc73d" in said
    config = tmp_path / "c.py"
    config.write_text("dropout = '0.1'\n")
    said = refused(tmp_path / "out", status=2, first=(str(config),))
    assert f"setting 'dropout' in {config}: got '0.1', need a float" in said


OUTSIDE = {  # for each number among the settings, values beside its range
    "seed": (-1, 2**32), "log_interval": (0,), "eval_interval": (-1,), "eval_iters": (-1,), "flip_interval": (-1,),
    "checkpoint_interval": (0,), "keep_last": (1,), "keep_every": (-1,), "gradient_accumulation_steps": (0,),
    "batch_size": (0,), "block_size": (0,), "n_layer": (0,), "n_head": (0,), "n_embd": (-32,), "dropout": (-0.1, 1.0),
    "ffn_ratio": (0.0, -4.0), "mask_interval": (0,), "masked_decay": (-6e-5,), "dense_pretrain": (-0.1, 1.1),
    "dense_finetune": (-0.1, 1.5), "dense_start": (-2,), "learning_rate": (-6e-4,), "max_iters": (-1,),
    "weight_decay": (-0.1,), "beta1": (-0.9, 1.0), "beta2": (-0.9, 1.5), "grad_clip": (-1.0,), "warmup_iters": (-1,),
    "lr_decay_iters": (-1,), "min_lr": (-1e-4,), "fsdp_copies": (0,), "rank_timeout": (0,),
}  # fmt: skip


def test_every_number_among_the_settings_has_a_range(given):
    numbers = {name for name, value in vars(all_settings()).items() if type(value) in (int, float)}
    assert numbers == RANGES.keys() == OUTSIDE.keys()
    for name in numbers:
        for value in (*OUTSIDE[name], math.nan, math.inf, -math.inf, 10**400):
            settings = all_settings()
            vars(settings).update({name: value})
            with pytest.raises(ValueError, match=re.escape(f"{name}={value}, need at least {RANGES[name][0]} and ")):
                resolve_settings(settings, {})


def test_a_learning_rate_and_its_schedule_must_fit(given):
    for name, value, end in (
        ("min_lr", 6e5, "learning_rate=0.001; use --min_lr=0.0001"),
        ("warmup_iters", 70, "lr_decay_iters=60; use --warmup_iters=6"),
    ):
        changes = {"lr_decay_iters": 60, "warmup_iters": 60, "learning_rate": 1e-3, "min_lr": 0.0, name: value}
        given(**changes)
        s = all_settings()
        for state in (None, {"config": {**vars(s), "learning_rate": 2e-3}}):
            with pytest.raises(ValueError, match=f"^{name}={value}, need at most {end}, or --decay_lr=False$"):
                check_schedule(s, state)
        check_schedule(s, {"config": vars(s)})  # a run of an earlier release goes on
        for fitting in ({"decay_lr": False}, {"eval_only": True}, {name: 0}):
            check_schedule(SimpleNamespace(**{**vars(s), **fitting}), None)


def test_a_run_that_ends_within_its_warm_up_is_warned_of(run, tmp_path):
    warning = "warning: the run ends within its warm-up: warmup_iters=3, max_iters=1\n"
    assert warning in run(tmp_path / "out", max_iters=1)
    assert "warning" not in run(tmp_path / "other", max_iters=1, decay_lr=False)
    assert "warning" not in run(tmp_path / "none", max_iters=0)


def test_a_number_out_of_range_in_a_file_and_a_tilde_without_a_home_are_refused(refused, tmp_path, monkeypatch):
    config = tmp_path / "c.py"
    config.write_text("grad_clip = float('nan')\n")
    assert "grad_clip=nan, need at least 0 and finite" in refused(tmp_path / "out", first=(str(config),))
    monkeypatch.setenv("HOME", "")
    monkeypatch.chdir(tmp_path)
    assert "no home folder is known for ~" in refused(Path("~/run"), status=2)
    assert "need the path of a folder" in refused(tmp_path / "out", status=2, dataset="")
    assert not (tmp_path / "~").exists()


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_embd=32.*n_head=5"),
        ({"n_embd": 30, "n_head": 3}, "n_embd=30, need a multiple of 4 for sparse='fst'"),
        ({"ffn_ratio": 34 / 32}, "d_ff=34, need a multiple of 4 for sparse='fst'; change ffn_ratio"),
        ({"ffn_ratio": 0.33}, "ffn_ratio=0.33 times n_embd=32"),
        ({"activation": "tanh"}, "activation='tanh' is unknown, need one of gelu, relu2, geglu, swiglu"),
        ({"sparse": "fts"}, "'fts' is unknown, need one of fst, ste"),
        (
            {"sparse": "s_ste", "mask_interval": 5},
            "Recipe 's_ste': mask_interval=5, need mask_interval=1 for mask='soft'",
        ),
        ({"sparse": "step", "dense_pretrain": 0.0}, "Recipe 'step': dense_pretrain=0.0, need dense_pretrain above 0"),
        ({"flip_mask": "soft"}, "flip_mask='soft', need one of auto, transposable, row"),
        ({"sparse": "none", "flip_reference": "x"}, "flip_reference=x is for sparse runs"),
        ({"flip_reference": "no/such"}, "no such run folder: 'no/such'; give the out_dir of a run"),
        ({"dense_pretrain": 0.5, "dense_start": 9}, "dense until iteration 16 and dense from 9: no sparse phase"),
        ({"sparse": "step", "max_iters": 1}, "dense_pretrain=0.1 of max_iters=1 is 0 steps; raise one of them"),
        ({"beta2": 1.5}, "beta2=1.5, need at least 0 and at most 0.999999"),
        ({"block_size": 100000}, "holds .* tokens, need more than block_size=100000"),
        ({"dtype": "int8"}, "dtype='int8', need one of auto, float32, bfloat16, float16"),
        ({"spmm": "fast"}, "spmm='fast', need one of auto, dense, masked, cusparselt, emulated"),
        ({"spmm": "cusparselt"}, "spmm='cusparselt': needs an NVIDIA GPU; use spmm='auto'"),
        ({"compile_mode": "fast"}, "compile_mode='fast', need one of default, reduce-overhead, max-autotune"),
        pytest.param({"device": "cuda"}, "device=.cuda.* cannot be used: .*; use --device=cpu", marks=NO_GPU),
        pytest.param({"device": "cuda:1"}, "device=.cuda.* cannot be used: .*; use --device=cpu", marks=NO_GPU),
        ({"device": "abacus"}, "device='abacus'"),
        ({"device": "hpu"}, "device='hpu'"),
        ({"init_from": "resume"}, "init_from=resume, but .* has no ckpt.pt; use init_from=scratch or auto"),
        ({"init_from": "sctratch"}, "init_from='sctratch', need one of auto, scratch, resume, gpt2"),
        ({"dataset": "no_such_dataset"}, "train.bin does not exist; set dataset to one of .*shakespeare"),
        ({"fsdp_copies": 2}, "fsdp_copies=2 is for parallel='fsdp'"),
        ({"parallel": "fsdp", "dtype": "float16"}, "parallel='fsdp' needs bfloat16 or float32 and compile_mode="),
        ({"parallel": "fsdp", "compile_mode": "reduce-overhead"}, "parallel='fsdp' needs bfloat16 or float32 and"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(refused, tmp_path, changes, message):
    assert re.search(message, refused(tmp_path / "out", **changes))


@pytest.mark.parametrize(
    ("package", "changes"), [("transformers", {"init_from": "gpt2"}), ("wandb", {"wandb_log": True})], ids=str
)
def test_a_package_that_is_not_installed_is_named(refused, stopped, tmp_path, monkeypatch, package, changes):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refused(tmp_path / "out", **changes)
    assert f"pip install {package}" in refused(stopped, **{"init_from": "scratch", "overwrite": True, **changes})


def test_an_out_dir_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "out is a file; use another out_dir" in refused(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("init_from", ["scratch", "gpt2"])
def test_a_start_that_a_restart_would_undo_is_refused(run, refused, tmp_path, monkeypatch, init_from):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    said = refused(tmp_path / "out", init_from=init_from, overwrite=True)
    assert f"init_from={init_from} would start over at each restart by torchrun; use init_from=auto" in said
    run(tmp_path / "out", max_iters=1)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    run(tmp_path / "out", init_from="scratch", overwrite=True, max_iters=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, r"a model with other settings: n_layer=3 \(there 2\); use its settings, or another out_dir"),
        ({"n_embd": 64, "n_head": 4}, r"n_head=4 \(there 2\), n_embd=64 \(there 32\)"),
        ({"block_size": 16}, r"block_size=16 \(there 32\)"),
        ({"bias": True}, r"bias=True \(there False\)"),
        ({"activation": "relu2"}, r"activation=relu2 \(there gelu\)"),
        ({"ffn_ratio": 2.0}, r"ffn_ratio=2.0 \(there 4.0\)"),
        ({"sparse": "none"}, r"sparse=none \(there fst\)"),
        ({"sparse": "ste"}, r"sparse=ste \(there fst\)"),
        ({"max_iters": 40}, r"dense at iteration 27 of 32, these settings at 33 of 40; choose one with --dense_start="),
        ({"dense_finetune": 0.5}, r"dense at iteration 27 of 32, these settings at 16 of 32"),
        ({"init_from": "scratch"}, r"already holds a run; use --init_from=resume .*--overwrite=True to delete it"),
        ({"init_from": "gpt2"}, r"init_from=gpt2, but .* already holds a run"),
        ({"init_from": "scratch", "overwrite": True, "dataset": "no_such_dataset"}, "does not exist"),
        ({"init_from": "scratch", "overwrite": True, "n_head": 5}, "n_head=5"),
        ({"init_from": "scratch", "overwrite": True, "device": "nonsense"}, "device='nonsense'"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_run_that_is_there_is_refused(refused, stopped, changes, message):
    assert re.search(message, refused(stopped, **changes))


def test_metrics_alone_are_refused(refused, stopped):
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (stopped / name).unlink()
    assert "already holds a run" in refused(stopped, init_from="scratch")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda meta: {"vocab_size": meta["vocab_size"] + 1, "chars": meta["chars"] + "Z"},
            r"vocab_size=25 \(there 24\)",
        ),
        (lambda meta: {"tokenizer": "gpt2"}, r"tokenizer=gpt2 \(there char\)"),
        (lambda meta: {"chars": meta["chars"].replace("6", "X")}, r"token 6 is 'X' \(there '6'\)"),
        (lambda meta: {"chars": meta["chars"][::-1]}, r"token 0 is 'x' \(there ' '\)"),
    ],
)
def test_another_vocabulary_is_always_refused(refused, stopped, tmp_path, change, named):
    other = make_dataset(tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | change(meta)))
    message = f"ckpt.pt was trained on other data than those of dataset=.*: {named}; use the model's own dataset, or"
    for allowed in ({"allow_other_data": True}, {"eval_only": True}):
        assert re.search(message, refused(stopped, dataset=other, **allowed))


def test_other_checkpoints_than_the_last_are_not_deleted_without_overwrite(run, refused, tmp_path):
    out = tmp_path / "out"
    run(out, max_iters=6, checkpoint_interval=2, keep_every=4)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        os.rename(out / name, tmp_path / name)
    said = refused(out, max_iters=6)
    assert "has no ckpt.pt, but ckpt_00000004.pt: mv one of these to ckpt.pt" in said
    os.rename(tmp_path / "ckpt.pt", out / "ckpt_best.pt")
    assert "has no ckpt.pt, but ckpt_00000004.pt, ckpt_best.pt: mv" in refused(out, max_iters=6)
    (out / "ckpt_00000004.pt").rename(out / "ckpt.pt")
    assert "at iteration 4" in run(out, max_iters=6, checkpoint_interval=2, keep_every=4)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints from before settings were removed


@pytest.mark.slow
def test_a_checkpoint_with_removed_settings_continues_if_they_have_the_current_values(run, refused, reference, stopped):
    state = read_state(stopped)
    old = {"config": {"max_skipped": 5, "mask": "transposable"}, "model_args": {"sparse_layers": "ffn"}}
    for key, value in (("mask", "row"), ("sparse_layers", "ffn+attn"), ("mask", "transposable")):
        old["config"][key] = value
        changed = {part: {**state[part], **settings} for part, settings in old.items()}
        torch.save({**state, **changed, "controller": None}, stopped / "ckpt.pt")
        if value != "transposable":
            removed = "need .*: the setting was removed after commit 7ffc73d: .*; use that commit"
            assert re.search(rf"ckpt\.pt has {key}={re.escape(repr(value))}, {removed}", refused(stopped))
        old["config"].pop(key)
    assert re.search(r"changed since the checkpoint: out_dir \S+ -> \S+$", run(stopped), re.M)
    assert run_differences(stopped, reference[0]) == []

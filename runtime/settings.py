"""Checks a run's settings, and fills in the values that "auto" and the recipe stand for.

Nothing is written here. `s` is a namespace of all of train.py's settings.
"""

import importlib.util
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch

import sparse24
from configurator import check_ranges, without_removed
from gemm24 import choose
from runtime import checkpoint
from runtime.loader import vocabulary_changes
from runtime.ranks import Ranks
from sparse24 import Recipe, kernel_status, sparse_linears

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FROM_0 = """eval_interval eval_iters flip_interval keep_every masked_decay learning_rate max_iters weight_decay
    grad_clip warmup_iters lr_decay_iters min_lr"""
FROM_1 = """log_interval checkpoint_interval gradient_accumulation_steps batch_size block_size n_layer n_head n_embd
    mask_interval fsdp_copies"""
RANGES = {  # the least and the most of every number among the settings
    **dict.fromkeys(FROM_0.split(), (0, math.inf)), **dict.fromkeys(FROM_1.split(), (1, math.inf)),
    **dict.fromkeys(("dropout", "beta1", "beta2"), (0, 0.999999)), "dense_pretrain": (0, 1), "dense_finetune": (0, 1),
    "dense_start": (-1, math.inf), "ffn_ratio": (1e-3, math.inf), "keep_last": (2, math.inf), "seed": (0, 2**32 - 1),
    "rank_timeout": (1, 10**7),
}  # fmt: skip
CHOICES = {
    "init_from": ("auto", "scratch", "resume", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    "sampling": ("random", "epoch"),
    "flip_mask": ("auto", "transposable", "row"),
    "dtype": ("auto", *DTYPES),
    "compile_mode": ("default", "reduce-overhead", "max-autotune"),
    "parallel": ("ddp", "fsdp"),
}


def resolve_settings(s: SimpleNamespace, overrides: dict) -> Recipe | None:
    """Check the settings, and fill in the recipe's values. Returns the recipe, or None for a dense run."""
    check_ranges(vars(s), RANGES)
    for name, choices in CHOICES.items():
        if getattr(s, name) not in choices:
            raise ValueError(f"{name}={getattr(s, name)!r}, need one of {', '.join(choices)}")
    choose.check_mode(s.spmm)
    if s.wandb_log and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb_log=True needs the package wandb; pip install wandb")
    if s.parallel == "ddp" and s.fsdp_copies > 1:
        raise ValueError(f"fsdp_copies={s.fsdp_copies} is for parallel='fsdp'; with ddp every rank has a replica")
    if s.parallel == "fsdp" and (s.dtype == "float16" or s.compile_mode != "default"):
        raise ValueError("parallel='fsdp' needs bfloat16 or float32 and compile_mode='default'; use parallel='ddp'")
    if s.sparse == "none":
        if s.flip_reference:
            raise ValueError(f"flip_reference={s.flip_reference} is for sparse runs; remove it for sparse='none'")
        s.flip_mask = "transposable" if s.flip_mask == "auto" else s.flip_mask
        return None
    recipe = sparse24.recipe_of({**overrides, "sparse": s.sparse})
    vars(s).update({name: getattr(recipe, name) for name in sparse24.SETTINGS})
    if recipe.check:
        recipe.check(s)
    begin = round(s.max_iters * (recipe.dense_pretrain_latest or s.dense_pretrain))
    end = planned_dense_start(s)
    if s.dense_pretrain and not begin < end:
        raise ValueError(f"dense until iteration {begin} and dense from {end}: no sparse phase; use sparse='none'")
    if recipe.dense_pretrain_latest and not begin:  # its optimizer needs dense steps
        raise ValueError(f"dense_pretrain={s.dense_pretrain} of max_iters={s.max_iters} is 0 steps; raise one of them")
    if not recipe.fused and s.spmm not in ("auto", "dense"):
        raise ValueError(f"spmm={s.spmm!r} does not support sparse={s.sparse!r}; use --spmm=auto (dense GEMMs)")
    s.flip_mask = recipe.virtual_mask if s.flip_mask == "auto" else s.flip_mask
    return recipe


def check_schedule(s: SimpleNamespace, state: dict | None) -> None:
    """Raise ValueError if the learning rate would rise at its end. A run of an earlier release may continue so."""
    names = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters")
    if s.eval_only or not s.decay_lr or (state and all(getattr(s, k) == state["config"][k] for k in names)):
        return
    for name, most in (("min_lr", "learning_rate"), ("warmup_iters", "lr_decay_iters")):
        value, limit = getattr(s, name), getattr(s, most)
        if value > limit:
            remedy = f"--{name}={type(value)(limit / 10)}, or --decay_lr=False"
            raise ValueError(f"{name}={value}, need at most {most}={limit}; use {remedy}")


def pick_device(s: SimpleNamespace, ranks: Ranks) -> torch.device:
    """The device of this rank. Sets `device`, `dtype` and `compile` where they are "auto" or None."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device
    try:
        chosen = torch.device(name)
        if name == "cuda":  # set_device needs an index
            chosen = torch.device("cuda", ranks.local_rank if ranks.world_size > 1 else torch.cuda.current_device())
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device={s.device!r} cannot be used: {choose.reason(error)}; use --device=cpu") from error
    best = "float32"
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        best = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    sparse24.use_kernels(chosen)
    s.device, s.dtype = chosen.type, best if s.dtype == "auto" else s.dtype
    s.compile = chosen.type == "cuda" if s.compile is None else s.compile
    return chosen


def planned_dense_start(s: SimpleNamespace) -> int:
    """First iteration of the dense phase (section 4.4); 0 for a dense run."""
    if s.sparse == "none":
        return 0
    return s.dense_start if s.dense_start >= 0 else round(s.max_iters * (1 - s.dense_finetune))


def find_start(s: SimpleNamespace, folder: Path) -> Path | None:
    """The checkpoint to resume from; None for a new run. Raises ValueError if init_from does not fit out_dir."""
    if s.init_from not in ("auto", "resume") and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ValueError(
            f"init_from={s.init_from} would start over at each restart by torchrun; use init_from=auto, which starts "
            "from scratch in an empty out_dir (for gpt2, after a run of --max_iters=0), or --max_restarts=0"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out_dir={s.out_dir} is a file; use another out_dir")
    existing, others = checkpoint.find(folder), sorted(path.name for path in folder.glob("ckpt_*.pt"))
    if s.init_from == "auto" and not existing and others and not s.overwrite:
        raise ValueError(
            f"{folder} has no {checkpoint.NAME}, but {', '.join(others)}: mv one of these to {checkpoint.NAME} to "
            "continue from it, or use --overwrite=True to delete them"
        )
    if s.init_from == "resume" and not existing:
        raise ValueError(f"init_from=resume, but {folder} has no {checkpoint.NAME}; use init_from=scratch or auto")
    if s.init_from in ("auto", "resume"):
        return existing
    if not s.overwrite and (existing or (folder / "metrics.jsonl").exists()):
        raise ValueError(
            f"init_from={s.init_from}, but {folder} already holds a run; use --init_from=resume to continue it, "
            "another out_dir, or --overwrite=True to delete it"
        )
    return None


def check_resume(s: SimpleNamespace, state: dict, path: Path, data: dict) -> None:
    """Raise ValueError if model, data or dense end differ from the checkpoint's. Drops removed settings."""
    for key in ("config", "model_args"):
        state[key] = without_removed(state[key], path)
    saved = state["config"]
    shape = ("n_layer", "n_head", "n_embd", "block_size", "bias", "activation", "ffn_ratio", "sparse", "dense_pretrain")
    differing = [f"{k}={getattr(s, k)} (there {saved[k]})" for k in shape if getattr(s, k) != saved[k]]
    if differing:
        raise ValueError(
            f"resume: {path} holds a model with other settings: {', '.join(differing)}; "
            "use its settings, or another out_dir"
        )
    trained_on = state.get("data") or data  # checkpoints of an earlier release have none
    vocabulary, tokens = vocabulary_changes(trained_on, data), changes(trained_on, data)
    if vocabulary or (tokens and not (s.allow_other_data or s.eval_only)):
        remedy = "" if vocabulary else ", --allow_other_data=True to continue on these tokens"
        raise ValueError(
            f"resume: {path} was trained on other data than those of dataset={s.dataset}: "
            f"{', '.join(vocabulary or tokens)}; use the model's own dataset{remedy}, or another out_dir"
        )
    if any(trained_on[name] != data[name] for name in ("val_tokens", "val_checksum")):
        state["best_val_loss"] = math.inf  # a loss on other tokens does not compare
    if s.dense_start < 0 and planned_dense_start(s) != state["dense_start"]:
        if state["dense_start"] == saved["max_iters"] and planned_dense_start(s) == s.max_iters:
            state["dense_start"] = s.max_iters  # a run without a dense end is extended
            return
        raise ValueError(
            f"resume: {path} becomes dense at iteration {state['dense_start']} of {saved['max_iters']}, these "
            f"settings at {planned_dense_start(s)} of {s.max_iters}; choose one with --dense_start=..."
        )


def changes(before: dict, now: dict) -> list[str]:
    """["name before -> now"] of the values that differ."""
    return [f"{name} {before[name]} -> {now[name]}" for name in before if name in now and before[name] != now[name]]


def announce(s: SimpleNamespace, model, path: Path | None, start: dict, about: dict, ranks: Ranks, report) -> None:
    """Print what is about to run. start: the checkpoint's state, or a new run's. about: the `data` and `starts` that
    the next checkpoint will have. report: on the 2:4 GEMMs, or None."""
    parallel = f" by {s.parallel}" if ranks.world_size > 1 else " alone" if s.parallel == "fsdp" else ""
    origin = f"init {'scratch' if s.init_from == 'auto' else s.init_from}"
    origin = f"resuming {path} at iteration {start['iter_num']}" if path else origin
    devices = f"{ranks.world_size} x {s.device}{parallel}"
    print(f"{s.out_dir}: {origin}; {devices}, {s.dtype}, compile={s.compile}, torch {torch.__version__}")
    if s.device.startswith("cuda"):
        print(f"Triton kernels: {kernel_status(next(model.parameters()).device)}")
    tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size
    print(f"model: {model.get_num_params() / 1e6:.2f}M parameters; {tokens:,} tokens per step, {s.max_iters:,} steps")
    if s.decay_lr and s.warmup_iters > s.max_iters > 0:
        print(f"warning: the run ends within its warm-up: warmup_iters={s.warmup_iters}, max_iters={s.max_iters}")
    if layers := sparse_linears(model):
        share = sum(layer.weight.numel() for layer in layers) / model.get_num_params()
        first = "its optimizer decides" if start["sparse_start"] is None else f"iteration {start['sparse_start']}"
        dense = [f"dense until {first}"] if start["sparse_start"] != 0 else []
        dense += [f"dense from iteration {s.dense_start}"] if s.dense_start < s.max_iters else []
        masks = f"masks every {s.mask_interval} steps, decay {s.masked_decay:g}, "
        masks = "dense weights, " if layers[0].recipe.mask == "none" else masks
        print(
            f"sparse: {s.sparse}, {len(layers)} linears ({share:.0%} of the parameters), {masks}mvue={s.mvue}; "
            f"{' and '.join(dense) or 'no dense phase'}"
        )
        defaults = {name: getattr(sparse24.get_recipe(s.sparse), name) for name in sparse24.SETTINGS}
        changed = [f"{k}={getattr(s, k)} ({value})" for k, value in defaults.items() if getattr(s, k) != value]
        if changed:
            print(f"changed from the recipe's values: {', '.join(changed)}")
    if report and (s.device.startswith("cuda") or s.spmm != "auto"):
        print(report.text())
    if report and s.device.startswith("cuda") and s.spmm == "auto" and not report.pays():
        print("2:4 sparsity does not pay here, see above: --sparse=none trains at least as fast")
    changed = changes(start.get("config", vars(s)), vars(s))
    changed += changes(start.get("data") or about["data"], about["data"])
    last_start, this_start = (start.get("starts") or about["starts"])[-1], about["starts"][-1]
    changed += changes({**last_start, "iter_num": this_start["iter_num"]}, this_start)
    if changed:
        print(f"changed since the checkpoint: {', '.join(changed)}")

"""Creates and checks everything that train.py's loop uses, before the first step.

train.py calls `begin`; its parts follow in the order in which it calls them. `s` holds the settings. All mistakes of
the user are found before anything is written.
"""

import contextlib
import copy
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import ConfigError, check_ranges, expand, setting_names, write_json
from gemm24.choose import Report
from gemm24.ffn import pack_weights
from gemm24.plan import plan_ffn, set_plan, time_ways
from model import GPT, GPTConfig, peak_flops
from runtime import checkpoint, settings
from runtime.checkpoint_writer import Saver, Writer
from runtime.fsdp import compile_blocks, shard_like, shard_model
from runtime.health import ActivationMeter, Diverged, FlipMeter, FlipReference, FlipWatch, StepGuard
from runtime.loader import DATA_FOLDER, DataLost, Tokens, describe, load_meta
from runtime.metrics import Log, read_metrics
from runtime.ranks import FolderInUse, Ranks, RanksDiffer, StopSignal, environment, hold, sign, source_hash, start_ranks
from runtime.settings import DTYPES, check_resume, find_start, planned_dense_start
from runtime.watchdog import Watchdog
from sparse24 import PATTERNS_HASH, MaskedDecayAdamW, Recipe, is_dtensor, sparse_linears

# train.py prints these errors without a traceback, because the user can act on them.
ERRORS = (checkpoint.CheckpointError, DataLost, FolderInUse, RanksDiffer, Diverged, OSError)


class Phase:
    """Decides the phase of an iteration: dense start, sparse phase, or dense end (section 4.4).

    The sparse phase lasts from `sparse_start`, which is None until the method's optimizer decides it, to `dense_start`.
    """

    def __init__(self, s, recipe: Recipe | None, sparse_start: int | None, optimizer: MaskedDecayAdamW, ranks: Ranks):
        self.max_iters, self.dense_start, self.sparse_start = s.max_iters, s.dense_start, sparse_start
        self.optimizer, self.ranks = optimizer, ranks
        self.earliest = round(s.max_iters * s.dense_pretrain)
        self.latest = round(s.max_iters * recipe.dense_pretrain_latest) if recipe else 0

    def enter(self, model: torch.nn.Module, iter_num: int) -> tuple[bool, bool]:
        """Put every sparse layer into the phase of this iteration. Returns (whether that is the sparse phase, whether
        it begins here)."""
        step = max(0, min(iter_num, self.max_iters - 1))  # after the last step the phase does not change
        is_sparse = self.sparse_start is not None and self.sparse_start <= step < self.dense_start
        changed = [layer for layer in sparse_linears(model) if layer.sparse != is_sparse]
        for layer in changed:
            layer.sparse = is_sparse
            if is_sparse:  # the weights have changed since the mask was computed
                layer.refresh(begin=True)
        if changed:
            pack_weights(model)
        return is_sparse, is_sparse and (bool(changed) or iter_num == self.sparse_start)

    def end_dense_start(self, iter_num: int) -> None:
        """Begin the sparse phase with the next iteration if it is due. Call it before the optimizer's step.

        It is due if the method's optimizer says so after the shortest allowed dense start, or after the longest one.
        """
        if self.sparse_start is None:
            done = self.ranks.maximum(self.optimizer.dense_start_done())  # ranks may round differently
            if iter_num + 1 >= (self.earliest if done else self.latest):
                self.sparse_start = iter_num + 1


@dataclass
class Training:
    """Everything that train.py's loop uses."""

    settings: SimpleNamespace
    ranks: Ranks
    device: torch.device
    train_data: Tokens
    val_data: Tokens
    model: GPT
    net: Callable  # the model, compiled if s.compile
    ddp: DistributedDataParallel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iter_num: int  # the first iteration
    linears: list[torch.nn.Linear]  # the feed-forward linears, sparse or not
    phase: Phase
    flips: FlipMeter
    activations: ActivationMeter
    guard: StepGuard
    saver: Saver
    log: Log
    stop: StopSignal
    static_grads: bool  # reuse the gradient tensors, because a CUDA graph overwrites its results at its next replay

    def autocast(self):
        """The context of every forward pass: mixed precision, unless dtype is float32."""
        return torch.autocast(self.device.type, DTYPES[self.settings.dtype], enabled=self.settings.dtype != "float32")

    def forward(self, x: torch.Tensor, y: torch.Tensor):
        """(logits, loss) of a micro-batch."""
        if self.static_grads:
            torch.compiler.cudagraph_mark_step_begin()
        return (self.ddp or self.net)(x, y)

    def sync_gradients(self, last: bool):
        """The context of a micro-step. Ranks average their gradients only in the last micro-step of a step."""
        if hasattr(self.model, "set_requires_all_reduce"):  # FSDP sums shards in every micro-step, replicas in the last
            self.model.set_requires_all_reduce(last)
        return self.ddp.no_sync() if self.ddp and not last else contextlib.nullcontext()


def begin(script: dict, overrides: dict, resources: contextlib.ExitStack) -> Training | None:
    """Create everything that the loop uses. Returns None if all steps of the run are done already.

    script: train.py's globals; the resolved settings are written there. overrides: the settings from config files and
    the command line. resources: closes the files that the run opens. Raises one of ERRORS, or ValueError or ImportError
    for a mistake of the user; then nothing has been written.
    """
    # the settings, the data, and the checkpoint to resume from, on which all ranks must agree
    s = SimpleNamespace(**{**{name: script[name] for name in setting_names(script)}, **overrides})
    check_ranges(vars(s), {"rank_timeout": settings.RANGES["rank_timeout"]})  # load_inputs checks the others
    ranks = start_ranks(s.device, s.rank_timeout)
    if ranks.control is not None:
        resources.callback(Watchdog(ranks, s.rank_timeout).close)
    inputs, error = attempt(load_inputs, s, overrides, ranks, resources)
    ranks.agree(inputs and inputs.facts, error)
    script.update(vars(s))
    recipe, device, start, path = inputs.recipe, inputs.device, inputs.start, inputs.path

    # the model, its GEMMs, and the optimizer
    model, report = place_model(s, inputs, ranks)
    optimizer = build_optimizer(s, model, recipe, inputs.state)
    # All settings are checked now.
    if inputs.state and start["iter_num"] >= s.max_iters and start.get("finished", True) and not s.eval_only:
        if ranks.master:
            print(f"{path}: all of max_iters={s.max_iters} iterations are done; raise max_iters or delete {s.out_dir}")
        ranks.leave()
        return None
    scaler = torch.amp.GradScaler(device.type, enabled=s.dtype == "float16")
    if start["scaler"]:
        scaler.load_state_dict(start["scaler"])
    net, ddp = wrap_model(s, model, recipe, ranks, device)
    static_grads = bool(s.compile) and s.compile_mode != "default"
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if static_grads else None

    # the parts that the loop calls in every step; each decides itself when to act
    optimizer.dense_start_log = start["autoswitch"] or optimizer.dense_start_log
    phase = Phase(s, recipe, start["sparse_start"], optimizer, ranks)
    peak = peak_flops(device)
    log = Log(s, model, ranks, peak and peak * ranks.world_size, start["elapsed_s"])
    saved = start.get("config", {})
    if all(saved.get(name) == getattr(s, name) for name in ("out_dir", "wandb_project")):  # else it is a copy of a run
        log.wandb_id = start.get("wandb_id")
    watch = FlipWatch(s.warmup_iters, s.lr_decay_iters if s.decay_lr else s.max_iters, inputs.reference)
    this_start = {"iter_num": start["iter_num"], **environment(device, ranks.world_size)}
    about = {"data": inputs.data, "starts": [*start.get("starts", ()), this_start]}
    stop, error = StopSignal(ranks), None  # not earlier: until here a signal ends the process at once
    if ranks.master and not s.eval_only:
        _, error = attempt(open_folder, s, inputs, model, report, about["starts"], log, watch, resources)
    ranks.agree({}, error)
    linears = [model.get_submodule(name) for name in model.sparse_names()]
    linears = [m for m in linears if m.in_features % 4 == m.out_features % 4 == 0]  # a dense run may have any width
    linears = [] if recipe and recipe.ffn else linears  # such a method does not prune by masks
    flips = FlipMeter(s, recipe, model, linears, watch, ranks)
    writer = Writer(s.out_dir, keep_last=s.keep_last, keep_every=s.keep_every, ranks=ranks)
    guard = StepGuard(s, ranks, writer, *start["skipped"])
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    saver = Saver(s, writer, ranks, phase, guard, log, parts, about, start)
    if ranks.master:
        settings.announce(s, model, path, start, about, ranks, report)
    return Training(
        settings=s, ranks=ranks, device=device, train_data=inputs.splits[0], val_data=inputs.splits[1],
        model=model, net=net, ddp=ddp, optimizer=optimizer, scaler=scaler, iter_num=start["iter_num"],
        linears=linears, phase=phase, flips=flips, activations=ActivationMeter(model, ranks), guard=guard,
        saver=saver, log=log, stop=stop, static_grads=static_grads,
    )  # fmt: skip


def attempt(function: Callable, *arguments) -> tuple:
    """(the result of the call, None), or (None, its error), of which the other ranks must be told."""
    try:
        return function(*arguments), None
    except (*ERRORS, ValueError, ImportError) as error:
        return None, error


def load_inputs(s, overrides: dict, ranks: Ranks, resources: contextlib.ExitStack) -> SimpleNamespace:
    """Check the settings, and load the data and the checkpoint. `facts` of the result must agree on all ranks.

    Does not communicate, because ranks that were started with other settings would wait for each other.
    """
    recipe = settings.resolve_settings(s, overrides)
    if s.gradient_accumulation_steps < ranks.world_size:
        raise ValueError(
            f"gradient_accumulation_steps={s.gradient_accumulation_steps}, need at least the number of ranks, "
            f"{ranks.world_size}; raise it, and lower batch_size to keep the tokens per step"
        )
    device, folder = settings.pick_device(s, ranks), DATA_FOLDER / s.dataset
    meta = load_meta(folder)
    splits = [Tokens(folder, split, s.block_size, meta["vocab_size"]) for split in ("train", "val")]
    data = describe(meta, splits)
    out_dir, lock = Path(s.out_dir), None
    if ranks.master and not s.eval_only and (out_dir / "run.lock").exists():
        lock = resources.enter_context(hold(out_dir))  # before reading, because another run may be writing there
    files = signature(out_dir)
    path = find_start(s, out_dir)
    state = path and checkpoint.load(path, PATTERNS_HASH, mmap=True)  # all ranks map the same file
    if state:
        check_resume(s, state, path, data)
    settings.check_schedule(s, state)
    s.dense_start = state["dense_start"] if state and s.dense_start < 0 else planned_dense_start(s)
    reference = FlipReference(s.flip_reference, vars(s)) if s.flip_reference else None
    facts = vars(s) | data | {"source": source_hash(), "torch": str(torch.__version__)}
    facts["checkpoint"] = state and (str(path), state["iter_num"], state["elapsed_s"])
    return SimpleNamespace(
        recipe=recipe, device=device, data=data, splits=splits, path=path, state=state, lock=lock, files=files,
        start=state or fresh_state(s, recipe), reference=reference, facts=facts,
    )  # fmt: skip


def signature(folder: Path) -> dict:
    """{name: inode, size, time} of a run's files. Two of them differ if another run has written in between."""
    files = {path.name: path.lstat() for path in (*folder.glob("ckpt*.pt"), *folder.glob("metrics.jsonl"))}
    return {name: (file.st_ino, file.st_size, file.st_mtime_ns) for name, file in files.items()}


def fresh_state(s, recipe: Recipe | None) -> dict:
    """The initial state of a new run, with the keys of a checkpoint."""
    decided_later = recipe and recipe.dense_pretrain_latest  # by the method's optimizer
    sparse_start = None if decided_later else round(s.max_iters * s.dense_pretrain)
    progress = {"iter_num": 0, "best_val_loss": math.inf, "elapsed_s": 0.0, "skipped": (0, 0), "scaler": {}}
    return progress | {"sparse_start": sparse_start, "autoswitch": None}


def place_model(s, inputs: SimpleNamespace, ranks: Ranks):
    """(the model on its device or in FSDP shards, with its weights and 2:4 GEMMs; the report on these GEMMs)."""
    torch.set_float32_matmul_precision("high")
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    state, recipe, device, vocab_size = inputs.state, inputs.recipe, inputs.device, inputs.data["vocab_size"]
    model, report, plan = build_model(s, state, recipe, vocab_size), None, None
    if vocab_size > model.config.vocab_size:
        raise ValueError(
            f"dataset={s.dataset} has {vocab_size} tokens, the model {model.config.vocab_size}; "
            "use the model's own dataset"
        )
    fsdp = s.parallel == "fsdp" and ranks.control is not None
    if not fsdp:
        model.to(device)
    if recipe and recipe.fused and not s.eval_only and inputs.start["iter_num"] < s.dense_start:
        path = Path(s.out_dir) / "spmm.json" if state else None
        plan, report = plan_gemms(s, model, path, ranks, fsdp, device)
    if fsdp:  # this moves the model to the device, one shard at a time
        mode = s.compile_mode if s.compile else None
        shard_model(model, model.transformer.h, ranks, device, s.fsdp_copies, DTYPES[s.dtype], mode)
    if state:
        load_weights(model, state["model"])
    set_plan(model, plan)
    return model, report


def wrap_model(s, model: GPT, recipe: Recipe | None, ranks: Ranks, device: torch.device):
    """(the model or its compiled form; its DDP wrapper or None)."""
    if s.parallel == "fsdp" and ranks.control is not None:  # shard_model has compiled the blocks
        if s.compile:  # outside the blocks, the float32 logits cost the most
            model.head = torch.compile(model.head, mode=s.compile_mode)
        return model, None
    net = model
    if s.compile and recipe and recipe.ffn:  # its layers change what they compute one by one: do not compile all anew
        compile_blocks(model.transformer.h, s.compile_mode)
        model.head = torch.compile(model.head, mode=s.compile_mode)
    elif s.compile:
        net = torch.compile(model, mode=s.compile_mode)
    if ranks.world_size == 1:
        return net, None
    # Every rank computes the masks from the same weights, so buffers need no broadcast.
    parameters = inspect.signature(DistributedDataParallel).parameters
    keyword = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # torch < 2.13
    ddp = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None, **{keyword: False})
    pack_weights(model)  # DDP has copied rank 0's weights to every rank
    return net, ddp


def open_folder(s, inputs, model: GPT, report, starts: list[dict], log: Log, watch: FlipWatch, resources) -> None:
    """Try out_dir and lock it, delete a run that is to be overwritten, and open the files of this one.

    Raises FolderInUse if the run that is there is not the one that load_inputs has seen.
    """
    folder = Path(s.out_dir)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    checkpoint.probe(folder, 3.1 * weights)  # weights, two moments, and masks
    lock = inputs.lock or resources.enter_context(hold(folder))
    if signature(folder) != inputs.files:
        raise FolderInUse(f"out_dir={folder}: another run has written there during this start; start once more")
    sign(lock)
    if s.wandb_log:  # before an earlier run is deleted, because it may fail
        log.open_wandb()
    for leftover in (*folder.glob("ckpt*.tmp"), *folder.glob("*.json*.*.tmp")):  # left by a kill
        leftover.unlink()
    if inputs.state is None:
        checkpoint.clear(folder)
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and not s.overwrite:  # a kill came early, or the user deleted checkpoints
            with open(folder / "metrics_old.jsonl", "ab") as file:
                file.write(metrics.read_bytes())
            print(f"{metrics} is of a run without checkpoints: added to metrics_old.jsonl")
        for stale in ("metrics.jsonl", "spmm.json"):
            (folder / stale).unlink(missing_ok=True)
    write_json(folder / "config.json", {**vars(s), "environment": starts[-1], "starts": starts})
    if report and report.rows:
        report.save(folder / "spmm.json")
    log.open(inputs.start["iter_num"])
    if inputs.state:
        watch.replay(read_metrics(folder))


def build_model(s: SimpleNamespace, state: dict | None, recipe: Recipe | None, vocab_size: int) -> GPT:
    """A model with random weights from the seed, with OpenAI's weights, or in a checkpoint's shape."""
    torch.manual_seed(s.seed)
    if state is not None:
        return GPT(GPTConfig(**{**state["model_args"], "dropout": s.dropout}), recipe)
    if s.init_from.startswith("gpt2"):
        model = GPT.from_pretrained(s.init_from, {"dropout": s.dropout, "sparse": s.sparse}, recipe)
        if s.block_size < model.config.block_size:
            model.crop_block_size(s.block_size)
        return model
    shape = {field.name: getattr(s, field.name) for field in fields(GPTConfig) if hasattr(s, field.name)}
    shape["vocab_size"] = vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64  # padded for tensor cores
    return GPT(GPTConfig(**shape), recipe)


def load_weights(model: GPT, saved: dict) -> None:
    """Load the weights and masks of a checkpoint. Each rank copies only its rows of a sharded weight."""
    sharded = {name: target for name, target in model.state_dict().items() if is_dtensor(target) and name in saved}
    model.load_state_dict(saved | {name: shard_like(saved[name], target) for name, target in sharded.items()})


def build_optimizer(s: SimpleNamespace, model: GPT, recipe: Recipe | None, state: dict | None):
    """AdamW with masked decay, with the checkpoint's state but the hyperparameters of the settings."""
    method = {}
    if recipe:
        method = {"masked_decay": recipe.masked_decay, "decay_on": recipe.decay_on, "optimizer": recipe.optimizer}
    optimizer = model.configure_optimizers(s.weight_decay, s.learning_rate, (s.beta1, s.beta2), s.device, **method)
    if state is not None:
        # `fused` must be set before loading, because it decides on which device torch puts the step counts.
        groups = [
            {**saved, **{key: group[key] for key in ("weight_decay", "betas", "fused")}}
            for saved, group in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True)
        ]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {}
        for k, saved in state["optimizer"]["state"].items():  # copied, because the checkpoint is a mapped file
            moments[k] = {
                name: shard_like(value, params[k]) if name.startswith("exp_avg") else copy.deepcopy(value)
                for name, value in saved.items()
            }
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return optimizer


def plan_gemms(s: SimpleNamespace, model: GPT, path: Path | None, ranks: Ranks, fsdp: bool, dev: torch.device):
    """(plan of the sparse FFNs or None, report), measured on rank 0. path: a resumed run's spmm.json, or None."""
    result = None
    if ranks.master:
        try:
            result = _measure_gemms(s, model, path, ranks.world_size, fsdp, dev)
        except (ValueError, RuntimeError) as error:  # the other ranks wait for a result
            result = ValueError(str(error))
    result = ranks.decide(result)
    if isinstance(result, ValueError):
        raise result
    return result


def _measure_gemms(s: SimpleNamespace, model: GPT, path: Path | None, world_size: int, fsdp: bool, dev: torch.device):
    """(plan or None, report). Earlier measurements are reused if they were made for the same question."""
    saved = Report.read(path)
    for note in saved.notes:
        print(note)
    folder, cache = os.environ.get("XDG_CACHE_HOME", ""), None
    with contextlib.suppress(ConfigError):  # without a home folder, runs share no measurements
        cache = Path(folder if os.path.isabs(folder) else expand("~/.cache")) / "nano24" / "spmm.json"
    # A CUDA graph times the GPU alone; in training the host runs ahead of it.
    options = {"graph": dev.type == "cuda", "cache": cache, "known": saved.rows}
    if dev.type == "cuda" and s.spmm not in ("dense", "masked"):
        often = "the first time" if cache else "at each start: there is no home folder for a cache, set XDG_CACHE_HOME"
        print(f"measuring 2:4 GEMMs, which takes a while {often}", flush=True)
    mlp = model.transformer.h[0].mlp
    case = (s.batch_size * s.block_size, dev, DTYPES[s.dtype], s.spmm, mlp.c_fc.recipe)
    plan, report = plan_ffn(model.config, *case, **options)
    if plan is not None and s.spmm == "auto":
        # Weights are packed once per optimizer step; under FSDP they are packed in each micro-step.
        micro_steps = 1 if fsdp else -(-s.gradient_accumulation_steps // world_size)
        question = {"compile_mode": s.compile_mode if s.compile else None, "micro_steps": micro_steps}
        report.layer = saved.layer
        if not saved.layer or saved.layer.get("asked") != question or saved.rows != report.rows:
            report.layer = time_ways(copy.deepcopy(mlp).to(dev), plan, **question) | {"asked": question}
        plan = plan if report.layer["taken"] == "plan" else None
    return plan, report

"""Pre-train GPT-2 with 2:4 sparse feed-forward layers, or dense, on any machine.

    python train.py config/demo.py                                          a laptop
    python train.py config/train_gpt2_sparse.py --batch_size=8              one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_sparse.py

One optimizer step is: accumulate micro-batches -> all-reduce -> unscale -> clip -> masked decay (Eq. 10) -> AdamW
-> refresh the masks every `mask_interval` steps -> pack the weights. It is sparse while iter_num < dense_start, dense
from there on; with dense_pretrain, also before sparse_start.

Nothing that is drawn depends on history. Data, dropout and MVUE draws are functions of (seed, iteration, global
micro-batch), where the global micro-batch is micro_step * world_size + rank, so that any number of ranks trains on the
same numbers, and a run that was killed goes on from its last checkpoint to the same weights. Evaluation draws from its
own numbers.
"""

import contextlib
import inspect
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import prepare
import sparse24
from checkpoint_writer import Writer
from configurator import configure_or_exit, setting_names
from ffn import pack_weights, set_plan
from health import FlipReference, FlipWatch, LossWatch
from loader import DATA_FOLDER, DataLost, Tokens, load_meta
from metrics import Metrics, read_metrics
from model import peak_flops
from runtime import FolderInUse, Ranks, RanksDiffer, StopSignal, environment, hold, shard_model, sign, start_ranks
from sparse24 import (
    AutoSwitch,
    decay_ratio,
    flip_rate,
    hard_pruned,
    is_dtensor,
    refresh_masks,
    search_permutations,
    seed_draws,
    seed_words,
    sparse_linears,
    whole,
)

# ---- the run ----
out_dir = "out"  # what the run writes: ckpt.pt, metrics.jsonl, config.json, spmm.json
init_from = "auto"  # auto (resume when out_dir holds a run, else scratch), scratch, resume, gpt2, gpt2-medium, ...
overwrite = False  # allow init_from=scratch to delete the run that is in out_dir
eval_only = False  # evaluate once and stop
seed = 1337  # of the initial weights, data order, dropout and MVUE; at least 0
# ---- logging, evaluation, checkpoints (none of these changes a weight) ----
log_interval = 10  # steps between lines on the console
eval_interval = 1000  # steps between evaluations; 0 = only at the end
eval_iters = 200  # batches per evaluation, the same ones every time; 0 = the whole validation split, end to end
flip_interval = 100  # steps between measurements of the flip rate (Definition 4.1); 0 = never
checkpoint_interval = 1000  # steps between saves of ckpt.pt; also saved at the dense switch, on a stop and at the end
keep_last = 2  # so many of the latest saves stay; beyond ckpt.pt and ckpt_prev.pt as ckpt_ITERATION.pt
keep_every = 0  # saves at multiples of this iteration stay for good, as ckpt_ITERATION.pt; 0 = none
always_save_checkpoint = True  # also save at every evaluation; False: save only the best so far, as ckpt_best.pt
wandb_log = False  # log the same numbers to Weights & Biases; it reads WANDB_MODE=offline from the environment
wandb_project = "nano24"
wandb_run_name = "gpt2"
# ---- data ----
dataset = "openwebtext"  # folder under data/ (or a path) with train.bin, val.bin and meta.json
sampling = "random"  # random (windows anywhere, nanoGPT's), epoch (each window once an epoch; keep windows per step)
gradient_accumulation_steps = 40  # micro-batches per step over all ranks together
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# ---- model ----
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pre-training, 0.1 or more for fine-tuning
bias = False  # biases in linears and layer norms
activation = "gelu"  # gelu, relu2, geglu, swiglu (gated ones get a d_ff of 2/3, so that parameters match)
ffn_ratio = 4.0  # d_ff / n_embd; 2 is the paper's Half baseline
# ---- 2:4 sparsity (the defaults are fst's; another recipe brings its own unless you set them) ----
sparse = "none"  # none, fst, ste, sr_ste, s_ste, s_ste_straight, step, bi_mask: the equations are in sparse24.py
mask_interval = 40  # steps between mask refreshes
masked_decay = 6e-5  # the decay factor lambda of Eq. 10; 0 = none
mvue = True  # 2:4 weight gradients through MVUE; False = dense ones
dense_finetune = 1 / 6  # share of max_iters that is dense, at the end
dense_start = -1  # first dense iteration; -1 = round(max_iters * (1 - dense_finetune))
dense_pretrain = 0.0  # share of max_iters that is dense, at the start
# ---- flip-rate health ----
flip_mask = "auto"  # masks whose flips count: auto (the recipe's; dense runs: transposable), transposable, row
flip_reference = ""  # out_dir of a dense run to compare flip rates with, as search_decay.py records one
# ---- optimizer ----
learning_rate = 6e-4  # peak
max_iters = 600000  # optimizer steps, exactly
weight_decay = 1e-1  # AdamW's decoupled decay, on matrices only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest global gradient norm; 0 = no clipping
decay_lr = True  # linear warm-up, then cosine; False = learning_rate throughout
warmup_iters = 2000
lr_decay_iters = 600000  # iteration at which min_lr is reached
min_lr = 6e-5
# ---- machine ----
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto (bfloat16 where the GPU has it, else float16; float32 on CPU), float32, bfloat16, float16
compile: bool | None = None  # torch.compile the model; None = on CUDA only
compile_mode = "default"  # torch.compile's: default, reduce-overhead (CUDA graphs), max-autotune
spmm = "auto"  # 2:4 GEMMs: auto (where faster), cusparselt, cutlass; or none: dense (by layer), masked (fused FFN)
deterministic = False  # bit-reproducible GPU kernels, slower; CPU runs are reproducible anyway
# ---- several ranks ----
parallel = "ddp"  # ddp (each holds the model), fsdp (weights, gradients and moments in shards, for models past a card)
fsdp_copies = 1  # fsdp: so many copies of the model, each in shards over its share of the ranks; the nodes, often
# ---- end of settings ----

_DATA, _DROPOUT, _EVAL = 1, 2, 3  # tags that keep the streams of seed_words apart; MVUE's has none


@torch.no_grad()
def evaluate(model, split: Tokens, ranks: Ranks, device: torch.device, autocast) -> float:
    """Mean loss over `eval_iters` batches that are the same at every call, or over the whole split in order."""
    last = len(split.data) - split.block_size
    count = eval_iters or -(-len(range(0, last, split.block_size)) // batch_size)
    loss_sum, sequences = 0.0, 0
    model.eval()
    for first in range(0, count, ranks.world_size):
        k = min(first + ranks.rank, count - 1)  # past the end too, uncounted: shards are gathered by all ranks together
        if eval_iters:
            x, y = split.windows(split.random_starts(batch_size, seed, k, 0, _EVAL), device)
        else:
            starts = range(k * batch_size * split.block_size, last, split.block_size)[:batch_size]
            x, y = split.windows(starts, device)
        with autocast():
            _, loss = model(x, y)
        counted = len(x) if first + ranks.rank < count else 0
        loss_sum += loss.item() * counted
        sequences += counted
    model.train()
    if hasattr(model, "reshard"):  # FSDP keeps the outermost weights together for a backward, which does not come
        model.reshard()
    loss_sum, sequences = ranks.total([loss_sum, sequences])
    return loss_sum / sequences


def batch_starts(split: Tokens, iter_num: int, micro_batch: int):
    """Where the windows of a micro-batch begin in the training split, whichever rank it falls to."""
    if sampling == "epoch":
        number = (iter_num * gradient_accumulation_steps + micro_batch) * batch_size
        return split.epoch_starts(batch_size, number, seed)
    return split.random_starts(batch_size, seed, iter_num, micro_batch, _DATA)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the iteration


def get_lr(iter_num: int) -> float:
    """Linear warm-up over warmup_iters, cosine down to min_lr at lr_decay_iters, min_lr after that."""
    if not decay_lr:
        return learning_rate
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= lr_decay_iters:
        return min_lr
    progress = (iter_num - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def clip_gradients(model: torch.nn.Module, ranks: Ranks) -> float:
    """Clip to grad_clip; returns the norm before. The host waits for the GPU here, once a step: what is not finite must
    reach neither weights nor moments."""
    params = [p for p in model.parameters() if p.grad is not None]
    sharded = is_dtensor(params[0])
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in params], foreach=True if sharded else None))
    if sharded and fsdp_copies > 1:  # copies may sum in another order, and must not drift apart
        norm = norm.new_tensor(ranks.total([float(norm) if ranks.master else 0.0])[0])
    torch.nn.utils.clip_grads_with_norm_(params, grad_clip or math.inf, norm, foreach=True if sharded else None)
    return norm.item()


def set_phase(model: torch.nn.Module, is_sparse: bool) -> None:
    """Put every sparse layer into its phase. One that comes back from dense gets the mask of its weights."""
    changed = [layer for layer in sparse_linears(model) if layer.sparse != is_sparse]
    for layer in changed:
        layer.sparse = is_sparse
        if is_sparse:
            layer.refresh(begin=True)
    if changed:
        pack_weights(model)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Diverged(RuntimeError):
    """More than MAX_SKIPPED gradients in a row were not finite."""

    MAX_SKIPPED = 20  # each is a step that is passed over


def main() -> None:
    with contextlib.ExitStack() as resources:
        try:
            run(resources)
        except (checkpoint.CheckpointError, DataLost, FolderInUse, RanksDiffer, Diverged, OSError) as error:
            sys.exit(f"train.py: error: {error}")


def all_settings() -> SimpleNamespace:
    return SimpleNamespace(**{name: globals()[name] for name in setting_names(globals())})


def run(resources: contextlib.ExitStack) -> None:
    overrides = configure_or_exit(globals(), sys.argv[1:])
    globals().update(overrides)
    folder = Path(out_dir)
    try:
        s = all_settings()
        recipe = prepare.resolve_settings(s, overrides)
        ranks = start_ranks(device)
        if gradient_accumulation_steps < ranks.world_size:
            raise ValueError(
                f"gradient_accumulation_steps={gradient_accumulation_steps}, need one for each of {ranks.world_size} "
                "ranks; raise it, and lower batch_size to keep the tokens per step"
            )
        dev = prepare.pick_device(s, ranks)
        globals().update(vars(s))
        data_folder = DATA_FOLDER / dataset
        meta = load_meta(data_folder)
        train_data, val_data = (Tokens(data_folder, name, block_size, meta["vocab_size"]) for name in ("train", "val"))
        # Before anything is read, so that no run goes on from what another one is about to write over.
        lock = None
        if ranks.master and not eval_only and (folder / "run.lock").exists():
            lock = resources.enter_context(hold(folder))
        path = prepare.find_start(s, folder)
        if ranks.decide(path) != path:
            raise ValueError(f"out_dir={out_dir} is not the same folder on every rank; put it on a shared file system")
        state = checkpoint.load(path, sparse24.PATTERNS_HASH, whole=False, ranks=ranks) if path else None
        read = (state["iter_num"], state["elapsed_s"]) if state else None
        if ranks.decide(read) != read:
            raise ValueError(f"{path} is another checkpoint here than on rank 0; put out_dir on a shared file system")
        if state is not None:
            prepare.check_resume(s, state, path)
        torch.set_float32_matmul_precision("high")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        fsdp = parallel == "fsdp" and ranks.control is not None
        model = prepare.build_model(s, state, recipe, meta["vocab_size"])
        model = model if fsdp else model.to(dev)  # shards are moved one by one
        if meta["vocab_size"] > model.config.vocab_size:
            raise ValueError(
                f"dataset={dataset} has {meta['vocab_size']} tokens, the model {model.config.vocab_size}; "
                "use the dataset it was made for"
            )
        iter_num = state["iter_num"] if state else 0
        switch = state["dense_start"] if state and dense_start < 0 else prepare.planned_dense_start(s)
        sparse_start = state["sparse_start"] if state else prepare.planned_sparse_start(s, recipe)
        kept = folder / "spmm.json" if state else None
        planned = recipe and recipe.fused and iter_num < switch and not eval_only
        plan, report = prepare.plan_gemms(s, model, kept, ranks, fsdp, dev) if planned else (None, None)
        if fsdp:
            how = compile_mode if compile else None
            shard_model(model, model.transformer.h, ranks, dev, fsdp_copies, prepare.DTYPES[dtype], how)
        if state is not None:
            prepare.load_weights(model, state["model"])
        set_plan(model, plan)
        optimizer = prepare.build_optimizer(s, model, recipe, state)
        settings = {**vars(s), "dense_start": switch}
        reference = FlipReference(flip_reference, settings, flip_mask) if flip_reference else None
    except (ValueError, OSError, ImportError, checkpoint.CheckpointError, FolderInUse) as error:
        sys.exit(f"train.py: error: {error}")

    if state is not None and state["iter_num"] >= max_iters and not eval_only:
        if ranks.master:
            print(f"{path}: all of max_iters={max_iters} iterations are done; raise max_iters or delete {folder}")
        ranks.leave()
        return
    scaler = torch.amp.GradScaler(dev.type, enabled=dtype == "float16")
    best_val_loss, elapsed, skipped, in_a_row = math.inf, 0.0, 0, 0
    if state is not None:
        if state["scaler"]:  # of a run in float16
            scaler.load_state_dict(state["scaler"])
        best_val_loss, elapsed, (skipped, in_a_row) = state["best_val_loss"], state["elapsed_s"], state["skipped"]
    model_args = asdict(model.config)
    watch = FlipWatch(warmup_iters, lr_decay_iters if decay_lr else max_iters, reference)
    settling = AutoSwitch(model, optimizer) if recipe and recipe.autoswitch else None
    if settling and state is not None:
        settling.changes = state["autoswitch"]
    net = torch.compile(model, mode=compile_mode) if compile and not fsdp else model
    if compile and fsdp:  # blocks are compiled one by one; of what is left, logits in float32 cost most
        model.head = torch.compile(model.head, mode=compile_mode)
    ddp = None
    if ranks.world_size > 1 and not fsdp:  # masks come from the same weights on every rank: buffers need no broadcast
        keyword = "forward_sync_buffers"  # the name since torch 2.13
        if keyword not in inspect.signature(DistributedDataParallel).parameters:
            keyword = "broadcast_buffers"
        ddp = DistributedDataParallel(net, device_ids=[dev] if dev.type == "cuda" else None, **{keyword: False})
        pack_weights(model)  # DDP has written every weight, rank 0's
    linears = [model.get_submodule(name) for name in model.sparse_names()]  # flips are counted in dense runs too
    linears = [m for m in linears if not (m.in_features % 4 or m.out_features % 4)]  # where a mask would fit
    local_steps = -(-gradient_accumulation_steps // ranks.world_size)
    share = gradient_accumulation_steps / ranks.world_size  # DDP and FSDP take the mean over the ranks
    tokens_per_step = gradient_accumulation_steps * batch_size * block_size
    peak = peak_flops(dev)

    def autocast():
        return torch.autocast(dev.type, prepare.DTYPES[dtype], enabled=dtype != "float32")

    writer = Writer(folder, keep_last=keep_last, keep_every=keep_every, ranks=ranks)

    def save(name: str = checkpoint.NAME) -> None:
        ranks.check_equal(model)
        if metrics:
            metrics.sync()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "iter_num": iter_num,
            "best_val_loss": best_val_loss,
            "model_args": model_args,
            "config": settings,
            "dense_start": switch,
            "sparse_start": sparse_start,
            "autoswitch": settling.changes if settling else None,
            "patterns_hash": sparse24.PATTERNS_HASH,
            "elapsed_s": elapsed,
            "skipped": [skipped, in_a_row],
        }
        writer.save(state, name)

    metrics = None
    if ranks.master and not eval_only:
        folder.mkdir(parents=True, exist_ok=True)
        sign(lock or resources.enter_context(hold(folder)))
        if path is None:
            checkpoint.clear(folder)
            for stale in ("metrics.jsonl", "spmm.json"):
                (folder / stale).unlink(missing_ok=True)
        text = json.dumps({**settings, "environment": environment(dev, ranks.world_size)}, indent=1)
        (folder / "config.json.tmp").write_text(text + "\n")
        os.replace(folder / "config.json.tmp", folder / "config.json")
        if report and report.rows:
            report.save(folder / "spmm.json")
        metrics = Metrics(folder, iter_num, settings)
        for row in read_metrics(folder) if iter_num else []:
            if row["phase"] == "sparse" and row["flip_rate"] is not None:
                watch.add(row["iter"], row["flip_rate"], row["lr"])
    if ranks.master:
        prepare.announce(s, model, path, iter_num, sparse_start, switch, ranks, report)
        if state is not None:
            prepare.announce_changes(state["config"], settings)
    del state
    # CUDA graphs overwrite their results at the next replay, so gradients are added up in tensors of our own there.
    keep_grads = compile and compile_mode != "default"
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if keep_grads else None
    stop, losses_so_far = StopSignal(), LossWatch()
    first_iter, unlogged_steps, unlogged_s, tick = iter_num, 0, 0.0, time.perf_counter()
    model.train()

    while True:
        last_step = max(0, min(iter_num, max_iters - 1))  # after the last step its phase stays
        is_sparse = sparse_start is not None and sparse_start <= last_step < switch
        set_phase(model, is_sparse)
        row = {"iter": iter_num, "phase": "sparse" if is_sparse else "dense", "elapsed_s": round(elapsed, 3)}
        stopping = bool(ranks.maximum(stop.received is not None)) and iter_num < max_iters
        ended = iter_num >= max_iters or stopping or eval_only

        # ---- evaluate and save ----
        if not stopping and (iter_num >= max_iters or eval_only or (eval_interval and iter_num % eval_interval == 0)):
            row["val_loss"] = evaluate(net, val_data, ranks, dev, autocast)
            if ended and linears:  # as it would be deployed
                row["val_loss_24"] = row["val_loss"]
                if not all(getattr(m, "sparse", False) for m in linears):
                    with hard_pruned(linears):
                        row["val_loss_24"] = evaluate(net, val_data, ranks, dev, autocast)
        improved = row.get("val_loss", math.inf) < best_val_loss
        best_val_loss = min(best_val_loss, row.get("val_loss", math.inf))
        if improved and not always_save_checkpoint and iter_num and not eval_only:
            save("ckpt_best.pt")
        marks = iter_num % checkpoint_interval == 0 or iter_num in (switch, sparse_start)
        due = marks or ("val_loss" in row and always_save_checkpoint)
        writer.poll()
        if metrics and ended and not stopping:
            metrics.write(row)  # before the save, after which no start would come back here
        if not eval_only and (ended or (due and iter_num > first_iter)):
            save()
        if ended:
            writer.wait()
            if ranks.master and "val_loss" in row:
                pruned = f", hard-pruned to 2:4 {row['val_loss_24']:.4f}" if "val_loss_24" in row else ""
                print(
                    f"iter {iter_num:>6}/{max_iters}  {row['phase']:<6}  val {row['val_loss']:.4f}{pruned}", flush=True
                )
            break
        tick = time.perf_counter()

        # ---- one optimizer step ----
        row["lr"] = get_lr(iter_num)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        decay = 0.0
        if is_sparse and masked_decay:
            row["masked_decay"] = optimizer.masked_decay = decay = masked_decay
        if is_sparse and recipe.permutation_interval and iter_num % recipe.permutation_interval == 0:
            search_permutations(model, seed, iter_num)
        losses = []
        for micro_step in range(local_steps):
            micro_batch = micro_step * ranks.world_size + ranks.rank
            counts = micro_batch < gradient_accumulation_steps
            if not counts:  # the round is filled up with what this rank has had, for nothing
                micro_batch -= ranks.world_size
            x, y = train_data.windows(batch_starts(train_data, iter_num, micro_batch), dev)
            seed_draws(model, seed, iter_num, micro_batch)
            torch.manual_seed(int(seed_words(1, seed, iter_num, micro_batch, _DROPOUT)[0]))
            last = micro_step == local_steps - 1
            if keep_grads:
                torch.compiler.cudagraph_mark_step_begin()
            if fsdp:
                model.set_requires_all_reduce(last)  # between copies; shards are summed in every micro-step
            with ddp.no_sync() if ddp and not last else contextlib.nullcontext():
                with autocast():
                    _, loss = (ddp or net)(x, y)
                scaler.scale(loss / share if counts else loss * 0).backward()
            if counts:
                losses.append(loss.detach().clone())  # a CUDA graph writes the next one where this one is
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model, ranks)
        losses = torch.stack(losses).tolist()
        mine = range(ranks.rank, gradient_accumulation_steps, ranks.world_size)
        for micro_batch, loss in zip(mine, losses, strict=True):
            if odd := losses_so_far.add(loss):
                starts = ", ".join(str(start) for start in batch_starts(train_data, iter_num, micro_batch)[:8])
                place = f"iteration {iter_num}, micro-batch {micro_batch}, whose windows begin at tokens {starts}"
                print(f"warning, rank {ranks.rank}: {odd}; {place}", flush=True)
        finite = math.isfinite(grad_norm)
        in_a_row = 0 if finite else in_a_row + 1
        if not finite:
            skipped += 1
            if ranks.master:
                print(f"warning, iteration {iter_num}: gradient norm {grad_norm}, step passed over", flush=True)
        if in_a_row > Diverged.MAX_SKIPPED:
            writer.wait()
            raise Diverged(
                f"the last {in_a_row} gradients were not finite; the weights are as they were before them, the last "
                f"checkpoint is {checkpoint.find(folder)}; lower learning_rate, or look at the data named above"
            )
        logging = iter_num % log_interval == 0 or iter_num == switch or "val_loss" in row or not finite
        measuring = bool(linears) and flip_interval > 0 and iter_num % flip_interval == 0
        measuring = measuring and finite  # else nothing flips
        if (logging or measuring) and finite and decay and recipe.decay_on != "weight":
            row["decay_ratio"] = decay_ratio(model, decay)
        before = sparse24.weight_indices(linears, flip_mask) if measuring else []
        settled = sparse_start is None and bool(ranks.maximum(settling.settled()))  # ranks may round apart
        if finite:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not keep_grads)
        if measuring:
            after = sparse24.weight_indices(linears, flip_mask)
            row["flip_rate"] = flip_rate(before, after)
            if is_sparse:
                for warning in watch.add(iter_num, row["flip_rate"], row["lr"]) if ranks.master else []:
                    print(f"warning, iteration {iter_num}: {warning}", flush=True)
        if sparse_start is None:
            earliest, latest = (round(max_iters * share) for share in (dense_pretrain, sparse24.AUTOSWITCH_LATEST))
            if iter_num + 1 >= (earliest if settled else latest):
                sparse_start = iter_num + 1
        if is_sparse and (iter_num + 1) % mask_interval == 0:
            refresh_masks(model, measure=False)
        pack_weights(model)

        # ---- log ----
        unlogged_steps += 1
        if logging or measuring:
            row["train_loss"] = ranks.total([sum(losses)])[0] / gradient_accumulation_steps
            row["grad_norm"], row["skipped"] = grad_norm, skipped
        now = time.perf_counter()
        elapsed, unlogged_s = elapsed + now - tick, unlogged_s + now - tick
        if logging or measuring:
            row["s_per_iter"] = unlogged_s / unlogged_steps
            row["tokens_per_s"] = round(tokens_per_step / row["s_per_iter"], 1)
            row["mfu"] = model.estimate_mfu(row["tokens_per_s"], peak and peak * ranks.world_size)
            unlogged_steps, unlogged_s = 0, 0.0
            if metrics:
                metrics.write(row)
                if logging:
                    metrics.show(row)
        iter_num += 1

    if metrics:
        metrics.close()
        how = "run the same command again" + ("" if init_from in ("auto", "resume") else " with --init_from=resume")
        if stopping:
            print(f"stopped after iteration {iter_num}, saved in {folder / checkpoint.NAME}; to go on, {how}")
        else:
            print(f"done: {iter_num} iterations, best validation loss {best_val_loss:.4f}, saved in {folder}")
    ranks.leave()
    if stopping and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        sys.exit(128 + signal.SIGTERM)  # 0 would tell torchrun that the run is done, on the nodes that stay too


if __name__ == "__main__":
    main()

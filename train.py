"""Pre-train GPT-2 with 2:4 sparse feed-forward layers, or dense, on any machine.

    python train.py config/demo.py                                                      on a laptop
    python train.py config/train_gpt2_sparse.py --batch_size=8                          on one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_sparse.py       on eight GPUs

The settings come first; config files and the command line change them. The loop is in `run`. runtime/setup.py creates
and checks everything that the loop uses, before the first step.

Every random number is a function of (seed, iteration, global micro-batch), never of earlier draws. The global
micro-batch is micro_step * world_size + rank, so any number of ranks trains on the same batches. A killed run continues
from its last checkpoint and ends with the same weights.
"""

import contextlib
import functools
import math
import sys

import torch

from configurator import configure_or_exit, keep_console
from gemm24.ffn import pack_weights
from runtime import setup
from runtime.ranks import Ranks
from sparse24 import begin_step, hard_pruned, is_dtensor, refresh_masks, seed_draws, seed_words, whole

# ---- the run ----
out_dir = "out"  # folder that the run writes: ckpt.pt, metrics.jsonl, config.json, spmm.json
init_from = "auto"  # auto (resume if out_dir holds a run, else scratch), scratch, resume, gpt2, gpt2-medium, ...
overwrite = False  # allow init_from=scratch to delete the run in out_dir
eval_only = False  # evaluate once and stop
seed = 1337  # for the initial weights, the data order, dropout and MVUE; at least 0
# ---- logging, evaluation and checkpoints (none of these changes a weight) ----
log_interval = 10  # steps between lines on the console
eval_interval = 1000  # steps between evaluations; 0 = only at the end
eval_iters = 200  # batches per evaluation, the same ones every time; 0 = the whole validation split in order
flip_interval = 100  # steps between measurements of the flip rate (Definition 4.1); 0 = never
checkpoint_interval = 1000  # steps between saves; the run also saves at the dense switch, when stopped and at the end
keep_last = 2  # number of most recent checkpoints to keep; older ones are named ckpt_ITERATION.pt
keep_every = 0  # also keep every checkpoint whose iteration is a multiple of this, as ckpt_ITERATION.pt; 0 = none
always_save_checkpoint = True  # also save at every evaluation; False: save only the best one, as ckpt_best.pt
wandb_log = False  # log the same numbers to Weights & Biases
wandb_project = "nano24"
wandb_run_name = "gpt2"
# ---- data ----
dataset = "openwebtext"  # folder under data/ (or a path) with train.bin, val.bin and meta.json
allow_other_data = False  # resume although the dataset has other tokens than the checkpoint's
sampling = "random"  # random (windows anywhere, as in nanoGPT) or epoch (each window once an epoch)
gradient_accumulation_steps = 40  # micro-batches per step, summed over all ranks
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# ---- model ----
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pre-training, 0.1 or more for fine-tuning
bias = False  # biases in linears and layer norms
activation = "gelu"  # gelu, relu2 (act24 needs it), geglu, swiglu; gated ones get 2/3 of d_ff, for equal parameters
ffn_ratio = 4.0  # d_ff / n_embd; 2 is the paper's Half baseline
# ---- 2:4 sparsity (the defaults are fst's; another recipe brings its own unless you set them) ----
sparse = "none"  # none, fst, ste, sr_ste, s_ste, s_ste_straight, or a file in methods/: step, bi_mask, act24, ...
mask_interval = 40  # steps between mask refreshes
masked_decay = 6e-5  # the decay factor lambda of Eq. 10; 0 = none
mvue = True  # weight gradients with a 2:4 operand, sampled by MVUE; False = dense ones
dense_pretrain = 0.0  # share of max_iters that is dense, at the start
dense_finetune = 1 / 6  # share of max_iters that is dense, at the end
dense_start = -1  # first iteration of the dense end; -1 = round(max_iters * (1 - dense_finetune))
flip_mask = "auto"  # masks whose flips count: auto (the recipe's; in dense runs transposable), transposable, row
flip_reference = ""  # out_dir of a dense run: warn when the flip rate is above that run's
# ---- optimizer ----
learning_rate = 6e-4  # peak
max_iters = 600000  # optimizer steps
weight_decay = 1e-1  # AdamW's decoupled decay, on matrices only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest global gradient norm; 0 = no clipping
decay_lr = True  # linear warm-up, then cosine decay; False = learning_rate throughout
warmup_iters = 2000
lr_decay_iters = 600000  # iteration at which min_lr is reached
min_lr = 6e-5
# ---- machine ----
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto (bfloat16 where the GPU has it, else float16; float32 on CPUs), float32, bfloat16, float16
compile: bool | None = None  # torch.compile the model; None = on CUDA only
compile_mode = "default"  # torch.compile's mode: default, reduce-overhead (CUDA graphs), max-autotune
spmm = "auto"  # 2:4 GEMMs: auto (where faster), cusparselt; or none: dense (by layer), masked (fused FFN)
deterministic = False  # bit-reproducible GPU kernels, which are slower; CPU runs are always reproducible
# ---- several ranks ----
parallel = "ddp"  # ddp (each rank holds the model) or fsdp (weights, gradients and moments in shards)
fsdp_copies = 1  # fsdp: number of model replicas (HSDP); usually the number of nodes
rank_timeout = 600  # seconds that ranks wait for one that has stalled; then the run ends
# ---- end of settings ----

_DATA, _DROPOUT, _EVAL = 1, 2, 3  # tags that make these streams of random numbers independent


def get_lr(iter_num: int) -> float:
    """Linear warm-up over warmup_iters, cosine decay to min_lr at lr_decay_iters, min_lr after that."""
    if not decay_lr:
        return learning_rate
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= lr_decay_iters:
        return min_lr
    progress = (iter_num - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def batch_starts(data, iter_num: int, micro_batch: int):
    """Start positions, in the training split, of the windows of one micro-batch."""
    if sampling == "epoch":
        first_window = (iter_num * gradient_accumulation_steps + micro_batch) * batch_size
        return data.epoch_starts(batch_size, first_window, seed)
    return data.random_starts(batch_size, seed, iter_num, micro_batch, _DATA)


@torch.no_grad()
def evaluate(t: setup.Training) -> float | None:
    """Mean validation loss over `eval_iters` batches, the same ones at every call, or over the whole split.

    None if a signal to stop arrives: a resumed run evaluates from the start.
    """
    data, ranks = t.val_data, t.ranks
    end = len(data.data) - block_size
    batches = eval_iters or math.ceil(math.ceil(end / block_size) / batch_size)
    loss_sum, sequences = 0.0, 0
    t.model.eval()
    for first in range(0, batches, ranks.world_size):
        k = min(first + ranks.rank, batches - 1)  # every rank runs every forward, because FSDP gathers weights in it
        if eval_iters:
            starts = data.random_starts(batch_size, seed, k, 0, _EVAL)
        else:
            starts = range(k * batch_size * block_size, end, block_size)[:batch_size]
        x, y = data.windows(starts, t.device)
        if t.stop.agreed():
            break
        with t.autocast():
            _, loss = t.net(x, y)
        counted = len(x) if first + ranks.rank < batches else 0  # past the end: repeat the last batch, uncounted
        loss_sum, sequences = loss_sum + loss.item() * counted, sequences + counted
    t.model.train()
    if hasattr(t.model, "reshard"):  # FSDP keeps gathered weights for a backward, and there is none here
        t.model.reshard()
    loss_sum, sequences = ranks.total([loss_sum, sequences])
    return None if t.stop.number else loss_sum / sequences


def evaluate_pruned(t: setup.Training, val_loss: float | None) -> float | None:
    """The validation loss with all feed-forward weights pruned to 2:4. If they are sparse already, it is `val_loss`."""
    if all(getattr(linear, "sparse", False) for linear in t.linears):
        return val_loss
    with hard_pruned(t.linears):
        return evaluate(t)


def clip_gradients(model: torch.nn.Module, ranks: Ranks) -> float:
    """Clip the gradients to grad_clip. Returns their global norm before clipping. Waits for the GPU."""
    params = [p for p in model.parameters() if p.grad is not None]
    foreach = True if is_dtensor(params[0]) else None
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in params], foreach=foreach))
    if foreach and fsdp_copies > 1:  # replicas sum in different orders, but must clip by the same norm
        norm = norm.new_tensor(ranks.total([float(norm) if ranks.master else 0.0])[0])
    torch.nn.utils.clip_grads_with_norm_(params, grad_clip or math.inf, norm, foreach=foreach)
    return norm.item()


def run(t: setup.Training) -> None:
    model, optimizer, scaler, ranks, phase = t.model, t.optimizer, t.scaler, t.ranks, t.phase
    local_steps = math.ceil(gradient_accumulation_steps / ranks.world_size)
    local_share = gradient_accumulation_steps / ranks.world_size  # DDP and FSDP average over the ranks
    iter_num = t.iter_num
    model.train()
    while True:
        # enter the phase of this iteration: if it changes, switch all sparse layers to dense or back
        is_sparse, begins = phase.enter(model, iter_num)
        row = {"iter": iter_num, "phase": "sparse" if is_sparse else "dense", "elapsed_s": round(t.log.elapsed, 3)}
        last = iter_num >= max_iters or eval_only
        # let sparse layers do what their method does before a step
        if not last:
            begin_step(model, seed, iter_num, begins)

        # once in a while: evaluate; at the end also with pruned weights, as for 2:4 inference
        if not t.stop.agreed() and (last or (eval_interval and iter_num % eval_interval == 0)):
            results = {"val_loss": evaluate(t)}
            if last and t.linears:
                results["val_loss_24"] = evaluate_pruned(t, results["val_loss"])
            row |= {} if t.stop.number else results

        # once in a while: save a checkpoint
        t.saver.save_if_due(row, last, stopping=t.stop.number > 0)
        if last or t.stop.number:
            break
        t.log.start_step()

        # set the learning rate
        row["lr"] = get_lr(iter_num)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]

        # forward and backward: accumulate the gradients of this rank's micro-batches
        losses = []
        for micro_step in range(local_steps):
            micro_batch = micro_step * ranks.world_size + ranks.rank
            is_spare = micro_batch >= gradient_accumulation_steps
            if is_spare:  # fewer micro-batches than ranks are left: repeat one, weight 0, so that collectives match
                micro_batch -= ranks.world_size
            x, y = t.train_data.windows(batch_starts(t.train_data, iter_num, micro_batch), t.device)
            ranks.go_on(f"iteration {iter_num}" if iter_num > t.iter_num else None)
            seed_draws(model, seed, iter_num, micro_batch)
            torch.manual_seed(int(seed_words(1, seed, iter_num, micro_batch, _DROPOUT)[0]))
            with t.sync_gradients(micro_step == local_steps - 1):
                with t.autocast():
                    _, loss = t.forward(x, y)
                scaler.scale(loss * 0 if is_spare else loss / local_share).backward()
            if not is_spare:
                losses.append(loss.detach().clone())  # a CUDA graph will overwrite `loss`
        # clip the gradients
        scaler.unscale_(optimizer)
        row["grad_norm"] = clip_gradients(model, ranks)
        # skip the step if a gradient is not finite; warn of unusual losses
        losses = torch.stack(losses).tolist()
        finite = t.guard.check(row, losses, functools.partial(batch_starts, t.train_data, iter_num))
        # end the dense start, if the method's optimizer has a rule for it
        phase.end_dense_start(iter_num)
        # masked decay, then AdamW; once in a while measure the flip rate of this step
        log_now = iter_num % log_interval == 0 or iter_num == phase.dense_start or "val_loss" in row or not finite
        t.flips.before_step(row, log_now, finite)
        if finite:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not t.static_grads)
        t.flips.after_step(row)
        t.activations.after_step(row)
        # refresh the masks every mask_interval steps, and pack the new weights for the 2:4 GEMMs
        if is_sparse and (iter_num + 1) % mask_interval == 0:
            refresh_masks(model, measure=False)
        pack_weights(model)

        t.log.end_step(row, losses, log_now)
        iter_num += 1

    t.log.close(row, t.stop.number > 0, t.saver.saved, t.saver.best_val_loss)
    t.stop.tell_torchrun()
    ranks.leave()
    if t.stop.number:
        sys.exit(128 + t.stop.number)  # as a shell reports a process that the signal has ended


def main() -> None:
    keep_console()
    overrides = configure_or_exit(globals(), sys.argv[1:])
    errors = (*setup.ERRORS, ValueError, ImportError)  # before the first step an error is one line to the user
    with contextlib.ExitStack() as resources:
        try:
            t = setup.begin(globals(), overrides, resources)
            errors = setup.ERRORS  # a ValueError in the loop is a bug: show its traceback
            if t is not None:
                run(t)
        except errors as error:
            sys.exit(f"train.py: error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:  # during the start; later StopSignal records it
            print("train.py: stopped", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()

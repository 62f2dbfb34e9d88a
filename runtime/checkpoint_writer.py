"""Saves checkpoints in a thread, while training continues.

    save   all ranks gather the sharded tensors, one at a time -> rank 0 copies the state to host memory
           -> rank 0's thread writes the file
    poll   all ranks learn whether the thread is done; all raise if it failed

Only `save`, `poll` and `wait` communicate, and only from the main thread.
"""

import copy
import math
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from runtime.health import Diverged
from runtime.ranks import Ranks
from sparse24 import PATTERNS_HASH, local, whole


def rebuild(value, change):
    """A copy of nested dicts, lists and tuples with change(leaf) in place of every leaf."""
    if isinstance(value, dict):
        new = copy.copy(value)  # a state_dict keeps its _metadata
        for key, item in value.items():
            new[key] = rebuild(item, change)
        return new
    if type(value) in (list, tuple):  # torch.Size is a tuple too, but a leaf
        return type(value)(rebuild(item, change) for item in value)
    return change(value)


class HostCopy:
    """Copies a state to host memory on rank 0. Sharded tensors are gathered first, one at a time.

    torch.distributed.checkpoint.state_dict is no substitute: it saves a tied weight twice, does not copy CPU tensors,
    names moments by their weights instead of numbering them, and creates missing moments by an optimizer step.
    """

    def __init__(self):
        self.buffers = []  # reused by the next copy; pinned for CUDA tensors

    def _buffer(self, k: int, tensor: torch.Tensor) -> torch.Tensor:
        if k == len(self.buffers):
            self.buffers.append(None)
        size, buffer = tensor.numel() * tensor.element_size(), self.buffers[k]
        if buffer is None or len(buffer) != size or buffer.is_pinned() != tensor.is_cuda:
            self.buffers[k] = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        return self.buffers[k].view(tensor.dtype).view(tensor.shape)

    @torch.no_grad()
    def __call__(self, state: dict, is_master: bool = True) -> dict | None:
        """The state with an unsharded copy of each tensor; None on ranks other than the master.

        Collective if a tensor is sharded, so the state's dicts must have the same order on all ranks. No rank holds
        more than one gathered tensor at a time. A tied weight is gathered once and stays tied.
        """
        copies = {}

        def change(tensor):
            if not torch.is_tensor(tensor):
                return tensor
            shard = local(tensor)  # its storage identifies the tensor even if this rank holds no rows
            key = (shard.untyped_storage()._cdata, shard.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in copies:
                full_tensor = whole(tensor)
                copies[key] = self._buffer(len(copies), full_tensor).copy_(full_tensor) if is_master else None
            return copies[key].detach() if is_master else None  # detach: tied tensors are two objects, as in `state`

        copied = rebuild(state, change)
        del self.buffers[len(copies) :]
        return copied if is_master else None


class Writer:
    """Saves checkpoints in a thread on rank 0. Training waits only until the state is copied to host memory.

    All ranks must call save, poll and wait in the same order. If the thread fails, the first of these calls after it
    raises on all ranks, once. A process that ends without `wait` still finishes its thread.
    keep: keep_last and keep_every of checkpoint.save.
    """

    def __init__(self, out_dir, ranks: Ranks | None = None, **keep: int):
        self.out_dir, self.ranks, self.keep = Path(out_dir), ranks or Ranks(), keep
        self.to_host = HostCopy()
        self.pending = False  # a save was begun, and `poll` has not yet seen its end; equal on all ranks
        self.thread = self.error = None

    def save(self, state: dict, name: str = checkpoint.NAME) -> None:
        """Wait for the previous save, copy `state`, and begin to write it to out_dir/name.

        Begins nothing if the previous save failed (CheckpointError) or if `state` lacks a key (ValueError).
        """
        self.wait()
        checkpoint.check_keys(state)
        copied, self.pending = self.to_host(state, self.ranks.master), True
        if self.ranks.master:
            self.thread = threading.Thread(target=self._write, args=(copied, name), name="checkpoint.Writer")
            self.thread.start()

    def _write(self, state: dict, name: str) -> None:
        try:
            checkpoint.save(self.out_dir, state, name, **self.keep)
        except BaseException as error:  # `poll` raises it in the main thread
            self.error = error

    def poll(self) -> None:
        """Raise the error of a pending save if it has failed. Does not wait; communicates only if one is pending."""
        if not self.pending:
            return
        running = self.thread is not None and self.thread.is_alive()
        status = self.ranks.maximum(2 if running else int(self.error is not None))
        if status == 2:
            return
        error, self.error, self.thread, self.pending = self.error, None, None, False
        if status == 1:
            raise error or CheckpointError(f"rank 0 cannot write a checkpoint in {self.out_dir}; see its error")

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises its error if it failed."""
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(1)
            self.ranks.moved = time.monotonic()  # a long save is no stall
        self.poll()


class Saver:
    """Saves every checkpoint_interval steps, at changes of phase, at evaluations, at a stop and at the end.

    Weights whose latest loss is not finite are not saved. The latest loss is the validation loss, if it has just been
    measured, or else any rank's training losses in the step before.
    """

    def __init__(self, s, writer: Writer, ranks, phase, guard, log, parts: dict, about: dict, start: dict):
        """s: train.py's settings. parts: the model, optimizer and scaler by their names in the checkpoint.
        about: `data` and `starts` of the checkpoint. start: the state in which the run starts."""
        self.s, self.writer, self.ranks, self.phase, self.guard, self.log = s, writer, ranks, phase, guard, log
        self.parts, self.about = parts, about
        self.first_iter, self.best_val_loss = start["iter_num"], start["best_val_loss"]
        self.saved = True  # False: the last save was left out, because the loss was not finite

    def save_if_due(self, row: dict, last: bool, stopping: bool) -> None:
        """Call it once per iteration, before the step. last: all steps are done. stopping: a signal ends the run here.

        Raises Diverged if the run is finished, but its loss is not finite.
        """
        s, iter_num, val_loss = self.s, row["iter"], row.get("val_loss", math.inf)
        improved, finished = val_loss < self.best_val_loss, last and not stopping
        self.best_val_loss = val_loss if improved else self.best_val_loss
        self.writer.poll()
        if finished and not s.eval_only:
            self.log.write(row)  # before the save: a run resumed from it does not repeat this iteration
        if improved and not s.always_save_checkpoint and iter_num and not s.eval_only:
            self.save(iter_num, "ckpt_best.pt")
        due = iter_num % s.checkpoint_interval == 0 or iter_num in (self.phase.dense_start, self.phase.sparse_start)
        due = due or ("val_loss" in row and s.always_save_checkpoint)
        due = last or stopping or (due and iter_num > self.first_iter)
        if not due:
            return
        self.saved = not self.ranks.maximum(not math.isfinite(row.get("val_loss", self.guard.loss)))
        if self.saved and not s.eval_only:
            self.save(iter_num, finished=finished)
        if last or stopping or not self.saved:
            self.writer.wait()
        if not self.saved:
            text = f"the loss at iteration {iter_num} is not finite"
            if not s.eval_only:
                text += f", so it is not saved; the last checkpoint is {checkpoint.find(s.out_dir) or 'none'}"
            if finished:
                raise Diverged(f"{text}; lower learning_rate, or look at the data")
            if self.ranks.master:
                print(f"warning: {text}", flush=True)

    def save(self, iter_num: int, name: str = checkpoint.NAME, finished: bool = False) -> None:
        """Begin to write out_dir/name. Raises RanksDiffer if ranks hold different weights or masks."""
        self.ranks.check_equal(self.parts["model"])
        self.log.sync()
        state = {
            **{name: part.state_dict() for name, part in self.parts.items()},
            **self.about,
            "iter_num": iter_num,
            "finished": finished,  # the last evaluation is done too; older checkpoints lack this key
            "best_val_loss": self.best_val_loss,
            "model_args": asdict(self.parts["model"].config),
            "config": vars(self.s),
            "dense_start": self.phase.dense_start,
            "sparse_start": self.phase.sparse_start,
            "autoswitch": self.parts["optimizer"].dense_start_log,
            "patterns_hash": PATTERNS_HASH,
            "elapsed_s": self.log.elapsed,
            "wandb_id": self.log.wandb_id,
            "skipped": [self.guard.skipped, self.guard.in_a_row],
        }
        self.writer.save(state, name)

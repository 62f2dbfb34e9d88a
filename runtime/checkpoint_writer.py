"""Saves a run's checkpoints while it trains on.

    save   all ranks gather the sharded tensors, one at a time -> rank 0 copies the state to host memory -> its thread
           writes the file
    poll   all ranks learn whether the thread is done, and all raise if it failed

Only `save`, `poll` and `wait` communicate, and only in the main thread.
"""

import copy
import math
import threading
from dataclasses import asdict
from pathlib import Path

import torch

from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from runtime.ranks import Ranks
from sparse24 import PATTERNS_HASH, local, whole


def rebuild(value, change):
    """A copy of `value` with change(leaf) in place of every leaf of its dicts, lists and tuples."""
    if isinstance(value, dict):
        new = copy.copy(value)  # a state_dict keeps its _metadata
        for key, item in value.items():
            new[key] = rebuild(item, change)
        return new
    if type(value) in (list, tuple):  # torch.Size is a tuple too, but a leaf
        return type(value)(rebuild(item, change) for item in value)
    return change(value)


class HostCopy:
    """Copies the tensors of a state to host memory on rank 0, and gathers the sharded ones for it.

    torch.distributed.checkpoint.state_dict gathers one tensor at a time as well. It is not used for four reasons: it
    gathers and saves a tied weight twice; it does not copy tensors that are on a CPU already; it names moments by their
    weights, where the file of an unsharded run numbers them; and it makes missing moments by a step of the optimizer.
    """

    def __init__(self):
        self.buffers = []  # used again by the next copy; pinned where they receive from CUDA

    def _buffer(self, k: int, tensor: torch.Tensor) -> torch.Tensor:
        if k == len(self.buffers):
            self.buffers.append(None)
        size, old = tensor.numel() * tensor.element_size(), self.buffers[k]
        if old is None or len(old) != size or old.is_pinned() != tensor.is_cuda:
            self.buffers[k] = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        return self.buffers[k].view(tensor.dtype).view(tensor.shape)

    @torch.no_grad()
    def __call__(self, state: dict, is_master: bool = True) -> dict | None:
        """The state with an unsharded copy of each tensor; None on other ranks.

        Collective if a tensor is sharded, so the state's dicts must have the same order on all ranks. No rank holds
        more than one gathered tensor at a time. A tied weight is gathered once, and stays tied.
        """
        copies = {}

        def change(tensor):
            if not torch.is_tensor(tensor):
                return tensor
            part = local(tensor)  # its storage tells tensors apart even where this rank has no rows
            key = (part.untyped_storage()._cdata, part.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in copies:
                full = whole(tensor)
                copies[key] = self._buffer(len(copies), full).copy_(full) if is_master else None
            return copies[key].detach() if is_master else None  # tied tensors are two objects, as in `state`

        copied = rebuild(state, change)
        del self.buffers[len(copies) :]
        return copied if is_master else None


class Writer:
    """Saves a run's checkpoints in a thread of rank 0. Training waits only for a copy of the state to host memory.

    All ranks call save, poll and wait at the same places, and all of them raise if the thread failed. Its error is
    raised once, by the first of these calls after it. A process that ends without `wait` still finishes its thread.
    keep_last, keep_every: see checkpoint.save.
    """

    def __init__(self, out_dir, keep_last: int = 2, keep_every: int = 0, ranks: Ranks | None = None):
        self.out_dir, self.ranks = Path(out_dir), ranks or Ranks()
        self.keep = {"keep_last": keep_last, "keep_every": keep_every}
        self.to_host = HostCopy()
        self.pending = False  # a save was begun, and no call has seen its end; the same on all ranks
        self.thread = self.error = None

    def save(self, state: dict, name: str = checkpoint.NAME) -> None:
        """Copy `state`, and begin to write it to out_dir/name after the save before this one is on disk.

        Raises CheckpointError if that one failed, and ValueError if `state` lacks a key; then nothing is begun.
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
        except BaseException as error:  # it is raised in the main thread, by `poll`
            self.error = error

    def poll(self) -> None:
        """See whether a save is done; never waits for a disk. Communicates only while a save is pending. Raises
        CheckpointError if it failed."""
        if not self.pending:
            return
        running = self.thread is not None and self.thread.is_alive()
        status = self.ranks.maximum(2 if running else int(self.error is not None))
        if status == 2:
            return
        error, self.error, self.thread, self.pending = self.error, None, None, False
        if status == 1:
            raise error or CheckpointError(f"rank 0 cannot write a checkpoint in {self.out_dir}; it says why")

    def wait(self) -> None:
        """Return when the last save is on disk. Raises CheckpointError if it failed."""
        if self.thread is not None:
            self.thread.join()
        self.poll()


class Saver:
    """Saves a checkpoint when it is due: every checkpoint_interval steps, at the starts of the sparse phase and of the
    dense end, at evaluations, when the run is stopped, and at its end."""

    def __init__(self, s, writer: Writer, ranks, phase, guard, log, parts: dict, first_iter: int, best_val_loss: float):
        """s: train.py's settings. parts: {name in the checkpoint: model, optimizer and scaler}."""
        self.s, self.writer, self.ranks, self.phase, self.guard, self.log = s, writer, ranks, phase, guard, log
        self.parts, self.first_iter, self.best_val_loss = parts, first_iter, best_val_loss

    def save_if_due(self, row: dict, last: bool, stopping: bool) -> None:
        """Call it once per iteration, before its step. last: the run ends here. stopping: a signal asked for that."""
        s, iter_num, val_loss = self.s, row["iter"], row.get("val_loss", math.inf)
        improved, self.best_val_loss = val_loss < self.best_val_loss, min(val_loss, self.best_val_loss)
        self.writer.poll()
        if s.eval_only:
            return
        if last and not stopping:
            self.log.write(row)  # write the row first: a run resumed from this save never repeats this iteration
        if improved and not s.always_save_checkpoint and iter_num:
            self.save(iter_num, "ckpt_best.pt")
        due = iter_num % s.checkpoint_interval == 0 or iter_num in (self.phase.dense_start, self.phase.sparse_start)
        due = due or ("val_loss" in row and s.always_save_checkpoint)
        if last or (due and iter_num > self.first_iter):
            self.save(iter_num)
        if last:
            self.writer.wait()

    def save(self, iter_num: int, name: str = checkpoint.NAME) -> None:
        """Begin to write out_dir/name. Raises RanksDiffer if ranks hold different weights or masks."""
        self.ranks.check_equal(self.parts["model"])
        self.log.sync()
        state = {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "iter_num": iter_num,
            "best_val_loss": self.best_val_loss,
            "model_args": asdict(self.parts["model"].config),
            "config": vars(self.s),
            "dense_start": self.phase.dense_start,
            "sparse_start": self.phase.sparse_start,
            "autoswitch": self.phase.autoswitch.changes if self.phase.autoswitch else None,
            "patterns_hash": PATTERNS_HASH,
            "elapsed_s": self.log.elapsed,
            "skipped": [self.guard.skipped, self.guard.in_a_row],
        }
        self.writer.save(state, name)

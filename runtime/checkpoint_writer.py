"""Saves a run's checkpoints while it trains on, and those of several ranks without gathering them.

    save         copy the state to host memory -> a thread writes it, by checkpoint.save
    in shards    every rank's thread writes its rows into ckpt_00001200.shards/ -> poll: all ranks have -> rank 0's
                 thread saves ckpt.pt, which names that folder and has the size and CRC-32 of its files -> poll

A folder of shards counts from the instant that ckpt.pt names it, so that a kill at any moment leaves ckpt.pt or
ckpt_prev.pt whole with its shards. Collectives are done by save, poll and wait, never by a thread.
"""

import itertools
import math
import threading
from dataclasses import asdict
from pathlib import Path

import torch

from runtime import checkpoint
from runtime.checkpoint_shards import CheckpointError, Place, fsync_folder, rebuild, take_apart, write
from sparse24 import PATTERNS_HASH


class HostCopy:
    """Copies tensors to host memory. The memory is kept for the next copy; it is pinned for what comes from CUDA."""

    def __init__(self):
        self.buffers = []

    def _buffer(self, k: int, source: torch.Tensor) -> torch.Tensor:
        if k == len(self.buffers):
            self.buffers.append(None)
        kept = self.buffers[k]
        if kept is None or len(kept) != len(source) or kept.is_pinned() != source.is_cuda:
            self.buffers[k] = torch.empty(len(source), dtype=torch.uint8, pin_memory=source.is_cuda)
        return self.buffers[k]

    @torch.no_grad()
    def __call__(self, value):
        """`value` with a copy of each tensor. Tensors that share memory go on sharing it, and so are saved once."""
        copies, on_gpu = {}, False

        def change(_, tensor):
            nonlocal on_gpu
            if not torch.is_tensor(tensor):
                return tensor
            storage = tensor.untyped_storage()
            if storage._cdata not in copies:  # the key by which torch.save itself tells storages apart
                source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                buffer = copies[storage._cdata] = self._buffer(len(copies), source)
                buffer.copy_(source, non_blocking=source.is_cuda)
                on_gpu |= source.is_cuda
            memory = copies[storage._cdata].untyped_storage()
            place = (tensor.storage_offset(), tensor.size(), tensor.stride())
            return torch.empty(0, dtype=tensor.dtype).set_(memory, *place)

        copied = rebuild(value, change)
        del self.buffers[len(copies) :]
        if on_gpu:
            torch.cuda.synchronize()
        return copied


class Writer:
    """Saves a run's checkpoints in a thread, so that training waits only for a copy of the state to host memory.

    With several ranks give their runtime.Ranks: all of them then call save, poll and wait at the same places, and each
    of these raises on all ranks if it does on one. A state with DTensors is saved as shards, any other one by rank 0.
    An error of the thread is raised once, by the first of save, poll and wait after it. A process that ends as usual
    finishes its thread, but only `wait` sees a sharded save through.

    background: False writes at once, without a copy. keep_last, keep_every: see checkpoint.save.
    """

    def __init__(self, out_dir, background: bool = True, keep_last: int = 2, keep_every: int = 0, ranks=None):
        self.out_dir, self.background = Path(out_dir), background
        self.keep = {"keep_last": keep_last, "keep_every": keep_every}
        self.ranks = ranks or checkpoint.OneRank()
        self._to_host = HostCopy()
        self._pending = False  # the same on all ranks, as it says whether they have a collective to do
        self._thread = self._error = self._then = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way; with several ranks, until poll or wait has seen its end."""
        unseen = self._then is not None or self.ranks.world_size > 1
        return self._pending and (unseen or (self._thread is not None and self._thread.is_alive()))

    def save(self, state: dict, name: str = checkpoint.NAME) -> None:
        """Copy `state` and begin to write it to out_dir/name, a *.pt, after the save before this one is on disk.

        Raises CheckpointError where that one failed, and then does not begin; ValueError when `state` lacks a key, or
        holds DTensors that are sharded otherwise than FSDP2 does, see checkpoint_shards.take_apart.
        """
        self.wait()
        checkpoint.check_keys(state)
        main, parts, place = take_apart(state)
        if place and place.ranks != self.ranks.world_size:
            raise ValueError(f"Writer: a state that {place.ranks} ranks share, need the Ranks of exactly these")
        main, parts = main if self.ranks.master else None, parts if place and place.writes else None
        if self.background:
            main, parts = self._to_host((main, parts))
        if place:
            self._save_shards(main, parts, place, name)
        elif self.ranks.master:
            self._start(lambda: checkpoint.save(self.out_dir, main, name, **self.keep))
        else:
            self._start(None)
        if not self.background:
            self.wait()

    def poll(self) -> None:
        """Go on with a save whose present stage is over on all ranks; never waits for a disk. One small collective,
        and none while nothing is under way. Raises CheckpointError where the save failed."""
        if self._pending:
            self._advance()

    def wait(self) -> None:
        """Return when the last save is on disk. Raises CheckpointError where it failed."""
        while self._pending:
            if self._thread is not None:
                self._thread.join()
            self._advance()

    def _start(self, job, then=None) -> None:
        """Do `job` in a thread, then, when poll or wait sees that all ranks have, call `then` in the main thread."""

        def run():
            try:
                job()
            except BaseException as error:  # whatever it is, it must not end with the thread
                self._error = error

        self._pending, self._error, self._then, self._thread = True, None, then, None
        if job is not None and self.background:
            self._thread = threading.Thread(target=run, name="checkpoint.Writer")
            self._thread.start()
        elif job is not None:
            run()

    def _advance(self) -> None:
        running = self._thread is not None and self._thread.is_alive()
        mine = self.ranks.rank + 1 if self._error else 0
        worst = self.ranks.maximum(self.ranks.world_size + 1 if running else mine)
        if worst > self.ranks.world_size:
            return
        error, then = self._error, self._then
        self._pending, self._error, self._then = False, None, None
        if worst:
            if self.ranks.master:
                checkpoint.delete_unnamed_shards(self.out_dir)
            other = f"rank {worst - 1} cannot write its part of a checkpoint in {self.out_dir}, and says why"
            raise error or CheckpointError(other)
        if then is not None:
            then()

    def _save_shards(self, main: dict | None, parts: dict | None, place: Place, name: str) -> None:
        """Two stages: all ranks write their shards; when all have, rank 0 writes the file that makes them count."""
        folder, written = self._new_folder(main), None

        def write_part():
            nonlocal written
            path = folder / f"{place.shard}.pt"
            try:
                written = write(path, parts, summed=True)
                fsync_folder(folder)
            except (OSError, RuntimeError) as error:
                raise checkpoint.cannot_write(path, error) from error

        def write_main(files):
            for k, file in enumerate(files):
                path = folder / f"{k}.pt"
                if not path.exists() or path.stat().st_size != file["bytes"]:
                    raise CheckpointError(f"rank 0 does not see {path}; put out_dir on a file system that all share")
            checkpoint.save(
                self.out_dir, {**main, "shards": {"folder": folder.name, "files": files}}, name, **self.keep
            )

        def go_on():
            numbers = [0.0] * (2 * place.shards)  # exact in float64, and each is one rank's
            if written:
                numbers[2 * place.shard : 2 * place.shard + 2] = written.bytes, written.crc32
            numbers = self.ranks.total(numbers)
            files = [{"bytes": int(numbers[2 * k]), "crc32": int(numbers[2 * k + 1])} for k in range(place.shards)]
            self._start((lambda: write_main(files)) if self.ranks.master else None)

        self._start(write_part if place.writes else None, go_on)

    def _new_folder(self, main: dict | None) -> Path:
        """Make a folder that no checkpoint names: ckpt_00001200.shards, or ckpt_00001200.1.shards if there is one."""
        answer = None
        if self.ranks.master:
            try:
                checkpoint.delete_unnamed_shards(self.out_dir)
                names = (f"ckpt_{main['iter_num']:08d}{f'.{k}' if k else ''}.shards" for k in itertools.count())
                answer = next(name for name in names if not (self.out_dir / name).exists())
                (self.out_dir / answer).mkdir()
                fsync_folder(self.out_dir)
            except OSError as error:
                answer = checkpoint.cannot_write(self.out_dir, error)
        answer = self.ranks.decide(answer)
        if isinstance(answer, CheckpointError):
            raise answer
        return self.out_dir / answer


class Saver:
    """Saves a checkpoint when it is due: every checkpoint_interval steps, at the starts of the sparse phase and of the
    dense end, at evaluations, when the run is stopped, and at its end."""

    def __init__(self, s, writer: Writer, ranks, phase, guard, log, parts: dict, first_iter: int, best_val_loss: float):
        """parts: {name in the checkpoint: model, optimizer and scaler}."""
        self.s, self.writer, self.ranks, self.phase, self.guard, self.log = s, writer, ranks, phase, guard, log
        self.parts, self.first_iter, self.best_val_loss = parts, first_iter, best_val_loss

    def save_if_due(self, row: dict, last: bool, stopping: bool) -> None:
        """Call it once per iteration, before its step. last: the run ends here; stopping: before it is done."""
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
        """Write out_dir/name, in a thread. Raises RanksDiffer where ranks hold different weights or masks."""
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
            "autoswitch": self.parts["optimizer"].dense_start_log,
            "patterns_hash": PATTERNS_HASH,
            "elapsed_s": self.log.elapsed,
            "skipped": [self.guard.skipped, self.guard.in_a_row],
        }
        self.writer.save(state, name)

"""Checkpoints that survive a kill at any moment, and that are checked before they are trusted.

    save   state -> ckpt.pt.tmp, fsync -> the old ckpt.pt also becomes ckpt_prev.pt -> rename ckpt.pt.tmp to ckpt.pt
           -> delete numbered checkpoints that are kept no longer, and folders of shards that no file names
    load   every file's CRC-32 -> torch.load(weights_only=True), which runs no code -> the keys below are all there

    python -m runtime.checkpoint out/ckpt.pt whole.pt        one file of a sharded checkpoint

At every instant ckpt.pt (or, on file systems without hard links, ckpt_prev.pt) is a whole checkpoint. Data order and
MVUE draws are functions of the iteration, so what is listed in `KEYS` is all that a run needs to go on bit for bit.
checkpoint_writer.py saves in a thread, and in shards; what is on disk then is in checkpoint_shards.py.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from runtime.checkpoint_shards import (
    CheckpointError,
    Sharded,
    damage_of,
    fsync_folder,
    like,
    make_whole,
    put_together,
    write,
)

__all__ = ["KEYS", "NAME", "PREVIOUS", "CheckpointError", "Sharded", "clear", "find", "like", "load", "save"]

NAME, PREVIOUS = "ckpt.pt", "ckpt_prev.pt"
KEYS = {
    "model",  # state_dict: weights, mask indices, phase
    "optimizer",
    "scaler",  # GradScaler's state, empty unless fp16
    "iter_num",  # optimizer steps done
    "best_val_loss",
    "model_args",  # the fields of GPTConfig
    "config",  # every setting of the run
    "dense_start",  # first iteration of the dense phase
    "sparse_start",  # first iteration of the sparse phase; None while STEP's rule has not said
    "autoswitch",  # what that rule has seen
    "elapsed_s",  # seconds of training
    "skipped",  # [steps skipped because a gradient was not finite, how many of them were the last ones]
    "patterns_hash",  # of sparse24.PATTERNS, whose order gives the mask indices their meaning
}


def cannot_write(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error}; earlier checkpoints are untouched; free space or set another out_dir"
    )


def check_keys(state: dict) -> None:
    if not state.keys() >= KEYS:
        raise ValueError(f"checkpoint.save: the state lacks {', '.join(sorted(KEYS - state.keys()))}")


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def _link(path: Path, name: Path) -> bool:
    """Make `name` a second name of `path`, in one step. False where the file system has no hard links."""
    link = name.with_name(name.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        return False
    os.replace(link, name)
    return True


def _keep_previous(path: Path, previous: Path) -> None:
    if not _link(path, previous):  # for an instant only ckpt_prev.pt exists, and `find` takes it
        os.replace(path, previous)


def _keep_numbered(path: Path, numbered: Path) -> None:
    if not _link(path, numbered):
        copy = numbered.with_name(numbered.name + ".tmp")
        shutil.copyfile(path, copy)
        with open(copy, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(copy, numbered)


def _kept(saved: set[int], iter_num: int, keep_last: int, keep_every: int) -> set[int]:
    """Which of the iterations `saved` still have a numbered file after the save at `iter_num`."""
    last = sorted(i for i in saved if i <= iter_num)[-keep_last:] if keep_last > 2 else []
    return {i for i in saved if i in last or (keep_every > 0 and i % keep_every == 0)}


def _delete_numbered(folder: Path, iter_num: int, keep_last: int, keep_every: int) -> None:
    """Delete the numbered checkpoints that neither rule keeps, and what a kill left of making one."""
    found = {path: re.fullmatch(r"ckpt_(\d{8,})\.pt(\.tmp)?", path.name) for path in folder.glob("ckpt_*")}
    numbers = {path: int(match[1]) for path, match in found.items() if match and not match[2]}
    kept = _kept(set(numbers.values()), iter_num, keep_last, keep_every)
    for path, match in found.items():
        if match and numbers.get(path) not in kept:
            path.unlink(missing_ok=True)


def delete_unnamed_shards(folder: Path) -> None:
    """Delete the folders of shards that no *.pt beside them names: of replaced checkpoints, and of killed saves."""
    there = list(folder.glob("ckpt_*.shards"))
    named = set()
    for path in folder.glob("*.pt") if there else ():
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # it may be whole all the same (no memory to map it, say), so nothing is deleted
            print(f"{folder}: old shards stay, since {path.name} cannot be read ({' '.join(str(error).split())[:100]})")
            return
        if isinstance(state, dict) and isinstance(state.get("shards"), dict):
            named.add(state["shards"].get("folder"))
    for path in there:
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)  # what is left of it goes after the next save


def save(out_dir: str | Path, state: dict, name: str = NAME, keep_last: int = 2, keep_every: int = 0) -> Path:
    """Write `state` to out_dir/name atomically; an existing ckpt.pt becomes ckpt_prev.pt. Returns the path.

    ckpt.pt is kept as ckpt_00001200.pt too, of iteration 1200, while it is one of the last `keep_last` saves (if those
    are more than ckpt.pt and ckpt_prev.pt, 2), and for good if keep_every > 0 divides its iteration. Numbered files
    that neither keeps are deleted; without either rule they are let alone.
    Raises CheckpointError when the folder cannot be written or is full; what was there before then stays untouched,
    and ValueError when `state` lacks a key of `KEYS`.
    """
    check_keys(state)
    path = Path(out_dir) / name
    temporary, iter_num = path.with_name(name + ".tmp"), state["iter_num"]
    numbered = path.with_name(f"ckpt_{iter_num:08d}.pt")
    numbering = name == NAME and (keep_last > 2 or keep_every > 0)
    try:
        write(temporary, state)
        if numbering and _kept({iter_num}, iter_num, keep_last, keep_every):
            _keep_numbered(temporary, numbered)
        if name == NAME and path.exists():
            _keep_previous(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
        fsync_folder(path.parent)
        if numbering:
            _delete_numbered(path.parent, iter_num, keep_last, keep_every)
        delete_unnamed_shards(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            for left in (temporary, numbered.with_name(numbered.name + ".tmp")):
                left.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    return path


def clear(out_dir: str | Path) -> None:
    """Delete the checkpoints of a run's folder, ckpt_best.pt with them."""
    for path in Path(out_dir).glob("ckpt*"):
        if re.fullmatch(r"ckpt(_prev|_best|_\d{8,})?\.pt(\.tmp)?", path.name):
            path.unlink()
    for path in Path(out_dir).glob("ckpt_*.shards"):
        shutil.rmtree(path)


class OneRank:
    """The runtime.Ranks of a process that is alone."""

    rank, world_size, master = 0, 1, True

    def maximum(self, value: int) -> int:
        return value

    def total(self, values: list[float]) -> list[float]:
        return values

    def decide(self, value):
        return value


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading


def find(out_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run's folder, or None."""
    for name in (NAME, PREVIOUS):
        if (Path(out_dir) / name).exists():
            return Path(out_dir) / name
    return None


def _read(path: Path, map_location, rank: int = 0, world_size: int = 1) -> dict:
    """The state, with a `Sharded` for each sharded tensor. Of the shards every world_size-th one is checked."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; name a run's out_dir that holds a {NAME}")
    damage = damage_of(path)
    if damage:
        raise CheckpointError(f"{path} cannot be used: {damage}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # unpickling reports foreign content by many types
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be used: torch.load refused it ({reason})") from error
    missing = KEYS - state.keys() if isinstance(state, dict) else KEYS
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of nano24: it lacks {', '.join(sorted(missing))}")
    shards = state.pop("shards", None)
    return put_together(state, path, shards, rank, world_size) if shards else state


def _offer_previous(path: Path, error: CheckpointError) -> CheckpointError:
    """`error`, which says more where the checkpoint before is whole."""
    previous = path.with_name(PREVIOUS)
    if path.name == PREVIOUS or not path.exists() or not previous.exists():
        return error
    try:
        iter_num = _read(previous, "cpu")["iter_num"]
    except CheckpointError:
        return error
    return CheckpointError(
        f"{error}; the one saved before it is whole (iteration {iter_num}): to go on from there, "
        f"mv '{previous}' '{path}'"
    )


def load(path: str | Path, patterns_hash: str, map_location="cpu", whole: bool = True, ranks=None) -> dict:
    """Read and verify a checkpoint. patterns_hash: sparse24.PATTERNS_HASH, which the masks must have been saved with.

    Sharded tensors are made whole, or with whole=False are left as `Sharded`, for `like`. map_location: a device.
    ranks: runtime.Ranks, where all ranks load the same checkpoint; they then share the work of checking its shards, and
    all raise if one does.
    Raises CheckpointError for a missing, truncated, corrupted or foreign file, and names the previous checkpoint of
    the same folder when that one is whole. Never changes a file.
    """
    path, ranks, error = Path(path), ranks or OneRank(), None
    try:
        state = _read(path, map_location, ranks.rank, ranks.world_size)
    except CheckpointError as caught:
        error = caught
    worst = ranks.maximum(ranks.rank + 1 if error else 0)
    if worst:
        error = error or CheckpointError(f"{path} cannot be used, and rank {worst - 1} says why")
        raise _offer_previous(path, error)
    if state["patterns_hash"] != patterns_hash:
        raise CheckpointError(
            f"{path}: its masks are indices into another pattern table ({state['patterns_hash']}, here "
            f"{patterns_hash}); use the version of nano24 that wrote it"
        )
    return make_whole(state, map_location) if whole else state


def convert(source: str | Path, target: str | Path) -> Path:
    """Write the checkpoint `source`, sharded or not, to the one new file `target`.

    Raises CheckpointError where `source` is missing or damaged, or `target` exists or cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists; name a file that is to be made")
    temporary = target.with_name(target.name + ".tmp")
    state = make_whole(_read(source, "cpu"), "cpu")
    try:
        write(temporary, state)
        os.replace(temporary, target)
        fsync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint, sharded or not, as a single file.")
    parser.add_argument("source", help="a run's ckpt.pt, beside which its folder of shards lies")
    parser.add_argument("target", help="the file to make; one that exists is not overwritten")
    options = parser.parse_args(argv)
    try:
        print(f"wrote {convert(options.source, options.target)}")
    except CheckpointError as error:
        sys.exit(f"runtime.checkpoint: error: {error}")


if __name__ == "__main__":
    main()

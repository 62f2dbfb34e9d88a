"""Checkpoints that survive a kill at any moment, and that are checked before they are trusted.

    save   state -> ckpt.pt.tmp, fsync -> the old ckpt.pt also becomes ckpt_prev.pt -> rename ckpt.pt.tmp to ckpt.pt
           -> delete the numbered checkpoints that no rule keeps
    load   the CRC-32 of every record -> torch.load(weights_only=True), which runs no code -> all keys below are there

At every instant ckpt.pt (or, on file systems without hard links, ckpt_prev.pt) is a complete checkpoint. Every run
writes this one file, whatever the number of ranks: a sharded run gathers its tensors first. Data order and MVUE draws
are functions of the iteration, so the `KEYS` are all that a run needs to continue bit for bit. checkpoint_writer.py
decides when a run saves, and saves in a thread.
"""

import contextlib
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch

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
    "sparse_start",  # first iteration of the sparse phase; None until STEP's rule has decided it
    "autoswitch",  # the changes of Adam's second moments that STEP's rule has seen
    "elapsed_s",  # seconds of training
    "skipped",  # [steps skipped because a gradient was not finite, how many of them were the last ones]
    "patterns_hash",  # hash of sparse24.PATTERNS, whose order gives the mask indices their meaning
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or is not one of nano24."""


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def check_keys(state: dict) -> None:
    if not state.keys() >= KEYS:
        raise ValueError(f"checkpoint.save: the state lacks {', '.join(sorted(KEYS - state.keys()))}")


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


def _copy(path: Path, name: Path) -> None:
    """Make `name` a copy of `path`, in one step."""
    copy = name.with_name(name.name + ".tmp")
    shutil.copyfile(path, copy)
    with open(copy, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(copy, name)


def _numbers_to_keep(saved: set[int], iter_num: int, keep_last: int, keep_every: int) -> set[int]:
    """Which of the iterations `saved` still have a numbered file after the save at `iter_num`."""
    latest = sorted(i for i in saved if i <= iter_num)[-keep_last:] if keep_last > 2 else []
    return {i for i in saved if i in latest or (keep_every > 0 and i % keep_every == 0)}


def _delete_numbered(folder: Path, iter_num: int, keep_last: int, keep_every: int) -> None:
    """Delete the numbered checkpoints that neither rule keeps, and the temporary ones that a kill left."""
    found = {path: re.fullmatch(r"ckpt_(\d{8,})\.pt(\.tmp)?", path.name) for path in folder.glob("ckpt_*")}
    numbers = {path: int(match[1]) for path, match in found.items() if match and not match[2]}
    keep = _numbers_to_keep(set(numbers.values()), iter_num, keep_last, keep_every)
    for path, match in found.items():
        if match and numbers.get(path) not in keep:
            path.unlink(missing_ok=True)


def save(out_dir: str | Path, state: dict, name: str = NAME, keep_last: int = 2, keep_every: int = 0) -> Path:
    """Write `state` to out_dir/name atomically; an existing ckpt.pt becomes ckpt_prev.pt. Returns the path.

    ckpt.pt of iteration 1200 also gets the name ckpt_00001200.pt, for as long as it is one of the last `keep_last`
    saves (if these are more than the two of ckpt.pt and ckpt_prev.pt), and for good if keep_every > 0 divides 1200.
    Numbered files that neither rule keeps are deleted. Without a rule, numbered files are left alone.
    Raises ValueError when `state` lacks a key of `KEYS`, and CheckpointError when the folder cannot be written or is
    full; then the earlier checkpoints are untouched.
    """
    check_keys(state)
    path = Path(out_dir) / name
    temporary, iter_num = path.with_name(name + ".tmp"), state["iter_num"]
    numbered = path.with_name(f"ckpt_{iter_num:08d}.pt")
    numbering = name == NAME and (keep_last > 2 or keep_every > 0)
    keep_number = numbering and bool(_numbers_to_keep({iter_num}, iter_num, keep_last, keep_every))
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_number and not _link(temporary, numbered):
            _copy(temporary, numbered)
        if name == NAME and path.exists() and not _link(path, path.with_name(PREVIOUS)):
            os.replace(path, path.with_name(PREVIOUS))  # until the next line only ckpt_prev.pt exists; `find` takes it
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the new names durable
        finally:
            os.close(folder)
        if numbering:
            _delete_numbered(path.parent, iter_num, keep_last, keep_every)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            for left in (temporary, numbered.with_name(numbered.name + ".tmp")):
                left.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}; earlier checkpoints are untouched; free space or set another out_dir"
        ) from error
    return path


def clear(out_dir: str | Path) -> None:
    """Delete all checkpoints of a run's folder, ckpt_best.pt and numbered ones too."""
    for path in Path(out_dir).glob("ckpt*"):
        if re.fullmatch(r"ckpt(_prev|_best|_\d{8,})?\.pt(\.tmp)?", path.name):
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading


def find(out_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run's folder, or None."""
    for name in (NAME, PREVIOUS):
        if (Path(out_dir) / name).exists():
            return Path(out_dir) / name
    return None


def _damage_of(path: Path) -> str | None:
    """What is wrong with the file, or None if it is a zip archive whose records all match their CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch neither compresses nor sets attributes; where a flipped bit says so, its reader returns garbage
            foreign = [info.filename for info in archive.infolist() if info.compress_type or info.external_attr]
            bad = foreign[0] if foreign else archive.testzip()
    except Exception as error:  # zipfile reports a damaged table of contents by exceptions of many types
        return f"it is truncated or was not written by torch.save ({error})"
    return f"its record {bad} is corrupted" if bad else None


def _read(path: Path, mmap: bool = False) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; name a run's out_dir that holds a {NAME}")
    damage = _damage_of(path)
    if damage:
        raise CheckpointError(f"{path} cannot be used: {damage}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # unpickling reports foreign content by exceptions of many types
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be used: torch.load refused it ({reason})") from error
    missing = KEYS - state.keys() if isinstance(state, dict) else KEYS
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of nano24: it lacks {', '.join(sorted(missing))}")
    if "shards" in state:
        raise CheckpointError(
            f"{path} was written in shards by an earlier release; convert it with `python checkpoint.py OLD NEW` of "
            "commit 8751ec3, the last one that can"
        )
    return state


def _offer_previous(path: Path, error: CheckpointError) -> CheckpointError:
    """`error`, extended by the way to continue from the previous checkpoint if that one can be used."""
    previous = path.with_name(PREVIOUS)
    if path.name == PREVIOUS or not path.exists() or not previous.exists():
        return error
    try:
        iter_num = _read(previous)["iter_num"]
    except CheckpointError:
        return error
    return CheckpointError(
        f"{error}; the one saved before it is whole (iteration {iter_num}): to go on from there, "
        f"mv '{previous}' '{path}'"
    )


def load(path: str | Path, patterns_hash: str, mmap: bool = False) -> dict:
    """Read and verify a checkpoint, into host memory.

    patterns_hash: sparse24.PATTERNS_HASH; the masks must have been saved with the same.
    mmap: map the file instead of reading it, so that several ranks share one copy of it in memory. Its tensors must
    then be copied before the file may change.
    Raises CheckpointError for a missing, truncated, corrupted or foreign file, and names the previous checkpoint of
    the same folder if that one can be used. Never changes a file.
    """
    path = Path(path)
    try:
        state = _read(path, mmap)
    except CheckpointError as error:
        raise _offer_previous(path, error) from error.__cause__
    if state["patterns_hash"] != patterns_hash:
        raise CheckpointError(
            f"{path}: its masks are indices into another pattern table ({state['patterns_hash']}, here "
            f"{patterns_hash}); use the version of nano24 that wrote it"
        )
    return state

"""Checkpoints that survive a kill at any moment, and that are checked before they are trusted.

    save   state -> ckpt.pt.tmp, fsync -> the old ckpt.pt also becomes ckpt_prev.pt -> rename ckpt.pt.tmp to ckpt.pt
    load   every record's CRC-32 -> torch.load(weights_only=True), which runs no code -> the keys below are all there

At every instant ckpt.pt (or, on file systems without hard links, ckpt_prev.pt) is a whole checkpoint. Data order and
MVUE draws are functions of the iteration, so what is listed in `KEYS` is all that a run needs to go on bit for bit.
"""

import contextlib
import os
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
    "sparse_start",  # first iteration of the sparse phase; None while STEP's rule has not said
    "autoswitch",  # what that rule has seen
    "controller",  # state of the decay controller
    "patterns_hash",  # of sparse24.PATTERNS, whose order gives the mask indices their meaning
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is damaged, is no checkpoint of nano24, or does not fit."""


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_previous(path: Path, previous: Path) -> None:
    """Make `previous` a second name of `path`, so that `path` is there at every instant."""
    link = previous.with_name(previous.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # no hard links on this file system: for an instant only ckpt_prev.pt exists, and `find` takes it
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def save(out_dir: str | Path, state: dict, name: str = NAME) -> Path:
    """Write `state` to out_dir/name atomically; an existing ckpt.pt becomes ckpt_prev.pt. Returns the path.

    Raises CheckpointError when the folder cannot be written or is full; what was there before then stays untouched,
    and ValueError when `state` lacks a key of `KEYS`.
    """
    if not state.keys() >= KEYS:
        raise ValueError(f"checkpoint.save: the state lacks {', '.join(sorted(KEYS - state.keys()))}")
    path = Path(out_dir) / name
    temporary = path.with_name(name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if name == NAME and path.exists():
            _keep_previous(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}; earlier checkpoints are untouched; free space or set another out_dir"
        ) from error
    return path


def find(out_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run's folder, or None."""
    for name in (NAME, PREVIOUS):
        if (Path(out_dir) / name).exists():
            return Path(out_dir) / name
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with the file, or None: a zip archive whose every record has the CRC-32 it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch neither compresses nor sets attributes; where a flipped bit says so, its reader returns garbage
            odd = [info.filename for info in archive.infolist() if info.compress_type or info.external_attr]
            bad = odd[0] if odd else archive.testzip()
    except Exception as error:  # zipfile meets a damaged table of contents with exceptions of many types
        return f"it is truncated or was not written by torch.save ({error})"
    return f"its record {bad} is corrupted" if bad else None


def _read(path: Path, map_location) -> dict:
    damage = _damage(path)
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
    return state


def load(path: str | Path, patterns_hash: str, map_location="cpu") -> dict:
    """Read and verify a checkpoint. patterns_hash: sparse24.PATTERNS_HASH, which the masks must have been saved with.

    Raises CheckpointError for a missing, truncated, corrupted or foreign file, and names the previous checkpoint of
    the same folder when that one is whole. Never changes a file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; name a run's out_dir that holds a {NAME}")
    try:
        state = _read(path, map_location)
    except CheckpointError as error:
        previous = path.with_name(PREVIOUS)
        if path.name == PREVIOUS or not previous.exists():
            raise
        try:
            iter_num = _read(previous, "cpu")["iter_num"]
        except CheckpointError:
            raise error from None
        raise CheckpointError(
            f"{error}; the one saved before it is whole (iteration {iter_num}): to go on from there, "
            f"mv '{previous}' '{path}'"
        ) from error
    if state["patterns_hash"] != patterns_hash:
        raise CheckpointError(
            f"{path}: its masks are indices into another pattern table ({state['patterns_hash']}, here "
            f"{patterns_hash}); use the version of nano24 that wrote it"
        )
    return state

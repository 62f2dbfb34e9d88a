"""Checkpoint files: written atomically, and verified before they are used.

    save   write ckpt.pt.tmp, fsync -> link ckpt.pt to ckpt_prev.pt -> rename ckpt.pt.tmp to ckpt.pt
           -> delete old numbered checkpoints
    load   check the CRC-32 of every record -> torch.load(weights_only=True), which runs no code -> check the keys

A kill at any moment leaves a complete checkpoint: ckpt.pt or, on file systems without hard links, ckpt_prev.pt. Runs on
any number of ranks write the same single file: a sharded run gathers its tensors first. Data order and MVUE draws are
functions of the iteration, so a run continues bit for bit from the `KEYS` alone. checkpoint_writer.py decides when a
run saves, and saves in a thread.
"""

import contextlib
import os
import re
import shlex
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch

from configurator import open_new, sync

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
    "sparse_start",  # first iteration of the sparse phase; None until STEP's rule decides it
    "autoswitch",  # STEP's log of the changes of Adam's second moments
    "elapsed_s",  # seconds of training
    "skipped",  # [number of steps skipped because of a gradient that is not finite, the last ones in a row]
    "patterns_hash",  # hash of sparse24.PATTERNS, into which mask indices point
}
# More keys, which checkpoints of earlier releases lack:
# data        the dataset's tokenizer, vocab_size, chars, train_tokens, train_checksum, val_tokens, val_checksum
# starts      a list with one dict for each start of the run: iter_num, and the entries of ranks.environment
# finished    True if the last evaluation is done; False if a signal stopped it
# wandb_id    id of the run in wandb, or None


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or was not written by nano24."""


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def check_keys(state: dict) -> None:
    if not state.keys() >= KEYS:
        raise ValueError(f"checkpoint.save: the state lacks {', '.join(sorted(KEYS - state.keys()))}")


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _link(path: Path, name: Path) -> bool:
    """Make `name` a hard link to `path`, atomically. Returns False if the file system has no hard links."""
    _temporary(name).unlink(missing_ok=True)
    try:
        os.link(path.resolve(), _temporary(name))  # os.link would copy a symbolic link
    except OSError:
        return False
    os.replace(_temporary(name), name)
    return True


def _copy(path: Path, name: Path) -> None:
    """Make `name` a copy of `path`, atomically."""
    with open(path, "rb") as source, open_new(_temporary(name)) as file:
        shutil.copyfileobj(source, file)
        file.flush()
        sync(file.fileno())
    os.replace(_temporary(name), name)


def _sync_folder(folder: Path) -> None:
    """Make new names in the folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        sync(number)
    finally:
        os.close(number)


def _numbers_to_keep(saved: set[int], iter_num: int, keep_last: int, keep_every: int) -> set[int]:
    """Those of the iterations `saved` that keep a numbered file after the save at `iter_num`."""
    latest = sorted(i for i in saved if i <= iter_num)[-keep_last:] if keep_last > 2 else []
    return {i for i in saved if i in latest or (keep_every > 0 and i % keep_every == 0)}


def _delete_numbered(folder: Path, iter_num: int, keep_last: int, keep_every: int) -> None:
    """Delete the numbered checkpoints that neither rule keeps."""
    paths = [path for path in folder.glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d{8,}", path.stem)]
    numbered = {int(path.stem.removeprefix("ckpt_")): path for path in paths}
    for number in numbered.keys() - _numbers_to_keep({*numbered}, iter_num, keep_last, keep_every):
        numbered[number].unlink(missing_ok=True)


def save(out_dir: str | Path, state: dict, name: str = NAME, keep_last: int = 2, keep_every: int = 0) -> Path:
    """Write `state` to out_dir/name atomically. An existing ckpt.pt becomes ckpt_prev.pt. Returns the path.

    keep_last: if above 2, keep this many most recent saves, as ckpt_ITERATION.pt. keep_every: if above 0, keep the
    saves at its multiples, as ckpt_ITERATION.pt. If either rule is on, all other numbered files are deleted.
    Raises ValueError if `state` lacks one of `KEYS`, and CheckpointError if the folder cannot be written or is full.
    Then the earlier checkpoints are untouched.
    """
    check_keys(state)
    path, iter_num = Path(out_dir) / name, state["iter_num"]
    numbered = path.with_name(f"ckpt_{iter_num:08d}.pt")
    numbering = name == NAME and (keep_last > 2 or keep_every > 0)
    keep_number = numbering and bool(_numbers_to_keep({iter_num}, iter_num, keep_last, keep_every))
    try:
        with open_new(_temporary(path)) as file:
            torch.save(state, file)
            file.flush()
            sync(file.fileno())
        if keep_number and not _link(_temporary(path), numbered):
            _copy(_temporary(path), numbered)
        if name == NAME and path.exists() and not _link(path, path.with_name(PREVIOUS)):
            os.replace(path, path.with_name(PREVIOUS))  # until the next line only ckpt_prev.pt exists; see `find`
        os.replace(_temporary(path), path)
        _sync_folder(path.parent)
        if numbering:
            _delete_numbered(path.parent, iter_num, keep_last, keep_every)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            _temporary(path).unlink(missing_ok=True)
            _temporary(numbered).unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}; earlier checkpoints are untouched; free space or set another out_dir"
        ) from error
    return path


def probe(out_dir: str | Path, size: float) -> None:
    """Create out_dir, and try there all that saves of `size` bytes need. Raises CheckpointError if they would fail."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="probe_", dir=folder) as trial:
            _copy(Path(__file__), Path(trial, NAME))
            _sync_folder(folder)
        disk, existing = shutil.disk_usage(folder), {path.stat().st_ino for path in folder.glob("ckpt*.pt")}
        count = max(1, 3 - len(existing))  # ckpt.pt, ckpt_prev.pt, and the file that is being written
        if disk.total and disk.free < count * size:  # some network file systems report nothing
            need = f"need {count * size / 1e9:.3g} GB for {count} more checkpoints; free space"
            raise OSError(f"it has {disk.free / 1e9:.3g} GB free, {need}")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # it stays if it holds files
        raise CheckpointError(f"out_dir={out_dir} cannot be used: {error}, or set another out_dir") from error


def clear(out_dir: str | Path) -> None:
    """Delete all checkpoints in a run's folder: also ckpt_best.pt and numbered ones."""
    for path in Path(out_dir).glob("ckpt*"):
        if re.fullmatch(r"ckpt(_prev|_best|_\d{8,})?\.pt(\.tmp)?", path.name):
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading


def find(out_dir: str | Path) -> Path | None:
    """The newest checkpoint in a run's folder: ckpt.pt, else ckpt_prev.pt, else None."""
    for name in (NAME, PREVIOUS):
        if (Path(out_dir) / name).exists():
            return Path(out_dir) / name
    return None


def _damage_of(path: Path) -> str | None:
    """Describe the damage to the file; None if it is a zip archive whose records all match their CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save neither compresses nor sets attributes; torch.load reads garbage if a flipped bit claims either
            altered = [info.filename for info in archive.infolist() if info.compress_type or info.external_attr]
            damaged = altered[0] if altered else archive.testzip()
    except Exception as error:  # zipfile raises many types of exceptions for a damaged table of contents
        return f"it is truncated or was not written by torch.save ({error})"
    return f"its record {damaged} is corrupted" if damaged else None


def _read(path: Path, mmap: bool = False) -> dict:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a run's out_dir that holds a {NAME}")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} cannot be read: permission denied; chmod u+r {shlex.quote(str(path))}")
    if damage := _damage_of(path):
        raise CheckpointError(f"{path} cannot be used: {damage}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # unpickling raises many types of exceptions for foreign content
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be used: torch.load refused it ({reason})") from error
    missing = KEYS - state.keys() if isinstance(state, dict) else KEYS
    if missing:
        raise CheckpointError(f"{path} is not a nano24 checkpoint: it lacks {', '.join(sorted(missing))}")
    if "shards" in state:
        raise CheckpointError(
            f"{path} was written in shards by an earlier release; convert it with `python checkpoint.py OLD NEW` of "
            "commit 8751ec3, the last one that can, then delete the folders ckpt_*.shards"
        )
    return state


def _offer_previous(path: Path, error: CheckpointError) -> CheckpointError:
    """`error`; for a damaged ckpt.pt with the command that restores ckpt_prev.pt, if that one can be used."""
    if path.name == NAME and os.access(path, os.R_OK):
        with contextlib.suppress(CheckpointError):
            previous = path.with_name(PREVIOUS)
            offer = f"the checkpoint of iteration {_read(previous)['iter_num']} is intact: to continue from it"
            return CheckpointError(f"{error}; {offer}, mv {shlex.quote(str(previous))} {shlex.quote(str(path))}")
    return error


def load(path: str | Path, patterns_hash: str, mmap: bool = False) -> dict:
    """Read and verify a checkpoint. Its tensors are on the CPU.

    patterns_hash: sparse24.PATTERNS_HASH, which must equal the checkpoint's. mmap: map the file instead of reading it,
    so that ranks share one copy in memory; the caller must copy the tensors before the file changes.
    Raises CheckpointError for a missing, truncated, corrupted or foreign file.
    """
    path = Path(path)
    try:
        state = _read(path, mmap)
    except CheckpointError as error:
        raise _offer_previous(path, error) from error.__cause__
    if state["patterns_hash"] != patterns_hash:
        raise CheckpointError(
            f"{path}: its masks index another pattern table ({state['patterns_hash']}, need {patterns_hash}); "
            "use the version of nano24 that wrote it"
        )
    return state

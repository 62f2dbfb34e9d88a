"""checkpoint.py: atomic whatever fails, refuses what is damaged or foreign, never runs code from a file."""

import errno
import os
import pickle
import random
import re
import struct
import zipfile

import pytest
import torch
from harness import contents, differences

from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.checkpoint import KEYS, CheckpointError, find, load, save
from sparse24 import PATTERNS_HASH


def make_state(iter_num=1, seed=0):
    """A state with every kind of content: float and uint8 tensors, extra state, optimizer moments, numbers, None."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse="fst"))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", masked_decay=1e-3)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "iter_num": iter_num}
    state |= {"best_val_loss": 1.5, "model_args": {"n_layer": 1, "sparse": "fst"}, "config": {"compile": None}}
    phases = {"dense_start": 27, "sparse_start": 0, "autoswitch": None}
    phases |= {"elapsed_s": 0.5, "skipped": 0}
    return state | phases | {"patterns_hash": PATTERNS_HASH}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def iteration(folder, name="ckpt.pt"):
    return load(folder / name, PATTERNS_HASH)["iter_num"]


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    state = make_state()
    assert save(tmp_path, state) == tmp_path / "ckpt.pt"
    loaded = load(tmp_path / "ckpt.pt", PATTERNS_HASH)
    assert differences(loaded, state) == []
    assert names(tmp_path) == ["ckpt.pt"]


def test_keys_are_the_documented_ones():
    assert set(KEYS) == {
        *("model", "optimizer", "scaler", "iter_num", "best_val_loss"),
        *("model_args", "config", "dense_start", "sparse_start", "autoswitch", "patterns_hash"),
        *("elapsed_s", "skipped"),
    }


def test_the_checkpoint_before_is_kept(tmp_path):
    for iter_num in (1, 2, 3):
        save(tmp_path, make_state(iter_num))
    assert names(tmp_path) == ["ckpt.pt", "ckpt_prev.pt"]
    assert (iteration(tmp_path), iteration(tmp_path, "ckpt_prev.pt")) == (3, 2)


def test_another_name_leaves_the_run_to_itself(tmp_path):
    save(tmp_path, make_state(1))
    before = contents(tmp_path)
    for iter_num in (2, 3):
        save(tmp_path, make_state(iter_num), "ckpt_best.pt")
    assert names(tmp_path) == ["ckpt.pt", "ckpt_best.pt"]
    assert contents(tmp_path).items() >= before.items()
    assert iteration(tmp_path, "ckpt_best.pt") == 3


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_state_without_a_key_is_refused(tmp_path, key):
    state = make_state()
    del state[key]
    with pytest.raises(ValueError, match=f"the state lacks {key}$"):
        save(tmp_path, state)
    assert names(tmp_path) == []


def test_bytes_are_on_disk_before_a_name_points_at_them(tmp_path, monkeypatch):
    save(tmp_path, make_state(1))
    done = []

    def record(name):
        real = getattr(os, name)

        def recorded(*args):
            done.append((name, *(os.path.basename(arg) for arg in args if not isinstance(arg, int))))
            return real(*args)

        monkeypatch.setattr(os, name, recorded)

    for name in ("fsync", "link", "replace"):
        record(name)
    save(tmp_path, make_state(2))
    assert done == [
        ("fsync",),
        ("link", "ckpt.pt", "ckpt_prev.pt.tmp"),
        ("replace", "ckpt_prev.pt.tmp", "ckpt_prev.pt"),
        ("replace", "ckpt.pt.tmp", "ckpt.pt"),
        ("fsync",),
    ]


FULL = "No space left on device"


def fail_half_way(error):
    def patched(state, file):
        file.write(b"half")
        raise error

    return patched


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, FULL), RuntimeError(f"PytorchStreamWriter failed: {FULL}")])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, error):
    for iter_num in (1, 2):
        save(tmp_path, make_state(iter_num))
    before = contents(tmp_path)
    monkeypatch.setattr(torch, "save", fail_half_way(error))
    with pytest.raises(CheckpointError, match=rf"cannot write .*ckpt\.pt: .*{FULL}.*are untouched; free space or"):
        save(tmp_path, make_state(3))
    assert contents(tmp_path) == before


def test_a_write_that_the_system_cuts_short_leaves_what_was_there(tmp_path):
    """No mock: the kernel refuses bytes beyond a limit, in the midst of torch.save."""
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX")
    save(tmp_path, make_state(1))
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*ckpt\.pt: .*earlier checkpoints are untouched"):
            save(tmp_path, make_state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_system_call_leaves_what_was_there(tmp_path, monkeypatch, name):
    save(tmp_path, make_state(1))
    before = contents(tmp_path)

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(tmp_path, make_state(2))
    left = contents(tmp_path)
    assert left.items() >= before.items()
    assert left.keys() - before.keys() <= {"ckpt_prev.pt.tmp"}
    save(tmp_path, make_state(3))  # what was left over is in nobody's way
    assert names(tmp_path) == ["ckpt.pt", "ckpt_prev.pt"]


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*gone.*ckpt\.pt"):
        save(tmp_path / "gone", make_state())


def refuse_links(monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_without_hard_links_the_checkpoint_before_is_kept_too(tmp_path, monkeypatch):
    refuse_links(monkeypatch)
    for iter_num in (1, 2, 3):
        save(tmp_path, make_state(iter_num))
        assert find(tmp_path) == tmp_path / "ckpt.pt"
    assert names(tmp_path) == ["ckpt.pt", "ckpt_prev.pt"]
    assert (iteration(tmp_path), iteration(tmp_path, "ckpt_prev.pt")) == (3, 2)


def test_without_hard_links_a_death_between_the_renames_leaves_the_previous_one(tmp_path, monkeypatch):
    refuse_links(monkeypatch)
    save(tmp_path, make_state(1))
    replace = os.replace

    def die_at_the_second(source, target):
        if os.path.basename(target) == "ckpt.pt":
            raise KeyboardInterrupt  # passes through save as a kill does, without any cleaning up
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, make_state(2))
    assert find(tmp_path) == tmp_path / "ckpt_prev.pt"
    assert iteration(tmp_path, "ckpt_prev.pt") == 1
    save(tmp_path, make_state(3))
    assert (iteration(tmp_path), iteration(tmp_path, "ckpt_prev.pt")) == (3, 1)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_prev.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading


def test_find_takes_the_newest(tmp_path):
    assert find(tmp_path) is None
    assert find(tmp_path / "nowhere") is None
    for name in ("ckpt.pt.tmp", "ckpt_prev.pt.tmp", "ckpt_best.pt"):
        (tmp_path / name).touch()
    assert find(tmp_path) is None
    (tmp_path / "ckpt_prev.pt").touch()
    assert find(str(tmp_path)) == tmp_path / "ckpt_prev.pt"
    (tmp_path / "ckpt.pt").touch()
    assert find(tmp_path) == tmp_path / "ckpt.pt"


def refusal(path):
    """The message with which loading is refused; nothing in the folder changes."""
    before = contents(path.parent)
    with pytest.raises(CheckpointError) as info:
        load(path, PATTERNS_HASH)
    assert contents(path.parent) == before
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value).strip()
    return str(info.value)


def test_a_missing_file_is_named(tmp_path):
    assert re.search(r"ckpt\.pt does not exist", refusal(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.95, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = save(tmp_path, make_state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert re.search("truncated or", refusal(path))


def test_a_hole_of_zeros_is_refused(tmp_path):
    """What a crash of the machine leaves where blocks were allocated but never written."""
    path = save(tmp_path, make_state())
    whole = path.read_bytes()
    for begin in range(0, len(whole) - 4096, 4096):
        if any(whole[begin : begin + 4096]):
            path.write_bytes(whole[:begin] + bytes(4096) + whole[begin + 4096 :])
            refusal(path)


def flip(whole: bytes, place: int, bit: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def check_refused_or_identical(path, state):
    try:
        loaded = load(path, PATTERNS_HASH)
    except CheckpointError:
        return
    assert differences(loaded, state) == []


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    """30 random places, half of them in the archive's own tables, which no CRC covers."""
    state = make_state()
    path = save(tmp_path, state)
    whole = path.read_bytes()
    tables = whole.index(b"PK\x01\x02")
    rng = random.Random(0)
    for k in range(30):
        place = rng.randrange(tables, len(whole)) if k % 2 else rng.randrange(tables)
        path.write_bytes(flip(whole, place, rng.randrange(8)))
        check_refused_or_identical(path, state)


# Fields of a central directory entry, at which some flips end in other exceptions than a BadZipFile, or in garbage
FIELDS = {
    "flags: encrypted": (8, 0),
    "flags: names in UTF-8": (9, 3),
    "compression: deflate": (10, 3),
    "a letter of the name": (46, 7),
    "attributes: a folder": (38, 4),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_in_any_entry_of_the_archive_is_refused_or_harmless(tmp_path, field):
    state = make_state()
    path = save(tmp_path, state)
    whole = path.read_bytes()
    offset, bit = FIELDS[field]
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", whole)]
    assert len(entries) == len(zipfile.ZipFile(path).infolist())
    for entry in entries:
        path.write_bytes(flip(whole, entry + offset, bit))
        check_refused_or_identical(path, state)


def test_every_bit_of_a_tensor_is_covered(tmp_path):
    path = save(tmp_path, make_state())
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    name, extra = struct.unpack("<HH", whole[info.header_offset + 26 : info.header_offset + 30])
    begin = info.header_offset + 30 + name + extra
    rng = random.Random(1)
    for _ in range(40):
        path.write_bytes(flip(whole, begin + rng.randrange(info.file_size), rng.randrange(8)))
        assert re.search("is corrupted", refusal(path))


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    path = tmp_path / "ckpt.pt"
    torch.save({**make_state(), "config": Evil(trap)}, path)
    assert re.search("torch.load refused it", refusal(path))
    path.write_bytes(pickle.dumps(Evil(trap)))
    assert re.search("was not written by torch.save", refusal(path))
    assert not trap.exists()


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_text("not a checkpoint\n")
    assert re.search("was not written by torch.save", refusal(path))
    torch.save(make_state(), path, _use_new_zipfile_serialization=False)
    assert re.search("was not written by torch.save", refusal(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert re.search("torch.load refused it|hello.txt is corrupted", refusal(path))
    torch.save([1, 2], path)
    assert re.search("is not a checkpoint of nano24", refusal(path))
    torch.save({"model": {}, "optimizer": {}, "iter_num": 1}, path)  # much like nanoGPT's
    assert re.search("is not a checkpoint of nano24: it lacks autoswitch, best_val_loss, config", refusal(path))


def test_another_pattern_table_is_refused(tmp_path):
    path = save(tmp_path, {**make_state(), "patterns_hash": "0123456789abcdef"})
    message = refusal(path)
    assert re.search("another pattern table .*0123456789abcdef.*use the version of nano24 that wrote it", message)
    assert PATTERNS_HASH in message


def test_the_previous_one_is_offered_and_can_be_used(tmp_path):
    for iter_num in (1, 2):
        save(tmp_path, make_state(iter_num))
    path = tmp_path / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-100])
    said = re.search(r"the one saved before it is whole \(iteration 1\).* mv '(.*)' '(.*)'$", refusal(path))
    os.replace(said[1], said[2])
    assert iteration(tmp_path) == 1
    save(tmp_path, make_state(2))
    assert (iteration(tmp_path), iteration(tmp_path, "ckpt_prev.pt")) == (2, 1)


def test_a_previous_one_that_is_damaged_too_is_not_offered(tmp_path):
    for iter_num in (1, 2):
        save(tmp_path, make_state(iter_num))
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / name).write_bytes(b"gone")
    assert "mv" not in refusal(tmp_path / "ckpt.pt")
    assert "mv" not in refusal(tmp_path / "ckpt_prev.pt")


def test_damage_to_the_newest_leaves_the_previous_one_alone(tmp_path):
    """They are two files once the newest is replaced, not two names of one."""
    for iter_num in (1, 2):
        save(tmp_path, make_state(iter_num))
    assert not os.path.samefile(tmp_path / "ckpt.pt", tmp_path / checkpoint.PREVIOUS)

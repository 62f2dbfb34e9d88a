"""runtime/checkpoint.py: atomic writes, which files are kept, and refusal of damaged and foreign files."""

import errno
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import zipfile

import pytest
import torch
from harness import contents, differences

from model import GPT, GPTConfig
from runtime.checkpoint import KEYS, CheckpointError, clear, find, load, probe, save
from sparse24 import PATTERNS_HASH

FULL = OSError(errno.ENOSPC, "No space left on device")


def make_state(iter_num=1):
    """A state with every kind of content: float and uint8 tensors, extra state, optimizer moments, numbers, None."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, sparse="fst"))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", masked_decay=1e-3)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "iter_num": iter_num}
    state |= {"best_val_loss": 1.5, "model_args": {"n_layer": 1, "sparse": "fst"}, "config": {"compile": None}}
    state |= {"dense_start": 27, "sparse_start": 0, "autoswitch": None, "elapsed_s": 0.5, "skipped": 0}
    return state | {"patterns_hash": PATTERNS_HASH}


def small_state(iter_num):
    return {**dict.fromkeys(KEYS), "iter_num": iter_num, "patterns_hash": PATTERNS_HASH}


def names(folder):
    return sorted(os.listdir(folder))


def iteration(folder, name="ckpt.pt"):
    return load(folder / name, PATTERNS_HASH)["iter_num"]


@pytest.fixture
def no_links(monkeypatch):
    """A file system without hard links."""

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path, mmap):
    state = make_state()
    assert save(tmp_path, state) == tmp_path / "ckpt.pt"
    assert differences(load(tmp_path / "ckpt.pt", PATTERNS_HASH, mmap), state) == []
    assert names(tmp_path) == ["ckpt.pt"]


def test_a_state_without_one_of_the_documented_keys_is_refused(tmp_path):
    state = make_state()
    assert state.keys() == KEYS
    for key in KEYS:
        with pytest.raises(ValueError, match=f"the state lacks {key}$"):
            save(tmp_path, {k: v for k, v in state.items() if k != key})
    assert names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoint_before_is_kept_and_is_another_file(tmp_path, request, links):
    if not links:
        request.getfixturevalue("no_links")
    for iter_num in (1, 2, 3):
        save(tmp_path, small_state(iter_num))
        assert find(tmp_path) == tmp_path / "ckpt.pt"
    assert names(tmp_path) == ["ckpt.pt", "ckpt_prev.pt"]
    assert (iteration(tmp_path), iteration(tmp_path, "ckpt_prev.pt")) == (3, 2)
    assert not os.path.samefile(tmp_path / "ckpt.pt", tmp_path / "ckpt_prev.pt")


def test_bytes_are_on_disk_before_a_name_points_at_them(tmp_path, monkeypatch):
    save(tmp_path, small_state(1))
    done = []

    def record(name):
        real = getattr(os, name)

        def recorded(*args):
            done.append((name, *(os.path.basename(arg) for arg in args if not isinstance(arg, int))))
            return real(*args)

        monkeypatch.setattr(os, name, recorded)

    for name in ("fsync", "link", "replace"):
        record(name)
    save(tmp_path, small_state(2))
    assert done == [
        ("fsync",),
        ("link", "ckpt.pt", "ckpt_prev.pt.tmp"),
        ("replace", "ckpt_prev.pt.tmp", "ckpt_prev.pt"),
        ("replace", "ckpt.pt.tmp", "ckpt.pt"),
        ("fsync",),
    ]


def test_a_folder_that_cannot_be_synced_costs_a_warning(tmp_path, monkeypatch):
    real = os.fsync

    def only_files(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "Invalid argument")  # vboxsf, CIFS, gocryptfs
        real(number)

    monkeypatch.setattr(os, "fsync", only_files)
    with pytest.warns(match="fsync is not supported here"):
        save(tmp_path, small_state(1))
    assert iteration(tmp_path) == 1


def test_a_save_does_not_follow_a_symbolic_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "ckpt.pt.tmp").symlink_to(victim)
    save(tmp_path, small_state(1))
    assert (victim.read_text(), names(tmp_path)) == ("precious", ["ckpt.pt", "victim"])


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (torch, "save", FULL),
        (torch, "save", RuntimeError("PytorchStreamWriter failed: No space left on device")),
        (os, "fsync", FULL),
        (os, "replace", FULL),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, module, name, error):
    for iter_num in (1, 2):
        save(tmp_path, small_state(iter_num))
    before = contents(tmp_path)

    def fail(*args):
        if name == "save":
            args[1].write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(CheckpointError, match=r"cannot write .*ckpt\.pt: .*No space.*are untouched; free space or"):
            save(tmp_path, small_state(3))
    left = contents(tmp_path)
    assert left.items() >= before.items()
    assert left.keys() - before.keys() <= ({"ckpt_prev.pt.tmp"} if name == "replace" else set())
    save(tmp_path, small_state(4))
    assert names(tmp_path) == ["ckpt.pt", "ckpt_prev.pt"]


def test_a_write_that_the_system_cuts_short_leaves_what_was_there(tmp_path):
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


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints are kept


@pytest.mark.parametrize(
    ("iterations", "keep_last", "keep_every", "left"),
    [
        ([10, 20, 30], 2, 0, []),
        ([10, 20, 30], 1, 0, []),
        ([10, 20, 30], 3, 0, [10, 20, 30]),
        ([10, 20, 30, 40], 3, 0, [20, 30, 40]),
        ([10, 20, 30, 40], 2, 20, [20, 40]),
        ([0, 15, 30], 0, 30, [0, 30]),
        ([10, 15, 20, 25, 30, 35], 3, 20, [20, 25, 30, 35]),
        ([10, 20, 30, 20], 3, 0, [10, 20]),  # the run went back to 10
        ([10, 20, 30, 15], 3, 30, [10, 15, 30]),
        ([123456789], 3, 0, [123456789]),
    ],
)
def test_the_rules_keep_what_they_say(tmp_path, iterations, keep_last, keep_every, left):
    for iter_num in iterations:
        save(tmp_path, small_state(iter_num), keep_last=keep_last, keep_every=keep_every)
    numbered = {f"ckpt_{i:08d}.pt": i for i in left}
    assert names(tmp_path) == sorted([*["ckpt.pt", "ckpt_prev.pt"][: len(iterations)], *numbered])
    assert {name: iteration(tmp_path, name) for name in numbered} == numbered
    assert iteration(tmp_path) == iterations[-1]
    if iterations[-1] in left:  # the newest one is a hard link
        assert os.path.samefile(tmp_path / "ckpt.pt", tmp_path / f"ckpt_{iterations[-1]:08d}.pt")


def test_without_hard_links_a_numbered_checkpoint_is_copied(tmp_path, monkeypatch, no_links):
    for iter_num in (20, 30):
        save(tmp_path, small_state(iter_num), keep_every=20)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_00000020.pt", "ckpt_prev.pt"]
    assert (tmp_path / "ckpt_00000020.pt").read_bytes() == (tmp_path / "ckpt_prev.pt").read_bytes()
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (FULL, CheckpointError)):  # a kill; a full disk

        def fail(source, target, error=error):
            target.write(source.read()[:100])
            raise error

        monkeypatch.setattr(shutil, "copyfileobj", fail)
        with pytest.raises(expected):
            save(tmp_path, small_state(40), keep_every=20)
        assert not (tmp_path / "ckpt_00000040.pt").exists()
        assert iteration(tmp_path) == 30
    assert not list(tmp_path.glob("*.tmp"))


def test_numbered_files_are_left_alone_without_a_rule_and_others_always(tmp_path):
    foreign = {"ckpt_best.pt", "ckpt_mine.pt", "ckpt_1.pt", "ckpt_00000010.pt.old", "notes.txt"}
    for name in (*foreign, "ckpt_00000010.pt", "ckpt_00000010.pt.tmp"):
        (tmp_path / name).touch()
    save(tmp_path, small_state(30))
    save(tmp_path, small_state(40), "ckpt_best.pt", keep_every=20)
    assert set(names(tmp_path)) == foreign | {"ckpt.pt", "ckpt_00000010.pt", "ckpt_00000010.pt.tmp"}
    assert (iteration(tmp_path), iteration(tmp_path, "ckpt_best.pt")) == (30, 40)
    save(tmp_path, small_state(40), keep_every=20)
    assert set(names(tmp_path)) == foreign | {"ckpt.pt", "ckpt_prev.pt", "ckpt_00000040.pt", "ckpt_00000010.pt.tmp"}


def test_clear_deletes_the_checkpoints_and_nothing_else(tmp_path):
    ours = ["ckpt.pt", "ckpt.pt.tmp", "ckpt_prev.pt", "ckpt_prev.pt.tmp", "ckpt_best.pt", "ckpt_00000010.pt"]
    for name in (*ours, "ckpt_mine.pt", "metrics.jsonl"):
        (tmp_path / name).touch()
    clear(tmp_path)
    assert names(tmp_path) == ["ckpt_mine.pt", "metrics.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading


def test_find_takes_the_newest(tmp_path):
    assert find(tmp_path / "nowhere") is None
    for name in ("ckpt.pt.tmp", "ckpt_prev.pt.tmp", "ckpt_best.pt"):
        (tmp_path / name).touch()
    assert find(tmp_path) is None
    for name in ("ckpt_prev.pt", "ckpt.pt"):
        (tmp_path / name).touch()
        assert find(str(tmp_path)) == tmp_path / name


def refusal(path):
    """The message of a refused load, which must not change the folder."""
    before = contents(path.parent)
    with pytest.raises(CheckpointError) as info:
        load(path, PATTERNS_HASH)
    assert contents(path.parent) == before
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value).strip()
    return str(info.value)


@pytest.fixture
def saved(tmp_path):
    """(path, bytes, state) of a checkpoint, to be damaged."""
    state = make_state()
    path = save(tmp_path, state)
    return path, path.read_bytes(), state


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.95, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    path, data, _ = saved
    path.write_bytes(data[: int(share * len(data))])
    assert "truncated or" in refusal(path)


def test_a_hole_of_zeros_is_refused(saved):
    """As after a crash of the machine, when blocks were allocated but never written."""
    path, data, _ = saved
    for begin in range(0, len(data) - 4096, 4096):
        if any(data[begin : begin + 4096]):
            path.write_bytes(data[:begin] + bytes(4096) + data[begin + 4096 :])
            refusal(path)


def flip(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def check_refused_or_identical(path, state):
    try:
        loaded = load(path, PATTERNS_HASH)
    except CheckpointError:
        return
    assert differences(loaded, state) == []


def test_flipped_bits_are_refused_or_harmless(saved):
    """Random places in the records, in the archive's tables, which no CRC covers, and in the largest tensor."""
    path, data, state = saved
    tables, rng = data.index(b"PK\x01\x02"), random.Random(0)
    tensor = max((t for t in state["model"].values() if torch.is_tensor(t)), key=torch.Tensor.nbytes.__get__)
    begin = data.index(tensor.numpy().tobytes())
    for _ in range(20):
        for first, end in ((0, tables), (tables, len(data))):
            path.write_bytes(flip(data, rng.randrange(first, end), rng.randrange(8)))
            check_refused_or_identical(path, state)
        path.write_bytes(flip(data, begin + rng.randrange(tensor.nbytes), rng.randrange(8)))
        assert "is corrupted" in refusal(path)


@pytest.mark.parametrize(
    ("offset", "bit"),  # in an entry of the central directory; zipfile raises many types of exceptions for these
    [
        pytest.param(8, 0, id="flags: encrypted"),
        pytest.param(9, 3, id="flags: names in UTF-8"),
        pytest.param(10, 3, id="compression: deflate"),
        pytest.param(46, 7, id="a letter of the name"),
        pytest.param(38, 4, id="attributes: a folder"),
    ],
)
def test_a_flipped_bit_in_any_entry_of_the_archive_is_refused_or_harmless(saved, offset, bit):
    path, data, state = saved
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", data)]
    assert len(entries) == len(zipfile.ZipFile(path).infolist())
    for entry in entries:
        path.write_bytes(flip(data, entry + offset, bit))
        check_refused_or_identical(path, state)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "ckpt.pt"
    torch.save({**small_state(1), "config": Evil(trap)}, path)
    assert "torch.load refused it" in refusal(path)
    path.write_bytes(pickle.dumps(Evil(trap)))
    assert "was not written by torch.save" in refusal(path)
    assert not trap.exists()


def test_missing_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    assert "ckpt.pt does not exist" in refusal(path)
    path.write_text("not a checkpoint\n")
    assert "was not written by torch.save" in refusal(path)
    torch.save(small_state(1), path, _use_new_zipfile_serialization=False)
    assert "was not written by torch.save" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert re.search("torch.load refused it|hello.txt is corrupted", refusal(path))
    torch.save([1, 2], path)
    assert "is not a nano24 checkpoint" in refusal(path)
    torch.save({"model": {}, "optimizer": {}, "iter_num": 1}, path)  # as nanoGPT's
    assert "is not a nano24 checkpoint: it lacks autoswitch, best_val_loss, config" in refusal(path)


def test_a_checkpoint_in_shards_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.save({**small_state(1), "shards": {"folder": "ckpt_00000001.shards", "files": []}}, tmp_path / "ckpt.pt")
    message = "in shards by an earlier release; convert it with `python checkpoint.py OLD NEW` of commit 8751ec3"
    assert message in refusal(tmp_path / "ckpt.pt")


def test_another_pattern_table_is_refused(tmp_path):
    message = refusal(save(tmp_path, {**small_state(1), "patterns_hash": "0123"}))
    assert re.search(rf"another pattern table \(0123, need {PATTERNS_HASH}\); use the version of nano24 that", message)


def paste(message):
    """Run the command that a message ends with, as a user would."""
    return subprocess.run(message.partition("to continue from it, ")[2], shell=True).returncode


DAMAGES = {
    "empty": lambda path, data: path.write_bytes(b""),
    "truncated": lambda path, data: path.write_bytes(data[:-100]),
    "a flipped bit": lambda path, data: path.write_bytes(flip(data, data.index(b"iter_num") + 1, 0)),
    "another zip": lambda path, data: zipfile.ZipFile(path, "w").close(),
    "another program's": lambda path, data: torch.save({"model": {}}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["run", "it's a $(run)"])
def test_the_checkpoint_before_a_damaged_one_is_offered_by_a_command_that_works(tmp_path, damage, place):
    folder = tmp_path / place
    folder.mkdir()
    for iter_num in (1, 2):
        save(folder, small_state(iter_num))
    path = folder / "ckpt.pt"
    DAMAGES[damage](path, path.read_bytes())
    message = refusal(path)
    assert "; the checkpoint of iteration 1 is intact: to continue from it, mv " in message
    assert paste(message) == 0
    assert (find(folder), iteration(folder)) == (path, 1)
    save(folder, small_state(2))
    assert (iteration(folder), iteration(folder, "ckpt_prev.pt")) == (2, 1)


def test_no_command_is_offered_that_would_lose_a_good_checkpoint(tmp_path, monkeypatch):
    for iter_num in (1, 2):
        save(tmp_path, small_state(iter_num))
    for name in ("ckpt_best.pt", "ckpt_prev.pt"):
        (tmp_path / name).write_bytes(b"gone")
        assert "is intact" not in refusal(tmp_path / name)
    (tmp_path / "ckpt.pt").write_bytes(b"gone")  # ckpt_prev.pt is damaged too
    assert "is intact" not in refusal(tmp_path / "ckpt.pt")
    save(tmp_path, small_state(3))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert re.search(r"ckpt.pt cannot be read: permission denied; chmod u\+r \S+$", refusal(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("target", ["ckpt_prev.pt", "ckpt_00000001.pt"])
def test_a_link_to_another_checkpoint_may_stand_for_ckpt_pt(tmp_path, target):
    """As after `ln -s ckpt_prev.pt ckpt.pt`, which goes back to the checkpoint before."""
    for iter_num in (1, 2):
        save(tmp_path, small_state(iter_num), keep_last=3)
    (tmp_path / "ckpt.pt").unlink()
    (tmp_path / "ckpt.pt").symlink_to(target)
    assert iteration(tmp_path) == 1
    save(tmp_path, small_state(2))
    assert (iteration(tmp_path), iteration(tmp_path, "ckpt_prev.pt")) == (2, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The folder before a run


@pytest.mark.parametrize("existing", [0, 2])
def test_the_probe_asks_for_the_space_of_all_checkpoints_that_will_be_there(tmp_path, monkeypatch, existing):
    out = tmp_path / "new" / "out" if not existing else tmp_path
    for iter_num in range(existing):
        save(tmp_path, small_state(iter_num))
    before, disk = contents(tmp_path), shutil.disk_usage(tmp_path)
    count = 3 - existing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=count * 10**9 - 1))
    message = f"it has {count} GB free, need {count} GB for {count} more checkpoints; free space, or set another"
    with pytest.raises(CheckpointError, match=f"out_dir={re.escape(str(out))} cannot be used: {message} out_dir"):
        probe(out, 10**9)
    assert contents(tmp_path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(total=0, free=0))  # unknown
    probe(out, 10**9)
    assert contents(tmp_path) == before
    assert out.is_dir()


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (os, "mkdir", OSError(errno.EROFS, "Read-only file system")),
        (os, "fsync", OSError(errno.EDQUOT, "Disk quota exceeded")),
        (os, "replace", OSError(errno.EIO, "Input/output error")),
        (shutil, "copyfileobj", FULL),
    ],
)
def test_the_probe_finds_all_that_would_fail_in_a_save_and_leaves_nothing(tmp_path, monkeypatch, module, name, error):
    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(
            CheckpointError, match=rf"out_dir=.*out cannot be used: .*{error.strerror}.*, or set another"
        ):
            probe(tmp_path / "a" / "out", 1)
    assert [*tmp_path.rglob("*")] == ([] if name == "mkdir" else [tmp_path / "a"])


def test_the_probe_refuses_what_cannot_be_a_folder_and_tolerates_missing_features(tmp_path, monkeypatch, no_links):
    (tmp_path / "file").touch()
    (tmp_path / "loose").symlink_to(tmp_path / "nowhere")
    for out in ("file", "file/out", "x" * 300, "loose"):
        with pytest.raises((CheckpointError, OSError)) as info:
            probe(tmp_path / out, 1)
        assert "\n" not in str(info.value)
        assert names(tmp_path) == ["file", "loose"]

    def refuse(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.warns(match="fsync is not supported here"):
        probe(tmp_path / "out", 1)
    assert names(tmp_path / "out") == []

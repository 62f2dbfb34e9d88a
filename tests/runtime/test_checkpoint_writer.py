"""checkpoint.py's rules of what is kept, and checkpoint_writer.py: saves in a thread lose neither data nor errors."""

import errno
import os
import shutil
import threading

import pytest
import torch
from harness import contents, differences, photographs

from runtime import checkpoint
from runtime.checkpoint import KEYS, CheckpointError, clear, find, load, save
from runtime.checkpoint_writer import Writer

HASH = "hash"
FULL = OSError(errno.ENOSPC, "No space left on device")


def make_state(iter_num, **model):
    """The smallest state that can be saved, with one weight that says which one it is."""
    model = {"weight": torch.full((3, 2), float(iter_num)), **model}
    return {**dict.fromkeys(KEYS), "iter_num": iter_num, "model": model, "optimizer": {}, "patterns_hash": HASH}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def iteration(path):
    """The iteration of a checkpoint, which its weights confirm."""
    state = load(path, HASH)
    assert differences(state["model"]["weight"], torch.full((3, 2), float(state["iter_num"]))) == []
    return state["iter_num"]


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


# iterations of the saves, keep_last, keep_every -> numbered ones that are left
RULES = [
    ([10, 20, 30], 2, 0, []),
    ([10, 20, 30], 1, 0, []),
    ([10, 20, 30], 3, 0, [10, 20, 30]),
    ([10, 20, 30, 40], 3, 0, [20, 30, 40]),
    ([10, 20, 30, 40], 2, 20, [20, 40]),
    ([0, 15, 30], 0, 30, [0, 30]),
    ([10, 15, 20, 25, 30, 35], 3, 20, [20, 25, 30, 35]),
    ([10, 20, 30, 20], 3, 0, [10, 20]),  # the run went back to 10: its 30 is none of the last saves
    ([10, 20, 30, 15], 3, 30, [10, 15, 30]),
    ([123456789], 3, 0, [123456789]),
]


@pytest.mark.parametrize(("iterations", "keep_last", "keep_every", "left"), RULES)
def test_the_rules_keep_what_they_say(tmp_path, iterations, keep_last, keep_every, left):
    for iter_num in iterations:
        save(tmp_path, make_state(iter_num), keep_last=keep_last, keep_every=keep_every)
    numbered = {f"ckpt_{i:08d}.pt": i for i in left}
    pair = ["ckpt.pt", "ckpt_prev.pt"][: len(iterations)]
    assert names(tmp_path) == sorted([*pair, *numbered])
    assert {name: iteration(tmp_path / name) for name in numbered} == numbered
    assert find(tmp_path) == tmp_path / "ckpt.pt"
    assert iteration(tmp_path / "ckpt.pt") == iterations[-1]


def test_a_kept_checkpoint_takes_no_space_of_its_own_while_it_is_the_newest(tmp_path):
    save(tmp_path, make_state(20), keep_every=20)
    assert os.path.samefile(tmp_path / "ckpt.pt", tmp_path / "ckpt_00000020.pt")


def test_without_hard_links_it_is_copied(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for iter_num in (20, 30):
        save(tmp_path, make_state(iter_num), keep_every=20)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_00000020.pt", "ckpt_prev.pt"]
    assert (tmp_path / "ckpt_00000020.pt").read_bytes() == (tmp_path / "ckpt_prev.pt").read_bytes()

    def die_half_way(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise KeyboardInterrupt  # passes through save as a kill does, without any cleaning up

    monkeypatch.setattr(shutil, "copyfile", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, make_state(40), keep_every=20)
    assert not (tmp_path / "ckpt_00000040.pt").exists()
    assert iteration(tmp_path / "ckpt.pt") == 30

    def fill_the_disk(source, target):
        target.write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(shutil, "copyfile", fill_the_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, make_state(60), keep_every=20)
    assert not [name for name in names(tmp_path) if "60" in name]
    assert iteration(tmp_path / "ckpt.pt") == 30


def test_numbered_files_are_let_alone_without_a_rule_and_others_always(tmp_path):
    foreign = {"ckpt_best.pt", "ckpt_mine.pt", "ckpt_1.pt", "ckpt_00000010.pt.old", "notes.txt"}
    for name in (*foreign, "ckpt_00000010.pt", "ckpt_00000010.pt.tmp"):
        (tmp_path / name).touch()
    save(tmp_path, make_state(30))
    save(tmp_path, make_state(40), "ckpt_best.pt", keep_every=20)
    assert set(names(tmp_path)) == foreign | {"ckpt.pt", "ckpt_00000010.pt", "ckpt_00000010.pt.tmp"}
    save(tmp_path, make_state(40), keep_every=20)
    assert set(names(tmp_path)) == foreign | {"ckpt.pt", "ckpt_prev.pt", "ckpt_00000040.pt"}


def test_clear_deletes_the_checkpoints_and_nothing_else(tmp_path):
    ours = ["ckpt.pt", "ckpt.pt.tmp", "ckpt_prev.pt", "ckpt_prev.pt.tmp", "ckpt_best.pt", "ckpt_00000010.pt"]
    for name in (*ours, "ckpt_mine.pt", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "ckpt_00000010.shards").mkdir()
    (tmp_path / "ckpt_00000010.shards" / "0.pt").touch()
    clear(tmp_path)
    assert names(tmp_path) == ["ckpt_mine.pt", "metrics.jsonl"]


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path, monkeypatch, links):
    run, album = tmp_path / "run", tmp_path / "album"
    run.mkdir()
    for iter_num in (1, 2, 3):
        save(run, make_state(iter_num), keep_last=3)

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        if not links:
            patch.setattr(os, "link", refuse)
        with photographs(run, album):
            writer = Writer(run, keep_last=3)
            writer.save(make_state(4))
            writer.wait()
    found = [iteration(find(photo)) for photo in sorted(album.iterdir())]
    assert len(found) >= 10
    assert found == sorted(found)
    assert {found[0], found[-1]} == {3, 4}
    for photo in album.iterdir():
        kept = [iteration(path) for path in sorted(photo.glob("ckpt_0*.pt"))]
        assert kept in ([1, 2, 3], [1, 2, 3, 4], [2, 3, 4])


# ---------------------------------------------------------------------------------------------------------------------
# Writing in a thread


@pytest.fixture
def gate(monkeypatch):
    """An event without which no torch.save begins; `gate.log` has what began and ended."""
    gate, real = threading.Event(), torch.save
    gate.log = []

    def patched(state, file):
        assert gate.wait(60)
        gate.log.append(("begin", state["iter_num"]))
        real(state, file)
        gate.log.append(("end", state["iter_num"]))

    monkeypatch.setattr(torch, "save", patched)
    yield gate
    gate.set()


def full_state(iter_num=5):
    """A model with a tied weight, a buffer and views, after an optimizer step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6))
    model[1].weight = model[0].weight
    model.register_buffer("index", torch.arange(6, dtype=torch.uint8))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("part", torch.ones(5, dtype=torch.bfloat16)[1:4])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    state = make_state(iter_num) | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return model, optimizer, state | {"autoswitch": [1.0, [2.0]], "config": {"betas": (0.9, 0.95)}}


def test_the_file_is_the_one_that_a_plain_save_writes(tmp_path):
    *_, state = full_state()
    for name in ("plain", "writer"):
        (tmp_path / name).mkdir()
    save(tmp_path / "plain", state)
    writer = Writer(tmp_path / "writer")
    writer.save(state)
    writer.wait()
    assert contents(tmp_path / "writer") == contents(tmp_path / "plain")
    loaded = load(tmp_path / "writer" / "ckpt.pt", HASH)
    assert differences(loaded, state) == []
    assert loaded["model"]["0.weight"].data_ptr() == loaded["model"]["1.weight"].data_ptr()
    assert loaded["model"]._metadata == state["model"]._metadata


def test_what_training_changes_after_a_save_does_not_reach_the_file(tmp_path, gate):
    model, optimizer, state = full_state()
    writer = Writer(tmp_path)
    writer.save(state)
    for tensor in (*model.state_dict().values(), optimizer.state_dict()["state"][0]["exp_avg"]):
        tensor.add_(1)
    state["autoswitch"][1].append(3.0)
    state["config"]["betas"] = None
    assert writer.busy
    assert not (tmp_path / "ckpt.pt").exists()
    gate.set()
    writer.wait()
    assert differences(load(tmp_path / "ckpt.pt", HASH), full_state()[-1]) == []
    assert differences(full_state()[-1]["model"], model.state_dict()) != []


def test_a_save_waits_for_the_one_before_and_uses_its_memory(tmp_path, gate, monkeypatch):
    writer, memory, real = Writer(tmp_path), [], threading.Thread.join

    def join(thread, timeout=None):  # who waits for the thread opens the gate, for that thread
        gate.set()
        real(thread, timeout)
        gate.clear()

    monkeypatch.setattr(threading.Thread, "join", join)
    for iter_num in (1, 2, 3):
        writer.save(make_state(iter_num))
        assert gate.log == [(what, i) for i in range(1, iter_num) for what in ("begin", "end")]
        assert writer.busy
        memory.append([buffer.data_ptr() for buffer in writer._to_host.buffers])
    writer.wait()
    assert not writer.busy
    assert memory[0] == memory[1] == memory[2]
    assert (iteration(tmp_path / "ckpt.pt"), iteration(tmp_path / "ckpt_prev.pt")) == (3, 2)


def test_memory_follows_the_state(tmp_path):
    writer = Writer(tmp_path)
    for size in (4, 8, 2):
        writer.save(make_state(size, a=torch.arange(size), b=torch.arange(size) + 0.5))
        writer.wait()
        model = load(tmp_path / "ckpt.pt", HASH)["model"]
        assert differences(model, make_state(size, a=torch.arange(size), b=torch.arange(size) + 0.5)["model"]) == []
    writer.save(make_state(1))
    assert len(writer._to_host.buffers) == 1
    writer.wait()


def test_a_process_that_ends_finishes_its_thread(tmp_path, gate):
    writer = Writer(tmp_path)
    assert not writer.busy
    writer.save(make_state(1))
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint.Writer"] == [False]
    gate.set()
    writer._thread.join()  # as the interpreter does; nobody called wait
    assert iteration(tmp_path / "ckpt.pt") == 1
    assert not writer.busy


def test_in_the_foreground_it_is_written_at_once_and_without_a_copy(tmp_path):
    writer = Writer(tmp_path, background=False, keep_every=2)
    for iter_num in (1, 2, 3):
        writer.save(make_state(iter_num), *(["ckpt_best.pt"] if iter_num == 3 else []))
        assert not writer.busy
    assert names(tmp_path) == ["ckpt.pt", "ckpt_00000002.pt", "ckpt_best.pt", "ckpt_prev.pt"]
    assert writer._to_host.buffers == []
    assert all(thread.name != "checkpoint.Writer" for thread in threading.enumerate())


def fail_once(monkeypatch, error):
    real = torch.save

    def patched(state, file):
        monkeypatch.setattr(torch, "save", real)
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", patched)


@pytest.mark.parametrize("sees", ["wait", "poll", "save"])
def test_an_error_in_the_thread_is_raised_once(tmp_path, monkeypatch, sees):
    writer = Writer(tmp_path)
    writer.save(make_state(1))
    writer.wait()
    before = contents(tmp_path)
    fail_once(monkeypatch, FULL)
    writer.save(make_state(2))
    writer._thread.join()
    with pytest.raises(CheckpointError, match=r"cannot write .*ckpt\.pt: .*No space left.*are untouched"):
        getattr(writer, sees)(*([make_state(3)] if sees == "save" else []))
    assert contents(tmp_path) == before
    for _ in range(2):
        writer.poll()
        writer.wait()
    writer.save(make_state(4))
    writer.wait()
    assert (iteration(tmp_path / "ckpt.pt"), iteration(tmp_path / "ckpt_prev.pt")) == (4, 1)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("error", [ZeroDivisionError("what no one thought of"), KeyboardInterrupt()])
def test_an_error_that_no_one_thought_of_is_not_lost_either(tmp_path, monkeypatch, error, background):
    writer = Writer(tmp_path, background)
    fail_once(monkeypatch, error)
    with pytest.raises(type(error)):  # noqa: PT012
        writer.save(make_state(1))
        writer.wait()
    writer.wait()
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_state_without_a_key_is_refused_before_anything_is_begun(tmp_path):
    state = make_state(1)
    del state["scaler"]
    writer = Writer(tmp_path)
    with pytest.raises(ValueError, match=r"the state lacks scaler$"):
        writer.save(state)
    assert not writer.busy
    assert names(tmp_path) == []


def test_a_poll_while_the_thread_writes_does_not_wait(tmp_path, gate):
    writer = Writer(tmp_path)
    writer.save(make_state(1))
    writer.poll()
    assert writer.busy  # the gate is closed, so a poll that waited would not have come back
    gate.set()
    writer._thread.join()
    writer.poll()
    assert not writer.busy
    assert checkpoint.find(tmp_path) == tmp_path / "ckpt.pt"

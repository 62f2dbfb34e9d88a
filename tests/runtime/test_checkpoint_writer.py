"""runtime/checkpoint_writer.py: saves in a thread lose neither data nor errors. test_fsdp.py tests shards."""

import errno
import os
import threading

import pytest
import torch
from harness import contents, differences, photographs

from runtime.checkpoint import KEYS, CheckpointError, find, load, save
from runtime.checkpoint_writer import Writer
from runtime.ranks import Ranks

HASH = "hash"
FULL = OSError(errno.ENOSPC, "No space left on device")


def make_state(iter_num, **model):
    """The smallest state that can be saved, with one weight that says which one it is."""
    model = {"weight": torch.full((3, 2), float(iter_num)), **model}
    return {**dict.fromkeys(KEYS), "iter_num": iter_num, "model": model, "optimizer": {}, "patterns_hash": HASH}


def iteration(path):
    """The iteration of a checkpoint, which its weights confirm."""
    state = load(path, HASH)
    assert differences(state["model"]["weight"], torch.full((3, 2), float(state["iter_num"]))) == []
    return state["iter_num"]


def save_and_wait(folder, state, **options):
    folder.mkdir(exist_ok=True)
    writer = Writer(folder, **options)
    writer.save(state)
    writer.wait()
    return writer


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_point_leaves_a_complete_checkpoint(tmp_path, monkeypatch, links):
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
            save_and_wait(run, make_state(4), keep_last=3)
    found = [iteration(find(photo)) for photo in sorted(album.iterdir())]
    assert len(found) >= 10
    assert found == sorted(found)
    assert {found[0], found[-1]} == {3, 4}
    for photo in album.iterdir():
        numbered = [iteration(path) for path in sorted(photo.glob("ckpt_0*.pt"))]
        assert numbered in ([1, 2, 3], [1, 2, 3, 4], [2, 3, 4])


@pytest.fixture
def gate(monkeypatch):
    """An event that every torch.save waits for; `gate.log` has the saves that began and ended."""
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
    """A model with a tied weight and buffers, after an optimizer step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6))
    model[1].weight = model[0].weight
    model.register_buffer("index", torch.arange(6, dtype=torch.uint8))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("other_empty", torch.empty(0, 3))
    model.register_buffer("low", torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    state = make_state(iter_num) | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return model, optimizer, state | {"autoswitch": [1.0, [2.0]], "config": {"betas": (0.9, 0.95)}}


def test_the_file_is_the_one_that_a_plain_save_writes(tmp_path):
    *_, state = full_state()
    (tmp_path / "plain").mkdir()
    save(tmp_path / "plain", state)
    save_and_wait(tmp_path / "writer", state)
    assert contents(tmp_path / "writer") == contents(tmp_path / "plain")
    loaded = load(tmp_path / "writer" / "ckpt.pt", HASH)
    assert differences(loaded, state) == []
    assert loaded["model"]["0.weight"].data_ptr() == loaded["model"]["1.weight"].data_ptr()
    assert loaded["model"]._metadata == state["model"]._metadata


def test_slices_of_one_tensor_are_saved_as_they_are(tmp_path):
    square = torch.arange(16.0).view(4, 4)
    views = {"a": square[1:3], "b": square[2:4], "t": square.t(), "same": square[1:3], "bits": square.view(torch.int32)}
    save_and_wait(tmp_path, make_state(1, square=square, **views))
    assert differences(load(tmp_path / "ckpt.pt", HASH), make_state(1, square=square, **views)) == []


def test_what_training_changes_after_a_save_does_not_reach_the_file(tmp_path, gate):
    model, optimizer, state = full_state()
    writer = Writer(tmp_path)
    writer.save(state)
    for tensor in (*model.state_dict().values(), optimizer.state_dict()["state"][0]["exp_avg"]):
        tensor.add_(1)
    state["autoswitch"][1].append(3.0)
    state["config"]["betas"] = None
    assert not (tmp_path / "ckpt.pt").exists()
    gate.set()
    writer.wait()
    assert differences(load(tmp_path / "ckpt.pt", HASH), full_state()[-1]) == []
    assert differences(full_state()[-1]["model"], model.state_dict()) != []


def test_a_save_waits_for_the_one_before_and_uses_its_memory(tmp_path, gate, monkeypatch):
    writer, memory, real = Writer(tmp_path), [], threading.Thread.join

    def join(thread, timeout=None):  # waiting for a thread opens the gate for it
        gate.set()
        real(thread, timeout)
        gate.clear()

    monkeypatch.setattr(threading.Thread, "join", join)
    for iter_num in (1, 2, 3):
        writer.save(make_state(iter_num))
        assert gate.log == [(what, i) for i in range(1, iter_num) for what in ("begin", "end")]
        memory.append([buffer.data_ptr() for buffer in writer.to_host.buffers])
    writer.wait()
    assert writer.ranks.moved > 0  # a long save is no stall
    assert memory[0] == memory[1] == memory[2]
    assert (iteration(tmp_path / "ckpt.pt"), iteration(tmp_path / "ckpt_prev.pt")) == (3, 2)


def test_memory_follows_the_state(tmp_path):
    writer = Writer(tmp_path)
    for size in (4, 8, 2):
        state = make_state(size, a=torch.arange(size), b=torch.arange(size) + 0.5)
        writer.save(state)
        writer.wait()
        assert differences(load(tmp_path / "ckpt.pt", HASH), state) == []
    writer.save(make_state(1))
    assert len(writer.to_host.buffers) == 1
    writer.wait()


def test_a_poll_does_not_wait_and_a_process_that_ends_finishes_its_thread(tmp_path, gate):
    writer = Writer(tmp_path)
    writer.save(make_state(1))
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint.Writer"] == [False]
    writer.poll()
    assert writer.pending  # the gate is still closed
    gate.set()
    writer.thread.join()  # as the interpreter does at its end
    writer.poll()
    assert not writer.pending
    assert iteration(tmp_path / "ckpt.pt") == 1


def fail_once(monkeypatch, error):
    real = torch.save

    def patched(state, file):
        monkeypatch.setattr(torch, "save", real)
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", patched)


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        *((call, FULL, pytest.raises(CheckpointError, match="No space left")) for call in ("wait", "poll", "save")),
        ("wait", ZeroDivisionError("unexpected"), pytest.raises(ZeroDivisionError)),
        ("wait", KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
    ],
)
def test_an_error_in_the_thread_is_raised_once(tmp_path, monkeypatch, call, error, expected):
    writer = save_and_wait(tmp_path, make_state(1))
    before = contents(tmp_path)
    fail_once(monkeypatch, error)
    writer.save(make_state(2))
    writer.thread.join()
    with expected:
        getattr(writer, call)(*([make_state(3)] if call == "save" else []))
    assert contents(tmp_path).items() >= before.items()
    for _ in range(2):
        writer.poll()
        writer.wait()
    writer.save(make_state(4))
    writer.wait()
    assert (iteration(tmp_path / "ckpt.pt"), iteration(tmp_path / "ckpt_prev.pt")) == (4, 1)


def test_another_rank_writes_nothing_and_learns_of_the_error_of_rank_0(tmp_path, monkeypatch):
    answers = iter([2, 2, 1, 2, 0])
    monkeypatch.setattr(Ranks, "maximum", lambda ranks, value: next(answers))
    writer = Writer(tmp_path, ranks=Ranks(1, 1, 2))
    writer.save(make_state(1))
    for _ in range(2):
        writer.poll()
        assert writer.pending
    with pytest.raises(CheckpointError, match=r"rank 0 cannot write a checkpoint in .*; see its error"):
        writer.poll()
    for _ in range(2):
        writer.poll()  # without an answer
    writer.save(make_state(2))
    for expected in (True, False):
        writer.poll()
        assert writer.pending == expected
    assert (writer.thread, writer.to_host.buffers, [*tmp_path.iterdir()]) == (None, [], [])


def test_a_state_without_a_key_is_refused_before_anything_is_begun(tmp_path):
    state = make_state(1)
    del state["scaler"]
    writer = Writer(tmp_path)
    with pytest.raises(ValueError, match=r"the state lacks scaler$"):
        writer.save(state)
    assert not writer.pending
    assert not list(tmp_path.iterdir())

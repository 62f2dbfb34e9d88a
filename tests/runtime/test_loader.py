"""runtime/loader.py: epoch sampling, and data files that cannot be used."""

import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import SETTINGS, launch, make_dataset, read_rows, read_state, run_differences, stop_at

import train
from runtime import loader


def tokens(folder, count, block_size=8):
    np.arange(count, dtype="<u2").tofile(folder / "train.bin")
    return loader.Tokens(folder, "train", block_size, count)


@pytest.mark.parametrize("count", [41, 45, 48, 49, 9])
def test_each_epoch_has_every_window_once_in_another_order(tmp_path, count):
    split = tokens(tmp_path, count)
    windows = (count - 1) // 8
    epochs = [split.epoch_starts(windows, epoch * windows, seed=3) for epoch in range(40)]
    for starts in epochs:
        offset = starts.min()
        assert sorted(starts) == [offset + 8 * i for i in range(windows)]
        assert 0 <= offset <= (count - 1) % 8
        split.windows(starts, torch.device("cpu"))
    assert {starts.min() for starts in epochs} == set(range((count - 1) % 8 + 1))
    if windows > 1:
        assert len({tuple(starts - starts.min()) for starts in epochs}) > 10
        assert any((split.epoch_starts(windows, e * windows, 4) != epochs[e]).any() for e in range(40))


def test_the_checksum_depends_on_every_token_and_their_order(tmp_path):
    checksums = set()
    for change in (lambda a: a, lambda a: a[::-1], lambda a: np.append(a, 0), lambda a: np.append(a[:-1], 0)):
        change(np.arange(50)).astype("<u2").tofile(tmp_path / "train.bin")
        checksums |= {loader.Tokens(tmp_path, "train", 8, 50).checksum for _ in range(2)}
    assert len(checksums) == 4


def test_a_large_file_is_sampled(tmp_path):
    """A file of 200 * 2**20 tokens is read at 128 places, 2**20 tokens at each."""
    path, seen = tmp_path / "train.bin", []
    for place in (None, 2**20 + 5, 200 * 2**20 // 128 + 5):
        with open(path, "wb") as file:  # sparse: it needs no space
            file.truncate(400 * 2**20)
            file.seek(2 * (place or 0))
            file.write(b"\1" if place else b"")
        seen.append(loader.Tokens(tmp_path, "train", 8, 50).checksum)
    assert [seen[0] == checksum for checksum in seen] == [True, True, False]


def test_the_start_of_a_window_depends_only_on_its_number(tmp_path):
    split = tokens(tmp_path, 100)
    starts = split.epoch_starts(60, 0, 7)
    parts = [tokens(tmp_path, 100).epoch_starts(n, first, 7) for first, n in ((0, 7), (7, 20), (27, 1), (28, 32))]
    assert (np.concatenate(parts) == starts).all()
    assert (split.epoch_starts(5, 3, 7) == starts[3:8]).all()


@pytest.mark.slow
def test_epochs_train_the_same_on_two_ranks_and_after_a_stop(run, data, tmp_path):
    changes = {"sampling": "epoch", "mvue": False, "dropout": 0.0, "max_iters": 10, "mask_interval": 20}
    run(tmp_path / "one", **changes)
    run(tmp_path / "parts", stop_at(5, 0), **changes)
    run(tmp_path / "parts", **changes)
    assert run_differences(tmp_path / "parts", tmp_path / "one") == []
    done = launch(tmp_path / "two", {**SETTINGS, "dataset": data, **changes}, ranks=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True):
        assert b["train_loss"] == (pytest.approx(a["train_loss"], rel=1e-5) if a["train_loss"] else None)


def test_the_loop_takes_every_window_of_an_epoch(given, tmp_path):
    given(sampling="epoch", batch_size=4, gradient_accumulation_steps=2)
    split = tokens(tmp_path, 8 * 24 + 1)
    starts = [start for i in range(3) for m in range(2) for start in train.batch_starts(split, i, m)]
    assert sorted(starts) == [8 * i for i in range(24)]


# ---------------------------------------------------------------------------------------------------------------------
# Files that cannot be used


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.bin", "", r"train\.bin holds 0 tokens, need more than"),
        ("val.bin", 7 * "\1\0", r"val\.bin holds 7 tokens, need more than"),
        ("val.bin", 99 * "\1\0\2", r"val\.bin has an odd number of bytes, need uint16 tokens without a header"),
        ("train.bin", 99 * "some text, ", r"train\.bin is a text, need uint16 tokens"),
        ("train.bin", 200 * "`\xea", r"train\.bin holds token 60000, need tokens below vocab_size="),
        *[("meta.json", text, r"meta\.json") for text in ("{", "[]", '{"tokenizer": "char"}', '{"vocab_size": "5"}')],
    ],
)
def test_damaged_files_are_refused_by_name(refused, tmp_path, name, text, message):
    folder = make_dataset(tmp_path / "data")
    (folder / name).write_bytes(text.encode("latin1"))
    assert re.search(message, refused(tmp_path / "out", dataset=folder))


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [os.unlink, lambda path: os.truncate(path, 100)], ids=["gone", "short"])
def test_data_that_vanishes_or_shrinks_ends_the_run_by_name(attempt, tmp_path, monkeypatch, spoil):
    data, windows, calls = make_dataset(tmp_path / "data"), loader.Tokens.windows, []

    def spoiled(self, starts, device):
        calls.append(0)
        if len(calls) == 40:
            spoil(data / "train.bin")
        return windows(self, starts, device)

    monkeypatch.setattr(loader.Tokens, "windows", spoiled)
    done = attempt(tmp_path / "out", dataset=data, eval_interval=0)
    assert done.returncode == 1
    assert re.match(r"train\.py: error: dataset: \S+train\.bin had \d+ tokens when", done.stderr)
    assert read_state(tmp_path / "out")["iter_num"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# Random sampling, the tokenizer, meta.json


def test_random_windows_are_shifted_by_one_and_a_function_of_the_key(tmp_path):
    split = tokens(tmp_path, 100)

    def windows(count, *key):
        return split.windows(split.random_starts(count, *key), torch.device("cpu"))

    x, y = windows(6, 1, 2, 3)
    assert x.shape == y.shape == (6, 8)
    assert torch.equal(x + 1, y)
    assert torch.equal(x, windows(6, 1, 2, 3)[0])
    assert not torch.equal(x, windows(6, 1, 2, 4)[0])
    starts = torch.cat([windows(64, 9, k)[0][:, 0] for k in range(40)])
    assert starts.min() == 0
    assert starts.max() == 91  # the last window ends with the last token as target


def test_char_tokenizer_round_trip():
    encode, decode = loader.load_tokenizer({"tokenizer": "char", "chars": "\nabcdefghij"})
    assert decode(encode("a\nbad\n")) == "a\nbad\n"
    assert encode("\nab") == [0, 1, 2]


def write_meta(folder, **changes):
    meta = {"tokenizer": "char", "vocab_size": 5, "chars": "abcde"} | changes
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8-sig")  # with a byte order mark, as in Windows
    return meta


def test_meta_that_belongs_to_other_files_is_refused(tmp_path):
    np.zeros(10, dtype="<u2").tofile(tmp_path / "train.bin")
    write_meta(tmp_path, train_tokens=11)
    with pytest.raises(ValueError, match=r"counts 11 tokens in train.bin, which holds 10; prepare the dataset again"):
        loader.load_meta(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": True}, "vocab_size=True and tokenizer='char', need an int from 1 to 65536"),
        ({"vocab_size": -5}, "vocab_size=-5 .*need"),
        ({"vocab_size": 65537}, "vocab_size=65537 .*need"),
        ({"vocab_size": 5.0}, r"vocab_size=5\.0 .*need"),
        ({"tokenizer": "llama"}, "vocab_size=5 and tokenizer='llama', .* char or gpt2"),
        ({"vocab_size": 6}, "chars is 'abcde', need a string of vocab_size=6 different characters"),
        ({"chars": "abcdd"}, "chars is 'abcdd', need"),
        ({"chars": None}, "chars is None, need"),
        ({"chars": ["a", "b", "c", "d", "ee"]}, "chars is .*need a string"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path, changes, message):
    assert write_meta(tmp_path) == loader.load_meta(tmp_path)
    write_meta(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"meta\.json is damaged \(ValueError\(.{message}"):
        loader.load_meta(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets of other programs


def test_nanogpts_folder_is_refused_with_the_command_that_writes_meta_json(refused, tmp_path):
    folder = make_dataset(tmp_path / "nano's gpt")
    meta = json.loads((folder / "meta.json").read_text())
    itos = dict(enumerate(meta["chars"]))
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": {}}))
    message = refused(tmp_path / "out", dataset=folder)
    assert "has nanoGPT's meta.pkl, need meta.json" in message
    subprocess.run(f"{sys.executable} {message.partition(': python ')[2]}", shell=True, check=True)
    assert loader.load_meta(folder) == meta


IDS = np.random.default_rng(0).integers(0, 50257, 600)
HEADERS = [np.array([magic, 1, 600, *[0] * 253], dtype="<i4") for magic in (20240520, 20240801)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([HEADERS[0], IDS.astype("<u2")], "begins with llm.c's header of 1024 bytes"),
        ([HEADERS[1], IDS.astype("<u4")], "begins with llm.c's header of 1024 bytes"),
        ([IDS.astype("<u4")], "has 32-bit or 64-bit tokens"),
        ([IDS.astype("<i8")], "has 32-bit or 64-bit tokens"),
        ([(IDS * 3).astype("<u4")], "has 32-bit or 64-bit tokens"),  # up to 150,770
        (None, "is a .npy file"),
    ],
    ids=["header", "llama3", "uint32", "int64", "large uint32", "npy"],
)
def test_another_format_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "train.bin"
    if content:
        path.write_bytes(b"".join(part.tobytes() for part in content))
    else:
        with path.open("wb") as file:
            np.save(file, IDS.astype("<u2"))
    with pytest.raises(ValueError, match=f"train.bin {message}, need uint16 tokens without a header; [^\n]+$"):
        loader.load_meta(tmp_path)


@pytest.mark.parametrize("ids", [np.tile([5, 0], 400), np.zeros(400, int), IDS], ids=["alternating", "zeros", "gpt2"])
def test_counted_tokens_are_not_questioned(tmp_path, ids):
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    meta = write_meta(tmp_path, train_tokens=len(ids))
    assert loader.load_meta(tmp_path) == meta

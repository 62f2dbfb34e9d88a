"""Reads the token files and tokenizers that data/*/prepare.py wrote."""

import json
import os
import shlex
import zlib
from pathlib import Path

import numpy as np
import torch

from sparse24 import seed_words

DATA_FOLDER = Path(__file__).resolve().parents[1] / "data"
_EPOCH = 5  # tag that keeps this stream of random numbers apart from others


class DataLost(RuntimeError):
    """A data file was deleted or cut short during the run."""


class Tokens:
    """One split of a dataset: a memory-mapped file of uint16 tokens. Raises FileNotFoundError if the file is missing,
    ValueError if it is too short for one window or holds a token of vocab_size or more."""

    def __init__(self, folder: Path, split: str, block_size: int, vocab_size: int):
        self.path, self.block_size, self.vocab_size = folder / f"{split}.bin", block_size, vocab_size
        self._orders: dict[int, tuple[np.ndarray, int]] = {}
        self.remedy = f"prepare it with: python {os.path.relpath(folder / 'prepare.py')}"
        if not (folder / "prepare.py").exists():
            datasets = ", ".join(sorted(path.parent.name for path in DATA_FOLDER.glob("*/prepare.py")))
            self.remedy = f"set dataset to one of {datasets}, or to the complete path of another dataset's folder"
        if not self.path.is_file():
            raise FileNotFoundError(f"dataset: {self.path} does not exist; {self.remedy}")
        self.data = np.memmap(self.path, dtype="<u2", mode="r") if self.path.stat().st_size > 1 else np.zeros(0, "<u2")
        if len(self.data) <= block_size:
            need = f"need more than block_size={block_size}; set a smaller block_size, or {self.remedy}"
            raise ValueError(f"dataset: {self.path} holds {len(self.data)} tokens, {need}")
        chunk = 2**20  # larger files than 134M tokens are only sampled here; `windows` checks every window
        largest = self.checksum = 0  # the checksum tells other tokens from these after a restart and on other ranks
        for start in range(0, len(self.data), max(chunk, len(self.data) // 128)):
            part = self.data[start : start + chunk]
            largest, self.checksum = max(largest, int(part.max())), zlib.crc32(part, self.checksum)
        self._check(largest)

    def _check(self, largest: int) -> None:
        if largest >= self.vocab_size:
            need = f"need tokens below vocab_size={self.vocab_size} (of its meta.json or of the checkpoint)"
            raise ValueError(f"dataset: {self.path} holds token {largest}, {need}; {self.remedy}")

    def windows(self, starts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 (B, T), of the windows that begin at `starts`. Targets are shifted by one token.

        Raises DataLost if the file was deleted or cut short; reading it would end the process without a message.
        """
        now = self.path.stat().st_size // 2 if os.path.exists(self.path) else 0
        if now < len(self.data):
            before = f"{self.path} had {len(self.data)} tokens when the run began"
            raise DataLost(f"dataset: {before}, now {now}; restore it")
        rows = np.stack([self.data[start : start + self.block_size + 1] for start in starts]).astype(np.int64)
        self._check(int(rows.max()))
        block = torch.from_numpy(rows)
        block = block.pin_memory() if device.type == "cuda" else block
        block = block.to(device, non_blocking=device.type == "cuda")
        return block[:, :-1], block[:, 1:]

    def random_starts(self, count: int, *key: int) -> np.ndarray:
        """Starts of `count` windows anywhere in the file. They depend only on `key`."""
        return seed_words(count, *key) % np.uint64(len(self.data) - self.block_size)

    def epoch_starts(self, count: int, first: int, seed: int) -> np.ndarray:
        """Starts of windows `first` to `first` + `count` - 1 of a sequence of epochs.

        An epoch cuts the file into windows after some offset, and takes each of them once. Offset and order depend only
        on (seed, epoch).
        """
        windows, remainder = divmod(len(self.data) - 1, self.block_size)
        starts = []
        for number in range(first, first + count):
            epoch, position = divmod(number, windows)
            if epoch not in self._orders:  # the orders of two epochs stay in memory, 8 bytes per window
                self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
                words = seed_words(windows + 1, seed, epoch, 0, _EPOCH)
                self._orders[epoch] = np.argsort(words[1:], kind="stable"), int(words[0] % np.uint64(remainder + 1))
            order, offset = self._orders[epoch]
            starts.append(int(order[position]) * self.block_size + offset)
        return np.array(starts)


def load_meta(folder: Path) -> dict:
    """meta.json of a dataset; GPT-2's tokenizer if there is none, as in nanoGPT. Raises ValueError if it is damaged or
    does not match the .bin files, if the folder has nanoGPT's meta.pkl instead, or if a .bin file has another format.
    """
    path, meta = folder / "meta.json", {"tokenizer": "gpt2", "vocab_size": 50257}
    if path.exists():
        try:
            meta = json.loads(path.read_text(encoding="utf-8-sig"))
            size, tokenizer, chars = meta["vocab_size"], meta["tokenizer"], meta.get("chars")
            if type(size) is not int or not 0 < size <= 65536 or tokenizer not in ("char", "gpt2"):
                need = "need an int from 1 to 65536, and char or gpt2"
                raise ValueError(f"vocab_size={size!r} and tokenizer={tokenizer!r}, {need}")
            if tokenizer == "char" and not (isinstance(chars, str) and len(chars) == len(set(chars)) == size):
                raise ValueError(f"chars is {chars!r:.40}, need a string of vocab_size={size} different characters")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"dataset: {path} is damaged ({error!r}); mend it or prepare the dataset again") from error
    elif (folder / "meta.pkl").exists():
        code = (
            f"import json, pickle; m = pickle.load(open({str(folder / 'meta.pkl')!r}, 'rb'));"
            " chars = ''.join(m['itos'][i] for i in sorted(m['itos']));"
            f" json.dump(dict(tokenizer='char', vocab_size=len(chars), chars=chars), open({str(path)!r}, 'w'))"
        )
        remedy = f"write it by: python -c {shlex.quote(code)}"
        raise ValueError(f"dataset: {folder} has nanoGPT's meta.pkl, need meta.json; {remedy}")
    for split in ("train", "val"):
        tokens, file = meta.get(f"{split}_tokens"), folder / f"{split}.bin"
        if file.is_file() and file.stat().st_size / 2 != tokens:
            _check_format(file)
            if tokens is not None:
                counts = f"counts {tokens} tokens in {file.name}, which holds {file.stat().st_size // 2}"
                raise ValueError(f"dataset: {path} {counts}; prepare the dataset again")
    return meta


def _check_format(path: Path) -> None:
    """Raise ValueError if the first 4 KiB of a token file show another format than uint16 without a header."""
    with path.open("rb") as file:
        head = file.read(4096)
    magic, halves = int.from_bytes(head[:4], "little"), np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    # A text has no control characters below the tab. The 4 KiB may end within a character.
    is_text = min(head, default=0) > 8 and head.decode(errors="replace").count("\ufffd") < 2
    formats = (
        (head.startswith(b"\x93NUMPY"), "is a .npy file"),
        (magic in (20240520, 20240801), "begins with llm.c's header of 1024 bytes"),
        (is_text, "is a text"),
        (path.stat().st_size % 2, "has an odd number of bytes"),
        (len(halves) > 1 and halves[::2].max() >= 8 > halves[1::2].max(), "has 32-bit or 64-bit tokens"),
    )
    for found, form in formats:
        if found:
            raise ValueError(
                f"dataset: {path} {form}, need uint16 tokens without a header; prepare the dataset again or, "
                "if all tokens are below 65536, write them with numpy by tokens.astype('<u2').tofile(path)"
            )


def describe(meta: dict, splits: list[Tokens]) -> dict:
    """A checkpoint's entry `data`: the vocabulary, and the number and checksum of each split's tokens."""
    data = {name: meta[name] for name in ("tokenizer", "vocab_size", "chars") if name in meta}
    for split in splits:
        data |= {f"{split.path.stem}_tokens": len(split.data), f"{split.path.stem}_checksum": f"{split.checksum:08x}"}
    return data


def vocabulary_changes(saved: dict, now: dict) -> list[str]:
    """How the vocabulary of a dataset differs from the one that a checkpoint stored."""
    changes = [f"{k}={now[k]} (there {saved[k]})" for k in ("tokenizer", "vocab_size") if now[k] != saved[k]]
    for token, (char, before) in enumerate(zip(now.get("chars", ""), saved.get("chars", ""), strict=False)):
        if char != before:
            return [*changes, f"token {token} is {char!r} (there {before!r})"]
    return changes


def load_tokenizer(meta: dict):
    """(encode: str -> list of ints, decode: list of ints -> str) of a dataset's meta.json.

    encode raises ValueError for characters that a char-level vocabulary lacks. decode skips GPT-2's padding ids.
    """
    if meta["tokenizer"] == "char":
        ids = {char: i for i, char in enumerate(meta["chars"])}

        def encode(text: str) -> list[int]:
            unknown = sorted(set(text) - ids.keys())
            if unknown:
                raise ValueError(f"the dataset's vocabulary has no {''.join(unknown)!r}; use only {meta['chars']!r}")
            return [ids[char] for char in text]

        return encode, lambda tokens: "".join(meta["chars"][t] for t in tokens)
    import tiktoken

    gpt2 = tiktoken.get_encoding("gpt2")
    return (
        lambda text: gpt2.encode(text, allowed_special={"<|endoftext|>"}),
        lambda tokens: gpt2.decode([t for t in tokens if t < gpt2.n_vocab]),
    )

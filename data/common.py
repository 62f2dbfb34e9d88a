"""Shared by all data/*/prepare.py: fetch, read and tokenize text, and write files that are never left half written.

A data set is a folder of three files, which train.py and sample.py read:
  train.bin, val.bin   token ids, little-endian uint16, no header
  meta.json            tokenizer ("char" or "gpt2"), vocab_size, chars (char only; index = token id), train_tokens,
                       val_tokens, sha256 (of the text; of train.bin + val.bin if it came from a hub), source, extras
"""

import argparse
import functools
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import sys
import threading
import urllib.request
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from configurator import expand, keep_console, open_new, sync

SEPARATOR = "<|endoftext|>"  # between the documents of an --input file
FILES = ("meta.json", "val.bin", "train.bin")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BLOCK = 1 << 20  # characters per piece (about 250k tokens), and bytes per read when a file is hashed
SPLIT_SEED = 2357  # nanoGPT's
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- reading ---------------------------------------------------------------------------------------------------------
@contextmanager
def open_binary(path):
    """Open a plain or .xz file to read its unpacked bytes."""
    try:
        with lzma.open(path) if Path(path).suffix == ".xz" else open(path, "rb") as file:
            yield file
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"open_binary: {path} is no complete .xz file ({error}); rename it or copy it anew") from error


def read_lines(path):
    """Yield the lines of a UTF-8 text, plain or .xz, with unchanged line ends and without a byte order mark."""
    with open_binary(path) as file:
        try:
            yield next(file, b"").decode("utf-8-sig")
            yield from (line.decode("utf-8") for line in file)
        except UnicodeDecodeError as error:
            raise ValueError(f"read_lines: {path} is not UTF-8 text ({error}); convert it with iconv") from error


def sha256_of(*paths):
    """sha256 of the concatenated unpacked bytes of the files."""
    digest = hashlib.sha256()
    for path in paths:
        with open_binary(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def fetch(url, sha256, path, timeout=30):
    """Download `url` to `path` unless it exists. Returns `path`. Raises ValueError if the sha256 differs."""
    if path.is_file():
        if sha256_of(path) != sha256:  # it may be the user's own text
            raise ValueError(f"fetch: {path} is another text than {url}; give it by --file, or delete it")
        return path
    try:
        with urllib.request.urlopen(url, timeout=timeout) as reply, atomic(path) as file:
            shutil.copyfileobj(reply, file)
            file.flush()
            if (actual := sha256_of(file.name)) != sha256:
                raise ValueError(f"fetch: {url} has sha256 {actual}, need {sha256}; give the text by --file")
    except (OSError, HTTPException) as error:
        raise RuntimeError(f"fetch: no {url} ({error}); without network, give the text by --file") from error
    return path


def tiny_shakespeare(script, doc, argv):
    """Parse the arguments of a Shakespeare script, and split the text of --file or the downloaded text 90/10.
    Returns (out_dir, train, val, meta entries)."""
    made = parser(script, doc)
    made.add_argument("--file", type=path_of, help="text on disk (UTF-8, plain or .xz) instead of the download")
    args = made.parse_args(argv)
    check_out_dir(args)
    path = args.file or fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256, args.out_dir / "input.txt")
    text = "".join(read_lines(path))
    cut = int(len(text) * 0.9)
    meta = {"sha256": sha256_of(path), "source": args.file.name if args.file else SHAKESPEARE_URL}
    return args.out_dir, text[:cut], text[cut:], meta


# ---- tokenizing ------------------------------------------------------------------------------------------------------
def encode_chars(text, chars):
    """Ids (uint16) of the characters of `text`: their positions in `chars`."""
    ids = {char: position for position, char in enumerate(chars)}
    try:
        return np.array([ids[char] for char in text], dtype="<u2")
    except KeyError as error:
        raise ValueError(f"encode_chars: {error}, need one of the {len(chars)} chars; add it or drop it") from error


@functools.cache
def gpt2_encoding(timeout=60):
    """tiktoken's GPT-2 BPE. tiktoken downloads its vocabulary without a timeout, so this waits for it in a thread."""
    import tiktoken

    result = {}

    def load():
        try:
            result["encoding"] = tiktoken.get_encoding("gpt2")
        except Exception as error:  # from requests, sockets or a hash check; raised below
            result["error"] = error

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    if "encoding" not in result:
        raise RuntimeError(
            f"gpt2_encoding: no GPT-2 vocabulary ({result.get('error', f'no answer in {timeout} s')}); without "
            "network, set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled on another machine"
        ) from result.get("error")
    return result["encoding"]


# ---- writing ---------------------------------------------------------------------------------------------------------
@contextmanager
def atomic(path):
    """Open a temporary file beside `path`. If the block succeeds, flush it to disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open_new(temporary) as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bin(file, token_chunks):
    """Write an iterable of token chunks (arrays, lists) to an open file. Returns the number of tokens."""
    count = 0
    for chunk in map(np.asarray, token_chunks):
        if chunk.size and not 0 <= chunk.min() <= chunk.max() < 1 << 16:
            raise ValueError(f"write_bin: tokens {chunk.min()} to {chunk.max()}, need 0 to 65535; limit the vocabulary")
        file.write(chunk.astype("<u2").tobytes())
        count += chunk.size
    return count


def write_dataset(out_dir, train, val, **meta):
    """Write a data set from two iterables of token chunks. Replaces old files only after all new ones are written."""
    meta_path, val_path, train_path = (out_dir / name for name in FILES)
    with atomic(meta_path) as meta_file, atomic(val_path) as val_file, atomic(train_path) as train_file:
        for name, file, chunks in (("train", train_file, train), ("val", val_file, val)):
            meta[f"{name}_tokens"] = count = write_bin(file, chunks)
            if not count:
                raise ValueError(f"write_dataset: 0 {name} tokens, need at least 1; give more text")
            file.flush()
            print(f"{name}: {count:,} tokens")
        if "sha256" not in meta:
            meta["sha256"] = sha256_of(train_file.name, val_file.name)
        meta_file.write(json.dumps(meta, indent=1).encode() + b"\n")
    print(f"wrote train.bin, val.bin and meta.json in {out_dir}")


# ---- a script's command line -----------------------------------------------------------------------------------------
def path_of(word):
    """An argument that is a path. Expands ~, and refuses an empty one."""
    if not word:
        raise argparse.ArgumentTypeError("an empty path, need a name")
    try:
        path = Path(expand(word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.exists() and not (path.is_file() or path.is_dir()):  # a text is read twice
        raise argparse.ArgumentTypeError(f"{word} is a pipe or device, need a file or folder; write a text to a file")
    return path


def parser(script, doc):
    """An argparse parser with the description `doc`, --overwrite, and --out_dir, by default the folder of `script`."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=doc, formatter_class=form, usage=argparse.SUPPRESS)  # one-line errors
    made.add_argument("--out_dir", type=path_of, default=Path(script).resolve().parent, help="where the files go")
    made.add_argument("--overwrite", action="store_true", help="let a text of yours replace the files in out_dir")
    return made


def check_out_dir(args):
    """Raise ValueError if --out_dir cannot be written, or if it holds a data set and --overwrite is not given."""
    folder = next(parent for parent in (args.out_dir, *args.out_dir.parents) if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(f"--out_dir {args.out_dir}: {folder} is no folder that you may write to; give another one")
    present = [name for name in FILES if (args.out_dir / name).exists()]
    if present and not args.overwrite:
        raise ValueError(f"{args.out_dir} already holds {', '.join(present)}; give another --out_dir, or --overwrite")


def run(main, *args):
    """Run a script's main(*args). A mistake of the user or a failing disk or network ends in one line and status 1."""
    keep_console()
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)  # end like Ctrl-C, without the temporary files
    try:
        main(*args)
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped")
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        remedy = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        sys.exit(f"prepare.py: error: {' '.join(str(error).split())}{remedy}")


# ---- documents: openwebtext, fineweb_edu -----------------------------------------------------------------------------
# A piece is (document number, text, True if the text ends the document).
def documents(paths):
    """Yield the pieces of the documents in text files. A long document gives several pieces of about BLOCK characters.

    A cut lies between a visible character and white space, which no GPT-2 token spans, so tokens do not change.
    A separator is dropped with the white space beside it in its line. Documents of white space alone are dropped. Other
    documents keep their last line end.
    """
    number = 0
    for path in paths:
        text, was_cut = "", False  # the document so far, without the pieces that were cut from it
        for line in chain(read_lines(path), (SEPARATOR,)):
            *ended, rest = line.split(SEPARATOR)
            for position, part in enumerate(ended):
                text += part.strip() if position else part.rstrip()
                if was_cut or text.strip():
                    yield number, text, True
                    number += 1
                text, was_cut = "", False
            text += rest.lstrip() if ended else rest
            body = text.rstrip(" \t\r\n") if len(text) > BLOCK else ""
            if body and not body[-1].isspace():
                yield number, body, False
                text, was_cut = text[len(body) :], True


def progress(pieces, name, total=None):
    """Show a progress bar over the pieces if the output is a terminal."""
    from tqdm import tqdm

    return tqdm(pieces, name, total, unit=" pieces", disable=None)


def batches(pieces):
    """Group pieces into lists of about BLOCK characters."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size > BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def encode(batch):
    """The GPT-2 tokens (uint16) of a list of pieces, with an end-of-text token after each document."""
    encoding, ids = gpt2_encoding(), []
    for _, text, ends in batch:
        ids += encoding.encode_ordinary(text) + [encoding.eot_token] * ends
    return np.array(ids, dtype="<u2")


def encode_all(pieces, num_proc):
    """Yield the tokens of pieces in order. `num_proc` processes, which ignore Ctrl-C, encode a few batches ahead."""
    obey = (signal.pthread_sigmask, (signal.SIG_UNBLOCK, [signal.SIGTERM]))  # a broken pool ends them by SIGTERM
    with ProcessPoolExecutor(num_proc, get_context("spawn"), *obey) as pool:
        pending = deque()
        for batch in batches(pieces):
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the processes that `submit` starts inherit it
            pending.append(pool.submit(encode, batch))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            if len(pending) > 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def file_splits(args):
    """Train pieces, val pieces and meta entries of the --input files."""
    inputs = args.input + ([args.val] if args.val else [])
    meta = {"sha256": sha256_of(*inputs), "source": ", ".join(path.name for path in inputs)}
    if args.val:
        return progress(documents(args.input), "train"), progress(documents([args.val]), "val"), meta
    count = sum(ends for _, _, ends in documents(inputs))
    if count < 2:
        raise ValueError(f"--input: {count} document, need 2 to split; add {SEPARATOR} lines or give --val FILE")
    held_out = set(random.Random(SPLIT_SEED).sample(range(count), max(1, round(count * args.val_fraction))))
    train = (piece for piece in documents(inputs) if piece[0] not in held_out)
    val = (piece for piece in documents(inputs) if piece[0] in held_out)
    return progress(train, "train"), progress(val, "val"), meta


def hub_splits(args, hub):
    """Train pieces, val pieces and meta entries of a Hugging Face data set, with nanoGPT's split."""
    try:
        from datasets import load_dataset

        rows = load_dataset(*hub, split="train", num_proc=args.num_proc)
    except Exception as error:  # not installed, no network, data set moved: several libraries raise many types
        raise RuntimeError(f"{hub[0]}: {error}; without `datasets` or network, give text by --input FILE") from error
    splits = rows.train_test_split(test_size=args.val_fraction, seed=SPLIT_SEED, shuffle=True)

    def pieces(rows, name):
        texts = (text for part in rows.iter(1000) for text in part["text"])
        return progress(((number, text, True) for number, text in enumerate(texts)), name, len(rows))

    meta = {"source": "huggingface " + " ".join(hub), "documents": len(rows)}
    return pieces(splits["train"], "train"), pieces(splits["test"], "val"), meta


def prepare_documents(script, doc, hub, argv=None):
    """The script of a document data set. hub: its name (and configuration) for datasets.load_dataset."""
    made = parser(script, doc)
    about_input = f"text, plain or .xz, {SEPARATOR} between documents"
    made.add_argument("--input", type=path_of, nargs="+", action="extend", help=about_input)
    made.add_argument("--val", type=path_of, help="with --input: validation text, instead of a random split")
    made.add_argument("--val_fraction", type=float, default=0.0005, help="share of the documents for validation")
    made.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes that tokenize")
    args = made.parse_args(argv)
    if args.val and not args.input:
        made.error("--val needs --input")
    if not 0 < args.val_fraction < 1:
        made.error(f"--val_fraction {args.val_fraction}, need more than 0 and less than 1")
    if args.num_proc < 1:
        made.error(f"--num_proc {args.num_proc}, need at least 1")
    check_out_dir(args)
    encoding = gpt2_encoding()  # fail now, not after hours of download
    train, val, meta = file_splits(args) if args.input else hub_splits(args, hub)
    streams = (encode_all(pieces, args.num_proc) for pieces in (train, val))
    write_dataset(args.out_dir, *streams, tokenizer="gpt2", vocab_size=encoding.n_vocab, **meta)

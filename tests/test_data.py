"""The data scripts are deterministic and lossless. Tests with GPT-2's vocabulary need $NANO24_DATA."""

import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import common

DATA = Path(common.__file__).parent
EOT = 50256


@pytest.fixture(autouse=True)
def signals():
    """common.run changes handlers of this process."""
    handlers = {number: signal.getsignal(number) for number in common.STOPS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def prepare(name, *args, cwd=None):
    """Run data/NAME/prepare.py as a user does; return what it printed."""
    command = [sys.executable, DATA / name / "prepare.py", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=100, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def load(folder):
    """(meta, train ids, val ids) of a data set, after checks that every data set must pass."""
    meta = json.loads((folder / "meta.json").read_text())
    train, val = (np.fromfile(folder / f"{split}.bin", dtype="<u2") for split in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    assert max(train.max(), val.max()) < meta["vocab_size"]
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]  # no temporaries
    return meta, train, val


def decode_chars(meta, ids):
    return "".join(meta["chars"][i] for i in ids)


@pytest.fixture
def gpt2(monkeypatch):
    """$NANO24_DATA as a path, with tiktoken told to find GPT-2's vocabulary there."""
    if "NANO24_DATA" not in os.environ:
        pytest.skip("NANO24_DATA is not set: a folder with tiktoken/ (a filled cache) and tinyshakespeare.txt")
    folder = Path(os.environ["NANO24_DATA"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken"))
    return folder


def script(name):
    """data/NAME/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", DATA / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pystdlib():
    return script("pystdlib_char")


# ---- characters ------------------------------------------------------------------------------------------------------
def test_pystdlib_is_deterministic_and_decodes_to_the_files(tmp_path, pystdlib):
    prepare("pystdlib_char", "--out_dir", tmp_path / "a", "--max_bytes", 400_000)
    prepare("pystdlib_char", "--out_dir", tmp_path / "b", "--max_bytes", 400_000, cwd=tmp_path)
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    meta, train, val = load(tmp_path / "a")
    assert 300_000 < len(train) + len(val) <= 400_000
    root = Path(pystdlib.sysconfig.get_path("stdlib"))
    texts = [pystdlib.clean(path.read_bytes()) for path in pystdlib.source_files(root)][: meta["files"]]
    assert decode_chars(meta, val) == "".join(texts[9::10])
    assert decode_chars(meta, train) == "".join(text for i, text in enumerate(texts) if i % 10 != 9)
    assert meta["sha256"] == hashlib.sha256("".join(texts).encode()).hexdigest()


def test_pystdlib_leaves_out_tests_and_installed_files(tmp_path, pystdlib):
    keep = ["a.py", "doctest.py", "unittest/case.py", "json/tool.py"]
    drop = ["test/test_a.py", "idlelib/idle_test/x.py", "lib2to3/tests/x.py", "site-packages/torch/x.py", "x.txt"]
    drop += ["encodings/cp037.py", "_sysconfigdata__linux_.py", "config-3.11-x86_64-linux-gnu/python-config.py"]
    for name in keep + drop:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    assert [path.relative_to(tmp_path).as_posix() for path in pystdlib.source_files(tmp_path)] == sorted(keep)


def test_pystdlib_vocabulary_is_fixed_and_the_budget_is_checked(tmp_path, pystdlib):
    assert len(pystdlib.CHARS) == 97
    assert list(pystdlib.CHARS) == sorted(pystdlib.CHARS)
    assert pystdlib.clean("caf\u00e9\r\n\tx\f = 1".encode()) == "caf\n\tx = 1\n"
    with pytest.raises(
        RuntimeError, match=r"^prepare\.py: error: pystdlib_char: \d+ \.py files .* need 10; raise --max_bytes"
    ):
        prepare("pystdlib_char", "--out_dir", tmp_path, "--max_bytes", 10)


def test_shakespeare_char_round_trip(tmp_path):
    text = "To be, or not to be:\nthat is the question, \u00e9t\u00e9 \U0001f3ad\n" * 20
    (tmp_path / "in.txt").write_text(text, encoding="utf-8", newline="")
    printed = prepare("shakespeare_char", "--file", tmp_path / "in.txt", "--out_dir", tmp_path / "out")
    meta, train, val = load(tmp_path / "out")
    assert decode_chars(meta, train) + decode_chars(meta, val) == text
    assert len(train) == int(0.9 * len(text))
    assert (meta["tokenizer"], meta["sha256"]) == ("char", hashlib.sha256(text.encode()).hexdigest())
    assert meta["vocab_size"] == len(meta["chars"]) == len(set(text))
    assert f"train: {len(train):,} tokens" in printed


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(max_size=40))
def test_encode_chars_inverts(text):
    chars = "".join(sorted({*text, "a"}))
    assert "".join(chars[i] for i in common.encode_chars(text, chars)) == text


@pytest.mark.parametrize("bad", ["!", "b", "z"])  # before, between and after the known ones
def test_encode_chars_names_an_unknown_char(bad):
    with pytest.raises(ValueError, match=f"encode_chars: '{bad}', need one of the 2 chars"):
        common.encode_chars("a" + bad, "ac")


# ---- GPT-2 tokens ----------------------------------------------------------------------------------------------------
def test_shakespeare_is_nanogpts(tmp_path, gpt2):
    prepare("shakespeare", "--file", gpt2 / "tinyshakespeare.txt", "--out_dir", tmp_path)
    meta, train, val = load(tmp_path)
    assert (len(train), len(val)) == (301_966, 36_059)  # nanoGPT's readme
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    text = (gpt2 / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert common.gpt2_encoding().decode([*train, *val]) == text


def documents_of(ids):
    """Token ids cut after each end-of-text, decoded."""
    ends = np.flatnonzero(ids == EOT) + 1
    assert ends[-1] == len(ids)
    return [common.gpt2_encoding().decode(part[:-1]) for part in np.split(ids, ends[:-1])]


def test_documents_from_files(tmp_path, gpt2):
    texts = [f"Document {i}.\r\n\r\n  two  spaces \u2014 caf\u00e9\n" for i in range(30)]
    joined, last = "<|endoftext|>\n".join(texts), "last one, with no line end"
    (tmp_path / "a.txt").write_bytes(joined.encode())
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(last.encode()))
    inputs = ("--input", tmp_path / "a.txt", "--input", tmp_path / "b.txt.xz")
    prepare("fineweb_edu", *inputs, "--val_fraction", 0.1, "--num_proc", 2, "--out_dir", tmp_path / "out")
    meta, train, val = load(tmp_path / "out")
    train, val = documents_of(train), documents_of(val)
    assert len(val) == 3
    assert sorted(train + val) == sorted([*texts, last])
    assert [text for text in [*texts, last] if text in train] == train  # in their order
    assert meta["sha256"] == hashlib.sha256((joined + last).encode()).hexdigest()


@pytest.mark.slow
def test_documents_with_a_val_file(tmp_path, gpt2):
    (tmp_path / "train.txt").write_text("one\n<|endoftext|>\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    (tmp_path / "val.txt.xz").write_bytes(lzma.compress(b"three\n"))
    args = ("--input", tmp_path / "train.txt", "--val", tmp_path / "val.txt.xz", "--num_proc", 1)
    prepare("openwebtext", *args, "--out_dir", tmp_path / "out")
    _, train, val = load(tmp_path / "out")
    assert documents_of(train) == ["one\n", "two\n"]  # empty documents are dropped
    assert documents_of(val) == ["three\n"]


@pytest.mark.slow
def test_a_hub_data_set_is_split_as_nanogpt_does(tmp_path, gpt2, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"page {i}" for i in range(40)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, num_proc: rows)
    common.prepare_documents(__file__, "", ("hub/name",), f"--out_dir {tmp_path} --num_proc 1".split())
    meta, train, val = load(tmp_path)
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert documents_of(train) == list(split["train"]["text"])
    assert documents_of(val) == list(split["test"]["text"])
    assert (meta["source"], meta["documents"]) == ("huggingface hub/name", 40)
    assert meta["sha256"] == common.sha256_of(tmp_path / "train.bin", tmp_path / "val.bin")


def test_long_documents_are_cut_without_changing_a_token(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(common, "BLOCK", 50)
    text = (gpt2 / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
    for old, new in ((",\n", ",\r\n"), (".\n\n", ".  \n\n\n\t "), ("the ", "the\u00a0\n"), ("I ", "I\u3000\n")):
        text = text.replace(old, new)
    (tmp_path / "in.txt").write_bytes(text.encode())
    pieces = list(common.documents([tmp_path / "in.txt"]))
    assert len(pieces) > 100
    assert "".join(piece[1] for piece in pieces) == text
    assert [piece[2] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert common.encode(pieces).tolist() == [*common.gpt2_encoding().encode_ordinary(text), EOT]


def test_one_document_cannot_be_split(tmp_path, gpt2):
    (tmp_path / "in.txt").write_text("only one\n")
    with pytest.raises(ValueError, match=r"--input: 1 document, need 2 to split; .* --val FILE"):
        common.prepare_documents(__file__, "", ("hub/name",), ["--input", str(tmp_path / "in.txt")])


def test_a_missing_vocabulary_names_the_way_out(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def refuse(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    common.gpt2_encoding.cache_clear()
    with pytest.raises(RuntimeError, match=r"no GPT-2 vocabulary \(no route\).* TIKTOKEN_CACHE_DIR"):
        common.gpt2_encoding()


# ---- text files ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n<|endoftext|>\nb\n", ["a\n", "b\n"]),
        ("a\r\n<|endoftext|>\r\n\r\nb\r\n", ["a\r\n", "\r\nb\r\n"]),
        ("a<|endoftext|>b", ["a", "b"]),
        ("  a <|endoftext|> b \n", ["  a", "b \n"]),
        ("a\n \t<|endoftext|> \r\n  b", ["a\n", "  b"]),
        ("a<|endoftext|>\nb<|endoftext|>\n", ["a", "b"]),
        ("<|endoftext|>\n<|endoftext|>a\n", ["a\n"]),
        ("\ufeff<|endoftext|>a", ["a"]),
        ("\ufeffa\ufeff", ["a\ufeff"]),
        ("a<|endoftext|><|endoftext|> <|endoftext|>\n\n<|endoftext|>b", ["a", "b"]),
        ("a\n<|endoftext|>\n \u3000\n", ["a\n"]),
        ("\ufeff", []),
    ],
)
def test_a_separator_anywhere_ends_a_document_and_none_is_empty(tmp_path, text, expected):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode()))
    pieces = list(common.documents([tmp_path / "a.txt", tmp_path / "b.txt.xz"]))
    assert pieces == [(number, text, True) for number, text in enumerate(expected * 2)]


def test_a_separator_in_shakespeare_is_one_token(tmp_path, gpt2):
    (tmp_path / "in.txt").write_text("To be<|endoftext|>" * 9 + "\n")
    script("shakespeare").main(["--file", str(tmp_path / "in.txt"), "--out_dir", str(tmp_path / "out")])
    _, train, val = load(tmp_path / "out")
    assert [*train, *val].count(EOT) >= 8


@pytest.mark.parametrize("encoding", ["latin1", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_that_is_not_utf8_is_named(tmp_path, encoding):
    (tmp_path / "in.txt").write_bytes("caf\u00e9\n".encode(encoding))
    with pytest.raises(ValueError, match=r"in\.txt is not UTF-8 text .* iconv"):
        list(common.documents([tmp_path / "in.txt"]))


# ---- mistakes of the user --------------------------------------------------------------------------------------------
@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """refused(script's name, words): the message with which the script ends. It must be one line, with nothing done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    monkeypatch.setattr(common, "gpt2_encoding", lambda: SimpleNamespace(n_vocab=50257))
    for name, content in TEXTS.items():
        (tmp_path / name).write_bytes(content)

    def refused(name, words):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        main = partial(common.prepare_documents, __file__, "", ("hub/name",)) if name == "hub" else script(name).main
        with pytest.raises(SystemExit) as stop:
            common.run(main, words.split(" "))
        message, code = capsys.readouterr().err, stop.value.code
        message += f"{code}\n" if isinstance(code, str) else ""
        assert re.fullmatch(r"prepare\.py: error: [^\n]+\n", message)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return message

    return refused


TEXTS = {
    "two.txt": b"one\n<|endoftext|>\ntwo\n", "one.txt": b"only one\n", "empty.txt": b"", "latin.txt": b"caf\xe9\n",
    "no.xz": b"no xz at all", "short.xz": lzma.compress(b"text " * 99)[:40],
}  # fmt: skip
UNREADABLE = [
    ("nowhere.txt", "No such file or directory: 'nowhere.txt'"),
    (".", r"Is a directory: '\.'"),
    ("latin.txt", "latin.txt is not UTF-8 text"),
    ("no.xz", r"no.xz is no complete \.xz file"),
    ("short.xz", r"short.xz is no complete \.xz file"),
    ("~/nowhere.txt", re.escape(str(Path.home() / "nowhere.txt"))),
]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        *(("shakespeare_char", f"--out_dir=o --file={file}", message) for file, message in UNREADABLE),
        *(("hub", f"--out_dir=o --input two.txt {file}", message) for file, message in UNREADABLE),
        ("hub", "--out_dir=o --input two.txt --val nowhere.txt", "No such file"),
        ("shakespeare_char", "--out_dir=o --file=empty.txt", "0 train tokens, need at least 1; give more text"),
        ("hub", "--out_dir=o --input empty.txt", "0 document, need 2"),
        ("hub", "--out_dir=o --input one.txt", "1 document, need 2"),
        *(
            ("hub", f"--out_dir=o --val_fraction={x}", f"--val_fraction {x}, need")
            for x in ("0.0", "1.0", "nan", "inf")
        ),
        ("hub", "--out_dir=o --num_proc=0", "--num_proc 0, need at least 1"),
        ("hub", "--out_dir=o --input two.txt /dev/null", "--input: /dev/null is a pipe or device, need a file"),
        ("hub", "--out_dir=o --num_proc=many", "--num_proc: invalid int value: 'many'"),
        ("hub", "--val two.txt", "--val needs --input"),
        ("hub", "--input two.txt --out_dir=", "--out_dir: an empty path"),
        ("hub", "--input two.txt --out_dir=one.txt", "--out_dir one.txt: one.txt is no folder that you may write to"),
        ("shakespeare_char", "--file=two.txt --out_dir=one.txt/deeper", "one.txt is no folder"),
        ("pystdlib_char", "--out_dir=one.txt", "one.txt is no folder"),
        ("pystdlib_char", "--out_dir=o --max_bytes=-5", "0 .py files .* need 10; raise --max_bytes"),
        ("shakespeare", "--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_is_refused_in_one_line(refused, name, words, message):
    assert re.search(message, refused(name, words))


@pytest.mark.parametrize("present", ["meta.json", "val.bin", "train.bin"])
def test_a_data_set_is_replaced_only_with_overwrite(refused, tmp_path, present):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / present).write_text("precious")
    for name, option in (("hub", "--input"), ("shakespeare_char", "--file"), ("shakespeare", "--file")):
        message = refused(name, f"--out_dir=o {option} nowhere.txt")  # it is refused before the text is read
        assert f"o already holds {present}; give another --out_dir, or --overwrite" in message
    for name in ("hub", "shakespeare_char", "shakespeare", "pystdlib_char"):
        assert "or --overwrite" in refused(name, "--out_dir=o")
    script("shakespeare_char").main(["--out_dir=o", "--file=two.txt", "--overwrite"])
    assert load(tmp_path / "o")[0]["chars"] == "".join(sorted(set(TEXTS["two.txt"].decode())))


def test_a_disk_that_fills_up_leaves_the_earlier_data_set(refused, monkeypatch):
    script("shakespeare_char").main(["--out_dir=o", "--file=two.txt"])
    monkeypatch.setattr(json, "dumps", Mock(side_effect=OSError(28, "No space left on device")))
    assert "No space left" in refused("shakespeare_char", "--out_dir=o --file=one.txt --overwrite")


def test_every_script_ends_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    scripts = sorted(DATA.glob("*/prepare.py"))
    running = [
        subprocess.Popen([sys.executable, path, "--out_dir", tmp_path / "file"], stderr=subprocess.PIPE, text=True)
        for path in scripts
    ]
    messages = [process.communicate(timeout=60)[1] for process in running]
    assert len(messages) == 5
    for message in messages:
        assert re.fullmatch(r"prepare\.py: error: --out_dir [^\n]+ is no folder that you may write to[^\n]+\n", message)


def test_ctrl_c_and_a_missing_package_end_in_one_line():
    for error, message in (
        (KeyboardInterrupt(), "stopped"),
        (ModuleNotFoundError("No x", name="x"), "error: No x; pip"),
    ):
        with pytest.raises(SystemExit, match=f"^prepare.py: {message}[^\n]*$"):
            common.run(Mock(side_effect=error))


def test_a_console_that_is_full_or_closed_costs_no_data_set(tmp_path):
    for name, place in (("full", ">/dev/full"), ("closed", ">&-")):
        command = f"{sys.executable} {DATA}/pystdlib_char/prepare.py --max_bytes=300000 --out_dir={tmp_path / name}"
        done = subprocess.run(f"{command} {place}", shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        load(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_processes_that_tokenize_without_a_traceback(tmp_path, gpt2, number):
    (tmp_path / "in.txt").write_text("Some words of a text.\n" * 400_000)
    words = [
        "--input",
        tmp_path / "in.txt",
        "--val",
        tmp_path / "in.txt",
        "--num_proc",
        "2",
        "--out_dir",
        tmp_path / "o",
    ]
    command = [sys.executable, DATA / "fineweb_edu" / "prepare.py", *words]
    obey = partial(signal.signal, number, signal.SIG_DFL)  # a background job may ignore it
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": obey}
    process = subprocess.Popen(command, **options)
    ours = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C reaches all processes
    while not list(tmp_path.glob("o/train.bin.*")):  # the processes start after this file is opened
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    ours(process.pid, number)
    assert process.communicate(timeout=60)[1] == "prepare.py: stopped\n"
    assert list((tmp_path / "o").iterdir()) == []


# ---- files -----------------------------------------------------------------------------------------------------------
def test_write_bin_streams_little_endian_uint16():
    file = io.BytesIO()
    assert common.write_bin(file, iter([[1, 65535], [], np.array([258])])) == 3
    assert file.getvalue() == bytes([1, 0, 255, 255, 2, 1])
    for tokens, found in (([2, 65536], "2 to 65536"), ([2, -1], "-1 to 2")):
        with pytest.raises(ValueError, match=f"write_bin: tokens {found}, need 0 to 65535"):
            common.write_bin(file, [tokens])


def test_a_failed_run_leaves_the_previous_data_set(tmp_path):
    good = {"tokenizer": "char", "vocab_size": 3, "chars": "abc"}
    common.write_dataset(tmp_path, [[0, 1]], [[2]], **good)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["meta.json", "train.bin", "val.bin"]
    for train, val in (([[0], [70000]], [[1]]), ([[1, 1]], [[70000]]), ([[1, 1]], [])):
        with pytest.raises(ValueError, match="need"):
            common.write_dataset(tmp_path, train, val, **good)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fetch_verifies_and_caches(tmp_path):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    sha256 = hashlib.sha256(b"right").hexdigest()
    for content in (b"right", b"wrong"):  # the second time the file exists, so it is not downloaded
        source.write_bytes(content)
        assert common.fetch(source.as_uri(), sha256, target).read_bytes() == b"right"
    target.write_bytes(b"stale")
    with pytest.raises(ValueError, match=r"is another text than file:.*; give it by --file, or delete it"):
        common.fetch(source.as_uri(), sha256, target)
    assert target.read_bytes() == b"stale"  # it may be the user's own text
    target.unlink()
    with pytest.raises(ValueError, match=f"has sha256 .*, need {sha256}; give the text by --file"):
        common.fetch(source.as_uri(), sha256, target)
    assert not list(target.parent.iterdir())
    source.unlink()
    with pytest.raises(RuntimeError, match="without network, give the text by --file"):
        common.fetch(source.as_uri(), sha256, target)

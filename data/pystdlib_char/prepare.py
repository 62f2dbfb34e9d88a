"""pystdlib_char: the Python standard library's own source as characters. The default data set: nothing to download.

Text     the .py files of the running Python's standard library, about 10 MB, in the order of their paths, without
         tests, installed or vendored packages, generated tables, and files that describe the machine. Characters other
         than tab, newline and printable ASCII (a few hundred) are dropped, so the vocabulary has 97 on every Python.
Split    by file: every tenth file is validation text.
Cost     about a second, 20 MB of disk. The text depends on the Python version: compare losses only if meta.json has
         the same sha256.
Licence  Python Software Foundation License.
"""

import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_out_dir, encode_chars, parser, run, write_dataset

CHARS = "\t\n" + "".join(map(chr, range(32, 127)))
LEFT_OUT = {
    *("test", "tests", "idle_test", "__phello__"),
    *("site-packages", "dist-packages", "_bundled", "_vendor", "__pycache__"),
    *("encodings", "pydoc_data"),  # generated: 1.4 MB of character maps, 0.7 MB of escaped manual
    *("sitecustomize.py", "usercustomize.py"),
}
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")  # these describe the machine


def source_files(root):
    """The .py files of the standard library at `root` to train on, in the order of their paths."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not LEFT_OUT.intersection(parts) and not any(part.startswith(LEFT_OUT_PREFIXES) for part in parts):
            yield path


def clean(data):
    """The text of a source file in CHARS. Adds a missing last newline."""
    text = data.translate(None, delete=bytes(set(range(256)) - set(CHARS.encode()))).decode("ascii")
    return text if text.endswith("\n") else text + "\n"


def main(argv=None):
    made = parser(__file__, __doc__)
    made.add_argument("--max_bytes", type=int, default=12_000_000, help="stop before the file that exceeds this")
    args = made.parse_args(argv)
    check_out_dir(args)
    texts, size, root = [], 0, Path(sysconfig.get_path("stdlib"))
    for path in source_files(root):
        text = clean(path.read_bytes())
        size += len(text)
        if size > args.max_bytes:
            break
        texts.append(text)
    if len(texts) < 10:
        raise ValueError(f"pystdlib_char: {len(texts)} .py files in {root}, need 10; raise --max_bytes")
    write_dataset(
        args.out_dir,
        (encode_chars(text, CHARS) for number, text in enumerate(texts) if number % 10 != 9),
        (encode_chars(text, CHARS) for text in texts[9::10]),
        tokenizer="char",
        vocab_size=len(CHARS),
        chars=CHARS,
        sha256=hashlib.sha256("".join(texts).encode()).hexdigest(),
        source=f"Python {platform.python_version()} standard library",
        files=len(texts),
    )


if __name__ == "__main__":
    run(main)

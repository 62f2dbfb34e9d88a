"""shakespeare_char: tiny shakespeare as characters.

Text     1.1 MB, 65 characters. The first 90 % is train (1,003,854 tokens), the rest val (111,540).
Cost     a download of 1.1 MB (saved as input.txt) and a second. --file TEXT reads any text on disk instead.
Source   Andrej Karpathy's char-rnn. Shakespeare's plays are in the public domain.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import encode_chars, run, tiny_shakespeare, write_dataset


def main(argv=None):
    out_dir, train, val, meta = tiny_shakespeare(__file__, __doc__, argv)
    chars = "".join(sorted(set(train + val)))
    splits = ([encode_chars(split, chars)] for split in (train, val))
    write_dataset(out_dir, *splits, tokenizer="char", vocab_size=len(chars), chars=chars, **meta)


if __name__ == "__main__":
    run(main)

"""shakespeare: tiny shakespeare in GPT-2 tokens, for finetuning.

Text     1.1 MB. The first 90 % is train (301,966 tokens), the rest val (36,059).
Cost     a download of 1.1 MB (saved as input.txt), tiktoken's vocabulary (1.5 MB) and a second. Without a network,
         --file TEXT reads any text on disk, and TIKTOKEN_CACHE_DIR names a folder with the vocabulary.
Source   Andrej Karpathy's char-rnn. Shakespeare's plays are in the public domain.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import gpt2_encoding, run, tiny_shakespeare, write_dataset


def main(argv=None):
    out_dir, train, val, meta = tiny_shakespeare(__file__, __doc__, argv)
    encoding = gpt2_encoding()
    splits = ([encoding.encode(split, allowed_special="all")] for split in (train, val))
    write_dataset(out_dir, *splits, tokenizer="gpt2", vocab_size=encoding.n_vocab, **meta)


if __name__ == "__main__":
    run(main)

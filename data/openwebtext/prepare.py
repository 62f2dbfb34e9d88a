"""openwebtext: an open reproduction of GPT-2's training text, in GPT-2 tokens. nanoGPT's split, in nanoGPT's order.

Text     8,013,769 web pages, <|endoftext|> after each. train about 9.0e9 tokens (17 GB), val about 4.4e6 (0.05 %).
Cost     a download of over 10 GB, tens of GB in the cache of `datasets`; tokenizing uses every core.
         --input FILE ... reads text from disk instead. This needs no network, no `datasets` and little memory.
Source   Skylion007/openwebtext on the Hugging Face hub (packaging: CC0; the pages are their authors').
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import prepare_documents, run

if __name__ == "__main__":
    run(prepare_documents, __file__, __doc__, ("Skylion007/openwebtext",))

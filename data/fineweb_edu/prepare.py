"""fineweb_edu: educational web pages, the 10-billion-token sample, in GPT-2 tokens.

Text     about 9.7e6 web pages, <|endoftext|> after each. train about 1e10 tokens (20 GB), val 0.05 % of the pages.
Cost     a download and a cache of `datasets` of tens of GB each; tokenizing uses every core.
         --input FILE ... reads text from disk instead. This needs no network, no `datasets` and little memory.
Source   HuggingFaceFW/fineweb-edu, sample-10BT, on the Hugging Face hub (ODC-By 1.0).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import prepare_documents, run

if __name__ == "__main__":
    run(prepare_documents, __file__, __doc__, ("HuggingFaceFW/fineweb-edu", "sample-10BT"))

"""Sample text from a checkpoint. The weights are 2:4 sparse or dense, as they were when it was saved.

python sample.py --out_dir=out-demo --start="def " --num_samples=2
python sample.py --out_dir=out-demo --start=FILE:prompt.txt
python sample.py --init_from=gpt2-xl --start="The answer is"            OpenAI's weights, through transformers
"""

import contextlib
import math
import os
import sys
from pathlib import Path

import torch

import sparse24
from configurator import check_ranges, configure_or_exit, expand, without_removed
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.loader import DATA_FOLDER, load_meta, load_tokenizer, vocabulary_changes
from runtime.settings import DTYPES

# ---- settings ----
out_dir = "out"  # folder of the run
ckpt = "ckpt.pt"  # checkpoint in that folder: ckpt.pt, ckpt_best.pt, ckpt_prev.pt
init_from = "resume"  # resume (load the checkpoint), or gpt2, gpt2-medium, gpt2-large, gpt2-xl
start = "\n"  # the prompt; FILE:prompt.txt reads it from a file
num_samples = 3
max_new_tokens = 500  # tokens per sample
temperature = 0.8  # 1 = the model's probabilities; 0 = always the likeliest token
top_k: int | None = 200  # sample among the k likeliest tokens; None = among all tokens
seed = 1337
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto (bfloat16 on GPUs that support it, else float32), float32, bfloat16, float16
# ---- end of settings ----
RANGES = {
    "num_samples": (1, math.inf), "max_new_tokens": (0, math.inf), "temperature": (0, math.inf), "top_k": (1, math.inf),
    "seed": (0, 2**64 - 1),
}  # fmt: skip


def load_model() -> tuple[GPT, dict]:
    """The model, on the CPU, and the vocabulary that it was trained with."""
    if init_from != "resume":
        return GPT.from_pretrained(init_from), {"tokenizer": "gpt2", "vocab_size": 50257}
    path = Path(out_dir) / ckpt
    state = checkpoint.load(path, sparse24.PATTERNS_HASH)
    config, model_args = (without_removed(state[key], path) for key in ("config", "model_args"))
    model = GPT(GPTConfig(**model_args), sparse24.recipe_of(config))
    model.load_state_dict(state["model"])
    folder = DATA_FOLDER / config["dataset"]
    meta = state.get("data") or load_meta(folder)  # checkpoints of earlier releases have no `data`
    with contextlib.suppress(ValueError, OSError):  # the dataset may be damaged
        if (folder / "train.bin").exists() and vocabulary_changes(meta, load_meta(folder)):
            print(f"{folder} has another vocabulary than the run had: using the checkpoint's")
    if meta["vocab_size"] > model.config.vocab_size:
        sizes = f"now has {meta['vocab_size']} tokens, but the checkpoint has {model.config.vocab_size}"
        raise ValueError(f"dataset {config['dataset']} {sizes}; prepare the dataset that the run was trained on")
    layers = sparse24.sparse_linears(model)
    phase = f"{sum(layer.sparse for layer in layers)} of {len(layers)} sparse linears in the 2:4 phase"
    print(f"{path}: iteration {state['iter_num']}, {phase}")
    return model, meta


def print_samples() -> None:
    check_ranges(globals(), RANGES)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r}, need one of auto, {', '.join(DTYPES)}")
    run_device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=run_device)
        generator = torch.Generator(run_device).manual_seed(seed)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used: {error}; use --device=cpu") from error
    has_bfloat16 = run_device.startswith("cuda") and torch.cuda.is_bf16_supported()
    run_dtype = ("bfloat16" if has_bfloat16 else "float32") if dtype == "auto" else dtype
    autocast = torch.autocast(generator.device.type, DTYPES[run_dtype], enabled=run_dtype != "float32")
    prompt = Path(expand(start[5:])).read_text(encoding="utf-8-sig") if start.startswith("FILE:") else start
    model, meta = load_model()
    encode, decode = load_tokenizer(meta)
    tokens = encode(prompt)
    if not tokens:
        raise ValueError("start is empty, need at least one character; the default is a newline")
    model = model.to(run_device).eval()
    idx = torch.tensor([tokens], device=run_device)
    divisor = temperature if temperature > 1e-30 else 0  # logits / 1e-40 overflow
    for _ in range(num_samples):
        with autocast:
            out = model.generate(idx, max_new_tokens, divisor, top_k, generator)
        print(decode(out[0].tolist()), "---------------", sep="\n", flush=True)


def main() -> None:
    try:
        globals().update(configure_or_exit(globals(), sys.argv[1:]))
        print_samples()
    except BrokenPipeError:  # the reader has left, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it ends
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    except (ValueError, OSError, ImportError, RuntimeError, checkpoint.CheckpointError) as error:
        sys.exit(f"sample.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it was closed at the start
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack a character of the text
    main()

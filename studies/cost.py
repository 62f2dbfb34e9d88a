"""The cost of a training step of a study's variant: its FLOPs, its predicted time (roofline.py) or its measured time.

A step's cost is the mean over the phases of a run. Use only ratios of costs.
"""

import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import roofline
from benchmarks.steps import gpt2
from configurator import configure
from model import GPT, GPTConfig
from runtime.metrics import read_config, read_metrics
from sparse24 import SETTINGS, Recipe, Sparse24Linear, get_recipe
from studies.grids import words

# Sequences per micro-batch, which fit on a card, and micro-batches per step: 524,288 tokens, as the paper and GPT-2.
MICRO_BATCH, ACCUMULATION = 16, 32
GPU, SIZE = "h200", "774M"  # the GPU and the GPT-2 of predicted times


def fitted(defaults: dict, settings: str) -> dict:
    """`defaults`, updated by the entries of `settings` with the same names."""
    return defaults | configure(defaults, [f"--{k}={v}" for k, v in words(settings).items() if k in defaults])


def is_dense(settings: str) -> bool:
    return words(settings).get("sparse", "none") == "none"


def _recipe(settings: str) -> Recipe:
    recipe = get_recipe(words(settings)["sparse"])
    return replace(recipe, **fitted({name: getattr(recipe, name) for name in SETTINGS}, settings))


def switches_by_itself(settings: str) -> bool:
    """True if the optimizer ends the dense start, as in STEP. Then a step's mean cost is unknown before the run."""
    return not is_dense(settings) and _recipe(settings).dense_pretrain_latest > 0


def recipe_of(settings: str) -> Recipe | None:
    """The recipe of these settings; None for a dense run. Raises ValueError if the dense phase has no known length."""
    if switches_by_itself(settings):
        raise ValueError(f"{settings}: equal cost needs a dense phase of known length")
    return None if is_dense(settings) else _recipe(settings)


def sparse_gemms(recipe: Recipe) -> list[str]:
    """The GEMMs of a feed-forward layer that have a 2:4 operand. dX needs weights pruned along the outputs."""
    layer = recipe.layer or Sparse24Linear
    backward_mask = layer.backward_mask is not Sparse24Linear.backward_mask  # the method overrides it
    both = recipe.mask == "transposable" or backward_mask
    return ["z", "y", *(["da", "dx"] if both else []), *(["dw1", "dw2"] if recipe.mvue else [])]


def sparse_share(recipe: Recipe) -> float:
    return 1 - recipe.dense_finetune - recipe.dense_pretrain


def flops_of(settings: str, vocab_size: int) -> float:
    """Matmul FLOPs per token as GPT.flops_per_token counts them, mean over the phases. A 2:4 GEMM counts as half."""
    padded = vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64
    config = GPTConfig(**fitted(asdict(GPTConfig(vocab_size=padded)), settings))
    with torch.device("meta"):
        total = GPT(replace(config, sparse="none")).flops_per_token()
    recipe = recipe_of(settings)
    if recipe is None:
        return total
    gemms = roofline.gemm_flops(config.n_embd, config.d_ff, 1, config.activation)
    return total - sparse_share(recipe) * config.n_layer * sum(gemms[name] for name in sparse_gemms(recipe)) / 2


def predicted_ms(settings: str, ratio: float) -> float:
    """Milliseconds of a step of GPT-2 SIZE on GPU with the recipe and d_ff ratio of `settings`, mean over the phases.

    ratio: dense over 2:4 time of a GEMM. In each micro-step the gradient of soft weights (not the straight-through one)
    reads the weights and dW and writes dW, all in fp32."""
    shape = " ".join(f"{name}={v}" for name, v in words(settings).items() if name in ("ffn_ratio", "activation"))
    config = GPTConfig(**fitted(asdict(gpt2(SIZE)), shape))
    recipe, card = recipe_of(settings), roofline.GPUS[GPU]
    dense = roofline.predict_step(card, config, MICRO_BATCH, None, ACCUMULATION)["ms"]
    if recipe is None:
        return dense
    options = {"ratio": dict.fromkeys(sparse_gemms(recipe), ratio), "mvue": recipe.mvue}
    options["mask_interval"] = recipe.mask_interval
    sparse = roofline.predict_step(card, config, MICRO_BATCH, options, ACCUMULATION)["ms"]
    if recipe.mask == "soft" and recipe.weight_gradient != "straight":
        weights = config.n_layer * roofline.ffn_weights(config.n_embd, config.d_ff, config.activation)
        sparse += 1e3 * ACCUMULATION * 12 * weights / card.bandwidth
    return dense + sparse_share(recipe) * (sparse - dense)


def measured_ms(folder: Path, settings: str) -> float:
    """Milliseconds of a step of a run, mean over the phases. A phase's time is the median of its rows. The first row,
    which includes compilation, does not count."""
    config, recipe = read_config(folder), recipe_of(settings)
    tokens = config["batch_size"] * config["block_size"] * config["gradient_accumulation_steps"]
    share = {"sparse": sparse_share(recipe) if recipe else 0.0}
    share["dense"] = 1 - share["sparse"]
    total = 0.0
    for phase in (phase for phase in share if share[phase] > 1e-9):
        rows = [row for row in read_metrics(folder) if row["phase"] == phase and row["tokens_per_s"]][1:]
        if not rows:
            raise ValueError(f"{folder} has too few {phase} rows; give --calibrate more iterations")
        total += share[phase] * 1e3 * tokens / statistics.median(row["tokens_per_s"] for row in rows)
    return total

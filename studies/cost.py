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
from gemm24 import plan
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


def recipe_of(settings: str) -> Recipe | None:
    """The recipe of these settings; None for a dense run."""
    name = words(settings).get("sparse", "none")
    if name == "none":
        return None
    recipe = get_recipe(name)
    return replace(recipe, **fitted({name: getattr(recipe, name) for name in SETTINGS}, settings))


def switches_by_itself(settings: str) -> bool:
    """True if the optimizer ends the dense start, as in STEP. Then a step's mean cost is unknown before the run."""
    recipe = recipe_of(settings)
    return recipe is not None and recipe.dense_pretrain_latest > 0


def has_known_flops(settings: str) -> bool:
    """False for vnm: the products of a tile have fewer hidden units, which sparse_gemms cannot say."""
    recipe = recipe_of(settings)
    return recipe is None or recipe.ffn is None or recipe.activations24


def sparse_gemms(recipe: Recipe) -> list[str]:
    """The GEMMs of a feed-forward layer that have a 2:4 operand, also by a second mask for dX."""
    gemms, layer = [*plan.sparse_gemms(recipe)], recipe.layer
    if isinstance(layer, type) and layer.backward_mask is not Sparse24Linear.backward_mask:
        gemms += ["da", "dx"]
    return gemms


def sparse_share(recipe: Recipe) -> float:
    """The share of sparse steps. Raises ValueError if the optimizer ends the dense start, as in STEP."""
    if recipe.dense_pretrain_latest > 0:
        raise ValueError(f"sparse={recipe.name}: equal cost needs a dense phase of known length")
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
    config = GPTConfig(**fitted(asdict(gpt2(SIZE)), settings))
    recipe, card = recipe_of(settings), roofline.GPUS[GPU]
    dense = roofline.predict_step(card, config, MICRO_BATCH, None, ACCUMULATION)["ms"]
    if recipe is None:
        return dense
    ratios = dict.fromkeys(sparse_gemms(recipe), ratio)
    options = roofline.options_of(recipe, ratios)
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
    sparse, total = sparse_share(recipe) if recipe else 0.0, 0.0
    for phase, share in (("sparse", sparse), ("dense", 1 - sparse)):
        if share < 1e-9:  # rounding of 1 - sparse
            continue
        rows = [row for row in read_metrics(folder) if row["phase"] == phase and row["tokens_per_s"]][1:]
        if not rows:
            raise ValueError(f"{folder} has too few {phase} rows; give --calibrate more iterations")
        total += share * 1e3 * tokens / statistics.median(row["tokens_per_s"] for row in rows)
    return total

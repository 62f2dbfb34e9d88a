"""S_model reproduces a table that was computed by hand, and counts that a reader can redo."""

import pytest

from benchmarks import roofline
from benchmarks.roofline import GPU, GPUS
from model import GPT, PEAK_TFLOPS, PRESETS, GPTConfig

NOTED = GPU(790e12, 4.3e12)
# FFN d -> 4d -> d with GELU, 16384 tokens, pruned and packed every step: S at three ratios.
TABLE = {
    768: {2: 1.60, 1.5: 1.31, 1.25: 1.14},
    1024: {2: 1.67, 1.5: 1.34, 1.25: 1.16},
    1280: {2: 1.71, 1.5: 1.36, 1.25: 1.17},
    1600: {2: 1.75, 1.5: 1.38, 1.25: 1.18},
}


@pytest.mark.parametrize("d", list(TABLE))
def test_s_model_is_the_table(d):
    for ratio, s in TABLE[d].items():
        found = roofline.s_model(NOTED, d, 4 * d, 16384, recompute=False, ratio=ratio)
        assert found == pytest.approx(s, abs=0.006), ratio


@pytest.mark.parametrize(("d", "s"), [(768, 1.17), (1024, 1.19), (1280, 1.21), (1600, 1.22)])
def test_two_of_three_gemms_sparse(d, s):
    four = dict.fromkeys(("z", "y", "da", "dx"), 1.5)
    assert roofline.s_model(NOTED, d, 4 * d, 16384, recompute=False, ratio=four) == pytest.approx(s, abs=0.01)
    without = roofline.s_model(NOTED, d, 4 * d, 16384, recompute=False, ratio=four, mvue=False)
    assert without > s  # dense weight gradients need no MVUE


def test_times_of_the_table():
    """d = 768: 0.464 TFLOP, 0.587 ms dense, 117 us of elementwise work, 22 us of MVUE, 7 us of packing."""
    flops = roofline.gemm_flops(768, 3072, 16384, "gelu")
    assert sum(flops.values()) == 48 * 16384 * 768**2 == pytest.approx(0.464e12, rel=1e-3)
    assert roofline.gemm_seconds(NOTED, flops) == pytest.approx(0.587e-3, rel=1e-3)
    assert roofline.activation_bytes(3072, 16384, "gelu", recompute=False) == 40 * 768 * 16384
    assert roofline.activation_bytes(3072, 16384, "gelu") == 56 * 768 * 16384  # 16 more to recompute A
    assert roofline.mvue_bytes(768, 3072, 16384, "gelu") == 7.625 * 768 * 16384
    assert roofline.activation_bytes(3072, 16384, "gelu", fused=True) == 48 * 768 * 16384  # written beside dZ
    assert roofline.pack_bytes(8 * 768**2) == pytest.approx(51 * 768**2, rel=0.04)
    assert roofline.pack_bytes(16, mask_interval=10) == 97 + 6.9


def test_bytes_of_2_4_activations():
    """Forward 2 + 2 x 1.125, backward 4 + 2 x 1.125; dense moves 12. Soft weights add their packing."""
    assert roofline.activations24_bytes(3072, 64) == 10.5 * 3072 * 64
    assert roofline.activations24_bytes(3072, 64, mvue=False) == 12.25 * 3072 * 64
    slow, shape = GPU(float("inf"), 1.0), (768, 3072, 64, "relu2")
    options = {"ratio": 2.0, "activations": True, "weights": False}
    assert roofline.ffn_seconds(slow, *shape, None) == 12 * 3072 * 64
    assert roofline.ffn_seconds(slow, *shape, options) == 10.5 * 3072 * 64
    soft = roofline.ffn_seconds(slow, *shape, options | {"weights": True})
    assert soft == 10.5 * 3072 * 64 + 5.625 * 2 * 768 * 3072


@pytest.mark.parametrize(
    ("size", "s", "act24"), [("774M", 1.25, 1.07), ("774M", 1.5, 1.115), ("774M", 1.75, 1.15), ("1558M", 1.5, 1.125)]
)
def test_a_step_with_2_4_activations(size, s, act24):
    """524,288 tokens a step on one H200; four of six GEMMs are s times as fast."""
    four = {"ratio": dict.fromkeys(("y", "dx", "dw1", "dw2"), s), "activations": True, "weights": False}
    config = GPTConfig(**PRESETS[size], activation="relu2")
    dense, sparse = (roofline.predict_step(GPUS["h200"], config, 16, one, 32) for one in (None, four))
    assert dense["ms"] / sparse["ms"] == pytest.approx(act24, abs=0.004)
    assert dense["parts"]["casts"] == sparse["parts"]["casts"]  # the weights are dense


def test_gated_counts():
    """With 2/3 of the hidden width a gated layer has the same weights and FLOPs; 16 bytes per hidden element."""
    ungated, gated = (roofline.gemm_flops(*shape) for shape in ((768, 3072, 64, "relu2"), (768, 2048, 64, "swiglu")))
    assert sum(ungated.values()) == sum(gated.values())
    assert gated["z"] == gated["dx"] == gated["dw1"] == 2 * gated["y"]
    assert roofline.ffn_weights(768, 3072, "gelu") == roofline.ffn_weights(768, 2048, "geglu")
    assert roofline.activation_bytes(2048, 64, "geglu", recompute=False) == 16 * 2048 * 64
    assert roofline.activation_bytes(2048, 64, "geglu") == 22 * 2048 * 64
    assert roofline.mvue_bytes(768, 2048, 64, "geglu") == 64 * (768 * 3.125 + 4096 * 1.125)


def test_assumed_rates_are_shares_of_the_data_sheets():
    assert GPUS["h200"].flops == pytest.approx(NOTED.flops, rel=0.01)
    assert GPUS["h200"].bandwidth == pytest.approx(NOTED.bandwidth, rel=0.01)
    for name, gpu in GPUS.items():
        assert gpu.flops == pytest.approx(0.8e12 * PEAK_TFLOPS[name.upper()])


@pytest.mark.parametrize("gpu", list(GPUS))
def test_block_and_step_gain_less_than_the_layer(gpu):
    ffn = roofline.s_model(GPUS[gpu], 1024, 4096, 16384, ratio=2.0)
    block = roofline.block_s_model(GPUS[gpu], 1024, 4096, 16384, 1024, ratio=2.0)
    config = GPTConfig(**PRESETS["350M"])
    dense, sparse = (roofline.predict_step(GPUS[gpu], config, 16, s) for s in (None, {"ratio": 2.0}))
    assert 1 < dense["ms"] / sparse["ms"] < block < ffn < 2
    assert sparse["tokens_per_s"] == pytest.approx(16 * 1024e3 / sparse["ms"])
    assert sum(sparse["parts"].values()) == sparse["ms"]
    assert {name for name in dense["parts"] if dense["parts"][name] != sparse["parts"][name]} == {"blocks", "casts"}


def test_longer_sequences_gain_less_and_accumulation_gains_more():
    block = [roofline.block_s_model(GPUS["h200"], 1024, 4096, 16384, n) for n in (512, 1024, 2048)]
    assert block[0] > block[1] > block[2]
    assert roofline.s_model(NOTED, 768, 3072, 4096, accumulation=8) > roofline.s_model(NOTED, 768, 3072, 4096)
    once, often = (roofline.predict_step(GPUS["h200"], GPTConfig(), 4, {"ratio": 2.0}, g) for g in (1, 8))
    assert often["ms"] < 8 * once["ms"]
    assert often["tokens_per_s"] > once["tokens_per_s"]


def test_nothing_but_gemms_is_the_ratio_itself():
    """With unlimited bandwidth only FLOPs count. The step has those of GPT.flops_per_token, except that here
    attention is halved for causality and has a lower rate."""
    fast = GPU(1e12, float("inf"))
    assert roofline.s_model(fast, 768, 3072, 1024, ratio=1.7) == pytest.approx(1.7)
    config = GPTConfig(vocab_size=64, block_size=32, bias=False, **PRESETS["124M"])
    step = roofline.predict_step(fast, config, 2)
    attention = 12 * 12 * 768 * 32
    exact = GPT(config).flops_per_token() - attention + attention / 12 * 7 / roofline.FLASH_SHARE
    assert step["ms"] * 1e-3 * fast.flops == pytest.approx(exact * 64, rel=1e-6)


def test_bytes_of_a_step_by_hand():
    """On a GPU whose GEMMs take no time and that copies 1000 B/s, milliseconds are bytes: two micro-batches."""
    slow, tokens, d, vocab = GPU(float("inf"), 1e3), 2 * 32, 64, 128
    config = GPTConfig(n_layer=3, n_head=1, n_embd=d, vocab_size=vocab, block_size=32)
    dense, sparse = (roofline.predict_step(slow, config, 2, s, 2)["parts"] for s in (None, {"ratio": 2.0}))
    matrices = 3 * 12 * d**2 + vocab * d
    parameters = matrices + 32 * d
    layer = 48 + 2 * (12 + 16) + 12  # bytes per token and width: the feed-forward layer, two residual norms, q, k, v
    packing = 8 * d**2 * (97 + 69 / 40) / 16 / 2  # once for both
    assert dense == pytest.approx(
        {
            "blocks": 2 * 3 * layer * tokens * d,
            "lm_head": 0,
            "cross_entropy": 2 * 8 * tokens * vocab,
            "embeddings_and_last_norm": 2 * 52 * tokens * d,
            "casts": 2 * 12 * matrices + 12 * parameters,
            "clip": 12 * parameters,
            "optimizer": 28 * parameters,
        }
    )
    assert sparse["blocks"] == pytest.approx(2 * 3 * ((layer + 8 + 7.625) * tokens * d + packing))
    assert dense["casts"] - sparse["casts"] == 2 * 6 * 3 * 8 * d**2

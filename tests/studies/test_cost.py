"""The cost of a step: FLOPs by hand, times by the roofline."""

import pytest

from benchmarks import roofline
from model import PRESETS, GPTConfig
from studies import cost, grids
from studies.grids import FST

CPU = grids.PRESETS["cpu"]


def share(settings):
    return cost.flops_of(f"{CPU} {settings}", 65) / cost.flops_of(CPU, 65)


def test_flops_by_hand():
    """4 blocks of 12 d^2 weights, of which 8 d^2 are the feed-forward layer's, and lm_head; attention's products."""
    d, total = 64, 6 * (4 * 12 * 64**2 + 65 * 64) + 12 * 4 * 64 * 64
    ffn = 6 * 4 * 8 * d**2
    gemm = ffn / 6
    assert cost.flops_of(CPU, 65) == total
    assert share("sparse=none ffn_ratio=2") == pytest.approx(1 - ffn / 2 / total)
    assert share("sparse=fst dense_finetune=0") == pytest.approx(1 - ffn / 2 / total)
    assert share(FST) == pytest.approx(1 - 5 / 6 * ffn / 2 / total)
    assert share(f"{FST} dense_pretrain=0.5") == pytest.approx(1 - 1 / 3 * ffn / 2 / total)
    for name, sparse_gemms in (("ste", 4), ("sr_ste", 2), ("bi_mask", 4), ("s_ste", 4), ("act24", 4 * 0.95)):
        assert share(f"sparse={name}") == pytest.approx(1 - sparse_gemms * gemm / 2 / total), name
    assert share("sparse=s_ste ffn_ratio=8") == pytest.approx((total + ffn - 8 * gemm / 2) / total)
    assert cost.flops_of(CPU, 50257) - total == 6 * 64 * (50304 - 65)  # the vocabulary is padded
    with pytest.raises(ValueError, match="equal cost needs a dense phase of known length"):
        cost.flops_of(f"{CPU} sparse=step", 65)


def test_predicted_times_are_rooflines():
    card = roofline.GPUS["h200"]

    def step(ffn_ratio, activation="gelu", **sparse):
        config = GPTConfig(**PRESETS["774M"], ffn_ratio=ffn_ratio, activation=activation)
        return roofline.predict_step(card, config, 16, sparse or None, 32)["ms"]

    assert cost.predicted_ms("sparse=none activation=swiglu", 1.5) == step(4, "swiglu")
    assert cost.predicted_ms("sparse=none", 1.5) == step(4)
    assert cost.predicted_ms("sparse=none ffn_ratio=8", 1.5) == step(8)
    fst = step(8) / 6 + step(8, ratio=1.5, mask_interval=40) * 5 / 6
    assert cost.predicted_ms(f"{FST} ffn_ratio=8", 1.5) == pytest.approx(fst)
    soft = step(4, ratio=dict.fromkeys(("z", "y", "dw1", "dw2"), 2.0), mask_interval=1, mvue=True)
    assert cost.predicted_ms("sparse=s_ste_straight", 2.0) == pytest.approx(soft)
    jacobian = 32 * 36 * 2 * 1280 * 5120 * 12 / card.bandwidth * 1e3  # two fp32 reads, one write
    assert cost.predicted_ms("sparse=s_ste", 2.0) == pytest.approx(soft + jacobian)
    row = step(4, ratio=dict.fromkeys(("z", "y"), 2.0), mask_interval=1, mvue=False)
    assert cost.predicted_ms("sparse=sr_ste", 2.0) == pytest.approx(row)


@pytest.mark.parametrize(("name", "expected"), [("act24", (1.07, 1.115, 1.15)), ("act24_soft", (1.087, 1.159, 1.217))])
def test_predicted_times_of_2_4_activations(name, expected):
    """Times of dense relu2 over those of the sparse phase, at the three ratios of 2:4 GEMMs."""
    settings = f"sparse={name} activation=relu2 dense_pretrain=0"
    for ratio, s in zip((1.25, 1.5, 1.75), expected, strict=True):
        found = cost.predicted_ms("sparse=none activation=relu2", ratio) / cost.predicted_ms(settings, ratio)
        assert found == pytest.approx(s, abs=0.002), ratio


def test_step_times_are_read_from_a_run_by_phase(tmp_path, write_run):
    """8 tokens a step: 4000, 5000, 8000 tokens/s are 2, 1.6 and 1 ms; the first row of a phase includes compilation."""
    speeds = {"sparse": (1, 4000, 5000, 5000), "dense": (2, 8000, 8000)}
    rows = [{"iter": 0, "phase": phase, "tokens_per_s": v} for phase, values in speeds.items() for v in values]
    config = {"batch_size": 2, "block_size": 2, "gradient_accumulation_steps": 2}
    folder = write_run(tmp_path, rows, **config)
    assert cost.measured_ms(folder, FST) == pytest.approx(5 / 6 * 1.6 + 1 / 6)
    assert cost.measured_ms(folder, "sparse=none") == pytest.approx(1)
    with pytest.raises(ValueError, match="too few sparse rows; give --calibrate more iterations"):
        cost.measured_ms(write_run(tmp_path, rows[:1], **config), FST)


def test_the_flops_of_routed_units_are_not_counted():
    known = {name: cost.has_known_flops(f"sparse={name}") for name in ("none", "fst", "act24", "act24_soft", "vnm")}
    assert known == {"none": True, "fst": True, "act24": True, "act24_soft": True, "vnm": False}

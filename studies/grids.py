"""The grids of compare.py: the settings that all runs of a preset share, and the variants of each study."""

from dataclasses import dataclass, replace

# cpu: nanoGPT's CPU recipe, but with width 64, learning rate 3e-3 and 2500 iterations, where methods differ visibly.
# It evaluates on the full validation split, so that there is no evaluation noise.
PRESETS = {
    "cpu": (
        "n_layer=4 n_head=4 n_embd=64 block_size=64 batch_size=12 gradient_accumulation_steps=1 dropout=0.0 bias=False "
        "learning_rate=3e-3 min_lr=3e-4 warmup_iters=100 max_iters=2500 lr_decay_iters=2500 beta2=0.99 "
        "eval_interval=0 eval_iters=0 flip_interval=50 checkpoint_interval=500 log_interval=100 "
        "device=cpu dtype=float32"
    ),
    "gpu": (
        "n_layer=12 n_head=12 n_embd=768 block_size=1024 batch_size=32 gradient_accumulation_steps=1 dropout=0.0 "
        "bias=False learning_rate=6e-4 min_lr=6e-5 warmup_iters=100 max_iters=1200 lr_decay_iters=1200 beta2=0.95 "
        "eval_interval=0 eval_iters=32 flip_interval=20 checkpoint_interval=100000 log_interval=10 device=cuda"
    ),
}
# fst's decay factor. cpu: the best on shakespeare_char with seeds 1 to 3 (results/decay.md). gpu: the paper's
DECAY = {"cpu": "2e-3", "gpu": "6e-5"}
FST = f"sparse=fst masked_decay={DECAY['cpu']} mask_interval=40"
DECAYS = ("0", "6e-5", "2e-4", "6e-4", "2e-3", "6e-3", "2e-2")

# The seed on which compare.py --lr chooses learning rates. The text is the study's own: Tiny Shakespeare's best rate of
# dense relu2, 1.2e-2, was too high for WikiText-2.
TUNING_SEED = 0
# torch.compile fuses the many small operations of these methods, which makes their runs half as long on a CPU
RELU2 = "activation=relu2 compile=True"

STRAIGHT = "sparse=s_ste_straight"  # the paper's gradient; s_ste has the true one


@dataclass(frozen=True)
class Study:
    """variants: {label: settings on top of a preset}. Differences are taken from each reference, within each seed."""

    variants: dict[str, str]
    references: tuple[str, ...] = ("dense",)


def with_decay(study: Study, decay: str) -> Study:
    """The study with `decay` wherever fst has the decay factor of the cpu preset."""
    other = FST.replace(DECAY["cpu"], decay)
    return replace(study, variants={label: text.replace(FST, other) for label, text in study.variants.items()})


STUDIES = {
    "convergence": Study(
        {
            "dense": "sparse=none",
            "half": "sparse=none ffn_ratio=2",
            "ste": "sparse=ste",
            "fst": "sparse=fst masked_decay=2e-4",
            "fst, no MVUE, no dense phase": "sparse=fst masked_decay=2e-4 mvue=False dense_finetune=0",
        },
        ("dense", "ste"),
    ),
    "methods": Study(
        {"dense": "sparse=none", "half": "sparse=none ffn_ratio=2", "fst": FST}
        | {name: f"sparse={name}" for name in ("ste", "sr_ste", "step", "bi_mask", "s_ste")}
        | {"s_ste, straight through": STRAIGHT},
        ("dense", "half"),
    ),
    # The paper's Table 7: masked decay, MVUE, dense fine-tuning
    "table7": Study(
        {
            "dense": "sparse=none",
            "decay no, MVUE no, dense end no": f"{FST} masked_decay=0 mvue=False dense_finetune=0",
            "decay yes, MVUE no, dense end no": f"{FST} mvue=False dense_finetune=0",
            "decay yes, MVUE yes, dense end no": f"{FST} dense_finetune=0",
            "decay yes, MVUE no, dense end yes": f"{FST} mvue=False",
            "decay yes, MVUE yes, dense end yes": FST,
        },
        ("dense", "decay yes, MVUE no, dense end no", "decay yes, MVUE yes, dense end yes"),
    ),
    # The paper's Figure 3, dense steps last or first, and mask intervals
    "phases": Study(
        {
            "dense": "sparse=none",
            "fst, last 1/6 dense": FST,
            "fst, last 1/3 dense": f"{FST} dense_finetune=0.3333333",
            "fst, last 1/2 dense": f"{FST} dense_finetune=0.5",
            "fst, first 1/6 dense": f"{FST} dense_finetune=0 dense_pretrain=0.1666667",
            "fst, first 1/3 dense": f"{FST} dense_finetune=0 dense_pretrain=0.3333333",
            "fst, first 1/2 dense": f"{FST} dense_finetune=0 dense_pretrain=0.5",
            "fst, first and last 1/6 dense": f"{FST} dense_pretrain=0.1666667",
        }
        | {f"fst, masks every {n}": f"{FST} mask_interval={n}" for n in (1, 10, 100)},
        ("dense", "fst, last 1/6 dense"),
    ),
    # 2:4 activations, and routed hidden units, against dense relu2. Use it with --lr
    "act24": Study(
        {
            "dense": f"sparse=none {RELU2}",
            "dense, gelu": "sparse=none compile=True",
            "half": f"sparse=none ffn_ratio=2 {RELU2}",
            "act24": f"sparse=act24 {RELU2}",
            "act24, soft weights": f"sparse=act24_soft {RELU2}",
            "vnm, half of the units": f"sparse=vnm {RELU2}",
            "vnm, a quarter of the units": f"sparse=vnm_quarter {RELU2}",
        },
        ("dense", "half"),
    ),
    "equal_cost": Study(
        {
            "dense": "sparse=none",
            "half": "sparse=none ffn_ratio=2",
            "fst": FST,
            "s_ste": "sparse=s_ste",
            "s_ste, straight through": STRAIGHT,
            # A step costs about as much as a dense one: fst 5d in time, s_ste 6d in FLOPs, fst 6d in between
            "fst, d_ff 5d": f"{FST} ffn_ratio=5",
            "fst, d_ff 6d": f"{FST} ffn_ratio=6",
            "s_ste, d_ff 6d": "sparse=s_ste ffn_ratio=6",
        },
        ("dense", "half"),
    ),
    "quality": Study(
        {
            "fst": FST,  # exact MVUE
            "fst, dense dW": f"{FST} mvue=False",
            "s_ste": "sparse=s_ste",
            "s_ste, straight through": STRAIGHT,
            "s_ste, straight, last 1/6 dense": f"{STRAIGHT} dense_finetune=0.1666667",
        },
        ("fst", "s_ste, straight through"),
    ),
    # Section 4.3: is mu of the best decay factor inside the band?
    "decay": Study(
        {"dense": "sparse=none"} | {f"fst, decay {decay}": f"{FST} masked_decay={decay}" for decay in DECAYS}
    ),
    "flip_rate": Study(
        {"dense": "sparse=none"}
        | {
            f"lambda {decay}": f"sparse=fst masked_decay={decay} mask_interval=1 mvue=False dense_finetune=0"
            for decay in ("0", "2e-4", "2e-3", "2e-2")
        }
    ),
}
FLIP_COMMON = (  # the first 311 iterations of nanoGPT's CPU recipe, with its schedule for 1000
    f"{PRESETS['cpu']} n_embd=128 learning_rate=1e-3 min_lr=1e-4 lr_decay_iters=1000 max_iters=311 "
    "flip_interval=1 eval_interval=0 eval_iters=20"
)
WINDOWS = (150, 200, 250, 300)  # centres t0 of windows of 20 iterations


def words(settings: str) -> dict[str, str]:
    """{name: value} of "name=value ..."; the last value of a name counts."""
    return dict(word.split("=", 1) for word in settings.split())

"""S_model: predict the time of a feed-forward layer, a block and a training step, dense and 2:4, by counting.

A time is the FLOPs of the GEMMs over the rate that dense GEMMs reach, plus the bytes of everything else over the speed
of a copy. Sparse GEMMs take 1/ratio of the dense time; the hardware promises a ratio of 2. The model assumes that
nothing overlaps, that launches and the host are free, and that every GEMM reaches the full rate, which small widths do
not. Each of these counts as one pass:

    feed-forward    2-byte activations, read and written once by the activation and by its backward. With `recompute`
                    the backward computes A from Z, since neither path stores A; dense fuses that with dZ, and only
                    writes A. Layers and blocks leave out autocast's casts. Sparse adds the bytes of MVUE and, once per
                    optimizer step, the read of the master weights and the writes of both packed forms (W and W^T).
                    2:4 activations (methods/act24.py) are written packed, along features and along tokens, in place of
                    A and dZ: 10.5 bytes per hidden element against dense's 12. Their weights are cast, or thresholded,
                    as dense ones; soft weights are packed in each micro-step.
    block           attention's two linears, causal attention (half of the square; the backward costs 2.5 forwards), the
                    residual additions with their LayerNorms (fp32 stream), the concatenated gradient of q, k, v.
    step            blocks, embeddings, lm_head, cross-entropy, autocast's casts of weights and gradients, clip, AdamW.

Units are seconds, bytes and FLOPs; d = width, d_ff = hidden width, tokens = number of tokens.
"""

from dataclasses import dataclass

from gemm24.operands import GATED
from model import PEAK_TFLOPS, GPTConfig
from sparse24 import Recipe

GEMM_SHARE, COPY_SHARE = 0.8, 0.9
FLASH_SHARE = 0.5  # assumed rate of attention over that of GEMMs
GEMMS = ("z", "y", "da", "dx", "dw1", "dw2")  # forward, input gradients, weight gradients
PACKED = 1.125  # bytes of a packed 2:4 operand per dense element: half of the bf16 values, and 4 bits per group


@dataclass(frozen=True)
class GPU:
    """FLOP/s that dense bf16 GEMMs reach, and bytes/s, reads plus writes, that a copy reaches."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Card:
    """A GPU (SXM) by NVIDIA's data sheet. model.PEAK_TFLOPS has its dense bf16 rate."""

    tb_per_s: float  # memory bandwidth
    capability: int
    sms: int
    ghz: float  # assumed

    @property
    def lanes_per_ps(self) -> float:
        """Lane-instructions issued per picosecond."""
        return self.sms * 128 * self.ghz / 1000


CARDS = {
    "a100": Card(2.04, 80, 108, 1.41),
    "h100": Card(3.35, 90, 132, 1.75),
    "h200": Card(4.8, 90, 132, 1.75),
    "b200": Card(8.0, 100, 148, 1.85),
}
# Assumed rates, as shares of the data sheets. A measured GPU(...) can replace any of these.
GPUS = {
    name: GPU(PEAK_TFLOPS[name.upper()] * 1e12 * GEMM_SHARE, card.tb_per_s * 1e12 * COPY_SHARE)
    for name, card in CARDS.items()
}


def gemm_flops(d: int, d_ff: int, tokens: int, activation: str) -> dict[str, float]:
    """FLOPs of the six GEMMs of one feed-forward layer. A gated activation doubles the rows of the first matrix."""
    first = 2 * d_ff if activation in GATED else d_ff
    return {name: 2.0 * tokens * d * (first if name in ("z", "dx", "dw1") else d_ff) for name in GEMMS}


def gemm_seconds(gpu: GPU, flops: dict[str, float], ratio=1.0) -> float:
    """Time of these GEMMs. ratio: dense over sparse time, for all GEMMs or as {name: ratio}; other GEMMs are dense."""
    ratios = ratio if isinstance(ratio, dict) else dict.fromkeys(flops, ratio)
    return sum(work / ratios.get(name, 1.0) for name, work in flops.items()) / gpu.flops


def activation_bytes(d_ff: int, tokens: int, activation: str, recompute: bool = True, fused: bool = False) -> float:
    """Forward: reads Z, writes A. Backward: reads Z and dA, writes dZ. recompute: adds another forward, or only its
    write if it is fused with dZ, as a compiler does."""
    forward, backward = (6, 10) if activation in GATED else (4, 6)
    recomputed = (2 if fused else forward) if recompute else 0
    return float(d_ff * tokens * (forward + recomputed + backward))


def mvue_bytes(d: int, d_ff: int, tokens: int, activation: str) -> float:
    """Bytes of 2:4 weight gradients: read dY and write it packed; the kernel that computes dZ writes it packed."""
    first = 2 * d_ff if activation in GATED else d_ff
    return tokens * (d * (2 + PACKED) + first * PACKED)


def activations24_bytes(d_ff: int, tokens: int, mvue: bool = True) -> float:
    """Forward: reads Z. Backward: reads Z and dA. Both write a packed form and its transpose, dense without MVUE."""
    return d_ff * tokens * (2 + 4 + 2 * (PACKED + (PACKED if mvue else 2)))


def repack_bytes(weights: float) -> float:
    """Bytes of packing soft weights in a micro-step: reads them twice, writes and reads their index, writes them."""
    return weights * (2 * 2 + 2 * 0.25 + PACKED)


def pack_bytes(weights: float, mask_interval: int = 40) -> float:
    """Bytes of packing per optimizer step. Reads fp32 weights and index, writes the values of both packed forms (97
    bytes per 4x4 block). A refresh also reads the weights and writes the index (65 bytes) and the metadata (4)."""
    return weights * (97 + (65 + 4) / mask_interval) / 16


def ffn_weights(d: int, d_ff: int, activation: str) -> int:
    """Number of weights of one feed-forward layer: two matrices, or three if it is gated."""
    return d * d_ff * (3 if activation in GATED else 2)


@dataclass(frozen=True)
class Sparse:
    """The 2:4 layer that is predicted. Functions take its fields as a dictionary `sparse`, which is None for dense."""

    ratio: float | dict[str, float] = 2.0  # see gemm_seconds
    mvue: bool = True  # for dense weight gradients: False, and a ratio {"z": 2, "y": 2, ...} without dw1 and dw2
    accumulation: int = 1  # the layer is packed once per this number of micro-steps
    mask_interval: int = 40
    weights: bool = True  # weights are 2:4
    activations: bool = False  # activations are 2:4


def options_of(recipe: Recipe, ratio: float | dict[str, float]) -> dict:
    """The fields of Sparse for a layer of this recipe."""
    options = {"ratio": ratio, "mvue": recipe.mvue, "mask_interval": recipe.mask_interval}
    return options | {"weights": recipe.mask != "none", "activations": recipe.activations24}


def ffn_seconds(gpu: GPU, d: int, d_ff: int, tokens: int, activation: str, sparse: dict | None, recompute=True):
    """Seconds of one feed-forward layer, forward and backward. A compiler fuses the dense one."""
    moved, weights = activation_bytes(d_ff, tokens, activation, recompute, fused=sparse is None), 0.0
    layer = Sparse(1.0, mvue=False, weights=False) if sparse is None else Sparse(**sparse)
    if layer.weights:
        weights = ffn_weights(d, d_ff, activation)
    if layer.activations:
        moved = activations24_bytes(d_ff, tokens, layer.mvue) + repack_bytes(weights)
    else:
        moved += mvue_bytes(d, d_ff, tokens, activation) if layer.mvue else 0
        moved += pack_bytes(weights, layer.mask_interval) / layer.accumulation
    return gemm_seconds(gpu, gemm_flops(d, d_ff, tokens, activation), layer.ratio) + moved / gpu.bandwidth


def s_model(gpu: GPU, d: int, d_ff: int, tokens: int, activation: str = "gelu", recompute: bool = True, **sparse):
    """Dense time over sparse time of one feed-forward layer."""
    dense, ours = (ffn_seconds(gpu, d, d_ff, tokens, activation, way, recompute) for way in (None, sparse))
    return dense / ours


def attention_seconds(gpu: GPU, d: int, tokens: int, sequence: int) -> float:
    """Seconds, forward and backward, of a block without its feed-forward layer."""
    linears = 6 * tokens * 4 * d * d  # c_attn (3 d^2 weights) and c_proj, three GEMMs each
    scores = 2 * tokens * sequence * d * (1 + 2.5)
    # forward: read x and the branch, write their sum and its norm; the backward does the same, and handles dx twice
    norms = 2 * (12 + 16)
    concatenated = 12  # the gradients of q, k and v are copied into one tensor
    return (linears + scores / FLASH_SHARE) / gpu.flops + (norms + concatenated) * d * tokens / gpu.bandwidth


def block_seconds(gpu: GPU, d: int, d_ff: int, tokens: int, sequence: int, activation="gelu", sparse=None) -> float:
    """Seconds of one transformer block, forward and backward."""
    return ffn_seconds(gpu, d, d_ff, tokens, activation, sparse) + attention_seconds(gpu, d, tokens, sequence)


def block_s_model(gpu: GPU, d: int, d_ff: int, tokens: int, sequence: int, activation="gelu", **sparse) -> float:
    """Dense time over sparse time of one transformer block."""
    dense = block_seconds(gpu, d, d_ff, tokens, sequence, activation)
    return dense / block_seconds(gpu, d, d_ff, tokens, sequence, activation, sparse)


def predict_step(gpu: GPU, config: GPTConfig, batch_size: int, sparse: dict | None = None, accumulation=1) -> dict:
    """One optimizer step of `accumulation` micro-batches of `batch_size` sequences. Returns "ms", "tokens_per_s"
    and "parts", whose milliseconds add up to "ms"."""
    d, d_ff, layers, activation = config.n_embd, config.d_ff, config.n_layer, config.activation
    tokens, ffn = batch_size * config.block_size, ffn_weights(d, d_ff, activation)
    matrices = layers * (4 * d**2 + ffn) + config.vocab_size * d
    parameters = matrices + config.block_size * d
    packed = sparse and not sparse.get("activations")
    cast = 6 * (matrices - (layers * ffn if packed else 0))  # read fp32, write bf16; packed weights need no cast
    cast += 6 * matrices + 12 * parameters * (accumulation - 1) / accumulation  # cast gradients to fp32 and add them up
    sparse = {"accumulation": accumulation} | sparse if sparse else None
    micro = {
        "blocks": layers * block_seconds(gpu, d, d_ff, tokens, config.block_size, activation, sparse),
        "lm_head": 6 * tokens * d * config.vocab_size / gpu.flops,
        "cross_entropy": 8 * tokens * config.vocab_size / gpu.bandwidth,  # bf16 logits: three reads and one write
        "embeddings_and_last_norm": (24 + 28) * tokens * d / gpu.bandwidth,
        "casts": cast / gpu.bandwidth,
    }
    parts = {name: 1e3 * seconds * accumulation for name, seconds in micro.items()}
    parts["clip"] = 1e3 * 12 * parameters / gpu.bandwidth  # read gradients for the norm; read and write to scale
    parts["optimizer"] = 1e3 * 28 * parameters / gpu.bandwidth  # read p, g, m, v and write p, m, v, all in fp32
    ms = sum(parts.values())
    return {"ms": ms, "tokens_per_s": 1e3 * tokens * accumulation / ms, "parts": parts}

"""GPT-2, dense or with 2:4-sparse linears: the architecture, its sizes, and which layers are sparse.

    x = wte(idx) + wpe(0..T-1)                    (B, T, C)
    for each block:  x += attn(ln_1(x));  x += mlp(ln_2(x))
    logits = lm_head(ln_f(x))                     (B, T, V), lm_head.weight is wte.weight

Parameter names and shapes are nanoGPT's, so nanoGPT's checkpoints load here. The model is built and initialised dense.
Then the linears of each MLP are swapped for sparse ones that keep their Parameters, so a dense and a sparse run with
one seed start from the same weights. The forward does not know about sparsity, with one exception: MLP.forward asks
whether a plan (gemm24/ffn.py) computes the whole layer.

Letters: B sequences, T tokens each, C = n_embd, V = vocab_size, d_ff = hidden width of the feed-forward layer.
"""

import dataclasses
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gemm24.ffn import sparse_ffn, takes_plan
from gemm24.operands import ACTIVATIONS, GATED
from sparse24 import MaskedDecayAdamW, get_recipe, kernel_status, recipe_names, refresh_masks, sparsify

# The four published sizes of GPT-2, and their names on Hugging Face.
PRESETS = {
    "124M":  {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "350M":  {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774M":  {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}  # fmt: skip
HF_NAMES = {"gpt2": "124M", "gpt2-medium": "350M", "gpt2-large": "774M", "gpt2-xl": "1558M"}

FFN_LINEARS = ("mlp.c_fc", "mlp.c_proj")  # the linears of a block that become sparse


@dataclass
class GPTConfig:
    """Architecture of a GPT. Raises ValueError if a field is out of range or two do not fit together."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linears and LayerNorms
    activation: str = "gelu"  # a key of ACTIVATIONS
    ffn_ratio: float = 4.0  # d_ff / n_embd, before `d_ff` corrects it for gates; 2.0 is the paper's "Half" baseline
    sparse: str = "none"  # "none" or a name that sparse24.get_recipe knows

    @property
    def d_ff(self) -> int:
        """Hidden width. A gated MLP has three matrices instead of two, so it gets 2/3 of the width for the same number
        of parameters, rounded to a multiple of 64 (of 4 below 1024)."""
        width = self.ffn_ratio * self.n_embd
        if self.activation not in GATED:
            return round(width)
        multiple = 64 if width * 2 / 3 >= 1024 else 4
        return max(1, math.floor(width * 2 / 3 / multiple + 0.5)) * multiple

    def __post_init__(self):
        def require(condition, name, need):
            if not condition:
                raise ValueError(f"GPTConfig: {name}={getattr(self, name)}, need {need}")

        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            require(getattr(self, name) >= 1, name, f"at least 1; set a positive {name}")
        require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1; use 0.0 to pre-train")
        require(self.n_embd % self.n_head == 0, "n_embd", f"a multiple of n_head={self.n_head}; change either")
        _require_one_of("GPTConfig: activation", self.activation, ACTIVATIONS)
        _require_one_of("GPTConfig: sparse", self.sparse, ["none", *recipe_names()])
        width = self.ffn_ratio * self.n_embd
        if not (0.5 < width < math.inf and abs(width - round(width)) < 1e-6 * width):
            sizes = f"ffn_ratio={self.ffn_ratio} times n_embd={self.n_embd} is {width:g}"
            raise ValueError(f"GPTConfig: {sizes}, need a positive integer; change ffn_ratio")
        if self.sparse != "none":
            for name, change in (("n_embd", "n_embd"), ("d_ff", f"ffn_ratio={self.ffn_ratio}")):
                need = f"a multiple of 4 for sparse={self.sparse!r}; change {change} or use sparse='none'"
                require(getattr(self, name) % 4 == 0, name, need)


def _require_one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown, need one of {', '.join(allowed)}; correct it")


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, n_head, T, C / n_head) each
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)  # (B, n_head, T, C / n_head)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """The feed-forward layer, which the paper makes sparse: c_proj(activation(c_fc(x)))."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        fan_out = 2 * config.d_ff if config.activation in GATED else config.d_ff
        self.c_fc = nn.Linear(config.n_embd, fan_out, bias=config.bias)
        self.c_proj = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.plan = None  # gemm24.plan.set_plan sets it: how to compute the whole layer while it is sparse

    def forward(self, x):
        if ffn := getattr(getattr(self.c_fc, "recipe", None), "ffn", None):  # the method computes the whole layer
            return self.dropout(ffn(x, self.c_fc, self.c_proj, self.plan))  # (B, T, C)
        if takes_plan(self.plan, x, self.c_fc, self.c_proj):
            return self.dropout(sparse_ffn(x, self.c_fc, self.c_proj, self.plan))  # (B, T, C)
        h = self.c_fc(x)  # (B, T, d_ff), or (B, T, 2 d_ff) if gated
        a = ACTIVATIONS[self.activation](h)  # (B, T, d_ff)
        return self.dropout(self.c_proj(a))  # (B, T, C)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 for `config`. If `config.sparse` is set, the linears in `sparse_names()` are sparse and follow `recipe`, by
    default get_recipe(config.sparse). Raises ValueError if a recipe is given for a dense model."""

    def __init__(self, config, recipe=None):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()
        self._make_sparse(recipe)

    @torch.no_grad()
    def _init_weights(self):
        """Matrices from N(0, 0.02^2), divided by sqrt(2 n_layer) if they write to the residual stream; biases 0."""
        for name, p in self.named_parameters():  # yields the tied matrix once
            if name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(0.0, 0.02)
            elif name.endswith("bias"):
                p.zero_()

    def _make_sparse(self, recipe):
        if self.config.sparse != "none":
            recipe = get_recipe(recipe or self.config.sparse)
            if recipe.activation and recipe.activation != self.config.activation:
                need = f"need {recipe.activation!r}; use it, or sparse='none'"
                raise ValueError(f"sparse={recipe.name!r}: activation={self.config.activation!r}, {need}")
            sparsify(self, recipe, self.sparse_names())
        elif recipe is not None:
            raise ValueError("GPT: a recipe was given but config.sparse='none'; set config.sparse or drop the recipe")

    def sparse_names(self) -> list[str]:
        """Names of the linears that are sparse if `config.sparse` is set, in module order."""
        return [f"transformer.h.{i}.{linear}" for i in range(self.config.n_layer) for linear in FFN_LINEARS]

    def forward(self, idx, targets=None):
        """Logits (B, T, V) and the mean cross-entropy in nats; without targets, the last position's logits (B, 1, V)
        and None. idx: int64 (B, T). targets: int64 (B, T), -1 at positions that do not count. Raises ValueError if
        T > block_size."""
        T, block_size = idx.shape[1], self.config.block_size
        if block_size < T:
            raise ValueError(f"GPT: T={T} tokens, need at most block_size={block_size}; crop the input")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        return self.head(x, targets)

    def head(self, x, targets=None):
        """The result of `forward` from the last block's output x (B, T, C). A method: runtime/ compiles it alone."""
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # sampling needs the last position only
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def crop_block_size(self, block_size):
        """Drop the positions from `block_size` on. Call it before making the optimizer: wpe.weight is replaced."""
        if not 1 <= block_size <= self.config.block_size:
            need = f"need 1 to {self.config.block_size}; a model cannot grow"
            raise ValueError(f"crop_block_size: block_size={block_size}, {need}")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight.detach()[:block_size].clone())
        self.transformer.wpe.num_embeddings = block_size

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Append `max_new_tokens` sampled tokens to idx, int64 (B, T); returns int64 (B, T + max_new_tokens).

        temperature=0 takes the likeliest token; top_k samples among the k likeliest. `generator` must be on idx's
        device; None means torch's global one. Call `eval()` first if dropout > 0. Raises ValueError if temperature < 0
        or top_k < 1.
        """
        if temperature < 0 or (top_k is not None and top_k < 1):
            need = "need temperature >= 0 and top_k >= 1 or None; use temperature=0 for greedy"
            raise ValueError(f"generate: temperature={temperature}, top_k={top_k}, {need}")
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1].float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)  # (B, 1)
            idx = torch.cat([idx, token], dim=1)
        return idx

    @classmethod
    def from_pretrained(cls, name, override_args=None, recipe=None):
        """OpenAI's weights, loaded through Hugging Face transformers, with masks made from them.

        name: a key of HF_NAMES. override_args: a dict that may have dropout and sparse. OpenAI trained with the tanh
        form of GELU, which differs from the erf form used here by less than 5e-4. Raises ValueError for a wrong name
        or argument, ImportError without transformers.
        """
        _require_one_of("from_pretrained: name", name, HF_NAMES)
        if extra := sorted(set(override_args or {}) - {"dropout", "sparse"}):
            need = "need only dropout and sparse; remove the others, the weights fix them"
            raise ValueError(f"from_pretrained: override_args has {', '.join(extra)}, {need}")
        config = GPTConfig(vocab_size=50257, **PRESETS[HF_NAMES[name]], **(override_args or {}))
        try:
            from transformers import GPT2LMHeadModel
        except ImportError as error:
            raise ImportError(f"from_pretrained: {name} needs transformers; pip install transformers") from error
        model = cls(config, recipe)
        copy_hf_weights(model, GPT2LMHeadModel.from_pretrained(name).state_dict())
        return model

    def get_num_params(self, non_embedding=True) -> int:
        """Number of parameters, by default without the position embeddings. wte counts, because it is also lm_head."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def flops_per_token(self) -> int:
        """FLOPs of the forward's and backward's matmuls per token at full context. Sparse linears count as dense.

        PaLM's convention (arXiv 2204.02311, appendix B): 6 per weight of a linear (2 forward, 4 backward), and
        12 n_layer C T for Q K^T and A V, not halved for causality.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def estimate_mfu(self, tokens_per_s, peak_flops) -> float | None:
        """Model FLOPs utilisation as a fraction of the dense peak (FLOP/s); None if the peak is unknown."""
        return None if peak_flops is None else self.flops_per_token() * tokens_per_s / peak_flops

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, masked_decay=0.0, decay_on="grad", optimizer=None
    ):
        """AdamW with `weight_decay` on matrices and embeddings, without it on biases and LayerNorms, and with the
        paper's masked decay on sparse layers. optimizer: the recipe's subclass of MaskedDecayAdamW, if it has one."""
        params = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in params if p.dim() >= 2]
        vectors = [p for p in params if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        triton_kernel = device_type == "cuda" and kernel_status(params[0].device) == "on"
        fused = None if triton_kernel or device_type not in ("cuda", "cpu") else True
        options = {"lr": learning_rate, "betas": betas, "fused": fused}
        return (optimizer or MaskedDecayAdamW)(groups, self, masked_decay=masked_decay, decay_on=decay_on, **options)


@torch.no_grad()
def copy_hf_weights(model, hf_state):
    """Copy a Hugging Face GPT-2 state dict, name -> tensor, into `model`. Sparse layers get masks of these weights.

    Hugging Face stores the four linears of a block as (in, out), so they are transposed. The buffers attn.bias and
    attn.masked_bias are ignored; lm_head.weight may be missing. If a name or a shape differs from the model's, nothing
    is copied and ValueError is raised.
    """
    source = {k: v for k, v in hf_state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    source.setdefault("lm_head.weight", source.get("transformer.wte.weight"))
    params = dict(model.named_parameters(remove_duplicate=False))
    if wrong := sorted(params.keys() ^ source.keys()):
        raise ValueError(f"copy_hf_weights: {wrong} on one side only, need equal names; build the model with bias=True")
    linears = tuple(f"{name}.weight" for name in ("attn.c_attn", "attn.c_proj", *FFN_LINEARS))
    pairs = {k: (p, source[k].t() if k.endswith(linears) else source[k]) for k, p in params.items()}
    for k, (p, value) in pairs.items():
        if value.shape != p.shape:
            shapes = f"{k} has shape {tuple(value.shape)}, need {tuple(p.shape)}"
            raise ValueError(f"copy_hf_weights: {shapes}; build the model with the preset of these weights")
    for p, value in pairs.values():
        p.copy_(value)
    refresh_masks(model, measure=False, begin=True)


# Dense 16-bit tensor-core peaks in TFLOPS with fp32 accumulation, from NVIDIA's data sheets (half of "with sparsity").
# A GPU that is not listed has no MFU. Add its peak to the table; do not use a similar GPU's.
PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "B300": 2250, "GB300": 2500,
    "H100": 989.5, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989.5, "H200 NVL": 835, "GH200": 989.5,
    "A100": 312, "A30": 165, "A40": 149.7, "A10": 125, "A10G": 70, "L4": 121, "L40S": 362,
    "RTX A6000": 154.8, "RTX 6000 Ada": 364, "RTX 3090": 71, "RTX 4090": 165.2, "RTX 5090": 209.5,
    "V100 SXM2": 125, "V100 PCIE": 112, "T4": 65,
}  # fmt: skip
# A name with one of these words is a chip that the table lacks: "RTX 4090 D", "RTX 3090 Ti", a MIG slice of an H200.
OTHER_CHIP = {"MIG", "LAPTOP", "TI", "D"}


def peak_flops(device) -> float | None:
    """Dense 16-bit peak of `device` in FLOP/s; None if it is not in PEAK_TFLOPS."""
    if torch.device(device).type != "cuda":
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device).upper()))  # "RTX A1000" is no A10
    matches = [key for key in PEAK_TFLOPS if words >= set(key.upper().split())]
    return None if not matches or words & OTHER_CHIP else PEAK_TFLOPS[max(matches, key=len)] * 1e12

"""GPT-2 against an independent reference, published sizes and counted FLOPs; sparsity changes nothing else."""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ACTIVATIONS, GATED, GPT, HF_NAMES, PRESETS, GPTConfig, copy_hf_weights, peak_flops
from sparse24 import (
    RECIPES,
    MaskedDecayAdamW,
    Recipe,
    Sparse24Linear,
    refresh_masks,
    seed_draws,
    sparsify,
    sste_scale,
    transposable_index,
)

TINY = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}


def tiny(seed=0, recipe=None, **options):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**(TINY | options)), recipe)


def sparsify_attention(net, sparse):
    if sparse != "none":
        assert len(sparsify(net, sparse, lambda name, module: ".attn." in name)) == 2 * net.config.n_layer


def tokens(B=3, T=12, seed=1, vocab_size=61):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def perturb(net):
    """Add noise to all parameters, biases and LayerNorms too, so that the tests notice a forgotten one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    refresh_masks(net)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# The forward against formulas that are written out, one head at a time


def reference_activation(name, z):
    def phi(t):
        return t * 0.5 * (1 + torch.erf(t / math.sqrt(2)))

    if name == "gelu":
        return phi(z)
    if name == "relu2":
        return torch.where(z > 0, z * z, torch.zeros_like(z))
    d_ff = z.shape[-1] // 2
    gate, value = z[..., :d_ff], z[..., d_ff:]
    return phi(gate) * value if name == "geglu" else gate / (1 + torch.exp(-gate)) * value


def reference_logits(state, config, idx):
    """GPT-2's logits from a state dict of float64 tensors. A weight is pruned if `state` has a mask for it."""

    def linear(x, name):
        w = state[name + ".weight"]
        if name + ".mask" in state:
            w = w * state[name + ".mask"]
        return x @ w.T + state.get(name + ".bias", 0)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return x * state[name + ".weight"] + state.get(name + ".bias", 0)

    T, C, size = idx.shape[1], config.n_embd, config.n_embd // config.n_head
    future = torch.tensor([[j > i for j in range(T)] for i in range(T)])
    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][:T]
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        heads = []
        for h in range(config.n_head):
            q, k, v = (qkv[..., part * C + h * size : part * C + (h + 1) * size] for part in range(3))
            scores = (q @ k.mT / math.sqrt(size)).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        hidden = reference_activation(config.activation, linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("sparse", ["none", "fst"])
def test_logits_and_loss_equal_the_reference(activation, bias, sparse):
    net = perturb(tiny(activation=activation, bias=bias, sparse=sparse).double())
    sparsify_attention(net, sparse)
    idx, targets = tokens(), tokens(seed=5)
    targets[0, :4] = -1
    masks = {f"{name}.mask": m.mask for name, m in net.named_modules() if isinstance(m, Sparse24Linear)}
    want = reference_logits(dict(net.named_parameters()) | masks, net.config, idx)
    logits, loss = net(idx, targets)
    torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
    by_hand = -want.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets >= 0].mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-9, atol=1e-9)
    last, no_loss = net(idx)
    assert no_loss is None
    torch.testing.assert_close(last, want[:, -1:], rtol=1e-9, atol=1e-9)


def test_dropout_acts_in_training_only():
    net, idx = tiny(dropout=0.5), tokens()
    assert not torch.equal(net(idx)[0], net(idx)[0])
    net.eval()
    assert torch.equal(net(idx)[0], net(idx)[0])
    assert torch.equal(net(idx)[0], tiny().eval()(idx)[0])  # the initial weights are the same


# ---------------------------------------------------------------------------------------------------------------------
# Parameters: names, counts, initial values


def test_parameter_names_are_nanogpts():
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    modules = [f"transformer.h.{i}.{m}" for i in range(2) for m in block] + ["transformer.ln_f"]
    want = {f"{m}.{p}" for m in modules for p in ("weight", "bias")}
    want |= {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    net = tiny()
    assert set(net.state_dict()) == want
    assert net.lm_head.weight is net.transformer.wte.weight
    assert set(tiny(bias=False).state_dict()) == {name for name in want if not name.endswith("bias")}


@pytest.mark.parametrize("n_layer", [1, 4])
def test_initial_weights(n_layer):
    net = tiny(n_layer=n_layer, n_embd=128, vocab_size=512)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            spread = std / math.sqrt(2 * p.numel())  # standard error of a standard deviation
            assert abs(p.std().item() - std) < 5 * spread, name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


@pytest.mark.parametrize(
    ("preset", "count"), [("124M", 124_439_808), ("350M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)]
)
def test_presets_have_the_published_parameter_counts(preset, count):
    with torch.device("meta"):
        net, gated = (GPT(GPTConfig(vocab_size=50257, activation=a, **PRESETS[preset])) for a in ("gelu", "swiglu"))
    assert net.get_num_params(non_embedding=False) == count
    assert net.get_num_params() == count - 1024 * PRESETS[preset]["n_embd"]
    assert gated.get_num_params() == pytest.approx(net.get_num_params(), rel=0.01)
    assert preset in HF_NAMES.values()


GATED_WIDTHS = {  # (n_embd, ffn_ratio): d_ff. Below 1024 it is a multiple of 4, and never 0.
    (768, 4.0): 2048, (1024, 4.0): 2752, (1280, 4.0): 3392, (1600, 4.0): 4288, (768, 2.0): 1024, (384, 4.0): 1024,
    (380, 4.0): 1012, (32, 4.0): 84, (4, 0.25): 4,
}  # fmt: skip


def test_width():
    for (n_embd, ffn_ratio), d_ff in GATED_WIDTHS.items():
        for activation in GATED:
            assert GPTConfig(n_head=1, n_embd=n_embd, ffn_ratio=ffn_ratio, activation=activation).d_ff == d_ff
    assert GPTConfig().d_ff == 3072
    assert GPTConfig(ffn_ratio=2).d_ff == 1536
    assert GPTConfig(ffn_ratio=8 / 3).d_ff == 2048  # not exact in binary


# ---------------------------------------------------------------------------------------------------------------------
# Changing and sampling a model


def test_crop_block_size_keeps_the_function_on_short_inputs():
    net, idx = perturb(tiny()).eval(), tokens(T=8)
    config, before = net.config, net(idx, idx)
    net.crop_block_size(8)
    assert net.transformer.wpe.weight.shape == (8, 32)
    assert net.config.block_size == 8
    assert config.block_size == 16  # the caller's config is unchanged
    assert torch.equal(net(idx, idx)[0], before[0])
    tiny(block_size=8).load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="T=9 tokens, need at most block_size=8"):
        net(tokens(T=9))
    with pytest.raises(ValueError, match="crop_block_size: block_size=9, need 1 to 8"):
        net.crop_block_size(9)


@pytest.mark.parametrize("sparse", ["none", "fst"])
def test_generate_is_greedy_and_reproducible_and_changes_nothing(sparse):
    net, idx = perturb(tiny(sparse=sparse)).eval(), tokens(B=2, T=5)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items() if torch.is_tensor(v)}
    greedy = net.generate(idx, 14, temperature=0)  # 19 tokens: past block_size
    assert greedy.shape == (2, 19)
    assert torch.equal(greedy[:, :5], idx)
    for t in range(5, 19):
        assert torch.equal(greedy[:, t], net(greedy[:, max(0, t - 16) : t])[0][:, -1].argmax(-1))
    assert torch.equal(greedy, net.generate(idx, 14, temperature=0.7, top_k=1, generator=torch.Generator()))

    first, repeated, other = (net.generate(idx, 14, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, repeated)
    assert not torch.equal(first, other)
    assert torch.equal(net.generate(idx, 0), idx)

    assert torch.equal(torch.get_rng_state(), state)
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not net.training
    assert all(p.grad is None for p in net.parameters())


def test_generate_samples_from_the_softmax_of_the_top_k():
    net = perturb(tiny()).eval()
    idx = tokens(B=1, T=5).expand(4000, 5)
    logits = net(idx[:1])[0][0, -1] / 0.8
    top = logits.topk(5)
    want = torch.zeros(61).scatter(0, top.indices, top.values.softmax(0)).detach()
    drawn = net.generate(idx, 1, temperature=0.8, top_k=5, generator=torch.Generator().manual_seed(0))[:, -1]
    got = drawn.bincount(minlength=61) / 4000
    assert ((got - want).abs() <= 4.5 * (want * (1 - want) / 4000).sqrt()).all()
    free = net.generate(idx, 1, top_k=10**6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(free, net.generate(idx, 1, generator=torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's weights


def hf_state_of(net):
    """The state dict that transformers has for the same function: (in, out) weights, and two buffers a block."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    params = net.named_parameters(remove_duplicate=False)
    state = {k: (p.t() if k.endswith(conv1d) else p).detach().clone() for k, p in params}
    for i in range(net.config.n_layer):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


@pytest.mark.parametrize("missing", [None, "lm_head.weight"])
def test_hf_weights_round_trip(missing):
    source, net, idx = perturb(tiny(seed=1)), tiny(seed=2), tokens()
    assert not torch.equal(net(idx)[0], source(idx)[0])
    copy_hf_weights(net, {k: v for k, v in hf_state_of(source).items() if k != missing})
    assert torch.equal(net(idx)[0], source(idx)[0])
    assert net.lm_head.weight is net.transformer.wte.weight


def test_hf_weights_in_a_sparse_model_get_masks_of_their_own():
    source, net = perturb(tiny(seed=1)), tiny(seed=2, sparse="s_ste")
    copy_hf_weights(net, hf_state_of(source))
    for name in net.sparse_names():
        layer = net.get_submodule(name)
        assert torch.equal(layer.index, layer.new_index())
        assert torch.equal(layer.beta, sste_scale(source.get_submodule(name).weight))


def test_hf_weights_that_do_not_fit_are_refused():
    net, state = tiny(seed=2), hf_state_of(tiny(seed=1))
    c_fc = "transformer.h.0.mlp.c_fc.weight"
    for changed, message in (
        ({k: v for k, v in state.items() if "h.1.ln_2.bias" not in k}, 'Missing .* "transformer.h.1.ln_2.bias"'),
        (state | {"transformer.extra": torch.ones(1)}, 'Unexpected .* "transformer.extra"'),
        (state | {c_fc: state[c_fc].t()}, f"size mismatch for {c_fc}"),
    ):
        with pytest.raises(RuntimeError, match=message):
            copy_hf_weights(net, changed)


@pytest.fixture
def hugging_face(monkeypatch):
    """Replaces transformers. The model that it has as "gpt2" is tiny; the fixture returns it."""
    source = perturb(tiny(seed=1, vocab_size=50257, block_size=1024))
    loaded = SimpleNamespace(state_dict=lambda: hf_state_of(source))
    model_class = SimpleNamespace(from_pretrained=lambda name: loaded)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(GPT2LMHeadModel=model_class))
    monkeypatch.setitem(PRESETS, "124M", {"n_layer": 2, "n_head": 2, "n_embd": 32})
    return source


def test_from_pretrained_makes_the_masks_after_loading(hugging_face):
    dense, idx = GPT.from_pretrained("gpt2", {"dropout": 0.1}), tokens()
    assert dense.config == dataclasses.replace(hugging_face.config, dropout=0.1)
    assert dense.transformer.h[0].mlp.dropout.p == 0.1
    assert torch.equal(dense.eval()(idx)[0], hugging_face(idx)[0])

    recipe = dataclasses.replace(RECIPES["fst"], name="mine")
    net = GPT.from_pretrained("gpt2", {"sparse": "fst"}, recipe)
    assert net.config == dataclasses.replace(hugging_face.config, sparse="fst")
    for name in net.sparse_names():
        layer = net.get_submodule(name)
        assert torch.equal(layer.index, transposable_index(hugging_face.get_submodule(name).weight))
        assert layer.recipe is recipe


def test_from_pretrained_refuses(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes the import fail, installed or not
    with pytest.raises(ImportError, match="transformers"):
        GPT.from_pretrained("gpt2")
    with pytest.raises(ValueError, match="from_pretrained: name='gpt3' is unknown, need one of gpt2, gpt2-medium"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ValueError, match="override_args has n_layer, need only dropout and sparse; remove the others"):
        GPT.from_pretrained("gpt2", {"n_layer": 3, "dropout": 0.1})


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs, peaks, optimizer


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_per_token_are_the_counted_ones(activation):
    net, idx = tiny(activation=activation), tokens(T=16)
    attention = 12 * 2 * 32 * 16  # n_layer, C, T, per token

    def counted(backend):
        with sdpa_kernel(backend), FlopCounterMode(display=False) as counter:
            net(idx, idx)[1].backward()
        return counter.get_total_flops() / idx.numel()

    assert counted(SDPBackend.MATH) == net.flops_per_token()  # plain matmuls, not halved for causality
    assert counted(SDPBackend.FLASH_ATTENTION) == net.flops_per_token() - attention  # torch does not count it on a CPU


def test_flops_are_the_same_dense_and_sparse_and_known_for_124m():
    assert tiny(sparse="fst").flops_per_token() == tiny().flops_per_token()
    with torch.device("meta"):
        net = GPT(GPTConfig(vocab_size=50257, **PRESETS["124M"]))
    matmul = 12 * 12 * 768**2 + 50257 * 768  # 12 C^2 per block, and the head
    assert net.flops_per_token() == 6 * matmul + 12 * 12 * 768 * 1024
    assert net.estimate_mfu(1e6, 2e15) == pytest.approx(net.flops_per_token() * 1e6 / 2e15)
    assert net.estimate_mfu(1e6, None) is None


PEAKS = {
    "NVIDIA H200": 989.5, "NVIDIA H200 NVL": 835, "NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 PCIe": 756,
    "NVIDIA GH200 480GB": 989.5, "NVIDIA GB200": 2500, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10G": 70, "NVIDIA L4": 121, "NVIDIA L40S": 362, "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA GeForce RTX 4090": 165.2, "Tesla V100-SXM2-16GB": 125, "Tesla V100-PCIE-16GB": 112,
    "NVIDIA H200 MIG 1g.18gb": None, "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA RTX A1000": None, "Quadro RTX 6000": None,
    "NVIDIA H20": None, "AMD Instinct MI300X": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "tflops"), PEAKS.items())
def test_peak_flops(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for device in ("cuda:0", torch.device("cuda")):
        assert peak_flops(device) == (None if tflops is None else tflops * 1e12)
    assert peak_flops("cpu") is None


@pytest.mark.parametrize("sparse", ["none", "fst"])
def test_optimizer_groups(sparse):
    net = tiny(sparse=sparse)
    net.transformer.wpe.weight.requires_grad_(False)
    optimizer = net.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu", masked_decay=2e-4, decay_on="weight")
    assert isinstance(optimizer, MaskedDecayAdamW)
    assert (optimizer.masked_decay, optimizer.decay_on) == (2e-4, "weight")
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(g["lr"] == 3e-4 and g["betas"] == (0.9, 0.95) and g["fused"] for g in optimizer.param_groups)
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in (decayed, rest))
    assert all(name.endswith("bias") or ".ln_" in name for name in rest)
    assert not any(name.endswith("bias") or ".ln_" in name for name in decayed)
    assert decayed | rest == set(names.values()) - {"transformer.wpe.weight"}
    assert not net.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "mps").param_groups[0]["fused"]


def test_dense_model_trains_as_with_plain_adamw():
    nets = [tiny(), tiny()]
    matrices, vectors = ([p for p in nets[1].parameters() if p.dim() == dim] for dim in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    ours = nets[0].configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", masked_decay=6e-5)
    for net, optimizer in zip(nets, (ours, plain), strict=True):
        for step in range(3):
            optimizer.zero_grad()
            net(tokens(seed=step), tokens(seed=step + 1))[1].backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Sparsity


def test_sparse_model_starts_from_the_dense_models_weights():
    dense, rng = tiny(activation="swiglu"), torch.get_rng_state()
    sparse = tiny(activation="swiglu", sparse="fst")
    assert torch.equal(torch.get_rng_state(), rng)
    assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(sparse.parameters(), dense.parameters(), strict=True))
    names = [f"transformer.h.{i}.mlp.{linear}" for i in range(2) for linear in ("c_fc", "c_proj")]
    assert names == [n for n, m in sparse.named_modules() if isinstance(m, Sparse24Linear)]
    assert names == sparse.sparse_names() == dense.sparse_names()
    for name in names:
        assert torch.equal(sparse.get_submodule(name).index, transposable_index(dense.get_submodule(name).weight))


def test_recipe_overrides_the_named_one_and_is_never_ignored():
    recipe = Recipe("mine", mvue=False, masked_decay=1e-3)
    assert tiny(sparse="fst").transformer.h[0].mlp.c_fc.recipe is RECIPES["fst"]
    assert tiny(sparse="fst", recipe=recipe).transformer.h[1].mlp.c_proj.recipe is recipe
    with pytest.raises(ValueError, match=r"GPT: a recipe was given but config.sparse='none'"):
        tiny(recipe=recipe)


@pytest.mark.parametrize("phase", [True, False])
def test_sparse_state_dict_loads_strictly(phase):
    source, net, idx = perturb(tiny(seed=1, sparse="fst")), tiny(seed=2, sparse="fst"), tokens()
    for name in source.sparse_names():
        source.get_submodule(name).sparse = phase
    net.load_state_dict(source.state_dict(), strict=True)
    assert all(net.get_submodule(name).sparse is phase for name in net.sparse_names())
    assert torch.equal(net(idx)[0], source(idx)[0])


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("sparse", ["none", "fst", pytest.param("ste", marks=pytest.mark.slow)])
def test_a_training_step_reaches_every_parameter(sparse, activation):
    net = tiny(sparse=sparse, activation=activation)
    sparsify_attention(net, sparse)
    idx, targets = tokens(), tokens(seed=5)
    optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", masked_decay=6e-5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    seed_draws(net, 1, 0, 0)
    loss = net(idx, targets)[1]
    assert loss.item() == pytest.approx(math.log(61), abs=0.1)  # an untrained model predicts a uniform distribution
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in net.named_parameters())
    with torch.no_grad():
        assert net(idx, targets)[1] < loss


# ---------------------------------------------------------------------------------------------------------------------
# Settings that are refused


UNKNOWN, NO_WIDTH = "is unknown, need one of", "need a positive integer; change ffn_ratio"
MULTIPLE = "need a multiple of 4 for sparse='fst'; change {} or use sparse='none'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "GPTConfig: n_embd=30, need a multiple of n_head=4; change either"),
        *(
            ({name: value}, f"GPTConfig: {name}={value}, need at least 1; set a positive {name}")
            for name in ("n_layer", "vocab_size", "n_head", "n_embd", "block_size")
            for value in (0, -1)
        ),
        ({"dropout": 1.0}, "GPTConfig: dropout=1.0, need 0 <= dropout < 1; use 0.0 to pre-train"),
        ({"activation": "tanh"}, f"activation='tanh' {UNKNOWN} gelu, relu2, geglu, swiglu; correct it"),
        ({"sparse": "2:4"}, f"GPTConfig: sparse='2:4' {UNKNOWN} none, fst, ste"),
        *(
            ({"ffn_ratio": ratio}, rf"ffn_ratio={ratio} times n_embd=768 is {width}, {NO_WIDTH}")
            for ratio, width in ((1.01, 775.68), (0.0, 0), (-4.0, -3072), (math.inf, "inf"), (math.nan, "nan"))
        ),
        ({"n_embd": 30, "n_head": 2, "sparse": "fst"}, f"n_embd=30, {MULTIPLE.format('n_embd')}"),
        (
            {"n_embd": 12, "n_head": 2, "ffn_ratio": 1.5, "sparse": "fst"},
            f"d_ff=18, {MULTIPLE.format('ffn_ratio=1.5')}",
        ),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_config_takes_odd_sizes_when_dense():
    net = tiny(n_embd=6, ffn_ratio=1.5, n_head=3)
    assert net.config.d_ff == 9
    assert net(tokens(), tokens())[1].isfinite()

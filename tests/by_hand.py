"""Slow, plain computations that the tests of sparse24.py and methods/ compare with, and small seeded layers. The code
under test computes no expected value."""

import itertools
import math

import torch
import torch.nn as nn

from sparse24 import (
    MaskedDecayAdamW,
    Sparse24Linear,
    get_recipe,
    mask24,
    seed_draws,
    seed_words,
    sparse_linears,
    sparsify,
    transposable_mask,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def transposable_mask_2approx(w: torch.Tensor) -> torch.Tensor:
    """Sort-and-pick 2-approximation of Hubara et al. (2021), the baseline of the paper's Table 2.

    It visits the 16 entries of a block by decreasing magnitude and keeps an entry if its row and column have fewer than
    two. Some blocks end with 7 entries. w: (out, in). Returns bool (out, in).
    """
    blocks = w.detach().abs().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)  # (R, C, 16)
    order = blocks.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    in_row, in_column = (torch.zeros(*blocks.shape[:2], 4, dtype=torch.int8, device=w.device) for _ in range(2))
    for entry in order.unbind(-1):
        entry = entry.unsqueeze(-1)
        free = (in_row.gather(-1, entry // 4) < 2) & (in_column.gather(-1, entry % 4) < 2)
        mask.scatter_(-1, entry, free)
        in_row.scatter_add_(-1, entry // 4, free.to(torch.int8))
        in_column.scatter_add_(-1, entry % 4, free.to(torch.int8))
    return mask.unflatten(-1, (4, 4)).transpose(1, 2).flatten(2).flatten(0, 1)


def lognormal(*shape, sigma, seed=0):
    sign = 2.0 * torch.randint(2, shape, generator=generator(seed + 1)) - 1
    return sign * (sigma * normal(*shape, seed=seed, dtype=torch.float32)).exp()


def layouts(base):
    """Views of many strides, all of shapes that the operators take; base is (16, 24)."""
    return {
        "transposed": base.t()[:, :16],
        "column-major": base.t().contiguous().t(),
        "every other row": base.repeat_interleave(2, 0)[::2],
        "every other column": base.repeat_interleave(2, 1)[:, 1::2],
        "shifted window": torch.cat([base, base], 1)[4:12, 3:19],
        "expanded row": base[:1].expand(8, 24),
        "expanded column": base[:, :1].expand(16, 8),
        "overlapping": base.reshape(-1).as_strided((8, 8), (3, 5)),
        "flipped": base.flip(0, 1),
    }


def make(recipe, out=8, features=12, seed=0) -> Sparse24Linear:
    """A float64 layer of the recipe's class, without a bias."""
    model = nn.Sequential(nn.Linear(features, out, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(normal(out, features, seed=seed))
    sparsify(model, recipe, ["0"])
    seed_draws(model, seed, 0, 0)
    return model[0]


def run(layer, seed=5, tokens=8):
    """x, dZ, Z, and the layer's gradients dX and dW."""
    x = normal(tokens, layer.in_features, seed=seed).requires_grad_()
    dz = normal(tokens, layer.out_features, seed=seed + 1)
    layer.weight.grad = None
    z = layer(x)
    z.backward(dz)
    return x.detach(), dz, z.detach(), x.grad, layer.weight.grad


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def top2(x):
    """Row-wise 2:4 mask, group by group; the lower index wins a tie."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i, j in itertools.product(range(x.shape[0]), range(0, x.shape[1], 4)):
        order = sorted(range(4), key=lambda k: (-abs(float(x[i, j + k].detach())), k))
        for k in order[:2]:
            mask[i, j + k] = True
    return mask


def soft(w):
    """S(w), group by group."""
    s = torch.zeros_like(w)
    for i, j in itertools.product(range(w.shape[0]), range(0, w.shape[1], 4)):
        t = sorted(abs(float(v)) for v in w[i, j : j + 4])[1]
        for k in range(4):
            v = float(w[i, j + k])
            s[i, j + k] = math.copysign(max(abs(v) - t, 0.0), v)
    return s


OPTIONS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.2}


def optimizer_for(model, recipe="fst", **decay):
    """The recipe's optimizer with OPTIONS, and no masked decay unless it is given."""
    optimizer = get_recipe(recipe).optimizer or MaskedDecayAdamW
    return optimizer(model.parameters(), model, **OPTIONS, foreach=False, **({"masked_decay": 0.0} | decay))


def adamw(w, gradients, lr=0.1, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.2, change=None, frozen_from=math.inf):
    """AdamW in float64: the weights after each step. change: a function of (w, g, step number) that returns the (w, g)
    to use, as masked decay does. frozen_from: the step after which the bias-corrected second moments are frozen."""
    w, m, v, after = w.double().clone(), 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        w, g = change(w, g.double(), t) if change else (w, g.double())
        m = betas[0] * m + (1 - betas[0]) * g
        if t <= frozen_from:
            v = betas[1] * v + (1 - betas[1]) * g * g
            corrected = v / (1 - betas[1] ** t)
        w = w * (1 - lr * weight_decay) - lr * (m / (1 - betas[0] ** t)) / (corrected.sqrt() + eps)
        after.append(w)
    return after


def make_mlp(recipe="fst", seed=0) -> nn.Sequential:
    """Linear, GELU, Linear in float32, both sparse."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * normal(*p.shape, seed=seed + i))
    sparsify(model, recipe, ["0", "2"])
    seed_draws(model, seed, 0, 0)
    return model


def train_by_hand(model, train, val, s, lrs):
    """The loop of train.py for FST, a step at a time: the rows of metrics.jsonl, and the model after the last step.

    model: before the first step. train, val: the tokens. s: the settings. lrs: the learning rate of each step.
    """
    layers, named = list(sparse_linears(model)), dict(model.named_parameters())
    moments, rows = dict.fromkeys(named, (0.0, 0.0)), []

    def loss_of(tokens, *key):
        starts = [int(word) % (len(tokens) - s.block_size) for word in seed_words(s.batch_size, s.seed, *key)]
        window = torch.stack([tokens[start : start + s.block_size + 1] for start in starts])
        return model(window[:, :-1], window[:, 1:])[1]

    @torch.no_grad()
    def validation():
        model.eval()
        losses = [float(loss_of(val, k, 0, 3)) for k in range(s.eval_iters)]
        model.train()
        return sum(losses) / len(losses)

    def masks():
        return torch.cat([transposable_mask(layer.weight.detach()).flatten() for layer in layers])

    def micro_batch(i, m):
        seed_draws(model, s.seed, i, m)
        torch.manual_seed(int(seed_words(1, s.seed, i, m, 2)[0]))
        loss = loss_of(train, i, m, 1)
        return float(loss.detach()), torch.autograd.grad(loss, [*named.values()])

    for i, lr in enumerate(lrs):
        for layer in layers:
            layer.sparse = i < s.dense_start
        row = {"iter": i, "val_loss": validation() if i % s.eval_interval == 0 else None, "lr": lr}
        losses, gradients = zip(*[micro_batch(i, m) for m in range(s.gradient_accumulation_steps)], strict=True)
        row["train_loss"] = sum(losses) / len(losses)
        mean = [sum(parts) / len(losses) for parts in zip(*gradients, strict=True)]
        row["grad_norm"] = math.sqrt(sum(float(g.square().sum()) for g in mean))
        clip = min(1.0, s.grad_clip / (row["grad_norm"] + 1e-6))
        gradient = {name: clip * g for name, g in zip(named, mean, strict=True)}
        pruned, before = {layer.weight: ~layer.mask for layer in layers if layer.sparse}, masks()
        decayed = sum(float((s.masked_decay * off * w.detach()).square().sum()) for w, off in pruned.items())
        clipped = sum(float(gradient[name].square().sum()) for name, w in named.items() if w in pruned)
        row["decay_ratio"] = math.sqrt(decayed / clipped) if pruned else None
        for name, w in named.items():
            g = gradient[name] + (s.masked_decay * pruned[w] * w.detach() if w in pruned else 0)
            m, v = moments[name]
            m, v = moments[name] = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
            update = m / (1 - s.beta1 ** (i + 1)) / ((v / (1 - s.beta2 ** (i + 1))).sqrt() + 1e-8)
            w.data = w.data * (1 - lr * (s.weight_decay if w.dim() >= 2 else 0)) - lr * update
        row["flip_rate"] = float((before != masks()).double().mean()) if i % s.flip_interval == 0 else None
        if (i + 1) % s.mask_interval == 0:
            for layer in (layer for layer in layers if layer.sparse):
                layer.refresh()
        rows.append(row)
    rows.append({"iter": len(lrs), "val_loss": validation()})
    saved = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = layer.weight.data * mask24(layer.weight.data)
    rows[-1]["val_loss_24"] = validation()
    for layer, w in zip(layers, saved, strict=True):
        layer.weight.data = w
    return rows

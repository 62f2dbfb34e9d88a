"""Routed hidden units: tiles of tokens share the hidden units that they compute (after V:N:M; research, plain PyTorch).

With squared ReLU a token uses few hidden units, and similar tokens use the same. X, Y (T, d), Z, A (T, d_ff). A unit is
UNIT adjacent hidden features. The c_k (d) are CENTROIDS vectors of length 1. E (CENTROIDS, units) is the mean energy,
the sum of A^2, that the tokens of a centroid have in each unit.

    router   e(x) = argmax_k <x, c_k>. The tokens of a micro-batch are sorted by e. Each V of them are a tile.
    tile     computes the share DENSITY of the units: those with the largest sum of E[e(x)] over the tile's tokens
    layer    Z = X W1^T      A = M relu(Z)^2      Y = A W2^T      M (T, d_ff): 1 where the token's tile computes

The gradient is that of the masked model, so all six products would skip the units that a tile leaves out. This file
only multiplies by M. It shows what the method costs in loss (results/act24-texts.md), not how fast it is.

Every INTERVAL-th step computes all units. Its first micro-batch, and that of every dense step, moves c and E towards
the means over its tokens. Training has a dense start and a dense end, and the first layer stays dense. In an evaluation
each token computes the units of its own centroid. In a tile, later tokens of a text would choose the units of earlier
ones.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from gemm24.ffn import FFNPlan
from sparse24 import Recipe, Sparse24Linear

V = 64  # tokens per tile
UNIT = 16  # hidden features per unit
CENTROIDS = 16
INTERVAL = 20  # steps between two steps that compute all units
MOVE = 0.1  # weight of a new mean in c and E


class VnmLinear(Sparse24Linear):
    """The second linear of a feed-forward layer, with the router. The state_dict holds `.centroids` (CENTROIDS, d),
    `.energies` (CENTROIDS, units), and `.updates`, the number of their updates."""

    DENSITY = 1 / 2

    def make_state(self) -> None:
        super().make_state()
        self.all_units, self.updating, self.is_first = True, False, False
        for name, shape in (("centroids", self.out_features), ("energies", self.in_features // UNIT)):
            self.register_buffer(name, torch.zeros(CENTROIDS, shape, device=self.weight.device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    def begin_micro_batch(self, iter_num: int, micro_batch: int) -> None:
        super().begin_micro_batch(iter_num, micro_batch)
        self.all_units = not self.sparse or iter_num % INTERVAL == 0
        self.updating = self.all_units and micro_batch == 0

    def begin_step(self, seed: int, iter_num: int, number: int, begin: bool = False) -> None:
        """Note whether this is the first layer, which stays dense."""
        self.is_first = number == 1

    @torch.no_grad()
    def update(self, x: torch.Tensor, a: torch.Tensor) -> None:
        """Move c and E towards the means of x (T, d), of length 1, and of the units' energies in a (T, d_ff)."""
        x, energies = x.float(), a.float().square().unflatten(-1, (-1, UNIT)).sum(-1)
        first = (self.updates == 0).to(x.dtype)  # a number, so that nothing waits for the GPU
        spread = x[:: max(1, len(x) // CENTROIDS)][:CENTROIDS]  # the first centroids: tokens from all over the batch
        self.centroids[: len(spread)].lerp_(spread, first)
        members = F.one_hot(self.nearest(x), CENTROIDS).to(x.dtype)  # (T, CENTROIDS)
        sizes = members.sum(0)[:, None]
        weight = (sizes > 0) * torch.maximum(first, first.new_tensor(MOVE))
        means = (members.t() @ x / sizes.clamp(min=1), members.t() @ energies / sizes.clamp(min=1))
        self.centroids.copy_(F.normalize(self.centroids.lerp(means[0], weight), dim=-1))
        self.energies.copy_(self.energies.lerp(means[1], weight))
        self.updates += 1

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """e(x), int64 (T,)."""
        return (x.float() @ self.centroids.t()).argmax(-1)

    def computed_units(self, x: torch.Tensor) -> torch.Tensor:
        """M by units: bool (T, units), True where the token's tile computes the unit. x: (T, d)."""
        nearest, units = self.nearest(x), self.energies.shape[1]
        if not self.training:
            return self.largest(self.energies)[nearest]
        order = nearest.argsort(stable=True)
        tiles = self.energies[nearest[order]].view(-1, V, units).sum(1)
        computed = torch.empty(len(x), units, dtype=torch.bool, device=x.device)
        computed[order] = self.largest(tiles).repeat_interleave(V, 0)
        return computed

    def largest(self, energies: torch.Tensor) -> torch.Tensor:
        """bool, True at the DENSITY share of the units with the most energy. energies: (n, units)."""
        chosen = energies.topk(max(1, round(self.DENSITY * energies.shape[1])), dim=-1).indices
        return torch.zeros_like(energies, dtype=torch.bool).scatter_(-1, chosen, True)


def vnm_ffn(x: torch.Tensor, c_fc: Sparse24Linear, c_proj: VnmLinear, plan: FFNPlan | None) -> torch.Tensor:
    """c_proj(M relu(c_fc(x))^2) in the sparse phase, else dense. x: (..., d). Raises ValueError if the tokens of a
    training batch do not divide into tiles."""
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    a = F.relu(nn.Linear.forward(c_fc, x)).square()
    with torch.no_grad():
        directions = F.normalize(x.float(), dim=-1)
        if c_proj.training and c_proj.updating and torch.is_grad_enabled():
            c_proj.update(directions, a)
    if c_proj.sparse and not c_proj.is_first and not (c_proj.training and c_proj.all_units):
        if c_proj.training and len(x) % V:
            raise ValueError(f"vnm: {len(x)} tokens, need a multiple of V={V}; change batch_size or block_size")
        a = a * c_proj.computed_units(directions).repeat_interleave(UNIT, -1)
    return nn.Linear.forward(c_proj, a).view(shape)


def check(settings) -> None:
    """Raises ValueError if a run with these settings cannot be routed."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    d_ff, tokens = settings.ffn_ratio * settings.n_embd, settings.batch_size * settings.block_size
    needs = [
        (ranks == 1, f"one rank, not {ranks}, because ranks do not share their centroids; start it without torchrun"),
        (round(settings.max_iters * settings.dense_pretrain) > 0, "a dense start; use --dense_pretrain=0.05"),
        (tokens % V == 0, f"batch_size x block_size = {tokens} to be a multiple of the V={V} tokens of a tile"),
        (d_ff % UNIT == 0, f"a hidden width that is a multiple of {UNIT}, not {d_ff:g}; change ffn_ratio"),
    ]
    for met, need in needs:
        if not met:
            raise ValueError(f"sparse={settings.sparse!r} needs {need}")


RECIPE = Recipe(
    "vnm",
    mask="none",
    dense_pretrain=0.05,
    dense_finetune=1 / 6,
    layer={"c_fc": Sparse24Linear, "c_proj": VnmLinear},
    ffn=vnm_ffn,
    activation="relu2",
    check=check,
)

"""Bi-directional masks for N:M sparse training, Bi-Mask (Zhang et al., ICML 2023).

M is row-wise 2:4 by magnitude, searched every step, and dX has a second mask B: of the rows of W*M, in the order of a
permutation, the two largest of four along out.

    Z  = X (W*M)^T        dX = dZ (W*M*B)        g <- clipped dW + decay * ~M * W

Every 100 steps the permutation becomes the one under which B keeps most of M, among 100 random ones and the present
one.
"""

import numpy as np
import torch

from sparse24 import Recipe, Sparse24Linear, expand_pairs, pair_index, seed_words, whole

SEARCH_INTERVAL = 100  # steps between searches
CANDIDATES = 100  # random permutations of a search
_TAG = 4  # keeps these random numbers apart from those for MVUE and from train.py's


class BiMaskLinear(Sparse24Linear):
    """A Sparse24Linear with a backward mask of its own. The state_dict holds it: `.permutation`, int64 (out,), is the
    order in which the rows are taken, and `.index_t`, uint8 (in, out/4), says which pair of each four is kept."""

    def make_state(self) -> None:
        super().make_state()
        self.register_buffer("permutation", torch.arange(self.out_features, device=self.weight.device))
        self.register_buffer("index_t", self._new_index_t())

    def _new_index_t(self) -> torch.Tensor:
        masked = torch.where(self.mask, whole(self.weight.detach()), 0)
        return pair_index(masked.t()[:, self.permutation])

    @torch.no_grad()
    def refresh(self, begin: bool = False) -> None:
        super().refresh(begin)
        self.index_t.copy_(self._new_index_t())

    @property
    def backward_mask(self) -> torch.Tensor:
        """M*B, bool (out, in)."""
        return self.mask & expand_pairs(self.index_t).t()[torch.argsort(self.permutation)]

    @torch.no_grad()
    def begin_step(self, seed: int, iter_num: int, number: int) -> None:
        """Once in SEARCH_INTERVAL steps: search the permutation."""
        if iter_num % SEARCH_INTERVAL:
            return
        words = seed_words(1, seed, iter_num, number, _TAG)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        drawn = [torch.randperm(self.out_features, generator=generator) for _ in range(CANDIDATES)]
        candidates = torch.stack([self.permutation, *torch.stack(drawn).to(self.permutation.device)])
        mask_t = self.mask.t()
        counts = [mask_t[:, order].unflatten(1, (-1, 4)).sum(-1).clamp(max=2).sum() for order in candidates]
        self.permutation.copy_(candidates[torch.stack(counts).argmax()])
        self.index_t.copy_(self._new_index_t())


RECIPE = Recipe("bi_mask", mask="row", masked_decay=2e-4, mask_interval=1, layer=BiMaskLinear)

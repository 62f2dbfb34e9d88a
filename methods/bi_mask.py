"""Bi-directional masks for N:M sparse training, Bi-Mask (Zhang et al., ICML 2023).

M is row-wise 2:4 by magnitude, new every step. dX has a second mask B. It permutes the rows of W*M and keeps the two
largest of each four along out.

    Z  = X (W*M)^T        dX = dZ (W*M*B)        g <- clipped dW + decay * ~M * W

Every 100 steps the permutation is searched among 100 random ones and the current one. The best one lets B keep the
largest part of M.
"""

import numpy as np
import torch

from sparse24 import Recipe, Sparse24Linear, expand_pairs, pair_index, seed_words, whole

SEARCH_INTERVAL = 100  # steps between searches
CANDIDATES = 100  # random permutations per search
_TAG = 4  # makes these random numbers independent of those for MVUE and in train.py


class BiMaskLinear(Sparse24Linear):
    """A Sparse24Linear with a backward mask. The state_dict holds it: `.permutation`, int64 (out,), is the order of the
    rows, and `.index_t`, uint8 (in, out/4), is the pair that each four of these rows keep."""

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
    def begin_step(self, seed: int, iter_num: int, number: int, begin: bool = False) -> None:
        """Search the permutation, once in SEARCH_INTERVAL steps."""
        if iter_num % SEARCH_INTERVAL:
            return
        words = seed_words(1, seed, iter_num, number, _TAG)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        random = torch.stack([torch.randperm(self.out_features, generator=generator) for _ in range(CANDIDATES)])
        candidates = torch.stack([self.permutation, *random.to(self.permutation.device)])
        mask_t = self.mask.t()
        counts = [mask_t[:, order].unflatten(1, (-1, 4)).sum(-1).clamp(max=2).sum() for order in candidates]
        self.permutation.copy_(candidates[torch.stack(counts).argmax()])
        self.index_t.copy_(self._new_index_t())


RECIPE = Recipe("bi_mask", mask="row", masked_decay=2e-4, mask_interval=1, layer=BiMaskLinear)

"""The methods of 2:4 training: every choice in which one differs from another, and the papers' equations.

W (out, in), X (BT, in), Z = X C(W)^T. C is the pruning, M its mask, S the soft threshold; g the clipped gradient, m and
v Adam's moments.

fst      Hu et al., ICML 2024. M transposable, the best of 90 patterns per 4x4 block, every 40 steps.
             Z = X (W*M)^T    dX = dZ (W*M)    dW = MVUE(dZ^T) X, straight through             Eq. 2, 3, 6
             g <- g + decay * ~M * W before Adam's moments; the last 1/6 of the steps is dense   Eq. 10, section 4.4
ste      fst without decay, MVUE and dense phase: the flip-rate explosion of Figure 1.
sr_ste   Zhou et al., ICLR 2021. M row-wise by magnitude, every step; dX multiplies the same W*M as a dense matrix.
             W <- W - lr * decay * ~M * W, beside Adam's update and not through its moments           Eq. 8
step     Lu et al., ICML 2023. Dense until the second moments have settled, then v stays what it was at the switch:
             m_t = b1 m + (1 - b1) g    W <- W - lr m_t' / (sqrt(v_switch') + eps)    (primes: bias-corrected)
         AutoSwitch: once Z_t, the mean of |v_t - v_{t-1}| over the weights, averaged over the last 1/(1 - b2) steps,
         falls below Adam's eps, but not before 10 % of the steps, and by 50 % whatever it is. Row-wise M, every step.
         Here v is frozen for the sparse weights alone, as the authors of FST had it in their comparison.
bi_mask  Zhang et al., ICML 2023. M row-wise, and for dX a second mask B: of the rows of W*M, in the order of a
         permutation, the two largest of four along out. dX = dZ (W*M*B). Every 100 steps the permutation is the best of
         100 random ones and the present one, the one under which B keeps most. Decay as Eq. 10.
s_ste    Hu et al., NeurIPS 2024. C(W) = beta S(W), S(w) = sign(w) max(|w| - t, 0), t the second-smallest magnitude of
         the group: continuous in w. beta = <W, S(W)> / <S(W), S(W)> when the layer becomes sparse, then fixed. dX
         multiplies the same C(W) as a dense matrix. W gets its true gradient beta J^T dC, J the Jacobian of S and
         dC = MVUE(dZ^T) X. It had a lower loss than straight through at learning rate 3e-3
         (results/quality-6seeds.md); nothing is known at better rates.
s_ste_straight  s_ste as published: dC reaches W as it is, without beta and without J.
"""

import math
from dataclasses import dataclass, replace

AUTOSWITCH_LATEST = 0.5  # STEP's upper clip of the switch, a share of max_iters; dense_pretrain is the lower one
PERMUTATIONS = 100  # candidates of Bi-Mask's search
# The fields that are settings of train.py too. All other fields are edited here, in RECIPES.
SETTINGS = ("mask_interval", "masked_decay", "mvue", "dense_finetune", "dense_pretrain")


@dataclass(frozen=True)
class Recipe:
    """One method of 2:4 training. Shares are of max_iters, intervals in optimizer steps. Raises ValueError where
    a field is out of range, or where fields exclude one another."""

    name: str
    mask: str = "transposable"  # "transposable", "row" (row-wise by magnitude) or "soft" (soft threshold, row-wise)
    backward_mask: str = "same"  # dX multiplies the forward's masked W ("same") or one with its own mask ("own")
    permutation_interval: int = 0  # steps between searches for the row order of the own backward mask; 0 = as they are
    mvue: bool = False  # 2:4 weight-gradient GEMM through MVUE, else a dense one
    masked_decay: float = 0.0  # the decay factor lambda itself; 0 = none
    decay_on: str = "grad"  # "grad": Eq. 10; "weight": SR-STE's Eq. 8
    mask_interval: int = 40  # steps between mask refreshes
    dense_finetune: float = 0.0  # share of the steps that are dense, at the end
    dense_pretrain: float = 0.0  # share of the steps that are dense, at the start
    precondition: bool = False  # STEP: Adam's second moments are frozen after the dense start
    autoswitch: bool = False  # STEP's rule ends the dense start, from dense_pretrain on
    weight_gradient: str = "straight"  # dW of soft weights: "straight" through, or "true" (beta times the Jacobian)
    fp8: bool = False  # simulate FP8 GEMMs: W and X in E4M3, dZ in E5M2, one scale per tensor

    def __post_init__(self):
        allowed = {
            "mask": ("transposable", "row", "soft"),
            "backward_mask": ("same", "own"),
            "decay_on": ("grad", "weight"),
            "weight_gradient": ("straight", "true"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"Recipe: {field}={getattr(self, field)!r}, need one of {', '.join(values)}")
        if not self.masked_decay >= 0 or math.isinf(self.masked_decay):
            raise ValueError(f"Recipe: masked_decay={self.masked_decay}, need a finite factor of at least 0")
        if self.mask_interval < 1:
            raise ValueError(f"Recipe: mask_interval={self.mask_interval}, need at least 1 step")
        if self.permutation_interval < 0:
            raise ValueError(f"Recipe: permutation_interval={self.permutation_interval}, need at least 0 (never)")
        for field in ("dense_finetune", "dense_pretrain"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"Recipe: {field}={getattr(self, field)}, need a fraction of max_iters from 0 to 1")
        self._check_together()

    def _check_together(self) -> None:
        """Fields that would be ignored, or make no sense, beside others."""
        soft = self.mask == "soft"
        needs = (
            (self.dense_pretrain + self.dense_finetune <= 1, "dense_pretrain + dense_finetune <= 1"),
            (self.backward_mask == "same" or self.mask == "row", "mask='row' for backward_mask='own'"),
            (
                self.permutation_interval == 0 or self.backward_mask == "own",
                "backward_mask='own' for permutation_interval",
            ),
            (soft or self.weight_gradient == "straight", "mask='soft' for weight_gradient"),
            (not soft or self.mask_interval == 1, "mask_interval=1 for mask='soft', which follows every step"),
            (not self.precondition or self.dense_pretrain > 0, "dense_pretrain above 0 for precondition"),
            (
                not self.autoswitch or 0 < self.dense_pretrain <= AUTOSWITCH_LATEST,
                f"dense_pretrain above 0 and at most {AUTOSWITCH_LATEST} for autoswitch, as its earliest",
            ),
        )
        wrong = [need for met, need in needs if not met]
        if wrong:
            raise ValueError(f"Recipe {self.name!r}: need {'; '.join(wrong)}")

    @property
    def virtual_mask(self) -> str:
        """The kind of masks whose flips count: "transposable", or "row" for row-wise and soft ones."""
        return "transposable" if self.mask == "transposable" else "row"

    @property
    def fused(self) -> bool:
        """Whether ffn.py's one function computes what two layers do: one pruned W for all GEMMs, and no FP8."""
        return self.backward_mask == "same" and not self.fp8


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fst", mvue=True, masked_decay=6e-5, dense_finetune=1 / 6),
        Recipe("ste"),
        Recipe("sr_ste", mask="row", masked_decay=2e-4, decay_on="weight", mask_interval=1),
        Recipe("s_ste", mask="soft", mvue=True, mask_interval=1, weight_gradient="true"),
        Recipe("s_ste_straight", mask="soft", mvue=True, mask_interval=1),
        Recipe("step", mask="row", mask_interval=1, dense_pretrain=0.1, precondition=True, autoswitch=True),
        Recipe(
            "bi_mask", mask="row", backward_mask="own", permutation_interval=100, masked_decay=2e-4, mask_interval=1
        ),
    )
}


def recipe_of(settings: dict) -> Recipe | None:
    """The recipe of {"sparse": name, field: value...}: the named one, with the fields of SETTINGS that are given; None
    for "none". Other keys are passed over."""
    if settings["sparse"] == "none":
        return None
    return replace(get_recipe(settings["sparse"]), **{name: settings[name] for name in SETTINGS if name in settings})


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself. Raises ValueError with the names there are."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown, need one of {', '.join(RECIPES)}")
    return RECIPES[recipe]

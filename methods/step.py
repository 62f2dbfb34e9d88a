"""STEP: learning N:M masks with preconditioning (Lu et al., ICML 2023).

Training is dense until Adam's second moments v have settled. Then the weights become sparse and v is frozen. M is
row-wise 2:4 by magnitude, new every step.

    m_t = b1 m_{t-1} + (1 - b1) g        W <- W - lr m_t' / (sqrt(v_switch') + eps)        (primes: bias-corrected)

AutoSwitch: Z_t is the mean of |v_t - v_{t-1}| over the weights. The switch happens when the average of Z over the last
1/(1 - b2) steps is below Adam's eps, but not before 10 % of the steps and not after 50 %.

v is frozen only for the sparse weights, as in the experiments of the authors of FST.
"""

import math

import torch

from sparse24 import MaskedDecayAdamW, Recipe, local, sparse_linears, total


class StepAdamW(MaskedDecayAdamW):
    """AdamW with frozen second moments for the weights of layers in their sparse phase. `dense_start_done` is
    AutoSwitch. `step` raises RuntimeError if such a weight has had no dense step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dense_start_log = []  # Z_t of the last steps

    def update(self) -> None:
        frozen = self._frozen()
        gradients = [p.grad for p, _ in frozen]
        for p, _ in frozen:
            p.grad = None  # makes AdamW skip it
        super().update()
        for (p, group), p.grad in zip(frozen, gradients, strict=True):
            self._preconditioned_step(p, p.grad, group)

    def _kernel_step(self) -> bool:
        """One kernel does the whole step while no second moments are frozen."""
        return not self._frozen() and super()._kernel_step()

    def _frozen(self) -> list[tuple[torch.Tensor, dict]]:
        """(weight, parameter group) of each layer in its sparse phase."""
        layers = {layer.weight: layer for layer in sparse_linears(self.model)}
        for w in (w for w, layer in layers.items() if not layer.sparse and w in self.state):
            self.state[w].pop("frozen_step", None)  # in a dense phase the second moments are updated
        frozen = {w for w, layer in layers.items() if layer.sparse and w.grad is not None}
        if any(not self.state.get(w) for w in frozen):
            raise RuntimeError("StepAdamW: a sparse weight has had no dense step; need a larger dense_pretrain")
        return [(p, group) for group in self.param_groups for p in group["params"] if p in frozen]

    @torch.no_grad()
    def _preconditioned_step(self, p: torch.Tensor, grad: torch.Tensor, group: dict) -> None:
        """Adam's update with frozen second moments."""
        state, lr, (beta1, beta2) = self.state[p], group["lr"], group["betas"]
        if "frozen_step" not in state:
            state["frozen_step"] = int(state["step"])
        state["step"] += 1
        p, grad, m, v = (local(t) for t in (p, grad, state["exp_avg"], state["exp_avg_sq"]))
        m.lerp_(-grad if group["maximize"] else grad, 1 - beta1)
        denominator = (v / (1 - beta2 ** state["frozen_step"])).sqrt_().add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        bias = 1 - beta1 ** state["step"].double()  # a tensor, so that nothing waits for the GPU
        p.sub_(lr * m / (denominator * bias))

    @torch.no_grad()
    def dense_start_done(self) -> bool:
        """AutoSwitch, with |v_t - v_{t-1}| = (1 - b2) |g^2 - v_{t-1}|. Waits for the GPU."""
        group = self.param_groups[0]
        beta2, eps = group["betas"][1], group["eps"]
        window = max(1, round(1 / (1 - beta2)))
        weights, changes = [layer.weight for layer in sparse_linears(self.model)], []
        for w in weights:
            v = self.state[w].get("exp_avg_sq") if w in self.state else None
            squares = local(w.grad).float().square()
            changes.append((squares if v is None else squares.sub_(local(v)).abs_()).sum(dtype=torch.float64))
        change = float(total(torch.stack(changes).sum(), weights[0]))
        change *= (1 - beta2) / sum(w.numel() for w in weights)
        if math.isfinite(change):  # otherwise train.py skips this step
            self.dense_start_log = [*self.dense_start_log, change][-window:]
        return len(self.dense_start_log) == window and sum(self.dense_start_log) / window < eps


RECIPE = Recipe(
    "step",
    mask="row",
    mask_interval=1,
    dense_pretrain=0.1,
    dense_pretrain_latest=0.5,
    optimizer=StepAdamW,
)

"""STEP: learning N:M masks with preconditioning (Lu et al., ICML 2023).

Training is dense until Adam's second moments v have settled. Then the weights become sparse, M being row-wise 2:4 by
magnitude, searched every step, and v stays what it was at the switch:

    m_t = b1 m_{t-1} + (1 - b1) g        W <- W - lr m_t' / (sqrt(v_switch') + eps)        (primes: bias-corrected)

AutoSwitch: Z_t is the mean of |v_t - v_{t-1}| over the weights. The switch comes when its average over the last
1/(1 - b2) steps falls below Adam's eps, but not before 10 % of the steps and not after 50 %.

Here v is frozen for the sparse weights alone, as the authors of FST did it.
"""

import math

import torch

from sparse24 import MaskedDecayAdamW, Recipe, local, sparse_linears, total


class StepAdamW(MaskedDecayAdamW):
    """AdamW that keeps, for the weights of layers in their sparse phase, the second moments of the switch. It raises
    RuntimeError where there are none. `dense_start_done` is AutoSwitch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dense_start_log = []  # Z_t of the last steps

    def update(self) -> None:
        frozen = self._frozen()
        gradients = [p.grad for p, _ in frozen]
        for p, _ in frozen:
            p.grad = None  # so that AdamW skips it
        super().update()
        for (p, group), p.grad in zip(frozen, gradients, strict=True):
            self._preconditioned_step(p, p.grad, group)

    def _frozen(self) -> list[tuple[torch.Tensor, dict]]:
        """(weight, its group) of the layers in their sparse phase."""
        layers = {layer.weight: layer for layer in sparse_linears(self.model)}
        for w in (w for w, layer in layers.items() if not layer.sparse and w in self.state):
            self.state[w].pop("frozen_step", None)  # in a dense phase the moments move again
        frozen = {w for w, layer in layers.items() if layer.sparse and w.grad is not None}
        if any(not self.state.get(w) for w in frozen):
            raise RuntimeError("StepAdamW: frozen moments need dense steps first; raise dense_pretrain")
        return [(p, group) for group in self.param_groups for p in group["params"] if p in frozen]

    @torch.no_grad()
    def _preconditioned_step(self, p: torch.Tensor, grad: torch.Tensor, group: dict) -> None:
        """Adam's update with the second moments of the step at which they were frozen."""
        state, lr, (beta1, beta2) = self.state[p], group["lr"], group["betas"]
        if "frozen_step" not in state:
            state["frozen_step"] = int(state["step"])
        state["step"] += 1
        p, grad, m, v = (local(t) for t in (p, grad, state["exp_avg"], state["exp_avg_sq"]))
        m.lerp_(grad, 1 - beta1)
        denominator = (v / (1 - beta2 ** state["frozen_step"])).sqrt_().add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        bias = 1 - beta1 ** state["step"].double()  # stays a tensor, so that nothing waits for a GPU
        p.sub_(lr * m / (denominator * bias))

    @torch.no_grad()
    def dense_start_done(self) -> bool:
        """Whether the second moments have settled. Waits for the GPU. |v_t - v_{t-1}| is (1 - b2) |g^2 - v_{t-1}|."""
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
        if math.isfinite(change):  # else the step is skipped
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

"""Checks that a run is healthy: its flip rate against a dense run's (sections 4.1 to 4.3), its gradients and losses.

mu = r'/r is the flip rate of a sparse run divided by that of a dense run at the same step. A run is healthy if mu is
between 0.60 and 0.95. If mu is above 1, the flip rate explodes. A healthy flip rate first rises and then fades to 0.
studies/search_decay.py finds a decay factor whose mu is in the band.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from configurator import without_removed
from runtime import checkpoint
from runtime.metrics import read_config, read_metrics, smooth
from sparse24 import flip_rate, local, sparse_linears, total, weight_indices

HEALTHY = (0.60, 0.95)  # section 4.3
TARGET = math.sqrt(HEALTHY[0] * HEALTHY[1])  # the geometric mean of the band
# Flip rates of two runs can be compared if these settings agree. Seeds may differ, because they hardly change r.
COMPARABLE = (
    *("dataset", "n_layer", "n_head", "n_embd", "activation", "ffn_ratio"),
    *("block_size", "batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_iters", "decay_lr"),
    *("lr_decay_iters", "min_lr", "grad_clip", "weight_decay", "beta1", "beta2", "flip_mask"),
)


class FlipReference:
    """The flip rate of a recorded dense run, the setting `flip_reference`, as a function of the step."""

    def __init__(self, folder: str | Path, settings: dict):
        """folder: out_dir of the dense run. settings: those of the run to compare it with.

        Raises ValueError if they do not compare or flip rates are missing, FileNotFoundError if there is no run.
        """
        rows = [row for row in read_metrics(folder) if row["flip_rate"] is not None and (row["lr"] or 0) > 0]
        config = without_removed(read_config(folder), folder)
        need = {name: settings[name] for name in COMPARABLE} | {"sparse": "none"}
        differing = [f"{k}={value} (there {config.get(k)})" for k, value in need.items() if config.get(k) != value]
        if differing:
            raise ValueError(
                f"flip_reference={folder} does not compare with this run: {', '.join(differing)}; record another "
                "dense run with studies.search_decay or train.py --sparse=none"
            )
        if len(rows) < 5:
            raise ValueError(f"flip_reference={folder}: {len(rows)} flip rates, need 5 or more; lower flip_interval")
        self.iters = [row["iter"] for row in rows]
        self.rates = smooth([row["flip_rate"] for row in rows], 2)
        tail = rows[-max(5, len(rows) // 5) :]
        self.per_lr = statistics.fmean(r["flip_rate"] for r in tail) / statistics.fmean(r["lr"] for r in tail)

    def rate(self, iter_num: int, lr: float) -> float:
        """r at this step. After the end of the record r is proportional to the learning rate."""
        if iter_num > self.iters[-1]:
            return self.per_lr * lr
        return float(np.interp(iter_num, self.iters, self.rates))


class FlipWatch:
    """Warns once if the flip rate explodes, and once if it does not fade.

    It explodes if the mean of the last 5 mu, measured after the warm-up, is 1 or more. It does not fade if the mean of
    the last 5 flip rates is above 0.9 of the highest mean of 5, halfway to step `end`. Halfway is counted from the end
    of the warm-up or the first sparse step, whichever is later.
    """

    COUNT, FADED = 5, 0.9

    def __init__(self, warmup_iters: int, end: int, reference: FlipReference | None = None):
        self.warmup_iters, self.end, self.reference = warmup_iters, end, reference
        self.begin = None  # the first sparse step, or the end of the warm-up if that is later
        self.rates: list[float] = []
        self.mus: list[float] = []
        self.warned: set[str] = set()

    def replay(self, rows: list[dict]) -> None:
        """Add the rows of metrics.jsonl that an earlier start of this run wrote, without repeating its warnings."""
        for row in rows:
            if row["phase"] == "sparse" and None not in (row["flip_rate"], row["lr"]):
                self.add(row["iter"], row["flip_rate"], row["lr"])

    def add(self, iter_num: int, rate: float, lr: float) -> list[str]:
        """Add the flip rate of a sparse step. Returns new warnings, with their remedies."""
        self.rates.append(rate)
        self.begin = max(iter_num, self.warmup_iters) if self.begin is None else self.begin
        if self.reference and iter_num >= self.warmup_iters:
            self.mus.append(rate / max(self.reference.rate(iter_num, lr), 1e-12))
        warnings = {}
        if len(self.mus) >= self.COUNT and (mu := statistics.fmean(self.mus[-self.COUNT :])) >= 1:
            warnings["explodes"] = (
                f"the flip rate is {mu:.2f} times the dense run's, which raises the loss (section 4.1); raise "
                "masked_decay: python -m studies.search_decay finds a good value"
            )
        if 2 * iter_num >= self.begin + self.end and len(self.rates) >= 2 * self.COUNT:
            means = smooth(self.rates, self.COUNT // 2)
            recent, peak = statistics.fmean(self.rates[-self.COUNT :]), max(means)
            if recent > self.FADED * peak:
                warnings["not fading"] = (
                    f"half of the schedule is over, but the flip rate, {recent:.5f}, has not fallen from its peak of "
                    f"{peak:.5f} (section 4.1); raise masked_decay, or let the learning rate decay"
                )
        new_warnings = [text for kind, text in warnings.items() if kind not in self.warned]
        self.warned |= warnings.keys()
        return new_warnings


class FlipMeter:
    """Measures the flip rate every flip_interval steps (Definition 4.1), and the strength of masked decay."""

    def __init__(self, s, recipe, model: nn.Module, linears: list[nn.Linear], watch: FlipWatch, ranks):
        """linears: the layers to measure. Dense layers count with the masks that their weights would have."""
        self.s, self.recipe, self.model, self.linears = s, recipe, model, linears
        self.watch, self.ranks, self.before = watch, ranks, None

    def before_step(self, row: dict, log_now: bool, finite: bool) -> None:
        """Call it between clipping and the optimizer's step. Adds masked_decay and decay_ratio to the row."""
        due = bool(self.linears) and self.s.flip_interval > 0 and row["iter"] % self.s.flip_interval == 0
        if row["phase"] == "sparse" and self.s.masked_decay:
            row["masked_decay"] = self.s.masked_decay
            if finite and (log_now or due) and self.recipe.decay_on == "grad":
                row["decay_ratio"] = decay_ratio(self.model, self.s.masked_decay)
        # Nothing flips in a step that is skipped because of its gradient.
        self.before = weight_indices(self.linears, self.s.flip_mask) if due and finite else None

    def after_step(self, row: dict) -> None:
        """Call it after the optimizer's step. Adds flip_rate to the row, and warns if it is not healthy."""
        if self.before is None:
            return
        row["flip_rate"] = flip_rate(self.before, weight_indices(self.linears, self.s.flip_mask))
        if row["phase"] == "sparse" and self.ranks.master and not self.recipe.ffn:  # else no weights are masked
            for warning in self.watch.add(row["iter"], row["flip_rate"], row["lr"]):
                print(f"warning, iteration {row['iter']}: {warning}", flush=True)


class ActivationMeter:
    """Reports what the layers of act24 count: zeros, groups with more than two non-zeros, the energy that 2:4 drops. It
    says which blocks join or leave, and warns once of each that drops much."""

    MOST_DROPPED = 0.02  # share of the energy, the sum of squares, of a block's hidden activations

    def __init__(self, model: nn.Module, ranks):
        self.layers, self.ranks = [m for m in sparse_linears(model) if hasattr(m, "measured")], ranks
        self.joined, self.warned = None, set()  # the blocks that have joined, as last reported

    def after_step(self, row: dict) -> None:
        """Call it after every step. Adds lists with one number per block to the row if the step has counted."""
        measured = [layer.measured(row["iter"]) for layer in self.layers] if self.ranks.master else []
        if measured and measured[0] is not None:
            row |= {name: [block[name] for block in measured] for name in measured[0]}
        joined = [block for block, layer in enumerate(self.layers) if layer.joined and layer.sparse]
        if self.layers and self.layers[0].sparse and joined != self.joined and self.ranks.master:
            self.joined = joined
            dense = [f"{b} ({m.crowded():.1%})" for b, m in enumerate(self.layers) if b not in joined]
            text = f"2:4 activations in blocks {', '.join(map(str, joined)) or 'none'}"
            if dense:
                text += f"; dense, because too many groups have more than two non-zeros: {', '.join(dense)}"
            print(f"iteration {row['iter']}: {text}", flush=True)
        for block in set(joined) - self.warned if "energy_dropped" in row else ():
            if (dropped := row["energy_dropped"][block]) > self.MOST_DROPPED:
                self.warned.add(block)
                print(
                    f"warning, iteration {row['iter']}: 2:4 drops {dropped:.1%} of the energy of block {block}'s "
                    f"activations, more than {self.MOST_DROPPED:.0%}; lower JOIN and LEAVE in methods/act24.py",
                    flush=True,
                )


def decay_ratio(model: nn.Module, masked_decay: float) -> float | None:
    """RMS(masked_decay * ~mask * w) / RMS(grad) over the sparse weights. None if no sparse layer has a gradient.

    Call it between clipping and the optimizer's step.
    """
    layers = [m for m in sparse_linears(model) if m.sparse and m.weight.grad is not None]
    if not layers:
        return None
    decayed = sum(torch.where(m.mask_rows(), 0, local(m.weight.detach())).float().square().sum() for m in layers)
    gradient = sum(local(m.weight.grad).float().square().sum() for m in layers)
    decayed, gradient = total(torch.stack([decayed, gradient]), layers[0].weight.detach())
    return float(masked_decay * (decayed / gradient).sqrt()) if float(gradient) > 0 else None


class LossWatch:
    """Finds losses that are not finite, or that exceed the mean of the last COUNT by SIGMAS standard deviations.

    Such losses do not enter the mean. Each rank watches its own micro-batches.
    """

    COUNT, LEAST, SIGMAS = 200, 50, 6.0

    def __init__(self):
        self.recent: deque[float] = deque(maxlen=self.COUNT)
        self.in_a_row = 0

    def add(self, loss: float) -> str | None:
        """Add the loss of one micro-batch. Returns a description if it is an outlier."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if len(self.recent) >= self.LEAST:
            mean = statistics.fmean(self.recent)
            deviation = math.sqrt(statistics.fmean((x - mean) ** 2 for x in self.recent))
            if loss > mean + self.SIGMAS * deviation:
                self.in_a_row += 1
                count = len(self.recent)
                if self.in_a_row == self.LEAST:  # this is not a spike but a new level of the loss
                    self.recent.clear()
                return f"loss {loss:.4f}, while the last {count} were {mean:.4f} +- {deviation:.4f}"
        self.in_a_row = 0
        self.recent.append(loss)
        return None


class Diverged(RuntimeError):
    """The last loss, or more than MAX_SKIPPED gradients in a row, were not finite."""


class StepGuard:
    """Skips steps whose gradient is not finite, and warns of outliers among the losses."""

    MAX_SKIPPED = 20  # steps in a row

    def __init__(self, s, ranks, writer, skipped: int, in_a_row: int):
        """skipped: number of steps skipped so far. in_a_row: number of the latest steps skipped in a row."""
        self.s, self.ranks, self.writer = s, ranks, writer
        self.skipped, self.in_a_row, self.losses = skipped, in_a_row, LossWatch()
        self.loss = 0.0  # the sum of the latest step's losses on this rank

    def check(self, row: dict, losses: list[float], starts_of: Callable) -> bool:
        """Returns whether the gradient is finite. Raises Diverged after too many skipped steps.

        losses: those of this rank's micro-batches. starts_of(micro_batch): positions of its windows in the data.
        """
        micro_batches = range(self.ranks.rank, self.s.gradient_accumulation_steps, self.ranks.world_size)
        for micro_batch, loss in zip(micro_batches, losses, strict=True):
            if spike := self.losses.add(loss):
                starts = ", ".join(str(start) for start in starts_of(micro_batch)[:8])
                place = f"iteration {row['iter']}, micro-batch {micro_batch}, windows at tokens {starts}"
                print(f"warning, rank {self.ranks.rank}: {spike}; {place}", flush=True)
        self.loss, finite = sum(losses), math.isfinite(row["grad_norm"])
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        row["skipped"] = self.skipped
        if not finite and self.ranks.master:
            print(f"warning, iteration {row['iter']}: gradient norm {row['grad_norm']}, step skipped", flush=True)
        if self.in_a_row > self.MAX_SKIPPED:
            self.writer.wait()
            raise Diverged(
                f"the last {self.in_a_row} gradients were not finite, so that their steps were skipped; the checkpoint "
                f"is {checkpoint.find(self.s.out_dir) or 'none'}; lower learning_rate, or look at the data named above"
            )
        return finite

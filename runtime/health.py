"""Is the flip rate healthy (section 4.1 to 4.3)? mu = r'/r, of a sparse run's flip rate and of a dense run's at the
same step. A run is healthy with mu from 0.60 to 0.95; above 1 its masks explode, and it should rise and fade to 0.

train.py compares it with a dense run that was recorded before (`flip_reference`), and warns. studies/search_decay.py
records that dense run, and finds a decay factor whose mu is in the band.

Beside it: the guard that skips steps with a gradient that is not finite, and names the data of losses that stand out.
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
TARGET = math.sqrt(HEALTHY[0] * HEALTHY[1])  # the band's middle, as ratios go
# These settings must agree for two flip rates to be compared. Seeds may differ: r differs little between them.
COMPARABLE = (
    *("dataset", "n_layer", "n_head", "n_embd", "activation", "ffn_ratio"),
    *("block_size", "batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_iters", "decay_lr"),
    *("lr_decay_iters", "min_lr", "grad_clip", "weight_decay", "beta1", "beta2"),
)


class FlipReference:
    """The flip rate of a dense run that was recorded, as a function of the step."""

    def __init__(self, folder: str | Path, settings: dict, virtual_mask: str):
        """folder: out_dir of the dense run. settings: of the run to compare with it. virtual_mask: the kind of masks
        whose flips are compared, "transposable" or "row".

        Raises ValueError where the folder holds no flip rates, or a run that does not compare; FileNotFoundError where
        there is none.
        """
        rows = [row for row in read_metrics(folder) if row.get("flip_rate") is not None and row["lr"] > 0]
        config = without_removed(read_config(folder), folder)
        if config.get("sparse") != "none":
            raise ValueError(
                f"flip_reference={folder}: sparse={config.get('sparse')!r}, need a dense run (sparse=none)"
            )
        differing = [f"{k}={settings[k]} (there {config.get(k)})" for k in COMPARABLE if settings[k] != config.get(k)]
        if config.get("flip_mask") != virtual_mask:
            differing.append(f"masks {virtual_mask} (there flip_mask={config.get('flip_mask')})")
        if differing:
            raise ValueError(
                f"flip_reference={folder} does not compare with this run: {', '.join(differing)}; record another with "
                "studies.search_decay, or with train.py --sparse=none"
            )
        if len(rows) < 5:
            raise ValueError(
                f"flip_reference={folder}: {len(rows)} flip rates, need 5 or more; lower flip_interval there"
            )
        self.iters = [row["iter"] for row in rows]
        self.rates = smooth([row["flip_rate"] for row in rows], 2)
        tail = rows[-max(5, len(rows) // 5) :]
        self.per_lr = statistics.fmean(r["flip_rate"] for r in tail) / statistics.fmean(r["lr"] for r in tail)

    def rate(self, iter_num: int, lr: float) -> float:
        """r at this step; past the record's end it goes on in proportion to the learning rate."""
        if iter_num > self.iters[-1]:
            return self.per_lr * lr
        return float(np.interp(iter_num, self.iters, self.rates))


class FlipWatch:
    """Warns, once each, when the flip rate explodes or does not fade. It has no state but the flip rates it was given.

    explodes    the mean of mu over the last 5 measurements, after the warm-up, is 1 or more
    not fading  half-way from the warm-up's end, or the first sparse step if that is later, to `end`, the last 5
                measurements are still above 0.9 of the peak's 5
    """

    COUNT, FADED = 5, 0.9

    def __init__(self, warmup_iters: int, end: int, reference: FlipReference | None = None):
        self.warmup_iters, self.end, self.reference = warmup_iters, end, reference
        self.begin = None  # the later of the first step that it is told of, and the warm-up's end
        self.rates: list[float] = []
        self.mus: list[float] = []
        self.warned: set[str] = set()

    def replay(self, rows: list[dict]) -> None:
        """Take the rows of metrics.jsonl that an earlier start of this run wrote. It has warned of them already."""
        for row in rows:
            if row["phase"] == "sparse" and row["flip_rate"] is not None:
                self.add(row["iter"], row["flip_rate"], row["lr"])

    def add(self, iter_num: int, rate: float, lr: float) -> list[str]:
        """The flip rate of a sparse step; returns what is wrong and what to do."""
        self.rates.append(rate)
        self.begin = max(iter_num, self.warmup_iters) if self.begin is None else self.begin
        if self.reference and iter_num >= self.warmup_iters:
            self.mus.append(rate / max(self.reference.rate(iter_num, lr), 1e-12))
        found = {}
        if len(self.mus) >= self.COUNT and (mu := statistics.fmean(self.mus[-self.COUNT :])) >= 1:
            found["explodes"] = (
                f"the flip rate is {mu:.2f} times the dense run's, which costs loss (section 4.1); a larger "
                "masked_decay lowers it: python -m studies.search_decay finds one"
            )
        if 2 * iter_num >= self.begin + self.end and len(self.rates) >= 2 * self.COUNT:
            means = smooth(self.rates, self.COUNT // 2)
            recent, peak = statistics.fmean(self.rates[-self.COUNT :]), max(means)
            if recent > self.FADED * peak:
                found["not fading"] = (
                    f"the flip rate, {recent:.5f}, has not come down from its peak of {peak:.5f}, and half of the "
                    "schedule is over; a healthy one fades (section 4.1): raise masked_decay, or let the learning rate "
                    "decay"
                )
        new = [text for kind, text in found.items() if kind not in self.warned]
        self.warned |= found.keys()
        return new


class FlipMeter:
    """Measures the flip rate every flip_interval steps (Definition 4.1), and beside it how strong masked decay is."""

    def __init__(self, s, recipe, model: nn.Module, linears: list[nn.Linear], watch: FlipWatch, ranks):
        """linears: the layers whose masks count; in a dense run the masks that their weights would have."""
        self.s, self.recipe, self.model, self.linears = s, recipe, model, linears
        self.watch, self.ranks, self.before = watch, ranks, None

    def before_step(self, row: dict, log_now: bool, finite: bool) -> None:
        """Call it between clipping and the optimizer's step. Adds masked_decay and decay_ratio to the row."""
        due = bool(self.linears) and self.s.flip_interval > 0 and row["iter"] % self.s.flip_interval == 0
        if row["phase"] == "sparse" and self.s.masked_decay:
            row["masked_decay"] = self.s.masked_decay
            if finite and (log_now or due) and self.recipe.decay_on == "grad":
                row["decay_ratio"] = decay_ratio(self.model, self.s.masked_decay)
        # A step with a gradient that is not finite is skipped, so nothing flips.
        self.before = weight_indices(self.linears, self.s.flip_mask) if due and finite else None

    def after_step(self, row: dict) -> None:
        """Call it after the optimizer's step. Adds flip_rate to the row, and warns if it is not healthy."""
        if self.before is None:
            return
        row["flip_rate"] = flip_rate(self.before, weight_indices(self.linears, self.s.flip_mask))
        if row["phase"] == "sparse" and self.ranks.master:
            for warning in self.watch.add(row["iter"], row["flip_rate"], row["lr"]):
                print(f"warning, iteration {row['iter']}: {warning}", flush=True)


def decay_ratio(model: nn.Module, masked_decay: float) -> float | None:
    """RMS(masked_decay * ~mask * w) / RMS(grad) over the sparse weights: the strength of masked decay.

    Call it between clipping and the optimizer's step. None where no layer is sparse or has a gradient.
    """
    layers = [m for m in sparse_linears(model) if m.sparse and m.weight.grad is not None]
    if not layers:
        return None
    decayed = sum(torch.where(m.mask_rows(), 0, local(m.weight.detach())).float().square().sum() for m in layers)
    gradient = sum(local(m.weight.grad).float().square().sum() for m in layers)
    decayed, gradient = total(torch.stack([decayed, gradient]), layers[0].weight.detach())
    return float(masked_decay * (decayed / gradient).sqrt()) if float(gradient) > 0 else None


class LossWatch:
    """Finds losses that stand out: above the mean of the last COUNT by more than SIGMAS of their standard deviations,
    or not finite. Such losses do not enter the mean. Each rank watches its own micro-batches."""

    COUNT, LEAST, SIGMAS = 200, 50, 6.0

    def __init__(self):
        self.recent: deque[float] = deque(maxlen=self.COUNT)
        self.in_a_row = 0

    def add(self, loss: float) -> str | None:
        """The loss of one micro-batch; returns what is odd about it."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if len(self.recent) >= self.LEAST:
            mean = statistics.fmean(self.recent)
            deviation = math.sqrt(statistics.fmean((x - mean) ** 2 for x in self.recent))
            if loss > mean + self.SIGMAS * deviation:
                self.in_a_row += 1
                count = len(self.recent)
                if self.in_a_row == self.LEAST:  # this is where the loss is now
                    self.recent.clear()
                return f"loss {loss:.4f}, where the last {count} were {mean:.4f} +- {deviation:.4f}"
        self.in_a_row = 0
        self.recent.append(loss)
        return None


class Diverged(RuntimeError):
    """The gradients of MAX_SKIPPED steps in a row, and of one more, were not finite."""


class StepGuard:
    """Skips the steps whose gradient is not finite, and warns of losses that stand out."""

    MAX_SKIPPED = 20  # steps in a row

    def __init__(self, s, ranks, writer, skipped: int, in_a_row: int):
        """skipped, in_a_row: the steps that the run has skipped so far, and those that were the last ones."""
        self.s, self.ranks, self.writer = s, ranks, writer
        self.skipped, self.in_a_row, self.losses = skipped, in_a_row, LossWatch()

    def check(self, row: dict, losses: list[float], starts_of: Callable) -> bool:
        """Return whether the step may be taken. losses: those of this rank's micro-batches. starts_of(micro_batch): the
        positions in the training split at which its windows begin. Raises Diverged after MAX_SKIPPED skipped steps in a
        row."""
        mine = range(self.ranks.rank, self.s.gradient_accumulation_steps, self.ranks.world_size)
        for micro_batch, loss in zip(mine, losses, strict=True):
            if spike := self.losses.add(loss):
                starts = ", ".join(str(start) for start in starts_of(micro_batch)[:8])
                place = f"iteration {row['iter']}, micro-batch {micro_batch}, whose windows begin at tokens {starts}"
                print(f"warning, rank {self.ranks.rank}: {spike}; {place}", flush=True)
        finite = math.isfinite(row["grad_norm"])
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        row["skipped"] = self.skipped
        if not finite and self.ranks.master:
            print(f"warning, iteration {row['iter']}: gradient norm {row['grad_norm']}, step skipped", flush=True)
        if self.in_a_row > self.MAX_SKIPPED:
            self.writer.wait()
            raise Diverged(
                f"the last {self.in_a_row} gradients were not finite; the weights are as they were before them, the "
                f"last checkpoint is {checkpoint.find(self.s.out_dir)}; lower learning_rate, or look at the data named "
                "above"
            )
        return finite

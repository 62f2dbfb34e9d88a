"""Is the flip rate healthy (section 4.1 to 4.3)? mu = r'/r, of a sparse run's flip rate and of a dense run's at the
same step. A run is healthy with mu from 0.60 to 0.95; above 1 its masks explode, and it should rise and fade to 0.

train.py compares it with a dense run that was recorded before (`flip_reference`), and warns. search_decay.py records
that dense run, and finds a decay factor whose mu is in the band.
"""

import math
import statistics
from collections import deque
from pathlib import Path

import numpy as np

from configurator import without_removed
from metrics import read_config, read_metrics, smooth

HEALTHY = (0.60, 0.95)  # section 4.3
TARGET = math.sqrt(HEALTHY[0] * HEALTHY[1])  # the band's middle, as ratios go
# What must agree for two flip rates to be compared. Seeds may differ: r differs little between them.
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
                "search_decay.py, or with train.py --sparse=none"
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
                "masked_decay lowers it: python search_decay.py finds one"
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


class LossWatch:
    """Finds losses that stand out: above the mean of the last COUNT by more than SIGMAS of their standard deviations,
    or not finite. What stands out is not counted among them. Kept by each rank for its own micro-batches."""

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

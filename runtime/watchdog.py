"""Ends the ranks of a run that wait for one that has stalled, with a line that names it."""

import contextlib
import json
import os
import sys
import threading
import time

import torch.distributed as dist

from runtime.ranks import Ranks


class Watchdog:
    """Ends this process if it waits for a rank that has stalled: one that is stopped, or whose file system hangs.

    One thread tells the other ranks, through torch's store, how far this rank is. The other thread asks how far they
    are, if this rank has not gone on for half of `timeout`, and again at its end. Then it judges by `stalled`.
    """

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.timeout, self.interval = ranks, timeout, min(10, timeout / 20)
        self.over, self.asked = threading.Event(), None
        ranks.go_on()
        store, works = dist.distributed_c10d._get_default_store(), (self._tell, self._watch)
        self.threads = [threading.Thread(target=work, args=(store.clone(),), daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(1)  # an answer may never come

    def _tell(self, store) -> None:
        with contextlib.suppress(dist.DistError):  # the store ends with rank 0; then every collective raises an error
            while not self.over.wait(self.interval):
                waited = time.monotonic() - self.ranks.moved
                store.set(f"rank {self.ranks.rank}", json.dumps([self.ranks.count, waited, self.ranks.place]))
                asked = self.asked  # the other thread may change it
                if waited > self.timeout and asked and time.monotonic() > asked + self.timeout / 2:
                    self._end([0], "its last answer")  # rank 0's process may hold the store

    def _watch(self, store) -> None:
        names, before = [f"rank {rank}" for rank in range(self.ranks.world_size)], None
        with contextlib.suppress(dist.DistError):
            while not self.over.wait(self.interval):
                waited = time.monotonic() - self.ranks.moved
                if waited < self.timeout / 2:
                    before = None
                elif before is None or waited > self.timeout:
                    self.asked = time.monotonic()
                    now = [json.loads(store.get(name)) if store.check([name]) else None for name in names]
                    self.asked = None
                    found = stalled(before, now, self.timeout) if before else []
                    if found and self.ranks.rank not in found:
                        self._end(found, (now[found[0]] or [0, 0, Ranks.place])[2])
                    before = before or now

    def _end(self, found: list[int], place: str) -> None:
        print(
            f"train.py: error: rank {', '.join(map(str, found))} did not go on from {place} for {self.timeout} s, so "
            f"rank {self.ranks.rank} stopped waiting; look for a stopped process, a hung file system or a lost network "
            "there, then run the same command again; if a step may take that long, raise rank_timeout",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        time.sleep(2 * self.interval)  # the other ranks see an error if this one ends before they have found it too
        os._exit(1)


def stalled(before: list, now: list, timeout: float) -> list[int]:
    """The ranks that told nothing between `before` and `now`, or else those that are behind the others for `timeout`.

    before, now: [count, seconds since it changed, place] of each rank; None if it has told nothing yet. A rank that is
    behind during the start, which includes the first step, may be compiling.
    """
    if silent := [rank for rank, answer in enumerate(now) if answer == before[rank]]:
        return silent
    counts = [count for count, *_ in now]
    behind = [rank for rank, count in enumerate(counts) if count == min(counts) < max(counts)]
    return [rank for rank in behind if now[rank][1] > timeout and now[rank][2] != Ranks.place]

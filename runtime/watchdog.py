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

    A thread tells the other ranks, through torch's store, how far this rank is. If this rank has not gone on for half
    of `timeout`, the thread asks how far the others are, and again at the end. Then it judges by `stalled`. A store in
    a process that is stopped itself gives no answer: then the timeout of the collectives ends the run.
    """

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.timeout, self.interval = ranks, timeout, min(10, timeout / 20)
        self.over = threading.Event()
        ranks.go_on()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.over.set()
        self.thread.join(1)  # the store may never answer

    def _watch(self) -> None:
        store, ranks, before = dist.distributed_c10d._get_default_store().clone(), self.ranks, None
        with contextlib.suppress(dist.DistError):  # the store has ended; then every collective raises an error
            while not self.over.wait(self.interval):
                waited = time.monotonic() - ranks.moved
                store.set(f"rank {ranks.rank}", json.dumps([ranks.count, waited, ranks.place]))
                if waited < self.timeout / 2:
                    before = None
                elif before is None:
                    before = self._messages(store)
                elif waited > self.timeout:
                    found = stalled(before, self._messages(store), self.timeout)
                    if found and ranks.rank not in found:
                        self._end(found)

    def _messages(self, store) -> list:
        """What each rank has told last: [count, seconds since it changed, place]; None if it has told nothing yet."""
        names = [f"rank {rank}" for rank in range(self.ranks.world_size)]
        return [json.loads(store.get(name)) if store.check([name]) else None for name in names]

    def _end(self, found: list[int]) -> None:
        print(
            f"train.py: error: rank {', '.join(map(str, found))} did not go on from {self.ranks.place} for "
            f"{self.timeout} s, so rank {self.ranks.rank} stopped waiting; look for a stopped process, a hung file "
            "system or a lost network there, then run the same command again; if a step may take that long, raise "
            "rank_timeout",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        time.sleep(2 * self.interval)  # the other ranks see an error if this one ends before they have found it too
        os._exit(1)


def stalled(before: list, now: list, timeout: float) -> list[int]:
    """The ranks that told nothing between `before` and `now`, or else those that are behind the others for `timeout`.

    A rank that is behind during the start, which includes the first step, may be compiling.
    """
    if silent := [rank for rank, message in enumerate(now) if message == before[rank]]:
        return silent
    counts = [count for count, *_ in now]
    behind = [rank for rank, count in enumerate(counts) if count == min(counts) < max(counts)]
    return [rank for rank in behind if now[rank][1] > timeout and now[rank][2] != Ranks.place]

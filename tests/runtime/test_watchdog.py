"""runtime/watchdog.py: a rank that has stalled is named, and the ranks that wait for it end."""

import re
import signal

import pytest
from harness import strike

from runtime.watchdog import stalled

STEP = "iteration 7"


@pytest.mark.parametrize(
    ("before", "now", "ranks"),
    [
        ([[5, 3, STEP], [5, 3, STEP]], [[5, 6, STEP], [5, 3, STEP]], [1]),  # rank 1 is frozen
        ([[5, 3, STEP], None], [[5, 6, STEP], None], [1]),  # since its start
        ([[5, 3, STEP], [4, 4, STEP], [5, 3, STEP]], [[5, 6, STEP], [4, 7, STEP], [5, 6, STEP]], [1]),  # it hangs
        ([[5, 3, STEP], [4, 4, STEP]], [[5, 6, STEP], [4, 1, STEP]], []),  # behind, but it goes on
        ([[5, 3, STEP], [5, 3, STEP]], [[5, 6, STEP], [5, 6, STEP]], []),  # all are busy
        ([[5, 3, STEP], [4, 4, "the start"]], [[5, 6, STEP], [4, 7, "the start"]], []),  # it compiles
    ],
)
def test_stalled_ranks_are_silent_or_behind(before, now, ranks):
    assert stalled(before, now, 5) == ranks


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_ends_the_run_with_one_line_that_names_it(data, tmp_path, victim):
    """torchrun waits 30 s for the frozen rank, unless --shutdown-timeout is shorter."""
    done = strike(data, tmp_path / "out", signal.SIGSTOP, victim, max_restarts=0, rank_timeout=5)
    assert done.returncode == 1
    place = r"(iteration \d+|the start)"
    said = (
        rf"^train\.py: error: rank {victim} did not go on from {place} for 5 s, so rank {1 - victim} stopped waiting; "
    )
    assert len(re.findall(said, done.stderr, re.M)) == 1
    assert "[rank" not in done.stderr  # no traceback

"""runtime/ranks.py, as far as one process shows it: the vote on ranks that differ, and the signals that stop a run."""

import os
import signal

import pytest
from harness import pristine_train

from runtime.ranks import StopSignal, outvoted


@pytest.mark.parametrize(
    ("sums", "wrong"),
    [
        ([(0, 5), (0, 5), (0, 6)], [2]),
        ([(0, 6), (0, 5), (0, 5)], [0]),
        ([(0, 5), (0, 5), (0, 5)], []),
        ([(0, 5), (1, 9), (0, 5), (1, 8), (0, 5), (1, 9)], [3]),  # two shards, three copies of each
        ([(0, 5), (1, 9)], []),  # shards are not compared with one another
        ([(0, 5), (0, 6)], [0, 1]),  # two ranks have no majority
        ([(0, 5), (0, 6), (0, 6), (0, 5)], [0, 1, 2, 3]),
        ([(0, 5), (0, 6), (1, 9), (1, 9)], [0, 1]),
        ([(0, 5), (0, 6), (0, 7), (0, 5)], [1, 2]),
    ],
)
def test_the_rank_that_differs_is_named(sums, wrong):
    assert outvoted(sums) == wrong


def test_a_second_ctrl_c_is_obeyed_at_once_and_a_second_sigterm_is_not():
    """A scheduler that signals every process of a job reaches a rank twice: itself, and through torchrun."""
    with pristine_train():
        stop = StopSignal()
        assert stop.received is None
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == "SIGTERM"
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

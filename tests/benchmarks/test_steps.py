"""The profile of a step."""

from benchmarks import steps


def test_long_names_that_begin_alike_are_added_up():
    long = "void at::native::elementwise<" + "x" * steps.NAME
    events = [
        (long + "a", 30.0),
        ("short", 5.0),
        (long + "b", 2.0),
        ("Optimizer.step#AdamW.step", 100.0),
        ("short", 1.0),
    ]
    assert steps.sum_by_name(events) == {long[: steps.NAME]: [2, 32.0], "short": [2, 6.0]}

"""How many runs at a time a GPU trains fastest, by the steps that they make together."""

from __future__ import annotations

from collections.abc import Callable

from spfde.app.train.at_once import SECONDS, STEPS, Measured


def settled(rate_of: Callable[[int], float], *, free: float = 0.9, most: int = 64) -> list[int]:
    """The numbers that are tried, where so many runs together make so many steps a second; the last one stays."""
    now, live = 0.0, 0
    number = Measured(lambda: now, free=lambda: free)
    tried: list[int] = []
    for _ in range(20 * STEPS):
        wanted = min(number.runs(live), most)
        if not tried or tried[-1] != wanted:
            tried.append(wanted)
        live = max(live, wanted)  # what is under way is not stopped
        now += max(1 / rate_of(live), SECONDS / STEPS)
    return tried


def test_runs_are_added_as_long_as_that_makes_more_steps_together() -> None:
    assert settled(lambda n: min(20.0, 5.0 * n)) == [1, 2, 4, 8, 4]


def test_one_that_fills_the_device_stays_alone() -> None:
    assert settled(lambda n: 20.0) == [1, 2, 1]


def test_none_is_added_where_the_memory_may_not_do() -> None:
    assert settled(lambda n: 5.0 * n, free=0.5) == [1]


def test_what_has_ended_is_replaced() -> None:
    number = Measured(lambda: 0.0, free=lambda: 0.9)
    assert [number.runs(0), number.runs(0), number.runs(1)] == [1, 1, 1]

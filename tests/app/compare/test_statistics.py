"""Spread, paired differences and the Pareto front, by hand and against scipy's own."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spfde.app.compare.statistics import Spread, paired, pareto

ACCURACIES = st.lists(st.floats(0, 1), min_size=2, max_size=12)


def test_one_value_has_no_spread_and_none_is_no_value() -> None:
    assert Spread.of([0.5]) == Spread(1, 0.5, None)
    assert Spread.of([]) is None
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(3, 2.0, 1.0)


def test_a_difference_by_hand() -> None:
    found = paired({0: 0.52, 1: 0.55, 2: 0.54}, {0: 0.50, 1: 0.52, 2: 0.53})
    assert found is not None
    # differences 0.02, 0.03, 0.01: mean 0.02, sd 0.01; t of 2 degrees of freedom at 97.5 % is 4.3027
    assert (found.low, found.high) == pytest.approx(
        (0.02 - 4.30265 * 0.01 / 3**0.5, 0.02 + 4.30265 * 0.01 / 3**0.5), rel=1e-5
    )
    assert not found.is_carried
    # four: t of 3 is 3.1824, and 3.1824 * 0.01 / 2 = 0.0159 < 0.02
    assert found.seeds_needed == 4


def test_seeds_that_one_lacks_do_not_count() -> None:
    found = paired({0: 0.5, 3: 0.9}, {0: 0.4, 1: 0.0})
    assert found is not None
    assert (found.n, found.mean, found.low, found.is_carried) == (1, pytest.approx(0.1), None, False)
    assert paired({0: 0.5}, {1: 0.5}) is None


def test_differences_that_are_all_equal_carry_nothing() -> None:
    """Two seeds on a small test set are equal by chance."""
    found = paired({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25})
    assert found is not None
    assert (found.p, found.is_carried) == (None, False)
    rounded = paired({k: (hits + 16) / 2000 for k, hits in enumerate((1366, 1597, 1223))}, {
        k: hits / 2000 for k, hits in enumerate((1366, 1597, 1223))
    })  # fmt: skip
    assert rounded is not None
    assert (rounded.p, rounded.is_carried, rounded.seeds_needed) == (None, False, None)


@given(own=ACCURACIES, other=ACCURACIES)
def test_the_interval_and_p_are_scipys(own: list[float], other: list[float]) -> None:
    n = min(len(own), len(other))
    found = paired(dict(enumerate(own)), dict(enumerate(other)))
    assert found is not None
    differences = [a - b for a, b in zip(own, other, strict=False)]
    if stats.tstd(differences) < 1e-6:
        return
    theirs = stats.ttest_rel(own[:n], other[:n])
    interval = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)
    assert found.is_carried == (theirs.pvalue < 0.05) or theirs.pvalue == pytest.approx(0.05)


@given(own=ACCURACIES, other=ACCURACIES)
def test_so_many_seeds_are_needed_and_one_less_is_too_few(own: list[float], other: list[float]) -> None:
    found = paired(dict(enumerate(own)), dict(enumerate(other)))
    assert found is not None
    if found.seeds_needed is None:
        return
    differences = [a - b for a, b in zip(own, other, strict=False)]
    sd = stats.tstd(differences)

    def half(n: int) -> float:
        return float(stats.t.ppf(0.975, n - 1) * sd / n**0.5)

    assert half(found.seeds_needed) < abs(found.mean) <= half(found.seeds_needed - 1) + 1e-12


def test_the_front_by_hand() -> None:
    assert pareto([(1.0, 0.8), (2.0, 0.9), (3.0, 0.9), (0.5, 0.1), None, (2.0, 0.9)]) == [
        True, True, False, True, False, True,
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_nothing_beats_the_front_and_it_beats_all_else(points: list[tuple[int, int]]) -> None:
    on = pareto(points)

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    front = [point for point, is_on in zip(points, on, strict=True) if is_on]
    assert not any(beats(one, other) for one, other in itertools.permutations(front, 2))
    for point, is_on in zip(points, on, strict=True):
        assert is_on or any(beats(one, point) for one in front)

"""Lines for a user."""

from __future__ import annotations

import pytest

from spfde.core.say import counted


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (0, "epoch", "0 epochs"),
        (1, "epoch", "1 epoch"),
        (2, "frozen block", "2 frozen blocks"),
        (1234, "step", "1,234 steps"),
    ],
)
def test_a_count_has_the_noun_in_its_number(count: int, noun: str, said: str) -> None:
    assert counted(count, noun) == said


def test_a_plural_of_its_own_is_given() -> None:
    assert [counted(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]

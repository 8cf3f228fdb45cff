from __future__ import annotations

import torch

from spfde.core.numbers import mix


def test_it_is_the_published_generator() -> None:
    # SplitMix64 from state 0 begins with 0xE220A8397B1DCDAF.
    assert int(mix(torch.tensor([0]))) == 0xE220A8397B1DCDAF % 2**62


def test_equal_arguments_give_equal_numbers_and_each_argument_counts() -> None:
    ids = torch.arange(1000)
    found = mix(ids, 1, 2)
    assert torch.equal(found, mix(ids, 1, 2))
    assert len(found.unique()) == 1000
    assert bool((found >= 0).all())
    for other in (mix(ids, 2, 2), mix(ids, 1, 3), mix(ids, 2, 1), mix(ids, 1), mix(ids + 1000, 1, 2)):
        assert not bool((found == other).any())


def test_remainders_are_even_and_do_not_go_together() -> None:
    ids = torch.arange(90_000)
    counts = torch.bincount(mix(ids, 1) % 9 * 9 + mix(ids, 2) % 9, minlength=81)
    expected = 90_000 / 81
    assert float(((counts - expected) ** 2 / expected).sum()) < 140  # chi squared, 80 degrees: 1 in 30,000 is above

"""Criteria that draw the whole partial set anew at each update: by hand, and what holds of each draw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sieving.sieve import Sieve

ANEW = ["top-loss", "repeated-random"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(criterion: str, n: int, removed: float, seed: int = 0, labels: torch.Tensor | None = None) -> Sieve:
    technique = DataSieving(removed_fraction=removed, criterion=criterion, balanced=labels is not None)
    return Sieve(torch.arange(n), technique, seeded(seed), labels)


def test_half_of_those_to_leave_are_drawn_at_random_and_the_others_have_the_lowest_loss_of_the_rest():
    sieve = make("top-loss", 10, 0.4)
    order = torch.randperm(10, generator=_state_of(sieve))  # what the sieve is about to draw
    loss = torch.tensor([9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0])
    assert sieve.update(loss) > 0
    outside = order[:2].tolist()
    lowest = sorted(set(range(10)) - set(outside), key=lambda index: loss[index])[:2]
    assert sieve.removed.tolist() == outside + lowest


def _state_of(sieve: Sieve) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(sieve._generator.get_state())
    return generator


def test_samples_that_were_left_out_are_chosen_from_like_all_others():
    """By the queue those who waited come back first; drawn anew some wait again."""
    again = 0
    for seed in range(20):
        sieve = make("repeated-random", 10, 0.4, seed)
        before = set(sieve.removed.tolist())
        moved = sieve.update(torch.zeros(10))
        both = before & set(sieve.removed.tolist())
        assert moved == 4 - len(both)
        again += len(both)
    assert 20 <= again <= 44  # 1.6 of 4 on average


def test_a_random_subset_holds_each_sample_equally_often():
    sieve, counts = make("repeated-random", 20, 0.25), torch.zeros(20)
    for _ in range(400):
        sieve.update(torch.zeros(20))
        counts[sieve.removed] += 1
    assert counts.sum() == 400 * 5
    assert counts.min() >= 70
    assert counts.max() <= 135


def test_the_hardest_stay_unless_the_pool_leaves_them_out():
    kept = 0
    for seed in range(50):
        sieve = make("top-loss", 20, 0.4, seed)
        sieve.update(torch.arange(20.0))
        kept += int(torch.isin(torch.tensor([19]), sieve.partial))
    assert 33 <= kept < 50  # four of twenty are out of the pool: 40 on average


@settings(max_examples=40, deadline=None)
@given(
    criterion=st.sampled_from(ANEW),
    n=st.integers(2, 40),
    removed=st.floats(0, 0.95),
    classes=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_no_sample_is_lost_or_doubled_and_the_partial_set_keeps_its_size(criterion, n, removed, classes, seed):
    labels = torch.randint(0, classes, (n,), generator=seeded(seed)) if classes else None
    n_removed = DataSieving(removed_fraction=removed).n_removed(n)
    if n_removed == n:
        return
    sieve = make(criterion, n, removed, seed, labels)
    used = set(sieve.partial.tolist())
    for update in range(4):
        before = set(sieve.partial.tolist())
        moved = sieve.update(torch.randint(0, 3, (n,), generator=seeded(update)).float(), labels)
        assert sieve.partial.numel() == n - n_removed
        assert sorted([*sieve.partial.tolist(), *sieve.removed.tolist()]) == list(range(n))
        assert moved == len(before - set(sieve.partial.tolist()))
        used |= set(sieve.partial.tolist())
        assert sieve.ever_used == len(used)
        assert sieve.all_retrieved == (len(used) == n)


@pytest.mark.parametrize("criterion", ANEW)
def test_the_same_share_of_each_class_leaves(criterion):
    labels = torch.arange(100) % 10
    sieve = make(criterion, 100, 0.2, labels=labels)
    for _ in range(3):
        sieve.update(torch.rand(100, generator=seeded()), labels)
        assert torch.bincount(labels[sieve.removed]).tolist() == [2] * 10


@pytest.mark.parametrize("criterion", ANEW)
def test_a_state_in_another_sieve_goes_on_bit_for_bit(criterion):
    sieve = make(criterion, 30, 0.4)
    sieve.update(torch.arange(30.0))
    again = make(criterion, 30, 0.4, seed=9)
    again.load_state_dict(sieve.state_dict())
    again._generator.set_state(sieve._generator.get_state())
    for one in (sieve, again):
        one.update(torch.arange(30.0))
    assert torch.equal(sieve.removed, again.removed)


def test_a_random_choice_has_weights_of_one_and_a_choice_by_loss_estimated_ones():
    for criterion, is_even in (("repeated-random", True), ("top-loss", False)):
        sieve = make(criterion, 30, 0.4)
        for _ in range(4):
            sieve.update(torch.arange(30.0))
        weights = sieve.loss_weights(sieve.partial)
        assert weights.mean().item() == pytest.approx(1)
        assert (weights.unique().numel() == 1) == is_even


def test_a_removal_once_and_for_all_takes_its_half_at_random():
    technique = OneTimeRemoval(removed_fraction=0.4, criterion="top-loss")
    sieve = Sieve(torch.arange(10), technique, seeded())
    assert sieve.update(torch.arange(10.0)) == 4
    assert sieve.update(torch.arange(10.0)) == 0
    assert {0, 1, 2, 3} & set(sieve.removed.tolist()[2:])


@pytest.mark.parametrize("criterion", ANEW)
def test_a_swapped_share_beside_it_is_refused(criterion):
    with pytest.raises(InvalidArgument, match=rf"swap_fraction=0\.1: has no meaning with criterion=\"{criterion}\""):
        DataSieving(swap_fraction=0.1, criterion=criterion)

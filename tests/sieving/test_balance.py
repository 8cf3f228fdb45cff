"""Balance of classes: the same share of each leaves, in exact counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Subset

from spfde.core.errors import InvalidArgument
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sieving.balance import ClassLabels, find_labels, largest_remainder, spread, take_evenly
from spfde.sieving.sieve import Sieve


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("counts", "k", "shares"),
    [
        ([6, 3, 1], 5, [3, 2, 0]),  # 3, 1.5 and 0.5: equals from the front
        ([6, 3, 1], 4, [3, 1, 0]),  # 2.4, 1.2, 0.4: the remainders of the first and the last are equal
        ([5, 5], 3, [2, 1]),
        ([1, 2, 97], 10, [0, 0, 10]),
        ([2, 2], 4, [2, 2]),
        ([3, 0, 1], 0, [0, 0, 0]),
        ([], 0, []),
    ],
)
def test_shares_by_hand(counts, k, shares):
    assert largest_remainder(torch.tensor(counts, dtype=torch.long), k).tolist() == shares


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.data())
def test_shares_add_up_and_are_the_exact_ones_rounded_down_or_up(counts, data):
    total = sum(counts)
    k = data.draw(st.integers(0, total))
    shares = largest_remainder(torch.tensor(counts), k).tolist()
    assert sum(shares) == k
    for share, count in zip(shares, counts, strict=True):
        assert k * count // max(total, 1) <= share <= min(count, -(-k * count // max(total, 1)))


def test_classes_are_spread_evenly_and_keep_their_order_within():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    order = spread(labels)
    assert labels[order].tolist() == [0, 1, 0, 0, 1, 0]  # at 1/8 3/8 5/8 7/8, and at 1/4 3/4
    assert order[labels[order] == 0].tolist() == [0, 1, 2, 3]


def spread_class_by_class(labels: Tensor) -> Tensor:
    position = torch.zeros(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return torch.argsort(position, stable=True)


def taken_class_by_class(order: Tensor, labels: Tensor, k: int) -> Tensor:
    ordered = labels[order]
    classes, counts = torch.unique(ordered[ordered != -1], return_counts=True)
    shares = largest_remainder(counts, min(k, int(counts.sum())))
    parts = [order[ordered == label][: int(share)] for label, share in zip(classes, shares, strict=True)]
    known = torch.cat([order[:0], *parts])
    known = known[spread_class_by_class(labels[known])]
    return torch.cat([known, order[ordered == -1][: k - len(known)]])


@given(st.lists(st.sampled_from([-1, 0, 1, 2, 5, 9]), max_size=40), st.data())
def test_one_sort_comes_to_what_a_pass_over_all_samples_for_each_class_does(found, data):
    labels = torch.tensor(found, dtype=torch.long)
    order = torch.tensor(data.draw(st.permutations(range(len(found)))), dtype=torch.long)
    order = order[: data.draw(st.integers(0, len(found)))]  # of the samples that are in use, say
    k = data.draw(st.integers(0, len(order)))
    assert torch.equal(take_evenly(order, labels, k), taken_class_by_class(order, labels, k))
    assert torch.equal(spread(labels), spread_class_by_class(labels))


def test_the_easiest_of_each_class_leave_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    order = torch.tensor([0, 1, 2, 3, 4, 5])  # all of class 0 are easier
    assert sorted(take_evenly(order, labels, 3).tolist()) == [0, 1, 4]


def test_samples_of_unknown_class_come_last():
    labels = torch.tensor([-1, 0, -1, 1])
    order = torch.arange(4)
    assert sorted(take_evenly(order, labels, 2).tolist()) == [1, 3]
    assert sorted(take_evenly(order, labels, 3).tolist()) == [0, 1, 3]
    assert take_evenly(order, torch.full((4,), -1), 2).tolist() == [0, 1]


# --- the sieve -------------------------------------------------------------------------------------------------------


def share_of(labels: Tensor, ids: Tensor, classes: int) -> list[int]:
    return torch.bincount(labels[ids], minlength=classes).tolist()


def test_the_first_removal_takes_the_same_share_of_each_class():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    sieve = Sieve(torch.arange(100), DataSieving(removed_fraction=0.2, balanced=True), seeded(), labels)
    assert share_of(labels, sieve.removed, 3) == [12, 6, 2]
    assert share_of(labels, sieve.removed[:10], 3) == [6, 3, 1]  # and in every stretch of the queue


def test_at_an_update_the_same_share_of_each_class_leaves_though_one_class_is_easy():
    labels = torch.arange(100) % 2
    sieve = Sieve(torch.arange(100), DataSieving(removed_fraction=0.2, balanced=True), seeded(), labels)
    sieve.update(labels.float(), labels)  # class 0 is the easier one
    assert share_of(labels, sieve.removed, 2) == [10, 10]
    assert share_of(labels, sieve.partial, 2) == [40, 40]


def test_without_balance_the_easy_class_leaves():
    labels = torch.arange(100) % 2
    sieve = Sieve(torch.arange(100), DataSieving(removed_fraction=0.2), seeded())
    sieve.update(labels.float())
    assert share_of(labels, sieve.removed[-16:], 2) == [16, 0]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 60),
    removed=st.floats(0, 0.9),
    swap=st.none() | st.floats(0, 1),
    classes=st.integers(1, 4),
    known=st.booleans(),
    seed=st.integers(0, 999),
    updates=st.integers(0, 6),
)
def test_balanced_or_not_no_sample_is_lost_and_the_sizes_stay(n, removed, swap, classes, known, seed, updates):
    technique = DataSieving(removed_fraction=removed, swap_fraction=swap, balanced=True)
    if technique.n_removed(n) == n:
        return
    labels = torch.randint(classes, (n,), generator=seeded(seed))
    sieve = Sieve(torch.arange(n), technique, seeded(seed), labels if known else None)
    for update in range(updates):
        before = torch.bincount(labels[sieve.partial], minlength=classes)
        held = set(sieve.partial.tolist())
        sieve.update(torch.randint(3, (n,), generator=seeded(update)).float(), labels)
        assert sorted([*sieve.partial.tolist(), *sieve.removed.tolist()]) == list(range(n))
        assert sieve.partial.numel() == n - technique.n_removed(n)
        left = torch.tensor(sorted(held - set(sieve.partial.tolist())), dtype=torch.long)
        assert left.numel() == sieve.n_swap
        assert torch.equal(torch.bincount(labels[left], minlength=classes), largest_remainder(before, sieve.n_swap))


def test_over_many_updates_the_partial_set_stays_balanced():
    labels = torch.arange(200) % 4
    sieve = Sieve(torch.arange(200), DataSieving(removed_fraction=0.2, balanced=True), seeded(), labels)
    for update in range(20):
        sieve.update(labels + torch.rand(200, generator=seeded(update)), labels)
        assert all(abs(count - 40) <= 2 for count in share_of(labels, sieve.partial, 4))


def test_a_one_time_removal_can_be_balanced():
    labels = torch.arange(100) % 2
    sieve = Sieve(torch.arange(100), OneTimeRemoval(removed_fraction=0.3, balanced=True), seeded(), labels)
    sieve.update(labels.float(), labels)
    assert share_of(labels, sieve.removed, 2) == [15, 15]


# --- where labels come from ------------------------------------------------------------------------------------------


class Labelled:
    def __init__(self, n: int = 4, **fields: Any) -> None:
        self.n = n
        self.__dict__.update(fields)

    def __len__(self) -> int:
        return self.n


@pytest.mark.parametrize("found", [[0, 1, 1, 2], torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 1, 2]).numpy()])
def test_a_data_set_s_targets_or_labels_are_found(found):
    assert find_labels(Labelled(targets=found)).tolist() == [0, 1, 1, 2]
    assert find_labels(Labelled(labels=found)).tolist() == [0, 1, 1, 2]
    assert find_labels(Subset(Labelled(targets=found), [3, 0])).tolist() == [2, 0]
    assert find_labels(Labelled(targets=[9, 9, 9, 9]), found).tolist() == [0, 1, 1, 2]


def test_a_data_set_that_tells_no_labels_gives_none():
    assert find_labels(Labelled()) is None
    assert find_labels(Labelled(labels=lambda: [1])) is None
    assert find_labels(Subset(Labelled(), [0])) is None


@pytest.mark.parametrize(
    "labels", [torch.rand(4), [0, 1], [[0, 1]] * 4, torch.tensor([0, -1, 0, 0]), [[0], [1, 2], [3], [4]], ["a"] * 4]
)
def test_labels_that_are_no_class_indices_are_refused(labels):
    with pytest.raises(InvalidArgument, match=r"loader.dataset.targets=.*labels="):
        find_labels(Labelled(targets=labels))
    with pytest.raises(InvalidArgument, match=r"^labels="):
        find_labels(Labelled(), labels)


def test_classes_are_learned_from_reports():
    classes = ClassLabels(4)
    labels = classes.from_report(torch.zeros(2, 3), torch.tensor([2, 0]))
    assert labels is not None
    classes.observe(torch.tensor([3, 1]), labels)
    assert classes.labels.tolist() == [-1, 0, -1, 2]
    resumed = ClassLabels(4)
    resumed.load_state_dict(classes.state_dict())
    assert resumed.labels.tolist() == [-1, 0, -1, 2]
    binary = classes.from_report(torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert binary is not None
    assert binary.tolist() == [1, 0]


def test_known_classes_need_no_report():
    assert ClassLabels(2, torch.tensor([0, 1])).from_report(None, None) is None


@pytest.mark.parametrize(
    ("logits", "y", "told"), [(None, None, "no y"), (torch.zeros(2, 3), torch.rand(2, 3), "soft labels")]
)
def test_a_report_without_classes_is_refused_with_the_remedy(logits, y, told):
    with pytest.raises(InvalidArgument, match=rf"{told}.*balanced=True.*labels="):
        ClassLabels(4).from_report(logits, y)


def test_a_report_with_a_negative_class_is_refused():
    with pytest.raises(InvalidArgument, match="y=-100"):
        ClassLabels(2).observe(torch.tensor([0]), torch.tensor([-100]))

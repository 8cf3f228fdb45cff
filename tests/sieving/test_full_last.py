"""All samples in the last epochs, and updates out of step: how many samples and when; the sieve's part by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import spfde
from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sieving.methods import check_fraction
from spfde.sieving.sieve import Sieve


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_use(method: DataSieving, n: int, epochs: int, interval: int = 2) -> list[int]:
    return [method.samples_in_use(n, epoch, interval=interval, epochs=epochs) for epoch in range(epochs)]


def updates(method: DataSieving, epochs: int, interval: int) -> list[int]:
    return [epoch for epoch in range(epochs) if method.updates_at(epoch, interval=interval, epochs=epochs)]


# --- all samples in the last epochs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "epochs", "n_full"),
    [(0.0, 20, 0), (0.125, 160, 20), (0.125, 20, 3), (0.12, 20, 2), (0.01, 20, 1), (0.5, 1, 1)],
)
def test_the_last_share_is_rounded_to_whole_epochs_halves_up_and_one_at_least(share, epochs, n_full):
    assert DataSieving(full_last=share).n_full_epochs(epochs) == n_full
    assert OneTimeRemoval().n_full_epochs(epochs) == 0


def test_more_samples_are_left_out_before_so_that_as_many_are_presented():
    # 80 of 100 in each of 10 epochs are 800: 100 in the last two, and 75 in each of the 8 before.
    method = DataSieving(removed_fraction=0.2, full_last=0.2)
    assert in_use(method, 100, 10) == [75] * 8 + [100] * 2
    assert sum(in_use(method, 100, 10)) == sum(in_use(DataSieving(removed_fraction=0.2), 100, 10))
    # A third: 20 · 10 / 7 = 28.57 are left out, rounded to 29.
    assert in_use(DataSieving(removed_fraction=0.2, full_last=0.3), 100, 10) == [71] * 7 + [100] * 3


def test_the_swapped_share_follows_the_one_that_is_removed_unless_it_is_given():
    assert DataSieving(removed_fraction=0.2, full_last=0.2).at_length(10).moves(100) == (19, 19)  # a quarter of 75
    assert DataSieving(removed_fraction=0.2, full_last=0.2, swap_fraction=0.2).at_length(10).moves(100) == (15, 15)


def test_the_last_update_is_where_all_samples_come_back_on_an_update_epoch_or_not():
    assert updates(DataSieving(full_last=0.2), 10, 2) == [2, 4, 6, 8]
    assert updates(DataSieving(full_last=0.3), 10, 2) == [2, 4, 6, 7]
    assert updates(DataSieving(full_last=0.1), 10, 2) == [2, 4, 6, 8, 9]
    assert updates(DataSieving(), 10, 2) == [2, 4, 6, 8]


@given(st.integers(1, 5000), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(1, 200))
def test_as_many_samples_are_presented_as_by_the_fraction_all_along_or_the_most_possible_is_named(n, y, full, epochs):
    method = DataSieving(removed_fraction=y, full_last=full)
    try:
        method.check_length(epochs, 1)
    except InvalidArgument as error:
        (problem,) = error.problems
        assert problem.argument == "removed_fraction"
        assert y >= 1 - method.n_full_epochs(epochs) / epochs
        most = float(problem.remedy.split("=")[1].split()[0].rstrip(","))
        DataSieving(removed_fraction=most, full_last=full).check_length(epochs, 1)
        return
    found = in_use(method, n, epochs)
    assert abs(sum(found) - epochs * n * (1 - y)) <= 0.5001 * epochs
    assert found[epochs - method.n_full_epochs(epochs) :] == [n] * method.n_full_epochs(epochs)
    assert len(set(found[: epochs - method.n_full_epochs(epochs)])) <= 1


def test_a_share_that_would_leave_no_sample_before_is_refused_with_the_most_that_is_possible():
    with pytest.raises(InvalidArgument) as caught:
        DataSieving(removed_fraction=0.85, full_last=0.125).check_length(20, 2)
    assert str(caught.value) == (
        "removed_fraction=0.85: cannot be the mean over a run that uses all samples in the last 3 of 20 epochs: none "
        "would be left before. Take removed_fraction=0.849 at most, or a lower full_last (it is 0.125)."
    )
    DataSieving(removed_fraction=0.849, full_last=0.125).check_length(20, 2)
    DataSieving(removed_fraction=0.0, full_last=0.9).check_length(1, 1)  # nothing is left out
    with pytest.raises(InvalidArgument, match="full_last=0 "):
        DataSieving(full_last=0.5).check_length(1, 1)


def test_the_batch_that_must_be_filled_is_one_of_the_epochs_before():
    # 20 · 20 / 17 = 23.5 are left out of 100: 76 are no batch of 80, though 80 would be.
    assert check_fraction(DataSieving(), 100, 80, epochs=20) == []
    (problem,) = check_fraction(DataSieving(full_last=0.125), 100, 80, epochs=20)
    assert "leaves 76 of 100 samples" in problem.rule
    assert "last 3 of 20 epochs" in problem.rule
    assert "removed_fraction=0.17 at most, or batch_size=76 at most" in problem.remedy


# --- updates out of step ---------------------------------------------------------------------------------------------


def test_updates_come_so_many_epochs_behind_those_of_the_masks():
    assert updates(DataSieving(), 20, 5) == [5, 10, 15]
    assert updates(DataSieving(offset_epochs=2), 20, 5) == [2, 7, 12, 17]
    assert updates(DataSieving(offset_epochs=2), 18, 5) == [2, 7, 12]  # nothing moves at the top of the last epoch
    assert updates(DataSieving(offset_epochs=2, full_last=0.2), 20, 5) == [2, 7, 12, 16]


@given(st.integers(1, 9), st.integers(0, 8), st.integers(1, 60))
def test_as_many_epochs_lie_between_two_updates_whatever_the_offset(interval, offset, epochs):
    assume(offset < interval)
    found = updates(DataSieving(offset_epochs=offset), epochs, interval)
    assert all(later - earlier == interval for earlier, later in itertools.pairwise(found))
    assert all(epoch % interval == offset and 0 < epoch < epochs - 1 for epoch in found)


def test_an_offset_that_is_no_part_of_the_interval_is_refused_as_soon_as_the_interval_is_known():
    rule = r"offset_epochs=2: must be less than the update interval, 2 epochs\. Take 1 at most, or update_interval_epo"
    with pytest.raises(InvalidArgument, match=rule):
        spfde.Recipe(sieving=DataSieving(offset_epochs=2), update_interval_epochs=2)
    recipe = spfde.Recipe(sieving=DataSieving(offset_epochs=2))  # auto
    model, sample = torch.nn.Linear(4, 2), torch.zeros(1, 4)
    with pytest.raises(InvalidArgument, match=rule):
        spfde.plan(model, sample, recipe, epochs=20, samples=20, batch_size=2)
    spfde.plan(model, sample, recipe, epochs=160, samples=20, batch_size=2)
    # Nothing is sieved: nothing is wrong.
    spfde.Recipe(sieving=DataSieving(removed_fraction=0, offset_epochs=2), update_interval_epochs=2)


# --- the sieve -------------------------------------------------------------------------------------------------------


def full(n: int = 10, seed: int = 0) -> Sieve:
    return Sieve(torch.arange(n), DataSieving(removed_fraction=0.4), seeded(seed), ends_full=True)


def test_all_samples_come_back_with_a_weight_of_one():
    sieve = full()
    sieve.update(torch.arange(10.0))
    assert not sieve.all_retrieved
    assert sieve.use_all() == 4
    assert sieve.partial.tolist() == list(range(10))
    assert sieve.removed.tolist() == []
    assert sieve.keep() is None
    assert sieve.all_retrieved
    assert sieve.ever_used == 10
    assert sieve.loss_weights(torch.arange(10)).tolist() == [1.0] * 10
    assert sieve.use_all() == 0


def test_a_state_of_the_last_epochs_is_loaded_where_they_use_all():
    sieve = full()
    sieve.update(torch.zeros(10))
    sieve.use_all()
    again = full(seed=9)
    again.load_state_dict(sieve.state_dict())
    assert again.keep() is None
    assert again.ever_used == 10
    other = Sieve(torch.arange(10), DataSieving(removed_fraction=0.4), seeded())
    with pytest.raises(StateMismatch, match="removed"):
        other.load_state_dict(sieve.state_dict())

"""The sieving methods: how many samples leave and when, and what they cite; the one-time removal by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sieving.sieve import Sieve


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("at", "epochs", "interval", "epoch"),
    [
        (70 / 160, 160, 5, 70),  # the released script's
        (70 / 160, 160, 1, 70),
        (70 / 160, 200, 5, 90),  # 87.5 is rounded to an update epoch, halves up
        (0.5, 8, 2, 4),
        (0.01, 20, 2, 2),  # not before anything has been counted
        (0.99, 20, 2, 18),  # nothing is sieved at the top of the last epoch
        (0.99, 21, 5, 15),
    ],
)
def test_the_removal_falls_on_the_nearest_update_epoch(at, epochs, interval, epoch):
    method = OneTimeRemoval(at_fraction=at)
    assert method.removal_epoch(epochs, interval) == epoch
    updates = [e for e in range(epochs) if method.updates_at(e, interval=interval, epochs=epochs)]
    assert updates == [epoch]


@pytest.mark.parametrize(("epochs", "interval"), [(1, 1), (2, 1), (3, 2), (6, 5)])
def test_a_run_without_a_update_epoch_for_the_removal_is_refused(epochs, interval):
    with pytest.raises(InvalidArgument, match=r"at_fraction=.*Train longer"):
        OneTimeRemoval().check_length(epochs, interval)
    OneTimeRemoval(removed_fraction=0).check_length(epochs, interval)
    DataSieving().check_length(epochs, interval)


def test_samples_in_use_before_and_after_the_removal():
    method = OneTimeRemoval()
    in_use = [method.samples_in_use(50_000, epoch, interval=5, epochs=160) for epoch in range(160)]
    assert in_use == [50_000] * 70 + [38_000] * 90
    assert DataSieving().samples_in_use(50_000, 0, interval=5, epochs=160) == 40_000


@pytest.mark.parametrize("at", [0.0, 1.0, -0.5, float("nan")])
def test_the_removal_is_within_the_run(at):
    with pytest.raises(InvalidArgument, match="at_fraction"):
        OneTimeRemoval(at_fraction=at)


# --- the sieve under a one-time removal ------------------------------------------------------------------------------


def test_the_easiest_are_removed_once_and_for_all_by_hand():
    generator = seeded()
    before = generator.get_state()
    sieve = Sieve(torch.arange(6), OneTimeRemoval(removed_fraction=0.34), generator)
    assert torch.equal(generator.get_state(), before)  # nothing is drawn until then
    assert sieve.partial.tolist() == list(range(6))
    assert sieve.keep() is None
    moved = sieve.update(torch.tensor([3.0, 0.0, 2.0, float("inf"), 1.0, 5.0]))
    assert sieve.removed.tolist() == [1, 4]
    assert sieve.partial.tolist() == [0, 2, 3, 5]
    assert (moved, sieve.ever_used) == (2, 6)
    assert sieve.update(torch.zeros(6)) == 0
    assert sieve.removed.tolist() == [1, 4]


@given(n=st.integers(2, 40), removed=st.floats(0, 0.95), seed=st.integers(0, 99))
def test_a_one_time_removal_loses_no_sample_and_takes_the_easiest(n, removed, seed):
    method = OneTimeRemoval(removed_fraction=removed)
    if method.n_removed(n) == n:
        return
    difficulty = torch.randint(4, (n,), generator=seeded(seed)).float()
    sieve = Sieve(torch.arange(n) * 2, method, seeded(seed))
    sieve.update(difficulty)
    assert sieve.removed.numel() == method.n_removed(n)
    assert sorted([*sieve.partial.tolist(), *sieve.removed.tolist()]) == list(range(0, 2 * n, 2))
    if sieve.removed.numel():
        assert difficulty[sieve.removed // 2].max() <= difficulty[sieve.partial // 2].min()


@pytest.mark.parametrize("updates", [0, 1])
def test_a_one_time_removal_resumes_before_and_after(updates):
    def make() -> Sieve:
        return Sieve(torch.arange(9), OneTimeRemoval(removed_fraction=0.3), seeded())

    sieve = make()
    for _ in range(updates):
        sieve.update(torch.zeros(9))
    resumed = make()
    resumed.load_state_dict(sieve.state_dict())
    for one in (sieve, resumed):
        one.update(torch.zeros(9))
    assert torch.equal(sieve.removed, resumed.removed)
    assert sieve.removed.numel() == 3


def test_a_state_with_sizes_that_do_not_follow_from_its_updates_is_refused():
    sieve = Sieve(torch.arange(9), OneTimeRemoval(removed_fraction=0.3), seeded())
    with pytest.raises(StateMismatch, match="removed"):
        sieve.load_state_dict({**sieve.state_dict(), "updates": 1})


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "cited"),
    [
        (DataSieving(), ["yuan2022spfde", "toneva2019forgetting"]),
        (DataSieving(criterion="loss"), ["yuan2022spfde"]),
        (DataSieving(criterion="random"), ["yuan2022spfde"]),
        (DataSieving(criterion="el2n"), ["yuan2022spfde", "paul2021datadiet"]),
        (
            DataSieving(rescale_loss=True, criterion="loss"),
            ["yuan2022spfde", "qin2024infobatch", "horvitz1952generalization"],
        ),
        (OneTimeRemoval(), ["yuan2021mest", "toneva2019forgetting"]),
    ],
)
def test_an_object_cites_exactly_what_it_uses(method, cited):
    assert list(method.cited) == cited

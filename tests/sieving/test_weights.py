"""Loss weights: with exact probabilities the gradient is unbiased, and the history of the sieve gives usable ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from spfde.core.errors import InvalidArgument
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sieving.sieve import Sieve
from spfde.sieving.weights import inclusion_probabilities


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_inclusion_probabilities_by_hand():
    # 3 of 4 at first; after two updates sample 0 has been in twice, 1 and 2 twice and once, 3 once.
    found = inclusion_probabilities(torch.tensor([2, 2, 1, 1]), 2, initial=0.75)
    assert found.tolist() == pytest.approx([2.75 / 3, 2.75 / 3, 1.75 / 3, 1.75 / 3])
    assert float(found.sum()) == pytest.approx(3.0)


def test_with_exact_probabilities_the_weighted_mean_is_unbiased_by_enumeration():
    """All sets of 2 out of 4, drawn with unequal chances: the expectation is a finite sum."""
    gradient = torch.tensor([1.0, -2.0, 5.0, 10.0], dtype=torch.float64)
    sets = list(itertools.combinations(range(4), 2))
    chance = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64) / 21
    included = torch.zeros(4, dtype=torch.float64)
    for members, p in zip(sets, chance, strict=True):
        included[list(members)] += p
    weights = 0.5 / included
    weighted = sum(p * (weights * gradient)[list(members)].mean() for members, p in zip(sets, chance, strict=True))
    plain = sum(p * gradient[list(members)].mean() for members, p in zip(sets, chance, strict=True))
    mean_weight = sum(p * weights[list(members)].mean() for members, p in zip(sets, chance, strict=True))
    assert float(weighted) == pytest.approx(float(gradient.mean()))
    assert float(mean_weight) == pytest.approx(1.0)
    assert abs(float(plain - gradient.mean())) > 0.5


def circulate(criterion: str, updates: int, seed: int = 0) -> tuple[float, float, float]:
    """Time averages of the weighted and of the plain mean gradient over a sieve's circulation, and the full mean."""
    n = 60
    difficulty = torch.arange(n, dtype=torch.float32)
    gradient = difficulty.double() / n  # easy samples have small gradients: leaving them out biases the mean
    sieve = Sieve(torch.arange(n), DataSieving(removed_fraction=0.3, criterion=criterion), seeded(seed))
    weighted, plain = [], []
    for _ in range(updates):
        scores = torch.zeros(n) if criterion == "random" else difficulty
        sieve.update(scores)
        ids = sieve.partial
        weighted.append(float((sieve.loss_weights(ids).double() * gradient[ids]).mean()))
        plain.append(float(gradient[ids].mean()))
    return sum(weighted) / updates, sum(plain) / updates, float(gradient.mean())


def test_over_a_circulation_the_weights_take_the_bias_away():
    weighted, plain, full = circulate("loss", updates=200)
    assert plain - full > 0.05
    assert abs(weighted - full) < 0.01


def test_a_random_choice_is_unbiased_with_weights_of_one():
    runs = [circulate("random", updates=3, seed=seed) for seed in range(400)]
    weighted = torch.tensor([run[0] for run in runs], dtype=torch.float64)
    assert [run[0] for run in runs] == [run[1] for run in runs]
    assert abs(float(weighted.mean()) - runs[0][2]) < 5 * float(weighted.std()) / 20


def test_with_the_final_frequencies_the_time_average_is_the_full_mean_exactly():
    n, updates = 20, 12
    sieve = Sieve(torch.arange(n), DataSieving(removed_fraction=0.25, criterion="loss"), seeded())
    gradient = torch.rand(n, generator=seeded(1), dtype=torch.float64)
    sets = []
    for _ in range(updates):
        sieve.update(torch.arange(n).float())
        sets.append(sieve.partial)
    frequency = torch.bincount(torch.cat(sets), minlength=n).double() / updates
    weights = 0.75 / frequency
    average = sum((weights * gradient)[ids].mean() for ids in sets) / updates
    assert float(average) == pytest.approx(float(gradient.mean()))


def test_all_weights_are_one_at_first_and_their_mean_is_one_ever_after():
    sieve = Sieve(torch.arange(10), DataSieving(removed_fraction=0.4), seeded())
    assert sieve.loss_weights(sieve.partial).tolist() == [1.0] * 6
    for _ in range(5):
        sieve.update(torch.arange(10).float())
        assert float(sieve.loss_weights(sieve.partial).mean()) == pytest.approx(1.0)


def test_weights_after_two_updates_by_hand():
    sieve = Sieve(torch.arange(4), DataSieving(removed_fraction=0.5, swap_fraction=0.5), seeded())
    (a, b), (c, d) = sieve.partial.tolist(), sieve.removed.tolist()
    for easy in (a, c):  # a makes room for c, and c at once for d; b stays all the time
        sieve.update(torch.tensor([0.0 if sample == easy else 1.0 for sample in range(4)]))
    assert sieve.partial.tolist() == sorted([b, d])
    # π is (2 + 1/2) / 3 of b and (1 + 1/2) / 3 of d: weights in proportion to 3/5 and 1, with a mean of 1.
    assert sieve.loss_weights(torch.tensor([b, d])).tolist() == pytest.approx([0.75, 1.25])


def test_frequent_samples_get_the_smaller_weight():
    sieve = Sieve(torch.arange(10), DataSieving(removed_fraction=0.4), seeded())
    for _ in range(5):
        sieve.update(torch.arange(10).float())
    ids = sieve.partial
    weights = dict(zip(ids.tolist(), sieve.loss_weights(ids).tolist(), strict=True))
    assert weights[max(weights)] == min(weights.values())
    assert max(weights.values()) > 1


@pytest.mark.parametrize("position", ["removed", "outside", "negative"])
def test_a_sample_that_is_not_in_use_has_no_weight(position):
    sieve = Sieve(torch.arange(10), DataSieving(removed_fraction=0.4), seeded())
    wrong = {"removed": int(sieve.removed[0]), "outside": 10, "negative": -1}[position]
    with pytest.raises(InvalidArgument, match=f"indices={wrong}: is not in the partial set"):
        sieve.loss_weights(torch.tensor([wrong]))


def test_weights_go_on_with_a_resumed_sieve():
    sieve = Sieve(torch.arange(30), DataSieving(removed_fraction=0.4), seeded())
    for _ in range(3):
        sieve.update(torch.arange(30).float())
    resumed = Sieve(torch.arange(30), DataSieving(removed_fraction=0.4), seeded(9))
    resumed.load_state_dict(sieve.state_dict())
    assert torch.equal(sieve.loss_weights(sieve.partial), resumed.loss_weights(sieve.partial))


def test_a_one_time_removal_offers_no_weights():
    assert not OneTimeRemoval().rescales
    assert "rescale_loss" not in OneTimeRemoval.model_fields

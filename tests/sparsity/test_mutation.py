import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from spfde.sparsity import mutation


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_drop_keeps_the_highest_scores_among_the_active() -> None:
    mask = torch.tensor([True, True, False, True, True])
    score = torch.tensor([0.1, 0.4, 9.0, 0.3, 0.2])
    assert mutation.drop(mask, score, 2).tolist() == [False, True, False, True, False]


def test_of_equal_scores_the_lower_index_stays() -> None:
    mask = torch.tensor([[False, True], [True, True]])
    assert mutation.drop(mask, torch.ones(2, 2), 2).tolist() == [[False, True], [True, False]]


def test_growth_by_score_takes_the_highest_inactive_ones() -> None:
    mask = torch.tensor([True, False, False, False])
    score = torch.tensor([9.0, 0.1, 0.3, 0.2])
    assert mutation.grow_by_score(mask, score, 3).tolist() == [True, False, True, True]


def test_growth_by_score_counts_inactive_weights_of_zero_score_as_candidates() -> None:
    mask = torch.tensor([False, True, False])
    assert mutation.grow_by_score(mask, torch.zeros(3), 2).tolist() == [True, True, False]


def test_a_weight_that_was_just_dropped_may_return() -> None:
    mask = torch.tensor([True, True])
    dropped = mutation.drop(mask, torch.tensor([1.0, 2.0]), 1)
    assert mutation.grow_random(dropped, 2, _generator()).tolist() == [True, True]
    assert mutation.grow_by_score(dropped, torch.zeros(2), 2).tolist() == [True, True]


def test_random_growth_reaches_every_candidate() -> None:
    mask = torch.tensor([True, False, False, False])
    generator = _generator()
    seen = sum(mutation.grow_random(mask, 2, generator).int() for _ in range(100))
    assert seen[0] == 100
    assert (seen[1:] > 10).all()


def test_scores_by_hand() -> None:
    weight, grad = torch.tensor([-2.0, 1.0]), torch.tensor([0.5, -4.0])
    assert mutation.magnitude(weight).tolist() == [2.0, 1.0]
    assert mutation.gradient(grad).tolist() == [0.5, 4.0]
    assert mutation.magnitude_plus_gradient(weight, grad, 0.5).tolist() == [2.25, 3.0]
    assert torch.equal(mutation.random_score((3, 2), _generator(1)), mutation.random_score([3, 2], _generator(1)))


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 99))
def test_drop_and_growth_are_exact_and_nested(data: st.DataObject, shape: tuple[int, ...], seed: int) -> None:
    numel = math.prod(shape)
    n_active = data.draw(st.integers(0, numel))
    n_keep = data.draw(st.integers(0, n_active))
    n_final = data.draw(st.integers(n_keep, numel))
    generator = _generator(seed)
    mask = mutation.grow_random(torch.zeros(shape, dtype=torch.bool), n_active, generator)
    score = torch.randint(0, 3, shape, generator=generator).float()  # many ties
    kept = mutation.drop(mask, score, n_keep)
    assert kept.sum() == n_keep
    assert not (kept & ~mask).any()
    if 0 < n_keep < n_active:
        assert score[kept].min() >= score[mask & ~kept].max()
    for grown in (mutation.grow_random(kept, n_final, generator), mutation.grow_by_score(kept, score, n_final)):
        assert grown.shape == shape
        assert grown.sum() == n_final
        assert not (kept & ~grown).any()

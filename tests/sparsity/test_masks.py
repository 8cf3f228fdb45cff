import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.sparsity.masks import apply_, grow_random, highest, highest_overall, infer_mask, pack, unpack

_SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_packed_mask_has_its_first_weight_in_the_lowest_bit() -> None:
    mask = torch.tensor([[True, False, False, True, False], [False, False, True, True, False]])
    assert pack(mask).tolist() == [0b10001001, 0b01]


def test_unpacking_the_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="2 bytes"):
        unpack(torch.zeros(3, dtype=torch.uint8), (3, 5))


@given(shape=_SHAPES, seed=st.integers(0, 99))
def test_packing_loses_nothing(shape: tuple[int, ...], seed: int) -> None:
    mask = torch.rand(shape, generator=_generator(seed)) < 0.4
    packed = pack(mask)
    assert packed.shape == (math.ceil(math.prod(shape) / 8),)
    assert torch.equal(unpack(packed, shape), mask)


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    infer_mask(torch.zeros(8, 8), 10, _generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_highest_scores_are_chosen_and_ties_go_to_the_lower_index() -> None:
    score = torch.tensor([[0.5, 3.0, 1.0], [1.0, 1.0, 0.0]])
    assert highest(score, 3).tolist() == [[False, True, True], [True, False, False]]


def test_what_is_chosen_does_not_depend_on_the_memory_format() -> None:
    score = torch.ones(4, 3, 2, 2)
    assert torch.equal(highest(score, 7), highest(score.to(memory_format=torch.channels_last), 7))


def test_scores_that_are_not_numbers_rank_lowest_and_do_not_break_the_count() -> None:
    score = torch.tensor([float("nan"), 1.0, float("inf"), float("-inf"), float("nan")])
    assert highest(score, 2).tolist() == [False, True, True, False, False]
    assert highest(score, 4).sum() == 4


def test_the_highest_of_all_layers_leave_each_its_best() -> None:
    scores = {"a": torch.tensor([[0.9, 0.8, 0.7]]), "b": torch.tensor([0.1, 0.2])}
    for n, first in ((3, [True, True, False]), (2, [True, False, False])):
        chosen = {name: mask.tolist() for name, mask in highest_overall(scores, n).items()}
        assert chosen == {"a": [first], "b": [False, True]}


def test_random_growth_reaches_every_candidate() -> None:
    mask = torch.tensor([True, False, False, False])
    generator = _generator()
    seen = sum(grow_random(mask, 2, generator).int() for _ in range(100))
    assert seen[0] == 100
    assert (seen[1:] > 10).all()


@given(data=st.data(), shape=_SHAPES, seed=st.integers(0, 99))
def test_random_growth_is_exact_and_keeps_what_exists(data: st.DataObject, shape: tuple[int, ...], seed: int) -> None:
    numel = math.prod(shape)
    n_active = data.draw(st.integers(0, numel))
    n_final = data.draw(st.integers(n_active, numel))
    mask = grow_random(torch.zeros(shape, dtype=torch.bool), n_active, _generator(seed))
    grown = grow_random(mask, n_final, _generator(seed))
    assert mask.sum() == n_active
    assert grown.sum() == n_final
    assert grown.shape == shape
    assert not (mask & ~grown).any()


def test_a_mask_is_inferred_from_the_zeros() -> None:
    weight = torch.tensor([0.0, 2.0, -0.0, -1.0])
    assert infer_mask(weight).tolist() == [False, True, False, True]


def test_an_inferred_mask_is_filled_up_at_random() -> None:
    weight = torch.tensor([0.0, 2.0, 0.0, -1.0, 0.0])
    mask = infer_mask(weight, 4, _generator())
    assert mask.sum() == 4
    assert mask[1]
    assert mask[3]


def test_more_non_zeros_than_asked_for_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="5 non-zeros"):
        infer_mask(torch.ones(5), 3, _generator())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_applying_a_mask_clears_to_plus_zero_and_leaves_the_rest_alone(dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    tensor = torch.tensor([[-1.5, -2.0], [3.0, 4.0]]).to(dtype)
    apply_(tensor, mask)
    assert torch.equal(tensor, torch.tensor([[-1.5, 0.0], [0.0, 4.0]]).to(dtype))
    if not dtype.is_complex:
        assert not torch.signbit(tensor[~mask]).any()


def test_applying_a_mask_clears_what_is_not_finite() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), 1.0])
    apply_(tensor, torch.tensor([False, False, True]))
    assert tensor.tolist() == [0.0, 0.0, 1.0]


def test_a_mask_applies_to_any_memory_layout() -> None:
    mask = torch.rand(2, 3, 4, 4, generator=_generator()) < 0.5
    tensor = torch.randn(2, 3, 4, 4, generator=_generator()).to(memory_format=torch.channels_last)
    expected = tensor * mask
    apply_(tensor, mask)
    assert torch.equal(tensor, expected)

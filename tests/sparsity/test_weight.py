"""One masked weight: its first mask, its mutations, what of the optimizer's state goes with them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.masking import places
from spfde.sparsity.block import Block
from spfde.sparsity.structure import Structure, Unstructured
from spfde.sparsity.weight import MaskedWeight

_SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def _masked(values: torch.Tensor, structure: Structure, target: int, seed: int = 0) -> MaskedWeight:
    parameter, generator = nn.Parameter(values), torch.Generator().manual_seed(seed)
    return MaskedWeight("w", parameter, structure, target, optimizer=torch.optim.Adam([parameter]), generator=generator)


def _weight(*values: float, target: int = 2) -> MaskedWeight:
    return _masked(torch.tensor([list(values)]), Unstructured(), target)


@given(shape=_SHAPES, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_random_first_mask_is_exact_and_seeded(shape: tuple[int, ...], share: float, seed: int) -> None:
    masks = []
    for _ in range(2):
        weight = _masked(torch.zeros(shape), Unstructured(), 1, seed)
        n_active = int(share * weight.n_units)
        weight.draw(n_active, by="random")
        assert weight.mask.shape == shape
        assert weight.mask.sum() == n_active == weight.active
        masks.append(weight.mask)
    assert torch.equal(*masks)


def test_random_first_masks_reach_every_weight() -> None:
    weight, total = _weight(*[0.0] * 12), torch.zeros(1, 12)
    for _ in range(400):
        weight.draw(3, by="random")
        total += weight.mask
    assert (total > 50).all()  # 100 expected each


def test_a_first_mask_by_magnitude_keeps_the_largest() -> None:
    weight = _weight(0.5, -3.0, 1.0, -1.0)
    weight.draw(2, by="magnitude")
    assert places(weight.mask) == [1, 2]


def test_a_mutation_zeroes_what_it_drops_and_what_it_grows_with_all_state() -> None:
    weight = _weight(1.0, 2.0, 3.0, 4.0, target=4)
    optimizer = weight.optimizers.each[0]
    optimizer.state[weight.parameter] = {"step": torch.tensor(5.0), "exp_avg": torch.ones(1, 4)}
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    weight.mutate(2, 3, drop_score=score, grow_score=score)
    assert places(weight.mask) == [0, 1, 2]
    assert weight.parameter.tolist() == [[1.0, 2.0, 0.0, 0.0]]
    state = optimizer.state[weight.parameter]
    assert state["exp_avg"].tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert state["step"] == 5.0
    assert weight.n_explored == 4


@pytest.mark.parametrize("drop_score", [None, torch.arange(8.0).view(2, 4)])
def test_blocks_come_and_go_as_a_whole(drop_score: torch.Tensor | None) -> None:
    weight = _masked(torch.ones(2, 4), Block(rows=2, columns=1), 2)
    weight.draw(3, by="random")
    weight.mutate(1, 2, drop_score=drop_score, grow_score=None)
    assert weight.active == 2
    assert weight.mask.sum() == 4
    assert torch.equal(weight.mask[0], weight.mask[1])

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spfde.core.errors import InvalidArgument
from spfde.core.registry import registered
from spfde.sparsity.block import Block
from spfde.sparsity.structure import (
    NM,
    Channels,
    Kernels,
    Patterns,
    Structure,
    Unstructured,
)
from spfde.sparsity.units import PATTERNS, highest_of_each

STRUCTURES = registered("structure")

_CUTS: list[Structure] = [
    Unstructured(),
    Block(),
    Block(rows=2, columns=3),
    Block(rows=2, columns=2, along="inputs"),
    Block(rows=1, columns=2, along="kernel"),
    NM(),
    NM(n=1, m=3),
    Kernels(),
    Patterns(),
    Channels(),
]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fitting(structure: Structure, outputs: int, inputs: int, share: float) -> tuple[tuple[int, ...], float]:
    """A shape and a sparsity that the structure takes."""
    sparsity = share
    if isinstance(structure, NM):
        sparsity = 1 - structure.n / structure.m
    if isinstance(structure, Patterns):
        sparsity = 5 / 9 + share * 4 / 9
    if isinstance(structure, Block) and structure.along == "kernel":
        sparsity = 1 / 3 + share * 2 / 3
    return (4 * outputs, 12 * inputs, 3, 3), min(sparsity, 0.999)


def _named(cut: Structure) -> str:
    return repr(cut)


def test_each_structure_is_listed_under_its_name() -> None:
    assert list(STRUCTURES) == ["unstructured", "nm", "kernel", "pattern", "channel", "block"]
    for name, structure in STRUCTURES.items():
        assert structure.name == name
        assert structure.summary.endswith(".")
        assert structure.references


def test_a_weight_for_itself_is_scored_chosen_and_placed_as_it_lies() -> None:
    structure = Unstructured()
    score = torch.tensor([[0.1, 3.0], [2.0, 0.5]])
    assert structure.reduce(score).tolist() == pytest.approx([0.1, 3.0, 2.0, 0.5])
    units = structure.choose(structure.reduce(score), 2)
    assert structure.expand(units, (2, 2)).tolist() == [[False, True], [True, False]]


def test_drop_keeps_the_highest_scores_among_what_exists() -> None:
    units = torch.tensor([True, True, False, True, True])
    score = torch.tensor([0.1, 0.4, 9.0, 0.3, 0.2])
    assert Unstructured().drop(units, score, 2).tolist() == [False, True, False, True, False]


def test_of_equal_scores_the_lower_index_stays() -> None:
    units = torch.tensor([False, True, True, True])
    assert Unstructured().drop(units, torch.ones(4), 2).tolist() == [False, True, True, False]


def test_growth_takes_the_highest_of_those_that_do_not_exist() -> None:
    units = torch.tensor([True, False, False, False])
    score = torch.tensor([9.0, 0.1, 0.3, 0.2])
    assert Unstructured().grow(units, score, 3).tolist() == [True, False, True, True]


def test_growth_counts_zero_scores_and_what_was_just_dropped_as_candidates() -> None:
    dropped = Unstructured().drop(torch.tensor([True, True]), torch.tensor([1.0, 2.0]), 1)
    assert Unstructured().grow(dropped, torch.zeros(2), 2).tolist() == [True, True]


@given(data=st.data(), numel=st.integers(1, 200), seed=st.integers(0, 99))
def test_drop_and_growth_are_exact_and_nested(data: st.DataObject, numel: int, seed: int) -> None:
    n_active = data.draw(st.integers(0, numel))
    n_keep = data.draw(st.integers(0, n_active))
    n_final = data.draw(st.integers(n_keep, numel))
    generator = _generator(seed)
    units = Unstructured().choose(torch.rand(numel, generator=generator), n_active)
    score = torch.randint(0, 3, (numel,), generator=generator).float()  # many ties
    kept = Unstructured().drop(units, score, n_keep)
    assert kept.sum() == n_keep
    assert not (kept & ~units).any()
    if 0 < n_keep < n_active:
        assert score[kept].min() >= score[units & ~kept].max()
    grown = Unstructured().grow(kept, score, n_final)
    assert grown.sum() == n_final
    assert not (kept & ~grown).any()


def test_a_block_is_some_outputs_by_some_columns_of_the_flattened_matrix() -> None:
    structure = Block(rows=2, columns=2)
    values = torch.arange(16.0).view(4, 4)
    # Rows 0-1 hold 0 1 | 2 3 and 4 5 | 6 7, rows 2-3 hold 8 9 | 10 11 and 12 13 | 14 15.
    assert structure.reduce(values, "sum").tolist() == [
        0 + 1 + 4 + 5,
        2 + 3 + 6 + 7,
        8 + 9 + 12 + 13,
        10 + 11 + 14 + 15,
    ]
    assert structure.reduce(values, "l2")[0].item() == pytest.approx(math.sqrt(0 + 1 + 16 + 25))
    mask = structure.expand(torch.tensor([False, True, False, False]), (4, 4))
    assert mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert structure.units_of(mask).tolist() == [False, True, False, False]


def test_the_predecessors_block_lets_four_filters_share_one_position() -> None:
    mask = Block().expand(torch.tensor([True, False, False, False, False, True]), (8, 3, 1, 1))
    assert mask[:, :, 0, 0].int().tolist() == [[1, 0, 0]] * 4 + [[0, 0, 1]] * 4


def test_of_each_group_of_four_the_two_best_weights_exist() -> None:
    structure = NM(n=2, m=4)
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 9.0]])
    units = structure.choose(structure.reduce(score), 4)
    # In the second group the tie goes to the lower index.
    assert units.int().tolist() == [1, 0, 1, 0, 1, 0, 0, 1]
    assert structure.expand(units, (1, 8)).shape == (1, 8)


def test_a_group_that_lost_both_weights_gets_two_others_back() -> None:
    structure = NM(n=2, m=4)
    units = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0]).bool()
    kept = structure.drop(units, torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0]), 2)
    assert kept.int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    grown = structure.grow(kept, torch.tensor([0.0, 7.0, 8.0, math.inf, 9.0, 9.0, 9.0, math.inf]), 4)
    assert grown.int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_in_a_group_no_score_takes_the_place_of_a_weight_that_exists() -> None:
    units = torch.tensor([False, False, True, True])
    assert NM().grow(units, torch.tensor([math.inf, math.inf, 0.0, 0.0]), 2).tolist() == units.tolist()


def test_not_a_number_ranks_below_every_score_in_a_group() -> None:
    score = torch.tensor([math.nan, -math.inf, -1.0, -2.0])
    assert NM().choose(score, 2).tolist() == [False, False, True, True]


@given(rows=st.integers(1, 6), m=st.integers(2, 9), data=st.data(), seed=st.integers(0, 99))
def test_the_best_of_each_row_are_those_of_a_stable_sort(rows: int, m: int, data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, m))
    score = torch.randint(4, (rows, m), generator=_generator(seed)).float()
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :n]
    expected = torch.zeros(rows, m, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(highest_of_each(score, n), expected)


def test_a_kernel_is_what_one_output_sees_of_one_input() -> None:
    structure = Kernels()
    mask = structure.expand(torch.tensor([False, True, True, False]), (2, 2, 3, 3))
    assert mask.flatten(2).sum(2).tolist() == [[0, 9], [9, 0]]
    assert structure.reduce(mask.float(), "sum").tolist() == [0, 9, 9, 0]


def test_a_channel_is_a_whole_output() -> None:
    structure = Channels()
    values = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    assert structure.reduce(values).tolist() == [5.0, 1.0, 2.0]
    units = structure.choose(structure.reduce(values), 2)
    assert structure.expand(units, (3, 2)).tolist() == [[True, True], [False, False], [True, True]]


def test_there_are_eight_patterns_of_the_centre_and_three_neighbours() -> None:
    assert len(set(PATTERNS)) == 8
    # Four squares and four Ts: two neighbours by an edge and one by the corner between, or three by an edge.
    for pattern in PATTERNS:
        assert 4 in pattern
        assert len({1, 3, 5, 7} & set(pattern)) in (2, 3)
    keeps = torch.zeros(8, 9).scatter_(1, torch.tensor(PATTERNS), 1.0).view(8, 3, 3)
    turned = {tuple(torch.rot90(keep, turns).flatten().tolist()) for keep in keeps for turns in range(4)}
    assert turned == {tuple(keep.flatten().tolist()) for keep in keeps}


def test_a_kernel_is_scored_by_its_best_pattern_and_gets_it() -> None:
    structure = Patterns()
    values = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 4.0], [9.0, 0.0, 0.0]]).view(1, 1, 3, 3)
    # The corner 9 belongs to the square at the lower left only: 9 + 3; upper right: 2 + 0 + 3 + 4.
    assert structure.reduce(values, "sum").tolist() == [12.0]
    assert structure.reduce(values, "l2").item() == pytest.approx(math.sqrt(81 + 9))
    mask = structure.expand(torch.tensor([True]), (1, 1, 3, 3), score=values)
    assert mask.int().tolist() == [[[[0, 0, 0], [1, 1, 0], [1, 1, 0]]]]


def test_a_kernel_keeps_its_pattern_while_it_exists_and_gets_another_when_it_comes_back() -> None:
    structure = Patterns()
    shape = (1, 3, 3, 3)
    first = structure.expand(torch.tensor([True, True, False]), shape, generator=_generator(1))
    score = torch.ones(shape)
    score[0, :, 2, 2] = 5.0
    second = structure.expand(torch.tensor([True, False, True]), shape, previous=first, score=score)
    assert torch.equal(second[0, 0], first[0, 0])
    assert not second[0, 1].any()
    assert second[0, 2].int().tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_random_patterns_follow_from_the_generator_and_reach_all_eight() -> None:
    structure, shape = Patterns(), (20, 10, 3, 3)
    before = torch.get_rng_state()
    masks = [structure.expand(torch.ones(200).bool(), shape, generator=_generator(3)) for _ in range(2)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(kernel.tolist()) for kernel in masks[0].view(200, 9)}) == 8


def test_a_score_that_is_no_number_gives_no_pattern_the_preference() -> None:
    values = torch.zeros(1, 1, 3, 3)
    values[0, 0, 0, 0], values[0, 0, 2, 2] = math.nan, 1.0
    for norm in ("l2", "sum"):
        assert Patterns().reduce(values, norm).tolist() == [1.0]
        mask = Patterns().expand(torch.tensor([True]), (1, 1, 3, 3), score=values, norm=norm)
        assert mask[0, 0].int().tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("structure", "shape", "sparsity", "rule"),
    [
        (Block(), (6, 8), 0.5, ("outputs", "4", "has 6")),
        (Block(rows=1, columns=4), (6, 5, 3, 3), 0.5, ("per output", "4", "has 45")),
        (NM(), (6, 6), 0.5, ("per output", "4", "has 6")),
        (NM(), (6, 8), 0.9, ("0.5", "2:4", "has 0.9")),
        (Patterns(), (6, 8), 0.9, ("3x3", "none")),
        (Patterns(), (6, 8, 1, 1), 0.9, ("3x3", "1x1")),
        (Patterns(), (6, 8, 3, 3), 0.5, ("5/9",)),
    ],
    ids=lambda value: str(value),
)
def test_what_does_not_fit_is_said_as_a_clause(
    structure: Structure, shape: tuple[int, ...], sparsity: float, rule: tuple[str, ...]
) -> None:
    problem = structure.problem(shape, sparsity)
    assert problem is not None
    assert problem.startswith("must have")
    assert all(word in problem for word in rule)


def test_what_fits_breaks_no_rule() -> None:
    assert Block().problem((8, 5), 0.3) is None
    assert NM(n=1, m=3).problem((5, 6), 1 - 1 / 3) is None
    assert Patterns().problem((2, 2, 3, 3), 5 / 9) is None
    for structure in (Unstructured(), Kernels(), Channels()):
        assert structure.problem((5, 7), 0.9) is None


@pytest.mark.parametrize("fields", [{"n": 4, "m": 4}, {"n": 0, "m": 4}, {"n": 1, "m": 1}])
def test_a_group_must_leave_something_out(fields: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument):
        NM(**fields)


def test_the_target_is_rounded_in_units_and_never_none() -> None:
    assert Block().target_units((8, 5), 0.75) == 3  # 2.5 of 10 blocks
    assert Channels().target_units((5, 4), 0.9) == 1  # half a channel
    assert Channels().target_units((40, 4), 0.999) == 1
    assert NM(n=1, m=4).target_units((3, 8), 0.75) == 6
    assert Patterns().target_units((10, 10, 3, 3), 0.9) == 23  # 90 of 900 weights are 22.5 patterns
    assert Patterns().target_units((10, 10, 3, 3), 5 / 9) == 100


@pytest.mark.parametrize("structure", _CUTS, ids=_named)
@settings(max_examples=25)
@given(
    outputs=st.integers(1, 3), inputs=st.integers(1, 2), share=st.floats(0.0, 0.99), drop=st.floats(0.0, 1.0),
    last=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_counts_stay_exact_through_a_mutation(
    structure: Structure, outputs: int, inputs: int, share: float, drop: float, last: bool, seed: int
) -> None:
    shape, sparsity = _fitting(structure, outputs, inputs, share)
    generator = _generator(seed)
    assert structure.problem(shape, sparsity) is None
    weight = torch.randn(shape, generator=generator)
    if last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    target, size = structure.target_units(shape, sparsity), structure.unit_size(shape)
    units = structure.choose(structure.reduce(weight.abs()), target)
    mask = structure.expand(units, shape, score=weight.abs())
    _check(structure, mask, units, target * size)

    kept = structure.drop(units, structure.reduce(weight.abs() * mask), int(drop * target))
    assert int(kept.sum()) == int(drop * target)
    assert not (kept & ~units).any()
    grown = structure.grow(kept, torch.rand(len(kept), generator=generator), target)
    assert not (kept & ~grown).any()
    after = structure.expand(grown, shape, previous=mask, generator=generator)
    _check(structure, after, grown, target * size)
    survivors = structure.expand(kept, shape, previous=mask, generator=generator)
    assert not (survivors & ~(mask & after)).any()


def _check(structure: Structure, mask: Tensor, units: Tensor, n_active: int) -> None:
    assert int(mask.sum()) == n_active
    assert mask.is_contiguous()
    assert torch.equal(structure.units_of(mask), units)
    assert torch.equal(structure.units_of(mask.contiguous(memory_format=torch.channels_last)), units)
    if isinstance(structure, NM):
        assert set(mask.reshape(-1, structure.m).sum(1).tolist()) == {structure.n}


def test_a_mask_of_2_4_is_what_semi_structured_tensors_take_of_a_linear_layer() -> None:
    weight = torch.randn(32, 64, generator=_generator())
    mask = NM().expand(NM().choose(NM().reduce(weight.abs()), 1024), weight.shape)
    # Along a row, the input of nn.Linear, each four consecutive weights hold two.
    assert (mask.view(32, 16, 4).sum(2) == 2).all()


def test_a_block_along_the_inputs_holds_neighbouring_inputs_at_one_place_of_the_kernel() -> None:
    structure = Block(rows=2, columns=2, along="inputs")
    units = torch.zeros(structure.n_units((4, 4, 1, 2)), dtype=torch.bool)
    units[[1, 6]] = True  # outputs 0 and 1, kernel column 0, inputs 2 and 3; outputs 2 and 3, column 1, inputs 0 and 1
    mask = structure.expand(units, (4, 4, 1, 2))
    assert mask.nonzero().tolist() == [
        [0, 2, 0, 0], [0, 3, 0, 0], [1, 2, 0, 0], [1, 3, 0, 0], [2, 0, 0, 1], [2, 1, 0, 1], [3, 0, 0, 1], [3, 1, 0, 1]
    ]  # fmt: skip
    assert torch.equal(structure.units_of(mask), units)


def test_a_block_along_the_kernel_begins_where_its_scores_are_highest_and_stays_there() -> None:
    structure = Block(rows=1, columns=2, along="kernel")
    score = torch.tensor([[[[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]]]])
    units = torch.tensor([True, True])
    mask = structure.expand(units, (1, 1, 2, 3), score=score, norm="sum")
    assert mask[0, 0].tolist() == [[True, True, False], [False, True, True]]
    assert structure.reduce(score, "sum").tolist() == [4.0, 4.0]
    assert torch.equal(structure.expand(units, (1, 1, 2, 3), score=score.flip(3), previous=mask), mask)


def test_blocks_along_the_kernel_need_kernels_as_wide_and_one_place_to_a_row() -> None:
    structure = Block(rows=1, columns=2, along="kernel")
    assert "at least 2 wide; they are 1 wide" in (structure.problem((4, 4, 1, 1), 0.9) or "")
    assert "at least 0.333" in (structure.problem((4, 4, 3, 3), 0.3) or "")
    assert structure.problem((4, 4, 3, 3), 0.9) is None
    assert "number of inputs that 2 divides; it has 3" in (
        Block(rows=2, columns=2, along="inputs").problem((4, 3, 3, 3), 0.9) or ""
    )


def test_a_row_of_a_kernel_that_held_more_than_a_block_gets_one() -> None:
    structure = Block(rows=1, columns=2, along="kernel")
    previous = torch.tensor([[[[True, True, True], [False, True, True]]]])
    score = torch.tensor([[[[1.0, 5.0, 4.0], [9.0, 9.0, 0.0]]]])
    mask = structure.expand(torch.tensor([True, True]), (1, 1, 2, 3), score=score, previous=previous)
    assert mask.tolist() == [[[[False, True, True], [False, True, True]]]]

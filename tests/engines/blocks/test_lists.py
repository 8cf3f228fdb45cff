"""Where the active blocks are: worked out by hand, then what holds for every mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.blocks import mask_of
from spfde.core.errors import InvalidArgument
from spfde.engines.blocks.lists import BlockLists, index_lists, most_groups

#   . X . X        rows 0: columns 1, 3
#   . . . .        row 1: nothing
#   . X X X        row 2: columns 1, 2, 3
#   . . . X        row 3: column 3;  column 0 has nothing
UNITS = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=bool)


def test_lists_worked_out_by_hand() -> None:
    found = {name: numbers.tolist() for name, numbers in index_lists(UNITS, group=2).items()}
    assert found == {
        "row_starts": [0, 2, 2, 5, 6],
        "columns": [1, 3, 1, 2, 3, 3],
        "column_starts": [0, 0, 2, 3, 6],
        "rows": [0, 2, 2, 0, 2, 3],
        "group_columns": [1, 2, 3, 3],
        "group_firsts": [0, 2, 3, 5],
        "places": [-1, 0, -1, 4, -1, -1, -1, -1, -1, 1, 2, 5, -1, -1, -1, 6],
    }


def test_a_grid_without_blocks_has_empty_lists() -> None:
    found = index_lists(np.zeros((2, 3), dtype=bool), group=4)
    assert found["row_starts"].tolist() == [0, 0, 0]
    assert found["column_starts"].tolist() == [0, 0, 0, 0]
    assert found["places"].tolist() == [-1] * 6
    assert not any(len(found[name]) for name in ("columns", "rows", "group_columns", "group_firsts"))


def grid_of(shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
    size = shape[0] * shape[1]
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda flags: np.array(flags).reshape(shape))


grids = st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(grid_of)


@given(grids, st.integers(1, 4))
def test_every_block_is_in_each_list_once_and_nothing_else_is(units: np.ndarray, group: int) -> None:
    found = index_lists(units, group)
    rows, columns = units.shape
    by_row = [(r, int(c)) for r in range(rows) for c in found["columns"][slice(*found["row_starts"][r : r + 2])]]
    by_column = [(int(r), c) for c in range(columns) for r in found["rows"][slice(*found["column_starts"][c : c + 2])]]
    active = list(zip(*(index.tolist() for index in np.nonzero(units)), strict=True))
    assert by_row == active
    assert sorted(by_column) == active
    # What the kernel for the weight's gradient goes by: from a group's first block on, no further than its column.
    placed = {}
    for number, (column, first) in enumerate(zip(found["group_columns"], found["group_firsts"], strict=True)):
        end = min(first + group, found["column_starts"][column + 1])
        assert end > first
        placed.update({(int(found["rows"][at]), int(column)): number * group + at - first for at in range(first, end)})
    assert placed == {(r, c): found["places"][r * columns + c] for r, c in active}
    assert (found["places"].reshape(rows, columns) >= 0).tolist() == units.tolist()


@given(grids, st.integers(1, 4))
def test_there_are_never_more_groups_than_are_counted_on(units: np.ndarray, group: int) -> None:
    found = index_lists(units, group)
    assert len(found["group_columns"]) <= most_groups(int(units.sum()), *units.shape, group)


def test_as_many_groups_as_the_worst_mask_makes() -> None:
    assert most_groups(0, rows=4, columns=3, group=4) == 0
    assert most_groups(2, rows=4, columns=3, group=4) == 2  # in two columns
    assert most_groups(5, rows=4, columns=3, group=4) == 3
    assert most_groups(12, rows=4, columns=3, group=4) == 3  # all of them: one a column


def test_blocks_larger_than_the_kernels_take_are_cut_up() -> None:
    assert BlockLists((128, 192), (32, 64), "cpu").sides == (32, 64)
    assert BlockLists((256, 384), (128, 96), "cpu").sides == (64, 32)
    assert BlockLists((256, 384), (128, 96), "cpu").grid == (4, 12)


@pytest.mark.parametrize(("shape", "block"), [((64, 64), (32, 16)), ((64, 48), (32, 32)), ((96, 64), (64, 32))])
def test_blocks_that_do_not_fit_are_refused(shape: tuple[int, int], block: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        BlockLists(shape, block, "cpu")
    (problem,) = refused.value.problems
    assert (problem.argument, problem.value) == ("block", block)
    assert str(shape) in problem.rule


def test_a_block_with_a_single_weight_is_active() -> None:
    lists = BlockLists((64, 64), (32, 32), "cpu")
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[40, 3] = True
    lists.fill(mask)
    assert (lists.active, lists.density) == (1, 0.25)
    assert lists["row_starts"].tolist() == [0, 0, 1]
    assert lists["columns"][0] == 0


@settings(max_examples=20)
@given(grid_of((3, 5)), grid_of((3, 5)))
def test_a_mutation_overwrites_the_lists_where_they_are(one: np.ndarray, other: np.ndarray) -> None:
    lists = BlockLists((96, 160), (32, 32), "cpu")
    names = ("row_starts", "columns", "column_starts", "rows", "group_columns", "group_firsts", "places")
    addresses = [lists[name].data_ptr() for name in names]
    for units in (one, other):
        lists.fill(mask_of(torch.from_numpy(units), (32, 32)))
        assert [lists[name].data_ptr() for name in names] == addresses
        for name, numbers in index_lists(units, lists.group).items():
            assert lists[name][: len(numbers)].tolist() == numbers.tolist()
        n_groups = len(index_lists(units, lists.group)["group_columns"])
        assert n_groups <= lists.n_groups
        assert lists["group_columns"][n_groups:].tolist() == [-1] * (len(lists["group_columns"]) - n_groups)


def test_kernels_are_started_alike_until_the_number_of_blocks_has_grown_or_halved() -> None:
    lists = BlockLists((320, 64), (32, 32), "cpu")

    def started(active: int, first: int = 0) -> int:
        units = torch.zeros(20, dtype=torch.bool)
        units[first : first + active] = True
        lists.fill(mask_of(units.view(10, 2), (32, 32)))
        assert lists.active == active
        return lists.n_groups

    at_ten = started(10)
    assert started(10, first=7) == at_ten
    assert started(5) == at_ten
    assert started(4) < at_ten
    assert started(4) == most_groups(4, 10, 2, lists.group)
    assert started(11) > started(4)

"""Where the active blocks of a weight are, as the kernels read it.

A weight [out, in] is a grid of blocks, row by row of outputs. For ``y = x @ W.T`` a kernel needs the blocks of each row
of the grid, for the gradient of ``x`` those of each column, and for the gradient of the weight all of them, in groups
that lie in one column, so that they read the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem

UNIT = 32
"""What both sides of a block must be multiples of."""
MOST_DENSITY = 0.2
"""Share of active blocks above which a layer is left to PyTorch: dense tensor cores are faster there (modelled)."""
_LARGEST = 64  # sides of the blocks that kernels compute with: their tiles must fit into 99 KiB of shared memory
_GROUP_ROWS = 128  # rows of the weight in a group
_ALIGNED = 32  # lists begin at multiples of so many numbers: Triton compiles another kernel for other addresses

Numbers = NDArray[np.int32]


def index_lists(units: NDArray[np.bool_], group: int) -> dict[str, Numbers]:
    """The lists of a grid of blocks, in which a block is active or not.

    Args:
        units: [rows, columns].
        group: most blocks in a group.

    Returns:
        ``row_starts`` [rows + 1] and ``columns`` [active]: row r has the blocks
        ``columns[row_starts[r]:row_starts[r + 1]]``; ``column_starts`` and ``rows``, the same for columns;
        ``group_columns`` and ``group_firsts`` [groups]: a group's column, and where it begins in ``rows``; ``places``
        [rows * columns]: the place of a block among ``groups * group`` ones, -1 for one that is not active.

    Example:
        >>> found = index_lists(np.array([[True, False], [True, True]]), group=4)
        >>> found["row_starts"].tolist(), found["columns"].tolist()
        ([0, 1, 3], [0, 0, 1])
        >>> found["group_columns"].tolist(), found["places"].tolist()
        ([0, 1], [0, -1, 1, 4])
    """
    of_row, of_column = units.sum(1), units.sum(0)
    column_starts = np.concatenate(([0], np.cumsum(of_column)))
    column, row = np.nonzero(units.T)
    n_groups = -(-of_column // group)
    first_groups = np.cumsum(n_groups) - n_groups
    group_columns = np.repeat(np.arange(units.shape[1]), n_groups)
    within = np.arange(len(row)) - column_starts[column]  # place of a block in its column
    places = np.full(units.size, -1)
    places[row * units.shape[1] + column] = first_groups[column] * group + within
    found = {
        "row_starts": np.concatenate(([0], np.cumsum(of_row))),
        "columns": np.nonzero(units)[1],
        "column_starts": column_starts,
        "rows": row,
        "group_columns": group_columns,
        "group_firsts": column_starts[group_columns]
        + group * (np.arange(len(group_columns)) - first_groups[group_columns]),
        "places": places,
    }
    return {name: numbers.astype(np.int32) for name, numbers in found.items()}


def most_groups(active: int, rows: int, columns: int, group: int) -> int:
    """As many groups as ``active`` blocks of a grid can make, wherever they lie.

    Example:
        >>> most_groups(active=5, rows=4, columns=3, group=4)  # at worst one full group, and one in the other columns
        3
    """
    return min(active, (active + columns * (group - 1)) // group, columns * -(-rows // group))


class BlockLists:
    """The lists of one weight, on its device.

    They lie in one buffer with room for every block, which a mutation overwrites: addresses never change, so a captured
    graph goes on reading them.

    Args:
        shape: (out, in) of the weight.
        block: (rows, columns) of the structure's blocks, multiples of :data:`UNIT`; large ones are cut up.
        device: of the weight.

    Attributes:
        sides: (rows, columns) of the blocks in the lists.
        grid: rows and columns of blocks.
        group: most blocks in a group.
        active: number of active blocks.
        n_groups: groups that kernels are started for; those that do not exist do nothing. It stays the same while the
            number of active blocks does, and while it falls to no less than half: a captured graph is right so long.
        usual_groups: how many there would be at 90 %; it depends on the shape alone.

    Raises:
        InvalidArgument: the blocks do not divide the shape, or are no multiples of :data:`UNIT`.

    Example:
        >>> lists = BlockLists((64, 32), (32, 32), "cpu")
        >>> lists.fill(torch.ones(64, 32, dtype=torch.bool))
        >>> lists.grid, lists.active, lists["rows"].tolist()
        ((2, 1), 2, [0, 1])
    """

    def __init__(self, shape: Sequence[int], block: Sequence[int], device: torch.device | str) -> None:
        out, into = shape
        for size, side in zip((out, into), block, strict=True):
            if side % UNIT or size % side:
                rule = f"must have sides that are multiples of {UNIT} and divide the shape {(out, into)}"
                raise InvalidArgument(Problem("block", tuple(block), rule, "Use another spfde.Block, or leave it out."))
        self.sides = math.gcd(block[0], _LARGEST), math.gcd(block[1], _LARGEST)
        self.grid = rows, columns = out // self.sides[0], into // self.sides[1]
        self.group = _GROUP_ROWS // self.sides[0]
        self.usual_groups = most_groups(-(-rows * columns // 10), rows, columns, self.group)
        self.active = self.n_groups = self._capacity = 0
        room = columns * -(-rows // self.group)
        sizes = {
            "row_starts": rows + 1, "columns": rows * columns, "column_starts": columns + 1, "rows": rows * columns,
            "group_columns": room, "group_firsts": room, "places": rows * columns,
        }  # fmt: skip
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes.values()]).tolist()
        self._spans = {
            name: slice(begin, begin + size) for begin, (name, size) in zip([0, *ends[:-1]], sizes.items(), strict=True)
        }
        self._buffer = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self._lists: Mapping[str, Tensor] = {name: self._buffer[span] for name, span in self._spans.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A list by the name that it has in :func:`index_lists`, with all its room."""
        return self._lists[name]

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    @property
    def density(self) -> float:
        """Share of active blocks."""
        return self.active / math.prod(self.grid)

    def fill(self, mask: Tensor) -> None:
        """Take the blocks in which ``mask`` [out, in] has a weight. It waits for the device."""
        (rows, columns), (high, wide) = self.grid, self.sides
        units = mask.reshape(rows, high, columns, wide).any(3).any(1).cpu().numpy()
        numbers = np.zeros(len(self._buffer), dtype=np.int32)
        numbers[self._spans["group_columns"]] = -1
        for name, found in index_lists(units, self.group).items():
            begin = self._spans[name].start
            numbers[begin : begin + len(found)] = found
        self._buffer.copy_(torch.from_numpy(numbers))
        self.active = int(units.sum())
        if not self._capacity <= 2 * self.active <= 2 * self._capacity:
            self._capacity = self.active
            self.n_groups = most_groups(self.active, rows, columns, self.group)

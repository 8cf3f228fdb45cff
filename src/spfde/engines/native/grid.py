"""Into how many cells images are cut where they are too few to fill the vectors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from spfde.engines.native.fusion import ConvStep, FusedStep, GlobalPoolStep, PointStep, PoolStep
from spfde.engines.native.layout import Layout


def best_grid(steps: Sequence[FusedStep], layouts: Mapping[str, Layout]) -> tuple[int, int]:
    """Cells downwards and to the right with which there is the least to do: vectors of pixels, with a border of one.

    Args:
        steps: of a region of images without gradients, whose norms are constants.
        layouts: of its values, as whole images.
    """

    def work(grid: tuple[int, int]) -> int:
        cut = [layout.cut(grid) for layout in layouts.values()]
        return sum(each.groups * each.channels * (each.height + 2) * (each.width + 2) for each in cut)

    return min(fitting_grids(steps, layouts), key=work)


def fitting_grids(steps: Sequence[FusedStep], layouts: Mapping[str, Layout]) -> list[tuple[int, int]]:
    """Into how many cells all values can be cut so that each needs nothing but what lies in it and in those around it.

    What a convolution reads beyond a cell must lie in the next one; pooling reads nothing beyond. All cells of a value
    are of one size, and what a step writes is cut where that is which it reads.
    """
    lanes = next(iter(layouts.values())).lanes
    powers = [1 << n for n in range(lanes.bit_length())]
    down, right = (
        [n for n in powers if n == 1 or all(_fits(step, layouts, axis, n) for step in steps)] for axis in (0, 1)
    )
    return [(rows, columns) for columns, rows in itertools.product(right, down) if rows * columns <= lanes]


def _fits(step: FusedStep, layouts: Mapping[str, Layout], axis: int, n: int) -> bool:
    """Can what a step reads be cut into ``n`` along an axis?"""
    size = layouts[step.x].plane[axis]
    if isinstance(step, PointStep | GlobalPoolStep):
        return size % n == 0
    stride, before, behind = _beyond(step, axis)
    most = 0 if isinstance(step, PoolStep) else size // n
    return size % (n * stride) == 0 and layouts[step.y].plane[axis] * stride == size and max(before, behind) <= most


def _beyond(step: ConvStep | PoolStep, axis: int) -> tuple[int, int, int]:
    """The step's stride along an axis, and how far it reads before and behind a cell."""
    if isinstance(step, ConvStep):
        stride, padding, span = step.geometry.stride, step.geometry.padding[axis], step.geometry.spans[axis]
    else:
        span, stride, padding = (pair[axis] for pair in step.window)
    return stride, padding, span - stride - padding

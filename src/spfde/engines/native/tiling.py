"""Into how many tiles images are cut where they are too few to fill the vectors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from spfde.engines.native.fusion import ConvStep, FusedStep, GlobalPoolStep, PoolStep
from spfde.engines.native.layout import Layout


def best_grid(steps: Sequence[FusedStep], layouts: Mapping[str, Layout]) -> tuple[int, int]:
    """Tiles downwards and to the right with which there is the least to do: vectors of pixels, with a border of one.

    Args:
        steps: of a region without gradients, whose norms are constants.
        layouts: of its values, as whole images.
    """
    lanes = next(iter(layouts.values())).lanes
    powers = [1 << n for n in range(lanes.bit_length())]
    grids = [(down, right) for down, right in itertools.product(powers, powers) if down * right <= lanes]

    def work(grid: tuple[int, int]) -> int:
        cut = [layout.cut(grid) for layout in layouts.values()]
        return sum(each.groups * each.channels * (each.height + 2) * (each.width + 2) for each in cut)

    return min((grid for grid in grids if _fits(steps, layouts, grid)), key=work)


def _fits(steps: Sequence[FusedStep], layouts: Mapping[str, Layout], grid: tuple[int, int]) -> bool:
    """Are all tiles alike, and does each need nothing but what lies in it and in those around it?"""
    for axis, n in enumerate(grid):
        if n > 1 and not all(_fits_along(step, layouts, axis, n) for step in steps):
            return False
    return True


def _fits_along(step: FusedStep, layouts: Mapping[str, Layout], axis: int, n: int) -> bool:
    source = layouts[step.x].plane[axis]
    if source % n:
        return False
    if isinstance(step, GlobalPoolStep):
        return True
    if isinstance(step, ConvStep):
        geometry = step.geometry
        stride, before = geometry.stride, geometry.padding[axis]
        behind = geometry.spans[axis] - stride - before
    elif isinstance(step, PoolStep):
        kernel, strides, padding = (pair[axis] for pair in step.window)
        stride, before, behind = strides, padding, kernel - strides - padding
        if before > 0 or behind > 0:  # pooling reads no other tile
            return False
    else:
        return True
    here = source // n
    return here % stride == 0 and layouts[step.y].plane[axis] * stride == source and max(before, behind) <= here

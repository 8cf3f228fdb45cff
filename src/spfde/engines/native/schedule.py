"""What the ways forward and back have in common."""

from __future__ import annotations

from collections.abc import Sequence

from spfde.engines.native.fusion import PointStep
from spfde.engines.native.kernels import SCALE, SHIFT, KernelTape
from spfde.engines.native.layout import Layout
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.region_plan import RegionPlan
from spfde.engines.native.tape import Place

TABLE = "table of norms"  # under which a tape is given it; no value has such a name


class Schedule:
    """A way through the steps of a region, written down as jobs for kernels.

    Args:
        plan: of the region.
        weights: the lists of the convolutions.
        tape: to write on. The table of the region's norms, [5, channels], is given under ``TABLE``.
    """

    def __init__(self, plan: RegionPlan, weights: PackedWeights, tape: KernelTape) -> None:
        self.plan, self.weights, self.tape = plan, weights, tape

    def in_table(self, row: int, step: PointStep) -> Place:
        """Where a row of the table has the numbers of the step's norm."""
        plan = self.plan
        at = row * plan.n_channels + plan.slices[step.z].start
        return self.tape.numbers_after(self.tape.given(TABLE), at)

    def constants_of(self, step: PointStep) -> tuple[Place | None, Place | None]:
        """Scale and shift that the step's norm came to; None for no norm."""
        return (None, None) if step.norm is None else (self.in_table(SCALE, step), self.in_table(SHIFT, step))

    def pack(self, tensor: Place, strides: Sequence[int], buffer: Place, layout: Layout) -> None:
        """Fill a buffer from a tensor."""
        if self.plan.region.is_tokens:
            self.tape.pack_tokens(tensor, self.plan.n_tokens, buffer, layout)
        else:
            self.tape.pack(tensor, strides, buffer, layout)

    def unpack(self, buffer: Place, layout: Layout, tensor: Place) -> None:
        """Fill a contiguous tensor from a buffer."""
        if self.plan.region.is_tokens:
            self.tape.unpack_tokens(buffer, layout, tensor, self.plan.n_tokens)
        else:
            channels, plane = layout.channels, layout.height * layout.width
            self.tape.unpack(buffer, layout, tensor, (channels * plane, plane, layout.width, 1))

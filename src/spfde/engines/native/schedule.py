"""What the schedules of the forward and of the backward pass have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spfde.engines.native.fusion import PointStep
from spfde.engines.native.kernels import KernelTape
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.region_plan import RegionPlan
from spfde.engines.native.tape import Buffer, Place

TABLE = "table of norms"  # under which a tape is given it; no value has such a name


@dataclass(frozen=True)
class Given:
    """How a tensor lies that a tape is given."""

    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Given:
        return cls(tensor.stride(), tensor.dtype)


class Schedule(ABC):
    """The kernels that one pass through a region runs, in their order, as they are written on a tape.

    Args:
        plan: of the region.
        weights: the lists of the convolutions.
        tape: to write on. The table of the region's norms, [5, channels], is given under ``TABLE``.
    """

    def __init__(self, plan: RegionPlan, weights: PackedWeights, tape: KernelTape) -> None:
        self.plan, self.weights, self.tape = plan, weights, tape

    @abstractmethod
    def write(self, coming: Sequence[Given | None]) -> Sequence[Place]:
        """Write everything down.

        Args:
            coming: the region's inputs, or the gradients of its outputs; None: not there.

        Returns:
            buffers that are wanted afterwards.
        """

    def in_table(self, row: int, step: PointStep) -> Place:
        """Where a row of the table has the numbers of the step's norm."""
        plan = self.plan
        at = row * plan.n_channels + plan.slices[step.y].start
        return self.tape.numbers_after(self.tape.given(TABLE), at)

    def constants_of(self, step: PointStep, *rows: int) -> list[Place | None]:
        """The same for several rows; None for no norm."""
        return [None if step.norm is None else self.in_table(row, step) for row in rows]

    def pack(self, tensor: Place, given: Given, buffer: Buffer) -> None:
        """Fill a buffer from a tensor."""
        if self.plan.region.is_tokens:
            self.tape.copy_tokens("pack", tensor, given.dtype, self.plan.n_tokens, buffer)
        else:
            self.tape.copy("pack", tensor, given.dtype, given.strides, buffer)

    def unpack(self, buffer: Buffer, tensor: Place, dtype: torch.dtype) -> None:
        """Fill a contiguous tensor from a buffer."""
        if self.plan.region.is_tokens:
            self.tape.copy_tokens("unpack", tensor, dtype, self.plan.n_tokens, buffer)
        else:
            height, width = buffer.layout.plane
            strides = (buffer.layout.channels * height * width, height * width, width, 1)
            self.tape.copy("unpack", tensor, dtype, strides, buffer)

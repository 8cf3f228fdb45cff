"""What exists or not as a whole: single weights, blocks, N:M groups, kernels, patterns, channels.

A structure cuts a weight into units. Methods score units, choose among them, drop and grow them; the structure turns
them into a mask of weights. A weight has the shape (out, in, \\*kernel), that of ``nn.Linear`` (out, in); a transposed
convolution's first dimension is its input. Flat indices are row-major whatever the memory format.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spfde.core.numbers import round_half_up
from spfde.core.registry import register, registered
from spfde.core.technique import Technique
from spfde.sparsity.masks import highest
from spfde.sparsity.units import PATTERNS, Norm, finite, highest_of_each, pattern_scores, pool

Count = Annotated[int, Field(ge=1)]


class Structure(Technique):
    """How a weight is cut into units; the base is a row-major cut into units of equal size.

    Attributes:
        name: what it is called in recipes, as its ``kind``.
        fixed_count: whether the sparsity fixes the number of units at every moment, so that a method cannot hold more
            for a while.

    Example:
        >>> spfde.Block(rows=4).n_units((8, 3)), spfde.Block(rows=4).unit_size((8, 3))
        (6, 4)
    """

    summary: ClassVar[str]
    fixed_count: ClassVar[bool] = False

    @abstractmethod
    def n_units(self, shape: Sequence[int]) -> int:
        """Number of units in a weight of ``shape``."""

    def unit_size(self, shape: Sequence[int]) -> int:
        """Number of active weights in a unit that exists."""
        return math.prod(shape) // self.n_units(shape)

    def problem(self, shape: Sequence[int], sparsity: float) -> str | None:
        """The rule that a weight of ``shape`` at ``sparsity`` breaks, as a clause; None when it breaks none."""
        return None

    def target_units(self, shape: Sequence[int], sparsity: float) -> int:
        """Number of units that exist at ``sparsity``: rounded half up, at least one.

        The active weights are exactly that many times :meth:`unit_size`.
        """
        wanted = round_half_up((1.0 - sparsity) * math.prod(shape) / self.unit_size(shape))
        return min(max(1, wanted), self.n_units(shape))

    def reduce(self, values: Tensor, norm: Norm = "l2") -> Tensor:
        """Scores of units (n_units,) from scores of weights, which have the weight's shape.

        Args:
            values: of any real type; for "l2" not negative.
            norm: "l2" (the norm of a unit's scores) or "sum". A unit of one weight has that weight's score.
        """
        return pool(self._cut(values.detach()), norm)

    def units_of(self, mask: Tensor) -> Tensor:
        """The units (n_units,) that exist in a mask."""
        return self._cut(mask).any(1)

    def expand(
        self,
        units: Tensor,
        shape: Sequence[int],
        *,
        previous: Tensor | None = None,
        score: Tensor | None = None,
        generator: torch.Generator | None = None,
        norm: Norm = "l2",
    ) -> Tensor:
        """The mask of ``shape`` in which exactly ``units`` exist, on their device.

        Args:
            units: boolean, (n_units,).
            shape: of the weight.
            previous: the mask before, of which patterns that still exist are kept.
            score: scores of weights by which new kernels get their patterns.
            generator: for random patterns where there is no score.
            norm: as in :meth:`reduce`.
        """
        return self._spread(units, shape)

    def choose(self, score: Tensor, n: int) -> Tensor:
        """The ``n`` units of the highest scores, (n_units,); of equal ones the lower index wins; NaN ranks lowest."""
        return highest(score, n)

    def drop(self, units: Tensor, score: Tensor, n_keep: int) -> Tensor:
        """The ``n_keep`` units of the highest scores among ``units``."""
        return highest(score, n_keep, among=units)

    def grow(self, units: Tensor, score: Tensor, n_final: int) -> Tensor:
        """``units`` and, of those that do not exist, the highest scores, ``n_final`` in all.

        What was dropped just before may come back.
        """
        return units | highest(score, n_final - int(units.sum()), among=~units)

    def _cut(self, values: Tensor) -> Tensor:
        """The weights of each unit as a row: (n_units, weights in it)."""
        return values.reshape(self.n_units(values.shape), -1)

    def _spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """A value of each unit given to all its weights."""
        return units.repeat_interleave(self.unit_size(shape)).view(*shape)


@register("structure")
class Unstructured(Structure):
    """Every weight for itself.

    Example:
        >>> spfde.Unstructured().target_units((8, 4), sparsity=0.9)
        3
    """

    name: ClassVar[str] = "unstructured"
    summary: ClassVar[str] = "Every weight for itself."
    references: ClassVar[tuple[str, ...]] = ("han2015learning",)

    def n_units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)


@register("structure")
class NM(Structure):
    """N:M: of every ``m`` consecutive weights of an output exactly ``n`` exist.

    Groups run along the input of ``nn.Linear``, which is what PyTorch's semi-structured tensors take at 2:4, and along
    the flattened (in * kernel) row of a convolution. The sparsity is 1 - n/m throughout: a mutation drops anywhere and
    growth fills each group up again.

    Attributes:
        n: active weights in a group.
        m: weights in a group.

    Example:
        >>> spfde.NM(n=2, m=4).problem((8, 6), sparsity=0.5)
        'must have a number of weights per output that 4 divides; it has 6'
    """

    name: ClassVar[str] = "nm"
    summary: ClassVar[str] = "Exactly n of every m consecutive weights, such as 2:4."
    references: ClassVar[tuple[str, ...]] = ("zhou2021nm",)
    fixed_count: ClassVar[bool] = True

    n: Count = Field(default=2, description="a number of weights, at least 1 and below m")
    m: Annotated[int, Field(ge=2, le=1024)] = Field(default=4, description="a number of weights from 2 to 1024")

    @model_validator(mode="after")
    def _fewer_than_all(self) -> NM:
        if self.n >= self.m:
            raise ValueError(f"n must be below m; {self.n} of {self.m} leaves nothing out")
        return self

    def n_units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def problem(self, shape: Sequence[int], sparsity: float) -> str | None:
        columns = math.prod(shape[1:])
        if columns % self.m:
            return f"must have a number of weights per output that {self.m} divides; it has {columns}"
        if abs(sparsity - (1.0 - self.n / self.m)) > 1e-6:
            return f"must have sparsity {1.0 - self.n / self.m:.6g}, which {self.n}:{self.m} fixes; it has {sparsity}"
        return None

    def target_units(self, shape: Sequence[int], sparsity: float) -> int:
        return math.prod(shape) // self.m * self.n

    def choose(self, score: Tensor, n: int) -> Tensor:
        """The best of each group, ``n`` in all, which must be what :meth:`target_units` says."""
        return self._best_of_each_group(finite(score), n)

    def grow(self, units: Tensor, score: Tensor, n_final: int) -> Tensor:
        """Fills each group up to ``n`` by the highest scores; no group of ``units`` may have more."""
        grown = self._best_of_each_group(finite(score).masked_fill(units, math.inf), n_final)
        assert not bool((units & ~grown).any()), f"a group has more than {self.n} active weights"
        return grown

    def _best_of_each_group(self, score: Tensor, n: int) -> Tensor:
        assert n * self.m == len(score) * self.n, f"{self.n}:{self.m} of {len(score)} weights cannot be {n}"
        return highest_of_each(score.view(-1, self.m), self.n).view(-1)


@register("structure")
class Kernels(Structure):
    """Whole kernels: what one output sees of one input. A 1x1 kernel, and one of ``nn.Linear``, is a single weight.

    Example:
        >>> spfde.Kernels().n_units((16, 8, 3, 3)), spfde.Kernels().unit_size((16, 8, 3, 3))
        (128, 9)
    """

    name: ClassVar[str] = "kernel"
    summary: ClassVar[str] = "Whole kernels: what an output sees of an input."
    references: ClassVar[tuple[str, ...]] = ("ma2020pconv",)

    def n_units(self, shape: Sequence[int]) -> int:
        return shape[0] * shape[1]


@register("structure")
class Patterns(Structure):
    """3x3 kernels of which each has one of eight patterns, or does not exist at all.

    A pattern keeps four weights, the centre and three neighbours. A kernel keeps its pattern as long as it exists; a
    new one gets the pattern that keeps most of its scores, or a random one. Kernels are scored by their best pattern.

    Departures, from the code of MEST as its fork neu-spiral/SparCL has it: one of its eight patterns leaves the centre
    out, in place of which the upward T completes four squares and four Ts; and it keeps the same number of kernels in
    every filter, where here the layer's kernels compete.

    Example:
        >>> spfde.Patterns().unit_size((16, 8, 3, 3))  # of the nine weights of a kernel that exists
        4
    """

    name: ClassVar[str] = "pattern"
    summary: ClassVar[str] = "3x3 kernels with one of eight patterns of four weights, or none."
    references: ClassVar[tuple[str, ...]] = ("niu2020patdnn",)

    def n_units(self, shape: Sequence[int]) -> int:
        return shape[0] * shape[1]

    def unit_size(self, shape: Sequence[int]) -> int:
        return len(PATTERNS[0])

    def problem(self, shape: Sequence[int], sparsity: float) -> str | None:
        if tuple(shape[2:]) != (3, 3):
            found = "x".join(str(side) for side in shape[2:]) or "none"
            return f"must have 3x3 kernels, which patterns are made for; it has {found}"
        if sparsity < 5 / 9 - 1e-6:
            return f"must have a sparsity of at least 5/9, for a pattern keeps 4 of 9 weights; it has {sparsity}"
        return None

    def reduce(self, values: Tensor, norm: Norm = "l2") -> Tensor:
        return pattern_scores(self._cut(values), norm).amax(1)

    def expand(
        self,
        units: Tensor,
        shape: Sequence[int],
        *,
        previous: Tensor | None = None,
        score: Tensor | None = None,
        generator: torch.Generator | None = None,
        norm: Norm = "l2",
    ) -> Tensor:
        kernels = torch.zeros(len(units), 9, dtype=torch.bool, device=units.device)
        new = units
        if previous is not None:
            before = self._cut(previous)
            kernels = before & units.unsqueeze(1)
            new = units & ~before.any(1)
        rows = new.nonzero().squeeze(1)
        if score is not None:
            best = pattern_scores(self._cut(score)[rows], norm).argmax(1)
        else:
            assert generator is not None, "random patterns need a generator"
            best = torch.randint(len(PATTERNS), (len(rows),), generator=generator).to(units.device)
        kernels[rows.unsqueeze(1), torch.tensor(PATTERNS, device=units.device)[best]] = True
        return kernels.view(*shape)


@register("structure")
class Channels(Structure):
    """Whole output channels: filters of a convolution, rows of ``nn.Linear``.

    Example:
        >>> spfde.Channels().target_units((16, 8, 3, 3), sparsity=0.75)
        4
    """

    name: ClassVar[str] = "channel"
    summary: ClassVar[str] = "Whole output channels."
    references: ClassVar[tuple[str, ...]] = ("li2017filters",)

    def n_units(self, shape: Sequence[int]) -> int:
        return shape[0]


STRUCTURES = cast("Mapping[str, type[Structure]]", registered("structure"))
"""Structures by name."""

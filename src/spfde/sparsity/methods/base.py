"""What all sparse training methods share: plain data and pure rules. They say what to do; the masker does it.

A method answers four questions: how many weights a layer drops and holds at a given progress of the run, which score
decides what is dropped, which rule decides what grows, and which gradients these need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spfde.rounding import round_half_up
from spfde.schedules import latest_beat
from spfde.sparsity import mutation
from spfde.sparsity.distribution import active_count, erk, uniform
from spfde.technique import Technique

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Patterns = tuple[str, ...]


class SparsityMethod(Technique):
    """What all methods share: how sparse, which layers, and how the first mask is drawn.

    Attributes:
        sparsity: share of inactive weights in the masked layers, in [0, 1).
        distribution: "uniform" (every layer alike, as SpFDE and MEST) or "erk" (small layers denser, as RigL).
        include: name patterns (``fnmatch``) of the weights to mask; empty: all that can be.
        exclude: name patterns of weights that stay dense, such as ``"*.downsample.*"``.
        overrides: sparsity by name pattern; the last pattern that matches wins.
        dense_first: the first layer in order of execution stays dense.
        dense_head: the classifier head stays dense.
        init: "random" (uniform per layer, SpFDE's random sparse structure) or "magnitude" (the largest initial
            weights, as MEST's released code; the choice for a pretrained model).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    bibtex: ClassVar[str]

    sparsity: Sparsity = Field(description="a number in [0, 1), the share of inactive weights")
    distribution: Literal["uniform", "erk"] = "uniform"
    include: Patterns = ()
    exclude: Patterns = ()
    overrides: dict[str, Sparsity] = Field(default_factory=dict, description="name patterns with numbers in [0, 1)")
    dense_first: bool = True
    dense_head: bool = True
    init: Literal["random", "magnitude"] = "random"

    @property
    def gradients(self) -> Literal["none", "active", "dense"]:
        """Which gradients a mutation needs: none, those of the active weights, or those of all weights."""
        return "none"

    def drop_fraction_at(self, progress: float) -> float:
        """Share of the target's active weights that a mutation drops and grows again; progress runs from 0 to 1."""
        return 0.0

    def excess_at(self, progress: float) -> float:
        """Soft bound: density above the target, in share of all weights of the layer."""
        return 0.0

    def drop_score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """Score by which active weights are kept, highest first; of the weight's shape."""
        return mutation.magnitude(weight)

    def grow(self, mask: Tensor, n_final: int, *, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        """A mask of ``n_final`` active weights that contains ``mask``."""
        return mutation.grow_random(mask, n_final, generator)

    def counts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The target: active weights per layer, by the method's distribution and overrides."""
        distribute = uniform if self.distribution == "uniform" else erk
        return distribute(shapes, self.sparsity, overrides=self.overrides)


def planned_active(method: SparsityMethod, target: int, numel: int, *, epoch: int, interval: int, epochs: int) -> int:
    """Number of active weights of an unfrozen layer during ``epoch``: its target and, on top, the soft bound.

    Args:
        target: the layer's count by the distribution.
        numel: all weights of the layer.
        interval: epochs between two beats.
        epochs: length of the run; its last epoch is at target.
    """
    if target == numel or epoch >= epochs - 1:
        return target
    excess = method.excess_at(latest_beat(epoch, interval) / epochs)
    return min(numel, target + round_half_up(excess * numel))


def planned_keep(method: SparsityMethod, target: int, numel: int, *, epoch: int, epochs: int) -> int:
    """Number of active weights that survive the mutation of the beat ``epoch``, before anything grows.

    At epoch 0 and in the last epoch nothing below the target is dropped.
    """
    if target == numel or epoch == 0 or epoch >= epochs - 1:
        return target
    return active_count(target, method.drop_fraction_at(epoch / epochs))

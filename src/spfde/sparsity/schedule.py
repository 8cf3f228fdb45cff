"""What happens to the masks in an epoch, in counts. ``planning.timeline`` works it out; the masker carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DenseGradients = Literal["none", "one step", "every step"]


@dataclass(frozen=True)
class LayerPlan:
    """A masked layer in one epoch. Counts are of units: of unstructured masks a unit is a weight.

    Attributes:
        target: active units without a soft bound.
        survive: active units that the mutation at the top of the epoch leaves, before anything grows.
        active: active units while the epoch runs; their mean over its steps where every step may change them.
        gradient: units whose gradient each step computes.
        frozen: whether the layer's block is frozen.
        mutates: whether the mask may change at the top of the epoch.
        to_target: whether it comes to its target at the top of this epoch: at the last mutation before its block is
            frozen for good, in the first epoch in which it is, and in the last epoch.
    """

    target: int
    survive: int
    active: float
    gradient: float
    frozen: bool = False
    mutates: bool = False
    to_target: bool = False


@dataclass(frozen=True)
class MaskPlan:
    """All masked layers in one epoch.

    Attributes:
        epoch: from 0.
        progress: of the run, from 0 to 1, at the top of the epoch.
        update: whether it is an update epoch.
        last: whether it is the run's last epoch: masks are pruned to their target and stay.
        dense_gradients: in which steps gradients of inactive weights are computed.
        layers: by name, in order of execution.
    """

    epoch: int
    progress: float
    update: bool
    last: bool
    dense_gradients: DenseGradients
    layers: Mapping[str, LayerPlan]

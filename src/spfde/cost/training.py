"""Training FLOPs of an epoch under sparsity, freezing and sieving. The convention is in ``spfde.cost``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class EpochCost:
    """Modelled FLOPs of an epoch, and where the savings against dense training come from.

    Always ``dense_training_flops - saved_by_sparsity - saved_by_freezing - saved_by_sieving + dense_gradient_flops +
    overhead_flops == training_flops``, exactly. The savings overlap, so their order matters: sparsity is credited
    against the dense net, freezing against the sparse net, sieving against the sparse and frozen net.

    Attributes:
        training_flops: what the epoch costs.
        dense_training_flops: what it would cost with all weights, all layers and all samples.
        saved_by_sparsity: backward and forward of the inactive weights, over the whole population.
        saved_by_freezing: the sparse backward pass of frozen layers, over the whole population.
        saved_by_sieving: the samples that were not seen; negative if more were seen than the population holds.
        dense_gradient_flops: what weight gradients of inactive weights cost on top (RigL).
        overhead_flops: what a technique computes beside the training steps: scores for pruning at initialisation,
            probes that tell whether a block has converged.

    Example:
        >>> cost = spfde.plan(model, torch.zeros(1, 4), spfde.presets.static, epochs=1, samples=20).cost
        >>> cost.dense_training_flops - cost.saved_by_sparsity == cost.training_flops
        True
    """

    training_flops: int
    dense_training_flops: int
    saved_by_sparsity: int
    saved_by_freezing: int
    saved_by_sieving: int
    dense_gradient_flops: int = 0
    overhead_flops: int = 0

    def __add__(self, other: EpochCost) -> EpochCost:
        return EpochCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(EpochCost)))


def total_cost(epochs: Iterable[EpochCost]) -> EpochCost:
    """The sum over epochs; zero for none."""
    return sum(epochs, EpochCost(0, 0, 0, 0, 0))


def epoch_cost(
    forward: Sequence[int],
    density: Sequence[float],
    frozen: Sequence[bool],
    *,
    samples: int,
    population: int,
    dense_gradient_samples: int = 0,
    gradient_density: Sequence[float] | None = None,
    overhead_flops: int = 0,
) -> EpochCost:
    """FLOPs of one epoch: 3x the sparse forward pass for active layers, 1x for frozen ones, as SpFDE counts them.

    Args:
        forward: dense forward FLOPs of one sample, per layer, in order of execution.
        density: share of active weights, per layer; 1 for a product without weights.
        frozen: whether the layer is frozen, per layer. A frozen layer is charged its forward pass alone, which is
            true of a frozen *front*; behind a trained layer the gradient of its input would still be needed.
        samples: samples trained on in this epoch.
        population: samples that the dense run would train on in an epoch. Where the loader drops a partial batch, that
            batch belongs to neither number.
        dense_gradient_samples: samples whose backward pass also computed the gradients of inactive weights of unfrozen
            layers (RigL: one step of an update interval; SNFS: every step).
        gradient_density: share of the weights whose gradient these samples computed, per layer; None: all.
        overhead_flops: computed beside the training steps.
    """
    reach = (1.0,) * len(forward) if gradient_density is None else gradient_density
    never = (False,) * len(forward)
    dense = 3 * sum(forward) * population
    sparse = _training_flops(forward, density, never, population)
    with_freezing = _training_flops(forward, density, frozen, population)
    with_sieving = _training_flops(forward, density, frozen, samples)
    extra = sum(
        share(dense_gradient_samples * f, max(wide, d)) - share(dense_gradient_samples * f, d)
        for f, d, wide, is_frozen in zip(forward, density, reach, frozen, strict=True)
        if not is_frozen
    )
    return EpochCost(
        training_flops=with_sieving + extra + overhead_flops,
        dense_training_flops=dense,
        saved_by_sparsity=dense - sparse,
        saved_by_freezing=sparse - with_freezing,
        saved_by_sieving=with_freezing - with_sieving,
        dense_gradient_flops=extra,
        overhead_flops=overhead_flops,
    )


def share(amount: int, density: float) -> int:
    """``density * amount`` in integers, rounded half up; exact for any size of ``amount``."""
    numerator, denominator = density.as_integer_ratio()
    return (2 * amount * numerator + denominator) // (2 * denominator)


def _training_flops(forward: Sequence[int], density: Sequence[float], frozen: Sequence[bool], samples: int) -> int:
    return sum(
        (1 if is_frozen else 3) * share(samples * f, d)
        for f, d, is_frozen in zip(forward, density, frozen, strict=True)
    )

"""Training FLOPs of an epoch under sparsity, freezing and sieving. The convention is in ``spfde.cost``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction


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
    backward: tuple[Sequence[Fraction], Sequence[Fraction]] | None = None,
    computed: Sequence[int] | None = None,
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
        backward: what a layer's backward pass costs in forward passes, per layer: without any frozen block, and in
            this epoch. None: 2, and 0 where ``frozen``.
        computed: dense forward FLOPs of all samples, per layer, where samples are not alike; None: ``samples`` times
            ``forward``. The dense run's samples are taken to be like them.
    """
    reach = (1.0,) * len(forward) if gradient_density is None else gradient_density
    if backward is None:
        backward = [Fraction(2)] * len(forward), [Fraction(0 if is_frozen else 2) for is_frozen in frozen]
    seen = [samples * flops for flops in forward] if computed is None else computed
    whole = [population * flops for flops in forward] if computed is None else _scaled(seen, population, samples)
    wide_part = [dense_gradient_samples * flops for flops in forward]
    if computed is not None:
        wide_part = _scaled(seen, dense_gradient_samples, samples)
    never, now = backward
    dense = _training_flops(whole, (1.0,) * len(whole), never)
    sparse = _training_flops(whole, density, never)
    with_freezing = _training_flops(whole, density, now)
    with_sieving = _training_flops(seen, density, now)
    extra = sum(
        share(amount, max(wide, d)) - share(amount, d)
        for amount, d, wide, is_frozen in zip(wide_part, density, reach, frozen, strict=True)
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


def _scaled(amounts: Sequence[int], to: int, of: int) -> list[int]:
    """Amounts that belong to ``of`` samples, for ``to`` samples; rounded half up."""
    return [(2 * amount * to + of) // (2 * of) if of else 0 for amount in amounts]


def share(amount: int, density: float) -> int:
    """``density * amount`` in integers, rounded half up; exact for any size of ``amount``."""
    numerator, denominator = density.as_integer_ratio()
    return (2 * amount * numerator + denominator) // (2 * denominator)


def _training_flops(forward: Sequence[int], density: Sequence[float], backward: Sequence[Fraction]) -> int:
    """Forward and backward passes, of the dense forward FLOPs of each layer."""
    total = 0
    for flops, d, factor in zip(forward, density, backward, strict=True):
        sparse = share(flops, d)
        total += sparse + (2 * sparse * factor.numerator + factor.denominator) // (2 * factor.denominator)
    return total

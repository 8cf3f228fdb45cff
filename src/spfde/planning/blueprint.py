"""What a recipe means for one model and one run length: layers, blocks, counts, freeze plan. It only reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from spfde.core.errors import InvalidArgument, Problem
from spfde.cost.flops import ModelCost, model_cost
from spfde.freezing import ProgressiveFreezing, Savings
from spfde.freezing.plan import FreezePlan, blocks_to_freeze
from spfde.freezing.schemes import solve
from spfde.model.blocks import Partition, find_blocks
from spfde.model.sample import Sample, unwrap
from spfde.model.trace import trace
from spfde.planning.timeline import Row, Timeline
from spfde.recipe import Recipe
from spfde.sparsity import SparsityMethod
from spfde.sparsity.layers import select_layers


@dataclass(frozen=True)
class MaskedLayer:
    """Sizes of a masked layer; counts are of units.

    Attributes:
        target: active units by the distribution.
        n_units: all units.
        unit_size: weights of a unit.
        block: index of its block; the head's is the number of blocks.
    """

    target: int
    n_units: int
    unit_size: int
    block: int


@dataclass(frozen=True)
class Blueprint:
    """What a recipe means for one model and one run length.

    Attributes:
        cost: FLOPs and sizes of each layer, dense, per sample, in order of execution.
        partition: the blocks in order of execution, and the head, which is never frozen.
        sparse_layers: the masked parameters by name.
        target: active weights of each masked parameter, by name.
        interval: Δτ in epochs.
        freeze_plan: when each block is frozen.
        block_of_layer: index of the block of each layer in ``cost.layers``; the head has index ``len(blocks)``.
    """

    method: SparsityMethod | None
    epochs: int
    cost: ModelCost
    partition: Partition
    sparse_layers: Mapping[str, nn.Parameter]
    target: Mapping[str, int]
    interval: int
    freeze_plan: FreezePlan
    block_of_layer: tuple[int, ...]

    @cached_property
    def masked(self) -> Mapping[str, MaskedLayer]:
        """Sizes of each masked layer, by name, in order of execution."""
        if self.method is None:
            return {}
        block_of = {layer.name: block for layer, block in zip(self.cost.layers, self.block_of_layer, strict=True)}
        sizes = {}
        for name, weight in self.sparse_layers.items():
            shape, count = tuple(weight.shape), self.target[name]
            structure = self.method.structure_of(1.0 - count / weight.numel())
            size = structure.unit_size(shape)
            sizes[name] = MaskedLayer(count // size, structure.n_units(shape), size, block_of[name])
        return sizes

    @property
    def shortfall(self) -> str | None:
        """A line where less is frozen than the recipe's preset asks for; None where the reduction is met."""
        plan = self.freeze_plan
        if plan.reduction >= plan.asked - 1e-9:
            return None
        found = f"{plan.reduction:.1%} is frozen" if any(plan.frozen) else "nothing is frozen"
        reason = (
            f" ({self.partition.reason})"
            if not self.partition.blocks
            else f" in {self.epochs} {'epoch' if self.epochs == 1 else 'epochs'}"
        )
        return f"freezing saves {plan.asked:.0%} of the training FLOPs where that can be reached; here{reason} {found}"

    @property
    def learning_stops(self) -> tuple[int, ...]:
        """For each block, and at last the head, the epoch in which its learning rate has come to its end."""
        return (*self.freeze_plan.learning_stops, self.epochs)

    def density(self, row: Row) -> list[float]:
        """Density of each layer in ``cost.layers`` in an epoch of the timeline, the soft bound included."""
        return self._shares({name: own.active for name, own in row.layers.items()})

    def gradient_density(self, row: Row) -> list[float]:
        """Density of the weight gradient that each step computes, for each layer in ``cost.layers``."""
        return self._shares({name: own.gradient for name, own in row.layers.items()})

    def frozen_layers(self, row: Row) -> list[bool]:
        """For each layer in ``cost.layers``: is it frozen?"""
        return [block < row.frozen_blocks for block in self.block_of_layer]

    def target_density(self) -> list[float]:
        """Density of each layer in ``cost.layers`` at the target, without a soft bound."""
        return self._shares({name: layer.target for name, layer in self.masked.items()})

    def _shares(self, units: Mapping[str, float]) -> list[float]:
        """For each layer in ``cost.layers`` the share of its weights in so many units of it; 1 where none are named."""
        sizes = self.masked
        return [
            units[layer.name] * sizes[layer.name].unit_size / layer.numel if layer.name in units else 1.0
            for layer in self.cost.layers
        ]


def draw(model: nn.Module, sample: Sample, recipe: Recipe, epochs: int) -> Blueprint:
    """Work out what ``recipe`` means for ``model`` over ``epochs``.

    Raises:
        InvalidArgument: the model cannot be traced with the sample, has no prunable layers or no block to freeze, the
            interval is longer than the run, or the FLOPs reduction cannot be reached (the most possible is named).
    """
    check_epochs(epochs)
    interval = recipe.interval(epochs)
    if recipe.sieving is not None:
        recipe.sieving.check_length(epochs, interval)
    model = unwrap(model)
    traced = trace(model, sample)
    cost = model_cost(traced, model)
    partition = find_blocks(model, traced, blocks=recipe.freezing.blocks if recipe.freezing is not None else None)
    method = recipe.sparsity if recipe.is_sparse else None
    layers: Mapping[str, nn.Parameter] = {}
    target: Mapping[str, int] = {}
    if method is not None:
        weights = [layer.name for layer in cost.layers if layer.weighted]
        layers = select_layers(model, method, order=weights, head=weights[-1:])
        target = method.counts({name: tuple(p.shape) for name, p in layers.items()})
    unfrozen = FreezePlan(len(partition.blocks), (0,) * epochs, reduction=0.0)
    blueprint = Blueprint(
        method=method,
        epochs=epochs,
        cost=cost,
        partition=partition,
        sparse_layers=layers,
        target=target,
        interval=interval,
        freeze_plan=unfrozen,
        # In no block is the head.
        block_of_layer=tuple(sum(block.stop <= layer.position for block in partition.blocks) for layer in cost.layers),
    )
    if recipe.freezing is None or not recipe.freezes:
        return blueprint
    return _with_freeze_plan(blueprint, recipe, recipe.freezing)


def _with_freeze_plan(blueprint: Blueprint, recipe: Recipe, technique: ProgressiveFreezing) -> Blueprint:
    blocks, epochs = blueprint.partition.blocks, blueprint.epochs
    if not blocks:
        if technique.as_far_as_possible:
            return replace(blueprint, freeze_plan=replace(blueprint.freeze_plan, asked=technique.flops_reduction))
        raise InvalidArgument(
            Problem(
                "freezing",
                technique,
                f"the model has no block that can be frozen ({blueprint.partition.reason})",
                "Train it without freezing, or name the blocks with ProgressiveFreezing(blocks=...).",
            )
        )
    if technique.criterion == "structure" and blueprint.method is None:
        remedy = "Use criterion='representation', or a sparse recipe."
        rule = "compares masks, and the recipe has no sparsity"
        raise InvalidArgument(Problem("criterion", technique.criterion, rule, remedy))
    forward = [layer.forward_flops for layer in blueprint.cost.layers]
    backward = [[0.0] * epochs for _ in blocks]
    total = 0.0
    for row in Timeline(blueprint, recipe, samples=1):
        for flops, share, block in zip(forward, blueprint.density(row), blueprint.block_of_layer, strict=True):
            total += 3 * flops * share
            if block < len(blocks):
                backward[block][row.epoch] += 2 * flops * share
    sizes = [block.n_layers for block in blocks]
    n_blocks = blocks_to_freeze(sizes, sum(sizes) + blueprint.partition.head.n_layers, technique.fraction)
    savings = Savings(backward, total, technique.flops_reduction, blueprint.interval, n_blocks)
    solved = solve(
        savings,
        scheme=technique.scheme,
        start_epoch=technique.start_epoch,
        resume_epochs=technique.resume_epochs,
        as_far_as_possible=technique.as_far_as_possible,
    )
    return replace(blueprint, freeze_plan=solved)


def check_recipe(recipe: object) -> None:
    """Raise ``InvalidArgument`` where something else stands in a recipe's place."""
    if not isinstance(recipe, Recipe):
        raise InvalidArgument(
            Problem("recipe", recipe, "must be a spfde.Recipe", "Take one of spfde.presets or make one.")
        )


def check_epochs(epochs: object) -> None:
    """Raise ``InvalidArgument`` for anything but a whole number from 1 on."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InvalidArgument(Problem("epochs", epochs, "must be a whole number from 1 on", "Pass the run's length."))

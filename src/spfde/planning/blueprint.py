"""What a recipe means for one model and one run length: layers, blocks, counts, freeze plan. It only reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.numbers import MOST_EPOCHS
from spfde.core.say import counted
from spfde.core.torch_private import tree_map_only
from spfde.cost.flops import LayerCost, ModelCost, model_cost
from spfde.freezing import ProgressiveFreezing, Savings
from spfde.freezing.plan import FreezePlan, blocks_to_freeze, delays
from spfde.freezing.schemes import solve
from spfde.model.blocks import Block, Partition, find_blocks
from spfde.model.sample import Sample, unwrap
from spfde.model.trace import Untraceable, trace
from spfde.planning.timeline import Row, Timeline
from spfde.recipe import Recipe
from spfde.sieving import DataSieving
from spfde.sparsity import SparsityMethod
from spfde.sparsity.layers import LeftDense, describe_left, left_dense, select_layers

LEFT_DENSE_AT_MOST = 0.1
"""What share of the weights that could be sparse may stay dense without a warning."""


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
        untraced: why the model could not be traced, as a clause; None where it was. Its FLOPs are not known then.
        left_dense: weights that could be sparse and stay dense, though the recipe does not say so.
        updating: modules that change buffers in training, found by tracing a forward pass; empty where nothing is
            frozen.
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
    untraced: str | None = None
    left_dense: tuple[LeftDense, ...] = ()
    updating: frozenset[str] = frozenset()

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
    def left_dense_warning(self) -> str | None:
        """A text where much of what could be sparse is dense, and not because the recipe says so."""
        left, masked = (
            sum(weight.numel for weight in self.left_dense),
            sum(p.numel() for p in self.sparse_layers.values()),
        )
        if left <= LEFT_DENSE_AT_MOST * (left + masked):
            return None
        share = f"{left / (left + masked):.0%} of those that could be sparse"
        return f"{left:,} weights ({share}) stay dense: {describe_left(self.left_dense)}."

    @property
    def shortfall(self) -> str | None:
        """A line where less is frozen than the recipe's preset asks for; None where the reduction is met."""
        plan = self.freeze_plan
        if plan.reduction >= plan.asked - 1e-9:
            return None
        found = f"{plan.reduction:.1%} is frozen" if any(plan.frozen) else "nothing is frozen"
        reason = f" ({self.partition.reason})" if not self.partition.blocks else f" in {counted(self.epochs, 'epoch')}"
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
        """For each layer in ``cost.layers``: has it no backward pass?"""
        return [factor == 0 for factor in self.backward(row.frozen_blocks)]

    def backward(self, frozen_blocks: int = 0) -> list[Fraction]:
        """What the backward pass of each layer in ``cost.layers`` costs, in forward passes.

        2 where its weight learns: the gradients of the input and of the weight. 1 where the weight was frozen by the
        user and something before it learns; 0 where nothing does, and in a frozen block.
        """
        return [
            Fraction(0)
            if block < frozen_blocks
            else Fraction(2)
            if layer.learns
            else Fraction(sum(flops for at, flops in self._input_gradients(layer) if at >= frozen_blocks))
            / (layer.forward_flops or 1)
            for layer, block in zip(self.cost.layers, self.block_of_layer, strict=True)
        ]

    def _input_gradients(self, layer: LayerCost) -> list[tuple[int, int]]:
        """The block up to which what learns before the layer must be frozen, and the FLOPs that this saves."""
        return [(_block_at(position, self.partition), flops) for position, flops in layer.input_gradients]

    def saved_by_block(self, index: int) -> list[tuple[int, int]]:
        """Blocks whose freezing ends the backward pass of a layer in ``cost.layers``, and FLOPs saved."""
        layer, own = self.cost.layers[index], self.block_of_layer[index]
        found = [(own, 2 * layer.forward_flops)] if layer.learns else self._input_gradients(layer)
        n_blocks = len(self.partition.blocks)
        return [(min(block, own), flops) for block, flops in found if min(block, own) < n_blocks]

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


def draw(
    model: nn.Module, sample: Sample | None, recipe: Recipe, epochs: int, *, refusal: Untraceable | None = None
) -> Blueprint:
    """Work out what ``recipe`` means for ``model`` over ``epochs``.

    Args:
        model: the model.
        sample: what it is called with; None where that is not known.
        recipe: the recipe.
        epochs: length of the run.
        refusal: why no sample is known.

    Raises:
        InvalidArgument: the model cannot be traced and the recipe needs it, it has no prunable layers or no block to
            freeze, the interval is longer than the run, or the FLOPs reduction cannot be reached (the most possible is
            named).
    """
    check_epochs(epochs)
    interval = recipe.interval(epochs)
    if recipe.sieving is not None:
        recipe.sieving.check_length(epochs, interval)
    model = unwrap(model)
    method = recipe.sparsity if recipe.is_sparse else None
    try:
        if sample is None:
            raise refusal or Untraceable(Problem("sample", None, "is not known", "Pass sample=."))
        traced = trace(model, sample)
    except Untraceable as error:
        return _untraced(model, recipe, epochs, interval, error)
    cost = model_cost(traced, model)
    by_layer, named = False, None
    if recipe.freezing is not None:
        by_layer, named = recipe.freezing.unit == "layer", recipe.freezing.blocks
    partition = find_blocks(model, traced, blocks=named, by_layer=by_layer)
    layers: Mapping[str, nn.Parameter] = {}
    dense: Sequence[LeftDense] = ()
    target: Mapping[str, int] = {}
    if method is not None:
        weights = [layer.name for layer in cost.layers if layer.weighted]
        found: dict[str, Any] = {
            "order": weights,
            "head": weights[-1:],
            "computed": cost.computed,
            "from_input": cost.from_input,
        }
        layers = select_layers(model, method, **found, inputs_first=cost.inputs_first)
        dense = left_dense(model, method, **found, selected=layers)
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
        block_of_layer=tuple(_block_at(layer.position, partition) for layer in cost.layers),
        left_dense=tuple(dense),
        updating=_updating(model, sample) if recipe.freezes else frozenset(),
    )
    if recipe.freezing is None or not recipe.freezes:
        return blueprint
    return _with_freeze_plan(blueprint, recipe, recipe.freezing)


def _untraced(model: nn.Module, recipe: Recipe, epochs: int, interval: int, error: Untraceable) -> Blueprint:
    """The blueprint of a model that cannot be traced, for recipes that can do without.

    Its FLOPs are not known. Weights to be masked are those that ``include`` names, in the model's own order.

    Raises:
        Untraceable: the recipe needs a trace.
    """
    method = recipe.sparsity if recipe.is_sparse else None
    needs = [
        *(["freezing"] if recipe.freezes else []),
        *(["sparsity without include"] if method is not None and not method.include else []),
    ]
    (problem,) = error.problems
    if needs:
        remedy = f"{problem.remedy} What needs it is {' and '.join(needs)}."
        if not recipe.freezes:
            remedy += " Name the weights to be masked in include, and no trace is needed."
        raise Untraceable(replace(problem, remedy=remedy)) from error
    layers: Mapping[str, nn.Parameter] = {}
    if method is not None:
        order = [name for name, p in model.named_parameters() if p.dim() >= 2]
        layers = select_layers(model, method, order=order, head=order[-1:])
    costs = (
        LayerCost(name, name.rpartition(".")[0], position, 0, p.numel(), 0)
        for position, (name, p) in enumerate(layers.items())
    )
    sizes = sum(p.numel() for p in model.parameters())
    head = Block("", (), (), 0, len(layers), len(layers))
    partition = Partition((), head, "it cannot be traced")
    return Blueprint(
        method=method,
        epochs=epochs,
        cost=ModelCost(tuple(costs), {type(model).__name__: 1}, sizes),
        partition=partition,
        sparse_layers=layers,
        target={} if method is None else method.counts({name: tuple(p.shape) for name, p in layers.items()}),
        interval=interval,
        freeze_plan=FreezePlan(0, (0,) * epochs, reduction=0.0),
        block_of_layer=(0,) * len(layers),
        untraced=problem.rule,
    )


def _updating(model: nn.Module, sample: Sample) -> frozenset[str]:
    """Names of the modules that change buffers in training: those that run then, and those that have the buffers.

    Counters are left out: what counts batches is no reason to keep a module from training mode.
    """
    written: Mapping[str, str] = {}
    # Batch norms divide by the batch less one in training: a sample of one item is taken twice.
    twice = tree_map_only(Tensor, lambda one: torch.cat([one, one]) if one.dim() and len(one) == 1 else one, sample)
    for inputs in (sample, twice):
        try:
            written = trace(model, inputs, training=True).written
            break
        except InvalidArgument:
            continue  # where neither can be traced, the freezer notices what changes
    buffers = dict(model.named_buffers())
    changing = {name: module for name, module in written.items() if buffers[name].is_floating_point()}
    return frozenset(changing.values()) | {name.rpartition(".")[0] for name in changing}


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
                blueprint.partition.remedy or "Train it without freezing.",
            )
        )
    if technique.criterion == "structure" and blueprint.method is None:
        remedy = "Use criterion='representation', or a sparse recipe."
        rule = "compares masks, and the recipe has no sparsity"
        raise InvalidArgument(Problem("criterion", technique.criterion, rule, remedy))
    forward = [layer.forward_flops for layer in blueprint.cost.layers]
    backward = [[0.0] * epochs for _ in blocks]
    total = 0.0
    whole = [float(factor) for factor in blueprint.backward()]
    saved = [blueprint.saved_by_block(index) for index in range(len(forward))]
    rows = Timeline(blueprint, recipe, samples=10**6).rows  # that many are as good as their shares
    most = max(row.samples for row in rows)
    for row in rows:
        weight = row.samples / most  # an epoch costs as its samples do; 1 where all epochs have as many
        for flops, share, factor, by_block in zip(forward, blueprint.density(row), whole, saved, strict=True):
            total += weight * (1 + factor) * flops * share
            for block, amount in by_block:
                backward[block][row.epoch] += weight * amount * share
    sizes = [block.n_layers for block in blocks]
    n_blocks = blocks_to_freeze(sizes, sum(sizes) + blueprint.partition.head.n_layers, technique.fraction)
    savings = Savings(
        backward,
        total,
        technique.flops_reduction,
        blueprint.interval,
        n_blocks,
        timing=technique.timing,
        delays=delays(blueprint.partition.sizes, blueprint.interval, technique.timing),
    )
    solved = solve(
        savings,
        scheme=technique.scheme,
        start_epoch=technique.start_epoch,
        resume_epochs=technique.resume_epochs,
        as_far_as_possible=technique.as_far_as_possible,
    )
    return replace(blueprint, freeze_plan=solved)


def sieving_warning(recipe: Recipe, epochs: int) -> str | None:
    """A text where the criterion can say nothing of a sample between two updates; None where it can."""
    technique, interval = recipe.sieving, recipe.interval(epochs)
    if technique is None or not recipe.sieves or not isinstance(technique, DataSieving) or epochs < 2:
        return None
    needed = technique.make_criterion().presentations_needed
    if interval >= needed:
        return None
    # The last epoch has no update: that many are needed for one behind an interval.
    longer = max(epochs, needed + 2)
    is_auto = recipe.update_interval_epochs == "auto"
    found = (
        f"the update interval of a run of {counted(epochs, 'epoch')} is {interval}"
        if is_auto
        else f"update_interval_epochs is {interval}"
    )
    remedies = (
        [] if is_auto and recipe.interval(longer) >= needed else [f"take update_interval_epochs={needed} or more"]
    )
    remedies += [f"train for {longer} epochs or more"] if longer > epochs else []
    return (
        f"{found}, and {technique.criterion} can say nothing of a sample that is seen less than {needed} times between "
        f"two updates: those that are left out are drawn at random. To have them chosen, {' and '.join(remedies)}."
    )


def check_recipe(recipe: object) -> None:
    """Raise ``InvalidArgument`` where something else stands in a recipe's place."""
    if not isinstance(recipe, Recipe):
        raise InvalidArgument(
            Problem("recipe", recipe, "must be a spfde.Recipe", "Take one of spfde.presets or make one.")
        )


def check_epochs(epochs: object) -> None:
    """Raise ``InvalidArgument`` for anything but a whole number from 1 to ``MOST_EPOCHS``."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or not 1 <= epochs <= MOST_EPOCHS:
        rule = f"must be a whole number from 1 to {MOST_EPOCHS:,}"
        raise InvalidArgument(Problem("epochs", epochs, rule, "Pass the run's length."))


def _block_at(position: int, partition: Partition) -> int:
    """Index of the block; in no block is the head."""
    return sum(block.stop <= position for block in partition.blocks)

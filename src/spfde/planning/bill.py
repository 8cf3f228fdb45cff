"""The plan: what a recipe will do to a model, and the whole bill, before any training.

``Blueprint`` is the part that a session needs as well: which layers are sparse, which blocks there are, when each is
frozen. ``plan`` adds the costs of every epoch. Both only read the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.cost import (
    Accounting,
    EpochCost,
    LayerCost,
    MemoryTimeline,
    ModelCost,
    epoch_cost,
    format_bytes,
    format_flops,
    memory_timeline,
    model_cost,
    total_cost,
)
from spfde.freezing import FreezePlan, Partition, Savings, blocks_to_freeze, find_blocks, solve
from spfde.model.sample import Sample, unwrap
from spfde.model.trace import trace
from spfde.recipe.recipe import Recipe
from spfde.sparsity import PruningAtInitialisation, SparsityMethod, mutates_after, planned_density, select_layers


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

    def scheduled_density(self, epoch: int, *, freezing: bool = True) -> list[float]:
        """Density of each layer in ``cost.layers`` during ``epoch``, the soft bound included.

        A block is at its target from the interval before it is frozen, and frozen or not it has the density of the
        update epoch at which it last trained. With ``freezing=False`` nothing is ever frozen.
        """
        return [weights for weights, _ in self._densities(epoch, freezing=freezing)]

    def gradient_density(self, epoch: int) -> list[float]:
        """Density of the weight gradient that each step of ``epoch`` computes, for each layer in ``cost.layers``."""
        return [gradient for _, gradient in self._densities(epoch)]

    def target_density(self) -> list[float]:
        """Density of each layer in ``cost.layers`` at the target, without a soft bound."""
        return [
            self.target[layer.name] / layer.numel if layer.name in self.target else 1.0 for layer in self.cost.layers
        ]

    def frozen_layers(self, epoch: int) -> list[bool]:
        """For each layer in ``cost.layers``: is it frozen during ``epoch``?"""
        return self.layers_in_first(self.freeze_plan.n_frozen_at(epoch))

    def settling_layers(self, epoch: int) -> list[bool]:
        """For each layer in ``cost.layers``: is it at its target, for it is frozen during ``epoch`` or soon to be?

        See ``FreezePlan.settles``.
        """
        n_blocks = len(self.partition.blocks)
        settles = [self.freeze_plan.settles(block, epoch, self.interval) for block in range(n_blocks)]
        return [block < n_blocks and settles[block] for block in self.block_of_layer]

    def _last_turns(self, epoch: int) -> list[int]:
        """For each layer in ``cost.layers``: the epoch that its density is of, the last at which its mask may change.

        All masks may change in the last epoch of the run; what is frozen then is at its target.
        """
        n_blocks = len(self.partition.blocks)
        turns = [self.freeze_plan.last_turn(block, epoch, self.interval) for block in range(n_blocks)]
        if epoch >= self.epochs - 1:
            return [epoch] * len(self.block_of_layer)
        return [epoch if block == n_blocks else turns[block] or 0 for block in self.block_of_layer]

    @property
    def learning_stops(self) -> tuple[int, ...]:
        """For each block, and at last the head, the epoch in which its learning rate has come to its end."""
        return (*self.freeze_plan.learning_stops, self.epochs)

    def layers_in_first(self, n_blocks: int) -> list[bool]:
        """For each layer in ``cost.layers``: is it in one of the first ``n_blocks`` blocks?"""
        return [block < n_blocks for block in self.block_of_layer]

    def _densities(self, epoch: int, *, freezing: bool = True) -> list[tuple[float, float]]:
        """For each layer in ``cost.layers``: of the weights and of the gradient."""
        n_layers = len(self.cost.layers)
        as_of = self._last_turns(epoch) if freezing else [epoch] * n_layers
        at_target = self.settling_layers(epoch) if freezing else [False] * n_layers
        has_frozen = freezing and not self.freeze_plan.pauses
        # What a freezing for good has pruned, or given up of the weights kept alive, stays so after a thaw.
        ended = self.layers_in_first(max(self.freeze_plan.frozen[: epoch + 1]) if has_frozen else 0)
        if self.method is not None and self.method.only_prunes:
            at_target = [now or before for now, before in zip(at_target, ended, strict=True)]
        densities = [self._density(*each) for each in zip(self.cost.layers, as_of, at_target, strict=True)]
        if self.method is None or not self.method.keeps_latents_at(0.0):
            return densities
        return [(own, own if is_over else wide) for (own, wide), is_over in zip(densities, ended, strict=True)]

    def _density(self, layer: LayerCost, epoch: int, at_target: bool) -> tuple[float, float]:
        name, numel = layer.name, layer.numel
        if self.method is None or name not in self.target:
            return 1.0, 1.0
        target = self.target[name]
        if at_target:
            return target / numel, target / numel
        shape = tuple(self.sparse_layers[name].shape)
        return planned_density(self.method, target, shape, epoch=epoch, interval=self.interval, epochs=self.epochs)


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
        block_of_layer=tuple(_block_at(layer.position, partition) for layer in cost.layers),
    )
    if not recipe.freezes:
        return blueprint
    return _with_freeze_plan(blueprint, recipe)


def _with_freeze_plan(blueprint: Blueprint, recipe: Recipe) -> Blueprint:
    assert recipe.freezing is not None
    technique, blocks, epochs = recipe.freezing, blueprint.partition.blocks, blueprint.epochs
    if not blocks:
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
    for epoch in range(epochs):
        density = blueprint.scheduled_density(epoch, freezing=False)
        for flops, share, block in zip(forward, density, blueprint.block_of_layer, strict=True):
            total += 3 * flops * share
            if block < len(blocks):
                backward[block][epoch] += 2 * flops * share
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


@dataclass(frozen=True)
class Plan:
    """The freeze timeline and the bill of a run that has not started. Every figure is modelled.

    Attributes:
        recipe: the recipe.
        blueprint: what the recipe means for the model.
        epoch_costs: cost of each epoch.
        memory: bytes by accounting: "paper" (frozen activations still counted, as in the paper's figure 4) and
            "actual" (what the masked engine and autograd really hold).
        samples: size of the whole training set.
        samples_in_use: samples in use in each epoch.
        batch_size: samples in a step.
    """

    recipe: Recipe
    blueprint: Blueprint
    epoch_costs: tuple[EpochCost, ...]
    memory: Mapping[str, MemoryTimeline]
    samples: int
    samples_in_use: tuple[int, ...]
    batch_size: int

    @property
    def cost(self) -> EpochCost:
        """The whole run's cost and savings."""
        return total_cost(self.epoch_costs)

    @property
    def partial_samples(self) -> int:
        """Samples in use in the last epoch; with circular sieving in every epoch."""
        return self.samples_in_use[-1]

    @property
    def training_flops(self) -> int:
        """Training FLOPs of the whole run."""
        return self.cost.training_flops

    @property
    def dense_training_flops(self) -> int:
        """Training FLOPs of the dense, unfrozen model on the whole data set over as many epochs."""
        return self.cost.dense_training_flops

    @property
    def flops_ratio(self) -> float:
        """Training FLOPs against the dense baseline."""
        return self.training_flops / self.dense_training_flops if self.dense_training_flops else 1.0

    @property
    def start_epoch(self) -> int | None:
        """Epoch at which the first block is frozen (T_frz); None where nothing is frozen."""
        return self.blueprint.freeze_plan.start_epoch

    @property
    def freeze_epochs(self) -> tuple[int | None, ...]:
        """First epoch in which each block is frozen, None where a block is never frozen."""
        return self.blueprint.freeze_plan.freeze_epochs

    @property
    def savings(self) -> dict[str, int]:
        """FLOPs saved by each source; what dense gradients add counts as negative."""
        cost = self.cost
        return {
            "sparsity": cost.saved_by_sparsity,
            "freezing": cost.saved_by_freezing,
            "sieving": cost.saved_by_sieving,
            "dense_gradients": -cost.dense_gradient_flops,
            "overhead": -cost.overhead_flops,
        }

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, as ``spfde plan --json`` prints them."""
        blueprint = self.blueprint
        return {
            "training_flops": self.training_flops,
            "dense_training_flops": self.dense_training_flops,
            "flops_ratio": self.flops_ratio,
            "start_epoch": self.start_epoch,
            "freeze_epochs": list(self.freeze_epochs),
            "frozen_blocks": list(blueprint.freeze_plan.frozen),
            "block_names": [block.name for block in blueprint.partition.blocks],
            "freezing_reduction": blueprint.freeze_plan.reduction,
            "savings": self.savings,
            "memory": {
                "accounting": "paper",
                **_memory_dict(self.memory["paper"]),
                "actual": _memory_dict(self.memory["actual"]),
            },
            "epochs": blueprint.epochs,
            "update_interval_epochs": blueprint.interval,
            "samples": self.samples,
            "partial_samples": self.partial_samples,
            "batch_size": self.batch_size,
            "parameters": blueprint.cost.n_parameters,
            "sparse_tensors": len(blueprint.target),
            "uncounted": dict(blueprint.cost.uncounted),
            "recipe": self.recipe.to_dict(),
        }

    def __str__(self) -> str:
        dense = self.dense_training_flops
        first, since = self.samples_in_use[0], self.samples_in_use.index(self.partial_samples)
        changes = f", {self.partial_samples:,} from epoch {since} on" if since else ""
        lines = [
            f"Plan: {self.blueprint.epochs} epochs of {first:,} of {self.samples:,} samples{changes} "
            "(every figure is modelled)",
            "",
            f"training FLOPs   {format_flops(self.training_flops):>12}   {self.flops_ratio:.1%} of dense "
            f"({format_flops(dense)})",
        ]
        lines += [
            f"  {source.replace('_', ' '):<15}{format_flops(-saved):>12}   {-saved / dense:+.1%}"
            for source, saved in self.savings.items()
            if saved
        ]
        lines += ["", self._timeline(), ""]
        for name, timeline in self.memory.items():
            lines.append(
                f"memory, {name + ' accounting':<18} least {format_bytes(timeline.minimum):>10}, "
                f"average {format_bytes(timeline.average):>10}; dense {format_bytes(timeline.dense):>10}: "
                f"{timeline.minimum_of_dense:.1%} and {timeline.average_of_dense:.1%}"
            )
        left_out = ", ".join(f"{name} x{calls}" for name, calls in self.blueprint.cost.uncounted.items()) or "nothing"
        lines += ["", f"not counted in FLOPs: {left_out}"]
        return "\n".join(lines)

    def _timeline(self) -> str:
        technique, freeze_plan = self.recipe.freezing, self.blueprint.freeze_plan
        if technique is None or self.start_epoch is None:
            return "freezing: none"
        how = technique.scheme
        if freeze_plan.resume_epoch is not None:
            how += f", all trained again from epoch {freeze_plan.resume_epoch}"
        lines = [
            f"freezing: from epoch {self.start_epoch}, {how}, {freeze_plan.reduction:.1%} of the sparse training FLOPs"
        ]
        if technique.adapts:
            lines.append(f"  at the latest: a block is frozen earlier where its {technique.criterion} has converged")
        for index, (block, at) in enumerate(zip(self.blueprint.partition.blocks, self.freeze_epochs, strict=True)):
            n_epochs = sum(count > index for count in freeze_plan.frozen)
            when = "never" if at is None else f"epoch {at}"
            lines.append(
                f"  {block.name:<24} {when}{f', frozen in {n_epochs} epochs' if n_epochs and technique.thaws else ''}"
            )
        return "\n".join(lines)


def _memory_dict(timeline: MemoryTimeline) -> dict[str, float]:
    return {
        "dense": timeline.dense,
        "sparse": timeline.sparse,
        "minimum": timeline.minimum,
        "average": timeline.average,
        "minimum_of_dense": timeline.minimum_of_dense,
        "average_of_dense": timeline.average_of_dense,
        "minimum_of_sparse": timeline.minimum_of_sparse,
        "average_of_sparse": timeline.average_of_sparse,
    }


def plan(
    model: nn.Module,
    sample: Sample,
    recipe: Recipe,
    epochs: int,
    samples: int,
    *,
    batch_size: int = 64,
) -> Plan:
    """The freeze timeline and the whole bill of a run, before training and without data.

    Args:
        model: the model; it is only read.
        sample: inputs of one small batch, real or made up: only shapes count.
        recipe: the recipe.
        epochs: length of the run.
        samples: size of the whole training set.
        batch_size: for the memory model and for methods that compute dense gradients at some steps.

    Raises:
        InvalidArgument: see ``draw``; also a count below 1.
    """
    check_recipe(recipe)
    problems = Problems()
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            problems.add(name, value, "must be at least 1", "Pass the number of samples.")
    problems.raise_if_any()
    blueprint = draw(model, sample, recipe, epochs)
    in_use = _samples_in_use(recipe, samples, blueprint)
    layers = blueprint.cost.layers
    schedule = [(blueprint.scheduled_density(e), blueprint.frozen_layers(e)) for e in range(epochs)]
    costs = tuple(
        epoch_cost(
            blueprint.cost.forward,
            density,
            frozen,
            samples=in_use[epoch],
            population=samples,
            **_wider_gradients(blueprint, epoch, samples=in_use[epoch], batch_size=batch_size),
            overhead_flops=scoring_flops(blueprint, samples=samples, batch_size=batch_size) if epoch == 0 else 0,
        )
        for epoch, (density, frozen) in enumerate(schedule)
    )
    target = blueprint.target_density()
    memory = {
        name: memory_timeline(layers, schedule, target_density=target, batch_size=batch_size, accounting=name)
        for name in get_args(Accounting)
    }
    return Plan(recipe, blueprint, costs, memory, samples, in_use, batch_size)


def _samples_in_use(recipe: Recipe, samples: int, blueprint: Blueprint) -> tuple[int, ...]:
    """Samples in use in each epoch."""
    epochs, interval, sieving = blueprint.epochs, blueprint.interval, recipe.sieving
    if sieving is None:
        return (samples,) * epochs
    return tuple(sieving.samples_in_use(samples, epoch, interval=interval, epochs=epochs) for epoch in range(epochs))


def scoring_flops(blueprint: Blueprint, *, samples: int, batch_size: int) -> int:
    """FLOPs of choosing the first masks from data; 0 for methods that draw them."""
    method = blueprint.method
    if not isinstance(method, PruningAtInitialisation):
        return 0
    return method.scoring_flops(blueprint.cost.forward_flops, min(samples, method.n_batches * batch_size))


def _wider_gradients(blueprint: Blueprint, epoch: int, *, samples: int, batch_size: int) -> dict[str, Any]:
    """Of how many samples the gradient of inactive weights is computed, and of which share of the weights."""
    method = blueprint.method
    wide: dict[str, Any] = {"dense_gradient_samples": 0}
    if method is None:
        return wide
    is_update_epoch = 0 < epoch < blueprint.epochs - 1 and epoch % blueprint.interval == 0
    if method.gradients == "smoothed":
        if mutates_after(method, epoch, interval=blueprint.interval, epochs=blueprint.epochs):
            wide["dense_gradient_samples"] = samples
    elif method.gradients == "dense":
        if is_update_epoch and method.drop_fraction_at(epoch / blueprint.epochs) > 0:
            wide["dense_gradient_samples"] = min(batch_size, samples)
    else:
        density, reach = blueprint.scheduled_density(epoch), blueprint.gradient_density(epoch)
        if reach != density:
            wide = {"dense_gradient_samples": samples, "gradient_density": reach}
    return wide


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


def _block_at(position: int, partition: Partition) -> int:
    for index, block in enumerate(partition.blocks):
        if block.start <= position < block.stop:
            return index
    return len(partition.blocks)

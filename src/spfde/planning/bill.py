"""The whole bill of a run before any training: the timeline, priced."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from torch import nn

from spfde.core.errors import Problems
from spfde.core.say import counted, say_on_stderr
from spfde.cost import EpochCost, MemoryTimeline, format_bytes, format_flops
from spfde.cost.memory import Accounting, memory_timeline
from spfde.cost.training import epoch_cost, total_cost
from spfde.freezing.rates import check_warmup
from spfde.model.sample import Sample
from spfde.planning.blueprint import Blueprint, check_recipe, draw, sieving_warning
from spfde.planning.timeline import Row, Timeline
from spfde.recipe import Recipe
from spfde.sparsity.layers import describe_left


def price(
    blueprint: Blueprint,
    row: Row,
    *,
    samples: int,
    population: int,
    dense_gradient_samples: int,
    overhead_flops: int = 0,
    computed: Sequence[int] | None = None,
) -> EpochCost:
    """What an epoch of the timeline costs.

    Args:
        blueprint: what the recipe means for the model.
        row: the epoch.
        samples: samples that are trained on.
        population: samples that the dense run trains on in an epoch.
        dense_gradient_samples: samples whose backward pass computes the gradients of all weights of layers that are not
            frozen.
        overhead_flops: computed beside the training steps.
        computed: dense forward FLOPs of all samples, per layer, where they are not those of the blueprint's sample.
    """
    density, reach = blueprint.density(row), blueprint.gradient_density(row)
    is_wider = reach != density
    return epoch_cost(
        blueprint.cost.forward,
        density,
        blueprint.frozen_layers(row),
        samples=samples,
        population=population,
        dense_gradient_samples=samples if is_wider else dense_gradient_samples,
        gradient_density=reach if is_wider else None,
        overhead_flops=overhead_flops,
        backward=(blueprint.backward(), blueprint.backward(row.frozen_blocks)),
        computed=computed,
    )


def scoring_flops(blueprint: Blueprint, *, samples: int, batch_size: int) -> int:
    """FLOPs of choosing the first masks from data; 0 for methods that draw them."""
    if blueprint.method is None:
        return 0
    return blueprint.method.scoring_flops(blueprint.cost.forward_flops, samples=samples, batch_size=batch_size)


@dataclass(frozen=True)
class Plan:
    """The freeze timeline and the bill of a run that has not started. Every figure is modelled.

    Attributes:
        recipe: the recipe.
        blueprint: what the recipe means for the model.
        timeline: what happens in each epoch.
        epoch_costs: cost of each epoch.
        memory: bytes by accounting: "paper" (frozen activations still counted, as in the paper's figure 4) and
            "actual" (what the masked engine and autograd really hold).
        samples: size of the whole training set.
        batch_size: samples in a step.

    Example:
        >>> bill = spfde.plan(model, torch.zeros(1, 4), spfde.presets.spfde, epochs=160, samples=20, batch_size=8)
        >>> bill.start_epoch, bill.freeze_epochs
        (82, (82, 87, 92))
        >>> f"{bill.flops_ratio:.0%} of the dense net's FLOPs"
        "25% of the dense net's FLOPs"
    """

    recipe: Recipe
    blueprint: Blueprint
    timeline: Timeline
    epoch_costs: tuple[EpochCost, ...]
    memory: Mapping[str, MemoryTimeline]
    samples: int
    batch_size: int

    @cached_property
    def cost(self) -> EpochCost:
        """The whole run's cost and savings."""
        return total_cost(self.epoch_costs)

    @cached_property
    def samples_in_use(self) -> tuple[int, ...]:
        """Samples in use in each epoch."""
        return tuple(row.samples for row in self.timeline)

    @property
    def partial_samples(self) -> int:
        """Samples in use in the last epoch; with circular sieving in every epoch, but where the last ones use all."""
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
            f"Plan: {counted(self.blueprint.epochs, 'epoch')} of {first:,} of {self.samples:,} samples{changes} "
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
        lines += ["", self._freezing(), ""]
        for name, timeline in self.memory.items():
            lines.append(
                f"memory, {name + ' accounting':<18} least {format_bytes(timeline.minimum):>10}, "
                f"average {format_bytes(timeline.average):>10}; dense {format_bytes(timeline.dense):>10}: "
                f"{timeline.minimum_of_dense:.1%} and {timeline.average_of_dense:.1%}"
            )
        left_out = ", ".join(f"{name} x{calls}" for name, calls in self.blueprint.cost.uncounted.items()) or "nothing"
        lines += ["", f"not counted in FLOPs: {left_out}"]
        if self.blueprint.untraced is not None:
            lines.append(f"no FLOPs are known: {self.blueprint.untraced}")
        if self.blueprint.left_dense:
            lines.append(f"dense, though they could be sparse: {describe_left(self.blueprint.left_dense)}")
        return "\n".join(lines)

    def _freezing(self) -> str:
        technique, freeze_plan = self.recipe.freezing, self.blueprint.freeze_plan
        if technique is None or self.start_epoch is None:
            return "freezing: none"
        how = technique.scheme
        if freeze_plan.resume_epoch is not None:
            how += f", all trained again from epoch {freeze_plan.resume_epoch}"
        lines = [
            f"freezing: from epoch {self.start_epoch}, {how}, {freeze_plan.reduction:.1%} of the training FLOPs of the "
            "same run without freezing"
        ]
        of_the_bill = self.savings["freezing"] / (self.dense_training_flops - self.savings["sparsity"])
        # The bill has freezing before sieving, on all samples: where their number changes the two are not comparable.
        if len(set(self.samples_in_use)) == 1 and f"{of_the_bill:.1%}" != f"{freeze_plan.reduction:.1%}":
            lines.append(
                f"  in the bill {of_the_bill:.1%} of what sparsity leaves: before blocks are frozen, they are pruned"
            )
        if technique.adapts:
            lines.append(f"  at the latest: a block is frozen earlier where its {technique.criterion} has converged")
        for index, (block, at) in enumerate(zip(self.blueprint.partition.blocks, self.freeze_epochs, strict=True)):
            n_epochs = sum(count > index for count in freeze_plan.frozen)
            when = "never" if at is None else f"epoch {at}"
            length = f", frozen in {counted(n_epochs, 'epoch')}" if n_epochs and technique.thaws else ""
            lines.append(f"  {block.name:<24} {when}{length}")
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
        InvalidArgument: see ``draw``; also a count below 1, or a warm-up that is not over before a block is frozen.

    Example:
        >>> bill = spfde.plan(model, torch.zeros(1, 4), spfde.presets.spfde, epochs=160, samples=20, batch_size=8)
        >>> bill.training_flops < bill.dense_training_flops
        True
    """
    check_recipe(recipe)
    problems = Problems()
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            problems.add(name, value, "must be at least 1", "Pass the number of samples.")
    problems.raise_if_any()
    blueprint = draw(model, sample, recipe, epochs)
    if recipe.learning_rate is not None:
        Problems(check_warmup(recipe.learning_rate, blueprint.learning_stops)).raise_if_any()
    if blueprint.shortfall is not None:
        say_on_stderr(blueprint.shortfall)
    for words in (blueprint.left_dense_warning, sieving_warning(recipe, epochs)):
        if words is not None:
            warnings.warn(words, stacklevel=2)
    timeline = Timeline(blueprint, recipe, samples)
    rows = timeline.rows
    scoring = scoring_flops(blueprint, samples=samples, batch_size=batch_size)
    costs = tuple(
        price(
            blueprint,
            row,
            samples=row.samples,
            population=samples,
            dense_gradient_samples=planned_dense_samples(row, batch_size),
            overhead_flops=scoring if row.epoch == 0 else 0,
        )
        for row in rows
    )
    schedule = [(blueprint.density(row), blueprint.frozen_layers(row)) for row in rows]
    memory = {
        name: memory_timeline(
            blueprint.cost.layers,
            schedule,
            target_density=blueprint.target_density(),
            batch_size=batch_size,
            accounting=name,
        )
        for name in get_args(Accounting)
    }
    return Plan(recipe, blueprint, timeline, costs, memory, samples, batch_size)


def planned_dense_samples(row: Row, batch_size: int) -> int:
    """Samples of an epoch whose backward pass computes dense gradients, as planned."""
    return {"none": 0, "one step": min(batch_size, row.samples), "every step": row.samples}[row.masks.dense_gradients]

"""A learning rate for each block, which reaches its end when the block is frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from spfde.core.errors import Problem, Problems, StateMismatch, UsageError
from spfde.core.numbers import cosine
from spfde.core.optimizers import Optimizers
from spfde.core.state import check_entries
from spfde.core.technique import Technique


class BlockwiseCosine(Technique):
    """A cosine over the epochs in which a block is trained, so that no block is frozen at a high learning rate.

    Source: SpFDE, section 3, "according to the total active training epoch of each layer/block"; the formula is ours,
    the usual cosine with the block's freeze epoch for its length. What is never frozen, or pauses periodically, has the
    length of the run. What trains again at the end of the run takes the small rate that the never frozen have by then.

    Example:
        >>> recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(), learning_rate=spfde.BlockwiseCosine())
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=40)
        >>> len(optimizer.param_groups)  # one for each block, and the head's
        4
    """

    name: ClassVar[str] = "blockwise-cosine"
    summary: ClassVar[str] = "Cosine learning rate of each block down to its own freeze epoch, with optional warm-up."
    references: ClassVar[tuple[str, ...]] = ("yuan2022spfde",)

    warmup_epochs: int = Field(default=0, ge=0, description="epochs of linear warm-up, 0 or more")
    final: float = Field(default=0.0, ge=0, description="learning rate at the end of the cosine, 0 or more")


def learning_rate_factor(epoch: int, *, stop: int, warmup: int) -> float:
    """How far a block's learning rate is up in ``epoch``, from 0 to 1: a warm-up, then half a cosine down to ``stop``.

    Args:
        epoch: from 0.
        stop: the block's freeze epoch, or the length of the run; from there on it is 0.
        warmup: epochs of linear warm-up; in epoch ``e`` of them the factor is ``(e + 1) / warmup``.
    """
    if epoch >= stop:
        return 0.0
    if epoch < warmup:
        return (epoch + 1) / warmup
    return cosine((epoch - warmup) / (stop - warmup), 1.0)


class GroupRates:
    """Splits an optimizer's parameter groups by block, sets their learning rates, and joins them again.

    Each group becomes one group per block that it has parameters of, in order of the blocks, with the same options; the
    order of parameters is kept. The learning rate that a group has at that time is the base of its cosine.

    Args:
        optimizer: one or several; their ``param_groups`` lists are changed in place.
        block_of: index of the block of each parameter, by the ``id`` of the parameter. Those without one belong with
            the head.
        stops: for each block the epoch at which it is frozen, or the length of the run; the last one is the head's.
        technique: the shape of the cosine, which ``check_rates`` has found fit.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer] | Optimizers,
        block_of: Mapping[int, int],
        stops: Sequence[int],
        technique: BlockwiseCosine,
    ) -> None:
        self._technique = technique
        self._splits = [_Split(each, block_of, len(stops) - 1) for each in Optimizers.of(optimizer).each]
        self._bases = [float(group["lr"]) for split in self._splits for group in split.originals]
        #: What ``apply`` has set, group by group; empty where that is not known.
        self._set: list[float] = []

    def apply(self, epoch: int, factors: Sequence[float]) -> None:
        """Set the learning rates of ``epoch``. Groups that were added since are left alone.

        Args:
            epoch: from 0.
            factors: of each block, the head's last; see ``learning_rate_factor``.

        Raises:
            UsageError: something else sets the learning rates; the two would undo each other.
        """
        self.check()
        final = 0.0 if epoch < self._technique.warmup_epochs else self._technique.final  # a warm-up starts from zero
        groups = self._groups()
        for (group, block), base in zip(groups, self._bases_of_groups(), strict=True):
            _set_rate(group, final + (base - final) * factors[block])
        self._set = [float(group["lr"]) for group, _ in groups]

    def check(self) -> None:
        """Raise ``UsageError`` where something else has set the learning rates since ``apply``."""
        groups = self._groups()
        if any("initial_lr" in group for split in self._splits for group in split.optimizer.param_groups):
            raise UsageError(
                "a learning-rate scheduler was put on the optimizer (initial_lr in its groups) while BlockwiseCosine "
                "drives the rates. Remove one of them; Recipe(learning_rate=None) leaves the rates to you."
            )
        for (group, _), value in zip(groups, self._set, strict=False):
            # A tensor rounds what a state brings as a number.
            if not math.isclose(float(group["lr"]), value, rel_tol=1e-6):
                raise UsageError(
                    f"a learning rate was set to {float(group['lr']):.4g}, by a scheduler like ReduceLROnPlateau, by "
                    "hand or with the optimizer's state alone, while BlockwiseCosine drives it and had set "
                    f"{value:.4g}. Remove one of them: Recipe(learning_rate=None) leaves the rates to you."
                )

    def _groups(self) -> list[tuple[dict[str, Any], int]]:
        """The groups that were made, each with its block; those that were added since are left alone."""
        return [
            (group, block)
            for split in self._splits
            for group, (_, block) in zip(split.optimizer.param_groups, split.layout, strict=False)
        ]

    def _bases_of_groups(self) -> list[float]:
        """The base rate of each group that was made."""
        found, first = [], 0
        for split in self._splits:
            made = zip(split.optimizer.param_groups, split.layout, strict=False)
            found += [self._bases[first + origin] for _, (origin, _) in made]
            first += len(split.originals)
        return found

    def join(self) -> None:
        """Restore the user's groups, each at its base rate; options changed meanwhile keep their new values."""
        bases = iter(self._bases)
        for split in self._splits:
            split.join([next(bases) for _ in split.originals])
        self._splits, self._set = [], []

    def state_dict(self) -> dict[str, Any]:
        """The base rate of each of the user's groups, and what ``apply`` has set, group by group."""
        return {"base_rates": list(self._bases), "rates": list(self._set)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the base rates, and set the rates that were set: the optimizer's state may come later, or never.

        Raises:
            StateMismatch: see ``check_state``.
        """
        self.check_state(state)
        self._bases = list(state["base_rates"])
        groups = [group for group, _ in self._groups()][: len(state["rates"])]
        for group, value in zip(groups, state["rates"], strict=True):
            _set_rate(group, value)
        self._set = list(state["rates"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``StateMismatch`` where a state is of another number of groups, or damaged."""
        check_entries(state, "the learning rates", {"base_rates": list, "rates": list})
        groups = len(self._groups())
        for name, allowed in (("base_rates", (len(self._bases),)), ("rates", (0, groups))):
            found = state[name]
            if len(found) not in allowed or not all(isinstance(rate, float) for rate in found):
                raise StateMismatch(
                    f"the state of the learning rates has {name}={found!r}, and the optimizer has {len(self._bases)} "
                    f"parameter groups, made into {groups}. Load it with the optimizer that it was saved with."
                )


class _Split:
    """One optimizer's groups, cut by block.

    Attributes:
        originals: the user's groups.
        layout: of each group that was made: the index of the user's group, and the block.
    """

    def __init__(self, optimizer: Optimizer, block_of: Mapping[int, int], head: int) -> None:
        self.optimizer = optimizer
        self.originals: list[dict[str, Any]] = list(optimizer.param_groups)
        self.layout: list[tuple[int, int]] = []
        made = []
        for origin, group in enumerate(self.originals):
            home = [block_of.get(id(p), head) for p in group["params"]]
            for block in sorted(set(home)) or [head]:
                self.layout.append((origin, block))
                made.append(_part_of(group, [index for index, at in enumerate(home) if at == block]))
        optimizer.param_groups[:] = made

    def join(self, bases: Sequence[float]) -> None:
        """Restore the user's groups, each at its base rate."""
        groups = self.optimizer.param_groups
        first: dict[int, dict[str, Any]] = {}
        for group, (origin, _) in zip(groups, self.layout, strict=False):
            first.setdefault(origin, group)
        for origin, original in enumerate(self.originals):
            kept = {key: original[key] for key in {"lr", *_PER_PARAMETER} & original.keys()}
            original.update(first[origin] | kept)
            _set_rate(original, bases[origin])
        groups[: len(self.layout)] = self.originals


_PER_PARAMETER = {"params", "param_names"}


def _part_of(group: dict[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """A copy of a parameter group with some of its parameters, and a learning rate of its own if that is a tensor."""
    part = dict(group)
    for key in _PER_PARAMETER & group.keys():
        part[key] = [group[key][index] for index in indices]
    if isinstance(part["lr"], Tensor):
        part["lr"] = part["lr"].clone()
    return part


def _set_rate(group: dict[str, Any], value: float) -> None:
    if isinstance(group["lr"], Tensor):
        # In place: fused and captured optimizers hold on to the tensor.
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def check_rates(
    optimizer: Optimizer | Sequence[Optimizer] | Optimizers,
    technique: BlockwiseCosine,
    stops: Sequence[int] = (),
    *,
    decayed: bool = False,
) -> list[Problem]:
    """What keeps ``GroupRates`` from driving the optimizer's learning rates; nothing is changed.

    Without ``stops`` only the optimizer is looked at. ``decayed``: its rates may be those of a run that goes on.
    """
    problems = Problems()
    optimizers = Optimizers.of(optimizer)
    for each in optimizers.each:
        name = type(each).__name__
        if isinstance(each, torch.optim.LBFGS):
            rule = "supports one parameter group only, and BlockwiseCosine needs one for each block"
            problems.add("optimizer", name, rule, "Use another optimizer, or learning_rate=None.")
        if _is_sharded(each):
            rule = "shards its parameter groups over the ranks, and BlockwiseCosine has to split them by block"
            problems.add("optimizer", name, rule, "Set learning_rate=None and take a scheduler, or another optimizer.")
        if any("initial_lr" in group for group in each.param_groups):
            rule = "has a learning-rate scheduler ('initial_lr' in its groups), and BlockwiseCosine drives the rate too"
            remedy = "Leave the scheduler out, or set learning_rate=None in the recipe to keep it."
            problems.add("optimizer", name, rule, remedy)
    for index, group in enumerate(optimizers.param_groups):
        if technique.final > float(group["lr"]) and not decayed:
            rule = f"must be at most the learning rate of each group; group {index} has {float(group['lr'])}"
            problems.add("final", technique.final, rule, "Lower final or raise the learning rate.")
    return [*problems.found, *check_warmup(technique, stops)]


def check_warmup(technique: BlockwiseCosine, stops: Sequence[int]) -> list[Problem]:
    """What keeps the warm-up from being over before each block is frozen; ``stops`` as in ``learning_rate_factor``."""
    early = [stop for stop in stops if 0 < stop <= technique.warmup_epochs]
    if not early:
        return []
    rule = f"must be less than every block's freeze epoch and the run's length; the first is {min(early)}"
    return [Problem("warmup_epochs", technique.warmup_epochs, rule, "Shorten the warm-up or freeze less.")]


def _is_sharded(optimizer: Optimizer) -> bool:
    """Is it a ZeroRedundancyOptimizer? Importing that takes a while, and needs a build with distributed."""
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)

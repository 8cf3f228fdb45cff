"""A learning rate for each block, which reaches its end when the block is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spfde.core.errors import Problem, Problems, StateMismatch, UsageError
from spfde.core.numbers import cosine
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
        optimizer: its ``param_groups`` list is changed in place.
        block_of: index of the block of each parameter, by the ``id`` of the parameter. Those without one belong with
            the head.
        stops: for each block the epoch at which it is frozen, or the length of the run; the last one is the head's.
        technique: the shape of the cosine, which ``check_rates`` has found fit.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        block_of: Mapping[int, int],
        stops: Sequence[int],
        technique: BlockwiseCosine,
    ) -> None:
        self._optimizer = optimizer
        self._technique = technique
        self._originals: list[dict[str, Any]] = list(optimizer.param_groups)
        self._bases = [float(group["lr"]) for group in self._originals]
        # Of each group that was made: the index of the user's group, and the block.
        self._layout: list[tuple[int, int]] = []
        split = []
        for origin, group in enumerate(self._originals):
            home = [block_of.get(id(p), len(stops) - 1) for p in group["params"]]
            for block in sorted(set(home)) or [len(stops) - 1]:
                self._layout.append((origin, block))
                split.append(_part_of(group, [index for index, at in enumerate(home) if at == block]))
        optimizer.param_groups[:] = split

    def apply(self, epoch: int, factors: Sequence[float]) -> None:
        """Set the learning rates of ``epoch``. Groups that were added since are left alone.

        Args:
            epoch: from 0.
            factors: of each block, the head's last; see ``learning_rate_factor``.

        Raises:
            UsageError: a scheduler has been put on the optimizer since; the two would undo each other.
        """
        if any("initial_lr" in group for group in self._optimizer.param_groups):
            raise UsageError(
                "a learning-rate scheduler was put on the optimizer (initial_lr in its groups) while BlockwiseCosine "
                "drives the rates. Remove one of them; Recipe(learning_rate=None) leaves the rates to you."
            )
        final = 0.0 if epoch < self._technique.warmup_epochs else self._technique.final  # a warm-up starts from zero
        for group, (origin, block) in zip(self._optimizer.param_groups, self._layout, strict=False):
            _set_rate(group, final + (self._bases[origin] - final) * factors[block])

    def join(self) -> None:
        """Restore the user's groups, each at its base rate; options changed meanwhile keep their new values."""
        if not self._layout:
            return
        groups = self._optimizer.param_groups
        first: dict[int, dict[str, Any]] = {}
        for group, (origin, _) in zip(groups, self._layout, strict=False):
            first.setdefault(origin, group)
        for origin, original in enumerate(self._originals):
            kept = {key: original[key] for key in {"lr", *_PER_PARAMETER} & original.keys()}
            original.update(first[origin] | kept)
            _set_rate(original, self._bases[origin])
        groups[: len(self._layout)] = self._originals
        self._layout = []

    def state_dict(self) -> dict[str, Any]:
        """The base rate of each of the user's groups."""
        return {"base_rates": list(self._bases)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the base rates.

        Raises:
            StateMismatch: the state is of another number of groups, or damaged.
        """
        check_entries(state, "the learning rates", {"base_rates": list})
        bases = state["base_rates"]
        if len(bases) != len(self._bases) or not all(isinstance(base, float) for base in bases):
            raise StateMismatch(
                f"the state of the learning rates has base_rates={bases!r}, and the optimizer has {len(self._bases)} "
                "parameter groups. Load it with the optimizer that it was saved with."
            )
        self._bases = list(bases)


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
    optimizer: torch.optim.Optimizer, technique: BlockwiseCosine, stops: Sequence[int] = ()
) -> list[Problem]:
    """What keeps ``GroupRates`` from driving the optimizer's learning rates; nothing is changed.

    Without ``stops`` only the optimizer is looked at.
    """
    problems = Problems()
    if isinstance(optimizer, torch.optim.LBFGS):
        rule = "supports one parameter group only, and BlockwiseCosine needs one for each block"
        problems.add("optimizer", type(optimizer).__name__, rule, "Use another optimizer, or learning_rate=None.")
    if any("initial_lr" in group for group in optimizer.param_groups):
        rule = "has a learning-rate scheduler ('initial_lr' in its groups), and BlockwiseCosine drives the rate too"
        remedy = "Leave the scheduler out, or set learning_rate=None in the recipe to keep it."
        problems.add("optimizer", type(optimizer).__name__, rule, remedy)
    for index, group in enumerate(optimizer.param_groups):
        if technique.final > float(group["lr"]):
            rule = f"must be at most the learning rate of each group; group {index} has {float(group['lr'])}"
            problems.add("final", technique.final, rule, "Lower final or raise the learning rate.")
    early = [stop for stop in stops if 0 < stop <= technique.warmup_epochs]
    if early:
        rule = f"must be less than every block's freeze epoch and the run's length; the first is {min(early)}"
        problems.add("warmup_epochs", technique.warmup_epochs, rule, "Shorten the warm-up or freeze less.")
    return problems.found

"""What a session is made of: parts with one protocol."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from spfde.core.clock import Clock
from spfde.core.optimizers import LeadingSteps, Optimizers
from spfde.core.sharding import is_sharded
from spfde.core.state import check_entries
from spfde.planning.blueprint import Blueprint
from spfde.planning.timeline import Row, Timeline
from spfde.recipe import Recipe
from spfde.session.distributed import World


@dataclass
class Setting:
    """What the parts of a session share.

    Attributes:
        model: the user's own module, without wrappers.
        optimizer: the user's, one or several.
        recipe: as attached.
        blueprint: what the recipe means for the model.
        timeline: what happens in each epoch; parts may amend it.
        seed: as attached.
        world: the processes that train together.
        sparse_allreduce: whether of masked gradients the active entries alone are averaged over the processes.
        clock: epochs, steps and seconds.
        generator: the one source of randomness of masks, growth and sieving; saved once, by the session.
        leading: which steps count, where there are several optimizers.
    """

    model: nn.Module
    optimizer: Optimizers
    recipe: Recipe
    blueprint: Blueprint
    timeline: Timeline
    seed: int
    world: World
    sparse_allreduce: bool = True
    clock: Clock = field(default_factory=Clock)
    generator: torch.Generator = field(default_factory=torch.Generator)
    leading: LeadingSteps = field(init=False)

    def __post_init__(self) -> None:
        self.leading = LeadingSteps(self.optimizer.each)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a part of the model's parameters alone (FSDP)."""
        return is_sharded(self.model)

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


class Part:
    """One of the things that a session looks after. A method that a part has no use for does nothing.

    Attributes:
        name: under which its state is saved.
        remembers: what has the state; None where there is none to save.
    """

    name: ClassVar[str]
    remembers: Any = None

    def begin_epoch(self, row: Row) -> None:
        """The top of an epoch, in the order of the parts; ``row`` is the timeline's, as the parts before amended it."""

    def end_epoch(self) -> None:
        """The bottom of an epoch, in the order of the parts."""

    def verify(self) -> None:
        """See whether what it promises still holds: at the bottom of each epoch, and when the user asks for it.

        Raises:
            UsageError: it does not, with what was seen and the remedy.
        """

    def check_complete(self) -> None:
        """Before the bottom of an epoch: whether all was done that belongs to it. Other ranks may find other things.

        Raises:
            UsageError: it was not, with the remedy.
        """

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``StateMismatch`` for a state that cannot be loaded."""
        if self.remembers is None:
            check_entries(state, self.name, {})
        else:
            copy(self.remembers).load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as tensors and primitives."""
        found: dict[str, Any] = {} if self.remembers is None else self.remembers.state_dict()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateMismatch: it does not fit, or is damaged.
        """
        if self.remembers is not None:
            self.remembers.load_state_dict(state)

    def detach(self) -> None:
        """Undo what it has changed of the model, the optimizer or the loader."""

    def summarise(self) -> list[str]:
        """Lines that say how it stands."""
        return []

    def describe(self) -> list[str]:
        """Lines that say what it has hooked, replaced or made."""
        return []

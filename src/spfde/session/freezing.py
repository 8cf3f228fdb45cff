"""Which layers learn, and how fast: the freezer and the learning rates under the timeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from spfde.core.say import counted
from spfde.core.state import check_entries
from spfde.freezing.arrivals import Arrivals
from spfde.freezing.freezer import Freezer, is_held
from spfde.freezing.rates import GroupRates
from spfde.planning.timeline import Row
from spfde.session.learning import Learning
from spfde.session.part import Part, Setting


class Freezing(Part):
    """Freezes the blocks that the timeline says, after the masks of the epoch have mutated."""

    name = "freezing"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.freezer = Freezer(
            setting.model, setting.blueprint.partition.blocks, setting.optimizer, setting.blueprint.updating
        )
        self.remembers = self.freezer
        self._at_detach: int | None = None
        self.learning = Learning(setting.model, lambda: self.freezer.paused)
        self._arrivals = Arrivals(setting.model, setting.blueprint.partition.blocks) if setting.recipe.freezes else None

    @property
    def n_frozen(self) -> int:
        """Number of frozen blocks; once detached, of those that were frozen then."""
        return self.freezer.n_frozen if self._at_detach is None else self._at_detach

    @property
    def hooked(self) -> list[object]:
        """What hooks gradients, to count them."""
        return [] if self._arrivals is None else [self._arrivals]

    def on_replay(self) -> None:
        """A step is about to be replayed."""
        if self._arrivals is not None:
            self._arrivals.on_replay()

    def coming(self) -> set[frozenset[str]]:
        """Names of the frozen parameters, as they are in this epoch and in each one that is left."""
        numbers = {self.n_frozen, *self._setting.timeline.frozen[self._setting.clock.epoch :]}
        return {self.freezer.parameters_of_front(number) for number in numbers}

    def begin_epoch(self, row: Row) -> None:
        self.learning.begin_epoch()
        before = self.n_frozen
        self.freezer.freeze_to(row.frozen_blocks)
        if self._arrivals is not None and self.n_frozen > before:
            self._arrivals.expect(self.n_frozen)

    def on_step(self) -> None:
        """A step was taken."""
        if self._arrivals is not None:
            self._arrivals.on_step()

    def verify(self) -> None:
        if self._arrivals is not None:
            self._arrivals.check()

    def end_epoch(self) -> None:
        changed = self.freezer.changed()
        # DistributedDataParallel hands the first rank's buffers on, and those of the others change by that, rightly.
        if changed and (not self._setting.world.rank or self._setting.is_sharded):
            warnings.warn(
                f"{', '.join(changed)} changes although its block is frozen and held in evaluation mode: it is "
                "changed there, too, or from elsewhere (weights that are written by hand, averaged, loaded). Change it "
                "only `if self.training`, in the module that has it, and only parameters that require a gradient; or "
                "name other blocks in ProgressiveFreezing(blocks=...). What forward() only leaves behind for others to "
                "read does no harm.",
                stacklevel=4,
            )

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the frozen blocks", {"n_frozen": int, "blocks": list})

    def detach(self) -> None:
        self._at_detach = self.freezer.n_frozen
        self.freezer.freeze_to(0)
        if self._arrivals is not None:
            self._arrivals.close()

    def summarise(self) -> list[str]:
        blueprint = self._setting.blueprint
        blocks, epochs = len(blueprint.partition.blocks), list(blueprint.freeze_plan.freeze_epochs)
        lines = [f"freezing: {self.n_frozen} of {counted(blocks, 'block')} frozen; freeze epochs {epochs}"]
        return lines if self._setting.recipe.learning_rate is not None else [*lines, "learning rate: the caller’s"]

    def describe(self) -> list[str]:
        held = [name for name, module in self._setting.model.named_modules() if is_held(module)]
        arrivals = 0 if self._arrivals is None else self._arrivals.n_watched
        lines = []
        if arrivals:
            lines.append(
                f"hooked: the gradients of {arrivals} parameters, once each, to see that they arrive (freezing)"
            )
        if not held:
            return lines
        return [
            *lines,
            f"replaced: train() of {counted(len(held), 'norm')}, which frozen blocks hold in evaluation mode:",
            *(f"  {name}" for name in held),
        ]


class Rates(Part):
    """Sets the timeline's learning rates, block by block."""

    name = "rates"

    def __init__(self, setting: Setting) -> None:
        technique, blueprint = setting.recipe.learning_rate, setting.blueprint
        assert technique is not None, "made for recipes with a learning rate"
        by_name = dict(setting.model.named_parameters())
        blocks = enumerate(blueprint.partition.blocks)
        block_of = {id(by_name[name]): index for index, block in blocks for name in block.parameters}
        self._optimizer, self._technique = setting.optimizer, technique
        self.remembers = GroupRates(setting.optimizer, block_of, blueprint.learning_stops, technique)

    def begin_epoch(self, row: Row) -> None:
        self.remembers.apply(row.epoch, row.rates)

    def verify(self) -> None:
        self.remembers.check()

    def check_state(self, state: Mapping[str, Any]) -> None:
        self.remembers.check_state(state)

    def detach(self) -> None:
        self.remembers.join()

    def summarise(self) -> list[str]:
        return [f"learning rate: {self._technique!r}"]

    def describe(self) -> list[str]:
        return [f"split: the optimizer's groups, by block, into {len(self._optimizer.param_groups)}"]

"""How the model is computed: the engine, and what it keeps of the frozen front."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem, StateMismatch, UsageError
from spfde.core.numbers import mix
from spfde.core.say import say, say_on_stderr
from spfde.core.state import check_entries
from spfde.engines.base import Job, Parts
from spfde.engines.choose import Choice, choose_engine, engine_names, make_engine
from spfde.engines.compiled import CompiledBlocks
from spfde.engines.cudagraph.step import CapturedStep, Following
from spfde.planning.timeline import Row
from spfde.session.freezing import Freezing
from spfde.session.masks import WholeModel
from spfde.session.part import Part, Setting


class Computing(Part):
    """Has an engine compute the model.

    Args:
        setting: the session's.
        job: what the engine computes.
        choice: the engine, and why.
        masks: of the weights.
        freezing: of the blocks.

    Attributes:
        engine: the engine.
        choice: its name, and why it was taken.
    """

    name = "engine"

    def __init__(self, setting: Setting, job: Job, choice: Choice, masks: WholeModel, freezing: Freezing) -> None:
        self._setting, self.job, self._masks = setting, job, masks
        self._parts = Parts(
            masks=lambda: masks.masks,
            dense_gradients=lambda: masks.wants_dense_gradients,
            frozen=lambda: freezing.freezer.frozen_parameters,
            coming=freezing.coming,
            masked_already=masks.masked_already,
        )
        wholes = dict.fromkeys(block.whole or block.name for block in setting.blueprint.partition.blocks)
        names = [name for whole in wholes for name in whole.split(" + ")]
        self._compiled = CompiledBlocks(job.model, names) if job.compiles else None
        self._steps: list[CapturedStep] = []
        self._take(choice)
        self._asked_for_seeds = False

    def capture(self, step: Callable[..., Any], following: Following, *, strict: bool | None) -> Callable[..., Any]:
        """See ``Session.capture``."""
        choice, recorder = self.choice, self.engine.recorder
        is_strict = choice.asked != "auto" if strict is None else strict
        reason = following.reason_for_good()
        if recorder is None:
            reason = f"the cudagraph engine captures it, and this is {choice.name}: {choice.reason}"
        if recorder is None or reason is not None:
            if is_strict:
                remedy = (
                    'Attach with engine="auto", which leaves the step to PyTorch then, or call the function itself.'
                )
                rule = f"cannot be captured: {reason}"
                raise InvalidArgument(Problem("step", getattr(step, "__name__", step), rule, remedy))
            say(f"session.capture: the step is left to PyTorch: {reason}")
            return step
        captured = CapturedStep(
            step,
            model=self.job.model,
            optimizers=self._setting.optimizer.each,
            recorder=recorder,
            following=following,
            parts=self._parts,
            is_strict=is_strict,
        )
        self._steps.append(captured)
        return captured

    def _take(self, choice: Choice) -> None:
        self.choice = choice
        self.engine = make_engine(choice.name)
        self.engine.attach(self.job, self._parts)
        self._masks.clear_by(self.engine.clears)

    @property
    def caches_prefix(self) -> bool:
        """Whether outputs of the frozen front are kept."""
        return self.job.cache is not None

    def augmentation_seeds(self, samples: Tensor) -> Tensor:
        """See ``Session.augmentation_seeds``."""
        self._asked_for_seeds = True
        setting, epoch = self._setting, self._setting.clock.epoch
        frozen = setting.timeline.frozen[: epoch + 1]
        variants = self.engine.prefix_variants() if self.caches_prefix and frozen[-1] else 0
        if not variants:
            return mix(samples, setting.seed, epoch, 0)
        since = next(at for at in range(len(frozen) - 1, -1, -1) if at == 0 or frozen[at - 1] != frozen[-1])
        variant = (epoch - since) % variants
        self.engine.announce(samples, variant)
        return mix(samples, setting.seed, since, 1 + variant)

    def begin_epoch(self, row: Row) -> None:
        self._asked_for_seeds = False
        self.engine.on_epoch()

    def check_complete(self) -> None:
        clock = self._setting.clock
        frozen = self._setting.timeline.frozen[clock.epoch]
        if self.caches_prefix and frozen and clock.steps and not self._asked_for_seeds:
            raise UsageError(
                "a cache was asked for and blocks are frozen, but nothing was cached: augment each batch from "
                "session.augmentation_seeds(), called once before its forward pass, or attach without cache=."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.choice.name}

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the engine", {"name": str})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the engine that the state was saved with, for another one rounds otherwise; unless one was asked for."""
        saved, asked = state["name"], self.choice.asked
        if saved == self.choice.name:
            return
        if asked != "auto":
            warnings.warn(
                f'The state was saved with engine="{saved}" and goes on with engine="{asked}", as asked: the two round '
                'differently, so the run is not bit for bit the same. Attach with engine="auto" to go on as it was.',
                stacklevel=4,
            )
            return
        if saved not in engine_names():
            raise StateMismatch(
                f"the state was saved with the engine {saved!r}, which is not known here. Import what registers it, or "
                "attach with the name of another engine."
            )
        is_neutral = self._setting.recipe.is_neutral
        try:
            choice = choose_engine(saved, self.job, is_neutral=is_neutral, tell=say_on_stderr)
        except InvalidArgument as error:
            reason = f"the state was saved with the {saved} engine, which {error.problems[0].rule}"
            self.choice = Choice(self.choice.name, reason, asked)
            say(f"engine {self.choice.name}: {reason}")
            return
        for step in self._steps:
            step.detach("the state was saved with another engine")
        self.engine.detach()
        self._take(Choice(choice.name, "as the state was saved with", asked))

    def detach(self) -> None:
        for step in self._steps:
            step.detach()
        self.engine.detach()
        if self._compiled is not None:
            self._compiled.detach()

    def summarise(self) -> list[str]:
        return [f"engine: {self.choice.name} ({self.choice.reason})"]

    def describe(self) -> list[str]:
        compiled = [] if self._compiled is None else self._compiled.describe()
        return [*self.engine.describe(), *compiled, *(step.describe() for step in self._steps)]

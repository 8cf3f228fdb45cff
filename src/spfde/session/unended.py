"""An epoch that goes on and on, because nobody ends it: told once a session."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from spfde.core.clock import Clock

_REMEDY = (
    "so nothing is mutated, frozen or sieved. Loop over session.epochs(), or call session.end_epoch() after each epoch"
)


class Unended:
    """Looks for signs of it. Loops that were interrupted and started again show some of them, and are no fault.

    Args:
        clock: the session's.
        samples: of an epoch, by this process.
        batch_size: of a batch.

    Attributes:
        n_loops: loops over ``session.epochs()`` that are under way: they end their epochs.
        is_begun_by_hand: ``begin_epoch()`` was called since the session's loader was started last.
        computed: gives the samples that went through the model in this epoch, as the bill counts them.
    """

    def __init__(self, clock: Clock, samples: int, batch_size: int) -> None:
        self._clock, self._samples, self._batch_size = clock, samples, batch_size
        self.n_loops, self.is_begun_by_hand = 0, False
        self.computed: Callable[[], int] = lambda: 0
        self._is_told = False
        self._steps_at_start: int | None = None
        self.begin()

    def begin(self, *, anew: bool = False) -> None:
        """An epoch begins; ``anew``: one that goes on in another run, with all its batches."""
        self._steps_at_start = None
        self._before = (self._clock.steps, self.computed()) if anew else (0, 0)

    def start(self) -> None:
        """The session's loader has been started."""
        self._steps_at_start, self.is_begun_by_hand = self._clock.steps, False

    def check_start(self, *, is_complete: bool) -> None:
        """The loader is to be started amid an epoch, in which steps were taken.

        Args:
            is_complete: all its batches were trained on.
        """
        message = f"session.loader was started again while its epoch has not ended, {_REMEDY}."
        if is_complete:
            message = (
                "session.loader was started again before session.end_epoch(): its batches are not counted now, and "
                "training on them is an error. To look at samples, take another loader."
            )
        else:
            has_left = self._steps_at_start is not None and self._clock.steps > self._steps_at_start
            if not has_left or self.is_begun_by_hand or self.n_loops or self._is_told:
                return
            self._is_told = True
        warnings.warn(message, stacklevel=7)

    def check_step(self, most: int | None) -> None:
        """A step was taken.

        Args:
            most: the steps that an epoch can have; None where that is not known.
        """
        if self._is_told:
            return
        if most is not None and self._clock.steps > most:
            what = f"optimizer steps than the loader has batches ({most})"
        elif self._has_too_many_samples():
            what = f"samples than the {self._samples} of an epoch (or each batch went through the model several times)"
        else:
            return
        self._is_told = True
        message = f"epoch {self._clock.epoch} has had more {what}, and has not ended, {_REMEDY}."
        warnings.warn(message, stacklevel=5)

    def _has_too_many_samples(self) -> bool:
        if self.n_loops:
            return False
        if self._steps_at_start is not None:
            # An interruption may have come just before the end.
            return self._clock.samples_drawn > 2 * self._samples
        if self._clock.epoch:
            return False  # a loop that has ended one ends them all
        steps, computed = self._before
        seen = self.computed() - computed or (self._clock.steps - steps) * self._batch_size
        return seen > self._samples

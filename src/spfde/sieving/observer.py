"""Between the loop and the counter: which samples was this batch, and did the caller report on it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spfde.errors import InvalidArgument, Problem, UsageError
from spfde.sieving.forgetting import ForgettingCounter, correct_from_logits, correct_from_loss
from spfde.sieving.loader import SievedLoader

Gather = Callable[[Any], list[Any]]


class Observer:
    """Takes one report a batch, and notices when one is missing.

    Attributes:
        samples: samples reported in this epoch.
    """

    def __init__(self, counter: ForgettingCounter, loader: SievedLoader, gather: Gather | None = None) -> None:
        """Watch a loader.

        Args:
            counter: where reports go.
            loader: the session's.
            gather: with several processes, collects an object from all ranks; reports then wait for ``exchange``.
        """
        self._counter, self._loader, self._gather = counter, loader, gather
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._awaited = False
        self.samples = 0

    def begin_epoch(self) -> None:
        """Forget about the batches of the epoch before."""
        self._awaited = False
        self.samples = 0

    def await_report(self) -> None:
        """A batch of the session's loader is handed out.

        Raises:
            UsageError: the one before it was not reported.
        """
        self.check_reported()
        self._awaited = True

    def check_reported(self) -> None:
        """Raise ``UsageError`` while a report on the batch drawn last is missing."""
        if self._awaited:
            raise UsageError(
                "observe() was not called for the last batch of session.loader. While samples are sieved, call "
                "session.observe(logits, y) once a batch, and use another loader for evaluation."
            )

    def check_any(self, steps: int) -> None:
        """Raise ``UsageError`` where an epoch's steps were taken on batches that nobody reported."""
        if steps and not self.samples:
            raise UsageError(
                "steps were taken without session.loader and without observe(). While samples are sieved, train on "
                "session.loader, or call session.observe(logits, y, indices=...)."
            )

    def report(self, correct: Tensor, indices: Tensor | None) -> None:
        """Count which samples of a batch the model got right.

        Args:
            correct: bool [N].
            indices: indices of the samples in the data set, [N]; None for the batch drawn last.

        Raises:
            UsageError: there is no batch to report on, or its samples are not known.
            InvalidArgument: lengths differ, or an index is out of range.
        """
        if indices is None:
            indices = self._current()
        indices = torch.as_tensor(indices).detach().cpu().long().reshape(-1)
        if len(indices) != len(correct):
            raise InvalidArgument(
                Problem(
                    "observe",
                    len(correct),
                    f"must have one entry for each of the {len(indices)} samples of the batch",
                    "Pass the whole batch's outputs and labels.",
                )
            )
        if self._gather is None:
            self._counter.observe(indices, correct)
        else:
            self._counter.check_range(indices)
            self._waiting.append((indices, correct.detach()))
        self.samples += len(indices)
        self._awaited = False

    def exchange(self) -> None:
        """Count the reports of all ranks, the same on each. With one process they are counted already."""
        if self._gather is None:
            return
        mine = [(indices, correct.cpu()) for indices, correct in self._waiting]
        self._waiting = []
        for reports in self._gather(mine):
            for indices, correct in reports:
                self._counter.observe(indices, correct)

    def _current(self) -> Tensor:
        if not self._awaited:
            raise UsageError(
                "observe() has nothing to observe: no batch was drawn from session.loader since the last call. "
                "Call it once a batch, or pass indices= for batches from elsewhere."
            )
        current = self._loader.current_indices
        if current is None:
            raise UsageError(
                "observe() cannot tell which samples are in this batch: with in_order=False workers return batches in "
                "any order. Let the data set return each sample's index, and pass it as indices=."
            )
        return current


def correct_from(
    logits: Tensor | None, y: Tensor | None, *, correct: Tensor | None = None, loss: Tensor | None = None
) -> Tensor:
    """Which samples the model got right, bool [N], from exactly one kind of evidence.

    Raises:
        InvalidArgument: none or more than one kind was given.
    """
    from_logits = logits is not None or y is not None
    if from_logits + (correct is not None) + (loss is not None) == 1:
        if logits is not None and y is not None:
            return correct_from_logits(logits, y)
        if correct is not None:
            return torch.as_tensor(correct).detach().bool().reshape(-1)
        if loss is not None:
            return correct_from_loss(loss)
    raise InvalidArgument(
        Problem("observe", "its arguments", "takes logits and y, or correct=, or loss=", "Pass exactly one of them.")
    )

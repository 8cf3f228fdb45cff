"""Between the loop and the scorer: which samples was this batch, and did the caller report on it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem, UsageError
from spfde.sieving.balance import ClassLabels
from spfde.sieving.criteria import Scorer
from spfde.sieving.evidence import check_label_bounds, label_bounds
from spfde.sieving.loader import SievedLoader


class Observer:
    """Takes one report a batch, and notices when one is missing.

    Reports wait until ``exchange``, so that a training step on a GPU waits for none, and count then all at once.

    Attributes:
        samples: samples reported in this epoch.
    """

    def __init__(
        self,
        scorer: Scorer,
        loader: SievedLoader,
        gather: Callable[[Any], list[Any]] = lambda own: [own],
        *,
        classes: ClassLabels | None = None,
        is_needed: bool = True,
    ) -> None:
        """Watch a loader.

        Args:
            scorer: where reports go.
            loader: the session's.
            gather: collects an object from all ranks.
            classes: where the classes in reports go.
            is_needed: whether a batch without a report is a mistake.
        """
        self._scorer, self._loader, self._gather = scorer, loader, gather
        self._classes, self._is_needed = classes, is_needed
        self._n_classes = 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forget about the batches of the epoch before."""
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._bounds: list[Tensor] = []
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
        if self._awaited and self._is_needed:
            raise UsageError(
                "observe() was not called for the last batch of session.loader. While samples are sieved, call "
                "session.observe(logits, y) once a batch, and use another loader for evaluation."
            )

    def check_labels(self, logits: Tensor | None, y: Tensor | None) -> None:
        """Find labels that are no class of the outputs.

        Raises:
            InvalidArgument: there is one. Labels on an accelerator are looked at in ``exchange``, as looking at them
                would make the step wait.
        """
        found = label_bounds(logits, y) if logits is not None and y is not None else None
        if found is None:
            return
        bounds, self._n_classes = found
        if bounds.device.type == "cpu":
            check_label_bounds(bounds, self._n_classes)
        else:
            self._bounds.append(bounds)

    def report(self, values: Tensor, indices: Tensor | None, labels: Tensor | None = None) -> None:
        """Take one value for each sample of a batch.

        Args:
            values: what the batch says of its samples, [N].
            labels: their classes, long [N]; None where these are not asked for.
            indices: indices of the samples in the data set, [N]; None for the batch drawn last.

        Raises:
            UsageError: there is no batch to report on, or its samples are not known.
            InvalidArgument: lengths differ, or an index is out of range.
        """
        if indices is None:
            indices = self._current()
        indices = torch.as_tensor(indices).detach().cpu().long().reshape(-1)
        short = next(
            (len(given) for given in (values, labels) if given is not None and len(given) != len(indices)), None
        )
        if short is not None:
            raise InvalidArgument(
                Problem(
                    "observe",
                    short,
                    f"must have one entry for each of the {len(indices)} samples of the batch",
                    "Pass the whole batch's outputs and labels.",
                )
            )
        self._scorer.check_range(indices)
        # Copies: a caller may reuse its buffers before the values are added up.
        self._waiting.append((indices.clone(), values.detach().clone(), None if labels is None else labels.clone()))
        self.samples += len(indices)
        self._awaited = False

    def exchange(self) -> None:
        """Count the reports of all ranks, the same on each. Every rank has to call it.

        Raises:
            InvalidArgument: see ``check_labels``.
        """
        if self._bounds:
            bounds, self._bounds = torch.stack(self._bounds).cpu(), []
            check_label_bounds(bounds, self._n_classes)
        mine = [_joined(column) for column in zip(*self._waiting, strict=True)]
        self._waiting = []
        for report in filter(None, self._gather(mine)):
            indices, values, labels = report
            self._scorer.observe(indices, values)
            if self._classes is not None and labels is not None:
                self._classes.observe(indices, labels)

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


def _joined(batches: tuple[Any, ...]) -> Tensor | None:
    """One tensor on the CPU; None where nothing was told."""
    if batches[0] is None:
        return None
    if len({batch.device for batch in batches}) > 1:
        batches = tuple(batch.cpu() for batch in batches)
    return torch.cat(batches).cpu()  # one transfer, not one a step

"""Between the loop and the scorer: which samples was this batch, and did the caller report on it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem, UsageError
from spfde.sieving.balance import ClassLabels
from spfde.sieving.criteria import Scorer
from spfde.sieving.evidence import bounds_of_all, check_label_bounds, label_bounds
from spfde.sieving.tickets import Tickets


class Observer:
    """Takes one report a batch, and closes its ticket.

    Reports wait until ``exchange``, so that a training step on a GPU waits for none, and count then all at once.

    Attributes:
        samples: samples reported in this epoch.
    """

    def __init__(
        self,
        scorer: Scorer,
        tickets: Tickets,
        gather: Callable[[Any, Exception | None], list[Any]] | None = None,
        *,
        classes: ClassLabels | None = None,
    ) -> None:
        """Make one.

        Args:
            scorer: where reports go.
            tickets: of the batches that the session's loader has handed out.
            gather: collects an object from all ranks, and ends all where one has an error; by default there is one.
            classes: where the classes in reports go.
        """
        self._scorer, self._tickets, self._gather = scorer, tickets, gather or _alone
        self._classes = classes
        self._n_classes = 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forget about the reports of the epoch before."""
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._bounds: list[tuple[Tensor, ...]] = []
        self.samples = 0

    def check_labels(self, logits: Tensor | None, y: Tensor | None) -> None:
        """Find labels that are no class of the outputs.

        Raises:
            InvalidArgument: there is one. Labels on an accelerator are looked at in ``exchange``, as looking at them
                would make the step wait; there, too, whether real labels of one output are the same two in all batches.
        """
        found = label_bounds(logits, y) if logits is not None and y is not None else None
        if found is None:
            return
        bounds, self._n_classes = found
        is_on_host = bounds[0].device.type == "cpu"
        if is_on_host:
            check_label_bounds(bounds_of_all([bounds]), self._n_classes)
        if not is_on_host or len(bounds) == 4:  # a batch of one label says little of the others'
            self._bounds.append(bounds)

    def report(self, values: Tensor, indices: Tensor | None, labels: Tensor | None = None) -> None:
        """Take one value for each sample of a batch.

        Args:
            values: what the batch says of its samples, [N].
            labels: their classes, long [N]; None where these are not asked for.
            indices: indices of the samples in the data set, [N]; None for the oldest batch that has no report yet.

        Raises:
            UsageError: there is no batch to report on, or its samples are not known.
            InvalidArgument: lengths differ, or an index is out of range; of those on an accelerator that is found in
                ``exchange``.
        """
        is_told = indices is not None
        indices = self._oldest() if indices is None else torch.as_tensor(indices).detach().long().reshape(-1).clone()
        short = next(
            (len(given) for given in (values, labels) if given is not None and len(given) != len(indices)), None
        )
        if short is not None and not is_told and len(self._tickets) > 1:
            raise UsageError(
                f"observe() was not called for a batch of session.loader before this one: the oldest without a report "
                f"has {len(indices)} samples, and this one {short}. Call it once a batch, or pass indices=."
            )
        if short is not None:
            raise InvalidArgument(
                Problem(
                    "observe",
                    short,
                    f"must have one entry for each of the {len(indices)} samples of the batch",
                    "Pass the whole batch's outputs and labels. Samples that collate_fn drops cannot be sieved: leave "
                    "them out of the data set, such as by torch.utils.data.Subset.",
                )
            )
        is_on_host = indices.device.type == "cpu"
        if is_told and is_on_host:
            self._scorer.check_range(indices)
        # Copies: a caller may reuse its buffers before the values are added up.
        self._waiting.append((indices, values.detach().clone(), None if labels is None else labels.clone()))
        self.samples += len(indices)
        if is_told and not is_on_host:
            self._tickets.close_later(indices)
        else:
            self._tickets.close(indices.tolist() if is_told else None)

    def exchange(self) -> None:
        """Count the reports of all ranks, the same on each. Every rank has to call it.

        Raises:
            InvalidArgument: see ``check_labels`` and ``report``.
        """
        bounds, self._bounds = self._bounds, []
        error = None
        try:
            kinds = [(len(bound), bound[0].device, bound[0].dtype) for bound in bounds]
            for kind in dict.fromkeys(kinds):
                alike = [bound for bound, own in zip(bounds, kinds, strict=True) if own == kind]
                check_label_bounds(bounds_of_all(alike), self._n_classes)
        except InvalidArgument as found:
            error = found  # raised at once it would leave the other ranks waiting
        mine = [_joined(column) for column in zip(*self._waiting, strict=True)]
        reports = self._gather(mine, error)
        self._waiting = []
        for report in filter(None, reports):
            indices, values, labels = report
            self._scorer.observe(indices, values)
            if self._classes is not None and labels is not None:
                self._classes.observe(indices, labels)

    def _oldest(self) -> Tensor:
        ticket = self._tickets.oldest
        if ticket is None:
            raise UsageError(
                "observe() has nothing to observe: each batch that was drawn from session.loader has its report. "
                "Call it once a batch, or pass indices= for batches from elsewhere."
            )
        if ticket.ids is None:
            raise UsageError(
                "observe() cannot tell which samples are in this batch: with in_order=False workers return batches in "
                "any order. Let the data set return each sample's index, and pass it as indices=."
            )
        return ticket.ids


def _alone(own: Any, error: Exception | None) -> list[Any]:
    if error is not None:
        raise error
    return [own]


def _joined(batches: tuple[Any, ...]) -> Tensor | None:
    """One tensor on the CPU; None where nothing was told."""
    if batches[0] is None:
        return None
    if len({batch.device for batch in batches}) > 1:
        batches = tuple(batch.cpu() for batch in batches)
    return torch.cat(batches).cpu()  # one transfer, not one a step

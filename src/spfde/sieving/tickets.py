"""Which batches were drawn and are not done with: a ticket each, so that a loader may run ahead of the loop."""

from __future__ import annotations

import operator
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Ticket:
    """A batch that was drawn.

    Attributes:
        keys: what the sampler gave for its samples; None where that is not known.
        size: number of its samples.
        left: those of its samples that no report was about yet, once some were.
    """

    keys: list[Any] | None
    size: int
    left: Counter[int] | None = None

    @property
    def ids(self) -> Tensor | None:
        """Ids of its samples, long [size]; None where they are not known, or no integers."""
        return None if self.keys is None else as_ids(self.keys)


class Tickets:
    """The open tickets, oldest first.

    Args:
        by_report: a ticket is closed by a report on its batch. Otherwise by its training, which is told from the
            backward passes: each batch takes equally many, in the order of drawing, however far the loop draws ahead.
            How many is known at the end of an epoch; in the first one, at least as many as the batches drawn demand.

    Attributes:
        is_asked: somebody asked for the oldest ticket in this epoch, without saying which batch is meant.
        strangers: samples that reports named in this epoch, and that were in no batch that was open.
    """

    def __init__(self, *, by_report: bool) -> None:
        self._by_report = by_report
        self._passes_each = 1
        self._start()
        self.forget()

    def forget(self) -> None:
        """There are none: another epoch begins."""
        if self._n_drawn:
            self._passes_each = max(1, round(self._n_passes() / self._n_drawn))
        self._open: deque[Ticket] = deque()
        self._aside: dict[int, deque[Ticket]] = {}
        self._told: list[Tensor] = []
        self._iteration = -1
        self.is_asked = False
        self.strangers: list[int] = []
        self._start()

    def _start(self) -> None:
        self._trained = False  # since the newest batch was drawn
        self._passes = Counter[int]()  # of each parameter that is watched: a loss need not reach all
        self._is_seen = False  # a backward pass since the last step
        self._n_drawn = self._n_closed = 0
        self._is_plain: bool | None = None  # whether the loop draws a batch only when it is done with the last one
        self._drawing = 0

    def __len__(self) -> int:
        self._catch_up()
        return len(self._open)

    # --- from the loader ---------------------------------------------------------------------------------------------

    def begin(self, iteration: int) -> None:
        """An iteration starts. Tickets of one that was left early wait, should it go on: it may have been put aside."""
        self._catch_up()
        if self._open:
            self._aside[self._iteration] = self._open
            self._open = deque()
        self._iteration = iteration
        self._start()

    def draw(self, iteration: int, keys: list[Any] | None, size: int) -> None:
        """A batch is handed out."""
        if iteration in self._aside:
            back = self._aside.pop(iteration)
            self._open.extendleft(reversed(back))
            self._n_drawn += len(back)
        self.settle()
        self._trained = False
        self._drawing = threading.get_ident()
        self._open.append(Ticket(keys, size))
        self._n_drawn += 1

    def settle(self) -> None:
        """Close what has been trained on."""
        if self._by_report:
            return
        if self._is_plain:
            self._open.clear()
        for _ in range(self._n_trained()):
            self._open.popleft()
            self._n_closed += 1

    def _n_trained(self) -> int:
        """How many of the open tickets, from the oldest on, have been trained on, in a loop that draws ahead."""
        if self._is_plain or not self._n_drawn:
            return 0
        passes = self._n_passes()
        each = max(self._passes_each, -(-passes // self._n_drawn))
        return min(max(0, passes // each - self._n_closed), len(self._open))

    def _n_passes(self) -> int:
        return max(self._passes.values(), default=0)

    # --- from the loop -----------------------------------------------------------------------------------------------

    def train(self, parameter: Tensor) -> None:
        """A backward pass has come to one of the parameters that are watched."""
        self._trained = self._is_seen = True
        self._passes[id(parameter)] += 1

    def stepped(self, optimizer: object) -> None:
        """An optimizer has stepped: where no backward pass was seen before (``autograd.grad``), there was one."""
        if self._open and not self._is_seen:
            self._trained = True
            self._passes[id(optimizer)] += 1
        self._is_seen = False

    def step(self) -> None:
        """The optimizer takes a step: is the batch drawn last the one that is trained on?"""
        if self._is_plain is None and self._open:
            self._is_plain = len(self._open) == 1 and self._drawing == threading.get_ident()

    def ask(self) -> Ticket | None:
        """The batch that comes next through the model, or is in it: the oldest; None where none is open."""
        self.is_asked = True
        self.step()
        if not self._is_plain:
            self.settle()
        return self.oldest

    @property
    def oldest(self) -> Ticket | None:
        """The oldest open ticket."""
        self._catch_up()
        return self._open[0] if self._open else None

    def close(self, ids: Iterable[int] | None = None) -> None:
        """A report has come: on the oldest batch, or on these samples, which may be of no batch, one, or several."""
        self._catch_up()
        if not self._by_report or not self._open:
            return
        if ids is None:
            self._open.popleft()
            return
        given = list(ids)
        same = self._of_these(given)
        if same is not None:
            self._open.remove(same)
            return
        reported = Counter(given)
        for ticket in list(self._open):
            if ticket.keys is not None and (own := ticket.ids) is not None:
                left = Counter(own.tolist()) if ticket.left is None else ticket.left
                ticket.left = left - reported
                reported -= left
                if not ticket.left:
                    self._open.remove(ticket)
        self.strangers += reported.elements()

    def close_later(self, ids: Tensor) -> None:
        """A report has come on samples whose ids are on an accelerator, which is not waited for until it matters."""
        if self._by_report:
            self._told.append(ids)

    def _catch_up(self) -> None:
        """Close what was to be closed later; an accelerator is waited for once."""
        told, self._told = self._told, []
        if told:
            first = told[0].device
            every = torch.cat([ids.to(first) for ids in told]).cpu()
            for ids in torch.split(every, [len(ids) for ids in told]):
                self.close(ids.tolist())

    def _of_these(self, given: list[int]) -> Ticket | None:
        """The ticket of exactly these samples, in any order, or the oldest of so many that are not known."""
        in_order = sorted(given)
        for ticket in self._open:
            if ticket.size != len(given) or ticket.left is not None:
                continue
            if ticket.keys is None or ticket.keys == given:
                return ticket
            own = ticket.ids
            if own is None or sorted(own.tolist()) == in_order:
                return ticket
        return None

    # --- how it stands -----------------------------------------------------------------------------------------------

    def left(self, *, is_ended: bool) -> list[Ticket]:
        """The open tickets of the newest iteration, less the one that is trained on already.

        Args:
            is_ended: whether that iteration has come to its end.
        """
        self._catch_up()
        found = list(self._open)
        if self._by_report:
            return found
        if is_ended and self._is_plain is None and not self._passes:
            return []  # a loop that trains nothing
        if self._is_plain:
            return [] if self._trained or is_ended else found
        return found[self._n_trained() :]


def as_ids(keys: list[Any]) -> Tensor | None:
    """What a sampler gave, as ids, long; None where it is no integers."""
    try:
        return torch.tensor(list(map(operator.index, keys)), dtype=torch.long)
    except (TypeError, ValueError):
        return None

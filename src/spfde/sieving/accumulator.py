"""What is observed in the loop and added up later, so that a training step on a GPU never waits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem, StateMismatch
from spfde.core.state import check_entries

# Adding up may be a sort: it pays to do it seldom. Waiting longer than an epoch or so would only pile up small tensors.
ADD_UP_AT_LEAST = 65_536


class Accumulator(ABC):
    """Notes one value per presentation of a sample; adds them up when a result is read, or about once an epoch.

    A subclass says in ``_start`` which tensors it keeps, one entry per sample, and in ``_add`` how values join.
    """

    def __init__(self, n: int, what: str) -> None:
        """Start an interval.

        Args:
            n: number of sample ids (the length of the data set, also where only a subset is drawn from it).
            what: what is added up, for messages.
        """
        self.n, self._what = n, what
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new interval begins."""
        self._kept = self._start()
        self._drop_pending()

    @abstractmethod
    def _start(self) -> dict[str, Tensor]:
        """What is kept, at the start of an interval: tensors of shape (n,) by name."""

    @abstractmethod
    def _add(self, indices: Tensor, values: Tensor) -> None:
        """Add presentations, in order of time, to what is kept; both on the CPU."""

    def observe(self, indices: Tensor, values: Tensor) -> None:
        """Note one batch; a sample that occurs twice in it is taken in order.

        Args:
            indices: sample ids, shape (batch,), long, on the CPU.
            values: one for each, shape (batch,); any device.

        Raises:
            InvalidArgument: an id is outside [0, n).
        """
        self.check_range(indices)
        # Copies: a caller may reuse its buffers before the values are added up.
        self._pending.append((indices.clone(), values.detach().clone()))
        self._n_pending += indices.numel()
        if self._n_pending >= max(self.n, ADD_UP_AT_LEAST):
            self._add_up()

    def state_dict(self) -> dict[str, Any]:
        """Everything added up so far in this interval: tensors and primitives only."""
        self._add_up()
        return {"n": self.n, **{name: kept.clone() for name, kept in self._kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateMismatch: the state is of another number of samples, or damaged.
        """
        check_entries(state, self._what, {"n": int, **dict.fromkeys(self._kept, Tensor)})
        if state["n"] != self.n:
            raise StateMismatch(
                f"{self._what} of {state['n']} samples do not fit a data set of {self.n}. "
                "Load the state with the data set that it was saved with."
            )
        for name, kept in self._kept.items():
            if state[name].shape != kept.shape or state[name].dtype != kept.dtype:
                raise StateMismatch(f"'{name}' in the state of {self._what} is damaged. Use another checkpoint.")
        self._kept = {name: state[name].detach().to("cpu", copy=True) for name in self._kept}
        self._drop_pending()

    def check_range(self, indices: Tensor) -> None:
        """Raise ``InvalidArgument`` where an id is outside [0, n)."""
        if indices.numel() == 0:
            return
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= self.n:
            wrong = low if low < 0 else high
            remedy = "Pass the positions of the samples in the data set."
            raise InvalidArgument(Problem("indices", wrong, f"must be in [0, {self.n})", remedy))

    def _drop_pending(self) -> None:
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._n_pending = 0

    def _add_up(self) -> None:
        if not self._pending:
            return
        indices, values = zip(*self._pending, strict=True)
        self._drop_pending()
        if len({value.device for value in values}) > 1:
            values = tuple(value.cpu() for value in values)
        self._add(torch.cat(indices), torch.cat(values).cpu())  # one transfer, not one per step

"""What is kept of each sample over an interval, and its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem, StateMismatch
from spfde.core.state import check_entries


class Accumulator(ABC):
    """Adds up one value per presentation of a sample.

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

    @abstractmethod
    def _start(self) -> dict[str, Tensor]:
        """What is kept, at the start of an interval: tensors of shape (n,) by name."""

    @abstractmethod
    def _add(self, indices: Tensor, values: Tensor) -> None:
        """Add presentations, in order of time, to what is kept; both on the CPU."""

    def observe(self, indices: Tensor, values: Tensor) -> None:
        """Add presentations in order of time: sample ids, long, and their values; both of shape (m,), on the CPU.

        Raises:
            InvalidArgument: an id is outside [0, n).
        """
        self.check_range(indices)
        self._add(indices, values)

    def state_dict(self) -> dict[str, Any]:
        """Everything added up so far in this interval: tensors and primitives only."""
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

    def check_range(self, indices: Tensor) -> None:
        """Raise ``InvalidArgument`` where an id is outside [0, n)."""
        if indices.numel() == 0:
            return
        low, high = torch.stack(indices.aminmax()).tolist()
        if low < 0 or high >= self.n:
            wrong = low if low < 0 else high
            remedy = "Pass the positions of the samples in the data set."
            raise InvalidArgument(Problem("indices", wrong, f"must be in [0, {self.n})", remedy))

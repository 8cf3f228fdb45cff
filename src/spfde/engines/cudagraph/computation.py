"""What is computed by recordings: a whole model, or a half of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from spfde.engines.cudagraph.call import Call
from spfde.engines.guards import Guards

_IN_TURN, _IN_ALL = 2, 8
"""How often a call comes, one after another or at all, before it is recorded: a shape met once is not."""


class Computation:
    """A function of a model's parameters and its inputs, and the calls of it so far.

    Args:
        run: computes it by PyTorch.
        guards: the state of the model that it holds for, as it is now.
        modules: that keep parameters which it reads, beside those of the model.
        is_checked: whoever hands it out has looked at the guards.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        guards: Callable[[], Guards],
        *,
        modules: tuple[nn.Module, ...] = (),
        is_checked: bool = False,
    ) -> None:
        self.run, self.guards, self.modules, self.is_checked = run, guards, modules, is_checked
        self._refused: list[tuple[tuple[Any, ...], str]] = []
        self._met: Counter[int] = Counter()
        self._last: tuple[Any, ...] | None = None
        self._in_turn = 0

    def comes(self, call: Call) -> None:
        """This call comes next."""
        self._in_turn = self._in_turn + 1 if call.kind == self._last else 1
        self._last = call.kind

    def is_worth_it(self, call: Call) -> bool:
        """Whether a call of its kind has come often enough to be recorded."""
        kind = hash(call.kind)
        self._met[kind] += 1
        return self._in_turn >= _IN_TURN or self._met[kind] >= _IN_ALL

    def refuse(self, call: Call, reason: str) -> None:
        """It cannot be recorded."""
        self._refused.append((call.signature, reason))

    def refused(self, call: Call) -> str | None:
        """Why a call cannot be recorded, where that is known."""
        return next((reason for signature, reason in self._refused if signature == call.signature), None)

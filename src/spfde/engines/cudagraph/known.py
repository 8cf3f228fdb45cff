"""What was recorded of each kind of call, and when recording one is worth it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from spfde.engines.base import Parts
from spfde.engines.cudagraph.backend import Backend
from spfde.engines.guards import Guards

_IN_TURN, _IN_ALL = 2, 8
"""How often a call comes, one after another or at all, before it is recorded: a shape met once is not."""
_MOST = 16

Recorded = TypeVar("Recorded")


@dataclass(eq=False)
class Known(Generic[Recorded]):
    """A recording, and what it holds for beside its call; without guards whoever looks for it has looked at them."""

    signature: tuple[Any, ...]
    frozen: frozenset[str]
    guards: Guards | None
    recorded: Recorded


def told(recorded: int, replayed: int, what: str, eager: Counter[str]) -> str:
    """How much was recorded and replayed, and what was left to PyTorch, for ``print(session)``."""
    left = "; ".join(f"{count:,} since {reason}" for reason, count in eager.most_common())
    return f"{recorded} stages recorded, {replayed:,} {what} replayed, by PyTorch: {left or 'none'}"


class Recordings(Generic[Recorded]):
    """Finds the recording of a call, and frees those that cannot come back.

    Args:
        backend: records.
        parts: see ``engines.base``.

    Attributes:
        made: how many there were so far.
    """

    def __init__(self, backend: Backend, parts: Parts) -> None:
        self._backend, self._parts = backend, parts
        self._known: list[Known[Recorded]] = []  # the last used first
        self._refused: list[tuple[tuple[Any, ...], str]] = []
        self._met: Counter[int] = Counter()
        self._last: tuple[Any, ...] | None = None
        self._in_turn = 0
        self._frozen: frozenset[str] = frozenset()
        self.made = 0

    def find(self, signature: tuple[Any, ...]) -> Known[Recorded] | None:
        """What was recorded for a call of this signature, and holds still."""
        alike = (each for each in self._known if each.signature == signature)
        known = next((each for each in alike if each.guards is None or each.guards.hold), None)
        if known is not None and known is not self._known[0]:
            self._known.remove(known)
            self._known.insert(0, known)
        return known

    def meet(self, kind: tuple[Any, ...]) -> None:
        """A call of this kind has come."""
        self._in_turn = self._in_turn + 1 if kind == self._last else 1
        self._last = kind

    def reason_against(self, signature: tuple[Any, ...], kind: tuple[Any, ...]) -> str | None:
        """Why a call that is not known is not to be recorded now, as a clause."""
        reason = next((reason for refused, reason in self._refused if refused == signature), None)
        if reason is not None:
            return reason
        met = hash(kind)
        self._met[met] += 1
        if self._in_turn >= _IN_TURN or self._met[met] >= _IN_ALL:
            return None
        return "a call of its kind has not come often enough"

    def refuse(self, signature: tuple[Any, ...], reason: str) -> None:
        """Calls of this signature cannot be recorded."""
        self._refused.append((signature, reason))

    def add(self, signature: tuple[Any, ...], guards: Guards | None, recorded: Recorded) -> Known[Recorded]:
        """Keep a recording."""
        self.made += 1
        known = Known(signature, self._parts.frozen(), guards, recorded)
        self._known.insert(0, known)
        del self._known[_MOST:]
        return known

    def forget_fronts(self) -> None:
        """Free the recordings whose frozen front is gone for good."""
        frozen = self._parts.frozen()
        if frozen == self._frozen:
            return
        self._frozen = frozen
        coming = self._parts.coming()
        kept = [known for known in self._known if known.frozen in coming]
        if len(kept) < len(self._known):
            self._known = kept
            self._backend.free()

    def clear(self) -> None:
        """Free all."""
        self._known.clear()
        self._backend.free()

"""A model whose forward and backward passes are replayed where they can be, and run by PyTorch elsewhere."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from spfde.core.errors import UsageError
from spfde.core.say import say
from spfde.core.torch_private import has_global_hooks
from spfde.engines.base import Parts
from spfde.engines.cudagraph.backend import Backend
from spfde.engines.cudagraph.call import Call, Slots
from spfde.engines.cudagraph.stage import Stage, Token
from spfde.engines.guards import Guards, has_hooks
from spfde.engines.stand_in import bypassed, put_on, take_off

_IN_TURN, _IN_ALL = 2, 8
"""How often a call comes, one after another or at all, before it is recorded: a shape met once is not."""
_MOST_STAGES = 16


@dataclass(eq=False)
class _Known:
    """A stage, and what it holds for beside its call."""

    signature: tuple[Any, ...]
    frozen: frozenset[str]
    guards: Guards
    stage: Stage


class CapturedModel:
    """Computes a model by recordings of its passes.

    Args:
        model: its ``forward`` is replaced on the instance; nothing is registered on it.
        backend: records.
        parts: see ``engines.base``.
        reads: the attributes that its forward pass reads, by name of the module.
        is_strict: what cannot be recorded is an error, and not left to PyTorch.

    Attributes:
        replayed: calls that were replayed, ``eager``: calls left to PyTorch, by reason.
        recorded: stages that were recorded so far.
    """

    name = "cudagraph"

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        parts: Parts,
        *,
        reads: Mapping[str, Any],
        is_strict: bool,
    ) -> None:
        self.model = model
        self.backend, self._parts, self._reads, self._is_strict = backend, parts, reads, is_strict
        self._slots = Slots(model)
        self._known: list[_Known] = []  # the last used first
        self._refused: list[tuple[tuple[Any, ...], str]] = []
        self._met: Counter[int] = Counter()
        self._last: tuple[Any, ...] | None = None
        self._in_turn = 0
        self._frozen: frozenset[str] = frozenset()
        self._pending: weakref.ref[Token] | None = None
        self.replayed, self.recorded = 0, 0
        self.eager: Counter[str] = Counter()
        put_on(self.model, self)

    def bypass(self) -> AbstractContextManager[None]:
        """The model computes as its class says."""
        return bypassed(self.model)

    def detach(self) -> None:
        """Give the model its forward pass back and free the recordings."""
        if take_off(self.model, self):
            self._known.clear()
            self.backend.free()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._stage_for(args, kwargs)
        if isinstance(found, str):
            self.eager[found] += 1
            return type(self.model).forward(self.model, *args, **kwargs)
        known, call = found
        token = Token()
        if call.learns:
            self._pending = weakref.ref(token)
        self.replayed += 1
        return known.stage(call, token)

    # --- which stage -------------------------------------------------------------------------------------------------

    def _stage_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Known, Call] | str:
        """The stage that computes a call, recorded now if need be; or why PyTorch does."""
        if has_global_hooks():
            return "hooks on all modules see each operation"
        is_pending = self._is_pending()
        if not is_pending:
            self._forget_fronts()
        dense = self._parts.dense_gradients()
        call = Call.of(self._slots, args, kwargs, device=self.backend.device, dense=dense)
        known = None if isinstance(call, str) else self._known_for(call)
        if known is None:
            # A module may be another one since: the guards of what was recorded do not hold then.
            self._slots = Slots(self.model)
            call = Call.of(self._slots, args, kwargs, device=self.backend.device, dense=dense)
            known = None if isinstance(call, str) else self._known_for(call)
        if isinstance(call, str):
            return call
        self._in_turn = self._in_turn + 1 if call.kind == self._last else 1
        self._last = call.kind
        if is_pending:
            return "an earlier forward pass waits for its backward pass"
        if known is not None:
            self._known.remove(known)
            self._known.insert(0, known)
            return known, call
        for signature, reason in self._refused:
            if signature == call.signature:
                return reason
        if not self._is_worth_it(call):
            return "a call of its kind has not come often enough"
        return self._record(call)

    def _known_for(self, call: Call) -> _Known | None:
        return next((each for each in self._known if each.signature == call.signature and each.guards.hold), None)

    def _is_pending(self) -> bool:
        token = None if self._pending is None else self._pending()
        return token is not None and not token.is_done

    def _is_worth_it(self, call: Call) -> bool:
        kind = hash(call.kind)
        self._met[kind] += 1
        return self._in_turn >= _IN_TURN or self._met[kind] >= _IN_ALL

    def _record(self, call: Call) -> tuple[_Known, Call] | str:
        compute: Callable[..., Any] = type(self.model).forward.__get__(self.model)
        guards = Guards(self.model, self._reads, ())
        try:
            if any(has_hooks(module) for module in self.model.modules() if module is not self.model):
                raise RuntimeError("a module inside has hooks, which are to see each pass")
            stage = Stage(self.model, compute, call, self.backend, self._parts)
            if not guards.hold:
                raise RuntimeError("an attribute of it is another one after each call")
        except RuntimeError as error:
            reason = f"it cannot be recorded ({str(error).splitlines()[0]})"
            if self._is_strict:
                raise UsageError(
                    f'the model cannot be captured: {reason}. Attach with engine="masked" or "auto".'
                ) from error
            self._refused.append((call.signature, reason))
            say(f"engine {self.name}: the model is left to PyTorch where {reason}")
            return reason
        self.recorded += 1
        known = _Known(call.signature, self._parts.frozen(), guards, stage)
        self._known.insert(0, known)
        del self._known[_MOST_STAGES:]
        return known, call

    def _forget_fronts(self) -> None:
        """Free the stages whose frozen front is gone for good."""
        frozen = self._parts.frozen()
        if frozen == self._frozen:
            return
        self._frozen = frozen
        coming = self._parts.coming()
        kept = [known for known in self._known if known.frozen in coming]
        if len(kept) < len(self._known):
            self._known = kept
            self.backend.free()

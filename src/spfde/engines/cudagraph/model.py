"""A model whose forward and backward passes are replayed where they can be, and run by PyTorch elsewhere."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from spfde.core.errors import UsageError
from spfde.core.say import say
from spfde.core.torch_private import has_global_hooks
from spfde.engines.base import Parts
from spfde.engines.cudagraph.backend import Backend
from spfde.engines.cudagraph.call import Call, Slots
from spfde.engines.cudagraph.computation import Computation
from spfde.engines.cudagraph.front import CachedFront
from spfde.engines.cudagraph.known import Known, Recordings
from spfde.engines.cudagraph.stage import Stage, Token
from spfde.engines.guards import Guards, has_hooks
from spfde.engines.stand_in import bypassed, put_on, take_off


class CapturedModel:
    """Computes a model by recordings of its passes.

    Args:
        model: its ``forward`` is replaced on the instance; nothing is registered on it.
        backend: records.
        parts: see ``engines.base``.
        reads: the attributes that its forward pass reads, by name of the module.
        is_strict: what cannot be recorded is an error, and not left to PyTorch.
        cached: keeps what the frozen front computes; None: nothing is kept.
        before_replay: see ``engines.base.Engine``.

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
        cached: CachedFront | None = None,
        before_replay: Callable[[], Hashable] = tuple,
    ) -> None:
        self.model, self.cached, self._before_replay = model, cached, before_replay
        self.backend, self.reads, self._parts, self._is_strict = backend, reads, parts, is_strict
        self._whole = Computation(
            lambda *args, **kwargs: type(model).forward(model, *args, **kwargs),
            Recordings(backend, parts),
            lambda: Guards(model, reads, ()),
        )
        self._slots = Slots(model)
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
            if self.cached is not None:
                self.cached.clear()
            self._whole.recordings.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        split = None if self.cached is None else self.cached.split(args, kwargs, self._compute)
        return self._compute(self._whole, args, kwargs) if split is None else self._compute(*split, {})

    def _compute(self, what: Computation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute by a replay, or by PyTorch."""
        found = self._stage_for(what, args, kwargs)
        if isinstance(found, str):
            self.eager[found] += 1
            return what.run(*args, **kwargs)
        known, call = found
        token = Token()
        if call.learns:
            self._pending = weakref.ref(token)
        self.replayed += 1
        return known.recorded(call, token)

    # --- which stage -------------------------------------------------------------------------------------------------

    def _stage_for(
        self, what: Computation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Known[Stage], Call] | str:
        """The stage that computes a call, recorded now if need be; or why PyTorch does."""
        if has_global_hooks():
            return "hooks on all modules see each operation"
        is_pending = self._is_pending()
        if not is_pending:
            self._whole.recordings.forget_fronts()
        of_now: Any = {
            "device": self.backend.device,
            "dense": self._parts.dense_gradients(),
            "state": self._before_replay(),
        }
        call = Call.of(self._slots, args, kwargs, **of_now)
        known = None if isinstance(call, str) else what.recordings.find(call.signature)
        if known is None:
            # A module may be another one since: the guards of what was recorded do not hold then.
            self._slots = Slots(self.model)
            call = Call.of(self._slots, args, kwargs, **of_now)
            known = None if isinstance(call, str) else what.recordings.find(call.signature)
        if isinstance(call, str):
            return call
        what.recordings.meet(call.kind)
        if is_pending:
            return "an earlier forward pass waits for its backward pass"
        if known is not None:
            return known, call
        return what.recordings.reason_against(call.signature, call.kind) or self._record(what, call)

    def _is_pending(self) -> bool:
        token = None if self._pending is None else self._pending()
        return token is not None and not token.is_done

    def _record(self, what: Computation, call: Call) -> tuple[Known[Stage], Call] | str:
        guards = what.guards()
        try:
            if any(has_hooks(module) for module in self.model.modules() if module is not self.model):
                raise RuntimeError("a module inside has hooks, which are to see each pass")
            stage = Stage(self.model, what, call, self.backend, self._parts)
            if not guards.hold:
                raise RuntimeError("an attribute of it is another one after each call")
        except RuntimeError as error:
            reason = f"it cannot be recorded ({str(error).splitlines()[0]})"
            if self._is_strict:
                raise UsageError(
                    f'the model cannot be captured: {reason}. Attach with engine="masked" or "auto".'
                ) from error
            what.recordings.refuse(call.signature, reason)
            say(f"engine {self.name}: the model is left to PyTorch where {reason}")
            return reason
        self.recorded += 1
        return what.recordings.add(call.signature, None if what.is_checked else guards, stage), call

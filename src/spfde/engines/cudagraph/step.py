"""A whole training step, recorded once for each stage and replayed: forward, backward, and the optimizer's step.

A graph repeats kernels. What Python does in a step is done beside each replay by whoever follows the loop, who gives a
:class:`Following`.
"""

from __future__ import annotations

import dis
import functools
import types
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spfde.core.errors import UsageError
from spfde.core.say import say
from spfde.core.torch_private import has_global_hooks, tree_flatten, tree_map_only, tree_unflatten
from spfde.engines.base import Parts, Recorder
from spfde.engines.cudagraph.backend import Recording
from spfde.engines.cudagraph.call import Call, Slots
from spfde.engines.cudagraph.known import Known, Recordings, told
from spfde.engines.cudagraph.optimizing import RecordableSteps
from spfde.engines.cudagraph.restoring import draws_beside
from spfde.engines.cudagraph.watching import hooks_of_others
from spfde.engines.guards import PLAIN, Guards


class Following(Protocol):
    """Does beside a replay what hooks do in a step."""

    def begin(self) -> None:
        """A step is about to be taken: what is due before it is done, such as the top of an epoch."""

    def reason_for_good(self) -> str | None:
        """Why each step is more than kernels, as a clause; None where a recording can do what it does."""

    def reason_now(self) -> str | None:
        """Likewise, of the next step."""

    def learning(self) -> AbstractContextManager[Callable[[], Any]]:
        """A context in which a step runs; gives what tells afterwards what the hooks have heard in it."""

    def silence(self) -> AbstractContextManager[None]:
        """A context in which a step is recorded: hooks do to tensors what they do, and count nothing."""

    def before(self, heard: Any) -> None:
        """A step is about to be replayed in which the hooks would hear this."""

    def after(self, heard: Any) -> None:
        """It was replayed."""


@dataclass
class _Whole:
    """A recording of a step.

    Attributes:
        inputs: memory that it reads the arguments from.
        recording: of all its kernels.
        heard: what hooks hear in such a step.
        spec: how what it returns is made of the recording's outputs.
        around: what the function reads from around itself: tensors stay where they are for as long as they are held.
    """

    inputs: Sequence[Tensor]
    recording: Recording
    heard: Any
    spec: Any
    around: Sequence[Any]


_Found = tuple[Call, tuple[Any, ...], tuple[Any, ...], Known[_Whole] | None]


class CapturedStep:
    """A function that trains on a batch, replayed where it can be. ``Session.capture`` makes it, and has an example.

    A stage (frozen front, shapes, mode, autocast) is recorded when it has come twice in turn. Until then, and
    where a step is more than kernels (a mutation that waits for dense gradients), the function itself runs.

    Attributes:
        recorded: stages that were recorded so far.
        replayed: steps that were replayed; ``eager``: steps by PyTorch, by reason.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        recorder: Recorder,
        following: Following,
        parts: Parts,
        is_strict: bool,
    ) -> None:
        """See ``Session.capture``.

        Args:
            step: the function.
            model: the user's own module.
            optimizers: all that step it.
            recorder: see ``engines.base``, as for ``parts``.
            following: see there.
            is_strict: what cannot be recorded is an error, and not left to PyTorch.
        """
        self._step, self._model, self._following, self._is_strict = step, model, following, is_strict
        self._recorder, self._backend = recorder, recorder.backend
        self._slots = Slots(model)
        self._optimizing = RecordableSteps(optimizers, self._backend.device)
        self._recordings: Recordings[_Whole] = Recordings(self._backend, parts)
        # Of the last step of each kind that left the optimizers' state where it was: where that is, and what was heard.
        self._heard: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._given_up: str | None = None
        self._spec: Any = None
        self.replayed = 0
        self.eager: Counter[str] = Counter()
        functools.update_wrapper(self, step)

    @property
    def recorded(self) -> int:
        return self._recordings.made

    def describe(self) -> str:
        """A line for ``print(session)``."""
        name = getattr(self._step, "__name__", "a step")
        return f"captured: {name}; {told(self.recorded, self.replayed, 'steps', self.eager)}"

    def detach(self, reason: str = "the session is detached") -> None:
        """Free the recordings: from now on every step is PyTorch's."""
        self._given_up = reason
        self._recordings.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._given_up is None:
            self._following.begin()
            self._optimizing.write_rates()
        found = self._given_up or self._find(args, kwargs)
        if isinstance(found, str):
            self.eager[found] += 1
            # In the form of the others where those are replayed, for the forms of an optimizer round differently.
            with nullcontext() if self._given_up else self._optimizing.form():
                return _detached(self._step(*args, **kwargs))
        call, signature, kind, known = found
        if known is not None:
            return self._replay(known.recorded, call)
        reason = self._recordings.reason_against(signature, kind)
        if reason is None and (kind not in self._heard or self._heard[kind][0] != self._optimizing.memory):
            reason = "the optimizer makes its state in such a step"
        if reason is not None:
            self.eager[reason] += 1
            return self._rehearse(kind, args, kwargs)
        return self._record(call, signature, kind, args, kwargs)

    # --- which stage -------------------------------------------------------------------------------------------------

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Found | str:
        """The call, its signature, its kind, and what was recorded of it; or why it is for PyTorch."""
        self._recordings.forget_fronts()
        reason = self._following.reason_now()
        if reason is not None:
            return reason
        if has_global_hooks():
            return "hooks on all modules see each operation"
        if self._optimizing.gradients:
            return "gradients are there before it begins"
        state = self._recorder.before_replay()
        found = self._look_up(args, kwargs, state)
        if not isinstance(found, str) and found[3] is None:
            self._slots = Slots(self._model)  # a module may be another one since
            found = self._look_up(args, kwargs, state)
        if isinstance(found, str):
            return self._give_up(found)
        self._recordings.meet(found[2])
        return found

    def _look_up(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Hashable) -> _Found | str:
        call = self._call(args, kwargs, state)
        if isinstance(call, str):
            return call
        signature, kind = self._of(call)
        return call, signature, kind, self._recordings.find(signature)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Hashable) -> Call | str:
        device = self._backend.device
        call = Call.of(self._slots, args, kwargs, device=device, dense=frozenset(), state=state)
        if isinstance(call, str):
            return call
        if not call.learns:
            return "nothing learns in it"
        elsewhere = next((tensor for tensor in call.tensors if tensor.device != device), None)
        return (
            call if elsewhere is None else f"it is given a tensor on {elsewhere.device}, and the model is on {device}"
        )

    def _of(self, call: Call) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What is equal for calls that one recording does, and what is for calls of one kind."""
        kind = (call.kind, self._optimizing.numbers, _around_now(self._step))
        return (kind, call.signature, self._optimizing.memory), kind

    # --- by PyTorch --------------------------------------------------------------------------------------------------

    def _rehearse(self, kind: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step by PyTorch as it would be recorded, and a look at whether a recording would do the same."""
        backend, optimizing, guards = self._backend, self._optimizing, self._guards()
        memory, beside, drawn = optimizing.memory, optimizing.beside, draws_beside(backend.device)
        with (
            backend.watching() as waits,
            backend.aside(),
            self._recorder.bypass(),
            self._following.learning() as heard,
            optimizing.form() as sets_rates,
        ):
            found = self._step(*args, **kwargs)
            changes_rates = sets_rates()
        beside_now = optimizing.beside
        is_steady = memory == optimizing.memory and len(beside) == len(beside_now)
        leaves, _ = tree_flatten(found)
        strange = (f"a {type(leaf).__name__}" for leaf in leaves if not isinstance(leaf, Tensor))
        reasons = (
            changes_rates and "it changes a learning rate: call schedulers outside",
            optimizing.gradients and "gradients are there when it returns: let it end with optimizer.zero_grad()",
            is_steady
            and beside != beside_now
            and "the optimizer counts its steps, or keeps its state, beside the device",
            drawn != draws_beside(backend.device) and "it draws random numbers beside the generator of its device",
            not guards.hold and "it changes what the model's forward pass reads",
            *(f"it returns {kind_of} beside tensors" for kind_of in strange),
            is_steady and waits(),
            *hooks_of_others(self._model, optimizing.optimizers),
        )
        if reason := next(filter(None, reasons), None):
            self._give_up(str(reason))
            return _detached(found)
        if is_steady:
            self._heard[kind] = memory, heard()
        self._say_where_nothing_is_recorded()
        return _detached(found)

    def _guards(self) -> Guards:
        return Guards(self._model, self._recorder.reads, ())

    def _say_where_nothing_is_recorded(self) -> None:
        """Once: such as a step that reads a number from around itself that is another one each time."""
        if not self.recorded and self.eager.total() == _PATIENCE:
            say(f"session.capture: nothing was recorded in {_PATIENCE} steps: {'; '.join(self.eager)}")

    def _give_up(self, reason: str) -> str:
        """Leave the step to PyTorch from now on."""
        if self._is_strict:
            raise UsageError(f'the step cannot be captured: {reason}. Or attach with engine="auto".')
        if self._given_up is None:
            say(f"session.capture: the step is left to PyTorch: {reason}")
        self._given_up = reason
        self._recordings.clear()
        return reason

    # --- recorded ----------------------------------------------------------------------------------------------------

    def _record(self, call: Call, signature: Any, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = [tensor.detach().clone() for tensor in call.tensors]
        guards = self._guards()
        try:
            recording = self._backend.record(functools.partial(self._work, call, inputs), pool="steps")
        except BaseException as error:
            self._optimizing.drop_gradients()  # they were never computed
            if not isinstance(error, RuntimeError):
                raise
            self._give_up(f"it cannot be recorded ({str(error).splitlines()[0]})")
            return _detached(self._step(*args, **kwargs))
        whole = _Whole(inputs, recording, self._heard[kind][1], self._spec, _around(self._step))
        self._recordings.add(signature, guards, whole)
        self._following.before(whole.heard)
        return self._done(whole)

    def _work(self, call: Call, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is recorded."""
        args, kwargs = call.with_tensors(inputs)
        with call.modes(), self._following.silence(), self._optimizing.form(), self._recorder.bypass():
            leaves, self._spec = tree_flatten(self._step(*args, **kwargs))
        return [leaf.detach() for leaf in leaves]

    def _replay(self, whole: _Whole, call: Call) -> Any:
        with torch.no_grad():
            for mine, given in zip(whole.inputs, call.tensors, strict=True):
                mine.copy_(given, non_blocking=True)
        self._following.before(whole.heard)
        whole.recording.replay()
        return self._done(whole)

    def _done(self, whole: _Whole) -> Any:
        self.replayed += 1
        outputs = [output.clone() for output in whole.recording.outputs]
        self._following.after(whole.heard)
        return tree_unflatten(outputs, whole.spec)


def _detached(found: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, found)


_PATIENCE = 50


def _around_now(step: Callable[..., Any]) -> tuple[Any, ...]:
    """What a recording would repeat of :func:`_around`: numbers as they are, and where tensors lie."""
    return tuple(each.data_ptr() if isinstance(each, Tensor) else each for each in _around(step))


def _around(step: Callable[..., Any], seen: frozenset[int] = frozenset()) -> list[Any]:
    """Numbers, strings and tensors that a function, and those that it names, read from around themselves."""
    if id(step) in seen:
        return []
    seen |= {id(step)}
    if isinstance(step, functools.partial):
        return [*_told((*step.args, *step.keywords.values()), seen), *_around(step.func, seen)]
    owner = getattr(step, "__self__", None)
    function = getattr(step, "__func__", step)
    if not isinstance(function, types.FunctionType):
        owner, function = step, vars(type(step)).get("__call__")
    if not isinstance(function, types.FunctionType) or isinstance(owner, nn.Module):
        return []
    code = function.__code__
    found = [function.__globals__.get(name) for name in _globals_of(code)]
    found += [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    if owner is not None and hasattr(owner, "__dict__"):
        found += [value for name, value in vars(owner).items() if name in code.co_names]
    return _told(found, seen)


def _told(values: Iterable[Any], seen: frozenset[int]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, (*PLAIN, Tensor)):
            found.append(value)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)) and not _is_of_torch(value):
            found += _around(value, seen)
    return found


def _is_of_torch(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


@functools.cache
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    inner = (name for each in code.co_consts if isinstance(each, types.CodeType) for name in _globals_of(each))
    own = (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    return tuple(dict.fromkeys((*own, *inner)))


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True

"""The process's random generators, PyTorch's, Python's and NumPy's: used for a while, and left as if nobody had.

All threads share them. So where there are other threads, it is watched what this one draws: PyTorch's operators by a
dispatch mode, Python's generator by the calls into C, NumPy's (which no profiler sees called) by the code that runs and
names it. A generator is put back only where this thread has drawn from it, to its state before the first draw, and
what others draw from the rest stays drawn. Where two threads draw from one generator at a time, what the other one drew
since then comes once more.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import FrameType, MethodType
from typing import Any

import numpy as np
import torch

from spfde.core.plain_kernels import takes_random_numbers
from spfde.core.torch_private import TorchDispatchMode

_OF_PYTHON, _OF_NUMPY = random.random.__self__, np.random.rand.__self__  # type: ignore[attr-defined]
_DRAW_IN_PYTHON = frozenset({"random", "getrandbits", "seed", "setstate"})
_MOVE_IN_TORCH = frozenset({"manual_seed", "seed", "set_state", "set_offset", "graphsafe_set_state"})
_DRAWS_OF_NUMPY = frozenset(name for name in dir(_OF_NUMPY) if not name.startswith("_")) - {"get_state"}
# Packages that are handed NumPy's generator, or name it, and draw from it only for others.
_DRAW_NOTHING = frozenset({"torch", "numpy", "spfde", "inspect", "importlib"})


class GeneratorsRestored:
    """A context in which this thread may draw from the process's generators; afterwards they are as they were.

    Args:
        prepare: called before this thread draws from PyTorch's generators, or reads their state, such as to seed them;
            at once where it cannot be seen when that is.
        watches: watching takes a few times as long as what is watched, where that is Python alone. False: only look
            whether a generator has moved; where another thread may have moved it, nothing is put back, and
            ``is_unclear`` says so. Then do it once more, with ``again``.
        again: the context in which it was done before, whose states are those to put back.

    Attributes:
        is_unclear: a generator moved, and it is not known by whom.

    Example:
        >>> before = torch.get_rng_state()
        >>> with GeneratorsRestored() as generators:
        ...     mark = generators.mark()
        ...     _ = torch.rand(3)
        ...     generators.has_drawn_since(mark)
        True
        >>> torch.equal(before, torch.get_rng_state())
        True
    """

    def __init__(
        self,
        prepare: Callable[[], object] | None = None,
        *,
        watches: bool = True,
        again: GeneratorsRestored | None = None,
    ) -> None:
        self._prepare, self.watches = prepare, watches
        self._known = {} if again is None else again._put_back
        self.is_unclear = self._is_alone = False
        self._put_back: dict[str, Callable[[], object]] = {}
        self._drawn = Counter[str]()
        self._is_busy = False
        self._operators: _Operators | None = None

    def __enter__(self) -> GeneratorsRestored:
        self._above = sys.getprofile()
        # A profiler of the user's is not put aside: with it, all that moves counts as drawn here.
        has_profiler = not (self._above is None or isinstance(self._above, _Calls))
        self._is_alone = has_profiler or len(sys._current_frames()) == 1
        if self._is_alone or not self.watches:
            self._start = self.mark()
            for kind in _KEEP:
                self.keep(kind)
            return self
        self._operators = _Operators(self)
        self._operators.__enter__()  # type: ignore[no-untyped-call]
        sys.setprofile(_Calls(self, self._above if isinstance(self._above, _Calls) else None))
        return self

    def __exit__(self, *error: Any) -> None:
        if self._operators is not None:
            sys.setprofile(self._above)
            self._operators.__exit__(*error)  # type: ignore[no-untyped-call]
        elif not self._is_alone:
            self.has_drawn_since(self._start)
            return
        for kind, put_back in self._put_back.items():
            is_prepared = kind == "torch" and self._prepare is not None
            if self._operators is None or self._drawn[kind] or is_prepared:
                put_back()

    def mark(self) -> tuple[Any, ...]:
        """What ``has_drawn_since`` compares with."""
        if self._operators is None:
            return _torch_state(), random.getstate(), None, numpy_state()
        return self._drawn["torch"], self._drawn["python"], self._drawn["numpy"], numpy_state()

    def has_drawn_since(self, mark: tuple[Any, ...]) -> bool:
        """Whether this thread has drawn from a generator, or seeded one, since then; where it is unclear: may have."""
        now = self.mark()
        by_code = self._operators is None or now[2] != mark[2]
        found = bool(now[:2] != mark[:2] or (by_code and now[3] != mark[3]))
        self.is_unclear |= found and self._operators is None and not self._is_alone
        return found

    # --- what the watchers tell --------------------------------------------------------------------------------------

    def keep(self, kind: str) -> None:
        """Remember the state of a generator, unless it is remembered already."""
        if kind in self._put_back or self._is_busy:
            return
        self._is_busy = True  # the watchers see this, too
        try:
            self._put_back[kind] = self._known.get(kind) or _KEEP[kind]()
            if kind == "torch" and self._prepare is not None:
                self._prepare()
        finally:
            self._is_busy = False

    def draw(self, kind: str) -> None:
        """This thread is about to draw from a generator, or to seed it."""
        if not self._is_busy:
            self.keep(kind)
            self._drawn[kind] += 1


class _Operators(TorchDispatchMode):
    """Sees PyTorch's operators in this thread."""

    def __init__(self, generators: GeneratorsRestored) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generators = generators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if takes_random_numbers(func, args, kwargs or {}):
            self._generators.draw("torch")
        return func(*args, **(kwargs or {}))


class _Calls:
    """Sees what this thread calls: Python's profiler is each thread's own."""

    def __init__(self, generators: GeneratorsRestored, above: _Calls | None) -> None:
        self._generators, self._above = generators, above

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._above is not None:
            self._above(frame, event, argument)
        if event == "c_call":
            self._on_call_into_c(argument)
        elif event == "call" and _names_numpys(frame):
            self._generators.draw("numpy")

    def _on_call_into_c(self, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        if owner is _OF_PYTHON:
            if function.__name__ in _DRAW_IN_PYTHON:
                self._generators.draw("python")
        elif isinstance(owner, torch.Generator) and _is_global(owner):
            if function.__name__ in _MOVE_IN_TORCH:
                self._generators.draw("torch")
            else:
                self._generators.keep("torch")


def _is_global(generator: torch.Generator) -> bool:
    return generator is torch.default_generator or any(generator is own for own in torch.cuda.default_generators)


def _names_numpys(frame: FrameType) -> bool:
    """Whether the code that begins to run has NumPy's generator at hand: a name, an argument, an attribute of one."""
    names, known = frame.f_code.co_names, frame.f_globals
    if str(known.get("__name__")).partition(".")[0] in _DRAW_NOTHING:
        return False
    if "numpy.random" in names or ("numpy" in names and "random" in names):
        return True
    local = list(frame.f_locals.values())
    held = [value for each in local for value in _attributes(each)]
    return any(_is_numpys(value, names) for value in (*map(known.get, names), *local, *held))


def _is_numpys(value: Any, names: tuple[str, ...]) -> bool:
    if value is np:
        return "random" in names
    if value is np.random or value is _OF_NUMPY:
        return not _DRAWS_OF_NUMPY.isdisjoint(names)
    return type(value) is MethodType and value.__self__ is _OF_NUMPY


def _attributes(value: Any) -> list[Any]:
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return []
    return list(own.values()) if isinstance(own, dict) else []


# --- the generators --------------------------------------------------------------------------------------------------


def _keep_torch() -> Callable[[], None]:
    state, on_devices = torch.get_rng_state(), _states_on_devices()

    def put_back() -> None:
        torch.set_rng_state(state)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)

    return put_back


def keep_python() -> Callable[[], None]:
    """What puts Python's generator back to where it is now."""
    state = random.getstate()
    return lambda: random.setstate(state)


def keep_numpy() -> Callable[[], None]:
    """What puts NumPy's generator back to where it is now."""
    state = np.random.get_state()  # noqa: NPY002
    return lambda: np.random.set_state(state)  # noqa: NPY002


_KEEP: Mapping[str, Callable[[], Callable[[], None]]] = {
    "torch": _keep_torch,
    "python": keep_python,
    "numpy": keep_numpy,
}


def _torch_state() -> list[bytes]:
    # Their memory: any operator on them would be a fake one, where tensors are.
    states = (torch.get_rng_state(), *_states_on_devices())
    return [ctypes.string_at(state.data_ptr(), state.untyped_storage().nbytes()) for state in states]


def _states_on_devices() -> list[torch.Tensor]:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if in_use else []


def numpy_state() -> tuple[Any, ...]:
    """The state of NumPy's generator, to be compared."""
    name, keys, *position = np.random.get_state()  # noqa: NPY002
    return name, np.asarray(keys).tobytes(), position

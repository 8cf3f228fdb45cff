"""Has a model changed since it was traced? What the trace has read, compared by identity.

A trace sees what the model's ``forward`` reads: attributes, parameters, buffers, modules. Only that counts, so that a
metric, a counter or an average that the model carries along may change at every step.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat, starmap
from typing import Any, cast

import torch
from torch import Tensor, nn

from spfde.core.errors import Problem
from spfde.core.generators import GeneratorsRestored
from spfde.core.plain_kernels import PlainKernels, uncompiled
from spfde.core.torch_private import BUFFERS, HOOKS, MODULES, PARAMETERS, FakeTensorMode, tree_map_only
from spfde.model.sample import Sample, Untraceable, call_arguments
from spfde.model.trace import like_the_model
from spfde.model.twin import fake_copy

# What the engine itself puts on the model.
FORWARD, HELD = "forward", "_spfde_engine"
PLAIN = (bool, int, float, str, type(None))
"""Types of values that are compared, where others are told by identity."""
# What is read of every module that runs, and says nothing of what it computes.
_OF_EVERY_MODULE = frozenset({*dir(nn.Module), *vars(nn.Module())} - {"training"})


# --- what a trace reads ----------------------------------------------------------------------------------------------


class Reads:
    """Which attributes of which modules are read, by name of the module, while ``notes`` is set.

    Args:
        model: a copy that nobody else has: its modules are of other classes until ``close``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, set[str]] = {}
        self.notes = False
        self._kinds = [(module, type(module)) for module in model.modules()]
        for name, module in list(model.named_modules()):
            self.found[name] = set()
            module.__class__ = self._noting(type(module), self.found[name])

    def close(self) -> None:
        """Let the modules be of their own classes again."""
        for module, kind in self._kinds:
            module.__class__ = kind

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is noted: what the tracer itself reads."""
        before, self.notes = self.notes, False
        try:
            yield
        finally:
            self.notes = before

    def _noting(self, kind: type[nn.Module], found: set[str]) -> type[nn.Module]:
        def read(module: nn.Module, name: str) -> Any:
            if self.notes:
                found.add(name)
            return kind.__getattribute__(module, name)

        body = {"__getattribute__": read, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        made: type[nn.Module] = types.new_class(kind.__name__, (kind,), exec_body=lambda names: names.update(body))
        return made


# --- what is compared ------------------------------------------------------------------------------------------------


class Guards:
    """The state of a model that a trace holds for.

    Args:
        model: the model.
        reads: names of attributes that the trace has read, by name of the module.
        called: names of PyTorch's own modules whose work the graph, or an engine, does as their settings say.
    """

    def __init__(self, model: nn.Module, reads: Mapping[str, Collection[str]], called: Collection[str]) -> None:
        self._modules: list[nn.Module] = []
        self._tables: list[dict[str, Any]] = []  # all that they hold counts
        self._places: list[tuple[dict[str, Any], str]] = []  # what lies there counts
        for name, module in model.named_modules():
            read = {each for each in reads.get(name, ()) if not each.startswith("__")}
            is_called = name in called
            if read or is_called:
                self._look_at(module, read, is_called=is_called, is_root=module is model)
        self._holders = [(table, name) for table, name in self._places if _holds(table.get(name))]
        self._held_in, self._held_as = [table for table, _ in self._places], [name for _, name in self._places]
        self._before = self._state()

    def _look_at(self, module: nn.Module, read: set[str], *, is_called: bool, is_root: bool) -> None:
        own, kind = vars(module), cast("Any", type(module))
        self._modules.append(module)
        self._tables.append(own[MODULES])
        if not is_root:  # whose own hooks run around what was traced
            self._places.append((own, FORWARD))
            self._tables += [own[name] for name in HOOKS]
        parameters, buffers = own[PARAMETERS], own[BUFFERS]
        if is_called or read & {PARAMETERS, BUFFERS}:
            self._tables += [parameters, buffers]
        for name in sorted((read - _OF_EVERY_MODULE) | (_settings(kind) if is_called else set())):
            table = next((table for table in (own, parameters, buffers) if name in table), own)
            self._places.append((table, name))

    @property
    def hold(self) -> bool:
        """Is the model as it was?"""
        return is_same(self._before, self._state())

    def _state(self) -> list[Any]:
        # At each pass, for hundreds of values: no line of Python for each.
        found: list[Any] = [*map(type, self._modules)]
        found += map(dict.get, self._held_in, self._held_as, repeat(_Missing))
        found += chain.from_iterable(map(dict.values, self._tables))
        for table, name in self._holders:
            value = table.get(name)
            if _holds(value):
                found += _held_by(value)
        return found


class ModeGuards:
    """Of a model that cannot be traced: the modes of its modules, and which there are."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, self._state(model)

    @property
    def hold(self) -> bool:
        """Is the model as it was?"""
        return is_same(self._before, self._state(self._model))

    @staticmethod
    def _state(model: nn.Module) -> list[Any]:
        found: list[Any] = []
        for module in model.modules():
            found += [module, module.training]
            _add_hooks(found, vars(module))
        return found


class _Missing:
    """In the place of an attribute that is not there."""


_HOLDERS = (list, dict, set, types.SimpleNamespace)


def _holds(value: Any) -> bool:
    """Whether what an object holds is looked at, too."""
    return type(value) in _HOLDERS or dataclasses.is_dataclass(value)


def _held_by(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, set)) else vars(value).values()


@functools.cache
def _settings(kind: Any) -> frozenset[str]:
    """Names of what a module of PyTorch's is made with."""
    constants = getattr(kind, "__constants__", ())
    return frozenset({"training", *constants, *inspect.signature(kind).parameters})


def _add_hooks(found: list[Any], own: Mapping[str, Any]) -> None:
    for name in HOOKS:
        if own[name]:
            found.extend(own[name].values())


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what the module computes."""
    own = vars(module)
    return any(own[name] for name in HOOKS)


def state_of(module: nn.Module) -> list[Any]:
    """Everything that a module itself, not those inside it, holds."""
    own = vars(module)
    found = [value for name, value in own.items() if name not in (FORWARD, HELD)]
    _add_hooks(found, own)
    for table in (PARAMETERS, BUFFERS, MODULES):
        found.extend(own[table].values())
    return found


def is_same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Do the guards hold still? The same objects, or equal numbers and strings."""
    if len(before) != len(after):
        return False
    if all(map(operator.is_, before, after)):
        return True
    return all(starmap(_is_alike, zip(before, after, strict=True)))


def _is_alike(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, tuple):
        return is_same(one, other)
    return isinstance(one, PLAIN) and bool(one == other)


def read_by(model: nn.Module, sample: Sample) -> dict[str, set[str]]:
    """The attributes that the model's forward pass reads in either mode, by name of the module; on stand-ins alone.

    Raises:
        Untraceable: the forward pass needs real values.
    """
    args, kwargs = call_arguments(sample)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, PlainKernels():
        twin, _ = fake_copy(model, fake)
        args, kwargs = tree_map_only(Tensor, like_the_model(model, fake), (args, kwargs))
        reads = Reads(twin)
        try:
            for training in (True, False):
                twin.train(training)
                reads.notes = True
                with torch.no_grad(), GeneratorsRestored(), uncompiled():
                    twin(*args, **kwargs)
                reads.notes = False
        except Exception as error:  # it is the user's code that runs, on stand-ins
            rule = f"the model's forward pass cannot be followed with it ({type(error).__name__}: {error})"
            remedy = "Pass sample= with the inputs that the model is called with."
            raise Untraceable(Problem("sample", type(sample).__name__, rule, remedy)) from error
        finally:
            reads.close()
    return reads.found

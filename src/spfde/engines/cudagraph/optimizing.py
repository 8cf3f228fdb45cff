"""Optimizers in a form whose steps a graph can hold, with learning rates that it reads from memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from spfde.core.torch_private import version_of
from spfde.engines.guards import PLAIN

_NOTED = ("_opt_called", "_step_count")
"""What schedulers note on an optimizer, of its steps by PyTorch."""
_FUSED = (SGD, Adam, AdamW)
"""Those whose fused form takes the learning rate as a tensor."""


@dataclass
class _Rate:
    """A learning rate that a graph reads: where, what was written there, and the version of that memory then."""

    memory: Tensor
    value: float = math.nan
    version: int = 0


class RecordableSteps:
    """The optimizers of a step that is recorded.

    A graph repeats the numbers that it was recorded with. PyTorch's fused optimizers and ``capturable`` ones
    read the learning rate from the device: within :meth:`form` they have that form, and :meth:`write_rates` writes what
    a scheduler has set there before each step. Of others a new rate is a new recording.

    Args:
        optimizers: the user's; their settings are changed within ``form`` alone.
        device: the model's.

    Attributes:
        optimizers: the same.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self.optimizers, self._device = tuple(optimizers), device
        self._rates: dict[int, _Rate] = {}  # by place of the group, for loading a state replaces the groups
        for at, optimizer, group in self._groups:
            self._form_of(at, optimizer, group)

    @property
    def _groups(self) -> Iterator[tuple[int, Optimizer, dict[str, Any]]]:
        """All parameter groups: their places, their optimizers, and they themselves."""
        pairs = ((optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups)
        return ((at, *pair) for at, pair in enumerate(pairs))

    @contextmanager
    def form(self) -> Iterator[Callable[[], bool]]:
        """A context in which the optimizers step as a graph can hold it; gives what tells whether a rate was set.

        A rate that is set within stays.
        """
        changed: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        for at, optimizer, group in self._groups:
            wanted = self._form_of(at, optimizer, group)
            changed.append((at, group, {name: group[name] for name in wanted}))
            group.update(wanted)
            if "capturable" in wanted:
                _move_counts(optimizer, group)
            if "fused" in wanted and type(optimizer) is SGD and group["momentum"]:
                _begin_momentum(optimizer, group)
        try:
            yield lambda: any("lr" in before and self._is_other(at, group) for at, group, before in changed)
        finally:
            for at, group, before in changed:
                if "lr" in before and self._is_other(at, group):
                    before["lr"] = float(group["lr"])
                group.update(before)

    def _is_other(self, at: int, group: dict[str, Any]) -> bool:
        rate = self._rates[at]
        return group["lr"] is not rate.memory or version_of(rate.memory) != rate.version  # schedulers write to a tensor

    def _form_of(self, at: int, optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of a group that are others within a graph."""
        if group.get("differentiable"):
            return {}
        wanted: dict[str, Any] = {}
        if type(optimizer) in _FUSED and group["fused"] is not False and not group["foreach"] and self._can_fuse(group):
            wanted = {"fused": True, "foreach": False}
        if "capturable" in group and self._device.type == "cuda":
            wanted["capturable"] = True
        if wanted and not self._is_read(group["lr"]):
            wanted["lr"] = self._rate_of(at)
        return wanted

    def _can_fuse(self, group: dict[str, Any]) -> bool:
        begins_otherwise = group.get("momentum") and group["dampening"]  # than with a momentum of zero
        return not begins_otherwise and all(p.device == self._device and p.is_floating_point() for p in group["params"])

    def _rate_of(self, at: int) -> Tensor:
        if at not in self._rates:
            self._rates[at] = _Rate(torch.empty((), dtype=torch.float32, device=self._device))
            self.write_rates()
        return self._rates[at].memory

    def write_rates(self) -> None:
        """Write the learning rates that are others since the last step to where the graph reads them."""
        for at, _, group in self._groups:
            if at not in self._rates or self._is_read(group["lr"]):
                continue
            rate, value = self._rates[at], float(group["lr"])  # a tensor on the CPU is a number, too
            if value != rate.value:
                rate.memory.fill_(value)
                rate.value, rate.version = value, version_of(rate.memory)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The settings that a recording repeats: learning rates where they are not read from memory."""
        found: list[Any] = []
        for at, _, group in self._groups:
            reads_rate = at in self._rates and not self._is_read(group["lr"])
            found += [
                value if type(value) in PLAIN else _comparable(value)
                for name, value in group.items()
                if name != "params" and not (reads_rate and name == "lr")
            ]
        return tuple(found)

    @property
    def memory(self) -> tuple[int, ...]:
        """Where the optimizers' state lies."""
        device = self._device
        return tuple(v.data_ptr() for v in self._state() if isinstance(v, Tensor) and v.device == device)

    @property
    def beside(self) -> tuple[Any, ...]:
        """What the optimizers keep where no graph reaches it: numbers of Python, tensors on another device."""
        held = (value for optimizer in self.optimizers for name, value in vars(optimizer).items() if name not in _NOTED)
        own = [value for value in (*self._state(), *held) if not self._is_read(value)]
        return tuple((_comparable(value), version_of(value) if isinstance(value, Tensor) else 0) for value in own)

    @property
    def gradients(self) -> list[Tensor]:
        """Those that are there now."""
        return [p.grad for _, _, group in self._groups for p in group["params"] if p.grad is not None]

    def drop_gradients(self) -> None:
        """Those that a recording has left are no gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _is_read(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device == self._device

    def _state(self) -> list[Any]:
        found: list[Any] = []
        for _, optimizer, group in self._groups:
            of_optimizer = optimizer.state
            for p in group["params"]:
                if p in of_optimizer:
                    found += of_optimizer[p].values()
        return found


def _move_counts(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Counts of steps lie beside the parameters, where a graph can raise them."""
    for p in group["params"]:
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.device != p.device:
                optimizer.state[p][name] = value.to(p.device)


def _begin_momentum(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """A momentum of zero for those that learn and have none: the fused form takes all of a group, or none of it."""
    for p in group["params"]:
        if p.requires_grad and optimizer.state[p].get("momentum_buffer") is None:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)


def _comparable(value: Any) -> Any:
    """Something that is equal where a recording would be the same."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(each) for each in value)
    return value if isinstance(value, PLAIN) else id(value)

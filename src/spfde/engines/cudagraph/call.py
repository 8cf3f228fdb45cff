"""What a call of the model is made of, and what a recording of it holds for."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.torch_private import BUFFERS, PARAMETERS, takes_tf32, tree_flatten, tree_unflatten
from spfde.engines.guards import PLAIN


class Slots:
    """Where a model keeps its parameters and buffers: read at each call, without a walk over its modules.

    Args:
        model: the model; slots are those of the modules and names that it has now.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = [vars(module) for module in model.modules()]
        self._parameters, self._buffers = (
            [(own[kind], name) for own in tables for name, tensor in own[kind].items() if tensor is not None]
            for kind in (PARAMETERS, BUFFERS)
        )

    def read(self) -> tuple[list[Tensor], list[Tensor]]:
        """What lies in them now, shared tensors once for each of their slots."""
        found = ([table.get(name) for table, name in slots] for slots in (self._parameters, self._buffers))
        parameters, buffers = ([tensor for tensor in each if tensor is not None] for each in found)
        return parameters, buffers


@dataclass(frozen=True)
class Call:
    """A call of a model.

    Attributes:
        tensors: among its arguments, in order.
        learns: gradients of parameters are wanted.
        kind: its shapes and settings.
        signature: what is equal for calls that do the same work, on other numbers, in the same memory.
    """

    tensors: tuple[Tensor, ...]
    learns: bool
    kind: tuple[Any, ...]
    signature: tuple[Any, ...]
    _leaves: tuple[Any, ...]
    _spec: Any
    _device: torch.device

    @classmethod
    def of(
        cls,
        slots: Slots,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        device: torch.device,
        dense: frozenset[str],
        state: Hashable = (),
    ) -> Call | str:
        """The call, or why it is none that can be recorded, as a clause.

        Args:
            slots: of the model's parameters and buffers.
            device: of the model.
            dense: names of the parameters whose gradients are to come unmasked.
            state: what the engine's ``before_replay`` has returned.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        plain = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        strange = next((leaf for leaf in plain if not isinstance(leaf, PLAIN)), None)
        if strange is not None:
            return f"it is called with a {type(strange).__name__}"
        grads = torch.is_grad_enabled()
        if grads and any(tensor.requires_grad for tensor in tensors):
            return "its inputs want gradients"
        if torch.is_inference_mode_enabled():
            return "it runs in inference mode"
        parameters, buffers = slots.read()
        wanted = tuple(parameter.requires_grad for parameter in parameters)
        learns = grads and any(wanted)
        shapes = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)
        kind = (shapes, plain, wanted if learns else None, dense if learns else None, state, switches(device))
        places = tuple(tensor.data_ptr() for tensor in (*parameters, *buffers))
        return cls(tensors, learns, kind, (kind, spec, places), tuple(leaves), spec, device)

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with other tensors in the places of its own."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    @contextmanager
    def modes(self) -> Iterator[None]:
        """The grad mode and the autocast of the call, with a cache of casts that holds none from outside or for later.

        A recording would read a cast that was made before it for ever, and write those that it has made. The cache is
        as it was otherwise: ``torch.compile`` compiles anew where it is switched off.
        """
        kind = self._device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        caches = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        try:
            with (
                torch.set_grad_enabled(self.learns),
                torch.autocast(kind, dtype, enabled=enabled, cache_enabled=caches),
            ):
                yield
        finally:
            torch.clear_autocast_cache()


def switches(device: torch.device) -> tuple[Any, ...]:
    """Switches of PyTorch that choose how operations are computed."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        *takes_tf32(),
    )

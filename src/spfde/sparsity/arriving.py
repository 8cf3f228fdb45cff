"""When gradients are masked: once a backward pass, at its end, where nobody can look at them before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spfde.core.hooks import is_ours, weakly
from spfde.core.torch_private import after_backward, backward_pass, hooks_on_gradient, version_of
from spfde.sparsity.together import GradientMasking
from spfde.sparsity.weight import MaskedWeight


class _Announced:
    """A gradient on its way, told from others by its memory, which nobody else is given as long as it is held here.

    The tensor is not held: autograd takes over one that is its own alone, and copies others.
    """

    def __init__(self, gradient: Tensor) -> None:
        self._memory, self._place = gradient.untyped_storage(), gradient.data_ptr()
        self._version = version_of(gradient)

    def is_now(self, grad: Tensor | None) -> bool:
        """Whether this gradient is the one, and nobody has written to it."""
        return grad is not None and grad.data_ptr() == self._place and version_of(grad) == self._version


class ArrivingGradients:
    """Has each gradient masked before ``backward`` returns, so that clipping and scaling see the sparse one.

    All that arrive in one pass are masked together, at its end. One is masked as it arrives where that would be too
    late: where the pass has others look at it (a hook on the parameter that is not the library's; several processes,
    whose wrappers average gradients meanwhile), and where it is collected dense.

    Args:
        layers: the masked weights by name; those that are dense are left alone.
        mask_now: masks the gradient of one layer, which has just arrived.
        wants_dense: whether dense gradients may be collected in the pass that begins.
    """

    def __init__(
        self,
        layers: Mapping[str, MaskedWeight],
        mask_now: Callable[[MaskedWeight], None],
        wants_dense: Callable[[], bool],
    ) -> None:
        self._layers, self._mask_now, self._wants_dense = layers, mask_now, wants_dense
        self._mask_together = GradientMasking()
        self._pass: int | None = None
        self._may_wait = False
        self._waiting: dict[str, MaskedWeight] = {}
        self._announced: dict[str, _Announced] = {}
        self._hooks: dict[str, Mapping[int, object]] = {}  # those on each parameter, anybody's
        self._newest: list[object] = []
        self._watched: frozenset[str] = frozenset()

    def install(self) -> list[RemovableHandle]:
        """Hook the gradients."""
        handles: list[RemovableHandle] = []
        self._hooks, self._newest = {}, []
        for name, layer in self._layers.items():
            if not layer.is_dense:
                register = layer.parameter.register_post_accumulate_grad_hook
                handles.append(register(weakly(self._arrive, name)))  # type: ignore[no-untyped-call]
                self._hooks[name] = hooks_on_gradient(layer.parameter)
        return handles

    def announce(self, gradients: Mapping[str, Tensor]) -> None:
        """These come masked in the backward pass that runs, and have not arrived yet.

        They are left alone where they arrive as they are. A loss that reaches a weight another way, too, adds to them
        before, and hooks on the parameter write: then they are masked like any.
        """
        if backward_pass() != self._pass:
            self._begin()
        self._announced.update((name, _Announced(found)) for name, found in gradients.items() if name in self._layers)

    def _begin(self) -> None:
        """A backward pass has begun, or a nested one, or the one around it goes on."""
        self._pass, self._announced = backward_pass(), {}
        is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._may_wait = self._pass >= 0 and not is_shared and not self._wants_dense()
        newest: list[object] = [next(reversed(hooks), -1) for hooks in self._hooks.values()]
        if newest != self._newest:
            self._newest, self._watched = newest, self._find_watched()
        if self._pass >= 0:
            after_backward(self._end)

    def _find_watched(self) -> frozenset[str]:
        """The layers with a hook that is somebody else's."""
        return frozenset(name for name, hooks in self._hooks.items() if not all(map(is_ours, hooks.values())))

    def _arrive(self, name: str, parameter: Tensor) -> None:
        if backward_pass() != self._pass:
            self._begin()
        announced = self._announced.pop(name, None)
        is_watched = name in self._watched  # a hook may write in ways that no version tells
        if announced is not None and not is_watched and announced.is_now(parameter.grad):
            self._layers[name].note_masked()  # now: whoever writes to it before the pass ends has it masked again
        elif self._may_wait and not is_watched:
            self._waiting[name] = self._layers[name]
        else:
            self._mask_now(self._layers[name])

    def _end(self) -> None:
        """The backward pass has come to its end. After one that failed, what has arrived waits for the next one's."""
        self._pass, self._announced = None, {}
        layers, self._waiting = self._waiting.values(), {}
        self._mask_together(layers)
        for layer in layers:
            layer.note_masked()

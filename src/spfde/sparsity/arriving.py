"""When gradients are masked: once a backward pass, at its end, where nobody can look at them before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spfde.core.hooks import is_ours, weakly
from spfde.core.torch_private import after_backward, backward_pass, hooks_on_gradient
from spfde.sparsity.together import GradientMasking
from spfde.sparsity.weight import MaskedWeight


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
        self._announced: Collection[str] = ()
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

    def announce(self, names: Collection[str]) -> None:
        """The gradients of these come masked in the backward pass that runs, and have not arrived yet.

        What a pass adds to is masked all the same, unless it was since somebody wrote to it.
        """
        if backward_pass() != self._pass:
            self._begin()
        layers = [layer for name in names if (layer := self._layers.get(name)) is not None]
        self._announced = {layer.name for layer in layers if layer.parameter.grad is None or layer.is_masked}

    def _begin(self) -> None:
        """A backward pass has begun, or a nested one, or the one around it goes on."""
        self._pass, self._announced = backward_pass(), ()
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
        if name in self._announced:
            self._layers[name].note_masked()  # now: whoever writes to it before the pass ends has it masked again
        elif self._may_wait and name not in self._watched:
            self._waiting[name] = self._layers[name]
        else:
            self._mask_now(self._layers[name])

    def _end(self) -> None:
        """The backward pass has come to its end. After one that failed, what has arrived waits for the next one's."""
        self._pass = None
        layers, self._waiting = self._waiting.values(), {}
        self._mask_together(layers)
        for layer in layers:
            layer.note_masked()

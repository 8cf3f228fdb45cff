"""Which backward passes there were, whichever parameters a loss reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spfde.core.hooks import remove_from_within, weakly
from spfde.core.torch_private import backward_pass


class BackwardPasses:
    """Watches the parameters that backward passes reach first: one for each loss, mostly.

    Parameters in order of registration do not tell: the last one may be frozen, never called, or of another loss. So at
    the top of an epoch each one is watched, and at its first gradient it stays watched if its pass has not been noticed
    yet. Later passes cost what those few do.

    Args:
        model: the model.
        listeners: called with a parameter whenever one of those that stay watched has its gradient. They may be bound
            methods, which are not kept alive.

    Attributes:
        heard: called with the parameter that each pass reaches first; None: nobody wants to know.
    """

    def __init__(self, model: nn.Module, *listeners: Callable[[Tensor], None]) -> None:
        self._model = model
        self.heard: Callable[[Tensor], None] | None = None
        self._listeners = [weakly(listener) for listener in listeners]
        self._handles: dict[int, RemovableHandle] = {}
        self._counts = Counter[int]()
        # The compiler may not look into it, where a whole step is compiled.
        self._hook = torch.compiler.disable(weakly(self._note))  # type: ignore[no-untyped-call]
        self.watch()

    def tell(self, listener: Callable[[Tensor], None]) -> None:
        """Add a listener."""
        self._listeners.append(weakly(listener))

    @property
    def count(self) -> int:
        """Passes since ``watch``: the most that one parameter has seen."""
        return max(self._counts.values(), default=0)

    @property
    def n_watched(self) -> int:
        """Parameters that are watched now."""
        return len(self._handles)

    def watch(self) -> None:
        """Watch all parameters that learn now, and count anew."""
        self.stop()
        self._counts.clear()
        self._last = -1
        for parameter in self._model.parameters():
            if parameter.requires_grad and not parameter.is_meta:
                handle = parameter.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]
                self._handles[id(parameter)] = handle

    def stop(self) -> None:
        """Watch nothing."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _note(self, parameter: Tensor) -> None:
        key, running = id(parameter), backward_pass()
        if key not in self._counts and running == self._last:
            handle = self._handles.pop(key, None)
            if handle is not None:
                remove_from_within(handle, parameter)
            return
        self._last = running
        self.count_pass(parameter)

    def count_pass(self, parameter: Tensor) -> None:
        """A backward pass runs that reaches this parameter first, or one was replayed."""
        if self.heard is not None:
            self.heard(parameter)
        self._counts[id(parameter)] += 1
        for listener in self._listeners:
            listener(parameter)

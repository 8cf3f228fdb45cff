"""What is handed to PyTorch's dispatcher: how many operations, and whether a value is read from a tensor; and calls."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_KERNEL = ("detach", "alias", "lift_fresh", "view", "_unsafe_view", "t", "transpose", "select", "slice", "unsqueeze")
_READS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero")


class Operations(TorchDispatchMode):
    """Counts operations by name while it is entered, those in backward passes included.

    Attributes:
        names: how often each was called; views, for which no kernel runs, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in _NO_KERNEL:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        """How often a value was read, for which a GPU would be waited for."""
        return sum(self.names[name] for name in _READS)


class Devices(TorchDispatchMode):
    """Notes operations that bring a tensor from an accelerator to the host, or the other way.

    Attributes:
        copied: their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            self.copied.append(func.__name__)
        return found


def calls(function: Callable[[], object]) -> int:
    """How many functions are called within a call, built-in ones and steps of generators included."""
    counts: Counter[str] = Counter()

    def note(frame: Any, event: str, arg: Any) -> None:
        counts[event] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return counts["call"] + counts["c_call"]

"""What is computed by recordings: a whole model, or a half of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from spfde.engines.cudagraph.known import Recordings
from spfde.engines.guards import Guards

if TYPE_CHECKING:
    from spfde.engines.cudagraph.stage import Stage


@dataclass(frozen=True, eq=False)
class Computation:
    """A function of a model's parameters and its inputs.

    Attributes:
        run: computes it by PyTorch.
        recordings: of its calls.
        guards: the state of the model that it holds for, as it is now.
        modules: that keep parameters which it reads, beside those of the model.
        is_checked: whoever hands it out has looked at the guards.
    """

    run: Callable[..., Any]
    recordings: Recordings[Stage]
    guards: Callable[[], Guards]
    modules: tuple[nn.Module, ...] = ()
    is_checked: bool = False

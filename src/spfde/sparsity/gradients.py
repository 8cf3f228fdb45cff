"""The gradients that a mutation needs: dense ones, and those without a loss scale."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim import Optimizer


class DenseGradients:
    """What each layer's ``p.grad`` would hold at the step if it were not masked.

    Masking after each backward pass removes the inactive part, so that part is kept here and added up over the
    backward passes of one step (gradient accumulation).
    """

    def __init__(self) -> None:
        self.passes: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def collect(self, name: str, grad: Tensor, mask: Tensor, *, accumulates: bool) -> None:
        """Take in one backward pass, before ``grad`` is masked.

        Args:
            accumulates: whether it added to what the last pass of this step has left.
        """
        if accumulates and name in self._buffers:
            # The active part has accumulated in p.grad itself, the inactive part only here.
            self._buffers[name].masked_fill_(mask, 0).add_(grad.detach())
        else:
            self._buffers[name] = grad.detach().to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        self.passes[name] = self.passes.get(name, 0) + 1

    def take(self, names: Collection[str]) -> dict[str, Tensor]:
        """Hand over the gradients that these layers have collected so far, and forget them."""
        return {name: self._buffers.pop(name) for name in list(self._buffers) if name in names}

    def clear(self) -> None:
        """Forget the collected gradients; the count of passes stays."""
        self._buffers = {}


def unscaled(grad: Tensor, optimizer: Optimizer) -> Tensor:
    """A copy of the gradient, without the loss scale that ``GradScaler`` leaves to a fused optimizer."""
    scale = getattr(optimizer, "grad_scale", None)
    return grad.detach().clone() if scale is None else grad.detach() / scale.to(grad.device)

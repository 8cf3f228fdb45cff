"""The gradients that a mutation needs: dense ones, and those without a loss scale."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.optim import Optimizer

from spfde.core.torch_private import find_nonfinite_


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


def nonfinite(gradients: Sequence[Tensor]) -> Tensor:
    """Above zero where any of some gradients, at least one, has an infinite number or a NaN; the host does not look.

    Returns:
        float32, no dimensions, on the device of the first.
    """
    device, found = gradients[0].device, []
    for (dtype, _), own in alike(gradients).items():
        if dtype in (torch.float32, torch.float64):
            found.append(find_nonfinite_(own).reshape(()))
        else:  # the kernels for scalers take no bfloat16 everywhere
            found += [(~gradient.isfinite()).any().float() for gradient in own]
    return torch.stack([flag.to(device) for flag in found]).sum()


def alike(tensors: Iterable[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[Tensor]]:
    """Tensors by type and device: one kernel takes those of one."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return groups


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether all numbers in gradients are finite; an accelerator is waited for once."""
    return not gradients or not bool(nonfinite(gradients))


class Skipped:
    """Whether a fused optimizer skipped its update because ``GradScaler`` found an infinite gradient: true or false.

    The device knows. It is asked when somebody asks this, not at each step.

    Args:
        optimizer: has stepped.

    Attributes:
        found_inf: above zero where it has, shape (1,), on its device; None where no scaler watches.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.found_inf: Tensor | None = getattr(optimizer, "found_inf", None)

    @cached_property
    def _found(self) -> bool:
        return self.found_inf is not None and bool(self.found_inf > 0)

    def __bool__(self) -> bool:
        return self._found

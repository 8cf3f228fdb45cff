"""The statistics of batch norms, estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norms_in(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that keep statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


@torch.no_grad()
def reestimate(
    model: nn.Module,
    batches: Iterable[Tensor],
    forward: Callable[[nn.Module, Tensor], object],
    *,
    kept: Collection[str] = (),
) -> None:
    """Give a model's batch norms the mean statistics of these batches; afterwards it is in evaluation mode.

    All else is in evaluation mode meanwhile, so nothing is drawn from a generator.

    Args:
        model: its norms' buffers are changed, and nothing else.
        batches: what the model is called with; each counts alike.
        forward: calls it.
        kept: names of norms that keep their statistics.
    """
    norms = [norm for name, norm in norms_in(model).items() if name not in kept]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for x in batches:
        forward(model, x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()

"""The run's model, with fresh weights, where it is to be trained."""

from __future__ import annotations

import torch
from torch import nn

from spfde.app.data.images import DataSpec
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions


def built(options: TrainOptions, spec: DataSpec, device: torch.device, *, seed: int | None = None) -> nn.Module:
    """The run's model with fresh weights on a device; ``seed`` as ``build_model`` has it."""
    return (
        build_for(options.model, spec, width=options.width, seed=seed).to(device).to(memory_format=torch.channels_last)
    )

"""Masked weights whose gradients a test chooses, for methods worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spfde.sparsity import Masker, SparsityMethod


class HandRun:
    """Bare parameters under a masker. ``step`` takes the dense gradient of each, in place of a model and its data."""

    def __init__(
        self,
        method: SparsityMethod,
        weights: Mapping[str, Sequence[float]],
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        epochs: int = 10,
    ) -> None:
        self.weights = {name: nn.Parameter(torch.tensor([list(values)])) for name, values in weights.items()}
        self.optimizer = torch.optim.SGD(self.weights.values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        generator = torch.Generator().manual_seed(1)
        self.masker = Masker(self.weights, self.optimizer, method, generator=generator, interval=1, epochs=epochs)
        self.masker.install()

    def step(self, **gradients: Sequence[float]) -> None:
        self.optimizer.zero_grad()
        for name, values in gradients.items():
            (self.weights[name] * torch.tensor([list(values)])).sum().backward()
        self.optimizer.step()

    def weight(self, name: str = "w") -> list[float]:
        return [round(value, 6) for value in self.weights[name].detach().flatten().tolist()]

    def active(self, name: str = "w") -> list[int]:
        """Places of the active weights."""
        return places(self.masker.masks[name])

    def momentum(self, name: str = "w") -> list[float]:
        buffer = self.optimizer.state[self.weights[name]]["momentum_buffer"]
        return [round(value, 6) for value in buffer.flatten().tolist()]


def places(mask: Tensor) -> list[int]:
    """Flat indices of what is True."""
    return mask.flatten().nonzero().squeeze(1).tolist()

"""Masks in training without a session: a timeline over blocks that a test makes up, and the masker that follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import spfde
from spfde.cost.flops import LayerCost, ModelCost
from spfde.freezing.plan import FreezePlan
from spfde.model.blocks import Block, Partition
from spfde.planning.blueprint import Blueprint
from spfde.planning.timeline import Timeline
from spfde.sparsity import SparsityMethod
from spfde.sparsity.masker import Masker


def blueprint_of(
    layers: Mapping[str, nn.Parameter],
    method: SparsityMethod | None,
    *,
    epochs: int,
    interval: int = 1,
    blocks: Sequence[Sequence[str]] | None = None,
    frozen: Mapping[int, int] | None = None,
    pauses: bool = False,
) -> Blueprint:
    """What a recipe would mean for a model of these layers, each of two FLOPs a weight.

    Args:
        layers: the masked weights.
        method: of the masks.
        epochs: length of the run.
        interval: Δτ.
        blocks: names of the layers of each block, front to back; the rest is the head's. None: a block for each layer.
        frozen: how many of the first blocks are frozen, by the epoch from which on that is so.
        pauses: whether freezing is a short pause.
    """
    blocks = [(name,) for name in layers] if blocks is None else blocks
    block_of = {name: index for index, names in enumerate(blocks) for name in names}
    changes, counts = frozen or {}, [0]
    for epoch in range(epochs):
        counts.append(changes.get(epoch, counts[-1]))
    costs = [LayerCost(name, name, at, 2 * p.numel(), p.numel(), len(p)) for at, (name, p) in enumerate(layers.items())]
    return Blueprint(
        method=method,
        epochs=epochs,
        cost=ModelCost(tuple(costs), {}, sum(cost.numel for cost in costs)),
        partition=Partition(tuple(_block(*names) for names in blocks), _block("head")),
        sparse_layers=layers if method is not None else {},
        target={} if method is None else method.counts({name: tuple(p.shape) for name, p in layers.items()}),
        interval=interval,
        freeze_plan=FreezePlan(len(blocks), tuple(counts[1:]), reduction=0.0, pauses=pauses),
        block_of_layer=tuple(block_of.get(name, len(blocks)) for name in layers),
    )


def _block(*names: str) -> Block:
    return Block("".join(names[:1]), parameters=names, modules=(), start=0, stop=0, n_layers=len(names))


def timeline_of(
    layers: Mapping[str, nn.Parameter],
    method: SparsityMethod | None,
    *,
    samples: int = 100,
    sieving: Any = None,
    learning_rate: spfde.freezing.BlockwiseCosine | None = None,
    **blueprint: Any,
) -> Timeline:
    """The timeline of a run with these masks; see ``blueprint_of``."""
    recipe = spfde.Recipe(
        sparsity=method,
        sieving=sieving,
        learning_rate=learning_rate,
        update_interval_epochs=blueprint.get("interval", 1),
    )
    return Timeline(blueprint_of(layers, method, **blueprint), recipe, samples)


class MaskedRun:
    """A masker that follows a timeline.

    Args:
        layers: the masked weights.
        optimizer: of the model.
        method: of the masks.
        timeline: see ``timeline_of``.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        method: SparsityMethod,
        **timeline: Any,
    ) -> None:
        self.optimizer = optimizer
        self.timeline = timeline_of(layers, method, **timeline)
        self.masker = Masker(layers, optimizer, method, generator=torch.Generator().manual_seed(1))
        self.masker.install()

    @property
    def epochs(self) -> int:
        return len(self.timeline)

    def begin_epoch(self, epoch: int) -> None:
        self.masker.begin_epoch(self.timeline[epoch].masks)

    def infer_masks(self) -> None:
        self.masker.infer_masks(self.timeline.most_active())

    @property
    def targets(self) -> dict[str, int]:
        """Active weights of each layer without a soft bound."""
        return {name: layer.target * layer.unit_size for name, layer in self.masker.layers.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Active weights of each layer, as the masker counts them."""
        return {name: layer.active * layer.unit_size for name, layer in self.masker.layers.items()}

    @property
    def pending(self) -> tuple[str, ...]:
        """Layers whose mutation waits for a gradient."""
        return tuple(getattr(self.masker.strategy, "pending", ()))

    @property
    def strategy_state(self) -> dict[str, Any]:
        """What the strategy remembers."""
        return self.masker.state_dict()["strategy"]


class HandRun(MaskedRun):
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
        **timeline: Any,
    ) -> None:
        self.weights = {name: nn.Parameter(torch.tensor([list(values)])) for name, values in weights.items()}
        optimizer = torch.optim.SGD(self.weights.values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(self.weights, optimizer, method, epochs=epochs, **timeline)

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

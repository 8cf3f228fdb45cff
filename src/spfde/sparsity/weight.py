"""One masked weight: its parameter, its mask, and the counts that go with it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from spfde.sparsity import mutation
from spfde.sparsity.explored import Explored
from spfde.sparsity.masks import apply_
from spfde.sparsity.structure import Structure


class MaskedWeight:
    """A weight with its mask.

    Counts are in *units*: what exists or not as a whole, by the structure; of unstructured masks a unit is a weight.

    Attributes:
        name: qualified name of the parameter.
        parameter: the weight.
        structure: what its units are.
        n_units: number of units, existing or not.
        unit_size: active weights of an active unit.
        target: active units by the distribution; methods that move weights between layers change it.
        active: active units now.
        mask: boolean, of the weight's shape, device and memory layout; replaced, never changed.
        is_dense: whether the layer has all its weights whatever happens; then nobody looks after it.
        wider: mask of the weights whose gradient is kept, where these are more than the active ones; else None.
        explored: which weights have ever been active.
        arrived: whether a gradient of this step was masked as it arrived: it is no dense gradient any more.
        clean: identity and version of the gradient that was masked last in this step; None between steps.
    """

    def __init__(self, name: str, parameter: nn.Parameter, structure: Structure, target: int) -> None:
        self.name, self.parameter, self.structure = name, parameter, structure
        shape = tuple(parameter.shape)
        self.numel = parameter.numel()
        self.n_units, self.unit_size = structure.n_units(shape), structure.unit_size(shape)
        self.target = target
        self.clean: tuple[int, int] | None = None
        self.arrived = False
        self.is_dense = target * self.unit_size == self.numel
        self.wider: Tensor | None = None
        self.explored = Explored(self.numel)
        self.set_mask(torch.ones(shape, dtype=torch.bool), self.n_units)

    @property
    def gradient_mask(self) -> Tensor:
        """What of a gradient is kept."""
        return self.mask if self.wider is None else self.wider

    @property
    def n_gradient(self) -> int:
        """Units whose gradient is kept."""
        return self.active if self.wider is None else int(self.wider.sum()) // self.unit_size

    @property
    def density(self) -> float:
        """Share of active weights."""
        return self.active * self.unit_size / self.numel

    def set_mask(self, mask: Tensor, n_active: int) -> None:
        """Take another mask, of ``n_active`` active units."""
        # Laid out like the weight (channels_last), a mask is applied without strided copies.
        self.mask = torch.empty_like(self.parameter, dtype=torch.bool, requires_grad=False).copy_(mask)
        self.active = n_active

    def follow(self, *, layout: bool = False) -> None:
        """Move the mask to where ``model.to(...)`` has moved the weight since, and on request lay it out alike."""
        moved = self.mask.device != self.parameter.device
        if moved or (layout and self.mask.stride() != self.parameter.stride()):
            self.set_mask(self.mask, self.active)
        if moved and self.wider is not None:
            self.wider = self.wider.to(self.parameter.device)

    def draw(self, n_active: int, *, by: Literal["random", "magnitude"], generator: torch.Generator) -> None:
        """Choose ``n_active`` units for the first mask: random ones, or the largest."""
        structure, shape = self.structure, tuple(self.parameter.shape)
        weight = self.parameter.detach()
        if by == "magnitude":
            score, of_weights = self.unit_scores(weight.abs()), weight.abs()
        else:
            score, of_weights = mutation.random_score((self.n_units,), generator), None
        units = structure.choose(score, n_active)
        self.set_mask(structure.expand(units, shape, score=of_weights, generator=generator), n_active)

    def note_explored(self) -> None:
        """Count the active weights as explored."""
        self.explored.add(self.mask)

    def clear_outside(self, optimizer: torch.optim.Optimizer, mask: Tensor | None = None) -> None:
        """Zero the weight and its optimizer state where its mask, or the given one, has no weight."""
        mask = self.mask if mask is None else mask
        apply_(self.parameter, mask)
        self.clear_state_outside(optimizer, mask)

    def clear_state_outside(self, optimizer: torch.optim.Optimizer, mask: Tensor) -> None:
        """Zero the optimizer state of the weight's shape where ``mask`` has no weight."""
        state = optimizer.state.get(self.parameter)
        if not state:
            return
        for value in state.values():
            # Integer state (a quantised moment) has no zero that could be told from its bits.
            if isinstance(value, Tensor) and value.shape == self.parameter.shape and value.is_floating_point():
                apply_(value, mask)

    def unit_scores(self, score: Tensor) -> Tensor:
        """Score of each unit, shape (n_units,), from one of each weight."""
        return self.structure.reduce(score, "l2")

    def mutate(
        self,
        survive: int,
        final: int,
        *,
        drop_score: Tensor | None,
        grow_score: Tensor | None,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        """Drop to ``survive`` active units and grow to ``final``; what was dropped or is grown is zero, state included.

        Args:
            survive: active units that stay, those of the highest scores.
            final: active units afterwards.
            drop_score: score of each weight, of its shape; None: at random.
            grow_score: score of each weight by which inactive units grow, highest first; None: at random.
            optimizer: whose state is cleared.
            generator: a CPU generator for what is random.
        """
        structure, shape = self.structure, tuple(self.parameter.shape)
        units, kept = structure.units_of(self.mask), self.mask
        if survive < self.active:
            units = structure.drop(units, self._ranks(drop_score, generator), survive)
            kept = structure.expand(units, shape, previous=self.mask, score=None, generator=generator)
        # A dropped weight may come back at once, and then starts from zero like any other that is grown.
        self.clear_outside(optimizer, kept.to(self.mask.device))
        if final > survive:
            units = structure.grow(units, self._ranks(grow_score, generator), final)
            kept = structure.expand(units, shape, previous=kept, score=grow_score, generator=generator)
        self.set_mask(kept, final)
        self.note_explored()

    def _ranks(self, score: Tensor | None, generator: torch.Generator) -> Tensor:
        """A score of each unit, shape (n_units,)."""
        if score is None:
            return mutation.random_score((self.n_units,), generator).to(self.mask.device)
        return self.unit_scores(score)

"""One masked weight: its parameter, its mask, and the counts that go with it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from spfde.core.optimizers import Optimizers
from spfde.core.sharding import own_part
from spfde.core.torch_private import version_of
from spfde.sparsity.masks import apply_, factors, pack, unpack
from spfde.sparsity.structure import Structure

MOST_COPIED = 2**20
"""Weights up to which a layer on an accelerator keeps its mask as integers, too."""


def keeps_integers(tensor: Tensor) -> bool:
    """Whether masks of such a tensor are kept as integers of the size of its numbers.

    They spare a kernel's launch for each layer, and take memory. The product of more weights takes longer than a launch
    in any case, and a CPU launches nothing.
    """
    return tensor.device.type != "cpu" and tensor.numel() <= MOST_COPIED and not tensor.is_complex()


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
        mask: boolean, of the shape, device and memory layout of :attr:`local`; replaced, never changed.
        is_dense: whether the layer has all its weights whatever happens; then nobody looks after it.
        wider: mask of the weights whose gradient is kept, where these are more than the active ones; else None.
        explored: which weights have ever been active, packed: the union of all masks (Liu et al., ITOP,
            arXiv 2102.02887).
        arrived: whether a gradient of this step was masked as it arrived: it is no dense gradient any more.
        clean: identity and version of the gradient that was masked last in this step; None between steps.
        is_recorded: see :meth:`keep_in_place`.
        optimizers: whose state is zero where the weight is.
        generator: a CPU generator for what is random.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        structure: Structure,
        target: int,
        *,
        optimizer: torch.optim.Optimizer | Optimizers,
        generator: torch.Generator,
    ) -> None:
        self.name, self.parameter, self.structure = name, parameter, structure
        self.optimizers, self.generator = Optimizers.of(optimizer), generator
        shape = tuple(parameter.shape)
        self.numel = parameter.numel()
        self.n_units, self.unit_size = structure.n_units(shape), structure.unit_size(shape)
        self.target, self.active = target, self.n_units
        self.clean: tuple[int, int] | None = None
        self.arrived = False
        self.is_dense = target * self.unit_size == self.numel
        self.wider: Tensor | None = None
        self.mask = torch.ones_like(self.local, dtype=torch.bool, requires_grad=False)
        self.is_recorded = False
        self._factors: dict[tuple[object, ...], Tensor] = {}
        self.explored = pack(torch.full(self.mask.shape, fill_value=self.is_dense))

    # --- what lies in this process: all of it, unless the model is sharded (``sharded.py``) ---------------------------

    @property
    def local(self) -> Tensor:
        """The part of the weight that lies in this process. Masks, gradients and optimizer state are of its shape."""
        return self.parameter

    @property
    def grad(self) -> Tensor | None:
        """The gradient of that part."""
        return self.parameter.grad

    @property
    def shown(self) -> Tensor:
        """The mask as users see it, of the whole weight's shape."""
        return self.mask

    def whole(self, own: Tensor) -> Tensor:
        """The whole of a tensor of which each process has a part. Masks are decided on whole tensors."""
        return own

    def own(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor that it has as a whole."""
        return whole

    def total(self, count: int) -> int:
        """The sum of what was counted in each process's part."""
        return count

    def adds_up(self, grad: Tensor) -> bool:
        """Whether a gradient that has arrived was added to that of the last pass, which was masked and left alone."""
        return self.clean == (id(grad), version_of(grad) - 1)

    def saved_explored(self) -> Tensor:
        """``explored`` of the whole weight, as it is saved."""
        return self.explored.clone()

    def load_explored(self, saved: Tensor) -> None:
        """Take over what ``saved_explored`` gave."""
        self.explored = saved.to("cpu", copy=True)

    # --- counts and masks --------------------------------------------------------------------------------------------

    @property
    def gradient_mask(self) -> Tensor:
        """What of a gradient is kept."""
        return self.mask if self.wider is None else self.wider

    @property
    def n_gradient(self) -> int:
        """Units whose gradient is kept."""
        return self.active if self.wider is None else int(self.wider.sum()) // self.unit_size

    @property
    def n_explored(self) -> int:
        """Weights that have been active at least once."""
        return int(unpack(self.explored, (self.numel,)).sum())

    @property
    def density(self) -> float:
        """Share of active weights."""
        return self.active * self.unit_size / self.numel

    def set_mask(self, mask: Tensor, n_active: int) -> None:
        """Take another mask, of the whole weight, of ``n_active`` active units."""
        self._take(self.own(mask), n_active)

    def _take(self, mask: Tensor, n_active: int) -> None:
        # Laid out like the weight (channels_last), a mask is applied without strided copies.
        self.mask = torch.empty_like(self.local, dtype=torch.bool, requires_grad=False).copy_(mask)
        for kept in self._factors.values():
            kept.copy_(self.mask)  # in place: a recorded graph may read this memory
        self.active = n_active
        self.explored |= pack(self.mask)

    def follow(self, *, layout: bool = False) -> None:
        """Move the mask to where ``model.to(...)`` has moved the weight since, and on request lay it out alike."""
        local = self.local
        moved = self.mask.device != local.device
        if moved:
            self._factors.clear()
        if moved or (layout and self.mask.stride() != local.stride()):
            self._take(self.mask, self.active)
        if moved and self.wider is not None:
            self.wider = self.wider.to(local.device)

    def keep_in_place(self) -> None:
        """From now on steps read the mask from memory that stays where it is: what was recorded reads it again."""
        self.is_recorded = True
        self._take(self.mask, self.active)  # another tensor: whoever has looked up what to read does so anew

    def factors_for(self, tensor: Tensor) -> Tensor:
        """The mask as what ``masks.bits`` of a tensor of the weight's shape are multiplied with."""
        as_integers = keeps_integers(tensor)
        if not as_integers and not self.is_recorded:
            return self.mask
        kind = tensor.device, tensor.element_size() if as_integers else 0, tensor.stride()
        if kind not in self._factors:
            # Laid out like the tensor, as the integers are.
            as_bools = torch.empty_like(tensor, dtype=torch.bool)
            self._factors[kind] = factors(tensor, self.mask) if as_integers else as_bools.copy_(self.mask)
        return self._factors[kind]

    def mask_gradient(self) -> None:
        """Mask the gradient of this step, which has just arrived."""
        if (grad := self.grad) is not None:
            apply_(grad, self.gradient_mask)
        self.note_masked()

    def note_masked(self) -> None:
        """The gradient of this step is masked: it need not be once more until somebody writes to it."""
        grad = self.grad
        self.arrived = True
        self.clean = None if grad is None else (id(grad), version_of(grad))

    @property
    def is_masked(self) -> bool:
        """Whether there is no gradient, or one that nobody has written to since it was masked."""
        grad = self.grad
        return grad is None or self.clean == (id(grad), version_of(grad))

    def draw(self, n_active: int, *, by: Literal["random", "magnitude"]) -> None:
        """Choose ``n_active`` units for the first mask: random ones, or the largest."""
        score = self.whole(self.local.detach()).abs() if by == "magnitude" else None
        units = self.structure.choose(self._unit_scores(score), n_active)
        self.set_mask(self._expand(units, score=score), n_active)

    def clear_outside(self, mask: Tensor | None = None) -> None:
        """Zero the weight and its optimizer state where its mask, or the given one, has no weight."""
        mask = self.mask if mask is None else mask
        apply_(self.local, mask)
        self.clear_state_outside(mask)

    def clear_state_outside(self, mask: Tensor) -> None:
        """Zero the optimizer state of the weight's shape where ``mask`` has no weight."""
        for value in self.optimizer_state():
            apply_(value, mask)

    def optimizer_state(self) -> list[Tensor]:
        """Floating-point state of its shape. Integers (a quantised moment) have no zero that their bits would tell."""
        shape = self.local.shape
        values = [value for state in self.optimizers.states_of(self.parameter) for value in state.values()]
        found = [own_part(value) for value in values if isinstance(value, Tensor)]
        return [own for own in found if own.shape == shape and own.is_floating_point()]

    def mutate(
        self, survive: int, final: int, *, drop_score: Tensor | None = None, grow_score: Tensor | None = None
    ) -> None:
        """Drop to ``survive`` active units and grow to ``final``; what was dropped or is grown is zero, state included.

        Args:
            survive: active units that stay, those of the highest scores.
            final: active units afterwards.
            drop_score: score of each weight, of the whole one's shape; None: at random.
            grow_score: score of each weight by which inactive units grow, highest first; None: at random.
        """
        kept = self.whole(self.mask)
        units = self.structure.units_of(kept)
        if survive < self.active:
            units = self.structure.drop(units, self._unit_scores(drop_score), survive)
            kept = self._expand(units, previous=kept)
        # A dropped weight may come back at once, and then starts from zero like any other that is grown.
        self.clear_outside(self.own(kept))
        if final > survive:
            units = self.structure.grow(units, self._unit_scores(grow_score), final)
            kept = self._expand(units, previous=kept, score=grow_score)
        self.set_mask(kept, final)

    def _unit_scores(self, score: Tensor | None) -> Tensor:
        """Score of each unit, shape (n_units,), from one of each weight; None: at random."""
        if score is None:
            return torch.rand(self.n_units, generator=self.generator).to(self.mask.device)
        return self.structure.reduce(score)

    def _expand(self, units: Tensor, *, previous: Tensor | None = None, score: Tensor | None = None) -> Tensor:
        shape = tuple(self.parameter.shape)
        return self.structure.expand(units, shape, previous=previous, score=score, generator=self.generator)

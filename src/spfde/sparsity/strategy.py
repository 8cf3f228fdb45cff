"""What a method does to the masks while training goes on; the masker calls it at its times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spfde.core.state import check_entries
from spfde.sparsity import mutation
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.weight import MaskedWeight

if TYPE_CHECKING:
    from spfde.sparsity.masker import Masker


class Strategy:
    """Masks stay as they are, but for what the plan prunes to target: the base, and the strategy of static masks.

    Args:
        masker: gives the layers, the optimizer and the generator.
    """

    changes_every_step = False
    """Whether masks change at every step, so that an epoch has no one density."""

    def __init__(self, masker: Masker) -> None:
        self.masker = masker

    def start(self, layer: MaskedWeight) -> bool:
        """Choose the first mask of a layer from its dense weight; False: it is drawn as the method says."""
        return False

    def begin_epoch(self, plan: MaskPlan, live: Sequence[MaskedWeight]) -> None:
        """The top of an epoch, for the layers that are not frozen; what has to be pruned to target is already."""

    def prune_to_target(self, layers: Iterable[MaskedWeight]) -> None:
        """Drop what these layers hold above their target, by magnitude, and whatever they were waiting for."""
        for layer in layers:
            self.prune(layer, layer.target)

    def prune(self, layer: MaskedWeight, n_active: int) -> None:
        """Drop the smallest units beyond ``n_active``; a layer that has no more keeps them."""
        if layer.active > n_active:
            self.mutate(layer, n_active, n_active, drop_score=mutation.magnitude(layer.parameter))

    def wants_dense(self, layer: MaskedWeight) -> bool:
        """Whether the next gradient of the layer must hold inactive weights too."""
        return False

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None, *, has_closure: bool) -> None:
        """The optimizer is about to step; the gradient is masked."""

    def after_step(self, layer: MaskedWeight, *, was_skipped: bool) -> None:
        """The optimizer has stepped, or a scaler kept it from it: whatever it did, inactive weights are zero."""
        layer.clear_outside(self.masker.optimizer)

    def end_step(self, *, was_skipped: bool, has_closure: bool) -> None:
        """After all layers' ``after_step``: mutations that waited for a gradient."""

    def mutate(
        self,
        layer: MaskedWeight,
        survive: int,
        final: int,
        *,
        drop_score: Tensor | None = None,
        grow_score: Tensor | None = None,
    ) -> None:
        """Drop and grow; see ``MaskedWeight.mutate``."""
        layer.mutate(
            survive,
            final,
            drop_score=drop_score,
            grow_score=grow_score,
            optimizer=self.masker.optimizer,
            generator=self.masker.generator,
        )

    def clear_idle_state(self, layer: MaskedWeight) -> None:
        """Zero the optimizer state of the weights that no step moves."""
        layer.clear_state_outside(self.masker.optimizer, layer.gradient_mask)

    def adopt(self, layer: MaskedWeight) -> None:
        """A mask was taken from the weight's zeros: what is kept beside it begins anew, and nothing waits any more."""

    def clear(self) -> None:
        """Forget gradients that were collected for a mutation."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as tensors and primitives."""
        return {}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """Raise ``StateMismatch`` for a state that cannot be loaded, with those masks."""
        check_entries(state, "the sparse training method", {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checked state, once the masks are loaded."""

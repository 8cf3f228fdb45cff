"""What a method does to the masks while training goes on; the masker calls it at its times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from spfde.core.state import check_entries
from spfde.sparsity.gradients import Skipped
from spfde.sparsity.masker import Masker
from spfde.sparsity.schedule import MaskPlan
from spfde.sparsity.weight import MaskedWeight


class Strategy:
    """Masks stay as they are, but for what the plan prunes to target: the base, and the strategy of static masks.

    A method of another kind returns its own from ``SparsityMethod.strategy``; masks change by ``MaskedWeight.mutate``.

    Args:
        masker: gives the layers, the optimizer and the generator.

    Example:
        >>> class Shuffle(spfde.sparsity.Strategy):
        ...     def begin_epoch(self, plan, live):
        ...         for layer in live:
        ...             layer.mutate(layer.active // 2, layer.active)  # half are dropped at random, and as many grow
        >>> class Shuffled(spfde.sparsity.SparsityMethod):
        ...     name = "shuffled"
        ...     summary = "Half of the weights change places at random in every epoch."
        ...
        ...     def strategy(self, masker):
        ...         return Shuffle(masker)
        >>> recipe = spfde.Recipe(sparsity=Shuffled(sparsity=0.9))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> before = dict(session.masks)
        >>> session.begin_epoch()
        >>> any(not mask.equal(before[name]) for name, mask in session.masks.items()), round(session.density, 2)
        (True, 0.09)
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

    def prune_to_target(self, layers: Sequence[MaskedWeight]) -> None:
        """Drop what these layers hold above their target, by magnitude, and whatever they were waiting for."""
        for layer in layers:
            self.prune(layer, layer.target)

    def prune(self, layer: MaskedWeight, n_active: int) -> None:
        """Drop the smallest units beyond ``n_active``; a layer that has no more keeps them."""
        if layer.active > n_active:
            layer.mutate(n_active, n_active, drop_score=layer.whole(layer.local.detach()).abs())

    def wants_dense(self, layer: MaskedWeight) -> bool:
        """Whether the next gradient of the layer must hold inactive weights too."""
        return False

    def may_want_dense(self) -> bool:
        """Whether :meth:`wants_dense` may be true of any layer now: asked once a backward pass."""
        return type(self).wants_dense is not Strategy.wants_dense

    def follows_next_step(self) -> bool:
        """Whether it does more in the next step than to mask: a step that is replayed would lack that."""
        return self.follows_every_step()

    def follows_every_step(self) -> bool:
        """Whether that holds for all steps."""
        names = ("begin_step", "before_step", "after_step", "begin_steps", "before_steps", "after_steps", "end_step")
        return self.changes_every_step or any(getattr(type(self), n) is not getattr(Strategy, n) for n in names)

    def begin_step(self, layer: MaskedWeight) -> None:
        """A step begins: the weight is as the last one left it."""

    def before_step(self, layer: MaskedWeight, gradient: Tensor | None) -> None:
        """The optimizer is about to step; the gradient is masked. With a closure, after it has run, too."""

    def before_closure(self, layer: MaskedWeight) -> None:
        """The optimizer runs a closure within its step: the model is to compute with the weight that it has."""

    def after_step(self, layer: MaskedWeight, *, was_skipped: Skipped) -> None:
        """The optimizer has stepped, or a scaler kept it from it: whatever it did, inactive weights are zero."""
        layer.clear_outside()

    # The same for all layers that step together. Where nothing is to be done for each of them, none is called.

    def begin_steps(self, layers: Sequence[MaskedWeight]) -> None:
        """:meth:`begin_step` of all."""
        if type(self).begin_step is not Strategy.begin_step:
            for layer in layers:
                self.begin_step(layer)

    def before_steps(self, layers: Sequence[MaskedWeight]) -> None:
        """:meth:`before_step` of all."""
        if type(self).before_step is not Strategy.before_step:
            for layer in layers:
                self.before_step(layer, layer.grad)

    def after_steps(self, layers: Sequence[MaskedWeight], *, was_skipped: Skipped) -> None:
        """:meth:`after_step` of all."""
        if type(self).after_step is Strategy.after_step:
            self.masker.clear_outside(layers)
            return
        for layer in layers:
            layer.follow()
            self.after_step(layer, was_skipped=was_skipped)

    def end_step(self, *, was_skipped: Skipped) -> None:
        """After the ``after_step`` of all layers that stepped: mutations that waited for a gradient."""

    def take_over(self, layer: MaskedWeight) -> bool:
        """Note active weights that somebody else has written, where others are kept beside them; whether there were."""
        return False

    def clear_idle_state(self, layer: MaskedWeight) -> None:
        """Zero the optimizer state of the weights that no step moves."""
        layer.clear_state_outside(layer.gradient_mask)

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

"""An exponential moving average of a model's weights that is as sparse as the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from spfde.freezing.freezer import is_held


def decay_at(update: int, decay: float) -> float:
    """The decay of an update, from 0: the first ones forget faster, or short runs would remember the initial weights.

    Source: the formula of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.

    Example:
        >>> from spfde.app.train.averaging import decay_at
        >>> [round(decay_at(update, 0.99), 3) for update in (0, 10, 10_000)]
        [0.1, 0.55, 0.99]
    """
    return min(decay, (1 + update) / (10 + update))


class Average:
    """Keeps a twin of a model at the moving average of its weights.

    - Masks: weights outside of them are zero. A weight that is grown begins at its own value.
    - What does not learn (frozen blocks) is taken over once, and then costs nothing. Where blocks only pause, their
      average stays as it is meanwhile.
    - Statistics of batch norms and other numbers in buffers are averaged as weights are; whole numbers are copied.

    Args:
        model: the one that is trained.
        twin: another one like it, whose weights become the average.
        masks: gives the masks by parameter name; one that changes is another tensor.
        decay: of the average, in (0, 1).
        pauses: whether what does not learn does so again after a short while.

    Attributes:
        updates: so many have been made.
    """

    def __init__(
        self,
        model: nn.Module,
        twin: nn.Module,
        masks: Callable[[], Mapping[str, Tensor]],
        decay: float,
        *,
        pauses: bool = False,
    ) -> None:
        self._pauses = pauses
        self._model, self.twin, self._masks, self._decay = model, twin, masks, decay
        self.updates = 0
        copy_into(twin, model)
        self.begin()

    def begin(self) -> None:
        """The twin is the average under the masks of now: at the start, and once both were loaded."""
        self._known = dict(self._masks())
        self._learned: tuple[bool, ...] = ()
        self._averaged, self._own = list[Tensor](), list[Tensor]()
        self._counts = list[tuple[Tensor, Tensor]]()

    @torch.no_grad()
    def update(self) -> None:
        """The optimizer has stepped."""
        self.follow()
        if self._own:
            average = get_ema_multi_avg_fn(decay_at(self.updates, self._decay))  # type: ignore[no-untyped-call]
            average(self._averaged, self._own, self.updates)
        self.updates += 1

    @torch.no_grad()
    def finish(self) -> None:
        """The average is about to be used."""
        self.follow()
        for averaged, own in self._counts:
            averaged.copy_(own)

    def follow(self) -> None:
        """Take over which weights exist and which learn."""
        masks = self._masks()
        changed = [name for name, mask in masks.items() if mask is not self._known[name]]
        if changed:
            own, averaged = dict(self._model.named_parameters()), dict(self.twin.named_parameters())
            for name in changed:
                mask = masks[name]
                value = torch.where(self._known[name], averaged[name], own[name])
                averaged[name].copy_(torch.where(mask, value, torch.zeros_like(value)))
            self._known = dict(masks)
        learned = tuple(p.requires_grad for p in self._model.parameters())
        if learned != self._learned:
            self._sort()
            self._learned = learned

    def _sort(self) -> None:
        """What is averaged from now on; what does not learn for good is as the model has it."""
        self._averaged, self._own, self._counts = [], [], []
        others = dict(self.twin.named_modules())
        for name, module in self._model.named_modules():
            for leaf, own in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                averaged = getattr(others[name], leaf).detach()
                if not own.is_floating_point():
                    self._counts.append((averaged, own))
                elif own.requires_grad if isinstance(own, nn.Parameter) else not is_held(module):
                    self._averaged.append(averaged)
                    self._own.append(own.detach())
                elif not self._pauses:
                    averaged.copy_(own)


@torch.no_grad()
def copy_into(twin: nn.Module, model: nn.Module) -> None:
    """Give a twin the model's weights and buffers."""
    for other, own in zip((*twin.parameters(), *twin.buffers()), (*model.parameters(), *model.buffers()), strict=True):
        other.copy_(own)

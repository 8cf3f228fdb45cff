"""How weights are stepped: the optimizer, its learning rate in each epoch, and what a step takes of its batches."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from spfde.app.options import UpdateOptions
from spfde.app.train.options import TrainOptions
from spfde.freezing.rates import learning_rate_factor

STEP_FACTOR = 0.1
"""Of the schedule ``step``, at half and at three quarters of the run: He et al. (2016), section 4.2."""


def make_optimizer(parameters: Iterable[nn.Parameter], options: TrainOptions, *, lr: float | None = None) -> Optimizer:
    """The optimizer that was asked for.

    Args:
        parameters: that it steps.
        options: of the run.
        lr: instead of the run's initial learning rate.
    """
    rate = options.rate if lr is None else lr
    if options.optimizer == "adamw":
        return AdamW(parameters, lr=rate, weight_decay=options.weight_decay)
    return SGD(
        parameters,
        lr=rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
    )


def take_step(optimizer: Optimizer, scaler: GradScaler, clip_norm: float) -> None:
    """Step with the gradients that are there, clipped to a norm of all (0: as they are), and drop them."""
    if clip_norm:
        scaler.unscale_(optimizer)
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def rate_factor(options: TrainOptions, epoch: int) -> float:
    """The learning rate of an epoch, from 0, over the initial one: where the recipe leaves it to the trainer.

    Example:
        >>> from spfde.app.train.optimizing import rate_factor
        >>> from spfde.app.train.options import TrainOptions
        >>> options = TrainOptions(recipe=spfde.presets.mest.to_dict(), schedule="step", warmup=2, epochs=8)
        >>> [round(rate_factor(options, epoch), 3) for epoch in range(8)]
        [0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    warmup = options.warmup or 0
    if options.schedule == "cosine" or epoch < warmup:
        return learning_rate_factor(epoch, stop=options.epochs, warmup=warmup)
    if options.schedule == "constant":
        return 1.0
    return float(STEP_FACTOR ** ((2 * epoch >= options.epochs) + (4 * epoch >= 3 * options.epochs)))


def share_of_step(number: int, n_batches: int, accumulate: int) -> tuple[float, bool]:
    """What the mean loss of a batch counts in its step, and whether it is the step's last one.

    Args:
        number: of the batch in its epoch, from 1.
        n_batches: of the epoch.
        accumulate: batches of a step; the last step of an epoch may have fewer.

    Example:
        >>> from spfde.app.train.optimizing import share_of_step
        >>> [share_of_step(number, 3, 2) for number in (1, 2, 3)]
        [(0.5, False), (0.5, True), (1.0, True)]
    """
    first = (number - 1) // accumulate * accumulate
    size = min(accumulate, n_batches - first)
    return 1 / size, number - first == size


def told(options: TrainOptions) -> str | None:
    """What of the updates is another than usual, in a line; None where nothing is."""
    usual = UpdateOptions()
    found = []
    for name in ("optimizer", "schedule", "warmup", "nesterov", "clip_norm", "accumulate"):
        value = getattr(options, name)
        if value != getattr(usual, name):
            found.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
    return f"updates: {', '.join(found)}, initial learning rate {options.rate:g}" if found else None

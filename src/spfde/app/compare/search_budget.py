"""What a candidate of a search may cost, and the longest run and the widest net that cost no more."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import torch

from spfde.app.data.datasets import describe_data
from spfde.app.data.validation import trained_on
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions, check_full_batch
from spfde.core.errors import InvalidArgument, Problem
from spfde.model.trace import traced_once
from spfde.planning import plan


class Cost(NamedTuple):
    """What a run costs, as planned.

    Attributes:
        flops: training FLOPs.
        step_bytes: of a training step, as PyTorch stores them ("actual"), in the epoch that needs most.
    """

    flops: int
    step_bytes: int


Fits = Callable[[Cost], bool]
"""Whether a run keeps to the budget."""

_UNITS = {
    "flops": ("flops", 1.0),
    **dict.fromkeys(("s", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **{unit.lower(): ("memory", 1024.0**power) for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))},
}
_MOST = 1e18
_WIDTHS = 32
"""A narrower net is looked for at so many widths."""
_STEPS_DOWN = 5
"""Epochs by which a length is shortened where just there no plan can freeze what it should; Δτ is 5 at most."""


@dataclass(frozen=True)
class Budget:
    """What each candidate may cost.

    Attributes:
        kind: modelled training FLOPs, measured seconds, or modelled bytes of a training step.
        limit: per cent of the dense run's FLOPs, seconds, or bytes.
    """

    kind: Literal["flops", "seconds", "memory"]
    limit: float

    @classmethod
    def read(cls, text: str) -> Budget:
        """The budget that a text names.

        Raises:
            InvalidArgument: it names none.

        Example:
            >>> from spfde.app.compare.search_budget import Budget
            >>> Budget.read("10% flops"), Budget.read("2 GiB").limit
            (Budget(kind='flops', limit=10.0), 2147483648.0)
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*([a-z]+)\s*", text, re.IGNORECASE | re.ASCII)
        kind, factor = _UNITS.get(match[3].lower(), (None, 0.0)) if match else (None, 0.0)
        if (
            match is None
            or kind is None
            or bool(match[2]) != (kind == "flops")
            or not 0 < factor * float(match[1]) < _MOST
        ):
            remedy = 'Give a share of the dense run\'s training FLOPs ("10% flops"), "600 seconds", or "2 GiB".'
            raise InvalidArgument(Problem("--budget", text, "is no budget", remedy))
        return cls(kind, factor * float(match[1]))  # type: ignore[arg-type]

    def fits(self, *, dense_flops: int, seconds_per_flop: float) -> Fits:
        """What says whether a run keeps to it.

        Args:
            dense_flops: training FLOPs of the dense run.
            seconds_per_flop: as measured; of a budget in seconds.
        """
        if self.kind == "flops":
            return lambda cost: 100 * cost.flops <= self.limit * dense_flops
        if self.kind == "seconds":
            return lambda cost: seconds_per_flop * cost.flops <= self.limit
        return lambda cost: cost.step_bytes <= self.limit


def planned(options: TrainOptions) -> Cost | InvalidArgument:
    """What a run costs, or why it cannot be planned: nothing can be frozen in so few epochs, say."""
    return _planned(options.model_dump_json(include=_PLANNED))


_PLANNED = {"data", "image_size", "model", "width", "recipe", "epochs", "batch_size", "warmup", "validation_share"}
_described = cache(describe_data)
_built = lru_cache(maxsize=1)(build_for)  # lengths of one net are tried after each other


@cache
def _planned(text: str) -> Cost | InvalidArgument:
    try:
        options = TrainOptions(**json.loads(text))
    except InvalidArgument as error:  # a length that other options need more of
        return error
    recipe = options.load_recipe()
    spec = trained_on(_described(options.data, options.image_size), options.validation_share, options.batch_size)
    model = _built(options.model, spec, width=options.width, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of recipes that may never be trained
        try:
            check_full_batch(recipe, samples=spec.train_samples, batch_size=options.batch_size, epochs=options.epochs)
            sample = torch.zeros(1, *spec.sample_shape)
            bill = plan(model, sample, recipe, options.epochs, spec.train_samples, batch_size=options.batch_size)
        except InvalidArgument as error:
            return error
    return Cost(bill.training_flops, max(bill.memory["actual"].per_epoch))


def longest(options: TrainOptions, fits: Fits) -> TrainOptions | str:
    """The run with as many epochs as fit, at most its own; or why none fits.

    Found by bisection, which takes a longer run to cost more. A length at which the recipe cannot be planned is too
    short.
    """

    def at(epochs: int) -> TrainOptions:
        return options.model_copy(update={"epochs": epochs})

    def is_over(epochs: int) -> bool:
        cost = planned(at(epochs))
        return isinstance(cost, Cost) and not fits(cost)

    reason = "one epoch costs more"
    with traced_once():
        found = _largest(options.epochs, lambda epochs: not is_over(epochs))
        for epochs in range(found, max(0, found - _STEPS_DOWN), -1):
            cost = planned(at(epochs))
            if isinstance(cost, Cost) and fits(cost):
                return at(epochs)
            if epochs == found and isinstance(cost, InvalidArgument):
                reason = f"in {epochs} epochs {cost}"
    return reason


def widest(options: TrainOptions, fits: Fits) -> TrainOptions | str:
    """The run with as wide a net as fits, at most its own, in steps of 1/32 of it; or why none fits."""

    def at(steps: int) -> TrainOptions:
        return options.model_copy(update={"width": options.width * steps / _WIDTHS})

    def is_within(steps: int) -> bool:
        cost = planned(at(steps))
        return isinstance(cost, Cost) and fits(cost)

    try:
        found = _largest(_WIDTHS, is_within)
    except InvalidArgument as error:
        return str(error)
    if found == _WIDTHS:
        return "the dense run as it is costs no more"
    return at(found) if found else f"1/{_WIDTHS} of the width costs more"


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 0 to ``most`` for which it holds, if it holds up to one and for none above it."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low

"""Planning a long run: the work grows with the run's length, no faster, and the length has a bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import spfde
from helpers.counting import calls
from spfde.core.errors import InvalidArgument
from spfde.core.numbers import MOST_EPOCHS
from spfde.freezing import ProgressiveFreezing
from spfde.recipe import presets

SCHEMES = ("single-shot", "single-shot-resume", "periodic", "delayed-periodic")


def recipes() -> Iterator[object]:
    for name, recipe in presets.PRESETS.items():
        yield pytest.param(recipe, id=name, marks=[] if name == "spfde" else [pytest.mark.long])
    whole, soft = presets.PRESETS["spfde"], spfde.MEST(sparsity=0.9, soft_bound=True)
    for scheme in SCHEMES:
        # The first is in reach, the second is not.
        for reduction in (0.2, 0.9):
            freezing = ProgressiveFreezing(flops_reduction=reduction, scheme=scheme, as_far_as_possible=True)
            marks = [] if reduction == 0.2 or scheme == "periodic" else [pytest.mark.long]
            yield pytest.param(whole.replace(freezing=freezing, sparsity=soft), id=f"{scheme} {reduction}", marks=marks)


@pytest.mark.parametrize("recipe", recipes())
def test_a_run_four_times_as_long_is_planned_with_four_times_the_work(recipe):
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 2))

    def work(epochs: int) -> int:
        def planned() -> object:
            bill = spfde.plan(model, torch.zeros(1, 6), recipe, epochs=epochs, samples=100)
            return bill.to_dict(), str(bill)

        return calls(planned)

    work(40)  # what is imported and found once
    # The step from one length to the next, so that what does not grow with it is left out. A search by halving looks
    # once or twice more at a longer run.
    short, middle, long = work(40), work(160), work(640)
    assert long - middle < 4.25 * (middle - short)


@pytest.mark.parametrize("epochs", [0, -1, MOST_EPOCHS + 1, 10**18])
def test_a_run_that_is_too_long_is_refused_with_the_bound_before_anything_is_worked_out(epochs):
    model = nn.Linear(6, 2)
    for refused in (
        lambda: spfde.plan(model, torch.zeros(1, 6), spfde.presets.static, epochs=epochs, samples=100),
        lambda: spfde.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), None, spfde.Recipe(), epochs=epochs),
    ):
        with pytest.raises(InvalidArgument, match=f"{MOST_EPOCHS:,}") as caught:
            refused()
        assert caught.value.problems[0].argument == "epochs"

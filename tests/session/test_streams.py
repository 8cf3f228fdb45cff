"""Loaders of any kind, where nothing is sieved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

import spfde
from helpers.training import BATCH, EPOCHS, SAMPLES, make_images, make_parts, step

RECIPE = spfde.Recipe(
    sparsity=spfde.SET(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    update_interval_epochs=2,
)
SAMPLE = torch.zeros(1, 2, 8, 8)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_images())


class Own(BatchSampler):
    """How it batches is not known."""


def batches() -> Iterator[Any]:
    yield from DataLoader(make_images(), BATCH)


KINDS = {
    "a stream": (DataLoader(Stream(), BATCH), {"sample": SAMPLE, "samples_per_epoch": SAMPLES}),
    "own batches of ids": (
        DataLoader(make_images(), batch_sampler=Own(SequentialSampler(make_images()), 8, False)),
        {},
    ),
    "a list": (list(batches()), {}),
    "a function": (batches, {"sample": SAMPLE, "samples_per_epoch": SAMPLES}),
}


def attach(loader: Any, recipe: spfde.Recipe = RECIPE, **options: Any) -> Any:
    parts = make_parts()
    options = {"epochs": EPOCHS, "engine": "masked", **options}
    return parts, spfde.attach(parts.model, parts.optimizer, loader, recipe, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_as_planned_and_billed_by_the_samples_that_came(kind: str) -> None:
    loader, options = KINDS[kind]
    parts, session = attach(loader, **options)
    for _ in session.epochs():
        for x, y in session.loader:
            step(parts, session, x, y)
    assert session.frozen_blocks > 0
    assert [row.samples for row in session.cost.rows] == [SAMPLES] * EPOCHS
    weights = dict(parts.model.named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in session.masks.items())


def test_without_a_loader_batches_come_from_elsewhere_and_the_epochs_size_is_told() -> None:
    parts, session = attach(None, sample=SAMPLE, samples_per_epoch=SAMPLES)
    for _ in session.epochs():
        for x, y in parts.loader:
            step(parts, session, x, y)
    assert [row.samples for row in session.cost.rows] == [SAMPLES] * EPOCHS
    with pytest.raises(spfde.UsageError, match="loader=None"):
        iter(session.loader)


@pytest.mark.parametrize(
    ("loader", "options", "argument"),
    [
        (DataLoader(Stream(), BATCH), {"sample": SAMPLE}, "samples_per_epoch"),
        (DataLoader(Stream(), BATCH), {"samples_per_epoch": SAMPLES}, "sample"),
        (batches, {"sample": SAMPLE}, "samples_per_epoch"),
        (None, {"sample": SAMPLE}, "samples_per_epoch"),
        (batches, {"sample": SAMPLE, "samples_per_epoch": 0}, "samples_per_epoch"),
        (batches, {"sample": SAMPLE, "samples_per_epoch": 2.5}, "samples_per_epoch"),
        (DataLoader(make_images(), BATCH), {"samples_per_epoch": SAMPLES - BATCH}, "samples_per_epoch"),
        (batches(), {"sample": SAMPLE, "samples_per_epoch": SAMPLES}, "loader"),
        ("abc", {"sample": SAMPLE, "samples_per_epoch": SAMPLES}, "loader"),
        (list(batches()), {"recipe": RECIPE.replace(sparsity=spfde.SNIP(sparsity=0.8))}, "loader"),
        (list(batches()), {"recipe": spfde.presets.spfde}, "loader"),
    ],
)
def test_what_cannot_be_told_is_asked_for_by_name(loader: Any, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(loader, **options)
    assert argument in [problem.argument for problem in caught.value.problems]


@pytest.mark.parametrize("recipe", [RECIPE, spfde.Recipe(sieving=spfde.DataSieving(), update_interval_epochs=2)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_size_of_the_epoch_may_be_told_where_it_is_known_if_it_is_right(
    drop_last: bool, recipe: spfde.Recipe
) -> None:
    loader = DataLoader(make_images(SAMPLES + 1), BATCH, drop_last=drop_last)
    right = SAMPLES + (not drop_last)
    _, session = attach(loader, recipe, samples_per_epoch=right)
    session.detach()
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(loader, recipe, samples_per_epoch=right + 8)
    assert [(problem.argument, problem.value) for problem in caught.value.problems] == [
        ("samples_per_epoch", right + 8)
    ]


def test_an_epoch_that_is_resumed_amid_itself_begins_anew_and_what_is_done_twice_is_billed() -> None:
    loader = list(batches())
    parts, session = attach(loader)
    for number, (x, y) in enumerate(session.loader):
        step(parts, session, x, y)
        if number == 1:
            break
    state, model = session.state_dict(), parts.model.state_dict()
    other, resumed = attach(loader)
    other.model.load_state_dict(model)
    with pytest.warns(UserWarning, match="begins anew"):
        resumed.load_state_dict(state)
    for _ in resumed.epochs():
        for x, y in resumed.loader:
            step(other, resumed, x, y)
    assert [row.samples for row in resumed.cost.rows] == [SAMPLES + 2 * BATCH] + [SAMPLES] * (EPOCHS - 1)

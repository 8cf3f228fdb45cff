"""Models and loaders that a session cannot begin with are refused before anything is changed, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

import spfde
from helpers.training import BATCH, EPOCHS, SAMPLES, SmallNet, make_images, make_parts

SPARSE = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8))
SIEVED = spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.2, criterion="loss"), update_interval_epochs=2)
SAMPLE = torch.zeros(1, 2, 8, 8)


def attach(model: nn.Module, loader: Any, recipe: spfde.Recipe = SPARSE, **options: Any) -> spfde.Session:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return spfde.attach(model, optimizer, loader, recipe, epochs=EPOCHS, engine="masked", **options)


@pytest.mark.parametrize("part", ["", "blocks.1", "blocks.1.bn1"])
@pytest.mark.parametrize("recipe", [SPARSE, spfde.Recipe()])
def test_a_model_or_a_part_of_it_without_values_is_refused(part: str, recipe: spfde.Recipe) -> None:
    model = SmallNet()
    model.get_submodule(part).to("meta")
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(model, make_parts().loader, recipe)
    (problem,) = caught.value.problems
    assert problem.argument == "model"
    assert part in str(problem.value)
    assert "to_empty" in problem.remedy


def test_a_model_without_values_can_be_planned_for() -> None:
    plans = [spfde.plan(model, SAMPLE, SPARSE, EPOCHS, SAMPLES) for model in (SmallNet(), SmallNet().to("meta"))]
    assert plans[0].training_flops == plans[1].training_flops > 0


def test_a_buffer_without_values_is_refused_too() -> None:
    model = SmallNet()
    model.register_buffer("shift", torch.zeros(2, device="meta"))
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(model, make_parts().loader)
    assert "shift" in str(caught.value.problems[0].value)


class Damaged(Dataset[Any]):
    """The first item is damaged: it is None, or cannot be read."""

    def __init__(self, *, raises: bool = False) -> None:
        self.images, self.raises = make_images(), raises

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        if index == 0 and self.raises:
            raise OSError("item 0 is truncated")
        return None if index == 0 else self.images[index]


def dropping(items: list[Any]) -> Any:
    return default_collate([item for item in items if item is not None])


def empty(items: list[Any]) -> Any:
    left = [item for item in items if item is not None]
    return default_collate(left) if left else (torch.zeros(0, 2, 8, 8), torch.zeros(0, dtype=torch.long))


LOADERS = {
    "dropped": lambda: DataLoader(Damaged(), BATCH, collate_fn=dropping),
    "empty": lambda: DataLoader(Damaged(), BATCH, collate_fn=empty),
    "nothing": lambda: DataLoader(Damaged(), BATCH, collate_fn=lambda items: None),
    "not collated": lambda: DataLoader(Damaged(), BATCH),
    "not read": lambda: DataLoader(Damaged(raises=True), BATCH),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_where_the_first_item_makes_no_batch_a_sample_is_asked_for_and_taken(kind: str) -> None:
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(SmallNet(), LOADERS[kind]())
    (problem,) = caught.value.problems
    assert problem.argument == "sample"
    assert "sample=" in problem.remedy
    assert attach(SmallNet(), LOADERS[kind](), sample=SAMPLE).density < 1


@pytest.mark.parametrize("kind", LOADERS)
def test_a_recipe_that_needs_no_trace_goes_on_without_the_first_item_and_says_that_flops_are_unknown(kind: str) -> None:
    session = attach(SmallNet(), LOADERS[kind](), SIEVED)
    assert "FLOPs" in str(session)
    assert session.blueprint.untraced is not None


def test_a_damaged_item_among_those_that_convergence_looks_at_asks_for_a_probe() -> None:
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.1, criterion="representation", probe_samples=SAMPLES)
    recipe = spfde.Recipe(freezing=freezing, learning_rate=None)
    images = [make_images()[index] for index in range(SAMPLES - 1)]
    loader = DataLoader([*images, None], BATCH)
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(SmallNet(), loader, recipe)
    assert (caught.value.problems[0].argument, "probe=" in caught.value.problems[0].remedy) == ("probe", True)

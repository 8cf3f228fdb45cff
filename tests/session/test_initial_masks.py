"""Pruning at initialisation in a session: batches, losses, the bill, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import spfde
from helpers.training import BATCH, SAMPLES, SmallNet, make_parts, train
from spfde.core.errors import InvalidArgument

METHODS = [spfde.SNIP(sparsity=0.8), spfde.GraSP(sparsity=0.8, n_batches=2), spfde.SynFlow(sparsity=0.8, iterations=4)]
IDS = [method.name for method in METHODS]


def attach(recipe: spfde.Recipe, **arguments: Any) -> tuple[Any, spfde.Session]:
    parts = make_parts()
    return parts, spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=4, **arguments)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_the_total_is_exact_and_the_mask_stays(method: spfde.sparsity.SparsityMethod) -> None:
    parts, session = attach(spfde.Recipe(sparsity=method))
    before = session.masks
    total = sum(mask.numel() for mask in before.values())
    per_layer = sum(round(0.2 * mask.numel()) for mask in before.values())
    assert sum(int(mask.sum()) for mask in before.values()) == per_layer
    train(parts, session)
    assert all(torch.equal(before[name], mask) for name, mask in session.masks.items())
    assert session.density == session.explored == per_layer / total


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_choosing_masks_moves_no_generator_no_statistics_and_no_weight(method: spfde.sparsity.SparsityMethod) -> None:
    parts = make_parts()
    model, generator = parts.model, parts.loader.generator
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn, of_loader = torch.get_rng_state(), generator.get_state()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, spfde.Recipe(sparsity=method), epochs=4)
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(of_loader, generator.get_state())
    for name, value in model.state_dict().items():
        mask = session.masks.get(name)
        assert torch.equal(value, state[name] if mask is None else state[name] * mask), name
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_callers_loss_is_called_with_the_model_and_batches_of_the_loader() -> None:
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        seen.append(tuple(x.shape))
        return F.cross_entropy(model(x), y)

    attach(spfde.Recipe(sparsity=spfde.SNIP(sparsity=0.8, n_batches=3)), loss=loss)
    assert seen == [(BATCH, 2, 8, 8)] * 3


def test_the_loss_decides_which_weights_stay() -> None:
    recipe = spfde.Recipe(sparsity=spfde.SNIP(sparsity=0.8))
    _, usual = attach(recipe)
    _, same = attach(recipe, loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    _, other = attach(recipe, loss=lambda model, batch: model(batch[0])[:, 0].square().mean())
    assert all(torch.equal(usual.masks[name], mask) for name, mask in same.masks.items())
    assert not all(torch.equal(usual.masks[name], mask) for name, mask in other.masks.items())


class Named(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((2, 8, 8), float(index)), "label": torch.tensor(index % 4)}


def test_batches_that_are_no_pairs_need_a_loss() -> None:
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Named(), batch_size=BATCH)
    recipe = spfde.Recipe(sparsity=spfde.SNIP(sparsity=0.8))
    with pytest.raises(
        InvalidArgument, match=r"loss=None: is needed, for a batch of the loader is dict.*attach\(loss="
    ):
        spfde.attach(model, optimizer, loader, recipe, epochs=4)
    session = spfde.attach(
        model,
        optimizer,
        loader,
        recipe,
        epochs=4,
        loss=lambda net, batch: F.cross_entropy(net(batch["x"]), batch["label"]),
    )
    assert session.density == pytest.approx(0.2, abs=0.01)


def test_cross_entropy_that_does_not_fit_asks_for_a_loss() -> None:
    parts = make_parts()
    parts.loader.dataset.tensors = (parts.loader.dataset.tensors[0], torch.randn(SAMPLES, 2))
    with pytest.raises(InvalidArgument, match="loss=None: is needed, for cross entropy does not fit logits"):
        spfde.attach(
            parts.model, parts.optimizer, parts.loader, spfde.Recipe(sparsity=spfde.SNIP(sparsity=0.8)), epochs=4
        )


def attach_to_targets(y: Tensor, method: spfde.sparsity.SparsityMethod, *, outputs: int = 4) -> spfde.Session:
    """A session on a small model and the targets ``y``, without a loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))
    loader = DataLoader(TensorDataset(torch.randn(len(y), 8), y), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return spfde.attach(model, optimizer, loader, spfde.Recipe(sparsity=method), epochs=4)


@pytest.mark.parametrize("method", METHODS[:2], ids=IDS[:2])
@pytest.mark.parametrize(
    ("y", "outputs", "rule"),
    [
        (torch.linspace(-5, 5, SAMPLES * 4).reshape(SAMPLES, 4), 4, "neither labels nor class probabilities"),
        (torch.ones(SAMPLES, 4), 4, "neither labels nor class probabilities"),  # several labels a sample
        (torch.randn(SAMPLES, 1), 1, "one output"),
        (torch.zeros(SAMPLES, dtype=torch.int64), 1, "one output"),
    ],
    ids=["regression", "multi-label", "regression of one output", "labels of one output"],
)
def test_targets_that_are_neither_labels_nor_probabilities_need_a_loss(
    method: spfde.sparsity.SparsityMethod, y: Tensor, outputs: int, rule: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"loss=None: is needed, for .*{rule}.*attach\(loss="):
        attach_to_targets(y, method, outputs=outputs)


@pytest.mark.parametrize("rounded", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_are_taken_as_such_however_they_were_rounded(rounded: torch.dtype) -> None:
    probabilities = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0)).softmax(1).to(rounded)
    session = attach_to_targets(probabilities.float(), spfde.SNIP(sparsity=0.5))
    assert session.density == pytest.approx(0.5, abs=0.01)


def test_synflow_looks_at_no_targets_and_needs_no_loss() -> None:
    session = attach_to_targets(torch.randn(SAMPLES, 1), spfde.SynFlow(sparsity=0.5), outputs=1)
    assert session.density == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_scoring_is_on_the_plans_bill_and_on_the_first_epochs(method: spfde.sparsity.SparsityMethod) -> None:
    recipe = spfde.Recipe(sparsity=method)
    parts, session = attach(recipe)
    planned = spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), recipe, 4, SAMPLES, batch_size=BATCH)
    forward = session.blueprint.cost.forward_flops
    expected = {"snip": 3 * forward * BATCH, "grasp": 12 * forward * 2 * BATCH, "synflow": 3 * forward * 4}[method.name]
    train(parts, session)
    assert [row.overhead_flops for row in session.cost.rows] == [expected, 0, 0, 0]
    assert planned.cost.overhead_flops == expected
    assert planned.savings["overhead"] == -expected

"""The framework is generic: transformers, depthwise convolutions, pixels, text, tables and regression."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import spfde
from generic_tasks import SAMPLES, TASKS, Task
from spfde.freezing import is_held

EPOCHS, BATCH, IN_USE = 8, 4, 12


def recipe(task: Task, **fields: object) -> spfde.Recipe:
    """All three savings; samples are sieved by the loss, which any task has."""
    given = {
        "sparsity": spfde.MEST(sparsity=0.75),
        "freezing": spfde.ProgressiveFreezing(flops_reduction=0.05),
        "sieving": spfde.DataSieving(removed_fraction=0.25, criterion="loss"),
        "update_interval_epochs": 2,
    }
    return spfde.Recipe(**{**given, **fields})


class Run:
    """A model in training: the plain loop, with what a test wants to see."""

    def __init__(self, task: Task, given: spfde.Recipe, *, engine: str = "masked") -> None:
        torch.manual_seed(0)
        self.task = task
        self.model = task.make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
        loader = DataLoader(TensorDataset(task.x, task.y), batch_size=BATCH, shuffle=True)
        self.bill = spfde.plan(self.model, task.x[:1], given, EPOCHS, SAMPLES, batch_size=BATCH)
        self.session = spfde.attach(self.model, self.optimizer, loader, given, epochs=EPOCHS, engine=engine)

    def step(self, x: Tensor, y: Tensor) -> None:
        losses = self.task.loss(self.model(x), y)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.session.observe(loss=losses)

    def frozen(self) -> dict[str, Tensor]:
        """Parameters and buffers of the frozen blocks."""
        blocks = self.session.blueprint.partition.blocks[: self.session.frozen_blocks]
        names = {name for block in blocks for name in block.parameters}
        held = [name for name, module in self.model.named_modules() if is_held(module)]
        buffers = {n: b for n, b in self.model.named_buffers() if any(n.startswith(f"{module}.") for module in held)}
        parameters = {name: self.model.get_parameter(name) for name in names}
        return {name: value.detach().clone() for name, value in {**parameters, **buffers}.items()}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


def test_blocks_come_in_order_of_execution(task: Task) -> None:
    blueprint = spfde.plan(task.make(), task.x[:2], spfde.Recipe(), EPOCHS, SAMPLES).blueprint
    assert [block.name for block in blueprint.partition.blocks] == list(task.blocks)


def test_the_plan_costs_what_is_counted_by_hand(task: Task) -> None:
    model = task.make()
    bill = spfde.plan(model, task.x[:2], spfde.Recipe(), EPOCHS, SAMPLES)
    # A multiply-add is two FLOPs; forward, and the gradients of input and weight.
    assert bill.dense_training_flops == 3 * 2 * (task.dense + task.masked) * SAMPLES * EPOCHS
    half = spfde.plan(model, task.x[:2], spfde.Recipe(sparsity=spfde.StaticSparse(sparsity=0.5)), EPOCHS, SAMPLES)
    assert half.training_flops == 3 * (2 * task.dense + task.masked) * SAMPLES * EPOCHS


@pytest.mark.parametrize("engine", ["masked", "auto"])
def test_it_trains_sparse_frozen_and_sieved(task: Task, engine: str) -> None:
    run = Run(task, recipe(task), engine=engine)
    session, targets = run.session, run.session.blueprint.target
    held: dict[str, Tensor] = {}
    for _ in session.epochs():
        run.model.train()
        now = run.frozen()
        assert all(torch.equal(now[name], value) for name, value in held.items())
        held = now
        for x, y in session.loader:
            run.step(x, y)
        assert len(session.partial_set) == IN_USE
        for name, mask in session.masks.items():
            assert bool((run.model.get_parameter(name).detach()[~mask] == 0).all())
            assert int(mask.sum()) >= targets[name]
    assert session.frozen_blocks >= 1
    assert {name: int(mask.sum()) for name, mask in session.masks.items()} == dict(targets)
    assert all(targets[name] == round(0.25 * mask.numel()) for name, mask in session.masks.items())
    assert session.cost.totals.cost == run.bill.cost
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())

"""The framework is generic: transformers, depthwise convolutions, pixels, text, tables; fronts that are no chain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.models import TextModel
from helpers.native import needs_kernels
from helpers.short import short
from helpers.tasks import SAMPLES, TASKS, CharacterModel, Task, class_loss, token_loss
from spfde.core.errors import InvalidArgument
from spfde.freezing.freezer import is_held
from spfde.model.trace import traced_once

EPOCHS, BATCH, IN_USE = 8, 4, 12


def recipe(**fields: object) -> spfde.Recipe:
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
        with traced_once():
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
    model, sparse = task.make(), spfde.Recipe(sparsity=spfde.StaticSparse(sparsity=0.5))
    with traced_once():
        bill, half = (spfde.plan(model, task.x[:2], given, EPOCHS, SAMPLES) for given in (spfde.Recipe(), sparse))
    # A multiply-add is two FLOPs; forward, and the gradients of input and weight.
    assert bill.dense_training_flops == 3 * 2 * (task.dense + task.masked) * SAMPLES * EPOCHS
    assert half.training_flops == 3 * (2 * task.dense + task.masked) * SAMPLES * EPOCHS


NATIVE = pytest.param("native", marks=needs_kernels)


@pytest.mark.parametrize("engine", [pytest.param("masked", marks=pytest.mark.long), NATIVE])
def test_it_trains_sparse_frozen_and_sieved(task: Task, engine: str) -> None:
    if engine == "native" and isinstance(task.make(), CharacterModel):
        # PyTorch's encoder layer reads its weights in one fused operation.
        with pytest.raises(InvalidArgument, match=r"takes no sparse layer of this model.*engine=\"masked\""):
            Run(task, recipe(), engine=engine)
        return
    run = Run(task, recipe(), engine=engine)
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
    assert held
    assert all(torch.equal(now, held[name]) for name, now in run.frozen().items())
    assert {name: int(mask.sum()) for name, mask in session.masks.items()} == dict(targets)
    assert all(targets[name] == round(0.25 * mask.numel()) for name, mask in session.masks.items())
    assert session.cost.totals.cost == run.bill.cost
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


@needs_kernels
@pytest.mark.parametrize("name", short(TASKS, ("timm-vit", "text-transformer")))
def test_auto_finds_an_engine(name: str) -> None:
    session = Run(TASKS[name](), recipe(), engine="auto").session
    assert session.engine in ("masked", "native")
    assert session.engine_reason


# --- fronts that are no chain ----------------------------------------------------------------------------------------


class TwoTowers(nn.Module):
    """Each half of the input has layers of its own; the head reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.right = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8))
        self.left = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x[:, :5]), self.right(x[:, 5:])], 1).relu())


class Branch(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.wide = nn.Linear(inputs, 4)
        self.deep = nn.Sequential(nn.Linear(inputs, 8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.deep(x).relu(), self.wide(x).relu()], 1)


class Branches(nn.Module):
    """Blocks of two ways beside each other, each of which sees the outputs of all blocks before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 8)
        self.blocks = nn.Sequential(Branch(8), Branch(16), Branch(24))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Looped(nn.Module):
    """Two layers that take turns, three times over, behind a layer that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.neck, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(self.neck(x).relu())


def _joined(make: type[nn.Module], *blocks: str) -> Task:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, 10, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)
    return Task(make=make, x=x, y=y, loss=class_loss, blocks=blocks, dense=0, masked=0)


FRONTS = {
    "two towers": _joined(TwoTowers, "left.0", "left.2", "right.0", "right.2"),
    "branches": _joined(Branches, "blocks.0", "blocks.1", "blocks.2"),
    "looped": _joined(Looped, "stem.0", "stem.2", "first + second", "neck"),
}


@pytest.mark.parametrize("name", FRONTS)
def test_fronts_that_are_no_chain_have_their_blocks_in_order_of_execution(name: str) -> None:
    task = FRONTS[name]
    blueprint = spfde.plan(task.make(), task.x[:2], spfde.Recipe(), EPOCHS, SAMPLES).blueprint
    assert [block.name for block in blueprint.partition.blocks] == list(task.blocks)


@pytest.mark.parametrize("name", short([*TASKS, *FRONTS], {*FRONTS, "timm-convnext"}))
def test_behind_a_frozen_front_everything_has_the_gradient_of_the_whole_model(name: str) -> None:
    task = FRONTS[name] if name in FRONTS else TASKS[name]()
    run = Run(task, recipe())
    for epoch in run.session.epochs():
        run.model.train()
        if epoch == EPOCHS - 1:
            break
        for x, y in run.session.loader:
            run.step(x, y)
    assert run.session.frozen_blocks >= 1
    whole = copy.deepcopy(run.model).requires_grad_()
    x, y = next(iter(run.session.loader))
    task.loss(run.model(x), y).mean().backward()
    expected = torch.autograd.grad(task.loss(whole(x), y).mean(), list(whole.parameters()))
    frozen = run.frozen()
    for (parameter, p), gradient in zip(run.model.named_parameters(), expected, strict=True):
        if parameter in frozen:
            assert p.grad is None
        else:
            assert p.grad is not None
            mask = run.session.masks.get(parameter, torch.ones_like(p, dtype=torch.bool))
            torch.testing.assert_close(p.grad, gradient * mask, rtol=1e-4, atol=1e-6)


def test_a_text_model_whose_head_is_its_embedding_trains_unfrozen_and_is_refused_otherwise_with_the_reason() -> None:
    ids = torch.randint(11, (SAMPLES, 5), generator=torch.Generator().manual_seed(0))
    tied = Task(lambda: TextModel(tied=True), x=ids, y=ids.roll(-1, 1), loss=token_loss, blocks=(), dense=0, masked=0)
    with pytest.raises(
        InvalidArgument, match=r"no block that can be frozen \(the parameter 'tokens.weight' is read by"
    ):
        Run(tied, recipe())
    run = Run(tied, recipe(freezing=None))
    for _ in run.session.epochs():
        for x, y in run.session.loader:
            run.step(x, y)
    assert "tokens.weight" not in run.session.masks
    assert run.session.cost.totals.cost == run.bill.cost

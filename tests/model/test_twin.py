"""What a model holds besides its own: the copy that is traced neither copies it nor changes it."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.native import NATIVE
from spfde.model.trace import trace

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.recent: deque[int] = deque(maxlen=3)
        self.settings = SimpleNamespace(scale=2.0, calls=0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(F.relu(self.a(x))).mean((2, 3))) * self.settings.scale


class Noting(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.recent.append(len(x))
        self.settings.calls += 1
        return super().forward(x)


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind()


def data() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))), batch_size=4)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Trainer:
    """Holds the model that holds it, and what cannot be copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimizer, self.loader, self.lock = model, sgd(model), data(), threading.Lock()


FOREIGN: dict[str, Callable[[nn.Module], object]] = {
    "optimizer": sgd,
    "loader": lambda _: data(),
    "running loader": lambda _: iter(data()),
    "lock": lambda _: threading.Lock(),
    "thread": lambda _: threading.Thread(),
    "logger": lambda _: logging.getLogger("of the model"),
    "trainer": Trainer,
    "list of trainers": lambda model: [Trainer(model)],
    "generator": lambda _: (number for number in range(3)),
    "lock that is bound": lambda _: functools.partial(print, threading.Lock()),
    "another model": lambda _: [nn.Linear(3, 3)],
    "tensor in an object": lambda _: SimpleNamespace(inside={"here": torch.ones(2, requires_grad=True) * 2}),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_trace_is_the_same_whatever_the_model_holds(what: str) -> None:
    model = net()
    model.held = FOREIGN[what](model)
    held = model.held
    assert trace(model, X).ops == trace(net(), X).ops
    assert model.held is held


def test_lists_and_settings_that_forward_writes_are_those_of_the_copy() -> None:
    model = net(Noting)
    trace(model, X)
    assert (model.seen, list(model.recent), model.settings.calls) == ([], [], 0)


def trained(engine: str, kept: str) -> list[float]:
    model = net()
    optimizer, losses = sgd(model), []
    recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=1)
    torch.manual_seed(1)
    holder: nn.Module = nn.Sequential(model) if kept == "parent" else model
    session = spfde.attach(holder, optimizer, data(), recipe, epochs=3, engine=engine)
    if kept == "list":
        model.kept = [session]
    elif kept:
        holder.session = session
    for _ in session.epochs():
        for x, y in session.loader:
            loss = F.cross_entropy(holder(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("engine", ["masked", NATIVE])
def test_a_session_that_its_model_holds_changes_nothing(engine: str) -> None:
    expected = trained(engine, "")
    assert all(trained(engine, kept) == expected for kept in ("attribute", "list", "parent"))


@pytest.mark.parametrize("engine", ["masked", NATIVE])
def test_a_copy_of_a_model_with_its_session_has_none_and_a_pickle_is_refused_with_the_remedy(engine: str) -> None:
    model = net()
    recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8), update_interval_epochs=1)
    model.session = spfde.attach(model, sgd(model), data(), recipe, epochs=3, engine=engine)
    twin = copy.deepcopy(model)
    assert twin.session is None
    assert torch.allclose(twin(X), model(X), atol=1e-5)
    with pytest.raises(spfde.UsageError, match="state_dict"):
        pickle.dumps(model)

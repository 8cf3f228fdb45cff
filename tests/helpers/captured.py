"""A small model with masks, attached under an engine that captures, and the same steps under the masked one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.engines.cudagraph.model import CapturedModel

ENGINE = "cudagraph"


def computes(session: spfde.Session) -> CapturedModel:
    return session._computing.engine.computes


class Net(nn.Module):
    """What takes part in a step beside layers: statistics, draws, and a layer that nothing is left of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.middle, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.scale = 1.0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.middle(self.drop(F.relu(self.norm(self.first(x)))))) * self.scale)


def batches(n: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)) for _ in range(n)
    ]


def attach(
    engine: str, net: nn.Module | None = None, *, optimizer: Callable[..., Any] = torch.optim.SGD, **options: Any
) -> tuple[Any, torch.optim.Optimizer, spfde.Session]:
    torch.manual_seed(0)
    model = Net() if net is None else net
    made = optimizer(model.parameters(), **{"lr": 0.1, **options})
    loader = DataLoader(TensorDataset(*[torch.cat(part) for part in zip(*batches(5), strict=True)]), batch_size=4)
    recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.5, dense_first=False), update_interval_epochs=1)
    return model, made, spfde.attach(model, made, loader, recipe, epochs=3, engine=engine)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 5) -> list[Tensor]:
    found = []
    for x, y in batches(n):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def both(run: Callable[[Any, torch.optim.Optimizer], Any], **options: Any) -> CapturedModel:
    """The same on both engines, from the same generator: the same model and draws at the end."""
    ends = []
    for engine in ("masked", ENGINE):
        model, optimizer, session = attach(engine, **options)
        torch.manual_seed(1)
        ends.append((run(model, optimizer), model, torch.get_rng_state()))
    assert same(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])
    return computes(session)

"""Blocks compiled one by one: once for each kind and mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.recording import on_cpu  # noqa: F401  # a fixture
from helpers.resuming import recipe_with
from helpers.training import make_parts, train
from spfde.engines import compiled
from spfde.engines.compiled import CompiledBlocks


class Block(nn.Module):
    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.norm, self.scale = nn.Linear(width, width), nn.BatchNorm1d(width), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * F.relu(self.norm(self.linear(x)))


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks, self.head = (
            nn.Linear(6, 8),
            nn.ModuleList(Block(8) for _ in range(depth)),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts compilations, and computes as PyTorch does."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def run(depth: int, *, epochs: int = 8, engine: str = "masked", **options: bool) -> tuple[nn.Module, spfde.Session]:
    model = Deep(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator))
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.15)
    recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.5), freezing=freezing, update_interval_epochs=1)
    session = spfde.attach(model, optimizer, DataLoader(data, 8), recipe, epochs=epochs, engine=engine, **options)
    for _ in session.epochs():
        for x, y in session.loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, session


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_number_of_compilations_does_not_grow_with_depth_or_freeze_stages(counter: CompileCounter) -> None:
    counts = []
    for depth in (3, 8):
        before = counter.frame_count
        model, session = run(depth, compile=True)
        assert session.frozen_blocks >= depth // 2 - 1
        counts.append(counter.frame_count - before)
        assert same(model, run(depth)[0])
    assert counts[0] == counts[1] <= 6


def test_blocks_of_other_settings_are_other_kinds() -> None:
    model = nn.Sequential(Block(8), Block(8), Block(8, scale=2.0), Block(4), nn.Linear(4, 4))
    found = CompiledBlocks(model, ["4", "nothing"])
    # The scale is an attribute that no setting shows: torch.compile tells it apart by itself.
    assert (found.n_kinds, found.names) == (2, ["0", "1", "2", "3"])
    x = torch.randn(4, 8)
    expected = [copy.deepcopy(model[at])(x) for at in range(3)]
    assert all(torch.equal(model[at](x), value) for at, value in enumerate(expected))
    found.detach()
    assert all("forward" not in vars(module) for module in model)


def test_beyond_pytorchs_limit_blocks_run_as_they_are_and_it_is_said_once(
    counter: CompileCounter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "recompile_limit", lambda: ("torch._dynamo.config.its_name", 2))
    model = nn.Sequential(Block(8))
    plain = copy.deepcopy(model)
    CompiledBlocks(model, ["0"])
    for size in (2, 3, 4, 5, 2):
        x = torch.randn(size, 8)
        assert torch.equal(model(x), plain(x))
    assert counter.frame_count == 2
    assert capfd.readouterr().err.count("its_name") == 1


def test_an_engine_of_its_own_kernels_compiles_nothing() -> None:
    parts, options = make_parts(), {"epochs": 8, "engine": "native", "compile": True}
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.attach(parts.model, parts.optimizer, parts.loader, recipe_with("mest-ems"), **options)
    assert caught.value.problems[0].argument == "engine"
    assert "forward" not in vars(parts.model.blocks[0])


@pytest.mark.usefixtures("on_cpu")
def test_compiled_blocks_are_part_of_what_is_captured() -> None:
    _, session = run(3, engine="cudagraph", compile=True)
    text = str(session)
    assert "3 blocks of 1 kinds" in text
    assert "passes replayed" in text


def test_detached_every_block_computes_as_its_class_says() -> None:
    parts = make_parts()
    session = spfde.attach(
        parts.model, parts.optimizer, parts.loader, recipe_with("set"), epochs=8, engine="masked", compile=True
    )
    train(parts, session)
    session.detach()
    assert all("forward" not in vars(module) for module in parts.model.modules())

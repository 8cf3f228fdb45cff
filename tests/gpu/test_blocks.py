"""Block-sparse linear layers on a real GPU: captured in a graph, mutated under it, and in a session."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.blocks import drawn, exact_step, mask_of, needs_triton, relative_error
from spfde.engines.base import Parts

pytestmark = [needs_triton, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

BLOCK = (32, 32)
OUT, INTO, TOKENS = 256, 320, 4500


def units_of(seed: int, active: int) -> Tensor:
    rows, columns = OUT // 32, INTO // 32
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    units = torch.zeros(rows * columns, dtype=torch.bool)
    units[order[:active]] = True
    return units.view(rows, columns)


def capture(step: Any) -> torch.cuda.CUDAGraph:
    """A graph of ``step``, which has run on a stream of its own before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_goes_on_with_other_blocks(dtype: torch.dtype) -> None:
    from spfde.engines.blocks.linear import BlockLinears

    masks = {"weight": mask_of(units_of(0, 8), BLOCK).cuda()}
    model = nn.Linear(INTO, OUT, device="cuda", dtype=dtype)
    with torch.no_grad():
        model.weight.mul_(masks["weight"])
    blocks = BlockLinears(model, {"weight": BLOCK}, Parts(masks=lambda: masks))
    x = drawn(TOKENS, INTO, seed=1, dtype=dtype).requires_grad_()
    slope = drawn(TOKENS, OUT, seed=2, dtype=dtype)
    found: dict[str, Tensor] = {}

    def step() -> None:
        # The last pass's graph must be gone: what accumulates gradients stays on the stream of its first use.
        found.clear()
        x.grad = model.weight.grad = model.bias.grad = None
        found["output"] = model(x)
        found["output"].backward(slope)

    blocks.refresh()
    graph, key = capture(step), blocks.key
    for seed in range(1, 5):
        masks["weight"] = mask_of(units_of(seed, 8 - seed % 3), BLOCK).cuda()
        with torch.no_grad():
            model.weight.copy_(drawn(OUT, INTO, seed=seed, dtype=dtype) * masks["weight"])
            x.copy_(drawn(TOKENS, INTO, seed=10 + seed, dtype=dtype))
        blocks.refresh()
        assert blocks.key == key
        graph.replay()
        expected, gradients = exact_step(x, model.weight, model.bias, slope, masks["weight"])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert relative_error(found["output"], expected) < tolerance
        for name, own in (("x", x), ("weight", model.weight), ("bias", model.bias)):
            assert own.grad is not None
            assert relative_error(own.grad, gradients[name]) < tolerance, name


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(32, 256), nn.Linear(256, 4)
        self.wide, self.narrow = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.narrow(F.gelu(self.wide(x)))).mean(1))


def train(engine: str, *, autocast: bool) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Mixer().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = TensorDataset(torch.randn(80, 20, 32), torch.randint(4, (80,)))
    recipe = spfde.Recipe(
        sparsity=spfde.RigL(sparsity=0.9, structure=spfde.Block(rows=32, columns=32)), update_interval_epochs=1
    )
    loader = DataLoader(data, batch_size=16)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=10, engine=engine)
    losses = []
    for _ in session.epochs():
        for x, y in session.loader:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                logits = model(x.cuda())
            loss = F.cross_entropy(logits.float(), y.cuda())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(logits.float(), y.cuda())
            losses.append(loss.item())
    assert session.engine == engine
    assert ("active blocks of 32x32" in str(session)) == (engine != "masked")
    return losses, dict(session.masks)


@pytest.mark.parametrize("engine", ["blocks", "cudagraph"])
def test_fifty_steps_are_those_of_the_masked_engine(engine: str) -> None:
    ours, masked = (train(name, autocast=False) for name in (engine, "masked"))
    assert len(ours[0]) == 50
    assert ours[0] == pytest.approx(masked[0], rel=2e-3)
    for name, mask in masked[1].items():
        assert (ours[1][name] == mask).float().mean() > 0.98, name


@pytest.mark.parametrize("engine", ["blocks", "cudagraph"])
def test_fifty_steps_in_bfloat16_come_to_the_loss_of_the_masked_engine(engine: str) -> None:
    ours, masked = (train(name, autocast=True) for name in (engine, "masked"))
    assert ours[0][:5] == pytest.approx(masked[0][:5], rel=2e-2)
    assert sum(ours[0][-5:]) == pytest.approx(sum(masked[0][-5:]), rel=0.2)


@pytest.mark.parametrize("engine", ["blocks", "cudagraph"])
def test_the_same_seed_gives_the_same_bits(engine: str) -> None:
    assert train(engine, autocast=True)[0] == train(engine, autocast=True)[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_layer_on_another_device_than_the_current_one_is_right() -> None:
    from spfde.engines.blocks.check import check

    assert check(BLOCK, torch.device("cuda", 1)) is None

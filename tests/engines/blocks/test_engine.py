"""The engine in a session: it trains as the masked one does, and says when and why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.blocks import DEVICE, needs_triton
from helpers.short import short
from spfde.core.torch_private import FakeTensorMode
from spfde.engines.base import Job
from spfde.engines.blocks import engine as module
from spfde.engines.blocks.engine import BlocksEngine

pytestmark = needs_triton

BLOCKS = spfde.Block(rows=32, columns=32)
SPARSE = spfde.Recipe(sparsity=spfde.SET(sparsity=0.85, structure=BLOCKS), update_interval_epochs=1)
EPOCHS, BATCH = 3, 8


class Mixer(nn.Module):
    """Tokens [N, 3, 32] into 4 classes, with two wide layers of blocks between a first and a last one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(32, 64)
        self.wide, self.narrow = nn.Linear(64, 320), nn.Linear(320, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.head(x.mean(1))


class Run:
    """The contract's loop."""

    def __init__(
        self,
        engine: str,
        recipe: spfde.Recipe = SPARSE,
        model: Callable[[], nn.Module] = Mixer,
        *,
        autocast: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model, self.autocast = model().to(DEVICE), autocast
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        data = TensorDataset(torch.randn(2 * BATCH, 3, 32), torch.randint(4, (2 * BATCH,)))
        loader = DataLoader(data, batch_size=BATCH)
        self.session = spfde.attach(self.model, self.optimizer, loader, recipe, epochs=EPOCHS, engine=engine, **options)
        self.losses: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
            logits = self.model(x.to(DEVICE))
        loss = F.cross_entropy(logits.float(), y.to(DEVICE))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.session.observe(logits.float(), y.to(DEVICE))
        self.losses.append(loss.item())

    def train(self, *, stop_after: int | None = None) -> Run:
        for epoch in self.session.epochs():
            for x, y in self.session.loader:
                self.step(x, y)
            if epoch == stop_after:
                break
        return self

    @property
    def job(self) -> Job:
        return self.session._computing.job


@pytest.mark.parametrize("method", short([spfde.SET, spfde.RigL, spfde.SNFS], [spfde.RigL]))
def test_a_session_of_three_epochs_trains_as_with_the_masked_engine(method: Any) -> None:
    recipe = SPARSE.replace(sparsity=method(sparsity=0.85, structure=BLOCKS))
    ours, masked = Run("blocks", recipe), Run("masked", recipe)
    first = ours.session.masks
    ours.train()
    masked.train()
    assert ours.session.engine == "blocks"
    assert any(not torch.equal(mask, first[name]) for name, mask in ours.session.masks.items())
    assert len(ours.losses) == 6
    assert ours.losses == pytest.approx(masked.losses, rel=1e-5)
    for name, mask in masked.session.masks.items():
        assert torch.equal(ours.session.masks[name], mask), name
    for name, value in masked.model.state_dict().items():
        assert torch.allclose(ours.model.state_dict()[name], value, atol=1e-5), name


def test_a_session_under_autocast_trains_as_with_the_masked_engine() -> None:
    ours, masked = (Run(engine, autocast=True).train() for engine in ("blocks", "masked"))
    assert ours.losses == pytest.approx(masked.losses, rel=2e-2)


def test_freezing_goes_on_with_the_kernels() -> None:
    recipe = SPARSE.replace(
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=1, blocks=("stem", "wide"))
    )
    ours, masked = Run("blocks", recipe).train(), Run("masked", recipe).train()
    assert ours.session.frozen_blocks == masked.session.frozen_blocks > 0
    assert ours.losses == pytest.approx(masked.losses, rel=1e-5)


def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped() -> None:
    whole, first = Run("blocks").train(), Run("blocks").train(stop_after=0)
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict(), first.session.state_dict()))
    second = Run("blocks")
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.session.load_state_dict(saved[2])
    second.train()
    assert second.session.epoch == EPOCHS
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_the_session_lists_the_layers_and_detach_puts_them_back() -> None:
    run = Run("blocks")
    said = str(run.session)
    assert "wide.weight: 3 active blocks of 32x32\n" in said  # of 20
    assert "forward" in vars(run.model.wide)  # type: ignore[arg-type]
    run.session.detach()
    assert "forward" not in vars(run.model.wide)  # type: ignore[arg-type]


def test_a_layer_with_too_many_blocks_is_said_to_be_left() -> None:
    dense = SPARSE.replace(sparsity=spfde.SET(sparsity=0.5, structure=BLOCKS))
    assert "wide.weight: 10 active blocks of 32x32, left to PyTorch" in str(Run("blocks", dense).session)


# --- when it cannot work ----------------------------------------------------------------------------------------------


def refusal(recipe: spfde.Recipe, **options: Any) -> str:
    with pytest.raises(spfde.InvalidArgument) as refused:
        Run("blocks", recipe, **options)
    (problem,) = refused.value.problems
    assert (problem.argument, problem.value) == ("engine", "blocks")
    return problem.rule


@pytest.mark.parametrize("structure", [spfde.Unstructured(), spfde.Block(rows=16, columns=32), spfde.Channels()])
def test_other_structures_are_refused_with_the_reason(structure: Any) -> None:
    said = refusal(spfde.Recipe(sparsity=spfde.SET(sparsity=0.75, structure=structure)))
    assert repr(structure) in said
    assert "multiples of 32" in said


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Linear(32, 32), nn.Conv1d(32, 64, 1), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x).transpose(1, 2)).mean(2))


def test_convolutions_are_refused_with_the_reason() -> None:
    said = refusal(SPARSE, model=Convolutions)
    assert "nn.Linear" in said
    assert "conv.weight" in said


def test_a_compiled_model_is_refused_with_the_reason() -> None:
    assert "torch.compile" in refusal(SPARSE, model=lambda: torch.compile(Mixer(), backend="eager"))


def test_copies_on_other_devices_are_refused_with_the_reason() -> None:
    assert "DistributedDataParallel" in refusal(SPARSE, model=lambda: nn.DataParallel(Mixer()))


def test_features_that_blocks_do_not_divide_are_refused_by_the_recipe() -> None:
    class Uneven(Mixer):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(64, 330), nn.Linear(330, 64)

    with pytest.raises(spfde.InvalidArgument) as refused:
        Run("blocks", model=Uneven)
    assert any("330" in problem.rule for problem in refused.value.problems)


def on(device: str, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    with FakeTensorMode():
        return nn.Parameter(torch.empty(32, 32, device=device, dtype=dtype))


def test_weights_are_refused_by_what_they_are_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert module._refused("fc.weight", on("cuda")) is None
    assert module._refused("fc.weight", on("cuda", torch.bfloat16)) is None
    assert "fc.weight is torch.float64" in (module._refused("fc.weight", on("cuda", torch.float64)) or "")
    assert "fc.weight is on cpu" in (module._refused("fc.weight", on("cpu")) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in (module._refused("fc.weight", on("cuda")) or "")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in (module._refused("fc.weight", on("cuda")) or "")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in (module._refused("fc.weight", on("cuda")) or "")


def test_kernels_that_do_not_run_are_refused_with_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from spfde.engines.blocks import check

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(check, "block_linear", broken)
    said = refusal(SPARSE)
    assert "RuntimeError: no C compiler" in said
    assert "and more" not in said


def test_kernels_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from spfde.engines.blocks import check

    right = check.block_linear
    monkeypatch.setattr(check, "block_linear", lambda *args: 1.1 * right(*args))
    assert "off by 10" in refusal(SPARSE)


# --- how fast it says that it is --------------------------------------------------------------------------------------


def expected(run: Run, *, tokens: int, width: int, density: float) -> float:
    """The modelled speed, for layers of other sizes."""
    import dataclasses

    job, blueprint = run.job, run.job.blueprint
    layers = tuple(
        dataclasses.replace(layer, forward_flops=2 * width * width * tokens if layer.name in blueprint.target else 0)
        for layer in blueprint.cost.layers
    )
    cost = dataclasses.replace(blueprint.cost, layers=layers)
    densities = [density if layer.name in blueprint.target else 1.0 for layer in layers]
    return BlocksEngine.expected_speed(
        dataclasses.replace(job, blueprint=dataclasses.replace(blueprint, cost=cost), density=densities, batch_size=1)
    )


def test_it_is_faster_where_layers_are_large_and_sparse_and_no_faster_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run("masked")
    monkeypatch.setattr(module, "_is_interpreted", lambda: False)
    assert expected(run, tokens=8192, width=4096, density=0.1) < 0.6
    assert expected(run, tokens=8192, width=4096, density=0.05) < expected(run, tokens=8192, width=4096, density=0.1)
    assert expected(run, tokens=8192, width=4096, density=0.5) == 1.0  # left to PyTorch
    assert expected(run, tokens=64, width=128, density=0.1) > 1.0  # starting the kernels takes longer


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are not interpreted")
def test_auto_never_takes_the_interpreter() -> None:
    assert Run("auto").session.engine != "blocks"

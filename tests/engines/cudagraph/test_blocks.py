"""Linear layers with blocks of weights, computed by their kernels inside what is recorded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.blocks import needs_triton
from helpers.captured import ENGINE, computes
from helpers.recording import Replays, on_cpu  # noqa: F401  # a fixture
from spfde.engines.base import Parts
from spfde.engines.blocks import engine as blocks_module
from spfde.engines.blocks.engine import BlocksEngine
from spfde.engines.cudagraph.engine import CudaGraphEngine
from spfde.engines.cudagraph.model import CapturedModel

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    needs_triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has it"),
]

BLOCKS = spfde.Block(rows=32, columns=32)
EPOCHS, BATCH = 3, 4


class Mixer(nn.Module):
    """Inputs [N, 32] into 4 classes, with a wide layer of 20 blocks between a first and a last one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.head = nn.Linear(32, 64), nn.Linear(64, 320), nn.Linear(320, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.wide(self.stem(x))))


class Run:
    def __init__(self, engine: str, method: Any = spfde.SET, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Mixer()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        data = TensorDataset(torch.randn(3 * BATCH, 32), torch.randint(4, (3 * BATCH,)))
        recipe = spfde.Recipe(sparsity=method(sparsity=0.85, structure=BLOCKS), update_interval_epochs=1)
        loader = DataLoader(data, batch_size=BATCH)
        self.session = spfde.attach(self.model, self.optimizer, loader, recipe, epochs=EPOCHS, engine=engine, **options)
        self.losses: list[float] = []

    def train(self, *, stop_after: int | None = None) -> Run:
        for epoch in self.session.epochs():
            for x, y in self.session.loader:
                loss = F.cross_entropy(self.model(x), y)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.losses.append(loss.item())
            if epoch == stop_after:
                break
        return self


@pytest.fixture(autouse=True)
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording backend looks on by a dispatch mode, under which the kernels leave the work to PyTorch."""
    monkeypatch.setattr("spfde.engines.blocks.linear.is_recorded", lambda: False)


@pytest.mark.parametrize("method", [pytest.param(spfde.SET, marks=pytest.mark.long), spfde.RigL])
def test_a_run_is_that_of_the_masked_engine_by_the_kernels(method: Any, started: list[str]) -> None:
    ours = Run(ENGINE, method)
    first = ours.session.masks
    started.clear()
    ours.train()
    assert started.count("product") > 8
    assert computes(ours.session).replayed >= 6
    masked = Run("masked", method).train()
    assert any(not torch.equal(mask, first[name]) for name, mask in ours.session.masks.items())
    assert ours.losses == pytest.approx(masked.losses, rel=1e-5)
    for name, mask in masked.session.masks.items():
        assert torch.equal(ours.session.masks[name], mask), name


def test_a_mutation_that_keeps_the_number_of_blocks_records_nothing_anew() -> None:
    ours = Run(ENGINE).train()
    assert computes(ours.session).recorded == 1


def test_what_was_recorded_holds_for_as_long_as_the_engine_says_the_same() -> None:
    model, state = nn.Linear(3, 2), ["one"]
    backend = Replays(torch.device("cpu"))
    parts = Parts(masks=dict)
    found = CapturedModel(model, backend, parts, reads={}, is_strict=True, before_replay=lambda: state[0])
    for state[0], recorded in (("one", 1), ("other", 2), ("one", 2)):
        for _ in range(3):
            model(torch.ones(4, 3)).sum().backward()
        assert found.recorded == recorded


@pytest.mark.parametrize("kind", [BlocksEngine, CudaGraphEngine])
def test_lists_follow_a_mask_before_a_replay_and_more_groups_of_blocks_are_another_state(kind: type[Any]) -> None:
    from spfde.engines.blocks.linear import BlockLinears

    def mask_of(*rows: int) -> Tensor:
        mask = torch.zeros(160, 64, dtype=torch.bool)
        for row in rows:
            mask[32 * row : 32 * row + 32, :32] = True
        return mask

    model, masks = nn.Linear(64, 160), {"weight": mask_of(0)}
    linears = BlockLinears(model, {"weight": (32, 32)}, Parts(masks=lambda: masks), most=1.0)
    engine = kind()
    engine._attached = engine._linears = linears
    before = engine.before_replay()
    assert hash(before) == hash(engine.before_replay())
    masks["weight"] = mask_of(3)
    assert engine.before_replay() == before
    assert linears.layers["weight"].lists["row_starts"][:6].tolist() == [0, 0, 0, 0, 1, 1]
    masks["weight"] = mask_of(0, 1, 2, 3, 4)
    assert engine.before_replay() != before


def test_an_engine_that_has_nothing_to_bring_up_to_date_says_the_same_each_time() -> None:
    session = Run("masked").session
    assert session._computing.engine.before_replay() == ()


@pytest.mark.long
def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped() -> None:
    whole, first = Run(ENGINE).train(), Run(ENGINE).train(stop_after=0)
    saved = copy.deepcopy([part.state_dict() for part in (first.model, first.optimizer, first.session)])
    second = Run(ENGINE)
    for part, state in zip((second.model, second.optimizer, second.session), saved, strict=True):
        part.load_state_dict(state)
    second.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_a_captured_step_follows_mutations_too() -> None:
    run = Run(ENGINE)

    def train(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return loss

    step = run.session.capture(train)
    losses = []
    for _ in run.session.epochs():
        losses += [step(x, y).item() for x, y in run.session.loader]
    assert step.replayed >= 4
    assert losses == pytest.approx(Run("masked").train().losses, rel=1e-5)


def test_the_session_lists_the_layers_and_detach_puts_them_back() -> None:
    run = Run(ENGINE)
    assert "wide.weight: 3 active blocks of 32x32" in str(run.session)
    assert "forward" in vars(run.model.wide)
    run.session.detach()
    assert "forward" not in vars(run.model.wide)
    assert "forward" not in vars(run.model)


def test_kernels_that_do_not_run_leave_the_layers_dense_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BlocksEngine, "prepare", classmethod(lambda cls, job, tell=None: "no compiler is here"))
    run = Run(ENGINE)
    assert "no compiler is here" in capfd.readouterr().err
    assert "forward" not in vars(run.model.wide)


def test_it_expects_to_be_faster_by_what_the_kernels_gain() -> None:
    job = Run("masked").session._computing.job
    assert CudaGraphEngine.expected_speed(job) == pytest.approx(0.4 * blocks_module.modelled_speed(job))
    assert 0.2 < blocks_module.modelled_speed(job) < 1.0

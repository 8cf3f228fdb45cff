"""CUDA graphs on a real GPU: what tests/engines/cudagraph shows on the CPU, and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.app.train.models import build_model

pytestmark = pytest.mark.usefixtures("deterministic")
# A graph reads the rate as float32: these are the same number there.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=2**-4, momentum=0.9, weight_decay=1e-4),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=2**-4, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2**-10),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=2**-10, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=2**-10, capturable=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
WHOLE = ("sgd", "fused sgd", "adamw", "fused adamw", "adam", "rmsprop")
"""Those whose step can be captured, too."""
FREEZING = spfde.ProgressiveFreezing(flops_reduction=0.15)
METHODS = {
    "set": spfde.SET(sparsity=0.9),
    "mest": spfde.MEST(sparsity=0.9),
    "rigl": spfde.RigL(sparsity=0.9),
    "snfs": spfde.SNFS(sparsity=0.9),
    "topkast": spfde.TopKAST(sparsity=0.9),
}


class Run:
    """ResNet-8 on random images, on the GPU."""

    def __init__(
        self,
        engine: str,
        *,
        method: Any = METHODS["mest"],
        optimizer: str = "sgd",
        epochs: int = 8,
        freezing: Any = FREEZING,
        whole: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = build_model("resnet8", num_classes=10, in_channels=3, image_size=32, seed=0).cuda()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(
            torch.randn(224, 3, 32, 32, generator=generator), torch.randint(10, (224,), generator=generator)
        )
        loader = DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(2))
        recipe = spfde.Recipe(sparsity=method, freezing=freezing, update_interval_epochs=1)
        self.session = spfde.attach(self.model, self.optimizer, loader, recipe, epochs=epochs, engine=engine, **options)
        self.bf16 = False
        self.take = self.session.capture(self.step) if whole and engine == "cudagraph" else self.step
        if whole and engine == "masked":  # the form of the optimizer that a graph takes
            for group in self.optimizer.param_groups:
                group.update({"fused": True, "foreach": False} if "fused" in group else {})

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def train(self, stop: int | None = None) -> list[float]:
        losses = []
        for epoch in self.session.epochs():
            losses += [self.take(x.cuda(), y.cuda()).detach() for x, y in self.session.loader]
            if epoch == stop:
                break
        return [float(loss) for loss in losses]

    def states(self) -> list[Any]:
        made = (self.model, self.optimizer, self.session)
        return [copy.deepcopy(each.state_dict()) for each in made] + [torch.cuda.get_rng_state()]

    def load(self, states: list[Any]) -> None:
        for each, state in zip((self.model, self.optimizer, self.session), states, strict=False):
            each.load_state_dict(state)
        torch.cuda.set_rng_state(states[3])

    @property
    def replayed(self) -> int:
        return (self.session._computing.engine.computes if self.take == self.step else self.take).replayed


def close(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


whole = pytest.mark.parametrize("whole", [False, True], ids=["model", "step"])


@whole
@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_are_those_of_the_masked_engine(method: str, whole: bool) -> None:
    if whole and method == "topkast":
        pytest.skip("its weights change in every step")
    masked, captured = (Run(engine, method=METHODS[method], whole=whole) for engine in ("masked", "cudagraph"))
    torch.testing.assert_close(captured.train(), masked.train(), rtol=1e-3, atol=1e-3)
    close(captured.model, masked.model)
    assert captured.replayed >= (0 if whole and method == "snfs" else 35)
    for name, mask in captured.session.masks.items():
        assert torch.equal(mask, masked.session.masks[name])
        assert not captured.model.get_parameter(name)[~mask].any()


@whole
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_as_ever(optimizer: str, whole: bool) -> None:
    if whole and optimizer not in WHOLE:
        pytest.skip("it keeps its counts beside the device")
    masked, captured = (Run(e, optimizer=optimizer, epochs=4, whole=whole) for e in ("masked", "cudagraph"))
    torch.testing.assert_close(captured.train(), masked.train(), rtol=1e-3, atol=1e-3)
    assert captured.replayed >= 18


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"whole": True}, {"whole": True, "compile": True}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(options: dict[str, Any]) -> None:
    whole = Run("cudagraph", **options)
    losses = whole.train()
    first = Run("cudagraph", **options)
    before = first.train(stop=3)
    states = first.states()
    second = Run("cudagraph", **options)
    second.load(states)
    assert before + second.train() == losses
    assert all(map(torch.equal, second.model.state_dict().values(), whole.model.state_dict().values()))


@whole
def test_bf16_and_compiled_blocks_train(whole: bool) -> None:
    run = Run("cudagraph", compile=True, whole=whole)
    run.bf16 = True
    losses = run.train()
    assert losses[-1] < losses[0]
    assert run.replayed >= 40


@whole
def test_memory_does_not_grow_over_fifty_changes_of_the_stage(whole: bool) -> None:
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.2, scheme="periodic")
    run = Run("cudagraph", epochs=60, freezing=freezing, whole=whole)
    reserved = []
    for _ in run.session.epochs():
        for x, y in run.session.loader:
            run.take(x.cuda(), y.cuda())
        reserved.append(torch.cuda.memory_reserved())
    frozen = run.session.timeline.frozen
    print(
        "changes of the front:",
        sum(a != b for a, b in pairwise(frozen)),
        "MiB:",
        reserved[-1] >> 20,
    )
    assert max(reserved[30:]) <= 1.1 * max(reserved[:30])


def test_a_schedule_that_moves_the_rate_in_every_step_is_followed() -> None:
    runs = []
    for engine in ("masked", "cudagraph"):
        run = Run(engine, whole=True, epochs=4)
        schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 2.0 ** -(step % 3))
        take = run.take

        def stepped(x: torch.Tensor, y: torch.Tensor, take: Any = take, schedule: Any = schedule) -> torch.Tensor:
            loss: torch.Tensor = take(x, y)
            schedule.step()
            return loss

        run.take = stepped
        runs.append(run.train())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wait", ["at the end", "in the middle"])
def test_a_step_that_waits_for_the_device_is_left_to_pytorch_under_auto(wait: str) -> None:
    run = Run("auto")
    assert run.session.engine == "cudagraph"

    def waiting(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(run.model(x), y)
        if wait == "in the middle" and loss.item() < 0:
            return loss
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss.detach().sum().item()
        return loss

    run.take = run.session.capture(waiting)
    losses = run.train()
    torch.cuda.empty_cache()
    assert run.take.replayed == 0
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses, Run("masked").train(), rtol=1e-2, atol=1e-2)


def test_a_capture_that_fails_leaves_streams_and_memory_as_they_were() -> None:
    run = Run("cudagraph")
    backend = run.session._computing.engine.recorder.backend
    before = torch.cuda.current_stream()

    def fails() -> list[torch.Tensor]:
        number = torch.ones(3, device="cuda").sum()
        return [number * number.item()]

    with pytest.raises(RuntimeError):
        backend.record(fails, pool="learning")
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert run.train()[-1] < 5


@whole
def test_dropout_draws_as_in_eager_mode(whole: bool) -> None:
    def run(engine: str) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 32), nn.Linear(32, 4)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=2**-3)
        data = TensorDataset(torch.randn(32, 16), torch.randint(4, (32,)))
        recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.5))
        session = spfde.attach(model, optimizer, DataLoader(data, 8), recipe, epochs=4, engine=engine)
        torch.cuda.manual_seed(7)

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        take = session.capture(step) if whole and engine == "cudagraph" else step
        losses = [float(take(x.cuda(), y.cuda())) for _ in session.epochs() for x, y in session.loader]
        return losses, torch.cuda.get_rng_state()

    masked, captured = run("masked"), run("cudagraph")
    torch.testing.assert_close(captured[0], masked[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(captured[1], masked[1])

"""A captured step trains as the function itself does, and is left to PyTorch, or refused, where that cannot be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spfde
from helpers.captured import ENGINE, Net, attach, batches, same
from helpers.recording import Replays, on_cpu  # noqa: F401  # a fixture
from helpers.resuming import METHODS, assert_equal, everything, recipe_with
from helpers.training import EPOCHS, Parts, make_parts
from spfde.engines.choose import Choice
from spfde.engines.cudagraph.step import CapturedStep
from spfde.session.session import Session

pytestmark = pytest.mark.usefixtures("on_cpu")

Step = Callable[..., Any]


def captured(session: spfde.Session, step: Step) -> CapturedStep:
    made = session.capture(step)
    assert isinstance(made, CapturedStep)
    return made


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = model(x)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits

    return step


def fused(optimizer: torch.optim.Optimizer) -> None:
    """The form that a graph takes: others round elsewhere."""
    if isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam)):
        for group in optimizer.param_groups:
            group.update(fused=True, foreach=False)


# --- the same run ----------------------------------------------------------------------------------------------------


def whole_run(method: str, engine: str, *, stop_at: int | None = None) -> tuple[dict[str, Any], Any]:
    """What a run ends with, stopped and resumed at the top of an epoch; and its step."""

    def start(seed: int) -> tuple[Parts, spfde.Session, Step]:
        parts = make_parts(seed=seed)
        if engine == "masked":
            fused(parts.optimizer)
        options = {"epochs": EPOCHS, "seed": 3, "engine": engine}
        session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe_with(method), **options)
        step = plain_step(parts.model, parts.optimizer)
        return parts, session, captured(session, step) if engine == ENGINE else step

    parts, session, step = start(0)
    for epoch in session.epochs():
        if epoch == stop_at:
            break
        for x, y in session.loader:
            session.observe(step(x, y), y)
    if stop_at is not None:
        states = parts.model.state_dict(), parts.optimizer.state_dict(), session.state_dict(), torch.get_rng_state()
        parts, session, step = start(9)
        parts.model.load_state_dict(states[0])
        parts.optimizer.load_state_dict(states[1])
        session.load_state_dict(states[2])
        torch.set_rng_state(states[3])
        for _ in session.epochs():
            for x, y in session.loader:
                session.observe(step(x, y), y)
    end = everything(parts, session)
    end["spfde"]["parts"].pop("engine")
    for group in end["optimizer"]["param_groups"]:
        group.pop("fused"), group.pop("foreach")
    return end, step


EVERY_STEP = ("topkast", "deepr", "str")  # change weights or masks


SHORT = ("mest-ems", "rigl", "gmp", "dsr")
"""One of each kind; all of them in the long form."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in SHORT else pytest.mark.long)
        for method in METHODS
        if not method.startswith(EVERY_STEP)
    ],
)
def test_a_whole_run_ends_as_under_the_masked_engine(method: str) -> None:
    found, step = whole_run(method, ENGINE)
    expected, _ = whole_run(method, "masked")
    assert_equal(found, expected)
    if not method.startswith("snfs"):  # it looks at dense gradients in every step
        assert step.replayed > EPOCHS


@pytest.mark.parametrize("method", ["mest-ems", "rigl"])
def test_a_run_that_was_stopped_ends_like_one_that_never_stopped(method: str) -> None:
    assert_equal(whole_run(method, ENGINE, stop_at=4)[0], whole_run(method, ENGINE)[0])


def both(
    run: Callable[[nn.Module, torch.optim.Optimizer, spfde.Session, Step], Any],
    make: Callable[[nn.Module, torch.optim.Optimizer], Step] = plain_step,
    **options: Any,
) -> CapturedStep:
    """The same with a captured step and without: the same model, draws and returned values at the end."""
    ends: list[tuple[nn.Module, Tensor, Any]] = []
    for engine in ("masked", ENGINE):
        model, optimizer, session = attach(engine, **options)
        step = make(model, optimizer)
        if engine == "masked":
            fused(optimizer)
        else:
            step = last = captured(session, step)
        torch.manual_seed(1)
        found = run(model, optimizer, session, step)
        ends.append((model, torch.get_rng_state(), found))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]
    return last


def epochs(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, step: Step) -> list[float]:
    sums = []
    for _ in session.epochs():
        for x, y in session.loader:
            logits = step(x, y)
            session.observe(logits, y)
            sums.append(float(logits.sum()))
    return [*sums, *[float(row.training_flops) for row in session.cost.rows]]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.AdamW, {"lr": 2**-6}),  # a graph reads the rate as float32
        (torch.optim.Adam, {"lr": 2**-6, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_any_optimizer_that_keeps_its_state_on_the_device_steps_as_ever(optimizer: Any, options: Any) -> None:
    # The first step makes the optimizer's state, and the second is the first of its kind that a graph could repeat.
    step = both(epochs, optimizer=optimizer, **options)
    assert (step.recorded, step.replayed) == (1, 13)


def test_a_schedule_moves_the_rate_and_records_nothing_anew() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, step: Step) -> list[float]:
        schedule, rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), []
        for x, y in batches(5):
            step(x, y)
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    step = both(run, momentum=0.9)
    assert (step.recorded, step.replayed) == (1, 3)


def test_another_rate_of_an_optimizer_that_bakes_it_in_is_another_recording() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, step: Step) -> None:
        for _ in range(2):
            session.begin_epoch()
            for x, y in batches(5):
                step(x, y)
            session.end_epoch()
            optimizer.param_groups[0]["lr"] = 0.001

    step = both(run, optimizer=torch.optim.RMSprop, lr=0.01)
    assert (step.recorded, step.replayed) == (2, 7)


def test_clipping_within_a_step_is_repeated_on_masked_gradients() -> None:
    def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss, "norm": norm}

        return step

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, step: Step) -> list[float]:
        return [float(value) for x, y in batches(5) for value in step(x, y).values()]

    assert both(run, clipped).replayed == 3


def test_a_smaller_last_batch_is_left_to_pytorch() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, step: Step) -> None:
        for x, y in [*batches(3), *batches(1, size=3), *batches(1)]:
            step(x, y)

    step = both(run)
    assert (step.recorded, step.replayed, step.eager.total()) == (1, 2, 3)


def test_results_belong_to_the_caller_and_have_no_graph() -> None:
    model, optimizer, session = attach(ENGINE)
    step = captured(session, plain_step(model, optimizer))
    kept = [(logits, logits.clone()) for logits in (step(x, y) for x, y in batches(5))]
    assert all(torch.equal(*pair) and not pair[0].requires_grad for pair in kept)


def test_each_frozen_front_is_recorded_once_and_those_that_are_over_are_freed() -> None:
    parts = make_parts()
    recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.5), freezing=spfde.ProgressiveFreezing(flops_reduction=0.2))
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=12, engine=ENGINE)
    step = captured(session, plain_step(parts.model, parts.optimizer))
    fronts = []
    for _ in session.epochs():
        fronts.append(session.frozen_blocks)
        for x, y in session.loader:
            session.observe(step(x, y), y)
    assert step.recorded == len(set(fronts)) > 1
    assert Replays.newest.frees >= len(set(fronts)) - 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_front_that_comes_back_is_replayed_at_once(momentum: float) -> None:
    ends = []
    # PyTorch's fused SGD does not begin a momentum beside others that it has: no run to compare with.
    for engine in ("masked", ENGINE) if momentum == 0.0 else (ENGINE,):
        parts = make_parts()
        parts.optimizer.param_groups[0]["momentum"] = momentum
        freezing = spfde.ProgressiveFreezing(flops_reduction=0.2, scheme="periodic")
        recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.5), freezing=freezing, update_interval_epochs=1)
        session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=16, engine=engine)
        step = plain_step(parts.model, parts.optimizer)
        if engine == "masked":
            fused(parts.optimizer)
        else:
            step = last = captured(session, step)
        for _ in session.epochs():
            for x, y in session.loader:
                session.observe(step(x, y), y)
        ends.append(parts.model)
    assert last.recorded < sum(a != b for a, b in pairwise(session.timeline.frozen))
    assert same(ends[0], ends[-1])
    assert all(bool(p.isfinite().all()) for p in ends[-1].parameters())


def test_a_number_that_the_function_reads_from_around_it_is_looked_at_before_each_replay() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, _: Step) -> None:
        scale = 1.0

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = scale * F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        whole = session.capture(step) if session.engine == ENGINE else step
        for x, y in batches(3):
            whole(x, y)
        scale = 0.1
        for x, y in batches(2):
            whole(x, y)

    both(run)


class Loop:
    """A step that reads what a function may read from around itself."""

    scale: float | Tensor = 1.0

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.scale * F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.step(x, y)


@pytest.mark.parametrize("kind", ["method", "object", "nested function", "tensor"])
def test_what_a_step_reads_from_around_itself_is_looked_at_wherever_it_is(kind: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, _: Step) -> None:
        loop, scale = Loop(model, optimizer), torch.tensor(1.0) if kind == "tensor" else 1.0
        loop.scale = scale

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return scale * F.cross_entropy(model(x), y)

        def nested(x: Tensor, y: Tensor) -> Tensor:
            loss = loss_of(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step: Step = {"method": loop.step, "object": loop, "nested function": nested, "tensor": nested}[kind]
        whole = session.capture(step) if session.engine == ENGINE else step
        for number, (x, y) in enumerate(batches(5)):
            whole(x, y)
            if number == 2:
                loop.scale = scale = torch.tensor(0.5) if kind == "tensor" else 0.5

    both(run)


class Counting(torch.optim.SGD):
    """Its first steps are small, by a number of Python's."""

    t = 0

    def step(self, closure: Any = None) -> Any:
        self.t += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(1 - 0.5**self.t)
        return super().step(closure)


def test_an_optimizer_that_counts_in_python_is_refused() -> None:
    model, optimizer, session = attach(ENGINE, optimizer=Counting)
    step = session.capture(plain_step(model, optimizer))
    with pytest.raises(spfde.UsageError, match="counts its steps"):
        [step(x, y) for x, y in batches(4)]


def test_an_epoch_that_is_due_begins_before_the_step_so_that_what_is_frozen_is_replayed_as_frozen() -> None:
    parts = make_parts()
    recipe = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.5), freezing=spfde.ProgressiveFreezing(flops_reduction=0.2))
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=12, engine=ENGINE)
    step = captured(session, plain_step(parts.model, parts.optimizer))
    batches_of = list(parts.loader)
    for _ in range(12):
        frozen = session._freezing.freezer.frozen_parameters
        before = {name: parts.model.get_parameter(name).clone() for name in frozen}
        for x, y in batches_of:
            step(x, y)
        assert all(torch.equal(parts.model.get_parameter(name), value) for name, value in before.items())
        session.end_epoch()
    assert session.frozen_blocks
    assert [row.steps for row in session.cost.rows] == [len(batches_of)] * 12


def test_a_stop_within_a_recording_leaves_no_gradients() -> None:
    model, optimizer, session = attach(ENGINE)
    calls: list[int] = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        logits = model(x)
        F.cross_entropy(logits, y).backward()
        if len(calls) == 3:  # the first two are PyTorch's
            raise KeyboardInterrupt
        optimizer.step()
        optimizer.zero_grad()
        return logits

    whole = session.capture(step)
    with pytest.raises(KeyboardInterrupt):
        [whole(x, y) for x, y in batches(4)]
    assert all(p.grad is None for p in model.parameters())


def test_a_rate_that_becomes_a_tensor_is_read_as_one() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, step: Step) -> None:
        for number, (x, y) in enumerate(batches(5)):
            step(x, y)
            if number == 2:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.25)

    both(run, momentum=0.9)


# --- what cannot be captured -----------------------------------------------------------------------------------------


def faulty(fault: str) -> Callable[[nn.Module, torch.optim.Optimizer], Step]:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=3)
        if fault == "somebody's hook":
            model.get_submodule("middle").register_forward_hook(lambda *_: None)

        def step(x: Tensor, y: Tensor) -> Any:
            if fault == "gradients that stay":
                optimizer.zero_grad()
            if fault == "waiting for a result" and x.sum().item() > 1e9:
                return x
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            if fault == "a draw of Python's":
                loss = loss * random.random()
            loss.backward()
            optimizer.step()
            if fault == "a schedule":
                schedule.step()
            if fault == "a number that the model reads":
                model.scale = model.scale + 0.5  # type: ignore[assignment, operator]
            if fault != "gradients that stay":
                optimizer.zero_grad()
            return (logits, 1) if fault == "a number returned" else logits

        return step

    return make


FAULTS = [
    "gradients that stay",
    "a draw of Python's",
    "waiting for a result",
    "a schedule",
    "a number that the model reads",
    "a number returned",
    "somebody's hook",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_captured_is_an_error_where_it_was_asked_for(fault: str) -> None:
    model, optimizer, session = attach(ENGINE)
    step = captured(session, faulty(fault)(model, optimizer))
    with pytest.raises(spfde.UsageError, match="cannot be captured"):
        [step(x, y) for x, y in batches(4)]


@pytest.mark.parametrize("fault", FAULTS)
def test_under_auto_it_is_left_to_pytorch_and_that_is_said_once(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, step: Step) -> list[float]:
        random.seed(2)
        optimizer.zero_grad()
        return [
            float(batch[0].sum() if fault == "a number returned" else batch.sum())
            for batch in (step(x, y) for x, y in batches(4))
        ]

    choose = Session.capture

    def under_auto(session: spfde.Session, step: Step) -> Step:
        computing = session._computing
        monkeypatch.setattr(computing, "choice", replace(computing.choice, asked="auto"))
        monkeypatch.setattr(computing.engine.computes, "_is_strict", False)
        return choose(session, step)

    monkeypatch.setattr(Session, "capture", under_auto)
    step = both(run, faulty(fault))
    assert step.replayed == 0
    assert capsys.readouterr().err.count("session.capture: the step is left to PyTorch") == 1


def test_a_session_that_is_called_within_is_an_error() -> None:
    model, optimizer, session = attach(ENGINE)

    def weighted(x: Tensor, y: Tensor) -> Tensor:
        loss = (session.loss_weights() * F.cross_entropy(model(x), y, reduction="none")).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = session.capture(weighted)
    session.begin_epoch()
    with pytest.raises(spfde.UsageError, match="within a step"):
        [step(x, y) for x, y in session.loader]


def test_tensors_elsewhere_and_passes_without_gradients_are_refused() -> None:
    model, optimizer, session = attach(ENGINE)
    step = session.capture(plain_step(model, optimizer))
    (x, y), *_ = batches(1)
    with torch.no_grad(), pytest.raises(spfde.UsageError, match="nothing learns"):
        step(x, y)


def test_an_engine_that_records_nothing_refuses_by_name_and_gives_the_function_back_under_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, session = attach("masked")
    step = plain_step(model, optimizer)
    with pytest.raises(spfde.InvalidArgument, match="cudagraph"):
        session.capture(step)
    monkeypatch.setattr(session._computing, "choice", Choice("masked", "for the test", "auto"))
    assert session.capture(step) is step


@pytest.mark.parametrize("method", EVERY_STEP)
def test_a_method_that_changes_weights_at_every_step_is_refused(method: str) -> None:
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe_with(method), epochs=8, engine=ENGINE)
    with pytest.raises(spfde.InvalidArgument, match="every step"):
        session.capture(plain_step(parts.model, parts.optimizer))


def test_an_optimizer_that_counts_beside_the_device_is_refused() -> None:
    model, optimizer, session = attach(ENGINE, optimizer=torch.optim.Adagrad)
    step = session.capture(plain_step(model, optimizer))
    with pytest.raises(spfde.UsageError, match="cannot be captured"):
        [step(x, y) for x, y in batches(4)]


def test_a_detached_session_leaves_the_step_to_pytorch() -> None:
    model, optimizer, session = attach(ENGINE)
    step = captured(session, plain_step(model, optimizer))
    for x, y in batches(4):
        step(x, y)
    session.detach()
    before = step.replayed
    step(*batches(1)[0])
    assert step.replayed == before
    assert "captured" in repr(session) or not session.is_attached


def test_the_session_says_what_was_recorded() -> None:
    model, optimizer, session = attach(ENGINE, Net())
    step = session.capture(plain_step(model, optimizer))
    for x, y in batches(4):
        step(x, y)
    assert "1 stages recorded, 2 steps replayed" in repr(session)

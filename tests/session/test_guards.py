"""What is noticed when somebody else writes, steps, replaces or schedules; and what must not be taken for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import spfde
from helpers.training import Parts, make_parts, step, train

SPARSE = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8), update_interval_epochs=2)
DENSE = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.15), update_interval_epochs=2)
RATES = spfde.Recipe(learning_rate=spfde.BlockwiseCosine(), sparsity=spfde.SET(sparsity=0.8), update_interval_epochs=2)


def attached(recipe: spfde.Recipe = SPARSE, **options: Any) -> tuple[Parts, spfde.Session]:
    parts = make_parts()
    optimizer = options.pop("optimizer", lambda model: parts.optimizer)(parts.model)
    parts.optimizer = optimizer
    options = {"epochs": 8, "engine": "masked", **options}
    return parts, spfde.attach(parts.model, optimizer, parts.loader, recipe, **options)


def outside(session: spfde.Session, model: nn.Module) -> int:
    weights = dict(model.named_parameters())
    return sum(int(weights[name].detach()[~mask].count_nonzero()) for name, mask in session.masks.items())


class Wrapped(torch.optim.Optimizer):
    """An optimizer around another one, that takes its steps by other names: ``move`` and ``move_data``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    def move(self) -> None:
        self.base.step()

    @torch.no_grad()
    def move_data(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.data = p.data - 0.1 * p.grad


# --- steps around the hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("how", ["move", "move_data"])
def test_steps_around_the_hooks_end_the_first_epoch_and_name_the_inner_optimizer(
    recipe: spfde.Recipe, how: str
) -> None:
    parts, session = attached(recipe, optimizer=lambda model: Wrapped(model.parameters()))
    with pytest.raises(spfde.UsageError, match=r"Wrapped\.base"):  # noqa: PT012
        for _ in session.epochs():
            for x, y in session.loader:
                F.cross_entropy(parts.model(x), y).backward()
                getattr(parts.optimizer, how)()
                parts.optimizer.zero_grad()
    assert session.epoch == 0


def test_long_epochs_of_steps_around_the_hooks_are_ended_before_they_are_over() -> None:
    parts, session = attached(optimizer=lambda model: Wrapped(model.parameters()))
    x, y = next(iter(parts.loader))
    session.begin_epoch()
    with pytest.raises(spfde.UsageError, match=r"Wrapped\.base"):  # noqa: PT012
        for _ in range(20):
            F.cross_entropy(parts.model(x), y).backward()
            parts.optimizer.move()
            parts.optimizer.zero_grad()


def test_the_inner_optimizer_of_one_that_steps_in_two_is_masked_and_counted() -> None:
    parts = make_parts()
    outer = Wrapped(parts.model.parameters())
    session = spfde.attach(parts.model, outer.base, parts.loader, SPARSE, epochs=2, engine="masked")
    for _ in session.epochs():
        for x, y in session.loader:
            F.cross_entropy(parts.model(x), y).backward()
            outer.move()
            outer.zero_grad()
    assert session.step == 10
    assert not outside(session, parts.model)


@pytest.mark.parametrize("draws", ["session.loader", "own"])
def test_updates_by_hand_end_the_first_epoch_and_name_step(draws: str) -> None:
    parts, session = attached()
    weights = list(parts.model.parameters())
    with pytest.raises(spfde.UsageError, match=r"\.grad, and call step"):  # noqa: PT012
        for _ in session.epochs():
            for x, y in session.loader if draws == "session.loader" else parts.loader:
                gradients = torch.autograd.grad(F.cross_entropy(parts.model(x), y), weights)
                with torch.no_grad():
                    for weight, gradient in zip(weights, gradients, strict=True):
                        weight -= 0.05 * gradient
    assert session.epoch == 0


def test_a_copy_that_is_trained_in_the_models_place_is_said_once() -> None:
    parts, session = attached()
    model = copy.deepcopy(parts.model)
    other = Parts(model, torch.optim.SGD(model.parameters(), lr=0.1), parts.loader)
    with pytest.warns(UserWarning, match="copy") as heard:
        train(other, session)
    assert len(heard) == 1


def test_epochs_that_only_evaluate_are_no_copies() -> None:
    parts, session = attached()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in session.epochs():
            with torch.no_grad():
                for x, _y in session.loader:
                    parts.model.eval()(x)


@pytest.mark.parametrize("closes", ["closure", "nothing"])
def test_a_first_step_of_many_backward_passes_is_a_step(closes: str) -> None:
    parts, session = attached(optimizer=lambda model: torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=20))
    for epoch in session.epochs():
        if epoch == 2:
            break
        for x, y in session.loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                parts.optimizer.zero_grad()
                loss = F.cross_entropy(parts.model(x), y)
                loss.backward()
                return loss

            if closes == "nothing":
                for _ in range(20):
                    closure()
            parts.optimizer.step(closure)
    assert session.step == 10
    assert not outside(session, parts.model)


@pytest.mark.parametrize("evaluates", [True, False])
def test_epochs_without_a_step_are_no_fault(evaluates: bool) -> None:
    parts, session = attached()
    for epoch in session.epochs():
        for x, y in session.loader:
            with torch.set_grad_enabled(not evaluates or epoch % 2 == 1):
                loss = F.cross_entropy(parts.model(x), y)
            if loss.requires_grad:
                loss.backward()  # as under a scaler that skips all steps
    assert session.step == 0


# --- weights outside the masks ---------------------------------------------------------------------------------------


def dense_weights(parts: Parts) -> None:
    parts.model.load_state_dict(make_parts(seed=5).model.state_dict())


@torch.no_grad()
def averaged_data(parts: Parts) -> None:
    for p in parts.model.parameters():
        p.data = 0.5 * p.data + 0.5 * torch.ones_like(p)


@pytest.mark.parametrize("method", [spfde.SET, spfde.TopKAST, spfde.STR, spfde.DeepR])
@pytest.mark.parametrize("write", [dense_weights, averaged_data])
def test_weights_written_outside_the_masks_are_masked_again_and_said_once(
    method: Any, write: Callable[[Parts], None]
) -> None:
    parts, session = attached(spfde.Recipe(sparsity=method(sparsity=0.8), update_interval_epochs=2))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for epoch in session.epochs():
            for x, y in session.loader:
                step(parts, session, x, y)
            if epoch in (1, 4):
                write(parts)
                session.verify()
                assert not outside(session, parts.model)
    assert sum("outside the masks" in str(warning.message) for warning in heard) == 1


@pytest.mark.parametrize("method", [spfde.TopKAST, spfde.STR])
def test_active_weights_that_were_written_are_those_that_train_on(method: Any) -> None:
    parts, session = attached(spfde.Recipe(sparsity=method(sparsity=0.8), update_interval_epochs=2))
    session.begin_epoch()
    for x, y in session.loader:
        step(parts, session, x, y)
    name, mask = next(iter(session.masks.items()))
    weight = dict(parts.model.named_parameters())[name]
    with torch.no_grad():
        weight.copy_(torch.where(mask, 3.0, 0.0))
    with pytest.warns(UserWarning, match="averaged"):
        session.verify()
    parts.optimizer.zero_grad()
    for group in parts.optimizer.param_groups:
        group["lr"] = 0.0
    parts.optimizer.step()
    assert torch.allclose(weight[mask], torch.full_like(weight[mask], 3.0), atol=1e-5)


def test_momentum_outside_the_masks_is_zeroed_with_the_weights() -> None:
    parts, session = attached()
    train(parts, session, at_bottom=lambda epoch: None)
    name, mask = next(iter(session.masks.items()))
    weight = dict(parts.model.named_parameters())[name]
    parts.optimizer.state[weight]["momentum_buffer"].fill_(1.0)
    with torch.no_grad():
        weight.fill_(1.0)
    with pytest.warns(UserWarning, match="outside the masks"):
        session.verify()
    assert not parts.optimizer.state[weight]["momentum_buffer"][~mask].any()


# --- replaced parameters ---------------------------------------------------------------------------------------------


def assigned(parts: Parts) -> None:
    parts.model.load_state_dict(copy.deepcopy(make_parts(seed=5).model.state_dict()), assign=True)


def copied(parts: Parts) -> None:
    parts.model.blocks[1] = copy.deepcopy(parts.model.blocks[1])


def parametrized(parts: Parts) -> None:
    nn.utils.parametrizations.weight_norm(parts.model.blocks[0].conv1)


def regrouped(parts: Parts) -> None:
    parts.optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach()) for p in parts.model.parameters()]


@pytest.mark.parametrize("recipe", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("replace", [assigned, copied, parametrized, regrouped])
def test_parameters_that_are_replaced_end_the_run_before_the_next_step(
    recipe: spfde.Recipe, replace: Callable[[Parts], None]
) -> None:
    parts, session = attached(recipe)
    replace(parts)
    with pytest.raises(spfde.UsageError, match="attach again"):
        train(parts, session)
    assert session.step == 0


def test_parameters_that_are_replaced_within_an_epoch_end_it_at_the_next_step() -> None:
    parts, session = attached()
    session.begin_epoch()
    batches = iter(session.loader)
    step(parts, session, *next(batches))
    assigned(parts)
    with pytest.raises(spfde.UsageError, match="attach again"):
        step(parts, session, *next(batches))
    assert session.step == 1


def test_a_model_that_is_moved_or_changes_its_type_keeps_its_parameters() -> None:
    parts, session = attached()
    parts.model.to(memory_format=torch.channels_last)
    train(parts, session)
    session.verify()
    assert session.epoch == 8


# --- schedulers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["bottom", "within"])
def test_a_scheduler_beside_the_recipe_s_rates_is_refused_when_it_first_changes_one(when: str) -> None:
    parts, session = attached(RATES)
    plateau = ReduceLROnPlateau(parts.optimizer, patience=0, factor=0.1)
    with pytest.raises(spfde.UsageError, match="ReduceLROnPlateau"):  # noqa: PT012
        for epoch in session.epochs():
            for x, y in session.loader:
                step(parts, session, x, y)
                if when == "within":
                    plateau.step(float(session.step))
            plateau.step(1.0 + epoch)
    assert session.epoch <= 2


# --- sessions on one another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_first", [True, False])
def test_sessions_on_a_module_and_on_one_inside_it_are_refused(inner_first: bool) -> None:
    parts = make_parts()
    inner = parts.model.blocks
    options = {"epochs": 2, "engine": "masked", "sample": torch.zeros(2, 6, 8, 8)}
    inner_sgd = torch.optim.SGD(inner.parameters(), lr=0.1)

    def attach_inner() -> spfde.Session:
        return spfde.attach(inner, inner_sgd, parts.loader, SPARSE, **options)

    def attach_outer() -> spfde.Session:
        return spfde.attach(parts.model, parts.optimizer, parts.loader, SPARSE, epochs=2, engine="masked")

    first, second = (attach_inner, attach_outer) if inner_first else (attach_outer, attach_inner)
    session = first()
    with pytest.raises(spfde.InvalidArgument, match="session") as caught:
        second()
    assert caught.value.problems[0].argument == "model"
    session.detach()
    second().detach()


def test_a_session_is_looked_for_while_another_thread_attaches(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [attached() for _ in range(3)]
    holds, meanwhile = spfde.Session.holds, []

    def interrupted(session: spfde.Session, target: object) -> bool:
        if not meanwhile:
            meanwhile.append(None)
            kept.append(attached())
        return holds(session, target)

    monkeypatch.setattr(spfde.Session, "holds", interrupted)
    kept.append(attached())
    assert len(kept) == 5


# --- asked for -------------------------------------------------------------------------------------------------------


def test_verify_changes_nothing_where_nothing_is_wrong() -> None:
    def run(verifies: bool) -> dict[str, Tensor]:
        parts, session = attached()
        for _ in session.epochs():
            for x, y in session.loader:
                step(parts, session, x, y)
                if verifies:
                    session.verify()
        return {name: value.clone() for name, value in parts.model.state_dict().items()}

    plain, verified = run(False), run(True)
    assert all(torch.equal(value, verified[name]) for name, value in plain.items())


def test_a_detached_session_verifies_nothing() -> None:
    parts, session = attached()
    session.detach()
    assigned(parts)
    with pytest.raises(spfde.UsageError, match="attach"):
        session.verify()


def test_replaced_and_written_tensors_are_told_in_their_number_and_by_name() -> None:
    parts, session = attached()
    name, mask = next(iter(session.masks.items()))
    with torch.no_grad():
        dict(parts.model.named_parameters())[name].masked_fill_(~mask, 1.0)
    with pytest.warns(UserWarning, match="outside the masks") as heard:
        session.verify()
    assert f"1 tensor ('{name}')" in str(heard[0].message)
    parts.model.stem.weight = nn.Parameter(parts.model.stem.weight.detach().clone())
    with pytest.raises(spfde.UsageError, match=r"'stem\.weight'"):
        session.verify()

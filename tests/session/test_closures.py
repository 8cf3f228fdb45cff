"""Steps with a closure: those of trainers that pass one, which runs forward and backward or does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spfde
from helpers.resuming import assert_equal, recipe_with
from helpers.short import short
from helpers.training import Parts, make_parts

METHODS = ["topkast", "str", "deepr", "rigl", "mest-gradient", "snfs"]


def run(method: str, step: Callable[[Parts, Callable[[], Tensor]], None]) -> tuple[Any, spfde.Session, Parts]:
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe_with(method), epochs=8, engine="masked")
    for _ in session.epochs():
        for x, y in session.loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                parts.optimizer.zero_grad()
                logits = parts.model(x)
                loss = F.cross_entropy(logits, y)
                loss.backward()
                session.observe(logits, y)
                return loss

            step(parts, closure)
    weights = dict(parts.model.state_dict())
    return (weights, dict(session.masks)), session, parts


def plain(parts: Parts, closure: Callable[[], Tensor]) -> None:
    closure()
    parts.optimizer.step()


def inside(parts: Parts, closure: Callable[[], Tensor]) -> None:
    parts.optimizer.step(closure)


def by_name(parts: Parts, closure: Callable[[], Tensor]) -> None:
    parts.optimizer.step(closure=closure)


def idle(parts: Parts, closure: Callable[[], Tensor]) -> None:
    closure()
    parts.optimizer.step(closure=lambda: None)


@pytest.mark.parametrize("method", short(METHODS, ["topkast", "rigl", "deepr"]))
def test_a_step_with_a_closure_is_the_step_without_bit_for_bit(method: str) -> None:
    expected, session, _ = run(method, plain)
    for how in (inside, by_name, idle):
        found, other, _ = run(method, how)
        assert_equal(found, expected)
        assert other.step == session.step


class Climbing(torch.optim.SGD):
    """Moves the weights before it runs its closure, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            held = [(p, p.clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
            for p, _ in held:
                p.add_(0.01 * p.grad)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, before in held:
                p.copy_(before)
        super().step()


@pytest.mark.parametrize("method", ["topkast", "str"])
def test_weights_that_are_moved_before_the_closure_runs_are_refused_and_the_model_stays_sparse(method: str) -> None:
    parts = make_parts()
    parts.optimizer = Climbing(parts.model.parameters(), lr=0.05)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe_with(method), epochs=8, engine="masked")
    x, y = next(iter(session.loader))
    F.cross_entropy(parts.model(x), y).backward()
    with pytest.raises(spfde.UsageError, match="closure") as caught:
        parts.optimizer.step(lambda: F.cross_entropy(parts.model(x), y).backward())
    assert "Climbing" in str(caught.value)


def test_weights_that_are_moved_before_the_closure_runs_are_rewired_by_their_sign_before_the_step() -> None:
    parts = make_parts()
    parts.optimizer = Climbing(parts.model.parameters(), lr=0.05)
    how = spfde.Recipe(sparsity=spfde.DeepR(sparsity=0.8), update_interval_epochs=2)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=2, engine="masked")
    for _ in session.epochs():
        for x, y in session.loader:
            parts.optimizer.zero_grad()
            F.cross_entropy(parts.model(x), y).backward()
            parts.optimizer.step(lambda x=x, y=y: F.cross_entropy(parts.model(x), y).backward())
    weights = dict(parts.model.named_parameters())
    assert session.step == 10
    assert not any(weights[name].detach()[~mask].any() for name, mask in session.masks.items())


def test_a_closure_that_fails_leaves_the_sparse_weights_and_training_goes_on() -> None:
    parts = make_parts()
    how = spfde.Recipe(sparsity=spfde.TopKAST(sparsity=0.8), update_interval_epochs=2)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=2, engine="masked")
    session.begin_epoch()

    def fails() -> None:
        raise KeyboardInterrupt

    weights = dict(parts.model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        parts.optimizer.step(fails)
    assert not any(weights[name].detach()[~mask].any() for name, mask in session.masks.items())
    x, y = next(iter(parts.loader))
    F.cross_entropy(parts.model(x), y).backward()
    parts.optimizer.step()
    session.verify()


class Shrinking(torch.optim.SGD):
    """Shrinks the weights and has its base class take the step, which runs the hooks of the optimizer once more."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)
        super().step()
        return loss


@pytest.mark.parametrize("method", ["topkast", "str", "deepr", "set-block"])
def test_a_step_that_calls_that_of_its_base_class_is_one_step_on_the_weights_that_learn(method: str) -> None:
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)  # from now on that class runs hooks
    how = recipe_with(method).model_copy(update={"freezing": None, "sieving": None, "learning_rate": None})
    ends = []
    for kind, options in ((Shrinking, {}), (torch.optim.SGD, {"weight_decay": 2.0})):
        parts = make_parts()
        parts.optimizer = kind(parts.model.parameters(), lr=0.05, **options)
        session = spfde.attach(parts.model, parts.optimizer, parts.loader, how, epochs=2, engine="masked")
        for _ in session.epochs():
            for x, y in session.loader:
                parts.optimizer.zero_grad()
                F.cross_entropy(parts.model(x), y).backward()
                parts.optimizer.step()
            # Before masks follow from weights that rounding has told apart.
            if session.epoch == 0:
                ends.append({name: value.clone() for name, value in parts.model.named_parameters()})
        assert session.step == 10
    # A decay of 2 at a rate of 0.05 shrinks by as much.
    assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items())

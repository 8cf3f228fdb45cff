"""A list of optimizers: Muon for matrices and AdamW for the rest, a generator alone, one for each half."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import spfde
from helpers.resuming import METHODS, assert_equal, recipe_with
from helpers.training import Parts, make_parts, train


def halves(parts: Parts) -> list[torch.optim.Optimizer]:
    """SGD for the convolutions of the first two blocks, AdamW for the rest."""
    first = [m.weight for m in parts.model.blocks[:2].modules() if isinstance(m, torch.nn.Conv2d)]
    rest = [p for p in parts.model.parameters() if all(p is not weight for weight in first)]
    return [torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)]


def outside(session: spfde.Session, parts: Parts, optimizers: list[torch.optim.Optimizer]) -> int:
    """Weights and values of optimizer state that are not zero outside the masks."""
    weights, found = dict(parts.model.named_parameters()), 0
    for name, mask in session.masks.items():
        state = [s for o in optimizers for s in o.state.get(weights[name], {}).values() if s.shape == mask.shape]
        found += sum(int(value.detach()[~mask].count_nonzero()) for value in (weights[name], *state))
    return found


def steps(session: spfde.Session, parts: Parts, optimizers: list[Any], x: Any, y: Any) -> None:
    logits = parts.model(x)
    F.cross_entropy(logits, y).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    session.observe(logits, y)


@pytest.mark.parametrize("method", ["mest-gradient", "rigl", "snfs", "deepr", "str", "topkast"])
def test_masks_rates_and_freezing_hold_over_both_and_steps_are_counted_once(method: str) -> None:
    parts = make_parts()
    pair = halves(parts)
    options = {"epochs": 8, "engine": "masked"}
    session = spfde.attach(parts.model, pair, parts.loader, recipe_with(method), **options)
    before, rates = dict(session.masks), []
    for _ in session.epochs():
        for x, y in session.loader:
            steps(session, parts, pair, x, y)
        # Top-KAST keeps state where gradients arrive, STR everywhere: beside their latents.
        assert not outside(session, parts, [] if method in ("str", "topkast") else pair)
        rates.append([max(group["lr"] for group in optimizer.param_groups) for optimizer in pair])
    assert any(not torch.equal(mask, before[name]) for name, mask in session.masks.items())
    assert session.step == sum(row.steps for row in session.cost.rows) == 8 * 4
    assert session.frozen_blocks >= 1
    for row in rates:
        assert row[1] == pytest.approx(row[0] / 50) or row[0] < max(r[0] for r in rates)
    session.detach()
    assert [len(optimizer.param_groups) for optimizer in pair] == [1, 1]
    assert [optimizer.param_groups[0]["lr"] for optimizer in pair] == [0.05, 1e-3]


def test_a_list_of_one_trains_like_the_one_alone() -> None:
    ends = []
    for wrap in (lambda optimizer: optimizer, lambda optimizer: [optimizer]):
        parts = make_parts()
        session = spfde.attach(parts.model, wrap(parts.optimizer), parts.loader, recipe_with("rigl"), epochs=8)
        losses = train(parts, session)
        ends.append((losses, dict(parts.model.state_dict()), session.state_dict()["parts"]["masks"]))
    assert_equal(ends[0], ends[1])


def test_where_one_alone_steps_the_layers_of_the_other_wait() -> None:
    parts = make_parts()
    pair = halves(parts)
    how = spfde.Recipe(sparsity=METHODS["rigl"], update_interval_epochs=2)
    session = spfde.attach(parts.model, pair, parts.loader, how, epochs=8, engine="masked")
    before = dict(session.masks)
    stepped = {id(p) for group in pair[0].param_groups for p in group["params"]}
    for epoch in session.epochs():
        for x, y in session.loader:
            steps(session, parts, pair[:1], x, y)
        if epoch == 2:
            break
    names = {name: id(p) for name, p in parts.model.named_parameters()}
    moved = {name for name, mask in session.masks.items() if not torch.equal(mask, before[name])}
    assert moved == {name for name in before if names[name] in stepped}


def test_phases_of_one_and_of_the_other_count_all_their_steps() -> None:
    parts = make_parts()
    pair = halves(parts)
    how = spfde.Recipe(sparsity=METHODS["static"])
    session = spfde.attach(parts.model, tuple(pair), parts.loader, how, epochs=4, engine="masked")
    for epoch in session.epochs():
        for x, y in session.loader:
            steps(session, parts, [pair[epoch % 2]], x, y)
    assert [row.steps for row in session.cost.rows] == [5, 5, 5, 5]


@pytest.mark.parametrize("method", ["static", "str", "deepr"])
def test_phases_within_an_epoch_count_the_same_in_a_run_that_was_stopped_between_them(method: str) -> None:
    def start() -> tuple[Parts, list[torch.optim.Optimizer], spfde.Session]:
        parts = make_parts()
        pair = halves(parts)
        how = spfde.Recipe(sparsity=METHODS[method])
        return parts, pair, spfde.attach(parts.model, pair, parts.loader, how, epochs=2, engine="masked")

    def run(parts: Parts, pair: list[Any], session: spfde.Session, *, phase: int = 0, stop: int | None = None) -> Any:
        for epoch in session.epochs():
            for number, (x, y) in enumerate(session.loader, start=phase):
                steps(session, parts, [pair[number >= 2]], x, y)
                parts.model.zero_grad()
                if (epoch, number) == (0, stop):
                    break
            else:
                phase = 0
                continue
            break
        return copy.deepcopy([own.state_dict() for own in (parts.model, session, *pair)])

    whole = run(*start())
    for stop in (1, 2, 3):
        saved = run(*start(), stop=stop)
        parts, pair, session = start()
        for own, state in zip((parts.model, *pair, session), (saved[0], *saved[2:], saved[1]), strict=True):
            own.load_state_dict(state)
        resumed = run(parts, pair, session, phase=stop + 1)
        assert [row.steps for row in session.cost.rows] == [3, 3]
        assert_equal(resumed[1]["parts"]["masks"], whole[1]["parts"]["masks"])
        assert_equal(resumed[0], whole[0])


@pytest.mark.parametrize("damage", [[1], [1, -2], [1, "2"], [1, 2, 3]])
def test_damaged_counts_of_their_steps_are_refused(damage: list[Any]) -> None:
    parts = make_parts()
    session = spfde.attach(parts.model, halves(parts), parts.loader, spfde.Recipe(sparsity=METHODS["str"]), epochs=2)
    state = session.state_dict()
    with pytest.raises(spfde.StateMismatch):
        session.load_state_dict({**state, "optimizer_steps": damage})


def test_a_parameter_in_two_optimizers_or_in_none_is_refused_by_name() -> None:
    parts = make_parts()
    first, second = halves(parts)
    both = torch.optim.SGD(parts.model.parameters(), lr=0.1)
    for given, word in (([first, both], "more than once"), ([first], "lacks"), ([], "list")):
        with pytest.raises(spfde.InvalidArgument, match=word) as caught:
            spfde.attach(parts.model, given, parts.loader, recipe_with("set"), epochs=8)
        assert caught.value.problems[0].argument == "optimizer"
    session = spfde.attach(parts.model, [first, second], parts.loader, recipe_with("set"), epochs=8, engine="masked")
    assert session.holds(second)

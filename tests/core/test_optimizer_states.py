"""A saved state of an optimizer is taken by an optimizer of its kind on such parameters, and by no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.damaging import damaged
from spfde.core.optimizer_states import check_optimizer
from spfde.errors import StateMismatch

KINDS: list[Any] = [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adam(p, amsgrad=True),
    lambda p: torch.optim.AdamW(p),
    lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    lambda p: torch.optim.NAdam(p),
    lambda p: torch.optim.ASGD(p),
    lambda p: torch.optim.Adagrad(p),
]


def stepped(kind: Any, width: int = 3) -> torch.optim.Optimizer:
    net = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2, bias=False))
    optimizer: torch.optim.Optimizer = kind(
        [{"params": [*net[0].parameters()]}, {"params": [*net[1].parameters()], "lr": 0.01}]
    )
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_each_of_pytorch_s_optimizers_is_taken_by_another_of_its_kind(kind: Any) -> None:
    check_optimizer(stepped(kind).state_dict(), stepped(kind))
    net = nn.Linear(4, 3)
    check_optimizer(kind(net.parameters()).state_dict(), kind(net.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_other_shapes_or_groups_is_refused(kind: Any) -> None:
    with pytest.raises(StateMismatch):
        check_optimizer(kind(nn.Linear(4, 3).parameters()).state_dict(), stepped(kind))
    if any(
        isinstance(value, torch.Tensor) and value.dim()
        for value in stepped(kind).state_dict()["state"].get(0, {}).values()
    ):
        with pytest.raises(StateMismatch, match="does not fit its parameter"):
            check_optimizer(stepped(kind, 5).state_dict(), stepped(kind))


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_state_with_a_value_of_another_type_anywhere_is_refused(kind: Any) -> None:
    optimizer = stepped(kind)
    taken = []
    for what, state in damaged(optimizer.state_dict()):
        try:
            check_optimizer(state, optimizer)
        except StateMismatch:
            continue
        taken.append(what)
    assert [what for what in taken if not what.endswith("deleted")] == []
    # What is kept of a parameter comes with its first step: without it the optimizer begins anew.
    assert all(what.startswith("['state']") for what in taken)

"""Backward passes are seen whichever parameters they reach."""

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
from helpers.resuming import assert_equal

SPARSE = spfde.Recipe(sparsity=spfde.SET(sparsity=0.5), update_interval_epochs=1)
FROZEN = SPARSE.replace(
    freezing=spfde.ProgressiveFreezing(
        blocks=("a", "b", "c"), start_epoch=2, fraction=1.0, flops_reduction=0.4, as_far_as_possible=True
    )
)
N_BATCHES = 10


class Heads(nn.Module):
    """Three layers and two heads; which one is registered first, and which one is called, can be chosen."""

    def __init__(self, *, head_first: bool = False, aux: bool = False, both: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(16, 3)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        if not head_first:
            self.head = nn.Linear(16, 3)
        if aux or both:
            self.aux = nn.Linear(16, 3)
        self.both = both

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return (self.head(x), self.aux(x)) if self.both else self.head(x)


def frozen_by_the_user() -> Heads:
    model = Heads()
    model.head.requires_grad_(False)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], spfde.Recipe, int]] = {
    "the head is registered first, and all before it is frozen": (lambda: Heads(head_first=True), FROZEN, 9),
    "the last one is never called": (lambda: Heads(aux=True), SPARSE, 3),
    "the last one has no loss": (lambda: Heads(both=True), SPARSE, 3),
    "the user has frozen the head": (frozen_by_the_user, SPARSE, 3),
}


class Loop:
    def __init__(self, make: Callable[[], nn.Module], recipe: spfde.Recipe, *, freezes_later: bool = False) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        data = TensorDataset(torch.randn(40, 8), torch.arange(40) % 3)
        loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
        self.session = spfde.attach(self.model, self.optimizer, loader, recipe, epochs=10, engine="masked")

    def backward(self, x: Tensor, y: Tensor) -> None:
        out = self.model(x)
        F.cross_entropy(out[0] if isinstance(out, tuple) else out, y).backward()

    def train(self, stop: tuple[int, int] | None = None, each: int = 1) -> int:
        """The batches that were trained on, ``each`` of them drawn at once, and stepped for together."""
        done = 0
        for epoch in self.session.epochs():
            waiting, in_epoch = [], 0
            for batch in self.session.loader:
                waiting.append(batch)
                if len(waiting) < each:
                    continue
                for x, y in waiting:
                    self.backward(x, y)
                self.optimizer.step()
                self.optimizer.zero_grad()
                done, in_epoch, waiting = done + len(waiting), in_epoch + len(waiting), []
                if (epoch, in_epoch) == stop:
                    return done
        return done

    def states(self) -> list[Any]:
        return copy.deepcopy([own.state_dict() for own in (self.model, self.optimizer, self.session)])


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_was_trained_on_is_not_trained_on_again_by_the_resumed_run(case: str, each: int) -> None:
    make, recipe, epoch = CASES[case]
    whole = Loop(make, recipe)
    whole.train(each=each)
    stopped = Loop(make, recipe)
    stopped.train((epoch, 4), each)
    states, resumed = stopped.states(), Loop(make, recipe)
    for own, state in zip((resumed.model, resumed.optimizer, resumed.session), states, strict=True):
        own.load_state_dict(state)
    assert resumed.train(each=each) == (10 - epoch) * N_BATCHES - 4
    assert_equal(resumed.states()[0], whole.states()[0])


@pytest.mark.parametrize("case", CASES)
def test_steps_of_another_optimizer_are_noticed(case: str) -> None:
    make, recipe, _ = CASES[case]
    loop = Loop(make, recipe.replace(freezing=None))
    other = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    with pytest.raises(spfde.UsageError, match="step"):  # noqa: PT012
        for _ in loop.session.epochs():
            for x, y in loop.session.loader:
                loop.backward(x, y)
                other.step()
                other.zero_grad()
    assert loop.session.epoch == 0


def test_what_learns_changes_within_an_epoch() -> None:
    loop = Loop(lambda: Heads(both=True), SPARSE)
    for _ in loop.session.epochs():
        for number, (x, y) in enumerate(loop.session.loader):
            F.cross_entropy(loop.model(x)[number // 5], y).backward()
            if number == 7:
                # Its gradients alone tell that it is trained on.
                assert loop.session.state_dict()["place"]["taken"] == 8
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        break


def test_a_step_counts_as_training_where_no_backward_pass_can_be_seen() -> None:
    loop = Loop(Heads, SPARSE)
    for _ in loop.session.epochs():
        for number, (x, y) in enumerate(loop.session.loader):
            loss = F.cross_entropy(loop.model(x), y)
            parameters = list(loop.model.parameters())
            for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = grad
            loop.optimizer.step()
            if number == 3:
                assert loop.session.state_dict()["place"]["taken"] == 4
        break


def test_after_the_first_pass_of_an_epoch_few_parameters_are_watched() -> None:
    loop = Loop(Heads, SPARSE)
    hooked = lambda: sum(len(p._post_accumulate_grad_hooks or ()) for p in loop.model.parameters())  # noqa: E731
    at_first = hooked()
    for _ in loop.session.epochs():
        for x, y in loop.session.loader:
            loop.backward(x, y)
            loop.optimizer.step()
        break
    assert hooked() == at_first - 7  # of eight
    loop.session.detach()
    assert not hooked()

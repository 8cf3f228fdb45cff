"""Several optimizers as if they were one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.core.optimizers import LeadingSteps, Optimizers, around_closure
from spfde.core.torch_private import steps_can_be_hooked


def test_the_most_steps_of_any_optimizer_are_the_steps_of_the_loop() -> None:
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    steps = LeadingSteps([first, second])
    led = [steps.leads(each) for each in (first, second, first, first, second, second, second)]
    assert led == [True, False, True, True, False, False, True]


def test_the_steps_of_each_go_on_from_their_counts_with_other_optimizers() -> None:
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    steps = LeadingSteps([first, second])
    for each in (first, first, second):
        steps.leads(each)
    assert steps.counts == [2, 1]
    other = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2)]
    again = LeadingSteps(other)
    again.counts = [2, 1]
    assert [again.leads(each) for each in (other[1], other[1], other[0])] == [False, True, False]
    assert steps.counts == [2, 1]


def test_state_is_found_in_an_optimizer_inside_another() -> None:
    weight = nn.Parameter(torch.ones(2))
    outer, inner = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    outer.base = inner
    weight.grad = torch.ones(2)
    inner.step()
    optimizers = Optimizers.of(outer)
    assert [list(state) for state in optimizers.states_of(weight)] == [["momentum_buffer"]]
    optimizers.forget(weight)
    assert not list(optimizers.states_of(weight))


def test_a_closure_goes_by_way_of_another_function_wherever_it_stands() -> None:
    def run(closure: object) -> tuple[str, object]:
        return "around", closure()  # type: ignore[operator]

    positional, keywords = around_closure(("optimizer", lambda: 1), {}, run) or ((), {})
    assert positional[1]() == ("around", 1)
    _, keywords = around_closure(("optimizer",), {"closure": lambda: 2}, run) or ((), {})
    assert keywords["closure"]() == ("around", 2)
    assert around_closure(("optimizer", None), {}, run) is None


def _wrapper() -> type[torch.optim.Optimizer]:
    """A new class each time, for PyTorch patches classes."""

    class Around(torch.optim.Optimizer):
        """Wraps another optimizer without the base class's ``__init__``, as Lookahead of timm and others do."""

        def __init__(self, base: torch.optim.Optimizer) -> None:
            self._optimizer_step_pre_hooks: dict[int, Any] = OrderedDict()
            self._optimizer_step_post_hooks: dict[int, Any] = OrderedDict()
            self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state

        def step(self, closure: Any = None) -> Any:
            return self.base.step(closure)

    return Around


@pytest.mark.parametrize("inherits", [False, True])
def test_the_first_step_of_an_optimizer_that_was_made_without_its_base_class_is_hooked(inherits: bool) -> None:
    kind = _wrapper()
    if inherits:
        kind = type("Further", (kind,), {})
    weight = nn.Parameter(torch.ones(1))
    outer = kind(torch.optim.SGD([weight], lr=0.1))
    seen: list[str] = []
    handles = Optimizers.of(outer).hook(lambda *_: seen.append("before"), lambda *_: seen.append("after"))
    outer.step()
    assert seen == ["before", "after"]
    outer.zero_grad()  # which patches what is not patched yet
    outer.step()
    assert seen == ["before", "after"] * 2
    for handle in handles:
        handle.remove()
    outer.step()
    assert len(seen) == 4


def test_a_step_that_a_scheduler_wrapped_before_it_could_be_hooked_is_refused_with_the_remedy() -> None:
    model = nn.Linear(4, 2)

    def attach(optimizer: torch.optim.Optimizer) -> spfde.Session:
        loader = DataLoader(TensorDataset(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)), batch_size=4)
        return spfde.attach(model, optimizer, loader, spfde.Recipe(), epochs=1)

    unhooked = _wrapper()(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.optim.lr_scheduler.StepLR(unhooked, 1)
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(unhooked)
    assert "zero_grad()" in caught.value.problems[0].remedy
    # The remedy, as it is written there.
    hooked = _wrapper()(torch.optim.SGD(model.parameters(), lr=0.1))
    hooked.zero_grad()
    torch.optim.lr_scheduler.StepLR(hooked, 1)
    session = attach(hooked)
    for _ in session.epochs():
        for x, y in session.loader:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            hooked.step()
            hooked.zero_grad()
    assert session.step == 2


def test_a_step_that_others_have_wrapped_on_the_instance_is_hooked_inside() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    own, seen = optimizer.step, []
    optimizer.step = lambda *given: own(*given)  # type: ignore[method-assign]
    assert steps_can_be_hooked(optimizer)
    Optimizers.of(optimizer).hook(lambda *_: seen.append("before"), lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]

"""Several optimizers as if they were one."""

from __future__ import annotations

import torch
from torch import nn

from spfde.core.optimizers import LeadingSteps, Optimizers, around_closure


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

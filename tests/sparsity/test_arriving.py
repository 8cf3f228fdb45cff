"""When gradients are masked: together at the end of a backward pass, and earlier where somebody looks."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.counting import Operations
from spfde.core.torch_private import backward_pass
from spfde.sparsity import RigL, SparsityMethod, StaticSparse
from spfde.sparsity.masker import Masker
from spfde.sparsity.schedule import LayerPlan, MaskPlan


class Run:
    """Linear layers of eight, masked to a half."""

    def __init__(
        self, depth: int = 3, method: SparsityMethod | None = None, first_hook: Callable[[Tensor], None] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(depth)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        layers = dict(self.model.named_parameters())
        if first_hook is not None:
            self.model[1].weight.register_post_accumulate_grad_hook(first_hook)
        method = method or StaticSparse(sparsity=0.5, dense_first=False, dense_head=False)
        self.masker = Masker(layers, self.optimizer, method, generator=torch.Generator().manual_seed(0))
        self.masker.install()
        self.x = torch.randn(4, 8)

    def loss(self) -> Tensor:
        return self.model(self.x).square().sum()

    def outside(self) -> list[int]:
        """Numbers of each gradient that are not zero though the mask has no weight there."""
        found = []
        for name, mask in self.masker.masks.items():
            grad = self.model.get_parameter(name).grad
            assert grad is not None
            found.append(int(torch.count_nonzero(grad[~mask])))
            assert grad[mask].any()
        return found


@pytest.mark.parametrize("depth", [3, 12])
def test_gradients_of_all_layers_are_masked_by_one_operation_when_backward_returns(depth: int) -> None:
    run = Run(depth)
    run.loss().backward()
    run.model.zero_grad()
    loss = run.loss()
    with Operations() as ours:
        loss.backward()
    assert run.outside() == [0] * depth
    assert ours.names["_foreach_mul_"] == 1
    run.masker.remove()
    run.model.zero_grad()
    loss = run.loss()
    with Operations() as plain:
        loss.backward()
    assert ours.names - plain.names == {"_foreach_mul_": 1}


def test_a_whole_step_takes_one_operation_for_gradients_and_one_for_weights_and_state() -> None:
    run = Run(12)
    for _ in range(2):
        run.loss().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.loss().backward()
    with Operations() as ours:
        run.optimizer.step()
    run.masker.remove()
    with Operations() as plain:
        run.optimizer.step()
    assert ours.names - plain.names == {"_foreach_mul_": 1}


def test_accumulated_gradients_are_masked_after_each_pass() -> None:
    run = Run()
    for _ in range(3):
        run.loss().backward()
        assert run.outside() == [0, 0, 0]


def test_a_hook_of_somebody_elses_sees_the_masked_gradient_whenever_it_was_registered() -> None:
    run = Run()
    seen: list[int] = []
    weight = run.model[1].weight
    run.loss().backward()

    def look(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen.append(int(torch.count_nonzero(parameter.grad[~run.masker.masks["1.weight"]])))

    handle = weight.register_post_accumulate_grad_hook(look)
    run.model.zero_grad()
    run.loss().backward()
    assert seen == [0]
    assert run.outside() == [0, 0, 0]
    handle.remove()
    run.model.zero_grad()
    run.loss().backward()
    assert run.outside() == [0, 0, 0]
    assert len(seen) == 1


def test_what_a_hook_writes_to_a_gradient_outside_the_mask_does_not_reach_the_optimizer() -> None:
    run = Run()

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.add_(1.0)

    run.model[1].weight.register_post_accumulate_grad_hook(add)
    run.loss().backward()
    assert run.outside()[1] == 32
    run.optimizer.step()
    assert run.outside() == [0, 0, 0]


def test_gradients_of_a_pass_that_failed_are_masked_at_the_next_step_or_pass() -> None:
    run = Run()

    def fail(_: Tensor) -> None:
        raise RuntimeError("as out of memory")

    handle = run.model[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.loss().backward()
    handle.remove()
    run.model.zero_grad()
    run.loss().backward()
    assert run.outside() == [0, 0, 0]
    run.optimizer.step()
    run.model.zero_grad()
    run.loss().backward()
    assert run.outside() == [0, 0, 0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_within_a_pass_leave_masked_gradients(reentrant: bool) -> None:
    run = Run(4)
    x = run.x.clone().requires_grad_()
    out = run.model[0](x)
    out = checkpoint(lambda h: run.model[2](run.model[1](h)), out, use_reentrant=reentrant)
    (run.model[3](out).square().sum() + run.model[1](x).sum()).backward()
    assert run.outside() == [0] * 4


def test_an_optimizer_that_steps_as_gradients_arrive_uses_masked_ones() -> None:
    run = Run()
    own = {p: torch.optim.SGD([p], lr=0.1) for p in run.model.parameters()}
    run.masker.remove()
    layers = dict(run.model.named_parameters())
    masker = Masker(
        layers,
        list(own.values()),
        StaticSparse(sparsity=0.5, dense_first=False, dense_head=False),
        generator=torch.Generator().manual_seed(0),
    )
    masker.install()

    def step(parameter: Tensor) -> None:
        own[parameter].step()  # type: ignore[index]
        own[parameter].zero_grad()  # type: ignore[index]

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.loss().backward()
    for (name, mask), old in zip(masker.masks.items(), before, strict=True):
        now = run.model.get_parameter(name).detach()
        assert not now[~mask].any()
        assert (now[mask] != old[mask]).any()


class Engine(torch.autograd.Function):
    """A product whose backward pass masks the weight's gradient itself, and says so."""

    @staticmethod
    def forward(ctx: Any, masker: Masker, names: Collection[str], masks: bool, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.of = masker, names, masks
        ctx.save_for_backward(x)
        return torch.stack([x @ weight.T for weight in weights]).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        masker, names, masks = ctx.of
        (x,) = ctx.saved_tensors
        found = gradient.T @ x
        each = {name: found * mask if masks else found.clone() for name, mask in masker.masks.items()}
        masker.masked_already({name: each[name] for name in names})
        return None, None, None, None, *each.values()


def run_engine(run: Run, names: Collection[str], *, masks: bool = True) -> None:
    run.x = run.x.abs()
    Engine.apply(run.masker, names, masks, run.x, *run.model.parameters()).sum().backward()


def test_gradients_that_an_engine_has_masked_are_left_as_they_come() -> None:
    run = Run()
    run_engine(run, set(run.masker.masks))
    run.model.zero_grad()
    with Operations() as found:
        run_engine(run, set(run.masker.masks))
    assert found.names["_foreach_mul_"] == 0
    assert run.outside() == [0, 0, 0]
    # Nor does the step, which knows that nobody has written to them since.
    with Operations() as found:
        run.optimizer.step()
    masked_in_step = found.names["_foreach_mul_"]
    run.loss().backward()
    assert run.model[0].weight.grad is not None
    run.model[0].weight.grad.add_(0.0)
    with Operations() as found:
        run.optimizer.step()
    assert found.names["_foreach_mul_"] == masked_in_step + 1


def test_what_an_engine_says_is_believed_of_its_names_and_pass_alone() -> None:
    run = Run()
    run_engine(run, {"0.weight"}, masks=False)
    assert [count > 0 for count in run.outside()] == [True, False, False]
    run.model.zero_grad()
    run.loss().backward()
    assert run.outside() == [0, 0, 0]


def test_an_engines_gradient_is_masked_where_it_adds_to_one_that_is_not() -> None:
    run = Run()
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run_engine(run, set(run.masker.masks))
    assert run.outside() == [0, 0, 0]
    run_engine(run, set(run.masker.masks))
    assert run.outside() == [0, 0, 0]


@pytest.mark.parametrize("order", [1, -1])
def test_an_engines_gradient_is_masked_where_the_loss_reaches_the_weight_another_way_too(order: int) -> None:
    run = Run()
    names = ["0.weight", "2.weight"]
    losses = [lambda: Engine.apply(run.masker, names, True, run.x, *run.model.parameters()).sum(), run.loss]
    one, other = [loss() for loss in losses[::order]]
    (one + other).backward()
    assert run.outside() == [0, 0, 0]


@pytest.mark.parametrize("writes", [False, True])
def test_an_engines_gradient_that_hooks_change_on_its_way_is_masked(writes: bool) -> None:
    run = Run()
    for _ in range(2):
        run.model[1].weight.register_hook(lambda grad: grad.add_(1.0) if writes else grad + 1.0)
    run_engine(run, set(run.masker.masks))
    assert run.outside() == [0, 0, 0]


def test_an_engines_gradient_is_masked_where_a_hook_writes_in_a_way_that_no_version_tells() -> None:
    def write(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.data.add_(1.0)

    run = Run(first_hook=write)
    run_engine(run, set(run.masker.masks))
    assert run.outside() == [0, 0, 0]


def test_a_dense_gradient_is_collected_though_others_wait_for_the_end_of_the_pass() -> None:
    run = Run(method=RigL(sparsity=0.5, dense_first=False, dense_head=False))
    own = {
        name: LayerPlan(target=32, survive=20, active=32, gradient=32, mutates=name == "1.weight")
        for name in run.masker.layers
    }
    plan = MaskPlan(epoch=1, progress=0.1, update=True, last=False, dense_gradients="one step", layers=own)
    run.masker.begin_epoch(plan)
    assert run.masker.wants_dense_gradients == {"1.weight"}
    (expected,) = torch.autograd.grad(run.loss(), [run.model[1].weight])
    run.loss().backward()
    assert run.outside() == [0, 0, 0]
    assert torch.equal(run.masker.take_dense_gradients()["1.weight"], expected)


def test_the_hooks_keep_no_masker_alive_and_a_copy_of_the_model_has_dense_gradients() -> None:
    run = Run()
    twin = copy.deepcopy(run.model)
    twin(run.x).square().sum().backward()
    assert all(torch.count_nonzero(p.grad) > 32 for p in twin.parameters() if p.grad is not None)
    reference, model = weakref.ref(run.masker), run.model
    del run
    gc.collect()
    assert reference() is None
    model(torch.randn(4, 8)).sum().backward()


def test_passes_are_told_apart_by_a_number() -> None:
    assert backward_pass() == -1
    numbers: list[int] = []
    weight = nn.Parameter(torch.ones(1))
    weight.register_post_accumulate_grad_hook(lambda _: numbers.append(backward_pass()))
    for _ in range(2):
        weight.sum().backward()
    assert -1 not in numbers
    assert len(set(numbers)) == 2

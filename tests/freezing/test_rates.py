"""A cosine for each block, and parameter groups split and joined again."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from spfde.core.errors import StateMismatch, UsageError
from spfde.freezing import BlockwiseCosine
from spfde.freezing.rates import GroupRates, check_rates, learning_rate_factor


def parameters(n: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(n)]


def by_block(ps: list[nn.Parameter], blocks: list[int]) -> dict[int, int]:
    return {id(p): block for p, block in zip(ps, blocks, strict=True)}


def rate_at(base: float, epoch: int, *, stop: int, warmup: int, final: float) -> float:
    opt = torch.optim.SGD(parameters(1), lr=base)
    rates = GroupRates(opt, {}, [stop], BlockwiseCosine(warmup_epochs=warmup, final=final))
    rates.apply(epoch, [learning_rate_factor(epoch, stop=stop, warmup=warmup)])
    return opt.param_groups[0]["lr"]


def factors(epoch: int, *stops: int) -> list[float]:
    return [learning_rate_factor(epoch, stop=stop, warmup=0) for stop in stops]


def test_the_rate_falls_by_a_cosine_to_its_end_at_the_freeze_epoch():
    assert rate_at(0.2, 0, stop=10, warmup=0, final=0.0) == pytest.approx(0.2)
    assert rate_at(0.2, 5, stop=10, warmup=0, final=0.0) == pytest.approx(0.1)
    assert rate_at(0.2, 9, stop=10, warmup=0, final=0.0) == pytest.approx(0.1 * (1 + math.cos(0.9 * math.pi)))
    assert rate_at(0.2, 10, stop=10, warmup=0, final=0.01) == 0.01
    assert rate_at(0.2, 50, stop=10, warmup=0, final=0.01) == 0.01
    assert rate_at(0.2, 0, stop=0, warmup=0, final=0.0) == 0.0


def test_the_rate_warms_up_linearly_and_then_starts_at_its_base():
    rates = [rate_at(0.4, epoch, stop=8, warmup=4, final=0.0) for epoch in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rate_at(0.4, 6, stop=8, warmup=4, final=0.0) == pytest.approx(0.2)


def test_groups_are_split_by_block_and_each_keeps_its_options_and_its_own_base_rate():
    ps = parameters(5)
    opt = torch.optim.SGD(
        [{"params": ps[:3], "lr": 0.1, "weight_decay": 0.5}, {"params": ps[3:], "lr": 0.2}], lr=1.0, momentum=0.9
    )
    rates = GroupRates(opt, by_block(ps, [1, 0, 1, 0, 2]), [4, 8, 16], BlockwiseCosine())
    assert [[index(ps, p) for p in g["params"]] for g in opt.param_groups] == [
        [1],
        [0, 2],
        [3],
        [4],
    ]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.5, 0.5, 0, 0]
    assert all(group["momentum"] == 0.9 for group in opt.param_groups)
    rates.apply(4, factors(4, 4, 8, 16))
    assert [group["lr"] for group in opt.param_groups] == pytest.approx(
        [0.0, 0.05, 0.0, 0.1 * (1 + math.cos(math.pi / 4))]
    )


def index(ps: list[nn.Parameter], wanted: nn.Parameter) -> int:
    return next(i for i, p in enumerate(ps) if p is wanted)


def test_joining_restores_the_very_groups_with_their_order_and_rates():
    ps = parameters(6)
    opt = torch.optim.SGD([{"params": ps[:4], "lr": 0.1}, {"params": ps[4:], "weight_decay": 0.3}], lr=0.7)
    groups = list(opt.param_groups)
    before = [dict(group, params=list(group["params"])) for group in groups]
    the_list = opt.param_groups
    rates = GroupRates(opt, by_block(ps, [2, 0, 1, 0, 1, 0]), [2, 4, 8], BlockwiseCosine())
    assert len(opt.param_groups) == 5
    rates.apply(3, factors(3, 2, 4, 8))
    rates.join()
    assert opt.param_groups is the_list
    assert all(a is b for a, b in zip(opt.param_groups, groups, strict=True))
    for group, old in zip(opt.param_groups, before, strict=True):
        assert group.keys() == old.keys()
        assert all(a is b for a, b in zip(group["params"], old["params"], strict=True))
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in old.items() if k != "params"}
    rates.join()
    rates.apply(1, factors(1, 2, 4, 8))
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.7]


def test_a_tensor_rate_is_filled_in_place_and_each_group_has_its_own():
    ps = parameters(2)
    lr = torch.tensor(0.25)
    opt = torch.optim.Adam(ps, lr=lr)
    rates = GroupRates(opt, by_block(ps, [0, 1]), [2, 4], BlockwiseCosine())
    tensors = [group["lr"] for group in opt.param_groups]
    rates.apply(2, factors(2, 2, 4))
    assert [float(t) for t in tensors] == pytest.approx([0.0, 0.125])
    assert all(group["lr"] is t for group, t in zip(opt.param_groups, tensors, strict=True))
    for p in ps:
        p.grad = torch.ones(2)
    opt.step()
    assert torch.equal(ps[0], torch.ones(2))
    assert not torch.equal(ps[1], torch.ones(2))
    rates.join()
    assert opt.param_groups[0]["lr"] is lr
    assert isinstance(lr, Tensor)
    assert float(lr) == 0.25


def test_named_parameters_are_split_with_their_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = torch.optim.SGD(model.named_parameters(), lr=0.1)
    block_of = {id(p): block for block, layer in enumerate(model) for p in layer.parameters()}
    rates = GroupRates(opt, block_of, [2, 4], BlockwiseCosine())
    assert [group["param_names"] for group in opt.param_groups] == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    rates.join()
    assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_parameter_without_a_block_goes_with_the_head():
    ps = parameters(2)
    opt = torch.optim.SGD(ps, lr=1.0)
    GroupRates(opt, {id(ps[0]): 0}, [2, 4], BlockwiseCosine()).apply(2, factors(2, 2, 4))
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.0, 0.5])


def test_momentum_goes_on_through_splitting_and_joining():
    torch.manual_seed(0)
    ps = parameters(2)
    opt = torch.optim.SGD(ps, lr=0.1, momentum=0.9)
    for p in ps:
        p.grad = torch.ones(2)
    opt.step()
    buffers = [opt.state[p]["momentum_buffer"] for p in ps]
    rates = GroupRates(opt, by_block(ps, [0, 1]), [2, 4], BlockwiseCosine())
    opt.step()
    rates.join()
    assert all(opt.state[p]["momentum_buffer"] is b for p, b in zip(ps, buffers, strict=True))
    assert torch.allclose(buffers[0], torch.full((2,), 1.9))


def test_a_loaded_optimizer_state_and_loaded_base_rates_go_on_as_before():
    def make(lr: float):
        ps = parameters(3)
        opt = torch.optim.SGD(ps, lr=lr, momentum=0.9)
        return opt, GroupRates(opt, by_block(ps, [0, 1, 2]), [2, 4, 8], BlockwiseCosine())

    opt, rates = make(0.1)
    rates.apply(1, factors(1, 2, 4, 8))
    saved = opt.state_dict(), rates.state_dict()
    other, other_rates = make(0.5)
    other.load_state_dict(saved[0])
    other_rates.load_state_dict(saved[1])
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in opt.param_groups]
    rates.apply(3, factors(3, 2, 4, 8))
    other_rates.apply(3, factors(3, 2, 4, 8))
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in opt.param_groups]
    other_rates.join()
    assert [g["lr"] for g in other.param_groups] == [0.1]
    assert len(other.param_groups[0]["params"]) == 3


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("order", ["before", "after", "never"])
def test_the_rates_of_the_epoch_come_with_the_state_whenever_the_optimizer_s_is_loaded(order, as_tensor):
    def make(lr):
        ps = parameters(3)
        opt = torch.optim.SGD(ps, lr=lr)
        return opt, GroupRates(opt, by_block(ps, [0, 1, 2]), [2, 4, 8], BlockwiseCosine())

    opt, rates = make(0.1)
    rates.apply(1, factors(1, 2, 4, 8))
    saved = opt.state_dict(), rates.state_dict()
    other, other_rates = make(torch.tensor(0.5) if as_tensor else 0.5)
    if order == "before":
        other.load_state_dict(saved[0])
    other_rates.load_state_dict(saved[1])
    if order == "after":
        other.load_state_dict(saved[0])
    expected = [rate_at(0.1, 1, stop=stop, warmup=0, final=0.0) for stop in (2, 4, 8)]
    assert [float(g["lr"]) for g in other.param_groups] == pytest.approx(expected)
    other_rates.check()
    for group in other.param_groups:
        group["lr"] = 0.4
    with pytest.raises(UsageError, match=r"0\.4"):
        other_rates.check()


def test_a_state_from_before_the_first_epoch_sets_no_rate():
    ps = parameters(2)
    opt = torch.optim.SGD(ps, lr=0.1)
    rates = GroupRates(opt, by_block(ps, [0, 1]), [2, 4], BlockwiseCosine())
    state = rates.state_dict()
    rates.apply(1, factors(1, 2, 4))
    rates.load_state_dict(state)
    rates.check()
    rates.apply(0, factors(0, 2, 4))
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.1]


def test_looking_at_a_state_sets_no_rate():
    ps = parameters(2)
    opt = torch.optim.SGD(ps, lr=0.1)
    rates = GroupRates(opt, by_block(ps, [0, 1]), [2, 4], BlockwiseCosine())
    rates.apply(1, factors(1, 2, 4))
    state, before = rates.state_dict(), [g["lr"] for g in opt.param_groups]
    rates.check_state({**state, "rates": [0.3, 0.3]})
    assert [g["lr"] for g in opt.param_groups] == before


def test_a_group_that_was_added_later_is_left_alone():
    ps = parameters(2)
    opt = torch.optim.SGD(ps, lr=0.1)
    rates = GroupRates(opt, by_block(ps, [0, 1]), [2, 4], BlockwiseCosine())
    opt.add_param_group({"params": parameters(1), "lr": 0.3})
    rates.apply(2, factors(2, 2, 4))
    assert opt.param_groups[-1]["lr"] == 0.3
    rates.join()
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.3]


def test_options_changed_meanwhile_survive_joining():
    ps = parameters(2)
    opt = torch.optim.SGD(ps, lr=0.1)
    rates = GroupRates(opt, by_block(ps, [0, 1]), [2, 4], BlockwiseCosine())
    for group in opt.param_groups:
        group["weight_decay"] = 0.7
    rates.join()
    assert opt.param_groups[0]["weight_decay"] == 0.7


def test_a_scheduler_on_the_optimizer_is_refused_and_nothing_is_changed():
    opt = torch.optim.SGD(parameters(2), lr=0.1)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    (problem,) = check_rates(opt, BlockwiseCosine(), [2, 4])
    assert re.search(r"initial_lr.*learning_rate=None", str(problem))
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("technique", "stops", "message"),
    [
        (BlockwiseCosine(final=0.5), [2, 4], "final=0.5.*group 0 has 0.1"),
        (BlockwiseCosine(warmup_epochs=2), [2, 4], "warmup_epochs=2.*the first is 2"),
    ],
)
def test_a_cosine_that_does_not_fit_is_refused(technique, stops, message):
    (problem,) = check_rates(torch.optim.SGD(parameters(2), lr=0.1), technique, stops)
    assert re.search(message, str(problem))


def test_an_optimizer_of_one_group_only_is_refused():
    (problem,) = check_rates(torch.optim.LBFGS(parameters(2)), BlockwiseCosine(), [2, 4])
    assert "LBFGS" in str(problem)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"base_rates": [0.1, 0.2], "rates": []},
        {"base_rates": "0.1", "rates": []},
        {"base_rates": ["0.1"], "rates": []},
        {"base_rates": [0.1], "rates": [0.1]},
        {"base_rates": [0.1], "rates": ["0.1", "0.1"]},
    ],
)
def test_a_state_of_another_optimizer_is_refused(state):
    ps = parameters(2)
    rates = GroupRates(torch.optim.SGD(ps, lr=0.1), by_block(ps, [0, 1]), [2, 4], BlockwiseCosine())
    with pytest.raises(StateMismatch, match="rates"):
        rates.load_state_dict(state)

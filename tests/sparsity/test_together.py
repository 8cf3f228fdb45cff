"""Many tensors masked together: what stays, what becomes zero, and how few operations it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.counting import Operations
from spfde.sparsity import weight as weights
from spfde.sparsity.masks import apply_, bits, factors
from spfde.sparsity.structure import Unstructured
from spfde.sparsity.together import Clearing, GradientMasking
from spfde.sparsity.weight import MaskedWeight

NAN, INF = float("nan"), float("inf")
MASKS = [[True, False, True, False], [False, False, True, True], [True, True, False, True]]


@pytest.fixture(autouse=True, params=["as on a CPU", "as on a GPU"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks as they are, and masks as integers of the size of the numbers."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(
            weights, "keeps_integers", lambda t: t.numel() <= weights.MOST_COPIED and not t.is_complex()
        )


class Net:
    """Three weights of four numbers, masked, under one optimizer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.parameters = [nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype)) for _ in MASKS]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0, momentum=0.9)
        self.layers = [
            MaskedWeight(str(at), p, Unstructured(), 2, optimizer=self.optimizer, generator=torch.Generator())
            for at, p in enumerate(self.parameters)
        ]
        for layer, mask in zip(self.layers, MASKS, strict=True):
            layer.set_mask(torch.tensor(mask), sum(mask))

    def step(self) -> None:
        for p in self.parameters:
            p.grad = torch.ones_like(p)
        self.optimizer.step()

    def momenta(self) -> list[list[float]]:
        return [self.optimizer.state[p]["momentum_buffer"].tolist() for p in self.parameters]


def test_weights_and_their_state_outside_the_masks_are_zero_whatever_was_there() -> None:
    net = Net()
    net.step()
    for p in net.parameters:
        p.data.copy_(torch.tensor([-1.0, NAN, -INF, -2.0]))
    Clearing()(net.layers)
    assert [p.tolist() for p in net.parameters[:2]] == [[-1, 0, -INF, 0], [0, 0, -INF, -2]]
    assert net.parameters[2][1].isnan()
    assert not torch.signbit(net.parameters[0][[1, 3]]).any()
    assert net.momenta() == [[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 1]]


def test_all_layers_and_their_state_take_one_operation() -> None:
    net, clear = Net(), Clearing()
    net.step()
    clear(net.layers)
    with Operations() as found:
        clear(net.layers)
    assert dict(found.names) == {"_foreach_mul_": 1}


def test_a_mask_that_changed_holds_in_the_next_step() -> None:
    net, clear = Net(), Clearing()
    net.step()
    clear(net.layers)
    net.layers[0].set_mask(torch.tensor([False, True, False, True]), 2)
    net.step()
    clear(net.layers)
    assert net.parameters[0].tolist() == [0, 0, 0, 0]  # what grows starts from zero
    assert net.momenta()[0] == [0, 1, 0, 1]


def test_the_masks_memory_as_integers_stays_where_it_is_so_that_a_recorded_graph_reads_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "keeps_integers", lambda _: True)
    layer = Net().layers[0]
    before = layer.factors_for(layer.parameter)
    layer.set_mask(torch.tensor([False, True, True, False]), 2)
    assert layer.factors_for(layer.parameter) is before
    assert before.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("change", ["state", "loaded", "memory", "count"])
def test_tensors_that_took_the_place_of_others_are_found(change: str) -> None:
    net, clear = Net(), Clearing()
    net.step()
    clear(net.layers)
    first, state = net.parameters[0], net.optimizer.state
    if change == "state":
        state[first]["momentum_buffer"] = torch.ones(4)
    elif change == "loaded":
        state[first]["momentum_buffer"].fill_(1)
        net.optimizer.load_state_dict(net.optimizer.state_dict())
    elif change == "memory":
        first.data = torch.ones(4)
    else:
        state[first].update(momentum_buffer=torch.ones(4), count=17)
    clear(net.layers)
    assert (first[[1, 3]] == 0).all()
    assert net.momenta()[0] == [1, 0, 1, 0]


def test_a_count_that_an_optimizer_keeps_as_a_number_is_no_reason_to_look_anew() -> None:
    net, clear = Net(), Clearing()
    net.step()
    net.optimizer.state[net.parameters[0]]["count"] = 1000
    clear(net.layers)
    net.optimizer.state[net.parameters[0]]["count"] = 1001
    with Operations() as found:
        clear(net.layers)
    assert dict(found.names) == {"_foreach_mul_": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_every_type_of_number_is_masked(dtype: torch.dtype) -> None:
    net = Net(dtype)
    net.step()
    Clearing()(net.layers)
    assert [(p.detach() != 0).tolist() for p in net.parameters] == MASKS


def test_a_large_weight_keeps_no_copy_of_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOST_COPIED", 3)
    net, clear = Net(), Clearing()
    net.step()
    clear(net.layers)
    assert all(layer.factors_for(layer.parameter) is layer.mask for layer in net.layers)
    net.layers[0].set_mask(torch.tensor([False, True, True, True]), 3)
    clear(net.layers)
    assert [(p.detach() != 0).tolist() for p in net.parameters] == [[False, False, True, False], *MASKS[1:]]


def test_gradients_of_other_kinds_than_in_the_last_pass_are_masked_too() -> None:
    net, mask = Net(), GradientMasking()
    for dtype in (torch.float32, torch.float32, torch.float64):
        for layer in net.layers:
            layer.parameter.data = layer.parameter.data.to(dtype)
            layer.parameter.grad = torch.full((4,), NAN, dtype=dtype)
        net.parameters[1].grad = None
        mask(net.layers)
        assert net.parameters[1].grad is None
        assert net.parameters[0].grad is not None
        assert (net.parameters[0].grad[[1, 3]] == 0).all()
        assert net.parameters[0].grad[[0, 2]].isnan().all()
    net.layers[0].wider = torch.tensor([True, True, True, False])
    net.parameters[0].grad = torch.ones(4, dtype=torch.float64)
    mask(net.layers)
    assert net.parameters[0].grad.tolist() == [1, 1, 1, 0]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_product_of_bits_with_factors_is_what_applying_a_mask_gives(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    bit = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = torch.randint(-(2**15), 2**15, shape, generator=generator).to(bit).view(dtype)
    order = data.draw(st.permutations(range(len(shape))))
    tensor = tensor.permute(order)
    mask = torch.rand(tensor.shape, generator=generator) < 0.5
    expected = tensor.clone()
    apply_(expected, mask)
    by = factors(tensor, mask)
    assert by.stride() == tensor.stride()
    bits(tensor).mul_(by)
    assert _bits_equal(tensor, expected, bit)


def _bits_equal(one: Tensor, other: Tensor, bit: torch.dtype) -> bool:
    return torch.equal(one.contiguous().view(bit), other.contiguous().view(bit))


def test_what_an_engine_gives_clears_in_the_place_of_products_where_it_takes_the_tensors() -> None:
    net, given, cleared = Net(), [], []

    def clears(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Callable[[], None] | None:
        given.append([mask.tolist() for mask in masks])
        return (lambda: cleared.append(len(tensors))) if takes else None

    takes, clearing = True, Clearing(clears)
    with Operations() as found:
        clearing(net.layers)
        clearing(net.layers)
    assert (given, cleared, found.names["_foreach_mul_"]) == ([MASKS], [3, 3], 0)
    takes = False
    net.step()  # its state is new, so that all is looked up once more
    clearing(net.layers)
    assert len(cleared) == 2
    assert net.momenta() == [[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 1]]


def test_a_look_up_that_failed_is_made_again() -> None:
    net = Net()

    def clears(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Callable[[], None] | None:
        raise RuntimeError("no engine")

    clearing = Clearing(clears)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no engine"):
            clearing(net.layers)

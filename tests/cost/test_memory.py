from __future__ import annotations

import gc
import mmap
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spfde.cost import SavedTensorBytes, memory, peak_bytes, reset_peak
from spfde.cost.flops import LayerCost, ModelCost
from spfde.cost.memory import memory_of, memory_timeline

LAYERS = (
    LayerCost("a.weight", "a", 0, 1000, numel=20, activations=50),
    LayerCost("b:bmm", "b", 1, 1000, numel=0, activations=7),
    LayerCost("c.weight", "c", 2, 1000, numel=10, activations=5),
)


def test_the_papers_accounting_by_hand() -> None:
    """Active weights only, weighted outputs only, and frozen layers keep their activations."""
    modelled = memory_of(LAYERS, (0.5, 1.0, 1.0), (True, False, False), batch_size=2, accounting="paper")
    weights, activations, weight_gradients, activation_gradients = 4 * 20, 4 * 2 * 55, 4 * 10, 4 * 2 * 5
    assert modelled == weights + activations + weight_gradients + activation_gradients


def test_the_actual_accounting_by_hand() -> None:
    """Dense weights, a byte of mask for each weight of a sparse layer, nothing kept for frozen layers."""
    modelled = memory_of(LAYERS, (0.5, 1.0, 1.0), (True, False, False), batch_size=2, accounting="actual")
    weights, masks, activations, weight_gradients, activation_gradients = 4 * 30, 20, 4 * 2 * 12, 4 * 10, 4 * 2 * 12
    assert modelled == weights + masks + activations + weight_gradients + activation_gradients


@pytest.mark.parametrize("density", [0.5, 0.1, 0.05, 0.02])
def test_ten_frozen_blocks_of_resnet32_need_42_to_44_percent_less_than_the_sparse_model(
    density: float, resnet32: ModelCost, frozen_layers: Callable[[int], tuple[bool, ...]]
) -> None:
    layers = resnet32.layers
    target = (density,) * len(layers)
    timeline = memory_timeline(
        layers, [(target, frozen_layers(10))], target_density=target, batch_size=64, accounting="paper"
    )
    assert 0.42 <= 1 - timeline.minimum_of_sparse <= 0.44


@pytest.mark.parametrize("start_epoch", [65, 50])
def test_a_run_of_resnet32_needs_20_to_25_percent_less_on_average(
    start_epoch: int, resnet32: ModelCost, frozen_layers: Callable[[int], tuple[bool, ...]]
) -> None:
    layers = resnet32.layers
    target = (0.1,) * len(layers)
    frozen = [0 if epoch < start_epoch else min(10, (epoch - start_epoch) // 5 + 1) for epoch in range(160)]
    timeline = memory_timeline(
        layers,
        [(target, frozen_layers(n)) for n in frozen],
        target_density=target,
        batch_size=64,
        accounting="paper",
    )
    assert timeline.per_epoch[0] == timeline.sparse
    assert timeline.minimum == timeline.per_epoch[-1]
    assert 0.20 <= 1 - timeline.average_of_sparse <= 0.255
    assert timeline.average_of_dense < timeline.average_of_sparse
    assert timeline.minimum_of_dense == timeline.minimum / timeline.dense


def test_a_soft_bound_shows_in_the_average_but_not_in_the_sparse_baseline() -> None:
    target, above = (0.1, 1.0, 0.1), (0.6, 1.0, 0.6)
    active = (False, False, False)
    timeline = memory_timeline(
        LAYERS, [(above, active), (target, active)], target_density=target, batch_size=1, accounting="paper"
    )
    assert timeline.per_epoch[0] - timeline.per_epoch[1] == 2 * 4 * 15
    assert timeline.minimum == timeline.sparse
    assert timeline.average == timeline.sparse + 60


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_freezing_never_adds_memory(density: list[float], frozen: list[bool]) -> None:
    for accounting in ("paper", "actual"):
        active = memory_of(LAYERS, density, (False,) * 3, batch_size=3, accounting=accounting)
        assert memory_of(LAYERS, density, frozen, batch_size=3, accounting=accounting) <= active


def test_a_tensor_saved_several_times_counts_once() -> None:
    x = torch.randn(10, requires_grad=True)
    with SavedTensorBytes() as saved:
        y = x.exp()  # saves y
        z = y * y  # saves y twice
        (z[:5] * z[5:]).sum()  # saves two views of z
    assert saved.bytes == 40 + 40


def test_parameters_and_buffers_of_the_model_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    x = torch.randn(5, 6)
    with SavedTensorBytes(model) as inside:
        model(x)
    with SavedTensorBytes() as everything:
        model(x)
    held = sum(t.numel() * t.element_size() for t in (model[0].weight, model[1].weight, model[2].weight))
    held += sum(t.numel() * t.element_size() for t in (model[1].running_mean, model[1].running_var))
    # Autograd needs the first layer's input, the norm's input and the last layer's input, but no weight of the first.
    assert inside.bytes == 4 * 5 * (6 + 4 + 4)
    assert inside.bytes < everything.bytes <= inside.bytes + held


def test_a_frozen_front_saves_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(3, 6)
    with SavedTensorBytes(model) as full:
        model(x)
    model[:3].requires_grad_(False)
    with SavedTensorBytes(model) as frozen:
        model(x)
    assert full.bytes == 4 * 3 * 6 * 3
    assert frozen.bytes == 4 * 3 * 6


def test_autocast_saves_half_the_bytes_for_activations() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    x = torch.randn(16, 8)
    with SavedTensorBytes(model) as full:
        model(x)
    with SavedTensorBytes(model) as half, torch.autocast("cpu", torch.bfloat16):
        model(x)
    # The input and the hidden activation.
    assert full.bytes == 4 * (16 * 8 + 16 * 8)
    # In bfloat16: the copy of the input, the hidden activation, and the copy of the second weight.
    assert half.bytes == 2 * (16 * 8 + 16 * 8 + 64)


def test_tensors_freed_and_allocated_again_are_counted_each_time_and_never_kept_alive() -> None:
    x = torch.randn(1000, requires_grad=True)
    with SavedTensorBytes() as saved:
        for step in range(1, 4):
            y = x.exp()
            storage = weakref.ref(y)
            y.sum().backward()
            del y
            gc.collect()
            assert storage() is None
            assert saved.bytes == step * 4000


def test_a_graph_that_is_never_run_backward_is_freed_with_its_output() -> None:
    x = torch.randn(1000, requires_grad=True)
    with SavedTensorBytes():
        y = x.exp()
    output = weakref.ref(y)
    gc.disable()
    try:
        del y
        assert output() is None
    finally:
        gc.enable()


def test_second_derivatives_pass_through_what_was_measured() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with SavedTensorBytes():
        assert torch.autograd.gradgradcheck(lambda t: (t.exp() * t.sin()).sum(), (x,))


def test_entering_again_starts_from_zero_and_gradients_are_unchanged() -> None:
    x = torch.randn(10, requires_grad=True)
    meter = SavedTensorBytes()
    with meter:
        x.exp().sum().backward()
    gradient = x.grad
    assert gradient is not None
    assert torch.equal(gradient, x.exp())
    with meter:
        pass
    assert meter.bytes == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_count_the_memory_of_their_members() -> None:
    matrix = torch.sparse_csr_tensor(torch.arange(5), torch.arange(4), torch.ones(4), check_invariants=True)
    x = torch.randn(4, 3, requires_grad=True)
    with SavedTensorBytes() as saved:
        torch.sparse.mm(matrix, x)
    assert saved.bytes == 5 * 8 + 4 * 8 + 4 * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_of_the_process_rises_with_an_allocation_and_can_be_reset() -> None:
    if not reset_peak("cpu"):
        pytest.skip("this /proc cannot be written to")
    before = peak_bytes("cpu")
    # Straight from the system: an allocator may hand out pages that an earlier test has touched already.
    with mmap.mmap(-1, 32 * 2**20) as block:
        block.write(b"1" * len(block))
    after = peak_bytes("cpu")
    assert before is not None
    assert after is not None
    assert after - before > 24 * 2**20
    assert reset_peak("cpu")
    settled = peak_bytes("cpu")
    assert settled is not None
    assert settled < after - 16 * 2**20


def test_without_proc_the_peak_comes_from_getrusage_in_the_platforms_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", missing)
    monkeypatch.setattr(sys, "platform", "linux")
    measured = peak_bytes("cpu")
    assert measured is not None
    assert measured >= kib * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes("cpu") == pytest.approx(measured / 1024, rel=0.01)


def test_a_locked_proc_leaves_the_peak_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(memory.Path, "write_bytes", locked)
    assert not reset_peak("cpu")


def test_a_device_that_does_not_tell_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.torch, "get_device_module", lambda _: object())
    assert peak_bytes("mps") is None
    assert not reset_peak("mps")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_cuda_device_is_that_of_its_allocator() -> None:
    assert reset_peak("cuda")
    before = peak_bytes("cuda")
    block = torch.ones(8 * 2**20, dtype=torch.uint8, device="cuda")
    del block
    after = peak_bytes("cuda")
    assert before is not None
    assert after is not None
    assert after - before >= 8 * 2**20

"""A tape is written once and played as long as it holds; what it depends on is found out."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.native import assert_same_step, kernels, needs_kernels, random_masks, step, twin
from spfde.engines.native.kernels import KernelTape
from spfde.engines.native.layout import Layout, Pool
from spfde.engines.native.lists import Entries
from spfde.engines.native.model import NativeModel
from spfde.engines.native.tape import Place

pytestmark = needs_kernels


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[KernelTape]:
    """Tapes that were finished so far."""
    tapes: list[KernelTape] = []
    finish = KernelTape.finish

    def note(tape: KernelTape, keep: Sequence[Place] = ()) -> None:
        tapes.append(tape)
        finish(tape, keep)

    monkeypatch.setattr(KernelTape, "finish", note)
    return tapes


def small() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU()
    ).double()
    return model, random_masks(model, 0.4)


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


# --- the tape itself -------------------------------------------------------------------------------------------------


def test_numbers_are_added_wherever_a_slot_is_then() -> None:
    tape = kernels().tape(1)
    tape.sum_rows(tape.given("a"), tape.numbers_after(tape.given("b"), 1), 2)
    tape.sum_rows(tape.given("a"), tape.numbers_after(tape.given("b"), 2), 1)
    tape.finish()
    a = torch.tensor([1.0, 10.0], dtype=torch.float64)
    for _ in range(2):  # other memory each time
        b = torch.zeros(4, dtype=torch.float64)
        tape.play({"a": a, "b": b}, Pool())
        assert b.tolist() == [0.0, 1.0, 11.0, 0.0]


def test_a_buffer_is_used_again_only_when_no_place_in_it_is_left() -> None:
    tape = kernels().tape(1)
    layout = Layout(batch=3, channels=2, height=2, width=2, lanes=kernels().lanes, dtype=torch.float64)
    first = tape.take(layout)
    inside = tape.numbers_after(first, 7)
    slot = first.slot
    del first
    second = tape.take(layout)
    assert second.slot != slot
    del inside
    assert tape.take(layout).slot == slot
    assert tape.take_flat(5).slot not in (slot, second.slot)


def test_room_for_numbers_is_shared_between_like_sizes() -> None:
    tape = kernels().tape(1)
    slot = tape.take_flat(100).slot
    assert tape.take_flat(65).slot == slot  # both are rounded up to 128
    assert tape.take_flat(64).slot != slot
    assert tape.take_flat(100, torch.int32).slot != slot


def test_what_is_wanted_afterwards_is_handed_out_and_the_rest_goes_back_to_the_pool() -> None:
    tape, pool = kernels().tape(1), Pool()
    keep, scratch = tape.take_flat(4), tape.take_flat(4)
    tape.sum_rows(tape.given("a"), keep, 4)
    tape.sum_rows(tape.given("a"), scratch, 4)
    tape.finish([keep])
    (found,) = tape.play({"a": torch.ones(4, dtype=torch.float64)}, pool)
    assert found.tolist() == [1.0] * 4  # the pool's new buffers are zero
    taken = pool.bytes
    pool.release()
    assert pool.bytes == taken // 2


def test_a_tape_that_is_not_given_what_it_reads_does_not_run() -> None:
    tape = kernels().tape(1)
    tape.sum_rows(tape.given("a"), tape.given("b"), 1)
    tape.finish()
    with pytest.raises(KeyError, match="b"):
        tape.play({"a": torch.ones(1, dtype=torch.float64)}, Pool())


# --- when a program writes another -----------------------------------------------------------------------------------


def test_steps_of_one_kind_are_written_once_forward_and_once_back(written: list[KernelTape]) -> None:
    model, masks = small()
    reference, _ = twin(model, masks)
    for seed in range(4):
        assert_same_step(model, reference, masks, image(4, 3, 8, 8, seed=seed))
    assert len(written) == 2


def test_a_mask_that_changes_is_followed(written: list[KernelTape]) -> None:
    model, masks = small()
    reference, _ = twin(model, masks)
    x = image(4, 3, 8, 8)
    assert_same_step(model, reference, masks, x)
    masks["4.weight"] = ~masks["4.weight"]
    with torch.no_grad():
        for net in (model, reference):
            net.get_parameter("4.weight").copy_(torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(2)))
            net.get_parameter("4.weight").mul_(masks["4.weight"])
    assert_same_step(model, reference, masks, x)
    assert len(written) == 4


def test_a_parameter_or_buffer_that_moves_in_memory_is_followed(written: list[KernelTape]) -> None:
    model, masks = small()
    reference, _ = twin(model, masks)
    x = image(4, 3, 8, 8)
    assert_same_step(model, reference, masks, x)
    for net in (model, reference):
        net[0].weight.data = net[0].weight.data * 2
        net[1].bias.data = net[1].bias.data + 1
    assert_same_step(model, reference, masks, x)
    assert len(written) == 4
    for net in (model.eval(), reference.eval()):
        net(x)
        net[1].running_mean.data = net[1].running_mean.data + 3
    assert torch.allclose(model(x), reference(x), rtol=1e-10)


def test_inputs_and_gradients_in_another_memory_format_are_read_as_they_lie() -> None:
    model, masks = small()
    reference, _ = twin(model, masks)
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        x = image(4, 3, 8, 8).contiguous(memory_format=layout)
        found = []
        for net in (model, reference):
            out = net(x)
            out.backward(image(*out.shape, seed=3).contiguous(memory_format=layout))
            found.append([out.detach(), *(p.grad for p in net.parameters())])
            net.zero_grad()
        for name, ours, theirs in zip(["", *(n for n, _ in model.named_parameters())], *found, strict=True):
            assert torch.allclose(ours, theirs * masks.get(name, 1), rtol=1e-9, atol=1e-12)


def test_another_number_of_threads_is_followed() -> None:
    model, masks = small()
    reference, _ = twin(model, masks)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            assert_same_step(model, reference, masks, image(4, 3, 8, 8))
    finally:
        torch.set_num_threads(before)


def test_dense_gradients_come_when_they_are_asked_for_and_no_longer() -> None:
    model, masks = small()
    asked: list[frozenset[str]] = [frozenset()]
    reference = copy.deepcopy(model)
    NativeModel(model, kernels(), masks=lambda: masks, dense_gradients=lambda: asked[0])
    x = image(4, 3, 8, 8)
    expected = step(reference, x)["4.weight.grad"]
    for names in (frozenset(), frozenset({"4.weight"}), frozenset()):
        asked[0] = names
        found = step(model, x)["4.weight.grad"]
        assert torch.allclose(found, expected if names else expected * masks["4.weight"], rtol=1e-9, atol=1e-12)


class Shared(nn.Module):
    """One convolution and one norm in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(self.norm(self.conv(x)))
        return x


def test_what_is_used_twice_gets_the_sum_of_both_gradients() -> None:
    torch.manual_seed(2)
    model = Shared().double().eval()  # in training the two uses would share their running statistics
    masks = random_masks(model, 0.5)
    reference, _ = twin(model, masks)
    for seed in range(2):
        assert_same_step(model, reference, masks, image(3, 4, 6, 6, seed=seed))


def test_a_norm_that_is_used_twice_keeps_its_statistics_as_pytorch_does() -> None:
    for momentum in (0.1, 0.5, None):
        torch.manual_seed(2)
        model = Shared().double()
        model.norm.momentum = momentum
        masks = random_masks(model, 0.5)
        reference, _ = twin(model, masks)
        for seed in range(3):
            assert_same_step(model, reference, masks, image(3, 4, 6, 6, seed=seed))


class Called(nn.Module):
    """One convolution between two norms, and on images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.n1, self.n2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n2(self.conv(torch.relu(self.n1(self.conv(x)))))
        return self.conv(nn.functional.max_pool2d(x, 2))


@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_that_is_called_again_has_another_norm_and_another_size(training: bool) -> None:
    torch.manual_seed(2)
    model = Called().double().train(training)
    for norm in (model.n1, model.n2):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    masks = random_masks(model, 0.5)
    reference, _ = twin(model, masks)
    assert_same_step(model, reference, masks, image(3, 4, 6, 6))
    with torch.no_grad():
        assert torch.allclose(model(image(3, 4, 6, 6)), reference(image(3, 4, 6, 6)), rtol=1e-9, atol=1e-12)


def test_a_weight_that_lies_another_way_at_the_same_address_is_followed() -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 3, bias=False)).double()
    reference, _ = twin(model, {})
    x = image(2, 6, 5, 5)
    model(x)
    weight = model[0].weight
    weight.data = weight.data.as_strided(weight.shape, (54, 1, 18, 6))
    reference[0].weight.data = weight.data.clone()
    assert torch.allclose(model(x), reference(x), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:The native engine leaves")
def test_statistics_that_do_not_lie_number_after_number_are_pytorchs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double().eval()
    model[1].running_var = torch.full((1,), 2.0).double().expand(6)
    reference, _ = twin(model, {})
    assert torch.allclose(model(image(2, 3, 5, 5)), reference(image(2, 3, 5, 5)), rtol=1e-9)


def test_lists_of_former_masks_are_not_kept_by_programs_that_are_not_run_any_more() -> None:
    model, masks = small()
    twin(model, masks)

    def live() -> int:
        gc.collect()
        return sum(isinstance(each, Entries) for each in gc.get_objects())

    def run() -> None:
        model.train()
        model(image(4, 3, 8, 8)).sum().backward()

    for size in (2, 3, 4):  # as many programs
        model(image(size, 3, 8, 8)).sum().backward()
    run()
    before = live()
    for _ in range(4):
        masks["4.weight"] = masks["4.weight"].clone()
        run()
    assert live() <= before


def test_threads_that_run_the_model_at_once_do_not_disturb_each_other() -> None:
    model, masks = small()
    model.eval()
    reference, _ = twin(model, masks)
    images = [image(4, 3, 8, 8, seed=seed) for seed in range(4)]
    wrong: list[int] = []

    def run(which: int) -> None:
        with torch.no_grad():
            expected = reference(images[which])
            for _ in range(30):
                if not torch.allclose(model(images[which]), expected, rtol=1e-9, atol=1e-12):
                    wrong.append(which)

    with torch.no_grad():
        model(images[0])
    threads = [threading.Thread(target=run, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_lists_of_a_layer_are_kept_for_so_many_sizes_of_images_and_no_more() -> None:
    model, masks = small()
    engine = NativeModel(model, kernels(), masks=lambda: masks, dense_gradients=frozenset)
    with torch.no_grad():
        for size in range(4, 44):
            model(torch.randn(1, 3, 2 * size, 8, dtype=torch.float64))
    assert len(engine._weights._built) <= 32 * len(masks)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thread_that_ends_gives_its_memory_back() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    twin(model, random_masks(model, 0.1), torch.float32)
    x = torch.randn(1, 64, 32, 32)

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def call() -> None:
        with torch.no_grad():
            model(x)

    before = 0
    for n in range(60):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        before = pages() if n == 19 else before
    assert (pages() - before) * 4096 < 8 << 20, "a window alone takes more than 400 kB"


def test_values_of_different_sizes_lie_in_one_buffer_unless_it_is_kept() -> None:
    small, large = (Layout(16, 4, size, size, 8, torch.float64) for size in (32, 64))
    for keeps in (False, True):
        tape, pool = kernels().tape(1, keeps=keeps), Pool()
        for layout in (small, large, small):
            tape.take(layout)  # and is free again
        tape.finish()
        tape.play({}, pool)
        assert pool.bytes == 8 * (large.numel + small.numel * keeps)

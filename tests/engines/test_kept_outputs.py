"""What is kept of a frozen front's outputs, and what is read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spfde
from spfde.engines.kept_outputs import CachedPrefix, FrozenNumbers, OutputStore


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_put_in_comes_out(on_disk: bool, tmp_path: Path) -> None:
    store = OutputStore(6, [(2,), (1, 2)], "fp16", tmp_path if on_disk else None)
    store.put(torch.tensor([4, 1]), [torch.tensor([[1.0, 2.0], [3.0, 70000.0]]), torch.tensor([[[5.0, 6]], [[7, 8]]])])
    assert store.has(torch.arange(6)).tolist() == [False, True, False, False, True, False]
    first, second = store.get(torch.tensor([1, 4]))
    assert first.tolist() == [[3.0, 65504.0], [1.0, 2.0]]  # what half precision cannot hold becomes its largest number
    assert second.tolist() == [[[7.0, 8.0]], [[5.0, 6.0]]]
    assert store.bytes_per_slot([(2,), (1, 2)], "fp16") == 2 * 2 + 4 + 2 * 2 + 4
    assert bool(list(tmp_path.iterdir())) is on_disk
    store.close()
    assert not list(tmp_path.iterdir())


def test_bytes_have_a_scale_for_each_sample() -> None:
    store = OutputStore(3, [(4,)], "int8")
    values = torch.tensor([[0.0, 1.0, -127.0, 63.5], [0.0, 0.0, 0.0, 0.0], [1e-3, 2e-3, -1e-3, 0.0]])
    store.put(torch.arange(3), [values])
    (found,) = store.get(torch.arange(3))
    assert found[0].tolist() == [0.0, 1.0, -127.0, 64.0]
    assert found[1].tolist() == [0.0] * 4
    assert torch.allclose(found[2], values[2], atol=2e-3 / 254)


def test_each_slot_is_computed_once_and_small_batches_are_filled_up() -> None:
    cached = CachedPrefix(40, spfde.PrefixCache(2))
    cached.make_room([(1,)])
    computed: list[int] = []

    def compute_for(samples: Tensor, variant: int) -> Any:
        def compute(at: Tensor) -> Sequence[Tensor]:
            computed.append(len(at))
            return [(samples[at] + 100 * variant).float()[:, None]]

        return compute

    for samples, variant, expected in (
        (torch.arange(20), 0, [20]),
        (torch.arange(20), 0, []),
        (torch.arange(19, 39), 0, [20]),  # 19 are missing, and one more makes no new size of batch
        (torch.arange(20), 1, [20]),
        (torch.tensor([39, *range(19)]), 0, [16]),
    ):
        computed.clear()
        (found,) = cached(samples, variant, compute_for(samples, variant))
        assert found.flatten().tolist() == (samples + 100 * variant).tolist()
        assert computed == expected


@pytest.mark.parametrize(("limit", "variants"), [(10**6, 3), (2 * 40 * 6 + 5, 2), (40 * 6 - 1, 0)])
def test_the_limit_takes_variants_away(limit: int, variants: int) -> None:
    cached = CachedPrefix(40, spfde.PrefixCache(3, limit_gib=limit / 2**30))
    cached.make_room([(1,)])
    assert cached.variants == variants
    assert (cached.store is None) == (variants == 0)
    cached.clear()
    assert cached.variants == 3


def test_other_types_come_back_as_they_were() -> None:
    dtypes = [torch.bfloat16, torch.int64, torch.bool]
    store = OutputStore(4, [(2,), (1,), (1,)], "int8", dtypes=dtypes)
    assert store.bytes_per_slot([(2,), (1,), (1,)], "int8", dtypes) == 2 + 4 + 8 + 4 + 1 + 4
    assert store.n_bytes == 4 * (2 + 4 + 8 + 4 + 1 + 4)
    values = [torch.tensor([[127.0, 1.0]]).bfloat16(), torch.tensor([[2**40 + 1]]), torch.tensor([[True]])]
    store.put(torch.tensor([2]), values)
    found = store.get(torch.tensor([2]))
    assert [value.dtype for value in found] == dtypes
    assert all(map(torch.equal, found, values))


def test_the_room_lies_where_the_place_for_so_many_bytes_is() -> None:
    asked: list[int] = []

    def place(size: int) -> torch.device:
        asked.append(size)
        return torch.device("meta")

    cached = CachedPrefix(10, spfde.PrefixCache(3), place=place)
    cached.make_room([(5,)])
    assert asked == [10 * 3 * (5 * 2 + 4)]
    assert cached.store is not None
    assert cached.store.device.type == "meta"


def test_numbers_that_change_are_noticed_at_the_next_look_and_writes_before() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    numbers = FrozenNumbers(model, {"0.weight", "0.bias"})
    with torch.no_grad():
        model[1].weight.mul_(2)
        assert not numbers.may_differ()
        model.get_parameter("0.weight").mul_(2)
        assert numbers.may_differ()
        assert not numbers.are_the_same()
        assert numbers.are_the_same()
        model.get_parameter("0.bias").data.add_(1)
        assert not numbers.may_differ()
        assert not numbers.are_the_same()
        model.get_buffer("0.running_mean").add_(1)
        assert numbers.may_differ()
        assert not numbers.are_the_same()

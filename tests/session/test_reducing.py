"""Two processes in DistributedDataParallel: what is frozen is not waited for, and what is masked does not travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import reducing_worker as worker
from helpers.processes import ranks

if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

from spfde.session.allreduce import active_positions


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank and case: a run with sparse gradients beside the same one with whole ones."""
    return ranks(worker.compare, tmp_path_factory.mktemp("compare"))


def check_equal(found: list[dict[str, Any]], case: str) -> None:
    for by_case in found:
        assert by_case[case]["differ"] == []
        assert max(by_case[case]["frozen"]) >= 1
    first, second = (by_case[case]["masks"] for by_case in found)
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


@pytest.mark.parametrize("case", worker.CASES)
def test_sparse_gradients_come_to_the_weights_of_whole_ones_bit_for_bit(
    compared: list[dict[str, Any]], case: str
) -> None:
    check_equal(compared, case)


@pytest.mark.long
@pytest.mark.parametrize("case", worker.MORE_CASES)
def test_so_do_those_of_other_methods_wrappers_and_layouts(tmp_path: Path, case: str) -> None:
    check_equal(ranks(worker.compare, tmp_path, which=case), case)


def test_whole_gradients_are_not_counted(compared: list[dict[str, Any]]) -> None:
    assert {each for case in worker.CASES for each in compared[0][case]["bytes whole"]} == {(0, 0)}


def test_what_travels_is_the_active_entries_of_what_learns(compared: list[dict[str, Any]]) -> None:
    found = compared[0]["rigl"]
    # In three steps an epoch, in float32. Of each layer's 324 weights 65 are active. Whole are the stem (6 * 2 * 9),
    # seven norms (2 * 6 each) and the classifier (6 * 4 + 4): 108 + 84 + 28.
    assert found["bytes"][0] == (3 * 4 * (220 + 6 * 65), 3 * 4 * (220 + 6 * 324))
    # The stem, its norm, and a block with two of the norms are frozen: 220 - 108 - 12 - 24.
    assert found["frozen"][-1] == 1
    assert found["bytes"][-1] == (3 * 4 * (76 + 4 * 65), 3 * 4 * (76 + 4 * 324))


def test_accumulated_gradients_travel_once_a_step(compared: list[dict[str, Any]]) -> None:
    once, each = compared[0]["accumulated"]["bytes"], compared[0]["wrapped after attach"]["bytes"]
    assert [3 * sent for sent, _ in once] == [sent for sent, _ in each]  # one step in three batches, and three


def test_what_thaws_travels_again(compared: list[dict[str, Any]]) -> None:
    found = compared[0]["thaws"]
    assert found["frozen"][-1] == 0 < max(found["frozen"])
    assert found["bytes"][-1] == found["bytes"][0]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks(worker.others, tmp_path_factory.mktemp("others"))


@pytest.mark.long
@pytest.mark.long
def test_a_communication_hook_of_the_users_stays_and_follows_what_is_frozen(others: list[dict[str, Any]]) -> None:
    assert [found["hook"] for found in others] == [((0, 0), 2)] * 2


@pytest.mark.long
def test_a_hook_that_remembers_buckets_is_refused_where_blocks_are_frozen(others: list[dict[str, Any]]) -> None:
    assert all("PowerSGD" in found["powerSGD"] for found in others)


@pytest.mark.long
def test_parameters_that_take_turns_are_averaged_whenever_they_learn(others: list[dict[str, Any]]) -> None:
    first, second = (found["switched off"] for found in others)
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)


@pytest.mark.long
def test_once_detached_whole_gradients_of_all_parameters_are_averaged(others: list[dict[str, Any]]) -> None:
    (first, outside), (second, _) = (found["detached"] for found in others)
    assert all(torch.equal(grad, second[name]) for name, grad in first.items())
    assert all(outside.values())


def test_the_session_says_what_travels(others: list[dict[str, Any]]) -> None:
    assert all("active entries of gradients" in found["said"] for found in others)


@pytest.mark.long
def test_four_ranks_come_to_the_same_masks_and_weights(tmp_path: Path) -> None:
    found = [by_case["wrapped after attach"] for by_case in ranks(worker.compare, tmp_path, 4, "wrapped after attach")]
    for own in found[1:]:
        for key in ("masks", "weights"):
            same = {name: torch.equal(value, own[key][name]) for name, value in found[0][key].items()}
            assert all(is_same for name, is_same in same.items() if "running" not in name)


def strided(shape: list[int], *, is_last: bool) -> Tensor:
    made = torch.zeros(shape)
    return made.to(memory_format=torch.channels_last) if is_last else made


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 4), min_size=4, max_size=4), st.booleans(), st.booleans()), min_size=1),
    st.integers(0, 2**31),
)
def test_positions_are_those_of_the_masked_entries_in_each_parameters_own_order(
    kinds: list[tuple[list[int], bool, bool]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [strided(shape, is_last=is_last) for shape, is_last, _ in kinds]
    masks = [torch.rand(shape, generator=generator) < 0.5 if masked else None for shape, _, masked in kinds]
    offsets = [sum(p.numel() for p in parameters[:at]) for at in range(len(parameters))]
    buffer = torch.randn(sum(p.numel() for p in parameters), generator=generator)
    found = active_positions(buffer, parameters, offsets, masks)
    kept = torch.zeros_like(buffer)
    kept[slice(None) if found is None else found] = 1
    for parameter, offset, mask in zip(parameters, offsets, masks, strict=True):
        own = kept.as_strided(parameter.shape, parameter.stride(), offset)
        assert torch.equal(own == 1, torch.ones(parameter.shape, dtype=torch.bool) if mask is None else mask)


def test_a_parameter_with_gaps_in_its_memory_lies_in_row_major_order() -> None:
    weight = torch.zeros(2, 6)[:, ::3]
    mask = torch.tensor([[False, True], [True, False]])
    found = active_positions(torch.zeros(4), [weight], [0], [mask])
    assert found is not None
    assert found.tolist() == [1, 2]

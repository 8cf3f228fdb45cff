"""Models that ``fully_shard`` (FSDP2) has sharded: they are masked, frozen and resumed as one process does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)
if not hasattr(torch.cpu.Stream, "record_event"):
    pytest.skip("fully_shard of this torch does not run on CPUs", allow_module_level=True)

import spfde
from helpers import sharded_runs as runs
from helpers import sharding_worker as worker
from helpers.processes import ranks
from spfde.session import sharding


@pytest.fixture(scope="module")
def one() -> tuple[dict[str, Any], dict[str, Any]]:
    """The run of one process that is saved amid of it, and what was saved."""
    return runs.run_and_save(runs.CASES[runs.SAVED], sharded=False)


@pytest.fixture(scope="module")
def two(one: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank: what two processes have found."""
    folder = tmp_path_factory.mktemp("two")
    torch.save(one[1], folder / "one.pt")
    return ranks(worker.compare, folder)


def differ(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 0.0) -> list[str]:
    assert set(found) == set(expected)
    return [name for name, value in expected.items() if not torch.allclose(found[name], value, rtol=0.0, atol=atol)]


def check_equal(found: dict[str, Any], expected: dict[str, Any], *, atol: float) -> None:
    """The masks are equal entry by entry in each epoch, counts are exact, and nothing is outside of masks."""
    assert [differ(*pair) for pair in zip(found["masks"], expected["masks"], strict=True)] == [[]] * runs.EPOCHS
    assert differ(found["weights"], expected["weights"], atol=atol) == []
    for key in ("frozen", "grads", "explored", "density"):
        assert found[key] == expected[key]
    assert found["counts"] == found["planned"]
    assert found["outside"] == 0


def test_three_rows_over_two_ranks_by_hand(two: list[dict[str, Any]]) -> None:
    """The largest of [[5, -1], [2, -4], [3, 6]] are 5, 4 and 6. 4 is dropped, and where the gradient is 9 one grows."""
    first, last = (found["by hand"] for found in two)
    for own in (first, last):
        assert own["first"].tolist() == [[True, False], [False, True], [False, True]]
        assert own["mask"].tolist() == [[True, False], [True, False], [False, True]]
        assert own["weight"].tolist() == [[5.0, 0.0], [0.0, 0.0], [0.0, 6.0]]
        assert own["explored"].item() == pytest.approx(4 / 6)
    assert first["first own"].tolist() == [[True, False], [False, True]]
    assert last["first own"].tolist() == [[False, True]]
    assert first["own"].tolist() == [[True, False], [True, False]]
    assert last["own"].tolist() == [[False, True]]
    # The gradient of each active weight is 1, and so was the momentum of what was dropped.
    assert first["momentum before"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert first["momentum"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert last["momentum"].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("case", runs.CASES)
def test_masks_and_weights_of_two_ranks_are_those_of_one_process(two: list[dict[str, Any]], case: str) -> None:
    expected = runs.run(runs.CASES[case], sharded=False)
    for found in two:
        # The norm of all gradients is summed up in another order.
        check_equal(found[case], expected, atol=1e-6 if runs.CASES[case].clips else 0.0)


def test_each_rank_bills_its_samples_and_the_weights_of_all(two: list[dict[str, Any]]) -> None:
    expected = runs.run(runs.CASES["set"], sharded=False)["cost"]
    for found in two:
        assert found["set"]["cost"] == [(2 * flops, nbytes) for flops, nbytes in expected]


def test_there_are_whole_tensors_of_one_layer_at_a_time(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert {len(names) for names in found["gathered"]} == {1}
        assert set().union(*found["gathered"]) == set(found["rigl"]["masks"][0])


@pytest.mark.parametrize("how", ["with the states of each rank", "loaded before attach", "saved by one process"])
def test_a_resumed_run_is_the_run_bit_for_bit(two: list[dict[str, Any]], one: Any, how: str) -> None:
    for found in two:
        assert differ(found["resumed"][how]["weights"], one[0]["weights"]) == []
        assert differ(found["resumed"][how]["masks"][-1], one[0]["masks"][-1]) == []


def test_what_two_ranks_saved_goes_on_in_one_process(two: list[dict[str, Any]], one: Any) -> None:
    for first in ("attach", "load"):
        found = runs.resume(runs.CASES[runs.SAVED], two[0]["saved"], sharded=False, first=first)
        assert differ(found["weights"], one[0]["weights"]) == []


def test_the_session_state_of_each_rank_is_that_of_one_process(two: list[dict[str, Any]], one: Any) -> None:
    expected = one[1]["session"]["parts"]
    for found in two:
        parts = found["saved"]["session"]["parts"]
        assert parts["guards"]["weights"] == expected["guards"]["weights"]
        for what in ("masks", "explored"):
            assert differ(parts["masks"][what], expected["masks"][what]) == []


@pytest.mark.parametrize("what", worker.REFUSED)
def test_what_does_not_work_is_refused_before_anything_is_changed(two: list[dict[str, Any]], what: str) -> None:
    for found in two:
        assert worker.REFUSED[what][1] in found["refused"][what]
        assert not found["refused"][what].startswith(("accepted", "changed"))


def test_a_model_that_is_sharded_after_attach_is_noticed(two: list[dict[str, Any]]) -> None:
    assert all("fully_shard" in found["sharded later"] for found in two)


def test_ranks_that_would_draw_other_masks_are_an_error(two: list[dict[str, Any]]) -> None:
    assert all("the generator" in found["drifted"] for found in two)


def test_parts_of_a_mask_that_do_not_add_up_are_an_error(two: list[dict[str, Any]]) -> None:
    assert all("stem.weight have" in found["loses"] for found in two)


def test_masks_are_taken_from_zeros(two: list[dict[str, Any]]) -> None:
    assert all(found["inferred"] for found in two)


def test_ranks_share_the_samples_that_the_sieve_leaves(two: list[dict[str, Any]]) -> None:
    first, second = (found["sieved"] for found in two)
    assert torch.equal(first["partial"], second["partial"])
    for own, others in zip(first["seen"], second["seen"], strict=True):
        assert len(set(own) | set(others)) == len(own) + len(others) == 30
    assert set(first["seen"][-1]) | set(second["seen"][-1]) == set(first["partial"].tolist())


def test_a_mutation_waits_where_one_rank_finds_an_infinite_gradient(two: list[dict[str, Any]]) -> None:
    for found in two:
        during, after = found["sieved"]["changed"]
        assert during == 0 < after


def test_weights_of_a_model_in_half_precision_are_masked(two: list[dict[str, Any]]) -> None:
    assert [(found["sieved"]["outside"], found["sieved"]["type"]) for found in two] == [(0, torch.float32)] * 2


def test_the_session_says_that_each_rank_has_its_rows(two: list[dict[str, Any]]) -> None:
    assert all("each rank has its rows" in found["sieved"]["said"] for found in two)


class Reversed(spfde.SET):
    """Changes masks in a way of its own."""

    def strategy(self, masker: Any) -> Any:
        return super().strategy(masker)


class ReversedByLayer(Reversed):
    by_layer: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("kind", "works"), [(spfde.MEST, True), (spfde.DSR, False), (Reversed, False), (ReversedByLayer, True)]
)
def test_whoever_changes_masks_says_itself_that_each_follows_from_its_layer(kind: Any, works: bool) -> None:
    assert [problem.argument for problem in sharding.check_recipe(spfde.Recipe(sparsity=kind(sparsity=0.5)))] == (
        [] if works else ["sparsity"]
    )


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks(worker.compare, tmp_path_factory.mktemp("more"), which="more")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks(worker.compare, tmp_path_factory.mktemp("three"), 3, "cases")


@pytest.mark.long
@pytest.mark.parametrize("case", runs.MORE_CASES)
def test_so_are_those_of_other_methods_and_of_compiled_models(more: list[dict[str, Any]], case: str) -> None:
    expected = runs.run(runs.MORE_CASES[case], sharded=False)
    for found in more:
        check_equal(found[case], expected, atol=0.0)


@pytest.mark.long
@pytest.mark.parametrize("case", runs.CASES)
def test_a_rank_may_have_few_rows_or_none(three: list[dict[str, Any]], case: str) -> None:
    expected = runs.run(runs.CASES[case], sharded=False)
    for found in three:
        # The sum of three equal gradients, divided by three, is rounded.
        check_equal(found[case], expected, atol=1e-5)


@pytest.mark.long
def test_a_run_of_two_ranks_goes_on_in_three(two: list[dict[str, Any]], one: Any, tmp_path: Path) -> None:
    torch.save(two[0]["saved"], tmp_path / "saved.pt")
    for found in ranks(worker.go_on, tmp_path, 3):
        assert differ(found["weights"], one[0]["weights"], atol=1e-5) == []
        assert differ(found["masks"][-1], one[0]["masks"][-1]) == []

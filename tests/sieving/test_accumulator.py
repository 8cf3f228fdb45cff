"""Presentations add up however they come; states are checked."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.core.registry import registered
from spfde.sieving.accumulator import Accumulator
from spfde.sieving.balance import ClassLabels
from spfde.sieving.criteria import Forgetting, Loss, Scorer

MAKE = {
    **{name: lambda n, kind=kind: kind().scorer(n) for name, kind in registered("sieving-criterion").items()},
    "classes": ClassLabels,
}
every_kind = pytest.mark.parametrize("kind", MAKE)


def observe(into: Accumulator, *batches: tuple[list[int], list[float]]) -> None:
    for indices, values in batches:
        correct = isinstance(into, Scorer) and isinstance(into.criterion, Forgetting)
        dtype = torch.bool if correct else torch.long if isinstance(into, ClassLabels) else torch.float32
        into.observe(torch.tensor(indices, dtype=torch.long), torch.tensor(values).to(dtype))


def entries(of: Accumulator) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in of.state_dict().items()}


def test_a_reset_forgets_what_was_added_up() -> None:
    scorer = Loss().scorer(2)
    observe(scorer, ([0, 1], [5.0, 5.0]))
    scorer.reset()
    observe(scorer, ([0], [1.0]))
    assert scorer.difficulty().tolist() == [1.0, float("inf")]


streams = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=8), min_size=1, max_size=12
)  # batches of (sample, value)


@every_kind
@given(stream=streams, data=st.data())
def test_reading_or_saving_in_between_changes_nothing(kind: str, stream: Any, data: st.DataObject) -> None:
    whole, interrupted = MAKE[kind](6), MAKE[kind](6)
    for batch in stream:
        pairs = ([i for i, _ in batch], [float(value) for _, value in batch])
        observe(whole, pairs)
        observe(interrupted, pairs)
        if data.draw(st.booleans()):
            resumed = MAKE[kind](6)
            resumed.load_state_dict(interrupted.state_dict())
            interrupted = resumed
    assert entries(whole) == entries(interrupted)


@every_kind
def test_a_state_survives_a_checkpoint_of_tensors_only_and_is_not_shared(kind: str) -> None:
    noted, resumed = MAKE[kind](3), MAKE[kind](3)
    observe(noted, ([0, 1, 2], [1, 1, 0]))
    state = noted.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one in (noted, resumed):
        observe(one, ([0, 1, 2], [0, 1, 1]))
    assert entries(noted) == entries(resumed)
    fresh = MAKE[kind](3)
    fresh.load_state_dict(state)
    observe(fresh, ([0, 1], [0, 0]))
    fresh.state_dict()
    again = MAKE[kind](3)
    observe(again, ([0, 1, 2], [1, 1, 0]))
    assert {name: value.tolist() for name, value in state.items() if name != "n"} == {
        name: value for name, value in entries(again).items() if name != "n"
    }


@every_kind
def test_each_entry_that_is_missing_or_of_another_kind_is_refused_and_nothing_changes(kind: str) -> None:
    noted = MAKE[kind](3)
    observe(noted, ([0, 1], [1, 0]))
    before, state = entries(noted), noted.state_dict()
    for name, value in state.items():
        damaged: list[Any] = ["text", None]
        if isinstance(value, Tensor):
            damaged += [value[:2], value.to(torch.complex64)]
        for other in damaged:
            with pytest.raises(StateMismatch, match=name):
                noted.load_state_dict({**state, name: other})
        with pytest.raises(StateMismatch, match=name):
            noted.load_state_dict({key: kept for key, kept in state.items() if key != name})
    assert entries(noted) == before


@every_kind
def test_a_state_of_another_data_set_is_refused_with_both_sizes(kind: str) -> None:
    with pytest.raises(StateMismatch, match=r"of 4 samples.*of 3"):
        MAKE[kind](3).load_state_dict(MAKE[kind](4).state_dict())


def test_a_state_of_another_criterion_is_refused() -> None:
    with pytest.raises(StateMismatch, match="loss scores lacks"):
        Loss().scorer(3).load_state_dict(Forgetting().scorer(3).state_dict())


@every_kind
@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_id_out_of_range_is_refused_and_leaves_no_trace(kind: str, wrong: int) -> None:
    noted = MAKE[kind](3)
    with pytest.raises(InvalidArgument, match=f"indices={wrong}"):
        observe(noted, ([0, wrong], [1, 1]))
    assert entries(noted) == entries(MAKE[kind](3))


def test_an_empty_batch_is_allowed() -> None:
    scorer = Loss().scorer(2)
    observe(scorer, ([], []))
    assert scorer.difficulty().isinf().all()

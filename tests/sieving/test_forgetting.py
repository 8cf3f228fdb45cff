"""Forgetting events: counted by hand, by a plain loop, and turned into a difficulty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.sieving.criteria import Forgetting, Scorer

INF = float("inf")


def counter_of(n: int, never_learned: str = "hard") -> Scorer:
    return Forgetting(never_learned).scorer(n)


def observe(counter: Scorer, *batches: tuple[list[int], list[int]]) -> None:
    for indices, correct in batches:
        counter.observe(torch.tensor(indices, dtype=torch.long), torch.tensor(correct, dtype=torch.bool))


def test_each_step_from_right_to_wrong_is_one_forgetting_event():
    counter = counter_of(4)
    observe(
        counter,
        ([0, 1, 2], [1, 0, 1]),
        ([2, 0, 1], [0, 1, 0]),  # 2 is forgotten
        ([1, 2, 0], [1, 1, 0]),  # 0 is forgotten, 1 and 2 are learned
        ([0, 1, 2], [1, 1, 0]),  # 2 is forgotten again
    )
    assert counter.state_dict()["forgotten"].tolist() == [1, 0, 2, 0]
    assert (counter.state_dict()["last"] >= 0).tolist() == [True, True, True, False]
    assert counter.state_dict()["learned"].tolist() == [True, True, True, False]


def test_a_sample_that_occurs_twice_in_one_batch_is_taken_in_order():
    counter = counter_of(2)
    observe(counter, ([0, 1, 0, 1], [1, 0, 0, 1]))
    assert counter.state_dict()["forgotten"].tolist() == [1, 0]
    observe(counter, ([1, 1, 1, 0], [0, 1, 0, 1]))
    assert counter.state_dict()["forgotten"].tolist() == [1, 2]


def test_never_learned_and_unseen_samples_are_hard():
    counter = counter_of(4)
    observe(counter, ([0, 1, 2], [1, 0, 1]), ([0, 1, 2], [1, 0, 0]))
    assert counter.difficulty().tolist() == [0.0, INF, 1.0, INF]


def test_the_literal_reading_ranks_never_learned_samples_by_their_count_but_unseen_ones_stay_hard():
    counter = counter_of(4, "literal")
    observe(counter, ([0, 1, 2], [1, 0, 1]), ([0, 1, 2], [1, 0, 0]))
    assert counter.difficulty().tolist() == [0.0, 0.0, 1.0, INF]


def test_a_reset_forgets_counts_outcomes_and_what_has_not_been_counted_yet():
    counter = counter_of(2)
    observe(counter, ([0, 1], [1, 1]))
    counter.reset()
    observe(counter, ([0, 1], [0, 1]))  # the outcome before the reset is no longer the one before
    assert counter.state_dict()["forgotten"].tolist() == [0, 0]
    assert counter.difficulty().tolist() == [INF, 0.0]


streams = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8), min_size=1, max_size=12
)  # batches of (sample, correct)


@given(streams)
def test_counts_equal_those_of_a_plain_loop(stream):
    counter = counter_of(6)
    last: dict[int, bool] = {}
    expected, learned = [0] * 6, [False] * 6
    for batch in stream:
        observe(counter, ([i for i, _ in batch], [c for _, c in batch]))
        for index, correct in batch:
            expected[index] += last.get(index, False) and not correct
            learned[index] |= correct
            last[index] = correct
    assert counter.state_dict()["forgotten"].tolist() == expected
    assert counter.state_dict()["learned"].tolist() == learned
    assert (counter.state_dict()["last"] >= 0).tolist() == [i in last for i in range(6)]


@given(streams, st.data())
def test_reading_or_saving_in_between_changes_nothing(stream, data):
    whole, interrupted = counter_of(6), counter_of(6)
    for batch in stream:
        pairs = ([i for i, _ in batch], [c for _, c in batch])
        observe(whole, pairs)
        observe(interrupted, pairs)
        if data.draw(st.booleans()):
            resumed = counter_of(6)
            resumed.load_state_dict(interrupted.state_dict())
            interrupted = resumed
    state, other = whole.state_dict(), interrupted.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in ("forgotten", "last", "learned"))


# --- without right and wrong -----------------------------------------------------------------------------------------


def learned(loss: torch.Tensor) -> torch.Tensor:
    return Forgetting().evidence(None, None, loss=loss)


def test_the_half_of_a_batch_with_the_lower_loss_counts_as_learned():
    assert learned(torch.tensor([3.0, 1.0, 2.0, 9.0])).tolist() == [False, True, True, False]
    assert learned(torch.tensor([3.0, 1.0, 2.0])).tolist() == [False, True, True]


def test_a_loss_counts_the_same_in_any_unit():
    loss = torch.tensor([0.3, 0.1, 0.7, 0.2, 0.6], requires_grad=True)
    assert torch.equal(learned(loss), learned(loss * 1024))


def test_further_dimensions_of_a_loss_are_averaged():
    loss = torch.tensor([[1.0, 5.0], [2.0, 2.0], [9.0, 9.0]])
    assert learned(loss).tolist() == [True, True, False]


def test_a_sample_with_a_nan_loss_is_not_learned_and_does_not_spoil_the_others():
    assert learned(torch.tensor([float("nan"), 1.0, 2.0])).tolist() == [False, True, False]


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.zeros(0)])
def test_a_mean_loss_is_refused_with_the_remedy(loss):
    with pytest.raises(InvalidArgument, match="reduction="):
        learned(loss)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_at_least_half_of_a_batch_is_learned_by_loss(n, seed):
    loss = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    assert learned(loss).sum() >= (n + 1) // 2

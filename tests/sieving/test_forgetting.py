from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.sieving import ForgettingCounter, correct_from_logits, correct_from_loss
from spfde.sieving import accumulator as deferred_module
from spfde.sieving import forgetting as forgetting_module

INF = float("inf")


def observe(counter: ForgettingCounter, *batches: tuple[list[int], list[int]]) -> None:
    for indices, correct in batches:
        counter.observe(torch.tensor(indices, dtype=torch.long), torch.tensor(correct, dtype=torch.bool))


def test_each_step_from_right_to_wrong_is_one_forgetting_event():
    counter = ForgettingCounter(4)
    observe(
        counter,
        ([0, 1, 2], [1, 0, 1]),
        ([2, 0, 1], [0, 1, 0]),  # 2 is forgotten
        ([1, 2, 0], [1, 1, 0]),  # 0 is forgotten, 1 and 2 are learned
        ([0, 1, 2], [1, 1, 0]),  # 2 is forgotten again
    )
    assert counter.counts.tolist() == [1, 0, 2, 0]
    assert counter.seen.tolist() == [True, True, True, False]
    assert counter.learned.tolist() == [True, True, True, False]


def test_a_sample_that_occurs_twice_in_one_batch_is_taken_in_order():
    counter = ForgettingCounter(2)
    observe(counter, ([0, 1, 0, 1], [1, 0, 0, 1]))
    assert counter.counts.tolist() == [1, 0]
    observe(counter, ([1, 1, 1, 0], [0, 1, 0, 1]))
    assert counter.counts.tolist() == [1, 2]


def test_never_learned_and_unseen_samples_are_hard():
    counter = ForgettingCounter(4)
    observe(counter, ([0, 1, 2], [1, 0, 1]), ([0, 1, 2], [1, 0, 0]))
    assert counter.difficulty().tolist() == [0.0, INF, 1.0, INF]


def test_the_literal_reading_ranks_never_learned_samples_by_their_count_but_unseen_ones_stay_hard():
    counter = ForgettingCounter(4)
    observe(counter, ([0, 1, 2], [1, 0, 1]), ([0, 1, 2], [1, 0, 0]))
    assert counter.difficulty("literal").tolist() == [0.0, 0.0, 1.0, INF]


def test_a_reset_forgets_counts_outcomes_and_what_has_not_been_counted_yet():
    counter = ForgettingCounter(2)
    observe(counter, ([0, 1], [1, 1]))
    counter.reset()
    observe(counter, ([0, 1], [0, 1]))  # the outcome before the reset is no longer the one before
    assert counter.counts.tolist() == [0, 0]
    assert counter.difficulty().tolist() == [INF, 0.0]


streams = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8), min_size=1, max_size=12
)  # batches of (sample, correct)


@given(streams)
def test_counts_equal_those_of_a_plain_loop(stream):
    counter = ForgettingCounter(6)
    last: dict[int, bool] = {}
    expected, learned = [0] * 6, [False] * 6
    for batch in stream:
        observe(counter, ([i for i, _ in batch], [c for _, c in batch]))
        for index, correct in batch:
            expected[index] += last.get(index, False) and not correct
            learned[index] |= correct
            last[index] = correct
    assert counter.counts.tolist() == expected
    assert counter.learned.tolist() == learned
    assert counter.seen.tolist() == [i in last for i in range(6)]


@given(streams, st.data())
def test_reading_or_saving_in_between_changes_nothing(stream, data):
    whole, interrupted = ForgettingCounter(6), ForgettingCounter(6)
    for batch in stream:
        pairs = ([i for i, _ in batch], [c for _, c in batch])
        observe(whole, pairs)
        observe(interrupted, pairs)
        if data.draw(st.booleans()):
            resumed = ForgettingCounter(6)
            resumed.load_state_dict(interrupted.state_dict())
            interrupted = resumed
    state, other = whole.state_dict(), interrupted.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in ("forgotten", "last", "learned"))


def test_counting_waits_until_about_an_epoch_has_come_together(monkeypatch):
    monkeypatch.setattr(deferred_module, "FOLD_AT_LEAST", 6)
    calls = []
    count = forgetting_module.count_forgetting
    monkeypatch.setattr(forgetting_module, "count_forgetting", lambda *a: calls.append(a[0].numel()) or count(*a))
    counter = ForgettingCounter(5)
    for _ in range(5):
        observe(counter, ([0, 1, 2], [1, 0, 1]))
    assert calls == [6, 6]
    assert counter.counts.tolist() == [0] * 5
    assert calls == [6, 6, 3]


def test_buffers_that_the_caller_uses_again_do_not_change_what_was_observed():
    counter = ForgettingCounter(2)
    indices, correct = torch.tensor([0, 1]), torch.tensor([True, True])
    counter.observe(indices, correct)
    correct.fill_(False)
    counter.observe(indices, correct)
    indices.fill_(0)
    assert counter.counts.tolist() == [1, 1]


def test_the_state_survives_a_checkpoint_that_holds_tensors_only():
    counter = ForgettingCounter(3)
    observe(counter, ([0, 1, 2], [1, 1, 0]))
    file = io.BytesIO()
    torch.save(counter.state_dict(), file)
    file.seek(0)
    resumed = ForgettingCounter(3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    observe(resumed, ([0, 1, 2], [0, 1, 1]))
    assert resumed.counts.tolist() == [1, 0, 0]


def test_a_loaded_state_is_not_shared_with_the_counter():
    counter = ForgettingCounter(2)
    observe(counter, ([0, 1], [1, 1]))
    state = counter.state_dict()
    observe(counter, ([0, 1], [0, 0]))
    assert counter.counts.tolist() == [1, 1]
    assert state["forgotten"].tolist() == [0, 0]


def test_a_state_of_another_data_set_or_a_damaged_one_is_refused():
    counter = ForgettingCounter(3)
    with pytest.raises(StateMismatch, match="4 samples do not fit a data set of 3"):
        counter.load_state_dict(ForgettingCounter(4).state_dict())
    state = counter.state_dict()
    del state["last"]
    with pytest.raises(StateMismatch, match="'last'"):
        counter.load_state_dict(state)
    with pytest.raises(StateMismatch, match="'learned'"):
        counter.load_state_dict({**counter.state_dict(), "learned": torch.zeros(2, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("indices", "correct", "argument"),
    [
        (torch.tensor([0, 1]), torch.tensor([True]), "correct"),
        (torch.tensor([0, 1]), torch.tensor([[True], [True]]), "correct"),
        (torch.tensor([0.0, 1.0]), torch.tensor([True, True]), "indices"),
        (torch.tensor([[0, 1]]), torch.tensor([[True, True]]), "indices"),
        (torch.tensor([0, 3]), torch.tensor([True, True]), "indices=3"),
        (torch.tensor([-1, 0]), torch.tensor([True, True]), "indices=-1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_leaves_no_trace(indices, correct, argument):
    counter = ForgettingCounter(3)
    with pytest.raises(InvalidArgument, match=argument):
        counter.observe(indices, correct)
    assert not counter.seen.any()


def test_an_empty_batch_is_allowed():
    counter = ForgettingCounter(2)
    observe(counter, ([], []))
    assert counter.counts.tolist() == [0, 0]


def test_a_counter_of_no_samples_is_refused():
    with pytest.raises(InvalidArgument, match="n=0"):
        ForgettingCounter(0)


def test_right_is_the_class_with_the_largest_logit():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0]], requires_grad=True)
    correct = correct_from_logits(logits, torch.tensor([0, 1, 1]))
    assert correct.tolist() == [True, False, True]
    assert correct.dtype == torch.bool
    assert not correct.requires_grad


def test_with_class_probabilities_right_is_the_most_probable_class():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    mixed = torch.tensor([[0.7, 0.3], [0.9, 0.1]])
    assert correct_from_logits(logits, mixed).tolist() == [True, False]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_with_one_logit_a_positive_one_means_class_one(shape):
    logits = torch.tensor([1.0, -1.0, 2.0, -2.0]).reshape(shape)
    assert correct_from_logits(logits, torch.tensor([1, 0, 0, 1])).tolist() == [True, True, False, False]
    assert correct_from_logits(logits, torch.tensor([[1.0], [0], [0], [1]])).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("logits", "y"),
    [
        ((4, 3), (5,)),
        ((4, 3), (4, 2)),
        ((4, 3, 8, 8), (4, 8, 8)),
        ((4,), (3,)),
        ((4, 1), (2, 2)),
        ((), ()),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused_with_the_remedy(logits, y):
    with pytest.raises(InvalidArgument, match="correct="):
        correct_from_logits(torch.zeros(logits), torch.zeros(y, dtype=torch.long))


def test_the_half_of_a_batch_with_the_lower_loss_counts_as_learned():
    assert correct_from_loss(torch.tensor([3.0, 1.0, 2.0, 9.0])).tolist() == [False, True, True, False]
    assert correct_from_loss(torch.tensor([3.0, 1.0, 2.0])).tolist() == [False, True, True]


def test_a_loss_counts_the_same_in_any_unit():
    loss = torch.tensor([0.3, 0.1, 0.7, 0.2, 0.6], requires_grad=True)
    assert torch.equal(correct_from_loss(loss), correct_from_loss(loss * 1024))


def test_further_dimensions_of_a_loss_are_averaged():
    loss = torch.tensor([[1.0, 5.0], [2.0, 2.0], [9.0, 9.0]])
    assert correct_from_loss(loss).tolist() == [True, True, False]


def test_a_sample_with_a_nan_loss_is_not_learned_and_does_not_spoil_the_others():
    assert correct_from_loss(torch.tensor([float("nan"), 1.0, 2.0])).tolist() == [False, True, False]


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.zeros(0)])
def test_a_mean_loss_is_refused_with_the_remedy(loss):
    with pytest.raises(InvalidArgument, match="reduction="):
        correct_from_loss(loss)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_at_least_half_of_a_batch_is_learned_by_loss(n, seed):
    loss = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    assert correct_from_loss(loss).sum() >= (n + 1) // 2

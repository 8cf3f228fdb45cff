"""What a batch says of its samples, and how it adds up to a difficulty, by criterion."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.sieving import (
    CRITERIA,
    EVIDENCE,
    MeanScore,
    RandomScore,
    correct_from_logits,
    el2n_from_logits,
    loss_from_logits,
    make_scorer,
)

INF = float("inf")
EVEN = torch.tensor([[0.0, 0.0], [0.0, 0.0]])


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


# --- evidence --------------------------------------------------------------------------------------------------------


def test_error_l2_norm_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0]])  # thirds; a half and two quarters
    y = torch.tensor([0, 1])
    expected = [math.sqrt(4 / 9 + 1 / 9 + 1 / 9), math.sqrt(1 / 4 + 9 / 16 + 1 / 16)]
    assert el2n_from_logits(logits, y).tolist() == pytest.approx(expected)


def test_error_l2_norm_runs_from_sure_and_right_to_sure_and_wrong():
    logits = torch.tensor([[80.0, 0.0], [80.0, 0.0]])
    assert el2n_from_logits(logits, torch.tensor([0, 1])).tolist() == pytest.approx([0.0, math.sqrt(2)])


def test_with_class_probabilities_the_error_is_against_them():
    assert el2n_from_logits(EVEN, torch.tensor([[0.5, 0.5], [0.9, 0.1]])).tolist() == pytest.approx(
        [0.0, math.sqrt(0.32)]
    )


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert loss_from_logits(logits, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(2), math.log(4)])
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert loss_from_logits(logits, soft).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


@pytest.mark.parametrize("score", [loss_from_logits, el2n_from_logits])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_logit_stands_for_two_of_which_the_first_is_zero(score, shape):
    z, y = torch.tensor([logit(0.75), logit(0.25), 0.0]), torch.tensor([1, 1, 0])
    two = torch.stack([torch.zeros(3), z], 1)
    torch.testing.assert_close(score(z.reshape(shape), y.float().reshape(shape)), score(two, y))


@pytest.mark.parametrize("score", [loss_from_logits, el2n_from_logits, correct_from_logits])
def test_scores_are_detached_in_float32_and_refuse_what_is_no_classification(score):
    logits = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    values = score(logits, torch.tensor([0, 1]))
    assert not values.requires_grad
    assert values.dtype in (torch.float32, torch.bool)
    with pytest.raises(InvalidArgument, match="loss="):
        score(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"logits": EVEN},
        {"logits": EVEN, "y": torch.zeros(2), "loss": torch.zeros(2)},
        {"correct": torch.ones(2), "loss": torch.zeros(2)},
        {"y": torch.zeros(2)},
    ],
)
def test_every_criterion_wants_exactly_one_kind_of_evidence(criterion, given):
    with pytest.raises(InvalidArgument, match="exactly one"):
        EVIDENCE[criterion](**{"logits": None, "y": None, **given})


@pytest.mark.parametrize(
    ("criterion", "given", "told"),
    [
        ("el2n", {"loss": torch.zeros(2)}, "loss=.*class probabilities.*criterion=.loss"),
        ("el2n", {"correct": torch.ones(2)}, "correct=.*class probabilities"),
        ("loss", {"correct": torch.ones(2)}, "tells no loss"),
        ("loss", {"loss": torch.tensor(1.0)}, "reduction="),
    ],
)
def test_evidence_that_a_criterion_cannot_use_is_refused_with_the_remedy(criterion, given, told):
    with pytest.raises(InvalidArgument, match=told):
        EVIDENCE[criterion](None, None, **given)


def test_a_loss_a_pixel_is_averaged_over_the_sample():
    loss = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    assert EVIDENCE["loss"](None, None, loss=loss).tolist() == [2.0, 0.0]
    assert EVIDENCE["forgetting"](None, None, loss=loss).tolist() == [False, True]
    assert EVIDENCE["random"](None, None, loss=loss).tolist() == [0.0, 0.0]


# --- scorers ---------------------------------------------------------------------------------------------------------


def observe(scorer: Any, *batches: tuple[list[int], list[float]]) -> None:
    for indices, values in batches:
        scorer.observe(torch.tensor(indices, dtype=torch.long), torch.tensor(values, dtype=torch.float32))


def test_the_mean_score_by_hand():
    scorer = MeanScore(5)
    observe(scorer, ([0, 1, 2], [1.0, 4.0, float("nan")]), ([1, 0, 2, 3], [2.0, 0.0, 1.0, INF]))
    assert scorer.difficulty().tolist() == [0.5, 3.0, INF, INF, INF]  # NaN, infinite and unseen are hard
    scorer.reset()
    observe(scorer, ([0], [7.0]))
    assert scorer.difficulty().tolist() == [7.0, INF, INF, INF, INF]


batches = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1e6, width=32)), max_size=6), min_size=1, max_size=8
)


@given(batches, st.data())
def test_saving_in_between_changes_no_bit_of_the_mean_score(stream, data):
    whole, interrupted = MeanScore(4), MeanScore(4)
    sums: list[list[float]] = [[] for _ in range(4)]
    for batch in stream:
        pairs = ([i for i, _ in batch], [v for _, v in batch])
        observe(whole, pairs)
        observe(interrupted, pairs)
        for index, value in batch:
            sums[index].append(value)
        if data.draw(st.booleans()):
            resumed = MeanScore(4)
            resumed.load_state_dict(interrupted.state_dict())
            interrupted = resumed
    assert torch.equal(whole.difficulty(), interrupted.difficulty())
    expected = [sum(values) / len(values) if values else INF for values in sums]
    assert whole.difficulty().tolist() == pytest.approx(expected)


def test_at_random_all_are_alike_and_nothing_is_kept():
    scorer = RandomScore(3)
    observe(scorer, ([0, 1], [5.0, 1.0]))
    assert scorer.difficulty().tolist() == [0.0, 0.0, 0.0]
    assert scorer.state_dict() == {}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_scorer_refuses_ids_out_of_range_and_survives_a_checkpoint(criterion):
    scorer = make_scorer(criterion, 3)
    with pytest.raises(InvalidArgument, match="indices=3"):
        observe(scorer, ([0, 3], [1.0, 0.0]))
    observe(scorer, ([0, 1, 0], [1.0, 0.0, 0.0]))
    file = io.BytesIO()
    torch.save(scorer.state_dict(), file)
    file.seek(0)
    resumed = make_scorer(criterion, 3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one in (scorer, resumed):
        observe(one, ([1, 2], [1.0, 1.0]))
    assert torch.equal(scorer.difficulty(), resumed.difficulty())


def test_never_learned_reaches_the_counter():
    literal, hard = (make_scorer("forgetting", 1, never_learned=kind) for kind in ("literal", "hard"))
    for scorer in (literal, hard):
        observe(scorer, ([0], [0.0]))
    assert (literal.difficulty().tolist(), hard.difficulty().tolist()) == ([0.0], [INF])


def test_a_state_of_another_criterion_or_data_set_is_refused():
    forgetting: dict[str, Tensor] = make_scorer("forgetting", 3).state_dict()
    with pytest.raises(StateMismatch, match="mean scores lack 'total'"):
        MeanScore(3).load_state_dict(forgetting)
    with pytest.raises(StateMismatch, match="mean scores of 4 samples"):
        MeanScore(3).load_state_dict(MeanScore(4).state_dict())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("y", [torch.zeros(4, dtype=torch.long), torch.zeros(4, 3)], ids=["hard", "soft"])
def test_a_report_never_looks_at_values_so_that_no_device_has_to_wait(criterion, y):
    # On the meta device there are no values: whoever looks at one is refused.
    values = EVIDENCE[criterion](torch.zeros(4, 3, device="meta"), y.to("meta"))
    assert values.shape == (4,)
    make_scorer(criterion, 9).observe(torch.arange(4), values)

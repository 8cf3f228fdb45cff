"""The observer: with several processes the reports of all ranks count, on each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.counting import Devices
from spfde.core.errors import InvalidArgument
from spfde.core.torch_private import FakeTensorMode
from spfde.sieving.balance import ClassLabels
from spfde.sieving.criteria import EL2N, Forgetting, Loss, Random, Scorer, SievingCriterion
from spfde.sieving.evidence import label_bounds
from spfde.sieving.observer import Observer
from spfde.sieving.tickets import Tickets


def make_observer(scorer: Scorer, classes: ClassLabels, **arguments: Any) -> Observer:
    return Observer(scorer, Tickets(by_report=True), classes=classes, **arguments)


def test_scores_and_classes_of_all_ranks_are_counted_once_they_are_exchanged() -> None:
    other = [torch.tensor([2, 3]), torch.tensor([5.0, 7.0]), torch.tensor([1, 0])]
    scorer, classes = Loss().scorer(5), ClassLabels(5)
    observer = make_observer(scorer, classes, gather=lambda mine, _error: [mine, other, []])
    observer.report(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert scorer.difficulty().isinf().all()
    observer.exchange()
    assert scorer.difficulty().tolist() == [1.0, 3.0, 5.0, 7.0, float("inf")]
    assert classes.labels.tolist() == [1, 1, 1, 0, -1]


def test_buffers_that_the_caller_uses_again_do_not_change_what_was_reported() -> None:
    scorer, classes = Loss().scorer(2), ClassLabels(2)
    observer = make_observer(scorer, classes)
    buffers = torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), torch.tensor([1, 1])
    observer.report(*buffers)
    for buffer in buffers:
        buffer.fill_(0)
    observer.report(*buffers)
    observer.exchange()
    assert scorer.difficulty().tolist() == pytest.approx([1 / 3, 3.0])
    assert classes.labels.tolist() == [0, 1]


def test_a_report_never_looks_at_values_so_that_no_device_has_to_wait() -> None:
    # On the meta device there are no values: whoever looks at one is refused.
    values, labels = torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    observer = make_observer(Loss().scorer(5), ClassLabels(5))
    observer.report(values, torch.arange(4), labels)
    assert observer.samples == 4


@pytest.mark.parametrize("criterion", [Forgetting(), Loss(), EL2N(), Random()])
def test_a_report_from_a_gpu_stays_there_until_the_epochs_end(criterion: SievingCriterion) -> None:
    # Fake tensors of a GPU: whoever looks at a value is refused, and where each operation would run is known.
    observer, scorer = make_observer(criterion.scorer(8), ClassLabels(8)), criterion
    with FakeTensorMode(), Devices() as devices:
        logits, y = torch.empty(4, 10, device="cuda"), torch.empty(4, dtype=torch.long, device="cuda")
        ids = torch.empty(4, dtype=torch.long, device="cuda")
        devices.copied.clear()
        observer.check_labels(logits, y)
        observer.report(scorer.evidence(logits, y), ids, y)
        if scorer.takes("loss="):
            observer.report(scorer.evidence(None, None, loss=torch.empty(4, device="cuda")), ids, y)
    assert not devices.copied
    assert observer.samples in (4, 8)


def test_ids_on_a_device_close_their_tickets_when_somebody_asks_for_one() -> None:
    tickets = Tickets(by_report=True)
    for keys in ([0, 1], [2, 3], [4, 5]):
        tickets.draw(0, keys, 2)
    tickets.close_later(torch.tensor([3, 2]))
    tickets.close_later(torch.tensor([0]))
    assert len(tickets) == 2
    oldest = tickets.oldest
    assert oldest is not None
    assert oldest.left == {1: 1}
    tickets.close_later(torch.tensor([1]))
    assert [ticket.keys for ticket in tickets.left(is_ended=True)] == [[4, 5]]
    tickets.close_later(torch.tensor([4, 5]))
    tickets.begin(1)
    tickets.draw(0, [6], 1)
    assert len(tickets) == 1


def test_an_id_on_a_device_that_is_out_of_range_is_found_at_the_epochs_end() -> None:
    scorer = Loss().scorer(5)
    observer = make_observer(scorer, ClassLabels(5))
    with FakeTensorMode():
        observer.report(torch.empty(2), torch.empty(2, dtype=torch.long, device="cuda"))
    # What the GPU would have kept back.
    observer._waiting = [(torch.tensor([0, 9]), torch.tensor([1.0, 2.0]), None)]
    with pytest.raises(InvalidArgument, match=r"indices=9: must be in \[0, 5\)"):
        observer.exchange()


def test_labels_of_another_length_than_the_batch_are_refused() -> None:
    scorer, classes = Loss().scorer(5), ClassLabels(5)
    observer = make_observer(scorer, classes)
    with pytest.raises(InvalidArgument, match="observe=1: must have one entry for each of the 2 samples"):
        observer.report(torch.zeros(2), torch.tensor([0, 1]), torch.tensor([1]))
    assert scorer.difficulty().isinf().all()


@pytest.mark.parametrize(
    ("logits", "y", "bounds", "classes"),
    [
        (torch.zeros(3, 4), torch.tensor([0, 3, 7]), [0, 7], 4),
        (torch.zeros(3, 4), torch.tensor([2, -100, 1]), [-100, 2], 4),
        (torch.zeros(3), torch.tensor([1, 0, 2]), [0, 2], 2),
        (torch.zeros(3), torch.tensor([1.0, 0.0, 2.0]), [0, 2, -1e6, 0], 2),
        (torch.zeros(3), torch.tensor([0.75, 0.25, 0.75]), [0.25, 0.75, 250_000, 250_000], 2),
        (torch.zeros(3, 1), torch.tensor([[1], [0], [1]]), [0, 1], 2),
        (torch.zeros(3, 1), torch.tensor([True, False, True]), [0, 1], 2),
    ],
)
def test_the_lowest_and_the_highest_label_by_hand(
    logits: torch.Tensor, y: torch.Tensor, bounds: list[int], classes: int
) -> None:
    found = label_bounds(logits, y)
    assert found is not None
    assert [bound.tolist() for bound in found[0]] == bounds
    assert found[1] == classes


def test_class_probabilities_and_empty_batches_have_no_bounds() -> None:
    assert label_bounds(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)) is None


@pytest.mark.parametrize("wrong", [4, -1, -100])
def test_a_label_that_is_no_class_of_the_outputs_is_refused(wrong: int) -> None:
    observer = make_observer(Loss().scorer(5), ClassLabels(5))
    with pytest.raises(InvalidArgument, match=rf"y={wrong}: must be in \[0, 4\).*correct="):
        observer.check_labels(torch.zeros(2, 4), torch.tensor([0, wrong]))


def test_labels_on_a_device_are_looked_at_once_an_epoch() -> None:
    observer = make_observer(Loss().scorer(5), ClassLabels(5))
    observer.check_labels(torch.zeros(2, 4, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"))
    observer.begin_epoch()
    # What a GPU would have kept back.
    observer._bounds = [(torch.tensor(0), torch.tensor(3)), (torch.tensor(1), torch.tensor(9))]
    with pytest.raises(InvalidArgument, match=r"y=9: must be in \[0, 4\)"):
        observer.exchange()
    observer.exchange()

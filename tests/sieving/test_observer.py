"""The observer: with several processes the reports of all ranks count, on each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from spfde.errors import InvalidArgument
from spfde.sieving import ClassLabels, MeanScore, Observer, SievedBatchSampler, build_loader
from support import make_images


def make_observer(scorer: MeanScore, classes: ClassLabels, gather: Any = None) -> Observer:
    loader = DataLoader(make_images(), batch_size=2)
    sampler = SievedBatchSampler(loader.sampler, 2, False, keep=lambda: None)
    return Observer(scorer, build_loader(loader, sampler), gather, classes=classes)


def test_scores_and_classes_of_all_ranks_are_counted_once_they_are_exchanged() -> None:
    other = [(torch.tensor([2, 3]), torch.tensor([5.0, 7.0]), torch.tensor([1, 0]))]
    scorer, classes = MeanScore(5), ClassLabels(5)
    observer = make_observer(scorer, classes, lambda mine: [mine, other])
    observer.report(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert scorer.difficulty().isinf().all()
    observer.exchange()
    assert scorer.difficulty().tolist() == [1.0, 3.0, 5.0, 7.0, float("inf")]
    assert classes.labels.tolist() == [1, 1, 1, 0, -1]


def test_labels_of_another_length_than_the_batch_are_refused() -> None:
    scorer, classes = MeanScore(5), ClassLabels(5)
    observer = make_observer(scorer, classes)
    with pytest.raises(InvalidArgument, match="observe=1: must have one entry for each of the 2 samples"):
        observer.report(torch.zeros(2), torch.tensor([0, 1]), torch.tensor([1]))
    assert scorer.difficulty().isinf().all()

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from spfde.app.train.tally import Pass, Tally

LOGITS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])


def test_means_are_over_samples_whatever_the_batches() -> None:
    tally = Tally(torch.device("cpu"))
    tally.add(torch.tensor(3.0), LOGITS, torch.tensor([0, 0, 1]))
    assert tally.glance() == 1.0
    tally.add(torch.tensor(5.0), LOGITS[:1], torch.tensor([1]))
    assert tally.glance() == 2.0
    assert tally.read(7) == Pass(loss=2.0, accuracy=0.5, saved_tensor_bytes=7)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8))
def test_losses_are_summed_as_python_would(losses: list[float]) -> None:
    tally, total = Tally(torch.device("cpu")), 0.0
    for loss in losses:
        tally.add(torch.tensor(loss), LOGITS[:1], torch.tensor([0]))
        total += loss
    assert tally.read().loss == total / len(losses)


def test_a_loss_that_is_no_number_is_seen_at_a_glance() -> None:
    tally = Tally(torch.device("cpu"))
    tally.add(torch.tensor(float("nan")), LOGITS, torch.tensor([0, 0, 0]))
    assert tally.glance() != tally.glance()

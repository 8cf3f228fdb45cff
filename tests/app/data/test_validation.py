"""The validation set: drawn by class, by the seed alone, and apart from what is trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset

from spfde.app.data.folders import load_folder
from spfde.app.data.images import DataSpec, ImageArray, ImageData
from spfde.app.data.validation import drawn, hold_out, trained_on
from spfde.core.errors import InvalidArgument

SPEC = DataSpec("made", 3, 1, (2, 2), 10, 2)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])


def data() -> ImageData:
    train = ImageArray(torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2), LABELS)
    return ImageData(SPEC, train, ImageArray(train.images[:2], LABELS[:2]), torch.zeros(1), torch.ones(1), "crop")


def test_each_class_gives_its_share_the_largest_remainders_first() -> None:
    # 3 of 10: exact shares are 1.2, 1.2 and 0.6.
    assert torch.bincount(LABELS[drawn(LABELS, 3, seed=0)]).tolist() == [1, 1, 1]
    # 5 of 10: 2, 2 and 1.
    assert torch.bincount(LABELS[drawn(LABELS, 5, seed=0)]).tolist() == [2, 2, 1]


def test_what_is_drawn_is_the_same_on_every_machine_and_for_ever() -> None:
    labels = torch.arange(1000) % 10
    assert drawn(labels, 5, seed=3).tolist() == [414, 592, 650, 851, 923]
    assert not torch.equal(drawn(labels, 100, seed=0), drawn(labels, 100, seed=1))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_classes_are_held_out_evenly_and_every_sample_is_in_one_set(labels: list[int], share: float, seed: int) -> None:
    known = torch.tensor(labels)
    count = trained_count = round(share * len(labels))
    chosen = drawn(known, count, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == trained_count
    for label in set(labels):
        of_class, held = labels.count(label), int((known[chosen] == label).sum())
        assert abs(held - of_class * count / len(labels)) < 1
        assert held <= of_class


def test_the_counts_are_known_before_the_labels_are() -> None:
    for share in (0.1, 0.25, 0.34, 0.5, 0.9):
        held_out = hold_out(data(), share, seed=1)
        assert isinstance(held_out.train, Subset)
        assert isinstance(held_out.validation, Subset)
        assert held_out.spec == trained_on(SPEC, share, batch_size=1)
        assert len(held_out.train) == held_out.spec.train_samples
        assert sorted([*held_out.train.indices, *held_out.validation.indices]) == list(range(10))


def test_without_a_share_the_data_are_as_they_were() -> None:
    whole = data()
    assert hold_out(whole, 0, seed=0) is whole
    assert trained_on(SPEC, 0, batch_size=64) is SPEC
    assert "validation_samples" not in whole.facts()
    assert (whole.evaluated_on, hold_out(whole, 0.2, 0).evaluated_on) == ("test", "val")
    assert hold_out(whole, 0.2, 0).facts()["validation_samples"] == 2


@pytest.mark.parametrize(
    ("share", "batch_size", "told"),
    [
        (0.04, 1, r"validation_share=0.04: leaves none of 10 training samples.*Take 0.1 or more"),
        (0.5, 6, r"validation_share=0.5: leaves 5 of 10 training samples, no full batch of 6"),
        (0.99, 1, r"leaves 0 of 10"),
        (1.0, 1, r"is not in \[0, 1\)"),
        (-0.5, 1, r"is not in \[0, 1\)"),
        (float("nan"), 1, r"is not in \[0, 1\)"),
    ],
)
def test_a_share_that_leaves_too_little_is_refused(share: float, batch_size: int, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        trained_on(SPEC, share, batch_size)


def test_images_that_are_decoded_when_asked_for_are_held_out_too(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("test", 1)):
        for label in range(2):
            folder = tmp_path / part / f"class-{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (100 * label + number, 0, 0)).save(folder / f"{number}.png")
    held_out = hold_out(load_folder(tmp_path, in_memory_bytes=0), 0.25, seed=0)
    assert held_out.validation is not None
    assert not held_out.in_memory
    assert held_out.spec.train_samples == 6
    images, labels = zip(*(held_out.validation[at] for at in range(2)), strict=True)
    assert labels == (0, 1)
    trained = {int(held_out.train[at][0][0, 0, 0]) for at in range(6)}
    assert trained | {int(image[0, 0, 0]) for image in images} == {0, 1, 2, 3, 100, 101, 102, 103}
    assert replace(held_out, validation=None).split("val") is held_out.test

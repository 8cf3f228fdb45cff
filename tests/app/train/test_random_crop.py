"""Random resized crops: which part of an image is taken, and how it is scaled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spfde.app.train.random_crop import N_DRAWS, TRIES, boxes, draws, resized_crop


def drawn(area: float, ratio: float, start: float) -> Tensor:
    """Numbers as ``draws`` gives them for one image, the same in all ten tries."""
    return torch.tensor([[area] * TRIES + [ratio] * TRIES + [start] * 2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "numbers", "box"),
    [
        # 8 % of 100 pixels at 3:4 is 3.27 x 2.45, and half of the 8 and 9 places is the fifth.
        ((10, 10), (0.0, 0.0, 0.5), [4, 4, 3, 2]),
        ((10, 10), (1.0, 0.5, 0.9), [0, 0, 10, 10]),
        # Nothing of 8 pixels and more at 3:4 is in one row: the largest part that is, at the centre.
        ((1, 100), (0.0, 0.0, 0.9), [0, 49, 1, 1]),
        ((100, 3), (1.0, 0.5, 0.0), [48, 0, 4, 3]),
    ],
)
def test_a_box_has_the_share_and_the_shape_that_were_drawn(
    size: tuple[int, int], numbers: tuple[float, float, float], box: list[int]
) -> None:
    assert boxes(drawn(*numbers), *size).tolist() == [box]


def test_the_first_of_ten_tries_that_fits_is_taken() -> None:
    numbers = drawn(1.0, 0.0, 0.0)  # 11.5 x 8.7 pixels: does not fit
    numbers[0, 3] = 0.0
    assert boxes(numbers, 10, 10).tolist() == [[0, 0, 3, 2]]


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 2**40))
def test_a_box_lies_in_the_image(height: int, width: int, seed: int) -> None:
    found = boxes(draws(seed + torch.arange(20)), height, width)
    assert bool((found[:, :2] >= 0).all() & (found[:, 2:] > 0).all())
    assert bool(((found[:, 0] + found[:, 2] <= height) & (found[:, 1] + found[:, 3] <= width)).all())


def test_numbers_are_spread_over_their_range() -> None:
    numbers = draws(torch.arange(4000))
    assert numbers.shape == (4000, N_DRAWS)
    assert 0 <= float(numbers.min()) < 0.001 < 0.999 < float(numbers.max()) < 1
    assert torch.allclose(numbers.mean(0), torch.tensor(0.5, dtype=torch.float64), atol=0.02)
    assert float(torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max()) < 0.08


def test_a_part_is_scaled_from_its_own_pixels_alone_and_mirrored_where_asked() -> None:
    row = torch.tensor([0.0, 10, 20, 30])[None, None, None]
    box, flip = torch.tensor([[0, 0, 1, 2]]), torch.tensor([False])
    assert resized_crop(row, box, flip).flatten().tolist() == [0.0, 2.5, 7.5, 10.0]
    assert resized_crop(row, box, ~flip).flatten().tolist() == [10.0, 7.5, 2.5, 0.0]
    assert resized_crop(row.byte(), torch.tensor([[0, 2, 1, 2]]), flip).flatten().tolist() == [20, 22, 28, 30]


def test_it_is_torchvision_s_resized_crop_to_a_level_of_grey() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.randint(0, 256, (32, 3, 24, 40), generator=torch.Generator().manual_seed(0)).byte()
    found, flip = boxes(draws(torch.arange(32)), 24, 40), torch.arange(32) % 2 == 1
    for image, box, mirrored, made in zip(images, found.tolist(), flip, resized_crop(images, found, flip), strict=True):
        expected = functional.resized_crop(image, *box, [24, 40], antialias=True)
        expected = functional.horizontal_flip(expected) if mirrored else expected
        assert int((made.int() - expected.int()).abs().max()) <= 1


@pytest.mark.long
@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 1000), (1000, 100), (8, 8)])
def test_boxes_are_distributed_as_torchvision_s(height: int, width: int) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    image, crop = torch.zeros(3, height, width), v2.RandomResizedCrop(8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[each[name] for name in ("top", "left", "height", "width")] for each in params]).double()
    mine = boxes(draws(torch.arange(4000)), height, width).double()
    error = 5 * (theirs.std(0) / 4000**0.5 * 2**0.5) + 1e-9
    assert bool(((theirs.mean(0) - mine.mean(0)).abs() <= error).all())
    assert torch.allclose(theirs.std(0), mine.std(0), rtol=0.1)

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spfde.app.train.augment import BatchAugment, crop_flip, normalise
from spfde.core.errors import StateMismatch


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _one(image: Tensor, top: int, left: int, flip: bool, padding: int) -> Tensor:
    """The plain way: one image, written out pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source_row = row + top - padding
            source_column = (width - 1 - column if flip else column) + left - padding
            if 0 <= source_row < height and 0 <= source_column < width:
                out[:, row, column] = image[:, source_row, source_column]
    return out


def test_a_crop_moves_the_image_and_fills_with_zeros() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    moved = crop_flip(image, torch.tensor([0]), torch.tensor([2]), padding=1)
    assert moved.tolist() == [[[[0, 0], [2, 0]]]]


def test_a_flip_mirrors_left_to_right_after_the_crop() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    centre = torch.tensor([1])
    assert crop_flip(image, centre, centre, torch.tensor([True]), padding=1).tolist() == [[[[2, 1], [4, 3]]]]
    moved = crop_flip(image, torch.tensor([0]), torch.tensor([2]), torch.tensor([True]), padding=1)
    assert moved.tolist() == [[[[0, 0], [0, 2]]]]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    channels=st.integers(1, 4),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    padding=st.integers(0, 3),
    mode=st.sampled_from(["crop", "crop+flip"]),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float16]),
    seed=st.integers(0, 99),
)
def test_every_sample_is_what_the_plain_transform_of_it_alone_would_be(
    n: int, channels: int, height: int, width: int, padding: int, mode: str, dtype: torch.dtype, seed: int
) -> None:
    images = torch.randint(1, 255, (n, channels, height, width), generator=_generator(seed)).to(dtype)
    kept = images.clone()
    augment = BatchAugment(mode, _generator(seed), padding=padding)  # type: ignore[arg-type]
    result = augment(images)
    top, left, *flips = BatchAugment(mode, _generator(seed), padding=padding).draw(n)  # type: ignore[arg-type]
    flip = flips[0] if flips else None
    assert (flip is not None) == (mode == "crop+flip")
    for i in range(n):
        mirrored = flip is not None and bool(flip[i])
        assert torch.equal(result[i], _one(images[i], int(top[i]), int(left[i]), mirrored, padding))
    assert result.dtype == dtype
    assert torch.equal(images, kept)


def test_a_channels_last_batch_gives_the_same_pixels() -> None:
    images = torch.randint(0, 255, (3, 3, 6, 5), generator=_generator()).to(torch.uint8)
    plain = BatchAugment("crop+flip", _generator())(images)
    last = BatchAugment("crop+flip", _generator())(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(plain, last)


def test_offsets_cover_the_whole_range_and_flips_are_even() -> None:
    top, left, flip = BatchAugment("crop+flip", _generator(), padding=4).draw(5_000)
    assert flip is not None
    for offsets in (top, left):
        assert offsets.unique().tolist() == list(range(9))
        assert torch.bincount(offsets).min() > 400
    assert 0.45 < flip.double().mean() < 0.55
    assert len({(int(t), int(x)) for t, x in zip(top, left, strict=True)}) == 81


def test_mode_none_returns_the_batch_itself_and_draws_nothing() -> None:
    generator = _generator()
    before = generator.get_state()
    images = torch.zeros(2, 1, 4, 4)
    assert BatchAugment("none", generator)(images) is images
    assert torch.equal(generator.get_state(), before)


def test_mode_crop_never_flips() -> None:
    images = torch.arange(5.0).view(1, 1, 1, 5).repeat(64, 1, 1, 1)
    assert torch.equal(BatchAugment("crop", _generator(), padding=0)(images), images)
    assert not torch.equal(BatchAugment("crop+flip", _generator(), padding=0)(images), images)


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    BatchAugment("crop+flip", _generator())(torch.zeros(8, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_state_goes_on_with_the_same_draws() -> None:
    images = torch.randint(0, 255, (8, 3, 8, 8), generator=_generator()).to(torch.uint8)
    augment = BatchAugment("crop+flip", _generator(5))
    augment(images)
    buffer = io.BytesIO()
    torch.save(augment.state_dict(), buffer)
    expected = [augment(images) for _ in range(3)]
    resumed = BatchAugment("crop+flip", _generator(99))
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(resumed(images), batch) for batch in expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "crop"}, "mode is 'crop'"),
        ({"padding": 2}, "padding is 2"),
        ({"generator": None}, "generator"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "damaged"),
    ],
)
def test_a_state_of_another_augmentation_is_refused(change: dict[str, object], words: str) -> None:
    augment = BatchAugment("crop+flip", _generator())
    with pytest.raises(StateMismatch, match=words):
        augment.load_state_dict({**augment.state_dict(), **change})


def test_an_empty_state_is_refused() -> None:
    with pytest.raises(StateMismatch, match="mode"):
        BatchAugment("crop", _generator()).load_state_dict({})


def test_uint8_is_normalised_as_shares_of_255_and_float_as_it_is() -> None:
    mean, std = torch.tensor([0.2, 0.4]), torch.tensor([0.5, 0.25])
    bytes_ = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 2, 1, 2)
    expected = torch.tensor([-0.4, 0.0, 0.0, 2.4]).view(1, 2, 1, 2)
    torch.testing.assert_close(normalise(bytes_, mean, std), expected)
    floats = torch.tensor([0.0, 0.2, 0.4, 1.0]).view(1, 2, 1, 2)
    kept = floats.clone()
    torch.testing.assert_close(normalise(floats, mean, std), expected)
    assert torch.equal(floats, kept)
    assert normalise(floats.double(), mean, std).dtype == torch.float32

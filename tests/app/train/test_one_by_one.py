"""Images that are augmented where they are loaded: the same ones, whatever the workers, and after an epoch was left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import spfde
from spfde.app.data import decoding
from spfde.app.data.folders import ImageFiles
from spfde.app.data.images import ImageArray, collate, fetched
from spfde.app.train.augment import BatchAugment
from spfde.app.train.one_by_one import AugmentedSamples, RandAugment, files_of
from spfde.core.numbers import mix

CROP = "random-resized-crop"


def augment(mode: Any = CROP) -> BatchAugment:
    return BatchAugment(mode, torch.Generator(), padding=2)


def array(n: int = 10, size: int = 8) -> ImageArray:
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    return ImageArray(images, torch.arange(n) % 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of noise of 48 x 32 pixels, in two classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label in ("one", "two"):
        (root / label).mkdir()
        for number in range(3):
            pixels = random.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


def files_in(root: Path, size: int = 12) -> ImageFiles:
    files = ImageFiles.below(root)
    files.image_size = (size, size)
    return files


def epoch_of(loader: DataLoader[Any]) -> Tensor:
    return torch.cat([images for images, _ in loader])


def test_what_is_drawn_follows_from_the_session_s_seeds() -> None:
    images, model = array(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    samples = AugmentedSamples(images, augment(), seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sample = torch.zeros(1, 3, 8, 8)
    loader = DataLoader(samples, 4, collate_fn=collate)
    session = spfde.attach(model, optimizer, loader, spfde.presets.dense, epochs=2, seed=3, sample=sample)
    for epoch in session.epochs():
        samples.begin_epoch(epoch)
        for handed, _ in session.loader:
            ids = session.loader.current_indices
            assert ids is not None
            assert torch.equal(handed, augment().replay(images.images[ids], session.augmentation_seeds()))
            model(handed.float()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_make_no_difference_and_an_epoch_that_was_left_leaves_nothing(workers: int, photos: Path) -> None:
    files = files_in(photos)
    expected, plain = [], AugmentedSamples(files, augment(), seed=3, randaugment=RandAugment(2, 9))
    for epoch in range(3):
        plain.begin_epoch(epoch)
        expected.append(plain.__getitems__(range(6))[0])
    assert not torch.equal(expected[0], expected[1])
    samples = AugmentedSamples(files, augment(), seed=3, randaugment=RandAugment(2, 9), is_shared=workers > 0)
    settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(samples, 1, collate_fn=collate, **settings)
    first = iter(loader)  # an epoch of which one batch is taken, while workers have more of it ready
    assert torch.equal(next(first)[0][0], expected[0][0])
    for epoch in (1, 2, 0):
        samples.begin_epoch(epoch)
        assert torch.equal(epoch_of(loader), expected[epoch])


def test_a_part_s_images_are_cropped_from_its_own_files_by_their_ids_in_the_part(photos: Path) -> None:
    files = files_in(photos)
    part = AugmentedSamples(Subset(files, [4, 2]), augment(), seed=3)
    seeds = mix(torch.arange(2), 3, 0, 0)
    drawn = augment().moves_of(seeds, (32, 48))
    for index, position in enumerate((4, 2)):
        image, label = part[index]
        box = tuple(drawn[0][index].tolist())
        whole = np.array(files.cropped(position, lambda _height, _width, box=box: box)[0])
        assert label == files.targets[position]
        assert np.array_equal(image.numpy(), whole[:, :, ::-1] if drawn[1][index] else whole)


def test_files_of_images_in_memory_are_cropped_whole(photos: Path) -> None:
    files = files_in(photos)
    decoded = ImageArray(fetched(files, range(6))[0], files.targets, files)
    assert torch.equal(
        AugmentedSamples(decoded, augment(), seed=1).__getitems__([5, 0])[0],
        AugmentedSamples(files, augment(), seed=1).__getitems__([5, 0])[0],
    )
    assert files_of(array()) is None


def test_a_crop_is_of_the_upright_image_and_reaches_beyond_its_centre(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :8] = (200, 0, 0)  # outside of the square at the centre
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right: what was on the left is above
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png", exif=exif)
    files = files_in(tmp_path, 8)
    sizes: list[tuple[int, int]] = []

    def above(height: int, width: int) -> tuple[int, int, int, int]:
        sizes.append((height, width))
        return 0, 0, 8, width

    part, _ = files.cropped(0, above)
    assert sizes == [(60, 40)]
    assert bool((part[0, :-1] == 200).all())  # the last row reaches over the edge a little
    assert int(files[0][0].max()) == 0


@pytest.mark.parametrize(("rows", "decoded"), [(512, 64), (128, 256), (60, 512)])
def test_a_jpeg_is_decoded_as_coarsely_as_the_crop_allows(
    rows: int, decoded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    ramp = np.add.outer(np.arange(512), np.arange(512)) // 4
    picture = np.stack([ramp, ramp, 255 - ramp], 2).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "one" / "a.jpg", quality=95, subsampling=0)
    files, seen, usual = files_in(tmp_path, 60), [], decoding.scale
    monkeypatch.setattr(decoding, "scale", lambda image, size: seen.append(image.shape[1]) or usual(image, size))
    part, _ = files.cropped(0, lambda _height, _width: (0, 0, rows, rows))
    assert seen == [decoded * rows // 512]
    whole = Image.fromarray(picture)
    expected = np.array(whole.resize((60, 60), Image.Resampling.BILINEAR, (0, 0, rows, rows)))
    assert np.abs(part.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 2


def test_randaugment_follows_from_its_seed_and_leaves_the_global_generator_alone() -> None:
    image, change = array(1, 16).images[0], RandAugment(2, 9)
    before = torch.get_rng_state()
    changed = [change(image, seed) for seed in range(12)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert all(torch.equal(one, change(image, seed)) for seed, one in enumerate(changed))
    assert len({tuple(one.flatten().tolist()) for one in changed}) > 8
    assert all((one.dtype, one.shape) == (torch.uint8, image.shape) for one in changed)
    assert change(image[:1], 0).shape == (1, 16, 16)


def test_randaugment_comes_after_crop_and_flip() -> None:
    images = array()
    samples = AugmentedSamples(images, augment("crop+flip"), seed=2, randaugment=RandAugment(1, 20))
    seeds = mix(torch.arange(10), 2, 0, 0)
    moved = augment("crop+flip").replay(images.images, seeds)
    for made, image, seed in zip(samples.__getitems__(range(10))[0], moved, mix(seeds, 30).tolist(), strict=True):
        assert torch.equal(made, RandAugment(1, 20)(image, seed))

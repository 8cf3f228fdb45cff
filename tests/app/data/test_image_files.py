"""Image folders as they are found: pixels of other ranges, links, and the size that is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spfde.app.data.datasets import describe_data, load_data
from spfde.app.data.decoding import decode, fit
from spfde.app.data.images import ImageData, resized
from spfde.core.errors import DataError

SIDE = 8


def write(place: Path, image: Any = None, **options: Any) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    picture = np.full((SIDE, SIDE, 3), 60, np.uint8) if image is None else image
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(place, **options)
    return place


def folder(root: Path) -> Path:
    """Two images of each of two classes in each part."""
    for part in ("train", "test"):
        for label in ("one", "two"):
            for number in (0, 1):
                write(root / part / label / f"{number}.png")
    return root


def load(root: Path, **options: Any) -> ImageData:
    return load_data(root, root="nowhere", **options)


def first_pixels(data: ImageData) -> list[int]:
    image, _ = data.train[0]
    values: list[int] = image[0, 0].tolist()
    return values


GREY = np.tile(np.array([0, 257 * 50, 257 * 100, 65535, 0, 0, 0, 0], np.uint16), (SIDE, 1))
EIGHT = [0, 50, 100, 255, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", GREY),
        ("a.tif", GREY),
        ("a.png", (GREY // 257).astype(np.uint8)),
        ("a.tif", Image.fromarray((GREY // 257).astype(np.uint8)).convert("LA")),
        ("a.png", Image.fromarray((GREY // 257).astype(np.uint8)).convert("P")),
    ],
    ids=["png16", "tiff16", "8", "LA", "palette"],
)
def test_pixels_are_scaled_from_black_to_white(name: str, image: Any, tmp_path: Path) -> None:
    write(folder(tmp_path) / "train" / "one" / "-first.png").unlink()
    write(tmp_path / "train" / "one" / f"-{name}", image)
    assert first_pixels(load(tmp_path)) == EIGHT


def test_one_bit_and_four_inks_are_turned_to_rgb(tmp_path: Path) -> None:
    folder(tmp_path)
    black = Image.fromarray(np.zeros((SIDE, SIDE), np.uint8))
    write(tmp_path / "train" / "one" / "-a.png", black.convert("1"))
    assert first_pixels(load(tmp_path)) == [0] * SIDE
    write(tmp_path / "train" / "one" / "-a.jpg", black.convert("RGB").convert("CMYK"))
    assert max(first_pixels(load(tmp_path))) < 10


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_known_white_are_refused_by_file_and_mode(kind: type, tmp_path: Path) -> None:
    write(folder(tmp_path) / "train" / "one" / "-odd.tiff", np.ones((SIDE, SIDE), kind))
    with pytest.raises(DataError, match=r"-odd.tiff.*mode [FI]\b"):
        load(tmp_path)


@pytest.mark.parametrize("link", ["..", "../../..", "../two", "."])
def test_a_link_to_what_is_read_already_is_left_out_and_named(link: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    (root / "train" / "one" / "again").symlink_to(link)
    with pytest.warns(UserWarning, match="again is a link"):
        spec = describe_data(root)
    assert (spec.train_samples, spec.test_samples) == (4, 4)


def test_folders_and_files_elsewhere_are_found_through_links(tmp_path: Path) -> None:
    root, store = folder(tmp_path / "pictures"), folder(tmp_path / "store") / "train" / "one"
    (root / "train" / "one" / "more").symlink_to(store)
    (root / "train" / "two" / "linked.png").symlink_to(store / "0.png")
    (store / "back").symlink_to(root / "train")
    with pytest.warns(UserWarning, match="back is a link"):
        spec = describe_data(root)
    assert spec.train_samples == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (store / "back").unlink()
        assert describe_data(root).train_samples == 7


def to_folder(root: Path, store: Path) -> None:
    (root / "train" / "one" / "more").symlink_to("../../test/one")


def to_file(root: Path, store: Path) -> None:
    for number in (0, 1):
        (root / "train" / "two" / f"linked{number}.png").symlink_to(f"../../test/one/{number}.png")


def from_both(root: Path, store: Path) -> None:
    for part in ("train", "test"):
        (root / part / "one" / "more").symlink_to(store / "train" / "one")


def back(root: Path, store: Path) -> None:
    (root / "test" / "one" / "more").symlink_to("../../train/one")


@pytest.mark.parametrize(
    ("link", "part", "tested"),
    [(to_folder, "train", 4), (to_file, "train", 4), (from_both, "train", 6), (back, "test", 4)],
)
def test_no_link_brings_an_image_into_training_and_test(
    link: Callable[[Path, Path], None], part: str, tested: int, tmp_path: Path
) -> None:
    root = folder(tmp_path / "pictures")
    link(root, folder(tmp_path / "store"))
    with pytest.warns(UserWarning, match=rf"2 images of .*{part} are in the other set"):
        data = load(root)
    assert (data.spec.train_samples, data.spec.test_samples) == (4, tested)
    assert (len(data.train), len(data.test)) == (4, tested)


@pytest.mark.parametrize("linked", ["train", "train/two"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # the images are said to be left out, too
def test_a_class_that_is_the_same_in_training_and_test_is_refused(linked: str, tmp_path: Path) -> None:
    root = folder(tmp_path)
    shutil.rmtree(root / linked)
    (root / linked).symlink_to(root / linked.replace("train", "test"))
    with pytest.raises(DataError, match="other set"):
        describe_data(root)


def test_the_size_that_is_asked_for_is_that_of_all_images(tmp_path: Path) -> None:
    root = folder(tmp_path)
    assert load(root).spec.image_size == (SIDE, SIDE)
    data = load(root, image_size=12)
    assert data.spec == describe_data(root, 12)
    assert data.train[0][0].shape == (3, 12, 12)
    assert describe_data("cifar10", 16).sample_shape == (3, 16, 16)


def test_arrays_are_brought_to_the_size(tmp_path: Path) -> None:
    arrays = {f"x_{part}": np.full((4, 10, 8), 7, np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays, y_train=np.arange(4) % 2, y_test=np.arange(4) % 2)
    data = load(tmp_path / "a.npz", image_size=16)
    assert data.spec == describe_data(tmp_path / "a.npz", 16)
    assert data.train[0][0].tolist() == torch.full((1, 16, 16), 7).tolist()


def test_scaling_covers_the_size_and_cuts_at_the_centre() -> None:
    rows = torch.arange(4.0)[:, None].expand(4, 2)[None, None]
    assert resized(rows, (2, 2)).tolist() == rows[:, :, 1:3].tolist()
    assert resized(rows.byte(), (1, 1)).dtype == torch.uint8


# --- what lies in the file beside colours ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_are_white(mode: str, tmp_path: Path) -> None:
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)  # black everywhere
    pixels[:, : SIDE // 2, 3] = 255  # and seen on the left alone
    image = Image.fromarray(pixels, "RGBA")
    options: dict[str, Any] = {}
    if mode == "P":
        image = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        options["transparency"] = 1
    elif mode != "RGBA":
        image = image.convert(mode)
    suffix = ".tif" if mode == "PA" else ".png"
    write(folder(tmp_path) / "train" / "one" / f"-first{suffix}", image, **options)
    assert first_pixels(load(tmp_path)) == [0] * (SIDE // 2) + [255] * (SIDE // 2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_the_camera_says(orientation: int, tmp_path: Path) -> None:
    """The file is made from the upright image by the turn that undoes each orientation."""
    upright = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    upright[: SIDE // 2, :SIDE] = 200  # the upper left quarter
    turned = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    turned |= {5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1)}
    turned |= {8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned[orientation](upright)))
    write(folder(tmp_path) / "train" / "one" / "-first.png", image, exif=exif)
    found, _ = load(tmp_path).train[0]
    assert tuple(found.shape) == (3, SIDE, 2 * SIDE)
    assert torch.equal(found[0], torch.from_numpy(upright[..., 0]))


def test_a_link_to_an_image_of_the_same_tree_counts_once(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "train" / "one" / "again.png").symlink_to("0.png")
    (root / "train" / "two" / "other.png").symlink_to("../one/1.png")
    with pytest.warns(UserWarning, match="is a link to"):
        assert describe_data(root).train_samples == 4


@pytest.mark.parametrize("where", ["train/three", "train/one/gone.png", "train/one/gone"])
@pytest.mark.parametrize("target", ["/nowhere/at/all", "."])
def test_a_link_to_nothing_is_an_error_that_names_it(where: str, target: str, tmp_path: Path) -> None:
    place = folder(tmp_path) / where
    place.symlink_to(place.name if target == "." else target)
    with pytest.raises(DataError, match="link to nothing") as caught:
        describe_data(tmp_path)
    assert place.name in str(caught.value)


@pytest.mark.parametrize("linked", [False, True])
def test_a_queue_among_the_images_is_an_error_that_names_it_and_not_waited_for(linked: bool, tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    place = next((root / "train").iterdir()) / "queue.png"
    os.mkfifo(tmp_path / "queue" if linked else place)
    if linked:
        place.symlink_to(tmp_path / "queue")
    with pytest.raises(DataError, match=r"queue\.png.*is no plain file"):
        describe_data(root)


def test_a_file_that_another_program_would_decode_is_refused_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands PostScript to Ghostscript."""
    root = folder(tmp_path / "data")
    place = next((root / "train").iterdir()) / "picture.png"
    Image.new("RGB", (8, 8)).save(place, format="EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DataError, match=r"picture\.png.*cannot be read as an image"):
        load_data(root, root=tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_have_the_pixels_that_pillow_gives(mode: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        write(tmp_path / f"{number}.jpg", Image.fromarray(pixels).convert(mode))
        with Image.open(tmp_path / f"{number}.jpg") as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(decode(str(tmp_path / f"{number}.jpg")).permute(1, 2, 0), expected)


def test_large_jpegs_are_decoded_at_a_resolution_that_is_enough(tmp_path: Path) -> None:
    path = str(write(tmp_path / "large.jpg", np.full((100, 400, 3), 50, np.uint8)))
    assert decode(path).shape == (3, 100, 400)
    assert decode(path, at_least=(25, 100)).shape == (3, 25, 100)
    assert decode(path, at_least=(30, 30)).shape == (3, 50, 200)
    assert fit(decode(path, at_least=(30, 30)), (30, 30)).unique().tolist() == [50]


def test_a_jpeg_that_is_cut_short_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = write(tmp_path / "cut.jpg", noise)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(DataError, match=r"cut\.jpg.*cannot be read as an image"):
        decode(str(path))


def test_the_middle_is_cut_out_and_scaled() -> None:
    columns = torch.arange(8, dtype=torch.uint8).expand(1, 4, 8)
    assert fit(columns, (4, 4)).tolist() == columns[:, :, 2:6].tolist()
    assert fit(columns, (2, 4)).shape == (1, 2, 4)
    assert fit(columns.mT, (4, 4)).tolist() == columns.mT[:, 2:6].tolist()

"""Lists of images: held compactly, kept between starts, and looked for anew whenever they could be wrong."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from spfde.app.data import folders, kept_lists, listing
from spfde.app.data.datasets import describe_data, load_data
from spfde.app.data.listing import find_images
from spfde.core.errors import DataError


def tree(root: Path, images: int = 2) -> Path:
    for part in ("train", "val"):
        for label in ("cat", "dög"):
            (root / part / label / "more").mkdir(parents=True)
            for number in range(images):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(root / part / label / f"{number}.png")
    return root


@pytest.fixture
def keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lists of any size and age are kept in this folder."""
    monkeypatch.setenv("SPFDE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_lists, "KEPT_FROM", 1)
    monkeypatch.setattr(kept_lists, "SETTLED_SECONDS", -3600)
    return tmp_path / "cache" / "lists"


@pytest.fixture
def looked_for(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders whose files were looked for."""
    looked: list[str] = []
    monkeypatch.setattr(folders, "find_images", lambda root: looked.append(Path(root).name) or find_images(root))
    return looked


def test_a_list_gives_paths_and_classes_in_order(tmp_path: Path) -> None:
    root = tree(tmp_path) / "train"
    (root / "cat" / "more" / "10.JPEG").touch()
    (root / "cat" / ".hidden.png").touch()
    files = find_images(root)
    below = ["cat/0.png", "cat/1.png", "cat/more/10.JPEG", "dög/0.png", "dög/1.png"]
    assert list(files.paths()) == [str(root / name) for name in below]
    assert files.path(-1) == str(root / "dög/1.png")
    assert files.targets.tolist() == [0, 0, 0, 1, 1]
    assert set(files.marks) == {"", "cat", "cat/more", "dög", "dög/more"}

    rest = files.without(torch.tensor([True, False, False, True, False]))
    assert [path.removeprefix(f"{root}/") for path in rest.paths()] == ["cat/1.png", "cat/more/10.JPEG", "dög/1.png"]
    assert rest.targets.tolist() == [0, 0, 1]


def test_a_list_takes_bytes_and_no_objects_for_each_image(tmp_path: Path) -> None:
    root = tree(tmp_path) / "train"
    for number in range(1000):
        (root / "cat" / f"{number:05}.png").touch()
    files = find_images(root)
    assert len(pickle.dumps(files)) < len(files) * (len("cat/00100.png") + 16 + 1) + 2000


def test_names_that_are_no_text_are_found_and_kept(tmp_path: Path, keeps: Path, looked_for: list[str]) -> None:
    root = tree(tmp_path / "data")
    odd = os.path.join(os.fsencode(root / "train" / "cat"), b"\xff\xfe.png")
    try:
        os.link(root / "train" / "cat" / "0.png", odd)
    except OSError:
        pytest.skip("this file system takes text alone")
    for _ in range(2):
        assert len(load_data(root, root="").train) == 5  # type: ignore[arg-type]  # it has a length
    assert looked_for == ["train", "val"]


def test_the_second_start_looks_for_nothing(tmp_path: Path, keeps: Path, looked_for: list[str]) -> None:
    root = tree(tmp_path / "data")
    found = [describe_data(root) for _ in range(3)]
    assert looked_for == ["train", "val"]
    assert found[0] == found[1] == found[2]
    kept, _ = kept_lists.recall(root / "train") or pytest.fail("it is not kept")
    fresh = find_images(root / "train")
    assert list(kept.paths()) == list(fresh.paths())
    assert kept.targets.tolist() == fresh.targets.tolist()
    assert (kept.classes, kept.marks) == (fresh.classes, fresh.marks)


def add(train: Path) -> None:
    (train / "cat" / "0.png").with_name("new.png").write_bytes((train / "cat" / "0.png").read_bytes())


def remove(train: Path) -> None:
    (train / "dög" / "1.png").unlink()


def rename(train: Path) -> None:
    (train / "dög" / "1.png").rename(train / "dög" / "7.png")


def deep(train: Path) -> None:
    (train / "dög" / "0.png").rename(train / "cat" / "more" / "8.png")


def another_class(train: Path) -> None:
    (train / "dög").rename(train / "wolf")
    (train.parent / "val" / "dög").rename(train.parent / "val" / "wolf")


def backdated(train: Path) -> None:
    before = os.stat(train / "dög")
    remove(train)
    os.utime(train / "dög", ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged(train: Path) -> None:
    moved = train.rename(train.with_name("moved"))
    tree(train.parent / "other")
    (train.parent / "other" / "train").rename(train)
    remove(train)
    assert moved.exists()


@pytest.mark.parametrize("change", [add, remove, rename, deep, another_class, backdated, exchanged])
def test_what_has_changed_is_looked_for_anew(
    change: Callable[[Path], None], tmp_path: Path, keeps: Path, looked_for: list[str]
) -> None:
    root = tree(tmp_path / "data")
    describe_data(root)
    change(root / "train")
    data = load_data(root, root="")
    assert "train" in looked_for[2:]
    assert data.spec.train_samples == len(list(root.glob("train/**/*.png")))
    assert data.class_names == tuple(sorted(folder.name for folder in (root / "train").iterdir()))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "folder"])
def test_a_damaged_list_is_looked_for_anew_and_kept_again(
    damage: str, tmp_path: Path, keeps: Path, looked_for: list[str]
) -> None:
    root = tree(tmp_path / "data")
    before = load_data(root, root="").spec
    for place in keeps.iterdir():
        content = place.read_bytes()
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        place.unlink()
        if damage == "folder":
            place.mkdir()
            continue
        place.write_bytes({"cut": content[:-5], "flipped": flipped, "empty": b"", "foreign": b"\x80\x04." * 50}[damage])
    with warnings.catch_warnings(record=True):  # a folder in its place cannot be replaced, which is said
        warnings.simplefilter("always")
        assert load_data(root, root="").spec == before
        assert looked_for == ["train", "val"] * 2
        describe_data(root)
    assert len(looked_for) == (6 if damage == "folder" else 4)


def test_what_may_change_unseen_is_not_kept(
    tmp_path: Path, keeps: Path, looked_for: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    linked, fresh, small = (tree(tmp_path / name) for name in ("linked", "fresh", "small"))
    tree(tmp_path / "store")
    for part in ("train", "val"):
        (linked / part / "cat" / "link.png").symlink_to(tmp_path / "store" / part / "cat" / "0.png")
    describe_data(linked)
    monkeypatch.setattr(kept_lists, "SETTLED_SECONDS", 3600)  # it has just been written
    describe_data(fresh)
    monkeypatch.setattr(kept_lists, "SETTLED_SECONDS", -3600)
    monkeypatch.setattr(kept_lists, "KEPT_FROM", 5)
    describe_data(small)
    assert not keeps.exists()


def test_a_folder_that_others_write_to_keeps_nothing_and_that_is_said(
    tmp_path: Path, keeps: Path, looked_for: list[str]
) -> None:
    root = tree(tmp_path / "data")
    keeps.parent.mkdir()
    keeps.parent.chmod(0o777)
    for _ in range(2):
        with pytest.warns(UserWarning, match="cannot be kept"):
            describe_data(root)
    assert looked_for == ["train", "val"] * 2


def test_headers_are_looked_at_once(
    tmp_path: Path, keeps: Path, looked_for: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "data")
    (root / "train" / "cat" / "0.png").write_bytes(b"no image")
    monkeypatch.setattr(folders, "STATISTICS_SAMPLES", 1)
    for _ in range(2):
        with pytest.raises(DataError, match=r"cat/0\.png.*cannot be read as an image"):
            folders.load_folder(root, image_size=8, in_memory_bytes=0)
    Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "0.png")
    folders.load_folder(root, in_memory_bytes=0)
    monkeypatch.setattr(folders, "check_header", lambda path: pytest.fail("it was looked at again"))
    folders.load_folder(root, in_memory_bytes=0)


def test_a_list_without_links_never_asks_for_real_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_real_paths", lambda files: pytest.fail("a million files would be asked for"))
    assert describe_data(tree(tmp_path)).train_samples == 4
    assert listing.mark(str(tmp_path)) == listing.mark(str(tmp_path))

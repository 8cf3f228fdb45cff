from __future__ import annotations

import gzip
import importlib.util
import inspect
import io
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from helpers import ROOT
from spfde.app.data import datasets as data_module
from spfde.app.data import folders
from spfde.app.data.datasets import DATASETS, describe_data, load_data
from spfde.app.data.images import DataSpec, ImageArray, ImageData, channel_statistics, collate
from spfde.app.data.npz import layout_of
from spfde.core.errors import DataError, InvalidArgument

Arrays = dict[str, Any]


def _arrays(shape: tuple[int, ...] = (8, 8, 3), *, n: int = 12, classes: int = 3, dtype: type = np.uint8) -> Arrays:
    random = np.random.default_rng(0)
    arrays: Arrays = {}
    for split, count in (("train", n), ("test", 6)):
        arrays[f"x_{split}"] = (random.random((count, *shape)) * 255).astype(dtype)
        arrays[f"y_{split}"] = np.arange(count) % classes
    return arrays


def _npz(folder: Path, arrays: Arrays) -> Path:
    path = folder / "set.npz"
    np.savez_compressed(path, **arrays)
    return path


def _load(path: Path | str) -> ImageData:
    return load_data(path, root=Path(path).parent / "unused")


class TestNamedSets:
    def test_cifar100_is_known_without_data_on_disk(self) -> None:
        assert describe_data("cifar100") == DataSpec("cifar100", 100, 3, (32, 32), 50_000, 10_000)

    def test_describing_named_sets_needs_neither_torchvision_nor_pillow_nor_timm(self) -> None:
        script = (
            "import sys; from spfde.app.data import datasets; from spfde.app.train import models; "
            "[datasets.describe_data(n) for n in datasets.DATASETS]; "
            "models.build_model('resnet8', num_classes=2, in_channels=1, image_size=8); "
            "sys.exit(any(m in sys.modules for m in ('torchvision', 'PIL', 'timm')))"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

    def test_photos_may_be_mirrored_and_digits_may_not(self) -> None:
        modes = {name: entry.augmentation for name, entry in DATASETS.items()}
        assert modes["cifar10"] == modes["fashion-mini"] == modes["fashion-mnist"] == modes["stl10"] == "crop+flip"
        assert modes["mnist"] == modes["kmnist"] == modes["svhn"] == modes["usps"] == "crop"

    def test_an_unknown_name_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(InvalidArgument, match=r"data='cifar11'.*Did you mean 'cifar10"):
            describe_data("cifar11")

    def test_a_missing_path_is_not_taken_for_a_misspelt_name(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            describe_data(tmp_path / "nothing")


class TestEmbeddedSet:
    def test_it_is_class_balanced_and_as_described(self, tmp_path: Path) -> None:
        loaded = load_data("fashion-mini", root=tmp_path / "unused")
        assert loaded.spec == describe_data("fashion-mini")
        assert isinstance(loaded.train, ImageArray)
        assert isinstance(loaded.test, ImageArray)
        assert loaded.train.images.shape == (10_000, 1, 28, 28)
        assert loaded.train.images.dtype == torch.uint8
        assert torch.bincount(loaded.train.labels).tolist() == [1000] * 10
        assert torch.bincount(loaded.test.labels).tolist() == [200] * 10
        assert loaded.mean.item() == pytest.approx(0.286, abs=0.002)  # Fashion-MNIST as a whole: 0.2860 and 0.3530
        assert loaded.std.item() == pytest.approx(0.353, abs=0.002)
        assert not (tmp_path / "unused").exists()

    def test_no_test_image_is_a_training_image(self, tmp_path: Path) -> None:
        loaded = load_data("fashion-mini", root=tmp_path)
        seen = {image.numpy().tobytes() for image in loaded.train.images}  # type: ignore[attr-defined]
        assert not any(image.numpy().tobytes() in seen for image in loaded.test.images)  # type: ignore[attr-defined]

    def test_it_is_at_most_six_megabytes_and_has_its_licence_beside_it(self) -> None:
        assets = Path(data_module.__file__).parents[1] / "assets"
        assert (assets / "fashion_mini.npz").stat().st_size <= 6e6
        assert (
            "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in (assets / "fashion_mini.LICENSE").read_text()
        )


def _script() -> ModuleType:
    path = ROOT / "scripts" / "make_fashion_mini.py"
    spec = importlib.util.spec_from_file_location("make_fashion_mini", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _idx(path: Path, array: np.ndarray[Any, Any], *, compressed: bool) -> None:
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compressed else content)


def _idx_folder(folder: Path, *, train: int = 60, test: int = 20, compressed: bool = True) -> Arrays:
    folder.mkdir(parents=True)
    made: Arrays = {}
    random = np.random.default_rng(1)
    for prefix, count in (("train", train), ("t10k", test)):
        made[f"{prefix}_x"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        made[f"{prefix}_y"] = random.permutation(np.arange(count) % 10).astype(np.uint8)
        ending = ".gz" if compressed else ""
        _idx(folder / f"{prefix}-images-idx3-ubyte{ending}", made[f"{prefix}_x"], compressed=compressed)
        _idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", made[f"{prefix}_y"], compressed=compressed)
    return made


class TestScript:
    def test_it_samples_both_files_in_balance_and_keeps_images_with_their_labels(self, tmp_path: Path) -> None:
        made = _idx_folder(tmp_path / "idx")
        _script().make(tmp_path / "idx", tmp_path / "out.npz", train_per_class=4, test_per_class=1)
        out = np.load(tmp_path / "out.npz")
        for split, prefix, per_class in (("train", "train", 4), ("test", "t10k", 1)):
            assert np.bincount(out[f"y_{split}"]).tolist() == [per_class] * 10
            label = {x.tobytes(): y for x, y in zip(made[f"{prefix}_x"], made[f"{prefix}_y"], strict=True)}
            pairs = zip(out[f"x_{split}"], out[f"y_{split}"], strict=True)
            assert all(label[x.tobytes()] == y for x, y in pairs)

    def test_it_writes_the_same_bytes_every_time(self, tmp_path: Path) -> None:
        _idx_folder(tmp_path / "idx")
        for name in ("a.npz", "b.npz"):
            _script().make(tmp_path / "idx", tmp_path / name, train_per_class=4, test_per_class=1)
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


class TestTorchvisionSets:
    @pytest.fixture(autouse=True)
    def _needs_torchvision(self) -> None:
        pytest.importorskip("torchvision")

    def _small_mnist(self, monkeypatch: pytest.MonkeyPatch, *, train: int = 60) -> None:
        entry = DATASETS["mnist"]
        small = replace(entry, spec=replace(entry.spec, train_samples=train, test_samples=20))
        monkeypatch.setattr(data_module, "DATASETS", {**DATASETS, "mnist": small})

    def test_files_that_are_there_are_read_without_the_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = _idx_folder(tmp_path / "MNIST" / "raw", compressed=False)
        self._small_mnist(monkeypatch)
        loaded = load_data("mnist", root=tmp_path)
        assert loaded.default_augmentation == "crop"
        assert np.array_equal(loaded.train.images[:, 0].numpy(), made["train_x"])  # type: ignore[attr-defined]
        assert loaded.test.labels.tolist() == made["t10k_y"].tolist()  # type: ignore[attr-defined]

    def test_a_set_of_the_wrong_length_is_refused(self, tmp_path: Path) -> None:
        _idx_folder(tmp_path / "MNIST" / "raw", compressed=False)
        with pytest.raises(DataError, match=r"data='mnist': .*train_samples=60"):
            load_data("mnist", root=tmp_path)

    def test_a_failed_download_says_where_to_put_which_files_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision import datasets

        def offline(self: Any) -> None:
            Path(self.raw_folder).mkdir(parents=True)
            raise OSError("no network")

        monkeypatch.setattr(datasets.MNIST, "download", offline)
        root = tmp_path / "deep" / "data"
        with pytest.raises(DataError, match="no network") as caught:
            load_data("mnist", root=root)
        assert str(root) in str(caught.value)
        assert "MNIST/raw/ (unpacked): train-images-idx3-ubyte," in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.loader])
    def test_every_set_is_asked_of_torchvision_in_a_way_that_it_understands(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision import datasets

        entry = replace(DATASETS[name], spec=replace(DATASETS[name].spec, train_samples=5, test_samples=3))
        monkeypatch.setattr(data_module, "DATASETS", {name: entry})
        c, h, w = entry.spec.sample_shape
        shape = {"CIFAR10": (h, w, c), "CIFAR100": (h, w, c)}.get(str(entry.loader), (c, h, w) if c == 3 else (h, w))
        asked: list[str] = []

        def stand_in(self: Any, root: str, *, download: bool, **part: Any) -> None:
            asked.extend(part)
            count = 5 if part[asked[-1]] in (True, "train") else 3
            self.data = np.zeros((count, *shape), dtype=np.uint8)
            self.targets = [entry.spec.num_classes - 1] * count

        cls = getattr(datasets, str(entry.loader))
        monkeypatch.setattr(cls, "__init__", wraps(cls.__init__)(stand_in))
        assert load_data(name, root=tmp_path).spec == entry.spec
        assert len(asked) == 2
        assert {"root", "download", *asked} <= set(inspect.signature(cls).parameters)

    def test_labels_out_of_range_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = tmp_path / "MNIST" / "raw"
        _idx_folder(raw, compressed=False)
        _idx(raw / "train-labels-idx1-ubyte", np.full(60, 10), compressed=False)
        self._small_mnist(monkeypatch)
        with pytest.raises(DataError, match="num_classes=11"):
            load_data("mnist", root=tmp_path)


class TestNpz:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [((8, 6), (1, 8, 6)), ((8, 6, 3), (3, 8, 6)), ((3, 8, 6), (3, 8, 6)), ((8, 6, 1), (1, 8, 6))],
    )
    def test_every_layout_becomes_nchw(
        self, shape: tuple[int, ...], expected: tuple[int, int, int], tmp_path: Path
    ) -> None:
        arrays = _arrays(shape)
        path = _npz(tmp_path, arrays)
        loaded = _load(path)
        assert loaded.spec.sample_shape == expected
        assert loaded.spec == describe_data(path)
        image = arrays["x_train"][5]
        whole = image[None] if len(shape) == 2 else image.transpose(2, 0, 1) if shape[0] == 8 else image
        assert np.array_equal(loaded.train[5][0].numpy(), whole)
        assert loaded.train[5][1] == arrays["y_train"][5]
        assert loaded.default_augmentation == "crop"
        assert loaded.in_memory

    @settings(max_examples=60, deadline=None)
    @given(shape=st.tuples(*[st.integers(1, 9)] * 4))
    def test_the_channels_are_the_one_outer_axis_with_at_most_four_entries(self, shape: tuple[int, ...]) -> None:
        expected = {(True, False): "NCHW", (False, True): "NHWC"}.get((shape[1] <= 4, shape[3] <= 4))
        assert layout_of(shape) == expected

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_floats_keep_their_range_and_become_float32(self, dtype: type, tmp_path: Path) -> None:
        arrays = _arrays(dtype=dtype)
        arrays["x_train"] = arrays["x_train"] * 2 - 30
        loaded = _load(_npz(tmp_path, arrays))
        image = loaded.train[3][0]
        assert image.dtype == torch.float32
        np.testing.assert_allclose(image.numpy(), arrays["x_train"][3].transpose(2, 0, 1), rtol=1e-6)
        np.testing.assert_allclose(loaded.mean, arrays["x_train"].astype(np.float64).mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(loaded.std, arrays["x_train"].astype(np.float64).std((0, 1, 2)), rtol=1e-5)

    def test_uint8_statistics_are_shares_of_255(self, tmp_path: Path) -> None:
        arrays = _arrays()
        loaded = _load(_npz(tmp_path, arrays))
        np.testing.assert_allclose(loaded.mean, (arrays["x_train"] / 255).mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(loaded.std, (arrays["x_train"] / 255).std((0, 1, 2)), rtol=1e-5)

    def test_column_labels_and_small_integer_types_are_taken(self, tmp_path: Path) -> None:
        arrays = _arrays()
        arrays["y_train"] = arrays["y_train"].astype(np.uint8)[:, None]
        assert _load(_npz(tmp_path, arrays)).train.labels.tolist() == [0, 1, 2] * 4  # type: ignore[attr-defined]

    def test_describing_reads_no_image(self, tmp_path: Path) -> None:
        arrays = _arrays(dtype=np.float32)
        arrays["x_train"][0] = np.nan
        assert describe_data(_npz(tmp_path, arrays)).num_classes == 3

    BAD: tuple[tuple[str, Callable[[Arrays], Any], str], ...] = (
        ("missing key", lambda a: a.pop("y_test"), "has no y_test"),
        ("fewer labels", lambda a: a.update(y_train=a["y_train"][:-1]), "12 images and y_train 11 labels"),
        ("negative label", lambda a: a["y_test"].__setitem__(2, -1), r"y_test\[2\] is -1"),
        ("unseen test label", lambda a: a["y_test"].__setitem__(2, 3), r"y_test\[2\] is 3, out of range"),
        ("huge label", lambda a: a["y_train"].__setitem__(1, 5000), r"y_train\[1\] is 5000.* of 5001 classes"),
        ("stray label", lambda a: a["y_train"].__setitem__(1, 255), r"y_train\[1\] is 255.*252 of 256 classes"),
        (
            "labels with gaps",
            lambda a: a.update(y_train=a["y_train"] * 3, y_test=a["y_test"] * 3),
            r"4 of 7 classes have no training image \(1, 2, 4, 5\)",
        ),
        ("float labels", lambda a: a.update(y_train=a["y_train"] * 1.0), "labels are integers"),
        ("one-hot labels", lambda a: a.update(y_train=np.eye(3, dtype=int)[a["y_train"]]), "argmax"),
        ("scalar labels", lambda a: a.update(y_train=np.array(3)), r"y_train has shape \(\)"),
        ("one class", lambda a: a.update(y_train=a["y_train"] * 0), "2 classes at least"),
        ("flat images", lambda a: a.update(x_train=a["x_train"].reshape(12, -1)), "3 or 4 axes"),
        ("integer images", lambda a: a.update(x_train=a["x_train"].astype(int)), "must be uint8 or floating"),
        ("unlike images", lambda a: a.update(x_test=a["x_test"][:, :7]), "alike in both"),
        ("unlike types", lambda a: a.update(x_test=a["x_test"] / 255), "alike in both"),
        ("no images", lambda a: a.update(x_test=a["x_test"][:0], y_test=a["y_test"][:0]), "x_test is empty"),
        (
            "ambiguous",
            lambda a: a.update({k: a[k][:, :3, :, :] for k in ("x_train", "x_test")}),
            "channels could be axis 1 or axis 3",
        ),
        (
            "no channels",
            lambda a: a.update({k: np.repeat(a[k], 3, 3) for k in ("x_train", "x_test")}),
            "channels could be axis 1 or axis 3",
        ),
        ("objects", lambda a: a.update(y_train=a["y_train"].astype(object)), "labels are integers"),
    )

    @pytest.mark.parametrize(("change", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
    def test_a_bad_archive_is_refused_before_any_work(
        self, change: Callable[[Arrays], Any], words: str, tmp_path: Path
    ) -> None:
        arrays = _arrays()
        change(arrays)
        path = _npz(tmp_path, arrays)
        for action in (describe_data, _load):
            with pytest.raises(DataError, match=words) as caught:
                action(path)
            assert str(caught.value).startswith(f"data='{path}'")

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
    def test_a_value_that_cannot_be_trained_on_is_refused_with_its_place(self, value: float, tmp_path: Path) -> None:
        arrays = _arrays(dtype=np.float64)
        arrays["x_train"][7, 0, 0, 0] = value
        with pytest.raises(DataError, match=r"x_train\[7\] holds a NaN"):
            _load(_npz(tmp_path, arrays))

    def test_a_class_without_training_images_is_pointed_out(self, tmp_path: Path) -> None:
        arrays = _arrays()
        path = _npz(tmp_path, {**arrays, "y_train": arrays["y_train"] + 1, "y_test": arrays["y_test"] + 1})
        with pytest.warns(UserWarning, match=r"1 of 4 classes have no training image \(0\)"):
            assert describe_data(path).num_classes == 4

    def test_a_truncated_archive_is_refused(self, tmp_path: Path) -> None:
        path = _npz(tmp_path, _arrays())
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"no readable \.npz"):
            describe_data(path)

    def test_a_flipped_bit_in_the_images_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "set.npz"
        np.savez(path, **_arrays())
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            offset = archive.getinfo("x_train.npy").header_offset
        content[offset + 400] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no readable \.npz"):
            _load(path)

    def test_a_flipped_bit_in_a_header_is_refused_or_changes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "set.npz"
        np.savez(path, **_arrays())
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo("x_train.npy").header_offset
            expected = archive.read("x_train.npy")
        for at in range(start, start + 200):
            content = bytearray(whole)
            content[at] ^= 1 << at % 8
            path.write_bytes(content)
            try:
                _load(path)
            except DataError:
                continue
            with zipfile.ZipFile(path) as archive:
                assert archive.read("x_train.npy") == expected

    @pytest.mark.parametrize("shape", ["(2**60,)", "(-4, 8, 8)", "(12, 8, 8, 10**30)", "('a',)"])
    @pytest.mark.parametrize("key", ["x_train", "y_train"])
    def test_a_shape_that_the_archive_cannot_hold_is_refused_before_there_is_memory_for_it(
        self, key: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "set.npz"
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"shape": eval(shape), "fortran_order": False, "descr": "|u1" if key == "x_train" else "<i8"}
        )
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in _arrays().items():
                content = io.BytesIO()
                np.save(content, array)
                archive.writestr(f"{name}.npy", header.getvalue() if name == key else content.getvalue())
        monkeypatch.setattr(np, "ndarray", lambda *_, **__: pytest.fail("memory was asked for"))
        with pytest.raises(DataError):
            describe_data(path)

    def test_a_queue_is_refused_and_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "set.npz")
        with pytest.raises(DataError, match="queue"):
            describe_data(tmp_path / "set.npz")

    @pytest.mark.parametrize("content", [b"", b"not a zip at all"])
    def test_a_file_that_is_no_archive_is_refused(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "set.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no readable \.npz"):
            _load(path)

    def test_a_missing_archive_and_a_folder_of_that_name_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            describe_data(tmp_path / "no.npz")
        (tmp_path / "dir.npz").mkdir()
        with pytest.raises(DataError, match="cannot be read"):
            describe_data(tmp_path / "dir.npz")


def _pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _folder(root: Path, *, test: str = "test", height: int = 8, width: int = 8) -> Path:
    image_module = pytest.importorskip("PIL.Image")
    for split, count in (("train", 3), (test, 2)):
        for label, name in enumerate(("ape", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = _pixels(100 * label + i, height, width)
                image_module.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


class TestFolders:
    @pytest.mark.parametrize("test", ["test", "val"])
    def test_a_folder_is_read_in_the_order_of_class_and_file_names(self, test: str, tmp_path: Path) -> None:
        path = _folder(tmp_path / "set", test=test)
        assert describe_data(path) == DataSpec(str(path), 2, 3, (8, 8), 6, 4)
        loaded = _load(path)
        assert loaded.in_memory
        assert loaded.default_augmentation == "crop+flip"
        assert [loaded.train[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(loaded.train[4][0].numpy(), _pixels(101).transpose(2, 0, 1))

    def test_a_streamed_folder_gives_the_same_samples_and_statistics_as_one_in_memory(self, tmp_path: Path) -> None:
        path = _folder(tmp_path / "set", height=80, width=100)
        kept, streamed = _load(path), folders.load_folder(path, in_memory_bytes=0)
        assert (kept.in_memory, streamed.in_memory) == (True, False)
        loader = DataLoader(streamed.train, batch_size=4, collate_fn=collate, num_workers=1)
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert images.shape == (6, 3, 80, 80)
        assert torch.equal(images, kept.train.images)  # type: ignore[attr-defined]
        assert torch.equal(labels, kept.train.labels)  # type: ignore[attr-defined]
        assert torch.equal(kept.mean, streamed.mean)
        assert torch.equal(kept.std, streamed.std)

    @pytest.mark.parametrize(
        ("height", "width", "expected"), [(40, 60, (40, 60)), (80, 100, (80, 80)), (300, 400, (224, 224))]
    )
    def test_the_first_image_decides_the_size(
        self, height: int, width: int, expected: tuple[int, int], tmp_path: Path
    ) -> None:
        assert describe_data(_folder(tmp_path / "set", height=height, width=width)).image_size == expected

    def test_other_files_and_hidden_ones_are_passed_over(self, tmp_path: Path) -> None:
        path = _folder(tmp_path / "set")
        (path / "train" / "ape" / "notes.txt").write_text("x")
        (path / "train" / "ape" / "._0.png").write_text("x")
        (path / "train" / ".cache").mkdir()
        assert describe_data(path).train_samples == 6

    @pytest.mark.parametrize("streamed", [False, True])
    def test_an_unreadable_image_is_named(self, streamed: bool, tmp_path: Path) -> None:
        path = _folder(tmp_path / "set")
        bad = path / "train" / "bee" / "1.png"
        bad.write_bytes(bad.read_bytes()[:60])
        with pytest.raises(DataError, match=f"{bad}.*cannot be read as an image"):
            folders.load_folder(path, in_memory_bytes=0 if streamed else 2**20)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_a_file_that_is_no_image_is_found_before_training_in_a_streamed_set_too(
        self, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(folders, "STATISTICS_SAMPLES", 2)
        path = _folder(tmp_path / "set")
        bad = path / part / "bee" / "0.png"
        bad.write_bytes(b"")
        with pytest.raises(DataError, match=f"{bad}.*cannot be read as an image"):
            folders.load_folder(path, in_memory_bytes=0)

    def test_an_unreadable_image_is_named_by_a_loaders_worker_too(self, tmp_path: Path) -> None:
        path = _folder(tmp_path / "set")
        streamed = folders.load_folder(path, in_memory_bytes=0)
        bad = path / "test" / "bee" / "1.png"
        bad.write_bytes(b"")
        batches = iter(DataLoader(streamed.test, batch_size=2, num_workers=1, collate_fn=collate))
        with pytest.raises(DataError, match=str(bad)):
            list(batches)
        # Left to the garbage collector, an iterator that raised waits 5 seconds for its worker.
        batches._shutdown_workers()  # type: ignore[attr-defined]

    def test_class_folders_that_do_not_agree_are_named(self, tmp_path: Path) -> None:
        path = _folder(tmp_path / "set")
        (path / "test" / "bee").rename(path / "test" / "bees")
        with pytest.raises(DataError, match=r"only in train: bee; only in test: bees"):
            describe_data(path)

    def test_an_empty_class_folder_is_named(self, tmp_path: Path) -> None:
        path = _folder(tmp_path / "set")
        (path / "train" / "cow").mkdir()
        with pytest.raises(DataError, match="cow"):
            describe_data(path)

    def test_a_folder_without_the_two_parts_is_refused_with_the_layout(self, tmp_path: Path) -> None:
        (tmp_path / "ape").mkdir()
        with pytest.raises(DataError, match=r"it has ape.*DIR/train/CLASS/IMAGE"):
            describe_data(tmp_path)

    def test_parts_without_class_folders_are_refused(self, tmp_path: Path) -> None:
        for name in ("train", "test"):
            (tmp_path / name).mkdir()
        with pytest.raises(DataError, match="class folder"):
            describe_data(tmp_path)

    def test_a_file_that_is_no_data_set_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "set.zip").write_bytes(b"")
        with pytest.raises(DataError, match=r"neither an \.npz nor a folder"):
            describe_data(tmp_path / "set.zip")


def _image_array(n: int = 10) -> ImageArray:
    images = torch.arange(n * 12, dtype=torch.uint8).view(n, 3, 2, 2)
    return ImageArray(images, torch.arange(n))


class TestImageArray:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_loader_gets_batches_equal_to_its_stacked_samples(self, workers: int) -> None:
        array = _image_array()
        loader = DataLoader(array, batch_size=4, collate_fn=collate, num_workers=workers)
        for start, (images, labels) in zip((0, 4, 8), loader, strict=True):
            samples = [array[i] for i in range(start, min(start + 4, 10))]
            assert torch.equal(images, torch.stack([image for image, _ in samples]))
            assert labels.tolist() == [label for _, label in samples]
            assert labels.dtype == torch.int64

    def test_a_loader_fetches_a_batch_with_one_call(self) -> None:
        calls: list[int] = []

        class Counted(ImageArray):
            def __getitem__(self, index: int) -> Any:
                raise AssertionError("one sample at a time")

            def __getitems__(self, indices: Any) -> Any:
                calls.append(len(indices))
                return super().__getitems__(indices)

        array = _image_array()
        list(DataLoader(Counted(array.images, array.labels), batch_size=4, collate_fn=collate))
        assert calls == [4, 4, 2]

    def test_a_subset_of_it_is_fetched_in_batches_too(self) -> None:
        images, labels = next(iter(DataLoader(Subset(_image_array(), [7, 2]), batch_size=2, collate_fn=collate)))
        assert labels.tolist() == [7, 2]
        assert torch.equal(images[1], _image_array()[2][0])

    def test_a_list_of_samples_is_collated_to_the_same_batch(self) -> None:
        array = _image_array()
        stacked, whole = collate([array[3], array[1]]), collate(array.__getitems__([3, 1]))
        assert all(torch.equal(a, b) for a, b in zip(stacked, whole, strict=True))


def test_a_constant_channel_has_a_standard_deviation_of_one() -> None:
    images = torch.randint(0, 255, (5, 2, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 1] = 7
    for batch in (images, images.float() / 3):
        std = channel_statistics(batch)[1]
        assert std[1] == 1
        assert std[0] != 1


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 5), channels=st.integers(1, 3), seed=st.integers(0, 99), byte=st.booleans())
def test_channel_statistics_equal_the_plain_ones(n: int, channels: int, seed: int, byte: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, 3, 4), generator=generator).to(torch.uint8)
    batch = images if byte else images.float()
    plain = images.double() / (255 if byte else 1)
    mean, std = channel_statistics(batch)
    torch.testing.assert_close(mean.double(), plain.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double(), plain.var((0, 2, 3), correction=0).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "padding"), [((28, 28), 4), ((32, 32), 4), ((96, 96), 12), ((224, 300), 28)])
def test_padding_is_four_for_small_images_and_grows_with_large_ones(size: tuple[int, int], padding: int) -> None:
    data = load_data("fashion-mini", root="unused")
    assert replace(data, spec=replace(data.spec, image_size=size)).padding == padding

"""Where images lie changes nothing about them: order, crops and flips are equal, and follow from seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.stopping import Stopping
from spfde import presets
from spfde.app.data.images import DataSpec, ImageArray, ImageData
from spfde.app.train.augment import AugmentMode, BatchAugment
from spfde.app.train.feed import DeviceFeed, Feed, HostFeed, make_feed, size_of
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument
from spfde.core.numbers import mix
from spfde.sieving import DataSieving

CPU = torch.device("cpu")


class Seeds:
    """What a feed asks of a session: seeds by (epoch, id)."""

    def __init__(self, *, caches_prefix: bool = False) -> None:
        self.caches_prefix, self.epoch = caches_prefix, 0
        self.handed: Tensor | None = None
        self.asked: list[Tensor | None] = []

    def augmentation_seeds(self, indices: Tensor | None = None) -> Tensor:
        self.asked.append(indices)
        ids = self.handed if indices is None else indices
        assert ids is not None
        return mix(ids, 7, self.epoch, 0)


def data_of(n: int = 10, channels: int = 1, height: int = 4, width: int = 4, *, floats: bool = False) -> ImageData:
    """Images whose pixels are all different, as far as bytes go."""
    pixels = torch.arange(n * channels * height * width).view(n, channels, height, width) % 251 + 1
    images = pixels.float() / 7 if floats else pixels.to(torch.uint8)
    spec = DataSpec("made", 2, channels, (height, width), n, 3)
    labels = torch.arange(n) % 2
    test = ImageArray(images[:3].clone(), labels[:3].clone())
    return ImageData(spec, ImageArray(images, labels), test, torch.zeros(channels), torch.ones(channels), "crop+flip")


def feeds(data: ImageData, mode: AugmentMode, *, by_sample: bool, batch_size: int = 3) -> tuple[Feed, Feed]:
    options = TrainOptions(batch_size=batch_size, seed=5)
    augments = [BatchAugment(mode, torch.Generator().manual_seed(1), padding=2) for _ in range(2)]
    return (
        HostFeed(data, CPU, augments[0], options, by_sample=by_sample),
        DeviceFeed(data, CPU, augments[1], options, by_sample=by_sample),
    )


def epochs(host: Feed, device: Feed, seeds: Seeds, n: int = 2) -> Iterator[tuple[Any, Any]]:
    """Batches of both side by side; what the device's loader hands out are the ids of both."""
    for seeds.epoch in range(n):
        for on_host, ids in zip(host.loader, device.loader, strict=True):
            seeds.handed = ids
            yield host.batch(on_host, seeds), device.batch(ids, seeds)  # type: ignore[arg-type]


def test_an_image_is_cropped_and_flipped_as_seed_epoch_and_id_say() -> None:
    data = data_of(n=6, height=1, width=2)
    _, device = feeds(data, "crop+flip", by_sample=True)
    seeds = Seeds()
    seeds.epoch = 4
    images, labels = device.batch(torch.tensor([5, 2]), seeds)  # type: ignore[arg-type]
    assert labels.tolist() == [1, 0]
    for image, sample in zip(images, (5, 2), strict=True):
        seed = mix(torch.tensor([sample]), 7, 4, 0)
        top, left, flip = (int(mix(seed, k)) % span for k, span in ((1, 5), (2, 5), (3, 2)))
        row = [0, 0, 2 * sample + 1, 2 * sample + 2, 0, 0][left : left + 2]
        row = row[::-1] if flip else row
        assert image[0, 0].tolist() == (row if top == 2 else [0, 0])


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    channels=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    mode=st.sampled_from(["none", "crop", "crop+flip", "random-resized-crop"]),
    by_sample=st.booleans(),
    floats=st.booleans(),
)
def test_device_and_host_give_the_same_batches(
    n: int, channels: int, height: int, width: int, mode: AugmentMode, by_sample: bool, floats: bool
) -> None:
    data = data_of(n, channels, height, width, floats=floats)
    for (x, y), (x_device, y_device) in epochs(*feeds(data, mode, by_sample=by_sample), Seeds()):
        assert x.dtype == x_device.dtype
        assert torch.equal(x, x_device)
        assert torch.equal(y, y_device)


def test_of_a_sample_s_many_epochs_no_two_are_alike() -> None:
    _, device = feeds(data_of(height=8, width=8), "crop+flip", by_sample=True)
    seeds, seen = Seeds(), []
    for seeds.epoch in range(4):
        images, _ = device.batch(torch.tensor([3]), seeds)  # type: ignore[arg-type]
        seen.append(tuple(images.flatten().tolist()))
    assert len(set(seen)) == 4


def test_an_epoch_s_seeds_are_asked_for_once_and_for_all_samples() -> None:
    data = data_of()
    _, device = feeds(data, "crop", by_sample=True)
    seeds = Seeds()
    for seeds.epoch in range(2):
        for ids in device.loader:
            device.batch(ids, seeds)  # type: ignore[arg-type]
    assert [asked.tolist() for asked in seeds.asked if asked is not None] == [list(range(10))] * 2


def test_with_a_prefix_cache_each_batch_asks_which_variant_it_is() -> None:
    host, device = feeds(data_of(), "crop", by_sample=False)
    seeds = Seeds(caches_prefix=True)
    for (x, _), (x_device, _) in epochs(host, device, seeds, n=1):
        assert torch.equal(x, x_device)
    assert seeds.asked == [None] * 8, "four batches, twice"


def test_without_augmentation_no_seeds_are_asked_for_and_images_come_as_they_are() -> None:
    data = data_of()
    _, device = feeds(data, "none", by_sample=True)
    seeds = Seeds()
    images, _ = device.batch(torch.tensor([7]), seeds)  # type: ignore[arg-type]
    assert isinstance(data.train, ImageArray)
    assert torch.equal(images[0], data.train.images[7])
    assert seeds.asked == []


def test_the_test_set_comes_whole_and_in_order() -> None:
    data = data_of()
    for feed in feeds(data, "crop", by_sample=True):
        images, labels = (torch.cat(part) for part in zip(*feed.evaluation_batches("test"), strict=True))
        assert isinstance(data.test, ImageArray)
        assert torch.equal(images, data.test.images)
        assert torch.equal(labels, data.test.labels)


class TestMakeFeed:
    augment = BatchAugment("none", torch.Generator())

    def make(self, options: TrainOptions, device: torch.device = CPU, *, in_memory: bool = True) -> Feed:
        return make_feed(replace(data_of(), in_memory=in_memory), device, self.augment, options)

    def test_on_a_cpu_images_come_from_a_loader_unless_the_device_is_asked_for(self) -> None:
        assert isinstance(self.make(TrainOptions()), HostFeed)
        assert isinstance(self.make(TrainOptions(data_on="host")), HostFeed)
        asked = self.make(TrainOptions(data_on="device"))
        assert isinstance(asked, DeviceFeed)
        assert asked.where is not None
        assert "312 B of images and labels in the memory of cpu" in asked.where  # 13 x (16 + 8)

    def test_images_that_are_not_in_memory_cannot_lie_on_the_device(self) -> None:
        with pytest.raises(InvalidArgument, match=r"data_on='device': .*--data-on host"):
            self.make(TrainOptions(data_on="device"), in_memory=False)

    @pytest.mark.parametrize(("free", "fits"), [(624, True), (623, False)])
    def test_images_take_half_of_the_free_memory_of_a_gpu_at_most(
        self, free: int, fits: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
        made: list[str] = []
        for kind in (DeviceFeed, HostFeed):
            monkeypatch.setattr(kind, "__init__", lambda self, *_, **__: made.append(type(self).__name__))
        data, gpu = data_of(), torch.device("cuda", 0)
        assert size_of(data) == 312
        feed = make_feed(data, gpu, self.augment, TrainOptions())
        assert made == [DeviceFeed.__name__ if fits else HostFeed.__name__]
        assert feed.where is not None
        assert ("312 B are more than half of the 623 B that are free" in feed.where) is not fits
        if not fits:
            with pytest.raises(InvalidArgument, match="312 B are more than half of the 623 B"):
                make_feed(data, gpu, self.augment, TrainOptions(data_on="device"))

    def test_images_that_another_run_reads_there_are_the_same_and_take_no_more_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, gpu, meta = data_of(), torch.device("cuda", 0), torch.device("meta")
        assert isinstance(data.train, ImageArray)
        assert not data.train.is_on(meta)
        images, labels = data.train.on(meta)
        assert (images.shape, labels.shape) == ((10, 1, 4, 4), (10,))
        assert data.train.is_on(meta)
        assert [mine is again for mine, again in zip((images, labels), data.train.on(meta), strict=True)] == [True] * 2
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**6))
        monkeypatch.setattr(DeviceFeed, "__init__", lambda self, *_, **__: None)
        monkeypatch.setattr(ImageArray, "is_on", lambda self, device: device == gpu and len(self) == 10)
        with pytest.raises(InvalidArgument):  # the test images are not there
            make_feed(data, gpu, self.augment, TrainOptions(data_on="device"))
        monkeypatch.setattr(ImageArray, "is_on", lambda self, device: device == gpu)
        assert isinstance(make_feed(data, gpu, self.augment, TrainOptions(data_on="device")), DeviceFeed)


class TestWholeRuns:
    """By the trainer itself: a run whose images lie on the device is the same run, whatever a recipe asks of them."""

    def options(self, data: Path, recipe: Any, **changes: Any) -> TrainOptions:
        given = {"recipe": recipe.to_dict(), "epochs": 3, "batch_size": 16, "dense_timing_steps": 0, "engine": "masked"}
        return TrainOptions(data=str(data), **(given | changes))

    def weights(self, folder: Path) -> bytes:
        return (folder / "checkpoints" / "latest" / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("recipe", ["snip", "balanced"])
    @pytest.mark.parametrize("draws", ["batch", "sample"])
    def test_it_ends_with_the_same_weights(self, recipe: str, draws: str, tiny: Path, tmp_path: Path) -> None:
        balanced = DataSieving(removed_fraction=0.25, criterion="loss", balanced=True, rescale_loss=True)
        made = presets.snip if recipe == "snip" else presets.mest.replace(sieving=balanced, update_interval_epochs=1)
        for place in ("host", "device"):
            train(self.options(tiny, made, augment_draws=draws, data_on=place), tmp_path / place)
        assert self.weights(tmp_path / "host") == self.weights(tmp_path / "device")

    @pytest.mark.long
    def test_a_run_that_goes_on_elsewhere_sees_the_same_images(self, tiny: Path, tmp_path: Path) -> None:
        options = self.options(tiny, presets.mest, data_on="device")
        train(options, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            train(options, tmp_path / "moved", Stopping())
        elsewhere = options.model_copy(update={"data_on": "host", "workers": 1})
        train(elsewhere, tmp_path / "moved", resume=True)
        assert self.weights(tmp_path / "moved") == self.weights(tmp_path / "whole")
        by_batch = self.options(tiny, presets.mest)
        train(by_batch, tmp_path / "by batch")
        assert self.weights(tmp_path / "by batch") != self.weights(tmp_path / "whole")

    @pytest.mark.parametrize("ends", [False, True], ids=["stopped", "finished"])
    def test_the_processes_that_load_end_with_it(self, ends: bool, tiny: Path, tmp_path: Path) -> None:
        """Those that are left to the collection of garbage are waited for 5 s each, by whatever is going on then."""
        options = self.options(tiny, presets.dense, epochs=1, workers=1)
        with nullcontext() if ends else pytest.raises(KeyboardInterrupt):
            train(options, tmp_path / "run", None if ends else Stopping())
        assert not active_children()

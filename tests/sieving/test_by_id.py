"""Data sets in shards: samples by their ids, an order from shard to shard, and shards on disk, sieved."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import spfde
from helpers.training import SmallNet
from spfde.core.errors import InvalidArgument
from spfde.sieving import ById, ShardSampler

SHARDS, IN_SHARD = 6, 8
SAMPLES = SHARDS * IN_SHARD


def sample(number: int) -> tuple[np.ndarray[Any, Any], int]:
    pixels = np.random.default_rng(number).random((2, 8, 8), dtype=np.float32)
    pixels[number % 2, 0, 0] += number % 4
    return pixels, number % 4


class Streaming(IterableDataset[Any]):
    """Samples that PyTorch would iterate, though each can be asked for."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it is iterated")

    def __getitem__(self, index: int) -> Any:
        pixels, label = sample(index)
        return {"x": torch.from_numpy(pixels), "y": label}


def in_tar_files(folder: Path) -> Dataset[Any]:
    wids = pytest.importorskip("wids", reason="WebDataset before version 1")
    shards = []
    for number in range(SHARDS):
        path = folder / f"{number}.tar"
        with tarfile.open(path, "w") as shard:
            for each in range(number * IN_SHARD, (number + 1) * IN_SHARD):
                pixels, label = sample(each)
                arrays = io.BytesIO()
                np.save(arrays, pixels)
                for suffix, content in (("npy", arrays.getvalue()), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{each:06}.{suffix}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
        shards.append({"url": str(path), "nsamples": IN_SHARD})
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    (folder / "index.json").write_text(json.dumps(index))

    def taken(found: dict[str, Any]) -> dict[str, Any]:
        pixels = np.load(io.BytesIO(found[".npy"].read()), allow_pickle=False)
        return {"x": torch.from_numpy(pixels), "y": int(found[".cls"].read())}

    made: Dataset[Any] = wids.ShardListDataset(
        str(folder / "index.json"), cache_dir=str(folder / "cache"), keep=True, transformations=taken
    )
    return made


def in_mds_files(folder: Path) -> Dataset[Any]:
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming")
    columns = {"x": "ndarray:float32:2,8,8", "y": "int"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=IN_SHARD * 600) as shards:
        for number in range(SAMPLES):
            pixels, label = sample(number)
            shards.write({"x": pixels, "y": label})
    return ById(streaming.StreamingDataset(local=str(folder), batch_size=8))


def as_iterated(folder: Path) -> Dataset[Any]:
    return ById(Streaming())


def batch_of(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([torch.as_tensor(each["x"]) for each in samples]), torch.tensor([each["y"] for each in samples])


@pytest.mark.parametrize(("made", "workers"), [(as_iterated, 0), (in_tar_files, 1), (in_mds_files, 1)])
def test_shards_on_disk_are_sieved_and_resumed(
    made: Callable[[Path], Dataset[Any]], workers: int, tmp_path: Path
) -> None:
    """The loop of the documentation: an epoch sees its partial set and no other sample, a resumed run the same."""
    dataset = made(tmp_path)

    def run(stop: int, state: Any = None) -> tuple[list[list[int]], Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = SmallNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        order = ShardSampler([IN_SHARD] * SHARDS, window=2, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(
            dataset,
            batch_size=4,
            sampler=order,
            collate_fn=batch_of,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        recipe = spfde.Recipe(
            sieving=spfde.DataSieving(removed_fraction=0.25, criterion="loss"), update_interval_epochs=1
        )
        session = spfde.attach(model, optimizer, loader, recipe, epochs=4, seed=0)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            session.load_state_dict(state["session"])
        seen = []
        for epoch in session.epochs():
            ids: list[int] = []
            for x, y in session.loader:
                assert session.loader.current_indices is not None
                ids += session.loader.current_indices.tolist()
                logits = model(x)
                loss = F.cross_entropy(logits, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                session.observe(logits, y)
            seen.append(ids)
            if epoch == stop:
                break
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
        return seen, parts, model.state_dict()

    whole, _, weights = run(stop=3)
    assert [len(ids) for ids in whole] == [36] * 4
    assert all(len(set(ids)) == 36 for ids in whole)
    assert len({frozenset(ids) for ids in whole}) > 1
    first, state, _ = run(stop=1)
    second, _, resumed = run(stop=3, state=state)
    assert first + second == whole
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


# --- samples by their ids ---------------------------------------------------------------------------------------------


def test_a_set_that_would_be_iterated_is_refused_with_what_helps() -> None:
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = spfde.Recipe(sieving=spfde.DataSieving())
    with pytest.raises(InvalidArgument, match=r"iterable-style.*spfde\.sieving\.ById\(dataset\)"):
        spfde.attach(model, optimizer, DataLoader(Streaming(), batch_size=4), recipe, epochs=2)


def test_what_gives_no_samples_by_id_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    for source in (Stream(), iter([1])):
        with pytest.raises(InvalidArgument, match="no __len__ or no __getitem__"):
            ById(source)


# --- an order from shard to shard -------------------------------------------------------------------------------------


def test_an_epoch_has_every_sample_once_and_stays_within_a_window_of_shards() -> None:
    for seed in range(5):
        order = list(ShardSampler([3, 1, 2, 4], window=2, generator=torch.Generator().manual_seed(seed)))
        assert sorted(order) == list(range(10))
        shards = [[0, 0, 0, 1, 2, 2, 3, 3, 3, 3][each] for each in order]
        cuts = [cut for cut in range(1, 10) if not set(shards[:cut]) & set(shards[cut:])]
        assert any(len(set(shards[:cut])) == 2 for cut in cuts), shards


def test_each_epoch_has_another_order_which_follows_from_the_generator_alone() -> None:
    def epochs() -> list[list[int]]:
        sampler = ShardSampler([4] * 4, window=2, generator=torch.Generator().manual_seed(3))
        return [list(sampler) for _ in range(3)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = epochs()
    assert torch.equal(torch.get_rng_state(), before)
    assert found == epochs()
    assert len({tuple(order) for order in found}) == 3


@pytest.mark.parametrize(("arguments", "name"), [(((0, 2),), "sizes"), (((),), "sizes"), (((2,), 0), "window")])
def test_shards_without_samples_are_refused(arguments: tuple[Any, ...], name: str) -> None:
    sizes, *window = arguments
    with pytest.raises(InvalidArgument, match=name):
        ShardSampler(sizes, window=window[0] if window else 16)

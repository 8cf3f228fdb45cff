"""Lists of active weights: each of them is there once, and pairs are what they should be."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.native import needs_kernels
from spfde.engines.native import lists as module
from spfde.engines.native.geometry import Geometry, Vectors, best_size, forward_shape, gradient_shape
from spfde.engines.native.layout import Layout
from spfde.engines.native.lists import (
    CHANNELS,
    COLUMNS,
    LAID_OUT,
    SINGLE,
    Entries,
    Reads,
    Weights,
    forward_entries,
    gradient_entries,
)  # fmt: skip

pytestmark = needs_kernels  # structures are read off the kernels' headers

VECTORS = Vectors(lanes=16, registers=32, pairs=True)
NONE = -1


def weights(mask: npt.NDArray[np.bool_], groups: int = 1) -> Weights:
    out, inner, *kernel = mask.shape
    geometry = Geometry(out, inner * groups, (kernel[0], kernel[1]), 1, (0, 0), (1, 1), groups)
    strides = [stride // mask.itemsize for stride in mask.strides]
    return Weights.of(geometry, mask, strides)


def _positions(entries: Entries) -> npt.NDArray[np.int32]:
    """Of all weights of a list, in the storage."""
    if not entries.is_paired:
        return entries.index
    assert (np.diff(entries.active) > 0).all()
    which = entries.index.ravel()
    return entries.active[which[which < len(entries.active)]]


def test_a_row_is_cut_into_pairs_of_neighbouring_columns_from_the_left() -> None:
    mask = np.zeros((1, 1, 1, 5), bool)
    mask[0, 0, 0, [0, 1, 2, 4]] = True
    found = weights(mask).found(pairs=True, neighbours=True)
    assert found.pairing == COLUMNS
    assert found.tap[1].tolist() == [0, 2, 3]
    assert found.index.tolist() == [[0, 1], [2, NONE], [NONE, 4]]
    back = weights(mask).turned().found(pairs=True, neighbours=True, backwards=True)
    assert back.tap[1].tolist() == [1, 3, 4]
    assert back.index.tolist() == [[1, 0], [NONE, 2], [4, NONE]]


def test_channels_are_paired_two_by_two_and_the_last_of_an_odd_number_is_alone() -> None:
    mask = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 0, 0]], bool)[:, :, None, None]
    found = weights(mask).found(pairs=True, neighbours=False)
    assert found.pairing == CHANNELS
    assert found.order.tolist() == [0, 1, 2, 3, 4, 4]
    assert found.row.tolist() == [0, 0, 0, 1]
    assert found.place.tolist() == [0, 1, 2, 1]
    assert found.index.tolist() == [[0, 1], [NONE, 3], [4, NONE], [7, NONE]]


def test_channels_are_paired_with_those_that_are_active_in_the_same_places() -> None:
    mask = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 1]], bool)[:, :, None, None]
    found = weights(mask).found(pairs=True, neighbours=False)
    assert found.order.tolist() == [0, 2, 1, 3]
    assert found.row.tolist() == [0, 1, 2, 2]
    assert found.place.tolist() == [0, 1, 0, 1]
    assert found.index.tolist() == [[0, 2], [5, 7], [8, 10], [NONE, 11]]


@pytest.mark.parametrize("sources", [1, 2, 7, 30, 31])
def test_among_many_channels_partners_are_looked_for_nearby(sources: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spfde.engines.native.lists._MOST_LOOKED_AT", 8 * 3 * sources)  # eight at a time
    mask = np.random.default_rng(0).random((3, sources, 1, 1)) < 0.4
    order = weights(mask).found(pairs=True, neighbours=False).order
    pairs = order.reshape(-1, 2)
    assert sorted(set(order.tolist())) == list(range(sources))
    assert (pairs[:, 0] // 8 == pairs[:, 1] // 8).all()
    assert (pairs[:, 0] == pairs[:, 1]).sum() == sources % 2


@given(
    out=st.integers(1, 6), inner=st.integers(1, 7), groups=st.sampled_from([1, 2, 3]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 5)), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]), pairs=st.booleans(), room=st.sampled_from([1, 20_000, 10**9]),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_active_weight_is_in_each_list_once(
    out: int, inner: int, groups: int, kernel: tuple[int, int], stride: int, dilation: int, density: float, pairs: bool,
    room: int, seed: int,
) -> None:  # fmt: skip
    mask = np.random.default_rng(seed).random((out * groups, inner, *kernel)) < density
    geometry = Geometry(out * groups, inner * groups, kernel, stride, (1, 2), (dilation, dilation), groups)
    source = Layout(16, inner * groups, 12, 12, 16, torch.bfloat16)
    target = Layout(16, out * groups, *geometry.output_size(12, 12), 16, torch.bfloat16)
    made = Weights.of(geometry, mask, [stride_ // mask.itemsize for stride_ in mask.strides])
    shapes = forward_shape(geometry, source, target, VECTORS), gradient_shape(geometry, source, target, VECTORS)
    reads = Reads(16, pairs=pairs, is_stored=False)
    with patch.multiple(module, _LEAST_CHUNK=room, _MOST_CHUNK=room):
        forward = forward_entries(geometry, made, shapes[0], reads)
        back = gradient_entries(geometry, made, shapes[1], reads)
    for lists, rows, tile in (((forward,), out, shapes[0].tile), (back, inner, shapes[1].tile)):
        index = np.concatenate([_positions(entries) for entries in lists])
        assert sorted(index.tolist()) == np.flatnonzero(mask).tolist()
        for entries in lists:
            begins, item, _, taken, offset = entries.parts
            assert set((item[:, 0] >> 2).tolist()) == set(range(rows * groups))
            assert begins[-1] == len(item)
            assert (np.diff(item[:, 1]) >= 0).all()
            assert np.count_nonzero(item[:, 0] & 1) == np.count_nonzero(item[:, 0] & 2) == rows * groups
            held = int(np.diff(taken).max()) * tile.pixels * 16
            if entries.c.pairing == LAID_OUT:
                held = tile.high * shapes[0].window.pitch // 2
            assert not len(offset) or (offset.min() >= 0 and offset.max() < held)


@pytest.mark.parametrize(
    ("density", "bytes_", "why"),
    [(1.0, 26_000, "the least"), (0.1, 34_000, "34 hundred over the share"), (0.05, 68_000, "likewise"),
     (0.0, 150_000, "the most")],
)  # fmt: skip
def test_a_chunk_holds_more_channels_where_fewer_entries_read_each(density: float, bytes_: int, why: str) -> None:
    tile = forward_shape(
        Geometry(8, 8, (3, 3), 1, (1, 1), (1, 1), 1), *(Layout(16, 8, 8, 8, 16, torch.bfloat16),) * 2, VECTORS
    ).tile
    n_weights = 1000
    held = Reads(16, pairs=True, is_stored=False).per_chunk(tile, int(density * n_weights), n_weights)
    assert held == bytes_ // (tile.pixels * 16 * 4), why


def test_without_pairs_an_entry_is_a_weight() -> None:
    mask = np.ones((2, 3, 1, 1), bool)
    found = weights(mask).found(pairs=False, neighbours=True)
    assert found.pairing == SINGLE
    assert found.index.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, (2, 8)), (8, 8, (2, 8)), (28, 28, (4, 4)), (4, 4, (4, 4)), (2, 2, (2, 2)),
                                  (1, 8, (1, 8)), (1, 1, (1, 1))],
)  # fmt: skip
def test_tiles_are_chosen_by_the_least_work(height: int, width: int, size: tuple[int, int]) -> None:
    assert best_size(height, width, VECTORS, 1) == size


@pytest.mark.parametrize(("inner", "pairing"), [(4, LAID_OUT), (3, CHANNELS)])
def test_a_window_holds_pairs_of_channels_where_each_channel_has_a_partner(inner: int, pairing: int) -> None:
    mask = np.ones((2, inner, 1, 1), bool)
    geometry = Geometry(2, inner, (1, 1), 1, (0, 0), (1, 1), 1)
    source, target = (Layout(16, channels, 4, 4, 16, torch.bfloat16) for channels in (inner, 2))
    shape = forward_shape(geometry, source, target, VECTORS)
    made = Weights.of(geometry, mask, [stride // mask.itemsize for stride in mask.strides])
    entries = forward_entries(geometry, made, shape, Reads(16, pairs=True, is_stored=False))
    assert entries.c.pairing == pairing
    pairs = -(-inner // 2)
    each = shape.window.span if pairing == LAID_OUT else shape.tile.pixels * 16
    assert entries.parts[4].tolist() == [pair * each for pair in range(pairs)] * 2

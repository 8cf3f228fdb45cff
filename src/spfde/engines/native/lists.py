"""From a mask to the lists that the kernels schedule: which weights there are, and where each of them reads.

A convolution has a list for its forward pass, one for the gradient of its weight, and for the gradient of its input one
for each residue of the input's pixels by the stride. All are rows of the weight in chunks of source channels.

Where the processor multiplies pairs of bf16 an entry is two weights: of two channels at one place of the kernel, or of
two neighbouring columns of the kernel, whichever makes fewer entries. One without a partner is half of an entry.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spfde.engines.native.geometry import ForwardShape, Geometry, GradientShape, Tile, Window
from spfde.engines.native.layout import Layout
from spfde.engines.native.structs import struct

SINGLE, CHANNELS, COLUMNS, LAID_OUT = range(4)
_FIRST, _LAST, _FLAGS = 1, 2, 2
_NO_WEIGHT = -1
# How many fewer pairs of columns than of channels are worth it: they are spread into scratch, which
# holds one channel where it would hold two.
_WORTH_IT = 0.9

# Bytes that a chunk of channels may take. The first-level cache (32 KiB or more) should hold it beside the lists
# themselves, which are long where there are many entries; where there are few, a chunk needs more channels to give a
# row of the weight something to do.
_LEAST_CHUNK, _MOST_CHUNK, _CHUNK_TIMES_SHARE = 26_000, 150_000, 3_400

# Products in looking for partners: some hundredths of a second.
_MOST_LOOKED_AT = 1 << 30

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Entries:
    """One list for the kernels.

    Attributes:
        index: position of each entry's weight in the weight's storage, int32 [entries]; of pairs [entries, 2], which of
            the active weights each of the two is, where one more than the last is no weight.
        active: of pairs, positions of the active weights in the storage, in ascending order; else empty.
        parts: the arrays whose addresses ``c`` holds.
        c: as the kernels take it.
    """

    index: npt.NDArray[np.int32]
    active: npt.NDArray[np.int32]
    parts: tuple[npt.NDArray[np.int32], ...]
    c: ctypes.Structure

    @property
    def n(self) -> int:
        return len(self.index)

    @property
    def is_paired(self) -> bool:
        return self.index.ndim == 2


@dataclass(frozen=True)
class _Found:
    """Entries as they are found: row, place of the source channel or of a pair of them, tap, weights; in this order."""

    row: Ints
    place: Ints
    tap: tuple[Ints, Ints]
    index: Ints
    order: Ints
    pairing: int


@dataclass(frozen=True)
class Weights:
    """Which weights are active, and where in the storage they are.

    Attributes:
        active: bool [groups, rows, sources, kernel height, kernel width]: rows and sources of each group.
        strides: of the storage, likewise.
    """

    active: Bools
    strides: tuple[int, ...]

    @classmethod
    def of(cls, geometry: Geometry, active: Bools, strides: Sequence[int]) -> Weights:
        """From a mask [out, in / groups, kernel height, kernel width] and the weight's strides."""
        groups = geometry.groups
        shape = (groups, geometry.out_channels // groups, geometry.in_channels // groups, *geometry.kernel)
        return cls(active.reshape(shape), (strides[0] * shape[1], *strides))

    def turned(self) -> Weights:
        """With rows and sources exchanged."""
        return Weights(self.active.swapaxes(1, 2), tuple(self.strides[axis] for axis in (0, 2, 1, 3, 4)))

    def where(self, at: Sequence[Ints]) -> Ints:
        """Positions in the storage."""
        return sum((part * stride for part, stride in zip(at, self.strides, strict=True)), np.zeros(1, np.int64))

    def found(self, *, pairs: bool, neighbours: bool, backwards: bool = False) -> _Found:
        """The entries.

        Args:
            pairs: of two weights.
            neighbours: pairs of columns are possible: the columns of the kernel read neighbours.
            backwards: the kernel's columns read from right to left.
        """
        if not pairs:
            return self._singles()
        of_channels = self._of_channels()
        if not neighbours or self.active.shape[4] < 2:
            return of_channels
        of_columns = self._of_columns(backwards=backwards)
        return of_columns if len(of_columns.row) < _WORTH_IT * len(of_channels.row) else of_channels

    def _singles(self) -> _Found:
        at = self.active.nonzero()
        groups, rows, sources, *_ = self.active.shape
        order = np.arange(groups * sources)
        return _Found(at[0] * rows + at[1], at[0] * sources + at[2], (at[3], at[4]), self.where(at), order, SINGLE)

    def _of_channels(self) -> _Found:
        groups, rows, sources, *_ = self.active.shape
        order = np.stack([_matched(self.active[group]) for group in range(groups)])  # [groups, 2 * slots]
        slots = order.shape[1] // 2
        of_slot = order.reshape(groups, slots, 2)
        halves = [np.stack([self.active[g][:, of_slot[g, :, n]] for g in range(groups)]) for n in (0, 1)]
        if sources % 2:  # what has no partner is its own, with no weight
            halves[1][:, :, -1] = False
        at = (halves[0] | halves[1]).nonzero()
        both = [
            np.where(halves[n][at], self.where((at[0], at[1], of_slot[at[0], at[2], n], at[3], at[4])), _NO_WEIGHT)
            for n in (0, 1)
        ]
        order = (np.arange(groups)[:, None] * sources + order).ravel()
        place = at[0] * slots + at[2]
        return _Found(at[0] * rows + at[1], place, (at[3], at[4]), np.stack(both, axis=1), order, CHANNELS)

    def _of_columns(self, *, backwards: bool) -> _Found:
        active, last = self.active, self.active.shape[4] - 1
        pair, taken = np.zeros_like(active), np.zeros_like(active)  # by its left one; is in one
        for column in range(last):  # as far left as can be
            pair[..., column] = active[..., column] & active[..., column + 1] & ~taken[..., column]
            taken[..., column : column + 2] |= pair[..., column, None]
        alone = active & ~taken
        first = pair | alone
        first[..., last - 1] |= alone[
            ..., last
        ]  # the last column has no right neighbour: it is half of a pair with its left
        first[..., last] = False
        at = first.nonzero()
        right = (*at[:4], at[4] + 1)
        is_left, is_right = pair[at] | alone[at], pair[at] | alone[right]
        groups, rows, sources, *_ = active.shape
        both = [np.where(is_left, self.where(at), _NO_WEIGHT), np.where(is_right, self.where(right), _NO_WEIGHT)]
        tap = (at[3], at[4])
        if backwards:
            both.reverse()
            tap = (at[3], at[4] + 1)
        order = np.arange(groups * sources)
        return _Found(
            at[0] * rows + at[1], at[0] * sources + at[2], tap, np.stack(both, axis=1), order, COLUMNS
        )  # fmt: skip


@dataclass(frozen=True)
class Reads:
    """How entries read what a tile of pixels needs.

    Attributes:
        lanes: numbers of a vector.
        pairs: entries are pairs.
        is_stored: from the window, which holds what is multiplied; else from scratch, but for pairs that are laid out.
    """

    lanes: int
    pairs: bool
    is_stored: bool

    def per_chunk(self, tile: Tile, n_entries: int, n_weights: int) -> int:
        """Channels, or pairs of them, of a chunk, where so many entries stand for so many weights, active or not."""
        room = _MOST_CHUNK if n_entries == 0 else _CHUNK_TIMES_SHARE * n_weights // n_entries
        return max(1, min(_MOST_CHUNK, max(_LEAST_CHUNK, room)) // (tile.pixels * self.lanes * 4))


@dataclass(frozen=True)
class _Steps:
    """Numbers from a place that entries read to the next, in scratch or in a window."""

    row: int
    plane: int
    channel: int
    is_scratch: bool

    @classmethod
    def of(cls, tile: Tile, window: Window, reads: Reads) -> _Steps:
        if reads.is_stored:
            return cls(window.pitch, window.plane, window.span, is_scratch=False)
        lanes = reads.lanes
        return cls(tile.planes * tile.wide * lanes, tile.wide * lanes, tile.pixels * lanes, is_scratch=True)

    @classmethod
    def of_pairs(cls, window: Window) -> _Steps:
        """In a window of pairs of channels: a pair is a number, and two of those that are paired."""
        return cls(window.pitch // 2, window.plane, window.span, is_scratch=False)


def forward_entries(geometry: Geometry, weights: Weights, shape: ForwardShape, reads: Reads) -> Entries:
    """The list of the forward pass."""
    s, (down, right) = geometry.stride, geometry.dilation
    steps = _Steps.of(shape.tile, shape.window, reads)
    found = weights.found(pairs=reads.pairs, neighbours=s == 1 and right == 1)
    if found.pairing == CHANNELS and len(found.order) == geometry.in_channels:
        # The window holds pairs then: nothing else reads it. A channel without a partner would need more room.
        found, steps = replace(found, pairing=LAID_OUT), _Steps.of_pairs(shape.window)
    column = found.tap[1] * right
    offset = found.tap[0] * down * steps.row + column % s * steps.plane + column // s * reads.lanes
    per_chunk = reads.per_chunk(shape.tile, len(found.row), weights.active.size)
    return _listed(found, offset, geometry.out_channels, steps, per_chunk)


def gradient_entries(geometry: Geometry, weights: Weights, shape: GradientShape, reads: Reads) -> tuple[Entries, ...]:
    """The lists of the gradient of the input, by residue of its pixels."""
    s, window = geometry.stride, shape.window
    steps = _Steps.of(shape.tile, window, reads)
    neighbours = s == 1 and geometry.dilation[1] == 1
    found = weights.turned().found(pairs=reads.pairs, neighbours=neighbours, backwards=True)
    away = np.full((2, s, max(geometry.kernel)), _NO_WEIGHT)  # by axis, residue, tap: what the offset is; or no weight
    for axis, before in enumerate((window.above, window.lead)):
        for tap, residue, distance in geometry.turned(axis):
            away[axis, residue, tap] = distance + before
    per_chunk = reads.per_chunk(shape.tile, len(found.row), weights.active.size)
    made = []
    for residue in range(s * s):
        down, right = away[0, residue // s][found.tap[0]], away[1, residue % s][found.tap[1]]
        keep = (down >= 0) & (right >= 0)
        some = found if keep.all() else _some(found, keep)
        offset = down[keep] * steps.row + right[keep] * reads.lanes
        made.append(_listed(some, offset, geometry.in_channels, steps, per_chunk))
    return tuple(made)


def weight_entries(geometry: Geometry, weights: Weights, window: Window, lanes: int, per_chunk: int) -> Entries:
    """The list of the weights whose gradients are wanted.

    Args:
        geometry, weights: the convolution.
        window: of the source, see ``gradient_shape``.
        lanes: numbers of a vector.
        per_chunk: channels of a chunk.
    """
    s = geometry.stride
    found = weights.found(pairs=False, neighbours=False)
    column = found.tap[1] * geometry.dilation[1]
    offset = found.tap[0] * geometry.dilation[0] * window.pitch + column % s * window.plane + column // s * lanes
    steps = _Steps(window.pitch, window.plane, window.span, is_scratch=False)
    return _listed(found, offset, geometry.out_channels, steps, per_chunk, every_row=False)


def _matched(active: Bools) -> Ints:
    """Sources of a group in pairs, one behind the other, that are active together more often than chance has it.

    Each in turn takes the partner with which it shares most entries, among those near it where there are too many to
    look at. The last of an odd number is its own partner.

    Args:
        active: bool [rows, sources, kernel height, kernel width].
    """
    sources = active.shape[1]
    near = min(sources, max(2, _MOST_LOOKED_AT // max(1, active.size) // 2 * 2))
    order = list[int]()
    for start in range(0, sources, near):
        flat = active[:, start : start + near].swapaxes(0, 1)
        flat = flat.reshape(len(flat), -1).astype(np.float32)
        shared, free = flat @ flat.T, np.ones(len(flat), bool)
        for one in range(len(flat)):
            if free[one]:
                free[one] = False
                other = int(np.where(free, shared[one], -1).argmax()) if free.any() else one
                free[other] = False
                order += [start + one, start + other]
    return np.array(order, np.int64)


def _some(found: _Found, keep: Bools) -> _Found:
    tap = (found.tap[0][keep], found.tap[1][keep])
    return _Found(found.row[keep], found.place[keep], tap, found.index[keep], found.order, found.pairing)


def _listed(found: _Found, offset: Ints, n_rows: int, steps: _Steps, most: int, *, every_row: bool = True) -> Entries:
    """The list of these entries.

    Args:
        found: sorted by row.
        offset: where each reads, from the beginning of its channel.
        n_rows: rows of the weight.
        steps: from channel to channel.
        most: channels, or pairs of them, of a chunk.
        every_row: rows without an entry are there, too: they have something to write.
    """
    each = 2 if found.pairing in (CHANNELS, LAID_OUT) else 1
    n_places = len(found.order) // each
    chunks = max(1, -(-n_places // most))
    width = max(1, -(-n_places // chunks))
    chunk = found.place // width
    key = chunk * n_rows + found.row
    sorted_ = _sorted(key, chunks * n_rows)
    key = key[sorted_]
    is_new = np.ones(len(key), bool)
    np.not_equal(key[1:], key[:-1], out=is_new[1:])
    items = key[is_new]
    if every_row:
        has = np.zeros(n_rows, bool)
        has[found.row] = True
        items = np.sort(np.concatenate([items, np.flatnonzero(~has)]))
    rows = items % n_rows
    n_items = len(items)
    first, last = np.full(n_rows, n_items), np.full(n_rows, -1)
    first[rows[::-1]], last[rows] = np.arange(n_items)[::-1], np.arange(n_items)
    number = np.arange(n_items)
    flags = (first[rows] == number) * _FIRST + (last[rows] == number) * _LAST
    item = np.stack([(rows << _FLAGS) + flags, np.searchsorted(key, items, side="right")], axis=1)
    begins = np.searchsorted(items, np.arange(chunks + 1) * n_rows)
    taken = np.minimum(np.arange(chunks + 1) * width, n_places) * each
    place = found.place % width if steps.is_scratch else found.place
    offset = (offset + place * steps.channel)[sorted_]
    parts = tuple(np.ascontiguousarray(part, dtype=np.int32) for part in (begins, item, found.order, taken, offset))
    index, active = found.index[sorted_], np.zeros(0, np.int64)
    if index.ndim == 2:
        index, active = _numbered(index)
    at: list[Any] = [part.ctypes.data for part in parts]
    c = struct("Entries")(n_rows, chunks, len(index), found.pairing, *at)
    return Entries(np.ascontiguousarray(index, dtype=np.int32), active.astype(np.int32), parts, c)


def _numbered(positions: Ints) -> tuple[Ints, Ints]:
    """The rank of each position among those that occur, one more than the last where there is none; and these."""
    occurs = np.zeros(positions.max(initial=0) + 2, bool)
    occurs[positions] = True  # that of no weight is the last
    occurs[-1] = False
    which = np.flatnonzero(occurs)
    rank = np.cumsum(occurs) - 1
    rank[-1] = len(which)
    return rank[positions], which


def _sorted(keys: Ints, n: int) -> Ints:
    """Positions by their keys, which are below ``n``; equal ones keep their order."""
    # Of 16 bits NumPy's stable sort is by counting.
    return keys.astype(np.uint16 if n <= 1 << 16 else np.int64).argsort(kind="stable")


def offsets_fit(geometry: Geometry, source: Layout, target: Layout) -> bool:
    """Are offsets into windows of these layouts of 32 bits?"""
    rows = geometry.spans[0] + 8 * geometry.stride
    numbers = max(layout.channels * (layout.width + 64) * layout.lanes for layout in (source, target))
    return numbers * rows * 4 < 2**31

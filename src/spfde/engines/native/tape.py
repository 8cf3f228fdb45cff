"""Calls of kernels, written down once and played in one call as often as nothing about them changes.

A pass through a region is some hundred kernels of a few hundred microseconds each; asking Python about each of them, in
every pass, took a tenth of a step. What is another memory in each pass (inputs, outputs, buffers) is written down as a
place: so many bytes into whatever a slot holds then.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from spfde.engines.native.layout import Layout, Piece, Pool, bytes_of
from spfde.engines.native.structs import struct

# Bytes from which on a buffer is looked for among those of other sizes.
_WORTH_SHARING = 256 << 10


@dataclass(frozen=True, eq=False)
class Place:
    """A place in the memory of a slot.

    Attributes:
        slot: which one.
        offset: in bytes.
        lease: its piece is free for others when neither it nor a place derived from it is left.
    """

    slot: int
    offset: int = 0
    lease: object = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Buffer(Place):
    """A place where a value lies, blocked as its layout says."""

    layout: Layout


class _Lease:
    """A piece in use; it goes back to its shelf when nothing refers to the lease any more."""

    def __init__(self, slot: int, shelf: list[int]) -> None:
        self._slot, self._shelf = slot, shelf

    def __del__(self) -> None:
        self._shelf.append(self._slot)


class Tape:
    """Jobs for kernels. Write everything down, then ``finish`` it, then ``play`` it.

    Args:
        library: the loaded kernels.
        dtype: of the numbers.
        threads: that each kernel is cut for.
        keeps: buffers may be wanted afterwards, and have no room to spare then. Otherwise values of different sizes lie
            in one buffer, one after another.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, threads: int, *, keeps: bool = True) -> None:
        self._keeps = keeps
        self.dtype = dtype
        self.threads = threads
        self._library = library
        self._n_slots = 0
        self._given: dict[Hashable, int] = {}
        self._pieces: dict[int, Piece] = {}
        self._shelves: dict[Piece, list[int]] = defaultdict(list)
        self._jobs = bytearray()
        self._patches: list[tuple[int, int, int]] = []
        self._once: list[tuple[int, int]] = []
        self._calls: list[tuple[int, int]] = []
        self._tensors: dict[int, tuple[Tensor, int, tuple[int, ...]]] = {}
        self._held: list[object] = []
        self._lock = threading.Lock()

    # --- places ------------------------------------------------------------------------------------------------------

    def given(self, key: Hashable) -> Place:
        """The start of what ``play`` is given under this key."""
        if key not in self._given:
            self._given[key] = self._new_slot()
        return Place(self._given[key])

    def is_given(self, key: Hashable) -> bool:
        """Does anything read or write what would be given under this key?"""
        return key in self._given

    def take(self, layout: Layout) -> Buffer:
        """A buffer of this layout, which holds anything."""
        slot, lease = self._take(layout)
        return Buffer(slot, lease=lease, layout=layout)

    def take_flat(self, numel: int, dtype: torch.dtype | None = None) -> Place:
        """Room for so many numbers that holds anything; sizes of the usual type are rounded up, to be shared."""
        key = (1 << max(0, numel - 1).bit_length(), self.dtype) if dtype is None else (numel, dtype)
        slot, lease = self._take(key)
        return Place(slot, lease=lease)

    def numbers_after(self, place: Place, n: int) -> Place:
        """The place so many numbers further on."""
        return self.bytes_after(place, n * self.dtype.itemsize)

    def bytes_after(self, place: Place, n: int) -> Place:
        """The place so many bytes further on."""
        return Place(place.slot, place.offset + n, place.lease)

    def groups_of(self, buffer: Buffer, start: int, layout: Layout) -> Buffer:
        """The groups of images in a buffer from image ``start`` on, as many as ``layout`` has."""
        offset = buffer.offset + start // layout.images * layout.group * layout.itemsize
        return replace(buffer, offset=offset, layout=layout)

    def _take(self, piece: Piece) -> tuple[int, _Lease]:
        shelf = self._shelves[piece]
        if shelf:
            slot = shelf.pop()
        elif (found := self._free_one(piece)) is not None:
            slot = found
        else:
            slot = self._new_slot()
            self._pieces[slot] = piece
        return slot, _Lease(slot, shelf)

    def _free_one(self, piece: Piece) -> int | None:
        """The largest free slot of other pieces, which is made large enough for this one, too."""
        if self._keeps or bytes_of(piece) < _WORTH_SHARING:
            return None
        free = [(bytes_of(self._pieces[slot]), slot, shelf) for shelf in self._shelves.values() for slot in shelf]
        size, slot, shelf = max(free, key=itemgetter(0), default=(0, -1, []))
        if size < _WORTH_SHARING:
            return None
        shelf.remove(slot)
        if size < bytes_of(piece):
            self._pieces[slot] = piece
        return slot

    def _new_slot(self) -> int:
        self._n_slots += 1
        return self._n_slots - 1

    # --- writing -----------------------------------------------------------------------------------------------------

    def call(self, kernel: str, job: str, *values: object, once: bool = False) -> None:
        """One more job.

        Args:
            kernel: its name in the library.
            job: name of the structure that it is told.
            values: of the fields. In the place of a pointer a Place, or a tensor that stays where it is; in that of a
                structure a tuple of its values.
            once: before all others, and only as often as ``play`` asks for it.
        """
        at = len(self._jobs)
        self._jobs += bytes(self._filled(struct(job), values, at))
        calls = self._once if once else self._calls
        calls.append((ctypes.cast(getattr(self._library, kernel), ctypes.c_void_p).value or 0, at))

    def _filled(self, kind: Any, values: Sequence[object], at: int) -> ctypes.Structure:
        """The structure with these values, as it will stand at byte ``at`` of the jobs."""
        fields: list[object] = []
        for (name, field, *_), value in zip(kind._fields_, values, strict=True):
            here = at + getattr(kind, name).offset
            if isinstance(value, Place):
                self._patches.append((here, value.slot, value.offset))
                fields.append(None)
            elif isinstance(value, Tensor):
                fields.append(value.data_ptr())
                self._tensors[id(value)] = (value, value.data_ptr(), value.stride())
            elif isinstance(value, tuple):
                fields.append(self._filled(field, value, here))
            else:
                fields.append(value)
        made: ctypes.Structure = kind(*fields)
        return made

    def hold(self, what: object) -> None:
        """Something whose address is written down as a number; it must live as long as the tape."""
        self._held.append(what)

    def finish(self, keep: Sequence[Place] = ()) -> None:
        """Nothing more is written; these buffers are wanted whenever it was played."""
        self._keep = [place.slot for place in keep]
        patch, call, at = struct("Patch"), struct("Call"), ctypes.addressof
        jobs = ctypes.create_string_buffer(bytes(self._jobs), max(1, len(self._jobs)))
        patches = (patch * len(self._patches))(*starmap(patch, self._patches))
        n_once, written = len(self._once), [*self._once, *self._calls]
        calls = (call * len(written))(*starmap(call, written))
        self._held += [jobs, patches, calls]
        # With the calls that are made once, and without them.
        self._whole, self._rest = (
            struct("Tape")(
                at(jobs), at(patches), len(patches), at(calls) + start * ctypes.sizeof(call), len(calls) - start,
                self.threads,
            )
            for start in (0, n_once)
        )  # fmt: skip

    # --- playing -----------------------------------------------------------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Do the tensors that were written down lie where they lay, and as they did?"""
        return all(
            tensor.data_ptr() == address and tensor.stride() == strides
            for tensor, address, strides in self._tensors.values()
        )

    def play(self, given: Mapping[Hashable, Tensor], pool: Pool, *, again: bool = False) -> list[Tensor]:
        """Run all jobs; the buffers that are wanted.

        Args:
            given: tensors by the keys that ``given`` was asked for.
            pool: where the buffers come from.
            again: what is called ``once`` would come to what it came to before.
        """
        slots = (ctypes.c_void_p * max(1, self._n_slots))()
        for key, slot in self._given.items():
            slots[slot] = given[key].data_ptr()
        kept = {slot: pool.take(self._pieces[slot]) for slot in self._keep}
        for slot, tensor in kept.items():
            slots[slot] = tensor.data_ptr()
        lent = [(slot, piece, pool.lend(piece)) for slot, piece in self._pieces.items() if slot not in kept]
        for slot, _, buffer in lent:
            slots[slot] = buffer.address
        with self._lock:  # addresses are written into the jobs
            self._library.spfde_play(ctypes.byref(self._rest if again else self._whole), slots)
        for _, piece, buffer in lent:
            pool.give_back(piece, buffer)
        return [kept[slot] for slot in self._keep]

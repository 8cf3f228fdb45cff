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
from itertools import starmap

import torch
from torch import Tensor

from spfde.engines.native.layout import Layout, Pool
from spfde.engines.native.structs import struct

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class Place:
    """A place in the memory of a slot.

    Attributes:
        slot: which one.
        offset: in bytes.
    """

    def __init__(self, slot: int, offset: int, lease: object = None) -> None:
        # Its piece is free for others when neither it nor a place derived from it is left.
        self.slot, self.offset, self._lease = slot, offset, lease

    def after(self, n_bytes: int) -> Place:
        """The place so many bytes further on."""
        return Place(self.slot, self.offset + n_bytes, self._lease)


class Buffer(Place):
    """A place where a value lies, blocked as its layout says."""

    def __init__(self, slot: int, offset: int, layout: Layout, lease: object = None) -> None:
        super().__init__(slot, offset, lease)
        self.layout = layout

    def part(self, layout: Layout, n_bytes: int) -> Buffer:
        """What lies so many bytes further on, blocked in another way."""
        return Buffer(self.slot, self.offset + n_bytes, layout, self._lease)


class _Lease:
    """A piece in use; it goes back to its shelf when nothing refers to the lease any more."""

    def __init__(self, slot: int, shelf: list[int]) -> None:
        self._slot, self._shelf = slot, shelf

    def __del__(self) -> None:
        self._shelf.append(self._slot)


class _Call(ctypes.Structure):
    _fields_ = [("kernel", _pointer), ("job", _int)]


class _Patch(ctypes.Structure):
    _fields_ = [("at", _int), ("slot", _int), ("offset", _int)]


class _Ready(ctypes.Structure):
    """``Tape`` of the kernels."""

    _fields_ = [
        ("jobs", _pointer),
        ("patches", _pointer),
        ("n_patches", _int),
        ("calls", _pointer),
        ("n_calls", _int),
    ]


class Tape:
    """Jobs for kernels. Write everything down, then ``finish`` it, then ``play`` it.

    Args:
        library: the loaded kernels.
        dtype: of the numbers.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = library
        self._n_slots = 0
        self._given: dict[Hashable, int] = {}
        self._pieces: dict[int, Layout | tuple[int, torch.dtype]] = {}
        self._shelves: dict[Hashable, list[int]] = defaultdict(list)
        self._jobs = bytearray()
        self._patches: list[tuple[int, int, int]] = []
        self._calls: list[tuple[int, int]] = []
        self._tensors: dict[int, tuple[Tensor, int, tuple[int, ...]]] = {}
        self._held: list[object] = []
        self._lock = threading.Lock()

    # --- places ------------------------------------------------------------------------------------------------------

    def given(self, key: Hashable) -> Place:
        """The start of what ``play`` is given under this key."""
        if key not in self._given:
            self._given[key] = self._new_slot()
        return Place(self._given[key], 0)

    def given_buffer(self, key: Hashable, layout: Layout) -> Buffer:
        """The same, of what is blocked like that."""
        return Buffer(self.given(key).slot, 0, layout)

    def is_given(self, key: Hashable) -> bool:
        """Does anything read or write what would be given under this key?"""
        return key in self._given

    def take(self, layout: Layout) -> Buffer:
        """A buffer of this layout; pixels hold anything, all else is zero."""
        slot, lease = self._take(layout, layout)
        return Buffer(slot, 0, layout, lease)

    def take_flat(self, numel: int, dtype: torch.dtype | None = None) -> Place:
        """Room for so many numbers that holds anything; sizes of the usual type are rounded up, to be shared."""
        key = (1 << max(0, numel - 1).bit_length(), self.dtype) if dtype is None else (numel, dtype)
        slot, lease = self._take(key, key)
        return Place(slot, 0, lease)

    def _take(self, key: Hashable, piece: Layout | tuple[int, torch.dtype]) -> tuple[int, _Lease]:
        shelf = self._shelves[key]
        if shelf:
            slot = shelf.pop()
        else:
            slot = self._new_slot()
            self._pieces[slot] = piece
        return slot, _Lease(slot, shelf)

    def _new_slot(self) -> int:
        self._n_slots += 1
        return self._n_slots - 1

    # --- writing -----------------------------------------------------------------------------------------------------

    def call(self, kernel: str, job: str, *values: object) -> None:
        """One more job.

        Args:
            kernel: its name in the library.
            job: name of the structure that it is told.
            values: of the fields. In the place of a pointer a Place, or a tensor that stays where it is.
        """
        at, job_type = len(self._jobs), struct(job)
        fields: list[object] = []
        for (name, *_), value in zip(job_type._fields_, values, strict=True):
            if isinstance(value, Place):
                self._patches.append((at + getattr(job_type, name).offset, value.slot, value.offset))
                fields.append(None)
            elif isinstance(value, Tensor):
                fields.append(value.data_ptr())
                self._tensors[id(value)] = (value, value.data_ptr(), value.stride())
            else:
                fields.append(value)
        self._jobs += bytes(job_type(*fields))
        self._calls.append((ctypes.cast(getattr(self._library, kernel), _pointer).value or 0, at))

    def hold(self, what: object) -> None:
        """Something whose address is written down as a number; it must live as long as the tape."""
        self._held.append(what)

    def finish(self) -> None:
        """Nothing more is written."""
        jobs = ctypes.create_string_buffer(bytes(self._jobs), max(1, len(self._jobs)))
        patches = (_Patch * len(self._patches))(*starmap(_Patch, self._patches))
        calls = (_Call * len(self._calls))(*starmap(_Call, self._calls))
        self._held += [jobs, patches, calls]
        at = ctypes.addressof
        self._ready = _Ready(at(jobs), at(patches), len(patches), at(calls), len(calls))

    # --- playing -----------------------------------------------------------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Do the tensors that were written down lie where they lay, and as they did?"""
        return all(
            tensor.data_ptr() == address and tensor.stride() == strides
            for tensor, address, strides in self._tensors.values()
        )

    def play(self, given: Mapping[Hashable, Tensor], pool: Pool, keep: Sequence[Place] = ()) -> list[Tensor]:
        """Run all jobs.

        Args:
            given: tensors by the keys that ``given`` was asked for.
            pool: where the buffers come from.
            keep: buffers that are wanted afterwards.
        """
        slots = (_pointer * max(1, self._n_slots))()
        for key, slot in self._given.items():
            slots[slot] = given[key].data_ptr()
        taken = {}
        for slot, piece in self._pieces.items():
            tensor = pool.take(piece) if isinstance(piece, Layout) else pool.take_flat(*piece)
            taken[slot] = tensor
            slots[slot] = tensor.data_ptr()
        with self._lock:  # addresses are written into the jobs
            self._library.spfde_play(ctypes.byref(self._ready), slots)
        return [taken[place.slot] for place in keep]

"""The blocked layout of a value, and the buffers that hold values."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spfde.engines.native.structs import struct

# Tokens lie like images of one row: so many vectors to a channel, lane after lane. What a tile reads of all channels is
# then one piece of memory.
TOKEN_COLUMNS = 8

# NumPy has no bf16; nobody reads its numbers there.
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int32: np.int32, torch.bfloat16: np.int16}
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector
# Kernels read and write so much that they would wait for the addresses of small pages. Buffers that do not fill huge
# ones come together from a piece of memory, which goes back when all of them are gone. What nobody touches takes none.
# Small ones have pieces of their own: where they lay between, others would not fill theirs.
_HUGE_PAGE, _PIECE, _SMALL = 2 << 20, 8 << 20, 256 << 10
_MOST_PASSES = 4  # forward passes after which a free buffer is given back


def likely_lanes() -> int:
    """Lanes that the kernels will have on this processor; ``Kernels.lanes`` is what they have."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


@dataclass(frozen=True)
class Layout:
    """Images, or cells of them, in groups of ``lanes``, a pixel of a group one vector; see ``kernels/lanes.h``.

    Attributes:
        batch: images.
        channels, height, width: of an image, or of a cell of one.
        lanes: images or cells in a group.
        dtype: that its numbers are stored as.
        grid: cells of an image, downwards and to the right.
    """

    batch: int
    channels: int
    height: int
    width: int
    lanes: int
    dtype: torch.dtype
    grid: tuple[int, int] = (1, 1)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.batch, self.channels, self.height, self.width, self.lanes, self.dtype, self.grid))

    @property
    def cells(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def images(self) -> int:
        """In a group."""
        return self.lanes // self.cells

    @property
    def groups(self) -> int:
        return -(-self.batch // self.images)

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a whole image."""
        return self.height * self.grid[0], self.width * self.grid[1]

    def cut(self, grid: tuple[int, int]) -> Layout:
        """Of whole images, as so many cells each."""
        return replace(self, height=self.height // grid[0], width=self.width // grid[1], grid=grid)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @functools.cached_property
    def group(self) -> int:
        """Numbers from a group of images to the next."""
        return self.height * self.channels * self.width * self.lanes

    @functools.cached_property
    def numel(self) -> int:
        """Numbers in the buffer, empty lanes included."""
        return self.groups * self.group

    @functools.cached_property
    def c(self) -> ctypes.Structure:
        """As the kernels take it."""
        return struct("Blocked")(
            self.groups, self.channels, self.height, self.width, self.batch * self.cells, *self.grid
        )


# A value, or so many numbers of a type.
Piece = Layout | tuple[int, torch.dtype]


def bytes_of(piece: Piece) -> int:
    """That its numbers take."""
    numel, dtype = (piece.numel, piece.dtype) if isinstance(piece, Layout) else piece
    return numel * dtype.itemsize


class Lent(NamedTuple):
    """A buffer of a pool, and where it begins."""

    array: np.ndarray[Any, Any]
    address: int


class Pool:
    """Buffers that are used again. A buffer comes back when the last tensor on it is gone.

    A buffer serves one layout for good. One that no forward pass has wanted for a while is given back to the system:
    the shapes are others now, or blocks were frozen, which keep nothing.

    Attributes:
        bytes: memory of all buffers, free or in use.
    """

    def __init__(self) -> None:
        # Free buffers, each with the pass in which it came back; the one that came last is taken first.
        self._free: dict[Piece, list[tuple[int, Lent]]] = defaultdict(list)
        # Of the pieces of memory from which the next buffers come: small ones, and others, which fill theirs.
        self._rests = {True: np.zeros(0, np.uint8), False: np.zeros(0, np.uint8)}
        self.bytes = self._pass = self._phase = 0

    def take(self, piece: Piece) -> Tensor:
        """A flat tensor, which holds anything."""
        # The tensor's storage holds the array, the array its lease: no counting of our own.
        return torch.from_numpy(np.asarray(_Lease(self.lend(piece), piece, self)))

    def lend(self, piece: Piece) -> Lent:
        """Such a buffer for a moment: whoever asks for it gives it back."""
        shelf = self._free.get(piece)
        if shelf:
            return shelf.pop()[1]
        numel, dtype = (piece.numel, piece.dtype) if isinstance(piece, Layout) else piece
        array = self._bytes(numel * dtype.itemsize).view(_NUMPY[dtype])[:numel]
        self.bytes += array.nbytes
        return Lent(array, array.ctypes.data)

    def begin_pass(self) -> None:
        """A forward pass begins: give back what the last ones left lying."""
        self._pass += 1
        self._drop(self._pass - _MOST_PASSES)

    def begin_phase(self) -> None:
        """Other buffers will be wanted, the model is evaluated now or frozen further: give back the free ones.

        They stay where phases are so short that they will be wanted again.
        """
        if self._pass - self._phase > _MOST_PASSES:
            self.release()
        self._phase = self._pass

    def release(self) -> None:
        """Give the memory of the free buffers back to the system."""
        self._drop(self._pass + 1)

    def give_back(self, piece: Piece, lent: Lent) -> None:
        """Put a buffer on its shelf."""
        self._free[piece].append((self._pass, lent))

    def _bytes(self, n: int) -> np.ndarray[Any, Any]:
        n = -(-n // _ALIGNMENT) * _ALIGNMENT
        if n >= _PIECE // 2:
            return _huge_pages(n)[:n]
        is_small = n < _SMALL
        rest = self._rests[is_small]
        if n > len(rest):
            rest = _huge_pages(_PIECE)
        self._rests[is_small] = rest[n:]
        return rest[:n]

    def _drop(self, before: int) -> None:
        """Forget the free buffers that came back before that pass."""
        for key, shelf in list(self._free.items()):
            n_old = next((n for n, (at, _) in enumerate(shelf) if at >= before), len(shelf))
            if n_old:
                self.bytes -= sum(lent.array.nbytes for _, lent in shelf[:n_old])
                del shelf[:n_old]
            if not shelf:
                del self._free[key]


class _Lease:
    """A buffer on loan; it goes back to its shelf when nothing refers to the lease any more."""

    def __init__(self, lent: Lent, piece: Piece, pool: Pool) -> None:
        self._lent, self._piece, self._pool = lent, piece, pool
        self.__array_interface__ = lent.array.__array_interface__

    def __del__(self) -> None:
        self._pool.give_back(self._piece, self._lent)


def _huge_pages(n_bytes: int) -> np.ndarray[Any, Any]:
    """Memory that goes back to the system when nothing refers to any of it."""
    n_bytes = -(-n_bytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, n_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, dtype=np.uint8)
    start = -raw.ctypes.data % _HUGE_PAGE
    return raw[start : start + n_bytes]

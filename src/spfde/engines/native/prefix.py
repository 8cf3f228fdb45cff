"""The prefix cache: what a frozen front made of each sample, so that its forward pass is done once for many epochs.

A frozen front computes a fixed function. As long as a sample comes in one of K augmented variants, its output for that
variant can be kept and read back. Kept are half-precision numbers or bytes with one scale a sample; both round, and
what is read is always what was rounded, in the epoch that fills the cache too, so that a resumed run goes on alike.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spfde.engines.prefix_cache import Precision, PrefixCache

_LARGEST_HALF = 65504.0
# Batches that fill slots are a multiple of this, where they can be: fewer sizes to make kernels ready for.
_MULTIPLE = 16


class OutputStore:
    """Values by slot; a slot is one variant of one sample.

    Args:
        slots: how many there are.
        shapes: of the front's outputs for one sample.
        precision: "fp16", or "int8" with a scale for each sample and output.
        folder: where a file is memory-mapped; None: in memory. Memory and disk are taken as slots are filled.
    """

    def __init__(
        self, slots: int, shapes: Sequence[tuple[int, ...]], precision: Precision = "fp16", folder: Path | None = None
    ) -> None:
        self.shapes, self.precision = [tuple(shape) for shape in shapes], precision
        self._have = torch.zeros(slots, dtype=torch.bool)
        self._file = None if folder is None else tempfile.TemporaryDirectory(prefix="spfde-prefix-", dir=folder)
        kind = np.float16 if precision == "fp16" else np.int8
        self._values = [self._array(f"{i}", (slots, math.prod(shape)), kind) for i, shape in enumerate(self.shapes)]
        self._scales = [np.ones(slots, dtype=np.float32) for _ in self.shapes]

    @staticmethod
    def bytes_per_slot(shapes: Sequence[tuple[int, ...]], precision: Precision) -> int:
        """Memory of one slot."""
        each = 2 if precision == "fp16" else 1
        return sum(math.prod(shape) * each + 4 for shape in shapes)

    def has(self, slots: Tensor) -> Tensor:
        """Which of these slots are filled, bool like ``slots``."""
        return self._have[slots]

    def put(self, slots: Tensor, values: Sequence[Tensor]) -> None:
        """Fill slots [N] with values [N, …], one tensor for each of the shapes."""
        at = slots.numpy()
        for store, scales, value in zip(self._values, self._scales, values, strict=True):
            flat = value.detach().reshape(len(slots), -1).float()
            if self.precision == "fp16":
                store[at] = flat.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16).numpy()
            else:
                scale = flat.abs().amax(1).div_(127.0)
                scales[at] = scale.numpy()
                store[at] = (flat / scale.clamp_min(1e-30)[:, None]).round_().to(torch.int8).numpy()
        self._have[slots] = True

    def get(self, slots: Tensor) -> list[Tensor]:
        """What lies in slots [N], as float32 [N, …]."""
        at, found = slots.numpy(), []
        for store, scales, shape in zip(self._values, self._scales, self.shapes, strict=True):
            value = torch.from_numpy(np.asarray(store[at])).to(torch.float32)
            if self.precision == "int8":
                value *= torch.from_numpy(scales[at])[:, None]
            found.append(value.view(len(slots), *shape))
        return found

    def empty(self) -> None:
        """Nothing is filled any more; the place stays."""
        self._have.zero_()

    def close(self) -> None:
        """Give the memory or the file back."""
        self._values = []
        if self._file is not None:
            self._file.cleanup()
            self._file = None

    def _array(self, name: str, shape: tuple[int, int], kind: type) -> Any:
        if self._file is None:
            return np.empty(shape, dtype=kind)
        return np.memmap(Path(self._file.name) / name, dtype=kind, mode="w+", shape=shape)


class CachedPrefix:
    """Runs a frozen front through its cache.

    Args:
        n_samples: of the data set.
        wanted: what is to be kept. Where its limit is too small for all variants there are fewer, and with room for
            none the front is computed.
    """

    def __init__(self, n_samples: int, wanted: PrefixCache) -> None:
        self.n_samples, self._wanted = n_samples, wanted
        self.store: OutputStore | None = None
        self.variants = wanted.variants

    def clear(self) -> None:
        """Forget everything: the front is another one."""
        if self.store is not None:
            self.store.close()
        self.store, self.variants = None, self._wanted.variants

    def forget(self) -> None:
        """The front computes something else: what is kept is wrong."""
        if self.store is not None:
            self.store.empty()

    def make_room(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Take the place that the front's outputs need, for as many variants as the limit allows."""
        wanted = self._wanted
        if self.store is None and self.variants:
            each = OutputStore.bytes_per_slot(shapes, wanted.precision) * self.n_samples
            self.variants = min(wanted.variants, int(wanted.limit_gib * 2**30) // each)
            if self.variants:
                self.store = OutputStore(self.n_samples * self.variants, shapes, wanted.precision, wanted.folder)

    def __call__(self, samples: Tensor, variant: int, compute: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """The front's outputs for a batch.

        Args:
            samples: indices of the samples in the data set, [N].
            variant: which of each, below ``variants``.
            compute: gives the outputs of the samples at these positions of the batch.
        """
        assert self.store is not None, "make_room() comes first"
        slots = samples + variant * self.n_samples
        have = self.store.has(slots)
        missing = (~have).nonzero().flatten()
        if len(missing):
            # Computing some that are there already is cheaper than kernels made ready for every size of batch.
            more = min(-len(missing) % _MULTIPLE, len(samples) - len(missing))
            at = torch.cat([missing, have.nonzero().flatten()[:more]]).sort().values
            self.store.put(slots[at], compute(at))
        return self.store.get(slots)

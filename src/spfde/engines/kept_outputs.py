"""The prefix cache: what a frozen front made of each sample, so that its forward pass is done once for many epochs.

A frozen front computes a fixed function. As long as a sample comes in one of K augmented variants, its output for that
variant can be kept and read back. Kept are half-precision numbers or bytes with one scale a sample; both round, and
what is read is always what was rounded, in the epoch that fills the cache too, so that a resumed run goes on alike.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spfde.core.errors import UsageError
from spfde.core.torch_private import norm_each, version_of
from spfde.engines.prefix_cache import Precision, PrefixCache

_LARGEST_HALF = 65504.0
_SCALE_BYTES = 4
_ON_CPU = torch.device("cpu")


def encode(values: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Rows of numbers as they are kept.

    Args:
        values: floating-point, [N, numbers].
        precision: "fp16" or "int8".

    Returns:
        float16 or int8 [N, numbers], and a scale for each row, float32 [N]; 1 in half precision.

    Example:
        >>> rounded, scales = encode(torch.tensor([[0.0, 1.0, -127.0, 63.5]]), "int8")
        >>> rounded.tolist(), scales.tolist()
        ([[0, 1, -127, 64]], [1.0])
    """
    values = values.float()
    if precision == "fp16":
        rounded = values.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16)
        return rounded, torch.ones(len(values), device=values.device)
    scales = values.abs().amax(1).div_(127.0)
    return (values / scales.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scales


class OutputStore:
    """Values by slot; a slot is one variant of one sample.

    Args:
        slots: how many there are.
        shapes: of the front's outputs for one sample.
        precision: "fp16", or "int8" with a scale for each sample and output.
        folder: where a file is memory-mapped; None: in memory. In main memory and on disk room is taken as slots are
            filled, on an accelerator at once.
        dtypes: of the outputs; by default all float32. Other than floating-point ones are kept as they are.
        device: where it lies. Values may come from another device, and are read to where they came from.
    """

    def __init__(
        self,
        slots: int,
        shapes: Sequence[tuple[int, ...]],
        precision: Precision = "fp16",
        folder: Path | None = None,
        *,
        dtypes: Sequence[torch.dtype] | None = None,
        device: torch.device = _ON_CPU,
    ) -> None:
        self.shapes, self.precision, self.device = [tuple(shape) for shape in shapes], precision, device
        self._have = torch.zeros(slots, dtype=torch.bool)
        self._file = None if folder is None else tempfile.TemporaryDirectory(prefix="spfde-prefix-", dir=folder)
        #: As the outputs came last, for reading: under autocast they may be of another type.
        self._dtypes = list(dtypes or [torch.float32] * len(self.shapes))
        self._came_from = device
        #: In which order the dimensions of each lie, the farthest apart first: kept as they come first.
        self._orders: list[tuple[int, ...]] = []
        self._values = [
            self._room(f"{i}", (slots, math.prod(shape)), _kept_as(dtype, precision))
            for i, (shape, dtype) in enumerate(zip(self.shapes, self._dtypes, strict=True))
        ]
        self._scales = [torch.ones(slots, device=device) for _ in self.shapes]

    @staticmethod
    def bytes_per_slot(
        shapes: Sequence[tuple[int, ...]], precision: Precision, dtypes: Sequence[torch.dtype] | None = None
    ) -> int:
        """Memory of one slot."""
        kinds = dtypes or [torch.float32] * len(shapes)
        sizes = [_kept_as(dtype, precision).itemsize for dtype in kinds]
        return sum(math.prod(shape) * each + _SCALE_BYTES for shape, each in zip(shapes, sizes, strict=True))

    @property
    def n_bytes(self) -> int:
        """Memory of all slots."""
        return sum(tensor.nbytes for tensor in (*self._values, *self._scales))

    def has(self, slots: Tensor) -> Tensor:
        """Which of these slots are filled, bool like ``slots``, which lie in main memory."""
        return self._have[slots]

    def put(self, slots: Tensor, values: Sequence[Tensor]) -> None:
        """Fill slots [N] with values [N, …], one tensor for each of the shapes.

        It waits for values that lie on another device.
        """
        at = moved(slots, self.device)
        self._orders = self._orders or [_order(value) for value in values]
        for number, (store, scales, value) in enumerate(zip(self._values, self._scales, values, strict=True)):
            flat = value.detach().permute(0, *self._orders[number]).reshape(len(slots), -1)
            if value.is_floating_point():
                flat, scale = encode(flat, self.precision)
                if self.precision == "int8":
                    scales.index_copy_(0, at, scale.to(self.device))
            store.index_copy_(0, at, flat.to(self.device))
            self._dtypes[number], self._came_from = value.dtype, value.device
        self._have[slots] = True

    def get(self, slots: Tensor) -> list[Tensor]:
        """What lies in slots [N]: [N, …], of the types and on the device that the values had. It waits for nothing."""
        at, found = moved(slots, self.device), []
        kept = zip(self._values, self._scales, self.shapes, self._dtypes, self._orders, strict=True)
        for store, scales, shape, dtype, order in kept:
            value = moved(store.index_select(0, at), self._came_from)
            if dtype.is_floating_point and self.precision == "int8":
                value = value.float() * moved(scales.index_select(0, at), self._came_from)[:, None]
            lying = value.to(dtype).view(len(slots), *(shape[dim - 1] for dim in order))
            found.append(lying.permute(0, *(1 + order.index(dim) for dim in range(1, 1 + len(shape)))))
        return found

    def empty(self) -> None:
        """Nothing is filled any more; the place stays."""
        self._have.zero_()
        self._orders = []

    def close(self) -> None:
        """Give the memory or the file back."""
        self._values, self._scales = [], []
        if self._file is not None:
            self._file.cleanup()
            self._file = None

    def _room(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self._file is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(np.memmap(Path(self._file.name) / name, dtype=kind, mode="w+", shape=shape))


def _order(value: Tensor) -> tuple[int, ...]:
    strides = value.stride()
    return tuple(sorted(range(1, value.dim()), key=lambda dim: -strides[dim]))


def _kept_as(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    if not dtype.is_floating_point:
        return dtype
    return torch.float16 if precision == "fp16" else torch.int8


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. From main memory it goes by way of memory that the GPU reads itself: no one waits."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class CachedPrefix:
    """Runs a frozen front through its cache.

    Args:
        n_samples: of the data set.
        wanted: what is to be kept. Where its limit is too small for all variants there are fewer, and with room for
            none the front is computed.
        place: says, for a number of bytes, on which device they are to lie.
        multiple: batches that fill slots are a multiple of this, where they can be: fewer sizes to make kernels ready
            for.
    """

    def __init__(
        self,
        n_samples: int,
        wanted: PrefixCache,
        *,
        place: Callable[[int], torch.device] = lambda size: _ON_CPU,
        multiple: int = 16,
    ) -> None:
        self.n_samples, self._wanted, self._place, self._multiple = n_samples, wanted, place, multiple
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

    def make_room(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype] | None = None) -> None:
        """Take the place that the front's outputs need, for as many variants as the limit allows."""
        wanted = self._wanted
        if self.store is None and self.variants:
            each = OutputStore.bytes_per_slot(shapes, wanted.precision, dtypes) * self.n_samples
            self.variants = min(wanted.variants, int(wanted.limit_gib * 2**30) // each)
            if self.variants:
                self.store = OutputStore(
                    self.n_samples * self.variants,
                    shapes,
                    wanted.precision,
                    wanted.folder,
                    dtypes=dtypes,
                    device=self._place(each * self.variants),
                )

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
            more = min(-len(missing) % self._multiple, len(samples) - len(missing))
            at = torch.cat([missing, have.nonzero().flatten()[:more]]).sort().values
            self.store.put(slots[at], compute(at))
        return self.store.get(slots)


class FrozenNumbers:
    """Tells whether frozen layers have other numbers than at the last look: loading gives them others.

    Args:
        model: the model.
        frozen: names of its frozen parameters; the buffers beside them count, too.
    """

    def __init__(self, model: nn.Module, frozen: Collection[str]) -> None:
        self._model, self._frozen = model, frozen
        self._look()

    def are_the_same(self) -> bool:
        """Are all numbers those of the last look? It waits for the device."""
        before = self._norms
        self._look()
        return (before is None) == (self._norms is None) and (
            before is None or self._norms is None or torch.equal(before, self._norms)
        )

    def may_differ(self) -> bool:
        """Was any of these tensors written into since? What is done by way of ``.data`` is not seen."""
        return self._versions != [version_of(number) for number in self._seen]

    def _numbers(self) -> list[Tensor]:
        owners = {name.rpartition(".")[0] for name in self._frozen}
        buffers = [kept for name, kept in self._model.named_buffers() if name.rpartition(".")[0] in owners]
        numbers = [self._model.get_parameter(name) for name in sorted(self._frozen)] + buffers
        return [number for number in numbers if number.is_floating_point()]

    def _look(self) -> None:
        self._seen = self._numbers()
        self._versions = [version_of(number) for number in self._seen]
        with torch.no_grad():
            self._norms = torch.stack(norm_each(self._seen)) if self._seen else None


def check_batch(samples: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` where a model's inputs are no batch of the samples that were announced."""
    if not all(isinstance(value, Tensor) and len(value) == len(samples) for value in (*args, *kwargs.values())):
        raise UsageError(
            f"The prefix cache was told of {len(samples)} samples, and the model was called with other inputs than "
            "a batch of as many. Call session.augmentation_seeds() once before each forward pass in training mode."
        )

"""The gradients of many parameters in one piece of memory: masked by one kernel, copied by another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spfde.core.torch_private import copy_each_

_ALIGNED = 64  # elements: where a tensor starts, so that kernels read it in whole vectors


@dataclass(frozen=True)
class _Place:
    """Where a gradient lies: laid out like its parameter."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride, self.start)


class FlatGradients:
    """Lays gradients out one after another, those of one dtype together.

    Args:
        parameters: by name; their gradients are laid out like them, so that ``.grad`` takes them as they are.
        masked: names of those of which some entries are set to zero.
    """

    def __init__(self, parameters: Mapping[str, Tensor], masked: Collection[str]) -> None:
        self._places: dict[str, _Place] = {}
        self._by_dtype: dict[torch.dtype, list[str]] = {}
        sizes: dict[torch.dtype, int] = {}
        for name, parameter in parameters.items():
            like = torch.empty_like(parameter, device="meta")
            start = sizes.get(parameter.dtype, 0)
            self._places[name] = _Place(tuple(like.shape), like.stride(), start)
            self._by_dtype.setdefault(parameter.dtype, []).append(name)
            sizes[parameter.dtype] = start + -(-like.numel() // _ALIGNED) * _ALIGNED
        self._sizes = sizes
        self._device = next(iter(parameters.values())).device
        self.masked = frozenset(masked) & self._places.keys()
        self._idle = {
            dtype: torch.zeros(sizes[dtype], dtype=torch.bool, device=self._device)
            for dtype, names in self._by_dtype.items()
            if self.masked.intersection(names)
        }
        self._seen: dict[str, Tensor] = {}

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Take over masks that are others than before; what was recorded reads them from now on."""
        for name in self.masked:
            if self._seen.get(name) is not masks[name]:
                self._seen[name] = masks[name]
                dtype = next(dtype for dtype, names in self._by_dtype.items() if name in names)
                self._places[name].of(self._idle[dtype]).copy_(~masks[name])

    def gather(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Masked copies of all gradients, one tensor a dtype."""
        found = []
        for dtype, names in self._by_dtype.items():
            flat = torch.empty(self._sizes[dtype], dtype=dtype, device=self._device)
            copy_each_([self._places[name].of(flat) for name in names], [gradients[name] for name in names])
            if dtype in self._idle:
                flat.masked_fill_(self._idle[dtype], 0)
            found.append(flat)
        return found

    def split(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """The gradients by name, in memory of their own: views of a copy."""
        found = {}
        for names, flat in zip(self._by_dtype.values(), flats, strict=True):
            copy = flat.clone()
            found.update({name: self._places[name].of(copy) for name in names})
        return found

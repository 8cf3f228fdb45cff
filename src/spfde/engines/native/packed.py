"""The weights as the kernels read them, kept in step with the masks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from spfde.engines.native.fusion import ConvStep
from spfde.engines.native.geometry import Geometry, GradientShape, Vectors, forward_shape, gradient_shape
from spfde.engines.native.layout import Layout
from spfde.engines.native.lists import Entries, Reads, Weights, forward_entries, gradient_entries, weight_entries

# Of a window, what a tile of the gradient of the weight may read of a chunk.
_WEIGHT_CHUNK = 40_000

# Layouts for which a convolution's lists are kept; tapes hold those that they read.
_MOST_LAYOUTS = 32

# Name, shape and strides of the convolution, layouts of the input and the output.
_Key = tuple[str, Geometry, tuple[int, ...], Layout, Layout]


class WeightLists:
    """The lists of one convolution for one mask and one pair of layouts, each made when it is first wanted.

    Args:
        step: the convolution.
        mask: bool, of its weight; None: all weights are active.
        source, target: the layouts.
        vectors: what the kernels were compiled for.
    """

    def __init__(self, step: ConvStep, mask: Tensor | None, source: Layout, target: Layout, vectors: Vectors) -> None:
        strides, self._geometry = step.module.weight.stride(), step.geometry
        self._layouts, self._vectors = (source, target), vectors
        active = np.ones(tuple(step.module.weight.shape), bool) if mask is None else mask.numpy()
        if active.ndim == 2:
            active, strides = active[:, :, None, None], (*strides, 0, 0)
        half = source.dtype == torch.bfloat16
        self._weights = Weights.of(step.geometry, active, strides)
        self._reads = Reads(vectors.lanes, pairs=half and vectors.pairs, is_stored=not half)

    @functools.cached_property
    def forward(self) -> Entries:
        """Of the forward pass."""
        shape = forward_shape(self._geometry, *self._layouts, self._vectors)
        return forward_entries(self._geometry, self._weights, shape, self._reads)

    @functools.cached_property
    def gradient(self) -> tuple[Entries, ...]:
        """Of the gradient of the input, by residue."""
        return gradient_entries(self._geometry, self._weights, self._back, self._reads)

    @functools.cached_property
    def weight(self) -> Entries:
        """Of the gradient of the weight."""
        geometry, source, (rows, _) = self._geometry, self._back.source, self._back.weight
        tile_bytes = ((rows - 1) * geometry.stride + geometry.spans[0]) * source.span * self._layouts[0].itemsize
        per_chunk = max(8, _WEIGHT_CHUNK // tile_bytes)
        return weight_entries(geometry, self._weights, source, self._vectors.lanes, per_chunk)

    @property
    def _back(self) -> GradientShape:
        return gradient_shape(self._geometry, *self._layouts, self._vectors)

    def like(self, other: WeightLists) -> WeightLists:
        """Make the lists that the other one has made."""
        for name in ("forward", "gradient", "weight"):
            if name in vars(other):
                getattr(self, name)
        return self


class PackedWeights:
    """Lists by convolution, built anew when the mask of a layer is another.

    Args:
        masks: gives the masks by parameter name; a mask that changes is replaced by another tensor.
        dense_gradients: gives the names of the parameters whose next gradient must be dense.
        masked_already: told of gradients that come masked; see ``engines.base.Parts``.
        vectors: what the kernels were compiled for.

    Attributes:
        version: another number whenever a mask is another one.
    """

    def __init__(
        self,
        masks: Callable[[], Mapping[str, Tensor]],
        dense_gradients: Callable[[], frozenset[str]],
        masked_already: Callable[[Mapping[str, Tensor]], None],
        vectors: Vectors,
    ) -> None:
        self._masks, self._dense_gradients, self.vectors = masks, dense_gradients, vectors
        self._masked_already = masked_already
        self._built: dict[_Key, tuple[ConvStep, Tensor | None, WeightLists]] = {}
        self._dense: dict[_Key, Entries] = {}
        self._current: dict[str, Tensor] = {}
        self.version = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the masks again; call it before a forward pass."""
        before, self._current = self._current, dict(self._masks())
        same = before.keys() == self._current.keys() and all(
            mask is before[name] for name, mask in self._current.items()
        )
        self.version += not same

    def mask_of(self, step: ConvStep) -> Tensor | None:
        """The current mask of a convolution; None where it has none."""
        return self._current.get(f"{step.name}.weight")

    def announce(self, gradients: Mapping[str, Tensor]) -> None:
        """These gradients, by parameter name, are of the active weights alone: a backward pass hands them over."""
        now = self._masks()
        alike = {name: found for name, found in gradients.items() if now.get(name) is self._current.get(name)}
        if alike:
            self._masked_already(alike)

    def dense_among(self, convolutions: Sequence[str]) -> frozenset[str]:
        """Which of them have a weight whose next gradient must be dense."""
        dense = self._dense_gradients()
        return frozenset(name for name in convolutions if f"{name}.weight" in dense) if dense else frozenset()

    def lists_of(self, step: ConvStep, source: Layout, target: Layout) -> WeightLists:
        """The lists of a convolution for its current mask."""
        mask = self.mask_of(step)
        key = _key(step, source, target)
        have = self._built.pop(key, None)
        if have is None or have[1] is not mask:
            have = (step, mask, WeightLists(step, mask, source, target, self.vectors))
        self._built[key] = have  # as the last that was wanted
        alike = [other for other in self._built if other[0] == step.name]
        if len(alike) > _MOST_LAYOUTS:
            del self._built[alike[0]]
        return have[2]

    def rebuild(self) -> None:
        """Make every list anew that was made so far."""
        built, self._built = self._built, {}
        for (*_, source, target), (step, _, lists) in built.items():
            self.lists_of(step, source, target).like(lists)

    def gradient_entries(self, step: ConvStep, source: Layout, target: Layout) -> Entries:
        """The entries whose gradient is wanted: the active ones, or all where a mutation asks for them."""
        if f"{step.name}.weight" not in self._dense_gradients():
            return self.lists_of(step, source, target).weight
        key = _key(step, source, target)
        if key not in self._dense:
            self._dense[key] = WeightLists(step, None, source, target, self.vectors).weight
        return self._dense[key]


def _key(step: ConvStep, source: Layout, target: Layout) -> _Key:
    """What the lists depend on besides the mask: not the number of images."""
    strides = step.module.weight.stride()
    return step.name, step.geometry, strides, dataclasses.replace(source, batch=0), dataclasses.replace(target, batch=0)

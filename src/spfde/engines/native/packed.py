"""The weights as the kernels read them, kept in step with the masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from spfde.engines.native.fusion import ConvStep
from spfde.engines.native.geometry import Geometry, Vectors, forward_shape, gradient_shape
from spfde.engines.native.layout import Layout
from spfde.engines.native.lists import Entries, Reads, Weights, forward_entries, gradient_entries, weight_entries

# What a chunk of the scratch may take. The first-level cache (32 KiB or more) should hold it beside the lists
# themselves, which are long where many weights are active; where few are, a chunk needs more channels to give a row of
# the weight something to do.
_LEAST_CHUNK, _MOST_CHUNK, _CHUNK_TIMES_DENSITY = 16_000, 150_000, 3_600
# Of a window, what a tile of the gradient of the weight may read of a chunk.
_WEIGHT_CHUNK = 40_000

# Name, shape and strides of the convolution, layouts of the input and the output.
_Key = tuple[str, Geometry, tuple[int, ...], Layout, Layout]


@dataclasses.dataclass(frozen=True)
class WeightLists:
    """The lists of one convolution for one mask and one pair of layouts: forward, and back to the input by residue."""

    forward: Entries
    gradient: tuple[Entries, ...]
    weight: Entries


class PackedWeights:
    """Lists by convolution, built anew when the mask of a layer is another.

    Args:
        masks: gives the masks by parameter name; a mask that changes is replaced by another tensor.
        dense_gradients: gives the names of the parameters whose next gradient must be dense.
        vectors: what the kernels were compiled for.

    Attributes:
        version: another number whenever a mask is another one.
    """

    def __init__(
        self,
        masks: Callable[[], Mapping[str, Tensor]],
        dense_gradients: Callable[[], frozenset[str]],
        vectors: Vectors,
    ) -> None:
        self._masks, self._dense_gradients, self.vectors = masks, dense_gradients, vectors
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

    def dense_among(self, convolutions: Sequence[str]) -> frozenset[str]:
        """Which of them have a weight whose next gradient must be dense."""
        dense = self._dense_gradients()
        return frozenset(name for name in convolutions if f"{name}.weight" in dense) if dense else frozenset()

    def lists_of(self, step: ConvStep, source: Layout, target: Layout) -> WeightLists:
        """The lists of a convolution for its current mask."""
        mask = self.mask_of(step)
        key = _key(step, source, target)
        have = self._built.get(key)
        if have is None or have[1] is not mask:
            have = self._built[key] = (step, mask, self._build(step, mask, source, target))
        return have[2]

    def rebuild(self) -> None:
        """Make every list anew that was made so far."""
        built, self._built = self._built, {}
        for (*_, source, target), (step, *_) in built.items():
            self.lists_of(step, source, target)

    def gradient_entries(self, step: ConvStep, source: Layout, target: Layout) -> Entries:
        """The entries whose gradient is wanted: the active ones, or all where a mutation asks for them."""
        if f"{step.name}.weight" not in self._dense_gradients():
            return self.lists_of(step, source, target).weight
        key = _key(step, source, target)
        if key not in self._dense:
            self._dense[key] = self._build(step, None, source, target).weight
        return self._dense[key]

    def _build(self, step: ConvStep, mask: Tensor | None, source: Layout, target: Layout) -> WeightLists:
        strides, geometry, vectors = step.module.weight.stride(), step.geometry, self.vectors
        active = np.ones(tuple(step.module.weight.shape), bool) if mask is None else mask.numpy()
        if active.ndim == 2:
            active, strides = active[:, :, None, None], (*strides, 0, 0)
        density = np.count_nonzero(active) / active.size
        most = _MOST_CHUNK if density == 0 else int(_CHUNK_TIMES_DENSITY / density)
        room = min(_MOST_CHUNK, max(_LEAST_CHUNK, most))
        weights = Weights.of(geometry, active, strides)
        half = source.dtype == torch.bfloat16
        reads = Reads(vectors.lanes, pairs=half and vectors.pairs, is_stored=not half, room=room)
        forward = forward_shape(geometry, source, target, vectors)
        back = gradient_shape(geometry, source, target, vectors)
        window = back.source
        tile_bytes = ((back.weight[0] - 1) * geometry.stride + geometry.spans[0]) * window.span * source.itemsize
        per_chunk = max(8, _WEIGHT_CHUNK // tile_bytes)
        return WeightLists(
            forward_entries(geometry, weights, forward, reads),
            gradient_entries(geometry, weights, back, reads),
            weight_entries(geometry, weights, window, vectors.lanes, per_chunk),
        )


def _key(step: ConvStep, source: Layout, target: Layout) -> _Key:
    """What the lists depend on besides the mask: not the number of images."""
    strides = step.module.weight.stride()
    return step.name, step.geometry, strides, dataclasses.replace(source, batch=0), dataclasses.replace(target, batch=0)

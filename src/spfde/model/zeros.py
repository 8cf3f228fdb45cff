"""Where the zeros of a parameter are zeros of what is computed from it.

A weight times a scale keeps them, a weight minus its mean does not. A sum keeps the zeros that both its terms have at
the same place: a weight that is flipped or transposed has as many, but at other places, so that a weight plus its
transpose has fewer. So it is known of each place which element of the parameter it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spfde.core.torch_private import storage_id

Index = tuple[npt.NDArray[np.int64], ...]  # of several elements of a tensor, dimension by dimension
Places = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""From positions in a storage to those in the parameter's; ``_NOWHERE`` for elements that do not come from it."""

_NOWHERE = -1
_COMPARED_AT_MOST = 1 << 16  # elements: all of a smaller tensor, random ones of a larger

# Zeros of the first argument are zeros of the result, wherever they are.
_KEEP_ZEROS = frozenset(
    {"_to_copy", "_unsafe_view", "_weight_norm_interface", "abs", "asinh", "atan", "ceil", "clone", "contiguous", "div"}
    | {"elu", "erf", "expm1", "fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine", "flip", "floor"}
    | {"gelu", "leaky_relu", "neg", "relu", "repeat", "reshape", "roll", "round", "sgn", "sign", "silu", "sin", "sinh"}
    | {"sqrt", "square", "tan", "tanh", "true_divide", "trunc"}
)


class Zeros:
    """Whose zeros are where in the tensors of a forward pass. Tensors are told by their storage, which must stay alive.

    Args:
        owners: the parameter's name by storage.
    """

    def __init__(self, owners: Mapping[int, str]) -> None:
        self._places: dict[int, dict[str, Places]] = {key: {name: _own} for key, name in owners.items()}

    def of(self, tensor: Tensor) -> Mapping[str, Places]:
        """The parameters whose zeros are zeros of a tensor, or of what it is a view of."""
        return self._places.get(storage_id(tensor), {})

    def note(self, operation: str, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> None:
        """Work out which zeros an operation keeps, by its name in ATen."""
        bare = operation.rpartition(".")[2]
        bare = bare if bare.startswith("_") and not bare.endswith("_") else bare.removesuffix("_")
        # All before any: an output may be an argument that was written to.
        kept = [self._kept(bare, args, kwargs, out) for out in outputs]
        for out, places in zip(outputs, kept, strict=True):
            self._places[storage_id(out)] = places

    def _kept(self, bare: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> dict[str, Places]:
        if bare in ("mul", "add", "sub"):
            return self._of_two(bare, args[0], args[1], out)
        if bare in ("cat", "stack"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
            return self._joined(args[0], dim, out, stacked=bare == "stack")
        if bare in ("clamp", "clamp_min", "clamp_max", "hardtanh"):
            low, high = _limits(bare, args, kwargs)
            keeps = low <= 0 <= high
        elif bare == "pow":
            keeps = isinstance(args[1], (int, float)) and args[1] > 0
        elif bare == "masked_fill":
            keeps = not isinstance(args[2], Tensor) and args[2] == 0
        else:
            keeps = bare in _KEEP_ZEROS or bare == "copy"
        return self._through(args[1 if bare == "copy" else 0], out, _moves(bare, args, kwargs)) if keeps else {}

    def _through(self, value: object, out: Tensor, moves: Callable[[Index], Index] | None = None) -> dict[str, Places]:
        """Each element of ``out`` comes from the one of ``value`` at the same index, or from where it ``moves``."""
        if not isinstance(value, Tensor):
            return {}
        if moves is None and not _broadcasts(value, out):
            if value.numel() != out.numel():
                return {}
            moves = _reshaped(out.shape, value.shape)
        if moves is None and _lie_alike(value, out):
            return dict(self.of(value))
        return {name: _composed(places, value, out, moves) for name, places in self.of(value).items()}

    def _of_two(self, bare: str, first: object, second: object, out: Tensor) -> dict[str, Places]:
        one, other = self._through(first, out), self._through(second, out)
        if bare == "mul":
            return other | one
        return {name: places for name, places in one.items() if name in other and _equal(places, other[name], out)}

    def _joined(self, parts: Sequence[Tensor], dim: int, out: Tensor, *, stacked: bool) -> dict[str, Places]:
        """Of each parameter, the places in the parts that come from it."""
        sizes = [1 if stacked else part.shape[dim] if part.dim() == out.dim() else 0 for part in parts]
        ends = np.cumsum(sizes)
        names = dict.fromkeys(name for part in parts for name in self.of(part))
        return {name: _of_part([self.of(part).get(name) for part in parts], parts, ends, dim, out) for name in names}


def _own(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return positions


def _composed(places: Places, value: Tensor, out: Tensor, moves: Callable[[Index], Index] | None) -> Places:
    def through(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        index = _index_of(out, positions)
        return places(_positions(value, index if moves is None else moves(index)))

    return through


def _of_part(
    places: Sequence[Places | None], parts: Sequence[Tensor], ends: npt.NDArray[np.int64], dim: int, out: Tensor
) -> Places:
    def through(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        index = _index_of(out, positions)
        found = np.full_like(positions, _NOWHERE)
        part_of = np.searchsorted(ends, index[dim], side="right")
        for number, (own, part) in enumerate(zip(places, parts, strict=True)):
            if own is None:
                continue
            here = part_of == number
            within = tuple(axis[here] for axis in index)
            if part.dim() < out.dim():  # stacked
                within = within[:dim] + within[dim + 1 :]
            else:
                start = ends[number] - part.shape[dim]
                within = (*within[:dim], within[dim] - start, *within[dim + 1 :])
            found[here] = own(_positions(part, within))
        return found

    return through


def _equal(one: Places, other: Places, out: Tensor) -> bool:
    """Whether both say the same of all elements of ``out``."""
    if one is other:
        return True
    count = out.numel()
    whole = count <= _COMPARED_AT_MOST
    flat = np.arange(count) if whole else np.random.default_rng(0).integers(0, count, _COMPARED_AT_MOST)
    positions = _positions(out, _unravelled(flat, out.shape))
    return bool(np.array_equal(one(positions), other(positions)))


def _moves(bare: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[Index], Index] | None:
    """For an operation that moves elements: from an index of the result to the argument's."""
    if bare not in ("flip", "roll", "repeat"):
        return None
    shape = args[0].shape
    if bare == "repeat":
        return lambda index: _each(index[len(index) - len(shape) :], shape, lambda axis, size, _: axis % size)
    if bare == "flip":
        flipped = {dim % len(shape) for dim in _listed(kwargs.get("dims", args[1]))}
        return lambda index: _each(index, shape, lambda axis, size, dim: size - 1 - axis if dim in flipped else axis)
    shifts = _listed(kwargs.get("shifts", args[1] if len(args) > 1 else ()))
    dims = _listed(kwargs.get("dims", args[2] if len(args) > 2 else ()))
    if not dims:  # over all elements in their order
        return lambda index: _unravelled((_ravelled(index, shape) - shifts[0]) % args[0].numel(), shape)
    by = [0] * len(shape)
    for dim, shift in zip(dims, shifts, strict=True):
        by[dim] += shift
    return lambda index: _each(index, shape, lambda axis, size, dim: (axis - by[dim]) % size)


def _each(index: Index, shape: Sequence[int], move: Callable[[Any, int, int], Any]) -> Index:
    """``move(positions, size, dimension)`` for each dimension of an index."""
    return tuple(move(axis, size, dim) for dim, (axis, size) in enumerate(zip(index, shape, strict=True)))


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _reshaped(shape: Sequence[int], before: Sequence[int]) -> Callable[[Index], Index]:
    return lambda index: _unravelled(_ravelled(index, shape), before)


def _broadcasts(value: Tensor, out: Tensor) -> bool:
    """Whether a tensor is broadcast to the shape of ``out``, or has it."""
    missing = out.dim() - value.dim()
    return missing >= 0 and all(own in (1, size) for own, size in zip(value.shape, out.shape[missing:], strict=True))


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())


def _positions(tensor: Tensor, index: Index) -> npt.NDArray[np.int64]:
    """In its storage, of the elements at an index of what it is broadcast to."""
    found = np.full(index[0].shape if index else (1,), tensor.storage_offset(), dtype=np.int64)
    for axis, size, stride in zip(index[len(index) - tensor.dim() :], tensor.shape, tensor.stride(), strict=True):
        if size > 1:
            found += axis * stride
    return found


def _index_of(tensor: Tensor, positions: npt.NDArray[np.int64]) -> Index:
    """Of the elements at these positions of its storage; no two elements share one."""
    index, strides = [np.zeros_like(positions) for _ in tensor.shape], tensor.stride()
    rest = positions - int(tensor.storage_offset())
    for dim in sorted(range(tensor.dim()), key=lambda dim: -strides[dim]):
        if tensor.shape[dim] > 1:
            index[dim], rest = np.divmod(rest, max(strides[dim], 1))
    return tuple(index)


def _ravelled(index: Index, shape: Sequence[int]) -> npt.NDArray[np.int64]:
    flat = np.zeros_like(index[0]) if index else np.zeros(1, dtype=np.int64)
    for axis, size in zip(index, shape, strict=True):
        flat = flat * size + axis
    return flat


def _unravelled(flat: npt.NDArray[np.int64], shape: Sequence[int]) -> Index:
    index = []
    for size in reversed(shape):
        flat, axis = np.divmod(flat, max(size, 1))
        index.append(axis)
    return tuple(reversed(index))


def _limits(clamp: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, float]:
    """Between which values an operation of this name clamps; where a tensor tells, they are not known."""
    names = {"clamp_min": ["min"], "clamp_max": ["max"], "hardtanh": ["min_val", "max_val"]}.get(clamp, ["min", "max"])
    given = dict(zip(names, args[1:], strict=False)) | dict(kwargs)
    if any(isinstance(value, Tensor) for value in given.values()):
        return inf, -inf
    unset = (-1.0, 1.0) if clamp == "hardtanh" else (-inf, inf)
    low, high = (next((given.get(name) for name in names if key in name), None) for key in ("min", "max"))
    return (unset[0] if low is None else low), (unset[1] if high is None else high)

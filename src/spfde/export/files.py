"""Weights in files: dense or compressed, both in the safetensors format, written whole or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spfde.core import json_text
from spfde.core.errors import InvalidArgument, Problem, Problems, UsageError, WeightsFileError
from spfde.core.files import clear_errors, written_whole
from spfde.export.encoding import Encoded, as_bits, decode, encode

# Version of the compressed layout, and the keys of the header's metadata.
_VERSION = "3"
_LAYOUT, _TENSORS, _CHECKSUM = "spfde.compressed", "spfde.tensors", "spfde.checksum"
_REMEDY = "Export it again, or restore it from a copy."


def save_dense(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write the tensors as they are, zeros included: a safetensors file that everything reads.

    Args:
        state_dict: tensors by name. Tied ones are written under each of their names.
        path: the file; an existing one is replaced.

    Raises:
        InvalidArgument: an entry is no tensor that can be stored.
        UsageError: safetensors is not installed.
        WeightsFileError: the file cannot be written.

    Example:
        >>> spfde.export.save_dense(model.state_dict(), "weights.safetensors")
        >>> torch.equal(spfde.export.load("weights.safetensors")["0.weight"], model[0].weight)
        True
    """
    _check_tensors(state_dict)
    # Clones: safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()
    }
    _save(tensors, Path(path), {"format": "pt"})


def save_compressed(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], *, masks: Mapping[str, Tensor] | None = None
) -> None:
    """Write the tensors without their zeros; ``load`` restores them bit for bit.

    The file is a safetensors file with entries ``dense/NAME``, or ``values/NAME`` and ``mask/NAME`` (see ``encode``),
    and a checksum.

    Args:
        state_dict: tensors by name.
        path: the file; an existing one is replaced.
        masks: which weights exist, by name (``session.masks``); outside them zeros lose their sign. Needed only for
            weights that were multiplied by a mask, which makes negative zeros: without masks those are kept.

    Raises:
        InvalidArgument: an entry is no tensor that can be stored, or a mask does not fit its tensor.
        UsageError: safetensors is not installed.
        WeightsFileError: the file cannot be written.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
        >>> spfde.export.save_compressed(model.state_dict(), "weights.safetensors", masks=session.masks)
        >>> loaded = spfde.export.load("weights.safetensors")
        >>> torch.equal(loaded["2.weight"], model[2].weight)
        True
    """
    _check_tensors(state_dict)
    if unknown := sorted(set(masks or {}) - set(state_dict)):
        rule, remedy = "masks tensors that are not in state_dict", "Pass the masks of this model (session.masks)."
        if part := _part_of(state_dict, masks or {}):
            remedy = f"They are of its part '{part}': pass that one's state_dict, such as model.{part}.state_dict()."
        raise InvalidArgument(Problem("masks", unknown, rule, remedy))
    stored: dict[str, Tensor] = {}
    tensors = {}
    for name, tensor in state_dict.items():
        encoded = _encode(name, tensor, (masks or {}).get(name))
        tensors[name] = [encoded.kind, list(encoded.shape)]
        if encoded.kind == "dense":
            stored[f"dense/{name}"] = encoded.values.clone()
        else:
            stored |= {f"values/{name}": encoded.values, f"mask/{name}": encoded.positions}
    layout = json.dumps(tensors)
    _save(stored, Path(path), {_LAYOUT: _VERSION, _TENSORS: layout, _CHECKSUM: _checksum(stored, layout)})


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a file that ``save_dense`` or ``save_compressed`` wrote; see ``inference.load``."""
    safetensors, path = _safetensors(), Path(path)
    if not path.is_file():
        raise WeightsFileError(f"{path}: is no file. Pass one that `spfde export` wrote.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsFileError(f"{path}: is damaged or no safetensors file ({error}). {_REMEDY}") from error
    if _LAYOUT not in metadata:
        return {name: tensor.clone() for name, tensor in stored.items()}
    if metadata[_LAYOUT] != _VERSION:
        rule = f"has layout {metadata[_LAYOUT]}, and this version of spfde reads layout {_VERSION}"
        raise WeightsFileError(f"{path}: {rule}. Read it with the version that wrote it.")
    if metadata.get(_CHECKSUM) != _checksum(stored, metadata.get(_TENSORS, "")):
        raise WeightsFileError(f"{path}: is damaged (its checksum differs from when it was written). {_REMEDY}")
    try:
        layout = json_text.parse(metadata[_TENSORS])
        return decode({name: _found(name, kind, shape, stored) for name, (kind, shape) in layout.items()})
    except (KeyError, ValueError, TypeError, AttributeError, InvalidArgument) as error:
        raise WeightsFileError(f"{path}: is damaged ({error}). {_REMEDY}") from error


def weights_errors(path: Path) -> AbstractContextManager[None]:
    """Turn the system's errors into ``WeightsFileError``."""
    return clear_errors(path, kind=WeightsFileError, again="export it again")


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    safetensors = _safetensors()
    from safetensors.torch import save_file

    with weights_errors(path), written_whole(path) as (draft,):
        try:
            save_file(dict(tensors), draft, metadata=metadata)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise WeightsFileError(f"{path}: cannot be written ({error}).") from error


def _encode(name: str, tensor: Tensor, mask: Tensor | None) -> Encoded:
    try:
        return encode(tensor, mask)
    except InvalidArgument as error:
        raise InvalidArgument(*(replace(problem, argument=f"masks[{name!r}]") for problem in error.problems)) from None


def _part_of(state_dict: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> str | None:
    """The part of a model whose tensors have the names and shapes of the masks; None where there is none."""
    first = next(iter(masks))
    parts = (name.removesuffix(f".{first}") for name in state_dict if name.endswith(f".{first}"))
    for part in parts:
        held = ((state_dict.get(f"{part}.{name}"), mask) for name, mask in masks.items())
        if all(tensor is not None and tensor.shape == mask.shape for tensor, mask in held):
            return part
    return None


def _found(name: str, kind: Any, shape: list[int], stored: Mapping[str, Tensor]) -> Encoded:
    if kind == "dense":
        values = stored[f"dense/{name}"]
        return Encoded("dense", tuple(shape), values, values.new_empty(0, dtype=torch.uint8))
    return Encoded(kind, tuple(shape), stored[f"values/{name}"], stored[f"{kind}/{name}"])


def _checksum(stored: Mapping[str, Tensor], layout: str) -> str:
    """CRC-32 of the table, and of each entry's name, type, shape and sum: any damaged byte shows, at memory's speed."""
    value = zlib.crc32(layout.encode())
    for name in sorted(stored):
        bits = as_bits(stored[name])
        value = zlib.crc32(f"{name} {stored[name].dtype} {list(stored[name].shape)}".encode(), value)
        value = zlib.crc32(np.add.reduce(bits, dtype=bits.dtype).tobytes(), value)
    return f"{value:08x}"


def _check_tensors(state_dict: Mapping[str, Any]) -> None:
    problems = Problems()
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            rule, remedy = "must be a tensor", "Pass model.state_dict()."
            problems.add(f"state_dict[{name!r}]", type(value).__name__, rule, remedy)
        elif value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
            remedy = "Convert it with to_dense() or dequantize(), or leave it out."
            problems.add(f"state_dict[{name!r}]", kind, "must be a strided tensor with values", remedy)
    problems.raise_if_any()


def _safetensors() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise UsageError(
            "weights are written and read with the package safetensors. Install it: pip install 'spfde[export]'."
        ) from error
    return safetensors

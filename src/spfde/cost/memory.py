"""Memory of a training step: modelled from layers, and measured on the machine."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from spfde.cost.flops import LayerCost
from spfde.cost.training import share

Accounting = Literal["paper", "actual"]
"""How memory is counted: as the paper does, or as PyTorch under a mask stores it."""

_BYTES = 4  # the paper's accounting is in fp32, and so are the masked engine's weights


@dataclass(frozen=True)
class MemoryTimeline:
    """Modelled bytes of a training step over the epochs of a run, and the two baselines.

    Attributes:
        per_epoch: one entry an epoch.
        dense: the dense model without freezing.
        sparse: the sparse model at its target density without freezing, "DST methods Min." in the paper's Fig. 4.

    Example:
        >>> run = spfde.cost.MemoryTimeline(per_epoch=(800, 400), dense=1000, sparse=800)
        >>> run.minimum, run.average_of_dense
        (400, 0.6)
    """

    per_epoch: tuple[int, ...]
    dense: int
    sparse: int

    @property
    def minimum(self) -> int:
        """Least of all epochs: once all target layers are frozen."""
        return min(self.per_epoch)

    @property
    def average(self) -> float:
        """Mean over the epochs."""
        return sum(self.per_epoch) / len(self.per_epoch)

    @property
    def minimum_of_dense(self) -> float:
        """Minimum as a share of the dense model's bytes."""
        return self.minimum / self.dense

    @property
    def average_of_dense(self) -> float:
        """Average as a share of the dense model's bytes."""
        return self.average / self.dense

    @property
    def minimum_of_sparse(self) -> float:
        """Minimum as a share of the bytes at target density without freezing ("SpFDE Min." in Fig. 4)."""
        return self.minimum / self.sparse

    @property
    def average_of_sparse(self) -> float:
        """Average as a share of the bytes at target density without freezing ("SpFDE Avg." in Fig. 4)."""
        return self.average / self.sparse


def memory_of(
    layers: Sequence[LayerCost],
    density: Sequence[float],
    frozen: Sequence[bool],
    *,
    batch_size: int,
    accounting: Accounting,
) -> int:
    """Modelled bytes of one training step, in fp32. No optimizer state, as in the paper.

    ``"paper"``: the components of SpFDE's Fig. 4. Weights and their gradients by active count (positions of the
    non-zeros are free), outputs of layers with weights, and the gradients of those. A frozen layer loses both gradients
    and *keeps* its activations: the paper does not say so, but only this reproduces its figures.

    ``"actual"``: what the masked engine stores. Weights and gradients are dense, a layer below density 1 has a mask of
    one byte a weight, products without weights keep their outputs too, and frozen layers, whose forward pass records
    no graph, keep neither activations nor gradients. Still a model: normalisation and activation functions save
    tensors of their own, and autograd frees gradients of activations as it goes. ``SavedTensorBytes`` and
    ``peak_bytes`` measure.

    Args:
        layers: of a ``ModelCost``; ``density`` and ``frozen`` have an entry for each.
        density: share of active weights.
        frozen: whether the layer is frozen.
        batch_size: samples in a step.
        accounting: which of the two.
    """
    as_paper = accounting == "paper"
    weights = masks = activations = 0  # gradients included
    for layer, d, is_frozen in zip(layers, density, frozen, strict=True):
        stored = share(layer.numel, d) if as_paper else layer.numel
        outputs = layer.activations if layer.weighted or not as_paper else 0
        masks += layer.numel if d < 1 and not as_paper else 0
        if is_frozen:
            weights += stored
            activations += outputs if as_paper else 0
        else:
            weights += 2 * stored
            activations += 2 * outputs
    return masks + _BYTES * (weights + batch_size * activations)


def memory_timeline(
    layers: Sequence[LayerCost],
    schedule: Sequence[tuple[Sequence[float], Sequence[bool]]],
    *,
    target_density: Sequence[float],
    batch_size: int,
    accounting: Accounting,
) -> MemoryTimeline:
    """Modelled memory over a run, against the dense model and the sparse model without freezing (Fig. 4 of SpFDE).

    Args:
        layers: of a ``ModelCost``.
        schedule: for each epoch the density and the frozen flag of each layer.
        target_density: density of each layer at the target, without a soft bound: the sparse baseline's.
        batch_size: samples in a step.
        accounting: see ``memory_of``.
    """
    total = partial(memory_of, layers, batch_size=batch_size, accounting=accounting)
    never = (False,) * len(layers)
    return MemoryTimeline(
        per_epoch=tuple(total(density, frozen) for density, frozen in schedule),
        dense=total((1.0,) * len(layers), never),
        sparse=total(target_density, never),
    )


class SavedTensorBytes:
    """Measures what autograd saves for the backward pass while the context is open.

    ``with SavedTensorBytes(model) as saved: loss = model(x).sum()`` and then ``saved.bytes``. Each storage counts once
    and whole, however many saved tensors are views of it. Parameters and buffers of ``model`` do not count.
    The copies in low precision that autocast makes of weights do count: they take memory. Storages are followed by weak
    references: measuring holds no memory and mistakes no reused address for an old tensor. Several steps in one context
    add up.

    While the context is open autograd does not notice in-place changes of saved tensors.

    Example:
        >>> with spfde.cost.SavedTensorBytes(model) as saved:
        ...     loss = model(torch.zeros(8, 4)).sum()
        >>> saved.bytes > 0
        True
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._left_out: set[StorageWeakRef] = set()
        self._seen: dict[StorageWeakRef, int] = {}
        self._hooks = saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes saved since the context was last entered."""
        return sum(self._seen.values())

    def __enter__(self) -> SavedTensorBytes:
        held = [] if self._model is None else [*self._model.parameters(), *self._model.buffers()]
        self._left_out = {_key(part.untyped_storage()) for tensor in held for part in _parts(tensor)}
        self._seen = {}
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            key = _key(storage)
            if key not in self._left_out and key not in self._seen:
                self._seen[key] = storage.nbytes()
        # An operation that saves its own output would hold itself alive through the output's graph: cut it off.
        return tensor.detach()


def peak_bytes(device: torch.device | str = "cpu") -> int | None:
    """Measured peak memory since the last ``reset_peak``, or since the start where it cannot be reset.

    On an accelerator what PyTorch's allocator had in use; on the CPU the resident set of the process, with everything
    that else lives in it (the interpreter, libraries, data). None where the platform tells neither.

    Example:
        >>> peak = spfde.cost.peak_bytes("cpu")  # None where the system does not tell
        >>> peak is None or peak > 0
        True
    """
    device = torch.device(device)
    if device.type != "cpu":
        peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return int(peak(device)) if peak is not None else None
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return _peak_from_getrusage()


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Start a new measurement for ``peak_bytes``.

    Returns:
        Whether the peak was reset. Where it cannot be (macOS, a locked ``/proc``), ``peak_bytes`` goes on counting from
        the start of the process.

    Example:
        >>> spfde.cost.reset_peak("cpu") in (True, False)  # whether it could be reset
        True
    """
    device = torch.device(device)
    if device.type != "cpu":
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is None:
            return False
        reset(device)
        return True
    try:
        # "5" resets VmHWM to the current resident set.
        Path("/proc/self/clear_refs").write_bytes(b"5")
    except OSError:
        return False
    return True


def _peak_from_getrusage() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS reports bytes, the other systems KiB.
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _key(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's memory: itself, or the members of a sparse one."""
    if tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())

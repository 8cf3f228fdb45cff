"""A run's state in a checkpoint's folder: weights, optimizer, generators, and what else remembers something.

Nothing that is read here can run code: weights are safetensors, all else tensors and primitives that
``torch.load(weights_only=True)`` reads, with nothing allowed beyond its own list. Earlier versions wrote
``custom_checkpoint_N.pkl`` by way of Accelerate, which reads pickles of any kind; those are refused.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from spfde.core.errors import RunFolderError, StateMismatch
from spfde.core.generator_states import check_numpy, check_python, check_torch
from spfde.core.optimizer_states import check_optimizer
from spfde.core.state import Kind, check_entries, read_saved

TRAINED, EVALUATED = "model", "evaluated"
"""Names of the files of weights: those that training goes on from, and those that were evaluated where they differ."""
_SAFE, _OTHER = ".safetensors", ".pt"
_OPTIMIZER, _SCALER, _GENERATORS = "optimizer.pt", "scaler.pt", "generators.pt"
_SCALER_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float),
    **dict.fromkeys(("growth_interval", "_growth_tracker"), int),
}
_OF_EARLIER_VERSIONS = "custom_checkpoint_*.pkl"
_PYTHON, _NUMPY, _TORCH, _CUDA = "python", "numpy", "torch", "cuda"


class Remembers(Protocol):
    """What has a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> object: ...


def weights_note() -> str | None:
    """What there is to say about the weights' format; None where it is the usual one."""
    if find_spec("safetensors") is not None:
        return None
    return f"checkpoints: weights go into {TRAINED}{_OTHER}, as safetensors is not installed"


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    others: Mapping[str, Remembers],
    device: torch.device,
) -> None:
    """Write all that a run goes on from.

    Args:
        folder: where; it exists.
        others: what else is saved, by the names of their files.
        device: whose generator is saved.
    """
    save_weights(folder, model, TRAINED)
    torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
    if scaler.is_enabled():
        torch.save(scaler.state_dict(), folder / _SCALER)
    torch.save(_generators(device), folder / _GENERATORS)
    for name, other in others.items():
        torch.save(other.state_dict(), folder / f"{name}.pt")


def load_state(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    others: Mapping[str, Remembers],
    device: torch.device,
) -> None:
    """Read what ``save_state`` wrote; on another device too, with the generators that both have.

    Raises:
        RunFolderError: an earlier version wrote it.
        StateMismatch: a state is not as it was written.
    """
    if found := next(folder.glob(_OF_EARLIER_VERSIONS), None):
        raise RunFolderError(
            f"checkpoint {folder}: holds {found.name}, which earlier versions wrote in Accelerate's form. A file of "
            "that kind can run code when it is read, so it is not. If the run is yours, end it with the version that "
            "began it; or start a new one."
        )
    load_weights(folder, model, TRAINED)
    check_optimizer(states := read_saved(folder / _OPTIMIZER), optimizer)
    optimizer.load_state_dict(states)
    if scaler.is_enabled():
        check_entries(states := read_saved(folder / _SCALER), "the loss scale", _SCALER_KINDS)
        scaler.load_state_dict(states)
    _set_generators(read_saved(folder / _GENERATORS), device)
    for name, other in others.items():
        other.load_state_dict(read_saved(folder / f"{name}.pt"))


def save_weights(folder: Path, model: nn.Module, name: str) -> None:
    """Write a model's weights and buffers under a name without suffix."""
    if weights_note() is None:
        from safetensors.torch import save_model

        save_model(model, str(folder / f"{name}{_SAFE}"), metadata={"format": "pt"})
    else:
        torch.save(model.state_dict(), folder / f"{name}{_OTHER}")


def load_weights(folder: Path, model: nn.Module, name: str | None = None) -> None:
    """Read what ``save_weights`` wrote; without a name the weights that were evaluated."""
    if name is None:
        name = EVALUATED if any((folder / f"{EVALUATED}{suffix}").exists() for suffix in (_SAFE, _OTHER)) else TRAINED
    if (folder / f"{name}{_SAFE}").exists():
        from safetensors.torch import load_model

        load_model(model, folder / f"{name}{_SAFE}", device="cpu")
    else:
        model.load_state_dict(read_saved(folder / f"{name}{_OTHER}"))


def read_weights(path: Path) -> Any:
    """What a file of weights holds; nothing in it can run code.

    Raises:
        StateMismatch: it cannot be read.
    """
    if path.suffix != _SAFE:
        return read_saved(path)
    if find_spec("safetensors") is None:
        raise StateMismatch("needs the package safetensors")
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # its reader raises whatever it likes on damaged files
        raise StateMismatch(f"cannot be read ({' '.join(str(error).split())[:200]})") from error


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, those of its devices included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _generators(device: torch.device) -> dict[str, Any]:
    name, words, *rest = np.random.get_state()  # noqa: NPY002
    states = {
        _PYTHON: random.getstate(),
        _NUMPY: (name, np.asarray(words).tolist(), *rest),
        _TORCH: torch.get_rng_state(),
    }
    return states | ({_CUDA: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    kinds: dict[str, Kind] = {_PYTHON: tuple, _NUMPY: tuple, _TORCH: Tensor}
    has_cuda = isinstance(states, Mapping) and _CUDA in states
    check_entries(states, "the generators", kinds | ({_CUDA: Tensor} if has_cuda else {}))
    check_python(states[_PYTHON], "Python's generator")
    check_numpy(states[_NUMPY], "NumPy's generator")
    check_torch(states[_TORCH], "PyTorch's generator")
    random.setstate(states[_PYTHON])
    name, words, *rest = states[_NUMPY]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states[_TORCH])
    if device.type == "cuda" and has_cuda:
        torch.cuda.set_rng_state(states[_CUDA], device)

"""A run's state in a checkpoint's folder: weights, optimizer, generators, and what else remembers something.

Files and layout are those of Accelerate's ``save_state``, which earlier versions called.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

WEIGHTS, OTHER_WEIGHTS = "model.safetensors", "model.pt"
_OPTIMIZER, _SCALER, _GENERATORS = "optimizer.bin", "scaler.pt", "random_states_0.pkl"
_CUDA = "torch_cuda_manual_seed"
# Earlier versions wrote NumPy's state as an array.
_ARRAYS: list[Any] = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32)), codecs.encode]


class Remembers(Protocol):
    """What has a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> object: ...


def weights_note() -> str | None:
    """What there is to say about the weights' format; None where it is the usual one."""
    if find_spec("safetensors") is not None:
        return None
    return f"checkpoints: weights go into {OTHER_WEIGHTS}, as safetensors is not installed"


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
        others: what else is saved, in an order that stays.
        device: whose generator is saved.
    """
    if weights_note() is None:
        from safetensors.torch import save_model

        save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
    else:
        torch.save(model.state_dict(), folder / OTHER_WEIGHTS)
    torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
    if scaler.is_enabled():
        torch.save(scaler.state_dict(), folder / _SCALER)
    torch.save(_generators(device), folder / _GENERATORS)
    for number, other in enumerate(others.values()):
        torch.save(other.state_dict(), folder / f"custom_checkpoint_{number}.pkl")


def load_state(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    others: Mapping[str, Remembers],
    device: torch.device,
) -> None:
    """Read what ``save_state`` wrote, in the same order; on another device too, with the generators that both have."""
    if (folder / WEIGHTS).exists():
        from safetensors.torch import load_model

        load_model(model, folder / WEIGHTS, device="cpu")
    else:
        model.load_state_dict(_read(folder / OTHER_WEIGHTS))
    optimizer.load_state_dict(_read(folder / _OPTIMIZER))
    if scaler.is_enabled():
        scaler.load_state_dict(_read(folder / _SCALER))
    _set_generators(_read(folder / _GENERATORS), device)
    for number, other in enumerate(others.values()):
        other.load_state_dict(_read(folder / f"custom_checkpoint_{number}.pkl"))


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, those of its devices included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _read(path: Path) -> Any:
    with torch.serialization.safe_globals(_ARRAYS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _generators(device: torch.device) -> dict[str, Any]:
    name, key, *rest = np.random.get_state()  # noqa: NPY002
    states = {
        "random_state": random.getstate(),
        "numpy_random_seed": (name, np.asarray(key).tolist(), *rest),
        "torch_manual_seed": torch.get_rng_state(),
    }
    return states | ({_CUDA: [torch.cuda.get_rng_state(device)]} if device.type == "cuda" else {})


def _set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["random_state"])
    name, key, *rest = states["numpy_random_seed"]
    np.random.set_state((name, np.asarray(key, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch_manual_seed"])
    if device.type == "cuda" and _CUDA in states:
        found = states[_CUDA]  # earlier versions saved one for each device of the machine
        torch.cuda.set_rng_state(found[min(device.index or 0, len(found) - 1)], device)

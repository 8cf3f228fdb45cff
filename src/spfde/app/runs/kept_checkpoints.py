"""Kept checkpoints: the model's tensors and its masks, without what training goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from spfde.sparsity.masks import pack, unpack

_MODEL, _MASKS = "model.safetensors", "masks.safetensors"


def write(folder: Path, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write a model's state and its masks, a bit a weight, into ``folder``."""
    from safetensors.torch import save_file

    # Copies: the format takes no tensors that share memory, and none that are channels_last.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / _MODEL)
    save_file({name: pack(mask) for name, mask in masks.items()}, folder / _MASKS)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state and the masks, boolean, that were written; not checked for damage."""
    from safetensors.torch import load_file

    state, packed = load_file(folder / _MODEL), load_file(folder / _MASKS)
    return state, {name: unpack(bits, state[name].shape) for name, bits in packed.items()}

"""Named recipes as attributes: ``spfde.presets.mest.replace(update_interval_epochs=2)``."""

from __future__ import annotations

from spfde.recipe.presets import PRESETS, get
from spfde.recipe.recipe import Recipe

_NAMES = {"soft_threshold" if name == "str" else name.replace("-", "_"): name for name in PRESETS}

__all__ = ["PRESETS", "get", *_NAMES]


def __getattr__(name: str) -> Recipe:
    if name not in _NAMES:
        raise AttributeError(f"module 'spfde.presets' has no attribute {name!r}; there are {', '.join(_NAMES)}")
    return PRESETS[_NAMES[name]]


def __dir__() -> list[str]:
    return sorted(__all__)

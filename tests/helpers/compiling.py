"""torch.compile's limit of compilations, whatever this version of torch calls it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch._dynamo.config as settings

RECOMPILE_LIMIT = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # torch 2.6


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Set the limit. (Not by monkeypatch: what that puts back, torch takes for a deleted setting.)"""
    return settings.patch(**{RECOMPILE_LIMIT: limit})

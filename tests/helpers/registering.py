"""Names that a test registers are forgotten when it is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spfde.core import registry


@contextmanager
def forgetting_names(kind: str) -> Iterator[None]:
    """Leave the names of a kind as they were before the block."""
    known = registry._CLASSES[kind]
    before = dict(known)
    try:
        yield
    finally:
        known.clear()
        known.update(before)

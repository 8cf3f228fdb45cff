"""The baseline: a mask that never changes."""

from __future__ import annotations

from typing import ClassVar

from spfde.sparsity.methods.base import SparsityMethod


class StaticSparse(SparsityMethod):
    """A fixed random mask: the baseline of dynamic sparse training."""

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "A fixed random mask, never changed."
    references: ClassVar[tuple[str, ...]] = ("liu2022random",)

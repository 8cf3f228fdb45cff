"""The prefix cache as it is asked for: how much is kept of what a frozen front computes, and when that cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from spfde.core.errors import Problem
from spfde.core.technique import Technique

if TYPE_CHECKING:
    from spfde.recipe.recipe import Recipe

Precision = Literal["fp16", "int8"]


class PrefixCache(Technique):
    """Keep what frozen blocks made of each sample, so that even their forward pass is not done again.

    It belongs to the machine and not to the recipe: a saved run goes on under another cache. Each sample then comes in
    so many augmented variants, and the augmentation must follow ``session.augmentation_seeds()``.

    Attributes:
        variants: of each sample, from 1 on.
        precision: "fp16", or "int8" with a scale for each sample and output.
        limit_gib: room for what is kept, in GiB; where it is too small, fewer variants are kept, or none.
        folder: where a memory-mapped file is made; None: in memory.

    Raises:
        InvalidArgument: a setting breaks its rule.

    Example:
        >>> import spfde
        >>> spfde.PrefixCache(2, precision="int8").limit_gib
        8.0
    """

    variants: int = Field(ge=1, description="augmented variants of each sample that are kept, from 1 on")
    precision: Precision = Field(default="fp16", description="of what is kept: 'fp16' or 'int8'")
    limit_gib: float = Field(default=8.0, gt=0, description="room for what is kept, in GiB; fewer variants fit")
    folder: Path | None = Field(default=None, description="folder for a memory-mapped file; None: in memory")

    def __init__(self, variants: int, **settings: Any) -> None:
        super().__init__(variants=variants, **settings)


def find_cache_problems(cache: object, recipe: Recipe) -> list[Problem]:
    """What keeps a cache from going with a recipe, whatever the engine; nothing for None."""
    if cache is None:
        return []
    if not isinstance(cache, PrefixCache):
        return [Problem("cache", cache, "must be a spfde.PrefixCache", "Pass spfde.PrefixCache(2), or None.")]
    problems, freezing = [], recipe.freezing
    if freezing is None or not recipe.freezes:
        rule = "keeps what frozen blocks compute, and the recipe freezes none"
        problems.append(Problem("cache", cache, rule, "Leave it out, or add spfde.ProgressiveFreezing()."))
    elif freezing.adapts:
        rule = "needs freeze epochs that are known beforehand"
        problems.append(Problem("cache", cache, rule, "Leave it out, or freeze with criterion='schedule'."))
    elif freezing.thaws:
        rule = "keeps what blocks make of a sample while they are frozen for good"
        problems.append(Problem("cache", cache, rule, "Leave it out, or freeze with scheme='single-shot'."))
    if cache.folder is not None and not os.access(cache.folder, os.W_OK | os.X_OK):
        rule = "is no folder that can be written to"
        problems.append(Problem("cache.folder", str(cache.folder), rule, "Make it, or name another one."))
    return problems

"""Named recipes. Each is a plain ``Recipe``: change it with ``replace``.

spfde.presets.mest.replace(update_interval_epochs=2)
"""

from __future__ import annotations

from collections.abc import Mapping

from spfde.errors import InvalidArgument, Problem, nearest
from spfde.freezing import BlockwiseCosine, ProgressiveFreezing
from spfde.recipe import Recipe
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sparsity import MEST, SET, RigL, StaticSparse

dense = Recipe()
"""The plain loop: every weight, every layer, every sample."""

static = Recipe(sparsity=StaticSparse(sparsity=0.9))
"""A random mask, fixed for the whole run: the floor that any dynamic method has to beat."""

set = Recipe(sparsity=SET(sparsity=0.9))
"""Sparse evolutionary training: drop the smallest, grow at random."""

rigl = Recipe(sparsity=RigL(sparsity=0.9))
"""RigL: drop the smallest, grow where the dense gradient is largest."""

mest = Recipe(sparsity=MEST(sparsity=0.9, soft_bound=True))
"""MEST with elastic mutation and soft bound (EM&S)."""

mest_de = Recipe(sparsity=MEST(sparsity=0.9, soft_bound=True), sieving=OneTimeRemoval())
"""MEST EM&S with its data-efficient training: the easiest samples are removed once, for good."""

spfde = Recipe(
    sparsity=MEST(sparsity=0.9, soft_bound=True),
    freezing=ProgressiveFreezing(flops_reduction=0.20),
    sieving=DataSieving(removed_fraction=0.20),
    learning_rate=BlockwiseCosine(),
)
"""SpFDE 20 % + 20 % on MEST EM&S at 90 %: the paper's system."""

PRESETS: Mapping[str, Recipe] = {
    "dense": dense,
    "static": static,
    "set": set,
    "rigl": rigl,
    "mest": mest,
    "mest-de": mest_de,
    "spfde": spfde,
}


def get(name: str) -> Recipe:
    """The preset of that name.

    Raises:
        InvalidArgument: there is none; the nearest name is given.
    """
    if name not in PRESETS:
        raise InvalidArgument(Problem("recipe", name, "is no preset", nearest(name, PRESETS)))
    return PRESETS[name]

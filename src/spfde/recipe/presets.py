"""Named recipes. Each is a plain ``Recipe``: change it with ``replace``.

spfde.presets.mest.replace(update_interval_epochs=2)
"""

from __future__ import annotations

from collections.abc import Mapping

from spfde.core.errors import InvalidArgument, Problem, nearest
from spfde.freezing import BlockwiseCosine, ProgressiveFreezing
from spfde.recipe.recipe import Recipe
from spfde.sieving import DataSieving, OneTimeRemoval
from spfde.sparsity import (
    DSR,
    GMP,
    MEST,
    SET,
    SETITOP,
    SNFS,
    SNIP,
    STR,
    DeepR,
    GraSP,
    RigL,
    RigLITOP,
    StaticSparse,
    SynFlow,
    TopKAST,
)

dense = Recipe()
"""The plain loop: every weight, every layer, every sample."""

static = Recipe(sparsity=StaticSparse(sparsity=0.9))
"""A random mask, fixed for the whole run: the floor that any dynamic method has to beat."""

set = Recipe(sparsity=SET(sparsity=0.9))
"""Sparse evolutionary training: drop the smallest, grow at random."""

rigl = Recipe(sparsity=RigL(sparsity=0.9))
"""RigL: drop the smallest, grow where the dense gradient is largest."""

set_itop = Recipe(sparsity=SETITOP(sparsity=0.9))
"""SET-ITOP: half of the weights change places, layers by ERK; ``session.explored`` is the rate that counts."""

rigl_itop = Recipe(sparsity=RigLITOP(sparsity=0.9))
"""RigL-ITOP: the same with growth by the dense gradient."""

snip = Recipe(sparsity=SNIP(sparsity=0.9))
"""SNIP: one mask for all layers, by the loss's sensitivity before training."""

grasp = Recipe(sparsity=GraSP(sparsity=0.9))
"""GraSP: one mask for all layers, that keeps the gradient flowing."""

synflow = Recipe(sparsity=SynFlow(sparsity=0.9))
"""SynFlow: one mask for all layers, without data."""

deepr = Recipe(sparsity=DeepR(sparsity=0.9))
"""DEEP R: rewiring at every step."""

dsr = Recipe(sparsity=DSR(sparsity=0.9))
"""DSR: one threshold for all layers, and weights that move between them."""

snfs = Recipe(sparsity=SNFS(sparsity=0.9))
"""SNFS: growth by a smoothed dense gradient, between and within layers."""

topkast = Recipe(sparsity=TopKAST(sparsity=0.9))
"""Top-KAST: forward at 90 %, gradients at 80 %."""

gmp = Recipe(sparsity=GMP(sparsity=0.9))
"""Gradual magnitude pruning: dense to sparse, for comparison."""

soft_threshold = Recipe(sparsity=STR(sparsity=0.9))
"""STR: dense to sparse by learnt thresholds, for comparison."""

mest = Recipe(sparsity=MEST(sparsity=0.9, soft_bound=True))
"""MEST with elastic mutation and soft bound (EM&S)."""

mest_de = Recipe(sparsity=MEST(sparsity=0.9, soft_bound=True), sieving=OneTimeRemoval())
"""MEST EM&S with its data-efficient training: the easiest samples are removed once, for good."""

spfde = Recipe(
    sparsity=MEST(sparsity=0.9, soft_bound=True),
    freezing=ProgressiveFreezing(flops_reduction=0.20, as_far_as_possible=True),
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
    "set-itop": set_itop,
    "rigl-itop": rigl_itop,
    "itop": rigl_itop,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    "deepr": deepr,
    "dsr": dsr,
    "snfs": snfs,
    "topkast": topkast,
    "gmp": gmp,
    "str": soft_threshold,
    "spfde": spfde,
}
"""The presets by the name that the command line takes."""


def get(name: str) -> Recipe:
    """The preset of that name.

    Raises:
        InvalidArgument: there is none; the nearest name is given.

    Example:
        >>> spfde.presets.get("mest").sparsity.soft_bound
        True
    """
    if name not in PRESETS:
        raise InvalidArgument(Problem("recipe", name, "is no preset", nearest(name, PRESETS)))
    return PRESETS[name]

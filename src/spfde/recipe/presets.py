"""Named recipes."""

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

PRESETS: Mapping[str, Recipe] = {
    # The plain loop: every weight, every layer, every sample.
    "dense": Recipe(),
    # A random mask, fixed for the whole run: the floor that any dynamic method has to beat.
    "static": Recipe(sparsity=StaticSparse(sparsity=0.9)),
    # Sparse evolutionary training: drop the smallest, grow at random.
    "set": Recipe(sparsity=SET(sparsity=0.9)),
    # RigL: drop the smallest, grow where the dense gradient is largest.
    "rigl": Recipe(sparsity=RigL(sparsity=0.9)),
    # MEST with elastic mutation and soft bound (EM&S).
    "mest": Recipe(sparsity=MEST(sparsity=0.9, soft_bound=True)),
    # MEST EM&S with its data-efficient training: the easiest samples are removed once, for good.
    "mest-de": Recipe(sparsity=MEST(sparsity=0.9, soft_bound=True), sieving=OneTimeRemoval()),
    # SET-ITOP: half of the weights change places, layers by ERK; ``session.explored`` is the rate that counts.
    "set-itop": Recipe(sparsity=SETITOP(sparsity=0.9)),
    # RigL-ITOP: the same with growth by the dense gradient.
    "rigl-itop": Recipe(sparsity=RigLITOP(sparsity=0.9)),
    # SNIP: one mask for all layers, by the loss's sensitivity before training.
    "snip": Recipe(sparsity=SNIP(sparsity=0.9)),
    # GraSP: one mask for all layers, that keeps the gradient flowing.
    "grasp": Recipe(sparsity=GraSP(sparsity=0.9)),
    # SynFlow: one mask for all layers, without data.
    "synflow": Recipe(sparsity=SynFlow(sparsity=0.9)),
    # DEEP R: rewiring at every step.
    "deepr": Recipe(sparsity=DeepR(sparsity=0.9)),
    # DSR: one threshold for all layers, and weights that move between them.
    "dsr": Recipe(sparsity=DSR(sparsity=0.9)),
    # SNFS: growth by a smoothed dense gradient, between and within layers.
    "snfs": Recipe(sparsity=SNFS(sparsity=0.9)),
    # Top-KAST: forward at 90 %, gradients at 80 %.
    "topkast": Recipe(sparsity=TopKAST(sparsity=0.9)),
    # Gradual magnitude pruning: dense to sparse, for comparison.
    "gmp": Recipe(sparsity=GMP(sparsity=0.9)),
    # STR: dense to sparse by learnt thresholds, for comparison.
    "str": Recipe(sparsity=STR(sparsity=0.9)),
    # SpFDE 20 % + 20 % on MEST EM&S at 90 %: the paper's system.
    "spfde": Recipe(
        sparsity=MEST(sparsity=0.9, soft_bound=True),
        freezing=ProgressiveFreezing(flops_reduction=0.20, as_far_as_possible=True),
        sieving=DataSieving(removed_fraction=0.20),
        learning_rate=BlockwiseCosine(),
    ),
    "itop": Recipe(sparsity=RigLITOP(sparsity=0.9)),  # its older name
}
"""Recipes by name; each is plain data: change it with ``replace``."""


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

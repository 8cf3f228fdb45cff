"""Which layers learn: the blocks of a model, when each is frozen, freezing them, and their learning rates."""

from spfde.freezing.plan import ProgressiveFreezing
from spfde.freezing.rates import BlockwiseCosine
from spfde.freezing.savings import Savings
from spfde.freezing.schemes import FreezingScheme

__all__ = [
    "BlockwiseCosine",
    "FreezingScheme",
    "ProgressiveFreezing",
    "Savings",
]

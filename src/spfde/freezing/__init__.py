"""Which layers learn: the blocks of a model, when each is frozen, freezing them, and their learning rates."""

from spfde.freezing.freezer import Freezer, is_held, recompile_warning
from spfde.freezing.plan import (
    FREEZE_CRITERIA,
    FreezePlan,
    ProgressiveFreezing,
    blocks_to_freeze,
)
from spfde.freezing.rates import BlockwiseCosine, GroupRates, check_rates, learning_rate_factor, rate
from spfde.freezing.schemes import FreezingScheme, Savings, solve

__all__ = [
    "FREEZE_CRITERIA",
    "BlockwiseCosine",
    "FreezePlan",
    "Freezer",
    "FreezingScheme",
    "GroupRates",
    "ProgressiveFreezing",
    "Savings",
    "blocks_to_freeze",
    "check_rates",
    "is_held",
    "learning_rate_factor",
    "rate",
    "recompile_warning",
    "solve",
]

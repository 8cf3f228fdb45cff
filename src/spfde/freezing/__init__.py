"""Which layers learn: the blocks of a model, when each is frozen, freezing them, and their learning rates."""

from spfde.freezing.freezer import Freezer, is_held, recompile_warning
from spfde.freezing.plan import (
    FREEZE_CRITERIA,
    SCHEMES,
    FreezePlan,
    ProgressiveFreezing,
    Scheme,
    blocks_to_freeze,
)
from spfde.freezing.rates import BlockwiseCosine, GroupRates, check_rates, learning_rate_factor, rate
from spfde.freezing.schemes import Savings, freezing_saving, paused, solve

__all__ = [
    "FREEZE_CRITERIA",
    "SCHEMES",
    "BlockwiseCosine",
    "FreezePlan",
    "Freezer",
    "GroupRates",
    "ProgressiveFreezing",
    "Savings",
    "Scheme",
    "blocks_to_freeze",
    "check_rates",
    "freezing_saving",
    "is_held",
    "learning_rate_factor",
    "paused",
    "rate",
    "recompile_warning",
    "solve",
]

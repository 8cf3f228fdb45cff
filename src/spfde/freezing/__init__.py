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
from spfde.freezing.rates import BlockwiseCosine, GroupRates, check_rates, rate
from spfde.freezing.schemes import Savings, freezing_saving, paused, solve
from spfde.model.blocks import Block, Partition, find_blocks

__all__ = [
    "FREEZE_CRITERIA",
    "SCHEMES",
    "Block",
    "BlockwiseCosine",
    "FreezePlan",
    "Freezer",
    "GroupRates",
    "Partition",
    "ProgressiveFreezing",
    "Savings",
    "Scheme",
    "blocks_to_freeze",
    "check_rates",
    "find_blocks",
    "freezing_saving",
    "is_held",
    "paused",
    "rate",
    "recompile_warning",
    "solve",
]

"""Which layers learn: the blocks of a model, when each is frozen, freezing them, and their learning rates."""

from spfde.freezing.freezer import Freezer, is_held, recompile_warning
from spfde.freezing.plan import (
    FREEZE_CRITERIA,
    FreezePlan,
    ProgressiveFreezing,
    blocks_to_freeze,
)
from spfde.freezing.rates import BlockwiseCosine, GroupRates, check_rates, rate
from spfde.freezing.schemes import FreezingScheme, Savings, solve
from spfde.model.blocks import Block, Partition, find_blocks

__all__ = [
    "FREEZE_CRITERIA",
    "Block",
    "BlockwiseCosine",
    "FreezePlan",
    "Freezer",
    "FreezingScheme",
    "GroupRates",
    "Partition",
    "ProgressiveFreezing",
    "Savings",
    "blocks_to_freeze",
    "check_rates",
    "find_blocks",
    "is_held",
    "rate",
    "recompile_warning",
    "solve",
]

"""Which samples are seen: how difficult they are, the partial set with its queue, and the loader over it."""

from __future__ import annotations

from spfde.sieving.by_id import ById, ShardSampler
from spfde.sieving.criteria import SievingCriterion
from spfde.sieving.methods import DataSieving, OneTimeRemoval, SievingMethod

__all__ = ["ById", "DataSieving", "OneTimeRemoval", "ShardSampler", "SievingCriterion", "SievingMethod"]

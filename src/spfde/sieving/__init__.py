"""Which samples are seen: how difficult they are, the partial set with its queue, and the loader over it."""

from __future__ import annotations

from spfde.sieving.balance import ClassLabels, find_labels
from spfde.sieving.batch_sampler import SievedBatchSampler
from spfde.sieving.criteria import Scorer, SievingCriterion
from spfde.sieving.loader import (
    SievedLoader,
    check_loader,
    loader_generators,
    population_of,
)
from spfde.sieving.methods import (
    DataSieving,
    OneTimeRemoval,
    SievingMethod,
    check_fraction,
)
from spfde.sieving.observer import Observer
from spfde.sieving.sieve import Sieve

__all__ = [
    "ClassLabels",
    "DataSieving",
    "Observer",
    "OneTimeRemoval",
    "Scorer",
    "Sieve",
    "SievedBatchSampler",
    "SievedLoader",
    "SievingCriterion",
    "SievingMethod",
    "check_fraction",
    "check_loader",
    "find_labels",
    "loader_generators",
    "population_of",
]

"""Which samples are seen: how difficult they are, the partial set with its queue, and the loader over it."""

from __future__ import annotations

from spfde.sieving.balance import ClassLabels, find_labels
from spfde.sieving.criteria import Scorer, SievingCriterion
from spfde.sieving.evidence import (
    correct_from_logits,
    correct_from_loss,
    el2n_from_logits,
    label_bounds,
    loss_from_logits,
)
from spfde.sieving.loader import (
    SievedBatchSampler,
    SievedLoader,
    build_loader,
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
from spfde.sieving.sieve import Sieve, Turnover
from spfde.sieving.weights import inclusion_probabilities, loss_weights

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
    "Turnover",
    "build_loader",
    "check_fraction",
    "check_loader",
    "correct_from_logits",
    "correct_from_loss",
    "el2n_from_logits",
    "find_labels",
    "inclusion_probabilities",
    "label_bounds",
    "loader_generators",
    "loss_from_logits",
    "loss_weights",
    "population_of",
]

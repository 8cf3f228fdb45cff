"""Which samples are seen: forgetting events, the partial set with its queue, and the loader over it."""

from __future__ import annotations

from spfde.sieving.forgetting import ForgettingCounter, correct_from_logits, correct_from_loss
from spfde.sieving.loader import (
    SievedBatchSampler,
    SievedLoader,
    build_loader,
    check_loader,
    loader_generators,
    population_of,
)
from spfde.sieving.observer import Observer, correct_from
from spfde.sieving.sieve import DataSieving, Sieve, Turnover, check_fraction

__all__ = [
    "DataSieving",
    "ForgettingCounter",
    "Observer",
    "Sieve",
    "SievedBatchSampler",
    "SievedLoader",
    "Turnover",
    "build_loader",
    "check_fraction",
    "check_loader",
    "correct_from",
    "correct_from_logits",
    "correct_from_loss",
    "loader_generators",
    "population_of",
]

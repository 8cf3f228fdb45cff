"""Which samples are seen: the session's loader, and with a recipe that sieves the sieve and what it is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spfde.core.errors import UsageError
from spfde.core.state import check_entries
from spfde.planning.timeline import Row
from spfde.session.distributed import deals_out
from spfde.session.part import Part, Setting
from spfde.sieving.balance import ClassLabels
from spfde.sieving.batch_sampler import SievedBatchSampler
from spfde.sieving.loader import SievedLoader, population_of
from spfde.sieving.observer import Observer
from spfde.sieving.sieve import Sieve


class Sampling(Part):
    """The loader over all samples, and the count of those that were seen.

    Args:
        setting: the session's.
        loader: the user's.
        keep: which ids are in the partial set; it must not hold the session, which the loader may outlive.

    Attributes:
        population: ids of all samples, ascending.
        batch_size: of the loader.
        dense_samples: samples that the plain loop trains on in an epoch, by all processes together.
    """

    name = "sampling"

    def __init__(
        self, setting: Setting, loader: DataLoader[Any], keep: Callable[[], Tensor | None] = lambda: None
    ) -> None:
        assert loader.batch_size is not None, "attach lets no such loader in"
        self._setting = setting
        self.population = population_of(loader)
        self.batch_size = loader.batch_size
        self.dense_samples = _samples_per_epoch(loader)
        share, world = (0, 1), setting.world
        if world.is_shared and not setting.recipe.is_neutral:
            if deals_out(loader, world):
                share = (world.rank, world.size)
            else:
                self.dense_samples *= world.size
        sampler = SievedBatchSampler(loader.sampler, loader.batch_size, loader.drop_last, keep=keep, share=share)
        self.loader = SievedLoader(loader, sampler)
        self._drawn_before = 0

    @property
    def partial_set(self) -> Tensor:
        """Ids of the samples in use, ascending."""
        return self.population

    @property
    def removed_set(self) -> Tensor:
        """Ids of the samples that are out, the queue's head first."""
        return self.population[:0]

    @property
    def n_used(self) -> int:
        """Distinct samples used so far."""
        return len(self.population)

    @property
    def samples_observed(self) -> int:
        """Samples reported in this epoch."""
        return 0

    def samples_seen(self) -> int:
        """Samples that were trained on in this epoch, by all processes together."""
        clock = self._setting.clock
        return self._setting.world.sum(clock.samples_drawn or self.samples_observed or clock.steps * self.batch_size)

    def observe(self, indices: Tensor | None, **report: Tensor | None) -> None:
        """Take a report on a batch; see ``Session.observe``."""

    def loss_weights(self, indices: Tensor | None) -> Tensor:
        """Weights for the losses of a batch; see ``Session.loss_weights``."""
        return torch.ones(self.samples_of("loss_weights", indices).numel(), device=self._setting.device)

    def samples_of(self, asked: str, indices: Tensor | None) -> Tensor:
        """The samples of a batch, by default of the one drawn last."""
        samples = self.loader.current_indices if indices is None else torch.as_tensor(indices).cpu().long()
        if samples is None:
            raise UsageError(
                f"{asked}() cannot tell which samples are in this batch. Draw it from session.loader (not with "
                "in_order=False), or pass indices=."
            )
        return samples

    def check_reported(self) -> None:
        """Raise ``UsageError`` where a report is missing."""

    # --- what the loader tells, by way of the session ----------------------------------------------------------------

    def on_loader_start(self) -> None:
        """``session.loader`` is iterated, and no epoch has begun for it yet."""
        clock = self._setting.clock
        if clock.phase == "drained" and clock.steps:
            warnings.warn(
                "session.loader was started again while its epoch has not ended, so nothing is mutated, frozen or "
                "sieved. Loop over session.epochs(), or call session.end_epoch() after each epoch; for evaluation take "
                "another loader.",
                stacklevel=6,
            )

    def note_drawn(self) -> None:
        """The epoch of the iteration has begun: what is handed out from now on adds to what was drawn before."""
        self._drawn_before = self._setting.clock.samples_drawn

    def on_batch(self) -> None:
        """A batch is handed out."""
        clock = self._setting.clock
        clock.phase = "running"
        clock.samples_drawn = self._drawn_before + self.loader.samples_handed

    def on_loader_end(self) -> None:
        """All batches are handed out."""
        clock = self._setting.clock
        if clock.phase in ("begun", "running"):
            clock.phase = "drained"
            self.check_reported()
            self.exchange()
            clock.stop_watch(self._setting.device)

    def exchange(self) -> None:
        """With several processes: count what all of them observed."""

    def detach(self) -> None:
        self.loader.end_workers()

    def summarise(self) -> list[str]:
        return [f"sieving: {len(self.partial_set):,} of {len(self.population):,} samples in use"]

    def describe(self) -> list[str]:
        return ["made: session.loader, whose batches drive the clock; your loader stays as it is"]


class SievedSampling(Sampling):
    """Leaves samples out, by what is observed of them.

    Args:
        setting: the session's.
        loader: the user's.
        labels: class of each sample of the data set, for sieving that is balanced; None: those that are observed.
    """

    def __init__(self, setting: Setting, loader: DataLoader[Any], labels: Tensor | None) -> None:
        technique = setting.recipe.sieving
        assert technique is not None, "made for recipes that sieve"
        population = population_of(loader)
        n_ids = int(population.max()) + 1
        self._technique = technique
        self._classes = ClassLabels(n_ids, labels) if technique.balanced else None
        known = None if self._classes is None or self._classes.collects else self._classes.labels[population]
        self._sieve = Sieve(population, technique, generator=setting.generator, labels=known)
        super().__init__(setting, loader, self._sieve.keep)
        criterion = technique.make_criterion()
        self._scorer = criterion.scorer(n_ids)
        #: What has a state, by the name that it is saved under.
        self._remembering: dict[str, Any] = {"sieve": self._sieve, "scorer": self._scorer}
        collects = self._classes is not None and self._classes.collects
        if collects:
            self._remembering["classes"] = self._classes
        self._observer = Observer(
            self._scorer,
            self.loader,
            setting.world.gather,
            classes=self._classes,
            is_needed=criterion.needs_every_batch or collects,
        )
        self._asked_for_weights = False

    @property
    def partial_set(self) -> Tensor:
        return self._sieve.partial

    @property
    def removed_set(self) -> Tensor:
        return self._sieve.removed

    @property
    def n_used(self) -> int:
        return self._sieve.ever_used

    @property
    def samples_observed(self) -> int:
        return self._observer.samples

    def begin_epoch(self, row: Row) -> None:
        self._asked_for_weights = False
        self._observer.begin_epoch()
        if row.sieve_update:
            labels = None if self._classes is None else self._classes.labels[self.population]
            difficulty = self._scorer.difficulty()[self.population]
            self._setting.clock.sieve_moved = self._sieve.update(difficulty, labels)
            self._scorer.reset()

    def end_epoch(self) -> None:
        clock = self._setting.clock
        if not clock.is_resumed_at_end:
            self.check_reported()
            if self._technique.rescales and clock.steps and not self._asked_for_weights:
                raise UsageError(
                    "rescale_loss is set, but the losses were not weighted: multiply each sample's loss by "
                    "session.loss_weights() before taking the mean, or set rescale_loss=False."
                )
        self.exchange()

    def observe(self, indices: Tensor | None, **report: Tensor | None) -> None:
        logits, y = report["logits"], report["y"]
        self._observer.check_labels(logits, y)
        values = self._scorer.criterion.evidence(**report)
        labels = self._classes.from_report(logits, y) if self._classes is not None else None
        self._observer.report(values, indices, labels)

    def loss_weights(self, indices: Tensor | None) -> Tensor:
        self._asked_for_weights = True
        if not self._technique.rescales:
            return super().loss_weights(indices)
        return self._sieve.loss_weights(self.samples_of("loss_weights", indices)).to(self._setting.device)

    def check_reported(self) -> None:
        self._observer.check_reported()
        clock = self._setting.clock
        if clock.steps and not clock.samples_drawn and not self.samples_observed:
            raise UsageError(
                "steps were taken without session.loader and without observe(). While samples are sieved, train on "
                "session.loader, or call session.observe(logits, y, indices=...)."
            )

    def on_loader_start(self) -> None:
        self._observer.check_reported()
        super().on_loader_start()

    def on_batch(self) -> None:
        self._observer.await_report()
        super().on_batch()

    def exchange(self) -> None:
        self._observer.exchange()

    def state_dict(self) -> dict[str, Any]:
        if not self._setting.world.is_shared:
            self.exchange()
        return {
            "observed": self._observer.samples,
            **{name: own.state_dict() for name, own in self._remembering.items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the sieve", {"observed": int, **dict.fromkeys(self._remembering, dict)})
        for name, own in self._remembering.items():
            copy(own).load_state_dict(state[name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, own in self._remembering.items():
            own.load_state_dict(state[name])
        self._observer.begin_epoch()
        self._observer.samples = state["observed"]


def _samples_per_epoch(loader: DataLoader[Any]) -> int:
    """Samples that the plain loop trains on in an epoch."""
    assert loader.batch_size is not None
    try:
        drawn = len(loader.sampler)  # type: ignore[arg-type]  # samplers need not have a length
    except TypeError:
        drawn = len(loader.dataset)  # type: ignore[arg-type]
    return drawn - drawn % loader.batch_size if loader.drop_last else drawn

"""Samples are left out: the sieve, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from spfde.core.errors import UsageError
from spfde.core.state import check_entries
from spfde.planning.timeline import Row
from spfde.session.part import Setting
from spfde.session.sampling import Sampling
from spfde.sieving.balance import ClassLabels
from spfde.sieving.loader import population_of
from spfde.sieving.observer import Observer
from spfde.sieving.sieve import Sieve
from spfde.sieving.tickets import Ticket


class SievedSampling(Sampling):
    """Leaves samples out, by what is observed of them.

    Args:
        setting: the session's.
        loader: the user's.
        labels: class of each sample of the data set, for sieving that is balanced; None: those that are observed.
    """

    def __init__(self, setting: Setting, loader: DataLoader[Any], labels: Tensor | None) -> None:
        asked, epochs = setting.recipe.sieving, setting.blueprint.epochs
        assert asked is not None, "made for recipes that sieve"
        technique, ends_full = asked.at_length(epochs), asked.n_full_epochs(epochs) > 0
        population = population_of(loader)
        n_ids = int(population.max()) + 1
        self._technique = technique
        self._classes = ClassLabels(n_ids, labels) if technique.balanced else None
        known = None if self._classes is None or self._classes.collects else self._classes.labels[population]
        self._sieve = Sieve(population, technique, generator=setting.generator, labels=known, ends_full=ends_full)
        criterion = technique.make_criterion()
        collects = self._classes is not None and self._classes.collects
        by_report = criterion.needs_every_batch or collects
        super().__init__(setting, loader, self._sieve.keep, by_report=by_report)
        self._scorer = criterion.scorer(n_ids)
        #: What has a state, by the name that it is saved under.
        self._remembering: dict[str, Any] = {"sieve": self._sieve, "scorer": self._scorer}
        if collects:
            self._remembering["classes"] = self._classes
        gather = partial(setting.world.gather, what="reports")
        self._observer = Observer(self._scorer, self.tickets, gather, classes=self._classes)
        self._n_reports = 0
        self._is_told = False
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
        super().begin_epoch(row)
        self._asked_for_weights = self._is_told = False
        self._n_reports = 0
        self._observer.begin_epoch()
        if row.sieve_update and row.samples == len(self.population):
            self._setting.clock.sieve_moved = self._sieve.use_all()
        elif row.sieve_update:
            labels = None if self._classes is None else self._classes.labels[self.population]
            difficulty = self._scorer.difficulty()[self.population]
            self._setting.clock.sieve_moved = self._sieve.update(difficulty, labels)
            if not self._scorer.criterion.redraws:
                self._scorer.reset()

    def check_complete(self) -> None:
        self._check_reported()
        if self._technique.rescales and self._setting.clock.steps and not self._asked_for_weights:
            raise UsageError(
                "rescale_loss is set, but the losses were not weighted: multiply each sample's loss by "
                "session.loss_weights() before taking the mean, or set rescale_loss=False."
            )
        super().check_complete()

    def end_epoch(self) -> None:
        super().end_epoch()
        self._observer.exchange()

    def observe(self, indices: Tensor | None, **report: Tensor | None) -> None:
        logits, y = report["logits"], report["y"]
        self._observer.check_labels(logits, y)
        values = self._scorer.criterion.evidence(**report)
        labels = self._classes.from_report(logits, y) if self._classes is not None else None
        self._observer.report(values, indices, labels)
        self._n_reports += 1
        self._exchange_if_complete()

    def loss_weights(self, indices: Tensor | None) -> Tensor:
        self._asked_for_weights = True
        if not self._technique.rescales:
            return super().loss_weights(indices)
        return self._sieve.loss_weights(self.samples_of("loss_weights", indices)).to(self._setting.device)

    def _check_reported(self) -> None:
        """Raise ``UsageError`` where reports are missing.

        Tickets of a loop that was left early may be of batches that a loader fetched ahead of it.
        """
        clock, left = self._setting.clock, len(self._left())
        if not self.needs_reports:
            return
        if left and (self.is_all_drawn or not self._n_reports or clock.steps > self._n_reports):
            self._is_told = True
            if strangers := self.tickets.strangers:
                raise UsageError(
                    f"{len(strangers)} samples that indices= named, such as {strangers[0]}, were in no batch without a "
                    f"report, and {left} batches have none. indices= are positions in the loader's data set, as its "
                    "sampler counts them: in a Subset those in the Subset, not in the set that it is taken from. Leave "
                    "indices= out, or let the data set give its own positions."
                )
            raise UsageError(
                f"observe() was not called for {left} {'batch' if left == 1 else 'batches'} of session.loader. While "
                "samples are sieved, call session.observe(logits, y) once a batch, and use another loader for "
                "evaluation."
            )
        if clock.steps and not self.samples_observed:
            raise UsageError(
                "steps were taken without observe(). While samples are sieved, train on session.loader and call "
                "session.observe(logits, y) once a batch; for batches from elsewhere pass indices=."
            )

    def on_loader_start(self) -> None:
        if self._setting.clock.phase not in ("between", "begun") and self.loader.is_ended and self._left():
            # Said once: whoever goes on then does so without what was reported, which may be of other batches.
            if not self._is_told:
                self._check_reported()
            self._observer.begin_epoch()
            self._n_reports = 0
        super().on_loader_start()

    def on_loader_end(self) -> None:
        super().on_loader_end()
        if self._n_batches is None:
            self._exchange_if_complete()

    def _exchange_if_complete(self) -> None:
        """With several processes a state must be complete without the others' help."""
        if self._setting.world.is_shared and self.needs_reports and not self.is_surplus and self.is_complete:
            self._observer.exchange()

    def _untrained(self) -> list[Ticket]:
        left = self._left()
        if not self.needs_reports:
            return left
        # A step without a report came of the oldest one.
        return left[max(0, self._setting.clock.steps - self._n_reports) :]

    def _can_go_on(self) -> bool:
        # What the others observed in this epoch is not known yet.
        return not (self._setting.world.is_shared and self.needs_reports)

    def state_dict(self) -> dict[str, Any]:
        if not self._setting.world.is_shared:
            self._observer.exchange()
        return {
            "observed": self._observer.samples,
            "reports": self._n_reports,
            "asked_for_weights": self._asked_for_weights,
            **{name: own.state_dict() for name, own in self._remembering.items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        kinds = {"observed": int, "reports": int, "asked_for_weights": bool}
        check_entries(state, "the sieve", {**kinds, **dict.fromkeys(self._remembering, dict)})
        for name, own in self._remembering.items():
            copy(own).load_state_dict(state[name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name, own in self._remembering.items():
            own.load_state_dict(state[name])
        self._observer.begin_epoch()
        self._observer.samples, self._n_reports = state["observed"], state["reports"]
        self._asked_for_weights, self._is_told = state["asked_for_weights"], False

"""Which samples are seen: the session's loader, what was taken of it in an epoch, and where a run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from spfde.core.errors import UsageError
from spfde.planning.timeline import Row
from spfde.session.backward import BackwardPasses
from spfde.session.distributed import deals_out
from spfde.session.part import Part, Setting
from spfde.session.unended import Unended
from spfde.sieving.batch_sampler import SievedBatchSampler, iterates_as
from spfde.sieving.ids import Ids
from spfde.sieving.loader import SievedLoader, loader_generators, population_of
from spfde.sieving.stream import StreamLoader
from spfde.sieving.tickets import Ticket, Tickets

ANEW = -1
"""Batches taken of an epoch that begins anew when it is resumed."""


class Sampling(Part):
    """The loader over all samples, and the count of those that were seen.

    Args:
        setting: the session's.
        loader: the user's.
        keep: which ids are in the partial set; it must not hold the session, which the loader may outlive.
        by_report: each batch needs a report; otherwise it is done with when it has been trained on.

    Attributes:
        needs_reports, batch_size: see ``by_report``; of the loader.
        dense_samples: samples that the plain loop trains on in an epoch, by all processes together.
        tickets: of the batches that were drawn from ``loader`` in this epoch.
        backward: tells of backward passes.
        unended: looks for an epoch that goes on and on.
        is_surplus: ``loader`` runs again, though its epoch is complete and has not ended.
    """

    name = "sampling"
    loader: SievedLoader | StreamLoader

    def __init__(
        self,
        setting: Setting,
        loader: DataLoader[Any] | StreamLoader,
        keep: Callable[[], Tensor | None] = lambda: None,
        *,
        by_report: bool = False,
    ) -> None:
        self._setting = setting
        self.needs_reports = by_report
        self._is_dealt = False
        if isinstance(loader, StreamLoader):
            self.loader, self.batch_size = loader, loader.batch_size
            self._ids, self.dense_samples = Ids(torch.arange(loader.samples)), loader.samples * setting.world.size
        else:
            self.loader = self._share(loader, keep)
        self.tickets = Tickets(by_report=by_report)
        self.backward = BackwardPasses(setting.model, *([] if by_report else [self.tickets.train]))
        samples = self.dense_samples if self._is_dealt else self.dense_samples // setting.world.size
        self.unended = Unended(setting.clock, samples, self.batch_size)
        self._reset()

    def _share(self, loader: DataLoader[Any], keep: Callable[[], Tensor | None]) -> SievedLoader:
        assert loader.batch_size is not None, "attach lets no such loader in"
        self._ids, self.batch_size = Ids(population_of(loader)), loader.batch_size
        self._length_at_attach = len(loader.dataset)  # type: ignore[arg-type]  # attach takes none without a length
        self.dense_samples = samples_of_epoch(loader)
        share, world = (0, 1), self._setting.world
        if deals_out(loader, world):
            share, self._is_dealt = (world.rank, world.size), True
        else:
            self.dense_samples *= world.size
        sampler = SievedBatchSampler(loader.sampler, loader.batch_size, loader.drop_last, keep=keep, share=share)
        return SievedLoader(loader, sampler)

    def _reset(self) -> None:
        self._place: tuple[int, list[Tensor]] | None = None  # where a loaded epoch goes on, until it does
        self.tickets.forget()
        self.is_surplus = self._is_iterated = False
        self._drawn_before = self._batches = self._steps_before = 0
        self._n_batches: int | None = None
        self._steps_allowed: int | None = None

    @property
    def population(self) -> Tensor:
        """Ids of all samples, ascending."""
        return self._ids.tensor()

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
        return len(self._ids)

    @property
    def samples_observed(self) -> int:
        """Samples reported in this epoch."""
        return 0

    def samples_seen(self) -> int:
        """Samples that were trained on in this epoch, by all processes together."""
        clock = self._setting.clock
        drawn = clock.samples_drawn - (0 if clock.is_resumed_at_end else self._samples_left())
        # Where gradients are accumulated there are more backward passes than steps.
        own = drawn or self.samples_observed or max(clock.steps, self.backward.count) * self.batch_size
        if isinstance(self.loader, StreamLoader) and not drawn and clock.steps:
            # What was taken before an epoch began anew counts in proportion.
            own = self.loader.samples * clock.steps // max(1, clock.steps - self._steps_before)
        return self._setting.world.sum(own, what="how many samples were seen")

    def observe(self, indices: Tensor | None, **report: Tensor | None) -> None:
        """Take a report on a batch; see ``Session.observe``."""

    def loss_weights(self, indices: Tensor | None) -> Tensor:
        """Weights for the losses of a batch; see ``Session.loss_weights``."""
        if indices is not None or not isinstance(self.loader, StreamLoader):
            return torch.ones(self.samples_of("loss_weights", indices).numel(), device=self._setting.device)
        ticket = self.tickets.ask()
        return torch.ones(self.batch_size if ticket is None else ticket.size, device=self._setting.device)

    def samples_of(self, asked: str, indices: Tensor | None) -> Tensor:
        """The samples of a batch, by default of the oldest one that is not done with."""
        if indices is not None:
            return torch.as_tensor(indices).cpu().long()
        ticket = self.tickets.ask()
        # Two backward passes of one batch close its ticket, and it is still the one in hand.
        samples: Tensor | None = None if ticket is None else ticket.ids
        if ticket is None and not self.needs_reports:
            samples = self.loader.current_indices
        if samples is None:
            raise UsageError(
                f"{asked}() cannot tell which samples are in this batch. Draw it from session.loader (not with "
                "in_order=False), or pass indices=."
            )
        return samples

    # --- what the loader tells, by way of the session ----------------------------------------------------------------

    def on_loader_start(self) -> None:
        """``session.loader`` is iterated, and no epoch has begun for it yet."""
        self._check_length()
        clock = self._setting.clock
        if clock.phase in ("between", "begun") or not clock.steps or self.is_surplus:
            return
        self.unended.check_start(is_complete=self.is_complete)
        self.is_surplus = self.is_complete

    def note_drawn(self) -> None:
        """The epoch of the iteration has begun: what is handed out from now on adds to what was drawn before."""
        if self.is_surplus:
            return
        # Batches of an iteration that was left early, and that nobody trained on, are drawn once more.
        self._drawn_before = self._setting.clock.samples_drawn - self._samples_left()
        self._is_iterated = True
        self.unended.start()
        self.tickets.begin(self.loader.iteration + 1)
        passed_over = 0
        if self._place is not None:
            taken, started_with = self._place
            self.loader.go_on(None if taken == ANEW else taken, started_with)
            self._place, passed_over = None, max(taken, 0)
        self._n_batches = self._length(passed_over)

    def on_batch(self) -> None:
        """A batch is handed out."""
        if self.is_surplus:
            return
        clock, loader = self._setting.clock, self.loader
        clock.phase = "running"
        clock.samples_drawn = self._drawn_before + loader.samples_handed
        self.tickets.draw(loader.handed_by, loader.handed_keys, loader.handed_size)
        if clock.steps > self._batches:
            self._steps_allowed = None  # a loop of several steps a batch
        self._batches += 1

    def on_loader_end(self) -> None:
        """All batches are handed out."""
        clock = self._setting.clock
        if clock.phase in ("begun", "running") and not self.is_surplus:
            clock.phase = "drained"
            self.tickets.settle()
            clock.stop_watch(self._setting.device)

    def on_step(self) -> None:
        """The optimizer has taken a step."""
        allowed = self._steps_allowed
        self.unended.check_step(None if allowed is None else max(allowed, self._batches))

    def before_step(self) -> None:
        """The optimizer is about to take a step.

        Raises:
            UsageError: it belongs to another epoch than the one that runs.
        """
        self.check_surplus()
        self.tickets.step()

    def check_surplus(self) -> None:
        """Raise ``UsageError`` where a loop trains on, though its epoch is complete."""
        if self.is_surplus:
            raise UsageError(
                "all batches of this epoch were trained on, and training goes on without its end, so nothing would be "
                "mutated, frozen or sieved. Loop over session.epochs(), or call session.end_epoch() after each epoch."
            )

    # --- how far the epoch is ----------------------------------------------------------------------------------------

    def _length(self, passed_over: int = 0) -> int | None:
        """Batches in an epoch that are left behind so many of all ranks together; None where that is not known."""
        try:
            return self.loader.n_left(passed_over)
        except TypeError:
            return None

    def _left(self) -> list[Ticket]:
        """Batches that were drawn, and are not done with."""
        return self.tickets.left(is_ended=self.loader.is_ended)

    def _samples_left(self) -> int:
        return sum(ticket.size for ticket in self._untrained()) if self._is_iterated else 0

    def _untrained(self) -> list[Ticket]:
        return self._left()

    @property
    def is_all_drawn(self) -> bool:
        """Whether the last batch of this epoch was handed out, though nobody has asked for one more."""
        loader = self.loader
        if not self._is_iterated:
            return False
        handed = loader.batches_handed
        return loader.is_ended or (
            self._n_batches is not None and handed + loader.passed_over > 0 and self._n_batches <= handed
        )

    @property
    def is_complete(self) -> bool:
        """Whether each batch of this epoch was handed out, and is done with."""
        return self.is_surplus or (self.is_all_drawn and not self._left())

    @property
    def goes_on_at(self) -> tuple[int, bool, int | None]:
        """The epoch, whether it is at its bottom, and the batches of it that a loaded state has passed over."""
        clock = self._setting.clock
        return clock.epoch, clock.is_resumed_at_end, None if self._place is None else self._place[0]

    @property
    def begins_anew(self) -> bool:
        """Whether a state was loaded from amid an epoch of which no batches can be passed over."""
        return self._place is not None and self._place[0] == ANEW

    def place(self, phase: str) -> dict[str, Any]:
        """Where an epoch of this phase stands, to go on there: the batches that all ranks have taken together (of a
        sampler of its own each rank), how many ranks these are, and the generators when it started."""
        loader, taken, started_with = self.loader, 0, list[Tensor]()
        if phase != "running":
            pass
        elif self._place is not None:
            taken, started_with = self._place
        elif not self._is_iterated or not self._can_go_on():
            taken = ANEW
        else:
            ranks = self._setting.world.size if self._is_dealt else 1
            taken = loader.passed_over + ranks * (loader.batches_handed - len(self._left()))
            started_with = loader.started_with
        return {
            "taken": taken,
            "ranks": self._setting.world.size,
            "dealt": self._is_dealt,
            "started_with": [state.clone() for state in started_with],
            "asks_for_more": loader.asks_for_more,
        }

    def _can_go_on(self) -> bool:
        return isinstance(self.loader, SievedLoader)

    def clock_state(self) -> dict[str, Any]:
        """The clock's, as it is to be saved: an epoch is at its bottom when its batches are done with."""
        clock = self._setting.clock
        state = clock.state_dict()
        if clock.phase in ("running", "drained") and not clock.is_resumed_at_end:
            state["phase"] = "drained" if self.is_complete else "running"
            state["samples_drawn"] -= self._samples_left()
        return state

    def go_on(self, place: Mapping[str, Any]) -> None:
        """Go on in an epoch at the place that :meth:`place` told; the clock has been loaded."""
        self._reset()
        taken, ranks, clock = place["taken"], place["ranks"], self._setting.clock
        now = self._setting.world.size
        knows_order = (place["dealt"] or ranks == 1) and (self._is_dealt or now == 1)
        if ranks != now and not knows_order and taken:
            taken = ANEW  # a sampler of each rank's own gives another order to so many
        self._place = (taken, list(place["started_with"]))
        # What each rank took: a loop of several batches a step has taken more than it made steps.
        self._batches = max(-(-taken // ranks) if place["dealt"] else taken, 0)
        left = self._length(max(taken, 0))
        self._steps_allowed = None if left is None else left + (clock.steps if taken == ANEW else self._batches)
        if taken == ANEW:
            self._steps_before = clock.steps
            self.unended.begin(anew=True)
            warnings.warn(
                f"The state was taken in the middle of epoch {clock.epoch}, and the batches taken of it cannot be "
                "passed over (they are not from session.loader, several processes sieve, or other processes than now "
                "dealt them out by a sampler of yours): the epoch begins anew, and what is done twice is billed.",
                stacklevel=4,
            )

    def begin_epoch(self, row: Row) -> None:
        self._reset()
        self.unended.begin()
        self.backward.watch()
        self._steps_allowed = self._length()

    def _check_length(self) -> None:
        """Raise ``UsageError`` where samples are sieved by their ids, and there are others than at ``attach``."""
        if not self._setting.recipe.sieves or isinstance(self.loader, StreamLoader):
            return
        if iterates_as(self.loader.sampler, SubsetRandomSampler):
            return  # goes on with the ids that it was given
        now = len(self.loader.dataset)  # type: ignore[arg-type]  # attach takes none without a length
        if now != self._length_at_attach:
            raise UsageError(
                f"the data set had {self._length_at_attach:,} samples when the session was attached, and has {now:,} "
                "now: the sieve knows them by their positions. Attach anew with the data set as it is (a state of this "
                "session does not fit it), or leave sieving out of the recipe."
            )

    def generator_states(self) -> list[Tensor]:
        """The states of the loader's own generators that go with ``clock_state``."""
        if self._setting.clock.phase in ("running", "drained") and self._is_iterated and self.is_complete:
            return self.loader.states_at_end()
        return [generator.get_state() for generator in loader_generators(self.loader)]

    def check_complete(self) -> None:
        if self.tickets.is_asked and self.loader.is_ended and not self.needs_reports and (left := self._left()):
            raise UsageError(
                f"{len(left)} batches of session.loader were drawn and not trained on, so it cannot be told which "
                "batch augmentation_seeds() or loss_weights() was asked for. Pass indices= to them."
            )

    def end_epoch(self) -> None:
        if self._setting.clock.is_resumed_at_end:
            return
        if self.is_all_drawn and not self.is_surplus:
            self.loader.asks_for_more = self.loader.is_ended
        if self._is_dealt and self._setting.world.disagrees(
            self.loader.started_with[:-1], what="the order of the batches"
        ):
            raise UsageError(
                "the ranks drew this epoch's batches in different orders, so that some samples were seen twice and "
                "others never: one rank has iterated session.loader, or drawn from its generator, more often than "
                "another. Iterate it equally often on every rank, and take another loader to look at batches."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reset()
        self.unended.begin()
        self.loader.go_on(None)

    def detach(self) -> None:
        self.backward.stop()
        self.loader.end_workers()

    def summarise(self) -> list[str]:
        return [f"sieving: {len(self.partial_set):,} of {len(self._ids):,} samples in use"]

    def describe(self) -> list[str]:
        lines = ["made: session.loader, whose batches drive the clock; your loader stays as it is"]
        n = self.backward.n_watched
        return [*lines, f"hooked: the gradients of {n} parameters, to see backward passes (sampling, guards)"]


def samples_of_epoch(loader: DataLoader[Any]) -> int:
    """Samples that the plain loop trains on in an epoch."""
    assert loader.batch_size is not None
    try:
        drawn = len(loader.sampler)  # type: ignore[arg-type]  # samplers need not have a length
    except TypeError:
        drawn = len(loader.dataset)  # type: ignore[arg-type]
    return drawn - drawn % loader.batch_size if loader.drop_last else drawn

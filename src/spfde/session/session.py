"""The session: follows a training loop, and calls its parts at the top and at the bottom of each epoch.

``spfde.attach`` makes it. What happens in an epoch stands in the timeline; at the top of the epoch the parts carry it
out, in this order: samples move, blocks that have converged amend the timeline, masks mutate (those of blocks that are
frozen now are pruned to their target first), blocks are frozen, learning rates are set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from spfde.core.errors import UsageError
from spfde.core.hooks import weakly
from spfde.engines.base import Job
from spfde.engines.choose import Choice
from spfde.model.sample import Sample
from spfde.session.bill import Bill
from spfde.session.capturing import CapturesSteps
from spfde.session.computing import Computing
from spfde.session.convergence import Convergence
from spfde.session.distributed import go_on_together, join_first, refuse_another_loader
from spfde.session.freezing import Freezing, Rates
from spfde.session.guards import Guards
from spfde.session.masks import Masks, WholeModel
from spfde.session.part import Part, Setting
from spfde.session.sampling import Sampling
from spfde.session.sieving import SievedSampling
from spfde.session.state import load_state, save_state
from spfde.sieving.loader import Event
from spfde.sieving.stream import StreamLoader


class Session(CapturesSteps):
    """A recipe attached to a training loop; made by ``spfde.attach``.

    Attributes:
        loader: a DataLoader over the partial set, with the arguments of the caller's.
        recipe: as attached, as is ``seed``.
        blueprint: which layers are sparse, which blocks there are, when each is frozen.
        timeline: what happens in each epoch, as far as it is known.
        cost: the bill so far, one row per finished epoch: modelled FLOPs, measured seconds and memory.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
        >>> for epoch in session.epochs():
        ...     for x, y in session.loader:
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> [row.epoch for row in session.cost.rows]
        [0, 1]
    """

    def __init__(
        self,
        setting: Setting,
        loader: DataLoader[Any] | StreamLoader,
        *,
        job: Job,
        choice: Choice,
        labels: Tensor | None,
        masks: Mapping[str, Tensor] | None,
        probe: Sample | None,
    ) -> None:
        self._setting = setting
        self.recipe, self.seed = setting.recipe, setting.seed
        self.blueprint, self.timeline = setting.blueprint, setting.timeline
        self._clock, self._attached = setting.clock, True
        setting.generator.manual_seed(setting.seed)

        # First what may still be refused: from here on the model and the optimizer are changed.
        rates = [Rates(setting)] if self.recipe.learning_rate is not None else []
        method = self.blueprint.method
        self._masks = WholeModel() if method is None else Masks(setting, method, masks)
        self._freezing = Freezing(setting)
        self._sampling = (
            Sampling(setting, loader)
            if isinstance(loader, StreamLoader) or not self.recipe.sieves
            else SievedSampling(setting, loader, labels)
        )
        self.loader = self._sampling.loader
        self._handles = setting.optimizer.hook(self._before_step, self._after_step)
        self._masks.install()
        self._computing = Computing(setting, job, choice, self._masks, self._freezing)
        self._bill = Bill(setting, self._sampling, self._masks, self._freezing.learning, job)
        self._guards = Guards(setting, self._masks, self._freezing, self._sampling.backward, self._bill.passes)
        adapts = self.recipe.freezes and self.recipe.freezing is not None and self.recipe.freezing.adapts
        converging = [Convergence(setting, self._masks, self._computing, probe)] if adapts else []
        #: In the order in which they are called.
        self._parts: list[Part] = [
            self._computing, self._sampling, *converging, self._masks, self._freezing, *rates, self._bill, self._guards
        ]  # fmt: skip
        #: Parts that have not begun this epoch yet, and those that have ended it: an interruption may come between.
        self._to_begin, self._have_ended = list[Part](), list[Part]()
        # Weak: a loader that outlives its session must not keep the session, and so the model, alive.
        self.loader.on_event = weakly(self._on_loader)

    # --- the clock -------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, each begun; a loaded state goes on where it was taken.

        Leaving the loop early does not end the epoch; one whose batches are all done with ends when the loop is
        started again.
        """
        self._check_attached()
        self._end_what_is_complete()
        while self._attached and self.epoch < len(self.timeline):
            self._begin_epoch()
            epoch = self.epoch
            self._sampling.unended.n_loops += 1
            try:
                yield epoch
            finally:
                self._sampling.unended.n_loops -= 1
            # The loop's body may have ended the epoch, or the session.
            if self._attached and self.epoch == epoch:
                self.end_epoch()

    def begin_epoch(self) -> None:
        """Begin the next epoch: for loops without ``epochs`` that draw their batches elsewhere. Begun, it stays begun.

        ``epochs`` and ``session.loader`` begin an epoch themselves. Without any of the three it begins at the first
        ``observe`` or optimizer step, when a batch of it has gone through the model already.
        """
        self._check_attached()
        go_on_together(self._setting.world, self._sampling.goes_on_at)
        if self._clock.is_resumed_at_end:
            self.end_epoch()
        self._begin_epoch()
        self._sampling.unended.is_begun_by_hand = True

    def end_epoch(self) -> None:
        """Close the running epoch: its row goes into the bill. ``epochs`` calls it; callbacks call it themselves.

        Raises:
            UsageError: no epoch is running, or samples were sieved without being observed.
        """
        self._check_attached()
        clock = self._clock
        if clock.phase == "between":
            raise UsageError(
                "end_epoch() was called while no epoch is running. Call it once after the batches of an epoch; "
                "session.epochs() calls it for you."
            )
        if not clock.is_resumed_at_end:
            self._verify(is_end=True)
        self._begin_epoch()
        for part in self._parts:
            if part not in self._have_ended:
                part.end_epoch()
                self._have_ended.append(part)
        clock.epoch += 1
        clock.phase = "between"
        clock.is_resumed_at_end = False

    def _begin_epoch(self, *, is_late: bool = False) -> None:
        """``is_late``: a batch of the epoch has gone through the model already."""
        clock = self._clock
        if clock.phase == "between" and clock.epoch < len(self.timeline):
            join_first(self._setting.world)
            self._guards.before_masks()
            self._setting.leading.reset()
            self._to_begin, self._have_ended = list(self._parts), []
            clock.begin_epoch()
            clock.is_late = is_late
        while self._to_begin:
            self._to_begin[0].begin_epoch(self.timeline[clock.epoch])
            del self._to_begin[0]

    def _end_what_is_complete(self) -> None:
        """A state from the bottom of an epoch was loaded, or a loop was left there."""
        go_on_together(self._setting.world, self._sampling.goes_on_at)
        if self._clock.is_resumed_at_end or (self._clock.phase != "between" and self._sampling.is_complete):
            self.end_epoch()

    # --- the loop --------------------------------------------------------------------------------------------------

    def observe(
        self,
        logits: Tensor | None = None,
        y: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        correct: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> None:
        """Tell the sieve how a batch went: once a batch, in the order of the batches. Without a sieve it does nothing.

        A loader may stand between, and run ahead: without ``indices`` the report is on the oldest batch of
        ``session.loader`` that has none. Missing ones are found when the epoch ends.

        Args:
            logits: the model's output for the batch, [N, classes].
            y: class labels, [N]; beside correct or loss only to balance classes that are not known otherwise.
            indices: indices of the samples in the data set, [N]; by default those of the oldest batch without a report.
            correct: instead of logits and y: which samples the model got right, bool [N].
            loss: instead: the loss of each sample, [N]; for tasks without right and wrong.

        Raises:
            UsageError: called more often than batches were drawn, or training goes on without ``end_epoch``.
            InvalidArgument: not exactly one kind of evidence, one that the criterion has no use for, wrong lengths, no
                classes as labels, ids outside the data set (those on an accelerator are looked at when the epoch ends).
        """
        self._check_attached()
        self._begin_epoch(is_late=True)
        self._sampling.check_surplus()
        self._sampling.observe(indices, logits=logits, y=y, correct=correct, loss=loss)

    def loss_weights(self, indices: Tensor | None = None) -> Tensor:
        """Weights for the losses of a batch, so that sieving leaves the gradient unbiased.

        With ``DataSieving(rescale_loss=True)`` backpropagate ``(session.loss_weights() * loss).mean()``, where ``loss``
        is one loss a sample, and observe the loss as it is. Their mean over the partial set is 1, so that a learning
        rate means what it did. Otherwise all are 1.

        Args:
            indices: indices of the samples in the data set, [N]; by default those of the oldest batch that is not done
                with: reported, or where no reports are needed, trained on.

        Returns:
            float32 [N], on the model's device.

        Raises:
            UsageError: it cannot be told which samples are in the batch.
            InvalidArgument: an index is not in the partial set.
        """
        self._check_attached()
        self._begin_epoch()
        return self._sampling.loss_weights(indices)

    def augmentation_seeds(self, indices: Tensor | None = None) -> Tensor:
        """Seeds from which to augment a batch: equal seeds must give a sample the same augmentation.

        With ``attach(cache=...)``, and once blocks are frozen, each sample comes in so many variants, drawn anew
        whenever another block is frozen, and the next forward pass in training mode reads the frozen front's outputs
        for them from the cache. Otherwise every epoch has seeds of its own.

        Args:
            indices: indices of the samples in the data set, [N]; by default those of the oldest batch that is not done
                with: reported, or where no reports are needed, trained on.

        Returns:
            int64 [N], each in [0, 2**62).

        Raises:
            UsageError: it cannot be told which samples are in the batch.
        """
        self._check_attached()
        self._begin_epoch()
        return self._computing.augmentation_seeds(self._sampling.samples_of("augmentation_seeds", indices))

    def _on_loader(self, event: Event) -> None:
        if not self._attached:
            return
        if event == "taken over":
            refuse_another_loader(self._setting.world)
        elif event == "start":
            if self._clock.is_resumed_at_end:
                # A state from the bottom of an epoch, loaded by a loop that does not ask for epochs().
                self.end_epoch()
            self._sampling.on_loader_start()
            self._begin_epoch()
            self._sampling.note_drawn()
        elif event == "end":
            self._sampling.on_loader_end()
        elif self.epoch < len(self.timeline):
            self._sampling.on_batch()
            self._computing.engine.on_batch()

    def _before_step(self, *_: Any) -> None:
        self._begin_epoch(is_late=True)
        self._guards.before_step()
        self._sampling.before_step()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._sampling.tickets.stepped(optimizer)
        if not self._setting.leading.leads(optimizer):
            return
        clock = self._clock
        if clock.phase == "begun":
            # A batch from elsewhere: only the end of the epoch can be resumed from now on.
            clock.phase = "running"
        clock.step += 1
        clock.steps += 1
        self._sampling.on_step()
        self._freezing.on_step()
        self._bill.on_step()

    # --- attaching and detaching -----------------------------------------------------------------------------------

    def detach(self) -> None:
        """Undo everything: hooks, frozen flags, held BatchNorms and the split of the optimizer's groups.

        The weights stay as they are, zeros included; ``masks``, ``cost`` and ``frozen_blocks`` can still be read.
        """
        if not self._attached:
            return
        self._attached = False
        for handle in self._handles:
            handle.remove()
        for part in self._parts:
            part.detach()

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the session remembers, as tensors and primitives.

        It can be taken at any time. A state from amid an epoch goes on behind the batches of ``session.loader`` that
        are done with; with batches from elsewhere, and where several processes sieve, that epoch begins anew, and what
        is done twice is billed. Of a sharded model (FSDP) whole masks are gathered: every rank has to call it.
        """
        self._check_attached()
        if self._to_begin:
            self._begin_epoch()
        return save_state(self._setting, self._parts, self._sampling)

    def load_state_dict(self, state: Mapping[str, Any], *, trust_weights: bool = False) -> None:
        """Go on where ``state_dict`` was taken. Load the model and the optimizer first, after ``attach``.

        Args:
            state: from ``state_dict``.
            trust_weights: take other weights than those that the state was saved with, as long as they are zero outside
                its masks.

        Raises:
            StateMismatch: the state is from another recipe, model, run length, data set or version, or damaged; or the
                masked weights are not those that it was saved with.
        """
        self._check_attached()
        self._guards.trusts_weights = trust_weights
        self._to_begin, self._have_ended = [], []
        load_state(self._setting, self._parts, self._sampling, state)
        self.seed = self._setting.seed

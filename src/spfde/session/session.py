"""The session: follows a training loop, and calls its parts at the top and at the bottom of each epoch.

``spfde.attach`` makes it. What happens in an epoch stands in the timeline; at the top of the epoch the parts carry it
out, in this order: samples move, blocks that have converged amend the timeline, masks mutate (those of blocks that are
frozen now are pruned to their target first), blocks are frozen, learning rates are set.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from spfde.core.errors import UsageError
from spfde.engines.base import Job
from spfde.engines.choose import Choice
from spfde.model.sample import Sample
from spfde.session.bill import Bill
from spfde.session.computing import Computing
from spfde.session.convergence import Convergence
from spfde.session.freezing import Freezing, Rates
from spfde.session.masks import Masks, WholeModel
from spfde.session.part import Part, Setting
from spfde.session.sampling import Sampling, SievedSampling
from spfde.session.state import load_state, save_state
from spfde.session.view import SessionView
from spfde.sieving.loader import Event


class Session(SessionView):
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
        loader: DataLoader[Any],
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
        self._clock = setting.clock
        self._attached = True
        setting.generator.manual_seed(setting.seed)

        # First what may still be refused: from here on the model and the optimizer are changed.
        rates = [Rates(setting)] if self.recipe.learning_rate is not None else []
        method = self.blueprint.method
        self._masks = WholeModel() if method is None else Masks(setting, method, masks)
        self._freezing = Freezing(setting)
        self._sampling = SievedSampling(setting, loader, labels) if self.recipe.sieves else Sampling(setting, loader)
        self.loader = self._sampling.loader
        self._handles = [
            setting.optimizer.register_step_pre_hook(self._before_step),
            setting.optimizer.register_step_post_hook(self._after_step),
        ]
        self._masks.install()
        self._computing = Computing(setting, job, choice, self._masks, self._freezing)
        self._bill = Bill(setting, self._sampling, self._masks)
        adapts = self.recipe.freezes and self.recipe.freezing is not None and self.recipe.freezing.adapts
        converging = [Convergence(setting, self._masks, self._computing, probe)] if adapts else []
        #: In the order in which they are called.
        self._parts: list[Part] = [
            self._computing, self._sampling, *converging, self._masks, self._freezing, *rates, self._bill
        ]  # fmt: skip
        self._listen_to_loader()

    # --- the clock -------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, each begun; a loaded state goes on where it was taken.

        Leaving the loop early does not end the epoch.
        """
        self._check_attached()
        if self._clock.is_resumed_at_end:
            self.end_epoch()
        while self._attached and self.epoch < len(self.timeline):
            self._begin_epoch()
            epoch = self.epoch
            yield epoch
            # The loop's body may have ended the epoch, or the session.
            if self._attached and self.epoch == epoch:
                self.end_epoch()

    def begin_epoch(self) -> None:
        """Begin the next epoch: for loops without ``epochs`` that draw their batches elsewhere. Begun, it stays begun.

        ``epochs`` and ``session.loader`` begin an epoch themselves. Without any of the three it begins at the first
        ``observe`` or optimizer step, when a batch of it has gone through the model already.
        """
        self._check_attached()
        if self._clock.is_resumed_at_end:
            self.end_epoch()
        self._begin_epoch()

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
        for part in self._parts:
            part.end_epoch()
        clock.epoch += 1
        clock.phase = "between"
        clock.is_resumed_at_end = False

    def _begin_epoch(self) -> None:
        clock = self._clock
        if clock.phase != "between" or clock.epoch >= len(self.timeline):
            return
        clock.begin_epoch()
        for part in self._parts:
            part.begin_epoch(self.timeline[clock.epoch])

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
        """Tell the sieve how a batch went: once a batch, anywhere in the loop's body. Without a sieve it does nothing.

        Args:
            logits: the model's output for the batch, [N, classes].
            y: class labels, [N]; beside correct or loss only to balance classes that are not known otherwise.
            indices: indices of the samples in the data set, [N]; by default those of the batch drawn last.
            correct: instead of logits and y: which samples the model got right, bool [N].
            loss: instead: the loss of each sample, [N]; for tasks without right and wrong.

        Raises:
            UsageError: called twice for a batch, or before any batch.
            InvalidArgument: not exactly one kind of evidence, one that the criterion has no use for, wrong lengths, or
                labels that are no classes (those on an accelerator are looked at when the epoch ends).
        """
        self._check_attached()
        self._begin_epoch()
        self._sampling.observe(indices, logits=logits, y=y, correct=correct, loss=loss)

    def loss_weights(self, indices: Tensor | None = None) -> Tensor:
        """Weights for the losses of a batch, so that sieving leaves the gradient unbiased.

        With ``DataSieving(rescale_loss=True)`` backpropagate ``(session.loss_weights() * loss).mean()``, where ``loss``
        is one loss a sample, and observe the loss as it is. Their mean over the partial set is 1, so that a learning
        rate means what it did. Otherwise all are 1.

        Args:
            indices: indices of the samples in the data set, [N]; by default those of the batch drawn last.

        Returns:
            float32 [N], on the model's device.

        Raises:
            UsageError: it cannot be told which samples are in the batch.
            InvalidArgument: an index is not in the partial set.
        """
        self._check_attached()
        self._begin_epoch()
        return self._sampling.loss_weights(indices)

    @property
    def caches_prefix(self) -> bool:
        """Whether outputs of the frozen front are kept; then all augmentation must come from ``augmentation_seeds``."""
        return self._computing.caches_prefix

    def augmentation_seeds(self, indices: Tensor | None = None) -> Tensor:
        """Seeds from which to augment a batch: equal seeds must give a sample the same augmentation.

        With ``attach(cache=...)``, and once blocks are frozen, each sample comes in so many variants, drawn anew
        whenever another block is frozen, and the next forward pass in training mode reads the frozen front's outputs
        for them from the cache. Otherwise every epoch has seeds of its own.

        Args:
            indices: indices of the samples in the data set, [N]; by default those of the batch drawn last.

        Returns:
            int64 [N], each in [0, 2**62).

        Raises:
            UsageError: it cannot be told which samples are in the batch.
        """
        self._check_attached()
        self._begin_epoch()
        return self._computing.augmentation_seeds(self._sampling.samples_of("augmentation_seeds", indices))

    def _on_loader(self, event: Event) -> None:
        if event == "start":
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
        self._begin_epoch()

    def _after_step(self, *_: Any) -> None:
        clock = self._clock
        if clock.phase == "begun":
            # A batch from elsewhere: only the end of the epoch can be resumed from now on.
            clock.phase = "running"
        clock.step += 1
        clock.steps += 1

    # --- attaching and detaching -----------------------------------------------------------------------------------

    def holds(self, target: object) -> bool:
        """Is this session attached to that model or optimizer?"""
        return self._attached and (target is self._setting.model or target is self._setting.optimizer)

    def detach(self) -> None:
        """Undo everything: hooks, frozen flags, held BatchNorms and the split of the optimizer's groups.

        The weights stay as they are, zeros included; ``masks`` and ``cost`` can still be read.
        """
        if not self._attached:
            return
        self._attached = False
        for handle in self._handles:
            handle.remove()
        for part in self._parts:
            part.detach()

    def infer_masks(self) -> None:
        """Take the masks from the model's zeros, after loading a sparse checkpoint that came without a session.

        Raises:
            StateMismatch: the model is denser than the recipe allows.
            UsageError: the recipe has no sparsity.
        """
        self._check_attached()
        self._masks.infer_masks()

    def _listen_to_loader(self) -> None:
        # Weak: a loader that outlives its session must not keep the session, and so the model, alive.
        of_session = weakref.ref(self)

        def on_event(event: Event) -> None:
            session = of_session()
            if session is not None and session._attached:
                session._on_loader(event)

        self.loader.on_event = on_event

    def _check_attached(self) -> None:
        if not self._attached:
            raise UsageError("the session is detached. Call spfde.attach again to go on.")

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the session remembers, as tensors and primitives.

        Raises:
            UsageError: taken between two batches of an epoch; only the top and the bottom of an epoch can be resumed.
        """
        self._check_attached()
        if self._clock.phase == "running":
            raise UsageError(
                "state_dict() was called between two batches. Take it at the top of an epoch, or after its last batch "
                "(with batches from elsewhere, after end_epoch())."
            )
        if self._clock.phase == "drained" and not self._clock.is_resumed_at_end:
            self._sampling.check_reported()
        return save_state(self._setting, self._parts, self._sampling)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Load the model and the optimizer first.

        Raises:
            StateMismatch: the state is from another recipe, model, run length, data set or version, or damaged.
        """
        self._check_attached()
        load_state(self._setting, self._parts, self._sampling, state)
        self.seed = self._setting.seed

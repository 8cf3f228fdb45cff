"""What there is to see of a session, and to check."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from spfde.core.clock import Clock, Phase
from spfde.core.errors import UsageError
from spfde.core.hooks import is_silent
from spfde.cost.ledger import Ledger
from spfde.planning.timeline import Timeline
from spfde.session.bill import Bill
from spfde.session.computing import Computing
from spfde.session.freezing import Freezing
from spfde.session.guards import Guards
from spfde.session.masks import WholeModel
from spfde.session.part import Part, Setting
from spfde.session.sampling import Sampling


class SessionView:
    """What ``Session`` shows, and the checks of it that anyone may ask for."""

    timeline: Timeline
    _setting: Setting
    _attached: bool
    _clock: Clock
    _parts: Sequence[Part]
    _computing: Computing
    _sampling: Sampling
    _masks: WholeModel
    _freezing: Freezing
    _bill: Bill
    _guards: Guards

    @property
    def is_attached(self) -> bool:
        """Whether it follows the loop: until ``detach``.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.is_attached
            True
            >>> session.detach()
            >>> session.is_attached
            False
        """
        return self._attached

    @property
    def epoch(self) -> int:
        """The epoch that runs now or comes next, from 0."""
        return self._clock.epoch

    @property
    def gradient_bytes(self) -> tuple[int, int]:
        """Bytes of gradients that this process has handed over to be averaged, and those of whole gradients.

        Counted where the session averages them for DistributedDataParallel (``attach(sparse_allreduce=True)``).

        Example:
            >>> spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2).gradient_bytes
            (0, 0)
        """
        return self._guards.reducing.bytes_averaged

    @property
    def phase(self) -> Phase:
        """Where in an epoch it stands: "between" two, "begun", "running", or "drained": all its batches are drawn.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.phase
            'between'
            >>> session.begin_epoch()
            >>> session.phase
            'begun'
        """
        return self._clock.phase

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._clock.step

    @property
    def engine(self) -> str:
        """Name of the engine that computes the model."""
        return self._computing.choice.name

    @property
    def engine_reason(self) -> str:
        """Why it was taken, in a few words."""
        return self._computing.choice.reason

    @property
    def cost(self) -> Ledger:
        """The bill so far."""
        return self._bill.ledger

    @property
    def frozen_blocks(self) -> int:
        """Number of frozen blocks; of a detached session, of those that were frozen when it was detached."""
        return self._freezing.n_frozen

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Masks by parameter name; True where the weight exists. Of a sharded model (FSDP) they are DTensors."""
        return dict(self._masks.masks)

    @property
    def density(self) -> float:
        """Active share of the masked tensors; 1.0 where none is masked."""
        return self._masks.density

    @property
    def explored(self) -> float:
        """Share of the masked weights that have been active at some time (ITOP's rate); 1.0 where none is masked."""
        return self._masks.explored

    @property
    def partial_set(self) -> Tensor:
        """Indices of the samples in use, ascending."""
        return self._sampling.partial_set

    @property
    def removed_set(self) -> Tensor:
        """Indices of the samples that are out, the queue's head first."""
        return self._sampling.removed_set

    @property
    def sieve_turnover(self) -> Mapping[str, int]:
        """Samples moved at the top of this epoch, and distinct samples used so far."""
        return {"moved": self._clock.sieve_moved, "ever_used": self._sampling.n_used}

    @property
    def needs_reports(self) -> bool:
        """Whether ``observe`` has to be called once a batch; not where nothing is sieved, or by chance alone.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.needs_reports
            False
        """
        return self._sampling.needs_reports

    @property
    def samples_observed(self) -> int:
        """Samples that were reported to ``observe`` in this epoch; 0 where nothing is sieved.

        Example:
            >>> recipe = spfde.Recipe(sieving=spfde.DataSieving())
            >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=2)
            >>> x, y = next(iter(session.loader))
            >>> session.observe(model(x), y)
            >>> session.samples_observed == len(y)
            True
        """
        return self._sampling.samples_observed

    @property
    def begins_anew(self) -> bool:
        """Whether a state was loaded from amid an epoch that begins anew, for its batches cannot be passed over.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.begins_anew
            False
        """
        return self._sampling.begins_anew

    @property
    def caches_prefix(self) -> bool:
        """Whether outputs of the frozen front are kept; then all augmentation must come from ``augmentation_seeds``."""
        return self._computing.caches_prefix

    def holds(self, target: object) -> bool:
        """Is this session attached to that model or optimizer?"""
        held = (self._setting.model, *self._setting.optimizer.each)
        return self._attached and any(target is each for each in held)

    def holds_parameters(self, ids: Collection[int]) -> int:
        """How many of these parameters, by ``id``, are this session's."""
        return sum(id(p) in ids for p in self._setting.model.parameters()) if self._attached else 0

    @property
    def name_of_model(self) -> str:
        """The class of its model."""
        return type(self._setting.model).__name__

    def stop_watch(self) -> None:
        """This epoch's training is done: what comes now, such as a validation, is not among its seconds.

        ``session.loader`` does it itself at its end; this is for trainers that do not ask for one batch more than there
        are. On an accelerator it waits for the work under way.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.begin_epoch()
            >>> session.stop_watch()
        """
        self._clock.stop_watch(self._setting.device)

    def warn_if_early(self) -> None:
        """Warn where training ends here with more weights than the recipe asks for, as trainers that stop early do.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.warn_if_early()  # a fixed mask has its sparsity from the beginning
        """
        target = self._masks.target_density
        if self.epoch < len(self.timeline) and self.density > target + 1e-6:
            warnings.warn(
                f"training ended after {self.epoch} of {len(self.timeline)} epochs, and {self.density:.1%} of the "
                f"masked weights exist, where the recipe's sparsity is {1 - target:.1%}: its method prunes to that as "
                "the run ends. Train to the end, or choose soft_bound=False where the method has one.",
                stacklevel=3,
            )

    def take_masks(self, state: Mapping[str, Any]) -> None:
        """Take the masks of a saved state whose weights were loaded, as a trainer loads its best checkpoint at the end.

        Clock, bill and sieve stay: this is no way to train on.

        Args:
            state: from ``state_dict``.

        Raises:
            StateMismatch: it is of another model or sparsity, or a weight outside its masks is not zero.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.take_masks(session.state_dict())
        """
        self._check_attached()
        remembers = self._masks.remembers
        if remembers is not None:
            remembers.load_state_dict(state["parts"][self._masks.name])

    def infer_masks(self) -> None:
        """Take the masks from the model's zeros, after loading a sparse checkpoint that came without a session.

        Raises:
            StateMismatch: the model is denser than the recipe allows.
            UsageError: the recipe has no sparsity.
        """
        self._check_attached()
        self._masks.infer_masks()

    def verify(self) -> None:
        """See whether all that the session promises still holds: the end of every epoch does it, and whoever asks.

        Weights outside the masks are masked again, which a warning says once. With several processes every rank has to
        call it. ``docs/guards.md`` lists what is looked for.

        Raises:
            UsageError: parameters were replaced, another optimizer steps than the attached one, a scheduler moves the
                rates that the recipe sets, or ranks differ; with the remedy.

        Example:
            >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
            >>> session.verify()
        """
        self._check_attached()
        self._verify()

    def _verify(self, *, is_end: bool = False) -> None:
        """Raise the first of what all parts find, on all ranks; ``is_end``: whether the epoch is complete, too."""
        found: Exception | None = None
        for check in [part.verify for part in self._parts] + [part.check_complete for part in self._parts if is_end]:
            try:
                check()
            except Exception as error:
                # Raised at once it would leave the other ranks waiting.
                found = found or error
        self._guards.compare_ranks(found, what="the end of an epoch" if is_end else "what verify() looks at")

    def _check_attached(self) -> None:
        if not self._attached:
            raise UsageError("the session is detached. Call spfde.attach again to go on.")
        if is_silent(self):
            raise UsageError(
                "the session was called within a step that is captured, whose lines do not run when it is replayed. "
                "Call it before or after the step, and pass what it returns, such as loss weights, as an argument."
            )

    def __repr__(self) -> str:
        state = "attached" if self._attached else "detached"
        what = f"engine={self.engine}, epoch {self.epoch} of {len(self.timeline)}, step {self.step}"
        lines = [f"Session({state}, {what})", *(f"  {line}" for part in self._parts for line in part.summarise())]
        if self._attached:
            lines.append("  hooked: the optimizer's steps (clock)")
            lines += [f"  {line}" for part in self._parts for line in part.describe()]
        return "\n".join(lines)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model that holds its session is another model, and has none."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError(
            "a session cannot be pickled, nor a model that holds one. Save model.state_dict(), optimizer.state_dict() "
            "and session.state_dict(), or keep the session elsewhere than on the model."
        )

"""What there is to see of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from spfde.core.clock import Clock
from spfde.core.errors import UsageError
from spfde.cost.ledger import Ledger
from spfde.planning.timeline import Timeline
from spfde.session.bill import Bill
from spfde.session.computing import Computing
from spfde.session.freezing import Freezing
from spfde.session.masks import WholeModel
from spfde.session.part import Part
from spfde.session.sampling import Sampling


class SessionView:
    """The read-only side of ``Session``."""

    timeline: Timeline
    _attached: bool
    _clock: Clock
    _parts: Sequence[Part]
    _computing: Computing
    _sampling: Sampling
    _masks: WholeModel
    _freezing: Freezing
    _bill: Bill

    @property
    def epoch(self) -> int:
        """The epoch that runs now or comes next, from 0."""
        return self._clock.epoch

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
        """Number of frozen blocks."""
        return self._freezing.n_frozen

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Masks by parameter name; True where the weight exists."""
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

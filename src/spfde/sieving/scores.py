"""Scores: how difficult each sample was in an interval, by one criterion or another.

A criterion is two things: a function from what the loop reports to one value for each sample of the batch, and a scorer
that adds these up over an interval. The samples with the lowest difficulty are the easiest and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem
from spfde.sieving.accumulator import Deferred, check_range
from spfde.sieving.evidence import (
    average_loss,
    correct_from_logits,
    correct_from_loss,
    el2n_from_logits,
    loss_from_logits,
)
from spfde.sieving.forgetting import ForgettingCounter, NeverLearned

Criterion = Literal["forgetting", "loss", "el2n", "random"]

CRITERIA: Mapping[Criterion, str] = {
    "forgetting": "The fewest falls from right to wrong are easiest.",
    "loss": "The lowest mean loss is easiest.",
    "el2n": "The lowest mean L2 norm of softmax(logits) - one_hot(y) is easiest.",
    "random": "A random choice: the baseline.",
}
"""What each criterion takes for easy, in a line."""


class Scorer(Protocol):
    """What a session asks of the criterion's scorer."""

    def observe(self, indices: Tensor, values: Tensor) -> None:
        """Note one batch: sample ids, and the criterion's value for each."""

    def check_range(self, indices: Tensor) -> None:
        """Raise ``InvalidArgument`` where an id is out of range."""

    def difficulty(self) -> Tensor:
        """Difficulty per sample id, shape (n,), without NaN; the lowest are the easiest."""

    def reset(self) -> None:
        """Forget everything: a new interval begins."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


def mean_score(total: Tensor, presentations: Tensor) -> Tensor:
    """Mean score per sample; the lowest are the easiest.

    Args:
        total: sum of the scores over the presentations, shape (n,), float64.
        presentations: how often each sample was presented, shape (n,), long.

    Returns:
        Shape (n,), float64. A sample without a presentation gives no evidence and is infinitely hard, as is one with a
        score that was NaN.
    """
    mean = (total / presentations).masked_fill(presentations == 0, torch.inf)
    return mean.masked_fill(mean.isnan(), torch.inf)


class MeanScore(Deferred):
    """The mean of a score over the presentations of samples 0 … n-1 in one interval."""

    noun: ClassVar[str] = "mean scores"
    argument: ClassVar[str] = "observe"
    dtype: ClassVar[torch.dtype] = torch.float32

    def difficulty(self) -> Tensor:
        """As the function ``mean_score`` has it."""
        self._fold()
        return mean_score(self._kept["total"], self._kept["presentations"])

    def _fields(self) -> dict[str, Tensor]:
        return {
            "total": torch.zeros(self.n, dtype=torch.float64),
            "presentations": torch.zeros(self.n, dtype=torch.long),
        }

    def _fold_in(self, indices: Tensor, values: Tensor) -> None:
        # Onto the running sum, in order of time, so that it does not depend on when results are read.
        self._kept["total"].index_add_(0, indices, values.double())
        self._kept["presentations"] += torch.bincount(indices, minlength=self.n)


class RandomScore:
    """All samples alike: the sieve breaks ties at random, from the session's seed. Nothing is remembered."""

    def __init__(self, n: int) -> None:
        self.n = n

    def observe(self, indices: Tensor, values: Tensor) -> None:
        """Look at the ids alone."""
        self.check_range(indices)

    def check_range(self, indices: Tensor) -> None:
        """Raise ``InvalidArgument`` where an id is out of range."""
        check_range(indices, self.n)

    def difficulty(self) -> Tensor:
        """Zeros, shape (n,)."""
        return torch.zeros(self.n)

    def reset(self) -> None:
        """There is nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to load."""


def make_scorer(criterion: Criterion, n: int, *, never_learned: NeverLearned = "hard") -> Scorer:
    """The scorer of a criterion for sample ids 0 … n-1."""
    if criterion == "forgetting":
        return ForgettingCounter(n, never_learned=never_learned)
    return RandomScore(n) if criterion == "random" else MeanScore(n)


def correct_from(
    logits: Tensor | None, y: Tensor | None, *, correct: Tensor | None = None, loss: Tensor | None = None
) -> Tensor:
    """Which samples the model got right, bool [N], from exactly one kind of evidence.

    Raises:
        InvalidArgument: none or more than one kind was given.
    """
    if (outputs := _outputs(logits, y, correct, loss)) is not None:
        return correct_from_logits(*outputs)
    if loss is not None:
        return correct_from_loss(loss)
    return torch.as_tensor(correct).detach().bool().reshape(-1)


def loss_from(
    logits: Tensor | None, y: Tensor | None, *, correct: Tensor | None = None, loss: Tensor | None = None
) -> Tensor:
    """Loss of each sample, [N]: as given, or the cross entropy.

    Raises:
        InvalidArgument: not exactly one kind of evidence, or one that tells no loss.
    """
    if (outputs := _outputs(logits, y, correct, loss)) is not None:
        return loss_from_logits(*outputs)
    if loss is not None:
        return average_loss(loss)
    rule, remedy = 'tells no loss, which criterion="loss" needs', "Pass loss= (one loss per sample), or logits and y."
    raise InvalidArgument(Problem("observe", "correct=", rule, remedy))


def el2n_from(
    logits: Tensor | None, y: Tensor | None, *, correct: Tensor | None = None, loss: Tensor | None = None
) -> Tensor:
    """Error L2 norm of each sample, [N].

    Raises:
        InvalidArgument: not exactly one kind of evidence, or one without class probabilities.
    """
    if (outputs := _outputs(logits, y, correct, loss)) is not None:
        return el2n_from_logits(*outputs)
    given = "correct=" if correct is not None else "loss="
    rule = 'tells no class probabilities, which criterion="el2n" needs'
    remedy = 'Pass logits and y. For a task without classes sieve by criterion="loss" or "forgetting".'
    raise InvalidArgument(Problem("observe", given, rule, remedy))


def nothing_from(
    logits: Tensor | None, y: Tensor | None, *, correct: Tensor | None = None, loss: Tensor | None = None
) -> Tensor:
    """A zero for each sample, [N], from any one kind of evidence."""
    _outputs(logits, y, correct, loss)
    given = next(item for item in (logits, correct, loss) if item is not None)
    return torch.zeros(torch.as_tensor(given).shape[:1])


EVIDENCE: Mapping[Criterion, Callable[..., Tensor]] = {
    "forgetting": correct_from,
    "loss": loss_from,
    "el2n": el2n_from,
    "random": nothing_from,
}
"""What a report says of each sample, by criterion."""


def _outputs(
    logits: Tensor | None, y: Tensor | None, correct: Tensor | None, loss: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Logits and labels where these are the evidence; labels alone may stand beside another kind."""
    kinds = (logits is not None) + (correct is not None) + (loss is not None)
    if kinds != 1 or (logits is not None and y is None):
        rule = "takes logits and y, or correct=, or loss="
        raise InvalidArgument(Problem("observe", "its arguments", rule, "Pass exactly one of them."))
    return None if logits is None or y is None else (logits, y)

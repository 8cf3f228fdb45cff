"""Sieving criteria: what a batch tells of its samples, and how difficult these are by the end of an interval.

A criterion is one class with a name, registered: here those of this package, anywhere else those of others. The
samples with the lowest difficulty are the easiest and leave: those of the partial set, for as many of the removed ones;
or, with ``redraws``, those of all samples, and the rest is the next partial set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.registry import register, registered
from spfde.sieving.accumulator import Accumulator
from spfde.sieving.evidence import (
    average_loss,
    correct_from_logits,
    el2n_from_logits,
    loss_from_logits,
)

NeverLearned = Literal["hard", "literal"]

_METHODS: Mapping[str, str] = {"logits and y": "from_logits", "correct=": "from_correct", "loss=": "from_loss"}
"""What may be reported of a batch, and which method takes it."""


class SievingCriterion:
    """Which samples are easy: the base of every criterion.

    A subclass defines at least one of ``from_logits``, ``from_correct`` and ``from_loss``: what it takes. The values
    that these give are added up over an interval by ``start``, ``add`` and ``difficulty``: by default to their mean.

    Attributes:
        name: how recipes and the command line call it.
        summary: what counts as easy, in a line.
        references: what to cite for it.
        needs_every_batch: whether a batch that is not reported is a mistake.
        presentations_needed: how often a sample must come in an interval before anything can be said of it.
        chooses_at_random: whether all samples are alike to it, so that each leaves with the same probability.
        redraws: whether each update draws the whole partial set anew from all samples. What is kept of a sample then
            stays over intervals, as most would have nothing else while they are left out.
        random_share: with ``redraws``, the share of the samples to leave that is drawn at random, however hard.

    Example:
        >>> class Margin(spfde.sieving.SievingCriterion):
        ...     name = "margin"
        ...     summary = "The largest lead of the most probable class is easiest."
        ...
        ...     def from_logits(self, logits, y):
        ...         first, second = logits.softmax(1).topk(2).values.T
        ...         return second - first
        >>> Margin().evidence(torch.zeros(3, 10), torch.zeros(3))
        tensor([0., 0., 0.])
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()
    needs_every_batch: ClassVar[bool] = True
    presentations_needed: ClassVar[int] = 1
    chooses_at_random: ClassVar[bool] = False
    redraws: ClassVar[bool] = False
    random_share: ClassVar[float] = 0.0

    def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        """One value a sample, [N], from the model's output, [N, classes], and its labels; both detached."""
        raise self._refusal("logits and y")

    def from_correct(self, correct: Tensor) -> Tensor:
        """One value a sample, [N], from which samples the model got right, bool [N]."""
        raise self._refusal("correct=")

    def from_loss(self, loss: Tensor) -> Tensor:
        """One value a sample, [N], from the loss of each, [N]; detached."""
        raise self._refusal("loss=")

    def start(self, n: int) -> dict[str, Tensor]:
        """What is kept at the start of an interval: tensors by name, each with an entry for each of ``n`` samples."""
        return {"total": torch.zeros(n), "presentations": torch.zeros(n, dtype=torch.int32)}

    def add(self, kept: dict[str, Tensor], indices: Tensor, values: Tensor) -> None:
        """Add presentations to what is kept: sample ids and their values, both [m], in order of time, on the CPU.

        Splitting a stream of presentations must give the same as one call.
        """
        kept["total"].index_add_(0, indices, values.float())
        kept["presentations"] += torch.bincount(indices, minlength=len(kept["presentations"]))

    def difficulty(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Difficulty of each sample, [n], without NaN; the lowest are the easiest.

        Here the mean. A sample without a presentation gives no evidence and is infinitely hard, as is one with a value
        that was NaN.
        """
        mean = kept["total"] / kept["presentations"]
        return mean.masked_fill(mean.isnan(), torch.inf)

    def evidence(
        self, logits: Tensor | None, y: Tensor | None, *, correct: Tensor | None = None, loss: Tensor | None = None
    ) -> Tensor:
        """One value for each sample of a batch, [N], from a report; nothing here waits for a GPU.

        Args:
            logits: the model's output, [N, classes], with y; or None.
            y: class labels, [N]; they may stand beside another kind of report, which then counts.
            correct: which samples the model got right, bool [N]; or None.
            loss: loss of each sample, [N]; dimensions beyond the first are averaged; or None.

        Raises:
            InvalidArgument: not exactly one kind of report, or one that the criterion has no use for.
        """
        kinds = (logits is not None) + (correct is not None) + (loss is not None)
        if kinds != 1 or (logits is not None and y is None):
            rule = "takes logits and y, or correct=, or loss="
            raise InvalidArgument(Problem("observe", "its arguments", rule, "Pass exactly one of them."))
        if logits is not None and y is not None:
            values = self.from_logits(logits.detach(), y.detach())
        elif loss is not None:
            values = self.from_loss(average_loss(loss))
        else:
            values = self.from_correct(torch.as_tensor(correct).detach().bool().reshape(-1))
        if values.dim() != 1:
            rule, remedy = "must have one value for each sample of a batch", "Return a tensor of shape (batch,)."
            raise InvalidArgument(Problem(f"values of {type(self).__name__}", tuple(values.shape), rule, remedy))
        return values

    def scorer(self, n: int) -> Scorer:
        """What adds the values of sample ids 0 … n-1 up."""
        return Scorer(self, n)

    @classmethod
    def takes(cls, report: str) -> bool:
        """Whether it has a use for a kind of report: "logits and y", "correct=" or "loss="."""
        method = _METHODS[report]
        return getattr(cls, method) is not getattr(SievingCriterion, method)

    def _refusal(self, report: str) -> InvalidArgument:
        wanted = " or ".join(filter(self.takes, _METHODS))
        others = [name for name, criterion in registered("sieving-criterion").items() if criterion.takes(report)]
        rule = f'tells nothing that criterion="{self.name}" has a use for'
        remedy = f"Pass {wanted}, or sieve by a criterion that takes {report}, such as {' or '.join(others)}."
        return InvalidArgument(Problem("observe", report, rule, remedy))


class Scorer(Accumulator):
    """Adds up what a criterion says of samples 0 … n-1 in one interval.

    Attributes:
        criterion: the criterion.
    """

    def __init__(self, criterion: SievingCriterion, n: int) -> None:
        self.criterion = criterion
        super().__init__(n, f"the {criterion.name} scores")

    def difficulty(self) -> Tensor:
        """Difficulty per sample id, shape (n,), without NaN; the lowest are the easiest."""
        return self.criterion.difficulty(self._kept)

    def _start(self) -> dict[str, Tensor]:
        return self.criterion.start(self.n)

    def _add(self, indices: Tensor, values: Tensor) -> None:
        self.criterion.add(self._kept, indices, values)


@register("sieving-criterion")
class Forgetting(SievingCriterion):
    """Forgetting events: how often a sample goes from right at one presentation to wrong at the next.

    They are counted within each update interval, as in the paper, so that samples which came back from the removed set
    are treated as the others are (arXiv 2209.11204, section on circular data sieving; the measure is from Toneva et
    al., arXiv 1812.05159).

    A sample that was never right cannot be forgotten: its count is 0, the same as that of the easiest samples. The
    paper does not say what happens to these; ``"hard"`` gives them infinite difficulty (as Toneva et al. do),
    ``"literal"`` takes the bare count. A sample that was not presented at all gives no evidence and is infinitely hard
    in both cases.
    """

    name = "forgetting"
    summary = "The fewest falls from right to wrong are easiest."
    references = ("toneva2019forgetting",)
    presentations_needed = 2

    def __init__(self, never_learned: NeverLearned = "hard") -> None:
        self.never_learned: NeverLearned = never_learned

    def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return correct_from_logits(logits, y)

    def from_correct(self, correct: Tensor) -> Tensor:
        return correct

    def from_loss(self, loss: Tensor) -> Tensor:
        """Call the better half of a batch "learned", for tasks that have no right and wrong.

        A sample counts as learned when its loss is at most the (lower) median of its batch; NaN counts as not learned.
        This keeps the idea of a forgetting event (a sample falls back behind the others) and needs no threshold in the
        units of the loss. It is ours: the paper speaks of classification alone.
        """
        # By a sort: torch.nanmedian reads from the device how many are no NaN.
        middle = ((loss.numel() - 1) - loss.isnan().sum()).clamp(min=0) // 2
        return loss <= loss.sort().values.index_select(0, middle.reshape(1))

    def start(self, n: int) -> dict[str, Tensor]:
        return {
            "forgotten": torch.zeros(n, dtype=torch.int32),
            "last": torch.full((n,), -1, dtype=torch.int8),  # -1 unseen, 0 wrong, 1 right
            "learned": torch.zeros(n, dtype=torch.bool),
        }

    def add(self, kept: dict[str, Tensor], indices: Tensor, values: Tensor) -> None:
        samples, order, first, final = _by_sample(indices)
        now = values[order]
        before = torch.where(first, kept["last"][samples], now.roll(1).to(torch.int8))
        kept["forgotten"] += torch.bincount(samples[(before == 1) & ~now], minlength=len(kept["forgotten"]))
        kept["last"][samples[final]] = now[final].to(torch.int8)
        kept["learned"][samples[now]] = True

    def difficulty(self, kept: Mapping[str, Tensor]) -> Tensor:
        hard = kept["last"] < 0 if self.never_learned == "literal" else ~kept["learned"]
        return kept["forgotten"].float().masked_fill(hard, torch.inf)


@register("sieving-criterion")
class Loss(SievingCriterion):
    """The mean loss of a sample."""

    name = "loss"
    summary = "The lowest mean loss is easiest."

    def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return loss_from_logits(logits, y)

    def from_loss(self, loss: Tensor) -> Tensor:
        return loss


@register("sieving-criterion")
class EL2N(SievingCriterion):
    """The mean error L2 norm of a sample; Paul et al. average over models, here it is one model over an interval."""

    name = "el2n"
    summary = "The lowest mean L2 norm of softmax(logits) - one_hot(y) is easiest."
    references = ("paul2021datadiet",)

    def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return el2n_from_logits(logits, y)


@register("sieving-criterion")
class Random(SievingCriterion):
    """All samples alike: the sieve breaks ties at random, from the session's seed."""

    name = "random"
    summary = "A random choice: the baseline."
    needs_every_batch = False
    chooses_at_random = True

    def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(logits))

    def from_correct(self, correct: Tensor) -> Tensor:
        return torch.zeros(len(correct))

    def from_loss(self, loss: Tensor) -> Tensor:
        return torch.zeros(len(loss))

    def start(self, n: int) -> dict[str, Tensor]:
        return {"difficulty": torch.zeros(n)}

    def add(self, kept: dict[str, Tensor], indices: Tensor, values: Tensor) -> None:
        """Nothing is learned of a sample."""

    def difficulty(self, kept: Mapping[str, Tensor]) -> Tensor:
        return kept["difficulty"]


@register("sieving-criterion")
class RepeatedRandom(Random):
    """A fresh random subset of all samples at each update (RS2, arXiv 2305.18424, drawn with replacement).

    Under ``Random`` the samples that waited come back first, so that all have their turn; here a sample may be left out
    twice in a row. The source draws a subset for each epoch; here it stays for an interval.
    """

    name = "repeated-random"
    summary = "The partial set is drawn anew, at random, at each update (RS2)."
    references = ("okanovic2024repeated",)
    redraws = True


@register("sieving-criterion")
class TopLoss(SievingCriterion):
    """The highest losses in a random pool (OrderDP, arXiv 2606.08574): the partial set is drawn anew at each update.

    A sample's loss is the last one that was seen, in whichever interval, as in the released code. Ours: a sample that
    was never seen is infinitely hard, and stays if it is in the pool (the released code gives it a loss of 3); half of
    the samples to leave are left out of the pool (``random_share``), where the source sets its size by itself.
    """

    name = "top-loss"
    summary = "The highest last losses in a random pool are the partial set, drawn anew at each update (OrderDP)."
    references = ("jin2026orderdp",)
    redraws = True
    random_share = 0.5

    def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return loss_from_logits(logits, y)

    def from_loss(self, loss: Tensor) -> Tensor:
        return loss

    def start(self, n: int) -> dict[str, Tensor]:
        return {"last": torch.full((n,), torch.inf)}

    def add(self, kept: dict[str, Tensor], indices: Tensor, values: Tensor) -> None:
        samples, order, _, final = _by_sample(indices)
        kept["last"][samples[final]] = values[order[final]].float()

    def difficulty(self, kept: Mapping[str, Tensor]) -> Tensor:
        return kept["last"].masked_fill(kept["last"].isnan(), torch.inf)


def _by_sample(indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Presentations, sample by sample: ids, their order, and which are the first and the last of a sample, bool."""
    samples, order = torch.sort(indices, stable=True)  # those of a sample stay in order of time
    first = torch.ones_like(samples, dtype=torch.bool)
    first[1:] = samples[1:] != samples[:-1]
    # The entry before a new sample, and the very last one, as the very first is a first.
    return samples, order, first, first.roll(-1)

"""Forgetting events: how often a sample goes from right to wrong while it is trained on.

A forgetting event of a sample is a transition from "classified correctly" at one presentation to "misclassified" at the
next one. The paper counts them within each update interval and starts again at the next, so that samples which came
back from the removed set are treated as the others are (arXiv 2209.11204, section on circular data sieving; the measure
itself is from Toneva et al., arXiv 1812.05159).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spfde.errors import InvalidArgument, Problem, StateMismatch

NeverLearned = Literal["hard", "literal"]

_UNSEEN = -1
# Folding is a sort: it pays to do it seldom. Waiting longer than about one epoch would only pile up small tensors.
_FOLD_AT_LEAST = 65_536


def count_forgetting(indices: Tensor, correct: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count correct-to-wrong transitions in a stream of presentations.

    Args:
        indices: sample of each presentation, in order of time, shape (m,), long, values in [0, n).
        correct: whether that presentation was classified correctly, shape (m,), bool.
        last: outcome of the latest earlier presentation of each sample, shape (n,), int8: -1 unseen, 0 wrong, 1 right.

    Returns:
        Number of forgetting events in this stream, shape (n,), long; the new ``last``; and which samples were right at
        least once in this stream, shape (n,), bool. Splitting a stream and adding up gives the same as one call.
    """
    n = last.numel()
    learned = torch.zeros(n, dtype=torch.bool)
    if indices.numel() == 0:
        return torch.zeros(n, dtype=torch.long), last.clone(), learned
    # A stable sort brings the presentations of a sample together and keeps their order in time.
    samples, order = torch.sort(indices, stable=True)
    now = correct[order]
    first = torch.ones_like(now)
    first[1:] = samples[1:] != samples[:-1]
    final = first.roll(-1)  # the entry before a new sample, and the very last one, as the very first is always a first
    before = torch.where(first, last[samples], now.roll(1).to(torch.int8))
    forgotten = torch.bincount(samples[(before == 1) & ~now], minlength=n)
    newest = last.clone()
    newest[samples[final]] = now[final].to(torch.int8)
    learned[samples[now]] = True
    return forgotten, newest, learned


def difficulty(forgotten: Tensor, *, seen: Tensor, learned: Tensor, never_learned: NeverLearned = "hard") -> Tensor:
    """Turn forgetting counts into a difficulty per sample; the lowest are the easiest.

    A sample that was never right cannot be forgotten: its count is 0, the same as that of the easiest samples. The
    paper does not say what happens to these; ``"hard"`` gives them infinite difficulty (as Toneva et al. do),
    ``"literal"`` takes the bare count. A sample that was not presented at all gives no evidence and is infinitely hard
    in both cases.

    Args:
        forgotten: forgetting events, shape (n,).
        seen: presented at least once, shape (n,), bool.
        learned: right at least once, shape (n,), bool.
        never_learned: what to make of samples that were seen and never right.

    Returns:
        Difficulty, shape (n,), float32, ``inf`` for the hard ones.
    """
    hard = ~seen if never_learned == "literal" else ~learned
    return forgotten.to(torch.float32).masked_fill(hard, torch.inf)


def correct_from_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each sample is classified correctly.

    Args:
        logits: shape (batch, classes); or (batch,) or (batch, 1) for two classes, positive meaning class 1.
        y: class indices, shape (batch,) (or (batch, 1) with two classes); or class probabilities, shape
            (batch, classes), as label smoothing and mixup make them: the most probable class is the right one.

    Returns:
        Shape (batch,), bool, on the device of ``logits``. Nothing here waits for a GPU.

    Raises:
        InvalidArgument: the shapes are none of the above.
    """
    logits, y = logits.detach(), y.detach()
    samples = logits.shape[0] if logits.dim() else 0
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        if y.numel() == samples and y.shape[:1] == logits.shape[:1]:
            return (logits.reshape(-1) > 0) == (y.reshape(-1) > 0.5)
    elif logits.dim() == 2:
        if y.shape == logits.shape:
            return logits.argmax(1) == y.argmax(1)
        if y.shape == (samples,):
            return logits.argmax(1) == y
    shapes = f"logits {tuple(logits.shape)}, y {tuple(y.shape)}"
    raise InvalidArgument(
        Problem(
            "logits, y",
            shapes,
            "must be (batch, classes) with (batch,) labels or (batch, classes) probabilities, or both (batch,)",
            "For other tasks pass correct= (one bool per sample) or loss= (one loss per sample).",
        )
    )


def correct_from_loss(loss: Tensor) -> Tensor:
    """Call the better half of a batch "learned", for tasks that have no right and wrong.

    A sample counts as learned when its loss is at most the (lower) median of its batch. This keeps the idea of a
    forgetting event (a sample falls back behind the others) and needs no threshold in the units of the loss. It is
    ours: the paper speaks of classification alone.

    Args:
        loss: one loss per sample, shape (batch,); further dimensions are averaged. NaN counts as not learned.

    Returns:
        Shape (batch,), bool.

    Raises:
        InvalidArgument: ``loss`` is a scalar, or the batch is empty.
    """
    if loss.dim() == 0 or loss.numel() == 0:
        raise InvalidArgument(
            Problem(
                "loss",
                tuple(loss.shape),
                "must hold one loss per sample",
                'Compute it with reduction="none", and backpropagate loss.mean().',
            )
        )
    per_sample = loss.detach().flatten(1).mean(1) if loss.dim() > 1 else loss.detach()
    return per_sample <= per_sample.nanmedian()


class ForgettingCounter:
    """Counts forgetting events of samples 0 … n-1 over one interval.

    ``observe`` only keeps what it is given; the counting happens when a result is read, or about once an epoch. So a
    training step on a GPU is never made to wait.
    """

    def __init__(self, n: int) -> None:
        """Start an interval.

        Args:
            n: number of sample ids (the length of the data set, also where only a subset is drawn from it).
        """
        if n < 1:
            raise InvalidArgument(Problem("n", n, "must be at least 1", "Count over a data set with samples in it."))
        self.n = n
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new interval begins."""
        self._forgotten = torch.zeros(self.n, dtype=torch.long)
        self._last = torch.full((self.n,), _UNSEEN, dtype=torch.int8)
        self._learned = torch.zeros(self.n, dtype=torch.bool)
        self._drop_pending()

    def observe(self, indices: Tensor, correct: Tensor) -> None:
        """Note one batch; a sample that occurs twice in it is taken in order.

        Args:
            indices: sample ids, shape (batch,), integers in [0, n).
            correct: whether each was right, shape (batch,), bool; any device.

        Raises:
            InvalidArgument: the shapes differ, or an id is outside the range. Ids that live on an accelerator are
                checked when the counts are read, as looking at them would make the step wait.
        """
        if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            found = f"{indices.dtype} of shape {tuple(indices.shape)}"
            rule = "must be integers of shape (batch,)"
            raise InvalidArgument(Problem("indices", found, rule, "Pass the sample ids of the batch."))
        if correct.shape != indices.shape:
            rule = f"must hold one value for each of the {indices.numel()} samples of the batch"
            remedy = "Observe the whole batch that the loader handed out, once, in its order."
            raise InvalidArgument(Problem("correct", tuple(correct.shape), rule, remedy))
        if indices.device.type == "cpu":
            self.check_range(indices)
        # Copies: a caller may reuse its buffers before the counts are read.
        self._pending_indices.append(indices.detach().to(torch.long, copy=True))
        self._pending_correct.append(correct.detach().to(torch.bool, copy=True))
        self._n_pending += indices.numel()
        if self._n_pending >= max(self.n, _FOLD_AT_LEAST):
            self._fold()

    @property
    def counts(self) -> Tensor:
        """Forgetting events per sample, shape (n,), long."""
        self._fold()
        return self._forgotten.clone()

    @property
    def seen(self) -> Tensor:
        """Which samples were presented in this interval, shape (n,), bool."""
        self._fold()
        return self._last != _UNSEEN

    @property
    def learned(self) -> Tensor:
        """Which samples were right at least once in this interval, shape (n,), bool."""
        self._fold()
        return self._learned.clone()

    def difficulty(self, never_learned: NeverLearned = "hard") -> Tensor:
        """Difficulty per sample as the function ``difficulty`` has it, shape (n,), float32."""
        self._fold()
        return difficulty(
            self._forgotten, seen=self._last != _UNSEEN, learned=self._learned, never_learned=never_learned
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything counted so far in this interval: tensors and primitives only."""
        self._fold()
        return {
            "n": self.n,
            "forgotten": self._forgotten.clone(),
            "last": self._last.clone(),
            "learned": self._learned.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateMismatch: the state is of another number of samples, or not a state of a counter.
        """
        if state.get("n") != self.n:
            raise StateMismatch(
                f"forgetting counts of {state.get('n')} samples do not fit a data set of {self.n}. "
                "Load the state with the data set that it was saved with."
            )
        expected = {"forgotten": torch.long, "last": torch.int8, "learned": torch.bool}
        for key, dtype in expected.items():
            value = state.get(key)
            if not isinstance(value, Tensor) or value.shape != (self.n,) or value.dtype != dtype:
                raise StateMismatch(
                    f"the saved forgetting counts lack '{key}' or it is damaged. Use another checkpoint."
                )
        self._forgotten = state["forgotten"].detach().to("cpu", copy=True)
        self._last = state["last"].detach().to("cpu", copy=True)
        self._learned = state["learned"].detach().to("cpu", copy=True)
        self._drop_pending()

    def _drop_pending(self) -> None:
        self._pending_indices: list[Tensor] = []
        self._pending_correct: list[Tensor] = []
        self._n_pending = 0

    def _fold(self) -> None:
        if not self._pending_indices:
            return
        indices, correct = _gather(self._pending_indices), _gather(self._pending_correct)
        self._drop_pending()
        self.check_range(indices)
        forgotten, self._last, learned = count_forgetting(indices, correct, self._last)
        self._forgotten += forgotten
        self._learned |= learned

    def check_range(self, indices: Tensor) -> None:
        if indices.numel() == 0:
            return
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= self.n:
            wrong = low if low < 0 else high
            remedy = "Pass the positions of the samples in the data set."
            raise InvalidArgument(Problem("indices", wrong, f"must be in [0, {self.n})", remedy))


def _gather(pieces: Sequence[Tensor]) -> Tensor:
    if len({piece.device for piece in pieces}) > 1:
        pieces = [piece.cpu() for piece in pieces]
    return torch.cat(list(pieces)).cpu()  # one transfer, not one per step

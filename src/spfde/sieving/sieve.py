"""The sieve: which samples are trained on, and how the easiest make room for removed ones.

Source: arXiv 2209.11204, section on circular data sieving. A share of the samples is removed at random before training;
the rest is the partial set. At each update the easiest samples of the partial set go to the tail of the removed queue
and the same number comes back from its head, so the partial set keeps its size. Under a one-time removal all samples
are in the partial set until the only update, at which none comes back. Criteria that draw the partial set anew choose
among all samples at each update. In the last epochs all samples may be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from spfde.core.errors import InvalidArgument, Problem, StateMismatch
from spfde.core.numbers import round_half_up
from spfde.core.state import check_entries
from spfde.sieving.balance import shuffled_evenly, take_evenly
from spfde.sieving.ids import Ids
from spfde.sieving.methods import SievingMethod
from spfde.sieving.weights import inclusion_probabilities


def easiest(difficulty: Tensor, k: int, generator: Generator) -> Tensor:
    """Positions of the ``k`` easiest samples, easiest first, equals in random order.

    Ties dominate (with Δτ = 5 a sample has at most two forgetting events), so they must not fall to the lowest ids.

    Args:
        difficulty: shape (n,), no NaN.
        k: how many, at most n.
        generator: gives the order of equals.
    """
    shuffled = torch.randperm(difficulty.numel(), generator=generator)
    return shuffled[torch.argsort(difficulty[shuffled], stable=True)[:k]]


class Sieve:
    """The partial set and the removed queue.

    It keeps less than five bytes a sample: a flag for what is in use, the queue, and the history. Ids are made of these
    when they are asked for.

    Attributes:
        n_swap: samples that leave at each update; as many come back, but for a one-time removal. Where the partial set
            is drawn anew, as many as it happens.
    """

    def __init__(
        self,
        population: Tensor,
        technique: SievingMethod,
        generator: Generator,
        labels: Tensor | None = None,
        *,
        ends_full: bool = False,
    ) -> None:
        """Remove a random share, where the technique starts with one.

        Args:
            population: sample ids, shape (n,), long, ascending, without repetition and not negative.
            technique: the hyper-parameters, at the length of the run (``at_length``); they leave some samples.
            generator: CPU generator, whose state belongs to the caller. Nothing is drawn from it while nothing is
                removed.
            labels: class of each sample, shape (n,), long, to remove the same share of each; None where they are not
                known yet or do not matter.
            ends_full: whether ``use_all`` will be called.
        """
        n = population.numel()
        self._ids = Ids(population)
        self.n_swap, self._n_returning = technique.moves(n)
        self._generator = generator
        self._n_initial, self._n_removed = technique.n_removed_at_start(n), technique.n_removed(n)
        self._criterion, self._ends_full = technique.make_criterion(), ends_full
        order = torch.randperm(n, generator=generator) if self._n_initial else torch.arange(n)
        leaving = order[: self._n_initial] if labels is None else take_evenly(order, labels, self._n_initial)
        self._updates = 0
        self._weights: Tensor | None = None
        self._included = torch.zeros(n, dtype=_smallest(0))
        self._ever_used = np.zeros(-(-n // 8), dtype=np.uint8)  # a bit a sample
        self._take(population[leaving])
        self._note_used()

    @property
    def population(self) -> Tensor:
        """All sample ids, shape (n,), long, ascending."""
        return self._ids.tensor()

    @property
    def partial(self) -> Tensor:
        """Ids that are trained on, long, ascending."""
        return self._contains.nonzero().flatten()

    @property
    def removed(self) -> Tensor:
        """Ids that are left out, long; the head of the queue comes first."""
        return self._queue.long()

    def keep(self) -> Tensor | None:
        """Which ids are in the partial set: a bool mask over 0 … largest id; None while nothing is removed."""
        return self._contains if self._queue.numel() else None

    @property
    def all_retrieved(self) -> bool:
        """Whether each sample of the initial removed set has come back at least once."""
        return self.ever_used == len(self._ids)

    @property
    def ever_used(self) -> int:
        """Number of samples that have been in the partial set at least once."""
        return int(np.unpackbits(self._ever_used, count=len(self._ids)).sum())

    def update(self, difficulty: Tensor, labels: Tensor | None = None) -> int:
        """Swap the easiest samples of the partial set for the head of the queue; or draw the partial set anew.

        Once all samples that were removed at the start have come back, the queue is shuffled after each update (the
        update that brings back the last of them included). Nothing happens, and nothing is drawn, when nothing is
        swapped, and after a one-time removal.

        Args:
            difficulty: difficulty of each sample of ``population``, in its order, shape (n,), ``inf`` for hard ones.
                Values of samples that are not in the partial set matter only where it is drawn anew.
            labels: class of each sample of ``population``, shape (n,), long, -1 where unknown: the same share of each
                class leaves, and the queue is shuffled with the classes spread evenly. None: classes do not matter.

        Returns:
            Number of samples of the partial set that left.

        Raises:
            InvalidArgument: the shape is another one, or there is a NaN.
        """
        n = len(self._ids)
        if difficulty.shape != (n,) or bool(difficulty.isnan().any()):
            found = f"shape {tuple(difficulty.shape)}" if difficulty.shape != (n,) else "NaN in it"
            rule, remedy = f"must hold a number for each of the {n} samples", "Use inf for samples to keep."
            raise InvalidArgument(Problem("difficulty", found, rule, remedy))
        once = self._n_returning == 0
        if self.n_swap == 0 or (once and self._updates):
            return 0
        self._updates += 1
        turn = self._drawn_anew if self._criterion.redraws else self._swapped
        queue = turn(difficulty.detach().cpu(), labels)
        n_left = int(self._contains[queue].sum())
        self._take(queue)
        self._included = self._included.to(_smallest(self._updates))
        self._included += self._contains[self.population]
        self._note_used()
        return n_left

    def _swapped(self, difficulty: Tensor, labels: Tensor | None) -> Tensor:
        """The queue after the easiest of the partial set went to its tail, and its head came back."""
        partial = self.partial
        positions = self._ids.positions(partial)
        order = easiest(difficulty[positions], partial.numel(), self._generator)
        leaving = _first(order, None if labels is None else labels[positions], self.n_swap)
        queue = torch.cat([self.removed, partial[leaving]])[self._n_returning :]
        if self._updates * self._n_returning >= self._n_initial and self._n_returning:
            queue = queue[self._shuffled(queue, labels)]
        return queue

    def _drawn_anew(self, difficulty: Tensor, labels: Tensor | None) -> Tensor:
        """Who is left out of all samples: a share at random, which makes the rest a random pool, and its easiest."""
        n_random = round_half_up(self._criterion.random_share * self._n_removed)
        order = torch.randperm(len(self._ids), generator=self._generator)
        outside = _first(order, labels, n_random)
        is_outside = torch.zeros(len(self._ids), dtype=torch.bool)
        is_outside[outside] = True
        pool = order[~is_outside[order]]
        pool = pool[torch.argsort(difficulty[pool], stable=True)]
        leaving = torch.cat([outside, _first(pool, labels, self._n_removed - n_random)])
        return self.population[leaving]

    def use_all(self) -> int:
        """Put all samples in the partial set, for good; the number that came back."""
        returning = self._queue.numel()
        self._take(self._queue[:0])
        self._note_used()
        return returning

    def loss_weights(self, ids: Tensor) -> Tensor:
        """Weights that keep the gradient unbiased, for losses of the partial set; their mean over it is 1.

        Args:
            ids: sample ids, shape (batch,), long.

        Returns:
            Shape (batch,), float32. See ``spfde.sieving.weights`` for what is assumed.

        Raises:
            InvalidArgument: an id is not in the partial set.
        """
        known = (ids >= 0) & (ids < self._contains.numel())
        outside = ids[~known] if not bool(known.all()) else ids[~self._contains[ids]]
        if outside.numel():
            rule, remedy = "is not in the partial set", "Pass the samples of a batch of session.loader."
            raise InvalidArgument(Problem("indices", int(outside[0]), rule, remedy))
        if self._weights is None:
            self._weights = self._weigh()
        return self._weights[ids]

    def state_dict(self) -> dict[str, Any]:
        """The queue in its order, and the history: tensors and primitives only. What is not removed is in use.

        Less than four bytes a sample where ids and updates are few enough for small integers. The generator is saved by
        whoever gave it.
        """
        return {
            "ids": int(self.population.sum()),
            "removed": self._queue.clone(),
            "ever_used": torch.from_numpy(self._ever_used.copy()),
            "included": self._included.clone(),
            "updates": self._updates,
            "n_swap": self.n_swap,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, bit for bit.

        Raises:
            StateMismatch: the state is of other samples or other fractions, or damaged; nothing has changed then.
        """
        self._check_state(state)
        self._take(state["removed"].detach().cpu())
        self._ever_used = state["ever_used"].detach().cpu().numpy().copy()
        self._included = state["included"].detach().to("cpu", copy=True)
        self._updates = int(state["updates"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        check_entries(state, "the sieve", {name: type(value) for name, value in self.state_dict().items()})
        if state["n_swap"] != self.n_swap or state["updates"] < 0:
            raise StateMismatch(
                f"the saved sieve swapped {state['n_swap']} samples {state['updates']} times, and this one swaps "
                f"{self.n_swap} each time. Use the recipe and the data set that it was saved with."
            )
        n, n_removed = len(self._ids), self._n_initial + state["updates"] * (self.n_swap - self._n_returning)
        if self._ends_full and not state["removed"].numel():
            n_removed = 0  # all are used
        forms = {
            "removed": (n_removed, _smallest(self._ids.end - 1)),
            "ever_used": (-(-n // 8), torch.uint8),
            "included": (n, _smallest(state["updates"])),
        }
        for name, (size, dtype) in forms.items():
            if state[name].shape != (size,) or state[name].dtype != dtype:
                found = f"{state[name].dtype} of shape {tuple(state[name].shape)}"
                raise StateMismatch(
                    f"{name} in the state of the sieve is {found}, and here {dtype} of shape ({size},). "
                    "Use the recipe and the data set that it was saved with."
                )
        removed = state["removed"].cpu().long().sort().values
        are_known = bool(torch.isin(removed, self.population).all()) and bool((removed.diff() > 0).all())
        if state["ids"] != int(self.population.sum()) or not are_known:
            raise StateMismatch("the saved sieve holds other sample ids. Use the data set that it was saved with.")

    def _weigh(self) -> Tensor:
        """The weight of each sample of the partial set, at its id, float32."""
        partial = self.partial
        found = torch.ones(self._ids.end)
        if self._criterion.chooses_at_random or not self._queue.numel():
            return found  # all samples are treated alike: the probabilities are equal
        share = partial.numel() / len(self._ids)
        included = self._included[self._ids.positions(partial)]
        weights = share / inclusion_probabilities(included, self._updates, initial=share)
        # While the history is short, those who are in the set now look too frequent, which would lower every step.
        found[partial] = (weights / weights.mean()).float()
        return found

    def _shuffled(self, queue: Tensor, labels: Tensor | None) -> Tensor:
        """A random order of the queue."""
        if labels is None:
            return torch.randperm(queue.numel(), generator=self._generator)
        return shuffled_evenly(labels[self._ids.positions(queue)], self._generator)

    def _take(self, removed: Tensor) -> None:
        """Leave these out, in this order, and use all others."""
        self._queue = removed.to(_smallest(self._ids.end - 1), copy=True)
        # Always a new mask: a loader that is being iterated keeps the one that it started with.
        self._contains = torch.zeros(self._ids.end, dtype=torch.bool)
        self._contains[self.population] = True
        self._contains[removed.long()] = False
        self._weights = None

    def _note_used(self) -> None:
        self._ever_used |= np.packbits(self._contains[self.population].numpy())


def _first(order: Tensor, labels: Tensor | None, k: int) -> Tensor:
    """The first ``k`` positions of an order, by class the same share of each."""
    return order[:k] if labels is None else take_evenly(order, labels, k)


def _smallest(largest: int) -> torch.dtype:
    """The integers, of 16 bits or more, that hold numbers from 0 to this one."""
    return next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(dtype).max)

"""Circular data sieving: which samples are trained on, and how the easiest make room for removed ones.

Source: arXiv 2209.11204, section on circular data sieving. A share of the samples is removed at random before training;
the rest is the partial set. At each update the easiest samples of the partial set go to the tail of the removed queue
and the same number comes back from its head, so the partial set keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from spfde.errors import InvalidArgument, Problem, StateMismatch
from spfde.rounding import round_half_up
from spfde.sieving.forgetting import NeverLearned
from spfde.technique import Technique


class DataSieving(Technique):
    """Train on a part of the data that changes over time: the paper's y %.

    Where the paper leaves room: the removed share is one of all samples; the swapped share is one of the *partial* set
    (the strict reading); samples that were never right are hard; ties are broken at random from the run's seed.

    ``swap_fraction=0`` removes samples once and for all.
    """

    name: ClassVar[str] = "sieving"
    summary: ClassVar[str] = "Leaves out a share of the samples and swaps the easiest for removed ones at every update."
    citation: ClassVar[str] = (
        "Geng Yuan, Yanyu Li, Sheng Li, Zhenglun Kong, Sergey Tulyakov, Xulong Tang, Yanzhi Wang, Jian Ren. "
        "Layer Freezing & Data Sieving: Missing Pieces of a Generic Framework for Sparse Training. "
        "NeurIPS 2022. arXiv:2209.11204"
    )
    bibtex: ClassVar[str] = """@inproceedings{yuan2022spfde,
  title     = {Layer Freezing \\& Data Sieving: Missing Pieces of a Generic Framework for Sparse Training},
  author    = {Yuan, Geng and Li, Yanyu and Li, Sheng and Kong, Zhenglun and Tulyakov, Sergey
               and Tang, Xulong and Wang, Yanzhi and Ren, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
  eprint    = {2209.11204},
  archivePrefix = {arXiv}
}"""

    removed_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="the share of all samples that is left out, in [0, 1)"
    )
    swap_fraction: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="the share of the partial set swapped at each update, in [0, 1]; None takes removed_fraction",
    )
    never_learned: NeverLearned = Field(
        default="hard",
        description="'hard' keeps samples that were never right, 'literal' ranks them by their count of 0",
    )

    def n_removed(self, n: int) -> int:
        """Number of samples left out of ``n``, rounded half up."""
        return round_half_up(self.removed_fraction * n)

    def n_swap(self, n: int) -> int:
        """Number of samples of ``n`` that change places at each update.

        At least 1 unless the fraction is 0, so that every sample gets its turn; at most the number of removed samples,
        as no more can come back, and at most the size of the partial set.
        """
        removed = self.n_removed(n)
        fraction = self.removed_fraction if self.swap_fraction is None else self.swap_fraction
        if removed == 0 or fraction == 0:
            return 0
        return min(max(1, round_half_up(fraction * (n - removed))), removed, n - removed)


def check_fraction(technique: DataSieving, n: int, batch_size: int) -> list[Problem]:
    """Find out whether the partial set of ``n`` samples still fills a batch; empty when all is well.

    Nothing is wrong while nothing is removed: a data set smaller than a batch is then the user's own choice.
    """
    removed = technique.n_removed(n)
    if removed == 0 or n - removed >= batch_size:
        return []
    rule = f"leaves {n - removed} of {n} samples, no full batch of {batch_size}"
    # Rounded down, so that the number that is printed works.
    most = math.floor((n - batch_size) / n * 1000) / 1000
    remedy = (
        f"At most {most:g} can be removed at this batch size, or choose a batch size of at most {max(n - removed, 1)}."
        if most > 0
        else f"Choose a batch size below {n}, or remove nothing."
    )
    return [Problem("removed_fraction", technique.removed_fraction, rule, remedy)]


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


def turn_queue(queue: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
    """Append ``incoming`` to the tail and take the same number from the head.

    Returns:
        The queue after the turn, and what came out of its head. Nothing comes out in the turn in which it went in, as
        long as ``incoming`` is no longer than the queue.
    """
    joined = torch.cat([queue, incoming])
    return joined[incoming.numel() :], joined[: incoming.numel()]


@dataclass(frozen=True)
class Turnover:
    """What the sieve has done so far.

    Attributes:
        updates: updates made.
        moved: samples that changed places in the latest update, in each direction.
        moved_total: the same over all updates.
        ever_used: samples that have been in the partial set at least once.
        partial: size of the partial set.
        population: number of all samples.
    """

    updates: int
    moved: int
    moved_total: int
    ever_used: int
    partial: int
    population: int


class Sieve:
    """The partial set and the removed queue.

    Attributes:
        population: all sample ids, shape (n,), long, ascending.
        partial: ids that are trained on, long, ascending.
        removed: ids that are left out, long; the head of the queue comes first.
        n_swap: samples that change places at each update.
    """

    def __init__(self, population: Tensor, technique: DataSieving, generator: Generator) -> None:
        """Remove a random share.

        Args:
            population: sample ids, shape (n,), long, ascending, without repetition and not negative.
            technique: the hyper-parameters.
            generator: CPU generator; kept, and part of the state. Nothing is drawn from it while nothing is removed.

        Raises:
            InvalidArgument: the ids break a rule above, or no sample would be left.
        """
        n = population.numel()
        _check_population(population)
        n_removed = technique.n_removed(n)
        if n_removed >= n:
            rule, remedy = f"leaves none of {n} samples", "Remove less."
            raise InvalidArgument(Problem("removed_fraction", technique.removed_fraction, rule, remedy))
        self.technique = technique
        self.population = population.to("cpu", torch.long, copy=True)
        self.n_swap = technique.n_swap(n)
        self.generator = generator
        if n_removed:
            order = torch.randperm(n, generator=generator)
            self.removed = self.population[order[:n_removed]]
            self.partial = self.population[order[n_removed:].sort().values]
        else:
            self.removed = self.population[:0]
            self.partial = self.population.clone()
        self._n_initial = n_removed
        self._updates = 0
        self._ever_used = torch.zeros(n, dtype=torch.bool)
        self._settle()

    @property
    def contains(self) -> Tensor:
        """Which ids are in the partial set: a bool mask over 0 … largest id. Not to be written to."""
        return self._contains

    def keep(self) -> Tensor | None:
        """The mask ``contains`` for the loader, or None while nothing is removed."""
        return self._contains if self.removed.numel() else None

    @property
    def all_retrieved(self) -> bool:
        """Whether each sample of the initial removed set has come back at least once."""
        return self._updates * self.n_swap >= self._n_initial

    @property
    def turnover(self) -> Turnover:
        """What the sieve has done so far."""
        return Turnover(
            updates=self._updates,
            moved=self.n_swap if self._updates else 0,
            moved_total=self.n_swap * self._updates,
            ever_used=int(self._ever_used.sum()),
            partial=self.partial.numel(),
            population=self.population.numel(),
        )

    def update(self, difficulty: Tensor) -> Turnover:
        """Swap the easiest samples of the partial set for the head of the queue.

        Once all samples that were removed at the start have come back, the queue is shuffled after each update (the
        update that brings back the last of them included). Nothing happens, and nothing is drawn, when nothing is
        swapped.

        Args:
            difficulty: difficulty of each sample of ``population``, in its order, shape (n,), ``inf`` for hard ones.
                Values of samples that are not in the partial set do not matter.

        Raises:
            InvalidArgument: the shape is another one, or there is a NaN.
        """
        n = self.population.numel()
        if difficulty.shape != (n,) or bool(difficulty.isnan().any()):
            found = f"shape {tuple(difficulty.shape)}" if difficulty.shape != (n,) else "NaN in it"
            rule, remedy = f"must hold a number for each of the {n} samples", "Use inf for samples to keep."
            raise InvalidArgument(Problem("difficulty", found, rule, remedy))
        if self.n_swap == 0:
            return self.turnover
        candidates = difficulty.detach().cpu()[torch.searchsorted(self.population, self.partial)]
        leaving = easiest(candidates, self.n_swap, self.generator)
        self.removed, returning = turn_queue(self.removed, self.partial[leaving])
        staying = torch.ones(self.partial.numel(), dtype=torch.bool)
        staying[leaving] = False
        self.partial = torch.cat([self.partial[staying], returning]).sort().values
        self._updates += 1
        if self.all_retrieved:
            self.removed = self.removed[torch.randperm(self.removed.numel(), generator=self.generator)]
        self._settle()
        return self.turnover

    def state_dict(self) -> dict[str, Any]:
        """Sets, queue order, history and the generator's state: tensors and primitives only."""
        return {
            "partial": self.partial.clone(),
            "removed": self.removed.clone(),
            "ever_used": self._ever_used.clone(),
            "updates": self._updates,
            "n_swap": self.n_swap,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, bit for bit.

        Raises:
            StateMismatch: the state is of other samples or other fractions, or damaged; nothing has changed then.
        """
        self._check_state(state)
        self.partial = state["partial"].detach().to("cpu", copy=True)
        self.removed = state["removed"].detach().to("cpu", copy=True)
        self._ever_used = state["ever_used"].detach().to("cpu", copy=True)
        self._updates = int(state["updates"])
        self.generator.set_state(state["generator"].cpu())
        self._settle()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        names = ("partial", "removed", "ever_used", "generator")
        damaged = [name for name in names if not isinstance(state.get(name), Tensor)]
        damaged += [name for name in ("partial", "removed") if name not in damaged and state[name].dtype != torch.long]
        damaged += [name for name in ("updates", "n_swap") if not isinstance(state.get(name), int)]
        if damaged:
            raise StateMismatch(
                f"the saved sieve lacks {', '.join(damaged)}, or it is damaged there. Use another checkpoint."
            )
        sizes = (state["partial"].numel(), state["removed"].numel(), state["n_swap"])
        expected = (self.partial.numel(), self.removed.numel(), self.n_swap)
        if sizes != expected:
            raise StateMismatch(
                f"the saved sieve has {sizes[0]} partial and {sizes[1]} removed samples and swaps {sizes[2]}; "
                f"this one has {expected[0]}, {expected[1]} and {expected[2]}. "
                "Use the recipe and the data set that it was saved with."
            )
        together = torch.cat([state["partial"], state["removed"]]).cpu().sort().values
        ascending = bool((state["partial"].diff() > 0).all())
        if not torch.equal(together, self.population) or not ascending:
            raise StateMismatch("the saved sieve holds other sample ids. Use the data set that it was saved with.")
        ever_used = state["ever_used"]
        if ever_used.shape != self._ever_used.shape or ever_used.dtype != torch.bool or state["updates"] < 0:
            raise StateMismatch("the history of the saved sieve is damaged. Use another checkpoint.")
        try:
            Generator().set_state(state["generator"].cpu())
        except (RuntimeError, TypeError) as error:
            raise StateMismatch("the generator in the saved sieve is damaged. Use another checkpoint.") from error

    def _settle(self) -> None:
        # Always a new mask: a loader that is being iterated keeps the one that it started with.
        self._contains = torch.zeros(int(self.population[-1]) + 1, dtype=torch.bool)
        self._contains[self.partial] = True
        self._ever_used |= self._contains[self.population]


def _check_population(population: Tensor) -> None:
    integers = not population.is_floating_point() and population.dtype != torch.bool
    if population.dim() != 1 or population.numel() == 0 or not integers:
        found = f"{population.dtype} of shape {tuple(population.shape)}"
        rule, remedy = "must be integers of shape (n,), n at least 1", "Pass the ids of the samples."
        raise InvalidArgument(Problem("population", found, rule, remedy))
    if int(population[0]) < 0 or not bool((population.diff() > 0).all()):
        rule, remedy = "must be ascending, without repetition and not negative", "Pass population.unique()."
        raise InvalidArgument(Problem("population", population.tolist()[:8], rule, remedy))

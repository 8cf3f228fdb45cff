"""Optuna, by way of what a search needs of it: what to try next, and whether a trial goes on.

Its study is kept in memory alone. What it proposes follows from the seed and from the trials before, so that a search
that is resumed tells it again what came of those, in their order, and nothing that is read could run code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spfde.core.errors import InvalidArgument, Problem

REDUCTION = 3
"""Of so many trials at a rung one goes on."""
RUNGS = 2
"""At 1/9 and at 1/3 of each trial's own length, so of its own budget."""
_PROPOSALS = 200
"""Proposals in a row that were tried before; then there may be nothing else."""


class Study:
    """A study with TPE and successive halving (``optuna.pruners.SuccessiveHalvingPruner``).

    Args:
        space: for each option that is searched its values; numbers in order.
        seed: what is proposed follows from it and from what was told.

    Raises:
        InvalidArgument: Optuna is not installed.
    """

    def __init__(self, space: Mapping[str, Sequence[Any]], seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            remedy = "Install it: pip install 'spfde[search]'."
            raise InvalidArgument(Problem("search", "optuna", "is a package that is not installed", remedy)) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space, self._seed = optuna, space, seed
        self._study = optuna.create_study(
            direction="maximize", pruner=optuna.pruners.SuccessiveHalvingPruner(1, reduction_factor=REDUCTION)
        )

    def again(self, values: Mapping[str, Any]) -> Any:
        """A trial that was proposed before."""
        self._study.enqueue_trial({name: self._space[name].index(value) for name, value in values.items()})
        return self._proposed()[0]

    def new(self, tried: Sequence[Mapping[str, Any]]) -> tuple[Any, dict[str, Any]] | None:
        """A trial that was not tried, and its values; None where nothing new is found.

        Args:
            tried: values of the trials so far.
        """
        for proposal in range(_PROPOSALS):
            # Seeded anew, so that it does not matter what was drawn before a search was killed.
            seed = (self._seed * 1_000_003 + len(tried) * _PROPOSALS + proposal) % 2**32
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            trial, values = self._proposed()
            if values not in tried:
                return trial, values
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return None

    def _proposed(self) -> tuple[Any, dict[str, Any]]:
        trial, values = self._study.ask(), {}
        for name, known in self._space.items():
            # By their places: values of a number that are near each other are near for the sampler.
            place = (
                trial.suggest_int(name, 0, len(known) - 1)
                if all(isinstance(value, int | float) for value in known)
                else trial.suggest_categorical(name, range(len(known)))
            )
            values[name] = known[place]
        return trial, values

    def goes_on(self, trial: Any, rung: int, accuracy: float) -> bool:
        """Whether a trial is good enough at a rung, from 0 on."""
        trial.report(accuracy, step=REDUCTION**rung)
        return not trial.should_prune()

    def tell(self, trial: Any, accuracy: float | None) -> None:
        """A trial is over, with its accuracy, or paused for good.

        One that never reached a rung, for nothing of it keeps to the budget, counts as worse than all others.
        """
        state = self._optuna.trial.TrialState
        self._study.tell(trial, accuracy, state=state.PRUNED if accuracy is None else state.COMPLETE)


def rungs_after(epochs: int, of: int) -> list[int]:
    """The rungs that are reached with so many epochs of a run, and with no fewer; none at its end.

    Example:
        >>> from spfde.app.compare.search_study import rungs_after
        >>> [rungs_after(epochs, of=9) for epochs in (1, 2, 3, 9)]
        [[0], [], [1], []]
    """
    if epochs >= of:
        return []
    shares = [REDUCTION ** (RUNGS - rung) for rung in range(RUNGS)]
    return [rung for rung, part in enumerate(shares) if epochs * part >= of > (epochs - 1) * part]

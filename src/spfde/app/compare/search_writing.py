"""What came of a search: its table, the best recipe, and the commands that train it and try it on more seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spfde.app.compare.folder import RUNS
from spfde.app.compare.search_budget import Budget
from spfde.app.compare.search_display import outcome_text, values_text
from spfde.app.compare.search_state import DENSE, SEARCH, Search, Trial, write
from spfde.app.compare.spec import DEFAULTS
from spfde.app.compare.statistics import pareto
from spfde.app.declaring import flag, names_of
from spfde.app.options import RecipeOptions
from spfde.app.report import figures
from spfde.app.runs.folder import RECIPE, RunFolder
from spfde.app.train.options import TrainOptions
from spfde.core.say import counted

TABLE, BEST, CONFIRM = "table.md", "best.toml", "confirm.toml"
_SEEDS = 5
"""So many confirm."""
_WELL_USED = 0.8
"""Share of a budget of which more need not be said."""
_CONFIRMED = 3
"""So many of the best trials are tried on more seeds, and the dense ones."""
_HEADINGS = ("trial", "options", "outcome", "training FLOPs", "of dense", "seconds", "validation", "test", "front")


@dataclass(frozen=True)
class Result:
    """What is said of a search at its end, or so far.

    Attributes:
        best: of the finished trials, by validation accuracy after the last epoch; of equal ones the cheapest.
        fronts: by cost ("training_flops", "seconds") names of the finished trials that none beats.
        flops, seconds: what all trials cost together.
        dense_flops: of one dense run at its full length.
        dense_seconds: of that run, scaled from the dense net's shorter one by FLOPs; None where that was not trained.
    """

    search: Search
    folder: Path
    dense_flops: int
    best: Trial | None
    fronts: dict[str, list[str]]
    flops: int
    seconds: float
    dense_seconds: float | None

    @classmethod
    def of(cls, search: Search, folder: Path, dense_flops: int) -> Result:
        done = finished(search)
        points = {
            cost: pareto([(getattr(trial, cost), trial.val_accuracy[-1]) for trial in done])
            for cost in ("training_flops", "seconds")
        }
        whole = next((trial for trial in done if trial.name == DENSE[0]), None)
        return cls(
            search=search,
            folder=folder,
            dense_flops=dense_flops,
            best=done[0] if done else None,
            fronts={
                cost: [trial.name for trial, is_on in zip(done, on, strict=True) if is_on]
                for cost, on in points.items()
            },
            flops=sum(trial.training_flops + trial.timing_flops for trial in search.trials),
            seconds=sum(trial.seconds + trial.timing_seconds for trial in search.trials),
            dense_seconds=None if whole is None else whole.seconds / whole.training_flops * dense_flops,
        )

    def to_dict(self) -> dict[str, Any]:
        """Primitives, as in ``search.json``."""
        return {
            "best": None if self.best is None else self.best.name,
            "command": None if self.best is None else self.train_command(self.best),
            "pareto": self.fronts,
            "cost": {
                "training_flops": self.flops,
                "dense_training_flops": self.dense_flops,
                "seconds": self.seconds,
                "dense_seconds": self.dense_seconds,
            },
            "notes": self.notes(),
        }

    def train_command(self, trial: Trial) -> str:
        """The command that trains a trial once more, whole."""
        return shlex.join(["spfde", "train", "--recipe", str(self.folder / BEST), *_flags(_others(self.search, trial))])

    def notes(self) -> list[str]:
        """What a reader has to know."""
        budget, states = Budget.read(self.search.budget), [trial.state for trial in self.search.trials]
        longest = counted(self.search.dense.epochs, "epoch")
        kept_to = {
            "flops": f"{budget.limit:g} % of the training FLOPs that the dense run of {longest} has, by their plans",
            "seconds": f"{figures.duration(budget.limit)}, estimated as the seconds of its second epoch, scaled by the "
            "FLOPs of its plan",
            "memory": f"{figures.memory(budget.limit)} in its largest training step, modelled as PyTorch stores it "
            '("actual" of spfde plan), where masks save nothing',
        }
        lines = [f"Each trial is as long as it can be up to {longest} with {kept_to[budget.kind]}."]
        if budget.kind == "seconds":
            over = max((trial.seconds / budget.limit for trial in finished(self.search)), default=0.0)
            lines.append(f"The longest finished trial took {figures.percent(over)} of the budget, measured.")
        against = f"{figures.times(self.flops / self.dense_flops)} the FLOPs of one dense run of {longest}"
        took = f"{figures.duration(self.seconds)} of training" + (
            "" if not self.dense_seconds else f", against about {figures.duration(self.dense_seconds)} for that run"
        )
        lines.append(
            f"{len(states) - states.count('unfit')} trials: {states.count('finished')} finished, "
            f"{states.count('pruned')} pruned, {states.count('failed')} failed; {states.count('unfit')} more were not "
            f"trained. Together they cost {against} and {took}."
        )
        share = self.search.dense.validation_share
        lines.append(
            f"Chosen by accuracy on {figures.percent(share)} of the training set; the test set was looked at once for "
            "each finished trial, and had no say. Front: nothing finished is as cheap and more accurate. FLOPs are "
            "modelled, seconds measured."
        )
        if self.best is not None:
            lines += self._of_the_best(self.best, budget)
        lines.append(
            "One seed decides little, and the best of many is better by luck as well: before you rely on it, compare "
            f"over other seeds, with `spfde compare {shlex.quote(str(self.folder / CONFIRM))}`."
        )
        return lines

    def _of_the_best(self, best: Trial, budget: Budget) -> list[str]:
        """Whether others are as good, and what it leaves of the budget."""
        lines = []
        even = [trial.name for trial in finished(self.search) if trial.val_accuracy[-1] == best.val_accuracy[-1]]
        if len(even) > 1:
            lines.append(f"{', '.join(even)} are equally accurate on it: {best.name} costs the fewest FLOPs of them.")
        if budget.kind == "flops" and best.epochs == self.search.dense.epochs:
            used = 100 * best.planned_flops / self.dense_flops
            if used < _WELL_USED * budget.limit:
                lines.append(
                    f"{best.name} uses {used:.1f} of {budget.limit:g} %: it is as long as --epochs allows. With more "
                    "--epochs, or wider nets in --width, it could use the rest."
                )
        return lines

    def as_markdown(self) -> str:
        """A table that is read as it is, too."""
        lines = [_line(_HEADINGS), "|---|---|---|" + "---:|" * (len(_HEADINGS) - 3)]
        lines += [_line(self._cells(trial)) for trial in self.search.trials]
        lines += ["", *(f"- {note}" for note in self.notes())]
        if self.best is not None:
            lines += ["", f"Best: {self.best.name} ({values_text(self.best.values)}). It is trained by", ""]
            lines += [f"    {self.train_command(self.best)}"]
        return "\n".join([*lines, ""])

    def _cells(self, trial: Trial) -> tuple[str, ...]:
        has_cost = bool(trial.training_flops)
        return (
            trial.name,
            values_text(trial.values),
            outcome_text(trial, with_accuracy=False),
            figures.flops(trial.training_flops if has_cost else None),
            figures.percent(trial.training_flops / self.dense_flops if has_cost else None),
            figures.duration(trial.seconds if has_cost else None),
            figures.percent(trial.val_accuracy[-1] if trial.val_accuracy else None, 2),
            figures.percent(trial.test_accuracy, 2),
            ", ".join(
                {"training_flops": "FLOPs"}.get(cost, cost) for cost, on in self.fronts.items() if trial.name in on
            ),
        )


def finished(search: Search) -> list[Trial]:
    """The finished trials, the best one first."""
    done = [trial for trial in search.trials if trial.state == "finished"]
    return sorted(done, key=lambda trial: (-trial.val_accuracy[-1], trial.training_flops))


def keep(folder: RunFolder, search: Search, dense_flops: int) -> Result:
    """Write what there is to say of a search into its folder."""
    result = Result.of(search, folder.path, dense_flops)
    if result.best is not None:
        folder.write_text(BEST, search.options_of(result.best).load_recipe().to_toml())
        folder.write_text(CONFIRM, _comparison(search, folder.path))
    folder.write_text(TABLE, result.as_markdown())
    write(folder, search, result.to_dict())
    return result


def _others(search: Search, trial: Trial) -> dict[str, Any]:
    """Options of a trial beside its recipe, where they are not the defaults."""
    options, plain = search.options_of(trial), TrainOptions()
    names = [name for name in DEFAULTS if name not in names_of(RecipeOptions)]
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(plain, name)}


def _flags(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            for each in value if isinstance(value, tuple) else (value,):
                words += [flag(name), str(each)]
    return words


def _comparison(search: Search, folder: Path) -> str:
    """A specification for ``spfde compare``: the best trials and the dense ones, by the recipes in their folders."""
    done = finished(search)
    chosen = [*done[:_CONFIRMED], *(trial for trial in done[_CONFIRMED:] if trial.name in DENSE)]
    fresh = [seed for seed in range(_SEEDS + 1) if seed != search.dense.seed][:_SEEDS]
    lines = [
        f"# the best trials of {SEARCH}, and the dense nets at the same budget, over seeds that had no say in it",
        *("version = 1", f"seeds = {fresh}"),
    ]
    if dense := next((trial.name for trial in chosen if trial.name in DENSE), None):
        lines.append(f"baseline = {_toml(dense)}")
    for trial in chosen:
        recipe = (folder / RUNS / trial.folder / RECIPE).absolute()
        others = {name: value for name, value in _others(search, trial).items() if name not in ("seed", "plugin")}
        table = {"name": trial.name, "recipe": str(recipe), **others}
        lines += ["", "[[candidates]]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
    return "\n".join([*lines, ""])


def _toml(value: Any) -> str:
    """A number, a text or a path; JSON's escapes are TOML's, but for the delete character."""
    plain = value if isinstance(value, int | float) else str(value)
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"

"""What a person may ask of a training run: the options of ``spfde train``, checked and kept in ``config.json``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge
from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from spfde.app.data.datasets import DATASETS, usual_crop_share
from spfde.app.declaring import flag, names_of, with_words
from spfde.app.options import (
    CacheOptions,
    DataOptions,
    MachineOptions,
    PluginOptions,
    RecipeOptions,
    TrainingOptions,
    recipe_fields,
)
from spfde.app.runs.folder import CONFIG, SUMMARY, RunFolder, flat
from spfde.app.train.checks import check_named
from spfde.core.errors import InvalidArgument, Problem, Problems, RunFolderError, StateMismatch, nearest, shortened
from spfde.core.registry import registered
from spfde.core.technique import Technique
from spfde.freezing import ProgressiveFreezing
from spfde.recipe import presets
from spfde.recipe.recipe import Recipe
from spfde.sieving import DataSieving
from spfde.sieving.methods import check_fraction
from spfde.sparsity import MEST, NM, Block, PruningAtInitialisation, Structure

RATES = {"sgd": 0.1, "adamw": 0.001}
"""Initial learning rates of the optimizers, where none is given."""


def absolute_source(data: str) -> str:
    """A file's or folder's absolute path, so that a run can be resumed from anywhere; a data set's name as it is."""
    path = Path(data)
    return str(path.absolute()) if os.path.exists(path) and data not in DATASETS else data


@with_words
class TrainOptions(Technique, CacheOptions, MachineOptions, TrainingOptions, DataOptions, PluginOptions):
    """Everything that is needed to run again: what the command line takes, and the recipe that it came to.

    Attributes:
        recipe: the recipe as nested primitives (``Recipe.to_dict``).
        recipe_name: the preset or file that it came from.
        augment_draws: crops and flips are drawn batch by batch from one generator ("batch"), or follow from seed, epoch
            and sample id ("sample"); "auto": "batch" on a CPU, as ever, and "sample" elsewhere.
        dense_timing_steps: dense steps that are timed before training, for the bill; 0 for none.
    """

    model_config = ConfigDict(validate_default=True)

    # What may differ between a checkpoint and the run that goes on from it: where things are, and who is told.
    MOVABLE: ClassVar[set[str]] = {
        *(name for name in names_of(MachineOptions) if name != "precision"),
        *names_of(CacheOptions),
        *("data", "weights", "plugin", "recipe_name", "keep_every", "dense_timing_steps"),
    }

    recipe_name: str = "spfde"
    recipe: dict[str, Any] = Field(default_factory=lambda: presets.PRESETS["spfde"].to_dict())
    augment_draws: Literal["auto", "batch", "sample"] = "auto"
    dense_timing_steps: Annotated[int, Ge(0)] = 5

    #: What is chosen where the run starts, and what the runs of earlier versions did, whose folders do not say it.
    FORMERLY: ClassVar[dict[str, Any]] = {"precision": "fp32", "compile": False, "augment_draws": "batch"}

    _absolute_source = field_validator("data")(absolute_source)

    @field_validator("crop_share")
    @classmethod
    def _own_crop_share(cls, share: float | None, others: ValidationInfo) -> float:
        # Chosen here and not where it is used: the run's data may lie elsewhere when it goes on.
        return usual_crop_share(str(others.data.get("data", ""))) if share is None else share

    @field_validator("data_root", "cache_folder")
    @classmethod
    def _absolute_path(cls, path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    @field_validator("weights")
    @classmethod
    def _absolute_weights(cls, weights: str | None) -> str | None:
        return str(Path(weights).absolute()) if weights is not None and os.path.exists(weights) else weights

    @model_validator(mode="before")
    @classmethod
    def _usual_rate(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("lr") is None:
            return {**given, "lr": RATES.get(str(given.get("optimizer")), RATES["sgd"])}
        return given

    @model_validator(mode="after")
    def _updates_fit(self) -> Self:
        problems = Problems()
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            problems.add("nesterov", True, "is a form of sgd's momentum", "Leave it out, or use sgd with a momentum.")
        usual = type(self).model_fields["momentum"].default
        if self.optimizer != "sgd" and self.momentum != usual:
            rule, remedy = f"is sgd's alone: {self.optimizer} has none", "Leave it out, or use sgd."
            problems.add("momentum", self.momentum, rule, remedy)
        if self.warmup is not None and self.warmup >= self.epochs:
            problems.add("warmup", self.warmup, f"must be shorter than the run ({self.epochs} epochs)", "Shorten it.")
        if self.reestimate_bn == 1:
            problems.add("reestimate_bn", 1, "one sample has no variance", "Give 2 or more, or 0 for none.")
        if self.schedule != "cosine" and self.recipe.get("learning_rate"):
            rule = (
                f"recipe {self.recipe_name} drives the rates itself: a cosine of each block down to where it is frozen"
            )
            remedy = "Leave it out, or take the recipe's TOML file without its table learning_rate."
            problems.add("schedule", self.schedule, rule, remedy)
        problems.raise_if_any()
        return self

    @property
    def rate(self) -> float:
        """The initial learning rate."""
        assert self.lr is not None, "it is filled in"
        return self.lr

    def load_recipe(self) -> Recipe:
        """The recipe as an object, with what other options say about it.

        Its learning rate takes their warm-up; and masks of weights that are given keep the largest.
        """
        recipe = Recipe.from_dict(self.recipe)
        rates, method = recipe.learning_rate, recipe.sparsity
        if rates is not None and self.warmup is not None:
            recipe = recipe.replace(learning_rate=rates.model_copy(update={"warmup_epochs": self.warmup}))
        if method is not None and self.weights is not None and not isinstance(method, PruningAtInitialisation):
            recipe = recipe.replace(sparsity=method.model_copy(update={"init": "magnitude"}))
        return recipe

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path) -> Self:
        """The options in a run folder's ``config.json``.

        Raises:
            RunFolderError: they are missing, or not as they were written.
        """
        command = config.get("command")
        remedy = "Restore the file from a copy, or start a new run."
        if not isinstance(command, dict):
            raise RunFolderError(f'{path}: lacks the run\'s options ("command"). {remedy}')
        plugins = command.get("plugin") or ()
        if not isinstance(plugins, list | tuple) or not all(isinstance(name, str) for name in plugins):
            raise RunFolderError(f"{path}: names its plugins as {shortened(plugins)}, which is no list. {remedy}")
        if missing := [name for name in plugins if name not in sys.modules]:
            again = " ".join(f"--plugin {name}" for name in missing)
            raise RunFolderError(f"{path}: the run was trained with {again}. Pass that again, or install the package.")
        try:
            options = cls(**(cls.FORMERLY | command))
            options.load_recipe()
        except InvalidArgument as error:
            raise RunFolderError(f"{path}: holds options that are not valid: {error} {remedy}") from error
        return options

    def as_chosen(self, before: TrainOptions) -> Self:
        """With what is left to choose as the run had it that goes on."""
        left = [name for name in self.FORMERLY if getattr(self, name) in ("auto", None)]
        return self.model_copy(update={name: getattr(before, name) for name in left})

    def untold(self) -> Self:
        """The same for a process of several that tells nobody anything: the first one does."""
        return self.model_copy(update={"profile": None, "track": ()})

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must have in common."""
        return self.model_dump(mode="json", exclude=self.MOVABLE)

    def check_identity(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ``StateMismatch`` for a checkpoint of another run, naming the first option that differs."""
        theirs = flat(saved)
        for name, mine in flat(self.identity()).items():
            if name in theirs and theirs[name] != mine:
                raise StateMismatch(
                    f"checkpoint {checkpoint}: is of another run: there {name} is {theirs[name]!r}, "
                    f"and config.json says {mine!r}. Restore config.json, or start a new run."
                )


def options_in(folder: Path) -> tuple[TrainOptions | None, Any]:
    """The options of a run that can go on, and None; of one that is finished None, and its test accuracy.

    Raises:
        RunFolderError: it is no run folder, or its files are damaged.
    """
    look = RunFolder.existing(folder)
    if look.is_finished:
        return None, look.read_json(SUMMARY).get("test_accuracy")
    return TrainOptions.from_config(look.read_json(CONFIG), folder / CONFIG), None


def options_from(asked: Mapping[str, Any]) -> TrainOptions:
    """The options of a run, as they were asked for on the command line; ``InvalidArgument`` tells all that is wrong."""
    problems = Problems()
    written = presets.PRESETS["spfde"].to_dict()
    with problems.collecting():
        written = recipe_from(asked).to_dict()
    options = None
    with problems.collecting():
        settings = {name: value for name, value in asked.items() if name in TrainOptions.model_fields}
        options = TrainOptions(**(settings | {"recipe_name": asked["recipe"], "recipe": written}))
        if options.cache_variants and not options.load_recipe().freezes:
            rule = f"recipe {asked['recipe']} freezes nothing"
            problems.add("cache_variants", options.cache_variants, rule, "Use --freeze 0.2 or so with it.")
    if options is None or problems.found:
        # What is named is checked where it is used; told together with the rest, it must be now.
        with problems.collecting():
            check_named(asked)
        raise InvalidArgument(*problems.found)
    return options


def recipe_from(asked: Mapping[str, Any]) -> Recipe:
    """The recipe that was asked for, see ``choose_recipe``."""
    changes = {name: asked[name] for name in names_of(RecipeOptions)}
    return choose_recipe(changes.pop("recipe"), **changes)


def choose_recipe(name: str, **changes: Any) -> Recipe:
    """A preset or a TOML file, with the command line's changes.

    Args:
        name: a preset's name, or the path of a TOML file.
        changes: the other options of ``RecipeOptions``. A sparsity makes a dense recipe MEST at that sparsity, and
            "2:4" and the like bring theirs along; 0 to freeze or to sieve switches that off.

    Raises:
        InvalidArgument: an unknown preset, an unreadable file, or a value that breaks a rule.
    """
    asked, recipe = RecipeOptions(recipe=name, **changes), read_recipe(name)
    changed: dict[str, Any] = {}
    problems = Problems()
    for table in _TABLES:
        with problems.collecting():
            changed[table] = _technique(asked, recipe, table)
    if asked.interval != "auto":
        interval = int(asked.interval) if asked.interval.isdecimal() else asked.interval
        with problems.collecting():
            changed["update_interval_epochs"] = Recipe(update_interval_epochs=interval).update_interval_epochs
    problems.raise_if_any()
    return recipe.replace(**changed)


# The technique that a table becomes where the recipe has none, the option that makes it so, and what to say without.
_TABLES: Mapping[str, tuple[type[Technique], str, str]] = {
    "sparsity": (MEST, "sparsity", "has no sparsity"),
    "freezing": (ProgressiveFreezing, "freeze", "freezes nothing"),
    "sieving": (DataSieving, "sieve", "leaves no samples out"),
}


def _technique(asked: RecipeOptions, recipe: Recipe, table: str) -> Technique | None:
    options = {to.field: name for name, to in recipe_fields().items() if to.table == table}
    given = {field: getattr(asked, name) for field, name in options.items()}
    given = {field: value for field, value in given.items() if value not in (None, (), [])}
    technique: Technique | None = getattr(recipe, table)
    if not given:
        return technique
    first, value = next(iter(given.items()))
    if "structure" in given:
        given["structure"] = structure = read_structure(given["structure"])
        if isinstance(structure, NM):
            given.setdefault("sparsity", 1.0 - structure.n / structure.m)
    kind, makes_one, lack = _TABLES[table]
    if technique is None and recipe_fields()[makes_one].field not in given:
        remedy = f"Give {flag(makes_one)} too, or take another recipe."
        raise InvalidArgument(Problem(flag(options[first]), value, f"recipe {asked.recipe} {lack}", remedy))
    if technique is not None:
        _check_takes(technique, asked, table, {field: name for field, name in options.items() if field in given})
    own = {} if technique is None else {name: getattr(technique, name) for name in type(technique).model_fields}
    if "flops_reduction" in given:
        own |= {"start_epoch": None, "as_far_as_possible": False}
    if "scheme" in given:
        own |= {"start_epoch": None, "resume_epochs": None}  # of another scheme, they would be in the way
    criteria = registered("sieving-criterion")
    if "swap_fraction" in own and getattr(criteria.get(given.get("criterion", "")), "redraws", False):
        own["swap_fraction"] = None  # likewise
    try:
        return (kind if technique is None else type(technique))(**(own | given))
    except InvalidArgument as error:
        renamed = {field: flag(name) for field, name in options.items() if field in given}
        typed = {"structure": asked.structure}
        problems = (
            replace(
                found,
                argument=renamed.get(found.argument, found.argument),
                value=typed.get(found.argument, found.value),
            )
            for found in error.problems
        )
        raise InvalidArgument(*problems) from None


def _check_takes(technique: Technique, asked: RecipeOptions, table: str, given: Mapping[str, str]) -> None:
    """Raise ``InvalidArgument`` with the options that set what the recipe's technique does not have, by field."""
    problems = Problems()
    for field, name in given.items():
        if field not in type(technique).model_fields:
            theirs = {preset: getattr(recipe, table) for preset, recipe in presets.PRESETS.items()}
            others = [preset for preset, one in theirs.items() if field in getattr(type(one), "model_fields", ())]
            rule = f"does not go with {technique.name}, the {table} of recipe {asked.recipe}"
            remedy = f"Leave it out, or take --recipe {' or '.join(others)}." if others else "Leave it out."
            problems.add(flag(name), getattr(asked, name), rule, remedy)
    problems.raise_if_any()


def read_structure(text: str) -> Structure:
    """The structure that the command line names."""
    if match := re.fullmatch(r"(\d+)x(\d+)(?:-(kernel|inputs))?", text):
        along: Any = match[3] or "row"
        return Block(rows=int(match[1]), columns=int(match[2]), along=along)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(n=int(match[1]), m=int(match[2]))
    structures = registered("structure")
    if text not in structures:
        names = [*structures, "4x1", "1x2-kernel", "2x2-inputs", "2:4"]
        raise InvalidArgument(Problem("--structure", text, "is no structure", nearest(text, names)))
    found: Structure = structures[text]()
    return found


def read_recipe(name: str) -> Recipe:
    """The preset of that name, or the recipe in that TOML file."""
    path = Path(name)
    if name not in presets.PRESETS and (path.suffix == ".toml" or os.path.exists(path)):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            remedy = "Pass a TOML file or a preset's name."
            raise InvalidArgument(Problem("recipe", name, f"cannot be read ({error})", remedy)) from None
        return Recipe.from_toml(text)
    return presets.get(name)


def check_full_batch(recipe: Recipe, *, samples: int, batch_size: int, epochs: int) -> None:
    """Raise ``InvalidArgument`` where so many samples are left out that the rest fills no batch."""
    if recipe.sieving is not None and (found := check_fraction(recipe.sieving, samples, batch_size, epochs)):
        raise InvalidArgument(*found)

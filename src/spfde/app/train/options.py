"""What a person may ask of a training run: the options of ``spfde train``, checked and kept in ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from annotated_types import Ge
from pydantic import ConfigDict, Field, field_validator

from spfde.app.data.datasets import DATASETS
from spfde.app.methods import known
from spfde.app.options import (
    CacheOptions,
    DataOptions,
    MachineOptions,
    PluginOptions,
    RecipeOptions,
    TrainingOptions,
    names_of,
    with_words,
)
from spfde.app.plugins import missing_plugins
from spfde.app.train.checks import check_named
from spfde.core.errors import InvalidArgument, Problem, Problems, RunFolderError, StateMismatch, nearest
from spfde.core.technique import Technique
from spfde.freezing import FREEZE_CRITERIA, ProgressiveFreezing
from spfde.recipe import presets
from spfde.recipe.recipe import Recipe
from spfde.sieving import DataSieving, SievingMethod, check_fraction
from spfde.sparsity import MEST, NM, Block, SparsityMethod, Structure


@with_words
class TrainOptions(Technique, CacheOptions, MachineOptions, TrainingOptions, DataOptions, PluginOptions):
    """Everything that is needed to run again: what the command line takes, and the recipe that it came to.

    Attributes:
        recipe: the recipe as nested primitives (``Recipe.to_dict``).
        recipe_name: the preset or file that it came from.
        dense_timing_steps: dense steps that are timed before training, for the bill; 0 for none.
    """

    model_config = ConfigDict(validate_default=True)

    # What may differ between a checkpoint and the run that goes on from it: where things are, and who is told.
    MOVABLE: ClassVar[frozenset[str]] = frozenset(
        {
            *names_of(MachineOptions),
            *names_of(CacheOptions),
            "data",
            "plugin",
            "recipe_name",
            "keep_every",
            "dense_timing_steps",
        }
    ) - {"precision"}

    recipe_name: str = "spfde"
    recipe: dict[str, Any] = Field(default_factory=lambda: presets.PRESETS["spfde"].to_dict())
    dense_timing_steps: Annotated[int, Ge(0)] = 5

    @field_validator("data")
    @classmethod
    def _absolute_source(cls, data: str) -> str:
        """A path becomes absolute, so that the run can be resumed from anywhere; a data set's name stays as it is."""
        return absolute_source(data)

    @field_validator("data_root", "cache_folder")
    @classmethod
    def _absolute_path(cls, path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    def load_recipe(self) -> Recipe:
        """The recipe as an object."""
        return Recipe.from_dict(self.recipe)

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
        if missing := missing_plugins(command.get("plugin") or ()):
            again = " ".join(f"--plugin {name}" for name in missing)
            raise RunFolderError(f"{path}: the run was trained with {again}. Pass that again, or install the package.")
        try:
            options = cls(**command)
            options.load_recipe()
        except InvalidArgument as error:
            raise RunFolderError(f"{path}: holds options that are not valid: {error} {remedy}") from error
        return options

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must have in common."""
        return self.model_dump(mode="json", exclude=set(self.MOVABLE))

    def check_identity(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            StateMismatch: naming the first option that differs.
        """
        theirs = _flat(saved)
        for name, mine in _flat(self.identity()).items():
            if name in theirs and theirs[name] != mine:
                raise StateMismatch(
                    f"checkpoint {checkpoint}: is of another run: there {name} is {theirs[name]!r}, "
                    f"and config.json says {mine!r}. Restore config.json, or start a new run."
                )


def options_from(asked: Mapping[str, Any]) -> TrainOptions:
    """The options of a run, as they were asked for on the command line; all that is wrong is told together.

    Args:
        asked: options of ``TrainOptions`` and ``RecipeOptions`` by name.

    Raises:
        InvalidArgument: an option breaks a rule, or names what there is not.
    """
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
    for field, change in (
        ("sparsity", _sparsity),
        ("freezing", _freezing),
        ("sieving", _sieving),
        ("update_interval_epochs", _interval),
    ):
        with problems.collecting():
            changed[field] = change(asked, recipe)
    problems.raise_if_any()
    return recipe.replace(**changed)


def _sparsity(asked: RecipeOptions, recipe: Recipe) -> SparsityMethod | None:
    """The recipe's method with the command line's changes; MEST where the recipe has none."""
    structure = None if asked.structure is None else read_structure(asked.structure)
    given = _given(
        sparsity=asked.sparsity, structure=structure, soft_bound=asked.soft_bound, exclude=asked.exclude or None
    )
    if isinstance(structure, NM):
        given.setdefault("sparsity", 1.0 - structure.n / structure.m)
    method = recipe.sparsity
    if method is None and given:
        if "sparsity" not in given:
            remedy = "Use --recipe mest or spfde, or give --sparsity too."
            raise _lacking(asked, ("structure", "soft_bound", "exclude"), "has no sparsity", remedy)
        method = MEST(sparsity=given["sparsity"])
    if method is not None and "soft_bound" in given and "soft_bound" not in type(method).model_fields:
        rule = f"{method.name} has no soft bound"
        raise InvalidArgument(Problem("--soft-bound", asked.soft_bound, rule, "Use --recipe mest or spfde."))
    return _changed(method, given)


def _freezing(asked: RecipeOptions, recipe: Recipe) -> ProgressiveFreezing | None:
    """The recipe's freezing with the command line's changes; a share freezes where the recipe does not."""
    given = _given(
        flops_reduction=asked.freeze,
        scheme=asked.freeze_scheme,
        criterion=_known("--freeze-criterion", asked.freeze_criterion, FREEZE_CRITERIA),
    )
    if recipe.freezing is None and asked.freeze is None and given:
        remedy = "Use --freeze 0.2 or so with it."
        raise _lacking(asked, ("freeze_scheme", "freeze_criterion"), "freezes nothing", remedy)
    if asked.freeze is not None:
        # Asked for by number it is met or refused; a preset's is met as far as can be.
        given |= {"start_epoch": None, "as_far_as_possible": False}
    if asked.freeze_scheme is not None:
        # Of another scheme, the two would be in the way.
        given |= {"start_epoch": None, "resume_epochs": None}
    return _changed(recipe.freezing or (ProgressiveFreezing() if given else None), given)


def _sieving(asked: RecipeOptions, recipe: Recipe) -> SievingMethod | None:
    """The recipe's sieving with the command line's changes."""
    given = _given(
        removed_fraction=asked.sieve,
        criterion=_known("--sieve-criterion", asked.sieve_criterion, known("sieving-criterion")),
    )
    if recipe.sieving is None and asked.sieve is None and given:
        remedy = "Use --sieve 0.2 or so with it."
        raise _lacking(asked, ("sieve_criterion",), "leaves no samples out", remedy)
    return _changed(recipe.sieving or (DataSieving() if given else None), given)


def _interval(asked: RecipeOptions, recipe: Recipe) -> Any:
    """The recipe's interval, or another one, which the recipe checks."""
    text = asked.interval
    if text == "auto":
        return recipe.update_interval_epochs
    return Recipe(update_interval_epochs=int(text) if text.isdecimal() else text).update_interval_epochs


def _given(**fields: Any) -> dict[str, Any]:
    """Fields that were asked for."""
    return {name: value for name, value in fields.items() if value is not None}


T = TypeVar("T", bound=Technique)


def _changed(technique: T | None, given: Mapping[str, Any]) -> T | None:
    """A technique with other fields, checked as a new one is."""
    if technique is None or not given:
        return technique
    own = {name: getattr(technique, name) for name in type(technique).model_fields}
    return type(technique)(**(own | dict(given)))


def _known(option: str, name: str | None, names: Collection[str]) -> str | None:
    if name is not None and name not in names:
        raise InvalidArgument(Problem(option, name, "is not known", nearest(name, names)))
    return name


def _lacking(asked: RecipeOptions, options: Sequence[str], lack: str, remedy: str) -> InvalidArgument:
    """What was asked for needs something that the recipe does not have; the first such option is named."""
    option = next(name for name in options if getattr(asked, name) not in (None, ()))
    flag = "--" + option.replace("_", "-")
    return InvalidArgument(Problem(flag, getattr(asked, option), f"recipe {asked.recipe} {lack}", remedy))


def read_structure(text: str) -> Structure:
    """The structure that the command line names.

    Raises:
        InvalidArgument: there is none of that name; the nearest is given.
    """
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(rows=int(match[1]), columns=int(match[2]))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(n=int(match[1]), m=int(match[2]))
    structures = known("structure")
    if text not in structures:
        names = [*structures, "4x1", "2:4"]
        raise InvalidArgument(Problem("--structure", text, "is no structure", nearest(text, names)))
    found: Structure = structures[text]()
    return found


def read_recipe(name: str) -> Recipe:
    """The preset of that name, or the recipe in that TOML file."""
    path = Path(name)
    if name not in presets.PRESETS and (path.suffix == ".toml" or path.exists()):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(
                Problem("--recipe", name, f"cannot be read ({error})", "Pass a TOML file or a preset's name.")
            ) from None
        return Recipe.from_toml(text)
    return presets.get(name)


def check_full_batch(recipe: Recipe, *, samples: int, batch_size: int) -> None:
    """Refuse to leave out so many samples that the rest fills no batch; needs no data, only their number.

    Raises:
        InvalidArgument: naming the most that can be left out.
    """
    if recipe.sieving is not None and (found := check_fraction(recipe.sieving, samples, batch_size)):
        raise InvalidArgument(*found)


def absolute_source(data: str) -> str:
    """A file's or folder's absolute path, so that a run can be resumed from anywhere; a data set's name as it is."""
    path = Path(data)
    return str(path.absolute()) if path.exists() and data not in DATASETS else data


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat

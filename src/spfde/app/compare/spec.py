"""What is to be compared: candidates, each some options of ``spfde train``, over seeds.

It is read from a TOML file or from the command line's lists. The schema, version 1::

    version = 1
    seeds = 3  # 0, 1, 2; or a list
    baseline = "dense"  # a candidate's name; by default the first dense one, or else the first one

    [options]  # of all runs: options of spfde train, without the dashes and with underscores
    data = "cifar100"
    model = "resnet32"
    epochs = 160

    [[candidates]]  # further options, where each may be a list: all combinations are candidates
    recipe = ["mest", "rigl"]
    sparsity = [0.9, 0.95]
    name = "sparse"  # begins the names of these candidates

    [quick]  # options of the short form, which has one seed and few images
    model = "resnet8"
    epochs = 4
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import Field, field_validator

from spfde.app.declaring import flag, names_of
from spfde.app.options import OF_RUNS, RecipeOptions, recipe_fields
from spfde.core.errors import InvalidArgument, Problem, Problems, nearest
from spfde.core.technique import Technique

if TYPE_CHECKING:
    from spfde.recipe.recipe import Recipe

MOST_RUNS = 10_000
_NAME = "name"
_OF_ONE_RUN = ("seed", "profile", "track")
DEFAULTS = {name: getattr(group, name) for group in OF_RUNS for name in names_of(group)}
"""Options of ``spfde train``, as they are without being given."""
KNOWN = tuple(name for name in DEFAULTS if name not in _OF_ONE_RUN)
"""Those that runs can differ in, or have in common."""
# Where a recipe has no such technique: the option that makes one of it.
_MAKES = {"freezing": "freeze", "sieving": "sieve"}

Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Values = dict[str, Any]
"""Options by their names."""


class Spec(Technique):
    """A comparison as it is asked for.

    Attributes:
        seeds: of the runs of each candidate; a number stands for so many, from 0 on.
        baseline: name of the candidate that the others' differences are from.
        options: options of all runs.
        candidates: further options of some, as lists or not.
        quick: options of the short form.

    Example:
        >>> from spfde.app.compare.spec import Spec
        >>> spec = Spec(seeds=2, candidates=[{"recipe": ["dense", "mest"], "sparsity": [0.8, 0.9]}])
        >>> [name for name, _ in spec.expanded()]
        ['dense', 'mest sparsity=0.8', 'mest sparsity=0.9']
        >>> spec.seeds
        (0, 1)
    """

    version: Literal[1] = 1
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (0, 1, 2)
    baseline: str | None = None
    options: Values = Field(default_factory=dict)
    candidates: Annotated[tuple[Values, ...], MinLen(1)]
    quick: Values = Field(default_factory=dict)

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, seeds: Any) -> Any:
        if isinstance(seeds, bool) or not isinstance(seeds, int):
            return seeds
        if not 1 <= seeds <= MOST_RUNS:
            raise ValueError(f"must be from 1 to {MOST_RUNS:,}, or a list of seeds")
        return tuple(range(seeds))

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(seeds))

    def expanded(self) -> list[tuple[str, Values]]:
        """Names and options of the candidates; of those with equal options the first one.

        Raises:
            InvalidArgument: an option is unknown or of no candidate, or two candidates have one name.
        """
        problems, found = Problems(), list[tuple[str, Values]]()
        n = len(self.seeds) * sum(map(_n_combinations, self.candidates))
        if n > MOST_RUNS:
            raise InvalidArgument(Problem("candidates", n, f"are more than {MOST_RUNS:,} runs", "Compare fewer."))
        for at, table in enumerate(self.candidates, start=1):
            place = f"candidates[{at}]" if len(self.candidates) > 1 else ""
            with problems.collecting():
                _check_names({**self.options, **table}, place)
                found += _combinations(self.options, table, place)
        problems.raise_if_any()
        unique: dict[str, tuple[str, Values]] = {}
        for name, values in found:
            unique.setdefault(repr(sorted(values.items())), (name, values))
        kept = list(unique.values())
        if twice := next((name for name, count in Counter(name for name, _ in kept).items() if count > 1), None):
            remedy = 'Give them a name each, as name = "…" in their tables.'
            raise InvalidArgument(Problem("candidates", twice, "is the name of two candidates", remedy))
        return kept

    def quickened(self, data: str) -> Spec:
        """The short form: one seed, on other data, with the options of ``quick``.

        Options of recipes replace those that candidates have, and do not come to others.
        """
        quick = self.quick | {"data": data, "image_size": None}
        of_recipes = set(names_of(RecipeOptions))
        options = {name: value for name, value in quick.items() if name not in of_recipes or name in self.options}
        tables = [
            {
                name: quick[name] if name in of_recipes & set(quick) and value else value
                for name, value in table.items()
                if name not in options or name in of_recipes
            }
            for table in self.candidates
        ]
        return Spec(seeds=(0,), options=self.options | options, candidates=tuple(tables))


def _check_names(given: Mapping[str, Any], place: str) -> None:
    problems = Problems()
    for name, value in given.items():
        if name in KNOWN or name == _NAME:
            continue
        rule, remedy = "is no option of spfde train", nearest(name, KNOWN)
        if name in _OF_ONE_RUN:
            rule, remedy = "is of one run alone", 'Give "seeds" at the top.' if name == "seed" else "Leave it out."
        problems.add(f"{place}.{name}" if place else name, value, rule, remedy)
    problems.raise_if_any()


def _lists(table: Values) -> dict[str, list[Any]]:
    return {name: list(value) for name, value in table.items() if isinstance(value, list | tuple) and name != "exclude"}


def _n_combinations(table: Values) -> int:
    return math.prod(map(len, _lists(table).values()))


def _combinations(shared: Values, table: Values, place: str) -> Iterator[tuple[str, Values]]:
    """The candidates of one table: one for each combination of its lists' values."""
    from spfde.app.train.options import read_recipe

    own = {name: value for name, value in table.items() if name != _NAME}
    lists, read = _lists(own), cache(read_recipe)
    for name in (name for name, values in lists.items() if not values):
        raise InvalidArgument(Problem(f"{place}.{name}".lstrip("."), [], "is an empty list", "Give it values."))
    fixed = shared | {name: value for name, value in own.items() if name not in lists}
    order = sorted(lists, key=lambda name: name != "recipe")
    used: set[str] = set()
    found: list[tuple[str, Values]] = []
    for chosen in itertools.product(*(lists[name] for name in order)):
        values = fixed | dict(zip(order, chosen, strict=True))
        recipe = read(str(values.get("recipe", RecipeOptions.recipe)))
        values = {name: value for name, value in values.items() if _applies(name, values, recipe)}
        used |= set(values)
        varied = [f"{name}={_shown(values[name])}" for name in order if name in values and name != "recipe"]
        start = [str(table[_NAME])] if _NAME in table else []
        if not start or "recipe" in lists:
            start.append(Path(str(values.get("recipe", RecipeOptions.recipe))).stem)
        found.append((" ".join(start + varied), values))
    for name in (name for name in own if name not in used):
        rule = "is of no use: no recipe here has what it changes"
        remedy = "Leave it out, or add a recipe that has."
        raise InvalidArgument(Problem(f"{place}.{name}" if place else flag(name), own[name], rule, remedy))
    yield from found


def _applies(name: str, values: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether an option changes something of this recipe: a sparsity is for sparse ones alone."""
    to = recipe_fields().get(name)
    if to is None or not to.table:
        return True
    technique = getattr(recipe, to.table)
    if technique is not None:
        return to.field in type(technique).model_fields
    makes = _MAKES.get(to.table)
    return makes is not None and (name == makes or bool(values.get(makes)))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_spec(source: str) -> Spec:
    """The specification in a TOML file, or the one of that name that comes with the package.

    Raises:
        InvalidArgument: there is none, or it is not as the schema says.
    """
    own = {path.name.removesuffix(".toml"): path for path in _packaged()}
    path = Path(source)
    try:
        text = (path if source not in own or path.is_file() else own[source]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        remedy = (
            f"Pass a TOML file, or a name. {nearest(source, own)} Several values of an option take commas: 0.8,0.9."
        )
        raise InvalidArgument(Problem("SPEC", source, f"cannot be read ({error})", remedy)) from None
    try:
        written = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else error
        remedy = "Print one that is with `spfde compare spfde_cifar10 --print`."
        raise InvalidArgument(Problem("SPEC", source, f"is no valid TOML ({reason})", remedy)) from None
    return Spec(**written)


def packaged_text(name: str) -> str | None:
    """The text of a specification that comes with the package, to be copied and changed; None for another name."""
    found = next((path for path in _packaged() if path.name == f"{name}.toml"), None)
    return None if found is None else found.read_text(encoding="utf-8")


def _packaged() -> list[Any]:
    return [path for path in resources.files("spfde.app.compare.specs").iterdir() if path.name.endswith(".toml")]

"""What a person may ask of a training run: the options of ``spfde train``, checked and kept in ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from spfde.app.data.datasets import DATASETS
from spfde.core.errors import InvalidArgument, Problem, Problems, RunFolderError, StateMismatch, nearest
from spfde.core.registry import find
from spfde.core.technique import Technique
from spfde.freezing import FREEZE_CRITERIA, ProgressiveFreezing
from spfde.recipe import presets
from spfde.recipe.recipe import Recipe
from spfde.sieving import DataSieving, SievingMethod, check_fraction
from spfde.sparsity import MEST, NM, STRUCTURES, Block, SparsityMethod, Structure


class TrainOptions(Technique):
    """Everything that is needed to run again.

    Attributes:
        data: the embedded set's name, a torchvision name, an image folder or an .npz file.
        model: a built-in model's name, or ``timm:NAME``.
        recipe: the recipe as nested primitives (``Recipe.to_dict``).
        recipe_name: the preset or file that it came from.
        keep_every: keep the model and its masks whenever so many epochs are done, and at the end; None keeps none.
        dense_timing_steps: dense steps that are timed before training, for the bill; 0 for none.
    """

    # What may differ between a checkpoint and the run that goes on from it: where things are, and who is told.
    MOVABLE: ClassVar[frozenset[str]] = frozenset(
        {"data", "data_root", "recipe_name", "engine", "device", "workers", "track", "keep_every", "dense_timing_steps"}
    )

    data: str = "fashion-mini"
    data_root: str = "data"
    model: str = "resnet8"
    recipe_name: str = "spfde"
    recipe: dict[str, Any] = Field(default_factory=lambda: presets.PRESETS["spfde"].to_dict())
    epochs: int = Field(default=20, ge=1, description="a whole number of epochs from 1 on")
    batch_size: int = Field(default=64, ge=1, description="a whole number of samples from 1 on")
    lr: float = Field(default=0.1, gt=0, description="a learning rate above 0")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="in [0, 1)")
    weight_decay: float = Field(default=1e-4, ge=0, description="0 or more")
    augment: Literal["auto", "none", "crop", "crop+flip"] = Field(
        default="auto", description="crop+flip for photos, crop for .npz and digits, or what is named"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="a whole number from 0 to 2^32 - 1")
    engine: str = "auto"
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="bf16 halves memory, fp16 needs a GPU, fp32 always works"
    )
    workers: int | None = Field(
        default=None, ge=0, description="a number of processes, 0 or more; None: what the data need"
    )
    track: tuple[str, ...] = ()
    keep_every: int | None = Field(default=None, ge=1, description="a whole number of epochs from 1 on")
    dense_timing_steps: int = Field(default=5, ge=0, description="a number of steps, 0 or more")

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


def choose_recipe(
    name: str,
    *,
    sparsity: float | None = None,
    structure: str | None = None,
    exclude: Sequence[str] = (),
    freeze: float | None = None,
    freeze_scheme: str | None = None,
    freeze_criterion: str | None = None,
    cache_variants: int | None = None,
    sieve: float | None = None,
    sieve_criterion: str | None = None,
    soft_bound: bool | None = None,
    interval: str = "auto",
) -> Recipe:
    """A preset or a TOML file, with the command line's changes.

    Args:
        name: a preset's name, or the path of a TOML file.
        sparsity: target sparsity; a dense recipe becomes MEST at that sparsity.
        structure: a kind of structure, "4x1" and the like for blocks, "2:4" and the like for N:M, which brings its
            sparsity along.
        exclude: name patterns of weights that stay dense; none leaves the recipe's own.
        freeze: FLOPs reduction by freezing; 0 freezes nothing.
        freeze_scheme: which blocks are frozen when, see ``ProgressiveFreezing``.
        freeze_criterion: what lets a block be frozen earlier than planned, see ``ProgressiveFreezing``.
        cache_variants: variants of each sample whose output of the frozen front is kept; 0 keeps none.
        sieve: share of the samples that is left out; 0 leaves out none.
        sieve_criterion: which samples count as easy.
        soft_bound: MEST's soft bound on or off.
        interval: "auto" or a number of epochs; "auto" leaves the recipe's own.

    Raises:
        InvalidArgument: an unknown preset, an unreadable file, or a value that breaks a rule.
    """
    recipe = read_recipe(name)
    changes: dict[str, Any] = {}
    problems = Problems()
    if sparsity is not None or soft_bound is not None or structure is not None or exclude:
        with problems.collecting():
            changes["sparsity"] = _sparsity(name, recipe.sparsity, sparsity, soft_bound, structure, tuple(exclude))
    if any(given is not None for given in (freeze, freeze_scheme, freeze_criterion, cache_variants)):
        with problems.collecting():
            changes["freezing"] = _freezing(name, recipe, freeze, freeze_scheme, freeze_criterion, cache_variants)
    if sieve is not None or sieve_criterion is not None:
        with problems.collecting():
            changes["sieving"] = _sieving(name, recipe, sieve, sieve_criterion)
    if interval != "auto":
        with problems.collecting():
            changes["update_interval_epochs"] = _parse_interval(interval)
    problems.raise_if_any()
    return recipe.replace(**changes) if changes else recipe


def _freezing(
    name: str,
    recipe: Recipe,
    share: float | None,
    scheme: str | None,
    criterion: str | None,
    cache_variants: int | None,
) -> ProgressiveFreezing:
    """The recipe's freezing with the command line's changes; a share freezes where the recipe does not."""
    technique = recipe.freezing
    if technique is None and share is None:
        asked = {"--freeze-scheme": scheme, "--freeze-criterion": criterion, "--cache-variants": cache_variants}
        option, value = _first_given(asked)
        rule = f"recipe {name} freezes nothing"
        raise InvalidArgument(Problem(option, value, rule, "Use --freeze 0.2 or so with it."))
    given = _fields(technique) if technique is not None else {}
    if share is not None:
        # Asked for by number, it is to be reached.
        given |= {"flops_reduction": share, "start_epoch": None, "as_far_as_possible": False}
    if scheme is not None:
        # Of another scheme, the two would be in the way.
        given |= {"scheme": scheme, "start_epoch": None, "resume_epochs": None}
    if criterion is not None:
        if criterion not in FREEZE_CRITERIA:
            raise InvalidArgument(
                Problem("--freeze-criterion", criterion, "is no criterion", nearest(criterion, FREEZE_CRITERIA))
            )
        given["criterion"] = criterion
    if cache_variants is not None:
        given["cache_variants"] = cache_variants
    return ProgressiveFreezing(**given)


def _sieving(name: str, recipe: Recipe, sieve: float | None, criterion: str | None) -> SievingMethod:
    """The recipe's sieving with the command line's changes."""
    method = recipe.sieving
    if method is None and sieve is None:
        rule = f"recipe {name} leaves no samples out"
        raise InvalidArgument(Problem("--sieve-criterion", criterion, rule, "Use --sieve 0.2 or so with it."))
    given: dict[str, Any] = {} if sieve is None else {"removed_fraction": sieve}
    if criterion is not None:
        find("sieving-criterion", criterion, argument="--sieve-criterion")
        given["criterion"] = criterion
    return DataSieving(**given) if method is None else type(method)(**{**_fields(method), **given})


def _sparsity(
    name: str,
    method: SparsityMethod | None,
    sparsity: float | None,
    soft_bound: bool | None,
    structure: str | None,
    exclude: tuple[str, ...],
) -> SparsityMethod:
    """The recipe's method with the command line's changes; MEST where the recipe has none."""
    given: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
    if structure is not None:
        given["structure"] = read_structure(structure)
        if isinstance(given["structure"], NM) and sparsity is None:
            given["sparsity"] = 1.0 - given["structure"].n / given["structure"].m
    if method is None:
        if "sparsity" not in given:
            asked = {"--structure": structure, "--soft-bound": soft_bound, "--exclude": exclude or None}
            option, value = _first_given(asked)
            remedy = "Use --recipe mest or spfde, or give --sparsity too."
            raise InvalidArgument(Problem(option, value, f"recipe {name} has no sparsity", remedy))
        method = MEST(sparsity=given["sparsity"])
    if soft_bound is not None:
        if not isinstance(method, MEST):
            rule = f"{method.name} has no soft bound"
            raise InvalidArgument(Problem("--soft-bound", soft_bound, rule, "Use --recipe mest or spfde."))
        given["soft_bound"] = soft_bound
    if exclude:
        given["exclude"] = exclude
    return type(method)(**{**_fields(method), **given})


def read_structure(text: str) -> Structure:
    """The structure that the command line names.

    Raises:
        InvalidArgument: there is none of that name; the nearest is given.
    """
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(rows=int(match[1]), columns=int(match[2]))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(n=int(match[1]), m=int(match[2]))
    if text not in STRUCTURES:
        known = [*STRUCTURES, "4x1", "2:4"]
        raise InvalidArgument(Problem("--structure", text, "is no structure", nearest(text, known)))
    return STRUCTURES[text]()


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


def _fields(technique: Technique) -> dict[str, Any]:
    return {name: getattr(technique, name) for name in type(technique).model_fields}


def _first_given(asked: Mapping[str, Any]) -> tuple[str, Any]:
    """The first option that has a value, to name it in an error."""
    return next((option, value) for option, value in asked.items() if value is not None)


def _parse_interval(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise InvalidArgument(
            Problem("--interval", text, 'must be "auto" or a whole number of epochs from 1 on', "Try --interval 2.")
        )
    return int(text)

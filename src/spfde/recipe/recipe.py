"""The recipe: which savings, with which hyper-parameters. Plain data, printable, comparable, kept as TOML."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.say import counted
from spfde.core.technique import Technique, read_named, write_named
from spfde.freezing import BlockwiseCosine, ProgressiveFreezing
from spfde.sieving import SievingMethod
from spfde.sparsity import SparsityMethod


class Recipe(Technique):
    """Three savings under one schedule; each is optional.

    An empty recipe is neutral: the session then trains bit for bit like the plain loop.

    Attributes:
        sparsity: which weights exist: a sparse training method, or None for a dense model.
        freezing: which layers learn, or None.
        sieving: which samples are seen, or None.
        learning_rate: ``BlockwiseCosine`` lets the session drive the learning rate, each block to zero at its own
            freeze epoch (SpFDE §3.2); None leaves every learning rate to the caller.
        update_interval_epochs: Δτ, the one update epoch of mutation, freezing and sieving, in epochs. "auto" is
            ``min(5, max(1, round(epochs / 32)))``, at least 2 from 4 epochs on: the paper's 5 at 160 epochs.

    Example:
        >>> recipe = spfde.Recipe(
        ...     sparsity=spfde.MEST(sparsity=0.9), freezing=spfde.ProgressiveFreezing(flops_reduction=0.2)
        ... )
        >>> recipe.replace(update_interval_epochs=2).update_interval_epochs
        2
        >>> spfde.Recipe.from_toml(recipe.to_toml()) == recipe
        True
    """

    # SerializeAsAny is not needed: ``to_dict`` writes the techniques itself, with their method's name.
    sparsity: SparsityMethod | None = Field(
        default=None, description="a sparse training method, such as MEST(sparsity=0.9)"
    )
    freezing: ProgressiveFreezing | None = Field(default=None, description="ProgressiveFreezing(flops_reduction=0.2)")
    sieving: SievingMethod | None = Field(
        default=None, description="DataSieving(removed_fraction=0.2) or OneTimeRemoval(removed_fraction=0.2)"
    )
    learning_rate: BlockwiseCosine | None = Field(default=None, description="BlockwiseCosine()")
    update_interval_epochs: int | Literal["auto"] = Field(
        default="auto", description='a whole number of epochs from 1 on, or "auto"'
    )

    KINDS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "sparsity": ("method", "mest"),
        "sieving": ("sieving-method", "circular"),
    }
    """Tables that hold one of several techniques: their kind in the registry, and the one that a table without a
    method means."""
    TABLES: ClassVar[Mapping[str, type[Technique]]] = {
        "freezing": ProgressiveFreezing,
        "learning_rate": BlockwiseCosine,
    }

    @field_validator("sparsity", "freezing", "sieving", "learning_rate", mode="before")
    @classmethod
    def _a_technique(cls, value: object, info: ValidationInfo) -> object:
        if value is None or isinstance(value, Technique):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a technique or None")
        name = str(info.field_name)
        if name in cls.TABLES:
            return cls.TABLES[name](**value)
        kind, default = cls.KINDS[name]
        return read_named(kind, {"method": default, **value}, argument=name, key="method")

    @field_validator("update_interval_epochs", mode="before")
    @classmethod
    def _whole_epochs(cls, value: object) -> object:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError('must be a whole number of epochs from 1 on, or "auto"')

    @model_validator(mode="after")
    def _fits_its_interval(self) -> Self:
        if self.sieves and self.sieving is not None and self.update_interval_epochs != "auto":
            self.sieving.check_interval(self.update_interval_epochs)
        return self

    @property
    def is_sparse(self) -> bool:
        """True when some weights are masked."""
        method = self.sparsity
        return method is not None and (method.sparsity > 0 or any(s > 0 for s in method.overrides.values()))

    @property
    def freezes(self) -> bool:
        """True when some blocks are frozen at some time."""
        return self.freezing is not None and (
            self.freezing.flops_reduction > 0 or self.freezing.start_epoch is not None
        )

    @property
    def sieves(self) -> bool:
        """True when some samples are left out."""
        return self.sieving is not None and self.sieving.removed_fraction > 0

    @property
    def is_neutral(self) -> bool:
        """True when a session under this recipe changes nothing."""
        return not (self.is_sparse or self.freezes or self.sieves or self.learning_rate is not None)

    def interval(self, epochs: int) -> int:
        """Δτ in epochs for a run of ``epochs``.

        Raises:
            InvalidArgument: the interval was given and is longer than the run.
        """
        given = self.update_interval_epochs
        if given == "auto":
            return max(min(5, max(1, round(epochs / 32))), 2 if epochs >= 4 else 1)
        if given > epochs:
            rule, remedy = (
                f"must not be longer than the run of {counted(epochs, 'epoch')}",
                'Train longer, or leave it at "auto".',
            )
            raise InvalidArgument(Problem("update_interval_epochs", given, rule, remedy))
        return given

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; validated as a new recipe is."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Nested primitives; of sparsity and sieving ``method`` names the kind. ``from_dict`` is its inverse."""
        written: dict[str, Any] = {"update_interval_epochs": self.update_interval_epochs}
        for name in (*self.KINDS, *self.TABLES):
            technique = getattr(self, name)
            if technique is not None:
                written[name] = (
                    technique.model_dump(mode="json") if name in self.TABLES else write_named(technique, key="method")
                )
        return written

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Self:
        """The recipe that ``to_dict`` wrote.

        Raises:
            InvalidArgument: an unknown key or method (the nearest is named), or a value that breaks a rule.
        """
        for name in (*cls.KINDS, *cls.TABLES):
            if name in written and not isinstance(written[name], Mapping):
                raise InvalidArgument(Problem(name, written[name], "must be a table", f"Write it as [{name}]."))
        fields = dict(written)
        if "freezing" in fields:
            fields["freezing"] = _without_moved(dict(fields["freezing"]))
        return cls(**fields)

    def to_toml(self) -> str:
        """The recipe as TOML; unset options are left out. ``from_toml`` is its inverse."""
        written = self.to_dict()
        lines = [f"{key} = {_toml(value)}" for key, value in written.items() if not isinstance(value, dict)]
        for key, table in written.items():
            if isinstance(table, dict):
                rows = [f"{name} = {_toml(value)}" for name, value in table.items() if value is not None]
                lines += ["", f"[{key}]", *rows]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """The recipe in a TOML text.

        Raises:
            InvalidArgument: the text is no TOML, or ``from_dict`` refuses its content.
        """
        try:
            written = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            reason = "it nests too deep" if isinstance(error, RecursionError) else error
            raise InvalidArgument(
                Problem("recipe", text, f"is no valid TOML ({reason})", "Compare it with a run folder's recipe.toml.")
            ) from None
        return cls.from_dict(written)


def _without_moved(freezing: dict[str, Any]) -> dict[str, Any]:
    """The table without what earlier versions kept in it and is a setting of the machine; a line says where it went."""
    moved = [name for name in freezing if name.startswith("cache_") and name not in ProgressiveFreezing.model_fields]
    if moved:
        warnings.warn(
            f"freezing: {', '.join(moved)} left out, for what is kept of the frozen front is a setting of the machine: "
            "pass --cache-variants and the like to spfde train, or cache=spfde.PrefixCache(...) to attach.",
            stacklevel=1,  # said once, wherever the recipe is read again
        )
    return {name: value for name, value in freezing.items() if name not in moved}


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; TOML alone wants the delete character escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_toml(str(key))} = {_toml(item)}' for key, item in value.items())} }}"
    return repr(value)

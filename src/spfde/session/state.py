"""What a saved session must agree on with the one that it is loaded into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from spfde.core.clock import Clock
from spfde.core.errors import StateMismatch

STATE_FORMAT = 1


_KEYS = ("recipe", "engine", "fit", "seed", "clock", "generator", "loader_generators", "cost", "parts")


def check_fit(
    state: Mapping[str, Any], *, recipe: Mapping[str, Any], fit: Mapping[str, Any], parts: Collection[str]
) -> None:
    """Refuse a state of another format, recipe, model, loader or run length.

    Args:
        state: what ``Session.state_dict`` returned.
        recipe: the session's recipe as primitives.
        fit: what else must be equal, by name.
        parts: names of the session's parts that have a state of their own.

    Raises:
        StateMismatch: with what differs.
    """
    if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise StateMismatch(
            f"the session's state has format {found!r}, and this version of spfde reads {STATE_FORMAT}. "
            "Load it with the version that wrote it."
        )
    clock = {field.name for field in fields(Clock)} - {"started"}
    damage = [name for name in _KEYS if name not in state]
    if not damage and (set(state["parts"]) != set(parts) or set(state["clock"]) != clock):
        damage = ["parts or clock"]
    if damage and state.get("recipe", recipe) == recipe:
        raise StateMismatch(f"the session's state is damaged: {', '.join(damage)} missing or incomplete.")
    for what, theirs, mine in (("recipe", state["recipe"], recipe), ("run", state["fit"], fit)):
        if theirs != mine:
            was, now = _first_difference(theirs, mine)
            raise StateMismatch(
                f"the state is of another {what}: there {was}, here {now}. "
                "Attach the same model, loader, recipe and number of epochs as in the saved run."
            )


def _first_difference(theirs: Any, mine: Any, path: str = "") -> tuple[str, str]:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        for name in dict.fromkeys([*theirs, *mine]):
            if theirs.get(name) != mine.get(name):
                return _first_difference(theirs.get(name), mine.get(name), f"{path}.{name}" if path else str(name))
    return f"{path} is {theirs}", f"{path} is {mine}"

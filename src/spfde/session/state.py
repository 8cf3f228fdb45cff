"""Saving a session and loading it: what the parts remember, and what must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from spfde.core.clock import Clock
from spfde.core.errors import StateMismatch, shortened
from spfde.core.generator_states import check_torch
from spfde.core.say import counted
from spfde.core.state import check_entries
from spfde.session.freezing import Freezing
from spfde.session.part import Part, Setting
from spfde.session.sampling import ANEW, Sampling
from spfde.sieving.loader import loader_generators

STATE_FORMAT = 7

_KINDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "recipe": dict,
    "run": dict,
    "seed": int,
    "clock": dict,
    "optimizer_steps": list,
    "place": dict,
    "generator": Tensor,
    "loader_generators": list,
    "timeline": dict,
    "parts": dict,
}


_PLACE: dict[str, type] = {
    "taken": int,
    "ranks": int,
    "dealt": bool,
    "started_with": list,
    "asks_for_more": bool,
}


#: What is called otherwise in the state than by users.
_NAMES = {
    "interval": "update_interval_epochs",
    "samples": "the number of samples",
    "batch_size": "the loader's batch_size",
    "blocks": "the list of blocks",
    "loader_generators": "the number of generators that the loader and its sampler have",
}


def save_state(setting: Setting, parts: Sequence[Part], sampling: Sampling) -> dict[str, Any]:
    """Everything that a session remembers, as tensors and primitives."""
    clock = sampling.clock_state()
    return {
        "format": STATE_FORMAT,
        "recipe": setting.recipe.to_dict(),
        "run": _run(setting, sampling),
        "seed": setting.seed,
        "clock": clock,
        "optimizer_steps": list(setting.leading.counts),
        "place": sampling.place(clock["phase"]),
        "generator": setting.generator.get_state(),
        "loader_generators": sampling.generator_states(),
        "timeline": setting.timeline.state_dict(),
        "parts": {part.name: part.state_dict() for part in parts},
    }


def load_state(setting: Setting, parts: Sequence[Part], sampling: Sampling, state: Mapping[str, Any]) -> None:
    """Go on from what ``save_state`` gave; all of it is checked before anything changes.

    Raises:
        StateMismatch: with what differs.
    """
    _check_agreement(state, recipe=setting.recipe.to_dict(), run=_run(setting, sampling))
    check_entries(state["parts"], "the session's parts", {part.name: dict for part in parts})
    generators = [setting.generator, *loader_generators(sampling.loader)]
    saved = [state["generator"], *state["loader_generators"]]
    _check_generators(saved, len(generators))
    for part in parts:
        part.check_state(state["parts"][part.name])
    Clock().load_state_dict(state["clock"])
    setting.leading.check(state["optimizer_steps"])
    _check_place(state["place"], len(loader_generators(sampling.loader)))
    setting.timeline.load_state_dict(state["timeline"])
    # What is frozen has no gradient: it is frozen before the masks look for those that learn.
    for part in sorted(parts, key=lambda part: not isinstance(part, Freezing)):
        part.load_state_dict(state["parts"][part.name])
    setting.clock.load_state_dict(state["clock"])
    setting.leading.counts = list(state["optimizer_steps"])
    ranks, world = state["place"]["ranks"], setting.world
    if ranks != world.size:
        # What they had drawn together: the bill adds it up over the ranks that there are now.
        setting.clock.samples_drawn *= 0 if world.rank else ranks
    for generator, own in zip(generators, saved, strict=True):
        generator.set_state(own.cpu())
    setting.seed = state["seed"]
    sampling.loader.had_workers = setting.clock.epoch > 0 or setting.clock.is_resumed_at_end
    sampling.loader.asks_for_more = state["place"]["asks_for_more"]
    if setting.clock.phase == "running":
        sampling.go_on(state["place"])


def _run(setting: Setting, sampling: Sampling) -> dict[str, Any]:
    """What a state must agree on with the session that it is loaded into."""
    return {
        "epochs": setting.blueprint.epochs,
        "interval": setting.blueprint.interval,
        "samples": len(sampling.population),
        "batch_size": sampling.batch_size,
        "parameters": {name: list(p.shape) for name, p in setting.model.named_parameters()},
        "blocks": [block.name for block in setting.blueprint.partition.blocks],
        "loader_generators": len(loader_generators(sampling.loader)),
    }


def _check_agreement(state: Mapping[str, Any], *, recipe: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse a state of another format, recipe, model, loader or run length."""
    found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
    if found != STATE_FORMAT:
        raise StateMismatch(
            f"the session's state has format {found!r}, and this version of spfde reads {STATE_FORMAT}. "
            "Load it with the version that wrote it."
        )
    check_entries(state, "the session", _KINDS)
    for what, theirs, mine in (("recipe", state["recipe"], recipe), ("run", state["run"], run)):
        if _differ(theirs, mine):
            was, now = _first_difference(theirs, mine)
            raise StateMismatch(
                f"the state is of another {what}: there {was}, here {now}. "
                "Go on with the model, loader, recipe and number of epochs of the saved run."
            )


def _check_generators(saved: Sequence[Any], count: int) -> None:
    """Refuse states of generators that cannot be loaded."""
    if len(saved) != count:
        raise StateMismatch(
            f"the state has {counted(len(saved), 'generator')}, and this session {count}. It is damaged."
        )
    for own in saved:
        check_torch(own, "a generator")


def _check_place(place: Mapping[str, Any], n_generators: int) -> None:
    """Refuse what cannot be the place of an epoch that goes on."""
    check_entries(place, "the place in the epoch", _PLACE)
    if place["started_with"]:
        _check_generators(place["started_with"], n_generators + 1)
    if place["taken"] < ANEW or place["ranks"] < 1:
        raise StateMismatch(
            f"the state's place in the epoch is damaged: {place['ranks']} processes had taken {place['taken']} batches."
        )


def _differ(theirs: Any, mine: Any) -> bool:
    try:
        return bool(theirs != mine)
    except RuntimeError:  # a tensor of several elements, where a primitive belongs
        return True


def _first_difference(theirs: Any, mine: Any, path: str = "") -> tuple[str, str]:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        for name in dict.fromkeys([*theirs, *mine]):
            if _differ(theirs.get(name), mine.get(name)):
                return _first_difference(theirs.get(name), mine.get(name), f"{path}.{name}" if path else str(name))
    name = _NAMES.get(path, path)
    return f"{name} is {_told(theirs)}", f"{name} is {_told(mine)}"


def _told(value: Any) -> str:
    """A value in a line; of a technique its method, for the other side may have none."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return str(value.get("method", "on"))
    return shortened(value)

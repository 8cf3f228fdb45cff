"""Which engine computes: the one that was asked for, or the one that is expected to be the fastest here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import spfde.engines.builtin  # noqa: F401  # registers them
from spfde.core.errors import InvalidArgument, Problem, nearest
from spfde.core.registry import registered
from spfde.core.sharding import is_sharded
from spfde.engines.base import Engine, Job

AUTO, FALLBACK = "auto", "masked"
# How much faster than masked the whole model must come out for "auto" to leave PyTorch's well-trodden way.
WORTH_IT = 0.9
_SHARDED = "the model is sharded (FSDP), and PyTorch alone computes such"


@dataclass(frozen=True)
class Choice:
    """An engine, why it was taken, in a few words, and what was asked for."""

    name: str
    reason: str
    asked: str = FALLBACK


def engine_names() -> tuple[str, ...]:
    """What ``attach(engine=...)`` takes: "auto", and the name of each registered engine."""
    return (AUTO, *registered("engine"))


def check_engine(engine: str) -> None:
    """Raise ``InvalidArgument`` for anything that is no engine's name."""
    if engine not in engine_names():
        raise InvalidArgument(Problem("engine", engine, "is no engine", nearest(str(engine), engine_names())))


def make_engine(name: str) -> Engine:
    """A new engine of that name, attached to nothing yet."""
    made: Engine = registered("engine")[name]()
    return made


def choose_engine(asked: str, job: Job, *, is_neutral: bool, tell: Callable[[str], None] | None = None) -> Choice:
    """The engine that computes the job's model. The same model and machine give the same choice.

    Args:
        asked: "auto" or an engine's name.
        job: what is to be computed.
        is_neutral: the recipe changes nothing; then the model is left to PyTorch, unless another engine was asked for.
        tell: called with one line before something that takes a while, such as compiling.

    Raises:
        InvalidArgument: an unknown engine, or one that was asked for and cannot work, with the reason; or a cache that
            the engine cannot keep.
    """
    check_engine(asked)
    choice = _choose(asked, job, is_neutral, tell)
    reason = None if job.cache is None else registered("engine")[choice.name].supports_cache(job)
    if reason is not None:
        rule = f"cannot be kept by the {choice.name} engine ({choice.reason}): {reason}"
        raise InvalidArgument(Problem("cache", job.cache, rule, "Leave it out, or see docs/methods/freezing.md."))
    return choice


def _choose(asked: str, job: Job, is_neutral: bool, tell: Callable[[str], None] | None) -> Choice:
    if asked == FALLBACK:
        return Choice(FALLBACK, "as asked", asked)
    if asked == AUTO and is_sharded(job.model):
        return Choice(FALLBACK, _SHARDED, asked)
    engines = [
        engine
        for name, engine in registered("engine").items()
        if (name == asked or (asked == AUTO and name != FALLBACK)) and (job.blueprint.target or not engine.needs_masks)
    ]
    if not engines or (is_neutral and asked == AUTO):
        return Choice(FALLBACK, "nothing is sparse", asked)
    if asked == AUTO and job.blueprint.untraced is not None:
        return Choice(FALLBACK, "the model cannot be traced", asked)
    if asked == AUTO:
        return _fastest(engines, job, tell)
    (engine,) = engines
    reason = _SHARDED if is_sharded(job.model) else engine.supports(job) or engine.prepare(job, tell)
    if reason is not None:
        rule = f"cannot work here: {reason}"
        raise InvalidArgument(Problem("engine", asked, rule, f'Use engine="{FALLBACK}" or "{AUTO}".'))
    return Choice(asked, "as asked", asked)


def _fastest(engines: list[type[Engine]], job: Job, tell: Callable[[str], None] | None) -> Choice:
    """The engine with the shortest step, if it is worth it; the fallback with the reasons against the others."""
    reasons, speeds = [], {}
    for engine in engines:
        reason = engine.supports(job)
        if reason is None:
            speeds[engine] = engine.expected_speed(job)
        else:
            reasons.append(f"the {engine.name} engine cannot work here: {reason}")
    for engine, speed in sorted(speeds.items(), key=lambda item: item[1]):
        if speed > WORTH_IT:
            reasons.append(f"the {engine.name} engine would take about {speed:.2f}x of its time here")
            continue
        if job.cache is not None and (reason := engine.supports_cache(job)) is not None:
            reasons.append(f"the {engine.name} engine cannot keep the cache: {reason}")
            continue
        reason = engine.prepare(job, tell)
        if reason is None:
            return Choice(engine.name, engine.expectation(job), AUTO)
        reasons.append(f"the {engine.name} engine cannot work here: {reason}")
    return Choice(FALLBACK, "; ".join(reasons), AUTO)

"""Which engine computes: dense arithmetic under a mask, or kernels that compute with the active weights alone."""

from __future__ import annotations

from spfde.errors import InvalidArgument, Problem, nearest

ENGINES = ("auto", "masked", "native")


def choose_engine(engine: str) -> str:
    """The engine that ``auto`` stands for, or ``engine`` itself.

    Raises:
        InvalidArgument: an unknown engine, or one that cannot work here.
    """
    if engine not in ENGINES:
        raise InvalidArgument(Problem("engine", engine, "is no engine", nearest(str(engine), ENGINES)))
    if engine == "native":
        raise InvalidArgument(
            Problem("engine", engine, "has no kernels in this version of spfde", 'Use engine="masked" or "auto".')
        )
    return "masked"

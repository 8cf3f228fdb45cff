"""What every part asks of a saved state: is each entry there, and of its kind?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spfde.core.errors import StateMismatch

Kind = type | tuple[type, ...]


def check_entries(state: Any, what: str, kinds: Mapping[str, Kind]) -> None:
    """Raise ``StateMismatch`` unless ``state`` is a mapping that has exactly these entries, each of its kind.

    The message names ``what``. ``int`` and ``float`` take no booleans.
    """
    if not isinstance(state, Mapping):
        raise StateMismatch(f"the state of {what} is a {type(state).__name__} and no mapping. Use another checkpoint.")
    missing, foreign = sorted(set(kinds) - set(state)), sorted(map(str, set(state) - set(kinds)))
    if missing or foreign:
        found = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(foreign)}, which is not known"
        raise StateMismatch(f"the state of {what} {found}. It is damaged, or of another version.")
    for name, kind in kinds.items():
        value, allowed = state[name], kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            wanted = " or ".join(each.__name__ for each in allowed)
            raise StateMismatch(
                f"{name} in the state of {what} is a {type(value).__name__}, not {wanted}. It is damaged."
            )


def read_saved(path: Path) -> Any:
    """What ``torch.save`` has put into a file, on the CPU: tensors and primitives, and nothing that could run code.

    Raises:
        StateMismatch: it holds something else, is damaged, or cannot be read.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's reader raises whatever it likes on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StateMismatch(f"{path} cannot be read ({reason}). Use another checkpoint.") from error


def check_all(values: Any, what: str, kind: Kind) -> None:
    """Raise ``StateMismatch`` unless ``values`` is a mapping from names to values of that kind."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise StateMismatch(f"{what} is no mapping from names. The state is damaged.")
    check_entries(values, what, dict.fromkeys(values, kind))

"""Input of all sorts, drawn from a seed: valid ones with something changed, which gets deeper than noise does."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

Rng = random.Random

_NAMES = (
    "sparsity",
    "method",
    "mest",
    "set",
    "freezing",
    "epoch",
    "",
    " ",
    "ä",
    "\udcff",
    "a" * 5000,
    "../../etc/passwd",
)


def deep(depth: int) -> Any:
    """A list in a list in a list …"""
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


_ODD: tuple[Callable[[Rng], Any], ...] = (
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, 1, -1, 2, 3, 7, 2**31, -(2**63), 2**64, 10**400, -(10**400)]),
    lambda r: r.choice([0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf]),
    lambda r: r.uniform(-2, 2),
    lambda r: r.randint(-5, 200),
    lambda r: r.choice(_NAMES),
    lambda r: "".join(chr(r.randrange(1, 0x3000)) for _ in range(r.randrange(8))),
    lambda r: [],
    lambda r: {},
    lambda r: [odd(r) for _ in range(r.randrange(3))],
    lambda r: {r.choice(_NAMES): odd(r) for _ in range(r.randrange(3))},
    lambda r: deep(r.choice([2, 30, 400])),
)
_ODD_OBJECTS: tuple[Callable[[Rng], Any], ...] = (
    lambda r: (),
    lambda r: b"bytes",
    lambda r: {1: 2},
    lambda r: torch.tensor(r.choice([0.0, math.nan, -1.0])),
    lambda r: torch.zeros(
        r.choice([(0,), (1,), (3, 2), (5056,)]), dtype=r.choice([torch.uint8, torch.float32, torch.bool])
    ),
)


def odd(rng: Rng) -> Any:
    """A value that JSON or TOML could hold."""
    return rng.choice(_ODD)(rng)


def odd_object(rng: Rng) -> Any:
    """A value that a state could hold."""
    return rng.choice(_ODD + _ODD_OBJECTS)(rng)


def changed(value: Any, rng: Rng, odd: Callable[[Rng], Any] = odd) -> Any:
    """A copy with something changed at a random place: a value, a key, an entry more or less, a tensor's element."""
    containers = [place for place in _places(value) if isinstance(place, (dict, list, tuple)) and len(place)]
    if not containers or rng.random() < 0.02:
        return odd(rng)
    value = copy.deepcopy(value)
    at = rng.choice([place for place in _places(value) if isinstance(place, (dict, list)) and len(place)] or [value])
    if isinstance(at, tuple):
        return odd(rng)
    key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
    kind = rng.random()
    if kind < 0.1:
        del at[key]
    elif kind < 0.2 and isinstance(at, dict):
        at[rng.choice(_NAMES)] = odd(rng)
    elif kind < 0.3 and isinstance(at, list):
        at.insert(key, odd(rng))
    elif kind < 0.4 and isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
        with contextlib.suppress(OverflowError):
            at[key] += rng.choice([1, -1, 0.5, 1e9, -1e9])
    elif isinstance(at[key], torch.Tensor) and kind < 0.8:
        at[key] = _changed_tensor(at[key], rng)
    else:
        at[key] = odd(rng)
    return value


def changed_bytes(content: bytes, rng: Rng) -> bytes:
    """Some bytes flipped, cut off, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        else:
            del data[at : at + rng.randrange(1, 9)]
    return bytes(data)


def _changed_tensor(tensor: torch.Tensor, rng: Rng) -> torch.Tensor:
    kind = rng.randrange(5)
    if kind == 0:
        return tensor.to(rng.choice([torch.float64, torch.int32, torch.bool, torch.uint8, torch.bfloat16]))
    if kind == 1:
        return tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)]
    if kind == 2:
        return tensor.unsqueeze(0)
    tensor = tensor.clone()
    if tensor.numel():
        flat = tensor.reshape(-1)
        flat[rng.randrange(len(flat))] = (
            rng.choice([0, 1, math.nan, 255, -7]) if tensor.is_floating_point() else rng.choice([0, 1, 100])
        )
        return flat.reshape(tensor.shape)
    return tensor


def _places(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        at = waiting.pop()
        yield at
        if isinstance(at, Mapping):
            waiting += at.values()
        elif isinstance(at, (list, tuple)):
            waiting += at


def drawn(rng: Rng) -> np.random.Generator:
    """NumPy's generator from the same seed."""
    return np.random.default_rng(rng.randrange(2**32))

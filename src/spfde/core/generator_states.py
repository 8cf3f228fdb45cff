"""Saved states of random generators, looked at before one is taken: a generator takes some that it then draws
nonsense from, and NumPy's reads behind its memory."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spfde.core.errors import StateMismatch

_WORDS = 624
"""Words of 32 bits in the state of a Mersenne Twister, which all three generators are."""


def check_torch(state: Any, what: str) -> None:
    """Raise ``StateMismatch`` for what is no state of a ``torch.Generator`` on the CPU.

    Args:
        state: uint8, one dimension, from ``get_state``.
        what: what to call it in the message.

    Example:
        >>> from spfde.core.generator_states import check_torch
        >>> check_torch(torch.Generator().get_state(), "the order")
    """
    with _damaged(what):
        if not isinstance(state, Tensor):
            raise TypeError(f"it is a {type(state).__name__} and no tensor")
        trial = torch.Generator()
        trial.set_state(state.cpu())
        _check_words(torch.randint(2**31, (2 * _WORDS,), generator=trial).tolist())
        for dtype in (torch.float32, torch.float64):
            _check_normal(float(torch.randn((), generator=trial, dtype=dtype)))


def check_python(state: Any, what: str) -> None:
    """Raise ``StateMismatch`` for what is no state of ``random.Random``, as ``getstate`` gives it.

    Example:
        >>> import random
        >>> from spfde.core.generator_states import check_python
        >>> check_python(random.getstate(), "Python's generator")
    """
    with _damaged(what):
        trial = random.Random()
        trial.setstate(state)
        _check_words(trial.choices(range(2**31), k=2 * _WORDS))
        _check_normal(trial.gauss(0.0, 1.0))


def check_numpy(state: Any, what: str) -> None:
    """Raise ``StateMismatch`` for what is no state of ``numpy.random.RandomState``, its words as a list.

    Example:
        >>> import numpy
        >>> from spfde.core.generator_states import check_numpy
        >>> name, words, *rest = numpy.random.get_state()
        >>> check_numpy((name, words.tolist(), *rest), "NumPy's generator")
    """
    with _damaged(what):
        name, words, position, has_normal, normal = state
        if name != "MT19937" or len(words) != _WORDS:
            raise ValueError(f"it is of {str(name)[:20]} and has {len(words)} words")
        if not 0 <= position <= _WORDS or has_normal not in (0, 1):
            raise ValueError("its place is impossible")
        trial = np.random.RandomState()
        trial.set_state((name, np.array(words, dtype=np.uint32), position, has_normal, normal))
        _check_words(trial.randint(2**31, size=2 * _WORDS).tolist())
        _check_normal(normal)


def _check_words(drawn: list[int]) -> None:
    if not any(drawn):
        raise ValueError("it draws zeros alone")


def _check_normal(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError("it keeps a draw that is no number")


@contextmanager
def _damaged(what: str) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StateMismatch(f"the saved state of {what} is damaged ({reason}). Use another checkpoint.") from error

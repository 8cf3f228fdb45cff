"""Each place of a computed tensor is known to come from the element of the parameter that is really there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spfde.core.torch_private import storage_id
from spfde.model.zeros import Zeros


class Numbered:
    """A weight whose elements are their own numbers, and what becomes of it."""

    def __init__(self, *shape: int) -> None:
        self.weight = torch.arange(torch.Size(shape).numel()).view(shape)
        self.zeros = Zeros({storage_id(self.weight): "weight"})
        self.kept: list[Tensor] = []  # alive, as storages are told by where they are

    def noted(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Run an operation of ATen, and note it."""
        out: Tensor = getattr(torch.ops.aten, name)(*args, **kwargs)
        self.zeros.note(f"aten.{name}", args, kwargs, [out])
        self.kept.append(out)
        return out

    def sources(self, tensor: Tensor) -> list[int]:
        """Which element of the weight each element of a tensor comes from; -1 for none."""
        positions = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
        of_tensor = torch.as_strided(positions, tensor.shape, tensor.stride(), tensor.storage_offset())
        return self.zeros.of(tensor)["weight"](np.asarray(of_tensor.flatten())).tolist()


MOVES = {
    "flip": lambda own, t, n: own.noted("flip", t, [n % t.dim()]),
    "flip all": lambda own, t, _: own.noted("flip", t, list(range(t.dim()))),
    "roll": lambda own, t, n: own.noted("roll", t, [n, -1], [-1, n % t.dim()]),
    "roll flat": lambda own, t, n: own.noted("roll", t, [n]),
    "repeat": lambda own, t, _: own.noted("repeat", t, [2] * (t.numel() < 200) + [1] * (t.dim() - 1) + [2]),
    "cat": lambda own, t, n: own.noted("cat", [t.narrow(n % t.dim(), 0, 1), own.noted("neg", t)], n % t.dim()),
    "stack": lambda own, t, n: own.noted("stack", list(t.unbind(0)), n % t.dim()),
    "clone": lambda own, t, _: own.noted("clone", t, memory_format=torch.contiguous_format),
    "reshape": lambda own, t, _: own.noted("clone", t, memory_format=torch.contiguous_format).view(-1, t.shape[-1]),
    "mul": lambda own, t, _: own.noted("mul", torch.ones(2, *[1] * t.dim(), dtype=torch.long), t),
    "transpose": lambda own, t, _: t.transpose(0, -1),
    "slice": lambda own, t, n: t[n % 2 :] if len(t) > 2 else t,
    "strided": lambda own, t, _: t[..., ::2],
    "row": lambda own, t, n: t[n % len(t)] if t.dim() > 2 else t,
}


@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 5)), max_size=6))
def test_an_element_is_followed_through_all_that_moves_it(moves: list[tuple[str, int]]) -> None:
    own = Numbered(3, 4, 5)
    tensor = own.weight
    for kind, number in moves:
        tensor = MOVES[kind](own, tensor, number)
    assert own.sources(tensor) == tensor.abs().flatten().tolist()


def test_what_comes_from_elsewhere_comes_from_no_element() -> None:
    own = Numbered(4)
    joined = own.noted("cat", [torch.zeros(2, dtype=torch.long), own.weight])
    assert own.sources(joined) == [-1, -1, 0, 1, 2, 3]


def test_a_sum_keeps_zeros_where_both_terms_have_them_at_the_same_places() -> None:
    own = Numbered(4, 4)
    doubled, turned = own.noted("mul", own.weight, 2), own.noted("clone", own.weight.mT)
    assert own.sources(own.noted("add", own.weight, doubled)) == list(range(16))
    assert own.sources(own.noted("sub", own.weight, turned.mT)) == list(range(16))
    for other in (turned, own.weight.mT, own.weight[0], torch.ones(4, 4, dtype=torch.long), 1):
        assert "weight" not in own.zeros.of(own.noted("add", own.weight, other))


def test_what_is_written_to_in_place_is_followed_too() -> None:
    own = Numbered(4, 4)
    copy = own.noted("clone", own.weight)
    own.noted("add_", copy, own.weight)
    assert own.sources(copy) == list(range(16))
    own.noted("copy_", copy, own.weight.mT)
    assert own.sources(copy) == own.weight.mT.flatten().tolist()
    own.noted("add_", copy, own.weight)
    assert "weight" not in own.zeros.of(copy)


@pytest.mark.parametrize("is_moved", [False, True])
def test_of_a_large_weight_enough_elements_are_compared(is_moved: bool) -> None:
    own = Numbered(400, 400)
    other = own.noted("roll", own.weight, [1]) if is_moved else own.noted("clone", own.weight.mT).mT
    assert ("weight" in own.zeros.of(own.noted("add", own.weight, other))) != is_moved

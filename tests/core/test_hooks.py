"""Hooks that keep nothing alive, and can be told from others'."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

from spfde.core.hooks import is_ours, weakly


class Owner:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def note(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def test_a_hook_passes_on_what_it_was_made_with_and_then_what_it_is_called_with() -> None:
    owner = Owner()
    weakly(owner.note, "name")(1, 2)
    weakly(owner.note)(3)
    assert owner.calls == [("name", 1, 2), (3,)]


def test_a_hook_keeps_its_object_no_longer_than_others_do_and_then_does_nothing() -> None:
    owner = Owner()
    parameter = nn.Parameter(torch.ones(1))
    parameter.register_post_accumulate_grad_hook(weakly(owner.note))
    reference = weakref.ref(owner)
    del owner
    gc.collect()
    assert reference() is None
    parameter.sum().backward()


def test_our_hooks_are_told_from_those_of_others_also_behind_the_compilers_wrapper() -> None:
    hook = weakly(Owner().note)
    assert is_ours(hook)
    assert is_ours(torch.compiler.disable(hook))
    assert not is_ours(Owner().note)
    assert not is_ours(lambda _: None)

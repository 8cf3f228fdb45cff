"""The examples in the docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import os

import numpy as np
import pytest
import torch

from helpers.blocks import needs_triton

# The examples have their tensors on the CPU, where the kernels run in the interpreter alone.
interprets = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are not interpreted")


@pytest.mark.parametrize(
    "name",
    ["lists", *(pytest.param(name, marks=[needs_triton, interprets]) for name in ("product", "linear", "check"))],
)
def test_the_examples_do_what_they_say(name: str) -> None:
    module = importlib.import_module(f"spfde.engines.blocks.{name}")
    done = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert done.attempted
    assert not done.failed

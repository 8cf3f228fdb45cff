"""Importing the room imports no trainer, and a trainer that is missing is named with what to install."""

from __future__ import annotations

import importlib
import sys

import pytest

import spfde
from helpers.processes import start


def test_the_room_imports_none_of_the_trainers() -> None:
    code = "import sys, spfde.integrations; print({'lightning', 'transformers', 'accelerate'} & set(sys.modules))"
    assert start("-c", code).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "extra"), [("lightning", "lightning"), ("transformers", "transformers"), ("accelerate", "transformers")]
)
def test_a_missing_package_is_named_with_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (name, "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"spfde.integrations.{name}", raising=False)
    with pytest.raises(spfde.InvalidArgument, match=rf"spfde\[{extra}\]"):
        importlib.import_module(f"spfde.integrations.{name}")

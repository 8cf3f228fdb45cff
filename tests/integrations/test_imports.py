"""Importing the room imports no trainer, and a trainer that is missing is named with what to install."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import spfde
import spfde.integrations
from helpers.processes import start


@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers"])
def test_an_integration_takes_of_a_session_what_anybody_can(name: str) -> None:
    """They are the example for other trainers, so they read nothing private of a session or of its loader."""
    source = Path(*spfde.integrations.__path__, f"{name}.py").read_text()
    read = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    taken = {
        node.attr for node in read if ast.unparse(node.value).endswith(("session", "session.loader", "_running()"))
    }
    assert taken
    assert not [attribute for attribute in taken if attribute.startswith("_")]


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

"""Every public function and class shows an example, and the examples do what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import spfde
from spfde.core import registry
from spfde.engines.native import build

ROOMS = ("errors", "presets", "sparsity", "freezing", "sieving", "cost", "analysis", "export")


def public() -> dict[str, Callable[..., object]]:
    """Public functions and classes once each, by the first name that offers them."""
    found: dict[str, Callable[..., object]] = {}
    for module in (spfde, *(importlib.import_module(f"spfde.{room}") for room in ROOMS)):
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isroutine(value)) and value not in found.values():
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = public()


def docstrings(name: str) -> Iterator[tuple[str, str]]:
    """The docstring of a public name, and of a class's public methods and properties."""
    value = PUBLIC[name]
    yield name, inspect.cleandoc(value.__doc__ or "")
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if not attribute.startswith("_") and isinstance(getattr(member, "__doc__", None), str):
            yield f"{name}.{attribute}", inspect.cleandoc(member.__doc__)


def has_example(name: str) -> bool:
    _, text = next(docstrings(name))
    return re.search(r"^Examples?:\n(?:\n|    .*\n)*?    >>> ", text, re.MULTILINE) is not None


def test_every_public_function_and_class_shows_an_example() -> None:
    assert not {name for name in PUBLIC if not has_example(name)}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_do_what_they_say(
    name: str, new_names: Callable[[], dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "spfde.analysis.native_outputs" and build.available() is not None:
        pytest.skip(f"no kernels: {build.available()}")
    monkeypatch.chdir(tmp_path)
    # What an example registers is forgotten with it.
    monkeypatch.setattr(registry, "_CLASSES", {kind: dict(classes) for kind, classes in registry._CLASSES.items()})
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    for owner, text in docstrings(name):
        runner.run(doctest.DocTestParser().get_doctest(text, new_names(), owner, None, 0), out=told.append)
    assert not told, "".join(told)

"""Modules of others that register methods, criteria, structures or engines: named by a person, or installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points

from spfde.core.errors import InvalidArgument, Problem, SpfdeError

GROUP = "spfde.plugins"
"""Entry points under which a package names its module."""


def load_plugins(named: Sequence[str]) -> tuple[str, ...]:
    """Import the modules that are named, here or under the entry points, and name all of them.

    Raises:
        InvalidArgument: one cannot be imported.
    """
    modules = tuple(dict.fromkeys((*(entry.module for entry in entry_points(group=GROUP)), *named)))
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # ``spfde`` does not look there by itself, as ``python -m spfde`` does
    for name in modules:
        try:
            import_module(name)
        except SpfdeError:
            raise
        except Exception as error:
            rule = f"cannot be imported ({type(error).__name__}: {error})"
            remedy = "Name a module that Python finds, in this folder or installed."
            raise InvalidArgument(Problem("plugin", name, rule, remedy)) from error
    return modules

"""What is registered of this room, by name; views that follow."""

from collections.abc import Mapping
from typing import cast

from spfde.core.registry import registered
from spfde.sparsity.methods import SparsityMethod
from spfde.sparsity.structure import Structure

METHODS = cast("Mapping[str, type[SparsityMethod]]", registered("method"))
"""Sparse training methods by name."""
STRUCTURES = cast("Mapping[str, type[Structure]]", registered("structure"))
"""Structures by name."""

# ruff: noqa: I001
"""Sparse training methods, one file each; importing this room registers them."""

from collections.abc import Mapping
from typing import cast

from spfde.core.registry import registered

# In the order in which they are listed.
from spfde.sparsity.methods.base import SparsityMethod
from spfde.sparsity.methods.drop_grow import DropGrow
from spfde.sparsity.methods.static import StaticSparse
from spfde.sparsity.methods.set import SET
from spfde.sparsity.methods.rigl import RigL
from spfde.sparsity.methods.mest import MEST
from spfde.sparsity.methods.itop import SETITOP, RigLITOP
from spfde.sparsity.methods.dsr import DSR
from spfde.sparsity.methods.snfs import SNFS
from spfde.sparsity.methods.deepr import DeepR
from spfde.sparsity.methods.topkast import TopKAST
from spfde.sparsity.methods.pruning import SNIP, GraSP, PruningAtInitialisation, SynFlow
from spfde.sparsity.methods.gmp import GMP
from spfde.sparsity.methods.str import STR

METHODS = cast("Mapping[str, type[SparsityMethod]]", registered("method"))
"""Sparse training methods by name."""

__all__ = [
    "DSR",
    "GMP",
    "MEST",
    "METHODS",
    "SET",
    "SETITOP",
    "SNFS",
    "SNIP",
    "STR",
    "DeepR",
    "DropGrow",
    "GraSP",
    "PruningAtInitialisation",
    "RigL",
    "RigLITOP",
    "SparsityMethod",
    "StaticSparse",
    "SynFlow",
    "TopKAST",
]

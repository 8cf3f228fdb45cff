"""Sparse training methods, one file each, and the list of them all."""

from __future__ import annotations

from spfde.sparsity.methods.base import (
    SparsityMethod,
    mutates_after,
    planned_active,
    planned_density,
    planned_keep,
)
from spfde.sparsity.methods.deepr import DeepR
from spfde.sparsity.methods.dsr import DSR
from spfde.sparsity.methods.gmp import GMP
from spfde.sparsity.methods.itop import SETITOP, RigLITOP
from spfde.sparsity.methods.mest import MEST
from spfde.sparsity.methods.pruning import SNIP, GraSP, PruningAtInitialisation, SynFlow
from spfde.sparsity.methods.rigl import RigL
from spfde.sparsity.methods.set import SET
from spfde.sparsity.methods.snfs import SNFS
from spfde.sparsity.methods.static import StaticSparse
from spfde.sparsity.methods.str import STR
from spfde.sparsity.methods.topkast import TopKAST

METHODS: dict[str, type[SparsityMethod]] = {
    method.name: method
    for method in (
        StaticSparse,
        SET,
        RigL,
        MEST,
        SETITOP,
        RigLITOP,
        DSR,
        SNFS,
        DeepR,
        TopKAST,
        SNIP,
        GraSP,
        SynFlow,
        GMP,
        STR,
    )
}

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
    "GraSP",
    "PruningAtInitialisation",
    "RigL",
    "RigLITOP",
    "SparsityMethod",
    "StaticSparse",
    "SynFlow",
    "TopKAST",
    "mutates_after",
    "planned_active",
    "planned_density",
    "planned_keep",
]

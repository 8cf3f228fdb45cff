"""Sparse training methods, one file each, and the list of them all."""

from __future__ import annotations

from spfde.sparsity.methods.base import SparsityMethod, planned_active, planned_keep
from spfde.sparsity.methods.evolution import SET
from spfde.sparsity.methods.mest import MEST
from spfde.sparsity.methods.rigl import RigL
from spfde.sparsity.methods.static import StaticSparse

METHODS: dict[str, type[SparsityMethod]] = {method.name: method for method in (StaticSparse, SET, RigL, MEST)}

__all__ = ["MEST", "METHODS", "SET", "RigL", "SparsityMethod", "StaticSparse", "planned_active", "planned_keep"]

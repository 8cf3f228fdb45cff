"""WHICH weights exist: distributions, masks, mutation, methods, and the masker that applies them to a model."""

from spfde.sparsity.distribution import active_count, erk, uniform
from spfde.sparsity.layers import select_layers
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import infer_mask, magnitude_mask, pack, random_mask, unpack
from spfde.sparsity.methods import (
    MEST,
    METHODS,
    SET,
    RigL,
    SparsityMethod,
    StaticSparse,
    planned_active,
)

__all__ = [
    "MEST",
    "METHODS",
    "SET",
    "Masker",
    "RigL",
    "SparsityMethod",
    "StaticSparse",
    "active_count",
    "erk",
    "infer_mask",
    "magnitude_mask",
    "pack",
    "planned_active",
    "random_mask",
    "select_layers",
    "uniform",
    "unpack",
]

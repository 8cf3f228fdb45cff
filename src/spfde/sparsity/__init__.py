"""WHICH weights exist: distributions, structures, masks, mutation, methods, and the masker that applies them."""

from spfde.sparsity.criteria import Criterion, Gradient, Magnitude, MagnitudePlusGradient, Random
from spfde.sparsity.distribution import active_count, erk
from spfde.sparsity.layers import select_layers
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import infer_mask, largest_half, pack, unpack
from spfde.sparsity.methods import (
    DSR,
    GMP,
    MEST,
    METHODS,
    SET,
    SETITOP,
    SNFS,
    SNIP,
    STR,
    DeepR,
    DropGrow,
    GraSP,
    PruningAtInitialisation,
    RigL,
    RigLITOP,
    SparsityMethod,
    StaticSparse,
    SynFlow,
    TopKAST,
)
from spfde.sparsity.saliency import ScoreLoss
from spfde.sparsity.schedule import LayerPlan, MaskPlan
from spfde.sparsity.strategy import Strategy
from spfde.sparsity.structure import (
    NM,
    STRUCTURES,
    Block,
    Channels,
    Kernels,
    Patterns,
    Structure,
    Unstructured,
)

__all__ = [
    "DSR",
    "GMP",
    "MEST",
    "METHODS",
    "NM",
    "SET",
    "SETITOP",
    "SNFS",
    "SNIP",
    "STR",
    "STRUCTURES",
    "Block",
    "Channels",
    "Criterion",
    "DeepR",
    "DropGrow",
    "GraSP",
    "Gradient",
    "Kernels",
    "LayerPlan",
    "Magnitude",
    "MagnitudePlusGradient",
    "MaskPlan",
    "Masker",
    "Patterns",
    "PruningAtInitialisation",
    "Random",
    "RigL",
    "RigLITOP",
    "ScoreLoss",
    "SparsityMethod",
    "StaticSparse",
    "Strategy",
    "Structure",
    "SynFlow",
    "TopKAST",
    "Unstructured",
    "active_count",
    "erk",
    "infer_mask",
    "largest_half",
    "pack",
    "select_layers",
    "unpack",
]

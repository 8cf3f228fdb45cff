"""How training went, from checkpoints: structural similarity, CKA and gradient norms, by layer and by block."""

from spfde.analysis.cka import (
    MinibatchCKA,
    batch_grams,
    centred_gram,
    linear_cka,
    minibatch_cka,
    unbiased_hsic,
)
from spfde.analysis.gradients import gradient_norms, successive_differences
from spfde.analysis.outputs import BlockOutputs, native_outputs, output_graph, output_modules
from spfde.analysis.structure import structural_overlap, structural_similarity

__all__ = [
    "BlockOutputs",
    "MinibatchCKA",
    "batch_grams",
    "centred_gram",
    "gradient_norms",
    "linear_cka",
    "minibatch_cka",
    "native_outputs",
    "output_graph",
    "output_modules",
    "structural_overlap",
    "structural_similarity",
    "successive_differences",
    "unbiased_hsic",
]

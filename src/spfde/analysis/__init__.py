"""How training went, from checkpoints: structural similarity, CKA and gradient norms, by layer and by block."""

from spfde.analysis.cka import batch_grams, linear_cka, minibatch_cka
from spfde.analysis.gradients import gradient_norms
from spfde.analysis.outputs import BlockOutputs, native_outputs, output_modules
from spfde.analysis.structure import structural_similarity

__all__ = [
    "BlockOutputs",
    "batch_grams",
    "gradient_norms",
    "linear_cka",
    "minibatch_cka",
    "native_outputs",
    "output_modules",
    "structural_similarity",
]

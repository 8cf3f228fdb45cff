"""What a trained model is kept as: dense, compressed, ONNX, or for sparse tensor cores.

Files need the extra ``export`` (``pip install 'spfde[export]'``), which is imported when they are written or read.
"""

from spfde.export.encoding import weight_bytes
from spfde.export.files import save_compressed, save_dense
from spfde.export.inference import load
from spfde.export.onnx import save_onnx
from spfde.export.semi_structured import to_semi_structured

__all__ = [
    "load",
    "save_compressed",
    "save_dense",
    "save_onnx",
    "to_semi_structured",
    "weight_bytes",
]

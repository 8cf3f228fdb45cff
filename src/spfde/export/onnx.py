"""A model as an ONNX graph, by PyTorch's own exporter."""

from __future__ import annotations

import copy
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, Problem, UsageError
from spfde.core.files import written_whole
from spfde.export.files import weights_errors


def save_onnx(model: nn.Module, sample: Tensor, path: str | os.PathLike[str]) -> None:
    """Write the model in evaluation mode, on the CPU, for batches of any size; the model stays as it is.

    Zeros are stored like other numbers: ONNX runtimes compute with dense weights.

    Args:
        model: with one input and one output.
        sample: an input, [N, ...]; only its shape and type matter.
        path: the file; an existing one is replaced.

    Raises:
        InvalidArgument: PyTorch cannot export the model.
        UsageError: onnx or onnxscript is not installed.
        WeightsFileError: the file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> spfde.export.save_onnx(model, torch.zeros(1, 4), "model.onnx")
        >>> Path("model.onnx").stat().st_size > 0
        True
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"exporting to ONNX needs {' and '.join(missing)}. Install what is needed: pip install 'spfde[export]'."
        )
    # A copy computes in PyTorch, whatever engine a session gave the model.
    twin = copy.deepcopy(model).cpu().eval()
    # A batch of one would be taken for a constant.
    example = torch.zeros(max(2, len(sample)), *sample.shape[1:], dtype=sample.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Where nothing else works torch 2.6 traces the model: a branch on values would be the one that zeros take.
            warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            program = torch.onnx.export(
                twin,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        rule = f"PyTorch cannot export it to ONNX ({reason})"
        raise InvalidArgument(
            Problem("model", type(model).__name__, rule, "Export the weights instead, dense or compressed.")
        ) from error
    assert program is not None
    with weights_errors(Path(path)), written_whole(Path(path)) as (draft,):
        program.save(str(draft))

"""What a batch says of its samples: pure functions from outputs, labels and losses to one value a sample.

Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spfde.core.errors import InvalidArgument, Problem

# What probabilities of half precision may lack of 1.
_ROUNDING = 0.02
# What labels may differ by that were computed in single precision, whatever they are held in.
_FLOAT32_ROUNDING = 1e-6


def correct_from_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each sample is classified correctly, bool [N], on the device of ``logits``.

    Args:
        logits: shape (batch, classes); or (batch,) or (batch, 1) for two classes, positive meaning class 1.
        y: class indices, shape (batch,) (or (batch, 1) with two classes, which may be smoothed: ε/2 and 1 - ε/2); or
            class probabilities, shape (batch, classes), as label smoothing and mixup make them: the most probable class
            is the right one.

    Raises:
        InvalidArgument: the shapes are none of the above.
    """
    kind = labels_kind(logits, y)
    if kind == "binary":
        return (logits.reshape(-1) > 0) == (y.reshape(-1) > 0.5)
    return logits.argmax(1) == (y.argmax(1) if kind == "soft" else y)


def average_loss(loss: Tensor) -> Tensor:
    """One loss a sample, [N], detached: all dimensions but the first are averaged, such as a segmentation's pixels.

    Raises:
        InvalidArgument: ``loss`` is a scalar, or the batch is empty.
    """
    if loss.dim() == 0 or loss.numel() == 0:
        raise InvalidArgument(
            Problem(
                "loss",
                tuple(loss.shape),
                "must hold one loss per sample",
                'Compute it with reduction="none", and backpropagate loss.mean().',
            )
        )
    return loss.detach().flatten(1).mean(1) if loss.dim() > 1 else loss.detach()


def loss_from_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of each sample; shapes as in ``correct_from_logits``, float32 [N]."""
    kind, logits = labels_kind(logits, y), logits.float()
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(logits.reshape(-1), y.reshape(-1).float(), reduction="none")
    return F.cross_entropy(logits, y.float() if kind == "soft" else y, reduction="none")


def el2n_from_logits(logits: Tensor, y: Tensor) -> Tensor:
    """EL2N: the L2 norm of the error ``softmax(logits) - one_hot(y)`` of each sample (arXiv 2107.07075, section 2).

    Shapes as in ``correct_from_logits``, float32 [N], in [0, sqrt(2)]. One logit z stands for the two logits (0, z);
    class probabilities take the one-hot vector's place.
    """
    kind, logits = labels_kind(logits, y), logits.float()
    if kind == "binary":
        return math.sqrt(2.0) * (logits.reshape(-1).sigmoid() - y.reshape(-1).float()).abs()
    error = logits.softmax(1)
    if kind == "soft":
        error = error - y.float()
    else:
        # Not F.one_hot: it looks at the labels, and so waits for the device.
        error.scatter_add_(1, y.long()[:, None], -torch.ones_like(error[:, :1]))
    norm: Tensor = torch.linalg.vector_norm(error, dim=1)
    return norm


def labels_kind(logits: Tensor, y: Tensor) -> Literal["binary", "hard", "soft"]:
    """How outputs and labels belong together: one logit for two classes, class indices, or class probabilities.

    Raises:
        InvalidArgument: the shapes are none of these, or the outputs are predicted classes: one whole number a sample.
    """
    samples = logits.shape[0] if logits.dim() else 0
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        if not logits.is_floating_point() and logits.dtype != torch.bool:
            rule = "holds one whole number a sample: predicted classes, and no outputs of the model"
            remedy = "Pass the logits as the model gives them, or correct=predicted == y."
            raise InvalidArgument(Problem("logits", f"{logits.dtype} {tuple(logits.shape)}", rule, remedy))
        if y.numel() == samples and y.shape[:1] == logits.shape[:1]:
            return "binary"
    elif logits.dim() == 2:
        if y.shape == logits.shape:
            return "soft"
        if y.shape == (samples,) and not y.is_floating_point():
            return "hard"
    shapes = f"logits {tuple(logits.shape)}, y {tuple(y.shape)}"
    raise InvalidArgument(
        Problem(
            "logits, y",
            shapes,
            "must be (batch, classes) with (batch,) integer labels or (batch, classes) probabilities, or both (batch,)",
            "For other tasks pass correct= (one bool per sample) or loss= (one loss per sample).",
        )
    )


def label_bounds(logits: Tensor, y: Tensor) -> tuple[Tensor, int] | None:
    """What tells whether the labels of a batch are classes, or probabilities of classes, of the outputs.

    Returns:
        On the labels' device: the lowest and the highest class, shape (2,); of probabilities the lowest, and the lowest
        and highest sum over a sample's, shape (3,); of real labels of one output the lowest and the highest, and the
        least and the largest distance to the nearer of 0 and 1 in units of their rounding, shape (4,). Then the number
        of classes. None for an empty batch.

    Raises:
        InvalidArgument: the shapes are none of those in ``correct_from_logits``.
    """
    kind = labels_kind(logits, y)
    if not y.numel():
        return None
    n_classes = 2 if kind == "binary" else logits.shape[1]
    if kind == "soft":
        shares = y.detach().float()
        return torch.stack([shares.min(), *shares.sum(1).aminmax()]), n_classes
    if kind == "binary" and y.is_floating_point():
        labels = y.detach() if y.dtype == torch.float64 else y.detach().float()
        unit = max(torch.finfo(y.dtype).eps, _FLOAT32_ROUNDING)
        distances = torch.minimum(labels, 1 - labels) / unit
        return torch.stack([*labels.aminmax(), *distances.aminmax()]), n_classes
    low, high = (y.long() if y.dtype == torch.bool else y).detach().aminmax()
    return torch.stack([low, high]), n_classes


def check_label_bounds(bounds: Tensor, n_classes: int) -> None:
    """Raise ``InvalidArgument`` where a label is none, from ``label_bounds`` on the CPU, shape (..., 2) to (..., 4)."""
    if bounds.shape[-1] == 4:
        _check_one_output(bounds)
        bounds = bounds[..., :2]
    if bounds.shape[-1] == 3:
        low, least, most = bounds[..., 0].min().item(), bounds[..., 1].min().item(), bounds[..., 2].max().item()
        # The negation finds a NaN, too.
        if not (low >= -_ROUNDING and least >= 1 - _ROUNDING and most <= 1 + _ROUNDING):
            rule = (
                "of the outputs' shape is taken for class probabilities, which are not negative and sum to 1; here the "
                f"lowest is {low:g} and sums are from {least:g} to {most:g}"
            )
            remedy = "For several labels a sample, regression or scores pass loss= (one loss per sample) or correct=."
            raise InvalidArgument(Problem("y", least if low >= 0 else low, rule, remedy))
        return
    low, high = bounds.min().item(), bounds.max().item()
    if not (low >= 0 and high <= n_classes - 1):
        remedy = (
            "Number the classes from 0. For samples without a class (ignore_index) and for regression pass correct= or "
            "loss= instead."
        )
        raise InvalidArgument(Problem("y", low if low < 0 else high, f"must be in [0, {n_classes})", remedy))


def _check_one_output(bounds: Tensor) -> None:
    """Real labels of one output are two classes where all are as far from 0 or 1: targets of a regression are not."""
    low, high = bounds[..., 0].min().item(), bounds[..., 1].max().item()
    nearest, farthest = bounds[..., 2].min().item(), bounds[..., 3].max().item()
    # What lies outside, and NaN, is told like a class that there is not.
    if low >= 0 and high <= 1 and (farthest - nearest > 1 or low == 0.5 or high == 0.5):
        rule = (
            "of one output is taken for one of two classes, 0 and 1, or these smoothed (two values that sum to 1); "
            f"here labels are from {low:g} to {high:g} and no such two"
        )
        remedy = "For regression, scores and mixed labels pass loss= (one loss per sample) or correct=."
        raise InvalidArgument(Problem("y", low, rule, remedy))

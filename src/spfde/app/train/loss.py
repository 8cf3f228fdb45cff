"""The loss that is trained on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def loss_of(logits: Tensor, y: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of a batch.

    Args:
        logits: ``(N, C)``.
        y: classes ``(N,)``, int64; or probabilities of classes ``(N, C)``, as where images are mixed.
        weights: a factor for the loss of each sample, ``(N,)``; None: all count alike.
        label_smoothing: share of each label that goes to all classes alike, in [0, 1).

    Example:
        >>> from spfde.app.train.loss import loss_of
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> round(float(loss_of(logits, torch.tensor([1]), label_smoothing=0.1)), 4)
        0.6931
    """
    if weights is None:
        return F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return (weights * F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)).mean()


def classes_of(y: Tensor) -> Tensor:
    """The class of each sample, ``(N,)``; of probabilities ``(N, C)`` the most probable one."""
    return y.argmax(1) if y.dim() > 1 else y

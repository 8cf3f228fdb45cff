"""What training costs: FLOPs and memory, modelled and measured, in one ledger.

The convention, stated here once and used everywhere:

* One multiply-add is two FLOPs.
* Only matrix products and convolutions are counted (what ``torch.utils.flop_counter`` counts). Normalisation,
  activations, biases, pooling, the loss and the optimizer are not; modules left out are listed, never shown as zero.
* Training a layer costs three times its forward pass: forward, gradient of the input, gradient of the weight. The first
  layer is no exception, as in the literature, although autograd skips the gradient of the network's input: the figure
  exceeds what is executed by one forward pass of the first layer.
* A sparse layer costs its density times the dense figure, whatever kernel runs it: that is the *modelled* cost. Seconds
  and peak bytes are *measured*.
* A frozen layer costs its forward pass alone.
* Totals are Python integers. Only the share ``density * flops`` of a layer is rounded (half up, to one FLOP an epoch).
"""

from __future__ import annotations

from spfde.cost.ledger import Ledger, LedgerRow, LedgerTotals, format_bytes, format_flops, format_seconds
from spfde.cost.memory import MemoryTimeline, SavedTensorBytes, peak_bytes, reset_peak
from spfde.cost.training import EpochCost

__all__ = [
    "EpochCost",
    "Ledger",
    "LedgerRow",
    "LedgerTotals",
    "MemoryTimeline",
    "SavedTensorBytes",
    "format_bytes",
    "format_flops",
    "format_seconds",
    "peak_bytes",
    "reset_peak",
]

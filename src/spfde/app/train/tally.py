"""Loss and accuracy of a pass, summed on the device and read without making a step wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spfde.app.train.loss import classes_of
from spfde.session.distributed import World


@dataclass(frozen=True)
class Pass:
    """What one pass gave: mean loss, accuracy in [0, 1], and the bytes that autograd saved in its first step."""

    loss: float
    accuracy: float
    saved_tensor_bytes: int | None = None


class Tally:
    """Sums of losses and hits.

    Args:
        device: where the batches are.
        world: the processes whose sums are read together.

    Example:
        >>> from spfde.app.train.tally import Tally
        >>> tally = Tally(torch.device("cpu"))
        >>> tally.add(torch.tensor(1.0), logits=torch.tensor([[0.0, 1.0], [0.0, 1.0]]), y=torch.tensor([1, 0]))
        >>> tally.read()
        Pass(loss=0.5, accuracy=0.5, saved_tensor_bytes=None)
    """

    def __init__(self, device: torch.device, world: World | None = None) -> None:
        self._world = world or World()
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._loss = torch.zeros((), dtype=kind, device=device)
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = 0
        self._on_its_way: tuple[Tensor, torch.cuda.Event, int] | None = None

    def add(self, loss_sum: Tensor, logits: Tensor, y: Tensor) -> None:
        """A batch: the sum of its losses, its logits ``(N, classes)``, and its labels as ``loss_of`` has them."""
        self._loss += loss_sum
        self._hits += (logits.argmax(1) == classes_of(y)).sum()
        self._seen += len(y)

    def glance(self) -> float | None:
        """This process's mean loss so far, or on CUDA as it was at the last glance: nobody waits. None: not there yet.

        On CUDA the sum is copied to the host when the device comes to it, and looked at the next time.
        """
        if self._loss.device.type != "cuda":
            return float(self._loss) / self._seen
        arrived = None
        if self._on_its_way is not None:
            copy, event, seen = self._on_its_way
            if not event.query():  # type: ignore[no-untyped-call]
                return None
            arrived = float(copy) / seen
        copy = torch.empty((), dtype=self._loss.dtype, pin_memory=True).copy_(self._loss, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._on_its_way = (copy, event, self._seen)
        return arrived

    def read(self, saved_tensor_bytes: int | None = None) -> Pass:
        """The means over all that was added, in all processes; waits for the device, and for them."""
        own = float(self._loss), int(self._hits), self._seen
        loss, hits, seen = map(sum, zip(*self._world.gather(own, what="losses and hits"), strict=True))
        return Pass(loss / seen, hits / seen, saved_tensor_bytes)

"""An own loop under ``torchrun``, which saves what its rank has come to in its working folder."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import spfde
from helpers.distributed_worker import recipe
from helpers.training import EPOCHS, make_parts


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe("rigl"), epochs=EPOCHS)
    model = DistributedDataParallel(parts.model)
    for _ in session.epochs():
        for x, y in session.loader:
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(logits, y)
    weights = {name: p.detach() for name, p in parts.model.named_parameters()}
    state = {"masks": dict(session.masks), "weights": weights, "partial": {"set": session.partial_set}}
    torch.save({"rank": dist.get_rank(), **state}, "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

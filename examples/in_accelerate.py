"""SpFDE in a loop with Accelerate: prepare as ever, attach, and iterate session.loader. Saves, and goes on from there.

python examples/in_accelerate.py
accelerate launch --cpu --num_processes 2 examples/in_accelerate.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.app.data.datasets import load_data
from spfde.app.train.augment import normalise
from spfde.app.train.models import build_model
from spfde.integrations.accelerate import attach

RECIPE = spfde.presets.spfde.replace(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    data = load_data("fashion-mini", root="data")
    x, y = data.train.images[: options.samples], data.train.labels[: options.samples]
    loader = DataLoader(TensorDataset(normalise(x, data.mean, data.std), y), batch_size=64, shuffle=True)
    model = build_model("resnet8", num_classes=10, in_channels=1, image_size=28)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    # Frozen layers have no gradients, and DDP has to be told that some may be missing.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[unused])
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    session = attach(accelerator, model, optimizer, loader, RECIPE, epochs=options.epochs)
    accelerator.register_for_checkpointing(session)  # save_state and load_state take it along

    with tempfile.TemporaryDirectory() as folder:
        for epoch in session.epochs():
            model.train()
            for x, y in session.loader:
                with accelerator.accumulate(model):
                    logits = model(x)
                    accelerator.backward(F.cross_entropy(logits, y))
                    optimizer.step()
                    optimizer.zero_grad()
                session.observe(logits, y)
            accelerator.save_state(str(Path(folder, f"epoch{epoch}")))
            accelerator.print(
                f"epoch {epoch}: {len(session.partial_set)} samples, {session.frozen_blocks} blocks frozen"
            )
    accelerator.print(session.cost)


if __name__ == "__main__":
    main()

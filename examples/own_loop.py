"""Your own PyTorch loop with SpFDE attached: train, stop half-way, go on in fresh objects, and read the bill.

Uses some of the embedded images and needs nothing but the package itself.

    python examples/own_loop.py
    python examples/own_loop.py --samples 10000 --epochs 20     # the whole set: minutes
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.app.data.datasets import ImageArray, load_data
from spfde.app.train.augment import normalise
from spfde.app.train.models import build_model

RECIPE = spfde.Recipe(
    sparsity=spfde.MEST(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
    sieving=spfde.DataSieving(removed_fraction=0.2),
    learning_rate=spfde.BlockwiseCosine(),
)


def load_images(samples: int) -> tuple[TensorDataset, TensorDataset]:
    """The first ``samples`` training images and a fifth as many test images, normalised."""
    data = load_data("fashion-mini", root="data")

    def first(part: ImageArray, count: int) -> TensorDataset:
        return TensorDataset(normalise(part.images[:count], data.mean, data.std), part.labels[:count])

    return first(data.train, samples), first(data.test, samples // 5)


def make_parts(train_set: TensorDataset, epochs: int) -> tuple[nn.Module, torch.optim.Optimizer, spfde.Session]:
    """The ordinary objects of a training script, and the session."""
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=10, in_channels=1, image_size=28)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(train_set, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    return model, optimizer, spfde.attach(model, optimizer, loader, RECIPE, epochs=epochs, seed=0)


@torch.no_grad()
def accuracy(model: nn.Module, test_set: TensorDataset) -> float:
    # A loader of its own: batches of session.loader are training batches.
    model.eval()
    hits = [(model(x).argmax(1) == y).float() for x, y in DataLoader(test_set, batch_size=256)]
    return float(torch.cat(hits).mean())


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: spfde.Session, x: Tensor, y: Tensor
) -> None:
    logits = model(x)
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    optimizer.zero_grad()
    session.observe(logits, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    train_set, test_set = load_images(options.samples)
    stop_after = options.epochs // 2 - 1

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        model, optimizer, session = make_parts(train_set, options.epochs)
        for epoch in session.epochs():
            model.train()
            for x, y in session.loader:
                train_step(model, optimizer, session, x, y)
            print(f"epoch {epoch}: accuracy {accuracy(model, test_set):.3f}, density {session.density:.3f}")
            if epoch == stop_after:
                parts = {"model": model, "optimizer": optimizer, "spfde": session}
                torch.save({name: part.state_dict() for name, part in parts.items()}, path)
                break  # as if the process had been killed here

        print(f"stopped after epoch {stop_after}; going on in fresh objects")
        model, optimizer, session = make_parts(train_set, options.epochs)
        saved = torch.load(path)
        model.load_state_dict(saved["model"])  # in this order
        optimizer.load_state_dict(saved["optimizer"])
        session.load_state_dict(saved["spfde"])

    for epoch in session.epochs():
        model.train()
        for x, y in session.loader:
            train_step(model, optimizer, session, x, y)
        print(
            f"epoch {epoch}: accuracy {accuracy(model, test_set):.3f}, density {session.density:.3f}, "
            f"{session.frozen_blocks} of {len(session.blueprint.partition.blocks)} blocks frozen"
        )
    print(f"\n{session.cost}")


if __name__ == "__main__":
    main()

"""A small text transformer trained from scratch: it learns to spell from the source of Python's own argparse.

All projections of attention and of the feed-forward layers are sparse; embeddings, norms and the head stay dense.

    python examples/text_transformer.py
"""

from __future__ import annotations

import argparse
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

RECIPE = spfde.Recipe(
    sparsity=spfde.RigL(sparsity=0.8),
    freezing=spfde.ProgressiveFreezing(flops_reduction=0.10),
    sieving=spfde.DataSieving(removed_fraction=0.20, criterion="loss"),
)


class CharacterModel(nn.Module):
    """Reads characters from left to right and says the next one: ids [N, length] to logits [N, length, vocabulary]."""

    def __init__(self, vocabulary: int, length: int, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("ahead", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.characters(ids) + self.positions, mask=self.ahead, is_causal=True)
        return self.head(x)


def make_data(n: int, *, seed: int, length: int = 32) -> tuple[TensorDataset, int]:
    """Pieces of the text, each with the text one character on; and the number of different characters."""
    text = inspect.getsource(argparse)
    alphabet = sorted(set(text))
    ids = torch.tensor([alphabet.index(character) for character in text])
    starts = torch.randint(len(ids) - length, (n,), generator=torch.Generator().manual_seed(seed))
    pieces = ids[starts[:, None] + torch.arange(length + 1)]
    return TensorDataset(pieces[:, :-1], pieces[:, 1:]), len(alphabet)


def loss_per_sample(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    data, vocabulary = make_data(options.samples, seed=0)
    model = CharacterModel(vocabulary, length=data.tensors[0].shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=50, shuffle=True)
    session = spfde.attach(model, optimizer, loader, RECIPE, epochs=options.epochs)
    print("blocks:", ", ".join(block.name for block in session.blueprint.partition.blocks))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)

    x_test, y_test = make_data(200, seed=1)[0].tensors
    for epoch in session.epochs():
        for x, y in session.loader:
            loss = loss_per_sample(model(x), y)
            loss.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            session.observe(loss=loss)
        scheduler.step()
        with torch.no_grad():
            test = float(loss_per_sample(model(x_test), y_test).mean())
        print(f"epoch {epoch}: {test / 0.6931:.3f} bits a character, density {session.density:.3f}")
    print(session.cost)


if __name__ == "__main__":
    main()

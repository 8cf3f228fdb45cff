"""SpFDE in the Trainer of Hugging Face: a small text classifier on made-up sentences. Needs the extra `transformers`.

python examples/in_transformers.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DistilBertConfig, DistilBertForSequenceClassification, Trainer, TrainingArguments

import spfde
from spfde.integrations.transformers import SpfdeCallback

RECIPE = spfde.presets.spfde.replace(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2, learning_rate=None)
WORDS, LENGTH = 64, 16


class Sentences(Dataset[dict[str, Tensor]]):
    """Random words; a sentence's class tells which half of the vocabulary most of them come from."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(2, (n,), generator=generator)
        own_half = torch.rand(n, LENGTH, generator=generator) < 0.7
        half = torch.where(own_half, self.labels[:, None], 1 - self.labels[:, None])
        self.ids = half * (WORDS // 2) + torch.randint(WORDS // 2, (n, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "max_position_embeddings": LENGTH, "dim": 48, "n_layers": 4, "n_heads": 4}
    # Before transformers 5 "sdpa" looks at the values of the mask, which cannot be traced.
    config = DistilBertConfig(**sizes, hidden_dim=96, attn_implementation="eager")
    callback = SpfdeCallback(RECIPE)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=DistilBertForSequenceClassification(config),
            args=TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=50,
                learning_rate=2e-3,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Sentences(options.samples, seed=0),
            eval_dataset=Sentences(options.samples // 5, seed=1),
            compute_metrics=lambda found: {"accuracy": float((found[0].argmax(1) == found[1]).mean())},
            callbacks=[callback],
        )
        trainer.train()
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}, density {callback.session.density:.2f}")
    print(callback.session.cost)


if __name__ == "__main__":
    main()

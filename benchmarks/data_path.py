"""How fast is the data path for sets that fit into memory?

One pass over 10,000 images of 3 x 32 x 32 in batches of 64, shuffled, with random crop (padding 4), flip and
normalisation, in this process: uint8 images in memory, augmented a batch at a time, against torchvision's transforms on
PIL images, a sample at a time. The PIL images are made beforehand, in favour of the latter. Target: at least 4x faster.

    python benchmarks/data_path.py                  # about 1 minute on two cores
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from _common import Figure, Result, Table, begin, compare, interleave, parser, publish, show
from spfde.app.data.images import ImageArray, collate
from spfde.app.train.augment import BatchAugment, normalise

BATCH, PADDING, TARGET = 64, 4, 4.0
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class PilImages(Dataset[tuple[Tensor, int]]):
    """PIL images, transformed one by one when they are asked for."""

    def __init__(self, pixels: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def loader_of(dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
    """A shuffling loader without workers."""
    return DataLoader(
        dataset, batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(0), num_workers=0, **arguments
    )


def drain(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Go through a pass, and check the form of what comes out."""
    for x, y in batches:
        assert x.dtype == torch.float32, "a model takes floats"
        assert x.shape == (len(y), 3, 32, 32), "crops have the images' size"


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of one pass of each (15)")
    options = made.parse_args(argv)
    stamped = begin(options)
    rounds = options.rounds or (2 if options.quick else 15)
    samples = 640 if options.quick else 10_000
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (samples,), generator=generator)

    augment = BatchAugment("crop+flip", torch.Generator().manual_seed(0), padding=PADDING)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    in_memory = loader_of(ImageArray(pixels, labels), collate_fn=collate)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    per_sample = loader_of(PilImages(pixels, labels, transform))
    timings = interleave(
        {
            "per-sample PIL transforms": lambda: drain(per_sample),
            "in memory, by batches": lambda: drain((normalise(augment(x), mean, std), y) for x, y in in_memory),
        },
        rounds,
    )
    slow, fast = timings["per-sample PIL transforms"], timings["in memory, by batches"]
    batches = len(in_memory)
    rows = [
        (name, f"{1e3 * timing.median / batches:.2f} ms", show(timing.median, "seconds"))
        for name, timing in timings.items()
    ]
    publish(
        Result(
            name="data_path",
            title="Data path",
            question="How many times faster than per-sample PIL transforms is the in-memory data path, with the same "
            "augmentation?",
            command="python benchmarks/data_path.py",
            figures=(Figure.of("in memory over PIL, speed", compare(slow, fast), low=TARGET, headline=True),),
            tables=(Table("Each path (medians)", ("path", "a batch of 64", f"{samples:,} images"), tuple(rows)),),
            settings={"images": f"{samples:,} of 3 x 32 x 32", "batch": BATCH, "workers": 0, "rounds": rounds},
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()

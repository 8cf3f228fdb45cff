"""Makes the embedded data set ``fashion_mini.npz`` from the IDX files of Fashion-MNIST.

    python scripts/make_fashion_mini.py FOLDER [--out FILE]

``FOLDER`` holds train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files, as Fashion-MNIST
publishes them. The sample is class-balanced: 1,000 training images per class from the training files and 200 test
images per class from the t10k files. Which images are taken depends on the seed and their positions alone (by SHA-256,
so that no library's generator has a say), and the archive carries no dates: the same input gives the same bytes with
the same zlib.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

SEED = 2022
TRAIN_PER_CLASS = 1_000
TEST_PER_CLASS = 200
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "spfde" / "app" / "assets" / "fashion_mini.npz"


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes: two zeros, type 8, number of axes, sizes (big-endian), data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes")
    axes = content[3]
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=axes, offset=4))
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def choose(labels: np.ndarray, *, per_class: int, split: str, seed: int = SEED) -> np.ndarray:
    """Positions of ``per_class`` samples of every class, in their original order."""

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{split}:{index}".encode()).digest()

    chosen: list[int] = []
    for label in np.unique(labels):
        members = sorted((int(index) for index in np.flatnonzero(labels == label)), key=rank)
        if len(members) < per_class:
            raise SystemExit(f"{split}: class {label} has {len(members)} images, {per_class} are needed")
        chosen.extend(members[:per_class])
    return np.array(sorted(chosen))


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed ``.npz`` whose bytes depend on the arrays (and the zlib) only."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def make(
    folder: Path, out: Path, *, train_per_class: int = TRAIN_PER_CLASS, test_per_class: int = TEST_PER_CLASS
) -> None:
    """Sample the files in ``folder`` and write ``out``."""
    arrays: dict[str, np.ndarray] = {}
    for split, prefix, per_class in (("train", "train", train_per_class), ("test", "t10k", test_per_class)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = choose(labels, per_class=per_class, split=split)
        arrays[f"x_{split}"] = np.ascontiguousarray(images[chosen])
        arrays[f"y_{split}"] = np.ascontiguousarray(labels[chosen])
    write_npz(out, arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the four gzipped IDX files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the .npz to write")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

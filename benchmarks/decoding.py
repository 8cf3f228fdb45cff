"""How many photographs does a core decode, and by what?

JPEGs of ImageNet's usual size (500 x 375 pixels, some 90 kB), and larger ones, in files, to 224 x 224 pixels of uint8
on one thread: what the package does (Pillow decodes at a lower resolution where there is more than enough, torchvision
otherwise, and PyTorch scales) against Pillow alone, with and without that, torchvision's decoder, and libjpeg-turbo by
simplejpeg or PyTurboJPEG where they are installed. Time is that of the process on its core. The photographs are made
by scaling up those of ``--data``, with noise in place of the detail that they lack; without ``--data`` they are smooth.

    python benchmarks/decoding.py --data DIR        # about 2 minutes on two cores
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from _common import Figure, Result, Table, Timing, begin, compare, parser, publish
from spfde.app.data.decoding import decode, fit

SIDE = 224
SIZES = {"500 x 375": (500, 375), "1000 x 750": (1000, 750)}
OURS = "the package: Pillow at a lower resolution or torchvision, PyTorch scales"
ALONE = "Pillow alone"
Decoder = Callable[[Path], Tensor]


def photographs(source: Path | None, size: tuple[int, int], count: int, folder: Path) -> list[Path]:
    """JPEGs of a size, written into a folder."""
    drawn, made = np.random.default_rng(0), []
    files = sorted(source.rglob("*.jpg"))[:: max(1, len(list(source.rglob("*.jpg"))) // count)] if source else []
    for number in range(count):
        if files:
            small = Image.open(files[number % len(files)]).convert("RGB")
        else:
            small = Image.fromarray(drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        large = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = large + drawn.integers(-12, 13, (*large.shape[:2], 1), dtype=np.int16)
        path = folder / f"{size[0]}-{number}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
        made.append(path)
    return made


def ours(path: Path) -> Tensor:
    """As ``ImageFiles`` does it."""
    return fit(decode(str(path), at_least=(SIDE, SIDE)), (SIDE, SIDE))


def pillow(path: Path, *, draft: bool) -> Tensor:
    """Pillow decodes and scales."""
    with Image.open(path) as image:
        if draft:
            image.draft("RGB", (SIDE, SIDE))
        fitted = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def decoders() -> dict[str, Decoder]:
    """Those that are installed, by name."""
    found: dict[str, Decoder] = {
        OURS: ours,
        ALONE: lambda path: pillow(path, draft=False),
        "Pillow alone, at a lower resolution": lambda path: pillow(path, draft=True),
    }
    with contextlib.suppress(ImportError):
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        found["torchvision.io.decode_jpeg, PyTorch scales"] = lambda path: fit(
            decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB), (SIDE, SIDE)
        )
    with contextlib.suppress(ImportError):
        import simplejpeg

        found["simplejpeg at a lower resolution, PyTorch scales"] = lambda path: _scaled(
            simplejpeg.decode_jpeg(path.read_bytes(), "RGB", min_height=SIDE, min_width=SIDE)
        )
    with contextlib.suppress(ImportError, RuntimeError):
        from turbojpeg import TJPF_RGB, TurboJPEG

        turbo = TurboJPEG()
        found["PyTurboJPEG, PyTorch scales"] = lambda path: _scaled(turbo.decode(path.read_bytes(), TJPF_RGB))
    return found


def _scaled(pixels: Any) -> Tensor:
    return fit(torch.from_numpy(pixels).permute(2, 0, 1), (SIDE, SIDE))


def in_turn(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, Timing]:
    """Seconds of a core that each takes, turn by turn: the time that the process computed, whoever else was at work."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:  # the first one warms up
                seconds[name].append(time.process_time() - began)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def decode_all(decoder: Decoder, paths: Sequence[Path]) -> None:
    """Each once."""
    for path in paths:
        assert decoder(path).shape == (3, SIDE, SIDE), "every decoder gives what the model takes"


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, default=None, metavar="DIR", help="a folder of JPEGs to scale up")
    made.add_argument("--rounds", type=int, default=None, help="rounds (15)")
    options = made.parse_args(argv)
    options.threads = 1
    stamped = begin(options)
    rounds, count = options.rounds or (2 if options.quick else 15), 4 if options.quick else 40
    tables, figures, kilobytes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            paths = photographs(options.data, size, count, Path(folder))
            kilobytes.append(f"{sum(path.stat().st_size for path in paths) / count / 1000:.0f} kB")
            calls = {which: (lambda d=d, p=paths: decode_all(d, p)) for which, d in decoders().items()}
            timings = in_turn(calls, rounds)
            tables.append(_table(name, timings, count))
            if name == next(iter(SIZES)):
                figures = _figures(timings, count)
    publish(
        Result(
            name="decoding",
            title="Decoding photographs",
            question="How many JPEGs does one core turn into 224 x 224 pixels in a second, and by what decoder?",
            command="python benchmarks/decoding.py --data DIR",
            figures=tuple(figures),
            tables=tuple(tables),
            settings={"photographs": f"{count} of each size ({', '.join(kilobytes)})", "threads": 1, "rounds": rounds},
            stamp=stamped,
        ),
        options,
    )


def _figures(timings: dict[str, Timing], count: int) -> list[Figure]:
    rate = count / timings[OURS].median
    spread = tuple(sorted(count / q for q in timings[OURS].quartiles))
    return [
        Figure("photographs a second a core", rate, "count", n=timings[OURS].n, spread=(spread[0], spread[1])),
        Figure.of("the package over Pillow alone, speed", compare(timings[ALONE], timings[OURS]), low=1.0),
    ]


def _table(name: str, timings: dict[str, Timing], count: int) -> Table:
    rows = [
        (which, f"{count / timing.median:,.0f}", f"{1e3 * timing.median / count:.2f} ms")
        for which, timing in timings.items()
    ]
    return Table(f"{name} pixels", ("decoder", "a second a core", "each (median)"), tuple(rows))


if __name__ == "__main__":
    main()

"""How much faster does a block-sparse linear layer train, on a GPU?

Forward and backward pass (gradients of input, weight and bias) of one layer under bf16 autocast, fp32 parameters,
against `nn.Linear` in the same. Each is captured in a CUDA graph, as a training step would be, so that no launch is
waited for; "eager" is the same without a graph. Timed turn by turn, many passes at once. Every sparse layer is checked
against the dense one first.

    python benchmarks/block_linear.py               # about a minute on an H200
    python benchmarks/block_linear.py --sweep       # also other tiles, the fastest first: some minutes more
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from _common import Figure, Result, Table, Timing, begin, compare, interleave, parser, publish
from spfde.engines.base import Parts

PASSES = 50  # at once, between two looks at the clock
HEADLINE_MOST = 0.6
LARGEST_ERROR = 0.02


@dataclass(frozen=True)
class Case:
    """A layer: features, tokens, sparsity and the side of its blocks."""

    into: int = 768
    out: int = 3072
    tokens: int = 8192
    sparsity: float = 0.9
    side: int = 32

    def __str__(self) -> str:
        blocks = f"{self.sparsity:.0%} in {self.side}x{self.side} blocks"
        return f"Linear {self.into} to {self.out}, {self.tokens:,} tokens, {blocks}"


HEADLINE = Case()
CASES = (
    HEADLINE,
    Case(into=3072, out=768),
    replace(HEADLINE, sparsity=0.8),
    replace(HEADLINE, sparsity=0.95),
    replace(HEADLINE, side=64),
    replace(HEADLINE, tokens=2048),
    Case(into=4096, out=4096),
)


class Layer:
    """A layer, its input and what arrives from behind; dense, or with blocks."""

    def __init__(self, case: Case, *, sparse: bool) -> None:
        from spfde.engines.blocks.linear import BlockLinears

        generator = torch.Generator().manual_seed(0)
        rows, columns = case.out // case.side, case.into // case.side
        units = torch.zeros(rows * columns, dtype=torch.bool)
        units[torch.randperm(len(units), generator=generator)[: round((1 - case.sparsity) * len(units))]] = True
        mask = units.view(rows, columns).repeat_interleave(case.side, 0).repeat_interleave(case.side, 1).cuda()
        torch.manual_seed(0)
        self.model = nn.Linear(case.into, case.out).cuda()
        with torch.no_grad():
            self.model.weight.mul_(mask)
        self.mask = mask
        self.output: Tensor | None = None
        self.x = torch.randn(case.tokens, case.into, generator=generator).cuda().bfloat16().requires_grad_()
        self.slope = torch.randn(case.tokens, case.out, generator=generator).cuda().bfloat16()
        if sparse:
            parts = Parts(masks=lambda: {"weight": mask})
            self.blocks = BlockLinears(self.model, {"weight": (case.side, case.side)}, parts, most=1.0)

    def step(self) -> None:
        """One pass forward and back."""
        # The last pass's graph must be gone: what accumulates gradients stays on the stream of its first use.
        self.output = self.x.grad = self.model.weight.grad = self.model.bias.grad = None
        # The cache of casts belongs to no graph; the dense layer casts its weight once a pass either way.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            self.output = self.model(self.x)
        self.output.backward(self.slope)

    def captured(self) -> Callable[[], None]:
        """The same as a graph, with the memory that it reads."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def found(self) -> list[Tensor]:
        found = (self.output, self.x.grad, self.model.weight.grad, self.model.bias.grad)
        return [tensor.detach() for tensor in found if tensor is not None]


def many(step: Callable[[], None], passes: int) -> Callable[[], None]:
    """So many passes, and the end of them."""

    def call() -> None:
        for _ in range(passes):
            step()
        torch.cuda.synchronize()

    return call


def check(sparse: Layer, dense: Layer) -> None:
    """Fail unless the two have computed the same."""
    ours, theirs = sparse.found(), dense.found()
    theirs[2] = theirs[2] * dense.mask
    for what, one, other in zip(("output", "of x", "of weight", "of bias"), ours, theirs, strict=True):
        error = float((one.double() - other.double()).norm() / other.double().norm())
        if not error < LARGEST_ERROR:
            sys.exit(f"wrong: the {what} differs from the dense layer's by {error:.1%}")


def measure(case: Case, rounds: int, *, passes: int = PASSES) -> dict[str, Timing]:
    """Times of so many passes: dense and sparse, captured and eager."""
    made = {name: Layer(case, sparse=name == "blocks") for name in ("dense", "blocks")}
    calls = {}
    for name, layer in made.items():
        calls[name] = many(layer.captured(), passes)
        calls[name]()
    check(made["blocks"], made["dense"])
    for name in ("dense", "blocks"):
        made[f"{name}, eager"] = eager = Layer(case, sparse=name == "blocks")
        calls[f"{name}, eager"] = many(eager.step, passes)
    for name in ("dense", "dense, eager"):
        with torch.no_grad():  # tensor cores are faster with zeros, of which a dense layer has none
            made[name].model.weight.normal_(std=0.02)
    return interleave(calls, rounds, warmup=2)


def figures_of(case: Case, timings: dict[str, Timing]) -> list[Figure]:
    """The layer's time over the dense one's."""
    most = HEADLINE_MOST if case == HEADLINE else None
    captured = compare(timings["blocks"], timings["dense"])
    eager = compare(timings["blocks, eager"], timings["dense, eager"])
    return [
        Figure.of(f"{case}: forward and backward over dense bf16", captured, high=most, headline=most is not None),
        Figure.of(f"{case}: the same without a graph", eager),
    ]


def rows_of(case: Case, timings: dict[str, Timing], passes: int = PASSES) -> Iterator[tuple[str, ...]]:
    for name, timing in timings.items():
        first, third = (f"{1e6 * seconds / passes:.1f}" for seconds in timing.quartiles)
        yield str(case), name, f"{1e6 * timing.median / passes:.1f} µs", f"{first} … {third} µs"


# --- other tiles ------------------------------------------------------------------------------------------------------


@contextmanager
def tiles(**changes: Any) -> Iterator[None]:
    """Kernels that are started otherwise, inside."""
    from spfde.engines.blocks import product

    before = product.TILES[torch.bfloat16]
    product.TILES[torch.bfloat16] = replace(before, **changes)
    try:
        yield
    finally:
        product.TILES[torch.bfloat16] = before


def candidates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Tiles to try: of the products, then of the gradient of the weight, each with the others as they are."""
    from spfde.engines.blocks.product import Tile

    sizes = ((64, 4), (128, 4), (128, 8), (256, 8))
    for (tokens, warps), features, stages in itertools.product(sizes, (32, 64, 128), (1, 2, 3)):
        tile = Tile(tokens, features, warps, stages)
        yield f"products: {tile}", {"many": tile}
    for tokens, warps, stages, programs in itertools.product((32, 64, 128), (4, 8), (2, 3, 4), (256, 512, 1024, 2048)):
        tile = Tile(tokens, warps=warps, stages=stages)
        yield f"gradient: {tile}, {programs} programs", {"gradient": tile, "programs": programs}


def sweep(passes: int = PASSES) -> list[tuple[str, ...]]:
    """The headline's layer with other tiles, the fastest first; what does not compile or fit is said."""
    from triton.runtime.errors import OutOfResources

    found = []
    for name, changes in candidates():
        with tiles(**changes):
            try:
                call = many(Layer(HEADLINE, sparse=True).captured(), passes)
            except (OutOfResources, RuntimeError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                torch.cuda.synchronize()  # an error of the device itself ends it all
                continue
            call()
            begun = time.perf_counter()
            call()
            found.append((1e6 * (time.perf_counter() - begun) / passes, name))
    return [(name, f"{micros:.1f} µs") for micros, name in sorted(found)]


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of 50 passes of each variant (20)")
    made.add_argument("--sweep", action="store_true", help="try other tiles for the kernels, too")
    options = made.parse_args(argv)
    stamped = begin(options)
    if not torch.cuda.is_available():
        print("Nothing is measured: the kernels for blocks of weights are for CUDA, and this machine has none.")
        return
    rounds = options.rounds or (2 if options.quick else 20)
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    for case in CASES[:1] if options.quick else CASES:
        print(f"{case} …", file=sys.stderr, flush=True)
        timings = measure(case, rounds)
        figures += figures_of(case, timings)
        rows += rows_of(case, timings)
    tables = [Table("A pass forward and back", ("layer", "variant", "median", "quartiles"), tuple(rows))]
    if options.sweep:
        tables.append(Table(f"Other tiles: {HEADLINE}", ("tiles", "a pass"), tuple(sweep())))
    publish(
        Result(
            name="block_linear",
            title="Block-sparse linear layers on a GPU",
            question="How long do forward and backward pass of a linear layer take by kernels that compute with the "
            "active blocks alone, over PyTorch's dense layer, both in bf16 under autocast?",
            command="python benchmarks/block_linear.py",
            figures=tuple(figures),
            tables=tuple(tables),
            settings={"passes at once": PASSES, "rounds": rounds},
            notes=(
                "A figure is time over dense: 0.5x is half of it. The gradients of input, weight and bias are in it.",
            ),
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()

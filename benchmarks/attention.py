"""In which precision does PyTorch train attention under autocast to bf16, on a CPU, and which is the faster one?

`scaled_dot_product_attention` forward and backward on one thread: in bf16, as autocast has it, and as the native engine
calls it (in fp32 where sequences are short and the processor has no instructions for tiles, casts included). Timed turn
by turn.

    python benchmarks/attention.py                  # about a minute on one core
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from _common import Figure, Result, Table, begin, compare, interleave, parser, publish
from spfde.core.torch_private import multiplies_tiles
from spfde.engines.native.attention import attention

HEADS, TOKENS = 3, 4096
LENGTHS, FEATURES = (16, 50, 65, 128, 197, 256, 384, 512), (32, 64)
LEAST = {65: 1.3}


def step(call: Callable[[Tensor, Tensor, Tensor], Tensor], given: list[Tensor]) -> None:
    """Forward and backward once."""
    with torch.autocast("cpu", torch.bfloat16):
        call(*given).sum().backward()


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds (15)")
    options = made.parse_args(argv)
    options.threads = 1
    stamped = begin(options)
    rounds = options.rounds or (2 if options.quick else 15)
    figures, tables = [], []
    for features in FEATURES:
        timings = {}
        for length in LENGTHS[:2] if options.quick else LENGTHS:
            shape = (TOKENS // length, HEADS, length, features)
            given = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
            calls = {"bf16": F.scaled_dot_product_attention, "engine": attention}
            found = interleave({name: lambda c=c, g=given: step(c, g) for name, c in calls.items()}, rounds)
            timings.update({f"{length} tokens, {name}": timing for name, timing in found.items()})
            figures.append(
                Figure.of(
                    f"{length} tokens, {features} features: speed of the engine's call over bf16",
                    compare(found["bf16"], found["engine"]),
                    low=None if multiplies_tiles() else LEAST.get(length),
                )
            )
        tables.append(Table.of_timings(f"{features} features a head", "attention", timings))
    publish(
        Result(
            name="attention",
            title="Attention under autocast on a CPU",
            question="How long does attention train in bf16 in PyTorch, and how long as the native engine calls it?",
            command="python benchmarks/attention.py",
            figures=tuple(figures),
            tables=tuple(tables),
            settings={"heads": HEADS, "tokens in a batch": f"{TOKENS:,}", "threads": 1, "rounds": rounds},
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()

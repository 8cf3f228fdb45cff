"""Compile for a GPU, without one, what a step of a block-sparse layer starts; one line of JSON for each kernel.

Run in a process of its own, for the tests' has Triton interpret its kernels: python compile_kernels.py CAPABILITY.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from spfde.engines.blocks import kernels, product
from spfde.engines.blocks.lists import BlockLists


class NoDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: compiles what would be started."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def compile_it(*args: Any, **options: Any) -> None:
            made = self.kernel.run(*args, grid=grid, warmup=True, **options)
            ptx = made.asm["ptx"]
            found = {
                "kernel": self.kernel.__name__,
                "shared": made.metadata.shared,
                "tensor cores": bool(re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
                "wide": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* \[[^\]]*\], \[[^\]]*\], 0x10", ptx)),
                "narrow": len(re.findall(r"ld\.global\S*\.b16|ld\.global\S*\.b8", ptx)),
                "machine code": "cubin" in made.asm,
            }
            print(json.dumps(found), flush=True)

        return compile_it


def step(block: tuple[int, int], tokens: int, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """A step forward and back, whose numbers are nothing."""
    out, into = 4 * block[0], 4 * block[1]
    lists = BlockLists((out, into), block, "cpu")
    lists.fill(torch.ones(out, into, dtype=torch.bool))
    x, weight = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((tokens, into), (out, into)))
    bias = torch.zeros(out, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        product.block_linear(x, weight, bias, lists).sum().backward()


def main() -> None:
    triton.runtime.driver.set_active(NoDriver(int(sys.argv[1])))
    for name in ("product", "weight_gradient", "collect"):
        setattr(kernels, name, Compiled(getattr(kernels, name)))
    for block in ((32, 32), (64, 32), (64, 64)):
        for tokens in (64, product.MANY_TOKENS):
            step(block, tokens, torch.float32, torch.bfloat16)
            step(block, tokens, torch.bfloat16, None)
            step(block, tokens, torch.float16, None)
            torch.set_float32_matmul_precision("highest")
            step(block, tokens, torch.float32, None)
            torch.set_float32_matmul_precision("high")
            step(block, tokens, torch.float32, None)


if __name__ == "__main__":
    main()

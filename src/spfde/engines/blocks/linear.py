"""Linear layers of a model that compute with their active blocks. Importing this module imports Triton and Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spfde.core.torch_private import is_recorded, version_of
from spfde.engines.base import Parts
from spfde.engines.blocks.lists import MOST_DENSITY, BlockLists
from spfde.engines.blocks.modules import linears_of
from spfde.engines.blocks.product import block_linear, multiplied_in
from spfde.engines.stand_in import put_on, take_off

HELD = "_spfde_blocks"


class BlockLinears:
    """Replaces the ``forward`` of linear layers, on the instances, until :meth:`detach`.

    In training mode the active blocks alone are computed with, forward and backward. In evaluation mode PyTorch
    computes: weights that are swapped in for it, such as averages, may be other ones than the masks have. So it does
    where a layer has more than ``most`` of its blocks, and where the kernels cannot take what comes (other types,
    weights that ``torch.func`` puts in, dispatch modes).

    A mask that changes is noticed by itself: the weight is written into whenever one does. Whoever replays a captured
    graph calls :meth:`refresh` before, for a graph looks at nothing, and captures anew where :attr:`key` is another.

    Args:
        model: the model.
        blocks: (rows, columns) of the structure's blocks, by the name of the weight.
        parts: what is read of the session.
        most: share of active blocks up to which the kernels compute.

    Example:
        >>> model = torch.nn.Linear(64, 32)
        >>> mask = torch.arange(64).expand(32, 64) < 32
        >>> parts = Parts(masks=lambda: {"weight": mask})
        >>> blocks = BlockLinears(model, {"weight": (32, 32)}, parts, most=0.5)
        >>> model(torch.randn(5, 64)).sum().backward()
        >>> int(model.weight.grad.count_nonzero()) == int(mask.sum())
        True
        >>> blocks.detach()
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, Sequence[int]], parts: Parts, *, most: float = MOST_DENSITY
    ) -> None:
        self._parts, self._most = parts, most
        self._is_bypassed = False
        modules = linears_of(model, blocks)
        self.layers = {name: BlockLinear(name, owners, blocks[name], self.refresh) for name, owners in modules.items()}
        self.refresh()
        for layer in self.layers.values():
            layer.install(self)
            layer.expects_pass = True

    @property
    def key(self) -> tuple[tuple[Any, ...], ...]:
        """What a captured graph depends on besides the numbers in its buffers: capture anew where it is another one.

        A mutation that keeps the number of active blocks leaves it as it is, and so does one that leaves at least half.
        """
        return tuple(layer.key for layer in self.layers.values())

    @property
    def is_bypassed(self) -> bool:
        return self._is_bypassed

    def refresh(self) -> None:
        """Read the masks and the wishes for dense gradients; where a mask is another one, make its lists anew."""
        masks, dense = self._parts.masks(), self._parts.dense_gradients()
        for name, layer in self.layers.items():
            layer.follow(masks[name], wants_dense=name in dense, most=self._most)

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """The layers compute as their class says."""
        before, self._is_bypassed = self._is_bypassed, True
        try:
            yield
        finally:
            self._is_bypassed = before

    def detach(self) -> None:
        """Give the layers their forward back."""
        for layer in self.layers.values():
            layer.remove()


class BlockLinear:
    """One masked weight, and the linear layers that have it.

    Args:
        name: of the weight.
        modules: the layers.
        block: (rows, columns) of its blocks.
        refresh: called where the weight was written into, or the layer's turn has come again.

    Attributes:
        computes: whether the kernels compute it now.
        wants_dense: whether its next gradient is dense.
        expects_pass: its next call is in another pass than the last time that the masks were read.
    """

    def __init__(
        self, name: str, modules: Sequence[nn.Linear], block: Sequence[int], refresh: Callable[[], None]
    ) -> None:
        self.name, self.modules, self._refresh = name, modules, refresh
        self.weight = modules[0].weight
        self._block = block
        self._lists = BlockLists(tuple(self.weight.shape), block, self.weight.device)
        self._mask: Tensor | None = None
        self._version: int | None = None
        self.expects_pass = True
        self.wants_dense = self.computes = False
        self._standing_in: list[_StandIn] = []

    @property
    def lists(self) -> BlockLists:
        """Where its active blocks are."""
        return self._lists

    @property
    def key(self) -> tuple[Any, ...]:
        """See ``BlockLinears.key``."""
        return self.computes, self.wants_dense, self._lists.n_groups, self._lists.device

    def follow(self, mask: Tensor, *, wants_dense: bool, most: float) -> None:
        """Take this mask, and whether the next gradient is to be dense."""
        self.wants_dense, self.expects_pass = wants_dense, False
        self._version = version_of(self.weight)
        if mask is self._mask and self._lists.device == self.weight.device:
            return
        if self._lists.device != self.weight.device:
            self._lists = BlockLists(tuple(self.weight.shape), self._block, self.weight.device)
        self._lists.fill(mask)
        self._mask = mask
        self.computes = self._lists.density <= most

    def __call__(self, module: nn.Linear, input: Tensor) -> Tensor:
        # A mutation writes into the weight. A wish for dense gradients may come without: then a new pass has begun.
        if self.expects_pass or self._version != version_of(self.weight):
            self._refresh()
        self.expects_pass = True
        if not self.computes or not self._can_take(module, input):
            return F.linear(input, module.weight, module.bias)
        return block_linear(input, module.weight, module.bias, self._lists, dense_gradient=self.wants_dense)

    def _can_take(self, module: nn.Linear, input: Tensor) -> bool:
        weight = module.weight
        return (
            # A capture may put another parameter of the same memory there, torch.func a tensor of other numbers.
            weight.data_ptr() == self.weight.data_ptr()
            and weight.is_contiguous()
            and input.device == weight.device == self._lists.device
            and input.shape[-1:] == weight.shape[1:]
            and input.numel() > 0
            and multiplied_in(input, weight) is not None
        )

    # --- on the modules ----------------------------------------------------------------------------------------------

    def install(self, owner: BlockLinears) -> None:
        """Replace the forward of its modules."""
        self._standing_in = [_StandIn(self, owner, module) for module in self.modules]
        for each in self._standing_in:
            put_on(each.module, each, held=HELD, by=forward)

    def remove(self) -> None:
        """Give the modules their forward back; what someone put around it since stays."""
        for each in self._standing_in:
            take_off(each.module, each, held=HELD, by=forward)


@dataclass(frozen=True, eq=False)
class _StandIn:
    """What stands in for one module."""

    layer: BlockLinear
    owner: BlockLinears
    module: nn.Linear


# Copied and pickled by its name, as bound methods are: a copy computes as its class.
def forward(module: nn.Linear, input: Tensor) -> Tensor:
    """Stands in for ``nn.Linear.forward`` while an engine is attached."""
    if not module.training or getattr(torch.compiler, "is_exporting", bool)():
        return F.linear(input, module.weight, module.bias)
    result: Tensor = _compute(module, input)
    return result


forward.is_spfde = True  # type: ignore[attr-defined]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled code ends before the layer, and goes on behind it
def _compute(module: nn.Linear, input: Tensor) -> Tensor:
    held = vars(module).get(HELD)
    found: _StandIn | None = None if held is None else held.computes
    if found is None or found.module is not module or found.owner.is_bypassed or is_recorded():
        return F.linear(input, module.weight, module.bias)
    result: Tensor = found.layer(module, input)
    return result

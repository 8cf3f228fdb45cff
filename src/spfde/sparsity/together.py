"""Many tensors masked together: a few operations, and little Python, whatever the number of layers.

A step of a small network takes an accelerator two or three milliseconds, and a launch from Python some microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_

import torch
from torch import Tensor

from spfde.core.torch_private import multiply_each_
from spfde.sparsity.masks import bits
from spfde.sparsity.weight import MaskedWeight


class Products:
    """Products in place of many tensors, one operation for all that one kernel can take.

    Args:
        factors: what each is multiplied with, as ``MaskedWeight.factors_for`` gives it.
        dtypes: the type of each, as ``masks.bits`` has it.
    """

    def __init__(self, factors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
        # Where types or devices differ within a list, PyTorch takes a kernel for each tensor.
        groups: dict[tuple[object, ...], list[int]] = {}
        for at, (factor, dtype) in enumerate(zip(factors, dtypes, strict=True)):
            groups.setdefault((dtype, factor.dtype, factor.device), []).append(at)
        self._groups = [(places, [factors[at] for at in places]) for places in groups.values()]

    def __call__(self, numbers: Sequence[Tensor]) -> None:
        """Multiply these, in the order of the factors."""
        for places, factors in self._groups:
            multiply_each_([numbers[at] for at in places], factors)


class GradientMasking:
    """Zeroes what of gradients is not kept. They are other tensors in each step, mostly of the same kinds."""

    def __init__(self) -> None:
        self._kinds: list[object] = []
        self._masks: list[Tensor] = []
        self._products = Products((), ())

    def __call__(self, layers: Iterable[MaskedWeight]) -> None:
        """Mask the gradients of these layers; one without a gradient is passed over."""
        found = [(layer, grad) for layer in layers if (grad := layer.grad) is not None]
        masks = [layer.gradient_mask for layer, _ in found]
        kinds: list[object] = [(grad.dtype, grad.stride(), grad.device) for _, grad in found]
        numbers = [bits(grad) for _, grad in found]
        if kinds != self._kinds or not _same(masks, self._masks):
            for layer, _ in found:
                layer.follow()
            factors = [layer.factors_for(grad) if layer.wider is None else layer.wider for layer, grad in found]
            self._products = Products(factors, [number.dtype for number in numbers])
            self._kinds, self._masks = kinds, [layer.gradient_mask for layer, _ in found]
        self._products(numbers)


# What makes a call that zeroes tensors outside of their masks, as they lie; or None where it does not take one of them.
Clears = Callable[[Sequence[Tensor], Sequence[Tensor]], Callable[[], None] | None]


class Clearing:
    """Zeroes weights and their optimizer state outside the masks, again and again.

    What is to be multiplied is looked up once, and again when another tensor has taken a place, as optimizers do that
    make their state anew, or when one has other memory.

    Args:
        clears: what may do it faster than products.
    """

    def __init__(self, clears: Clears | None = None) -> None:
        self._clears = clears
        self._clear: Callable[[], None] = lambda: None
        self._seen: list[object] = []
        self._tensors: list[Tensor] = []
        self._places: list[int] = []

    def __call__(self, layers: Sequence[MaskedWeight]) -> None:
        """Zero what these layers have outside their masks."""
        seen = _around(layers)
        if not _same(seen, self._seen) or list(map(Tensor.data_ptr, self._tensors)) != self._places:
            self._look_up(layers)
        self._clear()

    def _look_up(self, layers: Sequence[MaskedWeight]) -> None:
        for layer in layers:
            layer.follow()
        found = [(layer, tensor) for layer in layers for tensor in (layer.local, *layer.optimizer_state())]
        self._tensors = [tensor for _, tensor in found]
        self._places = list(map(Tensor.data_ptr, self._tensors))
        clear = None
        if self._clears is not None:
            clear = self._clears(self._tensors, [layer.mask for layer, _ in found])
        self._clear = self._by_products(found) if clear is None else clear
        self._seen = _around(layers)

    @staticmethod
    def _by_products(found: Sequence[tuple[MaskedWeight, Tensor]]) -> Callable[[], None]:
        numbers = [bits(tensor) for _, tensor in found]
        factors = [layer.factors_for(tensor) for layer, tensor in found]
        products = Products(factors, [number.dtype for number in numbers])
        return lambda: products(numbers)


def _around(layers: Sequence[MaskedWeight]) -> list[object]:
    """The layers' weights and masks, and what their optimizers, which are the same, remember of them."""
    found = list[object]()
    states = layers[0].optimizers.states if layers else []
    for layer in layers:
        parameter = layer.parameter
        found += (layer.local, layer.mask)
        for remembered in states:
            of_weight = remembered.get(parameter)
            if of_weight:
                found += of_weight.values()
    return found


def _same(now: Sequence[object], before: Sequence[object]) -> bool:
    """Whether the same tensors are in the same order; what else optimizers remember, such as a count, may change."""
    if len(now) == len(before) and all(map(is_, now, before)):
        return True
    tensors, others = ([each for each in found if isinstance(each, Tensor)] for found in (now, before))
    return len(tensors) == len(others) and all(map(is_, tensors, others))

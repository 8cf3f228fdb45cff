"""Forward FLOPs, weights and activations of each layer, from a trace. The convention is in ``spfde.cost``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from spfde.model.sample import unwrap
from spfde.model.trace import Trace, TracedOp


@dataclass(frozen=True)
class LayerCost:
    """One weight with all its uses, or one product without a weight (the two products of attention)."""

    # The weight's parameter name; ``"module:operation"`` for a product without a weight, with ``#2``, ``#3`` …
    # appended when the same module runs the same operation again.
    name: str
    module: str  # qualified name of the module that ran it first
    position: int  # place of its first use in the trace's order of execution
    forward_flops: int  # dense forward FLOPs of one sample
    numel: int  # elements of the weight; 0 without one
    activations: int  # elements of its outputs for one sample

    @property
    def weighted(self) -> bool:
        """Whether the layer has a weight, and so a density and a weight gradient."""
        return self.numel > 0


@dataclass(frozen=True)
class ModelCost:
    """What one sample costs in the forward pass of a dense model."""

    layers: tuple[LayerCost, ...]  # every counted layer, by its first use
    uncounted: Mapping[str, int]  # modules that ran without a counted operation: type name to number of calls
    n_parameters: int  # elements of all parameters, shared ones once, counted layers or not

    @property
    def forward_flops(self) -> int:
        """Dense forward FLOPs of one sample."""
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def forward(self) -> tuple[int, ...]:
        """Dense forward FLOPs of one sample, per layer: what ``epoch_cost`` takes."""
        return tuple(layer.forward_flops for layer in self.layers)

    def densities(self, of_weights: Mapping[str, float]) -> tuple[float, ...]:
        """Density per layer: that of its weight where ``of_weights`` has it, else 1.

        Names of weights without counted FLOPs (unused ones) are passed over: they cost nothing.
        """
        return tuple(of_weights.get(layer.name, 1.0) for layer in self.layers)


def model_cost(trace: Trace, model: nn.Module) -> ModelCost:
    """Gather the operations of a trace into layers.

    A weight that is used several times (tied weights, a module called twice) is one layer: its FLOPs and activations
    add up, and it stands at its first use. Of an operation that reads two matrices, the last one read is the weight
    (the first is an input or a bias that happens to be a parameter). A weight that is computed first (a
    parametrisation) is no parameter by the time it is multiplied: it counts as a product without a weight.
    """
    parameters = dict(unwrap(model).named_parameters())
    layers: dict[str, LayerCost] = {}
    repeats: Counter[str] = Counter()
    for op in trace.ops:
        if not op.flops:
            continue
        matrices = [name for name in op.parameters if parameters[name].dim() >= 2]
        name = matrices[-1] if matrices else _product_name(op, repeats)
        numel = parameters[name].numel() if name in parameters else 0
        before = layers.get(name, LayerCost(name, op.module, op.position, 0, numel, 0))
        layers[name] = replace(
            before,
            forward_flops=before.forward_flops + _per_sample(op.flops, trace.batch_size),
            activations=before.activations + _per_sample(op.output_numel, trace.batch_size),
        )
    return ModelCost(
        layers=tuple(layers.values()),
        uncounted=dict(trace.uncounted),
        n_parameters=sum(p.numel() for p in parameters.values()),
    )


def _product_name(op: TracedOp, repeats: Counter[str]) -> str:
    name = f"{op.module}:{op.name.rpartition('.')[2]}"
    repeats[name] += 1
    return name if repeats[name] == 1 else f"{name}#{repeats[name]}"


def _per_sample(amount: int, batch_size: int) -> int:
    # Divides evenly unless an operation ignores the batch (a product of two parameters): then up, never to nothing.
    return -(-amount // batch_size)

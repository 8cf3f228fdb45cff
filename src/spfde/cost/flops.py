"""Forward FLOPs, weights and activations of each layer, from a trace. The convention is in ``spfde.cost``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from spfde.model.sample import unwrap
from spfde.model.trace import Trace, TracedOp, weight_of


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
    learns: bool = True  # whether the weight has a gradient
    # Forward FLOPs whose inputs need a gradient, as (position, FLOPs): as long as anything learns that is first read
    # at that position or after it. Only for what has no gradient of a weight.
    input_gradients: tuple[tuple[int, int], ...] = ()
    computed: bool = False  # whether it is computed from the parameter in a way that keeps no zeros
    inputs_first: bool = False  # whether the weight is (in, out), or of a layout that is not known
    # Of a product without a weight: parameters that it is computed from together with the model's input.
    from_input: tuple[str, ...] = ()

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
    def computed(self) -> tuple[str, ...]:
        """Weights that are computed before they are used, in a way that keeps no zeros."""
        return tuple(layer.name for layer in self.layers if layer.computed)

    @property
    def from_input(self) -> tuple[str, ...]:
        """Parameters that the weights of products are computed from together with the model's input."""
        own = {layer.name for layer in self.layers}
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.from_input if name not in own))

    @property
    def inputs_first(self) -> tuple[str, ...]:
        """Weights that are (in, out), or of a layout that is not known."""
        return tuple(layer.name for layer in self.layers if layer.inputs_first)

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
    add up, and it stands at its first use. A weight that is computed first (a parametrisation, weight standardisation)
    belongs to the parameter that it is computed from; where the model's input has a part in it, the layer is a product
    without a weight.
    """
    parameters = dict(unwrap(model).named_parameters())
    layers: dict[str, LayerCost] = {}
    repeats: Counter[str] = Counter()
    for op in trace.ops:
        if not op.flops:
            continue
        weight = weight_of(op, parameters)
        name = weight or _product_name(op, repeats)
        numel = parameters[weight].numel() if weight else 0
        flops = _per_sample(op.flops, trace.batch_size)
        before = layers.get(name, LayerCost(name, op.module, op.position, 0, numel, 0, learns=False))
        layers[name] = replace(
            before,
            forward_flops=before.forward_flops + flops,
            activations=before.activations + _per_sample(op.output_numel, trace.batch_size),
            learns=before.learns or (weight is not None and _weight_learns(op, weight, parameters)),
            # The products of attention have two inputs.
            input_gradients=before.input_gradients
            + (() if op.learns_from is None else ((op.learns_from, flops if weight else 2 * flops),)),
            computed=before.computed or weight in op.dense,
            inputs_first=before.inputs_first or weight in op.inputs_first,
            from_input=() if weight else tuple(sorted(op.from_input)),
        )
    return ModelCost(
        layers=tuple(layers.values()),
        uncounted=dict(trace.uncounted),
        n_parameters=sum(p.numel() for p in parameters.values()),
    )


def _weight_learns(op: TracedOp, weight: str, parameters: Mapping[str, nn.Parameter]) -> bool:
    is_read = weight in op.parameters[: op.n_read]
    return any(parameters[name].requires_grad for name in ([weight] if is_read else op.parameters[op.n_read :]))


def _product_name(op: TracedOp, repeats: Counter[str]) -> str:
    name = f"{op.module}:{op.name.rpartition('.')[2]}"
    repeats[name] += 1
    return name if repeats[name] == 1 else f"{name}#{repeats[name]}"


def _per_sample(amount: int, batch_size: int) -> int:
    # Divides evenly unless an operation ignores the batch (a product of two parameters): then up, never to nothing.
    return -(-amount // batch_size)

"""Which modules of a model the kernels can stand in for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def linears_of(model: nn.Module, weights: Mapping[str, object]) -> dict[str, list[nn.Linear]]:
    """The linear layers of the weights that are named, by name of the weight; a weight without one is left out."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameters[name]): name for name in weights if name in parameters}
    found: dict[str, list[nn.Linear]] = {}
    for module in model.modules():
        name = names.get(id(module._parameters.get("weight")))
        if name is not None and isinstance(module, nn.Linear) and _is_plain(module):
            found.setdefault(name, []).append(module)
    return {name: found[name] for name in weights if name in found}


def _is_plain(module: nn.Linear) -> bool:
    """Does its own ``forward`` compute it? That of ``nn.MultiheadAttention``'s layer is never called."""
    return (
        not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
    )

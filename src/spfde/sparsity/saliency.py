"""Which weights matter before training: connection sensitivity, gradient flow and synaptic flow.

Pure functions from a model and a few batches to a score per weight, and from scores of all layers to one choice.
Gradients are taken by ``torch.autograd.grad``: parameters, their ``grad`` and ``requires_grad`` are only read. What a
forward pass in training mode does change, :func:`untouched` puts back.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from spfde.core.errors import InvalidArgument, Problem
from spfde.core.generators import GeneratorsRestored
from spfde.core.plain_kernels import uncompiled
from spfde.core.torch_private import tree_leaves, tree_map_only
from spfde.model.sample import Sample, call_arguments
from spfde.sparsity.masks import highest_overall
from spfde.sparsity.structure import Structure

ScoreLoss = Callable[[nn.Module, Any], Tensor]
"""The mean loss of a batch, called with the model and a batch of the loader."""
Weights = Mapping[str, nn.Parameter]
Scores = dict[str, Tensor]


@contextlib.contextmanager
def untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a model in training or evaluation mode and leave no trace: modes, buffers and global generators come back.

    Random layers draw from a seed of their own meanwhile, so that scores do not depend on the global generators.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, key, b) for module in model.modules() for key, b in module._buffers.items() if b is not None]
    values = [buffer.detach().clone() for _, _, buffer in buffers]
    try:
        # What is compiled has no second derivative, and would be compiled again for these few passes.
        with GeneratorsRestored(prepare=_seed), torch.enable_grad(), uncompiled():
            model.train(training)
            yield
    finally:
        with torch.no_grad():
            for (module, key, buffer), value in zip(buffers, values, strict=True):
                module._buffers[key] = buffer
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def _seed() -> None:
    # torch.manual_seed would also seed a CUDA context that is made later.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)


def connection_sensitivity(model: nn.Module, weights: Weights, batches: Sequence[Any], loss: ScoreLoss) -> Scores:
    """Score ``|w * g|``, ``g`` the gradient of the loss summed over the batches.

    Source: Lee et al. (SNIP, arXiv 1810.02340), section 4: the derivative by a gate on each connection.
    """
    gradients = _summed_gradients(model, weights, batches, loss)
    return {name: (w.detach() * g).abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def gradient_flow(
    model: nn.Module, weights: Weights, batches: Sequence[Any], loss: ScoreLoss, *, temperature: float
) -> Scores:
    """Score ``w * Hg``: how much of the squared gradient norm goes with a weight, to first order, half of it.

    ``H`` and ``g`` are the Hessian and the gradient, by the weights, of the loss summed over the batches. It is the
    negative of the paper's ``S = -w * Hg``, of which the highest are removed: here, too, the highest are kept. The
    gradient is found in a first pass; the second differentiates its product with the gradient of each batch.

    Args:
        temperature: divides the model's output, which must be a tensor then; 1 leaves it alone.

    Raises:
        InvalidArgument: the output is no tensor.

    Source: Wang et al. (GraSP, arXiv 2002.07376), section 4, and the released code (alecwangcq/GraSP).
    """
    parameters = list(weights.values())
    products = [torch.zeros_like(w) for w in parameters]
    # The fused kernels of attention have no second derivative.
    with _softened(model, temperature), sdpa_kernel(SDPBackend.MATH):
        gradients = _summed_gradients(model, weights, batches, loss)
        for batch in batches:
            value = _loss_of(model, batch, loss)
            ours = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
            dot = torch.stack([(g * mine).sum() for g, mine in zip(gradients, ours, strict=True)]).sum()
            if not dot.requires_grad:  # the loss is linear in every weight
                continue
            for total, part in zip(products, torch.autograd.grad(dot, parameters, materialize_grads=True), strict=True):
                total.add_(part)
    return {name: w.detach() * hg for (name, w), hg in zip(weights.items(), products, strict=True)}


def synaptic_flow(
    model: nn.Module, weights: Weights, sample: Sample, *, masks: Mapping[str, Tensor] | None = None
) -> Scores:
    """Score ``|w| * dR/d|w|``, where ``R`` sums what the model of absolute values makes of ones.

    It runs in double precision, for the flow through a deep network is a product over its layers. All floating-point
    parameters and buffers take part by their absolute values. Floating-point and integer inputs become ones; boolean
    ones stay, for they hide positions.

    Args:
        sample: what the model is called with.
        masks: the weights that exist, by name; None: all.

    Raises:
        InvalidArgument: the model cannot run in double precision.

    Source: Tanaka et al. (SynFlow, arXiv 2006.05467), section 6, and the released code (ganguli-lab/Synaptic-Flow),
    which takes absolute values of biases and of BatchNorm's tensors too, and runs in evaluation mode.
    """
    names = {id(weight): name for name, weight in weights.items()}
    linear: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for own, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        state[own] = _double(tensor.detach().abs()) if tensor.is_floating_point() else tensor.detach()
        name = names.get(id(tensor))
        if name is not None:
            value = state[own] if masks is None else state[own] * masks[name]
            linear[name] = state[own] = value.requires_grad_()
    device = next(iter(weights.values())).device
    args, kwargs = tree_map_only(Tensor, lambda tensor: _ones(tensor, device), call_arguments(sample))
    try:
        output = functional_call(model, state, args, kwargs)
    except RuntimeError as error:
        rule = f"cannot run in float64, which SynFlow needs ({error})"
        remedy = "Let its forward pass follow the type of its input, or use SNIP or GraSP."
        raise InvalidArgument(Problem("model", type(model).__name__, rule, remedy)) from error
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    total = torch.stack([leaf.sum() for leaf in outputs]).sum()
    values = [linear[name] for name in weights]
    gradients = torch.autograd.grad(total, values, materialize_grads=True)
    return {name: (w.detach() * g).abs() for name, w, g in zip(weights, values, gradients, strict=True)}


def choose_units(
    scores: Mapping[str, Tensor], structure: Structure, n: int, *, masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Masks of the ``n`` units of the highest scores over all layers together, at least one in each layer.

    A unit's score is the mean of its weights' scores, so that layers with large units have no advantage by size. A
    structure of fixed counts shares ``n`` out by size and takes the best of each layer. Ties go to the earlier layer
    and the lower index.

    Args:
        scores: of each weight, by layer, in the weights' shapes.
        n: units that exist, from one a layer to all.
        masks: the masks before; only what exists in them is chosen from. None: everything.
    """
    units = {name: structure.reduce(s, "sum") / structure.unit_size(s.shape) for name, s in scores.items()}
    among = None if masks is None else {name: structure.units_of(masks[name]) for name in scores}
    if structure.fixed_count:
        total = sum(len(score) for score in units.values())
        chosen = {name: structure.choose(score, len(score) * n // total) for name, score in units.items()}
    else:
        chosen = highest_overall(units, n, among=among)
    assert sum(int(c.sum()) for c in chosen.values()) == n, f"{n} units cannot be shared out"
    return {
        name: structure.expand(
            chosen[name], score.shape, previous=None if masks is None else masks[name], score=score, norm="sum"
        )
        for name, score in scores.items()
    }


def _summed_gradients(model: nn.Module, weights: Weights, batches: Sequence[Any], loss: ScoreLoss) -> list[Tensor]:
    parameters = list(weights.values())
    totals = [torch.zeros_like(w) for w in parameters]
    for batch in batches:
        gradients = torch.autograd.grad(_loss_of(model, batch, loss), parameters, materialize_grads=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total.add_(gradient)
    return [total.detach() for total in totals]


def _loss_of(model: nn.Module, batch: Any, loss: ScoreLoss) -> Tensor:
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        rule = "must return one number that depends on the model's weights, as a tensor"
        raise InvalidArgument(Problem("loss", value, rule, "Return the mean loss of the batch, not detached."))
    return value


@contextlib.contextmanager
def _softened(model: nn.Module, temperature: float) -> Iterator[None]:
    """Divide the model's output by ``temperature``, by a forward hook that is gone afterwards."""
    if temperature == 1.0:
        yield
        return

    def divide(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            rule = f"divides the model's output, which is no tensor but {type(output).__name__}"
            raise InvalidArgument(Problem("temperature", temperature, rule, "Set temperature=1.0, or use SNIP."))
        return output / temperature

    handle = model.register_forward_hook(divide)
    try:
        yield
    finally:
        handle.remove()


def _ones(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor.to(device)
    ones = torch.ones_like(tensor, device=device)
    return _double(ones) if ones.is_floating_point() else ones


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)  # mps has no float64

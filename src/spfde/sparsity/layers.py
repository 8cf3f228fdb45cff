"""Which tensors of a model are masked, and which large ones are not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from spfde.core.errors import InvalidArgument, Problem, Problems, nearest
from spfde.model.trace import memory_shared_by
from spfde.sparsity.methods import SparsityMethod
from spfde.sparsity.structure import Unstructured

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_WEIGHTED = (*_CONVOLUTIONS, nn.Linear)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_KEEPS_NO_ZEROS = "computed before use in a way that keeps no zeros"
_FROM_INPUT = "computed from the model's input before use"
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class LeftDense:
    """A weight of a product that learns and is not masked, although the recipe is sparse."""

    name: str
    numel: int
    reason: str


def select_layers(
    model: nn.Module,
    method: SparsityMethod,
    *,
    order: Sequence[str],
    head: Sequence[str],
    computed: Collection[str] = (),
    from_input: Collection[str] = (),
    inputs_first: Collection[str] = (),
) -> dict[str, nn.Parameter]:
    """The weights that ``method`` masks, by qualified name in order of execution.

    Masked are the weights of convolutions, ``nn.Linear`` and ``nn.MultiheadAttention`` that run and learn; never
    norms, biases, embeddings (nor a weight shared with one), one-dimensional tensors and parameters without gradient.
    Depthwise convolutions have few weights and little to spare: they are masked only where ``include`` names them. So
    are the weights of products outside these layers (bare parameters, recurrent layers, layers of others), from two
    dimensions on. A weight that is computed before it is used, from the model's input or in a way that keeps no zeros,
    is never masked.
    With sparsity 0 everywhere nothing is masked.

    Args:
        model: the user's own module.
        method: its ``include``, ``exclude``, ``overrides``, ``dense_first`` and ``dense_head`` decide.
        order: names of the weights in order of execution; what is missing here never runs and is left alone.
        head: names of the parameters of the classifier head.
        computed: names of the weights that are computed before they are used, in a way that keeps no zeros.
        from_input: names of the parameters that weights are computed from together with the model's input.
        inputs_first: names of the weights that are (in, out), or of a layout that is not known.

    Raises:
        InvalidArgument: a pattern matches nothing or a computed weight alone, nothing is left to mask, two parameters
            that are not one share memory, or the structure does not fit a weight's layout.
    """
    if method.sparsity == 0.0 and not any(method.overrides.values()):
        return {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    standard = dict(_standard(model))
    nameable = _nameable(model, parameters)
    known = [name for name in dict.fromkeys(order) if name in standard or name in nameable]
    lost = dict.fromkeys((name for name in known if name in computed), _KEEPS_NO_ZEROS)
    lost |= dict.fromkeys((name for name in from_input if name in nameable), _FROM_INPUT)
    candidates = [name for name in known if name not in lost]
    by_default = [name for name in candidates if name in standard]
    if not by_default and not method.include:
        raise _nothing_to_prune(model, candidates, lost=lost)
    dense = set(head) if method.dense_head else set()
    if method.dense_first and (by_default or candidates):
        dense.add((by_default or candidates)[0])
    if method.include:
        included = [name for name in candidates if _any_match(name, method.include)]
    else:
        included = [name for name in by_default if not _is_depthwise(standard[name])]
    selected = [name for name in included if name not in dense and not _any_match(name, method.exclude)]
    problems = Problems()
    _check_patterns(problems, method, candidates, selected, lost=lost)
    _check_layouts(problems, method, [name for name in selected if name not in standard and name in inputs_first])
    _check_memory(problems, parameters, selected)
    if not selected and not problems.found:
        rule = f"leaves none of the {len(candidates)} prunable layers to mask: {', '.join(candidates)}"
        if lost:
            rule += f"; {_described(lost)} cannot be masked"
        remedy = "Widen include and exclude, or set dense_first=False or dense_head=False."
        problems.add("sparsity", method, rule, remedy)
    problems.raise_if_any()
    return {name: parameters[name] for name in selected}


def left_dense(
    model: nn.Module,
    method: SparsityMethod,
    *,
    order: Sequence[str],
    head: Sequence[str],
    selected: Collection[str],
    computed: Collection[str] = (),
    from_input: Collection[str] = (),
) -> list[LeftDense]:
    """The weights of products that learn and are not masked, though nothing in ``method`` says so.

    Embeddings, depthwise convolutions and what ``exclude``, ``dense_first`` and ``dense_head`` name are not among them.

    Args:
        model: the user's own module.
        method: what masks.
        order: names of the weights of products, in order of execution.
        head: names of the parameters of the classifier head.
        selected: names of the weights that are masked.
        computed: names of the weights that are computed before they are used, in a way that keeps no zeros.
        from_input: names of the parameters that weights are computed from together with the model's input.
    """
    if not selected or method.include:
        return []  # the user has named what is to be masked
    parameters = dict(model.named_parameters(remove_duplicate=False))
    standard, nameable = dict(_standard(model)), _nameable(model, parameters)
    found = []
    for name in dict.fromkeys((*order, *from_input)):
        is_asked = name in selected or name in head or _any_match(name, method.exclude)
        if is_asked or name not in nameable:
            continue
        if name in computed:
            reason = f"{_type_of_owner(name, model)} computes its weight before using it, which keeps no zeros"
            found.append(LeftDense(name, parameters[name].numel(), reason))
        elif name in from_input:
            reason = f"{_type_of_owner(name, model)} computes its weight from the model's input"
            found.append(LeftDense(name, parameters[name].numel(), reason))
        elif name not in standard:
            reason = f"a weight of {_type_of_owner(name, model)} is masked where include names it"
            found.append(LeftDense(name, parameters[name].numel(), reason))
    return found


def describe_left(weights: Sequence[LeftDense]) -> str:
    """The weights by name, with the reason once for all that have the same."""
    reasons = dict.fromkeys(weight.reason for weight in weights)
    by_reason = {reason: [weight.name for weight in weights if weight.reason == reason] for reason in reasons}
    return "; ".join(f"{_listed(names)} ({reason})" for reason, names in by_reason.items())


def _type_of_owner(name: str, model: nn.Module) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def _nothing_to_prune(model: nn.Module, others: Sequence[str], *, lost: Mapping[str, str]) -> InvalidArgument:
    """Says which weights there are, where there are any."""
    remedy = "Use sparsity=None, or a model with convolutions, nn.Linear or nn.MultiheadAttention that learn."
    if others:
        remedy = f"Name the weights to be masked in include; there are {_listed(others)}."
    rule = "has no prunable layers"
    if lost:
        rule += f": {_described(lost)} cannot be masked"
    return InvalidArgument(Problem("model", type(model).__name__, rule, remedy))


def _described(lost: Mapping[str, str]) -> str:
    """Weights that cannot be masked, with the reason once for all that have the same."""
    reasons = dict.fromkeys(lost.values())
    return "; ".join(f"{_listed([name for name in lost if lost[name] == reason])}, {reason}," for reason in reasons)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _standard(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names of all weights that are masked by default, tied ones under each of their names, and their modules."""
    embedded = _embedded(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        names: tuple[str, ...] = ()
        if isinstance(module, _WEIGHTED):
            names = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            names = _ATTENTION_WEIGHTS
        for name in names:
            # A parametrised weight is a computed tensor here: its parts are no weights to mask.
            weight = module._parameters.get(name)
            if weight is not None and weight.dim() >= 2 and weight.requires_grad and id(weight) not in embedded:
                yield f"{prefix}.{name}" if prefix else name, module


def _embedded(model: nn.Module) -> set[int]:
    """Ids of the weights of embeddings."""
    return {id(p) for module in model.modules() if isinstance(module, _EMBEDDINGS) for p in module.parameters()}


def _nameable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The weights that ``include`` may name: matrices that learn and are no embedding's."""
    embedded = _embedded(model)
    return {name for name, p in parameters.items() if p.dim() >= 2 and p.requires_grad and id(p) not in embedded}


def _is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution that treats each input channel by itself."""
    return isinstance(module, _CONVOLUTIONS) and module.groups == module.in_channels > 1


def _check_patterns(
    problems: Problems,
    method: SparsityMethod,
    candidates: Sequence[str],
    selected: Sequence[str],
    *,
    lost: Mapping[str, str],
) -> None:
    for field, patterns in (("include", method.include), ("exclude", method.exclude)):
        for pattern in patterns:
            if any(fnmatchcase(name, pattern) for name in candidates):
                continue
            matched = {name: reason for name, reason in lost.items() if fnmatchcase(name, pattern)}
            if field == "exclude" and matched:
                continue
            if matched:
                rule = f"matches {_described(matched)} and no other"
                problems.add(field, pattern, rule, "Leave it dense, or use the parameter as it is.")
            else:
                problems.add(field, pattern, "matches no prunable weight", nearest(pattern, candidates))
    for pattern in method.overrides:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            problems.add("overrides", pattern, "matches no prunable weight", nearest(pattern, candidates))
        elif not any(fnmatchcase(name, pattern) for name in selected):
            remedy = (
                "Name depthwise convolutions and weights outside standard layers in include, set dense_first=False or "
                "dense_head=False, or correct include and exclude."
            )
            problems.add("overrides", pattern, "matches only weights that stay dense", remedy)


def _check_layouts(problems: Problems, method: SparsityMethod, inputs_first: Sequence[str]) -> None:
    """Structures count outputs along the first dimension."""
    if inputs_first and not isinstance(method.structure, Unstructured):
        rule = f"needs weights of (out, in), and {_listed(inputs_first)} is used as (in, out), or in more dimensions"
        remedy = "Use structure=Unstructured() for it, or leave it out of include."
        problems.add("structure", method.structure, rule, remedy)


def _check_memory(problems: Problems, parameters: Mapping[str, nn.Parameter], selected: Collection[str]) -> None:
    """A mask on memory that another parameter has, too, would not be kept."""
    distinct = {id(p): name for name, p in reversed(list(parameters.items()))}
    for one, other in memory_shared_by({name: parameters[name] for name in distinct.values()}):
        if one in selected or other in selected:
            rule = f"shares memory (a storage) with '{other}', and they are two parameters"
            remedy = "Tie them by giving both modules one nn.Parameter, make one a copy, or leave both out by exclude."
            problems.add("model", one, rule, remedy)


def _any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

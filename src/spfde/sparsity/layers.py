"""Which tensors of a model are masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from spfde.core.errors import InvalidArgument, Problem, Problems, nearest
from spfde.sparsity.methods import SparsityMethod

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
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def select_layers(
    model: nn.Module, method: SparsityMethod, *, order: Sequence[str], head: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The weights that ``method`` masks, by qualified name in order of execution.

    Masked are the weights of convolutions, ``nn.Linear`` and ``nn.MultiheadAttention`` that run and learn; never
    norms, biases, embeddings (nor a weight shared with one), one-dimensional tensors and parameters without gradient.
    Depthwise convolutions have few weights and little to spare: they are masked only where ``include`` names them.
    With sparsity 0 everywhere nothing is masked.

    Args:
        model: the user's own module.
        method: its ``include``, ``exclude``, ``overrides``, ``dense_first`` and ``dense_head`` decide.
        order: names of the weights in order of execution; what is missing here never runs and is left alone.
        head: names of the parameters of the classifier head.

    Raises:
        InvalidArgument: a pattern matches nothing, or nothing is left to mask.
    """
    if method.sparsity == 0.0 and not any(method.overrides.values()):
        return {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    maskable = dict(_maskable(model))
    candidates = [name for name in dict.fromkeys(order) if name in maskable]
    if not candidates:
        remedy = "Use sparsity=None, or a model with convolutions, nn.Linear or nn.MultiheadAttention that learn."
        raise InvalidArgument(Problem("model", type(model).__name__, "has no prunable layers", remedy))
    dense = set(head) if method.dense_head else set()
    if method.dense_first:
        dense.add(candidates[0])
    if method.include:
        included = [name for name in candidates if _any_match(name, method.include)]
    else:
        included = [name for name in candidates if not _is_depthwise(maskable[name])]
    selected = [name for name in included if name not in dense and not _any_match(name, method.exclude)]
    problems = Problems()
    _check_patterns(problems, method, candidates, selected)
    if not selected and not problems.found:
        rule = f"leaves none of the {len(candidates)} prunable layers to mask: {', '.join(candidates)}"
        remedy = "Widen include and exclude, or set dense_first=False or dense_head=False."
        problems.add("sparsity", method, rule, remedy)
    problems.raise_if_any()
    return {name: parameters[name] for name in selected}


def _maskable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names of all weights that may be masked, tied ones under each of their names, and the modules that have them."""
    embedded = {id(p) for module in model.modules() if isinstance(module, _EMBEDDINGS) for p in module.parameters()}
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


def _is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution that treats each input channel by itself."""
    return isinstance(module, _CONVOLUTIONS) and module.groups == module.in_channels > 1


def _check_patterns(
    problems: Problems, method: SparsityMethod, candidates: Sequence[str], selected: Sequence[str]
) -> None:
    for field, patterns in (("include", method.include), ("exclude", method.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                problems.add(field, pattern, "matches no prunable weight", nearest(pattern, candidates))
    for pattern in method.overrides:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            problems.add("overrides", pattern, "matches no prunable weight", nearest(pattern, candidates))
        elif not any(fnmatchcase(name, pattern) for name in selected):
            remedy = (
                "Name depthwise convolutions in include, set dense_first=False or dense_head=False, or correct "
                "include and exclude."
            )
            problems.add("overrides", pattern, "matches only weights that stay dense", remedy)


def _any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

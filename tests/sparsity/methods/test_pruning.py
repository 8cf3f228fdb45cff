import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spfde.core.errors import InvalidArgument
from spfde.sparsity import saliency
from spfde.sparsity.block import Block
from spfde.sparsity.masker import Masker
from spfde.sparsity.methods.pruning import SNIP, GraSP, PruningAtInitialisation, SynFlow
from spfde.sparsity.structure import NM, Channels, Kernels, Patterns, Structure, Unstructured

_METHODS: list[PruningAtInitialisation] = [
    SNIP(sparsity=0.9),
    GraSP(sparsity=0.9, n_batches=2),
    SynFlow(sparsity=0.9, iterations=10),
]
_STRUCTURES: list[Structure] = [Unstructured(), Block(), NM(), Kernels(), Patterns(), Channels()]


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
        )  # fmt: skip


def _batches(n: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 4, 8, 8, generator=generator), torch.arange(6) % 4) for _ in range(n)]


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def _select(
    method: PruningAtInitialisation, model: nn.Module, units: int, structure: Structure | None = None
) -> dict[str, Tensor]:
    batches = _batches() if method.n_batches else []
    if structure is not None:
        method = method.model_copy(update={"structure": structure})
    return method.select(
        model, _weights(model), units=units, batches=batches, loss=_loss,
        sample=(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),),
    )  # fmt: skip


def _named(value: Any) -> str:
    return f"{type(value).__name__}"


@pytest.mark.parametrize("structure", _STRUCTURES, ids=_named)
@pytest.mark.parametrize("method", _METHODS, ids=_named)
def test_units_are_exact_over_all_layers_and_the_model_stays_as_it_was(
    method: PruningAtInitialisation, structure: Structure
) -> None:
    model = _net()
    before = copy.deepcopy(model.state_dict())
    total = sum(structure.n_units(w.shape) for w in _weights(model).values())
    units = total // 2 if structure.fixed_count else max(3, total // 4)
    masks = _select(method, model, units, structure)
    assert list(masks) == list(_weights(model))
    for name, weight in _weights(model).items():
        assert masks[name].dtype == torch.bool
        assert masks[name].shape == weight.shape
        assert masks[name].any()
        assert weight.grad is None
    assert sum(int(structure.units_of(mask).sum()) for mask in masks.values()) == units
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = _select(method, model.to(memory_format=torch.channels_last), units, structure)
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_snip_keeps_the_largest_product_of_weight_and_gradient() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0], [4.0, 0.5]]))
    # The loss is the sum of outputs on the inputs (1, 3): gradients 1 and 3, sensitivities 1, 3, 4, 1.5.
    masks = SNIP(sparsity=0.5).select(
        model, {"weight": model.weight}, units=2, batches=[torch.tensor([[1.0, 3.0]])],
        loss=lambda m, batch: m(batch).sum(), sample=torch.ones(1, 2),
    )  # fmt: skip
    assert masks["weight"].tolist() == [[False, True], [True, False]]


def test_grasp_removes_the_highest_of_the_papers_scores() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, -1.0]]))
    # Loss y²/2 on the input (1, 1, 2): y = 1, g = (1, 1, 2), H = g gᵀ, Hg = 6 g, S = -w * Hg = (-6, -12, 12).
    arguments: dict[str, Any] = {
        "batches": [torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64)],
        "loss": lambda m, batch: 0.5 * m(batch).square().sum(), "sample": torch.ones(1, 3, dtype=torch.float64),
    }  # fmt: skip
    score = saliency.gradient_flow(
        model, {"weight": model.weight}, arguments["batches"], arguments["loss"], temperature=1.0
    )
    assert score["weight"].tolist() == [[6.0, 12.0, -12.0]]
    masks = GraSP(sparsity=0.3, temperature=1.0).select(model, {"weight": model.weight}, units=2, **arguments)
    assert masks["weight"].tolist() == [[True, True, False]]


def _chain(width: int = 30, depth: int = 6) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(width if i else 4, width if i < depth - 1 else 3, bias=False) for i in range(depth)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


def test_synflow_leaves_a_path_through_a_chain_at_99_9_percent_sparsity() -> None:
    model = _chain(width=100)
    units = round(sum(w.numel() for w in _weights(model).values()) * 0.001)
    masks = SynFlow(sparsity=0.999).select(
        model, _weights(model), units=units, batches=[], loss=_loss, sample=torch.ones(1, 4)
    )
    flow: Tensor = torch.ones(4)
    for mask in masks.values():
        flow = mask.float() @ flow
    assert sum(int(mask.sum()) for mask in masks.values()) == units == 41
    # Not by the best weight of each layer alone, which any method keeps: they hang together.
    assert flow.any()


@pytest.mark.long
def test_synflow_in_one_round_is_not_synflow_in_many() -> None:
    model = _chain()
    arguments: dict[str, Any] = {
        "units": 60, "batches": [], "loss": _loss, "sample": torch.ones(1, 4)
    }  # fmt: skip
    once = SynFlow(sparsity=0.9, iterations=1).select(model, _weights(model), **arguments)
    often = SynFlow(sparsity=0.9).select(model, _weights(model), **arguments)
    assert any(not torch.equal(once[name], often[name]) for name in once)


def test_the_rounds_of_synflow_fall_exponentially_to_the_target() -> None:
    assert SynFlow(sparsity=0.9, iterations=2).rounds(10, 1000) == [100, 10]
    assert SynFlow(sparsity=0.9, iterations=3).rounds(1, 1000) == [100, 10, 1]
    rounds = SynFlow(sparsity=0.9).rounds(123, 45678)
    assert len(rounds) == 100
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[-1] == 123


@pytest.mark.parametrize("method", _METHODS, ids=_named)
def test_a_tied_weight_cannot_have_two_masks(method: PruningAtInitialisation) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    weights = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: weights[name] for name in ("0.weight", "1.weight")}
    with pytest.raises(InvalidArgument, match=r"1\.weight.*0\.weight"):
        method.select(
            model, weights, units=4, batches=[torch.ones(1, 4)],
            loss=lambda m, batch: m(batch).square().sum(), sample=torch.ones(1, 4),
        )  # fmt: skip


def test_scoring_by_data_needs_data() -> None:
    model = _net()
    with pytest.raises(InvalidArgument, match="batches"):
        SNIP(sparsity=0.9).select(model, _weights(model), units=9, batches=[], loss=_loss, sample=torch.ones(1))


@pytest.mark.parametrize("method", _METHODS, ids=_named)
@pytest.mark.parametrize(("value", "rule"), [(float("nan"), "finite"), (0.0, "every weight 0")])
def test_weights_that_say_nothing_are_an_error(method: PruningAtInitialisation, value: float, rule: str) -> None:
    model = _net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    with pytest.raises(InvalidArgument, match=rule):
        _select(method, model, 50)


@pytest.mark.parametrize(
    "fields", [{"n_batches": 1}, {"iterations": 0}, {"samples": 3}], ids=lambda fields: next(iter(fields))
)
def test_fields_that_synflow_cannot_have_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(fields))):
        SynFlow(sparsity=0.9, **fields)


@pytest.mark.parametrize(
    ("field", "value"), [("distribution", "erk"), ("overrides", {"*": 0.5}), ("init", "magnitude")]
)
def test_what_the_scores_decide_cannot_be_asked_for(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=field):
        SNIP(**{"sparsity": 0.9, field: value})


@pytest.mark.parametrize("method", _METHODS, ids=_named)
def test_the_modelled_flops_of_scoring_are_those_that_are_counted(method: PruningAtInitialisation) -> None:
    model = nn.Sequential(*[module for _ in range(12) for module in (nn.Linear(8, 8), nn.Tanh())])
    batches = [torch.randn(5, 8) for _ in range(method.n_batches)]
    counter = FlopCounterMode(display=False)
    with counter:
        method.select(
            model, _weights(model), units=100, batches=batches,
            loss=lambda m, batch: m(batch).square().mean(), sample=torch.ones(1, 8),
        )  # fmt: skip
    modelled = method.scoring_flops(12 * 2 * 8 * 8, samples=10, batch_size=5)
    # The first layer's input needs no gradient, which the model leaves out.
    assert 0.9 * modelled < counter.get_total_flops() <= modelled


def test_a_wrapped_model_is_scored_as_the_module_inside() -> None:
    model = _net()
    plain = _select(SNIP(sparsity=0.9), model, 50)
    wrapped = nn.DataParallel(model)
    masks = SNIP(sparsity=0.9).select(
        wrapped, _weights(model), units=50, batches=_batches(), loss=_loss,
        sample=torch.ones(1, 4, 8, 8),
    )  # fmt: skip
    assert all(torch.equal(masks[name], plain[name]) for name in plain)


def test_a_small_layer_that_loses_weights_to_the_others_is_masked_too() -> None:
    # At 10 % the small layer's own share would be all of its four weights; the scores take two of them.
    layers = {"small": nn.Parameter(torch.tensor([[1.0, 2.0, 0.1, 0.2]])), "large": nn.Parameter(torch.ones(1, 16))}
    masks = {"small": torch.tensor([[True, True, False, False]]), "large": torch.ones(1, 16, dtype=torch.bool)}
    optimizer = torch.optim.SGD(layers.values(), lr=0.1)
    masker = Masker(layers, optimizer, SNIP(sparsity=0.1), generator=torch.Generator(), masks=masks)
    masker.install()
    sum(p.sum() for p in layers.values()).backward()
    optimizer.step()
    assert layers["small"].tolist() == [[pytest.approx(0.9), pytest.approx(1.9), 0.0, 0.0]]
    assert masker.densities() == {"small": 0.5, "large": 1.0}

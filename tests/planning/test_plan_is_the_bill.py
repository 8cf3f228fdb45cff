"""What is planned is what happens: random recipes on random small models, followed epoch by epoch.

The loop takes the loader's batches, and every batch has the sample's shape. For methods whose counts are known
beforehand the finished bill is the plan's; for the others, and for blocks that are frozen when they have converged, it
is the price of the timeline as the run amended it. What the timeline says is looked up in the model and the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.short import pairs
from spfde.core.registry import registered
from spfde.cost import EpochCost
from spfde.planning.bill import planned_dense_samples, price, scoring_flops
from spfde.planning.timeline import Row
from spfde.sparsity import DropGrow, PruningAtInitialisation, SparsityMethod

METHODS = registered("method")

pytestmark = pytest.mark.filterwarnings("ignore:update_interval_epochs is 1")

CLASSES = 4


@dataclass(frozen=True)
class Case:
    """What is drawn: a model, its data, and a run."""

    model: tuple[str, tuple[int, ...]]
    recipe: spfde.Recipe
    epochs: int
    samples: int
    batch: int
    seed: int

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        kind, widths = self.model
        return {"mlp": _mlp, "conv": _conv, "attention": _attention}[kind](widths)

    @property
    def inputs(self) -> Tensor:
        shape = (2, 6, 6) if self.model[0] == "conv" else (4, 8) if self.model[0] == "attention" else (6,)
        return torch.randn(self.samples, *shape, generator=torch.Generator().manual_seed(self.seed))


def _mlp(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((6, *widths), widths, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


def _conv(widths: tuple[int, ...]) -> nn.Module:
    width = widths[0]
    blocks = [_Residual(width) for _ in widths]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(nn.Conv2d(2, width, 3, padding=1), *blocks, *head)


def _attention(widths: tuple[int, ...]) -> nn.Module:
    layers = [nn.TransformerEncoderLayer(8, 2, width, dropout=0.0, batch_first=True) for width in widths]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, CLASSES))


SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
STOPS = st.sampled_from([0.25, 0.5, 0.75, 1.0])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "drop_fraction": SHARES,
    "soft_bound": st.sampled_from([0.0, 0.05, 0.3]),
    "stop_fraction": STOPS,
    "decay": st.sampled_from(["cosine", "constant"]),
    "drop": st.sampled_from(["magnitude", "magnitude-plus-gradient", "random", "gradient"]),
    "grow": st.sampled_from(["random", "gradient"]),
    "exploration": SHARES,
    "initial_sparsity": st.sampled_from([0.0, 0.3]),
    "gradient_weight": st.sampled_from([0.0, 0.5]),
    "threshold_start": st.just(-3.0),
    "threshold_decay": st.sampled_from([0.1, 2.0]),
    "threshold": st.sampled_from([1e-3, 0.1]),
    "noise": st.sampled_from([0.0, 3.0]),
    "iterations": st.just(3),
    "n_batches": st.just(1),
}
"""Fields of methods, where they have them."""

STRUCTURES = [
    spfde.Unstructured(),
    spfde.Block(rows=2, columns=1),
    spfde.Block(rows=1, columns=2),
    spfde.Kernels(),
    spfde.Channels(),
    spfde.NM(n=1, m=2),
]


@st.composite
def methods(draw: st.DrawFn) -> SparsityMethod:
    """Any method, with fields that it takes and a structure that may fit."""
    kind = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    structure = draw(st.sampled_from(STRUCTURES if kind.structured else STRUCTURES[:1]))
    own: dict[str, Any] = {"sparsity": 0.5 if structure.fixed_count else draw(st.sampled_from([0.3, 0.5, 0.8, 0.95]))}
    if not issubclass(kind, PruningAtInitialisation):
        own["distribution"] = "uniform" if structure.fixed_count else draw(st.sampled_from(["uniform", "erk"]))
        if not structure.fixed_count and draw(st.booleans()):
            own["overrides"] = {"*1*": draw(st.sampled_from([0.0, 0.6]))}
    for name, values in FIELDS.items():
        if name in kind.model_fields and not (name == "n_batches" and kind.name == "synflow"):
            own[name] = draw(values if name != "soft_bound" or kind is DropGrow else st.booleans())
    own["dense_first"], own["dense_head"] = draw(st.booleans()), draw(st.booleans())
    try:
        return kind(structure=structure, **own)
    except spfde.InvalidArgument:  # a structure that fixes the counts, and a method that varies them
        assume(False)
        raise


@st.composite
def freezings(draw: st.DrawFn, interval: int) -> spfde.ProgressiveFreezing:
    """Any scheme, from a start or for a share of the FLOPs, as far as that can be reached."""
    scheme = draw(st.sampled_from(["single-shot", "single-shot-resume", "periodic", "delayed-periodic"]))
    own: dict[str, Any] = {"scheme": scheme, "as_far_as_possible": True, "fraction": draw(st.sampled_from([0.4, 1.0]))}
    own["flops_reduction"] = draw(st.sampled_from([0.05, 0.2, 0.5]))
    if scheme != "periodic" and draw(st.booleans()):
        own["start_epoch"] = interval * draw(st.integers(0, 2))
    if scheme == "single-shot-resume" and draw(st.booleans()):
        own["resume_epochs"] = interval
    if scheme == "single-shot" and draw(st.booleans()):
        own["criterion"] = draw(st.sampled_from(["structure", "representation"]))
        own["threshold"], own["probe_samples"] = 0.3, 4
    return spfde.ProgressiveFreezing(**own)


def sievings(interval: int) -> st.SearchStrategy[spfde.DataSieving | spfde.OneTimeRemoval | None]:
    """No sieving, or any, out of step by less than the interval."""
    return st.one_of(
        st.none(),
        st.builds(
            spfde.DataSieving,
            removed_fraction=st.sampled_from([0.0, 0.2, 0.5]),
            criterion=st.sampled_from(["forgetting", "loss", "random", "top-loss", "repeated-random"]),
            full_last=st.sampled_from([0.0, 0.0, 0.125, 0.4]),
            offset_epochs=st.integers(0, interval - 1),
        ),
        st.builds(
            spfde.OneTimeRemoval,
            removed_fraction=st.sampled_from([0.0, 0.3]),
            at_fraction=st.sampled_from([0.2, 0.5, 0.9]),
            criterion=st.just("loss"),
        ),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    interval = draw(st.integers(1, 3))
    widths = draw(st.lists(st.sampled_from([4, 6, 8]), min_size=2, max_size=4))
    recipe = spfde.Recipe(
        sparsity=draw(methods()) if draw(st.integers(0, 7)) else None,
        freezing=draw(freezings(interval)) if draw(st.integers(0, 2)) else None,
        sieving=draw(sievings(interval)),
        learning_rate=draw(st.none() | st.just(spfde.BlockwiseCosine(final=0.001))),
        update_interval_epochs=interval,
    )
    return Case(
        model=(draw(st.sampled_from(["mlp", "conv", "attention"])), tuple(widths)),
        recipe=recipe,
        epochs=draw(st.integers(interval, 8)),
        samples=draw(st.integers(8, 24)),
        batch=draw(st.integers(2, 9)),
        seed=draw(st.integers(0, 3)),
    )


@dataclass
class Seen:
    """What was looked up in a model at the bottom of an epoch."""

    active: dict[str, int]
    frozen: dict[str, bool]
    rates: list[float]
    samples: int


def run(case: Case) -> tuple[spfde.Plan, spfde.Session, list[Seen]]:
    """Plan a case, and train it."""
    model, x = case.build(), case.inputs
    y = torch.arange(case.samples) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    loader = DataLoader(
        TensorDataset(x, y), batch_size=case.batch, shuffle=True, generator=torch.Generator().manual_seed(case.seed)
    )
    plan = spfde.plan(model, x[:1], case.recipe, case.epochs, case.samples, batch_size=case.batch)
    session = spfde.attach(model, optimizer, loader, case.recipe, epochs=case.epochs, plan=plan, engine="masked")
    seen = []
    for _ in session.epochs():
        n = 0
        for inputs, labels in session.loader:
            logits = model(inputs)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(logits, labels)
            n += len(labels)
        seen.append(
            Seen(
                active={name: int(mask.sum()) for name, mask in session.masks.items()},
                frozen={name: not p.requires_grad for name, p in model.named_parameters()},
                rates=sorted({float(group["lr"]) for group in optimizer.param_groups}),
                samples=n,
            )
        )
    return plan, session, seen


def cost_of(row: Any) -> EpochCost:
    """The modelled cost in a row of the bill."""
    return EpochCost(**{field.name: getattr(row, field.name) for field in fields(EpochCost)})


def priced(case: Case, plan: spfde.Plan, row: Row, overhead_flops: int) -> EpochCost:
    return price(
        plan.blueprint,
        row,
        samples=row.samples,
        population=case.samples,
        dense_gradient_samples=planned_dense_samples(row, case.batch),
        overhead_flops=overhead_flops,
    )


def check(case: Case) -> str:
    """Compare plan, bill and run; says what kind of case it was."""
    plan, session, seen = run(case)
    recipe, blueprint = case.recipe, plan.blueprint
    adapts = recipe.freezes and recipe.freezing is not None and recipe.freezing.adapts
    is_known = (blueprint.method is None or blueprint.method.counts_known) and not adapts
    bill = [cost_of(row) for row in session.cost.rows]
    scoring = scoring_flops(blueprint, samples=case.samples, batch_size=case.batch)
    assert bill[0].overhead_flops >= scoring
    for row, cost in zip(session.timeline, bill, strict=True):
        assert priced(case, plan, row, cost.overhead_flops) == cost
    if is_known:
        assert session.timeline.rows == plan.timeline.rows
        assert bill == list(plan.epoch_costs)
    elif not adapts:
        assert [cost.overhead_flops for cost in bill] == [cost.overhead_flops for cost in plan.epoch_costs]

    blocks = {name: index for index, block in enumerate(blueprint.partition.blocks) for name in block.parameters}
    for row, found in zip(session.timeline, seen, strict=True):
        assert found.samples == row.samples
        for name, layer in row.layers.items():
            if blueprint.method is not None and blueprint.method.name != "str":  # falls from step to step
                assert found.active[name] == layer.active * blueprint.masked[name].unit_size
            assert layer.frozen == found.frozen[name]
        assert {name for name, at in blocks.items() if at < row.frozen_blocks} == {
            n for n, no in found.frozen.items() if no
        }
        if row.rates:
            wanted = {round(0.001 + 0.019 * factor, 9) for factor in row.rates}
            assert {round(value, 9) for value in found.rates} <= wanted
    assert [row.samples for row in session.cost.rows] == [found.samples for found in seen]
    return f"{'known' if is_known else 'amended'}: {blueprint.method.name if blueprint.method else 'dense'}"


def check_or_pass_over(case: Case) -> None:
    """Cases that do not fit together are refused by name, and are none."""
    try:
        event(check(case))
    except spfde.InvalidArgument as error:
        event("refused: " + ", ".join(sorted({problem.argument.split(".")[0] for problem in error.problems})))
        assume(False)


QUICK = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@QUICK
@given(case=cases())
def test_the_finished_bill_is_the_plan(case: Case) -> None:
    check_or_pass_over(case)


@pytest.mark.long
@pytest.mark.timeout(3000)
@settings(QUICK, max_examples=1500)
@given(case=cases())
def test_the_finished_bill_is_the_plan_for_many_recipes(case: Case) -> None:
    check_or_pass_over(case)


SCHEMES = ("none", "single-shot", "single-shot-resume", "periodic", "delayed-periodic")


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *pairs([name for name in METHODS if name != "synflow"], SCHEMES),
        *(pytest.param("synflow", scheme, marks=pytest.mark.long) for scheme in SCHEMES),
    ],
)
def test_every_method_under_every_scheme_costs_what_was_planned(name: str, scheme: str) -> None:
    freezing = None
    if scheme != "none":
        freezing = spfde.ProgressiveFreezing(flops_reduction=0.15, scheme=scheme, as_far_as_possible=True)
    own = {"n_batches": 1} if name == "grasp" else {}
    recipe = spfde.Recipe(
        sparsity=METHODS[name](sparsity=0.7, **own),
        freezing=freezing,
        sieving=spfde.DataSieving(removed_fraction=0.25),
        learning_rate=spfde.BlockwiseCosine(final=0.001),
        update_interval_epochs=2,
    )
    check(Case(("mlp", (8, 8, 6, 8)), recipe, epochs=9, samples=20, batch=6, seed=0))


def test_a_bill_that_differs_is_noticed() -> None:
    """The property can fail: one sample more in one epoch is another bill."""
    case = Case(("mlp", (8, 8)), spfde.Recipe(sparsity=METHODS["set"](sparsity=0.7)), 3, 12, 4, 0)
    plan, session, _ = run(case)
    costs = [cost_of(row) for row in session.cost.rows]
    assert costs == list(plan.epoch_costs)
    assert priced(case, plan, replace(plan.timeline[1], samples=13), 0) != costs[1]

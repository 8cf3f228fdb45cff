"""Freezing as soon as a block has converged: by structure, by representation, at the latest as planned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spfde
from helpers.native import needs_kernels
from helpers.resuming import assert_equal, everything
from helpers.training import BATCH, EPOCHS, SAMPLES, make_parts, train
from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.model.blocks import Block
from spfde.session.convergence import Convergence, StructureCriterion
from spfde.session.distributed import World


def block(name: str) -> Block:
    return Block(name=name, parameters=(f"{name}.weight",), modules=(name,), start=0, stop=1, n_layers=1)


class Scripted:
    """A criterion whose similarities are written down beforehand."""

    samples = 3

    def __init__(self, similarities: list[float]) -> None:
        self.left = list(similarities)

    def look(self, blocks: Any) -> dict[str, Tensor]:
        return {each.name: torch.zeros(1, dtype=torch.uint8) for each in blocks}

    def similarity(self, before: Tensor, now: Tensor) -> float:
        return self.left.pop(0)


def scripted(similarities: list[float], **more: Any) -> tuple[spfde.Session, Scripted]:
    """A session whose plan freezes blocks late, one an update, and whose looks are those."""
    _, session = attach(adaptive("structure", 0.9, flops_reduction=0.0, start_epoch=6, **more))
    criterion = Scripted(similarities)
    convergence_of(session)._criterion = criterion
    return session, criterion


def convergence_of(session: spfde.Session) -> Convergence:
    return next(part for part in session._parts if isinstance(part, Convergence))


def test_a_block_that_has_converged_comes_to_its_target_and_is_frozen_at_the_next_update() -> None:
    session, _ = scripted([0.5, 0.95, 0.5, 0.95])
    frozen, to_target = [], []
    for epoch in session.epochs():
        frozen.append(session.frozen_blocks)
        to_target.append(session.timeline[epoch].layers["blocks.0.conv1.weight"].to_target)
    # The first update has nothing to compare with; b0 converges at the third and is frozen at the fourth.
    assert frozen == [0, 0, 0, 1, 1, 2, 2, 2]
    assert to_target == [False, False, True, True, False, False, False, False]
    assert session.timeline.frozen == (0, 0, 0, 1, 1, 2, 2, 2)
    assert [row.frozen_blocks for row in session.cost.rows] == frozen


def test_nothing_is_decided_between_update_epochs_and_the_plan_is_the_latest_time() -> None:
    session, criterion = scripted([0.1, 0.1, 0.1], update_interval_epochs=2)
    frozen = [session.frozen_blocks for _ in session.epochs()]
    assert frozen == [0, 0, 0, 0, 0, 0, 1, 1]
    assert criterion.left == [0.1]  # compared at the epochs 2 and 4; at 6 no other update follows


def test_a_block_of_which_nothing_can_be_seen_goes_by_the_next_one_behind_it() -> None:
    session, criterion = scripted([0.5, 0.95, 0.95, 0.5])
    seen = criterion.look
    criterion.look = lambda blocks: dict(list(seen(blocks).items())[1:])  # type: ignore[method-assign]
    assert [session.frozen_blocks for _ in session.epochs()][:4] == [0, 0, 0, 1]


def test_all_processes_go_by_the_first_ones_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = scripted([0.95] * 8)
    monkeypatch.setattr(
        World, "gather", lambda world, mine, error=None: [mine - 0.1, mine] if isinstance(mine, float) else [mine]
    )
    frozen = [session.frozen_blocks for _ in session.epochs()]
    assert convergence_of(session).similarity == pytest.approx(0.85)
    assert frozen == [0] * 6 + [1, 2]


def test_a_damaged_state_is_refused() -> None:
    session, _ = scripted([])
    part = convergence_of(session)
    for damage in ({"similarity": "much"}, {"before": {"other": torch.zeros(1)}}, {"before": None}):
        with pytest.raises(StateMismatch, match="freezing criterion"):
            part.check_state({**part.state_dict(), **damage})


def test_structure_is_the_share_of_the_largest_half_that_was_there_before() -> None:
    weight = nn.Parameter(torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.0, 0.0]]))
    mask = torch.tensor([[True, True, True, True, False, False]])
    criterion = StructureCriterion({"a.weight": weight}, lambda: {"a.weight": mask})
    before = criterion.look([block("a")])["a"]
    assert criterion.similarity(before, before) == 1.0
    with torch.no_grad():
        weight[0, 2] = 9.0  # of the half {0, 1} only 0 stays
    assert criterion.similarity(before, criterion.look([block("a")])["a"]) == 0.5


def adaptive(criterion: str, threshold: float, *, update_interval_epochs: int = 1, **more: Any) -> spfde.Recipe:
    fields = {"flops_reduction": 0.05, "criterion": criterion, "threshold": threshold, "probe_samples": 8, **more}
    return spfde.Recipe(
        sparsity=spfde.MEST(sparsity=0.8),
        freezing=spfde.ProgressiveFreezing(**fields),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=update_interval_epochs,
    )


def attach(recipe: spfde.Recipe, seed: int = 0, engine: str = "masked") -> tuple[Any, spfde.Session]:
    parts = make_parts(seed=seed)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, seed=3, engine=engine)
    return parts, session


@pytest.mark.parametrize("criterion", ["structure", "representation"])
def test_blocks_that_converge_at_once_are_frozen_earlier_than_planned_and_at_their_target(criterion: str) -> None:
    parts, session = attach(adaptive(criterion, 1e-6))
    planned = session.blueprint.freeze_plan
    frozen, density = [], []

    def look(_: int) -> None:
        frozen.append(session.frozen_blocks)
        density.append(int(session.masks["blocks.0.conv1.weight"].sum()))

    train(parts, session, at_top=look)
    most = max(planned.frozen)
    # Looked at from epoch 0 on, alike at epoch 1, frozen at epoch 2, and one more at each epoch after that.
    assert frozen == [max(planned.frozen[e], min(most, max(0, e - 1))) for e in range(EPOCHS)]
    assert frozen != [planned.frozen[e] for e in range(EPOCHS)]
    target = round(0.2 * 324)
    assert density[0] > target
    assert density[1:] == [target] * (EPOCHS - 1)
    bill = spfde.plan(make_parts().model, torch.zeros(1, 2, 8, 8), session.recipe, EPOCHS, SAMPLES, batch_size=BATCH)
    assert session.cost.totals.cost.saved_by_freezing > bill.savings["freezing"]


def test_a_block_whose_mutation_never_came_is_at_its_target_all_the_same_when_it_is_frozen_early() -> None:
    # MEST with λ > 0 prunes at the first step with a gradient, and here nobody steps.
    recipe = adaptive("structure", 1e-6).replace(sparsity=spfde.MEST(sparsity=0.8, gradient_weight=0.5))
    _, session = attach(recipe)
    active = [int(session.masks["blocks.0.conv1.weight"].sum()) for _ in session.epochs()]
    assert session.frozen_blocks == 1
    assert active == [81, 81] + [65] * (EPOCHS - 2)


@needs_kernels
def test_the_engine_does_not_decide_when_a_block_has_converged() -> None:
    frozen = []
    for engine in ("masked", "native"):
        parts, session = attach(adaptive("representation", 0.9), engine=engine)
        forward = vars(parts.model).get("forward")
        train(parts, session)
        assert vars(parts.model).get("forward") == forward
        frozen.append([row.frozen_blocks for row in session.cost.rows])
    assert frozen[0] == frozen[1]


def test_the_plan_says_that_its_freeze_epochs_are_the_latest() -> None:
    bill = spfde.plan(make_parts().model, torch.zeros(1, 2, 8, 8), adaptive("structure", 0.9), EPOCHS, SAMPLES)
    assert "at the latest: a block is frozen earlier where its structure has converged" in str(bill)
    assert bill.blueprint.freeze_plan.frozen[-1] == 1


def test_a_criterion_that_is_never_met_leaves_the_plan_alone() -> None:
    parts, session = attach(adaptive("structure", 1.0))
    convergence_of(session)._threshold = 2.0
    frozen: list[int] = []
    train(parts, session, at_top=lambda _: frozen.append(session.frozen_blocks))
    assert frozen == list(session.blueprint.freeze_plan.frozen)


def test_looks_are_charged_as_overhead_and_structure_costs_nothing() -> None:
    parts, session = attach(adaptive("representation", 1.0))
    cost = session.blueprint.cost
    densities = cost.densities({name: float(m.sum()) / m.numel() for name, m in session.masks.items()})
    expected = sum(round(8 * flops * share) for flops, share in zip(cost.forward, densities, strict=True))
    train(parts, session)
    assert session.cost.rows[0].overhead_flops == pytest.approx(expected, rel=1e-6)
    assert session.cost.rows[-1].overhead_flops == 0
    parts, session = attach(adaptive("structure", 1.0))
    train(parts, session)
    assert session.cost.totals.cost.overhead_flops == 0


def test_looks_leave_modes_statistics_and_generators_alone() -> None:
    parts, session = attach(adaptive("representation", 1e-6))
    drawn = torch.get_rng_state()
    before = {name: value.clone() for name, value in parts.model.state_dict().items() if "running" in name}
    parts.model.train()
    convergence_of(session).begin_epoch(session.timeline[0])
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(module.training for module in parts.model.modules())
    assert all(torch.equal(value, parts.model.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in parts.model.modules())


@pytest.mark.parametrize("criterion", ["structure", "representation"])
@pytest.mark.parametrize("epoch", [1, 3, 6])
def test_a_resumed_run_decides_as_one_that_never_stopped(criterion: str, epoch: int) -> None:
    recipe = adaptive(criterion, 0.6)
    parts, session = attach(recipe)
    saved: list[Any] = []

    def keep(at: int) -> None:
        if at == epoch:
            states = (parts.model.state_dict(), parts.optimizer.state_dict(), session.state_dict())
            saved.append(copy.deepcopy(states))

    train(parts, session, at_top=keep)
    expected = everything(parts, session)
    again, resumed = attach(recipe, seed=99)
    model, optimizer, state = saved[0]
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    resumed.load_state_dict(state)
    train(again, resumed)
    assert_equal(everything(again, resumed), expected)


def test_what_cannot_adapt_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="needs scheme='single-shot'"):
        spfde.ProgressiveFreezing(criterion="structure", scheme="periodic")
    dense = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.05, criterion="structure"))
    with pytest.raises(InvalidArgument, match="criterion='structure': compares masks, and the recipe has no sparsity"):
        attach(dense)
    many = spfde.ProgressiveFreezing(flops_reduction=0.05, criterion="representation", probe_samples=99)
    with pytest.raises(InvalidArgument, match="probe_samples=99: must be at most the number of samples"):
        attach(spfde.Recipe(freezing=many))
    parts = make_parts()
    with pytest.raises(InvalidArgument, match="probe=None: is needed where sample is given"):
        spfde.attach(
            parts.model, parts.optimizer, parts.loader, adaptive("representation", 0.9), epochs=EPOCHS,
            sample=torch.zeros(1, 2, 8, 8),
        )  # fmt: skip

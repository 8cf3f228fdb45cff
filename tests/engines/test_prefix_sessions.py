"""Sessions that train from what is kept of the frozen front, by every engine that keeps it."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spfde
from helpers.caching import ONE, RECIPE, attach, go_on, shifted, train_and_save, train_cached
from helpers.native import NATIVE
from helpers.recording import on_cpu  # noqa: F401  # a fixture
from helpers.training import EPOCHS, Parts, make_parts, step, train
from spfde.engines.kept_outputs import CachedPrefix

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(params=[NATIVE, pytest.param("cudagraph", marks=pytest.mark.long)])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Counted:
    """Counts the images that go through the frozen front, and can let every batch through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, always: bool = False) -> None:
        self.images = 0
        original = CachedPrefix.__call__

        def call(cached: CachedPrefix, samples: Tensor, variant: int, compute: Any) -> Any:
            def counted(at: Tensor) -> Any:
                self.images += len(at)
                return compute(at)

            return counted(torch.arange(len(samples))) if always else original(cached, samples, variant, counted)

        monkeypatch.setattr(CachedPrefix, "__call__", call)


# A front of layers may end within a block: it hands over what the block adds to its last layer, too.
@pytest.mark.parametrize(
    ("precision", "tolerance", "unit"), [("fp16", 2e-2, "block"), ("int8", 2e-1, "block"), ("fp16", 2e-2, "layer")]
)
def test_training_from_the_cache_is_training_on_what_it_holds(
    engine: str, precision: str, tolerance: float, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing that chooses: a weight dropped or a sample removed by a hair would be another run.
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=2, unit=unit)
    recipe = RECIPE.replace(sparsity=spfde.StaticSparse(sparsity=0.8), sieving=None, freezing=freezing)
    cache = spfde.PrefixCache(2, precision=precision)
    with monkeypatch.context() as patch:
        always = Counted(patch, always=True)
        parts = make_parts()
        expected = train_cached(parts, attach(parts, recipe, engine, cache))
    counted = Counted(monkeypatch)
    parts = make_parts()
    found = train_cached(parts, attach(parts, recipe, engine, cache))
    assert found[:10] == expected[:10]  # before anything is frozen
    assert found == pytest.approx(expected, abs=tolerance)
    assert 0 < counted.images < always.images


def test_the_front_is_computed_once_a_sample_variant_and_freeze_step(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    parts = make_parts()
    session = attach(parts, RECIPE.replace(sieving=None), engine)
    after: dict[int, int] = {}
    for epoch in session.epochs():
        for x, y in session.loader:
            step(parts, session, shifted(x, session.augmentation_seeds()), y)
        after[epoch] = counted.images
    freeze_steps = sorted({at for at in session.blueprint.freeze_plan.freeze_epochs if at is not None})
    for epoch, images in after.items():
        assert images == 40 * sum(at <= epoch for at in freeze_steps)


def test_a_front_that_gets_other_weights_is_computed_anew(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    parts = make_parts()
    session = attach(parts, RECIPE.replace(sieving=None), engine)
    for epoch in session.epochs():
        if epoch == EPOCHS - 1:
            name = min(session._computing._parts.frozen())
            weight = parts.model.get_parameter(name)
            weight.data.mul_(2)
            counted.images = 0
        for x, y in session.loader:
            step(parts, session, shifted(x, session.augmentation_seeds()), y)
    assert counted.images == 40


def test_seeds_repeat_while_variants_are_kept_and_never_else(engine: str) -> None:
    parts = make_parts()
    session = attach(parts, RECIPE.replace(sieving=None), engine, spfde.PrefixCache(2))
    seeds = []
    for _ in session.epochs():
        for x, y in session.loader:
            step(parts, session, x, y)
            last = session.augmentation_seeds(torch.arange(40))
        seeds.append(last)
    freeze_steps = {at for at in session.blueprint.freeze_plan.freeze_epochs if at is not None}
    since = [max((at for at in freeze_steps if at <= epoch), default=None) for epoch in range(EPOCHS)]
    for one in range(EPOCHS):
        for other in range(one):
            together = since[one] is not None and since[one] == since[other] and (one - other) % 2 == 0
            assert torch.equal(seeds[one], seeds[other]) == together, (one, other)


@pytest.mark.parametrize(
    "stop", [pytest.param(3, marks=pytest.mark.long), 4, pytest.param(5, marks=pytest.mark.long), 7]
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(engine: str, stop: int) -> None:
    parts = make_parts()
    saved = train_and_save(parts, attach(parts, engine=engine), stop)
    again = go_on(saved, ONE, engine)
    for name, value in parts.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize("other", [None, spfde.PrefixCache(3, precision="int8")])
def test_a_run_goes_on_with_another_cache_or_with_none(engine: str, other: spfde.PrefixCache | None) -> None:
    parts = make_parts()
    saved = train_and_save(parts, attach(parts, engine=engine), stop=5)
    assert go_on(saved, other, engine).model.training


def test_an_epoch_that_never_asked_for_seeds_is_an_error(engine: str) -> None:
    parts = make_parts()
    with pytest.raises(spfde.UsageError, match=r"session\.augmentation_seeds\(\)"):
        train(parts, attach(parts, engine=engine))


def test_another_batch_than_the_announced_one_is_an_error(engine: str) -> None:
    parts = make_parts()
    session = attach(parts, engine=engine)
    for epoch in session.epochs():
        for x, y in session.loader:
            x = shifted(x, session.augmentation_seeds())
            if epoch == 2:
                with pytest.raises(spfde.UsageError, match="was told of 8 samples"):
                    parts.model(x[:3])
                return
            step(parts, session, x, y)


def test_evaluation_does_not_touch_the_cache(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    parts = make_parts()
    session = attach(parts, engine=engine)
    for epoch in session.epochs():
        for x, y in session.loader:
            session.augmentation_seeds()
            if epoch == 2:
                parts.model.eval()
                before = counted.images
                out = parts.model(x)
                assert counted.images == before
                plain = copy.deepcopy(parts.model)
                assert torch.allclose(plain(x), out, atol=1e-5)
                return
            step(parts, session, x, y)


def test_the_masked_engine_is_refused_with_the_reason() -> None:
    with pytest.raises(spfde.InvalidArgument) as refused:
        attach(make_parts(), engine="masked")
    (problem,) = refused.value.problems
    assert (problem.argument, problem.value) == ("cache", ONE)
    assert "masked" in problem.rule


def test_dropout_in_a_block_that_freezes_is_refused(engine: str) -> None:
    parts = make_parts()
    parts.model.blocks[0].add_module("drop", nn.Dropout(0.5))  # type: ignore[index,union-attr]
    forward = type(parts.model.blocks[0]).forward  # type: ignore[index]

    class Dropping(type(parts.model.blocks[0])):  # type: ignore[misc,index]
        def forward(self, x: Tensor) -> Tensor:
            return self.drop(forward(self, x))

    parts.model.blocks[0].__class__ = Dropping  # type: ignore[index]
    with pytest.raises(spfde.InvalidArgument, match=r"cache=.*blocks\.0\.drop \(Dropout\) draws"):
        attach(parts, engine=engine)


@pytest.mark.parametrize("draw", ["functional", "python"])
def test_randomness_in_a_block_that_freezes_is_refused_whatever_its_form(engine: str, draw: str) -> None:
    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.conv(x)))
            if draw == "functional":
                return F.dropout(x, 0.5, training=self.training)
            return x * 2 if self.training and random.random() < 0.5 else x

    blocks = [Block(2), Block(6), Block(6), Block(6)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model.eval()  # the mode at attaching does not matter
    parts = Parts(model, torch.optim.SGD(model.parameters(), lr=0.01), make_parts().loader)
    with pytest.raises(spfde.InvalidArgument, match=r"cache=.*0 \(Block\) draws"):
        attach(parts, engine=engine)


@pytest.mark.parametrize(
    ("freezing", "telling"),
    [
        (None, "freezes none"),
        (spfde.ProgressiveFreezing(flops_reduction=0.0), "freezes none"),
        (spfde.ProgressiveFreezing(flops_reduction=0.05, criterion="structure"), "criterion"),
        (spfde.ProgressiveFreezing(flops_reduction=0.05, scheme="periodic"), "scheme"),
        (spfde.ProgressiveFreezing(flops_reduction=0.05, scheme="single-shot-resume"), "scheme"),
    ],
)
def test_a_cache_needs_blocks_that_are_frozen_for_good_at_known_epochs(
    engine: str, freezing: spfde.ProgressiveFreezing | None, telling: str
) -> None:
    with pytest.raises(spfde.InvalidArgument) as refused:
        attach(make_parts(), RECIPE.replace(freezing=freezing), engine=engine)
    (problem,) = refused.value.problems
    assert problem.argument == "cache"
    assert telling in problem.rule + problem.remedy

"""Which engine is taken, whoever made it: by name, or because it says that it is the fastest."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import spfde
from helpers.native import needs_kernels
from helpers.training import EPOCHS, Parts, SmallNet, make_parts, step
from spfde.core import registry
from spfde.engines import base
from spfde.engines.choose import choose_engine, engine_names
from spfde.engines.native.engine import NativeEngine

SPARSE = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2)


@pytest.fixture
def theirs() -> Iterator[type[base.Engine]]:
    """An engine that somebody else made, which says that it takes a quarter of the time."""

    class Quick(base.Engine):
        name: ClassVar[str] = "quick"
        summary: ClassVar[str] = "says that it is fast"
        speed: ClassVar[float] = 0.25
        refusal: ClassVar[str | None] = None
        calls: ClassVar[list[str]] = []

        @classmethod
        def supports(cls, job: base.Job) -> str | None:
            return cls.refusal

        @classmethod
        def expected_speed(cls, job: base.Job) -> float:
            assert job.model is job.given
            assert job.batch_size == 8
            return cls.speed

        def attach(self, job: base.Job, parts: base.Parts) -> None:
            assert parts.masks().keys() == job.blueprint.target.keys()
            self.calls.append("attach")

        def detach(self) -> None:
            self.calls.append("detach")

        def on_batch(self) -> None:
            self.calls.append("batch")

        def describe(self) -> list[str]:
            return ["quickly computed"]

    spfde.register("engine")(Quick)
    yield Quick
    del registry._CLASSES["engine"]["quick"]


def attach(parts: Parts, engine: str, recipe: spfde.Recipe = SPARSE, **options: Any) -> spfde.Session:
    return spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, engine=engine, **options)


def test_an_engine_of_somebody_elses_is_taken_by_its_name(theirs: Any) -> None:
    parts = make_parts()
    session = attach(parts, "quick")
    assert (session.engine, session.engine_reason) == ("quick", "as asked")
    assert "  quickly computed" in str(session).splitlines()
    for x, y in session.loader:
        step(parts, session, x, y)
    session.detach()
    assert theirs.calls == ["attach", *["batch"] * 5, "detach"]


def test_auto_takes_the_engine_that_says_it_is_the_fastest(theirs: Any) -> None:
    session = attach(make_parts(), "auto")
    assert session.engine == "quick"
    assert "4.0x faster" in session.engine_reason


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeEngine, "supports", classmethod(lambda cls, job: "not today"))


@pytest.mark.usefixtures("without_native")
def test_auto_leaves_an_engine_that_is_hardly_faster_or_cannot_work(theirs: Any) -> None:
    theirs.speed = 0.95
    session = attach(make_parts(), "auto")
    assert session.engine == "masked"
    assert "0.95x" in session.engine_reason
    assert "not today" in session.engine_reason
    theirs.refusal = "it rains"
    assert "it rains" in attach(make_parts(), "auto").engine_reason
    with pytest.raises(spfde.InvalidArgument) as refused:
        attach(make_parts(), "quick")
    (problem,) = refused.value.problems
    assert (problem.argument, problem.value) == ("engine", "quick")
    assert "it rains" in problem.rule


@pytest.mark.usefixtures("without_native")
def test_an_engine_that_cannot_be_made_ready_is_passed_over(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "prepare", classmethod(lambda cls, job, tell=None: "nothing is ready"))
    session = attach(make_parts(), "auto")
    assert session.engine == "masked"
    assert "nothing is ready" in session.engine_reason


def test_a_model_without_masks_may_be_computed_by_an_engine_that_needs_none(theirs: Any) -> None:
    freezing = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.05))
    assert attach(make_parts(), "native", freezing).engine == "masked"
    assert attach(make_parts(), "quick", freezing).engine == "quick"
    assert attach(make_parts(), "quick", spfde.Recipe()).engine == "masked"


def test_an_engine_that_keeps_nothing_takes_no_cache(theirs: Any) -> None:
    freezing = SPARSE.replace(freezing=spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=2))
    with pytest.raises(spfde.InvalidArgument) as refused:
        attach(make_parts(), "quick", freezing, cache=spfde.PrefixCache(1))
    assert [problem.argument for problem in refused.value.problems] == ["cache"]


def test_a_name_that_no_engine_has_is_refused_with_the_nearest(theirs: Any) -> None:
    with pytest.raises(spfde.InvalidArgument) as refused:
        attach(make_parts(), "qick")
    (problem,) = refused.value.problems
    assert (problem.argument, problem.value) == ("engine", "qick")
    assert "'quick'" in problem.remedy
    assert engine_names() == ("auto", "masked", "native", "quick")


def test_the_same_job_gives_the_same_choice(theirs: Any) -> None:
    session = attach(make_parts(), "auto")
    assert {choose_engine("auto", session._computing.job, is_neutral=False).name for _ in range(3)} == {"quick"}


def whole(forward: Any) -> Any:
    """As Transformers decorates what its models compute: the arguments' names are no longer there."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(SmallNet):
    @whole
    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        return super().forward(x)


@needs_kernels
def test_a_decorated_forward_with_keyword_arguments_is_named_as_the_reason_why_the_kernels_cannot_work() -> None:
    model = Decorated()
    parts = Parts(model, torch.optim.SGD(model.parameters(), lr=0.1), make_parts().loader)
    session = attach(parts, "auto")
    assert session.engine == "masked"
    for words in ("its forward", "is decorated", "**kwargs"):
        assert words in session.engine_reason
    assert "co_varnames" not in session.engine_reason
    session.detach()
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(parts, "native")
    assert ".." not in str(caught.value)
    assert str(caught.value).count("Use engine=") == 1


def same(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, x: Tensor, *, doubled: bool = False) -> Any:
        return forward(self, x, doubled=doubled)

    return wrapper


class NoKeywords(SmallNet):
    @whole
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SameKeywords(SmallNet):
    @same
    def forward(self, x: Tensor, *, doubled: bool = False) -> Tensor:
        return super().forward(x)


@needs_kernels
@pytest.mark.parametrize("kind", [NoKeywords, SameKeywords])
def test_a_decorated_forward_whose_arguments_are_known_is_computed_by_the_kernels(kind: type[nn.Module]) -> None:
    model = kind()
    parts = Parts(model, torch.optim.SGD(model.parameters(), lr=0.1), make_parts().loader)
    assert attach(parts, "native").engine == "native"

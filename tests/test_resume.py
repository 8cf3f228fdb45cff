"""Loading a state and going on equals never having stopped, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

import spfde
from native_support import needs_kernels
from support import EPOCHS, Parts, make_parts, step, train

METHODS = {
    "static": spfde.StaticSparse(sparsity=0.8),
    "set": spfde.SET(sparsity=0.8),
    "rigl": spfde.RigL(sparsity=0.8),
    "rigl-erk": spfde.RigL(sparsity=0.8, distribution="erk"),
    "mest-em": spfde.MEST(sparsity=0.8, soft_bound=False),
    "mest-ems": spfde.MEST(sparsity=0.8),
    "mest-gradient": spfde.MEST(sparsity=0.8, gradient_weight=0.5),
    "snip": spfde.SNIP(sparsity=0.8),
    "synflow-block": spfde.SynFlow(sparsity=0.8, iterations=5, structure=spfde.Block(rows=2, columns=3)),
    "deepr": spfde.DeepR(sparsity=0.8, noise=0.1),
    "dsr": spfde.DSR(sparsity=0.8, threshold=0.05),
    "snfs": spfde.SNFS(sparsity=0.8),
    "topkast": spfde.TopKAST(sparsity=0.8),
    "gmp": spfde.GMP(sparsity=0.8),
    "str": spfde.STR(sparsity=0.8, threshold_start=-3.0, threshold_decay=0.5),
    "set-block": spfde.SET(sparsity=0.8, structure=spfde.Block(rows=2, columns=3)),
    "mest-pattern": spfde.MEST(sparsity=0.8, structure=spfde.Patterns()),
    "rigl-kernel": spfde.RigL(sparsity=0.8, structure=spfde.Kernels()),
}


def recipe_with(method: spfde.sparsity.SparsityMethod | None) -> spfde.Recipe:
    return spfde.Recipe(
        sparsity=method,
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
        sieving=spfde.DataSieving(removed_fraction=0.25),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=2,
    )


@pytest.fixture(autouse=True, params=["masked", pytest.param("native", marks=needs_kernels)])
def engine(request: pytest.FixtureRequest) -> str:
    """Every test of this module runs under both engines."""
    ENGINE[0] = request.param
    return str(request.param)


ENGINE = ["masked"]


def attach(parts: Parts, recipe: spfde.Recipe) -> spfde.Session:
    return spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, seed=3, engine=ENGINE[0])


def save(parts: Parts, session: spfde.Session) -> bytes:
    file = io.BytesIO()
    states = {
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "spfde": session.state_dict(),
        "global": torch.get_rng_state(),
    }
    torch.save(states, file)
    return file.getvalue()


def resume(
    saved: bytes,
    recipe: spfde.Recipe,
    *,
    workers: int = 0,
    attach: Callable[[Parts, spfde.Recipe], spfde.Session] = attach,
) -> tuple[Parts, spfde.Session]:
    parts = make_parts(seed=99, workers=workers)
    session = attach(parts, recipe)
    states = torch.load(io.BytesIO(saved), weights_only=True)
    parts.model.load_state_dict(states["model"])
    parts.optimizer.load_state_dict(states["optimizer"])
    session.load_state_dict(states["spfde"])
    torch.set_rng_state(states["global"])
    return parts, session


def everything(parts: Parts, session: spfde.Session) -> dict[str, Any]:
    state = session.state_dict()
    for row in state["cost"]["rows"]:
        row["seconds"] = row["peak_memory_bytes"] = None  # measured: never the same twice
    state["clock"]["seconds"] = None
    return {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict(), "spfde": state}


def assert_equal(left: Any, right: Any, path: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{path}[{number}]")
    else:
        assert left == right, path


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("moment", ["top", "bottom"])
def test_a_run_resumed_in_any_epoch_ends_like_one_that_never_stopped(
    method: spfde.sparsity.SparsityMethod, moment: str
) -> None:
    recipe = recipe_with(method)
    saved: list[bytes] = []
    parts = make_parts()
    session = attach(parts, recipe)
    keep = {f"at_{moment}": lambda _: saved.append(save(parts, session))}
    train(parts, session, **keep)
    expected = everything(parts, session)
    assert len(saved) == EPOCHS
    for state in saved:
        again, resumed = resume(state, recipe)
        train(again, resumed)
        assert_equal(everything(again, resumed), expected)


def test_a_run_resumed_between_two_epochs_ends_like_one_that_never_stopped() -> None:
    recipe = recipe_with(METHODS["mest-ems"])
    parts = make_parts()
    session = attach(parts, recipe)
    saved = []
    for _ in range(EPOCHS):
        for x, y in session.loader:
            step(parts, session, x, y)
        session.end_epoch()
        saved.append(save(parts, session))
    expected = everything(parts, session)
    for state in saved:
        again, resumed = resume(state, recipe)
        train(again, resumed)
        assert_equal(everything(again, resumed), expected)


def test_a_loop_without_epochs_goes_on_from_the_bottom_of_an_epoch() -> None:
    recipe = recipe_with(METHODS["mest-ems"])
    parts = make_parts()
    session = attach(parts, recipe)
    saved = []
    train(parts, session, at_bottom=lambda _: saved.append(save(parts, session)))
    expected = everything(parts, session)
    again, resumed = resume(saved[3], recipe)
    for _ in range(4, EPOCHS):
        for x, y in resumed.loader:
            step(again, resumed, x, y)
        resumed.end_epoch()
    assert_equal(everything(again, resumed), expected)


def test_a_run_with_data_workers_resumes_bit_for_bit() -> None:
    recipe = recipe_with(METHODS["mest-ems"])
    saved: list[bytes] = []
    parts = make_parts(workers=1)
    session = attach(parts, recipe)
    train(parts, session, at_bottom=lambda _: saved.append(save(parts, session)))
    expected = everything(parts, session)
    again, resumed = resume(saved[4], recipe, workers=1)
    train(again, resumed)
    assert_equal(everything(again, resumed), expected)


def test_every_stage_is_among_the_resumed_ones() -> None:
    """The runs above prove little unless masks change, blocks freeze and samples move while they last."""
    parts = make_parts()
    session = attach(parts, recipe_with(METHODS["mest-ems"]))
    seen: list[tuple[float, int, int]] = []
    train(
        parts,
        session,
        at_bottom=lambda _: seen.append(
            (session.density, session.frozen_blocks, session.sieve_turnover["moved"]),
        ),
    )
    densities, frozen, moved = zip(*seen, strict=True)
    assert len(set(densities)) >= 2
    assert min(frozen) == 0
    assert max(frozen) >= 2
    assert sum(count > 0 for count in moved) == 3


def test_a_state_between_two_batches_is_refused(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    for _ in session.epochs():
        for x, y in session.loader:
            step(parts, session, x, y)
            with pytest.raises(spfde.UsageError, match="between two batches"):
                session.state_dict()
            break
        break


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": spfde.MEST(sparsity=0.7)}, "sparsity"),
        ({"sieving": spfde.DataSieving(removed_fraction=0.1)}, "removed_fraction"),
        ({"update_interval_epochs": 1}, "update_interval_epochs"),
    ],
)
@pytest.mark.filterwarnings("ignore:update_interval_epochs")
def test_a_state_from_another_recipe_is_refused(
    parts: Parts, whole_recipe: spfde.Recipe, change: dict[str, Any], named: str
) -> None:
    state = attach(parts, whole_recipe).state_dict()
    other = make_parts()
    session = attach(other, whole_recipe.replace(**change))
    with pytest.raises(spfde.StateMismatch, match=named):
        session.load_state_dict(state)


def test_a_state_from_another_model_length_or_version_is_refused(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    state = session.state_dict()
    with pytest.raises(spfde.StateMismatch, match="format"):
        session.load_state_dict({**state, "format": 99})
    with pytest.raises(spfde.StateMismatch, match="epochs"):
        session.load_state_dict({**state, "fit": {**state["fit"], "epochs": 9}})
    shapes = {**state["fit"]["parameters"], "fc.weight": [5, 6]}
    with pytest.raises(spfde.StateMismatch, match=r"fc\.weight"):
        session.load_state_dict({**state, "fit": {**state["fit"], "parameters": shapes}})

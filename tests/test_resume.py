"""Loading a state and going on equals never having stopped, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from typing import Any

import pytest
import torch

import spfde
from native_support import needs_kernels
from spfde import planning
from spfde.tracing import Trace, trace
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
    "grasp": spfde.GraSP(sparsity=0.8),
    "set-itop": spfde.SETITOP(sparsity=0.8),
    "rigl-itop": spfde.RigLITOP(sparsity=0.8),
    "rigl-nm": spfde.RigL(sparsity=0.5, structure=spfde.NM(n=1, m=2)),
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


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this module attaches to models that look alike, many times: one trace is enough for all."""

    def traced(model: torch.nn.Module, sample: Any) -> Trace:
        look = str(model)
        if look not in _TRACES:
            _TRACES[look] = trace(model, sample)
        return _TRACES[look]

    monkeypatch.setattr(planning, "trace", traced)


_TRACES: dict[str, Trace] = {}


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
    attach: Callable[[Parts, spfde.Recipe], spfde.Session] = attach,
    **how: Any,
) -> tuple[Parts, spfde.Session]:
    parts = make_parts(seed=99, **how)
    session = attach(parts, recipe)
    load(saved, parts, session)
    return parts, session


def load(saved: bytes, parts: Parts, session: spfde.Session) -> None:
    states = torch.load(io.BytesIO(saved), weights_only=True)
    parts.model.load_state_dict(states["model"])
    parts.optimizer.load_state_dict(states["optimizer"])
    session.load_state_dict(states["spfde"])
    torch.set_rng_state(states["global"])


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


def run_whole(recipe: spfde.Recipe, **how: Any) -> tuple[list[bytes], dict[str, Any]]:
    """The states at the top and at the bottom of each epoch of a run that never stops, and what it ends with."""
    parts, saved = make_parts(**how), []
    session = attach(parts, recipe)

    def keep(_: int) -> None:
        saved.append(save(parts, session))

    train(parts, session, at_top=keep, at_bottom=keep)
    assert len(saved) == 2 * EPOCHS
    return saved, everything(parts, session)


class Stopped(Exception):
    """The run was killed."""


def go_on(state: bytes, recipe: spfde.Recipe) -> bytes | dict[str, Any]:
    """Resume a run, and stop it again at the next top or bottom of an epoch; at the end, what it ends with."""
    parts, session = resume(state, recipe)
    start, kept = session.step, []

    def stop(_: int) -> None:
        # A state from the top of an epoch is at its top once more.
        if session.step > start or len(session.cost.rows) > rows:
            kept.append(save(parts, session))
            raise Stopped

    rows = len(session.cost.rows)
    with suppress(Stopped):
        train(parts, session, at_top=stop, at_bottom=stop)
    return kept[0] if kept else everything(parts, session)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_stopped_at_the_top_and_bottom_of_every_epoch_ends_like_one_that_never_stopped(
    method: spfde.sparsity.SparsityMethod,
) -> None:
    recipe = recipe_with(method)
    saved, expected = run_whole(recipe)
    state: bytes | dict[str, Any] = saved[0]
    stops = 0
    # Nothing but the states is handed on: whatever one of them lacks is lost at once, and shows now or later.
    while isinstance(state, bytes):
        state = go_on(state, recipe)
        stops += 1
    assert stops == 2 * EPOCHS
    assert_equal(state, expected)
    # And once in the middle of an interval and of freezing, undisturbed from there on.
    again, resumed = resume(saved[2 * EPOCHS - 5], recipe)
    train(again, resumed)
    assert_equal(everything(again, resumed), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_earlier_state_loaded_into_the_session_that_has_gone_on_leads_to_the_same_end(
    method: spfde.sparsity.SparsityMethod,
) -> None:
    recipe = recipe_with(method)
    parts, saved = make_parts(), []
    session = attach(parts, recipe)
    train(parts, session, at_top=lambda _: saved.append(save(parts, session)))
    expected = copy.deepcopy(everything(parts, session))
    for state in (saved[2], saved[EPOCHS - 1]):
        load(state, parts, session)
        train(parts, session)
        assert_equal(everything(parts, session), expected)


# Workers know nothing of engines, so one stands for both.
without_native = pytest.mark.parametrize("engine", ["masked"], indirect=True)


@without_native
@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize(("workers", "persistent", "moments"), [(1, True, (0, 1, 2, 7, 10)), (2, False, (5, 10))])
def test_a_run_with_data_workers_resumes_bit_for_bit(
    workers: int, persistent: bool, moments: tuple[int, ...], own_generator: bool
) -> None:
    """A resumed run starts its workers anew, which must change neither the order of samples nor any other draw."""
    recipe = recipe_with(METHODS["mest-ems"])
    how = {"workers": workers, "persistent": persistent, "own_generator": own_generator}
    saved, expected = run_whole(recipe, **how)
    for moment in moments:
        again, resumed = resume(saved[moment], recipe, **how)
        train(again, resumed)
        assert_equal(everything(again, resumed), expected)


@without_native
@pytest.mark.parametrize(("method", "moment"), zip(METHODS.values(), cycle(range(2, 2 * EPOCHS, 3))), ids=METHODS)
def test_every_method_resumes_bit_for_bit_with_data_workers(method: spfde.sparsity.SparsityMethod, moment: int) -> None:
    recipe = recipe_with(method)
    saved, expected = run_whole(recipe, workers=1, persistent=True)
    again, resumed = resume(saved[moment], recipe, workers=1, persistent=True)
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
    for state in saved[1::2]:
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

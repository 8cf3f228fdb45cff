"""An epoch that never ends is told of, however its batches come; one that was interrupted is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spfde
from helpers.training import BATCH, EPOCHS, SAMPLES, Parts, make_images, make_parts, step

RECIPE = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8), update_interval_epochs=2)
N_BATCHES = SAMPLES // BATCH
SAMPLE = torch.zeros(1, 2, 8, 8)

Batches = Iterable[tuple[Tensor, Tensor]]


@contextmanager
def said() -> Iterator[list[str]]:
    """What is warned of by the session."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(each.message) for each in caught if "end_epoch" in str(each.message)]


def start(loader: Any = "own", **options: Any) -> tuple[Parts, spfde.Session]:
    parts = make_parts()
    given = parts.loader if loader == "own" else loader
    options = {"epochs": EPOCHS, "engine": "masked", **options}
    return parts, spfde.attach(parts.model, parts.optimizer, given, RECIPE, **options)


def run(parts: Parts, session: spfde.Session, batches: Batches, *, accumulates: int = 1, passes: int = 1) -> None:
    for number, (x, y) in enumerate(batches, start=1):
        for _ in range(passes):
            F.cross_entropy(parts.model(x), y).backward()
        if number % accumulates == 0:
            parts.optimizer.step()
            parts.optimizer.zero_grad()


def own_batches() -> Iterator[tuple[Tensor, Tensor]]:
    x, y = make_images().tensors
    yield from zip(x.split(BATCH), y.split(BATCH), strict=True)


STREAM = {"samples_per_epoch": SAMPLES, "sample": SAMPLE}
CASES: dict[str, tuple[Any, dict[str, Any], int, Callable[[Parts, spfde.Session], Batches]]] = {
    "own loader": ("own", {}, 1, lambda parts, session: parts.loader),
    "own loader, accumulated": ("own", {}, 3, lambda parts, session: parts.loader),
    "the session's, left early": ("own", {}, 1, lambda parts, session: islice(session.loader, 3)),
    "a function, iterated by the user": (own_batches, STREAM, 1, lambda parts, session: own_batches()),
    "a function, left early": (own_batches, STREAM, 1, lambda parts, session: islice(session.loader, 3)),
    "no loader": (None, STREAM, 1, lambda parts, session: own_batches()),
    "no loader, accumulated": (None, STREAM, 2, lambda parts, session: own_batches()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loop_without_an_end_is_told_once_in_its_second_epoch(case: str) -> None:
    loader, options, accumulates, batches = CASES[case]
    parts, session = start(loader, **options)
    with said() as first:
        run(parts, session, batches(parts, session), accumulates=accumulates)
    with said() as later:
        # Accumulated gradients may need another epoch until something steps.
        for _ in range(3):
            run(parts, session, batches(parts, session), accumulates=accumulates)
    assert (len(first), len(later)) == (0, 1)
    assert session.epoch == 0


def test_begin_epoch_alone_does_not_end_the_last_one_and_it_is_told() -> None:
    parts, session = start()
    with said() as found:
        for _ in range(5):
            session.begin_epoch()
            run(parts, session, islice(session.loader, N_BATCHES - 1))
    assert len(found) == 1


def by_epochs(session: spfde.Session, batches: Callable[[], Batches], parts: Parts, **how: int) -> None:
    for _ in session.epochs():
        run(parts, session, batches(), **how)


def by_callbacks(session: spfde.Session, batches: Callable[[], Batches], parts: Parts, **how: int) -> None:
    while session.epoch < EPOCHS:
        session.begin_epoch()
        run(parts, session, batches(), **how)
        session.end_epoch()


@pytest.mark.parametrize("drive", [by_epochs, by_callbacks])
@pytest.mark.parametrize("how", [{}, {"accumulates": 3}, {"accumulates": 7}])
@pytest.mark.parametrize("is_own", [True, False])
def test_epochs_that_end_are_told_nothing_of(drive: Callable[..., None], how: dict[str, int], is_own: bool) -> None:
    parts, session = start()
    with said() as found:
        drive(session, lambda: parts.loader if is_own else session.loader, parts, **how)
    assert found == []
    assert session.epoch == EPOCHS


def test_several_passes_a_batch_of_one_s_own_are_no_fault_where_the_session_ends_the_epochs() -> None:
    parts, session = start()
    with said() as found:
        by_epochs(session, lambda: parts.loader, parts, passes=3)
    assert found == []


@pytest.mark.parametrize("drive", [by_epochs, by_callbacks])
def test_a_loop_that_was_interrupted_and_started_again_is_told_nothing(drive: Callable[..., None]) -> None:
    parts, session = start()

    def interrupted() -> Batches:
        yield from islice(session.loader, 3)
        raise KeyboardInterrupt

    with said() as found:
        with pytest.raises(KeyboardInterrupt):
            drive(session, interrupted, parts)
        drive(session, lambda: session.loader, parts)
    assert found == []
    assert session.epoch == EPOCHS


@pytest.mark.filterwarnings("ignore:The state was taken in the middle")
@pytest.mark.parametrize("is_own", [True, False])
def test_a_run_that_goes_on_amid_its_first_epoch_is_told_nothing(is_own: bool) -> None:
    parts, session = start()
    run(parts, session, islice(parts.loader if is_own else session.loader, 3))
    states = [own.state_dict() for own in (parts.model, parts.optimizer, session)]
    parts, session = start()
    for own, state in zip((parts.model, parts.optimizer, session), states, strict=True):
        own.load_state_dict(state)
    with said() as found:
        run(parts, session, parts.loader if is_own else session.loader)
        session.end_epoch()
    assert found == []


def test_a_look_at_a_batch_before_the_first_step_is_no_fault() -> None:
    parts, session = start()
    with said() as found:
        for _ in range(2):
            x, _y = next(iter(session.loader))
            parts.model(x)
        for x, y in session.loader:
            step(parts, session, x, y)
        session.end_epoch()
    assert found == []

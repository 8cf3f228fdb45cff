"""Tickets: a loader may run ahead of the loop, be left early, or be drawn from by another loader."""

from __future__ import annotations

import copy
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.training import BATCH, EPOCHS, Parts, SmallNet, make_images, step
from spfde.sieving.tickets import Tickets

Through = Callable[[Iterable[Any]], Iterable[Any]]
RECIPE = spfde.Recipe(
    sparsity=spfde.SET(sparsity=0.5),
    sieving=spfde.DataSieving(removed_fraction=0.25, criterion="loss"),
    update_interval_epochs=2,
)


def ahead(count: int) -> Through:
    """So many batches are drawn before the first one is handed on."""

    def through(batches: Iterable[Any]) -> Iterator[Any]:
        held: list[Any] = []
        for batch in batches:
            held.append(batch)
            if len(held) > count:
                yield held.pop(0)
        yield from held

    return through


def by_a_thread(batches: Iterable[Any]) -> Iterator[Any]:
    fetched: queue.Queue[Any] = queue.Queue(2)
    threading.Thread(target=lambda: [fetched.put(batch) for batch in [*batches, None]], daemon=True).start()
    yield from iter(fetched.get, None)


def remade(batches: Any) -> DataLoader[Any]:
    """What trainers make of a loader."""
    return DataLoader(batches.dataset, batch_sampler=batches.batch_sampler, collate_fn=batches.collate_fn)


def indexed_parts() -> Parts:
    torch.manual_seed(0)
    images = TensorDataset(*make_images().tensors, torch.arange(40))
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Parts(model, optimizer, DataLoader(images, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0)))


def attach(parts: Parts, recipe: spfde.Recipe = RECIPE) -> spfde.Session:
    return spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, engine="masked")


def removed_by(through: Through, *, tells: bool = False, shuffles: bool = False) -> list[int]:
    parts = indexed_parts()
    session = attach(parts)
    for _ in session.epochs():
        for x, y, ids in through(session.loader):
            order = torch.randperm(len(ids)) if shuffles else torch.arange(len(ids))
            logits = parts.model(x[order])
            F.cross_entropy(logits, y[order]).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(loss=ids[order].float(), indices=ids[order] if tells else None)
    assert [row.samples for row in session.cost.rows] == [30] * EPOCHS
    return session.removed_set.tolist()


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("through", [ahead(1), ahead(3), by_a_thread, remade], ids=["one", "three", "thread", "remade"])
def test_however_far_a_loader_runs_ahead_the_same_samples_leave(through: Through, tells: bool) -> None:
    assert removed_by(through, tells=tells) == removed_by(iter)


def test_indices_say_which_batch_is_meant_in_any_order() -> None:
    assert removed_by(ahead(2), tells=True, shuffles=True) == removed_by(iter)


@pytest.mark.parametrize("through", [iter, ahead(1)])
@pytest.mark.parametrize(("forgotten", "count"), [((3,), "1 batch"), ((1,), "not called"), (range(100), "4 batches")])
def test_missing_reports_are_counted_when_the_epoch_ends(through: Through, forgotten: Any, count: str) -> None:
    parts = indexed_parts()
    session = attach(parts)

    def loop() -> None:
        for _ in session.epochs():
            for number, (x, y, _ids) in enumerate(through(session.loader)):
                step(parts, None if number in forgotten else session, x, y)

    with pytest.raises(spfde.UsageError, match=count):
        loop()
    assert session.epoch == 0


def test_a_loop_left_early_owes_no_reports_on_what_was_fetched_ahead() -> None:
    parts = indexed_parts()
    session = attach(parts)
    for _ in session.epochs():
        for number, (x, y, _ids) in enumerate(ahead(1)(session.loader)):
            step(parts, session, x, y)
            if number == 1:
                break
    assert [row.samples for row in session.cost.rows] == [2 * BATCH] * EPOCHS


@pytest.mark.parametrize("ahead_by", [0, 1])
@pytest.mark.parametrize("sieves", [True, False])
@pytest.mark.parametrize("at", [2, 4])
def test_an_interrupted_cell_goes_on_when_it_is_run_again(at: int, sieves: bool, ahead_by: int) -> None:
    parts = indexed_parts()
    session = attach(parts, RECIPE if sieves else RECIPE.replace(sieving=None))

    def cell(stop: int | None = None) -> None:
        for _ in session.epochs():
            for x, y, _ids in ahead(ahead_by)(session.loader):
                logits = parts.model(x)
                F.cross_entropy(logits, y).backward()
                parts.optimizer.step()
                parts.optimizer.zero_grad()
                if session.step == stop:
                    raise KeyboardInterrupt
                session.observe(logits, y)

    with pytest.raises(KeyboardInterrupt):
        cell(stop=at)
    try:
        cell()
    except spfde.UsageError:
        cell()
    assert session.epoch == EPOCHS


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_loop_that_trains_on_several_batches_that_it_has_drawn_goes_on_behind_those(at: int, group: int) -> None:
    def run(parts: Parts, session: spfde.Session, stop: int | None = None) -> list[list[int]]:
        seen = []
        for _ in session.epochs():
            batches = iter(session.loader)
            while some := list(itertools.islice(batches, group)):
                for x, y, ids in some:
                    step(parts, session, x, y)
                    seen.append(ids.tolist())
                    if len(seen) == stop:
                        return seen
        return seen

    def start() -> tuple[Parts, spfde.Session]:
        parts = indexed_parts()
        return parts, attach(parts, RECIPE.replace(sieving=None))

    expected = run(*start())
    parts, session = start()
    seen = run(parts, session, stop=at)
    states = [copy.deepcopy(it.state_dict()) for it in (parts.model, parts.optimizer, session)]
    parts, session = start()
    for it, state in zip((parts.model, parts.optimizer, session), states, strict=True):
        it.load_state_dict(state)
    seen += run(parts, session)
    assert seen == expected
    assert [row.samples for row in session.cost.rows] == [40] * EPOCHS


@pytest.mark.parametrize("stage", ["begin_epoch", "end_epoch"])
def test_an_interruption_at_the_top_or_bottom_of_an_epoch_is_taken_up_where_it_came(stage: str) -> None:
    parts = indexed_parts()
    session = attach(parts)
    original, calls = getattr(session._masks, stage), []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    setattr(session._masks, stage, interrupted)

    def cell() -> None:
        for _ in session.epochs():
            for x, y, _ids in session.loader:
                step(parts, session, x, y)

    with pytest.raises(KeyboardInterrupt):
        cell()
    session.state_dict()
    cell()
    assert [(row.epoch, row.samples, row.steps) for row in session.cost.rows] == [(e, 30, 4) for e in range(EPOCHS)]


# --- epochs that never end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sieves", [True, False])
@pytest.mark.filterwarnings("ignore:session.loader was started again")
def test_training_on_behind_the_end_of_an_epoch_is_an_error(sieves: bool) -> None:
    parts = indexed_parts()
    session = attach(parts, RECIPE if sieves else RECIPE.replace(sieving=None))

    def loop() -> None:
        for _ in range(2):
            batches = iter(session.loader)
            for _ in range(len(session.loader)):  # and never one more
                x, y, _ids = next(batches)
                step(parts, session, x, y)

    with pytest.raises(spfde.UsageError, match="end_epoch"):
        loop()


@pytest.mark.filterwarnings("ignore:session.loader was started again")
def test_looking_at_the_batches_of_a_complete_epoch_is_not_training_and_is_not_billed() -> None:
    parts = indexed_parts()
    session = attach(parts)
    for _ in session.epochs():
        for x, y, _ids in session.loader:
            step(parts, session, x, y)
        for x, _y, _ids in session.loader:
            parts.model(x)
    assert [row.samples for row in session.cost.rows] == [30] * EPOCHS


def test_more_steps_than_batches_without_an_end_are_warned_of() -> None:
    parts = indexed_parts()
    session = attach(parts, RECIPE.replace(sieving=None))
    x, y, _ids = next(iter(parts.loader))
    for _ in range(5):
        step(parts, session, x, y)
    with pytest.warns(UserWarning, match="end_epoch"):
        step(parts, session, x, y)


# --- by hand ---------------------------------------------------------------------------------------------------------


def ids_of(tickets: Tickets) -> list[int] | None:
    return None if tickets.oldest is None else tickets.oldest.keys


WEIGHT, BIAS = torch.ones(1), torch.ones(1)


def test_a_loop_that_asks_trains_one_batch_between_two_draws() -> None:
    tickets = Tickets(by_report=False)
    tickets.begin(0)
    tickets.draw(0, [1], 1)
    tickets.draw(0, [2], 1)
    for drawn, now in ((3, 1), (4, 2)):
        assert tickets.ask().keys == [now]
        tickets.train(WEIGHT)
        tickets.train(BIAS)
        tickets.draw(0, [drawn], 1)
    assert ids_of(tickets) == [3]
    tickets.train(WEIGHT)
    assert tickets.ask().keys == [4]
    assert tickets.ask().keys == [4]


def epoch_of(tickets: Tickets, *, passes: int, groups: list[int], lead: int = 0) -> list[list[int]]:
    """Which batches are left after each pass: so many are drawn at once, and all but the lead trained on."""
    found = []
    tickets.forget()
    tickets.begin(0)
    drawn = held = 0
    for size in groups:
        for _ in range(size):
            tickets.draw(0, [drawn], 1)
            drawn, held = drawn + 1, held + 1
        while held > (0 if drawn == sum(groups) else lead):
            for _ in range(passes):
                tickets.train(WEIGHT)
                tickets.train(BIAS)
                tickets.step()
            held -= 1
            found.append([ticket.keys[0] for ticket in tickets.left(is_ended=False)])
    return found


@pytest.mark.parametrize(
    ("groups", "lead"),
    [([1, 1, 1, 1], 0), ([4], 0), ([2, 2], 0), ([3, 1], 0), ([2, 1, 1], 1), ([3, 1], 2)],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_batch_is_done_with_after_its_passes_however_many_are_drawn_at_once(
    groups: list[int], lead: int, passes: int
) -> None:
    tickets = Tickets(by_report=False)
    epoch_of(tickets, passes=passes, groups=groups, lead=lead)  # tells how many passes a batch takes
    drawn = [sum(groups[: n + 1]) for n, size in enumerate(groups) for _ in range(size)]
    for number, left in enumerate(epoch_of(tickets, passes=passes, groups=groups, lead=lead)):
        assert left == list(range(number + 1, drawn[min(number + lead, len(drawn) - 1)]))


def test_two_passes_a_batch_show_in_the_first_epoch_when_there_are_more_than_batches() -> None:
    tickets = Tickets(by_report=False)
    assert epoch_of(tickets, passes=2, groups=[2, 1, 1, 1], lead=1)[1:] == [[2], [3], [4], []]


def test_a_loop_that_draws_ahead_and_takes_other_passes_in_another_epoch_is_known_again_at_its_end() -> None:
    tickets = Tickets(by_report=False)
    epoch_of(tickets, passes=2, groups=[2, 1, 1], lead=1)
    epoch_of(tickets, passes=1, groups=[2, 1, 1], lead=1)
    assert epoch_of(tickets, passes=1, groups=[2, 1, 1], lead=1) == [[1], [2], [3], []]


def test_reports_close_the_batch_that_they_name_or_parts_of_it() -> None:
    tickets = Tickets(by_report=True)
    tickets.begin(0)
    for keys in ([1, 2], [3, 4], [5, 6]):
        tickets.draw(0, keys, 2)
    tickets.close([4, 3])
    tickets.close([1])
    tickets.close([9])
    assert [ticket.keys for ticket in tickets.left(is_ended=True)] == [[1, 2], [5, 6]]
    tickets.close([2])
    assert ids_of(tickets) == [5, 6]
    tickets.close()
    assert tickets.oldest is None


def test_an_iteration_that_goes_on_behind_a_newer_one_has_its_tickets_back() -> None:
    tickets = Tickets(by_report=True)
    tickets.begin(0)
    tickets.draw(0, [1], 1)
    tickets.begin(1)
    tickets.draw(1, [2], 1)
    assert ids_of(tickets) == [2]
    tickets.draw(0, [3], 1)
    assert [ticket.keys for ticket in tickets.left(is_ended=False)] == [[1], [2], [3]]

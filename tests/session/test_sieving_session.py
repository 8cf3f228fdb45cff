"""Criteria, one-time removal, balance and loss weights in somebody's loop."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import spfde
from helpers.short import by_form
from helpers.training import BATCH, EPOCHS, SAMPLES, Parts, make_images, make_parts, step, train

METHODS: dict[str, spfde.DataSieving | spfde.OneTimeRemoval] = {
    **{
        name: spfde.DataSieving(removed_fraction=0.25, criterion=name)
        for name in ("forgetting", "loss", "el2n", "random")
    },
    "balanced": spfde.DataSieving(removed_fraction=0.25, balanced=True),
    "balanced at random": spfde.DataSieving(removed_fraction=0.25, criterion="random", balanced=True),
    "rescaled": spfde.DataSieving(removed_fraction=0.25, criterion="loss", rescale_loss=True),
    "top-loss": spfde.DataSieving(removed_fraction=0.25, criterion="top-loss"),
    "repeated-random": spfde.DataSieving(removed_fraction=0.25, criterion="repeated-random"),
    "out of step": spfde.DataSieving(removed_fraction=0.25, offset_epochs=1),
    "all in the end": spfde.DataSieving(removed_fraction=0.25, full_last=0.375, rescale_loss=True),
    "all of it": spfde.DataSieving(
        removed_fraction=0.25, full_last=0.3, offset_epochs=1, criterion="top-loss", balanced=True, rescale_loss=True
    ),
    "one-time": spfde.OneTimeRemoval(removed_fraction=0.25, at_fraction=0.5),
    "one-time, balanced, by loss": spfde.OneTimeRemoval(removed_fraction=0.25, criterion="loss", balanced=True),
}


def recipe_with(sieving: spfde.DataSieving | spfde.OneTimeRemoval) -> spfde.Recipe:
    return spfde.Recipe(sparsity=spfde.SET(sparsity=0.5), sieving=sieving, update_interval_epochs=2)


def attach(parts: Parts, sieving: spfde.DataSieving | spfde.OneTimeRemoval, **options: Any) -> spfde.Session:
    return spfde.attach(parts.model, parts.optimizer, parts.loader, recipe_with(sieving), epochs=EPOCHS, **options)


def weighted_train(parts: Parts, session: spfde.Session, *, at_bottom: Callable[[int], None] | None = None) -> None:
    """The loop with a loss a sample, each with its weight."""
    for epoch in session.epochs():
        parts.model.train()
        for x, y in session.loader:
            logits = parts.model(x)
            loss = F.cross_entropy(logits, y, reduction="none")
            (session.loss_weights() * loss).mean().backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(logits, y)
        if at_bottom is not None:
            at_bottom(epoch)


# --- resuming --------------------------------------------------------------------------------------------------------


def outcome(parts: Parts, session: spfde.Session) -> dict[str, Any]:
    weights = {name: value.clone() for name, value in parts.model.state_dict().items()}
    return {**weights, "partial": session.partial_set, "removed": session.removed_set}


# Data workers change what the loader does, not the criterion: two stand for all.
RESUMED = [*((name, 0) for name in METHODS), ("el2n", 1), ("one-time", 1)]
SHORT = [
    ("forgetting", 0),
    ("el2n", 1),
    ("balanced", 0),
    ("rescaled", 0),
    ("all of it", 0),
    ("one-time, balanced, by loss", 0),
]


@pytest.mark.parametrize(
    ("name", "workers"), [each if each in SHORT else pytest.param(*each, marks=pytest.mark.long) for each in RESUMED]
)
def test_a_resumed_run_ends_like_one_that_never_stopped(name: str, workers: int) -> None:
    saved: list[bytes] = []

    def save(_: int) -> None:
        file = io.BytesIO()
        states = {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict()}
        torch.save({**states, "spfde": session.state_dict()}, file)
        saved.append(file.getvalue())

    parts = make_parts(workers=workers)
    session = attach(parts, METHODS[name], seed=3)
    weighted_train(parts, session, at_bottom=save)
    expected = outcome(parts, session)
    for state in saved[2:4] if workers else saved[:: by_form(3, 1)]:
        again = make_parts(seed=99, workers=workers)
        resumed = attach(again, METHODS[name], seed=3)
        states = torch.load(io.BytesIO(state), weights_only=True)
        again.model.load_state_dict(states["model"])
        again.optimizer.load_state_dict(states["optimizer"])
        resumed.load_state_dict(states["spfde"])
        weighted_train(again, resumed)
        found = outcome(again, resumed)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


# --- criteria --------------------------------------------------------------------------------------------------------


def test_the_samples_with_the_lowest_loss_leave(parts: Parts) -> None:
    session = attach(parts, spfde.DataSieving(removed_fraction=0.25, criterion="loss"))
    n_swap = spfde.DataSieving(removed_fraction=0.25).moves(SAMPLES)[0]
    held: list[Tensor] = []
    for epoch in session.epochs():
        if epoch in (2, 4, 6):
            left = held[-1][~torch.isin(held[-1], session.partial_set)]
            assert left.tolist() == held[-1][:n_swap].tolist()  # the loss below is the id itself
        held.append(session.partial_set)
        for x, _ in session.loader:
            loss = session.loader.current_indices.float().requires_grad_() + 0 * parts.model(x).sum()
            session.observe(loss=loss)


def test_random_sieving_needs_no_observe_and_takes_it(parts: Parts) -> None:
    session = attach(parts, METHODS["random"])
    for epoch in session.epochs():
        for x, y in session.loader:
            step(parts, session if epoch % 2 else None, x, y)
    assert session.sieve_turnover["ever_used"] == SAMPLES
    assert [row.samples for row in session.cost.rows] == [SAMPLES - 10] * EPOCHS


def test_other_criteria_still_insist_on_it(parts: Parts) -> None:
    session = attach(parts, METHODS["el2n"])
    batches = iter(session.loader)
    next(batches)
    next(batches)
    with pytest.raises(spfde.UsageError, match=r"observe.*2 batches"):
        session.end_epoch()


def test_an_interval_of_one_epoch_is_warned_of_where_forgetting_is_counted_in_it(recwarn: Any) -> None:
    def warned(sieving: spfde.DataSieving | spfde.OneTimeRemoval) -> bool:
        parts, before = make_parts(), len(recwarn)
        recipe = spfde.Recipe(sieving=sieving, update_interval_epochs=1)
        spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS)
        return any("update_interval_epochs" in str(one.message) for one in recwarn.list[before:])

    assert warned(METHODS["forgetting"])
    assert not any(warned(METHODS[name]) for name in ("loss", "el2n", "random", "one-time"))


# --- tasks without right and wrong -----------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Per-pixel classes of small images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.middle = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.middle(F.relu(self.body(x)))))


def make_task(kind: str) -> tuple[nn.Module, DataLoader[Any], Callable[[Tensor, Tensor], Tensor]]:
    x = torch.randn(SAMPLES, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    if kind == "segmentation":
        y = (x[:, 0] > 0).long()
        model, per_sample = Segmenter(2), lambda out, y: F.cross_entropy(out, y, reduction="none")  # [N, H, W]
    else:
        y = x.flatten(1)[:, :3]
        model = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        per_sample = lambda out, y: F.mse_loss(out, y, reduction="none")  # noqa: E731  # [N, 3]
    return model, DataLoader(TensorDataset(x, y), BATCH, shuffle=True), per_sample


@pytest.mark.parametrize("kind", ["segmentation", "regression"])
@pytest.mark.parametrize("name", ["forgetting", "loss", "random", "one-time", "rescaled"])
def test_a_loss_a_sample_serves_every_criterion_but_the_error_norm(kind: str, name: str) -> None:
    torch.manual_seed(0)
    model, loader, per_sample = make_task(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = spfde.attach(model, optimizer, loader, recipe_with(METHODS[name]), epochs=EPOCHS)
    for _ in session.epochs():
        for x, y in session.loader:
            loss = per_sample(model(x), y)
            (session.loss_weights() * loss.flatten(1).mean(1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.observe(loss=loss)
    assert len(session.removed_set) == 10
    assert session.sieve_turnover["ever_used"] == SAMPLES


@pytest.mark.parametrize("kind", ["segmentation", "regression"])
def test_the_error_norm_refuses_a_loss(kind: str) -> None:
    model, loader, per_sample = make_task(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = spfde.attach(model, optimizer, loader, recipe_with(METHODS["el2n"]), epochs=EPOCHS)
    x, y = next(iter(session.loader))
    with pytest.raises(spfde.InvalidArgument, match="el2n"):
        session.observe(loss=per_sample(model(x), y))


# --- all samples in the last epochs, and draws anew ------------------------------------------------------------------


def test_all_samples_are_trained_on_in_the_last_epochs_with_weights_of_one() -> None:
    """A quarter of 40 in each of 8 epochs are 80: 16 in each of the 5 before the last three."""
    parts = make_parts()
    session = attach(parts, METHODS["all in the end"])
    found, weights = [], []
    for epoch in session.epochs():
        n_batches, trained = len(session.loader), 0
        for x, y in session.loader:
            logits = parts.model(x)
            own = session.loss_weights()
            weights += own.tolist() if epoch >= 5 else []
            (own * F.cross_entropy(logits, y, reduction="none")).mean().backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(logits, y)
            trained += len(y)
        assert n_batches == -(-trained // BATCH)
        found.append((trained, len(session.partial_set), len(session.removed_set), session.sieve_turnover["moved"]))
    assert [each[:3] for each in found] == [(24, 24, 16)] * 5 + [(SAMPLES, SAMPLES, 0)] * 3
    assert [moved > 0 for *_, moved in found] == [False, False, True, False, True, True, False, False]
    assert found[5][3] == 16
    assert weights == [1.0] * (3 * SAMPLES)
    assert session.sieve_turnover["ever_used"] == SAMPLES
    assert [row.samples for row in session.cost.rows] == [24] * 5 + [SAMPLES] * 3
    assert session.cost.rows[-1].saved_by_sieving == 0


def test_evidence_of_samples_that_wait_stays_where_the_partial_set_is_drawn_anew(parts: Parts) -> None:
    """The loss of a sample is its id: of those in the pool, the lowest leave, whether they waited or not."""
    session = attach(parts, METHODS["top-loss"])
    drawn = []
    for _ in session.epochs():
        drawn.append(session.removed_set.tolist())
        for x, _ in session.loader:
            loss = session.loader.current_indices.float().requires_grad_() + 0 * parts.model(x).sum()
            session.observe(loss=loss)
    for before, removed in zip(drawn[2:6:2], drawn[4:8:2], strict=True):
        outside, lowest = removed[:5], removed[5:]
        assert lowest == sorted(set(range(SAMPLES)) - set(outside) - unseen(drawn, before))[:5]


def unseen(drawn: list[list[int]], until: list[int]) -> set[int]:
    """Samples that were left out all the time, which are infinitely hard."""
    found = set(range(SAMPLES))
    for removed in drawn[: drawn.index(until) + 1]:
        found &= set(removed)
    return found


def test_a_fresh_random_subset_needs_no_reports(parts: Parts) -> None:
    session = attach(parts, METHODS["repeated-random"])
    for _ in session.epochs():
        for x, y in session.loader:
            step(parts, None, x, y)
    assert not session.needs_reports
    assert [row.samples for row in session.cost.rows] == [SAMPLES - 10] * EPOCHS


def test_samples_move_in_other_epochs_than_masks(parts: Parts) -> None:
    session, moved, mutated = attach(parts, METHODS["out of step"]), [], []
    masks = {name: mask.clone() for name, mask in session.masks.items()}
    for epoch in session.epochs():
        for x, y in session.loader:
            step(parts, session, x, y)
        if session.sieve_turnover["moved"]:
            moved.append(epoch)
        if any(not torch.equal(mask, masks[name]) for name, mask in session.masks.items()):
            mutated.append(epoch)
        masks = {name: mask.clone() for name, mask in session.masks.items()}
    assert moved == [1, 3, 5]
    assert mutated == [2, 4, 6]


# --- one-time removal ------------------------------------------------------------------------------------------------


def test_all_samples_are_used_until_the_removal_and_the_rest_to_the_end(parts: Parts) -> None:
    session = attach(parts, METHODS["one-time"])
    sizes, removed = [], []

    def look(_: int) -> None:
        sizes.append((len(session.partial_set), session.sieve_turnover["moved"]))
        removed.append(session.removed_set)

    train(parts, session, at_bottom=look)
    assert sizes == [(40, 0)] * 4 + [(30, 10)] + [(30, 0)] * 3
    assert all(torch.equal(removed[4], later) for later in removed[4:])
    assert [row.samples for row in session.cost.rows] == [40] * 4 + [30] * 4
    assert [row.partial_samples for row in session.cost.rows] == [40] * 4 + [30] * 4


def test_the_bill_of_a_one_time_removal_is_the_planned_one(parts: Parts) -> None:
    recipe = spfde.Recipe(sieving=METHODS["one-time"], update_interval_epochs=2)
    bill = spfde.plan(make_parts().model, torch.zeros(1, 2, 8, 8), recipe, EPOCHS, SAMPLES, batch_size=BATCH)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS)
    train(parts, session)
    assert session.cost.totals.cost == bill.cost
    assert bill.samples_in_use == (40,) * 4 + (30,) * 4
    assert bill.partial_samples == 30
    assert bill.flops_ratio == pytest.approx((4 * 40 + 4 * 30) / (8 * 40))
    assert "8 epochs of 40 of 40 samples, 30 from epoch 4 on" in str(bill)
    assert bill.to_dict()["partial_samples"] == 30


def test_forgetting_is_counted_from_the_first_epoch_on(parts: Parts) -> None:
    """Samples that are forgotten in the first interval alone stay, though a circular sieve would have started again."""
    session = attach(parts, METHODS["one-time"])
    hard = set(range(30))
    for epoch in session.epochs():
        if epoch == 4:
            break
        for _ in session.loader:
            ids = session.loader.current_indices
            wrong = torch.tensor([epoch == 1 and int(i) in hard for i in ids])
            session.observe(correct=~wrong)
    assert set(session.removed_set.tolist()) == set(range(30, 40))


def test_a_run_too_short_for_the_removal_is_refused(parts: Parts) -> None:
    recipe = spfde.Recipe(sieving=spfde.OneTimeRemoval())
    with pytest.raises(spfde.InvalidArgument, match="at_fraction"):
        spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=2)
    with pytest.raises(spfde.InvalidArgument, match="at_fraction"):
        spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), recipe, 2, SAMPLES)


# --- balance ---------------------------------------------------------------------------------------------------------

CLASSES = make_images().tensors[1]


def counts(ids: Tensor) -> list[int]:
    return torch.bincount(CLASSES[ids], minlength=4).tolist()


@pytest.mark.parametrize("known", [True, False])
def test_the_same_share_of_each_class_leaves_at_every_update_epoch(parts: Parts, known: bool) -> None:
    session = attach(parts, METHODS["balanced"], labels=CLASSES if known else None)
    whole = torch.bincount(CLASSES, minlength=4)
    if known:
        assert all(abs(out - n / 4) < 1 for out, n in zip(counts(session.removed_set), whole.tolist(), strict=True))
    held: list[Tensor] = []
    for epoch in session.epochs():
        if epoch in (2, 4, 6):
            left = held[-1][~torch.isin(held[-1], session.partial_set)]
            exact = [n * len(left) / len(held[-1]) for n in counts(held[-1])]
            assert all(abs(out - share) < 1 for out, share in zip(counts(left), exact, strict=True))
        held.append(session.partial_set)
        for x, y in session.loader:
            step(parts, session, x, y)


def test_balance_without_classes_is_refused_with_the_remedy(parts: Parts) -> None:
    session = attach(parts, METHODS["balanced"])
    x, _ = next(iter(session.loader))
    with pytest.raises(spfde.InvalidArgument, match=r"balanced=True.*labels="):
        session.observe(loss=parts.model(x).mean(1))


def test_balance_by_loss_takes_classes_beside_the_loss(parts: Parts) -> None:
    session = attach(parts, spfde.DataSieving(removed_fraction=0.25, criterion="loss", balanced=True))
    for _ in session.epochs():
        for x, y in session.loader:
            session.observe(y=y, loss=F.cross_entropy(parts.model(x), y, reduction="none"))
    assert len(session.removed_set) == 10


def test_labels_of_another_length_are_refused_at_the_door(parts: Parts) -> None:
    with pytest.raises(spfde.InvalidArgument, match=r"labels=.*each of the 40 samples"):
        attach(parts, METHODS["balanced"], labels=[0, 1])


# --- loss weights ----------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_batch_and_their_mean_over_an_epoch_is_one(parts: Parts) -> None:
    session = attach(parts, METHODS["rescaled"])
    for epoch in session.epochs():
        collected = []
        for x, y in session.loader:
            weights = session.loss_weights()
            assert torch.equal(weights, session.loss_weights(session.loader.current_indices))
            collected.append(weights)
            step(parts, session, x, y)
        together = torch.cat(collected)
        assert float(together.mean()) == pytest.approx(1.0)
        assert (len(together.unique()) > 1) == (epoch >= 4)


def test_without_rescaling_the_weights_are_ones(parts: Parts) -> None:
    for sieving in (METHODS["forgetting"], None):
        session = spfde.attach(parts.model, parts.optimizer, parts.loader, spfde.Recipe(sieving=sieving), epochs=EPOCHS)
        next(iter(session.loader))
        assert session.loss_weights().tolist() == [1.0] * BATCH
        session.detach()


def test_a_loop_that_forgets_the_weights_is_told(parts: Parts) -> None:
    session = attach(parts, METHODS["rescaled"])
    with pytest.raises(spfde.UsageError, match=r"loss_weights\(\)"):
        train(parts, session)


def test_weights_without_a_batch_are_refused(parts: Parts) -> None:
    session = attach(parts, METHODS["rescaled"])
    with pytest.raises(spfde.UsageError, match=r"loss_weights\(\) cannot tell"):
        session.loss_weights()
    with pytest.raises(spfde.InvalidArgument, match="not in the partial set"):
        session.loss_weights(session.removed_set[:1])


# --- samples by their positions --------------------------------------------------------------------------------------


class Listed(list):
    """A data set that its owner may add to."""


@pytest.mark.parametrize("change", ["grows", "shrinks"])
@pytest.mark.parametrize("at", ["at_top", "at_bottom"])
def test_a_data_set_of_another_length_ends_the_run_when_its_batches_are_drawn(change: str, at: str) -> None:
    parts = make_parts()
    data = Listed(make_images())
    parts.loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    session = attach(parts, METHODS["loss"])

    def changes(epoch: int) -> None:
        if epoch == (3 if at == "at_top" else 2):
            data[20:] = [] if change == "shrinks" else [*make_images(), *make_images()]

    with pytest.raises(spfde.UsageError, match="Attach anew") as found:
        train(parts, session, **{at: changes})
    assert session.epoch == 3
    assert str(SAMPLES) in str(found.value)


def test_indices_of_the_set_within_a_subset_are_said_to_be_of_another_set() -> None:
    parts = make_parts()
    images = TensorDataset(*make_images().tensors, torch.arange(100, 100 + SAMPLES) % SAMPLES)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5)).tolist()
    parts.loader = DataLoader(Subset(images, order), BATCH)
    session = attach(parts, METHODS["loss"])
    with pytest.raises(spfde.UsageError, match="Subset"):  # noqa: PT012
        for _ in session.epochs():
            for x, y, inner in session.loader:
                step(parts, None, x, y)
                session.observe(loss=torch.ones(len(y)), indices=inner)
    assert session.epoch == 0
